"""Prompts of a source that is too large to be read at the start: its rows come one after the other, step by step.

Every rank reads all rows and takes ``[r::W]`` of the P prompts of a step, so one process and many ranks train on the
same prompts in the same step. Where a step begins is a number of rows, so a resume reads, without rendering, those that
were read before, and finds out whether they are the same.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from gopo_lightning.data.batch import Batch
from gopo_lightning.data.fingerprint import Digest
from gopo_lightning.data.prompt_dataset import Limit
from gopo_lightning.data.rendering import PromptRenderer
from gopo_lightning.data.sampler import Place, check_step
from gopo_lightning.data.sources import stream_rows
from gopo_lightning.types import Prompt, PromptBatch

Row = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True)
class StreamPlace(Place):
    """Where in the stream a step begins; ``offset`` counts rows, also those that were too long."""

    read: str = ""
    """A digest of these rows."""


class PromptStream(IterableDataset[Batch]):
    """One epoch of steps from ``position()`` on; the incomplete last step is dropped.

    Args:
        render: row number and row -> prompt; names the source, whose ``stream_buffer`` says how far rows are shuffled.
        limit: of the tokens of a prompt.
        prompts_per_step: P, over all ranks.
        seed: of the shuffling.
        rank: of this process among those that read different data.
        world_size: how many those are.
        position: steps done so far, read whenever an iteration begins.
        origin: where this run, or its resume, begins; read likewise.
        on_change: told where the rows that a resumed run has read are not the same any more.

    Raises:
        ValueError: P is not positive, or the world size does not divide it. In iterating: a malformed row, a prompt
            that is too long, or fewer than P prompts in all.
    """

    def __init__(
        self,
        render: PromptRenderer,
        limit: Limit,
        *,
        prompts_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], int] = lambda: 0,
        origin: Callable[[], StreamPlace] = StreamPlace,
        on_change: Callable[[str], None] = lambda what: None,
    ) -> None:
        check_step("prompts_per_step", prompts_per_step, world_size)
        self.render, self.limit = render, limit
        self.prompts_per_step, self.seed = prompts_per_step, seed
        self.rank, self.world_size = rank, world_size
        self.position, self.origin, self.on_change = position, origin, on_change
        self._places: dict[int, StreamPlace] = {}

    def __iter__(self) -> Iterator[Batch]:
        place = self.place(self.position())
        epochs = (place, StreamPlace(place.step, place.epoch + 1)) if place.offset else (place,)
        for start in epochs:
            empty = True
            for after, prompts in self._steps(start):
                empty = False
                self._places = {step: known for step, known in self._places.items() if step >= self.position()}
                self._places[after.step] = after
                yield self._batch(prompts[self.rank :: self.world_size])
            if not empty:
                return
        raise ValueError(
            f"{self.render.source.path} has fewer than prompts_per_step={self.prompts_per_step} prompts that can be "
            "used; a step reads different prompts. Lower prompts_per_step or add prompts."
        )

    def place(self, number: int) -> StreamPlace:
        """Where step ``number`` begins: the next one that is not done, or one that was read ahead."""
        return self._places.get(number, self.origin())

    def _steps(self, start: StreamPlace) -> Iterator[tuple[StreamPlace, list[Prompt]]]:
        """The place after each step of an epoch from ``start`` on, and the prompts of all ranks."""
        rows, digest, step, offset = self._rows(start.epoch), Digest(), start.step, 0
        for number, row in islice(rows, start.offset):
            digest.add([number, row])
            offset += 1
        if start.offset and digest.value != start.read:
            self.on_change(f"the first {start.offset} rows of epoch {start.epoch} of {self.render.source.path}")
        prompts: list[Prompt] = []
        for number, row in rows:
            digest.add([number, row])
            offset += 1
            prompt = self.limit(self.render(number, row), self.render)
            prompts += [] if prompt is None else [prompt]
            if len(prompts) == self.prompts_per_step:
                step += 1
                yield StreamPlace(step, start.epoch, offset, digest.value), prompts
                prompts = []

    def _rows(self, epoch: int) -> Iterator[Row]:
        source = self.render.source
        assert source.stream_buffer is not None
        return shuffled(enumerate(stream_rows(source)), source.stream_buffer, self.seed + epoch)

    def _batch(self, prompts: list[Prompt]) -> Batch:
        batch = PromptBatch.collate(prompts, self.render.tokenizer.pad_token_id)
        return Batch(prompts=batch, is_padding=torch.zeros(len(prompts), dtype=torch.bool))


def fingerprint(render: PromptRenderer, limit: Limit) -> dict[str, Any]:
    """Tells whether another process reads the same prompts, as far as that is known before they are read."""
    return {
        "path": render.source.path,
        "stream_buffer": render.source.stream_buffer,
        "rendering": render.identity,
        "max_prompt_tokens": limit.max_tokens,
        "overlong": limit.overlong,
    }


def shuffled(rows: Iterator[Row], size: int, seed: int) -> Iterator[Row]:
    """Rows drawn from a buffer of ``size`` that is filled up in their order; 1 keeps it.

    >>> [row for row, _ in shuffled(((n, {}) for n in range(6)), 3, seed=0)]
    [1, 3, 0, 5, 2, 4]
    """
    draw, buffer = random.Random(seed), [*islice(rows, size)]
    for row in rows:
        place = draw.randrange(size)
        yield buffer[place]
        buffer[place] = row
    draw.shuffle(buffer)
    yield from buffer
