# A pinned environment for the record runs: the versions of constraints.txt, no nightlies.
# Build: docker build -t speedrun .     Run: docker run --gpus all --ipc host -v $PWD/data:/speedrun/data speedrun
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update && \
    apt-get install -y --no-install-recommends git python3-dev python3-venv g++ && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /speedrun
COPY . .
RUN python3 -m venv .venv
RUN .venv/bin/pip install torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 cmake==4.4.4 ninja==1.13.2 pybind11==3.1.0 nvidia-cutlass==4.2.0.0
RUN .venv/bin/pip install tiktoken==0.14.0 tqdm==4.70.1 matplotlib==3.11.2 scipy==1.17.1
RUN SPEEDRUN_CUDA=1 .venv/bin/pip install --no-build-isolation --no-deps -e .
CMD [".venv/bin/speedrun", "start"]
