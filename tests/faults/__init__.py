"""Faults done to real runs: ``make test-faults`` prints fault, times tried, times survived, steps lost."""
