"""Options that must be refused before anything is trained: one sentence that says why, and not 0."""

import random
import re
from pathlib import Path

from tests.use import commands, options, policies
from tests.use.invariants import plant, untouched

PER_RUN = 6

MODEL, DATA, TRAINER = "--model.init_args.", "--data.init_args.", "--trainer."
COMPARATOR = (
    '{"class_path": "gopo_lightning.rewards.FunctionComparator", "init_args": {"function": "my_rewards.shorter"}}'
)
REFUSED: list[tuple[tuple[str, ...], str]] = [
    ((MODEL + "rollout.num_completions=1",), "at least 2"),
    ((MODEL + "update.num_minibatches=3",), "num_minibatches"),
    ((MODEL + "update.num_inner_epochs=3",), "use 3"),
    ((MODEL + "objective.loss.kl_estimator=k1",), "Use 'k3' or 'k2'"),
    ((MODEL + "objective.loss.clip_low=2",), r"clip_low=2\.0"),
    ((MODEL + "rollout.sampling.temperature=0",), "greedy"),
    ((MODEL + "rollout.sampling.min_new_tokens=99",), "min_new_tokens is 99"),
    ((MODEL + "update.micro_batch_tokens=0",), "at least 1"),
    ((MODEL + "rewards.combine={function: weighted_sum, init_args: {weights: [1, 2]}}",), "weight"),
    ((MODEL + "rewards.combine=no_such.thing",), "no_such"),
    ((MODEL + f"rewards.sources=[{COMPARATOR}]", MODEL + "rewards.combine=borda"), "borda"),
    ((MODEL + "objective.advantage=ordinals",), "ordinal"),
    ((MODEL + "objective.advantage={function: ordinal, init_args: {tie: average}}",), "tie"),
    ((MODEL + "update.lr_schedule=linnear",), "linnear"),
    ((MODEL + "policy.lora={r: 4, targets: [q_proj]}",), "targets"),
    ((MODEL + "policy.lora={r: 4, lora_dropout: 0.1}",), "lora_dropout"),
    ((MODEL + "policy.name=no/such-folder",), "no/such-folder"),
    ((MODEL + "rollout.engine.init_args.max_rows=0",), "max_rows is 0"),
    ((MODEL + "policy.name=gpt2", MODEL + "rollout.sampling.max_new_tokens=600"), "position"),
    ((DATA + "train.path=no_such.jsonl",), "no_such"),
    ((DATA + "train.prompt_column=text",), "text"),
    ((DATA + "prompts_per_step=100",), "prompts_per_step"),
    ((DATA + "max_prompt_tokens=3",), "max_prompt_tokens"),
    ((TRAINER + "accumulate_grad_batches=2",), "micro_batch_tokens"),
    ((TRAINER + "gradient_clip_val=1",), "max_grad_norm"),
    (("--export_dir", "thesis"), "thesis"),
    (("--export_dir", "."), r"export"),
    (("--ckpt_path", "no_such.ckpt"), "no_such"),
    (("--ckpt_path", "prompts.jsonl"), "prompts.jsonl"),
    ((MODEL + "rollout.num_completes=4",), "num_completes"),
    ((MODEL + "num_completions=4",), r"model\.init_args\.rollout\.num_completions"),
]
"""Arguments, and what the sentence says (a regular expression)."""


def try_all(seed: int, folder: Path, shared: Path) -> tuple[list[str], list[str]]:
    """Some of them, drawn by ``seed``, on a plain run; their command lines and what is wrong."""
    folder.mkdir()
    row = {name: values[0] for name, values in options.OPTIONS.items()}
    row |= {"policy": "llama", "strategy": "single", "which": "vowels", "seed": seed}
    options.write_config(row, folder, shared)
    (folder / "gpt2").symlink_to(policies.folder_of("gpt2", shared))
    planted, lines, problems = plant(folder), [], []
    for extra, pattern in random.Random(seed).sample(REFUSED, PER_RUN):
        ended = commands.run(["fit", "--config", "config.yaml", *extra], folder)
        lines.append(ended.line)
        problems += [f"{' '.join(extra)}: {problem}" for problem in _problems(ended, pattern)]
        if trained := [str(path.relative_to(folder)) for path in folder.rglob("*.ckpt")]:
            problems.append(f"{' '.join(extra)}: trained all the same, and left {trained[0]}")
            break
    return lines, problems + untouched(planted)


def _problems(ended: commands.Ended, pattern: str) -> list[str]:
    said = ended.last_words
    if not ended.is_refused:
        return [f"is not refused by a sentence and exit code 2, but ended with {ended.code}: {said[:300]}"]
    return [] if re.search(pattern, said) else [f"does not name what is wrong ({pattern}): {said[:300]}"]
