"""What reward models learn from: texts, and which of them people like better."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from gopo_lightning import assets
from gopo_lightning.data import ratings
from gopo_lightning.data.ratings import RatedSentence
from gopo_lightning.structs import TensorStruct


@dataclass(frozen=True)
class Comparisons(TensorStruct):
    """N texts and how they compare with each other.

    Three texts rated 2, -1, 2 (a tie) give

        wins_NN = [[nan, 1, nan], [0, nan, 0], [nan, 1, nan]]
    """

    texts: tuple[str, ...]
    wins_NN: Tensor
    """float32: 1 where the text of the row beats that of the column, 0 where it loses, NaN where they do not
    compare (in general: the probability of winning)."""
    ratings_N: Tensor | None = None
    """float32: the scores behind `wins_NN`, where there are any."""

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
    first.
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
            row = int(order[(i * self.world_size + self.rank) % self.num_rows])
            yield row, float(draws[row])


class PreferenceDataModule(LightningDataModule):
    """Serves `Comparisons` to `RewardModelModule`.

    In training each sentence of a batch takes the score of one of its raters, drawn anew every epoch, so that
    the disagreement between people is in the data. In validation its rating is the mean over its raters. The
    validation sentences are those of the quickstart's validation prompts.

    Args:
        source: `packaged:movie-ratings`, movie-review sentences scored by about 15 people each.
        prefix: put before every sentence. "Movie review: " shows the reward model what the policy will write.
        batch_size: sentences in a batch, on each rank; all ordered pairs within it are compared.
        eval_batch_size: sentences in a validation batch, on each rank.
        seed: of order and raters.
    """

    def __init__(
        self,
        source: str = assets.PREFIX + ratings.ASSET,
        prefix: str = "",
        batch_size: int = 64,
        eval_batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if source != assets.PREFIX + ratings.ASSET:
            raise ValueError(f"data.source={source!r} is unknown. Use {assets.PREFIX + ratings.ASSET}.")
        if batch_size < 2 or eval_batch_size < 1:
            raise ValueError(
                f"batch_size={batch_size}, eval_batch_size={eval_batch_size}: a training batch needs at "
                "least 2 sentences to compare, a validation batch 1. Use 64 and 128."
            )
        self.source, self.prefix, self.seed = source, prefix, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.train: Sequence[RatedSentence] = ()
        self.validation: Sequence[RatedSentence] = ()

    def prepare_data(self) -> None:
        """Fetch the ratings once."""
        assets.path(ratings.ASSET)

    def setup(self, stage: str) -> None:
        """Load and split by sentence."""
        sentences = ratings.load("movie")
        self.train, self.validation = ratings.split(sentences, "train"), ratings.split(sentences, "validation")

    def train_dataloader(self) -> DataLoader[Comparisons]:
        """Full batches only.

        Raises:
            ValueError: a rank has fewer sentences than one batch.
        """
        sampler = self._sampler(len(self.train), shuffle=True)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}, but a rank has only {len(sampler)} sentences. Lower batch_size."
            )
        return self._loader(self.train, sampler, self.batch_size, one_rater=True)

    def val_dataloader(self) -> DataLoader[Comparisons]:
        """All held-out sentences, in order."""
        sampler = self._sampler(len(self.validation), shuffle=False)
        return self._loader(self.validation, sampler, self.eval_batch_size, one_rater=False)

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
        self, sentences: Sequence[RatedSentence], sampler: ShardedSampler, batch_size: int, *, one_rater: bool
    ) -> DataLoader[Comparisons]:
        return DataLoader(
            _Drawn(sentences),  # type: ignore[arg-type]
            batch_size=batch_size,
            sampler=sampler,
            drop_last=one_rater,
            collate_fn=partial(_collate, prefix=self.prefix, one_rater=one_rater),
        )


class _Drawn:
    """Indexed by what the sampler yields: the sentence of a row, and the draw that chooses its rater."""

    def __init__(self, sentences: Sequence[RatedSentence]) -> None:
        self.sentences = sentences

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, row: tuple[int, float]) -> tuple[RatedSentence, float]:
        return self.sentences[row[0]], row[1]


def _collate(rows: Sequence[tuple[RatedSentence, float]], *, prefix: str, one_rater: bool) -> Comparisons:
    """The batch; each sentence is rated by one of its raters, or by the mean of all."""
    drawn = [s.scores[int(draw * len(s.scores))] if one_rater else s.mean for s, draw in rows]
    ratings_N = torch.tensor(drawn, dtype=torch.float32)
    return Comparisons(tuple(prefix + s.text for s, _ in rows), wins_from_ratings(ratings_N), ratings_N)
