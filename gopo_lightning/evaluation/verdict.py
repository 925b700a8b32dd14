"""In words: can ranks matter under these rewards? From the numbers of `inspection.describe`."""

from collections.abc import Mapping
from typing import Any

ALIKE = 0.99
"""A cosine above this: the two updates are one, whatever a learning rate makes of their lengths."""
MARGIN = 0.02
"""Below what normal rewards give by this much, the shape of the rewards is at work."""


def verdict(found: Mapping[str, Any]) -> list[str]:
    """A sentence that answers, and what follows from the numbers beside it."""
    reward, grpo = found["reward"], found["cosine_with_ordinal"].get("grpo")
    if reward["nan_fraction"] == 1:
        return ["Ranks cannot matter here, because no completion has a valid score."]
    if reward["all_tied_group_fraction"] == 1:
        return [
            "Ranks cannot matter here, and nothing else can be learned either, because all completions of every prompt "
            "have the same reward. Use a finer reward, a second source to break ties (combine: lexicographic), or a "
            "higher temperature."
        ]
    return [_answer(found, grpo), *_remarks(found)]


def _answer(found: Mapping[str, Any], grpo: Mapping[str, float] | None) -> str:
    if grpo is None:
        reason = found["refused"].get("grpo", "its advantage is 0 everywhere")
        return f"Ranks matter here, because GRPO cannot use these rewards at all: {reason}"
    cosine, normal = grpo["within_groups"], found["normal_cosine"]
    numbers = f"within a group the two advantages have a mean cosine of {cosine:.3f}; normal rewards give {normal:.3f}"
    distinct = found["reward"]["distinct_values"]
    if cosine >= ALIKE:
        why = (
            "the reward has two values, and then both advantages separate the same two sets"
            if distinct == 2
            else f"the reward has {distinct} values, so that magnitudes say little more than the order"
            if distinct <= 10
            else "magnitudes and order say the same"
        )
        return f"Ranks cannot matter much here, because {why}: {numbers}."
    if cosine > normal - MARGIN:
        return (
            f"Ranks can matter a little here, as they do for normal rewards, because nothing is extreme: {numbers}. "
            "Differences between GOPO and GRPO will be small and need many seeds to be seen."
        )
    return f"Ranks can matter here, because {_extreme(found)}: {numbers}."


def _extreme(found: Mapping[str, Any]) -> str:
    reward, causes = found["reward"], []
    if abs(reward["skewness"]) > 0.3:
        causes.append(f"rewards are skewed within groups (skewness {reward['skewness']:+.2f})")
    if reward["excess_kurtosis"] > 0.3:
        tails = f"kurtosis {reward['excess_kurtosis']:+.2f} above that of normal rewards"
        causes.append(f"tails within groups are heavy ({tails})")
    if reward["outlier_fraction"] > 0.08:
        causes.append(f"{reward['outlier_fraction']:.0%} of the rewards are outliers")
    return " and ".join(causes) or "magnitudes within a group say something else than the order"


def _remarks(found: Mapping[str, Any]) -> list[str]:
    """What is worth a second thought before training."""
    reward, remarks = found["reward"], []
    if reward["all_tied_group_fraction"] > 0.2:
        remarks.append(
            f"In {reward['all_tied_group_fraction']:.0%} of the groups all completions tie: they teach nothing. A "
            "second source breaks ties (combine: lexicographic)."
        )
    elif reward["tied_pair_fraction"] > 0.2:
        remarks.append(
            f"{reward['tied_pair_fraction']:.0%} of the pairs tie. A second source breaks ties (combine: "
            "lexicographic)."
        )
    if reward["nan_fraction"] > 0.05:
        remarks.append(f"{reward['nan_fraction']:.0%} of the completions have no valid score and leave the loss.")
    if found["truncated_fraction"] > 0.2:
        remarks.append(
            f"{found['truncated_fraction']:.0%} of the completions are cut off. Raise max_new_tokens, or let ending "
            "count (gopo_lightning.rewards.examples.finished)."
        )
    length = found["rank_correlation_with_length"]["combined"]
    if length is not None and length["low"] > 0.2:
        remarks.append(f"Longer completions score higher (τ {length['mean']:+.2f}): expect the policy to write more.")
    if length is not None and length["high"] < -0.2:
        remarks.append(f"Shorter completions score higher (τ {length['mean']:+.2f}): expect the policy to write less.")
    for name, noise in found.get("noise", {}).items():
        if noise["of_within_group_std"] > 0.3:
            remarks.append(
                f"Scoring a completion twice moves {name} by {noise['of_within_group_std']:.0%} of the spread within a "
                f"group, and {noise['changed_pair_fraction']:.0%} of the pairs change order: average several scores."
            )
    for who in ("judge", "people"):
        combined = found.get(f"agreement_with_{who}", {}).get("combined")
        if combined is not None and combined["low"] <= 0.5:
            remarks.append(
                f"The reward orders {combined['mean']:.0%} of the pairs as {who} would, an interval that includes a "
                "coin's 50 %: what it teaches need not be what is wanted."
            )
    return remarks
