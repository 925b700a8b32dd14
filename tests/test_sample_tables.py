"""Sample tables are read back as what was written, whatever a policy wrote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gopo_lightning.data.visible import visible
from gopo_lightning.evaluation.sample_tables import Sample, parse, plain
from gopo_lightning.training.callbacks.samples import escape

TABLE = """**Prompt, row 7:** say &#60;b&#62;

| rank | reward | by source | advantage | tokens | completion |
| --- | --- | --- | --- | --- | --- |
| 1 | +2.000 | +2.000, none | +1.500 | 5 | a&#124;b<br>c |
| none | none | none, none | +0.000 | 24 (cut) | *(empty)* |
"""


def test_a_table_is_read_back() -> None:
    group = parse(TABLE)
    assert group is not None and (group.row, group.prompt) == (7, "say <b>")
    assert group.samples == [
        Sample("1", "+2.000", "+1.500", "5", "a|b\nc"),
        Sample("none", "none", "+0.000", "24 (cut)", ""),
    ]


@pytest.mark.parametrize(
    "text", ["", "words", "**Prompt, row 1:** x", "**Prompt, row x:** x\n\n| a |\n| - |\n| b |", "| rank |"]
)
def test_what_is_no_table_of_ours_is_none(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "&lt;script&gt;", "&amp;#60;b&#62;", "a | b || c", "*(empty)*",
     "x *(3 more characters)*", "**bold** `code` [a](javascript:b)", "{{ 7 * 7 }}{% if %}", "\\|\\n", "<br>", "–—é漢"],
)  # fmt: skip
def test_what_is_escaped_comes_back(text: str) -> None:
    assert plain(escape(text, 1000)) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back_but_for_its_spaces(text: str) -> None:
    assert plain(escape(text, 1000)).split() == text.split()


def test_what_was_cut_is_said() -> None:
    assert plain(escape("abcdef", 4)) == "abcd … (2 more characters)"


def test_characters_that_are_not_seen_are_named() -> None:
    assert visible("a\u2028\u202eb\x00\ud800\u200b\n\tc") == "a[U+2028][U+202E]b[U+0000][U+D800][U+200B]\n\tc"
