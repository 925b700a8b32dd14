"""Two ranks learn from comparisons as one process does: policies from pairwise sources, reward models from lists."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gopo_lightning.rewards import FunctionComparator, RankingOracle
from tests.ranks import Case, launch, run_case
from tests.test_cli import events, gopo
from tests.test_reward_formats import CONFIG, causal_lm  # noqa: F401  (a fixture)


def bytes_mod_5(text: str) -> int:
    return sum(text.encode()) % 5


def compare(first: list[str], second: list[str]) -> list[float | None]:
    """Prefers what it sees first, so that the order shows; abstains on some; ties."""
    scores = [(bytes_mod_5(a), bytes_mod_5(b)) for a, b in zip(first, second, strict=True)]
    return [None if a + b == 7 else 0.5 if a == b else 0.9 if a > b else 0.2 for a, b in scores]


def order(completions: list[str]) -> list[list[int]]:
    """Ranks with ties; texts whose sum is 4 are left out."""
    return [[i for i, c in enumerate(completions) if bytes_mod_5(c) == n] for n in (3, 2, 1, 0)]


RUNS = {
    "comparator": Case(
        "comparator",
        module={"rewards": [FunctionComparator("tests.test_rewards_on_ranks.compare", num_opponents=2)]},
    ),
    "oracle": Case("oracle", module={"rewards": [RankingOracle("tests.test_rewards_on_ranks.order")]}),
    "borda": Case(
        "borda",
        module={
            "rewards": [
                FunctionComparator("tests.test_rewards_on_ranks.compare", both_orders=True),
                RankingOracle("tests.test_rewards_on_ranks.order"),
            ],
            "combine": "borda",
        },
    ),
}


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for case in RUNS.values():
        run_case(case, tiny_policy, prompts_file, folder, 1)
    cases = [Case(f"ddp-{name}", "ddp", module=case.module) for name, case in RUNS.items()]
    launch(cases, tiny_policy, prompts_file, folder, 2)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_pairwise_source_on_two_ranks(name: str, results: Path) -> None:
    """The same questions in the same order, so the same texts, metrics and weights."""
    one, two = (torch.load(results / f"{run}.pt") for run in (name, f"ddp-{name}"))
    for step, expected in zip(two["steps"], one["steps"], strict=True):
        assert step["texts"] == expected["texts"]
        own = {key for key in expected["metrics"] if key.startswith(("reward/", "train/loss", "train/grad_norm"))}
        assert any("compared_fraction" in key for key in own) and any("nan" in key for key in own)
        for key in own:
            assert step["metrics"][key] == pytest.approx(expected["metrics"][key], abs=1e-5, nan_ok=True), key
    assert two["validation"] == pytest.approx(one["validation"], abs=1e-5)
    assert any(step["metrics"]["train/loss"] for step in one["steps"])
    weights, expected = (
        torch.load(results / f"{run}.ckpt", weights_only=True)["state_dict"] for run in (f"ddp-{name}", name)
    )
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, atol=1e-5, rtol=0)


# --- reward models ---------------------------------------------------------------------------------------------------


def ranked(i: int) -> dict[str, Any]:
    """Lists of two to four texts, some with ties: ranks have unequally many pairs."""
    texts = ["good good", "good bad", "bad", "bad bad bad"][: 2 + i % 3]
    ranks = [1, 2, 3, 3][: len(texts)]
    scores = [4 - rank + 0.1 * (i % 4) for rank in ranks]
    return {"prompt": f"q{i} ", "completions": texts, "ranks": ranks, "scores": scores}


def test_a_reward_model_on_two_ranks(causal_lm: Path, tmp_path: Path) -> None:  # noqa: F811
    """Losses, metrics (11 held-out lists: one rank repeats one, which must not count) and weights of one process."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(ranked(i)) + "\n" for i in range(43)))

    def train(name: str, batch_size: int, *flags: str) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
        small = {
            "trainer": {"accelerator": "cpu", "precision": "32-true", "max_steps": 8, "val_check_interval": 4},
            "trainer.logger.init_args": {"save_dir": tmp_path, "name": "run", "version": name},
            "model.init_args": {"model": causal_lm, "max_length": 64, "export_dir": tmp_path / name},
            "model.init_args.optimizer.init_args": {"lr": 0.003, "eps": 0.001},
            "data.init_args": {"batch_size": batch_size, "eval_batch_size": 3, "validation_fraction": 0.25},
        }
        options = [f"--{group}.{key}={value}" for group, values in small.items() for key, value in values.items()]
        options += ["--trainer.log_every_n_steps=1", "--model.init_args.margin_scale=0.5", *flags]
        gopo("fit", "--config", CONFIG, f"--data.init_args.source={file}", *options)
        log = events(tmp_path / "run" / name)
        curves = {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
        return curves, load_file(tmp_path / name / "model.safetensors")

    one, weights_1 = train("one", 8)
    two, weights_2 = train("two", 4, "--trainer.devices=2", "--trainer.strategy=ddp")
    names = ["pair_accuracy", "pair_accuracy_all", "calibration_error", "spearman", "kendall", "loss", "length_bias"]
    for tag in ("train/loss", *(f"val/{name}" for name in names)):
        assert len(one[tag]) == (8 if tag == "train/loss" else 2)
        assert two[tag] == pytest.approx(one[tag], abs=1e-5), tag
    assert {tag for tag in one if tag.startswith("val/")} == {tag for tag in two if tag.startswith("val/")}
    for key, tensor in weights_1.items():
        torch.testing.assert_close(weights_2[key], tensor, atol=1e-5, rtol=0)
