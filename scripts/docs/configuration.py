"""The page of the configuration, from the signatures and docstrings of what YAML can name."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

import docstring_parser

from gopo_lightning import PreferenceDataModule, PromptDataModule, RewardModelModule, objectives, rewards, rollout
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.distributed.strategies import FSDP2Strategy
from gopo_lightning.objectives.advantages import KIND
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.rollout import SamplingConfig
from gopo_lightning.training import callbacks
from gopo_lightning.training.config import ObjectiveConfig, RewardConfig, RolloutConfig, UpdateConfig
from gopo_lightning.training.gopo_module import GOPOModule
from gopo_lightning.training.placement import PlacementConfig

INTRODUCTION = """\
# Configuration

Every field of every class that a YAML file can name: type, default and meaning, read from the code when this site is
built. On the command line a field is a flag, such as `--model.init_args.rollout.num_completions=16`;
`gopo-lightning fit --config FILE --print_config` prints a configuration with all defaults filled in.

A class is given as `class_path` with `init_args`, a function as `function` with `init_args`; a name alone is enough
where there is nothing to set.
"""


def configuration() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for heading, things in sections():
        parts.append(f"\n## {heading}\n")
        parts += [section(path, thing) for path, thing in things]
    return "".join(parts)


def sections() -> Iterator[tuple[str, list[tuple[str, Callable[..., Any]]]]]:
    """Heading → the names under which YAML knows things, and the things."""
    groups: list[tuple[str, Callable[..., Any]]] = [
        ("policy", PolicyConfig),
        ("rollout", RolloutConfig),
        ("rollout.sampling", SamplingConfig),
        ("rewards", RewardConfig),
        ("objective", ObjectiveConfig),
        ("update", UpdateConfig),
        ("placement", PlacementConfig),
    ]
    yield "Policy training: `model.init_args`", [("gopo_lightning.GOPOModule", GOPOModule), *groups]
    yield "Reward sources: `rewards.sources`", list(public(rewards, "setup"))
    yield "Combining several rewards: `rewards.combine`", functions(rewards.combine.KIND.known)
    yield "Transforms: `rewards.transforms`", list(public(rollout, "position"))
    yield "Completions that mean the same: `clusters` of `SemanticEntropy`", list(public(rollout, "labels"))
    yield "Advantages: `objective.advantage`", functions(KIND.known)
    yield "Losses: `objective.loss`", list(public(objectives, "denominator"))
    yield "Sampling engines: `rollout.engine`", list(public(rollout, "generate"))
    data = [PromptDataModule, PreferenceDataModule]
    sources: list[tuple[str, Callable[..., Any]]] = [("train, validation, test, predict", PromptSource)]
    yield "Data: `data`", [*((f"gopo_lightning.{kind.__name__}", kind) for kind in data), *sources]
    yield "Reward-model training: `model`", [("gopo_lightning.RewardModelModule", RewardModelModule)]
    yield "Callbacks: `trainer.callbacks`", list(public(callbacks))
    path = f"{FSDP2Strategy.__module__}.{FSDP2Strategy.__name__}"
    yield "Strategy: `trainer.strategy`", [(path, FSDP2Strategy)]


def public(package: Any, *attributes: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The concrete classes of a package that have these attributes."""
    prefix = package.__name__.replace("training.callbacks", "callbacks")
    for name in package.__all__:
        thing = getattr(package, name)
        concrete = (
            inspect.isclass(thing) and not inspect.isabstract(thing) and not getattr(thing, "_is_protocol", False)
        )
        if concrete and all(hasattr(thing, attribute) for attribute in attributes):
            yield f"{prefix}.{name}", thing


def functions(known: dict[str, Callable[..., Any]]) -> list[tuple[str, Callable[..., Any]]]:
    """By their short names."""
    return list(known.items())


def section(path: str, thing: Callable[..., Any]) -> str:
    """Heading, what it is, and a table of its options."""
    told, described = docstring_parser.parse_from_object(thing), texts(thing)
    label = path.rpartition(".")[2] if path.startswith("gopo_lightning") else path
    said = "\n\n".join(text for text in (told.short_description, told.long_description) if text)
    rows = [
        f"| `{name}` | {kind} | {default} | {cell(described.get(name, ''))} |\n"
        for name, kind, default in options(thing)
    ]
    table = "".join(["| option | type | default | |\n|---|---|---|---|\n", *rows]) if rows else ""
    return f"\n### `{path}` {{: #{anchor(path)} data-toc-label='{label}' }}\n\n{prose(said)}\n\n{table}"


def texts(thing: Callable[..., Any]) -> dict[str, str]:
    """Option → what its docstring, or that of a base class, says of it."""
    described = [one for one in reversed(thing.__mro__) if one is not object] if isinstance(thing, type) else [thing]
    params = [param for one in described for param in docstring_parser.parse_from_object(one).params]
    return {param.arg_name: param.description or "" for param in params}


def options(thing: Callable[..., Any]) -> Iterator[tuple[str, str, str]]:
    """Name, type and default of what can be set."""
    if is_dataclass(thing):
        hints = get_type_hints(thing)
        for field in fields(thing):
            made = field.default_factory is not MISSING
            default = "" if made else "required" if field.default is MISSING else shown(field.default)
            yield field.name, kind_of(hints[field.name]), default
        return
    for name, parameter in inspect.signature(thing).parameters.items():
        if name in ("rewards_PG", "rewards_PGK") or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = "required" if parameter.default is parameter.empty else shown(parameter.default)
        yield name, kind_of(parameter.annotation), default


def shown(value: Any) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return f"`{ {None: 'null', True: 'true', False: 'false'}[value] }`"
    if is_dataclass(value):
        return "see below"
    if callable(value):
        return f"`{value.__name__}`" if hasattr(value, "__name__") else "see text"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def kind_of(annotation: Any) -> str:
    """A type, without the modules that its names come from."""
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b[a-z_]\w*\.(?=\w)", "", text)
    return f"`{text}`".replace("NoneType", "None")


def cell(text: str) -> str:
    """One line of a table, in which a bar ends a cell unless it is code."""
    parts = prose(" ".join(text.split())).split("`")
    return "`".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(parts))


def prose(text: str) -> str:
    """Docstrings mark code with two backticks."""
    return text.replace("``", "`")


def anchor(path: str) -> str:
    """Of a heading: the last part of a dotted path."""
    return re.sub(r"\W+", "-", path.removeprefix("gopo_lightning.")).strip("-").lower()
