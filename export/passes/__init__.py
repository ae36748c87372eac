"""Rewrites whole graphs: `simplify` removes shape arithmetic, `ort_fusions` uses ONNX Runtime's own
operators, `merge` joins segments, and `quantise` writes int8 bundles with data of `calibration`."""
