"""Folders of exported models: written aside and renamed, and replaced only where nothing but an export is lost.

An export lists its own files with their SHA-256 in `.gopo_lightning.json`. A folder whose files are exactly those is
an export that nobody has touched, and the next one may take its place. Any other folder stays as it is.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from gopo_lightning.distributed.atomic_files import writing_aside

LISTING = ".gopo_lightning.json"


def check_export_folder(folder: Path, option: str) -> None:
    """Refuse a folder that an export could not replace without losing something.

    Raises:
        ValueError: ``folder`` holds anything beside an unchanged export, is a file or a mount point, or its parent can
            not be written to. ``option`` is the setting that names it.
    """
    folder = folder.resolve()
    reason = _foreign(folder)
    if reason is not None:
        raise ValueError(
            f"{option}={folder}: {reason}, and an export replaces the whole folder. Only an earlier export that nobody "
            "has changed is replaced. Name a folder that does not exist yet, or move this one away."
        )
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or os.path.ismount(folder):
        raise ValueError(
            f"{option}={folder} cannot be made in {parent}: it is written under another name beside it and renamed. "
            "Name a folder within one that you may write to."
        )


def write_export(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Let ``fill`` write into a new folder, and rename that to ``folder``; the folder it is now.

    An unchanged export that is there makes room. Anything else stays, and the new export goes beside it, to
    ``<folder>-2`` and so on: what a run has trained is not lost.
    """
    folder = folder.resolve()
    with writing_aside(folder, is_folder=True) as aside:
        fill(aside)
        _write_listing(aside)
        target = _free(folder)
        _replace(aside, target)
    return target


def _free(folder: Path) -> Path:
    """``folder``, or the first name after it where an export may go."""
    target, number = folder, 1
    while (reason := _foreign(target)) is not None:
        rank_zero_warn(f"{target} is left as it is: {reason}.")
        number += 1
        target = folder.with_name(f"{folder.name}-{number}")
    return target


def _foreign(folder: Path) -> str | None:
    """Why ``folder`` is no export of ours; None where it is one, empty, or not there."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return "it is a file"
    listed = _listed(folder)
    if not listed:
        names = sorted(path.name for path in folder.iterdir())
        return f"it holds {', '.join(names[:3])}, which is no export" if names else None
    present = _content(folder)
    unlisted = sorted(present - listed.keys() - {LISTING})
    if unlisted:
        return f"it holds {', '.join(unlisted[:3])} beside an export"
    changed = [name for name in sorted(present - {LISTING}) if _sha256(folder / name) != listed[name]]
    return f"its {changed[0]} was changed after the export" if changed else None


def _content(folder: Path) -> set[str]:
    """Files and empty folders under ``folder``, by their paths within it."""
    found = {path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink() or not any(path.iterdir())}
    return {path.relative_to(folder).as_posix() for path in found}


def _listed(folder: Path) -> dict[str, str]:
    """SHA-256 by file of the export in ``folder``; empty where there is none."""
    try:
        listed = json.loads((folder / LISTING).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return listed if isinstance(listed, dict) else {}


def _write_listing(folder: Path) -> None:
    listed = {name: _sha256(folder / name) for name in sorted(_content(folder))}
    (folder / LISTING).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    for name in listed:  # safetensors lets nobody but the owner read what it writes
        if (path := folder / name).is_file():
            path.chmod((folder / LISTING).stat().st_mode)


def _sha256(path: Path) -> str | None:
    """In hexadecimal digits; None for what is no plain file."""
    if path.is_symlink() or not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; an export already there makes room first, and only its files are deleted."""
    old = next(path for n in count() if not (path := target.with_name(f"{target.name}.old-{n}")).exists())
    if target.exists():
        target.rename(old)
    source.rename(target)
    for name in (*_listed(old), LISTING):
        if name in _content(old):
            (old / name).unlink()
    for parent, _, _ in os.walk(old, topdown=False):
        with suppress(OSError):  # something was put there in the meantime, and stays
            Path(parent).rmdir()
