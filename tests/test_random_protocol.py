"""data.py and train.py under the random protocol: splits, flipped labels, readers, crops, recipe.

python -m pytest tests/test_random_protocol.py
"""

import argparse
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import refused
from PIL import Image

import common
import data as D
import train as T


def made(n=600, classes=5, **more):
    targets = torch.from_numpy(np.random.default_rng(0).integers(0, classes, n))
    base = {"targets": targets, "true_targets": targets, "groups": targets.numpy()}
    base |= {"is_test": None, "identities": None, "digest": "made", "name": "made"}
    return base | {"classes": classes} | more


def arguments(*extra):
    return T.parse_args(["--dataset", "digits", "--label-noise", "0", "--batch-size", "32", *extra])


def split(data, *extra):
    return D.random_split(data, arguments(*extra))


SETS = ("retain", "forget", "val", "test")


def test_random_split_holds_every_image_once():
    """A quarter is the test set, a tenth of each class of the rest the validation set."""
    data = made()
    for seed, ratio in itertools.product(range(3), (0.1, 0.5)):
        s = split(data, "--split-seed", str(seed), "--forget-ratio", str(ratio))
        assert sorted(itertools.chain(*(s[name] for name in SETS))) == list(range(600))
        assert all(s[name] == sorted(s[name]) for name in SETS) and not s["test_forgotten"]
        train = len(s["retain"]) + len(s["forget"])
        assert len(s["test"]) == 150 and train + len(s["val"]) == 450
        assert len(s["forget"]) == round(ratio * train)
        rest = np.setdiff1d(np.arange(600), s["test"])
        for c in range(5):
            wanted = round(0.1 * (data["groups"][rest] == c).sum())
            assert (data["groups"][s["val"]] == c).sum() == wanted
        is_test = np.arange(600) % 4 == 1  # the publisher's test set stays the test set
        test = split(made(is_test=is_test), "--split-seed", str(seed))["test"]
        assert test == np.flatnonzero(is_test).tolist()
    dry = D.make_split(data, arguments("--dry-run", "--forget-ratio", "0.5"))
    assert [len(dry[name]) for name in SETS] == [64, 64, 44, 64]
    assert dry["hash"] != D.make_split(data, arguments("--forget-ratio", "0.5"))["hash"]
    short, whole = split(data, "--train-images", "200"), split(data)
    assert sum(len(short[name]) for name in SETS[:3]) == 200 and short["test"] == whole["test"]


def test_random_forget_sets_are_nested_and_depend_on_the_split_seed_alone():
    """A smaller forget set lies in a larger one; images of every class are drawn."""
    data = made()
    small, large = (split(data, "--forget-ratio", ratio) for ratio in ("0.1", "0.5"))
    other = split(data, "--split-seed", "1")
    assert set(small["forget"]) < set(large["forget"])
    assert all(small[name] == large[name] for name in ("val", "test"))
    assert split(data, "--seed", "7") == small and other["forget"] != small["forget"]
    assert len({s["hash"] for s in (small, large, other)}) == 3
    assert np.bincount(data["groups"][large["forget"]], minlength=5).min() > 20


def test_class_forgetting_takes_all_of_the_class_and_nothing_else(capsys):
    """A subclass leaves its super-class to be trained on by the others of it, if there are any."""
    data = made()
    kinds, whole = data["groups"], split(data)
    s = split(data, "--forget", "class", "--forget-classes", "1", "3")
    assert set(kinds[s["forget"]]) == {1, 3} and set(kinds[s["test_forgotten"]]) == {1, 3}
    assert all(set(kinds[s[name]]) == {0, 2, 4} for name in ("retain", "val", "test"))
    assert set(s["forget"] + s["retain"]) == set(whole["forget"] + whole["retain"])
    fine = np.random.default_rng(1).integers(0, 6, 900)
    data = made(900, groups=fine, targets=torch.from_numpy(fine // 2), classes=3)
    s = split(data, "--forget", "subclass", "--forget-classes", "4")
    assert set(fine[s["forget"]]) == {4} and 4 not in set(fine[s["retain"]])
    assert set(data["targets"][s["retain"]].tolist()) == {0, 1, 2}
    both = "--forget", "subclass", "--forget-classes", "4", "5"
    refused(capsys, "none of class 2", split, data, *both)


def test_setting_names_tell_runs_apart():
    other = "--forget-ratio 0.5", "--split-seed 2", "--label-noise 0.2", "--train-images 300"
    other += "--forget class --forget-classes 1 2", "--forget identities", "--dry-run"
    other += ("--forget identities --held-out",)
    names = [D.setting(arguments(*extra.split())) for extra in ("", *other)]
    assert len(set(names)) == len(names) and names[0] == "random0.1-split0"
    assert names[5:7] == ["class1+2-split0", "ids10-split0"]
    classes = "--forget class --forget-classes " + " ".join(map(str, range(100, 199)))
    many = [D.setting(arguments(*(classes + last).split())) for last in (" 199", " 200")]
    assert many[0] != many[1] and max(map(len, many)) < 100  # a folder's name is that short


def test_flipped_labels():
    """An exact share gets another class, each as often; who depends on the split seed alone."""
    data = made(6000, classes=4)
    noisy, again, other = (D.flip_labels(data, 0.3, seed) for seed in (0, 0, 1))
    changed = noisy["targets"] != data["targets"]
    assert changed.sum() == 1800 and torch.equal(noisy["true_targets"], data["targets"])
    step = (noisy["targets"] - data["targets"])[changed] % 4
    assert np.bincount(step, minlength=4)[1:].min() > 500 and (step == 0).sum() == 0
    assert torch.equal(again["targets"], noisy["targets"])
    assert not torch.equal(other["targets"], noisy["targets"])
    assert len({d["digest"] for d in (data, noisy, other)}) == 3  # nor do checkpoints mix


def loaded(tmp_path, dataset, *extra):
    args = T.parse_args(["--dataset", dataset, "--data-dir", str(tmp_path), *extra])
    return D.load(args), args


def test_digits_are_scikit_learns(tmp_path, capsys):
    from sklearn.datasets import load_digits

    (data, args), truth = loaded(tmp_path, "digits", "--label-noise", "0"), load_digits()
    assert np.array_equal(data["targets"].numpy(), truth.target) and args.image_size == 8
    scans = truth.images[..., None] * 255 / 16
    assert np.abs(data["images"].numpy().astype(float) - scans).max() <= 0.5
    assert data["identities"] is None and data["is_test"] is None
    D.main(["--dataset", "digits", "--data-dir", str(tmp_path)])
    assert "1,797 images of 10 classes, 10 % of the labels flipped" in capsys.readouterr().out


def array_file(folder, **changes):
    """CIFAR-10 of 40 images in one file."""
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    table = {"images": images, "label": np.arange(40) % 10, "is_test": np.arange(40) >= 30}
    np.savez(folder / "cifar10.npz", **table | changes)
    return table


def test_cifar10_from_one_array_file(tmp_path):
    table = array_file(tmp_path)
    data, _ = loaded(tmp_path, "cifar10")
    small, args = loaded(tmp_path, "cifar10", "--image-size", "16")
    assert np.array_equal(data["images"].numpy(), table["images"])
    assert data["targets"].tolist() == table["label"].tolist()
    assert data["is_test"].tolist() == table["is_test"].tolist()
    assert data["target_names"][3] == "cat"
    assert small["images"].shape == (40, 16, 16, 3) and args.image_size == 16
    first = Image.fromarray(table["images"][0]).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(small["images"][0].numpy(), np.asarray(first))


def test_a_damaged_array_file_is_named(tmp_path, capsys):
    path = tmp_path / "cifar10.npz"
    for wrong in ({"label": np.zeros(3)}, {"images": np.zeros((40, 8, 8, 3), np.uint8)}, {}):
        array_file(tmp_path, **wrong)
        if not wrong:
            path.write_bytes(path.read_bytes()[:500])
        refused(capsys, "cifar10.npz", loaded, tmp_path, "cifar10")


@pytest.fixture
def tiny(tmp_path):
    """Two classes of four pictures, and a grey picture of the first in val, as some are."""
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n2\nn1\n")
    for name, shade in (("n1", 50), ("n2", 200)):
        (folder / "train" / name / "images").mkdir(parents=True)
        for i in range(4):
            path = folder / "train" / name / "images" / f"{name}_{i}.JPEG"
            Image.new("RGB", (64, 64), (shade,) * 3).save(path)
    Image.new("L", (64, 64), 200).save(folder / "val" / "images" / "val_0.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn2\t0\t0\t62\t62\n")
    return folder


def test_tinyimagenet_tree(tiny):
    """Classes in the order of wnids.txt; val is the test set."""
    data, args = loaded(tiny.parent, "tinyimagenet")
    assert args.image_size == 64 and data["images"].shape == (9, 64, 64, 3)
    assert data["is_test"].tolist() == [False] * 8 + [True]
    assert data["targets"].tolist() == [0] * 4 + [1] * 4 + [0]
    wanted = 200 - 150 * data["targets"].int()
    assert (data["images"][:, 32, 32, 0].int() - wanted).abs().max() < 4


BROKEN = {  # file, its new content by its old one, what is named
    "annotation": ("val/val_annotations.txt", lambda _: b"val_0.JPEG n2\n", "val_annotations.txt"),
    "picture": ("val/images/val_0.JPEG", None, "val_0.JPEG"),
    "class": ("wnids.txt", lambda old: old + b"n3\n", "n3"),
    "Latin-1": ("wnids.txt", lambda old: old + b"\xfc", "UTF-8"),
    "truncated": ("train/n1/images/n1_2.JPEG", lambda old: old[:200], "n1_2.JPEG"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_tinyimagenet_is_named(tiny, capsys, what):
    file, change, word = BROKEN[what]
    path = tiny / file
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    with pytest.raises(SystemExit) as stop:
        loaded(tiny.parent, "tinyimagenet")
    assert stop.value.code == 2 and word in capsys.readouterr().err
    assert not list((tiny.parent / "prepared").glob("*"))


def own(tmp_path, images, **table):
    """The path of one's own prepared pair."""
    np.save(tmp_path / "own.npy", images)
    np.savez(tmp_path / "own.npz", **table)
    return ["--dataset", str(tmp_path / "own")]


NO_SPLIT = {  # a table, and the flips, without a split
    "numbered from 0": ({"targets": np.arange(60) % 3 + 1}, "0"),
    "for validation": ({"targets": np.arange(60) // 5, "is_test": np.arange(60) % 5 == 0}, "0"),
    "for testing": ({"targets": np.arange(60) % 3, "is_test": np.zeros(60, bool)}, "0"),
    "two classes": ({"targets": np.zeros(60, int)}, "0.1"),
}


@pytest.mark.parametrize("word", NO_SPLIT)
def test_own_arrays_that_cannot_be_split(tmp_path, capsys, word):
    table, noise = NO_SPLIT[word]
    path = own(tmp_path, np.zeros((60, 8, 8, 3), np.uint8), **table)
    refused(capsys, word, D.main, [*path, "--forget", "random", "--label-noise", noise])


def test_pad_crop_is_torchvisions_with_all_corners_as_often():
    """Chi-square with 8 degrees of freedom, 99.9 %; digits are neither cropped nor flipped."""
    images = torch.rand(6, 3, 10, 10, generator=common.generator(0))
    drawn = [[0, 0, 0], [4, 4, 0], [8, 3, 1], [2, 7, 1], [4, 4, 1], [8, 8, 0]]
    got = D.augment(images, torch.tensor(drawn))
    for image, (row, column, flip), out in zip(images, drawn, got, strict=True):
        expected = TF.crop(TF.pad(image, 4), row, column, 10, 10)
        assert torch.equal(out, TF.hflip(expected) if flip else expected)
    assert torch.equal(got[1], images[1])
    drawn = D.draw_augmentation(9000, arguments("--augment", "pad-crop"), common.generator(0))
    for column in (0, 1):
        count = np.bincount(drawn[:, column], minlength=9)
        assert len(count) == 9 and ((count - 1000) ** 2 / 1000).sum() < 26.1
    assert abs(drawn[:, 2].float().mean() - 0.5) < 0.02
    assert D.augment(images, D.draw_augmentation(6, arguments(), common.generator(0))) is images


def test_milestones_are_salun_s():
    args, epochs = T.parse_args(["--dataset", "cifar10"]), (0, 90, 91, 135, 136, 181)
    rates = [T.learning_rate(epoch * 10, 10, args) for epoch in epochs]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def digits(tmp_path, *extra):
    """What train.train needs, for a short run on digits."""
    where = ["--data-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c")]
    args = T.parse_args(["--dataset", "digits", *where, *extra])
    args.amp = False
    data = D.load(args)
    return data, D.make_split(data, args), args


@pytest.mark.parametrize("keep", ("best", "last"))
def test_keep_chooses_the_epoch(tmp_path, monkeypatch, keep):
    """With validation scores that fall, the best epoch is the first."""
    falling, states, real = iter((0.9, 0.5, 0.1)), [], T.predict

    def recording(model, *more):
        states.append({k: t.clone() for k, t in model.state_dict().items()})
        return real(model, *more)

    monkeypatch.setattr(T, "score", lambda *_: next(falling))
    monkeypatch.setattr(T, "predict", recording)
    model, _ = T.train("original", *digits(tmp_path, "--epochs", "3", "--keep", keep))
    wanted = states[0 if keep == "best" else 2]
    assert all(torch.equal(t, wanted[k]) for k, t in model.state_dict().items())


def test_the_last_epochs_show_the_images_as_they_are(tmp_path, monkeypatch):
    """--plain-epochs 2 of 3: the first epoch is cropped, and what comes after is not."""
    seen, data, s, args = [], *digits(tmp_path, "--epochs", "3", "--augment", "pad-crop")
    args.plain_epochs = 2

    def recording(images, drawn):
        seen.append(torch.equal(D.augment(images, drawn), images))
        return D.augment(images, drawn)

    monkeypatch.setattr(T, "augment", recording)
    T.train("original", data, s, args)
    steps = len(seen) // 3
    assert seen == [False] * steps + [True] * 2 * steps
    # Unlearning shows them as the last epochs did.
    for args.plain_epochs, plain in ((2, True), (0, False)):
        views = D.augmented(data, torch.arange(9), args, common.generator(0))
        assert torch.equal(views, D.raw_batch(data, torch.arange(9))) == plain


def test_dropout_depends_on_seed_and_epoch_alone(tmp_path, monkeypatch):
    """Else a resumed training would go on with the masks of its first epoch."""
    drawn, (data, s, args) = [], digits(tmp_path, "--epochs", "2")
    model = common.build_model(args.model, data["classes"], args.image_size)
    optimizer = T.new_optimizer(model, args)
    for epoch, seed in ((0, 3), (1, 3), (1, 3), (1, 4)):
        T.train_epoch(model, optimizer, data, torch.tensor(s["retain"][:64]), epoch, seed, args)
        drawn.append(torch.rand(1).item())
    assert drawn[1] == drawn[2] and len(set(drawn)) == 3


def test_a_checkpoint_holds_every_flag_of_its_recipe():
    """Else a model that another recipe made would be taken for this one's."""
    parser = argparse.ArgumentParser()
    T.add_recipe_arguments(parser)
    assert set(T.RECIPE) == {a.dest for a in parser._actions} - {"help"} | {"image_size", "amp"}


@pytest.mark.parametrize("dataset", D.PRESETS)
def test_data_py_shows_the_split_that_train_py_trains_on(dataset):
    shown, trained = (vars(m.parse_args(["--dataset", dataset])) for m in (D, T))
    what = ("forget", "ids", "forget_ratio", "label_noise", "image_size", "split_seed")
    assert {key: shown[key] for key in what} == {key: trained[key] for key in what}
