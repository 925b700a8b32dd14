"""Duels of policies: their completions of the same prompts, a judge that compares them, and what that says."""
