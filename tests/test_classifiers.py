"""Reward models of foreign families: equal tokens tie, a score is the text's own, heads keep what differs apart."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.rewards import LocalJudge, SequenceClassifierReward
from gopo_lightning.rewards.shared_scoring import Scorer
from gopo_lightning.types import Prompt
from tests.conftest import byte_tokenizer, save_tiny_policy

CPU = torch.device("cpu")
BODY = " the film was a fine piece of work"
HELLO, OTHER = (Prompt(n, (5,), text) for n, text in enumerate(("hello", "another one")))

SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "llama": {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    | {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    "phi3": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 4, "max_position_embeddings": 128, "original_max_position_embeddings": 32}
    | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}}
    | {"attention_dropout": 0.0},
}
SIZES["phi3"]["rope_parameters"] |= {"long_factor": [4.0] * 4, "original_max_position_embeddings": 32}


def save(folder: Path, family: str, tokenizer: Any = None, **options: Any) -> str:
    """A random classifier with one label over bytes, whose head is not small."""
    tokenizer = tokenizer or (closing() if family == "bart" else byte_tokenizer())  # BART reads its score at EOS
    tokenizer.chat_template = None
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = SIZES[family] | special | {"vocab_size": len(tokenizer), "num_labels": 1} | options
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **sizes))
    for name, parameter in model.named_parameters():
        if "layer_norm" not in name.lower() and parameter.ndim == 2:
            parameter.data *= 5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def loaded(folder: str, **options: Any) -> SequenceClassifierReward:
    source = SequenceClassifierReward(folder, **options)
    source.setup(CPU)
    return source


def closing() -> Any:
    """Ends each text with EOS."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    return tokenizer


def in_lower_case() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def test_texts_of_the_same_tokens_tie(tmp_path: Path) -> None:
    """They stand between others of their length, so that scored row by row they would come into two micro-batches."""
    source = loaded(save(tmp_path, "bert", in_lower_case()), micro_batch_size=8)
    same = [word + BODY for word in ("Good", "good", "GOOD", "gOOd", "GooD", "goOD")]
    others = [word + BODY for word in ("bad", "best", "worst", "the very", "one long", "another")]
    scores_2G = source([HELLO] * 6 + [OTHER] * 6, same + others).double().view(2, 6)
    assert ordinal(scores_2G)[0].tolist() == [0.0] * 6 and len({*scores_2G[1].tolist()}) == 6


def test_texts_that_truncation_makes_equal_tie_and_are_told(tmp_path: Path) -> None:
    source = loaded(save(tmp_path, "llama"), micro_batch_size=3, max_length=20, truncation="right")
    texts = [BODY + f" number {n}" for n in range(7)] + ["a", "bb", "ccc"]
    with pytest.warns(UserWarning, match=r"of 10 different texts 7 are the same as another .* max_length=20"):
        scores = source([HELLO] * 10, texts)
    assert len({*scores[:7].tolist()}) == 1 and len({*scores.tolist()}) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source([HELLO] * 10, texts)  # told once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uncut = loaded(str(tmp_path), max_length=20, truncation="right")
        uncut([HELLO] * 2, ["a", "b"])


@pytest.mark.parametrize("family", ["bert", "llama", "xlnet", "bart"])
def test_a_score_is_that_of_the_text_alone(tmp_path: Path, family: str) -> None:
    """XLNet reads its score in the last column, where on the right of a short text would be padding."""
    folder = save(tmp_path, family)
    texts = ["ab", "a longer text" + BODY, "hm, well", "x" * 60]
    alone = torch.cat([loaded(folder)([HELLO], [text]) for text in texts])
    together = loaded(folder)([HELLO] * 4, texts)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len({*alone.tolist()}) == 4


def test_one_that_no_padding_suits_scores_texts_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model of foreign code may be: its score depends on the width of its micro-batch."""
    source = loaded(save(tmp_path, "bert"))
    inside, rows = source._apart, []

    def apart(encoded: Any, sizes: Any) -> torch.Tensor:
        rows.append(len(encoded["input_ids"]))
        return inside(encoded, sizes) + max(map(len, encoded["input_ids"]))

    monkeypatch.setattr(source, "_apart", apart)
    with pytest.warns(UserWarning, match="another score beside a longer one, so they are scored one by one"):
        scores = source([HELLO] * 3, ["a", "bb" * 10, "c" * 30])
    assert rows == [1, 2, 2, 1, 1, 1]
    again = source([HELLO] * 3, ["c" * 30, "a", "bb" * 10])
    assert torch.equal(again, scores[[2, 0, 1]]) and rows[6:] == [1, 1, 1]


@pytest.mark.parametrize("family", ["xlnet", "bert"])
def test_batches_train_on_the_scores_of_the_texts_alone(tmp_path: Path, family: str) -> None:
    source = loaded(save(tmp_path, family))
    model, tokenizer = source.model, source.tokenizer
    assert model is not None and tokenizer is not None
    scorer, texts = Scorer(tokenizer, "auto"), ["ab", "a longer text" + BODY]
    scores = scorer(model, tokenizer(texts), None)
    alone = torch.cat([scorer(model, tokenizer([text]), None) for text in texts])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)


def test_a_model_that_no_padding_suits_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = loaded(save(tmp_path, "bert"))
    assert source.tokenizer is not None
    monkeypatch.setattr("gopo_lightning.rewards.shared_scoring.may_pad", lambda *_: False)
    with pytest.raises(ValueError, match="another score beside a longer one, whichever side is padded"):
        Scorer(source.tokenizer, "auto")(source.models()[0], source.tokenizer(["a", "bbb"]), None)


def test_lengths_that_change_other_texts_scores_are_refused(tmp_path: Path) -> None:
    """Beyond 32 tokens this Phi-3 reads all texts of a forward with other frequencies."""
    folder = save(tmp_path, "phi3")
    source = loaded(folder, truncation="left")
    assert source.max_length == 32
    short = [BODY[:n] for n in range(3, 9)]
    alone = source([HELLO] * 6, short)
    beside = source([HELLO] * 7, [*short, "long" * 20])[:6]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"max_length=64, but beyond 32 tokens .* or set micro_batch_size: 1"):
        loaded(folder, max_length=64)
    one_by_one = loaded(folder, max_length=64, micro_batch_size=1)
    assert torch.equal(one_by_one([HELLO] * 7, [*short, "long" * 10])[:6], one_by_one([HELLO] * 6, short))


@pytest.mark.parametrize("family", ["bart", "llama", "bert"])
def test_bfloat16_makes_no_false_ties(tmp_path: Path, family: str) -> None:
    """Whatever the head is called."""
    source = loaded(save(tmp_path, family), dtype="bfloat16")
    texts = [BODY + " and more"[:n] for n in range(1, 9)]
    assert len({*source([HELLO] * 8, texts).tolist()}) == 8


def test_scores_that_come_in_bfloat16_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gopo_lightning.rewards.classifier.float32_head", lambda model: None)
    source = loaded(save(tmp_path, "bert"), dtype="bfloat16")
    with pytest.warns(UserWarning, match="scores in bfloat16, in which many tie that differ"):
        source([HELLO] * 2, ["a", "b"])


# ------------------------------------------------------------------------------------------------------ pairs of texts


def of_pairs() -> Any:
    """Writes `a <eos> b`, and tells the second text apart by its token types."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A <eos> $B:1", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    return tokenizer


def save_for_pairs(folder: Path) -> str:
    save(folder, "bert", of_pairs())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_pair_is_two_texts_for_the_tokenizer(tmp_path: Path) -> None:
    source = loaded(save_for_pairs(tmp_path), template="pair")
    assert source.model is not None and source.tokenizer is not None
    found = source([HELLO, OTHER], ["yes", "no, not at all"])
    inputs = source.tokenizer("hello", "yes", return_tensors="pt")
    assert inputs["token_type_ids"].tolist() == [[0] * 6 + [1] * 3]
    assert float(found[0]) == pytest.approx(float(source.model(**inputs).logits), abs=1e-5)
    assert float(found[0]) != pytest.approx(float(loaded(str(tmp_path))([HELLO], ["yes"])), abs=1e-3)


def test_what_is_cut_of_a_pair(tmp_path: Path) -> None:
    folder = save_for_pairs(tmp_path)
    left, right = (
        loaded(folder, template="pair", max_length=9, truncation=side, micro_batch_size=1) for side in ("left", "right")
    )
    assert torch.equal(left([HELLO], ["yes"]), left([Prompt(0, (5,), "oh, hello")], ["yes"]))  # both end in "hello"
    assert torch.equal(right([HELLO], ["yes"]), right([HELLO], ["yes, please"]))
    with pytest.raises(ValueError, match="more than max_length=9 tokens even without its prompt"):
        left([HELLO], ["a completion that is longer than that"])


# ------------------------------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize("closes", [False, True])
def test_a_judge_is_asked_to_go_on(tmp_path: Path, closes: bool) -> None:
    """A tokenizer that ends each text with EOS would have it begin another document."""
    save_tiny_policy(tmp_path)
    (closing() if closes else byte_tokenizer()).save_pretrained(tmp_path)
    judge = LocalJudge(str(tmp_path), template="plain")
    judge.setup(CPU)
    tokens = judge.tokens(HELLO, "a", "b")
    assert byte_tokenizer().decode(tokens).endswith("Answer:\n")
