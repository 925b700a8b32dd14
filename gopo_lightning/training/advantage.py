"""The advantage that a config names, and what it needs of the run: the sum over ranks, and τ of the reward model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from gopo_lightning.distributed.collectives import all_or_none, all_reduce_sum, gather_objects
from gopo_lightning.objectives import advantages
from gopo_lightning.objectives.named import Named
from gopo_lightning.rewards import RewardSource, Source, reads_wins

_REMEDY = "Set objective.advantage: {function: …, init_args: {tau: …}}, in units of the reward that is ranked."


class Advantage:
    """rewards_PG → advantages_PG, or wins_PGG → advantages_PG where ``from_wins``.

    An advantage that cannot do without ``tau``, and was given none, gets the one that was fitted for the reward model,
    if that alone is the reward: a fitted τ belongs to the scale of one model.

    Args:
        name: of ours, or a dotted path.
        options: keyword arguments of it.
        sources: of the reward.
        combine: name of what combines them.
        combine_options: keyword arguments of that.

    Raises:
        ValueError: as `get_advantage`; or τ is needed, and the reward is not one source's score as it is.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None,
        sources: Sequence[Source],
        combine: str,
        combine_options: Mapping[str, Any] | None,
    ) -> None:
        self._name, self._tau = name, math.nan
        self._fitted: RewardSource | None = None
        self.from_wins = reads_wins(sources, name, options, combine, combine_options)
        """Whether it reads the comparison matrices of the only source."""
        options = options or {}
        if "tau" in advantages.KIND.missing(name, options):
            self._fitted = _sole(name, sources, combine, combine_options)
        late = {} if self._fitted is None else {"tau": lambda: self._tau}
        of_rewards = advantages.get_advantage(name, all_reduce=all_reduce_sum, late=late, **options)
        self._function: Named = advantages.ordinal_from_wins if self.from_wins else of_rewards

    def set_up(self) -> None:
        """Once the sources are set up: τ, if it is needed, the same on all ranks. A collective.

        Raises:
            ValueError: the source has none.
        """
        if self._fitted is None:
            return
        with all_or_none("reading the fitted tau"):
            tau = self._fitted.fitted_tau()
            if tau is None:
                raise ValueError(
                    f"advantage '{self._name}' needs tau, and none was fitted for reward source '{self._fitted.name}': "
                    f"reward-model training with held-out pairs leaves it in the exported folder. {_REMEDY}"
                )
        self._tau = gather_objects(tau)[0]
        rank_zero_info(f"advantage {self._name}: tau={self._tau:.4g}, fitted for {self._fitted.name}")

    def __call__(self, judged: Tensor) -> Tensor:
        """advantages_PG of rewards_PG, or of wins_PGG."""
        return self._function(judged)


def _sole(name: str, sources: Sequence[Source], combine: str, options: Mapping[str, Any] | None) -> RewardSource:
    """The source whose score is the reward as it is; ValueError where there is none."""
    if len(sources) == 1 and isinstance(sources[0], RewardSource) and combine == "weighted_sum" and not options:
        return sources[0]
    raise ValueError(
        f"advantage '{name}' needs tau. A fitted one belongs to the scale of one reward model, and is used where a "
        "single SequenceClassifierReward is the reward, neither combined nor weighted; here the reward is "
        f"{combine} of {[source.name for source in sources]}. {_REMEDY}"
    )
