"""Local data: files, globs, folders of files and `Dataset.save_to_disk` folders -> rows.

The suffix tells the kind: `.jsonl`, `.ndjson` (an object a line), `.json` (a list of objects, an object of columns, or
an object a line), `.csv`, `.tsv` (every cell is the text that stands there), `.txt` (a prompt a line) and `.parquet`;
all but the last may be compressed (`.gz`, `.bz2`, `.xz`, and `.zst` with the extra zstd).
"""

import bz2
import csv
import difflib
import glob
import gzip
import importlib
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from pyarrow import ArrowInvalid

Rows: TypeAlias = list[dict[str, Any]]

_PARQUET = ".parquet"
_METADATA = ("dataset_info.json", "dataset_infos.json")
_SPLIT = re.compile(r"(?:^|[^a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")


def looks_local(path: str) -> bool:
    """Whether ``path`` names something here, there or not: it exists, or no hub dataset is called so."""
    if Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or _is_glob(path):
        return True
    return _kind(Path(path)) is not None or path.count("/") > 1 or "\\" in path


def has_splits(path: str) -> bool:
    """Whether ``path`` is a folder that `DatasetDict.save_to_disk` made."""
    return (Path(path).expanduser() / "dataset_dict.json").is_file()


def read_local(path: str, split: str | None = None) -> Rows | datasets.Dataset:
    """The rows of a file, of all files of a glob or folder in alphabetical order, or of a saved dataset.

    Raises:
        ValueError: nothing there, a kind of file that is not read, or a malformed file (with its line).
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if has_splits(path) or (place / "state.json").is_file():
            return _saved(path, place, split)
        return _concatenated(_files_of(path, place))
    if not place.exists() and _is_glob(path):
        found = map(Path, sorted(glob.glob(str(place), recursive=True)))
        files = [file for file in found if file.is_file() and file.name not in _METADATA]
        if not files:
            raise ValueError(f"no file matches {path} (from {Path.cwd()}). Correct the pattern.")
        return _concatenated(files)
    if not place.is_file():
        raise ValueError(f"there is no file {path} (from {Path.cwd()}). {_remedy(place)}")
    return _read(place)


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _remedy(place: Path) -> str:
    if not place.parent.is_dir():
        return f"There is no folder {place.parent} either. Correct the path."
    near = difflib.get_close_matches(place.name, [file.name for file in place.parent.iterdir()], n=1)
    return f"Did you mean {place.parent / near[0]}?" if near else "Correct the path."


def _saved(path: str, place: Path, split: str | None) -> datasets.Dataset:
    data = datasets.load_from_disk(str(place))
    if isinstance(data, datasets.Dataset):
        return data
    name = split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
    if name not in data:
        raise ValueError(f"{path} has no split '{name}'; it has {sorted(data)}. Set split to one of them.")
    return data[name]


def _files_of(path: str, folder: Path) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.is_file() and _kind(file) and file.name not in _METADATA)
    files = [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise ValueError(
            f"the folder {path} holds no data: none of {', '.join(_KINDS)}. Name a file or another folder."
        )
    splits = {m[1] for file in files for m in [_SPLIT.search(str(file.relative_to(folder)).lower())] if m}
    if len(splits) > 1:
        raise ValueError(
            f"the folder {path} holds files of several splits ({', '.join(sorted(splits))}). Name one file, or a "
            f"pattern such as {path.rstrip('/')}/train*."
        )
    return files


def _concatenated(files: list[Path]) -> Rows | datasets.Dataset:
    if len(files) == 1:
        return _read(files[0])
    return [dict(row) for file in files for row in _read(file)]


def _kind(file: Path) -> str | None:
    """Its suffix without that of a compression, in lower case; None where it is none that is read."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _OPENERS
    kind = (suffixes[-2:-1] if compressed else suffixes[-1:]) or [""]
    return kind[0] if kind[0] in _KINDS and not (compressed and kind[0] == _PARQUET) else None


def _read(file: Path) -> Rows | datasets.Dataset:
    kind = _kind(file)
    if kind is None:
        raise ValueError(
            f"{file} is of no kind that is read. Use one of {', '.join(_KINDS)}; all but {_PARQUET} may be "
            f"compressed ({', '.join(_OPENERS)})."
        )
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty and has no rows; at least one is needed.")
    return _KINDS[kind](file)


def _read_parquet(file: Path) -> datasets.Dataset:
    try:
        return datasets.load_dataset("parquet", data_files=str(file), split="train")
    except (datasets.exceptions.DatasetGenerationError, ArrowInvalid) as error:
        raise ValueError(f"{file} is no Parquet file ({error.__cause__ or error}). Write it again.") from error


def _content(file: Path) -> bytes:
    """What stands in the file, without its compression."""
    decompress = _OPENERS.get(file.suffix.lower(), bytes)
    try:
        return decompress(file.read_bytes())
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{file} cannot be decompressed ({error}). Write it again.") from error


def _zstd(content: bytes) -> bytes:
    try:
        zstandard = importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        raise ValueError(
            "a .zst file needs the package zstandard. Run pip install zstandard (the extra zstd)."
        ) from error
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True) as reader:
            return bytes(reader.read())
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error


def read_jsonl(file: Path) -> Rows:
    """The objects of a JSON-lines file; blank lines are skipped.

    Raises:
        ValueError: a line that is not UTF-8, not JSON, or not an object, with its number.
    """
    return _json_lines(file, _content(file))


def _json_lines(file: Path, content: bytes) -> Rows:
    rows: Rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:  # of the decoder or of JSON
            raise ValueError(
                f"{file}, line {number}: not JSON ({error}). A line is one object. Fix or delete it."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: a {type(row).__name__}, but a line must be a JSON object.")
        rows.append(row)
    return rows


def _read_json(file: Path) -> Rows:
    """A list of objects, an object of columns (lists, or objects as pandas writes them), or an object a line."""
    content = _content(file)
    try:
        value = json.loads(_decoded(file, content))
    except json.JSONDecodeError as error:
        if len(content.splitlines()) > 1 and error.msg == "Extra data":
            return _json_lines(file, content)
        raise ValueError(f"{file}: not JSON ({error}). Fix it.") from error
    if isinstance(value, dict):
        return _from_object(file, value)
    if not isinstance(value, list):
        raise ValueError(f"{file}: a {type(value).__name__}, but must be a list of objects. Fix it.")
    strange = next((n for n, row in enumerate(value) if not isinstance(row, dict)), None)
    if strange is not None:
        raise ValueError(f"{file}: row {strange} is a {type(value[strange]).__name__}, but must be an object. Fix it.")
    return value


def _from_object(file: Path, value: dict[str, Any]) -> Rows:
    """An object of columns, or else a single row. Lists of messages are cells, no columns."""
    columns = list(value.values())
    if columns and all(isinstance(column, list) for column in columns) and not any(map(_are_messages, columns)):
        if len({*map(len, columns)}) > 1:
            raise ValueError(
                f"{file}: its columns have {[*map(len, columns)]} rows, but must have equally many. Fix it."
            )
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if columns and all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        return [{name: value[name][row] for name in value} for row in columns[0]]
    return [value]


def _are_messages(cells: list[Any]) -> bool:
    return any(isinstance(cell, dict) and not {"role", "from"}.isdisjoint(cell) for cell in cells)


def _read_csv(file: Path) -> Rows:
    return _separated(file, ",")


def _read_tsv(file: Path) -> Rows:
    return _separated(file, "\t")


def _separated(file: Path, delimiter: str) -> Rows:
    """Rows of texts under the names of the first line. `None`, `NA`, `007` and an empty cell stay what they are."""
    reader = csv.reader(io.StringIO(_decoded(file, _content(file)), newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        header = next(reader, [])
        if len({*header}) < len(header):
            raise ValueError(f"{file}: two columns have the same name in {header}. Rename one.")
        rows = []
        for cells in reader:
            if len(cells) not in (0, len(header)):
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(cells)} cells for {len(header)} columns. Quote cells "
                    f"that hold {delimiter!r}."
                )
            if cells:
                rows.append(dict(zip(header, cells, strict=True)))
        return rows
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}. Fix its quotes.") from error
    finally:
        csv.field_size_limit(limit)


def _read_lines(file: Path) -> Rows:
    lines = _decoded(file, _content(file)).split("\n")
    return [{"prompt": line.removesuffix("\r")} for line in lines if line.strip()]


def _decoded(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 ({error.reason}). Save it as UTF-8.") from error


_OPENERS: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _zstd,
}
_KINDS: Mapping[str, Callable[[Path], Any]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_lines,
    _PARQUET: _read_parquet,
}
