"""What only a GPU shows: `make test-cuda`, skipped where there is none.

With GOPO_CUDA_TESTS_ON=cpu the same tests run on a CPU, which says that they run, and nothing about a GPU.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from gopo_lightning.commands.run_plan import plan_of
from gopo_lightning.distributed.strategies import FSDP2Strategy
from gopo_lightning.evaluation import footprint
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.policy.shared_prefix import supports_shared_prefix
from gopo_lightning.rollout import TransformersEngine
from tests.architectures import (
    BUILDERS,
    FAMILIES,
    SCALED_LOGITS,
    build,
    family,
    gradients,
    prompt_batch,
    ragged_completions,
    relative_difference,
)
from tests.ranks import Record
from tests.runs import make_data, make_module, make_trainer
from tests.test_engine import generate
from tests.test_estimate import write_config

DEVICE = os.environ.get("GOPO_CUDA_TESTS_ON", "cuda")
GPU = DEVICE == "cuda"
pytestmark = pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="no GPU")
PLAIN = [*BUILDERS, *SCALED_LOGITS]


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """No TF32 in what is compared in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def model_of(name: str) -> Any:
    return (build(name) if name in PLAIN else family(name)).to(DEVICE)


def logprobs_and_gradient(name: str, *, shared: bool, dtype: torch.dtype | None) -> tuple[torch.Tensor, Any]:
    """Of ragged groups; ``dtype`` is that of autocast."""
    model = model_of(name)
    prompts, completions = prompt_batch((5, 9, 1)).to(DEVICE), ragged_completions().to(DEVICE)
    with torch.autocast(DEVICE, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        logprobs_NT = completion_logprobs(model, prompts, completions, shared_prefix=shared).logprobs_NT
    weights_NT = torch.arange(logprobs_NT.numel(), device=DEVICE).view_as(logprobs_NT).cos()
    (logprobs_NT * weights_NT * completions.mask_NT).sum().backward()
    return logprobs_NT.detach().float()[completions.mask_NT].cpu(), gradients(model)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("dtype", "nats", "share"), [(None, 1e-3, 1e-3), (torch.bfloat16, 0.05, 0.05)], ids=str)
def test_packed_groups_have_the_numbers_of_single_sequences(
    name: str, dtype: torch.dtype | None, nats: float, share: float
) -> None:
    """Through the kernel that the device takes; mean over tokens, and the gradient as a whole."""
    supported, reason = supports_shared_prefix(model_of(name))
    if not supported:
        pytest.skip(reason)
    packed, apart = (logprobs_and_gradient(name, shared=shared, dtype=dtype) for shared in (True, False))
    assert (packed[0] - apart[0]).abs().mean() < nats
    assert relative_difference(packed[1], apart[1]) < share


@pytest.mark.parametrize("name", [*PLAIN, *FAMILIES])
def test_greedy_text_is_that_of_a_cpu(name: str) -> None:
    """Whichever decoder the model gets here."""
    here = generate(model_of(name), prompt_batch().to(DEVICE), "auto", 2, temperature=0)
    there = generate(model_of(name).to("cpu"), prompt_batch(), "auto", 2, temperature=0)
    same = (
        (here.tokens_NT.cpu() == there.tokens_NT)[there.mask_NT]
        if here.tokens_NT.shape == there.tokens_NT.shape
        else None
    )
    assert same is not None and same.float().mean() > 0.9, "ties of random models may fall either way"


def fit(folder: Path, tiny_policy: Path, prompts: Path, *, accelerator: str = "", **options: Any) -> Record:
    record = Record()
    trainer = {name: options.pop(name) for name in ("strategy", "precision") if name in options}
    accelerator = accelerator or ("gpu" if GPU else "cpu")
    fitted = make_trainer(folder, accelerator=accelerator, callbacks=[record], max_steps=3, **trainer)
    fitted.fit(make_module(tiny_policy, **options), make_data(prompts))
    return record


def assert_alike(first: Record, second: Record, *, tolerance: float) -> None:
    for one, other in zip(first.steps, second.steps, strict=True):
        assert one["texts"] == other["texts"]
        for name in ("train/loss", "train/grad_norm", "reward/mean"):
            assert one["metrics"][name] == pytest.approx(other["metrics"][name], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-3),
        ({"strategy": FSDP2Strategy()}, 1e-3),
        ({"compiled": True}, 1e-3),
        ({"engine": TransformersEngine("never"), "prefix_sharing": "never"}, 1e-3),
    ],
    ids=["one device", "fsdp2", "compiled", "nothing shared"],
)
def test_steps_are_those_of_a_cpu(
    options: dict[str, Any], tolerance: float, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """In float32: texts, losses, gradient norms."""
    options = dict(options)
    if options.pop("compiled", False):
        options["policy"] = PolicyConfig(str(tiny_policy), compile=True)
    here = fit(tmp_path / "here", tiny_policy, prompts_file, **options)
    there = fit(tmp_path / "there", tiny_policy, prompts_file, accelerator="cpu")
    assert_alike(here, there, tolerance=tolerance)


def test_compiled_layers_are_compiled_a_few_times(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Rows of other lengths at every step do not each get code of their own."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # what another test has compiled
    counters.clear()
    fit(tmp_path, tiny_policy, prompts_file, policy=PolicyConfig(str(tiny_policy), compile=True))
    assert 0 < counters["stats"]["unique_graphs"] <= 12


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_reduced_precision_trains(precision: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    record = fit(tmp_path, tiny_policy, prompts_file, precision=precision)
    assert all(step["metrics"]["train/sampler_logprob_diff"] < 0.1 for step in record.steps[:1])


@pytest.mark.skipif(not GPU, reason="counts a GPU's memory")
def test_the_estimate_of_memory_holds(tmp_path: Path) -> None:
    from gopo_lightning.commands.lightning_cli import run

    config = write_config(tmp_path)
    plan = plan_of([f"--config={config}", "--trainer.accelerator=gpu"]).plan
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(["fit", f"--config={config}", "--trainer.accelerator=gpu"])
    allocated = torch.cuda.max_memory_allocated() - before
    assert 2 / 3 < (footprint.peak(plan) - plan.process) / allocated < 3 / 2


@pytest.mark.skipif(not GPU, reason="CPUs keep what sleeps")
def test_vllm_gives_its_memory_back(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from gopo_lightning.rollout import VLLMEngine

    engine = VLLMEngine(sleep=True, gpu_memory_utilization=0.2, max_model_len=128)
    free: list[int] = []

    class Free(Record):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            free.append(torch.cuda.mem_get_info()[0])
            super().on_train_batch_end(trainer, *args)

    record, total = Free(), torch.cuda.mem_get_info()[1]
    trainer = make_trainer(tmp_path, accelerator="gpu", callbacks=[record], max_steps=3)
    trainer.fit(make_module(tiny_policy, engine=engine), make_data(prompts_file))
    assert min(free) > 0.85 * total
    assert all(step["metrics"]["train/sampler_logprob_diff"] < 0.05 for step in record.steps)
