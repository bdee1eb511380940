#!/usr/bin/env bash
# cifar10-small-10.jsonl, cifar10-small-50.jsonl: 6,000 training images of CIFAR-10 at 16 px, three seeds.
# Every finished run is skipped, an interrupted one goes on. About a night on one core.
# Made up to commit 5c5acca, before one rule searched every method: git checkout 5c5acca first.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
small="--dataset cifar10 --image-size 16 --train-images 6000 --model toy_resnet --augment none --schedule cosine"
small="$small --keep last --epochs 40 --batch-size 64 --warmup-epochs 1 --out runs/cifar10-small --resume"
steps="--support-size 64 --iterations 50 --alpha 0.05 --beta 0.1"
for k in 0 1 2; do
  tenth="$small --forget-ratio 0.1 --split-seed $k --seed $k"
  half="$small --forget-ratio 0.5 --split-seed $k --seed $k"
  for share in "$tenth" "$half"; do
    python baselines.py $share --search
    python baselines.py $share --method retrain
    python ltu.py $share $steps
  done
  python ltu.py $half $steps --iterations 200 --support-size 128 --name 8x-passes
  python baselines.py $tenth --search --rho 0.1 --name rho0.1 --method ft randl badt salun
  python baselines.py $tenth --search --rho 0.3 --name rho0.3 --method ft randl badt salun amnesiac scrub
  python ltu.py $tenth $steps --rho 0.1 --name rho0.1
  python ltu.py $tenth $steps --rho 1 --name rho1
  for part in forfeed remfeed metaopt; do python ltu.py $tenth $steps --no-$part --name no-$part; done
  for way in add iterative; do python ltu.py $tenth $steps --combine $way --name $way; done
  python ltu.py $tenth $steps --first-order --name first-order
  for share in "$tenth" "$half"; do python evaluate.py --attack $share; done
done
python evaluate.py --pack results/cifar10-small-10.jsonl --results runs/cifar10-small/cifar10-random0.1-*
python evaluate.py --pack results/cifar10-small-50.jsonl --results runs/cifar10-small/cifar10-random0.5-*
