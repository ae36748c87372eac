"""Components opened on an engine and bound by name: their tensors (`slots`, `bindings`), what they
keep between runs (`states`), the rows and tokens that go on (`chain`, `session`)."""
