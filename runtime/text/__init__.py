"""Conversion between text and tokens: the bundle's `tokenizer` and its `chat` templates."""
