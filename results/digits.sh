#!/usr/bin/env bash
# digits-10.jsonl, digits-50.jsonl: scikit-learn's digits, 10 % of the labels flipped, five seeds.
# Every method searched by one rule. Every finished run is skipped, an interrupted one goes on.
# 1 h 50 min on one core beside another busy one.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
for k in 0 1 2 3 4; do
  tenth="--dataset digits --forget-ratio 0.1 --split-seed $k --seed $k --resume"
  half="--dataset digits --forget-ratio 0.5 --split-seed $k --seed $k --resume"
  for share in "$tenth" "$half"; do
    python baselines.py $share --search
    python baselines.py $share --method retrain
    python ltu.py $share --search
  done
  for rho in 0.1 0.3; do
    python baselines.py $tenth --search --rho $rho --name rho$rho --method ft randl badt salun scrub
  done
  for rho in 0.1 1; do python ltu.py $tenth --search --rho $rho --name rho$rho; done
  python ltu.py $tenth --name default
  for part in forfeed remfeed metaopt; do # Table 3, with flags of its own and with LTU's
    python ltu.py $tenth --no-$part --search --name no-$part
    python ltu.py $tenth --no-$part --like ltu --name no-$part-same
  done
  for way in add iterative; do # Table 4
    python ltu.py $tenth --combine $way --search --name $way
    python ltu.py $tenth --combine $way --like ltu --name $way-same
  done
  for share in "$tenth" "$half"; do python evaluate.py --attack $share; done
done
python evaluate.py --pack results/digits-10.jsonl --results runs/digits-random0.1-noise0.1-split*
python evaluate.py --pack results/digits-50.jsonl --results runs/digits-random0.5-noise0.1-split*
