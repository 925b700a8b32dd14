"""Where a run writes: a folder of its own, under every logger and without one."""

from itertools import count
from pathlib import Path
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

WITHOUT_LOGGER = "without_logger"

_chosen: "WeakKeyDictionary[Trainer, Path]" = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run's files, the same on all ranks. A collective: all ranks call it.

    TensorBoard's and the CSV logger's `log_dir`. Of other loggers, whose `save_dir` many runs share, the folder
    `<save_dir>/<name>/<version>` where Lightning puts the checkpoints. Without a logger the first
    `<default_root_dir>/without_logger/version_<k>` that does not exist yet.
    """
    if trainer not in _chosen:
        mine = _choose(trainer) if trainer.is_global_zero else None
        _chosen[trainer] = Path(trainer.strategy.broadcast(str(mine)))
    return _chosen[trainer]


def _choose(trainer: Trainer) -> Path:
    root = Path(trainer.default_root_dir)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return root  # nothing is written
    if not trainer.loggers:
        path = next(path for k in count() if not (path := root / WITHOUT_LOGGER / f"version_{k}").exists())
        path.mkdir(parents=True)
        return path
    logger = trainer.loggers[0]
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or root) / str(logger.name) / version


def checkpoint_folder(trainer: Trainer) -> Path:
    """Where this run's `ModelCheckpoint` saves; a folder of the run where there is none. A collective."""
    folder = run_folder(trainer) / "checkpoints"
    return Path(getattr(trainer.checkpoint_callback, "dirpath", None) or folder)


def keep_csv_metrics(trainer: Trainer) -> None:
    """Rename the `metrics.csv` of earlier commands to `metrics-<k>.csv`: a new CSVLogger of that folder deletes it."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        metrics = Path(logger.log_dir) / "metrics.csv" if isinstance(logger, CSVLogger) else None
        if metrics is not None and metrics.exists():
            metrics.rename(next(path for k in count(1) if not (path := metrics.with_name(f"metrics-{k}.csv")).exists()))
