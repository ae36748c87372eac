"""The ``decode`` program: text that grows token by token.

`generate` holds what callers see: `Decoder`, its `Generation` of pieces, and its use of `chat`
templates and `sampling`. A mode decides what runs when: `modes` (what they share, and ``full``),
`exact` with its `drafter`, `early` (``fast`` and ``approximate``). They run a `session`: the graphs
bound to buffers, with `caches` and the shared `head`.
"""
