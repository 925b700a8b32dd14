"""The policy as a Hugging Face folder, for any other program to load."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from gopo_lightning.callbacks.schedule import Every
from gopo_lightning.sharding import plain_names, whole_state_dict


class ExportHF(L.Callback):
    """Writes policy and tokenizer as a Hugging Face folder in safetensors; of a LoRA policy, the adapter.

    ``AutoModelForCausalLM.from_pretrained(dirpath)`` loads it, and an adapter's folder too, where peft is
    installed. A folder is written under another name and then renamed, so that a reader never meets half of
    one. Works with sharded policies: every rank takes part in gathering the weights, rank 0 writes.

    Args:
        dirpath: The folder of the final policy; None puts it into the run's log folder, as ``policy``. An export
            during the run goes beside it, to ``<dirpath>-step-<n>``. A folder that is already there is replaced.
        every_n_steps: Optimiser steps between exports during the run; None exports only at the end.
    """

    def __init__(self, dirpath: str | None = None, every_n_steps: int | None = None) -> None:
        self.dirpath = dirpath
        self._every = None if every_n_steps is None else Every(every_n_steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting, and refuse a module that has nothing to export."""
        missing = [name for name in ("policy", "tokenizer") if not hasattr(pl_module, name)]
        if missing:
            raise ValueError(
                f"ExportHF found no {' and no '.join(missing)} in {type(pl_module).__name__}; it writes "
                "module.policy and module.tokenizer. Remove it from trainer.callbacks."
            )
        log_dir = trainer.log_dir  # a broadcast: on all ranks
        self.dirpath = self.dirpath or str(Path(log_dir or trainer.default_root_dir) / "policy")
        if self._every is not None:
            self._every.start(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export if it is due."""
        if self._every is not None and self._every.due(trainer.global_step):
            self._export(trainer, pl_module, Path(f"{self.dirpath}-step-{trainer.global_step}"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the final policy."""
        self._export(trainer, pl_module, Path(str(self.dirpath)))

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # Lightning's promise: such a run leaves nothing behind
        export(pl_module.policy, pl_module.tokenizer, folder, is_writer=trainer.is_global_zero)
        trainer.strategy.barrier("ExportHF")
        rank_zero_info(f"Exported the policy to {folder}")


def export(model: Any, tokenizer: Any, folder: Path, *, is_writer: bool = True) -> None:
    """Write ``model`` (transformers or peft, sharded or not) and ``tokenizer`` to ``folder``.

    A collective if the model is distributed: all ranks call it, the one with ``is_writer`` writes.
    """
    weights = whole_state_dict(model)
    if not is_writer:
        return
    aside = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with plain_names(model):
        model.save_pretrained(aside, state_dict=weights)
    tokenizer.save_pretrained(aside)
    _replace(aside, folder)


def _replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; a folder already there makes room first."""
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)
