# An image for NVIDIA GPUs: vLLM, with the plugin that packs videos. The model is mounted at /model.
#
#   docker build -t minicpmv-cuda -f deploy/cuda.Dockerfile .
#   docker run --rm --gpus all -p 8000:8000 -v ~/MiniCPM-V-4_5:/model:ro minicpmv-cuda
FROM vllm/vllm-openai:v0.32.0

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /app
COPY . .
# vLLM has torch, transformers and the rest, in the versions that it wants; here is what it lacks.
RUN pip install --no-deps -e . && \
    pip install "av>=12" "rich>=13" "typer>=0.12" && \
    useradd --create-home --uid 1000 minicpmv && mkdir /home/minicpmv/.cache && chown 1000 /home/minicpmv/.cache
USER 1000

EXPOSE 8000
HEALTHCHECK --start-period=15m CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["minicpmv"]
CMD ["serve", "-m", "/model", "--engine", "vllm", "--host", "0.0.0.0"]
