"""Checkpoints are whole or not there, whatever happens while they are written; and only plain values are loaded."""

import os
import random
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.distributed import checkpoints
from gopo_lightning.distributed.checkpoints import (
    AtomicCheckpointIO,
    TrainableState,
    atomic_save,
    is_whole,
    load_checkpoint,
    newest,
    step_of,
)


def write(path: Path, value: int = 0) -> Path:
    state = {"weight": torch.full((1000,), float(value))}
    checkpoint = {"pytorch-lightning_version": "2.5.0", "global_step": 7, "state_dict": state, "value": value}
    atomic_save(checkpoint, path)
    return path


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "run.ckpt", 3)
    for mmap in (False, True):
        loaded = load_checkpoint(path, mmap=mmap)
        assert loaded["value"] == 3 and torch.equal(loaded["state_dict"]["weight"], torch.full((1000,), 3.0))
    assert [p.name for p in path.parent.iterdir()] == ["run.ckpt"]


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "run.ckpt", 1)

    def full(checkpoint: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"value": 2}, path)
    assert load_checkpoint(path)["value"] == 1 and list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    path = write(tmp_path / "run.ckpt", 1)
    child = os.fork()
    if child == 0:
        original = torch.save

        def slowly(checkpoint: Any, file: Any) -> None:
            original(checkpoint, file)
            file.flush()
            time.sleep(60)

        torch.save = slowly
        write(path, 2)
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob("*.writing-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert load_checkpoint(path)["value"] == 1
    assert newest(tmp_path.glob("*.ckpt")) == path
    write(path, 3)
    assert load_checkpoint(path)["value"] == 3 and list(tmp_path.iterdir()) == [path]  # the torn file is gone


def test_a_checkpoint_cut_anywhere_is_not_picked(tmp_path: Path) -> None:
    whole = write(tmp_path / "first.ckpt", 1)
    content = write(tmp_path / "second.ckpt", 2).read_bytes()
    rng = random.Random(0)
    for length in [0, 1, len(content) - 1, *(rng.randrange(len(content)) for _ in range(40))]:
        torn = tmp_path / "second.ckpt"
        torn.write_bytes(content[:length])
        assert not is_whole(torn)
        assert newest([whole, torn]) == whole
        with pytest.raises(ValueError, match="no whole checkpoint"):
            load_checkpoint(torn)


def test_a_flipped_bit_or_a_hole_anywhere_is_seen_or_harmless(tmp_path: Path) -> None:
    path = write(tmp_path / "run.ckpt", 2)
    content, rng, refused = path.read_bytes(), random.Random(1), 0
    expected = load_checkpoint(path)
    for place in [*range(0, len(content), 61), *range(len(content) - 200, len(content))]:
        damaged = bytearray(content)
        if place % 2:
            damaged[place] ^= 1 << rng.randrange(8)
        else:
            damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
        path.write_bytes(damaged)
        assert step_of(path) in (None, 7)
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            refused += "no whole checkpoint" in str(error)
            assert newest([path]) is None
        else:
            assert torch.equal(loaded["state_dict"].pop("weight"), expected["state_dict"]["weight"])
            assert loaded == {**expected, "state_dict": {}}
    assert refused > 100


def test_a_file_is_read_through_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = write(tmp_path / "run.ckpt"), []
    original = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: calls.append(1) or original(archive))
    assert newest([path]) == path and load_checkpoint(path) and load_checkpoint(path, mmap=True)
    assert len(calls) == 1
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not is_whole(path)  # another file under the same name


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], {"state_dict": {}, "epoch": 3}, torch.zeros(2)])
def test_a_file_of_another_program_is_refused_in_words(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"other.ckpt is no checkpoint of a run: it holds .*policy.name"):
        load_checkpoint(path)
    assert newest([path]) is None


def test_the_newest_by_time_is_picked(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name in ("c.ckpt", "a.ckpt", "b.ckpt")]
    for age, path in enumerate(paths):
        os.utime(path, (1000 - age, 1000 - age))
    assert newest(paths) == paths[0] and newest([]) is None


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    torch.save({"value": Path("anything but a plain value")}, path)
    with pytest.raises(ValueError, match="tensors and plain values"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)


class Half(TrainableState):
    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)


def test_what_is_trained_is_saved_and_loading_wants_exactly_that() -> None:
    module = Half()
    state = module.state_dict()
    assert set(state) == {"trained.weight", "trained.bias"}
    module.load_state_dict(state)
    with pytest.raises(ValueError, match=r"1 tensors are missing \(trained.bias\)"):
        module.load_state_dict({"trained.weight": state["trained.weight"]})
    with pytest.raises(ValueError, match=r"1 unknown \(frozen.bias\)"):
        module.load_state_dict({**state, "frozen.bias": torch.zeros(2)})


def test_the_folder_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    monkeypatch.setattr(
        checkpoints, "sync_folder", lambda folder: calls.append(f"folder {len(list(folder.iterdir()))}")
    )
    write(tmp_path / "run.ckpt")
    assert calls == ["fsync", "folder 1"]
