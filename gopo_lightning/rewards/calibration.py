"""What a reward model's differences are worth to people: τ, fitted after its training and kept beside its weights.

It has a file of its own. In config.json, which transformers hands on, a copy that is trained further would keep the τ
of the weights that it began with.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor
from torch.nn import functional as F

from gopo_lightning.objectives.calibration import fit_tau
from gopo_lightning.policy.loading import locate

FILE = "calibration.json"
MIN_PAIRS = 100
"""With so many the standard error of log τ is 0.2 at best (0.26 where scores and people agree on 2 pairs of 3)."""


@dataclass(frozen=True)
class Calibration:
    """People prefer i to j with probability σ((s_i − s_j) / τ), as well as one number can say."""

    tau: float
    """In units of the score."""
    log_loss: float
    """Of these probabilities on the pairs, in nats a pair."""
    num_pairs: int

    def write(self, folder: Path) -> None:
        """Into ``folder``, beside the weights that it was fitted for."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def calibrate(differences_Q: Tensor, preferences_Q: Tensor) -> Calibration | str:
    """Fitted to Q held-out pairs (see `fit_tau`), or why that is not possible."""
    if len(differences_Q) < MIN_PAIRS:
        return f"there are {len(differences_Q)} held-out pairs, and it takes {MIN_PAIRS}"
    tau = fit_tau(differences_Q, preferences_Q)
    if tau is None:
        return "the scores order all held-out pairs as people do, or no better than at random"
    loss = F.binary_cross_entropy_with_logits(differences_Q.double() / tau, preferences_Q.double())
    return Calibration(tau, loss.item(), len(differences_Q))


def read_tau(name: str, revision: str | None) -> float | None:
    """τ of the reward model ``name`` (folder, `packaged:NAME` or hub); None where none was kept.

    Raises:
        ValueError: the file is there and holds no τ.
    """
    place = Path(locate(name))
    try:
        path = place / FILE if place.is_dir() else Path(hf_hub_download(str(place), FILE, revision=revision))
        content = path.read_text(encoding="utf-8")
    except (EntryNotFoundError, FileNotFoundError):
        return None
    try:
        tau = float(json.loads(content)["tau"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no number `tau`: {error!r}. Export the reward model again.") from error
    if not 0 < tau < math.inf:
        raise ValueError(f"{path} says tau={tau}; it must be a finite number above 0. Export the reward model again.")
    return tau
