"""Which prompts a rank reads, and when.

Both samplers are batch samplers: they yield the row numbers of one step's prompts of ONE rank, and Lightning
needs no sampler of its own (``use_distributed_sampler: false``). P prompts of a step are global; rank r of W
takes ``[r::W]``, so that one process and many ranks train on the same prompts in the same step.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Place:
    """Where in the order of prompts a step begins; a checkpoint keeps it."""

    step: int = 0
    """Steps done before."""
    epoch: int = 0
    """Number of the shuffling."""
    offset: int = 0
    """Prompts of this shuffling that were read before."""


class PromptSampler(Sampler[list[int]]):
    """The training order: an endless stream of steps, shuffled epoch by epoch, that resumes anywhere.

    Step s of a run is a pure function of (seed, origin, s): epoch ``e`` is cut from ``randperm(seed + e)`` into steps
    of P prompts, and the incomplete last one is dropped. Each iteration starts at ``position()``, the number of steps
    done so far, so a run that was interrupted in mid-epoch or at its end continues with the prompts that the
    uninterrupted one would have read; Lightning's own epoch counters do not enter (they differ between checkpoints
    saved after the last batch and after the epoch). With another P it continues after the same prompts: the origin of
    a resumed run is a place in prompts, not in steps. A step may read ``further`` prompts of the order; the next one
    then begins after these, and `place` says so.

    Args:
        num_prompts: rows of the dataset.
        prompts_per_step: P, over all ranks.
        seed: of the shuffling.
        rank: of this process among those that read different data.
        world_size: how many those are.
        position: steps done so far, read whenever an iteration begins.
        origin: where this run, or its resume, begins; read likewise.

    Raises:
        ValueError: P is not positive, the world size does not divide P, or there are fewer than P rows.
    """

    def __init__(
        self,
        num_prompts: int,
        prompts_per_step: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], int] = lambda: 0,
        origin: Callable[[], Place] = Place,
    ) -> None:
        check_step("prompts_per_step", prompts_per_step, world_size)
        if num_prompts < prompts_per_step:
            raise ValueError(
                f"the training dataset has {num_prompts} prompts, fewer than prompts_per_step={prompts_per_step}; a "
                "step reads different prompts. Lower prompts_per_step or add prompts."
            )
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = position
        self.origin = origin
        self._moved: tuple[Place, ...] = ()
        """The step that read further prompts last, and the next one."""
        self._read: set[int] = set()
        """Rows that it has read, over all ranks."""

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.num_prompts // self.prompts_per_step

    def __iter__(self) -> Iterator[list[int]]:
        """One epoch's worth of steps from ``position()`` on."""
        start = self.position()  # read now, not at the first next()
        return (self.step(number) for number in range(start, start + len(self)))

    def step(self, number: int) -> list[int]:
        """This rank's rows in step ``number`` of the run, counted from 0."""
        return self._rows(number)[self.rank :: self.world_size]

    def place(self, number: int) -> Place:
        """Where step ``number``, the origin's or a later one, begins."""
        P, known = self.prompts_per_step, [place for place in self._moved if place.step <= number]
        origin = known[-1] if known else self.origin()
        steps, left = number - origin.step, (self.num_prompts - origin.offset) // P
        if steps < left:
            return Place(number, origin.epoch, origin.offset + steps * P)
        epoch, within = divmod(steps - left, len(self))
        return Place(number, origin.epoch + 1 + epoch, within * P)

    def further(self, count: int) -> list[int]:
        """The next ``count`` rows of the order for the present step, over all ranks, and the same on each.

        A step reads no row twice, so there are fewer where it has read all others.
        """
        number = self.position()
        if not self._moved or self._moved[-1].step != number + 1:
            self._moved, self._read = (self.place(number), self.place(number + 1)), set(self._rows(number))
        rows, after = self._following(self._moved[-1], count, self._read)
        self._moved = (self._moved[0], after)
        self._read.update(rows)
        return rows

    def _rows(self, number: int) -> list[int]:
        """Of all ranks."""
        place = self.place(number)
        return self._order(place.epoch)[place.offset : place.offset + self.prompts_per_step]

    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(self.num_prompts, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()

    def _following(self, start: Place, count: int, besides: Collection[int]) -> tuple[list[int], Place]:
        """``count`` rows from ``start`` on, but those of ``besides``; and the place after them."""
        count = min(count, self.num_prompts - len(besides))
        rows: list[int] = []
        epoch, offset, order = start.epoch, start.offset, self._order(start.epoch)
        while len(rows) < count:
            if offset == self.num_prompts:
                epoch, offset, order = epoch + 1, 0, self._order(epoch + 1)
            if order[offset] not in besides and order[offset] not in rows:
                rows.append(order[offset])
            offset += 1
        return rows, Place(start.step, epoch, offset)


class InOrderSampler(Sampler[list[int]]):
    """The order of validation, test and prediction: every row once, in order, the same count on every rank.

    A last step that the ranks cannot share equally is padded with rows from the start. Padding is marked in
    the number itself: ``num_prompts + i`` is row i (modulo the length) once more, to be dropped from results.

    >>> [list(InOrderSampler(5, 4, rank=r, world_size=2)) for r in (0, 1)]
    [[[0, 2], [4]], [[1, 3], [5]]]

    Args:
        num_prompts: rows of the dataset.
        prompts_per_step: P, over all ranks.
        rank: of this process among those that read different data.
        world_size: how many those are.

    Raises:
        ValueError: P is not positive, or the world size does not divide it.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, *, rank: int = 0, world_size: int = 1) -> None:
        check_step("val_prompts_per_step", prompts_per_step, world_size)
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Steps."""
        return -(-self.num_prompts // self.prompts_per_step)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's rows, step by step."""
        padded = -(-self.num_prompts // self.world_size) * self.world_size
        for first in range(0, self.num_prompts, self.prompts_per_step):
            last = min(first + self.prompts_per_step, padded)
            yield list(range(first + self.rank, last, self.world_size))


def check_step(name: str, prompts_per_step: int, world_size: int) -> None:
    """ValueError for a step, of the option ``name``, that cannot be divided over the ranks."""
    if prompts_per_step < 1:
        raise ValueError(f"{name}={prompts_per_step} must be at least 1.")
    if prompts_per_step % world_size:
        multiple = -(-prompts_per_step // world_size) * world_size
        raise ValueError(
            f"{name}={prompts_per_step} is over all ranks and must be a multiple of the world size {world_size}, so "
            f"that each reads the same number. Use {multiple}, for example."
        )
