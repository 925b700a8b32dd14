"""Which completions of a group mean the same: by their text, by an answer, by embeddings.

A way of clustering is a class that is named in YAML. It labels completions: equal labels are one cluster, None is a
cluster of its own. Groups are labelled each by itself, so that neither ranks nor batches matter.
"""

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from gopo_lightning.objectives.named import check_choice, load_callable
from gopo_lightning.policy.loading import finding, load_weights, locate
from gopo_lightning.policy.positions import max_length_of
from gopo_lightning.rewards.loading import encode, load_tokenizer, pad
from gopo_lightning.types import Prompt

Labels: TypeAlias = list[Hashable | None]
Linkage = Literal["complete", "greedy"]


class Clusters(ABC):
    """A way to tell which completions mean the same."""

    @abstractmethod
    def labels(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]], device: torch.device) -> list[Labels]:
        """P lists of G labels; what has to compute does so on ``device``."""

    def __repr__(self) -> str:
        """Class and options: what a resume compares."""
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({options})"


class SameText(Clusters):
    """Those of the same text, whatever its case and white space."""

    def labels(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]], device: torch.device) -> list[Labels]:
        """Normalised texts."""
        return [[normalised(text) for text in group] for group in groups]


class SameAnswer(Clusters):
    """Those of which a function makes the same answer.

    Args:
        function: dotted path of the function, ``./file.py:name``, or the function itself: two lists of N texts,
            prompts and completions, → N answers, such as numbers or texts; None where there is no answer, which is a
            cluster of its own.
    """

    def __init__(self, function: str | Callable[[list[str], list[str]], Iterable[Hashable | None]]) -> None:
        self.function = function
        self._function = load_callable(function) if isinstance(function, str) else function

    def labels(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]], device: torch.device) -> list[Labels]:
        """The answers.

        Raises:
            ValueError: not N answers, or one that cannot be compared.
        """
        prompts_N = [prompt.text for prompt, group in zip(prompts, groups, strict=True) for _ in group]
        texts_N = [str(text) for group in groups for text in group]
        found = self._function(prompts_N, texts_N)
        answers = list(found) if isinstance(found, Iterable) and not isinstance(found, str) else [found]
        if len(answers) != len(texts_N) or not all(isinstance(answer, Hashable) for answer in answers):
            raise ValueError(
                f"the answer function of SameAnswer returned {found!r:.80} for {len(texts_N)} completions; it must "
                "return one text, number or tuple each, or None where there is no answer."
            )
        known = iter(None if answer != answer else answer for answer in answers)  # NaN is none
        return [[next(known) for _ in group] for group in groups]


class NearEmbeddings(Clusters):
    """Those whose embeddings by a sentence encoder are near: mean of the last hidden states, cosine ≥ threshold.

    ``complete`` linkage joins the two clusters whose most different members are the most alike, as long as these reach
    the threshold; the order of the completions does not matter, but for ties. ``greedy`` puts each, in its order, into
    the first cluster whose first member is near enough. Equal texts are always one cluster.

    Args:
        encoder: Hugging Face model with a tokenizer: hub name or folder.
        threshold: the least cosine, in (−1, 1]; which one fits depends on the encoder.
        linkage: complete or greedy.
        revision: of the hub.
        max_length: most tokens of a text, longer ones lose their beginning; what the encoder takes when null.
        trust_remote_code: run code that comes with the encoder.
    """

    def __init__(
        self,
        encoder: str,
        threshold: float = 0.9,
        linkage: Linkage = "complete",
        revision: str | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_choice("linkage", linkage, ("complete", "greedy"))
        if not -1 < threshold <= 1:
            raise ValueError(f"threshold={threshold} of NearEmbeddings is a cosine in (-1, 1]. Try 0.9.")
        self.encoder, self.threshold, self.linkage = encoder, threshold, linkage
        self.revision, self.max_length, self.trust_remote_code = revision, max_length, trust_remote_code
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def labels(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]], device: torch.device) -> list[Labels]:
        """Numbers of clusters; the encoder is loaded on the first call."""
        return [self._labels([str(text) for text in group], device) for group in groups]

    def _labels(self, group: list[str], device: torch.device) -> Labels:
        number = {text: n for n, text in enumerate(dict.fromkeys(group))}
        embeddings_ND = self._embeddings(list(number), device)
        cosines_NN = (embeddings_ND @ embeddings_ND.T).tolist()
        join = complete_linkage if self.linkage == "complete" else greedy_linkage
        clusters = join(cosines_NN, self.threshold)
        return [clusters[number[text]] for text in group]

    @torch.no_grad()
    def _embeddings(self, texts: list[str], device: torch.device) -> Tensor:
        """float64 unit vectors on the CPU; 0 for a text without tokens, which is near to nothing."""
        model, tokenizer = self._load()
        model.to(device)  # type: ignore[arg-type]
        limit = max_length_of(model, tokenizer, self.max_length)
        encoded = encode(tokenizer, texts, limit, "left", may_be_empty=True)
        rows = [n for n, ids in enumerate(encoded["input_ids"]) if ids]
        embeddings_ND = torch.zeros(len(texts), model.config.get_text_config().hidden_size, dtype=torch.float64)
        if rows:
            inputs = pad(tokenizer, encoded, rows).to(device)
            with torch.autocast(device.type, enabled=False):
                states_NTD = model(**inputs).last_hidden_state.float()
            mask_NT1 = inputs["attention_mask"][..., None]
            embeddings_ND[rows] = ((states_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)).cpu().double()
        return torch.nn.functional.normalize(embeddings_ND, dim=-1)

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            tokenizer = load_tokenizer(self.encoder, self.revision, self.trust_remote_code)
            options: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
            with (
                finding(self.encoder, self.revision),
                torch.random.fork_rng(devices=[]),
            ):  # heads that are not saved are drawn
                model = load_weights(AutoModel, locate(self.encoder), dtype=torch.float32, **options)
            self._loaded = model.eval().requires_grad_(False), tokenizer
        return self._loaded


def normalised(text: str) -> str:
    """Without differences of case, white space and Unicode forms.

    >>> normalised("  The ANSWER\\n is ４"), normalised("the answer is 4")
    ('the answer is 4', 'the answer is 4')
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def complete_linkage(similarity: Sequence[Sequence[float]], threshold: float) -> list[int]:
    """Cluster numbers: the two clusters whose least similarity is highest are joined while that is ≥ ``threshold``.

    Of equal ones the first are joined.

    >>> complete_linkage([[1, 0.9, 0.1], [0.9, 1, 0.95], [0.1, 0.95, 1]], 0.8)
    [0, 1, 1]
    """
    clusters = [[n] for n in range(len(similarity))]

    def least(a: int, b: int) -> float:
        return min(similarity[i][j] for i in clusters[a] for j in clusters[b])

    while len(clusters) > 1:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a + 1, len(clusters))]
        a, b = max(pairs, key=lambda pair: least(*pair))
        if least(a, b) < threshold:
            break
        clusters[a] += clusters.pop(b)
    return _numbered(clusters, len(similarity))


def greedy_linkage(similarity: Sequence[Sequence[float]], threshold: float) -> list[int]:
    """Cluster numbers: each, in turn, joins the first cluster whose first member is similar by ≥ ``threshold``.

    >>> greedy_linkage([[1, 0.9, 0.1], [0.9, 1, 0.95], [0.1, 0.95, 1]], 0.8)
    [0, 0, 1]
    """
    clusters: list[list[int]] = []
    for n in range(len(similarity)):
        joined = next((cluster for cluster in clusters if similarity[cluster[0]][n] >= threshold), None)
        if joined is None:
            clusters.append([n])
        else:
            joined.append(n)
    return _numbered(clusters, len(similarity))


def _numbered(clusters: Sequence[Sequence[int]], num_members: int) -> list[int]:
    number = {member: k for k, cluster in enumerate(clusters) for member in cluster}
    return [number[n] for n in range(num_members)]
