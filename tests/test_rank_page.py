"""The page of ``rank`` in Debian's Chromium: what a person does with keys and mouse, and what is on disk then."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from gopo_lightning.data.json_lines import read_jsonl
from gopo_lightning.human.groups import Group
from gopo_lightning.human.server import RankingServer
from gopo_lightning.human.session import Session
from gopo_lightning.human.verdicts import Verdict, VerdictFile
from tests.chromium import chromium

PLAIN = Group("Count.", ("one", "two", "three", "four"))
CHAT = Group(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}), ("a", "b", "c"))
HOSTILE = Group(
    "<img src=x onerror='document.title=1'>",
    (
        "<script>document.title = 'owned'</script>",
        "</textarea></script></style><img src=x onerror=\"document.title = 'owned'\"><b>bold</b>",
        "\u202eright to left\u2066 \u05d0\u05d1\u05d2",
        "long " * 2000 + "END",
        "",
        "javascript:document.title='owned'\n\n\tindented &amp; {{ 7 * 7 }}",
    ),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


class Ranking:
    """A server of ``groups``, and the page in a browser that fails the test where a script of it fails."""

    def __init__(self, browser: Browser, folder: Path, groups: list[Group], *, is_live: bool = False) -> None:
        self.file = VerdictFile(folder, "ann")
        self.session = Session(self.file, groups, is_live=is_live, summary=lambda mine: f"{len(mine)} verdicts in all")
        self.server = RankingServer(self.session)
        self.faults: list[str] = []
        self.addresses: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": 900, "height": 900}, reduced_motion="reduce")
        self.page.set_default_timeout(30_000)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.goto(self.server.address)
        expect(self.page.locator("#rest-title" if is_live else ".card").first).to_be_visible()

    def close(self) -> None:
        self.page.close()
        self.server.close()
        self.file.close()
        assert not self.faults
        assert all(address.startswith((self.server.address, "data:")) for address in self.addresses)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def texts(self) -> list[str]:
        return self.page.locator(".card .text").all_inner_texts()

    def ranks(self) -> list[str]:
        return self.page.locator(".rank").all_inner_texts()

    def to_top(self, text: str) -> None:
        """By keys."""
        self.press("Home", *["ArrowDown"] * self.texts().index(text), "1")

    def order(self, *texts: str) -> None:
        for text in reversed(texts):
            self.to_top(text)

    def saved(self, rows: int) -> dict[str, int]:
        """Ranks by text of the last of ``rows`` verdicts on disk."""
        found = list(read_jsonl(self.file.path))
        assert len(found) == rows
        return dict(zip(found[-1]["completions"], found[-1]["ranks"], strict=True))


@pytest.fixture
def ranking(browser: Browser, tmp_path: Path) -> Iterator[Ranking]:
    found = Ranking(browser, tmp_path, [PLAIN, CHAT])
    yield found
    found.close()


def test_an_order_by_keys(ranking: Ranking) -> None:
    ranking.order("three", "one", "four", "two")
    assert ranking.texts() == ["three", "one", "four", "two"] and ranking.ranks() == ["1", "2", "3", "4"]
    ranking.press("Home", "Shift+ArrowDown")  # three down by one
    ranking.press("End", "Shift+ArrowUp")  # two up by one
    assert ranking.texts() == ["one", "three", "two", "four"]
    ranking.press("Home", "3")
    assert ranking.texts() == ["three", "two", "one", "four"]
    ranking.press("Enter")
    expect(ranking.page.locator("#count")).to_have_text("prompt 2 of 2, 1 ranked · ann")
    assert ranking.saved(1) == {"one": 3, "two": 2, "three": 1, "four": 4}


def test_ties_and_the_line_by_keys(ranking: Ranking) -> None:
    ranking.order("one", "two", "three", "four")
    ranking.press("Home", "ArrowDown", "t")
    assert ranking.ranks() == ["1", "1", "2", "3"]
    ranking.press("End", "n")
    assert ranking.ranks() == ["1", "1", "2", "–"]
    ranking.press("ArrowUp", "Shift+ArrowDown")  # three, past the line
    assert ranking.ranks() == ["1", "1", "–", "–"] and ranking.texts() == ["one", "two", "three", "four"]
    ranking.press("Shift+ArrowUp", "Shift+ArrowUp")  # back, and above two: into the tie
    assert ranking.texts() == ["one", "three", "two", "four"] and ranking.ranks() == ["1", "1", "1", "–"]
    ranking.press("Enter")
    expect(ranking.page.locator(".card")).to_have_count(3)
    assert ranking.saved(1) == {"one": 1, "two": 1, "three": 1, "four": 2}
    assert next(iter(read_jsonl(ranking.file.path)))["good"] == 3


def test_none_is_good_undo_and_back(ranking: Ranking) -> None:
    ranking.order("one", "two", "three", "four")
    ranking.press("x")
    expect(ranking.page.get_by_role("separator")).to_have_text("none is good")
    assert ranking.ranks() == ["–"] * 4
    ranking.press("u")
    assert ranking.ranks() == ["1", "2", "3", "4"]
    ranking.press("x", "Enter")
    expect(ranking.page.locator(".card")).to_have_count(3)
    assert ranking.saved(1) == dict.fromkeys(PLAIN.completions, 1)
    ranking.press("b")
    expect(ranking.page.locator(".card")).to_have_count(4)
    assert ranking.ranks() == ["–"] * 4
    ranking.press("x", "Home", "Enter")
    expect(ranking.page.locator(".card")).to_have_count(3)
    assert sorted(ranking.saved(1).values()) == [1, 2, 3, 4]


def test_an_order_by_dragging(ranking: Ranking) -> None:
    ranking.order("one", "two", "three", "four")
    mouse, handles = ranking.page.mouse, ranking.page.locator(".handle")
    first, last = handles.nth(0).bounding_box(), handles.nth(3).bounding_box()
    assert first is not None and last is not None
    mouse.move(first["x"] + 5, first["y"] + 5)
    mouse.down()
    mouse.move(last["x"] + 5, last["y"] + last["height"] - 2, steps=8)
    assert ranking.texts() == ["two", "three", "four", "one"]
    mouse.up()
    mouse.move(first["x"] + 5, first["y"] + 5, steps=4)  # the button is up: nothing follows
    assert ranking.texts() == ["two", "three", "four", "one"]
    ranking.press("u")
    assert ranking.texts() == ["one", "two", "three", "four"]
    ranking.press("End", "n")  # and past the line
    handle, line = handles.nth(1).bounding_box(), ranking.page.locator("#line").bounding_box()
    assert handle is not None and line is not None
    mouse.move(handle["x"] + 5, handle["y"] + 5)
    mouse.down()
    mouse.move(line["x"] + 5, line["y"] + 40, steps=8)
    mouse.up()
    assert ranking.ranks() == ["1", "2", "–", "–"] and ranking.texts()[:2] == ["one", "three"]
    ranking.page.get_by_role("button", name="Save, next").click()
    expect(ranking.page.locator(".card")).to_have_count(3)
    assert ranking.saved(1) == {"one": 1, "two": 3, "three": 2, "four": 3}


def test_buttons_do_what_keys_do_and_have_names(ranking: Ranking) -> None:
    ranking.order("one", "two", "three", "four")
    page = ranking.page
    cards = page.get_by_role("listitem")
    expect(cards).to_have_count(4)
    cards.nth(3).get_by_role("button", name="up", exact=False).click()
    assert ranking.texts() == ["one", "two", "four", "three"]
    cards.nth(1).get_by_role("button", name="ties with the one above").click()
    assert ranking.ranks() == ["1", "1", "2", "3"]
    label = cards.nth(1).get_attribute("aria-label") or ""
    assert label.endswith("rank 1, ties with the one above, 2 of 4")
    expect(page.locator("#said")).to_have_text(label)
    for name in ("Back", "Undo", "Skip", "None is good"):
        expect(page.get_by_role("button", name=name)).to_be_visible()
    assert page.evaluate("document.activeElement.className").startswith("card")


def test_an_untouched_order_is_not_saved_by_one_key(ranking: Ranking) -> None:
    ranking.press("Enter")
    expect(ranking.page.locator("#problem")).to_contain_text("You have changed nothing")
    assert not ranking.file.path.exists()
    ranking.press("Enter")
    expect(ranking.page.locator(".card")).to_have_count(3)
    assert ranking.file.path.exists()


def test_reload_and_restart_go_on_where_they_stopped(browser: Browser, tmp_path: Path) -> None:
    groups = [PLAIN, CHAT, Group("Last.", ("x", "y"))]
    ranking = Ranking(browser, tmp_path, groups)
    ranking.press("2", "Enter")
    expect(ranking.page.locator(".turn")).to_have_count(2)
    assert ranking.page.locator("#prompt").inner_text().split("\n") == ["system", "Be brief.", "user", "Hi."]
    ranking.page.reload()
    expect(ranking.page.locator("#count")).to_have_text("prompt 2 of 3, 1 ranked · ann")
    ranking.press("s")
    expect(ranking.page.locator("#count")).to_have_text("prompt 3 of 3, 1 ranked · ann")
    ranking.close()
    again = Ranking(browser, tmp_path, groups)
    expect(again.page.locator("#count")).to_have_text("prompt 2 of 3, 1 ranked · ann")
    again.press("s")
    expect(again.page.locator("#count")).to_have_text("prompt 3 of 3, 1 ranked · ann")
    again.press("2", "Enter")
    expect(again.page.locator("#rest-title")).to_have_text("That was the last one")
    expect(again.page.locator("#rest-text")).to_contain_text("2 of 3 prompts are ranked, 1 skipped")
    expect(again.page.locator("#summary")).to_have_text("2 verdicts in all")
    again.page.get_by_role("button", name="Show what was skipped").click()
    expect(again.page.locator("#count")).to_have_text("prompt 2 of 3, 2 ranked · ann")
    again.press("2", "Enter")
    expect(again.page.locator("#rest-title")).to_have_text("All ranked")
    again.close()


def test_hostile_texts_are_text(browser: Browser, tmp_path: Path) -> None:
    ranking = Ranking(browser, tmp_path, [HOSTILE])
    expect(ranking.page.locator(".card")).to_have_count(6)
    texts = set(ranking.page.locator(".card .text").evaluate_all("all => all.map(one => one.textContent)"))
    shown = [text for text in HOSTILE.completions if text and "\u202e" not in text]
    assert texts == {*shown, "(empty)", "[U+202E]right to left[U+2066] \u05d0\u05d1\u05d2"}
    assert ranking.page.locator("#prompt").inner_text() == HOSTILE.prompt
    assert ranking.page.locator("main img, main script, main b >> text=bold").count() == 0
    assert ranking.page.title() == "0/1 ranked"
    long = ranking.page.locator(".card", has_text="END")
    height = long.bounding_box()
    long.get_by_role("button", name="Show all of it").click()
    taller = long.bounding_box()
    assert height is not None and taller is not None and height["height"] < 300 < taller["height"]
    ranking.press("1", "Enter")
    expect(ranking.page.locator("#rest-title")).to_have_text("All ranked")
    assert set(ranking.saved(1)) == set(HOSTILE.completions)
    ranking.close()


def test_the_browser_refuses_other_scripts_and_html(browser: Browser, tmp_path: Path) -> None:
    """Were the page to put a text into itself as HTML after all, or to load something."""
    ranking = Ranking(browser, tmp_path, [PLAIN])
    expect(ranking.page.locator(".card")).to_have_count(4)
    refused = """() => {
        const found = [];
        try { document.body.innerHTML = "<b>x</b>"; } catch (error) { found.push(error.name); }
        const script = document.createElement("script");
        try { script.textContent = "document.title = 'owned'"; document.body.append(script); }
        catch (error) { found.push(error.name); }
        return found.concat(document.title);
    }"""
    assert ranking.page.evaluate(refused) == ["TypeError", "TypeError", "0/1 ranked"]
    assert ranking.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 1, error => error.name)") == "TypeError"
    assert any("Content Security Policy" in fault for fault in ranking.faults)
    ranking.faults.clear()
    ranking.addresses[:] = [address for address in ranking.addresses if ":9/" not in address]
    ranking.close()


def test_a_server_that_is_gone_loses_nothing_unnoticed(browser: Browser, tmp_path: Path) -> None:
    ranking = Ranking(browser, tmp_path, [PLAIN, CHAT])
    expect(ranking.page.locator(".card")).to_have_count(4)
    ranking.page.route("**/rank", lambda route: route.abort())
    ranking.press("2", "Enter")
    expect(ranking.page.locator("#problem")).to_contain_text("Not saved. There is no answer")
    expect(ranking.page.locator(".card")).to_have_count(4)
    assert not ranking.file.path.exists()
    ranking.page.unroute("**/rank")
    ranking.press("Enter")
    expect(ranking.page.locator(".card")).to_have_count(3)
    ranking.faults.clear()  # the browser's own line about the lost request
    ranking.close()


def test_live_it_waits_for_the_next_rollout(browser: Browser, tmp_path: Path) -> None:
    ranking = Ranking(browser, tmp_path, [], is_live=True)
    expect(ranking.page.locator("#rest-title")).to_have_text("Waiting for the next rollout")
    ranking.session.begin([PLAIN])
    expect(ranking.page.locator(".card")).to_have_count(4)
    ranking.session.begin([CHAT])  # the time was up
    ranking.press("2", "Enter")
    expect(ranking.page.locator(".card")).to_have_count(3)
    assert not ranking.file.path.exists()
    ranking.press("2", "Enter")
    expect(ranking.page.locator("#rest")).to_be_visible()
    assert isinstance(ranking.file.get(CHAT.key), Verdict) and ranking.session.wait(0)
    ranking.faults.clear()  # the browser's own line about the refused verdict
    ranking.close()
