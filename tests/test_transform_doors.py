"""What a transform may do beside its call: refuse a run, and log what it measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.objectives.base import Mean
from gopo_lightning.rollout import SamplingConfig, Transform
from gopo_lightning.rollout.shaping import Shaping
from gopo_lightning.rollout.transforms import Context, Setting
from tests.rollouts import rollout_of
from tests.runs import make_module


class Measures(Transform):
    """What it was made with."""

    def __init__(self, **means: tuple[float, float]) -> None:
        self._means = {name: Mean(torch.tensor(total), torch.tensor(count)) for name, (total, count) in means.items()}

    def __call__(self, rollout: Any, context: Context) -> Any:
        return rollout

    def metrics(self) -> Mapping[str, Mean]:
        return self._means


class Refuses(Measures):
    """Any run; says what it knows of it."""

    def set_up(self, setting: Setting) -> None:
        raise ValueError(
            f"{[source.name for source in setting.sources]}, {setting.group_size}, {setting.max_new_tokens}"
        )


def test_a_transform_knows_its_run_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"\['vowels'\], 5, 7"):
        make_module(Path(), transforms=[Refuses()], num_completions=5, sampling=SamplingConfig(max_new_tokens=7))


def test_means_are_pooled_by_name_and_those_of_nothing_are_left_out() -> None:
    shaping = Shaping(ordinal, transforms=[Measures(a=(3.0, 2.0), b=(0.0, 0.0)), Measures(a=(1.0, 6.0), c=(0.0, 4.0))])
    shaping(rollout_of([[1.0, 2.0]]), Context(0, 0))
    assert {name: float(value) for name, value in shaping.metrics().items()} == {"transform/a": 0.5, "transform/c": 0.0}
    assert Shaping(ordinal).metrics() == {}
