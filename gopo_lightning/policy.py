"""The policy: any Hugging Face causal LM, optionally with LoRA; its tokenizer; its frozen reference."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gopo_lightning import assets
from gopo_lightning.layers import compile_layers
from gopo_lightning.security import load_weights

Policy: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class PolicyConfig:
    """Which causal LM to train, and how it is loaded."""

    name: str
    """Hub name, local folder, or `packaged:smollm2-135m-instruct`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the master weights. Keep float32 and set `trainer.precision: bf16-mixed`: at a learning rate of 1e-6 updates
    to bfloat16 weights round to nothing."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, …; transformers' default when null."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""
    lora: dict[str, Any] | None = None
    """Arguments of `peft.LoraConfig` (r, lora_alpha, target_modules, …); null trains all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    compile: bool = False
    """`torch.compile` the decoder layers for training: less memory and time, for half a minute at the first step.
    Sampling stays as it is."""
    chat_template: str | None = None
    """Jinja chat template that replaces the tokenizer's."""

    def __post_init__(self) -> None:
        if self.lora is not None and self.lora.get("lora_dropout", 0) != 0:
            raise ValueError(
                f"policy.lora.lora_dropout={self.lora['lora_dropout']}: dropout makes the trained policy differ from "
                "the one that sampled, so the policy ratio would be noise. Set it to 0."
            )

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """``dtype`` as torch knows it; None for that of the files."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    def model_options(self) -> dict[str, Any]:
        """How transformers is to build the model, whichever way its weights come."""
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        return options


def load_policy(config: PolicyConfig, base: PreTrainedModel | None = None) -> Policy:
    """The trainable policy: master weights in ``config.dtype``, dropout off, LoRA and the like as configured.

    ``base`` is the model to train if it is there already.
    """
    model = _load_base(config) if base is None else base
    _disable_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy: Policy = model
    if config.lora is not None:
        policy = cast(Policy, get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config.lora)))
    if config.compile:
        compile_layers(policy)
    return policy


def load_reference(config: PolicyConfig) -> PreTrainedModel:
    """The frozen policy of step 0: eval mode, no gradients."""
    return _load_base(config).requires_grad_(False).eval()


@contextmanager
def reference_of(policy: Policy, frozen: PreTrainedModel | None) -> Iterator[nn.Module]:
    """The reference model of ``policy``: under LoRA its own base with the adapter off, else ``frozen``.

    Raises:
        ValueError: full-weight training without a frozen copy.
    """
    if frozen is None and not isinstance(policy, PeftModel):
        raise ValueError("a fully trained policy has no reference in itself; load a frozen copy with load_reference")
    with policy.disable_adapter() if frozen is None else nullcontext():  # type: ignore[operator]
        yield frozen if frozen is not None else policy


def load_tokenizer(config: PolicyConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. Without a pad token it pads with EOS: masks never look at token ids, so that is safe."""
    tokenizer = AutoTokenizer.from_pretrained(
        assets.resolve(config.name), revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {config.name!r} has neither a pad nor an EOS token; add one and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a completion: the generation config's (one or several) and the tokenizer's.

    Raises:
        ValueError: none is known, so no completion could ever end by itself.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    if not ids:
        raise ValueError("neither generation_config nor tokenizer has an EOS token; set generation_config.eos_token_id")
    return tuple(dict.fromkeys(ids))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode, then every submodule back in its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def float32_default() -> Iterator[None]:
    """New tensors are float32 inside; `bf16-true` makes bfloat16 the default, which log-probs and sums must not be."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _load_base(config: PolicyConfig) -> PreTrainedModel:
    model = load_weights(
        AutoModelForCausalLM,
        assets.resolve(config.name),
        revision=config.revision,
        dtype=config.torch_dtype or "auto",
        **config.model_options,
    )
    return cast(PreTrainedModel, model)


def _disable_dropout(model: nn.Module) -> None:
    """Every dropout to 0: the policy that is trained must be the policy that sampled."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
