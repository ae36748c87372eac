"""An ONNX file with exit outputs, cut into segments: read (`read_onnx`), shapes resolved
(`axis_names`), cut by ancestry (`cut`), its rows found by running it (`prove_rows`), written
(`export_onnx`)."""
