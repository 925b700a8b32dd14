"""How a model of transformers comes to call our attention function, and which models may.

A registered attention function gets the keyword arguments of the model's forward, our layout among them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from gopo_lightning._compat import (
    attention_of,
    checkpoint_function,
    is_recurrent,
    set_attention,
    set_checkpoint_function,
)
from gopo_lightning.distributed.decoder_layers import base_of, configs_of
from gopo_lightning.policy.shared_prefix.attention import AttentionRule
from gopo_lightning.policy.shared_prefix.packing import PackedGroups
from gopo_lightning.policy.shared_prefix.prefix_cache import PrefixCache

IMPLEMENTATION = "gopo_shared_prefix"
FUSED_IMPLEMENTATION = "gopo_shared_prefix_fused"


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    shared_prefix: "PackedGroups | PrefixCache | None" = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; returns [batch, tokens, H, D]."""
    if shared_prefix is None:
        raise RuntimeError(f"{type(module).__name__} does not hand its keyword arguments to the attention function")
    rule = AttentionRule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window, s_aux)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings make them float32
    shared_prefix.called = True
    if not torch.compiler.is_compiling():
        shared_prefix.windows.add(sliding_window)
    return shared_prefix.attend(module, query, key, value, rule).transpose(1, 2), None


# No mask function is registered under these names, so transformers builds no mask: the layout above is the mask.
# Compiled layers call the first as it is, for torch's kernels need no compiler, and take the second into their graph.
AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(_attention_function))
AttentionInterface.register(FUSED_IMPLEMENTATION, _attention_function)


@contextmanager
def shared_prefix_attention(model: nn.Module, shared_prefix: PackedGroups | PrefixCache) -> Iterator[None]:
    """``model`` calls our attention function inside, for forwards with ``shared_prefix``, and its own again outside.

    Layers under gradient checkpointing are recomputed during backward, after the end of this context; so they are
    given a non-reentrant checkpoint that enters it again.
    """
    name = FUSED_IMPLEMENTATION if shared_prefix.fused else IMPLEMENTATION
    shared_prefix.prepare(windows_of(model))
    with ExitStack() as stack:
        stack.enter_context(_implementation(model, name))
        for module in model.modules():
            if (before := checkpoint_function(module)) is not None:
                stack.enter_context(_with_attention(before, module, model, name))
        yield


def require_called(model: nn.Module, shared_prefix: PackedGroups | PrefixCache) -> None:
    """After a forward with ``shared_prefix``: ValueError if no layer of ``model`` looked at it, or one hid a window."""
    name, told = type(model).__name__, shared_prefix.windows
    if not shared_prefix.called:
        raise ValueError(f"{name} never called the registered attention; set prefix_sharing to never.")
    if told and told != (declared := windows_of(model)):
        raise ValueError(
            f"the layers of {name} have sliding windows of {_listed(declared)} by its configuration, and tell their "
            f"attention {_listed(told)}; set prefix_sharing to never."
        )


def windows_of(model: nn.Module) -> set[int | None]:
    """The sliding windows of the layers of ``model``, in tokens; None is that of a layer without one."""
    text = base_of(model).config.get_text_config()  # type: ignore[union-attr, operator]
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    layer_types = getattr(text, "layer_types", None) or ["sliding_attention"]
    return {window if kind == "sliding_attention" else None for kind in layer_types}


def _listed(windows: set[int | None]) -> str:
    return ", ".join(sorted("none" if window is None else str(window) for window in windows))


@contextmanager
def _implementation(model: nn.Module, name: str) -> Iterator[None]:
    before = [(config, attention_of(config)) for config in configs_of(model)]
    try:
        for config, _ in before:
            set_attention(config, name)
        yield
    finally:
        for config, own in before:
            set_attention(config, own)


@contextmanager
def _with_attention(before: Callable[..., Any], module: nn.Module, model: nn.Module, name: str) -> Iterator[None]:
    """``module`` checkpoints as by ``before``, and recomputes with the attention of this ``name``."""
    options = getattr(before, "keywords", {}) | {
        "use_reentrant": False,
        "context_fn": lambda: (ExitStack(), _implementation(model, name)),
    }
    set_checkpoint_function(module, partial(checkpoint, **options))
    try:
        yield
    finally:
        set_checkpoint_function(module, before)


def supports_shared_prefix(model: nn.Module) -> tuple[bool, str]:
    """Whether ``model`` may share prompts, and why not.

    It looks at the configuration alone; ``logprobs.check_shared_prefix`` then compares the numbers.
    """
    base: Any = model
    reason = _obstacle(base.get_base_model() if hasattr(model, "get_base_model") else base, model)
    return reason is None, reason or ""


def _obstacle(base: nn.Module, model: nn.Module) -> str | None:
    config = getattr(base, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return f"{type(base).__name__} is not a transformers model"
    text = config.get_text_config()
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "prompt learning adds virtual tokens to each sequence"
    if not isinstance(base, PreTrainedModel) or not base.is_backend_compatible() or config.is_encoder_decoder:
        return f"{type(base).__name__} cannot call a registered attention function"
    if any(getattr(module, "is_causal", True) is False for module in base.modules()):
        return f"the attention of {type(base).__name__} is not causal: a prompt sees what follows it"
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds or is_recurrent(base):
        return f"its layers are not all attention over the whole sequence ({', '.join(sorted(kinds)) or 'recurrent'})"
    if getattr(text, "attn_logit_softcapping", None) and attention_of(config) == "sdpa":
        return "sdpa ignores the soft cap of its attention scores; set attn_implementation to eager"
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(text, name, 0.0) and _drops(base):
            return f"{name} is {getattr(text, name)}; set it to 0"
    if any(type(module).__name__ == "CheckpointWrapper" for module in base.modules()):
        return "activation checkpointing by torch's wrapper; use the model's own gradient checkpointing"
    return None


def _drops(base: nn.Module) -> bool:
    """Whether a dropout is left: a policy's are set to 0, whatever its configuration says."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0.0)
        for module in base.modules()
        if module is not base
    )
