#!/usr/bin/env bash
# toyfaces.jsonl: drawn faces, 10 of 120 people forgotten, five splits. Every method searched by one
# rule. Every finished run is skipped, an interrupted one goes on. About four hours on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
for k in 0 1 2 3 4; do
  own="--dataset toyfaces --ids 10 --split-seed $k --resume"
  for preset in paper code selective; do
    python metaunlearn.py $own --search --preset $preset
  done
  python metaunlearn.py $own --search --preset selective --meta-epochs 3 --name 3-epochs
  python metaunlearn.py $own --search --preset selective --natural 0.005 --name natural
  python metaunlearn.py $own --name default
  python metaunlearn.py $own --search --aux-loss scrub --name scrub # Table 3
  python metaunlearn.py $own --search --aux-loss first --name first
  python metaunlearn.py $own --search --aux-loss first --no-accuracy-weight --name first-unweighted
  python metaunlearn.py $own --search --aux-loss second --name second
  python metaunlearn.py $own --search --aux-loss second --no-accuracy-weight --name second-unweighted
  python metaunlearn.py $own --search --no-accuracy-weight --name unweighted
  python metaunlearn.py $own --search --inputs logits --name logits # Table 4
  python metaunlearn.py $own --search --inputs logits,features --name logits-features
  python metaunlearn.py $own --search --inputs logits,features,targets --name logits-features-targets
  python metaunlearn.py $own --search --meta-ids 5 --name meta-ids # Table 7
  python baselines.py $own --search
  python baselines.py $own --search --all-pictures --name all-pictures --method ga ssd pgu jit influence
  python baselines.py $own --method retrain
  python evaluate.py --attack $own
done
for figure in 4 5; do
  python evaluate.py --figure $figure --dataset toyfaces --seeds 5 --rows metaunlearn-selective ga ssd
done
python evaluate.py --pack results/toyfaces.jsonl --results runs/toyfaces-ids10-split*
