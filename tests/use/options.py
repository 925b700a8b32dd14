"""The options and their values, rows that cover any two values of two options, and the config of a row."""

import json
import random
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from allpairspy import AllPairs

from gopo_lightning.rollout.engines.precision import cpu_computes_bfloat16
from tests.runs import grouped
from tests.use import policies, rewards

Row = dict[str, Any]

ROLLOUTS = 4
"""Of every run; validation at 0, 2 and 4."""

_LOSS = ("aggregation", "importance_sampling", "mask_truncated", "kl_coef")
_CALIBRATED = {"function": "calibrated", "init_args": {"tau": 0.5}}
_REWARDS = "gopo_lightning.rewards."
_VOWELS = ("FunctionReward", {"function": "my_rewards.vowels"})
_SHORTER = ("FunctionComparator", {"function": "my_rewards.shorter"})
_PERSON = {"reward": {"class_path": _REWARDS + _VOWELS[0], "init_args": _VOWELS[1]}, "hard": True, "name": "person"}

SOURCES: dict[str, dict[str, list[tuple[str, dict[str, Any]]]]] = {
    "function": {
        "vowels": [_VOWELS],
        "brevity": [("FunctionReward", {"function": "my_rewards.brevity"})],
        "missing": [("FunctionReward", {"function": "my_rewards.some_missing", "name": "a/b.c"})],
        "column": [("FunctionReward", {"function": "my_rewards.beside_letter"})],
    },
    "two": {"two": [_VOWELS, ("FunctionReward", {"function": "my_rewards.some_missing"})]},
    "comparator": {
        "shorter": [_SHORTER],
        "judge": [("FunctionComparator", {"function": "my_rewards.shown_first", "both_orders": True})],
        "one order": [("FunctionComparator", {"function": "my_rewards.shown_first", "num_opponents": 2})],
        "person": [("RewardModelComparator", _PERSON)],
    },
    "oracle": {"oracle": [("RankingOracle", {"function": "my_rewards.ranking"})]},
    "mixed": {"mixed": [_SHORTER, _VOWELS]},
    "infinite": {"infinite": [("FunctionReward", {"function": "my_rewards.unbounded"})]},
}
"""Kind of reward sources → one or several such, of which a row draws one."""

_ROLLOUT = "gopo_lightning.rollout."
TRANSFORMS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "none": [],
    "filter": [("RankFilter", {"weights": "bw", "keep": 2})],
    "endings": [("RepetitionPenalty", {}), ("OverlongPenalty", {"buffer_tokens": 5, "coef": 0.25})],
    "history": [("HistoryLength", {"tau": 1.0}), ("SemanticEntropy", {})],
}
"""Of which the first two change no reward."""

OPTIONS: dict[str, list[Any]] = {
    "policy": list(policies.CONFIGS),
    "strategy": ["single", "ddp", "fsdp2"],
    "sources": list(SOURCES),
    "combine": ["weighted_sum", "borda", "lexicographic", "z_score"],
    "transforms": list(TRANSFORMS),
    "refill": [None, 2],
    "advantage": ["ordinal", "calibrated", "odrpo", "grpo", "dr_grpo", "rloo", "batch", "qae"],
    "aggregation": ["token", "sequence", "constant"],
    "importance_sampling": ["token", "sequence"],
    "mask_truncated": [False, True],
    "kl_coef": [0.0, 0.05],
    "lora": [False, True],
    "num_inner_epochs": [1, 2],
    "num_minibatches": [1, 2],
    "micro_batch_tokens": [None, 1, 100],
    "prefix_sharing": ["auto", "always", "never"],
    "max_rows": [None, 1, 8],
    "precision": ["32-true", "bf16-mixed"],
    "lr_schedule": ["constant_with_warmup", "linear", "cosine"],
    "num_completions": [2, 4, 5],
    "eval_num_completions": [1, 3],
    "prompts": ["plain", "chat", "messages"],
    "stop_strings": ["", "a é"],
    "min_new_tokens": [0, 3],
    "max_new_tokens": [10, 32],
    "resume_rollout": [1, 2, 3],
    "logger": ["TensorBoardLogger", "CSVLogger"],
    "then": ["validate", "test", "predict"],
}
"""Every option of a row with its values."""

COLD = 0.1
"""Share of rows whose commands start interpreters of their own, and further ranks as the product does."""

MAGNITUDES = {"grpo", "dr_grpo", "rloo", "batch", "qae"}
"""Advantages that need numbers, so no infinities."""


COMPARED = {"comparator", "oracle"}
"""Sources of which `ordinal` reads the comparisons themselves, so that there is nothing to combine."""


def valid(row: Row) -> bool:
    """Whether the values of ``row``, which may not be complete, can stand together."""
    sources, advantage, combine = row.get("sources"), row.get("advantage"), row.get("combine", "weighted_sum")
    if sources in COMPARED and advantage == "ordinal" and row.get("transforms", "none") not in ("none", "filter"):
        return False
    if sources == "infinite":
        return advantage not in MAGNITUDES and combine != "z_score"
    return not (sources in COMPARED and advantage == "ordinal" and combine != "weighted_sum")


def rows(seed: int) -> list[Row]:
    """Rows in which any two values of two options meet, if they may; others for each seed.

    What no pair needs is drawn: from most rows some values, and all of the reward sources and the seed of the runs.
    """
    rng = random.Random(seed)
    names = sorted(OPTIONS, key=lambda name: -len(OPTIONS[name]))  # the longest first makes the fewest rows
    levels = [rng.sample(OPTIONS[name], len(OPTIONS[name])) for name in names]
    covering = [dict(zip(names, values, strict=True)) for values in AllPairs(levels)]
    found = [repaired for row in covering for repaired in _repaired(row)]
    _redraw(found, rng)
    for row in found:
        row["seed"] = rng.randrange(10**6)
        row["cold"] = rng.random() < COLD
        choices = set(SOURCES[row["sources"]])
        choices -= {"one order"} if row["num_completions"] == 2 else set()  # it asks for two opponents
        row["which"] = rng.choice(sorted(choices))
    rng.shuffle(found)
    return found


def _repaired(row: Row) -> list[Row]:
    """``row``, or some valid ones that together have all of its pairs but those that cannot be."""
    if valid(row):
        return [row]
    found = [row | {"sources": "function"}]
    if row["sources"] == "infinite":
        ordinal = {"advantage": "ordinal"} if row["advantage"] in MAGNITUDES else {}
        ranked = {"combine": "borda"} if row["combine"] == "z_score" else {}
        return [*found, row | ordinal | ranked]
    return [*found, row | {"combine": "weighted_sum", "transforms": "filter"}, row | {"advantage": "rloo"}]


def pairs(row: Row) -> set[frozenset[tuple[str, Any]]]:
    """All pairs of (option, value) in ``row``."""
    return {frozenset(pair) for pair in combinations([(name, row[name]) for name in OPTIONS], 2)}


def _redraw(found: list[Row], rng: random.Random) -> None:
    """Give each option of each row a random value where the rows still cover what they did.

    (A covering array repeats one value wherever it does not matter.)
    """
    count = Counter(pair for row in found for pair in pairs(row))
    for row in found:
        for name in rng.sample(list(OPTIONS), len(OPTIONS)):
            new = row | {name: rng.choice(OPTIONS[name])}
            lost, gained = pairs(row) - pairs(new), pairs(new) - pairs(row)
            if valid(new) and all(count[pair] > 1 for pair in lost):
                count.subtract(lost)
                count.update(gained)
                row.update(new)


def real_rows(found: list[Row]) -> list[Row]:
    """Two of the rows for the pretrained policy, made lighter; one trains all weights and one an adapter."""
    light = {"policy": policies.REAL, "strategy": "single", "cold": False, "max_new_tokens": 10, "num_completions": 2}
    light |= {
        "refill": None,
        "transforms": "none",
        "eval_num_completions": 1,
        "num_inner_epochs": 1,
        "num_minibatches": 1,
        "resume_rollout": 2,
    }
    light |= {} if cpu_computes_bfloat16() else {"precision": "32-true"}  # emulated it is eight times as slow
    able = [row for row in found if row["which"] != "one order"]
    return [row | light | {"lora": bool(k)} for k, row in enumerate(able[:2])]


def ranks(row: Row) -> int:
    """Processes of the row's runs."""
    return 1 if row["strategy"] == "single" else 2


def updates(row: Row) -> int:
    """Optimiser steps of a rollout."""
    return int(row["num_inner_epochs"] * row["num_minibatches"])


def write_config(row: Row, folder: Path, shared: Path) -> Path:
    """``config.yaml``, the prompts and the reward functions of ``row`` in ``folder``; policies lie in ``shared``."""
    shutil.copy(rewards.__file__, folder / "my_rewards.py")
    (folder / "prompts.jsonl").write_text("".join(_prompt_lines(row["prompts"])), encoding="utf-8")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(row, policies.folder_of(row["policy"], shared)), sort_keys=False))
    return path


def config(row: Row, policy: Path) -> dict[str, Any]:
    """The config of ``row``."""
    is_real = row["policy"] == policies.REAL
    sources = SOURCES[row["sources"]][row["which"]]
    source = {"path": "prompts.jsonl"} | ({"messages_column": "turns"} if row["prompts"] == "messages" else {})
    init_args: dict[str, Any] = {
        "policy": {"name": str(policy)},
        "rewards": [{"class_path": _REWARDS + name, "init_args": values} for name, values in sources],
        "combine": row["combine"],
        "transforms": [
            {"class_path": _ROLLOUT + name, "init_args": values} for name, values in TRANSFORMS[row["transforms"]]
        ],
        "refill": row["refill"],
        "advantage": _CALIBRATED if row["advantage"] == "calibrated" else row["advantage"],
        "loss": {
            "class_path": "gopo_lightning.objectives.ClippedSurrogate",
            "init_args": {
                name: row[name] for name in ("aggregation", "importance_sampling", "mask_truncated", "kl_coef")
            },
        },
        "sampling": {
            "max_new_tokens": row["max_new_tokens"],
            "min_new_tokens": row["min_new_tokens"],
            "stop_strings": row["stop_strings"].split(),
        },
        "engine": {
            "class_path": "gopo_lightning.rollout.TransformersEngine",
            "init_args": {"prefix_sharing": row["prefix_sharing"], "max_rows": row["max_rows"]},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.0}},
    }
    if row["lora"]:
        targets = policies.LORA_TARGETS.get(row["policy"], ["q_proj", "v_proj"])
        init_args["policy"]["lora"] = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    elif is_real:
        init_args["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-2}}  # no moments to store
    for name in (
        "lr_schedule",
        "num_completions",
        "eval_num_completions",
        "num_inner_epochs",
        "num_minibatches",
        "micro_batch_tokens",
        "prefix_sharing",
    ):
        init_args[name] = row[name]
    init_args["warmup_steps"] = 2
    data: dict[str, Any] = {"prompts_per_step": 4, "train": source, "val_prompts_per_step": 2}
    data |= {name: source | {"limit": 5} for name in ("validation", "test", "predict")}
    if row["prompts"] == "chat":
        data["system_prompt"] = "Be brief."
    every_n_steps = updates(row) * (2 if is_real else 1)
    keeper = {"every_n_train_steps": every_n_steps, "save_top_k": -1, "filename": "step{step}"}
    return {
        "seed_everything": row["seed"],
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks(row),
            "strategy": "auto" if row["strategy"] == "single" else row["strategy"],
            "precision": row["precision"],
            "max_steps": ROLLOUTS * updates(row),
            "val_check_interval": 2,
            "logger": {"class_path": row["logger"], "init_args": {"save_dir": "runs", "name": "first"}},
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": keeper | {"auto_insert_metric_name": False}},
                {"class_path": "gopo_lightning.callbacks.ProgressBar"},
                {"class_path": "gopo_lightning.callbacks.SampleTable", "init_args": {"every_n_steps": 2}},
            ],
        },
        "model": {"class_path": "gopo_lightning.GOPOModule", "init_args": grouped(init_args)},
        "data": {"class_path": "gopo_lightning.PromptDataModule", "init_args": data},
    }


_TEXTS = ("say ab", "zwei\u2028Zeilen", "naïve 🎈 [/b]", 'a "quoted"\n\tword', "next\u0085line")


def _prompt_lines(kind: str) -> list[str]:
    """Twelve prompts of unequal lengths, with what web pages hold; a column that rewards can read."""
    found = []
    for number in range(12):
        text = _TEXTS[number % len(_TEXTS)] * (number % 4 + 1)
        row: dict[str, Any] = {"prompt": text, "letter": "abc"[number % 3]}
        if kind == "messages":
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
            row = {"turns": turns * (number % 2) + turns, "letter": row["letter"]}
        found.append(json.dumps(row, ensure_ascii=False) + "\n")
    return found
