"""METAUNLEARN: learn a loss that unlearns a person from one picture, after the training data is gone.

Source: De Min et al., "One-Shot Unlearning of Personal Identities" (O-UPI). The file reads in the paper's order:
    repeat: S, D_f = a simulated unlearning request                        Sec. 4.1, Alg. 1 lines 1-6
            theta_u = theta - eta * grad_theta h_phi(f_theta(S))           Eq. (4), Alg. 1 lines 11-12
            A = || E(D_f; theta_u) - E(D_v; theta_u) ||^2
              + || E(D_f; theta_u) - E(D_v; theta) ||^2                    Eq. (5), (8), with E = (1 - mAP) L_task, Eq. (6)
            phi = phi - alpha * grad_phi A                                 Alg. 1 line 16
    then once, with the real Support set: theta_u = theta - eta * grad_theta h_phi(f_theta(S))

Usage:
    python metaunlearn.py                                                  # toy faces, two CPU cores
    python metaunlearn.py --dataset celebahq --ids 20                      # the paper's protocol
    python metaunlearn.py --meta-loss FILE --support DIR                   # unlearn later, without any training data
    torchrun --nproc-per-node 4 metaunlearn.py --dataset celeba --ids 10

Symbols: theta original model, theta_u unlearned model, phi meta-loss, eta inner step, alpha outer step, S Support set,
D_f / D_r / D_v / D_te forget, retain, validation and test sets, N_S identities in a request.

Where the paper is silent or its authors' code differs, this is what we do; --preset sets the flags together:
    1. distance in A: --distance l2 (paper) or smooth_l1 (code)
    2. gradient through L_task(D_v; theta_u): yes (paper writes no stop) or --stop-val-gradient (code)
    3. A over whole sets (paper) or averaged over --pair-size 64 batches of D_f and D_v (code); theta_u sees at most
       --val-images random images of D_v (0: all, as the paper writes, at the price of a pass over D_v in each step)
    4. all parameters are updated (paper) or all but cls_token and pos_embed: --freeze-embeddings (code, an accident)
    5. alpha's optimiser is AdamW with amsgrad and a cosine (code; the paper's Table 5 is lost to us), in all presets
    6. --zero-init of h_phi's last layer (ours: the first update is exactly 0); the code starts at random
    7. mAP is a constant for the gradient in all of them: it has none
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import pathlib
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (
    LABELS,
    Parser,
    add_shared_arguments,
    atomic_write,
    autocast,
    build_model,
    check_file,
    check_ranges,
    check_writable,
    choose_device,
    compare,
    fail,
    generator,
    load_checkpoint,
    measure,
    parse_with_presets,
    plot,
    predict,
    print_table,
    provenance,
    rank_and_world,
    save_checkpoint,
    say,
    score,
    start_processes,
    stop_processes,
    task_losses,
    tow,
    wait_for_all,
    with_parameters,
    write_json,
)
from data import control_sets, describe, load, make_split, raw_batch, setting, simulated_requests, targets_of
from train import PRESETS as TRAINING_PRESETS
from train import RECIPE_RANGES, add_recipe_arguments, checkpoint_folder, train

# What --dataset and --preset bring along; a flag on the command line wins. Values: authors' code (the paper's Table 5).
_FACES = dict(hidden=512, dropout=0.5, alpha=1e-4, meta_epochs=3)
_DATASETS = {"celebahq": _FACES, "celeba": _FACES, "qmnist": dict(meta_epochs=1)}
_METHODS = {
    "paper": dict(),  # the parser's own defaults
    "code": dict(distance="smooth_l1", stop_val_gradient=True, pair_size=64, freeze_embeddings=True, zero_init=False),
    "selective": dict(inputs="logits,targets,losses", aux_loss="second", accuracy_weight=False, retain_weight=0.3, alpha_step=0.3),
}
PRESETS = {name: TRAINING_PRESETS.get(name, {}) | _DATASETS.get(name, {}) for name in TRAINING_PRESETS} | _METHODS
PRESETS[("toyfaces", "selective")] = dict(meta_epochs=12)  # 12 requests an epoch, where CelebA-HQ/20 has 187
PRESETS[("toyfaces", "code")] = dict(alpha=1e-4)

# ---------------------------------------------------------------------------------------------------------------------
# The meta-loss h_phi (Sec. 4.2, Fig. 3)


class MetaLoss(nn.Module):
    """h_phi: an MLP with softplus that maps what the model says of Support images to one positive number.

    inputs: any of logits (as probabilities), features, targets, ids (an embedding of training identities), and, ours,
    losses (the task loss of each output). Shapes: features (N_s, D), logits (N_s, K), targets (N_s, K) or (N_s,),
    who (N_s,) rows of the identity table -> (), the mean over images. Source: Sec. 4.3, Table 4; layers: authors' code.
    """

    def __init__(self, inputs, outputs, features, identities, hidden=128, dropout=0.0, zero_init=True, multilabel=True, theta=None):
        super().__init__()
        self.inputs, self.multilabel, self.outputs = list(inputs), multilabel, outputs
        width = {"logits": outputs, "features": features, "targets": outputs, "ids": 64, "losses": outputs if multilabel else 1}
        if "ids" in inputs:
            self.identity = nn.Embedding(identities, 64)
        self.mlp = nn.Sequential(
            nn.Linear(sum(width[name] for name in inputs), hidden),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 1),
            nn.Softplus(),
        )
        if zero_init:
            nn.init.zeros_(self.mlp[-2].weight)
        # Ours, after Meta-SGD (Li et al., 2017): a step size for each parameter of theta, part of phi. None: eta for all.
        self.log_step = nn.ParameterList(torch.zeros_like(p) for p in theta.values()) if theta else None

    def step_sizes(self, theta: dict, eta: float) -> list[Tensor]:
        """eta of each parameter tensor: () where it is fixed, the tensor's own shape where it is learned."""
        if self.log_step is None:
            return [torch.as_tensor(eta, dtype=p.dtype, device=p.device) for p in theta.values()]
        return [eta * s.exp() for s in self.log_step]

    def forward(self, features: Tensor, logits: Tensor, targets: Tensor, who: Tensor) -> Tensor:
        if self.multilabel:
            one_hot = targets.to(logits.dtype)
            losses = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")  # (N_s, K)
        else:
            one_hot = F.one_hot(targets, self.outputs).to(logits.dtype)
            losses = F.cross_entropy(logits, targets, reduction="none")[:, None]  # (N_s, 1)
        parts = {
            "logits": logits.sigmoid() if self.multilabel else logits.softmax(1),
            "features": features,
            "targets": one_hot,
            "losses": losses,
        }
        if "ids" in self.inputs:
            parts["ids"] = self.identity(who)  # (N_s, 64)
        return self.mlp(torch.cat([parts[name] for name in self.inputs], 1)).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Equations


def updatable(model: nn.Module, freeze_embeddings: bool) -> dict:
    """theta as {name: tensor}, detached; without cls_token and pos_embed where the authors' code leaves them out."""
    left_out = ("cls_token", "pos_embed") if freeze_embeddings else ()
    return {k: p.detach() for k, p in model.named_parameters() if k.split(".")[-1] not in left_out}


def inner_step(theta: dict, gradient, eta) -> dict:
    """theta_u = theta - eta * grad_theta h_phi(f_theta(S)), with an eta for each tensor. Source: Eq. (4), Alg. 1 line 12."""
    return {k: p - e * g for (k, p), g, e in zip(theta.items(), gradient, eta, strict=True)}  # Eq. (4)


def auxiliary_loss(L: dict, mAP: dict, args) -> Tensor:
    """A from mean losses and mAPs of its sets. Source: Eq. (5) and (8), Table 3.

    Keys: f = (D_f; theta_u), v = (D_v; theta_u), v0 = (D_v; theta), r = retained images (see image_losses).
    """
    if args.aux_loss == "scrub":  # Table 3, first row
        return L["r"] - L["f"]
    weight = {k: 1 - a if args.accuracy_weight else 1.0 for k, a in mAP.items()}
    E = {k: weight[k] * L[k] for k in mAP}  # Eq. (6)
    distance = {"l2": lambda a, b: (a - b) ** 2, "smooth_l1": F.smooth_l1_loss}[args.distance]
    A = 0.0
    if args.aux_loss in ("both", "first"):
        A = A + distance(E["f"], E["v"].detach() if args.stop_val_gradient else E["v"])  # Eq. (5), Eq. (8), 1st term
    if args.aux_loss in ("both", "second"):
        A = A + distance(E["f"], E["v0"])  # Eq. (5), Eq. (8), 2nd term
    if args.retain_weight:
        A = A + args.retain_weight * L["r"]  # ours: nothing in Eq. (8) looks at retained people
    return A


def image_losses(name: str, logits: Tensor, targets: Tensor, logits_0: Tensor, args) -> Tensor:
    """The loss of each image of set `name`, whose mean goes into A: (B, K) -> (B,).

    f, v: the task loss. r: how far theta_u has moved from theta, as a KL divergence; in place of the paper's silence.
    --aux-loss scrub: SCRUB's terms with T = 4 (authors' code: softmax over attributes; here a Bernoulli each).
    """
    if args.aux_loss == "scrub":
        T = 4.0
        divergence = T**2 * kl_from_original(logits / T, logits_0 / T, targets)
        return divergence if name == "f" else 0.99 * task_losses(logits, targets) + 0.001 * divergence
    return kl_from_original(logits, logits_0, targets) if name == "r" else task_losses(logits, targets)


def kl_from_original(logits: Tensor, logits_0: Tensor, targets: Tensor) -> Tensor:
    """KL(f_theta || f_theta_u) of each image, averaged over attributes (Bernoulli each) or of the class distribution."""
    if targets.ndim == 2:
        p_0 = logits_0.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits_0, p_0, reduction="none")
        return (F.binary_cross_entropy_with_logits(logits, p_0, reduction="none") - entropy).mean(1)
    p_0 = logits_0.softmax(1)
    return (p_0 * (logits_0.log_softmax(1) - logits.log_softmax(1))).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# A over a request: sets of images, parts of sets


def outputs(model, theta: dict, images: Tensor, args) -> tuple[Tensor, Tensor]:
    """f_theta(images): features (B, D) and logits (B, K), in float32 at least; normalisation layers stay in eval mode."""
    with autocast(images.device, args.amp):
        features, logits = functional_call(model, theta, (images,))
    keep = torch.promote_types(images.dtype, torch.float32)
    return features.to(keep), logits.to(keep)


def images_at(data: dict, theta: dict, indices) -> Tensor:
    """Images (B, 3, H, W) in theta's precision, which the gradient check raises to float64."""
    return raw_batch(data, indices).to(next(iter(theta.values())).dtype)


def request_parts(data: dict, split: dict, support, forget, args, rng) -> list[dict]:
    """The sets over which A is computed: one dict of index arrays f, v, r and its weight in the mean.

    Whole sets, as the paper writes (of D_v at most --val-images random ones), or with --pair-size n one part for each
    n images of D_f, each with n random ones of D_v (authors' code).
    """
    size = args.pair_size or len(forget)
    parts = []
    for start in range(0, len(forget), size):
        f = forget[start : start + size]
        many = args.pair_size or args.val_images or len(split["val"])
        part = {"f": f, "v": rng.choice(split["val"], min(many, len(split["val"])), replace=False), "weight": len(f) / len(forget)}
        if args.retain_weight or args.aux_loss == "scrub":
            others = np.setdiff1d(split["retain"] + split["forget"], np.concatenate([support, forget]))
            part["r"] = rng.choice(others, min(args.retain_images, len(others)), replace=False)
        parts.append(part)
    return parts


def sets_in(args) -> list[str]:
    """Which sets theta_u is run on: those whose loss stands in A."""
    first = args.aux_loss in ("both", "first")
    return ["f"] + ["v"] * first + ["r"] * bool(args.retain_weight or args.aux_loss == "scrub")


def auxiliary(model, theta_u: dict, part: dict, data, cache, args, frozen=None) -> tuple[Tensor, dict]:
    """A of one part with everything in one graph: the textbook way, which holds all activations at once.

    frozen: the constants (mAPs, and with --stop-val-gradient the validation loss) of another call, for finite differences.
    """
    L, mAP = {}, {}
    for name in sets_in(args):
        targets = targets_of(data, part[name])
        _, logits = outputs(model, theta_u, images_at(data, theta_u, part[name]), args)
        L[name] = image_losses(name, logits, targets, cache["logits"][part[name]].to(logits), args).mean()
        if name != "r":
            mAP[name] = score(logits.detach(), targets)
    L["v0"], mAP["v0"] = original_validation(part, data, cache, args)
    constants = frozen or {"mAP": mAP, "v": L["v"].detach() if "v" in L else None}
    if frozen and args.stop_val_gradient and "v" in L:
        L["v"] = frozen["v"]
    return auxiliary_loss(L, constants["mAP"], args), constants


def auxiliary_gradient(model, theta_u: dict, part: dict, data, cache, args) -> tuple[float, list[Tensor]]:
    """A of one part and v = dA/dtheta_u, --batch-size images in memory at a time, with any attention kernel.

    A depends on theta_u through the mean loss of each set only, so v = sum over sets of dA/dL_set * grad L_set.
    """
    leaf = {k: p.detach().requires_grad_() for k, p in theta_u.items()}
    L, mAP, gradients = {}, {}, {}
    for name in sets_in(args):
        constant = name == "v" and args.stop_val_gradient
        total, collected, gradient = 0.0, [], None
        for start in range(0, len(part[name]), args.meta_batch_size):
            indices = part[name][start : start + args.meta_batch_size]
            with torch.set_grad_enabled(not constant):
                _, logits = outputs(model, leaf, images_at(data, leaf, indices), args)
                losses = image_losses(name, logits, targets_of(data, indices), cache["logits"][indices].to(logits), args)
                mean = losses.sum() / len(part[name])
            if not constant:
                new = torch.autograd.grad(mean, list(leaf.values()))
                gradient = list(new) if gradient is None else torch._foreach_add(gradient, new)
            total = total + mean.detach()
            collected.append(logits.detach())
        L[name] = total.requires_grad_()
        if gradient is not None:
            gradients[name] = gradient
        if name != "r":
            mAP[name] = score(torch.cat(collected), targets_of(data, part[name]))
    L["v0"], mAP["v0"] = original_validation(part, data, cache, args)
    A = auxiliary_loss(L, mAP, args)
    weight = torch.autograd.grad(A, [L[name] for name in gradients])
    v = [torch.zeros_like(p) for p in leaf.values()]
    for w, name in zip(weight, gradients, strict=True):
        torch._foreach_add_(v, torch._foreach_mul(gradients[name], w.item()))
    return A.item(), v


def original_validation(part, data, cache, args) -> tuple[Tensor, float]:
    """L_task(D_v; theta) and mAP(D_v; theta): of all D_v, computed once; with --pair-size of the pair's own images."""
    if not args.pair_size:
        return cache["v0"]
    logits, targets = cache["logits"][part["v"]].to(data["device"]), targets_of(data, part["v"])
    return task_losses(logits, targets).mean(), score(logits, targets)


@torch.no_grad()
def cache_original(model, data, split, args) -> dict:
    """What depends on theta alone, computed once: logits (N, K) where A needs them, and D_v's loss and mAP."""
    needed = list(split["val"])
    if "r" in sets_in(args):
        needed += split["retain"] + split["forget"]
    logits = torch.zeros(len(data["identities"]), data["classes"])
    logits[needed] = predict(model, lambda i: raw_batch(data, i), needed, data["device"], args.amp)
    val, targets = logits[split["val"]], data["targets"][split["val"]]
    v0 = task_losses(val, targets).mean().to(data["device"]), score(val, targets)
    return {"logits": logits, "v0": v0}


# ---------------------------------------------------------------------------------------------------------------------
# The meta-gradient, both ways


def support_batch(data, train_ids, support, theta):
    """Images (N_s, 3, H, W), targets and rows of the identity table of Support images."""
    row = {identity: i for i, identity in enumerate(train_ids)}
    who = torch.tensor([row[int(i)] for i in data["identities"][support]], device=data["device"])
    return images_at(data, theta, support), targets_of(data, support), who


def meta_gradient_double(model, h_phi, theta, S, parts, data, cache, args, frozen=None):
    """grad_phi A by double backward: the textbook way, and the oracle of the other. Returns A, gradients, constants."""
    images, targets, who = S
    theta = {k: p.detach().requires_grad_() for k, p in theta.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        M = h_phi(*outputs(model, theta, images, args), targets, who)  # Alg. 1, line 11
        options = dict(create_graph=True, materialize_grads=True, allow_unused=True)  # the graph leads to phi
        g = torch.autograd.grad(M, list(theta.values()), **options)
    theta_u = inner_step(theta, g, h_phi.step_sizes(theta, args.eta))
    A, constants = 0.0, []
    for i, part in enumerate(parts):
        A_part, seen = auxiliary(model, theta_u, part, data, cache, args, frozen and frozen[i])
        A, constants = A + part["weight"] * A_part, constants + [seen]
    gradient = torch.autograd.grad(A, list(h_phi.parameters()), materialize_grads=True, allow_unused=True)
    return A.item(), gradient, constants


def meta_gradient_forward(model, h_phi, theta, S, parts, data, cache, args):
    """grad_phi A, exact, with no second-order graph through the model. Returns A, gradients, theta_u.

    phi enters through one inner step, so with z = f_theta(S) = (features, logits) and v = dA/dtheta_u
        grad_phi A = -grad_phi < grad_z h_phi(z), z' >,   z' = J_theta f(S) eta v
    v is an ordinary backward pass, z' one forward-mode pass over S, and only the MLP is differentiated twice.
    """
    images, targets, who = S
    leaf = {k: p.detach().requires_grad_() for k, p in theta.items()}
    z = outputs(model, leaf, images, args)  # (N_s, D), (N_s, K)
    z_leaf = [t.detach().requires_grad_() for t in z]
    M = h_phi(*z_leaf, targets, who)  # Alg. 1, line 11
    g_z = torch.autograd.grad(M, z_leaf, create_graph=True, materialize_grads=True, allow_unused=True)
    g = torch.autograd.grad(z, list(leaf.values()), [t.detach() for t in g_z])
    eta = h_phi.step_sizes(theta, args.eta)
    theta_u = inner_step(theta, g, [e.detach() for e in eta])
    A, v = 0.0, [torch.zeros_like(p) for p in theta.values()]
    for part in parts:
        A_part, v_part = auxiliary_gradient(model, theta_u, part, data, cache, args)
        A += part["weight"] * A_part
        torch._foreach_add_(v, v_part, alpha=part["weight"])
    tangent = {k: e.detach() * d for k, e, d in zip(theta, eta, v, strict=True)}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # fused attention has no forward mode
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15's forward mode warns of its own torch.jit
        _, z_dot = jvp(lambda t: outputs(model, t, images, args), (theta,), (tangent,))
    along = sum((a * b).sum() for a, b in zip(g_z, z_dot, strict=True))
    if h_phi.log_step is not None:  # theta_u also depends on phi through the step sizes themselves
        along = along + sum((e * a * b).sum() for e, a, b in zip(eta, g, v, strict=True))
    gradient = torch.autograd.grad(-along, list(h_phi.parameters()), materialize_grads=True, allow_unused=True)
    return A, gradient, theta_u


def meta_train(model, data, split, args, path) -> tuple[MetaLoss, float]:
    """Algorithm 1, lines 8-17, over simulated requests; theta is never changed. Saves phi at path; resumes with --resume."""
    begin, (rank, world) = time.time(), rank_and_world()
    device, theta = data["device"], updatable(model, args.freeze_embeddings)
    per_step = args.requests_per_step
    h_phi = new_meta_loss(model, data, split, args).to(device)
    learned = [name.startswith("log_step") for name, _ in h_phi.named_parameters()]
    groups = [
        {"params": [p for p, step in zip(h_phi.parameters(), learned, strict=True) if step == which], "peak": peak}
        for which, peak in ((False, args.alpha), (True, args.alpha_step))
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.alpha, weight_decay=0.0, amsgrad=True)
    content = meta_loss_content(data, split, args)
    partial, first_epoch, before = path.with_suffix(".partial.pt"), 0, 0.0
    if args.resume and partial.is_file():
        saved = load_checkpoint(partial, "partial meta-loss", **content)
        h_phi.load_state_dict(saved["phi"])
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch, before = saved["epoch"] + 1, saved["seconds"]
        say(f"meta-loss: resuming after epoch {first_epoch}")
    cache = cache_original(model, data, split, args)
    n_s = args.meta_ids or args.ids
    epochs = 1 if args.dry_run else args.meta_epochs
    steps = math.ceil(math.ceil(len(split["train_ids"]) / n_s) / per_step)
    for epoch in range(first_epoch, epochs):
        requests = list(simulated_requests(data, split, n_s, args.seed, epoch))
        requests = requests[: 2 * world] if args.dry_run else requests
        clock, mean_A = time.time(), []
        for step, start in enumerate(range(0, len(requests), per_step)):
            batch = range(start, min(start + per_step, len(requests)))
            total = [torch.zeros_like(p) for p in h_phi.parameters()]
            for r in batch[rank::world]:
                support, forget = requests[r]
                torch.manual_seed(generator(args.seed, epoch, r).initial_seed())  # dropout in h_phi
                parts = request_parts(data, split, support, forget, args, np.random.default_rng([args.seed, epoch, r, 5]))
                S = support_batch(data, split["train_ids"], support, theta)
                way = {"forward": meta_gradient_forward, "double": meta_gradient_double}[args.hypergradient]
                A, gradient, _ = way(model, h_phi, theta, S, parts, data, cache, args)
                torch._foreach_add_(total, gradient)
                mean_A.append(A)
            for p, t in zip(h_phi.parameters(), total, strict=True):
                if world > 1:
                    torch.distributed.all_reduce(t)
                p.grad = t / len(batch)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            optimizer.step()  # Alg. 1, line 16
        if not all(torch.isfinite(p).all() for p in h_phi.parameters()):
            fail(f"the meta-loss is no longer finite in epoch {epoch + 1}; lower --alpha (now {args.alpha}) or --eta (now {args.eta})")
        took = time.time() - clock
        say(
            f"meta-loss epoch {epoch + 1}/{epochs}: {len(requests)} requests, A {np.mean(mean_A):.5f}, {took:.1f} s, {(epochs - epoch - 1) * took:.0f} s left"
        )
        if rank == 0:
            progress = dict(phi=h_phi.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch, seconds=before + time.time() - begin)
            save_checkpoint(partial, kind="partial meta-loss", **progress, **content)
    seconds = before + time.time() - begin
    if rank == 0:
        save_checkpoint(path, kind="meta-loss", phi=h_phi.state_dict(), theta=model.state_dict(), seconds=seconds, **content)
        partial.unlink(missing_ok=True)
    wait_for_all()
    return h_phi.eval(), seconds


def new_meta_loss(model, data, split, args) -> MetaLoss:
    torch.manual_seed(args.seed)
    shape = (data["classes"], model.width, len(split["train_ids"]))
    theta = updatable(model, args.freeze_embeddings) if args.alpha_step else None
    layers = dict(hidden=args.hidden, dropout=args.dropout, zero_init=args.zero_init)
    return MetaLoss(args.inputs.split(","), *shape, **layers, multilabel=data["targets"].ndim == 2, theta=theta)


# The flags that make one meta-loss another; saved with it, and part of its file name where they differ from the preset's.
META_FLAGS = (
    *("preset", "inputs", "hidden", "dropout", "zero_init", "eta", "alpha", "alpha_step", "meta_epochs", "meta_ids", "requests_per_step"),
    *("aux_loss", "accuracy_weight", "distance", "stop_val_gradient", "pair_size", "val_images", "freeze_embeddings"),
    *("retain_weight", "retain_images"),
)


def meta_loss_content(data, split, args) -> dict:
    """What a meta-loss file says of itself: enough to unlearn with no other file at hand."""
    return {
        "split": split["hash"],
        "seed": args.seed,
        "model": args.model,
        "image_size": args.image_size,
        "train_ids": split["train_ids"],
        "target_names": [str(name) for name in data["target_names"]],
        "multilabel": data["targets"].ndim == 2,
        **{flag: getattr(args, flag) for flag in META_FLAGS},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Unlearning


def unlearn(model, h_phi, S, args) -> dict:
    """METAUNLEARN_unlearning(S) of Algorithm 1, lines 19-22: one step, from the Support set alone. Returns theta_u.

    S: images (N_s, 3, H, W), targets, identity rows (see support_batch). The given model is not changed.
    """
    h_phi.eval()
    theta = {k: p.requires_grad_() for k, p in updatable(model, args.freeze_embeddings).items()}
    images, targets, who = S
    M = h_phi(*outputs(model, theta, images, args), targets, who)  # Alg. 1, line 20
    g = torch.autograd.grad(M, list(theta.values()), materialize_grads=True, allow_unused=True)
    return {k: p.detach() for k, p in inner_step(theta, g, h_phi.step_sizes(theta, args.eta)).items()}  # Alg. 1, line 21


def ascend(model, S, lr: float, args) -> dict:
    """The bar that a learned loss must clear: one gradient-ascent step on the Support set's task loss. Returns theta_u."""
    theta = {k: p.requires_grad_() for k, p in updatable(model, False).items()}
    images, targets, _ = S
    loss = task_losses(outputs(model, theta, images, args)[1], targets).mean()
    g = torch.autograd.grad(loss, list(theta.values()))
    return {k: p.detach() for k, p in inner_step(theta, g, [-lr] * len(g)).items()}


def simulated_problem(model, data, split, args, images=256) -> list[dict]:
    """Simulated requests by which hyper-parameters may be chosen, from training and validation data only.

    The gold model is replaced by what it should look like: theta itself on (at most `images`) retained and validation
    images, and on forgotten ones the score that theta has on as many validation identities (mean of 10 draws).
    Each problem holds S, its indices `support`, index arrays `sets` and the scores `want`. Source: ours, after Eq. (7).
    """
    rng = np.random.default_rng([args.seed, args.split_seed, 6])
    val, everyone = np.array(split["val"]), np.array(split["retain"] + split["forget"])
    val_owner = data["identities"][val]
    val_logits = predict(model, lambda i: raw_batch(data, i), val, data["device"], args.amp)
    seen_as_new = []
    for _ in range(10):
        people = rng.choice(np.unique(val_owner), min(args.ids, len(np.unique(val_owner))), replace=False)
        own = np.isin(val_owner, people)
        seen_as_new.append(score(val_logits[own], data["targets"][val[own]]))
    some_val = rng.choice(len(val), min(images, len(val)), replace=False)
    problems = []
    simulated = simulated_requests(data, split, args.ids, args.seed, 1_000_000)  # no epoch of meta-training
    for _, (support, forget) in zip(range(1 if args.dry_run else 3), simulated, strict=False):
        others = np.setdiff1d(everyone, np.concatenate([support, forget]))
        retained = rng.choice(others, min(images, len(others)), replace=False)
        logits = predict(model, lambda i: raw_batch(data, i), retained, data["device"], args.amp)
        want = {"retain": score(logits, data["targets"][retained]), "forget": float(np.mean(seen_as_new))}
        want["test"] = score(val_logits[some_val], data["targets"][val[some_val]])
        S = support_batch(data, split["train_ids"], support, updatable(model, False))
        sets = {"retain": retained, "forget": forget, "test": val[some_val]}
        problems.append({"S": S, "support": support, "sets": sets, "want": want})
    return problems


def simulated_tow(step, model, problems, data, args) -> float:
    """Mean ToW over simulated problems of step(S) -> theta_u."""
    values = []
    for problem in problems:
        changed, got = with_parameters(model, step(problem["S"])), {}
        for name, indices in problem["sets"].items():
            logits = predict(changed, lambda i: raw_batch(data, i), indices, data["device"], args.amp)
            got[name] = score(logits, data["targets"][indices])
        values.append(tow(got, problem["want"]))
    return float(np.mean(values))


def choose_ascent_step(model, problems, data, args) -> tuple[float, dict]:
    """The ascent step size with the best simulated ToW; returns it and all that were tried."""
    tried = {}
    for lr in (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)[: 2 if args.dry_run else None]:
        tried[lr] = simulated_tow(lambda S, lr=lr: ascend(model, S, lr, args), model, problems, data, args)
        if tried[lr] < max(tried.values()) - 0.05:
            break  # larger steps only break more
    return max(tried, key=tried.get), tried


# ---------------------------------------------------------------------------------------------------------------------
# The rows that METAUNLEARN is compared with


def reference_rows(model, gold, S, problems, data, split, args) -> tuple[dict, dict]:
    """The rows that every meta-loss is compared with (original, retrained, ascent), and the ascent steps tried.

    They depend on the two models alone, so they are kept beside them, under a key made of their weights.
    """
    weights = hashlib.sha256(split["hash"].encode() + str(args.amp).encode())
    for tensor in (*model.state_dict().values(), *gold.state_dict().values()):
        weights.update(tensor.cpu().contiguous().numpy().tobytes())
    path, key = checkpoint_folder(args) / f"reference-seed{args.seed}.json", weights.hexdigest()
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or cut short: measure again
        saved = {}
    if saved.get("key") != key:
        lr, tried = choose_ascent_step(model, problems, data, args)
        controls = control_sets(data, split)
        models = {"original": model, "retrained": gold, "ascent": with_parameters(model, ascend(model, S, lr, args))}
        rows = {
            name: measure(m, lambda i: raw_batch(data, i), data["targets"], split, controls, data["device"], args.amp)
            for name, m in models.items()
        }
        saved = {"key": key, "rows": rows, "selection": {"ascent_step": lr, "ascent": {str(k): t for k, t in tried.items()}}}
        if rank_and_world()[0] == 0:
            write_json(path, saved)
    tried = ", ".join(f"{lr}: {100 * t:.1f}" for lr, t in saved["selection"]["ascent"].items())
    say(f"ascent step size {saved['selection']['ascent_step']}, by its simulated ToW ({tried})")
    return saved["rows"], saved["selection"]


# ---------------------------------------------------------------------------------------------------------------------
# Checking the meta-gradient


def check_gradient(model, data, split, args) -> dict:
    """Compare grad_phi A: forward against double and central differences in float64, float32 and bf16 against float64.

    Uses two identities and their images, so that it also runs with a large model. Returns relative errors.
    """
    support, forget = next(simulated_requests(data, split, 2, args.seed, 0))
    args = argparse.Namespace(**vars(args) | {"val_images": 16, "retain_images": 16, "amp": False, "pair_size": min(args.pair_size, 16)})
    parts = request_parts(data, split, support, forget[:16], args, np.random.default_rng(args.seed))
    h_phi = new_meta_loss(model, data, split, args).to(data["device"]).eval()
    with torch.no_grad():
        h_phi.mlp[-2].weight.normal_(0, 0.1)  # away from the zero initialisation, where half of the gradient vanishes
    cache = cache_original(model, data, split, args)

    def gradient(way, dtype, amp=False):
        m, h = copy.deepcopy(model).to(dtype), copy.deepcopy(h_phi).to(dtype)
        theta = updatable(m, args.freeze_embeddings)
        S = support_batch(data, split["train_ids"], support, theta)
        known = cache | {"v0": (cache["v0"][0].to(dtype), cache["v0"][1])}
        run = argparse.Namespace(**vars(args) | {"amp": amp})
        out = way(m, h, theta, S, parts, data, known, run)
        return torch.cat([g.flatten() for g in out[1]]).double(), (m, h, theta, S, known, run, out[2])

    exact, _ = gradient(meta_gradient_forward, torch.float64)
    double, (m, h, theta, S, known, run, frozen) = gradient(meta_gradient_double, torch.float64)
    relative = lambda a, b: ((a - b).norm() / b.norm()).item()
    errors = {"forward against double backward, float64": relative(exact, double)}
    direction = exact / exact.norm()  # the direction in which A changes most, so that rounding matters least

    def A_at(shift):
        moved, start = copy.deepcopy(h), 0
        with torch.no_grad():
            for p in moved.parameters():
                p += shift * direction[start : start + p.numel()].view_as(p)
                start += p.numel()
        return meta_gradient_double(m, moved, theta, S, parts, data, known, run, frozen)[0]

    slope = (A_at(1e-5) - A_at(-1e-5)) / 2e-5
    errors["forward against central differences, float64"] = abs(slope - exact.norm().item()) / abs(slope)
    errors["float32 against float64"] = relative(gradient(meta_gradient_forward, torch.float32)[0], exact)
    errors["bf16 autocast against float64"] = relative(gradient(meta_gradient_forward, torch.float32, amp=True)[0], exact)
    for name, error in errors.items():
        say(f"meta-gradient, relative error of {name}: {error:.1e}")
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# Unlearning later, from pictures and labels alone


def export_support(data, split, folder):
    """Write the Support set as pictures and labels.csv (file, identity, one column an attribute, or class)."""
    from PIL import Image

    folder = pathlib.Path(folder)
    check_writable(folder)
    multilabel = data["targets"].ndim == 2
    rows = [["file", "identity", *([str(n) for n in data["target_names"]] if multilabel else ["class"])]]
    for i in split["support"]:
        name = f"{i}.png"
        with atomic_write(folder / name) as temporary:
            Image.fromarray(data["images"][i].cpu().numpy()).save(temporary, format="PNG")
        label = data["targets"][i].int().tolist() if multilabel else [int(data["targets"][i])]
        rows.append([name, int(data["identities"][i]), *label])
    with atomic_write(folder / "labels.csv") as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    say(f"Support set written to {folder}")


def read_support(folder, saved: dict, device):
    """Read pictures and labels.csv as export_support writes them; returns S as support_batch does."""
    from PIL import Image

    folder = pathlib.Path(folder)
    if not (folder / "labels.csv").is_file():
        fail(f"--support {folder}: no labels.csv there (columns: file, identity, then {', '.join(saved['target_names'][:3])} ...)")
    try:
        with open(folder / "labels.csv", newline="", encoding="utf-8-sig") as file:  # -sig: spreadsheets write a BOM
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        fail(f"{folder / 'labels.csv'} cannot be read as UTF-8 text with commas ({error})")
    row_of = {identity: i for i, identity in enumerate(saved["train_ids"])}
    images, targets, who, size = [], [], [], saved["image_size"]
    for row in rows:
        try:
            picture = Image.open(folder / row["file"]).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            labels = [int(row[name]) for name in saved["target_names"]] if saved["multilabel"] else int(row["class"])
            identity = int(row["identity"])
            if not (set(labels) <= {0, 1} if saved["multilabel"] else 0 <= labels < len(saved["target_names"])):
                raise ValueError("a label must be 0 or 1, a class from 0 to the number of classes less 1")
        except (OSError, KeyError, ValueError, TypeError) as error:
            fail(f"{folder / 'labels.csv'}: the row of {row.get('file')} cannot be used ({type(error).__name__}: {error})")
        if identity not in row_of and "ids" in saved["inputs"]:
            fail(
                f"identity {identity} was not in training, and this meta-loss looks identities up; meta-train with --inputs logits,features,targets"
            )
        images.append(torch.from_numpy(np.array(picture)))
        targets.append(labels)
        who.append(row_of.get(identity, 0))
    if not rows:
        fail(f"{folder / 'labels.csv'} has no rows")
    images = torch.stack(images).to(device).permute(0, 3, 1, 2).float() / 255  # (N_s, 3, H, W)
    return images, torch.tensor(targets, device=device), torch.tensor(who, device=device)


def unlearn_from_files(args, device):
    """--meta-loss FILE --support DIR: no data set, no split, no original training code path."""
    saved = load_checkpoint(args.meta_loss, "meta-loss")
    check_file(args.save)
    check_writable(pathlib.Path(args.meta_loss).parent)
    model = build_model(saved["model"], len(saved["target_names"]), saved["image_size"]).to(device).eval()
    model.load_state_dict(saved["theta"])
    shape = (len(saved["target_names"]), model.width, len(saved["train_ids"]))
    theta = updatable(model, saved["freeze_embeddings"]) if saved["alpha_step"] else None
    h_phi = MetaLoss(saved["inputs"].split(","), *shape, hidden=saved["hidden"], multilabel=saved["multilabel"], theta=theta).to(device)
    h_phi.load_state_dict(saved["phi"])
    S = read_support(args.support, saved, device)
    run = argparse.Namespace(**vars(args) | {"eta": saved["eta"], "freeze_embeddings": saved["freeze_embeddings"]})
    theta_u = unlearn(model, h_phi, S, run)
    changed = with_parameters(model, theta_u)
    with torch.no_grad():
        before, after = (task_losses(m(S[0])[1], S[1]).mean().item() for m in (model, changed))
    path = args.save or str(pathlib.Path(args.meta_loss).with_suffix("")) + "-unlearned.pt"
    save_checkpoint(
        path, kind="model", which="unlearned", model=changed.state_dict(), architecture=saved["model"], image_size=saved["image_size"]
    )
    say(f"unlearned {len(S[0])} people: task loss on their Support pictures {before:.3f} -> {after:.3f}; model written to {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


# What each number may be: (flag, lowest, highest).
RANGES = [(flag, 1e-12, 1e6) for flag in ("eta", "alpha")] + [(flag, 0, 1e6) for flag in ("alpha_step", "retain_weight")]
RANGES += [(flag, 1, 1e6) for flag in ("meta_epochs", "meta_ids", "requests_per_step", "hidden", "retain_images", "meta_batch_size")]
RANGES += [("pair_size", 0, 1e6), ("val_images", 0, 1e9), ("dropout", 0, 0.99), *RECIPE_RANGES]


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add_shared_arguments(parser)
    add_recipe_arguments(parser)
    add = parser.add_argument
    on_off = argparse.BooleanOptionalAction
    add(
        "--preset",
        choices=sorted(_METHODS),
        default="paper",
        help="paper: as written; code: as its authors' code; selective: ours, watches retained people",
    )
    add("--eta", type=float, default=0.1, help="inner step size eta, Eq. (4); authors' code: 0.1")
    add("--alpha", type=float, default=1e-3, help="outer step size alpha, Alg. 1 line 16; authors' code: 1e-4")
    add(
        "--alpha-step",
        type=float,
        default=0.0,
        help="ours: outer step size for a learned log step size of each parameter, 0: eta for all; paper: 0",
    )
    add("--meta-epochs", type=int, default=3, help="passes over the training identities; authors' code: 3")
    add("--meta-ids", type=int, default=None, help="N_S in simulated requests where it differs from --ids; paper: Table 7")
    world = rank_and_world()[1]
    add(
        "--requests-per-step",
        type=int,
        default=world,
        help="simulated requests averaged in one step, shared by the processes; authors' code: 1",
    )
    add(
        "--inputs", default="logits,features,targets,ids", help="what h_phi sees, of logits, features, targets, ids, losses; paper: Table 4"
    )
    add("--hidden", type=int, default=128, help="width of h_phi; authors' code: 512")
    add("--dropout", type=float, default=0.0, help="in h_phi, probability; authors' code: 0.5")
    add("--zero-init", action=on_off, default=True, help="start h_phi's last layer at 0, so that the first update is 0; authors' code: off")
    add("--aux-loss", choices=("both", "first", "second", "scrub"), default="both", help="terms of Eq. (8); paper: Table 3")
    add("--accuracy-weight", action=on_off, default=True, help="weight losses by 1 - mAP, Eq. (6); paper: Table 3")
    add(
        "--distance",
        choices=("l2", "smooth_l1"),
        default="l2",
        help="between the two sides of Eq. (8); paper: l2, authors' code: smooth_l1",
    )
    add(
        "--stop-val-gradient",
        action=on_off,
        default=False,
        help="no gradient through L(D_v; theta_u); paper: not stated, authors' code: on",
    )
    add("--pair-size", type=int, default=0, help="images in each pair of batches that A is averaged over, 0: whole sets; authors' code: 64")
    add("--val-images", type=int, default=128, help="random images of D_v a step, 0: all (as the paper writes); authors' code: --pair-size")
    add("--freeze-embeddings", action=on_off, default=False, help="leave cls_token and pos_embed as they are; authors' code: on")
    add("--retain-weight", type=float, default=0.0, help="ours: weight in A of KL(theta, theta_u) on retained images; paper: 0 (App. C)")
    add("--retain-images", type=int, default=128, help="random retained images a step, for --retain-weight and --aux-loss scrub")
    add(
        "--hypergradient",
        choices=("forward", "double"),
        default="forward",
        help="forward: exact and cheap; double: textbook double backward",
    )
    add("--meta-batch-size", type=int, default=64, help="images in memory at a time in the meta step; changes no number but rounding")
    add(
        "--check-gradient", action="store_true", help="compare the meta-gradient both ways, with finite differences, and in bf16; then stop"
    )
    add("--meta-loss", metavar="FILE", help="use this saved meta-loss; no meta-training")
    add("--support", metavar="DIR", help="with --meta-loss: unlearn the people in DIR (pictures, labels.csv); needs no data set")
    add("--export-support", metavar="DIR", help="write the Support set there, in the form --support reads")
    add("--save", metavar="FILE", help="write the unlearned model there")
    add("--plot", action="store_true", help="write a figure beside the result file")
    args = parse_with_presets(parser, PRESETS, argv)
    check_ranges(args, RANGES)
    if args.forget != "identities":
        fail(f"METAUNLEARN forgets identities, not --forget {args.forget}; see ltu.py")
    inputs = set(args.inputs.split(","))
    if not inputs <= {"logits", "features", "targets", "ids", "losses"} or not inputs & {"logits", "features", "losses"}:
        fail(f"--inputs {args.inputs}: name some of logits, features, targets, ids, losses, at least one of logits, features, losses")
    if args.requests_per_step % world:
        fail(f"--requests-per-step {args.requests_per_step} must be a multiple of the {world} processes")
    if args.support and not args.meta_loss:
        fail("--support needs --meta-loss FILE, the meta-loss to unlearn with")
    # A name for result and meta-loss files that tells ablations apart: what differs from the preset's own values.
    changed = [flag for flag in META_FLAGS if flag != "preset" and getattr(args, flag) != parser.get_default(flag)]
    args.method = f"metaunlearn-{args.preset}" + "".join(f"-{flag.replace('_', '')}={getattr(args, flag)}" for flag in changed)
    return args


def report(rows, table, selection, seconds, data, split, args, source, device) -> dict:
    """Print the paper's row, write the result file and, with --plot, the figure; returns the result as written."""
    metric = "mAP" if data["targets"].ndim == 2 else "accuracy"
    print_table(rows, table, metric, LABELS | {"unlearned": f"METAUNLEARN {args.preset}" + " (dry)" * args.dry_run})
    result = {
        "method": args.method,
        "dataset": data["name"],
        "setting": setting(args),
        "seed": args.seed,
        "split_hash": split["hash"],
        "access": {
            "meta-training": ["retain", "forget", "val"] + ["held_out"] * args.held_out,
            "unlearning": ["support"],
            "ascent": ["support"],
            "choosing the ascent step": ["retain", "forget", "val"],
        },
        "args": vars(args),
        "metric": metric,
        "metrics": rows,
        "comparison": table,
        "tow": table["unlearned"]["tow"],
        "simulated_tow": selection,
        "seconds": seconds,
        **provenance(device),
    }
    path = pathlib.Path(args.out) / f"{data['name']}-{setting(args)}" / f"{args.method}-seed{args.seed}.json"
    write_json(path, result)
    say(f"result: {path}   meta-loss: {source}\n" + ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()))
    if args.plot:
        title = f"{data['name']}, {args.ids} identities forgotten, split seed {args.split_seed}, seed {args.seed}"
        plot(rows, table, path.with_suffix(".png"), metric, f"METAUNLEARN {args.preset}", title)
        say(f"figure: {path.with_suffix('.png')}")
    return json.loads(path.read_text())


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args)
    if args.check_gradient and device.type == "mps":  # which has no float64
        device = torch.device("cpu")
    start_processes(device)
    if args.support:
        return unlearn_from_files(args, device)
    check_writable(*filter(None, [args.checkpoint_dir, args.out, args.export_support]))
    check_file(args.save)
    seconds, clock = {}, time.time()
    data = load(args, device)
    split = make_split(data, args)
    say(describe(data, split))
    seconds["load"] = time.time() - clock
    model, spent = train("original", data, split, args)
    if args.check_gradient:
        return check_gradient(model, data, split, args)
    gold, spent_gold = train("gold", data, split, args)
    seconds["train"] = spent + spent_gold

    path = checkpoint_folder(args) / f"{args.method}-seed{args.seed}.pt"
    source = pathlib.Path(args.meta_loss) if args.meta_loss else path
    h_phi, seconds["meta_train"] = None, 0.0
    if args.meta_loss or path.is_file():
        content = meta_loss_content(data, split, args)
        saved = load_checkpoint(source, "meta-loss", **({"split": split["hash"], "model": args.model} if args.meta_loss else content))
        if any(not torch.equal(t.cpu(), saved["theta"][k]) for k, t in model.state_dict().items()):
            fail(f"{source} was learned for other weights than {checkpoint_folder(args)}/original-seed{args.seed}.pt; delete one of them")
        for flag in META_FLAGS:  # with --meta-loss, what the file was made with wins over the command line
            setattr(args, flag, saved[flag])
        args.method = source.stem.rsplit("-seed", 1)[0]
        h_phi = new_meta_loss(model, data, split, args).to(device)
        h_phi.load_state_dict(saved["phi"])
        say(f"meta-loss: loaded {source}")
    else:
        h_phi, seconds["meta_train"] = meta_train(model, data, split, args, path)

    S = support_batch(data, split["train_ids"], split["support"], updatable(model, False))
    clock = time.time()
    theta_u = unlearn(model, h_phi, S, args)
    seconds["unlearn"], clock = time.time() - clock, time.time()
    unlearned = with_parameters(model, theta_u)
    problems = simulated_problem(model, data, split, args)
    rows, selection = reference_rows(model, gold, S, problems, data, split, args)
    selection["unlearned"] = simulated_tow(lambda S: unlearn(model, h_phi, S, args), model, problems, data, args)
    say(f"simulated ToW of METAUNLEARN: {100 * selection['unlearned']:.1f}")
    rows["unlearned"] = measure(
        unlearned, lambda i: raw_batch(data, i), data["targets"], split, control_sets(data, split), device, args.amp
    )
    table = compare(rows)
    seconds["evaluate"] = time.time() - clock
    if rank_and_world()[0] > 0:  # the first process reports
        return stop_processes()
    result = report(rows, table, selection, seconds, data, split, args, source, device)
    if args.export_support:
        export_support(data, split, args.export_support)
    if args.save:
        save_checkpoint(
            args.save, kind="model", which="unlearned", model=unlearned.state_dict(), architecture=args.model, image_size=args.image_size
        )
        say(f"unlearned model: {args.save}")
    stop_processes()
    return result


if __name__ == "__main__":
    main()
