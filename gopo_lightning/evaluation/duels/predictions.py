"""What policies wrote: files of `predict`, and the prompts that several of them have in common."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gopo_lightning.data.json_lines import number, read_jsonl
from gopo_lightning.rewards import RewardSource, SourceConfigError
from gopo_lightning.rewards.pairwise import content
from gopo_lightning.types import Completion, Prompt

FILE = "predictions.jsonl"


@dataclass(frozen=True)
class Answered:
    """A prompt, and what a policy wrote to it."""

    prompt: Prompt
    completions: tuple[str, ...]
    """`types.Completion` where the file says how they ended."""
    rewards: Mapping[str, tuple[float, ...]]
    """By source of the run that wrote the file, one a completion."""


def read_predictions(path: Path) -> dict[int, Answered]:
    """The lines of ``path`` by the prompt's index.

    Raises:
        ValueError: no such file, no lines, a malformed one, or two of one prompt; with file and row.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}. Name the predictions.jsonl of a `predict` that has ended.")
    answered: dict[int, Answered] = {}
    for row, line in enumerate(read_jsonl(path)):
        try:
            one = _answered(line, path)
            if one.prompt.index in answered:
                raise ValueError(f"the index {one.prompt.index} comes a second time")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, row {row} (counted from 0): {error}. Write the file anew with `predict`, or correct the row."
            ) from error
        answered[one.prompt.index] = one
    if not answered:
        raise ValueError(f"{path} holds no predictions; a duel needs one prompt at least. Write it anew.")
    return answered


def common(files: Mapping[str, Mapping[int, Answered]]) -> tuple[list[int], dict[str, int]]:
    """Indices of the prompts that all policies answered, in their order; and how many others each file has.

    Raises:
        ValueError: no prompt in common, or one that reads differently in two files; with the file and the row.
    """
    (first, reference), *others = files.items()
    shared = [index for index in reference if all(index in rows for _, rows in others)]
    for name, rows in others:
        for index in shared:
            if _asked(rows[index].prompt) != _asked(reference[index].prompt):
                raise ValueError(
                    f"prompt {index} is another one in {first} ({_short(reference[index].prompt)}) than in {name} "
                    f"({_short(rows[index].prompt)}), and a duel needs the same prompts. Write both files from the "
                    "same data, with the same system prompt."
                )
    if not shared:
        raise ValueError(
            f"{' and '.join(files)} have no prompt in common (by its row in the dataset). Write both files from the "
            "same data."
        )
    return sorted(shared), {name: len(rows) - len(shared) for name, rows in files.items()}


def with_columns(prompt: Prompt, row: Mapping[str, Any], column: str, path: str) -> Prompt:
    """``prompt`` with the columns of its dataset's ``row``, all but ``column``, which holds the prompt itself.

    Raises:
        ValueError: the row has another prompt.
    """
    text = row.get(column)
    if prompt.messages is None and isinstance(text, str) and text != prompt.text:
        raise ValueError(
            f"row {prompt.index} (counted from 0) of {path} is {text[:60]!r}, but the predictions' prompt of this "
            f"index is {_short(prompt)}. Name the config that the predictions were made with."
        )
    return replace(prompt, columns={name: value for name, value in row.items() if name != column}, path=path)


class RecordedScores(RewardSource):
    """The rewards that the runs themselves wrote into their predictions.

    Args:
        name: of the source in the files.
        files: rows by index, of all policies.
    """

    reads_endings = True

    def __init__(self, name: str, files: Mapping[str, Mapping[int, Answered]]) -> None:
        self.name = name
        self._scores: dict[tuple[int, Any], float] = {}
        for file, rows in files.items():
            for index, row in rows.items():
                if name not in row.rewards:
                    raise SourceConfigError(
                        f"{file} has no rewards of a source '{name}' at prompt {index}; it has {sorted(row.rewards)}. "
                        "Name one of these."
                    )
                for text, reward in zip(row.completions, row.rewards[name], strict=True):
                    self._scores.setdefault((index, content(text, True)), reward)
        if all(_are_shares([row.rewards[name] for row in rows.values()]) for rows in files.values()):
            raise SourceConfigError(
                f"the rewards of '{name}' are shares of wins within each group (in {' and '.join(files)} their mean is "
                "½ at every prompt): they say nothing across policies. Name that source itself as the judge."
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """What the files say."""
        return [
            self._scores[prompt.index, content(text, True)] for prompt, text in zip(prompts, completions, strict=True)
        ]


def _are_shares(groups: Sequence[Sequence[float]]) -> bool:
    """Whether these are a pairwise source's: each group's valid rewards lie in [0, 1] around ½, and not all are ½."""
    valid = [[reward for reward in group if not math.isnan(reward)] for group in groups]
    valid = [group for group in valid if group]
    return (
        any(reward != 0.5 for group in valid for reward in group)
        and all(0 <= reward <= 1 for group in valid for reward in group)
        and all(abs(sum(group) / len(group) - 0.5) < 1e-9 for group in valid)
    )


def _answered(line: Any, path: Path) -> Answered:
    if not isinstance(line, dict):
        raise ValueError(f"a line is {type(line).__name__}, not an object")
    index, text, messages, texts = (line.get(key) for key in ("index", "prompt", "messages", "completions"))
    if isinstance(index, bool) or not isinstance(index, int) or not isinstance(text, str):
        raise ValueError("`index` must be a whole number and `prompt` a text")
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
        raise ValueError("`completions` must be a list of texts, one at least")
    if messages is not None and not (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
        raise ValueError("`messages` must be a list of messages, or null")
    prompt = Prompt(index, (), text, None if messages is None else tuple(messages), path=str(path))
    given = line.get("rewards") or {}
    if not isinstance(given, dict) or not all(isinstance(values, list) for values in given.values()):
        raise ValueError("`rewards` must be an object, for each source a list of numbers, one a completion")
    rewards = {name: tuple(map(number, values)) for name, values in given.items()}
    if wrong := [name for name, values in rewards.items() if len(values) != len(texts)]:
        raise ValueError(f"{len(texts)} completions have another number of rewards of {wrong[0]}")
    return Answered(prompt, _with_endings(texts, line.get("num_tokens"), line.get("finish_reasons")), rewards)


def _with_endings(texts: Sequence[str], num_tokens: Any, reasons: Any) -> tuple[str, ...]:
    """Completions that know how they ended, or plain texts where the line does not say it."""
    if num_tokens is None or reasons is None:
        return tuple(texts)
    if len(num_tokens) != len(texts) or len(reasons) != len(texts):
        raise ValueError(
            f"{len(texts)} completions, but {len(num_tokens)} num_tokens and {len(reasons)} finish_reasons"
        )
    ends = zip(texts, num_tokens, reasons, strict=True)
    return tuple(Completion(text, truncated=why == "length", num_tokens=int(length)) for text, length, why in ends)


def _asked(prompt: Prompt) -> tuple[str, list[Any] | None]:
    return prompt.text, None if prompt.messages is None else list(prompt.messages)


def _short(prompt: Prompt) -> str:
    text = repr(prompt.text if len(prompt.text) <= 60 else prompt.text[:60] + "…")
    return text if prompt.messages is None else f"a conversation that ends with {text}"
