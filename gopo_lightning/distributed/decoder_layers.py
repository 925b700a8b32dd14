"""The layers of a model: which are sharded, how they are compiled, and how one is run in another way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gopo_lightning._compat import unsplittable_layers

_PLAIN = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model under an adapter, or ``model`` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers says are never to be split, in order; of nested ones (Mamba's) the outer.

    Raises:
        ValueError: the model names none.
    """
    base = base_of(model)
    names = unsplittable_layers(base)
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in base.modules():
        if type(module).__name__ in names and module not in inside:
            layers.append(module)
            inside.update(module.modules())
    if not layers:
        raise ValueError(
            f"{type(base).__name__} names no layers to shard or to compile by (_no_split_modules is {sorted(names)}); "
            "train it with trainer.strategy: ddp and without policy.compile; for a frozen model set "
            "placement.frozen_models: offload"
        )
    return layers


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Each layer by torch.compile, with its ``options``: they are alike, so one compilation serves all of them."""
    for layer in decoder_layers(model):
        layer.compile(**options)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled layers run as they are written inside: for what is small or changes its shapes at each call."""
    with torch.compiler.set_stance("force_eager"):
        yield


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """The configurations that ``model`` and its parts read, each once."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in configs if isinstance(c, PreTrainedConfig)}.values())


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Forwards return logits by name inside, and nothing else that the model's configuration may ask for.

    Mixtures of experts are often saved with `output_router_logits: true`, for a loss that is not ours.
    """
    before = [
        (config, name, asked)
        for config in configs_of(model)
        for name, plain in _PLAIN.items()
        if (asked := getattr(config, name, plain)) != plain
    ]
    for config, name, _ in before:
        setattr(config, name, _PLAIN[name])
    try:
        yield
    finally:
        for config, name, asked in before:
            setattr(config, name, asked)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    """``module`` computes ``forward`` inside; its hooks (FSDP's gather) still run."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
