"""What each baseline's unlearning costs, as a multiple of one plain training epoch over the data it uses, in one run.

    python tests/bench_baselines.py                       # digits
    python tests/bench_baselines.py --dataset toyfaces

Models are untrained, which changes no time. passes: how many times the method's published code runs over that data, forward and
backward counting as one. A round times the epoch and then the method; the median of three rounds is shown.
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
import data as D

# Forward and backward over the data of ACCESS: epochs of the preset; distillation adds the teachers' forward passes (a third each).
PASSES = {
    "ft": lambda a: a.unlearn_epochs,
    "randl": lambda a: a.unlearn_epochs,
    "ga": lambda a: a.unlearn_epochs,
    "amnesiac": lambda a: a.unlearn_epochs,
    "fisher": lambda a: 10,  # one backward pass for each of 10 classes, one image at a time
    "ssd": lambda a: 1,
    "badt": lambda a: a.unlearn_epochs * 5 / 3,
    "salun": lambda a: a.unlearn_epochs + 0.1,
    "scrub": lambda a: a.unlearn_epochs * 4 / 3,
    "pgu": lambda a: 1 + a.unlearn_epochs * 0.1,
    "jit": lambda a: a.unlearn_epochs * (1 + a.jit_noises / 3),
    "influence": lambda a: 2,  # ours: the data to keep is read twice, a gradient an image
}


def main():
    args = B.parse_args([*sys.argv[1:], "--method", "all"])
    device = common.choose_device(args)
    data = D.load(args, device)
    split = D.make_split(data, args)
    sets = B.sets_of(split, args)
    model = common.build_model(args.model, data["classes"], args.image_size).to(device).eval()
    print(D.describe(data, split))
    for method in B.METHODS:
        own, ratios, seconds = B.own_args(method, args), [], []
        used = torch.cat([t for t in B.allowed(method, sets, own).values() if isinstance(t, torch.Tensor)])
        for _ in range(3):
            begin, copied = time.perf_counter(), copy.deepcopy(model).train()
            optimizer, rng = B.new_optimizer(copied, own), common.generator(0)
            for batch in B.batches(used, own.unlearn_batch_size, rng):
                B.descend(
                    optimizer, B.task_losses(B.logits_of(copied, B.images_of(data, batch, own, rng), own), B.targets_of(data, batch)).mean()
                )
            epoch = time.perf_counter() - begin
            _, taken = B.run(method, model, data, sets, own)
            ratios.append(taken / epoch)
            seconds.append(taken)
        print(
            f"{method:9s} {np.median(seconds):7.2f} s   {np.median(ratios):6.2f} x an epoch over {len(used):,} images   (passes: {PASSES[method](own):.1f})"
        )


if __name__ == "__main__":
    main()
