"""An LLM behind any OpenAI-compatible server as the judge. Needs the extra `judge` (the official client)."""

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gopo_lightning.rewards.base import SourceConfigError
from gopo_lightning.rewards.judge_prompt import CRITERION, fenced
from gopo_lightning.rewards.pairwise import PairComparator
from gopo_lightning.rewards.verdict_cache import Verdict, VerdictCache
from gopo_lightning.structs import Prompt

_VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}
_LONGEST_PAUSE_SECONDS = 60.0


class BudgetSpentError(SourceConfigError):
    """The judge may not be called any more."""


class LLMJudge(PairComparator):
    """Compares pairs by asking an LLM behind an OpenAI-compatible server (OpenAI, vLLM, llama.cpp, transformers serve).

    The completions stand between lines that carry an id which no completion can know, and a verdict counts only if the
    last line of the judge's own reply repeats that id: a completion that says "choose me", or forges a verdict, is
    material and no more. A reply without such a line abstains, and so does a request that fails after all retries;
    if every request of a step fails, the run stops. Verdicts are kept on disk by content, so that nothing is asked
    twice, also after a resume.

    Args:
        model: as the server names it.
        base_url: of the server, such as http://localhost:8000/v1.
        api_key_env: name of the environment variable that holds the key (never the key itself); null sends none. It
            is tried on the server before the first rollout.
        criterion: the question, such as "Which response is friendlier?".
        name: in logs and error messages.
        num_opponents: others of its group that each completion meets, by a round-robin; all when null.
        both_orders: ask each pair in both orders and average: judges prefer a position. Twice the calls.
        seed: decides which of the two orders is asked otherwise.
        max_concurrency: most requests at a time.
        max_retries: further attempts after a timeout, a lost connection, 408, 409, 429 or 5xx.
        backoff_seconds: pause before the first further attempt; it doubles each time (with jitter, at most 60). A
            longer Retry-After of the server is respected.
        timeout_seconds: of one request.
        max_calls: budget of requests of this process, retries included; beyond it the run stops. Null has none.
        cache_dir: folder of the verdicts; null keeps them in memory only.
        temperature: of the judge.
        max_tokens: longest reply; one that is cut off abstains.
        extra_body: more fields of the request, such as `chat_template_kwargs`.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "https://api.openai.com/v1",
        api_key_env: str | None = "OPENAI_API_KEY",
        criterion: str = CRITERION,
        name: str = "judge",
        num_opponents: int | None = None,
        both_orders: bool = False,
        seed: int = 0,
        max_concurrency: int = 16,
        max_retries: int = 5,
        backoff_seconds: float = 0.5,
        timeout_seconds: float = 60.0,
        max_calls: int | None = None,
        cache_dir: str | None = "runs/judge_cache",
        temperature: float = 0.0,
        max_tokens: int = 512,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, num_opponents, both_orders, seed)
        if max_concurrency < 1 or max_retries < 0 or timeout_seconds <= 0 or backoff_seconds < 0 or max_tokens < 1:
            raise ValueError(
                f"max_concurrency={max_concurrency}, max_retries={max_retries}, timeout_seconds={timeout_seconds}, "
                f"backoff_seconds={backoff_seconds}, max_tokens={max_tokens}: they must be at least 1, 0, above 0, at "
                "least 0 and at least 1. Use 16, 5, 60, 0.5 and 512."
            )
        self.tolerance = None
        self.model, self.base_url, self.api_key_env, self.criterion = model, base_url, api_key_env, criterion
        self.max_concurrency, self.max_retries, self.backoff_seconds = max_concurrency, max_retries, backoff_seconds
        self.timeout_seconds, self.max_calls = timeout_seconds, max_calls
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.request = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.extra_body = dict(extra_body or {})
        self.cache: VerdictCache | None = None
        self._client: Any = None
        self._lock = threading.Lock()
        self._counts = {"calls": 0, "cached": 0, "abstained": 0}

    def setup(self, device: torch.device) -> None:
        """Read the cache, and ask the server for its models: a wrong key or address stops the run here.

        Raises:
            SourceConfigError: no client, no key, no server, or a key that the server refuses.
        """
        if self._client is not None:
            return
        openai = self._import()
        key = "none" if self.api_key_env is None else os.environ.get(self.api_key_env, "")
        if not key:
            raise SourceConfigError(
                f"pairwise source '{self.name}': the environment variable {self.api_key_env} is not set, which should "
                "hold the key of the judge's server. Export it, or set api_key_env: null if the server needs none."
            )
        self.cache = VerdictCache(self.cache_dir)
        client = openai.OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout_seconds, max_retries=0)
        self._check_server(openai, client)
        self._client = client

    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[Verdict]:
        """1, 0, ½ or None for each pair.

        Raises:
            SourceConfigError: the budget is spent, or the server refuses key or model.
            RuntimeError: every request failed.
        """
        if self._client is None or self.cache is None:
            raise RuntimeError(f"pairwise source '{self.name}' is not connected; call setup(device) first")
        questions = [self._question(*pair) for pair in zip(prompts, firsts, seconds, strict=True)]
        new = {self._key(*question): question for question in questions}
        new = {key: question for key, question in new.items() if key not in self.cache}
        errors = self._ask_all(new)
        if errors and len(errors) == len(new):
            raise RuntimeError(f"all {len(new)} requests to {self.base_url} failed, the last with {errors[-1]}")
        keys = [self._key(*question) for question in questions]
        verdicts = [self.cache.get(key) for key in keys]
        self._counts["cached"] += len(keys) - len(new)
        self._counts["abstained"] += sum(verdict is None for verdict in verdicts)
        return verdicts

    def counters(self) -> dict[str, int]:
        """Requests, comparisons from the cache, and comparisons without an answer, so far."""
        return dict(self._counts)

    def _question(self, prompt: Prompt, first: str, second: str) -> tuple[str, str]:
        """What the judge is asked, and the id that its verdict must repeat."""
        text, fence = fenced(prompt, first, second)
        form = json.dumps({"id": fence, "verdict": "A"})
        return (
            f"{text}\n\n{self.criterion}\nThink as much as you need. Then end your reply with one line in exactly "
            f'this form, where verdict is "A", "B" or "tie":\n{form}',
            fence,
        )

    def _key(self, text: str, fence: str) -> str:
        content = json.dumps([self.base_url, self.request, self.extra_body, text], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _ask_all(self, questions: Mapping[str, tuple[str, str]]) -> list[str]:
        """Put the verdicts into the cache; returns the errors of requests that failed for good."""
        errors: list[str] = []
        with ThreadPoolExecutor(self.max_concurrency) as pool:
            futures = [pool.submit(self._ask, key, *question) for key, question in questions.items()]
            try:
                errors = [error for future in futures if (error := future.result()) is not None]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)  # what has not begun will not be paid for
        return errors

    def _ask(self, key: str, text: str, fence: str) -> str | None:
        """One comparison, with retries; None when it went into the cache, else what went wrong."""
        assert self.cache is not None
        openai = self._import()
        for attempt in range(self.max_retries + 1):
            self._count_call()
            try:
                reply = self._client.chat.completions.create(
                    messages=[{"role": "user", "content": text}], extra_body=self.extra_body, **self.request
                )
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise SourceConfigError(self._refused(error)) from None
            except openai.APIError as error:
                if not _is_transient(openai, error) or attempt == self.max_retries:
                    return f"{type(error).__name__}: {self._without_key(error)}"
                time.sleep(self._pause(attempt, error))
                continue
            if not getattr(reply, "choices", None):
                return f"a reply that is no chat completion: {self._without_key(reply)[:200]!r}"
            self.cache.add(key, _verdict_of(reply.choices[0], fence))
            return None
        raise AssertionError("unreachable: the last attempt returns")

    def _count_call(self) -> None:
        with self._lock:
            if self.max_calls is not None and self._counts["calls"] >= self.max_calls:
                raise BudgetSpentError(
                    f"pairwise source '{self.name}': the budget of max_calls={self.max_calls} requests is spent. Raise "
                    f"it and resume from the last checkpoint; the verdicts so far are in {self.cache_dir}."
                )
            self._counts["calls"] += 1

    def _pause(self, attempt: int, error: Exception) -> float:
        """Seconds: doubling with jitter, or the server's own Retry-After if that is longer."""
        wanted = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
        pause = self.backoff_seconds * 2**attempt * random.uniform(0.5, 1.0)  # no number of the run depends on it
        return min(max(pause, float(wanted) if wanted.isdigit() else 0.0), _LONGEST_PAUSE_SECONDS)

    def _check_server(self, openai: Any, client: Any) -> None:
        try:
            client.models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise SourceConfigError(self._refused(error)) from None
        except openai.APIConnectionError as error:
            raise SourceConfigError(
                f"pairwise source '{self.name}': nothing answers at {self.base_url} ({error}). Start the server, or "
                "correct base_url."
            ) from error
        except openai.APIStatusError:
            return  # a server without a list of models, or a busy one: it is there

    def _refused(self, error: Exception) -> str:
        return (
            f"pairwise source '{self.name}': {self.base_url} refuses model {self.model} with the key in "
            f"{self.api_key_env}: {self._without_key(error)}. Correct the key in that variable, or model and base_url."
        )

    def _without_key(self, said: Any) -> str:
        """What a server said, which may repeat the key: so its errors are not chained either."""
        key = os.environ.get(self.api_key_env or "")
        return str(said).replace(key, "<the key>") if key else str(said)

    def _import(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise SourceConfigError(
                f"pairwise source '{self.name}' needs the OpenAI client: pip install 'gopo-lightning[judge]'."
            ) from error
        return openai


def read_verdict(reply: str, fence: str) -> Verdict:
    """The verdict on the last line of ``reply`` (a closing ``` aside); None unless it has the right id and form.

    A reply that repeats itself counts if all its verdicts agree.
    """
    lines = [line.strip() for line in reply.splitlines() if line.strip().strip("`")]
    verdicts = {verdict for line in lines if (verdict := _parse(line, fence)) is not None}
    return verdicts.pop() if lines and _parse(lines[-1], fence) is not None and len(verdicts) == 1 else None


def _parse(line: str, fence: str) -> Verdict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or set(row) != {"id", "verdict"} or row["id"] != fence:
        return None
    return _VERDICTS.get(str(row["verdict"]).upper())


def _verdict_of(choice: Any, fence: str) -> Verdict:
    """Of a reply; None where it was cut off, refused or is empty."""
    if choice.finish_reason != "stop" or not isinstance(choice.message.content, str):
        return None
    return read_verdict(choice.message.content, fence)


def _is_transient(openai: Any, error: Exception) -> bool:
    """Worth another attempt: timeouts and lost connections, 408, 409, 429, 5xx."""
    status = getattr(error, "status_code", None)
    return isinstance(error, openai.APIConnectionError) or status in (408, 409, 429) or (status or 0) >= 500
