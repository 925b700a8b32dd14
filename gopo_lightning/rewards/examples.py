"""Small reward functions for `FunctionReward`: examples, and the quickstart's rewards beside its reward model."""


def finished(truncated: list[bool]) -> list[float]:
    """1 for a completion that ended by itself, 0 for one that `max_new_tokens` cut off."""
    return [float(not cut_off) for cut_off in truncated]


def distinct_words(completions: list[str]) -> list[float | None]:
    """Different words / words, against repetition; no score without words."""
    words = [completion.lower().split() for completion in completions]
    return [len(set(w)) / len(w) if w else None for w in words]
