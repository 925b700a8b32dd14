"""What a killed writer left is cleared away; what a living one writes is not touched."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from gopo_lightning.distributed.atomic_files import clear_torn, writing_aside


def start_writing(path: Path, *, is_folder: bool) -> int:
    """The process id of a writer that does not end by itself."""
    child = os.fork()
    if child == 0:
        with writing_aside(path, is_folder=is_folder) as aside:
            (aside / "weights" if is_folder else aside).write_text("half of it")
            time.sleep(60)
        os._exit(0)
    while not any(file.is_file() and file.stat().st_size for file in path.parent.rglob("*")):
        time.sleep(0.01)
    return child


@pytest.mark.parametrize("is_folder", [False, True])
def test_only_what_the_dead_left_is_deleted(is_folder: bool, tmp_path: Path) -> None:
    child = start_writing(tmp_path / "first", is_folder=is_folder)
    try:
        with writing_aside(tmp_path / "first", is_folder=is_folder), writing_aside(tmp_path / "second"):
            assert len(list(tmp_path.iterdir())) == 3  # three writers, two of them in this process
        clear_torn(tmp_path)
        assert len(list(tmp_path.glob(f"first.writing-*-{child}-0"))) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with writing_aside(tmp_path / "another"):  # under whatever name they wrote
        assert [path.name.partition(".")[0] for path in tmp_path.iterdir()] == ["another"]


def test_other_hosts_and_other_names_are_let_alone(tmp_path: Path) -> None:
    names = ["a.writing-elsewhere-1-0", "a.writing-1", f"{socket.gethostname()}-1-0", "a.writing-notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    clear_torn(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_writer_that_fails_deletes_what_it_wrote(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), writing_aside(tmp_path / "a" / "file") as aside:
        aside.write_text("half of it")
        raise OSError("disk full")
    assert not list((tmp_path / "a").iterdir())
