"""What a forward carries: whole groups in a row (training, scoring), or a token of each completion (decoding)."""

import math
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gopo_lightning.policy.shared_prefix.attention import (
    Pieces,
    attend_groups,
    attend_prompt,
    attend_token,
    attention_mask,
    padding_bias,
)


class PackedGroups:
    """The layout of a row [prompt 1 | its texts | prompt 2 | its texts | ...] without padding, and its attention.

    Args:
        prompt_lengths: tokens of each prompt, maybe 0.
        text_lengths: tokens of each text of each prompt, maybe 0.
        device: of the row.
        fused: whether FlexAttention computes it; None: on a GPU. Compiled layers take it into their graph.
    """

    # a plain class on purpose: FSDP takes dataclass arguments apart to cast what is in them

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        text_lengths: Sequence[Sequence[int]],
        device: torch.device | None = None,
        *,
        fused: bool | None = None,
    ) -> None:
        self.device = device
        self.lengths = [[prompt, *texts] for prompt, texts in zip(prompt_lengths, text_lengths, strict=True)]
        self.num_tokens = sum(map(sum, self.lengths))
        """S."""
        self.called = False
        """Whether a layer came by; if none did, the model ignores its attention implementation."""
        self.fused = (device is not None and device.type == "cuda") if fused is None else fused
        if self.fused:
            self.block_mask  # noqa: B018 - made here, for compiled layers can only read it

    def attend(
        self,
        module: nn.Module,
        query_1HSD: Tensor,
        key_1KSD: Tensor,
        value_1KSD: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """The attention's output, [1, H, S, D], for any layer's ``module``."""
        if self.fused:
            return self._attend_fused(query_1HSD, key_1KSD, value_1KSD, scale, softcap)
        return attend_groups(query_1HSD, key_1KSD, value_1KSD, self.pieces, scale, softcap)

    def _attend_fused(
        self, query_1HSD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """By FlexAttention: one kernel over the row that skips the blocks no query may see."""
        return _flex_attention(query_1HSD)(
            query_1HSD,
            key_1KSD,
            value_1KSD,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=self.block_mask,
            scale=scale,
            enable_gqa=True,
        )

    @cached_property
    def pieces(self) -> Pieces:
        """Which tokens attend to which."""
        starts, groups = list[tuple[int, int]](), list[tuple[slice, slice]]()
        start = 0
        for prompt, *texts in self.lengths:
            end = start + prompt + sum(texts)
            if prompt and end > start + prompt:
                groups.append((slice(start, start + prompt), slice(start + prompt, end)))
            for length in (prompt, *texts):
                starts.append((start, length))
                start += length
        return Pieces([self._places(bucket) for bucket in _buckets(starts)], groups)

    def _places(self, bucket: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """int64 [B, M] of runs (start, length) of tokens, and where they are real, as ``Pieces`` has them."""
        start_B1, length_B1 = torch.tensor(bucket, device=self.device).T[..., None]
        longest = bucket[0][1]
        column_M = torch.arange(longest, device=self.device)
        real_BM = None if bucket[-1][1] == longest else column_M < length_B1
        return start_B1 + torch.minimum(column_M, length_B1 - 1), real_BM

    @cached_property
    def group_S(self) -> Tensor:
        """int64 number of each token's group."""
        return self._of_runs([p for p, runs in enumerate(self.lengths) for _ in runs])

    @cached_property
    def run_S(self) -> Tensor:
        """int64 number of the prompt or text that each token belongs to."""
        return self._of_runs(range(sum(map(len, self.lengths))))

    @cached_property
    def prompt_S(self) -> Tensor:
        """bool, True on tokens of prompts."""
        return self._of_runs([i == 0 for runs in self.lengths for i in range(len(runs))])

    def _of_runs(self, values: Sequence[int]) -> Tensor:
        lengths = torch.tensor([length for runs in self.lengths for length in runs], device=self.device)
        return torch.tensor(values, device=self.device).repeat_interleave(lengths, output_size=self.num_tokens)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same for FlexAttention, made of the numbers of blocks alone: S x S may be far too many."""
        group_S, run_S, prompt_S = self.group_S, self.run_S, self.prompt_S

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            to_prompt = prompt_S[key] & (group_S[key] == group_S[query])
            return (query >= key) & (to_prompt | (run_S[key] == run_S[query]))

        some, whole = visible_blocks(group_S, run_S, prompt_S, _BLOCK)
        num_part, which_part = _table(some & ~whole)
        num_whole, which_whole = _table(whole)
        return BlockMask.from_kv_blocks(
            num_part,
            which_part,
            num_whole,
            which_whole,
            BLOCK_SIZE=_BLOCK,
            mask_mod=visible,
            seq_lengths=(self.num_tokens, self.num_tokens),
        )


_BLOCK = 128
"""Tokens of FlexAttention's blocks."""


def visible_blocks(group_S: Tensor, run_S: Tensor, prompt_S: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of ``size`` keys of which a block of queries sees some, and sees all; bool [query blocks, key blocks]."""
    padding = -len(group_S) % size
    group_BM, run_BM, prompt_BM = (
        torch.cat([x, x[-1:].expand(padding)]).view(-1, size) for x in (group_S, run_S, prompt_S)
    )
    last_prompt_B = group_BM.masked_fill(~prompt_BM, -1).amax(-1)
    number_B = torch.arange(len(group_BM), device=group_S.device)
    earlier_BB = number_B[:, None] > number_B
    shares_run = run_BM[:, -1] >= run_BM[:, :1]  # of an earlier key block, and a query block: numbers only rise
    sees_prompt = last_prompt_B >= group_BM[:, :1]
    some_BB = (earlier_BB & (shares_run | sees_prompt)) | (number_B[:, None] == number_B)
    one_run_B, one_group_B = run_BM[:, 0] == run_BM[:, -1], group_BM[:, 0] == group_BM[:, -1]
    same_run = one_run_B & one_run_B[:, None] & (run_BM[:, 0] == run_BM[:, :1])
    own_prompt = prompt_BM.all(-1) & one_group_B & one_group_B[:, None] & (group_BM[:, 0] == group_BM[:, :1])
    return some_BB, earlier_BB & (same_run | own_prompt)


def _table(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, int32 [1, 1, Q], and which, [1, 1, Q, K]: those first."""
    order_QK = blocks_QK.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return blocks_QK.sum(-1, dtype=torch.int32)[None, None], order_QK.to(torch.int32)[None, None].contiguous()


def _buckets(runs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Runs (start, length > 0) of about the same length together, the longest first: little is padded."""
    buckets: list[list[tuple[int, int]]] = []
    for run in sorted((run for run in runs if run[1]), key=lambda run: (-run[1], run[0])):
        longest = buckets[-1][0][1] if buckets else math.inf
        if longest <= _SHORT or run[1] > 0.8 * longest:
            buckets[-1].append(run)
        else:
            buckets.append([run])
    return buckets


_SHORT = 32
"""Tokens below which a call costs more than padding."""


def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return (score / softcap).tanh() * softcap

    return cap


def _flex_attention(query: Tensor) -> Any:
    """Compiled by itself on a GPU, unless it is being compiled with its layer."""
    return _compiled_flex_attention() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


class PrefixCache:
    """Keys and values of a rollout: the prompts' once per prompt, the completions' in buffers filled token by token.

    Args:
        prompt_mask_PL: bool, True on real tokens.
        max_new_tokens: T, the width of the buffers.
    """

    fused = False

    def __init__(self, prompt_mask_PL: Tensor, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.prompt_mask_P1LL: Tensor | None = attention_mask(prompt_mask_PL)
        self.prompt_bias_P11L = padding_bias(prompt_mask_PL)
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.suffixes: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_tokens = 0
        """Completion tokens written so far, by each row; ``advance`` before each decoding step."""
        self.called = False
        """As in ``PackedGroups``."""

    def advance(self) -> None:
        """The next forward carries one more token of each completion."""
        self.num_tokens += 1

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """[P, H, L, D] for the prompts, then [A, H, 1, D] for a token of each row, in the layer of this ``module``."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if self.num_tokens == 0:
            self.prompts[layer] = key.contiguous(), value.contiguous()
            return attend_prompt(query, key, value, self.prompt_mask_P1LL, scale, softcap)
        suffix = self._append(layer, key, value)
        return attend_token(query, self.prompts[layer], suffix, self.prompt_bias_P11L, scale, softcap)

    def keep(self, prompts_P: Tensor, rows_A: Tensor) -> None:
        """Go on with these prompts, and of each with as many of these rows (indices into the present P*G)."""
        whole = len(prompts_P) == len(next(iter(self.prompts.values()))[0])
        for layer, prompt in self.prompts.items():
            if not whole:
                self.prompts[layer] = prompt[0][prompts_P], prompt[1][prompts_P]
            if layer in self.suffixes:
                key_AKTD, value_AKTD = self.suffixes[layer]
                self.suffixes[layer] = key_AKTD[rows_A], value_AKTD[rows_A]
        if self.prompt_bias_P11L is not None:
            self.prompt_bias_P11L = self.prompt_bias_P11L[prompts_P]

    def _append(self, layer: int, key_AK1D: Tensor, value_AK1D: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token; returns all so far, [A, K, num_tokens, D] each."""
        new = key_AK1D, value_AK1D
        if layer not in self.suffixes:
            A, K, _, D = key_AK1D.shape
            self.suffixes[layer] = tuple(x.new_empty(A, K, self.max_new_tokens, D) for x in new)  # type: ignore[assignment]
        for buffer_AKTD, x_AK1D in zip(self.suffixes[layer], new, strict=True):
            buffer_AKTD[:, :, self.num_tokens - 1] = x_AK1D[:, :, 0]
        key_AKTD, value_AKTD = self.suffixes[layer]
        return key_AKTD[:, :, : self.num_tokens], value_AKTD[:, :, : self.num_tokens]
