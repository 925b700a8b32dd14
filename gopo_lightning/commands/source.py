"""A reward source from a YAML file of its own, as `--judge` takes it."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from gopo_lightning.commands.secrets import refuse_secrets
from gopo_lightning.rewards import PairwiseSource, RewardSource, Source


def load_source(path: Path) -> Source:
    """The source that ``path`` describes: `class_path` and `init_args`, as in `rewards.sources` of a configuration.

    Raises:
        ValueError: no such file, no such class, or arguments that it does not have.
    """
    if not path.exists():
        raise ValueError(f"there is no file {path}; it should hold class_path and init_args of a reward source")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "class_path" not in content:
        raise ValueError(f"{path} should hold class_path and init_args of a reward source, such as LLMJudge")
    refuse_secrets(content)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=RewardSource | PairwiseSource)
    try:
        loaded: Any = parser.instantiate_classes(parser.parse_object({"source": content}))
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    source: Source = loaded.source
    return source
