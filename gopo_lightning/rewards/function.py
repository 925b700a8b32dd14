"""A reward that is any Python callable, also one that waits: `async def`."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from gopo_lightning.objectives.named import load_callable
from gopo_lightning.rewards.base import RewardSource, Scores, SourceConfigError
from gopo_lightning.rewards.pairwise import Groups, content
from gopo_lightning.rewards.waiting import all_of, is_async, wait_for
from gopo_lightning.types import Completion, Prompt

ENDINGS = ("truncated", "num_tokens")
"""What a function may ask of how a completion ended."""
_MAX_CONCURRENT = 16


class DatasetFunction:
    """A callable that gets the arguments that its signature names: filled by the trainer, columns, and options.

    One that is an `async def` is awaited, in an event loop that is closed after the call.

    Args:
        function: dotted path, or the callable itself.
        filled: names that the trainer fills where the signature has them.
        needed: of these the callable must take at least one.
        options: more keyword arguments, the same in every call; they precede columns of the same name.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        filled: Sequence[str],
        needed: Sequence[str],
        options: Mapping[str, Any] | None,
    ) -> None:
        self.function = load_callable(function) if isinstance(function, str) else function
        self.name = str(getattr(self.function, "__name__", type(self.function).__name__))
        self.filled, self.options = tuple(filled), dict(options or {})
        parameters = inspect.signature(self.function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._required = {p.name for p in parameters if p.name in self._accepted and p.default is p.empty}
        self._check_signature(needed)

    def endings(self, completions: Sequence[str], prefix: str = "") -> dict[str, list[Any]]:
        """`truncated` and `num_tokens` of ``completions``, where the signature has these names behind ``prefix``."""
        names = [name for name in ENDINGS if prefix + name in self._accepted]
        return {prefix + name: [self._ending(c, name) for c in completions] for name in names}

    def _ending(self, completion: str, name: str) -> Any:
        if not isinstance(completion, Completion):
            raise SourceConfigError(
                f"reward source '{self.name}' asks for `{name}`, but {completion!r} is a plain string. Pass "
                "types.Completion(text, truncated=…, num_tokens=…)."
            )
        return getattr(completion, name)

    @property
    def reads_endings(self) -> bool:
        """Whether the signature asks how completions ended."""
        return any(name.endswith(ENDINGS) for name in self._accepted & set(self.filled))

    def __call__(self, prompts: Sequence[Prompt], /, **filled: Any) -> Any:
        """What the callable returns.

        Raises:
            SourceConfigError: a column that the signature requires is not in the data, or a column has a name that
                the trainer fills.
        """
        self.check_columns(prompts)
        names = {column for prompt in prompts for column in prompt.columns}  # of any: a row without it has None
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        return _awaited(self._call(columns, {"prompts": [p.text for p in prompts], **filled}))

    def once(self, row: Prompt, /, **filled: Any) -> Any:
        """What the callable returns for one prompt, whose columns it gets as they are."""
        self.check_columns([row])
        return _awaited(self.begun(row, **filled))

    def begun(self, row: Prompt, /, **filled: Any) -> Any:
        """``once``, but what it returns is not awaited and the columns are not checked."""
        return self._call(dict(row.columns), filled)

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """SourceConfigError for a column that an argument of the same name would hide, or that a row has to have."""
        ours = self._accepted & set(self.filled)
        required = self._required - {*self.filled, *self.options}
        for prompt in prompts:
            if taken := sorted(ours & set(prompt.columns)):
                raise SourceConfigError(
                    f"reward source '{self.name}' takes {taken}, which the trainer fills, but {prompt.place} has "
                    "columns of the same names. Rename these columns in the dataset, or take the arguments out of the "
                    "function's signature."
                )
            if missing := sorted(required - set(prompt.columns)):
                rows = sorted({p.index for p in prompts if not required <= set(p.columns)})
                raise SourceConfigError(
                    f"reward source '{self.name}' requires the columns {missing}, but {prompt.place} has only "
                    f"{sorted(prompt.columns)}. Rows of this batch without them: {rows}. Add them to the dataset, or "
                    "give the arguments a default in the function's signature."
                )

    def _call(self, columns: dict[str, Any], filled: dict[str, Any]) -> Any:
        arguments = columns | filled | self.options
        return self.function(**{k: v for k, v in arguments.items() if self._takes_all or k in self._accepted})

    def _check_signature(self, needed: Sequence[str]) -> None:
        if not self._takes_all and not self._accepted & set(needed):
            raise ValueError(
                f"reward function '{self.name}' takes no argument `{needed[0]}`; it takes {sorted(self._accepted)}. "
                f"It is called by keywords: name {' or '.join(f'`{n}`' for n in needed)} in its signature, and as "
                f"you need them {[n for n in self.filled if n not in needed]}, columns of the dataset and options."
            )
        if unknown := [] if self._takes_all else sorted(set(self.options) - self._accepted):
            raise ValueError(
                f"reward function '{self.name}' does not take the options {unknown}; it takes "
                f"{sorted(self._accepted)}. Remove or rename them."
            )
        if reserved := sorted(set(self.filled) & set(self.options)):
            raise ValueError(
                f"reward function '{self.name}': the options {reserved} are filled by the trainer. Remove them."
            )


def _awaited(result: Any) -> Any:
    return wait_for(lambda: result) if inspect.isawaitable(result) else result


class FunctionReward(RewardSource):
    """Scores completions with a Python callable.

    The callable gets keyword arguments, each a list of N: `prompts` (their text), `completions`, and the
    dataset's other columns (None in a row without it); only those that its signature names, or all of them when it
    takes `**kwargs`. Where its signature names them, it also gets `truncated` (bool: `max_new_tokens` cut the
    completion off) and `num_tokens` (int: its length, EOS included). It returns N numbers, None or NaN where a
    completion has no valid score:

        def brevity(completions: list[str], max_words: int = 20, **kwargs: list) -> list[float]:
            return [-float(len(c.split()) > max_words) for c in completions]

    An `async def` of that signature is called and awaited once for all N. One that names `completion` instead gets a
    single completion a call (`prompt`, `completion`, its `truncated` and `num_tokens`, and the values of its row) and
    returns one number, many calls at a time; the first that raises cancels the others:

        async def passed(completion: str, tests: str) -> float | None:
            return await my_sandbox.run(completion, tests)

    Every batch has an event loop of its own, so clients are opened in the function, not in its module.

    Args:
        function: dotted path of the callable, or the callable itself.
        name: in logs and error messages; the callable's own name when null.
        options: more keyword arguments, the same in every call; they take precedence over columns of the same
            name.
        max_concurrent: most calls at a time of an `async def` that names `completion`; 16 when null.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        max_concurrent: int | None = None,
    ) -> None:
        callable_ = load_callable(function) if isinstance(function, str) else function
        self._each = is_async(callable_) and {"completion"} == _names(callable_) & {"completion", "completions"}
        read = ("completion" if self._each else "completions", *ENDINGS)
        self._function = DatasetFunction(callable_, ("prompt" if self._each else "prompts", *read), read, options)
        self.name = self._function.name = name or self._function.name
        self.reads_endings = self._function.reads_endings
        if max_concurrent is not None and (max_concurrent < 1 or not self._each):
            raise ValueError(
                f"max_concurrent={max_concurrent} of reward function '{self.name}' must be at least 1, and acts on an "
                "`async def` with the argument `completion` alone: any other is called once for all completions. "
                "Correct or remove it."
            )
        self.max_concurrent = max_concurrent or _MAX_CONCURRENT
        self._early: defaultdict[Hashable, list[Any]] = defaultdict(list)
        self._error: Exception | None = None

    def setup(self, device: torch.device) -> None:
        """Nothing to load."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """What the callable returns.

        Raises:
            SourceConfigError: a column that the signature requires is not in the data, or a column has a name that
                the trainer fills.
        """
        if not self._each:
            endings = self._function.endings(completions)
            return self._function(prompts, completions=list(map(str, completions)), **endings)
        early, self._early = self._early, defaultdict(list)
        error, self._error = self._error, None
        if error is not None:
            raise error
        keys = [_key(*each) for each in zip(prompts, completions, strict=True)]
        known = {n: early[key].pop() for n, key in enumerate(keys) if early[key]}
        others = [n for n in range(len(keys)) if n not in known]
        calls = self._calls([prompts[n] for n in others], [completions[n] for n in others])
        known |= zip(others, wait_for(lambda: all_of(calls, self.max_concurrent)) if calls else (), strict=True)
        return [known[n] for n in range(len(keys))]

    @property
    def waits(self) -> bool:
        """Whether completions are scored as they come: by an `async def` that names `completion`."""
        return self._each

    async def ask(self, prompts: Sequence[Prompt], groups: Groups) -> None:
        """See `early.AsksEarly`."""
        rows = [(prompt, text) for prompt, group in zip(prompts, groups, strict=True) for text in group]
        prompts_N, texts_N = map(list, zip(*rows, strict=True))
        try:
            scores = await all_of(self._calls(prompts_N, texts_N), self.max_concurrent)
        except Exception as error:  # of the first that raises: the batch's call raises it, and asks nothing more
            self._error = error
            raise
        for prompt, text, score in zip(prompts_N, texts_N, scores, strict=True):
            self._early[_key(prompt, text)].append(score)

    def _calls(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Callable[[], Any]]:
        """One for each completion."""
        self._function.check_columns(prompts)
        endings = self._function.endings(completions)
        return [
            partial(
                self._function.begun,
                row,
                prompt=row.text,
                completion=str(text),
                **{k: v[n] for k, v in endings.items()},
            )
            for n, (row, text) in enumerate(zip(prompts, completions, strict=True))
        ]


def _key(prompt: Prompt, completion: str) -> Hashable:
    """Of the row and the completion with its ending."""
    return prompt.path, prompt.index, content(completion, with_ending=True)


def _names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)
