"""Names of before 0.2.0: flags and configs that use one are told the new one. Goes with 0.3.0."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gopo_lightning.commands.layers import files, options

ARGUMENTS = {
    "sampling": "rollout.sampling",
    "num_completions": "rollout.num_completions",
    "eval_num_completions": "rollout.eval_num_completions",
    "engine": "rollout.engine",
    "combine": "rewards.combine",
    "combine_options": "rewards.combine: {function: NAME, init_args: {…}}",
    "reward_timeout_seconds": "rewards.timeout_seconds",
    "max_invalid_steps": "rewards.max_invalid_steps",
    "advantage": "objective.advantage",
    "advantage_options": "objective.advantage: {function: NAME, init_args: {…}}",
    "loss": "objective.loss: {class_path: gopo_lightning.objectives.ClippedSurrogate, init_args: {…}}",
    "log_entropy": "objective.log_entropy",
    "log_reference_kl": "objective.log_reference_kl",
    "optimizer": "update.optimizer",
    "lr_schedule": "update.lr_schedule",
    "warmup_steps": "update.warmup_steps",
    "warmup_start": "update.warmup_start",
    "lr_schedule_options": "update.lr_schedule_options",
    "max_grad_norm": "update.max_grad_norm",
    "micro_batch_tokens": "update.micro_batch_tokens",
    "num_inner_epochs": "update.num_inner_epochs",
    "num_minibatches": "update.num_minibatches",
    "prefix_sharing": "update.prefix_sharing",
}
"""Argument of `GOPOModule` → its place in the groups."""
_SOURCES = "rewards.sources"
_FLAG = re.compile(r"--model\.(?:init_args\.)?(\w+)(.*)", re.DOTALL)


def refuse_old_names(arguments: Sequence[str]) -> None:
    """Refuse command-line ``arguments`` for a `GOPOModule` that have old names, or configs that do.

    Raises:
        ValueError: names the new place of each.
    """
    configs = list(_configs(arguments))
    named = [model.get("class_path") for _, model in configs]
    named += [value for option, value in options(arguments) if option in ("--model", "--model.class_path")]
    if not any(str(name).endswith("GOPOModule") for name in named):
        return
    found = [line for argument in arguments for line in _in_flag(argument)]
    found += [line for path, model in configs for line in _in_config(path, model)]
    if found:
        raise ValueError("names of an earlier version:\n" + "\n".join(found))


def _in_flag(argument: str) -> Iterator[str]:
    match = _FLAG.fullmatch(argument)
    if match is None:
        return
    name, rest = match.groups()
    if name in ARGUMENTS:
        yield f"  --model.init_args.{name} is now --model.init_args.{ARGUMENTS[name]}"
    elif name == "rewards" and rest.lstrip("+=").startswith("["):
        yield f"  --model.init_args.rewards is now --model.init_args.{_SOURCES}"


def _in_config(path: Path, model: Mapping[str, Any]) -> Iterator[str]:
    options = model.get("init_args", model)
    for name, value in options.items() if isinstance(options, Mapping) else ():
        if name in ARGUMENTS:
            yield f"  {path}: model.init_args.{name} is now model.init_args.{ARGUMENTS[name]}"
        elif name == "rewards" and isinstance(value, list):
            yield f"  {path}: the list model.init_args.rewards is now model.init_args.{_SOURCES}"


def _configs(arguments: Sequence[str]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Files given as configs, with what they say of the model."""
    for path in files(arguments):
        model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model")
        if isinstance(model, Mapping):
            yield path, model
