"""Several reward sources → one reward: rewards_PGK → rewards_PG. Shape legend: `structs.py`."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gopo_lightning.rewards.function import load_callable

Combination: TypeAlias = Callable[[Tensor], Tensor]


def weighted_sum(rewards_PGK: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """Σ_k w_k · r_k, in float32 or better.

    A source of weight 0 is left out, whatever it returned. A NaN of any other source makes the sum NaN: the
    completion has no valid score. So does +inf of one source added to -inf of another.

    Args:
        rewards_PGK: one column a source; any leading dimensions.
        weights: K finite numbers; 1 each by default.

    Raises:
        ValueError: the number of weights is not K, a weight is not finite, or all are 0.
    """
    K = rewards_PGK.shape[-1]
    w_K = torch.ones(K) if weights is None else torch.tensor(weights, dtype=torch.float32)
    if w_K.shape != (K,):
        raise ValueError(f"reward_weights={weights} for {K} reward sources; give one weight per source.")
    if not w_K.isfinite().all() or not w_K.any():
        raise ValueError(
            f"reward_weights={weights}: weights must be finite and not all 0. Give at least one source a weight."
        )
    dtype = torch.promote_types(rewards_PGK.dtype, torch.float32)
    w_K = w_K.to(rewards_PGK.device, dtype)
    return torch.where(w_K == 0, 0.0, rewards_PGK * w_K).sum(-1)


_BY_NAME: dict[str, Callable[..., Tensor]] = {"weighted_sum": weighted_sum}


def get(name: str, *, num_sources: int, **options: Any) -> Combination:
    """The combination ``name`` with ``options`` bound: rewards_PGK → rewards_PG.

    It is tried on one group of ``num_sources`` sources at once, so that bad options stop the run before it
    starts.

    Args:
        name: `weighted_sum`, or the dotted path of a function of rewards_PGK.
        num_sources: K.
        options: keyword arguments of the function.

    Raises:
        ValueError: unknown name or option, options that do not fit K, or a result of the wrong shape.
    """
    if name not in _BY_NAME and "." not in name:
        raise ValueError(
            f"unknown combination '{name}'. Use one of {sorted(_BY_NAME)} or the dotted path of a function."
        )
    function = _BY_NAME.get(name) or load_callable(name)
    _check_options(name, function, options)
    combination = partial(function, **options)
    shape = tuple(combination(torch.zeros(1, 2, num_sources)).shape)
    if shape != (1, 2):
        raise ValueError(
            f"combination '{name}' returned shape {shape} for rewards of shape (1, 2, {num_sources}); return (1, 2)."
        )
    return combination


def _check_options(name: str, function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    parameters = dict(list(inspect.signature(function).parameters.items())[1:])
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if unknown := [] if takes_any else sorted(set(options) - set(parameters)):
        raise ValueError(
            f"combination '{name}' has no option {unknown}; its options are {sorted(parameters)}. Remove or rename it."
        )
