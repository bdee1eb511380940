"""data.py and train.py under the random protocol: splits, flipped labels, readers, augmentation, recipe.

python -m pytest tests/test_random_protocol.py
"""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

import common
import data as D
import train as T


def made(n=600, classes=5, **more):
    targets = torch.from_numpy(np.random.default_rng(0).integers(0, classes, n))
    base = {"targets": targets, "true_targets": targets, "groups": targets.numpy(), "is_test": None, "identities": None}
    return base | {"classes": classes, "digest": "made", "name": "made"} | more


def arguments(*extra):
    return T.parse_args(["--dataset", "digits", "--label-noise", "0", "--batch-size", "32", *extra])


def split(data, *extra):
    return D.random_split(data, arguments(*extra))


SETS = ("retain", "forget", "val", "test")


def test_random_split_holds_every_image_once():
    data = made()
    for seed, ratio in itertools.product(range(3), (0.1, 0.5)):
        s = split(data, "--split-seed", str(seed), "--forget-ratio", str(ratio))
        assert sorted(itertools.chain(*(s[name] for name in SETS))) == list(range(600)) and not s["test_forgotten"]
        assert all(s[name] == sorted(s[name]) for name in SETS)
        train = len(s["retain"]) + len(s["forget"])
        assert len(s["test"]) == 150 and train + len(s["val"]) == 450
        assert len(s["forget"]) == round(ratio * train)
        rest = np.setdiff1d(np.arange(600), s["test"])  # validation: a tenth of each class
        for c in range(5):
            assert (data["groups"][s["val"]] == c).sum() == round(0.1 * (data["groups"][rest] == c).sum())


def test_random_forget_sets_are_nested_and_depend_on_the_split_seed_alone():
    data = made()
    small, large = (split(data, "--forget-ratio", ratio) for ratio in ("0.1", "0.5"))
    assert set(small["forget"]) < set(large["forget"]) and small["val"] == large["val"] and small["test"] == large["test"]
    assert split(data, "--seed", "7") == small and split(data, "--split-seed", "1")["forget"] != small["forget"]
    assert small["hash"] != large["hash"] != split(data, "--split-seed", "1")["hash"]
    chosen = np.bincount(data["groups"][large["forget"]], minlength=5)
    assert chosen.min() > 20  # at random: from every class


def test_the_publishers_test_set_stays_the_test_set():
    is_test = np.arange(600) % 4 == 1
    for seed in ("0", "1"):
        assert split(made(is_test=is_test), "--split-seed", seed)["test"] == np.flatnonzero(is_test).tolist()


def test_train_images_keeps_that_many():
    s, whole = split(made(), "--train-images", "200"), split(made())
    assert len(s["retain"]) + len(s["forget"]) + len(s["val"]) == 200 and s["test"] == whole["test"]


def test_class_forgetting_takes_all_of_the_class_and_nothing_else():
    data = made()
    s = split(data, "--forget", "class", "--forget-classes", "1", "3")
    kinds = data["groups"]
    assert set(kinds[s["forget"]]) == {1, 3} and set(kinds[s["test_forgotten"]]) == {1, 3}
    assert all(set(kinds[s[name]]) == {0, 2, 4} for name in ("retain", "val", "test"))
    whole = split(data)
    assert set(s["forget"]) | set(s["retain"]) == set(whole["forget"]) | set(whole["retain"])


def test_subclass_forgetting_takes_the_fine_class_out_of_its_super_class():
    fine = np.random.default_rng(1).integers(0, 6, 900)
    data = made(900, groups=fine, targets=torch.from_numpy(fine // 2), classes=3)
    s = split(data, "--forget", "subclass", "--forget-classes", "4")
    assert set(fine[s["forget"]]) == {4} and 4 not in set(fine[s["retain"]])
    assert set(data["targets"][s["retain"]].tolist()) == {0, 1, 2}  # its super-class is still trained on, by 5
    both = ["--forget", "subclass", "--forget-classes", "4", "5"]  # nothing of super-class 2 would be left
    with pytest.raises(SystemExit):
        split(data, *both)


def test_setting_names_tell_runs_apart():
    names = [
        D.setting(arguments(*extra))
        for extra in (
            (),
            ("--forget-ratio", "0.5"),
            ("--split-seed", "2"),
            ("--label-noise", "0.2"),
            ("--train-images", "300"),
            ("--forget", "class", "--forget-classes", "1", "2"),
            ("--forget", "identities"),
            ("--dry-run",),
        )
    ]
    assert len(set(names)) == len(names)
    assert names[0] == "random0.1-split0" and names[5] == "class1+2-split0" and names[6] == "ids10-split0"


def test_flipped_labels():
    """An exact share gets another class, each of the others as often; who depends on the split seed alone."""
    data = made(6000, classes=4)
    noisy = D.flip_labels(data, 0.3, 0)
    changed = noisy["targets"] != data["targets"]
    assert changed.sum() == 1800 and torch.equal(noisy["true_targets"], data["targets"])
    step = (noisy["targets"] - data["targets"])[changed] % 4
    assert np.bincount(step, minlength=4)[1:].min() > 500 and (step == 0).sum() == 0
    again, other = D.flip_labels(data, 0.3, 0), D.flip_labels(data, 0.3, 1)
    assert torch.equal(again["targets"], noisy["targets"]) and not torch.equal(other["targets"], noisy["targets"])
    assert len({data["digest"], noisy["digest"], other["digest"]}) == 3  # checkpoints of one do not load into another


# ------------------------------------------------------------------------------------------------ readers


def loaded(tmp_path, dataset, *extra):
    args = T.parse_args(["--dataset", dataset, "--data-dir", str(tmp_path), *extra])
    return D.load(args), args


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    data, args = loaded(tmp_path, "digits", "--label-noise", "0")
    truth = load_digits()
    assert np.array_equal(data["targets"].numpy(), truth.target) and args.image_size == 8
    assert np.abs(data["images"].numpy().astype(float) - truth.images[..., None] * 255 / 16).max() <= 0.5
    assert data["identities"] is None and data["is_test"] is None


def test_cifar10_from_one_array_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images, label, is_test = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 10, np.arange(40) >= 30
    np.savez(tmp_path / "cifar10.npz", images=images, label=label, is_test=is_test)
    data, _ = loaded(tmp_path, "cifar10")
    assert np.array_equal(data["images"].numpy(), images) and data["targets"].tolist() == label.tolist()
    assert data["is_test"].tolist() == is_test.tolist() and data["target_names"][3] == "cat"
    small, args = loaded(tmp_path, "cifar10", "--image-size", "16")
    assert small["images"].shape == (40, 16, 16, 3) and args.image_size == 16
    expected = np.asarray(Image.fromarray(images[0]).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(small["images"][0].numpy(), expected)


@pytest.mark.parametrize("dataset", ("cifar10", "cifar100", "tinyimagenet"))
def test_missing_files_are_explained(tmp_path, capsys, dataset):
    with pytest.raises(SystemExit) as stop:
        loaded(tmp_path, dataset)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Expected:" in message and "python ltu.py --dataset digits" in message and str(tmp_path) in message
    assert not list((tmp_path / "prepared").glob("*"))


@pytest.mark.parametrize("broken", ({"label": np.zeros(3)}, {"images": np.zeros((40, 8, 8, 3), np.uint8)}, None))
def test_a_damaged_array_file_is_named(tmp_path, capsys, broken):
    whole = {"images": np.zeros((40, 32, 32, 3), np.uint8), "label": np.zeros(40), "is_test": np.zeros(40, bool)}
    np.savez(tmp_path / "cifar10.npz", **(whole | (broken or {})))
    if broken is None:
        path = tmp_path / "cifar10.npz"
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SystemExit):
        loaded(tmp_path, "cifar10")
    message = capsys.readouterr().err
    assert "cifar10.npz" in message and len(message.splitlines()) == 1


def test_cifar100_has_two_label_sets(tmp_path, monkeypatch):
    """torchvision gives the fine labels; the super-classes are 20 times 5 different names of them."""
    names = sorted(itertools.chain(*(group.split() for group in D.CIFAR100_COARSE.values())))
    assert len(D.CIFAR100_COARSE) == 20 and len(set(names)) == 100
    assert all(len(group.split()) == 5 for group in D.CIFAR100_COARSE.values())
    label = np.repeat(np.arange(100), 3)
    images, is_test = np.zeros((300, 32, 32, 3), np.uint8), np.arange(300) % 3 == 0
    monkeypatch.setattr(D, "_from_torchvision", lambda *args: (images, label, names, is_test))
    fine, _ = loaded(tmp_path, "cifar100")
    assert fine["classes"] == 100 and fine["target_names"][fine["groups"][0]] == "apple"
    coarse, _ = loaded(tmp_path, "cifar100", "--forget", "subclass", "--forget-classes", "0")
    assert coarse["classes"] == 20 and coarse["target_names"][coarse["targets"][0]] == "fruit_and_vegetables"
    assert np.array_equal(coarse["groups"], label)


def tiny_tree(root, pictures=4):
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n2\nn1\n")
    colour = {"n1": 50, "n2": 200}
    for name in ("n1", "n2"):
        (folder / "train" / name / "images").mkdir(parents=True)
        for i in range(pictures):
            Image.new("RGB", (64, 64), (colour[name],) * 3).save(folder / "train" / name / "images" / f"{name}_{i}.JPEG")
    Image.new("L", (64, 64), 200).save(folder / "val" / "images" / "val_0.JPEG")  # some of its pictures are grey
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn2\t0\t0\t62\t62\n")
    return folder


def test_tinyimagenet_tree(tmp_path):
    tiny_tree(tmp_path)
    data, args = loaded(tmp_path, "tinyimagenet")
    assert args.image_size == 64 and data["images"].shape == (9, 64, 64, 3) and data["is_test"].tolist() == [False] * 8 + [True]
    assert data["targets"].tolist() == [0] * 4 + [1] * 4 + [0]  # in the order of wnids.txt
    for image, label in zip(data["images"], data["targets"], strict=True):
        assert abs(int(image[32, 32, 0]) - (200 if label == 0 else 50)) < 4


@pytest.mark.parametrize("damage", ("annotation", "picture", "class", "truncated"))
def test_a_broken_tinyimagenet_is_named(tmp_path, capsys, damage):
    folder = tiny_tree(tmp_path)
    if damage == "annotation":
        (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG n2\n")
    elif damage == "picture":
        (folder / "val" / "images" / "val_0.JPEG").unlink()
    elif damage == "class":
        (folder / "wnids.txt").write_text("n2\nn1\nn3\n")
    else:
        path = folder / "train" / "n1" / "images" / "n1_2.JPEG"
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit) as stop:
        loaded(tmp_path, "tinyimagenet")
    words = {"annotation": "val_annotations.txt", "picture": "val_0.JPEG", "class": "n3", "truncated": "n1_2.JPEG"}
    assert stop.value.code == 2 and words[damage] in capsys.readouterr().err
    assert not list((tmp_path / "prepared").glob("*"))


def test_your_own_arrays_need_no_identities(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "own.npy", rng.integers(0, 256, (200, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "own.npz", targets=rng.integers(0, 3, 200))
    args = T.parse_args(["--dataset", str(tmp_path / "own"), "--forget", "random", "--batch-size", "16"])
    data = D.load(args)
    s = D.make_split(data, args)
    assert len(s["test"]) == 50 and "200 images of 3 classes" in D.describe(data, s)
    with pytest.raises(SystemExit):
        D.make_split(data, T.parse_args(["--dataset", str(tmp_path / "own")]))
    assert "--forget random" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ augmentation, recipe


def test_pad_crop_is_torchvisions():
    images = torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    drawn = torch.tensor([[0, 0, 0], [4, 4, 0], [8, 3, 1], [2, 7, 1], [4, 4, 1], [8, 8, 0]])
    got = D.augment(images, drawn)
    for image, (row, column, flip), out in zip(images, drawn.tolist(), got, strict=True):
        expected = TF.crop(TF.pad(image, 4), row, column, 10, 10)
        assert torch.equal(out, TF.hflip(expected) if flip else expected)
    assert torch.equal(got[1], images[1])


def test_drawn_crops_cover_all_corners_evenly():
    drawn = D.draw_augmentation(9000, arguments("--augment", "pad-crop"), common.generator(0))
    for column in (0, 1):
        count = np.bincount(drawn[:, column], minlength=9)
        assert len(count) == 9 and ((count - 1000) ** 2 / 1000).sum() < 26.1  # chi-square, 8 degrees of freedom, 99.9 %
    assert abs(drawn[:, 2].float().mean() - 0.5) < 0.02
    plain = torch.rand(2, 3, 8, 8)
    assert D.augment(plain, D.draw_augmentation(2, arguments(), common.generator(0))) is plain  # digits are not flipped


def test_milestones_are_salun_s():
    args = T.parse_args(["--dataset", "cifar10"])
    rate = lambda epoch: T.learning_rate(epoch * 10, 10, args)
    assert [rate(e) for e in (0, 90, 91, 135, 136, 181)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_resnet18_has_a_cifar_stem_at_32_pixels_alone():
    small, large = common.build_model("resnet18", 10, 32), common.build_model("resnet18", 10, 128)
    assert small.net.conv1.kernel_size == (3, 3) and small.net.conv1.stride == (1, 1)
    assert sum(p.numel() for p in small.parameters()) == 11_173_962  # the CIFAR ResNet-18 with 10 classes
    assert large.net.conv1.kernel_size == (7, 7)
    with torch.no_grad():
        assert small.eval().net.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)


@pytest.mark.parametrize("keep", ("best", "last"))
def test_keep_chooses_the_epoch(tmp_path, monkeypatch, keep):
    """With validation scores that fall, the best epoch is the first."""
    flags = ["--dataset", "digits", "--epochs", "3", "--keep", keep, "--data-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c")]
    args = T.parse_args(flags)
    args.amp = False
    data = D.load(args)
    s = D.make_split(data, args)
    falling, states = iter((0.9, 0.5, 0.1)), []
    monkeypatch.setattr(T, "score", lambda *_: next(falling))
    real = T.predict
    monkeypatch.setattr(
        T, "predict", lambda model, *a: (states.append({k: t.clone() for k, t in model.state_dict().items()}), real(model, *a))[1]
    )
    model, _ = T.train("original", data, s, args)
    wanted = states[0 if keep == "best" else 2]
    assert all(torch.equal(t, wanted[k]) for k, t in model.state_dict().items())


def test_gold_never_sees_the_forget_set(tmp_path, monkeypatch):
    args = T.parse_args(["--dataset", "digits", "--epochs", "1", "--data-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c")])
    args.amp = False
    data = D.load(args)
    s = D.make_split(data, args)
    read, real = [], T.raw_batch
    monkeypatch.setattr(T, "raw_batch", lambda data, i: (read.append(np.asarray(i)), real(data, i))[1])
    T.train("gold", data, s, args)
    assert set(np.concatenate(read).tolist()) == set(s["retain"]) | set(s["val"])
    read.clear()
    T.train("original", data, s, args)
    assert set(np.concatenate(read).tolist()) == set(s["retain"]) | set(s["forget"]) | set(s["val"])


def test_data_py_prints_a_random_split(tmp_path, capsys):
    D.main(["--dataset", "digits", "--data-dir", str(tmp_path)])
    assert "1,797 images of 10 classes, 10 % of the labels flipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "table, word",
    [
        ({"targets": np.arange(60) % 3 + 1}, "numbered from 0"),
        ({"targets": np.arange(60) // 5, "is_test": np.arange(60) % 5 == 0}, "for validation"),
        ({"targets": np.arange(60) % 3, "is_test": np.zeros(60, bool)}, "for testing"),
        ({"targets": np.zeros(60, int), "noise": True}, "two classes"),
    ],
    ids=("classes from 1", "no validation", "no test", "one class"),
)
def test_own_arrays_that_cannot_be_split(tmp_path, capsys, table, word):
    noise = ["--label-noise", "0.1"] * table.pop("noise", False)
    np.save(tmp_path / "own.npy", np.zeros((60, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "own.npz", **table)
    with pytest.raises(SystemExit) as stop:
        D.main(["--dataset", str(tmp_path / "own"), "--forget", "random", *noise])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and word in message and len(message.splitlines()) == 1


def test_weight_files_for_our_own_nets(tmp_path, capsys):
    """All but a classifier of another size is loaded; another model's weights are refused."""
    net = common.build_model("toy_resnet", 7, 8, seed=0).net
    torch.save(net.state_dict(), tmp_path / "w.pt")
    again = common.build_model("toy_resnet", 10, 8, init=str(tmp_path / "w.pt"), seed=1).net
    assert torch.equal(again.conv1.weight, net.conv1.weight) and again.fc.weight.shape == (10, 64)
    with pytest.raises(SystemExit):
        common.build_model("resnet18", 10, 32, init=str(tmp_path / "w.pt"))
    assert "cannot be built" in capsys.readouterr().err
