"""People as judges: groups of completions, a page to put them in order, and the verdicts on disk."""
