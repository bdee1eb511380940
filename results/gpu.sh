#!/usr/bin/env bash
# What has not run on a GPU yet: both papers' commands, end to end, at full size; speed and memory.
# At most 25 minutes on one H100 (estimated). Needs data/CelebAMask-HQ and data/cifar10.npz. ViT-B
# starts at random: --init pretrained needs a network. Seconds of each phase and the peak of memory
# stand in runs/gpu/*/*.json; nothing of it is packed.
# DRY="--dry-run --model toy_vit --image-size 32" bash results/gpu.sh tries every command but the
# benchmarks on a CPU, in a minute; ViT-B at 224 px takes there more than five minutes a command.
set -euo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader || echo "no GPU: times mean nothing"
run() { echo "=== $*" && time "$@"; }
faces="--dataset celebahq --ids 20 --init none --out runs/gpu ${DRY:-}"
images="--dataset cifar10 --forget-ratio 0.1 --epochs 30 --out runs/gpu ${DRY:-}"
run python metaunlearn.py $faces
run python metaunlearn.py $faces --check-gradient
run python metaunlearn.py $faces --natural 0.001 --meta-epochs 1 --name natural
run python metaunlearn.py $faces --no-amp --meta-epochs 1 --epochs 1 --name float32 --checkpoint-dir checkpoints/float32
run python baselines.py $faces --method ga ssd pgu jit influence
run python ltu.py $images --rho 0.3
run python ltu.py $images --rho 0.3 --no-amp --passes 1 --name float32 --checkpoint-dir checkpoints/float32
run python baselines.py $images --method ft fisher ssd salun scrub pgu influence
if [ -z "${DRY:-}" ]; then
  run python tests/bench_metaunlearn.py --model vit_base_patch16_224 --image-size 224
  run python tests/bench_ltu.py --model resnet18 --size 32 --k 256
fi
