"""What the model card says of a run, kept in its checkpoints."""

import shlex
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

_LIBRARIES = ("gopo-lightning", "torch", "transformers", "peft", "lightning")


class RunRecord(Callback):
    """Base model, data, settings, command and versions of a run, and what its first and its last validation measured.

    Attributes:
        record: plain values under ``kind``, ``base_model`` (name and revision, as configured), ``data`` (by part),
            ``settings``, ``command``, ``versions``, and ``validations``, each with its ``step`` and ``metrics``.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The record."""
        return self.record

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of the run that is resumed."""
        self.record = dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is known before the first step."""
        module: Any = pl_module
        self.record |= {
            "kind": module.kind,
            "base_model": list(module.base_model),
            "data": _data(getattr(trainer, "datamodule", None)),
            "settings": module.run_settings(),
            "versions": {name: version(name) for name in _LIBRARIES},
        }
        if (command := command_of(sys.argv)) is not None:
            self.record["command"] = command

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Its metrics; of earlier ones the first stays."""
        if trainer.state.fn != "fit":
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        validation = {"step": trainer.global_step, "metrics": metrics}
        self.record["validations"] = [*self.record.get("validations", [])[:1], validation]


def record_of(trainer: Trainer) -> dict[str, Any]:
    """The record of the run; empty under a module of another kind."""
    return next((callback.record for callback in trainer.callbacks if isinstance(callback, RunRecord)), {})  # type: ignore[attr-defined]


def recorded_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The record in a checkpoint; empty in one that was written before there were any."""
    return dict(checkpoint.get("callbacks", {}).get(RunRecord.__qualname__, {}))


def command_of(arguments: list[str]) -> str | None:
    """The command of this project's command line that ``arguments`` (of ``sys.argv``) are; None of another program.

    >>> command_of(["/somewhere/gopo_lightning/__main__.py", "fit", "--config", "my run.yaml"])
    "python -m gopo_lightning fit --config 'my run.yaml'"
    """
    program = Path(arguments[0])
    if program.name != "gopo-lightning" and program.parts[-2:] != ("gopo_lightning", "__main__.py"):
        return None
    return shlex.join(["python", "-m", "gopo_lightning", *arguments[1:]])


def _data(module: Any) -> dict[str, dict[str, Any]]:
    """The sources of ``module`` by the part of the run that reads them, as they were configured."""
    sources = getattr(module, "sources", {})
    return {
        part: {**asdict(sources[part]), "is_hub": sources[part].is_hub}
        for part in ("train", "validation")
        if sources.get(part) is not None
    }
