# Two images in one file:
#
#   docker build -t hymba:latest .                      GPU: NVIDIA's PyTorch image, its torch, this package, its kernels
#   docker build -t hymba:cpu --target cpu .            slim, for CPUs: data preparation, plans, the demo
#
# The GPU packages are compiled (MAX_JOBS bounds memory; expect 20 minutes and more). Nothing replaces the base image's
# torch, Transformer Engine or flash-attn: they are built for one another.
#
# hadolint global ignore=DL3059
# (one RUN a step on purpose: a step that fails late does not cost the compiled ones before it)
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG CPU_IMAGE=python:3.12-slim

# ---- CPU ------------------------------------------------------------------------------------------------------------
FROM ${CPU_IMAGE} AS cpu
ARG TORCH_VERSION=2.13.0
ARG MEGATRON_VERSION=0.19.2
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN python -m venv /opt/hymba
ENV PATH=/opt/hymba/bin:${PATH}
RUN pip install "torch==${TORCH_VERSION}+cpu" --extra-index-url "${TORCH_INDEX}"
RUN pip install --no-deps --ignore-requires-python "megatron-core==${MEGATRON_VERSION}"
COPY setup.py pyproject.toml constraints.txt README.md LICENSE /src/
COPY hymba_train /src/hymba_train
COPY data_prep /src/data_prep
COPY launch /src/launch
COPY recipes /src/recipes
RUN pip install -c /src/constraints.txt "/src[hf,data]" && rm -rf /src
RUN useradd --create-home --uid 1000 hymba
USER 1000
WORKDIR /home/hymba
RUN hymba doctor --quick
HEALTHCHECK --interval=10m --timeout=2m CMD ["hymba", "version"]
ENTRYPOINT ["hymba"]
CMD ["--help"]

# ---- GPU ------------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS gpu
ARG MEGATRON_VERSION=0.19.2
ARG MAMBA_VERSION=2.3.2.post1
ARG CAUSAL_CONV_VERSION=1.7.0
ARG MAX_JOBS=4
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0 10.0"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS} \
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# What the base image brings stays as it is: pip may add to it, and fails rather than replace these.
RUN pip freeze | grep -iE '^(torch|triton|transformer|flash)' > /opt/of_the_image.txt && cat /opt/of_the_image.txt
RUN pip install --no-deps "megatron-core==${MEGATRON_VERSION}"
RUN pip install --no-deps --no-build-isolation "causal-conv1d==${CAUSAL_CONV_VERSION}"
RUN pip install --no-deps --no-build-isolation "mamba-ssm==${MAMBA_VERSION}"
COPY setup.py pyproject.toml constraints.txt README.md LICENSE /src/
COPY hymba_train /src/hymba_train
COPY data_prep /src/data_prep
COPY launch /src/launch
COPY recipes /src/recipes
RUN pip install -c /opt/of_the_image.txt "/src[hf,data,wandb]" einops && rm -rf /src
# There is no GPU and no driver while an image is built, so what this page finds broken may be well in a container.
RUN hymba doctor --quick || echo "run 'hymba doctor' in a container on a GPU machine"
# A normal user; the image's own is root. Some base images have a user 1000 already.
RUN id -u 1000 > /dev/null 2>&1 || useradd --create-home --uid 1000 hymba
USER 1000
WORKDIR /workspace
HEALTHCHECK --interval=10m --timeout=2m CMD ["hymba", "version"]
CMD ["hymba", "--help"]
