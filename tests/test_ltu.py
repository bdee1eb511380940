"""LTU against finite differences, brute force, scikit-learn, and itself with a flag changed."""

import copy
import inspect
import itertools
import json
import re
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from check_gradient import flat, relative
from conftest import mutated, places, record_reads, refused, weights
from scipy.stats import chi2
from sklearn.svm import SVC
from torch import nn
from torch.func import functional_call

import common
import data as D
import evaluate as E
import ltu as L
import train as T


class Tiny(nn.Module):
    """A smooth model, with or without batch norm, that finite differences can walk through."""

    def __init__(self, norm: bool):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, bias=not norm)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        features = F.gelu(self.norm(self.conv(images))).mean((2, 3))
        return features, self.head(features)


def problem(norm=True, multilabel=False, k=5, **changes):
    """A tiny model, four MI models and one batch of each set, in float64."""
    args = Namespace(**vars(L.parse_args([])) | {"amp": False, "alpha": 0.7} | changes)
    net, rng, attacks = Tiny(norm).double().train(), torch.Generator().manual_seed(1), []
    images = torch.rand(4 * k, 3, 5, 5, generator=rng, dtype=torch.float64)
    labels = torch.randint(3, (5 * k,), generator=rng)
    if multilabel:
        labels = torch.randint(2, (5 * k, 3), generator=rng).float()
    batch = {"iteration": 0, "S": images[:k], "Q": images[k:], "attacks": [0, 2]}
    batch |= {"y_rand": labels[:k], "y": labels[k : 2 * k], "y_Q": labels[2 * k :]}
    for number, kind in enumerate(L.KINDS):
        torch.manual_seed(number)
        inputs = L.signals(kind, torch.zeros(2, 3), labels[:2]).shape[1]
        attacks.append(L.MIModel(kind, inputs).double().requires_grad_(False))
        attacks[-1].mean.normal_(0, 0.3)
        for q in attacks[-1].parameters():
            q *= 3  # far from linear, so that the second order counts
    theta = {name: q.detach() for name, q in net.named_parameters()}
    return Namespace(args=args, net=net, batch=batch, attacks=attacks, theta=theta)


def task(logits, y):
    if y.ndim == 2:
        return -(y * F.logsigmoid(logits) + (1 - y) * F.logsigmoid(-logits)).mean()
    return -logits.log_softmax(1)[torch.arange(len(y)), y].mean()


def loss(p, feedback, query: int, vector):
    """Support (query = 0) or query loss (1) of Eq. (6), (7), (11), written again for this test."""
    parts = vector.split([t.numel() for t in p.theta.values()])
    theta = {name: q.view_as(p.theta[name]) for name, q in zip(p.theta, parts, strict=True)}
    images = p.batch["Q" if query and feedback == "remember" else "S"]
    logits = functional_call(copy.deepcopy(p.net), theta, (images,))[1]
    if feedback == "forget":
        attack = p.attacks[p.batch["attacks"][query]]
        return -F.logsigmoid(-attack(logits, p.batch["y"])).mean()
    if not query:
        return task(logits, p.batch["y_rand"])
    # One pass for the three sets (batch norm sees them together), three means, summed.
    sets = zip(logits.chunk(3), p.batch["y_Q"].chunk(3), strict=True)
    return sum(task(z, y) for z, y in sets)


def objective(p, feedback, alpha, vector):
    """Eq. (4) of a feedback at the flat parameter vector."""
    vector = vector.detach().requires_grad_()
    tune = loss(p, feedback, 0, vector)
    tau = vector - alpha * torch.autograd.grad(tune, vector)[0]
    return (tune + loss(p, feedback, 1, tau.detach())).item()


def slope(value, theta, step=1e-5):
    """The gradient of value at theta by central differences, one parameter at a time."""
    at = flat(theta.values())
    steps = torch.eye(len(at), dtype=torch.float64) * step
    return torch.stack([torch.tensor(value(at + e) - value(at - e)) for e in steps]) / (2 * step)


def feedback_gradient(p, feedback, module=L):
    p.args.forfeed, p.args.remfeed = feedback == "forget", feedback == "remember"
    return flat(module.iteration(p.net, p.theta, p.batch, p.attacks, p.args)[0])


# Eq. (1)-(5)
@pytest.mark.parametrize("multilabel", (False, True), ids=("classes", "attributes"))
@pytest.mark.parametrize("norm", (True, False), ids=("batch norm", "no norm"))
@pytest.mark.parametrize("feedback", ("remember", "forget"))
def test_both_feedbacks_against_finite_differences_of_equation_4(feedback, norm, multilabel):
    """--no-metaopt takes both losses at theta."""
    p = problem(norm, multilabel)
    exact = feedback_gradient(p, feedback)
    assert relative(exact, slope(partial(objective, p, feedback, 0.7), p.theta)) < 1e-6
    p.args.metaopt = False
    plain = feedback_gradient(p, feedback)
    assert relative(plain, slope(partial(objective, p, feedback, 0.0), p.theta)) < 1e-6
    assert relative(plain, exact) > 1e-2


def test_meta_gradient_in_closed_form():
    """L_tune = a x^2 / 2, L_test = b x^2 / 2: the gradient is a x + b (1 - alpha a)^2 x."""
    a, b, alpha, x = 3.0, 5.0, 0.2, 1.7
    theta = {"x": torch.tensor([x], dtype=torch.float64)}

    def half(c, theta):
        return c * (theta["x"] ** 2).sum() / 2

    (g,), tune, test = L.meta_gradient(partial(half, a), partial(half, b), theta, alpha)
    assert g.item() == pytest.approx(a * x + b * (1 - alpha * a) ** 2 * x, rel=1e-12)
    assert (tune, test) == pytest.approx((a * x**2 / 2, b * ((1 - alpha * a) * x) ** 2 / 2))


MUTANTS = {
    "no graph through the tuned step": ("create_graph=alpha > 0", "retain_graph=True"),
    "sign of the meta-tune step": ("(p - alpha * g)", "(p + alpha * g)"),
    "Hessian left out": ("[g - alpha * h for", "[g for"),
    "sign of the Hessian": ("[g - alpha * h", "[g + alpha * h"),
    "alpha forgotten before the Hessian": ("[g - alpha * h", "[g - h"),
    "tune loss left out of the update": ("[g + w for", "[w for"),
    "query losses averaged, not summed": ("return N * task_losses", "return task_losses"),
    "queries at theta": ("test_loss(theta_tau)", "test_loss(leaf); theta_tau = leaf"),
    "true labels in the support set": ('batch["y_rand"]).mean()', 'batch["y"]).mean()'),
    "same MI model twice": ("audit(theta, attacks[j])", "audit(theta, attacks[i])"),
    "members wanted": ('torch.zeros(len(batch["S"])', 'torch.ones(len(batch["S"])'),
}


@pytest.mark.parametrize("old, new", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_the_meta_gradient_are_caught(old, new):
    """Each breaks ltu.py in memory, and must move one of the two feedbacks."""
    mutant, moved = mutated(L, old, new), []
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
    logits = functional_call(copy.deepcopy(p.net), leaf, (p.batch["S"],))[1]
    (g,) = torch.autograd.grad(task(logits, p.batch["y_rand"]), leaf["conv.weight"])
    # The temporary model's own activations of the query images.
    hidden = F.conv2d(p.batch["Q"], p.theta["conv.weight"] - p.args.alpha * g)
    expected = 0.9 * before["norm.running_mean"] + 0.1 * hidden.mean((0, 2, 3))
    assert torch.allclose(p.net.norm.running_mean, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ("toy_vit", "toy_resnet"))
def test_exact_gradient_through_the_real_models(name):
    """timm's fused attention has no second derivative, so ltu.py must not use it."""
    p = problem(alpha=0.01)
    p.net = common.build_model(name, 3, 16).double().train()
    p.theta = {n: q.detach() for n, q in p.net.named_parameters()}
    for key in ("S", "Q"):
        p.batch[key] = F.interpolate(p.batch[key], size=(16, 16), mode="bilinear")
    g, at = feedback_gradient(p, "remember"), flat(p.theta.values())
    step = 1e-7 * g / g.norm()  # so small that no ReLU changes sides
    above, below = (objective(p, "remember", 0.01, vector) for vector in (at + step, at - step))
    assert (above - below) / 2e-7 == pytest.approx(g.norm().item(), rel=1e-5)


def test_bf16_gradient_is_near_the_exact_one():
    exact = feedback_gradient(problem(alpha=0.1), "remember")
    p = problem(alpha=0.1, amp=True)
    p.theta = {n: q.detach() for n, q in p.net.float().named_parameters()}
    p.batch |= {name: p.batch[name].float() for name in ("S", "Q")}
    assert 1e-5 < relative(feedback_gradient(p, "remember").double(), exact) < 0.05


# Eq. (12)
def test_harmonize_is_equation_12():
    """Over the whole gradient as one vector; without a conflict nothing changes."""
    one, same = torch.ones(1), [torch.tensor([1.0, 2.0])]
    assert L.harmonize([torch.ones(2)], same)[0] is same
    assert L.harmonize([torch.zeros(2)], same) == (same, 0)
    assert L.harmonize([one], [1e-25 * one]) == ([1e-25 * one], 0)  # its square is 0 in float32
    rng, conflicts = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        drawn = torch.randn(14, generator=rng, dtype=torch.float64).split((3, 4, 3, 4))
        projected, cosine = L.harmonize(drawn[:2], drawn[2:])
        r, f = flat(drawn[:2]), flat(drawn[2:])
        assert cosine == pytest.approx((r @ f / (r.norm() * f.norm())).item())
        want = f if cosine >= 0 else f - (r @ f) / (r @ r) * r
        assert torch.allclose(flat(projected), want, rtol=0, atol=1e-12)
        conflicts += cosine < 0
    assert 60 < conflicts < 140


# Eq. (6)-(10)
@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits with ltu.py's default split, and a model that nobody has trained."""
    args = L.parse_args(["--no-amp", *places(tmp_path_factory.mktemp("digits"))])
    data = D.load(args)
    split = D.make_split(data, args)
    parts = {name: torch.tensor(split[name]) for name in ("retain", "forget", "val", "test")}
    model, seen = common.build_model("toy_resnet", 10, 8).eval(), D.reachable(split, 0.3, 0)
    return Namespace(args=args, data=data, split=split, parts=parts, model=model, seen=seen)


def test_z_1_is_the_nearest_neighbour(digits):
    forget, seen = digits.parts["forget"][:40], torch.tensor(digits.seen)
    table = L.z_1_table(digits.model, digits.data, forget, seen)
    images = digits.data["images"].permute(0, 3, 1, 2) / 255.0
    with torch.no_grad():
        f, r = (digits.model(images[part])[0].numpy() for part in (forget, seen))
    distances = np.sqrt(((f[:, None] - r) ** 2).sum(2))  # (40, |D_r_hat|)
    chosen = distances[np.arange(40), np.searchsorted(digits.seen, table.numpy())]
    assert chosen == pytest.approx(distances.min(1), abs=1e-5)
    assert set(table.tolist()) <= set(digits.seen) and len(set(table.tolist())) > 10


def test_z_2_finds_a_nearest_label_and_breaks_ties_at_random():
    """Each of the images equally near is as likely, whatever their label vectors (chi-square)."""
    rng, seen = torch.Generator().manual_seed(0), torch.arange(100, 140)
    targets = torch.randint(0, 2, (140, 4), generator=rng).float()
    targets[100:, 0] = 0  # so that a label with 1 there has several nearest vectors, or one
    targets[100:130] = targets[100]
    groups, labels = L.by_label({"targets": targets}, seen), targets[:8]
    found = torch.stack([L.z_2(labels, groups, rng) for _ in range(4000)])  # (4000, 8)
    distance, ties = (labels[:, None] - targets[seen]).abs().sum(2), []  # (8, 40)
    for label in range(8):
        near = seen[distance[label] == distance[label].min()]
        count = np.array([(found[:, label] == image).sum() for image in near])
        assert count.sum() == 4000, "an image that is not among the nearest"
        expected = 4000 / len(near)
        assert ((count - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, max(1, len(near) - 1))
        ties.append(len(targets[near].unique(dim=0)))
    assert max(ties) > 1 and min(ties) == 1
    one_hot = {"targets": torch.tensor([0, 1, 2, 3]), "classes": 4}
    groups = L.by_label(one_hot, torch.tensor([0, 1]))  # of the third class there is no image
    assert L.z_2(torch.eye(4)[2:3], groups, rng).item() in (0, 1)


def test_random_attributes_are_vectors_of_the_pool():
    """Each of its three images is as likely: chi-square, 2 degrees of freedom, 99.9 % point."""
    data = {"targets": torch.eye(9)[:, :8], "device": torch.device("cpu")}
    labels = D.random_labels(data, torch.tensor([1, 4, 6]), 3000, torch.Generator().manual_seed(0))
    count = labels.sum(0).numpy()
    assert count.sum() == 3000 and ((count[[1, 4, 6]] - 1000) ** 2 / 1000).sum() < 13.8


def test_batches_hold_what_the_paper_says(digits):
    """S is of D_f, Q_1..Q_3 of D_r_hat, two MI models differ; an iteration repeats its batch."""
    forget, seen, y = digits.parts["forget"], torch.tensor(digits.seen), digits.data["targets"]
    z_1 = L.z_1_table(digits.model, digits.data, forget, seen)
    given = digits.data, forget, seen, z_1, L.by_label(digits.data, seen)
    batches, k = [L.draw_batch(*given, t, digits.args) for t in range(30)], 64
    for batch in batches:
        S, Q = batch["indices"]
        assert len(S) == len(set(S.tolist())) == k and set(S.tolist()) <= set(forget.tolist())
        assert len(Q) == 3 * k and set(Q.tolist()) <= set(digits.seen)
        assert torch.equal(Q[:k], z_1[torch.searchsorted(forget, S)])
        assert torch.equal(y[Q[k : 2 * k]], y[S]) and len(set(Q[2 * k :].tolist())) == k
        assert torch.equal(batch["y"], y[S]) and torch.equal(batch["y_Q"], y[Q])
        assert torch.equal(batch["S"], D.raw_batch(digits.data, S))
        assert torch.equal(batch["Q"], D.raw_batch(digits.data, Q))
    pairs = {tuple(batch["attacks"]) for batch in batches}
    assert all(i != j for i, j in pairs) and len(pairs) > 8
    args = Namespace(**vars(digits.args) | {"augment": "pad-crop", "mi_models": 6})
    others = [L.draw_batch(*given, t, args) for t in range(20)]
    assert {i for batch in others for i in batch["attacks"]} == set(range(6))
    for name, indices in zip("SQ", others[0]["indices"], strict=True):  # cropped
        assert not torch.equal(others[0][name], D.raw_batch(digits.data, indices))
    again = L.draw_batch(*given, 3, digits.args)
    for name in ("Q", "y_rand"):
        assert torch.equal(again[name], batches[3][name])
        assert not torch.equal(again[name], batches[4][name])


# MI models
@pytest.mark.parametrize("multilabel", (False, True), ids=("classes", "attributes"))
def test_signals_against_a_loop(multilabel):
    rng, shape = torch.Generator().manual_seed(0), (6, 5) if multilabel else (6,)
    logits = 3 * torch.randn(6, 5, generator=rng, dtype=torch.float64)
    targets = torch.randint(2 if multilabel else 5, shape, generator=rng)
    got = {kind: L.signals(kind, logits, targets).numpy() for kind in L.KINDS}
    for row, (z, y) in enumerate(zip(logits.numpy(), targets.numpy(), strict=True)):
        if multilabel:
            label, p = y, 1 / (1 + np.exp(-z))
            top = posterior = np.where(y == 1, p, 1 - p)
            entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
            odds = np.log(top / (1 - top))
            loss, odds, margin = -np.log(top).mean(), odds.mean(), odds.min()
        else:
            label, p = np.eye(5)[y], np.exp(z) / np.exp(z).sum()
            top, loss, entropy = p, -np.log(p[y]), -(p * np.log(p)).sum()
            posterior = [p[y], *sorted(np.delete(p, y), reverse=True)]
            odds, margin = np.log(p[y] / np.delete(p, y).sum()), z[y] - np.delete(z, y).max()
        assert got["posterior"][row] == pytest.approx(posterior)
        assert got["top3"][row] == pytest.approx(np.sort(top)[::-1][:3])
        assert got["scalars"][row] == pytest.approx([loss, entropy, margin, top.max()])
        assert got["logit"][row] == pytest.approx(np.concatenate([[odds], label]))


def test_mi_models_differ_and_tell_members_from_others(digits, monkeypatch):
    """Each finds, in its own way, that a made-up model is surer of members."""
    targets, member = digits.data["targets"], torch.full((len(digits.data["targets"]), 1), 2.0)
    member[digits.seen] = 6.0
    noise = torch.randn(len(targets), 10, generator=torch.Generator().manual_seed(3))
    outputs = noise + member * F.one_hot(targets, 10)
    monkeypatch.setattr(L, "predict", lambda model, data, indices, amp: outputs[indices])
    monkeypatch.setattr(L, "MI_STEPS", 200)
    given = digits.model, digits.data, digits.split, digits.seen, digits.args
    attacks, report = L.mi_models(*given)
    assert [a.kind for a in attacks] == [r["kind"] for r in report] == list(L.KINDS)
    assert len({str(a.net) for a in attacks}) == 4 and all(r["left_out"] > 0.75 for r in report)
    logits, y = noise[:50].requires_grad_(), targets[:50]
    alike = np.corrcoef(torch.stack([a(logits, y).detach() for a in attacks]))
    assert all(abs(alike[i, j]) < 0.999 for i, j in itertools.combinations(range(4), 2))
    for attack in attacks:  # a gradient for every image, none kept by the attack
        (g,) = torch.autograd.grad(attack(logits, y).sum(), logits)
        assert (g.abs().sum(1) > 0).all()
        assert not any(q.requires_grad for q in attack.parameters())
    for a, b in zip(attacks, L.mi_models(*given)[0], strict=True):
        assert torch.equal(flat(a.parameters()), flat(b.parameters()))


def test_mi_models_are_not_thrown_by_a_class_they_never_saw(digits, monkeypatch):
    """Standardised, a class that only D_f has would weigh a thousand times as much."""
    monkeypatch.setattr(L, "MI_STEPS", 5)  # in 500, weight decay takes that weight to 0
    kept = np.flatnonzero(digits.data["targets"].numpy() != 3)
    split, seen = {"val": kept[:100].tolist()}, kept[100:300].tolist()
    attacks, _ = L.mi_models(digits.model, digits.data, split, seen, digits.args)
    logits, three = torch.zeros(4, 10), torch.full((4,), 3)
    for attack in attacks:
        assert (attack(logits, three) - attack(logits, three + 1)).abs().max() < 20


# The metrics
def test_membership_metric_is_plain_scikit_learn_and_knows_its_extremes():
    rng, metric = np.random.default_rng(0), common.membership_inference
    sets = [(0.2, 9, 400), (0.4, 2, 300), (0.4, 3, 100)]
    retain, test, forget = (np.float32(1 - rng.beta(a, b, n)) for a, b, n in sets)
    retain[:100], test[:40] = 1.0, 1.0  # saturated confidences: many equal points
    members, *others = (torch.from_numpy(part) for part in (retain, test, forget))
    for n, own in ((300, members), (50, members[:50])):
        both = (part[np.arange(n) * len(part) // n] for part in (own.numpy(), test))
        x, y = np.concatenate([*both])[:, None], np.repeat([1, 0], n)  # as many of each
        attack = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y)
        expected = 1 - attack.predict(forget[:, None]).mean()
        assert 0.1 < expected < 0.9 and metric(own, *others) == pytest.approx(expected)
    high, low, shuffled = torch.linspace(0.9, 1, 50), torch.linspace(0, 0.1, 50), torch.arange(50)
    assert metric(high, low, high) == 0 and metric(high, low, low) == 1
    mixed = torch.cat([high[:20], low[:30]])
    assert metric(high, low, mixed) == metric(high.flip(0), low, mixed[shuffled * 7 % 50]) == 0.6


def test_confidence_is_the_probability_of_the_label_whatever_the_batch():
    logits, y = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 4
    whole, p = common.confidence(logits, y), logits.double().sigmoid()
    assert torch.allclose(whole, logits.double().softmax(1)[torch.arange(7), y])
    alone = [common.confidence(logits[i : i + 1], y[i : i + 1]) for i in range(7)]
    assert torch.equal(whole, torch.cat(alone))
    attributes = torch.randint(2, (7, 4), generator=torch.Generator().manual_seed(1)).float()
    expected = torch.where(attributes == 1, p, 1 - p).prod(1) ** 0.25
    assert torch.allclose(common.confidence(logits, attributes), expected)


# Whole runs

# 12 iterations: 6.4 passes over 121 images, 64 at a time
SHORT = ["--epochs", "25", "--passes", "6.4", "--alpha", "0.1", "--beta", "0.03"]
PHASES = {"train": T, "mi_models": L, "unlearn": L, "measure": E}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run on the digits: its result, what each phase read, and what it returned last."""
    folder, phases, gave = tmp_path_factory.mktemp("run"), {name: [] for name in PHASES}, {}
    with record_reads() as read, pytest.MonkeyPatch.context() as patch:

        def watched(name, real, *args, **kwargs):
            begin = len(read)
            gave[name] = real(*args, **kwargs)
            phases[name] += read[begin:]
            return gave[name]

        for name, module in PHASES.items():
            patch.setattr(module, name, partial(watched, name, getattr(module, name)))
        result = L.main([*places(folder), *SHORT])
    assert len(read) == sum(map(len, phases.values()))  # nothing is read between the phases
    sets = {name: set(np.concatenate(parts).tolist()) for name, parts in phases.items()}
    figures = {name: E.paper_figures(row) for name, row in result["metrics"].items()}
    return Namespace(folder=folder, result=result, figures=figures, read=sets, gave=gave)


@pytest.fixture
def again(run, monkeypatch):
    """The same run with further flags; the MI models, which would come out the same, are kept."""
    monkeypatch.setattr(L, "mi_models", lambda *_: run.gave["mi_models"])
    return lambda *extra: L.main([*places(run.folder), *SHORT, *extra])


def equal(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_forgets_the_forget_set(run):
    gold, own, before = (run.figures[row] for row in ("retrained", "unlearned", "original"))
    assert gold["ra"] > 0.95 and before["ua"] < 0.01 and own["ua"] > 0.02 and own["ra"] > 0.9
    assert common.average_gap(own, gold) < common.average_gap(before, gold) - 0.01
    lost = E.compare(run.result["metrics"])["unlearned"]
    assert lost["forget_lost"] > lost["control_lost_mean"]  # D_f, not what LTU never saw
    # Where RA is whole, all retained confidences are above 0.5: an error looks like a non-member.
    assert before["ra"] > 0.9999
    assert all(row["mi"] >= row["ua"] for row in run.figures.values() if row["ra"] > 0.9999)


def test_nothing_is_read_that_access_does_not_name(run, digits):
    """No test image before the evaluation, and of D_r only D_r_hat while unlearning."""
    retain, forget, val, test = (set(part.tolist()) for part in digits.parts.values())
    seen = set(digits.seen)
    assert run.result["split_hash"] == digits.split["hash"]
    assert run.result["access"] == {"unlearning": ["forget", "retain (rho 0.3)", "val"]}
    assert run.read["train"] == retain | forget | val
    assert run.read["mi_models"] == seen | val
    assert run.read["unlearn"] == seen | forget
    assert run.read["measure"] == retain | forget | val | test


def test_rho_limits_what_is_at_hand(digits):
    split, retain = digits.split, digits.split["retain"]
    sets = {rho: D.reachable(split, rho, 0) for rho in (0.1, 0.3, 1.0)}
    assert all(len(part) == round(rho * len(retain)) for rho, part in sets.items())
    assert set(sets[0.1]) < set(sets[0.3]) < set(sets[1.0]) == set(retain)
    assert D.reachable(split, 0.3, 1) != sets[0.3]
    controls = D.control_sets(None, split, sets[0.3])
    assert [len(part) for part in controls] == [len(split["forget"])] * 20
    assert not {retain[i] for part in controls for i in part} & set(sets[0.3])
    # With more to forget than was left unseen, a control set is half of the unseen.
    half = D.control_sets(None, dict(split, forget=range(10**6)), sets[0.3])
    assert {len(part) for part in half} == {(len(retain) - len(sets[0.3])) // 2}
    assert len({tuple(part) for part in half}) == 20


def test_result_file(run):
    keys = "name dataset setting seed split_seed split_hash flags access metric metrics conflicts"
    keys += " mi_models log seconds peak_memory_bytes device versions commit date passes"
    keys += " retrain_passes"
    path = run.folder / "out" / "digits-random0.1-noise0.1-split0" / "ltu-seed0.json"
    saved = json.loads(path.read_text())
    assert saved == run.result and set(saved) == set(keys.split()) and saved["name"] == "ltu"
    assert set(saved["seconds"]) == {"train", "retrain", "mi_models", "unlearn", "evaluate"}
    assert set(saved["metrics"]) == {"original", "retrained", "unlearned"}
    assert saved["metric"] == "accuracy" and saved["flags"]["rho"] == 0.3
    assert [set(entry) for entry in saved["mi_models"]] == [{"kind", "left_out"}] * 4
    # 12 iterations read 4 sets of 64; D_f and D_r_hat are read for Eq. (8), D_r_hat and D_v by MI
    assert saved["retrain_passes"] == pytest.approx(25 * 1090 / 1211)
    assert saved["passes"] * 1211 == pytest.approx(12 * 256 + 121 + 2 * 327 + 137)
    cosines = np.array([entry["cosine"] for entry in saved["log"]])
    expected = {"share": np.mean(cosines < 0), "mean_cosine": np.mean(cosines)}
    assert len(cosines) == 12 and saved["conflicts"] == pytest.approx(expected)


def test_every_mi_model_learns_and_one_that_does_not_is_named(run, digits, capsys):
    assert min(entry["left_out"] for entry in run.result["mi_models"]) > 0.58
    L.mi_models(digits.model, digits.data, digits.split, digits.seen, digits.args)  # untrained
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "better than chance" in x)
    assert set(line.split(": ")[1].split(", ")) <= set(L.KINDS)


def test_wrong_labels_are_counted_where_they_are(run, digits):
    wrong = {name: row["wrong"]["D_f"] for name, row in run.result["metrics"].items()}
    # Only memory knows a wrong label.
    assert wrong["original"]["flipped"] < 0.1 and wrong["retrained"]["flipped"] > 0.8
    assert wrong["unlearned"]["flipped"] > wrong["unlearned"]["clean"]
    flipped = digits.data["targets"] != digits.data["true_targets"]
    assert all(0.03 < flipped[part].float().mean() < 0.18 for part in digits.parts.values())


def test_g_f_of_a_trained_model_is_exact_under_amp(run, digits):
    """In bf16 it would be as far off as without the Hessian."""
    forget, seen = digits.parts["forget"], torch.tensor(digits.seen)
    z_1 = L.z_1_table(digits.model, digits.data, forget, seen)
    groups = L.by_label(digits.data, seen)
    model = copy.deepcopy(digits.model).train()
    model.load_state_dict(weights(run.folder, "original"))

    def g_f(t, kind, amp):
        args = Namespace(**vars(digits.args) | {"amp": amp})
        batch = L.draw_batch(digits.data, forget, seen, z_1, groups, t, args)
        batch["S"] = batch["S"].to(kind)
        net, attacks = copy.deepcopy((model, run.gave["mi_models"][0]))
        theta = {name: p.detach() for name, p in net.to(kind).named_parameters()}
        given = net, theta, batch, [attack.to(kind) for attack in attacks]
        return flat(L.forgetting(*given, 0.2)[0]).double()

    errors = [relative(g_f(t, torch.float32, True), g_f(t, torch.float64, False)) for t in range(3)]
    print(errors)
    assert np.median(errors) < 1e-3, errors  # a ReLU that changes sides may cost one its digits


def test_the_same_command_gives_the_same_numbers(run, capsys, monkeypatch):
    """From the file, or with --overwrite from a second run; other flags are refused."""
    command, before = [*places(run.folder), *SHORT], weights(run.folder, "ltu")
    with monkeypatch.context() as patch:
        patch.setattr(L, "train_both", None)
        assert L.main(command) == run.result and "UA (gap)" in capsys.readouterr().out
        refused(capsys, "made with --mi-models 4", L.main, [*command, "--mi-models", "5"])
    result = L.main([*command, "--overwrite"])
    for key in ("metrics", "log", "mi_models", "flags"):
        assert result[key] == run.result[key]
    assert equal(weights(run.folder, "ltu"), before)


REMEMBER, FORGET = {"tune", "test"}, {"mi_tune", "mi_test"}
BOTH = REMEMBER | FORGET | {"cosine"}
# {flag: (what the log holds, the row's name, what the first iteration shares with full LTU)}
ABLATIONS = {
    "--no-forfeed": ([REMEMBER] * 12, "LTU w/o ForFeed", REMEMBER),
    "--no-remfeed": ([FORGET] * 12, "LTU w/o RemFeed", FORGET),
    "--no-metaopt": ([BOTH] * 12, "LTU w/o MetaOpt", {"tune", "mi_tune"}),
    "--combine add": ([BOTH] * 12, "LTU w/ GradAdd", BOTH),
    "--combine iterative": ([FORGET, REMEMBER] * 6, "LTU w/ Iterative", FORGET),
}


@pytest.mark.parametrize("flag", ABLATIONS)
def test_each_ablation_changes_what_it_says(run, again, flag, capsys):
    """Same models, same split, same first batch; another result, in a file of its own."""
    (holds, label, shared), name = ABLATIONS[flag], flag.split()[-1].strip("-")
    result = again(*flag.split(), "--name", name)
    assert [set(told) for told in result["log"]] == holds and result["name"] == f"ltu-{name}"
    assert len(list((run.folder / "out").rglob(f"ltu-{name}-seed0.json"))) == 1
    assert any(line.startswith(f"{label} ") for line in capsys.readouterr().out.splitlines())
    assert result["split_hash"] == run.result["split_hash"]
    ours, full = result["metrics"], run.result["metrics"]
    assert [row for row in full if ours[row] != full[row]] == ["unlearned"]
    for key, value in result["log"][0].items():
        assert (value == pytest.approx(run.result["log"][0][key], rel=1e-4)) == (key in shared), key


def test_add_and_project_differ_only_where_gradients_conflict():
    p, conflicts = problem(), []
    for p.batch["attacks"] in itertools.permutations(range(4), 2):
        given = p.net, p.theta, p.batch, p.attacks
        added, told = L.iteration(*given, Namespace(**vars(p.args) | {"combine": "add"}))
        projected, _ = L.iteration(*given, p.args)
        conflicts.append(told["cosine"] < 0)
        assert torch.allclose(flat(projected), flat(added), rtol=1e-12) != conflicts[-1]
    assert 0 < sum(conflicts) < 12


def test_resume_equals_uninterrupted(run, again, monkeypatch, capsys):
    """Stopped in the middle of the loop, then --resume: the same model to the bit.

    By the clock an iteration takes 25 s: progress is saved at a minute, that is every third one.
    """
    real, calls, now = L.iteration, [], itertools.count(step=25)
    monkeypatch.setattr(L, "clock", lambda device: next(now))

    def stop(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(L, "iteration", stop)
    with pytest.raises(KeyboardInterrupt):
        again("--name", "resumed")
    (partial_file,) = run.folder.rglob("ltu-resumed-seed0.partial.pt")
    assert torch.load(partial_file, weights_only=True)["iteration"] == 5
    with pytest.MonkeyPatch.context() as patch:  # not with other images than it began with
        patch.setattr(L, "reachable", lambda split, *_: split["retain"][:50])
        refused(capsys, "was made with images 327", again, "--name", "resumed", "--resume")
    now = itertools.count(step=25)
    result = again("--name", "resumed", "--resume")
    assert len(calls) < 8 + 12 and not partial_file.exists()
    assert result["log"] == run.result["log"]  # and all reads are counted, but for MI models
    assert result["passes"] * 1211 == pytest.approx(12 * 256 + 121 + 327)
    took = {name: result["seconds"][name] for name in ("mi_models", "unlearn", "evaluate")}
    assert took == {"mi_models": 25, "unlearn": 6 * 25 + 7 * 25, "evaluate": 25}
    assert equal(weights(run.folder, "ltu-resumed"), weights(run.folder, "ltu"))


def test_beta_falls_to_0_along_a_cosine(digits, monkeypatch):
    """A gradient of ones moves every weight by the sum of the steps, on a copy of the model."""
    before = copy.deepcopy(digits.model.state_dict())
    ones = [torch.ones_like(p) for p in digits.model.parameters()]
    monkeypatch.setattr(L, "iteration", lambda *_: (ones, {"tune": 1.0}))
    args = Namespace(**vars(digits.args) | {"passes": 2.6, "beta": 0.2})  # 5 iterations
    student, _, _ = L.unlearn(digits.model, digits.data, digits.split, digits.seen, None, args)
    total = sum(0.2 * (1 + np.cos(np.pi * t / 5)) / 2 for t in range(5))
    for name, p in student.named_parameters():
        assert torch.allclose(p, before[name] - total, atol=1e-5), name
    assert equal(digits.model.state_dict(), before)


def test_iterations_grow_with_the_forget_set(digits, monkeypatch):
    """As many as make --passes passes over D_f, k images at a time, and at least one."""
    monkeypatch.setattr(L, "iteration", no_step)
    forget = digits.split["forget"]  # 121 images
    known = (32, 121, 64, 60), (4, 60, 64, 4), (4, 121, 11, 44), (0.1, 121, 64, 1)
    for passes, size, k, expected in known:
        args = Namespace(**vars(digits.args) | {"passes": passes, "support_size": k})
        split = digits.split | {"forget": forget[:size]}
        log = L.unlearn(digits.model, digits.data, split, digits.seen, None, args)[1]
        assert len(log) == expected


def test_a_diverged_step_stops_and_leaves_the_last_progress(run, again, monkeypatch, capsys):
    """No result is written, and --resume would go on from the last progress that was saved."""
    real, calls = L.iteration, []

    def poison(student, *args):
        gradient, told = real(student, *args)
        calls.append(1)
        return [g * float("nan") for g in gradient] if len(calls) == 4 else gradient, told

    monkeypatch.setattr(L, "iteration", poison)
    refused(capsys, "iteration 4 diverged", again, "--name", "unsaved")
    assert not list(run.folder.rglob("*unsaved*"))  # it took less than a minute
    calls.clear()
    now = itertools.count(step=35)  # every second iteration
    monkeypatch.setattr(L, "clock", lambda device: next(now))
    refused(capsys, "iteration 4 diverged", again, "--name", "poisoned")
    (path,) = run.folder.rglob("ltu-poisoned-seed0.partial.pt")
    saved = torch.load(path, weights_only=True)
    assert saved["iteration"] == 1
    assert all(torch.isfinite(t.float()).all() for t in saved["model"].values())
    assert not list(run.folder.rglob("*poisoned*.json"))


def test_a_step_that_explodes_is_caught_at_once(again, capsys):
    """A finite gradient, an update far too large: stopped by the weights, or the next losses."""
    flags = ["--beta", "1000", "--passes", "1.5", "--name", "exploded"]
    assert "diverged" in refused(capsys, "lower --beta (1000.0)", again, *flags)


def test_search_hands_out_the_judged_model_and_like_its_choice(run, monkeypatch, tmp_path, capsys):
    """It is judged by images that it was not trained on, and these stay left out."""
    monkeypatch.setattr(E, "TRIES", 3)
    real, at_hand = L.unlearn, []

    def recording(model, data, split, seen, *more, **options):
        at_hand.append(set(seen))
        return real(model, data, split, seen, *more, **options)

    monkeypatch.setattr(L, "unlearn", recording)
    flags = [*places(run.folder), *SHORT[:6], "--name"]  # without --beta, which is searched
    found = L.main([*flags, "found", "--search"])
    assert [set(tried) for tried in found["search"]] == [{"beta", "distance"}] * 3
    best = min(found["search"], key=lambda tried: tried["distance"])
    assert found["chosen"] == {"beta": best["beta"]} and found["open"] in ([], ["beta"])
    assert found["access"]["choosing flags"] == ["forget", "retain (rho 0.3)", "val"]
    assert {len(images) for images in at_hand} == {295} and len(at_hand) == 3 + 1
    args = L.parse_args([*flags, "found"])
    args.amp, (data, split) = False, T.open_data(args, torch.device("cpu"))
    judges = sorted({*L.reachable(split, 0.3, 0)} - at_hand[0])
    (path,) = (run.folder / "ckpt").rglob("ltu-found-seed0.pt")
    originals = path.with_name("original-seed0.pt")
    models = [common.load_model(name)[0] for name in (path, originals)]
    judge = E.judging(models[1], None, data, split, judges, args)
    got, same = (judge(lambda m=m: m) for m in models)
    assert best["distance"] == pytest.approx(got, abs=1e-5) and found["nothing"] == same
    alike = L.main([*flags, "alike", "--like", "ltu-found"])
    assert alike["metrics"] == found["metrics"] and alike["chosen"] == found["chosen"]
    twice = L.main([*flags, "twice", "--like", "ltu-found", "--combine", "iterative"])
    assert len(twice["log"]) == 2 * len(found["log"])
    assert twice["chosen"]["passes"] == 2 * float(SHORT[SHORT.index("--passes") + 1])
    refused(capsys, "holds no search of LTU", L.main, [*flags, "no", "--like", "ltu"])
    refused(capsys, "drop it or --search", L.parse_args, ["--like", "ltu", "--search"])
    both = ["both", "--like", "ltu-found", "--beta", "1"]
    refused(capsys, "--like ltu-found brings --beta; drop one", L.main, [*flags, *both])
    all_given = ["--search", "--beta", "1", "--alpha", "1", "--passes", "1"]
    refused(capsys, "nothing to choose: --beta, --alpha, --passes are", L.parse_args, all_given)
    whole = ["--forget", "class", "--forget-classes", "1", "--label-noise", "0", "--search"]
    refused(capsys, "leaves none", L.parse_args, whole)


def test_flags_of_unknown_data_and_with_identities_are_searched(flags, monkeypatch):
    for dataset in (flags[1], "celeba"):  # of which LTU has no values
        assert L.parse_args(["--dataset", dataset]).search == ["beta", "alpha", "passes"]
    assert L.parse_args([*flags[:2], "--passes", "1"]).search == []
    assert L.parse_args(["--no-metaopt", "--search"]).search == ["beta", "passes"]
    monkeypatch.setattr(E, "TRIES", 2)
    args = L.parse_args([*flags, "--support-size", "8", "--passes", "1", "--search"])
    args.amp = False
    data, split = T.open_data(args, torch.device("cpu"))
    model = T.train("original", data, split, args)[0]
    with record_reads() as read:
        everyone = split["retain"]
        attacks = L.mi_models(model, data, split, everyone, args)[0]
        _, record = L.search(model, data, split, everyone, everyone, attacks, args)
    read = set(np.concatenate(read).tolist())
    assert len(record["search"]) == 2 and not read & set(split["test"] + split["support"])
    problems, asked = E.simulated_problems(model, data, split, args), []

    def stand_in(model, data, request, others, *_):
        asked.append((request["forget"], others))
        return model, [], 0.0

    def once(start, distance, nothing, args, partial, most):
        distance(start)
        return start, most

    monkeypatch.setattr(L, "unlearn", stand_in)
    monkeypatch.setattr(E, "search", once)
    _, most = L.search(model, data, split, everyone, everyone, attacks, args)
    for (forget, others), problem in zip(asked, problems, strict=True):
        assert forget == problem["sets"]["forget"].tolist() and len(others) > 50
        assert not {*data["identities"][forget]} & {*data["identities"][others]}
    n_f, n_r = len(split["forget"]), len(split["retain"])  # S and three query sets are read
    assert most["passes"] == pytest.approx(0.2 * args.epochs * (n_r + n_f) / (4 * n_f), rel=5e-3)


def test_somebodys_own_model_unlearns_and_no_file_is_written(tmp_path, monkeypatch):
    """The same draws with twice the step move it twice as far."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(4, 3)).eval()
    D_f, D_r, D_v = ((torch.randn(n, 3, 8, 8), torch.randint(3, (n,))) for n in (12, 40, 24))
    moved, before = [], flat(net.parameters()).clone()
    for beta in (0.001, 0.002):
        given = dict(beta=beta, alpha=0.1, passes=1.0, support_size=12)
        moved.append(flat(L.forget(net, D_f, D_r, D_v, **given).parameters()) - before)
    assert torch.equal(flat(net.parameters()), before) and moved[0].norm() > 1e-4
    assert torch.allclose(2 * moved[0], moved[1], atol=1e-6)
    monkeypatch.setattr(E, "TRIES", 2)
    with pytest.MonkeyPatch.context() as patch:
        searched, trained_on, real = [], [], L.unlearn
        patch.setattr(E, "search", lambda start, *_: searched.append(list(start)) or ({}, {}))
        patch.setattr(L, "unlearn", lambda *have: trained_on.append(len(have[3])) or real(*have))
        L.forget(net, D_f, D_r, D_v, support_size=12)
        L.forget(net, D_f, D_r, D_v, support_size=12, metaopt=False)  # alpha has no part in it
    assert searched == [["beta", "alpha", "passes"], ["beta", "passes"]]
    assert not list(tmp_path.iterdir())
    assert trained_on == [20, 20]  # of D_r's 40, half judge: there are fewer than 60
    with pytest.raises(TypeError, match="gamma"):
        L.forget(net, D_f, D_r, D_v, gamma=1)
    # A layer that is not used, and dropout: the same masks in each run, and not the caller's.
    net.add_module("4", nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)))
    net.register_module("5", Unused())
    given, runs = dict(head="4.1", beta=1e-3, alpha=0.01, passes=2.0, support_size=6), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(L.forget(net, D_f, D_r, D_v, **given))
    assert torch.equal(*(flat(found.parameters()) for found in runs))
    assert torch.equal(runs[0][5].spare.bias, net[5].spare.bias)
    with pytest.MonkeyPatch.context() as patch:  # other masks in another iteration
        seeds, real = [], torch.manual_seed
        patch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
        L.forget(net, D_f, D_r, D_v, **given)
    assert len(set(seeds)) == len(seeds) == 4 + 4  # of four MI models, and of four iterations


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 5)

    def forward(self, x):
        return x


def no_step(student, *_):
    return [torch.zeros_like(p) for p in student.parameters()], {"test": 1.0}


def test_images_that_no_feedback_needs_are_not_read(digits, monkeypatch):
    """MI models and z_1 left out, an iteration reads S, and Q (3k) where it remembers."""
    unlearned = dict(passes=4 * 64 / 121, support_size=64)
    for changes, read in (
        ({}, 4 * (64 + 192) + 121 + len(digits.seen)),
        ({"remfeed": False}, 4 * 64),
        ({"combine": "iterative"}, 2 * 64 + 2 * 256 + 121 + len(digits.seen)),
    ):
        args = Namespace(**vars(digits.args) | unlearned | changes)
        before = digits.data.get("read", 0)
        monkeypatch.setattr(L, "iteration", no_step)
        L.unlearn(digits.model, digits.data, digits.split, digits.seen, None, args)
        assert digits.data["read"] - before == read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(L.evaluate, "search", lambda *given: (given[-1], {}))
            patch.setattr(L.evaluate, "judging", lambda *_: lambda _: 0.0)
            args.search, own = ["passes"], (digits.model, digits.data, digits.split, digits.seen)
            most = L.search(*own, digits.seen, None, args)[0]
        images = {1024: 4, 256: 1, 640: 2.5}[read - (121 + len(digits.seen)) * (read > 256)]
        assert most["passes"] == pytest.approx(0.2 * args.epochs * 1211 / 121 / images, rel=5e-3)


def test_step_sizes_that_suit_another_model_are_said(run, again, flags, capsys):
    """After unlearning, where D_r suffered; and before training that they are searched."""
    advice = "; try --search"
    result = again("--alpha", "0.3", "--beta", "0.3", "--name", "damaged")
    lost = [result["metrics"][row]["retain"]["accuracy"] for row in ("original", "unlearned")]
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.endswith(advice))
    assert line.startswith(f"RA fell from {100 * lost[0]:.1f} to {100 * lost[1]:.1f}: the step")
    again("--beta", "1e-6", "--name", "whole")
    printed = capsys.readouterr().out
    assert advice not in printed and "are searched" not in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L, "train_both", refuse)
        with pytest.raises(InterruptedError):
            L.main(flags)
    assert "no step sizes for" in capsys.readouterr().out


def refuse(*_):
    raise InterruptedError


def test_class_forgetting_run(tmp_path):
    """Neither the gold model nor LTU should know test images of a class that is gone."""
    flags = ["--forget", "class", "--forget-classes", "3", "--label-noise", "0"]
    flags += ["--epochs", "5", "--passes", "12", "--alpha", "0.1", "--beta", "0.03"]
    result = L.main([*places(tmp_path), *flags])
    assert result["setting"] == "class3-split0"
    rows = result["metrics"]
    known = {name: row["test_forgotten"]["score"] for name, row in rows.items()}
    assert known["retrained"] == 0 and known["unlearned"] < known["original"] > 0.9
    assert E.paper_figures(rows["retrained"])["ua"] == 1 and "wrong" not in rows["unlearned"]


def test_attributes_and_identities_too(flags, tmp_path, capsys):
    """Identities to forget: mAP and ToW of a multi-label model without batch norm, and no MI."""
    result = L.main([*flags, "--passes", "1", "--support-size", "8", "--plot"])
    assert result["setting"] == "ids4-split0" and result["metric"] == "mAP"
    assert not any({"mi", "wrong"} & set(row) for row in result["metrics"].values())
    assert 0 < E.compare(result["metrics"])["unlearned"]["tow"] <= 1
    printed = capsys.readouterr().out
    assert "mAP" in printed and "UA (gap)" not in printed
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_dry_run_takes_every_phase_and_is_kept_apart(tmp_path):
    dry = ["--dry-run", *places(tmp_path), "--save", str(tmp_path / "mine.pt")]
    result = L.main([*dry, "--rho", "0.05"])
    assert result["setting"].endswith("-dry") and len(result["log"]) == 2
    saved = torch.load(tmp_path / "mine.pt", weights_only=True)
    assert saved["which"] == "unlearned" and saved["split"] == result["split_hash"]


OUT_OF_RANGE = "rho 0, rho 1.5, mi-models 1, alpha 0, beta -1, passes 0, support-size 1, name a/b"
BAD = {f"--{flag}": f"argument --{flag.split()[0]}: " for flag in OUT_OF_RANGE.split(", ")}
BAD |= {
    "--rho 0.0001": "--rho 0.0001 leaves",
    "--forget-ratio 0.99": "leaves none of class",
    "--forget class": "needs --forget-classes",
    "--held-out": "--held-out goes with --forget identities",
    "--label-noise 0 --forget class --forget-classes 10": "absent: [10]",
    "--label-noise 0 --forget class --forget-classes 0 1 2 3 4 5 6 7 8 9": "one must stay",
    "--label-noise 0 --forget subclass --forget-classes 1": "super-classes",
    "--forget class --forget-classes 1": "--label-noise 0",
    "--forget-classes 3": "--forget random",
    "--ids 3": "--forget identities",
    "--forget identities": "no identities",
    "--no-forfeed --no-remfeed": "nothing to do",
    "--no-forfeed --combine add": "--combine add",
    "--train-images 60": "fewer than a batch",
    "--train-images 8": "has no training image",
    "--save .": "is a folder",
    "--init pretrained": "no pretrained weights",
}


@pytest.mark.parametrize("extra", BAD)
def test_bad_input_gets_one_line_before_anything_is_trained(extra, tmp_path, capsys):
    refused(capsys, BAD[extra], L.main, [*places(tmp_path), *extra.split()])
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".json")]


def test_an_interrupted_run_goes_on_with_every_flag_of_its_method():
    typed = re.findall(r'add\("--(?:no-)?([a-z-]+)"', inspect.getsource(L.parse_args))
    assert {flag.replace("-", "_") for flag in typed} - {"search", "like"} == {*L.METHOD_FLAGS}
