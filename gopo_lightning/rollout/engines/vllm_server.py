"""The rollout engine for `vllm serve` elsewhere: prompts are spread over the servers, weights are pushed to them."""

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.collectives import all_or_none, rank, world_size
from gopo_lightning.distributed.gathering import compute_device
from gopo_lightning.rewards.waiting import all_of, wait_for
from gopo_lightning.rollout.engines.base import (
    OnGroup,
    RolloutEngine,
    SamplingConfig,
    SamplingDtype,
    check_dtype,
    ended,
    sampling_dtype,
)
from gopo_lightning.rollout.engines.vllm_client import Server
from gopo_lightning.rollout.engines.vllm_results import Sampled, check_logprobs, sampling_parameters, to_completions
from gopo_lightning.rollout.engines.vllm_start import check_installed, check_lengths, check_supported
from gopo_lightning.rollout.engines.vllm_sync import WeightSync
from gopo_lightning.types import Completions, Prompt, PromptBatch

_NCCL = "vllm.distributed.weight_transfer.nccl_engine.NCCLTrainerInitInfo"


class VLLMServerEngine(RolloutEngine):
    """Samples on vLLM servers, which get the policy's weights at each rollout, under any strategy.

    Each server runs the policy's model, with any tensor or data parallelism of its own, and has been started with

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --weight-transfer-config '{"backend": "nccl"}'

    in a private network: its development mode lets anybody replace its weights. The prompts of a step, over all ranks,
    go to the servers in turn, all completions of one to the same server, whose cache computes the prompt once; if that
    server fails, to the next. The text does not depend on the server. Each completion comes with the version of its
    weights, and one of another version is refused.

    Args:
        urls: of the servers, such as http://node7:8000.
        dtype: in which weights are sent. ``auto`` is that of the Trainer's ``precision``, or else of the policy's.
        timeout_seconds: of one request, and of one step of sending weights.
        max_concurrency: most requests of a rank at a time.
        check_every_n_rollouts: how often the policy computes the log-probs of a completion too, which stops the run
            where vLLM's differ: weights may be lost on the way. It costs a forward of one completion.
        master_address: of the machine of rank 0, as the servers reach it; null finds it out.
        api_key_env: name of the environment variable with the servers' key; null sends none.
        transfer: dotted path of the ``…TrainerInitInfo`` of vLLM's transport.

    Raises:
        ValueError: vLLM is not installed here (it sends the weights); or an argument is out of range.
    """

    def __init__(
        self,
        urls: Sequence[str] | str,
        dtype: SamplingDtype = "auto",
        timeout_seconds: float = 600.0,
        max_concurrency: int = 512,
        check_every_n_rollouts: int = 1,
        master_address: str | None = None,
        api_key_env: str | None = None,
        transfer: str = _NCCL,
    ) -> None:
        check_installed("VLLMServerEngine", " here too, which sends the weights")
        check_dtype(dtype)
        addresses = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        if (
            not addresses
            or len(set(addresses)) < len(addresses)
            or not all(url.startswith("http") for url in addresses)
        ):
            raise ValueError(f"urls={urls!r} must name one server or more, each once, such as [http://node7:8000]")
        for name, value in {
            "timeout_seconds": timeout_seconds,
            "max_concurrency": max_concurrency,
            "check_every_n_rollouts": check_every_n_rollouts,
        }.items():
            if not value > 0:
                raise ValueError(f"{name}={value} of VLLMServerEngine must be above 0")
        self.dtype, self.timeout_seconds, self.max_concurrency = dtype, timeout_seconds, max_concurrency
        self.check_every_n_rollouts, self._rollouts = check_every_n_rollouts, 0
        servers = [Server(url, api_key_env, timeout_seconds) for url in addresses]
        self.sync = WeightSync(servers, transfer, master_address)
        self.on_group: OnGroup | None = None
        self._metrics: dict[str, float] = {}

    def check_sampling(self, sampling: SamplingConfig, *, logprobs: bool) -> None:
        """See :class:`ChecksSampling`; asks the servers how they report log-probs.

        Raises:
            ValueError: none of them answers, or they were started in another way than is needed.
        """
        check_supported(sampling, logprobs=logprobs, mode=self.sync.settings().logprobs_mode)

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        *,
        seeds_N: list[int],
        eos_token_ids: Sequence[int],
    ) -> Completions:
        """See :class:`RolloutEngine`.

        Raises:
            ValueError: no server answers, or one refuses a request; or log-probs are not those of ``model``.
            RuntimeError: all servers have failed in the middle of this rollout.
        """
        device, dtype = compute_device(model), sampling_dtype(self.dtype, model)
        with torch.autocast(device.type, enabled=False):
            pushed = self.sync.push(model, dtype)
        self._metrics = {
            "servers": float(len(pushed.servers)),
            "weights_version": float(pushed.version.rsplit("-", 1)[1]),
        }
        mode = pushed.settings.logprobs_mode

        def tell(p: int, group: Sequence[Sampled]) -> None:
            if self.on_group is not None:
                tokens, cut_off = [each.token_ids for each in group], [each.cut_off for each in group]
                self.on_group(p, ended(tokenizer, tokens, cut_off))

        with all_or_none("sampling on the vLLM servers"):  # before the others enter a collective
            check_supported(sampling, logprobs=False, mode=mode)
            limit = pushed.settings.max_model_len  # a server would cut a completion off there
            check_lengths(prompts, sampling, limit, "the vLLM servers", "their --max-model-len")
            rollout = _Rollout(pushed.servers, pushed.version, self.timeout_seconds, self.max_concurrency)
            parameters = [sampling_parameters(sampling, seed, eos_token_ids) for seed in seeds_N]
            sampled = wait_for(lambda: rollout.sample(prompts.prompts, parameters, tell))
            completions = to_completions(sampled, tokenizer, prompts, sampling, eos_token_ids, mode, device)
        if self._rollouts % self.check_every_n_rollouts == 0:
            check_logprobs(model, prompts, completions, sampled, sampling, mode)
        self._rollouts += 1
        return completions

    def metrics(self) -> dict[str, float]:
        """Servers that had the weights of the last rollout, and how often weights have been sent in this process."""
        return self._metrics


_NO_NUMBER = -9999.0
"""What vLLM's routes say for NaN and -inf, which JSON does not have."""
_WATCH_SECONDS = 5.0


class _FailedError(Exception):
    """A server did not give a completion of the right weights; another may."""


class _Rollout:
    """The requests of one rollout of this rank."""

    def __init__(self, servers: Sequence[Server], version: str, timeout_seconds: float, max_concurrency: int) -> None:
        self.servers, self.version, self.timeout_seconds = servers, version, timeout_seconds
        self.places = asyncio.Semaphore(max_concurrency)
        self.failed: dict[str, str] = {}
        self.asking: dict[str, set[asyncio.Task[Sampled]]] = {server.url: set() for server in servers}

    async def sample(
        self,
        prompts: Sequence[Prompt],
        parameters: Sequence[dict[str, Any]],
        tell: Callable[[int, Sequence[Sampled]], None],
    ) -> list[Sampled]:
        """N completions, one for each of ``parameters``; ``tell`` hears of each prompt's."""
        import aiohttp

        G, timeout = len(parameters) // len(prompts), aiohttp.ClientTimeout(total=self.timeout_seconds)
        connector = aiohttp.TCPConnector(limit=0)  # the places are the limit
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

            async def group(p: int) -> list[Sampled]:
                turn = (p * world_size() + rank()) % len(self.servers)
                order = [*self.servers[turn:], *self.servers[:turn]]
                own = parameters[p * G : (p + 1) * G]
                sampled = await all_of([partial(self._one, session, order, prompts[p], each) for each in own], G)
                tell(p, sampled)
                return sampled

            watching = asyncio.create_task(self._watch(session))
            try:
                groups = await all_of([partial(group, p) for p in range(len(prompts))], len(prompts))
            finally:
                watching.cancel()
        return [each for sampled in groups for each in sampled]

    async def _one(
        self, session: Any, servers: Sequence[Server], prompt: Prompt, parameters: dict[str, Any]
    ) -> Sampled:
        """A completion of the first of ``servers`` that gives one."""
        import aiohttp

        async with self.places:
            for server in servers:
                if server.url in self.failed:
                    continue
                task = asyncio.create_task(self._ask(session, server, prompt, parameters))
                self.asking[server.url].add(task)
                try:
                    return await task
                except (aiohttp.ClientError, TimeoutError, _FailedError) as error:
                    self._fail(server, error)
                except asyncio.CancelledError:
                    this = asyncio.current_task()
                    if server.url not in self.failed or (this is not None and this.cancelling()):
                        raise  # the whole rollout is given up
                finally:
                    self.asking[server.url].discard(task)
                    task.cancel()
        raise RuntimeError(
            f"no vLLM server is left for the prompt in row {prompt.index}: {self.failed}. Start them again, and go on "
            "from the last checkpoint."
        )

    def _fail(self, server: Server, why: Exception) -> None:
        """Nothing more is asked of ``server``, and what is open goes to others."""
        self.failed.setdefault(server.url, f"{type(why).__name__}: {why}")
        for task in self.asking[server.url]:
            task.cancel()

    async def _watch(self, session: Any) -> None:
        """Look whether the servers are there: one that stops may keep its connections for minutes."""
        import aiohttp

        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for server in self.servers:
                if server.url not in self.failed:
                    try:
                        async with session.get(f"{server.url}/health", headers=server.headers) as reply:
                            if reply.status != 200:
                                raise _FailedError(f"{server.url}/health answers {reply.status}")
                    except (aiohttp.ClientError, _FailedError) as error:
                        self._fail(server, error)
                    except TimeoutError:
                        pass  # busy: its requests have a limit of their own

    async def _ask(self, session: Any, server: Server, prompt: Prompt, parameters: dict[str, Any]) -> Sampled:
        body = {"token_ids": list(prompt.token_ids), "sampling_params": {**parameters, "repetition_penalty": 1.0}}
        url = f"{server.url}/inference/v1/generate"
        async with session.post(url, json=body, headers=server.headers, allow_redirects=False) as reply:
            if reply.status != 200:
                said = f"{url} answers {reply.status}: {(await reply.text())[:500]}"
                if 300 <= reply.status < 500:
                    raise ValueError(f"the prompt in row {prompt.index}: {said}")
                raise _FailedError(said)
            choice = (await reply.json())["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):  # "abort" comes with what there was until then
            raise _FailedError(f"{server.url} ended a completion by {choice['finish_reason']}")
        versions = {span["version"] for span in choice["weight_versions"] or ()}
        if versions != {self.version}:
            raise _FailedError(f"{server.url} samples with the weights {sorted(versions)}, not {self.version}")
        found = [step["logprob"] for step in choice["logprobs"]["content"]]
        logprobs = [math.nan if logprob <= _NO_NUMBER else logprob for logprob in found]
        return Sampled(choice["token_ids"], logprobs, choice["finish_reason"] == "length")
