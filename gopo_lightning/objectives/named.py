"""Functions that a config names: by a name of ours, or by the dotted path or the file of the user's own."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args, get_origin

import torch
from torch import Tensor

from gopo_lightning.objectives.python_files import dotted

Named: TypeAlias = Callable[[Tensor], Tensor]


def load_callable(path: str) -> Callable[..., Any]:
    """The callable at a dotted path, `my_package.rewards.brevity`, or in a file, `./rewards.py:brevity`.

    Raises:
        ValueError: there is none.
    """
    remedy = (
        "Give a callable by its dotted path, such as my_package.rewards.brevity, or its file, ./rewards.py:brevity."
    )
    if "." not in path:
        raise ValueError(f"'{path}' is no dotted path. {remedy}")
    return _import(path, f"cannot load '{path}'", f"'{path}'", "callable", remedy)


@dataclass(frozen=True)
class Kind:
    """What a config names in one place, an advantage for example: functions of one tensor, with options of their own.

    Each returns one real number a completion, [P, G].
    """

    noun: str
    """In error messages: `advantage`."""
    argument: str
    """Of every such function, the first: `rewards_PG`."""
    axes: str
    """Of this argument: `prompts, completions`."""
    known: Mapping[str, Callable[..., Tensor]]
    """Ours, by name."""

    def find(self, name: str) -> Callable[..., Tensor]:
        """The function of that name, at that dotted path or in that file; ValueError when there is none."""
        if name in self.known:
            return self.known[name]
        remedy = (
            f"Use one of {sorted(self.known)} or a function of {self.argument}, by its dotted path or its file "
            "(./advantages.py:mine)."
        )
        what = f"{self.noun} '{name}'"
        if "." not in name:
            raise ValueError(f"unknown {what}. {remedy}")
        return _import(name, f"{what} cannot be imported", what, "function", remedy)

    def bind(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        offered: Mapping[str, Any] | None = None,
        late: Mapping[str, Callable[[], Any]] | None = None,
    ) -> Named:
        """The function ``name`` with its ``options``; what it returns is checked at every call.

        Args:
            name: one of ours, a dotted path, or `FILE.py:NAME`.
            options: keyword arguments of the function, checked by its signature.
            offered: more of them, for functions that name them in their signature. Users cannot set these.
            late: what gives others that the function cannot do without, unless they are in ``options``; called at
                every call.

        Raises:
            ValueError: an unknown name, an unknown option, a missing one, or a value that its Literal does not list.
        """
        function, missing = self.find(name), self.missing(name, options)
        if not _takes_one(function):
            raise ValueError(f"{self.noun} '{name}' takes no {self.argument}. {self._signature(name)}")
        parameters = _keywords(function)
        taken = {key: value for key, value in (offered or {}).items() if key in parameters}
        awaited = {key: get for key, get in (late or {}).items() if key in missing}
        self._check(name, {key: p for key, p in parameters.items() if key not in (offered or {})}, options)
        if lacking := sorted(missing - set(taken) - set(awaited)):
            raise ValueError(
                f"{self.noun} '{name}' needs the options {lacking}, which are not given. Add them to its init_args. "
                f"{self._signature(name)}"
            )
        return partial(self._call, name, partial(function, **options, **taken), awaited)

    def missing(self, name: str, options: Mapping[str, Any]) -> set[str]:
        """The options without which the function ``name`` cannot be called, and which are not among ``options``."""
        keywords = _keywords(self.find(name)).values()
        named = [p for p in keywords if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return {p.name for p in named if p.default is p.empty} - set(options)

    def _check(self, name: str, settable: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> None:
        takes_any = any(p.kind is p.VAR_KEYWORD for p in settable.values())
        if unknown := [] if takes_any else sorted(set(options) - set(settable)):
            raise ValueError(
                f"{self.noun} '{name}' has no option {unknown}; its options are {sorted(settable) or 'none'}. Remove "
                "or rename it."
            )
        for option, value in options.items():
            if option in settable and get_origin(annotation := settable[option].annotation) is Literal:
                check_choice(option, value, get_args(annotation))

    def _call(self, name: str, function: Callable[..., Tensor], awaited: Mapping[str, Any], argument: Tensor) -> Tensor:
        """``function(argument)``; ValueError unless that is a number for each completion."""
        result = function(argument, **{key: get() for key, get in awaited.items()})
        is_tensor = isinstance(result, Tensor)
        is_real = is_tensor and not result.is_complex() and result.dtype != torch.bool
        if not is_real or result.shape != argument.shape[:2]:
            raise ValueError(
                f"{self.noun} '{name}' returned {described(result)} for rewards of shape {tuple(argument.shape)} "
                f"[{self.axes}]; it must return a tensor of real numbers of shape {tuple(argument.shape[:2])}. "
                f"{self._signature(name)}"
            )
        return result

    def _signature(self, name: str) -> str:
        return f"Its signature is {re.split('[.:]', name)[-1]}({self.argument}: Tensor, **options) -> Tensor."


def described(value: Any) -> str:
    """What ``value`` is, for an error message: dtype and shape of a tensor, the type of anything else."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_choice(option: str, value: Any, choices: tuple[Any, ...]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{option}={value!r} is unknown; choose one of {list(choices)}.")


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What ``function`` takes beside its first argument."""
    return dict(list(_parameters(function).items())[1:])


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether the first argument of ``function`` may be given by its place."""
    first = next(iter(_parameters(function).values()), None)
    return first is not None and first.kind not in (first.KEYWORD_ONLY, first.VAR_KEYWORD)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """ValueError for a function of C code that does not tell its arguments, such as torch.sigmoid."""
    try:
        return inspect.signature(function).parameters
    except ValueError as error:
        raise ValueError(f"{error}. Wrap it in a function of your own: def NAME(rewards_PG): …") from error


def _import(path: str, failure: str, what: str, kind: str, remedy: str) -> Callable[..., Any]:
    module_name, _, attribute = dotted(path).rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{failure}: {error}. {remedy}") from error
    if not callable(function):
        raise ValueError(f"{what} is a {type(function).__name__}, not a {kind}. {remedy}")
    return function
