"""METAUNLEARN against finite differences, double backward, hand-written formulas, and itself resumed or on two ranks."""

import argparse
import copy
import json
import math
import pathlib
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch.func import functional_call

import common
import data as D
import metaunlearn as M
import train as T

ROOT = pathlib.Path(__file__).parent.parent
PRESET_FLAGS = {
    "paper": [],
    "paper, first term": ["--aux-loss", "first"],
    "paper, second term, logits": ["--aux-loss", "second", "--inputs", "logits"],
    "paper, features only": ["--inputs", "features,targets"],
    "paper, no accuracy weight": ["--no-accuracy-weight"],
    "code": ["--preset", "code", "--pair-size", "5"],
    "selective": ["--preset", "selective"],
    "selective, one eta": ["--preset", "selective", "--alpha-step", "0"],
    "scrub": ["--aux-loss", "scrub"],
}


def problem(small, *extra, dtype=torch.float64, classes=False, model="toy_vit", hidden="6"):
    """A model, a meta-loss away from its zero initialisation, and one simulated request, in float64."""
    args = M.parse_args(["--dataset", small, "--ids", "3", "--model", model, "--hidden", hidden, "--val-images", "8", *extra])
    args.amp, args.retain_images = False, 7
    data = D.load(args)
    if classes:
        data = data | {"targets": data["targets"][:, :2].long().sum(1), "classes": 3}
    split = D.identity_split(data, args.ids, 0)
    net = common.build_model(args.model, data["classes"], args.image_size, seed=1).to(dtype).eval()
    h_phi = M.new_meta_loss(net, data, split, args).to(dtype).eval()
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        for p in (h_phi.mlp[-2].weight, *(h_phi.log_step or [])):
            p.normal_(0, 0.5, generator=rng)
    support, forget = next(D.simulated_requests(data, split, args.ids, 0, 0))
    parts = M.request_parts(data, split, support, forget, args, np.random.default_rng(0))
    cache = M.cache_original(copy.deepcopy(net).float(), data, split, args)
    cache["v0"] = cache["v0"][0].to(dtype), cache["v0"][1]
    theta = M.updatable(net, args.freeze_embeddings)
    S = M.support_batch(data, split["train_ids"], support, theta)
    return types.SimpleNamespace(
        args=args, data=data, split=split, net=net, h=h_phi, parts=parts, cache=cache, theta=theta, S=S, forget=forget, support=support
    )


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def forward(p, module=M, h=None):
    return module.meta_gradient_forward(p.net, h or p.h, p.theta, p.S, p.parts, p.data, p.cache, p.args)


def double(p, module=M, h=None, frozen=None):
    return module.meta_gradient_double(p.net, h or p.h, p.theta, p.S, p.parts, p.data, p.cache, p.args, frozen)


def plain_A(p, h, weights=None):
    """Eq. (8) of the whole-set presets, written again without the project's functions: (A, mAP weights)."""
    images, targets, who = p.S
    theta = {k: t.clone().requires_grad_() for k, t in p.theta.items()}
    g = torch.autograd.grad(h(*functional_call(p.net, theta, (images,)), targets, who), list(theta.values()))
    theta_u = {k: t - p.args.eta * d for (k, t), d in zip(theta.items(), g, strict=True)}
    with torch.no_grad():
        loss, found = {}, []
        for name, at, indices in (("f", theta_u, p.forget), ("v", theta_u, p.parts[0]["v"]), ("v0", theta, p.split["val"])):
            x = (p.data["images"][indices].permute(0, 3, 1, 2) / 255.0).double()
            logits, y = functional_call(p.net, at, (x,))[1], p.data["targets"][indices].double()
            loss[name] = F.binary_cross_entropy_with_logits(logits, y)
            seen = [k for k in range(y.shape[1]) if y[:, k].any()]
            found.append(1 - np.mean([average_precision_score(y[:, k], logits[:, k]) for k in seen]))
        w = weights or found
        E_f, E_v, E_v0 = (w[i] * loss[name] for i, name in enumerate(("f", "v", "v0")))
        return float((E_f - E_v) ** 2 + (E_f - E_v0) ** 2), found


def shifted(h, coordinate, by):
    moved = copy.deepcopy(h)
    with torch.no_grad():
        vector = torch.nn.utils.parameters_to_vector(moved.parameters())
        vector[coordinate] += by
        torch.nn.utils.vector_to_parameters(vector, moved.parameters())
    return moved


# -------------------------------------------------------------------------------------------------- the meta-gradient


def test_A_is_equation_8(small):
    p = problem(small)
    expected, _ = plain_A(p, p.h)
    assert forward(p)[0] == pytest.approx(expected, rel=1e-5)  # v0 comes from a float32 cache
    assert double(p)[0] == pytest.approx(expected, rel=1e-5)


def test_both_meta_gradients_against_finite_differences_of_equation_8(small):
    """Every coordinate of a small phi, central differences of a formula written in this file."""
    p = problem(small, "--inputs", "logits,features", hidden="2")
    with torch.no_grad():  # exact constants in place of the float32 cache
        logits = p.net((p.data["images"][p.split["val"]].permute(0, 3, 1, 2) / 255.0).double())[1]
    y = p.data["targets"][p.split["val"]].double()
    p.cache["v0"] = F.binary_cross_entropy_with_logits(logits, y), common.score(logits, y)
    _, weights = plain_A(p, p.h)
    n = sum(q.numel() for q in p.h.parameters())
    step = 1e-4
    slope = [
        (plain_A(p, shifted(p.h, i, step), weights)[0] - plain_A(p, shifted(p.h, i, -step), weights)[0]) / (2 * step) for i in range(n)
    ]
    slope = torch.tensor(slope, dtype=torch.float64)
    for way in (forward, double):
        assert relative(flat(way(p)[1]), slope) < 1e-6


@pytest.mark.parametrize("extra", PRESET_FLAGS.values(), ids=PRESET_FLAGS)
def test_forward_equals_double_backward(small, extra):
    p = problem(small, *extra)
    assert relative(flat(forward(p)[1]), flat(double(p)[1])) < 1e-10


@pytest.mark.parametrize("extra", PRESET_FLAGS.values(), ids=PRESET_FLAGS)
def test_every_preset_against_finite_differences(small, extra):
    """Along random directions of phi; mAPs, and with a stopped gradient the validation loss, held constant."""
    p = problem(small, *extra)
    _, gradient, frozen = double(p)
    rng = torch.Generator().manual_seed(0)
    direction = flat(gradient) / flat(gradient).norm() + 0.1 * F.normalize(
        torch.randn(len(flat(gradient)), generator=rng, dtype=torch.float64), dim=0
    )
    A = [double(p, h=shifted(p.h, slice(None), sign * 1e-5 * direction), frozen=frozen)[0] for sign in (1, -1)]
    assert (A[0] - A[1]) / 2e-5 == pytest.approx(float(flat(gradient) @ direction), rel=1e-6)


def test_forward_equals_double_with_classes_batch_norm_and_dropout(small):
    p = problem(small, model="resnet10t", classes=True)
    assert relative(flat(forward(p)[1]), flat(double(p)[1])) < 1e-10
    q = problem(small, "--dropout", "0.5")
    q.h.train()
    torch.manual_seed(3)
    a = flat(forward(q)[1])
    torch.manual_seed(3)
    assert relative(a, flat(double(q)[1])) < 1e-10
    torch.manual_seed(4)
    assert relative(flat(forward(q)[1]), a) > 1e-3  # the masks matter


MUTANTS = {
    "first order: no graph from g to phi": (
        "g_z = torch.autograd.grad(M, z_leaf, create_graph=True",
        "g_z = torch.autograd.grad(M, z_leaf, retain_graph=True",
    ),
    "sign of the inner step": ("p - e * g for", "p + e * g for"),
    "features forgotten in the forward-mode product": ("zip(g_z, z_dot, strict=True))", "list(zip(g_z, z_dot, strict=True))[1:])"),
    "eta forgotten": ("k: e.detach() * d for", "k: d for"),
    "step sizes' own gradient forgotten": ("along = along + sum(", "sum("),
    "sign of the meta-gradient": ("grad(-along", "grad(along"),
    "v of the last set only": (
        "torch._foreach_add_(v, torch._foreach_mul(gradients[name], w.item()))",
        "v = torch._foreach_mul(gradients[name], w.item())",
    ),
    "mean of parts instead of their sum": ("mean = losses.sum() / len(part[name])", "mean = losses.mean()"),
    "tangent at the wrong point": ("(theta,), (tangent,))", "(theta_u,), (tangent,))"),
    "no gradient through the validation loss": ('E["v"].detach() if args.stop_val_gradient', 'E["v"].detach() if True'),
    "no accuracy weight": ("1 - a if args.accuracy_weight else 1.0", "1.0"),
    "accuracy instead of error": ("1 - a if args.accuracy_weight", "a if args.accuracy_weight"),
}


@pytest.mark.parametrize("old, new", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_the_meta_gradient_are_caught(small, old, new):
    """Each breaks metaunlearn.py in memory, and must move A or its gradient away from the true ones."""
    source = (ROOT / "metaunlearn.py").read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in metaunlearn.py"
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    p = problem(small, "--alpha-step", "0.1")
    p.args.meta_batch_size = 4  # several parts a set
    A, exact, _ = double(p)
    try:
        A_mutant, gradient, _ = forward(p, mutant)
    except RuntimeError:
        return  # autograd itself refuses: caught
    assert relative(flat(gradient), flat(exact)) > 1e-3 or abs(A_mutant - A) > 1e-3 * abs(A)


def test_parts_change_nothing_but_rounding(small):
    p = problem(small, "--preset", "selective")
    whole = flat(forward(p)[1])
    p.args.meta_batch_size = 2
    assert relative(flat(forward(p)[1]), whole) < 1e-12


def test_meta_step_leaves_the_model_alone(small):
    """theta, batch-norm statistics, flags and gradients: bit for bit."""
    p = problem(small, model="resnet10t")
    before = copy.deepcopy(p.net.state_dict())
    flags_before = [q.requires_grad for q in p.net.parameters()]
    for way in (forward, double):
        way(p)
    M.unlearn(p.net, p.h, p.S, p.args)
    M.ascend(p.net, p.S, 0.1, p.args)
    assert all(torch.equal(before[k], t) for k, t in p.net.state_dict().items())
    assert flags_before == [q.requires_grad for q in p.net.parameters()]
    assert all(q.grad is None for q in p.net.parameters()) and not p.net.training


def test_bf16_is_close_and_reported(small):
    p = problem(small, dtype=torch.float32)
    exact = flat(forward(p)[1])
    p.args.amp = True
    rounded = flat(forward(p)[1])
    assert not torch.equal(rounded, exact)  # it did run in bf16
    assert torch.cosine_similarity(rounded, exact, dim=0) > 0.95  # A is a difference of losses, which bf16 feels


def test_check_gradient_reports_all_four(small, flags):
    errors = M.main([*flags, "--check-gradient"])
    assert [e < limit for e, limit in zip(errors.values(), (1e-10, 1e-6, 1e-3, 0.5), strict=True)] == [True] * 4


# ------------------------------------------------------------------------------------------------- equations and parts


def test_meta_loss_is_positive_and_zero_init_makes_the_first_update_zero(small):
    p = problem(small, dtype=torch.float32)
    assert p.h(*p.net(p.S[0]), *p.S[1:]).item() > 0
    fresh = M.new_meta_loss(p.net, p.data, p.split, p.args)
    theta_u = M.unlearn(p.net, fresh, p.S, p.args)
    assert all(torch.equal(theta_u[k], p.theta[k]) for k in p.theta)
    p.args.zero_init = False
    theta_u = M.unlearn(p.net, M.new_meta_loss(p.net, p.data, p.split, p.args), p.S, p.args)
    assert any(not torch.equal(theta_u[k], p.theta[k]) for k in p.theta)


@pytest.mark.parametrize("inputs", ["logits", "features,targets", "losses", "logits,features,targets,ids"])
def test_meta_loss_sees_its_inputs_and_nothing_else(small, inputs):
    p = problem(small, "--inputs", inputs, dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    features, logits = (torch.randn(3, n, generator=rng) for n in (64, 13))
    targets, who = torch.randint(0, 2, (3, 13), generator=rng).float(), torch.tensor([0, 1, 2])
    base = p.h(features, logits, targets, who)
    changed = {
        "features": p.h(features + 1, logits, targets, who),
        "logits": p.h(features, logits + 1, targets, who),
        "targets": p.h(features, logits, 1 - targets, who),
        "ids": p.h(features, logits, targets, who + 1),
    }
    sees = {"logits", "targets"} if inputs == "losses" else set(inputs.split(","))
    assert {k for k, v in changed.items() if abs(v - base) > 1e-6} == sees


def test_freeze_embeddings_is_what_the_authors_code_does(small):
    p = problem(small, "--preset", "code")
    theta_u = M.unlearn(p.net, p.h, p.S, p.args)
    left_out = {k for k, _ in p.net.named_parameters()} - set(theta_u)
    assert left_out == {"net.cls_token", "net.pos_embed"}
    assert all(not torch.equal(theta_u[k], p.theta[k]) for k in ("net.patch_embed.proj.weight", "net.head.bias"))


def test_kl_from_original():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
    bernoulli = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(bernoulli(logits=a), bernoulli(logits=b)).mean(1)
    assert torch.allclose(M.kl_from_original(b, a, torch.zeros(5, 4)), expected, atol=1e-6)
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(logits=a), categorical(logits=b))
    assert torch.allclose(M.kl_from_original(b, a, torch.zeros(5)), expected, atol=1e-6)
    assert M.kl_from_original(a, a, torch.zeros(5, 4)).abs().max() < 1e-6


def test_auxiliary_loss_by_hand():
    """Eq. (8) and its ablations on numbers: L_f 2, L_v 3, L_v0 5, L_r 7; mAP .5, .25, .75."""
    L = {k: torch.tensor(float(x)) for k, x in dict(f=2, v=3, v0=5, r=7).items()}
    mAP = dict(f=0.5, v=0.25, v0=0.75)
    args = dict(aux_loss="both", accuracy_weight=True, distance="l2", stop_val_gradient=False, retain_weight=0.0)
    A = lambda **k: M.auxiliary_loss(L, mAP, argparse.Namespace(**args | k)).item()
    assert A() == pytest.approx((1 - 2.25) ** 2 + (1 - 1.25) ** 2)
    assert A(aux_loss="first") == pytest.approx((1 - 2.25) ** 2)
    assert A(aux_loss="second") == pytest.approx((1 - 1.25) ** 2)
    assert A(accuracy_weight=False) == pytest.approx((2 - 3) ** 2 + (2 - 5) ** 2)
    assert A(distance="smooth_l1") == pytest.approx((1.25 - 0.5) + 0.5 * 0.25**2)
    assert A(retain_weight=2.0) == pytest.approx((1 - 2.25) ** 2 + (1 - 1.25) ** 2 + 14)
    assert A(aux_loss="scrub") == pytest.approx(7 - 2)


def test_request_parts(small):
    p = problem(small)
    assert len(p.parts) == 1 and np.array_equal(p.parts[0]["f"], p.forget) and set(p.parts[0]["v"]) <= set(p.split["val"])
    q = problem(small, "--preset", "code", "--pair-size", "4", "--retain-weight", "1")
    assert [len(part["f"]) for part in q.parts] == [4, 4, 1] and all(len(part["v"]) == 4 for part in q.parts)
    assert sum(part["weight"] for part in q.parts) == pytest.approx(1)
    assert not set(np.concatenate([part["r"] for part in q.parts])) & (set(q.forget) | set(q.support) | set(q.split["support"]))
    whole = problem(small, "--val-images", "0")
    assert sorted(whole.parts[0]["v"]) == whole.split["val"]


def test_compare_by_hand():
    row = lambda r, f, te, control: {
        **{k: {"score": x} for k, x in zip(("retain", "forget", "test"), (r, f, te), strict=True)},
        "control": {"score": control},
    }
    rows = {
        "original": row(0.9, 0.8, 0.7, [0.9, 0.8]),
        "retrained": row(0.9, 0.6, 0.7, [0.9, 0.8]),
        "unlearned": row(0.8, 0.7, 0.7, [0.85, 0.6]),
    }
    table = common.compare(rows)
    assert table["original"]["tow"] == pytest.approx(0.8) and table["retrained"]["tow"] == 1
    assert table["unlearned"]["tow"] == pytest.approx(0.9 * 0.9)
    assert table["unlearned"]["forget_lost"] == pytest.approx(0.1)
    assert table["unlearned"]["control_lost_mean"] == pytest.approx(0.125)
    assert table["unlearned"]["controls_that_lost_less"] == 0.5


def test_ascent_raises_the_loss_on_the_support_set(small):
    p = problem(small, dtype=torch.float32)
    loss = lambda theta: common.task_losses(functional_call(p.net, theta, (p.S[0],))[1], p.S[1]).mean().item()
    assert loss(M.ascend(p.net, p.S, 0.01, p.args)) > loss(p.theta)


# -------------------------------------------------------------------------------------------------------- whole runs


def run(flags, *extra):
    return M.main([*flags, *extra])


def without_clock(result):
    return {k: v for k, v in result.items() if k not in ("seconds", "peak_memory_bytes", "date", "args")}


def test_run_writes_the_result_and_repeats_exactly(flags, tmp_path):
    first = run(flags, "--plot", "--no-amp")
    folder = tmp_path / "out" / "small-ids4-split0"
    assert json.loads((folder / "metaunlearn-paper-hidden=16-metaepochs=2-seed0.json").read_text())["tow"] == first["tow"]
    assert (folder / "metaunlearn-paper-hidden=16-metaepochs=2-seed0.png").stat().st_size > 10_000
    for (
        key
    ) in "method dataset setting seed split_hash access args metrics tow seconds peak_memory_bytes device versions commit date".split():
        assert key in first
    other = [str(tmp_path / "again") if f == str(tmp_path / "ckpt") else f for f in flags]
    assert without_clock(run(other)) == without_clock(first)
    assert without_clock(run(flags)) == without_clock(first)  # the second time from saved models and meta-loss
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.partial.pt"))


@pytest.mark.parametrize(
    "extra", [["--preset", "code"], ["--preset", "selective"], ["--aux-loss", "scrub"], ["--meta-ids", "2"], ["--hypergradient", "double"]]
)
def test_dry_run_goes_through_everything_and_is_kept_apart(flags, tmp_path, extra):
    result = run(flags, "--dry-run", *extra)
    assert result["setting"].endswith("-dry") and (tmp_path / "out" / "small-ids4-split0-dry").is_dir()
    assert not (tmp_path / "out" / "small-ids4-split0").exists() and math.isfinite(result["tow"])


def interrupt_after(monkeypatch, module, kind, times):
    """Stop the run, as Ctrl-C would, once the checkpoint of `kind` has been written `times` times."""
    real, seen = common.save_checkpoint, []

    def save(path, **content):
        real(path, **content)
        seen.append(content["kind"])
        if seen.count(kind) == times:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", save)


def test_resumed_equals_uninterrupted(flags, tmp_path, monkeypatch):
    """Training and meta-training, each interrupted after an epoch: the same numbers to the last bit."""
    whole = run(flags, "--dropout", "0.3")
    again = [str(tmp_path / "again") if f == str(tmp_path / "ckpt") else f for f in flags]
    for module, kind in ((T, "partial model"), (M, "partial meta-loss")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, module, kind, 1)
            run(again, "--dropout", "0.3", "--resume")
        assert list((tmp_path / "again").rglob("*.partial.pt"))
    assert without_clock(run(again, "--dropout", "0.3", "--resume")) == without_clock(whole)


def test_two_processes_equal_one(flags, tmp_path):
    """Under torchrun each rank trains on its share of a batch and takes its own requests: same models, same phi."""
    import subprocess
    import sys

    extra = ["--requests-per-step", "2", "--no-amp"]
    two = [str(tmp_path / "two") if f == str(tmp_path / "ckpt") else f for f in flags]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "metaunlearn.py", *two, *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    run(flags, *extra)
    for name, key in (("original-seed0", "model"), ("gold-seed0", "model"), ("metaunlearn-paper-*-seed0", "phi")):
        one, other = (
            common.load_checkpoint(next((tmp_path / folder).rglob(name + ".pt")), "model" if key == "model" else "meta-loss")[key]
            for folder in ("ckpt", "two")
        )
        for k in one:
            assert torch.allclose(one[k].float(), other[k].float(), rtol=1e-3, atol=1e-4), (name, k)


def test_gold_never_sees_the_forget_set_and_shares_nothing(flags, monkeypatch):
    args = T.parse_args(
        [f for i, f in enumerate(flags) if f not in ("--meta-epochs", "--hidden") and flags[i - 1] not in ("--meta-epochs", "--hidden")]
    )
    args.amp = False
    data = D.load(args)
    split = D.identity_split(data, args.ids, 0)
    started, build = [], T.build_model  # the initial weights that train() really gives each model
    monkeypatch.setattr(T, "build_model", lambda *a: (started.append(copy.deepcopy(model := build(*a))), model)[1])
    read, real = set(), T.raw_batch
    monkeypatch.setattr(T, "raw_batch", lambda data, i: (read.update(np.asarray(i).tolist()), real(data, i))[1])
    gold, _ = T.train("gold", data, split, args)
    assert read == set(split["retain"]) | set(split["val"])
    read.clear()
    original, _ = T.train("original", data, split, args)
    assert read == set(split["retain"]) | set(split["forget"]) | set(split["val"])
    for (k, a), b in zip(gold.named_parameters(), original.parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr() and not torch.equal(a, b), k
    assert len(started) == 2 and not torch.equal(started[0].net.head.weight, started[1].net.head.weight)


def test_unlearning_later_needs_pictures_labels_and_the_meta_loss_only(flags, tmp_path, monkeypatch):
    run(flags, "--export-support", str(tmp_path / "S"), "--save", str(tmp_path / "now.pt"))
    saved = next((tmp_path / "ckpt").rglob("metaunlearn-*.pt"))

    def forbidden(*_):
        raise AssertionError("read training data")

    for name in ("load", "make_split", "raw_batch", "train"):
        monkeypatch.setattr(M, name, forbidden)
    M.main(["--meta-loss", str(saved), "--support", str(tmp_path / "S"), "--save", str(tmp_path / "later.pt"), "--device", "cpu"])
    now, later = (common.load_checkpoint(tmp_path / name, "model")["model"] for name in ("now.pt", "later.pt"))
    assert all(torch.allclose(now[k], later[k], atol=1e-6) for k in now)
    assert any(not torch.equal(later[k], t) for k, t in common.load_checkpoint(saved, "meta-loss")["theta"].items())


def refused(capsys, words, call, *arguments):
    """call must end with exit code 2 and one line on stderr that holds `words`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error:") and words in lines[0], lines


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--ids", "0"], "--ids is 0"),
        (["--ids", "1000"], "can be forgotten"),
        (["--eta", "0"], "--eta is 0.0"),
        (["--eta", "nan"], "--eta is nan"),
        (["--pair-size", "-5"], "--pair-size is -5"),
        (["--lr", "-1"], "--lr is -1"),
        (["--dropout", "2"], "--dropout is 2"),
        (["--requests-per-step", "0"], "--requests-per-step is 0"),
        (["--inputs", "ids,targets"], "--inputs ids,targets"),
        (["--inputs", "pixels"], "--inputs pixels"),
        (["--dataset", "celeba"], "CelebA is not complete"),
        (["--dataset", "nowhere/at/all"], "neither toyfaces"),
        (["--support", "x"], "--support needs --meta-loss"),
        (["--meta-loss", "nowhere.pt"], "no meta-loss at nowhere.pt"),
        (["--preset", "best"], "invalid choice"),
        (["--requests-per-step", "x"], "invalid int"),
    ],
)
def test_bad_flags_get_one_line(flags, capsys, extra, words):
    if words == "CelebA is not complete":
        with pytest.raises(SystemExit) as end:
            run(flags, *extra)
        error = capsys.readouterr().err
        assert end.value.code == 2 and words in error and "python metaunlearn.py --dataset toyfaces" in error
    else:
        refused(capsys, words, M.main, [*flags, *extra])


def test_bad_files_get_one_line_and_nothing_half_written_stays(flags, tmp_path, capsys):
    run(flags, "--export-support", str(tmp_path / "S"))
    original = next((tmp_path / "ckpt").rglob("original-seed0.pt"))
    meta = str(next((tmp_path / "ckpt").rglob("metaunlearn-*.pt")))
    refused(capsys, "this run has 5", M.main, [*flags, "--epochs", "5"])
    refused(capsys, "was made with split", M.main, [*flags, "--split-seed", "1", "--meta-loss", meta])
    refused(capsys, "no meta-loss checkpoint", M.main, [*flags, "--meta-loss", str(original)])
    (tmp_path / "file").write_text("no folder")
    refused(capsys, "cannot write to", M.main, [*flags, "--out", str(tmp_path / "file" / "x")])
    labels = (tmp_path / "S" / "labels.csv").read_text()
    later = ["--meta-loss", meta, "--support", str(tmp_path / "S"), "--device", "cpu"]
    (tmp_path / "S" / "labels.csv").write_text(labels.replace(".png", ".jpg"))
    refused(capsys, "cannot be used", M.main, later)
    (tmp_path / "S" / "labels.csv").write_text(
        "\n".join(
            ",".join(["999" if i == 1 and n else c for i, c in enumerate(row.split(","))]) for n, row in enumerate(labels.splitlines())
        )
    )
    refused(capsys, "identity 999 was not in training", M.main, later)
    (tmp_path / "S" / "labels.csv").unlink()
    refused(capsys, "no labels.csv", M.main, later)
    original.write_text("not a checkpoint")
    refused(capsys, "is no checkpoint", M.main, flags)
    assert not list(tmp_path.rglob("*.tmp"))


def test_default_run_forgets(tmp_path):
    """The run that README shows first, with every default: closer to the gold model than before, and by forgetting."""
    folders = ["--data-dir", str(tmp_path), "--out", str(tmp_path), "--checkpoint-dir", str(tmp_path), "--device", "cpu"]
    result = M.main(folders)
    table = result["comparison"]
    assert result["dataset"] == "toyfaces" and result["method"] == "metaunlearn-paper"
    assert table["retrained"]["forget_lost"] > 0.05 and table["retrained"]["controls_that_lost_less"] == 1
    assert table["unlearned"]["tow"] > table["original"]["tow"]
    assert table["unlearned"]["forget_lost"] > 0.02
    selective = M.main([*folders, "--preset", "selective"])["comparison"]["unlearned"]
    assert selective["tow"] > table["original"]["tow"] + 0.01
    assert selective["forget_lost"] > selective["control_lost_mean"] + 2 * selective["control_lost_std"]
