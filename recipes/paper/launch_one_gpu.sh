#!/bin/sh
# One GPU of 80 GB: the student's vLLM in the same process, asleep while it trains.
#
#     recipes/paper/launch_one_gpu.sh recipes/paper/trd-opd-1.7b.yaml [--section.key value …]
set -eu
recipe=$1
shift
onpath doctor "$recipe" "$@"
exec onpath train "$recipe" "$@"
