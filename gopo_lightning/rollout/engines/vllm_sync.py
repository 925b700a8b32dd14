"""The policy's weights on vLLM servers: who is there, what they have, and how it gets there.

vLLM's own transfer carries the weights (`vllm.distributed.weight_transfer`): one broadcast from rank 0 to the workers
of all servers. Its routes are those of a server's development mode.
"""

import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from gopo_lightning.distributed.collectives import all_or_none, gather_objects, rank
from gopo_lightning.distributed.whole_weights import merged_weights
from gopo_lightning.objectives.named import load_callable
from gopo_lightning.rollout.engines.vllm_client import HOW_TO_START, Server, Settings, alike, answering


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
        self._meta = [_Weight(name, dtype, shape) for name, _, shape in self._meta]
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
            # A copy, for vLLM packs many before it sends them, and on streams of its own, which wait for nobody.
            weight = value.to(self.dtype, copy=True)
            if weight.is_cuda:
                torch.cuda.current_stream().synchronize()
            yield name, weight


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
        """Leave the group, where there is one, also one whose trainer is gone in the middle of an update."""

        def leave(server: Server) -> None:
            with suppress(OSError):
                server.post("finish_weight_update", {"weight_version": "incomplete"})
            with suppress(OSError):
                server.post("shutdown_weight_transfer_engine")

        self._all(leave)

    def _all(self, call: Callable[[Server], None]) -> None:
        with ThreadPoolExecutor(len(self.sizes)) as pool:
            list(pool.map(call, self.sizes))


class Pushed(NamedTuple):
    """What a push has led to."""

    servers: list[Server]
    """Those that have the weights."""
    version: str
    settings: Settings


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
        self._control, self._settings = _Control({}), Settings("raw_logprobs", 0, None)

    def settings(self, servers: Sequence[Server] | None = None) -> Settings:
        """How the servers that are there were started, of ``servers``, or of all.

        Raises:
            ValueError: none is there, or they were started in different ways.
        """
        found, silent = answering(servers or self.servers, Server.settings)
        if not found:
            raise ValueError(
                f"none of the vLLM servers answers /server_info: {silent}. Start one with {HOW_TO_START}, or correct "
                "urls."
            )
        return alike(found, load_callable(self.init_info).backend)  # type: ignore[attr-defined]

    def push(self, model: nn.Module, dtype: torch.dtype) -> Pushed:
        """Give the servers the weights of ``model``. A collective.

        Raises:
            ValueError: no server answers, or they were started in different ways.
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
        pushed: Pushed = gather_objects(Pushed(list(self._control.sizes), self._control.version, self._settings))[0]
        return pushed

    def _join(self) -> None:
        """One group with the workers of all servers that are there, the old one if nothing has changed."""
        found, silent = answering(self.servers, lambda server: server.get("weight_info"))
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
        self._settings = self.settings(list(found))
        sizes = {server: int(server.get("get_world_size")["world_size"]) for server in found}
        self._control = _Control(sizes)
        self._control.shutdown_weight_transfer_engine()
        self._sender = self._connected(sizes)

    def _connected(self, sizes: Mapping[Server, int]) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        urls = sorted((server.url for server in sizes), key=_is_here)  # the way to another machine leads to all
        address = self.master_address or _own_address(urls[0])
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        info = load_callable(self.init_info)(
            master_address=address, master_port=port, world_size=sum(sizes.values()) + 1, rank=0
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=self._control, source=self.weights)

    def _send(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the last update of the weights
        self._pushed += 1
        self._control.version = f"{self._run}-{self._pushed}"
        try:
            self._sender.send_weights()
        except BaseException:
            self._sender = None  # who has what is not known: begin anew
            raise


def _is_here(url: str) -> bool:
    """Whether it is this machine's own."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _own_address(url: str) -> str:
    """Of this machine, on the way to ``url``; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((urlsplit(url).hostname or "localhost", 9))
        return str(way.getsockname()[0])
