"""Seconds of log-probs and their gradient: groups packed into one row, and each completion with its prompt.

    OMP_NUM_THREADS=1 python scripts/benchmark_logprobs.py --shapes 4x256x128x8 4x256x128x8~

A shape is (prompts) x (tokens of a prompt) x (tokens of a completion) x (completions of a group), with `~` for natural
lengths: prompts of half to all of these tokens, completions exponentially distributed with a mean of about a third of
the longest. A random Llama of 12 M parameters in float32, on a GPU under bfloat16's autocast; forms alternate in this
process. Prints median seconds.
"""

import argparse
import statistics
from time import perf_counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.types import Completions, Prompt, PromptBatch

WORDS = 4096


def model() -> LlamaForCausalLM:
    """Of 12 M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def batch(P: int, L: int, T: int, G: int, natural: bool) -> tuple[PromptBatch, Completions]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    prompt_P, length_N = torch.full((P,), L), torch.full((P * G,), T)
    if natural:
        prompt_P = (L / 2 + L / 2 * torch.rand(P, generator=generator)).long().clamp(min=1)
        length_N = torch.empty(P * G).exponential_(3 / T, generator=generator).long().clamp(1, T)
        length_N[0] = T
    rows = [torch.randint(5, WORDS, (length,), generator=generator).tolist() for length in prompt_P.tolist()]
    prompts = PromptBatch.collate([Prompt(index, tuple(row), "") for index, row in enumerate(rows)], 0)
    mask_NT = torch.arange(T) < length_N[:, None]
    tokens_NT = torch.randint(5, WORDS, mask_NT.shape, generator=generator) * mask_NT
    return prompts, Completions(tokens_NT, mask_NT, torch.zeros(P * G, dtype=torch.bool), ("",) * (P * G))


def main() -> None:
    """Print one line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x256x128x8", "4x256x128x8~"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["packed", "apart"])
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    policy = model().to(device)

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return perf_counter()

    def step(shared: bool, groups: tuple[PromptBatch, Completions]) -> float:
        start = now()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=gpu):
            logprobs_NT = completion_logprobs(policy, *groups, shared_prefix=shared).logprobs_NT
        logprobs_NT.sum().backward()
        policy.zero_grad()
        return now() - start

    for shape in options.shapes:
        P, L, T, G = map(int, shape.rstrip("~").split("x"))
        prompts, completions = batch(P, L, T, G, shape.endswith("~"))
        groups = prompts.to(device), completions.to(device)
        forms = {"packed": [True], "apart": [False]}.get(options.only, [True, False])
        rounds = [[step(form, groups) for form in forms] for _ in range(options.rounds + 1)][1:]
        seconds = ", ".join(
            f"{'packed' if form else 'apart'} {statistics.median(r[i] for r in rounds):.2f} s"
            for i, form in enumerate(forms)
        )
        ratio = "" if len(forms) < 2 else f", ratio {statistics.median(r[1] / r[0] for r in rounds):.2f}"
        mean = float(groups[1].mask_NT.sum(-1).float().mean())
        print(f"{shape}: {mean:.0f} tokens a completion, {seconds}{ratio}", flush=True)


if __name__ == "__main__":
    main()
