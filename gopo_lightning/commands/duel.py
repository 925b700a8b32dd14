"""``gopo-lightning duel``: its options, which need no import of torch."""

from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser

from gopo_lightning.commands.errors import RaisesUsageErrors
from gopo_lightning.evaluation.duels import Orders

USAGE = """\
gopo-lightning duel A B --judge JUDGE [options] [-- OPTIONS OF predict]
       gopo-lightning duel --ladder A B C ... --judge JUDGE
       gopo-lightning duel --curve RUN_A RUN_B --judge JUDGE"""
DESCRIPTION = "Which of two policies wins on the same prompts, by a judge, with an interval."
RECORDED = "rewards:"
"""Before the name of a source whose rewards the predictions hold."""
JUDGE = (
    "who compares: a YAML file (class_path and init_args of a reward source, or a whole training config); a class of "
    "reward sources, whose arguments follow as --judge.NAME=VALUE (--judge.help CLASS shows them); or "
    f"{RECORDED}NAME, the rewards of that name that the predictions hold"
)


class ClassParser(RaisesUsageErrors, ArgumentParser):
    """Of classes with their arguments."""


def make_parser(judges: tuple[type, ...] = ()) -> ArgumentParser:
    """Of everything but what stands behind ``--``.

    Args:
        judges: classes of which ``--judge`` may be one; without them, only its help is known.
    """
    parser = ClassParser(prog="gopo-lightning duel", usage=USAGE, description=DESCRIPTION)
    parser.add_argument(
        "policies",
        nargs="*",
        help="predictions.jsonl or its folder; an exported model or a checkpoint (with --config); 'base', the policy "
        "that --config names",
    )
    parser.add_argument("--ladder", action="store_true", help="all policies against each other, as Elo")
    parser.add_argument("--curve", action="store_true", help="two run folders: A against B at every step of both")
    if judges:
        parser.add_subclass_arguments(judges, "judge", required=False, help=JUDGE)
    else:
        parser.add_argument("--judge", help=JUDGE)
    parser.add_argument(
        "--judge_name", type=str | None, default=None, help="which source of the config, where it has several"
    )
    parser.add_argument(
        "--config",
        type=str,
        action="append",
        default=[],
        help="training config: its data.predict prompts are answered, their other columns read. A later one overrides",
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="folder of duel.json; below runs/duel when null"
    )
    parser.add_argument(
        "--cache_dir", type=str, default="runs/duel_cache", help="samples and answers, shared by all duels"
    )
    parser.add_argument(
        "--orders",
        type=Orders,
        default="both",
        help="'one' shows each pair to a judge that may depend on the order once",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling, of the orders and of the bootstrap")
    parser.add_argument("--draws", type=int, default=4000, help="of the bootstrap")
    parser.add_argument("--prompts_per_call", type=int, default=16, help="an interruption loses so many at most")
    parser.add_argument("--device", type=str, default="auto", help="of a judge that holds a model")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command; its help answers at once."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "-h" in own or "--help" in own:
        make_parser().print_help()
        return
    import_module("gopo_lightning.commands.duel_job").run(arguments)
