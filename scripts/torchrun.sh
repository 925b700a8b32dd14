#!/bin/sh
# Start one training job on several machines with torchrun: run this same line on each of them.
#   NODES=2 RENDEZVOUS=first-machine:29500 scripts/torchrun.sh --config A.yaml --config strategy/fsdp2
# A rank that dies ends the job on every machine within a minute; the same line then goes on from the last checkpoint.
set -eu
NODES=${NODES:-1}
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if [ "$GPUS" -lt 1 ]; then
  echo "no GPU is listed here; set GPUS to the number of processes on this machine, and trainer.accelerator" >&2
  exit 2
fi
exec torchrun \
  --nnodes "$NODES" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:-localhost:29500}" --rdzv-id "${JOB:-gopo}" \
  -m gopo_lightning fit "$@" \
  --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --ckpt_path last
