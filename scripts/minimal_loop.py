"""GOPO on a page: sample, score, rank, step. Read it from top to bottom.

    python scripts/minimal_loop.py FOLDER        # a Hugging Face causal LM

The gradients are those of the app (`gopo_lightning.GOPOModule`) with the same settings and seed. What the app does
and this does not:

1. It renders prompts with a chat template, from any dataset; these are continued as they stand.
2. It combines several rewards, and learns from comparisons where there are no scores.
3. It may make several updates of one rollout, against the policy that sampled, and add a KL penalty.
4. It forwards a group's prompt once, splits a step by tokens, and leaves tied groups out; all go together here.
5. It warms the learning rate up, validates, saves and resumes, and runs on many devices and in bfloat16.
"""

import argparse
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gopo_lightning.data.sampler import PromptSampler
from gopo_lightning.objectives.advantages import ordinal, valid
from gopo_lightning.objectives.clipped import ClippedSurrogate, policy_loss
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.model import eos_token_ids
from gopo_lightning.rollout import SamplingConfig, TransformersEngine
from gopo_lightning.rollout.engines.streams import stream_seeds
from gopo_lightning.types import Prompt, PromptBatch

PROMPTS = ["The sea", "My aunt", "In summer", "A house", "Nobody", "The radio", "Once", "I love", "At four", "Our idea"]


def reward(text: str) -> float:
    """The share of vowels; NaN, which is no score, without a character."""
    return sum(character in "aeiou" for character in text) / len(text) if text else math.nan


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--prompts_per_step", type=int, default=4)  # P
parser.add_argument("--num_completions", type=int, default=8)  # G
parser.add_argument("--max_new_tokens", type=int, default=32)
parser.add_argument("--lr", type=float, default=5e-5)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
P, G = options.prompts_per_step, options.num_completions

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(options.folder)
model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).to(device).eval()  # no dropout
optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
engine, sampling = TransformersEngine(), SamplingConfig(max_new_tokens=options.max_new_tokens)
config = ClippedSurrogate()
eos = eos_token_ids(model, tokenizer)
pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
dataset = [Prompt(i, tuple(tokenizer(text)["input_ids"]), text) for i, text in enumerate(PROMPTS)]
order = PromptSampler(len(dataset), P, seed=options.seed)

for step in range(options.steps):
    # 1. G completions of each of P prompts, each from a random stream of its own
    rows = order.step(step)
    prompts = PromptBatch.collate([dataset[i] for i in rows], pad).to(device)
    seeds_N = stream_seeds(options.seed, step, rows, G)
    completions = engine.generate(model, tokenizer, prompts, G, sampling, seeds_N=seeds_N, eos_token_ids=eos)

    # 2. a reward for each completion, and its rank within the group: from +2 (best) to -2 (worst)
    rewards_PG = torch.tensor([reward(text) for text in completions.texts], dtype=torch.float64).view(P, G)
    advantages_N = ordinal(rewards_PG).flatten().to(device)

    # 3. the clipped surrogate, over the tokens of all completions that have a score
    valid_N = valid(rewards_PG).flatten().to(device)
    mask_NT = completions.mask_NT & valid_N[:, None]
    logprobs_NT = completion_logprobs(model, prompts, completions).logprobs_NT
    loss, _ = policy_loss(logprobs_NT, None, None, advantages_N, mask_NT, config=config, denominator=mask_NT.sum())

    # 4. one optimiser step
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(f"step {step}: reward {rewards_PG.nanmean():.4f}, loss {loss:+.4f}, gradient norm {norm:.3f}", flush=True)
