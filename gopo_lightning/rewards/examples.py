"""Small reward functions for `FunctionReward`: examples, and second rewards of the quickstart."""


def distinct_words(completions: list[str]) -> list[float | None]:
    """Different words / words, against repetition; no score without words."""
    words = [completion.lower().split() for completion in completions]
    return [len(set(w)) / len(w) if w else None for w in words]
