"""The order of prompts over ranks, epochs, interruptions; against what Lightning does on resume."""

import contextlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from gopo_lightning.data.sampler import InOrderSampler, Place, PromptSampler


def flat(steps: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(steps))


def test_an_epoch_is_a_permutation_without_its_incomplete_step() -> None:
    steps = list(PromptSampler(11, 4, seed=3))
    expected = torch.randperm(11, generator=torch.Generator().manual_seed(3)).tolist()
    assert steps == [expected[:4], expected[4:8]]


def test_the_next_epoch_has_another_order() -> None:
    first, second = (list(PromptSampler(8, 4, seed=0, position=lambda p=p: p)) for p in (0, 2))
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(8))
    assert first != second
    assert flat(second) == torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_step_of_one_process(world_size: int) -> None:
    whole = list(PromptSampler(30, 8, seed=1))
    shards = [list(PromptSampler(30, 8, seed=1, rank=r, world_size=world_size)) for r in range(world_size)]
    for number, step in enumerate(whole):
        assert [shards[r][number] for r in range(world_size)] == [step[r::world_size] for r in range(world_size)]


@pytest.mark.parametrize("position", [1, 2, 3, 4, 7])
def test_an_iteration_starts_at_the_position(position: int) -> None:
    sampler = PromptSampler(13, 4, seed=5, position=lambda: position)
    assert list(sampler) == [sampler.step(number) for number in range(position, position + 3)]


def test_the_position_is_read_when_the_iteration_begins() -> None:
    """A worker pool prefetches, so the first next() would be too late."""
    now = [0]
    sampler = PromptSampler(12, 4, seed=5, position=lambda: now[0])
    iterator = iter(sampler)
    now[0] = 2
    assert next(iterator) == sampler.step(0)


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("P", [1, 2, 3, 5, 6])
def test_with_another_step_size_the_order_goes_on_after_the_same_prompts(at: int, P: int) -> None:
    """13 prompts in steps of 4, then of P: an epoch is read as one shuffling, and what does not fill a step is left."""
    before = PromptSampler(13, 4, seed=5)
    place = before.place(at)
    after = PromptSampler(13, P, seed=5, origin=lambda: place)
    read = [before.step(n) for n in range(at - at % 3, at)] + [after.step(n) for n in range(at, at + 20)]
    epoch = torch.randperm(13, generator=torch.Generator().manual_seed(5 + at // 3)).tolist()
    left = 13 - place.offset
    assert flat(read)[: 13 - left % P] == epoch[: 13 - left % P]
    following = torch.randperm(13, generator=torch.Generator().manual_seed(6 + at // 3)).tolist()
    assert flat(read)[13 - left % P :][:P] == following[:P]


@pytest.mark.parametrize("at", range(8))
def test_a_place_is_a_whole_origin(at: int) -> None:
    sampler = PromptSampler(13, 4, seed=5)
    again = PromptSampler(13, 4, seed=5, origin=lambda: sampler.place(at))
    assert [again.step(n) for n in range(at, at + 9)] == [sampler.step(n) for n in range(at, at + 9)]
    assert again.place(at + 5) == sampler.place(at + 5)
    assert sampler.place(4) == Place(4, epoch=1, offset=4)


def test_in_order_covers_every_row_once_and_marks_padding() -> None:
    for num_prompts, P, world_size in itertools.product((1, 5, 8, 11), (4, 8), (1, 2, 4)):
        shards = [list(InOrderSampler(num_prompts, P, rank=r, world_size=world_size)) for r in range(world_size)]
        assert len({tuple(map(len, shard)) for shard in shards}) == 1, "every rank has the same counts"
        assert all(len(shard) == len(InOrderSampler(num_prompts, P)) for shard in shards)
        rows = [row for step in zip(*shards, strict=True) for row in flat(step)]
        assert sorted(row for row in rows if row < num_prompts) == list(range(num_prompts))
        padding = [row for row in rows if row >= num_prompts]
        assert len(padding) == -num_prompts % world_size
    assert list(InOrderSampler(5, 4)) == [[0, 1, 2, 3], [4]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptSampler(9, 6, seed=0, world_size=4), r"prompts_per_step=6 .*world size 4.*Use 8"),
        (lambda: PromptSampler(3, 4, seed=0), "has 3 prompts, fewer than prompts_per_step=4"),
        (lambda: PromptSampler(3, 0, seed=0), "prompts_per_step=0 must be at least 1"),
        (lambda: InOrderSampler(9, 3, world_size=2), r"val_prompts_per_step=3 .*world size 2.*Use 4"),
    ],
)
def test_bad_shapes_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# What Lightning does with it


class PowerCut(Exception):
    """What interrupts a run."""


class Recorder(LightningModule):
    """Trains one number and remembers which rows it saw; raises at step ``fail_at``."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.seen: list[list[int]] = []
        self.fail_at = fail_at

    def training_step(self, rows: torch.Tensor, batch_idx: int) -> None:
        if self.fail_at == self.global_step:
            raise PowerCut
        self.seen.append(rows.tolist())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight * rows.sum())
        optimizer.step()

    def validation_step(self, rows: torch.Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Rows(LightningDataModule):
    """13 rows in steps of 4: three steps an epoch."""

    def train_dataloader(self) -> DataLoader:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        sampler = PromptSampler(13, 4, seed=7, position=lambda: progress.total.processed)
        return DataLoader(torch.arange(13), batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(2))


def fit(
    folder: Path, steps: int, *, ckpt: str | None = None, fail_at: int | None = None, **options: Any
) -> list[list[int]]:
    """The rows seen by a run of ``steps`` steps; it saves last.ckpt after every batch, or as ``callbacks`` say."""
    model = Recorder(fail_at)
    options.setdefault("callbacks", [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")])
    options = {"max_steps": steps, "num_sanity_val_steps": 0, "check_val_every_n_epoch": None} | options
    options |= {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    trainer = Trainer(**options, enable_model_summary=False, default_root_dir=folder)
    with contextlib.suppress(PowerCut):
        trainer.fit(model, Rows(), ckpt_path=ckpt)
    return model.seen


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    seen = fit(tmp_path_factory.mktemp("whole"), 10, callbacks=None, enable_checkpointing=False)
    assert len(seen) == 10
    sampler = PromptSampler(13, 4, seed=7)
    assert seen == [sampler.step(number) for number in range(10)]
    return seen


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6, 7])
def test_resuming_after_a_batch_continues_the_order(uninterrupted, tmp_path: Path, at: int) -> None:
    """3 and 6 are the last batches of an epoch."""
    assert fit(tmp_path, at) == uninterrupted[:at]
    assert fit(tmp_path, 10, ckpt=str(tmp_path / f"step={at}.ckpt")) == uninterrupted[at:]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_resuming_after_validation_continues_the_order(uninterrupted, tmp_path: Path, at: int) -> None:
    class SaveAfterValidation(Callback):
        def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"val{trainer.global_step}.ckpt")

    options = {"val_check_interval": 1, "enable_checkpointing": False}
    fit(tmp_path, at, callbacks=[SaveAfterValidation()], **options)
    resumed = fit(tmp_path, 10, ckpt=str(tmp_path / f"val{at}.ckpt"), callbacks=None, **options)
    assert resumed == uninterrupted[at:]


def test_resuming_after_an_epoch_continues_the_order(uninterrupted, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True, filename="epoch", save_top_k=-1)
    fit(tmp_path, 3, callbacks=[saver])
    resumed = fit(tmp_path, 10, ckpt=str(tmp_path / "epoch.ckpt"), callbacks=None, enable_checkpointing=False)
    assert resumed == uninterrupted[3:]


@pytest.mark.parametrize("fail_at", [2, 4])
def test_a_batch_that_was_cut_off_is_done_again(uninterrupted, tmp_path: Path, fail_at: int) -> None:
    class SaveOnException(Callback):
        def on_exception(self, trainer: Trainer, module: LightningModule, error: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "cut.ckpt")

    assert fit(tmp_path, 10, fail_at=fail_at, callbacks=[SaveOnException()]) == uninterrupted[:fail_at]
    resumed = fit(tmp_path, 10, ckpt=str(tmp_path / "cut.ckpt"), callbacks=None, enable_checkpointing=False)
    assert resumed == uninterrupted[fail_at:]


def test_resuming_by_epochs_continues_the_order(uninterrupted, tmp_path: Path) -> None:
    by_epoch = {"max_epochs": 3, "callbacks": None, "enable_checkpointing": False}
    fit(tmp_path, 4)
    resumed = fit(tmp_path, -1, ckpt=str(tmp_path / "step=4.ckpt"), **by_epoch)
    assert resumed == uninterrupted[4:9]


def test_limited_epochs_continue_the_order(uninterrupted, tmp_path: Path) -> None:
    options = {"limit_train_batches": 2, "callbacks": None, "enable_checkpointing": False}
    assert fit(tmp_path, 10, **options) == uninterrupted
