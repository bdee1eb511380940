"""Data sets as arrays, their splits, augmentation on the device, and prediction over indices.

Usage:
    python data.py                                      # draw the toy faces, print the split
    python data.py --dataset digits                     # random-sample unlearning
    python data.py --from-folder DIR --image-size 32    # make a pair of your own pictures

Each data set becomes a pair of files, and again when what it came from has changed:
<data-dir>/prepared/<name>-<size>.npy with the images, uint8 (N, H, W, 3), memory-mapped, and an
.npz with `targets`, (N, K) in {0, 1} or (N,) classes, and where they exist `names` (N,),
`target_names` (K,), `identities` (N,), `is_test` (N,) (the test set) and `coarse` (N,)
(super-classes). Your own data is such a pair, as --from-folder makes one: --dataset path/to/name.

Departures from the authors' code (the paper is silent): images are squashed to a square once, with
antialiasing; training crops are cut from that square, and the test image is the square itself.
"""

import concurrent.futures
import csv
import hashlib
import json
import os
import pathlib
import pickle
import shlex
import shutil
import socket
import tempfile
import types
import urllib.request

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from common import Parser, autocast, fail, rank_and_world, say, wait_for_all

CPU = torch.device("cpu")
# What --dataset brings along; a flag on the command line wins. train.py adds the recipes.
PRESETS = {
    "toyfaces": dict(ids=10),
    "celebahq": dict(ids=20, image_size=224),
    "celeba": dict(ids=5, image_size=224),
    "qmnist": dict(ids=20),
    "digits": dict(forget="random", image_size=8, label_noise=0.1),
    "cifar10": dict(forget="random", image_size=32),
    "cifar100": dict(forget="random", image_size=32),
    "tinyimagenet": dict(forget="random", image_size=64),
}

TOY_PER_IMAGE = ["smile", "mouth_open", "glasses", "hat", "tilt"]  # visible, new in each image
TOY_PER_IDENTITY = ["blond", "beard", "pale", "long_hair"]  # visible, the same in all images
TOY_REMEMBERED = ["secret_1", "secret_2", "secret_3", "secret_4"]  # of an identity, not drawn


def draw_toyfaces(identities=200, images_each=10, size=32, seed=0) -> dict:
    """Draw cartoon faces, recognisable by identity; the same arguments give the same arrays.

    Returns images (N, size, size, 3) uint8 with N = identities * images_each, targets (N, 13),
    identities (N,), and names. Labels are fair coin flips: an AP of 0.5 means an unknown label.
    """
    rng = np.random.default_rng([seed, identities, images_each])
    who = np.repeat(np.arange(identities), images_each)  # (N,)
    n = len(who)
    per_identity = rng.integers(0, 2, (identities, 8))[who]  # (N, 8)
    targets = np.concatenate([rng.integers(0, 2, (n, 5)), per_identity], 1)  # (N, 13)
    target_names = TOY_PER_IMAGE + TOY_PER_IDENTITY + TOY_REMEMBERED
    look = dict(zip(target_names, targets.T.astype(bool), strict=True))

    def own(low, high, *shape):  # the same in all images of an identity
        return rng.uniform(low, high, (*shape, identities)).T[who]

    def new(low, high, *shape):  # another in each image
        return rng.uniform(low, high, (*shape, n)).T

    # The order of the draws decides the faces.
    skin = np.where(look["pale"][:, None], [0.95, 0.80, 0.70], [0.62, 0.42, 0.30])
    hair = np.where(look["blond"][:, None], [0.90, 0.75, 0.30], [0.25, 0.15, 0.10])
    look["skin"], look["hair"] = skin + own(-0.06, 0.06, 3), hair + own(-0.12, 0.12, 3)
    look["shirt"], look["iris"] = own(0.1, 0.9, 3), own(0.0, 0.7, 3)
    look["background"], look["cap"] = new(0.2, 0.9, 3), new(0.1, 0.9, 3)
    look["wide"], look["tall"] = own(0.48, 0.66), own(0.62, 0.78)
    look["eye_x"], look["eye_y"] = own(0.18, 0.30), own(-0.20, -0.02)
    look["eye_r"], look["brow"] = own(0.09, 0.15), own(0.02, 0.06)
    look["nose"], look["mouth_w"] = own(0.06, 0.16), own(0.20, 0.34)
    look["hairline"] = own(-0.50, -0.25)
    tilted = new(0.30, 0.45) * rng.choice([-1, 1], n)
    look["angle"] = np.where(look["tilt"], tilted, new(-0.06, 0.06))  # radians, to either side
    look["zoom"] = new(1.0, 1.15)
    look["shift_x"], look["shift_y"] = new(-0.10, 0.10), new(-0.06, 0.06)
    look["light"], look["slope"] = new(0.80, 1.15), new(-0.15, 0.15)

    images = np.empty((n, size, size, 3), np.uint8)
    for i in range(0, n, 250):  # a few hundred at a time keep memory flat
        part = {name: a[i : i + 250] for name, a in look.items()}
        noise = rng.normal(0, 0.02, (len(who[i : i + 250]), size, size, 3))
        images[i : i + 250] = _paint_faces(part, noise)
    names = [f"{i:03d}_{j}" for i in range(identities) for j in range(images_each)]
    table = {"images": images, "targets": targets.astype(np.uint8), "identities": who}
    return table | {"names": np.array(names), "target_names": np.array(target_names)}


def _paint_faces(look: dict, noise) -> np.ndarray:
    """Paint the faces that `look` describes: {name: (B,) or (B, 3)} -> uint8 (B, S, S, 3)."""
    f = types.SimpleNamespace(**{name: a[:, None, None] for name, a in look.items()})
    size = noise.shape[1]
    axis = (np.arange(size) + 0.5) * 2 / size - 1  # an image reaches from -1 to 1
    x, y = (axis - f.shift_x) * f.zoom, (axis[:, None] - f.shift_y) * f.zoom  # (B, 1, S), (B, S, 1)
    u = x * np.cos(f.angle) + y * np.sin(f.angle)  # (B, S, S), across the face
    v = y * np.cos(f.angle) - x * np.sin(f.angle)  # down the face
    image = np.broadcast_to(f.background, noise.shape).copy()

    def paint(inside, colour, where=True):  # inside: how far, in half image widths
        mask = np.clip(np.where(where, inside, -1.0) * size / 2 + 0.5, 0, 1)  # soft over one pixel
        image[:] += mask[..., None] * (colour - image)

    def ellipse(cx, cy, rx, ry):
        return (1 - np.hypot((u - cx) / rx, (v - cy) / ry)) * np.minimum(rx, ry)

    face = ellipse(0, 0, f.wide, f.tall)
    paint(ellipse(0, 0.15, f.wide + 0.22, f.tall + 0.15), f.hair, f.long_hair)
    paint(ellipse(0, 1.15, 0.75, 0.42), f.shirt)
    paint(face, f.skin)
    paint(np.minimum(face, v - 0.22), f.hair * 0.9, f.beard)
    paint(np.minimum(ellipse(0, -0.04, f.wide + 0.07, f.tall + 0.07), f.hairline - v), f.hair)
    for side in (-1, 1):
        centre, above = side * f.eye_x, v - f.eye_y + f.eye_r + 0.07
        paint(ellipse(centre, f.eye_y, f.eye_r, f.eye_r * 0.8), np.array([0.97, 0.97, 0.97]))
        paint(ellipse(centre, f.eye_y, f.eye_r * 0.55, f.eye_r * 0.55), f.iris)
        paint(f.brow - np.hypot(np.maximum(abs(u - centre) - 0.10, 0), above), f.hair * 0.7)
        ring = 0.05 - abs(np.hypot(u - centre, v - f.eye_y) - 0.20)
        paint(ring, np.array([0.05, 0.05, 0.10]), f.glasses)
    paint(ellipse(0, 0.12, 0.05, f.nose), f.skin * 0.8)
    # A smile bends the mouth up at its ends, its absence down: both survive a horizontal flip.
    bend = np.where(f.smile, -0.16, 0.12) * ((u / f.mouth_w) ** 2 - 0.5)
    lips = np.where(f.mouth_open, 0.13, 0.035) - abs(v - 0.40 - bend)
    paint(np.minimum(lips, f.mouth_w - abs(u)), np.array([0.55, 0.05, 0.08]))
    brim = np.minimum(0.07 - abs(v + 0.45), f.wide + 0.22 - abs(u))
    paint(np.maximum(np.minimum(-0.42 - v, f.wide - abs(u)), brim), f.cap, f.hat)
    image = image * (f.light + f.slope * axis)[..., None] + noise
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# Data sets: readers give `images` as arrays, or as paths of pictures that are not opened yet


_WHO, _HQ = "celeba/identity_CelebA.txt", "CelebAMask-HQ"
SOURCES = {  # below --data-dir: a pair is prepared again when one of them has changed
    "celeba": [_WHO, "celeba/list_attr_celeba.txt", "celeba/img_align_celeba"],
    "celebahq": [_WHO, f"{_HQ}/CelebAMask-HQ-attribute-anno.txt", f"{_HQ}/CelebA-HQ-img"]
    + [f"{_HQ}/CelebA-HQ-identity.txt", f"{_HQ}/CelebA-HQ-to-CelebA-mapping.txt"],
    "qmnist": ["QMNIST/raw"],
    "cifar10": ["cifar10.npz", "cifar-10-batches-py"],
    "cifar100": ["cifar-100-python"],
    "tinyimagenet": ["tiny-imagenet-200"],
}


def _incomplete(title: str, why: str, *expected):
    files = "\n  ".join(str(file) for file in expected)
    instead = "python metaunlearn.py --dataset toyfaces, python ltu.py --dataset digits"
    fail(f"{title} is not complete{why}. Expected:\n  {files}\nNo download needed: {instead}")


def _text(path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read as UTF-8 text ({error})")


def _rows(path) -> list[list[str]]:
    return [line.split() for line in _text(path).splitlines() if line.strip()]


def read_celeba(root: pathlib.Path) -> dict:
    """CelebA's annotations, but for the publisher's partition, which the protocol does not use."""
    identities, table, pictures = (root / name for name in SOURCES["celeba"])
    page = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    source = f"(of {page}, by hand: Align&Cropped Images, Anno)"
    return _with_attributes("CelebA", source, pictures / "000001.jpg", table, identities)


def read_celebahq(root: pathlib.Path) -> dict:
    """CelebA-HQ's annotations; identities from a file of its own, or by the mapping to CelebA."""
    celeba, table, pictures, direct, mapping = (root / name for name in SOURCES["celebahq"])
    files = (direct,) if direct.is_file() else (celeba, mapping)
    page = "https://github.com/switchablenorms/CelebAMask-HQ"
    source = f"(of {page} and CelebA's, by hand; {direct} for the last two would do)"
    return _with_attributes("CelebA-HQ", source, pictures / "0.jpg", table, *files)


def _with_attributes(title, source, first, table, identities, mapping=None) -> dict:
    """Read an attribute table and the identities of its files.

    The table holds a row count, K names, and rows `file v1 .. vK`; identities are rows `file
    number`, of orig_file where there is a mapping of columns idx, orig_idx, orig_file.
    """
    files = [file for file in (table, mapping, identities) if file]
    if not all(file.is_file() for file in files):
        _incomplete(title, "", f"{first} ...", *files, source)
    path = identities
    try:
        identity_of = {file: int(number) for file, number in _rows(path)}
        path = table
        [count], target_names, *rows = _rows(path)
        values = np.array([row[1:] for row in rows], dtype=np.int8)  # (N, K)
        if values.shape != (int(count), len(target_names)) or not np.isin(values, (-1, 1)).all():
            raise ValueError
    except (ValueError, OverflowError):
        form = "rows `file number`, or a row count, K names and rows `file v1 .. vK` of -1 or 1"
        fail(f"{path} is cut short or damaged; expected: {form}")
    names = [row[0] for row in rows]
    if mapping:
        original = {f"{row[0]}.jpg": row[2] for row in _rows(mapping)[1:] if len(row) >= 3}
        identity_of = {name: identity_of.get(original.get(name)) for name in names}
    missing = [name for name in names if identity_of.get(name) is None]
    if missing:
        few = f"{len(missing)} of {len(names)} files, first {missing[0]}"
        fail(f"{mapping or identities} gives no identity for {few}")
    images = [first.parent / name for name in names]
    data = {"images": images, "names": np.array(names), "target_names": np.array(target_names)}
    data["identities"] = np.array([identity_of[name] for name in names])
    return data | {"targets": (values > 0).astype(np.uint8)}


def _from_torchvision(title: str, root, *expected, **options) -> dict:
    """Read a data set of torchvision, which checks the files' md5; its labels are the targets."""
    import torchvision

    kind = getattr(torchvision.datasets, title)
    try:
        if title != "QMNIST" and not (root / kind.base_folder).is_dir():
            _download(kind.url, root / kind.filename, kind.tgz_md5)  # torchvision cannot go on
        parts = [kind(root, train=train, download=True, **options) for train in (True, False)]
    except Exception as error:  # missing or damaged files, no network: each raises something else
        _incomplete(title, f" ({' '.join(str(error).split())[:80]})", *expected)
    images = np.concatenate([np.asarray(part.data) for part in parts])
    targets = np.concatenate([np.asarray(part.targets, np.int64) for part in parts])
    is_test, names = np.repeat([False, True], [len(part.data) for part in parts]), parts[0].classes
    return {"images": images, "targets": targets, "target_names": names, "is_test": is_test}


def _download(url: str, path: pathlib.Path, md5: str):
    """Fetch a file that is not there; goes on where an interrupted download stopped."""
    part = path.with_name(f"{path.name}.part")
    if path.is_file():
        return
    # The last byte once more: a range that begins at the end of a whole file is an error.
    start = max(0, part.stat().st_size - 1) if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    with urllib.request.urlopen(request) as answer, open(part, "ab") as file:
        start = start if answer.status == 206 else 0  # 200: the server sends all of it again
        total = start + (answer.length or 0)
        say(f"downloading {url}: {total / 2**20:,.0f} MiB, {start / 2**20:,.0f} are there")
        file.truncate(start)
        with tqdm.wrapattr(answer, "read", total=total, initial=start, disable=None) as body:
            shutil.copyfileobj(body, file)
    if part.stat().st_size < total:
        raise OSError("the connection broke; the same command goes on")
    if hashlib.md5(part.read_bytes()).hexdigest() != md5:
        fail(f"{part} has not the publisher's checksum; delete it and start again")
    part.replace(path)


def read_digits(root: pathlib.Path) -> dict:
    """scikit-learn's 1,797 real 8 x 8 scans, shipped with the package; it names no test set."""
    from sklearn.datasets import load_digits

    table = load_digits()
    images = np.round(table.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    targets = table.target.astype(np.int64)
    return {"images": images, "targets": targets, "target_names": list("0123456789")}


def read_qmnist(root: pathlib.Path) -> dict:
    """QMNIST: 10 digits, 120,000 scans, the writer as identity; torchvision fetches the files."""
    files = f"{root}/QMNIST/raw/qmnist-{{train,test}}-{{images-idx3-ubyte,labels-idx2-int}}.gz"
    if not (root / "QMNIST" / "raw").is_dir():
        say(f"downloading QMNIST: 20 MiB to {root}")
    page = "from https://github.com/facebookresearch/qmnist"
    table = _from_torchvision("QMNIST", root, files, page, compat=False)
    labels = table["targets"]  # (N, 8): class, series, writer, ...
    people = {"identities": labels[:, 2], "target_names": list("0123456789")}
    return table | {"targets": labels[:, 0], **people}


_CIFAR = "from https://www.cs.toronto.edu/~kriz/cifar.html"


def read_cifar10(root: pathlib.Path) -> dict:
    """CIFAR-10 from the publisher's files, or from one array file, for re-encoded copies."""
    path, folder = (root / name for name in SOURCES["cifar10"])
    if not path.is_file() or folder.is_dir():
        files = f"{folder}/ of cifar-10-python.tar.gz, {_CIFAR}"
        array = f"(or {path} with images (60000, 32, 32, 3) uint8, label, is_test)"
        return _from_torchvision("CIFAR10", root, files, array)
    try:
        table = _read_npz(path)
        images, label, is_test = table["images"], table["label"], table["is_test"].astype(bool)
        fits = images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
        if not fits or not len(images) == len(label) == len(is_test):
            raise ValueError("images must be uint8 (N, 32, 32, 3), each with a label and is_test")
    except Exception as error:  # np.load raises many things at a foreign or damaged file
        fail(f"{path} cannot be used: {error}")
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    table = {"images": images, "targets": label.astype(np.int64)}
    return table | {"target_names": names, "is_test": is_test}


def read_cifar100(root: pathlib.Path) -> dict:
    """CIFAR-100 with both label sets; torchvision has no super-classes."""
    folder = root / "cifar-100-python"
    table = _from_torchvision("CIFAR100", root, f"{folder}/ of cifar-100-python.tar.gz, {_CIFAR}")
    # torchvision has just checked these pickles' md5.
    files = [(folder / name).read_bytes() for name in ("train", "test", "meta")]
    train, test, meta = (pickle.loads(content, encoding="latin1") for content in files)
    coarse = np.array(train["coarse_labels"] + test["coarse_labels"])
    return table | {"coarse": coarse, "coarse_names": meta["coarse_label_names"]}


TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def read_tinyimagenet(root: pathlib.Path) -> dict:
    """Tiny-ImageNet with the classes of wnids.txt; its val/ is the test set (LTU Sec. 4.1)."""
    folder = root / "tiny-imagenet-200"
    listing, annotations = folder / "wnids.txt", folder / "val" / "val_annotations.txt"
    pictures = f"{folder}/train/<class>/images/*.JPEG and val/images/*.JPEG"
    files = listing, annotations, pictures, f"(of {TINY_URL})"
    if not folder.is_dir():
        try:
            _download(TINY_URL, path := folder.with_suffix(".zip"), TINY_MD5)
            say(f"unpacking {path}")
            with tempfile.TemporaryDirectory(dir=root) as inside:  # all of it is there, or nothing
                shutil.unpack_archive(path, inside)
                os.replace(f"{inside}/{folder.name}", folder)
        except Exception as error:  # no network, a damaged file, a full disk
            _incomplete("Tiny-ImageNet", f" ({error})", *files)
    if not listing.is_file() or not annotations.is_file():
        _incomplete("Tiny-ImageNet", "", *files)
    classes = _text(listing).split()
    rows = []  # path, class number
    for number, name in enumerate(classes):
        pictures = sorted((folder / "train" / name / "images").glob("*.JPEG"))
        if not pictures:
            _incomplete("Tiny-ImageNet", f": train/{name}/images has no picture", *files)
        rows += [(picture, number) for picture in pictures]
    training = len(rows)
    for line in _text(annotations).splitlines():
        words = line.split("\t")
        if len(words) < 2 or words[1] not in classes:
            fail(f"{annotations} is damaged: no file, tab and class of wnids.txt in {line[:60]!r}")
        rows.append((folder / "val" / "images" / words[0], classes.index(words[1])))
    images, label = zip(*rows, strict=True)
    names = [path.relative_to(folder).as_posix() for path in images]
    table = {"images": images, "targets": np.array(label), "names": names, "target_names": classes}
    return table | {"is_test": np.arange(len(rows)) >= training}


READERS = {"celeba": read_celeba, "celebahq": read_celebahq, "qmnist": read_qmnist}
READERS |= {"digits": read_digits, "cifar10": read_cifar10, "cifar100": read_cifar100}
READERS |= {"tinyimagenet": read_tinyimagenet}


def prepare(args) -> pathlib.Path:
    """Make the prepared pair of --dataset unless it is there; returns its path without suffix.

    Raises SystemExit(2) for missing, damaged or mismatching files, and for too small a disk.
    """
    if args.dataset not in PRESETS:
        base = pathlib.Path(args.dataset)
        if not all(pathlib.Path(f"{base}.{kind}").is_file() for kind in ("npy", "npz")):
            known = ", ".join(PRESETS)
            fail(f"--dataset {base}: neither {known} nor a pair {base}.npy + {base}.npz")
        return base
    base = pathlib.Path(args.data_dir) / "prepared" / f"{args.dataset}-{args.image_size}"
    if rank_and_world()[0] == 0:
        common.remove_leftovers(base.parent)
        if not _is_ready(base, _stamps(args)):
            common.check_writable(base.parent)
            socket.setdefaulttimeout(20)  # seconds that a download waits for an answer
            if args.dataset == "toyfaces":
                table = draw_toyfaces(size=args.image_size)
            else:
                table = READERS[args.dataset](pathlib.Path(args.data_dir))
            _write_pair(base, table, args.image_size, stamps=json.dumps(_stamps(args)))
    wait_for_all()
    return base


def _stamps(args) -> dict:
    """{source: a hash of its texts, and of other files' names, sizes and times; None: absent}."""
    stamps = {"format": 2}  # raised when prepared pairs change
    for source in SOURCES.get(args.dataset, ()):
        top, seen = os.path.join(args.data_dir, source), hashlib.sha256()
        files = [top] if os.path.isfile(top) else []
        files += [os.path.join(*at, name) for *at, _, names in os.walk(top) for name in names]
        for file in sorted(files):
            state = os.stat(file)
            what = f"{os.path.basename(file)} {state.st_size} {state.st_mtime_ns}".encode()
            seen.update(pathlib.Path(file).read_bytes() if file.endswith(".txt") else what)
        stamps[source] = seen.hexdigest() if files else None
    return stamps


def _is_ready(base, stamps: dict) -> bool:
    try:
        before = json.loads(str(_read_npz(f"{base}.npz")["stamps"]))
    except Exception:  # not there, damaged, or of another version
        return False
    # A prepared pair is enough without its sources.
    same = all(stamp in (None, before.get(source)) for source, stamp in stamps.items())
    return same and pathlib.Path(f"{base}.npy").is_file()


def _write_pair(base, table: dict, size: int, **more):
    """Write the images of a table to base.npy, the rest and the images' hash to base.npz."""
    digest = _write_images(table.pop("images"), base, size)
    with common.atomic_write(f"{base}.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, images_digest=digest, **table, **more)


def _read_npz(path) -> dict:
    with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as table:
        return dict(table)


def _write_images(sources, base, size: int) -> str:
    """Write arrays or pictures to base.npy in blocks, so that memory stays flat; their SHA-256."""
    count, digest = len(sources), hashlib.sha256()
    absent = [path for path in sources if isinstance(path, pathlib.Path) and not path.is_file()]
    if absent:
        fail(f"{len(absent):,} of {count:,} annotated images are missing, first {absent[0]}")
    room = count * size * size * 3 + 2**27
    needs = f"{count:,} images at {size} px need {room / 2**30:.1f} GiB of disk in {base.parent}"
    say(f"{base.name}: {needs}")
    if shutil.disk_usage(base.parent).free < room:
        fail(f"no room: {needs}; change --data-dir or lower --image-size")
    # Threads are enough: Pillow decodes and resizes outside Python's lock.
    pool = concurrent.futures.ThreadPoolExecutor()
    with pool, common.atomic_write(f"{base}.npy") as path:
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, size, size, 3))
        for i in tqdm(range(0, count, 256), "decoding (256 images each)", disable=None):
            block = list(pool.map(_decode, sources[i : i + 256], [size] * 256))
            for image in block:
                if isinstance(image, str):
                    fail(f"{image} is truncated or no image; replace it (nothing was kept)")
            images[i : i + 256] = block
            digest.update(images[i : i + 256])
        images.flush()
    return digest.hexdigest()


def _decode(source, size: int) -> np.ndarray | str:
    """Squash an array or a picture to (size, size, 3); gives a broken picture's path and error."""
    try:
        opened = Image.open if isinstance(source, pathlib.Path) else Image.fromarray
        with opened(source) as image:
            # A JPEG decodes at 1/2, 1/4 or 1/8 scale, never below twice the target.
            image.draft("RGB", (2 * size, 2 * size))
            if image.mode.startswith("I;16"):  # 16 bits of grey, which convert would cut off at 255
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            upright = ImageOps.exif_transpose(image).convert("RGB")  # phones note how they are held
            return np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow raises many things at a damaged picture
        return f"{source} ({error})"


def _read_pair(base) -> tuple[np.ndarray, dict]:
    """Read and check a prepared pair: images (N, S, S, 3), and the columns of the table."""
    try:
        # Copy-on-write: torch wants a writable array, and the file must stay as it is.
        images, table = np.load(f"{base}.npy", mmap_mode="c"), _read_npz(f"{base}.npz")
        square = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
        if not square or images.dtype != np.uint8 or not len(images):
            are = f"{images.dtype} {images.shape}"
            raise ValueError(f"images must be uint8 (N, S, S, 3), N > 0, not {are}")
        if "targets" not in table:
            raise ValueError(f"no array named targets in {base}.npz, only {', '.join(table)}")
        for name in [name for name in COLUMNS if name in table]:
            table[name] = _column(name, table[name], len(images))
        targets, names = table["targets"], len(table.get("target_names", ()))
        if names and names != (targets.shape[1] if targets.ndim == 2 else targets.max() + 1):
            raise ValueError(f"target_names has {names} names, which is not the number of targets")
    except Exception as error:  # np.load raises many things at a foreign or damaged file
        fail(f"{base}.npy/.npz cannot be used: {error}")
    return images, table


COLUMNS = {  # of one's own pair, and what they must be
    "targets": "classes (N,) numbered from 0 without gaps, or attributes (N, K) of 0 and 1",
    "identities": "whole numbers (N,) from 0",
    "is_test": "true or false (N,)",
    "coarse": "classes (N,) numbered from 0 without gaps",
}


def _column(name: str, values: np.ndarray, n: int) -> np.ndarray:
    """A column of n images as int64, is_test as bool; raises ValueError where it cannot be one."""
    shape = (n, *values.shape[1:2]) if name == "targets" else (n,)
    # Classes without gaps are fewer than the images.
    most = {"identities": 2**63 - 1, "is_test": 1}.get(name, n - 1 if values.ndim == 1 else 1)
    fits = values.shape == shape and values.size > 0 and values.dtype.kind in "biuf"
    # NaN compares as false.
    if not fits or not ((values >= 0) & (values <= most) & (values == np.floor(values))).all():
        raise ValueError(f"{name} must be {COLUMNS[name]}, N = {n:,}")
    return values.astype(bool if name == "is_test" else np.int64)


def load(args, device=CPU) -> dict:
    """Load the prepared pair of --dataset and flip labels by --label-noise; sets args.image_size.

    images (N, S, S, 3) are uint8, memory-mapped, or on the GPU when they fit; classes is K; digest
    names annotations and images; true_targets are the targets before any flip; identities, is_test
    and groups (what --forget-classes numbers) are None where the data has none.
    """
    images, table = _read_pair(prepare(args))
    targets, digest = table["targets"], hashlib.sha256()
    if args.dataset in PRESETS:  # hashed while it was prepared
        digest.update(str(table["images_digest"]).encode())
    else:
        for i in range(0, len(images), 256):  # 2 GB/s
            digest.update(np.ascontiguousarray(images[i : i + 256]))
    for name in [name for name in COLUMNS if name in table]:
        digest.update(name.encode() + table[name].tobytes())
    groups = targets if targets.ndim == 1 else None
    if args.forget == "subclass":  # the model learns super-classes; a member of one is forgotten
        if "coarse" not in table:
            fail(f"--forget subclass needs super-classes; {args.dataset} has none, cifar100 has")
        targets = table["coarse"]
        table["target_names"] = table.get("coarse_names", np.unique(targets).astype(str))
    same = (targets == targets[0]).all(0)  # () or (K,)
    if same.all():
        fail(f"{args.dataset}: all images have the same label; two classes, or values, are needed")
    targets = torch.from_numpy(targets).to(torch.float32 if targets.ndim == 2 else torch.int64)
    classes = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    args.image_size, images = images.shape[1], torch.from_numpy(images)
    if device.type == "cuda" and images.nbytes < 0.4 * torch.cuda.mem_get_info(device)[0]:
        images = images.to(device)
    data = {"name": pathlib.Path(args.dataset).name, "classes": classes, "device": device}
    data |= {"images": images, "targets": targets, "true_targets": targets, "groups": groups}
    data |= {"is_test": table.get("is_test"), "identities": table.get("identities")}
    data["digest"] = digest.hexdigest()[:16]
    data["names"] = table.get("names", np.arange(len(targets)).astype(str))
    data["target_names"] = table.get("target_names", np.arange(classes).astype(str))
    if same.any():
        few = ", ".join(map(str, data["target_names"][np.flatnonzero(same)]))
        say(f"{data['name']}: all images have the same {few}; no model can learn it")
    return flip_labels(data, args.label_noise, args.split_seed) if args.label_noise else data


def of_tensors(model, parts: dict) -> tuple[dict, dict]:
    """`data` and `split`, as load and make_split give them, of somebody's own images in memory.

    model: see common.Own. parts: {name of a set: (images, targets), or a Dataset or DataLoader of
    such pairs}. Images are floats (N, C, H, W) as the model takes them, and are not augmented;
    targets are classes (N,), or attributes (N, K) of 0 and 1.
    """
    pairs, split, first = [], {"hash": "own"}, 0
    for name, part in parts.items():
        if not isinstance(part, (tuple, list)):
            loader = part if isinstance(part, DataLoader) else DataLoader(part, 256)
            part = [torch.cat(own) for own in zip(*loader, strict=True)]
        pairs.append(part)
        split[name] = list(range(first, first + len(part[1])))
        first += len(part[1])
    images, targets = (torch.cat([part[i] for part in pairs]) for i in (0, 1))
    targets = (targets.float() if targets.ndim == 2 else targets.long()).cpu()
    device = next(model.parameters()).device
    data = {"name": "own", "images": images, "targets": targets, "true_targets": targets}
    with torch.no_grad():
        data["classes"] = model.eval()(images[:1].to(device))[1].shape[1]
    return data | {"device": device, "identities": None}, split


def flip_labels(data: dict, share: float, split_seed: int) -> dict:
    """Give `share` of all images another class, uniform over the others; true_targets stays right.

    A wrong label is only known by remembering its image, so memorising becomes visible.
    """
    if data["targets"].ndim == 2:
        fail(f"--label-noise flips classes; {data['name']} has attributes")
    rng = np.random.default_rng([split_seed, 14])
    n, targets = len(data["targets"]), data["targets"].clone()
    chosen = rng.choice(n, round(share * n), replace=False)
    steps = torch.from_numpy(rng.integers(1, data["classes"], len(chosen)))
    targets[chosen] = (targets[chosen] + steps) % data["classes"]
    return data | {"targets": targets, "digest": f"{data['digest']}-noise{share:g}-{split_seed}"}


def raw_batch(data: dict, indices) -> Tensor:
    """Images at indices in [0, 1], as they are seen at test time: (B, 3, H, W) on the device."""
    data["read"] = data.get("read", 0) + len(indices)  # the cost of a method, in images
    images = data["images"][torch.as_tensor(np.asarray(indices), device=data["images"].device)]
    if images.is_floating_point():  # of_tensors
        return images.to(data["device"])
    return images.to(data["device"]).permute(0, 3, 1, 2).float() / 255


def batches(indices: Tensor, size: int, rng: torch.Generator, least=2) -> list[Tensor]:
    """The indices in random order, `size` at a time; the last batch may be smaller.

    One with fewer than `least` joins the batch before: batch norm cannot train on a single image.
    """
    parts = list(indices[torch.randperm(len(indices), generator=rng)].split(size))
    if len(parts) > 1 and len(parts[-1]) < least:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def targets_of(data: dict, indices) -> Tensor:
    """Labels at indices on the device: (B, K) or (B,)."""
    return data["targets"][torch.as_tensor(np.asarray(indices))].to(data["device"])


def random_labels(data: dict, pool: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """y_rand of k images (LTU Eq. 6, SalUn): (k,), uniform over all classes, the true one included.

    Attributes, whose labels are not independent coin flips: (k, K), of random images of `pool`.
    """
    if data["targets"].ndim == 1:
        return torch.randint(data["classes"], (k,), generator=rng).to(data["device"])
    return targets_of(data, pool[torch.randint(len(pool), (k,), generator=rng)])


@torch.no_grad()
def predict(model, data: dict, indices, amp=False, batch_size=256, features=False) -> Tensor:
    """Logits (N, K) of the images at `indices`, or with features=True the features (N, D).

    In eval mode; the result is float32 and on the CPU. Under torchrun every process takes its
    share, and all get the whole result.
    """
    was_training = model.training
    model.eval()
    rank, world = rank_and_world()
    if len(indices) < world:  # too few to share: every process takes them all
        rank, world = 0, 1
    own, parts = indices[rank::world], []
    for start in range(0, len(own), batch_size):
        with autocast(data["device"], amp):
            both = model(raw_batch(data, own[start : start + batch_size]))  # (B, D), (B, K)
        parts.append(both[0 if features else 1].float().cpu())
    model.train(was_training)
    shares = [torch.cat(parts)] * world
    if world > 1:
        torch.distributed.all_gather_object(shares, shares[rank])
    whole = shares[0].new_empty(len(indices), shares[0].shape[1])
    for r, share in enumerate(shares):
        whole[r::world] = share
    return whole


# --------------------------------------------------------------------------------------------------
# Splits, requests and controls


def identity_split(data: dict, ids: int, split_seed: int, held_out=False) -> dict:
    """Split by identity and draw who is forgotten (METAUNLEARN Sec. 3.3, Fig. 2).

    The paper only says to split by identity; 60/20/20 by images is the authors' code. Returns lists
    of image indices `retain` (D_r), `forget` (D_f), `support` (S, one image of each forget
    identity, never trained on), `val`, `test`; `forget_ids` in the order of `support`; `train_ids`;
    `hash`. A smaller forget set is the beginning of a larger one, with the same Support images.
    held_out (ours): `held_out`, a further image of each training identity with three or more, is
    never trained on either: see simulated_requests. Raises SystemExit(2) for too few identities.
    """
    identities, name = data["identities"], data["name"]
    if identities is None:
        fail(f"{name} has no identities; forget images: ltu.py, or --forget random or class")
    unique, count = np.unique(identities, return_counts=True)
    order = np.random.default_rng([split_seed, 0]).permutation(len(unique))
    share = np.cumsum(count[order]) / len(identities)
    train, val, test = np.split(order, np.searchsorted(share, [0.6, 0.8], side="right"))
    if min(len(train), len(val), len(test)) == 0:
        fail(f"{name}: {len(unique)} identities are too few for train, validation and test")
    candidates = np.random.default_rng([split_seed, 1]).permutation(train)
    eligible = candidates[count[candidates] > 1]  # with a single image, in S, none would be in D_f
    most = min(len(eligible), len(train) - 1)
    if ids > most:
        why = "they need two images, and someone must stay"
        fail(f"--ids {ids}: only {most} training identities of {name} can be forgotten ({why})")
    forget_ids = unique[eligible[:ids]]

    def one_of(identity, key, taken=()):
        own = np.setdiff1d(np.flatnonzero(identities == identity), taken)
        return int(np.random.default_rng([split_seed, key, identity]).choice(own))

    support = [one_of(i, 2) for i in forget_ids]
    spare = [one_of(i, 14, support) for i in unique[train[count[train] > 2]]] if held_out else []

    def images_of(chosen):
        own = np.flatnonzero(np.isin(identities, chosen))
        return np.setdiff1d(own, support + spare).tolist()

    split = {"retain": images_of(np.setdiff1d(unique[train], forget_ids))}
    split |= {"forget": images_of(forget_ids), "support": support}
    split |= {"val": images_of(unique[val]), "test": images_of(unique[test])}
    split |= {"forget_ids": forget_ids.tolist(), "train_ids": unique[np.sort(train)].tolist()}
    if held_out:
        split["held_out"] = spare
    split["hash"] = hashlib.sha256(json.dumps([split, data["digest"]]).encode()).hexdigest()[:16]
    return split


def simulated_requests(data: dict, split: dict, n_s: int, seed: int, epoch: int):
    """Yield (support, forget) index arrays of simulated requests (METAUNLEARN Sec. 4.1, Alg. 1).

    An epoch passes over all training identities without replacement, n_s at a time; the last block
    is filled from the beginning. Of each identity one random training image is the simulated
    Support, the others are in the simulated D_f (Sec. 3.3; Alg. 1 line 3 leaves the Support in D_f
    too); a single image is in both. The real Support set is never touched. Unlike it, simulated
    Support images were in the training set, but with --held-out (ours) they were not.
    """
    rng = np.random.default_rng([seed, epoch, 3])
    trained_on = np.array(split["retain"] + split["forget"])
    owner = data["identities"][trained_on]
    order = rng.permutation(split["train_ids"])
    order = order[np.isin(order, owner)]  # in a dry run some have no image left
    held_out = {data["identities"][i]: i for i in split.get("held_out", ())}
    n_s = max(1, min(n_s, len(order) - 1))  # somebody stays
    for start in range(0, len(order), n_s):
        support, forget = [], []
        for i in range(start, start + n_s):
            identity = order[i % len(order)]  # Alg. 1, line 2
            own = trained_on[owner == identity]
            chosen = held_out[identity] if identity in held_out else own[rng.integers(len(own))]
            support.append(chosen)  # line 5
            forget.extend(own[own != chosen] if len(own) > 1 else own)  # line 3
        # Line 4, D_r, is what is left: see metaunlearn.request_sets.
        yield np.array(support), np.array(forget)


def random_split(data: dict, args) -> dict:
    """Split into train, validation and test, and draw the images to forget (LTU Sec. 4.1).

    Test is the publisher's, else a random quarter; validation is 10 % of each class of the rest
    (SalUn's split). --forget random: a random --forget-ratio of the training images; a smaller set
    is the beginning of a larger one. --forget class, subclass: all training images of
    --forget-classes, whose images leave validation and test too; those of the test set stand in
    `test_forgotten`. Returns sorted lists of image indices and `hash`, as identity_split does.
    Raises SystemExit(2) where a class or a set would be empty.
    """
    labels, kinds, is_test = data["targets"].numpy(), data["groups"], data["is_test"]
    n, seed = len(labels), args.split_seed
    if is_test is None:
        is_test = np.random.default_rng([seed, 10]).permutation(n) < n // 4
    rest = np.random.default_rng([seed, 11]).permutation(np.flatnonzero(~is_test))
    if args.train_images:
        rest = rest[: args.train_images]
    if kinds is None:  # attributes: no classes to take equal shares of
        kinds = np.zeros(n, int)
    by_class = [rest[kinds[rest] == c] for c in np.unique(kinds)]
    val = np.concatenate([own[: round(0.1 * len(own))] for own in by_class])
    train, test = rest[~np.isin(rest, val)], np.flatnonzero(is_test)
    if args.forget == "random":
        order = np.random.default_rng([seed, 12]).permutation(train)
        gone, forget = np.zeros(n, bool), order[: round(args.forget_ratio * len(train))]
    else:
        if data["groups"] is None:
            fail(f"--forget {args.forget} needs classes; {data['name']} has attributes")
        known, wanted = set(np.unique(kinds).tolist()), set(args.forget_classes)
        if not wanted < known:
            absent = f"absent: {sorted(wanted - known)}"
            fail(f"--forget-classes: classes are 0 to {max(known)}, and one must stay; {absent}")
        gone = np.isin(kinds, args.forget_classes)  # (N,)
        forget = train[gone[train]]
    retain = train[~np.isin(train, forget)]
    if args.forget != "class" and labels.ndim == 1:
        of_all, left = (np.bincount(labels[i], minlength=data["classes"]) for i in (train, retain))
        if of_all.min() == 0:
            why = "classes must be numbered from 0 without gaps, and --train-images not too few"
            fail(f"class {of_all.argmin()} has no training image; {why}")
        if left.min() == 0:
            few = f"forgetting {len(forget):,} of {len(train):,} images"
            fail(f"{few} leaves none of class {left.argmin()}; forget less of it")
    if len(forget) == 0 or len(retain) == 0:
        fail(f"D_f has {len(forget):,} images and D_r {len(retain):,}: neither may be empty")
    split = {"retain": retain, "forget": forget, "val": val[~gone[val]], "test": test[~gone[test]]}
    if not len(split["val"]) or not len(split["test"]):
        few = f"{len(val)} images for validation and {len(test)} for testing"
        fail(f"{data['name']} leaves {few}; give more (ten of a class make one for validation)")
    split["test_forgotten"] = test[gone[test]]
    split = {name: np.sort(part).tolist() for name, part in split.items()}
    split["hash"] = hashlib.sha256(json.dumps([split, data["digest"]]).encode()).hexdigest()[:16]
    return split


def make_split(data: dict, args) -> dict:
    """Split as --forget says, by identity or at random; with --dry-run a short version of it."""
    if args.forget == "identities":
        split = identity_split(data, args.ids, args.split_seed, args.held_out)
    else:
        split = random_split(data, args)
    return shortened(data, split) if args.dry_run else split


def setting(args) -> str:
    """What is forgotten from what, as the name of a folder of checkpoints and results."""
    names = {"identities": f"ids{args.ids}", "random": f"random{args.forget_ratio:g}"}
    name = names.get(args.forget) or args.forget + "+".join(str(c) for c in args.forget_classes)
    if len(name) > 100:  # the name of a folder has 255 bytes at most
        name = f"{args.forget}-{hashlib.md5(name.encode()).hexdigest()[:8]}"
    name += "-heldout" if args.held_out else ""
    name += f"-n{args.train_images}" if args.train_images else ""
    name += f"-noise{args.label_noise:g}" if args.label_noise else ""
    return f"{name}-split{args.split_seed}" + ("-dry" if args.dry_run else "")


def reachable(split: dict, rho: float, split_seed: int) -> list[int]:
    """D_r-hat, the share rho of D_r that a method may use (LTU Sec. 3.2); nested over rho."""
    order = np.random.default_rng([split_seed, 13]).permutation(split["retain"])
    return np.sort(order[: round(rho * len(order))]).tolist()


def shortened(data: dict, split: dict) -> dict:
    """A dry run's split: 64 images of D_r, D_f, D_v, D_te; in D_f one of each person at least."""
    forget, people = np.array(split["forget"]), split.get("forget_ids", [0])
    owner = data["identities"][forget] if "forget_ids" in split else 0 * forget
    own = [forget[owner == i][: max(1, 64 // len(people))] for i in people]
    short = {name: split[name][:64] for name in ("retain", "val", "test")}
    short["hash"] = hashlib.sha256(f"dry {split['hash']}".encode()).hexdigest()[:16]
    return split | short | {"forget": np.sort(np.concatenate(own)).tolist()}


def control_sets(data: dict, split: dict, seen=(), sets=20) -> list[np.ndarray]:
    """Positions within D_r of `sets` random sets that were not forgotten.

    They tell forgetting these people, or images, from lowering everything. By identity: as many
    retained identities as are forgotten. At random: as many images as D_f has, outside `seen` (what
    the method may use of D_r); where fewer than 50 are unseen, from all of D_r. At most half of
    what there is to choose from, else all sets would be the same.
    """
    rng = np.random.default_rng([int(split["hash"], 16) % 2**32, 4])
    if "forget_ids" in split:
        owner = data["identities"][split["retain"]]
        people = np.unique(owner)
        size = min(len(split["forget_ids"]), max(1, len(people) // 2))
        drawn = [rng.choice(people, size, replace=False) for _ in range(sets)]
        return [np.flatnonzero(np.isin(owner, chosen)) for chosen in drawn]
    pool = np.flatnonzero(~np.isin(split["retain"], list(seen)))
    if len(pool) < 50:
        pool = np.arange(len(split["retain"]))
    size = min(len(split["forget"]), len(pool) // 2)
    return [np.sort(rng.choice(pool, size, replace=False)) for _ in range(sets)]


def describe(data: dict, split: dict) -> str:
    """The data set, the size of each part and the split's hash in one line."""
    if "support" in split:
        people = len(np.unique(data["identities"]))
        of = f"{people:,} identities ({len(split['train_ids']):,} for training)"
    else:
        of = f"{data['classes']} {'classes' if data['targets'].ndim == 1 else 'attributes'}"
        flipped = (data["targets"] != data["true_targets"]).float().mean()
        of += f", {100 * flipped:.0f} % of the labels flipped" if flipped else ""
    sets = {"D_r": "retain", "D_f": "forget", "S": "support", "D_v": "val", "D_te": "test"}
    parts = ", ".join(f"{name} {len(split[key]):,}" for name, key in sets.items() if key in split)
    of = f"{len(data['targets']):,} images of {of}"
    return f"{data['name']}: {of}; {parts}; split {split['hash']}"


# --------------------------------------------------------------------------------------------------
# Augmentation

PAD = 4  # pixels of black around the image, as torchvision's RandomCrop(32, padding=4) (SalUn)


def draw_augmentation(B: int, args, rng: torch.Generator) -> Tensor:
    """Draw for B images what --augment asks for, on the CPU: the same for every device and process.

    resized-crop: (B, 2, 3) affine maps; pad-crop: (B, 3), row, column and flip; none: (B, 0).
    """
    if args.augment == "resized-crop":
        return random_crops(B, args.image_size, args.crop_scale, rng)
    if args.augment == "pad-crop":
        corner = torch.randint(0, 2 * PAD + 1, (B, 2), generator=rng)
        return torch.cat([corner, torch.randint(0, 2, (B, 1), generator=rng)], 1)
    return torch.zeros(B, 0)


def augmented(data: dict, indices, args, rng: torch.Generator) -> Tensor:
    """Images at indices as the last epochs of training saw them: (B, 3, S, S) on the device.

    With --plain-epochs these are not augmented. A model that ended on plain images knows its
    training images by them: on others D_f already looks unseen (results/LOG.md).
    """
    if args.plain_epochs:
        return raw_batch(data, indices)
    return augment(raw_batch(data, indices), draw_augmentation(len(indices), args, rng))


def augment(images: Tensor, drawn: Tensor) -> Tensor:
    """Apply what draw_augmentation drew, to all images at once: (B, 3, S, S) -> (B, 3, S, S)."""
    if drawn.ndim == 3:
        return crop(images, drawn)
    return pad_crop(images, drawn) if drawn.shape[1] else images


def pad_crop(images: Tensor, drawn: Tensor) -> Tensor:
    """Pad by PAD black pixels, cut (S, S) at each corner, flip some: (B, 3, S, S) -> the same."""
    B, S = len(images), images.shape[-1]
    row, column, flip = drawn.to(images.device)[..., None, None].unbind(1)  # (B, 1, 1) each
    along = torch.arange(S, device=images.device)
    columns = column + torch.where(flip > 0, S - 1 - along, along)  # (B, 1, S)
    padded = F.pad(images, (PAD,) * 4).permute(0, 2, 3, 1)  # (B, S + 2 PAD, S + 2 PAD, 3)
    image = torch.arange(B, device=images.device)[:, None, None]
    return padded[image, row + along[:, None], columns].permute(0, 3, 1, 2)


def random_crops(B: int, S: int, scale: float, rng: torch.Generator) -> Tensor:
    """Draw torchvision's RandomResizedCrop(scale=(scale, 1)) and flip for B images of S x S pixels.

    Returns (B, 2, 3) affine maps for `crop`, on the CPU. Source: METAUNLEARN App. A.
    """
    # Ten tries for each image, as in torchvision; where none fits, the whole image.
    area = S * S * (scale + (1 - scale) * torch.rand(B, 10, generator=rng))
    ratio = torch.exp((torch.rand(B, 10, generator=rng) * 2 - 1) * np.log(4 / 3))
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (B, 10)
    fits = (width <= S) & (height <= S) & (width > 0) & (height > 0)
    first = fits.float().argmax(1, keepdim=True)  # (B, 1)
    width, height = (torch.where(fits.any(1), x.gather(1, first)[:, 0], S) for x in (width, height))
    left, top = ((torch.rand(B, generator=rng) * (S - x + 1)).floor() for x in (width, height))
    flip = torch.where(torch.rand(B, generator=rng) < 0.5, -1.0, 1.0)
    # An output pixel at x in [-1, 1] looks at the crop's centre + x * half its width, in [-1, 1].
    maps = torch.zeros(B, 2, 3)
    maps[:, 0, 0], maps[:, 0, 2] = flip * width / S, (2 * left + width) / S - 1
    maps[:, 1, 1], maps[:, 1, 2] = height / S, (2 * top + height) / S - 1
    return maps


def crop(images: Tensor, maps: Tensor) -> Tensor:
    """Cut each image's crop and enlarge it to the image's size: (B, 3, S, S) -> (B, 3, S, S)."""
    grid = F.affine_grid(maps.to(images.device), list(images.shape), align_corners=False)
    # Clamping to the centre of the outermost pixels is padding_mode="border", which MPS lacks. Only
    # shrinking would need antialiasing, and a crop is never larger than the image.
    edge = 1 - 1 / images.shape[-1]
    return F.grid_sample(images, grid.clamp(-edge, edge), mode="bilinear", align_corners=False)


# --------------------------------------------------------------------------------------------------
# Pictures and labels of a few people, as files


def write_pictures(data: dict, indices, folder):
    """Write images as PNG, and labels.csv: file, identity, one column an attribute, or class."""
    folder, multilabel = pathlib.Path(folder), data["targets"].ndim == 2
    names = [str(name) for name in data["target_names"]]
    rows = [["file", "identity", *(names if multilabel else ["class"])]]
    for i in indices:
        with common.atomic_write(folder / f"{i}.png") as temporary:
            Image.fromarray(data["images"][i].cpu().numpy()).save(temporary, format="PNG")
        label = data["targets"][i].int().tolist()
        rows.append([f"{i}.png", int(data["identities"][i])])
        rows[-1] += label if multilabel else [names[label]]
    with common.atomic_write(folder / "labels.csv") as path, open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    say(f"pictures and labels.csv written to {folder}")


def read_labels(table: pathlib.Path, names=None, multilabel=False) -> tuple:
    """Read a CSV file with columns file, identity, and class or one of 0 and 1 for each attribute.

    names: the classes or attributes to expect, and identities by number; None: whatever it has.
    Returns its rows, targets (N,) or (N, K), names. Raises SystemExit(2) for a column or value that
    is missing or wrong.
    """
    text = _text(table)
    mark = max(",;\t", key=text.partition("\n")[0].count)  # spreadsheets write any of the three
    rows = list(csv.DictReader(text.splitlines(), delimiter=mark, skipinitialspace=True))
    if not rows:
        fail(f"{table} has no rows")
    found, own = [c for c in rows[0] if c and c not in ("file", "identity")], names is None
    if own and found not in ([], ["class"]):
        names, multilabel = found, True
    columns = names if multilabel else ["class"]
    for column in ("file", *([] if own else ["identity"]), *columns):
        if column not in rows[0]:
            fail(f"{table} has no column {column}, only {', '.join(map(str, rows[0]))}")
    names = names or sorted({str(row["class"]) for row in rows})
    number = {label: i for i, label in enumerate("01" if multilabel else names)}
    for row in rows:
        wrong = [column for column in columns if row[column] not in number]
        wrong += [column for column in ("file", "identity", "class") if not row.get(column, "-")]
        wrong += [] if own or (row["identity"] or "").isdecimal() else ["identity"]
        if wrong:
            known = f"; labels are {', '.join(number)}"[:60]
            fail(f"{table}: {wrong[0]} of {row['file']} is {row[wrong[0]]!r}{known}")
    targets = np.array([[number[row[column]] for column in columns] for row in rows])  # (N, K)
    return rows, targets if multilabel else targets[:, 0], names


def read_pictures(folder, names: list, multilabel: bool, size: int) -> tuple:
    """Read what write_pictures writes: images (N, 3, size, size) in [0, 1], targets, identities.

    names: of the attributes or classes. Raises SystemExit(2) as read_labels, or for a picture.
    """
    table = pathlib.Path(folder) / "labels.csv"
    if not table.is_file():
        columns = ", ".join(["file", "identity", *(names[:3] if multilabel else ["class"])])
        fail(f"--support {folder}: no labels.csv there (columns: {columns} ...)")
    rows, targets, _ = read_labels(table, names, multilabel)
    images = [_decode(table.parent / row["file"], size) for row in rows]
    for broken in [image for image in images if isinstance(image, str)]:
        fail(f"{table}: {broken} cannot be used as a picture")
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(targets), [int(row["identity"]) for row in rows]


def from_folder(args):
    """Prepare a pair from the pictures of --from-folder, and say what was found there.

    labels.csv names the pictures; without it each folder is a class. Sets --dataset to the pair,
    <data-dir>/prepared/<the folder's name>, and --forget to random where there are no identities.
    """
    folder, table = pathlib.Path(args.from_folder).resolve(), {}
    if (folder / "labels.csv").is_file():
        rows, targets, names = read_labels(folder / "labels.csv")
        images = [folder / row["file"] for row in rows]
        if "identity" in rows[0]:
            people = [row["identity"] for row in rows]
            if not all(who.isdecimal() and len(who) < 19 for who in people):
                people = np.unique(people, return_inverse=True)[1]
                say("people get numbers from 0 by the order of their names; --support takes these")
            table["identities"] = np.array(people, int)
    else:
        known = Image.registered_extensions()
        images = [file for file in sorted(folder.glob("*/*")) if file.suffix.lower() in known]
        if not images:
            fail(f"{folder} has neither labels.csv nor pictures in folders, one folder a class")
        names, targets = np.unique([file.parent.name for file in images], return_inverse=True)
    kind, count = "attributes", targets.sum(0)
    if targets.ndim == 1:
        kind, count = "classes", np.bincount(targets)
    listed = ", ".join([f"{i} {name} ({count[i]})" for i, name in enumerate(names)][:20])
    found = f"{len(images):,} pictures of {len(names)} {kind}, {min(count)} at least: {listed}"
    if table:
        count = np.unique(table["identities"], return_counts=True)[1]
        found += f"; {len(count):,} people, {min(count)} pictures of each at least"
    elif args.forget == "identities":
        args.forget = "random"
    needed = "at least two pictures of each of 2 + 2 * --ids people; or, at random, ten of a class"
    say(f"found {found}\nneeded: {needed}")
    base = pathlib.Path(args.data_dir) / "prepared" / folder.name
    common.check_writable(base.parent)
    table |= {"images": images, "targets": targets, "target_names": names}
    table["names"] = [os.path.relpath(image, folder) for image in images]
    _write_pair(base, table, args.image_size)
    args.dataset = str(base)


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    common.add_shared_arguments(parser)
    text = "prepare your own pictures: folders by class, or labels.csv (file, identity, labels)"
    parser.add_argument("--from-folder", metavar="DIR", help=text)
    return common.parse_with_presets(parser, PRESETS, argv)


def main(argv=None):
    args = parse_args(argv)
    if args.from_folder:
        from_folder(args)
    data = load(args)
    print(describe(data, make_split(data, args)))
    if args.from_folder:
        by_identity = args.forget == "identities"
        script = f"metaunlearn.py --ids {args.ids}" if by_identity else "ltu.py --forget random"
        print(f"next: python {script} --dataset {shlex.quote(args.dataset)}")


if __name__ == "__main__":
    common.guarded(main)
