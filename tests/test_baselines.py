"""baselines.py: for each method one exact property and one effect, against loops, closed forms and torch itself.

python -m pytest tests/test_baselines.py

The exact properties are functions of a module, so that test_mutants_are_caught can run each of them on a broken copy of baselines.py too.
"""

import copy
import json
import pathlib
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baselines as B
import common
import data as D
import ltu
import metaunlearn as M
import train as T

ROOT = pathlib.Path(__file__).parent.parent


class Linear(nn.Module):
    """f(x) = W x + b on flat images, as a model of this project: images -> (features, logits)."""

    def __init__(self, K=3, pixels=12, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(pixels, K)
        self.norm = nn.BatchNorm1d(pixels) if norm else nn.Identity()
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5))

    def forward(self, images):
        x = self.norm(images.flatten(1))
        return x, self.head(x)


def problem(multilabel=False, n=60, K=3, norm=False, **changes):
    """60 random 2 x 2 images; the first 12 are D_f (or S), the rest D_r."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (n, 2, 2, 3), dtype=np.uint8))
    targets = torch.from_numpy(rng.integers(0, 2, (n, K)).astype(np.float32) if multilabel else rng.integers(0, K, n))
    data = {"images": images, "targets": targets, "true_targets": targets, "classes": K, "device": torch.device("cpu"), "name": "made"}
    args = B.parse_args(["--unlearn-batch-size", "8"])
    args.amp, args.image_size = False, 2
    sets = {"forget": torch.arange(12), "retain": torch.arange(12, n), "statistics": torch.arange(n), "support": torch.arange(3)}
    changes = {"forget": "random"} | changes
    return types.SimpleNamespace(data=data, args=args, sets=sets, model=Linear(K, norm=norm).eval(), changes=changes)


def apply(module, method, p, **changes):
    """The method's student, having checked that the given model is as it was."""
    before = copy.deepcopy(p.model.state_dict())
    args = module.own_args(method, p.args, **p.changes | changes)
    student, _ = module.run(method, p.model, p.data, p.sets, args)
    assert all(torch.equal(before[k], t) for k, t in p.model.state_dict().items()), "the given model was changed"
    return student


def pixels(p, indices):
    return p.data["images"][indices].permute(0, 3, 1, 2).float() / 255


def loss(p, model, name):
    indices = p.sets[name]
    return common.task_losses(model(pixels(p, indices))[1], p.data["targets"][indices]).mean().item()


def moved(a, b):
    return {k: t - b.state_dict()[k] for k, t in a.state_dict().items() if t.is_floating_point()}


# ------------------------------------------------------------------------------------------------ exact properties


def check_ft(module):
    """Two steps of one batch: the loss falls on D_r; with the learning rate at 0 nothing moves but by decay."""
    p = problem()
    student = apply(module, "ft", p, unlearn_lr=0.1, unlearn_epochs=1, unlearn_batch_size=64, unlearn_decay=0.0)
    leaf = copy.deepcopy(p.model).requires_grad_(True)
    common.task_losses(leaf(pixels(p, p.sets["retain"]))[1], p.data["targets"][p.sets["retain"]]).mean().backward()
    assert torch.allclose(student.head.weight, leaf.head.weight - 0.1 * leaf.head.weight.grad, atol=1e-6)
    assert loss(p, student, "retain") < loss(p, p.model, "retain")


def check_ga(module):
    """One step is METAUNLEARN's ascent on the same pictures, to rounding; the loss rises; batch-norm statistics stay."""
    p = problem(multilabel=True, norm=True, forget="identities")
    student = apply(module, "ga", p, unlearn_lr=0.3, unlearn_epochs=1)
    S = pixels(p, p.sets["support"]), p.data["targets"][p.sets["support"]], None
    expected = M.ascend(p.model, S, 0.3, p.args)
    assert all(torch.allclose(expected[k], t, atol=1e-6) for k, t in student.named_parameters())
    assert loss(p, student, "support") > loss(p, p.model, "support")
    assert torch.equal(student.norm.running_mean, p.model.norm.running_mean)


def check_randl(module):
    """Every epoch reads D_f first and D_r last; D_f's labels are uniform over all classes and drawn anew; D_r's are true."""
    p, seen = problem(n=600), []
    p.sets = {"forget": torch.arange(300), "retain": torch.arange(300, 600)}
    real_images, real_losses = module.images_of, module.task_losses
    module.images_of = lambda data, batch, args, rng: (seen.append([batch]), real_images(data, batch, args, rng))[1]
    module.task_losses = lambda logits, y: (seen[-1].append(y), real_losses(logits, y))[1]
    try:
        apply(module, "randl", p, unlearn_lr=1e-4, unlearn_epochs=4, unlearn_batch_size=50)
    finally:
        module.images_of, module.task_losses = real_images, real_losses
    in_forget = [bool((batch < 300).all()) for batch, _ in seen]
    assert in_forget == ([True] * 6 + [False] * 6) * 4
    labels = {f: torch.stack([y[batch.argsort()] for batch, y in seen if (batch[0] < 300) == f]).flatten() for f in (True, False)}
    count = np.bincount(labels[True], minlength=3)
    assert ((count - 400) ** 2 / 400).sum() < 13.8  # chi-square, 2 degrees of freedom, 99.9 %
    true = torch.cat([p.data["targets"][batch.sort().values] for batch, _ in seen if batch[0] < 300])
    assert 0.25 < (labels[True] == true).float().mean() < 0.42  # the true label can be drawn
    assert torch.equal(labels[False], torch.cat([p.data["targets"][batch.sort().values] for batch, _ in seen if batch[0] >= 300]))
    by_image = {}
    for batch, y in seen[:6] + seen[12:18]:
        for i, label in zip(batch.tolist(), y.tolist(), strict=True):
            by_image.setdefault(i, []).append(label)
    assert 0.4 < np.mean([a != b for a, b in by_image.values()]) < 0.9  # anew


def check_amnesiac(module):
    """Relabelled once and never with the true label; D_f and D_r are mixed."""
    p, seen = problem(n=200), []
    p.sets["retain"] = torch.arange(12, 200)
    real_images, real_losses = module.images_of, module.task_losses
    module.images_of = lambda data, batch, args, rng: (seen.append([batch]), real_images(data, batch, args, rng))[1]
    module.task_losses = lambda logits, y: (seen[-1].append(y), real_losses(logits, y))[1]
    try:
        apply(module, "amnesiac", p, unlearn_epochs=3)
    finally:
        module.images_of, module.task_losses = real_images, real_losses
    given = {}
    for batch, y in seen:
        for i, label in zip(batch.tolist(), y.tolist(), strict=True):
            given.setdefault(i, set()).add(label)
    assert len(given) == 200 and all(len(labels) == 1 for labels in given.values())
    true = p.data["targets"].tolist()
    assert all((given[i] == {true[i]}) == (i >= 12) for i in given)
    assert any(0 < (batch < 12).sum() < len(batch) for batch, _ in seen)


def check_ledger(module):
    """theta minus recorded updates, then FT on D_r."""
    p = problem()
    p.sets["ledger"] = {k: torch.full_like(t, 0.25) for k, t in p.model.named_parameters()}
    args = module.own_args("amnesiac", p.args, **p.changes, ledger=True, unlearn_lr=1e-12)
    student, _ = module.run("amnesiac", p.model, p.data, p.sets, args)
    assert torch.allclose(student.head.weight, p.model.head.weight - 0.25, atol=1e-6)


def check_fisher(module):
    """The diagonal against a loop over images with the same sampled labels, and against p (1 - p) x^2 in the mean."""
    for multilabel in (False, True):
        p = problem(multilabel)
        args = module.own_args("fisher", p.args, **p.changes)
        got = module.fisher_diagonal(p.model, p.data, p.sets["retain"], args, common.generator(5))
        rng, total = common.generator(5), 0
        for batch in p.sets["retain"].split(args.unlearn_batch_size):
            x = pixels(p, batch)
            z = p.model(x)[1].detach()
            y = torch.bernoulli(z.sigmoid(), generator=rng) if multilabel else torch.multinomial(z.softmax(1), 1, generator=rng)[:, 0]
            for image, label in zip(x, y, strict=True):
                leaf = copy.deepcopy(p.model).requires_grad_(True)
                logits = leaf(image[None])[1][0]
                log_p = -F.binary_cross_entropy_with_logits(logits, label, reduction="sum") if multilabel else logits.log_softmax(0)[label]
                log_p.backward()
                total = total + leaf.head.weight.grad.double() ** 2
        assert got["head.weight"].dtype == torch.float64
        assert torch.allclose(got["head.weight"], total / len(p.sets["retain"]), rtol=1e-4)
    p.data["images"][:] = p.data["images"][0]  # one image many times: the mean over sampled labels is close
    p.sets["retain"] = torch.arange(60).repeat(100)
    got = module.fisher_diagonal(p.model, p.data, p.sets["retain"], args, common.generator(6))
    prob = p.model(pixels(p, [0]))[1].sigmoid()[0].double()
    assert torch.allclose(got["head.weight"], (prob * (1 - prob))[:, None] * pixels(p, [0]).flatten().double() ** 2, rtol=0.1, atol=1e-4)


def check_fisher_noise(module):
    """Variance alpha / F, at most alpha * cap: 24,000 weights of each kind."""
    p = problem()
    p.model.head = nn.Linear(12, 4000, bias=False)
    real = module.fisher_diagonal
    F_diagonal = torch.full((4000, 12), 4.0, dtype=torch.float64)
    F_diagonal[2000:] = 0.0
    module.fisher_diagonal = lambda *_: {"head.weight": F_diagonal}
    try:
        student = apply(module, "fisher", p, fisher_alpha=0.01, fisher_cap=50.0)
    finally:
        module.fisher_diagonal = real
    noise = student.head.weight - p.model.head.weight
    assert noise[:2000].var().item() == pytest.approx(0.01 / 4, rel=0.05)
    assert noise[2000:].var().item() == pytest.approx(0.01 * 50, rel=0.05) and abs(noise.mean()) < 0.01


def check_ssd(module):
    """The rule on every weight, from gradients of a loop over equal batches; nothing grows; a large alpha changes nothing."""
    p, size = problem(norm=False), 8
    p.sets["statistics"] = torch.arange(60).flip(0)  # in any order: batches of D never mix D_f and D_r

    def squared(*parts):
        batches = [part[i : i + size] for part in parts for i in range(0, len(part) - size + 1, size)]
        total = 0
        for batch in batches:
            leaf = copy.deepcopy(p.model).requires_grad_(True)
            common.task_losses(leaf(pixels(p, batch))[1], p.data["targets"][batch]).mean().backward()
            total = total + leaf.head.weight.grad**2 / len(batches)
        return total

    I_f, I_D = squared(torch.arange(12)), squared(torch.arange(12, 60).flip(0), torch.arange(12).flip(0))
    student = apply(module, "ssd", p, ssd_alpha=1.2, ssd_lambda=0.5)
    old, new = p.model.head.weight, student.head.weight
    for i in range(3):
        for j in range(12):
            expected = old[i, j] * min(0.5 * I_D[i, j] / I_f[i, j], 1) if I_f[i, j] > 1.2 * I_D[i, j] else old[i, j]
            assert new[i, j] == pytest.approx(expected.item(), rel=1e-4)
    assert (new.abs() <= old.abs() + 1e-9).all() and not torch.equal(new, old)
    assert torch.equal(apply(module, "ssd", p, ssd_alpha=1e9).head.weight, old)
    strong = apply(module, "ssd", p, ssd_alpha=1.0, ssd_lambda=100.0)
    assert (strong.head.weight.abs() <= old.abs() + 1e-9).all()
    # alpha p >= 1 selects nothing, whatever the data: p is 1 of 7 batches when D_f's 8 images are all that D_f has.
    p.sets["forget"] = torch.arange(8)
    assert torch.equal(apply(module, "ssd", p, ssd_alpha=8.0).head.weight, old)


def check_divergence(module):
    """KL(teacher || student) T^2 against a loop, for classes and attributes; zero at equality, positive elsewhere."""
    rng = torch.Generator().manual_seed(0)
    t, s = (2 * torch.randn(5, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    for T_ in (1.0, 4.0):
        by_class, by_attribute = 0.0, 0.0
        for row in range(5):
            p, q = (t[row] / T_).softmax(0), (s[row] / T_).softmax(0)
            by_class += sum((p[k] * (p[k] / q[k]).log()).item() for k in range(4)) / 5
            for k in range(4):
                a, b = (t[row, k] / T_).sigmoid(), (s[row, k] / T_).sigmoid()
                by_attribute += (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).item() / 20
        assert module.divergence(t, s, T_, False).item() == pytest.approx(T_**2 * by_class)
        assert module.divergence(t, s, T_, True).item() == pytest.approx(T_**2 * by_attribute)
        assert abs(module.divergence(t, t, T_, False)) < 1e-12 and abs(module.divergence(t, t, T_, True)) < 1e-12


def check_badt(module):
    """One step against a loop: each image of D_f pulled to the fresh model, each of D_r to the original."""
    p = problem()
    p.args.model = "made"
    bad = Linear()
    nn.init.normal_(bad.head.weight)
    real, losses = (module.build_model, module.descend), []
    module.build_model = lambda *_, **__: bad
    module.descend = lambda optimizer, loss: (losses.append(loss.item()), real[1](optimizer, loss))
    try:
        apply(module, "badt", p, unlearn_lr=0.1, unlearn_epochs=1, unlearn_batch_size=100, temperature=1.0)
    finally:
        module.build_model, module.descend = real
    total = 0.0
    for i in range(60):
        x = pixels(p, [i])
        a, b = ((bad if i < 12 else p.model)(x)[1][0].softmax(0), p.model(x)[1][0].softmax(0))
        total += (a * (a / b).log()).sum().item() / 60
    assert losses == [pytest.approx(total, rel=1e-4)]
    q = problem(norm=True)
    q.args.model, real = "made", module.build_model
    module.build_model = lambda *_, **__: bad
    try:
        student = apply(module, "badt", q, unlearn_lr=0.05, unlearn_epochs=30)
    finally:
        module.build_model = real
    x = pixels(q, q.sets["forget"])
    assert kl(bad(x)[1], student(x)[1], 1.0) < kl(bad(x)[1], q.model(x)[1], 1.0)
    assert not torch.equal(student.norm.running_mean, q.model.norm.running_mean)  # the student trains


def kl(t, s, T_):
    """KL(teacher || student) of classes, mean over images, times T^2."""
    p, q = (t / T_).softmax(1), (s / T_).softmax(1)
    return T_**2 * (p * (p / q).log()).sum(1).mean()


def check_scrub(module):
    """The whole run against a plain loop: 4 ascent steps an epoch whatever |D_f|, clipped, then D_r; teacher in eval mode."""
    for n_forget in (12, 10):
        p = problem(norm=True)
        p.sets["forget"] = torch.arange(n_forget)
        changes = dict(
            unlearn_lr=0.2, unlearn_epochs=3, ascent_epochs=2, ascent_steps=4, unlearn_batch_size=20, temperature=2.0, scrub_alpha=0.7
        )
        args = module.own_args("scrub", p.args, **p.changes, **changes)
        student = apply(module, "scrub", p, **changes)
        own, rng = copy.deepcopy(p.model).train().requires_grad_(True), common.generator(0, 0, list(B.METHODS).index("scrub"), 9)
        optimizer, steps = torch.optim.SGD(own.parameters(), 0.2, momentum=0.9, weight_decay=args.unlearn_decay), 0
        for epoch in range(3):
            if epoch < 2:
                order = p.sets["forget"][torch.randperm(n_forget, generator=rng)]
                for batch in order.tensor_split(min(4, n_forget)):
                    optimizer.zero_grad()
                    (-kl(p.model(pixels(p, batch))[1].detach(), own(pixels(p, batch))[1], 2.0)).backward()
                    torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
                    optimizer.step()
                    steps += 1
            order = p.sets["retain"][torch.randperm(48, generator=rng)]
            for start in range(0, 48, 20):
                batch = order[start : start + 20]
                z = own(pixels(p, batch))[1]
                near = kl(p.model(pixels(p, batch))[1].detach(), z, 2.0)
                optimizer.zero_grad()
                (0.7 * near + 0.99 * F.cross_entropy(z, p.data["targets"][batch])).backward()
                optimizer.step()
        assert steps == 2 * min(4, n_forget)
        assert torch.allclose(student.head.weight, own.head.weight, atol=1e-4) and student.head.weight.isfinite().all()


def check_salun(module):
    """Weights outside the mask keep every bit through momentum and decay; the mask is the globally largest |gradient| in eval mode."""
    p = problem(norm=True)
    student = apply(module, "salun", p, unlearn_lr=0.1, unlearn_epochs=3, unlearn_decay=0.1, mask_share=0.25)
    leaf, total = copy.deepcopy(p.model).requires_grad_(True), 0
    for batch in p.sets["forget"].split(8):
        l = common.task_losses(leaf(pixels(p, batch))[1], p.data["targets"][batch]).mean()
        total = total + torch.cat([t.flatten() for t in torch.autograd.grad(l, list(leaf.parameters()))])
    chosen = set(total.abs().argsort(descending=True)[: round(0.25 * len(total))].tolist())
    change = torch.cat([(a - b).flatten() for a, b in zip(student.parameters(), p.model.parameters(), strict=True)])
    assert set(torch.nonzero(change).flatten().tolist()) == chosen


def check_pgu(module):
    """Updates are orthogonal to the kept space, which spans what the layer sees; norms and biases stay; strided patches are the layer's."""
    torch.manual_seed(0)
    p = problem(n=60)

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, images):
            features = F.relu(self.norm(self.conv(images))).mean((2, 3))
            return features, self.head(features)

    p.data["images"] = torch.randint(0, 256, (60, 6, 6, 3), dtype=torch.uint8)
    p.model = Conv().eval()
    kept = p.sets["retain"]
    args = module.own_args("pgu", p.args, **p.changes, pgu_gamma=0.8, unlearn_lr=0.5)
    U = module.core_spaces(module.spectra(p.model, p.data, kept), args.pgu_gamma)
    patches = F.unfold(pixels(p, kept), 3, stride=2, padding=1).transpose(1, 2)  # torch's own convolution of them is the layer's
    assert torch.allclose(
        (patches @ p.model.conv.weight.flatten(1).T + p.model.conv.bias).transpose(1, 2),
        p.model.conv(pixels(p, kept)).flatten(2),
        atol=1e-5,
    )
    _, S, V = np.linalg.svd(patches.reshape(-1, 27).double().numpy(), full_matrices=False)
    k = int((np.cumsum(S) / S.sum() <= 0.8).sum()) + 1
    assert U["conv"].shape == (27, k) and set(U) == {"conv", "head"}
    assert torch.allclose(U["conv"] @ U["conv"].T, torch.from_numpy(V[:k].T @ V[:k]).float(), atol=1e-4)
    args = module.own_args("pgu", p.args, **p.changes, pgu_gamma=0.8, unlearn_lr=0.5, unlearn_epochs=2, unlearn_batch_size=12)
    student, _ = module.run("pgu", p.model, p.data, p.sets, args)
    change = moved(student, p.model)
    own = copy.deepcopy(p.model).requires_grad_(True)
    for lr in (0.5, 0.25):  # a cosine over two epochs
        z, y = own(pixels(p, p.sets["forget"]))[1], p.data["targets"][p.sets["forget"]]
        q = z.softmax(1)
        wanted = (-(1 - q[torch.arange(12), y] + 0.05).log() + 0.2 * (q * q.log()).sum(1)).mean()
        g = torch.autograd.grad(wanted, [own.conv.weight, own.head.weight])
        with torch.no_grad():
            for w, d, name in zip((own.conv.weight, own.head.weight), g, ("conv", "head"), strict=True):
                w -= lr * (d.flatten(1) - d.flatten(1) @ U[name] @ U[name].T).view_as(w)
    assert torch.allclose(student.conv.weight, own.conv.weight, atol=1e-5) and torch.allclose(
        student.head.weight, own.head.weight, atol=1e-5
    )
    sure = lambda m: m(pixels(p, p.sets["forget"]))[1].softmax(1)[torch.arange(12), p.data["targets"][p.sets["forget"]]].mean()
    assert sure(student) < sure(p.model)
    for name in U:
        d = change[f"{name}.weight"].flatten(1)
        assert d.norm() > 1e-4 and (d @ U[name]).norm() < 1e-5 * max(1, d.norm())
        assert not change[f"{name}.bias"].any()
    assert not any(change[f"norm.{k}"].any() for k in ("weight", "bias", "running_mean", "running_var"))


def check_reversed_loss(module):
    """Against a loop; for attributes the gradient reaches every column (published code: two)."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    y, attributes = torch.tensor([0, 4, 2, 2]), torch.randint(0, 2, (4, 5), generator=rng).double()
    classes = [-(1 - p[c] + 0.05).log() - 0.2 * -(p * p.log()).sum() for p, c in zip(z.softmax(1), y, strict=True)]
    assert module.reversed_loss(z, y).item() == pytest.approx(torch.stack(classes).mean().item())
    p = z.sigmoid()
    p_y = torch.where(attributes == 1, p, 1 - p)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    assert module.reversed_loss(z, attributes).item() == pytest.approx((-(1 - p_y + 0.05).log() - 0.2 * entropy).mean().item())
    (g,) = torch.autograd.grad(module.reversed_loss(z.requires_grad_(), attributes), z)
    assert (g.abs() > 1e-6).all()


def check_jit(module):
    """On f(x) = W x: the loss against a loop; for W a multiple of a rotation it is that multiple, whatever the noise. No statistics move."""
    p = problem(K=12, norm=True)
    p.model = Linear(12).eval()
    with torch.no_grad():
        p.model.head.weight.copy_(3.0 * torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0])
    losses, real = [], module.descend
    module.descend = lambda optimizer, loss: (losses.append(loss.item()), real(optimizer, loss))
    try:
        apply(module, "jit", p, unlearn_lr=1e-9, jit_noises=4, jit_sigma=0.1, unlearn_batch_size=12)
    finally:
        module.descend = real
    assert losses == [pytest.approx(3.0 * 0.5, rel=1e-4)]  # distances are in normalised pixels: std 0.5
    q = problem(norm=True)
    student = apply(module, "jit", q, unlearn_lr=0.1)
    assert torch.equal(student.norm.running_mean, q.model.norm.running_mean) and not torch.equal(student.head.weight, q.model.head.weight)
    r = problem()
    changes = dict(unlearn_lr=5.0, jit_noises=3, jit_sigma=0.8, unlearn_batch_size=12)
    student, rng = apply(module, "jit", r, **changes), common.generator(0, 0, list(B.METHODS).index("jit"), 9)
    x = pixels(r, r.sets["forget"][torch.randperm(12, generator=rng)])
    own, total = copy.deepcopy(r.model).requires_grad_(True), 0.0
    for _ in range(3):
        noisy = (x + torch.randn(x.shape, generator=rng) * 0.8 * 0.5).clamp(x.min(), x.max())
        ratio = [(own(a[None])[1] - r.model(b[None])[1].detach()).norm() / ((a - b) / 0.5).norm() for a, b in zip(x, noisy, strict=True)]
        total = total + torch.stack(ratio).mean() / 3
    total.backward()
    assert torch.allclose(student.head.weight, own.head.weight - 5.0 * own.head.weight.grad, atol=1e-4)
    flat = problem(multilabel=True)
    with torch.no_grad():
        flat.model.head.weight.mul_(5)
    student = apply(module, "jit", flat, unlearn_lr=0.05, unlearn_epochs=20, unlearn_batch_size=12)
    assert student.head.weight.norm() < flat.model.head.weight.norm()  # flatter


def check_influence(module):
    """One attribute: the step is exactly that of the dense Fisher matrix of the data to keep, as long as --radius says, away from D_f."""
    for forget in ("random", "identities"):
        p = problem(multilabel=True, K=1, forget=forget)
        d_f = p.sets["support" if forget == "identities" else "forget"]
        kept = p.sets["statistics"] if forget == "identities" else p.sets["retain"]
        student = apply(module, "influence", p, damping=0.02, radius=0.3)
        F_dense, rng = torch.zeros(12, 12, dtype=torch.float64), common.generator(p.args.seed, p.args.split_seed, 11)
        for batch in kept.split(64):  # g = (y - p) x
            x, prob = pixels(p, batch).flatten(1).double(), p.model(pixels(p, batch))[1].detach().sigmoid()
            g = (torch.bernoulli(prob, generator=rng) - prob).double() * x
            F_dense += g.T @ g / len(kept)
        x, y = pixels(p, d_f).flatten(1).double(), p.data["targets"][d_f].double()
        residual = p.model(pixels(p, d_f))[1].detach().sigmoid().double() - y
        want = torch.linalg.solve(F_dense + 0.02 * torch.eye(12), (residual * x).mean(0))
        change = moved(student, p.model)
        d = change["head.weight"][0].double()
        assert F.cosine_similarity(d, want, dim=0) > 1 - 1e-6
        assert F.cosine_similarity(want, (residual * x).mean(0), dim=0) < 0.999  # curvature does matter here
        assert sum(t.double().pow(2).sum() for t in change.values()).sqrt().item() == pytest.approx(0.3, rel=1e-4)
        ratio = residual.mean() / (0.02 + bias_fisher(p, kept))
        assert (change["head.bias"][0].double() / d.norm() * want.norm()).item() == pytest.approx(ratio.item(), rel=1e-4)
        before, after = (common.task_losses(m(pixels(p, d_f))[1], p.data["targets"][d_f]).mean() for m in (p.model, student))
        assert after > before


def bias_fisher(p, kept):
    """Mean squared gradient of log p with respect to the only bias, with the labels that influence draws."""
    rng, total = common.generator(p.args.seed, p.args.split_seed, 11), 0.0
    for batch in kept.split(64):
        prob = p.model(pixels(p, batch))[1].detach().sigmoid()
        total += (torch.bernoulli(prob, generator=rng) - prob).double().pow(2).sum().item()
    return total / len(kept)


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_exact_properties(name):
    CHECKS[name](B)


MUTANTS = {
    "FT reads D_f": (
        "ft",
        '"ft": ("retain",)',
        '"ft": ("forget",)',
        'batches(have["retain"], args.unlearn_batch_size, rng):\n            descend',
        'batches(have["forget"], args.unlearn_batch_size, rng):\n            descend',
    ),
    "GA descends": ("ga", "descend(optimizer, -task_losses", "descend(optimizer, task_losses"),
    "GA in train mode": (
        "ga",
        '    optimizer = torch.optim.SGD(student.parameters(), args.unlearn_lr)\n    for _ in epochs(args):\n        for batch in batches(have["forget"], args.unlearn_batch_size, rng):\n            descend',
        '    student.train()\n    optimizer = torch.optim.SGD(student.parameters(), args.unlearn_lr)\n    for _ in epochs(args):\n        for batch in batches(have["forget"], args.unlearn_batch_size, rng):\n            descend',
    ),
    "RandL ends on D_f": (
        "randl",
        'for name in ("forget", "retain"):\n            for batch in batches(have[name]',
        'for name in ("retain", "forget"):\n            for batch in batches(have[name]',
    ),
    "RandL keeps true labels": ("randl", 'if name == "forget" else targets_of', 'if name == "nothing" else targets_of'),
    "Amnesiac may draw the true label": ("amnesiac", "torch.randint(1, data", "torch.randint(0, data"),
    "ledger added": ("ledger", 'p -= have["ledger"]', 'p += have["ledger"]'),
    "Fisher of the batch": ("fisher", "wide(g[k]).pow(2).sum(0)", "wide(g[k]).sum(0).pow(2)"),
    "noise with the standard deviation for variance": ("fisher_noise", "variance.sqrt().to(p)", "variance.to(p)"),
    "no cap": ("fisher_noise", ".clamp(max=args.fisher_cap)", ""),
    "SSD selects the other side": ("ssd", "selected = f > args.ssd_alpha * d", "selected = f < args.ssd_alpha * d"),
    "SSD may enlarge": ("ssd", "(args.ssd_lambda * d / f).clamp(max=1)", "(args.ssd_lambda * d / f)"),
    "importance from the ragged batch too": ("ssd", "part[: len(part) // size * size].split(size)", "part.split(size)"),
    "importance without the square": ("ssd", "t += g**2", "t += g.abs()"),
    "KL the wrong way round": (
        "divergence",
        "F.kl_div((student / T).log_softmax(1), (teacher / T)",
        "F.kl_div((teacher / T).log_softmax(1), (student / T)",
    ),
    "KL averaged over classes": ("divergence", 'reduction="batchmean"', 'reduction="mean"'),
    "no T squared": ("divergence", "return T**2 * F.kl_div", "return F.kl_div"),
    "Bernoulli KL without the entropy": ("divergence", "(q, y) - entropy)", "(q, y))"),
    "teachers exchanged": (
        "badt",
        "logits_of(bad, x, args), logits_of(good, x, args)",
        "logits_of(good, x, args), logits_of(bad, x, args)",
    ),
    "SCRUB descends on D_f": ("scrub", "(-divergence(wanted", "(divergence(wanted"),
    "SCRUB's ascent tied to |D_f|": ("scrub", "order.tensor_split(min(args.ascent_steps, len(order)))", "order.split(2)"),
    "SCRUB without KL on D_r": ("scrub", "args.scrub_alpha * near + ", ""),
    "SCRUB unclipped": ("scrub", "nn.utils.clip_grad_norm_(student.parameters(), 1.0)", "pass"),
    "SCRUB's teacher trains": (
        "scrub",
        "teacher, optimizer, multilabel = copy.deepcopy(student), new",
        "teacher, optimizer, multilabel = copy.deepcopy(student).train(), new",
    ),
    "Bad Teacher's student in eval mode": (
        "badt",
        "    student.train()\n    for _ in epochs(args):\n        for batch in batches(union, args.unlearn_batch_size, rng):\n            x, to_forget",
        "    for _ in epochs(args):\n        for batch in batches(union, args.unlearn_batch_size, rng):\n            x, to_forget",
    ),
    "SalUn's mask in train mode": (
        "salun",
        "    total = [torch.zeros_like(p) for p in student.parameters()]\n    for batch in have",
        "    student.train()\n    total = [torch.zeros_like(p) for p in student.parameters()]\n    for batch in have",
    ),
    "PGU descends on the label": ("pgu", "w -= lr *", "w += lr *"),
    "PGU at a constant step": ("pgu", "np.cos(np.pi * epoch / len(epochs(args)))", "1"),
    "JiT without sigma": ("jit", " * args.jit_sigma * student.std", " * student.std"),
    "JiT unclamped": ("jit", ".clamp(x.min(), x.max())", ""),
    "JiT's gradient through the noisy branch": (
        "jit",
        "with torch.no_grad():\n                    moved",
        "with torch.enable_grad():\n                    moved",
    ),
    "SSD's batches mixed": ("ssd", "[D[~inside], D[inside]]", "[D]"),
    "SalUn leaks": ("salun", "p.copy_(torch.where(m, p, old))", "p.copy_(p)"),
    "SalUn's smallest gradients": ("salun", "argsort(descending=True)[: round(args.mask", "argsort()[: round(args.mask"),
    "PGU along the kept space": ("pgu", "(d - (d @ U[name]) @ U[name].T)", "((d @ U[name]) @ U[name].T)"),
    "PGU patches of stride 1": ("pgu", "module.padding, module.stride)", "module.padding, 1)"),
    "energy for singular values": ("pgu", ".clamp(min=0).sqrt()", ".clamp(min=0)"),
    "entropy minimised": ("reversed_loss", "- 0.2 * entropy", "+ 0.2 * entropy"),
    "entropy of classes minimised": ("reversed_loss", "+ 0.2 * (log_p", "- 0.2 * (log_p"),
    "JiT sums over the batch": ("jit", "(away + 1e-12)).mean()", "(away + 1e-12)).sum()"),
    "JiT in pixels, not normalised": ("jit", "((noisy - x) / student.std)", "(noisy - x)"),
    "JiT in train mode": (
        "jit",
        "            clean, loss = logits_of(student, x, args), 0.0",
        "            student.train()\n            clean, loss = logits_of(student, x, args), 0.0",
    ),
    "JiT sharpens": ("jit", "loss = loss + ((clean", "loss = loss - ((clean"),
    "influence towards D_f": ("influence", "p += args.radius /", "p -= args.radius /"),
    "influence without curvature": ("influence", "step = natural(F_kept, g, args.damping)", "step = g"),
    "influence damped by the curvature of D_f too": ("influence", "load_images, kept, multilabel", "load_images, D, multilabel"),
    "influence of any length": ("influence", "args.radius / max(length, 1e-30)", "args.radius"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    check, *edits = MUTANTS[name]
    source = (ROOT / "baselines.py").read_text()
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in baselines.py"
        source = source.replace(old, new)
    mutant = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), mutant.__dict__)
    with pytest.raises((AssertionError, UserWarning)):  # torch itself warns of one of them
        CHECKS[check](mutant)


# ------------------------------------------------------------------------------------------------ all of them, on real files


def test_ledger_of_all_steps_returns_the_initial_weights(tmp_path):
    flags = ["--dataset", "digits", "--epochs", "2", "--data-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c")]
    args = T.parse_args(flags)
    args.amp = False
    data = D.load(args)
    split = D.make_split(data, args)
    everything = dict(split, forget=split["retain"] + split["forget"], retain=split["retain"])
    model, _ = T.train("original", data, everything, args, ledger=True)
    initial = common.build_model(args.model, 10, 8, seed=2 * args.seed)
    for name, p in initial.named_parameters():
        assert torch.allclose(model.state_dict()[name] - model.ledger[name], p, atol=1e-5), name
    one = T.parse_args([*flags, "--epochs", "1", "--seed", "1"])  # one image: one batch of the only epoch
    one.amp = False
    recorded = {}
    for name, forget in (("none", []), ("one", split["forget"][:1])):
        one.checkpoint_dir = str(tmp_path / name)
        recorded[name] = T.train("original", data, dict(split, forget=forget), one, ledger=True)
    assert not any(t.any() for t in recorded["none"][0].ledger.values())
    fresh = dict(common.build_model(args.model, 10, 8, seed=2).named_parameters())
    size = lambda tensors: sum(t.double().pow(2).sum() for t in tensors) ** 0.5
    whole = size(recorded["one"][0].state_dict()[k] - p.detach() for k, p in fresh.items())
    assert 0 < size(recorded["one"][0].ledger.values()) < 0.7 * whole
    plain, _ = T.train("original", data, everything, args)
    assert plain.ledger is None and all(torch.equal(t, model.state_dict()[k]) for k, t in plain.state_dict().items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Short runs of all methods under both protocols: {protocol: (flags, results, images read by each method)}."""
    out = {}
    folder = tmp_path_factory.mktemp("all")
    table = D.draw_toyfaces(identities=40, images_each=4, size=16)
    np.save(folder / "small.npy", table.pop("images"))
    np.savez(folder / "small.npz", **table)
    where = ["--device", "cpu", "--data-dir", str(folder), "--checkpoint-dir", str(folder / "c"), "--out", str(folder / "o")]
    short = ["--unlearn-epochs", "1", "--jit-noises", "2"]
    protocols = {
        "random": [*where, *short, "--dataset", "digits", "--epochs", "12", "--rho", "0.5"],
        "identities": [*where, *short, "--dataset", str(folder / "small"), "--ids", "4", "--epochs", "3", "--batch-size", "32"],
    }
    for protocol, flags in protocols.items():
        read, phase = {}, ["outside"]
        real, real_run = (B.raw_batch, B.run)

        def spy(data, indices, read=read, phase=phase, real=real):
            read.setdefault(phase[0], set()).update(np.asarray(indices).tolist())
            return real(data, indices)

        def phased(method, *args, phase=phase, real_run=real_run):
            phase[0] = method
            try:
                return real_run(method, *args)
            finally:
                phase[0] = "outside"

        B.raw_batch, B.run = spy, phased
        try:
            results = B.main(flags)
        finally:
            B.raw_batch, B.run = real, real_run
        out[protocol] = (flags, results, read, folder)
    return out


@pytest.mark.parametrize("protocol", ("random", "identities"))
@pytest.mark.parametrize("method", B.METHODS)
def test_nothing_is_read_beyond_access(trained, protocol, method):
    flags, results, read, folder = trained[protocol]
    split = torch.load(next((folder / "c").rglob(f"{'random' if protocol == 'random' else 'ids'}*/original-seed0.pt")), weights_only=True)[
        "indices"
    ]
    at_hand = D.reachable(split, 0.5 if protocol == "random" else 1.0, 0)
    from_support = protocol == "identities" and method in ("ga", "ssd", "pgu", "jit", "influence")
    forget = split["support"] if from_support else split["forget"]
    may = {"forget": forget, "retain": at_hand, "statistics": split["retain"] + split["forget"]}
    permitted = set().union(*(may[name] for name in B.ACCESS[method]))
    assert read[method] and read[method] <= permitted
    if "forget" not in B.ACCESS[method]:
        assert not read[method] & set(split["forget"])
    if protocol == "identities" and method in ("ga", "jit"):
        assert read[method] == set(split["support"])
    if from_support:
        assert set(split["support"]) <= read[method]
    names = [{"retain": "retain (rho 0.5)" if protocol == "random" else "retain (rho 1)"}.get(n, n) for n in B.ACCESS[method]]
    assert results[method]["access"] == {"unlearning": ["support" if n == "forget" and from_support else n for n in names]}


def test_result_files_are_as_every_script_writes_them(trained):
    for _, results, _, folder in trained.values():
        assert set(results) == set(B.METHODS)
        for method, result in results.items():
            (path,) = (folder / "o").rglob(f"*{result['setting']}/{result['method']}-seed0.json")
            assert json.loads(path.read_text())["metrics"] == result["metrics"]
            assert {"tow", "ua", "ra", "ta", "mi", "avg_gap", "split_hash", "access", "seconds", "commit"} <= set(result)
            assert 0 <= result["tow"] <= 1 and result["method"].split("-")[0] == method
            assert ("rho=0.5" in result["method"]) == (result["setting"].startswith("random") and "retain" in B.ACCESS[method])
            assert {"load", "train", "unlearn", "evaluate"} == set(result["seconds"])
            saved = torch.load(next((folder / "c").rglob(f"*{result['setting']}/{result['method']}-seed0.pt")), weights_only=True)
            assert saved["which"] == "unlearned" and saved["split"] == result["split_hash"]


@pytest.mark.parametrize("method", ("randl", "fisher", "jit", "scrub"))
def test_same_seed_same_result(trained, method):
    flags, results, _, _ = trained["random"]
    own = [f for f in flags if f not in ("--unlearn-epochs", "--jit-noises", "1", "2")]
    own += ["--unlearn-epochs", "1"] * (method != "fisher") + ["--jit-noises", "2"] * (method == "jit")
    again = B.main([*own, "--method", method])[method]  # alone, and after others: the same
    assert again["metrics"] == results[method]["metrics"]
    flag = ["--fisher-alpha", "1e-3"] if method == "fisher" else ["--unlearn-lr", "0.02"]
    other = B.main([*own, "--method", method, *flag])[method]
    assert other["metrics"] != again["metrics"] and other["method"] != again["method"]


def test_search_reads_neither_test_set_nor_gold(trained, monkeypatch):
    for protocol in ("random", "identities"):
        flags, _, _, folder = trained[protocol]
        args = B.parse_args([f for f in flags if f not in ("--jit-noises", "2")] + ["--method", "ga"])
        args.amp = False
        data = D.load(args)
        split = D.make_split(data, args)
        model, _ = T.train("original", data, split, args)
        read = set()
        for module in (B, M, ltu):
            monkeypatch.setattr(
                module, "raw_batch", lambda data, i, read=read: (read.update(np.asarray(i).tolist()), D.raw_batch(data, i))[1]
            )
        monkeypatch.setattr(B, "GRIDS", {"ga": {"unlearn_lr": (1e-6, 0.05, 1e3)}})
        best, tried = B.search("ga", model, data, split, B.sets_of(split, args), args)
        assert read and not read & set(split["test"]) and len(tried) == 3
        if protocol == "identities":
            assert not read & set(split["support"])
        assert tried[2]["distance"] is None or tried[2]["distance"] > tried[1]["distance"]  # 1e3 destroys the model
        assert best["unlearn_lr"] == min(tried[:2], key=lambda t: t["distance"])["unlearn_lr"]
        monkeypatch.undo()


def test_search_computes_a_stored_statistic_once_and_finds_the_same(trained, monkeypatch):
    for protocol in ("random", "identities"):
        flags = trained[protocol][0]
        args = B.parse_args([f for f in flags if f not in ("--jit-noises", "2")] + ["--method", "ssd", "pgu"])
        args.amp = False
        data = D.load(args)
        split = D.make_split(data, args)
        model, _ = T.train("original", data, split, args)
        monkeypatch.setattr(B, "GRIDS", {"ssd": {"ssd_alpha": (0.5, 1.0)}, "pgu": {"unlearn_lr": (0.1, 1.0)}})
        for method, statistic in (("ssd", "importance"), ("pgu", "spectra")):
            calls, compute = [], getattr(B, statistic)
            monkeypatch.setattr(
                B, statistic, lambda m, d, parts, *rest, c=compute, calls=calls: (calls.append(len(parts)), c(m, d, parts, *rest))[1]
            )
            once = B.search(method, model, data, split, B.sets_of(split, args), args)
            n, tries = len(calls), 2 * (3 if protocol == "identities" else 1)
            with monkeypatch.context() as never:
                never.setattr(B, "stored", lambda have, key, compute: compute())
                assert once == B.search(method, model, data, split, B.sets_of(split, args), args)
            assert n == 1 + tries * (method == "ssd") and len(calls) - n == tries * (1 + (method == "ssd"))
        monkeypatch.undo()


def test_ssd_says_when_it_can_select_nothing(capsys):
    p = problem()
    apply(B, "ssd", p, ssd_alpha=8.0)  # D_f is one of seven whole batches
    out = capsys.readouterr().out
    assert "can select nothing" in out and "0.000 % of the weights" in out


def test_command_line_wins_over_a_methods_preset():
    args = B.parse_args(["--unlearn-lr", "0.5", "--method", "salun", "scrub"])
    assert B.own_args("salun", args).unlearn_lr == 0.5 and B.own_args("salun", args).mask_share == B.PRESETS["salun"]["mask_share"]
    assert B.own_args("scrub", B.parse_args([])).unlearn_lr == B.PRESETS["scrub"]["unlearn_lr"]
    for key, values in [*B.PRESETS.items(), *B.GRIDS.items()]:
        assert set(values) <= set(B.USES[key if isinstance(key, str) else key[0]])
    faces = B.parse_args(["--dataset", "celebahq", "--method", "ssd", "jit", "ga", "--unlearn-batch-size", "16"])
    assert (B.own_args("ssd", faces).ssd_alpha, B.own_args("jit", faces).jit_sigma) == (50.0, 30.0)
    assert B.own_args("ga", faces).unlearn_epochs == 1 and B.own_args("jit", faces).unlearn_batch_size == 16


def test_search_and_dry_run_and_plot_from_the_command_line(trained, monkeypatch):
    flags, _, _, folder = trained["random"]
    own = [f for f in flags if f not in ("--unlearn-epochs", "--jit-noises", "1", "2")]
    monkeypatch.setattr(B, "GRIDS", {"ga": {"unlearn_lr": (1e-3, 1e-2)}, "ft": {"unlearn_lr": (1e-3, 1e-2)}})
    results = B.main([*own, "--method", "ga", "ft", "--search", "--unlearn-epochs", "1", "--plot"])
    assert results["ga"]["method"] == "ga-unlearnepochs=1-search" and len(results["ga"]["search"]) == 2
    assert results["ft"]["method"] == "ft-unlearnepochs=1-rho=0.5-search"
    assert results["ga"]["access"]["choosing flags"] == ["forget", "retain (rho 0.5)", "val"]
    assert len(list((folder / "o").rglob("*-search-seed0.png"))) == 2
    fixed = B.main([*own, "--method", "ga", "--search", "--unlearn-lr", "0.02"])["ga"]
    assert len(fixed["search"]) == 1 and fixed["args"]["unlearn_lr"] == 0.02
    dry = B.main([*own, "--dry-run"])
    assert set(dry) == set(B.METHODS) and all(r["setting"].endswith("-dry") for r in dry.values())


def test_a_method_that_diverges_is_left_out_of_a_table_and_fatal_alone(trained, capsys):
    flags, _, _, _ = trained["random"]
    own = [f for f in flags if f not in ("--unlearn-epochs", "--jit-noises", "1", "2")] + ["--unlearn-lr", "1e3", "--unlearn-decay", "1e3"]
    assert set(B.main([*own, "--method", "ft", "fisher"])) == {"fisher"}
    assert "ft diverged" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        B.main([*own, "--method", "ft"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1 and "ft diverged" in message


@pytest.mark.parametrize(
    "extra, word",
    [
        ("--rho 0", "--rho"),
        ("--ledger", "amnesiac"),
        ("--mask-share 0", "--mask-share"),
        ("--unlearn-decay -1", "--unlearn-decay"),
        ("--method ssd --unlearn-lr 1", "not used by ssd"),
        ("--method amnesiac --ledger --search", "nothing to search"),
        ("--search --forget class --forget-classes 1 --label-noise 0", "--search"),
        ("--method none", "invalid choice"),
        ("--all-pictures", "--all-pictures is about identities"),
        ("--damping 0", "--damping"),
        ("--method ga --radius 2", "not used by ga"),
    ],
)
def test_bad_input_gets_one_line(extra, word, capsys):
    with pytest.raises(SystemExit) as stop:
        B.parse_args(extra.split())
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1 and word in message


def test_all_pictures_gives_d_f_in_place_of_the_support_set():
    """--all-pictures changes what GA, SSD, PGU, JiT and Influence are handed, and their files' names; of the others nothing."""
    flags = ["--dataset", "toyfaces", "--method", "all"]
    one, whole = B.parse_args(flags), B.parse_args([*flags, "--all-pictures"])
    sets = {name: torch.arange(i, i + 3) for i, name in enumerate(("support", "forget", "retain", "statistics"))}
    for method in B.METHODS:
        few, many = (B.allowed(method, sets, args) for args in (one, whole))
        names = [B.run_name(method, B.own_args(method, args), False) for args in (one, whole)]
        if method in B.FORGET_IS_SUPPORT:
            assert few["forget"].equal(sets["support"]) and many["forget"].equal(sets["forget"]) and names[0] != names[1]
            assert "support" in B.allowed_names(method, one) and "support" not in B.allowed_names(method, whole)
        else:
            assert few.keys() == many.keys() and names[0] == names[1]
            assert all(few[k] is many[k] for k in few if k != "stored")


def test_a_dry_run_keeps_something_beside_d_f():
    """Data sorted by class: the first 64 images of D may all be of the class to forget, and D \\ D_f must not run empty."""
    split = {"forget": list(range(100)), "retain": list(range(100, 300))}
    args = B.parse_args(["--dry-run", "--rho", "0.5"])
    D_dry = B.sets_of(split, args)["statistics"]
    assert D_dry.tolist() == [*range(64), *range(100, 164)]
    args.dry_run = False
    assert B.sets_of(split, args)["statistics"].tolist() == list(range(300))  # all of D, whatever rho


def test_a_method_that_diverges_names_its_own_flags():
    p = problem()
    args = B.own_args("influence", p.args, **p.changes, radius=1e39)  # beyond float32
    with pytest.raises(FloatingPointError, match=r"influence diverged.*--damping.*--radius"):
        B.run("influence", p.model, p.data, p.sets, args)


def test_methods_are_short():
    """Each reads like its paper: at most 45 lines."""
    import inspect

    for name, f in B.METHODS.items():
        assert len(inspect.getsource(f).splitlines()) <= 45, name
