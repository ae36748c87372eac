"""Decoding modes. A mode decides which components run for which tokens: `full` (with what all modes
share), `exact` with its `drafter`, and `early` (``fast`` and ``approximate``). `choose` creates
them. They run an `edgeexit.runtime.executor.session.Session`.
"""
