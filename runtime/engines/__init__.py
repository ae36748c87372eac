"""Engines: what executes a component. `base` is all that the executor knows of them; each library
has a module of its own (`onnxruntime`, `tensorrt`, over `cuda` on GPUs and `host` memory), imported
when it is asked for."""
