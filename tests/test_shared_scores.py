"""Sharing what a pair or list begins with changes nothing but the cost: scores, losses and gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BatchEncoding, PreTrainedModel

from gopo_lightning.data.preferences import PreferenceDataModule
from gopo_lightning.policy.shared_prefix import PackedGroups
from gopo_lightning.rewards import shared_scoring as scoring
from gopo_lightning.rewards.shared_scoring import Scorer, pack, separate_scores, shared_scores
from gopo_lightning.training.reward_model import RewardModelModule, bradley_terry
from tests.architectures import BUILDERS, VOCAB, build, gradients, relative_difference
from tests.conftest import byte_tokenizer
from tests.test_rewards import save_bert

PAD = 258


def classifier(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny random classifier of one label over bytes, in train mode."""
    config = build(name).config
    config.update({"num_labels": 1, "vocab_size": 259, "pad_token_id": PAD, **changes})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=config._attn_implementation)
    nn.init.normal_(model.score.weight)
    return model.train()


def lists(sizes: tuple[int, ...] = (2, 3, 2, 1, 4)) -> list[list[int]]:
    """Texts of lists of these sizes: prefixes of 9, 0, 1, … tokens, then endings of 1 to 7."""
    generator = torch.Generator().manual_seed(1)
    texts = []
    for p, size in enumerate(sizes):
        prefix = torch.randint(VOCAB, ([9, 0, 1, 4, 6][p % 5],), generator=generator).tolist()
        for i in range(size):
            ending = torch.randint(VOCAB, ((3 * i + p) % 7 + 1,), generator=generator).tolist()
            texts.append([*prefix, 100 + i, *ending])  # the endings differ from their first token on
    return texts


def encoded(texts: list[list[int]]) -> BatchEncoding:
    return BatchEncoding({"input_ids": texts, "attention_mask": [[1] * len(ids) for ids in texts]})


def both_forms(model: nn.Module, texts: list[list[int]], sizes: tuple[int, ...]) -> list[tuple[Tensor, dict]]:
    """Scores and gradients of the Bradley-Terry loss, apart and shared."""
    tokenizer, results = byte_tokenizer(), []
    wins_NN = torch.block_diag(*(torch.rand(n, n, generator=torch.Generator().manual_seed(n)) for n in sizes))
    wins_NN[wins_NN == 0] = torch.nan
    for share in (False, True):
        if share:
            scores_N = shared_scores(model, pack(texts, sizes, PAD))
        else:
            scores_N = separate_scores(model, tokenizer, encoded(texts))
        bradley_terry(scores_N, wins_NN).backward()
        results.append((scores_N.detach(), gradients(model)))
    return results


# --- layout ----------------------------------------------------------------------------------------------------------


def test_packed_pairs_by_hand() -> None:
    packed = pack([[5, 6, 7], [5, 6, 8, 9], [1, PAD], [1, PAD, PAD], [1, 7], [1, PAD]], (2, 2, 2), PAD)
    assert packed.tokens_1S.tolist() == [[5, 6, 7, 8, 9, 1, PAD, PAD, 1, 7, PAD]]
    assert packed.positions_1S.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 0, 1, 1]]
    assert packed.lengths == [[2, 1, 2], [2, 0, 1], [1, 1, 1]]
    assert packed.last_N.tolist() == [2, 4, 5, 5, 9, 8]  # padding within a text is not read, as in transformers


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["full", "lora"])
@pytest.mark.parametrize("name", BUILDERS)
def test_parity_in_float32(name: str, form: str) -> None:
    """Pairs and lists of other lengths in one batch."""
    model: nn.Module = classifier(name)
    if form == "lora":
        targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "v_proj", "up_proj"]
        options = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(model, options).train()
    sizes = (2, 3, 2, 1, 4)
    (apart, apart_gradient), (shared, shared_gradient) = both_forms(model, lists(sizes), sizes)
    torch.testing.assert_close(shared, apart, atol=2e-5, rtol=1e-5)
    assert relative_difference(shared_gradient, apart_gradient) < 1e-5
    assert any("score" in key for key in shared_gradient)  # the head is trained too


def test_parity_in_bf16_mixed() -> None:
    """As near to float32 as the separate form."""
    model, sizes = classifier("llama"), (2, 3, 2, 1, 4)
    exact = both_forms(model, lists(sizes), sizes)[0][1]
    with torch.autocast("cpu", torch.bfloat16):
        apart, shared = (relative_difference(g, exact) for _, g in both_forms(model, lists(sizes), sizes))
    assert 1e-4 < shared < 2 * apart


def test_parity_where_texts_are_equal_or_one_begins_the_other() -> None:
    model, sizes = classifier("llama"), (2, 3, 1)
    texts = [[5, 6, 7], [5, 6, 7], [5, 6], [5, 6, 8], [5, 6, 8, 9], [4]]
    (apart, apart_gradient), (shared, shared_gradient) = both_forms(model, texts, sizes)
    torch.testing.assert_close(shared, apart, atol=2e-5, rtol=1e-5)
    assert relative_difference(shared_gradient, apart_gradient) < 1e-5


def test_other_texts_and_rows_do_not_matter() -> None:
    model, sizes = classifier("llama"), (2, 3, 2, 1, 4)
    texts = lists(sizes)
    before = shared_scores(model, pack(texts, sizes, PAD))
    texts[1] = [*texts[1], 7, 7, 7]
    after = shared_scores(model, pack(texts, sizes, PAD))
    others = torch.arange(len(texts)) != 1
    torch.testing.assert_close(after[others], before[others], atol=2e-5, rtol=1e-5)
    assert (after[1] - before[1]).abs() > 1e-3


# --- when ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the forms as they are computed."""
    seen: list[str] = []
    for name in ("shared_scores", "separate_scores"):
        function = getattr(scoring, name)
        monkeypatch.setattr(scoring, name, lambda *a, n=name, f=function: (seen.append(n.split("_")[0]), f(*a))[1])
    return seen


TO_PAD = ["separate"] * 2
"""Once: the shortest text alone, and beside the longest."""


def test_auto_checks_once_and_shares_what_saves_tokens(forms: list[str]) -> None:
    model, sizes = classifier("llama"), (2, 3, 2, 1, 4)
    scorer = Scorer(byte_tokenizer(), "auto")
    expected = separate_scores(model, byte_tokenizer(), encoded(lists(sizes)))
    torch.testing.assert_close(scorer(model, encoded(lists(sizes)), sizes), expected, atol=2e-5, rtol=1e-5)
    assert forms == ["separate", "shared", "shared"]  # two for the check
    assert all(p.grad is None for p in model.parameters()) and model.training
    forms.clear()
    scorer(model, encoded(lists(sizes)), sizes)
    scorer(model, encoded(lists(sizes)), None)
    scorer(model, encoded([[1, 2], [3, 4], [5, 6], [7, 8]]), (2, 2))  # nothing in common: 8 tokens either way
    assert forms == ["shared", *TO_PAD, "separate", "separate"]


def test_auto_shares_nothing_where_the_forms_differ(
    forms: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr(scoring, "rank_zero_info", said.append)
    model, sizes = classifier("llama"), (2, 3, 2, 1, 4)
    right = PackedGroups.pieces
    monkeypatch.setattr(
        PackedGroups, "pieces", lambda *args: right(*args)._replace(groups=[])
    )  # texts do not see what they share
    scorer = Scorer(byte_tokenizer(), "auto")
    for _ in range(2):
        scorer(model, encoded(lists(sizes)), sizes)
    assert forms == ["separate", "shared", *TO_PAD, "separate", "separate"]
    assert len(said) == 1 and "scores differ by" in said[0]


def test_a_model_that_cannot_share_says_why() -> None:
    model, sizes = classifier("gpt2", attn_pdrop=0.1), (2, 3)
    with pytest.raises(ValueError, match="prefix_sharing=always, but .* cannot: attn_pdrop is 0.1.* Use auto or never"):
        Scorer(byte_tokenizer(), "always")(model, encoded(lists(sizes)), sizes)


def write_pairs(folder: Path) -> str:
    rows = [{"prompt": f"question {i}? ", "chosen": "good good", "rejected": "bad"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "pairs.jsonl")


def test_encoders_fall_back_and_causal_models_share(
    tmp_path: Path, forms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same data and config; under `always` the encoder is refused."""
    said: list[str] = []
    monkeypatch.setattr(scoring, "rank_zero_info", said.append)
    data = PreferenceDataModule(write_pairs(tmp_path), batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    bert = RewardModelModule(str(save_bert(tmp_path / "bert")))
    bert(batch.texts, batch.group_sizes)
    assert forms == [*TO_PAD, "separate"] and "BertForSequenceClassification is not causal" in said[0]
    classifier("qwen3").save_pretrained(tmp_path / "qwen3")
    byte_tokenizer().save_pretrained(tmp_path / "qwen3")
    qwen = RewardModelModule(str(tmp_path / "qwen3"), max_length=64)
    forms.clear()
    qwen(batch.texts, batch.group_sizes)
    assert forms[-1] == "shared"
    always = RewardModelModule(str(tmp_path / "bert"), prefix_sharing="always")
    with pytest.raises(ValueError, match="is not causal"):
        always(batch.texts, batch.group_sizes)
    with pytest.raises(ValueError, match="the data are no pairs or lists"):
        always(batch.texts)
    with pytest.raises(ValueError, match="prefix_sharing='sometimes' is unknown"):
        RewardModelModule(str(tmp_path / "bert"), prefix_sharing="sometimes")  # type: ignore[arg-type]


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_a_training_step_is_the_same_shared_and_apart(truncation: Any, tmp_path: Path) -> None:
    """Through tokenizer and truncation: loss and gradients of a batch from a file."""
    classifier("qwen2").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = PreferenceDataModule(write_pairs(tmp_path), batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    losses, found = [], []
    for mode in ("never", "always"):
        module = RewardModelModule(
            str(tmp_path / "model"), prefix_sharing=mode, max_length=18, truncation=truncation, centring_coef=0.1
        )
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        loss = module.training_step(batch, 0)
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(module.model))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert relative_difference(found[1], found[0]) < 1e-5
