"""What engines on NVIDIA GPUs share: the driver, one stream, memory on both sides, and graphs whose
tensors are copied only where they must cross."""
