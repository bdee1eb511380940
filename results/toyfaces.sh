#!/usr/bin/env bash
# toyfaces.jsonl, toyfaces-heldout.jsonl: drawn faces, 10 of 120 people forgotten, five splits.
# Every finished run is skipped, an interrupted one goes on. About five hours on one core.
# Made by commit 5c5acca, before one rule searched every method: git checkout 5c5acca first.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
for k in 0 1 2 3 4; do
  own="--dataset toyfaces --ids 10 --split-seed $k --resume"
  for preset in paper code selective; do
    python metaunlearn.py $own --preset $preset
    python metaunlearn.py $own --preset $preset --held-out
  done
  python metaunlearn.py $own --aux-loss scrub --name scrub # Table 3
  python metaunlearn.py $own --aux-loss first --name first
  python metaunlearn.py $own --aux-loss first --no-accuracy-weight --name first-unweighted
  python metaunlearn.py $own --aux-loss second --name second
  python metaunlearn.py $own --aux-loss second --no-accuracy-weight --name second-unweighted
  python metaunlearn.py $own --no-accuracy-weight --name unweighted
  python metaunlearn.py $own --inputs logits --name logits # Table 4
  python metaunlearn.py $own --inputs logits,features --name logits-features
  python metaunlearn.py $own --inputs logits,features,targets --name logits-features-targets
  python metaunlearn.py $own --meta-ids 5 --name meta-ids # Table 7
  python baselines.py $own --search
  python baselines.py $own --search --all-pictures --name all-pictures --method ga ssd pgu jit influence
  python baselines.py $own --method retrain
  python baselines.py $own --held-out --search --method ga
  if [ $k -lt 3 ]; then python baselines.py $own --held-out --search --method influence; fi
  python evaluate.py --attack $own
done
for figure in 4 5; do
  python evaluate.py --figure $figure --dataset toyfaces --seeds 5 --rows metaunlearn-selective ga ssd
done
python evaluate.py --pack results/toyfaces.jsonl --results runs/toyfaces-ids10-split*
python evaluate.py --pack results/toyfaces-heldout.jsonl --results runs/toyfaces-ids10-heldout-split*
