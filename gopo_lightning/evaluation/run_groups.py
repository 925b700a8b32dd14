"""Which runs differ in nothing but their seeds, and in what the others differ. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gopo_lightning.evaluation.event_files import Run, goes_on, joined

Flat = Mapping[str, str]
"""Dotted key → value as text."""
ABSENT = "(not there)"
_NO_MATTER = re.compile(
    r"export_\w+|push_\w+|ckpt_path|weights_only|trainer\.(logger|default_root_dir|enable_progress_bar"
    r"|enable_model_summary|profiler|log_every_n_steps)(\..*)?"
)
"""Where and how often a run writes, not what it learns."""
_WATCHERS = (
    "SampleTable",
    "PairTable",
    "ProgressBar",
    "Throughput",
    "ModelCheckpoint",
    "LearningRateMonitor",
    "DeviceStatsMonitor",
)
"""Callbacks that only look on."""
_FIRST = ("objective.advantage", "objective.", "rewards.", "update.")
"""What a group is named by, if that tells the groups apart."""
_MAX_CHARS = 40
_NAMED_SEED = re.compile(r"[-_./]*seed[-_=]?(\d+)$")


@dataclass(frozen=True)
class Group:
    """Runs of one config under several seeds."""

    label: str
    config: Flat
    """Without seeds and what does not matter."""
    runs: Mapping[str, Run]
    """By seed."""


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": [1, None]}}`` → ``{"a.b.0": "1", "a.b.1": "null"}``; callbacks are named by their class, a second
    one of it by its number too.
    """
    if isinstance(value, Mapping) and value:
        items = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        items = list(zip(_names(value, prefix), value, strict=True))
    else:
        return {prefix: "null" if value is None else str(value)}
    return {k: v for key, part in items for k, v in flatten(part, f"{prefix}.{key}" if prefix else key).items()}


def _names(parts: Sequence[Any], prefix: str) -> list[str]:
    """Of the items of a list."""
    names: list[str] = []
    counts: Counter[str] = Counter()
    for index, part in enumerate(parts):
        name = str(index)
        if prefix == "trainer.callbacks" and isinstance(part, Mapping) and "class_path" in part:
            name = str(part["class_path"]).rpartition(".")[2]
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}.{counts[name]}")
    return names


def settings(config: Mapping[str, Any]) -> Flat:
    """What decides what a run learns, but for its seeds."""
    watchers = tuple(f"trainer.callbacks.{name}." for name in _WATCHERS)
    return {
        key: value
        for key, value in (flatten(config).items() if config else ())
        if not is_seed(key) and not _NO_MATTER.fullmatch(key) and not key.startswith(watchers)
    }


def is_seed(key: str) -> bool:
    """`seed_everything`, and what is called `seed`: the module's, the data's, those of rewards."""
    return key == "seed_everything" or key.rpartition(".")[2] == "seed"


def seed_of(run: Run) -> str:
    """``1``, or ``1, model 2`` where a seed of its own was given; of a run without a config what its folder says.

    The seeds of parts, such as a reward's, are not named where they are 0 or that of the run.
    """
    flat = flatten(run.config)
    if not flat or "seed_everything" not in flat:
        named = _NAMED_SEED.search(run.folder.name)
        return named[1] if named else "unknown"
    seed = flat["seed_everything"]
    own = {short_name(key.rpartition(".")[0]): value for key, value in flat.items() if is_seed(key) and "." in key}
    told = {"model", "data"} & own.keys() | {name for name, value in own.items() if value not in ("0", seed)}
    return ", ".join([seed, *(f"{name} {own[name]}" for name in own if name in told and own[name] != "null")])


def differing(configs: Sequence[Flat]) -> dict[str, list[str]]:
    """Keys whose values are not the same in all ``configs``, with the value in each."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [config.get(key, ABSENT) for config in configs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def short_name(key: str) -> str:
    """``model.init_args.objective.advantage.function`` → ``objective.advantage``."""
    parts = [part for part in key.split(".") if part != "init_args"]
    if len(parts) > 1 and parts[-1] in ("class_path", "function"):
        parts.pop()
    return ".".join(parts[1:] if parts[0] == "model" and len(parts) > 1 else parts)


def short_value(value: str) -> str:
    """``gopo_lightning.objectives.ClippedSurrogate`` → ``ClippedSurrogate``; a path keeps its last part."""
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
        return value.rpartition(".")[2]
    tail = value.rstrip("/").rpartition("/")[2] if value.count("/") > 1 else value
    return tail if len(tail) <= _MAX_CHARS else tail[: _MAX_CHARS - 1] + "…"


def labels(configs: Sequence[Flat]) -> list[str]:
    """A name for each of ``configs``: as few of the settings in which they differ as tell them all apart."""
    differences = differing(configs)

    def preference(key: str) -> tuple[int, int, str]:
        name = short_name(key)
        first = next((i for i, begin in enumerate(_FIRST) if name.startswith(begin)), len(_FIRST))
        return first, len(name), name

    chosen: list[str] = []
    apart = 1
    for key in sorted(differences, key=preference):
        told = len(set(zip(*(differences[k] for k in [*chosen, key]), strict=True)))
        if told > apart:
            chosen, apart = [*chosen, key], told
    names = [
        ", ".join(f"{short_name(key)}={short_value(differences[key][i])}" for key in chosen)
        for i in range(len(configs))
    ]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({i})".strip() for i, name in enumerate(names, 1)]


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """``runs`` by their settings, and what was left out: of a seed that was run twice, the run that got less far.

    A run without a config is of a group with those whose folder is called alike but for `seed<n>`.
    """
    members: dict[tuple[str, ...], dict[str, Run]] = {}
    configs: dict[tuple[str, ...], Flat] = {}
    notes: list[str] = []
    for run in runs:
        config = settings(run.config) or {"run": _name_without_seed(run)}
        key = tuple(f"{name}={value}" for name, value in sorted(config.items()))
        seeds, seed = members.setdefault(key, {}), seed_of(run)
        configs[key] = config
        seeds[seed] = _one_of(seeds[seed], run, notes) if seed in seeds else run
    names = labels(list(configs.values()))
    if len(names) == 1:
        names = [next(iter(configs.values())).get("run", "all runs")]
    groups = [
        Group(name, configs[key], dict(sorted(members[key].items(), key=_by_number)))
        for name, key in zip(names, members, strict=True)
    ]
    return groups, notes


def _name_without_seed(run: Run) -> str:
    """Of its folder; the whole path where there is no seed in it."""
    named = _NAMED_SEED.search(run.folder.name)
    return run.folder.name[: named.start()] or str(run.folder.parent) if named else str(run.folder)


def _one_of(first: Run, second: Run, notes: list[str]) -> Run:
    """Of two runs of one config and seed: both as one if one goes on with the other, else the one that got further."""
    for earlier, later in ((first, second), (second, first)):
        if goes_on(later, earlier):
            return joined(earlier, later)
    less, more = sorted((first, second), key=lambda run: run.last_step)
    notes.append(f"{less.folder} is left out: {more.folder} has the same config and seed, and got at least as far")
    return more


def _by_number(item: tuple[str, Run]) -> tuple[int, str]:
    digits = re.match(r"\d+", item[0])
    return int(digits[0]) if digits else -1, item[0]


def baseline_of(groups: Sequence[Group], wanted: str | None = None) -> int:
    """The index of the group that the others are compared with: ``wanted``, or GRPO, or the first.

    Raises:
        ValueError: no group or several are called ``wanted``.
    """
    if wanted is None:
        grpo = [i for i, group in enumerate(groups) if "grpo" in _words(group.label)]
        return grpo[0] if len(grpo) == 1 else 0
    exact = [i for i, group in enumerate(groups) if group.label == wanted]
    found = exact or [i for i, group in enumerate(groups) if wanted in _words(group.label)]
    if len(found) != 1:
        names = "; ".join(group.label for group in groups)
        raise ValueError(f"the baseline is {wanted!r}, which {len(found)} of the groups are called. They are: {names}")
    return found[0]


def _words(label: str) -> list[str]:
    """Label, settings and values of it."""
    parts = label.split(", ")
    return [label, *parts, *(part.partition("=")[2] for part in parts)]
