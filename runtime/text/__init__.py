"""Text in and out: the bundle's `tokenizer` and its `chat` templates."""
