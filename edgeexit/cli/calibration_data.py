"""``edgeexit export --calibration-data``: reads the data before the export, so that errors in it
are reported immediately."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeexit.cli.common import add_current_directory

if TYPE_CHECKING:
    from edgeexit.bundle.reader import Bundle
    from edgeexit.export.contract import SplitModel


def read_calibration_data(data: str, split: SplitModel, *, int8: bool) -> list[Mapping[str, Any]]:
    """Reads batches of the data, as many as a quantised export uses; `int8`: of activations, too.

    Raises:
        ExportError: The model cannot be quantised.
        DataError: The data cannot be read, or does not fit the model.
        UsageError: There is too little data.
    """
    from edgeexit.export.passes.calibration import split as shares
    from edgeexit.export.write import check_int8, describe_bundle
    from edgeexit.measure.data import open_data

    if int8:
        check_int8(split)
    add_current_directory()
    found: list[Mapping[str, Any]] = []

    def kept(bundle: Bundle) -> Iterator[Mapping[str, Any]]:
        for batch in open_data(data, bundle).batches(8):
            found.append(batch.inputs)
            yield batch.inputs

    with tempfile.TemporaryDirectory(prefix="edgeexit-") as folder:
        described = describe_bundle(split, Path(folder))
        shares(kept(described), described.manifest)
    return found


__all__ = ["read_calibration_data"]
