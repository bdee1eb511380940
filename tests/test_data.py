"""data.py: the identity protocol on random tables, readers on small trees in the publishers' layouts, crops against torchvision.

python -m pytest tests/test_data.py
"""

import io
import itertools
import pathlib
import shutil
import zipfile

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import data
from common import generator

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "celeba_anno"


def fails(capsys, function, *args) -> str:
    """Call function, which must end with exit code 2; returns what stands on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


def exits(capsys, function, *args) -> str:
    """Like fails, with a message of one line."""
    message = fails(capsys, function, *args)
    assert len(message.splitlines()) == 1, message
    return message


# The identity protocol


def made(identities, digest="made") -> dict:
    return {"identities": np.asarray(identities), "digest": digest, "name": "made"}


def tables(count=30):
    """(data, ids, split seed): 12 to 60 people in shuffled order, each with 1 to 30 images, in half of the tables mostly 1 or 2."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        people = rng.choice(10**6, rng.integers(12, 61), replace=False)
        sizes = rng.integers(1, 31, len(people)) if seed % 2 else rng.choice([1, 1, 1, 2, 2, 3, 9], len(people))
        d = made(rng.permutation(np.repeat(people, sizes)))
        trained = d["identities"][np.isin(d["identities"], data.identity_split(d, 1, seed)["train_ids"])]
        several = (np.unique(trained, return_counts=True)[1] > 1).sum()
        yield d, int(rng.integers(1, several if several > 1 else 2)), seed


def splits():
    for d, ids, seed in tables():
        yield d, data.identity_split(d, ids, seed)


SETS = ("retain", "forget", "support", "val", "test")


def test_split_shares_are_60_20_20_of_images():
    """Each border lies at its share of the images, short of it by less than one person."""
    for d, split in splits():
        n, largest = len(d["identities"]), np.unique(d["identities"], return_counts=True)[1].max()
        train = sum(len(split[name]) for name in ("retain", "forget", "support"))
        assert 0.6 * n - largest < train <= 0.6 * n
        assert 0.8 * n - largest < train + len(split["val"]) <= 0.8 * n


def test_split_parts_hold_every_image_once():
    """No image is lost, and none is in two sets: above all none of Support in a set that is trained on."""
    for d, split in splits():
        assert sorted(itertools.chain(*(split[name] for name in SETS))) == list(range(len(d["identities"])))


def test_split_keeps_people_apart():
    """Nobody is in two of train, validation and test, nor both retained and forgotten; train_ids are those of the training images."""
    for d, split in splits():
        who = {name: set(d["identities"][split[name]].tolist()) for name in SETS}
        assert who["retain"] | who["forget"] == set(split["train_ids"]) and len(split["train_ids"]) == len(set(split["train_ids"]))
        assert who["forget"] == who["support"] == set(split["forget_ids"])
        assert not any(who[a] & who[b] for a, b in itertools.combinations(("retain", "forget", "val", "test"), 2))


def test_support_is_one_random_image_of_each():
    """One Support image for each forget identity, in the order of forget_ids, and not always a person's first or last."""
    places = []
    for d, split in splits():
        assert len(split["support"]) == len(split["forget_ids"]) == len(set(split["forget_ids"]))
        assert d["identities"][split["support"]].tolist() == split["forget_ids"]
        for image in split["support"]:
            own = np.flatnonzero(d["identities"] == d["identities"][image])
            places.append(np.flatnonzero(own == image)[0] / (len(own) - 1))
    assert 0.35 < np.mean(places) < 0.65 and np.mean(np.isin(places, (0, 1))) < 0.7


def test_forget_identities_keep_images():
    """Sec. 3.3: each has more than one image, so D_f holds all others of everyone in Support; a person with one is never drawn."""
    singles = 0
    for d, split in splits():
        count = dict(zip(*np.unique(d["identities"], return_counts=True), strict=True))
        left = d["identities"][split["forget"]].tolist()
        assert all(left.count(i) == count[i] - 1 >= 1 for i in split["forget_ids"])
        singles += sum(count[i] == 1 for i in split["train_ids"])
    assert singles > 50  # there were people to leave out


def test_forget_sets_are_nested():
    """For one split seed, fewer ids are the beginning of more, with the same Support images, validation and test."""
    for d, ids, seed in tables():
        small, large = (data.identity_split(d, n, seed) for n in (1, ids))
        assert small["forget_ids"] == large["forget_ids"][:1] and small["support"] == large["support"][:1]
        assert all(small[name] == large[name] for name in ("val", "test", "train_ids"))


def test_split_seeds_differ():
    """Another split seed gives other people to forget and another test set; the same seed gives the same split."""
    d = made(np.arange(600) // 6)
    several = [data.identity_split(d, 5, seed) for seed in range(6)]
    for name in ("forget_ids", "test", "val", "train_ids", "hash"):
        assert len({str(s[name]) for s in several}) == 6
    assert data.identity_split(d, 5, 3) == several[3]


def test_nobody_is_preferred():
    """Over many split seeds everyone is about as often trained on (0.6) and forgotten (5 / 40), whatever their number."""
    d = made(np.repeat(np.arange(40), 4))
    several = [data.identity_split(d, 5, seed) for seed in range(400)]
    trained, forgotten = (np.bincount([i for s in several for i in s[key]], minlength=40) / 400 for key in ("train_ids", "forget_ids"))
    assert abs(trained - 0.6).max() < 0.1 and abs(forgotten - 0.125).max() < 0.07  # four standard deviations


def test_hash_names_the_split():
    """Results of different splits, forget sets or annotations must not be mixed; this one must come out on every machine."""
    identities = np.repeat(np.arange(40), np.arange(40) % 7 + 1)
    runs = itertools.product("ab", (5, 6), (0, 1))
    hashes = [data.identity_split(made(identities, digest), ids, seed)["hash"] for digest, ids, seed in runs]
    assert len(set(hashes)) == 8
    assert hashes[:2] == ["33f518503b32ecb4", "da621e8fb86f3663"]


def test_ids_up_to_the_last_one_possible(capsys):
    """Everyone with two images can be forgotten while someone stays; one more ends in one line that gives the limit."""
    d = made(np.repeat(np.arange(30), np.arange(30) % 3 + 1))
    limit = sum(i % 3 > 0 for i in data.identity_split(d, 1, 0)["train_ids"])
    assert len(data.identity_split(d, limit, 0)["forget_ids"]) == limit
    assert f"only {limit} training identities" in exits(capsys, data.identity_split, d, limit + 1, 0)
    everyone = made(np.arange(60) // 2)
    assert len(data.identity_split(everyone, 17, 0)["retain"]) == 2  # 18 train, all with two images
    assert "only 17 training identities" in exits(capsys, data.identity_split, everyone, 18, 0)


def test_too_few_identities(capsys):
    """Two people cannot fill three sets."""
    assert "too few" in exits(capsys, data.identity_split, made([1, 1, 2, 2]), 1, 0)


def requests(d, split, n_s=4, seed=0, epoch=0):
    return list(data.simulated_requests(d, split, n_s, seed, epoch))


def test_requests_pass_over_everyone_once():
    """Sec. 4.1: all training identities without replacement, the forget identities too; the last block is filled from the first."""
    for d, split in splits():
        n_s = min(4, len(split["train_ids"]))
        blocks = [d["identities"][support].tolist() for support, _ in requests(d, split)]
        everyone, total = list(itertools.chain(*blocks)), len(split["train_ids"])
        assert all(len(block) == len(set(block)) == n_s for block in blocks) and len(blocks) == -(-total // n_s)
        assert sorted(everyone[:total]) == sorted(split["train_ids"]) and set(split["forget_ids"]) <= set(everyone)
        assert everyone[total:] == everyone[: len(everyone) - total]


def test_requests_split_each_person():
    """One random image is Support and all others are D_f; a single image is in both; nothing from outside the training set."""
    places, singles = [], 0
    for seed, (d, split) in enumerate(splits()):
        trained_on = np.array(split["retain"] + split["forget"])
        for support, forget in requests(d, split, seed=seed):
            expected = []
            for image in support:
                own = trained_on[d["identities"][trained_on] == d["identities"][image]]
                assert image in own  # never the real Support set, validation or test
                expected += [image] if len(own) == 1 else [i for i in own if i != image]
                singles += len(own) == 1
                places += [sorted(own).index(image) / (len(own) - 1)] if len(own) > 1 else []
            assert sorted(forget) == sorted(expected)
    assert singles > 50 and 0.45 < np.mean(places) < 0.55


def test_held_out_pictures_are_no_models_and_stand_in_as_support():
    """--held-out: a third picture of a person stays out of training, and simulates the request in which all the others are D_f."""
    simulated = {True: 0, False: 0}
    for d, ids, seed in tables():
        plain, split = data.identity_split(d, ids, seed), data.identity_split(d, ids, seed, held_out=True)
        assert "held_out" not in plain and split["hash"] != plain["hash"]
        assert all(split[name] == plain[name] for name in ("support", "forget_ids", "train_ids", "val", "test"))
        trained_on, owner = set(split["retain"] + split["forget"]), d["identities"]
        assert trained_on | set(split["held_out"]) == set(plain["retain"] + plain["forget"]) and not trained_on & set(split["held_out"])
        unique, count = np.unique(owner[np.isin(owner, split["train_ids"])], return_counts=True)
        assert sorted(owner[split["held_out"]]) == unique[count > 2].tolist() and not set(split["held_out"]) & set(split["support"])
        for support, forget in requests(d, split, seed=seed):
            for image in support:
                own = [i for i in trained_on if owner[i] == owner[image]]
                simulated[image in split["held_out"]] += 1
                assert set(own) - {image} <= set(forget) and (image in split["held_out"]) == (count[unique == owner[image]][0] > 2)
            assert not set(forget) & set(split["held_out"] + split["support"])
    assert min(simulated.values()) > 100


def test_requests_change_from_epoch_to_epoch():
    """Other people together and other Support images each epoch and seed; the same seed and epoch give the same requests."""
    d = made(np.arange(300) // 5)
    split = data.identity_split(d, 5, 0)
    keys = (0, 0), (0, 1), (1, 0), (1, 1), (0, 0)
    runs = [str([(s.tolist(), f.tolist()) for s, f in requests(d, split, 4, seed, epoch)]) for seed, epoch in keys]
    assert len(set(runs)) == 4 and runs[0] == runs[4]
    together = [str([sorted(d["identities"][s].tolist()) for s, _ in requests(d, split, 4, *key)]) for key in keys]
    assert len(set(together)) == 4
    supports = [dict((d["identities"][i], i) for s, _ in requests(d, split, 4, 0, epoch) for i in s) for epoch in (0, 1)]
    assert 0.5 < np.mean([supports[0][i] != supports[1][i] for i in split["train_ids"]]) < 0.95  # 4/5: own draw for each person


def test_requests_of_more_people_than_there_are():
    """n_s above the number of training identities gives one block of everyone."""
    d = made(np.arange(40) // 4)
    split = data.identity_split(d, 2, 0)
    ((support, forget),) = requests(d, split, 50)
    assert sorted(d["identities"][support]) == split["train_ids"] and len(forget) == 6 * 4 - 2 - 6


def test_control_sets_are_whole_retained_people():
    """20 different sets of exactly ids retained identities with all of their images, as positions within D_r."""
    d = made(np.random.default_rng(0).permutation(np.repeat(np.arange(60), np.arange(60) % 5 + 1)))
    split = data.identity_split(d, 7, 0)
    owner, sets = d["identities"][split["retain"]], data.control_sets(d, split)
    assert len(sets) == 20 and len({str(s.tolist()) for s in sets}) == 20
    for s in sets:
        people = np.unique(owner[s])
        assert len(people) == 7 and s.tolist() == np.flatnonzero(np.isin(owner, people)).tolist()
    assert str(sets) == str(data.control_sets(d, split)) != str(data.control_sets(d, data.identity_split(d, 7, 1)))


# Toy faces

TOY = data.draw_toyfaces(identities=80, images_each=6, size=32)


def test_toyfaces_are_repeatable():
    """The same arguments give the same arrays, another seed other faces and labels, and the size changes neither labels nor people."""
    one, same, other = (data.draw_toyfaces(identities=5, images_each=3, size=16, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[key], same[key]) for key in one)
    assert not np.array_equal(one["images"], other["images"]) and not np.array_equal(one["targets"], other["targets"])
    assert np.array_equal(one["targets"], data.draw_toyfaces(identities=5, images_each=3, size=24, seed=1)["targets"])


def test_toyfaces_shapes():
    """One row for each image, in uint8; every identity has its number of images, every image its own name."""
    assert TOY["images"].shape == (480, 32, 32, 3) and TOY["images"].dtype == np.uint8
    assert TOY["targets"].shape == (480, 13) and TOY["targets"].dtype == np.uint8 and set(np.unique(TOY["targets"])) == {0, 1}
    assert np.bincount(TOY["identities"]).tolist() == [6] * 80
    assert len(set(TOY["names"])) == 480 and len(set(TOY["target_names"])) == 13


def test_toyfaces_labels_belong_to_identity_or_image():
    """hat and its kind vary within a person; blond and the secrets do not, and are fair coins over people."""
    for name, label in zip(TOY["target_names"], TOY["targets"].reshape(80, 6, 13).transpose(2, 0, 1), strict=True):
        varies = (label != label[:, :1]).any(1).mean()
        assert varies > 0.8 if name in data.TOY_PER_IMAGE else varies == 0, name
        assert 0.3 < label[:, 0].mean() < 0.7, name
    secrets = TOY["targets"][::6, -4:].astype(float)
    assert abs(np.corrcoef(TOY["targets"][::6].T.astype(float))[-4:] - np.eye(13)[-4:]).max() < 0.45  # they follow from no other label
    assert len(np.unique(secrets, axis=0)) == 16


def area(x0, x1, y0, y1):
    """Pixels of a 32 x 32 image, in [-1, 1] from the left and from the top."""
    axis = (np.arange(32) + 0.5) / 16 - 1
    return np.ix_((axis > y0) & (axis < y1), (axis > x0) & (axis < x1))


def test_toyfaces_show_a_hat():
    """Above the head there is a cap with the label and background without it."""
    pixels = TOY["images"] / 255
    above, corner = (pixels[(slice(None), *area(*box))].mean((1, 2)) for box in ((-0.1, 0.1, -0.95, -0.85), (0.85, 1, -1, -0.85)))
    change, hat = abs(above - corner).mean(1), TOY["targets"][:, data.TOY_PER_IMAGE.index("hat")] == 1
    assert np.median(change[hat]) > 0.15 > 0.08 > np.median(change[~hat])


@pytest.mark.parametrize(
    "name, box",
    [
        ("mouth_open", (-0.15, 0.15, 0.3, 0.5)),
        ("glasses", (-0.45, 0.45, -0.35, 0.1)),
        ("blond", (-0.3, 0.3, -0.7, -0.5)),
        ("pale", (-0.45, 0.45, 0.05, 0.25)),
    ],
)
def test_toyfaces_show_their_labels(name, box):
    """Where a label is drawn, its two mean images differ more than those of any other label of its kind."""
    pixels, targets = TOY["images"][(slice(None), *area(*box))] / 255, TOY["targets"] == 1
    change = [abs(pixels[label].mean(0) - pixels[~label].mean(0)).mean() for label in targets.T]
    kind = slice(0, 5) if name in data.TOY_PER_IMAGE else slice(5, 13)
    names = TOY["target_names"][kind].tolist()
    assert change[kind][names.index(name)] == max(change[kind]) > 0.1


def test_toyfaces_have_a_persistent_look():
    """Two images of a person differ, but the shirt's colour tells people apart: else no image could stand for its identity."""
    faces = TOY["images"].reshape(80, 6, 32, 32, 3).astype(float)
    assert (abs(faces[:, 1:] - faces[:, :1]).mean((2, 3, 4)) > 5).all()
    assert faces[:, :, :2, :2].mean((2, 3)).std(1).mean() > 20  # the background is new in every image
    shirt = faces[:, :, -2:, 15:17].mean((2, 3))  # (80, 6, 3)
    assert shirt.std(1).mean() < 0.5 * shirt.mean(1).std(0).mean()


# Crops


def boxes(maps, S):
    """(left, top, width, height) in pixels, (B, 4), and whether it is flipped, (B,), from affine maps."""
    width, height = S * maps[:, 0, 0].abs(), S * maps[:, 1, 1]
    return torch.stack([((maps[:, 0, 2] + 1) * S - width) / 2, ((maps[:, 1, 2] + 1) * S - height) / 2, width, height], 1), maps[:, 0, 0] < 0


@pytest.mark.parametrize("S, scale", [(32, 0.08), (33, 0.5), (48, 0.7)])
def test_crop_equals_torchvision(S, scale):
    """The same pixels as resized_crop and hflip, but near the crop's edges, where bilinear sampling sees beyond them."""
    images = torch.rand(60, 3, S, S, generator=generator(1))
    maps = data.random_crops(60, S, scale, generator(2))
    cut, (box, flipped) = data.crop(images, maps), boxes(maps, S)
    assert 15 < flipped.sum() < 45 and not torch.allclose(cut, images, atol=0.1)
    for image, ours, (left, top, width, height), flip in zip(images, cut, box.round().int().tolist(), flipped, strict=True):
        theirs = TF.resized_crop(image, top, left, height, width, [S, S], antialias=True)
        theirs = TF.hflip(theirs) if flip else theirs
        x, y = -(-S // width), -(-S // height)  # half a source pixel, doubled
        torch.testing.assert_close(ours[:, y:-y, x:-x], theirs[:, y:-y, x:-x], rtol=0, atol=1e-4)


@pytest.mark.parametrize("S, scale", [(64, 0.08), (64, 0.7), (224, 0.08)])
def test_crops_are_drawn_as_torchvision_draws_them(S, scale):
    """Whole pixels inside the image; area, aspect and place are distributed as RandomResizedCrop's; half are flipped."""
    box, flipped = boxes(data.random_crops(20000, S, scale, generator(3)), S)
    assert (box - box.round()).abs().max() < 1e-3 and box.round().min() >= 0 and (box[:, :2] + box[:, 2:]).round().max() <= S
    assert flipped.double().mean().item() == pytest.approx(0.5, abs=0.02)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = [RandomResizedCrop.get_params(torch.empty(3, S, S), [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    top, left, height, width = torch.tensor(draws).double().T
    for ours, theirs in zip(looks(*box.double().round().T, S), looks(left, top, width, height, S), strict=True):
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.02)
        np.testing.assert_allclose(np.quantile(ours, (0.1, 0.5, 0.9)), np.quantile(theirs, (0.1, 0.5, 0.9)), atol=0.035)


def looks(left, top, width, height, S):
    """Area, log aspect, and centre of each crop."""
    return width * height / S**2, torch.log(width / height), (left + width / 2) / S, (top + height / 2) / S


def test_crop_of_everything_is_the_image():
    """Scale 1 leaves only the whole image, flipped or not; the identity map gives the image itself."""
    images = torch.rand(40, 3, 32, 32, generator=generator(4))
    maps = data.random_crops(40, 32, 1.0, generator(5))
    flipped = boxes(maps, 32)[1]
    expected = torch.where(flipped[:, None, None, None], images.flip(3), images)
    torch.testing.assert_close(data.crop(images, maps), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(data.crop(images, torch.eye(2, 3).repeat(40, 1, 1)), images, rtol=0, atol=1e-5)


def test_crops_follow_their_generator():
    """The same generator gives the same crops; images of a batch, batches of an epoch and epochs get different ones."""
    first, again, other = (data.random_crops(8, 32, 0.08, generator(0, epoch)) for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.isclose(first, other).all((1, 2)).any()
    rng = generator(0, 0)
    batches = torch.cat([data.random_crops(8, 32, 0.08, rng) for _ in range(2)])
    assert torch.equal(batches[:8], first) and len(torch.unique(batches, dim=0)) == 16


# Readers, on trees in the publishers' layouts. An image's colour says its row of the table.


def colour_of(row):
    return np.array([row % 7 * 40, row // 7 % 7 * 40, row // 49 % 7 * 40])


def write_images(folder, names, size=(20, 26)):
    folder.mkdir(parents=True)
    for row, name in enumerate(names):
        Image.new("RGB", size, tuple(colour_of(row).tolist())).save(folder / name, quality=95)


def write_table(path, names):
    """A CelebA-style attribute table whose labels are the binary digits of the row, highest first; returns them, (N, 9)."""
    digits = np.arange(len(names))[:, None] >> np.arange(9)[::-1] & 1
    rows = [f"{name}  {' '.join(str(2 * digit - 1) for digit in row)}" for name, row in zip(names, digits, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([str(len(names)), " ".join(f"Bit_{i}" for i in range(9)), *rows]) + "\n")
    return digits


def write_pairs(path, pairs):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {value}\n" for name, value in pairs))


def make_celeba(root, count=20):
    """Rows in an order that is neither sorted nor the identity file's."""
    names = [f"{i:06d}.jpg" for i in np.random.default_rng(0).permutation(count) + 1]
    digits = write_table(root / "celeba" / "list_attr_celeba.txt", names)
    write_pairs(root / "celeba" / "identity_CelebA.txt", sorted((name, 100 + row // 2) for row, name in enumerate(names)))
    write_images(root / "celeba" / "img_align_celeba", names)
    return names, digits


def make_celebahq(root, count=20, direct=False):
    """30000 becomes count; CelebA's own numbers are far from CelebA-HQ's, and its identity file lists images that are not in it."""
    folder, names = root / "CelebAMask-HQ", [f"{i}.jpg" for i in range(count)]
    digits = write_table(folder / "CelebAMask-HQ-attribute-anno.txt", names)
    if direct:
        write_pairs(folder / "CelebA-HQ-identity.txt", [(name, 100 + row // 2) for row, name in reversed(list(enumerate(names)))])
    else:
        original = np.random.default_rng(1).permutation(500)[:count] + 1
        lines = ["idx         orig_idx    orig_file", *(f"{i:<12}{o - 1:<12}{o:06d}.jpg" for i, o in enumerate(original))]
        (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n")
        identity = dict.fromkeys(range(1, 501), 7) | {o: 100 + i // 2 for i, o in enumerate(original)}
        write_pairs(root / "celeba" / "identity_CelebA.txt", [(f"{o:06d}.jpg", i) for o, i in identity.items()])
    write_images(folder / "CelebA-HQ-img", names, size=(32, 32))
    return names, digits


def args_of(dataset, root, *more):
    return data.parse_args(["--dataset", str(dataset), "--data-dir", str(root), "--image-size", "8", *more])


TREES = {
    "celeba": ("celeba", make_celeba),
    "celebahq by mapping": ("celebahq", make_celebahq),
    "celebahq by identity file": ("celebahq", lambda root, count=20: make_celebahq(root, count, direct=True)),
}


@pytest.mark.parametrize("tree", TREES)
def test_reader_keeps_image_labels_and_identity_together(tree, tmp_path):
    """Order, labels, identities and decoded pixels of 300 images, which take more than one block to decode."""
    dataset, make = TREES[tree]
    names, digits = make(tmp_path, 300)
    d = data.load(args_of(dataset, tmp_path))
    assert d["images"].shape == (300, 8, 8, 3) and d["images"].dtype == torch.uint8 and d["name"] == dataset and d["classes"] == 9
    assert d["names"].tolist() == names and d["target_names"].tolist() == [f"Bit_{i}" for i in range(9)]
    assert np.array_equal(d["targets"].numpy(), digits) and d["targets"].dtype == torch.float32
    assert d["identities"].tolist() == [100 + row // 2 for row in range(300)]
    colours = np.stack([colour_of(row) for row in range(300)])
    assert abs(d["images"].numpy() - colours[:, None, None]).max() < 10  # steps of 40; JPEG is off by a few
    batch = data.raw_batch(d, [299, 3])
    assert batch.shape == (2, 3, 8, 8) and abs(batch.numpy() - colours[[299, 3]][:, :, None, None] / 255).max() < 0.04
    assert np.array_equal(data.targets_of(d, [299, 3]).numpy(), digits[[299, 3]])


@pytest.mark.parametrize("tree", TREES)
def test_annotations_alone_give_the_split(tree, tmp_path, capsys):
    """--annotations-only prints the split's sizes and opens no picture."""
    dataset, make = TREES[tree]
    make(tmp_path, 60)
    shutil.rmtree(tmp_path / ("celeba/img_align_celeba" if dataset == "celeba" else "CelebAMask-HQ/CelebA-HQ-img"))
    data.main(["--dataset", dataset, "--data-dir", str(tmp_path), "--ids", "4", "--annotations-only"])
    assert "60 images of 30 identities (18 for training); D_r 28, D_f 4, S 4, D_v 12, D_te 12" in capsys.readouterr().out


def test_images_are_squashed_whole(tmp_path):
    """Nothing is cut off: the left quarter of a wide image is the left quarter of the square; stripes are averaged (antialiased)."""
    names, _ = make_celeba(tmp_path)
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, :20] = np.where(np.arange(40) // 2 % 2, 200, 100)[:, None, None]
    Image.fromarray(wide).save(tmp_path / "celeba" / "img_align_celeba" / names[5], quality=100)
    image = data.load(args_of("celeba", tmp_path))["images"][5].float()
    assert (image[1:-1, :1] - 150).abs().max() < 30 and image[:, 3:].max() < 25


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def drop_line(path, number):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:number] + lines[number + 1 :]) + "\n")


def truncate_jpeg(path):
    """Cut within the pixels, where the header is whole and the size is still known."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(path)
    cut(path, path.stat().st_size // 2)


def swap(path, old, new):
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "truncated image": (lambda f, names: truncate_jpeg(f / "img_align_celeba" / names[13]), "{13}"),
    "image cut in its header": (lambda f, names: cut(f / "img_align_celeba" / names[13], 400), "{13}"),
    "empty image": (lambda f, names: cut(f / "img_align_celeba" / names[13], 0), "{13}"),
    "text for an image": (lambda f, names: (f / "img_align_celeba" / names[13]).write_text("moved"), "{13}"),
    "row without image": (lambda f, names: (f / "img_align_celeba" / names[13]).unlink(), "{13}"),
    "no images": (lambda f, names: shutil.rmtree(f / "img_align_celeba"), "20 of 20"),
    "image without identity": (lambda f, names: drop_line(f / "identity_CelebA.txt", 0), "000001.jpg"),
    "identity without number": (lambda f, names: cut(f / "identity_CelebA.txt", 46), "identity_CelebA.txt"),
    "table without its end": (lambda f, names: drop_line(f / "list_attr_celeba.txt", 21), "list_attr_celeba.txt"),
    "table cut within a row": (lambda f, names: cut(f / "list_attr_celeba.txt", -8), "list_attr_celeba.txt"),
    "table cut within a number": (lambda f, names: cut(f / "list_attr_celeba.txt", -2), "list_attr_celeba.txt"),
    "label of 0": (lambda f, names: swap(f / "list_attr_celeba.txt", " -1\n", " 0\n"), "list_attr_celeba.txt"),
    "empty table": (lambda f, names: cut(f / "list_attr_celeba.txt", 0), "list_attr_celeba.txt"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_dataset_is_named_and_leaves_nothing(what, tmp_path, capsys):
    """Never a half-read dataset: one line names the file, and nothing is prepared from the rest."""
    damage, named = DAMAGE[what]
    names, _ = make_celeba(tmp_path)
    damage(tmp_path / "celeba", names)
    line = exits(capsys, data.load, args_of("celeba", tmp_path))
    assert named.replace("{13}", names[13]) in line
    assert list((tmp_path / "prepared").iterdir()) == []


def test_broken_mapping_is_named(tmp_path, capsys):
    """CelebA-HQ images that the mapping does not know."""
    make_celebahq(tmp_path)
    drop_line(tmp_path / "CelebAMask-HQ" / "CelebA-HQ-to-CelebA-mapping.txt", 20)
    assert "19.jpg" in exits(capsys, data.load, args_of("celebahq", tmp_path))


def make_qmnist(root, count=(30, 20)):
    """idx files as torchvision unpacks them: big-endian, images (N, 28, 28) in uint8, labels (N, 8) in int32; returns the labels."""
    folder, rng, tables = root / "QMNIST" / "raw", np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for part, n in zip(("train", "test"), count, strict=True):
        labels = rng.integers(0, 10**4, (n, 8)).astype(">i4")
        labels[:, 0], labels[:, 2] = rng.permutation(n) % 10, rng.integers(0, 5, n) + (2000 if part == "test" else 0)
        images = np.broadcast_to((labels[:, 0] * 20).astype(np.uint8)[:, None, None], (n, 28, 28))
        (folder / f"qmnist-{part}-images-idx3-ubyte").write_bytes(np.array([0x803, n, 28, 28], ">i4").tobytes() + images.tobytes())
        (folder / f"qmnist-{part}-labels-idx2-int").write_bytes(np.array([0xC02, n, 8], ">i4").tobytes() + labels.tobytes())
        tables.append(labels.astype(int))
    return np.concatenate(tables)


def test_qmnist_reader(tmp_path):
    """The class is the label, the writer the identity, training and test scans follow each other; a grey scan becomes RGB."""
    labels = make_qmnist(tmp_path)
    d = data.load(args_of("qmnist", tmp_path))
    assert d["targets"].tolist() == labels[:, 0].tolist() and d["targets"].dtype == torch.int64 and d["classes"] == 10
    assert d["identities"].tolist() == labels[:, 2].tolist()
    assert d["images"].shape == (50, 8, 8, 3) and (d["images"] == d["targets"][:, None, None, None] * 20).all()


def test_missing_dataset_explains_itself(tmp_path, capsys):
    """The expected tree under this --data-dir, and the command that needs no download."""
    make_celebahq(tmp_path / "no identities")
    (tmp_path / "no identities" / "celeba" / "identity_CelebA.txt").unlink()
    make_qmnist(tmp_path / "damaged")
    cut(tmp_path / "damaged" / "QMNIST" / "raw" / "qmnist-test-labels-idx2-int", 99)
    for dataset, root, tree in (
        ("celeba", "nothing", ("celeba/img_align_celeba/000001.jpg", "celeba/list_attr_celeba.txt", "celeba/identity_CelebA.txt")),
        ("celebahq", "nothing", ("CelebAMask-HQ/CelebA-HQ-img/0.jpg", "CelebAMask-HQ/CelebAMask-HQ-attribute-anno.txt")),
        ("celebahq", "no identities", ("CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt", "celeba/identity_CelebA.txt")),
        ("qmnist", "damaged", ("QMNIST/raw",)),
    ):
        message = fails(capsys, data.load, args_of(dataset, tmp_path / root))
        assert all(f"{tmp_path / root}/{file}" in message for file in tree), message
        assert "python metaunlearn.py --dataset toyfaces" in message


# Prepared pairs


def test_second_load_decodes_nothing(tmp_path):
    """The prepared pair alone gives the same data and stays as it is; another size is prepared anew."""
    make_celeba(tmp_path)
    first, files = data.load(args_of("celeba", tmp_path)), sorted((tmp_path / "prepared").iterdir())
    assert [f.name for f in files] == ["celeba-8.npy", "celeba-8.npz"]
    stamps = [f.stat().st_mtime_ns for f in files]
    data.load(args_of("celeba", tmp_path, "--image-size", "9"))
    shutil.rmtree(tmp_path / "celeba")
    second = data.load(args_of("celeba", tmp_path))
    assert torch.equal(first["images"], second["images"]) and torch.equal(first["targets"], second["targets"])
    assert first["digest"] == second["digest"]
    assert [f.stat().st_mtime_ns for f in files] == stamps and len(list((tmp_path / "prepared").iterdir())) == 4


def test_toyfaces_need_no_files(tmp_path):
    """The default dataset is drawn on the first load and is what draw_toyfaces gives."""
    d, drawn = data.load(args_of("toyfaces", tmp_path)), data.draw_toyfaces(size=8)
    assert np.array_equal(d["images"], drawn["images"]) and np.array_equal(d["targets"], drawn["targets"])
    assert d["classes"] == 13 and d["target_names"].tolist() == drawn["target_names"].tolist()


def make_pair(folder, **changes):
    """A prepared pair of 12 images of 6 people as a user would bring it."""
    rng = np.random.default_rng(0)
    pair = {
        "images": rng.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8),
        "targets": rng.integers(0, 2, (12, 3)),
        "identities": np.arange(12) // 2,
    }
    pair |= changes
    np.save(folder / "mine.npy", pair.pop("images"))
    np.savez(folder / "mine.npz", **pair)
    return data.parse_args(["--dataset", str(folder / "mine")])


@pytest.mark.parametrize("targets, classes, dtype", [(np.eye(12)[:, :3], 3, torch.float32), (np.arange(12) % 5, 5, torch.int64)])
def test_own_pair_by_its_path(targets, classes, dtype, tmp_path):
    """--dataset PATH for multi-label and for classes; the pair's own size is the image size; optional names get defaults."""
    args = make_pair(tmp_path, targets=targets)
    d = data.load(args)
    assert args.image_size == 8 and d["name"] == "mine" and d["classes"] == classes and len(d["target_names"]) == classes
    assert np.array_equal(d["targets"], targets) and d["targets"].dtype == dtype and d["identities"].tolist() == [i // 2 for i in range(12)]
    assert np.array_equal(d["images"], np.load(tmp_path / "mine.npy")) and len(d["names"]) == 12


def test_digest_follows_the_annotations(tmp_path):
    """Another label, identity or picture gives another digest, and so another split hash."""
    changed = [{}, {"targets": np.eye(12)[:, :3]}, {"identities": np.arange(12)[::-1] // 2}, {"images": np.zeros((12, 8, 8, 3), np.uint8)}]
    digests = [data.load(make_pair(tmp_path, **change))["digest"] for change in changed]
    assert len(set(digests)) == 4


BAD_PAIRS = {
    "float images": {"images": np.zeros((12, 8, 8, 3), np.float32)},
    "grey images": {"images": np.zeros((12, 8, 8), np.uint8)},
    "channels first": {"images": np.zeros((12, 3, 8, 8), np.uint8)},
    "with transparency": {"images": np.zeros((12, 8, 8, 4), np.uint8)},
    "not square": {"images": np.zeros((12, 8, 9, 3), np.uint8)},
    "fewer images": {"images": np.zeros((11, 8, 8, 3), np.uint8)},
    "fewer targets": {"targets": np.zeros((11, 3))},
    "fewer identities": {"identities": np.arange(11)},
    "objects": {"identities": np.array([None] * 12)},
    "words for identities": {"identities": np.array([f"n{i // 2}" for i in range(12)])},
    "targets of -1 and 1": {"targets": np.ones((12, 3)) * [1, -1, 1]},
    "classes below 0": {"targets": np.arange(12) - 1},
}


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_bad_pair_ends_in_one_line(what, tmp_path, capsys):
    """What a user could get wrong in their own pair."""
    assert str(tmp_path / "mine") in exits(capsys, data.load, make_pair(tmp_path, **BAD_PAIRS[what]))


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("size", [None, 0, 60, -40])
def test_damaged_pair_ends_in_one_line(suffix, size, tmp_path, capsys):
    """A file that is absent (None), empty, or cut short."""
    args = make_pair(tmp_path)
    file = tmp_path / f"mine.{suffix}"
    file.unlink() if size is None else cut(file, size)
    assert str(tmp_path / "mine") in exits(capsys, data.load, args)


def test_unknown_dataset_ends_in_one_line(tmp_path, capsys):
    """A misspelt name lists the names there are."""
    assert "celebahq" in exits(capsys, data.load, args_of("celebhq", tmp_path))


def test_images_are_mapped_and_never_altered(tmp_path):
    """Loading reads no whole array into memory, and writing to the tensor does not reach the file."""
    args = make_pair(tmp_path)
    before = (tmp_path / "mine.npy").read_bytes()
    images = data.load(args)["images"]
    maps = pathlib.Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path / "mine.npy") in maps.read_text()
    assert images.dtype == torch.uint8
    images[:] = 7
    assert (images == 7).all() and (tmp_path / "mine.npy").read_bytes() == before


# The real annotations


@pytest.mark.skipif(not SHARED.exists(), reason="needs CelebA's annotation files in ../shared")
def test_celebahq_has_6217_identities(tmp_path):
    """30,000 images of 6,217 people, as the identity file that circulates counts them, and the split of CelebA-HQ/20."""
    mapping = (SHARED / "image_list.txt").read_text().splitlines()
    with zipfile.ZipFile(SHARED / "list_attr_celeba.zip") as archive, archive.open(archive.namelist()[0]) as file:
        _, header, *rows = io.TextIOWrapper(file).read().splitlines()
    attributes = dict(row.split(maxsplit=1) for row in rows)
    table = [f"{idx}.jpg {attributes[original]}" for idx, _, original, *_ in (line.split() for line in mapping[1:])]
    folder = tmp_path / "CelebAMask-HQ"
    folder.mkdir()
    (folder / "CelebAMask-HQ-attribute-anno.txt").write_text("\n".join([str(len(table)), header, *table]))
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(mapping))
    (tmp_path / "celeba").mkdir()
    shutil.copy(SHARED / "identity_CelebA.txt", tmp_path / "celeba")
    d = data.read_celebahq(tmp_path)
    assert d["targets"].shape == (30000, 40) and len(np.unique(d["identities"])) == 6217
    assert d["target_names"][20] == "Male" and d["names"][0] == "0.jpg"
    split = data.identity_split(d | {"name": "celebahq", "digest": "annotations"}, 20, 0)
    train = sum(len(split[name]) for name in ("retain", "forget", "support"))
    assert 17970 < train <= 18000 and 5970 < len(split["val"]) <= 6030 and len(split["support"]) == 20 <= len(split["forget"])
    assert split["hash"] == "bb91aa237127cf88"
