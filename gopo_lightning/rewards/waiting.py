"""What waits for other machines, from code that does not: an event loop for as long as it takes."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call has to be awaited: an `async def`, or an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class Background(Generic[T]):
    """``work`` in an event loop on a thread of its own, which is closed at the end with all that was started in it."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._result: Future[T] = Future()
        self._begun = Event()
        self._task: asyncio.Task[Any] | None = None
        self._thread = Thread(target=self._run, args=[work], daemon=True)
        self._thread.start()
        self._begun.wait()

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def result(self) -> T:
        """What ``work`` returns, or raises."""
        return self._result.result()

    def result_or(self, early: Future[U]) -> U:
        """What ``early`` is given while it goes on; what it raises, if it fails before."""
        either: list[Future[Any]] = [early, self._result]
        wait(either, return_when=FIRST_COMPLETED)
        if not early.done():
            self.result()
        return early.result(timeout=0)

    def join(self, seconds: float | None = None) -> None:
        """Wait for its end, good or bad, but not longer than ``seconds``."""
        self._thread.join(seconds)

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """In its loop, soon; nothing where it has ended."""
        if self._task is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._task.get_loop().call_soon_threadsafe(function, *arguments)

    @contextmanager
    def cancelled_by_error(self) -> Iterator[None]:
        """What ends the caller within, an interrupt too, ends it."""
        try:
            yield
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End it, if it has not ended by itself."""
        if self._task is not None:
            self.call(self._task.cancel)
        self._thread.join()

    def _run(self, work: Callable[[], Awaitable[T]]) -> None:
        async def main() -> T:
            self._task = asyncio.current_task()
            self._begun.set()
            return await work()

        try:
            self._result.set_result(asyncio.run(main()))
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._result.set_exception(error)
        finally:
            self._begun.set()


def wait_for(work: Callable[[], Awaitable[T]]) -> T:
    """What ``work`` returns; what interrupts the caller, who may be within an event loop (a notebook), cancels it."""
    running = Background(work)
    with running.cancelled_by_error():
        return running.result()


async def all_of(calls: Sequence[Callable[[], Awaitable[T]]], max_concurrent: int) -> list[T]:
    """The results of ``calls`` in their order, at most ``max_concurrent`` of them at a time.

    The first that raises cancels all others, and what it raised is raised.
    """
    places = asyncio.Semaphore(max_concurrent)

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with places:
            return await call()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(call)) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
