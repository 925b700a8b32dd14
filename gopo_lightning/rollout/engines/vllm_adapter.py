"""A LoRA adapter in vLLM, beside its base, which vLLM is given once (`adapter_only` of `VLLMEngine`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gopo_lightning.distributed.whole_weights import merged_weights

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""For which vLLM makes room."""
LOAD_FORMAT = "gopo_lightning"
_given: Iterator[tuple[str, Tensor]] | None = None
"""What the loader reads: vLLM is in this process."""


def options_for(model: nn.Module) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for a policy with an adapter like that of ``model``.

    Raises:
        ValueError: it has no adapter, or one that vLLM does not run as the policy does.
    """
    if not isinstance(model, PeftModel):
        raise ValueError("adapter_only=True of VLLMEngine sends the adapter alone: set policy.lora, or leave it out.")
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and (
            not isinstance(layer, lora.Linear) or any(layer.use_dora.values()) or any(layer.lora_bias.values())
        ):
            raise ValueError(
                f"adapter_only=True of VLLMEngine: {name} has an adapter of another kind than LoRA on a linear layer "
                "without use_dora and lora_bias. Leave adapter_only out: the adapter is then merged into the weights."
            )
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    if config.modules_to_save or config.bias != "none" or config.trainable_token_indices:
        raise ValueError(
            "adapter_only=True of VLLMEngine: the adapter also has modules_to_save, bias or trainable_token_indices, "
            "which vLLM's adapters have not. Leave adapter_only or these out."
        )
    largest = max([config.r, *(config.rank_pattern or {}).values()])  # vLLM looks at both
    room = next((rank for rank in _RANKS if rank >= largest), None)
    if room is None:
        raise ValueError(f"adapter_only=True of VLLMEngine: rank {largest} is above vLLM's {_RANKS[-1]}. Leave it out.")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


@contextmanager
def base_given(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a model of vLLM's that is loaded by ``LOAD_FORMAT`` gets the weights of the base of ``model``.

    A collective where a forward of ``model`` is one.
    """
    global _given
    _register_loader()
    assert isinstance(model, PeftModel)
    with model.disable_adapter():
        weights = _given = ((name, value.to(dtype, copy=True)) for name, value in merged_weights(model))
        try:
            yield
        finally:
            for _ in weights:  # where vLLM has failed, other ranks still gather
                pass
            _given = None


@contextmanager
def requested(model: nn.Module, number: int) -> Iterator[Any]:
    """The adapter as it is now, as vLLM's ``LoRARequest``; None where it is off, and the model is its base.

    A collective where weights are sharded. ``number`` is above 0, and another one each time.
    """
    assert isinstance(model, PeftModel)
    if all(layer.disable_adapters for layer in _layers(model)):
        yield None
        return
    from vllm.lora.request import LoRARequest

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    with TemporaryDirectory() as folder:
        model.peft_config["default"].save_pretrained(folder)
        tensors = {name: value.detach().cpu().contiguous() for name, value in whole.items()}
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        yield LoRARequest(f"policy-{number}", number, folder)


def _layers(model: nn.Module) -> list[lora.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, lora.Linear)]


@cache
def _register_loader() -> None:
    """Tell vLLM of ``LOAD_FORMAT``, once."""
    from vllm.model_executor import model_loader

    @model_loader.register_model_loader(LOAD_FORMAT)
    class FromPolicy(model_loader.BaseModelLoader):  # type: ignore[name-defined,misc,unused-ignore]
        """Reads what ``base_given`` gives."""

        def download_model(self, model_config: Any) -> None:
            """It is here."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            """All of it."""
            assert _given is not None
            model.load_weights(_given)


__all__ = ["LOAD_FORMAT", "base_given", "options_for", "requested"]
