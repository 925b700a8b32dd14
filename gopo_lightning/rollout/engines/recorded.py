"""Offline data as an engine: the completions are the answers that the prompt's row holds."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.data.recorded import recorded_answers
from gopo_lightning.distributed.gathering import compute_device
from gopo_lightning.policy.model import end_of_turn
from gopo_lightning.rollout.engines.base import (
    RolloutEngine,
    SamplingConfig,
    WithSampler,
    padding_token,
)
from gopo_lightning.rollout.engines.streams import uniforms
from gopo_lightning.rollout.engines.transformers import TransformersEngine
from gopo_lightning.types import Completions, PromptBatch


class RecordedEngine(WithSampler):
    """Tokenises the answers of the rows in training. In validation, test and predict its ``sampler`` asks the policy.

    With `rewards.RecordedReward` as the source, groups of rated answers go through the same advantages and objectives
    as sampled ones. They are not the policy's own samples: at one update a rollout the ratio is 1 all the same, and the
    clipped surrogate is a likelihood weighted by the advantage.

    A row with more than G answers gives G of them, drawn anew at each step from the row's own random stream; one with
    fewer is an error. An answer ends with the token that ends a turn in the chat template, or else with EOS; beyond
    ``sampling.max_new_tokens`` it is cut off.

    Args:
        sampler: the engine of evaluations; TransformersEngine when null.
    """

    def __init__(self, sampler: RolloutEngine | None = None) -> None:
        self._given = sampler

    @cached_property
    def sampler(self) -> RolloutEngine:
        """The engine of evaluations. (Made when it is asked for: it holds what no process can hand to another.)"""
        return self._given or TransformersEngine()

    def check_sampling(self, sampling: SamplingConfig, *, logprobs: bool) -> None:
        """What the sampler cannot do; log-probs of answers that nobody sampled there are none."""
        super().check_sampling(sampling, logprobs=False)

    def generate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        *,
        seeds_N: list[int],
        eos_token_ids: Sequence[int],
    ) -> Completions:
        """See :class:`RolloutEngine`."""
        G = num_completions
        texts: list[str] = []
        ends: list[int] = []
        for p, prompt in enumerate(prompts.prompts):
            found = recorded_answers(prompt).texts
            if len(found) < G:
                raise ValueError(
                    f"{prompt.place} holds {len(found)} answers, but num_completions={G}. Lower "
                    "rollout.num_completions, or leave such rows out."
                )
            order_M = uniforms(seeds_N[p * G : p * G + 1], len(found))[0].argsort() if len(found) > G else range(G)
            texts += [found[int(m)] for m in list(order_M)[:G]]
            ends += [_end(tokenizer, eos_token_ids, is_chat=prompt.messages is not None)] * G
        return _tokenised(tokenizer, texts, ends, sampling, eos_token_ids).to(compute_device(model))


def _end(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], *, is_chat: bool) -> int:
    """What ends an answer."""
    turn = end_of_turn(tokenizer) if is_chat else tokenizer.eos_token_id
    return turn if isinstance(turn, int) and turn in eos_token_ids else int(eos_token_ids[0])


def _tokenised(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ends: Sequence[int],
    sampling: SamplingConfig,
    eos_token_ids: Sequence[int],
) -> Completions:
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows = [[*ids, end] for ids, end in zip(encoded, ends, strict=True)]
    truncated = [len(row) > sampling.max_new_tokens for row in rows]
    rows = [row[: sampling.max_new_tokens] for row in rows]
    lengths_N: Tensor = torch.tensor([len(row) for row in rows])
    mask_NT = torch.arange(int(lengths_N.max())) < lengths_N[:, None]
    tokens_NT = torch.full(mask_NT.shape, padding_token(tokenizer, eos_token_ids))
    tokens_NT[mask_NT] = torch.tensor([token for row in rows for token in row])
    shown = [
        str(tokenizer.decode(row, skip_special_tokens=True)) if cut else text
        for row, text, cut in zip(rows, texts, truncated, strict=True)
    ]
    return Completions(tokens_NT, mask_NT, torch.tensor(truncated), tuple(shown))
