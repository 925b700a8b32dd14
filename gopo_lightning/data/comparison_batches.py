"""What reward models learn from: texts, and which of them people like better; rows → one batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from gopo_lightning.data.comparisons import ComparisonRow, Text
from gopo_lightning.data.ratings import RatedSentence
from gopo_lightning.types import TensorStruct


@dataclass(frozen=True)
class Comparisons(TensorStruct):
    """N texts and how they compare with each other.

    Three texts rated 2, -1, 2 (a tie) give

        wins_NN = [[nan, 1, nan], [0, nan, 0], [nan, 1, nan]]
    """

    texts: tuple[Text, ...]
    wins_NN: Tensor
    """float32: 1 where the text of the row beats that of the column, 0 where it loses, NaN where they do not
    compare (in general: the probability of winning)."""
    ratings_N: Tensor | None = None
    """float32: the scores behind `wins_NN`, where there are any."""
    margins_NN: Tensor | None = None
    """float32, antisymmetric: how much better the text of the row is; 0 where that is not known, None if nowhere."""
    rankings: tuple[tuple[int, ...], ...] | None = None
    """Of pairs and lists, the numbers of their texts, the best first. None where one has ties."""
    group_sizes: tuple[int, ...] | None = None
    """Numbers of texts of the pairs or lists, one after the other, within which alone texts compare: each is about a
    prompt of its own. None where all of them may."""
    num_padding: int = 0
    """Of the last texts: repeated so that ranks have equally many, and counted by no metric."""

    def __len__(self) -> int:
        return len(self.texts)


def wins_from_ratings(ratings_N: Tensor) -> Tensor:
    """wins_NN of every ordered pair. Ties are left out (NaN): equal scores say little about the order."""
    difference_NN = ratings_N[:, None] - ratings_N[None, :]
    return torch.where(difference_NN == 0, math.nan, (difference_NN > 0).float())


def collate_sentences(rows: Sequence[tuple[RatedSentence, float]], *, prefix: str, one_rater: bool) -> Comparisons:
    """The batch; each sentence is rated by one of its raters, or by the mean of all."""
    drawn = [s.scores[int(draw * len(s.scores))] if one_rater else s.mean for s, draw in rows]
    ratings_N = torch.tensor(drawn, dtype=torch.float32)
    num_padding = sum(math.isnan(draw) for _, draw in rows)
    texts = tuple(prefix + s.text for s, _ in rows)
    return Comparisons(texts, wins_from_ratings(ratings_N), ratings_N, num_padding=num_padding)


def collate_comparisons(rows: Sequence[tuple[ComparisonRow, float]]) -> Comparisons:
    """The texts of all rows one after the other; each is compared with those of its own row only."""
    comparisons = [row for row, _ in rows]
    starts = [0, *accumulate(len(row.texts) for row in comparisons)]
    N = starts[-1]
    wins_NN, margins_NN, ratings_N = torch.full((N, N), math.nan), torch.zeros(N, N), torch.full((N,), math.nan)
    for row, a, b in zip(comparisons, starts, starts[1:], strict=False):
        wins_NN[a:b, a:b] = torch.tensor(row.wins)
        if row.ratings is not None:
            ratings_N[a:b] = torch.tensor(row.ratings)
            margins_NN[a:b, a:b] = ratings_N[a:b, None] - ratings_N[None, a:b]
        if row.margin is not None:
            margins_NN[a, a + 1], margins_NN[a + 1, a] = row.margin, -row.margin
    rankings = [_ranking(row, start) for row, start in zip(comparisons, starts, strict=False)]
    known = [ranking for ranking in rankings if ranking is not None]
    has_margins = any(row.margin is not None or row.ratings is not None for row in comparisons)
    return Comparisons(
        texts=tuple(text for row in comparisons for text in row.texts),
        wins_NN=wins_NN,
        ratings_N=ratings_N if all(row.ratings is not None for row in comparisons) else None,
        margins_NN=margins_NN if has_margins else None,
        rankings=tuple(known) if len(known) == len(rankings) else None,
        group_sizes=tuple(len(row.texts) for row in comparisons),
        num_padding=sum(len(row.texts) for row, draw in rows if math.isnan(draw)),
    )


def _ranking(row: ComparisonRow, start: int) -> tuple[int, ...] | None:
    """Numbers of the row's texts in the batch, the best first; None with ties or doubts (anything but 0 and 1)."""
    if any(win not in (0.0, 1.0) for i, wins in enumerate(row.wins) for j, win in enumerate(wins) if i != j):
        return None
    return tuple(sorted(range(start, start + len(row.texts)), key=lambda n: -row.wins[n - start].count(1.0)))
