"""A run as a config describes it, of which nothing is to be trained, logged or saved: `inspect` and `rank` sample."""

import warnings
from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.training.gopo_module import GOPOModule


def untrained(command: str, config: Sequence[str]) -> tuple[Trainer, GOPOModule, PromptDataModule]:
    """Trainer, module and data of the arguments ``config``.

    Raises:
        ValueError: they describe something else than policy training.
    """
    quiet = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.enable_checkpointing=false"]
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    cli = run([*config, *quiet], instantiate_only=True)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    if not isinstance(module, GOPOModule) or not isinstance(data, PromptDataModule):
        raise ValueError(f"{command} looks at policy training, and this is {type(module).__name__}. Name its config.")
    kept = [callback for callback in trainer.callbacks if not isinstance(callback, SaveConfigCallback)]  # type: ignore[attr-defined]
    trainer.callbacks = kept  # type: ignore[attr-defined]
    return trainer, module, data
