"""What the study is made of: a small policy, and reward models that different people's ratings have made.

    python -m scripts.study.assets          what is not there yet (about 20 minutes, 2 cores), two at a time

They lie in the user's cache beside the packaged models, and runs/study/assets is a link to them.

The ratings of every sentence are dealt out to two halves of the people, those at even and at odd places of its list.
`proxy` learns from the first half and trains policies; `judge` learns from the second half and judges them;
`few_labels` learns from the first half's ratings of 320 sentences. They share sentences and base model, so their
mistakes are not independent. `facts.json` says how well each orders the held-out sentences by the mean of their raters.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from scipy.stats import kendalltau, rankdata
from transformers import AutoTokenizer

from gopo_lightning.data import assets, ratings
from gopo_lightning.data.json_lines import write_jsonl
from gopo_lightning.rewards import SequenceClassifierReward
from gopo_lightning.types import Prompt
from scripts.study import rewards

ROOT = Path("runs/study/assets")
NUM_PROMPT_WORDS = 3
MIN_SENTENCE_TOKENS = 10
NUM_HELD_OUT = 64
"""Prompts of the verdict; as many others choose the learning rate."""
LIST_SIZE = 32
NUM_DEALS = 4
"""How often the sentences are dealt into lists."""
MODELS = {"proxy": (0, None), "judge": (1, None), "few_labels": (0, 320)}
"""Name → which half of the people, and how many sentences."""


def half(sentence: ratings.RatedSentence, which: int) -> float:
    """The mean rating by one half of its raters."""
    scores = sentence.scores[which::2]
    return sum(scores) / len(scores)


def write_lists(path: Path, sentences: list[ratings.RatedSentence], which: int, num_deals: int) -> None:
    """Rows of LIST_SIZE sentences in the order of one half of the people, 1 for the best; equal means tie."""
    draw, rows = random.Random(0), []
    for _ in range(num_deals):
        order = draw.sample(sentences, len(sentences))
        for start in range(0, len(order) - LIST_SIZE + 1, LIST_SIZE):
            part = order[start : start + LIST_SIZE]
            ranks = rankdata([-half(sentence, which) for sentence in part], "dense")
            rows.append({"completions": [sentence.text for sentence in part], "ranks": [int(rank) for rank in ranks]})
    write_jsonl(path, rows)


def run(arguments: Sequence[str]) -> None:
    """Python with ``arguments``, on one thread and in float32: the same bits on few machines, about the same on all."""
    subprocess.run([sys.executable, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def train_reward_model(name: str, which: int, num_sentences: int | None) -> None:
    """By our own command; the folder appears when it is whole."""
    parts = {part: ratings.split(ratings.load("movie"), part) for part in ("train", "validation")}
    files = {part: ROOT / f"{name}_{part}.jsonl" for part in parts}
    write_lists(files["train"], parts["train"][:num_sentences], which, NUM_DEALS)
    write_lists(files["validation"], parts["validation"], which, 1)
    steps = 300 if num_sentences is None else 60
    arguments = [
        *("-m", "gopo_lightning", "fit", "--config", "configs/quickstart/reward_model.yaml"),
        *(f"--data.init_args.source={files['train']}", f"--data.init_args.validation_source={files['validation']}"),
        *("--data.init_args.batch_size=2", "--data.init_args.eval_batch_size=4"),
        *(f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", "--trainer.precision=32-true"),
        *(f"--trainer.logger.init_args.save_dir={ROOT}", f"--trainer.logger.init_args.name=runs/{name}"),
        *("--model.init_args.max_length=128", f"--model.init_args.export_dir={ROOT / name}"),
    ]
    run(arguments)


def write_prompts() -> None:
    """Beginnings of sentences: for training, for the choice of the learning rate (`tuning`), and for the verdict."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "policy")
    seen: set[str] = set()
    rows: dict[str, list[dict[str, Any]]] = {}
    for part in ("validation", "train"):
        rows[part] = []
        for sentence in ratings.split(ratings.load("movie"), part):
            ids = tokenizer(sentence.text)["input_ids"]
            beginning = tokenizer.decode(ids[:NUM_PROMPT_WORDS])
            if len(ids) < MIN_SENTENCE_TOKENS or tokenizer.unk_token_id in ids[:NUM_PROMPT_WORDS] or beginning in seen:
                continue
            seen.add(beginning)
            rows[part].append({"prompt": beginning} | ({"held_out": True} if part == "validation" else {}))
    held_out = rows["validation"]
    write_jsonl(ROOT / "held_out_prompts.jsonl", held_out[:NUM_HELD_OUT])
    write_jsonl(ROOT / "tuning_prompts.jsonl", held_out[NUM_HELD_OUT : 2 * NUM_HELD_OUT])
    write_jsonl(ROOT / "train_prompts.jsonl", rows["train"])


def write_chat_prompts() -> None:
    """The same three parts for a chat model: the requests of the quickstart."""
    held_out = [{**row, "held_out": True} for row in ratings.prompts("validation")]
    write_jsonl(ROOT / "smollm2_held_out.jsonl", held_out[:NUM_HELD_OUT])
    write_jsonl(ROOT / "smollm2_tuning.jsonl", held_out[NUM_HELD_OUT : 2 * NUM_HELD_OUT])
    write_jsonl(ROOT / "smollm2_train.jsonl", ratings.prompts("train"))


def scores_of(name: str, sentences: list[ratings.RatedSentence]) -> list[float]:
    """By the reward model ``name``."""
    reward = SequenceClassifierReward(str(ROOT / name), include_prompt=False, dtype="float32")
    reward.setup(torch.device("cpu"))
    prompts = [Prompt(index=0, token_ids=(0,), text="")] * len(sentences)
    return [float(score) for score in reward(prompts, [sentence.text for sentence in sentences])]


def check_warps() -> int:
    """That the warps keep the order of the proxy's scores of all sentences, cut off or not; how many scores there are.

    Raises:
        ValueError: one does not.
    """
    base = yaml.safe_load(Path("configs/study/base.yaml").read_text())["model"]["init_args"]["rewards"]["sources"][0]
    mean, scale = base["init_args"]["mean"], base["init_args"]["scale"]
    whole = [(score - mean) / scale for score in scores_of("proxy", ratings.load("movie"))]
    z = {*whole, *(value - rewards.CUT_OFF for value in whole)}
    for warp in rewards.WARPS:
        rewards.check_order(warp, [*z])
    return len(z)


def agreement(name: str, sentences: list[ratings.RatedSentence]) -> dict[str, float]:
    """Kendall's τ-b of the model's order of held-out sentences with the mean of all raters, and of each half."""
    scores = scores_of(name, sentences)
    people = {"all": [s.mean for s in sentences]} | {f"half_{k}": [half(s, k) for s in sentences] for k in (0, 1)}
    found = {f"kendall_{who}": float(kendalltau(scores, values).statistic) for who, values in people.items()}
    return found | {"mean": float(torch.tensor(scores).mean()), "std": float(torch.tensor(scores).std())}


def main() -> None:
    """Make what is missing, then measure."""
    if not ROOT.exists():
        cache = assets.cache_dir() / "study-1"
        cache.mkdir(parents=True, exist_ok=True)
        ROOT.parent.mkdir(parents=True, exist_ok=True)
        ROOT.unlink(missing_ok=True)  # a link to a cache that was emptied
        ROOT.symlink_to(cache.resolve(), target_is_directory=True)
    with ThreadPoolExecutor(2) as pool:
        training = [
            pool.submit(train_reward_model, name, *of) for name, of in MODELS.items() if not (ROOT / name).exists()
        ]
        if not (ROOT / "policy" / "training.json").exists():
            training.append(pool.submit(run, ("-m", "scripts.study.language_model", str(ROOT / "policy"))))
        if not (ROOT / "adder" / "training.json").exists():
            training.append(pool.submit(run, ("-m", "scripts.study.adder", str(ROOT / "adder"))))
        for done in training:
            done.result()
    if not (ROOT / "train_prompts.jsonl").exists():
        write_prompts()
    if not (ROOT / "smollm2_train.jsonl").exists():
        write_chat_prompts()
    if (ROOT / "facts.json").exists():
        return
    print("measuring them", flush=True)
    held_out = ratings.split(ratings.load("movie"), "validation")
    facts: dict[str, Any] = {name: agreement(name, held_out) for name in MODELS}
    halves = [[half(sentence, which) for sentence in held_out] for which in (0, 1)]
    facts["scores_whose_order_the_warps_keep"] = check_warps()
    facts["people"] = {"kendall_half_0_half_1": float(kendalltau(*halves).statistic)}
    facts["policy"] = json.loads((ROOT / "policy" / "training.json").read_text())
    (ROOT / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
