"""The study of docs/evidence.md: every cell of its tables, run by run, for hours, and on from where it was stopped.

    python scripts/run_study.py forecast              what is done, what is missing, how long that takes
    python scripts/run_study.py run --workers 2       goes on until all is done, or until --minutes are over
    python scripts/run_study.py run --quick           three seeds of the first table with 30 steps, in 30 minutes
    python scripts/run_study.py tables                prints the tables of what is done; --tables 7 that one alone

A run is one `fit` of configs/study/base.yaml with a reward, an advantage and a seed. Its numbers are a line of
docs/study/runs.jsonl, with the commit and the assets that made them; a line that is there is not run again. Another
machine rounds otherwise and makes other assets: what is compared, a seed of a table, is of one set of them, and what is
begun with another set is begun anew. Learning rates are chosen by `tuning` runs on other seeds and other prompts
(docs/study/runs.jsonl holds these too).
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.study import assets, design, figure, runs, tables


def go_on(groups: Iterable[Iterable[design.Run]], assets: str, results: Path, deadline: float, workers: int) -> None:
    """Make what is missing, in order, ``workers`` at a time, each in a process of its own."""
    queue = design.missing(groups, runs.read(results), assets)
    from gopo_lightning.commands import lightning_cli  # noqa: F401 - once, before the processes are forked

    running: dict[int, tuple[design.Run, float]] = {}
    while queue or running:
        while queue and len(running) < workers and time.monotonic() < deadline:
            run = queue.pop(0)
            running[runs.start(run, results)] = (run, time.monotonic())
        if not running:
            return
        child, status = os.wait()
        run, began = running.pop(child)
        how = "done" if status == 0 else f"FAILED, see {runs.folder(run) / 'log.txt'}"
        print(f"{time.strftime('%H:%M:%S')} {run.name}: {how}, {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    """Run, forecast or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["forecast", "run", "tables"])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument(
        "--quick", action="store_true", help="a small version of the first table, into runs/study/quick.jsonl"
    )
    parser.add_argument("--tables", nargs="+", metavar="NAME", help="only these, in this order [all]")
    parser.add_argument("--figure", type=Path, help="draw the curves of the first of these tables into this file")
    parser.add_argument("--results", type=Path, default=Path("docs/study/runs.jsonl"))
    options = parser.parse_args()
    results = Path("runs/study/quick.jsonl") if options.quick else options.results
    if options.command == "run":
        assets.main()
    deadline = time.monotonic() + 60 * options.minutes
    named = {table.name: table for table in design.TABLES}
    chosen = design.TABLES[:1] if options.quick else [named[name] for name in options.tables or named]
    for table in chosen if options.command == "run" else ():
        here = runs.assets_here(table.policy)
        if not options.quick:
            go_on(design.tuning(table), here, results, deadline, options.workers)
        groups = design.runs_of(table, runs.read(results), quick=options.quick)
        go_on(groups, here, results, deadline, options.workers)
    done = runs.read(results)
    if options.command == "tables" or options.quick:
        print(tables.tables_of(chosen, done, quick=options.quick))
    if options.figure is not None:
        figure.draw(done, options.figure, chosen[0])
    print(tables.forecast(done, runs.assets_here, options.workers, quick=options.quick))


if __name__ == "__main__":
    main()
