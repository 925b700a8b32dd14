"""Reward sources: the protocol, functions, sequence classifiers, combinations."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from gopo_lightning.objectives import advantages
from gopo_lightning.rewards import (
    FunctionComparator,
    FunctionReward,
    SequenceClassifierReward,
    SourceConfigError,
    against_reference,
    combine,
    score,
    score_groups,
)
from gopo_lightning.types import Prompt
from tests.conftest import byte_tokenizer

CPU = torch.device("cpu")


def prompt(text: str, index: int = 0, **columns: Any) -> Prompt:
    return Prompt(index=index, token_ids=(1,), text=text, columns=columns)


PROMPTS = [prompt("say ", 0), prompt("shout ", 7), prompt("hum ", 9)]
TEXTS = ["a", "a much longer completion", "abc"]


# --- score -----------------------------------------------------------------------------------------------------------


def lengths(completions: list[str]) -> list[float | None]:
    """None for "abc"."""
    return [None if c == "abc" else float(len(c)) for c in completions]


def fails_on_shouting(prompts: list[str], completions: list[str]) -> list[float]:
    if "shout " in prompts:
        raise KeyError("too loud")
    return [0.0] * len(prompts)


def fails_on_batches(completions: list[str]) -> list[float]:
    if len(completions) > 1:
        raise RuntimeError("one at a time")
    return [0.0]


def test_score_stacks_the_sources_and_turns_none_into_nan() -> None:
    sources = [FunctionReward(lengths), FunctionReward(lambda completions: np.arange(3.0), name="numpy")]
    rewards_NK = score(sources, PROMPTS, TEXTS)
    assert rewards_NK.dtype == torch.float64
    torch.testing.assert_close(rewards_NK, torch.tensor([[1.0, 0], [24, 1], [math.nan, 2]]).double(), equal_nan=True)


@pytest.mark.parametrize("returned", [[1.0, 2.0], torch.zeros(3, 1), 1.0, "abc", {"a": 1, "b": 2, "c": 3}])
def test_score_refuses_anything_but_n_numbers(returned: Any) -> None:
    with pytest.raises(RuntimeError, match=r"reward source 'bad' raised ValueError: returned .*"):
        score([FunctionReward(lambda completions: returned, name="bad")], PROMPTS, TEXTS)


NANOSECONDS = [1.7e9 + i for i in range(4)]
NEAR_ONE = [1 + i * 1e-9 for i in range(4)]


@pytest.mark.parametrize("returned", [NANOSECONDS, np.array(NEAR_ONE), torch.tensor(NEAR_ONE, dtype=torch.float64)])
@pytest.mark.parametrize("name", ["weighted_sum", "borda", "lexicographic", "z_score"])
@pytest.mark.parametrize("num_sources", [1, 2])
def test_scores_keep_their_order_to_the_last_bit_of_a_float64(returned: Any, name: str, num_sources: int) -> None:
    """float32 would make all four of them equal."""
    sources = [FunctionReward(lambda completions: returned, name=f"r{k}") for k in range(num_sources)]
    scores = score_groups(sources, PROMPTS[:1], [["a", "b", "c", "d"]])
    assert scores.rewards_PGK.dtype == torch.float64
    combination = combine.get_combination(name, num_sources=num_sources)
    rewards_PG = combination(scores.rewards_PGK)
    assert advantages.ordinal(rewards_PG)[0].tolist() == pytest.approx([-2, -2 / 3, 2 / 3, 2])
    standing = against_reference(
        sources, combination, PROMPTS[:1], [["b", "c"]], scores.rewards_PGK[:, 1:3], [["a"]], scores.rewards_PGK[:, :1]
    )
    assert standing.win_rate_P.item() == 1 and standing.win_rate_PK.tolist() == [[1.0] * num_sources]


def test_score_names_the_source_and_the_first_offending_prompt() -> None:
    with pytest.raises(RuntimeError, match=r"'fails_on_shouting' raised KeyError") as info:
        score([FunctionReward(fails_on_shouting)], PROMPTS, TEXTS)
    assert "First offending prompt: row 7: 'shout ', completion: 'a much longer completion'" in str(info.value)
    assert isinstance(info.value.__cause__, KeyError)


def test_score_says_when_no_row_fails_by_itself() -> None:
    with pytest.raises(RuntimeError, match=r"No row was found that raises by itself; the first prompt: row 0: 'say '"):
        score([FunctionReward(fails_on_batches)], PROMPTS, TEXTS)


# --- functions -------------------------------------------------------------------------------------------------------


def matches(completions: list[str], answer: list[str], bonus: float = 1.0) -> list[float]:
    return [bonus * (c == a) for c, a in zip(completions, answer, strict=True)]


def everything(**kwargs: Any) -> list[float]:
    assert sorted(kwargs) == ["answer", "completions", "level", "prompts"]
    return [float(level) for level in kwargs["level"]]


def test_function_gets_the_columns_and_options_that_it_names() -> None:
    rows = [prompt("q", answer="a", level=3), prompt("q", answer="b", level=4)]
    source = FunctionReward("tests.test_rewards.matches", options={"bonus": 5.0})
    assert source.name == "matches"
    assert source(rows, ["a", "a"]) == [5.0, 0.0]
    assert FunctionReward(everything, name="all")(rows, ["a", "a"]) == [3.0, 4.0]


def test_function_without_its_column_lists_the_columns() -> None:
    source = FunctionReward(matches)
    rows = [prompt("q", 4, answer="a", level=1), prompt("q", 5, level=2), prompt("q", 6)]
    message = r"'matches' requires the columns \['answer'\], but row 5 .* of the dataset has only \['level'\].*\[5, 6\]"
    with pytest.raises(SourceConfigError, match=message):
        score([source], rows, ["a", "a", "a"])


def test_one_row_without_an_optional_column_does_not_hide_it() -> None:
    """In whichever batch the row is, the others keep their value."""
    seen: list[list[str | None] | str] = []

    def optional(completions: list[str], gold: Any = "default") -> list[float]:
        seen.append(gold)
        return [0.0] * len(completions)

    source = FunctionReward(optional)
    with_gold = [prompt("q", n, gold="yes") for n in range(2)]
    source([*with_gold, prompt("q", 2)], ["a"] * 3)
    source([prompt("q", 2)], ["a"])
    assert seen == [["yes", "yes", None], "default"]
    comparator = FunctionComparator(lambda first, gold: [0.5 if g == "yes" else 1.0 for g in gold], name="c")
    assert comparator.compare(with_gold, ["a", "b"], ["b", "a"]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("brevity", "is no dotted path"),
        ("no_such_module.f", "cannot load 'no_such_module.f'"),
        ("math.no_such_function", "cannot load 'math.no_such_function'"),
        ("math.pi", "'math.pi' is a float, not a callable"),
    ],
)
def test_bad_paths_are_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*dotted path"):
        FunctionReward(path)


def test_bad_signatures_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="takes no argument `completions`"):
        FunctionReward(lambda prompts: prompts)
    with pytest.raises(ValueError, match=r"does not take the options \['bonsu'\]; it takes .*'bonus'"):
        FunctionReward(matches, options={"bonsu": 1})
    with pytest.raises(ValueError, match=r"options \['prompts'\] are filled by the trainer"):
        FunctionReward(everything, options={"prompts": []})


# --- sequence classifiers --------------------------------------------------------------------------------------------


def save_bert(folder: Path, num_labels: int = 1, template: bool = False) -> Path:
    """A random two-layer BERT over bytes, at most 64 tokens."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    if not template:
        tokenizer.chat_template = None
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=num_labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def chat_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("chat_bert"), template=True)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder classifier whose config names another pad token than its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=3,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, **options: Any) -> SequenceClassifierReward:
    source = SequenceClassifierReward(str(folder), **options)
    source.setup(CPU)
    return source


def test_an_empty_completion_has_no_score(llama: Path) -> None:
    """Where there is nothing to read; the others are scored as ever, also in a batch of nothing but empty ones."""
    source = loaded(llama, include_prompt=False, micro_batch_size=2)
    texts = ["", "abc", ""]
    scores_N = source(PROMPTS, texts)
    assert scores_N.isnan().tolist() == [True, False, True]
    torch.testing.assert_close(scores_N[1:2], source(PROMPTS[:1], ["abc"]))
    assert source(PROMPTS, ["", "", ""]).isnan().all()
    assert not loaded(llama)(PROMPTS, texts).isnan().any()  # the prompt is there


def one_by_one(folder: Path, texts: Sequence[str]) -> Tensor:
    """What plain transformers gives each text alone."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        return torch.stack([model(**tokenizer(t, return_tensors="pt")).logits[0, 0] for t in texts])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 32])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_scores_are_those_of_each_text_alone_in_order(
    family: str, micro_batch_size: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    scores_N = loaded(folder, micro_batch_size=micro_batch_size)(PROMPTS, TEXTS)
    expected_N = one_by_one(folder, [p.text + c for p, c in zip(PROMPTS, TEXTS, strict=True)])
    torch.testing.assert_close(scores_N, expected_N, atol=1e-5, rtol=1e-5)
    assert expected_N.unique().numel() == 3


def test_micro_batches_are_sorted_by_length(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, widths = loaded(bert, micro_batch_size=2), []
    forward = source._apart
    monkeypatch.setattr(
        source, "_apart", lambda e, sizes: widths.append(max(map(len, e["input_ids"]))) or forward(e, sizes)
    )
    source([prompt("")] * 4, ["a" * 20, "b", "c" * 19, "dd"])
    assert widths[-2:] == [2, 20]  # before them, once, what tells whether the shortest may stand beside the longest


def test_equal_texts_are_scored_once_and_tie(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, rows = loaded(bert, micro_batch_size=2), []
    forward = source._apart
    monkeypatch.setattr(source, "_apart", lambda e, sizes: rows.append(len(e["input_ids"])) or forward(e, sizes))
    source([prompt("say ")] * 2, ["a", "bb"])  # the first call finds out how to pad
    rows.clear()
    scores_N = source([prompt("say ")] * 6, ["a", "bb", "a", "a", "ccc", "bb"])
    assert sum(rows) == 3
    assert scores_N[0] == scores_N[2] == scores_N[3]
    assert scores_N[1] == scores_N[5]
    torch.testing.assert_close(scores_N, one_by_one(bert, [f"say {c}" for c in ("a", "bb", "a", "a", "ccc", "bb")]))


def test_a_reference_that_equals_a_completion_ties_with_it() -> None:
    """Though a model, which saw it in another batch, gave it another last digit."""
    near = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    source = FunctionReward(lambda completions: [0.0] * len(completions), name="model")
    standing = against_reference(
        [source], combine.weighted_sum, [prompt("p")], [["a", "b"]], near, [["b", "a"]], near.flip(1) + 1e-7
    )
    assert standing.win_rate_P.tolist() == [0.5]
    assert standing.win_rate_PK.tolist() == [[0.5]]


def test_the_model_is_frozen_and_in_eval_mode(bert: Path) -> None:
    source = loaded(bert)
    assert source.model is not None
    assert not any(parameter.requires_grad for parameter in source.model.parameters())
    assert not source.model.training
    assert not source(PROMPTS, TEXTS).requires_grad


def test_bfloat16_weights_give_float32_scores_without_false_ties(bert: Path) -> None:
    source = loaded(bert, dtype="bfloat16")
    assert source.model is not None
    assert next(source.model.parameters()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whatever the caller runs under
        scores_N = source(PROMPTS, TEXTS)
    assert scores_N.dtype == torch.float32
    assert (scores_N != scores_N.bfloat16().float()).any()
    torch.testing.assert_close(scores_N, loaded(bert)(PROMPTS, TEXTS), atol=0.1, rtol=0.1)


def test_chat_models_read_their_own_template(chat_bert: Path) -> None:
    source = loaded(chat_bert)
    messages = ({"role": "system", "content": "x"}, {"role": "user", "content": "hi"})
    chat = Prompt(index=0, token_ids=(1,), text="hi", messages=messages)
    texts, special_tokens = source.render([chat, prompt("hi")], ["yo", "yo"])
    assert texts == ["<system>x<eos><user>hi<eos><assistant>yo<eos>", "<user>hi<eos><assistant>yo<eos>"]
    assert not special_tokens
    assert loaded(chat_bert, template="plain").render([chat, prompt("hi ")], ["yo", "yo"]) == (
        ["x\nhi\nyo", "hi yo"],
        True,
    )
    assert loaded(chat_bert, include_prompt=False).render([chat], ["yo"]) == (["yo"], True)


def test_truncation_is_never_silent(bert: Path) -> None:
    rows, long = [prompt("p" * 60), prompt("q")], "abcdef"
    with pytest.raises(RuntimeError, match=r"66 tokens exceed max_length=64") as info:
        score([loaded(bert)], rows[::-1], [long, long])
    assert "First offending prompt: row 0: 'pppp" in str(info.value)
    text = rows[0].text + long
    for side, kept in (("left", text[-64:]), ("right", text[:64]), ("right", text[:10])):
        source = loaded(bert, truncation=side, max_length=len(kept))
        torch.testing.assert_close(source(rows[:1], [long]), one_by_one(bert, [kept]), atol=1e-5, rtol=1e-5)


def test_more_than_one_label_is_refused(tmp_path: Path) -> None:
    source = SequenceClassifierReward(str(save_bert(tmp_path, num_labels=2)), name="stars")
    with pytest.raises(SourceConfigError, match=r"'stars': .* has 2 labels, a reward is one number.*num_labels=1"):
        source.setup(CPU)


def test_output_field_score_is_read_or_missed_with_a_remedy(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = loaded(bert, output_field="score")
    with pytest.raises(SourceConfigError, match=r"output field 'score' .* got no such field. Set output_field"):
        score([source], PROMPTS, TEXTS)

    def forward(**inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(score=inputs["attention_mask"].sum(1, keepdim=True).float())

    monkeypatch.setattr(source.model, "forward", forward)
    lengths = [len((p.text + text).encode()) for p, text in zip(PROMPTS, TEXTS, strict=True)]
    assert source(PROMPTS, TEXTS).tolist() == lengths


def test_missing_templates_and_pad_tokens_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceConfigError, match=r"has no chat template. Set template: plain"):
        loaded(bert, template="chat")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SourceConfigError, match=r"has no pad token.*micro_batch_size: 1"):
        loaded(bert, tokenizer=str(tmp_path))
    assert loaded(bert, tokenizer=str(tmp_path), micro_batch_size=1)(PROMPTS, TEXTS).shape == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "middle"}, "truncation='middle' is unknown"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"output_field": "value"}, "output_field='value' is unknown"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"template": "chat", "include_prompt": False}, "Set template: plain"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassifierReward("any", **options)


def test_a_source_that_is_not_set_up_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"'reward_model' is not loaded; call setup\(device\) first"):
        SequenceClassifierReward("any")(PROMPTS, TEXTS)


# --- combinations ----------------------------------------------------------------------------------------------------


def test_weighted_sum_by_hand() -> None:
    rewards_PGK = torch.tensor([[[1.0, 10, math.nan], [2, math.nan, 5]]])
    weighted = combine.get_combination("weighted_sum", num_sources=3, weights=[2, 0.5, 0])
    torch.testing.assert_close(weighted(rewards_PGK), torch.tensor([[7.0, math.nan]]).double(), equal_nan=True)
    assert combine.get_combination("weighted_sum", num_sources=2, weights=None)(rewards_PGK[..., :2])[0, 0] == 11
    infinite_PGK = torch.tensor([[[math.inf, 1.0]]])
    assert combine.weighted_sum(infinite_PGK, weights=[0, 1]).tolist() == [[1.0]]
    assert combine.weighted_sum(infinite_PGK, weights=[-1, 1]).tolist() == [[-math.inf]]


def test_weighted_sum_is_never_taken_in_bfloat16() -> None:
    rewards_PGK = torch.tensor([[[1.0, 1 / 512]]]).bfloat16()
    assert combine.weighted_sum(rewards_PGK).item() == 1 + 1 / 512


def best(rewards_PGK: Tensor) -> Tensor:
    return rewards_PGK.amax(-1)


def wrong_kind(rewards_PGK: Tensor) -> list[float]:
    return [0.0]


def wrong_shape(rewards_PGK: Tensor) -> Tensor:
    return rewards_PGK


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("weighted_sum", {"weights": [1.0]}, r"weights=\[1.0\] for 2 reward sources"),
        ("weighted_sum", {"weights": [0.0, 0.0]}, "not all 0"),
        ("weighted_sum", {"weights": [1.0, math.inf]}, "must be finite"),
        ("weighted_sum", {"wieghts": [1.0, 1.0]}, r"has no option \['wieghts'\]"),
        (
            "bordo",
            {},
            r"unknown combination 'bordo'. Use one of \['borda', 'lexicographic', 'weighted_sum', 'z_score'\]",
        ),
        ("borda", {"weights": [1.0]}, r"weights=\[1.0\] for 2 reward sources"),
        ("lexicographic", {"tolerances": [0.0, -1.0]}, r"tolerances=\[0.0, -1.0\] for 2 reward sources.*at least 0"),
        (
            "tests.test_rewards.wrong_shape",
            {},
            r"returned torch.float64 \(1, 2, 2\) .*wrong_shape\(rewards_PGK: Tensor",
        ),
        ("tests.test_rewards.wrong_kind", {}, r"returned list for .*wrong_kind\(rewards_PGK: Tensor"),
    ],
)
def test_bad_combinations_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine.get_combination(name, num_sources=2, **options)


def test_combination_by_dotted_path() -> None:
    assert combine.get_combination("tests.test_rewards.best", num_sources=2)(torch.tensor([[[1.0, 4.0]]])).tolist() == [
        [4.0]
    ]
