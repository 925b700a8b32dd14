"""The study: its rewards, its arithmetic, its bookkeeping. (Its runs are scripts/run_study.py, for hours.)"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gopo_lightning.objectives.advantages import grpo, ordinal
from scripts.study import adder, design, figure, rewards, runs, tables
from scripts.study.design import Run

SMALL = design.POLICIES["small"]
Z = torch.randn(200, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def shaped(shape: str, seed: int = 0) -> torch.Tensor:
    """``Z`` as the reward of that shape; a row is a prompt."""
    rows = [
        [rewards.SHAPES[shape](z, rewards.Noise(seed, str(p), str(g))) for g, z in enumerate(row)]
        for p, row in enumerate(Z.tolist())
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("warp", rewards.WARPS)
def test_gopo_does_not_see_a_warp_and_grpo_does(warp: str) -> None:
    rewards.check_order(warp, Z.flatten().tolist())
    assert torch.equal(ordinal(shaped(warp)), ordinal(Z))
    assert not torch.allclose(grpo(shaped(warp)), grpo(Z), atol=0.05)


def test_a_warp_that_loses_the_order_is_refused() -> None:
    with pytest.raises(ValueError, match="sigmoid takes"):
        rewards.check_order("sigmoid", [20.0, 30.0])


def test_noise_belongs_to_the_text() -> None:
    assert torch.equal(shaped("heavy_tailed"), shaped("heavy_tailed"))
    assert not torch.equal(shaped("heavy_tailed"), shaped("heavy_tailed", seed=1))
    a, b = (rewards.Noise(0, "prompt", text) for text in ("a", "b"))
    assert a.uniform(0) != b.uniform(0) and a.uniform(0, "prompt") == b.uniform(0, "prompt")


def test_heavy_tails() -> None:
    """One in twenty is at ±8; half of the others' noise is within 0.5 · 0.8768, the upper quartile of t(1.5)."""
    noise = (shaped("heavy_tailed") - Z).flatten()
    outlier = shaped("heavy_tailed").abs().flatten() == 8
    assert float(outlier.double().mean()) == pytest.approx(0.05, abs=0.012)
    assert float((noise[~outlier].abs() < 0.5 * 0.8768).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_scale_and_offset_of_a_prompt() -> None:
    assert torch.equal(ordinal(shaped("of_prompt")), ordinal(Z))
    assert float(shaped("of_prompt").mean(-1).std()) == pytest.approx(3, rel=0.25)


def test_stars_and_likes() -> None:
    assert sorted(set(shaped("stars").flatten().tolist())) == [1, 2, 3, 4, 5]
    assert sorted(set(shaped("binary").flatten().tolist())) == [0, 1]


def test_the_judge_only_looks_on() -> None:
    rewards_PGK = torch.tensor([[[1.0, 9.0], [math.nan, 9.0]]])
    assert rewards.first(rewards_PGK).tolist()[0][0] == 1 and rewards.first(rewards_PGK).isnan()[0, 1]


# ------------------------------------------------------------------------------ arithmetic


def result(judge: list[float], kl: list[float], seconds: float = 60.0) -> dict[str, Any]:
    """Of a run, with what the tables read."""
    n = len(judge)
    curves = {f"val/{tag}": [0.1] * n for tag in runs.MEASURED} | {tag: [0.1] * (n - 1) for tag in runs.TRAINED}
    facts = {
        "steps_evaluated": list(range(n)),
        "lr": 1.2e-3,
        "gradient_clip_active": 0.0,
        "policy": "small",
        "seconds": seconds,
    }
    return facts | {"curves": curves | {"val/judge/reward": judge, "train/kl": kl}}


def test_equal_kl_by_hand() -> None:
    """One reaches 1 at KL 2, the other 1 at KL 4: at KLs of 1.2 … 2 (mean 1.6) they have 0.8 and 0.4."""
    fast, slow = result([0, 1], [2.0]), result([0, 1], [4.0])
    assert tables.at_equal_kl(fast, slow) == pytest.approx(0.4)
    assert tables.at_equal_kl(slow, fast) == pytest.approx(-0.4)


def test_a_learning_rate_that_ruins_the_policy_is_not_chosen() -> None:
    """The highest has the best outcome at a KL of 4, the one in the middle a better outcome than the lowest."""
    low, middle, high = SMALL.learning_rates
    worth = {low: (1.0, 1.0), middle: (2.0, 3.0), high: (3.0, 4.0)}
    rows = {
        run.key: result([worth[run.lr][0]] * 11, [worth[run.lr][1]] * 10)
        for run in every(design.tuning(design.TABLES[0]))
        if run.method == "grpo"
    }
    assert design.chosen_lr({"here": rows}, "grpo", 8) == middle
    assert design.chosen_lr({"here": rows}, "rloo", 8) is None
    for found in rows.values():
        found["curves"]["val/truncated_fraction"] = [0.5] * 11
    assert design.chosen_lr({"here": rows}, "grpo", 8) == low


def test_the_outcome_is_the_mean_of_the_last_five() -> None:
    assert design.outcome(result([9, 1, 2, 3, 4, 5], [0.0] * 5)) == 3


# ------------------------------------------------------------------------------ bookkeeping


def every(groups: Iterable[Iterable[Run]]) -> list[Run]:
    """All of them."""
    return [run for runs in groups for run in runs]


def all_done(difference: float) -> dict[str, dict[str, Any]]:
    """Tuning favours the middle learning rate; in table 1 GOPO is ahead by ``difference`` ± 0.01 in every seed."""
    table = design.TABLES[0]
    rows = {
        run.key: result([0.0] * 5 + [1.0 if run.lr == SMALL.learning_rates[1] else 0.5] * 6, [1.0] * 10)
        for run in every(design.tuning(table))
    }
    for run in every(design.runs_of(table, {"here": rows})):
        ahead = (run.method == "gopo") * (difference + 0.01 * (-1) ** run.seed)
        score = run.seed / 10 + ahead + 0.01 * (run.seed % 2)
        rows[run.key] = result([0.0] + [score] * 10, [0.1 * k for k in range(1, 11)])
    return {"here": rows}


def test_a_table_says_how_far_gopo_is_ahead() -> None:
    done = all_done(0.5)
    assert design.chosen_lr(done, "grpo", 8) == SMALL.learning_rates[1]
    text = tables.table_of(design.TABLES[0], done)
    assert (
        "| clean | 8 | grpo | 10 | +0.500 [+0.492, +0.508] | 0.000 | " in text
        and "| 10 of 10 |" in text
        and "missing" not in text
    )


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    """Of the warps too, where only GOPO's runs on the clean reward are there."""
    for table in design.TABLES[:2]:
        figure.draw(all_done(0.5), tmp_path / "table.png", table)
        assert (tmp_path / "table.png").stat().st_size > 20_000


def test_cells_that_were_not_reached_are_missing() -> None:
    done = all_done(0.5)
    gone = [key for key in done["here"] if "heavy_tailed" in key and "rloo" in key]
    assert len(gone) == 10
    for key in gone:
        del done["here"][key]
    text = tables.table_of(design.TABLES[0], done)
    assert "| heavy_tailed | 8 | rloo | 0.0012 | 0 | missing" in text and "10 of 60 runs are missing." in text
    assert "table 1: 50 of 60 runs, 18 of 18 to choose" in tables.forecast(done, lambda policy: "here", 2)
    assert "0 of 60 runs, 0 of 18" in tables.forecast({}, lambda policy: "here", 2)


def test_a_run_that_two_tables_want_is_forecast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's: 3 seeds of 2 rewards × 3 methods, and 3 learning rates for each method; GOPO is in both tables."""
    monkeypatch.setattr(tables, "TABLES", [table for table in design.TABLES if table.policy == "smollm2"])
    forecast = tables.forecast({}, lambda policy: "here", 2)
    assert "table 6a: 0 of 12 runs, 0 of 6" in forecast and "table 6b: 0 of 12 runs, 0 of 3" in forecast
    assert "27 runs are missing: about 27 minutes" in forecast


def test_a_table_may_have_one_learning_rate_for_all() -> None:
    """Table 3b takes GOPO's for the other two, so nothing is tuned for them; GOPO's runs are those of table 3."""
    third, at_one_lr = (next(table for table in design.TABLES if table.name == name) for name in ("3", "3b"))
    done = all_done(0.5)
    assert [run.method for run in every(design.tuning(at_one_lr))] == ["gopo"] * 6
    runs_3b = every(design.runs_of(at_one_lr, done))
    assert len(runs_3b) == 60 and {run.lr for run in runs_3b} == {SMALL.learning_rates[1]}
    assert {run.method for run in every(design.runs_of(third, done))} == {"gopo"}, "its others are not chosen yet"
    forecast = tables.forecast(done, lambda policy: "here", 2)
    assert "table 3: 20 of 60 runs, 0 of 12" in forecast and "table 3b: 20 of 60 runs, 0 of 0" in forecast


def test_gopo_under_a_warp_is_gopo_without_it() -> None:
    done = all_done(0.5)
    for seed in SMALL.seeds:
        run = Run("2a", "exp", "grpo", seed, SMALL.learning_rates[1])
        done["here"][run.key] = result([0.0] + [seed / 10] * 10, [0.1] * 10)
    text = tables.table_of(design.TABLES[1], done)
    assert "| exp | 8 | grpo | 10 | +0.505 [" in text


def test_what_is_compared_was_made_with_the_same_assets() -> None:
    """Seed 3 lacks a run here, and was begun there with all but one: there it has more, and its last is missing.

    GOPO and GRPO are equal there, so the mean difference is (5 · 0.51 + 4 · 0.49 + 0) / 10.
    """
    table, done = design.TABLES[0], all_done(0.5)
    groups = design.runs_of(table, done)
    third = groups[2]
    there = {run.key: result([0.0] + [9.0] * 10, [0.1] * 10) for run in third[:-1]}
    for run in third[:2]:
        del done["here"][run.key]
    done["there"] = there
    assert design.of_same_assets(third, done) == there
    assert design.missing(groups, done, "there") == third[-1:]
    assert design.missing(groups, done, "here") == third[:2]
    assert design.missing(groups, done, "elsewhere") == third
    assert "1 of 60 runs are missing." in tables.table_of(table, done)
    assert "| clean | 8 | grpo | 10 | +0.451 [" in tables.table_of(table, done)


def test_runs_of_another_design_are_left_out(tmp_path: Path) -> None:
    path, run = tmp_path / "runs.jsonl", Run("1", "stars", "gopo_rescued", 1, 1e-3)
    rows = [
        {"key": key, "made_of": made, "assets": "here", **run.record()}
        for key, made in (("a", runs.made_of(run)), ("b", "then"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(assets, list(rows)) for assets, rows in runs.read(path).items()] == [("here", ["a"])]
    assert runs.read(tmp_path / "none.jsonl") == {}


def test_a_rescued_run_has_the_other_rewards_of_gopo() -> None:
    names = [path.name for path in runs.layers(Run("2b", "stars", "gopo_rescued", 1, 1e-3))]
    assert names == ["base.yaml", "stars_rescued.yaml", "gopo.yaml"]
    rewards_PGK = torch.tensor([[[1.0, 0.0, 9.0], [1.0, 1.0, 8.0], [2.0, 0.0, 7.0]]])
    assert rewards.first_then_second(rewards_PGK).argsort(-1).tolist() == [[0, 1, 2]]


def test_comments_do_not_make_another_study(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    texts = ['"""A."""\nx = 1  # one', '"""B."""\nx = 1', "x = 2"]
    codes = [runs._code(path) for text in texts if path.write_text(text)]
    assert codes[0] == codes[1] != codes[2]


def test_all_runs_sample_equally_many_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "folder", lambda run: tmp_path / run.key)
    for table in design.TABLES:
        for size in table.group_sizes:
            layers = runs.config(
                Run(table.name, table.rewards[0], table.methods[0], 1, 1e-3, size, policy=table.policy)
            )
            text = layers[-1].read_text()
            sampled = design.POLICIES[table.policy].sampled
            assert f"num_completions: {size}" in text and f"prompts_per_step: {sampled // size}" in text
            assert all(layer.exists() for layer in layers)


@pytest.mark.parametrize("table", design.TABLES[-2:], ids=lambda table: table.policy)
def test_methods_make_several_updates_of_a_rollout(table: design.Table) -> None:
    for method in table.methods:
        files = runs.layers(Run(table.name, "clean", method, 1, 1e-3, policy=table.policy))
        assert files[-1].stem == method
        loaded = [yaml.safe_load(file.read_text())["model"]["init_args"].get("update", {}) for file in files]
        epochs = [update["num_inner_epochs"] for update in loaded if "num_inner_epochs" in update]
        assert {*epochs} == {4}
    assert design.POLICIES[table.policy].steps % 20 == 0, "five rollouts from one evaluation to the next"


def test_sums_are_dealt_out_once() -> None:
    parts = adder.sums()
    prompts = [row["prompt"] for part in parts.values() for row in part]
    assert len({*prompts}) == len(prompts) == 10_000
    assert all(row["answer"] == str(eval(str(row["prompt"])[:-1])) for row in parts["train"])
    assert adder.right(["1+2=", "1+2="], ["3", "4"], ["3", "3"]) == [1.0, 0.0]
    tokenizer = adder.build_tokenizer()
    assert tokenizer.decode(tokenizer("37+58=95")["input_ids"]) == "37+58=95"


def test_seeds_of_tuning_are_not_those_of_the_verdict() -> None:
    assert not any(set(of.tuning_seeds) & set(of.seeds) for of in design.POLICIES.values()) and len(SMALL.seeds) >= 10
    assert statistics.median(SMALL.learning_rates) == SMALL.learning_rates[1]
