"""The command report: what its page says, that untrusted text stays text, and a real browser."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
from PIL import Image

from gopo_lightning.commands.report import main, make
from gopo_lightning.evaluation.event_files import read_runs
from gopo_lightning.evaluation.report import summarise
from gopo_lightning.evaluation.report_page import render
from gopo_lightning.training.callbacks.samples import escape
from tests.chromium import Document, chromium, dump, screenshot
from tests.event_runs import write_config, write_events, write_run

HOSTILE = [
    "<script>document.title='pwned'</script>",
    "</style></div></body><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "<svg onload=\"document.title='pwned'\"><style>*{display:none}</style>",
    "[click](javascript:document.title='pwned')",
    "&lt;script&gt;document.title='pwned'&lt;/script&gt;",
    "&#60;script&#62;document.title='pwned'&#60;/script&#62;",
    "&amp;#60;h1&amp;#62;",
    "{{ 7 * 7 }} {% include 'report.html.jinja' %}",
    "<!-- --><h1>pwned</h1><!--",
    "<a href='https://example.org'>x</a>",
    "<link rel=stylesheet href=//example.org/x.css>",
    "*(empty)* | **bold** `code`",
]
UNSEEN = "x\u2028a\u202eb\u2066c\u200fd\x00e\x1bf"


def table(*texts: str, prompt: str = "say") -> str:
    """As `SampleTable` writes it."""
    rows = [f"| {i} | +1.000 | +0.500 | 5 | {escape(text, 1000)} |" for i, text in enumerate(texts, 1)]
    head = "| rank | reward | advantage | tokens | completion |\n| --- | --- | --- | --- | --- |"
    rows.append("| none | none | +0.000 | 5 | without a score |")
    return f"**Prompt, row 1:** {escape(prompt, 1000)}\n\n" + "\n".join([head, *rows]) + "\n"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two configs with three seeds each: +1 at step 10, but for the spread."""
    for advantage, values in (("ordinal", (1.1, 2.0, 2.9)), ("grpo", (0.0, 1.0, 2.0))):
        for seed, value in enumerate(values, 1):
            texts = {"samples/group_0": {1: table(f"best of {advantage}", "middle", f"worst of {advantage}")}}
            write_run(tmp_path / "runs" / f"{advantage}-{seed}", advantage, seed, {0: 0.0, 5: 0.5, 10: value}, texts)
    return tmp_path / "runs"


def test_a_reward_that_was_never_finite_is_no_missing_tag(tmp_path: Path) -> None:
    write_run(tmp_path, "grpo", 1, {0: math.nan, 5: math.nan})
    with pytest.raises(ValueError, match=r"'val/reward' is not finite in any run\. Name others with --tags"):
        summarise(read_runs([tmp_path])[0])


def page_of(*runs: Path, **options: str) -> Document:
    found, passed_over = read_runs(runs)
    return Document(render(summarise(found, notes=passed_over, **options), "command"))


def test_the_page_says_who_is_ahead_first(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(runs), "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    answer = (
        "objective.advantage=ordinal is ahead of objective.advantage=grpo on val/reward at step 10 "
        "(+1.000, 95 % interval +0.752 to +1.248; 3 seeds, paired; p = 0.0033)."
    )
    assert "objective.advantage=grpo: seeds 1, 2, 3\n" in out and answer in out
    assert out.endswith(f"{tmp_path / 'out' / 'index.html'}\n")
    page = Document((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert page.text.index(answer) < page.text.index("Differences from")
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert numbers["contrasts"][0]["difference"]["mean"] == pytest.approx(1)
    assert numbers["answers"] == [answer] and numbers["baseline"] == "objective.advantage=grpo"
    pictures = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert pictures == {"val-reward", "val-reward-difference", "val-reward-over-seconds", "reward-mean"}
    for text in ("model.init_args.objective.advantage", "best of grpo", "worst of ordinal", str(runs / "grpo-3")):
        assert text in page.text
    assert "middle" not in page.text and "without a score" not in page.text


def test_the_page_loads_nothing_and_runs_nothing(runs: Path) -> None:
    page = page_of(runs)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
    assert {value[0] for name, value in page.attributes if name == "xlink:href"} == {"#"}
    policy = next(value for name, value in page.attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


def test_an_earlier_report_is_replaced_and_nothing_else(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make([runs], out, [], None, "")
    make([runs], out, ["reward/mean"], None, "")
    assert not (out / "figures" / "val-reward-difference.png").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=rf"{out} holds something else than an earlier report. Name another"):
        main([str(runs), "--output", str(out)])
    (out / "notes.txt").unlink()
    (out / "index.html").write_text("<p>mine")
    with pytest.raises(ValueError, match="something else"):
        make([runs], out, [], None, "")


def test_what_cannot_be_reported_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run has 'val/x'. .* they have: reward/mean, val/reward"):
        main([str(runs), "--tags", "val/x", "--output", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="which 0 of the groups are called"):
        main([str(runs), "--baseline", "x", "--output", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="is not there. A run folder holds"):
        main([str(runs / "x"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_one_seed_has_no_interval(runs: Path) -> None:
    text = page_of(runs / "ordinal-1", runs / "grpo-1").text
    assert "without several seeds there is no interval, and no difference can be told." in text
    assert "objective.advantage=grpo has one seed: its curves have no band." in text


def test_one_config_is_not_compared(runs: Path) -> None:
    text = page_of(runs / "grpo-1", runs / "grpo-2").text
    assert "All runs have the same config, so there is nothing to compare." in text
    assert "Nothing but seeds, and where the runs write." in text


def test_runs_without_a_common_seed(runs: Path) -> None:
    text = page_of(runs / "ordinal-1", runs / "ordinal-2", runs / "grpo-3").text
    assert "of one seed each at least" in text and "not paired" in text


def test_runs_without_validation_and_cut_off(tmp_path: Path) -> None:
    for seed, steps in ((1, 6), (2, 3)):
        for advantage in ("ordinal", "grpo"):
            folder = tmp_path / f"{advantage}{seed}"
            write_config(folder, seed, model__init_args__objective__advantage=advantage)
            write_events(folder, {"reward/mean": {step: step * seed for step in range(1, steps + 1)}})
    text = page_of(tmp_path).text
    assert "No run was validated: the reward is that of the training prompts" in text
    assert f"{tmp_path / 'grpo2'} ends at step 3 of 6: what is compared with it ends there." in text
    assert "on reward/mean at step 3: the interval includes 0" in text


def test_reward_models_are_compared_by_their_accuracy(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_config(tmp_path / f"rm{seed}", seed)
        write_events(tmp_path / f"rm{seed}", {"train/loss": {1: 0.7}, "val/pair_accuracy": {1: 0.5}})
    assert summarise(read_runs([tmp_path])[0]).tags == ["val/pair_accuracy"]


def test_several_sources_are_compared_each(runs: Path) -> None:
    for i, run in enumerate(sorted(runs.iterdir())):
        for name in ("a", "b"):
            write_events(run, {f"val/{name}/reward": {0: 0.0, 10: float(i)}})
    report = summarise(read_runs([runs])[0])
    assert report.tags == ["val/reward", "val/a/reward", "val/b/reward"] and len(report.contrasts) == 3
    assert "Holm's p over 3 comparisons" in report.answers[0]
    many = replace(
        report, contrasts=[*report.contrasts, *[replace(report.contrasts[0], group=str(i)) for i in range(9)]]
    )
    clear = sum(c.is_clear for c in many.contrasts if c.tag == many.tags[0])
    compared = sum(c.tag == many.tags[0] for c in many.contrasts)
    assert len(many.answers) <= 5 and f"{clear} of {compared} groups can be told apart from" in many.answers[-1]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Runs in which everything that is not ours is hostile: completions, prompts, names and config values."""
    for seed in (1, 2):
        for i, advantage in enumerate(("grpo", HOSTILE[0])):
            run = tmp_path / "runs" / f"{i}-{seed}"
            write_config(run, seed, model__init_args__objective__advantage=advantage, other=HOSTILE[2 + i])
            texts = {
                f"samples/group_{k}": {1: table(text, UNSEEN, prompt=f"{text} {k}")} for k, text in enumerate(HOSTILE)
            }
            tags = {
                "val/reward": {0: 0.0, 10: 1.0 * i},
                "val/<img src=x>$x_{$/reward": {0: 1.0},
                "val/b/reward": {0: 1.0},
            }
            write_events(run, {**tags, "reward/mean": {1: 0.0}}, texts)
    return tmp_path / "runs"


def test_hostile_text_stays_text(hostile: Path, tmp_path: Path) -> None:
    make([hostile], tmp_path / "out", [], None, HOSTILE[1])
    page = tmp_path / "out" / "index.html"
    loaded = dump(page, tmp_path / "profile")
    assert "<title>objective.advantage=grpo vs objective.advantage=&lt;script" in loaded
    seen = Document(loaded)
    assert seen.tags.count("h1") == 1 and seen.tags.count("style") == Document(page.read_text()).tags.count("style")
    assert not {"script", "img", "a", "link"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "href")]
    for text in HOSTILE:
        assert seen.text.count(text) >= 3, text  # as prompt, and as completion of two groups
    assert "x[U+2028]a[U+202E]b[U+2066]c[U+200F]d" in seen.text
    assert not re.search("[\u2028\u202e\u2066\u200f]", seen.text)


def test_the_page_forbids_scripts_that_would_get_in(runs: Path, tmp_path: Path) -> None:
    make([runs], tmp_path / "out", [], None, "")
    page = tmp_path / "out" / "index.html"
    script = "<script>document.title = 'pwned'</script><img src='x' onerror=\"document.title = 'pwned'\">"
    whole = page.read_text().replace("<h2>Curves", f"{script}<h2>Curves")
    page.write_text(whole)
    assert "<title>pwned" not in dump(page, tmp_path / "profile")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', whole)
    assert policy is not None
    page.write_text(whole.replace(policy[0], ""))
    assert "<title>pwned" in dump(page, tmp_path / "profile")  # so the policy is what has kept it out


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read(scheme: str, runs: Path, tmp_path: Path) -> None:
    make([runs], tmp_path / "out", [], None, "")
    options = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    screenshot(tmp_path / "out" / "index.html", tmp_path / "profile", tmp_path / "page.png", *options)
    image = Image.open(tmp_path / "page.png").convert("L")
    levels = image.histogram()
    assert image.width == 1280
    background, ink = (
        (sum(levels[200:]), sum(levels[:90])) if scheme == "light" else (sum(levels[:60]), sum(levels[150:]))
    )
    assert background > 0.8 * sum(levels) and ink > 0.005 * sum(levels)


@pytest.mark.parametrize("name", ["CI", "GOPO_NEEDS_BROWSER"])
def test_without_a_browser_ci_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CI", "GOPO_NEEDS_BROWSER"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="is installed"):
        chromium()
    monkeypatch.setenv(name, "1")
    with pytest.raises(pytest.fail.Exception, match=r"is installed; \.ci/run installs it"):
        chromium()


def test_ten_long_runs_are_read_in_seconds(tmp_path: Path) -> None:
    curve = {step: float(step) for step in range(1, 501)}
    events = write_events(tmp_path / "run1", {f"train/{i}": curve for i in range(20)})
    for seed in range(1, 11):
        write_config(tmp_path / f"run{seed}", seed)
        if seed > 1:
            shutil.copy(events, tmp_path / f"run{seed}")
    start = perf_counter()
    runs, _ = read_runs([tmp_path])
    assert perf_counter() - start < 10 and len(runs) == 10 and len(runs[0].scalars) == 20
