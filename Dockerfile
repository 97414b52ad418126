# The server and its page (docs/serving.md). CPU by default; for GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /app
COPY requirements.txt requirements-serve.txt requirements-ui.txt ./
# torch first and from its own index, so that the rest finds it there.
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.txt)" \
    && pip install --no-cache-dir -r requirements-ui.txt
COPY . .

RUN useradd --create-home kandinsky && mkdir /data && chown kandinsky /data
USER kandinsky
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]

# The key comes from KANDINSKY_API_KEY: without one the server does not start on an open address.
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0", "--port", "8000", "--output_dir", "/data/outputs", "--cache_dir", "/data/weights"]
CMD ["--config", "configs/config_tiny_t2v.yaml", "--config", "configs/config_tiny_t2i.yaml"]
