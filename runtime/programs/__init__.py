"""How an answer is made: one pass (`forward`), or token by token (`generate`, with its `modes`)."""
