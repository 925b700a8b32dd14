"""A limit on how long a reward source may take: a source that hangs ends the run instead of keeping it for ever."""

import faulthandler
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 30.0
"""After the limit, for what does not return to Python at once; then the process ends, whatever it is doing."""


class _TimeIsUp(BaseException):
    """No ``Exception``: the retry loops of a source must not swallow it."""


@contextmanager
def time_limit(seconds: float | None, what: str) -> Iterator[None]:
    """Work that is interrupted after ``seconds``; None never.

    The interrupt is an alarm signal, which Python takes between two of its own instructions. Where that does not come
    (in native code, or outside of the main thread), the process prints its stacks and exits with 1.

    Raises:
        TimeoutError: the limit is reached; the cause shows where.
    """
    if seconds is None:
        yield
        return
    message = (
        f"{what} has not answered within rewards.timeout_seconds={seconds:g}. Mend it, or raise the limit (null has "
        "none); --ckpt_path last goes on from the newest checkpoint."
    )

    def interrupt(number: int, frame: FrameType | None) -> None:
        print(message, file=sys.stderr, flush=True)
        raise _TimeIsUp

    with _alarm(seconds, interrupt), _exit_after(seconds + GRACE_SECONDS):
        try:
            yield
        except _TimeIsUp as stopped:
            raise TimeoutError(message) from stopped


@contextmanager
def _alarm(seconds: float, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGALRM after ``seconds``; an alarm that somebody else had set goes on afterwards."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    previous = signal.signal(signal.SIGALRM, handler)
    others = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if others[0]:
            signal.setitimer(signal.ITIMER_REAL, max(others[0] - (seconds - left), 1e-3), others[1])


@contextmanager
def _exit_after(seconds: float) -> Iterator[None]:
    """The end of the process after ``seconds``, with the stacks of all threads."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
