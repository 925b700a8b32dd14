# gopo-lightning with the versions of requirements.lock. For CPUs:
#     docker build -t gopo-lightning . && docker run --rm -v "$PWD:/work" gopo-lightning quickstart --smoke
# For NVIDIA GPUs, with the package index's own build of torch, which brings CUDA:
#     docker build -t gopo-lightning --build-arg TORCH_INDEX= . && docker run --gpus all --shm-size=8g …
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_ROOT_USER_ACTION=ignore GOPO_CACHE=/cache/gopo_lightning HF_HOME=/cache/huggingface

WORKDIR /opt/gopo_lightning
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY gopo_lightning gopo_lightning
COPY configs configs
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint requirements.lock ".[judge,quickstart]"

WORKDIR /work
ENTRYPOINT ["gopo-lightning"]
