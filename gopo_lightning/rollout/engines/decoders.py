"""How the rollout runs a model: where what it remembers of a sequence lives, and how a step is made.

Three kinds, from the fastest to one that any causal LM takes; `DecoderChoice` finds the first that serves a model.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from gopo_lightning.policy.next_token import next_token_logits
from gopo_lightning.policy.shared_prefix import PrefixCache, require_called, shared_prefix_attention
from gopo_lightning.types import PromptBatch

_MEMORIES = ("past_key_values", "cache_params", "state")
"""Under one of these names a model of transformers returns what it remembers, and takes it back."""


class Decoder(Protocol):
    """The model's side of the loop. Rows A are a rectangle: the same number of completions for every prompt left."""

    equal_lengths: ClassVar[bool]
    """It takes prompts of one length only, without padding."""

    def prefill(self) -> Tensor:
        """Forward the prompts once; logits [P, V] of the first completion token."""
        ...

    def step(self, tokens_A: Tensor) -> Tensor:
        """Append a token to every row; logits [A, V] of the next."""
        ...

    def keep(self, prompts_P: Tensor, rows_A: Tensor) -> None:
        """Go on with these prompts and rows alone (indices into the present ones)."""
        ...

    def attention(self) -> AbstractContextManager[None]:
        """The model's forward must run inside this."""
        ...


class SharedDecoder:
    """The fast form: the prompt's keys and values exist once per prompt, whatever G (``shared_prefix.PrefixCache``)."""

    equal_lengths: ClassVar[bool] = False

    def __init__(self, model: nn.Module, prompts: PromptBatch, num_completions: int, max_new_tokens: int) -> None:
        self.model, self.prompts = model, prompts
        self.cache = PrefixCache(prompts.mask_PL, max_new_tokens)
        self.positions_A = prompts.mask_PL.sum(-1).repeat_interleave(num_completions)

    def prefill(self) -> Tensor:
        positions_PL = (self.prompts.mask_PL.long().cumsum(-1) - 1).clamp(min=0)
        logits_PV = self._forward(self.prompts.tokens_PL, positions_PL)
        require_called(self.model, self.cache)
        return logits_PV

    def step(self, tokens_A: Tensor) -> Tensor:
        self.cache.advance()
        logits_AV = self._forward(tokens_A[:, None], self.positions_A[:, None])
        self.positions_A = self.positions_A + 1
        return logits_AV

    def keep(self, prompts_P: Tensor, rows_A: Tensor) -> None:
        self.cache.keep(prompts_P, rows_A)
        self.positions_A = self.positions_A[rows_A]

    def attention(self) -> AbstractContextManager[None]:
        return shared_prefix_attention(self.model, self.cache)

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),  # read by nobody: the cache knows the padding
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
            shared_prefix=self.cache,
        )
        return output.logits[:, -1]


class ExpandedDecoder:
    """The simple form: prefill once, expand what the model remembers G times, decode.

    The memory is the model's own: keys and values, the states of recurrent and convolutional layers, or both.
    """

    equal_lengths: ClassVar[bool] = False

    def __init__(self, model: nn.Module, prompts: PromptBatch, num_completions: int, max_new_tokens: int) -> None:
        self.model, self.prompts, self.group_size = model, prompts, num_completions
        self.memory: dict[str, Any] = {}

    def prefill(self) -> Tensor:
        mask_PL = self.prompts.mask_PL
        self.mask_AS, self.positions_A = mask_PL.long(), mask_PL.sum(-1)
        logits_PV = self._forward(self.prompts.tokens_PL, (self.mask_AS.cumsum(-1) - 1).clamp(min=0))
        self._select(torch.arange(len(mask_PL), device=mask_PL.device).repeat_interleave(self.group_size))
        return logits_PV

    def step(self, tokens_A: Tensor) -> Tensor:
        self.mask_AS = torch.cat([self.mask_AS, self.mask_AS.new_ones(len(tokens_A), 1)], -1)
        logits_AV = self._forward(tokens_A[:, None], self.positions_A[:, None])
        self.positions_A = self.positions_A + 1
        return logits_AV

    def keep(self, prompts_P: Tensor, rows_A: Tensor) -> None:
        self._select(rows_A)

    def attention(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _select(self, rows_A: Tensor) -> None:
        self.memory = {name: memory_of_rows(memory, rows_A) for name, memory in self.memory.items()}
        self.mask_AS, self.positions_A = self.mask_AS[rows_A], self.positions_A[rows_A]

    def _placement(self, positions: Tensor) -> dict[str, Tensor]:
        """What tells the model where tokens stand, and which of them are padding."""
        if "cache_params" in self.memory:  # recurrent through and through: there was padding in the prompt alone
            return {}
        return {"attention_mask": self.mask_AS, "position_ids": positions}

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=tokens, **self._placement(positions), **self.memory, use_cache=True, logits_to_keep=1
        )
        self.memory = {name: memory for name in _MEMORIES if (memory := getattr(output, name, None)) is not None}
        if not self.memory:
            raise ValueError(f"{type(self.model).__name__} returns no cache")
        return output.logits[:, -1]


class UnpaddedDecoder(ExpandedDecoder):
    """The same for models that take padding for text (RWKV): prompts of one length at a time, and no mask."""

    equal_lengths: ClassVar[bool] = True

    def _placement(self, positions: Tensor) -> dict[str, Tensor]:
        return {}


class RecomputingDecoder:
    """The last resort, for models whose memory cannot be handed on row by row: every step forwards whole sequences.

    Rows are padded on the right, where a causal model does not see it.
    """

    equal_lengths: ClassVar[bool] = False

    def __init__(self, model: nn.Module, prompts: PromptBatch, num_completions: int, max_new_tokens: int) -> None:
        self.model, self.group_size = model, num_completions
        self.lengths_A = prompts.mask_PL.sum(-1)
        P, L = prompts.tokens_PL.shape
        self.tokens_AS = prompts.tokens_PL.new_zeros(P, L + max_new_tokens)
        for row_S, tokens_L, mask_L in zip(self.tokens_AS, prompts.tokens_PL, prompts.mask_PL, strict=True):
            row_S[: int(mask_L.sum())] = tokens_L[mask_L]

    def prefill(self) -> Tensor:
        logits_PV = self._forward()
        self.tokens_AS = self.tokens_AS.repeat_interleave(self.group_size, 0)
        self.lengths_A = self.lengths_A.repeat_interleave(self.group_size)
        return logits_PV

    def step(self, tokens_A: Tensor) -> Tensor:
        self.tokens_AS.scatter_(1, self.lengths_A[:, None], tokens_A[:, None])
        self.lengths_A = self.lengths_A + 1
        return self._forward()

    def keep(self, prompts_P: Tensor, rows_A: Tensor) -> None:
        self.tokens_AS, self.lengths_A = self.tokens_AS[rows_A], self.lengths_A[rows_A]

    def attention(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _forward(self) -> Tensor:
        return next_token_logits(self.model, self.tokens_AS, self.lengths_A)


def memory_of_rows(memory: Any, rows_A: Tensor) -> Any:
    """What a model remembers of these rows: of a cache of transformers, or of tensors with rows first, in containers.

    Raises:
        TypeError: anything else.
    """
    if hasattr(memory, "reorder_cache"):
        memory.reorder_cache(rows_A)
        return memory
    if isinstance(memory, Tensor):
        return memory.index_select(0, rows_A)
    if isinstance(memory, list | tuple):
        return type(memory)(memory_of_rows(part, rows_A) for part in memory)
    raise TypeError(f"the rows of a {type(memory).__name__} are unknown")


DecoderType: TypeAlias = type[SharedDecoder | ExpandedDecoder | RecomputingDecoder]
"""Made of a model, prompts, completions of each (G) and the most new tokens (T)."""
