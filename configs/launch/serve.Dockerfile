# `catversion serve` in a container.
#   docker build -f configs/launch/serve.Dockerfile -t catversion-serve .
#   docker run -p 8188:8188 -v catversion:/data -v "$PWD/keys.txt:/keys.txt:ro" catversion-serve --model tiny-sd
#   docker stop --time 60 CONTAINER        lets pictures under way end; what is left is drawn after the next start
# Needs: keys.txt, a line NAME KEY for each user (openssl rand -hex 24 makes a key); a proxy with TLS in front of the port.
# Machine: any with Docker; EXTRAS=serve,cuda with --gpus all, EXTRAS=serve,tpu with --privileged on a TPU host. Cost: the machine's.
# Edit: --build-arg EXTRAS=..., and the options behind the image's name. A model's own safety checker needs the extra torch.
# Result: concepts, pictures and jobs in the volume /data, which the next container goes on with.
FROM python:3.12-slim
ARG EXTRAS=serve

COPY pyproject.toml setup.cfg MANIFEST.in README.md LICENSE /src/
COPY catversion_jax /src/catversion_jax
RUN pip install --no-cache-dir "/src[$EXTRAS]" \
    && useradd --create-home --uid 1000 catversion \
    && install -d -o catversion /data

USER 1000
VOLUME /data
EXPOSE 8188
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8188/health')"]
ENTRYPOINT ["catversion", "serve", "--host", "0.0.0.0", "--keys", "/keys.txt", "--output_dir", "/data"]
CMD ["--model", "tiny-sd"]
