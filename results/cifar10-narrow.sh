#!/usr/bin/env bash
# cifar10-narrow-10.jsonl: all of CIFAR-10 (50,000 training images, 32 px), a ResNet-18 of quarter width, 10 % forgotten.
# Flags are searched on seed 0, by its validation images. Every finished run is skipped, an interrupted one goes on.
# On one of two cores with bf16 units: a model 20 minutes, a search that reads D_r 40 to 80 minutes, one that does not
# 15 to 30, LTU's 4 to 5 hours.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
narrow="--dataset cifar10 --model resnet18_w16 --amp --epochs 16 --plain-epochs 6 --batch-size 128 --schedule cosine"
narrow="$narrow --warmup-epochs 1 --keep last --out runs/cifar10-narrow --resume"
zero="$narrow --split-seed 0 --seed 0"
python baselines.py $zero --search
python baselines.py $zero --method retrain
python ltu.py $zero --search
for rho in 0.3 0.1; do
  python baselines.py $zero --search --rho $rho --name rho$rho --method ft randl badt salun
done
python ltu.py $zero --search --rho 0.1 --name rho0.1
python evaluate.py --pack results/cifar10-narrow-10.jsonl --results runs/cifar10-narrow/cifar10-random0.1-*
