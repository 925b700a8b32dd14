"""Token log-probabilities of completions under a policy, at the sampling temperature, and their gradient.

Two forms with the same result. *Replicated*: a row per completion, [prompt | completion], G*(L + T) tokens a group.
*Shared prefix*: a row per prompt, [prompt | completion 1 | ... | completion G], L + G*T tokens (``shared_prefix/``).
Either way a completion's first token is predicted by the prompt's last position, token t by its token t - 1, and the
LM head runs on those positions of real tokens alone, chunk by chunk; a chunk's logits are recomputed in backward. The
head is entered through the model's own forward, so LoRA, tied embeddings and FSDP's gather keep working.
"""

from gopo_lightning.logprobs.check import Agreement, check_shared_prefix
from gopo_lightning.logprobs.completion import TokenLogprobs, completion_logprobs
from gopo_lightning.logprobs.next_token import next_token_logits

__all__ = ["Agreement", "TokenLogprobs", "check_shared_prefix", "completion_logprobs", "next_token_logits"]
