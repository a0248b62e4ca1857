#!/bin/sh
# Eight GPUs of 80 GB in one host: a vLLM server of the student on GPUs 4 to 7, four processes that train on
# 0 to 3. The server reads the trained weights from runs/NAME/weights after each step.
#
#     recipes/paper/launch_eight_gpus.sh recipes/paper/trd-opd-4b.yaml [--section.key value …]
#
# SHARD=layer shards student and teacher over the four, where whole copies do not fit.
set -eu
recipe=$1
shift
student=$(sed -n 's/^ *model: \([^ ,}]*\).*/\1/p; s/^student: {model: \([^,}]*\).*/\1/p' "$recipe" | head -n 1)
room=$(sed -n 's/.*max_model_len: \([0-9]*\).*/\1/p' "$recipe")
CUDA_VISIBLE_DEVICES=4,5,6,7 VLLM_SERVER_DEV_MODE=1 vllm serve "$student" --port 8000 --data-parallel-size 4 \
    --max-model-len "$room" --logprobs-mode processed_logprobs &
server=$!
trap 'kill "$server"' EXIT
until curl --silent --fail http://localhost:8000/health > /dev/null; do
    kill -0 "$server"  # a server that has died ends the script
    sleep 5
done
CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nproc-per-node 4 -m onpath train "$recipe" \
    --rollout.engine vllm --rollout.url http://localhost:8000 ${SHARD:+--parallel.shard "$SHARD"} "$@"
