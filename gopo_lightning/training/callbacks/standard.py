"""The callbacks that every policy run has, without being listed in its config."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar

from gopo_lightning.training.callbacks.lengths import LengthCheck
from gopo_lightning.training.callbacks.progress import ProgressBar, validation_line
from gopo_lightning.training.callbacks.run_start import RunStart, say
from gopo_lightning.training.callbacks.samples import SampleTable
from gopo_lightning.training.callbacks.save_on_signal import SaveOnSignal
from gopo_lightning.training.callbacks.throughput import Throughput
from gopo_lightning.training.config import RolloutConfig


class ValidationLine(Callback):
    """Prints the result of each validation of `fit` as a line that stays, whatever the progress bar."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            say(trainer, validation_line(trainer.global_step, trainer.max_steps, trainer.callback_metrics))


def standard_callbacks(trainer: Trainer, rollout: RolloutConfig) -> list[Callback]:
    """Those that ``trainer`` does not have yet: one that is listed stands in place of the default."""
    return [
        RunStart(rollout),
        ValidationLine(),
        *(made for made in (_default_table(), Throughput()) if not _has(trainer.callbacks, type(made))),  # type: ignore[attr-defined]
        LengthCheck(rollout.sampling.max_new_tokens),
        SaveOnSignal(),
    ]


def with_progress_bar(listed: Callback | Sequence[Callback] | None) -> list[Callback]:
    """``listed``, and our bar unless there is one among them."""
    callbacks = [listed] if isinstance(listed, Callback) else list(listed or ())
    return callbacks if _has(callbacks, LightningProgressBar) else [*callbacks, ProgressBar()]


def _default_table() -> SampleTable:
    table = SampleTable()
    table.is_listed = False
    return table


def _has(callbacks: Sequence[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
