"""``rank``: verdicts on disk, what the server lets in, agreement between raters, and the command."""

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import kendalltau

from gopo_lightning.commands import rank
from gopo_lightning.data.json_lines import read_jsonl, write_jsonl
from gopo_lightning.evaluation.raters import agreements, as_text, pair_agreement
from gopo_lightning.human.groups import Group, group_of, groups_of_file
from gopo_lightning.human.server import RankingServer
from gopo_lightning.human.session import Session
from gopo_lightning.human.verdicts import Verdict, VerdictFile, read_verdicts
from gopo_lightning.types import Completion, Prompt
from tests.test_cli import config  # noqa: F401  (a fixture)

GROUP = Group("2 + 2 =", (" 5", " 4", " four", " ?"))
OTHER = Group(({"role": "user", "content": "hi"},), ("hello", "go away\u2028"))


def verdict(
    group: Group, order: list[int], ties: list[bool] | None = None, good: int = 99, rater: str = "ann"
) -> Verdict:
    M = len(group.completions)
    return Verdict.of(group, order, [False] * M if ties is None else ties, min(good, M), rater)


# ------------------------------------------------------------------------------ orders and files


@pytest.mark.parametrize(
    ("ties", "good", "ranks"),
    [
        ([False, False, False, False], 4, (2, 1, 3, 4)),
        ([False, True, False, True], 4, (1, 1, 2, 2)),
        ([True, False, True, False], 3, (2, 1, 2, 3)),  # the first has none above it
        ([False, False, True, False], 2, (2, 1, 3, 3)),  # those below the line tie, with nothing above it
        ([False, True, True, True], 0, (1, 1, 1, 1)),
    ],
)
def test_ranks_by_hand(ties: list[bool], good: int, ranks: tuple[int, ...]) -> None:
    """The order is: number 1, 0, 2, 3."""
    assert verdict(GROUP, [1, 0, 2, 3], ties, good).ranks == ranks


@pytest.mark.parametrize(("order", "good"), [([0, 1, 2], 4), ([0, 1, 2, 2], 4), ([0, 1, 2, 4], 4), ([0, 1, 2, 3], 5)])
def test_what_is_no_order_is_refused(order: list[int], good: int) -> None:
    with pytest.raises(ValueError, match="no order of 4 completions"):
        Verdict.of(GROUP, order, [False] * 4, good, "ann")


def test_a_verdict_is_on_disk_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    file = VerdictFile(tmp_path, "ann")
    file.add(verdict(GROUP, [1, 2, 0, 3], good=2))
    assert len(synced) == 2  # the file, and its name in the folder
    file.add(verdict(OTHER, [0, 1]))
    assert [v.row() for v in read_verdicts(file.path)] == [v.row() for v in file.all()]
    rows = list(read_jsonl(file.path))
    assert rows[0] | {"time": ""} == {
        **{"prompt": "2 + 2 =", "completions": [" 5", " 4", " four", " ?"]},
        **{"ranks": [3, 1, 2, 3], "good": 2, "rater": "ann", "time": ""},
    }
    assert rows[1]["prompt"] == [{"role": "user", "content": "hi"}]


def test_a_correction_takes_the_place_of_the_verdict(tmp_path: Path) -> None:
    file = VerdictFile(tmp_path, "ann")
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        file.add(verdict(GROUP, order))
        file.add(verdict(OTHER, [0, 1]))
    file.close()
    found = VerdictFile(tmp_path, "ann")
    assert [v.ranks for v in found.all()] == [(4, 3, 2, 1), (1, 2)] and GROUP.key in found
    assert len(list(read_jsonl(file.path))) == 2 and not list(tmp_path.glob("*writing*"))


@pytest.mark.parametrize(("torn", "kept"), [('{"prompt": "2 +', 1), (None, 2)])
def test_a_killed_writer_costs_no_whole_verdict(torn: str | None, kept: int, tmp_path: Path) -> None:
    """A last line that is cut off is taken out; one that lacks its line end alone is whole."""
    file = VerdictFile(tmp_path, "ann")
    file.add(verdict(GROUP, [0, 1, 2, 3]))
    last = torn or json.dumps(verdict(OTHER, [0, 1]).row())
    file.close()
    with file.path.open("a") as handle:
        handle.write(last)
    again = VerdictFile(tmp_path, "ann")
    assert len(again.all()) == kept
    again.add(verdict(OTHER, [1, 0]))
    assert len(read_verdicts(again.path)) == 2


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    file = VerdictFile(tmp_path, "ann")
    with pytest.raises(ValueError, match="another process writes .*name another rater"):
        VerdictFile(tmp_path, "ann")
    VerdictFile(tmp_path, "bob").close()
    file.close()
    VerdictFile(tmp_path, "ann")


@pytest.mark.parametrize("name", ["", "../ann", ".ann", "a/b", "a" * 65, "a b"])
def test_a_rater_is_a_file_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names a file"):
        VerdictFile(tmp_path, name)


def test_groups_show_each_text_once() -> None:
    prompt = Prompt(0, (1,), "say")
    texts = [Completion(text, truncated=text == "b", num_tokens=1) for text in ("a", "b", "a", "c")]
    group = group_of(prompt, texts)
    assert group.completions == ("a", "b", "c") and group.truncated == (False, True, False)
    assert group_of(prompt, ["a", "a"]).truncated == ()


def test_files_of_groups(tmp_path: Path) -> None:
    rows = [
        {"index": 0, "prompt": "say", "messages": None, "completions": ["a", "b", "a"], "finish_reasons": ["stop"] * 3},
        {"index": 1, "prompt": "x", "messages": [{"role": "user", "content": "x"}], "completions": ["a", "b"]},
        {"index": 2, "prompt": "the same throughout", "completions": ["a", "a"]},
        verdict(GROUP, [0, 1, 2, 3]).row(),
    ]
    write_jsonl(tmp_path / "p.jsonl", rows)
    groups = groups_of_file(tmp_path / "p.jsonl")
    assert [len(group.completions) for group in groups] == [2, 2, 4] and groups[2] == GROUP
    write_jsonl(tmp_path / "again.jsonl", [group.row() for group in groups])
    again = groups_of_file(tmp_path / "again.jsonl")
    assert again == groups and [g.truncated for g in again] == [g.truncated for g in groups]
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "completions": ["b", 3]}])
    with pytest.raises(ValueError, match=r"row 0 .*bad.jsonl: completion 1 is 3"):
        groups_of_file(tmp_path / "bad.jsonl")
    write_jsonl(tmp_path / "none.jsonl", rows[2:3])
    with pytest.raises(ValueError, match="two different completions"):
        groups_of_file(tmp_path / "none.jsonl")


# ------------------------------------------------------------------------------ session and server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RankingServer]:
    file = VerdictFile(tmp_path, "ann")
    session = Session(file, [GROUP, OTHER])
    serving = RankingServer(session)
    serving.session = session  # type: ignore[attr-defined]
    yield serving
    serving.close()
    file.close()


def ask(server: RankingServer, path: str, body: Any = None, **headers: str | None) -> tuple[int, Any, Any]:
    """Status, content and headers; a header that is None is not sent."""
    match = re.fullmatch(r"http://([\d.:]+)(/.+/)", server.address)
    assert match is not None
    connection = http.client.HTTPConnection(match[1], timeout=10)
    given = {"Host": match[1], "Origin": f"http://{match[1]}", "Content-Type": "application/json"} | headers
    path = path if path.startswith("/") else match[2] + path
    content = json.dumps(body) if body is not None else None
    connection.putrequest("GET" if body is None else "POST", path, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    if content is not None and "Content-Length" not in headers:
        connection.putheader("Content-Length", str(len(content)))
    connection.endheaders(content.encode() if content else None)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return (
        answer.status,
        json.loads(text) if answer.headers["Content-Type"] == "application/json" else text,
        answer.headers,
    )


RANKED = {"key": GROUP.key, "order": [1, 2, 0, 3], "ties": [False, True, False, False], "good": 3}


def test_a_verdict_by_the_server(server: RankingServer, tmp_path: Path) -> None:
    status, page, headers = ask(server, "")
    assert status == 200 and "page.js" not in page and "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "'unsafe" not in headers["Content-Security-Policy"] and "http" not in headers["Content-Security-Policy"]
    status, state, _ = ask(server, "rank", RANKED)
    assert status == 200 and [group["status"] for group in state["groups"]] == ["done", "open"]
    assert [v.ranks for v in read_verdicts(tmp_path / "ann.jsonl")] == [(2, 1, 1, 3)]
    shown = ask(server, f"groups/{GROUP.key}")[1]
    numbers = [completion["number"] for completion in shown["completions"]]
    assert sorted(numbers[:2]) == [1, 2] and numbers[2:] == [0, 3]
    assert shown["ties"] == [False, True, False] and shown["good"] == 3
    assert ask(server, "skip", {"key": OTHER.key})[1]["groups"][1]["status"] == "skipped"
    assert ask(server, "reopen", {})[1]["groups"][1]["status"] == "open"


@pytest.mark.parametrize("path", ["", "state", f"groups/{GROUP.key}", "rank"])
@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (421, {"Host": "rebound.example"}),
        (421, {"Host": "127.0.0.1"}),
        (421, {"Host": None}),
        (403, {"Origin": "http://evil.example"}),
        (403, {"Origin": "null"}),
        (403, {"Origin": None}),
        (415, {"Content-Type": "text/plain"}),
    ],
)
def test_strangers_are_refused(
    path: str, status: int, headers: dict[str, str | None], server: RankingServer, tmp_path: Path
) -> None:
    is_post = path == "rank"
    got, content, _ = ask(server, path, RANKED if is_post else None, **headers)
    expected = status if status == 421 or is_post else 200
    assert got == expected and (got == 200 or set(content) == {"error"})
    assert not (tmp_path / "ann.jsonl").exists()


@pytest.mark.parametrize("path", ["/", "/state", "/wrong/state", "/favicon.ico", "//state", "/%C3%A9/"])
def test_without_the_token_there_is_nothing(path: str, server: RankingServer) -> None:
    assert ask(server, path)[0] == 404
    assert ask(server, "../page.js")[0] == 404 and ask(server, "page.js")[0] == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({**RANKED, "order": [0, 0, 1, 2]}, 400),
        ({**RANKED, "order": ["0", 1, 2, 3]}, 400),
        ({**RANKED, "order": [False, True, 2, 3]}, 400),
        ({**RANKED, "ties": [0, 0, 0, 0]}, 400),
        ({**RANKED, "good": -1}, 400),
        ({**RANKED, "good": None}, 400),
        ({**RANKED, "key": "0" * 16}, 409),
        ({}, 400),
        ([1], 400),
    ],
)
def test_malformed_verdicts_are_refused(body: Any, status: int, server: RankingServer, tmp_path: Path) -> None:
    assert ask(server, "rank", body)[0] == status
    assert not (tmp_path / "ann.jsonl").exists()


@pytest.mark.parametrize(("length", "status"), [(str(2**20 + 1), 413), ("-1", 415), ("1e3", 415), (None, 415)])
def test_bodies_have_a_length_and_a_limit(length: str | None, status: int, server: RankingServer) -> None:
    assert ask(server, "rank", {}, **{"Content-Length": length})[0] == status


def test_it_listens_on_this_machine_alone(server: RankingServer) -> None:
    assert server.address.startswith("http://127.0.0.1:") and len(server.token) >= 32
    other = RankingServer(server.session)  # type: ignore[attr-defined]
    assert other.token != server.token
    port = int(re.findall(r":(\d+)/", other.address)[0])
    with pytest.raises(ValueError, match="Name another; 0 takes a free one"):
        RankingServer(server.session, port)  # type: ignore[attr-defined]
    other.close()


def test_raters_see_orders_of_their_own(tmp_path: Path) -> None:
    group = Group("x", tuple("abcdefghij"))
    orders = set()
    for rater in ("ann", "bob"):
        session = Session(VerdictFile(tmp_path, rater), [group])
        shown = [tuple(c["number"] for c in session.group(group.key)["completions"]) for _ in range(2)]
        assert shown[0] == shown[1] and sorted(shown[0]) == list(range(10))
        orders.add(shown[0])
    assert len(orders | {tuple(range(10))}) == 3


def test_whoever_waits_hears_of_the_last_verdict(tmp_path: Path) -> None:
    session = Session(VerdictFile(tmp_path, "ann"), [GROUP, OTHER], is_live=True)
    assert not session.wait(0.01)
    session.rank(RANKED)
    thread = threading.Timer(0.1, session.skip, [{"key": OTHER.key}])
    thread.start()
    assert session.wait(30) and session.num_done == 1
    session.begin([OTHER])
    assert session.num_open == 1
    with pytest.raises(KeyError):
        session.rank(RANKED)  # of the rollout before


# ------------------------------------------------------------------------------ agreement


def test_agreement_by_hand_and_by_scipy() -> None:
    """Of six pairs three are alike (the first with each other), two opposed (2 with 3 and 4), one is a tie of one."""
    x, y = [1, 2, 3, 4], [1, 3, 2, 2]
    assert float(pair_agreement(torch.tensor(x), torch.tensor(y))) == pytest.approx(3.5 / 6)
    first = Verdict(GROUP, tuple(x), 4, "ann", "")
    shuffled = Group(GROUP.prompt, GROUP.completions[::-1])
    second = Verdict(shuffled, tuple(y[::-1]), 4, "bob", "")
    (found,) = agreements([first, second])
    assert found.raters == ("ann", "bob") and found.num_groups == 1
    assert found.tau is not None and found.tau.mean == pytest.approx(kendalltau(x, y).statistic)
    assert found.pairs is not None and found.pairs.mean == pytest.approx(3.5 / 6)


def test_agreement_over_prompts() -> None:
    groups = [Group(f"{n}", ("a", "b", "c")) for n in range(30)]
    ann = [verdict(group, [0, 1, 2]) for group in groups]
    bob = [verdict(group, [0, 1, 2] if n % 3 else [2, 1, 0], rater="bob") for n, group in enumerate(groups)]
    none = [verdict(group, [0, 1, 2], good=0, rater="cy") for group in groups]
    found = {a.raters: a for a in agreements([*ann, *bob, *none])}
    tau, pairs = found["ann", "bob"].tau, found["ann", "bob"].pairs
    assert (
        tau is not None and tau.mean == pytest.approx(1 / 3, abs=1e-6) and -0.1 < tau.low < 0.2 < 0.5 < tau.high < 0.7
    )
    assert pairs is not None and pairs.mean == pytest.approx(2 / 3, abs=1e-6) and tau.n == 30
    cy = found["ann", "cy"]
    assert cy.tau is None and cy.pairs is not None and cy.pairs.mean == 0.5
    text = as_text(list(found.values()))
    assert (
        "ann and bob: Kendall’s τ-b +0.33 [" in text and "ann and cy: Kendall’s τ-b –, pairs ordered alike 0.50" in text
    )


def test_one_rater_has_one_verdict_on_a_group() -> None:
    with pytest.raises(ValueError, match="two different verdicts of rater 'ann'"):
        agreements([verdict(GROUP, [0, 1, 2, 3]), verdict(GROUP, [1, 0, 2, 3])])


def test_the_command_prints_the_agreement(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for rater, order in (("ann", [0, 1, 2, 3]), ("bob", [0, 1, 3, 2])):
        file = VerdictFile(tmp_path, rater)
        file.add(verdict(GROUP, order, rater=rater))
        file.close()
    rank.main(["--agreement", str(tmp_path)])
    assert "ann and bob: Kendall’s τ-b +0.67, pairs ordered alike 0.83, on 1 prompt\n" in capsys.readouterr().out
    with pytest.raises((ValueError, OSError), match="no group in common"):
        rank.main(["--agreement", str(tmp_path / "ann.jsonl")])
    with pytest.raises((ValueError, OSError), match="--config=x is for sampling"):
        rank.main(["--agreement", str(tmp_path), "--config=x"])


# ------------------------------------------------------------------------------ the command


def options(folder: Path, *arguments: str) -> tuple[argparse.Namespace, list[str]]:
    return rank.parser().parse_known_args([f"--output={folder}", *arguments])


def test_completions_of_the_policy_are_sampled_once_and_scored_never(
    config: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder, unscored = tmp_path / "rank", "--model.init_args.rewards.sources.init_args.function=tests.test_rank.never"
    arguments = [f"--config={config}", unscored]
    first = rank.find_groups(*options(folder, "--num_prompts=3", *arguments))
    assert first is not None and 3 <= len(first) <= 4 and all(2 <= len(g.completions) <= 4 for g in first)
    assert all(len(g.truncated) == len(g.completions) for g in first)
    assert {path.name for path in folder.iterdir()} == {"groups.jsonl", "sampled.json"}
    assert rank.find_groups(*options(folder)) == first
    assert rank.find_groups(*options(folder, "--num_prompts=3", *arguments)) == first
    with pytest.raises(ValueError, match=r"sampled with other options .*--output"):
        rank.find_groups(*options(folder, "--num_prompts=4", *arguments))


def never(completions: list[str]) -> list[float]:
    raise AssertionError("nothing is to be scored")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no .*groups.jsonl to go on with. Name --config, --completions or --output"),
        (["--num_prompts=3"], "sampling needs the configuration"),
        (["--trainer.devices=1"], "sampling needs the configuration"),
        (["--completions=a.jsonl", "--config=b"], "--config=b is for sampling"),
        (["--completions=a.jsonl", "--num_prompts=3"], "--num_prompts is for sampling"),
        (["--completions=a.jsonl"], "no file a.jsonl"),
        (["--config=b", "--num_prompts=0"], "--num_prompts=0 must be at least 1"),
        (["--rater=a/b"], "names a file"),
    ],
)
def test_what_cannot_be_ranked(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        rank.main([f"--output={tmp_path}", *arguments])


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [GROUP.row()])
    command = [sys.executable, "-m", "gopo_lightning", "rank", f"--completions={tmp_path / 'p.jsonl'}"]
    process = subprocess.Popen(
        [*command, f"--output={tmp_path}", "--rater=ann"], stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(5)]
    assert "1 prompts, 0 of them ranked by ann" in lines[0] and "http://127.0.0.1:" in lines[2]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"0 of 1 prompts are ranked, in {tmp_path / 'verdicts' / 'ann.jsonl'}" in out


def test_help_needs_no_torch() -> None:
    arguments = [sys.executable, "-X", "importtime", "-m", "gopo_lightning", "rank", "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout and "gopo_lightning.commands" in done.stderr
    assert not re.search(r"\| +(torch|lightning|scipy)\b", done.stderr)
