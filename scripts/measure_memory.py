"""Peak memory of two steps on a CPU, as `estimate` says and as measured, for models of several sizes: a table.

python scripts/measure_memory.py

Each row is a fresh process that trains two steps: full-length completions, prompts of exactly --prompt-tokens tokens,
AdamW, a reward without a model. What counts is the largest resident set (RSS) of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS: dict[str, list[str]] = {
    "16 M": ["small"],
    "50 M": ["middle"],
    "135 M": ["smollm2"],
    "135 M, LoRA r = 16": ["smollm2", '--model.init_args.policy.lora={"r": 16, "target_modules": "all-linear"}'],
    "135 M, gradient checkpointing": ["smollm2", "--model.init_args.policy.gradient_checkpointing=true"],
    "135 M, a group at a time": ["smollm2", "--model.init_args.update.micro_batch_tokens=1"],
    "16 M, bf16-mixed": ["small", "--trainer.precision=bf16-mixed"],
    "135 M, bf16-mixed": ["smollm2", "--trainer.precision=bf16-mixed"],
}
"""Policy and further flags."""
SHAPES = {"small": (256, 4), "middle": (512, 8)}
"""Hidden size and layers of random Llamas with SmolLM2's vocabulary."""
SMOLLM2 = "packaged:smollm2-135m-instruct"


def policies(folder: Path) -> dict[str, str]:
    """Name → folder of the models, made anew."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from gopo_lightning.policy.loading import locate

    tokenizer = AutoTokenizer.from_pretrained(locate(SMOLLM2))
    for name, (hidden, layers) in SHAPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"smollm2": SMOLLM2, **{name: str(folder / name) for name in SHAPES}}


def flags(policy: str, folder: Path, sizes: argparse.Namespace) -> list[str]:
    """Of the command line, for fit and estimate."""
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": word * sizes.prompt_tokens} for word in (" film", " movie", " story", " music")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in (rows * sizes.prompts)[: 2 * sizes.prompts]))
    config = folder / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "trainer": {
                    "accelerator": "cpu",
                    "devices": 1,
                    "precision": "32-true",
                    "max_steps": 2,
                    "logger": False,
                    "enable_checkpointing": False,
                    "default_root_dir": str(folder),
                },
                "model": {
                    "class_path": "gopo_lightning.GOPOModule",
                    "init_args": {
                        "policy": {"name": policy},
                        "rollout": {
                            "num_completions": sizes.completions,
                            "sampling": {
                                "max_new_tokens": sizes.completion_tokens,
                                "min_new_tokens": sizes.completion_tokens,
                            },
                        },
                        "rewards": {
                            "sources": [
                                {
                                    "class_path": "gopo_lightning.rewards.FunctionReward",
                                    "init_args": {"function": "gopo_lightning.rewards.examples.distinct_words"},
                                }
                            ]
                        },
                        "update": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6}}},
                    },
                },
                "data": {
                    "class_path": "gopo_lightning.PromptDataModule",
                    "init_args": {
                        "prompts_per_step": sizes.prompts,
                        "apply_chat_template": "never",
                        "max_prompt_tokens": sizes.prompt_tokens,
                        "train": {"path": str(prompts)},
                    },
                },
            }
        )
    )
    return [f"--config={config}"]


def train(arguments: list[str]) -> float:
    """Peak RSS in bytes of this process, after ``fit``."""
    import torch

    from gopo_lightning.commands.lightning_cli import run
    from gopo_lightning.training.callbacks.throughput import peak_memory_bytes

    run(["fit", *arguments])
    return peak_memory_bytes(torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--completion-tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="*", help="of the table; all by default")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    sizes = parser.parse_args()
    if sizes.worker is not None:
        print(json.dumps(train(sizes.worker)))
        return
    from gopo_lightning.commands.run_plan import plan_of
    from gopo_lightning.evaluation.footprint import peak, phases

    print("| policy | estimate GB | measured GB | estimate / measured | fullest phase |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = policies(folder)
        for number, (row, (policy, *further)) in enumerate(ROWS.items()):
            if sizes.rows is not None and number not in sizes.rows:
                continue
            arguments = [*flags(known[policy], folder, sizes), *further]
            planned: Any = plan_of(arguments, cpu=True)
            command = [sys.executable, __file__, "--worker", *arguments]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
            result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if result.returncode:
                raise RuntimeError(f"{row} failed:\n{result.stdout}\n{result.stderr}")
            measured, estimate = json.loads(result.stdout.splitlines()[-1]), peak(planned.plan)
            parts = {phase: sum(value.values()) for phase, value in phases(planned.plan).items()}
            fullest = max(parts, key=lambda phase: parts[phase])
            print(
                f"| {row} | {estimate / 1e9:.2f} | {measured / 1e9:.2f} | {estimate / measured:.2f} | {fullest} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
