"""``inspect``: samples completions, scores them, and says whether ranks can matter under these rewards."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gopo_lightning.commands.errors import Parser

DESCRIPTION = """\
Before training: samples what the first steps would sample, scores it, and says whether ranks can matter here.
What follows these options goes to the configuration, as in fit: --config FILE (several are layers), --FIELD=VALUE.
"""
EXAMPLE = """\
example:
  gopo-lightning inspect --config quickstart/gopo --num_prompts 32
"""


def parser() -> argparse.ArgumentParser:
    """Of the options that are not the configuration's."""
    options = Parser(
        prog="gopo-lightning inspect",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("--num_prompts", type=int, default=64, help="groups, in whole steps of training [64]")
    options.add_argument(
        "--judge", type=Path, metavar="FILE", help="YAML of a reward source to compare the reward with"
    )
    options.add_argument("--judge_name", help="which source, where FILE is a whole config with several")
    options.add_argument(
        "--pairs", type=Path, metavar="FILE", help="answers that people have compared, see docs/rewards.md"
    )
    options.add_argument("--num_pairs", type=int, default=256, help="rows of --pairs to read [256]")
    options.add_argument("--output", type=Path, default=Path("runs/inspect"), help="folder [runs/inspect]")
    return options


def main(arguments: Sequence[str]) -> None:
    """Sample, describe, print, and write inspect.json and inspect.png."""
    options, config = parser().parse_known_args(list(arguments))
    if options.num_prompts < 2:
        raise ValueError(f"--num_prompts={options.num_prompts}: an interval needs at least 2. Use 64.")
    if not any(argument.startswith("--config") for argument in config):
        raise ValueError("inspect needs the configuration of the run: --config FILE, as for fit")
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from gopo_lightning.commands.judges import judge_of_file
    from gopo_lightning.commands.untrained import untrained
    from gopo_lightning.data.sources import PromptSource
    from gopo_lightning.evaluation import inspection
    from gopo_lightning.evaluation.verdict import verdict

    trainer, module, data = untrained("inspect", config)
    judge = None if options.judge is None else judge_of_file(options.judge, options.judge_name)
    sampled = inspection.sample(trainer, module, data, options.num_prompts)
    found = inspection.describe(sampled, module)
    found["noise"] = inspection.scored_again(sampled, module)
    if judge is not None:
        found["agreement_with_judge"] = inspection.agreement_with_judge(sampled, judge, module)
    if options.pairs is not None:
        source = PromptSource(str(options.pairs), limit=options.num_pairs)
        found["agreement_with_people"] = inspection.agreement_with_people(source, data, module)
    found["verdict"] = verdict(found)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        from gopo_lightning.data.json_lines import dumps

        options.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(json.loads(dumps(found)), indent=1, ensure_ascii=False)
        (options.output / "inspect.json").write_text(text + "\n", encoding="utf-8")
        draw(sampled, options.output / "inspect.png")
        print(as_text(found))
        print(f"\n{options.output / 'inspect.json'}, {options.output / 'inspect.png'}")


# ------------------------------------------------------------------------------ words and picture


def as_text(found: Mapping[str, Any]) -> str:
    """All of it, for a terminal."""
    lines = [f"{found['num_prompts']} prompts × {found['num_completions']} completions of the untrained policy", ""]
    lines += _table(
        ["reward", "spread", "skewness", "kurtosis", "outliers", "ties", "all tied", "NaN", "τ with length"],
        [
            [
                name,
                number(shape["within_group_std"], ".3g"),
                number(shape["skewness"], "+.2f"),
                number(shape["excess_kurtosis"], "+.2f"),
                number(shape["outlier_fraction"], ".1%"),
                number(shape["tied_pair_fraction"], ".1%"),
                number(shape["all_tied_group_fraction"], ".1%"),
                number(shape["nan_fraction"], ".1%"),
                interval(found["rank_correlation_with_length"][name]),
            ]
            for name, shape in found["sources"].items()
        ],
    )
    lines += ["", f"normal rewards would give ordinal and grpo a cosine of {found['normal_cosine']:.3f}"]
    likeness = found["cosine_with_ordinal"].items()
    lines += _table(
        ["advantage", "cosine with ordinal, in groups", "lowest tenth", "over all", "effective groups"],
        [["ordinal", "1.000", "1.000", "1.000", f"{found['effective_groups']['ordinal']:.0%}"]]
        + [
            [
                name,
                *(f"{value[key]:.3f}" for key in ("within_groups", "lowest_tenth", "cosine")),
                f"{found['effective_groups'][name]:.0%}",
            ]
            for name, value in likeness
            if value is not None
        ],
    )
    lines += [f"{name} is left out: {reason}" for name, reason in found["refused"].items()]
    lines.append("")
    lines += [f"rank correlation of {pair}: {interval(value)}" for pair, value in found["rank_correlation"].items()]
    lines += [
        f"noise of {name}: {number(noise['std'], '.3g')}, {number(noise['of_within_group_std'], '.1%')} of the spread "
        f"within a group; {number(noise['changed_pair_fraction'], '.1%')} of the pairs change order when scored twice"
        for name, noise in found["noise"].items()
    ]
    for who in ("judge", "people"):
        for name, value in found.get(f"agreement_with_{who}", {}).items():
            lines.append(f"pairs that {name} orders as the {who} would: {interval(value)}")
    lines.append(
        f"length {found['length_mean']:.1f} ± {found['length_std']:.1f} tokens, "
        f"{found['truncated_fraction']:.1%} cut off"
    )
    return "\n".join([*lines, "", *found["verdict"]])


def number(value: float, form: str) -> str:
    """``value`` in ``form``; a dash where it is not defined."""
    return "–" if math.isnan(value) else f"{value:{form}}"


def interval(value: Mapping[str, Any] | None) -> str:
    """`+0.123 [+0.100, +0.146]`"""
    from gopo_lightning.evaluation.intervals import Interval

    return "–" if value is None else str(Interval(**value))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns that are as wide as they must be, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]


def draw(sampled: Any, path: Path) -> None:
    """Rewards within groups, the two advantages, the cosine of each group, and rewards against length."""
    import matplotlib

    matplotlib.use("Agg")
    import torch
    from matplotlib import pyplot

    from gopo_lightning.evaluation.reward_shape import advantages_of, standardised
    from gopo_lightning.objectives.advantages import grpo, ordinal

    rewards_PG = torch.where(sampled.rewards_PG.isfinite(), sampled.rewards_PG, torch.nan)
    z, lengths = standardised(rewards_PG).flatten(), sampled.lengths_PG.flatten()
    found, _ = advantages_of(rewards_PG, {"ordinal": ordinal, "grpo": grpo})
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), layout="constrained")
    known = ~z.isnan()
    axes[0][0].hist(z[known].tolist(), bins=40, color="C0")
    axes[0][0].set(title="Rewards within groups", xlabel="(reward − mean) / standard deviation", ylabel="completions")
    axes[0][1].scatter(found["grpo"].flatten(), found["ordinal"].flatten(), s=6, alpha=0.4)
    axes[0][1].set(title="Two advantages of each completion", xlabel="advantage of GRPO", ylabel="advantage of GOPO")
    both_P = found["grpo"].any(-1) & found["ordinal"].any(-1)
    cosines = torch.nn.functional.cosine_similarity(found["grpo"][both_P], found["ordinal"][both_P], dim=-1)
    axes[1][0].hist(cosines.tolist(), bins=30, color="C1")
    axes[1][0].set(title="Similarity of the two advantages", xlabel="cosine in a group", ylabel="groups")
    axes[1][1].scatter(lengths[known], z[known], s=6, alpha=0.4)
    axes[1][1].set(title="Rewards and length", xlabel="length in tokens", ylabel="(reward − mean) / standard deviation")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
