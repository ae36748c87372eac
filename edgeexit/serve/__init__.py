"""A bundle over HTTP: ``edgeexit serve``, which alone imports this package (extra ``serve``).

A request passes `guard` (host, token, size), is read by the routes of `completions` (models that
write text, in OpenAI's form) or `predict` (models that answer in one pass), and waits in `jobs` for
its turn on the model's only thread, where `texts` writes. `app` puts these together, `server` binds
the address and runs them until a signal ends it. The event loop never computes.
"""
