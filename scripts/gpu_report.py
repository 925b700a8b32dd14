"""What this GPU says of the paths that only a GPU takes: tests, kernels, and steps beside TRL, in one table.

    python scripts/gpu_report.py --minutes 9 --output gpu_report.json

Models are random, made here from their configurations, so nothing is downloaded. Each part is a process of its own. One
whose packages are missing, that does not fit into the rest of the minutes, or that fails is named; the others go on.
`--quick` runs the parts on a small model, also without a GPU, which shows that they run and nothing else.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORDS = [" film", " movie", " story", " actor", " scene", " music", " light", " voice"]


@dataclass(frozen=True)
class Part:
    """One thing that is measured."""

    name: str
    command: list[str]
    packages: tuple[str, ...] = ()
    seconds: float = 60.0
    """About how long it takes; it is not begun with less left."""
    variables: dict[str, str] = field(default_factory=dict)
    output: Path | None = None
    """Where it leaves its measurements."""

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


def save_model(folder: Path, *, quick: bool) -> None:
    """A random Llama of 1.2 B parameters (quick: of 1 M) and a tokenizer that has the words of `benchmark_step`."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = 1024 if quick else 32_000
    words = ["<pad>", "<eos>", *WORDS]
    vocabulary = {word: n for n, word in enumerate(words + [f" w{n}" for n in range(size - len(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" \w+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=size,
        **(small if quick else sizes),
        num_key_value_heads=2 if quick else 8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def parts(model: Path, folder: Path, *, gpu: bool, quick: bool) -> list[Part]:
    """In the order in which they are worth having."""
    python = sys.executable
    shapes = ["2x64x16x4"] if quick else ["8x128x128x8", "8x512x128x8", "4x1024x256x8", "8x128x512x16"]
    logprobs = ["2x64x16x4~"] if quick else ["8x256x256x8", "8x256x256x8~", "4x1024x256x8~"]
    scoring = ["32x16x4/2"] if quick else ["350x100x8", "350x100x8~", "1024x2048x8/2"]
    accelerator = "gpu" if gpu else "cpu"
    tests = {} if gpu else {"GOPO_CUDA_TESTS_ON": "cpu"}
    chosen = ["-k", "llama or fsdp2"] if quick else []
    found = [
        Part(
            "tests",
            [python, "-m", "pytest", "-q", "-W", "ignore", "tests/test_cuda.py", *chosen],
            ("pytest",),
            120,
            tests,
        ),
        Part("log-probs and gradient", [python, "scripts/benchmark_logprobs.py", "--shapes", *logprobs], (), 40),
        Part("scoring", [python, "scripts/benchmark_scoring.py", "--shapes", *scoring], (), 40),
    ]
    for shape in shapes:
        name = shape.replace("x", " × ")
        output = folder / f"step-{shape}.json"
        step = [python, "scripts/benchmark_step.py", "--model", str(model), "--shapes", shape, "--rounds", "1"]
        step += ["--accelerator", accelerator, "--dtype", "bfloat16" if gpu else "float32"]
        step += ["--sides", "ours", "trl", "--output", str(output)]
        found.append(Part(f"step {name}", step, ("trl",), 90, output=output))
    if gpu:
        engine = [python, "-m", "pytest", "-q", "-W", "ignore", "tests/test_vllm_engine.py"]
        found.append(Part("vLLM", engine, ("vllm", "pytest"), 120))
    return found


def run(part: Part, left: float) -> dict[str, Any]:
    """Its output, or why there is none."""
    if part.missing:
        return {"status": f"left out: {', '.join(part.missing)} not installed"}
    if left < part.seconds:
        return {"status": f"left out: about {part.seconds:.0f} s, and {left:.0f} are left"}
    variables = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **part.variables}
    began = time.monotonic()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(part.command, cwd=ROOT, env=os.environ | variables, start_new_session=True, **pipes)
    try:
        printed, said = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        process.wait()
        return {"status": f"stopped after {left:.0f} s"}
    lines = [line for line in printed.splitlines() if line.strip()]
    failed = [] if process.returncode == 0 else said.strip().splitlines()[-5:]
    status = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "output": lines[-40:], "error": failed}


def device() -> dict[str, Any]:
    """What it is."""
    import torch
    import transformers

    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    return found


def markdown(report: dict[str, Any]) -> str:
    """A row a part, and what each printed."""
    about = ", ".join(f"{name} {value}" for name, value in report["device"].items())
    lines = [about, "", "| part | status | s |", "|---|---|---|"]
    lines += [f"| {name} | {part['status']} | {part.get('seconds', '')} |" for name, part in report["parts"].items()]
    for name, part in report["parts"].items():
        if printed := [*part.get("output", []), *part.get("error", [])]:
            lines += ["", f"**{name}**", "", "```", *printed, "```"]
    return "\n".join(lines)


def main() -> None:
    """Run the parts, print the table, write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, default=Path("gpu_report.json"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    about = device()
    if "gpu" not in about and not options.quick:
        parser.error("there is no GPU here; --quick shows on a CPU that the parts run")
    deadline = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {"device": about, "quick": options.quick, "parts": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", quick=options.quick)
        for part in parts(folder / "model", folder, gpu="gpu" in about, quick=options.quick):
            found = run(part, deadline - time.monotonic())
            if part.output is not None and part.output.exists():
                found["measurements"] = json.loads(part.output.read_text())["measurements"]
            report["parts"][part.name] = found
            print(f"{part.name}: {found['status']}", flush=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{markdown(report)}\n\nwritten to {options.output}")


if __name__ == "__main__":
    main()
