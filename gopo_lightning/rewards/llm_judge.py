"""An LLM behind any OpenAI-compatible server as the judge. Needs the extra `judge` (the official client)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gopo_lightning.rewards.chat_model import Asker, ChatModel
from gopo_lightning.rewards.judge_forms import Template, form_of
from gopo_lightning.rewards.judge_prompt import CRITERION, fenced
from gopo_lightning.rewards.pairwise import PairComparator
from gopo_lightning.rewards.verdict_cache import Verdict
from gopo_lightning.types import Prompt


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

    waits = True

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
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        extra_body: Mapping[str, Any] | None = None,
        max_unread: int | None = 8,
        template: Template = "single",
    ) -> None:
        super().__init__(name, num_opponents, both_orders, seed)
        self.template, self.form = template, form_of(template)
        self.tolerance = None
        self.criterion = criterion
        options = ChatModel(
            model,
            base_url,
            api_key_env,
            max_concurrency,
            max_retries,
            backoff_seconds,
            timeout_seconds,
            max_calls,
            cache_dir,
            temperature,
            max_tokens,
            dict(extra_body or {}),
            max_unread,
        )
        self.asker = Asker(f"pairwise source '{name}'", name, options)

    def setup(self, device: torch.device) -> None:
        """Read the cache, and ask the server for its models: a wrong key or address stops the run here.

        Raises:
            SourceConfigError: no client, no key, no server, or a key that the server refuses.
        """
        self.asker.connect()

    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[Verdict]:
        """1, 0, ½ or None for each pair.

        Raises:
            SourceConfigError: the budget is spent, the server refuses key or model, or no reply has a verdict.
            RuntimeError: every request failed.
        """
        questions = [self._question(*pair) for pair in zip(prompts, firsts, seconds, strict=True)]
        return self.asker.answers(questions, self.form, *self._reading)

    async def ask_pairs(self, pairs: Sequence[tuple[Prompt, str, str]]) -> None:
        """Ask about ``pairs`` before `answers` is called for them."""
        questions = [self._question(*each) for each in self.questions(pairs).values()]
        await self.asker.ask(questions, self.form, *self._reading)

    @property
    def _reading(self) -> list[str]:
        """Two templates may ask the same and read it otherwise."""
        return [] if self.template == "single" else [self.template]

    def counters(self) -> dict[str, int]:
        """Requests, comparisons from the cache, and comparisons without an answer, so far."""
        return dict(self.asker.counts)

    def _question(self, prompt: Prompt, first: str, second: str) -> tuple[str, str]:
        """What the judge is asked, and the id that its verdict must repeat."""
        text, fence = fenced(prompt, first, second)
        return f"{text}\n\n{self.form.question(self.criterion, fence)}", fence
