"""Sources that wait for other machines are asked about groups as they end, and beside each other."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.rewards import (
    AnchorReward,
    ChatModel,
    FunctionReward,
    LLMJudge,
    LLMScore,
    Source,
    SourceConfigError,
    score_groups,
)
from gopo_lightning.rewards.early import AsksEarly, EarlyQuestions
from gopo_lightning.rollout import SamplingConfig, TransformersEngine
from gopo_lightning.rollout.engines.streams import stream_seeds
from gopo_lightning.types import Completion, Completions
from tests.architectures import build, prompt_batch
from tests.loopback import Server, serving
from tests.runs import count_vowels, make_module
from tests.test_engine import Tokenizer
from tests.test_llm_score import by_length
from tests.test_module import fit, scalars
from tests.test_rewards import prompt

CPU = torch.device("cpu")
PROMPTS = [prompt("p", 0, anchor="an anchor"), prompt("q", 1, anchor=None), prompt("r", 2, anchor="b")]
GROUPS = [
    [Completion(text, truncated=False, num_tokens=len(text)) for text in texts]
    for texts in (("a", "bbb", "bbb"), ("c" * 9, "dd", "e"), ("b", "ffff", "g"))
]
PATIENCE = 20.0
"""Seconds; a test that waits so long has failed."""


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("openai")
    with serving() as server:
        server.answer = by_length
        yield server


def chat(server: Server, **options: Any) -> dict[str, Any]:
    return {"base_url": server.url, "api_key_env": None, "backoff_seconds": 0.01, "cache_dir": None, **options}


async def length_and_ending(completion: str, truncated: bool, num_tokens: int) -> float:
    await asyncio.sleep(0)
    return len(completion) + 100.0 * truncated + num_tokens / 10


SOURCES: dict[str, Callable[[Server], Any]] = {
    "function": lambda server: FunctionReward(length_and_ending, max_concurrent=2),
    "score": lambda server: LLMScore(ChatModel("m", **chat(server))),
    "judge": lambda server: LLMJudge("m", num_opponents=1, **chat(server)),
    "both orders": lambda server: LLMJudge("m", both_orders=True, **chat(server)),
    "anchor": lambda server: AnchorReward(LLMJudge("m", **chat(server))),
}


def scored(source: Source, added: Sequence[int]) -> tuple[list[Any], dict[str, int]]:
    """Its scores and counts, where it was asked about the groups of ``added`` before."""
    source.setup(CPU)
    with EarlyQuestions([source], PROMPTS) as early:
        for p in added:
            early.add(p, GROUPS[p])
            early.wait_for(source)
        scores = score_groups([source], PROMPTS, GROUPS, early=early)
    return [None if x is None else x.nan_to_num(-1).tolist() for x in vars(scores).values()], source.counters()


@pytest.mark.parametrize("name", SOURCES)
def test_scores_and_counts_are_the_same_whatever_was_asked_before(name: str, server: Server) -> None:
    source = SOURCES[name](server)
    source.setup(CPU)
    assert isinstance(source, AsksEarly) and source.waits
    plain = score_groups([source], PROMPTS, GROUPS)
    expected = [None if x is None else x.nan_to_num(-1).tolist() for x in vars(plain).values()], source.counters()
    asked = len(server.texts) + len(server.questions)
    for n, added in enumerate(([], [1], [2, 0, 1]), start=2):
        assert scored(SOURCES[name](server), added) == expected
        assert len(server.texts) + len(server.questions) == n * asked  # nothing twice


@pytest.mark.parametrize("name", ["score", "judge", "anchor"])
def test_requests_that_fail_are_not_repeated_and_abstain(name: str, server: Server) -> None:
    server.faults = [400]
    scores, counts = scored(SOURCES[name](server), [0, 1, 2])
    calls = counts["calls"]
    assert -1 in torch.tensor(scores[0]).flatten() and counts["abstained"] >= 1
    assert calls == len(server.texts) + len(server.questions)
    server.faults = [400] * 100
    with pytest.raises((RuntimeError, SourceConfigError), match="requests to .* failed"):
        scored(SOURCES[name](server), [0, 1])


def test_the_budget_holds(server: Server) -> None:
    with pytest.raises(SourceConfigError, match="max_calls=4"):
        scored(LLMScore(ChatModel("m", **chat(server, max_calls=4, max_concurrency=1))), [0, 1, 2])
    assert len(server.texts) == 4


def test_most_requests_at_a_time(server: Server) -> None:
    server.delay_seconds = 0.02
    source = LLMScore(ChatModel("m", **chat(server, max_concurrency=2)))
    source.setup(CPU)
    with EarlyQuestions([source], PROMPTS) as early:
        score_groups([source], PROMPTS, GROUPS, early=early)
    assert server.most_running == 2


class Dice:
    """Each call gives another number."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, completion: str) -> float:
        self.calls += 1
        return float(self.calls)


def test_equal_completions_have_a_call_each_and_nothing_is_left_for_the_next_batch() -> None:
    dice = Dice()
    source = FunctionReward(dice, name="dice")
    scores, _ = scored(source, [0, 2])
    assert sorted(torch.tensor(scores[0]).flatten().tolist()) == list(range(1, 10))
    assert source(PROMPTS, ["bbb"] * 3) == [10, 11, 12]


def test_an_error_is_that_of_the_call_for_the_batch() -> None:
    async def broken(completion: str) -> float:
        raise LookupError(completion)

    with pytest.raises(RuntimeError, match="'broken' raised LookupError"):
        scored(FunctionReward(broken), [0, 1])


def test_the_first_error_ends_the_batch_though_a_second_call_would_not_fail() -> None:
    calls = []

    async def once(completion: str) -> float:
        calls.append(completion)
        if len(calls) == 1:
            raise LookupError(completion)
        return 0.0

    with pytest.raises(RuntimeError, match="'once' raised LookupError: a"):
        scored(FunctionReward(once, max_concurrent=1), [0])


def test_a_source_that_is_cancelled_within_fails_as_without_early_questions() -> None:
    async def cancelled(completion: str) -> float:
        raise asyncio.CancelledError

    with pytest.raises(BaseException) as caught:  # noqa: PT011 - whichever it is
        FunctionReward(cancelled)(PROMPTS[:1], ["a"])
    with pytest.raises(type(caught.value)):
        scored(FunctionReward(cancelled), [0, 1])


class Learner(LLMScore):
    """Keeps its state on itself, so that being as first within being as first would lose it."""

    waits = False

    def __init__(self) -> None:
        super().__init__(ChatModel("m"))
        self.state, self.asked = "learned", list[str]()

    def setup(self, device: torch.device) -> None:
        pass

    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        self.asked.append(self.state)
        return [0.0] * len(completions)

    def counters(self) -> dict[str, int]:
        return {}

    def observe(self, rollout: Any, scores_PG: Any, *, step: int) -> None:
        pass

    @contextmanager
    def as_first(self) -> Iterator[None]:
        self.kept, self.state = self.state, "first"
        yield
        self.state = self.kept

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def test_a_learner_is_as_first_once_in_an_evaluation(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    learner = Learner()
    fit(make_module(tiny_policy, rewards=[learner]), prompts_file, tmp_path, max_steps=2, val_check_interval=1)
    assert {"first", "learned"} == {*learner.asked} and learner.state == "learned"
    assert learner.asked[-1] == "first" and "learned" in learner.asked[-4:]


def test_sources_are_asked_beside_each_other() -> None:
    """Each waits for the other to begin: one after the other would wait for ever."""
    began = {name: threading.Event() for name in "ab"}

    def waiting(name: str, other: str) -> FunctionReward:
        async def wait(completion: str) -> float:
            began[name].set()
            return float(await asyncio.to_thread(began[other].wait, PATIENCE))

        return FunctionReward(wait, name=name)

    sources = [waiting("a", "b"), waiting("b", "a")]
    with EarlyQuestions(sources, PROMPTS) as early:
        assert score_groups(sources, PROMPTS, GROUPS, early=early).rewards_PGK.eq(1).all()


def test_what_is_open_at_the_end_is_given_up() -> None:
    cancelled, began = threading.Event(), threading.Event()

    async def endless(completion: str) -> float:
        began.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return 0.0

    with pytest.raises(KeyError), EarlyQuestions([FunctionReward(endless)], PROMPTS) as early:
        early.add(0, GROUPS[0])
        assert began.wait(PATIENCE)
        raise KeyError
    assert cancelled.is_set() and not any(thread.name == "early questions" for thread in threading.enumerate())


def test_a_limit_ends_the_waiting() -> None:
    async def endless(completion: str) -> float:
        await asyncio.sleep(3600)
        return 0.0

    source = FunctionReward(endless)
    with pytest.raises(TimeoutError, match=r"timeout_seconds=0\.2"), EarlyQuestions([source], PROMPTS) as early:
        score_groups([source], PROMPTS, GROUPS, early=early, timeout_seconds=0.2)


def test_nobody_is_asked_where_nobody_waits() -> None:
    def plain(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    async def whole(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    assert not EarlyQuestions([FunctionReward(plain), FunctionReward(whole), AnchorReward(_Comparator())], PROMPTS)


class _Comparator(LLMJudge):
    waits = False

    def __init__(self) -> None:
        super().__init__("m")


# ------------------------------------------------------------------------------------------------------- while sampling


def _endings(group: Sequence[Any]) -> list[tuple[str, bool, int]]:
    return [(str(each), each.truncated, each.num_tokens) for each in group]


@pytest.mark.parametrize("max_rows", [None, 4])
@pytest.mark.parametrize("sharing", ["always", "never"])
@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 40}, {"stop_strings": ("30 ",)}, {"min_new_tokens": 9}], ids=str
)
def test_the_engine_tells_of_each_group_once_as_it_is_in_the_end(
    max_rows: int | None, sharing: Any, options: dict[str, Any]
) -> None:
    model, prompts, eos = build("llama"), prompt_batch((5, 9, 1, 4, 7)), range(1, 20)
    told: list[tuple[int, Sequence[Completion]]] = []
    engine = TransformersEngine(sharing, max_rows=max_rows)
    engine.on_group = lambda p, group: told.append((p, group))
    seeds_N = stream_seeds(0, 0, [p.index for p in prompts.prompts], 4)
    sampling = SamplingConfig(**{"max_new_tokens": 12, **options})
    completions = engine.generate(model, Tokenizer(), prompts, 4, sampling, seeds_N=seeds_N, eos_token_ids=eos)  # type: ignore[arg-type]
    assert sorted(p for p, _ in told) == list(range(5))
    assert len({int(n) for n in completions.lengths_N.view(5, 4).amax(-1)}) > 1 or options.get("min_new_tokens")
    for p, group in told:
        assert _endings(group) == _endings(completions.groups(4)[p])


class Patient(TransformersEngine):
    """Ends only when a source has been asked about a group."""

    asked = threading.Event()

    def generate(self, *args: Any, **kwargs: Any) -> Completions:
        assert self.on_group is not None
        completions = super().generate(*args, **kwargs)
        assert self.asked.wait(PATIENCE), "nobody was asked while it sampled"
        return completions


async def vowels_early(completion: str) -> float:
    Patient.asked.set()
    return count_vowels([], [completion])[0]


def test_a_run_asks_while_it_samples_and_trains_as_one_that_does_not(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module = make_module(tiny_policy, engine=Patient(), rewards=[FunctionReward(vowels_early, name="vowels")])
    fit(module, prompts_file, tmp_path / "early", max_steps=2)
    fit(make_module(tiny_policy), prompts_file, tmp_path / "plain", max_steps=2)
    for tag in ("train/loss", "reward/mean", "val/reward", "val/win_rate", "completion/length_mean"):
        assert scalars(tmp_path / "early", tag) == scalars(tmp_path / "plain", tag)
    engine = module.collector.engine
    assert isinstance(engine, Patient) and engine.on_group is None
