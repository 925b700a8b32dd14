"""The callbacks: tables, exports, progress and peak memory, on tiny models in a real Trainer."""

import html
import re
import socket
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from scipy.stats import rankdata
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gopo_lightning.data.batch import Batch
from gopo_lightning.training.callbacks import ExportHF, ProgressBar, SampleTable, Throughput
from gopo_lightning.training.callbacks.export import export_policy
from gopo_lightning.training.callbacks.progress import PlainLines, RichBar, train_line, validation_line
from gopo_lightning.training.callbacks.samples import escape, group_table, ranks
from gopo_lightning.training.callbacks.schedule import Every
from gopo_lightning.training.callbacks.standard import ValidationLine
from gopo_lightning.types import Completions, Experience, Prompt, PromptBatch
from tests.ranks import start_processes

NAN, INF = float("nan"), float("inf")


def tiny_model(tie: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=tie, **shape))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<eos>", "a", "film", "good"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def experience(rewards: list[list[float]], texts: tuple[str, ...] = (), num_sources: int = 1) -> Experience:
    rewards_PG = torch.tensor(rewards)
    P, G = rewards_PG.shape
    prompts = [Prompt(index=7 + p, token_ids=(1, 2), text=f"Prompt {p}") for p in range(P)]
    completions = Completions(
        tokens_NT=torch.ones(P * G, 3, dtype=torch.int64),
        mask_NT=torch.tensor([[True, True, False]]).expand(P * G, 3),
        truncated_N=torch.tensor([n == 0 for n in range(P * G)]),
        texts=texts or tuple(f"text {n}" for n in range(P * G)),
    )
    rewards_PGK = rewards_PG[..., None].expand(P, G, num_sources)
    advantages_PG = rewards_PG.nan_to_num(0)
    prompt_batch = PromptBatch.collate(prompts, 0)
    return Experience(prompt_batch, completions, rewards_PGK, rewards_PG, 3, advantages_PG=advantages_PG)


class Module(L.LightningModule):
    """Puts an experience into each batch, steps, and logs what it is given, as GOPOModule does."""

    def __init__(self, metrics: dict[str, float] | None = None, steps_per_batch: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy, self.tokenizer = tiny_model(), tiny_tokenizer()
        self.metrics, self.steps_per_batch = metrics or {}, steps_per_batch
        self.phase = "start"

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.phase = "rollout"
        batch["experience"] = experience([[0.5, 2.0, 0.5, NAN], [1.0, 2.0, 3.0, 4.0]])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.phase = "train"
        self.log_dict(self.metrics, batch_size=1)
        for _ in range(self.steps_per_batch):
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(sum(p.sum() for p in self.policy.parameters()))
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/reward", 0.25, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.policy.parameters(), lr=0.01)


class NoRollout(Module):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass


def loader(num_batches: int = 8) -> DataLoader:
    return DataLoader(range(num_batches), batch_size=1, collate_fn=lambda rows: Batch(row=torch.zeros(1)))


def trainer(tmp_path: Path, callbacks: list[L.Callback], max_steps: int = 4, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "logger": TensorBoardLogger(tmp_path, name="", version="log"),
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(callbacks=callbacks, max_steps=max_steps, **(defaults | options))


def events(tmp_path: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(tmp_path / "log"), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


# ------------------------------------------------------------------ schedule


def test_every_is_due_once_per_interval_also_where_steps_jump() -> None:
    every = Every(10)
    every.start(0)
    assert [step for step in range(1, 31) if every.due(step)] == [10, 20, 30]
    every.start(0)
    assert [step for step in range(3, 31, 3) if every.due(step)] == [12, 21, 30]


def test_every_goes_on_after_a_resume_as_if_nothing_had_happened() -> None:
    every = Every(10)
    every.start(20, with_first=True)
    assert [step for step in range(21, 41) if every.due(step)] == [30, 40]


def test_every_refuses_zero() -> None:
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        Every(0)


# ------------------------------------------------------------------- samples


@pytest.mark.parametrize("rewards", [[0.1, 0.9, 0.5, 0.3], [1.0, 1.0, 0.0, 0.0], [5.0, 5.0], [INF, 0.0, -INF]])
def test_ranks_agree_with_scipy(rewards: list[float]) -> None:
    expected = rankdata([-reward for reward in rewards], method="average")
    assert ranks(torch.tensor(rewards)).tolist() == expected.tolist()


def test_ranks_leave_nan_out() -> None:
    assert ranks(torch.tensor([3.0, NAN, 1.0, 1.0])).nan_to_num(-1).tolist() == [1, -1, 2.5, 2.5]


def test_a_table_shows_the_best_first_and_the_unscored_last() -> None:
    table = group_table(experience([[0.5, 2.0, 0.5, NAN]]), 0)
    assert table.splitlines() == [
        "**Prompt, row 7:** Prompt 0",
        "",
        "| rank | reward | advantage | tokens | completion |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | +2.000 | +2.000 | 2 | text 1 |",
        "| 2.5 | +0.500 | +0.500 | 2 (cut) | text 0 |",
        "| 2.5 | +0.500 | +0.500 | 2 | text 2 |",
        "| none | none | +0.000 | 2 | text 3 |",
    ]


def test_a_table_of_the_second_group_shows_its_own_completions_and_each_source() -> None:
    table = group_table(experience([[0.0, 1.0], [5.0, 4.0]], num_sources=2), 1)
    assert "Prompt 1" in table
    assert "| 1 | +5.000 | +5.000, +5.000 | +5.000 | 2 | text 2 |" in table


def test_hostile_text_reaches_the_page_as_text() -> None:
    hostile = "| a |\n# b\n\n<script>alert(1)</script> **c** `d` [e](f) &amp; \\ $g$ 1. x"
    table = group_table(experience([[1.0, 0.0]], texts=(hostile, "")), 0)
    assert len(table.strip().splitlines()) == 6  # the prompt, a blank line, two of header, two completions
    page = markdown_to_safe_html(table)
    tags = {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "br", "em"}
    assert set(re.findall(r"<(\w+)", page)) == tags
    seen = html.unescape(re.sub(r"<br ?/?>", "\n", page))
    assert f"<td>{hostile}</td>" in seen
    assert "<td><em>(empty)</em></td>" in seen


def test_long_lines_are_broken_between_words() -> None:
    lines = escape(f"{'word ' * 30}\n\nend", max_chars=1000).split("<br>")
    assert lines == [" ".join(["word"] * 16), " ".join(["word"] * 14), "", "end"]


def test_long_text_is_cut_visibly() -> None:
    assert escape("x" * 50, max_chars=10) == "x" * 10 + " *(40 more characters)*"


def test_sample_table_logs_the_first_rollout_and_then_every_n_steps(tmp_path: Path) -> None:
    trainer(tmp_path, [SampleTable(every_n_steps=4, num_groups=5)], max_steps=9).fit(Module(), loader(9))
    written = events(tmp_path)
    tags = [f"samples/group_{p}/text_summary" for p in (0, 1)]
    assert set(tags) == {tag for tag in written.Tags()["tensors"] if tag.startswith("samples/")}
    for tag in tags:
        assert [event.step for event in written.Tensors(tag)] == [1, 4, 8]


def test_sample_table_with_several_steps_a_batch(tmp_path: Path) -> None:
    trainer(tmp_path, [SampleTable(every_n_steps=4)], max_steps=12).fit(Module(steps_per_batch=3), loader())
    written = events(tmp_path).Tensors("samples/group_0/text_summary")
    assert [event.step for event in written] == [3, 6, 9, 12]


def test_sample_table_refuses_a_run_without_rollouts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rollout in the batch of NoRollout"):
        trainer(tmp_path, [SampleTable()]).fit(NoRollout(), loader())


def test_sample_table_says_when_there_is_no_logger(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="SampleTable writes nothing"):
        trainer(tmp_path, [SampleTable()], max_steps=1, logger=False).fit(Module(), loader())


# -------------------------------------------------------------------- export


@pytest.mark.parametrize("tie", [True, False])
def test_an_export_loads_in_plain_transformers(tmp_path: Path, tie: bool) -> None:
    model, tokens = tiny_model(tie), torch.arange(6)[None]
    model.model.layers[0].requires_grad_(False)  # frozen by hand: it belongs to the folder all the same
    export_policy(model, tiny_tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy")("a good film")["input_ids"] == [1, 3, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["policy"]
    assert (tmp_path / "policy" / "model.safetensors").exists()


def test_an_adapter_is_exported_without_its_base(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    export_policy(model, tiny_tokenizer(), tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 10_000
    tokens = torch.arange(6)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_an_export_replaces_the_one_before(tmp_path: Path) -> None:
    adapter: Any = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    export_policy(adapter, tiny_tokenizer(), tmp_path / "policy")
    export_policy(tiny_model(), tiny_tokenizer(), tmp_path / "policy")
    assert not (tmp_path / "policy" / "adapter_config.json").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["policy"]


def test_a_failed_export_leaves_the_one_before_alone(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    export_policy(tiny_model(), tiny_tokenizer(), tmp_path / "policy")
    with pytest.raises(OSError, match="disk full"):
        export_policy(tiny_model(), Broken(), tmp_path / "policy")
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<eos>"


def test_export_hf_writes_during_the_run_and_at_its_end(tmp_path: Path) -> None:
    module, out = Module(), tmp_path / "out"
    trainer(tmp_path, [ExportHF(str(out / "policy"), every_n_steps=2)], max_steps=5).fit(module, loader())
    assert {folder.name for folder in out.iterdir()} == {"policy", "policy-step-2", "policy-step-4"}
    last = AutoModelForCausalLM.from_pretrained(out / "policy").state_dict()
    assert all(torch.equal(value, last[name]) for name, value in module.policy.state_dict().items())
    earlier = AutoModelForCausalLM.from_pretrained(out / "policy-step-2").state_dict()
    assert any(not torch.equal(value, last[name]) for name, value in earlier.items())


def test_export_hf_goes_to_the_log_folder_unless_told(tmp_path: Path) -> None:
    trainer(tmp_path, [ExportHF()], max_steps=1).fit(Module(), loader())
    assert (tmp_path / "log" / "policy" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["policy", "policy-step-4"])
def test_a_folder_of_someone_else_is_refused_before_training(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "thesis.txt").touch()
    (tmp_path / "out" / "policy-step-first").mkdir()  # no name of ours
    (tmp_path / "out" / "policy-step-first" / "thesis.txt").touch()
    module = Module()
    with pytest.raises(ValueError, match=f"--export_dir.*{name}: it holds thesis.txt"):
        trainer(tmp_path, [ExportHF(str(tmp_path / "out" / "policy"), every_n_steps=2)]).fit(module, loader())
    assert module.phase == "start" and (tmp_path / "out" / name / "thesis.txt").exists()


def test_what_comes_into_the_folder_during_the_run_stays(tmp_path: Path) -> None:
    class Write(L.Callback):
        def on_train_end(self, *_: Any) -> None:
            (tmp_path / "policy").mkdir()
            (tmp_path / "policy" / "thesis.txt").touch()

    trainer(tmp_path, [Write(), ExportHF(str(tmp_path / "policy"))], max_steps=1).fit(Module(), loader())
    assert (tmp_path / "policy" / "thesis.txt").exists()
    assert (tmp_path / "policy-2" / "model.safetensors").exists()


def _export_shards(rank: int, folder: str, port: int) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = tiny_model().requires_grad_(True)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    export_policy(model, tiny_tokenizer(), Path(folder) / "policy", is_writer=rank == 0)
    torch.distributed.barrier()  # as ExportHF: a rank that leaves early takes the other down
    torch.distributed.destroy_process_group()


def test_shards_are_exported_whole(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_export_shards, (str(tmp_path), port), 2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    expected = tiny_model().state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_export_hf_refuses_a_module_without_policy(tmp_path: Path) -> None:
    module = Module()
    del module.tokenizer
    with pytest.raises(ValueError, match="no tokenizer in Module"):
        trainer(tmp_path, [ExportHF(str(tmp_path / "policy"))]).fit(module, loader())


# ------------------------------------------------------------------ progress

METRICS = {
    "seconds/rollout": 3.1,
    "seconds/reward": 0.2,
    "seconds/train": 4.4,
    "reward/mean": 0.31,
    "train/kl": 0.012,
    "throughput/rollout_tokens_per_second": 812.4,
}


def test_a_line_shows_phases_reward_kl_and_speed() -> None:
    expected = "step 12/60  rollout 3.1s reward 0.2s train 4.4s  reward +0.310  kl 0.0120  812 tok/s"
    assert train_line(12, 60, METRICS) == expected


def test_a_line_leaves_out_what_was_not_logged() -> None:
    assert train_line(3, -1, {}) == "step 3"
    assert train_line(3, 9, {"train/loss": torch.tensor(0.5)}) == "step 3/9  loss 0.5000"
    assert validation_line(3, 9, {"val/win_rate": 0.625}) == "step 3/9  validation  win rate 0.625"


def test_several_sources_are_shown_one_by_one() -> None:
    """Combined by rank, their sum is 0 in every group."""
    training = {"reward/mean": 0.0, "reward/ended/mean": 0.75, "reward/r{m}/mean": -2.0, "train/loss": 0.5}
    assert train_line(1, 9, training) == "step 1/9  ended +0.750  r{m} -2.000  loss 0.5000"
    validation = {"val/reward": 0.25, "val/ended/reward": 1.0, "val/rm/reward": 2.0, "val/win_rate": 0.5}
    assert validation_line(1, 9, validation) == "step 1/9  validation  ended +1.000  rm +2.000  win rate 0.500"
    alone = {"reward/mean": 0.5, "reward/rm/mean": 0.5, "val/reward": 1.0, "val/rm/reward": 1.0}
    assert train_line(1, 9, alone) == "step 1/9  reward +0.500"
    assert validation_line(1, 9, alone) == "step 1/9  validation  reward +1.000"


def test_the_bar_suits_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert type(ProgressBar()) is PlainLines
    assert type(ProgressBar("rich")) is RichBar
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert type(ProgressBar()) is RichBar
    assert type(ProgressBar(style="plain", every_n_steps=5)) is PlainLines
    with pytest.raises(ValueError, match="'fancy'"):
        ProgressBar("fancy")  # type: ignore[arg-type]


def test_plain_lines_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("plain", every_n_steps=2)
    run = trainer(tmp_path, [bar, ValidationLine()], val_check_interval=4, check_val_every_n_epoch=None)
    run.fit(Module(METRICS), loader(), loader(1))
    run.test(Module(), loader(20), verbose=False)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    values = "rollout 3.1s reward 0.2s train 4.4s  reward +0.310  kl 0.0120  812 tok/s"
    assert steps[:3] == [f"step 1/4  {values}", f"step 2/4  {values}", f"step 4/4  {values}"]
    assert steps[3:] == ["step 4/4  validation  reward +0.250"]
    assert sum(line.startswith("test batch") for line in lines) == 10


def test_a_disabled_bar_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("plain")
    bar.disable()
    trainer(tmp_path, [bar]).fit(Module(METRICS), loader())
    assert "step" not in capsys.readouterr().out


def test_the_rich_bar_counts_steps_and_shows_phase_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    bar = ProgressBar("rich")
    seen: list[tuple[float, float | None]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            bar.refresh(hard=True)
            task = bar.train_progress_bar
            seen.append((task.completed, task.total))

    trainer(tmp_path, [bar, Watch()], max_steps=6).fit(Module(METRICS, steps_per_batch=2), loader())
    assert isinstance(bar, RichBar)
    assert seen == [(2, 6), (4, 6), (6, 6)]
    assert bar._ticker is None
    shown = capsys.readouterr().out
    for text in ("Training", "6/6", "reward: 0.310", "kl: 0.012", "tok/s: 812.400", "train"):
        assert text in shown


def test_an_error_stops_the_rich_bar(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("broken")

    bar = ProgressBar("rich")
    assert isinstance(bar, RichBar)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, [bar]).fit(Fails(), loader())
    assert bar._ticker is None


# ---------------------------------------------------------------- throughput


def test_peak_memory_is_logged_with_every_rollout(tmp_path: Path) -> None:
    trainer(tmp_path, [Throughput()]).fit(Module(), loader())
    values = [event.value for event in events(tmp_path).Scalars("system/peak_memory_gib")]
    assert len(values) == 4
    assert 0.05 < values[0] < 100
    assert values == sorted(values)


# ---------------------------------------------------------------------- YAML


def test_all_callbacks_are_named_in_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
trainer:
  logger: false
  accelerator: cpu
  callbacks:
    - class_path: gopo_lightning.callbacks.SampleTable
      init_args: {{every_n_steps: 5, num_groups: 3}}
    - class_path: gopo_lightning.callbacks.ExportHF
      init_args: {{dirpath: {tmp_path}/policy, every_n_steps: 50}}
    - class_path: gopo_lightning.callbacks.ProgressBar
      init_args: {{style: plain, every_n_steps: 2}}
    - class_path: gopo_lightning.callbacks.Throughput
"""
    )
    cli = LightningCLI(Module, run=False, args=[f"--config={config}"])
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert {SampleTable, ExportHF, PlainLines, Throughput} <= set(kinds)
