"""Log-probs against transformers' own forward, a sequence at a time; the LM head in chunks; odd heads."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gopo_lightning.policy import lm_head as head
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.next_token import next_token_logits
from gopo_lightning.policy.prefix_sharing import check_shared_prefix
from gopo_lightning.policy.shared_prefix import PackedGroups
from gopo_lightning.types import Completions, PromptBatch
from tests.architectures import (
    BUILDERS,
    SCALED_LOGITS,
    VOCAB,
    build,
    family,
    gradients,
    prompt_batch,
    ragged_completions,
    relative_difference,
)

ALL = [*BUILDERS, *SCALED_LOGITS]


def one_by_one(model: nn.Module, prompts: PromptBatch, completions: Completions, temperature: float) -> list[Tensor]:
    """Log-softmax [T, V] at each token of each completion, from unpadded sequences with nothing but input ids."""
    rows = []
    for n in range(len(completions)):
        prompt = list(prompts.prompts[n // (len(completions) // len(prompts))].token_ids)
        tokens = completions.tokens_NT[n][completions.mask_NT[n]].tolist()
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0]
        rows.append((logits[len(prompt) - 1 : -1].float() / temperature).log_softmax(-1))
    return rows


@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_equals_transformers_forward_of_each_sequence_alone(name: str, shared_prefix: bool) -> None:
    model, prompts, completions = build(name), prompt_batch(), ragged_completions()
    result = completion_logprobs(
        model, prompts, completions, temperature=0.7, with_entropy=True, shared_prefix=shared_prefix, chunk_tokens=5
    )
    for n, expected_TV in enumerate(one_by_one(model, prompts, completions, 0.7)):
        length = len(expected_TV)
        tokens_T = completions.tokens_NT[n, :length]
        expected_T = expected_TV.gather(-1, tokens_T[:, None])[:, 0]
        torch.testing.assert_close(result.logprobs_NT[n, :length], expected_T, atol=2e-5, rtol=1e-5)
        entropy_T = -(expected_TV.exp() * expected_TV).sum(-1)
        torch.testing.assert_close(result.entropy_NT[n, :length], entropy_T.detach(), atol=2e-5, rtol=1e-5)
        assert not result.logprobs_NT[n, length:].any()
        assert not result.entropy_NT[n, length:].any()


@pytest.mark.parametrize("name", ALL)
def test_gradient_equals_that_of_transformers_forward(name: str) -> None:
    model, prompts, completions = build(name), prompt_batch(), ragged_completions()
    weights_NT = torch.arange(completions.mask_NT.numel()).view_as(completions.mask_NT).cos()
    for n, row_TV in enumerate(one_by_one(model, prompts, completions, 1.0)):
        picked_T = row_TV.gather(-1, completions.tokens_NT[n, : len(row_TV), None])[:, 0]
        (picked_T * weights_NT[n, : len(row_TV)]).sum().backward()
    expected = gradients(model)
    for shared_prefix in (False, True):
        result = completion_logprobs(model, prompts, completions, shared_prefix=shared_prefix, chunk_tokens=5)
        (result.logprobs_NT * weights_NT).sum().backward()
        assert relative_difference(gradients(model), expected) < 2e-5


def test_logit_rules_are_found_and_the_model_is_left_as_it_was() -> None:
    for name, expected in {
        "llama": (1.0, None),
        "gemma2": (1.0, 3.0),
        "cohere": (0.25, None),
        "granite": (0.25, None),
    }.items():
        model = build(name)
        completion_logprobs(model, prompt_batch(), ragged_completions())
        rule = head._rules[model]
        assert (rule.scale, rule.softcap) == expected
        assert "forward" not in vars(model.get_output_embeddings())
        assert getattr(model.config, "final_logit_softcapping", None) == expected[1]


def test_unknown_head_falls_back_to_the_models_own_logits() -> None:
    class Odd(type(build("llama"))):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + output.logits.roll(1, -1)
            return output

    model, prompts, completions = build("llama"), prompt_batch(), ragged_completions()
    model.__class__ = Odd
    expected = one_by_one(model, prompts, completions, 1.0)
    for shared_prefix in (False, True):
        result = completion_logprobs(model, prompts, completions, shared_prefix=shared_prefix)
        assert head._rules[model] is None
        for n, row_TV in enumerate(expected):
            expected_T = row_TV.gather(-1, completions.tokens_NT[n, : len(row_TV), None])[:, 0]
            torch.testing.assert_close(result.logprobs_NT[n, : len(row_TV)], expected_T, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_head_runs_on_tokens_in_the_mask_alone_and_never_on_more_than_a_chunk(shared_prefix: bool) -> None:
    model, completions = build("llama"), ragged_completions()
    completion_logprobs(model, prompt_batch(), completions)  # finds the rule
    rows: list[int] = []
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: (rows.append(hidden.shape[:-1].numel()), original(hidden))[1]
    result = completion_logprobs(model, prompt_batch(), completions, shared_prefix=shared_prefix, chunk_tokens=5)
    assert sum(rows) == int(completions.mask_NT.sum())
    assert max(rows) == 5
    result.logprobs_NT.sum().backward()
    assert sum(rows) == 2 * int(completions.mask_NT.sum())  # recomputed, not kept


def test_no_logits_are_kept_for_backward() -> None:
    model, completions = build("llama"), ragged_completions()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        completion_logprobs(model, prompt_batch(), completions, chunk_tokens=5)
    # what V is never multiplied with: a batch of hidden states in the widest layer
    V, width = model.config.vocab_size, 48
    assert max(kept) <= max(completions.tokens_NT.shape[0] * 16 * width, V * 32)


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_lora_also_on_the_head(target: str) -> None:
    base = build("qwen2")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[target, "v_proj"], init_lora_weights=False))
    prompts, completions = prompt_batch(), ragged_completions()
    completion_logprobs(model, prompts, completions).logprobs_NT.sum().backward()
    replicated = gradients(model)
    assert any(target in name for name in replicated)
    result = completion_logprobs(model, prompts, completions, shared_prefix=True)
    result.logprobs_NT.sum().backward()
    assert relative_difference(gradients(model), replicated) < 2e-5
    for n, row_TV in enumerate(one_by_one(model, prompts, completions, 1.0)):
        expected_T = row_TV.gather(-1, completions.tokens_NT[n, : len(row_TV), None])[:, 0]
        torch.testing.assert_close(result.logprobs_NT[n, : len(row_TV)], expected_T, atol=2e-5, rtol=1e-5)


def test_gradient_of_the_head_against_finite_differences() -> None:
    torch.manual_seed(0)
    targets_C = torch.tensor([0, 3, 3])
    logits_CV = torch.randn(3, 5)
    numeric = torch.zeros(3, 5)
    for index in range(15):
        step = torch.zeros(15).index_fill(0, torch.tensor(index), 1e-2).view(3, 5)
        up, down = (((logits_CV + s).double() / 0.6).log_softmax(-1)[range(3), targets_C] for s in (step, -step))
        numeric += step / 1e-2 * ((up - down).sum() / 2e-2)
    logits_CV.requires_grad_()
    normaliser_C, logprobs_C = head.token_statistics(logits_CV.detach(), targets_C, 0.6, with_entropy=False)
    head.TokenLogprob.apply(logits_CV, targets_C, 0.6, normaliser_C, logprobs_C).sum().backward()
    torch.testing.assert_close(logits_CV.grad, numeric, atol=2e-4, rtol=1e-3)


def test_nothing_in_the_mask_gives_zeros_with_a_gradient() -> None:
    completions = ragged_completions()
    empty = Completions(
        completions.tokens_NT, torch.zeros_like(completions.mask_NT), completions.truncated_N, completions.texts
    )
    for shared_prefix in (False, True):
        model = build("llama")
        result = completion_logprobs(model, prompt_batch(), empty, shared_prefix=shared_prefix, with_entropy=True)
        result.logprobs_NT.sum().backward()
        assert not result.logprobs_NT.any()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_temperature_zero_counts_as_one() -> None:
    model, prompts, completions = build("llama"), prompt_batch(), ragged_completions()
    one, zero = (completion_logprobs(model, prompts, completions, temperature=t).logprobs_NT for t in (1.0, 0.0))
    assert torch.equal(one, zero)


def test_partial_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="whole groups"):
        completion_logprobs(build("llama"), prompt_batch((3, 4)), ragged_completions(1, 3))


def test_check_agrees_on_a_sound_model_and_not_on_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, completions = build("llama"), prompt_batch(), ragged_completions()
    agreement = check_shared_prefix(model, prompts, completions)
    assert agreement.ok
    assert agreement.tolerance == 1e-3
    assert all(p.grad is None for p in model.parameters())
    assert check_shared_prefix(build("gpt2").bfloat16(), prompts, completions).tolerance == 5e-2
    monkeypatch.setattr(PackedGroups, "attend", lambda self, module, query, *rest: query.cumsum(2))
    assert not check_shared_prefix(model, prompts, completions).ok


def test_entropy_of_tokens_that_are_impossible_is_that_of_the_others() -> None:
    """0 · (-inf) is 0; and logits that are no distribution stay NaN."""
    logits_CV = torch.tensor([[0.3, -1.0, 2.0, 0.1], [5.0, 0.0, 0.0, 0.0], [torch.nan, 0.0, 0.0, 0.0]])
    targets_C = torch.tensor([2, 0, 1])
    expected = head.token_statistics(logits_CV, targets_C, 0.7, True)
    wider_CV = torch.cat([logits_CV, torch.full((3, 1), -torch.inf)], -1)
    for actual, plain in zip(head.token_statistics(wider_CV, targets_C, 0.7, True), expected, strict=True):
        torch.testing.assert_close(actual, plain, equal_nan=True)
        assert actual.isnan().tolist() == [False, False, True]


def test_a_soft_cap_under_another_name_is_not_overlooked() -> None:
    """It changes small logits by little: a rule that is right to a hundredth is the wrong one."""
    model, prompts, completions = family("recurrent_gemma"), prompt_batch(), ragged_completions()
    completion_logprobs(model, prompts, completions)
    assert model.config.logits_soft_cap == 30.0
    assert head._rules[model] is None


def test_no_more_logits_than_the_lengths_need() -> None:
    model = build("llama")
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[1]))
    lengths_N = torch.tensor([7, 5, 6])
    logits_NV = next_token_logits(model, torch.randint(2, VOCAB, (3, 9)), lengths_N)
    assert logits_NV.shape == (3, VOCAB)
    assert seen == [3]
