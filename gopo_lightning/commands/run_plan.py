"""A run's configuration as a plan of its memory and operations (`evaluation/footprint.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from gopo_lightning.commands.lightning_cli import GOPOCommandLine, run
from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.evaluation.footprint import REFERENCE, Frozen, Plan
from gopo_lightning.evaluation.sizes import innermost, models_of, policy_sizes
from gopo_lightning.rewards import (
    FunctionComparator,
    FunctionReward,
    HumanRanking,
    LLMJudge,
    LLMScore,
    RankingOracle,
    RecordedReward,
    RubricJudge,
)
from gopo_lightning.rollout import TransformersEngine
from gopo_lightning.training.gopo_module import GOPOModule

_PROCESS = {"gpu": 1.5e9, "cpu": 0.55e9}
"""Bytes of a process beside its tensors: a GPU's context and libraries; Python and its libraries in CPU memory."""
_WITHOUT_MODELS = (
    FunctionReward,
    FunctionComparator,
    RankingOracle,
    RecordedReward,
    LLMJudge,
    LLMScore,
    RubricJudge,
    HumanRanking,
)
_ASSUMED_PROMPT = 512


@dataclass(frozen=True)
class Planned:
    """A configuration's plan, with what it leaves open."""

    plan: Plan
    max_steps: int
    notes: list[str] = field(default_factory=list)


class _Planning(GOPOCommandLine):
    """Builds no strategy: the machine that plans may not have the devices."""

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        trainer = self.config.trainer
        here = {"strategy": "auto", "accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true"}
        here |= {"logger": False, "callbacks": None, "enable_checkpointing": False, "plugins": None}
        self.wanted = {name: trainer.get(name) for name in here}
        for name, value in here.items():
            trainer[name] = value


def plan_of(
    config: Sequence[str], *, gpus: int | None = None, cpu: bool = False, prompt_tokens: int | None = None
) -> Planned:
    """The plan of one rank.

    Args:
        config: flags of the configuration, as for fit.
        gpus: ranks in place of the trainer's devices.
        cpu: the devices are CPUs.
        prompt_tokens: longest prompt, in place of the data module's limit.

    Raises:
        ValueError: the configuration is not of policy training, or its prompts cannot be divided over the ranks.
    """
    cli: Any = run(list(config), instantiate_only=True, command_line=_Planning)
    module, data, wanted = cli.model, cli.datamodule, cli.wanted
    if not isinstance(module, GOPOModule) or not isinstance(data, PromptDataModule):
        raise ValueError(f"estimate looks at policy training, and this is {type(module).__name__}. Name its config.")
    strategy, offload = _strategy(wanted["strategy"])
    ranks = gpus or _ranks(wanted["devices"]) * (wanted["num_nodes"] or 1)
    if data.prompts_per_step % ranks:
        raise ValueError(
            f"prompts_per_step={data.prompts_per_step} cannot be divided over {ranks} ranks. Change one of them."
        )
    notes: list[str] = []
    policy, weight_bytes = policy_sizes(module.policy_config)
    precision = str(wanted["precision"] or "32-true")
    weight_bytes = 2 if precision.endswith("16-true") else weight_bytes
    L = prompt_tokens or data.limit.max_tokens
    if L is None:
        L = _ASSUMED_PROMPT
        notes.append(f"prompts of {L} tokens are assumed: --prompt-tokens or data.max_prompt_tokens says how long")
    P, G, T = data.prompts_per_step // ranks, module.rollout_config.num_completions, module.sampling.max_new_tokens
    frozen: list[Frozen] = []
    if "reference" in module.needs and not module.policy_config.trains_adapter:
        frozen.append(Frozen(REFERENCE, policy, weight_bytes))
    for source in module.reward_config.sources:
        found = list(models_of(source))
        for name, model, each, rows, longest in found:
            length = min(L + T, longest or L + T)
            frozen.append(Frozen(name, model, each, min(rows, P * G) * length, P * G * length))
        if not found and not isinstance(innermost(source), _WITHOUT_MODELS):
            notes.append(f"what '{source.name}' ({type(source).__name__}) holds is not known and not counted")
    engine = module.rollout_config.engine or TransformersEngine()
    if not isinstance(engine, TransformersEngine):
        notes.append(f"sampling is that of TransformersEngine; {type(engine).__name__} holds a model of its own")
    notes += _not_counted(module)
    states, copies, assumed = _optimizer(module.optimizer_callable)
    update = module.update_config
    plan = Plan(
        policy=policy,
        frozen=tuple(frozen),
        P=P,
        G=G,
        L=L,
        T=T,
        ranks=ranks,
        strategy="ddp" if strategy == "single" and ranks > 1 else strategy,
        cpu_offload=offload,
        frozen_models=module.placement.frozen_models,
        rollout_gather="layer" if module.placement.rollout_gather == "layer" else "full",
        weight_bytes=weight_bytes,
        compute_bytes=2 if "16" in precision else weight_bytes,
        optimizer_states=states,
        step_copies=copies,
        gradient_checkpointing=module.policy_config.gradient_checkpointing,
        micro_batch_tokens=update.micro_batch_tokens,
        num_minibatches=update.num_minibatches,
        inner_epochs=update.num_inner_epochs,
        max_rows=getattr(engine, "max_rows", None),
        shared=update.prefix_sharing != "never",
        frozen_logprobs=len(module.needs - ({"old"} if module.updates_per_batch == 1 else set())),
        by_blocks=cpu,
        process=_PROCESS["cpu" if cpu else "gpu"],
    )
    return Planned(plan, cli.trainer.max_steps, notes + assumed)


def _not_counted(module: GOPOModule) -> list[str]:
    """What is done beside the plan."""
    notes = [
        f"objective.also '{term.name}' adds {term.prompts_per_step} groups of {term.num_completions} to the updates, "
        "whose time is not counted"
        for term in module.objective_config.also
    ]
    encoders = [getattr(getattr(each, "clusters", None), "encoder", None) for each in module.reward_config.transforms]
    notes += [
        f"the encoder {encoder}, by which a transform compares texts, is not counted" for encoder in encoders if encoder
    ]
    if not module.update.reads_loss:
        rule = type(module.update).__name__
        notes.append(f"{rule} has no backward pass: less memory and time than what is counted for it")
    return notes


def _strategy(given: Any) -> tuple[Literal["single", "ddp", "fsdp2"], bool]:
    """Which of single, ddp and fsdp2, and whether it offloads.

    Raises:
        ValueError: another one.
    """
    path = given if isinstance(given, str) or given is None else given["class_path"]
    options = {} if isinstance(given, str) or given is None else dict(given.get("init_args") or {})
    name = str(path or "auto").rpartition(".")[2].lower()
    if "fsdp2" in name:
        return "fsdp2", bool(options.get("cpu_offload"))
    if name.startswith("ddp"):
        return "ddp", False
    if name in ("auto", "single_device", "singledevicestrategy"):
        return "single", False
    raise ValueError(f"trainer.strategy={path} is not known to estimate. Use auto, ddp or fsdp2.")


def _ranks(devices: Any) -> int:
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    return int(text) if text.isdigit() and int(text) > 0 else 1  # auto: say --gpus


def _optimizer(build: Any) -> tuple[int, float, list[str]]:
    """Numbers a weight, temporary copies, and what was assumed."""
    optimizer = build([torch.nn.Parameter(torch.zeros(1))])
    defaults, kind = optimizer.defaults, type(optimizer)
    copies = 0.0 if defaults.get("fused") else 1.0
    if isinstance(optimizer, torch.optim.Adam):  # AdamW too
        return (3 if defaults.get("amsgrad") else 2), copies, []
    if kind is torch.optim.SGD:
        return (1 if defaults.get("momentum") else 0), copies, []
    return 2, copies, [f"{kind.__name__} is taken to keep two numbers for each weight, as Adam does"]
