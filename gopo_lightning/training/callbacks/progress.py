"""How far a run is: a live bar in a terminal, one line a step in a log."""

import re
import sys
import threading
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from rich.progress import ProgressColumn, Task
from rich.text import Text

from gopo_lightning._compat import StepBar
from gopo_lightning.training.callbacks.schedule import Every


class Item(NamedTuple):
    """A metric as it is shown; ``form`` formats its value."""

    tag: str
    label: str
    form: str


SECONDS = (
    Item("seconds/rollout", "rollout", "rollout {:.1f}s"),
    Item("seconds/reward", "reward", "reward {:.1f}s"),
    Item("seconds/train", "train", "train {:.1f}s"),
)
TRAINING = (
    Item("reward/mean", "reward", "reward {:+.3f}"),
    Item("train/kl", "kl", "kl {:.4f}"),
    Item("train/loss", "loss", "loss {:.4f}"),
    Item("throughput/rollout_tokens_per_second", "tok/s", "{:.0f} tok/s"),
)
VALIDATION = (
    Item("val/reward", "reward", "reward {:+.3f}"),
    Item("val/win_rate", "win rate", "win rate {:.3f}"),
    Item("val/length_mean", "tokens", "{:.1f} tokens"),
    Item("val/truncated_fraction", "truncated", "truncated {:.0%}"),
)


_SOURCE = re.compile(r"reward/(?P<train>.+)/mean|val/(?P<val>.+)/reward")


def present(items: tuple[Item, ...], metrics: Mapping[str, Any]) -> dict[Item, float]:
    """Those of ``items`` that were logged, with their values.

    Of several reward sources each is shown by itself: what they combine to may compare within a group only.
    """
    names = {tag: match["train"] or match["val"] for tag in metrics if (match := _SOURCE.fullmatch(tag))}
    shown = []
    for item in items:
        prefix = item.tag.partition("/")[0]
        sources = [
            Item(tag, name, name.replace("{", "{{").replace("}", "}}") + " {:+.3f}")
            for tag, name in names.items()
            if tag.startswith(f"{prefix}/")
        ]
        several = item.label == "reward" and len(sources) > 1
        shown += sources if several else [item]
    return {item: float(metrics[item.tag]) for item in shown if item.tag in metrics}


def train_line(step: int, max_steps: int, metrics: Mapping[str, Any]) -> str:
    """One optimiser step as a line of text; what was not logged is left out.

    >>> train_line(12, 60, {"seconds/rollout": 3.1, "seconds/train": 4.4, "reward/mean": 0.31})
    'step 12/60  rollout 3.1s train 4.4s  reward +0.310'
    """
    seconds = " ".join(item.form.format(value) for item, value in present(SECONDS, metrics).items())
    values = [item.form.format(value) for item, value in present(TRAINING, metrics).items()]
    return "  ".join(filter(None, [_step(step, max_steps), seconds, *values]))


def validation_line(step: int, max_steps: int, metrics: Mapping[str, Any]) -> str:
    """One validation as a line of text; what was not logged is left out."""
    values = [item.form.format(value) for item, value in present(VALIDATION, metrics).items()]
    return "  ".join([_step(step, max_steps), "validation", *values])


def _step(step: int, max_steps: int) -> str:
    return f"step {step}/{max_steps}" if max_steps > 0 else f"step {step}"


class ProgressBar(LightningProgressBar):
    """Shows reward, KL, tokens per second and the phase: a live bar in a terminal, plain lines in a log.

    Creating it gives a :class:`RichBar` or a :class:`PlainLines`.

    Args:
        style: ``rich`` for the bar, ``plain`` for lines, ``auto`` for the bar if the output is a terminal.
        every_n_steps: Plain lines only: optimiser steps from one line to the next.
    """

    def __new__(cls, style: Literal["auto", "rich", "plain"] = "auto", every_n_steps: int = 1) -> Self:
        if style not in ("auto", "rich", "plain"):
            raise ValueError(f"style is {style!r}; it has to be one of 'auto', 'rich' and 'plain'.")
        rich = style == "rich" or (style == "auto" and sys.stdout.isatty())
        chosen = (RichBar if rich else PlainLines) if cls is ProgressBar else cls
        return super().__new__(chosen)  # type: ignore[return-value]

    def __init__(self, style: Literal["auto", "rich", "plain"] = "auto", every_n_steps: int = 1) -> None:
        super().__init__()
        self._every = Every(every_n_steps)


class PlainLines(ProgressBar):
    """The progress bar of a log file: a line a step, ten over a test or prediction."""

    _enabled = True

    def disable(self) -> None:
        """Print nothing (Lightning calls this on every rank but 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print at once, also into a pipe; nothing while disabled."""
        if self._enabled:
            print(*args, **{"flush": True, **kwargs})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting."""
        self._every.start(trainer.global_step, with_first=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the step."""
        if self._every.due(trainer.global_step):
            self.print(train_line(trainer.global_step, trainer.max_steps, trainer.callback_metrics))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx])

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count("predict", batch_idx + 1, trainer.num_predict_batches[dataloader_idx])

    def _count(self, name: str, done: int, total: int | float) -> None:
        if total == float("inf") or done * 10 // total > (done - 1) * 10 // total:
            self.print(f"{name} batch {done}/{total}")


class RichBar(ProgressBar, StepBar):
    """The progress bar of a terminal: counts optimiser steps, with the phase beside it."""

    _ticker: "_Ticker | None" = None

    @property
    def total_train_batches(self) -> int | float:
        """Optimiser steps of the whole run if it is bounded by them, else batches of the epoch."""
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def configure_columns(self, trainer: L.Trainer) -> list:
        """Lightning's columns and the phase."""
        return [*super().configure_columns(trainer), _PhaseColumn(trainer)]

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Few metrics, under short names."""
        return {item.label: value for item, value in present(TRAINING, trainer.callback_metrics).items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        super().on_train_start(trainer, pl_module)
        if self.is_enabled and self._ticker is None:
            self._ticker = _Ticker(self)
            self._ticker.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.max_steps > 0:
            self.set_trained(trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the bar down."""
        self._stop_ticker()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the bar down, so that the error stands alone."""
        self._stop_ticker()
        super().on_exception(trainer, pl_module, exception)

    def _stop_ticker(self) -> None:
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None


class _PhaseColumn(ProgressColumn):
    """The module's ``phase``: rollout, reward or train; empty for a module that has none."""

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__()
        self._trainer = trainer

    def render(self, task: Task) -> Text:
        return Text(str(getattr(self._trainer.lightning_module, "phase", "")), style="bold")


class _Ticker(threading.Thread):
    """Redraws the bar twice a second: a step takes long, and the phase and the clock move inside it."""

    def __init__(self, bar: RichBar) -> None:
        super().__init__(name="progress-ticker", daemon=True)
        self._bar = bar
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.5):
            self._bar.refresh()

    def stop(self) -> None:
        self._stopped.set()
        self.join()
