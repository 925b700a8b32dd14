"""Reward functions that fail at their fourth call, or throughout."""

import os
import time
from pathlib import Path

from tests.runs import count_vowels

FAILING_CALL = 4

calls = 0
"""Of the faulty reward in this process."""


def _is_failing_call() -> bool:
    global calls
    calls += 1
    return calls == FAILING_CALL


def raises(prompts: list[str], completions: list[str]) -> list[float]:
    """The server is gone."""
    if _is_failing_call():
        raise ConnectionError("the reward server is gone")
    return count_vowels(prompts, completions)


def hangs(prompts: list[str], completions: list[str]) -> list[float]:
    """The server does not answer, and the client tries again for ever."""
    while _is_failing_call() or calls > FAILING_CALL:
        try:
            time.sleep(600)
        except Exception:  # noqa: BLE001 - as clients do
            continue
    return count_vowels(prompts, completions)


def miscounts(prompts: list[str], completions: list[str]) -> list[float]:
    """One completion is left out."""
    return count_vowels(prompts, completions)[int(_is_failing_call()) :]


def all_nan(prompts: list[str], completions: list[str]) -> list[float | None]:
    """No score for anything."""
    return [None] * len(completions)


def raises_on_rank_1(prompts: list[str], completions: list[str]) -> list[float]:
    """Only one rank's server is gone; the file says when."""
    if os.environ.get("LOCAL_RANK") == "1" and calls == FAILING_CALL - 1:
        Path(os.environ["FAULT_FILE"]).touch()
    return raises(prompts, completions) if os.environ.get("LOCAL_RANK") == "1" else count_vowels(prompts, completions)


def hangs_on_rank_1(prompts: list[str], completions: list[str]) -> list[float]:
    """Only one rank's server does not answer; the file says since when."""
    if os.environ.get("LOCAL_RANK") == "1" and calls == FAILING_CALL - 1:
        Path(os.environ["FAULT_FILE"]).touch()
    return hangs(prompts, completions) if os.environ.get("LOCAL_RANK") == "1" else count_vowels(prompts, completions)
