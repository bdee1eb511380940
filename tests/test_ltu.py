"""LTU against finite differences, brute force, scikit-learn, and itself with a flag changed.

python -m pytest tests/test_ltu.py
"""

import argparse
import copy
import itertools
import json
import pathlib
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import nn
from torch.func import functional_call

import common
import data as D
import ltu as L
import train as T

ROOT = pathlib.Path(__file__).parent.parent


class Tiny(nn.Module):
    """A smooth model with or without batch norm, small enough for a finite difference of every parameter."""

    def __init__(self, norm: bool, K=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, bias=not norm)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.head = nn.Linear(3, K)

    def forward(self, images):
        features = F.gelu(self.norm(self.conv(images))).mean((2, 3))
        return features, self.head(features)


def problem(norm=True, multilabel=False, **changes):
    """A tiny model, four MI models and one batch of each set, in float64."""
    args = L.parse_args([])
    args.amp = False
    for key, value in ({"alpha": 0.7, "support_size": 5} | changes).items():
        setattr(args, key, value)
    net = Tiny(norm).double().train()
    rng = torch.Generator().manual_seed(1)
    k, labels = 5, lambda n: torch.randint(2, (n, 3), generator=rng).float() if multilabel else torch.randint(3, (n,), generator=rng)
    images = lambda n: torch.rand(n, 3, 5, 5, generator=rng, dtype=torch.float64)
    batch = {
        "iteration": 0,
        "S": images(k),
        "Q": images(3 * k),
        "y_rand": labels(k),
        "y": labels(k),
        "y_Q": labels(3 * k),
        "attacks": [0, 2],
    }
    attacks = []
    for number, kind in enumerate(L.KINDS):
        torch.manual_seed(number)
        attack = L.MIModel(kind, L.signals(kind, torch.zeros(2, 3), batch["y"][:2]).shape[1]).double().requires_grad_(False)
        attack.mean.normal_(0, 0.3)
        for q in attack.parameters():
            q *= 3  # far from linear, so that second order counts
        attacks.append(attack)
    theta = {n: p.detach() for n, p in net.named_parameters()}
    return types.SimpleNamespace(args=args, net=net, batch=batch, attacks=attacks, theta=theta)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def objective(p, feedback, alpha=None):
    """Eq. (4) of either feedback as a function of the flat parameter vector, written again without the project's functions."""
    alpha = p.args.alpha if alpha is None else alpha
    names, shapes = list(p.theta), [t.shape for t in p.theta.values()]

    def output(vector, images):
        theta = dict(
            zip(names, (part.view(s) for part, s in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)), strict=True)
        )
        return functional_call(copy.deepcopy(p.net), theta, (images,))[1]

    def task(logits, y):
        if y.ndim == 2:
            return -(y * F.logsigmoid(logits) + (1 - y) * F.logsigmoid(-logits)).mean()
        return -logits.log_softmax(1)[torch.arange(len(y)), y].mean()

    if feedback == "remember":
        tune = lambda vector: task(output(vector, p.batch["S"]), p.batch["y_rand"])
        Q, y_Q = p.batch["Q"], p.batch["y_Q"]
        k = len(Q) // 3
        # one forward pass for the three sets (batch norm sees them together), three means, summed
        test = lambda vector: sum(task(output(vector, Q)[i * k : (i + 1) * k], y_Q[i * k : (i + 1) * k]) for i in range(3))
    else:
        i, j = p.batch["attacks"]
        audit = lambda which: lambda vector: -F.logsigmoid(-p.attacks[which](output(vector, p.batch["S"]), p.batch["y"])).mean()
        tune, test = audit(i), audit(j)

    def value(vector):
        vector = vector.detach().requires_grad_()
        loss = tune(vector)
        (g,) = torch.autograd.grad(loss, vector)
        return (loss + test((vector - alpha * g).detach())).item()

    return value


def slope(value, at, step=1e-5):
    eye = torch.eye(len(at), dtype=torch.float64) * step
    return torch.tensor([(value(at + e) - value(at - e)) / (2 * step) for e in eye], dtype=torch.float64)


def feedback_gradient(p, feedback, module=L):
    p.args.forfeed, p.args.remfeed = feedback == "forget", feedback == "remember"
    return flat(module.iteration(p.net, p.theta, p.batch, p.attacks, p.args)[0])


# ------------------------------------------------------------------------------------------------ Eq. (1)-(5)


@pytest.mark.parametrize("multilabel", (False, True), ids=("classes", "attributes"))
@pytest.mark.parametrize("norm", (True, False), ids=("batch norm", "no norm"))
@pytest.mark.parametrize("feedback", ("remember", "forget"))
def test_both_feedbacks_against_finite_differences_of_equation_4(feedback, norm, multilabel):
    """Every parameter, central differences in float64 of a formula written in this file."""
    p = problem(norm, multilabel)
    expected = slope(objective(p, feedback), flat(p.theta.values()))
    assert relative(feedback_gradient(p, feedback), expected) < 1e-6


@pytest.mark.parametrize("feedback", ("remember", "forget"))
def test_first_order_and_plain_gradients_are_another_thing(feedback):
    """--first-order drops exactly the Hessian's term; --no-metaopt is the gradient of both losses at theta."""
    p = problem()
    exact = feedback_gradient(p, feedback)
    p.args.first_order = True
    assert relative(feedback_gradient(p, feedback), exact) > 1e-2
    p.args.first_order, p.args.metaopt = False, False
    plain = feedback_gradient(p, feedback)
    assert relative(plain, slope(objective(p, feedback, alpha=0.0), flat(p.theta.values()))) < 1e-6
    assert relative(plain, exact) > 1e-2


def test_meta_gradient_in_closed_form():
    """L_tune = a x^2 / 2, L_test = b x^2 / 2: the gradient is a x + b (1 - alpha a)^2 x."""
    a, b, alpha, x = 3.0, 5.0, 0.2, torch.tensor([1.7], dtype=torch.float64)
    half = lambda c: lambda theta: c * (theta["x"] ** 2).sum() / 2
    (g,), tune, test = L.meta_gradient(half(a), half(b), {"x": x}, alpha)
    assert g.item() == pytest.approx(a * 1.7 + b * (1 - alpha * a) ** 2 * 1.7, rel=1e-12)
    assert tune == pytest.approx(a * 1.7**2 / 2) and test == pytest.approx(b * ((1 - alpha * a) * 1.7) ** 2 / 2)
    (g,), _, _ = L.meta_gradient(half(a), half(b), {"x": x}, alpha, first_order=True)
    assert g.item() == pytest.approx(a * 1.7 + b * (1 - alpha * a) * 1.7, rel=1e-12)


MUTANTS = {
    "first order: no graph through the tuned step": ("create_graph=not first_order and alpha > 0", "retain_graph=True"),
    "sign of the meta-tune step": ("k: (p - alpha * g)", "k: (p + alpha * g)"),
    "sign of the Hessian": ("g + w - alpha * h", "g + w + alpha * h"),
    "alpha forgotten before the Hessian": ("g + w - alpha * h", "g + w - h"),
    "tune loss left out of the update": ("[(g + w - alpha * h)", "[(w - alpha * h)"),
    "query losses averaged instead of summed": ("return N * task_losses", "return task_losses"),
    "queries at theta": ("L_test = test_loss(theta_tau)", "theta_tau = leaf; L_test = test_loss(leaf)"),
    "true labels in the support set": ('batch["y_rand"]).mean()  # Eq. (6)', 'batch["y"]).mean()  # Eq. (6)'),
    "same MI model twice": ("audit(i), audit(j)", "audit(i), audit(i)"),
    "members wanted instead of non-members": ('torch.zeros(len(batch["S"]), device', 'torch.ones(len(batch["S"]), device'),
}


@pytest.mark.parametrize("old, new", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_the_meta_gradient_are_caught(old, new):
    """Each breaks ltu.py in memory, and must move one of the two feedbacks away from the true one."""
    source = (ROOT / "ltu.py").read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in ltu.py"
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    moved = []
    for feedback in ("remember", "forget"):
        p = problem()
        exact = feedback_gradient(p, feedback)
        try:
            moved.append(relative(feedback_gradient(p, feedback, mutant), exact))
        except RuntimeError:  # autograd itself refuses: caught
            moved.append(1.0)
    assert max(moved) > 1e-3


def test_batch_norm_statistics_are_moved_by_query_passes_alone():
    p = problem()
    before = {k: b.clone() for k, b in p.net.named_buffers()}
    feedback_gradient(p, "forget")
    assert all(torch.equal(b, before[k]) for k, b in p.net.named_buffers())
    feedback_gradient(p, "remember")
    assert p.net.norm.num_batches_tracked == 1  # S moved nothing
    leaf = {k: q.clone().requires_grad_() for k, q in p.theta.items()}
    g = torch.autograd.grad(
        common.task_losses(functional_call(copy.deepcopy(p.net), leaf, (p.batch["S"],))[1], p.batch["y_rand"]).mean(), list(leaf.values())
    )
    tau = {k: (q - p.args.alpha * d).detach() for (k, q), d in zip(p.theta.items(), g, strict=True)}
    hidden = F.conv2d(p.batch["Q"], tau["conv.weight"])  # the temporary model's own activations of the query images
    expected = 0.9 * before["norm.running_mean"] + 0.1 * hidden.mean((0, 2, 3))
    assert torch.allclose(p.net.norm.running_mean, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ("toy_vit", "toy_resnet"))
def test_exact_gradient_through_the_real_models(name):
    """timm's attention has no second derivative in its fused form; batch norm and ReLU do. Against a directional difference."""
    p = problem()
    torch.manual_seed(0)
    p.net = common.build_model(name, 3, 16).double().train()
    p.theta = {n: q.detach() for n, q in p.net.named_parameters()}
    up = lambda images: F.interpolate(images, size=(16, 16), mode="bilinear")
    p.batch |= {"S": up(p.batch["S"]), "Q": up(p.batch["Q"])}
    p.args.alpha = 0.01
    g, value = feedback_gradient(p, "remember"), objective(p, "remember")
    along, at, step = g / g.norm(), flat(p.theta.values()), 1e-7  # so small that no ReLU changes sides
    assert (value(at + step * along) - value(at - step * along)) / (2 * step) == pytest.approx(g.norm().item(), rel=1e-5)


def test_bf16_gradient_is_near_the_exact_one():
    p = problem(alpha=0.1)
    exact = feedback_gradient(p, "remember")
    single = problem(alpha=0.1, amp=True)
    single.net.float()
    single.theta = {n: q.detach() for n, q in single.net.named_parameters()}
    single.batch |= {name: single.batch[name].float() for name in ("S", "Q")}
    assert 1e-5 < relative(feedback_gradient(single, "remember").double(), exact) < 0.05


# ------------------------------------------------------------------------------------------------ Eq. (12)


def test_harmonize_by_hand():
    """Conflict: (0, 1) stays of (-1, 1) against (1, 0). No conflict: nothing changes. Over several tensors at once."""
    g_f, cosine = L.harmonize([torch.tensor([1.0]), torch.tensor([0.0])], [torch.tensor([-1.0]), torch.tensor([1.0])])
    assert flat(g_f).tolist() == [0, 1] and cosine == pytest.approx(-(0.5**0.5))
    same = [torch.tensor([1.0, 2.0])]
    assert L.harmonize([torch.tensor([1.0, 1.0])], same)[0] is same
    g_f, _ = L.harmonize([torch.tensor([3.0, 4.0])], [torch.tensor([-1.0, 0.0])])  # -1 + 3/25 * 3, 3/25 * 4
    assert g_f[0].tolist() == pytest.approx([-0.64, 0.48])


def test_harmonized_gradients_never_conflict():
    rng = torch.Generator().manual_seed(0)
    conflicts = 0
    for _ in range(200):
        g_r, g_f = ([torch.randn(n, generator=rng, dtype=torch.float64) for n in (3, 4)] for _ in range(2))
        projected, cosine = L.harmonize(g_r, g_f)
        r, f, new = flat(g_r), flat(g_f), flat(projected)
        assert cosine == pytest.approx((r @ f / (r.norm() * f.norm())).item())
        assert r @ new > -1e-12 * r.norm() * f.norm()
        if cosine < 0:
            conflicts += 1
            assert abs(r @ new) < 1e-12 * r.norm() * f.norm() and abs((f - new) @ new) < 1e-9  # what was removed lies along g_r
            again, _ = L.harmonize(g_r, projected)
            assert torch.allclose(flat(again), new, atol=1e-12)
            scaled, _ = L.harmonize([5 * g for g in g_r], g_f)
            assert torch.allclose(flat(scaled), new)
        else:
            assert torch.equal(new, f)
    assert 60 < conflicts < 140
    zero, cosine = L.harmonize([torch.zeros(2)], [torch.ones(2)])
    assert cosine == 0 and zero[0].tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------ Eq. (6)-(10)


def digits_args(tmp_path, *extra):
    folders = ["--data-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c"), "--out", str(tmp_path / "o")]
    return L.parse_args(["--dataset", "digits", "--device", "cpu", *folders, *extra])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    args = digits_args(folder)
    args.amp = False
    data = D.load(args)
    split = D.make_split(data, args)
    seen = D.reachable(split, 0.3, 0)
    return types.SimpleNamespace(args=args, data=data, split=split, seen=seen, folder=folder)


def test_z_1_is_the_nearest_neighbour(digits):
    torch.manual_seed(0)
    model = common.build_model("toy_resnet", 10, 8)
    forget, seen = torch.tensor(digits.split["forget"][:40]), torch.tensor(digits.seen)
    table = L.z_1_table(model, digits.data, forget, seen, digits.args)
    with torch.no_grad():
        model.eval()
        features = lambda i: model(digits.data["images"][i].permute(0, 3, 1, 2) / 255.0)[0].numpy()
        f, r = features(forget), features(seen)
    for row, chosen in zip(f, table.tolist(), strict=True):
        distances = [np.sqrt(((row - other) ** 2).sum()) for other in r]
        assert distances[digits.seen.index(chosen)] == pytest.approx(min(distances), abs=1e-5)
    assert len(set(table.tolist())) > 10


def test_z_2_finds_a_nearest_label_and_breaks_ties_at_random():
    rng = torch.Generator().manual_seed(0)
    seen, seen_labels = torch.arange(100, 140), torch.randint(0, 2, (40, 3), generator=rng).float()
    labels = torch.randint(0, 2, (30, 3), generator=rng).float()
    chosen = set()
    for _ in range(20):
        found = L.z_2(labels, seen, seen_labels, rng)
        distance = (labels - seen_labels[found - 100]).abs().sum(1)
        assert torch.equal(distance, (labels[:, None] - seen_labels).abs().sum(2).amin(1))
        chosen |= set(found.tolist())
    assert len(chosen) > 30  # of 40: not always the first
    one_hot = F.one_hot(torch.tensor([2]), 4).float()
    assert L.z_2(one_hot, torch.tensor([7, 8]), F.one_hot(torch.tensor([0, 1]), 4).float(), rng).item() in (7, 8)  # no such class


def test_random_labels_are_uniform_over_all_classes(digits):
    """Chi-square at a fixed seed, 9 degrees of freedom: 27.9 is its 99.9 % point."""
    labels = D.random_labels(digits.data, torch.tensor(digits.seen), 20000, torch.Generator().manual_seed(0))
    count = np.bincount(labels.numpy(), minlength=10)
    assert ((count - 2000) ** 2 / 2000).sum() < 27.9


def test_batches_hold_what_the_paper_says(digits):
    """S and D_Au are distinct images of D_f, Q_1..Q_3 of D_r_hat; two different MI models; the same iteration, the same batch."""
    torch.manual_seed(0)
    model = common.build_model("toy_resnet", 10, 8)
    forget, seen = torch.tensor(digits.split["forget"]), torch.tensor(digits.seen)
    z_1, vectors = L.z_1_table(model, digits.data, forget, seen, digits.args), L.label_vectors(digits.data, seen)
    pairs, batches = set(), []
    for t in range(30):
        batch = L.draw_batch(digits.data, forget, seen, vectors, z_1, t, digits.args)
        S, Q = batch["indices"]
        k = digits.args.support_size
        assert len(set(S.tolist())) == k and set(S.tolist()) <= set(digits.split["forget"])
        assert len(Q) == 3 * k and set(Q.tolist()) <= set(digits.seen)
        assert torch.equal(Q[:k], z_1[torch.tensor([digits.split["forget"].index(i) for i in S.tolist()])])
        y = digits.data["targets"]
        assert torch.equal(y[Q[k : 2 * k]], y[S]) and len(set(Q[2 * k :].tolist())) == k
        assert torch.equal(batch["y"], y[S]) and torch.equal(batch["y_Q"], y[Q])
        assert torch.equal(batch["S"], D.raw_batch(digits.data, S))
        pairs.add(tuple(batch["attacks"]))
        batches.append(batch)
    assert all(i != j for i, j in pairs) and len(pairs) > 8
    again = L.draw_batch(digits.data, forget, seen, vectors, z_1, 3, digits.args)
    assert torch.equal(again["Q"], batches[3]["Q"]) and torch.equal(again["y_rand"], batches[3]["y_rand"])
    assert not torch.equal(batches[3]["Q"], batches[4]["Q"]) and not torch.equal(batches[3]["y_rand"], batches[4]["y_rand"])


# ------------------------------------------------------------------------------------------------ MI models


@pytest.mark.parametrize("multilabel", (False, True), ids=("classes", "attributes"))
def test_signals_against_a_loop(multilabel):
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 5, generator=rng, dtype=torch.float64)
    y = torch.randint(2, (6, 5), generator=rng) if multilabel else torch.randint(5, (6,), generator=rng)
    got = {kind: L.signals(kind, logits, y).numpy() for kind in L.KINDS}
    for row in range(6):
        z = logits[row].numpy()
        if multilabel:
            t = y[row].numpy()
            p = 1 / (1 + np.exp(-z))
            right = np.where(t == 1, p, 1 - p)
            loss, entropy = -np.log(right).mean(), -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
            odds, margin, top, label = np.log(right / (1 - right)).mean(), np.log(right / (1 - right)).min(), right, t
        else:
            p = np.exp(z) / np.exp(z).sum()
            own, others = p[y[row]], np.delete(p, y[row])
            loss, entropy, odds = -np.log(own), -(p * np.log(p)).sum(), np.log(own / (1 - own))
            margin, top, label = z[y[row]] - np.delete(z, y[row]).max(), p, np.eye(5)[y[row]]
            assert odds == pytest.approx(np.log(own / others.sum()))
        assert got["posterior"][row] == pytest.approx(np.concatenate([p, label]))
        assert got["top3"][row] == pytest.approx(np.sort(top)[::-1][:3])
        assert got["scalars"][row] == pytest.approx([loss, entropy, margin, top.max()])
        assert got["logit"][row] == pytest.approx(np.concatenate([[odds], label]))


def test_mi_models_differ_and_tell_members_from_others(digits):
    """Trained on outputs of a made-up model that is surer of members: each finds that, in its own way, and changes in no update."""

    class Surer(nn.Module):
        def forward(self, images):
            index = (images[:, 0, 0, 0] * 255).round().long() + 256 * (images[:, 1, 0, 0] * 255).round().long()
            noise = torch.randn(len(targets), 10, generator=torch.Generator().manual_seed(3))[index]
            sure = torch.where(torch.isin(index, torch.tensor(digits.seen)), 6.0, 2.0)[:, None]
            return noise, noise + sure * F.one_hot(targets[index], 10)

    targets = digits.data["targets"]
    coded = torch.zeros(len(targets), 8, 8, 3, dtype=torch.uint8)  # images that carry their own number
    coded[:, 0, 0, 0], coded[:, 0, 0, 1] = torch.arange(len(targets)) % 256, torch.arange(len(targets)) // 256
    data = digits.data | {"images": coded}
    attacks, report = L.mi_models(Surer(), data, digits.split, digits.seen, digits.args)
    assert [a.kind for a in attacks] == list(L.KINDS) and len({str(a.net) for a in attacks}) == 4
    assert all(r["left_out"] > 0.75 for r in report)
    x, y = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)), targets[:50]
    says = torch.stack([a(x, y) for a in attacks])
    assert all(abs(np.corrcoef(says[i], says[j])[0, 1]) < 0.999 for i, j in itertools.combinations(range(4), 2))
    logits = x.clone().requires_grad_()
    for attack in attacks:  # a gradient for every image, none kept by the attack
        (g,) = torch.autograd.grad(attack(logits, y).sum(), logits)
        assert (g.abs().sum(1) > 0).all() and not any(q.requires_grad for q in attack.parameters())
    other, _ = L.mi_models(Surer(), data, digits.split, digits.seen, digits.args)
    assert all(torch.equal(a, b) for a, b in zip(attacks[0].parameters(), other[0].parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ the metric


def test_membership_metric_is_plain_scikit_learn():
    rng = np.random.default_rng(0)
    retain, test, forget = 1 - rng.beta(0.2, 9, 400), 1 - rng.beta(0.4, 2, 300), 1 - rng.beta(0.4, 3, 100)
    retain[:100] = 1.0  # saturated confidences: many equal points
    test[:40] = 1.0
    retain, test, forget = (x.astype(np.float32) for x in (retain, test, forget))
    y = np.repeat([1, 0], 300)
    kept = np.arange(300) * 400 // 300
    x = np.concatenate([retain[kept], test])[:, None]  # as many members as non-members
    expected = 1 - SVC(C=3, gamma="auto", kernel="rbf").fit(x, y).predict(forget[:, None]).mean()
    got = common.membership_inference(*(torch.from_numpy(a) for a in (retain, test, forget)))
    assert got == pytest.approx(expected) and 0.1 < expected < 0.9
    few = common.membership_inference(*(torch.from_numpy(a) for a in (retain[:50], test, forget)))
    x, y = np.concatenate([retain[:50], test[np.arange(50) * 300 // 50]])[:, None], np.repeat([1, 0], 50)
    assert few == pytest.approx(1 - SVC(C=3, gamma="auto", kernel="rbf").fit(x, y).predict(forget[:, None]).mean())


def test_membership_metric_knows_its_extremes_and_order():
    high, low = torch.linspace(0.9, 1, 50), torch.linspace(0, 0.1, 50)
    assert common.membership_inference(high, low, high) == 0 and common.membership_inference(high, low, low) == 1
    mixed = torch.cat([high[:20], low[:30]])
    shuffled = mixed[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    assert common.membership_inference(high, low, mixed) == common.membership_inference(high.flip(0), low, shuffled) == 0.6


def test_confidence_is_the_probability_of_the_label_whatever_the_batch():
    logits, y = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    whole = common.confidence(logits, y)
    assert torch.allclose(whole, logits.double().softmax(1)[torch.arange(7), y])
    assert torch.equal(whole, torch.cat([common.confidence(logits[i : i + 1], y[i : i + 1]) for i in range(7)]))
    attributes = torch.randint(2, (7, 4), generator=torch.Generator().manual_seed(1)).float()
    p = logits.double().sigmoid()
    assert torch.allclose(common.confidence(logits, attributes), torch.where(attributes == 1, p, 1 - p).prod(1) ** 0.25)


def test_paper_figures_by_hand():
    """Six images: UA counts errors on D_f, RA and TA right answers; attributes are counted one by one."""
    row = {"forget": {"accuracy": 0.25}, "retain": {"accuracy": 1.0}, "test": {"accuracy": 0.8}, "mi": 0.3}
    assert common.paper_figures(row) == {"ua": 0.75, "ra": 1.0, "ta": 0.8, "mi": 0.3}
    assert common.accuracy(torch.tensor([[2.0, -1.0], [-3.0, -1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])) == 0.75
    assert common.accuracy(torch.tensor([[2.0, -1.0], [-3.0, -1.0]]), torch.tensor([0, 0])) == 0.5


# ------------------------------------------------------------------------------------------------ whole runs

SHORT = ("--epochs", "30", "--iterations", "12", "--alpha", "0.3", "--beta", "0.03")
NAME = "ltu-alpha=0.3-beta=0.03-iterations=12"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run on the digits: (folder, result, files read in each phase)."""
    folder, read = tmp_path_factory.mktemp("run"), []
    raw, plain = D.raw_batch, {module: module.raw_batch for module in (L, T, D)}
    phase = ["start"]

    def spy(data, indices):
        read.append((phase[0], np.asarray(indices)))
        return raw(data, indices)

    def phased(name, function):
        def wrapped(*args, **kwargs):
            phase.append(phase[0])
            phase[0] = name
            try:
                return function(*args, **kwargs)
            finally:
                phase[0] = phase.pop()

        return wrapped

    names = ("train", "mi_models", "unlearn", "validation_gap", "measure")
    functions = {name: getattr(L, name) for name in names}
    try:
        for module in plain:
            module.raw_batch = spy
        for name in names:
            setattr(L, name, phased(name, functions[name]))
        result = L.main(["--device", "cpu", *SHORT, *flags_of(folder)])
    finally:
        for module, function in plain.items():
            module.raw_batch = function
        for name in names:
            setattr(L, name, functions[name])
    return types.SimpleNamespace(folder=folder, result=result, read=read)


def flags_of(folder):
    return ["--data-dir", str(folder), "--checkpoint-dir", str(folder / "c"), "--out", str(folder / "o")]


def again(run, *extra):
    return L.main(["--device", "cpu", *SHORT, *flags_of(run.folder), *extra])


def split_of(run):
    saved = torch.load(next((run.folder / "c").rglob("original-seed0.pt")), weights_only=True)
    return saved["indices"]


def test_a_run_forgets_the_forget_set(run):
    r = run.result
    assert r["figures"]["retrained"]["ra"] > 0.95 and r["figures"]["original"]["ua"] < 0.01
    assert r["figures"]["unlearned"]["avg_gap"] < r["figures"]["original"]["avg_gap"] - 0.01
    assert r["ua"] > 0.02 and r["ra"] > 0.9
    lost = r["comparison"]["unlearned"]
    assert lost["forget_lost"] > lost["control_lost_mean"]  # D_f, not what the method never saw


def test_mi_is_at_least_ua_where_ra_is_whole(run):
    """Retained confidences are then above 0.5 throughout, so every error on D_f looks like a non-member."""
    for row in run.result["figures"].values():
        if row["ra"] > 0.9999:
            assert row["mi"] >= row["ua"]
    assert run.result["figures"]["original"]["ra"] > 0.9999


def test_nothing_is_read_that_access_does_not_name(run):
    """No test image before the evaluation, and of D_r nothing outside D_r_hat while unlearning."""
    split = split_of(run)
    allowed = {"train": {"retain", "forget", "val"}, "mi_models": {"val"}, "unlearn": {"forget"}, "validation_gap": {"forget", "val"}}
    seen = set(D.reachable(split, 0.3, 0))
    for phase, names in allowed.items():
        got = set(np.concatenate([i for p, i in run.read if p == phase]).tolist())
        permitted = set(itertools.chain(*(split[name] for name in names))) | (set() if phase == "train" else seen)
        assert got and got <= permitted, phase
        assert not got & set(split["test"])
    unlearning = set(np.concatenate([i for p, i in run.read if p == "unlearn"]).tolist())
    assert len(unlearning & seen) > 0.9 * len(seen) and set(split["forget"]) <= unlearning
    assert {p for p, _ in run.read} == {*allowed, "measure"}
    assert run.result["access"]["unlearning"] == ["forget", "retain (rho 0.3)", "val"]


def test_rho_limits_what_is_at_hand(run):
    split = split_of(run)
    sets = {rho: D.reachable(split, rho, 0) for rho in (0.1, 0.3, 1.0)}
    assert [len(sets[rho]) for rho in sets] == [round(rho * len(split["retain"])) for rho in sets]
    assert set(sets[0.1]) < set(sets[0.3]) < set(sets[1.0]) == set(split["retain"])
    assert D.reachable(split, 0.3, 1) != sets[0.3]
    positions = D.control_sets(None, split, sets[0.3])
    unseen = {split["retain"][i] for part in positions for i in part}
    unseen_all = set(split["retain"]) - set(sets[0.3])
    half = D.control_sets(None, dict(split, forget=range(10**6)), sets[0.3])  # more to forget than was left unseen
    assert len({tuple(part) for part in half}) == 20 and {len(part) for part in half} == {len(unseen_all) // 2}
    assert len(positions) == 20 and {len(part) for part in positions} == {len(split["forget"])} and not unseen & set(sets[0.3])


def test_result_file(run):
    (path,) = (run.folder / "o").rglob("*.json")
    saved = json.loads(path.read_text())
    assert saved == run.result and path.name == f"{NAME}-seed0.json" and path.parent.name == "digits-random0.1-noise0.1-split0"
    design = "method dataset setting seed split_hash access args metrics tow ua ra ta mi avg_gap seconds peak_memory_bytes device versions"
    assert set(design.split()) <= set(saved)
    assert {"load", "train", "mi_models", "unlearn", "evaluate"} <= set(saved["seconds"])
    gold, own = saved["figures"]["retrained"], saved["figures"]["unlearned"]
    assert saved["avg_gap"] == pytest.approx(np.mean([abs(own[k] - gold[k]) for k in ("ua", "ra", "ta", "mi")]))
    assert gold["avg_gap"] == 0


def test_wrong_labels_are_counted_where_they_are(run):
    w = run.result["wrong_by_label"]
    assert w["original"]["D_f"]["flipped"] < 0.1 and w["retrained"]["D_f"]["flipped"] > 0.8  # only memory knows a wrong label
    assert w["unlearned"]["D_f"]["flipped"] > w["unlearned"]["D_f"]["clean"]
    split = split_of(run)
    flips = {name: np.mean([i in split_of_flips(run) for i in split[name]]) for name in ("retain", "forget", "val", "test")}
    assert all(0.03 < share < 0.18 for share in flips.values())


def split_of_flips(run):
    args = digits_args(run.folder)
    data = D.load(args)
    return set(np.flatnonzero((data["targets"] != data["true_targets"]).numpy()).tolist())


def test_the_same_command_gives_the_same_numbers(run):
    (path,) = (run.folder / "c").rglob(f"{NAME}-seed0.pt")
    before = torch.load(path, weights_only=True)["model"]
    result = again(run)
    assert result["metrics"] == run.result["metrics"] and result["log"] == run.result["log"]
    assert all(torch.equal(t, before[k]) for k, t in torch.load(path, weights_only=True)["model"].items())


ABLATIONS = {  # what the log then holds, the result's name, and what the first iteration still shares with the full method
    "--no-forfeed": (lambda log: all("mi_tune" not in e and "tune" in e for e in log), "forfeed=False", {"tune", "test"}),
    "--no-remfeed": (lambda log: all("mi_tune" in e and "tune" not in e for e in log), "remfeed=False", {"mi_tune", "mi_test"}),
    "--no-metaopt": (lambda log: all("cosine" in e for e in log), "metaopt=False", {"tune", "mi_tune"}),
    "--first-order": (lambda log: all("cosine" in e for e in log), "firstorder=True", {"tune", "test", "mi_tune", "mi_test"}),
    "--combine add": (lambda log: all("cosine" in e for e in log), "combine=add", {"tune", "test", "mi_tune", "mi_test", "cosine"}),
    "--combine iterative": (
        lambda log: ["mi_tune" in e for e in log] == [t % 2 == 0 for t in range(12)] == ["tune" not in e for e in log],
        "combine=iterative",
        {"mi_tune", "mi_test"},
    ),
}


@pytest.mark.parametrize("flag", ABLATIONS)
def test_each_ablation_changes_what_it_says(run, flag, capsys):
    """Same models, same split, same first batch; another result, in a file and a row of its own."""
    result = again(run, *flag.split())
    holds, name, shared = ABLATIONS[flag]
    assert holds(result["log"]) and result["method"] == f"{NAME}-{name}"
    assert result["split_hash"] == run.result["split_hash"]
    for row in ("original", "retrained", "ft"):
        assert result["metrics"][row] == run.result["metrics"][row]
    assert result["metrics"]["unlearned"] != run.result["metrics"]["unlearned"]
    first, full = result["log"][0], run.result["log"][0]
    assert all(first[key] == pytest.approx(full[key], rel=1e-6) for key in shared)
    assert all(first[key] != pytest.approx(full[key], rel=1e-3) for key in set(first) - shared)
    assert any(line.startswith("LTU ") and line.split()[1].strip("0123456789.") for line in capsys.readouterr().out.splitlines())


def test_add_and_project_differ_only_where_gradients_conflict():
    p = problem()
    for i, j in itertools.permutations(range(4), 2):
        p.batch["attacks"] = [i, j]
        p.args.combine = "project"
        projected, seen = L.iteration(p.net, p.theta, p.batch, p.attacks, p.args)
        p.args.combine = "add"
        added, _ = L.iteration(p.net, p.theta, p.batch, p.attacks, p.args)
        assert torch.allclose(flat(projected), flat(added), rtol=1e-12) == (seen["cosine"] >= 0)


def test_resume_equals_uninterrupted(run, monkeypatch):
    """Stopped in the middle of the loop, then --resume: the same model to the bit."""
    (path,) = (run.folder / "c").rglob(f"{NAME}-seed0.pt")
    whole = torch.load(path, weights_only=True)["model"]
    real, calls = L.iteration, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(L, "iteration", stop)
    with pytest.raises(KeyboardInterrupt):
        again(run)
    monkeypatch.setattr(L, "iteration", real)
    assert path.with_suffix(".partial.pt").is_file()
    result = again(run, "--resume")
    assert result["log"] == run.result["log"] and not path.with_suffix(".partial.pt").exists()
    assert all(torch.equal(t, whole[k]) for k, t in torch.load(path, weights_only=True)["model"].items())


def test_beta_falls_to_0_along_a_cosine(digits, monkeypatch):
    """With a gradient of ones, every weight has moved by the sum of the steps; and the given model has not moved."""
    torch.manual_seed(0)
    model = common.build_model("toy_resnet", 10, 8).eval()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(L, "iteration", lambda student, theta, *_: ([torch.ones_like(p) for p in theta.values()], {"tune": 1.0}))
    args = argparse.Namespace(**vars(digits.args) | {"iterations": 5, "beta": 0.2})
    student, _, _ = L.unlearn(model, digits.data, digits.split, digits.seen, None, args)
    total = sum(0.2 * (1 + np.cos(np.pi * t / 5)) / 2 for t in range(5))
    for name, p in student.named_parameters():
        assert torch.allclose(p, before[name] - total, atol=1e-5), name
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_a_diverged_step_stops_and_keeps_the_last_good_model(run, monkeypatch, capsys):
    real, calls, states = L.iteration, [], []

    def poison(student, *args):
        gradient, told = real(student, *args)
        calls.append(1)
        if len(calls) == 3:
            states.append({k: t.clone() for k, t in student.state_dict().items()})
        return ([g * float("nan") for g in gradient] if len(calls) == 4 else gradient), told

    monkeypatch.setattr(L, "iteration", poison)
    with pytest.raises(SystemExit) as stop:
        again(run, "--beta", "0.02")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1 and "iteration 4" in message
    (path,) = (run.folder / "c").rglob("ltu-alpha=0.3-beta=0.02-iterations=12-seed0.partial.pt")
    saved = torch.load(path, weights_only=True)
    assert saved["iteration"] == 2 and all(torch.isfinite(t.float()).all() for t in saved["model"].values())
    assert torch.equal(
        saved["model"]["net.bn1.running_mean"], states[0]["net.bn1.running_mean"]
    )  # the third query pass's, not the fourth's
    assert not torch.equal(saved["model"]["net.bn1.weight"], states[0]["net.bn1.weight"])  # after the third update
    assert not list((run.folder / "o").rglob("*beta=0.02*"))


def test_a_step_that_explodes_is_caught_at_once(run, capsys):
    """A finite gradient, an update far too large: stopped by the weights, or by the next losses."""
    with pytest.raises(SystemExit) as stop:
        again(run, "--beta", "1000", "--iterations", "3")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1 and "diverged" in message and "--beta" in message


def test_class_forgetting_run(digits, tmp_path):
    """The class is gone from D_r, D_v and D_te; the gold model does not know its test images, and neither should LTU."""
    extra = [
        "--forget",
        "class",
        "--forget-classes",
        "3",
        "--label-noise",
        "0",
        "--epochs",
        "12",
        "--iterations",
        "8",
        "--alpha",
        "0.3",
        "--beta",
        "0.03",
    ]
    result = L.main(["--device", "cpu", *flags_of(tmp_path), *extra])
    assert result["setting"] == "class3-split0" and result["validation_gap"] is None
    gold, original = (result["metrics"][row]["test_forgotten"]["score"] for row in ("retrained", "original"))
    assert gold == 0 and original > 0.9
    assert result["metrics"]["unlearned"]["test_forgotten"]["score"] < original
    assert result["figures"]["retrained"]["ua"] == 1


def test_mi_models_are_not_thrown_by_a_class_they_never_saw(digits):
    """Labels go in as 0 and 1: standardised, a class that only D_f has would weigh a thousand times as much."""
    kept = np.flatnonzero(digits.data["targets"].numpy() != 3)
    split = {"val": kept[:100].tolist()}
    torch.manual_seed(0)
    model = common.build_model("toy_resnet", 10, 8).eval()
    attacks, _ = L.mi_models(model, digits.data, split, kept[100:300].tolist(), digits.args)
    logits = torch.zeros(4, 10)
    for attack in attacks:
        assert (attack(logits, torch.full((4,), 3)) - attack(logits, torch.full((4,), 4))).abs().max() < 20


def test_attributes_and_identities_too(flags, tmp_path):
    """--dataset with identities: UA and ToW both, from a multi-label model without batch norm."""
    result = L.main(
        [*[f for f in flags if f not in ("--meta-epochs", "2", "--hidden", "16")], "--iterations", "2", "--support-size", "8", "--plot"]
    )
    assert result["setting"] == "ids4-split0" and result["metric"] == "mAP"
    assert 0 < result["tow"] <= 1 and 0 <= result["ua"] <= 1 and result["wrong_by_label"] is None
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_dry_run_takes_every_phase_and_is_kept_apart(tmp_path):
    result = L.main(["--dry-run", "--device", "cpu", *flags_of(tmp_path)])
    assert result["setting"].endswith("-dry") and len(result["log"]) == 2


BAD = {
    "--rho 0": "--rho",
    "--rho 1.5": "--rho",
    "--rho nan": "--rho",
    "--rho 0.0001": "--rho 0.0001 leaves",
    "--mi-models 1": "two are needed",
    "--alpha 0": "--alpha is 0",
    "--beta -1": "--beta is -1",
    "--forget-ratio 1": "--forget-ratio",
    "--forget-ratio 0.99": "leaves none of class",
    "--forget-ratio 0.8 --batch-size 512": "fewer than a batch",
    "--forget class": "needs --forget-classes",
    "--held-out": "--held-out goes with --forget identities",
    "--forget class --forget-classes 10 --label-noise 0": "absent: [10]",
    "--forget class --forget-classes 0 1 2 3 4 5 6 7 8 9 --label-noise 0": "one must stay",
    "--forget class --forget-classes 1": "--label-noise 0",
    "--forget subclass --forget-classes 1 --label-noise 0": "super-classes",
    "--forget-classes 3": "--forget random",
    "--ids 3": "--forget identities",
    "--forget identities": "no identities",
    "--no-forfeed --no-remfeed": "nothing to do",
    "--no-forfeed --combine add": "--combine add",
    "--train-images 60": "fewer than a batch",
    "--train-images 8": "has no training image",
    "--label-noise 0.95": "--label-noise",
    "--save .": "is a folder",
    "--init pretrained": "no pretrained weights",
}


@pytest.mark.parametrize("extra", BAD)
def test_bad_input_gets_one_line(digits, extra, capsys):
    with pytest.raises(SystemExit) as stop:
        L.main(["--device", "cpu", *flags_of(digits.folder), *extra.split()])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1 and message.startswith("error: ") and BAD[extra] in message, message
    assert not (digits.folder / "o").exists() or not list((digits.folder / "o").rglob("*.json"))


def test_goal_of_the_validation_gap_needs_neither_gold_nor_test(digits):
    """The untouched model misses exactly in UA and MI: its D_f is known, its D_v is not."""
    torch.manual_seed(0)
    model = common.build_model("toy_resnet", 10, 8).eval()
    gap = L.validation_gap(model, model, digits.data, digits.split, digits.seen, digits.args)
    assert gap["ra"] == gap["ta"] == 0
    same = dict(digits.split, forget=digits.split["val"])
    assert L.validation_gap(model, model, digits.data, same, digits.seen, digits.args)["mean"] == 0


def test_args_do_not_leak_into_each_other():
    assert L.parse_args(["--dataset", "cifar10"]).model == "resnet18"
    args = L.parse_args(["--rho", "0.3"])
    assert isinstance(args, argparse.Namespace) and args.dataset == "digits" and args.label_noise == 0.1 and args.method == "ltu"
    assert L.parse_args(["--alpha", "0.4"]).method == "ltu-alpha=0.4"
