"""Shared by engines on NVIDIA GPUs: the driver, one stream, host and device memory, and copies
between them."""
