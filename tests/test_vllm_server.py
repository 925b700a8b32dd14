"""vLLM servers elsewhere: greedy text after each push, versions, a server that dies. Needs vLLM (`make test-vllm`)."""

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig, get_peft_model

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.distributed.collectives import PeerError
from gopo_lightning.distributed.gathering import gathered
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.model import PolicyConfig, load_policy
from gopo_lightning.rollout import SamplingConfig, TransformersEngine, VLLMServerEngine
from gopo_lightning.rollout.engines.vllm_client import Server
from gopo_lightning.rollout.engines.vllm_requests import ServerRollout
from tests.architectures import prompt_batch
from tests.ports import free_port
from tests.ranks import Case, launch, sharded_policy
from tests.runs import make_data, make_module, make_trainer
from tests.test_ahead import OfOldWeights
from tests.test_module import fit
from tests.test_vllm_engine import assert_same, generate, pytestmark, saved  # noqa: F401 - the mark is read

pytest.importorskip("vllm")

TRANSFER = "tests.vllm_gloo.GlooTrainerInitInfo"
START_SECONDS = 300


class Serving:
    """`vllm serve` in a process of its own."""

    def __init__(self, policy: Path, log: Path) -> None:
        self.policy, self.log, self.port = policy, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        own = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path.cwd()),
        }
        options = {
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": "float32",
            "--max-model-len": 128,
            "--block-size": 32,
            "--weight-transfer-config": json.dumps({"backend": "gloo"}),
            "--worker-extension-cls": "tests.vllm_gloo.Extension",
        }
        flat = [str(word) for item in options.items() for word in item]
        command = [sys.executable, "-m", "tests.vllm_serve", str(self.policy), *flat]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--enforce-eager", "--enable-scale-out"],
                env=os.environ | own,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> "Serving":
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except OSError:
                time.sleep(0.5)
            else:
                return self
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def hold(self) -> None:
        """It answers nothing more, and keeps what it was asked."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def servers(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Serving]]:
    folder = tmp_path_factory.mktemp("logs")
    both = [Serving(policy, folder / f"{n}.log") for n in range(2)]
    try:
        yield [server.wait() for server in both]
    finally:
        for server in both:
            server.kill()


def engine_of(servers: list[Serving], **options: Any) -> VLLMServerEngine:
    return VLLMServerEngine([server.url for server in servers], transfer=TRANSFER, **options)


def answered(server: Serving) -> int:
    """Requests for completions so far."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total")))


def test_greedy_is_that_of_the_other_engine_after_each_push(policy: Path, servers: list[Serving]) -> None:
    model, prompts = load_policy(PolicyConfig(str(policy))).train(), prompt_batch((40, 70, 36, 9))
    engine, told = engine_of(servers), dict[int, Any]()
    engine.on_group = lambda p, group: told.update({p: group})
    variants: list[dict[str, Any]] = [
        {},
        {"eos": tuple(range(60))},
        {"eos": tuple(range(60)), "min_new_tokens": 5},
        {"stop_strings": tuple("aeiou%<>WmMX 1234567\n")},
    ]
    before = [answered(server) for server in servers]
    lengths = set()
    for _ in range(3):
        for variant in variants:
            expected = generate(TransformersEngine(), model, prompts, temperature=0.0, **variant)
            assert_same(generate(engine, model, prompts, temperature=0.0, **variant), expected)
            groups = expected.groups(2)
            assert {p: list(group) for p, group in told.items()} == dict(enumerate(groups))
            lengths.add(tuple(expected.lengths_N.tolist()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2).add_(0.02)
    assert len(lengths) > 4
    shares = [answered(server) - b for server, b in zip(servers, before, strict=True)]
    assert sum(shares) == 3 * 4 * 8 and min(shares) > 0  # a completion is asked for once, and both are asked


def test_an_adapter_is_merged(policy: Path, servers: list[Serving]) -> None:
    torch.manual_seed(1)
    model = get_peft_model(
        load_policy(PolicyConfig(str(policy))), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    prompts = prompt_batch((20, 33))
    expected = generate(TransformersEngine(), model, prompts, temperature=0.0)
    assert_same(generate(engine_of(servers), model, prompts, temperature=0.0), expected)
    with model.disable_adapter():  # the reference
        assert generate(engine_of(servers), model, prompts, temperature=0.0).texts != expected.texts


def test_streams_do_not_depend_on_the_server(policy: Path, servers: list[Serving]) -> None:
    model, prompts = load_policy(PolicyConfig(str(policy))), prompt_batch((20, 33, 5))
    together = generate(engine_of(servers), model, prompts, 3)
    assert len(set(together.texts)) == 9
    for few in (servers[:1], servers[1:]):
        assert generate(engine_of(few), model, prompts, 3).texts == together.texts


def test_weights_that_are_not_the_policys_are_noticed(
    policy: Path, servers: list[Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, engine = load_policy(PolicyConfig(str(policy))), prompt_batch((20, 33)), engine_of(servers)
    generate(engine, model, prompts)
    push = engine.sync.push

    def other(given: Any, dtype: Any) -> Any:
        changed = copy.deepcopy(given)
        with torch.no_grad():
            changed.lm_head.weight.mul_(3)
        return push(changed, dtype)

    monkeypatch.setattr(engine.sync, "push", other)
    with pytest.raises(ValueError, match="vLLM's log-probs differ from those of LlamaForCausalLM"):
        generate(engine, model, prompts)


def test_another_version_is_refused(policy: Path, servers: list[Serving], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else pushes to one of two servers: the other does its work. To both: the run ends."""
    model, prompts, engine = load_policy(PolicyConfig(str(policy))), prompt_batch((20, 33, 5, 8)), engine_of(servers)
    expected = generate(engine, model, prompts)
    push = engine.sync.push

    def overtaken(number: int) -> Any:
        def then(*arguments: Any) -> Any:
            served = push(*arguments)
            for server in servers[:number]:
                Server(server.url).post("update_weight_version", {"new_version": "another"})
            return served

        return then

    monkeypatch.setattr(engine.sync, "push", overtaken(1))
    before = answered(servers[1])
    assert generate(engine, model, prompts).texts == expected.texts
    assert answered(servers[1]) - before == 8
    monkeypatch.setattr(engine.sync, "push", overtaken(2))
    with pytest.raises(RuntimeError, match="no vLLM server is left for the prompt in row .*'another'"):
        generate(engine, model, prompts)
    monkeypatch.setattr(engine.sync, "push", push)
    assert generate(engine, model, prompts).texts == expected.texts  # the next push mends it


@pytest.mark.parametrize("number", [1, 2])
def test_half_completions_are_refused(
    number: int, policy: Path, servers: list[Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that stops, or is told to abort, gives what there is with status 200."""
    model, prompts = load_policy(PolicyConfig(str(policy))), prompt_batch((20, 33, 5, 8))
    expected = generate(engine_of(servers), model, prompts, max_new_tokens=90, eos=())
    sample = ServerRollout.sample

    async def aborted(rollout: ServerRollout, *arguments: Any) -> Any:
        sampling = asyncio.ensure_future(sample(rollout, *arguments))
        await asyncio.sleep(0.02)
        assert not sampling.done()
        while not sampling.done():  # also what goes from one to the other
            for server in servers[:number]:
                await asyncio.to_thread(Server(server.url).post, "abort_requests", {})
        return await sampling

    monkeypatch.setattr(ServerRollout, "sample", aborted)
    if number == 1:
        assert generate(engine_of(servers), model, prompts, max_new_tokens=90, eos=()).texts == expected.texts
    else:
        with pytest.raises(RuntimeError, match="no vLLM server is left .* ended a completion by abort"):
            generate(engine_of(servers), model, prompts, max_new_tokens=90, eos=())


def test_a_trainer_that_was_gone_in_the_middle_of_a_push(policy: Path, servers: list[Serving]) -> None:
    model, prompts = load_policy(PolicyConfig(str(policy))), prompt_batch((20, 33))
    expected = generate(engine_of(servers), model, prompts, temperature=0.0)
    Server(servers[0].url).post("pause?mode=wait")
    Server(servers[0].url).post("start_weight_update")
    assert_same(generate(engine_of(servers), model, prompts, temperature=0.0), expected)


def test_logits_that_are_no_numbers_are_noticed(policy: Path, servers: list[Serving]) -> None:
    model: Any = load_policy(PolicyConfig(str(policy)))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="of the prompt in row 0 cannot be drawn: the policy's logits are NaN"):
        generate(engine_of(servers, check_every_n_rollouts=9), model, prompt_batch((20,)))


def test_weights_are_sent_in_the_precision_around(policy: Path, servers: list[Serving]) -> None:
    model, engine = load_policy(PolicyConfig(str(policy))), engine_of(servers)
    for enabled, expected in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            generate(engine, model, prompt_batch((20, 5)))
        assert {weight.dtype for weight in engine.sync.weights.metadata()} == {expected}


def test_servers_for_another_transfer(servers: list[Serving]) -> None:
    engine = VLLMServerEngine([server.url for server in servers])
    with pytest.raises(ValueError, match="takes weights by gloo, and they are sent by nccl. Start it with"):
        engine.check_sampling(SamplingConfig(), logprobs=False)


def test_a_refused_request_is_told(policy: Path, servers: list[Serving], monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = load_policy(PolicyConfig(str(policy))), engine_of(servers)
    with pytest.raises(ValueError, match="a prompt of 120 tokens with max_new_tokens=12 .* --max-model-len"):
        generate(engine, model, prompt_batch((120,)))
    wrong = {"max_tokens": 4, "top_p": 7.0}
    monkeypatch.setattr("gopo_lightning.rollout.engines.vllm_server.sampling_parameters", lambda *_: wrong)
    with pytest.raises(ValueError, match="the prompt in row 0: .*answers 4.*top_p"):
        generate(engine, model, prompt_batch((20,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "must name one server or more"),
        ({"urls": ["localhost:8000"]}, "must name one server or more"),
        ({"urls": ["http://a", "http://a/"]}, "each once"),
        ({"urls": "http://a", "timeout_seconds": 0}, "timeout_seconds=0 of VLLMServerEngine must be above 0"),
        ({"urls": "http://a", "max_concurrency": 0}, "max_concurrency=0"),
        ({"urls": "http://a", "check_every_n_rollouts": -1}, "check_every_n_rollouts=-1"),
        ({"urls": "http://a", "dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMServerEngine(**options)


def test_nobody_there(policy: Path) -> None:
    engine = VLLMServerEngine(f"http://127.0.0.1:{free_port()}", transfer=TRANSFER)
    with pytest.raises(ValueError, match="none of the vLLM servers answers .*Start one with VLLM_SERVER_DEV_MODE=1"):
        engine.check_sampling(SamplingConfig(), logprobs=True)
    with pytest.raises(ValueError, match="none of the vLLM servers answers: .*Connection refused"):
        generate(engine, load_policy(PolicyConfig(str(policy))), prompt_batch((5,)))


# ------------------------------------------------------------------------------------------------------------ in a run


def greedy_on_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """Of plain and sharded weights; the ranks have unlike prompts."""
    found, prompts = {}, prompt_batch((20, 33, 17)[rank : 2 * rank + 1])
    engine = VLLMServerEngine(os.environ["GOPO_TEST_SERVERS"].split(), transfer=TRANSFER)
    config = PolicyConfig(str(folder))
    found["plain"] = generate(engine, load_policy(config), prompts, temperature=0.0).texts
    model = sharded_policy(config)
    for how in ("full", "layer"):
        with gathered(model, how):  # type: ignore[arg-type]
            found[how] = generate(engine, model, prompts, temperature=0.0).texts
    return found


def too_long_on_ranks(rank: int, folder: Path) -> str:
    """What each rank says where only the second has a prompt that is too long; the forward of all is a collective."""
    engine = VLLMServerEngine(os.environ["GOPO_TEST_SERVERS"].split(), transfer=TRANSFER)
    model = sharded_policy(PolicyConfig(str(folder)))
    with gathered(model, "layer"), pytest.raises((ValueError, PeerError)) as caught:
        generate(engine, model, prompt_batch((120 if rank else 20,)))
    return str(caught.value)


def no_server_on_ranks(rank: int, folder: Path) -> str:
    """What each rank says where the one that sends finds nobody."""
    engine = VLLMServerEngine("http://127.0.0.1:9", transfer=TRANSFER)
    with pytest.raises((ValueError, PeerError)) as caught:
        generate(engine, sharded_policy(PolicyConfig(str(folder))), prompt_batch((20, 33)))
    return str(caught.value)


def test_greedy_on_two_ranks_is_that_of_one(
    policy: Path, servers: list[Serving], prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPO_TEST_SERVERS", " ".join(server.url for server in servers))
    cases = [Case("first", "ddp", max_steps=1), greedy_on_ranks, too_long_on_ranks, no_server_on_ranks]
    launch(cases, policy, prompts_file, tmp_path, 2)
    model = load_policy(PolicyConfig(str(policy)))
    for rank in (0, 1):
        prompts = prompt_batch((20, 33, 17)[rank : 2 * rank + 1])
        expected = generate(TransformersEngine(), model, prompts, temperature=0.0).texts
        found = torch.load(tmp_path / f"greedy_on_ranks.{rank}.pt")
        assert len(found) == 3 and all(texts == expected for texts in found.values())
        assert "a prompt of 120 tokens" in torch.load(tmp_path / f"too_long_on_ranks.{rank}.pt")
        assert "none of the vLLM servers answers" in torch.load(tmp_path / f"no_server_on_ranks.{rank}.pt")


class Trouble(Callback):
    """Kills a server in the middle of the rollout after step 2, and starts it again after step 4."""

    def __init__(self, server: Serving) -> None:
        self.server, self.armed, self.killed, self.curves = server, False, 0, list[dict[str, float]]()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.curves.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        self.armed = trainer.global_step == 2
        if trainer.global_step == 4:
            self.server.start()
            self.server.wait()

    async def sample(self, sample: Any, rollout: ServerRollout, *arguments: Any) -> Any:
        if self.armed:
            self.server.hold()  # else it may be done before it is killed
        sampling = asyncio.ensure_future(sample(rollout, *arguments))
        if self.armed:
            self.armed = False
            await asyncio.sleep(0.3)
            assert not sampling.done() and rollout.asking[self.server.url] and not rollout.failed
            self.server.kill()
        sampled = await sampling
        self.killed += bool(rollout.failed)
        return sampled


def test_a_server_that_is_killed_in_a_rollout_and_comes_back(
    policy: Path, servers: list[Serving], prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its completions come from the other one, and no rollout is short of any."""
    trouble, sample = Trouble(servers[0]), ServerRollout.sample
    monkeypatch.setattr(ServerRollout, "sample", lambda rollout, *rest: trouble.sample(sample, rollout, *rest))
    module = make_module(policy, engine=engine_of(servers), sampling=SamplingConfig(max_new_tokens=60))
    with pytest.warns(UserWarning, match="vLLM servers that answer: 1 of 2"):
        keep = fit(
            module,
            prompts_file,
            tmp_path,
            max_steps=6,
            val_check_interval=100,
            limit_val_batches=0,
            callbacks=[trouble],
        )
    assert trouble.killed == 1
    assert [len(experience.completions) for experience in keep.experiences] == [16] * 6
    assert [curve["rollout/servers"] for curve in trouble.curves] == [2, 2, 2, 1, 2, 2]
    versions = [curve["rollout/weights_version"] for curve in trouble.curves]
    assert versions == sorted(set(versions)) and len(versions) == 6
    assert all(curve["train/sampler_logprob_diff"] < 1e-3 for curve in trouble.curves)


class Steps(Callback):
    """Keeps what was sampled, and says when a step has been trained."""

    def __init__(self) -> None:
        self.trained, self.texts, self.curves = 0, list[tuple[str, ...]](), list[dict[str, float]]()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        self.trained = trainer.global_step
        self.texts.append(batch["experience"].completions.texts)
        self.curves.append({name: float(value) for name, value in trainer.logged_metrics.items()})


class InTimeOrAhead(VLLMServerEngine):
    """Knows whether somebody waits."""

    in_time = False

    def generate(self, *arguments: Any, **options: Any) -> Any:
        self.in_time = True
        try:
            return super().generate(*arguments, **options)
        finally:
            self.in_time = False


def test_a_step_is_trained_while_the_next_is_sampled(
    policy: Path, servers: list[Serving], prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rollout but the first ends only after the step that it was begun in, and is of the weights before that."""
    options = {
        "loss": ClippedSurrogate(sampler_correction_cap=2.0),
        "sampling": SamplingConfig(max_new_tokens=30),
        "optimizer": partial(torch.optim.SGD, lr=0.3),
        "max_grad_norm": 1.0,
    }
    by_hand, ahead, sample = Steps(), Steps(), ServerRollout.sample
    trainer = make_trainer(tmp_path / "by_hand", max_steps=5, val_check_interval=2, callbacks=[by_hand])
    trainer.fit(make_module(policy, engine=OfOldWeights(engine_of(servers)), **options), make_data(prompts_file))

    engine = InTimeOrAhead([server.url for server in servers], transfer=TRANSFER)

    async def held(rollout: ServerRollout, *arguments: Any) -> Any:
        in_time, begun_in, deadline = engine.in_time, ahead.trained, time.monotonic() + 60
        sampled = await sample(rollout, *arguments)
        while not in_time and ahead.trained == begun_in:
            assert time.monotonic() < deadline, "nothing was trained meanwhile"
            await asyncio.sleep(0.01)
        return sampled

    module = make_module(policy, engine=engine, lag=1, **options)
    monkeypatch.setattr(ServerRollout, "sample", held)
    trainer = make_trainer(tmp_path / "ahead", max_steps=5, val_check_interval=2, callbacks=[ahead])
    trainer.fit(module, make_data(prompts_file))
    assert ahead.texts == by_hand.texts
    assert [curve["rollout/ahead"] for curve in ahead.curves] == [0, 1, 1, 1, 1]
    differences = [curve["train/sampler_logprob_diff"] for curve in ahead.curves]
    assert differences[0] < 1e-3 and min(differences[1:]) > 1e-3


def test_the_overlay_and_what_the_servers_must_be_started_with(
    policy: Path, servers: list[Serving], prompts_file: Path, tmp_path: Path
) -> None:
    overlay = yaml.safe_load(Path("configs/engine/vllm_server.yaml").read_text())
    assert overlay["model"]["init_args"].keys() == {"rollout", "objective"}
    command = [
        "--config=configs/quickstart/gopo.yaml",
        "--config=configs/engine/vllm_server.yaml",
        f"--model.init_args.policy.name={policy}",
        f"--model.init_args.rollout.engine.init_args.urls={json.dumps([server.url for server in servers])}",
        f"--model.init_args.rollout.engine.init_args.transfer={TRANSFER}",
        "--model.init_args.rollout.sampling.max_new_tokens=8",
        '--model.init_args.rewards.sources=[{"class_path": "gopo_lightning.rewards.FunctionReward", "init_args": '
        '{"function": "tests.runs.count_vowels"}}]',
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    cli = run(command, instantiate_only=True)
    trainer = make_trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="report raw_logprobs. Start them with --logprobs-mode processed_logprobs"):
        trainer.fit(cli.model, make_data(prompts_file))  # at the quickstart's temperature
    cli = run([*command, "--model.init_args.rollout.sampling.temperature=1.0"], instantiate_only=True)
    trainer = make_trainer(tmp_path, max_steps=2, precision="bf16-mixed")
    trainer.fit(cli.model, make_data(prompts_file))
    assert 0 < trainer.logged_metrics["train/sampler_logprob_diff"] < 0.05
