# docker build -t alexnet .                             for CPUs
# docker build -t alexnet --build-arg JAX=cuda13 .      for NVIDIA GPUs, or JAX=cuda12; JAX=tpu for TPUs
# docker run --init --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" alexnet --config=quickstart
# docs/cloud.md has more.

ARG JAX=cpu

FROM python:3.12-slim AS build
RUN python -m venv /opt/alexnet
ENV PATH=/opt/alexnet/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY requirements.txt constraints.txt ./
ARG JAX
RUN pip install -r requirements.txt -c constraints.txt "jax[$JAX]" google-cloud-storage
COPY . .
RUN pip install --no-deps .

FROM python:3.12-slim AS common
COPY --from=build /opt/alexnet /opt/alexnet
RUN useradd --uid=1000 --no-create-home --home-dir=/work alexnet && install --directory --mode=1777 /work
USER 1000
WORKDIR /work
ENV PATH=/opt/alexnet/bin:$PATH HOME=/work
ENTRYPOINT ["alexnet-jax"]

FROM common AS cpu
# docs/performance.md, "Faster training on CPUs"
ENV GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.hugetlb=1

FROM common AS cuda13
# for the NVIDIA Container Toolkit, which mounts the driver
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM cuda13 AS cuda12

FROM common AS tpu

FROM $JAX
