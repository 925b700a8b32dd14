"""One run of the study: its config, its process, its line in the results."""

import ast
import contextlib
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import fields
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from gopo_lightning.data.json_lines import dumps, read_jsonl
from scripts.study.design import OF_GOPO, POLICIES, Run

CONFIGS = Path("configs/study")
MEASURED = ("judge/reward", "judge/win_rate", "proxy/reward", "length_mean", "truncated_fraction")
"""At every evaluation, as ``val/…``."""
TRAINED = (
    "train/kl",
    "train/entropy",
    "train/grad_norm",
    "train/clip_low_fraction",
    "train/clip_high_fraction",
    "reward/within_group_std",
    "reward/tied_pair_fraction",
    "reward/rescued_groups",
    "completion/length_mean",
    "completion/truncated_fraction",
)
"""Means over the steps from one evaluation to the next."""
MAX_GRAD_NORM = 1.0


def folder(run: Run) -> Path:
    """Where the run writes."""
    return Path("runs/study") / run.key


def layers(run: Run) -> list[Path]:
    """The files that the run is configured by, without what is its own."""
    reward = f"{run.reward}_rescued" if run.method == "gopo_rescued" else run.reward
    name = f"{OF_GOPO.get(run.method, run.method)}.yaml"
    places = [Path("configs") / place / name for place in ("advantage", "study/method", "methods")]
    base = [CONFIGS / f"{layer}.yaml" for layer in POLICIES[run.policy].base]
    folder = CONFIGS / (run.policy if run.policy == "smollm2" else "reward")
    shape = [] if reward == "clean" else [folder / f"{reward}.yaml"]
    return [*base, *shape, next(place for place in places if place.exists())]


def made_of(run: Run) -> str:
    """A digest of what decides the numbers beside the package and the assets: configs and rewards, comments aside."""
    configs = [(file.name, yaml.safe_load(file.read_text())) for file in layers(run)]
    return _digest(repr((configs, _code(Path("scripts/study/rewards.py")))).encode())


@cache
def assets_here(policy: str) -> str:
    """Which assets these are: a digest of what was measured of them. Other machines round otherwise and make others."""
    facts = Path("runs/study/assets") / POLICIES[policy].assets
    return _digest(facts.read_bytes()) if facts.exists() else "not made here"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _code(path: Path) -> str:
    """The syntax tree, without docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]  # type: ignore[attr-defined]
    return ast.dump(tree)


def config(run: Run) -> list[Path]:
    """The layers of the run; the last is written into its folder."""
    files = layers(run)
    of_layers = [yaml.safe_load(file.read_text()).get("model", {}).get("init_args", {}) for file in files]
    reward = [layer["rewards"] for layer in of_layers if "sources" in layer.get("rewards", {})][-1]
    if reward["sources"][0]["class_path"].endswith("Proxy"):
        reward["sources"][0]["init_args"]["seed"] = run.seed
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": run.lr, "weight_decay": 0.0, "fused": True}}
    data: dict[str, Any] = {"prompts_per_step": POLICIES[run.policy].sampled // run.group_size}
    if run.table == "tuning":
        data["validation"] = {"path": f"runs/study/assets/{POLICIES[run.policy].tuning_prompts}.jsonl"}
    version = {"save_dir": "runs", "name": "study", "version": run.key}
    own = {
        "seed_everything": run.seed,
        "trainer": {
            "max_steps": run.steps,
            "logger": {"class_path": "TensorBoardLogger", "init_args": version},
        },
        "model": {
            "init_args": {
                "rewards": reward,
                "rollout": {"num_completions": run.group_size},
                "update": {"optimizer": optimizer},
            }
        },
        "data": {"init_args": data},
    }
    folder(run).mkdir(parents=True, exist_ok=True)
    path = folder(run) / "overlay.yaml"
    path.write_text(yaml.safe_dump(own, sort_keys=False))
    return [*files, path]


def start(run: Run, results: Path) -> int:
    """The process id of a child that trains and appends its line to ``results``; its exit status is 0 if it did."""
    configs, commit, digest = config(run), _commit(), made_of(run)
    for old in folder(run).glob("events.*"):  # of an attempt that was stopped
        old.unlink()
    child = os.fork()
    if child:
        return child
    status = 1
    with (folder(run) / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            began = time.time()
            torch.set_num_threads(1)
            from gopo_lightning.commands import lightning_cli

            files = [argument for file in configs for argument in ("--config", str(file))]
            sys.argv = ["gopo_lightning", "fit", *files, f"--export_dir={folder(run) / 'policy'}"]
            lightning_cli.run()
            facts = {
                "commit": commit,
                "made_of": digest,
                "assets": assets_here(run.policy),
                "seconds": round(time.time() - began, 1),
            }
            _append(results, {"key": run.key, **run.record(), **facts, **measured(run)})
            if run.seed != 1:
                shutil.rmtree(folder(run) / "policy")  # it would be gigabytes
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it is, it belongs to this run's log
            traceback.print_exc()
    os._exit(status)


def measured(run: Run) -> dict[str, Any]:
    """The curves of a finished run, its sampled tokens, and how often the gradient was clipped."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder(run)), size_guidance={"scalars": 0, "tensors": 1, "histograms": 1})
    events.Reload()
    points = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    steps = sorted(points["val/reward"])
    if steps[-1] != run.steps:
        raise ValueError(f"{run.name} was last evaluated at step {steps[-1]}, not {run.steps}")
    curves = {f"val/{tag}": [_round(points[f"val/{tag}"][step]) for step in steps] for tag in MEASURED}
    for tag in filter(points.__contains__, TRAINED):  # not every loss has every curve
        parts = [[v for s, v in points[tag].items() if low < s <= high] for low, high in itertools.pairwise(steps)]
        curves[tag] = [_round(fmean(part)) for part in parts]
    norms = list(points["train/grad_norm"].values())
    return {
        "steps_evaluated": steps,
        "curves": curves,
        "sampled_tokens": round(POLICIES[run.policy].sampled * sum(points["completion/length_mean"].values())),
        "gradient_clip_active": _round(sum(norm > MAX_GRAD_NORM for norm in norms) / len(norms)),
    }


def read(results: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Assets → key → result, of the runs whose configs and rewards are those that are here now."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    others = 0
    for row in read_jsonl(results) if results.exists() else ():
        run = Run(**{field.name: row[field.name] for field in fields(Run) if field.name in row})
        if row["made_of"] == made_of(run):
            found.setdefault(row["assets"], {})[row["key"]] = row
        else:
            others += 1
    if others:
        print(f"{others} runs in {results} were made of other configs or rewards, and are left out")
    return found


def _append(results: Path, row: dict[str, Any]) -> None:
    """A whole line at once: several processes write."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("ab", buffering=0) as file:
        file.write((dumps(row) + "\n").encode())


def _commit() -> str:
    """Of the working tree; `+` where files have changed since."""
    describe = ["git", "describe", "--always", "--exclude=*", "--dirty=+", "--abbrev=9"]
    return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()


def _round(value: float) -> float:
    """Five significant digits are enough for a table."""
    return float(f"{value:.5g}")
