"""The decode loop against transformers' ``generate`` and logits processors, and what must not change a completion."""

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.shared_prefix import prefix_cache as layouts
from gopo_lightning.rollout.engines import decoder_choice
from gopo_lightning.rollout.engines.base import RolloutEngine, SamplingConfig
from gopo_lightning.rollout.engines.decoder_choice import DecoderChoice, obstacle
from gopo_lightning.rollout.engines.decoders import SharedDecoder
from gopo_lightning.rollout.engines.drawing import candidates, draw_tokens, inverse_cdf
from gopo_lightning.rollout.engines.precision import cpu_computes_bfloat16, sampling_precision
from gopo_lightning.rollout.engines.streams import stream_seeds, uniforms
from gopo_lightning.rollout.engines.transformers import TransformersEngine
from gopo_lightning.types import Completions, Prompt, PromptBatch
from tests.architectures import BUILDERS, SIZES, VOCAB, build, family, prompt_batch
from tests.conftest import byte_tokenizer

SHARING = ["always", "never"]


class Tokenizer:
    """Decodes tiny vocabularies: token 7 reads "7 "."""

    pad_token_id = 0

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(f"{token} " for token in row if token != 1) for row in rows]


def generate(
    model: nn.Module,
    prompts: PromptBatch,
    sharing: str = "always",
    num_completions: int = 1,
    eos: Sequence[int] = (1,),
    tokenizer: Any = None,
    seed: int = 0,
    max_rows: int | None = None,
    **options: Any,
) -> Completions:
    seeds_N = stream_seeds(seed, 0, [p.index for p in prompts.prompts], num_completions)
    sampling = SamplingConfig(**({"max_new_tokens": 12} | options))
    engine = TransformersEngine(sharing, max_rows=max_rows)  # type: ignore[arg-type]
    return engine.generate(
        model, tokenizer or Tokenizer(), prompts, num_completions, sampling, seeds_N=seeds_N, eos_token_ids=eos
    )


def kept_tokens(completions: Completions) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(completions.tokens_NT, completions.mask_NT, strict=True)]


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", BUILDERS)
def test_greedy_equals_generate_in_train_mode_with_gradient_checkpointing(name: str, sharing: str) -> None:
    model, prompts = build(name).eval(), prompt_batch()
    expected = model.generate(
        prompts.tokens_PL,
        attention_mask=prompts.mask_PL.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=[1, 9],
    )[:, prompts.tokens_PL.shape[1] :]
    model.gradient_checkpointing_enable()
    model.train()
    completions = generate(model, prompts, sharing, 2, eos=(1, 9), temperature=0.0)
    assert model.training
    assert all(m.training for m in model.modules())
    for n in range(len(completions)):
        length = int(completions.lengths_N[n])
        assert completions.tokens_NT[n, :length].tolist() == expected[n // 2, :length].tolist()
        ended = completions.tokens_NT[n, length - 1] in (1, 9)
        assert ended != bool(completions.truncated_N[n])
        assert ended or length == 12


@pytest.mark.parametrize("sharing", SHARING)
def test_sampler_logprobs_are_those_of_the_trainer(sharing: str) -> None:
    """Before filters and before the ban on EOS; with rows that end and are dropped on the way."""
    model, prompts = build("qwen3"), prompt_batch()
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "min_new_tokens": 2}
    completions = generate(model, prompts, sharing, 6, eos=range(1, 9), **options)
    assert len(set(completions.lengths_N.tolist())) > 3
    expected = completion_logprobs(model, prompts, completions, temperature=0.7).logprobs_NT
    torch.testing.assert_close(completions.sampler_logprobs_NT, expected.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sharing", SHARING)
def test_text_does_not_depend_on_batch_order_or_dropped_rows(sharing: str) -> None:
    model, prompts = build("llama"), prompt_batch((5, 9, 1, 4))
    together = generate(model, prompts, sharing, 4, eos=range(1, 6))
    assert len(set(together.lengths_N.tolist())) > 3
    order = torch.tensor([2, 0, 3, 1])
    reordered = generate(model, prompts.select(order), sharing, 4, eos=range(1, 6))
    assert [reordered.texts[4 * i : 4 * i + 4] for i in range(4)] == [together.texts[4 * p : 4 * p + 4] for p in order]
    for i in range(4):
        alone = generate(model, prompts.select(torch.tensor([i])), sharing, 4, eos=range(1, 6))
        assert alone.texts == together.texts[4 * i : 4 * i + 4]
        fewer = generate(model, prompts.select(torch.tensor([i])), sharing, 2, eos=range(1, 6))
        assert fewer.texts == together.texts[4 * i : 4 * i + 2]
    assert generate(model, prompts, sharing, 4, eos=range(1, 6), seed=1).texts != together.texts


@pytest.mark.parametrize("sharing", SHARING)
def test_decoding_fewer_rows_at_once_does_not_change_the_text(sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("llama"), prompt_batch((5, 9, 1, 4, 7))
    options: dict[str, Any] = {"eos": range(1, 20), "stop_strings": ("30 ",)}
    longest_P = generate(model, prompts, sharing, 4, **options).lengths_N.view(5, 4).amax(-1)
    prompts = prompts.select(longest_P.argsort(descending=True))
    assert longest_P.min() < longest_P.max()  # the last pass is a short one
    together = generate(model, prompts, sharing, 4, **options)
    rows = []

    def counted(logits_NV: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(logits_NV))
        return draw_tokens(logits_NV, *args, **kwargs)

    monkeypatch.setattr("gopo_lightning.rollout.engines.transformers.draw_tokens", counted)
    for max_rows, most in ((100, 20), (9, 8), (1, 4)):  # whole groups: at least one
        rows.clear()
        completions = generate(model, prompts, sharing, 4, max_rows=max_rows, **options)
        assert max(rows) == most
        assert completions.texts == together.texts
        assert torch.equal(completions.mask_NT, together.mask_NT)
        assert torch.equal(completions.truncated_N, together.truncated_N)
        torch.testing.assert_close(completions.sampler_logprobs_NT, together.sampler_logprobs_NT)
    assert len(rows) == longest_P.sum()  # a pass ends with its own completions
    with pytest.raises(ValueError, match="max_rows is 0, but it must be >= 1"):
        TransformersEngine(max_rows=0)


def test_sharing_does_not_change_the_text() -> None:
    model, prompts = build("gemma2"), prompt_batch()
    always, never = (generate(model, prompts, sharing, 4, eos=range(1, 6)) for sharing in SHARING)
    assert always.texts == never.texts


def test_mask_ends_at_the_first_eos_inclusive_though_pad_is_eos() -> None:
    tokenizer = Tokenizer()
    tokenizer.pad_token_id = 1
    completions = generate(build("llama"), prompt_batch(), "always", 8, eos=(1, 2, 3), tokenizer=tokenizer)
    ended = 0
    for tokens, mask, truncated in zip(
        completions.tokens_NT.tolist(), completions.mask_NT.tolist(), completions.truncated_N.tolist(), strict=True
    ):
        length = next((t + 1 for t, token in enumerate(tokens) if token in (1, 2, 3)), 12)
        assert mask == [t < length for t in range(len(tokens))]
        assert truncated == (tokens[length - 1] not in (1, 2, 3))
        assert all(token == 1 for token in tokens[length:])
        ended += not truncated
    assert 0 < ended < 24
    assert not completions.sampler_logprobs_NT[~completions.mask_NT].any()


def test_eos_at_the_last_token_is_not_truncation() -> None:
    model, prompts = build("llama"), prompt_batch((4,))
    tokens = generate(model, prompts, max_new_tokens=3, eos=(), temperature=0.0).tokens_NT[0].tolist()
    assert not generate(model, prompts, max_new_tokens=3, eos=(tokens[2],), temperature=0.0).truncated_N.any()
    assert generate(model, prompts, max_new_tokens=3, eos=(), temperature=0.0).truncated_N.all()


@pytest.mark.parametrize("minimum", [0, 5, 12])
def test_min_new_tokens(minimum: int) -> None:
    completions = generate(build("llama"), prompt_batch(), "always", 8, eos=range(1, 30), min_new_tokens=minimum)
    assert int(completions.lengths_N.min()) == min(minimum + 1, 12)  # as transformers: EOS comes after them
    eos = torch.isin(completions.tokens_NT, torch.arange(1, 30)) & completions.mask_NT
    assert not eos[:, :minimum].any()
    assert eos.any(-1).equal(~completions.truncated_N)


@pytest.mark.parametrize("minimum", [0, 1, 5, 17])
@pytest.mark.parametrize("stop", ["21 ", "1 3", "5 2"])
def test_stop_string_ends_with_the_token_that_completes_it(stop: str, minimum: int) -> None:
    """If that comes after min_new_tokens others, wherever the string begins."""
    model, prompts = build("llama"), prompt_batch()
    free = generate(model, prompts, "always", 8, eos=(), max_new_tokens=40)
    options: dict[str, Any] = {"stop_strings": ["no such text", stop], "min_new_tokens": minimum}
    stopped = generate(model, prompts, "always", 8, eos=(), max_new_tokens=40, **options)
    assert 0 < int(stopped.truncated_N.sum()) < 24 or stop == "21 "
    for n in range(24):
        tokens = free.tokens_NT[n].tolist()
        texts = ["", *Tokenizer().batch_decode([tokens[: t + 1] for t in range(40)], True)]
        ends = [t for t in range(minimum + 1, 41) if texts[t].count(stop) > texts[minimum].count(stop)]
        assert stopped.lengths_N[n] == (ends[0] if ends else 40)
        assert bool(stopped.truncated_N[n]) == (not ends)
        assert stopped.texts == tuple(Tokenizer().batch_decode(kept_tokens(stopped), True))


def test_stop_strings_where_every_row_has_ended_by_eos() -> None:
    completions = generate(build("llama"), prompt_batch(), "always", 2, eos=range(VOCAB), stop_strings=["none"])
    assert completions.lengths_N.tolist() == [1] * len(completions)
    assert not completions.truncated_N.any()


def test_stop_string_across_byte_tokens_and_not_before_min_new_tokens() -> None:
    tokenizer = byte_tokenizer()

    class Spelling(nn.Module):
        """Says "naïve naïve naïve ..." whatever the prompt."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.config = None

        def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **_: Any) -> Any:
            text = torch.tensor(tokenizer("naïve ").input_ids)
            positions = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids
            logits = torch.full((*input_ids.shape, len(tokenizer)), -50.0)
            logits.scatter_(-1, text[(positions - 2) % len(text)].expand_as(input_ids)[..., None], 50.0)
            return SimpleNamespace(logits=logits, past_key_values=[])

    prompts = PromptBatch.collate([Prompt(0, (65, 66, 67), "ABC")], 256)
    # "naïve " has 7 tokens, the fourth of which completes an ï
    for minimum, text in {
        0: "naï",
        3: "naï",
        4: "naïve naï",
        9: "naïve naï",
        10: "naïve naï",
        11: "naïve naïve naï",
    }.items():
        options = {"stop_strings": ("ï",), "min_new_tokens": minimum, "max_new_tokens": 30}
        completions = generate(Spelling(), prompts, "never", 2, (257,), tokenizer, **options)
        assert completions.texts == (text, text)
        assert completions.lengths_N.tolist() == [len(text.encode())] * 2
        assert not completions.truncated_N.any()


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 8, "top_p": 0.8, "min_p": 0.05}]
)
def test_filters_keep_the_same_tokens_as_transformers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits_NV = torch.randn(40, 3000) * torch.linspace(0.1, 4, 40)[:, None]
    processors = LogitsProcessorList()
    for name, kind in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in options:
            processors.append(kind(options[name]))
    expected_NV = processors(None, logits_NV).softmax(-1)
    weights_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)).exp()
    kept_NC, ids_NC = candidates(weights_NV, SamplingConfig(**options))
    ours_NV = kept_NC if ids_NC is None else torch.zeros_like(weights_NV).scatter(-1, ids_NC, kept_NC)
    assert torch.equal(ours_NV > 0, expected_NV > 0)
    torch.testing.assert_close(ours_NV / ours_NV.sum(-1, keepdim=True), expected_NV, atol=1e-6, rtol=1e-4)


def test_inverse_cdf_by_hand() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).expand(6, 5)
    drawn = inverse_cdf(weights, torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-53, 1.0], dtype=torch.float64))
    assert drawn.tolist() == [1, 1, 3, 3, 3, 3]


def test_inverse_cdf_over_a_large_vocabulary_equals_one_running_sum_in_float64() -> None:
    torch.manual_seed(0)
    weights_NV = torch.randn(64, 50_001).mul(3).exp()
    uniforms_N = torch.rand(64, dtype=torch.float64)
    cdf_NV = weights_NV.double().cumsum(-1)
    expected_N = torch.searchsorted(cdf_NV, uniforms_N[:, None] * cdf_NV[:, -1:], right=True)[:, 0]
    assert torch.equal(inverse_cdf(weights_NV, uniforms_N), expected_N)


def test_unlikely_tokens_are_drawn_as_often_as_they_should_be() -> None:
    """Half the mass is one token, half is spread over 2**20: a float32 running sum would round most of them away."""
    weights_1V = torch.cat([torch.ones(1, 1), torch.full((1, 2**20), 2.0**-20)], -1)
    uniforms_N = 0.5 + (torch.arange(64, dtype=torch.float64) * 2**13 + 0.5) * 2.0**-20
    expected_N = 1 + torch.arange(64) * 2**14 + 1
    assert torch.equal(inverse_cdf(weights_1V.expand(64, -1), uniforms_N), expected_N)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 6}])
def test_samples_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square over 40,000 draws of one distribution."""
    torch.manual_seed(0)
    logits_V, N = torch.randn(12) * 1.5, 40_000
    config = SamplingConfig(temperature=0.8, **options)
    uniforms_N = uniforms(stream_seeds(0, 0, range(N), 1), 1)[:, 0]
    tokens_N, logprobs_N = draw_tokens(logits_V.expand(N, 12), uniforms_N, config, None)
    logprobs_V = (logits_V / 0.8).log_softmax(-1)
    torch.testing.assert_close(logprobs_N, logprobs_V[tokens_N], atol=1e-5, rtol=1e-5)
    kept_1C, ids_1C = candidates(logprobs_V.exp()[None], config)
    expected_V = kept_1C[0] if ids_1C is None else torch.zeros(12).scatter(0, ids_1C[0], kept_1C[0])
    expected_V = expected_V / expected_V.sum() * N
    counts_V = torch.bincount(tokens_N, minlength=12)
    assert not counts_V[expected_V == 0].any()
    chi2 = ((counts_V - expected_V) ** 2 / expected_V)[expected_V > 0].sum()
    assert chi2 < 33  # 11 degrees of freedom: by chance once in 2,000


def test_rows_are_drawn_in_blocks_as_they_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gopo_lightning.policy.lm_head._BLOCK", 3 * 12)  # three rows
    logits_NV, uniforms_N = torch.randn(10, 12), torch.rand(10, dtype=torch.float64)
    config = SamplingConfig(top_p=0.9)
    tokens_N, logprobs_N = draw_tokens(logits_NV, uniforms_N, config, None)
    alone = [draw_tokens(logits_NV[n : n + 1], uniforms_N[n : n + 1], config, None) for n in range(10)]
    assert torch.equal(tokens_N, torch.cat([tokens for tokens, _ in alone]))
    assert torch.equal(logprobs_N, torch.cat([logprobs for _, logprobs in alone]))


def test_bf16_sampling_reads_copies_and_leaves_the_masters() -> None:
    model, prompts = build("llama"), prompt_batch()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, prompts, "always", 4)
    engine = TransformersEngine("always", dtype="bfloat16")
    seeds_N = stream_seeds(0, 0, range(3), 4)
    sampling = SamplingConfig(max_new_tokens=12)
    completions = engine.generate(model, Tokenizer(), prompts, 4, sampling, seeds_N=seeds_N, eos_token_ids=[1])
    assert completions.texts == expected.texts  # the Trainer's autocast and the engine's own option are the same
    assert completions.texts != generate(model, prompts, "always", 4).texts
    for name, p in model.named_parameters(remove_duplicate=False):
        assert (id(p), p.dtype) == (before[name][0], torch.float32)
        assert torch.equal(p, before[name][1])
    with sampling_precision(model, torch.bfloat16):
        packed = "forward" in vars(model.lm_head)  # it reads a copy in oneDNN's layout
        assert packed == cpu_computes_bfloat16() and (packed or model.lm_head.weight.dtype == torch.bfloat16)
        assert model.model.embed_tokens.weight.dtype == torch.float32
    assert "forward" not in vars(model.lm_head)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_cannot_be_packed_are_copied() -> None:
    model = build("gpt2")
    layer = model.transformer.h[0].attn.c_attn
    with sampling_precision(model, torch.bfloat16):
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == layer.bias.dtype == torch.float32


def test_copies_give_the_numbers_of_plain_autocast() -> None:
    model, tokens = build("qwen2").eval(), prompt_batch((6,)).tokens_PL
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens).logits
        with sampling_precision(model, torch.bfloat16):
            assert torch.equal(model(tokens).logits, expected)


def test_adapters_sample_and_masters_come_back_after_an_error() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    prompts = prompt_batch()
    with_adapter = generate(model, prompts, "always", 4)
    assert with_adapter.texts == generate(model, prompts, "never", 4).texts
    with model.disable_adapter():
        assert with_adapter.texts != generate(model, prompts, "always", 4).texts
    dtypes = {p.dtype for p in model.parameters()}
    with pytest.raises(KeyError), sampling_precision(model, torch.bfloat16):
        raise KeyError
    assert {p.dtype for p in model.parameters()} == dtypes


def test_auto_shares_where_it_can_and_says_why_where_it_cannot() -> None:
    prompts = prompt_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = generate(build("llama"), prompts, "auto", 2).texts
    assert texts == generate(build("llama"), prompts, "never", 2).texts
    hybrid = family("lfm2").eval()
    with pytest.warns(UserWarning, match=r"not all attention over the whole sequence \(conv\)"):
        texts = generate(hybrid, prompts, "auto", 2).texts
    assert texts == generate(hybrid, prompts, "never", 2).texts
    with pytest.raises(ValueError, match=r"\(conv\).*auto or never"):
        generate(hybrid, prompts, "always", 2)


@pytest.mark.parametrize("vocabulary", [4, 14, 26, 79])
def test_a_vocabulary_of_a_few_tokens_is_enough(vocabulary: int) -> None:
    """For digits or bases: what the decoders are tried with must be tokens of it."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**(SIZES | {"vocab_size": vocabulary, "sliding_window": None})))
    prompts = PromptBatch.collate([Prompt(0, (2, 3, 2), ""), Prompt(1, (3,), "")], pad_token_id=0)
    assert generate(model, prompts, "auto", 2).texts == generate(model, prompts, "never", 2).texts


def test_auto_falls_back_where_the_numbers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("llama"), prompt_batch()
    expected = generate(model, prompts, "never", 2).texts
    original = layouts.attend_token
    monkeypatch.setattr(layouts, "attend_token", lambda *args: original(*args) * 1.1)
    with pytest.warns(UserWarning, match="logits differ"):
        assert generate(model, prompts, "auto", 2).texts == expected


def test_finished_rows_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    generate(model, prompt_batch(), "always")  # which decoder it takes is known
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    completions = generate(model, prompt_batch(), "always", 8, eos=range(1, 12), max_new_tokens=30)
    assert rows[:2] == [3, 24]
    assert rows == [3, *sorted(rows[1:], reverse=True)]
    needed = int(completions.lengths_N.sum()) - 24
    assert sum(rows[1:]) < 2 * needed
    assert len(rows) == completions.tokens_NT.shape[1]  # stops when all have ended


def test_engine_is_the_protocol() -> None:
    assert isinstance(TransformersEngine(), RolloutEngine)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"max_new_tokens": 0},
        {"min_new_tokens": 200},
        {"stop_strings": ["a", ""]},
        {"stop_strings": [5]},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
    ],
)
def test_bad_sampling_options_name_value_and_rule(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is .* must be"):
        SamplingConfig(**options)


@pytest.mark.parametrize("options", [{"prefix_sharing": "sometimes"}, {"dtype": "int8"}])
def test_bad_engine_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TransformersEngine(**options)


def test_vocabulary_of_the_fixture() -> None:
    assert build("llama").config.vocab_size == VOCAB


def test_the_decoders_are_compared_outside_autocast() -> None:
    """In bfloat16 two right decoders may be as far apart as a wrong one."""
    model, seen = build(next(iter(BUILDERS))).eval(), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    prompts = PromptBatch.collate([Prompt(0, (3, 4, 5), "")], 0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert obstacle(SharedDecoder, model, prompts) is None
    assert seen and not any(seen)


# --- distributions at the edge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lead", "temperature"), [(6.0, 0.05), (12.0, 0.1), (40.0, 0.3), (110.0, 1.0), (3.0, 1.0)])
@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.01}])
def test_a_banned_peak_leaves_the_others_their_distribution(
    lead: float, temperature: float, options: dict[str, Any]
) -> None:
    """Beside an EOS that has nearly all probability, all others would round to 0 in float32."""
    torch.manual_seed(0)
    config, N = SamplingConfig(temperature=temperature, **options), 20_000
    logits_V = torch.randn(12) * temperature
    logits_V[5] = logits_V.max() + lead
    uniforms_N = uniforms(stream_seeds(0, 0, range(N), 1), 1)[:, 0]
    tokens_N, logprobs_N = draw_tokens(logits_V.expand(N, 12), uniforms_N, config, torch.tensor([5]))
    expected_V = (logits_V.index_fill(0, torch.tensor([5]), -torch.inf) / temperature).softmax(-1)
    kept_1C, ids_1C = candidates(expected_V[None], config)
    expected_V = kept_1C[0] if ids_1C is None else torch.zeros(12).scatter(0, ids_1C[0], kept_1C[0])
    expected_V /= expected_V.sum()
    assert (torch.bincount(tokens_N, minlength=12) / N - expected_V).abs().sum() < 0.05
    torch.testing.assert_close(logprobs_N, (logits_V / temperature).log_softmax(-1)[tokens_N], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("values", [[torch.nan, 0.0, 1.0], [-torch.inf] * 3, [0.0, torch.inf, 1.0]])
def test_what_is_no_distribution_has_no_log_prob(values: list[float], temperature: float) -> None:
    logits_NV = torch.tensor([[0.0, 1.0, 2.0], values])
    uniforms_N = torch.tensor([0.5, 0.5], dtype=torch.float64)
    _, logprobs_N = draw_tokens(logits_NV, uniforms_N, SamplingConfig(temperature=temperature), None)
    assert logprobs_N.isfinite().tolist() == [True, False]
    only_eos_NV = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    _, logprobs_N = draw_tokens(only_eos_NV, uniforms_N[:1], SamplingConfig(temperature=temperature), torch.tensor([0]))
    assert not logprobs_N.isfinite().any()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("sharing", SHARING)
def test_logits_that_are_no_distribution_end_the_rollout_with_row_and_token(sharing: str, value: float) -> None:
    """One prompt at its third token; the others are decoded to their ends, as ranks in step must do."""
    model, calls = build("llama"), []
    generate(model, prompt_batch(), sharing)  # which decoder it takes is known

    def spoil(_: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        if len(calls) == 3:  # the prompts, then a token a call
            logits = logits.clone()
            logits[3] = value
        return logits

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match=r"token 3 of a completion of the prompt in row 1 cannot be drawn"):
        generate(model, prompt_batch(), sharing, 2, eos=())
    assert len(calls) == 12


def test_an_eos_alone_before_min_new_tokens_is_an_error() -> None:
    model = build("llama")

    def certain(_: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([1]), 0.0)

    model.lm_head.register_forward_hook(certain)
    assert set(generate(model, prompt_batch()).lengths_N.tolist()) == {1}
    with pytest.raises(RuntimeError, match=r"token 1 .* row 0 .* min_new_tokens"):
        generate(model, prompt_batch(), min_new_tokens=2)


@pytest.mark.parametrize("given", ["</a>", ["</a>"], ("</a>",)])
def test_a_text_alone_is_one_stop_string(given: Any) -> None:
    assert SamplingConfig(stop_strings=given).stop_strings == ("</a>",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, False), ({"temperature": 0.0}, True), ({"top_p": 0.9}, True), ({"top_k": 1}, True), ({"min_p": 0.01}, True)],
)
def test_what_cuts_tokens_away(options: dict[str, Any], expected: bool) -> None:
    assert SamplingConfig(**options).filters is expected


def test_a_resumed_run_samples_by_the_trial_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On trained weights a trial might end otherwise, and another decoder rounds otherwise."""
    model, prompts = build("llama"), prompt_batch()
    first = DecoderChoice("auto")
    assert first(model, prompts) is SharedDecoder
    tried: list[Any] = []
    monkeypatch.setattr(decoder_choice, "obstacle", lambda kind, *args: tried.append(kind) or "now it differs")
    again = DecoderChoice("auto")
    again.load_state_dict(first.state_dict())
    assert again(build("llama"), prompts) is SharedDecoder and not tried
    assert again.state_dict() == first.state_dict() == {"SharedDecoder": ""}
    with pytest.raises(ValueError, match="now it differs"):
        DecoderChoice("auto")(build("llama"), prompts)
