"""Attention in which the completions of a group share their prompt: computed once, stored once, never expanded.

One registered attention function serves training and decoding. transformers hands it the queries, keys and values of
an ordinary forward of the model, together with whatever object we passed as the keyword ``shared_prefix``:

* ``PackedGroups``: a row per prompt, [prompt | completion 1 | ... | completion G], for log-probs and their gradient.
* ``PrefixCache``: first the prompts alone (prefill), then one token of every completion at a time (decode).

A completion attends to its prompt, and causally to itself, under one softmax. That is exact: the same numbers as G
separate sequences, for L + G*T tokens in place of G*(L + T). Legend, beyond that of ``structs``:

    H  query heads     K  key/value heads     R = H / K  query heads that read the same keys and values
    S  tokens of a packed row, L + G*T        Q  query tokens of one completion        D  width of a head
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig

IMPLEMENTATION = "gopo_shared_prefix"


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
        self.prompt_mask_P1LL = prompt_attention_mask(prompt_mask_PL)
        self.prompt_bias_P11L = padding_bias(prompt_mask_PL)
        T, device = num_tokens, prompt_mask_PL.device
        self.suffix_bias_TT = torch.zeros(T, T, device=device).masked_fill(_future(T, device), -torch.inf)
        self.num_calls = 0
        """Layers that came by; 0 after a forward means that the model ignores its attention implementation."""

    def attend(
        self, layer: int, query_PHSD: Tensor, key_PKSD: Tensor, value_PKSD: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """The attention's output, [P, H, S, D]."""
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
            self.suffix_bias_TT,
            scale,
            softcap,
        )
        return torch.cat([prompt_PHLD, completion_PKGRTD.transpose(2, 3).flatten(1, 2).flatten(2, 3)], 2)


class PrefixCache:
    """Keys and values of a rollout: the prompts' once per prompt, the completions' in buffers filled token by token.

    Args:
        prompt_mask_PL: bool, True on real tokens.
        group_size: G.
        max_new_tokens: T, the width of the buffers.
    """

    def __init__(self, prompt_mask_PL: Tensor, group_size: int, max_new_tokens: int) -> None:
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.prompt_mask_P1LL: Tensor | None = prompt_attention_mask(prompt_mask_PL)
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
        """[P, H, L, D] for the prompts, then [P*G, H, 1, D] for each token."""
        if self.num_tokens == 0:
            self.prompts[layer] = key.contiguous(), value.contiguous()
            return attend_prompt(query, key, value, self.prompt_mask_P1LL, scale, softcap)
        prompt = self.prompts[layer]
        P, K = prompt[0].shape[:2]
        suffix = self._append(layer, key, value, P)
        query_PGKR1D = query.unflatten(0, (P, -1)).unflatten(2, (K, -1))
        output_PKGR1D = attend_completions(
            query_PGKR1D.transpose(1, 2), prompt, suffix, self.prompt_bias_P11L, None, scale, softcap
        )
        return output_PKGR1D.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def keep(self, prompts_P: Tensor, rows_A: Tensor) -> None:
        """Go on with these prompts, and of each with as many of these rows (indices into the present P*G)."""
        G, width = self.group_size, len(rows_A) // len(prompts_P)
        columns_PG = (rows_A % G).view(-1, width)
        whole = len(prompts_P) == len(next(iter(self.prompts.values()))[0])
        for layer, (key_PKLD, value_PKLD) in self.prompts.items():
            if not whole:
                self.prompts[layer] = key_PKLD[prompts_P], value_PKLD[prompts_P]
            if layer in self.suffixes:
                key, value = (buffer.transpose(1, 2)[prompts_P[:, None], columns_PG] for buffer in self.suffixes[layer])
                self.suffixes[layer] = key.transpose(1, 2), value.transpose(1, 2)
        if self.prompt_bias_P11L is not None:
            self.prompt_bias_P11L = self.prompt_bias_P11L[prompts_P]
        self.group_size = width

    def _append(self, layer: int, key: Tensor, value: Tensor, num_prompts: int) -> tuple[Tensor, Tensor]:
        """Write the keys and values [P*G, K, 1, D] of one token; returns all so far, [P, K, G, num_tokens, D] each."""
        if layer not in self.suffixes:
            self.suffixes[layer] = tuple(  # type: ignore[assignment]
                new.new_empty(num_prompts, new.shape[1], self.group_size, self.max_new_tokens, new.shape[-1])
                for new in (key, value)
            )
        for buffer, new in zip(self.suffixes[layer], (key, value), strict=True):
            buffer[:, :, :, self.num_tokens - 1] = new[:, :, 0].unflatten(0, (num_prompts, -1)).transpose(1, 2)
        key_PKGTD, value_PKGTD = self.suffixes[layer]
        return key_PKGTD[..., : self.num_tokens, :], value_PKGTD[..., : self.num_tokens, :]


def attend_prompt(
    query_PHLD: Tensor,
    key_PKLD: Tensor,
    value_PKLD: Tensor,
    mask_P1LL: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Causal attention of the prompts among themselves, [P, H, L, D]; ``mask_P1LL`` None means that none is padded."""
    if softcap is not None:
        return _attend_softcapped(query_PHLD, key_PKLD, value_PKLD, mask_P1LL, scale, softcap)
    return F.scaled_dot_product_attention(
        query_PHLD, key_PKLD, value_PKLD, mask_P1LL, is_causal=mask_P1LL is None, scale=scale, enable_gqa=True
    )


def attend_completions(
    query_PKGRQD: Tensor,
    prompt: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    prompt_bias_P11L: Tensor | None,
    suffix_bias_QT: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of completions to their prompt and themselves under one softmax, [P, K, G, R, Q, D].

    The prompt's keys meet the queries of the whole group in one product: G*R*Q rows against [P, K, L, D], never
    expanded. ``suffix`` is [P, K, G, T, D] each. A bias of 0 or -inf is added to the scores; None adds nothing.
    """
    (key_PKLD, value_PKLD), (key_PKGTD, value_PKGTD) = prompt, suffix
    P, K, G, R, Q, _ = query_PKGRQD.shape
    L = key_PKLD.shape[2]
    prompt_scores = query_PKGRQD.flatten(2, 4) @ key_PKLD.transpose(-1, -2)
    suffix_scores = query_PKGRQD.flatten(3, 4) @ key_PKGTD.transpose(-1, -2)
    prompt_scores = _scores(prompt_scores, prompt_bias_P11L, scale, softcap).view(P, K, G, R, Q, L)
    suffix_scores = _scores(suffix_scores.unflatten(3, (R, Q)), suffix_bias_QT, scale, softcap)
    weights = torch.cat([prompt_scores, suffix_scores], -1).softmax(-1).to(value_PKLD.dtype)
    from_prompt = weights[..., :L].reshape(P, K, G * R * Q, L) @ value_PKLD
    from_suffix = weights[..., L:].reshape(P, K, G, R * Q, -1) @ value_PKGTD
    return from_prompt.view(P, K, G, R, Q, -1) + from_suffix.view(P, K, G, R, Q, -1)


def _scores(products: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """float32 (or better) scores of the softmax."""
    scores = products.to(torch.promote_types(products.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    return scores if bias is None else scores + bias


def _attend_softcapped(
    query_PHLD: Tensor, key_PKLD: Tensor, value_PKLD: Tensor, mask_P1LL: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Causal attention with soft-capped scores (Gemma 2), which SDPA has not."""
    K, L, device = key_PKLD.shape[1], query_PHLD.shape[2], query_PHLD.device
    allowed = ~_future(L, device) if mask_P1LL is None else mask_P1LL[:, None]
    scores = _scores(query_PHLD.unflatten(1, (K, -1)) @ key_PKLD[:, :, None].transpose(-1, -2), None, scale, softcap)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).to(value_PKLD.dtype)
    return (weights @ value_PKLD[:, :, None]).flatten(1, 2)


def prompt_attention_mask(mask_PL: Tensor) -> Tensor | None:
    """bool [P, 1, L, L], causal without padding (which sees itself: no NaN); None if none is padded."""
    if bool(mask_PL.all()):
        return None
    L, device = mask_PL.shape[1], mask_PL.device
    return ((~_future(L, device) & mask_PL[:, None]) | torch.eye(L, dtype=torch.bool, device=device))[:, None]


def padding_bias(mask_PL: Tensor) -> Tensor | None:
    """float32 [P, 1, 1, L]: -inf on padding; None if there is none."""
    if bool(mask_PL.all()):
        return None
    return torch.zeros(mask_PL.shape, device=mask_PL.device).masked_fill(~mask_PL, -torch.inf)[:, None, None]


def _future(size: int, device: torch.device) -> Tensor:
    """bool [size, size], True where the column comes after the row."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    shared_prefix: "PackedGroups | PrefixCache | None" = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; returns [batch, tokens, H, D]."""
    if shared_prefix is None:
        raise RuntimeError(f"{type(module).__name__} does not hand its keyword arguments to the attention function")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings make them float32
    shared_prefix.num_calls += 1
    return shared_prefix.attend(layer, query, key, value, scale, softcap).transpose(1, 2), None


# No mask function is registered under this name, so transformers builds no mask: the layout above is the mask.
AttentionInterface.register(IMPLEMENTATION, _attention_function)


@contextmanager
def shared_prefix_attention(model: nn.Module) -> Iterator[None]:
    """``model`` calls our attention function inside, and its own again outside.

    Layers under gradient checkpointing are recomputed during backward, after the end of this context; so they are
    given a non-reentrant checkpoint that enters it again.
    """
    with ExitStack() as stack:
        stack.enter_context(_implementation(model))
        for module in model.modules():
            if "_gradient_checkpointing_func" in vars(module):
                stack.enter_context(_checkpoint_function(module, model))
        yield


def require_called(model: nn.Module, shared_prefix: PackedGroups | PrefixCache) -> None:
    """After a forward with ``shared_prefix``: ValueError if no layer of ``model`` looked at it."""
    if not shared_prefix.num_calls:
        raise ValueError(f"{type(model).__name__} never called the registered attention; set prefix_sharing to never.")


@contextmanager
def _implementation(model: nn.Module) -> Iterator[None]:
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def _checkpoint_function(module: nn.Module, model: nn.Module) -> Iterator[None]:
    before: Callable[..., Any] = vars(module)["_gradient_checkpointing_func"]
    options = getattr(before, "keywords", {}) | {
        "use_reentrant": False,
        "context_fn": lambda: (ExitStack(), _implementation(model)),
    }
    module._gradient_checkpointing_func = partial(checkpoint, **options)  # type: ignore[assignment]
    try:
        yield
    finally:
        module._gradient_checkpointing_func = before  # type: ignore[assignment]


def supports_shared_prefix(model: nn.Module, num_tokens: int | None = None) -> tuple[bool, str]:
    """Whether ``model`` may share prompts in sequences of ``num_tokens`` (L + T; None: any length), and why not.

    It looks at the configuration alone; ``logprobs.check_shared_prefix`` then compares the numbers.
    """
    base: Any = model
    reason = _obstacle(base.get_base_model() if hasattr(model, "get_base_model") else base, model, num_tokens)
    return reason is None, reason or ""


def _obstacle(base: nn.Module, model: nn.Module, num_tokens: int | None) -> str | None:
    config = getattr(base, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return f"{type(base).__name__} is not a transformers model"
    text = config.get_text_config()
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "prompt learning adds virtual tokens to each sequence"
    if not getattr(base, "_supports_attention_backend", False) or config.is_encoder_decoder:
        return f"{type(base).__name__} cannot call a registered attention function"
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds or getattr(base, "_is_stateful", False):
        return f"its layers are not all attention over the whole sequence ({', '.join(sorted(kinds)) or 'recurrent'})"
    window = _window(text)
    if window is not None and (num_tokens is None or num_tokens > window):
        return f"its sliding window of {window} tokens may be shorter than a sequence"
    if getattr(text, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        return "sdpa ignores the soft cap of its attention scores; set attn_implementation to eager"
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(text, name, 0.0):
            return f"{name} is {getattr(text, name)}; set it to 0"
    for name, module in base.named_modules():
        if "sinks" in module._parameters:
            return f"{name} has attention sinks"
        if type(module).__name__ == "CheckpointWrapper":
            return "activation checkpointing by torch's wrapper; use the model's own gradient checkpointing"
    return None


def _window(text_config: PreTrainedConfig) -> int | None:
    """The sliding window of any layer, or None."""
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is not None:
        return window if "sliding_attention" in layer_types else None
    return window if getattr(text_config, "use_sliding_window", True) else None
