"""The baselines of both papers, each as its own paper has it: what SSD, SCRUB or SalUn really do.

Usage:
    python baselines.py                                     # all of them, scikit-learn's digits
    python baselines.py --method salun --rho 0.3
    python baselines.py --dataset toyfaces --ids 10         # forget identities
    python baselines.py --method scrub --search             # first choose its flags on D_v
    python baselines.py --method retrain                    # a second gold model, as a method

Each method is a function of (student, data, have, args, rng). student is a copy of the model in
eval mode and is changed in place. `have` holds the image indices that this method may touch
(METHODS) and, as `stored`, what it keeps between the tries of a search. There are two protocols:
random samples (cross entropy) and identities (binary cross entropy of each attribute). With
identities SSD, PGU and JiT, as in METAUNLEARN's Table 1, and, by our choice, GA and Influence read
the Support set in place of D_f; --all-pictures gives them D_f. Multi-label versions have a
Bernoulli for each attribute, where published code takes a softmax over attributes.

Symbols: theta model, D_f forget set (or Support S), D_r retain set (its share rho), D training set,
p = |D_f| / |D|.

--search tries up to 12 settings (--tries) of each method, by the same rule (evaluate.search).
"""

import argparse
import contextlib
import copy
import math
import pathlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import evaluate
from common import autocast, build_model, clock, fail, flag_name, generator, say, task_losses
from data import (
    augmented,
    batches,
    of_tensors,
    predict,
    random_labels,
    raw_batch,
    reachable,
    targets_of,
)
from train import PRESETS as TRAINING_PRESETS
from train import add_recipe_arguments, checkpoint_folder, open_data, train, train_both

# Constants of the papers or their code, which no result of ours gave a reason to change; those in
# the last line are ours.
DECAY = 5e-4  # weight decay of SGD while unlearning; SalUn
FISHER_CAP = 1e3  # Fisher: largest 1 / F; its code
SCRUB_ALPHA, SCRUB_GAMMA = 0.001, 0.99  # SCRUB: weights of KL and of the task loss on D_r; its code
JIT_NOISES = 25  # JiT: N, noisy copies of each image; paper
EXACT_CLASSES, DRAWS = 20, 8  # labels of the Fisher information: all of them, or so many draws

# --------------------------------------------------------------------------------------------------
# What the loops share


def logits_of(model, images, args) -> Tensor:
    with autocast(images.device, args.amp):
        return model(images)[1].float()


def loss_of(model, data, batch, args, rng=None, labels=None) -> Tensor:
    """Mean L_task of a batch; rng: augment its images; labels: take these, not the true ones."""
    images = raw_batch(data, batch) if rng is None else augmented(data, batch, args, rng)
    labels = targets_of(data, batch) if labels is None else labels
    return task_losses(logits_of(model, images, args), labels).mean()


def distillation(teacher: Tensor, student: Tensor, data, args) -> Tensor:
    """T^2 KL(teacher || student) of logits (B, K), T = --temperature, averaged over the batch."""
    multilabel = data["targets"].ndim == 2
    return common.kl_divergence(teacher, student, multilabel, args.temperature).mean()


def new_optimizer(student, args):
    """SGD with momentum 0.9 and weight decay, or Adam."""
    if args.unlearn_optimizer == "adam":
        return torch.optim.Adam(student.parameters(), args.unlearn_lr)
    return torch.optim.SGD(student.parameters(), args.unlearn_lr, momentum=0.9, weight_decay=DECAY)


def descend(optimizer, loss: Tensor):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def epochs(args) -> range:
    return range(1 if args.dry_run else args.unlearn_epochs)


def stored(have, key, compute):
    """A statistic of the training data, computed once: --search reads D once, not once a try."""
    kept = have.setdefault("stored", {})
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def kept_data(have, args) -> Tensor:
    """The images of D to be kept: D without D_f; with identities all of D.

    METAUNLEARN's S was never in D. With --all-pictures D_f is, and stays in these statistics, which
    were stored before anybody asked to be forgotten.
    """
    D = have["statistics"]
    return D if args.forget == "identities" else D[~torch.isin(D, have["forget"])]


def wide(t: Tensor) -> Tensor:
    """float64, for long sums; on the CPU where the device has none (MPS)."""
    return t.double() if t.device.type != "mps" else t.cpu().double()


# --------------------------------------------------------------------------------------------------
# Methods


def ft(student, data, have, args, rng):
    """FT: go on training on D_r; D_f is never read.

    Source: LTU Sec. 4.1 (3); the recipe is SalUn's: SGD with momentum, train mode.
    """
    optimizer = new_optimizer(student, args)
    student.train()
    for _ in epochs(args):
        for batch in batches(have["retain"], args.unlearn_batch_size, rng):
            descend(optimizer, loss_of(student, data, batch, args, rng))


def randl(student, data, have, args, rng, mask=None):
    """RandL: each epoch D_f with random labels, then D_r with true ones.

    Source: SalUn's code for CIFAR-10, whose figures LTU quotes. Labels are drawn anew for each
    batch and may be the true one; LTU's text relabels once and then mixes both sets. Ending an
    epoch on D_r is what keeps RA. mask: SalUn's.
    """
    optimizer = new_optimizer(student, args)
    theta_o = [p.detach().clone() for p in student.parameters()] if mask else None
    student.train()
    for _ in epochs(args):
        for name in ("forget", "retain"):
            for batch in batches(have[name], args.unlearn_batch_size, rng):
                labels = None
                if name == "forget":
                    labels = random_labels(data, have["retain"], len(batch), rng)
                descend(optimizer, loss_of(student, data, batch, args, rng, labels))
                if mask:
                    with torch.no_grad():
                        for p, old, m in zip(student.parameters(), theta_o, mask, strict=True):
                            torch.where(m, p, old, out=p)  # SalUn Eq. (4)


def ga(student, data, have, args, rng):
    """GA: gradient ascent on D_f; with the Support set and one step, METAUNLEARN's bar.

    Source: SalUn's GA. Ours, against its code: batch norm in eval mode, because
    forget batches would overwrite its running statistics in train mode; plain SGD, because weight
    decay would shrink the model beside ascending; images as they are, not augmented. The loss has
    no upper bound: only a narrow band of lr works.
    """
    optimizer = torch.optim.SGD(student.parameters(), args.unlearn_lr)
    for _ in epochs(args):
        for batch in batches(have["forget"], args.unlearn_batch_size, rng):
            descend(optimizer, -loss_of(student, data, batch, args))


def amnesiac(student, data, have, args, rng):
    """Amnesiac: D_f is relabelled once, never with the true label; train on, D_r and D_f mixed.

    Source: Graves et al. 2021's "unlearning", the version that SSD, Bad Teacher and SFR-on run
    under this name. (The other version of that paper subtracts the training updates whose batch
    held an image of D_f; with 10 % forgotten that is every batch, so the model returns to its
    initial weights.) Attributes: the label vector of a random image, by chance the same.
    """
    forget, union = have["forget"], torch.cat([have["forget"], have["retain"]])
    labels = data["targets"].clone()
    if labels.ndim == 1:
        shift = torch.randint(1, data["classes"], (len(forget),), generator=rng)
        labels[forget] = (labels[forget] + shift) % data["classes"]
    else:
        labels[forget] = random_labels(data, have["retain"], len(forget), rng).cpu()
    optimizer = new_optimizer(student, args)
    student.train()
    for _ in epochs(args):
        for batch in batches(union, args.unlearn_batch_size, rng):
            own = labels[batch].to(data["device"])
            descend(optimizer, loss_of(student, data, batch, args, rng, own))


def fisher(student, data, have, args, rng):
    """Fisher forgetting: noise on each weight, the less D_r needs it the more.

    Source: Golatkar et al. 2020, Eq. (8), and their code. F = mean over D_r of E_{y ~ p(y|x)} (d
    log p(y|x) / d theta)^2 (see label_gradients), in float64. The noise is N(0, min(alpha / F,
    alpha FISHER_CAP)); the paper's goes with F^(-1/2), its code's with 1 / F: ours is the code's,
    per weight (the code averages over a filter and has special factors for last layer, norms and
    biases). Where a model fits its data F is about 0: the cap sets the noise then.
    """
    key = ("fisher", *have["retain"].tolist())  # a simulated request has a D_r of its own
    labels = generator(args.seed, args.split_seed, 15)
    D_r = have["retain"]
    F_diagonal = stored(have, key, lambda: fisher_diagonal(student, data, D_r, labels))
    with torch.no_grad():
        for name, p in student.named_parameters():
            inverse = (1 / (F_diagonal[name] + 1e-8)).clamp(max=FISHER_CAP)
            variance = args.fisher_alpha * inverse  # Fisher Eq. (8), with 1 / F as above
            noise = torch.randn(p.shape, generator=rng).to(p)
            p += variance.sqrt().to(p) * noise


def fisher_diagonal(model, data, indices, rng) -> dict:
    """Diagonal of the Fisher information of the model's own labels, {name: float64 tensor}."""
    total = {k: wide(torch.zeros_like(p)) for k, p in model.named_parameters()}
    for g in label_gradients(model, data, indices, rng):
        for k in total:
            total[k] += wide(g[k].pow(2).sum(0))
    return {k: t / len(indices) for k, t in total.items()}


def ssd(student, data, have, args, rng):
    """SSD: dampen weights that matter to D_f much more than to D.

    Source: Foster et al. 2024, Eq. (4), (5) and their code. Importance is the mean over batches of
    the squared gradient of the batch's mean loss, so it depends on the batch size (2.1 at 20, 0.1
    at 400, measured): both sets use the same one here, the largest up to --unlearn-batch-size into
    which D_f falls without a smaller last batch, and D is read as D \\ D_f, then D_f, never mixed.
    So I_D = p I_f + (1 - p) I_r, and nothing can be selected once alpha p >= 1. Identities: I_D is
    a statistic that was stored before the request, and I_f comes from S, which is no part of D
    (with --all-pictures from D_f, which is).
    """
    n, D = len(have["forget"]), have["statistics"]
    size = n / math.ceil(n / args.unlearn_batch_size)
    inside = torch.isin(D, have["forget"]) & (args.forget != "identities")
    I_f = importance(student, data, [have["forget"]], size, args)
    parts, key = [D[~inside], D[inside]], ("importance", size)
    I_D = stored(have, key, lambda: importance(student, data, parts, size, args))
    p = inside.sum().item() / len(D)
    if args.ssd_alpha * p >= 1:
        say(
            f"ssd: alpha p = {args.ssd_alpha * p:.2f} >= 1, which can select nothing; "
            f"try --ssd-alpha below {1 / p:.2f}"
        )
    chosen = 0
    with torch.no_grad():
        for theta, f, d in zip(student.parameters(), I_f, I_D, strict=True):
            selected = f > args.ssd_alpha * d  # SSD Eq. (4)
            dampening = (args.ssd_lambda * d / f).clamp(max=1)  # SSD Eq. (5)
            theta.copy_(torch.where(selected, theta * dampening, theta))
            chosen += selected.sum().item()
    share = chosen / sum(t.numel() for t in student.parameters())
    say(f"ssd: {100 * share:.3f} % of the weights were selected")


def gradients_of(loss: Tensor, model) -> tuple:
    """The loss's gradient in each parameter; 0 in one that the model does not use."""
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


def importance(model, data, parts, size: float, args) -> list[Tensor]:
    """Mean over batches of about `size` images, part by part, of the loss's squared gradient.

    Every image counts once: a part falls into batches that differ by one image at most.
    """
    total, images = [torch.zeros_like(p) for p in model.parameters()], sum(map(len, parts))
    for part in parts:
        for batch in part.tensor_split(max(1, round(len(part) / size))) if len(part) else ():
            loss = loss_of(model, data, batch, args)
            gradient = gradients_of(loss, model)
            for t, g in zip(total, gradient, strict=True):
                t += g**2 * len(batch) / images
    return total


def badt(student, data, have, args, rng):
    """Bad Teacher: distil an untrained model on D_f and the original on D_r.

    Source: Chundawat et al. 2023, Eq. (1), (2). The bad teacher is a fresh model in eval mode. Mean
    over images (published code also divides by the number of classes), all of D_r at hand
    (published: a random 30 %; see --rho), times T^2, which is 1 at the published T.
    """
    good = copy.deepcopy(student)
    seed = 3 * args.seed + 2
    if isinstance(student, common.Own):
        bad = student.untrained(seed)
    else:
        bad = build_model(args.model, data["classes"], args.image_size, seed=seed)
    bad = bad.to(data["device"]).eval()
    forget, union = have["forget"], torch.cat([have["forget"], have["retain"]])
    optimizer = new_optimizer(student, args)
    student.train()
    for _ in epochs(args):
        for batch in batches(union, args.unlearn_batch_size, rng):
            x = augmented(data, batch, args, rng)
            to_forget = torch.isin(batch, forget).to(data["device"])
            teacher = torch.empty(len(x), data["classes"], device=data["device"])
            with torch.no_grad():
                for net, own in ((bad, to_forget), (good, ~to_forget)):  # Bad Teacher Eq. (2)
                    if own.any():  # not every model takes an empty batch
                        teacher[own] = logits_of(net, x[own], args)
            descend(optimizer, distillation(teacher, logits_of(student, x, args), data, args))


def salun(student, data, have, args, rng):
    """SalUn: RandL on those weights alone to which D_f's loss is most sensitive.

    Source: Fan et al. 2024, Eq. (3), (4). Mask: the --mask-share of all weights, ranked globally,
    with the largest |gradient of D_f's loss|, summed over augmented batches as in their code.
    Masking gradients is not enough: momentum and weight decay still move "frozen" weights (fixed
    upstream in 2026, after all published figures). Ours puts them back after each step.
    """
    total = [torch.zeros_like(p) for p in student.parameters()]
    for batch in have["forget"].split(args.unlearn_batch_size):
        loss = loss_of(student, data, batch, args, rng)
        torch._foreach_add_(total, gradients_of(loss, student))
    size = torch.cat([g.abs().flatten() for g in total])
    flat = torch.zeros(len(size), dtype=torch.bool, device=size.device)
    flat[size.topk(round(args.mask_share * len(size)), sorted=False).indices] = True
    parts = flat.split([g.numel() for g in total])
    mask = [m.view_as(g) for m, g in zip(parts, total, strict=True)]  # SalUn Eq. (3)
    randl(student, data, have, args, rng, mask)


def scrub(student, data, have, args, rng):
    """SCRUB: away from the teacher on D_f, towards it on D_r.

    Source: Kurmanji et al. 2023, Eq. (3), Alg. 1, and their code. Each of the first --ascent-epochs
    epochs: D_f once, maximising KL(teacher || student); every epoch: D_r once, minimising
    SCRUB_ALPHA KL + SCRUB_GAMMA L_task. Maximising has no bound, so its number of steps counts: an
    epoch has |D_f| / --unlearn-batch-size, with gradients clipped to norm 1 (METAUNLEARN's code).
    No decay of the step (published: 0.1 after 3, 5, 9).
    """
    teacher, optimizer = copy.deepcopy(student), new_optimizer(student, args)
    student.train()
    for epoch in epochs(args):
        if epoch < args.ascent_epochs:
            for batch in batches(have["forget"], args.unlearn_batch_size, rng):
                x = augmented(data, batch, args, rng)
                with torch.no_grad():
                    wanted = logits_of(teacher, x, args)
                optimizer.zero_grad(set_to_none=True)
                near = distillation(wanted, logits_of(student, x, args), data, args)
                (-near).backward()  # SCRUB Eq. (3), the part of D_f
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
        for batch in batches(have["retain"], args.unlearn_batch_size, rng):
            x = augmented(data, batch, args, rng)
            with torch.no_grad():
                wanted = logits_of(teacher, x, args)
            logits = logits_of(student, x, args)
            loss = SCRUB_GAMMA * task_losses(logits, targets_of(data, batch)).mean()
            loss = SCRUB_ALPHA * distillation(wanted, logits, data, args) + loss
            descend(optimizer, loss)  # SCRUB Eq. (3), the part of D_r


def pgu(student, data, have, args, rng):
    """PGU: forget along directions that D_r's activations do not span.

    Source: Hoang et al. 2024, Eq. (5)-(8), and their code. Of each convolution's and linear layer's
    inputs (patches) the Gram matrix over the data to keep gives the core space U, the fewest
    leading directions whose singular values reach the share pgu_gamma; weights move by g - g U U^T
    alone, norms and biases not at all. The Gram matrix is that of D \\ D_f (see kept_data), so
    positive by construction (published: a difference of two augmentations, which is not). The step
    falls along a cosine, with no stopping by validation. Patches have the layer's own stride
    (published: 1).
    """
    kept = kept_data(have, args)
    U = core_spaces(stored(have, "spectra", lambda: spectra(student, data, kept)), args.pgu_gamma)
    weights = {name: module.weight for name, module in student.named_modules() if name in U}
    for epoch in epochs(args):
        for batch in batches(have["forget"], args.unlearn_batch_size, rng):
            logits = logits_of(student, raw_batch(data, batch), args)
            loss = reversed_loss(logits, targets_of(data, batch))
            g = torch.autograd.grad(loss, list(weights.values()))
            lr = args.unlearn_lr * 0.5 * (1 + math.cos(math.pi * epoch / len(epochs(args))))
            with torch.no_grad():
                for (name, w), d in zip(weights.items(), g, strict=True):
                    d = d.flatten(1)  # (outputs, patch)
                    w -= lr * (d - (d @ U[name]) @ U[name].T).view_as(w)  # PGU Eq. (8)


def reversed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log(1 - p_y + 0.05) - 0.2 H(p), averaged over images (and attributes).

    It is bounded, and least where y is unlikely and p undecided. Here it covers every attribute;
    METAUNLEARN's code uses the labels, 0 and 1, as indices, and so covers two attributes alone.
    """
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
    """Eigenvalues (patch,) and vectors (patch, patch) of each layer's Gram matrix of input patches.

    {layer: (values, vectors)}, the largest first; layers are convolutions and linear ones.
    """
    gram = {}

    def collect(name, module, x):
        x = patches(module, x[0]).flatten(0, 1)
        gram[name] = gram.get(name, 0) + wide(x.mT @ x)

    layers = matrix_layers(model)
    hooks = [m.register_forward_pre_hook(partial(collect, name)) for name, m in layers.items()]
    try:
        predict(model, data, indices)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, G in gram.items():
        values, vectors = torch.linalg.eigh((G + G.T) / 2)
        found[name] = values.flip(0), vectors.flip(1).float().to(data["device"])
    return found


def core_spaces(spectra: dict, gamma: float) -> dict:
    """{layer: U (patch, k)}: the fewest leading directions that reach the share gamma."""
    U = {}
    for name, (values, vectors) in spectra.items():
        singular = values.clamp(min=0).sqrt()
        k = int((singular.cumsum(0) / singular.sum() <= gamma).sum()) + 1
        U[name] = vectors[:, :k]
    return U


def jit(student, data, have, args, rng):
    """JiT: make f flat around D_f, with no labels and no other data.

    Source: Foster et al. 2024 (Zero-shot), Eq. (3), Alg. 1, and their code. L = sum over images (as
    in their code) and mean over noises n of ||f(x) - f(x_n)|| / ||x - x_n||, with x_n = x +
    N(0, sigma^2) in normalised pixels, clamped to the batch's range; the gradient goes through f(x)
    alone. Batch norm stays in eval mode (published: train mode, where noise overwrites its
    statistics).
    """
    optimizer = torch.optim.SGD(student.parameters(), args.unlearn_lr)
    on_device = torch.Generator(data["device"]).manual_seed(rng.initial_seed())
    for _ in epochs(args):
        for batch in batches(have["forget"], args.unlearn_batch_size, rng):
            x = raw_batch(data, batch)
            clean, loss = logits_of(student, x, args), 0.0
            for _ in range(JIT_NOISES):
                noise = torch.randn(x.shape, generator=on_device, device=x.device)
                noise *= args.jit_sigma * student.std
                noisy = (x + noise).clamp(x.min(), x.max())
                with torch.no_grad():
                    moved = logits_of(student, noisy, args)
                away = ((noisy - x) / student.std).flatten(1).norm(dim=1)
                ratio = (clean - moved).norm(dim=1) / (away + 1e-12)  # (B,)
                loss = loss + ratio.sum() / JIT_NOISES  # JiT Eq. (3)
            descend(optimizer, loss)


def influence(student, data, have, args, rng):
    """Influence (ours): one Newton step away from D_f, theta + c (F + lambda)^-1 grad L(D_f).

    c is such that the step is --radius times as long as theta. Source: influence functions (Koh &
    Liang 2017), as unlearning Guo et al. 2020 and Golatkar et al. 2020. The Hessian is taken to be
    the Fisher information F of the data to keep (see curvature, kept_data): for identities a
    statistic that is stored before the data is gone, for random samples computed from all of D_r
    after the request. The length is searched: F of a model that fits its data is far too small for
    the theory's 1 / |D_r|. Parameters that `curvature` leaves out do not move.
    """
    kept = kept_data(have, args)
    key = (args.seed, args.split_seed, 11)
    F_kept = stored(have, "curvature", lambda: curvature(student, data, kept, args, *key))
    theta = dict(student.named_parameters())
    g = {k: torch.zeros_like(p) for k, p in theta.items()}
    for batch in have["forget"].split(args.unlearn_batch_size):
        logits = logits_of(student, raw_batch(data, batch), args)
        total = task_losses(logits, targets_of(data, batch)).sum()
        torch._foreach_add_(list(g.values()), gradients_of(total / len(have["forget"]), student))
    step = natural(F_kept, g, args.damping)
    long, theta_long = (sum(wide(t).pow(2).sum() for t in x.values()) for x in (step, theta))
    c = args.radius * (theta_long / long.clamp(min=1e-60)).sqrt().item()
    with torch.no_grad():
        for k, p in theta.items():
            p += c * step[k]


def retrain(student, data, have, args, rng):
    """A second gold model, of seed + 1000: the best that any method can be expected to reach.

    It shares nothing with the first but the data. Trained as train.py trains, and kept beside the
    first. Returns the seconds of its training, which may have been in an earlier run.
    """
    own = argparse.Namespace(**vars(args) | {"seed": args.seed + 1000})
    second_gold, seconds = train("gold", data, have["split"], own)
    student.load_state_dict(second_gold.state_dict())
    return seconds


# --------------------------------------------------------------------------------------------------
# Curvature, for Influence, Fisher and METAUNLEARN --natural


def label_gradients(model, data, indices: Tensor, rng: torch.Generator):
    """Yield {name: (B, ...)}: gradients of log p(y | x) times the root of the weight of label y.

    Labels y are the model's own, not the data's: then the squares add up to the Fisher information.
    Up to EXACT_CLASSES: all K classes, weighted by p(y | x), for one draw is mostly noise where a
    model fits its data; of more classes: DRAWS stratified draws; of attributes: one draw, with log
    p summed over K Bernoullis. No autocast; eval mode.
    """
    theta = {k: p.detach() for k, p in model.named_parameters()}
    buffers, multilabel = dict(model.named_buffers()), data["targets"].ndim == 2
    # B gradients of theta at a time: at most 2**28 numbers
    size = max(1, min(64, 2**28 // sum(p.numel() for p in theta.values())))

    def log_likelihood(theta, image, label):
        logits = functional_call(model, (theta, buffers), (image[None],))[1]
        number = label.numel() if label.ndim else 1  # task_losses averages over attributes
        return -task_losses(logits, label[None]).sum() * number

    for batch in indices.split(size):
        x = raw_batch(data, batch)
        with torch.no_grad():
            logits = model(x)[1].cpu().double()
        for y, weight in labels_of_the_model(logits, multilabel, rng):  # (B,) or (B, K), and (B,)
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels know no vmap of a gradient
                way = vmap(grad(log_likelihood), in_dims=(None, 0, 0))
                gradients = way(theta, x, y.to(x.device))
            root = weight.sqrt().to(x)
            yield {k: g * root.view(-1, *[1] * (g.ndim - 1)) for k, g in gradients.items()}


def labels_of_the_model(logits: Tensor, multilabel: bool, rng: torch.Generator):
    """Yield (labels, weights (B,)) that stand for the labels of p(y | x): see label_gradients."""
    B, K = logits.shape
    if multilabel:
        yield torch.bernoulli(logits.sigmoid(), generator=rng).float(), torch.ones(B)
        return
    p = logits.softmax(1)
    if K <= EXACT_CLASSES:
        for c in range(K):
            yield torch.full((B,), c), p[:, c]
        return
    for draw in range(DRAWS):  # one in each of DRAWS equal parts of the cumulated probability
        u = (draw + torch.rand(B, 1, generator=rng, dtype=p.dtype)) / DRAWS
        y = torch.searchsorted(p.cumsum(1), u)[:, 0].clamp(max=K - 1)
        yield y, torch.full((B,), 1 / DRAWS)


LARGEST = 6000  # a factor with a longer side keeps its own basis: an eigenbasis costs side ** 3
BASIS_IMAGES = 1024  # images that the eigenbases are taken from; second moments are of all
FLOWS = 2**27  # numbers of inputs and output gradients that are held at a time


def curvature(model, data, indices: Tensor, args, *key: int) -> dict:
    """The Fisher information F in a Kronecker eigenbasis: {layer: (U_out, U_in, second)}.

    Shapes: (o, o), (i, i), (o, i), a bias being one more column; None for a basis longer than
    LARGEST. With G an image's gradient of a linear or convolution layer, U_out and U_in are the
    eigenvectors of E[G G^T] and E[G^T G], and `second` is E[(U_out^T G U_in)^2], elementwise: F is
    taken to be diagonal in that basis, and to hold nothing between layers. Exact where o or i is 1
    and BASIS_IMAGES are not exceeded. All other parameters are left out (see natural): norms,
    cls_token, pos_embed, grouped convolutions, the projections inside nn.MultiheadAttention. Labels
    are the model's own, seeded by `key`; args.amp: bf16. Raises ValueError as flows does. Source:
    George et al. 2018 (EK-FAC), with the factors of Gupta et al. 2018 (Shampoo): they weigh images
    by their gradients, which are about 0 for most where a model fits its data.
    """
    first, held = {}, 0  # first: is it fewer operations to turn g and a than G, their product?
    for a, labels in flows(model, data, indices[:1], 1, generator(*key), args):
        drawn = list(labels)
        for k, x in a.items():
            (_, T, i), o = x.shape, drawn[0][k].shape[-1]
            held += T * (o + i)
            first[k] = T * (o * o + i * i / len(drawn)) <= o * i * (o + i)
    size = min(max(1, FLOWS // held), 64)
    order = torch.randperm(len(indices), generator=generator(*key, 1))
    some, sums = indices[order[:BASIS_IMAGES]].sort().values, ({}, {})
    for a, labels in flows(model, data, some, size, generator(*key), args):
        for g in labels:
            for k in a:
                for total, own in zip(sums, factors(g[k], a[k]), strict=True):
                    if own is not None:
                        total[k] = total.get(k, 0) + wide(own)
    like = next(model.parameters())
    eigh = torch.linalg.eigh
    U_out, U_in = ({k: eigh(t.float())[1].to(like) for k, t in of.items()} for of in sums)
    second = dict.fromkeys(a, 0.0)
    for a, labels in flows(model, data, indices, size, generator(*key), args):
        # Once for all labels: of ten classes, this is most of the work.
        a = {k: turned(x, U_in.get(k)) if first[k] else x for k, x in a.items()}
        for g in labels:
            for k in a:
                if first[k]:
                    own = squares(turned(g[k], U_out.get(k)), a[k])
                else:
                    own = squares(g[k], a[k], U_out.get(k), U_in.get(k))
                second[k] += own / len(indices)
    return {k: (U_out.get(k), U_in.get(k), t) for k, t in second.items()}


def flows(model, data, indices: Tensor, size: int, rng: torch.Generator, args):
    """Yield, batch by batch, what goes into each matrix layer and what comes back to it.

    ({layer: inputs a (B, T, i)}, an iterator over the labels that gives {layer: gradients g
    (B, T, o) of log p(y|x) for the layer's output}), g times the root of the label's weight (see
    labels_of_the_model). A layer with a bias has a last input of 1. Eval mode. Raises ValueError
    for a model without such layers, and with one that is called twice or whose first axis is not
    the images.
    """
    layers, flow, multilabel = matrix_layers(model), {}, data["targets"].ndim == 2

    def watch(name, module, x, z):
        if not z.requires_grad:
            return z
        if name in flow or len(x[0]) != len(batch):
            what = "is called twice" if name in flow else "mixes images along its first axis"
            raise ValueError(f"the model's layer {name} {what}; its curvature is unknown")
        a = patches(module, x[0].detach()).to(z.dtype)  # bf16 under autocast
        flow[name] = F.pad(a, (0, 1), value=1.0) if module.bias is not None else a, z
        return z.clone()  # what comes after may change it in place

    def gradients(logits):
        drawn = labels_of_the_model(logits.detach().cpu().double(), multilabel, rng)
        for y, weight in drawn:
            log_p = -task_losses(logits, y.to(logits.device)) * weight.sqrt().to(logits)
            total = log_p.sum() * (logits.shape[1] if multilabel else 1)  # a sum over attributes
            z = [z for _, z in flow.values()]
            found = torch.autograd.grad(total, z, retain_graph=True, materialize_grads=True)
            yield {k: places(layers[k], g) for k, g in zip(flow, found, strict=True)}

    handles = [m.register_forward_hook(partial(watch, name)) for name, m in layers.items()]
    try:
        for batch in indices.split(size):
            flow.clear()
            logits = logits_of(model, raw_batch(data, batch).requires_grad_(), args)
            if not flow:
                raise ValueError("the model has no linear or convolution layer: no curvature")
            yield {name: a for name, (a, _) in flow.items()}, gradients(logits)
    finally:
        for handle in handles:
            handle.remove()


def matrix_layers(model) -> dict:
    """{name: layer} of the linear layers and of the convolutions without groups.

    Layers whose weight is computed from other parameters, or is another layer's, are left out, and
    those of a derived class, which may do more to their input than PyTorch's own.
    """
    found, own = {}, dict(model.named_parameters())
    for name, module in model.named_modules():
        whole = type(module) in (nn.Linear, nn.Conv2d) and getattr(module, "groups", 1) == 1
        if whole and f"{name}.weight" in own:
            found[name] = module
    return found


def patches(module, x: Tensor) -> Tensor:
    """What a matrix layer multiplies with its weight: (B, T, patch), T tokens or places."""
    if isinstance(module, nn.Conv2d):
        mode = module.padding_mode.replace("zeros", "constant")
        x = F.pad(x, module._reversed_padding_repeated_twice, mode)  # also of padding="same"
        return F.unfold(x, module.kernel_size, module.dilation, 0, module.stride).mT
    return x.reshape(len(x), -1, x.shape[-1])


def places(module, g: Tensor) -> Tensor:
    """A gradient of a matrix layer's output as (B, T, o), T as in patches."""
    if isinstance(module, nn.Conv2d):
        return g.flatten(2).mT
    return g.reshape(len(g), -1, g.shape[-1])


def factors(g: Tensor, a: Tensor) -> list:
    """Sums over images of G G^T (o, o) and of G^T G (i, i), G = sum over places of g a^T.

    None in place of one with a side above LARGEST.
    """
    (_, T, o), i = g.shape, a.shape[-1]
    if T * (o + i) < o * i:  # fewer operations without G itself
        over_g, over_a = (a @ a.mT) @ g, (g @ g.mT) @ a
    else:
        G = g.mT @ a
        g, a = over_g, over_a = G.mT, G
    found = []
    for x, over_x in ((g, over_g), (a, over_a)):
        small = x.shape[-1] <= LARGEST
        found.append(x.flatten(0, 1).mT @ over_x.flatten(0, 1) if small else None)
    return found


def squares(g: Tensor, a: Tensor, U_out=None, U_in=None) -> Tensor:
    """Sum over images of (U_out^T G U_in)^2, G = sum over places of g a^T: (o, i)."""
    o, i, exact = g.shape[-1], a.shape[-1], torch.promote_types(g.dtype, torch.float32)
    total = torch.zeros(o, i, device=g.device, dtype=exact)
    for own_g, own_a in zip(g, a, strict=True):  # one G at a time stays in the cache
        G = turned(turned(own_g.mT @ own_a, U_in).mT, U_out).mT.to(total)
        total.addcmul_(G, G)
    return total


def turned(x: Tensor, U, back=False) -> Tensor:
    """x U, or back x U^T; x where U is None."""
    if U is None:
        return x
    # Not @, which copies U for every image where x is a transposed view.
    return torch.tensordot(x, (U.mT if back else U).to(x), 1)


def natural(fisher: dict, gradient: dict, damping: float) -> dict:
    """(F + damping)^-1 gradient, {name: tensor}, F as curvature gives it: a symmetric linear map.

    Parameters outside of F's layers do not move, as if F were infinite there.
    """
    out = {k: torch.zeros_like(g) for k, g in gradient.items()}
    for layer, (U_out, U_in, second) in fisher.items():
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        parts = [gradient[weight].flatten(1), *([gradient[bias][:, None]] if bias in out else [])]
        G = torch.cat(parts, 1)  # (o, i)
        G = turned(turned(G, U_in).mT, U_out).mT / (second.to(G) + damping)
        G = turned(turned(G, U_in, back=True).mT, U_out, back=True).mT
        out[weight] = G[:, : parts[0].shape[1]].reshape_as(out[weight])
        if bias in out:
            out[bias] = G[:, -1]
    return out


# --------------------------------------------------------------------------------------------------


def steps(lr=None, epochs=None, batch_size=None, optimizer=None) -> dict:
    """Flags of a loop by the names of the command line; what is not given is left out."""
    values = {"unlearn_lr": lr, "unlearn_epochs": epochs, "unlearn_batch_size": batch_size}
    values["unlearn_optimizer"] = optimizer
    return {name: value for name, value in values.items() if value is not None}


FORGET, RETAIN, BOTH = ("forget",), ("retain",), ("forget", "retain")
STORED = ("forget", "statistics")
# One record a method: its function, its label, the sets that it may touch, its flags with their
# values, those that --search moves (its step size first), and `on`, values for a protocol, a data
# set, or a data set with a number of identities, which override these. celeba, which celebahq
# shares: METAUNLEARN's authors' code, where it has the method (its cosine schedules left
# out); cifar10: SalUn's and SCRUB's code, but for RandL and GA.
# A method's place is part of its random seed: add new ones at the end.
# fmt: off
METHODS = {
    "ft": dict(
        run=ft, label="FT", touches=RETAIN, flags=steps(0.03, 10, 64, "sgd"),
        on={
            "toyfaces": steps(0.1), "celeba": steps(1e-3, 5, 32),
            "cifar10": steps(0.01, batch_size=256),
        },
        search=("unlearn_lr", "unlearn_epochs"),
    ),
    "randl": dict(
        run=randl, label="RandL", touches=BOTH, flags=steps(0.001, 5, 64, "sgd"),
        on={
            "toyfaces": steps(0.03), "celeba": steps(1e-3, 5, 32), "cifar10": steps(0.01, 10, 256),
        },
        search=("unlearn_lr", "unlearn_epochs"),
    ),
    "ga": dict(  # with identities METAUNLEARN's bar: one step on S
        run=ga, label="GA", touches=FORGET, flags=steps(0.03, 5, 64),
        on={
            "identities": steps(0.003, 1), "toyfaces": steps(0.3),
            "cifar10": steps(5e-4, 5, 256),
        },
        search=("unlearn_lr",),
    ),
    "amnesiac": dict(
        run=amnesiac, label="Amnesiac", touches=BOTH, flags=steps(3e-4, 3, 64, "adam"),
        on={
            "toyfaces": steps(1e-3), "celeba": steps(1e-4, 3, 128), "cifar10": steps(1e-4, 3, 128),
        },
        search=("unlearn_lr", "unlearn_epochs"),
    ),
    "fisher": dict(
        run=fisher, label="Fisher", touches=RETAIN,
        flags=dict(fisher_alpha=1e-6), on={"cifar10": dict(fisher_alpha=1e-9)},
        search=("fisher_alpha",),
    ),
    "ssd": dict(
        run=ssd, label="SSD", touches=STORED,
        flags=steps(batch_size=64) | dict(ssd_alpha=3.0, ssd_lambda=1.0),
        on={
            "toyfaces": dict(ssd_alpha=10.0),
            "celeba": steps(batch_size=128) | dict(ssd_alpha=50.0, ssd_lambda=2.0),
            "celebahq": dict(ssd_lambda=0.1),
            "celebahq-50": dict(ssd_alpha=10.0, ssd_lambda=0.5),
        },
        search=("ssd_alpha", "ssd_lambda"),
    ),
    "badt": dict(
        run=badt, label="Bad Teacher", touches=BOTH,
        flags=steps(1e-3, 1, 64, "adam") | dict(temperature=1.0),
        on={
            "toyfaces": steps(1e-5), "celeba": steps(1e-4, 5, 32, "sgd"),
            "cifar10": steps(1e-4, 1, 256),
        },
        search=("unlearn_lr", "unlearn_epochs"),
    ),
    "salun": dict(
        run=salun, label="SalUn", touches=BOTH,
        flags=steps(0.003, 5, 64, "sgd") | dict(mask_share=0.2),
        on={
            "toyfaces": steps(0.01) | dict(mask_share=0.5),
            "cifar10": steps(0.013, 10, 256) | dict(mask_share=0.5),
            "celeba": steps(1e-3, 5, 32) | dict(mask_share=0.5),
        },
        search=("unlearn_lr", "mask_share", "unlearn_epochs"),
    ),
    "scrub": dict(
        run=scrub, label="SCRUB", touches=BOTH,
        flags=steps(0.01, 5, 64, "sgd") | dict(ascent_epochs=2, temperature=4.0),
        on={
            "cifar10": steps(5e-4, 3, 256),
            "celeba": steps(5e-3, 10, 32) | dict(ascent_epochs=5),
            "celebahq": steps(1e-2),
        },
        search=("unlearn_lr", "ascent_epochs", "unlearn_epochs"),
    ),
    "pgu": dict(
        run=pgu, label="PGU", touches=STORED, flags=steps(0.01, 10, 64) | dict(pgu_gamma=0.9),
        on={"toyfaces": steps(1.0), "celeba": steps(0.1, 5, 128)},
        search=("unlearn_lr", "pgu_gamma", "unlearn_epochs"),
    ),
    "jit": dict(
        run=jit, label="JiT", touches=FORGET, flags=steps(1e-4, 1, 64) | dict(jit_sigma=0.5),
        on={
            "toyfaces": steps(0.03),
            "celeba": steps(0.01, batch_size=128) | dict(jit_sigma=30.0),
        },
        search=("unlearn_lr", "jit_sigma"),
    ),
    "influence": dict(
        run=influence, label="Influence (ours)", touches=STORED,
        flags=steps(batch_size=64) | dict(damping=1e-5, radius=0.03),
        on={"identities": dict(damping=0.01)}, search=("radius", "damping"),
    ),
    "retrain": dict(run=retrain, label="Second gold", touches=RETAIN, flags={}, on={}, search=()),
}
# fmt: on
# With identities these have S, one picture a person, in place of D_f, as METAUNLEARN's Table 1 has
# SSD, PGU and JiT; --all-pictures gives them D_f.
FORGET_IS_SUPPORT = ("ga", "ssd", "pgu", "jit", "influence")

# --------------------------------------------------------------------------------------------------
# Running one


def own_args(method: str, args, **changes) -> argparse.Namespace:
    """The flags of one method: its own values, overridden by the command line, then `changes`."""
    values, dataset = dict(METHODS[method]["flags"]), pathlib.Path(args.dataset).name
    for key in (args.forget, dataset.removesuffix("hq"), dataset, f"{dataset}-{args.ids}"):
        values |= METHODS[method]["on"].get(key, {})
    values |= {flag: getattr(args, flag) for flag in values if getattr(args, flag) is not None}
    return argparse.Namespace(**vars(args) | values | changes)


def access(method: str, args) -> dict:
    """{name by which the method knows a set: the set}; with identities S may stand in for D_f."""
    names = {name: name for name in METHODS[method]["touches"]}
    if args.forget == "identities" and method in FORGET_IS_SUPPORT and not args.all_pictures:
        names["forget"] = "support"
    return names


def run(method: str, model, data, sets: dict, args) -> tuple[nn.Module, float, float]:
    """The unlearned copy of model, in eval mode, its seconds and passes; model is not changed.

    Passes are images read over |D|. Raises FloatingPointError where the method diverged.
    """
    if data["device"].type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    student, begin = copy.deepcopy(model).eval().requires_grad_(True), clock(data["device"])
    read = data.get("read", 0)
    rng = generator(args.seed, args.split_seed, list(METHODS).index(method), 9)
    have = {name: sets[source] for name, source in access(method, args).items()}
    some = next(iter(have.values()))[:64]
    have["stored"] = sets.get("stored", {})
    if method == "retrain":
        have["split"] = sets["split"]
    with torch.random.fork_rng():  # dropout draws from the global generator
        torch.manual_seed(rng.initial_seed())
        took = METHODS[method]["run"](student, data, have, args, rng)
    took = clock(data["device"]) - begin if took is None else took
    read = data.get("read", 0) - read
    if method == "retrain":  # counted as gold's is; it may have been trained before
        read = args.epochs * len(sets["split"]["retain"])
    passes = read / len(sets["statistics"])
    finite = all(torch.isfinite(p).all() for p in student.parameters())
    if not finite or not torch.isfinite(predict(student.eval(), data, some)).all():
        searched = METHODS[method]["search"]
        own = ", ".join(f"{flag_name(flag)} {getattr(args, flag):g}" for flag in searched)
        raise FloatingPointError(f"{method} diverged; lower its step ({own})")
    return student.eval().requires_grad_(False), took, passes


def sets_of(split: dict, args) -> dict:
    """Index tensors by name: forget, retain (its share rho), support, statistics (D_r and D_f).

    statistics holds D_r whole, whatever rho; `split` is there for the second gold model. judges:
    see evaluate.hold_out.
    """
    retain = judges = reachable(split, args.rho, args.split_seed)
    if args.search:
        retain, judges = evaluate.hold_out(retain, args)
    sets = {"forget": split["forget"], "retain": retain, "judges": judges}
    sets |= {"support": split["support"]} if "support" in split else {}
    sets = {name: torch.tensor(indices) for name, indices in sets.items()}
    D = torch.cat([torch.tensor(split["retain"]), sets["forget"]])
    return sets | {"statistics": D.sort().values, "split": split}


def search(method: str, model, data, split, sets, args, problems=None, partial=None) -> tuple:
    """Search the method's flags; returns the best values and the record of evaluate.search.

    It reads neither test set nor gold model, and with identities not the real Support set: see
    evaluate.judging. A flag that the command line gives is not searched.
    """
    start, sets = own_args(method, args), sets | {"stored": {}}
    axes = [flag for flag in METHODS[method]["search"] if getattr(args, flag) is None]
    if not axes:
        return {}, {"chosen": {}, "search": [], "open": []}
    if problems is None and args.forget == "identities":
        problems = evaluate.simulated_problems(model, data, split, args)
    judge = evaluate.judging(model, problems, data, split, sets["judges"].tolist(), args)

    def distance(values) -> float:
        def unlearn(problem=None):
            own = simulated_sets(problem, sets) if problem else sets
            return run(method, model, data, own, own_args(method, args, **values))[0]

        return judge(unlearn)

    # An epoch reads what the method trains on once.
    epoch = sum(len(sets[s]) for name, s in access(method, args).items() if name != "statistics")
    longest = evaluate.LONGEST * args.epochs * len(sets["statistics"]) / epoch
    most = {"unlearn_epochs": max(1, int(longest))}
    start = {flag: getattr(start, flag) for flag in axes}
    nothing = judge(lambda problem=None: model)
    return evaluate.search(start, distance, nothing, args, partial, most)


def simulated_sets(problem, sets) -> dict:
    """The sets of a simulated request: D_r without its people, and no Support image in either."""
    support, forget = torch.tensor(problem["support"]), torch.tensor(problem["sets"]["forget"])
    kept = evaluate.left_of([*sets["retain"].tolist(), *sets["forget"].tolist()], problem)
    return sets | {"support": support, "forget": forget, "retain": torch.tensor(kept)}


def forget(method: str, model, D_f, D_r=None, D_v=None, head=None, **flags) -> nn.Module:
    """A copy of somebody's own model that has unlearned D_f by a method; writes no file.

    model: images -> logits (B, K), see common.Own. D_f, D_r, D_v: see data.of_tensors; a method
    that reads D_f alone needs no D_r. method: any but retrain. flags: its own, such as
    unlearn_lr=0.01. With D_v, those that are not given and that --search moves are searched, with
    unlearn_epochs bounded as for a model that was trained for 60 epochs; the settings are judged on
    all of D_r, which is then needed. Raises FloatingPointError where the method diverged, TypeError
    for a flag that the method does not have and for a missing D_r, ValueError for a model whose
    curvature is not known (influence).
    """
    wrong = set(flags) - set(METHODS[method]["flags"])
    if wrong or (D_r is None and (D_v is not None or METHODS[method]["touches"] != FORGET)):
        raise TypeError(f"{method} has no {wrong}" if wrong else f"{method} needs D_r")
    parts = {"forget": D_f, "retain": D_r, "val": D_v}
    own = common.Own(model, head)
    data, split = of_tensors(own, {k: part for k, part in parts.items() if part is not None})
    args = parse_args(["--method", method, "--forget", "random", "--augment", "none"])
    args = argparse.Namespace(**vars(args) | flags | {"amp": False})
    sets = {k: torch.tensor(split.setdefault(k, [])) for k in ("forget", "retain")}
    sets |= {"statistics": torch.cat([*sets.values()]), "judges": sets["retain"]}
    chosen = search(method, own, data, split, sets, args)[0] if D_v is not None else {}
    student = run(method, own, data, sets, own_args(method, args, **chosen))[0]
    return student.net.requires_grad_(True)


def ascent_step(model, data, split, args) -> tuple:
    """GA's one step on S, its size searched: the bar that a learned loss must clear.

    Returns the model after it (None: it diverged), the step size, and the simulated problems by
    which it was chosen.
    Its tries lie beside the model, so that --resume tries once for all runs of METAUNLEARN.
    """
    own = {flag: None for record in METHODS.values() for flag in record["flags"]}
    own |= {"rho": 1.0, "all_pictures": False, "search": False}
    own |= {"unlearn_batch_size": max(64, args.ids)}  # one step
    ours = vars(parse_args([]))  # the tries do not depend on flags of METAUNLEARN
    own = argparse.Namespace(**{k: v for k, v in vars(args).items() if k in ours} | own)
    tries = checkpoint_folder(args) / f"ascent-seed{args.seed}.tries"
    sets, problems = sets_of(split, own), evaluate.simulated_problems(model, data, split, args)
    best, _ = search("ga", model, data, split, sets, own, problems, tries)
    student = None
    with contextlib.suppress(FloatingPointError):  # where the bar diverges, METAUNLEARN is not lost
        student = run("ga", model, data, sets, own_args("ga", own, **best))[0]
    return student, best["unlearn_lr"], problems


def run_and_report(method, model, both, data, split, sets, seconds, args, flags) -> dict | None:
    """Search where asked, run, measure and report one method; None where it failed beside others.

    both: the measured rows of the original and the gold model. flags: as evaluate.flags_of.
    """
    chosen, more = {}, {}
    try:
        if args.search and METHODS[method]["search"]:
            partial = evaluate.tries_path(evaluate.run_name(method, args), args, split)
            chosen, more = search(method, model, data, split, sets, args, partial=partial)
        student, took, passes = run(method, model, data, sets, own_args(method, args, **chosen))
    except (FloatingPointError, ValueError) as error:
        if isinstance(error, ValueError) and method != "influence":  # see flows
            raise
        if len(args.method) == 1:
            fail(str(error))
        say(f"{error}; left out")
        return None
    begin, seen = clock(data["device"]), reachable(split, args.rho, args.split_seed)
    rows = both | {"unlearned": evaluate.measure(student, data, split, args.amp, seen)}
    seconds = seconds | {"unlearn": took, "evaluate": clock(data["device"]) - begin}
    share = f"retain (rho {args.rho:g})"
    reads = [share if name == "retain" else name for name in access(method, args).values()]
    sources = {"unlearning": ["retain"] if method == "retrain" else reads}
    if more.get("search"):
        of_D_r = "retain" if args.forget == "identities" else share
        held_out = ["held_out"] if args.held_out else []
        sources["choosing flags"] = ["forget", of_D_r, "val", *held_out]
    more["passes"] = passes
    say(f"{method}: {took:.1f} s, {passes:.1f} passes over D")
    name = evaluate.run_name(method, args)
    return evaluate.report(name, student, rows, seconds, sources, flags, data, split, args, **more)


# --------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    table = [(method, record["flags"]) for method, record in METHODS.items()]
    table += [
        (f"{m}, {key}", own) for m, record in METHODS.items() for key, own in record["on"].items()
    ]
    lines = [f"  {name:23s}" + ", ".join(f"{k} {v}" for k, v in own.items()) for name, own in table]
    lines = "\n".join(sorted(lines)).replace("_", "-")
    parser = common.Parser(description=f"{__doc__}\nValues of each method's flags:\n{lines}")
    add = parser.add_argument_group("baselines").add_argument
    # fmt: off
    add("--method", nargs="+", choices=[*METHODS, "all"], default=["all"], metavar="M",
        help=f"which to run: {', '.join(METHODS)}; all: all but retrain")
    add("--rho", type=common.share, default=1.0,
        help="share of D_r at hand; LTU's Table 1: 1, Table 2: 0.1, 0.3")
    add("--search", action="store_true", help="first search each method's flags on validation data")
    add("--all-pictures", action="store_true",
        help="identities: all of D_f in place of S, to see what one picture costs")
    add = parser.add_argument_group("single methods' flags (their values: above)").add_argument
    add("--unlearn-optimizer", choices=("sgd", "adam"),
        help="sgd has momentum 0.9; GA, PGU and JiT are plain SGD always")
    add("--unlearn-lr", type=common.positive, help="step size of unlearning")
    add("--unlearn-epochs", type=common.count, help="passes over the data that a method uses")
    add("--unlearn-batch-size", type=common.count, help="images an unlearning step")
    add("--fisher-alpha", type=common.positive, help="Fisher: scale of the noise; its code: 1e-6")
    add("--ssd-alpha", type=common.positive, help="SSD: selects where I_f > alpha I_D; paper: 10")
    add("--ssd-lambda", type=common.not_negative,
        help="SSD: dampening, theta times min(lambda I_D / I_f, 1); paper: 1")
    add("--temperature", type=common.positive, help="T of Bad Teacher (paper: 1), SCRUB (code: 4)")
    add("--mask-share", type=common.share, help="SalUn: share of weights moved; its README: 0.5")
    add("--ascent-epochs", type=common.whole,
        help="SCRUB: epochs that begin with ascent on D_f; code: 2")
    add("--pgu-gamma", type=common.share, help="PGU: share of singular values kept; paper: 0.9")
    add("--jit-sigma", type=common.positive, help="JiT: noise; paper: 0.8, METAUNLEARN: 30")
    add("--damping", type=common.positive, help="Influence: lambda, which is added to F")
    add("--radius", type=common.positive, help="Influence: length of its step over that of theta")
    # fmt: on
    evaluate.add_result_arguments(parser)
    common.add_shared_arguments(parser)
    add_recipe_arguments(parser)
    parser.set_defaults(dataset="digits")
    args = common.parse_with_presets(parser, TRAINING_PRESETS, argv)
    if "all" in args.method:
        args.method = [m for m in METHODS if m != "retrain" or m in args.method]
    named, support = ", ".join(args.method), ", ".join(FORGET_IS_SUPPORT)
    if args.all_pictures and args.forget != "identities":
        fail(f"--all-pictures is about identities; --forget {args.forget} gives D_f to all methods")
    if args.all_pictures and not set(args.method) & set(FORGET_IS_SUPPORT):
        fail(f"--all-pictures is not used by {named}; it is about {support}")
    if args.search and args.forget in ("class", "subclass"):
        fail(f"--search judges D_f by images like it in D_v; --forget {args.forget} leaves none")
    if args.search and args.method == ["retrain"]:
        fail("--search: retrain has no flag of its own to search")
    if args.save and len(args.method) > 1:
        fail(f"--save is about one model; give --method one of {named}")
    used = set().union(*(METHODS[method]["flags"] for method in args.method))
    for flag in sorted(set().union(*(record["flags"] for record in METHODS.values())) - used):
        if getattr(args, flag) is not None:
            fail(f"{flag_name(flag)} is not used by {named}")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = common.choose_device(args)
    if common.rank_and_world()[1] > 1:
        fail("baselines.py runs as one process; train.py may be started by torchrun before it")
    common.check_writable(args.checkpoint_dir, args.out, file=args.save)
    flags = {method: evaluate.flags_of(own_args(method, args)) for method in args.method}
    data, split = open_data(args, device)
    results = {}
    for method in args.method:
        name = evaluate.run_name(method, args)
        results[method] = evaluate.earlier_result(name, args, flags[method], split)
    missing = [method for method in args.method if results[method] is None]
    if missing:
        sets = sets_of(split, args)
        seen, whole = reachable(split, args.rho, args.split_seed), len(split["retain"])
        if len(seen) < 1 + args.search:  # a search keeps one from the method
            left = f"{len(seen) or 'nothing'} of D_r's {whole} images"
            fail(f"--rho {args.rho} leaves {left}; give a larger one")
        model, gold, seconds = train_both(data, split, args)
        both = {"original": model, "retrained": gold}
        both = evaluate.measure_all(both, data, split, args, seen)
    for method in missing:
        results[method] = run_and_report(
            method, model, both, data, split, sets, seconds, args, flags[method]
        )
    results = {METHODS[method]["label"]: result for method, result in results.items() if result}
    if not results:
        fail("no method is left; lower their steps")
    evaluate.show(results)
    return results


if __name__ == "__main__":
    common.guarded(main)
