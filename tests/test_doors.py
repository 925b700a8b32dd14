"""A method of each kind is added from outside, by its dotted path, without touching the package."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.objectives import Loss, Mean, Objective
from gopo_lightning.rewards import RewardSource
from gopo_lightning.rollout import Transform, TransformersEngine
from gopo_lightning.rollout.transforms import Context
from gopo_lightning.training.update import GradientUpdate
from gopo_lightning.types import Experience, Rollout


class Regression(Objective):
    """(log policy(y) − log policy_old(y) − η A)², over whole completions (REBEL-like)."""

    needs = frozenset({"old"})

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = eta

    def denominator(self, experience: Experience, mask_NT: Tensor) -> Tensor:
        return mask_NT.any(-1).sum().float()

    def __call__(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor, total: Tensor) -> Loss:
        old_NT = logprobs_NT.detach() if experience.old_logprobs_NT is None else experience.old_logprobs_NT
        change_N = ((logprobs_NT - old_NT) * mask_NT).sum(-1)
        error_N = (change_N - self.eta * experience.advantages_PG.flatten()) ** 2 * mask_NT.any(-1)
        return Loss(error_N.sum() / total.clamp(min=1), {"error": Mean(error_N.sum(), mask_NT.any(-1).sum())})


class NamesItLoss(Regression):
    """A metric called like one of ours."""

    def __call__(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor, total: Tensor) -> Loss:
        loss = super().__call__(logprobs_NT, experience, mask_NT, total)
        return Loss(loss.value, {"loss": loss.metrics["error"]})


class Twice(GradientUpdate):
    """Twice the gradient, and a metric of its own."""

    def __call__(self, module: Any, policy: Any, parts: Any) -> dict[str, Tensor]:
        doubled = [part._replace(term=replace(part.term, weight=2 * part.term.weight)) for part in parts]
        return {**super().__call__(module, policy, doubled), "train/twice": torch.tensor(2.0)}


class CountsSteps(Transform):
    """Prefers short completions; remembers how many rollouts it has seen."""

    def __init__(self) -> None:
        self._seen = 0

    def __call__(self, rollout: Rollout, context: Context) -> Rollout:
        lengths_PG = rollout.completions.lengths_N.view_as(rollout.rewards_PG)
        return replace(rollout, rewards_PG=rollout.rewards_PG - 0.01 * lengths_PG)

    def commit(self, experience: Experience) -> None:
        self._seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = state["seen"]


class Length(RewardSource):
    name = "length"

    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        return [float(len(text)) for text in completions]


class Engine(TransformersEngine):
    """Any class of the protocol's shape."""


def half_the_rank(rewards_PG: Tensor, scale: float) -> Tensor:
    return scale * (rewards_PG[..., :, None] > rewards_PG[..., None, :]).sum(-1).float()


def first_tokens(experience: Experience) -> Tensor:
    """Only a completion's first token is taught."""
    first_NT = torch.zeros_like(experience.completions.mask_NT)
    first_NT[:, 0] = True
    return experience.advantages_PG.flatten()[:, None] * first_NT


def only_the_first(rewards_PGK: Tensor) -> Tensor:
    return rewards_PGK[..., 0]


DOORS: dict[str, dict[str, Any]] = {
    "objective": {"objective": {"loss": {"class_path": "tests.test_doors.Regression", "init_args": {"eta": 0.5}}}},
    "advantage": {
        "objective": {"advantage": {"function": "tests.test_doors.half_the_rank", "init_args": {"scale": 0.5}}}
    },
    "credit": {"objective": {"credit": "tests.test_doors.first_tokens"}},
    "transform": {"rewards": {"transforms": [{"class_path": "tests.test_doors.CountsSteps"}]}},
    "combine": {"rewards": {"combine": "tests.test_doors.only_the_first"}},
    "reward": {"rewards": {"sources": [{"class_path": "tests.test_doors.Length"}]}},
    "update": {"update": {"rule": {"class_path": "tests.test_doors.Twice"}, "num_minibatches": 2}},
    "engine": {"rollout": {"engine": {"class_path": "tests.test_doors.Engine"}}},
}


def write_config(folder: Path, policy: Path, prompts: Path, options: Mapping[str, Any], **trainer: Any) -> Path:
    """A run of ``options``, groups of arguments of the module."""
    reward = {
        "class_path": "gopo_lightning.rewards.FunctionReward",
        "init_args": {"function": "tests.runs.count_vowels"},
    }
    groups: dict[str, Any] = {
        "policy": {"name": str(policy)},
        "rewards": {"sources": [reward]},
        "rollout": {"num_completions": 4, "eval_num_completions": 2, "sampling": {"max_new_tokens": 16}},
        "objective": {},
        "update": {"warmup_steps": 0, "num_minibatches": 2},
    }
    for group, fields in options.items():
        groups[group] = groups[group] | fields
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "run", "version": "a"}}
    values = {
        "seed_everything": 3,
        "trainer": {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 1, "logger": logger} | trainer,
        "model": {"class_path": "gopo_lightning.GOPOModule", "init_args": groups},
        "data": {
            "class_path": "gopo_lightning.PromptDataModule",
            "init_args": {
                "train": {"path": str(prompts)},
                "validation": {"path": str(prompts), "limit": 4},
                "prompts_per_step": 4,
            },
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("door", DOORS)
def test_a_method_is_named_in_yaml_and_trains(door: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_policy, prompts_file, DOORS[door])
    module = run(["fit", "--config", str(config)]).model
    assert module.trainer.global_step == 2
    text = (tmp_path / "run" / "a" / "metrics.csv").read_text()
    assert "train/loss" in text and ("train/error" in text) == (door == "objective")
    assert ("train/twice" in text) == (door == "update")


def test_a_metric_that_is_called_like_one_of_ours_is_refused(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    options = {"objective": {"loss": {"class_path": "tests.test_doors.NamesItLoss"}}}
    config = write_config(tmp_path, tiny_policy, prompts_file, options)
    with pytest.raises(ValueError, match=r"NamesItLoss names metrics \['loss'\]"):
        run(["fit", "--config", str(config)])


def test_the_state_of_a_transform_is_in_the_checkpoint(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_policy, prompts_file, DOORS["transform"])
    (first,) = run(["fit", "--config", str(config)]).model.shaping.transforms
    assert first._seen == 1
    (again,) = run(
        ["fit", "--config", str(config), "--ckpt_path=last", "--trainer.max_steps=6"]
    ).model.shaping.transforms
    assert again._seen == 3
