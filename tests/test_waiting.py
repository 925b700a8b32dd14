"""Work in an event loop in the background: what it gives, how it fails, and how it is given up."""

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest

from gopo_lightning.rewards.waiting import Background, wait_for


class Stopped(BaseException):
    """Ends the caller, as an interrupt does."""


def work(log: list[str], early: "Future[int] | None" = None, error: BaseException | None = None) -> Any:
    """Sets ``early``, and goes on until it is cancelled, or raises ``error``."""

    async def main() -> int:
        if early is not None:
            early.set_result(3)
        if error is not None:
            raise error
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        return 7

    return main


def test_something_comes_before_the_end() -> None:
    log, early = list[str](), Future[int]()
    running = Background(work(log, early))
    assert running.result_or(early) == 3 and not log
    running.cancel()
    assert log == ["cancelled"]
    with pytest.raises(asyncio.CancelledError):
        running.result()
    running.cancel()  # once more does nothing


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(3)])
def test_its_error_is_raised_where_one_waits(error: BaseException) -> None:
    running = Background(work([], error=error))
    running.join()
    for wait in (running.result, lambda: running.result_or(Future())):
        with pytest.raises(type(error)):
            wait()
    with pytest.raises(type(error)):
        wait_for(work([], error=error))


def test_what_came_early_counts_though_it_failed_then() -> None:
    early = Future[int]()
    running = Background(work([], early, ValueError("later")))
    running.join()
    assert running.result_or(early) == 3


def test_what_ends_the_caller_ends_it() -> None:
    log = list[str]()
    running = Background(work(log))
    with pytest.raises(Stopped), running.cancelled_by_error():
        raise Stopped
    assert log == ["cancelled"]


def test_it_runs_beside_the_loop_of_a_notebook() -> None:
    async def cell() -> int:
        return wait_for(lambda: asyncio.sleep(0, 5))

    assert asyncio.run(cell()) == 5
