"""The reference's completions are compared only with what was made, and is scored, as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.rewards import FunctionComparator, FunctionReward
from gopo_lightning.rollout import SamplingConfig
from gopo_lightning.training.reference_completions import ReferenceCompletions
from gopo_lightning.types import Completions, Prompt, PromptBatch
from tests.runs import make_data, make_module, make_trainer


def length(completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


def more(completions: list[str]) -> list[float]:
    return [1000.0 + len(c) for c in completions]


def longer(first: list[str], second: list[str]) -> list[float]:
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def still(folder: Path, **overrides: Any) -> Any:
    """A policy that does not learn: it stays the reference, and draws with it."""
    options: dict[str, Any] = {
        "rewards": [FunctionReward(length, name="r")],
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.0),
    }
    return make_module(folder, **(options | overrides))


@pytest.fixture(scope="module")
def checkpoint(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose reward is the length of up to 8 tokens."""
    folder = tmp_path_factory.mktemp("reference")
    trainer = make_trainer(folder, max_steps=1, val_check_interval=1)
    trainer.fit(still(tiny_policy), make_data(prompts_file))
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


TWO = [FunctionReward(length, name="r"), FunctionReward(more, name="q")]
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "reward": ({"rewards": [FunctionReward(more, name="r")]}, {}),
    "two rewards": ({"rewards": TWO}, {}),
    "scores to comparisons": ({"rewards": [FunctionComparator(longer)]}, {}),
    "length": ({"sampling": SamplingConfig(max_new_tokens=24)}, {}),
    "temperature": ({"sampling": SamplingConfig(max_new_tokens=8, temperature=0.3)}, {}),
    "completions": ({"eval_num_completions": 4}, {}),
    "seed": ({"seed": 4}, {}),
    "system prompt": ({}, {"system_prompt": "Be brief."}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_unchanged_policy_draws_whatever_else_has_changed(
    change: str, checkpoint: Path, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module, data = CHANGES[change]
    result = evaluate("validate", checkpoint, tiny_policy, prompts_file, tmp_path, module, data)
    assert result["val/win_rate"] == 0.5
    assert {value for name, value in result.items() if name.endswith("/win_rate")} == {0.5}


def evaluate(
    what: str, checkpoint: Path, policy: Path, prompts: Path, folder: Path, module: Any, data: Any
) -> dict[str, float]:
    (result,) = getattr(make_trainer(folder), what)(
        still(policy, **module), make_data(prompts, **data), ckpt_path=str(checkpoint), verbose=False
    )
    return dict(result)


def test_a_test_with_another_reward_draws_too(
    checkpoint: Path, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    data = {"test": make_data(prompts_file).sources["validation"]}
    result = evaluate("test", checkpoint, tiny_policy, prompts_file, tmp_path, CHANGES["reward"][0], data)
    assert result["test/win_rate"] == 0.5


@pytest.mark.parametrize("change", ["reward", "two rewards", "temperature"])
def test_a_fit_that_goes_on_otherwise_draws_too(
    change: str, checkpoint: Path, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=1)
    trainer.fit(still(tiny_policy, **CHANGES[change][0]), make_data(prompts_file), ckpt_path=str(checkpoint))
    assert trainer.callback_metrics["val/win_rate"] == 0.5


def test_what_is_stored_is_not_sampled_again(
    checkpoint: Path, tiny_policy: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only scored, and only once a call of the Trainer."""
    calls: list[int] = []

    def counted(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return length(completions)

    module = still(tiny_policy, rewards=[FunctionReward(counted, name="r")])
    monkeypatch.setattr(type(module.validation), "_sample_reference", None)
    data = make_data(prompts_file)
    trainer = make_trainer(tmp_path, max_steps=3, val_check_interval=1)
    trainer.fit(module, data, ckpt_path=str(checkpoint))
    assert trainer.callback_metrics["val/win_rate"] == 0.5
    assert sum(calls) == 2 * 4 * 4 + 5 * 2 + 2 * 5 * 2  # two steps, the references once, two validations


def batch_of(*prompts: Prompt) -> tuple[PromptBatch, Completions]:
    mask = torch.ones(len(prompts) * 2, 1, dtype=torch.bool)
    texts = tuple("abcd"[: len(mask)])
    return PromptBatch.collate(prompts, 0), Completions(mask.long(), mask, torch.zeros(len(mask)).bool(), texts)


def test_tokens_and_settings_make_the_key() -> None:
    reference = ReferenceCompletions()
    reference.begin({"seed": 1})
    prompts, completions = batch_of(Prompt(0, (1, 2), "q"))
    reference.add(prompts, completions)
    reference.add_scores(prompts, torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1.0, 2.0]]))
    assert reference.knows(prompts) and reference.has_scores(prompts)
    assert not reference.knows(batch_of(Prompt(0, (1, 3), "q"))[0])  # the same text under another system prompt
    assert not reference.knows(batch_of(Prompt(1, (1, 2), "q"))[0])  # another random stream
    reference.begin({"seed": 1})  # the next call of the Trainer may have other sources
    assert reference.knows(prompts) and not reference.has_scores(prompts)
    reference.begin({"seed": 2})
    assert not reference.knows(prompts)
    reference.load_state_dict({"texts": {"0:abc": ["x"]}, "rewards": {"0:abc": [[1.0]]}})  # of an earlier version
    assert reference.state_dict() == {"completions": {}}
