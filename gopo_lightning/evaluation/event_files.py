"""Reads back what a run wrote: its curves, its sampled groups and its config.

TensorBoard's own reader checks every byte in pure Python, 0.15 s for 60 steps; this one checks the lengths alone, which
is enough to see where a file was cut off, and takes a hundredth of it.
"""

import csv
import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray

EVENT_FILES, CSV_METRICS, SAVED_CONFIG = "events.out.tfevents.*", "metrics.csv", "config.yaml"
Curve = Mapping[int, float]
"""Value at each optimiser step, in their order; all of them finite."""
TRAINED = ("train/", "reward/")
"""Tags that only training writes."""
_NO_METRIC = ("hp_metric", "epoch")
"""Lightning's own; the first is written whenever a file is begun, at step 0."""
WHAT_A_RUN_IS = (
    f"A run folder holds the {EVENT_FILES} of TensorBoardLogger (or the {CSV_METRICS} of CSVLogger) "
    f"and {SAVED_CONFIG}, such as runs/quickstart/gopo-seed1."
)


@dataclass(frozen=True)
class Run:
    """One training run, whatever the number of times it was resumed."""

    folder: Path
    config: Mapping[str, Any]
    """What was saved with it; empty if nothing was."""
    scalars: Mapping[str, Curve]
    seconds: Curve
    """Wall time until each step: since the event file was begun, without the time between a stop and its resume."""
    texts: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Markdown by tag and step."""
    notes: Sequence[str] = ()
    """What a reader has to know, such as values that were left out."""

    @property
    def last_step(self) -> int:
        """The last that it wrote a value for."""
        return max((step for curve in self.scalars.values() for step in curve), default=0)

    @property
    def has_trained(self) -> bool:
        """Not so after `validate`, `test` or `predict`, nor where training ended before its first step."""
        return any(tag.startswith(TRAINED) for tag in self.scalars)


def goes_on(later: Run, earlier: Run) -> bool:
    """A resume from a checkpoint of ``earlier`` in a folder of its own, which is what Lightning makes by default."""
    before, after = _part_of(earlier).trained_steps(), _part_of(later).trained_steps()
    if not before or not after or 0 in later.seconds:
        return False
    gap = max((b - a for steps in (before, after) for a, b in itertools.pairwise(steps)), default=1)  # of the log
    return before[0] < after[0] <= earlier.last_step + gap


def joined(earlier: Run, later: Run) -> Run:
    """One run of a run and its resume, as if both were in one folder."""
    whole = _joined([_part_of(earlier), _part_of(later)])
    notes = [*earlier.notes, *later.notes, f"{later.folder} goes on with {earlier.folder}: they are one run"]
    return Run(earlier.folder, earlier.config, _in_order(whole.scalars), _sorted(whole.seconds), whole.texts, notes)


def _part_of(run: Run) -> "_Part":
    texts = {tag: dict(values) for tag, values in run.texts.items()}
    return _Part({tag: dict(curve) for tag, curve in run.scalars.items()}, dict(run.seconds), texts)


def _sorted(curve: Mapping[int, float]) -> dict[int, float]:
    return {step: curve[step] for step in sorted(curve)}


def _in_order(scalars: Mapping[str, Mapping[int, float]]) -> dict[str, Curve]:
    return {tag: _sorted(curve) for tag, curve in scalars.items()}


@dataclass
class _Part:
    """What one file holds: the run from its start, or from where it was resumed."""

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    is_torn: bool = False

    def trained_steps(self) -> list[int]:
        """With values of training, in order; none after a validation, say."""
        return sorted({step for tag, curve in self.scalars.items() if tag.startswith(TRAINED) for step in curve})


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs that are in or below ``paths``, and what was passed over there because it trained nothing.

    Raises:
        ValueError: there is no training run in one of ``paths``.
    """
    runs: dict[Path, Run] = {}
    passed_over = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is {'a file' if path.exists() else 'not there'}. {WHAT_A_RUN_IS}")
        folders = {file.parent for pattern in (EVENT_FILES, CSV_METRICS) for file in path.rglob(pattern)}
        found = {folder: read_run(folder) for folder in sorted(folders) if folder not in runs}
        trained = {folder: run for folder, run in found.items() if run.has_trained}
        if not trained and not folders & runs.keys():
            what = "what is there trained nothing" if found else "there are no curves"
            raise ValueError(f"there is no training run in {path}: {what}. {WHAT_A_RUN_IS}")
        passed_over += [f"{folder} is left out: it trained nothing" for folder in found if folder not in trained]
        runs |= trained
    return list(runs.values()), passed_over


def read_run(folder: Path) -> Run:
    """The run in ``folder``.

    Of several files the later ones go on with the earlier: from the first step that a later one trained, the earlier
    values do not count, so that steps which were done again after a resume are there once. A file in which nothing was
    trained, of `validate` or `test`, adds what is not there yet.

    A file that cannot be read to its end counts up to there.

    Raises:
        ValueError: its config is no YAML.
    """
    files = sorted(folder.glob(EVENT_FILES), key=_age)
    parts = [_read_events(file) for file in files] or [_read_csv(file) for file in _csv_files(folder)]
    notes = [
        f"{file.name} ends in the middle of a record; what is before it counts"
        for file, part in zip(files, parts, strict=False)
        if part.is_torn
    ]
    whole = _joined(parts)
    scalars: dict[str, Curve] = {}
    for tag, curve in _in_order(whole.scalars).items():
        scalars[tag] = {step: value for step, value in curve.items() if isfinite(value)}
        if lost := len(curve) - len(scalars[tag]):
            notes.append(f"{tag}: {lost} of {len(curve)} values are not finite and are left out")
    return Run(folder, _config(folder / SAVED_CONFIG), scalars, _sorted(whole.seconds), whole.texts, notes)


def _config(path: Path) -> Mapping[str, Any]:
    """Empty if there is none."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Repair or remove it; without one a run is of no group."
        ) from error
    return config if isinstance(config, Mapping) else {}


def _age(file: Path) -> tuple[int, str]:
    """events.out.tfevents.<seconds>.<host>.<process>.<number> sorts by its seconds."""
    seconds = file.name.split("tfevents.")[-1].split(".")[0]
    return int(seconds) if seconds.isdigit() else 0, file.name


def _csv_files(folder: Path) -> list[Path]:
    """metrics-1.csv, metrics-2.csv, …, metrics.csv: in the order in which they were written."""
    earlier = folder.glob(CSV_METRICS.replace(".csv", "-*.csv"))
    numbered = {int(file.stem.rpartition("-")[2]): file for file in earlier if file.stem.rpartition("-")[2].isdigit()}
    last = folder / CSV_METRICS
    return [*(numbered[k] for k in sorted(numbered)), *([last] if last.exists() else [])]


def _joined(parts: Sequence[_Part]) -> _Part:
    """One run; see `read_run`."""
    whole = _Part()
    for part in parts:
        start = next(iter(part.trained_steps()), None)
        if start is not None and 0 in part.seconds:
            whole = _Part()  # not a resume: begun again
        elif start is not None:
            kept: list[dict[int, Any]] = [*whole.scalars.values(), *whole.texts.values(), whole.seconds]
            for values in kept:
                for step in [step for step in values if step >= start]:
                    del values[step]
        if start is not None:
            before = max(whole.seconds.values(), default=0.0)
            whole.seconds |= {step: before + value for step, value in part.seconds.items() if step not in whole.seconds}
        evaluates = start is None  # later, maybe on other data: what the run itself measured stays
        for tag, curve in part.scalars.items():
            known = whole.scalars.setdefault(tag, {})
            known |= curve | known if evaluates else curve
        for tag, texts in part.texts.items():
            shown = whole.texts.setdefault(tag, {})
            shown |= texts | shown if evaluates else texts
    return whole


def _read_events(file: Path) -> _Part:
    part, began = _Part(), None
    for record in _records(file.read_bytes(), part):
        try:
            event = event_pb2.Event.FromString(record)
        except DecodeError:
            part.is_torn = True
            break
        began = event.wall_time if began is None else began
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if value.tag in _NO_METRIC:
                continue
            if kind == "simple_value":
                part.scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                part.seconds.setdefault(event.step, event.wall_time - began)
            elif kind == "tensor" and value.metadata.plugin_data.plugin_name == "text":
                texts = part.texts.setdefault(value.tag.removesuffix("/text_summary"), {})
                texts[event.step] = str(make_ndarray(value.tensor).flat[0], "utf-8", "replace")
    return part


def _records(data: bytes, part: _Part) -> Iterator[bytes]:
    """Length (8 bytes), its checksum (4), the record and its checksum (4), again and again."""
    at = 0
    while at < len(data):
        head = data[at : at + 12]
        if len(head) < 12 or masked_crc32c(head[:8]) != struct.unpack("<I", head[8:])[0]:
            part.is_torn = True
            return
        length = struct.unpack("<Q", head[:8])[0]
        if at + length + 16 > len(data):
            part.is_torn = True
            return
        yield data[at + 12 : at + 12 + length]
        at += length + 16


def _read_csv(file: Path) -> _Part:
    """A row a step and kind of metric; it has neither times nor texts."""
    part = _Part()
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if None in row.values():  # the last, of a run that was killed in the middle of it
                part.is_torn = True
                break
            for tag, value in row.items():
                if tag and tag not in ("step", *_NO_METRIC) and value:
                    part.scalars.setdefault(tag, {})[int(row["step"])] = float(value)
    return part
