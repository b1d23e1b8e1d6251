# syntax=docker/dockerfile:1
# rlhf on an NVIDIA GPU. The host brings the driver (580 or newer, for CUDA 13) and nvidia-container-toolkit; CUDA's own
# libraries come with torch's wheels.
#
#   docker build -t rlhf .
#   docker run --rm --gpus all -v "$PWD:/work" -v rlhf-cache:/cache --user "$(id -u):$(id -g)" rlhf env

FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv make \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/rlhf/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/cache/huggingface RLHF_CACHE=/cache/rlhf MPLCONFIGDIR=/cache/matplotlib
RUN python3 -m venv /opt/rlhf

# torch first and alone: it is most of the image and changes least.
COPY constraints.txt /src/
RUN pip install --no-cache-dir -c /src/constraints.txt torch setuptools

COPY pyproject.toml MANIFEST.in README.md LICENSE /src/
COPY rlhf_cli /src/rlhf_cli
RUN pip install --no-cache-dir -c /src/constraints.txt '/src[tensorboard]'

# Any user of the host may be the one inside: /work is theirs, /cache is open.
RUN useradd --create-home --uid 10001 rlhf && mkdir -p /work /cache && chmod 1777 /cache && chown rlhf /work
USER rlhf
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["rlhf"]
CMD ["--help"]
