"""Imports engines from other machines into the engine cache.

A plan is executable code. A plan from another machine is accepted only with a signature by an
allowed signer (`edgeexit.runtime.engines.tensorrt.signing`), or if the user trusts it explicitly.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Literal

from edgeexit.bundle.reader import Bundle, sha256_of
from edgeexit.errors import IntegrityError, UsageError
from edgeexit.runtime.engines.tensorrt.engine_cache import (
    INDEX,
    EngineSet,
    building,
    cannot_write,
    check_plans,
    folder_of,
    parse_index,
    read_raw_index,
    write_index,
)
from edgeexit.runtime.engines.tensorrt.signing import default_signers, verify_signature

Trust = Literal["signature", "anything"]


def import_engines(
    source: Path,
    root: Path,
    bundle: Bundle,
    *,
    trust: Trust = "signature",
    signers: Path | None = None,
) -> dict[Path, str | None]:
    """Copies engines from other machines into the cache.

    Args:
        source: A folder with ``engines.json``, or a folder of such folders (``DIGEST/KEY``, as
            `edgeexit build -o` writes them).
        root: The cache.
        bundle: The bundle that the engines must be built from.
        trust: ``signature``: accept only engines with a valid signature by an allowed signer.
            ``anything``: accept all; the user is responsible for them.
        signers: File of allowed signers, as ssh-keygen reads it; None: ``allowed_signers`` in the
            configuration folder.

    Returns:
        Folder of each set in the cache -> its signer; None if signatures are not checked.

    Raises:
        UsageError: There is nothing to import.
        IntegrityError: Engines are for another bundle, were changed, or have no valid signature.
            In this case nothing is imported.
    """
    folders = _with_index(source)
    if not folders:
        raise UsageError(
            f"{source}: there are no engines (no {INDEX})",
            fix="Give the folder that `edgeexit build -o` wrote.",
        )
    # Read once, so that the verified index is the copied index.
    raws = [read_raw_index(folder) for folder in folders]
    sets = [
        (folder, raw, parse_index(folder, raw)) for folder, raw in zip(folders, raws, strict=True)
    ]
    mine = [entry for entry in sets if entry[2].bundle == bundle.digest]
    if not mine:
        raise IntegrityError(
            f"{source}: these engines were built from the bundle {sets[0][2].bundle[:12]}, "
            f"{bundle.path} is {bundle.digest[:12]}",
            fix="Build engines of this bundle, or give the bundle that they were built from.",
        )
    names: list[str | None] = []
    for folder, raw, engines in mine:
        allowed = default_signers() if signers is None else signers
        names.append(verify_signature(folder, raw, allowed) if trust == "signature" else None)
        check_plans(folder, engines)
    places = [_copy(folder, engines, root) for folder, _, engines in mine]
    return dict(zip(places, names, strict=True))


def _with_index(source: Path) -> list[Path]:
    """Folders with an index: `source`, or up to two levels below it."""
    if not source.is_dir():
        return []
    places = [source, *source.glob("*"), *source.glob("*/*")]
    return sorted(place for place in places if (place / INDEX).is_file())


def _copy(folder: Path, engines: EngineSet, root: Path) -> Path:
    """Copies a set. All copies are hashed before any is moved into place, and until then there is
    no index: a plan that differs from the verified plan is never used."""
    target = folder_of(root, engines.bundle, engines.key)
    with building(target):
        partials = {plan.file: target / f"{plan.file}.partial" for plan in engines.plans}
        try:
            for plan in engines.plans:
                shutil.copyfile(folder / plan.file, partials[plan.file])
                if sha256_of(partials[plan.file]) != plan.sha256:
                    raise IntegrityError(
                        f"{folder / plan.file}: changed while it was imported",
                        fix="Import it again.",
                    )
            (target / INDEX).unlink(missing_ok=True)
            for name, partial in partials.items():
                os.replace(partial, target / name)
        except OSError as error:
            raise cannot_write(target, error) from error
        finally:
            for partial in partials.values():
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
        write_index(target, engines)
    return target


__all__ = ["import_engines"]
