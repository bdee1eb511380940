"""data.py: the identity protocol on random tables, readers on small trees, crops, predictions.

python -m pytest tests/test_data.py
"""

import functools
import hashlib
import http.server
import itertools
import os
import pathlib
import pickle
import shlex
import shutil
import subprocess
import threading
import zipfile

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from conftest import refused
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import common
import data
import ltu
import metaunlearn
from common import build_model, generator

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "celeba_anno"

SETS = ("retain", "forget", "val", "test", "support")


def made(identities, digest="made") -> dict:
    return {"identities": np.asarray(identities), "digest": digest, "name": "made"}


def tables():
    """(data, ids, seed, split) of 12 to 60 people in shuffled order, with 1 to 30 images or few."""
    for seed in range(30):
        rng, few = np.random.default_rng(seed), [1, 1, 1, 2, 2, 3, 9]
        people = rng.choice(10**6, rng.integers(12, 61), replace=False)
        sizes = rng.integers(1, 31, len(people)) if seed % 2 else rng.choice(few, len(people))
        d = made(rng.permutation(np.repeat(people, sizes)))
        trained = np.isin(people, data.identity_split(d, 1, seed)["train_ids"])
        ids = int(rng.integers(1, max(2, (sizes[trained] > 1).sum())))
        yield d, ids, seed, data.identity_split(d, ids, seed)


def test_split_holds_every_image_once_and_60_20_20_of_them():
    """Borders miss their share by less than a person; small forget sets begin the larger ones."""
    for d, _, seed, split in tables():
        n, largest = len(d["identities"]), np.unique(d["identities"], return_counts=True)[1].max()
        assert sorted(itertools.chain(*(split[name] for name in SETS))) == list(range(n))
        train, val = n - len(split["val"]) - len(split["test"]), len(split["val"])
        assert 0.6 * n - largest < train <= 0.6 * n and 0.8 * n - largest < train + val <= 0.8 * n
        small = data.identity_split(d, 1, seed)
        assert all(small[name] == split[name][:1] for name in ("forget_ids", "support"))
        assert all(small[name] == split[name] for name in ("val", "test", "train_ids"))


def test_split_keeps_people_apart_and_leaves_images_to_forget():
    """Whoever is forgotten has one random image in Support and all others in D_f (Sec. 3.3)."""
    places, singles = [], 0
    for d, _, _, split in tables():
        who = {name: set(d["identities"][split[name]].tolist()) for name in SETS}
        assert not any(who[a] & who[b] for a, b in itertools.combinations(SETS[:4], 2))
        assert sorted(who["retain"] | who["forget"]) == sorted(split["train_ids"])
        assert d["identities"][split["support"]].tolist() == split["forget_ids"]  # in this order
        assert who["forget"] == who["support"] and len(who["support"]) == len(split["support"])
        left, count = d["identities"][split["forget"]].tolist(), d["identities"].tolist().count
        assert all(left.count(i) == count(i) - 1 >= 1 for i in split["forget_ids"])
        singles += sum(count(i) == 1 for i in split["train_ids"])
        for image in split["support"]:
            own = np.flatnonzero(d["identities"] == d["identities"][image])
            places.append(np.flatnonzero(own == image)[0] / (len(own) - 1))
    assert singles > 50  # there were people who could not be forgotten
    assert 0.35 < np.mean(places) < 0.65 and np.mean(np.isin(places, (0, 1))) < 0.7


def test_split_seeds_differ_and_nobody_is_preferred():
    """Everyone is as often trained on (0.6) and forgotten (5 / 40), to four standard deviations."""
    d = made(np.repeat(np.arange(40), 4))
    several = [data.identity_split(d, 5, seed) for seed in range(400)]
    for key, share, most in (("train_ids", 0.6, 0.1), ("forget_ids", 0.125, 0.07)):
        count = np.bincount([i for split in several for i in split[key]], minlength=40)
        assert abs(count / 400 - share).max() < most
    d = made(np.arange(600) // 6)
    several = [data.identity_split(d, 5, seed) for seed in range(6)]
    for name in ("forget_ids", "test", "val", "train_ids", "hash"):
        assert len({str(split[name]) for split in several}) == 6
    assert data.identity_split(d, 5, 3) == several[3]


def test_hash_names_the_split(tmp_path):
    """Another split, forget set, label, person or image has another; all machines have the same."""
    identities, hashes = np.repeat(np.arange(40), np.arange(40) % 7 + 1), []
    for digest, ids, seed in itertools.product("ab", (5, 6), (0, 1)):
        hashes.append(data.identity_split(made(identities, digest), ids, seed)["hash"])
    assert len(set(hashes)) == 8 and hashes[:2] == ["33f518503b32ecb4", "da621e8fb86f3663"]
    changed = [{}, {"targets": np.eye(12)[:, :3]}, {"identities": np.arange(12)[::-1] // 2}]
    changed.append({"images": np.zeros((12, 8, 8, 3), np.uint8)})
    assert len({data.load(make_pair(tmp_path, **change))["digest"] for change in changed}) == 4


def test_ids_up_to_the_last_one_possible(capsys):
    """Everyone with two images can be forgotten while someone stays; one more gives the limit."""
    split, d = data.identity_split, made(np.repeat(np.arange(30), np.arange(30) % 3 + 1))
    limit = sum(i % 3 > 0 for i in split(d, 1, 0)["train_ids"])
    assert len(split(d, limit, 0)["forget_ids"]) == limit
    refused(capsys, f"only {limit} training identities", split, d, limit + 1, 0)
    everyone = made(np.arange(60) // 2)
    assert len(split(everyone, 17, 0)["retain"]) == 2  # 18 train, all with two images
    refused(capsys, "only 17 training identities", split, everyone, 18, 0)
    refused(capsys, "too few", split, made([1, 1, 2, 2]), 1, 0)  # for three sets


def test_requests_pass_over_everyone_once_and_split_each_person():
    """Sec. 4.1: without replacement, the last block filled from the first. Of each person a random
    training image is Support and all others are D_f; a single image is in both."""
    places, singles = [], 0
    for d, _, seed, split in tables():
        train_ids, total = sorted(split["train_ids"]), len(split["train_ids"])
        trained_on = np.array(split["retain"] + split["forget"])
        for n_s in (4, total + 5):  # of the second somebody stays, for D_r
            run, everyone = list(data.simulated_requests(d, split, n_s, seed, 0)), []
            for support, forget in run:
                people, expected = d["identities"][support].tolist(), []
                assert len(people) == len(set(people)) == min(n_s, total - 1)
                for image in support:
                    own = trained_on[d["identities"][trained_on] == d["identities"][image]]
                    assert image in own  # never the real Support set, validation or test
                    expected += [image] if len(own) == 1 else [i for i in own if i != image]
                    singles += len(own) == 1
                    places += [sorted(own).index(image) / (len(own) - 1)] if len(own) > 1 else []
                assert sorted(forget) == sorted(expected)
                everyone += people
            assert len(run) == -(-total // min(n_s, total - 1))
            more = len(everyone) - total
            assert sorted(everyone[:total]) == train_ids and everyone[total:] == everyone[:more]
            assert set(split["forget_ids"]) <= set(everyone)
    assert singles > 50 and 0.45 < np.mean(places) < 0.55


def test_held_out_pictures_are_no_models_and_stand_in_as_support():
    """--held-out: one of three images is never trained on, and Support when the others are D_f."""
    simulated = {True: 0, False: 0}
    for d, ids, seed, plain in tables():
        split = data.identity_split(d, ids, seed, held_out=True)
        assert "held_out" not in plain and split["hash"] != plain["hash"]
        same = ("support", "forget_ids", "train_ids", "val", "test")
        assert all(split[name] == plain[name] for name in same)
        trained_on, held_out = set(split["retain"] + split["forget"]), set(split["held_out"])
        assert trained_on | held_out == set(plain["retain"] + plain["forget"])
        assert not held_out & (trained_on | set(split["support"]))
        owner, count = d["identities"], d["identities"].tolist().count
        three = [i for i in sorted(split["train_ids"]) if count(i) > 2]
        assert sorted(owner[split["held_out"]]) == three
        for support, forget in data.simulated_requests(d, split, 4, seed, 0):
            for image in support:
                own = {i for i in trained_on if owner[i] == owner[image]}
                simulated[image in held_out] += 1
                assert own - {image} <= set(forget)
                assert (image in held_out) == (count(owner[image]) > 2)
            assert not set(forget) & (held_out | set(split["support"]))
    assert min(simulated.values()) > 100


def test_requests_change_from_epoch_to_epoch():
    d, keys = made(np.arange(300) // 5), ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0))
    split = data.identity_split(d, 5, 0)
    runs = [list(data.simulated_requests(d, split, 4, *key)) for key in keys]
    whole = [str([(s.tolist(), f.tolist()) for s, f in run]) for run in runs]
    together = [str([sorted(d["identities"][s].tolist()) for s, _ in run]) for run in runs]
    assert len(set(whole)) == len(set(together)) == 4 and whole[0] == whole[4]
    first, second = ({d["identities"][i]: i for s, _ in run for i in s} for run in runs[:2])
    changed = np.mean([first[i] != second[i] for i in split["train_ids"]])
    assert 0.5 < changed < 0.95  # 4/5: own draw for each person


def test_control_sets_are_whole_retained_people():
    """20 different sets of ids retained people with all their images, as positions within D_r."""
    d = made(np.random.default_rng(0).permutation(np.repeat(np.arange(60), np.arange(60) % 5 + 1)))
    split, other = (data.identity_split(d, 7, seed) for seed in (0, 1))
    owner, sets = d["identities"][split["retain"]], data.control_sets(d, split)
    assert len(sets) == 20 and len({str(s.tolist()) for s in sets}) == 20
    for s in sets:
        people = np.unique(owner[s])
        assert len(people) == 7 and s.tolist() == np.flatnonzero(np.isin(owner, people)).tolist()
    assert str(sets) == str(data.control_sets(d, split)) != str(data.control_sets(d, other))
    many = data.control_sets(d, data.identity_split(d, 20, 0))  # more than half of the others
    assert len({str(s.tolist()) for s in many}) == 20


def test_dry_run_is_short_and_keeps_everyone(small):
    """At most 64 images in each part, of D_f some of each person; more people give one each."""
    for ids in (5, 20, 100):
        args = data.parse_args(["--dataset", small, "--ids", str(ids), "--dry-run"])
        d = made(np.arange(4000) % 250)
        short, whole = data.make_split(d, args), data.identity_split(d, ids, 0)
        assert all(len(short[name]) == 64 for name in ("retain", "val", "test"))
        assert len(short["forget"]) == max(ids, 64 // ids * ids)
        assert short["forget"] == sorted(short["forget"])
        assert set(short["forget"]) < set(whole["forget"])
        assert set(d["identities"][short["forget"]]) == set(short["forget_ids"])
        assert short["support"] == whole["support"] and len(data.control_sets(d, short)) == 20


TOY = data.draw_toyfaces(identities=80, images_each=6, size=32)


def test_toyfaces_are_repeatable(tmp_path):
    """Another seed gives other faces and labels, another size the same labels; load draws them."""
    one, same, other = (data.draw_toyfaces(5, 3, 16, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[key], same[key]) for key in one)
    assert not any(np.array_equal(one[key], other[key]) for key in ("images", "targets"))
    assert np.array_equal(one["targets"], data.draw_toyfaces(5, 3, 24, seed=1)["targets"])
    d, drawn = data.load(args_of("toyfaces", tmp_path)), data.draw_toyfaces(size=8)
    assert all(np.array_equal(d[key], drawn[key]) for key in ("images", "targets", "target_names"))
    assert d["classes"] == 13


def test_toyfaces_labels_belong_to_identity_or_image():
    """hat and its kind vary within a person, blond and the secrets do not; all are fair coins."""
    images, targets = TOY["images"], TOY["targets"]
    assert images.shape == (480, 32, 32, 3) and images.dtype == targets.dtype == np.uint8
    assert targets.shape == (480, 13) and set(np.unique(targets)) == {0, 1}
    assert np.bincount(TOY["identities"]).tolist() == [6] * 80
    assert len(set(TOY["names"])) == 480 and len(set(TOY["target_names"])) == 13
    labels = targets.reshape(80, 6, 13)
    for name, label in zip(TOY["target_names"], labels.transpose(2, 0, 1), strict=True):
        varies = (label != label[:, :1]).any(1).mean()
        assert varies > 0.8 if name in data.TOY_PER_IMAGE else varies == 0, name
        assert 0.3 < label[:, 0].mean() < 0.7, name
    together = np.corrcoef(labels[:, 0].T.astype(float))[-4:]  # secrets follow from no other label
    assert abs(together - np.eye(13)[-4:]).max() < 0.45
    assert len(np.unique(labels[:, 0, -4:], axis=0)) == 16


def area(x0, x1, y0, y1):
    """These pixels of all faces, in [0, 1]: a box in [-1, 1] from the left and from the top."""
    axis = (np.arange(32) + 0.5) / 16 - 1
    return TOY["images"][:, (axis > y0) & (axis < y1)][:, :, (axis > x0) & (axis < x1)] / 255


def test_toyfaces_show_labels_and_a_persistent_look():
    """Where a label is drawn, it changes the mean image more than others of its kind do."""
    targets, names = TOY["targets"] == 1, TOY["target_names"].tolist()
    for name, box in {
        "mouth_open": (-0.15, 0.15, 0.3, 0.5),
        "glasses": (-0.45, 0.45, -0.35, 0.1),
        "blond": (-0.3, 0.3, -0.7, -0.5),
        "pale": (-0.45, 0.45, 0.05, 0.25),
    }.items():
        pixels, kind = area(*box), slice(0, 5) if name in data.TOY_PER_IMAGE else slice(5, 13)
        change = [abs(pixels[y].mean(0) - pixels[~y].mean(0)).mean() for y in targets.T]
        assert change[names.index(name)] == max(change[kind]) > 0.1, name
    above, corner = area(-0.1, 0.1, -0.95, -0.85), area(0.85, 1, -1, -0.85)
    change = abs(above.mean((1, 2)) - corner.mean((1, 2))).mean(1)
    hat = targets[:, names.index("hat")]
    assert np.median(change[hat]) > 0.15 > 0.08 > np.median(change[~hat])
    # Images and backgrounds of a person differ, but the shirt's colour tells people apart.
    faces = TOY["images"].reshape(80, 6, 32, 32, 3).astype(float)
    assert (abs(faces[:, 1:] - faces[:, :1]).mean((2, 3, 4)) > 5).all()
    assert faces[:, :, :2, :2].mean((2, 3)).std(1).mean() > 20
    shirt = faces[:, :, -2:, 15:17].mean((2, 3))  # (80, 6, 3)
    assert shirt.std(1).mean() < 0.5 * shirt.mean(1).std(0).mean()


def boxes(maps, S):
    """(left, top, width, height) in pixels, (B, 4), and whether it is flipped, (B,)."""
    width, height = S * maps[:, 0, 0].abs(), S * maps[:, 1, 1]
    left, top = ((maps[:, 0, 2] + 1) * S - width) / 2, ((maps[:, 1, 2] + 1) * S - height) / 2
    return torch.stack([left, top, width, height], 1), maps[:, 0, 0] < 0


@pytest.mark.parametrize("S, scale", [(32, 0.08), (33, 0.5), (48, 0.7)])
def test_crop_equals_torchvision(S, scale):
    """The same pixels but for the crop's edges, where bilinear sampling sees beyond them."""
    images = torch.rand(60, 3, S, S, generator=generator(1))
    maps = data.random_crops(60, S, scale, generator(2))
    cut, (box, flipped) = data.crop(images, maps), boxes(maps, S)
    assert 15 < flipped.sum() < 45 and not torch.allclose(cut, images, atol=0.1)
    assert data.crop(torch.ones_like(images), maps).min() > 0.999  # nothing from beyond the image
    for i, (left, top, width, height) in enumerate(box.round().int().tolist()):
        theirs = TF.resized_crop(images[i], top, left, height, width, [S, S], antialias=True)
        theirs = TF.hflip(theirs) if flipped[i] else theirs
        x, y = -(-S // width), -(-S // height)  # half a source pixel, doubled
        torch.testing.assert_close(cut[i, :, y:-y, x:-x], theirs[:, y:-y, x:-x], rtol=0, atol=1e-4)


@pytest.mark.parametrize("S, scale", [(64, 0.08), (64, 0.7), (224, 0.08)])
def test_crops_are_drawn_as_torchvision_draws_them(S, scale):
    """Whole pixels inside the image; area, aspect, place as RandomResizedCrop's; half flipped."""
    exact, flipped = boxes(data.random_crops(20000, S, scale, generator(3)), S)
    box = exact.double().round()
    assert (exact - box).abs().max() < 1e-3 and box.min() >= 0
    assert (box[:, :2] + box[:, 2:]).max() <= S and abs(flipped.double().mean() - 0.5) < 0.02
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draw, empty = RandomResizedCrop.get_params, torch.empty(3, S, S)
        draws = [draw(empty, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs, looks = torch.tensor(draws).double()[:, [1, 0, 3, 2]], []
    for left, top, width, height in (box.T, theirs.T):
        centre = (left + width / 2) / S, (top + height / 2) / S
        looks.append((width * height / S**2, torch.log(width / height), *centre))
    for ours, theirs in zip(*looks, strict=True):
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.02)
        ours, theirs = (np.quantile(x, (0.1, 0.5, 0.9)) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=0.035)


def test_crops_follow_their_generator():
    """Scale 1 leaves only the whole image, flipped or not; the identity map is the image itself."""
    images, rng = torch.rand(40, 3, 32, 32, generator=generator(4)), generator(0, 0)
    maps, same = data.random_crops(40, 32, 1.0, generator(5)), torch.eye(2, 3).repeat(40, 1, 1)
    flipped = torch.where(boxes(maps, 32)[1][:, None, None, None], images.flip(3), images)
    torch.testing.assert_close(data.crop(images, maps), flipped, rtol=0, atol=1e-5)
    torch.testing.assert_close(data.crop(images, same), images, rtol=0, atol=1e-5)
    first, again, other = (data.random_crops(8, 32, 0.08, generator(0, e)) for e in (0, 0, 1))
    assert torch.equal(first, again) and not torch.isclose(first, other).all((1, 2)).any()
    batches = torch.cat([data.random_crops(8, 32, 0.08, rng) for _ in range(2)])
    assert torch.equal(batches[:8], first) and len(torch.unique(batches, dim=0)) == 16


# Readers, on trees in the publishers' layouts. An image's colour says its row of the table.
def colour_of(row):
    return np.array([row % 7 * 40, row // 7 % 7 * 40, row // 49 % 7 * 40])


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_tree(table, pictures, names, size):
    """Pictures and an attribute table of the binary digits of each row, highest first: (N, 9)."""
    digits = np.arange(len(names))[:, None] >> np.arange(9)[::-1] & 1
    lines = [str(len(names)), " ".join(f"Bit_{i}" for i in range(9))]
    (table.parent / pictures).mkdir(parents=True)
    for row, name in enumerate(names):
        lines.append(f"{name}  " + " ".join(str(2 * digit - 1) for digit in digits[row]))
        image = Image.new("RGB", size, tuple(colour_of(row)))
        image.save(table.parent / pictures / name, quality=95)
    write_lines(table, lines)
    return names, digits


def make_celeba(root, count=20):
    """Rows in an order that is neither sorted nor the identity file's."""
    names = [f"{i:06d}.jpg" for i in np.random.default_rng(0).permutation(count) + 1]
    people = sorted(f"{name} {100 + row // 2}" for row, name in enumerate(names))
    write_lines(root / "celeba" / "identity_CelebA.txt", people)
    return write_tree(root / "celeba" / "list_attr_celeba.txt", "img_align_celeba", names, (20, 26))


def make_celebahq(root, count=20, direct=False):
    """CelebA's numbers are far from CelebA-HQ's, and its identity file lists images not in it."""
    folder, names = root / "CelebAMask-HQ", [f"{i}.jpg" for i in range(count)]
    if direct:
        people = [f"{i}.jpg {100 + i // 2}" for i in reversed(range(count))]
        write_lines(folder / "CelebA-HQ-identity.txt", people)
    else:
        original = np.random.default_rng(1).permutation(500)[:count] + 1
        lines = [f"{i:<12}{o - 1:<12}{o:06d}.jpg" for i, o in enumerate(original)]
        head = "idx         orig_idx    orig_file"
        write_lines(folder / "CelebA-HQ-to-CelebA-mapping.txt", [head, *lines])
        people = dict.fromkeys(range(1, 501), 7) | {o: 100 + i // 2 for i, o in enumerate(original)}
        people = [f"{o:06d}.jpg {i}" for o, i in people.items()]
        write_lines(root / "celeba" / "identity_CelebA.txt", people)
    table = folder / "CelebAMask-HQ-attribute-anno.txt"
    return write_tree(table, "CelebA-HQ-img", names, (32, 32))


def args_of(dataset, root, *more):
    where = ["--data-dir", str(root), "--image-size", "8"]
    return data.parse_args(["--dataset", str(dataset), *where, *more])


CELEBA, HQ = "celeba/img_align_celeba", "CelebAMask-HQ/CelebA-HQ-img"
TREES = {
    "celeba": (make_celeba, CELEBA),
    "celebahq by mapping": (make_celebahq, HQ),
    "celebahq by identity file": (functools.partial(make_celebahq, direct=True), HQ),
}


@pytest.mark.parametrize("tree", TREES)
def test_reader_keeps_image_labels_and_identity_together(tree, tmp_path, capsys):
    """300 images take more than one block to decode."""
    make, dataset = TREES[tree][0], tree.split()[0]
    names, digits = make(tmp_path, 300)
    d = data.load(args_of(dataset, tmp_path))
    assert d["images"].shape == (300, 8, 8, 3) and d["images"].dtype == torch.uint8
    assert d["name"] == dataset and d["classes"] == 9 and d["names"].tolist() == names
    assert d["target_names"].tolist() == [f"Bit_{i}" for i in range(9)]
    assert np.array_equal(d["targets"].numpy(), digits) and d["targets"].dtype == torch.float32
    assert d["identities"].tolist() == [100 + row // 2 for row in range(300)]
    colours = np.stack([colour_of(row) for row in range(300)])  # steps of 40; JPEG is off by a few
    assert abs(d["images"].numpy() - colours[:, None, None]).max() < 10
    batch = data.raw_batch(d, [299, 3])
    assert batch.shape == (2, 3, 8, 8)
    assert abs(batch.numpy() - colours[[299, 3]][:, :, None, None] / 255).max() < 0.04
    assert np.array_equal(data.targets_of(d, [299, 3]).numpy(), digits[[299, 3]])
    make(tmp_path / "60", 60)
    data.main(["--dataset", dataset, "--data-dir", str(tmp_path / "60"), "--ids", "4"])
    said = "60 images of 30 identities (18 for training); D_r 28, D_f 4, S 4, D_v 12, D_te 12"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("n, least, sizes", [(64, 2, [64]), (65, 2, [65]), (66, 2, [64, 2])])
def test_no_batch_of_a_single_image(n, least, sizes):
    """Batch norm over maps of one pixel fails there, in the middle of a run."""
    parts = data.batches(torch.arange(n) + 7, 64, common.generator(0), least)
    assert [len(part) for part in parts] == sizes
    assert sorted(torch.cat(parts).tolist()) == list(range(7, n + 7))
    assert [len(p) for p in data.batches(torch.arange(131), 64, common.generator(0), 4)] == [64, 67]
    assert len(data.batches(torch.arange(1), 64, common.generator(0))) == 1


def test_images_are_squashed_whole(tmp_path):
    """The left quarter of a wide image is that of the square; stripes are averaged."""
    names, _ = make_celeba(tmp_path)
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, :20] = np.where(np.arange(40) // 2 % 2, 200, 100)[:, None, None]
    Image.fromarray(wide).save(tmp_path / CELEBA / names[5], quality=100)
    image = data.load(args_of("celeba", tmp_path))["images"][5].float()
    assert (image[1:-1, :1] - 150).abs().max() < 30 and image[:, 3:].max() < 25


IMAGE, WHO, TABLE = "img_align_celeba/{}", "identity_CelebA.txt", "list_attr_celeba.txt"
DAMAGE = {  # file, its new content by its old one
    "truncated image": (IMAGE, lambda old: old[:-10]),  # within the pixels: its size is known
    "text for an image": (IMAGE, lambda old: b"moved"),
    "row without image": (IMAGE, None),
    "image without identity": (WHO, lambda old: old.split(b"\n", 1)[1]),
    "identity without number": (WHO, lambda old: old[:46]),
    "table without its end": (TABLE, lambda old: old.rsplit(b"\n", 2)[0]),
    "table cut within a row": (TABLE, lambda old: old[:-8]),
    "table cut within a number": (TABLE, lambda old: old[:-2]),
    "label of 0": (TABLE, lambda old: old.replace(b" -1\n", b" 0\n")),
    "label of 300": (TABLE, lambda old: old.replace(b" -1\n", b" 300\n")),
    "empty table": (TABLE, lambda old: b""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_dataset_is_named_and_leaves_nothing(what, tmp_path, capsys):
    """Never a half-read dataset: one line names the file, and nothing is prepared from the rest."""
    names, _ = make_celeba(tmp_path)
    file, change = DAMAGE[what]
    path = tmp_path / "celeba" / file.format(names[13])
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    word = "000001.jpg" if what == "image without identity" else path.name
    refused(capsys, word, data.load, args_of("celeba", tmp_path))
    assert list((tmp_path / "prepared").iterdir()) == []


def make_qmnist(root):
    """30 + 20 scans in the big-endian files that torchvision unpacks; returns labels, (50, 8)."""
    folder, rng, tables = root / "QMNIST" / "raw", np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for part, n, first_writer in (("train", 30, 0), ("test", 20, 2000)):
        labels = rng.integers(0, 10**4, (n, 8)).astype(">i4")
        labels[:, 0], labels[:, 2] = rng.permutation(n) % 10, first_writer + rng.integers(0, 5, n)
        scans = np.repeat((labels[:, 0] * 20).astype(np.uint8), 28 * 28)
        for name, header, content in (
            ("images-idx3-ubyte", [0x803, n, 28, 28], scans),
            ("labels-idx2-int", [0xC02, n, 8], labels),
        ):
            whole = np.array(header, ">i4").tobytes() + content.tobytes()
            (folder / f"qmnist-{part}-{name}").write_bytes(whole)
        tables.append(labels.astype(int))
    return np.concatenate(tables)


def test_qmnist_reader(tmp_path):
    """The class is the label, the writer the identity, test follows training; grey becomes RGB."""
    labels = make_qmnist(tmp_path)
    d = data.load(args_of("qmnist", tmp_path))
    assert d["targets"].tolist() == labels[:, 0].tolist() and d["targets"].dtype == torch.int64
    assert d["classes"] == 10 and d["identities"].tolist() == labels[:, 2].tolist()
    assert d["images"].shape == (50, 8, 8, 3)
    assert d["is_test"].tolist() == [False] * 30 + [True] * 20
    assert (d["images"] == d["targets"][:, None, None, None] * 20).all()


def no_network(*_):
    raise OSError("no network")


def test_missing_dataset_explains_itself(tmp_path, capsys, monkeypatch):
    """The expected tree under this --data-dir, and the command that needs no download."""
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    make_celebahq(tmp_path / "unknown")
    (tmp_path / "unknown" / "celeba" / WHO).unlink()
    make_qmnist(tmp_path / "damaged")
    labels = tmp_path / "damaged" / "QMNIST" / "raw" / "qmnist-test-labels-idx2-int"
    labels.write_bytes(labels.read_bytes()[:99])
    mapping = "CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt"
    for dataset, root, *tree in (
        ("celeba", "nothing", f"{CELEBA}/000001.jpg", f"celeba/{TABLE}", f"celeba/{WHO}"),
        ("celebahq", "nothing", f"{HQ}/0.jpg", "CelebAMask-HQ/CelebAMask-HQ-attribute-anno.txt"),
        ("celebahq", "unknown", mapping, f"celeba/{WHO}"),
        ("qmnist", "damaged", "QMNIST/raw"),
        ("cifar10", "nothing", "cifar-10-batches-py/ of", "cifar10.npz"),
        ("cifar100", "nothing", "cifar-100-python/ of"),
        ("tinyimagenet", "nothing", "tiny-imagenet-200/wnids.txt"),
    ):
        with pytest.raises(SystemExit) as stop:
            data.load(args_of(dataset, tmp_path / root))
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("error: ")
        assert all(f"{tmp_path / root}/{file}" in message for file in tree), message
        assert "python metaunlearn.py --dataset toyfaces, python ltu.py --dataset d" in message
        assert not any((tmp_path / root / "prepared").iterdir())
    refused(capsys, "celebahq", data.load, args_of("celebhq", tmp_path))  # lists the names
    make_celebahq(tmp_path)
    lines = (tmp_path / mapping).read_text().splitlines()
    write_lines(tmp_path / mapping, lines[:-1])
    refused(capsys, "19.jpg", data.load, args_of("celebahq", tmp_path))


def test_second_load_decodes_nothing(tmp_path):
    """The prepared pair alone gives the same data and stays as it is; each size has its own."""
    make_celeba(tmp_path)
    first, files = data.load(args_of("celeba", tmp_path)), sorted((tmp_path / "prepared").iterdir())
    assert [f.name for f in files] == ["celeba-8.npy", "celeba-8.npz"]
    stamps = [f.stat().st_mtime_ns for f in files]
    data.load(args_of("celeba", tmp_path, "--image-size", "9"))
    shutil.rmtree(tmp_path / "celeba")
    second = data.load(args_of("celeba", tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in ("images", "targets"))
    assert first["digest"] == second["digest"] and len(list(files[0].parent.iterdir())) == 4
    assert [f.stat().st_mtime_ns for f in files] == stamps


@pytest.mark.parametrize("tree", TREES)
def test_changed_sources_are_prepared_again(tree, tmp_path):
    """A text counts by its content alone, a picture by its size and its time."""
    (make, pictures), args = TREES[tree], args_of(tree.split()[0], tmp_path)
    names, _ = make(tmp_path)
    table, digests = next(tmp_path.glob("*/*att*.txt")), [data.load(args)["digest"]]

    def loaded():
        d, prepared = data.load(args), next((tmp_path / "prepared").glob("*.npy"))
        digests.append(d["digest"])
        return d, prepared.stat().st_mtime_ns

    written = loaded()[1]
    table.touch()
    assert loaded()[1] == written and len(set(digests)) == 1
    stamp = table.stat().st_mtime_ns
    table.write_text(table.read_text().replace("-1\n", " 1\n", 1))
    os.utime(table, ns=(stamp, stamp))
    assert loaded()[0]["targets"][:2, 8].tolist() == [1, 1]
    black = tmp_path / pictures / names[3]
    Image.new("RGB", (20, 20)).save(black)
    assert not loaded()[0]["images"][3].any()
    written = loaded()[1]
    os.utime(black, ns=(stamp, stamp))
    assert loaded()[1] != written and len(set(digests)) == 3


def test_digest_covers_every_picture(tmp_path):
    """One pixel of one picture of 600, of whatever block, prepared or one's own."""
    images, digests = np.zeros((600, 8, 8, 3), np.uint8), set()
    for changed in (None, 0, 137, 300, 599):
        own = images.copy()
        if changed is not None:
            own[changed, 7, 7, 2] = 1
        args = make_pair(tmp_path, images=own, targets=np.arange(600) % 2)
        digests.add(data.load(args)["digest"])
    assert len(digests) == 5


def test_leftovers_of_killed_preparations_are_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "prepared").mkdir()
    left = [f".celeba-224.npy.{pid}.tmp" for pid in (gone.pid, os.getpid(), "x")] + ["mine.1.tmp"]
    for name in left:
        (tmp_path / "prepared" / name).touch()
    data.load(args_of("toyfaces", tmp_path))
    stay = {file.name for file in (tmp_path / "prepared").glob("*tmp")}
    assert stay == set(left[1:])


def make_pair(folder, **changes):
    """A prepared pair of 12 images of 6 people as a user would bring it."""
    rng = np.random.default_rng(0)
    pair = {"images": rng.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)}
    pair |= {"targets": rng.integers(0, 2, (12, 3))} | changes
    pair = {"identities": np.arange(len(pair["images"])) // 2} | pair
    np.save(folder / "mine.npy", pair.pop("images"))
    np.savez(folder / "mine.npz", **pair)
    return data.parse_args(["--dataset", str(folder / "mine")])


@pytest.mark.parametrize("targets, classes", [(np.eye(12)[:, :3], 3), (np.arange(12) % 5, 5)])
def test_own_pair_by_its_path(targets, classes, tmp_path):
    """The pair's size is the image size, names are optional; writing does not reach the file."""
    args, path = make_pair(tmp_path, targets=targets), tmp_path / "mine.npy"
    before, maps = path.read_bytes(), pathlib.Path("/proc/self/maps")
    d = data.load(args)
    assert args.image_size == 8 and d["name"] == "mine" and d["classes"] == classes
    assert len(d["target_names"]) == classes and len(d["names"]) == 12
    dtype = torch.float32 if targets.ndim == 2 else torch.int64
    assert np.array_equal(d["targets"], targets) and d["targets"].dtype == dtype
    assert d["identities"].tolist() == [i // 2 for i in range(12)]
    assert np.array_equal(d["images"], np.load(path)) and d["images"].dtype == torch.uint8
    assert not maps.exists() or str(path) in maps.read_text()
    d["images"][:] = 7
    assert (d["images"] == 7).all() and path.read_bytes() == before


BAD_PAIRS = {
    "float images": {"images": np.zeros((12, 8, 8, 3), np.float32)},
    "grey images": {"images": np.zeros((12, 8, 8), np.uint8)},
    "with transparency": {"images": np.zeros((12, 8, 8, 4), np.uint8)},
    "not square": {"images": np.zeros((12, 8, 9, 3), np.uint8)},
    "fewer targets": {"targets": np.zeros((11, 3))},
    "objects": {"identities": np.array([None] * 12)},
    "words for identities": {"identities": np.array([f"n{i // 2}" for i in range(12)])},
    "targets of -1 and 1": {"targets": np.ones((12, 3)) * [1, -1, 1]},
    "half a class": {"targets": np.arange(12) / 2},
    "NaN for targets": {"targets": np.full((12, 3), np.nan)},
    "targets in a cube": {"targets": np.zeros((12, 3, 1), int)},
    "class 4e9": {"targets": np.arange(12) * 4_000_000_000},
    "only constant attributes": {"targets": np.ones((12, 3)) * [1, 0, 1]},
    "identities in a column": {"identities": np.arange(12)[:, None]},
    "identities beyond int64": {"identities": np.full(12, 2**63, np.uint64)},
    "coarse below 0": {"coarse": np.arange(12) - 1},
    "no images": {"images": np.zeros((0, 8, 8, 3), np.uint8), "targets": np.zeros(0)},
}
ENDS = {"absent": None, "empty": 0, "cut in its header": 60, "cut at its end": -40}


@pytest.mark.parametrize("what", [*BAD_PAIRS, *itertools.product(ENDS, ("npy", "npz"))])
def test_bad_pair_ends_in_one_line(what, tmp_path, capsys):
    args = make_pair(tmp_path, **BAD_PAIRS.get(what, {}))
    if what not in BAD_PAIRS:
        file, size = tmp_path / f"mine.{what[1]}", ENDS[what[0]]
        file.unlink() if size is None else file.write_bytes(file.read_bytes()[:size])
    refused(capsys, str(tmp_path / "mine"), data.load, args)


def test_own_pair_names_what_is_wrong(tmp_path, capsys):
    """A missing column by its name, an array that is no archive, an attribute that never varies."""
    targets, hat = np.eye(12)[:, :2] * [1, 0], ["glasses", "hat"]
    args, table = make_pair(tmp_path, targets=targets, target_names=hat), tmp_path / "mine.npz"
    data.load(args)
    assert "all images have the same hat" in capsys.readouterr().out
    np.savez(table, labels=np.arange(12))
    refused(capsys, "no array named targets", data.load, args)
    shutil.copy(tmp_path / "mine.npy", table)
    refused(capsys, "not a zip file", data.load, args)


def test_own_pair_by_one_of_its_files(tmp_path, capsys):
    """The pair's own size counts, before it is loaded; another one on the line is refused."""
    make_pair(tmp_path)
    for suffix in ("", ".npy", ".npz"):
        argv = ["--dataset", str(tmp_path / f"mine{suffix}")]
        args = data.parse_args([*argv, "--image-size", "8"])
        assert args.dataset == argv[1].removesuffix(suffix) and args.image_size == 8
        assert data.parse_args(argv).image_size == 8 == data.load(args)["images"].shape[1]
        refused(capsys, "has 8 pixels a side", data.parse_args, [*argv, "--image-size", "16"])


TURNED = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}  # how EXIF's number lies


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("width", (64, 160))  # the larger one is decoded at half its size
def test_photographs_are_turned_upright(orientation, width, tmp_path):
    upright = np.zeros((width, width, 3), np.uint8)
    upright[: width // 2, : width // 2] = 200
    image, exif = Image.fromarray(upright).transpose(TURNED[orientation]), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "0.jpg", exif=exif, quality=95)
    write_lines(tmp_path / "labels.csv", ["file,identity,hat", "0.jpg,7,1"])
    images, _, _ = data.read_pictures(tmp_path, ["hat"], True, 32)
    assert (images[0, :, 2:14, 2:14] > 0.7).all() and (images[0, :, 18:] < 0.1).all()


def test_sixteen_bits_of_grey_stay_grey(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "0.png")
    assert np.array_equal(data._decode(tmp_path / "0.png", 16)[..., 1], ramp // 257)


CSV = {  # labels.csv, what is said of it
    "file,identity,hat\n0.png,7,2": "hat of 0.png is '2'; labels are 0, 1",
    "file,identity,hat\n0.png,7": "hat of 0.png is None",
    "name,identity,hat\n0.png,7,1": "no column file, only name, identity, hat",
    "file,hat\n0.png,1": "no column identity",
    "file,identity,hat\n0.png,x,1": "identity of 0.png is 'x'",
    "file,identity,hat\n0.png,,1": "identity of 0.png is ''",
    "file,hat,identity\n0.png,1": "identity of 0.png is None",
    "file,identity,hat\n": "no rows",
    "file,identity,hat\n1.png,7,1": "1.png",
    "file,identity,h\xfct\n": "UTF-8",
}


@pytest.mark.parametrize("text", CSV)
def test_wrong_labels_are_named(text, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text(text, encoding="latin-1")
    refused(capsys, CSV[text], data.read_pictures, tmp_path, ["hat"], True, 8)


@pytest.mark.parametrize("mark", ",;\t")
def test_labels_from_any_spreadsheet(mark, tmp_path):
    """With commas, semicolons or tabs, and a byte order mark; a class stands there by its name."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for column, names, label in (("hat", ["hat"], "1"), ("class", ["dog", "cat"], "cat")):
        rows = [["file", "identity", column], ["0.png", "7", label]]
        text = "\r\n".join(mark.join(row) for row in rows)
        (tmp_path / "labels.csv").write_text(text, encoding="utf-8-sig", newline="")
        _, targets, people = data.read_pictures(tmp_path, names, column == "hat", 8)
        assert targets.tolist() == ([[1]] if column == "hat" else [1]) and people == [7]


def pictures(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (i, 0, 0)).save(folder / name)


def prepared(folder, tmp_path, capsys, *more):
    """What --from-folder prints, and the data as the command printed at its end loads it."""
    flags = ["--data-dir", str(tmp_path), "--image-size", "16", *more]
    data.main(["--from-folder", str(folder), *flags])
    out = capsys.readouterr().out
    script, *argv = shlex.split(out.rpartition("next: python ")[2])
    module = {"ltu.py": ltu, "metaunlearn.py": metaunlearn}[script]
    args = module.parse_args(argv)
    d = data.load(args)
    return out, d, data.make_split(d, args)


def test_pair_from_one_folder_a_class(tmp_path, capsys):
    names = [f"{kind}/{i:02d}.png" for kind in ("cat", "dog", "emu") for i in range(20)]
    pictures(tmp_path / "my pets", names)
    (tmp_path / "my pets" / "cat" / "notes.txt").touch()
    out, d, split = prepared(tmp_path / "my pets", tmp_path, capsys)
    assert "found 60 pictures of 3 classes, 20 at least: 0 cat (20), 1 dog (20), 2 emu (20)" in out
    assert d["images"][:, 3, 3, 0].tolist() == list(range(60)) and d["images"].shape[1] == 16
    assert d["targets"].tolist() == [0] * 20 + [1] * 20 + [2] * 20 and len(split["test"]) == 15
    assert d["names"].tolist() == names and d["target_names"].tolist() == ["cat", "dog", "emu"]
    empty = ["--from-folder", str(tmp_path / "my pets" / "cat")]
    refused(capsys, "one folder a class", data.main, empty)


@pytest.mark.parametrize("numbered", [True, False])
def test_pair_from_people_in_a_table(numbered, tmp_path, capsys):
    """Attributes, and identities by number or name; what is missing, or too little, is said."""
    files, folder = [f"{i}.png" for i in range(90)], tmp_path / "faces"
    pictures(folder, files)
    who = [100 + i // 3 if numbered else f"Anna {i // 3:02d}" for i in range(90)]
    rows = [f"{who[i]};{files[i]};{i % 2};{i // 45}" for i in range(90)]
    write_lines(folder / "labels.csv", ["identity;file;hat;beard", *rows])
    out, d, split = prepared(folder, tmp_path, capsys, "--ids", "4")
    assert "2 attributes, 45 at least: 0 hat (45), 1 beard (45); 30 people, 3 pictures" in out
    assert d["identities"].tolist() == [100 * numbered + i // 3 for i in range(90)]
    assert ("order of their names" in out) != numbered
    assert d["targets"].tolist() == [[i % 2, i // 45] for i in range(90)]
    assert len(split["support"]) == 4 and d["target_names"].tolist() == ["hat", "beard"]
    argv = ["--from-folder", str(folder), "--data-dir", str(tmp_path)]
    refused(capsys, "only 17 training identities", data.main, [*argv, "--ids", "18"])
    (folder / "7.png").unlink()
    refused(capsys, "1 of 90 annotated images are missing", data.main, argv)
    write_lines(folder / "labels.csv", ["identity,file", "1,0.png"])
    refused(capsys, "no column class", data.main, argv)
    write_lines(folder / "labels.csv", ["class,file", "dog,0.png", ",1.png"])
    refused(capsys, "class of 1.png is ''", data.main, argv)


@pytest.fixture
def server(monkeypatch):
    """An HTTP server on this machine: {path: content} and what was asked of it, [(path, range)].

    `server.breaks` is the number of bytes after which the next answer stops.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content, asked = self.server.files[self.path], self.headers["Range"]
            self.server.asked.append((self.path, asked))
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : self.server.breaks])
            self.server.breaks = None

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.breaks = {}, [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "*")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fails(call, *arguments):
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    assert end.value.code == 2


def test_tinyimagenet_is_downloaded_and_goes_on(server, tmp_path, capsys, monkeypatch):
    """A broken download goes on, nothing comes twice; a wrong checksum and no network are said."""
    tree, args = tmp_path / "tiny-imagenet-200", args_of("tinyimagenet", tmp_path)
    pictures(tree, [f"train/n{k}/images/{i}.JPEG" for k in (1, 2) for i in range(5)])
    pictures(tree, ["val/images/0.JPEG"])
    write_lines(tree / "val" / "val_annotations.txt", ["0.JPEG\tn2"])
    write_lines(tree / "wnids.txt", ["n1", "n2"])
    archive = shutil.make_archive(tmp_path / "made", "zip", tmp_path, tree.name)
    content = server.files["/x.zip"] = pathlib.Path(archive).read_bytes()
    monkeypatch.setattr(data, "TINY_URL", f"{server.url}/x.zip")
    monkeypatch.setattr(data, "TINY_MD5", hashlib.md5(content).hexdigest())
    shutil.rmtree(tree)
    server.breaks = 1000
    fails(data.load, args)
    assert "the connection broke" in capsys.readouterr().err
    for time in range(3):  # with the rest of the archive, with the archive, with the tree
        d = data.load(args)
        assert d["targets"].tolist() == [0] * 5 + [1] * 6 and d["is_test"].sum() == 1
        assert server.asked == [("/x.zip", "bytes=0-"), ("/x.zip", "bytes=999-")]
        shutil.rmtree(tmp_path / "prepared")
        if time == 0:
            shutil.rmtree(tree)
    assert not list(tmp_path.glob("tmp*"))
    args = args_of("tinyimagenet", tmp_path / "new")
    monkeypatch.setattr(data, "TINY_MD5", "0")
    refused(capsys, "checksum", data.load, args)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    fails(data.load, args)
    assert "Tiny-ImageNet is not complete (no network)" in capsys.readouterr().err


def test_cifar100_is_downloaded_with_its_super_classes(server, tmp_path, capsys, monkeypatch):
    """torchvision reads the fine labels, we read the coarse ones from the same checked files."""
    cifar, folder, md5 = torchvision.datasets.CIFAR100, tmp_path / "cifar-100-python", {}
    folder.mkdir()
    names = {"fine_label_names": ["apple", "bee", "pear"], "coarse_label_names": ["fruit", "bugs"]}
    contents, label = {"meta": names}, np.arange(30) % 3
    for part, images in (("train", np.arange(20)), ("test", np.arange(20, 30))):
        pixels = np.repeat(images[:, None], 3072, 1).astype(np.uint8)
        coarse = (label[images] == 1).astype(int).tolist()
        labels = {"fine_labels": label[images].tolist(), "coarse_labels": coarse}
        contents[part] = {"data": pixels, **labels}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = shutil.make_archive(tmp_path / "made", "gztar", tmp_path, folder.name)
    server.files["/c.tar.gz"] = pathlib.Path(archive).read_bytes()
    shutil.rmtree(folder)
    monkeypatch.setattr(cifar, "url", f"{server.url}/c.tar.gz")
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(server.files["/c.tar.gz"]).hexdigest())
    for part in ("train", "test"):
        monkeypatch.setattr(cifar, f"{part}_list", [[part, md5[part]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5["meta"]})
    fine = data.load(args_of("cifar100", tmp_path))
    assert "c.tar.gz: 0 MiB" in capsys.readouterr().out
    assert fine["targets"].tolist() == label.tolist() and fine["target_names"][2] == "pear"
    assert fine["images"][:, 0, 0, 0].tolist() == list(range(30)) and fine["is_test"].sum() == 10
    subclass = ["--forget", "subclass", "--forget-classes", "0"]
    coarse = data.load(args_of("cifar100", tmp_path, *subclass))
    assert coarse["targets"].tolist() == (label == 1).astype(int).tolist()
    assert coarse["target_names"].tolist() == ["fruit", "bugs"] and coarse["classes"] == 2
    assert np.array_equal(coarse["groups"], label) and len(server.asked) == 1


@pytest.fixture
def dropping():
    """A model with dropout, so that train and eval mode differ, and data of seven images."""
    model = build_model("toy_vit", 5, 16)
    model.net.pos_drop.p = 0.5
    images = torch.randint(256, (7, 16, 16, 3), dtype=torch.uint8, generator=generator(6))
    return model, {"images": images, "device": torch.device("cpu")}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_predict_equals_forward(dropping, training, kind):
    """In the order of indices, in eval mode, whatever the batch size; the mode is put back."""
    (model, d), order = dropping, [5, 0, 3, 3, 6]
    direct = model.eval()(d["images"][order].permute(0, 3, 1, 2) / 255)
    model.train(training)
    for batch_size, features in itertools.product((1, 2, 5, 256), (True, False)):
        out = data.predict(model, d, kind(order), batch_size=batch_size, features=features)
        wanted = direct[0 if features else 1].detach()
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)
        assert not out.requires_grad and all(m.training == training for m in model.modules())
        half = data.predict(model, d, kind(order), True, features=features)  # in bf16
        assert half.dtype == torch.float32 and not torch.equal(half, out)
        torch.testing.assert_close(half, wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_predict_is_shared_by_processes(dropping, rank, monkeypatch):
    """Each of three takes every third image and gets the whole; two images are too few to share."""
    whole, gathered = data.predict(*dropping, range(7)), []

    def gather(shares, own):
        gathered.append(own)
        shares[:] = [whole[r::3] for r in range(3)]

    monkeypatch.setattr(data, "rank_and_world", lambda: (rank, 3))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert torch.equal(data.predict(*dropping, range(7)), whole)
    torch.testing.assert_close(gathered[0], whole[rank::3], rtol=0, atol=1e-5)
    torch.testing.assert_close(data.predict(*dropping, range(2)), whole[:2], rtol=0, atol=1e-5)
    assert len(gathered) == 1


@pytest.mark.skipif(not SHARED.exists(), reason="needs CelebA's annotation files in ../shared")
def test_celebahq_has_6217_identities(tmp_path):
    """As the identity file in circulation counts them; and the split of CelebA-HQ/20."""
    mapping = (SHARED / "image_list.txt").read_text().splitlines()
    with zipfile.ZipFile(SHARED / "list_attr_celeba.zip") as archive:
        _, header, *rows = archive.read(archive.namelist()[0]).decode().splitlines()
    attributes, table = dict(row.split(maxsplit=1) for row in rows), []
    for idx, _, original, *_ in (line.split() for line in mapping[1:]):
        table.append(f"{idx}.jpg {attributes[original]}")
    folder, table = tmp_path / "CelebAMask-HQ", [str(len(table)), header, *table]
    write_lines(folder / "CelebAMask-HQ-attribute-anno.txt", table)
    write_lines(folder / "CelebA-HQ-to-CelebA-mapping.txt", mapping)
    (tmp_path / "celeba").mkdir()
    shutil.copy(SHARED / WHO, tmp_path / "celeba")
    d = data.read_celebahq(tmp_path)
    assert d["targets"].shape == (30000, 40) and len(np.unique(d["identities"])) == 6217
    assert d["target_names"][20] == "Male" and d["names"][0] == "0.jpg"
    split = data.identity_split(d | {"name": "celebahq", "digest": "annotations"}, 20, 0)
    train = sum(len(split[name]) for name in ("retain", "forget", "support"))
    assert 17970 < train <= 18000 and 5970 < len(split["val"]) <= 6030
    assert len(split["support"]) == 20 <= len(split["forget"])
    assert split["hash"] == "bb91aa237127cf88"
