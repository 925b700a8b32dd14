"""Where an evaluation of a checkpoint writes: into the run that the checkpoint is of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from gopo_lightning.evaluation.event_files import CSV_METRICS, EVENT_FILES


def in_run_of(checkpoint: Path, loggers: Sequence[Logger], config: Any) -> list[Logger]:
    """``loggers``, of which those of TensorBoard and CSV files write into the run of ``checkpoint``.

    One that is told to write elsewhere, by its version, name or `save_dir`, stays as it is. So do all if the checkpoint
    does not lie in the `checkpoints` of a run's folder, where there are curves already.

    Args:
        checkpoint: a file.
        loggers: as built from ``config``; none of them has begun to write.
        config: of `trainer.logger`: one logger, a list, or whether there is one.
    """
    run = next((folder.parent for folder in checkpoint.resolve().parents if folder.name == "checkpoints"), None)
    if run is None:
        return list(loggers)
    configs = config if isinstance(config, list) else [config] * len(loggers)
    return [_in(run, logger, _options(one)) for logger, one in zip(loggers, configs, strict=True)]


def _in(run: Path, logger: Logger, options: dict[str, Any]) -> Logger:
    kind = type(logger)
    if kind not in (TensorBoardLogger, CSVLogger) or options.get("version") is not None:
        return logger
    if options and Path(str(logger.root_dir)).resolve() != run.parent:
        return logger
    place = {"save_dir": str(run.parent.parent), "name": run.parent.name, "version": run.name}
    moved = kind(**{**options, **place})
    curves = EVENT_FILES if kind is TensorBoardLogger else CSV_METRICS
    return moved if any(Path(moved.log_dir).glob(curves)) else logger


def _options(config: Any) -> dict[str, Any]:
    """Of the logger's class; none of Lightning's own choice."""
    return {} if config is None or isinstance(config, bool) else dict(config.get("init_args") or {})
