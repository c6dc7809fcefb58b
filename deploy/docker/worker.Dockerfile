# syntax=docker/dockerfile:1.7
#
# The worker, from the top of the repository:
#
#   docker build -f deploy/docker/worker.Dockerfile -t blindtune-worker:0.1.0 .
#   docker build -f deploy/docker/worker.Dockerfile -t blindtune-worker:0.1.0-cuda --target cuda .
#
# A tag can be moved. Whoever builds for others names the base by digest:
#   --build-arg PYTHON_IMAGE=python:3.11.13-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
# pip stays out of the environment: nothing installs anything in a running container.
RUN python -m venv --without-pip /opt/blindtune
COPY . .

FROM build AS build-cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip --python /opt/blindtune/bin/python install --extra-index-url "${TORCH_INDEX_URL}" \
        -c constraints.txt '.[worker]'

# PyPI's torch for Linux brings CUDA's libraries with it, so that the base needs none.
FROM build AS build-cuda
RUN pip --python /opt/blindtune/bin/python install -c constraints.txt '.[worker]'

FROM ${PYTHON_IMAGE} AS worker
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="blindtune-worker" \
      org.opencontainers.image.description="Multiplies masked matrices by the frozen layers of a public model" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 blindtune \
    && useradd --uid 10001 --gid blindtune --no-create-home --home-dir /tmp --shell /usr/sbin/nologin blindtune
# The root filesystem may be read-only: what is written (compiled kernels, and the hub's cache if a model is
# named and no folder) goes below HOME. The addresses are this image's; all else is the operator's to say.
ENV PATH=/opt/blindtune/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/tmp/numba \
    TRITON_CACHE_DIR=/tmp/triton \
    OMP_WAIT_POLICY=PASSIVE \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DO_NOT_TRACK=1 \
    BLINDTUNE_WORKER_LISTEN=0.0.0.0:7100 \
    BLINDTUNE_WORKER_HEALTH_ADDRESS=127.0.0.1:7100
WORKDIR /tmp
USER 10001:10001
EXPOSE 7100
STOPSIGNAL SIGTERM
# It asks as a client does, so BLINDTUNE_WORKER_HEALTH_TLS_CA and its companions must be set.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m --retries=3 CMD ["blindtune-worker", "health"]
ENTRYPOINT ["tini", "--", "blindtune-worker"]
CMD ["serve"]

FROM worker AS cuda
USER 0:0
# Triton compiles a small launcher when a kernel is first used. Without a compiler the worker says so in its
# log and takes torch's own int8 product, which is slower.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/blindtune /opt/blindtune
ENV BLINDTUNE_WORKER_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

# The last stage is what a build without --target makes.
FROM worker AS cpu
COPY --from=build-cpu /opt/blindtune /opt/blindtune
