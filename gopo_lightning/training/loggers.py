"""What is more than a number, in every logger that the run has: one function a kind, one way of each logger.

A number goes by `LightningModule.log`, as everywhere in Lightning. A logger that is not named here gets histograms as
quantiles; where its experiment has TensorBoard's `add_text`, tables too.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any, TypeAlias, cast

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

Cell: TypeAlias = str | float | int
QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


@dataclass(frozen=True)
class Table:
    """Rows of cells, and how a page shows them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    markdown: str
    """The same, for loggers that show text."""


def log_table(trainer: Trainer, tag: str, table: Table) -> None:
    """``table`` at the present step, by rank 0."""
    for logger in _loggers(trainer):
        _write_table(logger, tag, table, _step(trainer))


def log_histogram(trainer: Trainer, tag: str, values: Tensor) -> None:
    """The distribution of ``values``, of any shape, at the present step, by rank 0."""
    for logger in _loggers(trainer):
        _write_histogram(logger, tag, values.detach().float().flatten().cpu(), _step(trainer))


def without_tables(trainer: Trainer) -> list[str]:
    """Classes of the loggers that take no table."""
    known = (TensorBoardLogger, WandbLogger, MLFlowLogger, CSVLogger)
    loggers = [logger for logger in trainer.loggers if not isinstance(logger, known)]
    return [type(logger).__name__ for logger in loggers if not hasattr(_experiment(logger), "add_text")]


def _step(trainer: Trainer) -> int:
    """The x of the curves of its module."""
    return int(getattr(trainer.lightning_module, "logged_step", trainer.global_step))


def _loggers(trainer: Trainer) -> Sequence[Logger]:
    return trainer.loggers if trainer.is_global_zero else ()


def _experiment(logger: Logger) -> Any:
    return getattr(logger, "experiment", None)


# --------------------------------------------------------------------- tables


@singledispatch
def _write_table(logger: Logger, tag: str, table: Table, step: int) -> None:
    if hasattr(experiment := _experiment(logger), "add_text"):
        experiment.add_text(tag, table.markdown, step)


@_write_table.register
def _(logger: WandbLogger, tag: str, table: Table, step: int) -> None:
    logger.log_table(tag, columns=list(table.columns), data=[list(row) for row in table.rows], step=step)


@_write_table.register
def _(logger: MLFlowLogger, tag: str, table: Table, step: int) -> None:
    """An artifact a step; MLflow shows CSV as a table."""
    rows = _csv([table.columns, *table.rows])
    logger.experiment.log_text(cast(str, logger.run_id), rows, f"{tag}/step-{step:06d}.csv")


@_write_table.register
def _(logger: CSVLogger, tag: str, table: Table, step: int) -> None:
    """``<log_dir>/<tag>.csv``, which grows by the rows of each step."""
    path = Path(logger.log_dir) / f"{tag}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = [] if path.exists() else [["step", *table.columns]]
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(_csv([*header, *([step, *row] for row in table.rows)]))


def _csv(rows: Sequence[Sequence[Cell]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


# ----------------------------------------------------------------- histograms


@singledispatch
def _write_histogram(logger: Logger, tag: str, values: Tensor, step: int) -> None:
    """Quantiles, as curves."""
    if values.numel():
        quantiles = {f"{tag}/{name}": values.quantile(q).item() for name, q in QUANTILES.items()}
        logger.log_metrics(quantiles, step)


@_write_histogram.register
def _(logger: TensorBoardLogger, tag: str, values: Tensor, step: int) -> None:
    logger.experiment.add_histogram(tag, values, step)


@_write_histogram.register
def _(logger: WandbLogger, tag: str, values: Tensor, step: int) -> None:
    import wandb  # the logger that is here has brought it

    logger.log_metrics({tag: wandb.Histogram(values.tolist())}, step)  # type: ignore[dict-item]
