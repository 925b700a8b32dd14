"""``gopo-lightning report``: finished runs as one page."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from gopo_lightning.commands.errors import Parser

DESCRIPTION = """\
Finished runs as one page that needs no network: who is ahead and by how much, curves with a band over seeds (by step,
sampled tokens, seconds and KL), paired differences, samples side by side, and what differs in the configs.

Runs that differ in nothing but their seeds are one group; groups are named by what differs in their configs.
Each group is compared with the baseline, seed by seed.
"""
EXAMPLES = """\
examples:
  gopo-lightning report runs/compare
  gopo-lightning report runs/quickstart/gopo-seed* runs/quickstart/grpo-seed* --output runs/report
  gopo-lightning report runs/compare --baseline rloo --tags val/sentiment/reward val/win_rate
"""


def main(arguments: Sequence[str]) -> None:
    """Read, compare, write; say where the page is, and what it says first."""
    options = _parser().parse_args(arguments)
    command = f"gopo-lightning report {shlex.join(arguments)}"
    print(make(options.runs, options.output, options.tags, options.baseline, command))


def make(runs: Sequence[Path], output: Path, tags: Sequence[str], baseline: str | None, command: str) -> str:
    """Write the report of ``runs`` into ``output``; what to print.

    Raises:
        ValueError: there are no such runs, tags or baseline, or ``output`` holds something else.
    """
    from gopo_lightning.evaluation.event_files import read_runs
    from gopo_lightning.evaluation.report import summarise
    from gopo_lightning.evaluation.report_page import check_output, write_report

    check_output(output)
    found, passed_over = read_runs(runs)
    report = summarise(found, tags, baseline, passed_over)
    page = write_report(report, output, command)
    groups = [f"{group.label}: seeds {', '.join(group.runs)}" for group in report.groups]
    return "\n".join([*groups, *report.answers, *(f"note: {note}" for note in report.notes), str(page)])


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gopo-lightning report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one with runs below it")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/report"), metavar="DIR",
        help="where index.html, report.json and figures/*.png go [runs/report]; an earlier report there is replaced, "
        "anything else is refused",
    )  # fmt: skip
    parser.add_argument(
        "--baseline",
        metavar="GROUP",
        help="the label of a group, or a value in it that no other has [grpo, else the first]",
    )
    parser.add_argument(
        "--tags", nargs="+", default=[], metavar="TAG",
        help="what is compared, the most important first [val/reward, that of each source if there are several, and "
        "val/win_rate]; docs/metrics.md lists all",
    )  # fmt: skip
    return parser
