"""Lengths against positions: refused before the first forward, with the row and what helps; exact where they fit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from gopo_lightning.data import PromptDataModule
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.positions import check_length, max_length_of, position_limit, steady_length
from gopo_lightning.training.callbacks.lengths import LengthCheck
from tests.architectures import SIZES, build, family, prompt_batch, ragged_completions
from tests.conftest import byte_tokenizer
from tests.test_engine import generate

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "d_model": 32,
    "attention_window": [8],
    "encoder_layers": 1,
    "decoder_layers": 1,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 64,
    "n_heads": 4,
    "n_layers": 1,
    "max_seq_len": 64,
    "rotary_dim": 4,
}


def fits(model: nn.Module, num_tokens: int) -> bool:
    """Whether a forward of so many tokens runs."""
    try:
        model(input_ids=torch.full((1, num_tokens), 5), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neo", "biogpt", "gpt_bigcode", "gptj", "codegen", "mpt", "ctrl"])
@torch.no_grad()
def test_the_limit_is_the_longest_sequence_that_runs(kind: str) -> None:
    options = SMALL | {"num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]], "dff": 32, "ffn_dim": 32}
    if kind in ("gpt2", "gpt_bigcode", "gptj", "codegen", "ctrl"):
        options = {name: value for name, value in options.items() if name != "max_position_embeddings"}
    if kind == "opt":
        options["word_embed_proj_dim"] = 32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    limit = position_limit(model)
    assert limit is not None
    assert [fits(model, n) for n in (limit, limit + 1)] == [True, False]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rotary_positions_have_no_end(name: str) -> None:
    assert position_limit(build(name)) is None


@pytest.mark.parametrize("name", ["mamba", "nemotron_h", "rwkv", "granitemoehybrid"])
def test_recurrent_models_have_no_end(name: str) -> None:
    assert position_limit(family(name)) is None


def test_an_adapter_on_the_table_hides_no_limit() -> None:
    model = get_peft_model(build("gpt2"), LoraConfig(r=2, target_modules=["wpe", "c_attn"]))
    assert position_limit(model) == 64


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "mpnet", "esm", "bert", "electra", "bart"])
@torch.no_grad()
def test_classifiers_are_given_as_many_tokens_as_they_take(kind: str) -> None:
    config = AutoConfig.for_model(kind, **SMALL, num_labels=1, encoder_attention_heads=4, decoder_attention_heads=4)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer: Any = SimpleNamespace(model_max_length=10**30)
    limit = max_length_of(model, tokenizer)
    assert limit == (64 if kind in ("bert", "electra", "bart") else 62)

    def runs(num_tokens: int) -> bool:
        tokens = torch.full((1, num_tokens), 5)
        tokens[0, -1] = 2  # where BART reads the score
        try:
            model(input_ids=tokens)
        except (IndexError, RuntimeError):
            return False
        return True

    assert [runs(n) for n in (limit, limit + 1)] == [True, False]
    assert max_length_of(model, tokenizer, 10) == 10
    with pytest.raises(ValueError, match=f"max_length=65, but {type(model).__name__} has positions for {limit} tokens"):
        max_length_of(model, tokenizer, 65)
    tokenizer.model_max_length = 30
    assert max_length_of(model, tokenizer) == 30


def rotary(**rope: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    parameters = {"rope_theta": 10000.0, "factor": 2.0, **rope}
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 16}, rope_parameters=parameters)).eval()


LONG = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 12}


@pytest.mark.parametrize(
    ("rope", "steady"),
    [
        ({"rope_type": "dynamic"}, (16, "dynamic")),
        ({"rope_type": "longrope", **LONG}, (12, "longrope")),
        ({"rope_type": "linear"}, None),
    ],
)
@torch.no_grad()
def test_numbers_that_depend_on_the_longest_row_are_refused_and_shorter_ones_are_exact(
    rope: dict[str, Any], steady: tuple[int, str] | None
) -> None:
    model, prompts, completions = rotary(**rope), prompt_batch((5, 9, 3)), ragged_completions(3, 2, 3)
    assert steady_length(model) == steady
    together = completion_logprobs(model, prompts, completions).logprobs_NT[:2]
    first = prompts.select(torch.tensor([0])), completions.select(torch.tensor([0, 1]))
    alone = completion_logprobs(model, *first).logprobs_NT
    torch.testing.assert_close(together[:, : alone.shape[1]], alone, atol=1e-5, rtol=0)
    check_length(model, 9, 3, "row 0")
    if steady is None:
        return check_length(model, 900, 3, "row 0")
    with pytest.raises(ValueError, match=f"14 tokens, .* beyond {steady[0]} .*rotary.*{steady[1]}.*other rows"):
        check_length(model, 14, 3, "row 0")


def test_frequencies_by_layer_are_read_too() -> None:
    model = rotary()
    model.config.rope_parameters = {
        "full_attention": {"rope_type": "dynamic", "original_max_position_embeddings": 8},
        "sliding_attention": {"rope_type": "default"},
    }
    assert steady_length(model) == (8, "dynamic")


def test_the_engine_refuses_what_would_be_an_index_error() -> None:
    with pytest.raises(ValueError, match=r"longest prompt of a batch has 9 tokens, .* positions for 64\. Lower"):
        generate(build("gpt2"), prompt_batch(), "never", max_new_tokens=56)
    with pytest.raises(
        ValueError, match=r"positions for 64\. Lower model.init_args.rollout.sampling.max_new_tokens\.$"
    ):
        check_length(build("gpt2"), 9, 64, "row 0")


@pytest.mark.parametrize("overlong", ["error", "truncate_left", "drop"])
def test_the_longest_prompt_is_known_with_its_row_and_refused_before_training(overlong: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"prompt": "{"z" * n}"}}\n' for n in (20, 40, 30)))
    data = PromptDataModule(
        train=PromptSource(str(path)), max_prompt_tokens=50 if overlong == "error" else 35, overlong=overlong
    )
    module: Any = SimpleNamespace(
        tokenizer=byte_tokenizer(), policy=build("gpt2"), sampling=SimpleNamespace(max_new_tokens=24)
    )
    trainer: Any = SimpleNamespace(lightning_module=module, datamodule=data)
    data.trainer = trainer
    data.setup("fit")
    num_tokens, row = {"error": (40, 1), "truncate_left": (35, 1), "drop": (30, 2)}[overlong]
    assert data.longest_prompts == {"train": (num_tokens, f"row {row} (counted from 0) of {path}")}
    check = LengthCheck(max_new_tokens=4)
    if overlong == "error":
        check.on_fit_start(trainer, module)
    check.max_new_tokens = 40
    with pytest.raises(ValueError, match=rf"row {row} .*p.jsonl has {num_tokens} .*max_prompt_tokens: 24 and overlong"):
        check.on_fit_start(trainer, module)
    trainer.state = SimpleNamespace(fn="validate")
    for hook in (check.on_validation_start, check.on_test_start, check.on_predict_start):
        with pytest.raises(ValueError, match="positions for 64"):
            hook(trainer, module)
    module.policy = build("llama")
    with pytest.warns(UserWarning, match=rf"up to {num_tokens + 40}, more than the 64 .*max_position_embeddings"):
        check.on_fit_start(trainer, module)
