"""A judge as the command line names it: any reward source of ours or of the user's own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from gopo_lightning.commands.class_files import in_arguments, in_value
from gopo_lightning.commands.duel import RECORDED, ClassParser
from gopo_lightning.commands.errors import UsageError
from gopo_lightning.commands.explained import explain
from gopo_lightning.commands.secrets import refuse_secrets
from gopo_lightning.evaluation.duels.policies import read_yaml
from gopo_lightning.objectives.python_files import as_given
from gopo_lightning.rewards import PairwiseSource, RewardSource, Source

JUDGES = (RewardSource, PairwiseSource)
"""Whatever ranks may judge."""


def prepared(arguments: Sequence[str]) -> tuple[list[str], str | None, list[Any] | None]:
    """Arguments that the parser takes; the name behind `rewards:`; and the sources of a whole config.

    Raises:
        ValueError: a file that names no judge.
    """
    given = in_arguments(arguments)
    for place, argument in enumerate(given):
        if argument == "--judge" or argument.startswith("--judge="):
            words = [argument.partition("=")[2]] if "=" in argument else given[place + 1 : place + 2]
            value = words[0] if words else ""
            rest = given[:place] + given[place + (1 if "=" in argument else 2) :]
            if value.startswith(RECORDED):
                return rest, value.removeprefix(RECORDED), None
            if Path(value).suffix in (".yaml", ".yml", ".json"):
                return _of_file(Path(value), rest)
    return given, None, None


def judge_of_file(path: Path, name: str | None = None) -> Source:
    """The judge that ``path`` describes, not set up: a reward source, or of a whole config the one called ``name``.

    Raises:
        ValueError: a file that names no judge, arguments that it does not take, or a secret among them.
    """
    return _named([_instance(source) for source in _sources_of(path)], name)[0]


def _of_file(path: Path, rest: list[str]) -> tuple[list[str], None, list[Any] | None]:
    sources = _sources_of(path)
    config = read_yaml(path)
    if "class_path" in config:
        return [*rest, f"--judge={json.dumps(config)}"], None, None
    return rest, None, sources


def _sources_of(path: Path) -> list[Any]:
    """Configs of the sources in ``path``: one, or those of a whole config."""
    if not path.is_file():
        raise ValueError(f"--judge={path}: there is no such file. Correct the path.")
    sources = config = read_yaml(path)
    if isinstance(config, Mapping) and "class_path" in config:
        return [config]
    for key in ("model", "init_args", "rewards", "sources"):
        sources = sources.get(key) if isinstance(sources, Mapping) else None
    if not isinstance(sources, list) or not sources:
        raise ValueError(
            f"--judge={path} holds neither class_path with init_args, nor model.init_args.rewards.sources. Write the "
            "class_path of a reward source into it."
        )
    return sources


def chosen_judge(
    parser: ArgumentParser, parsed: Any, sources: list[Any] | None, name: str | None
) -> tuple[Source, Mapping[str, Any]]:
    """The judge, not set up, and its whole config.

    Raises:
        ValueError: no judge, a secret in its config, or not one of the sources of that name.
    """
    if sources is None:
        if parsed.judge is None:
            raise ValueError(
                "no judge is named. Give --judge: a YAML file, a class of reward sources, or rewards:NAME."
            )
        return _instance(yaml.safe_load(parser.dump(parsed, skip_none=False))["judge"])
    return _named([_instance(source) for source in sources], name)


def _named(
    candidates: Sequence[tuple[Source, Mapping[str, Any]]], name: str | None
) -> tuple[Source, Mapping[str, Any]]:
    names = [source.name for source, _ in candidates]
    matching = [candidate for candidate in candidates if name in (None, candidate[0].name)]
    if len(matching) != 1:
        raise ValueError(
            f"--judge_name={name}: the config has the sources {names}. Name one of them, which is the judge."
        )
    return matching[0]


def _instance(source: Mapping[str, Any]) -> tuple[Source, Mapping[str, Any]]:
    """A source from its class_path and init_args, and these with the defaults filled in."""
    parser = ClassParser()
    parser.add_subclass_arguments(JUDGES, "judge")
    try:
        parsed = parser.parse_object({"judge": in_value(source)})
    except UsageError as error:
        raise UsageError(explain(str(error), (), (), {})) from error
    config = yaml.safe_load(as_given(parser.dump(parsed, skip_none=False)))["judge"]
    refuse_secrets({"judge": config})
    return parser.instantiate_classes(parsed).judge, config


def device_of(name: str) -> torch.device:
    """``auto`` is the accelerator where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
