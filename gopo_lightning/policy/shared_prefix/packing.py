"""What a forward carries: whole groups or lists in packed rows (training), or a token of each completion (decoding)."""

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gopo_lightning.policy.shared_prefix.attention import (
    attend_completions,
    attend_prompt,
    attend_token,
    attention_mask,
    padding_bias,
)


class PackedGroups:
    """The layout of packed rows of whole groups, and their attention.

    Args:
        prompt_mask_PL: bool, True on real tokens.
        group_size: G.
        num_tokens: T, the width of each completion.
    """

    # a plain class on purpose: FSDP takes dataclass arguments apart to cast what is in them

    def __init__(self, prompt_mask_PL: Tensor, group_size: int, num_tokens: int) -> None:
        self.group_size, self.num_tokens, self.prompt_tokens = group_size, num_tokens, prompt_mask_PL.shape[1]
        self.prompt_mask_PL = prompt_mask_PL
        self.prompt_mask_P1LL = attention_mask(prompt_mask_PL)
        self.prompt_bias_P11L = padding_bias(prompt_mask_PL)
        self._block_mask: BlockMask | None = None
        self.num_calls = 0
        """Layers that came by; 0 after a forward means that the model ignores its attention implementation."""

    def attend(
        self, layer: int, query_PHSD: Tensor, key_PKSD: Tensor, value_PKSD: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """The attention's output, [P, H, S, D]."""
        if query_PHSD.is_cuda:
            return self.attend_fused(query_PHSD, key_PKSD, value_PKSD, scale, softcap)
        G, T, L, K = self.group_size, self.num_tokens, self.prompt_tokens, key_PKSD.shape[1]
        key, key_PKGTD = key_PKSD[:, :, :L], key_PKSD[:, :, L:].unflatten(2, (G, T))
        value, value_PKGTD = value_PKSD[:, :, :L], value_PKSD[:, :, L:].unflatten(2, (G, T))
        query_PKRGTD = query_PHSD[:, :, L:].unflatten(1, (K, -1)).unflatten(3, (G, T))
        prompt_PHLD = attend_prompt(query_PHSD[:, :, :L], key, value, self.prompt_mask_P1LL, scale, softcap)
        completion_PKGRTD = attend_completions(
            query_PKRGTD.transpose(2, 3),
            (key, value),
            (key_PKGTD, value_PKGTD),
            self.prompt_bias_P11L,
            scale,
            softcap,
        )
        return torch.cat([prompt_PHLD, completion_PKGRTD.transpose(2, 3).flatten(1, 2).flatten(2, 3)], 2)

    def attend_fused(
        self, query_PHSD: Tensor, key_PKSD: Tensor, value_PKSD: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """The same by FlexAttention: one kernel over the packed rows that skips the blocks no query may see."""
        if self._block_mask is None:
            self._block_mask = self._blocks(len(query_PHSD), query_PHSD.shape[2])
        return _attend_blocks(self._block_mask, query_PHSD, key_PKSD, value_PKSD, scale, softcap)

    def _blocks(self, num_prompts: int, size: int) -> BlockMask:
        L, T, mask_PL = self.prompt_tokens, self.num_tokens, self.prompt_mask_PL

        def visible(p: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_prompt = (key < L) & mask_PL[p, key.clamp(max=L - 1)]
            in_own = (key >= L) & ((query - L) // T == (key - L) // T)
            return ((query >= key) & (in_prompt | in_own)) | (query == key)

        return create_block_mask(visible, num_prompts, None, size, size, device=mask_PL.device)


class PackedLists:
    """The layout of rows [prefix | text 1 | text 2 | ...] with any number of texts of any length, and their attention.

    Args:
        segments_PS: int64: 0 in the prefix that the texts of a row share, 1, 2, ... in the texts, -1 on padding.
    """

    def __init__(self, segments_PS: Tensor) -> None:
        self.segments_PS = segments_PS
        self.num_calls = 0
        """As in ``PackedGroups``."""

    def attend(
        self, layer: int, query_PHSD: Tensor, key_PKSD: Tensor, value_PKSD: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """The attention's output, [P, H, S, D]."""
        if query_PHSD.is_cuda:
            return _attend_blocks(self.block_mask, query_PHSD, key_PKSD, value_PKSD, scale, softcap)
        return attend_prompt(query_PHSD, key_PKSD, value_PKSD, self.mask_P1SS, scale, softcap)

    @cached_property
    def mask_P1SS(self) -> Tensor:
        """bool: a token sees, up to itself, the prefix and its own text (padding sees padding: no NaN)."""
        query_PS1, key_P1S = self.segments_PS[:, :, None], self.segments_PS[:, None, :]
        return ((key_P1S == 0) | (key_P1S == query_PS1)).tril()[:, None]

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same for FlexAttention."""
        segments_PS = self.segments_PS

        def visible(p: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & ((segments_PS[p, key] == 0) | (segments_PS[p, key] == segments_PS[p, query]))

        P, S = segments_PS.shape
        return create_block_mask(visible, P, None, S, S, device=segments_PS.device)


def _attend_blocks(
    block_mask: BlockMask,
    query_PHSD: Tensor,
    key_PKSD: Tensor,
    value_PKSD: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """FlexAttention, [P, H, S, D]."""
    return _flex_attention(query_PHSD.is_cuda)(
        query_PHSD,
        key_PKSD,
        value_PKSD,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
    )


def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return (score / softcap).tanh() * softcap

    return cap


@cache
def _flex_attention(compiled: bool) -> Any:
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


class PrefixCache:
    """Keys and values of a rollout: the prompts' once per prompt, the completions' in buffers filled token by token.

    Args:
        prompt_mask_PL: bool, True on real tokens.
        max_new_tokens: T, the width of the buffers.
    """

    def __init__(self, prompt_mask_PL: Tensor, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.prompt_mask_P1LL: Tensor | None = attention_mask(prompt_mask_PL)
        self.prompt_bias_P11L = padding_bias(prompt_mask_PL)
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.suffixes: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_tokens = 0
        """Completion tokens written so far, by each row; ``advance`` before each decoding step."""
        self.num_calls = 0
        """As in ``PackedGroups``."""

    def advance(self) -> None:
        """The next forward carries one more token of each completion."""
        self.num_tokens += 1

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """[P, H, L, D] for the prompts, then [A, H, 1, D] for a token of each row."""
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
