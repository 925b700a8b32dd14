"""Semantic entropy: by hand, by its invariances, and over every way to tell which completions mean the same."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel

from gopo_lightning.objectives import PairObjective
from gopo_lightning.rollout import NearEmbeddings, SameAnswer, SameText, SemanticEntropy
from gopo_lightning.rollout.clusters import complete_linkage, greedy_linkage
from gopo_lightning.rollout.semantic_entropy import cluster_masses, entropy_share, factor
from gopo_lightning.rollout.transforms import Context
from gopo_lightning.types import Experience
from tests.rollouts import experience_of
from tests.runs import make_module
from tests.test_module import fit
from tests.test_rewards import save_bert

NAN = math.nan
NOW = Context(0, 0)
CPU = torch.device("cpu")
EIGHT = ["a", "b", "a", "c", "a", "B ", "a", " A"]
"""Clusters of 5, 2 and 1."""
SHANNON, MONTE_CARLO = 0.432932, 1.311913 / math.log(8)


def scattered(texts: list[str] = EIGHT, rewards: list[float] | None = None, **fields: Any) -> Experience:
    rewards = rewards or [float(n) for n in range(len(texts))]
    advantages = [[0.5 * n - 1 for n in range(len(texts))]]
    return experience_of([rewards], texts=texts, advantages=advantages, **fields)


def scales(experience: Experience, transform: SemanticEntropy) -> list[float]:
    """What advantages were multiplied by."""
    shaped = transform(experience, NOW)
    ratios_PG = shaped.advantages_PG / experience.advantages_PG
    return [float(ratios_G[~ratios_G.isnan()].mean()) for ratios_G in ratios_PG]


# --- the factor -------------------------------------------------------------------------------------------------------


def test_entropies_by_hand() -> None:
    p_K = cluster_masses([text.strip().lower() for text in EIGHT], [1.0] * 8)
    assert p_K == [5 / 8, 2 / 8, 1 / 8]
    assert entropy_share(p_K, 8, "shannon") * math.log(8) == pytest.approx(0.900256, abs=1e-6)
    assert entropy_share(p_K, 8, "shannon") == pytest.approx(SHANNON, abs=1e-6)
    assert entropy_share(p_K, 8, "monte_carlo") * math.log(8) == pytest.approx(1.311913, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.783534),
        ({"form": "exp"}, 0.805360),
        ({"form": "focal"}, 0.613926),
        ({"form": "focal", "gamma": 1.0}, 0.783534),
        ({"alpha": 1.0}, 1 - SHANNON),
        ({"estimator": "monte_carlo"}, 1 - MONTE_CARLO / 2),
    ],
)
def test_scales_by_hand(options: dict[str, Any], expected: float) -> None:
    transform = SemanticEntropy(**options)
    assert scales(scattered(), transform) == [pytest.approx(expected, abs=1e-6)]
    means = {name: float(mean.sum / mean.count) for name, mean in transform.metrics().items()}
    share = MONTE_CARLO if "estimator" in options else SHANNON
    assert means == {"semantic_entropy": pytest.approx(share, abs=1e-6), "semantic_clusters": 3.0}


def test_agreement_changes_nothing_and_disagreement_most() -> None:
    agreed = scattered(["Yes", " yes", "YES", "yes"])
    assert torch.equal(SemanticEntropy()(agreed, NOW).advantages_PG, agreed.advantages_PG)
    assert scales(scattered(["a", "b", "c", "d"]), SemanticEntropy(alpha=0.25)) == [pytest.approx(0.75)]
    for form in ("linear", "exp", "focal"):
        assert float(factor(torch.tensor([0.9]), form, 0.0, 2.0)) == 1.0


def test_the_monte_carlo_estimate_over_weighs_rare_clusters() -> None:
    assert entropy_share([7 / 8, 1 / 8], 8, "shannon") == pytest.approx(0.181, abs=5e-4)
    assert entropy_share([7 / 8, 1 / 8], 8, "monte_carlo") == pytest.approx(0.532, abs=5e-4)
    for sizes in ([5, 2, 1], [4, 4], [3, 3, 1, 1], [1] * 8):
        p_K = [size / 8 for size in sizes]
        assert entropy_share(p_K, 8, "monte_carlo") * math.log(8) >= math.log(len(sizes)) - 1e-12


@pytest.mark.parametrize(
    "options", [{}, {"estimator": "monte_carlo", "form": "focal", "alpha": 1.0}, {"mass": "likelihood", "form": "exp"}]
)
def test_the_factor_is_one_a_group_keeps_signs_and_no_order_matters(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    transform = SemanticEntropy(**options)
    for _ in range(50):
        texts = ["abcd"[i] for i in torch.randint(4, (6,), generator=generator).tolist()]
        old_NT = torch.randn(6, 1, generator=generator) * 30
        experience = scattered(texts, old_logprobs_NT=old_NT)
        shaped_G = transform(experience, NOW).advantages_PG[0]
        ratios_G = (shaped_G / experience.advantages_PG[0])[experience.advantages_PG[0] != 0]
        assert (ratios_G >= 0).all() and (ratios_G <= 1).all()
        torch.testing.assert_close(ratios_G, ratios_G[:1].expand(len(ratios_G)))
        order = torch.randperm(6, generator=generator)
        moved = scattered([texts[i] for i in order.tolist()], old_logprobs_NT=old_NT[order])
        moved = replace(moved, advantages_PG=experience.advantages_PG[:, order])
        assert torch.equal(transform(moved, NOW).advantages_PG[0], shaped_G[order])


def test_mass_by_likelihood_is_a_mean_over_tokens() -> None:
    """Means −1, −1 − log 3, −1: shares 3/7, 1/7, 3/7; the second and third mean the same, so 3/7 and 4/7."""
    old_NT = torch.tensor([[-1.0, NAN, NAN], [-1.0, -1.0, -1.0 - 3 * math.log(3)], [-2.0, 0.0, NAN]])
    experience = experience_of(
        [[0.0, 1.0, 2.0]], [1, 3, 2], texts=["a", "b", "b"], advantages=[[1.0, 1.0, 1.0]], old_logprobs_NT=old_NT
    )
    transform = SemanticEntropy(mass="likelihood", alpha=1.0)
    assert transform.needs == {"old"} and SemanticEntropy().needs == frozenset()
    entropy = -(3 * math.log(3 / 7) + 4 * math.log(4 / 7)) / 7
    assert scales(experience, transform) == [pytest.approx(1 - entropy / math.log(3), abs=1e-6)]


@pytest.mark.parametrize(
    ("rewards", "p_K"),
    [
        ([1.0, 2.0, NAN, 3.0], [2 / 3, 1 / 3]),
        ([1.0, NAN, 2.0, 3.0], [1.0]),
        ([NAN, NAN, 2.0, NAN], [1.0]),
        ([NAN] * 4, []),
    ],
)
def test_what_has_no_valid_reward_is_not_counted(rewards: list[float], p_K: list[float]) -> None:
    """Texts a, b, c, a without the second or the third."""
    texts = ["a", "b", "c" if math.isnan(rewards[2]) else "a", "a"]
    experience = experience_of([rewards], texts=texts, advantages=[[1.0] * 4])
    expected = 1 - entropy_share(p_K, 3, "shannon")
    assert scales(experience, SemanticEntropy(alpha=1.0)) == [pytest.approx(expected, abs=1e-6)]


def test_what_has_no_weight_is_not_counted_and_groups_do_not_mix() -> None:
    texts = ["a", "b", "b", "b", "a", "c"]
    experience = experience_of(
        [[0.0, 1, 2], [0, 1, 2]],
        texts=texts,
        advantages=[[1.0] * 3] * 2,
        weights_PG=torch.tensor([[0.0, 1, 1], [1, 1, 1]]),
    )
    assert scales(experience, SemanticEntropy(alpha=1.0)) == [1.0, pytest.approx(0.0, abs=1e-6)]


# --- clusters ---------------------------------------------------------------------------------------------------------


def last_word(prompts: list[str], completions: list[str]) -> list[Any]:
    """The answer is the last word, a number where it is one; None for no word."""
    words = [text.split()[-1:] for text in completions]
    return [(float(word[0]) if word[0].replace(".", "").isdigit() else word[0]) if word else None for word in words]


@pytest.mark.parametrize("function", [last_word, "tests.test_semantic_entropy.last_word"])
def test_clusters_of_the_same_answer(function: Any) -> None:
    labels = SameAnswer(function).labels(
        scattered(["x"] * 5).prompts.prompts, [["so 4", "it is 4.0", "no", "", "", "nan"]], CPU
    )
    assert labels == [[4.0, 4.0, "no", None, None, "nan"]]
    assert cluster_masses(labels[0], [1.0] * 6) == [1 / 3, 1 / 6, 1 / 6, 1 / 6, 1 / 6]


def test_an_answer_that_is_no_number_is_none() -> None:
    labels = SameAnswer(lambda prompts, texts: [NAN] * len(texts)).labels(
        scattered(["x"]).prompts.prompts, [["a", "b"]], CPU
    )
    assert labels == [[None, None]]


@pytest.mark.parametrize("result", [["a"], "ab", 3, [["a"], ["b"]]])
def test_what_is_no_answer_is_refused(result: Any) -> None:
    with pytest.raises(ValueError, match="the answer function of SameAnswer returned .* for 2 completions; it must"):
        SameAnswer(lambda prompts, texts: result).labels(scattered(["x"]).prompts.prompts, [["a", "b"]], CPU)


def test_linkages_by_hand() -> None:
    """A chain a–b–c: a and c are not near. Complete linkage joins the nearer pair, greedy goes by the order."""
    chain = [[1, 0.85, 0.1], [0.85, 1, 0.9], [0.1, 0.9, 1]]
    assert complete_linkage(chain, 0.8) == [0, 1, 1] and greedy_linkage(chain, 0.8) == [0, 0, 1]
    assert complete_linkage(chain, 0.1) == [0, 0, 0] and complete_linkage(chain, 0.95) == [0, 1, 2]
    assert greedy_linkage(chain, 0.1) == [0, 0, 0] and greedy_linkage(chain, 0.95) == [0, 1, 2]
    assert complete_linkage([], 0.5) == [] and greedy_linkage([[1.0]], 0.5) == [0]


def test_complete_linkage_does_not_depend_on_the_order_and_its_members_are_all_near() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        points_ND = torch.nn.functional.normalize(torch.randn(7, 3, generator=generator), dim=-1)
        cosines = (points_ND @ points_ND.T).tolist()
        clusters = complete_linkage(cosines, 0.6)
        order = torch.randperm(7, generator=generator).tolist()
        moved = complete_linkage([[cosines[i][j] for j in order] for i in order], 0.6)
        for a, b in itertools.combinations(range(7), 2):
            assert (moved[a] == moved[b]) == (clusters[order[a]] == clusters[order[b]])
            assert clusters[a] != clusters[b] or cosines[a][b] >= 0.6


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT over bytes; its folder holds a classifier, of which the trunk is loaded."""
    return save_bert(tmp_path_factory.mktemp("encoder"))


def test_embeddings_are_means_of_the_last_hidden_states(encoder: Path) -> None:
    """One text at a time, without padding."""
    texts = ["yes", "no, never", "", "yes", "a" * 100]
    clusters = NearEmbeddings(str(encoder))
    embeddings_ND = clusters._embeddings(texts, CPU)
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    for text, embedding_D in zip(texts, embeddings_ND, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, -64:]
        if ids.shape[1] == 0:
            assert embedding_D.eq(0).all()
            continue
        with torch.no_grad():
            mean_D = model(input_ids=ids).last_hidden_state[0].mean(0).double()
        torch.testing.assert_close(embedding_D, mean_D / mean_D.norm(), rtol=0, atol=1e-6)


def test_clusters_of_near_embeddings(encoder: Path) -> None:
    """By the cosines themselves; equal texts are one cluster whatever the threshold, and the order is kept."""
    group = ["yes", "no, never", "yes", "yes!", "", ""]
    near = NearEmbeddings(str(encoder), threshold=0.5)
    cosines = near._embeddings(["yes", "yes!"], CPU)
    cosine = float(cosines[0] @ cosines[1])
    for threshold, together in ((cosine - 1e-4, True), (min(cosine + 1e-4, 1.0), False)):
        for linkage in ("complete", "greedy"):
            (labels,) = NearEmbeddings(str(encoder), threshold, linkage).labels([], [["yes", "yes!"]], CPU)
            assert (labels[0] == labels[1]) == together
    (labels,) = NearEmbeddings(str(encoder), threshold=1.0).labels([], [group], CPU)
    assert labels[0] == labels[2] and labels[4] == labels[5] and len(set(labels)) == 4


def test_loading_the_encoder_draws_no_random_numbers(encoder: Path, tmp_path: Path) -> None:
    """It loads on the first call, which in a resumed run is another step, and draws the pooler that is not saved; a
    dropout would differ from there on."""
    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    NearEmbeddings(str(tmp_path)).labels([], [["a", "b"]], CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemanticEntropy(alpha=0.0), r"alpha=0.0 of SemanticEntropy must lie in \(0, 1\]"),
        (lambda: SemanticEntropy(alpha=1.5), "alpha=1.5 .* change their sign"),
        (lambda: SemanticEntropy(alpha=NAN), "alpha=nan"),
        (lambda: SemanticEntropy(gamma=2.0), "gamma=2.0 of SemanticEntropy is an exponent above 0 of form: focal"),
        (lambda: SemanticEntropy(form="focal", gamma=0.0), "gamma=0.0"),
        (lambda: SemanticEntropy(form="cubic"), "form='cubic' is unknown; choose one of"),  # type: ignore[arg-type]
        (lambda: SemanticEntropy(mass="share"), "mass='share' is unknown"),  # type: ignore[arg-type]
        (lambda: NearEmbeddings("x", 1.5), r"threshold=1.5 of NearEmbeddings is a cosine in \(-1, 1\]"),
        (lambda: NearEmbeddings("x", linkage="single"), "linkage='single' is unknown"),  # type: ignore[arg-type]
        (lambda: SameAnswer("answer"), "'answer' is no dotted path"),
        (lambda: NearEmbeddings("./nowhere").labels([], [["a"]], CPU), "there is no folder './nowhere'"),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_resume_compares_the_options_of_clusters() -> None:
    assert repr(SameText()) == "SameText()"
    assert repr(NearEmbeddings("e", 0.8)).startswith("NearEmbeddings(encoder='e', threshold=0.8, linkage='complete'")


def test_an_objective_without_advantages_is_refused(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    module = make_module(tiny_policy, transforms=[SemanticEntropy()], loss=PairObjective(anchor="old", beta=0.1))
    with pytest.raises(ValueError, match="changes the advantages, but the objective reads rewards or comparisons"):
        fit(module, prompts_file, tmp_path, max_steps=1, limit_val_batches=0)


def test_a_run_with_embeddings_and_likelihoods(
    encoder: Path, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """What is trained on are the ranks times what the texts and log-probs of that rollout give."""
    transform = SemanticEntropy(NearEmbeddings(str(encoder), 0.7), mass="likelihood", estimator="monte_carlo")
    module = make_module(tiny_policy, transforms=[transform])
    keep = fit(module, prompts_file, tmp_path, max_steps=1, limit_val_batches=0)
    (experience,) = keep.experiences
    plain = replace(experience, advantages_PG=module.advantage(experience.rewards_PG).float())
    torch.testing.assert_close(transform(plain, NOW).advantages_PG, experience.advantages_PG)
    ratios = (experience.advantages_PG / plain.advantages_PG).nanmean(-1)
    assert len(set(ratios[~ratios.isnan()].tolist())) > 1 and (experience.advantages_PG != 0).any()
    logged = module.trainer.logged_metrics
    assert 0 < float(logged["transform/semantic_entropy"]) <= 1 <= float(logged["transform/semantic_clusters"]) <= 4
