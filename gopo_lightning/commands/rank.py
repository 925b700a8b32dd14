"""``rank``: a person orders completions on a page of this machine; the verdicts train a reward model or a policy."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gopo_lightning.commands.errors import Parser

if TYPE_CHECKING:
    from gopo_lightning.human.groups import Group
    from gopo_lightning.human.verdicts import Verdict

DESCRIPTION = """\
Order completions by hand, the best first, on a page that this machine alone can open. Every verdict is on disk at once;
the same command goes on where it stopped. OUTPUT/verdicts/RATER.jsonl trains a reward model (ranked lists) or a policy
(HumanRanking) as it stands: docs/rank.md.

Completions come from --completions, or are sampled from the policy of a configuration and kept in OUTPUT/groups.jsonl.
What follows these options goes to that configuration, as in fit: --config FILE (several are layers), --FIELD=VALUE.
"""
EXAMPLES = """\
examples:
  gopo-lightning rank --config quickstart/gopo --num_prompts 100 --rater ann
  gopo-lightning rank --rater bob                                # the same completions
  gopo-lightning rank --completions runs/a/predictions.jsonl --output runs/rank-a
  gopo-lightning rank --agreement runs/rank/verdicts
"""
GROUPS, SAMPLED, VERDICTS = "groups.jsonl", "sampled.json", "verdicts"


def parser() -> argparse.ArgumentParser:
    """Of the options that are not the configuration's."""
    options = Parser(
        prog="gopo-lightning rank",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("--rater", default="me", help="whose verdicts these are [me]")
    options.add_argument(
        "--completions", type=Path, metavar="FILE", help="predictions.jsonl, or ranked lists: prompt and completions"
    )
    options.add_argument("--num_prompts", type=int, help="prompts to sample for, in whole steps of training [64]")
    options.add_argument("--output", type=Path, default=Path("runs/rank"), help="folder [runs/rank]")
    options.add_argument("--port", type=int, default=0, help="of the page; 0 takes a free one [0]")
    options.add_argument(
        "--agreement", type=Path, nargs="+", metavar="FILE", help="how far the raters of these agree; ranks nothing"
    )
    return options


def main(arguments: Sequence[str]) -> None:
    """Serve the page until Ctrl+C, or print the agreement."""
    options, config = parser().parse_known_args(list(arguments))
    if options.agreement is not None:
        print(agreement(options.agreement, config))
        return
    groups = find_groups(options, config)
    if groups is not None:
        serve(groups, options.output / VERDICTS, options.rater, options.port)


def agreement(files: Sequence[Path], others: Sequence[str] = ()) -> str:
    """What `rank --agreement` prints.

    Raises:
        ValueError: no such file, a malformed one, options beside it, or no two raters with a group in common.
    """
    from gopo_lightning.evaluation.raters import agreements, as_text
    from gopo_lightning.human.verdicts import read_verdicts

    if others:
        raise ValueError(f"--agreement reads files alone, and {others[0]} is for sampling. Remove it.")
    verdicts = [verdict for file in files for verdict in read_verdicts(file)]
    found = agreements(verdicts)
    if not found:
        names = sorted({verdict.rater for verdict in verdicts})
        raise ValueError(f"the raters {names} have no group in common. Let two people rank the same completions.")
    return as_text(found)


def find_groups(options: argparse.Namespace, config: Sequence[str]) -> "list[Group] | None":
    """From the file, the folder or the policy; None on ranks other than the first.

    Raises:
        ValueError: there are none, or not one origin of them.
    """
    from gopo_lightning.human.groups import groups_of_file
    from gopo_lightning.human.verdicts import check_rater

    check_rater(options.rater)
    sampled, num_prompts = options.output / GROUPS, options.num_prompts
    if options.completions is not None:
        if unused := [*config, *(["--num_prompts"] if num_prompts is not None else [])]:
            raise ValueError(f"--completions names the completions, and {unused[0]} is for sampling. Remove one.")
        return groups_of_file(options.completions)
    if not config and num_prompts is None:
        if not sampled.is_file():
            raise ValueError(f"there is no {sampled} to go on with. Name --config, --completions or --output.")
        return groups_of_file(sampled)
    if not any(argument.startswith("--config") for argument in config):
        raise ValueError("sampling needs the configuration of the run: --config FILE, as for fit")
    return sample(options.output, config, 64 if num_prompts is None else num_prompts)


def sample(folder: Path, config: Sequence[str], num_prompts: int) -> "list[Group] | None":
    """Groups of the untrained policy, which ``folder`` then holds, or has held before.

    Raises:
        ValueError: it holds those of other options.
    """
    from gopo_lightning.data.json_lines import write_jsonl
    from gopo_lightning.human.groups import group_of, groups_of_file

    made_by = {"arguments": list(config), "num_prompts": num_prompts}
    groups_file, options_file = folder / GROUPS, folder / SAMPLED
    if groups_file.is_file():
        before = json.loads(options_file.read_text(encoding="utf-8")) if options_file.is_file() else None
        if before != made_by:
            raise ValueError(
                f"{groups_file} was sampled with other options ({before}). Name another folder by --output, or go on "
                "with these completions by leaving the options out."
            )
        print(f"completions of {groups_file}, sampled earlier; another --output samples anew")
        return groups_of_file(groups_file)
    if num_prompts < 1:
        raise ValueError(f"--num_prompts={num_prompts} must be at least 1.")
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from gopo_lightning.commands.untrained import untrained
    from gopo_lightning.evaluation import inspection

    sampled = inspection.sample(*untrained("rank", config), num_prompts, scored=False)
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return None
    groups = [group_of(prompt, group) for prompt, group in zip(sampled.prompts, sampled.groups, strict=True)]
    kept = {group.key: group for group in groups if len(group.completions) > 1}
    if not kept:
        raise ValueError(
            "every prompt got equal completions, and nothing else can be ordered. Sample at temperature 1."
        )
    if len(kept) < len(groups):
        print(f"{len(groups) - len(kept)} prompts are left out: repeated, or with equal completions throughout")
    folder.mkdir(parents=True, exist_ok=True)
    options_file.write_text(json.dumps(made_by) + "\n", encoding="utf-8")
    write_jsonl(groups_file, (group.row() for group in kept.values()))
    return list(kept.values())


def serve(groups: "Sequence[Group]", folder: Path, rater: str, port: int) -> None:
    """The page of ``groups``, until Ctrl+C.

    Raises:
        ValueError: the verdicts cannot be read, or somebody else writes them; or the port is taken.
    """
    from gopo_lightning.human.server import RankingServer
    from gopo_lightning.human.session import Session
    from gopo_lightning.human.verdicts import VerdictFile

    verdicts = VerdictFile(folder, rater)
    session = Session(verdicts, groups, summary=lambda mine: _summary(folder, mine))
    server = RankingServer(session, port)
    try:
        print(f"{len(groups)} prompts, {session.num_done} of them ranked by {rater}. Order them at", flush=True)
        print(f"\n  {server.address}\n\nVerdicts go to {verdicts.path}. Ctrl+C ends.", flush=True)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        print(f"\n{session.num_done} of {len(groups)} prompts are ranked, in {verdicts.path}")
    finally:
        server.close()
        verdicts.close()


def _summary(folder: Path, mine: "Sequence[Verdict]") -> str:
    """How far the rater agrees with others who have ordered the same; it is shown, and must not fail."""
    from gopo_lightning.evaluation.raters import agreements, as_text
    from gopo_lightning.human.verdicts import read_verdicts

    me = mine[0].rater if mine else ""
    try:
        others = [v for path in sorted(folder.glob("*.jsonl")) for v in read_verdicts(path) if v.rater != me]
        return as_text([found for found in agreements([*mine, *others]) if me in found.raters])
    except ValueError as error:
        return f"No agreement with others is shown: {error}"
