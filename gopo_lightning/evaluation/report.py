"""All that a report says, before it is drawn or written. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gopo_lightning.evaluation.contrasts import Contrast, contrasts, curves_of, sentence
from gopo_lightning.evaluation.event_files import Run
from gopo_lightning.evaluation.intervals import Interval, student
from gopo_lightning.evaluation.panels import Panel, panels
from gopo_lightning.evaluation.run_groups import Group, baseline_of, differing, group_runs
from gopo_lightning.evaluation.sample_tables import Sample, parse

MAX_SAMPLED_STEPS = 6


FEW = 4
"""Comparisons that are all put into words; of more, the clearest."""


@dataclass(frozen=True)
class Sampled:
    """One prompt at one step, as the groups answered it."""

    row: int
    prompt: str
    columns: Sequence[Sequence[tuple[str, Sample]]]
    """Of each group the best and the worst completion; empty where it has not been shown this prompt."""


@dataclass(frozen=True)
class Report:
    """What `report_page` writes."""

    groups: Sequence[Group]
    baseline: Group
    tags: Sequence[str]
    contrasts: Sequence[Contrast]
    panels: Sequence[Panel]
    samples: Mapping[int, Sequence[Sampled]]
    """By step."""
    sample_seeds: Sequence[str]
    """Whose samples are shown, of each group."""
    config_rows: Mapping[str, Sequence[str]]
    """Setting → its value in each group, where they differ."""
    notes: Sequence[str]

    @property
    def answers(self) -> list[str]:
        """In words: who is ahead on the first tag."""
        if len(self.groups) == 1:
            return ["All runs have the same config, so there is nothing to compare."]
        compared = [c for c in self.contrasts if c.tag == self.tags[0]]
        told = compared
        if len(compared) > FEW:
            told = sorted((c for c in compared if c.is_clear), key=lambda c: c.p)[:FEW]
        found = [sentence(c, len(self.contrasts)) for c in told]
        if len(told) < len(compared):
            clear = sum(c.is_clear for c in compared)
            found.append(
                f"{clear} of {len(compared)} groups can be told apart from {self.baseline.label} on {self.tags[0]}; "
                "the table has all of them."
            )
        return found or [f"The groups have no step in common at which all have {self.tags[0]}: nothing is compared."]

    def final(self, group: Group, tag: str) -> tuple[int, Interval] | None:
        """Mean over the seeds of ``group`` at the last step that all have."""
        curves = list(curves_of(group, tag).values())
        steps = set.intersection(*(set(curve) for curve in curves)) if curves else set()
        return (last, student([curve[last] for curve in curves])) if (last := max(steps, default=-1)) >= 0 else None

    def numbers(self) -> dict[str, Any]:
        """For programs: what is compared and how it came out; None for what is not known."""
        groups = [
            {"label": group.label, "runs": {seed: str(run.folder) for seed, run in group.runs.items()}}
            for group in self.groups
        ]
        found: dict[str, Any] = {"baseline": self.baseline.label, "groups": groups, "tags": list(self.tags)}
        return _without_nan(found | {"answers": self.answers, "contrasts": [asdict(c) for c in self.contrasts]})


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reward_tags(runs: Sequence[Run]) -> list[str]:
    """What is compared if nothing is said: the reward in validation, of several sources each too, and the win rate.

    Without any validation, the reward in training; of reward models their accuracy.
    """
    seen = {tag: None for run in runs for tag in sorted(run.scalars)}
    if "val/reward" not in seen:
        others = ("val/pair_accuracy", "val/pair_accuracy_all", "reward/mean")
        return [next((tag for tag in others if tag in seen), "train/loss")]
    sources = [tag for tag in seen if tag.startswith("val/") and tag.count("/") == 2 and tag.endswith("/reward")]
    return ["val/reward", *(sources if len(sources) > 1 else []), *(["val/win_rate"] if "val/win_rate" in seen else [])]


def summarise(
    runs: Sequence[Run], tags: Sequence[str] = (), baseline: str | None = None, notes: Sequence[str] = ()
) -> Report:
    """Group, compare, and choose what is shown.

    Raises:
        ValueError: no run has one of ``tags``, or no group is called ``baseline``.
    """
    tags = list(tags) or reward_tags(runs)
    for tag in tags:
        if not any(run.scalars.get(tag) for run in runs):
            known = sorted({tag for run in runs for tag in run.scalars if tag.startswith(("val/", "reward/"))})
            known = [tag for tag in known if any(run.scalars.get(tag) for run in runs)]
            is_there = any(tag in run.scalars for run in runs)
            what = f"{tag!r} is not finite in any run" if is_there else f"no run has {tag!r}"
            raise ValueError(f"{what}. Name others with --tags; they have: {', '.join(known) or 'none'}")
    groups, left_out = group_runs(runs)
    base = groups[baseline_of(groups, baseline)]
    found = contrasts(groups, base, tags)
    seeds, samples = _samples(groups)
    rows = differing([group.config for group in groups])
    notes = [*notes, *left_out, *_notes(groups, tags)]
    return Report(groups, base, tags, found, panels(groups, found, tags), samples, seeds, rows, notes)


def _notes(groups: Sequence[Group], tags: Sequence[str]) -> list[str]:
    runs = [run for group in groups for run in group.runs.values()]
    places: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            places.setdefault(note, []).append(str(run.folder))
    notes = [
        f"{folders[0]}{f' and {len(folders) - 1} more' if len(folders) > 1 else ''}: {note}"
        for note, folders in places.items()
    ]
    if tags == ["reward/mean"]:
        notes.append("No run was validated: the reward is that of the training prompts, which change at every step.")
    longest = max(run.last_step for run in runs)
    for run in runs:
        if run.last_step < longest:
            notes.append(
                f"{run.folder} ends at step {run.last_step} of {longest}: what is compared with it ends there."
            )
    for group in groups:
        if len(group.runs) == 1:
            notes.append(f"{group.label} has one seed: its curves have no band.")
        if "unknown" in group.runs:
            folder = group.runs["unknown"].folder
            notes.append(f"{folder} has no config.yaml, and its name no seed<n>: it is paired with no other run.")
    return notes


def _samples(groups: Sequence[Group]) -> tuple[list[str], dict[int, list[Sampled]]]:
    """Of one seed, which all groups have if there is one; at most `MAX_SAMPLED_STEPS` steps, the last among them."""
    shared = [seed for seed in groups[0].runs if all(seed in group.runs for group in groups)]
    seeds = [shared[0] if shared else next(iter(group.runs)) for group in groups]
    runs = [group.runs[seed] for group, seed in zip(groups, seeds, strict=True)]
    tags = sorted({tag for run in runs for tag in run.texts if tag.startswith("samples/")})
    steps = sorted({step for run in runs for tag in tags for step in run.texts.get(tag, {})})
    if len(steps) > MAX_SAMPLED_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_SAMPLED_STEPS - 1))] for i in range(MAX_SAMPLED_STEPS)]
    return seeds, {step: rows for step in steps if (rows := _at(step, runs, tags))}


def _at(step: int, runs: Sequence[Run], tags: Sequence[str]) -> list[Sampled]:
    found: dict[tuple[int, str], list[list[tuple[str, Sample]]]] = {}
    for i, run in enumerate(runs):
        for tag in tags:
            table = parse(run.texts.get(tag, {}).get(step, ""))
            if table is None:
                continue
            columns = found.setdefault((table.row, table.prompt), [[] for _ in runs])
            valid = [sample for sample in table.samples if sample.reward != "none"]
            columns[i] = [("best", valid[0])] if valid else []
            columns[i] += [("worst", valid[-1])] if len(valid) > 1 else []
    return [Sampled(row, prompt, columns) for (row, prompt), columns in found.items()]
