"""Reward models on pairs, raters' choices and ranked lists: formats, losses and metrics by hand, and short runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from gopo_lightning.data.comparison_batches import Comparisons, collate_comparisons
from gopo_lightning.data.comparisons import ComparisonRow, load_comparisons
from gopo_lightning.data.preferences import PreferenceDataModule
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.training.reward_model import (
    ComparisonMetrics,
    RewardModelModule,
    bradley_terry,
    centring,
    plackett_luce,
)
from gopo_lightning.training.reward_model.metrics import agreement, calibration_error
from tests.conftest import save_llama
from tests.test_rewards import save_bert

NAN = math.nan
GOOD, BAD = "good good", "bad"


def hh(i: int) -> dict[str, Any]:
    """As Anthropic/hh-rlhf: the whole dialogue, twice, as text."""
    start = f"\n\nHuman: q{i}\n\nAssistant: "
    return {"chosen": start + GOOD, "rejected": start + BAD}


def ultrafeedback(i: int) -> dict[str, Any]:
    """As trl-lib/ultrafeedback_binarized: conversations with scores."""
    question = {"role": "user", "content": f"q{i}"}
    chosen, rejected = ({"role": "assistant", "content": text} for text in (GOOD, BAD))
    scores = {"score_chosen": 7.0 + i % 3, "score_rejected": 6.0}
    return {"chosen": [question, chosen], "rejected": [question, rejected], **scores}


def summaries(i: int) -> dict[str, Any]:
    """As the comparisons of openai/summarize_from_feedback, every other one with the better summary second."""
    info = {"id": str(i), "post": f"p{i}", "title": "t", "subreddit": "r", "site": None, "article": None}
    texts = [{"text": f" {GOOD}", "policy": "sup", "note": None}, {"text": BAD, "policy": "ref", "note": None}]
    flipped = i % 2 == 1
    rest = {"worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 5}}
    return {"info": info, "summaries": texts[::-1] if flipped else texts, "choice": int(flipped), **rest}


def ranked(i: int) -> dict[str, Any]:
    """A list of three."""
    return {"prompt": f"q{i} ", "completions": [BAD, GOOD, "good bad"], "ranks": [3, 1, 2]}


FORMATS = {"hh": hh, "ultrafeedback": ultrafeedback, "summaries": summaries, "ranked": ranked}


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(folder: Path, *rows: dict[str, Any]) -> list[ComparisonRow]:
    return load_comparisons(PromptSource(write(folder, list(rows))))


# --- formats ---------------------------------------------------------------------------------------------------------


def test_pairs_of_texts(tmp_path: Path) -> None:
    plain, with_prompt = {"chosen": "p a", "rejected": "p b"}, {"prompt": "p", "chosen": " a", "rejected": " b"}
    first, second = load(tmp_path, plain, with_prompt)
    assert first.texts == second.texts == ("p a", "p b")
    assert first.wins[0][1] == 1 and first.wins[1][0] == 0 and first.ratings is None and first.margin is None
    soft, margin = load(tmp_path, {**plain, "probability": 0.7}, {**plain, "margin": 2})
    assert soft.wins[0][1] == 0.7 and soft.wins[1][0] == pytest.approx(0.3) and margin.margin == 2


def test_pairs_of_conversations_with_and_without_their_prompt(tmp_path: Path) -> None:
    rows = [ultrafeedback(1), {**ultrafeedback(1), "prompt": [{"role": "user", "content": "q1"}]}]
    turns = {"chosen": [ultrafeedback(1)["chosen"][1]], "rejected": [ultrafeedback(1)["rejected"][1]]}
    rows += [{**rows[1], **turns}, {"prompt": "q1", **turns}]
    loaded = load(tmp_path, *rows)
    assert all(row.texts == loaded[0].texts for row in loaded)
    assert [message["role"] for message in loaded[0].texts[0]] == ["user", "assistant"]  # type: ignore[index]
    assert loaded[0].ratings == (8.0, 6.0) and loaded[0].margin == 2.0
    assert load(tmp_path, {**rows[0], "score_chosen": 6.0})[0].wins[0][1] == 0.5  # a tie counts half for both


def test_raters_of_a_pair_are_averaged_in_whichever_order_they_saw_it(tmp_path: Path) -> None:
    one = summaries(0)
    flipped = {**one, "summaries": one["summaries"][::-1], "choice": 1}  # the same summary again
    other, undecided = {**one, "choice": 1}, {**one, "choice": None}
    rows = load(tmp_path, one, flipped, other, undecided, summaries(2))
    assert len(rows) == 2
    assert rows[0].texts == ("p0\n\nTL;DR: good good", "p0\n\nTL;DR: bad")
    assert rows[0].wins[0][1] == (1 + 1 + 0 + 0.5) / 4


def test_ranked_lists(tmp_path: Path) -> None:
    row = load(tmp_path, {"completions": ["a", "b", "c"], "ranks": [2, 1, 2], "scores": [1, 5, 1]})[0]
    expected = torch.tensor([[NAN, 0, 0.5], [1, NAN, 1], [0.5, 0, NAN]])
    torch.testing.assert_close(torch.tensor(row.wins), expected, equal_nan=True)
    assert row.ratings == (1, 5, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"columns \['text'\], which are no known format"),
        ({"chosen": "a", "rejected": " "}, r"row 0 \(counted from 0\) of .*: a text is empty"),
        ({"chosen": "a", "rejected": "b", "probability": 2}, r"probability=2.0 must lie in \[0, 1\]"),
        ({"chosen": [{"content": "a"}], "rejected": []}, r"column 'chosen' has a message without a role"),
        ({**summaries(0), "choice": 2}, "choice=2 must be 0, 1 or null"),
        ({"completions": ["a"], "ranks": [1]}, "1 completions with 1 ranks"),
        ({"completions": ["a", "b"], "ranks": [1, 2], "scores": [1]}, "1 scores for 2 completions"),
    ],
)
def test_malformed_rows_are_refused_with_their_number(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, row)


def test_a_batch_compares_within_rows_only() -> None:
    pair = ComparisonRow(("a", "b"), ((NAN, 1.0), (0.0, NAN)), (3.0, 1.0), margin=2.0)
    triple = ComparisonRow(("c", "d", "e"), ((NAN, 0.0, 0.0), (1.0, NAN, 0.0), (1.0, 1.0, NAN)), (1.0, 2.0, 4.0))
    batch = collate_comparisons([(pair, 0.0), (triple, 0.5)])
    assert batch.texts == ("a", "b", "c", "d", "e") and batch.rankings == ((0, 1), (4, 3, 2))
    assert torch.equal(
        batch.wins_NN.isnan(), ~torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool() | torch.eye(5).bool()
    )
    assert batch.margins_NN is not None and batch.ratings_N is not None
    assert batch.margins_NN[:2, :2].tolist() == [[0, 2], [-2, 0]] and batch.margins_NN[4, 2] == 3
    tied = ComparisonRow(("f", "g"), ((NAN, 0.5), (0.5, NAN)))
    mixed = collate_comparisons([(pair, 0.0), (tied, 0.0)])
    assert mixed.rankings is None and mixed.ratings_N is None


# --- maths -----------------------------------------------------------------------------------------------------------


def test_a_margin_has_to_be_led_by() -> None:
    wins_NN = torch.tensor([[NAN, 1.0], [0.0, NAN]])
    margins_NN = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    loss = bradley_terry(torch.tensor([2 + math.log(3), 0.0]), wins_NN, margins_NN)
    assert loss.item() == pytest.approx(math.log(4 / 3))


def test_soft_labels_are_met_by_their_log_odds() -> None:
    """Three of four raters: the loss is least where σ(s_i − s_j) = ¾."""
    wins_NN = torch.tensor([[NAN, 0.75], [0.25, NAN]])
    scores_N = torch.tensor([math.log(3), 0.0], requires_grad=True)
    bradley_terry(scores_N, wins_NN).backward()
    assert scores_N.grad is not None
    torch.testing.assert_close(scores_N.grad, torch.zeros(2), atol=1e-7, rtol=0)


def test_plackett_luce_by_hand() -> None:
    """exp(s) = 1, 2, 3: P(2, 1, 0) = 3/6 · 2/3."""
    scores_N = torch.tensor([1.0, 2.0, 3.0]).log()
    assert plackett_luce(scores_N, [(2, 1, 0)]).item() == pytest.approx(-math.log(1 / 3))
    assert plackett_luce(scores_N, [(2, 1, 0), (0, 1)]).item() == pytest.approx((math.log(3) + math.log(3)) / 2)
    pair = bradley_terry(scores_N[:2], torch.tensor([[NAN, 0.0], [1.0, NAN]]))
    assert plackett_luce(scores_N, [(1, 0)]).item() == pytest.approx(pair.item())
    large_N = torch.tensor([1000.0, -1000.0], requires_grad=True)
    plackett_luce(large_N, [(1, 0)]).backward()
    assert large_N.grad is not None and large_N.grad.tolist() == [1.0, -1.0]


def test_centring_by_hand() -> None:
    wins_NN = torch.tensor([[NAN, 1.0, NAN], [0.0, NAN, NAN], [NAN, NAN, NAN]])
    assert centring(torch.tensor([3.0, -1.0, 100.0]), wins_NN).item() == 4
    assert centring(torch.ones(1), torch.full((1, 1), NAN)).item() == 0


def test_agreement_and_calibration_by_hand() -> None:
    differences_Q = torch.tensor([1.0, -1.0, 0.0, 5.0])
    assert agreement(differences_Q, torch.tensor([1.0, 0.7, 1.0, 0.5])).item() == pytest.approx(1.5 / 3)
    logit = math.log(4)  # σ = 0.8, twice right, once wrong: |0.8 − 2/3|
    preferences_Q = torch.tensor([1.0, 0.0, 0.0])
    error = calibration_error(torch.tensor([logit, -logit, logit]), preferences_Q)
    assert error.item() == pytest.approx(0.8 - 2 / 3, abs=1e-6)
    halves = calibration_error(torch.tensor([logit, 0.001]), torch.tensor([1.0, 0.0]))  # two bins
    assert halves.item() == pytest.approx(((1 - 0.8) + 0.5) / 2, abs=1e-3)


def test_metrics_of_pairs_count_compared_pairs_by_their_gap() -> None:
    metric = ComparisonMetrics([2.0])
    wide = ComparisonRow(("a", "b"), ((NAN, 1.0), (0.0, NAN)), (5.0, 1.0))
    near = ComparisonRow(("c", "d"), ((NAN, 1.0), (0.0, NAN)), (90.0, 89.5))
    metric.update(
        torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([4, 3, 2, 1]), collate_comparisons([(wide, 0), (near, 0)])
    )
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values["pair_accuracy_all"] == 0.5 and values["pair_accuracy"] == 1.0
    assert values["pair_accuracy_gap_0-2"] == 0 and values["pair_accuracy_gap_2-inf"] == 1
    assert values["loss"] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2)


def test_padding_counts_in_no_metric() -> None:
    """A row that was repeated to fill a rank up; even a batch of nothing else."""
    first = ComparisonRow(("a", "b"), ((NAN, 1.0), (0.0, NAN)), (5.0, 1.0))
    second = ComparisonRow(("c", "d"), ((NAN, 1.0), (0.0, NAN)), (3.0, 1.0))
    rows = [(first, 0.3), (second, 0.4)]
    scores_N, lengths_N = torch.tensor([1.0, 0.0, 0.0, 1.0, 7.0, 9.0]), torch.tensor([4, 3, 2, 1, 8, 9])
    expected, actual = ComparisonMetrics(), ComparisonMetrics()
    expected.update(scores_N[:4], lengths_N[:4], collate_comparisons(rows))
    padded = collate_comparisons([*rows, (first, NAN)])
    assert padded.num_padding == 2
    actual.update(scores_N, lengths_N, padded)
    actual.update(scores_N[4:], lengths_N[4:], collate_comparisons([(first, NAN)]))
    assert actual.compute() == expected.compute()


# --- training --------------------------------------------------------------------------------------------------------


def train(source: str, model: Path, steps: int = 25, **options: Any) -> tuple[RewardModelModule, dict[str, float]]:
    torch.manual_seed(0)
    module = RewardModelModule(
        str(model), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3), warmup_steps=2, **options
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, PreferenceDataModule(source, batch_size=8, eval_batch_size=4, validation_fraction=0.2))
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_with_one_change(name: str, tmp_path: Path) -> None:
    """The model is the same, the source is another; conversations are read with its template."""
    source = write(tmp_path, [FORMATS[name](i) for i in range(40)])
    _, logged = train(source, save_bert(tmp_path / "model", template=name == "ultrafeedback"))
    assert logged["val/pair_accuracy_all"] == 1.0
    assert logged["val/loss"] < 0.3
    assert {"val/calibration_error", "val/length_bias"} <= set(logged)
    assert ("val/kendall" in logged) == (name == "ultrafeedback")


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "plackett_luce"},
        {"centring_coef": 0.1},
        {"lora": {"r": 8, "target_modules": ["query", "value", "dense"]}},
    ],
)
def test_variants_learn(options: dict[str, Any], tmp_path: Path) -> None:
    source = write(tmp_path, [ranked(i) for i in range(40)])
    module, logged = train(source, save_bert(tmp_path / "model"), 40, export_dir=str(tmp_path / "export"), **options)
    assert logged["val/pair_accuracy_all"] > 0.9
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "export")(GOOD, return_tensors="pt")
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits[0], module((GOOD,)), atol=1e-5, rtol=1e-5)
    scores = pipeline("text-classification", str(tmp_path / "export"), function_to_apply="none")([GOOD, BAD])
    assert scores[0]["score"] > scores[1]["score"]


def test_a_causal_lm_becomes_a_reward_model(tmp_path: Path) -> None:
    """Its head is new, and its score is read off the last token, whatever stands beside it in the batch."""
    save_llama(tmp_path / "model", max_position_embeddings=64)
    source = write(tmp_path, [ultrafeedback(i) for i in range(40)])
    module, logged = train(source, tmp_path / "model", lora={"r": 8, "target_modules": ["q_proj", "v_proj"]})
    assert logged["val/pair_accuracy_all"] == 1.0
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(("ab", "abcdefgh"))[0], module(("ab",))[0], atol=1e-5, rtol=1e-5)


def test_options_that_the_data_cannot_serve_are_refused(tmp_path: Path) -> None:
    module = RewardModelModule(str(save_bert(tmp_path)), objective="plackett_luce")
    batch = Comparisons(("a", "b"), torch.tensor([[NAN, 0.5], [0.5, NAN]]), group_sizes=(2,))
    with pytest.raises(ValueError, match="plackett_luce needs ranked lists without ties"):
        module._loss(torch.zeros(2), batch)
    module = RewardModelModule(str(tmp_path), margin_scale=1.0)
    with pytest.raises(ValueError, match=r"margin_scale=1.0, but the data have no margins"):
        module._loss(torch.zeros(2), batch)
    with pytest.raises(ValueError, match="margins belong to pairs"):
        RewardModelModule(str(tmp_path), margin_scale=1.0, objective="plackett_luce")
    with pytest.raises(ValueError, match="objective='elo' is unknown"):
        RewardModelModule(str(tmp_path), objective="elo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gap_bounds=\[2, 1\]: they must ascend"):
        RewardModelModule(str(tmp_path), gap_bounds=[2, 1])
    with pytest.raises(ValueError, match="mixes texts and conversations"):
        chat = save_bert(tmp_path / "chat", template=True)
        RewardModelModule(str(chat))(("a", ({"role": "user", "content": "b"},)))


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    source = write(tmp_path, [hh(i) for i in range(20)])
    data = PreferenceDataModule(source, batch_size=4, validation_fraction=0.25)
    data.setup("fit")
    assert len(data.train) == 15 and len(data.validation) == 5
    assert not {row.texts for row in data.train} & {row.texts for row in data.validation}  # type: ignore[union-attr]
    both = PreferenceDataModule(source, validation_source=source, limit=6)
    both.setup("fit")
    assert len(both.train) == 6 and len(both.validation) == 20
    with pytest.raises(ValueError, match="batch_size=64, but a rank has only 6 comparisons"):
        both.train_dataloader()
