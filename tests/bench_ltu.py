"""What an LTU iteration costs, as ratios in one run; and what the data path adds to a training epoch.

    python tests/bench_ltu.py                                  # toy_resnet at 8 px, k = 64
    python tests/bench_ltu.py --model resnet18 --size 32 --k 64

Each round times all four in turn: the plain first-order passes over the same batches (no method can avoid them), LTU's
iteration without and with second order, and the naive way: one backward pass through the whole inner step. Medians of rounds.
"""

import argparse
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import common
import data as D
import ltu as L
import train as T


def grad(loss, theta):
    return torch.autograd.grad(loss, list(theta.values()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="toy_resnet")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags = parser.parse_args()
    args = L.parse_args(["--support-size", str(flags.k)])
    args.amp = False
    device = torch.device(flags.device)
    model = common.build_model(flags.model, 10, flags.size).to(device).train()
    theta = {n: p.detach() for n, p in model.named_parameters()}
    draw = lambda n: (torch.rand(n, 3, flags.size, flags.size, device=device), torch.randint(10, (n,), device=device))
    (S, y), (Q, y_Q) = draw(flags.k), draw(3 * flags.k)
    batch = {"iteration": 0, "S": S, "y": y, "y_rand": y.flip(0), "Q": Q, "y_Q": y_Q, "attacks": [0, 2]}
    attacks = [L.MIModel(kind, L.signals(kind, torch.zeros(2, 10), torch.zeros(2).long()).shape[1]).to(device) for kind in L.KINDS]
    zeros = torch.zeros(flags.k, device=device)
    out = lambda theta, images: L.forward(model, theta, images, args)
    fresh = lambda: {n: p.detach().requires_grad_() for n, p in theta.items()}
    task = lambda theta, images, labels: common.task_losses(out(theta, images), labels).mean()
    audit = lambda theta, which: F.binary_cross_entropy_with_logits(attacks[which](out(theta, S), y), zeros)

    def floor():
        for loss in (lambda t: task(t, S, batch["y_rand"]), lambda t: 3 * task(t, Q, y_Q), lambda t: audit(t, 0), lambda t: audit(t, 2)):
            leaf = fresh()
            grad(loss(leaf), leaf)

    def ltu(first_order):
        args.first_order = first_order
        L.iteration(model, theta, batch, attacks, args)

    def naive():
        for tune, test in (
            (lambda t: task(t, S, batch["y_rand"]), lambda t: 3 * task(t, Q, y_Q)),
            (lambda t: audit(t, 0), lambda t: audit(t, 2)),
        ):
            leaf = fresh()
            L_tune = tune(leaf)
            g = torch.autograd.grad(L_tune, list(leaf.values()), create_graph=True)
            tau = {n: p - args.alpha * d for (n, p), d in zip(leaf.items(), g, strict=True)}
            grad(L_tune + test(tau), leaf)

    ways = {"first-order passes": floor, "LTU --first-order": lambda: ltu(True), "LTU, exact": lambda: ltu(False), "naive": naive}
    seconds, memory = {name: [] for name in ways}, {}
    for number in range(flags.rounds + 1):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 2**20
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    base = np.array(seconds["first-order passes"])
    print(f"{flags.model}, {flags.size} px, k = {flags.k}, {device}, {torch.get_num_threads()} threads, {flags.rounds} rounds")
    for name, taken in seconds.items():
        print(
            f"{name:20s} {1000 * np.median(taken):8.1f} ms   {np.median(np.array(taken) / base):5.2f} x"
            + (f"   {memory[name]:.0f} MiB" if memory else "")
        )

    # A training step with and without its data path: gathering, converting and augmenting a batch of 256 out of 20,000.
    args = T.parse_args(["--augment", "pad-crop", "--image-size", str(flags.size)])
    images = torch.randint(0, 256, (20000, flags.size, flags.size, 3), dtype=torch.uint8, device=device)
    data = {"images": images, "device": device, "targets": torch.randint(10, (20000,))}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rng, path, step = common.generator(0), [], []
    for _ in range(max(3, flags.rounds // 2)):
        begin = time.perf_counter()
        drawn = D.draw_augmentation(256, args, rng)
        indices = torch.randint(20000, (256,), generator=rng)
        x, labels = D.augment(D.raw_batch(data, indices), drawn), D.targets_of(data, indices)
        if device.type == "cuda":
            torch.cuda.synchronize()
        middle = time.perf_counter()
        common.task_losses(model(x)[1], labels).mean().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        path.append(middle - begin)
        step.append(time.perf_counter() - middle)
    print(
        f"data path of a training step: {1000 * np.median(path):.1f} ms, {100 * np.median(np.array(path) / np.array(step)):.1f} % of the model's own time"
    )


if __name__ == "__main__":
    main()
