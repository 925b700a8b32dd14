"""The policy: any Hugging Face causal LM, optionally with LoRA; its tokenizer; its frozen reference."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from jinja2 import TemplateError
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gopo_lightning.distributed.decoder_layers import compile_layers
from gopo_lightning.policy.adapters import (
    KeptWeights,
    add_lora,
    base_of_adapter,
    check_policy_lora,
    check_saved,
    described_lora,
    load_adapter,
    saved_adapter,
)
from gopo_lightning.policy.loading import finding, fingerprint, folder_of, load_weights, locate

Policy: TypeAlias = PreTrainedModel | PeftModel

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class PolicyConfig:
    """Which causal LM to train, and how it is loaded."""

    name: str
    """Hub name, local folder, or `packaged:smollm2-135m-instruct`; of a model, or of a LoRA adapter to train on."""
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
    """Arguments of `peft.LoraConfig` (r, lora_alpha, target_modules, …) for a new adapter; null trains all weights, or
    the adapter that `name` is."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    compile: bool = False
    """`torch.compile` the decoder layers for training: less memory and time, for half a minute at the first step.
    Sampling stays as it is."""
    chat_template: str | None = None
    """Jinja chat template that replaces the tokenizer's: a file, or the template itself."""

    def __post_init__(self) -> None:
        if self.lora is not None:
            check_policy_lora(self.lora)

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

    @cached_property
    def adapter(self) -> Path | None:
        """The folder of the adapter that ``name`` is; None if it is a whole model.

        Raises:
            ValueError: `lora` beside it, or an adapter that cannot be trained here.
        """
        folder = saved_adapter(self.name, self.revision)
        if folder is not None and self.lora is not None:
            raise ValueError(
                f"policy.name={self.name} is an adapter, and policy.lora would put a new one in its place. Leave lora "
                "out to train that adapter on; or merge it into its base (peft: merge_and_unload, save_pretrained) and "
                "name that folder."
            )
        if folder is not None:
            check_saved(folder, "CAUSAL_LM")
        return folder

    @property
    def base(self) -> tuple[str, str | None]:
        """Name (or folder) and revision of the whole model, without an adapter."""
        return (locate(self.name), self.revision) if self.adapter is None else base_of_adapter(self.adapter)

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained, not the model."""
        return self.lora is not None or self.adapter is not None

    @property
    def begins_as_base(self) -> bool:
        """Whether the policy of step 0 is what it trains on, with the adapter off: a new adapter alone is trained."""
        return self.lora is not None and self.lora.get("bias") in (None, "none")

    def describe(self) -> dict[str, Any]:
        """What the weights in a checkpoint belong to, in plain values: models by folder and hash, LoRA's options.

        A model may move to another folder, and another one may come to lie in its place: the hash tells.
        """
        described: dict[str, Any] = {"base": _described(*self.base)}
        if self.adapter is not None:
            described["adapter"] = _described(str(self.adapter), None)
        if self.lora is not None:
            described["lora"] = described_lora(self.lora)
        return described


def load_policy(config: PolicyConfig, base: PreTrainedModel | None = None) -> Policy:
    """The trainable policy: master weights in ``config.dtype``, dropout off, LoRA and the like as configured.

    ``base`` is the model to train if it is there already.
    """
    adapter = config.adapter
    model = _load_base(config) if base is None else base
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy: Policy = model
    if adapter is not None:
        policy = load_adapter(model, adapter, trained=True)
    elif config.lora is not None:
        policy = add_lora(model, config.lora, task_type="CAUSAL_LM", option="policy.lora")
    _disable_dropout(policy)
    if config.compile:
        compile_layers(policy)
    return policy


def load_reference(config: PolicyConfig) -> PreTrainedModel:
    """The frozen policy of step 0: eval mode, no gradients, dropout off."""
    model = _load_base(config)
    _disable_dropout(model)
    return model.requires_grad_(False).eval()


@contextmanager
def reference_of(policy: Policy, frozen: PreTrainedModel | KeptWeights | None) -> Iterator[nn.Module]:
    """The reference model of ``policy``, which is the policy of step 0.

    Args:
        frozen: a copy of it; or the weights that the policy began with, which take the place of the trained ones
            inside; None under an adapter that began as a product of 0: the base with the adapter off.

    Raises:
        ValueError: full-weight training without a frozen copy.
    """
    if isinstance(frozen, PreTrainedModel):
        yield frozen
        return
    if not isinstance(policy, PeftModel):
        raise ValueError("a fully trained policy has no reference in itself; load a frozen copy with load_reference")
    with policy.disable_adapter() if frozen is None else frozen.inside(policy):
        yield policy


def _described(name: str, revision: str | None) -> str:
    return f"{Path(name).name} ({fingerprint(folder_of(name, revision, fetch=False))})"


def load_tokenizer(config: PolicyConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. Without a pad token it pads with EOS: masks never look at token ids, so that is safe."""
    name, revision = config.name, config.revision
    if config.adapter is not None and not (config.adapter / "tokenizer_config.json").exists():
        name, revision = config.base
    with finding(name, revision):
        tokenizer = AutoTokenizer.from_pretrained(
            locate(name), revision=revision, trust_remote_code=config.trust_remote_code
        )
    if config.chat_template is not None:
        tokenizer.chat_template = _chat_template(config.chat_template)
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


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends an answer; None if it ends none with a special token."""
    words = "words"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": words}]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:
        return None  # it refuses this conversation, so nothing is known of its answers
    ids = tokenizer(rendered.rpartition(words)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((int(i) for i in ids[:1] if i in special), None)


def warn_of_endless_turns(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
    """Say so where the token that ends an answer in the chat template does not end a completion."""
    end = end_of_turn(tokenizer)
    if end is not None and end not in stop_ids:
        token, stops = (
            tokenizer.convert_ids_to_tokens([end, *stop_ids])[0],
            tokenizer.convert_ids_to_tokens([*stop_ids]),
        )
        rank_zero_warn(
            f"the chat template ends an answer with {token} (id {end}), but completions end with {', '.join(stops)} "
            f"alone: answers would run on after their end. Add {end} to eos_token_id in the model's "
            "generation_config.json (of a hub model: in a local copy that policy.name names)."
        )


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


def _chat_template(given: str) -> str:
    """The template in the file ``given``, or ``given`` if that is one."""
    is_template = "{{" in given or "{%" in given
    if not is_template and Path(given).expanduser().is_file():
        return Path(given).expanduser().read_text(encoding="utf-8")
    if not is_template:
        raise ValueError(
            f"policy.chat_template={given!r} is no file, and no template: that has {{{{ }}}} or {{% %}}. Correct the "
            f"path (relative ones begin at {Path.cwd()})."
        )
    return given


def _load_base(config: PolicyConfig) -> PreTrainedModel:
    name, revision = config.base
    with finding(name, revision):
        model = load_weights(
            AutoModelForCausalLM,
            name,
            revision=revision,
            dtype=config.torch_dtype or "auto",
            **config.model_options,
        )
    return cast(PreTrainedModel, model)


def _disable_dropout(model: nn.Module) -> None:
    """Every dropout to 0: the policy that is trained must be the policy that sampled."""
    for module in model.modules():
        if isinstance(module, _DROPOUT):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
