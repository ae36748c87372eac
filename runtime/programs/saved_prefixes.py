"""`SavedPrefixes`: the part of a `edgeexit.runtime.model.Model` that saves and loads the states of
what many prompts begin with."""

from __future__ import annotations

import os

from edgeexit.errors import InputError, StateError, UsageError
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.executor.tables import check_ids
from edgeexit.runtime.programs.arguments import Prompt, check_room
from edgeexit.runtime.programs.modes.full import Full
from edgeexit.runtime.programs.prefix_cache import taken
from edgeexit.runtime.programs.prefix_file import read_prefix, write_prefix
from edgeexit.runtime.programs.prompts import read_prompts
from edgeexit.runtime.programs.text_program import TextProgram


class SavedPrefixes(TextProgram):
    """Saves and loads states of first tokens."""

    def save_prefix(self, path: str | os.PathLike[str], prompt: Prompt) -> int:
        """Computes the states of what many prompts begin with, such as a system prompt, and saves
        them in a file for `load_prefix`. It is bound to this bundle and engine.

        Args:
            prompt: A text or a list of token ids. With a chat template, prompts begin like
                ``chat_prompt`` of the system message alone only up to where the template goes on;
                what does not fit is computed as usual.

        Returns:
            The number of tokens.

        Raises:
            InputError: The prompt is invalid, or longer than the capacity.
            StateError: The model is in use, or what it keeps cannot be copied: an encoder reads the
                prompts, or the states are on a GPU.
            MeasurementError, UsageError: The file cannot be written.
        """
        _check_path(path)
        self._enter()
        try:
            session = self._session_for_prefix()
            given = read_prompts(self.bundle, prompt, None, self.encode)
            if len(given.tokens) > 1:
                raise InputError(
                    f"{len(given.tokens)} prompts are given to save",
                    fix="Save one prompt in each file.",
                )
            [tokens] = given.tokens
            check_ids(self._text_table(), tokens)
            check_room(len(tokens), 1, self.capacity, self.bundle.manifest.limits.get("positions"))
            early = [n for n, own in enumerate(session.adapters) if own is not None]
            names = ["" if exit_ is None else exit_.name for exit_ in session.exits]
            Full(session, names, asked=early).prefill([tokens])
            prefix = taken(session, 0, len(tokens))
            write_prefix(path, prefix, self.bundle, self.describe_engine())
            return len(tokens)
        finally:
            self._lock.release()

    def load_prefix(self, path: str | os.PathLike[str]) -> int:
        """Keeps the states in a file of `save_prefix`, for prompts that begin with the same tokens.
        They stay until ``prefixes.clear()``. Returns the number of tokens.

        Raises:
            DataError: The file is missing or damaged.
            StateError: It is of another bundle or engine, too long for the capacity, or larger than
                what ``prefixes.limit_bytes`` leaves; or the model is in use.
        """
        _check_path(path)
        self._enter()
        try:
            session = self._session_for_prefix()
            prefix = read_prefix(path, self.bundle, self.describe_engine(), session)
            check_ids(self._text_table(), prefix.tokens)
            self.prefixes.add(prefix)
            return len(prefix.tokens)
        finally:
            self._lock.release()

    def _session_for_prefix(self) -> Session:
        """An empty session whose states can be copied."""
        self._decoding()
        session = self.session(1)
        why = "" if session.engine.gpu is None else "they are on a GPU"
        if not self._reusable(session):
            why = "they depend on more than the tokens before (an encoder, or the whole prompt)"
        if why:
            raise StateError(
                f"{self.bundle.path}: states of texts cannot be saved: {why}",
                fix="Give the whole prompt each time.",
            )
        return session


def _check_path(path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"path is a {type(path).__name__}", fix="Give the path of a file.")


__all__ = ["SavedPrefixes"]
