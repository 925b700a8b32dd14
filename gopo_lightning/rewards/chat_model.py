"""A judge behind an OpenAI-compatible server: what to ask whom, and what its replies say, each asked for once."""

import asyncio
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from gopo_lightning.rewards.base import SourceConfigError
from gopo_lightning.rewards.judge_prompt import Readable, read_verdict
from gopo_lightning.rewards.judge_server import ChatServer, Reply, RequestFailedError
from gopo_lightning.rewards.verdict_cache import Verdict, VerdictCache

_SHOWN_CHARACTERS = 400


Outcome: TypeAlias = Reply | RequestFailedError | None
"""Of a question: none where its answer is in the cache, else the reply that cannot be read, or why there is none."""


class BudgetSpentError(SourceConfigError):
    """The judge may not be called any more."""


class AnswerForm(Readable, Protocol):
    """How replies end."""

    @property
    def example(self) -> str:
        """Of the answers in the last line, such as `"verdict": "A"`."""
        ...


@dataclass(frozen=True)
class ChatModel:
    """Which model to ask, on which OpenAI-compatible server (OpenAI, vLLM, llama.cpp, transformers serve), and how."""

    model: str
    """As the server names it."""
    base_url: str = "https://api.openai.com/v1"
    """Of the server, such as http://localhost:8000/v1."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key (never the key itself); null sends none."""
    max_concurrency: int = 16
    """Most requests at a time."""
    max_retries: int = 5
    """Further attempts after a timeout, a lost connection, 408, 409, 429, 5xx, or a reply of another form."""
    backoff_seconds: float = 0.5
    """Pause before the first further attempt; it doubles each time, with jitter, up to 60 s."""
    timeout_seconds: float = 60.0
    """Of one request, from its first byte to the last of its reply."""
    max_calls: int | None = None
    """Budget of requests of this process, retries included; beyond it the run stops. Null has none."""
    cache_dir: str | None = "runs/judge_cache"
    """Folder of the answers; null keeps them in memory only."""
    temperature: float | None = 0.0
    """Of the judge; null leaves it to the server, as some models want."""
    max_tokens: int | None = 512
    """Longest reply; one that is cut off abstains. Null leaves it to the server."""
    extra_body: dict[str, Any] | None = None
    """More fields of the request, such as `chat_template_kwargs`; `max_completion_tokens` takes the place of
    max_tokens."""
    max_unread: int | None = 8
    """So many replies in a row that cannot be read, and none at all in a step, stop the run; null goes on."""

    def __post_init__(self) -> None:
        longest = 1 if self.max_tokens is None else self.max_tokens
        numbers = self.max_concurrency, self.max_retries, self.timeout_seconds, self.backoff_seconds, longest
        if numbers[0] < 1 or numbers[1] < 0 or numbers[2] <= 0 or numbers[3] < 0 or numbers[4] < 1:
            raise ValueError(
                f"max_concurrency={numbers[0]}, max_retries={numbers[1]}, timeout_seconds={numbers[2]}, "
                f"backoff_seconds={numbers[3]}, max_tokens={numbers[4]}: they must be at least 1, 0, above 0, at "
                "least 0 and at least 1. Use 16, 5, 60, 0.5 and 512."
            )
        if self.max_unread is not None and self.max_unread < 1:
            raise ValueError(
                f"max_unread={self.max_unread} must be at least 1; use null to go on whatever the judge says"
            )

    @classmethod
    def of(cls, given: "ChatModel | Mapping[str, Any]") -> "ChatModel":
        """Itself, or made of a dict of its fields, as in Python."""
        return given if isinstance(given, ChatModel) else cls(**given)

    def server(self, source: str) -> ChatServer:
        """``source`` begins its error messages."""
        tries = self.max_retries, self.backoff_seconds, self.timeout_seconds
        return ChatServer(source, self.base_url, self.model, self.api_key_env, *tries)

    @property
    def request(self) -> dict[str, Any]:
        """What every request has beside its messages."""
        replaced = "max_completion_tokens" in (self.extra_body or {})
        limits = {"temperature": self.temperature, "max_tokens": None if replaced else self.max_tokens}
        return {"model": self.model} | {name: limit for name, limit in limits.items() if limit is not None}

    def request_of(self, text: str) -> dict[str, Any]:
        """A whole request: one message of the user's."""
        return {**self.request, "messages": [{"role": "user", "content": text}], "extra_body": self.extra_body or {}}


class Asker:
    """Asks a model, and keeps what its replies say on disk, so that nothing is asked for twice, also after a resume.

    Args:
        source: begins every error message: `pairwise source 'judge'`.
        name: of the source, in the logs.
        model: to be asked.
    """

    def __init__(self, source: str, name: str, model: ChatModel) -> None:
        self.source, self.name, self.model, self.server = source, name, model, model.server(source)
        self.counts = {"calls": 0, "cached": 0, "abstained": 0}
        self._cache: VerdictCache | None = None
        self._unread, self._warned = 0, False
        self._early: dict[str, Outcome] = {}

    def connect(self) -> None:
        """Read the cache, and ask the server for its models: a wrong key or address stops the run here.

        Raises:
            SourceConfigError: no client, no key, no server, or a key that the server refuses.
        """
        if self._cache is None:
            self.server.check()
            self._cache = VerdictCache(None if self.model.cache_dir is None else Path(self.model.cache_dir))

    def answers(self, questions: Sequence[tuple[str, str]], form: AnswerForm, *more: str) -> list[Verdict]:
        """What ``form`` reads in the replies, or None.

        Args:
            questions: texts, each with the id that its answer must repeat.
            form: of the replies.
            more: what a reading depends on beside the question.

        Raises:
            SourceConfigError: the budget is spent, the server refuses key or model, or no reply can be read.
            RuntimeError: every request failed.
        """
        if self._cache is None:
            raise RuntimeError(f"{self.source} is not connected; call setup(device) first")
        keys = [self.key(text, *more) for text, _ in questions]
        new = self._new(dict(zip(keys, questions, strict=True)))
        outcomes = {key: self._early.pop(key) for key in dict.fromkeys(keys) if key in self._early}
        if new:
            outcomes |= self.server.run(lambda client: self._ask_all(client, new, form))
        answers = [self._cache.get(key) for key in keys]
        self.counts["cached"] += len(questions) - len(outcomes)
        self.counts["abstained"] += sum(answer is None for answer in answers)
        errors = [outcome for outcome in outcomes.values() if isinstance(outcome, RequestFailedError)]
        if errors and len(errors) == len(outcomes):
            raise RuntimeError(
                f"all {len(errors)} requests to {self.server.base_url} failed, the last with {errors[-1]}"
            )
        unread = [outcome for outcome in outcomes.values() if isinstance(outcome, Reply)]
        self._unread = self._unread + len(unread) if all(answer is None for answer in answers) else 0
        if unread:
            self._complain(unread[-1], form)
        return answers

    async def ask(self, questions: Sequence[tuple[str, str]], form: AnswerForm, *more: str) -> None:
        """Put questions of the next call of ``answers`` already now, one call of this at a time."""
        new = self._new({self.key(text, *more): (text, fence) for text, fence in questions})
        if new:
            self._early |= await self.server.with_client(lambda client: self._ask_all(client, new, form))

    def _new(self, questions: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
        """Those that have not been asked yet."""
        assert self._cache is not None
        return {k: question for k, question in questions.items() if k not in self._early and k not in self._cache}

    def key(self, text: str, *more: str) -> str:
        """Of a question in the cache: a hash of all that its answer depends on."""
        content = [self.server.base_url, self.model.request, self.model.extra_body or {}, text, *more]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    async def _ask_all(
        self, client: Any, questions: Mapping[str, tuple[str, str]], form: AnswerForm
    ) -> dict[str, Outcome]:
        """Put the answers into the cache; by key what came of each question."""
        stopped, places = False, asyncio.Semaphore(self.model.max_concurrency)

        async def ask(key: str, text: str, fence: str) -> Reply | None:
            nonlocal stopped
            async with places:
                if stopped:  # what has not begun will not be paid for
                    return None
                try:
                    return await self._ask(client, key, text, fence, form)
                except SourceConfigError:
                    stopped = True
                    raise

        calls = [ask(key, *question) for key, question in questions.items()]
        outcomes = dict(zip(questions, await asyncio.gather(*calls, return_exceptions=True), strict=True))
        for outcome in outcomes.values():
            if isinstance(outcome, BaseException) and not isinstance(outcome, RequestFailedError):
                raise outcome
        return outcomes  # type: ignore[return-value]

    async def _ask(self, client: Any, key: str, text: str, fence: str, form: AnswerForm) -> Reply | None:
        """One question; None when its answer is in the cache, else the reply that has none."""
        assert self._cache is not None
        reply = await self.server.ask(client, self.model.request_of(text), self.count_call)
        answer = read_verdict(reply.text or "", fence, form) if reply.is_whole else None
        if answer is None:
            return reply
        self._cache.add(key, answer)
        return None

    def count_call(self) -> None:
        """Before every request; BudgetSpentError where there may be no more."""
        if self.model.max_calls is not None and self.counts["calls"] >= self.model.max_calls:
            raise BudgetSpentError(
                f"{self.source}: the budget of max_calls={self.model.max_calls} requests is spent. Raise "
                f"it and resume from the last checkpoint; the verdicts so far are in {self.model.cache_dir}."
            )
        self.counts["calls"] += 1

    def _complain(self, reply: Reply, form: AnswerForm) -> None:
        """Warn once of replies without a verdict; too many in a row stop the run (SourceConfigError)."""
        text = self.server.without_key(reply.text or "")
        shown = repr(text if len(text) <= _SHOWN_CHARACTERS else "…" + text[-_SHOWN_CHARACTERS:])
        example = f"one ends (finish_reason {reply.finish_reason}) with {shown}"
        should = f"""should end with a line such as {{"id": "…", {form.example}}} (docs/rewards.md, Replies)"""
        if self.model.max_unread is not None and self._unread >= self.model.max_unread:
            raise SourceConfigError(
                f"{self.source}: the last {self._unread} replies of {self.model.model} have no "
                f"verdict; {example}. A reply {should}. Use a model that keeps to it, or raise max_tokens if replies "
                "are cut off; max_unread: null goes on, and such comparisons abstain."
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.source}: replies without a verdict abstain, and {example}. A reply {should}; "
                f"reward/{self.name}/abstained counts the others.",
                stacklevel=2,
            )
