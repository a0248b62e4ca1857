#!/bin/sh
# What benchmarks/gpu.py needs on a machine without a network that has Python 3.12, torch 2.11, transformers
# 5.17, peft, accelerate, pyarrow, pandas and pytest already: wheels (x86-64 Linux), and the commit they go with.
#
#     benchmarks/gather_wheels.sh [DIRECTORY]        default: wheels
#
# gpu.py --wheels DIRECTORY uses those that are missing there, and only those.
set -eu
directory=$(mkdir -p "${1:-wheels}" && cd "${1:-wheels}" && pwd)
cd "$(dirname "$0")/.."
python=.venv/bin/python
test -x "$python" || python=python3
# --no-deps, every need by its name: nothing may bring another torch along.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    --constraint constraints.txt --dest "$directory" \
    pydantic pydantic-core annotated-types typing-inspection typing-extensions \
    math-verify latex2sympy2-extended antlr4-python3-runtime \
    datasets dill multiprocess xxhash \
    rich markdown-it-py mdurl pygments \
    httpx httpcore h11 anyio sniffio idna certifi \
    jaxtyping wadler-lindig beartype hypothesis sortedcontainers \
    trl liger-kernel
git rev-parse --short HEAD > "$directory/commit" 2> /dev/null || true
du -sh "$directory"
