# An image for a CPU that serves a model over HTTP: nano, or one that is mounted at /model.
#
#   docker build -t minicpmv .
#   docker run --rm -p 8000:8000 minicpmv
#   docker run --rm -p 8000:8000 -v ~/MiniCPM-V-4_5:/model:ro minicpmv serve -m /model --host 0.0.0.0
#   docker run --rm minicpmv ask assets/number.jpg "What does it say?" -m nano
#
# No passwords: put a proxy with TLS and a login before it where others can reach it.
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /app

# torch for the CPU first: the wheel that pip would pick else brings gigabytes of CUDA.
COPY constraints.txt ./
RUN pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu

COPY . .
RUN pip install -c constraints.txt -e ".[serve,tokenizer]" && \
    minicpmv build-tokenizer && \
    useradd --create-home --uid 1000 minicpmv
USER 1000

EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["minicpmv"]
CMD ["serve", "-m", "nano", "--host", "0.0.0.0"]
