"""TensorRT engines, ahead of time or for this device: what there is to `build`, for which sizes
(`profiles`), one process per engine (`worker`)."""
