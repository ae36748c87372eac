"""Silence: what libraries log for their own authors stays out of the user's log, but at DEBUG."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silences these loggers; without names, those of the graph libraries."""
    loggers = [logging.getLogger(name) for name in names or ("onnx_ir", "onnxscript")]
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        loggers = []
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield
