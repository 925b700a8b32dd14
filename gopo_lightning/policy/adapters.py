"""LoRA adapters: the options that are taken, how one is put on a model or read from a folder, and what it began as.

The reference of an adapter's training is the policy of step 0. It needs no second model if the base stays as its files
are: then it is the base with the adapter off, or the policy with its trained weights put back (`InitialWeights`). So
initialisations that change the base are refused; nor would their adapters fit the base once they are exported.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from gopo_lightning.policy.loading import finding, folder_of, locate

TaskType: TypeAlias = Literal["CAUSAL_LM", "SEQ_CLS"]

_FILE, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TAKEN = {
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("init_lora_weights", "fan_in_fan_out", "task_type", "peft_type"),
}
_OF_A_FILE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
_INITIALISATIONS = (True, "gaussian", "orthogonal")
"""They begin with a product of 0, look at no data, and train all that they make."""
_NEEDS_DATA = ("eva", "corda", "lora_ga")
_OTHER_WORDS = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "dropout": "lora_dropout"}


# -------------------------------------------------------------------- options


def lora_config(options: Mapping[str, Any], *, task_type: TaskType, option: str) -> LoraConfig:
    """`peft.LoraConfig` of ``options``, which stand in the config under the name ``option``.

    Raises:
        ValueError: an unknown or untrainable option, one that would be ignored, or a value that peft does not take.
    """
    defaults = _defaults()
    if unknown := [key for key in options if key not in defaults]:
        similar = [_OTHER_WORDS.get(key) or next(iter(get_close_matches(key, defaults, 1)), None) for key in unknown]
        hint = "".join(f" For {key} try {name}." for key, name in zip(unknown, similar, strict=True) if name)
        raise ValueError(f"{option} has no option {', '.join(unknown)}.{hint} There are: {', '.join(sorted(_TAKEN))}.")
    changed = {key: value for key, value in options.items() if value != defaults[key] and value is not None}
    if described := sorted(_OF_A_FILE & set(changed)):
        raise ValueError(f"{option} holds {', '.join(described)}, which belong to a saved adapter. Leave them out.")
    if others := sorted(set(changed) - _TAKEN):
        raise ValueError(f"{option}.{others[0]}={changed[others[0]]!r} is not supported here. Leave it out.")
    for key, ours in {"task_type": task_type, "peft_type": "LORA"}.items():
        if changed.pop(key, ours) != ours:
            raise ValueError(f"{option}.{key}={options[key]!r}: here it is always {ours}. Leave it out.")
    if changed.get("lora_alpha", 1) == 0:
        raise ValueError(
            f"{option}.lora_alpha=0 multiplies the adapter by 0, so nothing is trained. Set it to r, or 2r."
        )
    if (initial := changed.get("init_lora_weights")) in _NEEDS_DATA:
        raise ValueError(f"{option}.init_lora_weights={initial!r} is made from data, which is not done here. Use true.")
    try:
        return LoraConfig(task_type=task_type, **changed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}={dict(options)}: {error}") from error


def check_policy_lora(options: Mapping[str, Any]) -> None:
    """ValueError for options under which the policy of step 0 is not exactly its base, or samples with noise."""
    if options.get("lora_dropout"):
        raise ValueError(
            f"policy.lora.lora_dropout={options['lora_dropout']}: dropout makes the trained policy differ from "
            "the one that sampled, so the policy ratio would be noise. Set it to 0."
        )
    initial = options.get("init_lora_weights")
    if initial is not None and initial not in _INITIALISATIONS:
        raise ValueError(
            f"policy.lora.init_lora_weights={initial!r} changes the base model or begins elsewhere, so the base with "
            "the adapter off would not be the policy of step 0, which is the reference, and an exported adapter would "
            "not fit the base. Use true, gaussian or orthogonal."
        )
    lora_config(options, task_type="CAUSAL_LM", option="policy.lora")


def described_lora(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every option that is taken, in plain values: equal where the adapters are of one kind."""
    full = lora_config(options, task_type="CAUSAL_LM", option="policy.lora").to_dict()
    return {key: sorted(full[key]) if isinstance(full[key], set) else full[key] for key in sorted(_TAKEN & full.keys())}


def _defaults() -> dict[str, Any]:
    """Of every option of `LoraConfig`."""
    return {
        field.name: field.default if field.default is not MISSING else cast(Any, field.default_factory)()
        for field in fields(LoraConfig)
        if field.init
    }


def add_lora(model: PreTrainedModel, options: Mapping[str, Any], *, task_type: TaskType, option: str) -> PeftModel:
    """``model``, in place, with a new adapter that alone is trained.

    Raises:
        ValueError: see `lora_config`; or a name in it that no module of ``model`` has.
    """
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    modules = [name for name, _ in model.named_modules()]
    try:
        adapted = get_peft_model(model, lora_config(options, task_type=task_type, option=option))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}={dict(options)}: {error} The linear layers are {', '.join(linear)}.") from error
    targets = cast(list[str], adapted.base_model.targeted_module_names)
    for key, among in {"target_modules": targets, "modules_to_save": modules}.items():
        names = options.get(key) or ()
        unmatched = [n for n in (() if isinstance(names, str) else names) if not _named(re.escape(n), among)]
        _check_matched(option, key, unmatched, linear)
    for key in ("rank_pattern", "alpha_pattern"):
        _check_matched(option, key, [name for name in options.get(key) or () if not _named(name, targets)], linear)
    return cast(PeftModel, adapted)


def _named(pattern: str, names: Sequence[str]) -> bool:
    """Whether ``pattern`` is the end of one of the dotted ``names``, as peft reads it."""
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)


def _check_matched(option: str, key: str, unmatched: Sequence[str], linear: Sequence[str]) -> None:
    if unmatched:
        raise ValueError(
            f"{option}.{key}: the model has no {', '.join(unmatched)} to adapt. Leave that out; its linear layers are "
            f"{', '.join(linear)}."
        )


# ------------------------------------------------------------- saved adapters


def saved_adapter(name: str, revision: str | None) -> Path | None:
    """The local folder of ``name`` if that is an adapter (with its weights, fetched if need be), else None."""
    place = locate(name)
    with finding(name, revision):
        if find_adapter_config_file(place, revision=revision) is None:
            return None
    folder = folder_of(name, revision, fetch=True)
    if not (folder / _WEIGHTS).exists():
        raise ValueError(
            f"the adapter {name} has no {_WEIGHTS}, and pickled weights are not loaded: they may run code. Load it "
            "with peft where you trust it and save it again."
        )
    return folder


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that the adapter in ``folder`` was trained on.

    Raises:
        ValueError: the adapter does not say, or says a folder that is not there.
    """
    saved = json.loads((folder / _FILE).read_text())
    name = saved.get("base_model_name_or_path")
    try:
        return locate(name or ""), saved.get("revision")
    except ValueError as error:
        raise ValueError(
            f"the adapter {folder} was trained on {name!r}: {error} Correct base_model_name_or_path in its {_FILE}."
        ) from error


def check_saved(folder: Path, task_type: TaskType) -> None:
    """ValueError unless the adapter in ``folder`` is a LoRA for ``task_type`` on an unchanged base."""
    saved = json.loads((folder / _FILE).read_text())
    kind, task = saved.get("peft_type"), saved.get("task_type")
    if kind != "LORA" or task not in (task_type, None):
        raise ValueError(
            f"{folder} is an adapter of peft_type {kind} and task_type {task}; LORA and {task_type} are needed here. "
            "Merge it into its base (merge_and_unload, save_pretrained) and name that folder."
        )
    if (
        (initial := str(saved.get("init_lora_weights")))
        .lower()
        .startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    ):
        raise ValueError(
            f"the adapter {folder} was begun with init_lora_weights={initial}, which changes the base it belongs to. "
            "Convert it (peft: save_pretrained with path_initial_model_for_weight_conversion), or merge it into its "
            "base, and name that folder."
        )
    if others := sorted(key for key in _unsupported() if saved.get(key) not in (None, False, _defaults()[key])):
        raise ValueError(f"the adapter {folder} uses {', '.join(others)}, which is not supported here. Merge it first.")


def _unsupported() -> set[str]:
    """Options that change the base or the forward; those that only configure an initialisation do not matter here."""
    configure = {"eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config", "qalora_group_size"}
    return {key for key in _defaults() if key not in _TAKEN | _OF_A_FILE | configure and not key.startswith("megatron")}


def load_adapter(base: PreTrainedModel, folder: Path, *, trained: bool) -> PeftModel:
    """``base``, in place, with the adapter in ``folder``.

    Raises:
        ValueError: tensors of the adapter are missing, or have no place in ``base``.
    """
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=trained, torch_device="cpu")
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    optional = {name for name in stored if "embed_tokens" in name or "lm_head" in name}  # saved beside, as they were
    if missing := sorted((expected ^ stored) - (optional - expected)):
        raise ValueError(
            f"the adapter {folder} does not fit the model it names: {len(missing)} tensors differ "
            f"({', '.join(missing[:3])}). Name the base that it was trained on in its {_FILE}."
        )
    return model


def head_of_adapter(folder: Path) -> int | None:
    """Labels of the classification head that the adapter in ``folder`` brings along; None without one."""
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        heads = [n for n in file.keys() if re.search(r"\b(score|classifier|out_proj)\.weight$", n)]  # noqa: SIM118
        return min((file.get_slice(name).get_shape()[0] for name in heads), default=None)


# ------------------------------------------------------------------ reference


class KeptWeights:
    """Trained weights of a policy at one time, sharded or not, to be put back in their place for a while.

    Args:
        tensors: by the parameter's name.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @classmethod
    def of(cls, policy: nn.Module) -> "KeptWeights":
        """Those that ``policy`` has now."""
        return cls({name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad})

    @contextmanager
    @torch.no_grad()
    def inside(self, policy: nn.Module) -> Iterator[None]:
        """``policy`` is what it was; sharded, its gathered weights must be freed before and after."""
        trained = {name: p for name, p in policy.named_parameters() if name in self.tensors}
        now = {name: p.detach().clone() for name, p in trained.items()}
        try:
            for name, parameter in trained.items():
                self.tensors[name] = self.tensors[name].to(device=parameter.device, dtype=parameter.dtype)
                parameter.copy_(self.tensors[name])
            yield
        finally:
            for name, parameter in trained.items():
                parameter.copy_(now[name])
