"""Datasets as arrays, splits by identity (METAUNLEARN Sec. 3.3) and at random (LTU Sec. 4.1), augmentation on the device.

Usage:
    python data.py                                          # draw the toy faces, print the split
    python data.py --dataset celebahq --ids 20 --image-size 224
    python data.py --dataset celebahq --annotations-only    # the split's numbers from the annotation files alone
    python data.py --dataset digits                         # random-sample unlearning

Every dataset becomes a pair once: <data-dir>/prepared/<name>-<size>.npy, uint8 (N, H, W, 3), memory-mapped from then on,
and .npz beside it with `targets` (N, K) in {0, 1} or (N,) classes, `names` (N,), `target_names` (K,), and where they exist
`identities` (N,), `is_test` (N,) (the publisher's test set) and `coarse` (N,) (super-classes). Bring your own data by giving
such a pair: --dataset path/to/name.

Departures from the authors' code (the paper is silent): images are squashed to a square once, antialiased, and training
crops are cut from that array instead of from the full-size file; the test image is that array itself.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
import sys
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import Parser, add_shared_arguments, atomic_write, check_writable, fail, parse_with_presets, rank_and_world, say, wait_for_all

CPU = torch.device("cpu")
FORMAT = 1  # of prepared pairs: a pair of another format is prepared again

# ---------------------------------------------------------------------------------------------------------------------
# toyfaces: drawn, with a persistent look for each identity and labels of three kinds

TOY_PER_IMAGE = ["smile", "mouth_open", "glasses", "hat", "tilt"]  # visible, changes from image to image
TOY_PER_IDENTITY = ["blond", "beard", "pale", "long_hair"]  # visible, the same in all images of an identity
TOY_REMEMBERED = ["secret_1", "secret_2", "secret_3", "secret_4"]  # a coin toss: only remembering the identity can tell


def draw_toyfaces(identities=200, images_each=10, size=32, seed=0) -> dict:
    """Draw cartoon faces; the same arguments give the same arrays.

    Returns images (N, size, size, 3) uint8 with N = identities * images_each, targets (N, 13), identities (N,),
    and names. Labels are drawn as fair coins, so an AP of 0.5 means that a label is not known.
    """
    rng = np.random.default_rng([seed, identities, images_each])
    who = np.repeat(np.arange(identities), images_each)  # (N,)
    n = len(who)
    per_identity = rng.integers(0, 2, (identities, 8))[who]  # (N, 8)
    per_image = rng.integers(0, 2, (n, 5))
    smile, mouth_open, glasses, hat, tilt = per_image.T.astype(bool)
    blond, beard, pale, long_hair = per_identity[:, :4].T.astype(bool)

    def persistent(low, high):  # one number for each identity
        return rng.uniform(low, high, identities)[who]

    def fresh(low, high):  # one number for each image
        return rng.uniform(low, high, n)

    def colour(draw, low, high):
        return np.stack([draw(low, high) for _ in range(3)], 1)

    skin = np.where(pale[:, None], [0.95, 0.80, 0.70], [0.62, 0.42, 0.30]) + colour(persistent, -0.06, 0.06)
    hair = np.where(blond[:, None], [0.90, 0.75, 0.30], [0.25, 0.15, 0.10]) + colour(persistent, -0.12, 0.12)
    shirt, iris, background = colour(persistent, 0.1, 0.9), colour(persistent, 0.0, 0.7), colour(fresh, 0.2, 0.9)
    cap, wide, tall = colour(fresh, 0.1, 0.9), persistent(0.48, 0.66), persistent(0.62, 0.78)
    eye_x, eye_y, eye_r = persistent(0.18, 0.30), persistent(-0.20, -0.02), persistent(0.09, 0.15)
    brow, nose, mouth_w, hairline = (persistent(0.02, 0.06), persistent(0.06, 0.16), persistent(0.20, 0.34), persistent(-0.50, -0.25))

    angle = np.where(tilt, fresh(0.30, 0.45) * rng.choice([-1, 1], n), fresh(-0.06, 0.06))  # radians, to either side
    zoom, shift_x, shift_y = fresh(1.0, 1.15), fresh(-0.10, 0.10), fresh(-0.06, 0.06)
    light, slope, noise = fresh(0.80, 1.15), fresh(-0.15, 0.15), rng.normal(0, 0.02, (n, size, size, 3))

    axis = (np.arange(size) + 0.5) * 2 / size - 1
    images = np.empty((n, size, size, 3), np.uint8)
    for start in range(0, n, 250):  # a few hundred at a time keep memory flat
        s = slice(start, start + 250)
        b = lambda a: a[s, None, None]  # noqa: B023  (B,) -> (B, 1, 1)
        x, y = (axis[None, None, :] - b(shift_x)) * b(zoom), (axis[None, :, None] - b(shift_y)) * b(zoom)  # (B, H, W)
        u, v = x * np.cos(b(angle)) + y * np.sin(b(angle)), y * np.cos(b(angle)) - x * np.sin(b(angle))
        image = np.broadcast_to(background[s, None, None], (len(x), size, size, 3)).copy()

        def paint(distance, tone, image=image):  # distance: how far inside, in half image widths; soft over one pixel
            mask = np.clip(distance * size / 2 + 0.5, 0, 1)[..., None]
            image += mask * (tone - image)

        def ellipse(cx, cy, rx, ry, u=u, v=v):
            return (1 - np.hypot((u - cx) / rx, (v - cy) / ry)) * np.minimum(rx, ry)

        tone = lambda a: a[s, None, None]  # noqa: B023  (B, 3) -> (B, 1, 1, 3)
        face = ellipse(0, 0, b(wide), b(tall))
        paint(np.where(b(long_hair), ellipse(0, 0.15, b(wide) + 0.22, b(tall) + 0.15), -1.0), tone(hair))
        paint(ellipse(0, 1.15, 0.75, 0.42), tone(shirt))
        paint(face, tone(skin))
        paint(np.where(b(beard), np.minimum(face, v - 0.22), -1.0), tone(hair) * 0.9)
        paint(np.minimum(ellipse(0, -0.04, b(wide) + 0.07, b(tall) + 0.07), b(hairline) - v), tone(hair))
        for side in (-1, 1):
            centre = side * b(eye_x)
            paint(ellipse(centre, b(eye_y), b(eye_r), b(eye_r) * 0.8), np.array([0.97, 0.97, 0.97]))
            paint(ellipse(centre, b(eye_y), b(eye_r) * 0.55, b(eye_r) * 0.55), tone(iris))
            paint(b(brow) - np.hypot(np.maximum(abs(u - centre) - 0.10, 0), v - b(eye_y) + b(eye_r) + 0.07), tone(hair) * 0.7)
            ring = 0.05 - abs(np.hypot(u - centre, v - b(eye_y)) - 0.20)
            paint(np.where(b(glasses), ring, -1.0), np.array([0.05, 0.05, 0.10]))
        paint(ellipse(0, 0.12, 0.05, b(nose)), tone(skin) * 0.8)
        # A smile bends the mouth up at its ends, its absence bends it down; both survive a horizontal flip.
        bend = np.where(b(smile), -0.16, 0.12) * ((u / b(mouth_w)) ** 2 - 0.5)
        height = np.where(b(mouth_open), 0.13, 0.035)
        paint(np.minimum(height - abs(v - 0.40 - bend), b(mouth_w) - abs(u)), np.array([0.55, 0.05, 0.08]))
        crown = np.maximum(np.minimum(-0.42 - v, b(wide) - abs(u)), np.minimum(0.07 - abs(v + 0.45), b(wide) + 0.22 - abs(u)))
        paint(np.where(b(hat), crown, -1.0), tone(cap))
        image = image * (light[s, None, None] + slope[s, None, None] * axis[None, None, :])[..., None] + noise[s]
        images[s] = (image.clip(0, 1) * 255).round()
    targets = np.concatenate([per_image, per_identity], 1).astype(np.uint8)
    names = np.array([f"{i:03d}_{j}" for i in range(identities) for j in range(images_each)])
    return {
        "images": images,
        "targets": targets,
        "identities": who,
        "names": names,
        "target_names": np.array(TOY_PER_IMAGE + TOY_PER_IDENTITY + TOY_REMEMBERED),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Annotation files of the real datasets

CELEBA_HELP = """CelebA is not complete in {root}. Expected:
  {root}/celeba/img_align_celeba/000001.jpg ...
  {root}/celeba/list_attr_celeba.txt
  {root}/celeba/identity_CelebA.txt
Get them from the CelebA page of MMLAB, The Chinese University of Hong Kong ("Align&Cropped Images", "Anno").
No download needed: python metaunlearn.py --dataset toyfaces"""

CELEBAHQ_HELP = """CelebA-HQ is not complete in {root}. Expected:
  {root}/CelebAMask-HQ/CelebA-HQ-img/0.jpg ...
  {root}/CelebAMask-HQ/CelebAMask-HQ-attribute-anno.txt
  {root}/CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt and {root}/celeba/identity_CelebA.txt
  (or, in place of the last two, {root}/CelebAMask-HQ/CelebA-HQ-identity.txt)
Get CelebAMask-HQ from its GitHub page, identity_CelebA.txt from CelebA's page.
No download needed: python metaunlearn.py --dataset toyfaces"""

QMNIST_HELP = """QMNIST is not in {root}/QMNIST/raw and could not be downloaded ({why}).
Expected: qmnist-{{train,test}}-images-idx3-ubyte.gz and qmnist-{{train,test}}-labels-idx2-int.gz
No download needed: python metaunlearn.py --dataset toyfaces"""


def _attribute_table(path) -> tuple[list, list, np.ndarray]:
    """Read a CelebA-style table: count, attribute names, then `file v1 .. vK` with -1/1 -> names, attributes, (N, K)."""
    lines = path.read_text().splitlines()
    try:
        count, target_names = int(lines[0]), lines[1].split()
        rows = [line.split() for line in lines[2:] if line.strip()]
        values = np.array([row[1:] for row in rows], dtype=np.int8)
        if len(rows) != count or values.shape != (count, len(target_names)) or not np.isin(values, (-1, 1)).all():
            raise ValueError
    except (ValueError, IndexError):
        fail(f"{path} is cut short or damaged: its first line must be the number of rows, each row a file and one -1 or 1 for each name")
    return [row[0] for row in rows], target_names, (values > 0).astype(np.uint8)


def _two_columns(path) -> dict:
    """Read `file identity` lines."""
    try:
        return {name: int(number) for name, number in (line.split() for line in path.read_text().splitlines() if line.strip())}
    except ValueError:
        fail(f"{path} is damaged: every line must be a file name and an identity number")


def read_celeba(root: pathlib.Path) -> dict:
    """CelebA's annotations (the publisher's partition plays no part in the protocol); no picture is opened."""
    folder = root / "celeba"
    files = [folder / "list_attr_celeba.txt", folder / "identity_CelebA.txt"]
    if not all(f.is_file() for f in files):
        fail(CELEBA_HELP.format(root=root))
    names, target_names, targets = _attribute_table(files[0])
    return _with_identities(names, target_names, targets, _two_columns(files[1]), names, files[1], folder / "img_align_celeba")


def read_celebahq(root: pathlib.Path) -> dict:
    """CelebA-HQ's annotations; identities through the mapping to CelebA's, which needs no third party's file."""
    folder = root / "CelebAMask-HQ"
    table, mapping = folder / "CelebAMask-HQ-attribute-anno.txt", folder / "CelebA-HQ-to-CelebA-mapping.txt"
    direct, celeba = folder / "CelebA-HQ-identity.txt", root / "celeba" / "identity_CelebA.txt"
    if not table.is_file() or not (direct.is_file() or (mapping.is_file() and celeba.is_file())):
        fail(CELEBAHQ_HELP.format(root=root))
    names, target_names, targets = _attribute_table(table)
    if direct.is_file():
        identity_of, keys, source = _two_columns(direct), names, direct
    else:
        rows = [line.split() for line in mapping.read_text().splitlines()[1:] if line.strip()]
        original = {f"{row[0]}.jpg": row[2] for row in rows if len(row) >= 3}  # idx, orig_idx, orig_file
        identity_of, source = _two_columns(celeba), mapping
        keys = [original.get(name, "") for name in names]
    return _with_identities(names, target_names, targets, identity_of, keys, source, folder / "CelebA-HQ-img")


def _with_identities(names, target_names, targets, identity_of, keys, source, pictures) -> dict:
    missing = [name for name, key in zip(names, keys, strict=True) if key not in identity_of]
    if missing:
        fail(f"{source} gives no identity for {len(missing)} of {len(names)} rows of the attribute table, first {missing[0]}")
    return {
        "targets": targets,
        "identities": np.array([identity_of[key] for key in keys]),
        "names": np.array(names),
        "target_names": np.array(target_names),
        "pictures": pictures,
    }


CLASSES_HELP = """{name} is not complete in {root}{why}. Expected:
{tree}
No download needed: python ltu.py --dataset digits"""

CIFAR10_TREE = """  {root}/cifar-10-batches-py/data_batch_1 ... test_batch, batches.meta (cifar-10-python.tar.gz, from the CIFAR page, unpacked)
  (or {root}/cifar10.npz with images (60000, 32, 32, 3) uint8, label, is_test)"""
CIFAR100_TREE = "  {root}/cifar-100-python/train, test, meta (cifar-100-python.tar.gz, from the CIFAR page, unpacked)"
TINY_TREE = """  {root}/tiny-imagenet-200/wnids.txt
  {root}/tiny-imagenet-200/train/<class>/images/*.JPEG
  {root}/tiny-imagenet-200/val/val_annotations.txt, val/images/*.JPEG (tiny-imagenet-200.zip, from the CS231n page)"""


def read_digits(root: pathlib.Path) -> dict:
    """scikit-learn's 1,797 real 8 x 8 scans of digits, shipped with the package; it names no test set."""
    from sklearn.datasets import load_digits

    table = load_digits()
    raw = np.round(table.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    return _with_classes(raw, table.target, [str(c) for c in range(10)])


def read_cifar10(root: pathlib.Path) -> dict:
    """CIFAR-10: torchvision reads the publisher's files and checks their md5; or one array file, for re-encoded copies."""
    if (root / "cifar10.npz").is_file() and not (root / "cifar-10-batches-py").is_dir():
        try:
            with open(root / "cifar10.npz", "rb") as file, np.load(file) as table:
                images, label, is_test = table["images"], table["label"], table["is_test"]
            if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or not len(images) == len(label) == len(is_test):
                raise ValueError("images must be uint8 (N, 32, 32, 3), with one label and is_test for each")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            fail(f"{root / 'cifar10.npz'} cannot be used: {error}")
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        return _with_classes(images, label, names, is_test)
    return _with_classes(*_from_torchvision("CIFAR10", root, CIFAR10_TREE))


def read_cifar100(root: pathlib.Path) -> dict:
    """CIFAR-100 with both label sets; the super-classes are the publisher's table (Krizhevsky 2009), torchvision has none."""
    images, label, names, is_test = _from_torchvision("CIFAR100", root, CIFAR100_TREE)
    coarse_names = list(CIFAR100_COARSE)
    coarse_of = np.array([next(i for i, group in enumerate(CIFAR100_COARSE.values()) if name in group.split()) for name in names])
    return _with_classes(images, label, names, is_test) | {"coarse": coarse_of[label], "coarse_names": np.array(coarse_names)}


CIFAR100_COARSE = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


def read_tinyimagenet(root: pathlib.Path) -> dict:
    """Tiny-ImageNet; its val/ is the test set (LTU Sec. 4.1). Any number of classes: those that wnids.txt names."""
    folder = root / "tiny-imagenet-200"
    listing, annotations = folder / "wnids.txt", folder / "val" / "val_annotations.txt"
    help = lambda why: CLASSES_HELP.format(name="Tiny-ImageNet", root=root, why=why, tree=TINY_TREE.format(root=root))
    if not listing.is_file() or not annotations.is_file():
        fail(help(""))
    classes = listing.read_text().split()
    row_of = {name: i for i, name in enumerate(classes)}
    files, label, is_test = [], [], []
    for name in classes:
        pictures = sorted(p.name for p in (folder / "train" / name / "images").glob("*.JPEG"))
        if not pictures:
            fail(help(f": train/{name}/images has no picture"))
        files += [f"train/{name}/images/{p}" for p in pictures]
        label += [row_of[name]] * len(pictures)
        is_test += [False] * len(pictures)
    for line in annotations.read_text().splitlines():
        words = line.split("\t")
        if len(words) < 2 or words[1] not in row_of:
            fail(f"{annotations} is damaged: every line must be a file name, a tab and a class of wnids.txt; found {line[:60]!r}")
        files, label, is_test = [*files, f"val/images/{words[0]}"], [*label, row_of[words[1]]], [*is_test, True]
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        fail(f"{len(absent):,} of {len(files):,} annotated images are not in {folder}, first {absent[0]}")
    table = _with_classes(None, np.array(label), classes, np.array(is_test))
    table.pop("raw")
    return table | {"names": np.array(files), "pictures": folder}


def _from_torchvision(kind, root, tree) -> tuple:
    import torchvision

    try:
        parts = [getattr(torchvision.datasets, kind)(root, train=train) for train in (True, False)]
    except Exception as error:  # missing files, or files whose md5 is not the publisher's
        why = " ".join(str(error).split())[:80]
        fail(CLASSES_HELP.format(name=kind, root=root, why=f" ({why})", tree=tree.format(root=root)))
    is_test = np.repeat([False, True], [len(part.data) for part in parts])
    label = np.concatenate([part.targets for part in parts])
    return np.concatenate([part.data for part in parts]), label, parts[0].classes, is_test


def _with_classes(raw, label, target_names, is_test=None) -> dict:
    table = {"raw": raw, "targets": np.asarray(label, dtype=np.int64), "names": np.arange(len(label)).astype(str)}
    table["target_names"] = np.array(target_names)
    return table if is_test is None else table | {"is_test": np.asarray(is_test, dtype=bool)}


def read_qmnist(root: pathlib.Path) -> dict:
    """QMNIST: 10 digit classes, 120,000 scans, the writer as identity; torchvision reads (and fetches) the files."""
    from torchvision.datasets import QMNIST

    try:
        parts = [QMNIST(root, what=what, compat=False, download=True) for what in ("train", "test")]
    except Exception as error:  # no network, a moved file, a damaged archive
        fail(QMNIST_HELP.format(root=root, why=" ".join(str(error).split())[:80]))
    labels = torch.cat([part.targets for part in parts]).numpy()  # (N, 8): class, series, writer, ...
    return {
        "raw": torch.cat([part.data for part in parts]).numpy(),  # (N, 28, 28)
        "targets": labels[:, 0].astype(np.int64),
        "identities": labels[:, 2].astype(np.int64),
        "names": np.array([str(i) for i in range(len(labels))]),
        "target_names": np.array([str(c) for c in range(10)]),
    }


READERS = {"celeba": read_celeba, "celebahq": read_celebahq, "qmnist": read_qmnist}
READERS |= {"digits": read_digits, "cifar10": read_cifar10, "cifar100": read_cifar100, "tinyimagenet": read_tinyimagenet}

# ---------------------------------------------------------------------------------------------------------------------
# Preparing arrays


def prepare(args) -> pathlib.Path:
    """Make the prepared pair of --dataset unless it is there; returns its path without suffix.

    Decoding is parallel and goes into a memory-mapped file, so memory stays flat at CelebA's 202,599 images; the disk
    it takes is said, and checked, beforehand. Raises SystemExit(2) for missing, damaged or mismatching files.
    """
    if args.dataset != "toyfaces" and args.dataset not in READERS:
        base = pathlib.Path(args.dataset)
        if not base.name or not (base.with_name(base.name + ".npy").is_file() and base.with_name(base.name + ".npz").is_file()):
            fail(f"--dataset {args.dataset} is neither toyfaces, {', '.join(READERS)} nor a prepared pair {base}.npy + {base}.npz")
        return base
    base = pathlib.Path(args.data_dir) / "prepared" / f"{args.dataset}-{args.image_size}"
    if rank_and_world()[0] == 0 and not _is_prepared(base):
        check_writable(base.parent)
        _prepare(args, base)
    wait_for_all()
    return base


def _is_prepared(base) -> bool:
    try:
        with open(f"{base}.npz", "rb") as file, np.load(file) as table:
            return int(table["format"]) == FORMAT and pathlib.Path(f"{base}.npy").is_file()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False


def _prepare(args, base):
    root, size = pathlib.Path(args.data_dir), args.image_size
    if args.dataset == "toyfaces":
        table = draw_toyfaces(size=size)
        with atomic_write(f"{base}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, table["images"])
    else:
        table = READERS[args.dataset](root)
        count = len(table["names"])
        disk = count * size * size * 3
        say(f"{args.dataset}: {count:,} images at {size} px will take {disk / 2**30:.2f} GiB of disk in {base.parent}")
        if shutil.disk_usage(base.parent).free < disk + 2**27:
            fail(f"{base.parent} has no room for {disk / 2**30:.2f} GiB; give another --data-dir or a smaller --image-size")
        if "pictures" in table:
            there = {entry.name for entry in os.scandir(table["pictures"])} if table["pictures"].is_dir() else set()
            absent = [name for name in table["names"] if name not in there and "/" not in name]  # read_tinyimagenet looked itself
            if absent:
                fail(f"{len(absent):,} of {count:,} annotated images are not in {table['pictures']}, first {absent[0]}")
            sources = [str(table["pictures"] / name) for name in table["names"]]
        else:
            sources = list(table["raw"])
        with atomic_write(f"{base}.npy") as temporary:
            np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, size, size, 3)).flush()
            _decode_all(sources, temporary, size)
    kept = {key: value for key, value in table.items() if key not in ("images", "raw", "pictures")}
    with atomic_write(f"{base}.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, format=FORMAT, **kept)


def _decode_all(sources, path, size):
    from tqdm import tqdm

    jobs = [(path, size, start, sources[start : start + 256]) for start in range(0, len(sources), 256)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes outside Python's lock
        done = tqdm(pool.map(_decode, jobs), total=len(jobs), desc="decoding (256 images each)", disable=not sys.stderr.isatty())
        for broken in done:
            if broken:
                pool.shutdown(cancel_futures=True)
                fail(f"{broken} is truncated or no image; replace it (nothing was kept of this preparation)")


def _decode(job) -> str | None:
    """Decode one block into its place; returns the name of a broken file, or None."""
    from PIL import Image

    path, size, start, sources = job
    block = np.empty((len(sources), size, size, 3), np.uint8)
    for i, source in enumerate(sources):
        try:
            with Image.open(source) if isinstance(source, str) else Image.fromarray(source) as image:
                image.draft("RGB", (2 * size, 2 * size))  # a JPEG decodes at 1/2, 1/4 or 1/8 scale, never below twice the target
                block[i] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))  # antialiased
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{source} ({error})"
    np.lib.format.open_memmap(path, "r+")[start : start + len(sources)] = block
    return None


def load(args, device=CPU) -> dict:
    """Load the prepared pair: a dict with images (uint8, memory-mapped, or on the GPU when they fit), targets (with
    --label-noise some of them flipped), true_targets, names, target_names, classes (outputs K), digest (of the annotations)
    and name; identities, is_test and groups (what --forget-classes numbers) are None where the data has none.
    """
    base = prepare(args)
    try:
        images = np.load(f"{base}.npy", mmap_mode="c")  # copy-on-write: torch wants a writable array, the file stays as it is
        with open(f"{base}.npz", "rb") as file, np.load(file, allow_pickle=False) as table:
            table = {key: table[key] for key in table.files}
        targets, identities, is_test = table["targets"], table.get("identities"), table.get("is_test")
        fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
        optional = [column for column in (identities, is_test, table.get("coarse")) if column is not None]
        if not fits or any(len(column) != len(images) for column in (targets, *optional)):
            raise ValueError("images must be uint8 (N, S, S, 3); targets, and identities, is_test and coarse where given, must have N rows")
        if identities is not None and (not np.issubdtype(identities.dtype, np.integer) or identities.min() < 0):
            raise ValueError("identities must be whole numbers from 0")
        if is_test is not None and is_test.dtype != bool:
            raise ValueError("is_test must be true or false for each image")
        names = len(table.get("target_names", ()))
        if names and names != (targets.shape[1] if targets.ndim == 2 else targets.max() + 1):
            raise ValueError(f"target_names has {names} names, which is not the number of targets")
        if targets.min() < 0 or (targets.ndim == 2 and not np.isin(targets, (0, 1)).all()):
            raise ValueError("targets must be 0 or 1 (N, K), or class numbers from 0 (N,)")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        fail(f"{base}.npy/.npz cannot be used: {error}")
    args.image_size = images.shape[1]
    groups = targets if targets.ndim == 1 else None
    if args.forget == "subclass":  # the model learns super-classes, one of their members is forgotten
        if "coarse" not in table:
            fail(f"--forget subclass needs super-classes, which {pathlib.Path(args.dataset).name} does not have; cifar100 has them")
        targets, table["target_names"] = table["coarse"], table.get("coarse_names", np.unique(table["coarse"]).astype(str))
    targets = torch.from_numpy(targets.astype(np.float32 if targets.ndim == 2 else np.int64))
    classes = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    some = np.linspace(0, len(images) - 1, 64).astype(int)  # other pictures under the same labels are another data set
    digest = hashlib.sha256(
        images[some].tobytes()
        + np.ascontiguousarray(table["targets"]).tobytes()
        + b"".join(np.asarray(column, dtype=np.int64).tobytes() for column in optional)
    ).hexdigest()[:16]
    images = torch.from_numpy(images)
    if device.type == "cuda" and images.nbytes < 0.4 * torch.cuda.mem_get_info(device)[0]:
        images = images.to(device)
    data = {
        "name": pathlib.Path(args.dataset).name,
        "images": images,
        "targets": targets,
        "true_targets": targets,
        "identities": None if identities is None else identities.astype(np.int64),
        "is_test": is_test,
        "groups": groups,
        "names": table.get("names", np.arange(len(targets)).astype(str)),
        "target_names": table.get("target_names", np.arange(classes).astype(str)),
        "classes": classes,
        "digest": digest,
        "device": device,
    }
    return flip_labels(data, args.label_noise, args.split_seed) if args.label_noise else data


def flip_labels(data: dict, share: float, split_seed: int) -> dict:
    """Give `share` of all images another class, drawn uniformly from the others; true_targets keeps the right ones.

    On clean digits a model that never saw an image knows it as well as one that was trained on it. A wrong label can only be
    known by remembering that image, so memorising, and forgetting, become visible.
    """
    if data["targets"].ndim == 2:
        fail("--label-noise flips classes; this data has attributes")
    if data["classes"] < 2:
        fail(f"--label-noise needs two classes to flip between; {data['name']} has one")
    rng = np.random.default_rng([split_seed, 14])
    n, targets = len(data["targets"]), data["targets"].clone()
    chosen = rng.choice(n, round(share * n), replace=False)
    targets[chosen] = (targets[chosen] + torch.from_numpy(rng.integers(1, data["classes"], len(chosen)))) % data["classes"]
    return data | {"targets": targets, "digest": f"{data['digest']}-noise{share:g}-{split_seed}"}


def raw_batch(data: dict, indices) -> Tensor:
    """Images at indices in [0, 1], as they are seen at test time: (B, 3, H, W) on the device."""
    images = data["images"][torch.as_tensor(np.asarray(indices), device=data["images"].device)]
    return images.to(data["device"]).permute(0, 3, 1, 2).float() / 255


def targets_of(data: dict, indices) -> Tensor:
    """Labels at indices on the device: (B, K) or (B,)."""
    return data["targets"][torch.as_tensor(np.asarray(indices))].to(data["device"])


def random_labels(data: dict, pool: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """y_rand of k images: (k,) uniform over all classes, the true one included (LTU Eq. 6, SalUn); for attributes, which no coin
    toss resembles, (k, K) the label vectors of random images of `pool`.
    """
    if data["targets"].ndim == 1:
        return torch.randint(data["classes"], (k,), generator=rng).to(data["device"])
    return targets_of(data, pool[torch.randint(len(pool), (k,), generator=rng)])


# ---------------------------------------------------------------------------------------------------------------------
# The identity protocol


def identity_split(data: dict, ids: int, split_seed: int, held_out=False) -> dict:
    """Split by identity, 60/20/20 by images, and draw who is forgotten (METAUNLEARN Sec. 3.3, Fig. 2).

    Returns lists of image indices `retain` (D_r), `forget` (D_f), `support` (S, one image of each forget identity,
    never trained on), `val`, `test`; `forget_ids` in the order of `support`; `train_ids`; and `hash`. For one
    split_seed the smaller forget sets are the beginnings of the larger, with the same Support images. held_out, ours: `held_out` is a
    further picture of each training identity that has three or more, which no model is trained on either: see simulated_requests.
    Raises SystemExit(2) when fewer than `ids` training identities have more than one image.
    """
    identities = data["identities"]
    if identities is None:
        fail(f"{data['name']} has no identities; forget images instead: --forget random or --forget class")
    unique, count = np.unique(identities, return_counts=True)
    order = np.random.default_rng([split_seed, 0]).permutation(len(unique))
    share = np.cumsum(count[order]) / len(identities)
    train, val, test = order[share <= 0.6], order[(share > 0.6) & (share <= 0.8)], order[share > 0.8]
    if min(len(train), len(val), len(test)) == 0:
        fail(f"{data['name']} has {len(unique)} identities: too few to split into train, validation and test")
    candidates = np.random.default_rng([split_seed, 1]).permutation(train)
    eligible = candidates[count[candidates] > 1]  # else an identity in S could have no image in D_f
    if ids > len(eligible) or ids >= len(train):
        fail(
            f"--ids {ids}: only {min(len(eligible), len(train) - 1)} training identities of {data['name']} can be forgotten (they need two images, and someone must stay)"
        )
    forget_ids = unique[eligible[:ids]]
    support = [int(np.random.default_rng([split_seed, 2, i]).choice(np.flatnonzero(identities == i))) for i in forget_ids]

    spare = []
    for i in unique[train][count[train] > 2] if held_out else ():
        spare.append(int(np.random.default_rng([split_seed, 14, i]).choice(np.setdiff1d(np.flatnonzero(identities == i), support))))

    def images_of(chosen):
        return np.setdiff1d(np.flatnonzero(np.isin(identities, chosen)), support + spare).tolist()

    split = {
        "retain": images_of(np.setdiff1d(unique[train], forget_ids)),
        "forget": images_of(forget_ids),
        "support": support,
        "val": images_of(unique[val]),
        "test": images_of(unique[test]),
        "forget_ids": forget_ids.tolist(),
        "train_ids": unique[np.sort(train)].tolist(),
        **({"held_out": spare} if held_out else {}),
    }
    split["hash"] = hashlib.sha256(json.dumps([split, data["digest"]]).encode()).hexdigest()[:16]
    return split


# ---------------------------------------------------------------------------------------------------------------------
# The random protocol


def random_split(data: dict, args) -> dict:
    """Split into train, validation and test, and draw the images to forget (LTU Sec. 4.1).

    Test is the publisher's, else a random quarter; validation is 10 % of each class of the rest (SalUn's split).
    --forget random: a random --forget-ratio of the training images, the smaller forget sets being the beginnings of the larger.
    --forget class, subclass: all training images of --forget-classes, whose images then also leave validation and test, where
    nobody wants them recognised; their test images stand in `test_forgotten`.
    Returns sorted lists of image indices and `hash`, as identity_split does. Raises SystemExit(2) where a class or D_r runs empty.
    """
    n, seed = len(data["targets"]), args.split_seed
    is_test = data["is_test"]
    if is_test is None:
        is_test = np.random.default_rng([seed, 10]).permutation(n) < n // 4
    rest = np.random.default_rng([seed, 11]).permutation(np.flatnonzero(~is_test))
    if args.train_images:
        rest = rest[: args.train_images]
    kinds = data["groups"] if data["groups"] is not None else np.zeros(n, int)  # attributes: no classes to be fair to
    val = np.concatenate([rest[kinds[rest] == c][: round(0.1 * (kinds[rest] == c).sum())] for c in np.unique(kinds)])
    train = rest[~np.isin(rest, val)]
    gone = np.zeros(n, bool)  # images of classes to be forgotten
    if args.forget == "random":
        forget = np.random.default_rng([seed, 12]).permutation(train)[: round(args.forget_ratio * len(train))]
    else:
        if data["groups"] is None:
            fail(f"--forget {args.forget} needs classes; {data['name']} has attributes")
        known = np.unique(kinds)
        absent = sorted(set(args.forget_classes) - set(known.tolist()))
        if absent or len(set(args.forget_classes)) >= len(known):
            fail(
                f"--forget-classes {args.forget_classes}: {data['name']} has classes 0 to {known.max()}, and one must stay; absent: {absent}"
            )
        gone = np.isin(kinds, args.forget_classes)
        forget = train[gone[train]]
    retain = train[~np.isin(train, forget)]
    if args.forget != "class" and data["targets"].ndim == 1:
        of_all, left = (np.bincount(data["targets"][part].numpy(), minlength=data["classes"]) for part in (train, retain))
        if of_all.min() == 0:
            fail(
                f"class {of_all.argmin()} has no training image; classes must be numbered from 0 without gaps, and --train-images not too few"
            )
        if left.min() == 0:
            fail(f"forgetting {len(forget):,} of {len(train):,} images leaves none of class {left.argmin()}; forget less of it")
    if len(forget) == 0 or len(retain) == 0:
        fail(f"D_f has {len(forget):,} images and D_r {len(retain):,}: neither may be empty")
    test = np.flatnonzero(is_test)
    if not len(val[~gone[val]]) or not len(test[~gone[test]]):
        fail(
            f"{data['name']} leaves {len(val)} images for validation and {len(test)} for testing; give more images (ten of a class make one for validation)"
        )
    parts = {"retain": retain, "forget": forget, "val": val[~gone[val]], "test": test[~gone[test]], "test_forgotten": test[gone[test]]}
    split = {name: np.sort(part).tolist() for name, part in parts.items()}
    split["hash"] = hashlib.sha256(json.dumps([split, data["digest"]]).encode()).hexdigest()[:16]
    return split


def make_split(data: dict, args) -> dict:
    """Who is forgotten, as --forget says: identity_split or random_split; with --dry-run a short version of it."""
    split = identity_split(data, args.ids, args.split_seed, args.held_out) if args.forget == "identities" else random_split(data, args)
    return shortened(split) if args.dry_run else split


def setting(args) -> str:
    """What is forgotten from what, as a file name: one folder of checkpoints and results for each."""
    who = {"identities": f"ids{args.ids}", "random": f"random{args.forget_ratio:g}"}
    name = who.get(args.forget) or args.forget + "+".join(str(c) for c in args.forget_classes)
    name += "-heldout" * args.held_out
    name += f"-n{args.train_images}" * bool(args.train_images) + f"-noise{args.label_noise:g}" * bool(args.label_noise)
    return f"{name}-split{args.split_seed}" + "-dry" * args.dry_run


def reachable(split: dict, rho: float, split_seed: int) -> list[int]:
    """D_r-hat, the share rho of D_r that a method may use (LTU Sec. 3.2); a smaller one is part of a larger one."""
    order = np.random.default_rng([split_seed, 13]).permutation(split["retain"])
    return np.sort(order[: round(rho * len(order))]).tolist()


def shortened(split: dict) -> dict:
    """The same split with at most 64 images in D_r, D_v and D_te: enough for a dry run."""
    return split | {name: split[name][:64] for name in ("retain", "val", "test")}


def simulated_requests(data: dict, split: dict, n_s: int, seed: int, epoch: int):
    """Yield (support, forget) index arrays of simulated unlearning requests (METAUNLEARN Sec. 4.1, Alg. 1 lines 1-6).

    One epoch passes over all training identities without replacement, n_s at a time; the last block is filled from the
    beginning of the epoch's order. Of each identity one random training image is its simulated Support; the rest is in
    the simulated D_f. An identity with a single image has it in both. The real Support set is never touched.
    A trap in the paper's way: the model was trained on the simulated Support picture, and on the real one it was not. With --held-out
    (ours) neither is: the simulated one is the identity's held-out picture.
    """
    rng = np.random.default_rng([seed, epoch, 3])
    trained_on = np.array(split["retain"] + split["forget"])
    owner = data["identities"][trained_on]
    order = rng.permutation(split["train_ids"])
    order = order[np.isin(order, owner)]  # an identity whose only spare image is real Support has none left to simulate with
    held_out = {int(data["identities"][i]): i for i in split.get("held_out", ())}
    n_s = min(n_s, len(order))
    for start in range(0, len(order), n_s):
        block = [order[(start + i) % len(order)] for i in range(n_s)]
        support, forget = [], []
        for i in block:
            own = trained_on[owner == i]
            if int(i) in held_out:
                support.append(held_out[int(i)])
                forget.extend(own)
                continue
            chosen = rng.integers(len(own))
            support.append(own[chosen])
            forget.extend(own if len(own) == 1 else np.delete(own, chosen))
        yield np.array(support), np.array(forget)


def control_sets(data: dict, split: dict, seen=(), sets=20) -> list[np.ndarray]:
    """Positions within D_r of `sets` random sets that were not forgotten: the control that tells forgetting these people, or
    images, from lowering everything.

    Identities: as many retained identities as are forgotten. Random samples: images outside `seen`, the part of D_r that the method
    may use; as many as D_f has, at most half of those there are, else all sets were the same. Where (almost) all of D_r was seen,
    sets of D_r.
    """
    rng = np.random.default_rng([int(split["hash"], 16) % 2**32, 4])
    if "forget_ids" in split:
        owner = data["identities"][split["retain"]]
        people = np.unique(owner)
        size = min(len(split["forget_ids"]), len(people))
        return [np.flatnonzero(np.isin(owner, rng.choice(people, size, replace=False))) for _ in range(sets)]
    unseen = np.flatnonzero(~np.isin(split["retain"], list(seen)))
    pool = unseen if len(unseen) >= 50 else np.arange(len(split["retain"]))
    return [np.sort(rng.choice(pool, min(len(split["forget"]), len(pool) // 2), replace=False)) for _ in range(sets)]


def describe(data: dict, split: dict) -> str:
    sets = (("D_r", "retain"), ("D_f", "forget"), ("S", "support"), ("D_v", "val"), ("D_te", "test"))
    parts = ", ".join(f"{name} {len(split[key]):,}" for name, key in sets if key in split)
    if "support" in split:
        of = f"{len(data['identities']):,} images of {len(np.unique(data['identities'])):,} identities ({len(split['train_ids']):,} for training)"
    else:
        of = f"{len(data['targets']):,} images of {data['classes']} {'classes' if data['targets'].ndim == 1 else 'attributes'}"
        flipped = (data["targets"] != data["true_targets"]).float().mean()
        of += f", {100 * flipped:.0f} % of the labels flipped" * bool(flipped)
    return f"{data['name']}: {of}; {parts}; split {split['hash']}"


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


def draw_augmentation(B: int, args, rng: torch.Generator) -> Tensor:
    """Draw for B images what --augment asks for, on the CPU, so that every device and process has the same; see augment.

    resized-crop: (B, 2, 3) affine maps. pad-crop: (B, 3), the crop's row and column and whether to flip. none: (B, 0).
    """
    if args.augment == "resized-crop":
        return random_crops(B, args.image_size, args.crop_scale, rng)
    if args.augment == "pad-crop":
        corner = torch.randint(0, 2 * PAD + 1, (B, 2), generator=rng)
        return torch.cat([corner, torch.randint(0, 2, (B, 1), generator=rng)], 1)
    return torch.zeros(B, 0)


def augment(images: Tensor, drawn: Tensor) -> Tensor:
    """Apply what draw_augmentation drew: (B, 3, S, S) -> (B, 3, S, S). All images at once; no loop over them."""
    if drawn.ndim == 3:
        return crop(images, drawn)
    return pad_crop(images, drawn) if drawn.shape[1] else images


PAD = 4  # pixels of black around the image, torchvision's RandomCrop(32, padding=4) (SalUn's recipe)


def pad_crop(images: Tensor, drawn: Tensor) -> Tensor:
    """Pad by PAD black pixels, cut (S, S) at each image's own corner, flip some: (B, 3, S, S) -> (B, 3, S, S)."""
    B, S = len(images), images.shape[-1]
    row, column, flip = drawn.to(images.device).unbind(1)
    along = torch.arange(S, device=images.device)
    rows = row[:, None] + along  # (B, S)
    columns = column[:, None] + torch.where(flip[:, None] > 0, S - 1 - along, along)  # (B, S)
    padded = F.pad(images, (PAD,) * 4).permute(0, 2, 3, 1)  # (B, S + 2 PAD, S + 2 PAD, 3)
    cut = padded[torch.arange(B, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, S, S, 3)
    return cut.permute(0, 3, 1, 2)


def random_crops(B: int, S: int, scale: float, rng: torch.Generator) -> Tensor:
    """Draw torchvision's RandomResizedCrop(scale=(scale, 1)) and RandomHorizontalFlip for B images of S x S pixels.

    Returns (B, 2, 3) affine maps for `crop`, drawn on the CPU: the same on every device. Source: paper App. A.
    """
    area = S * S * (scale + (1 - scale) * torch.rand(B, 10, generator=rng))  # (B, 10): ten tries each, as torchvision has it
    ratio = torch.exp((torch.rand(B, 10, generator=rng) * 2 - 1) * np.log(4 / 3))
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= S) & (height <= S) & (width > 0) & (height > 0)
    first = fits.float().argmax(1, keepdim=True)  # (B, 1)
    width = torch.where(fits.any(1), width.gather(1, first)[:, 0], S)  # no try fits: the whole image
    height = torch.where(fits.any(1), height.gather(1, first)[:, 0], S)
    left = (torch.rand(B, generator=rng) * (S - width + 1)).floor()
    top = (torch.rand(B, generator=rng) * (S - height + 1)).floor()
    flip = torch.where(torch.rand(B, generator=rng) < 0.5, -1.0, 1.0)
    # An output pixel at x in [-1, 1] looks at the crop's centre + x * half its width, in the image's own [-1, 1].
    maps = torch.zeros(B, 2, 3)
    maps[:, 0, 0], maps[:, 0, 2] = flip * width / S, (2 * left + width) / S - 1
    maps[:, 1, 1], maps[:, 1, 2] = height / S, (2 * top + height) / S - 1
    return maps


def crop(images: Tensor, maps: Tensor) -> Tensor:
    """Cut each image's crop and enlarge it to the image's size: (B, 3, S, S) -> (B, 3, S, S).

    A crop is never larger than what it is enlarged to, so bilinear sampling needs no antialiasing.
    """
    grid = F.affine_grid(maps.to(images.device), list(images.shape), align_corners=False)
    edge = 1 - 1 / images.shape[-1]  # centre of the outermost pixels; clamping is padding_mode="border", which MPS lacks
    return F.grid_sample(images, grid.clamp(-edge, edge), mode="bilinear", align_corners=False)


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_shared_arguments(parser)
    parser.add_argument("--annotations-only", action="store_true", help="print the split from the annotation files; open no picture")
    presets = {name: {"image_size": 224} for name in ("celeba", "celebahq")} | {"digits": {"image_size": 8, "label_noise": 0.1}}
    presets |= {name: {"image_size": 32} for name in ("cifar10", "cifar100")} | {"tinyimagenet": {"image_size": 64}}
    for name in ("digits", "cifar10", "cifar100", "tinyimagenet"):
        presets[name]["forget"] = "random"
    return parse_with_presets(parser, presets, argv)


def main(argv=None):
    args = parse_args(argv)
    if args.annotations_only:
        readers = {"celeba": read_celeba, "celebahq": read_celebahq}
        if args.dataset not in readers:
            fail("--annotations-only is for celeba and celebahq")
        data = readers[args.dataset](pathlib.Path(args.data_dir)) | {"name": args.dataset, "digest": "annotations"}
    else:
        data = load(args)
    print(describe(data, make_split(data, args)))


if __name__ == "__main__":
    main()
