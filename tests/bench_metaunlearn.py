"""How fast and how large is a meta step? Ratios within one run; not a test, and not run by pytest.

    python tests/bench_metaunlearn.py                                   # toy ViT, a minute
    python tests/bench_metaunlearn.py --model vit_small_patch14_dinov2 --image-size 70 --repeats 3
    python tests/bench_metaunlearn.py --preset code                     # A as in the authors' code

Prints, for one meta step, the seconds of the forward and of the double way over those of the floor,
which no method can avoid: one plain forward and backward pass over the same images. Then those of
the authors' step (with --preset code, the same A): the textbook's, in which the backward pass also
reaches theta, and D_v is run twice for each 64 images of D_f. And the peak memory of each, also
with more images in D_f.
"""

import argparse
import functools
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import common  # noqa: E402
import data as D  # noqa: E402
import metaunlearn as M  # noqa: E402

WAYS = ("floor", "forward", "double", "authors")


def steps(args) -> dict:
    """{way: a function of one meta step}, on random images and weights, which change no speed."""
    n_s, n, px = args.support, args.support + args.forget + args.val, args.image_size
    flags = ["--model", args.model, "--image-size", str(px), "--hidden", "512"]
    flags += ["--preset", args.preset]
    run = M.parse_args([*flags, "--meta-batch-size", str(args.meta_batch_size), "--no-amp"])
    rng, device = np.random.default_rng(0), torch.device(args.device)
    data = {"images": torch.from_numpy(rng.integers(0, 256, (n, px, px, 3), np.uint8))}
    data["targets"] = torch.from_numpy(rng.integers(0, 2, (n, 40)).astype(np.float32))
    data |= {"identities": np.arange(n), "classes": 40, "device": device}
    S, f, v = np.split(np.arange(n), [n_s, n_s + args.forget])
    split = {"retain": [], "forget": [], "val": v.tolist(), "train_ids": S.tolist()}
    model = common.build_model(args.model, 40, px).to(device).eval()
    h_phi, run_model = M.new_meta_loss(model, data, split, run), M.model_function(model)
    original, theta = M.original_outputs(model, data, split, run), M.updatable(model)
    sets = M.request_sets(split, S, f, run, rng)
    pairs = [f[start : start + M.PAIR] for start in range(0, len(f), M.PAIR)]

    def A(theta_u):
        return M.auxiliary(run_model, theta_u, sets, data, original, run)

    def floor():
        leaf = {k: p.detach().requires_grad_() for k, p in theta.items()}
        for part in (own[i : i + 64] for own in (S, f, v) for i in range(0, len(own), 64)):
            logits = run_model(leaf, D.raw_batch(data, part))[1]
            loss = common.task_losses(logits, D.targets_of(data, part)).mean()
            torch.autograd.grad(loss, list(leaf.values()))

    def error(at, indices):
        targets, logits = D.targets_of(data, indices), run_model(at, D.raw_batch(data, indices))[1]
        mAP = common.score(logits.detach(), targets)
        return (1 - mAP) * common.task_losses(logits, targets).mean()

    def authors():
        leaf = {k: p.detach().requires_grad_() for k, p in theta.items()}
        images, targets, who = M.support_batch(data, S.tolist(), S)
        with M.sdpa_kernel(M.SDPBackend.MATH):
            loss = h_phi(*run_model(leaf, images), targets, who)
            g = torch.autograd.grad(loss, list(leaf.values()), create_graph=True)
        theta_u, total = M.inner_step(theta, g, [run.eta] * len(g)), 0.0
        for pair in pairs:
            with torch.no_grad():
                goals = [error(at, v[: M.PAIR]) for at in (theta, theta_u)]
            own = error(theta_u, pair)
            total += sum(len(pair) / len(f) * F.smooth_l1_loss(own, goal) for goal in goals)
        total.backward()

    request = (h_phi, run_model, A, theta, M.support_batch(data, S.tolist(), S), run.eta)

    forward = functools.partial(M.meta_gradient, *request)
    double = functools.partial(M.meta_gradient_double, *request)
    return dict(zip(WAYS, (floor, forward, double, authors), strict=True))


def peak(args, way: str, forget: int) -> float:
    """Peak memory of a step in a fresh process, less that of the same process before it, in MiB."""
    command = [sys.executable, __file__]
    for key, value in (vars(args) | {"way": way, "forget": forget}).items():
        command += ["--" + key.replace("_", "-"), str(value)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()[-1])


def resident(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


def print_own_peak(args):
    """Take one step of --way in this process, and print its peak memory."""
    step = steps(args)[args.way]
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:  # Linux: a new high-water mark
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() / 2**20 if cuda else resident("VmRSS")
    step()
    print((torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM")) - before)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", default="toy_vit")
    parser.add_argument("--preset", choices=("paper", "code"), default="paper")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"image-size": 32, "support": 20, "forget": 80, "val": 64, "meta-batch-size": 256}
    for name, size in (sizes | {"repeats": 10}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--way", choices=WAYS, help="print the peak memory of one such step alone")
    args = parser.parse_args()
    if args.way:
        return print_own_peak(args)
    functions, seconds = steps(args), {way: [] for way in WAYS}
    for repeat in range(args.repeats + 1):  # in turn: a slow moment hits all; the first warms up
        for way, step in functions.items():
            begin = time.perf_counter()
            step()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat:
                seconds[way].append(time.perf_counter() - begin)
    where = f"{args.device}, {torch.get_num_threads()} threads, n = {args.repeats}"
    sets = f"S {args.support}, D_f {args.forget}, D_v {args.val}"
    print(f"{args.model}, {args.image_size} px, {sets}, {where}")
    for way, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, seconds["floor"], strict=True))
        spread = f"(min {ratios[0]:.2f}, max {ratios[-1]:.2f})"
        middle = f"{statistics.median(own):8.3f} s   {statistics.median(ratios):5.2f} x floor"
        print(f"{way:8s} {middle} {spread}")
    for forget in (args.forget, 4 * args.forget):
        found = ", ".join(f"{way} {peak(args, way, forget):.0f} MiB" for way in WAYS)
        print(f"peak memory of a step, D_f {forget:4d}: {found}")


if __name__ == "__main__":
    main()
