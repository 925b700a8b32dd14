"""What a judge is asked to fill in, and the verdict that its answers make.

`survey` is the judge of the GOPO paper (2602.03876): five criteria, each with a justification, then an overall choice,
in one reply; its winner is the side that wins more of the five. Departures: the wording is ours, and so is the form of
the reply, a JSON object with the id of the question; a criterion may tie; a reply that leaves one out abstains, where
the paper's code goes on with the others.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Template = Literal["single", "survey", "survey_overall"]

CRITERIA = {
    "helpfulness": "does it do what the prompt asks for?",
    "correctness": "is what it says true and to the point, and nothing made up?",
    "coherence": "is it clear, logical and consistent with itself?",
    "complexity": "does it show depth of thought and command of language, rather than a bare minimum?",
    "verbosity": "is its length right for what is asked, neither too brief nor too long?",
}
"""Of the survey, in the order in which they are asked."""
_VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}


@dataclass(frozen=True)
class Form:
    """One kind of question."""

    keys: tuple[str, ...]
    """Of the reply's last object, beside the id; each is "A", "B" or "tie"."""
    ask: Callable[[str, str], str]
    """(criterion, example of the last line) → the question."""
    decide: Callable[[Mapping[str, float]], float]
    """The answers by key, as 1, 0 or ½ → the verdict."""

    def question(self, criterion: str, fence: str) -> str:
        """What follows the fenced texts."""
        return self.ask(criterion, json.dumps({"id": fence, **dict.fromkeys(self.keys, "A")}))

    @property
    def example(self) -> str:
        """Of the answers in the last line."""
        return ", ".join(f'"{key}": "A"' for key in self.keys)

    def verdict(self, row: Mapping[str, Any]) -> float | None:
        """1.0 (A), 0.0 (B) or 0.5 (tie); None where an answer is missing or another word.

        >>> answers = {"helpfulness": "A", "correctness": "tie", "coherence": "B", "complexity": "a", "verbosity": "B"}
        >>> FORMS["survey"].verdict({**answers, "overall": "A"}), FORMS["survey_overall"].verdict(answers)
        (0.5, None)
        """
        answers = {key: _VERDICTS.get(str(row.get(key)).strip().upper()) for key in self.keys}
        known = {key: answer for key, answer in answers.items() if answer is not None}
        return self.decide(known) if len(known) == len(answers) else None


def _single(criterion: str, line: str) -> str:
    return (
        f"{criterion}\nThink as much as you need. Then end your reply with one line in exactly "
        f'this form, where verdict is "A", "B" or "tie":\n{line}'
    )


def _survey(criterion: str, line: str) -> str:
    criteria = "\n".join(f"{number}. {name}: {asks}" for number, (name, asks) in enumerate(CRITERIA.items(), start=1))
    return (
        f"Compare the two responses by five criteria:\n{criteria}\nFor each of them, say in a sentence or two how A "
        "and B do, and which of them is better. Then weigh everything: "
        f"{criterion} Say why. Then end your reply with one line in exactly this form, where each value is "
        f'"A", "B" or "tie":\n{line}'
    )


def _majority(answers: Mapping[str, float]) -> float:
    """Of the five criteria; as many for A as for B is a tie."""
    total = sum(answers[name] for name in CRITERIA)
    return 0.5 if total == len(CRITERIA) / 2 else float(total > len(CRITERIA) / 2)


_KEYS = (*CRITERIA, "overall")
FORMS: dict[Template, Form] = {
    "single": Form(("verdict",), _single, lambda answers: answers["verdict"]),
    "survey": Form(_KEYS, _survey, _majority),
    "survey_overall": Form(_KEYS, _survey, lambda answers: answers["overall"]),
}


def form_of(template: Template) -> Form:
    """ValueError when there is none of that name."""
    if template not in FORMS:
        raise ValueError(f"template={template!r} is none of {list(get_args(Template))}. Use 'single' or 'survey'.")
    return FORMS[template]
