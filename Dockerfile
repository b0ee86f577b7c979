# CPU:   docker build -t dora-convert .
# CUDA:  docker build -t dora-convert:cuda --build-arg TORCH=https://download.pytorch.org/whl/cu128 .
# Run:   docker run --rm -v "$PWD:/work" dora-convert merge ./base ./adapter ./merged
#        with --gpus all for CUDA, and -v ~/.cache/huggingface:/cache for the Hub's cache
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY dora_convert dora_convert
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels

FROM python:3.13-slim
ARG TORCH=https://download.pytorch.org/whl/cpu
ARG EXTRA=""
RUN pip install --no-cache-dir torch --index-url "$TORCH"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)$EXTRA" && rm -r /wheels \
    && useradd --create-home --uid 1000 user && mkdir /work /cache && chown user /work /cache
USER user
ENV HF_HOME=/cache
WORKDIR /work
ENTRYPOINT ["dora-convert"]
CMD ["--help"]
