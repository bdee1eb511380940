"""What an LTU iteration costs, as ratios in one run.

    python tests/bench_ltu.py --model resnet18 --size 32 --k 64

Each round times all in turn: the plain first-order passes over the same batches (no method can
avoid them), LTU's iteration without (--no-metaopt) and with second order, and LTU's passes at
training speed: 3 k images for Q_1..Q_3 by --amp's precision, and in float32 3 k for S and 2 k for
each of two products with a Hessian. Medians.
"""

import argparse
import pathlib
import sys
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import common
import ltu as L


def plain_passes(tune_loss, test_loss, theta, alpha):
    """In place of ltu.meta_gradient: the gradient of each loss at theta, and nothing else."""
    for loss in (tune_loss, test_loss):
        leaf = {n: p.detach().requires_grad_() for n, p in theta.items()}
        g = torch.autograd.grad(loss(leaf), list(leaf.values()))
    return g, 0.0, 0.0


def now(device) -> float:
    """The time; a GPU is waited for, and its peak memory counted anew."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def train_step(model, images, labels, amp: bool):
    with common.autocast(images.device, amp):
        _, logits = model(images)
    common.task_losses(logits, labels).mean().backward()
    model.zero_grad()


def bench_iteration(model, k: int, size: int, rounds: int, device, amp: bool):
    args, taken, peak, exact = L.parse_args([]), {}, {}, L.meta_gradient
    args.amp = amp
    # As raw_batch gives them, and draw_batch for S: channels_last, and not.
    images = torch.rand(4 * k, size, size, 3).permute(0, 3, 1, 2)
    labels = torch.randint(10, (5 * k,))
    batch = {"S": images[:k].contiguous(), "Q": images[k:], "y": labels[:k]}
    batch |= {"y_rand": labels[k : 2 * k], "y_Q": labels[2 * k :]}
    batch = {name: t.to(device) for name, t in batch.items()} | {"iteration": 0, "attacks": [0, 2]}
    attacks = []
    for kind in L.KINDS:
        inputs = L.signals(kind, torch.zeros(1, 10), labels[:1]).shape[1]
        attacks.append(L.MIModel(kind, inputs).to(device).requires_grad_(False))
    theta = {name: p.detach() for name, p in model.named_parameters()}
    ways = {"first-order passes": plain_passes, "LTU --no-metaopt": exact, "LTU, exact": exact}
    at_training_speed = "passes at training speed"
    for _ in range(rounds + 1):
        begin = now(device)
        train_step(model, batch["Q"], batch["y_Q"], amp)
        middle = now(device)
        train_step(model, batch["Q"], batch["y_Q"], False)  # 7 k images, measured with 3 k
        seconds = middle - begin + (now(device) - middle) * 7 / 3
        taken.setdefault(at_training_speed, []).append(seconds)
        peak[at_training_speed] = 0
        for way, L.meta_gradient in ways.items():
            args.metaopt, begin = way == "LTU, exact", now(device)
            if L.meta_gradient is exact:
                L.iteration(model, theta, batch, attacks, args)
            else:  # without harmonisation
                L.remembering(model, theta, batch, args.alpha, args)
                L.forgetting(model, theta, batch, attacks, args.alpha)
            peak[way] = torch.cuda.max_memory_allocated() / 2**20  # 0 on a CPU
            taken.setdefault(way, []).append(now(device) - begin)
    base = np.array(taken["first-order passes"])[1:]  # the first round warms up
    for way, seconds in taken.items():
        median, ratio = np.median(seconds[1:]), np.median(seconds[1:] / base)
        print(f"{way:24s} {1000 * median:8.1f} ms   {ratio:5.2f} x   {peak[way]:.0f} MiB")


if __name__ == "__main__":
    parser, device = argparse.ArgumentParser(), "cuda" if torch.cuda.is_available() else "cpu"
    defaults = {"model": "toy_resnet", "size": 8, "k": 64, "rounds": 20, "device": device}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--amp", action="store_true", help="bf16 where ltu.py has it")
    flags = parser.parse_args()
    print(vars(flags), torch.get_num_threads(), "threads; MiB: peak memory of a GPU")
    device = torch.device(flags.device)
    model = common.build_model(flags.model, 10, flags.size).to(device).train()
    bench_iteration(model, flags.k, flags.size, flags.rounds, device, flags.amp)
