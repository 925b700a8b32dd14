"""The data of reward-model training: rows → train and held-out part → batches of this rank."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Sampler

from gopo_lightning._compat import batches_processed, uses_distributed_sampler
from gopo_lightning.data import assets, ratings
from gopo_lightning.data.comparison_batches import Comparisons, collate_comparisons, collate_sentences
from gopo_lightning.data.comparisons import ComparisonRow, Text, load_comparisons, place
from gopo_lightning.data.fingerprint import Digest, FingerprintedDataModule, OnDataChange
from gopo_lightning.data.ratings import RatedSentence
from gopo_lightning.data.sources import PromptSource

PACKAGED = assets.PREFIX + ratings.ASSET
Row: TypeAlias = RatedSentence | ComparisonRow


class ShardedSampler(Sampler[tuple[int, float]]):
    """Rows of this rank, each with a uniform draw from [0, 1): all randomness of the data in one place.

    The order is a function of seed, epoch and row count only; rank r takes every world-th row from r. Ranks
    have the same number of rows: short of that, a shuffled order drops its last rows, a plain one repeats its
    first, with NaN for a draw.

    ``place``, where there is one, tells at the start of an iteration the epoch and how many rows of it this rank has
    had, so that a run that was interrupted in mid-epoch goes on behind them.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        place: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.num_rows, self.shuffle, self.seed = num_rows, shuffle, seed
        self.rank, self.world_size, self.place = rank, world_size, place
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        exact = self.num_rows / self.world_size
        return math.floor(exact) if self.shuffle else math.ceil(exact)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        epoch, start = (self.epoch, 0) if self.place is None else self.place()
        generator = torch.Generator().manual_seed(((self.seed << 32) + epoch) % 2**63)
        order = torch.arange(self.num_rows)
        if self.shuffle:
            order = torch.randperm(self.num_rows, generator=generator)
        draws = torch.rand(self.num_rows, generator=generator, dtype=torch.float64)
        for i in range(start, len(self)):
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
        source: `packaged:movie-ratings` (movie-review sentences scored by about 15 people each), a hub dataset such as
            `Anthropic/hh-rlhf`, or a local file, pattern or folder as for prompts.
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
        prompt_column: column of the prompt, where several columns might be or none has a known name; null tells it by
            its name.
        on_data_change: what happens when a run is resumed and its data, batch_size or seed have changed since: refuse,
            or warn and go on.
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
        prompt_column: str | None = None,
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
        given |= {"validation_split": validation_split, "prompt_column": prompt_column}
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
        self.sources = {
            "train": self.training_source or PromptSource(PACKAGED, split="train"),
            "validation": self.validation_source,
        }
        self.validation_fraction, self.prompt_column = validation_fraction, prompt_column
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
        rows = load_comparisons(self.training_source, self.prompt_column)
        if self.validation_source is not None:
            self.train, self.validation = rows, load_comparisons(self.validation_source, self.prompt_column)
            return
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = math.ceil(self.validation_fraction * len(rows))
        if held_out == len(rows):
            lower = " lower it," if len(rows) > 1 else ""
            raise ValueError(
                f"validation_fraction={self.validation_fraction} holds out all {len(rows)} comparisons of "
                f"{self.source}. Give more,{lower} or name a validation_source."
            )
        self.train, self.validation = [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of the rows, after the split."""
        return {
            part: self._fingerprint(rows) for part, rows in (("train", self.train), ("validation", self.validation))
        }

    @property
    def order_settings(self) -> dict[str, Any]:
        """Of the training batches."""
        return {"batch_size": self.batch_size, "seed": self.seed}

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
            remedy = "Lower batch_size." if len(sampler) else "Give more data, or train on fewer ranks."
            raise ValueError(f"batch_size={self.batch_size}, but a rank has only {len(sampler)} {self._unit}. {remedy}")
        return self._loader(self.train, sampler, self.batch_size, one_rater=True)

    def val_dataloader(self) -> DataLoader[Comparisons]:
        """All held-out sentences, in order."""
        sampler = self._sampler(len(self.validation), shuffle=False)
        return self._loader(self.validation, sampler, self.eval_batch_size, one_rater=False)

    def texts(self) -> Iterator[tuple[str, Text]]:
        """Every text that `setup` has read, and where it stands: for checks before training."""
        parts = ((self.train, self.training_source), (self.validation, self.validation_source or self.training_source))
        for rows, source in parts:
            for row in rows:
                if isinstance(row, RatedSentence):
                    yield f"sentence {row.id} of {self.source}", self.prefix + row.text
                elif source is not None:
                    yield from ((place(source, row.number), text) for text in row.texts)

    @property
    def _unit(self) -> str:
        return "sentences" if self.training_source is None else "comparisons"

    def _sampler(self, num_rows: int, *, shuffle: bool) -> ShardedSampler:
        trainer = self.trainer
        if trainer is None:
            return ShardedSampler(num_rows, shuffle=shuffle, seed=self.seed)
        if trainer.world_size > 1 and uses_distributed_sampler(trainer):
            raise ValueError(
                "trainer.use_distributed_sampler=True would divide the data among the ranks a second time; "
                "this data module does it already. Set trainer.use_distributed_sampler: false."
            )
        return ShardedSampler(
            num_rows,
            shuffle=shuffle,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            place=self._place if shuffle else None,
        )

    def _place(self) -> tuple[int, int]:
        """Epoch, and rows of it that a rank has been given: by the batches of the whole run, as a checkpoint has them.

        (Lightning's own count of epochs differs between checkpoints saved after the last batch and after the epoch.)
        """
        trainer: Any = self.trainer
        epoch, batches = divmod(batches_processed(trainer), trainer.num_training_batches)
        return epoch, batches * self.batch_size

    def _loader(
        self, rows: Sequence[Row], sampler: ShardedSampler, batch_size: int, *, one_rater: bool
    ) -> DataLoader[Comparisons]:
        collate = partial(collate_sentences, prefix=self.prefix, one_rater=one_rater)
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
