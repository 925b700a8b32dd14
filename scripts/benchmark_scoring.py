"""Seconds in which a reward model scores groups of completions, their prompt forwarded once, and with each of them.

    OMP_NUM_THREADS=1 python scripts/benchmark_scoring.py --shapes 350x100x8 1024x2048x8/2 350x100x8~

A shape is (tokens of the prompt) x (tokens of each completion) x (completions of a group), with `/2` for a model of two
layers, and with `~` for completions of natural lengths: exponentially distributed, with a mean of 0.4 of the longest.
Both forms alternate in this process through `SequenceClassifierReward`, on the same texts of a random decoder of about
100 M parameters in float32. Prints seconds, their ratio, and how far scores differ.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

from gopo_lightning.rewards import SequenceClassifierReward
from gopo_lightning.types import Prompt

WORDS = 8192


def save_model(folder: Path, num_layers: int) -> None:
    """A random decoder with a scoring head and a tokenizer of as many words as it has tokens."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2").save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        num_labels=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(config)
    nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_layers} layers, {parameters / 1e6:.0f} M parameters", flush=True)


def texts(prompt: int, longest: int, group: int, num_groups: int, natural: bool) -> tuple[list[Prompt], list[str]]:
    """Prompts and completions of so many words."""
    generator = torch.Generator().manual_seed(0)
    prompts, completions = list[Prompt](), list[str]()
    for index in range(num_groups):
        text = _words(prompt, generator)
        lengths = torch.full((group,), float(longest))
        if natural:
            lengths = lengths.exponential_(1 / (0.4 * longest), generator=generator).clamp(1, longest)
        for length in lengths.int().tolist():
            prompts.append(Prompt(index, (1,), text))
            completions.append(_words(length, generator))
    return prompts, completions


def _words(number: int, generator: torch.Generator) -> str:
    return "".join(f"w{n} " for n in torch.randint(3, WORDS, (number,), generator=generator).tolist())


def main() -> None:
    """Print one line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["350x100x8", "350x100x8~", "1024x2048x8/2"])
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape in options.shapes:
        sizes, _, layers = shape.rstrip("~").partition("/")
        prompt, longest, group = map(int, sizes.split("x"))
        batch = texts(prompt, longest, group, options.groups, shape.endswith("~"))
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), int(layers or options.layers))
            forms = []
            for mode in ("never", "always"):
                settings = {"template": "plain", "micro_batch_size": options.micro_batch_size}
                forms.append(SequenceClassifierReward(folder, prefix_sharing=mode, **settings))  # type: ignore[arg-type]
                forms[-1].setup(device)

        def score(form: SequenceClassifierReward) -> tuple[float, Tensor]:
            start = perf_counter()
            scores = form(*batch).cpu()  # noqa: B023
            return perf_counter() - start, scores

        rounds = [[score(form) for form in forms] for _ in range(options.rounds + 1)][1:]
        ratios = [apart[0] / shared[0] for apart, shared in rounds]
        seconds = [statistics.median(result[form][0] for result in rounds) for form in (0, 1)]
        difference = float((rounds[0][0][1] - rounds[0][1][1]).abs().max())
        print(
            f"{shape}: apart {seconds[0]:.2f} s, shared {seconds[1]:.2f} s, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}), scores of size {rounds[0][0][1].abs().mean():.1f} differ by "
            f"{difference:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
