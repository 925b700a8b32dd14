"""Run folders as training leaves them, made by hand: known values at known steps and times."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter


def write_events(
    folder: Path, scalars: Mapping[str, Mapping[int, float]], texts: Mapping[str, Mapping[int, str]] | None = None
) -> Path:
    """One event file more in ``folder``; a step takes one second, whatever its number."""
    earlier = len(list(folder.glob("events.*")))
    writer = SummaryWriter(str(folder), filename_suffix=f".{earlier}")
    start = time.time()
    steps = sorted({step for curve in scalars.values() for step in curve})
    writer.add_scalar("hp_metric", -1, 0)
    for i, step in enumerate(steps):
        for tag, curve in scalars.items():
            if step in curve:
                writer.add_scalar(tag, curve[step], step, walltime=start + i + 1)
    for tag, written in (texts or {}).items():
        for step, text in written.items():
            writer.add_text(tag, text, step)
    writer.close()
    return next(folder.glob(f"events.*.{earlier}"))


def write_config(folder: Path, seed: int = 1, **changes: str) -> None:
    """``model.init_args.objective.advantage`` and the like in ``changes``, with `__` for dots."""
    config: dict[str, Any] = {
        "seed_everything": seed,
        "trainer": {"max_steps": 20, "logger": {"init_args": {"version": folder.name}}},
        "model": {"class_path": "gopo_lightning.GOPOModule", "init_args": {"objective": {}, "seed": None}},
        "data": {"init_args": {"prompts_per_step": 4, "seed": None}},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def write_run(
    folder: Path,
    advantage: str,
    seed: int,
    rewards: Mapping[int, float],
    texts: Mapping[str, Mapping[int, str]] | None = None,
) -> Path:
    """``rewards`` in validation and in training."""
    write_config(folder, seed, model__init_args__objective__advantage=advantage)
    trained = {step: value for step, value in rewards.items() if step > 0}
    write_events(folder, {"val/reward": rewards, "reward/mean": trained}, texts)
    return folder
