"""An export of a checkpoint: weights on the CPU, from the model's part of the run's config; no trainer and no data."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn

from gopo_lightning.distributed.checkpoints import TrainableState, load_checkpoint, newest
from gopo_lightning.policy.model import PolicyConfig, load_policy, load_tokenizer
from gopo_lightning.training.callbacks.export import export_policy
from gopo_lightning.training.callbacks.run_record import recorded_in
from gopo_lightning.training.config import as_config
from gopo_lightning.training.model_card import model_card
from gopo_lightning.training.resume import check_checkpoint
from gopo_lightning.training.reward_model.export import export_reward_model
from gopo_lightning.training.reward_model.module import RewardModelModule

_OF_THE_MODEL = ("model", "revision", "tokenizer", "max_length", "trust_remote_code", "lora")
"""Arguments of `RewardModelModule` that say what its weights belong to."""


def find_checkpoint(given: Path) -> Path:
    """``given``, or if that is a folder the last whole checkpoint in it.

    Raises:
        ValueError: nothing is there, no whole checkpoint, or one of several files.
    """
    if not given.exists():
        raise ValueError(f"there is nothing at {given}. Name a checkpoint (.ckpt), or the folder of a run.")
    if not given.is_dir():
        return given
    if (given / ".metadata").exists():
        raise ValueError(
            f"{given} is a checkpoint in shards, which this project does not write. Make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {given}`, and name that file."
        )
    found = newest(given.rglob("*.ckpt"))
    if found is None:
        raise ValueError(f"{given} holds no whole checkpoint. Name a checkpoint (.ckpt), or the folder of a run.")
    return found


def export_checkpoint(path: Path, model: Mapping[str, Any], folder: Path, *, merge_adapter: bool = False) -> Path:
    """Write what the checkpoint at ``path`` has trained to ``folder``; where it is now.

    Args:
        path: of the checkpoint.
        model: `model.init_args` of the run's config.
        folder: of the export.
        merge_adapter: add a LoRA adapter to its base and write all weights. (Those of a reward model always are.)

    Raises:
        ValueError: the checkpoint is not whole, or not of ``model``; or there is no adapter to merge.
    """
    checkpoint = load_checkpoint(path, mmap=True)
    if any(name.startswith("policy.") for name in checkpoint["state_dict"]) and "policy" in model:
        return _export_policy(checkpoint, model, folder, merge_adapter)
    if any(name.startswith("model.") for name in checkpoint["state_dict"]) and "model" in model:
        return _export_reward_model(checkpoint, model, folder, merge_adapter)
    raise ValueError(
        f"{path} and the config are of different kinds: the checkpoint holds {_first(checkpoint['state_dict'])}, the "
        f"config's model.init_args {_first(model)}. Give the config of that run (--config)."
    )


def _export_policy(checkpoint: dict[str, Any], model: Mapping[str, Any], folder: Path, merge: bool) -> Path:
    config = as_config(PolicyConfig, model["policy"], "model.init_args.policy")
    on_cpu = replace(config, attn_implementation=None, compile=False, gradient_checkpointing=False)
    policy: Any = load_policy(on_cpu)
    _check_merge(policy, merge)
    check_checkpoint(
        checkpoint,
        {"policy": config.describe()},
        ("policy",),
        model.get("on_setting_change", "refuse"),
        training=False,
    )
    holder = TrainableState()
    holder.policy = policy
    holder.load_state_dict(checkpoint["state_dict"])
    if merge:
        policy = policy.merge_and_unload()
    card = _card(checkpoint, policy)
    return cast(Path, export_policy(policy, load_tokenizer(config), folder, card=card))


def _export_reward_model(checkpoint: dict[str, Any], model: Mapping[str, Any], folder: Path, merge: bool) -> Path:
    module = RewardModelModule(**{name: model[name] for name in _OF_THE_MODEL if name in model})
    _check_merge(module.model, merge)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is of another reward model than {model['model']}: {error}") from error
    return export_reward_model(module.model, module.tokenizer, folder, _card(checkpoint, None))


def _check_merge(model: nn.Module, merge: bool) -> None:
    if merge and not isinstance(model, PeftModel):
        raise ValueError("--merge_adapter: the checkpoint holds whole weights, and no adapter. Leave it out.")


def _card(checkpoint: dict[str, Any], policy: Any) -> str:
    return model_card(
        recorded_in(checkpoint), step=int(checkpoint["global_step"]), is_adapter=isinstance(policy, PeftModel)
    )


def _first(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:3]) or "nothing"
