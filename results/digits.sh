#!/usr/bin/env bash
# digits-10.jsonl, digits-50.jsonl: scikit-learn's digits, 10 % of the labels flipped, five seeds.
# Every finished run is skipped, an interrupted one goes on. About four hours on one core.
# Made by commit 5c5acca, before one rule searched every method: git checkout 5c5acca first.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
for k in 0 1 2 3 4; do
  tenth="--dataset digits --forget-ratio 0.1 --split-seed $k --seed $k --resume"
  half="--dataset digits --forget-ratio 0.5 --split-seed $k --seed $k --resume"
  python ltu.py $half --alpha 0.1
  for share in "$tenth" "$half"; do
    python baselines.py $share --search
    python baselines.py $share --method retrain
  done
  python baselines.py $tenth --search --rho 0.1 --name rho0.1 --method ft randl badt salun
  python baselines.py $tenth --search --rho 0.3 --name rho0.3 --method ft randl badt salun amnesiac fisher scrub
  python ltu.py $tenth
  python ltu.py $tenth --rho 0.1 --name rho0.1
  python ltu.py $tenth --rho 1 --name rho1
  for part in forfeed remfeed metaopt; do python ltu.py $tenth --no-$part --name no-$part; done
  for way in add iterative; do python ltu.py $tenth --combine $way --name $way; done
  python ltu.py $tenth --first-order --name first-order
  for K in 2 8; do python ltu.py $tenth --mi-models $K --name $K-mi-models; done
  python ltu.py $tenth --iterations 120 --name 120-iterations
  for share in "$tenth" "$half"; do python evaluate.py --attack $share; done
done
python evaluate.py --pack results/digits-10.jsonl --results runs/digits-random0.1-noise0.1-split*
python evaluate.py --pack results/digits-50.jsonl --results runs/digits-random0.5-noise0.1-split*
