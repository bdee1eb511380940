"""What each baseline costs, as a multiple of one plain training epoch over the data that it uses.

    python tests/bench_baselines.py                       # digits
    python tests/bench_baselines.py --dataset toyfaces

Models are untrained, which changes no time. passes: how many times the method's published code runs
over that data, forward and backward counting as one. A round times the epoch and then the method;
the median of three rounds is shown.
"""

import copy
import pathlib
import sys
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import baselines as B
import common
from train import open_data


def passes(method: str, own) -> float:
    """A teacher's forward pass is a third; Fisher's code takes one pass a class, Influence two."""
    rounds = getattr(own, "unlearn_epochs", None) or 0
    special = {"fisher": 10, "ssd": 1, "pgu": 1 + rounds * 0.1, "badt": rounds * 5 / 3}
    special |= {"salun": rounds + 0.1, "scrub": rounds * 4 / 3, "influence": 2}
    special |= {"jit": rounds * (1 + B.JIT_NOISES / 3)}
    return special.get(method, rounds)


def main():
    args = B.parse_args()
    data, split = open_data(args, common.choose_device(args))
    sets = B.sets_of(split, args)
    model = common.build_model(args.model, data["classes"], args.image_size)
    model = model.to(data["device"]).eval()
    for method in args.method:
        own, ratios, seconds = B.own_args(method, args), [], []
        used = torch.cat([sets[name] for name in B.access(method, own).values()])
        plain = B.own_args("ft", args, unlearn_batch_size=own.unlearn_batch_size)
        for _ in range(3):
            begin, copied = time.perf_counter(), copy.deepcopy(model).train()
            optimizer, rng = B.new_optimizer(copied, plain), common.generator(0)
            for batch in B.batches(used, own.unlearn_batch_size, rng):
                B.descend(optimizer, B.loss_of(copied, data, batch, plain, rng))
            epoch = time.perf_counter() - begin
            seconds.append(B.run(method, model, data, sets, own)[1])
            ratios.append(seconds[-1] / epoch)
        took, ratio = f"{np.median(seconds):7.2f} s", f"{np.median(ratios):6.2f} x an epoch"
        of = f"over {len(used):,} images (passes: {passes(method, own):.1f})"
        print(f"{method:9s} {took}   {ratio} {of}", flush=True)


if __name__ == "__main__":
    main()
