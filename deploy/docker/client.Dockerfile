# syntax=docker/dockerfile:1.7
#
# The client, from the top of the repository:
#
#   docker build -f deploy/docker/client.Dockerfile -t blindtune-client:0.1.0 .
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
# The client computes attention, norms and the adapter on the CPU. An empty index takes PyPI's torch with CUDA.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip --python /opt/blindtune/bin/python install ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} \
        -c constraints.txt '.[client]'

FROM ${PYTHON_IMAGE} AS client
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="blindtune-client" \
      org.opencontainers.image.description="Fine-tunes on private data with workers that never see it" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 blindtune \
    && useradd --uid 10001 --gid blindtune --no-create-home --home-dir /tmp --shell /usr/sbin/nologin blindtune
# The root filesystem may be read-only. Data, output, kits and the key of the training record are the owner's:
# they lie in /srv/blindtune, which is mounted, and never in a layer.
ENV PATH=/opt/blindtune/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/tmp/numba \
    HF_HOME=/srv/blindtune/.cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DO_NOT_TRACK=1 \
    BLINDTUNE_CACHE=/srv/blindtune/.cache/blindtune \
    BLINDTUNE_CONFIG=/srv/blindtune/.config/blindtune
WORKDIR /srv/blindtune
USER 10001:10001
# A run ends after the step under way and leaves a checkpoint: give it time, docker stop --time 900.
STOPSIGNAL SIGTERM
COPY --from=build /opt/blindtune /opt/blindtune
ENTRYPOINT ["tini", "--", "blindtune"]
CMD ["--help"]
