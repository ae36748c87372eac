"""Engines run components. `base` is their interface. Each library has a module that is imported
when it is used (`onnxruntime`, `tensorrt`). `host` and `cuda` provide the memory."""
