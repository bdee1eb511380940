"""How fast and how large is a meta step? Ratios within one run; not a test, and not run by pytest.

    python tests/bench_metaunlearn.py                                                 # toy ViT, two minutes
    python tests/bench_metaunlearn.py --model vit_small_patch14_dinov2 --image-size 70 --repeats 3

Prints, for one meta step: seconds of `forward` and of `double` over those of the floor (one plain forward and backward
pass over the same images, which no method can avoid), and the peak memory of each, also for more images in D_f.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import common  # noqa: E402
import metaunlearn as M  # noqa: E402


def problem(args):
    """A model with random weights and a request of --support and --forget random images: speed does not depend on them."""
    S, F, V = args.support, args.forget, args.val
    run = M.parse_args(["--model", args.model, "--image-size", str(args.image_size), "--hidden", "512", "--val-images", str(V)])
    run.amp = False
    device = torch.device(args.device)
    rng = np.random.default_rng(0)
    n = S + F + V
    data = {
        "images": torch.from_numpy(rng.integers(0, 256, (n, args.image_size, args.image_size, 3), np.uint8)),
        "targets": torch.from_numpy(rng.integers(0, 2, (n, 40)).astype(np.float32)),
        "identities": np.concatenate([np.arange(S), np.repeat(np.arange(S), F // S + 1)[:F], np.full(V, S)]),
        "target_names": np.arange(40),
        "classes": 40,
        "device": device,
    }
    split = {"retain": [], "forget": [], "val": list(range(S + F, n)), "train_ids": list(range(S))}
    model = common.build_model(args.model, 40, args.image_size).to(device).eval()
    h_phi = M.new_meta_loss(model, data, split, run).to(device)
    cache = M.cache_original(model, data, split, run)
    theta = M.updatable(model, False)
    parts = [{"f": np.arange(S, S + F), "v": np.arange(S + F, n), "weight": 1.0}]
    batch = M.support_batch(data, split["train_ids"], np.arange(S), theta)
    return model, h_phi, theta, batch, parts, data, cache, run


def floor(model, h_phi, theta, batch, parts, data, cache, run):
    """One forward and backward pass over S, D_f and D_v."""
    leaf = {k: p.detach().requires_grad_() for k, p in theta.items()}
    for indices in (np.arange(len(batch[0])), parts[0]["f"], parts[0]["v"]):
        for start in range(0, len(indices), run.meta_batch_size):
            own = indices[start : start + run.meta_batch_size]
            _, logits = M.outputs(model, leaf, M.images_at(data, leaf, own), run)
            torch.autograd.grad(common.task_losses(logits, M.targets_of(data, own)).mean(), list(leaf.values()))


WAYS = {"floor": floor, "forward": M.meta_gradient_forward, "double": M.meta_gradient_double}


def peak(args, way: str, forget: int) -> float:
    """Peak memory of a fresh process doing one step, less that of the same process before it, in MiB."""
    flags = ["--way", way, "--forget", str(forget), "--model", args.model, "--image-size", str(args.image_size), "--device", args.device]
    flags += ["--support", str(args.support), "--val", str(args.val)]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def one_step(args):
    things = problem(args)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[args.way](*things)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew
    before = resident("VmRSS")
    WAYS[args.way](*things)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy_vit")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--support", type=int, default=20)
    parser.add_argument("--forget", type=int, default=80)
    parser.add_argument("--val", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--way", choices=WAYS, help="one step in this process, its peak memory printed")
    args = parser.parse_args()
    if args.way:
        return one_step(args)
    things = problem(args)
    seconds = {way: [] for way in WAYS}
    for repeat in range(args.repeats + 1):  # in turn, so that a slow moment hits all three; the first round warms up
        for way, step in WAYS.items():
            begin = time.perf_counter()
            step(*things)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat:
                seconds[way].append(time.perf_counter() - begin)
    median = {way: statistics.median(s) for way, s in seconds.items()}
    print(
        f"{args.model}, {args.image_size} px, S {args.support}, D_f {args.forget}, D_v {args.val}, {args.device}, {torch.get_num_threads()} threads, n = {args.repeats}"
    )
    for way in WAYS:
        ratios = [a / b for a, b in zip(seconds[way], seconds["floor"], strict=True)]
        print(f"{way:8s} {median[way]:8.3f} s   {statistics.median(ratios):5.2f} x floor (min {min(ratios):.2f}, max {max(ratios):.2f})")
    for forget in (args.forget, 4 * args.forget):
        print(f"peak memory of a step, D_f {forget:4d}: " + ", ".join(f"{way} {peak(args, way, forget):.0f} MiB" for way in WAYS))


if __name__ == "__main__":
    main()
