"""What a training step needs of a device: bytes, phase by phase, and floating-point operations. Pure formulas.

Letters as in `types.py`: P prompts of this rank in a step, G completions each, L tokens of a prompt, T of a completion,
V vocabulary. All lengths are the longest that the configuration allows, so the bytes are those of a full
step; sums of tensors, without what an allocator keeps or a kernel borrows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Bytes: TypeAlias = dict[str, float]
"""What is in memory at one time, by name."""
_CHUNK = 1024
"""Tokens whose logits exist at once (`policy/logprobs.py`)."""
_FLOAT32 = 4
REFERENCE = "reference"
"""Name of the frozen policy."""


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder-only transformer."""

    weights: int
    """All parameters, an adapter's included."""
    trainable: int
    """Those of them that are trained."""
    matmul: int
    """Parameters of linear layers without the LM head: those that each token is multiplied with."""
    largest_layer: int
    """Parameters of the largest part that FSDP2 gathers at once: a decoder layer, or the embeddings with the head."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    """Query heads · head size."""
    kv_heads: int
    """Key and value heads · head size."""
    vocabulary: int


@dataclass(frozen=True)
class Frozen:
    """A model beside the policy."""

    name: str
    model: Decoder
    weight_bytes: int
    """Of one parameter."""
    tokens: int = 0
    """Of one forward pass: rows · length."""
    all_tokens: int = 0
    """That it reads in a step on this rank."""


@dataclass(frozen=True)
class Plan:
    """A configuration, as far as it decides memory and operations on one rank."""

    policy: Decoder
    frozen: tuple[Frozen, ...] = ()
    P: int = 1
    G: int = 8
    L: int = 512
    T: int = 128
    ranks: int = 1
    strategy: Literal["single", "ddp", "fsdp2"] = "single"
    cpu_offload: bool = False
    frozen_models: Literal["replicate", "shard", "offload"] = "replicate"
    rollout_gather: Literal["full", "layer"] = "full"
    weight_bytes: int = 4
    """Of a master weight."""
    compute_bytes: int = 2
    """Of a number in a matrix product."""
    optimizer_states: int = 2
    """Numbers kept for each trained weight."""
    step_copies: float = 1.0
    """Temporary copies of the gradients in an optimiser step."""
    gradient_checkpointing: bool = False
    micro_batch_tokens: int | None = None
    num_minibatches: int = 1
    inner_epochs: int = 1
    max_rows: int | None = None
    shared: bool = True
    """Whether a group's prompt is forwarded once."""
    frozen_logprobs: int = 0
    """Forwards of policy-sized models without gradient in a step: old, reference, iterate."""
    by_blocks: bool = False
    """Whether logits become float32 a few rows at a time, as on CPUs."""
    process: float = 0.0
    """Of the process itself: libraries, or a GPU's context."""

    @property
    def shards(self) -> int:
        """Ranks that a weight is divided over."""
        return self.ranks if self.strategy == "fsdp2" else 1


# ------------------------------------------------------------------------------------------------------------- memory


def phases(plan: Plan) -> dict[str, Bytes]:
    """What is in a device's memory in each phase of a step, at its fullest."""
    found = {"sampling": {**resident(plan), **sampling(plan)}}
    if any(model.tokens for model in plan.frozen):
        found["scoring"] = {**resident(plan), **scoring(plan)}
    found["forward and backward"] = {**resident(plan), **gradients(plan), **training(plan)}
    found["optimiser step"] = {**resident(plan), **gradients(plan), **stepping(plan)}
    return found


def peak(plan: Plan) -> float:
    """Bytes of the fullest phase."""
    return max(sum(parts.values()) for parts in phases(plan).values())


def resident(plan: Plan) -> Bytes:
    """In every phase: master weights / shards, states · trained weights / shards, and frozen models where they wait.

    FSDP2's `cpu_offload` keeps weights and states in CPU memory, `frozen_models: offload` the frozen models.
    """
    policy, on_device = plan.policy, 0 if plan.cpu_offload else 1
    divided = plan.ranks if plan.frozen_models == "shard" else 1
    waiting = 0 if plan.frozen_models == "offload" else 1
    return {
        "process": plan.process,
        "weights": on_device * policy.weights * plan.weight_bytes / plan.shards,
        "optimiser states": on_device * plan.optimizer_states * policy.trainable * plan.weight_bytes / plan.shards,
        **{f.name: waiting * f.model.weights * f.weight_bytes / divided for f in plan.frozen},
    }


def gradients(plan: Plan) -> Bytes:
    """From the first backward to the end of the step: trained weights / shards, under DDP twice (its buckets)."""
    copies = 2 if plan.strategy == "ddp" else 0 if plan.cpu_offload else 1
    return {"gradients": copies * plan.policy.trainable * plan.weight_bytes / plan.shards}


def sampling(plan: Plan) -> Bytes:
    """A copy of the linear weights in the precision of sampling where it is another one (under FSDP2 of all weights,
    or with `rollout_gather: layer` of two layers); keys and values, 2 · layers · kv_heads of each token, of prompts
    once a group; and the logits of all rows decoded together with two copies in float32
    (on CPUs of a few rows).
    """
    policy, groups = plan.policy, _groups_at_once(plan)
    rows = groups * plan.G
    tokens = groups * plan.L + rows * plan.T if plan.shared else rows * (plan.L + plan.T)
    if plan.strategy == "fsdp2" and plan.ranks > 1:
        copied = policy.weights if plan.rollout_gather == "full" else 2 * policy.largest_layer
    else:
        copied = _matmul(policy) if plan.compute_bytes != plan.weight_bytes else 0
    return {
        "weights for sampling": copied * plan.compute_bytes,
        "keys and values": 2 * policy.layers * policy.kv_heads * tokens * plan.compute_bytes,
        "logits": rows * policy.vocabulary * (plan.compute_bytes + (0 if plan.by_blocks else 2 * _FLOAT32)),
    }


def scoring(plan: Plan) -> Bytes:
    """The largest frozen model at work: where it waited elsewhere its weights (sharded: two layers), and of a forward
    without gradient the residual, attention and one MLP of each token.
    """
    used = []
    for frozen in (f for f in plan.frozen if f.tokens):
        model = frozen.model
        brought = {"replicate": 0, "shard": 2 * model.largest_layer, "offload": model.weights}[plan.frozen_models]
        numbers = 3 * model.hidden + 2 * model.heads + 2 * model.kv_heads + 3 * model.intermediate
        used.append(brought * frozen.weight_bytes + frozen.tokens * numbers * frozen.weight_bytes)
    return {"reward model at work": max(used, default=0)}


def training(plan: Plan) -> Bytes:
    """Of one micro-batch of M tokens: what backward reads of each layer (`activations`); the logits of a chunk with
    their gradient and a float32 copy (on CPUs of a few rows); the casts of the linear weights that autocast keeps for
    backward, or under FSDP2 two gathered layers. With gradient checkpointing the input of each layer, and then the
    logits or one layer, whichever is more.
    """
    policy, tokens = plan.policy, micro_batch(plan)
    layer = activations(policy, plan.compute_bytes)
    kept = policy.layers * (policy.hidden * _FLOAT32 if plan.gradient_checkpointing else layer)
    if plan.strategy == "fsdp2" and plan.ranks > 1:
        copied = 2 * policy.largest_layer
    else:
        copied = _matmul(policy) if plan.compute_bytes != plan.weight_bytes else 0
    each = 2 * plan.compute_bytes + (0 if plan.by_blocks else _FLOAT32)
    logits = min(_CHUNK, tokens) * policy.vocabulary * each
    again = tokens * layer if plan.gradient_checkpointing else 0
    return {
        "weights for training": copied * plan.compute_bytes,
        "activations": tokens * (kept + 3 * policy.hidden * _FLOAT32),
        **({"logits": logits} if logits >= again else {"a layer again": again}),
    }


def activations(policy: Decoder, compute_bytes: int) -> float:
    """Bytes that backward reads of one token in one layer of a Llama, by what autograd saves.

    Each linear layer saves its input, attention query, key, value and output, the activation of the MLP its three
    factors, in the precision of products: 2 hidden + 2 heads + 2 kv_heads + 4 intermediate. The two norms save their
    input and what they normalised in float32: 4 hidden. Attention's square of scores is never kept.
    """
    products = 2 * policy.hidden + 2 * policy.heads + 2 * policy.kv_heads + 4 * policy.intermediate
    return compute_bytes * products + _FLOAT32 * 4 * policy.hidden


def stepping(plan: Plan) -> Bytes:
    """Temporary copies of the gradients; an optimiser that updates all weights in one kernel (`fused`) needs none."""
    return {"temporaries": plan.step_copies * plan.policy.trainable * plan.weight_bytes / plan.shards}


def micro_batch(plan: Plan) -> int:
    """M, tokens of the largest micro-batch: whole groups within the budget, at least one."""
    group = plan.L + plan.G * plan.T if plan.shared else plan.G * (plan.L + plan.T)
    groups = max(plan.P // plan.num_minibatches, 1)
    if plan.micro_batch_tokens is not None:
        groups = min(groups, max(plan.micro_batch_tokens // group, 1))
    return groups * group


def _groups_at_once(plan: Plan) -> int:
    return plan.P if plan.max_rows is None else min(plan.P, max(plan.max_rows // plan.G, 1))


def _matmul(model: Decoder) -> int:
    """Linear weights with the LM head."""
    return model.matmul + model.vocabulary * model.hidden


def knobs(plan: Plan) -> dict[str, Plan]:
    """What a user could set, and the plan with it; only what changes something."""
    group = plan.L + plan.G * plan.T
    options: dict[str, Plan] = {
        "policy.gradient_checkpointing: true": replace(plan, gradient_checkpointing=True),
        f"update.micro_batch_tokens: {group} (a group at a time)": replace(plan, micro_batch_tokens=group),
        f"rollout.engine max_rows: {plan.G} (a group at a time)": replace(plan, max_rows=plan.G),
        "placement.frozen_models: offload": replace(plan, frozen_models="offload"),
        "policy.lora: {r: 16, target_modules: all-linear}": replace(
            plan,
            policy=with_lora(plan.policy, 16),
            frozen=tuple(f for f in plan.frozen if f.name != REFERENCE),  # the adapter's base is its reference
        ),
    }
    if plan.ranks > 1:
        options["trainer.strategy: fsdp2"] = replace(plan, strategy="fsdp2")
    if plan.ranks > 1 and plan.strategy == "fsdp2":
        options["placement.rollout_gather: layer"] = replace(plan, rollout_gather="layer")
        options["placement.frozen_models: shard"] = replace(plan, frozen_models="shard")
    return {name: changed for name, changed in options.items() if peak(changed) < peak(plan)}


def with_lora(policy: Decoder, r: int) -> Decoder:
    """The same under LoRA of rank ``r`` on all linear layers of a Llama: r weights for each of their sides."""
    sides = 4 * policy.hidden + 2 * policy.heads + 2 * policy.kv_heads + 3 * (policy.hidden + policy.intermediate)
    trainable = min(r * policy.layers * sides, policy.trainable)
    return replace(policy, weights=policy.weights + trainable, trainable=trainable)


# --------------------------------------------------------------------------------------------------------- operations


def forward_flops(model: Decoder, tokens: float, pairs: float, head_tokens: float) -> float:
    """2 · linear weights a token, 2 · hidden · V where the head reads it, 4 · heads a layer and pair of positions."""
    head = 2 * model.hidden * model.vocabulary * head_tokens
    return 2 * model.matmul * tokens + head + 4 * model.heads * model.layers * pairs


def flops(plan: Plan) -> Mapping[str, float]:
    """Operations of a step on one rank, by phase.

    Sampling is one forward over L + G·T tokens a group. Training is a forward and twice that backward (once without
    gradients of the base's weights, under LoRA), with gradient checkpointing one forward more, in each inner epoch;
    frozen log-probs are a forward each.
    """
    P, G, L, T, policy = plan.P, plan.G, plan.L, plan.T, plan.policy
    pairs = P * (L * L / 2 + G * (L * T + T * T / 2))
    once = forward_flops(policy, P * (L + G * T), pairs, P * G * T)
    tokens = P * (L + G * T) if plan.shared else P * G * (L + T)
    step = forward_flops(policy, tokens, pairs if plan.shared else P * G * (L + T) ** 2 / 2, P * G * T)
    times = 3.0 if policy.trainable == policy.weights else 2.0
    times += 1.0 if plan.gradient_checkpointing else 0.0
    scored = sum(
        forward_flops(f.model, f.all_tokens, f.all_tokens * (L + T) / 2, 0) for f in plan.frozen if f.all_tokens
    )
    training_flops = step * (times * plan.inner_epochs + plan.frozen_logprobs)
    return {"sampling": once, "scoring": scored, "training": training_flops}
