"""What several test files share: a small data set, a check of error messages, a record of reads."""

import contextlib
import inspect
import os
import sys
import types

# One thread: beside another busy process, two that wait for each other take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import data as D  # noqa: E402


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The path of a prepared pair, as --dataset takes it: 40 identities x 4 drawn faces, 16 px."""
    folder = tmp_path_factory.mktemp("small")
    table = D.draw_toyfaces(identities=40, images_each=4, size=16)
    np.save(folder / "small.npy", table.pop("images"))
    np.savez(folder / "small.npz", **table)
    return str(folder / "small")


def places(folder):
    """Flags that keep everything a run writes below `folder`."""
    out, checkpoints = str(folder / "out"), str(folder / "ckpt")
    where = ["--out", out, "--checkpoint-dir", checkpoints, "--data-dir", str(folder)]
    return ["--device", "cpu", *where]


@pytest.fixture
def flags(small, tmp_path):
    """Flags of a training run on `small` that takes a few seconds and writes into tmp_path."""
    short = ["--ids", "4", "--epochs", "3", "--batch-size", "32"]
    return ["--dataset", small, *places(tmp_path), *short]


def refused(capsys, words, call, *arguments):
    """`call` must end with code 2 and one line on stderr that holds `words`; returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert words in lines[0], lines
    return lines[0]


def mutated(module, old: str, new: str, function=None):
    """A copy of a module with `old`, which must stand there (or in a function) once, as `new`."""
    source = inspect.getsource(module)
    body = inspect.getsource(getattr(module, function)) if function else source
    assert body.count(old) == 1, f"{old!r} stands {body.count(old)} times in {function or module}"
    mutant = types.ModuleType("mutant")
    mutant.__file__ = module.__file__
    exec(compile(source.replace(body, body.replace(old, new)), "mutant", "exec"), vars(mutant))
    return mutant


def weights(folder, name) -> dict:
    """The state_dict in the one checkpoint of a run in a folder."""
    (path,) = folder.rglob(f"{name}-seed0.pt")
    return torch.load(path, weights_only=True)["model"]


@contextlib.contextmanager
def record_reads():
    """A list that grows by the indices of each call of raw_batch, from any module."""
    real, read = D.raw_batch, []

    def spy(data, indices):
        read.append(np.asarray(indices))
        return real(data, indices)

    modules = [m for m in list(sys.modules.values()) if getattr(m, "raw_batch", None) is real]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "raw_batch", spy)
        yield read
