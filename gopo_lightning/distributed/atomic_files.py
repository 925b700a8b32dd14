"""Writing under another name, so that nobody meets half a file; and clearing away what a killed writer left there.

A writer holds a lock (flock) on what it writes until it ends, however it ends: what is not locked has no writer left.
"""

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

_HOST = re.sub(r"[^\w.]", "_", socket.gethostname())
_TORN = re.compile(rf"\.writing-{re.escape(_HOST)}-\d+-\d+$")
"""Of this host alone: not every file system shows the locks of another."""


@contextmanager
def writing_aside(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """A new, empty file or folder next to ``path``, to be filled and renamed to ``path``; an error deletes it.

    Whatever writers that are dead have left in the same folder is deleted first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_torn(path.parent)
    aside, lock = _make(path, is_folder)
    try:
        yield aside
    except BaseException:
        _delete(aside)
        raise
    finally:
        os.close(lock)


def sync_folder(folder: Path) -> None:
    """Let a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_torn(folder: Path) -> None:
    """Delete what dead writers on this host left in ``folder``, under whatever name they wrote."""
    for path in folder.iterdir():
        if _TORN.search(path.name):
            with suppress(OSError):  # someone writes it, or another process has just deleted it
                lock = _lock(path)
                _delete(path)
                os.close(lock)


def _make(path: Path, is_folder: bool) -> tuple[Path, int]:
    """A name that nothing has, and the descriptor that holds its lock."""
    for number in count():
        aside = path.with_name(f"{path.name}.writing-{_HOST}-{os.getpid()}-{number}")
        try:
            if is_folder:
                aside.mkdir()
            else:
                aside.touch(exist_ok=False)
            lock = _lock(aside)
        except (FileExistsError, FileNotFoundError, BlockingIOError):
            continue  # taken; or deleted between the two lines, as by a process that found it unlocked
        if aside.exists():
            return aside, lock
        os.close(lock)
    raise AssertionError("there is always a next number")


def _lock(path: Path) -> int:
    """The descriptor of ``path``, locked; BlockingIOError where someone else holds the lock."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
