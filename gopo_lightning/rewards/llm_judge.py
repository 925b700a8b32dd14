"""An LLM behind any OpenAI-compatible server as the judge. Needs the extra `judge` (the official client)."""

import asyncio
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gopo_lightning.rewards.base import SourceConfigError
from gopo_lightning.rewards.judge_forms import Template, form_of
from gopo_lightning.rewards.judge_prompt import CRITERION, fenced, read_verdict
from gopo_lightning.rewards.judge_server import ChatServer, Reply, RequestFailedError
from gopo_lightning.rewards.pairwise import PairComparator
from gopo_lightning.rewards.verdict_cache import Verdict, VerdictCache
from gopo_lightning.types import Prompt

_SHOWN_CHARACTERS = 400


class BudgetSpentError(SourceConfigError):
    """The judge may not be called any more."""


class LLMJudge(PairComparator):
    """Compares pairs by asking an LLM behind an OpenAI-compatible server (OpenAI, vLLM, llama.cpp, transformers serve).

    The completions stand between lines that carry an id which no completion can know, and a verdict counts only if
    the judge's own reply ends with it and that id: a completion that says "choose me", or forges a verdict, is
    material and no more. A reply without one abstains (the first such reply is shown in a warning), and so does a
    request that fails after all retries; if every request of a step fails, or no reply has a verdict, the run stops.
    Verdicts are kept on disk by content, so that none is asked for twice, also after a resume.

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
        max_retries: further attempts after a timeout, a lost connection, 408, 409, 429, 5xx, or a reply that is no
            chat completion. Redirects are not followed.
        backoff_seconds: pause before the first further attempt; it doubles each time, with jitter. A longer
            Retry-After of the server is respected; no pause is longer than 60 s.
        timeout_seconds: of one request, from its first byte to the last of its reply.
        max_calls: budget of requests of this process, retries included; beyond it the run stops. Null has none.
        cache_dir: folder of the verdicts; null keeps them in memory only.
        temperature: of the judge.
        max_tokens: longest reply; one that is cut off abstains.
        extra_body: more fields of the request, such as `chat_template_kwargs`.
        max_unread: so many replies in a row without a verdict, and none at all in a step, stop the run; null goes on.
        template: `single` asks the criterion alone. `survey` asks the GOPO paper's five criteria (helpfulness,
            correctness, coherence, complexity, verbosity), then the criterion; the side that wins more of the five
            wins. `survey_overall` asks the same and takes the last answer. Replies are long: max_tokens from 1500 on.
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
        max_unread: int | None = 8,
        template: Template = "single",
    ) -> None:
        super().__init__(name, num_opponents, both_orders, seed)
        if max_concurrency < 1 or max_retries < 0 or timeout_seconds <= 0 or backoff_seconds < 0 or max_tokens < 1:
            raise ValueError(
                f"max_concurrency={max_concurrency}, max_retries={max_retries}, timeout_seconds={timeout_seconds}, "
                f"backoff_seconds={backoff_seconds}, max_tokens={max_tokens}: they must be at least 1, 0, above 0, at "
                "least 0 and at least 1. Use 16, 5, 60, 0.5 and 512."
            )
        if max_unread is not None and max_unread < 1:
            raise ValueError(f"max_unread={max_unread} must be at least 1; use null to go on whatever the judge says")
        self.template, self.form = template, form_of(template)
        self.tolerance = None
        self.criterion, self.max_concurrency, self.max_calls = criterion, max_concurrency, max_calls
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.request = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.extra_body, self.max_unread = dict(extra_body or {}), max_unread
        self.cache: VerdictCache | None = None
        self.server = ChatServer(
            f"pairwise source '{name}'", base_url, model, api_key_env, max_retries, backoff_seconds, timeout_seconds
        )
        self._counts = {"calls": 0, "cached": 0, "abstained": 0}
        self._unread = 0
        self._warned = False

    def setup(self, device: torch.device) -> None:
        """Read the cache, and ask the server for its models: a wrong key or address stops the run here.

        Raises:
            SourceConfigError: no client, no key, no server, or a key that the server refuses.
        """
        if self.cache is None:
            self.server.check()
            self.cache = VerdictCache(self.cache_dir)

    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[Verdict]:
        """1, 0, ½ or None for each pair.

        Raises:
            SourceConfigError: the budget is spent, the server refuses key or model, or no reply has a verdict.
            RuntimeError: every request failed.
        """
        if self.cache is None:
            raise RuntimeError(f"pairwise source '{self.name}' is not connected; call setup(device) first")
        questions = [self._question(*pair) for pair in zip(prompts, firsts, seconds, strict=True)]
        keys = [self._key(*question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.cache}
        failed = self._ask_all(new)
        verdicts = [self.cache.get(key) for key in keys]
        self._counts["cached"] += len(keys) - len(new)
        self._counts["abstained"] += sum(verdict is None for verdict in verdicts)
        errors = [reply for reply in failed if isinstance(reply, RequestFailedError)]
        if errors and len(errors) == len(new):
            raise RuntimeError(f"all {len(new)} requests to {self.server.base_url} failed, the last with {errors[-1]}")
        unread = [reply for reply in failed if isinstance(reply, Reply)]
        self._unread = self._unread + len(unread) if all(verdict is None for verdict in verdicts) else 0
        if unread:
            self._complain(unread[-1])
        return verdicts

    def counters(self) -> dict[str, int]:
        """Requests, comparisons from the cache, and comparisons without an answer, so far."""
        return dict(self._counts)

    def _question(self, prompt: Prompt, first: str, second: str) -> tuple[str, str]:
        """What the judge is asked, and the id that its verdict must repeat."""
        text, fence = fenced(prompt, first, second)
        return f"{text}\n\n{self.form.question(self.criterion, fence)}", fence

    def _key(self, text: str, fence: str) -> str:
        form = [] if self.template == "single" else [self.template]  # two may ask the same and read it otherwise
        content = json.dumps([self.server.base_url, self.request, self.extra_body, text, *form], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _ask_all(self, questions: Mapping[str, tuple[str, str]]) -> list[Reply | RequestFailedError]:
        """Put the verdicts into the cache; returns what has none: replies, and errors of requests that failed."""
        stopped = False

        async def ask(client: Any, places: asyncio.Semaphore, key: str, text: str, fence: str) -> Reply | None:
            nonlocal stopped
            async with places:
                if stopped:  # what has not begun will not be paid for
                    return None
                try:
                    return await self._ask(client, key, text, fence)
                except SourceConfigError:
                    stopped = True
                    raise

        async def ask_all(client: Any) -> list[Any]:
            places = asyncio.Semaphore(self.max_concurrency)
            calls = [ask(client, places, key, *question) for key, question in questions.items()]
            return await asyncio.gather(*calls, return_exceptions=True)

        outcomes = self.server.run(ask_all) if questions else []
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, RequestFailedError):
                raise outcome
        return [outcome for outcome in outcomes if outcome is not None]

    async def _ask(self, client: Any, key: str, text: str, fence: str) -> Reply | None:
        """One comparison; None when its verdict is in the cache, else the reply that has none."""
        assert self.cache is not None
        request = {**self.request, "messages": [{"role": "user", "content": text}], "extra_body": self.extra_body}
        reply = await self.server.ask(client, request, self._count_call)
        whole = reply.text is not None and reply.finish_reason not in ("length", "content_filter")
        verdict = read_verdict(reply.text or "", fence, self.form) if whole else None
        if verdict is None:
            return reply
        self.cache.add(key, verdict)
        return None

    def _complain(self, reply: Reply) -> None:
        """Warn once of replies without a verdict; too many in a row stop the run (SourceConfigError)."""
        text = self.server.without_key(reply.text or "")
        shown = repr(text if len(text) <= _SHOWN_CHARACTERS else "…" + text[-_SHOWN_CHARACTERS:])
        example = f"one ends (finish_reason {reply.finish_reason}) with {shown}"
        line = ", ".join(f'"{key}": "A"' for key in self.form.keys)
        form = f"""should end with a line such as {{"id": "…", {line}}} (docs/rewards.md, Replies)"""
        if self.max_unread is not None and self._unread >= self.max_unread:
            raise SourceConfigError(
                f"pairwise source '{self.name}': the last {self._unread} replies of {self.request['model']} have no "
                f"verdict; {example}. A reply {form}. Use a model that keeps to it, or raise max_tokens if replies are "
                "cut off; max_unread: null goes on, and such comparisons abstain."
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"pairwise source '{self.name}': replies without a verdict abstain, and {example}. A reply {form}; "
                f"reward/{self.name}/abstained counts the others.",
                stacklevel=2,
            )

    def _count_call(self) -> None:
        if self.max_calls is not None and self._counts["calls"] >= self.max_calls:
            raise BudgetSpentError(
                f"pairwise source '{self.name}': the budget of max_calls={self.max_calls} requests is spent. Raise "
                f"it and resume from the last checkpoint; the verdicts so far are in {self.cache_dir}."
            )
        self._counts["calls"] += 1
