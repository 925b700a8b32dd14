"""Duels of policies: their completions of the same prompts, a judge that compares them, and what that says."""

from typing import Literal

Orders = Literal["both", "one"]
"""In which each pair is shown to a judge that may depend on the order."""
