"""METAUNLEARN: learn a loss that unlearns a person from one picture, after the data is gone.

Source: De Min et al., "One-Shot Unlearning of Personal Identities". The file reads in its order:
    repeat: S, D_f = a simulated unlearning request                   Sec. 4.1, Alg. 1 lines 1-6
            theta_u = theta - eta * grad_theta h_phi(f_theta(S))      Eq. (4), Alg. 1 lines 11-12
            A = || E(D_f; theta_u) - E(D_v; theta_u) ||^2
              + || E(D_f; theta_u) - E(D_v; theta) ||^2               Eq. (5), (8)
            with E = (1 - mAP) L_task                                 Eq. (6)
            phi = phi - alpha * grad_phi A                            Alg. 1 line 16
    then, once, with the real S: theta_u = theta - eta * grad_theta h_phi(f_theta(S))

Usage:
    python metaunlearn.py                                    # drawn faces, on a CPU
    python metaunlearn.py --dataset celebahq --ids 20        # the paper's protocol
    python metaunlearn.py --meta-loss FILE --support DIR     # unlearn later, without any data
    torchrun --nproc-per-node 4 metaunlearn.py --dataset celeba --ids 10

Symbols: theta original model, theta_u unlearned model, phi meta-loss, eta inner step, alpha outer
step, S Support set (one picture a person), D_f / D_r / D_v / D_te forget, retain, validation and
test sets, N_S people in a request.

Where the paper is silent, or its authors' code differs, a preset decides:
    --preset paper      A as in Eq. (8), over all of D_f. Two departures of ours: theta_u is run on
                        --val-images random images of D_v (theta on all of it), and the last layer
                        of h_phi starts at 0, so that the first update is exactly 0.
    --preset code       The authors' code: A has a smooth-L1 distance and no gradient through
                        L_task(D_v; theta_u), and is averaged over pairs of 64 images of D_f and
                        of D_v; cls_token and pos_embed are not moved; h_phi is wide, has dropout
                        (both on celeba and celebahq with any preset) and starts at random; alpha
                        falls along a cosine, once an epoch; S runs in float32 where the rest runs
                        in bf16.
    --preset selective  Ours: A is the second term of Eq. (5), and 0.3 times how far retained people
                        move (a KL divergence; the paper's App. C found that such a term hinders
                        unlearning). h_phi sees losses, logits and targets, and a step size of each
                        parameter is learned too.
    --natural DAMPING   Ours, beside any preset: the gradient in Eq. (4) goes through (I + F /
                        DAMPING)^-1, F the Fisher information of the training data as a matrix for
                        each layer (baselines.curvature), so that the step is short where it would
                        change the outputs on this data. F is stored with phi: five times the size
                        of a ViT, nine times that of a ResNet.
The optimiser of phi is AdamW with amsgrad, a cosine and no weight decay in all of them (authors'
code; the paper's Tables 5 and 6, and the numbers of Table 4, are missing from our copy). mAP has no
gradient: it is a constant. results/LOG.md says what each difference changed; --natural brought
nothing beyond noise on drawn faces.
"""

import argparse
import contextlib
import math
import pathlib
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import SequentialSampler

import baselines
import common
import evaluate
from common import fail, generator, rank_and_world, say, score, task_losses, with_parameters
from data import (
    of_tensors,
    predict,
    raw_batch,
    read_pictures,
    simulated_requests,
    targets_of,
    write_pictures,
)
from train import PRESETS as TRAINING_PRESETS
from train import add_recipe_arguments, checkpoint_folder, open_data, train, train_both

# What --dataset and --preset bring along; a flag on the command line wins. Values: authors' code,
# but for toyfaces, qmnist and selective.
_CODE = dict(hidden=512, dropout=0.5, alpha=1e-4)
_FACES = dict(_CODE, meta_batch_size=64)
_DATASETS = {"celebahq": _FACES, "celeba": _FACES, "qmnist": dict(meta_epochs=1)}
_SELECTIVE = dict(inputs="logits,targets,losses", aux_loss="second", accuracy_weight=False)
_SELECTIVE |= dict(retain_weight=0.3, alpha_step=0.3)
_PRESETS = {"paper": {}, "code": _CODE, "selective": _SELECTIVE}
PRESETS = {name: own | _DATASETS.get(name, {}) for name, own in TRAINING_PRESETS.items()} | _PRESETS
# One epoch has 12 requests here, and 187 with CelebA-HQ/20.
PRESETS["toyfaces", "selective"] = dict(meta_epochs=12)
PAIR = 64  # images of D_f, and of D_v, in each pair of batches of the authors' code

# --------------------------------------------------------------------------------------------------
# The meta-loss h_phi (Sec. 4.2, Fig. 3)


class MetaLoss(nn.Module):
    """h_phi: an MLP with softplus that maps what the model says of S to one positive number.

    inputs: any of logits (as probabilities), features, targets, ids (an embedding of the `people`
    in training), and, ours, losses (the task loss of each output). Shapes: features (N_s, width),
    logits (N_s, K), targets (N_s, K) or (N_s,), who (N_s,) rows of the identity table -> (), the
    mean over images. theta: where given, a step size for each of its parameters is learned too.
    Source: Sec. 4.3, Table 4; layers: authors' code.
    """

    def __init__(
        self, inputs, K, width, people, hidden=128, dropout=0.0, multilabel=True, theta=None
    ):
        super().__init__()
        self.inputs, self.multilabel, self.K = list(inputs), multilabel, K
        widths = {"logits": K, "features": width, "targets": K, "ids": 64}
        widths["losses"] = K if multilabel else 1
        if "ids" in inputs:
            self.identity = nn.Embedding(people, 64)
        self.mlp = nn.Sequential(
            nn.Linear(sum(widths[name] for name in inputs), hidden),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 1),
            nn.Softplus(),
        )
        self.fisher, self.damping = None, None  # --natural
        self.log_step = None
        if theta:  # ours, after Meta-SGD (Li et al. 2017): log step sizes, as a part of phi
            self.log_step = nn.ParameterList(torch.zeros_like(p) for p in theta.values())

    def step_sizes(self, theta: dict, eta: float) -> list[Tensor]:
        """eta of each tensor of theta: () where it is fixed, the tensor's shape where learned."""
        if self.log_step is None:
            return [torch.as_tensor(eta, dtype=p.dtype, device=p.device) for p in theta.values()]
        return [eta * s.exp() for s in self.log_step]

    def direction(self, theta: dict, gradient) -> list[Tensor]:
        """The gradient, a tensor for each of theta; with --natural (I + F / damping)^-1 gradient.

        A symmetric linear map. What F does not hold (baselines.natural) is 0.
        """
        if self.fisher is None:
            return list(gradient)
        named = dict(zip(theta, gradient, strict=True))
        step = baselines.natural(self.fisher, named, self.damping)
        return [self.damping * d for d in step.values()]

    def forward(self, features: Tensor, logits: Tensor, targets: Tensor, who: Tensor) -> Tensor:
        parts = {"features": features}
        if self.multilabel:
            y = targets.to(logits.dtype)  # (N_s, K)
            losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
            parts |= {"logits": logits.sigmoid(), "targets": y, "losses": losses}
        else:
            y = F.one_hot(targets, self.K).to(logits.dtype)  # (N_s, K)
            losses = F.cross_entropy(logits, targets, reduction="none")[:, None]  # (N_s, 1)
            parts |= {"logits": logits.softmax(1), "targets": y, "losses": losses}
        if "ids" in self.inputs:
            parts["ids"] = self.identity(who)  # (N_s, 64)
        return self.mlp(torch.cat([parts[name] for name in self.inputs], 1)).mean()


# --------------------------------------------------------------------------------------------------
# Equations


def updatable(model: nn.Module, code=False) -> dict:
    """theta as {name: tensor}, detached; code: without cls_token and pos_embed, as the authors'."""
    left_out = ("cls_token", "pos_embed") if code else ()
    return {k: p.detach() for k, p in model.named_parameters() if k.split(".")[-1] not in left_out}


def model_function(model: nn.Module, amp=False):
    """f(theta, images) -> (features (B, D), logits (B, K)), in float32 at least.

    Normalisation layers stay in the mode in which the model is: eval mode.
    """

    def f(theta: dict, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(next(iter(theta.values())).dtype)  # float64 in --check-gradient
        with common.autocast(images.device, amp):
            features, logits = functional_call(model, theta, (images,))
        keep = torch.promote_types(images.dtype, torch.float32)
        return features.to(keep), logits.to(keep)

    return f


def f_and_theta(model: nn.Module, args) -> tuple:
    """f, which runs S, and theta, which Eq. (4) moves; --preset code never runs S in bf16."""
    code = args.preset == "code"
    return model_function(model, args.amp and not code), updatable(model, code)


def inner_step(theta: dict, gradient, eta) -> dict:
    """theta_u = theta - eta * gradient, with an eta for each tensor. Source: Eq. (4)."""
    steps = zip(theta.items(), gradient, eta, strict=True)
    return {k: p - e * g for (k, p), g, e in steps}  # Eq. (4), Alg. 1 line 12


def auxiliary_loss(L: dict, mAP: dict, args) -> Tensor:
    """A from the mean losses and mAPs of its sets. Source: Eq. (5) and (8), Alg. 1 lines 14, 15.

    Keys: f = (D_f; theta_u), v = (D_v; theta_u), v0 = (D_v; theta), r = retained images (see
    image_losses). args: aux_loss, accuracy_weight, retain_weight, preset.
    """
    if args.aux_loss == "scrub":  # Table 3, first row
        return L["r"] - L["f"]
    weight = {k: 1 - a if args.accuracy_weight else 1.0 for k, a in mAP.items()}
    E = {k: weight[k] * L[k] for k in mAP}  # Eq. (6)
    code, A = args.preset == "code", 0.0
    distance = F.smooth_l1_loss if code else F.mse_loss
    if args.aux_loss in ("both", "first"):
        A = A + distance(E["f"], E["v"])  # Eq. (5), Eq. (8), 1st term
    if args.aux_loss in ("both", "second"):
        A = A + distance(E["f"], E["v0"])  # Eq. (5), Eq. (8), 2nd term
    if args.retain_weight:
        A = A + args.retain_weight * L["r"]  # ours: nothing in Eq. (8) looks at retained people
    return A


def image_losses(name: str, logits, targets, logits_0, scrub=False) -> Tensor:
    """The loss of each image of set `name`, whose mean goes into A: (B, K) -> (B,).

    f, v: the task loss. r: how far theta_u has moved from theta (logits_0), as a KL divergence; the
    paper gives no formula. scrub: SCRUB's terms with T = 4 (authors' code: a softmax over
    attributes; here a Bernoulli for each).
    """
    multilabel = targets.ndim == 2
    if scrub:
        divergence = common.kl_divergence(logits_0, logits, multilabel, T=4.0)
        kept = 0.99 * task_losses(logits, targets) + 0.001 * divergence
        return divergence if name == "f" else kept
    if name == "r":
        return common.kl_divergence(logits_0, logits, multilabel)
    return task_losses(logits, targets)


# --------------------------------------------------------------------------------------------------
# The meta-gradient: the textbook's way, then the exact way without second order in the model


def meta_gradient_double(h_phi, f, A, theta: dict, S: tuple, eta: float) -> tuple:
    """A(theta_u) and grad_phi A(theta_u) by double backward, the textbook's way.

    f: as model_function gives it. A: maps theta_u to a scalar tensor. theta: {name: tensor}.
    S: images (N_s, 3, H, W), targets, rows of the identity table. Returns (float, list of tensors).
    """
    images, targets, who = S
    theta = {k: p.detach().requires_grad_() for k, p in theta.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        M = h_phi(*f(theta, images), targets, who)  # Alg. 1, line 11
        g = torch.autograd.grad(M, list(theta.values()), create_graph=True, materialize_grads=True)
        # create_graph: g depends on phi, and dA/dphi goes through it.
    theta_u = inner_step(theta, h_phi.direction(theta, g), h_phi.step_sizes(theta, eta))
    loss = A(theta_u)
    return loss.item(), torch.autograd.grad(loss, list(h_phi.parameters()), materialize_grads=True)


def meta_gradient(h_phi, f, A, theta: dict, S: tuple, eta: float) -> tuple:
    """A(theta_u) and grad_phi A(theta_u), exact, with the small MLP alone differentiated twice.

    Arguments and result: as of meta_gradient_double. One forward-mode pass through the model stands
    in place of its double backward, because phi acts through one inner step alone. With
    z = f_theta(S) = (features, logits) and v = dA/dtheta_u,
        grad_phi A = -grad_phi < grad_z h_phi(z), z' >,   z' = J_theta f(S) eta v
    where v is an ordinary backward pass and z' one forward-mode pass over S. With --natural the
    step's map, which is symmetric and does not depend on phi, stands before eta v.
    """
    images, targets, who = S
    leaf = {k: p.detach().requires_grad_() for k, p in theta.items()}
    z = f(leaf, images)  # (N_s, D), (N_s, K)
    z_leaf = [t.detach().requires_grad_() for t in z]
    M = h_phi(*z_leaf, targets, who)  # Alg. 1, line 11
    g_z = torch.autograd.grad(M, z_leaf, create_graph=True, materialize_grads=True)
    fixed = [t.detach() for t in g_z]
    g = torch.autograd.grad(z, list(leaf.values()), fixed, materialize_grads=True)
    g, etas = h_phi.direction(theta, g), h_phi.step_sizes(theta, eta)
    theta_u = inner_step(theta, g, [e.detach() for e in etas])
    theta_u = {k: p.detach().requires_grad_() for k, p in theta_u.items()}
    loss = A(theta_u)
    v = torch.autograd.grad(loss, list(theta_u.values()))
    tangent = h_phi.direction(theta, [e.detach() * d for e, d in zip(etas, v, strict=True)])
    tangent = dict(zip(theta, tangent, strict=True))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 warns of its own torch.jit
        _, z_prime = jvp(lambda t: f(t, images), (theta,), (tangent,))
    product = sum((a * b).sum() for a, b in zip(g_z, z_prime, strict=True))
    if h_phi.log_step is not None:  # theta_u also depends on phi through the step sizes themselves
        product = product + sum((e * a * b).sum() for e, a, b in zip(etas, g, v, strict=True))
    phi = list(h_phi.parameters())
    return loss.item(), torch.autograd.grad(-product, phi, materialize_grads=True)


# --------------------------------------------------------------------------------------------------
# A of one simulated request


def sets_in(args) -> list[str]:
    """The sets whose loss stands in A, so that theta_u is run on them."""
    first, retained = args.aux_loss in ("both", "first"), args.retain_weight > 0
    wanted = {"f": True, "v": first, "r": retained or args.aux_loss == "scrub"}
    return [name for name in wanted if wanted[name]]


def request_sets(split: dict, support, forget, args, rng) -> list[dict]:
    """The sets over which A is computed, as index arrays f, v, r with their weight in the mean.

    One dictionary, with all of D_f or --forget-images of it; with --preset code one for each pair
    of 64 images.
    """
    sets, everyone = [], split["retain"] + split["forget"]
    # D_r of the request, Alg. 1 line 4. Taken before --forget-images thins D_f, or the images of
    # D_f that it leaves out would count as retained.
    others = np.setdiff1d(everyone, np.concatenate([support, forget]))
    if 0 < args.forget_images < len(forget):
        forget = rng.choice(forget, args.forget_images, replace=False)
    size, many = len(forget), args.val_images or len(split["val"])
    if args.preset == "code":
        size = many = PAIR
    for start in range(0, len(forget), size):
        own = forget[start : start + size]
        v = rng.choice(split["val"], min(many, len(split["val"])), replace=False)
        sets.append({"f": own, "v": v, "weight": len(own) / len(forget)})
        if "r" in sets_in(args):
            sets[-1]["r"] = rng.choice(others, min(args.retain_images, len(others)), replace=False)
    return sets


def auxiliary(f, theta_u: dict, sets: list[dict], data, original: dict, args) -> Tensor:
    """A of one request at theta_u, a scalar tensor. original: as original_outputs gives it."""
    total = 0.0
    for part in sets:
        L, mAP = {}, {}
        for name in sets_in(args):
            L[name], logits = mean_loss(name, f, theta_u, data, part[name], original, args)
            if name != "r":
                mAP[name] = score(logits, targets_of(data, part[name]))
        L["v0"], mAP["v0"] = original["v0"]  # of all of D_v
        if args.preset == "code":  # over the pair's own images
            targets = targets_of(data, part["v"])
            logits_0 = original["logits"][part["v"]].to(targets.device)
            L["v0"], mAP["v0"] = task_losses(logits_0, targets).mean(), score(logits_0, targets)
        total = total + part["weight"] * auxiliary_loss(L, mAP, args)
    return total


def mean_loss(name: str, f, theta_u: dict, data, indices, original: dict, args) -> tuple:
    """Mean of image_losses over set `name`, a scalar tensor, and the logits (n, K), detached.

    A depends on theta_u through these means alone. So --meta-batch-size images at a time run
    forward and backward at once, which bounds the memory, and the mean comes back as the linear
    function of theta_u that has its value and its gradient: no image is run twice.
    """
    leaf = {k: p.detach().requires_grad_() for k, p in theta_u.items()}
    constant = name == "v" and args.preset == "code"  # no gradient through L_task(D_v; theta_u)
    total, gradient, found = 0.0, (), []
    for start in range(0, len(indices), args.meta_batch_size):
        part = indices[start : start + args.meta_batch_size]
        with torch.set_grad_enabled(not constant):
            logits = f(leaf, raw_batch(data, part))[1]  # (B, K)
            logits_0, scrub = original["logits"][part].to(logits), args.aux_loss == "scrub"
            losses = image_losses(name, logits, targets_of(data, part), logits_0, scrub)
            mean = losses.sum() / len(indices)
        if not constant:
            own = torch.autograd.grad(mean, list(leaf.values()), materialize_grads=True)
            gradient = torch._foreach_add(gradient, own) if gradient else own
        total = total + mean.detach()
        found.append(logits.detach())
    if gradient:
        for p, g in zip(theta_u.values(), gradient, strict=True):
            total = total + (g * (p - p.detach())).sum()  # adds exactly 0, with gradient g
    return total, torch.cat(found)


def original_outputs(model, data, split, args) -> dict:
    """What depends on theta alone: logits (N, K) where A needs them, and loss and mAP of D_v."""
    needed = list(split["val"])
    if "r" in sets_in(args):
        needed += split["retain"] + split["forget"]
    logits = torch.zeros(len(data["targets"]), data["classes"])
    logits[needed] = predict(model, data, needed, args.amp)
    val, targets = logits[split["val"]], data["targets"][split["val"]]
    v0 = task_losses(val, targets).mean().to(data["device"]), score(val, targets)
    return {"logits": logits, "v0": v0}


# --------------------------------------------------------------------------------------------------
# Algorithm 1


def support_batch(data, train_ids, support) -> tuple:
    """S of the images `support`: images (N_s, 3, H, W), targets, rows of the identity table."""
    row = {identity: i for i, identity in enumerate(train_ids)}
    who = torch.tensor([row[int(i)] for i in data["identities"][support]], device=data["device"])
    return raw_batch(data, support), targets_of(data, support), who


def unlearn(h_phi, f, theta: dict, S: tuple, eta: float) -> dict:
    """METAUNLEARN_unlearning(S): one step from the Support set alone. Source: Alg. 1 lines 19-22.

    f: as model_function gives it. theta: {name: tensor}, which is not changed. S: as support_batch
    gives it. Returns theta_u, {name: tensor}.
    """
    h_phi.eval()
    theta = {k: p.detach().requires_grad_() for k, p in theta.items()}
    images, targets, who = S
    M = h_phi(*f(theta, images), targets, who)  # Alg. 1, line 20
    g = torch.autograd.grad(M, list(theta.values()), materialize_grads=True)
    g, steps = h_phi.direction(theta, g), h_phi.step_sizes(theta, eta)
    theta_u = inner_step(theta, g, steps)  # Alg. 1, line 21
    return {k: p.detach() for k, p in theta_u.items()}


def new_meta_loss(model, data, split, args, fisher=None) -> MetaLoss:
    torch.manual_seed(args.seed)
    code, multilabel = args.preset == "code", data["targets"].ndim == 2
    theta = updatable(model, code) if args.alpha_step else None
    shape = (data["classes"], model.width, len(split["train_ids"]))
    layers = dict(hidden=args.hidden, dropout=args.dropout, multilabel=multilabel, theta=theta)
    h_phi = MetaLoss(args.inputs.split(","), *shape, **layers)
    if not code:  # ours: the first update is exactly 0
        nn.init.zeros_(h_phi.mlp[-2].weight)
    h_phi.fisher, h_phi.damping = fisher, args.natural
    return h_phi.to(data["device"])


def fisher_of(model, data, split, args) -> dict | None:
    """F of the training data, from which --natural takes its step (baselines.curvature)."""
    if not args.natural:
        return None
    D = torch.tensor(sorted(split["retain"] + split["forget"]))
    say(f"--natural: curvature of {len(D):,} images")
    try:
        return baselines.curvature(model, data, D, args, args.seed, args.split_seed, 17)
    except ValueError as error:
        fail(f"--natural: {error}")


def request_gradient(h_phi, model, request, data, split, original, args, rng) -> tuple:
    """A and grad_phi A of one simulated request (support, forget). Source: Alg. 1 lines 9-15."""
    support, forget = request
    # f_S runs S, f all else: with --preset code S is never in bf16, and theta lacks two tensors.
    (f_S, theta), f = f_and_theta(model, args), model_function(model, args.amp)
    sets = request_sets(split, support, forget, args, rng)
    S = support_batch(data, split["train_ids"], support)

    def A(theta_u):
        return auxiliary(f, theta_u, sets, data, original, args)

    way = meta_gradient_double if args.hypergradient == "double" else meta_gradient
    return way(h_phi, f_S, A, theta, S, args.eta)


def meta_epoch(h_phi, optimizer, model, data, split, original, epoch: int, args) -> list[float]:
    """One pass over the training identities; returns A of each request of this process.

    Under torchrun the processes share the --requests-per-step requests of a step.
    """
    (rank, world), values = rank_and_world(), []
    n_s, epochs = args.meta_ids or args.ids, 1 if args.dry_run else args.meta_epochs
    requests = list(simulated_requests(data, split, n_s, args.seed, epoch))
    if args.dry_run:
        requests = requests[: 2 * world]
    steps = math.ceil(len(requests) / args.requests_per_step)
    for step, start in enumerate(range(0, len(requests), args.requests_per_step)):
        batch = range(start, min(start + args.requests_per_step, len(requests)))
        total = [torch.zeros_like(p) for p in h_phi.parameters()]
        for r in batch[rank::world]:
            torch.manual_seed(generator(args.seed, epoch, r).initial_seed())  # dropout in h_phi
            rng, request = np.random.default_rng([args.seed, epoch, r, 5]), requests[r]
            A, own = request_gradient(h_phi, model, request, data, split, original, args, rng)
            torch._foreach_add_(total, own)
            values.append(A)
        for p, t in zip(h_phi.parameters(), total, strict=True):
            if world > 1:
                torch.distributed.all_reduce(t)
            p.grad = t / len(batch)
        at = epoch * steps + (0 if args.preset == "code" else step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * at / (epochs * steps)))
        optimizer.step()  # Alg. 1, line 16
    return values


def warn_of_vanishing_weights(model, data, split, args):
    """Say so where D_f is memorised: Eq. (6) then multiplies its loss in A by next to nothing."""
    D_f = split["forget"] or split["retain"]  # in learn_loss D_f is still empty
    logits = predict(model, data, D_f, args.amp)
    error = 1 - score(logits, data["targets"][D_f])
    if args.accuracy_weight and args.aux_loss != "scrub" and error < 0.05:
        what = f"1 - mAP of D_f is {error:.3f}, so Eq. (6) all but removes its loss from A"
        say(f"warning: {what}; try --no-accuracy-weight")


def meta_train(model, data, split, args, fisher=None, path=None) -> tuple[MetaLoss, float]:
    """Alg. 1 lines 8-17; theta never changes. Returns h_phi and the seconds that it took.

    fisher: as fisher_of gives it. path: where phi is saved, and beside it once a minute, after an
    epoch, what --resume needs. Raises SystemExit(2) when phi is no longer finite.
    """
    device, rank = data["device"], rank_and_world()[0]
    begin = saved_at = common.clock(device)
    h_phi = new_meta_loss(model, data, split, args, fisher)
    content = meta_loss_content(data, split, args)
    mlp = [p for name, p in h_phi.named_parameters() if not name.startswith("log_step")]
    groups = [{"params": mlp, "peak": args.alpha}]
    if h_phi.log_step is not None:
        groups.append({"params": list(h_phi.log_step), "peak": args.alpha_step})
    optimizer = torch.optim.AdamW(groups, lr=args.alpha, weight_decay=0.0, amsgrad=True)
    partial, first = path and path.with_suffix(".partial.pt"), 0
    unfinished = content | {"weights": common.digest_of(model)}
    if partial and args.resume and partial.is_file():
        saved = common.load_checkpoint(partial, "partial meta-loss", **unfinished)
        with common.reading(partial):
            h_phi.load_state_dict(saved["phi"])
            optimizer.load_state_dict(saved["optimizer"])
            first, begin = saved["epoch"] + 1, begin - saved["seconds"]
        say(f"meta-loss: resuming after epoch {first}")
    warn_of_vanishing_weights(model, data, split, args)
    original = original_outputs(model, data, split, args)
    epochs = 1 if args.dry_run else args.meta_epochs
    for epoch in range(first, epochs):
        epoch_began, A = common.clock(device), None
        with contextlib.suppress(FloatingPointError):  # of outputs that are not finite
            A = meta_epoch(h_phi, optimizer, model, data, split, original, epoch, args)
        if A is None or not all(torch.isfinite(p).all() for p in h_phi.parameters()):
            advice = "lower --alpha, --alpha-step or --eta"
            fail(f"the meta-loss is not finite in epoch {epoch + 1}; {advice}")
        now = common.clock(device)
        took = now - epoch_began
        say(
            f"meta-loss epoch {epoch + 1}/{epochs}: {len(A)} requests, A {np.mean(A):.5f}, "
            f"{took:.1f} s, {(epochs - epoch - 1) * took:.0f} s left"
        )
        due = epoch + 1 < epochs and now - saved_at >= common.PARTIAL_EVERY
        if partial and rank == 0 and due:
            state = dict(phi=h_phi.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch)
            state |= dict(seconds=now - begin, **unfinished)
            common.save_checkpoint(partial, kind="partial meta-loss", **state)
            saved_at = now
    seconds = common.clock(device) - begin
    if path and rank == 0:
        state = dict(phi=h_phi.state_dict(), model=model.state_dict(), seconds=seconds)
        state |= {"fisher": fisher} if fisher else {}
        common.save_checkpoint(path, kind="meta-loss", **state, **content)
        partial.unlink(missing_ok=True)
    common.wait_for_all()
    return h_phi.eval(), seconds


def simulated_unlearning(h_phi, model, data, split, args):
    """A function that gives the model unlearned of a simulated request, see evaluate.judging."""
    f, theta = f_and_theta(model, args)

    def unlearned(problem):
        S = support_batch(data, split["train_ids"], problem["support"])
        return with_parameters(model, unlearn(h_phi, f, theta, S, args.eta))

    return unlearned


def search(model, data, split, args, fisher=None, partial=None) -> tuple[dict, dict]:
    """Choose the flags args.search by evaluate.search, as those of every baseline are chosen."""
    problems = evaluate.simulated_problems(model, data, split, args)
    judge = evaluate.judging(model, problems, data, split, None, args)

    def distance(values) -> float:
        own = argparse.Namespace(**vars(args) | values | {"resume": False})
        h_phi, _ = meta_train(model, data, split, own, fisher)
        unlearned = simulated_unlearning(h_phi, model, data, split, own)
        return judge(unlearned)

    start = {flag: getattr(args, flag) for flag in args.search}
    nothing = judge(lambda problem: model)
    return evaluate.search(start, distance, nothing, args, partial)


# --------------------------------------------------------------------------------------------------
# Somebody's own model, with no file written


def learn_loss(model, D, identities, D_v, head=None, **flags) -> MetaLoss:
    """h_phi for somebody's own model, learned from its training set D of several people.

    model: images -> logits (B, K), see common.Own. D, D_v: see data.of_tensors; identities (N,):
    who is in each image of D, whole numbers. flags: ids (people in a request), seed, preset and
    others of METAUNLEARN's on the command line, eta=0.1; h_phi does not see who it is. Raises
    TypeError for another flag, ValueError where identities cannot be those of D's images.
    """
    args = parse_args(["--preset", flags.pop("preset", "paper"), "--dataset", "own/pair"])
    wrong = set(flags) - {*META_FLAGS, "ids", "seed"}
    if wrong:
        raise TypeError(f"metaunlearn has no {wrong}")
    args = argparse.Namespace(**vars(args) | flags | {"amp": False})
    args.inputs = ",".join(name for name in args.inputs.split(",") if name != "ids")
    if not isinstance(getattr(D, "sampler", SequentialSampler([])), SequentialSampler):
        raise ValueError("D comes in another order than identities; give the Dataset itself")
    own = common.Own(model, head)
    data, split = of_tensors(own, {"retain": D, "val": D_v})
    who = np.asarray(identities)
    n = len(split["retain"])
    if who.shape != (n,) or len(np.unique(who)) < 2:
        raise ValueError(
            f"identities: one number for each of D's {n} images, of two people or more"
        )
    data["identities"] = np.concatenate([who, np.full(len(split["val"]), who.min() - 1)])
    split |= {"forget": [], "support": [], "train_ids": np.unique(who).tolist()}
    fisher = fisher_of(own, data, split, args)
    h_phi, _ = meta_train(own, data | {"target_names": range(data["classes"])}, split, args, fisher)
    h_phi.eta, h_phi.code = args.eta, args.preset == "code"
    return h_phi


def forget(model, h_phi: MetaLoss, S, head=None) -> nn.Module:
    """A copy of somebody's own model that has unlearned the people of S, one picture each.

    h_phi: as learn_loss gives it for this model. S: (images, targets), see data.of_tensors.
    """
    own = common.Own(model, head)
    data, split = of_tensors(own, {"support": S})
    who = torch.zeros(len(split["support"]), dtype=torch.long, device=data["device"])
    S = raw_batch(data, split["support"]), targets_of(data, split["support"]), who
    theta = updatable(own, h_phi.code)
    theta_u = unlearn(h_phi, model_function(own), theta, S, h_phi.eta)
    return with_parameters(own, theta_u).net


# --------------------------------------------------------------------------------------------------
# Files: the meta-loss, and unlearning later from pictures and labels alone

# The flags that make one meta-loss another; saved with it, and checked when it is loaded.
META_FLAGS = ("preset", "inputs", "hidden", "dropout", "eta", "alpha", "alpha_step", "meta_epochs")
META_FLAGS += ("meta_ids", "requests_per_step", "aux_loss", "accuracy_weight", "val_images")
META_FLAGS += ("retain_weight", "retain_images", "natural", "forget_images")
SUPPORT_FLAGS = ("meta_loss", "support", "save", "overwrite", "device", "amp")


def meta_loss_content(data, split, args) -> dict:
    """What a meta-loss file says of itself: enough to unlearn with no other file at hand."""
    content = dict(which="original", architecture=args.model, image_size=args.image_size)
    content |= dict(target_names=[str(name) for name in data["target_names"]])
    content |= dict(split=split["hash"], train_ids=split["train_ids"], seed=args.seed)
    content |= dict(multilabel=data["targets"].ndim == 2)
    return content | {flag: getattr(args, flag) for flag in META_FLAGS}


def restore_meta_loss(saved: dict, path, model, data, split, args) -> tuple[MetaLoss, float]:
    """h_phi of a file that was made for these very weights, and the seconds that it took."""
    with common.reading(path):
        h_phi = new_meta_loss(model, data, split, args, saved["fisher"] if args.natural else None)
        h_phi.load_state_dict(saved["phi"])
        theta = updatable(model)
        h_phi.direction(theta, theta.values())  # fails where F is another model's
        if any(not torch.equal(t.cpu(), saved["model"][k]) for k, t in model.state_dict().items()):
            original = checkpoint_folder(args) / f"original-seed{args.seed}.pt"
            fail(f"{path} was learned for other weights than {original}; delete one of them")
        say(f"meta-loss: loaded {path}")
        return h_phi.eval(), float(saved["seconds"])


def unlearn_from_files(saved: dict, args, device):
    """--meta-loss FILE --support DIR: unlearning with no data set, no split, no training code."""
    target = args.save or args.meta_loss.removesuffix(".meta.pt") + "-unlearned.pt"
    if not args.save and not args.overwrite and pathlib.Path(target).exists():
        fail(f"{target} is there, of an earlier request; add --save FILE, or --overwrite")
    common.check_writable(file=target)
    model, about = common.load_model(args.meta_loss)
    names, size = about["target_names"], about["image_size"]
    with common.reading(args.meta_loss):
        row_of = {identity: i for i, identity in enumerate(saved["train_ids"])}
        multilabel = bool(saved["multilabel"])
    images, targets, people = read_pictures(args.support, names, multilabel, size)
    data = {"targets": targets, "classes": len(names), "device": device}
    # The file itself says, as a split would, who was trained on.
    h_phi, _ = restore_meta_loss(saved, args.meta_loss, model.to(device), data, saved, args)
    strangers = [identity for identity in people if identity not in row_of]
    if strangers and "ids" in h_phi.inputs:
        fail(
            f"identity {strangers[0]} was not in training, and this meta-loss looks identities up; "
            "meta-train with --inputs logits,features,targets"
        )
    who = torch.tensor([row_of.get(identity, 0) for identity in people])
    S = tuple(t.to(device) for t in (images, targets, who))
    changed = with_parameters(model, unlearn(h_phi, *f_and_theta(model, args), S, args.eta))
    with torch.no_grad():
        before, after = (task_losses(m(S[0])[1], S[1]).mean().item() for m in (model, changed))
    content = about | {"which": "unlearned", "model": changed.state_dict()}
    common.save_checkpoint(target, kind="model", **content)
    say(
        f"people unlearned: {len(set(people))}; task loss on their pictures {before:.3f} -> "
        f"{after:.3f}; model written to {target}"
    )


# --------------------------------------------------------------------------------------------------
# One run


def unlearn_and_report(name: str, flags: dict, data, split, args) -> dict | None:
    """Train the two models and h_phi, or load them; unlearn the real S; measure, and report."""
    own = checkpoint_folder(args) / f"{name}-seed{args.seed}.meta.pt"
    path = pathlib.Path(args.meta_loss or own)
    saved, more, there = None, {}, path.is_file() and not args.overwrite
    # A search may end at other flags than those of a meta-loss that is there.
    if (args.meta_loss or there) and not args.search:  # checked before anything is trained
        saved = common.load_checkpoint(path, "meta-loss", **meta_loss_content(data, split, args))
    model, gold, seconds = train_both(data, split, args)
    if saved:
        h_phi, seconds["meta_train"] = restore_meta_loss(saved, path, model, data, split, args)
    else:
        begin = common.clock(data["device"])
        fisher = fisher_of(model, data, split, args)
        seconds |= {"curvature": common.clock(data["device"]) - begin} if fisher else {}
        if args.search:
            tries = evaluate.tries_path(name, args, split)
            chosen, more = search(model, data, split, args, fisher, tries)
            vars(args).update(chosen)
        h_phi, seconds["meta_train"] = meta_train(model, data, split, args, fisher, path)
    f, theta = f_and_theta(model, args)
    S = support_batch(data, split["train_ids"], split["support"])
    more["passes"] = len(split["support"]) / (len(split["retain"]) + len(split["forget"]))
    began = common.clock(data["device"])
    theta_u = unlearn(h_phi, f, theta, S, args.eta)
    done = common.clock(data["device"])
    seconds["unlearn"] = done - began

    # The bar that a learned loss must clear: one gradient-ascent step on the same pictures.
    ascended, ascent_step, problems = baselines.ascent_step(model, data, split, args)
    unlearned = simulated_unlearning(h_phi, model, data, split, args)
    simulated = evaluate.simulated_tow(unlearned, problems, data, args.amp)
    say(f"simulated ToW of METAUNLEARN: {100 * simulated:.1f}")
    models = {"original": model, "retrained": gold} | ({"ascent": ascended} if ascended else {})
    models["unlearned"] = with_parameters(model, theta_u)
    rows = evaluate.measure_all(models, data, split, args)
    seconds["evaluate"] = common.clock(data["device"]) - done
    reads = ["retain", "forget", "val", *(["held_out"] if args.held_out else [])]
    access = {"meta-training": reads}
    access |= {"unlearning": ["support"], "ascent": ["support"], "choosing the ascent step": reads}
    access |= {"choosing flags": reads} if args.search else {}
    more |= dict(simulated_tow=simulated, ascent_step=ascent_step)
    say(f"meta-loss: {path}")
    if rank_and_world()[0] > 0:  # the first process writes
        return None
    about = name, models["unlearned"], rows, seconds, access, flags, data, split, args
    return evaluate.report(*about, **more)


# --------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser, world = common.Parser(description=__doc__), rank_and_world()[1]
    add = parser.add_argument_group("METAUNLEARN").add_argument
    # fmt: off
    add("--preset", choices=sorted(_PRESETS), default="paper",
        help="paper: as written; code: its authors' code; selective: ours")
    add("--eta", type=common.positive, default=0.1, help="inner step, Eq. (4); authors' code: 0.1")
    add("--alpha", type=common.positive, default=1e-3,
        help="outer step, Alg. 1 line 16; authors' code: 1e-4")
    add("--meta-epochs", type=common.count, default=3,
        help="passes over the training identities; authors' code: 3")
    add("--meta-ids", type=common.count, default=None,
        help="N_S in simulated requests, None: --ids; paper: Table 7")
    add("--inputs", type=input_names, default="logits,features,targets,ids",
        help="what h_phi sees, of logits, features, targets, ids, losses; paper: Table 4")
    add("--aux-loss", choices=("both", "first", "second", "scrub"), default="both",
        help="terms of Eq. (8); paper: Table 3")
    add("--no-accuracy-weight", action="store_false", dest="accuracy_weight",
        help="no weight 1 - mAP on the losses, Eq. (6); paper: Table 3")
    add("--hidden", type=common.count, default=128, help="width of h_phi; authors' code: 512")
    add("--dropout", type=common.between(0, 0.99), default=0.0, help="in h_phi; authors' code: 0.5")
    add("--val-images", type=common.whole, default=128,
        help="random images of D_v in A, 0: all, as the paper writes; --preset code: 64")
    add("--forget-images", type=common.whole, default=0,
        help="random images of a request's D_f in A, 0: all, as the paper writes")
    add("--retain-weight", type=common.not_negative, default=0.0,
        help="ours: weight in A of KL(theta, theta_u) on retained images; paper: 0 (App. C)")
    add("--retain-images", type=common.count, default=128,
        help="random retained images in A, where A has them")
    add("--alpha-step", type=common.not_negative, default=0.0,
        help="ours: outer step of a learned step size for each parameter; 0: eta for all")
    add("--natural", type=common.positive, metavar="DAMPING",
        help="ours: the step (I + F / DAMPING)^-1 times the gradient, F the Fisher information of "
        "the training data, which is stored with phi")
    add("--requests-per-step", type=common.count, default=world,
        help="simulated requests averaged in one step, left out: the number of processes; "
        "authors' code: 1")
    add("--search", action="store_true",
        help="first choose eta, alpha and meta-epochs, those not given, on simulated requests")
    add("--hypergradient", choices=("forward", "double"), default="forward",
        help="forward: exact, with little memory; double: the textbook's double backward")
    add("--meta-batch-size", type=common.count, default=256,
        help="images whose activations are held at a time; changes rounding alone")
    add("--check-gradient", action="store_true",
        help="compare the meta-gradient both ways, with finite differences, in bf16; then stop")
    add("--meta-loss", metavar="FILE", help="use this saved meta-loss and its flags, not a new one")
    add("--support", metavar="DIR",
        help="with --meta-loss: unlearn the people in DIR (pictures, labels.csv); needs no data")
    add("--export-support", metavar="DIR", help="write the Support set there, for --support")
    # fmt: on
    evaluate.add_result_arguments(parser)
    common.add_shared_arguments(parser)
    add_recipe_arguments(parser)
    args = common.parse_with_presets(parser, PRESETS, argv)
    if args.forget != "identities":
        what = f"--forget {args.forget} of --dataset {args.dataset}"
        fail(f"METAUNLEARN forgets identities, not {what}; see ltu.py")
    if args.requests_per_step % world:
        fail(f"--requests-per-step {args.requests_per_step} is no multiple of {world} processes")
    if args.support and not args.meta_loss:
        fail("--support needs --meta-loss FILE, the meta-loss to unlearn with")
    if args.aux_loss == "scrub" and "--retain-weight" in args.given:
        fail("--retain-weight is not in --aux-loss scrub, which has KL on retained images itself")
    if args.search and args.meta_loss:
        fail("--search learns a new meta-loss, --meta-loss uses an old one; drop one of them")
    moved = [k for k in ("eta", "alpha", "meta_epochs") if common.flag_name(k) not in args.given]
    if args.search and not moved:
        fail("--search has nothing to choose: --eta, --alpha and --meta-epochs are given")
    args.search = moved if args.search else []
    return args


def input_names(text: str) -> str:
    """The argparse type of --inputs."""
    names, of_theta = set(text.split(",")), {"logits", "features", "losses"}
    if not names <= of_theta | {"targets", "ids"} or not names & of_theta:
        what = "at least one of logits, features, losses; targets and ids may be added"
        raise argparse.ArgumentTypeError(f"{text}: name {what}")
    return text


def main(argv=None):
    args = parse_args(argv)
    typed = {word.replace("--no-", "--") for word in args.given if word.startswith("--")}
    device = common.choose_device(args)
    if args.check_gradient and device.type == "mps":
        device = torch.device("cpu")  # MPS has no float64
    if args.meta_loss:
        saved = common.load_checkpoint(args.meta_loss, "meta-loss")
        with common.reading(args.meta_loss):
            made_with = {flag: saved[flag] for flag in META_FLAGS} | {"eta": float(saved["eta"])}
            for flag, value in made_with.items():  # a tensor, of a damaged file, compares badly
                if common.flag_name(flag) in typed and value != getattr(args, flag):
                    fail(f"{args.meta_loss} was made with {common.flag_name(flag)} {value}")
        vars(args).update(made_with)
    if args.support:
        known = {common.flag_name(flag) for flag in (*META_FLAGS, *SUPPORT_FLAGS)}
        for flag in sorted(typed - known):
            fail(f"{flag} does nothing beside --support; leave it out")
        return unlearn_from_files(saved, args, device)
    folders = [args.checkpoint_dir, args.out, args.export_support]
    common.check_writable(*filter(None, folders), file=args.save)
    flags, label = evaluate.flags_of(args), f"METAUNLEARN {args.preset}"
    name = evaluate.run_name(f"metaunlearn-{args.preset}", args)
    common.start_processes(device)
    data, split = open_data(args, device)
    if args.export_support and rank_and_world()[0] == 0:
        write_pictures(data, split["support"], args.export_support)
    if args.check_gradient:
        # It stands with the tests, which use its finite differences too.
        sys.path.insert(0, str(pathlib.Path(__file__).parent / "tests"))
        from check_gradient import check_gradient

        return check_gradient(train("original", data, split, args)[0], data, split, args)
    result = evaluate.earlier_result(name, args, flags, split)
    result = result or unlearn_and_report(name, flags, data, split, args)
    if result:
        evaluate.show({label: result})
    return result


if __name__ == "__main__":
    common.guarded(main)
