"""The bundle: the whole contract between workstation and device.

`manifest` holds its structs, `layout` the names of its files. `reader` opens one so that nothing is
trusted: `validate` checks what the manifest refers to, `validate_steps` walks its program, and
`tensor_forms` says which tensors fit together. `writer` makes a bundle that is whole or not there,
`onnx_wire` reads ONNX files without onnx, and `policy` says when rows stop. Needs numpy and
msgspec.
"""
