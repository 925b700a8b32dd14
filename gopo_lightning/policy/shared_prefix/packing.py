"""What a forward in training or scoring carries: whole groups in a row without padding."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from gopo_lightning.policy.shared_prefix.attention import AttentionRule, Pieces, attend_groups, beside_sinks
from gopo_lightning.policy.shared_prefix.partial_softmax import bias_of


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
        self.windows = set[int | None]()
        """With which sliding windows layers came by, those that are compiled apart."""
        self.fused = (device is not None and device.type == "cuda") if fused is None else fused
        self._pieces: dict[int | None, Pieces] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def prepare(self, windows: Iterable[int | None]) -> None:
        """Make what layers with these sliding windows need and, where they are compiled, can only read."""
        for window in windows if self.fused else ():
            self._block_masks[window] = self.block_mask(window)

    def attend(
        self,
        module: nn.Module,
        query_1HSD: Tensor,
        key_1KSD: Tensor,
        value_1KSD: Tensor,
        rule: AttentionRule,
    ) -> Tensor:
        """The attention's output, [1, H, S, D], for any layer's ``module``."""
        if self.fused:
            return self._attend_fused(query_1HSD, key_1KSD, value_1KSD, rule)
        if rule.window not in self._pieces:
            self._pieces[rule.window] = self.pieces(rule.window)
        return attend_groups(query_1HSD, key_1KSD, value_1KSD, self._pieces[rule.window], rule)

    def _attend_fused(self, query_1HSD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor, rule: AttentionRule) -> Tensor:
        """By FlexAttention: one kernel over the row that skips the blocks no query may see."""
        found = _flex_attention(query_1HSD)(
            query_1HSD,
            key_1KSD,
            value_1KSD,
            score_mod=None if rule.softcap is None else _capped(rule.softcap),
            block_mask=self._block_masks[rule.window],
            scale=rule.scale,
            enable_gqa=True,
            return_aux=None if rule.sinks_H is None else AuxRequest(lse=True),
        )
        if rule.sinks_H is None:
            return found
        output, beside = found
        return beside_sinks(output, beside.lse, rule.sinks_H)[0].to(output.dtype)

    def pieces(self, window: int | None = None) -> Pieces:
        """Which tokens attend to which."""
        starts, groups = list[tuple[int, int]](), list[tuple[slice, slice | Tensor, Tensor | None]]()
        start = 0
        for prompt, *texts in self.lengths:
            end = start + prompt + sum(texts)
            if prompt and end > start + prompt:
                if window is None or prompt + max(texts) <= window:
                    groups.append((slice(start, start + prompt), slice(start + prompt, end), None))
                elif window > 1:
                    groups.append(self._near(start, prompt, texts, window))
            for length in (prompt, *texts):
                starts.append((start, length))
                start += length
        return Pieces([self._places(bucket) for bucket in _buckets(starts)], groups)

    def _near(self, start: int, prompt: int, texts: Sequence[int], window: int) -> tuple[slice, Tensor, Tensor]:
        """The end of the prompt at ``start`` and the beginnings of its texts that see some of it, and what they see."""
        begin = max(prompt - (window - 1), 0)
        text_starts = accumulate(texts[:-1], initial=start + prompt)
        number_M = torch.cat([torch.arange(min(n, window - 1), device=self.device) for n in texts])
        starts_M = torch.cat(
            [number_M.new_full((min(n, window - 1),), s) for s, n in zip(text_starts, texts, strict=True)]
        )
        distance_MN = prompt + number_M[:, None] - torch.arange(begin, prompt, device=self.device)
        return slice(start + begin, start + prompt), starts_M + number_M, bias_of(distance_MN < window)[None, None]

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

    @cached_property
    def position_S(self) -> Tensor:
        """int64 place of each token in its own sequence."""
        begins = [prompt if i else 0 for prompt, *texts in self.lengths for i in range(len(texts) + 1)]
        first_S = torch.ones_like(self.run_S).cumsum(0) - 1
        lengths = [length for runs in self.lengths for length in runs]
        return first_S - self._of_runs(list(accumulate(lengths[:-1], initial=0))) + self._of_runs(begins)

    def _of_runs(self, values: Sequence[int]) -> Tensor:
        lengths = torch.tensor([length for runs in self.lengths for length in runs], device=self.device)
        return torch.tensor(values, device=self.device).repeat_interleave(lengths, output_size=self.num_tokens)

    def block_mask(self, window: int | None = None) -> BlockMask:
        """The same for FlexAttention, made of the numbers of blocks alone: S x S may be far too many."""
        group_S, run_S, prompt_S, position_S = self.group_S, self.run_S, self.prompt_S, self.position_S

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            to_prompt = prompt_S[key] & (group_S[key] == group_S[query])
            return (query >= key) & (to_prompt | (run_S[key] == run_S[query]))

        some, whole = visible_blocks(group_S, run_S, prompt_S, _BLOCK)
        if window is not None:
            nearest, farthest = block_distances(position_S, _BLOCK)
            some, whole = some & (nearest < window), whole & (farthest < window)
        num_part, which_part = _table(some & ~whole)
        num_whole, which_whole = _table(whole)
        return BlockMask.from_kv_blocks(
            num_part,
            which_part,
            num_whole,
            which_whole,
            BLOCK_SIZE=_BLOCK,
            mask_mod=visible if window is None else _within(window, visible, position_S),
            seq_lengths=(self.num_tokens, self.num_tokens),
        )


def _within(window: int, visible: Callable[..., Tensor], position_S: Tensor) -> Callable[..., Tensor]:
    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(batch, head, query, key) & (position_S[query] - position_S[key] < window)

    return near


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


def block_distances(position_S: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """By how many places a block's queries are at least, and at most, behind a block's keys; [query and key blocks]."""
    padding = -len(position_S) % size
    position_BM = torch.cat([position_S, position_S[-1:].expand(padding)]).view(-1, size)
    lowest_B, highest_B = position_BM.amin(-1), position_BM.amax(-1)
    return lowest_B[:, None] - highest_B, highest_B[:, None] - lowest_B


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
