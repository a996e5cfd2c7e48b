# syntax=docker/dockerfile:1.7
# One image for head, workers and submitter; the tag carries Ray's version, which k8s/ and constraints.txt name too. Build:
#   docker build --target cpu -t <registry>/raytune-lora:0.1.0-ray2.60.0-cpu .
#   docker build --target cuda -t <registry>/raytune-lora:0.1.0-ray2.60.0-cu130 .
# Change: the base images, for a mirror or a digest (python@sha256:…), by --build-arg.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# of the CUDA that torch's build on PyPI is for; its compiler is needed here alone, the libraries come with torch
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu22.04

FROM ${CUDA_IMAGE} AS toolkit

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-euxo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libaio-dev make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
ENV VENV=/opt/venv EXTRAS=quickstart,search,tracking
RUN python -m venv "$VENV"

# DeepSpeed's ops are compiled into it (DS_BUILD_…), as a read-only root file system has no room for them later. `make setup` finds
# torch and DeepSpeed installed at their pins, keeps them, and installs the rest: by the very lines that a laptop and CI run.
FROM build AS build-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -E '^(torch|setuptools|ninja|py-cpuinfo)==' constraints.txt > /tmp/first.txt \
    && "$VENV/bin/pip" install --extra-index-url https://download.pytorch.org/whl/cpu --requirement /tmp/first.txt \
    && DS_BUILD_SHM_COMM=1 "$VENV/bin/pip" install --constraint constraints.txt --no-build-isolation deepspeed \
    && make setup

# The optimizer for offloaded states uses the widest instructions of the CPU that builds it: build on the type of the GPU nodes.
# flash-attn has no wheels on PyPI. Its setup.py takes the one for this torch, CUDA and Python from the releases of
# github.com/Dao-AILab/flash-attention; where there is none, it compiles: an hour on eight cores, and MAX_JOBS compilers take
# some 5 GB of memory each. Change: a wheel of one's own, or of a mirror, by --build-arg FLASH_ATTN=https://….whl
FROM build AS build-cuda
ARG FLASH_ATTN=flash-attn==2.8.3.post2
ARG MAX_JOBS=4
COPY --from=toolkit /usr/local/cuda-13.0 /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda DS_ACCELERATOR=cuda TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0" FLASH_ATTN_CUDA_ARCHS="80;90;100"
ENV EXTRAS=quickstart,search,tracking,gpu
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -E '^(torch|setuptools|ninja|py-cpuinfo)==' constraints.txt > /tmp/first.txt \
    && "$VENV/bin/pip" install --requirement /tmp/first.txt \
    && DS_BUILD_CPU_ADAM=1 DS_BUILD_AIO=1 "$VENV/bin/pip" install --constraint constraints.txt --no-build-isolation deepspeed \
    && "$VENV/bin/pip" install --constraint constraints.txt packaging wheel \
    && "$VENV/bin/pip" install --constraint constraints.txt --no-build-isolation "$FLASH_ATTN" \
    && make setup

# g++ stays: Triton compiles the launchers of its kernels at first use, into $HOME.
FROM ${PYTHON_IMAGE} AS runtime
LABEL org.opencontainers.image.title="raytune-lora" \
      org.opencontainers.image.description="Find and train the best LoRA fine-tune of a language model within a budget, on Ray" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libaio1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 ray \
    && useradd --uid 1000 --gid 1000 --create-home ray
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 1000:1000
# Kubernetes has its own probes, and the image starts as three different things.
HEALTHCHECK NONE
CMD ["raytune-lora", "--help"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=build-cpu /app /app

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/venv /opt/venv
COPY --from=build-cuda /app /app
