"""What reward models learn from: texts, and which of them people like better."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from gopo_lightning import assets
from gopo_lightning.data import ratings
from gopo_lightning.data.comparisons import ComparisonRow, Text, load_comparisons
from gopo_lightning.data.fingerprint import Digest, FingerprintedDataModule, OnDataChange
from gopo_lightning.data.ratings import RatedSentence
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.structs import TensorStruct

PACKAGED = assets.PREFIX + ratings.ASSET
Row: TypeAlias = RatedSentence | ComparisonRow


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


class ShardedSampler(Sampler[tuple[int, float]]):
    """Rows of this rank, each with a uniform draw from [0, 1): all randomness of the data in one place.

    The order is a function of seed, epoch and row count only; rank r takes every world-th row from r. Ranks
    have the same number of rows: short of that, a shuffled order drops its last rows, a plain one repeats its
    first, with NaN for a draw.
    """

    def __init__(self, num_rows: int, *, shuffle: bool, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_rows, self.shuffle, self.seed = num_rows, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        exact = self.num_rows / self.world_size
        return math.floor(exact) if self.shuffle else math.ceil(exact)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        generator = torch.Generator().manual_seed(((self.seed << 32) + self.epoch) % 2**63)
        order = torch.arange(self.num_rows)
        if self.shuffle:
            order = torch.randperm(self.num_rows, generator=generator)
        draws = torch.rand(self.num_rows, generator=generator, dtype=torch.float64)
        for i in range(len(self)):
            place = i * self.world_size + self.rank
            row = int(order[place % self.num_rows])
            yield row, float(draws[row]) if place < self.num_rows else math.nan


class PreferenceDataModule(FingerprintedDataModule):
    """Serves `Comparisons` to `RewardModelModule`, from rated sentences, pairs, raters' choices or ranked lists.

    `packaged:movie-ratings`: in training each sentence of a batch takes the score of one of its raters, drawn anew
    every epoch, so that the disagreement between people is in the data. In validation its rating is the mean over its
    raters. The validation sentences are those of the quickstart's validation prompts.

    Any other source: the format is told by the columns, see docs/rewards.md.

    Args:
        source: `packaged:movie-ratings` (movie-review sentences scored by about 15 people each), a local .jsonl, .csv
            or .parquet file, or a hub dataset such as `Anthropic/hh-rlhf`.
        prefix: put before every sentence of the packaged ratings. "Movie review: " shows the reward model what the
            policy will write.
        batch_size: sentences in a batch (all ordered pairs within it are compared), or pairs or lists; on each rank.
        eval_batch_size: likewise, in a validation batch.
        seed: of order, raters and held-out rows.
        name: configuration of a hub dataset, such as `comparisons`.
        split: split of a hub dataset for training.
        validation_source: file or hub dataset to validate on; when null, `validation_split` of `source`, or else
            held-out rows of it.
        validation_split: split of a hub dataset for validation.
        validation_fraction: of the rows to hold out where there is neither.
        limit: use the first this many rows of `source`.
        on_data_change: what happens when a run is resumed and its data have changed since: refuse, or warn and go on.
    """

    def __init__(
        self,
        source: str = PACKAGED,
        prefix: str = "",
        batch_size: int = 64,
        eval_batch_size: int = 128,
        seed: int = 0,
        name: str | None = None,
        split: str | None = None,
        validation_source: str | None = None,
        validation_split: str | None = None,
        validation_fraction: float = 0.1,
        limit: int | None = None,
        on_data_change: OnDataChange = "refuse",
    ) -> None:
        super().__init__(on_data_change)
        smallest = 2 if source == PACKAGED else 1
        if batch_size < smallest or eval_batch_size < 1:
            raise ValueError(
                f"batch_size={batch_size}, eval_batch_size={eval_batch_size}: a training batch needs at "
                f"least {smallest} {'sentences to compare' if smallest == 2 else 'row'}, a validation batch 1. Use 64 "
                "and 128."
            )
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction={validation_fraction} must lie between 0 and 1. Use 0.1.")
        given = {"name": name, "split": split, "validation_source": validation_source, "limit": limit}
        given["validation_split"] = validation_split
        if source == PACKAGED and (unused := sorted(key for key, value in given.items() if value is not None)):
            raise ValueError(f"data.source={source} has a fixed split and takes no {', '.join(unused)}. Remove it.")
        if source != PACKAGED and prefix:
            raise ValueError(f"prefix={prefix!r} belongs to {PACKAGED}; the texts of {source} stay as they are.")
        self.source, self.prefix, self.seed = source, prefix, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.training_source = self.validation_source = None
        if source != PACKAGED:
            self.training_source = PromptSource(source, name=name, split=split, limit=limit)
            if validation_source or validation_split:
                self.validation_source = PromptSource(validation_source or source, name=name, split=validation_split)
        self.validation_fraction = validation_fraction
        self.train: Sequence[Row] = ()
        self.validation: Sequence[Row] = ()

    def prepare_data(self) -> None:
        """Fetch the ratings once."""
        if self.training_source is None:
            assets.path(ratings.ASSET)

    def setup(self, stage: str) -> None:
        """Load and split: rated sentences by sentence, comparisons by row."""
        if self.training_source is None:
            sentences = ratings.load("movie")
            self.train, self.validation = ratings.split(sentences, "train"), ratings.split(sentences, "validation")
            return
        rows = load_comparisons(self.training_source)
        if self.validation_source is not None:
            self.train, self.validation = rows, load_comparisons(self.validation_source)
            return
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = math.ceil(self.validation_fraction * len(rows))
        self.train, self.validation = [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of the rows, after the split."""
        return {
            part: self._fingerprint(rows) for part, rows in (("train", self.train), ("validation", self.validation))
        }

    def _fingerprint(self, rows: Sequence[Row]) -> dict[str, Any]:
        digest = Digest()
        for row in rows:
            digest.add(repr(row))
        return {"path": self.source, "num_rows": len(rows), "rows": digest.value}

    def train_dataloader(self) -> DataLoader[Comparisons]:
        """Full batches only.

        Raises:
            ValueError: a rank has less data than one batch.
        """
        sampler = self._sampler(len(self.train), shuffle=True)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}, but a rank has only {len(sampler)} {self._unit}. Lower batch_size."
            )
        return self._loader(self.train, sampler, self.batch_size, one_rater=True)

    def val_dataloader(self) -> DataLoader[Comparisons]:
        """All held-out sentences, in order."""
        sampler = self._sampler(len(self.validation), shuffle=False)
        return self._loader(self.validation, sampler, self.eval_batch_size, one_rater=False)

    @property
    def _unit(self) -> str:
        return "sentences" if self.training_source is None else "comparisons"

    def _sampler(self, num_rows: int, *, shuffle: bool) -> ShardedSampler:
        trainer = self.trainer
        if trainer is None:
            return ShardedSampler(num_rows, shuffle=shuffle, seed=self.seed)
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "trainer.use_distributed_sampler=True would divide the data among the ranks a second time; "
                "this data module does it already. Set trainer.use_distributed_sampler: false."
            )
        return ShardedSampler(
            num_rows, shuffle=shuffle, seed=self.seed, rank=trainer.global_rank, world_size=trainer.world_size
        )

    def _loader(
        self, rows: Sequence[Row], sampler: ShardedSampler, batch_size: int, *, one_rater: bool
    ) -> DataLoader[Comparisons]:
        collate = partial(_collate, prefix=self.prefix, one_rater=one_rater)
        return DataLoader(
            _Drawn(rows),  # type: ignore[arg-type]
            batch_size=batch_size,
            sampler=sampler,
            drop_last=one_rater,
            collate_fn=collate if self.training_source is None else collate_comparisons,
        )


class _Drawn:
    """Indexed by what the sampler yields: a row, and the draw that chooses the rater of a sentence."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: tuple[int, float]) -> tuple[Row, float]:
        return self.rows[row[0]], row[1]


def _collate(rows: Sequence[tuple[RatedSentence, float]], *, prefix: str, one_rater: bool) -> Comparisons:
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
