"""The requests of a rollout to vLLM servers: each goes to the next server until one answers with the right weights."""

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gopo_lightning.distributed.collectives import rank, world_size
from gopo_lightning.rewards.waiting import all_of
from gopo_lightning.rollout.engines.vllm_client import Server
from gopo_lightning.rollout.engines.vllm_results import Sampled
from gopo_lightning.types import Prompt

_NO_NUMBER = -9999.0
"""What vLLM's routes say for NaN and -inf, which JSON does not have."""
_WATCH_SECONDS = 5.0


class _FailedError(Exception):
    """A server did not give a completion of the right weights; another may."""


class ServerRollout:
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
