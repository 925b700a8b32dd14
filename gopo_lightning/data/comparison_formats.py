"""Formats of well-known comparison datasets: a row of some columns → `Answers`. One function a format.

| columns | dataset |
|---|---|
| chosen, rejected | Anthropic/hh-rlhf, trl-lib/ultrafeedback_binarized, Intel/orca_dpo_pairs, … |
| info, summaries, choice | openai/summarize_from_feedback (`comparisons`) |
| completions, ranks | a list of your own |
| instruction, completions | openbmb/UltraFeedback |
| prompt, response, helpfulness | nvidia/HelpSteer2 |
| prompt, response_1, response_2, preference_strength | nvidia/HelpSteer2 (`preference`) |
| context, response1, response2, overall_preference | nvidia/HelpSteer3 |
| prompt, answers | berkeley-nest/Nectar |
| history, human_ref_A, human_ref_B, labels | stanfordnlp/SHP |
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from gopo_lightning.data.cells import (
    Row,
    Value,
    as_number,
    as_value,
    is_blank,
    known,
    listed,
    number,
    numbers,
    text_of,
    value_of,
)
from gopo_lightning.data.conversations import identity

Wins: TypeAlias = tuple[tuple[float, ...], ...]

TURNS = ("question", "instruction", "query", "input")
"""Columns whose text is a user's message: with an answer it makes a conversation."""
PROMPTS = ("prompt", *TURNS, "context", "messages", "conversation", "conversations")
"""Columns that may hold the prompt of a pair or list."""
SYSTEMS = ("system", "system_prompt")
RATINGS = tuple(
    names
    for word in ("score", "rating")
    for names in (
        (f"{word}_chosen", f"{word}_rejected"),
        (f"chosen_{word}", f"rejected_{word}"),
        (f"chosen-{word}", f"rejected-{word}"),
    )
)
"""Columns of the two scores of a pair."""


@dataclass(frozen=True)
class Answers:
    """M answers to one prompt, as a row gives them: they may or may not repeat the prompt."""

    prompt: Value | None
    completions: tuple[Value, ...]
    wins: Wins
    """W_ij, how surely i beats j; NaN on the diagonal."""
    ratings: tuple[float, ...] | None = None
    margin: float | None = None
    """How much better the first of two is."""
    is_turn: bool = False
    """A plain prompt is a user's message, no beginning that the completions go on from."""
    system: str | None = None


@dataclass(frozen=True)
class Format:
    """What tells a format, what it reads, and how."""

    columns: tuple[str, ...]
    parse: Callable[[Row, str | None], Answers]
    """Row, and the column of the prompt where the user names one."""
    optional: tuple[str, ...] = ()
    reads_prompt: bool = False
    """From any of `PROMPTS`, or from the column that the user names."""
    joins_raters: bool = False
    """Rows of the same pair are raters of it; W is their mean."""
    joins_rated: bool = False
    """Rows of the same prompt are its answers; W is the order of their ratings."""

    def used(self, prompt_column: str | None) -> set[str]:
        """All columns that it may read."""
        prompts = {prompt_column} if prompt_column else {*PROMPTS}
        return {*self.columns, *self.optional, *(prompts | {*SYSTEMS} if self.reads_prompt else ())}


def _prompt(row: Row, prompt_column: str | None) -> dict[str, Any]:
    """Prompt, system message, and whether a plain prompt is a user's message: arguments of `Answers`.

    Raises:
        ValueError: columns that hold different prompts.
    """
    found = {c: value_of(row, c) for c in ((prompt_column,) if prompt_column else PROMPTS) if not is_blank(row.get(c))}
    if isinstance(found.get("instruction"), str) and isinstance(found.get("input"), str):  # Alpaca's
        found["instruction"] = f"{found['instruction']}\n{found.pop('input')}"
    whole = {identity(value_of(row, c)) for c in ("chosen", "rejected") if not is_blank(row.get(c))}
    distinct = {identity(value): column for column, value in reversed(found.items()) if identity(value) not in whole}
    if len(distinct) > 1:
        raise ValueError(
            f"the columns {sorted(distinct.values())} hold different prompts. Name one of them as prompt_column, or "
            "make one column of them"
        )
    systems = {normal: row[c] for c in SYSTEMS if not is_blank(row.get(c)) for normal in [str(row[c]).strip()]}
    if len(systems) > 1:
        raise ValueError(f"the columns {list(SYSTEMS)} hold different system messages. Keep one of them")
    column = next(iter(distinct.values()), None)
    return {
        "prompt": None if column is None else found[column],
        "is_turn": column in TURNS,
        "system": next((text_of(value, "the system message") for value in systems.values()), None),
    }


def _pair(row: Row, prompt_column: str | None) -> Answers:
    probability, margin = number(row, "probability"), number(row, "margin")
    ratings = _pair_ratings(row)
    wins = preference(1.0 if probability is None else probability)
    if ratings is not None and ratings[0] == ratings[1] and probability is None:
        wins = preference(0.5)  # the raters could not tell them apart
    if margin is None and ratings is not None:
        margin = ratings[0] - ratings[1]
    completions = (value_of(row, "chosen"), value_of(row, "rejected"))
    return Answers(completions=completions, wins=wins, ratings=ratings, margin=margin, **_prompt(row, prompt_column))


def _pair_ratings(row: Row) -> tuple[float, float] | None:
    found: dict[tuple[float, float], str] = {}
    for names in RATINGS:
        first, second = (number(row, name) for name in names)
        if first is not None and second is not None:
            found[first, second] = names[0]
        elif first is not None or second is not None:
            raise ValueError(f"one of the columns {list(names)} has a number and the other has none. Give both or none")
    if len(found) > 1:
        raise ValueError(f"the columns {sorted(found.values())} give different ratings. Keep one of them")
    return next(iter(found), None)


def _summaries(row: Row, prompt_column: str | None) -> Answers:
    """One rater's choice: 0, 1, or null where both are equally good."""
    choice = row["choice"]
    if isinstance(choice, bool) or choice not in (0, 1, None):
        raise ValueError(f"choice={choice!r} must be 0, 1 or null")
    info = row["info"]
    prompt = f"{text_of(info.get('post') or info.get('article'), 'post in info')}\n\nTL;DR:"
    first, second = (f"{prompt} {text_of(s['text'], 'text in summaries').strip()}" for s in row["summaries"])
    return Answers(None, (first, second), preference({0: 1.0, 1: 0.0, None: 0.5}[choice]))


def _ranked(row: Row, prompt_column: str | None) -> Answers:
    completions = [as_value(c, f"completion {n}") for n, c in enumerate(listed(row, "completions"))]
    ranks = numbers(row, "ranks")
    if len(completions) != len(ranks) or len(ranks) < 2:
        raise ValueError(f"{len(completions)} completions with {len(ranks)} ranks; give each its rank, and at least 2")
    ratings = None if row.get("scores") is None else numbers(row, "scores")
    if ratings is not None and len(ratings) != len(ranks):
        raise ValueError(f"{len(ratings)} scores for {len(ranks)} completions; give one each, or none")
    wins = order([-rank for rank in ranks])
    return Answers(completions=tuple(completions), wins=wins, ratings=ratings, **_prompt(row, prompt_column))


def _ultrafeedback(row: Row, prompt_column: str | None) -> Answers:
    """Rated by the mean over aspects (`fine-grained_score`), or else, if not all have it, by `overall_score`."""
    completions = listed(row, "completions")
    texts = tuple(text_of(c.get("response"), f"response of completion {n}") for n, c in enumerate(completions))
    found = [
        [as_number(completion.get(column), f"{column} of completion {n}") for n, completion in enumerate(completions)]
        for column in ("fine-grained_score", "overall_score")
    ]
    ratings = next(([r for r in of_column if r is not None] for of_column in found if None not in of_column), None)
    if ratings is None:  # two scales cannot be compared
        raise ValueError("neither fine-grained_score nor overall_score is there for all completions")
    return Answers(
        text_of(row["instruction"], "column 'instruction'"), texts, order(ratings), tuple(ratings), is_turn=True
    )


def _helpsteer2(row: Row, prompt_column: str | None) -> Answers:
    prompt = _helpsteer2_prompt(text_of(row["prompt"], "column 'prompt'"))
    rating = known(row, "helpfulness")
    return Answers(prompt, (text_of(row["response"], "column 'response'"),), order([rating]), (rating,), is_turn=True)


def _helpsteer2_pair(row: Row, prompt_column: str | None) -> Answers:
    prompt = _helpsteer2_prompt(text_of(row["prompt"], "column 'prompt'"))
    return _by_strength(prompt, row, ("response_1", "response_2"), "preference_strength")


def _helpsteer3(row: Row, prompt_column: str | None) -> Answers:
    return _by_strength(value_of(row, "context"), row, ("response1", "response2"), "overall_preference")


def _by_strength(prompt: Value, row: Row, names: tuple[str, str], column: str) -> Answers:
    """From -3 (the first is much better) to 3."""
    strength = known(row, column)
    first, second = (text_of(row[name], f"column '{name}'") for name in names)
    return Answers(prompt, (first, second), order([-strength, 0.0]), margin=-strength, is_turn=True)


def _helpsteer2_prompt(text: str) -> Value:
    """A question, or turns that are told apart by `<extra_id_1>User` and `<extra_id_1>Assistant`."""
    first, *rest = re.split(r"\n?<extra_id_1>(User|Assistant)\n", text)
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return tuple({"role": role.lower(), "content": content} for role, content in turns if content.strip())


def _nectar(row: Row, prompt_column: str | None) -> Answers:
    answers = listed(row, "answers")
    texts = tuple(text_of(answer.get("answer"), f"answer {n}") for n, answer in enumerate(answers))
    ranks = [known(answer, "rank") for answer in answers]
    return Answers(text_of(row["prompt"], "column 'prompt'"), texts, order([-rank for rank in ranks]))


def _shp(row: Row, prompt_column: str | None) -> Answers:
    label = known(row, "labels")
    if label not in (0, 1):
        raise ValueError(f"labels={label:g} must be 1 (A is better) or 0")
    texts = (text_of(row["human_ref_A"], "column 'human_ref_A'"), text_of(row["human_ref_B"], "column 'human_ref_B'"))
    return Answers(text_of(row["history"], "column 'history'"), texts, preference(label), is_turn=True)


def preference(probability: float) -> Wins:
    """W of two texts of which the first wins with ``probability``."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} must lie in [0, 1]")
    return (math.nan, probability), (1 - probability, math.nan)


def order(values: Sequence[float]) -> Wins:
    """W of M texts by ``values``, the higher the better; equal ones tie, ½."""
    return tuple(
        tuple(math.nan if i == j else 0.5 + 0.5 * ((mine > other) - (mine < other)) for j, other in enumerate(values))
        for i, mine in enumerate(values)
    )


FORMATS = (
    Format(
        ("chosen", "rejected"),
        _pair,
        ("margin", "probability", *(name for names in RATINGS for name in names)),
        reads_prompt=True,
    ),
    Format(("info", "summaries", "choice"), _summaries, joins_raters=True),
    Format(("completions", "ranks"), _ranked, ("scores",), reads_prompt=True),
    Format(("instruction", "completions"), _ultrafeedback),
    Format(("prompt", "response_1", "response_2", "preference_strength"), _helpsteer2_pair),
    Format(("prompt", "response", "helpfulness"), _helpsteer2, joins_rated=True),
    Format(("context", "response1", "response2", "overall_preference"), _helpsteer3),
    Format(("prompt", "answers"), _nectar),
    Format(("history", "human_ref_A", "human_ref_B", "labels"), _shp),
)
"""The first whose columns are all there."""


def unknown_format(where: str, columns: Iterable[str], noun: str) -> ValueError:
    """What to raise where ``columns`` are those of none of ``FORMATS``."""
    formats = ", or ".join(str(format_.columns) for format_ in FORMATS)
    return ValueError(
        f"{where} has the columns {sorted(columns)}, which are no known format of {noun}. The formats have the columns "
        f"{formats}; rename yours."
    )


@contextmanager
def reading_row(where: str) -> Iterator[None]:
    """ValueError with ``where`` for a row that a format cannot read."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where}: there is no {error}. Fix or delete it.") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:  # the last three: a cell of the wrong shape
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{error}. Fix or delete it.") from error
