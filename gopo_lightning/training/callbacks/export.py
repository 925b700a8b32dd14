"""The policy as a Hugging Face folder, for any other program to load."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from peft import PeftModel
from torch import Tensor

from gopo_lightning.distributed.checkpoints import load_checkpoint
from gopo_lightning.distributed.collectives import all_or_none
from gopo_lightning.distributed.fsdp import whole_state_dict
from gopo_lightning.distributed.run_folder import run_folder
from gopo_lightning.training.callbacks.run_record import record_of, recorded_in
from gopo_lightning.training.callbacks.schedule import Every
from gopo_lightning.training.export_folder import check_export_folder, write_export
from gopo_lightning.training.hub import PushError, check_repo, push
from gopo_lightning.training.model_card import model_card

Chosen: TypeAlias = Literal["last", "best"]


class ExportHF(L.Callback):
    """Writes policy and tokenizer as a Hugging Face folder in safetensors, with a model card; of a LoRA policy, the
    adapter.

    ``AutoModelForCausalLM.from_pretrained(dirpath)`` loads it, and an adapter's folder too, where peft is
    installed. A folder is written under another name and then renamed, so that a reader never meets half of
    one. Works with sharded policies: every rank takes part in gathering the weights, rank 0 writes.

    An earlier export that nobody has changed is replaced. A folder that holds anything else is refused before
    training; should it come to hold something during the run, it stays, and the export goes to ``<dirpath>-2``.

    Args:
        dirpath: The folder of the final policy; None puts it into the run's log folder, as ``policy``. An export
            during the run goes beside it, to ``<dirpath>-step-<n>``.
        every_n_steps: Optimiser steps between exports during the run; None exports only at the end.
        weights: Which weights are exported at the end: the ``last``, or the ``best`` checkpoint's by the metric that
            a ``ModelCheckpoint`` monitors (the first one that monitors any). The policy itself stays as it is.
        push_to_hub: OWNER/NAME of the model on the hub to which the final export is also uploaded; None leaves it
            here.
        push_private: Whether that model is private if it has to be made.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int | None = None,
        weights: Chosen = "last",
        push_to_hub: str | None = None,
        push_private: bool = True,
    ) -> None:
        self.dirpath, self.weights = dirpath, weights
        self.push_to_hub, self.push_private = push_to_hub, push_private
        self._every = None if every_n_steps is None else Every(every_n_steps)
        if push_to_hub is not None:
            check_repo(push_to_hub)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse, on all ranks, folders that could not be replaced without losing something."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        check_chosen(trainer, self.weights)
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
        """Export the final policy, and push it."""
        chosen = self.weights if trainer.is_global_zero else "last"
        folder = self._export(trainer, pl_module, Path(str(self.dirpath)), chosen)
        if folder is not None and self.push_to_hub is not None:
            push_or_warn(folder, self.push_to_hub, private=self.push_private)

    def _export(
        self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path, chosen: Chosen = "last"
    ) -> Path | None:
        """Where the writing rank put it; a collective."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None  # Lightning's promise: such a run leaves nothing behind
        weights = weights_to_export(trainer, chosen)
        is_adapter = isinstance(pl_module.policy, PeftModel)
        written = export_policy(
            pl_module.policy,
            pl_module.tokenizer,
            folder,
            card=model_card(weights.record, step=weights.step, is_adapter=is_adapter, chosen=weights.how),
            trained={name.removeprefix("policy."): value for name, value in weights.state.items()},
            is_writer=trainer.is_global_zero,
        )
        trainer.strategy.barrier("ExportHF")
        rank_zero_info(f"Exported the policy of {weights} to {written}")
        return written


@dataclass(frozen=True)
class Weights:
    """What is exported."""

    step: int
    record: dict[str, Any]
    """Of the run up to then, see `RunRecord`."""
    how: str | None = None
    """How they were chosen, if they are not the last."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """What takes the place of what the module has now, by its names there."""

    def __str__(self) -> str:
        return f"step {self.step}" + (f" ({self.how})" if self.how else "")


def check_chosen(trainer: L.Trainer, weights: Chosen) -> None:
    """Before training: ValueError for ``best`` where nothing says what is best."""
    if weights == "best" and _monitor(trainer) is None:
        raise ValueError(
            "the best weights are to be exported, but no ModelCheckpoint monitors a metric that says which those are. "
            "Add one with monitor and mode to trainer.callbacks (val/reward, max), or export the last."
        )


def weights_to_export(trainer: L.Trainer, chosen: Chosen) -> Weights:
    """The module's own weights, or those of the best checkpoint.

    Where nothing was saved by the metric, or it cannot be read, the last are exported, and none lost; a word says why.
    """
    last = Weights(trainer.global_step, record_of(trainer))
    callback = _monitor(trainer) if chosen == "best" else None
    if callback is None:
        return last
    try:
        if not callback.best_model_path:
            raise ValueError(f"no checkpoint was saved by {callback.monitor}")
        checkpoint = load_checkpoint(Path(callback.best_model_path), mmap=True)
    except (OSError, ValueError) as error:
        rank_zero_warn(f"The last weights are exported, not the best: {error}.")
        return last
    score = "" if callback.best_model_score is None else f" of {float(callback.best_model_score):.4g}"
    how = f"the best by {callback.monitor}{score}, {callback.mode}"
    record = {**last.record, **recorded_in(checkpoint)}
    return Weights(int(checkpoint["global_step"]), record, how, checkpoint["state_dict"])


def push_or_warn(folder: Path, name: str, *, private: bool) -> None:
    """`push`; what fails is said, with the command that pushes again, and the run ends as it would have."""
    try:
        rank_zero_info(f"Pushed to {push(folder, name, private=private, message='Export')}")
    except PushError as error:
        rank_zero_warn(str(error))


def _monitor(trainer: L.Trainer) -> ModelCheckpoint | None:
    callbacks = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint))
    return next((callback for callback in callbacks if callback.monitor is not None), None)


def export_policy(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    card: str | None = None,
    trained: Mapping[str, Tensor] | None = None,
    is_writer: bool = True,
) -> Path | None:
    """Write ``model`` (transformers or peft, sharded or not) and ``tokenizer`` to ``folder``; where it is now.

    A collective if the model is distributed: all ranks call it, the one with ``is_writer`` writes. A folder that is no
    unchanged export stays, and the new one goes beside it (``write_export``).

    Args:
        model: the policy.
        tokenizer: of the policy.
        folder: of the export.
        card: README.md.
        trained: weights by their names in ``model``, to be written in the place of those that it has now.
        is_writer: this rank writes.
    """
    weights = {**whole_state_dict(model), **(trained or {})}
    if not is_writer:
        return None

    def fill(empty: Path) -> None:
        model.save_pretrained(empty, state_dict=weights)
        tokenizer.save_pretrained(empty)
        if card is not None:
            (empty / "README.md").write_text(card, encoding="utf-8")

    return write_export(folder, fill)
