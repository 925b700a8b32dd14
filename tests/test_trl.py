"""The advantages that TRL trains with are ours; its own would differ wherever ranks and magnitudes do."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from trl import GRPOTrainer

from gopo_lightning import _compat
from gopo_lightning.objectives.advantages import ordinal, ordinal_from_wins
from gopo_lightning.rewards import FunctionComparator, FunctionReward, RankingOracle
from tests.ports import free_port
from tests.ranks import mixed, start_processes
from tests.trl_runs import PROMPTS, groups, make, on_a_rank, reward


def texts_of(policy: Path, completions: list[tuple[int, ...]]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in completions]


def assert_ours(seen: list[tuple[str, tuple[int, ...], float]], G: int, policy: Path) -> None:
    """Whole groups, whose advantages are those of `ordinal` for the rewards of their texts."""
    for prompt, rows in groups(seen).items():
        tokens, advantages = zip(*rows, strict=True)
        scores = [math.nan if s is None else s for s in mixed([prompt] * G, texts_of(policy, list(tokens)))]
        assert torch.equal(torch.tensor([advantages]), ordinal(torch.tensor([scores])))


@pytest.mark.parametrize(
    "options",
    [
        {"num_generations": 2, "per_device_train_batch_size": 4},
        {"num_generations": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {
            "num_generations": 4,
            "per_device_train_batch_size": 2,  # half a group
            "gradient_accumulation_steps": 4,
            "steps_per_generation": 8,
        },
        {"num_generations": 8, "per_device_train_batch_size": 16},
    ],
    ids=str,
)
def test_training_and_evaluation(options: dict[str, int], tiny_policy: Path, tmp_path: Path) -> None:
    G = options["num_generations"]
    trainer = make(tiny_policy, tmp_path, per_device_eval_batch_size=2 * G, **options)
    trainer.train()
    seen = trainer.seen["train"]
    assert len(seen) == 4 * G and {prompt for prompt, *_ in seen} == {row["prompt"] for row in PROMPTS}
    assert len({len(tokens) for _, tokens, _ in seen}) > 2 and any(advantage for *_, advantage in seen)
    assert_ours(seen, G, tiny_policy)
    logged = list(trainer._logs["advantages"])
    assert sorted(logged) == sorted(advantage for *_, advantage in seen[-len(logged) :])
    trainer.evaluate()
    assert len(trainer.seen["eval"]) == 4 * G
    assert_ours(trainer.seen["eval"], G, tiny_policy)


def test_evaluation_has_a_number_of_its_own(tiny_policy: Path, tmp_path: Path) -> None:
    for G in (2, 1):
        trainer = make(tiny_policy, tmp_path, num_generations_eval=G)
        trainer.evaluate()
        advantages = [advantage for *_, advantage in trainer.seen["eval"]]
        assert len(advantages) == 4 * G and (G == 2 or advantages == [0.0] * 4)
        if G == 2:
            assert_ours(trainer.seen["eval"], G, tiny_policy)


def test_groups_that_two_processes_share(tiny_policy: Path, tmp_path: Path) -> None:
    port = free_port()
    start_processes(on_a_rank, (tiny_policy, tmp_path, port), 2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [len(part) for part in parts] == [6, 6] and len(groups(parts[0] + parts[1])) == 3
    assert_ours(parts[0] + parts[1], 4, tiny_policy)


# ------------------------------------------------------------------------------------------------------------ rewards


def test_several_rewards(tiny_policy: Path, tmp_path: Path) -> None:
    """A function without a score for a whole group is left out there; elsewhere its None takes a completion out."""
    trainer = make(tiny_policy, tmp_path, [reward, FunctionReward(mixed)], reward_weights=[1.0, -2.0])
    trainer.model.train()
    trainer.num_generations, nan = 3, math.nan
    rewards = [[1, 0], [2, 1], [nan, 5], [nan, 1], [nan, 2], [nan, 2], [nan, nan], [nan, nan], [nan, nan]]
    expected = [2, -2, 0, 2, -1, -1, 0, 0, 0]
    assert trainer.advantages(torch.tensor(rewards)).tolist() == expected


def circle(first: list[str], second: list[str]) -> list[float | None]:
    """Each length modulo 3 beats the one before; a length that 5 divides is not judged."""
    lengths = [(len(a), len(b)) for a, b in zip(first, second, strict=True)]
    return [None if not a % 5 or not b % 5 else (0.5, 1.0, 0.0)[(a - b) % 3] for a, b in lengths]


def test_a_comparator(tiny_policy: Path, tmp_path: Path) -> None:
    trainer = make(tiny_policy, tmp_path, FunctionComparator(circle))
    trainer.train()
    assert trainer.seen["train"] and any(a for *_, a in trainer.seen["train"])
    for rows in groups(trainer.seen["train"]).values():
        texts = texts_of(tiny_policy, [tokens for tokens, _ in rows])
        wins = [[0.5 if a == b else circle([a], [b])[0] for b in texts] for a in texts]
        wins_PGG = torch.tensor([[[math.nan if w is None else w for w in row] for row in wins]])
        found = torch.tensor([[advantage for _, advantage in rows]])
        torch.testing.assert_close(found, ordinal_from_wins(wins_PGG), rtol=0, atol=5e-7)
    assert 0 <= trainer.state.log_history[-1]["reward/circle/cyclic_triad_fraction"] <= 1


def test_what_a_source_is_shown(tiny_policy: Path, tmp_path: Path) -> None:
    shown: list[Any] = []

    def oracle(prompt: str, completions: list[str], truncated: list[bool], num_tokens: list[int], gold: str) -> Any:
        shown.append((prompt, completions, truncated, num_tokens, gold))
        return [1, 0]

    trainer = make(tiny_policy, tmp_path, RankingOracle(oracle), num_generations=2)
    (function,) = trainer.reward_funcs
    end = trainer.eos_token_ids[0]
    chat = [{"role": "user", "content": "2 + 2?"}]
    common = {"log_metric": lambda *_: None, "trainer_state": None, "log_extra": None}
    scores = function(
        prompts=[chat, chat],
        completions=[[{"role": "assistant", "content": text}] for text in ("four", "fou")],
        completion_ids=[[7, 8, end], [7, 8]],
        gold=["4", "4"],
        **common,
    )
    assert scores == [0.0, 1.0] and shown == [("2 + 2?", ["four", "fou"], [False, True], [3, 2], "4")]
    with pytest.raises(ValueError, match=r"compares the 2 completions.*multiple of num_generations"):
        function(prompts=["a", "b"], completions=["", ""], completion_ids=[[1], [1]], gold=["", ""], **common)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (reward, {"scale_rewards": "none"}, "scale_rewards='none' has no effect"),
        (reward, {"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation="),
        (FunctionComparator(circle), {"reward_weights": [2.0]}, r"reward_weights=\[2.0\]: the only reward compares"),
    ],
)
def test_options_without_an_effect(
    rewards: Any, options: dict[str, Any], message: str, tiny_policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_policy, tmp_path, rewards, **options)


def test_another_trl(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no such method, and one that makes its advantages elsewhere: errors that name the version."""
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda self, inputs: {})
    trainer = make(tiny_policy, tmp_path, kind=_compat.trl_trainer())
    with pytest.raises(RuntimeError, match=r"trl [\d.]+ computes advantages otherwise.*requirements.lock"):
        trainer.train()
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    with pytest.raises(RuntimeError, match=r"trl [\d.]+ has no GRPOTrainer._calculate_rewards"):
        _compat.trl_trainer()


# ---------------------------------------------------------------------------------------------------------------- docs


def test_the_script_of_the_docs(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("docs/integrations.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(from datasets.*?)^```", text, re.DOTALL | re.M)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    small = code.replace("Qwen/Qwen3-0.6B", str(tiny_policy)).replace(
        "report_to=", "use_cpu=True, bf16=False, report_to="
    )
    exec(small, names)
    assert names["trainer"].state.global_step == 2
