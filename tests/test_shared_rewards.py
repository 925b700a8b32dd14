"""A reward model forwards a group's prompt once: the same scores, for fewer tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gopo_lightning.rewards import RewardModelComparator, SequenceClassifierReward
from gopo_lightning.rewards import classifier as classifiers
from gopo_lightning.rewards import shared_scoring as scoring
from gopo_lightning.types import Prompt
from tests.architectures import BUILDERS
from tests.conftest import byte_tokenizer
from tests.test_rewards import save_bert
from tests.test_shared_scores import classifier

PROMPTS = [Prompt(3, (1,), "a prompt "), Prompt(8, (1,), "b"), Prompt(5, (1,), "a prompt that is long ")]
ENDINGS = ["", "good", "good film", "g", "good", "a bad one", "ok"]
"""Unequal lengths; one is empty, two are the same, one begins others."""


def batch() -> tuple[list[Prompt], list[str]]:
    """Groups of 7, 3 and 1, as they come in a rollout."""
    groups = [(prompt, ENDINGS[-count:]) for prompt, count in zip(PROMPTS, (7, 3, 1), strict=True)]
    return [prompt for prompt, texts in groups for _ in texts], [text for _, texts in groups for text in texts]


@pytest.fixture(scope="module", params=[name for name in BUILDERS if name != "gemma2"])  # sdpa drops its soft cap
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    classifier(request.param).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def source(folder: Path, mode: str, **options: Any) -> SequenceClassifierReward:
    reward = SequenceClassifierReward(str(folder), prefix_sharing=mode, **{"max_length": 60, **options})  # type: ignore[arg-type]
    reward.setup(torch.device("cpu"))
    return reward


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Texts and tokens of each shared forward."""
    seen: list[tuple[int, int]] = []
    original = classifiers.shared_scores

    def shared_scores(model: Any, packed: scoring.PackedTexts) -> Tensor:
        seen.append((len(packed.last_N), packed.tokens_1S.numel()))
        return original(model, packed)

    monkeypatch.setattr(classifiers, "shared_scores", shared_scores)
    return seen


@pytest.mark.parametrize("micro_batch_size", [2, 3, 32])
def test_scores_are_the_same(saved: Path, micro_batch_size: int, forwarded: list[tuple[int, int]]) -> None:
    plain = source(saved, "never", template="plain", micro_batch_size=micro_batch_size)(*batch())
    assert not forwarded
    shared = source(saved, "always", template="plain", micro_batch_size=micro_batch_size)(*batch())
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)
    assert plain.unique().numel() == 10  # of 11, two are the same text
    assert max(texts for texts, _ in forwarded) <= micro_batch_size
    assert sum(texts for texts, _ in forwarded) == 10
    if micro_batch_size == 32:
        endings = sum(len(text) for text in ENDINGS if text) - len("good")
        assert forwarded == [(10, 9 + endings + 1 + len("gooda bad oneok") + 22 + 2)]


@pytest.mark.parametrize("truncation", ["left", "right"])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_chat_templates_and_truncated_rows(tmp_path: Path, template: str, truncation: str) -> None:
    classifier("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    options: dict[str, Any] = {"template": template, "truncation": truncation, "max_length": 20}
    plain, shared = (source(tmp_path, mode, **options)(*batch()) for mode in ("never", "always"))
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)


def test_a_group_that_is_compared_in_pieces_and_a_comparator(tmp_path: Path) -> None:
    """Rows of one prompt need not be neighbours; a comparator asks for all texts that it compares."""
    classifier("qwen3").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    plain, shared = source(tmp_path, "never"), source(tmp_path, "auto")
    prompts, texts = batch()
    order = [0, 9, 3, 10, 7, 1, 2, 8, 4, 6, 5]
    rows = [prompts[n] for n in order], [texts[n] for n in order]
    torch.testing.assert_close(shared(*rows), plain(*rows), atol=1e-5, rtol=1e-5)
    groups = [ENDINGS, ENDINGS[::-1], ENDINGS]
    wins, expected = (RewardModelComparator(reward)(PROMPTS, groups) for reward in (shared, plain))
    torch.testing.assert_close(wins, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_bfloat16_of_large_scores_may_share(tmp_path: Path, forwarded: list[tuple[int, int]]) -> None:
    """Scores of ±30 differ by tenths in bfloat16, whatever is shared."""
    model = classifier("llama")
    model.score.weight.data *= 30
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    scores = source(tmp_path, "auto", dtype="bfloat16")(*batch())
    assert forwarded and scores.abs().mean() > 20


def test_encoders_keep_their_path_and_say_so_once(
    tmp_path: Path, forwarded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(scoring, "rank_zero_info", said.append)
    folder = save_bert(tmp_path / "bert")
    reward = source(folder, "auto")
    for _ in range(2):
        reward(*batch())
    assert not forwarded
    assert len(said) == 1 and "BertForSequenceClassification is not causal" in said[0]
    with pytest.raises(ValueError, match="prefix_sharing=always, but .* is not causal.* Use auto or never"):
        source(folder, "always")(*batch())


def test_single_completions_decide_nothing(tmp_path: Path, forwarded: list[tuple[int, int]]) -> None:
    classifier("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    reward = source(tmp_path, "auto")
    reward(PROMPTS, ["a", "b", "c"])
    assert not forwarded
    reward(*batch())
    assert forwarded
    reward(PROMPTS, ["a", "b", "c"])
    assert len(forwarded) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_sharing": "sometimes"}, "prefix_sharing='sometimes' is unknown"),
        ({"prefix_sharing": "always", "micro_batch_size": 1}, "one completion in a pass shares nothing"),
        ({"prefix_sharing": "always", "output_field": "score"}, "only logits are read from a shared row"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassifierReward("anything", **options)
