"""METAUNLEARN against finite differences, double backward, formulas written here, and itself."""

import argparse
import copy
import inspect
import itertools
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from check_gradient import check_gradient, flat, relative, shifted, slope
from conftest import mutated, places, record_reads, refused
from sklearn.metrics import average_precision_score
from torch.func import functional_call

import baselines
import common
import data as D
import evaluate
import metaunlearn as M
import train as T

ROOT = pathlib.Path(__file__).parent.parent
VARIANTS = {
    "paper": [],
    "paper, first term": ["--aux-loss", "first"],
    "paper, second term, logits": ["--aux-loss", "second", "--inputs", "logits"],
    "paper, features only": ["--inputs", "features,targets"],
    "paper, no accuracy weight": ["--no-accuracy-weight"],
    "code": ["--preset", "code"],
    "code, retained people": ["--preset", "code", "--retain-weight", "0.5"],
    "selective": ["--preset", "selective"],
    "selective, one eta": ["--preset", "selective", "--alpha-step", "0"],
    "scrub": ["--aux-loss", "scrub"],
    "natural": ["--natural", "0.01"],
    "natural, code": ["--natural", "0.001", "--preset", "code"],
    "natural, selective": ["--natural", "0.01", "--preset", "selective"],
}


@pytest.fixture(scope="module", autouse=True)
def pairs_of_five():
    """--preset code then has two pairs in a request of 9 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(M, "PAIR", 5)
        yield


def problem(small, *extra, dtype=torch.float64, classes=False, model="toy_vit", hidden=6):
    """A model, a meta-loss away from its zero initialisation, and a simulated request, in dtype."""
    flags = ["--dataset", small, "--ids", "3", "--model", model, "--hidden", str(hidden)]
    args = M.parse_args([*flags, "--val-images", "8", "--retain-images", "7", *extra])
    args.amp, data = False, D.load(args)
    if classes:
        data |= {"targets": data["targets"][:, :2].long().sum(1), "classes": 3}
    split = D.identity_split(data, args.ids, 0)
    net = common.build_model(args.model, data["classes"], args.image_size, seed=1).to(dtype).eval()
    fisher = M.fisher_of(copy.deepcopy(net).float(), data, split, args)
    h = M.new_meta_loss(net, data, split, args, fisher)
    theta = M.updatable(net, args.preset == "code")
    for p in (h.mlp[-2].weight, *(h.log_step or [])):
        torch.nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(0))
    h.to(dtype).eval()
    original = M.original_outputs(copy.deepcopy(net).float(), data, split, args)
    original["v0"] = original["v0"][0].to(dtype), original["v0"][1]
    support, forget = next(D.simulated_requests(data, split, args.ids, 0, 0))
    sets = M.request_sets(split, support, forget, args, np.random.default_rng(0))
    S = M.support_batch(data, split["train_ids"], support)
    made = dict(args=args, data=data, split=split, net=net, h=h, theta=theta, original=original)
    return types.SimpleNamespace(**made, support=support, forget=forget, sets=sets, S=S)


def gradient(p, way="forward", module=M) -> tuple:
    """A of the request, and its gradient as one vector."""
    args = argparse.Namespace(**vars(p.args) | {"hypergradient": way})
    rng, request = np.random.default_rng(0), (p.support, p.forget)
    A, g = module.request_gradient(p.h, p.net, request, p.data, p.split, p.original, args, rng)
    return A, flat(g)


def unlearn(p, module=M, h=None) -> dict:
    f = module.model_function(p.net, p.args.amp)
    return module.unlearn(h or p.h, f, p.theta, p.S, p.args.eta)


def plain_A(p, h, weights=None) -> tuple:
    """Eq. (8), and the authors' form of it, without the project's functions: (A, mAP weights)."""
    images, targets, who = p.S[0].double(), *p.S[1:]
    theta = {k: t.clone().requires_grad_() for k, t in p.theta.items()}
    loss = h(*functional_call(p.net, theta, (images,)), targets, who)
    g = torch.autograd.grad(loss, list(theta.values()))
    theta_u = {k: t - p.args.eta * d for (k, t), d in zip(theta.items(), g, strict=True)}
    code, A, found = p.args.preset == "code", 0.0, []
    for part in p.sets:
        E, v0 = [], part["v"] if code else p.split["val"]
        for at, indices in ((theta_u, part["f"]), (theta_u, part["v"]), (theta, v0)):
            x = (p.data["images"][indices].permute(0, 3, 1, 2) / 255.0).double()
            with torch.no_grad():
                logits = functional_call(p.net, at, (x,))[1]
            y = p.data["targets"][indices].double()
            if weights is None:
                seen = [k for k in range(y.shape[1]) if y[:, k].any()]
                AP = [average_precision_score(y[:, k], logits[:, k]) for k in seen]
            found.append(1 - np.mean(AP) if weights is None else weights[len(found)])
            E.append(found[-1] * F.binary_cross_entropy_with_logits(logits, y).item())
        for d in (abs(E[0] - E[1]), abs(E[0] - E[2])):
            distance = (0.5 * d**2 if d < 1 else d - 0.5) if code else d**2
            A += distance * len(part["f"]) / len(p.forget)
    return A, found


# --------------------------------------------------------------------------------------------------
# The meta-gradient


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_A_is_equation_8(small, preset):
    p = problem(small, "--preset", preset)
    expected = pytest.approx(plain_A(p, p.h)[0], rel=1e-5)  # the original's outputs are float32
    assert gradient(p)[0] == expected and gradient(p, "double")[0] == expected
    assert len(p.sets) == (1 if preset == "paper" else 2)


def test_both_meta_gradients_against_finite_differences_of_equation_8(small):
    """Every coordinate of a small phi, central differences of a formula written in this file."""
    p = problem(small, "--inputs", "logits,features", hidden=2)
    p.split["val"] = p.sets[0]["v"]  # a small D_v, and its exact outputs in place of float32
    with torch.no_grad():
        logits = p.net(D.raw_batch(p.data, p.split["val"]).double())[1]
    y = p.data["targets"][p.split["val"]].double()
    p.original["v0"] = F.binary_cross_entropy_with_logits(logits, y), common.score(logits, y)
    weights, slopes = plain_A(p, p.h)[1], []
    for by in 1e-4 * torch.eye(sum(q.numel() for q in p.h.parameters()), dtype=torch.float64):
        A = [plain_A(p, shifted(p.h, signed), weights)[0] for signed in (by, -by)]
        slopes.append((A[0] - A[1]) / 2e-4)
    for way in ("forward", "double"):
        assert relative(gradient(p, way)[1], torch.tensor(slopes, dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("extra", VARIANTS.values(), ids=VARIANTS)
def test_forward_equals_double_backward_and_finite_differences(small, extra):
    """The latter along a random direction of phi, with the mAPs held constant."""
    p = problem(small, *extra)
    exact, f = gradient(p)[1], M.model_function(p.net)

    def A(theta_u):
        return M.auxiliary(f, theta_u, p.sets, p.data, p.original, p.args)

    request = (p.h, f, A, p.theta, p.S, p.args.eta)
    double = flat(M.meta_gradient_double(*request)[1])
    assert torch.equal(gradient(p, "double")[1], double) and not torch.equal(exact, double)
    assert relative(exact, double) < 1e-10
    noise = torch.randn(len(exact), generator=torch.Generator().manual_seed(0)).double()
    along = exact / exact.norm() + 0.1 * noise / noise.norm()
    assert slope(along, 1e-5, *request) == pytest.approx(float(exact @ along), rel=1e-6)


def test_forward_equals_double_with_classes_batch_norm_and_dropout(small):
    p = problem(small, model="resnet10t", classes=True)
    assert relative(gradient(p)[1], gradient(p, "double")[1]) < 1e-10
    q, found = problem(small, "--dropout", "0.5"), []
    q.h.train()
    for way, seed in (("forward", 3), ("double", 3), ("forward", 4)):
        torch.manual_seed(seed)
        found.append(gradient(q, way)[1])
    assert relative(found[0], found[1]) < 1e-10
    assert relative(found[2], found[0]) > 1e-3  # the masks matter


def dropout_acts(p, module) -> bool:
    """Whether two calls of unlearn disagree, phi having been left in train mode with dropout."""
    h = copy.deepcopy(p.h)
    h.mlp[4].p = 0.5
    one, two = (flat(unlearn(p, module, h.train()).values()) for _ in range(2))
    return not torch.equal(one, two)


def differs(p, module) -> bool:
    """Whether A, its gradient or the step of unlearning are not those of the true source."""
    try:
        A, g = gradient(p, module=module)
    except RuntimeError:  # autograd itself refuses
        return True
    moved = relative(g, p.exact[1]) > 1e-3 or abs(A / p.exact[0] - 1) > 1e-3
    return moved or dropout_acts(p, module)


@pytest.fixture(scope="module")
def problems(small):
    """With learned step sizes, and with pairs of images; their true gradients; parts of a set."""
    learned = ["--alpha-step", "0.1", "--retain-weight", "0.3"]
    more = (learned, ["--preset", "code"], ["--natural", "0.01"])
    found = [problem(small, *extra) for extra in more]
    for p in found:
        p.exact, p.args.meta_batch_size = gradient(p, "double"), 4
        assert relative(gradient(p, "double")[1], p.exact[1]) < 1e-12  # parts change nothing
    return found


# fmt: off
MUTANTS = {
    "first order: no graph from g to phi": ("z_leaf, create_graph=True", "z_leaf, retain_graph=1"),
    "sign of the inner step": ("p - e * g for", "p + e * g for"),
    "features forgotten in the product": ("(g_z, z_prime, strict", "(g_z[1:], z_prime[1:], strict"),
    "eta forgotten": ("[e.detach() * d for", "[d for"),
    "tangent as without --natural": ("h_phi.direction(theta, [e.det", "list([e.det"),
    "step as without --natural": ("g, etas = h_phi.direction(theta, g)", "g, etas = g"),
    "step sizes' own gradient forgotten": ("product = product + sum(", "sum("),
    "sign of the meta-gradient": ("grad(-product", "grad(product"),
    "v of the last set only": ("original, args)\n            if",
        "original, args)\n            L = {k: L[k] if k == name else L[k].detach() for k in L}\n"
        "            if"),
    "A of the last pair only": ('total + part["weight"] *', 'part["weight"] *'),
    "mean of the parts' means": ("losses.sum() / len(indices)",
        "losses.mean() / -(-len(indices) // args.meta_batch_size)"),
    "gradient of the last part only": ("torch._foreach_add(gradient, own) if gradient else", ""),
    "value of the last part only": ("total + mean.detach()", "mean.detach()"),
    "the slope in the value": ("(g * (p - p.detach()))", "(g * p)"),
    "tangent at the wrong point": ("(theta,), (tangent,))", "(theta_u,), (tangent,))"),
    "no gradient through the validation loss": ('"v" and args.preset == "code"', '"v"'),
    "gradient through it in the authors' code": ('"v" and args.preset == "code"', '"" '),
    "no accuracy weight": ("1 - a if args.accuracy_weight else 1.0", "1.0"),
    "accuracy instead of error": ("1 - a if args.accuracy_weight", "a if args.accuracy_weight"),
    "all of D_v for a pair": ('"code":  # over the pair', '"":  # over the pair'),
    "no eval": ("h_phi.eval()\n    theta", "theta"),
}
# fmt: on


@pytest.mark.parametrize("old, new", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_the_meta_gradient_are_caught(problems, old, new):
    """Each breaks metaunlearn.py in memory, and must move A, its gradient or theta_u."""
    mutant = mutated(M, old, new)
    mutant.PAIR = M.PAIR
    assert not any(differs(p, M) for p in problems)
    assert any(differs(p, mutant) for p in problems)


def test_meta_step_leaves_the_model_alone(small):
    """theta, batch-norm statistics, flags and gradients: bit for bit."""
    p = problem(small, model="resnet10t")
    before = copy.deepcopy(p.net.state_dict())
    flags_before = [q.requires_grad for q in p.net.parameters()]
    for way in ("forward", "double"):
        gradient(p, way)
    unlearn(p)
    assert all(torch.equal(before[k], t) for k, t in p.net.state_dict().items())
    assert flags_before == [q.requires_grad for q in p.net.parameters()]
    assert all(q.grad is None for q in p.net.parameters()) and not p.net.training


# --------------------------------------------------------------------------------------------------
# Equations and sets


def test_meta_loss_is_positive_and_the_first_update_zero_but_with_preset_code(small):
    p = problem(small, dtype=torch.float32)
    assert p.h(*p.net(p.S[0]), *p.S[1:]).item() > 0
    for preset in ("paper", "code"):
        p.args.preset = preset
        theta_u = unlearn(p, h=M.new_meta_loss(p.net, p.data, p.split, p.args))
        same = all(torch.equal(theta_u[k], p.theta[k]) for k in p.theta)
        assert same == (preset == "paper")


def test_preset_code_leaves_the_embeddings(small):
    p = problem(small, "--preset", "code")
    theta_u = unlearn(p)
    left_out = {k for k, _ in p.net.named_parameters()} - set(theta_u)
    assert left_out == {"net.cls_token", "net.pos_embed"}
    for k in ("net.patch_embed.proj.weight", "net.head.bias"):
        assert not torch.equal(theta_u[k], p.theta[k])


def test_image_losses_by_hand():
    """The task loss, KL(theta || theta_u), and SCRUB's terms at T = 4; KL: see test_common.py."""
    logits, logits_0 = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for y in (torch.ones(5, 4), torch.zeros(5).long()):
        far, cold = (common.kl_divergence(logits_0, logits, y.ndim == 2, T) for T in (1.0, 4.0))
        task = common.task_losses(logits, y)
        expected = {("f", 0): task, ("v", 0): task, ("r", 0): far}
        expected |= {("f", 1): cold, ("r", 1): 0.99 * task + 0.001 * cold}
        for (name, scrub), value in expected.items():
            found = M.image_losses(name, logits, y, logits_0, bool(scrub))
            assert torch.allclose(found, value, atol=1e-6), (name, scrub)


def test_auxiliary_loss_by_hand():
    """Eq. (8) and its ablations on numbers: L_f 2, L_v 3, L_v0 5, L_r 7; mAP .5, .25, .75."""
    L = {k: torch.tensor(float(x)) for k, x in dict(f=2, v=3, v0=5, r=7).items()}
    mAP = dict(f=0.5, v=0.25, v0=0.75)
    args = dict(aux_loss="both", accuracy_weight=True, preset="paper", retain_weight=0.0)
    for changes, expected in (
        ({}, (1 - 2.25) ** 2 + (1 - 1.25) ** 2),
        ({"aux_loss": "first"}, (1 - 2.25) ** 2),
        ({"aux_loss": "second"}, (1 - 1.25) ** 2),
        ({"accuracy_weight": False}, (2 - 3) ** 2 + (2 - 5) ** 2),
        ({"preset": "code"}, (1.25 - 0.5) + 0.5 * 0.25**2),
        ({"retain_weight": 2.0}, (1 - 2.25) ** 2 + (1 - 1.25) ** 2 + 14),
        ({"aux_loss": "scrub"}, 7 - 2),
    ):
        A = M.auxiliary_loss(L, mAP, argparse.Namespace(**args | changes))
        assert A.item() == pytest.approx(expected), changes


def test_request_sets(small):
    p = problem(small)
    assert np.array_equal(p.sets[0]["f"], p.forget) and set(p.sets[0]["v"]) <= set(p.split["val"])
    assert len(p.sets) == 1 and len(p.sets[0]["v"]) == 8 and "r" not in p.sets[0]
    q = problem(small, "--preset", "code", "--retain-weight", "1")
    assert [len(part["f"]) for part in q.sets] == [5, 4]
    assert all(len(part["v"]) == 5 and len(part["r"]) == 7 for part in q.sets)
    assert np.array_equal(np.concatenate([part["f"] for part in q.sets]), q.forget)
    assert sum(part["weight"] for part in q.sets) == pytest.approx(1)
    retained = set(np.concatenate([part["r"] for part in q.sets]))
    assert not retained & {*q.forget, *q.support, *q.split["support"]}
    whole = problem(small, "--val-images", "0")
    assert sorted(whole.sets[0]["v"]) == whole.split["val"]
    few = problem(small, "--preset", "code", "--forget-images", "7")
    drawn = np.concatenate([part["f"] for part in few.sets])
    assert [len(part["f"]) for part in few.sets] == [5, 2] and len({*drawn}) == 7
    assert {*drawn} < {*few.forget} and {*drawn} != {*few.forget[:7]}  # random ones
    assert [part["weight"] for part in few.sets] == [5 / 7, 2 / 7]
    assert len(problem(small, "--forget-images", "10").sets[0]["f"]) == 9  # all there are
    few = problem(small, "--retain-weight", "1", "--retain-images", "999", "--forget-images", "2")
    training = {*few.split["retain"], *few.split["forget"]}  # and no image of D_f that is not drawn
    assert {*few.sets[0]["r"]} == training - {*few.forget} - {*few.support}


def test_h_phi_is_the_mean_of_its_network_over_images():
    """Of probabilities, as the authors' code has it; the same for attributes and for classes."""
    torch.manual_seed(0)
    f, z, who = torch.randn(5, 4), 3 * torch.randn(5, 3), torch.tensor([1, 0, 2, 2, 1])
    y, c = torch.randint(2, (5, 3)).float(), torch.tensor([0, 2, 1, 1, 0])
    right = (z.sigmoid() * y + (1 - z.sigmoid()) * (1 - y)).log()
    for names, labels, parts in (
        ("logits,features,targets,ids", y, lambda h: [z.sigmoid(), f, y, h.identity.weight[who]]),
        ("losses,targets", y, lambda h: [-right, y]),
        ("features,logits,targets", c, lambda h: [f, z.softmax(1), torch.eye(3)[c]]),
        ("losses,logits", c, lambda h: [-z.log_softmax(1).gather(1, c[:, None]), z.softmax(1)]),
    ):
        h = M.MetaLoss(names.split(","), 3, 4, 3, hidden=6, multilabel=labels is y)
        want = torch.stack([h.mlp(image) for image in torch.cat(parts(h), 1)]).sum() / 5
        assert h(f, z, labels, who).item() == pytest.approx(want.item(), rel=1e-5)


def test_a_step_takes_the_mean_of_several_requests_of_so_many_people(small, monkeypatch):
    p = problem(small, "--meta-ids", "2", "--requests-per-step", "3", dtype=torch.float32)
    number, steps, asked, real = itertools.count(1), [], [], M.simulated_requests

    def requests(data, split, people, *more):
        asked.append((people, len(list(real(data, split, people, *more)))))
        return real(data, split, people, *more)

    def gradient(h_phi, *_):
        own = float(next(number))
        return own, [torch.full_like(q, own) for q in h_phi.parameters()]

    def step(self):
        (group,) = self.param_groups
        assert group["amsgrad"] and group["weight_decay"] == 0
        steps.append(group["params"][0].grad.mean().item())

    monkeypatch.setattr(M, "simulated_requests", requests)
    monkeypatch.setattr(M, "request_gradient", gradient)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    p.args.meta_epochs = 1
    M.meta_train(p.net, p.data, p.split, p.args)
    [(people, count)] = asked
    groups = [range(1, count + 1)[i : i + 3] for i in range(0, count, 3)]
    assert people == 2 and steps == [np.mean(group) for group in groups] and len(groups) > 1


def test_a_meta_loss_remembers_every_flag_that_makes_it_another():
    """Else a run with another value of the flag would be given the old meta-loss."""
    typed = re.findall(r'add\("--(?:no-)?([a-z-]+)"', inspect.getsource(M.parse_args))
    others = {"search", "hypergradient", "meta_batch_size", "check_gradient"}
    others |= {"meta_loss", "support", "export_support"}
    assert {flag.replace("-", "_") for flag in typed} - others == {*M.META_FLAGS}


def test_preset_code_is_the_authors_code_on_every_data_set():
    """Width and dropout of h_phi, alpha, epochs (their config); S in float32 is tested below."""
    for dataset in ("toyfaces", "own/pair", "celebahq"):
        args = M.parse_args(["--dataset", dataset, "--preset", "code", "--eta", "0.2"])
        assert (args.hidden, args.dropout, args.alpha, args.meta_epochs) == (512, 0.5, 1e-4, 3)
    recipe = args.model, args.init, args.image_size, args.epochs, args.lr, args.weight_decay
    assert recipe == ("vit_base_patch16_224", "pretrained", 224, 30, 1e-3, 1e-3)
    assert args.eta == 0.2 and M.parse_args(["--dataset", "celeba"]).weight_decay == 1e-4
    assert M.parse_args(["--preset", "code", "--hidden", "7"]).hidden == 7


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_autocast_and_cosine(small, preset, monkeypatch):
    """--preset code: S in float32 and D_f in bf16, and alpha times 1, 0.75, 0.25 in its epochs."""
    code, runs, rates = preset == "code", set(), []
    p = problem(small, "--preset", preset, "--ids", "6", dtype=torch.float32)
    p.args.amp = True

    def watch(net, images):
        runs.add((len(images[0]), torch.is_autocast_enabled("cpu")))

    hook = p.net.register_forward_pre_hook(watch)
    gradient(p)
    n_s, others = len(p.S[0]), {(len(part[name]), True) for part in p.sets for name in "fv"}
    assert runs == {(n_s, not code)} | others and n_s not in dict(others)
    hook.remove()
    f, theta = M.f_and_theta(p.net, p.args)
    assert torch.equal(f(theta, p.S[0])[0], p.net(p.S[0])[0]) == code
    optimizer = torch.optim.SGD([{"params": p.h.parameters(), "peak": 1.0}], 1.0)

    def none(*arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0, [torch.zeros_like(q) for q in p.h.parameters()]

    monkeypatch.setattr(M, "request_gradient", none)
    for epoch in range(3):
        M.meta_epoch(p.h, optimizer, p.net, p.data, p.split, None, epoch, p.args)
    n = len(rates) // 3  # each request sees the rate of the step before it
    done = [epoch / 3 + (0 if code else step / n / 3) for epoch in range(3) for step in range(n)]
    expected = [0.5 * (1 + math.cos(math.pi * x)) for x in done]
    assert n > 1 and rates[1:] == pytest.approx(expected[:-1])


def test_a_memorised_forget_set_is_said(small, capsys, monkeypatch):
    """Where the logits of D_f make no mistake, and Eq. (6) is in use: one line."""
    p = problem(small, dtype=torch.float32)
    y = p.data["targets"][p.split["forget"]]
    for logits, weight, said in ((y, True, 1), (y, False, 0), (-y, True, 0)):
        monkeypatch.setattr(M, "predict", lambda *a, logits=logits: logits)
        p.args.accuracy_weight = weight
        M.warn_of_vanishing_weights(p.net, p.data, p.split, p.args)
        assert capsys.readouterr().out.count("warning: 1 - mAP of D_f is 0.000") == said


def test_meta_training_reads_what_access_says(small):
    """Training and validation images; never the Support set of the real request or a test image."""
    p = problem(small, "--retain-weight", "1", dtype=torch.float32)
    optimizer = torch.optim.SGD([{"params": p.h.parameters(), "peak": 0.1}], 0.1)
    with record_reads() as read:
        original = M.original_outputs(p.net, p.data, p.split, p.args)
        M.meta_epoch(p.h, optimizer, p.net, p.data, p.split, original, 0, p.args)
    allowed = {i for name in ("retain", "forget", "val") for i in p.split[name]}
    assert set(np.concatenate(read)) == allowed
    logits = D.predict(p.net, p.data, sorted(allowed))
    assert torch.allclose(original["logits"][sorted(allowed)], logits, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Whole runs


def short(small, folder):
    """Flags of a run that takes a few seconds and writes into folder."""
    flags = ["--dataset", small, *places(folder), "--ids", "4", "--epochs", "3", "--no-amp"]
    flags += ["--batch-size", "32", "--hidden", "16", "--dropout", "0.3", "--meta-epochs", "2"]
    return [*flags, "--requests-per-step", "2"]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A finished run that several tests read; its meta-loss lies in folder / where."""
    folder = tmp_path_factory.mktemp("trained")
    flags = short(small, folder)
    more = ["--export-support", str(folder / "S"), "--save", str(folder / "now.pt"), "--plot"]
    result = M.main([*flags, *more])
    meta = next((folder / "ckpt").rglob("metaunlearn-paper-seed0.meta.pt"))

    made = dict(folder=folder, flags=flags, result=result, meta=meta)
    return types.SimpleNamespace(**made, where=meta.relative_to(folder))


@pytest.fixture
def copied(trained, tmp_path):
    """The flags of the same run in a folder of its own, to go on with or to break."""
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    return [*trained.flags, *places(tmp_path)]  # of a flag given twice the last one counts


def without_clock(result) -> dict:
    clock = ("seconds", "peak_memory_bytes", "date", "commit")
    return {k: v for k, v in result.items() if k not in clock}


def test_run_writes_the_result(trained):
    path = trained.folder / "out" / "small-ids4-split0" / "metaunlearn-paper-seed0.json"
    assert json.loads(path.read_text()) == trained.result
    assert path.with_suffix(".png").stat().st_size > 10_000
    keys = "name dataset setting seed split_seed split_hash flags access metric metrics seconds "
    keys += "simulated_tow ascent_step peak_memory_bytes device versions commit date"
    assert set(keys.split()) <= set(trained.result)
    assert set(trained.result["metrics"]) == {"original", "retrained", "ascent", "unlearned"}
    kept = trained.meta.with_name("metaunlearn-paper-seed0.pt")
    one, other = (common.load_checkpoint(f, "model") for f in (kept, trained.folder / "now.pt"))
    assert all(torch.equal(other["model"][k], t) for k, t in one["model"].items())
    assert not [*trained.folder.rglob("*.tmp"), *trained.folder.rglob("*.partial.pt")]


def test_search_reads_neither_test_nor_support_and_its_choice_is_used(copied, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "TRIES", 4)
    real, reads = M.search, []

    def recording(*given):
        with record_reads() as read:
            found = real(*given)
        reads.extend(np.concatenate(read).tolist())
        return found

    monkeypatch.setattr(M, "search", recording)
    monkeypatch.setattr(T, "train_epoch", None)
    result = M.main([*copied, "--search", "--name", "found"])
    assert [set(tried) for tried in result["search"]] == [{"eta", "alpha", "distance"}] * 4
    assert result["access"]["choosing flags"] == ["retain", "forget", "val"]
    folder = pathlib.Path(copied[copied.index("--checkpoint-dir", 20) + 1])
    split = common.load_checkpoint(next(folder.rglob("original-seed0.pt")), "model")["indices"]
    assert reads and not set(reads) & set(split["test"] + split["support"])
    meta = common.load_checkpoint(next(folder.rglob("*found-seed0.meta.pt")), "meta-loss")
    assert {"eta": meta["eta"], "alpha": meta["alpha"]} == result["chosen"]
    best = min(result["search"], key=lambda tried: tried["distance"])
    assert best == result["chosen"] | {"distance": 1 - result["simulated_tow"]}
    none = M.main([*copied, "--eta", "1e-12", "--name", "no-step"])  # the model as it was
    assert result["nothing"] == pytest.approx(1 - none["simulated_tow"], abs=1e-6)
    refused(capsys, "drop one of them", M.parse_args, ["--search", "--meta-loss", "x"])
    all_given = ["--search", "--eta", "1", "--alpha", "1", "--meta-epochs", "1"]
    refused(capsys, "nothing to choose", M.parse_args, all_given)


@pytest.mark.parametrize("preset", ("paper", "code", "selective"))
def test_somebodys_own_model_learns_a_loss_and_unlearns(preset, tmp_path, monkeypatch):
    """The step is that of plain torch on the features and logits of S; no file is written."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.AdaptiveAvgPool2d(1)
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, 3))
    D, D_v = ((torch.randn(n, 3, 8, 8), torch.randint(2, (n, 3)).float()) for n in (24, 12))
    before, who = flat(net.parameters()).clone(), np.arange(24) // 4
    h = M.learn_loss(net, D, who, D_v, ids=2, meta_epochs=2, hidden=6, eta=0.2, preset=preset)
    sees = "logits,targets,losses" if preset == "selective" else "logits,features,targets"
    assert h.inputs == sees.split(",")
    S = D[0][:2], D[1][:2]
    without = M.forget(net, h, S)
    leaf = copy.deepcopy(net)
    features = leaf[:4](S[0])
    loss = h(features, leaf[4](features), S[1], torch.zeros(2, dtype=torch.long))
    g = torch.autograd.grad(loss, list(leaf.parameters()))
    steps = [t.detach() for t in h.step_sizes(dict(leaf.named_parameters()), 0.2)]
    want = flat([p - e * d for p, e, d in zip(leaf.parameters(), steps, g, strict=True)])
    assert torch.allclose(flat(without.parameters()), want, atol=1e-6)
    assert (want - before).norm() > 1e-4 and torch.equal(flat(net.parameters()), before)
    assert type(without) is torch.nn.Sequential and net.training and not list(tmp_path.iterdir())
    flags = dict(ids=2, meta_epochs=1, hidden=6, preset=preset, natural=0.01)
    assert set(M.learn_loss(net, D, who, D_v, **flags).fisher) == {"net.0", "net.4"}
    with pytest.raises(TypeError, match="gamma"):
        M.learn_loss(net, D, who, D_v, gamma=1)
    # All six people in one request would leave nobody to retain.
    M.learn_loss(net, D, who, D_v, meta_epochs=1, hidden=6, preset=preset, retain_weight=0.3)
    # Who it is stays unseen though it was asked for, and must be said of these very images.
    named = dict(ids=2, meta_epochs=1, hidden=6, inputs="logits,ids")
    assert M.learn_loss(net, D, who, D_v, **named).inputs == ["logits"]
    pairs = torch.utils.data.TensorDataset(*D)
    in_order, shuffled = (torch.utils.data.DataLoader(pairs, 8, shuffle=s) for s in (False, True))
    one, other = (M.learn_loss(net, given, who, D_v, **named) for given in (D, in_order))
    assert torch.equal(flat(one.parameters()), flat(other.parameters()))
    for given, people in ((shuffled, who), (D, who[:20]), (D, 0 * who)):
        with pytest.raises(ValueError, match="identities"):
            M.learn_loss(net, given, people, D_v, **named)


@pytest.mark.parametrize("hypergradient", ("forward", "double"))
def test_a_model_may_share_a_weight_and_have_one_that_it_does_not_use(hypergradient):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
            self.b.weight, self.spare = self.a.weight, torch.nn.Linear(12, 5)
            self.head = torch.nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.b(self.a(x.flatten(1)).relu()).relu())

    torch.manual_seed(0)
    net = Tied()
    D, D_v = ((torch.randn(n, 3, 2, 2), torch.randint(2, (n, 3)).float()) for n in (24, 12))
    flags = dict(ids=2, meta_epochs=1, hidden=6, eta=0.5, head="head")
    with pytest.MonkeyPatch.context() as patch:
        ways = {"forward": M.meta_gradient, "double": M.meta_gradient_double}
        patch.setattr(M, "meta_gradient", ways[hypergradient])
        h = M.learn_loss(net, D, np.arange(24) // 4, D_v, **flags)
    without = M.forget(net, h, (D[0][:2], D[1][:2]), head="head")
    assert without.b.weight is without.a.weight
    moved = [(p - q).norm() for p, q in zip(without.parameters(), net.parameters(), strict=True)]
    assert sum(length > 0 for length in moved) == len(moved) - 2


def test_natural_steps_go_with_the_meta_loss(trained, copied, tmp_path, capsys, monkeypatch):
    """The step is that of the dense (I + F / damping)^-1; F is stored, and checked when read."""
    own = [*copied, "--natural", "0.01", "--name", "natural"]
    result = M.main(own)
    assert result["seconds"]["curvature"] > 0
    (path,) = tmp_path.rglob("metaunlearn-paper-natural-seed0.meta.pt")
    saved = torch.load(path, weights_only=True)
    original, _ = common.load_model(path.with_name("original-seed0.pt"))
    unlearned, _ = common.load_model(path.with_name("metaunlearn-paper-natural-seed0.pt"))
    args = M.parse_args([*own, "--no-amp"])
    data, split = T.open_data(args, torch.device("cpu"))
    h = M.new_meta_loss(original, data, split, args)  # without F: the gradient as it is
    h.load_state_dict(saved["phi"])
    f, theta = M.f_and_theta(original, args)
    S = M.support_batch(data, split["train_ids"], split["support"])
    plain = M.unlearn(h, f, theta, S, args.eta)
    moved = {k: p - theta[k] for k, p in unlearned.named_parameters()}
    assert not moved["net.pos_embed"].any() and not moved["net.norm.weight"].any()
    for layer in ("net.head", "net.blocks.0.attn.proj"):
        U_out, U_in, second = (t.double() for t in saved["fisher"][layer])
        U = torch.kron(U_out, U_in)
        dense = torch.eye(len(U)) + U @ (second.flatten() / 0.01).diag() @ U.T
        names = f"{layer}.weight", f"{layer}.bias"
        moves = {k: plain[k] - theta[k] for k in names}, moved
        g, step = (torch.cat([d[names[0]], d[names[1]][:, None]], 1).double() for d in moves)
        want = torch.linalg.solve(dense, g.flatten()).view_as(g)
        assert torch.allclose(step, want, rtol=1e-3, atol=1e-7) and (want - g).abs().max() > 1e-5
    again = [*own, "--out", str(tmp_path / "again")]
    with monkeypatch.context() as patch:
        patch.setattr(M, "meta_train", None)
        patch.setattr(M, "fisher_of", None)
        assert M.main(again)["metrics"] == result["metrics"]
    S = ["--support", str(tmp_path / "S"), "--device", "cpu", "--no-amp", "--overwrite"]
    M.main(["--meta-loss", str(path), *S, "--save", str(tmp_path / "later.pt")])
    later, _ = common.load_model(tmp_path / "later.pt")
    pairs = zip(later.parameters(), unlearned.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    no_number, head = torch.full((8, 8), math.nan), saved["fisher"]["net.head"]
    for fisher, words in (
        ({}, "KeyError"),
        ({"net.head": (None, no_number, no_number)}, "not finite"),
        ({"net.head": (None, None, head[2][:, :9])}, "RuntimeError"),
        ({"net.other": head}, "KeyError"),
    ):
        content = saved | {"fisher": fisher}
        torch.save(content if fisher else {k: content[k] for k in content if k != "fisher"}, path)
        line = refused(capsys, words, M.main, [*own, "--out", str(tmp_path / "bad")])
        assert str(path) in line
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "matrix_layers", lambda model: {})
        words = "--natural: the model has no linear or convolution layer"
        refused(capsys, words, M.main, [*own, "--overwrite"])


def test_runs_repeat_exactly_from_saved_models_and_meta_loss(trained, tmp_path, monkeypatch):
    """Also with the meta-loss given by name; and neither run trains anything."""
    monkeypatch.setattr(M, "meta_train", None)
    monkeypatch.setattr(T, "train_epoch", None)
    for number, file in enumerate((None, str(trained.meta))):
        more = ["--meta-loss", file] if file else []
        again = M.main([*trained.flags, *more, "--out", str(tmp_path / str(number))])
        assert again["flags"] == trained.result["flags"] | {"meta_loss": file}
        again["flags"]["meta_loss"] = None
        kept = ("train", "retrain", "meta_train")  # of the run that trained them
        assert all(again["seconds"][k] == trained.result["seconds"][k] for k in kept)
        assert without_clock(again) == without_clock(trained.result)


def test_load_model_gives_back_the_model_of_any_checkpoint(trained, tmp_path, capsys):
    own, found, load = trained.meta.parent, {}, common.load_model
    for file in (*own.glob("*.pt"), trained.folder / "now.pt"):
        model, about = load(file)
        found[file.name] = about.pop("which")
        state = torch.load(file, weights_only=True)["model"]
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
        assert not model.training and about.pop("target_names")[0] == "smile"
        assert about == {"architecture": "toy_vit", "image_size": 16}
    kinds = {"original-seed0.pt": "original", "gold-seed0.pt": "gold", "now.pt": "unlearned"}
    kinds["metaunlearn-paper-seed0.pt"] = "unlearned"
    assert found == kinds | {"metaunlearn-paper-seed0.meta.pt": "original"}
    content = torch.load(own / "gold-seed0.pt", weights_only=True)
    bad = tmp_path / "bad.pt"
    for key in ("architecture", "model", "target_names", "image_size"):
        torch.save({k: v for k, v in content.items() if k != key}, bad)
        refused(capsys, f"bad.pt is damaged or of another version (KeyError: '{key}'", load, bad)


def test_a_result_that_is_there_is_shown_or_kept(copied, trained, tmp_path, capsys, monkeypatch):
    path = tmp_path / "out" / "small-ids4-split0" / "metaunlearn-paper-seed0.json"
    written, other = path.read_bytes(), [*copied, "--eta", "0.2"]
    with monkeypatch.context() as patch:
        patch.setattr(M, "train_both", None)  # nothing is trained
        assert M.main([*copied, "--seed", "0"]) == trained.result
        assert "METAUNLEARN paper" in capsys.readouterr().out
        refused(capsys, "was made with --eta 0.1", M.main, other)
    assert M.main([*copied, "--export-support", str(tmp_path / "later")]) == trained.result
    assert len(list((tmp_path / "later").glob("*.png"))) == 4
    own = M.main([*other, "--name", "far"])
    assert own["name"] == "metaunlearn-paper-far" and own["flags"]["eta"] == 0.2
    assert path.with_name("metaunlearn-paper-far-seed0.json").is_file()
    assert path.read_bytes() == written and M.main([*other, "--name", "far"]) == own
    meta = next(tmp_path.rglob("metaunlearn-paper-far-seed0.meta.pt"))
    borrowed = M.main([*copied, "--meta-loss", str(meta), "--out", str(tmp_path / "borrowed")])
    assert borrowed["flags"]["eta"] == 0.2 and borrowed["metrics"] == own["metrics"]  # its own eta
    refused(capsys, "made with --eta 0.2", M.main, [*copied, "--meta-loss", str(meta), "--eta=1"])
    again = M.main([*other, "--overwrite"])  # the meta-loss is learned anew, too
    assert again["metrics"] == own["metrics"] != trained.result["metrics"]
    assert json.loads(path.read_text()) == again


def test_a_bar_that_diverges_does_not_lose_metaunlearn(copied, trained, tmp_path, monkeypatch):
    def diverges(*_):
        raise FloatingPointError

    monkeypatch.setattr(baselines, "run", diverges)
    result = M.main([*copied, "--overwrite", "--meta-loss", str(tmp_path / trained.where)])
    assert list(result["metrics"]) == ["original", "retrained", "unlearned"]
    assert result["metrics"]["unlearned"] == trained.result["metrics"]["unlearned"]


DRY = ["--preset code", "--preset selective", "--aux-loss scrub", "--meta-ids 2 --name two"]


@pytest.mark.parametrize("extra", [*DRY, "--hypergradient double --held-out"])
def test_dry_run_goes_through_everything_and_is_kept_apart(trained, tmp_path, extra):
    to = ["--out", str(tmp_path), "--dry-run", *extra.split()]
    result = M.main([*trained.flags, *to])
    assert result["setting"].endswith("-dry") and math.isfinite(result["simulated_tow"])
    assert [folder.name for folder in tmp_path.iterdir()] == [f"small-{result['setting']}"]
    for phase in ("meta-training", "choosing the ascent step"):
        assert ("held_out" in result["access"][phase]) == ("--held-out" in extra)


def test_resumed_equals_uninterrupted(small, trained, tmp_path, capsys, monkeypatch):
    """Training and meta-training, each interrupted after an epoch: the same to the last bit."""
    flags, real = [*short(small, tmp_path), "--resume"], common.save_checkpoint
    monkeypatch.setattr(common, "PARTIAL_EVERY", 0.0)

    def save_and_stop(path, kind, **content):
        real(path, kind=kind, **content)
        if stops and kind == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt  # as Ctrl-C would

    stops = ["partial model", "partial meta-loss"]
    while stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common, "save_checkpoint", save_and_stop)
            M.main(flags)
        assert list(tmp_path.rglob("*.partial.pt"))
    # What was learned for another model is not gone on with.
    (path,) = tmp_path.rglob("*.meta.partial.pt")
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"weights": "others"}, path)
    refused(capsys, "was made with weights 'others'", M.main, flags)
    torch.save(saved, path)
    assert without_clock(M.main(flags)) == without_clock(trained.result)


def test_seconds_are_of_the_clock_and_progress_is_kept_once_a_minute(small, tmp_path, monkeypatch):
    """A clock that gains 25 s at each look: 2 looks an epoch, so every second epoch is kept."""
    ticks, real, kinds = itertools.count(0, 25), common.save_checkpoint, []

    def save(path, kind, **content):
        kinds.append(kind)
        real(path, kind=kind, **content)

    monkeypatch.setattr(common, "clock", lambda device: float(next(ticks)))
    monkeypatch.setattr(common, "save_checkpoint", save)
    result = M.main([*short(small, tmp_path), "--epochs", "5", "--meta-epochs", "5"])
    each = ["partial model"] * 2 + ["model"]
    assert kinds == [*each, *each, "partial meta-loss", "partial meta-loss", "meta-loss", "model"]
    seconds = result["seconds"]
    assert seconds["train"] == seconds["retrain"] == 125 and seconds["unlearn"] == 25
    assert seconds["meta_train"] == 275 and seconds["evaluate"] % 25 == 0


def test_two_processes_equal_one(small, trained, tmp_path):
    """Each rank trains on its share of a batch and takes its own requests: same models and phi."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "metaunlearn.py", *short(small, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = dict.fromkeys(("original-seed0", "gold-seed0", "metaunlearn-paper-seed0"), "model")
    for name, kind in (kinds | {"metaunlearn-paper-seed0.meta": "meta-loss"}).items():
        files = [meta.with_name(f"{name}.pt") for meta in (trained.meta, tmp_path / trained.where)]
        one, other = (common.load_checkpoint(file, kind) for file in files)
        key = "phi" if kind == "meta-loss" else "model"
        for k, t in one[key].items():
            assert torch.allclose(t, other[key][k], rtol=1e-3, atol=1e-4), (name, k)


@pytest.mark.parametrize("preset", ["paper", "code", "selective"])
def test_check_gradient_reports_all_four(trained, preset, capsys):
    errors = M.main([*trained.flags, "--check-gradient", "--preset", preset])
    double, central, single, bf16 = errors.values()
    assert double < 1e-10 and central < 1e-6 and single < 1e-3
    assert 1e-4 < bf16 < 0.3  # it did run in bf16, which a difference of losses feels
    assert capsys.readouterr().out.count("meta-gradient, relative error of ") == 4


def test_check_gradient_notices_a_wrong_meta_gradient(small, monkeypatch):
    p, real = problem(small, dtype=torch.float32), M.meta_gradient

    def halved(*arguments):
        A, gradient = real(*arguments)
        return A, [g / 2 for g in gradient]

    monkeypatch.setattr(M, "meta_gradient", halved)
    errors = list(check_gradient(p.net, p.data, p.split, p.args).values())
    assert errors[:2] == pytest.approx([0.5, 0.5], rel=1e-4)


@pytest.mark.parametrize("amp", [False, True])
def test_convolutions_train_in_channels_last_under_amp_alone(small, tmp_path, amp, monkeypatch):
    """And the model that comes back is laid out like one that is loaded."""
    flags = ["--dataset", small, "--checkpoint-dir", str(tmp_path), "--ids", "4", "--epochs", "1"]
    args = T.parse_args([*flags, "--batch-size", "32", "--model", "toy_resnet"])
    args.amp, data, real, seen = amp, D.load(args), T.train_epoch, []

    def watch(model, *rest):
        seen.append(model.net.conv1.weight.is_contiguous(memory_format=torch.channels_last))
        return real(model, *rest)

    monkeypatch.setattr(T, "train_epoch", watch)
    model, _ = T.train("gold", data, D.identity_split(data, 4, 0), args)
    assert seen == [amp] and all(p.is_contiguous() for p in model.parameters())


def test_gold_never_sees_the_forget_set_and_shares_nothing(small, tmp_path, monkeypatch):
    flags = ["--dataset", small, "--checkpoint-dir", str(tmp_path), "--ids", "4", "--epochs", "1"]
    args = T.parse_args([*flags, "--batch-size", "32", "--no-amp"])
    data = D.load(args)
    split, real, started, models = D.identity_split(data, 4, 0), T.build_model, [], []

    def build(*arguments):
        model = real(*arguments)
        started.append(copy.deepcopy(model))  # the initial weights that train() really gives it
        return model

    monkeypatch.setattr(T, "build_model", build)
    for which, sets in (("gold", ["retain", "val"]), ("original", ["retain", "forget", "val"])):
        with record_reads() as read:
            models.append(T.train(which, data, split, args)[0])
        assert set(np.concatenate(read)) == {i for name in sets for i in split[name]}
    for (k, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr() and not torch.equal(a, b), k
    gold, original = started
    assert not torch.equal(gold.net.head.weight, original.net.head.weight)


def test_unlearning_later_needs_pictures_labels_and_the_meta_loss(trained, tmp_path, monkeypatch):
    for name in ("open_data", "raw_batch", "train", "train_both", "predict"):
        monkeypatch.setattr(M, name, None)
    files = trained.folder / "now.pt", tmp_path / "later.pt"
    later = ["--meta-loss", str(trained.meta), "--support", str(trained.folder / "S")]
    M.main([*later, "--save", str(files[1]), "--device", "cpu"])
    now, later = (common.load_checkpoint(file, "model")["model"] for file in files)
    assert all(torch.allclose(now[k], later[k], atol=1e-6) for k in now)
    theta = common.load_checkpoint(trained.meta, "meta-loss")["model"]
    assert any(not torch.equal(later[k], t) for k, t in theta.items())


def test_support_refuses_what_it_would_ignore_or_destroy(copied, trained, tmp_path, capsys):
    """Flags of training, --save on the file that it reads, and the model of an earlier request."""
    meta = tmp_path / trained.where
    later = ["--meta-loss", str(meta), "--support", str(tmp_path / "S"), "--device", "cpu"]
    for extra in ("--ids 3", "--seed=0", "--plot", "--held-out", "--export-support x"):
        flag = extra.split("=")[0].split()[0]
        refused(capsys, f"{flag} does nothing beside --support", M.main, [*later, *extra.split()])
    refused(capsys, "made with --accuracy-weight True", M.main, [*later, "--no-accuracy-weight"])
    before = meta.read_bytes()
    refused(capsys, "no unlearned model", M.main, [*later, "--save", str(meta)])
    refused(capsys, "no unlearned model", M.main, [*copied, "--overwrite", "--save", str(meta)])
    assert meta.read_bytes() == before
    written = meta.with_name("metaunlearn-paper-seed0-unlearned.pt")
    M.main([*later, "--no-amp", "--hidden", "16"])
    assert "people unlearned: 4;" in capsys.readouterr().out
    first = written.read_bytes()
    refused(capsys, "of an earlier request; add --save FILE, or --overwrite", M.main, later)
    assert written.read_bytes() == first
    head, one, *_ = (tmp_path / "S" / "labels.csv").read_text().splitlines()
    (tmp_path / "S" / "labels.csv").write_text(f"{head}\n{one}\n")
    M.main([*later, "--overwrite"])
    assert "people unlearned: 1;" in capsys.readouterr().out and written.read_bytes() != first


# fmt: off
BAD = {
    "--ids 1000": "can be forgotten", "--eta 0": "--eta: 0 must lie",
    "--val-images -5": "--val-images: -5 must lie", "--lr -1": "--lr: -1 must lie",
    "--dropout 2": "--dropout: 2 must lie", "--natural 0": "natural: 0",
    "--requests-per-step 0": "--requests-per-step: 0 must lie", "--preset best": "invalid choice",
    "--inputs ids,targets": "--inputs: ids,targets", "--inputs pixels": "--inputs: pixels",
    "--support x": "--support needs --meta-loss",
    "--meta-loss nowhere.pt": "no meta-loss at nowhere.pt",
    "--aux-loss scrub --retain-weight 1": "--retain-weight is not in --aux-loss scrub",
    "--alpha 1e9 --eta 1e9": "meta-loss is not finite in epoch 1; lower --alpha",
}
# fmt: on


@pytest.mark.parametrize("extra, words", BAD.items())
def test_bad_flags_get_one_line(trained, tmp_path, capsys, extra, words):
    elsewhere = ["--out", str(tmp_path), "--name", "x"]
    refused(capsys, words, M.main, [*trained.flags, *elsewhere, *extra.split()])


def test_bad_settings_get_one_line(capsys, monkeypatch):
    for flags in (["--forget", "random"], ["--dataset", "digits"]):
        line = refused(capsys, "METAUNLEARN forgets identities, not", M.main, flags)
        assert flags[1] in line and "ltu.py" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, "3 is no multiple of 2 processes", M.main, ["--requests-per-step", "3"])


WRONG = {"phi": None, "model": {}, "seconds": "long", "inputs": "pixels", "eta": "small"}
WRONG |= {"hidden": torch.zeros(2)}


@pytest.mark.parametrize("key", [*WRONG, "original", "gold"])
def test_a_damaged_checkpoint_gets_one_line(copied, trained, tmp_path, key, capsys):
    """An entry that is missing or wrong."""
    path, fresh = tmp_path / trained.where, [*copied, "--out", str(tmp_path / "fresh")]
    if key in ("original", "gold"):
        path = path.with_name(f"{key}-seed0.pt")
    content = torch.load(path, weights_only=True)
    bad = [{k: v for k, v in content.items() if k != key}, content | {key: WRONG.get(key, "x")}]
    if key in ("original", "gold"):
        bad = [{k: v for k, v in content.items() if k != "seconds"}, content | {"model": {}}]
    runs = [fresh] if key in ("original", "gold") else [fresh, [*fresh, "--meta-loss", str(path)]]
    if key == "hidden":
        runs.append([*runs[1], "--hidden", "16"])
    for broken in bad:
        torch.save(broken, path)
        for run in runs:
            refused(capsys, str(path), M.main, run)


def test_bad_files_get_one_line_and_leave_nothing(trained, copied, tmp_path, capsys, monkeypatch):
    meta, labels = tmp_path / trained.where, tmp_path / "S" / "labels.csv"
    original = meta.with_name("original-seed0.pt")
    fresh = [*copied, "--out", str(tmp_path / "fresh")]
    refused(capsys, "this run has 5", M.main, [*fresh, "--epochs", "5"])
    refused(capsys, "with eta 0.1, this run has 0.2", M.main, [*fresh, "--eta", "0.2"])
    other = [*fresh, "--checkpoint-dir", str(tmp_path / "other"), "--lr", "0.02"]
    other += ["--meta-loss", str(meta)]
    with monkeypatch.context() as patch:
        patch.setattr(M, "train_both", None)  # it is said before anything is trained
        refused(capsys, "was made with split", M.main, [*other, "--split-seed", "1"])
        refused(capsys, "was made with split", M.main, [*other, "--dry-run"])
    refused(capsys, "learned for other weights", M.main, other)
    refused(capsys, "no meta-loss checkpoint", M.main, [*fresh, "--meta-loss", str(original)])
    (tmp_path / "file").write_text("no folder")
    refused(capsys, "cannot write to", M.main, [*copied, "--out", str(tmp_path / "file" / "x")])
    later = ["--meta-loss", str(meta), "--support", str(tmp_path / "S"), "--device", "cpu"]
    head, *rows = labels.read_text().splitlines()
    labels.write_text("\n".join([head, *(row.replace(".png", ".jpg") for row in rows)]))
    refused(capsys, "cannot be used", M.main, later)
    strangers = [",".join([row.split(",")[0], "999", *row.split(",")[2:]]) for row in rows]
    labels.write_text("\n".join([head, *strangers]))
    refused(capsys, "identity 999 was not in training", M.main, later)
    labels.unlink()
    refused(capsys, "no labels.csv", M.main, later)
    original.write_text("not a checkpoint")
    refused(capsys, "is no checkpoint", M.main, fresh)
    assert not list(tmp_path.rglob("*.tmp"))


def test_run_on_drawn_faces_forgets(tmp_path):
    """README's first run, at 8 px and for 30 epochs, which takes a fifth of its time: nearer to the
    gold model than before, and by forgetting."""
    flags = [*places(tmp_path), "--image-size", "8", "--epochs", "30"]
    result = M.main(flags)
    table = evaluate.compare(result["metrics"])
    assert result["dataset"] == "toyfaces" and result["name"] == "metaunlearn-paper"
    assert table["retrained"]["forget_lost"] > 0.05
    assert table["retrained"]["controls_that_lost_less"] == 1
    assert table["unlearned"]["tow"] > table["original"]["tow"]
    assert table["unlearned"]["forget_lost"] > 0.02
    selective = M.main([*flags, "--preset", "selective"])
    ours = evaluate.compare(selective["metrics"])["unlearned"]
    assert ours["tow"] > table["original"]["tow"] + 0.01
    assert ours["forget_lost"] > ours["control_lost_mean"] + 2 * ours["control_lost_std"]
