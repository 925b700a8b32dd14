"""Tiny random models and data on disk, so that tests run offline in seconds."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# A shell starts its background jobs with SIGINT ignored, and so does whatever they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus <bos> 256, <eos> 257 and <pad> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_llama(folder: Path, **options: Any) -> Path:
    """A random two-layer Llama over bytes, saved with its tokenizer as a Hugging Face folder.

    Its completions end by themselves, each at a length of its own: EOS has about 0.15 at every token.
    """
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    model = LlamaForCausalLM(config)
    _end_by_itself(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _end_by_itself(model: LlamaForCausalLM) -> None:
    """Dimension 0 of the residual stream becomes a constant, and the logit of EOS a multiple of it."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    model.lm_head.weight[:, 0] = 0
    model.lm_head.weight[model.config.eos_token_id] = 0
    model.lm_head.weight[model.config.eos_token_id, 0] = 11.0


def save_tiny_policy(folder: Path) -> Path:
    """A random two-layer Llama over bytes, saved as a Hugging Face folder."""
    return save_llama(
        folder,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=byte_tokenizer().pad_token_id,
    )


def write_prompts(folder: Path) -> Path:
    """Twelve plain prompts of unequal length, with a column that rewards can read."""
    path = folder / "prompts.jsonl"
    rows = [{"prompt": "say " + "ab" * (i % 5 + 1), "letter": "abc"[i % 3]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _same_environment_for_the_next_test() -> Iterator[None]:
    """Runs leave their seed and their rank in it, where the processes of a later test would read them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `save_tiny_policy`."""
    return save_tiny_policy(tmp_path_factory.mktemp("tiny_policy"))


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_prompts`."""
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which of the configs in configs/methods were trained, where any was; see `test_methods`."""
    from tests.test_methods import CHOSEN, METHODS, SEED

    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    if any("test_methods.py::test_a_method" in report.nodeid for report in reports):
        terminalreporter.write_line(f"METHODS_SEED={SEED} chose {len(CHOSEN)} of {len(METHODS)} methods: {CHOSEN}")
