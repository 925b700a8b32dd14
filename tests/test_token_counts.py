"""Counting the tokens of all prompts: together as alone, once, and again whenever anything they depend on changes."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from time import sleep
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from gopo_lightning.data import token_counts
from gopo_lightning.data.prompt_dataset import Limit, PromptDataset
from gopo_lightning.data.rendering import PromptRenderer
from gopo_lightning.data.sources import PromptSource
from tests.conftest import CHAT_TEMPLATE

ROWS = [
    {"prompt": "say " + "é" * (i % 7), "who": i}
    if i % 3
    else {"prompt": [{"role": "user", "content": "hi" * (i % 5 + 1)}], "who": i}
    for i in range(40)
]


@pytest.fixture
def tokenizer(tiny_policy: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_policy)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of counts, which few rows already enter."""
    monkeypatch.setenv("GOPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_counts, "MIN_KEPT_ROWS", 10)
    return tmp_path / "cache" / "token-counts"


def renderer(tokenizer: Any, **options: Any) -> PromptRenderer:
    source = {key: options.pop(key) for key in ("path", "system_column") if key in options}
    return PromptRenderer(tokenizer, PromptSource(**({"path": "rows.jsonl"} | source)), **options)


def num_counted(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, rows: Any = ROWS, **options: Any) -> int:
    """How many rows a new dataset renders to count them; its fingerprint is that of each row alone."""
    render, counted = renderer(tokenizer, **options), []
    together = render.token_ids
    monkeypatch.setattr(render, "token_ids", lambda rows: [*map(counted.append, rows)] and together(rows))
    alone = [render(index, row) for index, row in enumerate(rows)]
    limit = max(len(prompt.token_ids) for prompt in alone) - 1
    dataset = PromptDataset(rows, render, Limit(limit, "drop"))
    short = [prompt for prompt in alone if len(prompt.token_ids) <= limit]
    assert [dataset[i][0].token_ids for i in range(len(dataset))] == [prompt.token_ids for prompt in short]
    assert 0 < dataset.num_overlong == len(alone) - len(short)
    monkeypatch.setattr(token_counts, "BATCH_ROWS", 1)
    single = token_counts._counted(rows, renderer(tokenizer, **options))
    monkeypatch.undo()
    assert dataset.fingerprint["tokens"] == single.digest
    return len(counted)


def test_rows_are_tokenised_together_as_alone(tokenizer: Any) -> None:
    render = renderer(tokenizer)
    assert render.token_ids([*enumerate(ROWS)]) == [[*render(i, row).token_ids] for i, row in enumerate(ROWS)]


def test_an_eos_at_the_end_is_left_out_of_each(tiny_policy: Path) -> None:
    tokenizer, end = AutoTokenizer.from_pretrained(tiny_policy), "<eos>"
    plain = [tokenizer(text)["input_ids"] for text in ("ab", "b")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    rows = [{"prompt": "ab"}, {"prompt": "b"}]
    assert tokenizer("ab")["input_ids"] == [*plain[0], tokenizer.eos_token_id]
    assert renderer(tokenizer).token_ids([*enumerate(rows)]) == plain


def test_counts_are_kept_until_something_changes(tokenizer: Any, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(rows: Any = ROWS, **options: Any) -> int:
        monkeypatch.setenv("GOPO_CACHE", str(kept.parent))
        monkeypatch.setattr(token_counts, "MIN_KEPT_ROWS", 10)
        return num_counted(monkeypatch, tokenizer, rows, **options)

    assert count() == 40
    assert count(path="moved.jsonl") == count() == 0
    assert count([*ROWS[:-1], {"prompt": "another", "who": 39}]) == 40
    assert count(system_prompt="short") == 40
    assert count(system_prompt="short") == 0
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "")
    assert count() == 40
    tokenizer.add_special_tokens({"additional_special_tokens": ["say"]})
    assert count() == 40
    assert count() == 0
    assert count(ROWS[:9]) == 9  # few
    (file, *_) = kept.glob("*.jsonl")
    for content in ("", "{", '{"counts": [1]}', json.dumps({"counts": [1], "digest": "a"})):
        for file in kept.glob("*.jsonl"):
            file.write_text(content)
        assert (count(), count()) == (40, 0)


def test_a_template_with_the_date_is_told_and_counted_each_time(
    tokenizer: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + CHAT_TEMPLATE
    with pytest.warns(UserWarning, match="writes today's date into the prompts"):
        assert num_counted(monkeypatch, tokenizer) == 40
    assert not kept.exists()


def test_nowhere_to_keep_them(tokenizer: Any, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.parent.write_text("a file where the folder should be")
    assert num_counted(monkeypatch, tokenizer) == 40


def test_of_those_that_ask_at_once_one_counts(tokenizer: Any, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads lock the file as processes do."""
    counted: list[int] = []
    both = Barrier(2)

    def count(_: int) -> str:
        render = renderer(tokenizer)
        together = render.token_ids
        render.token_ids = lambda rows: [counted.append(len(rows)), sleep(0.2)] and together(rows)  # type: ignore[method-assign]
        both.wait()
        return token_counts.count_tokens(ROWS, render, "rows").digest

    with ThreadPoolExecutor(2) as pool:
        digests = {*pool.map(count, range(2))}
    assert len(digests) == 1
    assert counted == [40]
