"""Cuts an ONNX file with exit outputs into segments: reads it (`read_onnx`), finds the row axis
(`find_rows`), resolves shapes (`axis_names`), cuts the graph (`cut`), proves the row axis of every
tensor (`prove_rows`) and writes the bundle (`export_onnx`)."""
