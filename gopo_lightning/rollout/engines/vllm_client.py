"""vLLM servers as this package speaks to them: how they were started, and what they are told. See `vllm_sync`."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, NamedTuple, TypeVar, get_args
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from gopo_lightning.rollout.engines.vllm_start import LogprobsMode

T = TypeVar("T")
_HEALTH_SECONDS, _INFO_SECONDS = 10.0, 60.0
"""Until an answer: of a route that does nothing, and of one that looks at the machine."""
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

    def get(self, path: str, timeout: float = _HEALTH_SECONDS) -> Any:
        """The JSON at ``path``; OSError or ValueError where there is none."""
        return json.loads(self._answer(Request(f"{self.url}/{path}", headers=self.headers), timeout))

    def settings(self) -> "Settings":
        """How it was started; OSError or ValueError where it does not say."""
        config = self.get("server_info?config_format=json", _INFO_SECONDS)["vllm_config"]
        model, transfer = config["model_config"], config.get("weight_transfer_config") or {}
        return Settings(model["logprobs_mode"], model["max_model_len"], transfer.get("backend"))

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
        except HTTPException as error:  # it broke off
            raise OSError(f"{request.full_url}: {type(error).__name__}: {error}") from None


class Settings(NamedTuple):
    """How a server was started, or all of them."""

    logprobs_mode: LogprobsMode
    max_model_len: int
    """Tokens of a prompt with its completion; beyond them a server cuts it off."""
    backend: str | None
    """Of the transfer of weights."""


def answering(servers: Sequence[Server], ask: Callable[[Server], T]) -> tuple[dict[Server, T], dict[str, str]]:
    """What the servers answer, all asked at once; and of the others, by address, why they do not."""

    def asked(server: Server) -> tuple[T | None, str]:
        try:
            return ask(server), ""
        except (OSError, ValueError, LookupError, TypeError) as error:
            return None, f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(len(servers)) as pool:
        found = dict(zip(servers, pool.map(asked, servers), strict=True))
    answers = {server: answer for server, (answer, why) in found.items() if answer is not None}
    return answers, {server.url: why for server, (_, why) in found.items() if why}


def alike(settings: Mapping[Server, Settings], backend: str) -> Settings:
    """What holds for all these servers.

    Raises:
        ValueError: they were started in different ways, or not for the transfer by ``backend``.
    """
    modes = {each.logprobs_mode for each in settings.values()}
    if len(modes) > 1 or not modes <= {*get_args(LogprobsMode)}:
        raise ValueError(
            f"the vLLM servers report {sorted(modes)}; start all with the same --logprobs-mode, raw_logprobs or "
            "processed_logprobs"
        )
    for server, each in settings.items():
        if each.backend != backend:
            raise ValueError(
                f"{server.url} takes weights by {each.backend}, and they are sent by {backend}. Start it with "
                f'--weight-transfer-config \'{{"backend": "{backend}"}}\'.'
            )
    return Settings(modes.pop(), min(each.max_model_len for each in settings.values()), backend)
