"""A reward that is any Python callable."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gopo_lightning.rewards.base import RewardSource, Scores, SourceConfigError
from gopo_lightning.structs import Prompt


def load_callable(path: str) -> Callable[..., Any]:
    """The callable at a dotted path, such as `my_package.rewards.brevity`; ValueError when there is none."""
    module_name, _, attribute = path.rpartition(".")
    remedy = "Give the dotted path of a callable that can be imported, such as my_package.rewards.brevity."
    if not module_name:
        raise ValueError(f"'{path}' is no dotted path. {remedy}")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load '{path}': {error}. {remedy}") from error
    if not callable(function):
        raise ValueError(f"'{path}' is a {type(function).__name__}, not a callable. {remedy}")
    return function


class FunctionReward(RewardSource):
    """Scores completions with a Python callable.

    The callable gets keyword arguments, each a list of N: `prompts` (their text), `completions`, and the
    dataset's other columns; only those that its signature names, or all of them when it takes `**kwargs`. It
    returns N numbers, None or NaN where a completion has no valid score:

        def brevity(completions: list[str], max_words: int = 20, **kwargs: list) -> list[float]:
            return [-float(len(c.split()) > max_words) for c in completions]

    Args:
        function: dotted path of the callable, or the callable itself.
        name: in logs and error messages; the callable's own name when null.
        options: more keyword arguments, the same in every call; they take precedence over columns of the same
            name.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.function = load_callable(function) if isinstance(function, str) else function
        self.name = name or str(getattr(self.function, "__name__", type(self.function).__name__))
        self.options = dict(options or {})
        parameters = inspect.signature(self.function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._required = {p.name for p in parameters if p.name in self._accepted and p.default is p.empty}
        self._check_signature()

    def setup(self, device: torch.device) -> None:
        """Nothing to load."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """What the callable returns.

        Raises:
            SourceConfigError: a column that the signature requires is not in the data.
        """
        shared = set.intersection(*(set(p.columns) for p in prompts)) if prompts else set()
        known = {"prompts", "completions", *self.options}
        if missing := sorted(self._required - known - shared):
            raise SourceConfigError(
                f"reward source '{self.name}' requires the columns {missing}, but the data have "
                f"{sorted(shared)}. Add them to the dataset, name them under its columns, or give them a "
                "default in the function's signature."
            )
        arguments: dict[str, Any] = {c: [p.columns[c] for p in prompts] for c in shared}
        arguments |= {"prompts": [p.text for p in prompts], "completions": list(completions)} | self.options
        return self.function(**{k: v for k, v in arguments.items() if self._takes_all or k in self._accepted})

    def _check_signature(self) -> None:
        if not self._takes_all and "completions" not in self._accepted:
            raise ValueError(
                f"reward function '{self.name}' takes no argument `completions`; name one in its signature."
            )
        if unknown := [] if self._takes_all else sorted(set(self.options) - self._accepted):
            raise ValueError(
                f"reward function '{self.name}' does not take the options {unknown}; it takes "
                f"{sorted(self._accepted)}. Remove or rename them."
            )
        if reserved := sorted({"prompts", "completions"} & set(self.options)):
            raise ValueError(
                f"reward function '{self.name}': the options {reserved} are filled by the trainer. Remove them."
            )
