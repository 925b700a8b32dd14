"""Names of torch and transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from gopo_lightning._compat.names import get

# ---------------------------------------------------------------------------------------------------------------- torch


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those of ``module`` itself that belong into a checkpoint.

    `Module._non_persistent_buffers_set`: a state dict would tell, but it walks through all children, and sharded ones
    must be gathered first. Can go when `named_buffers` tells persistent ones. Without it: an error.
    """
    temporary = get("torch", module, "_non_persistent_buffers_set")
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name not in temporary}


def set_last_lr(scheduler: LRScheduler, lrs: list[float | Tensor]) -> None:
    """Let ``scheduler.get_last_lr()`` be ``lrs``.

    `LRScheduler._last_lr`: only `step` sets it, and a resumed run has another learning rate before its first step. Can
    go when schedulers can be set anew. Without it: an error.
    """
    get("torch", scheduler, "_last_lr")
    scheduler._last_lr = lrs


HAS_CPU_FLASH_ATTENTION = all(
    hasattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}") for end in ("", "_backward")
)
"""Without these, products of matrices, which are slower."""


def cpu_flash_attention(
    query_BHMD: Tensor, key_BKND: Tensor, value_BKND: Tensor, bias: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of its normaliser.

    `aten::_scaled_dot_product_flash_attention_for_cpu`: `scaled_dot_product_attention` keeps the normaliser to itself.
    Can go when a public function returns it on CPUs too (flex_attention does so on GPUs).
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, normaliser = kernel(query_BHMD, key_BKND, value_BKND, 0.0, causal, attn_mask=bias, scale=scale)
    return output, normaliser


def cpu_flash_attention_backward(
    grad_BHMD: Tensor, *saved: Tensor, bias: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value; ``saved`` is query, key, value, output and normaliser.

    `aten::_scaled_dot_product_flash_attention_for_cpu_backward`: the gradient of a part of a softmax, whose normaliser
    is that of the whole. Can go with the one above.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    d_query, d_key, d_value = kernel(grad_BHMD, *saved, 0.0, causal, attn_mask=bias, scale=scale)
    return d_query, d_key, d_value


def onednn_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """x ↦ x @ weight.T + bias on CPUs, with ``weight`` laid out once; None where torch is built without oneDNN.

    `mkldnn::_reorder_linear_weight` and `mkldnn::_linear_pointwise`: `F.linear` lays a bfloat16 weight out anew in each
    call, a quarter of its time for few rows. Can go when a public function keeps the layout. Without them: `F.linear`.
    """
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")):
        return None
    laid_out = ops._reorder_linear_weight(weight)
    return lambda x: ops._linear_pointwise(x, laid_out, bias, "none", [], "")


# --------------------------------------------------------------------------------------------------------- transformers


def unsplittable_layers(model: nn.Module) -> set[str]:
    """Names of the classes of layers that stay whole; empty if ``model`` names none.

    `PreTrainedModel._no_split_modules`: what to shard and to compile by. Can go when there is a public list of decoder
    layers. Without it: the error for models that name none, which says what to use instead.
    """
    return set(getattr(model, "_no_split_modules", None) or ())


def is_recurrent(model: nn.Module) -> bool:
    """Whether ``model`` carries a state from token to token that cannot be cut as keys and values can.

    `PreTrainedModel._is_stateful`. Can go when configurations tell. Without it: such a model is found by the comparison
    of numbers that follows, and by its `layer_types`.
    """
    return bool(getattr(model, "_is_stateful", False))


def attention_of(config: Any) -> str:
    """The name of the attention function that models of ``config`` call.

    `PreTrainedConfig._attn_implementation`: `PreTrainedModel.set_attn_implementation` sets it for a whole model and
    checks it each time; ours changes twice a forward, and again in each recomputed layer. Can go when there is a
    context manager for it. Without it: an error.
    """
    return str(get("transformers", config, "_attn_implementation"))


def set_attention(config: Any, name: str) -> None:
    """Models of ``config`` call the attention function of this name from now on (`attention_of`)."""
    get("transformers", config, "_attn_implementation")
    config._attn_implementation = name


def checkpoint_function(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module`` checkpoints its layers with; None where it was not told to.

    `GradientCheckpointingLayer._gradient_checkpointing_func`: layers that are computed again in backward need the
    attention function of their forward. Can go when `gradient_checkpointing_enable` takes a context. Without it: the
    recomputed layers call an attention without our layout, and their checkpoint refuses the other shapes.
    """
    found: Callable[..., Any] | None = vars(module).get("_gradient_checkpointing_func")
    return found


def set_checkpoint_function(module: nn.Module, function: Callable[..., Any]) -> None:
    """``module`` checkpoints its layers with ``function`` from now on (`checkpoint_function`)."""
    module._gradient_checkpointing_func = function  # type: ignore[assignment]
