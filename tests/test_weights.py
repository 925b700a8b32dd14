"""The weights that an engine with a copy of the policy gets: all, whole, merged, under the names of the checkpoint."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gopo_lightning.distributed.gathering import gathered
from gopo_lightning.distributed.whole_weights import merged_weights
from gopo_lightning.policy.model import PolicyConfig, load_policy
from tests.architectures import BUILDERS, build
from tests.ranks import Case, launch, sharded_policy

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def copied(model: nn.Module) -> dict[str, Tensor]:
    names = [name for name, _ in merged_weights(model)]
    assert len(set(names)) == len(names)
    return {name: value.clone() for name, value in merged_weights(model)}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_names_and_values_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)  # leaves tied weights out
    tied = {key: value for key, value in model.state_dict().items() if key == "lm_head.weight"}
    assert_equal(copied(model), tied | load_file(tmp_path / "model.safetensors"))


def test_an_adapter_is_added_where_it_is_on_and_stays_apart() -> None:
    torch.manual_seed(0)
    base = build("qwen2")  # its linear layers have biases
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**LORA))
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    assert not torch.equal(
        expected["model.layers.0.mlp.down_proj.weight"], plain["model.layers.0.mlp.down_proj.weight"]
    )
    assert_equal(copied(model), expected)
    with model.disable_adapter():
        assert_equal(copied(model), plain)
    assert_equal(copied(model), expected)
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_is_no_product_is_refused(option: dict[str, Any]) -> None:
    model = get_peft_model(build("qwen3"), LoraConfig(**LORA | option))
    with pytest.raises(ValueError, match="use LoRA on linear layers without use_dora and modules_to_save"):
        copied(model)


def sharded_weights(rank: int, folder: Path) -> dict[str, Any]:
    """Of each way to gather, with and without a trained adapter."""
    found = {}
    for lora in (False, True):
        model = sharded_policy(PolicyConfig(str(folder / "adapter" if lora else folder)))
        for how in ("full", "layer"):
            with gathered(model, how):  # type: ignore[arg-type]
                found[f"{how} {lora}"] = copied(model)
    return found


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    model = folder / "model"
    shutil.copytree(tiny_policy, model)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(task_type="CAUSAL_LM", **LORA))
    peft.save_pretrained(str(model / "adapter"))
    launch([Case("first", "ddp", max_steps=1), sharded_weights], model, prompts_file, folder, 2)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["full", "layer"])
@pytest.mark.parametrize("lora", [False, True])
def test_sharded_weights_come_whole(lora: bool, how: str, rank: int, results: Path) -> None:
    expected = copied(load_policy(PolicyConfig(str(results / "model" / "adapter" if lora else results / "model"))))
    assert_equal(torch.load(results / f"sharded_weights.{rank}.pt")[f"{how} {lora}"], expected)
