"""A reward source that hangs ends the run, with an error that names it."""

import os
import signal
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gopo_lightning.rewards import FunctionComparator, FunctionReward
from gopo_lightning.rewards.scoring import against_reference, score_groups
from gopo_lightning.rewards.time_limit import time_limit
from gopo_lightning.types import Prompt
from tests.runs import make_data, make_module, make_trainer

PROMPT = Prompt(0, (1,), "say", None, {})


def hang(completions: list[str], **_: Any) -> list[float]:
    """Retries for ever, as clients of a dead server do."""
    while True:
        try:
            time.sleep(60)
        except Exception:  # noqa: BLE001 - that is the point
            continue


def test_a_source_that_hangs_is_stopped_and_named(capfd: pytest.CaptureFixture) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"reward source 'slow' .* rewards\.timeout_seconds=0.2") as error:
        score_groups([FunctionReward(hang, name="slow")], [PROMPT], [["a", "b"]], timeout_seconds=0.2)
    assert time.monotonic() - start < 5
    assert error.value.__cause__ is not None  # shows where
    assert "hang" in {frame.name for frame in traceback.extract_tb(error.value.__cause__.__traceback__)}
    assert "reward source 'slow' has not answered" in capfd.readouterr().err


@pytest.mark.parametrize("against", [False, True])
def test_a_comparator_that_hangs_is_stopped_and_named(against: bool) -> None:
    def stuck(first: list[str], second: list[str]) -> list[float]:
        return hang(first)

    source = FunctionComparator(stuck, name="stuck")
    with pytest.raises(TimeoutError, match="reward source 'stuck'"):
        if against:
            empty = score_groups([source], [PROMPT], [["a", "b"]], compare=False).rewards_PGK
            combine = lambda rewards_PGK: rewards_PGK[..., 0]  # noqa: E731
            against_reference(
                [source], combine, [PROMPT], [["a", "b"]], empty, [["c", "d"]], empty, timeout_seconds=0.2
            )
        else:
            score_groups([source], [PROMPT], [["a", "b"]], timeout_seconds=0.2)


def test_nothing_is_left_behind() -> None:
    """Neither an alarm nor a watchdog; an alarm that was running goes on."""
    rung: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    others = signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        with time_limit(0.1, "it"):
            time.sleep(0.05)
        time.sleep(0.1)
        assert not rung and signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.35
        time.sleep(0.4)
        assert rung == [1]
        with time_limit(None, "it"):
            assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, max(others[0] - 1, 0.1) if others[0] else 0)


def test_errors_of_the_work_itself_pass() -> None:
    with pytest.raises(TimeoutError, match="of its own"), time_limit(5, "it"):
        raise TimeoutError("of its own")


def test_native_code_that_hangs_ends_the_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """Here: the process waits with its alarms blocked, as in a call that does not come back to Python."""
    monkeypatch.setattr("gopo_lightning.rewards.time_limit.GRACE_SECONDS", 0.3)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        with time_limit(0.2, "it"):
            time.sleep(60)
        os._exit(0)
    start = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert time.monotonic() - start < 30
    said = capfd.readouterr().err
    assert "Timeout" in said and "test_native_code_that_hangs" in said


def test_outside_of_the_main_thread_it_works_too() -> None:
    with ThreadPoolExecutor(1) as pool:

        def work() -> int:
            with time_limit(60, "it"):
                return os.getpid()

        assert pool.submit(work).result() == os.getpid()


def test_the_option_reaches_the_sources(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    module = make_module(tiny_policy, rewards=[FunctionReward(hang, name="slow")], timeout_seconds=0.2)
    with pytest.raises(TimeoutError, match="reward source 'slow'"):
        make_trainer(tmp_path).fit(module, make_data(prompts_file))
    with pytest.raises(ValueError, match="timeout_seconds=0 must be above 0"):
        make_module(tiny_policy, timeout_seconds=0)
