"""Hides log messages of libraries that do not matter to users; at level DEBUG they are shown."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silences these loggers; by default those of the graph libraries."""
    loggers = [logging.getLogger(name) for name in names or ("onnx_ir", "onnxscript")]
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        loggers = []
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield


@contextlib.contextmanager
def keep_root_logger() -> Iterator[None]:
    """For imports of modules that set up the root logger, which belongs to the program."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
