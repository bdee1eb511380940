"""common.py: metrics against scikit-learn and torch, models that are fresh, files and flags that fail in one line.

python -m pytest tests/test_common.py
"""

import inspect
import itertools
import os
import pickle
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.metrics import accuracy_score, average_precision_score

import common
import data


def exits(capsys, function, *args, **kwargs) -> str:
    """Call function, which must end with exit code 2 and one line on stderr; returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args, **kwargs)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# Metrics


def tables(count=200, seed=0):
    """Random (scores, targets): one row, constant scores, heavy ties and none, hardly any positive and all positive."""
    rng = np.random.default_rng(seed)
    for levels, rate in itertools.islice(itertools.cycle(itertools.product((1, 2, 5, 10**6), (0.05, 0.5, 0.9, 1.0))), count):
        shape = 1 if rng.random() < 0.1 else rng.integers(2, 40), rng.integers(1, 5)
        scores = rng.integers(0, levels, shape) / levels * 6 - 3
        yield torch.from_numpy(scores).float(), torch.from_numpy(rng.random(shape) < rate).float()


def test_average_precision_equals_sklearn():
    """The definition, above all with ties; a column without positives has no AP."""
    kinds = set()
    for scores, targets in tables():
        for s, t, ours in zip(scores.T, targets.T, common.average_precision(scores, targets), strict=True):
            if t.sum() == 0:
                assert ours.isnan()
            else:
                assert ours.item() == pytest.approx(average_precision_score(t.numpy(), s.numpy()), abs=1e-12)
            kinds.add((t.sum().sign().item(), t.all().item(), len(t) == 1, len(s.unique()) < len(s)))
    assert [len(set(kind)) for kind in zip(*kinds, strict=True)] == [2, 2, 2, 2]  # every kind of column was met, and its opposite


def test_average_precision_ignores_order_and_scale():
    """Neither the order of images nor a monotone transform of the scores can change a ranking's value."""
    for scores, targets in tables(40, seed=1):
        perm, ap = torch.randperm(len(scores), generator=common.generator(1)), common.average_precision(scores, targets)
        torch.testing.assert_close(common.average_precision(scores[perm], targets[perm]), ap, rtol=0, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(common.average_precision(scores.exp() + 1, targets), ap, rtol=0, atol=1e-12, equal_nan=True)


def test_score_is_macro_map_without_empty_columns():
    """An attribute that no image has is left out of the mean, not counted as 0."""
    scores, targets = torch.randn(30, 3, generator=common.generator(2)), torch.ones(30, 3)
    targets[::2, 0], targets[:, 1], targets[::3, 2] = 0, 0, 0
    expected = np.mean([average_precision_score(targets[:, k].numpy(), scores[:, k].numpy()) for k in (0, 2)])
    assert common.score(scores, targets) == pytest.approx(expected, abs=1e-12)


def test_score_of_classes_is_accuracy():
    """Class numbers as targets mean top-1 accuracy."""
    logits, targets = torch.randn(50, 4, generator=common.generator(3)), torch.arange(50) % 4
    assert common.score(logits, targets) == pytest.approx(accuracy_score(targets, logits.argmax(1)), abs=1e-12)
    assert common.score(torch.eye(4)[targets], targets) == 1


def scores_of(retain, forget, test):
    return {"retain": retain, "forget": forget, "test": test}


def test_tow_by_hand():
    """Eq. (7), with gaps to either side and scores that it must not look at."""
    unlearned, retrained = scores_of(0.7, 0.9, 0.5) | {"val": 0.1}, scores_of(0.8, 0.7, 0.55) | {"val": 0.9}
    assert common.tow(unlearned, retrained) == pytest.approx(0.9 * 0.8 * 0.95)
    assert common.tow(retrained, unlearned) == common.tow(unlearned, retrained)


def test_tow_is_one_only_for_equal_scores():
    """A gap on any of the three sets costs."""
    gold = scores_of(0.8, 0.7, 0.6)
    assert common.tow(gold, gold) == 1
    assert all(common.tow(gold | {name: gold[name] + gap}, gold) < 1 for name in gold for gap in (-0.01, 0.01))


@pytest.mark.parametrize("name", ["retain", "forget", "test"])
@pytest.mark.parametrize("value", [84.8, -0.1, float("nan")])
def test_tow_refuses_percentages(name, value):
    """A percentage passed by mistake would give a ToW far outside [0, 1]; NaN compares as false."""
    good = scores_of(0.8, 0.7, 0.6)
    for pair in ((good | {name: value}, good), (good, good | {name: value})):
        with pytest.raises(ValueError, match=name):
            common.tow(*pair)


def test_tow_of_the_papers_table_1():
    """METAUNLEARN Table 1, CelebA-HQ/20, Trained against Retrained: 95.5 +- 0.6 over seeds; 95.4 from the printed means."""
    value = 100 * common.tow(scores_of(0.848, 0.830, 0.807), scores_of(0.847, 0.786, 0.808))
    assert round(value, 1) == 95.4 and abs(value - 95.5) < 0.6


def test_task_losses_of_attributes_are_torchs():
    """Each image's mean over K, from targets of any type; their mean is torch's own loss."""
    logits, targets = 3 * torch.randn(6, 5, generator=common.generator(4)), torch.arange(30).view(6, 5) % 3 % 2
    losses = common.task_losses(logits, targets)
    assert losses.shape == (6,)
    for i in range(6):
        torch.testing.assert_close(losses[i], torch.nn.BCEWithLogitsLoss()(logits[i], targets[i].float()))
    torch.testing.assert_close(losses.mean(), torch.nn.BCEWithLogitsLoss()(logits, targets.float()))


def test_task_losses_of_classes_are_torchs():
    """Each image's cross entropy."""
    logits, targets = (3 * torch.randn(6, 5, generator=common.generator(5)), torch.tensor([0, 4, 2, 2, 1, 3], dtype=torch.int32))
    losses = common.task_losses(logits, targets)
    assert losses.shape == (6,)
    for i in range(6):
        torch.testing.assert_close(losses[i], torch.nn.CrossEntropyLoss()(logits[i], targets[i].long()))


# Files


def bad_checkpoint(what, folder):
    """Make folder/model.pt wrong in one way."""
    path = folder / "model.pt"
    harmful = type("Harmful", (), {"__reduce__": lambda self: (os.mkdir, (str(folder / "ran"),))})()  # loading it makes a folder
    kind, split = "gold" if what == "other kind" else "model", "a" if what == "other split" else "b"
    common.save_checkpoint(path, kind=kind, split=split, weight=torch.ones(999))
    if what == "missing":
        path.unlink()
    if what == "text":
        path.write_text("lr 0.1\nnot a checkpoint\n")
    if what == "empty":
        path.write_bytes(b"")
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    if what == "no dict":
        torch.save([1, 2], path)
    if what == "code in torch.save":
        torch.save({"kind": "model", "split": "b", "weight": harmful}, path)
    if what == "code in pickle":
        path.write_bytes(pickle.dumps({"kind": "model", "split": "b", "weight": harmful}))
    return path


BAD = ["missing", "text", "empty", "truncated", "no dict", "code in torch.save", "code in pickle", "other kind", "other split"]


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoint_ends_in_one_line(what, tmp_path, capsys):
    """Each way to be wrong names the file and never gets as far as running code from it."""
    path = bad_checkpoint(what, tmp_path)
    line = exits(capsys, common.load_checkpoint, path, "model", split="b")
    assert str(path) in line and ("no model at" in line) == (what == "missing")
    assert not (tmp_path / "ran").exists()


def test_the_harmful_checkpoint_is_harmful(tmp_path):
    """Guards the test above: the same file does run code when it is loaded without care."""
    torch.load(bad_checkpoint("code in torch.save", tmp_path), weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_checkpoint_comes_back(tmp_path):
    """What is saved is loaded, tensors, numbers and lists alike, and one expected value after the other is checked."""
    common.save_checkpoint(tmp_path / "deep" / "model.pt", kind="model", split="b", lr=0.1, blocks=[1, 2], weight=torch.arange(3.0))
    saved = common.load_checkpoint(tmp_path / "deep" / "model.pt", "model", split="b", lr=0.1, blocks=[1, 2])
    assert torch.equal(saved["weight"], torch.arange(3.0))


def test_atomic_write_leaves_nothing_of_a_failure(tmp_path):
    """Neither target nor temporary file after an exception, and no target before the block has ended."""
    with pytest.raises(KeyboardInterrupt), common.atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "a.txt").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with common.atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "whole")]


def test_atomic_write_keeps_the_old_file(tmp_path):
    """A checkpoint that cannot be pickled must not destroy the last good one."""
    common.save_checkpoint(tmp_path / "model.pt", kind="model", epoch=1)
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        common.save_checkpoint(tmp_path / "model.pt", kind="model", epoch=lambda: 2)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.pt", before)]


def test_unwritable_folder_is_said_at_once(tmp_path, capsys):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / "sub") in exits(capsys, common.check_writable, tmp_path, tmp_path / "file" / "sub")


# Models


def images_of(count, size=16):
    return torch.rand(count, 3, size, size, generator=common.generator(6, size))


def test_another_seed_shares_nothing():
    """A gold model must be fresh: no randomly drawn tensor equal to the original's, and no memory in common."""
    one, two, same = (common.build_model("toy_vit", 5, 16, seed=s) for s in (0, 1, 0))
    drawn = [name for name, p in one.named_parameters() if p.numel() > 1 and p.std() > 0]
    assert len(drawn) >= 3 + 4 * 4 + 1  # two embeddings and the patch projection, four matrices in each of four blocks, the head
    a, b, c = one.state_dict(), two.state_dict(), same.state_dict()
    assert not any(torch.equal(a[name], b[name]) for name in drawn)
    assert all(torch.equal(a[name], c[name]) for name in a)
    storages = [{t.untyped_storage().data_ptr() for t in itertools.chain(m.parameters(), m.buffers())} for m in (one, two, same)]
    assert not (storages[0] & storages[1] or storages[0] & storages[2] or storages[1] & storages[2])


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    "name, size, width, mean, std",
    [("toy_vit", 16, 64, 0.5, 0.5), ("toy_resnet", 8, 64, 0.5, 0.5), ("resnet18", 32, 512, 0.5, 0.5), ("resnet18", 96, 512, *IMAGENET)],
)
def test_model_gives_features_and_logits(name, size, width, mean, std):
    """Shapes, the model's own normalisation, and logits that are the classifier of these features."""
    model, images = common.build_model(name, 5, size).eval(), images_of(2, size)
    features, logits = model(images)
    assert features.shape == (2, width) and logits.shape == (2, 5)
    normal = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(logits, model.net(normal))  # timm's own forward
    torch.testing.assert_close(logits, model.net.get_classifier()(features))


def initial_weights(what, folder) -> str:
    """Path of a file for --init."""
    path = folder / f"init.{'safetensors' if 'safetensors' in what else 'pt'}"
    if what.startswith("text"):
        path.write_text("no weights\n")
    if what == "empty dict":
        torch.save({}, path)
    if what == "other names":
        torch.save({"encoder.weight": torch.ones(3)}, path)
    if what == "checkpoint":
        common.save_checkpoint(path, kind="model", model={"weight": torch.ones(3)}, epoch=1)
    return str(path)


@pytest.mark.parametrize("name, size", [("toy_vit", 16), ("resnet18", 32), ("resnet18", 96)])
@pytest.mark.parametrize("what", ["missing", "text", "text safetensors", "empty dict", "other names", "checkpoint"])
def test_useless_initial_weights_end_in_one_line(name, size, what, tmp_path, capsys):
    """A file from which nothing can be loaded must not leave a random model that is called pretrained."""
    path = initial_weights(what, tmp_path)
    line = exits(capsys, common.build_model, name, 5, size, path)
    assert path in line and ("no such file" in line) == (what == "missing")


@pytest.mark.parametrize("name, size", [("no_such_model", 16), ("toy_vit", 20), ("vit_tiny_patch16_224", 40)])
def test_impossible_model_ends_in_one_line(name, size, capsys):
    """An unknown name; images that patches do not cover (timm would cut off the rest of each image and say nothing)."""
    line = exits(capsys, common.build_model, name, 5, size)
    assert name in line and str(size) in line


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_initial_weights_come_back(suffix, tmp_path):
    """Weights saved in half precision give the same model in float32, whatever the seed."""
    model, path = common.build_model("toy_vit", 5, 16, seed=0), str(tmp_path / f"init.{suffix}")
    state = {k: v.half() for k, v in model.net.state_dict().items()}
    (torch.save if suffix == "pt" else safetensors.torch.save_file)(state, path)
    again = common.build_model("toy_vit", 5, 16, init=path, seed=1)
    assert all(torch.equal(v, state[k].float()) for k, v in again.net.state_dict().items())


def test_initial_weights_of_a_timm_model(tmp_path):
    """With another number of outputs everything but the classifier comes from the file, as for ImageNet weights."""
    model = common.build_model("resnet18", 7, 32, seed=0)
    torch.save(model.net.state_dict(), tmp_path / "init.pt")
    again = common.build_model("resnet18", 5, 32, init=str(tmp_path / "init.pt"), seed=1)
    a, b = model.net.state_dict(), again.net.state_dict()
    assert [k for k in b if not torch.equal(a[k], b[k])] == ["fc.weight", "fc.bias"]


def dropping_model():
    """A small model with dropout, so that train and eval mode give different logits."""
    model = common.build_model("toy_vit", 5, 16)
    model.net.pos_drop.p = 0.5
    return model


@pytest.mark.parametrize("training", [True, False])
def test_predict_equals_forward(training):
    """Logits in the order of indices, in eval mode, whatever the batch size; the model's mode stays as it was."""
    model, images, indices = dropping_model().eval(), images_of(7), np.array([5, 0, 3, 3, 6])
    direct = model(images[indices])[1].detach()
    model.train(training)
    for batch_size in (1, 2, 5, 256):
        logits = common.predict(model, lambda i: images[i], indices, torch.device("cpu"), batch_size=batch_size)
        torch.testing.assert_close(logits, direct, rtol=0, atol=1e-5)
        assert not logits.requires_grad and all(m.training == training for m in model.modules())


def test_predict_in_bf16_stays_close():
    """bf16 autocast is on where it is asked for (the result differs), and logits come back in float32."""
    model, images, cpu = dropping_model(), images_of(4), torch.device("cpu")
    exact, half = (common.predict(model, lambda i: images[i], np.arange(4), cpu, amp) for amp in (False, True))
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    torch.testing.assert_close(half, exact, rtol=0, atol=0.05)


# Device, seeds, flags


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_absent_device_ends_in_one_line(capsys):
    """--device cuda without CUDA."""
    assert "--device cuda" in exits(capsys, common.choose_device, data.parse_args(["--device", "cuda"]))


@pytest.mark.parametrize("flags, amp", [([], False), (["--amp"], True), (["--no-amp"], False)])
def test_cpu_uses_bf16_only_when_asked(flags, amp, capsys):
    """On a CPU bf16 is 25 times slower, so it is never the default; device, precision and reason are said."""
    args = data.parse_args(["--device", "cpu", *flags])
    assert common.choose_device(args).type == "cpu" and args.amp is amp
    line = capsys.readouterr().out
    assert "cpu" in line and "--device" in line and ("bf16 autocast" in line) == amp


def parse(argv, presets):
    parser = common.Parser()
    common.add_shared_arguments(parser)
    parser.add_argument("--preset", default="paper")
    return common.parse_with_presets(parser, presets, argv)


PRESETS = {"celeba": {"ids": 5, "image_size": 224, "seed": 3}, "code": {"seed": 7}, ("celeba", "code"): {"split_seed": 9}}


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("", (10, 32, 0, 0)),
        ("--dataset celeba", (5, 224, 3, 0)),
        ("--dataset=celeba --preset code", (5, 224, 7, 9)),
        ("--ids 10 --dataset celeba", (10, 224, 3, 0)),
        ("--dataset celeba --preset code --seed 0 --split-seed 1", (5, 224, 0, 1)),
    ],
)
def test_flag_beats_preset_beats_default(argv, expected):
    """Also where the flag repeats the default or comes before the dataset."""
    args = parse(argv.split(), PRESETS)
    assert (args.ids, args.image_size, args.seed, args.split_seed) == expected


def test_help_shows_the_presets_values(capsys):
    """--help says what this dataset would run with."""
    with pytest.raises(SystemExit) as stop:
        parse(["--dataset", "celeba", "--help"], PRESETS)
    assert stop.value.code == 0 and "paper: 224 (default: 224)" in " ".join(capsys.readouterr().out.split())


WRONG = ["--nonsense", "--resum", "--ids many", "--ids 0", "--image-size 4", "--seed -1", "--device", "--dataset"]


@pytest.mark.parametrize("argv", WRONG)
def test_wrong_flag_ends_in_one_line(argv, capsys):
    """An unknown or abbreviated flag, a value of the wrong type or range, a flag without its value."""
    assert argv.split()[0] in exits(capsys, parse, argv.split(), PRESETS)


def test_generator_is_named_by_its_key():
    """The same key gives the same stream, other keys of its length other streams, and the global seed plays no part."""
    keys = list(itertools.product((0, 1, 2, 10**6), repeat=2))
    torch.manual_seed(0)
    first = {key: torch.rand(4, generator=common.generator(*key)) for key in keys}
    torch.manual_seed(1)
    assert all(torch.equal(first[key], torch.rand(4, generator=common.generator(*key))) for key in keys)
    assert len({tuple(stream.tolist()) for stream in first.values()}) == len(keys)


# Curvature


def one_layer(K, images, bias=True):
    """A linear model of flat images and the gradients of log p of each image, with labels drawn as `curvature` draws them."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(images[0].numel(), K, bias=bias)
    model = torch.nn.Module()
    model.layer, model.forward = layer, lambda x: (x.flatten(1), layer(x.flatten(1)))
    rng, gradients = common.generator(5), []
    for batch in torch.arange(len(images)).split(64):
        prob = model(images[batch])[1].detach().sigmoid()
        y = torch.bernoulli(prob, generator=rng)
        gradients.append((y - prob)[:, :, None] * images[batch].flatten(1)[:, None])  # (B, K, pixels)
    return model, torch.cat(gradients).double()


def dense_step(gradients, g, damping):
    """(F + damping)^-1 g with the whole Fisher matrix."""
    flat = gradients.flatten(1)
    return torch.linalg.solve(flat.T @ flat / len(flat) + damping * torch.eye(flat.shape[1]), g.flatten().double()).view_as(g)


@pytest.mark.parametrize("case", ("one output", "one image"))
def test_the_natural_step_is_that_of_the_dense_fisher_matrix(case, module=common):
    """Exact where one side of a layer has a single entry, or where F is a Kronecker product; checked against a dense solve."""
    torch.manual_seed(1)
    K, images = (1, torch.rand(100, 3, 2, 2)) if case == "one output" else (3, torch.rand(1, 3, 2, 2).expand(200, 3, 2, 2))
    model, gradients = one_layer(K, images)
    F = module.curvature(model, lambda i: images[i], torch.arange(len(images)), True, 5)
    g = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    for damping in (1e-2, 1.0):
        step = module.natural(F, g, damping)
        assert torch.allclose(step["layer.weight"].double(), dense_step(gradients, g["layer.weight"], damping), rtol=1e-3, atol=1e-4)
        bias = gradients.sum(2) / images.flatten(1).sum(1).double()[:, None]  # y - p
        assert torch.allclose(step["layer.bias"].double(), dense_step(bias, g["layer.bias"], damping), rtol=1e-3, atol=1e-4)
    u, v = ({k: torch.randn_like(p) for k, p in model.named_parameters()} for _ in range(2))  # the operator is symmetric
    dot = lambda a, b: sum((a[k] * b[k]).sum() for k in a).item()
    assert dot(u, module.natural(F, v, 0.1)) == pytest.approx(dot(module.natural(F, u, 0.1), v), rel=1e-4, abs=1e-5)


def test_curvature_takes_tokens_as_matrices_and_attributes_as_a_sum():
    """cls_token and pos_embed lead with a 1; a convolution's kernel is (out, the rest); F of K attributes is K squared times that of a mean."""
    model = common.build_model("toy_vit", 2, 16, seed=0).eval()
    images = torch.rand(12, 3, 16, 16)
    F = common.curvature(model, lambda i: images[i], torch.arange(12), True, 0)
    shapes = {k: tuple(second.shape) for k, (_, _, second) in F.items()}
    assert shapes["net.cls_token"] == (1, 64) and shapes["net.pos_embed"] == (5, 64) and shapes["net.patch_embed.proj.weight"] == (64, 192)
    total = {k: sum(second.sum() for _, _, second in [F[k]]).item() for k in F}  # the trace does not depend on the basis
    rng, want = common.generator(0), {k: 0.0 for k in F}
    y = torch.bernoulli(model(images)[1].detach().sigmoid(), generator=rng)
    for image, label in zip(images, y, strict=True):
        log_p = -torch.nn.functional.binary_cross_entropy_with_logits(model(image[None])[1][0], label, reduction="sum")
        for (k, _), d in zip(model.named_parameters(), torch.autograd.grad(log_p, list(model.parameters())), strict=True):
            want[k] += d.pow(2).sum().item() / 12
    assert all(total[k] == pytest.approx(want[k], rel=1e-3, abs=1e-7) for k in F)


CURVATURE_MUTANTS = {
    "basis of the other side": ("(outer[k], inner[k])", "(inner[k], inner[k])"),
    "no basis": ("torch.linalg.eigh(t)[1]", "torch.eye(len(t))"),
    "sum for mean": (" / len(indices)", ""),
    "attributes averaged": ("(label.numel() if label.ndim else 1)", "1"),
    "descent's labels": ("torch.bernoulli(logits.sigmoid(), generator=rng)", "(logits > 0).float()"),
    "square root": ("/ (second + damping)", "/ (second + damping).sqrt()"),
    "not turned back": ("return rows, p.numel() // rows", "return p.numel() // rows, rows"),
    "last batch left out": ("for batch in indices.split(batch_size):", "for batch in indices.split(batch_size)[:-1]:"),
}


@pytest.mark.parametrize("old, new", CURVATURE_MUTANTS.values(), ids=CURVATURE_MUTANTS)
def test_mutants_of_the_curvature_are_caught(old, new):
    source = "\n".join(inspect.getsource(f) for f in (common.label_gradients, common.curvature, common._matrix_shape, common.natural))
    assert source.count(old) == 1
    mutant = types.ModuleType("mutant")
    mutant.__dict__.update(common.__dict__)
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    with pytest.raises((AssertionError, RuntimeError)):
        for case in ("one output", "one image"):
            test_the_natural_step_is_that_of_the_dense_fisher_matrix(case, mutant)
