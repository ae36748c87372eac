"""The bundle: the files that the workstation exports and the device runs.

`manifest` holds the structs of ``manifest.json``, `layout` the file names. `reader` opens a bundle
and checks all of it: `validate` checks references in the manifest, `validate_steps` the program,
and `tensor_forms` which tensors match. `writer` writes bundles atomically, `onnx_wire` reads ONNX
files without onnx, and `policy` decides when rows stop. Needs numpy and msgspec.
"""
