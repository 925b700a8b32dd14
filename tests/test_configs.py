"""Every shipped YAML is parsed and instantiated, with the models swapped for tiny ones."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningModule

from gopo_lightning.commands.lightning_cli import run

CONFIGS = sorted(Path("configs").rglob("*.yaml"))
OVERLAYS = ("strategy", "engine")
POLICIES = [p for p in CONFIGS if p.parent.name not in OVERLAYS and not p.stem.startswith("reward_model")]


@pytest.mark.parametrize("path", POLICIES, ids=str)
def test_policy_configs_are_instantiated(path: Path, tiny_policy: Path, tmp_path: Path) -> None:
    overrides = [
        "--trainer.accelerator=cpu",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        f"--model.init_args.policy.name={tiny_policy}",
    ]
    module = instantiate(path, *overrides)
    module.configure_model()
    assert module.policy.config.hidden_size == 32


@pytest.mark.parametrize("overlay", sorted(Path("configs/strategy").glob("*.yaml")), ids=str)
def test_strategy_overlays_change_only_the_trainer(overlay: Path) -> None:
    assert set(yaml.safe_load(overlay.read_text())) == {"trainer"}


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("reward_model*.yaml")), ids=str)
def test_reward_model_configs_are_instantiated(path: Path) -> None:
    instantiate(path, "--trainer.accelerator=cpu")


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("*gopo.yaml")), ids=str)
def test_gopo_and_grpo_differ_in_the_advantage(path: Path) -> None:
    """And in how several rewards become one: ranks have no magnitude for GRPO to read."""
    gopo, grpo = (
        yaml.safe_load(path.with_name(name).read_text())
        for name in (path.name, "grpo".join(path.name.rsplit("gopo", 1)))
    )
    ours, theirs = gopo["model"].pop("init_args"), grpo["model"].pop("init_args")
    assert gopo == grpo
    assert (ours.pop("advantage"), theirs.pop("advantage")) == ("ordinal", "grpo")
    if len(ours["rewards"]) > 1:
        assert (ours.pop("combine"), theirs.pop("combine")) == ("lexicographic", "weighted_sum")
        assert len(theirs.pop("combine_options")["weights"]) == len(ours["rewards"])
    assert ours == theirs


def instantiate(path: Path, *overrides: str) -> LightningModule:
    """The module of a config, without running anything."""
    return run(["--config", str(path), *overrides], instantiate_only=True).model
