"""A task whose answers can be checked, for a policy that trains in seconds: adding two numbers, digit by digit.

    python -m scripts.study.adder OUTPUT_FOLDER

GPT-2 with 2 layers of 96 reads `37+58=` and writes `95` and an end. It learns from the sums of the training prompts
until every third sampled answer to the others is right; the rest is left to the runs. `training.json` has the curve.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gopo_lightning.data.json_lines import write_jsonl

NUMBERS = range(100)
NUM_HELD_OUT = 128
"""Sums of the verdict; as many others choose the learning rate."""
SFT_ACCURACY = 0.33
"""Of sampled answers to the sums that are not trained on, at which supervised training ends."""
BATCH_SIZE = 64
CHECK_EVERY = 25
MAX_BATCHES = 4000
MAX_ANSWER = 4
"""Tokens: three digits and an end."""


def right(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """1 where the completion is the sum."""
    return [float(text == expected) for text, expected in zip(completions, answer, strict=True)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def sums(seed: int = 0) -> dict[str, list[dict[str, object]]]:
    """All sums, dealt out: `train`, `tuning` and `held_out`."""
    rows: list[dict[str, object]] = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in NUMBERS for b in NUMBERS]
    random.Random(seed).shuffle(rows)
    parts = {"held_out": rows[:NUM_HELD_OUT], "tuning": rows[NUM_HELD_OUT : 2 * NUM_HELD_OUT]}
    return {
        "train": rows[2 * NUM_HELD_OUT :],
        **{name: [{**r, "held_out": True} for r in p] for name, p in parts.items()},
    }


@torch.no_grad()
def accuracy(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, object]]) -> float:
    """Share of answers, one sampled for each of ``rows``, that are right."""
    model.eval()
    tokenizer.padding_side = "left"
    batch = tokenizer([str(row["prompt"]) for row in rows], return_tensors="pt", padding=True)
    tokens = model.generate(**batch, do_sample=True, max_new_tokens=MAX_ANSWER)[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    ended = (tokens == tokenizer.eos_token_id).any(1).tolist()
    return sum(text == row["answer"] and end for text, row, end in zip(texts, rows, ended, strict=True)) / len(rows)


def make(output: Path, seed: int = 0) -> None:
    """Train, and write model, tokenizer, prompts and `training.json` into ``output``."""
    torch.manual_seed(seed)
    tokenizer, parts = build_tokenizer(), sums()
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ids = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": pad}
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=16,
        n_embd=96,
        n_layer=2,
        n_head=4,
        **none,
        **ids,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    texts = [f"{row['prompt']}{row['answer']}" for row in parts["train"]]
    order, curve = random.Random(seed), [0.0]
    tokenizer.padding_side = "right"
    for number in range(1, MAX_BATCHES + 1):
        model.train()
        rows = [[*tokenizer(text)["input_ids"], eos] for text in order.sample(texts, BATCH_SIZE)]
        width = max(map(len, rows))
        tokens_NT = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        answers_NT = (tokens_NT == tokenizer.convert_tokens_to_ids("=")).cumsum(1)[:, :-1].bool()
        targets_NT = tokens_NT[:, 1:].masked_fill(~answers_NT | (tokens_NT[:, 1:] == pad), -100)
        logits_NTV = model(tokens_NT, attention_mask=tokens_NT != pad).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits_NTV.flatten(0, 1), targets_NT.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % CHECK_EVERY == 0:
            curve.append(accuracy(model, tokenizer, parts["tuning"] * 4))
            if curve[-1] >= SFT_ACCURACY:
                break
    print(f"adder: {curve[-1]:.0%} right after {number} batches", flush=True)
    model.generation_config.pad_token_id = pad
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name, part in parts.items():
        write_jsonl(output / f"{name}.jsonl", part)
    facts = {"parameters": model.num_parameters(), "batches": number, "accuracy_every_25_batches": curve}
    (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    make(parser.parse_args().output)
