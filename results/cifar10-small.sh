#!/usr/bin/env bash
# cifar10-small-50.jsonl: 6,000 training images of CIFAR-10 at 16 px, three seeds, 50 % forgotten.
# Every finished run is skipped, an interrupted one goes on. Some hours on one core.
# Made up to commit 5c5acca, before one rule searched every method: git checkout 5c5acca first.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
small="--dataset cifar10 --image-size 16 --train-images 6000 --model toy_resnet --augment none --schedule cosine"
small="$small --keep last --epochs 40 --batch-size 64 --warmup-epochs 1 --out runs/cifar10-small --resume"
steps="--support-size 64 --iterations 50 --alpha 0.05 --beta 0.1"
for k in 0 1 2; do
  half="$small --forget-ratio 0.5 --split-seed $k --seed $k"
  python baselines.py $half --search
  python baselines.py $half --method retrain
  python ltu.py $half $steps
  python ltu.py $half $steps --iterations 200 --support-size 128 --name 8x-passes
  python evaluate.py --attack $half
done
python evaluate.py --pack results/cifar10-small-50.jsonl --results runs/cifar10-small/cifar10-random0.5-*
