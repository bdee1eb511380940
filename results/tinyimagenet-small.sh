#!/usr/bin/env bash
# tinyimagenet-small.jsonl: 3,000 images of 20 classes of Tiny-ImageNet at 32 px, a small ViT, three seeds.
# Every finished run is skipped, an interrupted one goes on. Some hours on one core.
# Made up to commit 5c5acca, before one rule searched every method: git checkout 5c5acca first.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
small="--dataset tinyimagenet --image-size 32 --train-images 3000 --model toy_vit --augment none --keep last"
small="$small --epochs 40 --lr 2e-3 --optimizer adamw --weight-decay 0.05 --batch-size 64 --warmup-epochs 2"
small="$small --out runs/tinyimagenet-small --resume --forget-ratio 0.1"
steps="--support-size 64 --iterations 50 --alpha 0.01 --beta 0.01"
for k in 0 1 2; do
  own="$small --split-seed $k --seed $k"
  python baselines.py $own --search
  python baselines.py $own --method retrain
  for rho in 0.1 0.3; do
    python baselines.py $own --search --rho $rho --name rho$rho --method ft randl badt salun
  done
  python ltu.py $own $steps
  python ltu.py $own $steps --rho 0.1 --name rho0.1
  for part in forfeed remfeed metaopt; do python ltu.py $own $steps --no-$part --name no-$part; done
  for way in add iterative; do python ltu.py $own $steps --combine $way --name $way; done
  python evaluate.py --attack $own
done
python evaluate.py --pack results/tinyimagenet-small.jsonl --results runs/tinyimagenet-small/*
