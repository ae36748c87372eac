"""The bundle: the whole contract between workstation and device.

`manifest` holds its structs, `reader` opens one so that nothing is trusted, `writer` makes one that
is whole or not there, `onnx_wire` reads ONNX files without onnx, and `policy` says when rows stop.
Needs numpy and msgspec.
"""
