"""The policy's weights on vLLM servers: who is there, what they have, and how it gets there.

vLLM's own transfer carries the weights (`vllm.distributed.weight_transfer`): one broadcast from rank 0 to the workers
of all servers. Its routes are those of a server's development mode.
"""

import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from gopo_lightning.distributed.collectives import all_or_none, gather_objects, rank
from gopo_lightning.distributed.whole_weights import merged_weights
from gopo_lightning.objectives.named import load_callable

_HEALTH_SECONDS = 10.0
HOW_TO_START = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --weight-transfer-config \'{"backend": "nccl"}\''
)
"""A server that can be pushed to."""


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """Weights go to no address that nobody has named."""


_OPENER = build_opener(ProxyHandler({}), _NoRedirect)


@dataclass(frozen=True)
class Server:
    """One `vllm serve`, of any number of workers."""

    url: str
    api_key_env: str | None = None
    timeout_seconds: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {} if self.api_key_env is None else {"Authorization": f"Bearer {os.environ.get(self.api_key_env, '')}"}

    def get(self, path: str) -> Any:
        """The JSON at ``path``; OSError or ValueError where there is none."""
        return json.loads(self._answer(Request(f"{self.url}/{path}", headers=self.headers), _HEALTH_SECONDS))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        """Send ``body`` to ``path``; OSError, with the server's words, where it is not taken."""
        data = b"" if body is None else json.dumps(body).encode()
        headers = {**self.headers, "Content-Type": "application/json"}
        self._answer(Request(f"{self.url}/{path}", data, headers), self.timeout_seconds)

    def _answer(self, request: Request, timeout: float) -> bytes:
        try:
            with _OPENER.open(request, timeout=timeout) as reply:
                return bytes(reply.read())
        except HTTPError as error:
            said = error.read()[:500].decode(errors="replace")
            raise OSError(f"{request.full_url} answers {error.code}: {said}") from None


def answering(servers: Sequence[Server], path: str) -> tuple[dict[Server, Any], dict[str, str]]:
    """What the servers answer to ``path``; and of the others, by address, why they do not."""
    answers: dict[Server, Any] = {}
    silent = {}
    for server in servers:
        try:
            answers[server] = server.get(path)
        except (OSError, ValueError) as error:
            silent[server.url] = str(error)
    return answers, silent


class _Weight(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PolicyWeights:
    """The weights of a model as vLLM's trainer side reads them (its ``WeightSource``): merged, whole, one at a time.

    Iterating is a collective where a forward of the model is one: ``finish`` makes up for an iteration that broke off.
    """

    def __init__(self) -> None:
        self._meta: list[_Weight] | None = None
        self._running: Iterator[tuple[str, Tensor]] = iter(())

    def set(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Give those of ``model`` from now on. A collective, likewise, the first time."""
        self.model, self.dtype = model, dtype
        if self._meta is None:
            self._meta = [_Weight(name, dtype, tuple(value.shape)) for name, value in merged_weights(model)]
        self._running = self._all()

    def metadata(self) -> list[_Weight]:
        """Names, types and shapes, in the order of the iteration."""
        assert self._meta is not None
        return self._meta

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._running

    def finish(self) -> None:
        """Go through what has not been asked for."""
        for _ in self._running:
            pass

    def _all(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in merged_weights(self.model):
            yield name, value.to(self.dtype)


class _Control:
    """All servers as the one that vLLM's trainer side drives (its ``VLLMWeightSyncClient``)."""

    def __init__(self, sizes: Mapping[Server, int]) -> None:
        self.sizes, self.version = sizes, ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The workers of a server come after those of the servers before it."""
        offsets, offset = {}, init_info["rank_offset"]
        for server, size in self.sizes.items():
            offsets[server], offset = offset, offset + size
        self._all(
            lambda s: s.post("init_weight_transfer_engine", {"init_info": {**init_info, "rank_offset": offsets[s]}})
        )

    def start_weight_update(self) -> None:
        """Nothing is sampled meanwhile."""
        self._all(lambda server: server.post("pause?mode=wait"))
        self._all(lambda server: server.post("start_weight_update"))

    def update_weights(self, update_info: Any) -> None:
        """Returns when all have all weights."""
        self._all(lambda server: server.post("update_weights", {"update_info": update_info}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """What was computed with other weights is forgotten."""
        self._all(lambda server: server.post("finish_weight_update", {"weight_version": self.version}))
        self._all(lambda server: server.post("reset_prefix_cache"))
        self._all(lambda server: server.post("resume"))

    def shutdown_weight_transfer_engine(self) -> None:
        """Leave the group, where there is one."""
        with suppress(OSError):
            self._all(lambda server: server.post("shutdown_weight_transfer_engine"))

    def _all(self, call: Callable[[Server], None]) -> None:
        with ThreadPoolExecutor(len(self.sizes)) as pool:
            list(pool.map(call, self.sizes))


class WeightSync:
    """Servers that are given the policy's weights, all at once, each time under a new version.

    A server that does not answer is left out; one that is there again, or has been restarted, is taken in at the next
    time.

    Args:
        servers: all that may be there.
        init_info: dotted path of vLLM's ``…TrainerInitInfo`` of the transport.
        master_address: of this machine, as the servers reach it; None finds it out.
    """

    def __init__(self, servers: Sequence[Server], init_info: str, master_address: str | None) -> None:
        self.servers, self.init_info, self.master_address = list(servers), init_info, master_address
        self.weights = PolicyWeights()
        self._run, self._pushed, self._silent = uuid.uuid4().hex[:8], 0, dict[str, str]()
        self._sender: Any = None
        self._control = _Control({})

    def push(self, model: nn.Module, dtype: torch.dtype) -> tuple[list[Server], str]:
        """Give the servers the weights of ``model``; returns those that have them, and their version. A collective.

        Raises:
            ValueError: no server answers.
            PeerError: rank 0 could not send them.
        """
        self.weights.set(model, dtype)
        with all_or_none("reaching the vLLM servers"):
            if rank() == 0:
                self._join()
        with all_or_none("sending the weights to the vLLM servers"):
            try:
                if rank() == 0:
                    self._send()
            finally:
                self.weights.finish()
        served: tuple[list[Server], str] = gather_objects((list(self._control.sizes), self._control.version))[0]
        return served

    def _join(self) -> None:
        """One group with the workers of all servers that are there, the old one if nothing has changed."""
        found, silent = answering(self.servers, "weight_info")
        if silent.keys() != self._silent.keys() and found:
            lost = "; ".join(f"{url}: {why}" for url, why in silent.items())
            rank_zero_warn(
                f"vLLM servers that answer: {len(found)} of {len(self.servers)}" + (f". {lost}" if lost else "")
            )
        self._silent = silent
        if not found:
            raise ValueError(
                f"none of the vLLM servers answers: {silent}. Start one with {HOW_TO_START}, or correct urls."
            )
        versions = {answer.get("weight_version") for answer in found.values()}
        if (
            self._sender is not None
            and list(found) == list(self._control.sizes)
            and versions == {self._control.version}
        ):
            return
        if self._sender is not None:
            self._sender.shutdown()
        sizes = {server: int(server.get("get_world_size")["world_size"]) for server in found}
        self._control = _Control(sizes)
        self._control.shutdown_weight_transfer_engine()
        self._sender = self._connected(sizes)

    def _connected(self, sizes: Mapping[Server, int]) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        address = self.master_address or _own_address(next(iter(sizes)).url)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        info = load_callable(self.init_info)(
            master_address=address, master_port=port, world_size=sum(sizes.values()) + 1, rank=0
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=self._control, source=self.weights)

    def _send(self) -> None:
        self._pushed += 1
        self._control.version = f"{self._run}-{self._pushed}"
        try:
            self._sender.send_weights()
        except BaseException:
            self._sender = None  # who has what is not known: begin anew
            raise


def _own_address(url: str) -> str:
    """Of this machine, on the way to ``url``; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((urlsplit(url).hostname or "localhost", 9))
        return str(way.getsockname()[0])
