"""Rewrites of whole graphs: shape arithmetic removed (`simplify`), operators of ONNX Runtime
(`ort_fusions`), segments merged (`merge`), products in int8 (`quantise`, on data of
`calibration`)."""
