#!/usr/bin/env bash
# faces-small-10.jsonl: 6,271 pictures of 299 people of CelebA at 32 px, a small ViT, three splits.
# The authors' 561 outer steps. Every finished run is skipped, an interrupted one goes on. A day on one core.
# data/celeba must hold these pictures in the publisher's layout; the numbers are of this subset.
# Made up to commit 5c5acca, before one rule searched every method: git checkout 5c5acca first.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # another number of threads rounds differently
small="--dataset celeba --image-size 32 --model toy_vit --init none --epochs 40 --optimizer adamw --lr 2e-3"
small="$small --warmup-epochs 2 --crop-scale 0.8 --batch-size 64 --weight-decay 0.05 --out runs/faces-small --resume"
for k in 0 1 2; do
  own="$small --ids 10 --split-seed $k"
  for preset in paper code selective; do
    python metaunlearn.py $own --preset $preset --meta-epochs 31
  done
  python baselines.py $own --search --method ga ssd pgu jit influence
  python baselines.py $own --method badt scrub retrain # searching these two takes passes over all of D
  python baselines.py $own --search --all-pictures --name all-pictures --method influence
  python baselines.py $own --search --all-pictures --name all-pictures --method ga ssd pgu jit
  python baselines.py $own --unlearn-epochs 3 --method ft randl amnesiac salun
  python baselines.py $own --method fisher
  ten="$own --meta-epochs 31"
  python metaunlearn.py $ten --aux-loss scrub --name scrub # Table 3
  python metaunlearn.py $ten --aux-loss first --name first
  python metaunlearn.py $ten --aux-loss first --no-accuracy-weight --name first-unweighted
  python metaunlearn.py $ten --aux-loss second --name second
  python metaunlearn.py $ten --aux-loss second --no-accuracy-weight --name second-unweighted
  python metaunlearn.py $ten --no-accuracy-weight --name unweighted
  python metaunlearn.py $ten --inputs logits --name logits # Table 4
  python metaunlearn.py $ten --inputs logits,features --name logits-features
  python metaunlearn.py $ten --inputs logits,features,targets --name logits-features-targets
  python metaunlearn.py $ten --meta-ids 5 --name meta-ids # Table 7
  python evaluate.py --attack $own
done
for figure in 4 5; do
  python evaluate.py --figure $figure $small --ids 10 --seeds 3 --rows metaunlearn-selective ga ssd
done
python evaluate.py --pack results/faces-small-10.jsonl --results runs/faces-small/celeba-ids10-split*
