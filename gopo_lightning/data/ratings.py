"""Sentences of movie and Amazon reviews, each scored from -4 (negative) to 4 (positive) by about 15 people.

From C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014 (MIT licence). Each source is two tab-separated files, joined by sentence id:
`…GroundTruth.txt` with id, mean, text, and `…anonDataRatings.txt` with id, mean, standard deviation, list of
scores.

The split into train and validation is by sentence and fixed, so that a reward model trained on the train
sentences has never seen the sentences whose beginnings are the validation prompts.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gopo_lightning.data import assets

Source = Literal["movie", "amazon"]
Split = Literal["train", "validation"]

ASSET = "movie-ratings"
REQUEST = 'Write a one-sentence movie review. Begin it with "{beginning}".'
"""The prompt: a request in words, which a chat model answers with a sentence and then stops."""
NUM_PROMPT_WORDS = 5
MIN_SENTENCE_WORDS = 8
NUM_VALIDATION_SENTENCES = 1000
_SPLIT_SEED = 2014


@dataclass(frozen=True)
class RatedSentence:
    """One sentence and what each of its raters said.

    >>> RatedSentence(id="3", text="Effective but too tepid biopic", scores=(-1, 0, -1)).mean
    -0.6666666666666666
    """

    id: str
    text: str
    scores: tuple[int, ...]
    """One integer in [-4, 4] a rater; at least one."""

    @property
    def mean(self) -> float:
        """Over the raters."""
        return sum(self.scores) / len(self.scores)


def load(source: Source = "movie", folder: Path | None = None) -> list[RatedSentence]:
    """All sentences of ``source`` in file order; a text that comes twice keeps its first row.

    Args:
        source: whose reviews.
        folder: where the four files are; the packaged asset by default.

    Raises:
        ValueError: a malformed line (file, line number), or a sentence without scores.
    """
    folder = folder or assets.path(ASSET)
    texts = _rows(folder / f"{source}ReviewSnippets_GroundTruth.txt", num_columns=3)
    scores = {row[0]: row[3] for row in _rows(folder / f"{source}ReviewSnippets_anonDataRatings.txt", num_columns=4)}
    if missing := [row[0] for row in texts if row[0] not in scores]:
        raise ValueError(
            f"{len(missing)} sentences of '{source}' have no scores, the first is id {missing[0]}. Fetch the "
            "files again."
        )
    sentences: dict[str, RatedSentence] = {}
    for id_, _, text in texts:
        sentences.setdefault(_normalised(text), RatedSentence(id_, text.strip(), tuple(json.loads(scores[id_]))))
    return list(sentences.values())


def split(sentences: list[RatedSentence], part: Split) -> list[RatedSentence]:
    """The train or the held-out sentences: a fixed random split into the rest and NUM_VALIDATION_SENTENCES.

    Raises:
        ValueError: not more than NUM_VALIDATION_SENTENCES sentences, or an unknown part.
    """
    if part not in ("train", "validation"):
        raise ValueError(f"unknown split '{part}'; the ratings have train and validation. Use one of them.")
    if len(sentences) <= NUM_VALIDATION_SENTENCES:
        raise ValueError(
            f"{len(sentences)} sentences cannot be split: {NUM_VALIDATION_SENTENCES} are held out. Give more."
        )
    order = random.Random(_SPLIT_SEED).sample(range(len(sentences)), len(sentences))
    chosen = order[:NUM_VALIDATION_SENTENCES] if part == "validation" else order[NUM_VALIDATION_SENTENCES:]
    return [sentences[i] for i in chosen]


def prompts(part: Split, folder: Path | None = None) -> list[dict[str, Any]]:
    """Beginnings of movie-review sentences, one row a prompt: `prompt`, and of its sentence `text` and
    `mean`.

    A prompt is REQUEST with the first NUM_PROMPT_WORDS words of a sentence with at least MIN_SENTENCE_WORDS. No two
    rows share a prompt, and no prompt is in both splits.
    """
    sentences = load("movie", folder)
    rows = _prompt_rows(split(sentences, part))
    held_out = {} if part == "validation" else _prompt_rows(split(sentences, "validation"))
    return [row for prompt, row in rows.items() if prompt not in held_out]


def _prompt_rows(sentences: list[RatedSentence]) -> dict[str, dict[str, Any]]:
    """Prompt → row, the first sentence of each prompt."""
    rows: dict[str, dict[str, Any]] = {}
    for sentence in sentences:
        words = sentence.text.split()
        if len(words) >= MIN_SENTENCE_WORDS:
            prompt = REQUEST.format(beginning=" ".join(words[:NUM_PROMPT_WORDS]))
            rows.setdefault(prompt, {"prompt": prompt, "text": sentence.text, "mean": sentence.mean})
    return rows


def _normalised(text: str) -> str:
    """Equal for texts that differ in case, spacing or punctuation only."""
    kept = "".join(c if c.isalnum() else " " for c in text.lower())
    return " ".join(kept.split()) or text


def _rows(file: Path, num_columns: int) -> list[list[str]]:
    """Tab-separated rows, with or without byte-order mark and CRLF. ValueError on a wrong number of columns."""
    lines = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != num_columns and row != [""]:
            raise ValueError(
                f"{file}, line {number}: {len(row)} tab-separated columns, expected {num_columns}. Fetch the "
                "file again."
            )
    return [row for row in rows if row != [""]]
