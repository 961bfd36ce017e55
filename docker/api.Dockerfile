# The API, the reconciler, the sweeper and the migrations: what needs no torch. Build from the repository's root:
#   docker build -f docker/api.Dockerfile .
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /build
COPY . .
RUN python docker/requirements.py api >/requirements.txt \
    && pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.11-slim-bookworm
ENV PATH=/opt/polycollide/bin:$PATH PYTHONUNBUFFERED=1
# A layer that our code leaves alone: it changes with the list of requirements only.
COPY --from=wheel /requirements.txt /opt/
RUN python -m venv --without-pip /opt/polycollide \
    && pip --python /opt/polycollide/bin/python install --no-cache-dir --requirement /opt/requirements.txt
COPY --from=wheel /wheel /wheel
RUN pip --python /opt/polycollide/bin/python install --no-cache-dir --no-deps /wheel/*.whl \
    && useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin polycollide

USER 10001:10001
ENV POLYCOLLIDE_HOST=0.0.0.0 POLYCOLLIDE_PORT=8000
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["polycollide", "api"]
