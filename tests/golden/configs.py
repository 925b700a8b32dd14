"""What the shipped configs build, field by field: a config that is written otherwise must build the same.

``python -m tests.golden.configs`` records it in ``configs.json`` again.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.training.gopo_module import GOPOModule

RECORD = Path(__file__).with_name("configs.json")
CONFIGS = Path("configs")


def describe(*arguments: str) -> dict[str, Any]:
    """Every value that the command line builds from ``arguments``, in plain types."""
    cli = run([*arguments, "--trainer.accelerator=cpu", "--trainer.logger=false"], instantiate_only=True)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    described: dict[str, Any] = {
        "data": _plain({key: value for key, value in vars(data).items() if not key.startswith("__")}),
        "precision": str(trainer.precision),
        "max_steps": trainer.max_steps,
        "val_check_interval": trainer.val_check_interval,
        "check_val_every_n_epoch": trainer.check_val_every_n_epoch,
        "callbacks": sorted(type(callback).__name__ for callback in trainer.callbacks),
    }
    if isinstance(module, GOPOModule):
        return described | _policy_module(module)
    return described | {"settings": _plain(module._settings), "optimizer": _optimizer(module.optimizer_callable)}


def _policy_module(module: GOPOModule) -> dict[str, Any]:
    collector, objective, update = module.collector, module.objective_config, module.update_config
    settings = module._settings
    return {
        "policy": _plain(module.policy_config),
        "sampling": _plain(module.sampling),
        "loss": _plain(module.loss),
        "placement": _plain(module.placement),
        "schedule": _plain(module.schedule),
        "optimizer": _optimizer(module.optimizer_callable),
        "settings": {
            "seed": module.seed,
            "num_completions": settings["rollout"]["num_completions"],
            "sampling": _plain(settings["rollout"]["sampling"]),
            "rewards": settings["rewards"]["sources"],
            "combine": settings["rewards"]["combine"]["function"],
            "combine_options": settings["rewards"]["combine"].get("init_args", {}),
            "advantage": settings["objective"]["advantage"]["function"],
            "advantage_options": settings["objective"]["advantage"].get("init_args", {}),
            "loss": {k: v for k, v in settings["objective"]["loss"].items() if k != "class"},
            **settings["update"],
        },
        "engine": {"class": type(collector.engine).__name__, **_options(collector.engine)},
        "rewards": [{"class": type(s).__name__, **_plain(vars(s))} for s in collector.sources],
        "from_wins": module.shaping.from_wins,
        "num_completions": module.rollout_config.num_completions,
        "eval_num_completions": module.validation.num_completions,
        "reward_timeout_seconds": collector.timeout_seconds,
        "micro_batch_tokens": update.micro_batch_tokens,
        "prefix_sharing": update.prefix_sharing,
        "log_entropy": objective.log_entropy,
        "log_reference_kl": objective.log_reference_kl,
        "on_setting_change": module.on_setting_change,
    }


def _options(thing: Any) -> dict[str, Any]:
    """Without its state."""
    return {key: value for key, value in _plain(vars(thing)).items() if not key.startswith("_")}


def _optimizer(build: Any) -> Any:
    optimizer = build([nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    return {"class": type(optimizer).__name__, **_plain({key: group[key] for key in group if key != "params"})}


def _plain(value: Any) -> Any:
    """Nested dicts and lists of JSON's types; objects by their fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):  # in an order that is the same in every process
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Path | torch.dtype):
        return str(value)
    if hasattr(value, "__dict__") and type(value).__module__.startswith("gopo_lightning"):
        return {"class": type(value).__name__, **_plain(vars(value))}
    return re.sub(r" at 0x[0-9a-f]+|^<?(class|function) |gopo_lightning[\w.]*\.", "", str(value))


def is_whole(path: Path) -> bool:
    """Whether a config can be run alone; an overlay names no class of the model."""
    return "class_path" in yaml.safe_load(path.read_text()).get("model", {})


def combinations() -> list[tuple[Path, ...]]:
    """Every whole config alone, and with the overlays that make another method of it."""
    baseline, quickstart = CONFIGS / "advantage" / "grpo.yaml", CONFIGS / "quickstart"
    return [
        *((path,) for path in sorted(CONFIGS.rglob("*.yaml")) if is_whole(path)),
        *((path, baseline) for path in sorted((CONFIGS / "paper").iterdir())),
        *((quickstart / "gopo.yaml", quickstart / name) for name in ("borda.yaml", "pairwise.yaml")),
    ]


def record() -> dict[str, Any]:
    """By the paths of the layers."""
    return {"+".join(map(str, layers)): describe(*(f"--config={path}" for path in layers)) for layers in combinations()}


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORD
    target.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
