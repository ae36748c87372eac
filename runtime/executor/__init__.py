"""Runs components on an engine. `components` opens them; `slots` and `bindings` give their tensors
memory; `states` holds what they keep between runs; `rows` runs a chain over rows, `session` over
the tokens of texts."""
