"""What the figures of a report show: curves of seeds, and their means with a band, over several axes. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from gopo_lightning.evaluation.contrasts import Contrast, curves_of
from gopo_lightning.evaluation.event_files import Curve, Run
from gopo_lightning.evaluation.intervals import Interval, student
from gopo_lightning.evaluation.run_groups import Group
from gopo_lightning.evaluation.seed_curves import Points, band, common_steps, over, resampled_band, sampled_tokens

STEPS = "optimiser step"
MAX_POINTS = 80
"""Of a curve. One that has more is drawn as means of neighbouring steps."""
WATCHED = (
    ("val/win_rate", "Win rate against the policy of step 0"),
    ("val/length_mean", "Length of completions in validation, tokens"),
    ("val/truncated_fraction", "Share of completions cut off, in validation"),
    ("train/entropy", "Entropy, nats per token"),
    ("train/kl", "KL to the reference, nats per token"),
    ("reward/tied_pair_fraction", "Share of pairs that tie"),
    ("reward/all_tied_group_fraction", "Share of groups where all tie"),
    ("reward/mean", "Reward in training"),
    ("completion/length_mean", "Length of completions in training, tokens"),
)
"""Tags that are shown whatever is compared."""


@dataclass(frozen=True)
class Line:
    """One group in a panel."""

    group: int
    label: str
    seeds: Sequence[Points]
    mean: Points
    low: Sequence[float]
    high: Sequence[float]
    """Bounds of the 95 % interval at the points of ``mean``; empty for one seed."""


@dataclass(frozen=True)
class Panel:
    """One figure."""

    name: str
    """Of its file."""
    title: str
    x: str
    caption: str
    lines: Sequence[Line]
    zero: bool = False
    """Has a line at 0."""


def _line(group: int, label: str, seeds: Sequence[Points], mean: Sequence[tuple[float, Interval]]) -> Line:
    known = bool(mean) and mean[0][1].n > 1
    low, high = ([getattr(i, bound) for _, i in mean] if known else [] for bound in ("low", "high"))
    return Line(group, label, seeds, [(x, i.mean) for x, i in mean], low, high)


def thinned(curve: Curve, every: int) -> Curve:
    """Means of ``every`` neighbouring steps at the last of them; the steps after the last whole ones are left out."""
    if every <= 1:
        return curve
    bins: dict[int, list[float]] = {}
    for step, value in curve.items():
        bins.setdefault(ceil(step / every) * every, []).append(value)
    last = max(curve, default=0)
    return {step: student(values).mean for step, values in bins.items() if step <= last}


def over_steps(groups: Sequence[Group], tag: str, title: str) -> Panel | None:
    """``tag`` at each step; the band is where all seeds of a group have a value."""
    found = {i: curves_of(group, tag) for i, group in enumerate(groups)}
    curves = [curve for group in found.values() for curve in group.values()]
    if not curves:
        return None
    last, longest = max(max(curve) for curve in curves), max(len(curve) for curve in curves)
    every = ceil(last / MAX_POINTS) if longest > MAX_POINTS else 1
    lines = []
    for i, group in found.items():
        thin = [thin for curve in group.values() if (thin := thinned(curve, every))]
        if thin:
            mean = [(float(step), interval) for step, interval in band(thin).items()]
            lines.append(_line(i, groups[i].label, [_points(curve) for curve in thin], mean))
    said = [*([tag] if title != tag else []), *([f"means of {every} steps"] if every > 1 else [])]
    return Panel(_file(tag), title, STEPS, ", ".join(said), lines)


def over_axis(groups: Sequence[Group], tag: str, name: str, x: str, axis: Callable[[Run], Curve]) -> Panel | None:
    """``tag`` over what ``axis`` says of a run at each step."""
    lines = []
    for i, group in enumerate(groups):
        curves = [over(curve, axis(group.runs[seed])) for seed, curve in curves_of(group, tag).items()]
        seeds = [points for points in curves if points]
        if seeds:
            lines.append(_line(i, group.label, seeds, resampled_band(seeds)))
    caption = f"{tag}; between validations straight lines"
    return Panel(f"{_file(tag)}-over-{name}", f"{tag} by {x}", x, caption, lines) if lines else None


def over_kl(groups: Sequence[Group], tag: str) -> Panel | None:
    """``tag`` against the KL of the same step: what a nat of distance from the reference buys. No band: both vary."""
    lines = []
    for i, group in enumerate(groups):
        paths: list[list[tuple[int, float, float]]] = []
        for seed, curve in curves_of(group, tag).items():
            kl = {0: 0.0, **group.runs[seed].scalars.get("train/kl", {})}
            steps = common_steps([curve, kl])
            if len(kl) > 1 and steps:
                paths.append([(step, kl[step], curve[step]) for step in steps])
        if paths:
            shared = common_steps([{step: x for step, x, _ in path} for path in paths])
            at = [{step: (x, y) for step, x, y in path} for path in paths]
            mean = [tuple(student([p[step][k] for p in at]).mean for k in (0, 1)) for step in shared]
            seeds = [[(x, y) for _, x, y in path] for path in paths]
            lines.append(Line(i, groups[i].label, seeds, [(x, y) for x, y in mean], [], []))
    caption = f"{tag} and train/kl of the same step (0 at step 0), in the order of steps; thick: means over seeds"
    name, x = f"{_file(tag)}-over-kl", "KL to the reference, nats per token"
    return Panel(name, f"{tag} by KL", x, caption, lines) if lines else None


def difference(groups: Sequence[Group], contrasts: Sequence[Contrast], tag: str) -> Panel | None:
    """The difference from the baseline at each step."""
    index = {group.label: i for i, group in enumerate(groups)}
    lines = []
    for c in contrasts:
        if c.tag == tag:
            mean = [(float(step), interval) for step, interval in c.by_step.items()]
            lines.append(_line(index[c.group], f"{c.group} − {c.baseline}", [], mean))
    if not lines:
        return None
    how = "same seed" if all(c.is_paired for c in contrasts) else "not of the same seeds"
    title = f"{tag}: difference from {contrasts[0].baseline}"
    return Panel(f"{_file(tag)}-difference", title, STEPS, f"{how}; band: 95 % interval", lines, zero=True)


def panels(groups: Sequence[Group], contrasts: Sequence[Contrast], tags: Sequence[str]) -> list[Panel]:
    """All figures: the first of ``tags`` over every axis, the others and what is watched over steps."""
    return [panel for panel in _all(groups, contrasts, tags) if panel is not None]


def _all(groups: Sequence[Group], contrasts: Sequence[Contrast], tags: Sequence[str]) -> Iterator[Panel | None]:
    first, *others = tags
    yield over_steps(groups, first, first)
    yield difference(groups, contrasts, first)
    yield over_axis(groups, first, "tokens", "completion tokens sampled in training", sampled_tokens)
    yield over_axis(groups, first, "seconds", "seconds of wall time", lambda run: run.seconds)
    yield over_kl(groups, first)
    titles: Mapping[str, str] = dict.fromkeys(others) | dict(WATCHED)  # type: ignore[assignment]
    for tag, title in titles.items():
        if tag != first:
            yield over_steps(groups, tag, title or tag)


def _points(curve: Curve) -> Points:
    return [(float(step), value) for step, value in curve.items()]


def _file(tag: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in tag)
