"""A source that gives nothing a valid score is told, and ends the run if that is asked for."""

import math
import warnings
from pathlib import Path

import pytest
import torch

from gopo_lightning.rewards import FunctionReward
from gopo_lightning.rewards.validity import WARN_AFTER, InvalidSteps
from tests.runs import make_data, make_module, make_trainer


def nothing(completions: list[str]) -> list[float]:
    return [math.nan] * len(completions)


def something(completions: list[str]) -> list[float]:
    return [math.nan] * (len(completions) - 1) + [1.0]


def scores(*num_valid: int) -> torch.Tensor:
    """Of 2 groups of 4, so many numbers from each source."""
    columns = [[1.0] * count + [math.nan] * (8 - count) for count in num_valid]
    return torch.tensor(columns).T.reshape(2, 4, len(num_valid))


def test_a_warning_after_some_steps_in_a_row_once() -> None:
    steps = InvalidSteps(["a", "b"], None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, valid in enumerate([0, 0, 1, 0, 0, 0, 0]):
            steps.update(step, scores(valid, 0 if step < 2 else 3))
    (message,) = [str(warning.message) for warning in caught]
    assert f"'a' gave none of 8 completions a valid score at step 5, and none in {WARN_AFTER} steps in a row" in message
    again = InvalidSteps(["a", "c"], 5)
    again.load_state_dict(steps.state_dict())
    with pytest.raises(ValueError, match=r"'a' gave none .* in 5 steps in a row: max_invalid_steps=5"):
        again.update(7, scores(0, 1))


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"max_invalid_steps=0 must be at least 1; use null"):
        InvalidSteps(["a"], 0)


def test_a_run_ends_when_it_has_learned_nothing_for_long(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    rewards = [FunctionReward(something), FunctionReward(nothing)]
    module = make_module(tiny_policy, rewards=rewards, combine="borda", max_invalid_steps=2)
    trainer = make_trainer(tmp_path, max_steps=5, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"'nothing' gave none of 16 completions a valid score at step 1"):
        trainer.fit(module, make_data(prompts_file))
    assert trainer.global_step == 1
