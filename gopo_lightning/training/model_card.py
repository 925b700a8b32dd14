"""The model card of an export, in the hub's format: what was trained, how, on what, and what came of it.

It is written from the run's record, plain values that every checkpoint holds (`callbacks.run_record`), so that an
export of a checkpoint says what the export at the end of the run says.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

PROJECT, PAPER = "gopo_lightning", "https://arxiv.org/abs/2602.03876"
_MEANING = {
    "val/reward": "mean combined reward of the validation completions",
    "val/win_rate": "completions that win against those of the policy before training, by the combined reward, ties "
    "one half; 0.5 is no difference",
    "val/length_mean": "mean tokens of a completion",
    "val/truncated_fraction": "completions cut off at the token limit",
    "val/pair_accuracy": "held-out pairs of clearly different ratings that the scores order as people did",
    "val/pair_accuracy_all": "the same over all held-out pairs",
    "val/loss": "log-loss of the held-out pairs, in nats",
    "val/calibration_error": "expected calibration error of the preference between two texts",
    "val/length_bias": "rank correlation of scores and lengths",
    "val/spearman": "rank correlation of scores and human ratings (Spearman)",
    "val/kendall": "rank correlation of scores and human ratings (Kendall)",
}


def model_card(record: Mapping[str, Any], *, step: int, is_adapter: bool, chosen: str | None = None) -> str:
    """Markdown with a YAML front matter that `huggingface_hub.ModelCard` reads. No licence: that is the user's to add.

    Args:
        record: of the run, see `RunRecord`; what it lacks is left out.
        step: optimiser steps that made the weights.
        is_adapter: the folder holds an adapter, not a whole model.
        chosen: how these weights were chosen, if they are not the last.
    """
    settings = record.get("settings", {})
    is_policy = record.get("kind") != "reward model"
    base, revision = record.get("base_model") or (None, None)
    data = record.get("data", {})
    tags = [PROJECT, "reinforcement-learning", "gopo"] if is_policy else [PROJECT, "reward-model"]
    front = ModelCardData(
        base_model=base if base and _on_hub(base) else None,
        datasets=sorted({source["path"] for source in data.values() if source["is_hub"]}) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation" if is_policy else "text-classification",
        tags=tags,
    )
    name = Path(base).name if base else "language model"
    kind = "trained on ranked rewards" if is_policy else "as a reward model"
    rows = {
        "Base model": base and _code(base) + (f", revision {_code(revision)}" if revision else ""),
        "Weights": "a LoRA adapter, to be loaded on the base model" if is_adapter else "all",
        **{f"Data, {part}": _source(source) for part, source in data.items()},
        **(_policy_method(settings) if is_policy else _reward_model_method(settings)),
        "Optimiser": _options(settings.get("optimizer")),
        "Optimiser steps": f"{step}{f' ({chosen})' if chosen else ''}",
        "Trained by": record.get("command") and _code(record["command"]),
        "Versions": ", ".join(f"{library} {number}" for library, number in record.get("versions", {}).items()),
    }
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name}, {kind}",
        f"Trained with {PROJECT}"
        + (f" ([GOPO and its relatives, arXiv 2602.03876]({PAPER}))." if is_policy else " on comparisons."),
        _table(("", ""), ((key, value) for key, value in rows.items() if value)),
        "## Results\n\n" + _results(record.get("validations", []), step),
        "## Use\n\n" + _use(is_policy, is_adapter),
        "## Licence\n\nNot set: it is for whoever publishes this model to choose, within the licences of the base "
        "model and of the data.",
    ]
    return "\n\n".join(parts) + "\n"


def _on_hub(name: str) -> bool:
    return not name.startswith("packaged:") and not Path(name).expanduser().exists() and name.count("/") <= 1


def _source(source: Mapping[str, Any]) -> str:
    options = [f"{key} {source[key]}" for key in ("name", "split", "revision") if source.get(key)]
    rows = [f"the first {source['limit']} rows"] if source.get("limit") else []
    return ", ".join([_code(source["path"]), *options, *rows])


def _policy_method(settings: Mapping[str, Any]) -> dict[str, str | None]:
    rewards, objective, rollout = (settings.get(group, {}) for group in ("rewards", "objective", "rollout"))
    sources = rewards.get("sources", [])
    combined = f", combined by {_options(rewards.get('combine'))}" if len(sources) > 1 else ""
    transforms = [_options(transform) for transform in rewards.get("transforms", [])]
    sampling = rollout.get("sampling", {})
    sampled = (
        f"{rollout.get('num_completions')} a prompt, at most {sampling.get('max_new_tokens')} tokens, temperature "
        f"{sampling.get('temperature')}"
    )
    return {
        "Rewards": ", ".join(map(_code, sources)) + combined,
        "Transforms": ", ".join(filter(None, transforms)),
        "Advantage": _options(objective.get("advantage")),
        "Credit": _options(objective.get("credit")),
        "Loss": _options(objective.get("loss")),
        "Completions": sampled if rollout else None,
    }


def _reward_model_method(settings: Mapping[str, Any]) -> dict[str, str | None]:
    scaled = {key: settings.get(key) for key in ("margin_scale", "centring_coef") if settings.get(key)}
    return {"Loss": settings.get("objective") and _options({"class": settings["objective"], **scaled})}


def _options(described: Any) -> str | None:
    """A function or class with its options.

    >>> _options({"class": "ClippedSurrogate", "clip_high": 0.2, "kl_coef": 0.0, "clip_ceiling": None})
    '`ClippedSurrogate` (clip_high 0.2, kl_coef 0.0)'
    """
    if not described:
        return None
    options = {**described, **described.get("init_args", {})}
    options.pop("init_args", None)
    name = options.pop("function", None) or options.pop("class", "")
    shown = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    return _code(name) + (f" ({shown})" if shown else "")


def _results(validations: Iterable[Mapping[str, Any]], step: int) -> str:
    """Those up to ``step``, whose weights these are."""
    found = {validation["step"]: validation["metrics"] for validation in validations if validation["step"] <= step}
    if not found:
        return "No validation ran."
    tags = sorted({tag for metrics in found.values() for tag in metrics}, key=_importance)
    rows = ((_code(tag), *(_number(metrics.get(tag)) for metrics in found.values()), _meaning(tag)) for tag in tags)
    return _table(("metric", *(f"step {step}" for step in found), "what it is"), rows)


def _importance(tag: str) -> tuple[int, str]:
    known = list(_MEANING)
    return (known.index(tag) if tag in known else len(known), tag)


def _meaning(tag: str) -> str:
    """Of one reward source as of all."""
    _, _, name = tag.partition("/")
    source, _, what = name.rpartition("/")
    of_source = _MEANING.get(f"val/{what}") if source and what in ("reward", "win_rate") else None
    if of_source is not None:
        return f"of {_code(source)} alone: {of_source.replace(' combined', '').replace('the reward', 'its reward')}"
    return _MEANING.get(tag, "")


def _number(value: float | None) -> str:
    return "" if value is None else "none" if value != value else f"{value:.4g}"


def _use(is_policy: bool, is_adapter: bool) -> str:
    if not is_policy:
        return (
            "Name this folder as the `model` of a `gopo_lightning.rewards.SequenceClassifierReward`, or load it with "
            "`AutoModelForSequenceClassification`."
        )
    needs = " where peft is installed, with its base model" if is_adapter else ""
    return f"`AutoModelForCausalLM.from_pretrained(FOLDER)` loads it{needs}; `AutoTokenizer` loads its tokenizer."


def _code(text: str) -> str:
    """Inline code that stays within a cell of a table.

    >>> _code("a|b")
    '`a\\\\|b`'
    """
    one_line = " ".join(str(text).split()).replace("|", "\\|")
    return f"``{one_line}``" if "`" in one_line else f"`{one_line}`"


def _table(header: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ("---",) * len(header), *map(tuple, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
