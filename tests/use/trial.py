"""A row is tried: a run, the same again, a resume from its middle, an evaluation of its end, and what must hold."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from gopo_lightning.policy.model import PolicyConfig
from tests.use import commands, invariants, options, policies
from tests.use.options import ROLLOUTS, Row
from tests.use.reading import Curves, at, checkpoint, curves, differences, json_problems

STRATEGY_TOLERANCE = 1e-4
CANNOT_SHARE = "prefix_sharing"
"""Word of the only refusal that a valid row may meet: `always`, of a policy that cannot."""
MUST_SHARE = set(policies.CONFIGS) - policies.RECURRENT | {policies.REAL}


@dataclass
class Trial:
    """What was tried and what was wrong with it."""

    row: Row
    folder: Path
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    refused: bool = False
    truncated: float = math.nan

    def run(self, command: str, name: str, *extra: str) -> commands.Ended:
        """``command`` with the row's config, logged under ``runs/name``."""
        arguments = [command, "--config", "config.yaml", f"--trainer.logger.init_args.name={name}", *extra]
        single = "--trainer.devices=1" in extra
        processes = 1 if single else options.ranks(self.row)
        ended = commands.run(arguments, self.folder, processes=processes, cold=self.row["cold"])
        self.lines.append(ended.line)
        return ended

    def must(self, ended: commands.Ended) -> bool:
        """Whether it ended with 0; else that is a problem."""
        if ended.code == 0:
            return True
        how = f"did not end in {ended.seconds:.0f} s" if ended.code is None else f"ended with {ended.code}"
        self.problems.append(f"`{ended.line}` {how}: {ended.last_words[:500]}")
        return False

    def log_of(self, name: str) -> Path:
        """Its run folder."""
        return self.folder / "runs" / name / "version_0"


def try_row(row: Row, folder: Path, shared: Path) -> Trial:
    """All of ``row`` in ``folder``."""
    folder.mkdir()
    options.write_config(row, folder, shared)
    trial, planted = Trial(row, folder), invariants.plant(folder)
    first = trial.run("fit", "first", "--export_dir", "exports/first")
    if first.code != 0 and _may_be_refused(row) and first.is_refused and CANNOT_SHARE in first.last_words:
        trial.refused = True
    elif trial.must(first):
        found = curves(trial.log_of("first"))
        trial.truncated = found.get("completion/truncated_fraction", {}).get(options.updates(row), math.nan)
        trial.problems += _of_first(trial, found)
        _again(trial, found)
        _resumed(trial, found)
        _on_one_process(trial, found)
        _then(trial, found)
    trial.problems += invariants.untouched(planted) + invariants.no_leftovers(folder) + json_problems(folder)
    return trial


def _may_be_refused(row: Row) -> bool:
    return row["prefix_sharing"] == "always" and row["policy"] not in MUST_SHARE


def _of_first(trial: Trial, found: Curves) -> list[str]:
    row, updates = trial.row, options.updates(trial.row)
    init_args = options.config(row, Path())["model"]["init_args"]["policy"]
    config = PolicyConfig(_policy_name(trial), lora=init_args.get("lora"))
    final = checkpoint(trial.log_of("first"), ROLLOUTS * updates)
    return [
        *invariants.logged(found, rollouts=ROLLOUTS, updates=updates),
        *invariants.finite(found, infinite_rewards=row["sources"] == "infinite"),
        *invariants.untrained_ties(found),
        *invariants.same_export(trial.folder / "exports" / "first", final, config),
    ]


def _policy_name(trial: Trial) -> str:
    values = yaml.safe_load((trial.folder / "config.yaml").read_text())
    return str(values["model"]["init_args"]["policy"]["name"])


def _steps(trial: Trial, after: int = -1) -> list[int]:
    return [n * options.updates(trial.row) for n in range(after + 1, ROLLOUTS + 1)]


def _again(trial: Trial, found: Curves) -> None:
    """The same command once more: all numbers are equal."""
    if trial.must(trial.run("fit", "again", "--export_dir", "exports/again")):
        again = trial.log_of("again")
        trial.problems += invariants.same_curves(curves(again), found, _steps(trial), "a rerun")
        trial.problems += invariants.same_end(again, trial.log_of("first"), _steps(trial)[-1], "a rerun")


def _resumed(trial: Trial, found: Curves) -> None:
    """From the checkpoint of a rollout in the middle: the rest is equal."""
    rollout = trial.row["resume_rollout"]
    path = checkpoint(trial.log_of("first"), rollout * options.updates(trial.row))
    command = ("--ckpt_path", str(path.relative_to(trial.folder)), "--export_dir", "exports/resumed")
    if trial.must(trial.run("fit", "resumed", *command)):
        resumed = trial.log_of("resumed")
        trial.problems += invariants.same_curves(curves(resumed), found, _steps(trial, rollout), "a resume")
        trial.problems += invariants.same_end(resumed, trial.log_of("first"), _steps(trial)[-1], "a resume")


def _on_one_process(trial: Trial, found: Curves) -> None:
    """Two ranks begin as one process does, where numbers do not depend on how a batch is cut."""
    if trial.row["strategy"] == "single" or trial.row["precision"] != "32-true":
        return
    one = ("--trainer.devices=1", "--trainer.strategy=auto", "--export_dir", "exports/single")
    if trial.must(trial.run("fit", "single", *one)):
        single = curves(trial.log_of("single"))
        what = f"{trial.row['strategy']} against one process"
        steps = invariants.steps_with_a_gradient(found, _steps(trial)[:2])
        trial.problems += invariants.same_curves(found, single, steps, what, STRATEGY_TOLERANCE)


def _then(trial: Trial, found: Curves) -> None:
    """validate, test or predict of the last checkpoint: what the fit found at its end."""
    command, last = trial.row["then"], _steps(trial)[-1]
    path = checkpoint(trial.log_of("first"), last)
    if not trial.must(trial.run(command, command, "--ckpt_path", str(path.relative_to(trial.folder)))):
        return
    expected = at(found, last, "val/")
    if command == "predict":
        trial.problems += _predictions(trial, expected)
        return
    measured = curves(trial.log_of(command))
    prefix = {"validate": "val/", "test": "test/"}[command]
    got = {
        tag.replace(prefix, "val/", 1): list(values.values())[-1]
        for tag, values in measured.items()
        if tag.startswith(prefix)
    }
    trial.problems += [f"{command}: {line}" for line in differences(got, expected)]


def _predictions(trial: Trial, expected: dict[str, float]) -> list[str]:
    """All prompts with all completions, and the mean scores of the last validation."""
    lines = (trial.log_of("predict") / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    G = trial.row["eval_num_completions"]
    if [len(record["completions"]) for record in records] != [G] * 5:
        return [f"predict wrote {[len(record['completions']) for record in records]} completions, not 5 × {G}"]
    if trial.row["sources"] not in ("function", "two"):
        return []  # comparisons within a group say nothing of the reference; infinities have no mean
    problems = []
    for name in records[0]["rewards"]:
        scores = [score for record in records for score in record["rewards"][name] if score is not None]
        mean = torch.tensor(scores, dtype=torch.float64).mean()
        wanted = expected[f"val/{name}/reward"]
        if not math.isclose(mean, wanted, rel_tol=1e-5, abs_tol=1e-5):
            problems.append(f"predict: mean {name} is {mean:.7g}, but the last validation found {wanted:.7g}")
    return problems
