"""What both vLLM engines ask of vLLM, and what they make of its answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.decoder_layers import base_of
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.rollout.engines.base import SamplingConfig, check_drawn, padding_token
from gopo_lightning.rollout.engines.vllm_start import LogprobsMode, logprob_temperature
from gopo_lightning.types import Completions, PromptBatch

_TOLERANCE = 0.25
"""Nats: bfloat16 makes 0.02 to 0.05, weights that did not arrive several."""


class Sampled(NamedTuple):
    """A completion of vLLM's."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """Of the drawn tokens."""
    cut_off: bool


def sampling_parameters(sampling: SamplingConfig, seed: int, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams`` for one completion."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop": list(sampling.stop_strings),
        "stop_token_ids": list(eos_token_ids),
        "ignore_eos": True,  # those above are all
        "detokenize": bool(sampling.stop_strings),
        "logprobs": 0,  # of the drawn token alone
        "seed": seed,
    }


def to_completions(
    sampled: Sequence[Sampled],
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    eos_token_ids: Sequence[int],
    mode: LogprobsMode,
    device: torch.device,
) -> Completions:
    """N completions on ``device``.

    Raises:
        RuntimeError: a token was drawn from what is no distribution.
    """
    logprobs_NT = pad_sequence([torch.tensor(each.logprobs) for each in sampled], batch_first=True)
    check_drawn(logprobs_NT, prompts)
    own = logprob_temperature(mode, sampling) == (sampling.temperature or 1.0)
    completions = _padded(sampled, tokenizer, padding_token(tokenizer, eos_token_ids))
    return replace(completions, sampler_logprobs_NT=logprobs_NT if own else None).to(device)


def _padded(sampled: Sequence[Sampled], tokenizer: PreTrainedTokenizerBase, pad: int) -> Completions:
    rows = [torch.tensor(each.token_ids) for each in sampled]
    tokens_NT = pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths_N = torch.tensor([len(row) for row in rows])
    return Completions(
        tokens_NT,
        torch.arange(tokens_NT.shape[1]) < lengths_N[:, None],
        torch.tensor([each.cut_off for each in sampled]),
        tuple(tokenizer.batch_decode([list(each.token_ids) for each in sampled], skip_special_tokens=True)),
    )


def check_logprobs(
    model: nn.Module,
    prompts: PromptBatch,
    completions: Completions,
    sampled: Sequence[Sampled],
    sampling: SamplingConfig,
    mode: LogprobsMode,
) -> None:
    """ValueError unless both give the longest completion the same log-probs: weights may be lost on the way.

    Nothing is compared where vLLM does not report the policy's. A collective where a forward of ``model`` is one.
    """
    if (temperature := logprob_temperature(mode, sampling)) is None:
        return
    n = completions.lengths_N.argmax()
    few, prompt = completions.select(n[None]), prompts.select(n[None] * len(prompts) // len(completions))
    ours_T = completion_logprobs(model, prompt, few, temperature=temperature).logprobs_NT[0].cpu()
    difference = float((ours_T - torch.tensor(sampled[int(n)].logprobs)).abs().mean())
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"vLLM's log-probs differ from those of {type(base_of(model)).__name__} by {difference:.2f} nats a token "
            f"(at most {_TOLERANCE}): it runs this model otherwise, or not all weights arrive under its names. Use "
            "TransformersEngine."
        )
