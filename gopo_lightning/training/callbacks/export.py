"""The policy as a Hugging Face folder, for any other program to load."""

import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from gopo_lightning.distributed.collectives import all_or_none
from gopo_lightning.distributed.fsdp import whole_state_dict
from gopo_lightning.distributed.run_folder import run_folder
from gopo_lightning.training.callbacks.schedule import Every
from gopo_lightning.training.export_folder import check_export_folder, write_export


class ExportHF(L.Callback):
    """Writes policy and tokenizer as a Hugging Face folder in safetensors; of a LoRA policy, the adapter.

    ``AutoModelForCausalLM.from_pretrained(dirpath)`` loads it, and an adapter's folder too, where peft is
    installed. A folder is written under another name and then renamed, so that a reader never meets half of
    one. Works with sharded policies: every rank takes part in gathering the weights, rank 0 writes.

    An earlier export that nobody has changed is replaced. A folder that holds anything else is refused before
    training; should it come to hold something during the run, it stays, and the export goes to ``<dirpath>-2``.

    Args:
        dirpath: The folder of the final policy; None puts it into the run's log folder, as ``policy``. An export
            during the run goes beside it, to ``<dirpath>-step-<n>``.
        every_n_steps: Optimiser steps between exports during the run; None exports only at the end.
    """

    def __init__(self, dirpath: str | None = None, every_n_steps: int | None = None) -> None:
        self.dirpath = dirpath
        self._every = None if every_n_steps is None else Every(every_n_steps)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse, on all ranks, folders that could not be replaced without losing something."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.dirpath = self.dirpath or str(run_folder(trainer) / "policy")
        with all_or_none("the check of the export folder"):
            if trainer.is_global_zero:
                folder = Path(self.dirpath)
                check_export_folder(folder, "dirpath (--export_dir)")
                for earlier in folder.parent.glob("*") if self._every is not None else ():
                    if re.fullmatch(rf"{re.escape(folder.name)}-step-\d+", earlier.name):
                        check_export_folder(earlier, "dirpath (--export_dir) with every_n_steps")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting, and refuse a module that has nothing to export."""
        missing = [name for name in ("policy", "tokenizer") if not hasattr(pl_module, name)]
        if missing:
            raise ValueError(
                f"ExportHF found no {' and no '.join(missing)} in {type(pl_module).__name__}; it writes "
                "module.policy and module.tokenizer. Remove it from trainer.callbacks."
            )
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
        written = export_policy(pl_module.policy, pl_module.tokenizer, folder, is_writer=trainer.is_global_zero)
        trainer.strategy.barrier("ExportHF")
        rank_zero_info(f"Exported the policy to {written}")


def export_policy(model: Any, tokenizer: Any, folder: Path, *, is_writer: bool = True) -> Path | None:
    """Write ``model`` (transformers or peft, sharded or not) and ``tokenizer`` to ``folder``; where it is now.

    A collective if the model is distributed: all ranks call it, the one with ``is_writer`` writes. A folder that is no
    unchanged export stays, and the new one goes beside it (``write_export``).
    """
    weights = whole_state_dict(model)
    if not is_writer:
        return None

    def fill(empty: Path) -> None:
        model.save_pretrained(empty, state_dict=weights)
        tokenizer.save_pretrained(empty)

    return write_export(folder, fill)
