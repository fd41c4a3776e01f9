# Three stages for three places: train on a GPU, build and verify anywhere, serve small.
#
#   docker build --target train -t kdexport:train .
#   docker build --target build -t kdexport:build .
#   docker build --target serve --build-arg BUNDLE=dist/mobilenetv2 -t student:1 .
FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /work
COPY pyproject.toml constraints.txt README.md ./
COPY kdexport kdexport
COPY training training
COPY export_configs export_configs

FROM base AS train
RUN pip install -c constraints.txt '.[demo]'
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]

FROM base AS build
RUN pip install -c constraints.txt '.[demo,trt-rtx]'
ENTRYPOINT ["kdexport"]
CMD ["doctor"]

# Proves, inside the image that will hold it, that the bundle is what was trained; the container ends with that verdict.
FROM base AS serve
ARG BUNDLE=dist/mobilenetv2
RUN pip install -c constraints.txt .
COPY ${BUNDLE} /bundle
RUN useradd --create-home kdexport
USER kdexport
ENTRYPOINT ["kdexport"]
CMD ["verify", "/bundle"]
