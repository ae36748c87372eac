"""`Loaded`: the base of loaded models. It refuses use after closing and in a forked process."""

from __future__ import annotations

import abc
import os
from types import TracebackType
from typing import Any, TypeVar

from edgeexit.errors import StateError

LoadedModel = TypeVar("LoadedModel", bound="Loaded")


class Loaded(abc.ABC):
    """A model with engines in this process. As a context manager, it closes itself.

    Attributes:
        instead_of: The requested engine, if it cannot be used and the fallback runs instead.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self.instead_of: str | None = None

    @abc.abstractmethod
    def close(self) -> None:
        """Releases engines and buffers. The model cannot be used afterwards; closing it again does
        nothing."""

    def describe_engine(self) -> dict[str, str]:
        """Engine, library, version and settings; also ``instead_of`` if the fallback runs."""
        asked = {} if self.instead_of is None else {"instead_of": self.instead_of}
        return {**self._describe_engine(), **asked}

    @abc.abstractmethod
    def _describe_engine(self) -> dict[str, str]: ...

    def __enter__(self: LoadedModel) -> LoadedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise StateError("a model cannot be copied or pickled", fix="Load the bundle again there.")

    @property
    def _forked(self) -> bool:
        """Whether this is a child of the process that loaded the model."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._forked:
            raise StateError(
                "the model was loaded before this process forked; engines cannot be used after a "
                "fork",
                fix='Load the bundle in the child, or start children with "spawn".',
            )

    @staticmethod
    def _closed() -> StateError:
        return StateError("the model is closed", fix="Load the bundle again.")
