"""Prompts from files to batches: rendering, checking, sharding, and what goes wrong with a remedy."""

import json
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from lightning import LightningModule, Trainer
from transformers import AutoTokenizer

from gopo_lightning.data import ratings
from gopo_lightning.data.prompt_dataset import Limit, PromptDataset
from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.data.rendering import PromptRenderer
from gopo_lightning.data.sources import PromptSource, load_rows

ROWS = [{"prompt": f"say {i}" + "!" * i, "letter": "abc"[i % 3]} for i in range(10)]
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "so"},
]


@pytest.fixture
def tokenizer(tiny_policy: Path) -> Any:
    """One token a byte, a fresh one for each test."""
    return AutoTokenizer.from_pretrained(tiny_policy)


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def attached(
    tokenizer: Any, *, rank: int = 0, world_size: int = 1, processed: int = 0, **options: Any
) -> PromptDataModule:
    """A data module on a stand-in for a Trainer of ``world_size`` ranks."""
    data = PromptDataModule(**options)
    total = SimpleNamespace(processed=processed)
    data.trainer = SimpleNamespace(
        overfit_batches=0,
        distributed_sampler_kwargs=None if world_size == 1 else {"num_replicas": world_size, "rank": rank},
        lightning_module=SimpleNamespace(tokenizer=tokenizer),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total))),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    return data


def render(tokenizer: Any, value: Any, column: str = "prompt", **options: Any) -> Any:
    source = PromptSource(path="rows.jsonl", messages_column=None if column == "prompt" else column)
    return PromptRenderer(tokenizer, source, **options)(7, {column: value, "other": 3})


def decoded(tokenizer: Any, prompt: Any) -> str:
    return tokenizer.decode(list(prompt.token_ids))


# Sources


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_local_files_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS))
    elif suffix == "csv":
        Dataset.from_list(ROWS).to_csv(path)
    else:
        Dataset.from_list(ROWS).to_parquet(path)
    rows = load_rows(PromptSource(path=str(path), limit=4))
    assert [dict(rows[i]) for i in range(len(rows))] == ROWS[:4]


def test_packaged_ratings_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from gopo_lightning.data import sources

    monkeypatch.setitem(sources.PACKAGED, "packaged:movie-ratings", lambda split: [{"prompt": split, "mean": 1.0}])
    assert load_rows(PromptSource(path="packaged:movie-ratings")) == [{"prompt": "train", "mean": 1.0}]
    held_out = load_rows(PromptSource(path="packaged:movie-ratings", split="validation"))
    assert held_out == [{"prompt": "validation", "mean": 1.0}]
    assert callable(ratings.prompts)


def test_hub_datasets_get_name_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    from gopo_lightning.data import sources

    seen: list[Any] = []
    monkeypatch.setattr(
        sources.datasets, "load_dataset", lambda *a, **k: seen.append((a, k)) or Dataset.from_list(ROWS)
    )
    load_rows(PromptSource(path="trl-lib/tldr"))
    load_rows(PromptSource(path="trl-lib/tldr", name="x", split="test", revision="abc"))
    assert seen[0] == (("trl-lib/tldr", None), {"split": "train", "revision": None})
    assert seen[1] == (("trl-lib/tldr", "x"), {"split": "test", "revision": "abc"})


def test_a_split_may_be_a_part_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The paper's chat and instruction following are validated on what is held out of train."""
    rows = write(tmp_path, [{"prompt": str(number)} for number in range(10)])
    read = partial(datasets.load_dataset, "json", data_files=rows, cache_dir=str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split, revision: read(split=split))
    parts = [load_rows(PromptSource(path="some/hub", split=split)) for split in ("train[:-3]", "train[-3:]")]
    assert [[int(row["prompt"]) for row in part] for part in parts] == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', r"rows\.jsonl, line 2: not JSON"),
        (b'{"prompt": "a"}\n\n["b"]\n', r"rows\.jsonl, line 3: a list, but .* object"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"rows\.jsonl, line 2: not JSON .*utf-8"),
        (b'{"prompt": "a"}\n{"text": "b"}\n', r"no column 'prompt' in row 1; it has \['text'\]"),
        (b"", "has no rows"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(PromptSource(path=str(tmp_path / "rows.jsonl")))


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes('{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}'.encode())
    rows = load_rows(PromptSource(path=str(tmp_path / "rows.jsonl")))
    assert [row["prompt"] for row in rows] == ["a\u2028b\u0085c", "d"]


def test_an_empty_csv_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    with pytest.raises(ValueError, match=r"rows\.csv is empty"):
        load_rows(PromptSource(path=str(tmp_path / "rows.csv")))
    with pytest.raises(ValueError, match=r"no file .*gone\.jsonl"):
        load_rows(PromptSource(path=str(tmp_path / "gone.jsonl")))
    path = write(tmp_path, ROWS)
    with pytest.raises(ValueError, match=r"no column 'question'.*\['letter', 'prompt'\]"):
        load_rows(PromptSource(path=path, prompt_column="question"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "rows.csv", "split": "test"}, "no split"),
        ({"path": "rows.csv", "name": "x", "revision": "y"}, "no name, revision"),
        ({"path": "packaged:movie-ratings", "revision": "y"}, "no revision"),
        ({"path": "packaged:books"}, r"unknown data set 'packaged:books'.*movie-ratings"),
        ({"path": "x", "limit": 0}, "limit=0"),
    ],
)
def test_source_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSource(**options)


# Rendering


def test_a_plain_prompt_is_tokenised_as_it_stands(tokenizer: Any) -> None:
    prompt = render(tokenizer, "Review: A film")
    assert decoded(tokenizer, prompt) == "Review: A film"
    assert (prompt.index, prompt.text, prompt.messages) == (7, "Review: A film", None)
    assert prompt.columns == {"other": 3}


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_conversation_loses_its_answer_and_is_templated(tokenizer: Any, column: str) -> None:
    prompt = render(tokenizer, TURNS, column)
    assert decoded(tokenizer, prompt) == "<user>hi<eos><assistant>hello<eos><user>and?<eos><assistant>"
    assert prompt.text == "and?"
    assert prompt.messages == tuple(TURNS[:3])


def test_a_system_prompt_goes_first_and_replaces_the_rows_own(tokenizer: Any) -> None:
    own = [{"role": "system", "content": "be long"}, TURNS[0]]
    for value in ("hi", [TURNS[0]], own):
        prompt = render(tokenizer, value, system_prompt="be short")
        assert decoded(tokenizer, prompt) == "<system>be short<eos><user>hi<eos><assistant>"
        assert prompt.text == "hi"
        assert prompt.messages == ({"role": "system", "content": "be short"}, TURNS[0])


@pytest.mark.parametrize("value", ["hi", [TURNS[0]]], ids=["text", "messages"])
def test_an_empty_system_prompt_is_an_empty_turn(tokenizer: Any, value: Any) -> None:
    """As in the paper's chat recipe; it makes a conversation of a text, and reward models read it too."""
    prompt = render(tokenizer, value, system_prompt="")
    assert decoded(tokenizer, prompt) == "<system><eos><user>hi<eos><assistant>"
    assert prompt.messages == ({"role": "system", "content": ""}, TURNS[0])


def test_always_makes_a_plain_string_a_user_message(tokenizer: Any) -> None:
    prompt = render(tokenizer, "hi", apply_chat_template="always")
    assert decoded(tokenizer, prompt) == "<user>hi<eos><assistant>"


def test_chat_template_kwargs_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if enable_thinking %}think {% endif %}{{ messages[0]['content'] }}"
    assert decoded(tokenizer, render(tokenizer, "hi", chat_template_kwargs={"enable_thinking": True})) == "think hi"
    with pytest.raises(ValueError, match=r"\['thinking_budget'\] do not occur"):
        render(tokenizer, "hi", chat_template_kwargs={"thinking_budget": 3})


def with_bos_and_eos(tokenizer: Any) -> Any:
    """Adds <bos> before and <eos> after plain text, as some tokenizers do."""
    from tokenizers.processors import TemplateProcessing

    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    return tokenizer


def test_bos_comes_once_and_eos_never(tokenizer: Any) -> None:
    tokenizer = with_bos_and_eos(tokenizer)
    assert decoded(tokenizer, render(tokenizer, "hi")) == "<bos>hi"
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    assert decoded(tokenizer, render(tokenizer, [TURNS[0]])) == "<bos><user>hi<eos><assistant>"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is a NoneType, not a string"),
        (3, "is a int, not a string"),
        ("  \n", "is empty"),
        ([], "has no user message"),
        ([{"role": "assistant", "content": "so"}], "has no user message"),
        ([{"role": "user", "content": ""}], "ends in an empty user message"),
        ([{"content": "hi"}], "has a message without a role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has a message without text"),
        (["hi"], "has a message without a role"),
    ],
)
def test_a_bad_row_is_named(tokenizer: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"row 7 .*rows\.jsonl: column 'prompt' {message}"):
        render(tokenizer, value)


SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}, {"from": "human", "value": "and?"}]
PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"], "image_url": None}]} for turn in TURNS]


@pytest.mark.parametrize("value", [SHAREGPT, PARTS, json.dumps(TURNS), json.dumps(SHAREGPT)])
def test_other_ways_to_write_a_conversation(tokenizer: Any, value: Any) -> None:
    prompt = render(tokenizer, value, "messages")
    assert decoded(tokenizer, prompt) == "<user>hi<eos><assistant>hello<eos><user>and?<eos><assistant>"
    assert prompt.messages == tuple(TURNS[:3])


def test_messages_as_pandas_writes_them_into_csv(tokenizer: Any) -> None:
    """Python's notation: single quotes, None and True. NumPy's has no commas, which nothing reads."""
    assert render(tokenizer, str(TURNS), "messages").messages == tuple(TURNS[:3])
    with pytest.raises(ValueError, match=r"row 7 .*column 'prompt' holds messages as text.*messages_column: prompt"):
        render(tokenizer, str(TURNS))
    for column in ("prompt", "messages"):
        with pytest.raises(ValueError, match=r"row 7 .* looks like messages, but is no JSON: .* Write them as JSON"):
            render(tokenizer, str(TURNS).replace("}, {", "}\n {"), column)


def test_what_a_template_would_read_beside_messages_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if tools %}{{ tools }}{% endif %}" + tokenizer.chat_template
    source = PromptSource(path="rows.jsonl")
    with pytest.warns(UserWarning, match=r"rows.jsonl has columns \['tools'\], which the chat template would write"):
        PromptRenderer(tokenizer, source)(0, {"prompt": TURNS[:1], "tools": [{"name": "add"}], "documents": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptRenderer(tokenizer, source)(0, {"prompt": TURNS[:1], "tools": []})


def test_an_answer_that_a_prompt_ends_with_is_left_out_and_told_once(tokenizer: Any) -> None:
    renderer = PromptRenderer(tokenizer, PromptSource(path="rows.jsonl"))
    with pytest.warns(UserWarning, match=r"end with an assistant's message, as row 3 does: it is left out"):
        assert renderer(3, {"prompt": TURNS}).messages == tuple(TURNS[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        renderer(4, {"prompt": TURNS})
        PromptRenderer(tokenizer, PromptSource(path="x", messages_column="turns"))(0, {"turns": TURNS})


def test_text_is_not_taken_for_messages_nor_messages_for_text(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"row 7 .*column 'prompt' holds messages as text.*messages_column: prompt"):
        render(tokenizer, json.dumps(TURNS))
    for text in ("hi", "[1, 2]", '[{"a": 1}]', "[not JSON"):
        assert render(tokenizer, text).text == text
        with pytest.raises(ValueError, match="row 7 .*column 'messages' is a str, not messages or JSON text of them"):
            render(tokenizer, text, "messages")


@pytest.mark.parametrize("value", ["cut \ud83d", [{"role": "user", "content": "cut \ud83d"}]])
def test_half_a_character_is_found_with_its_row(tokenizer: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"row 7 .*rows\.jsonl: half a character .* at position .*'.*cut '\. Repair"):
        render(tokenizer, value)


def test_what_a_template_refuses_is_found_with_its_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    assert decoded(tokenizer, render(tokenizer, TURNS)) == "x"
    with pytest.raises(
        ValueError, match=r"row 7 .*rows\.jsonl: the chat template refuses .*roles system, user: no system"
    ):
        render(tokenizer, "hi", system_prompt="be short")
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(ValueError, match=r"row 7 .*rows\.jsonl: the chat template refuses"):
        render(tokenizer, TURNS)


def test_a_system_message_in_each_row(tokenizer: Any) -> None:
    """As Intel/orca_dpo_pairs; blank ones are none, and a system_prompt replaces them."""
    source = PromptSource(path="rows.jsonl", prompt_column="question", system_column="system")
    rows = [{"question": "hi", "system": system} for system in ("be brief", "", None)]
    shown = [decoded(tokenizer, PromptRenderer(tokenizer, source)(0, row)) for row in rows]
    assert shown == ["<system>be brief<eos><user>hi<eos><assistant>"] + ["<user>hi<eos><assistant>"] * 2
    replaced = PromptRenderer(tokenizer, source, system_prompt="be long")(0, rows[0])
    assert decoded(tokenizer, replaced).startswith("<system>be long")
    with pytest.raises(ValueError, match="row 3 .*column 'system' is a int, not a text"):
        PromptRenderer(tokenizer, source)(3, {"question": "hi", "system": 1})


def test_a_template_that_is_missing_or_forbidden(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="conversation, which apply_chat_template='never'"):
        render(tokenizer, TURNS, apply_chat_template="never")
    tokenizer.chat_template = None
    assert render(tokenizer, "hi").text == "hi"
    with pytest.raises(ValueError, match="tokenizer has none"):
        render(tokenizer, TURNS)


# Overlong prompts


def dataset(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> PromptDataset:
    return PromptDataset(rows, PromptRenderer(tokenizer, PromptSource(path="rows.jsonl")), Limit(**options))


def test_overlong_prompts(tokenizer: Any) -> None:
    rows = [{"prompt": "a" * n} for n in (3, 5, 2, 4)]
    with pytest.raises(ValueError, match=r"row 1 .*has 5 tokens, more than max_prompt_tokens=4"):
        dataset(tokenizer, rows, max_tokens=4)
    dropped = dataset(tokenizer, rows, max_tokens=3, overlong="drop")
    assert [dropped[i][0].index for i in range(len(dropped))] == [0, 2]
    assert dropped.num_overlong == 2
    assert dropped[2] == (dropped[0][0], True), "an item beyond the end is padding"
    with pytest.raises(ValueError, match=r"all 4 prompts .* longer than max_prompt_tokens=1"):
        dataset(tokenizer, rows, max_tokens=1, overlong="drop")


def test_truncate_left_keeps_the_end_and_the_bos(tokenizer: Any) -> None:
    rows = [{"prompt": "abcdef"}]
    cut = dataset(tokenizer, rows, max_tokens=4, overlong="truncate_left")
    assert decoded(tokenizer, cut[0][0]) == "cdef"
    assert (cut.num_overlong, cut[0][0].text) == (1, "abcdef")
    cut = dataset(with_bos_and_eos(tokenizer), rows, max_tokens=4, overlong="truncate_left")
    assert decoded(tokenizer, cut[0][0]) == "<bos>def"


# The data module


def test_training_batches_of_two_ranks_make_that_of_one(tokenizer: Any, tmp_path: Path) -> None:
    options = {"train": PromptSource(path=write(tmp_path, ROWS)), "prompts_per_step": 4, "seed": 3}

    def indices(**where: int) -> list[list[int]]:
        data = attached(tokenizer, **where, **options)
        data.setup("fit")
        return [[p.index for p in batch["prompts"].prompts] for batch in data.train_dataloader()]

    whole = indices()
    assert [len(step) for step in whole] == [4, 4]
    assert len(set(sum(whole, []))) == 8  # noqa: RUF017
    first, second = indices(rank=0, world_size=2), indices(rank=1, world_size=2)
    assert [step[::2] for step in whole] == first
    assert [step[1::2] for step in whole] == second
    assert indices(processed=1)[0] == whole[1]


def test_batches_are_left_padded_and_evaluation_marks_padding(tokenizer: Any, tmp_path: Path) -> None:
    source = PromptSource(path=write(tmp_path, ROWS[:5]))
    data = attached(tokenizer, rank=1, world_size=2, validation=source, val_prompts_per_step=4)
    data.setup("validate")
    first, last = data.val_dataloader()
    assert [p.index for p in first["prompts"].prompts] == [1, 3]
    assert first["prompts"].mask_PL.tolist() == [[False] * 2 + [True] * 6, [True] * 8]
    assert first["prompts"].tokens_PL[0, 0] == tokenizer.pad_token_id
    assert first["is_padding"].tolist() == [False, False]
    assert [p.index for p in last["prompts"].prompts] == [0]
    assert last["is_padding"].tolist() == [True]
    assert first["prompts"].prompts[0].columns == {"letter": "b"}


def test_overlong_counts_are_kept_and_logged(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = PromptSource(path=write(tmp_path, ROWS))
    data = attached(tokenizer, train=source, max_prompt_tokens=8, overlong="drop", prompts_per_step=4)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert data.num_overlong == {"train": 6}
    assert "train: 4 prompts" in caplog.text
    assert "6 longer than 8 tokens were dropped" in caplog.text


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ({"world_size": 3}, {"prompts_per_step": 4}, "prompts_per_step=4 .*world size 3"),
        ({}, {"prompts_per_step": 16}, "has 10 prompts, fewer than prompts_per_step=16"),
    ],
)
def test_steps_that_do_not_fit_are_refused(
    tokenizer: Any, tmp_path: Path, where: dict[str, int], options: dict[str, int], message: str
) -> None:
    data = attached(tokenizer, **where, train=PromptSource(path=write(tmp_path, ROWS)), **options)
    data.setup("fit")
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()


def test_missing_parts_and_options_without_effect_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    for stage, part in (("fit", "train"), ("validate", "validation"), ("test", "test"), ("predict", "predict")):
        with pytest.raises(ValueError, match=f"no {part} prompts"):
            attached(tokenizer).setup(stage)
    with pytest.raises(ValueError, match="without effect"):
        PromptDataModule(apply_chat_template="never", system_prompt="x")
    with pytest.raises(ValueError, match="max_prompt_tokens=0"):
        PromptDataModule(max_prompt_tokens=0)
    data = attached(tokenizer, train=PromptSource(path=write(tmp_path, ROWS)), prompts_per_step=2)
    data.setup("fit")
    data.trainer.overfit_batches = 1
    with pytest.raises(ValueError, match="overfit_batches=1"):
        data.train_dataloader()
    data = attached(tokenizer, world_size=2, train=PromptSource(path=write(tmp_path, ROWS)), prompts_per_step=2)
    data.setup("fit")
    data.trainer._accelerator_connector.use_distributed_sampler = True
    with pytest.raises(ValueError, match="use_distributed_sampler: false"):
        data.train_dataloader()
    data.trainer._accelerator_connector.use_distributed_sampler = False
    data.trainer.overfit_batches, tokenizer.pad_token = 0, None
    with pytest.raises(ValueError, match="no pad token"):
        data.train_dataloader()


# In a Trainer


class Reader(LightningModule):
    """Reads prompts in every stage, and adds to the batch as the rollout does."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[int]] = {"train": [], "validation": [], "predict": []}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch["experience"] = batch_idx

    def _read(self, part: str, batch: Any) -> None:
        kept = [p.index for p, pad in zip(batch["prompts"].prompts, batch["is_padding"], strict=True) if not pad]
        self.seen[part] += kept

    def training_step(self, batch: Any, batch_idx: int) -> None:
        assert batch["experience"] == batch_idx
        self._read("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._read("validation", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self._read("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet, **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_every_stage_under_every_precision(tokenizer: Any, tmp_path: Path, precision: str) -> None:
    source = PromptSource(path=write(tmp_path, ROWS))
    data = PromptDataModule(train=source, validation=source, predict=source, prompts_per_step=4)
    module = Reader(tokenizer)
    trainer(max_epochs=1, precision=precision, num_sanity_val_steps=0).fit(module, data)
    assert len(set(module.seen["train"])) == 8
    assert module.seen["validation"] == list(range(10))
    trainer(precision=precision).predict(module, data)
    assert module.seen["predict"] == list(range(10))


def test_fit_without_validation(tokenizer: Any, tmp_path: Path) -> None:
    data = PromptDataModule(train=PromptSource(path=write(tmp_path, ROWS)), prompts_per_step=4)
    module = Reader(tokenizer)
    trainer(max_epochs=1).fit(module, data)
    assert len(module.seen["train"]) == 8
