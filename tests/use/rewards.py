"""Reward functions as a user would write them in a file beside the config: with ties, gaps, infinities, no order."""

import math


def vowels(completions: list[str]) -> list[float]:
    """Many ties."""
    return [float(sum(character in "aeiou" for character in text)) for text in completions]


def brevity(completions: list[str]) -> list[float]:
    """Few ties, numbers too large for float32."""
    return [1.7e9 - len(text.encode()) for text in completions]


def some_missing(completions: list[str]) -> list[float | None]:
    """No score for a quarter of them."""
    return [None if len(text.encode()) % 4 == 3 else float(len(set(text))) for text in completions]


def unbounded(completions: list[str]) -> list[float]:
    """Infinities, which are ordinary ranks."""
    return [{0: math.inf, 1: -math.inf}.get(len(text.encode()) % 6, float(len(text))) for text in completions]


def beside_letter(completions: list[str], letter: list[str]) -> list[float]:
    """Reads a column of the data."""
    return [float(text.count(wanted)) for text, wanted in zip(completions, letter, strict=True)]


def shorter(first: list[str], second: list[str]) -> list[float]:
    """A comparison with ties."""
    return [0.5 if len(a) == len(b) else float(len(a) < len(b)) for a, b in zip(first, second, strict=True)]


def shown_first(first: list[str], second: list[str]) -> list[float]:
    """A judge that likes what it sees first, and circles: no order of the texts agrees with it."""
    return [0.9 if (len(a) - len(b)) % 3 == 1 else 0.6 for a, b in zip(first, second, strict=True)]


def ranking(completions: list[str]) -> list[int]:
    """An oracle without ties, which leaves the last one out where there are more than three."""
    order = sorted(range(len(completions)), key=lambda number: (len(completions[number]), number))
    return order[:-1] if len(order) > 3 else order
