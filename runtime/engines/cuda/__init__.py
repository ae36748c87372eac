"""What engines on NVIDIA GPUs share: the driver, one stream, memory on both sides, and copies of
only those tensors that cross between host and device."""
