"""JSON lines: what is written is JSON of RFC 8259, a line a row, and comes back as it was."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gopo_lightning.data.json_lines import dumps, number, read_jsonl, write_jsonl

BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""All that `str.splitlines` breaks at."""


def strictly(text: str) -> Any:
    """Parse ``text`` as RFC 8259 has it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("character", [*BREAKS, "\ud83d", "\x00", "é", "🔥", "\ufeff"])
def test_any_text_comes_back_from_a_line_of_its_own(character: str, tmp_path: Path) -> None:
    rows = [{"text": f"a{character}b"}, {"text": "other"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    assert [strictly(line.decode("utf-8")) for line in lines[:-1]] == rows and lines[-1] == b""
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == rows


def test_numbers_that_are_not_finite_are_written_as_json_and_read_back() -> None:
    values = [1.5, math.inf, -math.inf, math.nan]
    written = strictly(dumps({"nested": [{"rewards": values}], "tuple": (math.inf,)}))
    assert written == {"nested": [{"rewards": [1.5, "Infinity", "-Infinity", None]}], "tuple": ["Infinity"]}
    read = [number(value) for value in written["nested"][0]["rewards"]]
    assert read[:3] == values[:3] and math.isnan(read[3])


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [1])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_jsonl(path, [2, object()])
    assert list(read_jsonl(path)) == [1]


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not JSON"):
        list(read_jsonl(path))


def test_a_carriage_return_between_values_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a":\r1}\r\n{"a": 2}')
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]
