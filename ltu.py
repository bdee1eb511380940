"""LTU: meta-learned, harmonised gradients unlearn part of the data with 30 % of the rest at hand.

Source: Huang, Foo, Liu, "Learning to Unlearn for Robust Machine Unlearning". One iteration:
    S = images of D_f with random labels; Q_1..Q_3 = images of D_r_hat near to them, of their class,
        at random                                                                   Eq. (6)-(10)
    g_r = grad_theta [ L(theta, S) + sum_i L(theta - alpha grad L(theta, S), Q_i) ]   Eq. (1)-(5)
    g_f = the same, with one membership inference model as support, another as query  Eq. (11)
    theta = theta - beta (g_r + g_f'), g_f' = g_f less what conflicts with g_r        Eq. (12)

Usage:
    python ltu.py --rho 0.3                                   # scikit-learn's digits, on a CPU
    python ltu.py --dataset cifar10 --forget-ratio 0.5        # the paper's experiment: ResNet-18
    python ltu.py --dataset toyfaces --ids 10                 # forget identities

Symbols: theta model, theta_tau temporarily tuned model, alpha meta-tune step, beta meta-update
step, rho share of D_r at hand, D_r_hat that share, D_f / D_r / D_v / D_te forget, retain,
validation and test sets, k images a set, z_1..z_3 samplers, K MI models (in shapes: K outputs).

No official code exists. Where the paper is silent this is what we do:
    1. Random labels (data.random_labels) are drawn anew each iteration.
    2. The feature extractor F of Eq. (8) is the original model before its classifier.
    3. I of Eq. (9) is one-hot, or the attribute vector; of equally near images one is random.
    4. S and D_Au are the same k images of D_f; z_1 and z_2 look for their neighbours. Q_1..Q_3 go
       through the model as one batch.
    5. MI models are trained on the original model's outputs in eval mode, without augmentation,
       members from D_r_hat, non-members from D_v; all but `top3` see the label beside the output
       (see signals). Eq. (11) asks them about outputs in train mode, the mode of g_r's passes.
    6. Batch norm: every pass normalises by its own batch. Only the pass over Q_1..Q_3 moves the
       running statistics: with images of D_r_hat, at theta_tau (at theta without MetaOpt).
       Without it, --no-remfeed, they stay the original model's.
    7. Eq. (5) is plain SGD without momentum or weight decay; beta falls to 0 along a cosine.
    8. N = 3 query sets. The sums of Eq. (4) are sums: three query losses weigh three times one.
    9. "w/o MetaOpt": the same losses, all at theta. "Iterative": g_f at odd, g_r at even
       iterations, without projection.
    10. Passes over S run in float32, whatever --amp says: bf16 moved g_f of a trained model by 6 to
       89 %, as much as leaving out the Hessian does. The pass over Q_1..Q_3, which needs first
       derivatives alone, follows --amp: there bf16 moves g_r by 4 to 5 % (cosine 0.999).
    11. Images are augmented as in the last epochs of training (data.augmented).
"""

import argparse
import copy
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import evaluate
from common import autocast, clock, fail, flag_name, generator, say, task_losses
from data import augmented, of_tensors, predict, random_labels, reachable, targets_of
from train import PRESETS as TRAINING_PRESETS
from train import add_recipe_arguments, checkpoint_folder, open_data, train_both

# What --dataset brings along; a flag on the command line wins. digits: searched, see
# results/LOG.md; the others are starting points, not tuned at full size.
_DATASETS = {
    "digits": dict(alpha=0.2, beta=0.01, passes=32, support_size=64),
    "cifar10": dict(alpha=0.1, beta=0.1, passes=9.1, support_size=256),
    "cifar100": dict(alpha=0.1, beta=0.1, passes=9.1, support_size=256),
    "tinyimagenet": dict(alpha=0.03, beta=0.03, passes=8.53, support_size=256),
    "toyfaces": dict(alpha=0.1, beta=0.03, passes=35.5, support_size=64),
}
PRESETS = {name: own | _DATASETS.get(name, {}) for name, own in TRAINING_PRESETS.items()}
N = 3  # query sets, Eq. (3): one for each of z_1, z_2, z_3
MI_STEPS = 500  # Adam steps that train each MI model; ours, the paper is silent
SEARCHED = ("beta", "alpha", "passes")  # by --search, the step size first
# The flags that an interrupted run must share with its continuation.
METHOD_FLAGS = ("alpha", "beta", "passes", "support_size", "mi_models", "rho", "combine")
METHOD_FLAGS += ("forfeed", "remfeed", "metaopt")

# --------------------------------------------------------------------------------------------------
# Sec. 3.1, meta optimisation


def meta_gradient(tune_loss, test_loss, theta: dict, alpha: float) -> tuple:
    """grad_theta [ L_tune(theta) + sum_i L_test^i(theta_tau) ], the gradient in Eq. (5), exact.

    theta_tau = theta - alpha grad L_tune(theta). tune_loss and test_loss map parameters
    {name: tensor} to a loss (), the latter summed over query sets. By the chain rule the gradient
    is g_tune + (I - alpha H) v with v = grad L_test at theta_tau and H the Hessian of L_tune at
    theta, so only the support batch carries a second-order graph. Returns (gradient as a list,
    L_tune, L_test); used for both feedbacks.
    """
    leaf = {k: p.detach().requires_grad_() for k, p in theta.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        L_tune = tune_loss(leaf)  # Eq. (1)
        every = dict(create_graph=alpha > 0, materialize_grads=True)
        g_tune = torch.autograd.grad(L_tune, list(leaf.values()), **every)
    pairs = zip(leaf.items(), g_tune, strict=True)
    theta_tau = {k: (p - alpha * g).detach().requires_grad_() for (k, p), g in pairs}  # Eq. (2)
    L_test = test_loss(theta_tau)  # Eq. (3), summed
    v = torch.autograd.grad(L_test, list(theta_tau.values()), materialize_grads=True)
    gradient = [g + w for g, w in zip(g_tune, v, strict=True)]
    if alpha > 0:
        H_v = torch.autograd.grad(g_tune, list(leaf.values()), v, materialize_grads=True)
        gradient = [g - alpha * h for g, h in zip(gradient, H_v, strict=True)]
    return [g.detach() for g in gradient], L_tune.item(), L_test.item()  # of Eq. (4)


# --------------------------------------------------------------------------------------------------
# Sec. 3.2, support and query sets of the remembering feedback


def z_1_table(model, data, forget: Tensor, seen: Tensor, amp=False) -> Tensor:
    """Eq. (8) for all of D_f: indices of nearest neighbours in D_r_hat by ||F(x_i) - F(x_j)||_2.

    forget and seen: indices of D_f and D_r_hat -> (|D_f|,).
    """
    f, r = (predict(model, data, part, amp, features=True) for part in (forget, seen))  # (n, D)
    f, r = f.to(data["device"]), r.to(data["device"])
    nearest = [torch.cdist(block, r).argmin(1) for block in f.split(1024)]  # not (|D_f|, n) at once
    return seen[torch.cat(nearest).cpu()]


def by_label(data, seen: Tensor) -> tuple:
    """D_r_hat grouped by label vector: vectors (u, K), their counts (u,), sorted images (n,)."""
    labels = label_vectors(data, seen)
    vectors, group, count = labels.unique(dim=0, return_inverse=True, return_counts=True)
    return vectors, count, seen[group.argsort()]


def z_2(labels: Tensor, groups: tuple, rng: torch.Generator) -> Tensor:
    """Eq. (9): for each of k labels an image of D_r_hat with the nearest label vector.

    labels: (k, K), vectors of 0 and 1, so that squared distances are whole numbers and may be
    equal. groups: see by_label. Returns indices (k,).
    """
    vectors, count, images = groups
    distance = labels.sum(1)[:, None] + vectors.sum(1) - 2 * labels @ vectors.T  # (k, u)
    near = distance == distance.amin(1, keepdim=True)
    ends = (near * count).cumsum(1)  # (k, u): equally near images up to and with each group
    number = (torch.rand(len(labels), generator=rng) * ends[:, -1]).long()[:, None]  # (k, 1)
    group = torch.searchsorted(ends, number, right=True)  # the group that holds this image
    to_its_end = ends.gather(1, group) - number
    return images[count.cumsum(0)[group] - to_its_end][:, 0]  # `images` lie group by group


def z_3(seen: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Eq. (10): k random images of D_r_hat, without repeats where there are enough."""
    if k <= len(seen):
        return seen[torch.randperm(len(seen), generator=rng)[:k]]
    return seen[torch.randint(len(seen), (k,), generator=rng)]


def label_vectors(data, indices) -> Tensor:
    """I(y) of Eq. (9), on the CPU: one-hot (n, K), or the attribute vector."""
    targets = data["targets"][indices]
    return targets if targets.ndim == 2 else F.one_hot(targets, data["classes"]).float()


def draw_batch(data, forget: Tensor, seen: Tensor, z_1, groups, t: int, args) -> dict:
    """S and D_Au (the same k images of D_f), Q_1..Q_3 and two MI models of iteration t.

    seen: indices of D_r_hat; z_1, groups: of z_1_table and by_label. Returns S (k, 3, H, W) with
    y_rand and its true labels y; Q (3k, ...) with y_Q, where t remembers; attacks (i, j);
    iteration; indices. All of it depends on --seed and t alone, so that resuming equals never
    having stopped.
    """
    rng, (remember, _) = generator(args.seed, t, 8), turns(t, args)
    k = min(args.support_size, len(forget))
    rows = torch.randperm(len(forget), generator=rng)[:k]
    S = forget[rows]
    drawn = z_2(label_vectors(data, S), groups, rng), z_3(seen, k, rng)
    Q = torch.cat([z_1[rows], *drawn]) if remember else S[:0]  # (3k,)
    batch = {"iteration": t, "y_rand": random_labels(data, seen, k, rng), "indices": (S, Q)}
    batch["attacks"] = torch.randperm(args.mi_models, generator=rng)[:2].tolist()  # i != j
    # raw_batch's channels_last makes the double backward of batch norm slow (measured on CPUs).
    batch["S"] = augmented(data, S, args, rng).contiguous()
    if remember:
        batch["Q"] = augmented(data, Q, args, rng)
    return batch | {"y": targets_of(data, S), "y_Q": targets_of(data, Q)}


# --------------------------------------------------------------------------------------------------
# Sec. 3.2, membership inference models of the forgetting feedback

# {kind of MI model: (widths of its hidden layers, activation)}; its inputs: signals.
HIDDEN = {
    "posterior": ((128, 64), nn.ReLU),
    "top3": ((64,), nn.ReLU),
    "scalars": ((64, 64), nn.Tanh),
    "logit": ((), None),
}
KINDS = tuple(HIDDEN)


def signals(kind: str, logits: Tensor, targets: Tensor) -> Tensor:
    """What an MI model of this kind sees: (B, K) logits, labels -> (B, inputs), differentiable.

    posterior: the label's probability, then the others' in order (Shokri et al. 2017, who have a
    model for each class; given the label beside the probabilities it stays at chance on digits).
    top3: the three largest probabilities in order (ML-Leaks, Salem et al. 2019). scalars: loss,
    entropy, margin, largest probability. logit: the label's log odds (Yeom et al.; LiRA's scaling)
    and the label, so that each class has its own threshold. Of attributes loss, entropy and log
    odds are means, the margin is the smallest, and all probabilities are of the right answers.
    """
    if targets.ndim == 2:
        p, y = logits.sigmoid(), targets.to(logits.dtype)
        odds = logits * (2 * y - 1)  # (B, K): log odds of the right answer
        entropy = F.binary_cross_entropy_with_logits(logits, p, reduction="none").mean(1)
        margin, log_odds, top = odds.amin(1), odds.mean(1), odds.sigmoid()
        posterior = top
    else:
        log_p = logits.log_softmax(1).clamp(min=-30)
        p, y = log_p.exp(), F.one_hot(targets, logits.shape[1]).to(logits.dtype)
        own, others = (log_p * y).sum(1), logits - 1e4 * y  # (B,), (B, K)
        rest = others.logsumexp(1) - logits.logsumexp(1)  # log(1 - p_y) without cancellation
        log_odds = (own - rest.clamp(min=-30)).clamp(-30, 30)
        entropy, top = -(p * log_p).sum(1), p
        rivals = (p - 2 * y).sort(1, descending=True).values[:, :-1]  # y's own comes last
        posterior = torch.cat([own.exp()[:, None], rivals], 1)
        margin = (logits * y).sum(1) - others.amax(1)
    if kind == "posterior":
        return posterior
    if kind == "top3":
        return top.topk(min(3, top.shape[1]), dim=1).values
    if kind == "scalars":
        return torch.stack([task_losses(logits, targets), entropy, margin, top.amax(1)], 1)
    return torch.cat([log_odds[:, None], y], 1)


class MIModel(nn.Module):
    """theta_A of Eq. (11): from logits (B, K) and labels to the log odds (B,) of membership."""

    def __init__(self, kind: str, inputs: int):
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        widths, activation = HIDDEN[kind]
        layers, before = [], inputs
        for width in widths:
            layers += [nn.Linear(before, width), activation()]
            before = width
        self.net = nn.Sequential(*layers, nn.Linear(before, 1))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.net((signals(self.kind, logits, targets) - self.mean) / self.std)[:, 0]


def mi_models(model, data, split, seen, args) -> tuple[list[MIModel], list[dict]]:
    """Train K MI models on the original model's outputs; returns them and how well each does.

    As many members as non-members, each model on a bootstrap of its own. None is the SVC that MI is
    measured with, but its feature, the label's probability, is among their inputs; none sees D_f or
    the test set. A model trained too little can end with its sign inverted (measured), so the
    balanced accuracy of each is reported on what its bootstrap left out.
    """
    rng = np.random.default_rng([args.seed, args.split_seed, 7])
    sets = {"in": seen, "out": split["val"]}
    logits = {name: predict(model, data, part, args.amp) for name, part in sets.items()}
    targets = {name: data["targets"][part] for name, part in sets.items()}
    models, found = [], []
    for number in range(args.mi_models):
        kind, n = KINDS[number % len(KINDS)], min(len(seen), len(split["val"]))
        rows = {name: rng.choice(len(z), n) for name, z in logits.items()}  # bootstraps
        x = torch.cat([logits[name][rows[name]] for name in sets])  # (2n, K)
        y = torch.cat([targets[name][rows[name]] for name in sets])
        torch.manual_seed(generator(args.seed, 7, number).initial_seed())
        attack = train_mi_model(kind, x, y, rng, 2 if args.dry_run else MI_STEPS)
        left_out = {name: np.setdiff1d(np.arange(len(z)), rows[name]) for name, z in logits.items()}
        accuracy = None
        if min(map(len, left_out.values())):
            with torch.no_grad():
                says = {s: attack(logits[s][i], targets[s][i]) > 0 for s, i in left_out.items()}
            accuracy = (says["in"].float().mean() + 1 - says["out"].float().mean()).item() / 2
        found.append({"kind": kind, "left_out": accuracy})
        models.append(attack.to(data["device"]).requires_grad_(False).eval())
    shown = [f"{r['kind']} {100 * r['left_out']:.0f} %" for r in found if r["left_out"] is not None]
    say("MI models, balanced accuracy (left out of training):", ", ".join(shown))
    weak = [r["kind"] for r in found if (r["left_out"] or 0) < 0.55]
    if weak:
        say(f"little better than chance, so of little guidance to g_f: {', '.join(weak)}")
    return models, found


def train_mi_model(kind: str, x: Tensor, y: Tensor, rng, steps: int) -> MIModel:
    """One MI model, from logits x (2n, K) and labels y of n members and then n non-members."""
    with torch.no_grad():
        seen = signals(kind, x, y)  # (2n, inputs)
    attack, n = MIModel(kind, seen.shape[1]), len(x) // 2
    # A memorising model's probabilities hardly vary, nor does the label of a class that only D_f
    # has: divided by so little, they would explode once unlearning moves them.
    attack.mean, attack.std = seen.mean(0), seen.std(0).clamp(min=0.1)
    member = torch.cat([torch.ones(n), torch.zeros(n)])
    optimizer = torch.optim.Adam(attack.parameters(), 1e-2, weight_decay=1e-4)
    for _ in range(steps):
        batch = torch.from_numpy(rng.integers(0, 2 * n, 256))
        loss = F.binary_cross_entropy_with_logits(attack(x[batch], y[batch]), member[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return attack


# --------------------------------------------------------------------------------------------------
# Sec. 3.3, gradient harmonisation


def harmonize(g_r: list[Tensor], g_f: list[Tensor]) -> tuple[list[Tensor], float]:
    """g_f' of Eq. (12), over the whole gradient as one vector, and cos(g_r, g_f).

    Only g_f is projected, never g_r.
    """
    r_f, r_r, f_f = dot(g_r, g_f), dot(g_r, g_r), dot(g_f, g_f)
    size = (r_r * f_f).sqrt().item()
    cosine = r_f.item() / size if size else 0.0  # g_f vanishes where the MI models are satisfied
    if cosine < 0:
        g_f = [f - (r_f / r_r).item() * r for f, r in zip(g_f, g_r, strict=True)]  # Eq. (12)
    return g_f, cosine


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Inner product over all tensors; their sums are added in float64 on the CPU (MPS has none)."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).cpu().double().sum()


# --------------------------------------------------------------------------------------------------
# Unlearning


def forward(student, theta: dict, images: Tensor, amp=False, moves_statistics=False) -> Tensor:
    """f_theta(images), logits (B, K) in float32 at least.

    Batch norm normalises by the batch, and its running statistics move only where asked.
    """
    buffers = dict(student.named_buffers())
    if not moves_statistics:  # functional_call would move the model's own
        buffers = {k: b.clone() for k, b in buffers.items()}
    with autocast(images.device, amp):
        _, logits = functional_call(student, (theta, buffers), (images,))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def remembering(student, theta, batch: dict, alpha: float, args) -> tuple[list[Tensor], dict]:
    """g_r of the remembering feedback, Eq. (5), and its losses."""

    def support_loss(theta):  # Eq. (1), with S of Eq. (6)
        return task_losses(forward(student, theta, batch["S"]), batch["y_rand"]).mean()

    def test_loss(theta):  # Eq. (3), with Q_i of Eq. (7); the one pass that moves the statistics
        logits = forward(student, theta, batch["Q"], args.amp, moves_statistics=True)
        return N * task_losses(logits, batch["y_Q"]).mean()  # the sum of N means

    g_r, tune, test = meta_gradient(support_loss, test_loss, theta, alpha)
    return g_r, {"tune": tune, "test": test}


def forgetting(student, theta, batch: dict, attacks, alpha) -> tuple[list[Tensor], dict]:
    """g_f of the forgetting feedback: one MI model is the support set, another the query set."""
    non_member = torch.zeros(len(batch["S"]), device=batch["S"].device)
    i, j = batch["attacks"]

    def audit(theta, attack):  # Eq. (11)
        membership = attack(forward(student, theta, batch["S"]), batch["y"])
        return F.binary_cross_entropy_with_logits(membership, non_member)

    def support_loss(theta):
        return audit(theta, attacks[i])

    def test_loss(theta):
        return audit(theta, attacks[j])

    g_f, tune, test = meta_gradient(support_loss, test_loss, theta, alpha)
    return g_f, {"mi_tune": tune, "mi_test": test}


def turns(t: int, args) -> tuple[bool, bool]:
    """Whether iteration t has a remembering and a forgetting feedback."""
    if args.combine == "iterative":  # in turns; t = 0 is the first iteration, an odd one
        return t % 2 == 1, t % 2 == 0
    return args.remfeed, args.forfeed


def iteration(student, theta, batch: dict, attacks, args) -> tuple[list[Tensor], dict]:
    """One iteration's gradient G = g_r + g_f', and its losses and cosine; batch: see draw_batch."""
    remember, forget = turns(batch["iteration"], args)
    alpha = args.alpha if args.metaopt else 0.0
    g_r, told = remembering(student, theta, batch, alpha, args) if remember else (None, {})
    if not forget:
        return g_r, told
    g_f, audited = forgetting(student, theta, batch, attacks, alpha)
    if not remember:
        return g_f, audited
    projected, cosine = harmonize(g_r, g_f)
    added = projected if args.combine == "project" else g_f
    return [r + f for r, f in zip(g_r, added, strict=True)], told | audited | {"cosine": cosine}


def unlearn(model, data, split, seen, attacks, args, partial=None) -> tuple:
    """LTU on a copy of model, reading D_f and D_r_hat (`seen`); attacks (mi_models) have read D_v.

    partial: where to save progress for --resume. Returns the copy, a log with the losses of each
    iteration, and the seconds. Raises SystemExit(2) at a step that diverges.
    """
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits move g_f by 1 to 21 % (emulated)
    student, device = copy.deepcopy(model).train(), data["device"]
    begin = kept = clock(device)
    before = data.get("read", 0)
    theta = {k: p.detach() for k, p in student.named_parameters()}  # shares its memory with student
    forget, seen = torch.tensor(split["forget"]), torch.tensor(seen)
    z_1 = z_1_table(model, data, forget, seen, args.amp) if args.remfeed else None
    groups = by_label(data, seen)
    identity = {"split": split["hash"], "images": len(seen)}
    identity |= {flag: getattr(args, flag) for flag in METHOD_FLAGS}
    first, log = 0, []
    if partial and args.resume and partial.is_file():
        saved = common.load_checkpoint(partial, "partial unlearning", **identity)
        student.load_state_dict(saved["model"])
        first, log, begin = saved["iteration"] + 1, saved["log"], begin - saved["seconds"]
        data["read"] = before + saved["read"]
        say(f"ltu: resuming after iteration {first}")
    k = min(args.support_size, len(forget))
    total = 2 if args.dry_run else max(1, round(args.passes * len(forget) / k))

    for t in range(first, total):
        batch = draw_batch(data, forget, seen, z_1, groups, t, args)
        with torch.random.fork_rng():  # dropout draws from the global generator
            torch.manual_seed(generator(args.seed, t, 8, 1).initial_seed())
            G, told = iteration(student, theta, batch, attacks, args)
        beta = args.beta * 0.5 * (1 + math.cos(math.pi * t / total))
        with torch.no_grad():
            for p, g in zip(theta.values(), G, strict=True):
                p -= beta * g  # Eq. (5), with the harmonised gradient
        loss = sum(map(abs, told.values()))  # a sum, for max can pass over a NaN
        finite = all(torch.isfinite(x).all() for x in student.state_dict().values())
        if not loss < 1e4 or not finite:  # far above any loss of a model that still works
            advice = f"lower --beta ({args.beta}) or --alpha ({args.alpha})"
            fail(f"ltu: iteration {t + 1} diverged (loss {loss:g}); {advice}")
        log.append(told)
        now = clock(device)
        due = now - kept >= common.PARTIAL_EVERY
        if due or (t + 1) % max(1, total // 5) == 0:
            said = ", ".join(f"{name} {value:.3f}" for name, value in told.items())
            say(f"ltu iteration {t + 1}/{total}: {said}")
        if due:
            kept = now
            if partial:
                state = dict(model=student.state_dict(), iteration=t, seconds=now - begin, log=log)
                state["read"] = data["read"] - before
                common.save_checkpoint(partial, kind="partial unlearning", **state, **identity)
    return student.eval(), log, clock(device) - begin


def forget(model, D_f, D_r_hat, D_v, head=None, **flags) -> nn.Module:
    """A copy of somebody's own model from which LTU has unlearned D_f; writes no file.

    model: images -> logits (B, K), see common.Own. D_f, D_r_hat, D_v: see data.of_tensors. flags:
    as on the command line, such as beta=0.01. Where none of alpha, beta and passes is given, they
    are searched; a tenth of D_r_hat (30 images at least, half of it at most) is then kept from
    training and judges the settings. Raises TypeError for a flag that LTU does not have,
    SystemExit(2) where a step diverges.
    """
    args = parse_args(["--forget", "random", "--augment", "none"])
    if set(flags) - set(METHOD_FLAGS):
        raise TypeError(f"ltu has no {set(flags) - set(METHOD_FLAGS)}")
    moved = [flag for flag in SEARCHED if flag != "alpha" or flags.get("metaopt", True)]
    free = [] if set(flags) & set(SEARCHED) else moved
    args = argparse.Namespace(**vars(args) | flags | {"amp": False, "search": free})
    own = common.Own(model, head)
    data, split = of_tensors(own, {"forget": D_f, "retain": D_r_hat, "val": D_v})
    seen = split["retain"]
    at_hand, judges = evaluate.hold_out(seen, args) if free else (seen, seen)
    attacks = mi_models(own, data, split, at_hand, args)[0] if args.forfeed else []
    if free:
        vars(args).update(search(own, data, split, at_hand, judges, attacks, args)[0])
    return unlearn(own, data, split, at_hand, attacks, args)[0].net


# --------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = common.Parser(description=__doc__)
    add = parser.add_argument_group("LTU").add_argument
    # fmt: off
    add("--rho", type=common.share, default=0.3,
        help="|D_r_hat| / |D_r|, share of D_r at hand; paper: 0.3, 0.1")
    add("--alpha", type=common.positive, default=0.1, help="meta-tune step, Eq. (2)")
    add("--beta", type=common.positive, default=0.03,
        help="meta-update step, Eq. (5), falling to 0 along a cosine")
    add("--passes", type=common.positive, default=10, help="meta-updates, as passes over D_f")
    add("--support-size", type=common.between(2, 1e6, int), default=64,
        help="k, images in S, in D_Au and in each query set")
    add("--mi-models", type=common.between(2, 1000, int), default=4,
        help="K, MI models, of which each iteration draws two; the paper gives no value for "
        "--alpha, --beta, --passes, --support-size and this")
    add("--combine", choices=("project", "add", "iterative"), default="project",
        help="Eq. (12), or Table 4's: plain sum; in turns")
    add("--no-forfeed", action="store_false", dest="forfeed",
        help="no forgetting feedback; Table 3")
    add("--no-remfeed", action="store_false", dest="remfeed",
        help="no remembering feedback; Table 3")
    add("--no-metaopt", action="store_false", dest="metaopt", help="all losses at theta; Table 3")
    add("--search", action="store_true",
        help="first choose beta, alpha and passes, those that are not given, on validation data")
    add("--like", metavar="RUN", default="",
        help="take what the search of this run (ltu) chose; --combine iterative: twice its passes, "
        "so that it has as many gradients of each kind")
    # fmt: on
    evaluate.add_result_arguments(parser)
    common.add_shared_arguments(parser)
    add_recipe_arguments(parser)
    parser.set_defaults(dataset="digits")
    args = common.parse_with_presets(parser, PRESETS, argv)
    if not (args.forfeed or args.remfeed):
        fail("--no-forfeed and --no-remfeed together leave nothing to do")
    if not (args.forfeed and args.remfeed) and args.combine != "project":
        fail(f"--combine {args.combine} combines both feedbacks; drop --no-forfeed or --no-remfeed")
    if args.like and args.search:
        fail("--like takes what another run's search chose; drop it or --search")
    moved = [flag for flag in SEARCHED if flag != "alpha" or args.metaopt]
    free = [flag for flag in moved if flag_name(flag) not in args.given]
    if args.search and not free:
        fail(f"--search has nothing to choose: {', '.join(map(flag_name, moved))} are given")
    whole_class, unknown = args.forget in ("class", "subclass"), args.dataset not in _DATASETS
    if args.search and whole_class:
        fail(f"--search judges D_f by images like it in D_v; --forget {args.forget} leaves none")
    # Other data's step sizes can destroy a model: where none is known or given, they are searched.
    unknown = unknown and free == moved and not whole_class and not args.like
    args.search = free if args.search or unknown else []
    return args


def search(model, data, split, at_hand, judges, attacks, args, partial=None) -> tuple[dict, dict]:
    """Choose the flags args.search by evaluate.search, as those of every baseline are chosen.

    With identities the MI models, trained once, know some images of a simulated D_f as members;
    of the real D_f they know none.
    """
    problems = None
    if args.forget == "identities":
        problems = evaluate.simulated_problems(model, data, split, args)
    judge = evaluate.judging(model, problems, data, split, judges, args)

    def distance(values) -> float:
        own = argparse.Namespace(**vars(args) | values)

        def unlearned(problem=None):
            request, others = split, at_hand
            if problem:
                request = split | {"forget": problem["sets"]["forget"].tolist()}
                others = evaluate.left_of(at_hand + split["forget"], problem)
            return unlearn(model, data, request, others, attacks, own)[0]

        return judge(unlearned)

    # An iteration reads S and, where it remembers, N query sets.
    remembers = np.mean([turns(t, args)[0] for t in (0, 1)])
    D = len(split["retain"]) + len(split["forget"])
    most = evaluate.LONGEST * args.epochs * D / ((1 + N * remembers) * len(split["forget"]))
    start = {flag: float(getattr(args, flag)) for flag in args.search}
    nothing, most = judge(lambda problem=None: model), {"passes": float(f"{most:.3g}")}
    return evaluate.search(start, distance, nothing, args, partial, most)


def taken_from(run: str, args) -> dict:
    """--like: the flags that LTU's search chose in another run of this split and seed."""
    path = evaluate.result_path(run, args)
    try:
        chosen = json.loads(path.read_text())["chosen"]
        taken = {flag: chosen[flag] for flag in SEARCHED if flag in chosen}
    except (OSError, ValueError, KeyError):
        taken = {}
    if not taken:
        fail(f"--like {run}: {path} holds no search of LTU; run it with --search first")
    for flag in map(flag_name, taken):
        if flag in args.given:
            fail(f"--like {run} brings {flag}; drop one of them")
    if args.combine == "iterative":
        taken["passes"] = 2 * taken.get("passes", args.passes)
    return taken


def label_of(args) -> str:
    """The row's name, as in Tables 3 and 4."""
    parts = {"forfeed": "w/o ForFeed", "remfeed": "w/o RemFeed", "metaopt": "w/o MetaOpt"}
    words = ["LTU", *(text for flag, text in parts.items() if not getattr(args, flag))]
    words += {"project": [], "add": ["w/ GradAdd"], "iterative": ["w/ Iterative"]}[args.combine]
    words += [f"(flags of {args.like})"] if args.like else []
    return " ".join(words)


def conflicts_in(log: list[dict]) -> dict | None:
    """How often g_r and g_f conflicted, and their mean cosine; None where only one was taken."""
    cosines = np.array([told["cosine"] for told in log if "cosine" in told])
    if not len(cosines):
        return None
    share, mean = float((cosines < 0).mean()), float(cosines.mean())
    said = f"gradients conflicted in {100 * share:.0f} % of {len(cosines)} iterations"
    say(f"{said} (mean cosine {mean:+.2f})")
    return {"share": share, "mean_cosine": mean}


def say_if_damaged(rows: dict):
    """One line where unlearning took more than 10 points from what should stay."""
    metric, name = ("accuracy", "RA") if "mi" in rows["original"] else ("score", "D_r's score")
    was, now = (100 * rows[row]["retain"][metric] for row in ("original", "unlearned"))
    if was - now > 10:
        why = "the step sizes do not suit this model; try --search"
        say(f"{name} fell from {was:.1f} to {now:.1f}: {why}")


def main(argv=None):
    args = parse_args(argv)
    device = common.choose_device(args)
    if common.rank_and_world()[1] > 1:
        fail("ltu.py runs as one process; train.py may be started by torchrun before it")
    common.check_writable(args.checkpoint_dir, args.out, file=args.save)
    flags, name, label = evaluate.flags_of(args), evaluate.run_name("ltu", args), label_of(args)
    more = {"chosen": taken_from(args.like, args)} if args.like else {}
    vars(args).update(more.get("chosen", {}))
    if args.search and "--search" not in args.given:
        say(f"no step sizes for {args.dataset} are known, and none are given: they are searched")
    data, split = open_data(args, device)
    result = evaluate.earlier_result(name, args, flags, split)
    if result:
        return evaluate.show({label: result})
    seen = reachable(split, args.rho, args.split_seed)
    if len(seen) < 10 and not args.dry_run:
        whole = len(split["retain"])
        fail(f"--rho {args.rho} leaves {len(seen)} of {whole} images of D_r; ten are the least")
    say(f"D_r_hat: {len(seen):,} images (rho {args.rho:g})")
    model, gold, seconds = train_both(data, split, args)
    reads = ["forget", f"retain (rho {args.rho:g})"]
    # What --like takes was chosen without the judging images, and is compared with that run.
    at_hand, judges = evaluate.hold_out(seen, args) if args.search or args.like else (seen, seen)
    begin, read = clock(device), data.get("read", 0)
    attacks, mi_report = mi_models(model, data, split, at_hand, args) if args.forfeed else ([], [])
    seconds["mi_models"], by_attacks = clock(device) - begin, data.get("read", 0) - read
    if args.search:
        tries = evaluate.tries_path(name, args, split)
        chosen, more = search(model, data, split, at_hand, judges, attacks, args, tries)
        vars(args).update(chosen)
    partial = checkpoint_folder(args) / f"{name}-seed{args.seed}.partial.pt"
    read = data.get("read", 0) - by_attacks
    have = (model, data, split, at_hand, attacks, args)
    unlearned, log, seconds["unlearn"] = unlearn(*have, partial)
    more["passes"] = (data["read"] - read) / (len(split["retain"]) + len(split["forget"]))

    begin, models = clock(device), {"original": model, "retrained": gold, "unlearned": unlearned}
    rows = evaluate.measure_all(models, data, split, args, seen)
    seconds["evaluate"] = clock(device) - begin
    access = {"unlearning": [*reads, "val"] if args.forfeed else reads}
    if args.search:
        of_D_r = "retain" if args.forget == "identities" else reads[1]
        access["choosing flags"] = ["forget", of_D_r, "val"]
    more |= dict(conflicts=conflicts_in(log), mi_models=mi_report, log=log)
    about = name, unlearned, rows, seconds, access, flags, data, split, args
    result = evaluate.report(*about, **more)
    partial.unlink(missing_ok=True)
    say_if_damaged(rows)
    return evaluate.show({label: result})


if __name__ == "__main__":
    common.guarded(main)
