"""Sources that wait for other machines, asked meanwhile: about groups as they finish, and beside other sources.

What is asked early is kept by the source until it is called for the batch. So the batch's scores, errors and counts
are the same, however much was asked before.
"""

import asyncio
from collections.abc import Iterable, Sequence
from threading import Event
from typing import Protocol, TypeAlias, runtime_checkable

from gopo_lightning.rewards.pairwise import Groups
from gopo_lightning.rewards.waiting import Background
from gopo_lightning.types import Prompt

Group: TypeAlias = tuple[Prompt, Sequence[str]]
_LOOK_SECONDS = 1.0
_END_SECONDS = 10.0
"""How long what is given up may take to end: a function that blocks does not hear of it."""


@runtime_checkable
class AsksEarly(Protocol):
    """A source that can be asked about some groups of a batch before it is called for all of them."""

    @property
    def waits(self) -> bool:
        """Whether it spends its time waiting for other machines; else it is not asked early."""
        ...

    async def ask(self, prompts: Sequence[Prompt], groups: Groups) -> None:
        """Ask about these groups, and keep what is answered until the call for their batch.

        It runs in a thread, beside the sampling, one call of a source at a time; all sources share the thread, so it
        must not block. What it raises is dropped: the batch's call asks for what is not there, and raises it.
        """
        ...


class EarlyQuestions:
    """Inside, groups are asked about as soon as they are added; at the end what is still open is given up.

    Args:
        sources: those that wait are asked, each about all groups that have come while it was busy.
        prompts: of the groups.
    """

    def __init__(self, sources: Iterable[object], prompts: Sequence[Prompt]) -> None:
        self.sources = [source for source in sources if isinstance(source, AsksEarly) and source.waits]
        self.prompts, self._added = prompts, set[int]()

    def __bool__(self) -> bool:
        """Whether anybody would be asked."""
        return bool(self.sources)

    def __enter__(self) -> "EarlyQuestions":
        if self.sources:
            self._end = asyncio.Event()
            self._queues: list[asyncio.Queue[Group]] = [asyncio.Queue() for _ in self.sources]
            self._waiting = set[asyncio.Future[None]]()  # a loop keeps none of its tasks
            self._asking = Background(self._ask_all)
        return self

    def __exit__(self, *error: object) -> None:
        if self.sources:
            self._asking.call(self._end.set)
            self._asking.join(_END_SECONDS)

    def add(self, p: int, group: Sequence[str]) -> None:
        """The completions of prompt ``p``, which have ended; once more does nothing."""
        if self.sources and p not in self._added:
            self._added.add(p)
            for queue in self._queues:
                self._asking.call(queue.put_nowait, (self.prompts[p], group))

    def wait_for(self, source: object) -> None:
        """Until ``source`` has been asked about all that was added."""
        for each, queue in zip(self.sources, self._queues, strict=True) if self.sources else ():
            if each is source:
                done = Event()
                self._asking.call(self._tell, queue, done)
                while not done.wait(_LOOK_SECONDS) and self._asking.goes_on:  # `SystemExit` of a source ends it
                    pass

    def _tell(self, queue: "asyncio.Queue[Group]", done: Event) -> None:
        task = asyncio.ensure_future(queue.join())
        task.add_done_callback(lambda _: done.set())
        self._waiting.add(task)

    async def _ask_all(self) -> None:
        asking = [asyncio.create_task(_ask(*each)) for each in zip(self.sources, self._queues, strict=True)]
        await self._end.wait()
        del asking  # what is still going on is cancelled with the loop


async def _ask(source: AsksEarly, queue: "asyncio.Queue[Group]") -> None:
    while True:
        groups = [await queue.get()]
        while not queue.empty():
            groups.append(queue.get_nowait())
        try:
            await source.ask([prompt for prompt, _ in groups], [group for _, group in groups])
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # this one, and not what the source waited for
                raise
        except (Exception, SystemExit):  # noqa: BLE001 - the batch's call raises it, on the main thread
            pass
        finally:
            for _ in groups:
                queue.task_done()
