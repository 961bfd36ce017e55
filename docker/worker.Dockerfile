# The worker, with CUDA's torch; it runs on a CPU too. Build from the repository's root:
#   docker build -f docker/worker.Dockerfile .
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /build
COPY . .
RUN python docker/requirements.py worker perceptual >/requirements.txt \
    && pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.11-slim-bookworm
ENV PATH=/opt/polycollide/bin:$PATH PYTHONUNBUFFERED=1
# A layer of 6 GB that our code leaves alone: it changes with the list of requirements only.
COPY --from=wheel /requirements.txt /opt/
RUN python -m venv --without-pip /opt/polycollide \
    && pip --python /opt/polycollide/bin/python install --no-cache-dir --requirement /opt/requirements.txt
COPY --from=wheel /wheel /wheel
# Volumes take their owner from the folders that they cover.
RUN pip --python /opt/polycollide/bin/python install --no-cache-dir --no-deps /wheel/*.whl \
    && useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin polycollide \
    && install -d -o 10001 -g 10001 \
        /var/lib/polycollide/checkpoints /var/lib/polycollide/patches /var/lib/polycollide/torch

USER 10001:10001
# nvidia-smi (utility) tells which GPUs there are.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    POLYCOLLIDE_CHECKPOINT_DIR=/var/lib/polycollide/checkpoints \
    POLYCOLLIDE_PATCHES=/var/lib/polycollide/patches \
    TORCH_HOME=/var/lib/polycollide/torch \
    MPLCONFIGDIR=/tmp/matplotlib
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-P", "-m", "worker.health"]
CMD ["polycollide", "worker"]
