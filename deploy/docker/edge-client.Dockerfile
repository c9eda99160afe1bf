# Farfield's edge client, which runs where the data lies. Built from the root of the repository:
#
#   docker build --file deploy/docker/edge-client.Dockerfile --tag farfield-edge-client:0.1.0 .
#
# With CUDA, add: --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130
# The CUDA libraries come as Python packages of torch, so the base image stays the same; the host brings the driver.
# To pin the base image by its content: --build-arg PYTHON_IMAGE=python@sha256:…
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# Both images have the same first stage, so whoever builds both builds it once.
FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# Optional parts of the package, for example --build-arg EXTRAS=[postgresql]
ARG EXTRAS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/farfield
ENV PATH=/opt/farfield/bin:$PATH
# Only torch itself comes from its own index. What it needs comes from PyPI in the next step, so that no other package
# can be taken from a second place.
RUN pip install --no-cache-dir setuptools==84.2.1 \
    && pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX_URL}" torch==2.13.0
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY protocols ./protocols
COPY kernels ./kernels
COPY emulator ./emulator
COPY edge_client ./edge_client
COPY coordinator ./coordinator
# An index that serves the wheel under another local version (2.13.0+cpu, +cu130) satisfies the pin torch==2.13.0.
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && wheel="$(echo /wheels/farfield-*.whl)" \
    && pip install --no-cache-dir --constraint constraints.txt "farfield${EXTRAS} @ file://${wheel}" \
    && pip check

FROM ${PYTHON_IMAGE} AS run
LABEL org.opencontainers.image.title="farfield-edge-client" \
      org.opencontainers.image.description="The edge client of a federation: trains where the data lies" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10002 farfield \
    && useradd --uid 10002 --gid farfield --no-create-home --home-dir /var/lib/farfield --shell /usr/sbin/nologin farfield \
    && install --directory --mode=0700 --owner=farfield --group=farfield /var/lib/farfield
COPY --from=build /opt/farfield /opt/farfield
# PATH: the SuperLink starts flower-superexec by its name.
# Nothing here may look for a model hub, or tell anyone that it runs.
ENV PATH=/opt/farfield/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    MPLCONFIGDIR=/tmp/matplotlib \
    FARFIELD_EDGE_HOME=/var/lib/farfield/edge-client
VOLUME /var/lib/farfield
WORKDIR /var/lib/farfield
STOPSIGNAL SIGTERM
# `status` answers whether or not the process lives, so it is asked what it says.
HEALTHCHECK --interval=30s --timeout=20s --start-period=90s --retries=3 \
    CMD ["/bin/sh", "-c", "edge-client status --json | grep -q 'running.: true'"]
USER 10002:10002
ENTRYPOINT ["edge-client"]
CMD ["start"]
