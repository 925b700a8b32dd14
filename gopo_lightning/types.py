"""What flows between the stages: prompts, completions, rollout, experience.

Shape legend, used as a suffix throughout the package:

    P  prompts (of this rank, or of one micro-batch)
    G  completions of one prompt: a *group*
    N  = P * G completions; completion ``n`` belongs to prompt ``n // G``
    L  prompt tokens, left-padded
    T  completion tokens, right-padded
    V  vocabulary
    K  reward sources

All structs are frozen: a stage reads its input and makes a new output.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor


def _index(value: Any, index: Tensor) -> Any:
    """``value[index]`` along the first dimension, for a tensor, a tuple or None."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    return None if value is None else tuple(value[i] for i in index.tolist())


class TensorStruct:
    """A frozen dataclass of tensors, tuples and nested structs that moves between devices as one."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy with every tensor on ``device``."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, f.name), Tensor | TensorStruct)
        }
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Prompt:
    """One row of the dataset, rendered for the policy.

    >>> Prompt(index=7, token_ids=(1, 5, 9), text="Movie review: A film", columns={"stars": 4})
    Prompt(index=7, token_ids=(1, 5, 9), text='Movie review: A film', messages=None, columns={'stars': 4})
    """

    index: int
    """Row number in the dataset. With the seed and the step it keys the random stream of each completion."""
    token_ids: tuple[int, ...]
    """What the policy reads: the chat template is applied, special tokens are in."""
    text: str
    """The plain prompt, or the content of the last user message."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The conversation, or None for a plain prompt. Reward models render it with their own template."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The dataset's other columns, for reward functions."""
    path: str = field(default="", repr=False)
    """Of the dataset, for error messages."""

    @property
    def place(self) -> str:
        """`row 7 (counted from 0) of prompts.jsonl`."""
        return f"row {self.index} (counted from 0) of {self.path or 'the dataset'}"


@dataclass(frozen=True)
class PromptBatch(TensorStruct):
    """P prompts, left-padded to the longest."""

    prompts: tuple[Prompt, ...]
    tokens_PL: Tensor
    """int64."""
    mask_PL: Tensor
    """bool, True on real tokens."""

    @classmethod
    def collate(cls, prompts: Sequence[Prompt], pad_token_id: int) -> "PromptBatch":
        """Left-pad ``prompts``; raises ValueError on an empty batch or an empty prompt."""
        if not prompts or any(not p.token_ids for p in prompts):
            rows = [p.index for p in prompts if not p.token_ids]
            raise ValueError(f"prompts of rows {rows} have no tokens; a prompt needs at least one. Drop these rows.")
        longest = max(len(p.token_ids) for p in prompts)
        tokens_PL = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64)
        mask_PL = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens_PL[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask_PL[row, longest - len(prompt.token_ids) :] = True
        return cls(tuple(prompts), tokens_PL, mask_PL)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, index_P: Tensor) -> "PromptBatch":
        """The prompts of ``index_P``, without the columns that are padding for all of them."""
        mask_PL = _index(self.mask_PL, index_P)
        first = int(mask_PL.any(0).int().argmax())
        tokens_PL = _index(self.tokens_PL, index_P)[:, first:].contiguous()
        return PromptBatch(_index(self.prompts, index_P), tokens_PL, mask_PL[:, first:].contiguous())


class Completion(str):
    """The text of one completion, as reward sources get it: a string that also knows how it ended.

    >>> cut_off = Completion("a b c", truncated=True, num_tokens=3)
    >>> cut_off == "a b c", cut_off.truncated, cut_off.num_tokens
    (True, True, 3)
    """

    truncated: bool
    """`max_new_tokens` ended it, not EOS or a stop string."""
    num_tokens: int
    """Its tokens, EOS included."""

    def __new__(cls, text: str, *, truncated: bool, num_tokens: int) -> "Completion":
        completion = super().__new__(cls, text)
        completion.truncated, completion.num_tokens = truncated, num_tokens
        return completion

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (str(self),), {"truncated": self.truncated, "num_tokens": self.num_tokens}


@dataclass(frozen=True)
class Completions(TensorStruct):
    """N sampled completions.

    With EOS id 2 and pad id 0, the texts "a b" (ended) and "a b c d" (cut off at 4 tokens) are

        tokens_NT    = [[11, 12,  2,  0], [11, 12, 13, 14]]
        mask_NT      = [[ 1,  1,  1,  0], [ 1,  1,  1,  1]]
        truncated_N  = [False, True]
    """

    tokens_NT: Tensor
    """int64, right-padded."""
    mask_NT: Tensor
    """bool, True up to and including the first EOS (never by ``token != pad``: pad may be EOS)."""
    truncated_N: Tensor
    """bool, True where ``max_new_tokens`` ended the completion, not EOS or a stop string."""
    texts: tuple[str, ...]
    """Decoded without special tokens."""
    sampler_logprobs_NT: Tensor | None = None
    """float32, at the sampling temperature before top-k/top-p/min-p; None if the engine has none."""

    def __len__(self) -> int:
        return self.tokens_NT.shape[0]

    @property
    def lengths_N(self) -> Tensor:
        """Tokens of each completion, EOS included."""
        return self.mask_NT.sum(-1)

    def groups(self, group_size: int) -> list[list[Completion]]:
        """P groups of ``group_size`` completions, as reward sources get them."""
        endings = zip(self.texts, self.truncated_N.tolist(), self.lengths_N.tolist(), strict=True)
        all_N = [Completion(text, truncated=cut, num_tokens=length) for text, cut, length in endings]
        return [all_N[n : n + group_size] for n in range(0, len(all_N), group_size)]

    def select(self, index_N: Tensor) -> "Completions":
        """The completions of ``index_N``, without the columns that are padding for all of them."""
        mask_NT = _index(self.mask_NT, index_N)
        width = max(int(mask_NT.sum(-1).amax()), 1) if len(mask_NT) else 1
        picked = {f.name: _index(getattr(self, f.name), index_N) for f in dataclasses.fields(self)}
        for name in ("tokens_NT", "mask_NT", "sampler_logprobs_NT"):
            if picked[name] is not None:
                picked[name] = picked[name][:, :width].contiguous()
        return Completions(**picked)


@dataclass(frozen=True)
class Rollout(TensorStruct):
    """What this rank sampled from the policy, and how it was scored."""

    prompts: PromptBatch
    completions: Completions
    rewards_PGK: Tensor
    """float64, one column a source; NaN where a source has no valid score. On the device of the tokens, but on MPS,
    which has no float64, on the CPU; so are all rewards and comparisons."""
    rewards_PG: Tensor
    """float64, the sources combined."""
    max_new_tokens: int
    """Most tokens that a completion could have."""
    wins_PGGK: Tensor | None = None
    """float64 comparison matrices of pairwise sources, see `rewards.PairwiseSource`; all NaN in the columns of other
    sources. None without a pairwise source."""
    weights_PG: Tensor | None = None
    """float32 ≥ 0, how much a completion counts in the loss and its denominator: 1 in full, 0 not at all, like one
    without a valid score. None: all count in full."""
    token_rewards_NT: Tensor | None = None
    """float32, what single tokens earn beside the completion's reward; the score of a segment stands at its last token.
    None where nothing gives any."""
    old_logprobs_NT: Tensor | None = None
    """float32, of the policy that sampled; None where nothing reads it, as when every update is on-policy."""
    reference_logprobs_NT: Tensor | None = None
    """float32, of the frozen reference; None where nothing reads it."""
    iterate_logprobs_NT: Tensor | None = None
    """float32, of the policy as it was some updates ago; None where nothing reads it."""

    @property
    def group_size(self) -> int:
        """G."""
        return self.rewards_PG.shape[1]

    @property
    def weights_N(self) -> Tensor:
        """float32 weights on the device of the tokens, 0 for completions without a valid reward."""
        weights_PG = torch.ones_like(self.rewards_PG) if self.weights_PG is None else self.weights_PG
        weights_PG = weights_PG.to(self.rewards_PG.device).masked_fill(self.rewards_PG.isnan(), 0.0)
        return weights_PG.flatten().float().to(self.completions.mask_NT.device)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, index_P: Tensor) -> Self:
        """The whole groups of ``index_P``, trimmed to their own longest prompt and completion."""
        G = self.group_size
        index_N = (index_P[:, None] * G + torch.arange(G, device=index_P.device)).flatten()
        picked: dict[str, Any] = {}
        for name in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, name)
            if name == "prompts":
                picked[name] = value.select(index_P)
            elif name == "completions":
                picked[name] = value.select(index_N)
            elif value is not None and "_NT" in name:
                width = picked["completions"].tokens_NT.shape[1]
                picked[name] = _index(value, index_N)[:, :width].contiguous()
            elif value is not None and "_P" in name:
                picked[name] = _index(value, index_P)
        return dataclasses.replace(self, **picked)

    def with_advantages(self, advantages_PG: Tensor, **fields: Any) -> "Experience":
        """The experience that a training step reads; ``fields`` are further ones of it."""
        return Experience(**{**vars(self), "advantages_PG": advantages_PG, **fields})


@dataclass(frozen=True, kw_only=True)
class Experience(Rollout):
    """A rollout whose completions have advantages: all that a training step reads."""

    advantages_PG: Tensor
    """float32, one a completion."""
    advantages_NT: Tensor | None = None
    """float32, one a token, 0 outside the mask; None where each token has that of its completion."""
    preferences_PGG: Tensor | None = None
    """float64 in [0, 1], how surely i is better than j, NaN where nobody knows: the comparisons that the advantages
    were made of. None where they were made of the rewards."""
    draws_PGG: Tensor | None = None
    """float64 in [0, 1), a random number for each (i, j), keyed by seed, step and prompt: for objectives that draw."""

    @property
    def advantages(self) -> Tensor:
        """``advantages_NT``, or advantages_N where there is one a completion."""
        return self.advantages_PG.flatten() if self.advantages_NT is None else self.advantages_NT
