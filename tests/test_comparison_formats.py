"""Comparisons as datasets publish them: every format by its columns, the prompt once, and numbers that are numbers."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from gopo_lightning.data.comparisons import ComparisonRow, load_comparisons
from gopo_lightning.data.preferences import PreferenceDataModule
from gopo_lightning.data.sources import PromptSource

QUESTION = "Which is the largest lake of Africa, by its area?"


def user(content: str, **others: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **others}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "be brief"}


def load(folder: Path, *rows: dict[str, Any], prompt_column: str | None = None) -> list[ComparisonRow]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_comparisons(PromptSource(str(path)), prompt_column)


def texts(row: ComparisonRow) -> list[Any]:
    """Plain texts as they are, conversations as lists of (role, content)."""
    return [t if isinstance(t, str) else [(m["role"], m["content"]) for m in t] for t in row.texts]


def dialogue(answer: str, *, system: bool = False) -> list[tuple[str, str]]:
    return [*([("system", "be brief")] if system else []), ("user", QUESTION), ("assistant", answer)]


# --- the prompt, once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("prompt", []),  # the answer alone
        (QUESTION, [SYSTEM, user(QUESTION)]),
        (f" {QUESTION}\n", [user(QUESTION.replace(" ", "  "))]),
        ([user(QUESTION, name=None)], [user(QUESTION)]),
        ([SYSTEM, user(QUESTION)], [user(QUESTION)]),
        ([SYSTEM, user(QUESTION)], [SYSTEM, user(QUESTION)]),
        ([{"from": "human", "value": QUESTION}], [user(QUESTION)]),
        ([user([{"type": "text", "text": QUESTION}])], [user(QUESTION)]),
        (QUESTION, [user("hi"), assistant("hello"), user(QUESTION)]),  # the last turn of several
        ([user("hi"), assistant("hello"), user(QUESTION)], [user(QUESTION)]),
        ([user(QUESTION)], [user(QUESTION), assistant("say"), user("please")]),  # the first turn of several
    ],
)
def test_a_conversation_reads_its_prompt_once(prompt: Any, before: list[Any], tmp_path: Path) -> None:
    row = {"prompt": QUESTION if prompt == "prompt" else prompt}
    row |= {"chosen": [*before, assistant("good")], "rejected": [*before, assistant("bad")]}
    for content, answer in zip(texts(load(tmp_path, row)[0]), ("good", "bad"), strict=True):
        normal = [" ".join(text.split()) for _, text in content]
        assert normal.count(QUESTION) == 1
        assert content[-1] == ("assistant", answer)
        assert [role for role, _ in content].index("system") == 0 if ("system", "be brief") in content else True
        assert (("system", "be brief") in content) == ("be brief" in str(row))


def test_turns_that_go_on_from_the_prompt_follow_it(tmp_path: Path) -> None:
    turns = [assistant("where?"), user("here")]
    row = {"prompt": QUESTION, "chosen": [*turns, assistant("good")], "rejected": [*turns, assistant("bad")]}
    assert [content for _, content in texts(load(tmp_path, row)[0])[0]] == [QUESTION, "where?", "here", "good"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": [user("b"), assistant("c")]}, "neither holds nor continues the prompt 'a'"),
        (
            {"prompt": [{"role": "system", "content": "x"}, user("b")], "chosen": [SYSTEM, user("b")]},
            "is not that of the",
        ),
    ],
)
def test_another_dialogue_than_that_of_the_prompt_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"row 0 \(counted from 0\) of .*{message}"):
        load(tmp_path, {**row, "rejected": row["chosen"]})


@pytest.mark.parametrize(
    "start",
    [
        f"Human: {QUESTION}\n\nAssistant:",
        f"\n\nHuman:  {QUESTION}\n\nAssistant: ",
        f"Human: {QUESTION}\r\n\r\nAssistant:",
    ],
)
@pytest.mark.parametrize("prompt", [f"Human: {QUESTION}\n\nAssistant:", QUESTION])
def test_texts_that_hold_their_prompt_are_not_given_it_again(start: str, prompt: str, tmp_path: Path) -> None:
    row = load(tmp_path, {"prompt": prompt, "chosen": f"{start} good", "rejected": f"{start} bad"})[0]
    assert row.texts == (f"{start} good", f"{start} bad")


def test_answers_that_happen_to_begin_with_a_short_prompt_still_get_it(tmp_path: Path) -> None:
    plain = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    rows = load(tmp_path, plain, plain, {"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi!"})
    assert [row.texts[0] for row in rows] == ["2 + 2 = 4", "2 + 2 = 4", "HiHi you"]
    rows = load(tmp_path, *[{"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi!"}] * 2, plain)  # here most repeat it
    assert [row.texts[0] for row in rows] == ["Hi you", "Hi you", "2 + 2 = 4"]


# --- names of columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["question", "instruction", "query", "input"])
@pytest.mark.parametrize("system", [None, "system", "system_prompt"])
def test_a_question_makes_a_conversation(column: str, system: str | None, tmp_path: Path) -> None:
    row = {column: QUESTION, "chosen": "good", "rejected": "bad"} | ({system: "be brief"} if system else {})
    expected = [dialogue(answer, system=system is not None) for answer in ("good", "bad")]
    assert texts(load(tmp_path, row)[0]) == expected


def test_a_blank_system_message_is_none(tmp_path: Path) -> None:
    row = {"prompt": QUESTION, "system": "", "chosen": "good", "rejected": "bad"}
    rows = load(tmp_path, row, {**row, "system": "be brief"})
    assert [texts(row)[0] for row in rows] == [dialogue("good"), dialogue("good", system=True)]


def test_alpaca_joins_instruction_and_input(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Wasser", "chosen": "water", "rejected": "wine"}
    rows = load(tmp_path, row, {**row, "input": ""})
    assert [texts(row)[0][0] for row in rows] == [("user", "Translate.\nWasser"), ("user", "Translate.")]


def test_sharegpt_turns_before_single_messages(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "be brief"}, {"from": "human", "value": QUESTION}]
    row = {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    assert texts(load(tmp_path, row)[0]) == [dialogue("good", system=True), dialogue("bad", system=True)]
    unknown = {**row, "conversations": [{"from": "martian", "value": "x"}]}
    with pytest.raises(
        ValueError, match="row 0 .*column 'conversations' has a message from 'martian'; the known speakers"
    ):
        load(tmp_path, unknown)


def test_columns_of_other_prompts_are_refused_and_one_may_be_named(tmp_path: Path) -> None:
    whole = [user(QUESTION), assistant("good")]
    row = {
        "prompt": QUESTION,
        "question": f"{QUESTION} ",
        "messages": whole,
        "chosen": whole,
        "rejected": [assistant("bad")],
    }
    assert texts(load(tmp_path, row)[0]) == [dialogue("good"), dialogue("bad")]  # all of them say the same
    other = {"question": QUESTION, "context": "A lake.", "post": "p", "chosen": "good", "rejected": "bad"}
    with pytest.raises(ValueError, match=r"row 0 .*\['context', 'question'\] hold different prompts.*prompt_column"):
        load(tmp_path, other)
    assert texts(load(tmp_path, other, prompt_column="question")[0])[0] == dialogue("good")
    assert load(tmp_path, other, prompt_column="post")[0].texts == ("pgood", "pbad")
    with pytest.raises(ValueError, match="prompt_column='title' is no column"):
        load(tmp_path, other, prompt_column="title")
    with pytest.raises(ValueError, match="prompt_column='history' has no effect"):
        load(tmp_path, SHP, prompt_column="history")
    with pytest.raises(ValueError, match="takes no prompt_column"):
        PreferenceDataModule(prompt_column="text")


def test_what_is_read_and_what_is_not_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"question": "q", "chosen": "a", "rejected": "b", "id": 3}
    with caplog.at_level(logging.INFO):
        load(tmp_path, row, {**row, "source": "x"})
    assert caplog.text.count("not read: ['id', 'source']") == 1
    assert "2 comparisons from the columns ['chosen', 'question', 'rejected']" in caplog.text


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-score", "rejected-score"),
        ("rating_chosen", "rating_rejected"),
        ("chosen_rating", "rejected_rating"),
        ("chosen-rating", "rejected-rating"),
    ],
)
def test_two_scores_by_any_of_their_names(first: str, second: str, tmp_path: Path) -> None:
    pair = {"chosen": "a", "rejected": "b"}
    rows = load(tmp_path, {**pair, first: 5, second: "3.5"}, {**pair, first: 2, second: 2.0}, {**pair, first: None})
    assert [(row.ratings, row.margin) for row in rows] == [((5.0, 3.5), 1.5), ((2.0, 2.0), 0.0), (None, None)]
    assert rows[1].wins[0][1] == 0.5
    with pytest.raises(ValueError, match=r"row 0 .*one of the columns .* has a number and the other has none"):
        load(tmp_path, {**pair, first: 5})
    names = ("score_chosen", "score_rejected") if first != "score_chosen" else ("chosen_score", "rejected_score")
    with pytest.raises(ValueError, match="give different ratings"):
        load(tmp_path, {**pair, first: 5, second: 3, names[0]: 1, names[1]: 0})


BAD_NUMBERS = [math.nan, math.inf, -math.inf, "much", True, [1]]


@pytest.mark.parametrize("bad", BAD_NUMBERS)
@pytest.mark.parametrize("column", ["margin", "probability", "score_chosen", "chosen-rating"])
def test_what_is_no_number_is_refused_with_its_row(column: str, bad: Any, tmp_path: Path) -> None:
    good = {"chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=rf"row 1 .*rows\.jsonl: column '{column}' is .*must be a finite number"):
        load(tmp_path, good, {**good, column: bad})


@pytest.mark.parametrize("bad", [*BAD_NUMBERS, None])
@pytest.mark.parametrize("column", ["ranks", "scores"])
def test_ranks_and_scores_of_a_list_are_numbers(column: str, bad: Any, tmp_path: Path) -> None:
    row = {"completions": ["a", "b", "c"], "ranks": [1, 2, 3], "scores": [3, 2, 1]}
    with pytest.raises(ValueError, match=rf"row 0 .*{column}\[1\] is"):
        load(tmp_path, {**row, column: [1, bad, 3]})


def test_ranks_as_text_are_ranked_as_numbers(tmp_path: Path) -> None:
    row = load(tmp_path, {"completions": ["tenth", "second"], "ranks": ["10", "2"]})[0]
    assert row.wins[0][1] == 0 and row.wins[1][0] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": None, "rejected": "b"}, "column 'chosen' is None, but must be a text or messages"),
        ({"chosen": "a", "rejected": 3}, "column 'rejected' is 3, but must be a text or messages"),
        (
            {"rejected": "b", "chosen": [user("a"), {"role": "assistant", "content": None}]},
            "column 'chosen' has a message w",
        ),
        ({"completions": ["a", None], "ranks": [1, 2]}, "completion 1 is None"),
        ({"completions": "ab", "ranks": [1, 2]}, "column 'completions' is 'ab', but must be a list"),
        ({"question": 3, "chosen": "a", "rejected": "b"}, "column 'question' is 3"),
        ({"system": ["x"], "chosen": "a", "rejected": "b"}, "the system message is"),
    ],
)
def test_cells_that_are_missing_or_of_another_kind_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"row 0 .*rows\.jsonl: {message}"):
        load(tmp_path, row)


def test_a_row_without_a_column_that_others_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 .*column 'rejected' is None"):
        load(tmp_path, {"chosen": "a", "rejected": "b"}, {"chosen": "a"})


# --- formats of datasets ---------------------------------------------------------------------------------------------

SHP = {
    "post_id": "x",
    "domain": "askculinary_test",
    "history": QUESTION,
    "c_root_id_A": "a",
    "c_root_id_B": "b",
    "score_A": 340,
    "score_B": 166,
    "human_ref_A": "good",
    "human_ref_B": "bad",
    "labels": 1,
    "score_ratio": 2.0,
}


def ultrafeedback_raw(**second: Any) -> dict[str, Any]:
    def completion(response: str, score: float, overall: float) -> dict[str, Any]:
        annotations = {"helpfulness": {"Rating": "5", "Rationale": "…", "Type": ["1"]}}
        scores = {"fine-grained_score": score, "overall_score": overall}
        return {
            "model": "m",
            "principle": "p",
            "response": response,
            "critique": "…",
            "annotations": annotations,
            **scores,
        }

    completions = [completion("bad", 1.5, 10.0), completion("good", 4.75, 8.5) | second, completion("fair", 1.5, 5.0)]
    rest = {"source": "evol_instruct", "models": ["m"] * 3, "correct_answers": ["None"], "incorrect_answers": ["None"]}
    return {"instruction": QUESTION, "completions": completions, **rest}


def test_ultrafeedback_as_published(tmp_path: Path) -> None:
    rows = load(tmp_path, ultrafeedback_raw(), ultrafeedback_raw(**{"fine-grained_score": None}))
    assert texts(rows[0]) == [dialogue("bad"), dialogue("good"), dialogue("fair")]
    assert rows[0].ratings == (1.5, 4.75, 1.5) and rows[1].ratings == (10.0, 8.5, 5.0)  # of one column
    assert rows[0].wins[0][1] == 0 and rows[0].wins[1][2] == 1 and rows[0].wins[0][2] == 0.5
    with pytest.raises(ValueError, match="neither fine-grained_score nor overall_score is there for all completions"):
        load(tmp_path, ultrafeedback_raw(**{"fine-grained_score": None, "overall_score": None}))
    with pytest.raises(ValueError, match=r"no prompt has two answers to compare"):
        load(tmp_path, {**ultrafeedback_raw(), "completions": ultrafeedback_raw()["completions"][:1]})


def test_helpsteer2_joins_the_answers_to_a_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def answer(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
        rest = {"correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **rest}

    several = f"hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\n{QUESTION}"
    rows = [answer(QUESTION, "good", 4), answer(QUESTION, "bad", 1), answer("alone", "x", 2)]
    with caplog.at_level(logging.INFO):
        loaded = load(tmp_path, *rows, answer(several, "bad", 0), answer(several, "good", 3))
    assert texts(loaded[0]) == [dialogue("good"), dialogue("bad")]
    assert texts(loaded[1])[0] == [("user", "hi"), ("assistant", "hello"), *dialogue("bad")]
    assert [row.ratings for row in loaded] == [(4.0, 1.0), (0.0, 3.0)] and loaded[1].wins[1][0] == 1
    assert "1 prompts with fewer than two answers were left out" in caplog.text


@pytest.mark.parametrize(("strength", "win"), [(-3, 1.0), (0, 0.5), (2, 0.0)])
def test_strengths_of_preference(strength: int, win: float, tmp_path: Path) -> None:
    two = {"prompt": QUESTION, "response_1": "a", "response_2": "b", "preference_strength": strength, "split": "train"}
    statements = {"preference_statement": "…", "preference_elaboration": "…", "all_preferences_unprocessed": []}
    three = {
        "domain": "general",
        "language": "english",
        "context": [user(QUESTION)],
        "response1": "a",
        "response2": "b",
    }
    three |= {"overall_preference": strength, "individual_preference": [{"score": strength, "reasoning": "…"}]}
    for row in (load(tmp_path, two | statements)[0], load(tmp_path, three)[0]):
        assert texts(row) == [dialogue("a"), dialogue("b")]
        assert row.wins[0][1] == win and row.margin == -strength


def test_nectar_ranks_plain_dialogues(tmp_path: Path) -> None:
    start = f"\n\nHuman: {QUESTION}\n\nAssistant: "
    answers = [
        {"answer": text, "model": "m", "rank": rank} for text, rank in (("good", 1.0), ("fair", 2.0), ("bad", 7.0))
    ]
    rest = {"turns": 1, "num_responses": 3, "source": ["lmsys-chat-1m"], "good_natured": True}
    row = load(tmp_path, {"prompt": start, "answers": answers, **rest})[0]
    assert row.texts == (start + "good", start + "fair", start + "bad")
    assert row.wins[0][2] == 1 and row.wins[2][1] == 0


def test_shp_by_its_labels(tmp_path: Path) -> None:
    first, second = load(tmp_path, SHP, {**SHP, "labels": 0})
    assert texts(first) == [dialogue("good"), dialogue("bad")]
    assert first.wins[0][1] == 1 and second.wins[0][1] == 0
    with pytest.raises(ValueError, match="labels=2 must be 1"):
        load(tmp_path, {**SHP, "labels": 2})


def test_comparisons_from_csv(tmp_path: Path) -> None:
    """Cells are texts, numbers are spelled, an empty one is none, and messages may be JSON text."""
    messages = json.dumps([user("q"), assistant("good")]).replace('"', '""')
    path = tmp_path / "rows.csv"
    path.write_text(f'prompt,chosen,rejected,margin\nis it,None,007,1.5\nq,"{messages}",b,\n')
    first, second = load_comparisons(PromptSource(str(path)))
    assert first.texts == ("is itNone", "is it007") and first.margin == 1.5
    assert texts(second)[0] == [("user", "q"), ("assistant", "good")] and second.margin is None
