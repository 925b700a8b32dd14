"""Learning rates: by update, whatever ends the run; which schedules there are; how a warm-up begins."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim import SGD
from transformers import get_scheduler

from gopo_lightning.training.schedules import ENDLESS, Schedule, num_updates
from tests.runs import make_data, make_module, make_trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 5},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


class Rates(Callback):
    """The learning rate of every update."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def rates_of(schedule: Schedule, num_updates: int | None, lr: float = 1e-2) -> list[float]:
    optimizer = SGD([torch.zeros(())], lr=lr)
    scheduler = schedule.of(optimizer, num_updates)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", OPTIONS)
def test_a_warm_up_from_zero_is_transformers_own(name: str) -> None:
    optimizer = SGD([torch.zeros(())], lr=1e-2)
    scheduler = get_scheduler(name, optimizer, 3, 12, OPTIONS[name])
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates_of(Schedule(name, 3, "zero", OPTIONS[name]), 12) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_the_first_step_of_a_warm_up_moves(name: str) -> None:
    zero, first = (rates_of(Schedule(name, 4, start, OPTIONS[name]), 12) for start in ("zero", "first_step"))
    assert first[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert first[4:] == zero[4:]


def test_without_a_warm_up_the_start_does_not_matter() -> None:
    assert rates_of(Schedule("linear", 0, "zero"), 12) == rates_of(Schedule("linear", 0, "first_step"), 12)


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - set(ENDLESS)))
def test_a_schedule_with_an_end_wants_to_know_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"lr_schedule={name} .*Set trainer.max_steps"):
        Schedule(name, 0, options=OPTIONS[name]).factor(lr=1.0, num_updates=None)


@pytest.mark.parametrize("name", ENDLESS)
def test_the_others_do_not(name: str) -> None:
    assert Schedule(name, 0).factor(lr=1.0, num_updates=None)(10**6) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reduce_lr_on_plateau", 0), "lr_schedule=reduce_lr_on_plateau cannot be used"),
        (("greedy", 0), "lr_schedule=greedy cannot be used"),
        (("cosin", 0), "lr_schedule='cosin' is unknown. Use one of"),
        (("linear", -1), "warmup_steps=-1"),
        (("linear", 1, "half"), "warmup_start='half' is unknown"),
        (("cosine_with_min_lr", 0), "lr_schedule=cosine_with_min_lr .*`lr_schedule_options`"),
        (("warmup_stable_decay", 0), "lr_schedule=warmup_stable_decay .*num_decay_steps"),
        (("linear", 0, "zero", {"min_lr": 0.1}), "lr_schedule=linear with lr_schedule_options={'min_lr': 0.1}"),
        (("constant", 0, "zero", {"min_lr": 0.1}), "takes no lr_schedule_options"),
    ],
)
def test_what_cannot_be_built_is_refused_by_our_names(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Schedule(*arguments)
    assert "lr_scheduler_kwargs" not in str(error.value)


def test_a_warm_up_without_effect_is_said() -> None:
    with pytest.warns(UserWarning, match="lr_schedule=constant has no warm-up, so warmup_steps=5 has no effect"):
        Schedule("constant", 5)
    with pytest.warns(UserWarning, match="warmup_steps=10, but the run ends after 4: all of it is warm-up"):
        rates_of(Schedule("linear", 10), 4)
    with pytest.warns(UserWarning, match="warmup_steps=4, but the run ends after 4"):
        rates_of(Schedule("constant_with_warmup", 4), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates_of(Schedule("constant_with_warmup", 3), 4)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"max_steps": -1, "max_epochs": 2}, 12),  # 3 rollouts an epoch, 2 updates each
        ({"max_steps": 8, "max_epochs": 2}, 8),
        ({"max_steps": 8, "max_epochs": 1}, 6),
        ({"max_steps": 8}, 8),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 1}, 4),
    ],
)
def test_a_schedule_lasts_as_long_as_the_run(
    trainer: dict[str, Any], expected: int, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    rates = Rates()
    module = make_module(tiny_policy, lr_schedule="linear", num_minibatches=2)
    run = make_trainer(tmp_path, callbacks=[rates], val_check_interval=None, **trainer)
    run.fit(module, make_data(prompts_file, validation=None))
    assert num_updates(run, 2) == run.global_step == expected
    assert [rate / rates.rates[0] for rate in rates.rates] == pytest.approx([1 - k / expected for k in range(expected)])


def test_a_run_that_time_alone_ends(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    endless = {"max_steps": -1, "max_time": {"seconds": 1}, "val_check_interval": None}
    with pytest.raises(ValueError, match="lr_schedule=cosine depends on .*Set trainer.max_steps"):
        make_trainer(tmp_path, **endless).fit(make_module(tiny_policy, lr_schedule="cosine"), make_data(prompts_file))
    module = make_module(tiny_policy, lr_schedule="constant_with_warmup")
    (trainer := make_trainer(tmp_path, **endless)).fit(module, make_data(prompts_file, validation=None))
    assert trainer.global_step > 0
