"""LTU: meta-learned, harmonised gradients unlearn a random part of the training data with 30 % of the rest at hand.

Source: Huang, Foo, Liu, "Learning to Unlearn for Robust Machine Unlearning". The file reads in the paper's order:
    S = forget images with random labels; Q_1..Q_3 = images of D_r-hat near to them, of their class, at random   Eq. (6)-(10)
    g_r = grad_theta [ L(theta, S) + sum_i L(theta - alpha grad L(theta, S), Q_i) ]                               Eq. (1)-(5)
    g_f = the same, with one membership inference model as support and another as query                           Eq. (11)
    theta = theta - beta (g_r + g_f'),  g_f' = g_f less what of it conflicts with g_r                             Eq. (12)

Usage:
    python ltu.py --rho 0.3                                   # scikit-learn's digits, two CPU cores
    python ltu.py --dataset cifar10 --forget-ratio 0.5        # the paper's main experiment: ResNet-18
    python ltu.py --dataset toyfaces --ids 10                 # forget identities from a multi-label model

Symbols: theta model, theta_tau temporarily tuned model, alpha meta-tune step, beta meta-update step, rho share of D_r at hand,
D_r_hat that share, D_f / D_r / D_v / D_te forget, retain, validation and test sets, k images a set, z_1..z_3 samplers, K MI models.

No official code exists. Where the paper is silent this is what we do:
    1. random labels: uniform over all classes, the true one included, drawn anew each iteration; for attributes, which no
       coin toss resembles, the label vector of a random image of D_r_hat
    2. feature extractor F of Eq. (8): the original model's own features before its classifier
    3. I of Eq. (9): one-hot, or the attribute vector; of equally near images one at random
    4. S and D_Au are the same k images of D_f; z_1 and z_2 look for their neighbours; Q_1..Q_3 go through the model as one batch
    5. MI models: trained on the original model's outputs as it is used (eval mode, no augmentation), members from D_r_hat,
       non-members from D_v; Eq. (11) then asks them about outputs as they are while training; see mi_models
    6. batch norm: every pass normalises by its own batch. Running statistics are moved by the query passes alone: by images of
       D_r_hat, but at theta_tau, which S has a part in. So --no-remfeed never moves them, and --combine iterative half as often
    7. Eq. (5) is plain SGD: no momentum, no weight decay; beta falls to 0 along a cosine
    8. N = 3 query sets; the sums of Eq. (4) are sums: three query losses weigh three times as much as one
    9. "w/o MetaOpt": the same losses, all at theta; "iterative": g_f at odd, g_r at even iterations, without projection
"""

import copy
import json
import math
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (
    Parser,
    accuracy,
    add_shared_arguments,
    autocast,
    average_gap,
    check_file,
    check_ranges,
    check_writable,
    choose_device,
    compare,
    confidence,
    fail,
    generator,
    load_checkpoint,
    measure,
    membership_inference,
    paper_figures,
    parse_with_presets,
    plot,
    predict,
    print_gaps,
    provenance,
    rank_and_world,
    save_checkpoint,
    say,
    task_losses,
    write_json,
)
from data import (
    augment,
    control_sets,
    describe,
    draw_augmentation,
    load,
    make_split,
    random_labels,
    raw_batch,
    reachable,
    setting,
    targets_of,
)
from train import PRESETS as TRAINING_PRESETS
from train import RECIPE_RANGES, add_recipe_arguments, checkpoint_folder, train

# What --dataset brings along; a flag on the command line wins. digits: searched, see results/README.md; the others are starting
# points, not tuned at full size.
_DATASETS = {
    "digits": dict(alpha=0.2, beta=0.01, iterations=60, support_size=64),
    "cifar10": dict(alpha=0.1, beta=0.1, iterations=160, support_size=256),
    "cifar100": dict(alpha=0.1, beta=0.1, iterations=160, support_size=256),
    "tinyimagenet": dict(alpha=0.03, beta=0.03, iterations=300, support_size=256),
    "toyfaces": dict(alpha=0.1, beta=0.03, iterations=50, support_size=64),
}
PRESETS = {name: values | _DATASETS.get(name, {}) for name, values in TRAINING_PRESETS.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.1, meta optimisation


def meta_gradient(tune_loss, test_loss, theta: dict, alpha: float, first_order=False) -> tuple[list[Tensor], float, float]:
    """grad_theta [ L_tune(theta) + sum_i L_test^i(theta - alpha grad L_tune(theta)) ], the gradient in Eq. (5), exact.

    tune_loss and test_loss map parameters {name: tensor} to a loss (), the latter summed over query sets. By the chain rule it
    is g_tune + (I - alpha H) v with v = grad L_test at theta_tau and H the Hessian of L_tune at theta, so only the support
    batch carries a second-order graph. first_order leaves H out. Returns (gradient, L_tune, L_test); used for both feedbacks.
    """
    leaf = {k: p.detach().requires_grad_() for k, p in theta.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        L_tune = tune_loss(leaf)  # Eq. (1)
        g_tune = torch.autograd.grad(L_tune, list(leaf.values()), create_graph=not first_order and alpha > 0)
    theta_tau = {k: (p - alpha * g).detach().requires_grad_() for (k, p), g in zip(leaf.items(), g_tune, strict=True)}  # Eq. (2)
    L_test = test_loss(theta_tau)  # Eq. (3), summed
    v = torch.autograd.grad(L_test, list(theta_tau.values()))
    if first_order or alpha == 0:
        return [g + w for g, w in zip(g_tune, v, strict=True)], L_tune.item(), L_test.item()
    # A parameter that g_tune does not depend on (the last bias, where the loss is linear in it) has no second derivative.
    H_v = torch.autograd.grad(g_tune, list(leaf.values()), v, materialize_grads=True, allow_unused=True)
    gradient = [(g + w - alpha * h).detach() for g, w, h in zip(g_tune, v, H_v, strict=True)]  # Eq. (4), its gradient
    return gradient, L_tune.item(), L_test.item()


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.2, support and query sets of the remembering feedback


def z_1_table(model, data, forget: Tensor, seen: Tensor, args) -> Tensor:
    """Eq. (8) for every image of D_f: the index of its nearest neighbour in D_r_hat by ||F(x_i) - F(x_j)||_2: (|D_f|,)."""
    features = predict_features(model, data, torch.cat([forget, seen]), args)  # (|D_f| + |D_r_hat|, D)
    f, r = features[: len(forget)], features[len(forget) :]
    return torch.cat([seen[torch.cdist(block, r).argmin(1)] for block in f.split(1024)])


def z_2(labels: Tensor, seen: Tensor, seen_labels: Tensor, rng: torch.Generator) -> Tensor:
    """Eq. (9): for each of k labels the index of an image of D_r_hat with the nearest label vector, ties broken at random.

    labels (k, K) and seen_labels (n, K) are vectors of 0 and 1 (one-hot or attributes), so squared distances are whole numbers,
    and a random number below 1 decides between equals alone.
    """
    distance = labels.sum(1)[:, None] + seen_labels.sum(1) - 2 * labels @ seen_labels.T  # (k, n), ||a - b||^2 of zeros and ones
    return seen[(distance + torch.rand(distance.shape, generator=rng)).argmin(1)]


def z_3(seen: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Eq. (10): k random images of D_r_hat, without repeats where there are enough."""
    if k <= len(seen):
        return seen[torch.randperm(len(seen), generator=rng)[:k]]
    return seen[torch.randint(len(seen), (k,), generator=rng)]


def label_vectors(data, indices) -> Tensor:
    """I(y) of Eq. (9), on the CPU: one-hot (n, K), or the attribute vector."""
    targets = data["targets"][indices]
    return targets if targets.ndim == 2 else F.one_hot(targets, data["classes"]).float()


@torch.no_grad()
def predict_features(model, data, indices, args) -> Tensor:
    """F(x): features before the classifier, (n, D) float32 on the CPU, in eval mode."""
    model.eval()
    with autocast(data["device"], args.amp):
        return torch.cat([model(raw_batch(data, part))[0].float().cpu() for part in indices.split(256)])


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.2, membership inference models of the forgetting feedback


def signals(kind: str, logits: Tensor, targets: Tensor) -> Tensor:
    """What an MI model of this kind sees of a prediction: (B, K) logits, labels -> (B, inputs), differentiable.

    posterior: probabilities and the label (Shokri et al. 2017). top3: the three largest probabilities in order (ML-Leaks, Salem et
    al. 2019). scalars: loss, entropy, margin, largest probability. logit: the label's log odds (Yeom et al.; LiRA's scaling)
    and the label, so that each class has its own threshold. For attributes each is the Bernoulli version, averaged over them.
    """
    if targets.ndim == 2:
        p, y = logits.sigmoid(), targets.to(logits.dtype)
        odds = logits * (2 * y - 1)  # (B, K): log odds of the right answer
        entropy = F.binary_cross_entropy_with_logits(logits, p, reduction="none").mean(1)
        margin, log_odds, top = odds.amin(1), odds.mean(1), odds.sigmoid()
    else:
        log_p, y = logits.log_softmax(1).clamp(min=-30), F.one_hot(targets, logits.shape[1]).to(logits.dtype)
        p = log_p.exp()
        own = (log_p * y).sum(1)  # (B,)
        rest = (logits - 1e4 * y).logsumexp(1) - logits.logsumexp(1)  # log(1 - p_y) without cancellation
        log_odds = (own - rest.clamp(min=-30)).clamp(-30, 30)
        entropy, margin, top = -(p * log_p).sum(1), (logits * y).sum(1) - (logits - 1e4 * y).amax(1), p
    if kind == "posterior":
        return torch.cat([p, y], 1)
    if kind == "top3":
        return top.topk(min(3, top.shape[1]), dim=1).values
    if kind == "scalars":
        return torch.stack([task_losses(logits, targets), entropy, margin, top.amax(1)], 1)
    return torch.cat([log_odds[:, None], y], 1)


class MIModel(nn.Module):
    """theta_A of Eq. (11): says from a prediction whether the image was trained on; logits (B, K), labels -> log odds (B,)."""

    def __init__(self, kind: str, inputs: int):
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.net = {
            "posterior": lambda: nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)),
            "top3": lambda: nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 1)),
            "scalars": lambda: nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)),
            "logit": lambda: nn.Linear(inputs, 1),
        }[kind]()

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.net((signals(self.kind, logits, targets) - self.mean) / self.std)[:, 0]


KINDS = ("posterior", "top3", "scalars", "logit")
N = 3  # query sets, Eq. (3): one for each of z_1, z_2, z_3


def mi_models(model, data, split, seen, args) -> tuple[list[MIModel], list[dict]]:
    """Train K MI models on the original model's outputs: members from D_r_hat, non-members from D_v, as many of each.

    They differ in input and architecture (signals, MIModel) and, each on a bootstrap of its own, in training data; none is
    the SVC that MI is measured with, none sees D_f or the test set. A model trained too little can end with its sign inverted
    (measured), so the balanced accuracy of each is reported: on its own data, and on what its bootstrap left out.
    """
    device, rng = data["device"], np.random.default_rng([args.seed, args.split_seed, 7])
    logits = {
        name: predict(model, lambda i: raw_batch(data, i), split_part, device, args.amp)
        for name, split_part in (("in", seen), ("out", split["val"]))
    }
    targets = {"in": data["targets"][seen], "out": data["targets"][split["val"]]}
    models, report = [], []
    for number in range(args.mi_models):
        kind, n = KINDS[number % len(KINDS)], min(len(seen), len(split["val"]))
        rows = {name: rng.choice(len(x), n) for name, x in logits.items()}  # a bootstrap of each side
        x = torch.cat([logits[name][rows[name]] for name in ("in", "out")])  # (2n, K)
        y = torch.cat([targets[name][rows[name]] for name in ("in", "out")])
        member = torch.cat([torch.ones(n), torch.zeros(n)])
        torch.manual_seed(generator(args.seed, 7, number).initial_seed())
        with torch.no_grad():
            seen_signals = signals(kind, x, y)  # (2n, inputs)
        attack = MIModel(kind, seen_signals.shape[1])
        attack.mean, attack.std = seen_signals.mean(0), seen_signals.std(0).clamp(min=1e-3)
        if kind in ("posterior", "logit"):  # labels stay 0 and 1: a class that only D_f has would come out as 1 / 0.001
            attack.mean[-data["classes"] :], attack.std[-data["classes"] :] = 0.0, 1.0
        optimizer = torch.optim.Adam(attack.parameters(), 1e-2, weight_decay=1e-4)
        for _ in range(2 if args.dry_run else args.mi_steps):
            batch = torch.from_numpy(rng.integers(0, 2 * n, 256))
            loss = F.binary_cross_entropy_with_logits(attack(x[batch], y[batch]), member[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        @torch.no_grad()
        def balanced(choose, attack=attack):
            if min(len(choose(name)) for name in logits) == 0:
                return None
            says = {name: attack(logits[name][choose(name)], targets[name][choose(name)]) > 0 for name in logits}
            return (says["in"].float().mean() + 1 - says["out"].float().mean()).item() / 2

        left_out = {name: np.setdiff1d(np.arange(len(x)), rows[name]) for name, x in logits.items()}
        report.append({"kind": kind, "own": balanced(rows.get), "left_out": balanced(left_out.get)})
        models.append(attack.to(device).requires_grad_(False).eval())
    shown = ", ".join(f"{r['kind']} {100 * r['left_out']:.0f} %" for r in report if r["left_out"] is not None)
    say("MI models, balanced accuracy (left out of training):", shown)
    return models, report


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.3, gradient harmonisation


def harmonize(g_r: list[Tensor], g_f: list[Tensor]) -> tuple[list[Tensor], float]:
    """g_f' of Eq. (12), over the whole gradient as one vector, and cos(g_r, g_f). Only g_f is projected, never g_r."""
    dot = lambda a, b: torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).cpu().double().sum()  # MPS has no float64
    r_f, r_r, f_f = dot(g_r, g_f), dot(g_r, g_r), dot(g_f, g_f)
    cosine = (r_f / (r_r * f_f).sqrt().clamp(min=1e-300)).item()
    if cosine < 0:
        g_f = [f - (r_f / r_r).item() * r for f, r in zip(g_f, g_r, strict=True)]  # Eq. (12)
    return g_f, cosine


# ---------------------------------------------------------------------------------------------------------------------
# Unlearning


def forward(student, theta: dict, images: Tensor, args, moves_statistics=False) -> Tensor:
    """f_theta(images), logits (B, K) in float32 at least; batch norm uses the batch, and keeps a trace of it only where asked."""
    buffers = dict(student.named_buffers())
    if not moves_statistics:
        buffers = {k: b.clone() for k, b in buffers.items()}  # functional_call would move the model's own
    with autocast(images.device, args.amp):
        _, logits = functional_call(student, (theta, buffers), (images,))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def iteration(student, theta, batch: dict, attacks, args) -> tuple[list[Tensor], dict]:
    """One iteration's gradient G = g_r + g_f' and what it saw. batch: S, y_rand, y, Q, y_Q (see draw_batch)."""
    t, alpha = batch["iteration"], args.alpha if args.metaopt else 0.0
    remember = args.remfeed and not (args.combine == "iterative" and t % 2 == 0)  # the first iteration, t = 0, is the odd one
    forget = args.forfeed and not (args.combine == "iterative" and t % 2 == 1)
    seen = {}
    if remember:
        S = lambda theta: task_losses(forward(student, theta, batch["S"], args), batch["y_rand"]).mean()  # Eq. (6)

        def Q(theta):  # Eq. (7); N times the mean over the joined batch is the sum of the N sets' means
            return N * task_losses(forward(student, theta, batch["Q"], args, moves_statistics=True), batch["y_Q"]).mean()

        g_r, seen["tune"], seen["test"] = meta_gradient(S, Q, theta, alpha, args.first_order)
    if forget:
        non_member = torch.zeros(len(batch["S"]), device=batch["S"].device)

        def audit(which):  # Eq. (11)
            return lambda theta: F.binary_cross_entropy_with_logits(
                attacks[which](forward(student, theta, batch["S"], args), batch["y"]), non_member
            )

        i, j = batch["attacks"]  # one MI model is the support set, another the query set
        g_f, seen["mi_tune"], seen["mi_test"] = meta_gradient(audit(i), audit(j), theta, alpha, args.first_order)
    if not (remember and forget):
        return (g_r if remember else g_f), seen
    projected, seen["cosine"] = harmonize(g_r, g_f)
    return [r + f for r, f in zip(g_r, projected if args.combine == "project" else g_f, strict=True)], seen


def draw_batch(data, forget: Tensor, seen: Tensor, seen_labels, z_1, t: int, args) -> dict:
    """S and D_Au (the same k images of D_f), Q_1..Q_3 and the two MI models of iteration t; depends on seed and t alone."""
    rng = generator(args.seed, t, 8)
    k = min(args.support_size, len(forget))
    rows = torch.randperm(len(forget), generator=rng)[:k]
    S = forget[rows]
    queries = [z_1[rows], z_2(label_vectors(data, S), seen, seen_labels, rng), z_3(seen, k, rng)]
    Q = torch.cat(queries)  # (3k,)
    images = lambda indices: augment(raw_batch(data, indices), draw_augmentation(len(indices), args, rng))
    batch = {"iteration": t, "y_rand": random_labels(data, seen, k, rng), "y": targets_of(data, S)}
    batch |= {"S": images(S), "Q": images(Q), "y_Q": targets_of(data, Q), "indices": (S, Q)}
    batch["attacks"] = torch.randperm(args.mi_models, generator=rng)[:2].tolist()  # i != j
    return batch


def unlearn(model, data, split, seen, attacks, args, partial=None, method="ltu") -> tuple[nn.Module, list[dict], float]:
    """LTU on a copy of model, from D_f and D_r_hat (`seen`) alone; returns it, a log of losses and cosines, and the seconds it took.

    method "ft" is the bar beside it: the same query batches and steps, with the plain gradient of their losses.
    partial: where to save progress for --resume. Raises SystemExit(2) at a step that diverges; the model before that step is
    then kept at partial.
    """
    student = copy.deepcopy(model).train()
    theta = {k: p.detach() for k, p in student.named_parameters()}
    forget, seen = torch.tensor(split["forget"]), torch.tensor(seen)
    z_1, seen_labels = z_1_table(model, data, forget, seen, args), label_vectors(data, seen)
    identity = {"split": split["hash"], "method": method, **{flag: getattr(args, flag) for flag in METHOD_FLAGS}}
    first, log, begin, clock = 0, [], time.time(), time.time()
    if partial and args.resume and partial.is_file():
        saved = load_checkpoint(partial, "partial unlearning", **identity)
        student.load_state_dict(saved["model"])
        first, log, begin = saved["iteration"] + 1, saved["log"], begin - saved["seconds"]
        say(f"{method}: resuming after iteration {first}")
    total = 2 if args.dry_run else args.iterations

    def keep(t):
        if partial and rank_and_world()[0] == 0:
            progress = dict(model=student.state_dict(), iteration=t, log=log, seconds=time.time() - begin)
            save_checkpoint(partial, kind="partial unlearning", **progress, **identity)

    for t in range(first, total):
        batch = draw_batch(data, forget, seen, seen_labels, z_1, t, args)
        before = {k: x.clone() for k, x in student.state_dict().items()}
        if method == "ft":
            leaf = {k: p.detach().requires_grad_() for k, p in theta.items()}
            L = N * task_losses(forward(student, leaf, batch["Q"], args, moves_statistics=True), batch["y_Q"]).mean()
            G, told = torch.autograd.grad(L, list(leaf.values())), {"test": L.item()}
        else:
            G, told = iteration(student, theta, batch, attacks, args)
        beta = args.beta * 0.5 * (1 + math.cos(math.pi * t / total))
        with torch.no_grad():
            for p, g in zip(theta.values(), G, strict=True):
                p -= beta * g  # Eq. (5), with the harmonised gradient; theta shares its memory with student
        loss = max(abs(value) for value in told.values())
        if not loss < 1e4 or not all(torch.isfinite(x).all() for x in student.state_dict().values()):
            student.load_state_dict(before)
            keep(t - 1)
            where = f"; the last good model is kept at {partial}" * bool(partial)
            fail(f"{method}: iteration {t + 1} diverged (loss {loss:g}); lower --beta ({args.beta}) or --alpha ({args.alpha}){where}")
        log.append(told)
        if (t + 1) % max(1, total // 5) == 0 or time.time() - clock > 60:
            clock = time.time()
            say(f"{method} iteration {t + 1}/{total}: " + ", ".join(f"{name} {value:.3f}" for name, value in told.items()))
            keep(t)
    return student.eval(), log, time.time() - begin


# ---------------------------------------------------------------------------------------------------------------------
# Choosing hyper-parameters, and what was forgotten


def validation_gap(unlearned, model, data, split, seen, args) -> dict | None:
    """How far from the goal, judged without the gold model and the test set: the rule by which flags were chosen. Ours.

    The goal is the original model, but with D_f looking like the validation images, which it never saw: their error for UA, its
    accuracy on D_r_hat for RA and on D_v for TA, and for MI the share of D_v that the attack (members D_r_hat) takes for
    non-members. Returns the four gaps and their mean, in [0, 1]; None for a whole class, which D_v has no image of.
    """
    if args.forget in ("class", "subclass"):
        return None

    def figures(m, forget):
        logits = {name: predict(m, lambda i: raw_batch(data, i), part, data["device"], args.amp) for name, part in parts.items()}
        y = {name: data["targets"][part] for name, part in parts.items()}
        sure = {name: confidence(logits[name], y[name]) for name in parts}
        right = {name: accuracy(logits[name], y[name]) for name in parts}
        mi = membership_inference(sure["seen"], sure["val"], sure[forget])
        return {"ua": 1 - right[forget], "ra": right["seen"], "ta": right["val"], "mi": mi}

    parts = {"seen": seen, "val": split["val"], "forget": split["forget"]}
    goal, got = figures(model, "val"), figures(unlearned, "forget")
    gaps = {name: abs(got[name] - goal[name]) for name in goal}
    return gaps | {"mean": float(np.mean(list(gaps.values())))}


def wrong_by_label(rows, data, split, seen) -> dict:
    """Error on flipped and on clean images of D_f, D_r_hat and the rest of D_r: {row: {set: {flipped, clean}}}, in [0, 1].

    A low gap alone does not prove that it was D_f that was forgotten: a method that drops every wrong label has one too.
    """
    flipped = (data["targets"] != data["true_targets"]).numpy()
    at_hand = np.isin(split["retain"], seen)
    out = {}
    for name, row in rows.items():
        f, r = np.array(row["forget"].pop("wrong")), np.array(row["retain"].pop("wrong"))
        sets = {"D_f": (f, flipped[split["forget"]]), "D_r_hat": (r[at_hand], flipped[split["retain"]][at_hand])}
        sets["rest of D_r"] = (r[~at_hand], flipped[split["retain"]][~at_hand])
        share = lambda wrong, chosen: float(wrong[chosen].mean()) if chosen.any() else None
        out[name] = {
            key: {"flipped": share(wrong, is_flipped), "clean": share(wrong, ~is_flipped)} for key, (wrong, is_flipped) in sets.items()
        }
    return out


def print_wrong(table: dict, names: dict):
    say("\nerror (%) on flipped / clean labels   " + "".join(f"{key:>18s}" for key in ("D_f", "D_r_hat", "rest of D_r")))
    for name, sets in table.items():
        shown = ["-" if x is None else f"{100 * x:.1f}" for s in sets.values() for x in (s["flipped"], s["clean"])]
        say(f"{names[name]:38s}" + "".join(f"{a:>10s} / {b:>5s}" for a, b in zip(shown[::2], shown[1::2], strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Command line

RANGES = [
    ("alpha", 1e-12, 1e3),
    ("beta", 1e-12, 1e3),
    ("iterations", 1, 1e7),
    ("support_size", 2, 1e6),
    ("mi_steps", 1, 1e6),
    *RECIPE_RANGES,
]
# The flags that make one run of LTU another; part of the file name where they differ from the dataset's own values.
METHOD_FLAGS = ("alpha", "beta", "iterations", "support_size", "mi_models", "mi_steps", "rho", "combine")
METHOD_FLAGS += ("forfeed", "remfeed", "metaopt", "first_order")


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add_shared_arguments(parser)
    add_recipe_arguments(parser)
    parser.set_defaults(dataset="digits")
    add = parser.add_argument
    add("--rho", type=float, default=0.3, help="|D_r_hat| / |D_r|, share of the retain set at hand; paper: 0.3, 0.1")
    add("--alpha", type=float, default=0.1, help="meta-tune step, Eq. (2); paper: not stated")
    add("--beta", type=float, default=0.03, help="meta-update step, Eq. (5), falling to 0 along a cosine; paper: not stated")
    add("--iterations", type=int, default=50, help="meta-updates; paper: not stated")
    add("--support-size", type=int, default=64, help="k, images in S, D_Au and each query set; paper: not stated")
    add("--mi-models", type=int, default=4, help="K, membership inference models; paper: not stated")
    add("--mi-steps", type=int, default=500, help="Adam steps that train each MI model; paper: not stated")
    add("--combine", choices=("project", "add", "iterative"), default="project", help="Eq. (12), or Table 4's: plain sum; in turns")
    for name, meaning in (
        ("forfeed", "no forgetting feedback"),
        ("remfeed", "no remembering feedback"),
        ("metaopt", "all losses at theta"),
    ):
        add(f"--no-{name}", action="store_false", dest=name, help=f"{meaning}; paper: Table 3")
    add("--first-order", action="store_true", help="leave the Hessian out of Eq. (5), to compare; paper: second order")
    add("--save", metavar="FILE", help="write the unlearned model there too")
    add("--plot", action="store_true", help="write a figure beside the result file")
    args = parse_with_presets(parser, PRESETS, argv)
    check_ranges(args, RANGES)
    if not 0 < args.rho <= 1:
        fail(f"--rho is {args.rho}; it must lie above 0 and up to 1")
    if args.mi_models < 2:
        fail(f"--mi-models is {args.mi_models}; two are needed, one as support and another as query")
    if not (args.forfeed or args.remfeed):
        fail("--no-forfeed and --no-remfeed together leave nothing to do")
    if not (args.forfeed and args.remfeed) and args.combine != "project":
        fail(f"--combine {args.combine} combines both feedbacks; drop --no-forfeed or --no-remfeed")
    changed = [flag for flag in METHOD_FLAGS if getattr(args, flag) != parser.get_default(flag)]
    args.method = "ltu" + "".join(f"-{flag.replace('_', '')}={getattr(args, flag)}" for flag in changed)
    ablated = [
        f"w/o {name}" for flag, name in (("forfeed", "ForFeed"), ("remfeed", "RemFeed"), ("metaopt", "MetaOpt")) if not getattr(args, flag)
    ]
    ablated += [args.combine] * (args.combine != "project") + ["1st order"] * args.first_order
    args.label = " ".join(["LTU", *ablated])  # the row's name, as in Tables 3 and 4
    return args


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args)
    if rank_and_world()[1] > 1:
        fail("ltu.py runs as one process; train.py may be started by torchrun before it")
    check_writable(args.checkpoint_dir, args.out)
    check_file(args.save)
    seconds, clock = {}, time.time()
    data = load(args, device)
    split = make_split(data, args)
    seen = reachable(split, args.rho, args.split_seed)
    if len(seen) < 10:
        fail(f"--rho {args.rho} leaves {len(seen)} of {len(split['retain'])} images of D_r; ten are the least, give a larger one")
    say(describe(data, split), f"\nD_r_hat: {len(seen):,} images (rho {args.rho:g})")
    seconds["load"] = time.time() - clock
    model, spent = train("original", data, split, args)
    gold, spent_gold = train("gold", data, split, args)
    seconds |= {"train": spent + spent_gold, "retrain": spent_gold}

    path = checkpoint_folder(args) / f"{args.method}-seed{args.seed}.pt"
    clock = time.time()
    attacks, attack_report = mi_models(model, data, split, seen, args)
    partial = path.with_suffix(".partial.pt")
    seconds["mi_models"] = time.time() - clock
    unlearned, log, seconds["unlearn"] = unlearn(model, data, split, seen, attacks, args, partial)
    for target in filter(None, [path, args.save]):
        save_checkpoint(target, kind="model", which="unlearned", model=unlearned.state_dict(), architecture=args.model, split=split["hash"])
    partial.unlink(missing_ok=True)
    finetuned, _, seconds["ft"] = unlearn(model, data, split, seen, attacks, args, method="ft")

    clock = time.time()
    gap = validation_gap(unlearned, model, data, split, seen, args)
    controls = control_sets(data, split, seen)
    models = {"original": model, "retrained": gold, "ft": finetuned, "unlearned": unlearned}
    rows = {
        name: measure(m, lambda i: raw_batch(data, i), data["targets"], split, controls, device, args.amp, data["true_targets"])
        for name, m in models.items()
    }
    wrong = wrong_by_label(rows, data, split, seen) if args.label_noise else None
    seconds["evaluate"] = time.time() - clock
    return report(rows, wrong, log, attack_report, gap, seconds, data, split, seen, args, device)


def report(rows, wrong, log, attack_report, gap, seconds, data, split, seen, args, device) -> dict:
    """Print the paper's row, write the result file and, with --plot, the figure; returns the result as written."""
    figures, table = {name: paper_figures(row) for name, row in rows.items()}, compare(rows)
    unlearn_seconds = {"unlearned": seconds["mi_models"] + seconds["unlearn"], "ft": seconds["ft"], "retrained": seconds["retrain"]}
    names = {
        "original": "Trained",
        "retrained": "Retrain (gold)",
        "ft": "FT, same batches",
        "unlearned": args.label + " (dry)" * args.dry_run,
    }
    print_gaps(figures, table, unlearn_seconds, names)
    if wrong:
        print_wrong(wrong, names)
    cosines = [entry["cosine"] for entry in log if "cosine" in entry]
    if cosines:
        conflict = np.mean(np.array(cosines) < 0)
        say(f"gradients conflicted in {100 * conflict:.0f} % of {len(cosines)} iterations (mean cosine {np.mean(cosines):+.2f})")
    if gap:
        say(
            f"validation gap {100 * gap['mean']:.2f}: the mean distance from the goal as D_v and D_r_hat show it, by which flags are chosen"
        )
    result = {
        "method": args.method,
        "dataset": data["name"],
        "setting": setting(args),
        "seed": args.seed,
        "split_hash": split["hash"],
        "access": {
            "unlearning": ["forget", f"retain (rho {args.rho:g})", "val"],
            "choosing flags": ["forget", f"retain (rho {args.rho:g})", "val"],
        },
        "args": vars(args),
        "metric": "mAP" if data["targets"].ndim == 2 else "accuracy",
        "metrics": rows,
        "comparison": table,
        "figures": {name: f | {"avg_gap": average_gap(figures, name)} for name, f in figures.items()},
        "tow": table["unlearned"]["tow"],
        **figures["unlearned"],
        "avg_gap": average_gap(figures, "unlearned"),
        "validation_gap": gap,
        "wrong_by_label": wrong,
        "conflicts": {"share": float(np.mean(np.array(cosines) < 0)), "mean_cosine": float(np.mean(cosines))} if cosines else None,
        "log": [{name: float(f"{value:.4g}") for name, value in entry.items()} for entry in log],
        "mi_models": attack_report,
        "seconds": seconds,
        **provenance(device),
    }
    path = pathlib.Path(args.out) / f"{data['name']}-{setting(args)}" / f"{args.method}-seed{args.seed}.json"
    write_json(path, result)
    say(f"result: {path}\n" + ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()))
    if args.plot:
        shown = {name: row for name, row in rows.items()}
        plot(
            shown,
            table,
            path.with_suffix(".png"),
            result["metric"],
            "LTU",
            f"{data['name']}, {setting(args)}, rho {args.rho:g}, seed {args.seed}",
        )
        say(f"figure: {path.with_suffix('.png')}")
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
