"""What a sensor gives (`Source`), and why one cannot be used (`Unusable`)."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Literal

Kind = Literal["watts", "joules"]


class Unusable(Exception):
    """Why a sensor cannot be used: what is missing, and how to get it."""


class Source(abc.ABC):
    """A sensor that can be read.

    Attributes:
        name: Of the sensor, such as ``hwmon``.
        parts: What its total is the sum of: rails or domains.
        kind: ``watts``: the power now; ``joules``: a counter that only grows.
        interval_s: Shortest time after which it has something new.
    """

    name: str
    parts: tuple[str, ...]
    kind: Kind
    interval_s: float

    @abc.abstractmethod
    def read(self) -> float:
        """Watts, or joules.

        Raises:
            Unusable: It cannot be read any more.
        """

    def close(self) -> None:  # noqa: B027, most hold nothing
        """Releases what it holds."""


def read_number(path: Path) -> int:
    """The number in a file of sysfs.

    Raises:
        Unusable: It cannot be read, or holds none.
    """
    try:
        return int(path.read_text())
    except PermissionError:
        raise Unusable(f"{path} may not be read: sudo chmod a+r {path}") from None
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None
    except ValueError:
        raise Unusable(f"{path} holds no number") from None


__all__ = ["Kind", "Source", "Unusable", "read_number"]
