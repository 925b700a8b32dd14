"""Parsing and splitting of the human ratings, on files made here."""

from pathlib import Path

import pytest

from gopo_lightning.data import assets, ratings
from gopo_lightning.data.ratings import RatedSentence


def write(folder: Path, source: str, rows: list[tuple[str, str, str]]) -> Path:
    """The two files of ``source`` from (id, text, scores), the second with a byte-order mark, reversed; CRLF."""
    texts = "\r\n".join(f"{id_}\t0.5\t{text}" for id_, text, _ in rows)
    scores = "\r\n".join(f"{id_}\t0.5\t1.0\t{scores}" for id_, _, scores in reversed(rows))
    (folder / f"{source}ReviewSnippets_GroundTruth.txt").write_bytes(texts.encode())
    (folder / f"{source}ReviewSnippets_anonDataRatings.txt").write_bytes(b"\xef\xbb\xbf" + scores.encode() + b"\r\n")
    return folder


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 sentences of 5 to 12 words, of which 20 are held out; the first five words of every 15th are the same."""
    monkeypatch.setattr(ratings, "NUM_VALIDATION_SENTENCES", 20)
    words = [f"w{i % 15} is a film with " + " ".join(f"x{i}y{k}" for k in range(i % 8)) for i in range(60)]
    return write(tmp_path, "movie", [(str(i), text, f"[{i % 4}, 1]") for i, text in enumerate(words)])


def test_load_joins_by_id_and_reads_marks_and_line_ends(tmp_path: Path) -> None:
    write(tmp_path, "movie", [("1", "A café, good", "[3, -1, 4]"), ("2", " bad ", "[-4, -2]")])
    assert ratings.load("movie", tmp_path) == [
        RatedSentence("1", "A café, good", (3, -1, 4)),
        RatedSentence("2", "bad", (-4, -2)),
    ]
    assert [s.mean for s in ratings.load("movie", tmp_path)] == [2.0, -3.0]


def test_a_text_that_comes_twice_keeps_its_first_row(tmp_path: Path) -> None:
    write(
        tmp_path,
        "amazon",
        [("1", "Good value!", "[3]"), ("2", "good  value", "[1]"), ("3", "!", "[0]"), ("4", "?", "[0]")],
    )
    assert [s.id for s in ratings.load("amazon", tmp_path)] == ["1", "3", "4"]


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    write(tmp_path, "movie", [("1", "good", "[3]"), ("2", "bad\tworse", "[1]")])
    with pytest.raises(ValueError, match=r"movieReviewSnippets_GroundTruth.txt, line 2: 4 .* expected 3"):
        ratings.load("movie", tmp_path)


def test_sentences_without_scores_are_named(tmp_path: Path) -> None:
    write(tmp_path, "movie", [("1", "good", "[3]"), ("2", "bad", "[1]")])
    file = tmp_path / "movieReviewSnippets_anonDataRatings.txt"
    file.write_bytes(file.read_bytes().replace(b"2\t0.5", b"9\t0.5"))
    with pytest.raises(ValueError, match="1 sentences of 'movie' have no scores, the first is id 2"):
        ratings.load("movie", tmp_path)


def test_split_is_fixed_disjoint_and_complete(many: Path) -> None:
    sentences = ratings.load("movie", many)
    train, validation = ratings.split(sentences, "train"), ratings.split(sentences, "validation")
    assert (len(train), len(validation)) == (40, 20)
    assert {s.id for s in train} | {s.id for s in validation} == {s.id for s in sentences}
    assert ratings.split(sentences, "validation") == validation
    assert [s.id for s in validation] != sorted((s.id for s in validation), key=int)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        ratings.split(sentences, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="20 sentences cannot be split"):
        ratings.split(validation, "train")


def test_prompts_are_unique_long_enough_and_held_out_by_sentence(many: Path) -> None:
    train, validation = ratings.prompts("train", many), ratings.prompts("validation", many)
    prompts = [row["prompt"] for row in train + validation]
    assert train
    assert validation
    assert len(prompts) == len(set(prompts))
    assert set(train[0]) == {"prompt", "text", "mean"}
    held_out = {s.text for s in ratings.split(ratings.load("movie", many), "validation")}
    for row in train + validation:
        assert row["prompt"] == ratings.REQUEST.format(beginning=" ".join(row["text"].split()[:5]))
        assert len(row["text"].split()) >= 8
        assert (row["text"] in held_out) == (row in validation)


@pytest.mark.skipif(not assets.is_cached("movie-ratings"), reason="run `python -m gopo_lightning.data.assets` first")
def test_the_real_files_parse() -> None:
    movie, amazon = ratings.load("movie"), ratings.load("amazon")
    assert (len(movie), len(amazon)) == (10603, 3689)
    assert movie[0].mean == pytest.approx(34 / 15)
    assert all(-4 <= score <= 4 for s in movie + amazon for score in s.scores)
    assert (len(ratings.prompts("train")), len(ratings.prompts("validation"))) == (8612, 904)
