"""One optimiser step here and in TRL's GRPOTrainer: the same model, prompts, group size, lengths and dtype.

    python scripts/benchmark_step.py --output benchmark.json

Each measurement is a fresh process that makes two steps and reports the second, so that neither side is charged for
loading or for what it does once. Processes alternate between the two sides for several rounds; what counts is the ratio
within a round and its median. `--check` runs the same completions through both losses and compares the gradients.

Completions have exactly T tokens on both sides (EOS is suppressed), the reward is a cheap function of the text, β is 0.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

SIDES = ["ours", "trl", "compiled"]
"""`compiled` is ours with `policy.compile: true`."""
SHAPES = [
    *("4x64x48x8", "4x64x128x8", "2x64x48x16", "2x64x128x16"),
    *("4x256x48x8", "2x256x128x8", "2x256x48x16", "1x256x128x16"),
    *("1x1024x48x8", "1x1024x128x8"),
]
"""Prompts of 64, 256 and 1024 tokens; by its memory at G = 8, TRL would need more than 24 GiB at (1024, G = 16)."""


def reward(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """The number of vowels: free, and rarely all tied."""
    return [float(sum(character in "aeiou" for character in text)) for text in completions]


class Shape:
    """P prompts of L tokens, G completions of T tokens each, written PxLxTxG."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.P, self.L, self.T, self.G = (int(part) for part in text.split("x"))

    def prompts(self, tokenizer: Any) -> list[str]:
        """Texts of exactly L tokens each: a token that stands for itself, repeated."""
        words = [" film", " movie", " story", " actor", " scene", " music", " light", " voice"]
        texts = [words[p % len(words)] * self.L for p in range(self.P)]
        assert all(len(tokenizer(text)["input_ids"]) == self.L for text in texts)
        return texts


def useful_flops(model: Any, shape: Shape) -> dict[str, float]:
    """Multiply-adds times 2 that a step cannot do without: each prompt once, the head on completion tokens alone.

    Forward 2 W per token and weight, backward twice that; attention 4 D per layer and pair of positions, forward.
    """
    P, L, T, G = shape.P, shape.L, shape.T, shape.G
    config = model.config
    head = config.vocab_size * config.hidden_size
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    weights -= 0 if config.tie_word_embeddings else head
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    pairs = P * (L * L / 2 + G * (L * T + T * T / 2))
    forward = 2 * weights * P * (L + G * T) + 2 * head * P * G * T + 4 * width * config.num_hidden_layers * pairs
    return {"rollout": forward, "train": 3 * forward}


def matmul_peak(accelerator: str, dtype: str) -> float:
    """FLOP/s of a product of square matrices, median of 10, on this machine now."""
    import torch

    device, size = ("cuda", 8192) if accelerator == "gpu" else ("cpu", 2048)
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    seconds = []
    for _ in range(13):
        start = now(accelerator)
        torch.mm(a, b)
        seconds.append(now(accelerator) - start)
    return 2 * size**3 / statistics.median(seconds[3:])


def now(accelerator: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if accelerator == "gpu":
        import torch

        torch.cuda.synchronize()
    return perf_counter()


def peak_gib(accelerator: str) -> float:
    """Most memory so far: of a GPU what torch has allocated, else what of this process was resident."""
    if accelerator == "gpu":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_ours(model: str, shape: Shape, dtype: str, accelerator: str, compiled: bool) -> dict[str, float]:
    """Seconds of the second step through our module and Lightning's Trainer."""
    import lightning as L
    import torch

    from gopo_lightning import GOPOModule, PromptDataModule, trainer_defaults
    from gopo_lightning.data.sources import PromptSource
    from gopo_lightning.policy.model import PolicyConfig
    from gopo_lightning.rewards import FunctionReward
    from gopo_lightning.rollout import SamplingConfig

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.ends.append(now(accelerator))

    module = GOPOModule(
        policy=PolicyConfig(model, compile=compiled),
        rewards=[FunctionReward("scripts.benchmark_step.reward")],
        rollout={
            "sampling": SamplingConfig(max_new_tokens=shape.T, min_new_tokens=shape.T),
            "num_completions": shape.G,
        },
        update={
            "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-6, fused=True),  # as TRL by default
            "warmup_steps": 0,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        texts = shape.prompts(module.tokenizer) * 2  # two steps
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        data = PromptDataModule(train=PromptSource(str(path)), prompts_per_step=shape.P)
        clock = Clock()
        settings = {
            **trainer_defaults(),
            "accelerator": accelerator,
            "devices": 1,
            "precision": "bf16-mixed" if dtype == "bfloat16" else "32-true",
            "max_steps": 2,
            "logger": False,
            "callbacks": [clock],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
        }
        trainer = L.Trainer(**settings)
        trainer.fit(module, data)
    metrics = trainer.logged_metrics
    seconds = {phase: float(metrics[f"seconds/{phase}"]) for phase in ("rollout", "train")}
    most = peak_gib(accelerator)
    peak = matmul_peak(accelerator, dtype)
    shares = {f"{k}_share": v / seconds[k] / peak for k, v in useful_flops(module.policy, shape).items()}
    return {
        "step": clock.ends[1] - clock.ends[0],
        **seconds,
        "peak_gib": most,
        "matmul_peak_gflops": peak / 1e9,
        **shares,
    }


def measure_trl(model: str, shape: Shape, dtype: str, accelerator: str) -> dict[str, float]:
    """Seconds of the second step through TRL."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    generation: list[float] = []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = now(accelerator)
            result = super()._generate_and_score_completions(inputs)
            generation.append(now(accelerator) - start)
            return result

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(now(accelerator))

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=(tokenizer := AutoTokenizer.from_pretrained(model, padding_side="left")),
            reward_funcs=reward,
            train_dataset=_trl_prompts(shape, tokenizer),
            args=_trl_arguments(folder, shape, dtype, max_steps=2, use_cpu=accelerator == "cpu"),
            callbacks=[clock],
        )
        trainer.train()
    step = clock.ends[1] - clock.ends[0]
    return {"step": step, "rollout": generation[1], "train": step - generation[1], "peak_gib": peak_gib(accelerator)}


def _trl_prompts(shape: Shape, tokenizer: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": shape.prompts(tokenizer) * 2})


def _trl_arguments(folder: str, shape: Shape, dtype: str, **overrides: Any) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.P * shape.G,
        num_generations=shape.G,
        max_completion_length=shape.T,
        generation_kwargs={"min_new_tokens": shape.T},
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-6,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **overrides,
    )


def check_gradients(model: str, shape: Shape) -> float:
    """|ours - TRL's| / |TRL's| of the whole gradient in float32, for the same completions and advantages."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    from gopo_lightning.objectives.clipped import ClippedSurrogate, policy_loss
    from gopo_lightning.policy.logprobs import completion_logprobs
    from gopo_lightning.types import Completions, Prompt, PromptBatch

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    ids = [tokenizer(text)["input_ids"] for text in shape.prompts(tokenizer)]
    prompts = PromptBatch.collate([Prompt(i, tuple(t[: len(t) - i]), "") for i, t in enumerate(ids)], 0)
    generator = torch.Generator().manual_seed(0)
    N = shape.P * shape.G
    tokens_NT = torch.randint(10, 1000, (N, shape.T), generator=generator)
    lengths_N = torch.randint(1, shape.T + 1, (N,), generator=generator)
    mask_NT = torch.arange(shape.T) < lengths_N[:, None]
    advantages_N = torch.randn(N, generator=generator)
    total = mask_NT.sum().float()

    with tempfile.TemporaryDirectory() as folder:
        theirs = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=_trl_prompts(shape, tokenizer),
            args=_trl_arguments(folder, shape, "float32", max_steps=1, use_cpu=True),
        )
    theirs.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": prompts.tokens_PL.repeat_interleave(shape.G, 0),
        "prompt_mask": prompts.mask_PL.long().repeat_interleave(shape.G, 0),
        "completion_ids": tokens_NT,
        "completion_mask": mask_NT.long(),
        "advantages": advantages_N,
        "num_items_in_batch": total,
    }
    theirs._compute_loss(theirs.model, inputs).backward()
    expected = torch.cat([p.grad.flatten() for p in theirs.model.parameters()])

    ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    completions = Completions(tokens_NT, mask_NT, torch.zeros(N, dtype=torch.bool), ("",) * N)
    logprobs = completion_logprobs(ours, prompts, completions, shared_prefix=True).logprobs_NT
    loss, _ = policy_loss(logprobs, None, None, advantages_N, mask_NT, config=ClippedSurrogate(), denominator=total)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in ours.parameters()])
    return float((gradient - expected).norm() / expected.norm())


def fresh_process(side: str, model: str, shape: str, dtype: str, accelerator: str) -> dict[str, float]:
    """Measure one side in a process of its own."""
    root = Path(__file__).parents[1]
    command = [sys.executable, __file__, "--worker", side, "--model", model, "--shapes", shape, "--dtype", dtype]
    command += ["--accelerator", accelerator]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if result.returncode:
        raise RuntimeError(f"{side} {shape} failed:\n{result.stdout}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def ratios(rows: list[dict[str, Any]], shape: str, side: str) -> list[float]:
    """TRL's seconds a step by those of ``side``, round by round."""
    return [row["trl"]["step"] / row[side]["step"] for row in rows if row["shape"] == shape]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the median seconds of each phase and side, and every round's step as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"trl": "TRL", "ours": "here", "compiled": "here, policy.compile"}
    colours = {"trl": ("#c4c4c4", "#808080"), "ours": ("#8fc1ee", "#2a6fb0"), "compiled": ("#a5d6b0", "#3b8f52")}
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(figsize=(1.5 + 1.25 * len(shapes), 4.5), layout="constrained")
    for x, shape in enumerate(shapes):
        measured = [row for row in rows if row["shape"] == shape]
        sides = [side for side in names if side in measured[0]]
        for i, side in enumerate(sides):
            rollout, train = (statistics.median(row[side][phase] for row in measured) for phase in ("rollout", "train"))
            at, width = x + (i - (len(sides) - 1) / 2) * 0.28, 0.26
            axes.bar(at, rollout, width, color=colours[side][0], label=f"{names[side]}: rollout")
            axes.bar(at, train, width, bottom=rollout, color=colours[side][1], label=f"{names[side]}: training")
            axes.plot([at] * len(measured), [row[side]["step"] for row in measured], "k.", markersize=4)
    labels = []
    for shape in shapes:
        P, L, T, G = shape.split("x")
        labels.append(f"L = {L}\nT = {T}\n{P} × {G}\n{statistics.median(ratios(rows, shape, 'ours')):.1f}× faster")
    axes.set_xticks(range(len(shapes)), labels)
    axes.set_ylabel("seconds per step (bar: median, dots: rounds)")
    axes.set_xlabel("prompt tokens L, new tokens T, prompts × completions of each")
    unique = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over the rounds as a table of markdown; ratios round by round."""
    lines = [
        "| P × L × T × G | useful TFLOP | side | step, s (rollout + train) | speed-up over TRL, by round "
        "| peak memory, GiB | share of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        measured = [row for row in rows if row["shape"] == shape]
        for side in measured[0]:
            if side not in SIDES:
                continue
            seen = [row[side] for row in measured]
            s = {key: statistics.median(m[key] for m in seen) for key in seen[0]}
            flops = share = ratio = ""
            if side != "trl":
                m, phases = seen[0], ("rollout", "train")
                flops = " + ".join(f"{m[f'{p}_share'] * m[p] * m['matmul_peak_gflops'] / 1e3:.2f}" for p in phases)
                share = " + ".join(f"{s[f'{p}_share']:.0%}" for p in phases)
                if "trl" in measured[0]:
                    ratio = ", ".join(f"{ratio:.1f}" for ratio in ratios(rows, shape, side))
            seconds = f"{s['step']:.1f} ({s['rollout']:.1f} + {s['train']:.1f})"
            name = shape.replace("x", " × ")
            lines.append(f"| {name} | {flops} | {side} | {seconds} | {ratio} | {s['peak_gib']:.1f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Alternate, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local folder; SmolLM2-135M from the packaged assets by default")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="PxLxTxG")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=["ours", "trl"], help="in the order of their turns"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare the gradients of both losses and stop")
    parser.add_argument("--output", type=Path, help="JSON file of every measurement")
    parser.add_argument(
        "--chart",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="draw a.png b.json …: JSON of --output; print its table; then stop",
    )
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.chart:
        picture, *files = options.chart
        rows = [row for file in files for row in json.loads(file.read_text())["measurements"]]
        draw(rows, picture)
        print(table(rows))
        return
    if options.model is None:
        from gopo_lightning.data import assets

        options.model = str(assets.path("smollm2-135m-instruct"))
    if options.worker:
        arguments = options.model, Shape(options.shapes[0]), options.dtype, options.accelerator
        trl = options.worker == "trl"
        print(json.dumps(measure_trl(*arguments) if trl else measure_ours(*arguments, options.worker == "compiled")))
        return
    if options.check:
        for text in ("2x24x8x4", "3x16x12x2"):
            print(f"{text}: relative difference of the gradients {check_gradients(options.model, Shape(text)):.1e}")
        return
    rows = []
    print(
        "shape PxLxTxG    round  side      step, s (rollout + train)   TRL's step / this   peak GiB       share of peak"
    )
    for text in options.shapes:
        for round_ in range(options.rounds):
            row = {
                side: fresh_process(side, options.model, text, options.dtype, options.accelerator)
                for side in options.sides
            }
            rows.append({"shape": text, "round": round_, **row})
            for side, seconds in row.items():
                cell = f"{seconds['step']:6.1f} ({seconds['rollout']:5.1f} + {seconds['train']:5.1f})"
                shares = [f"{seconds[f'{phase}_share']:.0%}" for phase in ("rollout", "train") if side != "trl"]
                ratio = row["trl"]["step"] / seconds["step"] if "trl" in row else float("nan")
                print(
                    f"{text:16} {round_:5}  {side:8}  {cell:25}  {ratio:17.2f}  {seconds['peak_gib']:13.1f}   "
                    f"{' + '.join(shares)}",
                    flush=True,
                )
        if "trl" in options.sides:
            for side in [side for side in options.sides if side != "trl"]:
                print(f"{text:16} {side}: median ratio {statistics.median(ratios(rows, text, side)):.2f}", flush=True)
        if options.output:
            options.output.write_text(json.dumps({"dtype": options.dtype, "measurements": rows}, indent=1))


if __name__ == "__main__":
    main()
