"""Each name in `_compat` does what is relied on: a library that has changed it fails here first, by its name."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, MambaConfig, MambaForCausalLM

from gopo_lightning import _compat
from gopo_lightning._compat import names
from gopo_lightning.rollout.engines.precision import cpu_computes_bfloat16
from tests.architectures import build


def test_what_is_gone_is_named_with_the_library_and_its_version() -> None:
    with pytest.raises(
        RuntimeError, match=rf"torch {torch.__version__.split('+')[0]}.* has no Linear\._gone\.x, .*lock"
    ):
        names.get("torch", nn.Linear(1, 1), "_gone.x")
    with pytest.raises(RuntimeError, match="has no Linear._gone"):
        names.get("torch", nn.Linear, "_gone")


# --- torch ------------------------------------------------------------------------------------------------------------


def test_persistent_buffers() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("temporary", torch.ones(2), persistent=False)
    module.register_buffer("empty", None)
    module.child = nn.BatchNorm1d(3)
    assert list(_compat.persistent_buffers(module)) == ["kept"] == [k for k in module.state_dict() if "." not in k]


def test_set_last_lr() -> None:
    scheduler = LambdaLR(torch.optim.SGD([torch.zeros(())], lr=1.0), lambda step: 1 / (step + 1))
    _compat.set_last_lr(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]
    scheduler.step()  # it starts from the optimiser and the step, not from what was set
    assert scheduler.get_last_lr() == [0.5]


@pytest.mark.skipif(not _compat.HAS_CPU_FLASH_ATTENTION, reason="torch no longer has the kernel; products serve")
@pytest.mark.parametrize("biased", [False, True])
def test_cpu_flash_attention(biased: bool) -> None:
    """Output, normaliser and gradients, beside the maths in float64."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    bias = torch.zeros(5, 7).masked_fill(torch.ones(5, 7).triu(3).bool(), -math.inf)[None, None] if biased else None
    output, normaliser = _compat.cpu_flash_attention(query, key, value, bias, 0.3)
    scores = 0.3 * query.double() @ key.double().mT + (0 if bias is None else bias)
    expected = scores.softmax(-1) @ value.double()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(normaliser.double(), scores.logsumexp(-1), rtol=0, atol=1e-6)
    grad = torch.randn_like(output)
    found = _compat.cpu_flash_attention_backward(grad, query, key, value, output, normaliser, bias=bias, scale=0.3)
    for mine, theirs in zip(found, torch.autograd.grad(expected, (query, key, value), grad.double()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_cpu_flash_attention_is_the_one_of_torch() -> None:
    """So that it is as fast."""
    query = torch.randn(1, 2, 4, 8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        expected = scaled_dot_product_attention(query, query, query, scale=0.3)
    assert torch.equal(_compat.cpu_flash_attention(query, query, query, None, 0.3)[0], expected)


@pytest.mark.skipif(not cpu_computes_bfloat16(), reason="this CPU emulates bfloat16, and oneDNN has no kernel for it")
@pytest.mark.parametrize("biased", [False, True])
def test_onednn_linear(biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 33).bfloat16(), torch.randn(17, 33).bfloat16()
    bias = torch.randn(17).bfloat16() if biased else None
    product = _compat.onednn_linear(weight, bias)
    assert product is not None or not torch.backends.mkldnn.is_available()
    if product is not None:
        torch.testing.assert_close(product(x), linear(x, weight, bias), rtol=2**-7, atol=2**-7)


# --- transformers -----------------------------------------------------------------------------------------------------


def test_unsplittable_layers() -> None:
    assert _compat.unsplittable_layers(build("llama")) == {"LlamaDecoderLayer"}
    assert _compat.unsplittable_layers(nn.Linear(1, 1)) == set()


def test_is_recurrent() -> None:
    config = MambaConfig(vocab_size=8, hidden_size=8, state_size=2, num_hidden_layers=1)
    assert _compat.is_recurrent(MambaForCausalLM(config))
    assert not _compat.is_recurrent(build("llama"))


def test_set_attention() -> None:
    """The next forward calls the function of that name."""
    model, calls = build("llama"), []

    def spy(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        calls.append(query.shape)
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    before = _compat.attention_of(model.config)
    _compat.set_attention(model.config, "spy")
    model(torch.zeros(1, 3, dtype=torch.long))
    assert len(calls) == model.config.num_hidden_layers
    _compat.set_attention(model.config, before)
    model(torch.zeros(1, 3, dtype=torch.long))
    assert len(calls) == model.config.num_hidden_layers and _compat.attention_of(model.config) == before


@pytest.mark.parametrize("lora", [False, True])
def test_set_checkpoint_function(lora: bool) -> None:
    """It is called for each layer, with what is to be computed, and was a partial of torch's with the options."""
    model: Any = build("llama").train()
    assert not any(map(_compat.checkpoint_function, model.modules()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if lora else model
    calls = []

    def spy(function: Any, *args: Any, **options: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=False)

    for module in model.modules():
        if (function := _compat.checkpoint_function(module)) is not None:
            assert function.keywords["use_reentrant"] is False
            _compat.set_checkpoint_function(module, spy)
    model(torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()
    assert len(calls) == model.config.num_hidden_layers


# --- lightning --------------------------------------------------------------------------------------------------------


class Spy(Callback):
    """Batches begun and processed, as is said at the beginning of training, before each batch and after it."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int]] = []

    def note(self, trainer: Trainer) -> None:
        self.said.append((_compat.batches_begun(trainer), _compat.batches_processed(trainer)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert _compat.attached_trainer(pl_module) is trainer
        self.note(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.note(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.note(trainer)


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def test_attached_trainer() -> None:
    assert _compat.attached_trainer(BoringModel()) is None


def test_batches_of_the_whole_run(tmp_path: Path) -> None:
    """Over epochs, and over a resume."""
    first, rest = Spy(), Spy()
    options = {"limit_train_batches": 2, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = make_trainer(tmp_path, first, max_steps=3, **options)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    make_trainer(tmp_path, rest, max_steps=5, **options).fit(BoringModel(), ckpt_path=tmp_path / "3.ckpt")
    assert first.said == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]
    assert rest.said == [(3, 3), (4, 3), (4, 4), (5, 4), (5, 5)]


@pytest.mark.parametrize("uses", [False, True])
def test_uses_distributed_sampler(uses: bool, tmp_path: Path) -> None:
    assert _compat.uses_distributed_sampler(make_trainer(tmp_path, use_distributed_sampler=uses)) is uses


def test_set_up_training_data(tmp_path: Path) -> None:
    """The number of batches is known when the optimiser is made."""
    found = []

    class Module(BoringModel):
        def configure_optimizers(self) -> Any:
            found.append(self.trainer.num_training_batches)
            _compat.set_up_training_data(self.trainer)
            found.append(self.trainer.num_training_batches)
            return super().configure_optimizers()

    make_trainer(tmp_path, max_steps=1, limit_train_batches=7, enable_checkpointing=False).fit(Module())
    assert found == [math.inf, 7]


def test_run_validation(tmp_path: Path) -> None:
    """All batches, with the hooks of a validation, and training goes on after it; after a resume too."""
    calls: list[str] = []

    class Module(BoringModel):
        def on_train_start(self) -> None:
            _compat.run_validation(self.trainer)
            assert self.trainer.training and not self.trainer.validating

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.trainer.validating and not self.training
            calls.append("validation")
            return super().validation_step(batch, batch_idx)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            calls.append("training")
            return super().training_step(batch, batch_idx)

    options: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 3, "num_sanity_val_steps": 0}
    make_trainer(tmp_path, ModelCheckpoint(tmp_path, "a"), max_epochs=1, **options).fit(Module())
    make_trainer(tmp_path, max_epochs=2, **options).fit(Module(), ckpt_path=tmp_path / "a.ckpt")
    assert calls == (["validation"] * 3 + ["training"] * 2 + ["validation"] * 3) * 2


@pytest.mark.parametrize(
    ("options", "expected"), [({"every_n_train_steps": 5}, 5), ({}, 0), ({"every_n_epochs": 1}, 0)]
)
def test_save_interval(options: dict[str, int], expected: int, tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, **options)  # type: ignore[arg-type]
    make_trainer(tmp_path, callback, max_steps=1, limit_train_batches=1, limit_val_batches=0).fit(BoringModel())
    assert _compat.save_interval(callback) == expected


def test_set_data_parallel_size(tmp_path: Path) -> None:
    """The device mesh is made of it, after the process group: Lightning's own rule holds the two together."""

    class Strategy(ModelParallelStrategy):
        def setup_environment(self) -> None:
            _compat.set_data_parallel_size(self, 3)
            super().setup_environment()

    trainer = make_trainer(tmp_path, strategy=Strategy(tensor_parallel_size=1), devices=1)
    try:
        with pytest.raises(RuntimeError, match="data_parallel_size=3"):
            trainer.fit(BoringModel())
    finally:
        torch.distributed.destroy_process_group()


def test_step_bar(tmp_path: Path) -> None:
    found = []

    class Bar(_compat.StepBar):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            self.set_trained(5)
            found.extend((task.description, task.completed) for task in self.progress.tasks)

    trainer = make_trainer(
        tmp_path, limit_train_batches=7, limit_val_batches=0, max_steps=1, enable_checkpointing=False
    )
    trainer.callbacks.append(Bar())
    trainer.fit(BoringModel())
    ((description, completed),) = found
    assert description.endswith("Training") and completed == 5


class Sized(BoringModel):
    def __init__(self, size: int = 1) -> None:
        super().__init__()


@pytest.mark.parametrize(("kind", "size"), [(LightningCLI, 7), (_compat.CommandLine, 1)])
def test_command_line(kind: type[LightningCLI], size: int, tmp_path: Path) -> None:
    """Lightning's own takes hyperparameters from a checkpoint, and ours does not."""

    class Seen(Exception):
        pass

    class Probe(kind):  # type: ignore[misc,valid-type]
        def before_instantiate_classes(self) -> None:
            raise Seen(self.config.fit.model.size)

    torch.save({"hyper_parameters": {"size": 7}}, tmp_path / "a.ckpt")
    with pytest.raises(Seen, match=f"^{size}$"):
        Probe(Sized, BoringDataModule, args=["fit", f"--ckpt_path={tmp_path / 'a.ckpt'}"])


# --- jsonargparse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "milestones"), [(nullcontext, [7]), (_compat.lists_are_replaced, [1])])
def test_lists_are_replaced(context: Callable[[], Any], milestones: list[int]) -> None:
    """An equally long list with the same class leaves an option out; jsonargparse alone takes the earlier one's."""
    parser = ArgumentParser()
    parser.add_argument("--schedulers", type=list[Steps])
    named = {"class_path": f"{__name__}.Steps"}
    earlier, later = (
        [{**named, "init_args": options}] for options in ({"milestones": [7], "gamma": 2.0}, {"gamma": 3.0})
    )
    with context():
        found = parser.parse_args([f"--schedulers={json.dumps(earlier)}", f"--schedulers={json.dumps(later)}"])
        added = parser.parse_args([f"--schedulers={json.dumps(earlier)}", f"--schedulers+={json.dumps(named)}"])
        changed = parser.parse_args([f"--schedulers={json.dumps(earlier)}", "--schedulers.gamma=4"])
    assert [vars(entry.init_args) for entry in found.schedulers] == [{"milestones": milestones, "gamma": 3.0}]
    assert [entry.init_args.milestones for entry in added.schedulers] == [[7], [1]]
    assert [vars(entry.init_args) for entry in changed.schedulers] == [{"milestones": [7], "gamma": 4.0}]


class Steps:
    """With options that have defaults."""

    def __init__(self, milestones: Sequence[int] = (1,), gamma: float = 1.0) -> None: ...
