"""Every overlay of configs/methods on a small task: it trains on one process and on two ranks, and resumes bit-exactly.

`make test-methods` runs all of them; an ordinary run of the tests takes a third, chosen by a seed, which is that of the
day or METHODS_SEED and is printed at the end of the run. A new file in configs/methods is found by itself; what it
needs beside the small task stands in NEEDS. An overlay that asks a judge asks one on loopback.
"""

import contextlib
import datetime
import json
import math
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import meta_judge
from tests.loopback import serving
from tests.test_resume import assert_identical
from tests.use import commands

METHODS = {path.stem: path.resolve() for path in sorted(Path("configs/methods").glob("*.yaml"))}
VOWELS = {"class_path": "gopo_lightning.rewards.FunctionReward", "init_args": {"function": "tests.runs.count_vowels"}}
NEEDS: dict[str, dict[str, Any]] = {
    "hapo": {"data": {"init_args": {"train": {"limit": 4}}}},  # each prompt in each step
    "zo_ranksgd": {"model": {"init_args": {"rewards": {"sources": [VOWELS]}}}},  # few scores may rank no two policies
}
"""Overlays on the task, by the method's name: `{"model": {"init_args": …}}`."""
JUDGE_URL = "http://localhost:8000/v1"
"""Of the judge's server in the overlays."""
SEED = os.environ.get("METHODS_SEED") or str(datetime.date.today().toordinal())
CHOSEN = (
    sorted(METHODS)
    if SEED == "all"
    else sorted(random.Random(SEED).sample(sorted(METHODS), math.ceil(len(METHODS) / 3)))
)


def task(policy: Path, prompts: Path) -> dict[str, Any]:
    """Completions of natural lengths, rewards with ties, and some that are not valid."""
    reward = {
        "class_path": "gopo_lightning.rewards.FunctionReward",
        "init_args": {"function": "tests.runs.some_invalid"},
    }
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -1, "filename": "{step}"}}
    return {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
            "callbacks": [checkpoint],
        },
        "model": {
            "class_path": "gopo_lightning.GOPOModule",
            "init_args": {
                "policy": {"name": str(policy)},
                "rewards": {"sources": [reward]},
                "rollout": {"num_completions": 4, "eval_num_completions": 2, "sampling": {"max_new_tokens": 24}},
                "objective": {"log_entropy": False},
                "update": {
                    "warmup_steps": 0,
                    "micro_batch_tokens": 200,
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "eps": 1e-3}},
                },
            },
        },
        "data": {
            "class_path": "gopo_lightning.PromptDataModule",
            "init_args": {
                "train": {"path": str(prompts)},
                "validation": {"path": str(prompts), "limit": 4},
                "prompts_per_step": 4,
            },
        },
    }


def updates_per_rollout(layers: list[Mapping[str, Any]]) -> int:
    """Of the last layer that says so."""
    options: dict[str, int] = {}
    for layer in layers:
        options |= layer.get("model", {}).get("init_args", {}).get("update", {})
    return options.get("num_inner_epochs", 1) * options.get("num_minibatches", 1)


def logged(path: Path) -> set[str]:
    """Tags of the objective and the transforms in a CSV file of metrics."""
    return {tag for tag in path.read_text().splitlines()[0].split(",") if tag.startswith(("train/", "transform/"))}


def defined() -> set[str]:
    """Tags that docs/metrics.md has."""
    return {line.split("`")[1] for line in Path("docs/metrics.md").read_text().splitlines() if line.startswith("| `")}


@pytest.fixture(scope="module")
def _warm() -> None:
    commands.preload()


@pytest.mark.slow
@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("name", CHOSEN)
def test_a_method_trains_on_two_ranks_as_on_one_and_resumes(
    name: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """Two rollouts; the resume begins at the second."""
    overlay, server = METHODS[name].read_text(), contextlib.ExitStack()
    if JUDGE_URL in overlay:
        pytest.importorskip("openai")
        judge = server.enter_context(serving())
        judge.answer = meta_judge.answer
        overlay = overlay.replace(JUDGE_URL, judge.url).replace("every: 10\n", "every: 1\n")
    with server:
        check_method(name, overlay, tiny_policy, prompts_file, tmp_path)


def check_method(name: str, overlay: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    rows = [{"anchor": "b" * i, **json.loads(line)} for i, line in enumerate(prompts_file.read_text().splitlines())]
    (prompts := tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "overlay.yaml").write_text(overlay)
    layers = [task(tiny_policy, prompts), NEEDS.get(name, {}), yaml.safe_load(overlay)]
    configs = []
    for number, layer in enumerate(layers[:2]):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(layer))
        configs.append(f"--config={tmp_path / f'{number}.yaml'}")
    configs.append(f"--config={tmp_path / 'overlay.yaml'}")
    updates = updates_per_rollout(layers)
    steps = [f"--trainer.max_steps={2 * updates}"]

    def fit(run: str, *options: str, processes: int = 1) -> dict[str, Any]:
        """The last checkpoint of the run."""
        logger = [f"--trainer.logger.init_args.name={run}", "--trainer.logger.init_args.version=a"]
        every = [f"--trainer.callbacks.every_n_train_steps={updates}"]
        ended = commands.run(["fit", *configs, *steps, *logger, *every, *options], tmp_path, processes=processes)
        assert ended.code == 0, f"{name} (METHODS_SEED={SEED}): {ended.line}\n{ended.text[-3000:]}"
        path = tmp_path / run / "a" / "checkpoints" / f"step={2 * updates}.ckpt"
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]

    whole = fit("whole")
    first = torch.load(tmp_path / "whole/a/checkpoints" / f"step={updates}.ckpt", weights_only=True)
    weights, earlier = whole["state_dict"], first["state_dict"]
    assert any(not torch.equal(weights[key], earlier[key]) for key in weights), "nothing was trained"

    resumed = fit("resumed", f"--ckpt_path={tmp_path}/whole/a/checkpoints/step={updates}.ckpt")
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_identical(resumed[key], whole[key])

    assert logged(tmp_path / "whole/a/metrics.csv") <= defined()
    ranks = fit("ranks", "--trainer.devices=2", "--trainer.strategy=ddp", processes=2)
    for key, tensor in whole["state_dict"].items():
        torch.testing.assert_close(
            ranks["state_dict"][key], tensor, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_every_need_belongs_to_a_method() -> None:
    assert NEEDS.keys() <= METHODS.keys()
