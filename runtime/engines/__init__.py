"""Engines: what executes a component. `base` is their interface; each library has its own module,
imported when it is used (`onnxruntime`, `tensorrt`), over memory of `cuda` and `host`."""
