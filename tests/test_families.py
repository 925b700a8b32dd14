"""Models of every kind: sampled and trained by their own numbers, whatever they remember, route or see."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BatchEncoding,
    PreTrainedModel,
)

from gopo_lightning.distributed.decoder_layers import plain_outputs
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.next_token import next_token_logits
from gopo_lightning.policy.shared_prefix import supports_shared_prefix
from gopo_lightning.rewards.shared_scoring import Scorer
from gopo_lightning.rollout.engines.decoder_choice import DecoderChoice
from gopo_lightning.rollout.engines.decoders import (
    ExpandedDecoder,
    RecomputingDecoder,
    SharedDecoder,
    UnpaddedDecoder,
    memory_of_rows,
)
from gopo_lightning.types import Completions, PromptBatch
from tests.architectures import (
    FAMILIES,
    SIZES,
    family,
    gradients,
    prompt_batch,
    ragged_completions,
    relative_difference,
)
from tests.conftest import byte_tokenizer
from tests.runs import make_data, make_module, make_trainer
from tests.test_engine import generate

DECODERS = {
    "mixtral": SharedDecoder,
    "qwen3_moe": SharedDecoder,
    "opt": SharedDecoder,
    "mistral": SharedDecoder,
    "gemma3_text": SharedDecoder,
    "gpt_oss": SharedDecoder,
    "roberta": UnpaddedDecoder,
    "rwkv": RecomputingDecoder,  # transformers runs it step by step with one row alone
    "recurrent_gemma": RecomputingDecoder,  # its state is in its modules
}
"""Of the others it is ``ExpandedDecoder``."""
SINGLE = ["nemotron_h", "mamba", "mamba2", "bamba", "falcon_h1", "granitemoehybrid", "llama4_text"]
"""They compute in float32 on the way, whatever the type of their weights."""


def alone(model: nn.Module, prompts: PromptBatch, completions: Completions) -> torch.Tensor:
    """logprobs_NT from unpadded sequences, one at a time, with nothing but input ids."""
    logprobs_NT = torch.zeros(completions.tokens_NT.shape, dtype=next(model.parameters()).dtype)
    G = len(completions) // len(prompts)
    for n, length in enumerate(completions.lengths_N.tolist()):
        prompt = list(prompts.prompts[n // G].token_ids)
        tokens_T = completions.tokens_NT[n, :length]
        with plain_outputs(model):
            logits_SV = model(input_ids=torch.tensor([prompt + tokens_T.tolist()]), use_cache=False).logits[0]
        logprobs_TV = logits_SV[len(prompt) - 1 : -1].log_softmax(-1)
        logprobs_NT[n, :length] = logprobs_TV.gather(-1, tokens_T[:, None])[:, 0]
    return logprobs_NT


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_on_the_numbers_of_each_sequence_alone(name: str) -> None:
    model, prompts, completions = family(name), prompt_batch((5, 9, 1)), ragged_completions()
    expected_NT = alone(model, prompts, completions)
    weights_NT = torch.arange(expected_NT.numel()).view_as(expected_NT).cos()
    (expected_NT * weights_NT).sum().backward()
    expected = gradients(model)
    logprobs_NT = completion_logprobs(model, prompts, completions, chunk_tokens=5).logprobs_NT
    torch.testing.assert_close(logprobs_NT, expected_NT, atol=1e-4, rtol=0)
    (logprobs_NT * weights_NT).sum().backward()
    assert relative_difference(gradients(model), expected) < 1e-3


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SINGLE])
@torch.no_grad()
def test_padding_leaves_no_trace_in_float64(name: str) -> None:
    model, prompts, completions = family(name).double(), prompt_batch((5, 9, 1)), ragged_completions()
    model.config._experts_implementation = "eager"  # torch's grouped product knows no float64
    logprobs_NT = completion_logprobs(model, prompts, completions).logprobs_NT
    torch.testing.assert_close(logprobs_NT, alone(model, prompts, completions), atol=1e-8, rtol=0)


@pytest.mark.parametrize("sharing", ["auto", "never"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sampled_from_the_numbers_of_each_sequence_alone(name: str, sharing: str) -> None:
    """Beyond windows and chunks of 6 tokens; rows that end are dropped, so memories are selected from."""
    model, prompts = family(name), prompt_batch((5, 9, 1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        completions = generate(model, prompts, sharing, 4, eos=range(1, 16), max_new_tokens=16)
        fewer = generate(model, prompts, sharing, 4, eos=range(1, 16), max_new_tokens=16, max_rows=6)
    assert len(set(completions.lengths_N.tolist())) > 3
    assert completions.texts == fewer.texts
    with torch.no_grad():
        expected_NT = alone(model.eval(), prompts, completions)
    torch.testing.assert_close(completions.sampler_logprobs_NT, expected_NT, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_fastest_decoder_that_serves_a_model(name: str) -> None:
    model = family(name).eval()
    with plain_outputs(model):
        assert DecoderChoice("auto")(model, prompt_batch()) is DECODERS.get(name, ExpandedDecoder)


@pytest.mark.parametrize("name", [name for name, kind in DECODERS.items() if kind is SharedDecoder])
def test_shared_form_where_it_is_supported(name: str) -> None:
    model, prompts, completions = family(name), prompt_batch(), ragged_completions()
    assert supports_shared_prefix(model) == (True, "")
    expected_NT = alone(model, prompts, completions)
    weights_NT = torch.arange(expected_NT.numel()).view_as(expected_NT).cos()
    (expected_NT * weights_NT).sum().backward()
    expected = gradients(model)
    logprobs_NT = completion_logprobs(model, prompts, completions, shared_prefix=True).logprobs_NT
    torch.testing.assert_close(logprobs_NT, expected_NT, atol=1e-4, rtol=0)
    (logprobs_NT * weights_NT).sum().backward()
    assert relative_difference(gradients(model), expected) < 1e-3


@pytest.mark.parametrize("name", ["lfm2", "rwkv", "nemotron", "roberta"])
def test_auto_says_once_what_it_does_and_why_and_always_refuses(name: str) -> None:
    model, prompts = family(name).eval(), prompt_batch()
    cost, why = {
        "lfm2": ("its own copy", r"\(conv\)"),
        "rwkv": ("no cache", "differ where prompts are padded on the left"),
        "nemotron": ("its own copy", "RuntimeError: NemotronAttention does not hand"),
        "roberta": ("prompts of one length", "differ where prompts are padded on the left"),
    }[name]
    choose = DecoderChoice("auto")
    with pytest.warns(UserWarning, match=f"{cost}.*: .*{why}"):
        choose(model, prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(model, prompts)
    with pytest.raises(ValueError, match="prefix_sharing is always, but .* cannot: .* Use auto or never"):
        DecoderChoice("always")(model, prompts)


def test_outputs_that_nobody_asked_for_are_not_computed() -> None:
    model, seen = family("qwen3_moe"), []
    model.config._attn_implementation = "eager"
    model.config.output_attentions = model.config.output_hidden_states = True
    model.register_forward_hook(lambda _, args, output: seen.append(output))
    completion_logprobs(model, prompt_batch(), ragged_completions())
    generate(model, prompt_batch(), "never")
    assert seen
    assert not any({"router_logits", "attentions", "hidden_states", "aux_loss"} & output.keys() for output in seen)
    config = model.config
    assert config.output_router_logits and config.output_attentions and config.output_hidden_states


def test_a_model_that_returns_tuples_by_its_configuration() -> None:
    model, prompts, completions = family("opt"), prompt_batch(), ragged_completions()
    expected = completion_logprobs(model, prompts, completions).logprobs_NT
    model.config.return_dict = False
    assert torch.equal(completion_logprobs(model, prompts, completions).logprobs_NT, expected)
    assert model.config.return_dict is False


def test_the_memory_of_a_foreign_model_is_a_reason_to_go_without() -> None:
    model, prompts = family("opt").eval(), prompt_batch()
    original = model.forward

    def foreign(**inputs: Any) -> Any:
        output = original(**inputs)
        if inputs["use_cache"]:
            output.past_key_values = object()
        return output

    model.forward = foreign
    with pytest.warns(UserWarning, match="no cache .*: TypeError: the rows of a object are unknown"):
        completions = generate(model, prompts, "never", 2)
    with torch.no_grad():
        expected_NT = alone(family("opt").eval(), prompts, completions)
    torch.testing.assert_close(completions.sampler_logprobs_NT, expected_NT, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["rwkv", "lfm2", "opt", "roberta"])
@torch.no_grad()
def test_the_next_token_does_not_depend_on_the_other_rows(name: str) -> None:
    model, rows = family(name).eval(), [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
    tokens_NS = torch.tensor([row + [40] * (7 - len(row)) for row in rows])
    together = next_token_logits(model, tokens_NS, torch.tensor([3, 7, 1]))
    alone_NV = torch.stack([model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows])
    torch.testing.assert_close(together, alone_NV, atol=1e-5, rtol=1e-5)


def classifier(kind: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | FAMILIES[kind] | {"vocab_size": 259, "num_labels": 1} | options)
    return AutoModelForSequenceClassification.from_config(config).eval()


TEXTS = [[5, 6, 7], [5, 6, 9, 9], [8, 3, 4], [8, 3, 5]]
PAIRS = BatchEncoding({"input_ids": TEXTS, "attention_mask": [[1] * len(text) for text in TEXTS]})


@pytest.mark.parametrize("mode", ["auto", "never"])
@torch.no_grad()
def test_classifiers_return_scores_whatever_their_configuration_asks_for(mode: Any) -> None:
    asking = {"output_router_logits": True, "output_hidden_states": True, "return_dict": False}
    plain, model = classifier("mixtral", output_router_logits=False), classifier("mixtral", **asking)
    for num_pairs in (None, [2, 2]):
        expected_N, scores_N = (Scorer(byte_tokenizer(), mode)(m, PAIRS, num_pairs) for m in (plain, model))
        torch.testing.assert_close(scores_N, expected_N)
    assert model.config.output_router_logits is True


def test_scoring_falls_back_where_a_trial_fails() -> None:
    model = classifier("nemotron")
    expected_N = Scorer(byte_tokenizer(), "never")(model, PAIRS, [2, 2])

    torch.testing.assert_close(Scorer(byte_tokenizer(), "auto")(model, PAIRS, [2, 2]), expected_N)
    with pytest.raises(ValueError, match="prefix_sharing=always, but .* RuntimeError: NemotronAttention does not hand"):
        Scorer(byte_tokenizer(), "always")(model, PAIRS, [2, 2])


def test_rows_of_a_memory_of_tensors_in_containers() -> None:
    key, value = torch.arange(3), torch.arange(6).view(3, 2)
    (found,), other = memory_of_rows((((key, value),), [value]), torch.tensor([2, 0, 2]))
    assert found[0].tolist() == [2, 0, 2]
    assert found[1].tolist() == other[0].tolist() == [[4, 5], [0, 1], [4, 5]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["roberta", "rwkv"])
def test_a_rank_that_waits_for_others_writes_nothing_new(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where forwards are collectives, ranks make equally many passes, also of prompts of unequal lengths."""
    model, prompts = family(name), prompt_batch((5, 9, 1, 9))
    options: dict[str, Any] = {"eos": range(1, 16), "max_rows": 4}
    expected, calls = generate(model, prompts, "never", 4, **options), []
    engine = "gopo_lightning.rollout.engines.transformers"
    monkeypatch.setattr(f"{engine}.forward_is_collective", lambda model: True)
    monkeypatch.setattr(f"{engine}.gather_objects", lambda count: calls.append(count) or [count, count + 2])
    monkeypatch.setattr(f"{engine}.any_rank", lambda flag, device: flag)
    completions = generate(model, prompts, "never", 4, **options)
    assert calls == [4]
    assert completions.texts == expected.texts
    assert torch.equal(completions.mask_NT, expected.mask_NT)
    assert torch.equal(completions.sampler_logprobs_NT, expected.sampler_logprobs_NT)


def saved(folder: Path, kind: str, **options: Any) -> Path:
    """A random policy over bytes with its tokenizer, as a Hugging Face folder."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ids = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | options | ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts_file(folder: Path) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(f'{{"prompt": "say {"ab" * (i % 5 + 1)}"}}\n' for i in range(12)))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lfm2", "rwkv", "nemotron", "mixtral"])
def test_a_run_of_several_updates_on_the_numbers_that_were_sampled(kind: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, enable_checkpointing=False)
    module = make_module(saved(tmp_path / "policy", kind, **FAMILIES[kind]), num_minibatches=2, log_reference_kl=True)
    trainer.fit(module, make_data(prompts_file(tmp_path)))
    assert trainer.callback_metrics["train/sampler_logprob_diff"] < 1e-4
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert trainer.callback_metrics["val/win_rate"].isfinite()
    assert module.forward_pass.shares_prefix is (kind == "mixtral")


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_a_run_that_no_position_is_left_for_does_not_start(stage: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "policy", "gpt2", max_position_embeddings=20)
    run = getattr(make_trainer(tmp_path, enable_checkpointing=False), stage)
    module = make_module(folder)
    with pytest.raises(ValueError, match=r"row \d+ .* of .*p.jsonl has 14 tokens, .* positions for 20"):
        run(module, datamodule=make_data(prompts_file(tmp_path)))
