"""A policy that two cores can train in a minute: a word-level language model of movie-review sentences.

    python -m scripts.study.language_model OUTPUT_FOLDER

GPT-2 with 3 layers of 160, on the train sentences of the packaged ratings, lower case, the words that come at least
three times. Training stops where the held-out sentences are predicted best; `training.json` has the curve.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gopo_lightning.data import ratings

MIN_COUNT = 3
MAX_TOKENS = 40
BATCH_SIZE = 64
MAX_EPOCHS = 10
PATIENCE = 2
"""Epochs without a better one."""


def build_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Words and punctuation marks; ids 0, 1, 2 are <unk>, <pad>, <eos>."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(r"[.,!?;:()\"]", "isolated")]
    )
    special = ["<unk>", "<pad>", "<eos>"]
    trainer = trainers.WordLevelTrainer(min_frequency=MIN_COUNT, special_tokens=special)
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def encode(tokenizer: PreTrainedTokenizerFast, sentences: list[str]) -> list[list[int]]:
    """Token ids of each sentence, <eos> at the end of those that are whole."""
    ids = tokenizer(sentences)["input_ids"]
    return [[*row, tokenizer.eos_token_id][:MAX_TOKENS] for row in ids]


def batches(rows: list[list[int]], order: random.Random) -> list[list[list[int]]]:
    """Rows of similar lengths together, for little padding; drawn anew at every call."""
    rows = sorted(rows, key=lambda row: len(row) + order.uniform(-2, 2))
    found = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    order.shuffle(found)
    return found


def batch_loss(model: GPT2LMHeadModel, rows: list[list[int]], pad: int, unknown: int) -> tuple[Tensor, int]:
    """(sum of the tokens' losses in nats, number of tokens); nobody is taught to write <unk>."""
    width = max(map(len, rows))
    tokens_NT = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask_NT = tokens_NT != pad
    targets_NT = tokens_NT.masked_fill(~mask_NT | (tokens_NT == unknown), -100)[:, 1:]
    logits_NTV = model(tokens_NT, attention_mask=mask_NT).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits_NTV.flatten(0, 1).float(), targets_NT.flatten(), reduction="sum")
    return loss, int((targets_NT != -100).sum())


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, rows: list[list[int]], pad: int, unknown: int) -> float:
    """Of the known words and ends of ``rows``."""
    model.eval()
    sums = [batch_loss(model, rows[i : i + BATCH_SIZE], pad, unknown) for i in range(0, len(rows), BATCH_SIZE)]
    return math.exp(sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums))


def train(output: Path, seed: int = 0) -> None:
    """Train, and write model, tokenizer and `training.json` into ``output``."""
    torch.manual_seed(seed)
    order = random.Random(seed)
    sentences = ratings.load("movie")
    parts = {part: [row.text for row in ratings.split(sentences, part)] for part in ("train", "validation")}
    tokenizer = build_tokenizer(parts["train"])
    rows, held_out = (encode(tokenizer, parts[part]) for part in ("train", "validation"))
    pad, unknown, eos = tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=160,
        n_layer=3,
        n_head=4,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
        **dropout,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    total = MAX_EPOCHS * math.ceil(len(rows) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / total)) + 0.02)
    )
    curve: list[float] = []
    best: dict[str, Tensor] = {}
    for epoch in range(MAX_EPOCHS):
        model.train()
        for batch in batches(rows, order):
            loss, count = batch_loss(model, batch, pad, unknown)
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        curve.append(perplexity(model, held_out, pad, unknown))
        print(f"epoch {epoch + 1}: held-out perplexity {curve[-1]:.1f}", flush=True)
        if curve[-1] == min(curve):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        if len(curve) - 1 - curve.index(min(curve)) >= PATIENCE:
            break
    model.load_state_dict(best)
    model.config.update(dict.fromkeys(dropout, 0.0))
    model.generation_config.pad_token_id = pad
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    facts = {
        "parameters": model.num_parameters(),
        "words": len(tokenizer),
        "held_out_perplexity_by_epoch": curve,
        "unknown_words": sum(row.count(unknown) for row in held_out) / sum(map(len, held_out)),
    }
    (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    train(parser.parse_args().output)
