"""Everything after unlearning: the papers' tables and figures, stronger membership attacks, and what is within noise.

Usage:
    python evaluate.py --table ltu1                         # scikit-learn's digits, from results/, which came with the repository
    python evaluate.py --table ltu1 --out runs              # from your own runs
    python evaluate.py --table mu1 --dataset toyfaces --run # make what runs/ lacks, then print
    python evaluate.py --table ltu1 --dataset cifar10-small --markdown
    python evaluate.py --ceiling --dataset digits           # second gold models: the best that any method can be expected to reach
    python evaluate.py --attack --dataset digits --run      # confidence SVC, loss AUC and RMIA on every checkpoint
    python evaluate.py --figure 4 --dataset toyfaces        # METAUNLEARN's figures 4, 5 and 6

A table's rows are runs of the other scripts: PLAN says which command makes which row, SETTINGS which flags a data set needs. A
result counts only if its split is that of the others, its recipe that of the table, and it is complete; what does not is named.
Differences are paired by seed, within one result file, with Student's 95 % interval; where that holds 0 the table says so.
"""

import argparse
import json
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import torch

import baselines
import ltu
import metaunlearn
import train as training
from common import (
    Parser,
    accuracy,
    atomic_write,
    average_gap,
    check_writable,
    choose_device,
    compare,
    confidence,
    fail,
    load_checkpoint,
    measure,
    membership_inference,
    paper_figures,
    predict,
    provenance,
    say,
    score,
    with_parameters,
    write_json,
)
from data import control_sets, load, make_split, raw_batch, setting

HERE = pathlib.Path(__file__).parent
SCRIPTS = {"metaunlearn": metaunlearn, "ltu": ltu, "baselines": baselines}

# --dataset: the parts of a table, each (title, flags of every script, column of PAPER), and per script the flags that are its own.
# cifar10-small, tinyimagenet-small and the small faces are what two CPU cores can do; the others are the papers' experiments.
_CIFAR = "--dataset cifar10 --image-size 16 --train-images 6000 --model toy_resnet --augment none --schedule cosine --keep last"
_CIFAR += " --epochs 40 --batch-size 64 --warmup-epochs 1"
_TINY = "--dataset tinyimagenet --image-size 32 --train-images 3000 --model toy_vit --augment none --keep last --epochs 40 --lr 2e-3"
_TINY += " --optimizer adamw --weight-decay 0.05 --batch-size 64 --warmup-epochs 2"
_FACES32 = "--image-size 32 --model toy_vit --init none --epochs 40 --optimizer adamw --lr 2e-3 --warmup-epochs 2 --crop-scale 0.8"
_FACES32 += " --batch-size 64 --weight-decay 0.05"
_FACES70 = "--image-size 70 --model vit_small_patch14_dinov2 --init vit_small_patch14_dinov2.safetensors --epochs 5 --optimizer adamw"
_FACES70 += " --lr 1e-4 --weight-decay 0.05 --warmup-epochs 0.5 --crop-scale 0.8 --batch-size 32 --amp"
SETTINGS = {
    "toyfaces": [("drawn faces, 10 of 120 identities", "--dataset toyfaces --ids 10", None)],
    "toyfaces-heldout": [
        ("drawn faces, 10 of 120 identities, requests simulated with held-out pictures", "--dataset toyfaces --ids 10 --held-out", None)
    ],
    "qmnist": [("QMNIST, 20 writers", "--dataset qmnist --ids 20", None)],
    "digits": [
        ("digits, 10 % forgotten", "--dataset digits --forget-ratio 0.1", "CIFAR-10, 10 %"),
        ("digits, 50 % forgotten", "--dataset digits --forget-ratio 0.5", "CIFAR-10, 50 %"),
    ],
    "cifar10-small": [
        ("6,000 images of CIFAR-10 at 16 px, 10 % forgotten", _CIFAR + " --forget-ratio 0.1", "CIFAR-10, 10 %"),
        ("6,000 images of CIFAR-10 at 16 px, 50 % forgotten", _CIFAR + " --forget-ratio 0.5", "CIFAR-10, 50 %"),
    ],
    "cifar10": [
        ("CIFAR-10, 10 % forgotten", "--dataset cifar10 --forget-ratio 0.1", "CIFAR-10, 10 %"),
        ("CIFAR-10, 50 % forgotten", "--dataset cifar10 --forget-ratio 0.5", "CIFAR-10, 50 %"),
    ],
    "tinyimagenet": [
        ("Tiny-ImageNet, 10 % forgotten", "--dataset tinyimagenet --forget-ratio 0.1", "Tiny-ImageNet, 10 %"),
        ("Tiny-ImageNet, 50 % forgotten", "--dataset tinyimagenet --forget-ratio 0.5", "Tiny-ImageNet, 50 %"),
    ],
    "tinyimagenet-small": [
        ("3,000 images of 20 classes of Tiny-ImageNet at 32 px, ViT, 10 % forgotten", _TINY + " --forget-ratio 0.1", "Tiny-ImageNet, 10 %")
    ],
    "faces-small": [
        (f"CelebA faces at 32 px, {n} identities", f"--dataset celeba --ids {n} {_FACES32}", f"CelebA/{n}") for n in (5, 10, 20)
    ],
    "faces-vit": [
        ("CelebA faces, DINOv2 at 70 px, 5 identities", f"--dataset celeba --ids 5 {_FACES70}", "CelebA/5"),
        ("CelebA faces, DINOv2 at 70 px, 10 identities", f"--dataset celebahq --ids 10 {_FACES70}", "CelebA/10"),
    ],
    "celeba": [(f"CelebA, {n} identities", f"--dataset celeba --ids {n}", f"CelebA/{n}") for n in (5, 10)],
    "celebahq": [(f"CelebA-HQ, {n} identities", f"--dataset celebahq --ids {n}", f"CelebA-HQ/{n}") for n in (20, 50)],
}
# (--dataset, script, words): flags that only that script takes, for the rows whose flags hold these words; all that match are joined.
OWN_FLAGS = {
    ("toyfaces", "baselines", ""): "--search",
    ("toyfaces-heldout", "baselines", ""): "--search",
    ("digits", "baselines", ""): "--search",
    ("digits", "ltu", "--forget-ratio 0.5"): "--alpha 0.1",
    ("cifar10-small", "baselines", ""): "--search",
    ("cifar10-small", "ltu", ""): "--support-size 64 --iterations 50 --alpha 0.05 --beta 0.1",
    ("tinyimagenet-small", "baselines", ""): "--search",
    ("tinyimagenet-small", "ltu", ""): "--support-size 64 --iterations 50 --alpha 0.01 --beta 0.01",
    **{("faces-small", "baselines", f"--method {m}"): "--unlearn-epochs 3" for m in ("ft", "randl", "amnesiac", "salun")},
    # Bad Teacher and SCRUB keep the authors' flags: searching them takes passes over all of D for each value and request
    **{("faces-small", "baselines", f"--method {m}"): "--search" for m in ("ga", "ssd", "pgu", "jit", "influence")},
    # 561 outer steps, the authors' number for CelebA-HQ/20: 36, 18 or 9 requests an epoch
    ("faces-small", "metaunlearn", "--ids 5"): "--meta-epochs 16",
    ("faces-small", "metaunlearn", "--ids 10"): "--meta-epochs 31",
    ("faces-small", "metaunlearn", "--ids 20"): "--meta-epochs 62",
    ("faces-vit", "metaunlearn", ""): "--val-images 64 --retain-images 64",
    ("faces-vit", "metaunlearn", "--ids 5"): "--meta-epochs 1",
    ("faces-vit", "metaunlearn", "--ids 10"): "--meta-epochs 2",
    ("faces-vit", "metaunlearn", "--preset paper"): "--eta 0.001",
    ("faces-vit", "metaunlearn", "--preset code"): "--alpha 1e-3",
    ("faces-vit", "metaunlearn", "--preset selective"): "--alpha 1e-3 --eta 0.03",
    **{("faces-vit", "baselines", f"--method {m}"): "--search" for m in ("ga", "ssd", "pgu", "jit", "influence")},
}

# --table: (kind, rows); a row is (label, script, flags). Trained, Retrained and the second gold model stand above them in every table.
_SUPPORT = [(label, "baselines", f"--method {m}") for label, m in (("JiT", "jit"), ("PGU", "pgu"), ("SSD", "ssd"), ("GA", "ga"))]
_SUPPORT += [("Influence (ours)", "baselines", "--method influence")]
_META = [("METAUNLEARN", "metaunlearn", "--preset paper"), ("METAUNLEARN code", "metaunlearn", "--preset code")]
_META += [("METAUNLEARN selective (ours)", "metaunlearn", "--preset selective")]
_ALL = [("FT", "ft"), ("RandL", "randl"), ("GA", "ga"), ("Amnesiac", "amnesiac"), ("Fisher", "fisher"), ("SSD", "ssd")]
_ALL += [("BadT", "badt"), ("SalUn", "salun"), ("SCRUB", "scrub"), ("PGU", "pgu"), ("JiT", "jit")]
_ALL += [("Influence (ours)", "influence")]
_LTU = [("LTU", "ltu", "--rho 0.3")]
_MU1 = [("Bad Teacher", "baselines", "--method badt"), ("SCRUB", "baselines", "--method scrub"), *_SUPPORT, *_META]
PLAN = {
    "mu1": ("mu", _MU1),
    "mu2": ("mu", _MU1),
    "mu3": (
        "mu",
        [
            ("SCRUB", "metaunlearn", "--preset paper --aux-loss scrub"),
            ("First term", "metaunlearn", "--preset paper --aux-loss first --no-accuracy-weight"),
            ("First term + Accuracy", "metaunlearn", "--preset paper --aux-loss first"),
            ("Second term", "metaunlearn", "--preset paper --aux-loss second --no-accuracy-weight"),
            ("Second term + Accuracy", "metaunlearn", "--preset paper --aux-loss second"),
            ("First & Second terms", "metaunlearn", "--preset paper --no-accuracy-weight"),
            ("METAUNLEARN", "metaunlearn", "--preset paper"),
        ],
    ),
    "mu4": (
        "mu",
        [
            ("logits", "metaunlearn", "--preset paper --inputs logits"),
            ("+ features", "metaunlearn", "--preset paper --inputs logits,features"),
            ("+ features and targets", "metaunlearn", "--preset paper --inputs logits,features,targets"),
            ("METAUNLEARN", "metaunlearn", "--preset paper"),
        ],
    ),
    "mu7": ("mu", [("other N_S", "metaunlearn", "--preset paper --meta-ids {other}"), ("METAUNLEARN", "metaunlearn", "--preset paper")]),
    "mu-others": (  # LTU's baselines, made to forget identities
        "mu",
        [
            *[(label, "baselines", f"--method {m}") for label, m in _ALL if m in ("ft", "randl", "amnesiac", "fisher", "salun")],
            ("METAUNLEARN", "metaunlearn", "--preset paper"),
        ],
    ),
    "mu-pictures": (  # what one picture costs: the methods that have the Support set, given all of D_f
        "mu",
        [*[(label, script, f"{own} --all-pictures") for label, script, own in _SUPPORT], ("METAUNLEARN", "metaunlearn", "--preset paper")],
    ),
    "mu-departures": (  # where metaunlearn.py's head says that paper and code differ or we chose: one at a time
        "mu",
        [
            ("smooth-L1 distance", "metaunlearn", "--preset paper --distance smooth_l1"),
            ("no gradient through D_v", "metaunlearn", "--preset paper --stop-val-gradient"),
            ("pairs of 64 images", "metaunlearn", "--preset paper --pair-size 64"),
            ("all of D_v in each step", "metaunlearn", "--preset paper --val-images 0"),
            ("embeddings frozen", "metaunlearn", "--preset paper --freeze-embeddings"),
            ("random last layer", "metaunlearn", "--preset paper --no-zero-init"),
            ("METAUNLEARN", "metaunlearn", "--preset paper"),
        ],
    ),
    "ltu1": ("ltu", [(label, "baselines", f"--method {m}") for label, m in _ALL] + _LTU),
    "ltu2": (
        "ltu",
        [
            (f"{label}, rho {rho}", "baselines" if m else "ltu", (f"--method {m} " if m else "") + f"--rho {rho}")
            for rho in (0.1, 0.3)
            for label, m in (("FT", "ft"), ("RandL", "randl"), ("BadT", "badt"), ("SalUn", "salun"), ("LTU", None))
        ],
    ),
    "ltu3": ("ltu", [(f"w/o {n}", "ltu", f"--no-{n.lower()}") for n in ("ForFeed", "RemFeed", "MetaOpt")] + _LTU),
    "ltu4": ("ltu", [("GradAdd", "ltu", "--combine add"), ("Iterative", "ltu", "--combine iterative"), *_LTU]),
    "ltu-departures": (
        "ltu",
        [
            ("first order", "ltu", "--first-order"),
            ("two MI models", "ltu", "--mi-models 2"),
            ("eight MI models", "ltu", "--mi-models 8"),
            ("120 iterations", "ltu", "--iterations 120"),
            ("all of D_r (rho 1)", "ltu", "--rho 1"),
            *_LTU,
        ],
    ),
}
OTHER_IDS = {5: 10, 10: 5, 20: 50, 50: 20}  # METAUNLEARN Table 7: N_S while meta-training, for N_S to forget

# The papers' numbers, in percent: (table, column): {row: UA RA TA MI, or D_r D_f D_te ToW, or ToW alone}. A paper's average gap is
# worked out from its printed UA, RA, TA and MI. METAUNLEARN's Table 2 and Table 4 are lost but for what its text states.
_LTU1 = ("Retrained", "FT", "RandL", "GA", "Amnesiac", "Fisher", "SSD", "BadT", "SalUn", "LTU")


def _rows(labels, numbers: str) -> dict:
    values = [float(x) for x in numbers.split()]
    per = len(values) // len(labels)
    return {label: tuple(values[i * per : (i + 1) * per]) for i, label in enumerate(labels)}


_MU_ROWS = ("Trained", "Bad Teacher", "SCRUB", "JiT", "PGU", "SSD", "METAUNLEARN")
_LOSSES = ("SCRUB", "First term", "First term + Accuracy", "Second term", "Second term + Accuracy", "First & Second terms", "METAUNLEARN")
PAPER = {
    ("mu1", "CelebA-HQ/20"): _rows(
        _MU_ROWS,
        "84.8 83.0 80.7 95.5 84.4 82.3 80.3 95.6 88.1 80.2 81.2 94.7 78.2 75.9 75.0 85.7 84.6 82.8 80.6 95.6 83.4 82.0 79.6 94.3 "
        "84.5 82.6 80.7 95.7",
    )
    | {"Retrained": (84.7, 78.6, 80.8)},
    ("mu1", "CelebA-HQ/50"): _rows(
        _MU_ROWS,
        "84.9 83.8 80.8 94.8 83.6 81.9 79.4 95.1 87.0 81.4 81.2 94.7 66.3 65.3 64.7 59.2 84.6 83.7 80.5 94.9 72.7 70.9 70.9 73.7 "
        "84.1 82.5 80.6 95.9",
    )
    | {"Retrained": (84.6, 79.1, 80.6)},
    ("mu1", "CelebA/5"): _rows(("Trained", "JiT", "METAUNLEARN", "SSD"), "97.2 97.6 97.2 8.4"),
    ("mu1", "CelebA/10"): _rows(("Trained", "PGU", "METAUNLEARN", "JiT", "SSD"), "97.3 97.4 97.4 96.9 10.0"),
    ("mu3", "CelebA-HQ/20"): _rows(_LOSSES, "94.3 8.3 8.1 95.7 95.7 95.6 95.8"),
    ("mu3", "CelebA-HQ/50"): _rows(_LOSSES[1:], "32.4 8.2 95.1 95.7 95.4 95.9"),  # SCRUB: out of memory
    ("mu3", "CelebA/5"): _rows(_LOSSES, "51.7 7.6 7.6 97.1 97.2 97.1 97.2"),
    ("mu3", "CelebA/10"): _rows(_LOSSES, "55.4 6.9 6.9 97.4 97.3 97.3 97.4"),
    ("mu4", "CelebA-HQ/20"): _rows(("logits", "+ features", "METAUNLEARN"), "95.0 96.1 95.8"),
    ("mu4", "CelebA-HQ/50"): _rows(("logits", "+ features", "METAUNLEARN"), "93.0 95.4 95.9"),
    ("mu7", "CelebA-HQ/20"): _rows(("other N_S", "METAUNLEARN"), "95.6 95.7"),
    ("mu7", "CelebA-HQ/50"): _rows(("other N_S", "METAUNLEARN"), "95.7 95.9"),
    ("mu7", "CelebA/5"): _rows(("other N_S", "METAUNLEARN"), "96.9 97.2"),
    ("mu7", "CelebA/10"): _rows(("other N_S", "METAUNLEARN"), "97.3 97.4"),
    ("ltu1", "CIFAR-10, 10 %"): _rows(
        _LTU1,
        "5.24 100 94.26 12.88 0.63 99.88 94.06 2.70 7.61 99.67 92.83 37.39 0.69 99.50 94.01 1.70 7.58 98.87 91.98 3.76 "
        "86.95 20.42 19.01 7.13 9.91 87.87 82.19 5.56 17.66 98.44 83.59 27.70 4.09 99.41 93.19 12.58 4.37 99.83 93.95 12.97",
    ),
    ("ltu1", "CIFAR-10, 50 %"): _rows(
        _LTU1,
        "7.91 100 91.72 19.29 0.44 99.96 94.23 2.15 4.80 99.55 91.31 41.95 0.40 99.61 94.34 1.22 14.99 75.21 74.45 1.94 "
        "77.09 22.68 22.93 8.51 18.18 89.47 80.25 11.40 27.58 80.71 79.25 39.66 7.54 98.06 89.93 23.08 7.88 99.12 90.77 17.39",
    ),
    ("ltu1", "Tiny-ImageNet, 10 %"): _rows(
        _LTU1,
        "34.24 99.98 68.23 16.86 32.70 87.97 63.97 19.98 62.39 42.73 33.64 21.48 81.50 16.94 14.38 7.01 80.59 14.65 13.79 4.69 "
        "83.96 20.49 19.64 9.29 85.23 23.81 23.88 19.20 52.35 59.75 51.15 22.24 32.32 94.07 63.55 19.23 33.44 96.47 64.04 15.13",
    ),
    ("ltu1", "Tiny-ImageNet, 50 %"): _rows(
        _LTU1,
        "37.80 99.80 55.74 14.79 34.44 86.20 48.30 10.91 63.42 32.18 28.72 9.31 88.04 13.17 10.13 22.53 82.85 20.54 9.45 20.06 "
        "90.05 11.57 7.36 12.13 83.48 24.97 18.27 20.12 56.88 70.00 42.12 22.02 34.39 93.89 50.80 17.99 36.38 95.22 52.99 15.57",
    ),
    ("ltu2", "CIFAR-10, 10 %"): _rows(
        ["Retrained"] + [f"{m}, rho {rho}" for rho in (0.1, 0.3) for m in ("FT", "RandL", "BadT", "SalUn", "LTU")],
        "5.24 100 94.06 12.88 10.61 88.01 85.57 9.04 20.42 80.55 78.91 38.40 59.93 39.49 40.04 25.50 4.09 90.97 86.81 14.72 "
        "5.43 92.33 89.89 12.34 9.65 88.97 87.99 9.23 13.29 87.16 80.62 35.16 37.17 62.97 59.02 23.31 4.88 92.28 91.11 14.69 "
        "4.37 99.83 93.95 12.97",
    ),
    ("ltu3", "CIFAR-10, 10 %"): _rows(
        ("Retrained", "w/o ForFeed", "w/o RemFeed", "w/o MetaOpt", "LTU"),
        "5.24 100 94.26 12.88 11.97 98.34 93.21 28.81 23.35 72.30 70.51 25.16 18.09 91.24 90.22 16.56 4.37 99.83 93.95 12.97",
    ),
    ("ltu4", "CIFAR-10, 10 %"): _rows(
        ("Retrained", "GradAdd", "Iterative", "LTU"),
        "5.24 100 94.26 12.88 6.26 97.40 89.54 15.80 7.11 96.13 87.51 16.03 4.37 99.83 93.95 12.97",
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def interval(values) -> tuple[float, float]:
    """Mean and half the width of Student's 95 % confidence interval of the mean; NaN for one value."""
    from scipy import stats  # comes with scikit-learn

    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def verdict(mean: float, half: float, more_is_better: bool) -> str:
    """What the paired difference says: better, worse, or within noise where the interval holds 0."""
    if np.isnan(half):
        return "one seed"
    if abs(mean) <= half:
        return "within noise"
    return "better" if (mean > 0) == more_is_better else "worse"


# ---------------------------------------------------------------------------------------------------------------------
# Reading results

KEYS = ("method", "dataset", "setting", "seed", "split_hash", "access", "args", "metrics", "comparison", "tow", "seconds")


def read_result(path: pathlib.Path, own, kind: str) -> tuple[dict | None, str | None, bool]:
    """(result, None, False), or (None, why it cannot be used, whether to make it again): a file cut short or of another version is
    made again; one of another recipe than `own`'s is somebody's, and stays.
    """
    try:
        result = json.loads(path.read_text())
    except ValueError:
        return None, "cut short or no JSON", True
    missing = [key for key in KEYS if not isinstance(result, dict) or key not in result]
    if missing:
        return None, f"another version: it has no {missing[0]}", True
    try:
        for name in ("original", "retrained", "unlearned"):
            quantities(result, name, kind)
    except (KeyError, TypeError, AttributeError):
        return None, f"another version: its row {name} is not complete", True
    for flag in (f for f in training.RECIPE if f not in ("amp", "init")):
        made = result["args"].get(flag, getattr(own, flag))
        if made != getattr(own, flag):
            said = f"--{flag.replace('_', '-')} {made}, this table has {getattr(own, flag)}"
            return None, f"made with {said}; another --out keeps both", False
    return result, None, False


def original_scores(result) -> list[float]:
    """D_f's and the test score of the original and the gold model, by which a file shows which models it is about."""
    return [round(100 * result["metrics"][name][s]["score"], 1) for name in ("original", "retrained") for s in ("forget", "test")]


def parts(args) -> list[tuple]:
    """The parts of a table: all, or --part alone; LTU's Tables 2 to 4 are about a tenth forgotten."""
    own = SETTINGS[args.dataset][: 1 if args.table in ("ltu2", "ltu3", "ltu4", "ltu-departures") else None]
    return own[args.part - 1 : args.part] if args.part else own


def seed_flags(flags: str, k: int) -> list[str]:
    """Seed k of a table: identities are drawn anew with one training seed, random samples with a training seed each."""
    return ["--split-seed", str(k)] + ([] if "--ids" in flags else ["--seed", str(k)])


def command(row, part, k, args) -> list[str] | None:
    """The command line, without `python`, that makes a row's result; None where the row does not apply to this part."""
    (_, script, own), (_, flags, _) = row, part
    if "{other}" in own:
        ids = int(flags.split("--ids ")[1].split()[0])
        if ids not in OTHER_IDS:
            return None
        own = own.format(other=OTHER_IDS[ids])
    words = f"{flags} {own} "
    extra = shlex.split(
        " ".join(f for (name, of, word), f in OWN_FLAGS.items() if (name, of) == (args.dataset, script) and f"{word} " in words)
    )
    return [f"{script}.py", *shlex.split(flags), *extra, *shlex.split(own), *seed_flags(flags, k), *places(args)]


def places(args) -> list[str]:
    """The flags that every script gets. A setting that is no data set, such as faces-small, has a folder of results of its own:
    its runs have the same names as those of other settings on the same data set.
    """
    out = args.out if f"--dataset {args.dataset} " in SETTINGS[args.dataset][0][1] + " " else str(pathlib.Path(args.out) / args.dataset)
    folders = ["--out", out, "--checkpoint-dir", args.checkpoint_dir, "--data-dir", args.data_dir, "--device", args.device]
    return folders + shlex.split(args.flags)


def parsed(line: list[str]) -> tuple[argparse.Namespace, str]:
    """(arguments, name of the run) of a command line, as its script understands it."""
    script = SCRIPTS[line[0].removesuffix(".py")]
    own = script.parse_args(line[1:])
    if script is not baselines:
        return own, own.method
    chosen = baselines.own_args(own.method[0], own)
    return chosen, baselines.run_name(own.method[0], chosen, own.search)


def result_path(own, name) -> pathlib.Path:
    return pathlib.Path(own.out) / f"{pathlib.Path(own.dataset).name}-{setting(own)}" / f"{name}-seed{own.seed}.json"


def collect(part, rows, args) -> tuple[dict, list, list]:
    """({label: {k: result}}, [(label, command)] of missing runs, [why a file was skipped]) of one part of a table."""
    found, missing, skipped = {}, [], []
    for k in range(args.seeds):
        here = {}
        for row in [("Second gold", None, ""), *rows]:
            line = command(("", "baselines", "--method ft") if row[1] is None else row, part, k, args)
            if line is None:
                continue
            own, name = parsed(line)
            path = result_path(own, name if row[1] else "retrain")
            if not path.is_file():
                if row[1]:
                    missing.append((row[0], line))
                continue
            result, why, again = read_result(path, own, "mu" if "--ids" in part[1] else "ltu")
            if again and row[1]:
                missing.append((row[0], line))
            if why:
                skipped.append(f"{path}: {why}")
            else:
                here[row[0]] = (path, result)
        keys = [(result["split_hash"], *original_scores(result)) for _, result in here.values()]
        usual = max(keys, key=keys.count) if keys else None
        for (label, (path, result)), key in zip(here.items(), keys, strict=True):
            if key == usual:
                found.setdefault(label, {})[k] = result
            else:
                what = "split" if key[0] != usual[0] else "original or gold model"
                skipped.append(f"{path}: of another {what} ({' '.join(map(str, key))}; the others {' '.join(map(str, usual))})")
    return found, missing, skipped


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def quantities(result: dict, row: str, kind: str) -> dict:
    """A row's figures in percent; `main` is ToW (more is better) or the average gap (less is better)."""
    table = result["comparison"][row]
    lost = 100 * (table["forget_lost"] - table["control_lost_mean"])
    if kind == "mu":
        r, f, te = (100 * result["metrics"][row][s]["score"] for s in ("retain", "forget", "test"))
        return {"D_r": r, "D_f": f, "D_te": te, "ToW": 100 * table["tow"], "lost": lost, "main": 100 * table["tow"]}
    figures = {name: paper_figures(result["metrics"][name]) for name in {row, "retrained"}}
    values = {key.upper(): 100 * value for key, value in figures[row].items()}
    gaps = {f"{key.upper()} gap": 100 * abs(value - figures["retrained"][key]) for key, value in figures[row].items()}
    return values | gaps | {"lost": lost, "main": 100 * average_gap(figures, row)}


def rows_of(found: dict, kind: str) -> dict:
    """{label: {k: quantities}} with Trained and Retrained, which every result file holds, in front."""
    table = {}
    for k in sorted({k for results in found.values() for k in results}):
        first = next(results[k] for results in found.values() if k in results)
        for label, name in (("Trained", "original"), ("Retrained", "retrained")):
            table.setdefault(label, {})[k] = quantities(first, name, kind)
    for label, results in found.items():
        table[label] = {
            k: quantities(result, "unlearned", kind)
            | {
                "floor": quantities(result, "original", kind)["main"],
                "UT": result["seconds"]["unlearn"] + result["seconds"].get("mi_models", 0),
                "touches": ", ".join(result["access"]["unlearning"]),
            }
            for k, result in results.items()
        }
    return table


def mean_std(values) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{np.mean(values):.1f}"


def with_half(mean: float, half: float, digits=1) -> str:
    """Mean with half of its interval, where there is one."""
    return f"{mean:+.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def difference(pairs, better: bool) -> str:
    """Paired difference with its interval and what it says."""
    mean, half = interval([a - b for a, b in pairs])
    said = "no difference" if abs(mean) < 0.05 and not abs(mean) <= half else verdict(mean, half, better)  # it would print as 0.0
    return f"{with_half(mean, half)} ({said})"


def cells(table: dict, kind: str, paper: dict, reference: str) -> list[list[str]]:
    """Header and rows of one part of a table, as text."""
    if kind == "mu":
        columns, main, better = ["D_r", "D_f", "D_te"], "ToW", True
    else:
        columns, main, better = ["UA", "RA", "TA", "MI"], "average gap", False
    against = [f"less {reference}"] if any(label.split(", ")[0] == reference for label in table) else []
    header = ["", *columns, main, "less Trained", *against, "D_f less control", f"paper's {main}", "touches", "UT, s", "n"]
    lines = [header]
    for label, by_seed in table.items():
        values = list(by_seed.values())
        line = [label]
        for c in columns:
            gap = f" ({np.mean([v[c + ' gap'] for v in values]):.1f})" if kind == "ltu" else ""
            line.append(mean_std([v[c] for v in values]) + gap)
        line.append(mean_std([v["main"] for v in values]))
        line.append(difference([(v["main"], v["floor"]) for v in values], better) if "floor" in values[0] else "")
        if against:
            other = ", ".join([reference, *label.split(", ")[1:]])  # at the same rho in LTU's Table 2
            both = [k for k in by_seed if k in table.get(other, {})]
            own = label in ("Trained", "Retrained", other) or not both
            line.append("" if own else difference([(by_seed[k]["main"], table[other][k]["main"]) for k in both], better))
        line.append(mean_std([v["lost"] for v in values]))
        line.append(paper_cell(paper, label, kind))
        touches, seconds = values[0].get("touches", ""), [v["UT"] for v in values if "UT" in v]
        lines.append([*line, touches, mean_std(seconds) if seconds else "", str(len(values))])
    return lines


def paper_cell(paper: dict, label: str, kind: str) -> str:
    """The paper's number for a row: ToW with its D_r / D_f / D_te, or the average gap with its UA / RA / TA / MI."""
    if label not in paper:
        return ""
    if kind == "mu":
        *scores, last = (*paper[label], 100.0) if label == "Retrained" else paper[label]
        return f"{last:.1f}" + (f" ({' / '.join(f'{x:.1f}' for x in scores)})" if scores else "")
    gap = np.mean([abs(a - b) for a, b in zip(paper[label], paper["Retrained"], strict=True)])
    return f"{gap:.2f} ({' / '.join(f'{x:g}' for x in paper[label])})"


def render(lines: list[list[str]], markdown: bool) -> str:
    if markdown:
        rows = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([rows[0], "| " + " | ".join(["---"] * len(lines[0])) + " |", *rows[1:]])
    width = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip() for line in lines)


def print_table(args, quiet=False) -> int:
    """Print the table part by part; returns how many runs are missing. The last row is what the others are compared with.

    quiet, for --table all: tables without a row of their own are left out, and missing runs are counted but not listed.
    """
    kind, rows = PLAN[args.table]
    shown = missing_runs = 0
    for part in parts(args):
        title, _, column = part
        found, missing, skipped = collect(part, rows, args)
        if args.run and missing:
            make(missing, title)
            found, missing, skipped = collect(part, rows, args)
        missing_runs += len(missing)
        for reason in skipped:
            say(f"skipped {reason}")
        if quiet and args.table not in ("mu1", "ltu1") and set(found) <= {"Second gold", rows[-1][0]}:
            continue  # only the row that ablations are compared with
        if found:
            shown += 1
            paper = PAPER.get((args.table.replace("mu2", "mu1"), column), {})
            lines = cells(rows_of(found, kind), kind, paper, "METAUNLEARN" if kind == "mu" else "LTU")
            say(f"\n{args.table}, {title}" + (f"; paper: {column}" if paper else "") + "\n" + render(lines, args.markdown))
            if "Second gold" not in found:
                say(f"no second gold model yet: python evaluate.py --ceiling --dataset {args.dataset}")
        if missing and (found or not quiet):
            say(f"\n{title}: {len(missing)} runs are missing; --run makes them" + (":" if not quiet else ""))
            for line in [] if quiet else grouped(missing):
                say("  python " + shlex.join(line))
    if shown:
        what = (
            "ToW: more is better"
            if kind == "mu"
            else "average gap: less is better; in brackets behind UA, RA, TA, MI: the gap to Retrained"
        )
        say(f"\nMean ± standard deviation; differences paired by seed ± half of Student's 95 % interval. {what}.")
        say("D_f less control: score lost on what is to be forgotten, less that lost by a control out of D_r. Goal: Retrained's.")
        if args.out == "results" and not quiet:
            say("These results came with the repository; --out runs prints yours, --run makes them.")
    elif not quiet:
        say(f"\n{args.out} holds no result of this table; run the commands above, or add --run")
    return missing_runs


# ---------------------------------------------------------------------------------------------------------------------
# Making what is missing


def grouped(missing: list) -> list[list[str]]:
    """Command lines that differ in the baseline alone, as one: the models are then loaded once."""
    lines = {}
    for _, line in missing:
        at = line.index("--method") + 1 if "--method" in line else None
        key = tuple(line if at is None else line[: at - 1] + line[at + 1 :])
        lines.setdefault(key, []).extend([] if at is None else [line[at]])
    return [[*key[:1], *(["--method", *methods] if methods else []), *key[1:]] for key, methods in lines.items()]


def make(missing: list, title: str):
    """Run the missing commands one after another; what is finished stays, so this can be stopped and started again."""
    lines, begin = grouped(missing), time.time()
    for i, line in enumerate(lines):
        left = f", about {(time.time() - begin) / i * (len(lines) - i) / 60:.0f} min left" if i else ""
        say(f"[{i + 1}/{len(lines)}] {title}{left}: python {shlex.join(line)}")
        try:
            code = subprocess.run([sys.executable, str(HERE / line[0]), *line[1:], "--resume"]).returncode
        except KeyboardInterrupt:
            code = 130
        if code == 130 or (code == 2 and i == 0):  # Ctrl-C, or a mistake that every command would meet
            fail("stopped; what is finished is kept, and the same command goes on")
        if code:
            say(f"that command failed (exit code {code}); going on with the next")


def recipe(part, k: int, args) -> argparse.Namespace:
    """train.py's arguments for seed k of a part."""
    return training.parse_args([*shlex.split(part[1]), *seed_flags(part[1], k), *places(args), "--resume"])


def opened(part, k, args):
    """(arguments, data, split) of seed k of a part; the images are read once for all seeds."""
    own = recipe(part, k, args)
    device = choose_device(own)
    key = (own.dataset, own.image_size, own.label_noise, own.train_images, own.split_seed * bool(own.label_noise or own.train_images))
    if key not in _data:
        _data.clear()
        _data[key] = load(own, device)
    return own, _data[key], make_split(_data[key], own)


_data = {}


def second_gold(data, split, own, i=1):
    """Gold models of further training seeds on the same split: they share nothing with the first but the data."""
    return training.train("gold", data, split, argparse.Namespace(**vars(own) | {"seed": own.seed + 1000 * i}))


def ceiling(args):
    """Measure a second gold model as if it were an unlearned one: the result file `retrain`, Second gold in every table."""
    for part in parts(args):
        for k in range(args.seeds):
            own = recipe(part, k, args)
            path = result_path(own, "retrain")
            if path.is_file():
                result, why, again = read_result(path, own, "mu")
                say(f"{path} is there" if result else f"{path}: {why}")
                if not again:
                    continue
            own, data, split = opened(part, k, args)
            seconds = {}
            model, seconds["train"] = training.train("original", data, split, own)
            gold, _ = training.train("gold", data, split, own)
            second, seconds["unlearn"] = second_gold(data, split, own)
            controls = control_sets(data, split)
            rows = {
                name: measure(
                    m,
                    lambda i, data=data: raw_batch(data, i),
                    data["targets"],
                    split,
                    controls,
                    data["device"],
                    own.amp,
                    data["true_targets"],
                )
                for name, m in {"original": model, "retrained": gold, "unlearned": second}.items()
            }
            for row in rows.values():
                for s in ("forget", "retain"):
                    row[s].pop("wrong", None)
            table = compare(rows)
            result = dict(method="retrain", dataset=data["name"], setting=setting(own), seed=own.seed, split_hash=split["hash"])
            result |= dict(access={"unlearning": ["retain"]}, args=vars(own), metric="mAP" if data["targets"].ndim == 2 else "accuracy")
            result |= dict(metrics=rows, comparison=table, tow=table["unlearned"]["tow"], seconds=seconds, **provenance(data["device"]))
            write_json(path, result)
            say(f"second gold model: ToW {100 * result['tow']:.1f}; {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Membership inference beyond the cheap one: was D_f in the training set? Members: D_f; non-members: the test set.

MEANING = {
    "SVC": "share of D_f that SalUn's confidence SVC takes for non-members (members: D_r); more looks forgotten",
    "loss AUC": "chance that an image of D_f has a lower loss than one of the test set; 50 is what a model that never saw D_f has",
    "RMIA AUC": "the same by RMIA, which first takes off how easy an image is for models that never saw it; 50 is chance",
    "TPR 1 %": "share of D_f that RMIA calls members when it is wrong on 1 % of the test set; 1 is chance",
    "TPR 0.1 %": "the same at 0.1 %; 0.1 is chance, and it takes a thousand test images to measure",
}


def rmia(x, x_references, z, z_references, gamma=1.0, a=0.3) -> torch.Tensor:
    """How sure RMIA is that each x was trained on: the share of population points z that x beats in likelihood ratio by the factor gamma.

    LR(x, z) = [Pr(x | theta) / Pr(x)] / [Pr(z | theta) / Pr(z)], with Pr(.) the mean over reference models that never saw the point, drawn
    towards 1 for the models that did: Pr = ((1 + a) Pr_out + 1 - a) / 2. Shapes: x (N,), x_references (R, N), z (M,),
    z_references (R, M) -> (N,) in [0, 1]. Source: Zarifzadeh et al. 2024, the offline attack of their appendix (a 0.3, gamma 2;
    with confidences that are means over attributes a factor of 2 hardly occurs, so gamma is 1 here).
    """
    ratio = [p / (((1 + a) * q.mean(0) + 1 - a) / 2) for p, q in ((x, x_references), (z, z_references))]
    share = (ratio[0][:, None] >= gamma * ratio[1][None]).double().mean(1)  # RMIA score
    return share + 1e-9 * ratio[0] / (1 + ratio[0])  # a small population leaves ties at 1, in which all members hide: LR decides


def roc(members, others) -> tuple[float, dict]:
    """(area under the curve, {false-positive rate: true-positive rate}) of scores that are higher for members."""
    from sklearn.metrics import roc_auc_score, roc_curve

    truth, scores = np.r_[np.ones(len(members)), np.zeros(len(others))], np.r_[members, others]
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    return float(roc_auc_score(truth, scores)), {level: float(true[false <= level].max()) for level in (0.001, 0.01)}


def membership(sure: dict, references: list[dict]) -> dict:
    """All attacks on one model, in percent. sure: confidences (n,) of retain, forget, val and test; references: those of models
    that were trained on neither D_f nor the rest of them. The population z is the validation set, which no model was trained on.
    """
    z = torch.stack([r["val"] for r in references])
    score_of = {s: rmia(sure[s], torch.stack([r[s] for r in references]), sure["val"], z) for s in ("forget", "test")}
    auc, at = roc(score_of["forget"], score_of["test"])
    svc = membership_inference(sure["retain"], sure["test"], sure["forget"])
    loss_auc = roc(sure["forget"], sure["test"])[0]  # confidence is exp(-loss): the same order
    shares = {"SVC": svc, "loss AUC": loss_auc, "RMIA AUC": auc, "TPR 1 %": at[0.01], "TPR 0.1 %": at[0.001]}
    return {name: 100 * value for name, value in shares.items()}


def checkpoint_of(line) -> pathlib.Path:
    own, name = parsed(line)
    return training.checkpoint_folder(own) / f"{name}-seed{own.seed}.pt"


def unlearned_model(line, model, data, split, amp: bool):
    """The unlearned model of a command line, from its checkpoint: METAUNLEARN's by one step with its saved meta-loss."""
    own, path = parsed(line)[0], checkpoint_of(line)
    own.amp = amp
    if line[0] != "metaunlearn.py":
        return with_parameters(model, load_checkpoint(path, "model", which="unlearned", split=split["hash"])["model"])
    saved = load_checkpoint(path, "meta-loss", split=split["hash"])
    for flag in metaunlearn.META_FLAGS:
        setattr(own, flag, saved[flag])
    h_phi = metaunlearn.new_meta_loss(model, data, split, own).to(data["device"])
    h_phi.load_state_dict(saved["phi"])
    S = metaunlearn.support_batch(data, split["train_ids"], split["support"], metaunlearn.updatable(model, False))
    return with_parameters(model, metaunlearn.unlearn(model, h_phi, S, own))


def attack_models(part, k, args, rows) -> dict:
    """Attack the models of one seed, {label: figures}, and write them to a file."""
    own, data, split = opened(part, k, args)
    model, golds = training.train("original", data, split, own)[0], [training.train("gold", data, split, own)[0]]
    golds += [second_gold(data, split, own, i + 1)[0] for i in range(args.references)]

    def sure_of(m):
        sets = {s: split[s] for s in ("retain", "forget", "val", "test")}
        logits = {s: predict(m, lambda i: raw_batch(data, i), indices, data["device"], own.amp) for s, indices in sets.items()}
        return {s: confidence(logits[s], data["targets"][indices].cpu()) for s, indices in sets.items()}

    known = [sure_of(m) for m in golds]  # a gold model is attacked with the others as references, so with one fewer
    here = {"Trained": membership(sure_of(model), known), "Retrained": membership(known[0], known[1:])}
    here["Second gold"] = membership(known[1], known[:1] + known[2:])
    for row in rows:
        line = command(row, part, k, args)
        if line and checkpoint_of(line).is_file():
            here[row[0]] = membership(sure_of(unlearned_model(line, model, data, split, own.amp)), known)
    content = dict(dataset=data["name"], setting=setting(own), seed=own.seed, split_hash=split["hash"], attacks=here)
    write_json(result_path(own, "attack"), content | dict(references=len(known), args=vars(own), **provenance(data["device"])))
    return here


def every_row(kind: str) -> list[tuple]:
    """The rows of all tables of a kind, each once; one whose label another table gave to another run is named with its table."""
    rows = {}
    for table in (t for t in PLAN if PLAN[t][0] == kind):
        for label, script, own in PLAN[table][1]:
            if (script, own) not in [r[1:] for r in rows.values()]:
                label = f"{label} ({table})" if label in rows else label
                rows[label] = (label, script, own)
    return list(rows.values())


def attack(args):
    """Membership inference on the two models, the second gold model and every checkpoint of a table's row; --run makes what is missing."""
    main, shown = PLAN[args.table][1], False
    rows = every_row(PLAN[args.table][0])
    for part in parts(args):
        table, absent = {}, set()
        for k in range(args.seeds):
            path, here = result_path(recipe(part, k, args), "attack"), {}
            if path.is_file():
                try:
                    here = json.loads(path.read_text())["attacks"]
                    assert all(set(values) == set(MEANING) for values in here.values()) and "Trained" in here
                except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
                    say(f"skipped {path}: cut short or of another version")
                    here = {}
            wanted = {row[0] for row in main}
            if args.run and wanted - set(here):
                lines = [(row[0], command(row, part, k, args)) for row in main]
                make([(label, line) for label, line in lines if line and not checkpoint_of(line).is_file()], part[0])
                here = attack_models(part, k, args, rows)
            absent |= wanted - set(here) if here else {f"seed {k}"}
            for label, values in here.items():
                table.setdefault(label, []).append(values)
        if table:
            shown = True
            lines = [["", *MEANING, "n"]]
            lines += [[label, *(mean_std([v[c] for v in values]) for c in MEANING), str(len(values))] for label, values in table.items()]
            say(f"\nmembership inference, {part[0]}; members D_f, non-members D_te, percent\n" + render(lines, args.markdown))
        if absent:
            say(f"{part[0]}: not attacked: {', '.join(sorted(absent))}; --run makes what is missing")
    if shown:
        say("\nThe goal is Retrained's figure in every column, neither more nor less.")
        for name, meaning in MEANING.items():
            say(f"  {name}: {meaning}")


# ---------------------------------------------------------------------------------------------------------------------
# METAUNLEARN's figures 4 to 6


def features_of(model, data, indices) -> torch.Tensor:
    """Features f of the original model, (n, D), in which all distances are taken."""
    out = []
    with torch.no_grad():
        for batch in torch.as_tensor(indices).split(256):
            out.append(model(raw_batch(data, batch))[0].float().cpu())
    return torch.cat(out)


def people(part, k, args, rows) -> dict:
    """What figures 4 to 6 show of one split.

    forget: of each identity to forget `distance` (its Support sample's from the centroid of its D_f) and `gap` (accuracy on its D_f,
    unlearned less retrained, mean over rows, percentage points). retain: of each retained identity `distance` (of its centroid
    from the nearest forget identity's) and `change` (its mAP, unlearned less trained).
    """
    lines = [(row[0], command(row, part, k, args)) for row in rows]
    absent = [(label, line) for label, line in lines if not checkpoint_of(line).is_file()]
    if absent and not args.run:
        fail(f"no checkpoint of {absent[0][0]}, split {k}, in {args.checkpoint_dir}; add --run to make it again")
    if absent:
        make(absent, part[0])
    own, data, split = opened(part, k, args)
    model, gold = training.train("original", data, split, own)[0], training.train("gold", data, split, own)[0]
    models = [unlearned_model(line, model, data, split, own.amp) for _, line in lines]
    f, owner = {}, {s: data["identities"][split[s]] for s in ("forget", "retain")}
    for s in ("forget", "retain", "support"):
        f[s] = features_of(model, data, split[s])
    centroid = {s: {int(i): f[s][owner[s] == i].mean(0) for i in np.unique(owner[s])} for s in owner}
    logits = {
        s: [predict(m, lambda i: raw_batch(data, i), split[s], data["device"], own.amp) for m in (model, gold, *models)] for s in owner
    }
    out = {"forget": [], "retain": [], "split": split, "data": data}
    for s in owner:
        y = data["targets"][split[s]].cpu()
        for i in centroid[s]:
            mine = torch.as_tensor(owner[s] == i)
            of = lambda measure, m, s=s, mine=mine, y=y: 100 * measure(logits[s][m][mine], y[mine])
            if s == "forget":
                at = [int(data["identities"][j]) for j in split["support"]].index(i)
                distance = (f["support"][at] - centroid[s][i]).norm().item()
                gap = np.mean([of(accuracy, 2 + m) - of(accuracy, 1) for m in range(len(models))])
                out[s].append({"identity": i, "distance": distance, "gap": float(gap)})
            else:
                distance = min((c - centroid[s][i]).norm().item() for c in centroid["forget"].values())
                change = np.mean([of(score, 2 + m) - of(score, 0) for m in range(len(models))])
                out[s].append({"identity": i, "distance": distance, "change": float(change)})
    return out


def rank_correlation(x, y) -> float:
    """Spearman's rank correlation; 0 where y is constant, for then nothing depends on x."""
    from scipy import stats

    return float(stats.spearmanr(x, y)[0]) if np.ptp(y) else 0.0


def binned(points: list, bins=5) -> list[dict]:
    """Means of y in bins of x that hold as many points each; points: an array (n, 2) for each split.

    Identities of one split share their models, so splits are what is independent: interval over the splits' own means in a bin.
    """
    x, y = np.concatenate(points).T
    split = np.repeat(np.arange(len(points)), [len(p) for p in points])
    out = []
    for chosen in np.array_split(np.argsort(x, kind="stable"), min(bins, max(1, len(x) // 2))):
        mean, half = interval([y[chosen][split[chosen] == i].mean() for i in np.unique(split[chosen])])
        out.append(
            {"from": x[chosen].min(), "to": x[chosen].max(), "center": x[chosen].mean(), "n": len(chosen), "mean": mean, "half": half}
        )
    return out


def figure(args):
    """Draw figure 4, 5 or 6 of each part and print what it shows."""
    for number, part in enumerate(parts(args)):
        found, _, _ = collect(part, PLAN["mu1"][1], args)
        rows = [row for row in PLAN["mu1"][1] if len(found.get(row[0], {})) == args.seeds and row[0] != "Influence (ours)"]  # not a paper's
        if not rows:
            fail(f"{args.out} holds no row with {args.seeds} seeds; first: python evaluate.py --table mu1 --dataset {args.dataset} --run")
        rows = sorted(rows, key=lambda row: -np.mean([r["tow"] for r in found[row[0]].values()]))[:3]  # the paper's top three
        name = f"figure{args.figure}-{args.dataset}-{(args.part or 1) + number}.png"
        if args.figure == 6:
            hardest_people(part, args, rows, name)
            continue
        splits = [people(part, k, args, rows) for k in range(args.seeds)]
        who, value = ("forget", "gap") if args.figure == 4 else ("retain", "change")
        points = [
            np.array([(p["distance"], p[value]) for p in split[who] if np.isfinite(p[value])]) for split in splits
        ]  # of each split (n, 2)
        points = [np.c_[p[:, 0] / np.median(p[:, 0]), p[:, 1]] for p in points]  # each split's model has its own unit of distance
        rank = interval([rank_correlation(*p.T) for p in points])
        bins = binned(points)
        methods = ", ".join(row[0] for row in rows)
        say(f"\nfigure {args.figure}, {part[0]}: mean of {methods}; {sum(map(len, points))} identities of {args.seeds} splits")
        lines = [["distance / median", "identities", f"{value} (points)"]]
        lines += [[f"{b['from']:.2f} to {b['to']:.2f}", str(b["n"]), with_half(b["mean"], b["half"])] for b in bins]
        say(render(lines, args.markdown))
        said = {"better": "rises", "worse": "falls"}.get(verdict(*rank, True), verdict(*rank, True))
        say(f"Spearman's rank correlation, mean over splits: {with_half(*rank, 2)} ({said})")
        path = pathlib.Path(args.out) / name
        draw_bins(path, bins, args.figure, f"{part[0]}; n = {args.seeds} splits\nmean of {methods}")
        say(f"figure: {path}")


def draw_bins(path, bins, number, title):
    """Means with 95 % intervals over distance, with the number of identities in each bin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    center, mean, half = (np.array([b[key] for b in bins]) for key in ("center", "mean", "half"))
    axes.errorbar(center, mean, np.nan_to_num(half), fmt="ko-", capsize=4, linewidth=1, label="mean and 95 % interval over splits")
    for b in bins:
        axes.annotate(f"n = {b['n']}", (b["center"], b["mean"]), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="0.6", linestyle="--", linewidth=1)
    axes.margins(x=0.12)  # room for the last bin's label
    if number == 4:
        axes.set_xlabel("Support sample's distance from its identity's centroid (1: the split's median)", fontsize=9)
        axes.set_ylabel("accuracy on $D_f$, unlearned less\nretrained (percentage points)")
    else:
        axes.set_xlabel("retained identity's distance from the nearest forgotten one (1: the split's median)", fontsize=9)
        axes.set_ylabel("mAP, unlearned less trained\n(percentage points)")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    with atomic_write(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=120)
    plt.close(canvas)


def hardest_people(part, args, rows, name):
    """Figure 6: the five identities whose Support sample lies farthest from their D_f, on split 0."""
    found = people(part, 0, args, rows)
    hardest = sorted(found["forget"], key=lambda p: -p["distance"])[:5]
    say(f"\nfigure 6, {part[0]}: the hardest identities of split 0, by the Support sample's distance from their centroid")
    say(
        render(
            [["identity", "distance", "gap (points)"]]
            + [[str(p["identity"]), f"{p['distance']:.2f}", f"{p['gap']:+.1f}"] for p in hardest],
            args.markdown,
        )
    )
    data, split = found["data"], found["split"]
    open_to_all = data["name"] in ("toyfaces", "qmnist")
    path = pathlib.Path(args.out if open_to_all else args.data_dir) / name
    if not open_to_all:  # pictures of real people: only where git does not look
        git = ["git", "-C", str(path.parent), "check-ignore", "-q", str(path.resolve())]
        if shutil.which("git") and subprocess.run(git, capture_output=True).returncode == 1:
            fail(f"{path} could be committed, and shows real people; give a --data-dir that git ignores")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(len(hardest), 6, figsize=(6, 1.15 * len(hardest)), squeeze=False, layout="constrained")
    owner = data["identities"]
    for line, p in zip(axes, hardest, strict=True):
        mine = [i for i in split["support"] if owner[i] == p["identity"]] + [i for i in split["forget"] if owner[i] == p["identity"]][:5]
        for cell in line:
            cell.axis("off")
        for cell, i in zip(line, mine, strict=False):
            cell.imshow(data["images"][i].cpu().numpy())
        line[0].set_title(f"S, identity {p['identity']}", fontsize=7)
        line[1].set_title("$D_f$", fontsize=7)
    with atomic_write(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=120)
    plt.close(canvas)
    say(f"figure: {path}" + ("" if open_to_all else " (real people: for your eyes, not for publishing)"))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--table", choices=[*PLAN, "all"], help="METAUNLEARN's (mu) or LTU's (ltu) table of that number; all that have results"
    )
    what.add_argument("--figure", type=int, choices=(4, 5, 6), help="METAUNLEARN's figure of that number")
    what.add_argument("--attack", action="store_true", help="membership inference on every checkpoint: SVC, loss AUC, RMIA")
    what.add_argument("--ceiling", action="store_true", help="train second gold models, seed + 1000, and measure them like a method")
    add("--dataset", choices=SETTINGS, default=None, help="setting of the runs, see SETTINGS; None: toyfaces for mu, digits for ltu")
    add(
        "--seeds",
        type=int,
        default=None,
        help="seeds 0 to this less 1; None: 5 for toyfaces, toyfaces-heldout and digits, else 3; papers: 3 and 10",
    )
    add("--part", type=int, default=0, help="only this part of the setting, 1: the first (10 %% forgotten, fewest identities); 0: all")
    add("--references", type=int, default=2, help="further gold models, seeds + 1000, + 2000, that RMIA has beside the first")
    add("--run", action="store_true", help="make the missing runs first, one after another; finished ones are kept")
    add("--markdown", action="store_true", help="print tables as Markdown")
    add("--flags", default="", help='more flags for every script, as one word: --flags "--init weights.safetensors"')
    add("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    add("--data-dir", default="data", help="folder with the publishers' files, and for pictures of real people")
    add(
        "--out",
        default=None,
        help="folder of result files and figures; None: results, which came with the repository, to print, and runs, which is yours, "
        "with --run, --ceiling or --figure",
    )
    add("--checkpoint-dir", default="checkpoints", help="folder of models and meta-losses")
    args = parser.parse_args(argv)
    faces = args.figure is not None or (args.table or "").startswith("mu")
    args.dataset = args.dataset or ("toyfaces" if faces else "digits")
    identities = "--ids" in SETTINGS[args.dataset][0][1]
    if (args.table not in (None, "all") or args.figure) and identities != faces:
        named = f"--table {args.table}" if args.table else f"--figure {args.figure}"
        right = [name for name, own in SETTINGS.items() if ("--ids" in own[0][1]) == faces]
        fail(f"{named} is not about --dataset {args.dataset}; choose {', '.join(right)}")
    if args.attack:
        args.table = "mu1" if identities else "ltu1"
    yours = args.run or args.ceiling or args.figure is not None
    args.out = args.out or ("runs" if yours else "results")
    args.seeds = (5 if args.dataset in ("toyfaces", "toyfaces-heldout", "digits") else 3) if args.seeds is None else args.seeds
    try:
        words = shlex.split(args.flags)
    except ValueError as error:
        fail(f"--flags {args.flags}: {str(error).lower()}")
    if {"--seed", "--split-seed"} & {word.split("=")[0] for word in words}:
        fail("--flags must leave --seed and --split-seed alone: they number a table's runs; see --seeds")
    if not 0 <= args.part <= len(SETTINGS[args.dataset]):
        fail(f"--part is {args.part}; --dataset {args.dataset} has parts 1 to {len(SETTINGS[args.dataset])}")
    if args.part and args.table and not parts(args):
        fail(f"--table {args.table} is about the first part alone")
    if not 1 <= args.seeds <= 1000 or not 1 <= args.references <= 100:
        fail(f"--seeds ({args.seeds}) and --references ({args.references}) must be at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.run or args.ceiling or args.figure:
        check_writable(args.out, args.checkpoint_dir)
    if args.table == "all":
        kind = "mu" if "--ids" in SETTINGS[args.dataset][0][1] else "ltu"
        tables = [t for t in PLAN if PLAN[t][0] == kind and t != "mu2"]  # mu2 is mu1 on CelebA
        if not any(pathlib.Path(places(args)[1]).glob("*/*.json")):
            say(f"{places(args)[1]} holds no result; first: python evaluate.py --table {kind}1 --dataset {args.dataset} --run")
        return sum(print_table(argparse.Namespace(**vars(args) | {"table": t}), quiet=True) for t in tables)
    if args.table and not args.attack:
        return print_table(args)
    return (attack if args.attack else ceiling if args.ceiling else figure)(args)


if __name__ == "__main__":
    main()
