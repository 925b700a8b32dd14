"""The rollout engine for `vllm serve` elsewhere: prompts are spread over the servers, weights are pushed to them."""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.collectives import all_or_none
from gopo_lightning.distributed.gathering import compute_device
from gopo_lightning.rewards.waiting import Background
from gopo_lightning.rollout.engines.base import (
    Begun,
    OnGroup,
    SamplesAhead,
    SamplingConfig,
    SamplingDtype,
    check_dtype,
    ended,
    sampling_dtype,
)
from gopo_lightning.rollout.engines.vllm_client import Server
from gopo_lightning.rollout.engines.vllm_requests import ServerRollout
from gopo_lightning.rollout.engines.vllm_results import Sampled, check_logprobs, sampling_parameters, to_completions
from gopo_lightning.rollout.engines.vllm_start import check_installed, check_lengths, check_supported
from gopo_lightning.rollout.engines.vllm_sync import WeightSync
from gopo_lightning.types import Completions, PromptBatch

_Group: TypeAlias = tuple[int, Sequence[Sampled]]
_SAMPLING = "sampling on the vLLM servers"
_NCCL = "vllm.distributed.weight_transfer.nccl_engine.NCCLTrainerInitInfo"


class VLLMServerEngine(SamplesAhead):
    """Samples on vLLM servers, which get the policy's weights at each rollout, under any strategy.

    Each server runs the policy's model, with any tensor or data parallelism of its own, and has been started with

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --weight-transfer-config '{"backend": "nccl"}'

    in a private network: its development mode lets anybody replace its weights. The prompts of a step, over all ranks,
    go to the servers in turn, all completions of one to the same server, whose cache computes the prompt once; if that
    server fails, to the next. The text does not depend on the server. Each completion comes with the version of its
    weights, and one of another version is refused.

    Args:
        urls: of the servers, such as http://node7:8000.
        dtype: in which weights are sent. ``auto`` is that of the Trainer's ``precision``, or else of the policy's.
        timeout_seconds: of one request, and of one step of sending weights.
        max_concurrency: most requests of a rank at a time.
        check_every_n_rollouts: how often the policy computes the log-probs of a completion too, one of the first group
            that ends, which stops the run where vLLM's differ: weights may be lost on the way. It costs a forward of
            one completion, beside the sampling of the others.
        master_address: of the machine of rank 0, as the servers reach it; null finds it out.
        api_key_env: name of the environment variable with the servers' key; null sends none.
        transfer: dotted path of the ``…TrainerInitInfo`` of vLLM's transport.

    Raises:
        ValueError: vLLM is not installed here (it sends the weights); or an argument is out of range.
    """

    def __init__(
        self,
        urls: Sequence[str] | str,
        dtype: SamplingDtype = "auto",
        timeout_seconds: float = 600.0,
        max_concurrency: int = 512,
        check_every_n_rollouts: int = 1,
        master_address: str | None = None,
        api_key_env: str | None = None,
        transfer: str = _NCCL,
    ) -> None:
        check_installed("VLLMServerEngine", " here too, which sends the weights")
        check_dtype(dtype)
        addresses = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        if (
            not addresses
            or len(set(addresses)) < len(addresses)
            or not all(url.startswith("http") for url in addresses)
        ):
            raise ValueError(f"urls={urls!r} must name one server or more, each once, such as [http://node7:8000]")
        for name, value in {
            "timeout_seconds": timeout_seconds,
            "max_concurrency": max_concurrency,
            "check_every_n_rollouts": check_every_n_rollouts,
        }.items():
            if not value > 0:
                raise ValueError(f"{name}={value} of VLLMServerEngine must be above 0")
        self.dtype, self.timeout_seconds, self.max_concurrency = dtype, timeout_seconds, max_concurrency
        self.check_every_n_rollouts, self._rollouts = check_every_n_rollouts, 0
        servers = [Server(url, api_key_env, timeout_seconds) for url in addresses]
        self.sync = WeightSync(servers, transfer, master_address)
        self.on_group: OnGroup | None = None
        self._metrics: dict[str, float] = {}
        self._running: Background[list[Sampled]] | None = None

    def check_sampling(self, sampling: SamplingConfig, *, logprobs: bool) -> None:
        """See :class:`ChecksSampling`; asks the servers how they report log-probs.

        Raises:
            ValueError: none of them answers, or they were started in another way than is needed.
        """
        check_supported(sampling, logprobs=logprobs, mode=self.sync.settings().logprobs_mode)

    @torch.no_grad()
    def begin(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        *,
        seeds_N: list[int],
        eos_token_ids: Sequence[int],
    ) -> Begun:
        """See :class:`SamplesAhead`. What was begun before ends first, for it is of other weights.

        Raises:
            ValueError: no server answers; or log-probs are not those of ``model``. Here, or where one waits for the
                completions: a server refuses a request.
            RuntimeError: likewise: all servers have failed in the middle of this rollout.
        """
        device, dtype = compute_device(model), sampling_dtype(self.dtype, model)
        if self._running is not None:
            with all_or_none("the rollout before"):
                self._running.join()
        with torch.autocast(device.type, enabled=False):
            pushed = self.sync.push(model, dtype)
        self._metrics = {
            "servers": float(len(pushed.servers)),
            "weights_version": float(pushed.version.rsplit("-", 1)[1]),
        }
        mode, first_group, on_group = pushed.settings.logprobs_mode, Future[_Group](), self.on_group

        def tell(p: int, group: Sequence[Sampled]) -> None:
            if not first_group.done():
                first_group.set_result((p, group))
            if on_group is not None:
                tokens, cut_off = [each.token_ids for each in group], [each.cut_off for each in group]
                on_group(p, ended(tokenizer, tokens, cut_off))

        def complete(sampled: Sequence[Sampled], of: PromptBatch) -> Completions:
            return to_completions(sampled, tokenizer, of, sampling, eos_token_ids, mode, device)

        with all_or_none(_SAMPLING):  # before the others enter a collective
            check_supported(sampling, logprobs=False, mode=mode)
            limit = pushed.settings.max_model_len  # a server would cut a completion off there
            check_lengths(prompts, sampling, limit, "the vLLM servers", "their --max-model-len")
            rollout = ServerRollout(pushed.servers, pushed.version, self.timeout_seconds, self.max_concurrency)
            parameters = [sampling_parameters(sampling, seed, eos_token_ids) for seed in seeds_N]
        running = self._running = Background(lambda: rollout.sample(prompts.prompts, parameters, tell))

        @cache
        def completions() -> Completions:
            with all_or_none(_SAMPLING), running.cancelled_by_error():
                return complete(running.result(), prompts)

        if self._rollouts % self.check_every_n_rollouts == 0:
            with running.cancelled_by_error():
                with all_or_none(_SAMPLING):
                    p, group = running.result_or(first_group)
                    of = prompts.select(torch.tensor([p]))
                    few = complete(group, of)
                check_logprobs(model, of, few, group, sampling, mode)
        self._rollouts += 1
        return Begun(completions, running.cancel)

    def metrics(self) -> dict[str, float]:
        """Servers that had the weights of the last rollout, and how often weights have been sent in this process."""
        return self._metrics
