#!/bin/sh
# Everything that needs a GPU, for a machine without network that is there for ten minutes: runs tests/gpu, then real
# sizes with random weights, with and without LPL. Results are kept after each run; the same command goes on from there.
#
#     benchmarks/gpu.sh                       # ten minutes; PYTHON=... needs a torch with CUDA
#     benchmarks/gpu.sh --seconds 1800 --models sdxl flux
#     benchmarks/gpu.sh --scale tiny          # the same path with shrunken models, on a CPU
#
# Writes benchmarks/results/gpu.json, .md and .png. Afterwards, on any machine, `python -m benchmarks.gpu --estimates`
# adds what --dry_run --for_gpu counts for the same runs.
cd "$(dirname "$0")/.." || exit 1
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
