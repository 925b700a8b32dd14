"""Chat completions of one OpenAI-compatible server: by a deadline, within a bound, with retries, at one address."""

import asyncio
import json
import math
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from gopo_lightning.rewards.base import SourceConfigError
from gopo_lightning.rewards.waiting import wait_for

LONGEST_PAUSE_SECONDS = 60.0
"""Between two attempts, whatever the server asks for."""
_LARGEST_REPLY_BYTES = 2**23
_JITTER = random.Random()  # no number of the run depends on it, and it draws from no stream of the run
T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """What the model said, and why it ended; no text where it refused."""

    text: str | None
    finish_reason: str | None

    @property
    def is_whole(self) -> bool:
        """Whether there is a text, and nothing cut it off."""
        return self.text is not None and self.finish_reason not in ("length", "content_filter")


def refused_field(said: str) -> str | None:
    """The field of ours that a server will not have, as reasoning models refuse these two.

    >>> refused_field("Unsupported parameter: 'max_tokens' is not supported with this model.")
    'max_tokens'
    """
    refusal = re.search(r"(?i)unsupported|not support|unrecognized|unknown|not allowed|not permitted", said)
    return next((field for field in ("max_tokens", "temperature") if refusal and field in said), None)


class RequestFailedError(Exception):
    """No reply after all attempts."""


class _TryAgainError(Exception):
    """An attempt that failed, and the seconds to wait that the server asks for."""

    def __init__(self, said: str, retry_after: float = 0.0) -> None:
        super().__init__(said)
        self.retry_after = retry_after


@dataclass(frozen=True)
class ChatServer:
    """How to reach it. Redirects are not followed: they would take the texts to an address that nobody has named."""

    source: str
    """Begins every error message: `pairwise source 'judge'`."""
    base_url: str
    model: str
    api_key_env: str | None
    max_retries: int
    backoff_seconds: float
    timeout_seconds: float

    def check(self) -> None:
        """Ask for the list of models.

        Raises:
            SourceConfigError: no client, no key, no server, a key that is refused, or a redirect.
        """
        openai = self._import()
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise SourceConfigError(
                f"{self.source}: the environment variable {self.api_key_env} is not set, which should hold the key of "
                "the judge's server. Export it, or set api_key_env: null if the server needs none."
            )

        async def list_models(client: Any) -> None:
            async with client.models.with_streaming_response.list():
                pass  # that it answers is enough

        try:
            self.run(lambda client: asyncio.wait_for(list_models(client), self.timeout_seconds))
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise SourceConfigError(self._refused(error)) from None
        except (TimeoutError, openai.APIConnectionError) as error:
            raise SourceConfigError(
                f"{self.source}: nothing answers at {self.base_url} ({error or 'no answer in time'}). Start the "
                "server, or correct base_url."
            ) from error
        except openai.APIStatusError as error:  # else it has no list of models, or is busy: it is there
            if 300 <= error.status_code < 400:
                raise SourceConfigError(self._redirected(error)) from None

    def run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """``work`` with a client, as by `waiting.wait_for`."""
        return wait_for(lambda: self.with_client(work))

    async def ask(self, client: Any, request: Mapping[str, Any], count: Callable[[], None]) -> Reply:
        """The reply to ``request``; ``count`` is called before everything that is sent.

        Raises:
            RequestFailedError: all attempts failed, or the first in a way that no other would mend.
            SourceConfigError: the server refuses key or model, or sends the request elsewhere.
        """
        said = ""
        for attempt in range(self.max_retries + 1):
            count()
            try:
                return await self._attempt(client, request)
            except _TryAgainError as error:
                said = str(error)
                pause = max(error.retry_after, self.backoff_seconds * 2**attempt * _JITTER.uniform(0.5, 1.0))
            if attempt < self.max_retries:
                await asyncio.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        raise RequestFailedError(said)

    async def _attempt(self, client: Any, request: Mapping[str, Any]) -> Reply:
        openai = self._import()
        try:
            return await asyncio.wait_for(_send(client, request), self.timeout_seconds)
        except TimeoutError:
            said = f"no whole reply within timeout_seconds={self.timeout_seconds:g}"
            raise _TryAgainError(said) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise SourceConfigError(self._refused(error)) from None
        except openai.APIStatusError as error:
            if 300 <= error.status_code < 400:
                raise SourceConfigError(self._redirected(error)) from None
            said = f"{type(error).__name__}: {self.without_key(error)}"
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise _TryAgainError(said, retry_after(error.response.headers.get("retry-after", ""))) from None
            if error.status_code == 400 and (field := refused_field(said)):
                raise SourceConfigError(
                    f"{self.source}: {self.base_url} refuses the field {field} for {self.model} ({said:.300}). Set "
                    f"{field}: null; a limit of another name goes into extra_body, such as "
                    "{max_completion_tokens: 2000}."
                ) from None
            raise RequestFailedError(said) from None
        except openai.APIError as error:  # the connection was lost
            raise _TryAgainError(f"{type(error).__name__}: {self.without_key(error)}") from None
        except _TryAgainError as error:
            raise _TryAgainError(self.without_key(error)) from None

    def without_key(self, said: Any) -> str:
        """What a server said, which may repeat the key: so its errors are not chained either."""
        key = os.environ.get(self.api_key_env or "")
        return str(said).replace(key, "<the key>") if key else str(said)

    async def with_client(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """``work`` with a client, which is closed at its end."""
        openai = self._import()
        key = "none" if self.api_key_env is None else os.environ.get(self.api_key_env, "")
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False)
        async with openai.AsyncOpenAI(
            base_url=self.base_url, api_key=key, timeout=self.timeout_seconds, max_retries=0, http_client=http
        ) as client:
            return await work(client)

    def _refused(self, error: Exception) -> str:
        return (
            f"{self.source}: {self.base_url} refuses model {self.model} with the key in {self.api_key_env}: "
            f"{self.without_key(error)}. Correct the key in that variable, or model and base_url."
        )

    def _redirected(self, error: Any) -> str:
        to = self.without_key(error.response.headers.get("location", "another address"))
        return (
            f"{self.source}: {self.base_url} redirects to {to!r}, and redirects are not followed, for they could take "
            "prompts and completions to any host. If that address is right, set base_url to it."
        )

    def _import(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise SourceConfigError(
                f"{self.source} needs the OpenAI client: pip install 'gopo-lightning[judge]'."
            ) from error
        return openai


async def _send(client: Any, request: Mapping[str, Any]) -> Reply:
    """One attempt, read no further than to the bound."""
    async with client.chat.completions.with_streaming_response.create(**request) as response:
        body = bytearray()
        try:
            async for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _LARGEST_REPLY_BYTES:
                    break
        except Exception as error:  # noqa: BLE001 - of httpx or httpx2, whichever this version of the client stands on
            raise _TryAgainError(f"the reply broke off: {type(error).__name__}: {error}") from None
    if len(body) > _LARGEST_REPLY_BYTES:
        raise _TryAgainError(f"a reply of more than {_LARGEST_REPLY_BYTES} bytes")
    return read_reply(bytes(body))


def read_reply(body: bytes) -> Reply:
    """The first choice of a chat completion; any other body is worth another attempt (_TryAgainError)."""
    try:
        choice = json.loads(body)["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        said = body[:200].decode("utf-8", "replace")
        raise _TryAgainError(f"a reply that is no chat completion: {said!r}") from None
    return Reply(text if isinstance(text, str) else None, reason)


def retry_after(header: str) -> float:
    """Seconds that a Retry-After asks for, a number or an HTTP date; 0 for anything else.

    >>> retry_after("0.5"), retry_after("soon"), retry_after("Thu, 01 Jan 1970 00:00:00 GMT")
    (0.5, 0.0, 0.0)
    """
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
