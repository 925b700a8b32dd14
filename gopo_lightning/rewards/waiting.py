"""What waits for other machines, from code that does not: an event loop for as long as it takes."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call has to be awaited: an `async def`, or an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def wait_for(work: Callable[[], Awaitable[T]]) -> T:
    """What ``work`` returns, in an event loop on a thread of its own: the caller may be within one (a notebook).

    The loop is closed at the end, with all that was started in it. What interrupts the caller cancels the work.
    """
    running: list[Callable[[], Any]] = []

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.append(partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel))
        return await work()

    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(lambda: asyncio.run(main())).result()
        except BaseException:
            for cancel in running:
                with suppress(RuntimeError):  # it has ended by itself
                    cancel()
            raise


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
