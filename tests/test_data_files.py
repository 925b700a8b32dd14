"""Local data: every kind of file, patterns, folders, saved datasets; what is local; errors that name the place."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from gopo_lightning.data import sources
from gopo_lightning.data.files import _found, _is_saved, _kind
from gopo_lightning.data.sources import PromptSource, load_rows, stream_rows

ROWS = [
    {"prompt": f"say {n}", "gold": answer} for n, answer in enumerate(["None", "NA", "null", "007", "1.0", "True", ""])
]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def read(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    """The rows, as a stream gives them too, but of what is one value."""
    rows = [dict(row) for row in load_rows(PromptSource(str(path), **options))]
    source = PromptSource(str(path), stream_buffer=1, **options)
    place = Path(path).expanduser()
    files = [] if _is_saved(place) else _found(str(path), place)
    if any(_kind(file) == ".json" for file in files):
        with pytest.raises(ValueError, match="is one value, whose rows cannot be streamed"):
            list(stream_rows(source))
    else:
        assert [{**dict.fromkeys(rows[0]), **row} for row in stream_rows(source)] == rows
    return rows


KINDS: dict[str, bytes] = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "A.JSONL": LINES,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(),
    "pandas.json": json.dumps({key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]}).encode(),
    "lines.json": LINES,
    "a.csv": ("\ufeffprompt,gold\r\n" + "".join(f"{r['prompt']},{r['gold']}\r\n" for r in ROWS)).encode(),
    "a.tsv": ("prompt\tgold\n" + "".join(f"{r['prompt']}\t{r['gold']}\n" for r in ROWS)).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.csv.GZ": gzip.compress(("prompt,gold\n" + "".join(f"{r['prompt']},{r['gold']}\n" for r in ROWS)).encode()),
    "a.jsonl.bz2": bz2.compress(LINES),
    "v1.2.json.xz": lzma.compress(LINES),
    "a.jsonl.zst": pyarrow.compress(LINES[:40], "zstd", asbytes=True)
    + pyarrow.compress(LINES[40:], "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    """No kind guesses types or empties: cells of text stay the text that stands there."""
    (tmp_path / name).write_bytes(KINDS[name])
    assert read(tmp_path / name) == ROWS


def test_parquet_and_text(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.Parquet")
    assert read(tmp_path / "a.Parquet") == ROWS
    (tmp_path / "a.txt").write_bytes("one\r\n\ntwo\u2028still two\n".encode())
    assert read(tmp_path / "a.txt") == [{"prompt": "one"}, {"prompt": "two\u2028still two"}]


def test_no_sign_in_a_files_name_is_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "[v1] x*"
    folder.mkdir()
    Dataset.from_list(ROWS).to_parquet(folder / "a[1]?.parquet")
    (folder / "b[1]?.jsonl").write_bytes(KINDS["a.jsonl"])
    assert read(folder / "a[1]?.parquet") == read(folder / "b[1]?.jsonl") == ROWS


def test_cells_may_hold_commas_quotes_newlines_and_much_text(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f'prompt,gold\n"a, ""b""\nc",{long}\n\n')
    assert read(tmp_path / "a.csv") == [{"prompt": 'a, "b"\nc', "gold": long}]


def test_a_single_object_is_a_row(tmp_path: Path) -> None:
    """Also where its cells are lists of messages, which are no columns."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"prompt": "x", "gold": 1}, {"prompt": turns, "chosen": turns}):
        (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
        assert read(tmp_path / "a.json") == [row]


def test_patterns_and_folders_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "b.jsonl").write_text('{"prompt": "b", "gold": "x"}')
    (tmp_path / "data" / "deep" / "c.json").write_text('[{"prompt": "c"}]')
    (tmp_path / "data" / "dataset_infos.json").write_text("{}")
    (tmp_path / "data" / "README.md").write_text("no data")
    (tmp_path / "data" / ".cache.jsonl").write_text('{"prompt": "hidden"}')
    rows = [{"prompt": "b", "gold": "x"}, {"prompt": "c", "gold": None}]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert read(tmp_path / "data") == read("data") == read("~/data") == read("./data") == rows
    assert read("data/*.jsonl") == rows[:1]
    assert read("data/**/*.json*") == rows
    with pytest.raises(ValueError, match=r"no file matches data/\*\.csv"):
        read("data/*.csv")
    with pytest.raises(ValueError, match=r"README\.md is of no kind that is read\. Use one of \.jsonl"):
        read("data/*.md")


def test_a_folder_of_several_splits_or_of_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no data"):
        read(tmp_path)
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "trainer.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    assert len(read(tmp_path)) == 3 * len(ROWS)
    (tmp_path / "test.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        read(tmp_path)


def test_saved_datasets(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "both")
    DatasetDict({"test": data.select([0])}).save_to_disk(tmp_path / "test_only")
    assert read(tmp_path / "one") == read(tmp_path / "both") == ROWS
    assert read(tmp_path / "both", split="test") == read(tmp_path / "test_only") == ROWS[:1]
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has \['test', 'train'\]"):
        read(tmp_path / "both", split="dev")
    with pytest.raises(ValueError, match="has no split"):
        PromptSource(str(tmp_path / "one"), split="test")


# --- local or not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./x", "../x", "/x/y", "~/x", "x.jsonl", "a/x.CSV.gz", "a/b/c", "x*", "a\\b"])
def test_what_looks_local_is_never_a_hub_name(path: str) -> None:
    assert not PromptSource(path).is_hub


def test_what_exists_is_local_and_the_rest_is_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PromptSource("trl-lib/tldr").is_hub and PromptSource("imdb").is_hub and PromptSource("a/gpt2.5-data").is_hub
    (tmp_path / "trl-lib" / "tldr").mkdir(parents=True)
    assert not PromptSource("trl-lib/tldr").is_hub
    with pytest.raises(ValueError, match="is an address, which is not fetched"):
        PromptSource("https://example.org/x.jsonl")


def test_a_missing_file_is_said_with_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(LINES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no file \./prompt\.jsonl \(from .*\)\. Did you mean prompts\.jsonl\?"):
        read("./prompt.jsonl")
    with pytest.raises(ValueError, match="There is no folder gone either"):
        read("gone/prompt.jsonl")


@pytest.mark.parametrize("error", [FileNotFoundError, ConnectionError])
def test_what_is_neither_here_nor_on_the_hub(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **options: Any) -> None:
        raise error("not there")

    monkeypatch.setattr(sources.datasets, "load_dataset", missing)
    with pytest.raises(
        ValueError, match="no file or folder nobody/nothing in .*, and as a dataset of the hub it .*: not there"
    ):
        read("nobody/nothing")


# --- malformed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"3", r"a\.json: a int, but must be a list of objects"),
        ("a.json", b"[1]", r"row 0 is a int, but must be an object"),
        ("a.json", b'[{"prompt": "a"},', r"a\.json: not JSON"),
        ("a.json", b'{"prompt": ["a", "b"], "gold": ["c"]}', r"columns have \[2, 1\] rows"),
        ("a.json", b'{"prompt": "\xff"}', r"a\.json, line 1: not UTF-8"),
        ("a.csv", b"prompt,gold\na,b\nc\n", r"a\.csv, line 3: 1 cells for 2 columns"),
        ("a.csv", b"prompt,gold\na,b,c\n", r"a\.csv, line 2: 3 cells for 2 columns"),
        ("a.csv", b'prompt,gold\na,"b\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", b"prompt,prompt\na,b\n", "two columns have the same name"),
        ("a.csv", b"prompt,gold\n", "has no rows"),
        ("a.jsonl", b'{"prompt": "a"}\nno\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be decompressed"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], r"a\.jsonl\.gz cannot be decompressed"),
        ("a.jsonl.xz", b"no xz", r"a\.jsonl\.xz cannot be decompressed"),
        ("a.jsonl.bz2", b"no bz2", r"a\.jsonl\.bz2 cannot be decompressed"),
        ("a.jsonl.zst", b"no zst", r"a\.jsonl\.zst cannot be decompressed"),
        ("a.jsonl.zst", pyarrow.compress(LINES, "zstd", asbytes=True)[:-5], r"a\.jsonl\.zst cannot be decompressed"),
        ("a.parquet", b"no parquet", r"a\.parquet is no Parquet file"),
        ("a.json", b"", r"a\.json is empty"),
        ("a.parquet.gz", b"x", "is of no kind that is read"),
        ("a.xlsx", b"x", r"a\.xlsx is of no kind that is read"),
    ],
)
def test_malformed_files_are_refused_with_the_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    if not name.endswith("json"):
        with pytest.raises(ValueError, match=message):
            list(stream_rows(PromptSource(str(tmp_path / name), stream_buffer=1)))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_rows_have_the_columns_of_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"gold": "x", "prompt": "b"}\n')
    assert read(tmp_path / "a.jsonl") == [{"prompt": "a", "gold": None}, {"prompt": "b", "gold": "x"}]
