"""`fsdp`, as Lightning's users write it, is FSDP2 on the command line and refused in Python."""

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.distributed.strategies import FSDP2Strategy
from tests.runs import make_data, make_module, make_trainer

FSDP = "FSDPStrategy"


def trainer_of(strategy: str | dict[str, Any]) -> Trainer:
    """Of the quickstart on two CPUs, with `--trainer.strategy` as it is written."""
    text = strategy if isinstance(strategy, str) else json.dumps(strategy)
    flags = ["--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.strategy={text}"]
    return run(["--config=configs/quickstart/gopo.yaml", *flags], instantiate_only=True).trainer


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("fsdp", {}),
        ("fsdp_cpu_offload", {"cpu_offload": True}),
        ({"class_path": FSDP}, {}),
        ({"class_path": "lightning.pytorch.strategies.FSDPStrategy"}, {}),
        ({"class_path": "lightning.pytorch.strategies.fsdp.FSDPStrategy"}, {}),
        ({"class_path": FSDP, "init_args": {"sharding_strategy": "FULL_SHARD", "state_dict_type": "full"}}, {}),
        ({"class_path": FSDP, "init_args": {"cpu_offload": True}}, {"cpu_offload": True}),
        ({"class_path": FSDP, "init_args": {"cpu_offload": False}}, {"cpu_offload": False}),
        ({"class_path": FSDP, "init_args": {"cpu_offload": {"offload_params": True}}}, {"cpu_offload": True}),
        ({"class_path": FSDP, "init_args": {"cpu_offload": {"offload_params": False}}}, {"cpu_offload": False}),
        (
            {"class_path": FSDP, "init_args": {"timeout": "0:01:00", "process_group_backend": "gloo"}},
            {"process_group_backend": "gloo", "timeout": timedelta(minutes=1)},
        ),
    ],
)
def test_fsdp_is_fsdp2_on_the_command_line(
    strategy: str | dict[str, Any], expected: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = trainer_of(strategy).strategy
    assert type(found) is FSDP2Strategy
    assert found.cpu_offload is expected.get("cpu_offload", False)
    assert found.process_group_backend == expected.get("process_group_backend")
    assert found._timeout == expected.get("timeout", timedelta(minutes=30))
    said = ", ".join(f"{name}={value}" for name, value in expected.items())
    name = strategy if isinstance(strategy, str) else FSDP
    assert caplog.messages.count(f"trainer.strategy: {name} becomes fsdp2, FSDP2Strategy({said})") == 1


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_other_strategies_stay_what_they_are(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    found = trainer_of(strategy).strategy
    assert isinstance(found, FSDP2Strategy) is (strategy == "fsdp2")
    assert "FSDP2Strategy" not in caplog.text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_args": {"sharding_strategy": "SHARD_GRAD_OP"}}, "sharding_strategy=ShardingStrategy.SHARD_GRAD_OP"),
        ({"init_args": {"state_dict_type": "sharded"}}, "state_dict_type=sharded"),
        ({"dict_kwargs": {"forward_prefetch": True}}, "forward_prefetch=True"),
    ],
)
def test_what_fsdp2_does_not_have_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"FSDPStrategy has {named}, but .* leave {named.partition('=')[0]} out"):
        trainer_of({"class_path": FSDP, **options})


def test_fsdp_cpu_is_an_old_name_of_fsdp2() -> None:
    with pytest.warns(UserWarning, match="fsdp_cpu is an old name of fsdp2"):
        trainer = Trainer(accelerator="cpu", devices=2, strategy="fsdp_cpu", logger=False)
    assert type(trainer.strategy) is FSDP2Strategy


def test_the_registry_of_lightning_is_as_it_was() -> None:
    assert type(StrategyRegistry.get("fsdp")) is FSDPStrategy


class OnCPU(FSDPStrategy):
    """Lightning lets its own class run on GPUs only, and a class of the user's anywhere."""


@pytest.mark.parametrize("strategy", [OnCPU, ModelParallelStrategy])
def test_strategies_that_cannot_shard_a_policy_are_refused_in_python(
    strategy: type, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, strategy=strategy())
    with pytest.raises(ValueError, match=rf'is {strategy.__name__}, .*; use .*Trainer\(strategy="fsdp2"\)'):
        trainer.fit(make_module(tiny_policy), make_data(prompts_file))
