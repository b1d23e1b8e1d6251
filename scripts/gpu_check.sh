#!/usr/bin/env bash
# What only an NVIDIA GPU can show: the tests marked gpu, then the tiny chain in bfloat16, DPO and PPO on an nf4 base, DPO
# with compiled kernels and with attention in one kernel, and what each of those gains. RLHF_VLLM=PATH/bin/vllm: that too.
#   make gpu-check            (or: scripts/gpu_check.sh [FOLDER FOR THE RUNS])
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
work=${1:-$(mktemp -d)}
root=$PWD

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch sees no CUDA device")'
"$python" -m pytest -m gpu
if [ -n "${RLHF_VLLM:-}" ]; then # the vllm program of an environment of its own: samples, sleeps and judges beside
  "$python" -m pytest tests/stages/test_real_vllm.py
fi

mkdir -p "$work/recipes"
ln -sfn "$root/recipes/tiny" "$work/recipes/tiny"
cd "$work"
case $python in /*) ;; .venv/*) python=$root/$python ;; esac
"$python" "$root/scripts/make_tiny.py" --out demo/world

stage() { # COMMAND RECIPE [OPTION...]
  echo "== rlhf $*"
  "$python" -m rlhf_cli "$1" "recipes/tiny/$2.yaml" --set model.dtype=bfloat16 "${@:3}"
}
stage sft pretrain
stage sft sft
stage train-rm rm
stage dpo dpo
stage orpo orpo
stage simpo simpo
stage ppo ppo --max-steps 8
stage dpo dpo-nf4
stage ppo ppo-function --max-steps 8 --set model.quantization=nf4
stage dpo dpo-lora --output-dir demo/dpo-compiled --set model.kernels=compiled
stage dpo dpo-lora --output-dir demo/dpo-flex --set model.attn_implementation=flex_attention
"$python" "$root/scripts/bench/levers.py"
echo "gpu check passed; the runs are in $work/demo"
