"""Seconds of a reward-model training step with the shared beginning of each pair or list forwarded once, and apart.

    OMP_NUM_THREADS=1 python scripts/benchmark_reward_model.py --shapes 256x48x2 1024x48x2 256x48x4

A shape is (tokens that are shared) x (tokens of each answer) x (texts of a list). Both forms alternate in this process,
on the same random tokens; a step is forward and backward. Prints seconds, their ratio, and how far scores differ.
"""

import argparse
import statistics
from time import perf_counter

import torch
from transformers import BatchEncoding

from gopo_lightning.rewards.loading import load_classifier, load_tokenizer, set_pad_token
from gopo_lightning.rewards.shared_scoring import pack, separate_scores, shared_scores


def main() -> None:
    """Print one line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--shapes", nargs="+", default=["256x48x2"])
    parser.add_argument("--lists", type=int, default=4, help="pairs or lists in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, as under bf16-mixed")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(options.model, None, False)
    model = load_classifier(options.model, None, "float32", False, num_labels=1).to(device).train()
    set_pad_token(model, tokenizer)

    def step(share: bool, texts: list[list[int]], sizes: list[int]) -> tuple[float, torch.Tensor]:
        start = perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            if share:
                scores_N = shared_scores(model, pack(texts, sizes, int(tokenizer.pad_token_id)).to(device))
            else:
                encoded = {"input_ids": texts, "attention_mask": [[1] * len(text) for text in texts]}
                scores_N = separate_scores(model, tokenizer, BatchEncoding(encoded))
        scores_N.float().logsumexp(0).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        model.zero_grad()
        return perf_counter() - start, scores_N.detach()

    for shape in options.shapes:
        prefix, answer, size = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        shared = torch.randint(100, 10_000, (options.lists, prefix), generator=generator)
        own = torch.randint(100, 10_000, (options.lists, size, answer), generator=generator)
        texts = [[*row, *text] for row, group in zip(shared.tolist(), own.tolist(), strict=True) for text in group]
        sizes = [size] * options.lists
        rounds = [(step(False, texts, sizes), step(True, texts, sizes)) for _ in range(options.rounds + 1)][1:]
        ratios = [apart[0] / together[0] for apart, together in rounds]
        seconds = [statistics.median(result[form][0] for result in rounds) for form in (0, 1)]
        difference = float((rounds[0][0][1] - rounds[0][1][1]).abs().max())
        tokens = (prefix + answer) * size / (prefix + answer * size)
        print(
            f"{shape}: apart {seconds[0]:.2f} s, shared {seconds[1]:.2f} s, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}; of tokens {tokens:.2f}), scores differ by {difference:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
