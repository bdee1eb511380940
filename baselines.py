"""The baselines of both papers, each as its own paper has it: what SSD, SCRUB or SalUn really do.

Usage:
    python baselines.py                                     # all of them, scikit-learn's digits
    python baselines.py --method salun --rho 0.3
    python baselines.py --dataset toyfaces --ids 10         # forget identities
    python baselines.py --method scrub --search             # try its grid, on validation data only

One function a method, (student, data, have, args, rng): student is a copy of the model in eval mode, changed in place; `have`
holds the image indices that this method may touch, and nothing else (ACCESS). Retrain is train.py's gold model. Both protocols:
random samples (cross entropy) and identities (binary cross entropy of each attribute), where SSD, PGU, JiT and, by us, GA and Influence have the
Support set in place of D_f, as METAUNLEARN's Table 1 has them (--all-pictures: D_f). Multi-label versions are principled: a Bernoulli for each
attribute, where published code takes a softmax over attributes.

Symbols: theta model, D_f forget set (or Support S), D_r retain set (its share rho), D training set, p = |D_f| / |D|.
"""

import argparse
import contextlib
import copy
import itertools
import json
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    LABELS,
    Parser,
    add_shared_arguments,
    autocast,
    average_gap,
    build_model,
    check_ranges,
    check_writable,
    choose_device,
    compare,
    curvature,
    fail,
    generator,
    label_gradients,
    measure,
    natural,
    paper_figures,
    parse_with_presets,
    plot,
    predict,
    print_gaps,
    print_table,
    provenance,
    rank_and_world,
    save_checkpoint,
    say,
    score,
    task_losses,
    tow,
    wide,
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
from ltu import validation_gap
from metaunlearn import simulated_problem
from train import PRESETS as TRAINING_PRESETS
from train import RECIPE_RANGES, add_recipe_arguments, checkpoint_folder, train

# What each method may touch. Identity protocol: the second column where there is one.
ACCESS = {
    "ft": ("retain",),
    "randl": ("forget", "retain"),
    "ga": ("forget",),
    "amnesiac": ("forget", "retain"),
    "fisher": ("retain",),
    "ssd": ("forget", "statistics"),
    "badt": ("forget", "retain"),
    "salun": ("forget", "retain"),
    "scrub": ("forget", "retain"),
    "pgu": ("forget", "statistics"),
    "jit": ("forget",),
    "influence": ("forget", "statistics"),
}
# In the identity protocol, as METAUNLEARN's Table 1 has SSD, PGU and JiT; --all-pictures gives them D_f.
FORGET_IS_SUPPORT = ("ga", "ssd", "pgu", "jit", "influence")

# Presets of each method; (method, dataset) or (method, "identities") stands over (method), a flag on the command line over all.
# The plain ones: what --search chose most often on five seeds of the digits, rho 0.3. toyfaces: on five splits. celeba, celebahq:
# METAUNLEARN's authors' code. cifar10: SalUn's and SCRUB's code.
PRESETS = {
    "ft": dict(unlearn_lr=0.03, unlearn_epochs=10),
    "randl": dict(unlearn_lr=0.001, unlearn_epochs=5),
    "ga": dict(unlearn_lr=0.03, unlearn_epochs=5),
    "amnesiac": dict(unlearn_optimizer="adam", unlearn_lr=3e-4, unlearn_epochs=3),
    "fisher": dict(fisher_alpha=1e-6),
    "ssd": dict(ssd_alpha=3.0, ssd_lambda=1.0),
    "badt": dict(unlearn_optimizer="adam", unlearn_lr=1e-3, unlearn_epochs=1, temperature=1.0),
    "salun": dict(unlearn_lr=0.003, unlearn_epochs=5, mask_share=0.2),
    "scrub": dict(unlearn_lr=0.01, unlearn_epochs=5, ascent_epochs=2, temperature=4.0),
    "pgu": dict(unlearn_lr=0.01, unlearn_epochs=10, pgu_gamma=0.9),
    "jit": dict(unlearn_lr=0.003, unlearn_epochs=1, jit_sigma=0.5),
    "influence": dict(damping=1e-5, radius=1.0),
    ("influence", "identities"): dict(damping=0.01, radius=1.0),
    ("ga", "identities"): dict(unlearn_lr=0.003, unlearn_epochs=1),  # one step: the bar that METAUNLEARN has to clear
    ("ft", "toyfaces"): dict(unlearn_lr=0.1),
    ("randl", "toyfaces"): dict(unlearn_lr=0.03),
    ("ga", "toyfaces"): dict(unlearn_lr=0.3),
    ("amnesiac", "toyfaces"): dict(unlearn_lr=1e-3),
    ("ssd", "toyfaces"): dict(ssd_alpha=10.0, ssd_lambda=1.0),
    ("badt", "toyfaces"): dict(unlearn_lr=1e-5),
    ("salun", "toyfaces"): dict(unlearn_lr=0.01, mask_share=0.5),
    ("pgu", "toyfaces"): dict(unlearn_lr=1.0),
    ("jit", "toyfaces"): dict(unlearn_lr=0.3),
    ("ft", "cifar10"): dict(unlearn_lr=0.01, unlearn_batch_size=256),
    ("randl", "cifar10"): dict(unlearn_lr=0.01, unlearn_epochs=10, unlearn_batch_size=256),
    ("salun", "cifar10"): dict(unlearn_lr=0.013, unlearn_epochs=10, unlearn_batch_size=256, mask_share=0.5),
    ("fisher", "cifar10"): dict(fisher_alpha=1e-9),
    ("scrub", "cifar10"): dict(unlearn_lr=5e-4, unlearn_epochs=3, unlearn_batch_size=256),
}
for _faces in ("celeba", "celebahq"):
    PRESETS[("ssd", _faces)] = dict(ssd_alpha=50.0, ssd_lambda=2.0 if _faces == "celeba" else 0.1, unlearn_batch_size=128)
    PRESETS[("pgu", _faces)] = dict(unlearn_lr=0.1, unlearn_epochs=5, unlearn_batch_size=128)
    PRESETS[("jit", _faces)] = dict(unlearn_lr=0.01, jit_sigma=30.0, unlearn_batch_size=128)
    PRESETS[("scrub", _faces)] = dict(
        unlearn_lr=5e-3 if _faces == "celeba" else 1e-2, unlearn_epochs=10, ascent_epochs=5, unlearn_batch_size=32
    )
    PRESETS[("badt", _faces)] = dict(unlearn_optimizer="sgd", unlearn_lr=1e-4, unlearn_epochs=5, unlearn_batch_size=32)
GRIDS = {  # what --search tries
    "ft": dict(unlearn_lr=(0.003, 0.01, 0.03, 0.1)),
    "randl": dict(unlearn_lr=(0.0003, 0.001, 0.003, 0.01, 0.03)),
    "ga": dict(unlearn_lr=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
    "amnesiac": dict(unlearn_lr=(1e-4, 3e-4, 1e-3, 3e-3)),
    "fisher": dict(fisher_alpha=(1e-9, 1e-8, 1e-7, 1e-6, 1e-5)),
    "ssd": dict(ssd_alpha=(1.0, 1.5, 2.0, 3.0, 5.0, 10.0), ssd_lambda=(0.1, 0.5, 1.0)),
    "badt": dict(unlearn_lr=(1e-5, 1e-4, 3e-4, 1e-3)),
    "salun": dict(unlearn_lr=(0.001, 0.003, 0.01), mask_share=(0.2, 0.5)),
    "scrub": dict(unlearn_lr=(0.001, 0.003, 0.01), ascent_epochs=(1, 2)),
    "pgu": dict(unlearn_lr=(0.01, 0.05, 0.2, 1.0), pgu_gamma=(0.9, 0.95)),
    "jit": dict(unlearn_lr=(0.003, 0.03, 0.3), jit_sigma=(0.1, 0.5, 2.0)),
    "influence": dict(damping=(1e-5, 1e-4, 1e-3, 1e-2), radius=(0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 4.0)),
}
_STEP = ("unlearn_lr", "unlearn_epochs", "unlearn_batch_size")
_LOOP = (*_STEP, "unlearn_optimizer", "unlearn_decay")
USES = {  # the flags that each method looks at; in its file's name where they differ from its preset
    "ft": _LOOP,
    "randl": _LOOP,
    "ga": _STEP,
    "amnesiac": (*_LOOP, "ledger"),
    "fisher": ("unlearn_batch_size", "fisher_alpha", "fisher_cap"),
    "ssd": ("unlearn_batch_size", "ssd_alpha", "ssd_lambda"),
    "badt": (*_LOOP, "temperature"),
    "salun": (*_LOOP, "mask_share"),
    "scrub": (*_LOOP, "temperature", "scrub_alpha", "scrub_gamma", "ascent_epochs", "ascent_steps"),
    "pgu": (*_STEP, "pgu_gamma"),
    "jit": (*_STEP, "jit_sigma", "jit_noises"),
    "influence": ("unlearn_batch_size", "damping", "radius"),
}

# ---------------------------------------------------------------------------------------------------------------------
# What the loops share


def batches(indices: Tensor, size: int, rng: torch.Generator):
    """indices in random order, `size` at a time; the last batch may be smaller."""
    return indices[torch.randperm(len(indices), generator=rng)].split(size)


def images_of(data, indices, args, rng) -> Tensor:
    """Training view of the images: augmented as the model was trained, (B, 3, H, W)."""
    return augment(raw_batch(data, indices), draw_augmentation(len(indices), args, rng))


def logits_of(model, images, args) -> Tensor:
    with autocast(images.device, args.amp):
        return model(images)[1].float()


def new_optimizer(student, args):
    """SGD with momentum 0.9 and --unlearn-decay, or Adam; the same optimiser for a method's whole run."""
    if args.unlearn_optimizer == "adam":
        return torch.optim.Adam(student.parameters(), args.unlearn_lr)
    return torch.optim.SGD(student.parameters(), args.unlearn_lr, momentum=0.9, weight_decay=args.unlearn_decay)


def descend(optimizer, loss: Tensor):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def epochs(args) -> range:
    return range(1 if args.dry_run else args.unlearn_epochs)


def stored(have, key, compute):
    """A statistic of the training data, computed once and kept: --search reads D once, not once a try."""
    kept = have.setdefault("stored", {})
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def divergence(teacher: Tensor, student: Tensor, T: float, multilabel: bool) -> Tensor:
    """KL(teacher || student) at temperature T, averaged over the batch: (B, K), (B, K) -> (), times T^2 as Hinton et al. have it.

    Published trap: F.kl_div's default reduction also divides by K. Attributes: a Bernoulli each, averaged over K as the BCE is.
    """
    if multilabel:
        p, q = teacher / T, student / T
        y = p.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(p, y)
        return T**2 * (F.binary_cross_entropy_with_logits(q, y) - entropy)
    return T**2 * F.kl_div((student / T).log_softmax(1), (teacher / T).log_softmax(1), reduction="batchmean", log_target=True)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def ft(student, data, have, args, rng):
    """FT: go on training on D_r and hope. Source: LTU Sec. 4.1 (3); recipe SalUn's: SGD, momentum, train mode. Never reads D_f."""
    optimizer = new_optimizer(student, args)
    student.train()
    for _ in epochs(args):
        for batch in batches(have["retain"], args.unlearn_batch_size, rng):
            descend(optimizer, task_losses(logits_of(student, images_of(data, batch, args, rng), args), targets_of(data, batch)).mean())


def randl(student, data, have, args, rng, mask=None):
    """RandL: each epoch D_f with random labels, then D_r with true ones. Source: SalUn's code for CIFAR-10, whose figures LTU quotes.

    Labels are drawn anew for each batch and may be the true one. Ending an epoch on D_r is what keeps RA. mask: SalUn's.
    """
    optimizer = new_optimizer(student, args)
    theta_o = [p.detach().clone() for p in student.parameters()] if mask else None
    student.train()
    for _ in epochs(args):
        for name in ("forget", "retain"):
            for batch in batches(have[name], args.unlearn_batch_size, rng):
                labels = random_labels(data, have["retain"], len(batch), rng) if name == "forget" else targets_of(data, batch)
                descend(optimizer, task_losses(logits_of(student, images_of(data, batch, args, rng), args), labels).mean())
                if mask:
                    with torch.no_grad():
                        for p, old, m in zip(student.parameters(), theta_o, mask, strict=True):
                            p.copy_(torch.where(m, p, old))  # SalUn Eq. (4)


def ga(student, data, have, args, rng):
    """GA: gradient ascent on D_f. Source: SalUn's GA; with the Support set and one step, METAUNLEARN's bar.

    Ours, against SalUn's code: batch norm in eval mode, for forget batches overwrite its running statistics in train mode; plain
    SGD, for weight decay shrinks the model beside ascending; images as they are, not augmented. The loss has no upper bound:
    only a narrow band of lr works.
    """
    optimizer = torch.optim.SGD(student.parameters(), args.unlearn_lr)
    for _ in epochs(args):
        for batch in batches(have["forget"], args.unlearn_batch_size, rng):
            descend(optimizer, -task_losses(logits_of(student, raw_batch(data, batch), args), targets_of(data, batch)).mean())


def amnesiac(student, data, have, args, rng):
    """Amnesiac: D_f relabelled once, never with the true label, and training on with D_r and D_f mixed.

    Source: Graves et al. 2021's "unlearning", the version that SSD, Bad Teacher and SFR-on run under this name. The other version
    of that paper, `--ledger`: subtract the sum of all training updates whose batch held an image of D_f, then repair on D_r.
    With 10 % forgotten that is every batch (P(a batch of 256 has none) = 0.9^256), so the model returns to its beginning, but
    for batch norm's running statistics, which are no updates. Attributes: the label vector of a random image, by chance the same.
    """
    if args.ledger:
        with torch.no_grad():
            for name, p in student.named_parameters():
                p -= have["ledger"][name].to(p)
        return ft(student, data, have, args, rng)
    forget, union = have["forget"], torch.cat([have["forget"], have["retain"]])
    labels = data["targets"].clone()
    if labels.ndim == 1:
        labels[forget] = (labels[forget] + torch.randint(1, data["classes"], (len(forget),), generator=rng)) % data["classes"]
    else:
        labels[forget] = random_labels(data, have["retain"], len(forget), rng).cpu()
    optimizer = new_optimizer(student, args)
    student.train()
    for _ in epochs(args):
        for batch in batches(union, args.unlearn_batch_size, rng):
            loss = task_losses(logits_of(student, images_of(data, batch, args, rng), args), labels[batch].to(data["device"])).mean()
            descend(optimizer, loss)


def fisher(student, data, have, args, rng):
    """Fisher forgetting: noise on each weight, the less D_r needs it the more. Source: Golatkar et al. 2020, Eq. (8) and their code.

    F = mean over D_r of E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2, here with one y sampled for each x (unbiased; the code sums over all
    y, C backward passes an image), from per-sample gradients, in float64. theta + N(0, min(alpha / F, alpha * cap)); the
    paper's noise goes with F^(-1/2), its code's with 1 / F: ours is the code's, per weight (the code averages over a filter and
    has special factors for last layer, norms and biases). Where a model fits its data F is about 0: the cap sets the noise then.
    """
    F_diagonal = fisher_diagonal(student, data, have["retain"], args, rng)
    with torch.no_grad():
        for name, p in student.named_parameters():
            variance = args.fisher_alpha * (1 / (F_diagonal[name] + 1e-8)).clamp(max=args.fisher_cap)  # Fisher Eq. (8)
            noise = torch.randn(p.shape, generator=rng).to(p)
            p += variance.sqrt().to(p) * noise


def fisher_diagonal(model, data, indices, args, rng) -> dict:
    """Diagonal of the Fisher information of the model's own labels, {name: float64 tensor}; batch norm in eval mode."""
    total = {k: wide(torch.zeros_like(p)) for k, p in model.named_parameters()}
    load_images, multilabel = lambda i: raw_batch(data, i), data["targets"].ndim == 2
    for g in label_gradients(model, load_images, indices, multilabel, rng, args.unlearn_batch_size):  # {name: (B, ...)}
        for k in total:
            total[k] += wide(g[k]).pow(2).sum(0)
    return {k: t / len(indices) for k, t in total.items()}


def ssd(student, data, have, args, rng):
    """SSD: dampen weights that matter to D_f much more than to D. Source: Foster et al. 2024, Eq. (4), (5) and their code.

    Importance is the mean over batches of the squared gradient of the batch's mean loss, so it depends on the batch size (2.1 at 20,
    0.1 at 400, measured): both sets use the same one here, ragged batches are left out, and D is read as D \\ D_f, then D_f, never
    mixed. So I_D = p I_f + (1 - p) I_r, and nothing can be selected once alpha p >= 1. Identities: I_D is a stored statistic, I_f
    comes from S, which is no part of D.
    """
    size, D = min(args.unlearn_batch_size, len(have["forget"])), have["statistics"]
    inside = torch.isin(D, have["forget"]) & (args.forget != "identities")
    I_f = importance(student, data, [have["forget"]], size, args)
    I_D = stored(have, ("importance", size), lambda: importance(student, data, [D[~inside], D[inside]], size, args))
    in_batches = [part.sum().item() // size for part in (inside, ~inside)]
    p = in_batches[0] / max(1, sum(in_batches))
    if args.ssd_alpha * p >= 1:
        say(f"ssd: alpha p = {args.ssd_alpha * p:.2f} >= 1, which can select nothing; try --ssd-alpha below {1 / p:.2f}")
    chosen = 0
    with torch.no_grad():
        for theta, f, d in zip(student.parameters(), I_f, I_D, strict=True):
            selected = f > args.ssd_alpha * d  # SSD Eq. (4)
            dampening = (args.ssd_lambda * d / f).clamp(max=1)  # SSD Eq. (5)
            theta.copy_(torch.where(selected, theta * dampening, theta))
            chosen += selected.sum().item()
    say(f"ssd: {100 * chosen / sum(t.numel() for t in student.parameters()):.3f} % of the weights were selected")


def importance(model, data, parts, size, args) -> list[Tensor]:
    """Mean over the parts' whole batches of `size` images of the squared gradient of the mean loss; eval mode, no augmentation."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    whole = [batch for part in parts for batch in part[: len(part) // size * size].split(size) if len(batch)]
    for batch in whole:
        loss = task_losses(logits_of(model, raw_batch(data, batch), args), targets_of(data, batch)).mean()
        for t, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            t += g**2 / len(whole)
    return total


def badt(student, data, have, args, rng):
    """Bad Teacher: distil an untrained model on D_f and the original on D_r. Source: Chundawat et al. 2023, Eq. (1), (2).

    The bad teacher is a fresh model in eval mode. Mean over images (published code also divides by the number of classes), all of D_r
    at hand (published: a random 30 %; see --rho), times T^2, which is 1 at the published T.
    """
    good = copy.deepcopy(student)
    bad = build_model(args.model, data["classes"], args.image_size, seed=3 * args.seed + 2).to(data["device"]).eval()
    optimizer, multilabel = new_optimizer(student, args), data["targets"].ndim == 2
    forget, union = have["forget"], torch.cat([have["forget"], have["retain"]])
    student.train()
    for _ in epochs(args):
        for batch in batches(union, args.unlearn_batch_size, rng):
            x, to_forget = images_of(data, batch, args, rng), torch.isin(batch, forget).to(data["device"])[:, None]
            with torch.no_grad():
                teacher = torch.where(to_forget, logits_of(bad, x, args), logits_of(good, x, args))  # Bad Teacher Eq. (2)
            descend(optimizer, divergence(teacher, logits_of(student, x, args), args.temperature, multilabel))


def salun(student, data, have, args, rng):
    """SalUn: RandL on the weights alone that D_f's loss is most sensitive to. Source: Fan et al. 2024, Eq. (3), (4).

    Mask: the --mask-share of all weights, ranked globally, with the largest |gradient of D_f's loss|. Masking gradients is not enough: momentum and weight
    decay move "frozen" weights still (fixed upstream in 2026, after all published figures). Ours puts them back after each step.
    """
    total = [torch.zeros_like(p) for p in student.parameters()]
    for batch in have["forget"].split(args.unlearn_batch_size):
        loss = task_losses(logits_of(student, images_of(data, batch, args, rng), args), targets_of(data, batch)).mean()
        torch._foreach_add_(total, torch.autograd.grad(loss, list(student.parameters())))
    size = torch.cat([g.abs().flatten() for g in total])
    order = size.argsort(descending=True)[: round(args.mask_share * len(size))]
    flat = torch.zeros(len(size), dtype=torch.bool, device=size.device)
    flat[order] = True
    # SalUn Eq. (3)
    mask = [m.view_as(g) for m, g in zip(flat.split([g.numel() for g in total]), total, strict=True)]
    randl(student, data, have, args, rng, mask)


def scrub(student, data, have, args, rng):
    """SCRUB: away from the teacher on D_f, towards it on D_r. Source: Kurmanji et al. 2023, Eq. (3), Algorithm 1, and their code.

    Each of the first --ascent-epochs epochs: D_f once, maximising KL(teacher || student); every epoch: D_r once, minimising
    scrub_alpha KL + scrub_gamma L_task. Maximising has no bound, so its number of steps counts: it is --ascent-steps an epoch, whatever
    |D_f| (published: |D_f| / 512), with gradients clipped to norm 1 there (METAUNLEARN's code). No decay of the step (published: 0.1 after 3, 5, 9).
    """
    teacher, optimizer, multilabel = copy.deepcopy(student), new_optimizer(student, args), data["targets"].ndim == 2
    student.train()
    for epoch in epochs(args):
        if epoch < args.ascent_epochs:
            order = have["forget"][torch.randperm(len(have["forget"]), generator=rng)]
            for batch in order.tensor_split(min(args.ascent_steps, len(order))):
                x = images_of(data, batch, args, rng)
                with torch.no_grad():
                    wanted = logits_of(teacher, x, args)
                optimizer.zero_grad(set_to_none=True)
                # SCRUB Eq. (3), the part of D_f
                (-divergence(wanted, logits_of(student, x, args), args.temperature, multilabel)).backward()
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
        for batch in batches(have["retain"], args.unlearn_batch_size, rng):
            x = images_of(data, batch, args, rng)
            with torch.no_grad():
                wanted = logits_of(teacher, x, args)
            logits = logits_of(student, x, args)
            near = divergence(wanted, logits, args.temperature, multilabel)
            # SCRUB Eq. (3), the part of D_r
            descend(optimizer, args.scrub_alpha * near + args.scrub_gamma * task_losses(logits, targets_of(data, batch)).mean())


def pgu(student, data, have, args, rng):
    """PGU: forget along directions that D_r's activations do not span. Source: Hoang et al. 2024, Eq. (5)-(8), and their code.

    Of each convolution's and linear layer's inputs (patches) the Gram matrix over the data to keep gives the core space U, the fewest leading
    directions whose singular values reach the share pgu_gamma; weights move by g - g U U^T alone, norms and biases not at all.
    Random samples: the Gram matrix of D \\ D_f, so positive by construction (published: a difference of two augmentations, which is
    not). Identities: of D, for S was never in it (with --all-pictures D_f is, and is kept too). The step falls along a cosine, with no
    stopping by validation. Patches have the layer's own stride (published: 1). Loss: -log(1 - p_y + 0.05) - 0.2 H(p), over every attribute (METAUNLEARN's code indexes with the labels: two attributes alone got it).
    """
    D = have["statistics"]
    kept = D if args.forget == "identities" else D[~torch.isin(D, have["forget"])]
    U = core_spaces(stored(have, "spectra", lambda: spectra(student, data, kept)), args.pgu_gamma)
    weights = {name: module.weight for name, module in student.named_modules() if name in U}
    for epoch in epochs(args):
        for batch in batches(have["forget"], args.unlearn_batch_size, rng):
            loss = reversed_loss(logits_of(student, raw_batch(data, batch), args), targets_of(data, batch))
            g = torch.autograd.grad(loss, list(weights.values()))
            lr = args.unlearn_lr * 0.5 * (1 + np.cos(np.pi * epoch / len(epochs(args))))
            with torch.no_grad():
                for (name, w), d in zip(weights.items(), g, strict=True):
                    d = d.flatten(1)  # (outputs, patch)
                    w -= lr * (d - (d @ U[name]) @ U[name].T).view_as(w)  # PGU Eq. (8)


def reversed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log(1 - p_y + 0.05) - 0.2 H(p), averaged over images (and attributes): bounded, it wants y unlikely and p undecided."""
    if targets.ndim == 2:
        p, sign = logits.sigmoid(), 2 * targets - 1
        p_y = (sign * logits).sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, p, reduction="none")
        return (-(1 - p_y + 0.05).log() - 0.2 * entropy).mean()
    log_p = logits.log_softmax(1)
    p_y = log_p.gather(1, targets[:, None])[:, 0].exp()
    return (-(1 - p_y + 0.05).log() + 0.2 * (log_p.exp() * log_p).sum(1)).mean()


@torch.no_grad()
def spectra(model, data, indices) -> dict:
    """{layer: (values (patch,), vectors (patch, patch))}, largest first, of the Gram matrix of its input patches, summed in float64."""
    gram, hooks = {}, []

    def collect(name, module):
        def hook(_, inputs):
            x = inputs[0]
            if isinstance(module, nn.Conv2d):
                x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)  # (B, places, patch)
            x = x.reshape(-1, x.shape[-1])
            gram[name] = gram.get(name, 0) + wide(x.T @ x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            hooks.append(module.register_forward_pre_hook(collect(name, module)))
    try:
        predict(model, lambda i: raw_batch(data, i), indices, data["device"])
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: torch.linalg.eigh((G + G.T) / 2) for name, G in gram.items()}
    return {name: (values.flip(0), vectors.flip(1).float().to(data["device"])) for name, (values, vectors) in found.items()}


def core_spaces(spectra: dict, gamma: float) -> dict:
    """{layer: U (patch, k)}: the fewest leading eigenvectors whose singular values reach the share gamma."""
    singular = {name: values.clamp(min=0).sqrt() for name, (values, _) in spectra.items()}
    k = {name: int((s.cumsum(0) / s.sum() <= gamma).sum()) + 1 for name, s in singular.items()}
    return {name: vectors[:, : k[name]] for name, (_, vectors) in spectra.items()}


def jit(student, data, have, args, rng):
    """JiT: make f flat around D_f. Source: Foster et al. 2024 (Zero-shot), Eq. (3), Algorithm 1. Needs no labels and no other data.

    L = mean over images and noises n of ||f(x) - f(x_n)|| / ||x - x_n||, x_n = x + N(0, sigma^2) in normalised pixels, clamped to the batch's
    range; the gradient goes through f(x) alone, as in their code. One pass. Mean over the batch (their code sums: lr times its
    size). Batch norm stays in eval mode (published: train mode, where noise overwrites its statistics).
    """
    optimizer = torch.optim.SGD(student.parameters(), args.unlearn_lr)
    for _ in epochs(args):
        for batch in batches(have["forget"], args.unlearn_batch_size, rng):
            x = raw_batch(data, batch)
            clean, loss = logits_of(student, x, args), 0.0
            for _ in range(args.jit_noises):
                noise = torch.randn(x.shape, generator=rng).to(x) * args.jit_sigma * student.std
                noisy = (x + noise).clamp(x.min(), x.max())
                with torch.no_grad():
                    moved = logits_of(student, noisy, args)
                away = ((noisy - x) / student.std).flatten(1).norm(dim=1)
                loss = loss + ((clean - moved).norm(dim=1) / (away + 1e-12)).mean() / args.jit_noises  # JiT Eq. (3)
            descend(optimizer, loss)


def influence(student, data, have, args, rng):
    """Influence: one Newton step away from D_f, theta + c (F + lambda)^-1 grad L(D_f), with c such that it is --radius long. Ours: in neither paper.

    Source: influence functions (Koh & Liang 2017), as unlearning Guo et al. 2020 and Golatkar et al. 2020. The Hessian is taken to be
    the Fisher information F, see `curvature`. Identities: F of D, a statistic that is stored before the data is gone (with
    --all-pictures it holds D_f too). Random samples: F of D \\ D_f, which depends on the request: two passes over all of D_r. The
    length is searched: F of a model that fits its data is far too small for the theory's 1 / |D_r|.
    """
    D = have["statistics"]
    kept = D if args.forget == "identities" else D[~torch.isin(D, have["forget"])]
    load_images, multilabel = lambda i: raw_batch(data, i), data["targets"].ndim == 2
    F_kept = stored(have, "curvature", lambda: curvature(student, load_images, kept, multilabel, args.seed, args.split_seed, 11))
    theta = dict(student.named_parameters())
    g = {k: torch.zeros_like(p) for k, p in theta.items()}
    for batch in have["forget"].split(args.unlearn_batch_size):
        loss = task_losses(logits_of(student, raw_batch(data, batch), args), targets_of(data, batch)).sum() / len(have["forget"])
        torch._foreach_add_(list(g.values()), torch.autograd.grad(loss, list(theta.values())))
    step = natural(F_kept, g, args.damping)
    length = sum(wide(d).pow(2).sum() for d in step.values()).sqrt().item()
    with torch.no_grad():
        for k, p in theta.items():
            p += args.radius / max(length, 1e-30) * step[k]


METHODS = {f.__name__: f for f in (ft, randl, ga, amnesiac, fisher, ssd, badt, salun, scrub, pgu, jit, influence)}

# ---------------------------------------------------------------------------------------------------------------------
# Running one


def own_args(method: str, args, **changes) -> argparse.Namespace:
    """The flags of one method: its preset, under what the command line gave, under `changes`."""
    values = vars(args) | preset(method, args) | {k: v for k, v in args.given.items() if k in USES[method]} | changes
    return argparse.Namespace(**values)


def preset(method: str, args) -> dict:
    """A method's preset for this problem: its own, under that of the identity protocol, under that of the data set."""
    return PRESETS[method] | PRESETS.get((method, args.forget), {}) | PRESETS.get((method, pathlib.Path(args.dataset).name), {})


def allowed(method: str, sets: dict, args) -> dict:
    """The index tensors that the method may touch, by the names its function knows them by (ACCESS)."""
    names = ACCESS[method] if not args.ledger else ("retain", "ledger")
    have = {name: sets[source] for name, source in zip(names, allowed_names(method, args), strict=True)}
    return have | {"stored": sets.get("stored", {})}


def allowed_names(method: str, args) -> list[str]:
    """The sets that the method may touch, by their true names: with identities, `support` stands in for `forget` where it should."""
    names = ACCESS[method] if not args.ledger else ("retain", "ledger")
    swap = args.forget == "identities" and method in FORGET_IS_SUPPORT and not args.all_pictures
    return ["support" if name == "forget" and swap else name for name in names]


def run(method: str, model, data, sets: dict, args) -> tuple[nn.Module, float]:
    """The unlearned copy of model, in eval mode, and the seconds it took; model itself is not changed."""
    if data["device"].type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    student, begin = copy.deepcopy(model).eval().requires_grad_(True), time.time()
    rng = generator(args.seed, args.split_seed, list(METHODS).index(method), 9)
    have = allowed(method, sets, args)
    METHODS[method](student, data, have, args, rng)
    some = next(indices for indices in have.values() if isinstance(indices, Tensor))[:64]
    logits = predict(student.eval(), lambda i: raw_batch(data, i), some, data["device"])
    if not torch.isfinite(logits).all() or not all(torch.isfinite(p).all() for p in student.parameters()):
        own = ", ".join(f"--{flag.replace('_', '-')} {getattr(args, flag):g}" for flag in GRIDS[method])
        raise FloatingPointError(f"{method} diverged; lower its step ({own})")
    return student.eval().requires_grad_(False), time.time() - begin


def sets_of(split: dict, args) -> dict:
    """All sets by name, as index tensors: forget, retain (its share rho), statistics (D = D_r and D_f), support."""
    sets = {"forget": split["forget"], "retain": reachable(split, args.rho, args.split_seed)}
    if "support" in split:
        sets["support"] = split["support"]
    sets = {name: torch.tensor(indices[:64] if args.dry_run else indices) for name, indices in sets.items()}
    kept = torch.tensor(split["retain"][: 64 if args.dry_run else None])  # D_r whole, whatever rho
    return sets | {"statistics": torch.cat([kept, sets["forget"]]).sort().values}


def search(method: str, model, data, split, sets, args) -> tuple[dict, list]:
    """Try the method's grid; returns the best values and all that was tried. Reads neither test set nor gold model.

    Random samples: LTU's validation gap on the real request (lower is better). Identities: ToW of simulated requests
    (higher is better; turned into 1 - ToW) drawn from all training identities, as in METAUNLEARN's meta-training; the real Support
    set is not touched. A flag given on the command line is not searched.
    """
    grid, tried = {name: values for name, values in GRIDS[method].items() if name not in args.given}, []
    sets = sets | {"stored": {}}
    problems = simulated_problem(model, data, split, args) if args.forget == "identities" else None
    for values in itertools.product(*grid.values()):
        values = dict(zip(grid, values, strict=True))
        own = own_args(method, args, **values)
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            try:
                if problems:
                    distance = 1 - float(np.mean([simulated_tow(method, model, data, sets, problem, own) for problem in problems]))
                else:
                    student, _ = run(method, model, data, sets, own)
                    distance = validation_gap(student, model, data, split, sets["retain"].tolist(), own)["mean"]
            except (FloatingPointError, SystemExit):  # diverged
                distance = None
        tried.append(values | {"distance": distance})
        shown = "diverged" if distance is None else f"distance {100 * distance:.2f}"
        say(f"{method} search:", ", ".join(f"{n} {v:g}" for n, v in values.items()), shown)
    best = min(tried, key=lambda t: 2.0 if t["distance"] is None else t["distance"])
    return {name: best[name] for name in grid}, tried


def simulated_tow(method, model, data, sets, problem, args) -> float:
    """ToW of the method on one simulated request: its people are taken out of D_r, its Support images out of both."""
    own = torch.cat([torch.tensor(problem["support"]), torch.tensor(problem["sets"]["forget"])])
    everyone = torch.cat([sets["retain"], sets["forget"]])
    simulated = {"support": torch.tensor(problem["support"]), "forget": torch.tensor(problem["sets"]["forget"])}
    simulated |= {"retain": everyone[~torch.isin(everyone, own)], "statistics": sets["statistics"], "stored": sets["stored"]}
    student, _ = run(method, model, data, simulated, args)
    got = {}
    for name, indices in problem["sets"].items():
        logits = predict(student, lambda i: raw_batch(data, i), indices, data["device"], args.amp)
        got[name] = score(logits, data["targets"][indices])
    return tow(got, problem["want"])


# ---------------------------------------------------------------------------------------------------------------------
# Command line

RANGES = [("unlearn_lr", 1e-12, 1e4), ("unlearn_epochs", 1, 1e6), ("unlearn_batch_size", 1, 1e6), ("mask_share", 1e-6, 1), *RECIPE_RANGES]
RANGES += [
    ("fisher_alpha", 1e-20, 1e3),
    ("fisher_cap", 1e-6, 1e12),
    ("ssd_alpha", 1e-6, 1e9),
    ("ssd_lambda", 0, 1e6),
    ("temperature", 0.01, 1e3),
]
RANGES += [
    ("unlearn_decay", 0, 1e3),
    ("scrub_alpha", 0, 1e6),
    ("scrub_gamma", 0, 1e6),
    ("ascent_epochs", 0, 1e6),
    ("ascent_steps", 1, 1e6),
    ("pgu_gamma", 1e-6, 1),
    ("jit_sigma", 1e-6, 1e6),
    ("jit_noises", 1, 1e4),
    ("damping", 1e-12, 1e6),
    ("radius", 1e-9, 1e6),
]


def parse_args(argv=None):
    name = lambda key: key if isinstance(key, str) else f"{key[0]}, {key[1]}"
    table = "\n".join(f"  {name(m):18s}" + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in p.items()) for m, p in PRESETS.items())
    parser = Parser(description=f"{__doc__}\nPresets, which stand over the defaults below (a flag on the command line wins):\n{table}")
    add_shared_arguments(parser)
    add_recipe_arguments(parser)
    parser.set_defaults(dataset="digits")
    add = parser.add_argument
    add("--method", nargs="+", choices=[*METHODS, "all"], default=["all"], help="which baselines to run; Retrain is always a row")
    add("--rho", type=float, default=1.0, help="share of D_r at hand, for those that use it; LTU's Table 1: 1, Table 2: 0.1, 0.3")
    add("--unlearn-optimizer", choices=("sgd", "adam"), default="sgd", help="sgd has momentum 0.9; GA, PGU and JiT are plain SGD always")
    add("--unlearn-lr", type=float, default=0.01, help="step size of unlearning")
    add("--unlearn-epochs", type=int, default=1, help="passes over the data that a method uses")
    add("--unlearn-batch-size", type=int, default=64, help="images an unlearning step")
    add("--unlearn-decay", type=float, default=5e-4, help="weight decay of SGD while unlearning; SalUn: 5e-4")
    add("--fisher-alpha", type=float, default=1e-6, help="Fisher: scale of the noise's variance; its code: 1e-6, SalUn's authors: 1e-9")
    add("--fisher-cap", type=float, default=1e3, help="Fisher: largest 1 / F; its code: 1e3")
    add("--ssd-alpha", type=float, default=2.0, help="SSD: select weights with I_f above alpha I_D; paper: 10, which p = 0.1 makes void")
    add("--ssd-lambda", type=float, default=1.0, help="SSD: dampening, theta times min(lambda I_D / I_f, 1); paper: 1")
    add("--temperature", type=float, default=1.0, help="Bad Teacher (paper: 1) and SCRUB (code: 4): T of the softened outputs")
    add("--mask-share", type=float, default=0.5, help="SalUn: share of weights that may move; its README: 0.5")
    add("--scrub-alpha", type=float, default=0.001, help="SCRUB: weight of KL on D_r; code: 0.001")
    add("--scrub-gamma", type=float, default=0.99, help="SCRUB: weight of the task loss on D_r; code: 0.99")
    add("--ascent-epochs", type=int, default=2, help="SCRUB: epochs that begin with ascent on D_f (msteps); code: 2")
    add("--ascent-steps", type=int, default=9, help="SCRUB: ascent steps in each of those; code: |D_f| / 512, 9 at 10 %% of CIFAR-10")
    add("--pgu-gamma", type=float, default=0.9, help="PGU: share of singular values that the kept space reaches; paper: 0.9 to 0.95")
    add("--jit-sigma", type=float, default=0.5, help="JiT: noise, in normalised pixels; paper: 0.01 to 0.8, METAUNLEARN: 30")
    add("--jit-noises", type=int, default=25, help="JiT: N, noisy copies of each image; paper: 25")
    add("--damping", type=float, default=1e-5, help="Influence: lambda, added to the Fisher information (of log p, in nats)")
    add("--radius", type=float, default=1.0, help="Influence: Euclidean length of its one step, over all weights")
    add(
        "--all-pictures",
        action="store_true",
        help="identities: give GA, SSD, PGU, JiT and Influence all of D_f in place of the Support set, to see what one picture costs",
    )
    add(
        "--ledger",
        action="store_true",
        help="Amnesiac: subtract recorded updates instead of relabelling (trains the original again to record)",
    )
    add("--plot", action="store_true", help="write a figure beside each result file")
    add("--search", action="store_true", help="first try the method's grid on validation data; what was tried goes into the result file")
    given = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for action in parser._actions:
        if action.dest in set().union(*USES.values()):
            given._add_action(copy.copy(action)).default = argparse.SUPPRESS
    args = parse_with_presets(parser, TRAINING_PRESETS, argv)
    check_ranges(args, RANGES)
    args.given = vars(given.parse_known_args(argv)[0])  # what the command line gave wins over a method's preset
    args.method = list(METHODS) if "all" in args.method else args.method
    if not 0 < args.rho <= 1:
        fail(f"--rho is {args.rho}; it must lie above 0 and up to 1")
    if args.ledger and (args.method != ["amnesiac"] or args.search):
        fail("--ledger is a version of amnesiac, with nothing to search; give --method amnesiac alone")
    if args.all_pictures and args.forget != "identities":
        fail(f"--all-pictures is about identities; with --forget {args.forget} every method has D_f already")
    if args.all_pictures and not set(args.method) & set(FORGET_IS_SUPPORT):
        fail(f"--all-pictures is not used by {', '.join(args.method)}; it is about {', '.join(FORGET_IS_SUPPORT)}")
    if args.search and args.forget in ("class", "subclass"):
        fail(f"--search judges by validation images, of which --forget {args.forget} leaves none like D_f; give the flags yourself")
    for flag in args.given:
        if not any(flag in USES[method] for method in args.method):
            fail(f"--{flag.replace('_', '-')} is not used by {', '.join(args.method)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args)
    if rank_and_world()[1] > 1:
        fail("baselines.py runs as one process; train.py may be started by torchrun before it")
    check_writable(args.checkpoint_dir, args.out)
    clock = time.time()
    data = load(args, device)
    split = make_split(data, args)
    sets = sets_of(split, args)
    if len(sets["retain"]) == 0:
        fail(f"--rho {args.rho} leaves nothing of D_r's {len(split['retain'])} images; give a larger one")
    say(describe(data, split))
    model, seconds_original = train("original", data, split, args)
    gold, seconds_gold = train("gold", data, split, args)
    if args.ledger:  # its own original: on a GPU two trainings of one seed can differ
        model, _ = train("original", data, split, args, ledger=True)
        sets["ledger"] = model.ledger
    controls = control_sets(data, split, sets["retain"].tolist())
    loaded = time.time() - clock

    def row(m):
        return measure(m, lambda i: raw_batch(data, i), data["targets"], split, controls, device, args.amp, data["true_targets"])

    rows, results, seconds = {"original": row(model), "retrained": row(gold)}, {}, {"retrained": seconds_gold}
    for method in args.method:
        best, tried = search(method, model, data, split, sets, args) if args.search else ({}, None)
        own = own_args(method, args, **best)
        try:
            student, seconds[method] = run(method, model, data, sets, own)
        except FloatingPointError as error:
            if len(args.method) == 1:
                fail(str(error))
            say(f"{error}; left out")
            continue
        begin, rows[method] = time.time(), row(student)
        took = {"load": loaded, "train": seconds_original + seconds_gold, "unlearn": seconds[method], "evaluate": time.time() - begin}
        results[method] = write_result(method, student, rows, took, tried, data, split, own, device)
        say(f"{method}: {seconds[method]:.1f} s")
    table, names = compare(rows), {name: LABELS.get(name, name) + " (dry)" * (args.dry_run and name in METHODS) for name in rows}
    names |= {method: method + " (dry)" * args.dry_run for method in results}
    if data["targets"].ndim == 2:
        print_table(rows, table, "mAP", names)
    print_gaps({name: paper_figures(r) for name, r in rows.items()}, table, seconds, names)
    return results


def run_name(method: str, args, searched: bool) -> str:
    """A run's name in its files: the method and the flags that differ from its preset (args: own_args)."""
    usual, own = vars(args) | preset(method, args) | {"ledger": False}, vars(args)
    changed = [f for f in USES[method] if f in args.given and own[f] != usual[f]] + ["rho"] * ("retain" in ACCESS[method] and args.rho != 1)
    changed += ["all_pictures"] * (args.all_pictures and method in FORGET_IS_SUPPORT)
    return method + "".join(f"-{f.replace('_', '')}={own[f]}" for f in changed) + "-search" * searched


def write_result(method, student, rows, seconds, tried, data, split, args, device) -> dict:
    """The result file of one method, as every script writes it, and its checkpoint."""
    rows = {"original": rows["original"], "retrained": rows["retrained"], "unlearned": rows[method]}
    rows = json.loads(json.dumps(rows))
    for r in rows.values():
        for part in ("forget", "retain"):
            r[part].pop("wrong", None)
    figures, table = {name: paper_figures(r) for name, r in rows.items()}, compare(rows)
    name = run_name(method, args, tried is not None)
    touched = [{"retain": f"retain (rho {args.rho:g})"}.get(n, n) for n in allowed_names(method, args)]
    access = {"unlearning": touched} | ({"choosing flags": ["forget", f"retain (rho {args.rho:g})", "val"]} if tried is not None else {})
    result = {
        "method": name,
        "dataset": data["name"],
        "setting": setting(args),
        "seed": args.seed,
        "split_hash": split["hash"],
        "access": access,
        "args": {k: v for k, v in vars(args).items() if k != "given"},
        "metric": "mAP" if data["targets"].ndim == 2 else "accuracy",
        "metrics": rows,
        "comparison": table,
        "figures": figures,
        "tow": table["unlearned"]["tow"],
        **figures["unlearned"],
        "avg_gap": average_gap(figures, "unlearned"),
        "search": tried,
        "seconds": seconds,
        **provenance(device),
    }
    target = pathlib.Path(args.out) / f"{data['name']}-{setting(args)}" / f"{name}-seed{args.seed}.json"
    write_json(target, result)
    if args.plot:
        plot(
            rows, table, target.with_suffix(".png"), result["metric"], method, f"{data['name']}, {setting(args)}, {name}, seed {args.seed}"
        )
    path = checkpoint_folder(args) / f"{name}-seed{args.seed}.pt"
    save_checkpoint(path, kind="model", which="unlearned", model=student.state_dict(), architecture=args.model, split=split["hash"])
    return result


if __name__ == "__main__":
    main()
