"""Checkpoints that are whole or not there: written aside, synced to disk, renamed; and which one is the newest."""

import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from gopo_lightning.aside import writing_aside


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
        return load(Path(path), map_location=map_location)


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


def sync_folder(folder: Path) -> None:
    """Let a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Tensors and plain values of the checkpoint at ``path``; ``mmap`` reads them only when they are used.

    Raises:
        ValueError: the file is torn, no checkpoint, or holds pickled code.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if not is_whole(path):
        raise ValueError(
            f"{path} is no whole checkpoint; resume with --ckpt_path last, which takes the newest whole one"
        )
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values; such files are not loaded") from error


def is_whole(path: Path) -> bool:
    """Whether ``path`` was written to its end: its directory, which comes last, is there and its entries fit in."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickled = [name for name in names if name.endswith("/data.pkl")]
            return len(pickled) == 1 and bool(archive.read(pickled[0]))
    except (OSError, zipfile.BadZipFile):
        return False


def newest(paths: Iterable[Path]) -> Path | None:
    """The whole checkpoint that was written last; torn ones are passed over."""
    found = sorted({path.resolve() for path in paths if path.is_file()}, key=_age)
    return next((path for path in found if is_whole(path)), None)


def last_of(trainer: Trainer) -> Path | None:
    """The newest whole checkpoint under this trainer's logger, over all versions, or None."""
    paths = list(Path(trainer.default_root_dir).glob("checkpoints/*.ckpt"))
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            paths += Path(callback.dirpath).glob("*.ckpt")
    for logger in trainer.loggers:
        if logger.save_dir is not None:
            paths += (Path(logger.save_dir) / str(logger.name)).glob("version_*/checkpoints/*.ckpt")
    return newest(paths)


def _age(path: Path) -> tuple[float, str]:
    """The newest first; of one moment the later name (a step number with leading zeros, or ``last``)."""
    return (-path.stat().st_mtime_ns, path.name)


class TrainableState(nn.Module):
    """A module whose state dict holds what is trained, and nothing else: under LoRA, the adapter."""

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Without frozen parameters."""
        frozen = {
            prefix + name.replace("_fsdp_wrapped_module.", "")
            for name, parameter in self.named_parameters()
            if not parameter.requires_grad
        }
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
