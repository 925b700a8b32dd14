"""The best checkpoint stays the best after an interruption, in the same folder and in that of a new version."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from gopo_lightning.distributed.checkpoints import last_checkpoint_of
from gopo_lightning.training.callbacks.save_on_signal import SaveOnSignal
from gopo_lightning.training.optimisation import OptimisedModule
from gopo_lightning.training.schedules import Schedule
from tests.runs import make_trainer

STOPS = 2
"""Ctrl-C comes in the validation of this step."""


class Line(OptimisedModule):
    """Trains in milliseconds, and scores as ``scores`` says of each step."""

    kind, base_model = "policy", ("line", None)

    def __init__(self, scores: Mapping[int, float], *, stops: bool) -> None:
        super().__init__()
        self.optimizer_callable = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
        self.schedule = Schedule("constant", 0)
        self.on_setting_change = "refuse"
        self.layer = torch.nn.Linear(1, 1)
        self.scores, self.stops = scores, stops

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/reward", self.scores[self.trainer.global_step])
        if self.stops and self.trainer.global_step == STOPS:
            os.kill(os.getpid(), signal.SIGINT)


def make(folder: Path, max_steps: int, dirpath: Path | None = None, save_top_k: int = 1) -> Trainer:
    """Validates after each step."""
    name: dict[str, Any] = {"filename": "step{step}", "auto_insert_metric_name": False}
    keeper = ModelCheckpoint(dirpath, monitor="val/reward", mode="max", save_top_k=save_top_k, **name)
    logger, callbacks = TensorBoardLogger(str(folder), name="run"), [keeper, SaveOnSignal()]
    return make_trainer(folder, max_steps=max_steps, val_check_interval=1, callbacks=callbacks, logger=logger)


def interrupt(folder: Path, scores: Mapping[int, float], **options: Any) -> None:
    """Train until STOPS."""
    with pytest.raises(SystemExit, match="130"):
        make(folder, max(scores), **options).fit(Line(scores, stops=True), *loaders())


def resume(folder: Path, scores: Mapping[int, float], **options: Any) -> Any:
    """Go on to the last step of ``scores``; its `ModelCheckpoint`."""
    trainer = make(folder, max(scores), **options)
    trainer.fit(Line(scores, stops=False), *loaders(), ckpt_path=last_checkpoint_of(trainer))
    return trainer.checkpoint_callback


def loaders() -> list[DataLoader]:
    return [DataLoader(torch.ones(4, 1)), DataLoader(torch.ones(1, 1))]


@pytest.mark.parametrize("in_one_folder", [False, True])
def test_a_worse_one_does_not_take_its_place(in_one_folder: bool, tmp_path: Path) -> None:
    scores, dirpath = {1: 0.1, 2: 0.9, 3: 0.5}, tmp_path / "kept" if in_one_folder else None
    interrupt(tmp_path, scores, dirpath=dirpath)
    keeper = resume(tmp_path, scores, dirpath=dirpath)
    assert keeper.best_model_score == pytest.approx(0.9)
    best = Path(keeper.best_model_path)
    assert best.name == "step2.ckpt" and torch.load(best)["global_step"] == 2
    assert not list(tmp_path.rglob("step3.ckpt"))


def test_a_better_one_does_and_the_earlier_stays_in_its_folder(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.5, 3: 0.9}
    interrupt(tmp_path, scores)
    keeper = resume(tmp_path, scores)
    assert keeper.best_model_score == pytest.approx(0.9)
    assert keeper.best_model_path.endswith("version_1/checkpoints/step3.ckpt")
    assert (tmp_path / "run" / "version_0" / "checkpoints" / "step2.ckpt").exists()


def test_of_several_the_worst_makes_way(tmp_path: Path) -> None:
    scores = {1: 0.7, 2: 0.9, 3: 0.5, 4: 0.8}
    interrupt(tmp_path, scores, save_top_k=2)
    keeper = resume(tmp_path, scores, save_top_k=2)
    assert [Path(path).name for path in keeper.best_k_models] == ["step2.ckpt", "step4.ckpt"]
    assert keeper.kth_value == pytest.approx(0.8)


def test_one_that_was_removed_does_not_count(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.9, 3: 0.5}
    interrupt(tmp_path, scores)
    next(tmp_path.rglob("step2.ckpt")).unlink()
    keeper = resume(tmp_path, scores)
    assert keeper.best_model_path.endswith("version_1/checkpoints/step3.ckpt")
    assert keeper.best_model_score == pytest.approx(0.5)
