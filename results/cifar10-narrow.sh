#!/usr/bin/env bash
# cifar10-narrow-10.jsonl: all of CIFAR-10 (50,000 training images, 32 px), a ResNet-18 of quarter width, 10 % forgotten.
# Flags are searched on seed 0, six settings each, and kept for seed 1. Every finished run is skipped, an interrupted one
# goes on. Seed 0 on one of two busy cores with bf16 units: a model 20 minutes; a search of LTU 3 hours, of FT, SalUn,
# SCRUB 30 to 50 minutes, of GA 10. Seed 1 in float32, on one of two cores without such units: a model an
# hour, LTU 37 minutes, the others 2 to 10.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
narrow="--dataset cifar10 --model resnet18_w16 --epochs 16 --plain-epochs 6 --batch-size 128 --schedule cosine"
narrow="$narrow --warmup-epochs 1 --keep last --out runs/cifar10-narrow --resume"
zero="$narrow --amp --split-seed 0 --seed 0 --tries 6"
python ltu.py $zero --search
python baselines.py $zero --search --method ft ga salun scrub
python baselines.py $zero --search --rho 0.3 --name rho0.3 --method ft scrub
one="$narrow --split-seed 1 --seed 1"
python ltu.py $one --beta 0.0316 --alpha 0.1 --passes 8
python baselines.py $one --method ft --unlearn-lr 0.0316 --unlearn-epochs 3
python baselines.py $one --method ga --unlearn-lr 0.000281
python baselines.py $one --method salun --unlearn-lr 0.013 --mask-share 0.969 --unlearn-epochs 3
python baselines.py $one --method scrub --unlearn-lr 0.0158 --ascent-epochs 3 --unlearn-epochs 3
python baselines.py $one --rho 0.3 --name rho0.3 --method ft --unlearn-lr 0.0316 --unlearn-epochs 3
python baselines.py $one --rho 0.3 --name rho0.3 --method scrub --unlearn-lr 0.0158 --ascent-epochs 3 --unlearn-epochs 3
python ltu.py $one --beta 0.0316 --passes 8 --no-metaopt --name no-metaopt-same # Table 3, with LTU's flags
python ltu.py $one --beta 0.0316 --alpha 0.1 --passes 8 --no-forfeed --name no-forfeed-same
python evaluate.py --pack results/cifar10-narrow-10.jsonl --results runs/cifar10-narrow/cifar10-random0.1-split*
