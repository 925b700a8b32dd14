"""What people have ordered trains: a policy by `HumanRanking`, from files and live, and a reward model."""

import json
import math
import re
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.data.json_lines import read_jsonl, write_jsonl
from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.data.visible import visible
from gopo_lightning.human.groups import Group
from gopo_lightning.human.verdicts import Verdict, VerdictFile, read_verdicts
from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.rewards import FunctionReward, HumanRanking, score_groups
from gopo_lightning.rollout import RecordedEngine, SamplingConfig
from gopo_lightning.types import Completion, Prompt
from tests.conftest import save_llama
from tests.ranks import Case, launch
from tests.runs import make_data, make_module, make_trainer
from tests.test_module import Keep

CPU = torch.device("cpu")
GROUPS = [Group(f"say {letter * 2}", (f"{letter}", f" {letter}{letter}", "no", "", "x y")) for letter in "abcdefgh"]


def write(folder: Path, rater: str, good: int = 5, order: Sequence[int] = (1, 0, 4, 2, 3)) -> Path:
    """Verdicts on all groups: the second is best, then the first, then the last with the third."""
    file = VerdictFile(folder, rater)
    for group in GROUPS:
        file.add(Verdict.of(group, order, [False, False, False, True, False], good, rater))
    file.close()
    return file.path


def source_of(verdicts: Path, **options: Any) -> HumanRanking:
    source = HumanRanking(str(verdicts), **options)
    source.setup(CPU)
    return source


def wins(source: HumanRanking, group: Sequence[str], prompt: str = "say aa") -> list[list[float]]:
    wins_PGGK = score_groups([source], [Prompt(0, (1,), prompt)], [group]).wins_PGGK
    assert wins_PGGK is not None
    return wins_PGGK[0, ..., 0].tolist()


# ------------------------------------------------------------------------------ from files


def test_the_comparisons_by_hand(tmp_path: Path) -> None:
    """Ranks: a 2, aa 1, no 3 (ties with x y), empty 4. A copy ties; a text that nobody saw is not compared."""
    source = source_of(write(tmp_path, "ann"))
    found = torch.tensor(wins(source, ["a", " aa", "no", "x y", "unseen"]))
    expected = torch.tensor([[0.5, 0, 1, 1], [1, 0.5, 1, 1], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]])
    torch.testing.assert_close(found[:4, :4], expected)
    assert found[4, :4].isnan().all() and found[:4, 4].isnan().all()
    assert all(math.isnan(value) for row in wins(source, ["a", "no"], "another prompt") for value in row)


def test_the_mean_over_raters(tmp_path: Path) -> None:
    write(tmp_path, "ann")
    write(tmp_path, "bob", order=(0, 1, 4, 2, 3))
    write(tmp_path, "cy", good=0)
    found = wins(source_of(tmp_path), ["a", " aa", "no"])
    assert found[0][1] == pytest.approx((0 + 1 + 0.5) / 3) and found[0][2] == pytest.approx((1 + 1 + 0.5) / 3)


def test_a_completion_that_was_cut_off_is_known_by_its_beginning(tmp_path: Path) -> None:
    source = source_of(write(tmp_path, "ann"))

    def cut(text: str) -> Completion:
        return Completion(text, truncated=True, num_tokens=1)

    assert wins(source, ["a", cut("x")])[0][1] == 1
    assert math.isnan(wins(source, ["a", Completion("x", truncated=False, num_tokens=1)])[0][1])
    file = VerdictFile(tmp_path / "more", "ann")
    file.add(Verdict.of(Group("p", ("ab", "ac", "b")), [0, 1, 2], [False] * 3, 3, "ann"))
    assert math.isnan(wins(source_of(file.path), ["b", cut("a")], "p")[0][1])  # of two


def test_a_chat_of_one_message_is_its_text(tmp_path: Path) -> None:
    source = source_of(write(tmp_path, "ann"))
    chat = Prompt(0, (1,), "say aa", messages=({"role": "user", "content": "say aa"},))
    system = Prompt(0, (1,), "say aa", messages=({"role": "system", "content": "s"}, *(chat.messages or ())))
    assert source([chat], [["a", "no"]])[0, 0, 1] == 1
    assert source([system], [["a", "no"]]).isnan().all()


def test_recorded_groups_train_a_policy(tiny_policy: Path, tmp_path: Path) -> None:
    """The file of verdicts is both the data and the ranking: the advantages are those of its ranks."""
    path, keep = write(tmp_path / "verdicts", "ann"), Keep()
    module = make_module(
        tiny_policy,
        engine=RecordedEngine(),
        rewards=[HumanRanking(str(path))],
        sampling=SamplingConfig(max_new_tokens=12),
        num_completions=5,
    )
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[keep])
    trainer.fit(module, PromptDataModule(train=PromptSource(str(path)), prompts_per_step=4))
    assert trainer.global_step == 2
    for experience in keep.experiences:
        for p in range(len(experience)):
            texts = experience.completions.texts[5 * p : 5 * p + 5]
            letter = experience.prompts.prompts[p].text[-1]
            ranks = {letter: 2.0, f" {letter}{letter}": 1.0, "no": 3.0, "x y": 3.0, "": 4.0}
            expected = ordinal(torch.tensor([[-ranks[text] for text in texts]], dtype=torch.float64))[0]
            assert experience.advantages_PG[p].tolist() == pytest.approx(expected.tolist())
    assert float(trainer.callback_metrics["train/grad_norm"]) > 0


def test_the_config_of_the_docs_trains(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """On top of the quickstart's, and in validation, where nobody is asked, the second source decides."""
    write(tmp_path / "verdicts", "ann")
    write(tmp_path / "verdicts", "bob")
    page = Path("docs/rank.md").read_text("utf-8")
    (code,) = re.findall(r"```yaml title=\"by_hand.yaml\"\n(.*?)```", page, re.DOTALL)
    overlay = tmp_path / "by_hand.yaml"
    overlay.write_text(code.replace("runs/rank/verdicts", str(tmp_path / "verdicts")))
    flags = {
        "trainer.precision": "32-true",
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.logger.init_args.save_dir": tmp_path,
        "model.init_args.policy.name": tiny_policy,
        "data.init_args.validation": json.dumps({"path": str(prompts_file), "split": None, "limit": 4}),
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    module = run(["fit", "--config=configs/quickstart/gopo.yaml", f"--config={overlay}", *given]).model
    metrics = module.trainer.callback_metrics
    assert metrics["reward/human/compared_fraction"] == 1 and metrics["train/grad_norm"] > 0
    assert math.isnan(metrics["val/human/win_rate"]) and 0 <= metrics["val/win_rate"] <= 1


def test_the_same_file_trains_a_reward_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As ranked lists, with no conversion; by both raters, one of whom found some groups wholly bad."""
    write(tmp_path / "verdicts", "ann")
    write(tmp_path / "verdicts", "bob", good=2)
    write(tmp_path / "verdicts", "cy", good=0)
    base = save_llama(tmp_path_factory.mktemp("base"), max_position_embeddings=128)
    small = {
        "trainer": {"accelerator": "cpu", "precision": "32-true", "max_steps": 2, "val_check_interval": 2},
        "trainer.logger.init_args": {"save_dir": tmp_path},
        "model.init_args": {"model": base, "max_length": 128, "export_dir": tmp_path / "export"},
        "data.init_args": {"batch_size": 4, "validation_fraction": 0.25, "source": tmp_path / "verdicts"},
    }
    flags = [f"--{group}.{key}={value}" for group, values in small.items() for key, value in values.items()]
    run(["fit", "--config", "configs/quickstart/reward_model_pairs.yaml", *flags])
    assert (tmp_path / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rater": "bob"}, "rater, port and timeout_seconds are for ask: true"),
        ({"port": 80}, "are for ask: true"),
        ({"ask": True, "port": 70000}, r"port=70000 must be in \[0, 65535\]"),
        ({"ask": True, "timeout_seconds": 0}, "timeout_seconds=0 must be above 0"),
        ({"ask": True, "rater": "../x"}, "names a file"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        HumanRanking(str(tmp_path), **options)


# ------------------------------------------------------------------------------ live


class Person:
    """Orders by what its page gives it, longest first, and skips what begins with `say ababab`; as the page would."""

    def __init__(self, address: str) -> None:
        self.address, self.ended, self.num_ranked = address, threading.Event(), 0
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        origin = re.match(r"http://[\d.:]+", self.address)
        assert origin is not None
        headers = {"Content-Type": "application/json", "Origin": origin[0]}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers), timeout=10) as answer:
            return json.loads(answer.read())

    def _work(self) -> None:
        while not self.ended.wait(0.05):
            for one in self.ask("state")["groups"]:
                if one["status"] == "open":
                    self._rank(self.ask(f"groups/{one['key']}"))

    def _rank(self, group: dict[str, Any]) -> None:
        if group["prompt"][-1]["text"] == "say ababab":
            self.ask("skip", {"key": group["key"]})
            return
        found = sorted(group["completions"], key=lambda one: -len(one["text"]))
        ties = [n > 0 and len(found[n - 1]["text"]) == len(one["text"]) for n, one in enumerate(found)]
        self.num_ranked += 1
        order = [one["number"] for one in found]
        self.ask("rank", {"key": group["key"], "order": order, "ties": ties, "good": len(order)})


class Live(HumanRanking):
    """With a person of its own at the page of rank 0."""

    def setup(self, device: torch.device) -> None:
        super().setup(device)
        if self._server is not None and not hasattr(self, "person"):
            self.person = Person(self._server.address)

    def close(self) -> None:
        if hasattr(self, "person"):
            self.person.ended.set()
            self.person.thread.join()
            del self.person
        super().close()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    source = Live(str(tmp_path / "verdicts"), ask=True, rater="ann")
    yield source
    source.close()


def length(completions: list[str]) -> list[float]:
    """What the person goes by, on whose page the random policy's control characters are spelt out."""
    return [float(len(visible(text))) for text in completions]


def fit(folder: Path, policy: Path, prompts: Path, source: Any, *callbacks: Callback, **options: Any) -> Any:
    trainer = make_trainer(folder, callbacks=list(callbacks), **options)
    trainer.fit(make_module(policy, rewards=[source], num_completions=3), make_data(prompts))
    return trainer


def test_training_waits_for_a_person_and_asks_nothing_twice(
    live: Live, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    keep, again = Keep(), Keep()
    trainer = fit(tmp_path / "one", tiny_policy, prompts_file, live, keep)
    assert math.isnan(trainer.callback_metrics["val/win_rate"])
    verdicts = read_verdicts(tmp_path / "verdicts")
    assert live.person.num_ranked == len(verdicts) > 0
    skipped = 0
    for experience in keep.experiences:
        for p, prompt in enumerate(experience.prompts.prompts):
            texts = experience.completions.texts[3 * p : 3 * p + 3]
            expected = ordinal(torch.tensor([length(list(texts))], dtype=torch.float64))[0].tolist()
            is_skipped = prompt.text == "say ababab"
            skipped += is_skipped
            assert experience.advantages_PG[p].tolist() == pytest.approx([0.0] * 3 if is_skipped else expected)
    assert skipped
    live.close()
    other = Live(str(tmp_path / "verdicts"), ask=True, rater="bob")
    fit(tmp_path / "two", tiny_policy, prompts_file, other, again)
    assert other.person.num_ranked == 0 and not (tmp_path / "verdicts" / "bob.jsonl").exists()
    other.close()
    for first, second in zip(keep.experiences, again.experiences, strict=True):
        assert torch.equal(first.advantages_PG, second.advantages_PG)


def test_a_person_who_does_not_come(tmp_path: Path) -> None:
    """After the time limit the groups count as skipped; `rewards.timeout_seconds` does not end the run."""
    source = source_of(tmp_path, ask=True, timeout_seconds=0.5)
    prompts = [Prompt(0, (1,), "say"), Prompt(1, (1,), "alone")]
    scores = score_groups([source], prompts, [["a", "b"], ["c", "c"]], timeout_seconds=0.05)
    assert scores.wins_PGGK is not None and scores.wins_PGGK[0].isnan().all()
    assert source._session is not None and source._session.num_open == 0
    source.close()


def test_it_can_stand_beside_another_source(live: Live, tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, val_check_interval=1)
    rewards = [live, FunctionReward("tests.test_human_ranking.length", name="length")]
    trainer.fit(make_module(tiny_policy, rewards=rewards, num_completions=3, combine="borda"), make_data(prompts_file))
    assert 0 <= trainer.callback_metrics["val/length/win_rate"] <= 1
    assert trainer.callback_metrics["reward/rank_correlation/human-length"] == pytest.approx(1)


def test_two_ranks_ask_one_person(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Rank 0 serves, both get the verdicts: the same steps as on one process."""

    def case(name: str, strategy: str = "auto") -> Case:
        source = Live(str(tmp_path / f"verdicts-{name}"), ask=True)
        return Case(name, strategy, module={"rewards": [source], "num_completions": 3}, max_steps=2)

    launch([case("one")], tiny_policy, prompts_file, tmp_path, 1)
    launch([case("two", "ddp")], tiny_policy, prompts_file, tmp_path, 2)
    one, two = (torch.load(tmp_path / f"{name}.pt")["steps"] for name in ("one", "two"))
    for mine, theirs in zip(two, one, strict=True):
        assert mine["texts"] == theirs["texts"]
        for key in ("train/loss", "train/grad_norm", "reward/human/compared_fraction"):
            assert mine["metrics"][key] == pytest.approx(theirs["metrics"][key], abs=1e-5), key
    files = [tmp_path / f"verdicts-{name}" / "me.jsonl" for name in ("one", "two")]
    first, second = ({v.group.key: v.ranks for v in read_verdicts(file)} for file in files)
    assert first == second and first


def test_ranked_lists_of_another_origin_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "ann")
    rows = list(read_jsonl(path))
    write_jsonl(tmp_path / "lists.jsonl", [{k: row[k] for k in ("prompt", "completions", "ranks")} for row in rows])
    assert [v.ranks for v in read_verdicts(tmp_path / "lists.jsonl")] == [v.ranks for v in read_verdicts(path)]
