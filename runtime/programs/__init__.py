"""Runs programs: in one pass (`forward`), or token by token (`generate`, with its `modes`)."""
