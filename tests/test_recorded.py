"""Groups of rated answers that a dataset holds, through the same advantages and objective as sampled ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.data.recorded import recorded_answers
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.rewards import RecordedReward, RewardSource
from gopo_lightning.rollout import RecordedEngine, SamplingConfig, TransformersEngine
from gopo_lightning.rollout.engines.base import ChecksSampling, HasSampler, HasState
from gopo_lightning.types import Prompt
from tests.conftest import byte_tokenizer
from tests.ranks import Case, launch
from tests.runs import make_module, make_trainer
from tests.test_module import Keep

ROWS: list[dict[str, Any]] = [
    {"prompt": "say ab", "completions": ["ab", "abab", "no", "a"], "ranks": [1, 2, 3, 3]},
    {
        "prompt": "say b",
        "completions": ["b", "bb" * 9, "", "x"],
        "ranks": [2, 1, 4, 3],
        "scores": [0.5, 2.0, -1.0, 0.0],
    },
    {"prompt": "say c", "completions": ["say cc", "say cd", "say ce", "say cf", "say cg"], "ranks": [1, 2, 3, 4, 5]},
    {"prompt": "say d", "completions": ["d", "dd", "ddd", "dddd"], "ranks": [1, 1, 1, 1]},
]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(**more: Any) -> dict[str, Any]:
    engine = {"engine": RecordedEngine(), "rewards": [RecordedReward()], "sampling": SamplingConfig(max_new_tokens=12)}
    return engine | more


def fit(folder: Path, policy: Path, rows: Path, **module: Any) -> Keep:
    keep = Keep()
    data = PromptDataModule(train=PromptSource(str(rows)), prompts_per_step=4)
    make_trainer(folder, max_steps=1, limit_val_batches=0, callbacks=[keep]).fit(
        make_module(policy, **options(**module)), data
    )
    return keep


def test_the_update_is_the_formula_on_the_rows(tiny_policy: Path, tmp_path: Path) -> None:
    """By plain forwards of each answer with its EOS, and the ordinal advantage of its rating."""
    keep = fit(tmp_path, tiny_policy, write(tmp_path, ROWS), optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    experience, model = keep.experiences[0], AutoModelForCausalLM.from_pretrained(tiny_policy)
    tokenizer, sums, count = byte_tokenizer(), torch.zeros(()), 0
    for p, prompt in enumerate(experience.prompts.prompts):
        texts, rewards_G = experience.completions.texts[4 * p : 4 * p + 4], experience.rewards_PG[p]
        row = ROWS[prompt.index]
        given = [text.removeprefix(row["prompt"]) for text in row["completions"]]
        assert set(texts) <= {text[:12] for text in given} and len(set(texts)) == 4
        for text, advantage, reward in zip(texts, ordinal(rewards_G[None])[0], rewards_G, strict=True):
            place = next(i for i, answer in enumerate(given) if answer[:12] == text)
            others = [r for i, r in enumerate(row["ranks"]) if i != place]
            share = sum((r > row["ranks"][place]) + 0.5 * (r == row["ranks"][place]) for r in others) / len(others)
            assert reward.item() == pytest.approx(row.get("scores", {place: share})[place])
            tokens = tokenizer(given[place], add_special_tokens=False)["input_ids"]
            tokens = [*tokens, tokenizer.eos_token_id][:12]
            sums = sums - advantage * logprobs(model, list(prompt.token_ids), tokens).sum()
            count += len(tokens)
    (sums / count).backward()
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(before - keep.weights[0], gradient, rtol=1e-4, atol=2e-6)
    assert gradient.norm() > 0.1


def logprobs(model: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("columns", "texts", "ratings"),
    [
        ({"chosen": "say a yes", "rejected": "say a no"}, (" yes", " no"), (1.0, 0.0)),
        ({"chosen": "yes", "rejected": "no", "score_chosen": 3, "score_rejected": 3}, ("yes", "no"), (3.0, 3.0)),
        ({"answers": [{"answer": "x", "rank": 2}, {"answer": "y", "rank": 1}]}, ("x", "y"), (0.0, 1.0)),
        ({"response1": "x", "response2": "y", "overall_preference": 2}, ("x", "y"), (0.0, 1.0)),
    ],
)
def test_known_formats_are_read(columns: dict[str, Any], texts: tuple[str], ratings: tuple[float]) -> None:
    assert recorded_answers(Prompt(0, (1,), "say a", columns=columns)) == (texts, ratings)


def test_the_last_message_of_a_conversation_is_the_answer() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    prompt = Prompt(
        0, (1,), "hi", (turns[0],), {"chosen": turns, "rejected": [turns[0], {**turns[1], "content": "no"}]}
    )
    assert recorded_answers(prompt).texts == ("yes", "no")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], r"row 0 .* holds 2 answers, but num_completions=4"),
        ([{"prompt": "a", "completions": ["b"], "ranks": [1]}], r"row 0 .*1 completions with 1 ranks"),
        ([{"prompt": "a", "completions": ["b", "c"], "ranks": [1, "x"]}], r"row 0 .*rows\.jsonl: "),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    rows: list[dict[str, Any]], message: str, tiny_policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, tiny_policy, write(tmp_path, rows * 4))


def test_validation_prompts_without_answers_are_sampled(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    data = PromptDataModule(
        train=PromptSource(str(write(tmp_path, ROWS))), validation=PromptSource(str(prompts_file)), prompts_per_step=4
    )
    trainer = make_trainer(tmp_path, max_steps=1, val_check_interval=1)
    trainer.fit(make_module(tiny_policy, **options()), data)
    assert trainer.callback_metrics["val/length_mean"] > 1
    assert trainer.callback_metrics["val/reward"].isnan()


def test_the_policy_is_evaluated_and_not_the_answers_of_the_file(tiny_policy: Path, tmp_path: Path) -> None:
    """The rows of validation and predict hold answers too, and another reward likes these best of all."""
    source = PromptSource(str(write(tmp_path, ROWS)))
    data = PromptDataModule(train=source, validation=source, predict=source, prompts_per_step=4)
    rewards = [InFile()]
    trainer = make_trainer(tmp_path, max_steps=1, val_check_interval=1)
    trainer.fit(make_module(tiny_policy, **options(rewards=rewards)), data)
    assert trainer.callback_metrics["reward/mean"] == 1  # in training all are the file's
    assert trainer.callback_metrics["val/reward"] == 0
    trainer.predict(make_module(tiny_policy, **options(rewards=rewards)), data)
    (path,) = tmp_path.rglob("predictions.jsonl")
    assert all(json.loads(line)["rewards"]["known"] == [0, 0] for line in path.read_text().splitlines())


class InFile(RewardSource):
    """1 for an answer of the file, cut or whole."""

    name = "known"

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        given = [text.removeprefix(row["prompt"])[:12] for row in ROWS for text in row["completions"]]
        return [float(text in given) for text in completions]


def test_its_sampler_is_checked_and_its_state_kept() -> None:
    engine = RecordedEngine()
    assert isinstance(engine, ChecksSampling | HasState | HasSampler)
    assert RecordedEngine(sampler=Stateful()).state_dict() == {"a": 1}
    with pytest.raises(ValueError, match="no top_k"):
        RecordedEngine(sampler=Stateful()).check_sampling(SamplingConfig(), logprobs=True)


class Stateful(TransformersEngine):
    """A sampler with a state and a wish."""

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def check_sampling(self, sampling: SamplingConfig, *, logprobs: bool) -> None:
        assert not logprobs
        raise ValueError("no top_k")


def test_two_ranks_train_like_one(tiny_policy: Path, tmp_path: Path) -> None:
    rows = write(tmp_path, ROWS * 3)
    cases = [Case(f"{strategy}-recorded", strategy, module=options(num_minibatches=2)) for strategy in ("ddp", "fsdp2")]
    launch([Case("one", module=options(num_minibatches=2), max_steps=4)], tiny_policy, rows, tmp_path, 1)
    launch([Case(c.name, c.strategy, module=c.module, max_steps=4) for c in cases], tiny_policy, rows, tmp_path, 2)
    one = torch.load(tmp_path / "one.pt")
    for case in cases:
        for mine, theirs in zip(torch.load(tmp_path / f"{case.name}.pt")["steps"], one["steps"], strict=True):
            assert mine["texts"] == theirs["texts"]
            assert mine["metrics"]["train/loss"] == pytest.approx(theirs["metrics"]["train/loss"], abs=1e-5)
            assert mine["metrics"]["train/grad_norm"] == pytest.approx(theirs["metrics"]["train/grad_norm"], abs=1e-5)
