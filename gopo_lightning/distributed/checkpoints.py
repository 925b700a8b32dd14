"""Checkpoints that are whole or not there: written aside, synced, renamed, and checked before they are read.

`--ckpt_path last` is the last whole one of this run, and of no other. What a run is follows from where it writes: a
logger with a version of its own (a text, or the id of a W&B run) names one run; under a logger that numbers its
versions, or lets a server do it, all versions of one name are one run that was started again and again. Without a
logger the run is `default_root_dir`; a `dirpath` of `ModelCheckpoint` belongs to the run that it is given to.
"""

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from gopo_lightning.distributed.atomic_files import sync_folder, writing_aside
from gopo_lightning.distributed.run_folder import WITHOUT_LOGGER

_DAMAGE = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, struct.error)
"""What zipfile and torch raise, wherever a byte of the file is another one."""
_OF_A_RUN = ("pytorch-lightning_version", "global_step", "state_dict")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves so that a kill or a full disk leaves the previous file as it was; loads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; OSError (no space, no permission) leaves nothing behind."""
        if storage_options is not None:
            raise TypeError("checkpoints are local files; storage_options has no effect. Leave it out.")
        atomic_save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read ``path``; refuses pickled code, whatever ``weights_only`` is."""
        return load_checkpoint(Path(path), map_location=map_location)


def install_atomic_saving(trainer: Trainer) -> None:
    """Make ``trainer`` save atomically, unless a checkpoint plugin was chosen."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def atomic_save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """``torch.save`` aside, fsync, rename, fsync of the folder."""
    with writing_aside(path) as aside:
        with aside.open("wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    sync_folder(path.parent)


def load_checkpoint(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Tensors and plain values of the checkpoint at ``path``; ``mmap`` reads them only when they are used.

    Raises:
        ValueError: the file is torn or damaged, no checkpoint of a run, or holds pickled code.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if not is_whole(path):
        raise ValueError(
            f"{path} is no whole checkpoint: cut off, damaged, or of another kind. Resume with --ckpt_path last, which "
            "takes the last one that is whole."
        )
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values; such files are not loaded") from error
    if not _is_of_a_run(checkpoint):
        held = ", ".join(map(str, list(checkpoint)[:3])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} is no checkpoint of a run: it holds {held}, but no {', '.join(_OF_A_RUN)}. To start from weights, "
            "name their Hugging Face folder as model.init_args.policy.name."
        )
    return dict(checkpoint)


def is_whole(path: Path) -> bool:
    """Whether ``path`` is, byte for byte, what was written: all its parts are there and have their checksums.

    Reads the whole file, once in a process (about 1 s a GB).
    """
    try:
        status = path.stat()
    except OSError:
        return False
    return _is_whole(path, status.st_mtime_ns, status.st_size)


@lru_cache
def _is_whole(path: Path, mtime_ns: int, num_bytes: int) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            if not _has_one_pickle(archive) or archive.testzip() is not None:
                return False
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # of the headers torch reads more
    except _DAMAGE:
        return False
    except pickle.UnpicklingError:
        return True  # whole, whatever it is
    return True


def step_of(path: Path) -> int | None:
    """The optimiser steps that the checkpoint at ``path`` holds, read without its tensors; None if it is not whole.

    (Damage in the tensors is left to ``is_whole``.)
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if not _has_one_pickle(archive):
                return None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*_DAMAGE, pickle.UnpicklingError):
        return None
    return int(checkpoint["global_step"]) if _is_of_a_run(checkpoint) else None


def _has_one_pickle(archive: zipfile.ZipFile) -> bool:
    """As every file of ``torch.save`` has; it is read, and its checksum compared."""
    pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    return len(pickled) == 1 and bool(archive.read(pickled[0]))


def _is_of_a_run(checkpoint: Any) -> bool:
    return isinstance(checkpoint, dict) and all(key in checkpoint for key in _OF_A_RUN)


def last_checkpoint_of(trainer: Trainer) -> Path | None:
    """The last whole checkpoint of this trainer's run, or None.

    Of the newest version that has one, that of the most steps; clocks may be set back, so time decides only between
    equals.
    """
    given = [path for folder, depth in _given_folders(trainer) for path in _checkpoints(folder, depth)]
    root, pattern = _versions(trainer)
    for version in sorted(root.glob(pattern), key=_number_and_age, reverse=True):
        if (found := newest(version.rglob("*.ckpt"))) is not None:
            return newest([*given, found])
    return newest(given)


def newest(paths: Iterable[Path]) -> Path | None:
    """The whole checkpoint of the most steps, of several the one written last; damaged ones are passed over."""
    steps = {path: step_of(path) for path in {path.resolve() for path in paths if path.is_file()}}
    known = {path: step for path, step in steps.items() if step is not None}
    by_age = sorted(known, key=lambda path: (known[path], path.stat().st_mtime_ns, path.name), reverse=True)
    return next((path for path in by_age if is_whole(path)), None)


def searched_folder(trainer: Trainer) -> str:
    """The places where ``last_checkpoint_of`` looks, for messages."""
    places = [str(folder) for folder, _ in _given_folders(trainer)]
    return ", ".join([*places, "/".join(map(str, _versions(trainer)))])


def _given_folders(trainer: Trainer) -> Iterator[tuple[Path, int]]:
    """Every `dirpath` of a `ModelCheckpoint`, and how many folders deeper its file names go ("{val/reward}": one)."""
    if not trainer.loggers:
        yield Path(trainer.default_root_dir) / "checkpoints", 1
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            yield Path(callback.dirpath), (callback.filename or "").count("/")


def _checkpoints(folder: Path, depth: int) -> Iterator[Path]:
    for deeper in range(depth + 1):
        yield from folder.glob("*/" * deeper + "*.ckpt")


def _versions(trainer: Trainer) -> tuple[Path, str]:
    """A folder, and the pattern of this run's checkpoint folders within it, over all its versions."""
    root = Path(trainer.default_root_dir)
    if not trainer.loggers:
        return root / WITHOUT_LOGGER, "version_*/checkpoints"  # of runs without ModelCheckpoint
    logger = trainer.loggers[0]
    root = Path(os.path.join(logger.save_dir or root, str(logger.name)))
    if isinstance(logger.version, str):
        return root / logger.version, "checkpoints"
    return root, "*/checkpoints" if logger.version is None else "version_*/checkpoints"


def _number_and_age(checkpoints: Path) -> tuple[int, int]:
    """Of versions with numbers the highest is the newest; of others the one in which files came or went last."""
    _, _, number = checkpoints.parent.name.rpartition("version_")
    return (int(number) if number.isdigit() else -1, checkpoints.stat().st_mtime_ns)


class TrainableState(nn.Module):
    """A module whose state dict holds what is trained, and nothing else: under LoRA, the adapter."""

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Without frozen parameters."""
        frozen = {prefix + name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        return {name: value for name, value in state.items() if name not in frozen}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """``strict`` wants exactly the tensors of ``self.state_dict()``."""
        if strict:
            check_names(self.state_dict(), state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def check_names(expected: Iterable[str], state: Mapping[str, Tensor]) -> None:
    """ValueError unless ``state`` holds exactly the tensors ``expected``."""
    expected = set(expected)
    missing, unknown = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or unknown:
        raise ValueError(
            f"the checkpoint is of another policy: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:3])}). Resume with the policy and LoRA settings of that run."
        )
