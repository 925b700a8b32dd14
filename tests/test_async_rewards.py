"""Reward functions that wait: `async def`, for all completions in a call or for one of them."""

import asyncio
import contextlib
import re
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.rewards import (
    FunctionComparator,
    FunctionReward,
    RankingOracle,
    SourceConfigError,
    score,
    score_groups,
)
from gopo_lightning.types import Completion
from tests.runs import count_vowels, make_module
from tests.test_module import fit
from tests.test_rewards import PROMPTS, TEXTS, prompt


class Watch:
    """How many are within it, at present and at most, and how many left it by being cancelled."""

    def __init__(self) -> None:
        self.running = self.most = self.calls = self.cancelled = 0
        self.loops: set[Any] = set()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        self.loops.add(asyncio.get_running_loop())
        try:
            yield
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


async def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """As `tests.runs.count_vowels`."""
    await asyncio.sleep(0)
    return count_vowels(prompts, completions)


async def vowels_of_one(completion: str) -> float:
    await asyncio.sleep(0)
    return count_vowels([], [completion])[0]


async def sees_its_row(
    prompt: str, completion: str, truncated: bool, num_tokens: int, level: int, bonus: float, gold: str = "?"
) -> float | None:
    await asyncio.sleep(0.01 * (3 - level))  # the first is ready last
    assert (prompt, truncated, gold) == ("q", level == 2, "?")
    return None if level == 3 else num_tokens + 10 * level + 100 * len(completion) + bonus


def test_a_function_for_all_gets_the_batch_and_one_for_each_its_row() -> None:
    assert FunctionReward(vowels)(PROMPTS, TEXTS) == count_vowels([], TEXTS)
    rows = [prompt("q", level=1), prompt("q", level=2), prompt("q", level=3)]
    texts = [Completion("a" * n, truncated=n == 2, num_tokens=n) for n in (1, 2, 3)]
    source = FunctionReward(sees_its_row, options={"bonus": 0.5})
    assert source.reads_endings
    scores = score([source], rows, texts)[:, 0]
    assert scores[:2].tolist() == [111.5, 222.5] and scores[2].isnan()


class Asks:
    """An object is a function too."""

    async def __call__(self, completion: str) -> float:
        return float(len(completion))


def test_objects_comparators_and_oracles_may_wait_too() -> None:
    assert FunctionReward(Asks())(PROMPTS, TEXTS) == [1.0, 24.0, 3.0]

    async def longer(first: list[str], second: list[str]) -> list[float]:
        return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    async def longest_first(completions: list[str]) -> list[int]:
        return sorted(range(len(completions)), key=lambda i: -len(completions[i]))

    for source in (FunctionComparator(longer), RankingOracle(longest_first)):
        assert score_groups([source], PROMPTS[:1], [TEXTS]).rewards_PGK[0, :, 0].tolist() == [0.0, 1.0, 0.5]


@pytest.mark.parametrize(("given", "expected"), [(None, 16), (3, 3)])
def test_so_many_calls_run_at_a_time_in_a_loop_that_is_closed(given: int | None, expected: int) -> None:
    watch = Watch()

    async def slow(completion: str) -> float:
        with watch():
            await asyncio.sleep(0.01)
            return float(completion)

    source = FunctionReward(slow, max_concurrent=given)
    assert source([PROMPTS[0]] * 40, [str(n) for n in range(40)]) == [float(n) for n in range(40)]
    assert (watch.calls, watch.most, len(watch.loops)) == (40, expected, 1)
    assert all(loop.is_closed() for loop in watch.loops)


def test_it_runs_where_a_loop_already_does() -> None:
    """As in a notebook."""

    async def notebook() -> Any:
        return FunctionReward(vowels_of_one)(PROMPTS, TEXTS)

    assert asyncio.run(notebook()) == count_vowels([], TEXTS)


def test_the_first_error_cancels_the_others_and_names_its_row() -> None:
    watch = Watch()

    async def fails_on_shouting(prompt: str, completion: str) -> float:
        with watch():
            if prompt == "shout ":
                raise KeyError("too loud")
            await asyncio.sleep(30 if len(watch.loops) == 1 else 0)  # alone, in the search, it is well
            return 0.0

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"'fails_on_shouting' raised KeyError: 'too loud'") as info:
        score([FunctionReward(fails_on_shouting)], PROMPTS, TEXTS)
    assert time.monotonic() - start < 10 and watch.cancelled == 2 and watch.running == 0
    assert "First offending prompt: row 7: 'shout '" in str(info.value)
    assert isinstance(info.value.__cause__, KeyError)


@pytest.mark.parametrize("each", [False, True])
def test_the_time_limit_cancels_what_waits(each: bool, capfd: pytest.CaptureFixture) -> None:
    watch = Watch()

    async def for_all(completions: list[str]) -> list[float]:
        with watch():
            await asyncio.sleep(60)
        return []

    async def for_each(completion: str) -> float:
        with watch():
            await asyncio.sleep(60)
        return 0.0

    source, start, threads = FunctionReward(for_each if each else for_all), time.monotonic(), threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a coroutine that was never awaited
        with pytest.raises(TimeoutError, match=r"reward source 'for_\w+' .* rewards\.timeout_seconds=0.2"):
            score_groups([source], PROMPTS[:1], [["a", "b"]], timeout_seconds=0.2)
    assert time.monotonic() - start < 10 and threading.active_count() == threads
    assert watch.cancelled == watch.calls == (2 if each else 1) and all(loop.is_closed() for loop in watch.loops)


def test_columns_are_checked_before_anything_is_sent() -> None:
    watch = Watch()

    async def needs_gold(completion: str, gold: str) -> float:
        with watch():
            return 0.0

    with pytest.raises(SourceConfigError, match=r"requires the columns \['gold'\].*\[7\]"):
        score([FunctionReward(needs_gold)], [prompt("q", 0, gold="a"), prompt("q", 7)], ["a", "b"])
    assert watch.calls == 0


def of_one(completion: str) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (vowels, {"max_concurrent": 4}, r"max_concurrent=4 of reward function 'vowels' .* `async def`"),
        (count_vowels, {"max_concurrent": 4}, "max_concurrent=4 of reward function 'count_vowels'"),
        (vowels_of_one, {"max_concurrent": 0}, "max_concurrent=0"),
        (of_one, {}, "takes no argument `completions`"),
    ],
)
def test_what_would_have_no_effect_is_refused(function: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionReward(function, **options)


def test_a_run_is_that_of_the_function_that_does_not_wait(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    weights = []
    for number, function in enumerate((count_vowels, vowels, vowels_of_one)):
        module = make_module(tiny_policy, rewards=[FunctionReward(function, name="vowels")])
        fit(module, prompts_file, tmp_path / str(number), max_steps=1)
        weights.append(module.policy.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(tensor, weights[0][name]) for name, tensor in other.items())


def test_the_example_of_the_docs_runs() -> None:
    page = Path("docs/rewards.md").read_text(encoding="utf-8")
    (code,) = re.findall(r'^```python title="sandbox_rewards.py"\n(.*?)^```', page, re.DOTALL | re.M)
    exec(code, names := {})
    assert FunctionReward(names["passed"])(PROMPTS, TEXTS) == [1.0] * 3
