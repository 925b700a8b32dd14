"""The ordinal advantage in verl's registry: importing this module registers ``algorithm.adv_estimator=gopo``.

It needs nothing of this package but its maths, that is torch, and can be imported where the other dependencies are of
other versions or missing.
"""

from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from gopo_lightning.objectives.advantages import ordinal_by_label


@register_adv_est("gopo")
def gopo(token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None) -> tuple[Tensor, Tensor]:
    """A_i = 2 (wins_i − losses_i) / (G_valid − 1) among the responses with the same ``index`` (GOPO, 2602.03876).

    A response with a NaN among its rewards has no valid score: it leaves the comparison and gets 0.

    Args:
        token_level_rewards: [N, T], summed over the tokens of a response, in float64.
        response_mask: [N, T], 1 on the tokens that get the advantage.
        index: verl's ``uid``, N labels, equal for the responses of one prompt; groups may differ in size.
        config: verl's ``algorithm``; nothing of it is read (ranks have no ``norm_adv_by_std_in_grpo``).

    Returns:
        advantages and returns, [N, T], both the same.
    """
    advantages_N = ordinal_by_label(token_level_rewards.double().sum(-1), index.tolist())
    advantages_NT = advantages_N[:, None] * response_mask
    return advantages_NT, advantages_NT
