"""What a run left behind: its curves, its checkpoints, and every file that must be JSON."""

import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curves = dict[str, dict[int, float]]
"""Tag → optimiser step → value."""


def curves(run: Path) -> Curves:
    """The scalars in the event file or metrics.csv of folder ``run``."""
    found: Curves = defaultdict(dict)
    if (table := run / "metrics.csv").exists():
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                for tag, value in row.items():
                    if tag != "step" and value:
                        found[tag][int(row["step"])] = float(value)
        return dict(found)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def checkpoint(run: Path, step: int) -> Path:
    """The checkpoint of optimiser step ``step``."""
    return run / "checkpoints" / f"step{step}.ckpt"


def state(path: Path) -> dict[str, Any]:
    """Weights and moments of a checkpoint by name, and the learning rates."""
    content = torch.load(path, weights_only=True)
    (optimizer,) = content["optimizer_states"]
    moments = {f"{i}.{name}": value for i, values in optimizer["state"].items() for name, value in values.items()}
    rates = {f"lr {i}": group["lr"] for i, group in enumerate(optimizer["param_groups"])}
    return content["state_dict"] | moments | rates


def json_problems(folder: Path) -> list[str]:
    """Every .json and .jsonl file under ``folder`` that strict JSON does not read; Infinity and NaN are not JSON."""
    problems = []
    for path in sorted(folder.rglob("*.json*")):
        if path.suffix not in (".json", ".jsonl"):
            continue
        text = path.read_text(encoding="utf-8")
        for number, part in enumerate(text.split("\n") if path.suffix == ".jsonl" else [text], start=1):
            if part or path.suffix == ".json":
                try:
                    json.loads(part, parse_constant=_refuse)
                except ValueError as error:
                    problems.append(f"{path.relative_to(folder)}, line {number}: not JSON ({error})")
    return problems


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def differences(mine: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> list[str]:
    """Names whose numbers differ by more than ``tolerance`` (absolute, or relative above 1), or that one side lacks."""
    found = [f"{name}: only on one side" for name in sorted(mine.keys() ^ other.keys())]
    for name in sorted(mine.keys() & other.keys()):
        a, b = (torch.as_tensor(side[name], dtype=torch.float64) for side in (mine, other))
        if a.shape != b.shape:
            found.append(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
            continue
        same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance * b.abs().clamp(min=1))
        if not same.all():
            worst = float((a - b).abs().nan_to_num(math.inf).max())
            shown = f"{a.item():.9g} and {b.item():.9g}" if a.dim() == 0 else f"by up to {worst:.3g}"
            found.append(f"{name}: {shown}")
    return found


def at(found: Curves, step: int, *prefixes: str) -> dict[str, float]:
    """Values at ``step`` of the tags that begin with one of ``prefixes``."""
    return {tag: values[step] for tag, values in found.items() if tag.startswith(prefixes) and step in values}
