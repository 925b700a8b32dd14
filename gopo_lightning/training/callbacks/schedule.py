"""When a callback acts: once every n optimiser steps."""


class Every:
    """Once every ``num_steps`` optimiser steps, also where a batch makes several and the counter jumps.

    >>> every = Every(10)
    >>> every.start(0)
    >>> [step for step in (4, 8, 12, 16, 20) if every.due(step)]
    [12, 20]
    """

    def __init__(self, num_steps: int) -> None:
        if num_steps < 1:
            raise ValueError(f"every_n_steps is {num_steps}; it has to be at least 1. Give a positive one.")
        self._num_steps = num_steps
        self._reached = 0

    def start(self, step: int, *, with_first: bool = False) -> None:
        """Count from ``step``, where a run starts or resumes. ``with_first``: a new run's first is due."""
        self._reached = -1 if with_first and step == 0 else step // self._num_steps

    def due(self, step: int) -> bool:
        """Whether a multiple of ``num_steps`` was reached since the last call."""
        reached, self._reached = self._reached, step // self._num_steps
        return self._reached > reached
