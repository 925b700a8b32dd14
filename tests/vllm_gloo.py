"""Weights from a trainer to `vllm serve` over gloo: stands in for NCCL where there is no GPU.

A server imports this by ``--worker-extension-cls tests.vllm_gloo.Extension``.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
)

_FROM_TRAINER = dist.BroadcastOptions()
_FROM_TRAINER.rootRank = 0


class Extension:
    """Nothing more: that its module is imported is enough."""


def _group(info: Any, rank: int) -> Any:
    return stateless_init_torch_distributed_process_group(
        info.master_address, info.master_port, rank, info.world_size, "gloo", timeout=timedelta(seconds=60)
    )


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """On the server."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        config = self.parallel_config
        rank = config.data_parallel_index * config.world_size + config.rank + init_info.rank_offset
        self.model_update_group = _group(init_info, rank)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        info = self.parse_update_info(update_info)
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast([weight], _FROM_TRAINER).wait()
            self.model.load_weights([(name, weight)])

    def shutdown(self) -> None:
        self.model_update_group = None


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """On the trainer."""

    backend: ClassVar[str] = "gloo"


class GlooTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):
    """On the trainer."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Any:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender, packed=False)
        if engine.is_sender:
            worker = NCCLWeightTransferInitInfo(
                master_address=init_info.master_address,
                master_port=init_info.master_port,
                rank_offset=1,
                world_size=init_info.world_size,
            )
            with ThreadPoolExecutor(1) as pool:
                theirs = pool.submit(client.init_weight_transfer_engine, worker_init_payload(worker))
                engine.model_update_group = _group(init_info, 0)
                theirs.result()
        return engine

    def _broadcast(self, source: Any, meta: Any) -> None:
        pairs: Iterator[tuple[str, torch.Tensor]] = self._checked_iter(source, meta) if self.is_sender else iter(source)
        for _, tensor in pairs:
            if self.is_sender:
                self.model_update_group.broadcast([tensor.contiguous()], _FROM_TRAINER).wait()  # type: ignore[union-attr]

    def shutdown(self) -> None:
        self.model_update_group = None


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerWeightTransferEngine)
