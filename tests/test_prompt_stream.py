"""Prompts that are read while training: the same on every number of ranks, through a resume, and checked row by row."""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gopo_lightning.data import sources
from gopo_lightning.data.prompt_dataset import Limit
from gopo_lightning.data.prompt_stream import PromptStream, StreamPlace, shuffled
from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.data.rendering import PromptRenderer
from gopo_lightning.data.sources import PromptSource
from tests.ranks import Case, assert_same_run, launch, on, read, run_case
from tests.runs import make_data, make_module, make_trainer
from tests.test_prompts import attached, write
from tests.test_resume import assert_identical

ROWS = [{"prompt": f"say {'ab' * (i % 9)}{i}", "letter": "abc"[i % 3]} for i in range(30)]


NO_LIMIT = Limit()


@pytest.fixture
def tokenizer(tiny_policy: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_policy)


def stream(tokenizer: Any, path: str, *, buffer: int = 7, limit: Limit = NO_LIMIT, **options: Any) -> PromptStream:
    render = PromptRenderer(tokenizer, PromptSource(path, stream_buffer=buffer))
    return PromptStream(render, limit, **({"prompts_per_step": 4, "seed": 5} | options))


def rows_of(batches: Any) -> list[list[int]]:
    return [[prompt.index for prompt in batch["prompts"].prompts] for batch in batches]


@settings(deadline=None)
@given(num_rows=st.integers(0, 40), size=st.integers(1, 50), seed=st.integers(0, 9))
def test_shuffling_keeps_every_row_and_reaches_no_further_than_the_buffer(num_rows: int, size: int, seed: int) -> None:
    order = [number for number, _ in shuffled(((n, {}) for n in range(num_rows)), size, seed)]
    assert sorted(order) == list(range(num_rows))
    assert all(number < place + size for place, number in enumerate(order))
    if size == 1:
        assert order == sorted(order)


def test_rows_have_the_columns_of_those_that_are_read_ahead(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "a"}, {"prompt": "b", "answer": "4"}, {"prompt": "c"}, {"prompt": "d", "x": 1}])
    rows = list(sources.stream_rows(PromptSource(path, stream_buffer=2)))
    assert [row.get("answer", "absent") for row in rows] == [None, "4", None, None]
    assert [row.get("x", "absent") for row in rows] == ["absent"] * 3 + [1]


def test_every_place_of_a_row_is_equally_likely_within_the_buffer() -> None:
    first = Counter(next(shuffled(((n, {}) for n in range(9)), 5, seed))[0] for seed in range(2000))
    assert {*first} == {0, 1, 2, 3, 4}
    assert all(abs(count - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5 for count in first.values())


def test_ranks_share_the_steps_of_one(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    whole = rows_of(stream(tokenizer, path))
    assert [*map(len, whole)] == [4] * 7
    assert len({row for step in whole for row in step}) == 28
    assert whole != rows_of(stream(tokenizer, path, seed=6))
    for rank in (0, 1):
        ours = rows_of(stream(tokenizer, path, rank=rank, world_size=2))
        assert ours == [step[rank::2] for step in whole]
    assert rows_of(stream(tokenizer, path, buffer=1)) == [[*range(i, i + 4)] for i in range(0, 28, 4)]


def test_a_stream_goes_on_after_any_step_and_with_a_new_epoch(tokenizer: Any, tmp_path: Path) -> None:
    """Also one whose next steps are read ahead, and with prompts that are dropped on the way."""
    path, limit = write(tmp_path, ROWS), Limit(18, "drop")
    done = [0]
    run = stream(tokenizer, path, limit=limit, position=lambda: done[0])
    steps: list[list[int]] = []
    places = [run.place(0)]
    for _ in range(3):
        ahead = rows_of([])
        for batch in run:
            ahead.append([prompt.index for prompt in batch["prompts"].prompts])
            if len(ahead) > 1:  # one is read ahead
                done[0] += 1
                places.append(run.place(done[0]))
        done[0] += 1
        places.append(run.place(done[0]))
        steps += ahead
    assert {place.epoch for place in places} == {0, 1, 2} and len(steps) == len(places) - 1 > 12
    for number, place in enumerate(places[:-1]):
        again = stream(tokenizer, path, limit=limit, position=lambda: number, origin=lambda: place)  # noqa: B023
        assert rows_of(islice(again, 1)) == [steps[number]]
    kept = {i for i, row in enumerate(ROWS) if len(row["prompt"]) <= 18}
    assert {row for step in steps for row in step} <= kept < {*range(30)}


def test_other_rows_than_were_read_are_told(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    first = stream(tokenizer, path, buffer=1)
    next(iter(first))
    place = first.place(1)
    for changed, told in (
        (ROWS, 0),
        (ROWS[:2] + ROWS[3:], 1),
        (ROWS[:20], 0),  # what was not read yet may change
        ([*ROWS[:3], {"prompt": ROWS[3]["prompt"], "letter": "z"}, *ROWS[4:]], 1),
        (ROWS[:3], 1),
    ):
        write(tmp_path, changed)
        said: list[str] = []
        after = stream(
            tokenizer, path, buffer=1, position=lambda: 1, origin=lambda: place, on_change=said.append,
        )  # fmt: skip
        with pytest.raises(ValueError, match="fewer than") if len(changed) == 3 else nullcontext():
            next(iter(after))
        assert len(said) == told
        assert not said or said[0] == f"the first 4 rows of epoch 0 of {path}"


def test_prompts_that_are_too_long(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    with pytest.raises(ValueError, match=r"row 5 \(counted from 0\) .* has 15 tokens, more than max_prompt_tokens=14"):
        rows_of(stream(tokenizer, path, buffer=1, limit=Limit(14)))
    batches = [*stream(tokenizer, path, buffer=1, limit=Limit(14, "truncate_left"))]
    assert rows_of(batches)[1] == [4, 5, 6, 7]
    assert max(len(prompt.token_ids) for batch in batches for prompt in batch["prompts"].prompts) == 14


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"prompt": ""}], r"row 1 .*column 'prompt' is empty"),
        ([{"prompt": "a"}, {"question": "b"}], r"has no column 'prompt' in row 1; it has \['question'\]"),
        ([{"prompt": "a"}, 3], r"line 2: a int, but a line must be a JSON object"),
        ([{"prompt": "a"}], r"fewer than prompts_per_step=4 prompts that can be used"),
    ],
)
def test_a_wrong_row_is_refused_when_its_turn_comes(rows: Any, message: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(stream(tokenizer, write(tmp_path, rows)))


def test_a_dataset_of_the_hub_is_streamed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return iter(ROWS)

    monkeypatch.setattr(sources.datasets, "load_dataset", load)
    source = PromptSource("trl-lib/tldr", split="train", revision="a", stream_buffer=1)
    steps = rows_of(PromptStream(PromptRenderer(tokenizer, source), Limit(), prompts_per_step=4, seed=0))
    assert steps[0] == [0, 1, 2, 3]
    assert asked == [(("trl-lib/tldr", None), {"split": "train", "revision": "a", "streaming": True})]


# The data module


def module_of(tokenizer: Any, path: str, buffer: int | None = 7, **options: Any) -> PromptDataModule:
    train = PromptSource(path, stream_buffer=buffer)
    return attached(tokenizer, **({"train": train, "max_prompt_tokens": 30, "prompts_per_step": 4} | options))


def test_what_a_stream_needs_is_said_at_the_start(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    with pytest.raises(ValueError, match="needs max_prompt_tokens"):
        module_of(tokenizer, path, max_prompt_tokens=None).setup("fit")
    with pytest.raises(ValueError, match="stream_buffer=0 must be at least 1"):
        PromptSource(path, stream_buffer=0)
    validated = {"validation": PromptSource(path, stream_buffer=3)}
    with pytest.raises(ValueError, match="only training prompts can be streamed"):
        module_of(tokenizer, path, **validated).setup("validate")
    with pytest.raises(ValueError, match=r"row 0 .* is empty"):
        module_of(tokenizer, write(tmp_path, [{"prompt": " "}], "b.jsonl")).setup("fit")
    with pytest.raises(ValueError, match="prompts_per_step=3 .*multiple of the world size 2"):
        data = module_of(tokenizer, path, prompts_per_step=3, world_size=2)
        data.setup("fit")
        data.train_dataloader()
    data = module_of(tokenizer, path)
    data.setup("fit")
    assert data.longest_prompts["train"][0] == 30
    with pytest.raises(ValueError, match="cannot be streamed"):
        (tmp_path / "a.json").write_text(json.dumps(ROWS))
        module_of(tokenizer, str(tmp_path / "a.json")).setup("fit")


def streamed(path: Path, **options: Any) -> PromptDataModule:
    source = PromptSource(str(path), stream_buffer=5)
    return make_data(path, **({"train": source, "validation": None, "max_prompt_tokens": 90} | options))


def test_refill_of_a_stream_is_refused(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of a stream the next step's are read ahead"):
        make_trainer(tmp_path).fit(make_module(tiny_policy, refill=2), streamed(prompts_file))


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven steps: the twelve prompts make three a time."""
    folder = tmp_path_factory.mktemp("stream")
    data = {"train": PromptSource(str(prompts_file), stream_buffer=5), "max_prompt_tokens": 40}
    whole = Case("whole", max_steps=7, data=data)
    run_case(whole, tiny_policy, prompts_file, folder, 1)
    for steps in (2, 3):
        run_case(replace(whole, name=f"{steps}.first", max_steps=steps), tiny_policy, prompts_file, folder, 1)
        run_case(
            replace(whole, name=f"{steps}.rest", resume=f"{steps}.first.ckpt"), tiny_policy, prompts_file, folder, 1
        )
    launch([on("ddp", whole), on("fsdp2", whole, resume="2.first.ckpt")], tiny_policy, prompts_file, folder, 2)
    return folder


def test_two_ranks_stream_like_one(results: Path) -> None:
    assert_same_run(results, "ddp-whole", "whole")
    steps = [read(results, name)[0]["steps"] for name in ("fsdp2-whole", "whole")]
    assert [step["texts"] for step in steps[0]] == [step["texts"] for step in steps[1][2:]]
    assert len({index for step in steps[1][:3] for index in step["texts"]}) == 12


@pytest.mark.parametrize("steps", [2, 3])
def test_a_resumed_stream_reads_on(steps: int, results: Path) -> None:
    """In the middle of an epoch and at its end."""
    rest, whole = read(results, f"{steps}.rest"), read(results, "whole")
    for key in ("state_dict", "optimizer_states"):
        assert_identical(rest[1][key], whole[1][key])
    assert rest[1]["PromptDataModule"]["place"] == whole[1]["PromptDataModule"]["place"]


def test_changed_rows_are_refused_or_warned_of_on_resume(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = prompts_file.read_text().splitlines()
    path.write_text("\n".join(lines))
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(tiny_policy), streamed(path))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    place = torch.load(tmp_path / "a.ckpt", weights_only=True)["PromptDataModule"]["place"]
    assert (place["step"], place["epoch"], place["offset"], len(place["read"])) == (1, 0, 4, 64)

    def resume(**options: Any) -> Any:
        again = make_trainer(tmp_path / "again", max_steps=2, limit_val_batches=0)
        again.fit(make_module(tiny_policy), streamed(path, **options), ckpt_path=tmp_path / "a.ckpt")
        return again

    assert resume().global_step == 2
    with pytest.raises(ValueError, match="stream_buffer"):
        resume(train=PromptSource(str(path), stream_buffer=6))
    with pytest.warns(UserWarning, match="from the beginning of epoch 1"):
        resume(train=PromptSource(str(path), stream_buffer=6), on_data_change="warn")
    for changed in ({"max_prompt_tokens": 80}, {"overlong": "drop"}):
        with pytest.raises(ValueError, match=f"differs in {next(iter(changed))}"):
            resume(**changed)
    with pytest.warns(UserWarning, match="after the 4 rows that epoch 0 has read"):
        resume(prompts_per_step=2, on_data_change="warn")
    with pytest.raises(ValueError, match="differs in how prompts are rendered"):
        resume(system_prompt="Be short.")
    with pytest.raises(ValueError, match="the content of rows|stream_buffer"):
        resume(train=PromptSource(str(path)))  # no stream any more
    path.write_text("\n".join(reversed(lines)))
    with pytest.raises(ValueError, match="are not those that the run has read before. Restore them"):
        resume()
    with pytest.warns(UserWarning, match="Going on after as many"):
        resume(on_data_change="warn")


def test_a_place_of_prompts_is_none_of_a_stream(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    data = module_of(tokenizer, path)
    data.setup("fit")
    assert data.go_on({"place": {"step": 3, "epoch": 1, "offset": 4}}, drawn_anew=True).endswith("epoch 2")
    assert data._origin == StreamPlace(3, 2)
    data = module_of(tokenizer, path, None)
    data.setup("fit")
    data.go_on({"place": {"step": 3, "epoch": 1, "offset": 4, "read": "a"}}, drawn_anew=True)
    assert (data._origin.step, data._origin.epoch) == (3, 2)
