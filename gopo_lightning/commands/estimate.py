"""``estimate``: memory of each phase and time of a step, from the configuration alone."""

import argparse
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gopo_lightning.commands.errors import Parser

DESCRIPTION = """\
Before a run: the memory of each phase on a device, whether it fits and what helps most, and the time of a step. Reads
the configurations of the models, no weights. What follows these options goes to the configuration, as in fit.
"""
EXAMPLE = """\
example:
  gopo-lightning estimate --config paper/tldr --config strategy/fsdp2 --gpus 8 \\
    --gpu-memory 80GB --tflops 990
"""
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parser() -> argparse.ArgumentParser:
    """Of the options that are not the configuration's."""
    options = Parser(
        prog="gopo-lightning estimate",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("--gpus", type=int, help="ranks in place of trainer.devices × num_nodes")
    options.add_argument("--gpu-memory", metavar="SIZE", help="of one device, such as 80GB or 24GiB")
    options.add_argument("--cpu", action="store_true", help="the run is on CPUs, whose memory holds the process too")
    options.add_argument("--prompt-tokens", type=int, help="longest prompt [data.max_prompt_tokens, or 512]")
    options.add_argument("--completion-tokens", type=float, help="mean length, for the time [max_new_tokens]")
    options.add_argument("--tokens-per-second", type=float, help="completion tokens sampled by all devices together")
    options.add_argument("--tflops", type=float, help="peak of one device in the precision of the run, in 10^12 / s")
    options.add_argument("--utilisation", type=float, default=0.3, help="share of it in training and scoring [0.3]")
    options.add_argument("--run", type=Path, metavar="FOLDER", help="a measured run, whose throughput is taken")
    return options


def size(text: str) -> float:
    """Bytes of `80GB`, `24GiB`, `500MB`.

    >>> size("80GB"), size("1GiB")
    (80000000000.0, 1073741824.0)

    Raises:
        ValueError: not a number with such a unit.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"--gpu-memory={text!r} is no size. Write a number and GB or GiB: 80GB.")
    return float(found[1]) * _UNITS[(found[2] or "").upper()]


def main(arguments: Sequence[str]) -> None:
    """Print memory, knobs and time."""
    options, config = parser().parse_known_args(list(arguments))
    if not any(argument.startswith("--config") for argument in config):
        raise ValueError("estimate needs the configuration of the run: --config FILE, as for fit")
    for name in ("gpus", "prompt_tokens", "completion_tokens", "tokens_per_second", "tflops"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')}={value}: it must be above 0.")
    if not 0 < options.utilisation <= 1:
        raise ValueError(f"--utilisation={options.utilisation}: it is a share of the peak, above 0 and at most 1.")
    limit = None if options.gpu_memory is None else size(options.gpu_memory)
    from gopo_lightning.commands.run_plan import plan_of

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    planned = plan_of(config, gpus=options.gpus, cpu=options.cpu, prompt_tokens=options.prompt_tokens)
    print("\n".join([*memory_lines(planned, limit), "", *time_lines(planned, options)]))


# --------------------------------------------------------------------------------------------------------------- words


def memory_lines(planned: Any, limit: float | None) -> list[str]:
    """The phases, the verdict, the knobs."""
    from gopo_lightning.evaluation.footprint import knobs, micro_batch, peak, phases

    plan, GB = planned.plan, 1e9
    policy = plan.policy
    lines = [
        f"policy: {policy.weights / 1e6:,.1f} M weights, {policy.trainable / 1e6:,.1f} M trained; {plan.strategy}, "
        f"{plan.ranks} device{'s' * (plan.ranks > 1)}, each with {plan.P} prompts × {plan.G} completions a step",
        f"at most {plan.L} + {plan.T} tokens; micro-batches of {micro_batch(plan):,} tokens",
        *planned.notes,
        "",
    ]
    found = phases(plan)
    for name, parts in found.items():
        listed = sorted(((k, v) for k, v in parts.items() if v >= 1e6), key=lambda item: -item[1])
        words = ", ".join(f"{key} {value / GB:.2f}" for key, value in listed)
        lines.append(f"{name:<22}{sum(parts.values()) / GB:8.2f} GB = {words}")
    most = peak(plan)
    if limit is not None:
        room = limit - most
        lines.append("")
        lines.append(
            f"It fits: {room / GB:.2f} of {limit / GB:.2f} GB stay free."
            if room >= 0.1 * limit
            else f"It is tight: {room / GB:.2f} of {limit / GB:.2f} GB stay free; allocators need about a tenth."
            if room >= 0
            else f"It does not fit: {-room / GB:.2f} GB more than {limit / GB:.2f} GB are needed."
        )
    changes = sorted(((peak(changed), name) for name, changed in knobs(plan).items()))
    if changes:
        lines += ["", "what lowers the peak, each alone:"]
        lines += [f"  {name:<58}{value / GB:8.2f} GB  ({(value - most) / GB:+.2f})" for value, name in changes]
    return lines


def time_lines(planned: Any, options: argparse.Namespace) -> list[str]:
    """Seconds of a step and of the run, and where each number comes from."""
    from dataclasses import replace

    from gopo_lightning.evaluation.footprint import flops

    plan = planned.plan
    measured = {} if options.run is None else throughput(options.run)
    length = options.completion_tokens or measured.get("length") or plan.T
    tokens = plan.ranks * plan.P * plan.G * length
    operations = flops(replace(plan, T=round(length)))
    total = plan.ranks * sum(operations.values())
    lines = [f"a step: {tokens:,.0f} completion tokens, {total / 1e12:,.1f} TFLOP on all devices"]
    seconds: dict[str, float] = {}
    rate = options.tokens_per_second or measured.get("rollout")
    if rate:
        seconds["sampling"] = tokens / rate
    if measured.get("train"):
        seconds["training"] = tokens / measured["train"]
    if "reward" in measured:
        seconds["scoring"] = measured["reward"]
    if options.tflops:
        speed = options.tflops * 1e12 * options.utilisation
        seconds = {name: operations[name] / speed for name in ("scoring", "training")} | seconds
    if not {"sampling", "training"} <= set(seconds):
        missing = [] if "sampling" in seconds else ["--tokens-per-second for sampling"]
        missing += [] if "training" in seconds else ["--tflops for training"]
        lines.append(f"no time without {' and '.join(missing)}; or --run FOLDER of a measured run")
    if seconds:
        parts = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items() if value)
        lines.append(f"{sum(seconds.values()):.3g} s a step: {parts}")
        if options.tflops and not measured.get("train"):
            lines.append(f"scoring and training at {options.utilisation:.0%} of {options.tflops:g} TFLOP/s a device")
        if planned.max_steps > 0 and {"sampling", "training"} <= set(seconds):
            hours = planned.max_steps * sum(seconds.values()) / 3600
            lines.append(f"{hours:.3g} hours for {planned.max_steps} steps, without validation")
    return lines


def throughput(folder: Path) -> Mapping[str, float]:
    """Medians over the steps of a run but its first, of all its devices: tokens per second, seconds, length.

    Raises:
        ValueError: no training run in ``folder``.
    """
    from gopo_lightning.evaluation.event_files import read_runs

    (run, *_), _ = read_runs([folder])
    tags = {
        "rollout": "throughput/rollout_tokens_per_second",
        "train": "throughput/train_tokens_per_second",
        "reward": "seconds/reward",
        "length": "completion/length_mean",
    }
    found = {}
    for name, tag in tags.items():
        values = [value for _, value in sorted(run.scalars.get(tag, {}).items())]
        if values:
            found[name] = statistics.median(values[1:] or values)
    return found
