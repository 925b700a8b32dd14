"""Credit: from one advantage a completion to one a token. All pure.

A credit is a function `Experience → advantages_NT`, float32 [N, T], or None where each token has the advantage of its
completion. It is named in YAML by a name below, or by the dotted path of your own function.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gopo_lightning.objectives.estimators import clean
from gopo_lightning.objectives.named import check_choice, load_callable
from gopo_lightning.types import Experience

Credit = Callable[[Experience], Tensor | None]
Prior = Literal["uniform", "linear", "base"]


def broadcast(experience: Experience) -> None:
    """Every token has the advantage of its completion, as in GRPO and GOPO."""


def reward_to_go(experience: Experience, *, gamma: float = 1.0) -> Tensor:
    """A_nt = A_n + Σ_{u ≥ t} γ^(u−t) x_nu − the mean of that over the group, x the rewards of single tokens.

    What a token earns counts for it and for those before it. The baseline at t is the mean over the completions of the
    group that have a reward, whatever their weights, and still run at t, so it needs no critic; where one is left alone
    it earns 0 there.

    Raises:
        ValueError: nothing gave token rewards, or γ is not in [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} of reward_to_go must lie in [0, 1].")
    if experience.token_rewards_NT is None:
        raise ValueError(
            "credit=reward_to_go reads rewards of single tokens, which nothing gives here. Add a transform that does, "
            "such as KLInReward with per: token, or use credit: broadcast."
        )
    mask_NT = experience.completions.mask_NT
    mask_NT = mask_NT & ~experience.rewards_PG.isnan().flatten().to(mask_NT.device)[:, None]
    returns_NT = discounted(clean(experience.token_rewards_NT, mask_NT).double(), gamma)
    mask_PGT = mask_NT.unflatten(0, (-1, experience.group_size))
    returns_PGT = returns_NT.unflatten(0, (-1, experience.group_size))
    mean_P1T = returns_PGT.sum(1, keepdim=True) / mask_PGT.sum(1, keepdim=True).clamp(min=1)
    centred_NT = (returns_PGT - mean_P1T).flatten(0, 1)
    return clean(experience.advantages_PG.flatten()[:, None] + centred_NT, mask_NT).float()


def brpo(experience: Experience, *, num_cuts: int, prior: Prior = "uniform") -> Tensor:
    """BRPO's advantage of each segment of a completion, from scores at S budgets: AnytimeReasoner (arXiv 2505.13438).

    x_s is the score of the first b_s tokens: the sum of the token rewards up to there, as `PrefixScores` gives them.
    With p the prior of budgets, a token between b_s and b_(s+1), s = 0 … S − 1, has

        A = R_s − (s · V1 + (S − s) · V2) / S,    R_s = Σ_{q > s} p_q x_q

    where V2 is the mean of R_s over the completions of the group that have a reward, and V1 the mean of x_1 … x_s with
    weights 1, 2, 4, … times Σ_{q > s} p_q. So neither baseline reads the segment itself but through the group's mean.
    One budget gives `dr_grpo` of the score. ``objective.advantage`` is not read.

    Args:
        experience: with token rewards.
        num_cuts: S, as the transform has it.
        prior: ``uniform``; ``linear``, p_s in proportion to b_s; ``base``, all on the last, the whole completion.

    Raises:
        ValueError: nothing gave token rewards, or S budgets do not fit into ``max_new_tokens``.
    """
    if experience.token_rewards_NT is None:
        raise ValueError(
            "credit=brpo reads scores of prefixes, which nothing gives here. Add the transform PrefixScores, or use "
            "credit: broadcast."
        )
    check_choice("prior", prior, get_args(Prior))
    mask_NT = experience.completions.mask_NT
    valid_N = ~experience.rewards_PG.isnan().flatten().to(mask_NT.device)
    mask_NT = mask_NT & valid_N[:, None]
    budgets_S = torch.tensor(budgets(num_cuts, experience.max_new_tokens), device=mask_NT.device)
    gained_NT = clean(experience.token_rewards_NT, mask_NT).double().cumsum(-1)
    scores_NS = gained_NT[:, budgets_S.clamp(max=mask_NT.shape[1]) - 1]
    priors = {"uniform": torch.ones_like(budgets_S), "linear": budgets_S, "base": budgets_S == budgets_S[-1]}
    p_S = priors[prior].double() / priors[prior].sum()
    later_S = _to_go(p_S)
    to_go_NS = _to_go(p_S * scores_NS)
    weights_S = 2.0 ** torch.arange(num_cuts, device=p_S.device, dtype=torch.float64)
    mean_NS = (weights_S * scores_NS).cumsum(-1) / weights_S.cumsum(-1)
    own_NS = torch.nn.functional.pad(mean_NS[:, :-1], (1, 0)) * later_S
    total_P1S = to_go_NS.unflatten(0, (-1, experience.group_size)).sum(1, keepdim=True)
    num_P11 = valid_N.view(-1, experience.group_size, 1).sum(1, keepdim=True).clamp(min=1)
    group_NS = (total_P1S / num_P11).expand(-1, experience.group_size, -1).flatten(0, 1)
    share_S = torch.arange(num_cuts, device=p_S.device) / num_cuts
    advantages_NS = to_go_NS - share_S * own_NS - (1 - share_S) * group_NS
    tokens_T = torch.arange(mask_NT.shape[1], device=mask_NT.device)
    return clean(advantages_NS[:, torch.searchsorted(budgets_S, tokens_T, right=True)], mask_NT).float()


def budgets(num_cuts: int, max_new_tokens: int) -> list[int]:
    """b_1 … b_S, equal parts of ``max_new_tokens``, rounded up.

    >>> budgets(4, 10)
    [3, 5, 8, 10]

    Raises:
        ValueError: S is below 1, or above the number of tokens.
    """
    if not 1 <= num_cuts <= max_new_tokens:
        raise ValueError(f"num_cuts={num_cuts} must lie between 1 and max_new_tokens={max_new_tokens}. Try 4.")
    return [-(-(s + 1) * max_new_tokens // num_cuts) for s in range(num_cuts)]


def _to_go(values: Tensor) -> Tensor:
    """Sums from each on, along the last dimension."""
    return values.flip(-1).cumsum(-1).flip(-1)


def discounted(rewards_NT: Tensor, gamma: float) -> Tensor:
    """Σ_{u ≥ t} γ^(u−t) x_nu at every t, from the back.

    >>> discounted(torch.tensor([[1.0, 2.0, 4.0]]), 0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """
    columns: list[Tensor] = []
    after_N = torch.zeros_like(rewards_NT[:, 0])
    for rewards_N in reversed(rewards_NT.unbind(-1)):
        after_N = rewards_N + gamma * after_N
        columns.append(after_N)
    return torch.stack(columns[::-1], -1)


_BY_NAME: dict[str, Callable[..., Tensor | None]] = {"broadcast": broadcast, "brpo": brpo, "reward_to_go": reward_to_go}


def get_credit(name: str, /, **options: Any) -> Credit:
    """The credit ``name`` (one of the above, or a dotted path) with ``options`` bound.

    Raises:
        ValueError: there is none of this name, or it does not take these options.
    """
    if name not in _BY_NAME and "." not in name:
        raise ValueError(f"unknown credit '{name}'. Use one of {sorted(_BY_NAME)} or the dotted path of a function.")
    function = _BY_NAME.get(name) or load_callable(name)
    try:
        inspect.signature(function).bind(None, **options)
    except TypeError as error:
        raise ValueError(
            f"credit '{name}' with init_args {options}: {error}. Its signature is {name.rpartition('.')[2]}("
            "experience: Experience, **options) -> Tensor [N, T]; options without a default stand in its init_args."
        ) from error
    return functools.partial(function, **options)
