"""baselines.py: each method against a loop, a closed form or torch itself, and then all of them.

    python -m pytest tests/test_baselines.py

The exact properties are functions of a module, so that test_mutants_are_caught can run each of them
on a broken copy of baselines.py too.
"""

import contextlib
import copy
import io
import itertools
import json
import types
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from check_gradient import flat as flat_of
from conftest import mutated, places, record_reads, refused, weights
from torch import distributions, nn
from torch.nn.utils import parameters_to_vector

import baselines as B
import common
import data as D
import evaluate
import train as T

CPU = torch.device("cpu")


class Small(nn.Module):
    """Features and a linear head, as a model of this project: images -> (features, logits)."""

    def __init__(self, features, head):
        super().__init__()
        self.features, self.head = features, head
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5))

    def forward(self, images):
        x = self.features(images)
        return x, self.head(x)


def linear(K=3, norm=False):
    """f(x) = W x + b on flat 2 x 2 images, with batch norm between where asked."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.BatchNorm1d(12)] if norm else [nn.Flatten()]
    return Small(nn.Sequential(*layers), nn.Linear(12, K)).eval()


def problem(multilabel=False, n=60, K=3, norm=False, side=2, forget="random"):
    """60 random 2 x 2 images; the first 12 are D_f (the first 3 of them S), the rest D_r."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8))
    labels = rng.integers(0, 2, (n, K)).astype(np.float32) if multilabel else rng.integers(0, K, n)
    data = {"images": images, "targets": torch.from_numpy(labels), "classes": K, "device": CPU}
    args = B.parse_args(["--unlearn-batch-size", "8"])
    args.amp, args.image_size, args.model, args.forget = False, side, "made", forget
    sets = {"forget": torch.arange(12), "retain": torch.arange(12, n), "support": torch.arange(3)}
    sets["statistics"] = torch.arange(n)
    return types.SimpleNamespace(data=data, args=args, sets=sets, model=linear(K, norm))


def apply(module, method, p, **changes):
    """The method's student; changes: of flags or, in capitals, of the module's constants."""
    before = copy.deepcopy(p.model.state_dict())
    constants = {name: changes.pop(name) for name in list(changes) if name.isupper()}
    with patch.multiple(module, **{"DECAY": module.DECAY} | constants):  # it wants one at least
        args = module.own_args(method, p.args, **changes)
        student = module.run(method, p.model, p.data, p.sets, args)[0]
    assert all(torch.equal(before[k], t) for k, t in p.model.state_dict().items())
    return student


def pixels(p, indices):
    return p.data["images"][indices].permute(0, 3, 1, 2).float() / 255


def loss(p, model, indices):
    logits = model(pixels(p, indices))[1]
    return common.task_losses(logits, p.data["targets"][indices]).mean()


def flat(model):
    return parameters_to_vector(model.parameters())


def gradient(p, indices):
    """Of the mean loss of the given model in eval mode, over all weights, flat."""
    leaf = copy.deepcopy(p.model).requires_grad_(True)
    g = torch.autograd.grad(loss(p, leaf, indices), list(leaf.parameters()))
    return parameters_to_vector(g)


def kl(teacher, student, T_=1.0):
    return common.kl_divergence(teacher, student, False, T_)  # see test_common.py


def residuals(p, indices, *key):
    """y - p of each image (n, K), attributes y drawn from the model 64 at a time; x (n, 12)."""
    rng, found = common.generator(*key), []
    for batch in pixels(p, indices).split(64):
        prob = p.model(batch)[1].detach().double().sigmoid()
        found.append(torch.bernoulli(prob, generator=rng) - prob)
    return torch.cat(found), pixels(p, indices).flatten(1).double()


def dense_step(gradients, g, damping):
    """(F + damping)^-1 g with the whole Fisher matrix of per-image gradients (n, ...)."""
    flat = gradients.flatten(1)
    F_dense = flat.T @ flat / len(flat) + damping * torch.eye(flat.shape[1])
    return torch.linalg.solve(F_dense, g.flatten().double()).view_as(g)


def labels_given(module, method, p, **changes):
    """Batches in the order of the steps, and {image: the labels with which it was trained}."""
    views = patch.object(module, "augmented", wraps=module.augmented)
    losses, given = patch.object(module, "task_losses", wraps=module.task_losses), {}
    with views as views, losses as losses:
        apply(module, method, p, **changes)
    batches = [call.args[1] for call in views.call_args_list]
    labels = [call.args[1] for call in losses.call_args_list]
    for image, label in zip(torch.cat(batches).tolist(), torch.cat(labels).tolist(), strict=True):
        given.setdefault(image, []).append(label)
    return batches, given


# --------------------------------------------------------------------------------------------------
# Exact properties


def check_ft(module):
    """A step of one batch is SGD's on D_r, with weight decay; the loss falls there."""
    p, once = problem(), dict(unlearn_lr=0.1, unlearn_epochs=1, unlearn_batch_size=64)
    theta, g = flat(p.model), gradient(p, p.sets["retain"])
    for decay in (0.5, 0.0):
        student = apply(module, "ft", p, **once, DECAY=decay)
        assert torch.allclose(flat(student), theta - 0.1 * (g + decay * theta), atol=1e-6)
    assert loss(p, student, p.sets["retain"]) < loss(p, p.model, p.sets["retain"])
    adam = flat(apply(module, "ft", p, **once, unlearn_optimizer="adam"))
    assert torch.allclose(adam, theta - 0.1 * g.sign(), atol=1e-4)  # Adam's first step


def check_modes(module):
    """What trains on batches lets batch norm train, and sees images as --augment changes them."""
    p = problem(norm=True)
    trains = {"ft": 48, "randl": 60, "amnesiac": 60, "badt": 60, "scrub": 60, "salun": 72}
    forward, build = Small.forward, patch.object(module, "build_model")
    for method in [method for method in module.METHODS if method != "retrain"]:
        training, draw = set(), patch.object(D, "draw_augmentation", wraps=D.draw_augmentation)

        def note(self, images, training=training):
            training |= {id(self)} if self.training else set()
            return forward(self, images)

        with patch.object(Small, "forward", note), draw as draw, build as bad:
            bad.return_value = linear(norm=True).train()
            changes = dict(unlearn_lr=1e-3, unlearn_epochs=1, ascent_epochs=1)
            apply(module, method, p, **changes, unlearn_batch_size=60)
        # One model trains at most; as many images were augmented, SalUn's mask among them.
        assert len(training) == (method in trains), method
        assert sum(call.args[0] for call in draw.call_args_list) == trains.get(method, 0), method
        if method == "badt":
            assert bad.call_args.kwargs == {"seed": 2}  # the original model's is 0, gold's 1


def check_seeds(module):
    """What draws at random draws otherwise with another seed, and with another split seed."""
    p, changes = problem(multilabel=True), dict(unlearn_epochs=1, unlearn_batch_size=5)
    for method in ("ft", "randl", "amnesiac", "fisher", "salun", "scrub", "jit", "influence"):
        seeds = [dict(seed=seed, split_seed=k) for seed, k in ((0, 0), (1, 0), (0, 1))]
        students = [flat(apply(module, method, p, **changes, **own)) for own in seeds]
        assert torch.equal(students[0], flat(apply(module, method, p, **changes))), method
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert not torch.equal(students[one], students[other]), method


def check_ga(module):
    """One step is gradient ascent on S, to rounding; batch norm's statistics stay."""
    p = problem(multilabel=True, norm=True, forget="identities")
    student, S = apply(module, "ga", p, unlearn_lr=0.3, unlearn_epochs=1), p.sets["support"]
    assert torch.allclose(flat(student), flat(p.model) + 0.3 * gradient(p, S), atol=1e-6)
    assert loss(p, student, S) > loss(p, p.model, S)
    assert torch.equal(student.features[1].running_mean, p.model.features[1].running_mean)


def check_randl(module):
    """D_f first, with uniform labels drawn anew each epoch; D_r last, with true labels."""
    p, changes = problem(n=600), dict(unlearn_lr=1e-4, unlearn_epochs=4, unlearn_batch_size=50)
    p.sets |= {"forget": torch.arange(300), "retain": torch.arange(300, 600)}
    batches, given = labels_given(module, "randl", p, **changes)
    in_forget = [bool((batch < 300).all()) for batch in batches]
    assert in_forget == ([True] * 6 + [False] * 6) * 4
    true = p.data["targets"].tolist()
    of_forget = torch.tensor([given[i] for i in range(300)])  # (images, epochs)
    count = np.bincount(of_forget.flatten(), minlength=3)
    assert ((count - 400) ** 2 / 400).sum() < 13.8  # chi-square, 2 degrees of freedom, 99.9 %
    right = (of_forget == torch.tensor(true[:300])[:, None]).float().mean()
    assert 0.25 < right < 0.42  # the true label can be drawn
    assert 0.4 < (of_forget[:, 0] != of_forget[:, 1]).float().mean() < 0.9  # anew
    assert all(given[i] == [true[i]] * 4 for i in range(300, 600))


def check_amnesiac(module):
    """Relabelled once and never with the true label; D_f and D_r are mixed."""
    p = problem(n=200)
    batches, given = labels_given(module, "amnesiac", p, unlearn_epochs=3)
    assert len(given) == 200 and all(len(set(labels)) == 1 for labels in given.values())
    true = p.data["targets"].tolist()
    assert all((given[i][0] == true[i]) == (i >= 12) for i in given)
    assert any(0 < (batch < 12).sum() < len(batch) for batch in batches)
    q = problem(n=200, multilabel=True)  # attributes: the vectors of images of D_r
    _, given = labels_given(module, "amnesiac", q, unlearn_epochs=1)
    true = q.data["targets"].tolist()
    assert sum(given[i][0] != true[i] for i in range(12)) > 3
    assert all(given[i][0] == true[i] for i in range(12, 200))


def check_fisher(module):
    """Of classes it is the mean of p (1 - p) x^2; of attributes that of (y - p)^2 x^2, and near."""
    p, rng = problem(), common.generator(5)
    x, prob = pixels(p, range(12, 60)).flatten(1), p.model(pixels(p, range(12, 60)))[1].softmax(1)
    want = ((prob * (1 - prob))[:, :, None] * x[:, None] ** 2).mean(0).double()
    for labels in (rng, common.generator(6)):  # the labels are no matter of luck
        got = module.fisher_diagonal(p.model, p.data, p.sets["retain"], labels)["head.weight"]
        assert got.dtype == torch.float64 and torch.allclose(got, want, rtol=1e-4)
    p = problem(multilabel=True)
    r, x = residuals(p, p.sets["retain"], 5)
    got = module.fisher_diagonal(p.model, p.data, p.sets["retain"], common.generator(5))
    want = (r[:, :, None] * x[:, None]).pow(2).mean(0)
    assert torch.allclose(got["head.weight"], want, rtol=1e-4)
    p.data["images"][:] = p.data["images"][0]  # the mean over sampled labels of one image is close
    got = module.fisher_diagonal(p.model, p.data, torch.arange(60).repeat(100), rng)["head.weight"]
    x, prob = pixels(p, [0]).flatten().double(), p.model(pixels(p, [0]))[1].sigmoid()[0].double()
    assert torch.allclose(got, (prob * (1 - prob))[:, None] * x**2, rtol=0.1, atol=1e-4)


def check_labels(module):
    """Of 30 classes each is drawn as often as its probability says, to one of DRAWS parts."""
    z = torch.randn(2000, 30, generator=common.generator(0)).double() * 2
    drawn = list(module.labels_of_the_model(z, False, common.generator(1)))
    share = torch.zeros_like(z)
    for y, weight in drawn:
        share.scatter_add_(1, y[:, None], weight[:, None].double())
    assert len(drawn) == 8 and torch.allclose(share.sum(1), torch.ones(2000).double())
    assert (share - z.softmax(1)).abs().max() <= 2 / 8  # a part at either end
    assert (share - z.softmax(1)).mean(0).abs().max() < 0.005


def check_fisher_noise(module):
    """Variance alpha / F, at most alpha FISHER_CAP: 24,000 weights of each kind."""
    p, F_diagonal = problem(), torch.tensor([[4.0], [0.0]]).repeat(2000, 12).double()
    p.model.head = nn.Linear(12, 4000, bias=False)
    with patch.object(module, "fisher_diagonal", lambda *_: {"head.weight": F_diagonal}):
        student = apply(module, "fisher", p, fisher_alpha=0.01, FISHER_CAP=50.0)
    noise = student.head.weight - p.model.head.weight
    assert noise[::2].var().item() == pytest.approx(0.01 / 4, rel=0.05)
    assert noise[1::2].var().item() == pytest.approx(0.01 * 50, rel=0.05)
    assert abs(noise.mean()) < 0.01


def check_ssd(module):
    """The rule on every weight, from gradients of a loop over all images; nothing grows."""
    p = problem()
    order = torch.randperm(60, generator=common.generator(0))
    p.sets["statistics"] = order  # in any order: batches never mix D_f and D_r

    def squared(*parts):  # batches of 8 would leave a batch of 4, so D_f and D come in sixes
        whole = [part[i : i + 6] for part in parts for i in range(0, len(part), 6)]
        return sum(gradient(p, batch) ** 2 for batch in whole) / len(whole)

    D_f, D_r, old = torch.arange(12), order[order >= 12], flat(p.model)
    new = flat(apply(module, "ssd", p, ssd_alpha=1.2, ssd_lambda=0.5))
    for w, f, d, got in zip(old, squared(D_f), squared(D_r, order[order < 12]), new, strict=True):
        expected = w * min(0.5 * d / f, 1) if f > 1.2 * d else w
        assert got.item() == pytest.approx(expected.item(), rel=1e-4)
    strong = flat(apply(module, "ssd", p, ssd_alpha=1.0, ssd_lambda=100.0))
    assert all((t.abs() <= old.abs() + 1e-9).all() for t in (new, strong))
    assert not torch.equal(new, old)
    assert torch.equal(flat(apply(module, "ssd", p, ssd_alpha=1e9)), old)
    # People's D is a statistic from before the request: read in its own order.
    p.args.forget, whole = "identities", squared(order)
    new = flat(apply(module, "ssd", p, ssd_alpha=1.2, ssd_lambda=0.5, all_pictures=True))
    for w, f, d, got in zip(old, squared(D_f), whole, new, strict=True):
        expected = w * min(0.5 * d / f, 1) if f > 1.2 * d else w
        assert got.item() == pytest.approx(expected.item(), rel=1e-4)
    p.args.forget = "random"
    # alpha p >= 1 selects nothing, whatever the data.
    p.sets["forget"] = torch.arange(8)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert torch.equal(flat(apply(module, "ssd", p, ssd_alpha=8.0)), old)
    assert "can select nothing" in out.getvalue() and "0.000 % of the weights" in out.getvalue()


def check_distillation(module):
    """The mean of common.kl_divergence, for classes and attributes; 0 at equality."""
    rng = torch.Generator().manual_seed(0)
    t, s = (2 * torch.randn(5, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    for T_, shape in itertools.product((1.0, 4.0), ((5,), (5, 4))):
        given = {"targets": torch.zeros(shape)}, types.SimpleNamespace(temperature=T_)
        want = common.kl_divergence(t, s, len(shape) == 2, T_).mean()
        assert torch.allclose(module.distillation(t, s, *given), want)
        assert abs(module.distillation(t, t, *given)) < 1e-12


def check_badt(module):
    """Each image of D_f is pulled to the fresh model, each of D_r to the original."""
    p, bad = problem(), linear()
    nn.init.normal_(bad.head.weight)
    once = dict(unlearn_lr=0.1, unlearn_epochs=1, unlearn_batch_size=100, temperature=1.0)
    with patch.object(module, "build_model", lambda *_, **__: bad):
        with patch.object(module, "descend", wraps=module.descend) as step:
            apply(module, "badt", p, **once)
    x = pixels(p, torch.arange(60))
    teacher = torch.cat([bad(x[:12])[1], p.model(x[12:])[1]])
    step.assert_called_once()
    assert torch.allclose(step.call_args.args[1], kl(teacher, p.model(x)[1]).mean(), rtol=1e-4)


def check_scrub(module):
    """The whole run is a plain loop's, clipped where it ascends; the teacher in eval mode."""
    changes = dict(unlearn_lr=0.6, unlearn_epochs=3, ascent_epochs=2, unlearn_batch_size=20)
    changes |= dict(temperature=2.0, SCRUB_ALPHA=0.7)
    for n_forget in (12, 30):
        p = problem(norm=True)
        p.sets["forget"] = torch.arange(n_forget)
        student = apply(module, "scrub", p, **changes)
        rng = common.generator(0, 0, list(B.METHODS).index("scrub"), 9)
        own = copy.deepcopy(p.model).train().requires_grad_(True)
        optimizer = torch.optim.SGD(own.parameters(), 0.6, momentum=0.9, weight_decay=5e-4)
        for epoch in range(3):
            ascent = torch.randperm(n_forget, generator=rng).split(20) if epoch < 2 else ()
            descent = p.sets["retain"][torch.randperm(48, generator=rng)].split(20)
            for step, batch in enumerate([*ascent, *descent]):
                teacher, z = (m(pixels(p, batch))[1] for m in (p.model, own))
                near, clipped = kl(teacher.detach(), z, 2.0).mean(), step < len(ascent)
                of_labels = 0.99 * F.cross_entropy(z, p.data["targets"][batch])
                optimizer.zero_grad()
                (-near if clipped else 0.7 * near + of_labels).backward()
                if clipped:
                    torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
                optimizer.step()
        assert torch.allclose(flat(student), flat(own), atol=1e-4)


def check_salun(module):
    """The globally largest |gradient| in eval mode move; the others keep every bit, with decay."""
    p, changes = problem(norm=True), dict(unlearn_lr=0.1, unlearn_epochs=3, mask_share=0.25)
    descend, before = module.descend, []

    def note(optimizer, loss):
        before.append(parameters_to_vector(optimizer.param_groups[0]["params"]).detach().clone())
        descend(optimizer, loss)

    with patch.object(module, "descend", note):
        change = flat(apply(module, "salun", p, **changes, DECAY=0.1)) - flat(p.model)
    for theta in before:  # put back after each step, not at the end alone
        assert torch.equal(theta[change == 0], flat(p.model)[change == 0])
    total = sum(gradient(p, batch) for batch in p.sets["forget"].split(8)).abs()
    chosen = total.argsort(descending=True)[: round(0.25 * len(total))]
    assert change.nonzero().flatten().tolist() == sorted(chosen.tolist())


def check_pgu(module):
    """Updates are orthogonal to what the layer sees, with its own stride; norms, biases stay."""
    p = problem(side=6)
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
    layers = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    p.model, kept = Small(layers, nn.Linear(4, 3)).eval(), p.sets["retain"]
    U = module.core_spaces(module.spectra(p.model, p.data, kept), 0.8)
    patches = F.unfold(pixels(p, kept), 3, stride=2, padding=1).transpose(1, 2)
    convolved = (patches @ conv.weight.flatten(1).T + conv.bias).transpose(1, 2)
    assert torch.allclose(convolved, conv(pixels(p, kept)).flatten(2), atol=1e-5)
    _, S, V = np.linalg.svd(patches.reshape(-1, 27).double().numpy(), full_matrices=False)
    k = int((np.cumsum(S) / S.sum() <= 0.8).sum()) + 1
    assert U["features.0"].shape == (27, k) and set(U) == {"features.0", "head"}
    V = torch.from_numpy(V[:k]).float()
    assert torch.allclose(U["features.0"] @ U["features.0"].T, V.T @ V, atol=1e-4)
    changes = dict(pgu_gamma=0.8, unlearn_lr=0.5, unlearn_epochs=2, unlearn_batch_size=12)
    student, own = apply(module, "pgu", p, **changes), copy.deepcopy(p.model).requires_grad_(True)
    x, y = pixels(p, p.sets["forget"]), p.data["targets"][p.sets["forget"]]
    weights = {name: own.get_submodule(name).weight for name in U}
    for lr in (0.5, 0.25):  # a cosine over two epochs
        q = own(x)[1].softmax(1)
        wanted = -(1 - q[torch.arange(12), y] + 0.05).log() + 0.2 * (q * q.log()).sum(1)
        g = torch.autograd.grad(wanted.mean(), list(weights.values()))
        with torch.no_grad():
            for (name, w), d in zip(weights.items(), g, strict=True):
                d = d.flatten(1)
                w -= lr * (d - d @ U[name] @ U[name].T).view_as(w)
    new, old = student.state_dict(), p.model.state_dict()
    for name, w in weights.items():
        assert torch.allclose(new[f"{name}.weight"], w, atol=1e-5)
        d = (new.pop(f"{name}.weight") - old[f"{name}.weight"]).flatten(1)
        assert d.norm() > 1e-4 and (d @ U[name]).norm() < 1e-5 * max(1, d.norm())
    assert all(torch.equal(t, old[k]) for k, t in new.items())  # norms and biases
    sure, before = (m(x)[1].softmax(1)[torch.arange(12), y].mean() for m in (student, p.model))
    assert sure < before


def check_reversed_loss(module):
    """Against its formula; the gradient reaches every attribute (published code: two of them)."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(4, 5, generator=rng, dtype=torch.float64).requires_grad_()
    y, attributes = torch.tensor([0, 4, 2, 2]), torch.randint(0, 2, (4, 5), generator=rng).double()
    of_classes, p = distributions.Categorical(logits=z), z.sigmoid()
    want = -(1 - of_classes.log_prob(y).exp() + 0.05).log() - 0.2 * of_classes.entropy()
    assert module.reversed_loss(z, y).item() == pytest.approx(want.mean().item())
    p_y, entropy = torch.where(attributes == 1, p, 1 - p), distributions.Bernoulli(p).entropy()
    want = -(1 - p_y + 0.05).log() - 0.2 * entropy
    assert module.reversed_loss(z, attributes).item() == pytest.approx(want.mean().item())
    (g,) = torch.autograd.grad(module.reversed_loss(z, attributes), z)
    assert (g.abs() > 1e-6).all()


def check_jit(module):
    """On f(x) = W x the step is a loop's; where W is 3 rotations the loss of 12 is 12 x 3 x 0.5."""
    p = problem(K=12)
    nn.init.orthogonal_(p.model.head.weight, gain=3)
    changes = dict(unlearn_lr=1e-9, jit_sigma=0.1, unlearn_batch_size=12, JIT_NOISES=4)
    with patch.object(module, "descend", wraps=module.descend) as step:
        apply(module, "jit", p, **changes)
    step.assert_called_once()
    # Distances are in normalised pixels, hence 0.5.
    assert step.call_args.args[1].item() == pytest.approx(12 * 3 * 0.5, rel=1e-4)
    p = problem(multilabel=True, norm=True)
    student = apply(module, "jit", p, unlearn_lr=0.1, unlearn_epochs=5)
    assert torch.equal(student.features[1].running_mean, p.model.features[1].running_mean)
    assert student.head.weight.norm() < 0.99 * p.model.head.weight.norm()  # flatter
    p = problem()
    changes = dict(unlearn_lr=0.4, jit_sigma=0.8, unlearn_batch_size=12, JIT_NOISES=3)
    student = apply(module, "jit", p, **changes)
    rng = common.generator(0, 0, list(B.METHODS).index("jit"), 9)
    x = pixels(p, p.sets["forget"][torch.randperm(12, generator=rng)])
    rng.manual_seed(rng.initial_seed())
    own, total = copy.deepcopy(p.model).requires_grad_(True), 0.0
    for _ in range(3):
        noisy = (x + torch.randn(x.shape, generator=rng) * 0.8 * 0.5).clamp(x.min(), x.max())
        for a, b in zip(x, noisy, strict=True):
            away = (own(a[None])[1] - p.model(b[None])[1].detach()).norm()
            total = total + away / ((a - b) / 0.5).norm() / 3
    (g,) = torch.autograd.grad(total, own.head.weight)
    assert torch.allclose(student.head.weight, own.head.weight - 0.4 * g, atol=1e-4)


def check_influence(module):
    """The step is that of the dense Fisher matrix of the data to keep, uphill, as long as said."""
    for forget in ("random", "identities"):
        p = problem(multilabel=True, K=1, forget=forget)
        d_f = p.sets["support" if forget == "identities" else "forget"]
        kept = p.sets["statistics" if forget == "identities" else "retain"]
        student = apply(module, "influence", p, damping=0.02, radius=0.3)
        (r, x), g = residuals(p, kept, 0, 0, 11), gradient(p, d_f)
        want = dense_step(r * with_one(x), g, 0.02)
        moved = flat(student) - flat(p.model)
        want *= 0.3 * flat(p.model).norm() / want.norm()
        assert torch.allclose(moved.double(), want, atol=1e-6)
        assert F.cosine_similarity(want, g, dim=0) < 0.999  # curvature matters here
        assert loss(p, student, d_f) > loss(p, p.model, d_f)


def check_natural(module):
    """Of one output, or of one image (a Kronecker product), the step is the dense F's."""
    for K in (1, 3):
        p, every = problem(multilabel=True, K=K, n=200), torch.arange(200)
        if K == 3:
            p.data["images"][:] = p.data["images"][0]
        curved, (r, x) = module.curvature(p.model, p.data, every, p.args, 5), residuals(p, every, 5)
        torch.manual_seed(1)
        u, v = ({k: torch.randn_like(t) for k, t in p.model.named_parameters()} for _ in range(2))
        for damping in (1e-2, 1.0):
            step = module.natural(curved, v, damping)
            parts = [(t["head.weight"], t["head.bias"][:, None]) for t in (step, v)]
            found, given = (torch.cat(part, 1) for part in parts)
            want = dense_step(r[:, :, None] * with_one(x)[:, None], given, damping)
            assert torch.allclose(found.double(), want, rtol=1e-3, atol=1e-4)
        of_u, of_v = (module.natural(curved, t, 0.1) for t in (u, v))  # the operator is symmetric
        left, right = (sum((a[k] * b[k]).sum() for k in a) for a, b in ((u, of_v), (v, of_u)))
        assert left.item() == pytest.approx(right.item(), rel=1e-4, abs=1e-5)


def with_one(x):
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


class Convolutions(nn.Module):
    """Stride, padding, an activation that works in place, a layer without bias, few classes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.second = nn.Conv2d(5, 4, 2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        x = F.relu(self.second(F.relu(self.first(images), inplace=True)), inplace=True).mean((2, 3))
        return x, self.head(x)


def check_curvature(module):
    """Against each image's own gradients, for tokens, convolutions, attributes and classes.

    With bases, and without any (LARGEST 0), where `second` is the diagonal of F itself; whatever
    the size of a batch.
    """
    torch.manual_seed(0)
    for net in (common.build_model("toy_vit", 2, 16, seed=0).eval(), Convolutions()):
        attributes = isinstance(net, common.Net)
        p = problem(multilabel=attributes, n=12, K=2 if attributes else 3, side=16)
        every, p.model = torch.arange(12), net
        kept = [module.curvature(net, p.data, every, p.args, 0)]
        bf16 = module.curvature(net, p.data, every, types.SimpleNamespace(amp=True), 0)
        g = {k: t.detach() for k, t in net.named_parameters()}
        one, other = (flat_of(module.natural(of, g, 1e-3).values()) for of in (kept[0], bf16))
        assert F.cosine_similarity(one, other, dim=0) > 0.999 and not torch.equal(one, other)
        for constants in (dict(LARGEST=0), dict(FLOWS=1), dict(LARGEST=9), dict(BASIS_IMAGES=5)):
            with patch.multiple(module, **constants):
                kept.append(module.curvature(net, p.data, every, p.args, 0))
        x, theta = pixels(p, every), dict(net.named_parameters())
        probability = net(x)[1].detach().double()
        probability = probability.sigmoid() if attributes else probability.softmax(1)
        drawn = torch.bernoulli(probability, generator=common.generator(0)).float()
        found = [{k: 0.0 for k in of} for of in kept]
        gram = {k: [0.0, 0.0] for k in kept[0]}
        for i in range(12):
            z = net(x[i : i + 1])[1][0]
            terms = -F.binary_cross_entropy_with_logits(z, drawn[i], reduction="none")
            terms = terms.sum()[None] if attributes else z.log_softmax(0)
            for c, log_p in enumerate(terms):
                weight = 1.0 if attributes else probability[i, c]
                d = torch.autograd.grad(log_p, list(theta.values()), retain_graph=True)
                d = dict(zip(theta, d, strict=True))
                for of, total in zip(kept, found, strict=True):
                    for k, (U_out, U_in, _) in of.items():
                        G = d[f"{k}.weight"].flatten(1)
                        G = torch.cat([G, d[f"{k}.bias"][:, None]], 1) if f"{k}.bias" in d else G
                        if of is kept[0]:
                            gram[k][0] += weight * G @ G.T
                            gram[k][1] += weight * G.T @ G
                        G = G if U_out is None else U_out.T @ G
                        G = G if U_in is None else G @ U_in
                        total[k] = total[k] + weight * G.pow(2) / 12
        for of, total in zip(kept, found, strict=True):
            for k, (U_out, _, second) in of.items():
                assert torch.allclose(second.double(), total[k].double(), rtol=1e-3, atol=1e-9), k
                assert (U_out is None) == (of is kept[1] or (of is kept[3] and len(second) > 9))
        step = module.natural(kept[1], g, 0.1)  # without bases, that of a diagonal F
        for k, (_, _, second) in kept[1].items():
            G = g[f"{k}.weight"].flatten(1)
            want = G / (second[:, : G.shape[1]] + 0.1)
            assert torch.allclose(step[f"{k}.weight"].flatten(1), want, rtol=1e-4)
        layers = {k.removesuffix(".weight") for k in theta if "norm" not in k and "weight" in k}
        assert set(kept[0]) == layers
        for k, sums in gram.items():  # and the bases are those of E[G G^T] and E[G^T G]
            for U, M in zip(kept[0][k], sums, strict=False):
                M = U.T @ M.to(U) @ U
                assert (M - M.diag().diag()).abs().max() < 1e-4 * M.max(), k


class Unusual(nn.Module):
    """Layers that curvature must find out about; `bad`: one that it must refuse."""

    def __init__(self, bad=None):
        super().__init__()
        self.bad, self.last = bad, nn.Linear(6, 6)
        self.same = nn.Conv2d(3, 6, 3, padding="same", padding_mode="circular")
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.unused, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, images):
        x = self.last(self.same(images).permute(0, 2, 3, 1))  # (B, H, W, C)
        if self.bad == "twice":
            x = self.last(x)
        self.unused(x if self.bad != "first axis" else x.permute(1, 0, 2, 3))
        x = self.normed(x).mean((1, 2)).relu()
        return x, self.head(x)


def check_unusual_layers(module):
    """Channels last with as many rows as channels, padding, an unused and a computed weight."""
    torch.manual_seed(0)
    p, net, every = problem(n=14, side=6), Unusual(), torch.arange(8)
    with patch.object(module, "LARGEST", 0):
        found = module.curvature(net, p.data, every, p.args, 0)
    assert set(found) == {"last", "same", "unused", "head"} and not found["unused"][2].any()
    theta, used = dict(net.named_parameters()), ["last", "same", "head"]
    total = dict.fromkeys(used, 0.0)
    for image in pixels(p, every):
        for log_p in net(image[None])[1][0].log_softmax(0):
            weights = [theta[f"{k}.weight"] for k in used]
            d = torch.autograd.grad(log_p, weights, retain_graph=True)
            for k, own in zip(used, d, strict=True):
                total[k] = total[k] + log_p.exp().detach() * own.flatten(1).pow(2) / 8
    for k in used:
        assert torch.allclose(found[k][2][:, :-1], total[k], rtol=1e-3, atol=1e-9), k
    for bad, words in (("twice", "last is called twice"), ("first axis", "unused mixes images")):
        with pytest.raises(ValueError, match=words):
            module.curvature(Unusual(bad), p.data, torch.arange(4), p.args, 0)


def test_a_derived_layer_has_no_curvature():
    class Padded(nn.Conv2d):
        pass

    net = nn.Sequential(Padded(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    assert list(B.matrix_layers(net)) == ["1", "2"]


CHECKS = {k.removeprefix("check_"): f for k, f in list(globals().items()) if k[:6] == "check_"}


@pytest.mark.parametrize("name", CHECKS)
def test_exact_properties(name):
    CHECKS[name](B)


# Ways to break a function: {"the check that must fail, the function": [(what is there, what is put
# in its place)]}; one name where both are the same.
TRAIN = "student.train()\n"
# fmt: off
MUTANTS = {
    "ft access": [("{name: name for", '{name: "forget" for')],
    "ft new_optimizer": [(", weight_decay=DECAY", ""), ('== "adam"', '== "no"')],
    "modes ft": [(TRAIN, "pass\n")], "modes randl": [(TRAIN, "pass\n")],
    "modes amnesiac": [(TRAIN, "pass\n")],
    "modes ssd": [("I_f = importance", "student.train(); I_f = importance")],
    "modes influence": [("theta = dict(", "student.train(); theta = dict(")],
    "modes badt": [(".eval()", ""), ("3 * args.seed + 2", "2 * args.seed"), (TRAIN, "pass\n"),
             ("augmented(data, batch, args, rng)", "raw_batch(data, batch)")],
    "modes scrub": [(TRAIN, "pass\n")],
    "modes ga": [("data, batch, args)", "data, batch, args, rng)")],
    "modes salun": [("args, rng)\n        torch", "args)\n        torch")],
    "seeds run": [("generator(args.seed,", "generator(0,"), ("args.split_seed, list", "0, list")],
    "seeds influence": [("(args.seed, args.split_seed, 11)", "(0, 0, 11)")],
    "ga": [("-loss_of", "loss_of"), ("    for _ in", f"    {TRAIN}    for _ in")],
    "ga access": [('= "support"', '= "forget"')],
    "randl": [('("forget", "retain")', '("retain", "forget")'),
              ('name == "forget"', 'name == "nothing"')],  # true labels are kept
    "amnesiac": [("randint(1,", "randint(0,"),  # the true label may be drawn
                 ("labels[forget] = random_labels", "random_labels")],  # nor an attribute
    "amnesiac loss_of": [("if labels is None else labels", "")],
    "fisher fisher_diagonal": [(".pow(2).sum(0)", ".sum(0).pow(2)")],  # of the batch
    "fisher_noise fisher": [("variance.sqrt()", "variance"), (".clamp(max=FISHER_CAP)", "")],
    "ssd": [("f > args", "f < args"), (".clamp(max=1)", ""), ("[D[~inside], D[inside]]", "[D]"),
            (' & (args.forget != "identities")', "")],
    "fisher labels_of_the_model": [("p[:, c]", "torch.ones(B)")],
    "labels labels_of_the_model": [("draw + torch.rand", "torch.rand"), ("/ DRAWS\n", "/ 4\n")],
    "ssd importance": [("part.tensor_split(max(1, round(len(part) / size)))", "part.split(8)"),
                       ("g**2", "g.abs()"), (" * len(batch) / images", "")],
    "distillation": [("args.temperature", "1.0"), (".mean()", ".sum()"),
                     ("kl_divergence(teacher, student", "kl_divergence(student, teacher")],
    "badt": [("((bad, to_forget), (good, ~to", "((good, to_forget), (bad, ~to")],
    "salun": [("    for batch", f"    {TRAIN}    for batch"),
              ("size.topk", "(-size).topk")],
    "salun randl": [("torch.where(m, p, old, out=p)", "pass")],
    "scrub": [("(-near)", "near"),
              ("SCRUB_ALPHA * distillation", "0 * distillation"),
              ("SCRUB_GAMMA * task", "task"), ("parameters(), 1.0)", "parameters(), 1e9)"),
              ("deepcopy(student)", "deepcopy(student).train()")],
    "pgu": [("w -= lr", "w += lr"), ("math.cos(math.pi * epoch / len(epochs(args)))", "1"),
            ("(d - (d @ U", "((d @ U")],  # along the kept space
    "pgu kept_data": [('D[~torch.isin(D, have["forget"])]', "D")],
    "pgu patches": [("module.stride)", "1)")],
    "pgu core_spaces": [(".sqrt()", "")],  # energy for singular values
    "reversed_loss": [("- 0.2 * entropy", "+ 0.2 * entropy"), ("+ 0.2 * (log_p", "- 0.2 * (log_p")],
    "jit": [("args.jit_sigma * ", ""), (".clamp(x.min(), x.max())", ""),
            ("torch.no_grad", "torch.enable_grad"), ("ratio.sum()", "ratio.mean()"),
            ("((noisy - x) / student.std)", "(noisy - x)"),
            ("    for _ in epochs", f"    {TRAIN}    for _ in epochs"),
            ("loss = loss + ratio", "loss = loss - ratio")],
    "influence": [("p += c", "p -= c"), ("natural(F_kept, g, args.damping)", "g"),
                  ("theta_long / long", "1 / long")],
    "influence kept_data": [('D[~torch.isin(D, have["forget"])]', "D")],
    "natural": [("(second.to(G) + damping)", "(second.to(G) + damping).sqrt()")],
    "natural curvature": [("eigh(t.float())[1]", "torch.eye(len(t))")],
    "curvature": [
        (" / len(indices)", ""), ("if first[k] else x for", "if False else x for"),
        ("turned(g[k], U_out.get(k))", "g[k]")],
    "unusual_layers places": [("isinstance(module, nn.Conv2d)", "g.ndim == 4")],
    "curvature factors": [("(a @ a.mT) @ g", "g"), ("= G.mT, G\n", "= G.mT, a\n")],
    "curvature flows": [
        ("value=1.0", "value=0.0"), ("z.clone()", "z"), (" * weight.sqrt().to(logits)", ""),
        (" if multilabel else 1)  #", " if False else 1)  #")],
    "curvature squares": [
        ("addcmul_(G, G)", "add_(G)"), ("turned(own_g.mT @ own_a, U_in)", "(own_g.mT @ own_a)")],
    "curvature labels_of_the_model": [
        ("torch.bernoulli(logits.sigmoid(), generator=rng)", "(logits > 0)")],
}
# fmt: on
MUTANTS = [(where, *edit) for where, edits in MUTANTS.items() for edit in edits]


@pytest.mark.parametrize("where, old, new", MUTANTS)
def test_mutants_are_caught(where, old, new):
    mutant = mutated(B, old, new, where.split()[-1])
    with pytest.raises(AssertionError):
        CHECKS[where.split()[0]](mutant)


# --------------------------------------------------------------------------------------------------
# The flags of the methods
# What papers, their code and our searches gave: no rewriting may change it. Columns: digits,
# toyfaces, celeba, celebahq, cifar10 (the three in the middle forget identities); one value: all.
# fmt: off
KEPT = {
    "ft": dict(lr=(0.03, 0.1, 1e-3, 1e-3, 0.01), epochs=(10, 10, 5, 5, 10), by="sgd",
               batch=(64, 64, 32, 32, 256)),
    "randl": dict(lr=(0.001, 0.03, 0.001, 0.001, 0.01), epochs=(5, 5, 5, 5, 10), by="sgd",
                  batch=(64, 64, 32, 32, 256)),
    "ga": dict(lr=(0.03, 0.3, 0.003, 0.003, 5e-4), epochs=(5, 1, 1, 1, 5),
               batch=(64, 64, 64, 64, 256)),
    "amnesiac": dict(lr=(3e-4, 1e-3, 1e-4, 1e-4, 1e-4), epochs=3, by="adam",
                     batch=(64, 64, 128, 128, 128)),
    "fisher": dict(fisher_alpha=(1e-6, 1e-6, 1e-6, 1e-6, 1e-9)),
    "ssd": dict(batch=(64, 64, 128, 128, 64), ssd_alpha=(3.0, 10.0, 50.0, 50.0, 3.0),
                ssd_lambda=(1.0, 1.0, 2.0, 0.1, 1.0)),
    "badt": dict(lr=(1e-3, 1e-5, 1e-4, 1e-4, 1e-4), epochs=(1, 1, 5, 5, 1), temperature=1.0,
                 batch=(64, 64, 32, 32, 256), by=("adam", "adam", "sgd", "sgd", "adam")),
    "salun": dict(lr=(0.003, 0.01, 0.001, 0.001, 0.013), epochs=(5, 5, 5, 5, 10), by="sgd",
                  batch=(64, 64, 32, 32, 256), mask_share=(0.2, 0.5, 0.5, 0.5, 0.5)),
    "scrub": dict(lr=(0.01, 0.01, 0.005, 0.01, 5e-4), epochs=(5, 5, 10, 10, 3), temperature=4.0,
                  batch=(64, 64, 32, 32, 256), ascent_epochs=(2, 2, 5, 5, 2), by="sgd"),
    "pgu": dict(lr=(0.01, 1.0, 0.1, 0.1, 0.01), epochs=(10, 10, 5, 5, 10), pgu_gamma=0.9,
                batch=(64, 64, 128, 128, 64)),
    "jit": dict(lr=(1e-4, 0.03, 0.01, 0.01, 1e-4), epochs=1, batch=(64, 64, 128, 128, 64),
                jit_sigma=(0.5, 0.5, 30.0, 30.0, 0.5)),
    "influence": dict(batch=64, damping=(1e-5, 0.01, 0.01, 0.01, 1e-5), radius=0.03),
    "retrain": {},
}
# fmt: on
LOOP = {"lr": "unlearn_lr", "epochs": "unlearn_epochs", "batch": "unlearn_batch_size"}
LOOP["by"] = "unlearn_optimizer"


def test_the_values_of_the_methods_are_kept():
    for column, dataset in enumerate(("digits", "toyfaces", "celeba", "celebahq", "cifar10")):
        ids = ["--ids", "5"] if column in (1, 2, 3) else []
        args = B.parse_args(["--dataset", dataset, *ids])
        for method, record in B.METHODS.items():
            kept = {LOOP.get(flag, flag): value for flag, value in KEPT[method].items()}
            named = set(record["search"]).union(*record["on"].values())
            assert set(kept) == set(record["flags"]) and named <= set(kept)
            for flag, value in kept.items():
                value = value[column] if isinstance(value, tuple) else value
                assert getattr(B.own_args(method, args), flag) == value, (dataset, method, flag)
    assert (B.DECAY, B.FISHER_CAP, B.SCRUB_ALPHA, B.SCRUB_GAMMA) == (5e-4, 1e3, 0.001, 0.99)
    assert (B.JIT_NOISES, B.EXACT_CLASSES, B.DRAWS) == (25, 20, 8)
    own = B.own_args("ssd", B.parse_args(["--dataset", "celebahq", "--ids", "50"]))
    assert (own.ssd_alpha, own.ssd_lambda) == (10.0, 0.5)  # METAUNLEARN's authors, of 50 people


def test_the_command_line_wins_over_a_methods_values():
    args = B.parse_args("--unlearn-lr 0.5 --method salun scrub".split())
    own = B.own_args("salun", args)
    assert (own.unlearn_lr, own.mask_share) == (0.5, 0.2)
    assert B.own_args("scrub", args, unlearn_lr=0.25).unlearn_lr == 0.25  # as a search sets it
    faces = "--dataset celebahq --method jit ga --unlearn-batch-size 16"
    own = B.own_args("jit", B.parse_args(faces.split()))
    assert (own.unlearn_batch_size, own.jit_sigma) == (16, 30.0)


BAD = """
--rho 0 | --rho
--mask-share 0 | --mask-share
--damping 0 | --damping
--unlearn-lr nan | --unlearn-lr
--ssd-lambda -1 | --ssd-lambda
--method none | invalid choice
--method ssd --unlearn-lr 1 | not used by ssd
--method ga --radius 2 | not used by ga
--method retrain --unlearn-epochs 2 | not used by retrain
--search --forget class --forget-classes 1 --label-noise 0 | --search
--all-pictures | --all-pictures is about identities
--all-pictures --dataset toyfaces --method ft | not used by ft
--save model.pt | --save is about one model
--save model.pt --method ga ft | --save is about one model
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_input_gets_one_line(line, capsys):
    flags, words = line.split(" | ")
    refused(capsys, words, B.parse_args, flags.split())


SUPPORTED = ("ga", "ssd", "pgu", "jit", "influence")  # with identities they have S for D_f


@pytest.mark.parametrize("whole", (False, True))
def test_a_method_is_handed_its_sets_and_s_or_all_pictures(whole, monkeypatch):
    p, handed = problem(multilabel=True), {}
    for method, record in B.METHODS.items():
        monkeypatch.setitem(record, "run", lambda student, data, have, *_: handed.update(have))
        args = B.own_args(method, p.args, forget="identities", all_pictures=whole)
        handed.clear()
        B.run(method, p.model, p.data, p.sets | {"split": {"retain": []}}, args)
        more = {"stored", "split"} if method == "retrain" else {"stored"}
        assert set(handed) == {*record["touches"], *more}
        of_support = method in SUPPORTED and not whole
        for name in record["touches"]:
            true = "support" if name == "forget" and of_support else name
            assert handed[name] is p.sets[true] and B.access(method, args)[name] == true
        assert evaluate.flags_of(args)["all_pictures"] == whole


def test_statistics_are_of_all_of_d_whatever_rho():
    split = {"forget": list(range(100)), "retain": list(range(100, 300))}
    sets = B.sets_of(split, B.parse_args(["--rho", "0.5"]))
    assert sets["statistics"].tolist() == list(range(300)) and len(sets["retain"]) == 100


def test_a_simulated_request_has_d_r_without_its_people():
    sets = {"retain": torch.arange(4, 10), "forget": torch.arange(4), "statistics": "D"}
    found = B.simulated_sets({"support": [2, 7], "sets": {"forget": [3, 8]}}, sets)
    found = {name: part if name == "statistics" else part.tolist() for name, part in found.items()}
    kept = [4, 5, 6, 9, 0, 1]
    assert found == {"support": [2, 7], "forget": [3, 8], "retain": kept, "statistics": "D"}


def somebodys(K=3, multilabel=False):
    """A net of plain torch, and the three sets as tensors."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, K)).eval()
    sets = []
    for n in (12, 40, 24):
        labels = torch.randint(2, (n, K)).float() if multilabel else torch.randint(K, (n,))
        sets.append((torch.randn(n, 3, 8, 8), labels))
    return net, *sets


@pytest.mark.parametrize("method", [method for method in B.METHODS if method != "retrain"])
def test_somebodys_own_model_unlearns_and_no_file_is_written(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for multilabel in (False, True):
        net, D_f, D_r, _ = somebodys(multilabel=multilabel)
        before = copy.deepcopy(net.state_dict())
        without = B.forget(method, net, D_f, D_r)
        assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
        assert type(without) is nn.Sequential and without(D_f[0]).shape == (12, 3)
        assert not torch.equal(flat(without), flat(net)) and flat(without).requires_grad
    assert not list(tmp_path.iterdir())


def test_of_somebodys_own_model_the_step_is_the_same_and_flags_are_searched(monkeypatch):
    net, D_f, D_r, D_v = somebodys()
    leaf = copy.deepcopy(net)
    g = torch.autograd.grad(F.cross_entropy(leaf(D_f[0]), D_f[1]), list(leaf.parameters()))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*D_f), 5)
    for given in (D_f, loader, loader.dataset):
        without = B.forget("ga", net, given, unlearn_lr=0.5, unlearn_epochs=1)
        assert torch.allclose(flat(without), flat(net) + 0.5 * parameters_to_vector(g), atol=1e-6)
    with patch.object(evaluate, "search", wraps=evaluate.search) as search:
        monkeypatch.setattr(evaluate, "TRIES", 2)
        found = B.forget("scrub", net, D_f, D_r, D_v, ascent_epochs=1)
    assert list(search.call_args.args[0]) == ["unlearn_lr", "unlearn_epochs"]
    chosen = {"unlearn_lr": 0.001, "unlearn_epochs": 2}
    with patch.object(evaluate, "search", return_value=(chosen, {})) as search:
        found = B.forget("scrub", net, D_f, D_r, D_v, ascent_epochs=1)
    by_hand = B.forget("scrub", net, D_f, D_r, ascent_epochs=1, **chosen)
    assert torch.equal(flat(found), flat(by_hand))  # what is found is used
    with pytest.raises(TypeError, match="no {'radius'}"):
        B.forget("ga", net, D_f, radius=1.0)
    with pytest.raises(TypeError, match="needs D_r"):
        B.forget("ft", net, D_f)
    with pytest.raises(TypeError, match="needs D_r"):
        B.forget("ga", net, D_f, D_v=D_v)  # to search
    wrapped = common.Own(net, "5")
    assert torch.equal(wrapped(D_f[0])[0], net[:5](D_f[0])) and wrapped.width == 4
    fresh = wrapped.untrained(1)
    pairs = zip(fresh.parameters(), net.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)


def test_somebodys_own_model_may_drop_out_have_spare_layers_and_refuse_empty_batches():
    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare, self.drop = nn.Linear(192, 8), nn.Linear(8, 5), nn.Dropout(0.5)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.drop(self.body(x.view(x.size(0), -1)).relu()))

    _, D_f, D_r, _ = somebodys()
    torch.manual_seed(0)
    net, few = Unusual().eval(), tuple(t[:2] for t in D_f)
    with pytest.raises(RuntimeError):
        net(D_f[0][:0])
    for method in [method for method in B.METHODS if method != "retrain"]:
        flags = {k: 4 for k in B.METHODS[method]["flags"] if k == "unlearn_batch_size"}
        torch.manual_seed(1)
        one = B.forget(method, net, few, D_r, **flags)
        after = torch.rand(())
        torch.manual_seed(1)
        assert method == "badt" or torch.equal(after, torch.rand(()))  # the caller's generator
        torch.manual_seed(2)
        assert torch.equal(flat(one), flat(B.forget(method, net, few, D_r, **flags))), method
        assert torch.equal(one.spare.bias, net.spare.bias) or method in ("fisher", "badt"), method
    # One number, which mixes with images on any device.
    assert common.Own(net, "head").std.ndim == 0


# --------------------------------------------------------------------------------------------------
# All of them, on real files


def run_all(flags, folder):
    """Run every method once, and note which images it reads while it unlearns."""
    reads, run = {}, B.run
    with record_reads() as read:

        def note_reads(method, *rest):
            begin = len(read)
            both = run(method, *rest)
            reads[method] = set(np.concatenate(read[begin:]).tolist())
            return both

        flags = [*places(folder), *flags]
        with patch.object(B, "run", note_reads):
            results = B.main([*flags, "--unlearn-epochs", "1", "--method", *B.METHODS])
    results = {method: results[record["label"]] for method, record in B.METHODS.items()}
    split = torch.load(next(folder.rglob("original-seed0.pt")), weights_only=True)["indices"]
    run = dict(flags=flags, folder=folder, results=results, reads=reads, split=split)
    return types.SimpleNamespace(**run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small):
    """Short runs of all methods under both protocols."""
    digits = ["--dataset", "digits", "--epochs", "8", "--rho", "0.5", "--train-images", "600"]
    faces = ["--dataset", small, "--ids", "4", "--epochs", "3", "--batch-size", "32"]
    protocols = {"random": digits, "identities": faces}
    return {key: run_all(own, tmp_path_factory.mktemp(key)) for key, own in protocols.items()}


def opened(run, *flags):
    """The arguments, data, split and original model of a run of `trained`."""
    args = B.parse_args([*run.flags, *flags])
    args.amp = False
    data, split = T.open_data(args, CPU)
    return args, data, split, T.train("original", data, split, args)[0]


@pytest.mark.parametrize("protocol", ("random", "identities"))
@pytest.mark.parametrize("method", B.METHODS)
def test_nothing_is_read_beyond_access(trained, protocol, method):
    run, touches = trained[protocol], B.METHODS[method]["touches"]
    read, split, rho = run.reads[method], run.split, 0.5 if protocol == "random" else 1
    of_support = protocol == "identities" and method in SUPPORTED
    may = {"retain": D.reachable(split, rho, 0), "statistics": split["retain"] + split["forget"]}
    may["forget"] = split["support" if of_support else "forget"]
    if method == "retrain":  # it is trained as the gold model is: on D_r, chosen on D_v
        may["retain"] = split["retain"] + split["val"]
    assert read and read <= set().union(*(may[name] for name in touches))
    assert "forget" in touches or not read & set(split["forget"])
    assert not of_support or set(split["support"]) <= read
    if protocol == "identities" and method in ("ga", "jit"):
        assert read == set(split["support"])
    names = {"forget": "support" if of_support else "forget", "statistics": "statistics"}
    names["retain"] = "retain" if method == "retrain" else f"retain (rho {rho})"
    assert run.results[method]["access"] == {"unlearning": [names[name] for name in touches]}


def test_result_files_are_as_every_script_writes_them(trained):
    keys = "name dataset setting seed split_seed split_hash flags access metric metrics seconds"
    keys += " passes retrain_passes"
    for protocol, run in trained.items():
        for method, result in run.results.items():
            (path,) = (run.folder / "out").rglob(f"{method}-seed0.json")
            assert path.parent.name == f"{result['dataset']}-{result['setting']}"
            assert json.loads(path.read_text()) == result and result["name"] == method
            assert set(result) == set(keys.split()) | set(common.provenance(CPU))
            assert set(result["seconds"]) == {"train", "retrain", "unlearn", "evaluate"}
            rows = result["metrics"]
            assert set(rows) == {"original", "retrained", "unlearned"}
            assert all(("mi" in row) == (protocol == "random") for row in rows.values())
            assert 0 <= evaluate.compare(rows)["unlearned"]["tow"] <= 1
            args = B.parse_args([*run.flags, "--unlearn-epochs", "1"])
            own = evaluate.flags_of(B.own_args(method, args))
            assert result["flags"] == own | {"amp": False}  # which the device decided
            (path,) = (run.folder / "ckpt").rglob(f"{method}-seed0.pt")
            saved = common.load_checkpoint(path, "model", split=result["split_hash"])
            assert saved["which"] == "unlearned"


def test_a_result_is_printed_again_or_refused_or_made_anew(trained, capsys):
    own = [*trained["random"].flags, "--name", "kept", "--unlearn-lr"]
    first = B.main([*own, "0.02", "--method", "ga"])["GA"]
    (path,) = trained["random"].folder.rglob("ga-kept-seed0.json")
    plain = path.with_name("ga-seed0.json").read_text()
    with patch.multiple(B, train_both=None, run=None):  # nothing is trained
        capsys.readouterr()
        assert B.main([*own, "0.02", "--method", "ga"]) == {"GA": first}
        out = capsys.readouterr().out
        assert "--overwrite" in out and "\nGA" in out and "\nRetrained (gold)" in out
        for flags, words in (("0.03", "--unlearn-lr 0.02"), ("0.02 --rho 0.25", "--rho 0.5")):
            for method in ("ga", "ft ga"):  # before FT is run
                line = [*own, *flags.split(), "--method", *method.split()]
                refused(capsys, f"made with {words}", B.main, line)
    other = B.main([*own, "0.03", "--method", "ga", "--overwrite"])["GA"]
    assert first["name"] == other["name"] == "ga-kept" and other["metrics"] != first["metrics"]
    assert json.loads(path.read_text()) == other
    assert path.with_name("ga-seed0.json").read_text() == plain
    with patch.object(B, "run", wraps=B.run) as run:  # of two methods, the one that is missing
        results = B.main([*own, "0.03", "--method", "ga", "ft"])
    run.assert_called_once()
    assert run.call_args.args[0] == "ft" and list(results) == ["GA", "FT"]
    assert results["GA"] == other


def test_retrain_is_the_gold_model_of_another_seed(trained, tmp_path):
    run = trained["identities"]
    args, data, split, _ = opened(run, "--seed", "1000", "--checkpoint-dir", str(tmp_path))
    expected = T.train("gold", data, split, args)[0].state_dict()  # from scratch: nothing is there
    retrained = weights(run.folder, "retrain")
    assert all(torch.equal(expected[k], t) for k, t in retrained.items())
    for which in ("gold", "original"):
        other = weights(run.folder, which)
        shared = {k for k, t in retrained.items() if (t == other[k]).float().mean() > 0.01}
        assert shared == {"mean", "std"}  # of the pixels
    assert run.results["retrain"]["access"] == {"unlearning": ["retain"]}
    assert run.results["retrain"]["passes"] == run.results["retrain"]["retrain_passes"] > 0
    assert B.parse_args([]).method == [method for method in B.METHODS if method != "retrain"]
    assert B.parse_args(["--method", "all", "retrain"]).method == list(B.METHODS)
    again = B.main([*run.flags, "--method", "retrain", "--overwrite"])["Second gold"]
    assert again["passes"] == again["retrain_passes"]  # though it was only loaded
    assert again["seconds"]["unlearn"] == run.results["retrain"]["seconds"]["unlearn"] > 0.01
    part = B.main([*trained["random"].flags, "--method", "retrain", "--overwrite"])["Second gold"]
    assert part["flags"]["rho"] < 1 and part["passes"] == part["retrain_passes"]  # D_r is whole


def test_search_reads_neither_test_set_nor_gold(trained):
    """With rho below 1 the images that judge are never trained on."""
    for protocol, run in trained.items():
        flags = ("--method", "ft", "--unlearn-epochs", "1", "--search")
        args, data, split, model = opened(run, *flags)
        sets, trained_on = B.sets_of(split, args), []

        def run_one(method, model, data, have, own, trained_on=trained_on):
            trained_on += have["retain"].tolist()
            return model, 0.0, 0.0

        with record_reads() as read, patch.multiple(B, train=None, run=run_one):
            best, record = B.search("ft", model, data, split, sets, args)
        read = set(np.concatenate(read).tolist())
        assert read and not read & set(split["test"]) and record["chosen"] == best
        assert protocol == "random" or not read & set(split["support"])
        if protocol == "random":
            judged_by = set(B.reachable(split, args.rho, 0)) - set(trained_on)
            assert len(judged_by) == 30 and judged_by <= read
            assert not set(trained_on) & read


def test_search_of_a_method_that_reads_d_r_passes_over_it_a_fifth_as_often(trained, monkeypatch):
    bounds = {}

    def searched(start, distance, nothing, args, partial, most):
        bounds[method] = dict(most)
        judges = B.sets_of(split, args)["judges"].tolist()
        judge = evaluate.judging(model, None, data, split, judges, args)
        assert nothing == judge(lambda: model)
        return start, {}

    monkeypatch.setattr(evaluate, "search", searched)
    args, data, split, model = opened(trained["random"], "--search")
    args.epochs = 7
    sets = {"forget": 20, "retain": 55, "statistics": 200}
    sets = B.sets_of(split, args) | {name: torch.arange(n) for name, n in sets.items()}
    for method in ("ft", "scrub", "pgu", "ga"):
        B.search(method, model, data, split, sets, args)
    # 0.2 * 7 = 1.4 passes over 200 images are 280: epochs of 55, of 75, of 20.
    most = {"ft": 5, "scrub": 3, "pgu": 14, "ga": 14}
    assert bounds == {method: {"unlearn_epochs": n} for method, n in most.items()}


def test_search_computes_a_stored_statistic_once_and_finds_the_same(trained, monkeypatch):
    monkeypatch.setattr(evaluate, "TRIES", 2)
    for protocol, run in trained.items():
        args, data, split, model = opened(run, "--method", "ssd", "pgu", "--unlearn-epochs", "1")
        tries = 2 * (3 if protocol == "identities" else 1)
        # SSD also computes the importance for each request, which is no statistic of the data.
        counts = [("ssd", "importance", 1 + tries, 2 * tries), ("pgu", "spectra", 1, tries)]
        counts += [("fisher", "fisher_diagonal", tries // 2, tries)]  # once for each D_r
        for method, statistic, *wanted in counts:
            with patch.object(B, statistic, wraps=getattr(B, statistic)) as computed:
                once = B.search(method, model, data, split, B.sets_of(split, args), args)
                n = computed.call_count
                with patch.object(B, "stored", lambda have, key, compute: compute()):
                    again = B.search(method, model, data, split, B.sets_of(split, args), args)
            assert once == again and [n, computed.call_count - n] == wanted


def test_the_ascent_step_is_chosen_by_simulated_tow(trained):
    """METAUNLEARN's bar: one step of gradient ascent on S, of the size that ToW finds best."""
    run = trained["identities"]
    _, data, split, model = opened(run)
    args = T.parse_args(run.flags[:2] + run.flags[4:])  # without --out: no flag of baselines.py
    args.amp, args.tries = False, 12  # which metaunlearn.py's flags bring
    student, step, problems = B.ascent_step(model, data, split, args)

    def ascended(support, size):
        theta, S = dict(model.named_parameters()), torch.tensor(support)
        losses = common.task_losses(model(D.raw_batch(data, S))[1], data["targets"][S])
        g = torch.autograd.grad(losses.mean(), list(theta.values()))
        theta_u = {k: t + size * d for (k, t), d in zip(theta.items(), g, strict=True)}
        return common.with_parameters(model, theta_u)

    tow = {}
    for size in (step / 1.5, step, step * 1.5):
        models = iter([ascended(problem["support"], size) for problem in problems])
        tow[size] = evaluate.simulated_tow(lambda _, m=models: next(m), problems, data, False)
    assert tow[step] == max(tow.values()) and len(problems) == 3 and not student.training
    expected = ascended(split["support"], step).state_dict()
    assert all(torch.allclose(t, expected[k], atol=1e-5) for k, t in student.state_dict().items())
    # A run of METAUNLEARN with other flags does not search again, if it may resume.
    for args.resume in (True, False):
        args.preset, args.eta = "another", 5.0
        with patch.object(evaluate, "simulated_tow", side_effect=evaluate.simulated_tow) as judged:
            assert B.ascent_step(model, data, split, args)[1] == step
        assert (judged.call_count > 1) == (not args.resume)  # once for the original model


def test_search_and_plot_and_save_and_dry_run_from_the_command_line(trained, capsys):
    run = trained["random"]
    once = [*run.flags, "--unlearn-epochs", "1", "--search", "--tries", "2", "--plot"]
    once += ["--method", "ga"]
    assert B.parse_args([]).tries == 12  # as README says
    results = B.main([*once, "ft", "--name", "searched"])
    for method, result in zip(("ga", "ft"), results.values(), strict=True):
        assert result["name"] == f"{method}-searched" and len(result["search"]) == 2
        best = min(result["search"], key=lambda tried: tried["distance"])
        assert result["chosen"] == {"unlearn_lr": best["unlearn_lr"]} and result["passes"] > 0
        assert result["access"]["choosing flags"] == ["forget", "retain (rho 0.5)", "val"]
    assert len(list(run.folder.rglob("*-searched-seed0.png"))) == 2
    assert not list(run.folder.rglob("*.tries"))  # of use to an interrupted search alone
    asked = [*once, "--name", "searched", "--tries", "3"]
    refused(capsys, "was made with --tries 2, not 3; add --name", B.main, asked)
    # The model that was judged is the one that is handed out.
    args, data, split, model = opened(run, "--search")
    judges, ft = B.sets_of(split, args)["judges"].tolist(), copy.deepcopy(model)
    ft.load_state_dict(weights(run.folder, "ft-searched"))
    got = evaluate.judging(model, None, data, split, judges, args)(lambda: ft)
    assert best["distance"] == pytest.approx(got, abs=1e-5)
    lr, saved = results["GA"]["chosen"]["unlearn_lr"], str(run.folder / "ga.pt")
    result = B.main([*once, "--unlearn-lr", str(lr), "--name", "given", "--save", saved])["GA"]
    assert result["search"] == [] and result["chosen"] == {}  # a given flag is not searched
    assert result["flags"]["unlearn_lr"] == lr
    assert result["metrics"] == results["GA"]["metrics"]
    assert common.load_checkpoint(saved, "model")["which"] == "unlearned"
    dry = B.main([*run.flags, "--dry-run", "--method", *B.METHODS])
    assert len(dry) == len(B.METHODS) and all(r["setting"][-4:] == "-dry" for r in dry.values())


def test_search_with_identities_says_that_it_read_all_of_d_r(trained):
    flags = [*trained["identities"].flags, "--method", "ga", "--search", "--name", "half"]
    found = B.main([*flags, "--rho", "0.5", "--tries", "1"])["GA"]["access"]
    assert found == {"unlearning": ["support"], "choosing flags": ["forget", "retain", "val"]}


def test_a_method_that_diverges_is_left_out_of_a_table_and_fatal_alone(trained, capsys):
    with pytest.raises(FloatingPointError, match=r"influence diverged.*--radius.*--damping"):
        apply(B, "influence", problem(), radius=1e39)  # beyond float32; it names its own flags
    flags = [*trained["random"].flags, "--name", "far", "--unlearn-lr", "1e3", "--method", "ft"]
    with patch.object(B, "DECAY", 1e3):
        assert set(B.main([*flags, "fisher"])) == {"Fisher"}
        assert "ft diverged" in capsys.readouterr().out
        refused(capsys, "ft diverged; lower its step (--unlearn-lr", B.main, flags)
        refused(capsys, "no method is left", B.main, [*flags, "randl"])
    refused(capsys, "leaves nothing of D_r", B.main, [*flags, "--rho", "1e-6"])
    one = "ga --rho 0.002 --search --name one".split()  # it would have nothing to judge by
    refused(capsys, "leaves 1 of D_r", B.main, [*flags, *one])
    refused(capsys, "no flag of its own", B.main, ["--method", "retrain", "--search"])
