"""`rollout.lag`: what is sampled ahead, from which weights, through a resume, on two ranks, and when it fails."""

import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.objectives.pairs import PairObjective
from gopo_lightning.rollout import RolloutEngine, SamplingConfig, TransformersEngine
from gopo_lightning.rollout.engines.ahead import AheadEngine
from gopo_lightning.rollout.engines.base import Begun, SamplesAhead
from gopo_lightning.types import Completions
from tests.ranks import Case, assert_same_run, launch, on, read, run_case
from tests.runs import make_data, make_module, make_trainer
from tests.test_resume import assert_identical

CORRECTED = {"loss": ClippedSurrogate(sampler_correction_cap=2.0), "num_minibatches": 2}
FAST = {"optimizer": partial(torch.optim.SGD, lr=0.3), "max_grad_norm": 1.0}


class Elsewhere(SamplesAhead):
    """Samples at once when it is told to begin, as servers do with the weights that they have got."""

    begun = cancelled = 0

    @cached_property  # made in the process that samples
    def engine(self) -> TransformersEngine:
        return TransformersEngine()

    def generate(self, *arguments: Any, **options: Any) -> Completions:  # counts nothing
        return self.engine.generate(*arguments, **options)

    def begin(self, *arguments: Any, **options: Any) -> Begun:
        self.begun += 1
        completions = self.engine.generate(*arguments, **options)
        return Begun(lambda: completions, self.cancel)

    def cancel(self) -> None:
        self.cancelled += 1

    def metrics(self) -> dict[str, float]:
        return {"begun": float(self.begun)}


class OfOldWeights(RolloutEngine):
    """The same by other means: in time, from a copy of the weights that it saw a step before."""

    def __init__(self, engine: RolloutEngine | None = None) -> None:
        self.engine, self.old = engine or TransformersEngine(), None

    @property
    def sampler(self) -> RolloutEngine:
        return self.engine

    def generate(self, model: Any, *arguments: Any, **options: Any) -> Completions:
        old, self.old = self.old or model, copy.deepcopy(model)
        return self.engine.generate(old, *arguments, **options)


def case(name: str, **more: Any) -> Case:
    module = {"engine": Elsewhere(), "lag": 1, **CORRECTED, **FAST, **more}
    return Case(name, module=module, max_steps=12, trainer={"val_check_interval": 2})


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    first = replace(case("half.first"), max_steps=6)
    cases = [
        case("whole"),
        case("by_hand", engine=OfOldWeights(), lag=0),
        case("in_time", engine=TransformersEngine(), lag=0),
        first,
        *(
            replace(each, resume="half.first.ckpt")
            for each in (
                case("half.rest"),
                case("half.in_time", engine=TransformersEngine(), lag=0),
                case("half.shorter", sampling=SamplingConfig(max_new_tokens=5)),
            )
        ),
    ]
    for each in cases:
        run_case(each, tiny_policy, prompts_file, folder, 1)
    spread = replace(case("spread.rest"), strategy="ddp", resume="half.first.ckpt")
    two = [on("ddp", case("whole")), on("fsdp2", case("whole")), spread, replace(on("ddp", case("first")), max_steps=6)]
    launch(two, tiny_policy, prompts_file, folder, 2)
    run_case(replace(case("joined.rest"), resume="ddp-first.ckpt"), tiny_policy, prompts_file, folder, 1)
    return folder


def texts(folder: Path, name: str) -> list[dict[int, Any]]:
    return [step["texts"] for step in read(folder, name)[0]["steps"]]


def test_completions_are_those_of_the_weights_a_step_before(results: Path) -> None:
    assert texts(results, "whole") == texts(results, "by_hand")
    assert_same_run(results, "whole", "by_hand", 0.0)


def test_prompts_and_seeds_are_those_of_a_run_in_time(results: Path) -> None:
    ahead, in_time = texts(results, "whole"), texts(results, "in_time")
    assert [step.keys() for step in ahead] == [step.keys() for step in in_time]
    assert ahead[0] == in_time[0] and all(a != b for a, b in zip(ahead[1:], in_time[1:], strict=True))


def test_the_loss_corrects_for_older_weights(results: Path) -> None:
    for name, lags in (("whole", True), ("in_time", False)):
        steps = [step["metrics"]["train/sampler_logprob_diff"] for step in read(results, name)[0]["steps"]]
        assert steps[0] < 1e-5 and all((difference > 1e-3) == lags for difference in steps[1:])


def test_metrics_are_of_the_rollout_that_is_trained_on(results: Path) -> None:
    """Each of them after the first was begun before the one that is begun with it."""
    metrics = [step["metrics"] for step in read(results, "whole")[0]["steps"]]
    assert [each["rollout/ahead"] for each in metrics] == [0, 1, 1, 1, 1, 1]
    assert [each["rollout/begun"] for each in metrics] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("rest", ["half.rest", "spread.rest", "joined.rest"])
def test_a_resumed_run_trains_on_what_was_begun(rest: str, results: Path) -> None:
    """On one rank to the last bit, on two, and on one after two."""
    assert texts(results, rest) == texts(results, "whole")[3:]
    assert_same_run(results, rest, "whole")
    if rest == "half.rest":
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_identical(read(results, rest)[1][key], read(results, "whole")[1][key])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_are_like_one(strategy: str, results: Path) -> None:
    assert_same_run(results, f"{strategy}-whole", "whole")


def test_a_resumed_run_may_sample_in_time_or_in_another_way(results: Path) -> None:
    """What was begun is then left, and the run goes on from the weights that it has."""
    in_time, shorter = texts(results, "half.in_time"), texts(results, "half.shorter")
    whole = texts(results, "whole")[3:]
    assert [step.keys() for step in in_time] == [step.keys() for step in shorter] == [step.keys() for step in whole]
    assert in_time[0] != whole[0] and shorter[0] != whole[0]
    assert [step["metrics"]["rollout/ahead"] for step in read(results, "half.shorter")[0]["steps"]] == [0, 1, 1]


def test_what_is_left_is_cancelled_and_told(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    module = make_module(tiny_policy, engine=Elsewhere(), lag=1, **CORRECTED)
    make_trainer(tmp_path / "1", max_steps=2, limit_val_batches=0).fit(module, make_data(prompts_file))
    engine: Any = module.collector.engine
    assert isinstance(engine, AheadEngine) and engine.engine.cancelled == 0
    with pytest.warns(UserWarning, match="what was sampled ahead was for other prompts"):
        make_trainer(tmp_path / "2", max_steps=2, limit_val_batches=0).fit(module, make_data(prompts_file, seed=9))
    assert engine.engine.cancelled == 1


class Failing(Elsewhere):
    """The servers are lost while the second rollout is sampled."""

    def begin(self, *arguments: Any, **options: Any) -> Begun:
        begun = super().begin(*arguments, **options)
        return begun if self.begun < 2 else begun._replace(completions=self.fail)

    def fail(self) -> Completions:
        raise RuntimeError("no vLLM server is left")


def test_a_checkpoint_is_written_although_what_was_begun_is_lost(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module = make_module(tiny_policy, engine=Failing(), lag=1, loss=CORRECTED["loss"])
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(module, make_data(prompts_file))
    with pytest.warns(UserWarning, match="the checkpoint is without what was sampled ahead: RuntimeError: no vLLM"):
        trainer.save_checkpoint(tmp_path / "lost.ckpt")
    with pytest.raises(RuntimeError, match="no vLLM server is left"):
        make_trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(module, make_data(prompts_file))
    module = make_module(tiny_policy, engine=Elsewhere(), lag=1, loss=CORRECTED["loss"])
    trainer = make_trainer(tmp_path, max_steps=4, limit_val_batches=0)
    trainer.fit(module, make_data(prompts_file), ckpt_path=tmp_path / "lost.ckpt")
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lag": 2}, "rollout.lag=2 must be 0, which samples in time, or 1, one step ahead"),
        ({"engine": None}, "and TransformersEngine samples where it is trained. Set lag to 0, or use VLLMServerEngine"),
        ({"refill": 2}, "before it is known which rollout.refill=2 takes"),
        ({"loss": ClippedSurrogate()}, "for which ClippedSurrogate as it is set does not correct"),
        ({"loss": PairObjective()}, "for which PairObjective as it is set does not correct"),
    ],
)
def test_errors(options: dict[str, Any], message: str, tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(tiny_policy, **{"engine": Elsewhere(), "lag": 1, **CORRECTED, **options})


def test_prompts_of_which_the_next_are_not_known(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    module, data = make_module(tiny_policy, engine=Elsewhere(), lag=1, **CORRECTED), make_data(prompts_file)
    trainer = make_trainer(tmp_path / "1", max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(tiny_policy), data)
    with pytest.raises(ValueError, match="rollout.lag=1 reads the next step's prompts in the order of a PromptDataMod"):
        make_trainer(tmp_path / "2").fit(module, data.train_dataloader())
