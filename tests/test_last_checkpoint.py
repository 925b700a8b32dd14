"""`--ckpt_path last`: this run's last checkpoint, wherever its logger puts it, and never another run's."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from gopo_lightning.distributed.checkpoints import atomic_save, last_checkpoint_of, newest, step_of
from gopo_lightning.distributed.run_folder import checkpoint_folder
from gopo_lightning.training.callbacks.save_on_signal import SaveOnSignal
from tests.test_run_folder import Server


class Line(LightningModule):
    """Trains in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).sum()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make(folder: Path, logger: Any, keeper: ModelCheckpoint | None = None, **options: Any) -> Trainer:
    """A trainer that saves at its last step."""
    return Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[keeper or ModelCheckpoint()],
        default_root_dir=folder / "root",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def train(trainer: Trainer, steps: int = 1) -> None:
    trainer.fit_loop.epoch_loop.max_steps = steps
    trainer.fit(Line(), DataLoader(torch.ones(8, 1)))


LOGGERS: dict[str, Callable[[str, str], Any]] = {
    "tensorboard": lambda folder, name: TensorBoardLogger(folder, name=name),
    "tensorboard, text version": lambda folder, name: TensorBoardLogger(folder, name="all", version=name),
    "tensorboard, sub_dir": lambda folder, name: TensorBoardLogger(folder, name=name, sub_dir="tb"),
    "tensorboard, no name": lambda folder, name: TensorBoardLogger(f"{folder}/{name}", name=None),
    "csv": lambda folder, name: CSVLogger(folder, name=name),
    "csv, text version": lambda folder, name: CSVLogger(folder, name="all", version=name),
    "server, ids of its own": lambda folder, name: Server(f"{folder}/{name}"),
    "server, id given": lambda folder, name: Server(folder, version=name),
    "none": lambda folder, name: False,
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_a_run_finds_its_own_and_only_its_own(kind: str, tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert last_checkpoint_of(make(tmp_path, LOGGERS[kind](folder, "mine"))) is None
    train(make(tmp_path, LOGGERS[kind](folder, "mine")))
    (saved,) = tmp_path.rglob("*.ckpt")
    assert last_checkpoint_of(make(tmp_path, LOGGERS[kind](folder, "mine"))) == saved
    others = set(LOGGERS) - ({"none"} if kind == "none" else set())  # without a logger all are one
    for other in others:
        assert last_checkpoint_of(make(tmp_path, LOGGERS[other](folder, "other"))) is None, other


@pytest.mark.parametrize("kind", LOGGERS)
@pytest.mark.parametrize("with_dirpath", [False, True])
def test_what_an_interrupted_run_saves_is_found(kind: str, with_dirpath: bool, tmp_path: Path) -> None:
    keeper = {"dirpath": tmp_path / "mine"} if with_dirpath else {}
    trainer = make(tmp_path, LOGGERS[kind](str(tmp_path), "mine"), ModelCheckpoint(**keeper))
    trainer.callbacks.append(SaveOnSignal())  # type: ignore[attr-defined]

    def stop(*_: Any) -> None:
        trainer.callbacks[-1]._received = 2  # type: ignore[attr-defined]

    trainer.callbacks[0].on_train_batch_start = stop  # type: ignore[attr-defined, method-assign]
    with pytest.raises(SystemExit, match="130"):
        train(trainer)
    found = last_checkpoint_of(make(tmp_path, LOGGERS[kind](str(tmp_path), "mine"), ModelCheckpoint(**keeper)))
    assert found is not None and found.name == "interrupted-step=1.ckpt"
    assert found.parent == checkpoint_folder(trainer)


@pytest.mark.parametrize(("steps", "said"), [(1, False), (3, True)])
def test_a_run_that_fails_says_how_to_go_on(
    steps: int, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(of: Trainer, *_: Any) -> None:
        if of.global_step == steps:
            raise ConnectionError("the judge is gone")

    trainer = make(tmp_path, TensorBoardLogger(str(tmp_path)), ModelCheckpoint(every_n_train_steps=2))
    trainer.callbacks += [LambdaCallback(on_train_batch_start=fail), SaveOnSignal()]  # type: ignore[attr-defined]
    with pytest.raises(ConnectionError):
        train(trainer, 4)
    told = (
        "the run ended after step 3, and its newest checkpoint is of step 2. To go on from there, run the same command "
    )
    assert (told + "with --ckpt_path last.\n" == capsys.readouterr().err) == said


def test_without_model_checkpoint_and_logger_an_interrupted_run_is_found(tmp_path: Path) -> None:
    options: dict[str, Any] = {"enable_checkpointing": False, "logger": False, "default_root_dir": tmp_path}
    trainer = Trainer(accelerator="cpu", **options)
    path = write(checkpoint_folder(trainer) / "interrupted-step=2.ckpt", 2)
    assert last_checkpoint_of(Trainer(accelerator="cpu", **options)) == path


@pytest.mark.parametrize("with_dirpath", [False, True])
def test_a_metric_with_a_slash_in_the_name_of_the_file(with_dirpath: bool, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        options: dict[str, Any] = {"dirpath": tmp_path / "kept"} if with_dirpath else {}
        keeper = ModelCheckpoint(filename="{step}-{train/loss:.2f}", **options)
        return make(tmp_path, TensorBoardLogger(tmp_path, name="run"), keeper)

    train(trainer())
    (saved,) = tmp_path.rglob("*.ckpt")
    assert last_checkpoint_of(trainer()) == saved


def test_a_dirpath_does_not_reach_into_other_runs(tmp_path: Path) -> None:
    train(make(tmp_path, TensorBoardLogger(tmp_path / "runs", name="other")))
    keeper = ModelCheckpoint(dirpath=tmp_path, filename="{step}-{train/loss:.2f}")
    assert last_checkpoint_of(make(tmp_path, TensorBoardLogger(tmp_path / "runs", name="mine"), keeper)) is None


def write(path: Path, step: int, seconds: int = 0) -> Path:
    """A checkpoint of ``step`` that was last changed at ``seconds``."""
    atomic_save({"pytorch-lightning_version": "2", "global_step": step, "state_dict": {}}, path)
    os.utime(path, (seconds, seconds))
    return path


def test_steps_decide_within_a_version_so_that_clocks_need_not(tmp_path: Path) -> None:
    later = write(tmp_path / "a.ckpt", 10, seconds=100)
    earlier = write(tmp_path / "b.ckpt", 9, seconds=200)  # the clock was set back in between
    same = write(tmp_path / "c.ckpt", 10, seconds=300)
    assert newest([later, earlier]) == later
    assert newest([later, earlier, same]) == same
    same.write_bytes(same.read_bytes()[:-9])
    assert newest([later, earlier, same]) == later


def test_the_newest_version_with_a_checkpoint_decides(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    new = write(folder / "version_10" / "checkpoints" / "a.ckpt", 10, seconds=200)  # started from step 0 again
    old = write(folder / "version_9" / "checkpoints" / "a.ckpt", 100, seconds=300)
    (folder / "version_11" / "checkpoints").mkdir(parents=True)
    trainer = make(tmp_path, TensorBoardLogger(tmp_path, name="run"))
    assert last_checkpoint_of(trainer) == new
    new.write_bytes(b"")
    assert last_checkpoint_of(trainer) == old and step_of(old) == 100


@pytest.mark.parametrize(("in_dirpath", "under_logger"), [(3, 2), (2, 3)])
def test_a_dirpath_and_the_logger_of_one_run_are_both_looked_at(
    in_dirpath: int, under_logger: int, tmp_path: Path
) -> None:
    paths = [
        write(tmp_path / "kept" / "a.ckpt", in_dirpath),
        write(tmp_path / "run" / "version_0" / "checkpoints" / "b.ckpt", under_logger),
    ]
    keeper = ModelCheckpoint(dirpath=tmp_path / "kept")
    trainer = make(tmp_path, TensorBoardLogger(tmp_path, name="run"), keeper)
    assert last_checkpoint_of(trainer) == max(paths, key=lambda path: step_of(path) or 0)
