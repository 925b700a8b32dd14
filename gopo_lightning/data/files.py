"""Local data: files, globs, folders of files and `Dataset.save_to_disk` folders -> rows.

The suffix tells the kind: `.jsonl`, `.ndjson` (an object a line), `.json` (a list of objects, an object of columns, or
an object a line), `.csv`, `.tsv` (every cell is the text that stands there), `.txt` (a prompt a line) and `.parquet`;
all but the last may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`).
"""

import bz2
import csv
import difflib
import glob
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import datasets
from pyarrow import ArrowInvalid, CompressedInputStream, OSFile
from pyarrow.parquet import ParquetFile

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
    if _is_saved(place):
        return _saved(path, place, split)
    files = _found(path, place)
    if len(files) == 1:
        return _read(files[0])
    return [dict(row) for file in files for row in _read(file)]


def stream_local(path: str, split: str | None = None) -> Iterator[Mapping[str, Any]]:
    """The same rows one after the other, of which none stays in memory.

    Raises:
        ValueError: as `read_local`, a malformed row when its turn comes; and a `.json` file, which is one value.
    """
    place = Path(path).expanduser()
    if _is_saved(place):
        yield from _saved(path, place, split)
        return
    for file in _found(path, place):
        if (kind := _checked_kind(file)) == ".json":
            raise ValueError(f"{file} is one value, whose rows cannot be streamed. Write them as .jsonl.")
        yield from _parquet_rows(file) if kind == _PARQUET else cast(Iterator[dict[str, Any]], _KINDS[kind](file))


def _is_saved(place: Path) -> bool:
    return place.is_dir() and (has_splits(str(place)) or (place / "state.json").is_file())


def _found(path: str, place: Path) -> list[Path]:
    """The files that ``path`` names, at least one."""
    if place.is_dir():
        return _files_of(path, place)
    if not place.exists() and _is_glob(path):
        found = map(Path, sorted(glob.glob(str(place), recursive=True)))
        files = [file for file in found if file.is_file() and file.name not in _METADATA]
        if not files:
            raise ValueError(f"no file matches {path} (from {Path.cwd()}). Correct the pattern.")
        return files
    if not place.is_file():
        raise ValueError(f"there is no file {path} (from {Path.cwd()}). {_remedy(place)}")
    return [place]


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


def _kind(file: Path) -> str | None:
    """Its suffix without that of a compression, in lower case; None where it is none that is read."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _OPENERS
    kind = (suffixes[-2:-1] if compressed else suffixes[-1:]) or [""]
    return kind[0] if kind[0] in _KINDS and not (compressed and kind[0] == _PARQUET) else None


def _checked_kind(file: Path) -> str:
    kind = _kind(file)
    if kind is None:
        raise ValueError(
            f"{file} is of no kind that is read. Use one of {', '.join(_KINDS)}; all but {_PARQUET} may be "
            f"compressed ({', '.join(_OPENERS)})."
        )
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty and has no rows; at least one is needed.")
    return kind


def _read(file: Path) -> Rows | datasets.Dataset:
    rows = _KINDS[_checked_kind(file)](file)
    return rows if isinstance(rows, datasets.Dataset) else list(rows)


def _read_parquet(file: Path) -> datasets.Dataset:
    try:
        return datasets.load_dataset("parquet", data_files=glob.escape(str(file)), split="train")
    except (datasets.exceptions.DatasetGenerationError, ArrowInvalid) as error:
        raise ValueError(f"{file} is no Parquet file ({error.__cause__ or error}). Write it again.") from error


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{file} is no Parquet file ({error}). Write it again.") from error


def _lines(file: Path) -> Iterator[bytes]:
    """What stands in the file without its compression, line by line with their ends, whatever these are."""
    try:
        with _OPENERS.get(file.suffix.lower(), Path.open)(file, mode="rb") as stream:
            for part in stream:
                yield from part.splitlines(keepends=True)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{file} cannot be decompressed ({error}). Write it again.") from error


def _texts(file: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, line {number}: not UTF-8 ({error.reason}). Save it as UTF-8.") from error


def _open_zstd(file: Path, mode: str) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(CompressedInputStream(OSFile(str(file), mode), "zstd")))


def read_jsonl(file: Path) -> Rows:
    """The objects of a JSON-lines file; blank lines are skipped.

    Raises:
        ValueError: a line that is not UTF-8, not JSON, or not an object, with its number.
    """
    return list(_json_lines(file))


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(file), start=1):
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
        yield row


def _read_json(file: Path) -> Rows:
    """A list of objects, an object of columns (lists, or objects as pandas writes them), or an object a line."""
    lines = [*_texts(file)]
    try:
        value = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        if len(lines) > 1 and error.msg == "Extra data":
            return read_jsonl(file)
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


def _separated(file: Path, delimiter: str = ",") -> Iterator[dict[str, Any]]:
    """Rows of texts under the names of the first line. `None`, `NA`, `007` and an empty cell stay what they are."""
    reader = csv.reader(_texts(file), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        header = next(reader, [])
        if len({*header}) < len(header):
            raise ValueError(f"{file}: two columns have the same name in {header}. Rename one.")
        for cells in reader:
            if len(cells) not in (0, len(header)):
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(cells)} cells for {len(header)} columns. Quote cells "
                    f"that hold {delimiter!r}."
                )
            if cells:
                yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}. Fix its quotes.") from error
    finally:
        csv.field_size_limit(limit)


def _text_lines(file: Path) -> Iterator[dict[str, Any]]:
    lines = (text.removesuffix("\n").removesuffix("\r") for text in _texts(file))
    return ({"prompt": line} for line in lines if line.strip())


_OPENERS: Mapping[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
_KINDS: Mapping[str, Callable[[Path], Any]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _read_json,
    ".csv": _separated,
    ".tsv": partial(_separated, delimiter="\t"),
    ".txt": _text_lines,
    _PARQUET: _read_parquet,
}
