"""Compiled decoder layers: the same numbers, one compilation for all layers and lengths, none while sampling."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import MambaConfig, MambaForCausalLM

from gopo_lightning._compat import unsplittable_layers
from gopo_lightning.distributed.decoder_layers import compile_layers, decoder_layers, uncompiled
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.prefix_sharing import check_shared_prefix
from gopo_lightning.policy.shared_prefix import PackedGroups
from tests.architectures import build, gradients, prompt_batch, ragged_completions, relative_difference


def test_compiled_layers_compute_the_same_and_are_compiled_once() -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = build("llama"), build("llama")
    compile_layers(compiled, backend="aot_eager")  # traced and split alike, in a tenth of the time
    with uncompiled():
        assert check_shared_prefix(compiled, prompt_batch(), ragged_completions()).ok
    assert not counters["stats"]["unique_graphs"]
    graphs = []
    for num_tokens, lengths in ((7, (5, 9, 1)), (9, (3, 12, 4)), (5, (7, 6, 2)), (11, (13, 2, 8))):
        prompts, completions = prompt_batch(lengths), ragged_completions(3, 4, num_tokens)
        logprobs = []
        for model in (plain, compiled):
            model.zero_grad()
            logprobs.append(completion_logprobs(model, prompts, completions, shared_prefix=True).logprobs_NT)
            logprobs[-1].sum().backward()
        torch.testing.assert_close(*logprobs, atol=1e-5, rtol=1e-5)
        assert relative_difference(gradients(plain), gradients(compiled)) < 1e-5
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[3], graphs


@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("gemma2", 2)])
def test_a_compiled_layer_and_its_fused_attention_are_one_graph(
    name: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: no break, and rows of any length after two compilations (of one block, and of several).

    So many for each kind of layer, with a sliding window and without.

    torch refuses the gradient on CPUs by a check alone, for want of a kernel; what is traced has it.
    """
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    plain, compiled = build(name), build(name)
    compile_layers(compiled, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for num_tokens, lengths in ((7, (5, 9, 1)), (90, (130, 2, 8)), (60, (3, 200, 4)), (150, (7, 6, 2))):
        prompts, completions = prompt_batch(lengths), ragged_completions(3, 4, num_tokens)
        logprobs = []
        for model, fused in ((plain, False), (compiled, True)):
            model.zero_grad()
            monkeypatch.setattr("gopo_lightning.policy.logprobs.PackedGroups", partial(PackedGroups, fused=fused))
            logprobs.append(completion_logprobs(model, prompts, completions, shared_prefix=True).logprobs_NT)
            logprobs[-1].sum().backward()
        torch.testing.assert_close(*logprobs, atol=1e-5, rtol=1e-5)
        assert relative_difference(gradients(plain), gradients(compiled)) < 1e-5
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs == [kinds, 2 * kinds, 2 * kinds, 2 * kinds]


def test_model_without_named_layers_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="names no layers"):
        compile_layers(nn.Linear(2, 2))


def test_of_nested_layers_the_outer_is_taken() -> None:
    """Mamba names its blocks and their mixers; FSDP2 would shard the mixers' parameters twice."""
    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=8, num_hidden_layers=2))
    assert {"MambaBlock", "MambaMixer"} <= unsplittable_layers(model)
    assert [type(layer).__name__ for layer in decoder_layers(model)] == ["MambaBlock"] * 2
