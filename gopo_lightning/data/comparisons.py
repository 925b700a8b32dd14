"""Comparisons in the formats of well-known datasets: rows of a hub dataset or local file → `ComparisonRow`.

The format is told by the columns:

- `chosen`, `rejected` and maybe `prompt`, `margin`, `score_chosen` with `score_rejected`, `probability`: pairs of texts
  or conversations (Anthropic/hh-rlhf, trl-lib/ultrafeedback_binarized);
- `info`, `summaries`, `choice`: one rater's choice of two summaries (openai/summarize_from_feedback, `comparisons`);
  the raters of a pair are averaged;
- `completions`, `ranks` and maybe `prompt`, `scores`: a ranked list of any length, rank 1 is best, equal ranks tie.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gopo_lightning.data.sources import PromptSource, read_rows

Text: TypeAlias = str | tuple[Mapping[str, Any], ...]
"""A text, or a conversation that the reward model's own template renders."""


@dataclass(frozen=True)
class ComparisonRow:
    """M texts that are answers to one prompt, and which of them people like better.

    >>> ComparisonRow(("good", "bad"), ((math.nan, 1.0), (0.0, math.nan))).wins
    ((nan, 1.0), (0.0, nan))
    """

    texts: tuple[Text, ...]
    wins: tuple[tuple[float, ...], ...]
    """W_ij, how surely i beats j; NaN on the diagonal."""
    ratings: tuple[float, ...] | None = None
    """A score of each text, where there are any."""
    margin: float | None = None
    """How much better the first of two texts is, where the data say so."""


def load_comparisons(source: PromptSource) -> list[ComparisonRow]:
    """All comparisons of ``source``.

    Raises:
        ValueError: a missing file, malformed JSON, columns of no known format, or a malformed row (with its number).
    """
    rows = read_rows(source)
    columns = set(rows[0])
    parse = next((parse for required, parse in _FORMATS.items() if set(required) <= columns), None)
    if parse is None:
        raise ValueError(
            f"{source.path} has the columns {sorted(columns)}, which are no known format of comparisons. The formats "
            f"have the columns {', or '.join(map(str, _FORMATS))}; rename yours."
        )
    parsed = [_parsed(parse, source, number, row) for number, row in enumerate(rows)]
    return _joined(parsed) if parse is _from_summaries else parsed


def _parsed(parse: Callable[[Mapping[str, Any]], ComparisonRow], source: PromptSource, number: int, row: Any) -> Any:
    try:
        return parse(row)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"row {number} (counted from 0) of {source.path}: {type(error).__name__}: {error}. Fix or delete it."
        ) from error


def _from_pair(row: Mapping[str, Any]) -> ComparisonRow:
    texts = (_text(row.get("prompt"), row["chosen"]), _text(row.get("prompt"), row["rejected"]))
    probability = row.get("probability")
    wins = _pair(1.0 if probability is None else float(probability))
    scores = (row.get("score_chosen"), row.get("score_rejected"))
    ratings = None if None in scores else (float(scores[0]), float(scores[1]))  # type: ignore[arg-type]
    if ratings is not None and ratings[0] == ratings[1] and probability is None:
        wins = _pair(0.5)  # the raters could not tell them apart
    margin = row.get("margin")
    gap = None if ratings is None else ratings[0] - ratings[1]
    return ComparisonRow(texts, wins, ratings, gap if margin is None else float(margin))


def _from_summaries(row: Mapping[str, Any]) -> ComparisonRow:
    """One rater's choice: 0, 1, or null where both are equally good."""
    info, (first, second) = row["info"], row["summaries"]
    if row["choice"] not in (0, 1, None):
        raise ValueError(f"choice={row['choice']!r} must be 0, 1 or null")
    post = info.get("post") or info.get("article")
    prompt = f"{post}\n\nTL;DR:"
    texts = (f"{prompt} {first['text'].strip()}", f"{prompt} {second['text'].strip()}")
    return ComparisonRow(texts, _pair({0: 1.0, 1: 0.0, None: 0.5}[row["choice"]]))


def _from_ranks(row: Mapping[str, Any]) -> ComparisonRow:
    completions, ranks = row["completions"], row["ranks"]
    if len(completions) != len(ranks) or len(ranks) < 2:
        raise ValueError(f"{len(completions)} completions with {len(ranks)} ranks; give each its rank, and at least 2")
    wins = tuple(
        tuple(math.nan if i == j else 0.5 + 0.5 * ((mine < other) - (mine > other)) for j, other in enumerate(ranks))
        for i, mine in enumerate(ranks)
    )
    scores = row.get("scores")
    ratings = None if scores is None else tuple(map(float, scores))
    if ratings is not None and len(ratings) != len(ranks):
        raise ValueError(f"{len(ratings)} scores for {len(ranks)} completions; give one each, or none")
    return ComparisonRow(tuple(_text(row.get("prompt"), c) for c in completions), wins, ratings)


_FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], ComparisonRow]] = {
    ("chosen", "rejected"): _from_pair,
    ("info", "summaries", "choice"): _from_summaries,
    ("completions", "ranks"): _from_ranks,
}


def _pair(probability: float) -> tuple[tuple[float, ...], ...]:
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} must lie in [0, 1]")
    return (math.nan, probability), (1 - probability, math.nan)


def _text(prompt: Any, completion: Any) -> Text:
    """A plain prompt continued by its completion, or a conversation with its last turn."""
    if isinstance(completion, str):
        if prompt is None or isinstance(prompt, str):
            return _filled((prompt or "") + completion)
        completion = [{"role": "assistant", "content": completion}]
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    same = list(completion[: len(before)]) == before  # many datasets repeat the prompt in the completion
    messages = [*([] if same else before), *completion]
    if not messages or not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise ValueError("a conversation needs messages, each with a role and a content that are strings")
    return tuple(dict(message) for message in messages)


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("a text is empty")
    return text


def _joined(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """One row for each pair, W the mean over its raters, whichever order they saw it in."""
    answers: dict[tuple[Text, ...], list[float]] = {}
    for row in rows:
        first, second = row.texts
        if (second, first) in answers:
            answers[(second, first)].append(row.wins[1][0])
        else:
            answers.setdefault((first, second), []).append(row.wins[0][1])
    return [ComparisonRow(texts, _pair(sum(wins) / len(wins))) for texts, wins in answers.items()]
