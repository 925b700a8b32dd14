"""How the rollout runs a model: where keys and values live, how a step is made, in which precision."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from gopo_lightning.gathering import forward_is_collective
from gopo_lightning.layers import replaced_forward
from gopo_lightning.shared_prefix import PrefixCache, require_called, shared_prefix_attention
from gopo_lightning.structs import PromptBatch


class Decoder(Protocol):
    """The model's side of the loop. Rows A are a rectangle: the same number of completions for every prompt left."""

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


DecoderType: TypeAlias = Callable[[nn.Module, PromptBatch, int, int], Decoder]
"""Of a model, prompts, completions of each (G) and the most new tokens (T)."""


class ExpandedDecoder:
    """The simple form: prefill once, expand the cache G times, decode. Works wherever transformers' own cache does."""

    def __init__(self, model: nn.Module, prompts: PromptBatch, num_completions: int, max_new_tokens: int) -> None:
        self.model, self.prompts, self.group_size = model, prompts, num_completions
        self.mask_AS = prompts.mask_PL.long()
        self.positions_A = prompts.mask_PL.sum(-1)
        self.cache: Any = None

    def prefill(self) -> Tensor:
        positions_PL = (self.mask_AS.cumsum(-1) - 1).clamp(min=0)
        logits_P1V = self._forward(self.prompts.tokens_PL, positions_PL)
        self.cache.batch_repeat_interleave(self.group_size)
        self.mask_AS = self.mask_AS.repeat_interleave(self.group_size, 0)
        self.positions_A = self.positions_A.repeat_interleave(self.group_size, 0)
        return logits_P1V[:, -1]

    def step(self, tokens_A: Tensor) -> Tensor:
        self.mask_AS = torch.cat([self.mask_AS, self.mask_AS.new_ones(len(tokens_A), 1)], -1)
        logits_A1V = self._forward(tokens_A[:, None], self.positions_A[:, None])
        self.positions_A = self.positions_A + 1
        return logits_A1V[:, -1]

    def keep(self, prompts_P: Tensor, rows_A: Tensor) -> None:
        self.cache.batch_select_indices(rows_A)
        self.mask_AS, self.positions_A = self.mask_AS[rows_A], self.positions_A[rows_A]

    def attention(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=tokens,
            attention_mask=self.mask_AS,
            position_ids=positions,
            past_key_values=self.cache if self.cache is not None else DynamicCache(),
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        return output.logits


class SharedDecoder:
    """The fast form: the prompt's keys and values exist once per prompt, whatever G (``shared_prefix.PrefixCache``)."""

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
        return shared_prefix_attention(self.model)

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


def decoders_agree(model: nn.Module, prompts: PromptBatch) -> bool:
    """Whether both decoders give the same logits on one prompt and three more tokens of two completions.

    Outside autocast: in bfloat16 both are right and yet up to 0.2 apart (a prompt of one repeated token), which is what
    a wrong one might be.
    """
    prompts = prompts.select(torch.zeros(1, dtype=torch.int64))
    tokens_3A = prompts.tokens_PL[0, -1:].expand(3, 2)
    results = []
    kinds: tuple[DecoderType, ...] = (SharedDecoder, ExpandedDecoder)
    for kind in kinds:
        decoder = kind(model, prompts, 2, 3)
        with decoder.attention(), torch.autocast(prompts.tokens_PL.device.type, enabled=False):
            logits = [decoder.prefill(), *(decoder.step(tokens_A) for tokens_A in tokens_3A)]
        results.append(torch.cat(logits).float())
    shared, expanded = results
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.3
    return bool((shared - expanded).norm() <= tolerance * (expanded - expanded.mean(-1, keepdim=True)).norm())


@contextmanager
def sampling_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to ``dtype`` inside, with copies of the linear weights in it; the masters come back untouched.

    The numbers are those of autocast alone, which would cast every weight again for every token. Embeddings and norms
    stay as they are, and so do sharded weights unless they are gathered.
    """
    device = next(model.parameters()).device
    plain = not forward_is_collective(model)
    linear = [
        module
        for module in model.modules()
        if plain and isinstance(module, nn.Linear | Conv1D) and not isinstance(module.weight, DTensor)
    ]
    with ExitStack() as stack:
        for module in linear:
            if device.type == "cpu" and dtype == torch.bfloat16 and type(module) is nn.Linear:
                stack.enter_context(_packed(module))
            else:
                stack.enter_context(_cast(module, dtype))
        stack.enter_context(torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
        yield


@contextmanager
def _cast(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    masters = {k: master for k, master in module._parameters.items() if master is not None and master.dtype != dtype}
    try:
        for name, master in masters.items():
            module._parameters[name] = nn.Parameter(master.detach().to(dtype), requires_grad=False)
        yield
    finally:
        module._parameters.update(masters)


def _packed(module: nn.Linear) -> AbstractContextManager[None]:
    """In oneDNN's layout for few rows: a product would otherwise lay the weight out anew, a quarter of its time."""
    bias = None if module.bias is None else module.bias.detach().bfloat16()
    weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach().bfloat16())
    linear = torch.ops.mkldnn._linear_pointwise
    return replaced_forward(module, lambda x: linear(x.bfloat16(), weight, bias, "none", [], ""))
