"""common.py against scikit-learn and torch: metrics, models, files; and what all scripts keep to.

python -m pytest tests/test_common.py
"""

import ast
import contextlib
import errno
import functools
import importlib
import io
import itertools
import os
import pathlib
import pickle
import re
import runpy
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import mutated, refused
from sklearn.metrics import accuracy_score, average_precision_score

import common
import data

ROOT = pathlib.Path(__file__).parent.parent
ORDER = ["common", "data", "train", "evaluate"]
ABOVE = {script: ORDER[:i] for i, script in enumerate(ORDER)}  # what each may import
ABOVE |= {"ltu": ORDER, "baselines": ORDER, "metaunlearn": [*ORDER, "baselines"]}


def randn(*shape, key=0, scale=1):
    return scale * torch.randn(*shape, generator=common.generator(key), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# Metrics and losses


def rankings():
    """Random (scores, targets): one row, constant scores, heavy ties; none to all positive."""
    rng = np.random.default_rng(0)
    kinds = itertools.product(range(13), (1, 2, 5, 10**6), (0.05, 0.5, 0.9, 1.0))
    for _, levels, rate in kinds:
        shape = 1 if rng.random() < 0.1 else rng.integers(2, 40), rng.integers(1, 5)
        scores = rng.integers(0, levels, shape) / levels * 6 - 3
        yield torch.from_numpy(scores).float(), torch.from_numpy(rng.random(shape) < rate).float()


def test_average_precision_equals_sklearn():
    """Above all with ties; neither order nor a monotone transform of scores changes anything."""
    kinds, same = set(), dict(rtol=0, atol=1e-12, equal_nan=True)
    for scores, targets in rankings():
        found = common.average_precision(scores, targets)
        for s, t, ours in zip(scores.T, targets.T, found, strict=True):
            theirs = average_precision_score(t.numpy(), s.numpy()) if t.any() else np.nan
            assert ours.item() == pytest.approx(theirs, abs=1e-12, nan_ok=True)
            ties = len(s.unique()) < len(s)
            kinds.add((t.any().item(), t.all().item(), len(t) == 1, ties))
        perm = torch.randperm(len(scores), generator=common.generator(1))
        for s, t in ((scores[perm], targets[perm]), (scores.exp() + 1, targets)):
            torch.testing.assert_close(common.average_precision(s, t), found, **same)
    # Every kind of column was met, and its opposite.
    assert [len(set(kind)) for kind in zip(*kinds, strict=True)] == [2, 2, 2, 2]


def test_score_is_macro_map_or_accuracy():
    """An attribute that no image has is left out of the mean; class numbers mean accuracy."""
    scores, targets = randn(30, 3, key=2), torch.ones(30, 3)
    targets[::2, 0], targets[:, 1], targets[::3, 2] = 0, 0, 0
    theirs = [average_precision_score(targets[:, k].numpy(), scores[:, k].numpy()) for k in (0, 2)]
    assert common.score(scores, targets) == pytest.approx(np.mean(theirs), abs=1e-12)
    logits, targets = randn(50, 4, key=3), torch.arange(50) % 4
    expected = accuracy_score(targets, logits.argmax(1))
    assert common.score(logits, targets) == pytest.approx(expected, abs=1e-12)
    assert common.score(torch.eye(4)[targets], targets) == 1
    few = torch.tensor([[2.0, -1.0], [-3.0, -1.0]])
    assert common.accuracy(few, torch.tensor([[1.0, 1.0], [0.0, 0.0]])) == 0.75  # one by one
    assert common.accuracy(few, torch.tensor([0, 0])) == 0.5
    logits[7, 1] = torch.nan
    for y in (targets, torch.eye(4)[targets]):
        with pytest.raises(FloatingPointError, match="not finite"):
            common.score(logits, y)


def scores_of(retain, forget, test, **more):
    return {"retain": retain, "forget": forget, "test": test, **more}


GOLD = scores_of(0.8, 0.7, 0.6)


def test_tow_by_hand():
    """Eq. (7), gaps to either side, scores that it must not look at; 1 only for equal scores."""
    ours, gold = scores_of(0.7, 0.9, 0.5, val=0.1), scores_of(0.8, 0.7, 0.55, val=0.9)
    assert common.tow(ours, gold) == pytest.approx(0.9 * 0.8 * 0.95) == common.tow(gold, ours)
    assert common.tow(GOLD, GOLD) == 1
    for name, gap in itertools.product(GOLD, (-0.01, 0.01)):
        assert common.tow(GOLD | {name: GOLD[name] + gap}, GOLD) < 1
    # METAUNLEARN Table 1, CelebA-HQ/20, Trained: 95.5 +- 0.6; 95.4 from the printed means.
    value = 100 * common.tow(scores_of(0.848, 0.830, 0.807), scores_of(0.847, 0.786, 0.808))
    assert round(value, 1) == 95.4 and abs(value - 95.5) < 0.6


def test_tow_refuses_percentages():
    """A percentage passed by mistake would give a ToW far outside [0, 1]; NaN compares as false."""
    for name, value in itertools.product(GOLD, (84.8, -0.1, float("nan"))):
        wrong = GOLD | {name: value}
        for pair in ((wrong, GOLD), (GOLD, wrong)):
            with pytest.raises(ValueError, match=name):
                common.tow(*pair)


@pytest.mark.parametrize("targets", [torch.arange(6).int() % 5, torch.arange(30).view(6, 5) % 2])
def test_task_losses_are_torchs(targets):
    """Each image's own loss, from targets of any type: over attributes their mean."""
    logits, multilabel = randn(6, 5, key=4, scale=3).float(), targets.ndim == 2
    theirs = torch.nn.BCEWithLogitsLoss() if multilabel else torch.nn.CrossEntropyLoss()
    wanted = targets.float() if multilabel else targets.long()
    losses = common.task_losses(logits, targets)
    assert losses.shape == (6,)
    for i in range(6):
        torch.testing.assert_close(losses[i], theirs(logits[i], wanted[i]))
    torch.testing.assert_close(losses.mean(), theirs(logits, wanted))


def check_kl_divergence(module):
    """T^2 KL(teacher || student) of each image by torch.distributions; zero at equality alone."""
    teacher, student = randn(5, 4, key=5, scale=2), randn(5, 4, key=6, scale=2)
    kinds = {False: torch.distributions.Categorical, True: torch.distributions.Bernoulli}
    for T, (multilabel, kind) in itertools.product((1.0, 4.0), kinds.items()):
        p, q = kind(logits=teacher / T), kind(logits=student / T)
        want = T**2 * torch.distributions.kl_divergence(p, q)
        want = want.mean(1) if multilabel else want
        got = module.kl_divergence(teacher, student, multilabel, T)
        assert got.shape == (5,) and torch.allclose(got, want, atol=1e-12) and got.min() > 1e-3
        assert module.kl_divergence(teacher, teacher, multilabel, T).abs().max() < 1e-12
        assert T != 1 or torch.equal(module.kl_divergence(teacher, student, multilabel), got)
        certain = 300 * teacher.sign().float()  # probabilities that float32 rounds to 0 and 1
        assert module.kl_divergence(certain, -certain, multilabel, T).isfinite().all()


KL_MUTANTS = {
    "wrong way round": ("teacher / T, student / T", "student / T, teacher / T"),
    "no T squared over attributes": ("T**2 * (cross", "(cross"),
    "no T squared over classes": ("T**2 * (log_p", "(log_p"),
    "student not cooled": ("teacher / T, student / T", "teacher / T, student"),
    "without the entropy": ("(cross - entropy)", "cross"),
    "sum for mean over attributes": (".mean(1)", ".sum(1)"),
    "mean for sum over classes": ("log_q)).sum(1)", "log_q)).mean(1)"),
}


def test_kl_divergence_and_its_mutants():
    check_kl_divergence(common)
    for old, new in KL_MUTANTS.values():
        mutant = mutated(common, old, new, "kl_divergence")
        with pytest.raises(AssertionError):
            check_kl_divergence(mutant)


# --------------------------------------------------------------------------------------------------
# Files

CONTENT = dict(kind="model", split="b", weight=torch.ones(999))


class Harmful:  # loading it without care makes a folder named `ran`
    def __reduce__(self):
        return os.mkdir, ("ran",)


def saved_bytes(content) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


BAD = {"missing": None, "text": b"lr 0.1\nno checkpoint\n", "empty": b"", "list": saved_bytes([1])}
BAD["truncated"] = saved_bytes(CONTENT)[:2000]
BAD["code in torch.save"] = saved_bytes(CONTENT | {"weight": Harmful()})
BAD["code in pickle"] = pickle.dumps(CONTENT | {"weight": Harmful()})
BAD["other kind"] = saved_bytes(CONTENT | {"kind": "gold"})
BAD["other split"] = saved_bytes(CONTENT | {"split": "a"})
BAD["a tensor for a split"] = saved_bytes(CONTENT | {"split": torch.zeros(2)})
BAD["not finite"] = saved_bytes(CONTENT | {"model": {"bias": torch.tensor([1.0, torch.nan])}})


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoint_ends_in_one_line(what, tmp_path, capsys, monkeypatch):
    """Each way to be wrong names the file and never gets as far as running code from it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    if BAD[what] is not None:
        path.write_bytes(BAD[what])
    load = functools.partial(common.load_checkpoint, path, "model", split="b")
    line = refused(capsys, str(path), load)
    assert ("no model at" in line) == (what == "missing") and not pathlib.Path("ran").exists()
    if what == "code in torch.save":  # the file does run code when it is loaded without care
        torch.load(path, weights_only=False)
        assert pathlib.Path("ran").is_dir()


def test_checkpoint_comes_back(tmp_path):
    """What is saved is loaded; one that cannot be pickled does not destroy the last good one."""
    path, content = tmp_path / "deep" / "model.pt", dict(split="b", lr=0.1, blocks=[1, 2])
    common.save_checkpoint(path, kind="model", weight=torch.arange(3.0), **content)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        common.save_checkpoint(path, kind="model", epoch=lambda: 2)
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("model.pt", before)]
    saved = common.load_checkpoint(path, "model", **content)
    assert torch.equal(saved["weight"], torch.arange(3.0))


def test_atomic_write_leaves_nothing_of_a_failure(tmp_path):
    """Neither target nor temporary file after an exception, and no target before the block ends."""
    path = tmp_path / "a.txt"
    with pytest.raises(KeyboardInterrupt), common.atomic_write(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_said_at_once(tmp_path, capsys):
    """A file where a folder should be, also above --save's file; a folder for a file."""
    (tmp_path / "file").write_text("")
    below, check = tmp_path / "file" / "sub", common.check_writable
    refused(capsys, str(below), check, tmp_path, below)
    refused(capsys, str(below), functools.partial(check, tmp_path, file=below / "m.pt"))
    refused(capsys, "--save", functools.partial(check, file=str(tmp_path)))
    for which, content in (("original", {"kind": "model"}), (None, {"kind": "meta-loss"})):
        common.save_checkpoint(tmp_path / "used.pt", which=which, **content)
        refused(capsys, "no unlearned", functools.partial(check, file=tmp_path / "used.pt"))
    common.save_checkpoint(tmp_path / "used.pt", which="unlearned")
    check(file=tmp_path / "used.pt")
    (tmp_path / "used.pt").unlink()
    check(tmp_path, file=tmp_path / "new" / "m.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "new"]


# --------------------------------------------------------------------------------------------------
# Models


def test_another_seed_shares_nothing():
    """A gold model must be fresh: no random tensor equal to the original's, no memory in common."""
    one, two, same = (common.build_model("toy_vit", 5, 16, seed=s) for s in (0, 1, 0))
    drawn = [name for name, p in one.named_parameters() if p.numel() > 1 and p.std() > 0]
    # Two embeddings and the patch projection, four matrices in each of four blocks, the head.
    assert len(drawn) >= 3 + 4 * 4 + 1
    a, b, c = one.state_dict(), two.state_dict(), same.state_dict()
    assert not any(torch.equal(a[name], b[name]) for name in drawn)
    assert all(torch.equal(a[name], c[name]) for name in a)
    places = [t.untyped_storage().data_ptr() for state in (a, b, c) for t in state.values()]
    assert len(set(places)) == 3 * len(a)


def test_with_parameters_is_a_copy():
    """What is given replaces, the rest stays, and the model itself is not touched."""
    model = common.build_model("toy_resnet", 5, 8).eval()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    theta_u = {"net.fc.weight": torch.ones(5, 64), "net.conv1.weight": torch.zeros(16, 3, 3, 3)}
    changed = common.with_parameters(model, theta_u)
    changed_state, want = changed.state_dict(), before | theta_u
    assert all(torch.equal(t, want[k]) for k, t in changed_state.items()) and not changed.training
    for t in changed_state.values():
        t.add_(1)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [("toy_vit", 16, 64, 0.5, 0.5), ("toy_resnet", 8, 64, 0.5, 0.5)]
SHAPES += [("resnet18", 32, 512, 0.5, 0.5), ("resnet18", 96, 512, *IMAGENET)]
SHAPES += [("resnet18_w16", 32, 128, 0.5, 0.5)]


@pytest.mark.parametrize("name, size, width, mean, std", SHAPES)
def test_model_gives_features_and_logits(name, size, width, mean, std):
    """Shapes, the model's own normalisation, and logits that classify these features."""
    model, images = common.build_model(name, 5, size).eval(), torch.rand(2, 3, size, size)
    features, logits = model(images)
    assert features.shape == (2, width) and logits.shape == (2, 5)
    normal = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(logits, model.net(normal))  # timm's own forward
    torch.testing.assert_close(logits, model.net.get_classifier()(features))


@pytest.mark.parametrize("name", ["resnet18", "resnet18_w64"])
def test_small_resnet_is_timms_resnet18_with_another_stem(name):
    """It computes the same with the same weights, all of them in use; with 16 channels 0.70 M."""
    model, timms = common.build_model(name, 5, 32).eval(), timm.create_model("resnet18").eval()
    timms.reset_classifier(5)
    timms.conv1, timms.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    assert all(m.weight.min() == 1 for n, m in model.named_modules() if n.endswith("bn2"))  # SalUn
    timms.load_state_dict(model.net.state_dict())
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(images)[1], timms((images - 0.5) / 0.5))
    narrow = common.build_model("resnet18_w16", 10, 32)
    assert round(sum(p.numel() for p in narrow.parameters()) / 1e6, 2) == 0.70


USELESS = {"missing.pt": None, "text.pt": b"none\n", "text.safetensors": b"none\n"}
USELESS |= {"empty.pt": saved_bytes({}), "names.pt": saved_bytes({"encoder": torch.ones(3)})}
USELESS["checkpoint.pt"] = saved_bytes({"kind": "model", "model": {"w": torch.ones(3)}, "epoch": 1})


@pytest.mark.parametrize("name, size", [("toy_vit", 16), ("resnet18", 32), ("resnet18", 96)])
@pytest.mark.parametrize("what", USELESS)
def test_useless_initial_weights_end_in_one_line(name, size, what, tmp_path, capsys):
    """They must not leave a random model that is called pretrained."""
    path = tmp_path / what
    if USELESS[what] is not None:
        path.write_bytes(USELESS[what])
    line = refused(capsys, str(path), common.build_model, name, 5, size, str(path))
    assert ("no such file" in line) == (what == "missing.pt")


IMPOSSIBLE = ["no_such_model", "toy_vit", "vit_tiny_patch16_224", "deit_tiny_patch16_224"]


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_model_ends_in_one_line(name, capsys):
    """An unknown name; images that patches do not cover (timm would cut off the rest of each)."""
    assert "42" in refused(capsys, name, common.build_model, name, 5, 42)


def test_a_vit_by_name_alone_needs_no_image_size():
    assert common.build_model("fastvit_t8", 5, 64).width == 768


@pytest.mark.parametrize("outputs", [5, 7])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name, size", [("toy_vit", 16), ("resnet18", 96), ("resnet18", 32)])
def test_initial_weights_come_back(name, size, suffix, outputs, tmp_path):
    """From half precision into float32; of another task all but the classifier, as in timm."""
    state = common.build_model(name, 5, size, seed=0).net.state_dict()
    state, path = {k: v.half() for k, v in state.items()}, str(tmp_path / f"init{suffix}")
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(state, path)
    own = common.build_model(name, outputs, size, init=path, seed=1).net.state_dict()
    changed = {k for k, t in own.items() if not torch.equal(t, state[k].to(t.dtype))}
    head = "head" if name == "toy_vit" else "fc"
    assert changed == ({f"{head}.weight", f"{head}.bias"} if outputs == 7 or size == 96 else set())


# --------------------------------------------------------------------------------------------------
# Device, seeds, flags


@pytest.mark.parametrize("flag", ["", "--amp", "--no-amp"])
def test_cpu_uses_bf16_only_when_asked(flag, capsys):
    """On a CPU bf16 is 25 times slower, so it is never the default; the reason is said."""
    args = data.parse_args(["--device", "cpu", *flag.split()])
    assert common.choose_device(args).type == "cpu" and args.amp is (flag == "--amp")
    line = capsys.readouterr().out
    assert "cpu" in line and "--device" in line and ("bf16 autocast" in line) == args.amp
    args.device = "meta" if torch.cuda.is_available() else "cuda"  # what cannot be used here
    refused(capsys, f"--device {args.device}", common.choose_device, args)


def test_generator_is_named_by_its_key():
    """The same key gives the same stream, others other streams; the global seed plays no part."""
    keys, streams = list(itertools.product((0, 1, 2, 10**6), repeat=2)), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        streams += [torch.rand(4, generator=common.generator(*key)) for key in keys]
    streams = [tuple(stream.tolist()) for stream in streams]
    assert streams[:16] == streams[16:] and len(set(streams)) == len(keys) == 16


PRESETS = {"celeba": {"ids": 5, "image_size": 224, "seed": 3}, "code": {"seed": 7}}
PRESETS["celeba", "code"] = {"split_seed": 9}


def parse(argv: str):
    parser = common.Parser()
    common.add_shared_arguments(parser)
    parser.add_argument("--preset", default="paper")
    for name in ("positive", "not_negative", "share"):
        parser.add_argument(f"--{name}", type=getattr(common, name), default=1.0)
    return common.parse_with_presets(parser, PRESETS, argv.split())


BEATS = {"": (10, 32, 0, 0), "--dataset celeba": (5, 224, 3, 0)}
BEATS |= {"--dataset=celeba --preset code": (5, 224, 7, 9)}
BEATS |= {"--ids 10 --dataset celeba": (10, 224, 3, 0)}
BEATS |= {"--dataset celeba --preset code --seed 0 --split-seed 1": (5, 224, 0, 1)}
BEATS |= {"--train-images 9 --forget random": (10, 32, 0, 0)}
BEATS |= {"--image-size 8 --seed 4294967296 --ids 1": (1, 8, 2**32, 0)}  # the limits themselves


@pytest.mark.parametrize("argv, expected", BEATS.items())
def test_flag_beats_preset_beats_default(argv, expected):
    """Also where the flag repeats the default or comes before the dataset."""
    args = parse(argv)
    assert (args.ids, args.image_size, args.seed, args.split_seed) == expected
    assert type(args.seed) is int and parse("--label-noise 0.9").label_noise == 0.9


WRONG = ["--nonsense", "--resum", "--ids many", "--ids 1.5", "--ids 0", "--ids nan", "--ids -3"]
WRONG += ["--image-size 7", "--image-size 4097", "--seed -1", "--seed 4294967297", "--device"]
WRONG += ["--dataset", "--forget-ratio 0", "--forget-ratio 1", "--forget-ratio nan"]
WRONG += ["--label-noise -0.1", "--label-noise 0.91", "--label-noise x", "--positive 0"]
WRONG += ["--positive inf", "--not_negative -0.1", "--not_negative nan", "--share 0"]
WRONG += ["--share 1.001", "--forget some", "--forget-classes 1.5"]


@pytest.mark.parametrize("argv", WRONG)
def test_wrong_flag_ends_in_one_line(argv, capsys):
    """An unknown or abbreviated flag, a value of the wrong type or range, a flag without value."""
    line = refused(capsys, argv.split()[0], parse, argv)
    assert all(word in line for word in argv.split()[1:])


def stop(error, path=None):
    with common.atomic_write(path) if path else contextlib.nullcontext():
        raise error


STOPS = {  # what stops a script: exit code, the one line
    KeyboardInterrupt(): (130, "stopped; the same command with --resume"),
    MemoryError("800 GiB"): (2, "error: not enough memory (800 GiB)"),
    RuntimeError("can't allocate memory"): (2, "error: not enough memory"),
    OSError(errno.ENOSPC, "full"): (2, "error: the disk of the output is full"),
    FloatingPointError("it diverged"): (2, "error: it diverged"),
}


@pytest.mark.parametrize("error", STOPS, ids=repr)
def test_what_stops_a_script_ends_in_one_line(error, capsys):
    with pytest.raises(SystemExit) as end:
        common.guarded(functools.partial(stop, error))
    code, words = STOPS[error]
    line = capsys.readouterr().err
    assert end.value.code == code and line.startswith(words) and line.count("\n") == 1
    for own in (RuntimeError, ValueError):  # the code's own mistakes keep their traceback
        with pytest.raises(own, match="a mistake"):
            common.guarded(functools.partial(stop, own("a mistake")))


def test_one_image_and_batch_norm_end_in_one_line(capsys):
    norm = functools.partial(torch.nn.BatchNorm2d(2), torch.zeros(1, 2, 1, 1))  # torch's own words
    refused(capsys, "forget more, or choose a ViT", common.guarded, norm)


def test_a_full_disk_is_named_by_its_file(tmp_path, capsys, monkeypatch):
    """As torch.save reports it, too; another error stays itself; nothing half-written is left."""
    path, other = tmp_path / "phi.pt", RuntimeError("unexpected pos 576 vs 534")
    with pytest.raises(RuntimeError, match="unexpected pos"):
        stop(other, path)
    full = OSError(errno.ENOSPC, "no room")
    refused(capsys, str(path), common.guarded, functools.partial(stop, full, path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=0))
    refused(capsys, str(path), common.guarded, functools.partial(stop, other, path))
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_and_an_ascii_terminal_are_no_errors():
    """`| head` ends quietly; \xb1 is written as Python spells it."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common; "
    code += "common.guarded(lambda: [print('\\xb1' * 999) for _ in range(999)])"
    pipe, env = subprocess.PIPE, os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, env=env)
    assert run.stdout.read(4) == b"\\xb1"
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 141
    run.stderr.close()


def test_a_range_reads_as_one_says_it(capsys):
    refused(capsys, "1.5 must lie above 0, up to 1", parse, "--share 1.5")
    refused(capsys, "1 must lie above 0, below 1", parse, "--forget-ratio 1")
    refused(capsys, "7 must lie from 8 up to 4096", parse, "--image-size 7")
    refused(capsys, "--train-images goes with --forget random", parse, "--train-images 9")


# --------------------------------------------------------------------------------------------------
# All scripts


@pytest.mark.parametrize("script", list(ABOVE)[1:])
def test_help_explains_every_flag(script, monkeypatch, capsys):
    """Every flag stands there once, each with a text of its own, and with this dataset's values."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--dataset", "celeba", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and not err
    flags = re.findall(r"^  (--[a-z-]+)(.*(?:\n {20,}.*)*)", out, re.M)
    names, texts = [name for name, _ in flags], [" ".join(text.split()) for _, text in flags]
    argv = ["--table", "all"] if script == "evaluate" else []
    args = importlib.import_module(script).parse_args(argv)
    wanted = {f"--{name.replace('_', '-')}" for name in vars(args) if name != "given"}
    assert {name.replace("--no-", "--") for name in names} == wanted and len(names) == len(wanted)
    assert all(len(text) > 15 for text in texts) and len(set(texts)) == len(texts)
    assert any("pixels a side; paper: 224 (default: 224)" in text for text in texts)


@pytest.mark.parametrize("script", ABOVE)
def test_imports_and_what_no_script_may_hold(script):
    """Arrows point one way; no .cuda(), bare except or unsafe load; slow imports not at the top."""
    text = (ROOT / f"{script}.py").read_text()
    assert not re.search(r"\.cuda\(|except:|import \*|weights_only=False", text)
    assert script == "common" or text.endswith("\n    common.guarded(main)\n")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module] if isinstance(node, ast.ImportFrom) else names
            packages = {module.split(".")[0] for module in modules}
            assert packages & set(ABOVE) <= set(ABOVE[script]), ast.unparse(node)
            slow = packages & {"torchvision", "timm", "matplotlib", "sklearn"}
            assert len(names) <= 10 and not (slow and node in tree.body), ast.unparse(node)


@pytest.mark.parametrize("grad", [True, False])
def test_bf16_attention_on_a_cpu_is_fused_only_where_no_gradient_follows(grad):
    with torch.set_grad_enabled(grad), common.autocast(torch.device("cpu"), True):
        assert torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.flash_sdp_enabled() == (not grad)
    assert torch.backends.cuda.flash_sdp_enabled() and not torch.is_autocast_enabled("cpu")
