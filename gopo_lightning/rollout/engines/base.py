"""What a rollout engine is: it turns prompts into completions, each from its own random stream."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.gathering import compute_device
from gopo_lightning.types import Completion, Completions, PromptBatch

SamplingDtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn: temperature, then top-k, top-p and min-p, in this order."""

    temperature: float = 1.0
    """Divides the logits. 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach this sum. 1 keeps all."""
    top_k: int = 0
    """Keep this many of the most likely tokens. 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one. 0 keeps all."""
    max_new_tokens: int = 128
    """Most tokens of a completion, its EOS included."""
    min_new_tokens: int = 0
    """So many tokens come before an EOS, and before a token that completes a stop string and so ends a completion."""
    stop_strings: tuple[str, ...] | str = ()
    """A completion ends with the token that completes any of these; they stay in its text. What is complete within the
    first min_new_tokens ends nothing. A text alone is one stop string."""

    def __post_init__(self) -> None:
        stops = self.stop_strings  # YAML and the command line give lists
        object.__setattr__(self, "stop_strings", (stops,) if isinstance(stops, str) else tuple(stops))
        rules = {
            "temperature": (0 <= self.temperature < math.inf, ">= 0; 0 is greedy, 1 samples from the model as it is"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]; 1 keeps every token"),
            "top_k": (self.top_k >= 0, ">= 0; 0 keeps every token"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]; 0 keeps every token"),
            "max_new_tokens": (self.max_new_tokens >= 1, ">= 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "in [0, max_new_tokens]"),
            "stop_strings": (
                all(isinstance(stop, str) and stop for stop in self.stop_strings),
                "non-empty strings; leave the list empty for none",
            ),
        }
        for name, (ok, rule) in rules.items():
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it must be {rule}.")

    @property
    def filters(self) -> bool:
        """True if tokens are cut away, so that the sampler is not exactly the policy."""
        return self.temperature == 0 or self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions; a class of this shape is named in YAML as ``engine``."""

    def generate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        *,
        seeds_N: list[int],
        eos_token_ids: Sequence[int],
    ) -> Completions:
        """N = P * ``num_completions`` completions; completion n is of prompt n // G and draws from ``seeds_N[n]``.

        The model's mode (train or eval) is as before when this returns, and its weights are untouched.
        """
        ...


@runtime_checkable
class ChecksSampling(Protocol):
    """An engine that cannot sample in every way, and says so before a run begins."""

    def check_sampling(self, sampling: SamplingConfig, *, logprobs: bool) -> None:
        """ValueError for what it cannot do; ``logprobs``: the loss reads the sampler's log-probs."""
        ...


@runtime_checkable
class HasSampler(Protocol):
    """An engine whose completions are not the policy's: another one samples where the policy is evaluated."""

    @property
    def sampler(self) -> RolloutEngine:
        """Of evaluations."""
        ...


OnGroup: TypeAlias = Callable[[int, Sequence[Completion]], None]
"""Is called with the number of a prompt and its completions, which have all ended."""


@runtime_checkable
class TellsOfGroups(Protocol):
    """An engine that can say, while it samples others, that all completions of a prompt have ended."""

    on_group: OnGroup | None
    """Called in the thread that samples; None for nobody."""


class Begun(NamedTuple):
    """A rollout that is being sampled elsewhere."""

    completions: Callable[[], Completions]
    """Waits for them. A collective, the first time."""
    cancel: Callable[[], None]
    """Ends it, of this rank."""


class SamplesAhead(RolloutEngine):
    """An engine that samples elsewhere, while the policy may be trained here: a subclass says how that begins."""

    def generate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        *,
        seeds_N: list[int],
        eos_token_ids: Sequence[int],
    ) -> Completions:
        """See :class:`RolloutEngine`."""
        given = model, tokenizer, prompts, num_completions, sampling
        return self.begin(*given, seeds_N=seeds_N, eos_token_ids=eos_token_ids).completions()

    @abstractmethod
    def begin(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        *,
        seeds_N: list[int],
        eos_token_ids: Sequence[int],
    ) -> Begun:
        """What ``generate`` would return now, later: meanwhile ``model`` may change, and others may be asked for.

        A collective.
        """


@runtime_checkable
class HasMetrics(Protocol):
    """An engine with something to say of each rollout."""

    def metrics(self) -> dict[str, float]:
        """Of the last rollout, the same on every rank; curves `rollout/<name>`."""
        ...


@runtime_checkable
class HasState(Protocol):
    """An engine whose state belongs into the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        ...


class WithSampler(RolloutEngine):
    """An engine with a `sampler`, whose state is its own."""

    @property
    @abstractmethod
    def sampler(self) -> RolloutEngine:
        """Of evaluations."""

    def check_sampling(self, sampling: SamplingConfig, *, logprobs: bool) -> None:
        """What the sampler cannot do."""
        if isinstance(self.sampler, ChecksSampling):
            self.sampler.check_sampling(sampling, logprobs=logprobs)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's."""
        return self.sampler.state_dict() if isinstance(self.sampler, HasState) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        if isinstance(self.sampler, HasState):
            self.sampler.load_state_dict(state)


def ended(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[int]], truncated: Sequence[bool]
) -> list[Completion]:
    """Completions of these tokens, as `Completions.groups` has them when the rollout has ended."""
    texts = tokenizer.batch_decode([list(row) for row in tokens], skip_special_tokens=True)
    lengths = map(len, tokens)
    return [Completion(t, truncated=cut, num_tokens=n) for t, cut, n in zip(texts, truncated, lengths, strict=True)]


def sampling_dtype(option: SamplingDtype, model: nn.Module) -> torch.dtype:
    """``auto`` is the type of the autocast around, or else that of the weights."""
    if option != "auto":
        return getattr(torch, option)
    device = compute_device(model).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else next(model.parameters()).dtype


def check_dtype(option: str) -> None:
    """ValueError for a type that no engine samples in."""
    if option not in get_args(SamplingDtype):
        raise ValueError(f"dtype is {option!r}, but it must be auto, float32, bfloat16 or float16.")


def check_drawn(logprobs_NT: Tensor, prompts: PromptBatch) -> None:
    """RuntimeError where a token (0 beyond a completion's end) was drawn from what is no distribution."""
    broken = (~logprobs_NT.isfinite()).nonzero()
    if len(broken):
        n, t = broken[0].tolist()
        index = prompts.prompts[n * len(prompts) // len(logprobs_NT)].index
        raise RuntimeError(
            f"token {t + 1} of a completion of the prompt in row {index} cannot be drawn: the policy's logits are NaN "
            "or infinite there, or leave no token but an EOS before min_new_tokens. Weights that have diverged want "
            "an earlier checkpoint and a lower learning rate; if only half precision overflows, sample in float32 "
            "(the engine's dtype)."
        )


def padding_token(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]) -> int:
    """What fills rows of tokens up: the tokenizer's, or an EOS. Masks tell it apart."""
    pad = tokenizer.pad_token_id
    return int(eos_token_ids[0]) if pad is None else int(pad)
