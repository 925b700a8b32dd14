"""``python -m tests.use --seed N --minutes M``: prints each row, its faults with the commands that show them, a sum."""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.use import commands, options, policies, refusals, trial

Job = dict[str, Any]


@dataclass
class Tally:
    """Of the rows so far."""

    good: int = 0
    bad: int = 0
    refused: int = 0
    truncated: list[float] = field(default_factory=list)
    """Share of the first step's completions that were cut off, of each row."""


def jobs(seed: int, *, real: bool) -> list[tuple[str, options.Row]]:
    """(label, row) in the order in which they are run: a real policy and refusals first, which a sample needs."""
    rows = options.rows(seed)
    found = [("refusals", {"seed": seed}), *((str(k), row) for k, row in enumerate(rows))]
    if real:
        first, second = options.real_rows(rows)
        found.insert(0, ("real-0", first))
        found.insert(len(found) // 2, ("real-1", second))
    return found


def describe(row: options.Row) -> str:
    """The row's values in one line."""
    return " ".join(f"{name}={value}" for name, value in row.items())


def name(row: options.Row) -> str:
    """What tells the row from most others."""
    return " ".join(str(row[key]) for key in ("policy", "strategy", "which", "advantage") if key in row)


def start(label: str, row: options.Row, folder: Path, shared: Path) -> int:
    """The process id of a child that tries ``row`` and writes ``<folder>.json``."""
    child = os.fork()
    if child:
        return child
    try:
        if label == "refusals":
            lines, problems, refused, truncated = *refusals.try_all(row["seed"], folder, shared), False, None
        else:
            done = trial.try_row(row, folder, shared)
            lines, problems, refused, truncated = done.lines, done.problems, done.refused, done.truncated
    except BaseException:  # noqa: BLE001 - whatever it is, it belongs to this row
        lines, problems, refused, truncated = [], [traceback.format_exc()], False, None
    result = {"lines": lines, "problems": problems, "refused": refused, "truncated": truncated}
    folder.with_suffix(".json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def report(label: str, row: options.Row, folder: Path, seconds: float, tally: Tally) -> None:
    """Print how it went; the folder stays where something is wrong."""
    path = folder.with_suffix(".json")
    problems = ["the process of this row died"]
    result = json.loads(path.read_text()) if path.exists() else {"problems": problems, "refused": False, "lines": []}
    bad, refused = bool(result["problems"]), result["refused"]
    tally.truncated += [share for share in [result.get("truncated")] if share == share and share is not None]
    tally.bad, tally.good, tally.refused = tally.bad + bad, tally.good + (not bad), tally.refused + refused
    verdict = "FAULT" if bad else "refused" if refused else "ok"
    print(f"{verdict:8}{label:>9} {seconds:5.0f} s  {name(row)}", flush=True)
    if not bad:
        shutil.rmtree(folder, ignore_errors=True)
        return
    print(f"    {describe(row)}")
    print(*(f"    {problem}" for problem in result["problems"][:8]), sep="\n")
    print(f"    cd {folder}", *result["lines"], sep="\n      ", flush=True)


def work(todo: list[tuple[str, options.Row]], root: Path, deadline: float, workers: int) -> Tally:
    """Try rows, ``workers`` at a time, until none is left or no time; those under way are ended."""
    shared, tally, total = root / "policies", Tally(), len(todo)
    for policy in sorted({row.get("policy", "llama") for _, row in todo} | {"gpt2"}):
        policies.folder_of(policy, shared)
    running: dict[int, tuple[str, options.Row, Path, float]] = {}
    while running or (todo and time.monotonic() < deadline):
        while todo and len(running) < workers and time.monotonic() < deadline:
            label, row = todo.pop(0)
            folder = root / f"row-{label}"
            running[start(label, row, folder, shared)] = label, row, folder, time.monotonic()
        child, _ = os.wait()
        label, row, folder, begun = running.pop(child)
        report(label, row, folder, time.monotonic() - begun, tally)
    if todo:
        print(f"The time is over: {total - len(todo)} of {total} rows were run.")
    return tally


def main() -> int:
    """1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.use", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of rows and runs")
    parser.add_argument("--minutes", type=float, default=15.0, help="no row is started later")
    parser.add_argument("--row", help="only this one: the number or name that its line shows")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="rows at a time")
    parser.add_argument("--no-real", action="store_true", help="leave the pretrained policy out")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"Use lab, seed {arguments.seed}; to run one row again: python -m tests.use --seed {arguments.seed} --row ROW"
    )
    begun = time.monotonic()
    commands.preload()
    todo = jobs(arguments.seed, real=not arguments.no_real)
    if arguments.row is not None:
        todo = [(label, row) for label, row in todo if label == arguments.row]
    root = Path(tempfile.mkdtemp(prefix="use-lab-"))
    tally = work(todo, root, begun + 60 * arguments.minutes, arguments.workers)
    right = f"{tally.good} right ({tally.refused} of them refused with a reason)"
    print(f"{right}, {tally.bad} faulty. Seed {arguments.seed}.")
    if tally.truncated:
        mean = sum(tally.truncated) / len(tally.truncated)
        print(f"{mean:.0%} of the completions were cut off, the others ended by themselves.")
    if not tally.bad:
        shutil.rmtree(root)
    return int(bool(tally.bad))


if __name__ == "__main__":
    sys.exit(main())
