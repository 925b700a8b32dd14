"""A Trainer made in Python behaves as the command line's, or says what it lacks."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

import gopo_lightning
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.rewards import FunctionReward
from gopo_lightning.rollout import SamplingConfig
from gopo_lightning.training.config import RewardConfig, RolloutConfig
from tests.runs import make_data, make_module

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_steps": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def test_a_trainer_with_the_defaults_trains(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    trainer = Trainer(**gopo_lightning.trainer_defaults(), **QUIET, val_check_interval=1, default_root_dir=tmp_path)
    trainer.fit(make_module(tiny_policy), make_data(prompts_file))
    assert trainer.global_step == 1 and trainer.callback_metrics["val/win_rate"] >= 0


@pytest.mark.parametrize(
    ("option", "value"), [("num_sanity_val_steps", 2), ("num_sanity_val_steps", -1), ("inference_mode", True)]
)
def test_other_values_are_refused_with_the_remedy(
    option: str, value: Any, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    options = gopo_lightning.trainer_defaults() | {option: value}
    trainer = Trainer(**options, **QUIET, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=rf"trainer\.{option}=.*trainer_defaults\(\)"):
        trainer.fit(make_module(tiny_policy), make_data(prompts_file))


def test_groups_are_dicts_or_configs_or_their_first_field(tiny_policy: Path) -> None:
    rewards = [FunctionReward("tests.runs.count_vowels")]
    sampling = {"max_new_tokens": 7}
    module = gopo_lightning.GOPOModule(policy=str(tiny_policy), rewards=rewards, rollout={"sampling": sampling})
    same = gopo_lightning.GOPOModule(
        PolicyConfig(str(tiny_policy)), RewardConfig(rewards), RolloutConfig(SamplingConfig(max_new_tokens=7))
    )
    for group in ("policy_config", "reward_config", "rollout_config"):
        assert getattr(module, group) == getattr(same, group)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"rollout": {"sampling": {"max_tokens": 7}}}, r"rollout\.sampling has no \['max_tokens'\]; its fields are"),
        ({"update": {"lr": 0.1}}, r"update has no \['lr'\]"),
        ({"objective": {"loss": {"kl_coef": 0.1}}}, r"objective\.loss=.* is a dict; give an Objective"),
        ({"objective": {"advantage": {"name": "grpo"}}}, r"objective\.advantage=.*function with init_args"),
    ],
)
def test_wrong_fields_are_named(groups: dict[str, Any], message: str, tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=message):
        gopo_lightning.GOPOModule(str(tiny_policy), [FunctionReward("tests.runs.count_vowels")], **groups)
