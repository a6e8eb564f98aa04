# An image that needs no network: OpenAI's API on port 8000, the weights in it, their digests checked at every start.
#   docker build --build-arg MODEL=runs/qwen-merged -t malpyeong .
#   docker run --rm --network none --gpus all malpyeong         (or -p 8000:8000 in place of --network none)
# On a machine without a GPU: --build-arg LOCK=requirements.lock --build-arg EXTRAS=serve,retrieval
FROM python:3.11

ARG LOCK=constraints/gpu-vllm.txt
ARG EXTRAS=serve,retrieval,vllm
WORKDIR /app
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY constraints constraints
COPY malpyeong malpyeong
RUN pip install --no-cache-dir --constraint "$LOCK" ".[$EXTRAS]"

# The folder that python -m malpyeong.export wrote.
ARG MODEL
COPY ${MODEL} /model
RUN cd /model && find . -type f -print0 | sort -z | xargs -0 sha256sum > /app/model.sha256

ENV HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
RUN useradd --create-home serve
USER serve
WORKDIR /home/serve
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
CMD ["python", "-m", "malpyeong.serve", "/model", "--name", "malpyeong", "--manifest", "/app/model.sha256", "--host", "0.0.0.0", "--port", "8000"]
