#!/usr/bin/env bash
# cifar10-narrow-10.jsonl: all of CIFAR-10 (50,000 training images, 32 px), a ResNet-18 of quarter width, 10 % forgotten.
# One seed; six settings a search. Every finished run is skipped, an interrupted one goes on. On one of two busy cores
# with bf16 units: a model 20 minutes; a search of LTU 3 hours, of FT, RandL, SalUn, SCRUB 30 to 50 minutes, of GA, SSD 10.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
narrow="--dataset cifar10 --model resnet18_w16 --amp --epochs 16 --plain-epochs 6 --batch-size 128 --schedule cosine"
narrow="$narrow --warmup-epochs 1 --keep last --out runs/cifar10-narrow --resume --split-seed 0 --seed 0 --tries 6"
python ltu.py $narrow --search
python baselines.py $narrow --search --method ft ga salun scrub
python baselines.py $narrow --search --rho 0.3 --name rho0.3 --method ft scrub
python evaluate.py --pack results/cifar10-narrow-10.jsonl --results runs/cifar10-narrow/cifar10-random0.1-split0
