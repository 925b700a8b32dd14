"""What a meta-judge is asked in order to improve a rubric, and how its reply is read: MPO (arXiv 2504.20157, sec. 2.3).

Analysis and refinement of each sample, then one merge. The wording is ours, and so is the frame of the reply: the new
rubric stands between marks with an id that no judged text can know, so that none can write itself into the rubric.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gopo_lightning.rewards.judge_prompt import marked

_KEEP_IN_MIND = (
    "A policy is trained on these scores, so it will find whatever the rubric rewards without wanting it. The new "
    "rubric must be about the quality of responses to any prompt of this kind, and each item a sentence that can be "
    "scored from {lowest} to {highest} by itself."
)


@dataclass(frozen=True)
class Sample:
    """A response and what the rubric gave it."""

    prompt: str
    response: str
    score: float


@dataclass(frozen=True)
class Revision:
    """A rubric to be improved, with the range of an item's score."""

    rubric: tuple[str, ...]
    lowest: int
    highest: int

    def analysis(self, sample: Sample) -> str:
        """The question after how well the rubric judged ``sample``; its reply is read by no program."""
        text, _ = marked({"prompt": sample.prompt, "response": sample.response})
        most = self.highest * len(self.rubric)
        return (
            f"{text}\n\nA judge gave this response {sample.score:g} of {most} by the following rubric, each item from "
            f"{self.lowest} to {self.highest}:\n{_listed(self.rubric)}\nAnalyse how well the rubric served: does the "
            "score reflect the quality of the response? What does the rubric miss, what does it leave vague, and how "
            "could a response score high without deserving it?"
        )

    def refinement(self, sample: Sample, analysis: str) -> tuple[str, str]:
        """The question after a better rubric in the light of ``analysis``, and the id that its reply must have."""
        text, fence = marked({"prompt": sample.prompt, "response": sample.response, "analysis": analysis})
        return (
            f"{text}\n\nThe analysis is of this rubric:\n{_listed(self.rubric)}\nImprove the rubric where the "
            f"analysis is right; keep what serves. {self._ending(fence)}",
            fence,
        )

    def merge(self, refined: Sequence[Sequence[str]]) -> tuple[str, str]:
        """The question after one rubric of all that were ``refined``, and the id that its reply must have."""
        parts = {f"rubric {number}": _listed(rubric) for number, rubric in enumerate(refined, start=1)}
        text, fence = marked(parts)
        return (
            f"{text}\n\nThese are improvements of this rubric:\n{_listed(self.rubric)}\nMerge them into one rubric: "
            f"what they agree on first, each thing once, and nothing that fits a single prompt only. "
            f"{self._ending(fence)}",
            fence,
        )

    def _ending(self, fence: str) -> str:
        rule = _KEEP_IN_MIND.format(lowest=self.lowest, highest=self.highest)
        return (
            f'{rule} End your reply with the whole rubric in exactly this form:\n<rubric id="{fence}">\n'
            "<item>…</item>\n<item>…</item>\n</rubric>"
        )


def read_rubric(reply: str, fence: str) -> tuple[str, ...] | None:
    """The items of the last rubric with ``fence`` as its id, each once, in their order; None where there are none.

    >>> read_rubric('<rubric id="4f"><item>Kind. </item><item>Brief.</item><item>Kind.</item></rubric>', "4f")
    ('Kind.', 'Brief.')
    """
    found = re.findall(rf'<rubric id="{re.escape(fence)}">(.*?)</rubric>', reply, re.DOTALL)
    items = re.findall(r"<item>(.*?)</item>", found[-1], re.DOTALL) if found else []
    rubric = tuple(dict.fromkeys(" ".join(item.split()) for item in items))
    return rubric if rubric and all(rubric) and not any("<item>" in item for item in rubric) else None


def _listed(rubric: Sequence[str]) -> str:
    return "\n".join(f"{number}. {item}" for number, item in enumerate(rubric, start=1))
