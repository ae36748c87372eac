"""How the next tokens of a text come about. A mode decides what runs when: `full` (and what modes
share), `exact` with its `drafter`, `early` (``fast`` and ``approximate``). They run an
`edgeexit.runtime.executor.session`: the graphs bound to buffers, with caches and the shared head.
"""
