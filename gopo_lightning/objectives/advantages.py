"""Rewards (or comparisons) of a group of completions -> one advantage per completion.

Shape legend: P prompts, G completions of one prompt (a group). Every function is pure, takes a batch of
groups and returns float32 ``advantages_PG``. Common rules:

- NaN means "no valid score": such a completion leaves the comparison, its advantage is 0, and ``valid`` is
  False there, so that the loss can mask it. A group with fewer than two valid scores is 0 everywhere.
- A group whose valid rewards are all equal is exactly 0 everywhere.
- G < 2 raises ValueError: nothing can be compared with one completion.
- The ordinal advantages read only the order, so +-inf are ordinary ranks. The magnitude baselines (``grpo``,
  ``dr_grpo``, ``rloo``, ``batch``) compute in float64 and refuse +-inf with a ValueError.

Departures from the paper (arXiv 2602.03876) and the authors' code: ties share their mean rank by default (the
paper gives no rule, the authors' code breaks ties as argsort happens to: ``ties="arbitrary"`` here); NaN (there a
completion without a score has a reward of 0) and comparison matrices are ours.
"""

import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Ties = Literal["average", "arbitrary"]
Advantage = Callable[[Tensor], Tensor]

_STD_EPSILON = 1e-4
"""Added to the standard deviation, as in the authors' code."""


def valid(rewards_PG: Tensor) -> Tensor:
    """bool [P, G]: the completions that enter the loss, i.e. those with a score."""
    return ~torch.isnan(rewards_PG)


def valid_from_wins(wins_PGG: Tensor) -> Tensor:
    """bool [P, G]: the completions that were compared with at least one other, see ``ordinal_from_wins``."""
    return _asked(wins_PGG).any(-1)


def net_wins(rewards_PG: Tensor) -> Tensor:
    """(wins_i - losses_i) / (G_valid - 1) in float64, half the ordinal advantage; any leading dimensions, any G.

    0 for NaN and where nothing can be compared.
    """
    return _margin(rewards_PG).double() / (valid(rewards_PG).sum(-1, keepdim=True) - 1).clamp(min=1)


def ordinal(rewards_PG: Tensor, *, ties: Ties = "average") -> Tensor:
    """A_i = 2 (wins_i - losses_i) / (G_valid - 1): the rank within the group, from +2 (best) to -2 (worst).

    GOPO, arXiv 2602.03876: ``A_i = 2 - (rank_i - 1) 4 / (G - 1)``, written through comparisons
    (wins_i = #{j: r_i > r_j}, losses_i = #{j: r_i < r_j}), which says the same without ties.

    Args:
        rewards_PG: any real dtype; compared as they come, never rounded.
        ties: ``average``: equal rewards share one advantage. ``arbitrary``: a double argsort as in the
            authors' code, the earlier completion ranks higher (theirs, not being stable, may order them
            otherwise); noise at full strength, for reproducing that code only.

    >>> ordinal(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    tensor([[ 1.3333,  1.3333, -1.3333, -1.3333]])
    """
    _check_groups(rewards_PG)
    _check_choice("ties", ties, typing.get_args(Ties))
    valid_PG = valid(rewards_PG)
    num_valid_P1 = valid_PG.sum(-1, keepdim=True)
    if ties == "average":
        margin_PG = _margin(rewards_PG)
    else:
        key_PG = rewards_PG if rewards_PG.is_floating_point() else rewards_PG.double()
        best_first_PG = torch.argsort(-key_PG, dim=-1, stable=True)  # NaN sorts last
        margin_PG = num_valid_P1 - 1 - 2 * torch.argsort(best_first_PG, dim=-1)
    return _scaled(2 * margin_PG, num_valid_P1 - 1, valid_PG)


def ordinal_from_wins(wins_PGG: Tensor) -> Tensor:
    """A_i = 2 sum_{j asked} (W_ij - W_ji) / #asked_i: the Copeland score of a group without scalar rewards.

    ``W_ij`` in [0, 1] says how surely i beats j (1/2 is a tie, NaN is not asked or abstained); the diagonal
    is not read. A pair answered in one direction only is completed by ``W_ji = 1 - W_ij``; one answered in
    both is averaged over the two, which cancels a judge's preference for a position. A completion compared
    with nobody gets 0 and ``valid_from_wins`` is False there. With unequal #asked a group need not sum to 0.
    Equals ``ordinal`` where W comes from rewards.
    """
    if wins_PGG.dim() != 3 or wins_PGG.shape[1] != wins_PGG.shape[2]:
        raise ValueError(f"wins have shape {tuple(wins_PGG.shape)}; a comparison matrix is [P, G, G]. Reshape it.")
    _check_groups(wins_PGG[..., 0])
    asked_PGG = _asked(wins_PGG)
    outside = (wins_PGG < 0) | (wins_PGG > 1)
    if bool((outside & asked_PGG).any()):
        worst = wins_PGG[outside & asked_PGG][0].item()
        raise ValueError(f"a comparison is {worst}; it must lie in [0, 1], or be NaN where nothing was asked.")
    margin_PGG = torch.where(asked_PGG, 2 * preferences(wins_PGG) - 1, 0.0)
    return _scaled(2 * margin_PGG.sum(-1), asked_PGG.sum(-1), asked_PGG.any(-1))


def preferences(wins_PGG: Tensor) -> Tensor:
    """float64 [P, G, G], antisymmetric around 1/2: (W_ij + 1 - W_ji) / 2, or what the one answer of a pair implies.

    NaN where nothing was asked and on the diagonal. The mean of row i is its share of wins, (A_i + 2) / 4.
    """
    wins_PGG = wins_PGG.double()
    wins_PGG = torch.where(wins_PGG.isnan(), 1 - wins_PGG.mT, wins_PGG)
    return torch.where(_asked(wins_PGG), (wins_PGG + 1 - wins_PGG.mT) / 2, torch.nan)


def without_noise(values: Tensor) -> Tensor:
    """float64 ``values`` of size around 1, to 2**-40 (1e-12): what differs by the order of its sum only is equal.

    2 - 2/3 and 2/3 + 2/3 differ in the last bit, and completions that tie would be ranked.
    """
    return (values * 2.0**40).round() / 2.0**40


def grpo(rewards_PG: Tensor) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-4) within the group, unbiased std (GRPO, arXiv 2402.03300, sec. 4.1)."""
    return standardised(rewards_PG).float()


def standardised(rewards_PG: Tensor) -> Tensor:
    """``grpo`` in float64."""
    centred_PG, valid_PG = _centred(rewards_PG)
    variance_P1 = (centred_PG**2).sum(-1, keepdim=True) / (valid_PG.sum(-1, keepdim=True) - 1).clamp(min=1)
    return centred_PG / (variance_P1.sqrt() + _STD_EPSILON)


def dr_grpo(rewards_PG: Tensor) -> Tensor:
    """A_i = r_i - mean of the group (Dr. GRPO, arXiv 2503.20783, sec. 3.2)."""
    return _centred(rewards_PG)[0].float()


def rloo(rewards_PG: Tensor) -> Tensor:
    """A_i = r_i - mean of the others of the group (RLOO, arXiv 2402.14740, eq. 9)."""
    rewards_PG, valid_PG, num_valid_P1 = _magnitudes(rewards_PG)
    margin_PG = num_valid_P1 * rewards_PG - rewards_PG.sum(-1, keepdim=True)
    return _scaled(torch.where(_is_constant(rewards_PG, valid_PG), 0.0, margin_PG), num_valid_P1 - 1, valid_PG)


def batch(rewards_PG: Tensor, *, all_reduce: Callable[[Tensor], Tensor] = lambda moments: moments) -> Tensor:
    """A_i = (r_i - group mean) / (std of all rewards of the step + 1e-4), unbiased std.

    The baseline and the scale of REINFORCE++-baseline (arXiv 2501.03262) and Lite PPO (arXiv 2508.08221).

    Args:
        rewards_PG: the rewards of this rank.
        all_reduce: the sum of a float64 tensor over the ranks; called exactly twice on every rank, whatever
            the rewards. The default is one process.

    Raises:
        ValueError: an infinite reward, of any rank: on all ranks.
    """
    _check_groups(rewards_PG)
    valid_PG = valid(rewards_PG)
    rewards_PG = torch.where(valid_PG, rewards_PG.double(), 0.0)
    count, total = all_reduce(torch.stack([valid_PG.sum().double(), rewards_PG.sum()]))
    deviations_PG = torch.where(valid_PG, rewards_PG - total / count.clamp(min=1), 0.0)
    variance = all_reduce((deviations_PG**2).sum()) / (count - 1).clamp(min=1)
    centred_PG, _ = _centred(
        torch.where(valid_PG, rewards_PG, torch.nan)
    )  # raises, now that nobody waits for this rank
    if not bool(total.isfinite()):
        raise ValueError("the rewards of another rank hold an infinity, which has no magnitude to average.")
    return (centred_PG / (variance.sqrt() + _STD_EPSILON)).float()


_BY_NAME: dict[str, Callable[..., Tensor]] = {
    "ordinal": ordinal,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "batch": batch,
}


def get(name: str, *, all_reduce: Callable[[Tensor], Tensor] | None = None, **options: Any) -> Advantage:
    """The advantage ``name`` with ``options`` bound: ``rewards_PG -> advantages_PG``.

    Args:
        name: one of ordinal, grpo, dr_grpo, rloo, batch, or the dotted path of a function of ``rewards_PG``.
        all_reduce: the sum over ranks, handed to a function whose signature asks for it (``batch``); the
            others need no collective.
        options: keyword arguments of the function, checked by its signature.

    Raises:
        ValueError: an unknown name, an unknown option, a missing one, or a value that its Literal does not
            list.
    """
    function = _BY_NAME.get(name) or _import(name)
    parameters = dict(list(inspect.signature(function).parameters.items())[1:])
    if "all_reduce" in parameters and all_reduce is not None:
        options["all_reduce"] = all_reduce
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if unknown := [] if takes_any else sorted(set(options) - set(parameters)):
        known = sorted(set(parameters) - {"all_reduce"}) or "none"
        raise ValueError(f"advantage '{name}' has no option {unknown}; its options are {known}. Remove or rename it.")
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    if missing := sorted(required - set(options)):
        raise ValueError(f"advantage '{name}' needs the options {missing}, which are not given. Add them.")
    hints = typing.get_type_hints(function)
    for option, value in options.items():
        if typing.get_origin(hints.get(option)) is Literal:
            _check_choice(option, value, typing.get_args(hints[option]))
    return functools.partial(_checked, functools.partial(function, **options), name)


def _checked(function: Advantage, name: str, rewards_PG: Tensor) -> Tensor:
    """``function(rewards_PG)``; ValueError unless that is a number for each completion."""
    advantages_PG = function(rewards_PG)
    is_tensor = isinstance(advantages_PG, Tensor)
    got = f"{advantages_PG.dtype} {tuple(advantages_PG.shape)}" if is_tensor else type(advantages_PG).__name__
    is_real = is_tensor and not advantages_PG.is_complex() and advantages_PG.dtype != torch.bool
    if not is_real or advantages_PG.shape != rewards_PG.shape:
        raise ValueError(
            f"advantage '{name}' returned {got} for rewards of shape {tuple(rewards_PG.shape)} [prompts, completions]; "
            "it must return a tensor of real numbers of the same shape. Its signature is "
            f"{name.rpartition('.')[2]}(rewards_PG: Tensor, **options) -> Tensor."
        )
    return advantages_PG


def _import(path: str) -> Callable[..., Tensor]:
    """The function at a dotted path."""
    module_name, _, attribute = path.rpartition(".")
    remedy = f"Use one of {sorted(_BY_NAME)} or the dotted path of a function of rewards_PG."
    if not module_name:
        raise ValueError(f"unknown advantage '{path}'. {remedy}")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"advantage '{path}' cannot be imported: {error}. {remedy}") from error
    if not callable(function):
        raise ValueError(f"advantage '{path}' is a {type(function).__name__}, not a function. {remedy}")
    return function


def _check_choice(option: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option}={value!r} is unknown; choose one of {list(choices)}.")


def _check_groups(rewards_PG: Tensor) -> None:
    if rewards_PG.dim() != 2:
        raise ValueError(f"rewards have shape {tuple(rewards_PG.shape)}; they must be [prompts, completions].")
    if rewards_PG.shape[1] < 2:
        raise ValueError(
            f"a group has {rewards_PG.shape[1]} completion(s); an advantage compares completions of one "
            "prompt, so it needs at least 2. Raise the number of completions per prompt."
        )


def _margin(rewards_PG: Tensor) -> Tensor:
    """int64 wins_i - losses_i; NaN neither wins nor loses, for it compares False."""
    mine_PG1, other_P1G = rewards_PG.unsqueeze(-1), rewards_PG.unsqueeze(-2)
    return (mine_PG1 > other_P1G).sum(-1) - (mine_PG1 < other_P1G).sum(-1)


def _asked(wins_PGG: Tensor) -> Tensor:
    """bool [P, G, G], symmetric: i and j were compared, in at least one order."""
    answered_PGG = ~wins_PGG.isnan()
    self_GG = torch.eye(wins_PGG.shape[-1], dtype=torch.bool, device=wins_PGG.device)
    return (answered_PGG | answered_PGG.mT) & ~self_GG


def _magnitudes(rewards_PG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 rewards with NaN as 0, ``valid_PG``, and the number of valid ones per group [P, 1]."""
    _check_groups(rewards_PG)
    if bool(torch.isinf(rewards_PG).any()):
        row = int(torch.isinf(rewards_PG).any(-1).nonzero()[0])
        raise ValueError(
            f"the rewards of prompt {row} of the batch hold an infinity, which has no magnitude to average. "
            "Use the ordinal advantage, clip the reward, or return NaN for 'no valid score'."
        )
    valid_PG = valid(rewards_PG)
    return torch.where(valid_PG, rewards_PG.double(), 0.0), valid_PG, valid_PG.sum(-1, keepdim=True)


def _is_constant(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """bool [P, 1]: all valid rewards of the group are equal, or none is valid."""
    lowest_P1 = torch.where(valid_PG, rewards_PG, torch.inf).amin(-1, keepdim=True)
    highest_P1 = torch.where(valid_PG, rewards_PG, -torch.inf).amax(-1, keepdim=True)
    return lowest_P1 >= highest_P1


def _centred(rewards_PG: Tensor) -> tuple[Tensor, Tensor]:
    """float64 r_i - mean of the group, exactly 0 where the group is constant and where there is no score."""
    rewards_PG, valid_PG, num_valid_P1 = _magnitudes(rewards_PG)
    mean_P1 = rewards_PG.sum(-1, keepdim=True) / num_valid_P1.clamp(min=1)
    kept_PG = valid_PG & ~_is_constant(rewards_PG, valid_PG)
    return torch.where(kept_PG, rewards_PG - mean_P1, 0.0), valid_PG


def _scaled(numerator_PG: Tensor, denominator: Tensor, valid_PG: Tensor) -> Tensor:
    """float32 numerator / denominator on valid entries, 0 elsewhere and where nothing was compared."""
    ratio_PG = numerator_PG.double() / denominator.clamp(min=1)
    return torch.where(valid_PG & (denominator > 0), ratio_PG, 0.0).float()
