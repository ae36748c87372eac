"""What every loaded model is: usable in the process that loaded it, until it is closed."""

from __future__ import annotations

import abc
import os
from types import TracebackType
from typing import Any, TypeVar

from edgeexit.errors import StateError

LoadedModel = TypeVar("LoadedModel", bound="Loaded")


class Loaded(abc.ABC):
    """A model whose engines live in this process; a context manager that closes it.

    Attributes:
        instead_of: The engine that was asked for, where another is used because it cannot be.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self.instead_of: str | None = None

    @abc.abstractmethod
    def close(self) -> None:
        """Releases engines and buffers; closing twice is fine, using the model again is not."""

    def describe_engine(self) -> dict[str, str]:
        """What executes the model: engine, library, version, settings; and what was asked for
        instead, where it could not be used."""
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
                "the model was loaded before this process forked; its engines do not survive that",
                fix='Load the bundle in the child, or start children with "spawn".',
            )

    @staticmethod
    def _closed() -> StateError:
        return StateError("the model is closed", fix="Load the bundle again.")
