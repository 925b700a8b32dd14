"""LLMs that score a single response: by one number, or by the items of a rubric. They need the extra `judge`.

`LLMJudge`, which compares two, suits ranks better: a score of 1 to 10 ties often, and its scale drifts.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from gopo_lightning.rewards.base import RewardSource, SourceConfigError
from gopo_lightning.rewards.chat_model import Asker, ChatModel
from gopo_lightning.rewards.judge_prompt import fenced_alone
from gopo_lightning.rewards.pairwise import Groups
from gopo_lightning.rewards.score_forms import CRITERION, RubricForm, ScoreForm, check_range, rubric_of
from gopo_lightning.rewards.verdict_cache import Verdict
from gopo_lightning.types import Prompt


class ChatScore(RewardSource):
    """Asks an LLM for a score of each response.

    Fences, ids, retries, the cache and abstentions are those of `LLMJudge`: a reply without a score abstains, and the
    first such reply is shown in a warning.
    """

    waits = True

    def __init__(self, judge: ChatModel | Mapping[str, Any], name: str) -> None:
        self.name, self.judge = name, ChatModel.of(judge)
        self.asker = Asker(f"reward source '{name}'", name, self.judge)

    @property
    @abstractmethod
    def form(self) -> ScoreForm | RubricForm:
        """What is asked at present."""

    def setup(self, device: torch.device) -> None:
        """Read the cache, and ask the server for its models: a wrong key or address stops the run here.

        Raises:
            SourceConfigError: no client, no key, no server, or a key that the server refuses.
        """
        self.asker.connect()

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Verdict]:
        """N scores or None.

        Raises:
            SourceConfigError: the budget is spent, the server refuses key or model, every request failed, or no reply
                can be read.
        """
        try:
            return self.asker.answers(self._questions(prompts, completions), self.form)
        except SourceConfigError:
            raise
        except RuntimeError as error:  # no row is to be looked for: asking again may cost money
            raise SourceConfigError(f"{self.asker.source}: {error}") from error

    async def ask(self, prompts: Sequence[Prompt], groups: Groups) -> None:
        """See `early.AsksEarly`."""
        prompts_N = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
        await self.asker.ask(self._questions(prompts_N, list(chain.from_iterable(groups))), self.form)

    def _questions(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[tuple[str, str]]:
        """What the judge is asked, each with the id that its answer must repeat."""
        questions = []
        for prompt, completion in zip(prompts, completions, strict=True):
            text, fence = fenced_alone(prompt, str(completion))
            questions.append((f"{text}\n\n{self.form.question(fence)}", fence))
        return questions

    def counters(self) -> dict[str, int]:
        """Requests, scores from the cache, and completions without a score, so far."""
        return dict(self.asker.counts)


class LLMScore(ChatScore):
    """Scores each response by a number that an LLM gives it.

    Args:
        judge: the model, its server and how it is asked.
        criterion: the question, such as "How friendly is the response?".
        lowest: of the scores, the worst.
        highest: of the scores, the best; a score outside of the range abstains.
        name: in logs and error messages.
    """

    def __init__(
        self,
        judge: ChatModel,
        criterion: str = CRITERION,
        lowest: float = 1.0,
        highest: float = 10.0,
        name: str = "score",
    ) -> None:
        super().__init__(judge, name)
        check_range(lowest, highest)
        self._form = ScoreForm(criterion, lowest, highest)

    @property
    def form(self) -> ScoreForm:
        """The criterion and the range."""
        return self._form


class RubricJudge(ChatScore):
    """Scores each response by the items of a rubric, in one request; the sum of the items' scores is the reward.

    Args:
        judge: the model, its server and how it is asked.
        rubric: what to look at, a sentence each.
        lowest: of an item's score, the worst.
        highest: of an item's score, the best; a reply with another or a missing score abstains.
        name: in logs and error messages.
    """

    def __init__(
        self,
        judge: ChatModel,
        rubric: Sequence[str],
        lowest: int = 0,
        highest: int = 5,
        name: str = "rubric",
    ) -> None:
        super().__init__(judge, name)
        check_range(lowest, highest)
        self.lowest, self.highest = lowest, highest
        self.first_rubric = self.rubric = rubric_of(rubric)

    @property
    def form(self) -> RubricForm:
        """Of the rubric at present."""
        return RubricForm(self.rubric, self.lowest, self.highest)
