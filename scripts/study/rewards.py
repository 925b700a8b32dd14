"""The rewards of the study: one learned score in different shapes, and the judge. See `configs/study/reward/*.yaml`.

A score s of the proxy becomes z = (s − mean) / scale, less CUT_OFF if the completion was cut off, and then the shape
acts on z. `exp`, `sigmoid` and `cubed` are strictly increasing, so that the order within a group stays as it is. Noise
is a function of (seed, prompt, completion): a text always gets the same.
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gopo_lightning.rewards import RewardSource, SequenceClassifierReward, combine
from gopo_lightning.rollout.engines.precision import cpu_computes_bfloat16
from gopo_lightning.types import Completion, Prompt

CUT_OFF = 3.0
"""Standard deviations that a completion loses when it does not end by itself."""
_NORMAL = statistics.NormalDist()


def first(rewards_PGK: Tensor) -> Tensor:
    """The first source is the reward; the judge beside it only looks on."""
    return rewards_PGK[..., 0]


def first_then_second(rewards_PGK: Tensor) -> Tensor:
    """The second source breaks the ties of the first; the judge, the third, only looks on."""
    return combine.lexicographic(rewards_PGK[..., :2])


class FullText(RewardSource):
    """A classifier that reads prompt and completion as one sentence of words, in bfloat16 where the CPU computes it.

    Args:
        model: folder of the sequence classifier.
        name: in logs.
    """

    reads_endings = True

    def __init__(self, model: str, name: str) -> None:
        dtype: Literal["bfloat16", "float32"] = "bfloat16" if cpu_computes_bfloat16() else "float32"
        self.classifier = SequenceClassifierReward(model, include_prompt=False, dtype=dtype, name=name)
        self.name = name

    def setup(self, device: torch.device) -> None:
        """Load the classifier."""
        self.classifier.setup(device)

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """float64 [N]."""
        texts = [f"{prompt.text} {completion}" for prompt, completion in zip(prompts, completions, strict=True)]
        return torch.as_tensor(self.classifier(prompts, texts)).double()


class Judge(FullText):
    """The score of the judge on held-out prompts (their rows have a column `held_out`), and 0 on those of training."""

    def __init__(self, model: str, name: str = "judge") -> None:
        super().__init__(model, name)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """float64 [N]."""
        asked = [n for n, prompt in enumerate(prompts) if "held_out" in prompt.columns]
        scores_N = torch.zeros(len(prompts), dtype=torch.float64)
        if asked:
            scores_N[asked] = self.scores([prompts[n] for n in asked], [completions[n] for n in asked])
        return scores_N


class Proxy(FullText):
    """The proxy's score in a shape.

    Args:
        model: folder of the sequence classifier.
        shape: a name in ``SHAPES``.
        mean: of the scores of the untrained policy.
        scale: their standard deviation within a group.
        seed: of the noise.
        name: in logs.
    """

    def __init__(self, model: str, shape: str, mean: float, scale: float, seed: int = 0, name: str = "proxy") -> None:
        super().__init__(model, name)
        if shape not in SHAPES:
            raise ValueError(f"shape={shape!r} is unknown; choose one of {sorted(SHAPES)}.")
        self.shape, self.mean, self.scale, self.seed = SHAPES[shape], mean, scale, seed

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """N scores."""
        cut_N = [CUT_OFF * (isinstance(text, Completion) and text.truncated) for text in completions]
        scores_N = self.scores(prompts, completions).tolist()
        return [
            self.shape((s - self.mean) / self.scale - cut, Noise(self.seed, prompt.text, str(text)))
            for s, cut, prompt, text in zip(scores_N, cut_N, prompts, completions, strict=True)
        ]


class Noise:
    """Uniform draws in (0, 1) for a completion, and for its prompt."""

    def __init__(self, seed: int, prompt: str, completion: str) -> None:
        self._of = {"prompt": (seed, prompt), "completion": (seed, prompt, completion)}

    def uniform(self, number: int, of: str = "completion") -> float:
        """Draw ``number`` of the completion, or of its prompt."""
        digest = hashlib.sha256(repr((number, *self._of[of])).encode("utf-8", "surrogatepass")).digest()
        return (int.from_bytes(digest[:6], "big") + 0.5) / 2**48


def heavy_tailed(z: float, noise: Noise) -> float:
    """Half of a Student's t with 1.5 degrees of freedom on top; one in twenty is an outlier at −8 or 8."""
    if (u := noise.uniform(0)) < 0.05:
        return -8.0 if u < 0.025 else 8.0
    return z + 0.5 * _student_1_5(noise.uniform(1), noise.uniform(2))


def _student_1_5(u: float, v: float) -> float:
    """Bailey's polar form: √(ν (u^(−2/ν) − 1)) cos 2πv has a t distribution with ν degrees of freedom."""
    return math.sqrt(1.5 * (u ** (-2 / 1.5) - 1)) * math.cos(2 * math.pi * v)


def of_prompt(z: float, noise: Noise) -> float:
    """Scale and offset are the prompt's own: log-normal (σ 1) and normal (σ 3)."""
    scale = math.exp(_NORMAL.inv_cdf(noise.uniform(0, "prompt")))
    return scale * z + 3 * _NORMAL.inv_cdf(noise.uniform(1, "prompt"))


def stars(z: float, noise: Noise) -> float:
    """Whole stars from 1 to 5."""
    return float(min(max(round(3 + z), 1), 5))


SHAPES: dict[str, Callable[[float, Noise], float]] = {
    "clean": lambda z, noise: z,
    "exp": lambda z, noise: math.exp(2 * z),
    "sigmoid": lambda z, noise: 1 / (1 + math.exp(-3 * z)),
    "cubed": lambda z, noise: z**3,
    "heavy_tailed": heavy_tailed,
    "of_prompt": of_prompt,
    "stars": stars,
    "binary": lambda z, noise: float(z > 0.5),
    "one_rater": lambda z, noise: z + 1.5 * _NORMAL.inv_cdf(noise.uniform(0)),
}
"""Shape → (z, noise) → reward."""
WARPS = ("exp", "sigmoid", "cubed")


def check_order(warp: str, z: Sequence[float]) -> None:
    """That a warp keeps unequal scores unequal and in order, in float64.

    Raises:
        ValueError: two scores come together, or change places.
    """
    ordered = sorted(set(z))
    warped = [SHAPES[warp](value, Noise(0, "", "")) for value in ordered]
    for low, high, before, after in zip(ordered, ordered[1:], warped, warped[1:], strict=False):
        if not before < after:
            raise ValueError(f"{warp} takes {low!r} and {high!r} to {before!r} and {after!r}; it must be increasing")


__all__ = ["SHAPES", "WARPS", "Judge", "Proxy", "check_order", "first", "first_then_second"]
