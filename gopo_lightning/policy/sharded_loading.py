"""Models that no process could hold whole: built without weights, sharded, and read from safetensors by shards."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from gopo_lightning.distributed.decoder_layers import base_of
from gopo_lightning.policy.loading import folder_of
from gopo_lightning.policy.model import Policy, PolicyConfig, load_policy

_READ_WEIGHTS = ("use_dora", "modules_to_save", "trainable_token_indices")
"""Options of LoRA that look at the weights when the adapter is made."""


def policy_without_weights(config: PolicyConfig) -> Policy:
    """The trainable policy; the weights of the base are on the meta device, buffers and adapter are there.

    Raises:
        ValueError: an adapter that is made from the weights.
    """
    lora = config.lora or {}
    if config.adapter is not None:
        raise ValueError(
            f"policy.name={config.name} is an adapter, which placement.load=shards cannot read; set placement.load: "
            "whole, or merge it into its base and name that folder"
        )
    reads = [option for option in _READ_WEIGHTS if lora.get(option)]
    if reads:
        raise ValueError(
            f"policy.lora={lora} makes the adapter from the weights, which placement.load=shards reads after it; leave "
            f"out {', '.join(_READ_WEIGHTS)}, or set placement.load: whole"
        )
    base = model_without_weights(
        AutoModelForCausalLM, config.name, config.revision, config.torch_dtype, **config.model_options
    )
    # peft puts the adapter where the base is, so that must not look like the meta device
    ghosts = _replace(base, {p: torch.empty((), dtype=p.dtype).expand(p.shape) for p in base.parameters()})
    policy = load_policy(config, base)
    _replace(policy, {g: torch.empty(g.shape, dtype=g.dtype, device="meta") for g in ghosts})
    return policy


def model_without_weights(
    auto_class: Any,
    name: str,
    revision: str | None,
    dtype: torch.dtype | None,
    **options: Any,
) -> PreTrainedModel:
    """The model ``name`` of ``auto_class``, its weights on the meta device; ``dtype`` None for that of its files.

    ``options`` are those of ``from_config``, ``trust_remote_code`` among them.
    """
    folder = folder_of(name, revision, fetch=True)
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=options.get("trust_remote_code", False))
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(settings, dtype=dtype or settings.dtype, **options)
    model.tie_weights()  # each parameter has become another one
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return cast(PreTrainedModel, model)


def fill_shards(model: nn.Module, name: str, revision: str | None, device: torch.device) -> None:
    """Give a sharded ``model`` its weights on ``device``: each rank reads the rows of its shards from safetensors.

    They are converted to the model's dtype. Adapters, which are not on the meta device, stay as they are.

    Raises:
        ValueError: a weight of the model is not in the files under its own name.
    """
    folder, base = folder_of(name, revision, fetch=True), base_of(model)
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    names: dict[nn.Parameter, list[str]] = {}  # several names of one that is tied
    for alias, parameter in base.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            names.setdefault(parameter, []).append(alias)
    shards: dict[str, Tensor] = {}
    filled: dict[str, nn.Parameter] = {}
    for parameter, aliases in names.items():
        plain = [alias.replace(".base_layer.", ".") for alias in aliases]
        found = next((alias for alias in plain if alias in stored), None)
        if found is None:
            raise ValueError(
                f"{name} holds no tensor {plain[0]!r} in its safetensors, which are read by shards under the "
                "model's own names. Set model.init_args.placement.load: whole."
            )
        shards[found] = torch.empty_like(parameter.detach(), device=device)
        filled |= dict.fromkeys(aliases, nn.Parameter(shards[found], requires_grad=parameter.requires_grad))
    dcp.load(shards, storage_reader=reader)
    loaded = cast(PreTrainedModel, base).config.dtype
    for shard in shards.values():
        if shard.dtype != loaded:  # a head that computes in float32 has the model's dtype where it is loaded whole
            shard.copy_(shard.to(loaded))
    base.load_state_dict(filled, strict=False, assign=True)


def _replace(model: nn.Module, new: Mapping[nn.Parameter, Tensor]) -> list[nn.Parameter]:
    """Put ``new`` parameters in the place of old ones, tied ones for tied ones; returns them."""
    made = {old: nn.Parameter(tensor, requires_grad=old.requires_grad) for old, tensor in new.items()}
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if parameter in made:
                setattr(module, name, made[parameter])
    return list(made.values())
