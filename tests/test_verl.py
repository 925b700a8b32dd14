"""The estimator in verl's registry. `make test-verl` brings verl, and these tests are skipped without it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gopo_lightning.objectives.advantages import ordinal

pytest.importorskip("verl", reason="make test-verl installs verl")

UID = np.array(["a", "b", "a", "a", "b", "c"], dtype=object)
REWARDS = torch.tensor([1.0, 3.0, 0.5, 1.0, float("nan"), 2.0])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Responses of 1 to 4 tokens, with their reward on the last."""
    lengths = torch.tensor([1, 4, 2, 3, 4, 2])
    mask_NT = (torch.arange(4) < lengths[:, None]).float()
    token_rewards_NT = torch.zeros(6, 4)
    token_rewards_NT[torch.arange(6), lengths - 1] = REWARDS
    return token_rewards_NT, mask_NT


def test_by_name_from_the_registry() -> None:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    import gopo_lightning.integrations.verl  # noqa: F401

    rewards_NT, mask_NT = batch()
    estimator = get_adv_estimator_fn("gopo")
    advantages_NT, returns_NT = estimator(token_level_rewards=rewards_NT, response_mask=mask_NT, index=UID, config=None)
    first, third, fourth = ordinal(torch.tensor([[1.0, 0.5, 1.0]]))[0].tolist()
    expected = torch.tensor([first, 0, third, fourth, 0, 0])[:, None] * mask_NT
    assert torch.equal(advantages_NT, expected) and torch.equal(returns_NT, expected)
    assert advantages_NT.dtype == torch.float32


def test_through_the_trainer_of_verl() -> None:
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    import gopo_lightning.integrations.verl as ours

    rewards_NT, mask_NT = batch()
    tensors = {"token_level_rewards": rewards_NT, "response_mask": mask_NT}
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": UID})
    found = compute_advantage(data, adv_estimator="gopo", config=SimpleNamespace())
    assert torch.equal(found.batch["advantages"], ours.gopo(rewards_NT, mask_NT, UID)[0])


def test_verl_registers_it_by_a_variable_and_nothing_but_the_maths_is_imported() -> None:
    code = (
        "import verl, sys\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn\n"
        "print(get_adv_estimator_fn('gopo').__module__)\n"
        "print(sorted({name.split('.')[1] for name in sys.modules if name.startswith('gopo_lightning.')}))\n"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "gopo_lightning.integrations.verl"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    module, parts = result.stdout.splitlines()[-2:]
    assert module == "gopo_lightning.integrations.verl" and parts == "['integrations', 'objectives', 'types']"
