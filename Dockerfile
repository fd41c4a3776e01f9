# Three images: train on a GPU, build and verify on any machine, serve with few packages.
#
#   docker build --target train -t kdexport:train .
#   docker build --target build -t kdexport:build .
#   docker build --target serve --build-arg BUNDLE=dist/mobilenetv2 -t student:1 .
#   docker run -p 127.0.0.1:8000:8000 student:1
FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /work
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY kdexport kdexport
COPY training training
COPY export_configs export_configs

FROM base AS train
RUN pip install -c constraints.txt '.[build-gpu,demo]'
ENTRYPOINT ["kdexport"]
CMD ["train", "--help"]

FROM base AS build
RUN pip install -c constraints.txt '.[build-gpu,demo,trt-rtx]'
ENTRYPOINT ["kdexport"]
CMD ["doctor"]

# Serves one bundle to every client that can reach the container: publish the port on loopback, or pass --token-file.
# Ports: 8000 for requests, 8002 for metrics. Stop with `docker stop -t 30`, so that requests in progress can finish.
FROM base AS serve
ARG BUNDLE=dist/mobilenetv2
RUN pip install -c constraints.txt '.[serve]'
COPY ${BUNDLE} /models/student
RUN useradd --create-home kdexport && kdexport doctor /models/student
USER kdexport
EXPOSE 8000 8002
HEALTHCHECK --start-period=60s CMD ["python", "-c", \
  "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["kdexport"]
CMD ["serve", "/models/student", "--host", "0.0.0.0"]
