#!/usr/bin/env bash
# faces-vit-5.jsonl, -10, -20: the same pictures at 70 px, a pretrained ViT-S/14 (DINOv2), three splits.
# Every finished run is skipped, an interrupted one goes on. Some days on one core; --amp wants bf16 units.
# Made by commit 5c5acca, before one rule searched every method: git checkout 5c5acca first.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
vit="--image-size 70 --model vit_small_patch14_dinov2 --init vit_small_patch14_dinov2.safetensors --epochs 5"
vit="$vit --optimizer adamw --lr 1e-4 --weight-decay 0.05 --warmup-epochs 0.5 --crop-scale 0.8 --batch-size 32"
vit="$vit --amp --out runs/faces-vit --resume"
few="--val-images 64 --retain-images 64"
for k in 0 1 2; do
  five="$vit --dataset celeba --ids 5 --split-seed $k"
  ten="$vit --dataset celebahq --ids 10 --split-seed $k"
  for own in "$five $few --meta-epochs 1" "$ten $few --meta-epochs 2"; do
    python metaunlearn.py $own --preset paper --eta 0.001
    python metaunlearn.py $own --preset code --alpha 1e-3
    python metaunlearn.py $own --preset selective --alpha 1e-3 --eta 0.03
  done
  twenty="$vit --dataset celeba --ids 20 --split-seed $k $few"
  python metaunlearn.py $twenty --preset paper
  python metaunlearn.py $twenty --preset code --alpha 1e-3
  python metaunlearn.py $twenty --preset selective --alpha 1e-3
  python baselines.py $five --search --method ga ssd pgu jit
done
python evaluate.py --pack results/faces-vit-5.jsonl --results runs/faces-vit/celeba-ids5-split*
python evaluate.py --pack results/faces-vit-10.jsonl --results runs/faces-vit/celebahq-ids10-split*
python evaluate.py --pack results/faces-vit-20.jsonl --results runs/faces-vit/celeba-ids20-split*
