"""What holds after a run, whatever its options: each function returns what is wrong, as sentences."""

import hashlib
import itertools
import math
import re
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gopo_lightning.policy.model import PolicyConfig, load_policy
from tests.use.reading import Curves, at, checkpoint, differences, state

MEASURED = ("train/", "reward/", "completion/", "val/")
"""Tags that a seed determines; others are times."""
PER_RANK = ("train/padding_fraction",)
"""They depend on how prompts are split over ranks."""
MAY_BE_NAN = re.compile(r"reward/.*(std|rank_correlation|tie_fraction|cyclic_triad_fraction|first_bias).*")
"""Undefined where too few completions or comparisons have a value."""
MAY_BE_INFINITE = re.compile(r"(reward|val|test)/.*(mean|std|reward)$")
"""Means of rewards of which some are infinite."""

TEXT = "A short text, which every policy can read."
EXPORT_TOLERANCE = 1e-5


def logged(curves: Curves, *, rollouts: int, updates: int) -> list[str]:
    """Every rollout and every validation has left its values."""
    problems = []
    expected = {"train/loss": range(1, rollouts + 1), "reward/mean": range(1, rollouts + 1), "val/win_rate": (0, 2, 4)}
    for tag, steps in expected.items():
        want, got = [step * updates for step in steps], sorted(curves.get(tag, {}))
        if want != got:
            problems.append(f"{tag} was logged at the steps {got}, not {want}")
    return problems


def finite(curves: Curves, *, infinite_rewards: bool) -> list[str]:
    """No NaN and no infinity but where its definition has one."""
    problems = []
    for tag, values in curves.items():
        for step, value in values.items():
            allowed = MAY_BE_NAN.fullmatch(tag) or (infinite_rewards and MAY_BE_INFINITE.fullmatch(tag))
            if not math.isfinite(value) and not allowed:
                problems.append(f"{tag} is {value} at step {step}")
    return problems


def untrained_ties(curves: Curves) -> list[str]:
    """The policy of step 0 is the reference, so it wins exactly half."""
    value = curves.get("val/win_rate", {}).get(0)
    return [] if value == 0.5 else [f"val/win_rate of the untrained policy is {value}, not 0.5"]


def steps_with_a_gradient(curves: Curves, steps: list[int]) -> list[int]:
    """``steps`` before the first rollout whose rewards all tie; at step 0 there is a validation alone.

    Its gradient is that of the KL alone, at the reference 0 but for rounding, and Adam scales rounding to whole steps.
    """
    spread = curves["reward/within_group_std"]
    return list(itertools.takewhile(lambda step: step == 0 or spread[step] > 0, steps))


def same_curves(mine: Curves, other: Curves, steps: list[int], what: str, tolerance: float = 0.0) -> list[str]:
    """Both have the same values at ``steps``; with a tolerance, but those that depend on the ranks."""
    problems = []
    for step in steps:
        values = [at(curves, step, *MEASURED) for curves in (mine, other)]
        if tolerance:
            values = [{tag: value for tag, value in side.items() if tag not in PER_RANK} for side in values]
        problems += [f"{what}, step {step}: {line}" for line in differences(*values, tolerance)]
    return problems


def same_end(mine: Path, other: Path, step: int, what: str) -> list[str]:
    """Both runs end with the same weights, moments and learning rates, bit for bit."""
    paths = [checkpoint(run, step) for run in (mine, other)]
    if missing := [str(path) for path in paths if not path.exists()]:
        return [f"{what}: there is no {', '.join(missing)}"]
    return [f"{what}: {line}" for line in differences(*map(state, paths))][:3]


@torch.no_grad()
def same_export(export: Path, final: Path, policy: PolicyConfig) -> list[str]:
    """The exported folder, read by transformers and peft alone, is the policy of the checkpoint ``final``."""
    trained = load_policy(policy)
    weights = {k.removeprefix("policy."): v for k, v in torch.load(final, weights_only=True)["state_dict"].items()}
    unknown = trained.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        return [f"the checkpoint holds {unknown[:3]}, which the policy has not"]
    if (export / "adapter_config.json").exists():
        base = PeftConfig.from_pretrained(str(export)).base_model_name_or_path
        exported = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(export)
        )
    else:
        exported = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokens_1T = torch.tensor([AutoTokenizer.from_pretrained(export)(TEXT)["input_ids"]])
    mine, its = (m.eval()(tokens_1T, use_cache=False).logits.float().log_softmax(-1) for m in (trained, exported))
    worst = float((mine - its).abs().max())
    ok = worst <= EXPORT_TOLERANCE
    return [] if ok else [f"log-probs of the exported policy differ by {worst:.3g} from the trained one's"]


def plant(folder: Path) -> dict[Path, str]:
    """Files of the user's in and beside the folders that runs write to, with their digests."""
    for place in ("thesis", "runs", "runs/first", "exports"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "chapter1.txt").write_text(f"of {place}")
    return digests([path for path in folder.rglob("*") if path.is_file()])


def digests(paths: list[Path]) -> dict[Path, str]:
    """Path → SHA-256 of its content."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def untouched(planted: dict[Path, str]) -> list[str]:
    """The user's files are as they were."""
    lost = [str(path) for path in planted if not path.exists()]
    changed = [
        str(path) for path, digest in digests([p for p in planted if p.exists()]).items() if digest != planted[path]
    ]
    return [f"deleted: {path}" for path in lost] + [f"changed: {path}" for path in changed]


def no_leftovers(folder: Path) -> list[str]:
    """Nothing half written, no safety copy, no lock."""
    return [
        f"left behind: {path.relative_to(folder)}"
        for path in folder.rglob("*")
        if re.search(r"\.(writing|old)-", path.name)
    ]
