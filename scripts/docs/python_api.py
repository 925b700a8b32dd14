"""The page of the Python API: what is public, for mkdocstrings to fill in."""

import inspect
from typing import Any

import gopo_lightning
from gopo_lightning import objectives, rewards, rollout, types
from gopo_lightning.objectives import advantages, credit
from gopo_lightning.training import callbacks

INTRODUCTION = """\
# Python API

The public classes and functions, with their docstrings, for use in Python and for code of your own. Shapes are suffixes
of names: P prompts, G completions of each, N = P·G, T tokens, K rewards. What a YAML file can set is listed more
briefly under [Configuration](config.md).

`GOPOModule` and `PromptDataModule` work with Lightning's `Trainer`; `trainer_defaults()` are the options that the
command line gives it.

"""

SECTIONS: list[tuple[str, Any, list[str]]] = [
    ("Modules and data", gopo_lightning, [name for name in gopo_lightning.__all__ if name != "__version__"]),
    ("Rewards", rewards, rewards.__all__),
    ("Rollout", rollout, rollout.__all__),
    ("Objectives", objectives, objectives.__all__),
    ("Advantages", advantages, list(advantages.KIND.known)),
    ("Credit", credit, ["broadcast", "reward_to_go"]),
    ("Callbacks", callbacks, callbacks.__all__),
    ("Data between stages", types, ["Prompt", "PromptBatch", "Completions", "Rollout", "Experience"]),
]
"""Heading, package, and its names."""


def python_api() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for heading, package, names in SECTIONS:
        parts.append(f"## {heading}\n\n")
        parts += [f"::: {place(getattr(package, name))}\n\n" for name in names if documented(getattr(package, name))]
    return "".join(parts)


def documented(thing: Any) -> bool:
    """A class or function of this package, not a type alias or module."""
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith("gopo_lightning")


def place(thing: Any) -> str:
    """Where it is defined: names of packages are imported on first use, which a reader of source cannot follow."""
    return f"{thing.__module__}.{thing.__qualname__}"
