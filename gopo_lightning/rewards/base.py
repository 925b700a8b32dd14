"""What a reward source is, and how a batch of completions is scored by several of them."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from gopo_lightning.distributed.fsdp import is_sharded
from gopo_lightning.types import Prompt

Scores: TypeAlias = Tensor | Iterable[float | None]
"""N numbers: a tensor, list, tuple or NumPy array; in a list or tuple None may stand for NaN."""


_SEARCH_SECONDS = 10.0
"""For the row at which a source fails."""


class SourceConfigError(ValueError):
    """A source cannot work with these data or this model at all: `score` passes it on unchanged."""


@runtime_checkable
class HoldsModels(Protocol):
    """A source whose frozen models may wait elsewhere than on every rank's device (`model.init_args.placement`)."""

    def setup(self, device: torch.device) -> None:
        """Load on ``device``; what ``models`` then names may be moved or sharded. Without any this is called again."""
        ...

    def models(self) -> list[nn.Module]:
        """All that ``setup`` has loaded. Where a forward of theirs is a collective, the source runs as many as the
        other ranks do (``gathering.in_step``)."""
        ...


class RewardSource(ABC):
    """Gives each completion a number; more is better. None or NaN: this completion has no valid score."""

    name: str
    """In logs and error messages."""
    reads_endings: bool = False
    """Whether a score may depend on how a completion ended, not only on its text."""

    def setup(self, device: torch.device) -> None:  # noqa: B027 - most sources need none
        """Load what is needed and place it on ``device``. Called once, before the first completion."""

    def fitted_tau(self) -> float | None:
        """τ of P(people prefer i to j) = σ((s_i − s_j) / τ), in units of the score, where one was fitted.

        Asked for after ``setup``, by an advantage that needs it and was given none.
        """
        return None

    def counters(self) -> dict[str, int]:
        """Running totals of this process for the log, such as calls."""
        return {}

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """N scores of N completions; ``prompts[n]`` is the prompt of ``completions[n]``.

        In a run each completion is a ``types.Completion``: its text, with the attributes ``truncated`` and
        ``num_tokens``. A source that reads these sets ``reads_endings``.
        """


def score(sources: Sequence[RewardSource], prompts_N: Sequence[Prompt], completions_N: Sequence[str]) -> Tensor:
    """rewards_NK, float64 on the CPU, one column a source; NaN where a source has no valid score.

    Raises:
        RuntimeError: a source raised, or returned something else than N numbers. The message has the source's
            name and the first offending prompt.
        SourceConfigError: from the source, unchanged.
    """
    return torch.stack([_column(source, prompts_N, completions_N) for source in sources], dim=-1)


def _column(source: RewardSource, prompts_N: Sequence[Prompt], completions_N: Sequence[str]) -> Tensor:
    try:
        return as_tensor(source(prompts_N, completions_N), len(completions_N))
    except SourceConfigError:
        raise
    except Exception as error:
        raise RuntimeError(_describe(error, source, prompts_N, completions_N)) from error


def as_tensor(scores: Scores, num_completions: int) -> Tensor:
    """float64 [N] on the CPU, None → NaN; ValueError on any other shape or a value that is no number.

    Whole numbers above 2**53 are rounded to float64.
    """
    if isinstance(scores, Tensor):
        column = scores.detach().cpu().double()
    elif isinstance(scores, str | bytes | Mapping | Set) or not isinstance(scores, Iterable):
        raise ValueError(f"returned {type(scores).__name__}; return a tensor or list with one number each")
    else:
        column = torch.tensor([math.nan if s is None else float(s) for s in scores], dtype=torch.float64)
    if column.shape != (num_completions,):
        raise ValueError(
            f"returned scores of shape {tuple(column.shape)} for {num_completions} completions; return one number each"
        )
    return column


def _describe(error: Exception, source: RewardSource, prompts_N: Sequence[Prompt], completions_N: Sequence[str]) -> str:
    row = _first_offender(error, source, prompts_N, completions_N)
    where = "No row was found that raises by itself; the first prompt" if row is None else "First offending prompt"
    prompt = prompts_N[row or 0]
    return (
        f"reward source '{source.name}' raised {type(error).__name__}: {error}\n{where}: row {prompt.index}: "
        f"{prompt.text!r}, completion: {completions_N[row or 0]!r}"
    )


def _first_offender(
    error: Exception, source: RewardSource, prompts_N: Sequence[Prompt], completions_N: Sequence[str]
) -> int | None:
    """The first row that also raises by itself, or None.

    The run stops anyway, so calling the source once more for each row is affordable, for a while. After an error of
    the accelerator every call may fail, and on sharded models the other ranks would have to call too: then no row is
    looked for.
    """
    sharded = isinstance(source, HoldsModels) and any(map(is_sharded, source.models()))
    if sharded or isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError):
        return None
    deadline = time.monotonic() + _SEARCH_SECONDS
    for row, (prompt, completion) in enumerate(zip(prompts_N, completions_N, strict=True)):
        if time.monotonic() > deadline:
            return None
        try:
            as_tensor(source([prompt], [completion]), 1)
        except Exception:  # noqa: BLE001 - any error marks the row
            return row
    return None
