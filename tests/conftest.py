"""A small data set that trains in a second: 40 identities x 4 drawn faces at 16 px."""

import numpy as np
import pytest

import data as D


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The path of a prepared pair, as --dataset takes it."""
    folder = tmp_path_factory.mktemp("small")
    table = D.draw_toyfaces(identities=40, images_each=4, size=16)
    np.save(folder / "small.npy", table.pop("images"))
    np.savez(folder / "small.npz", **table)
    return str(folder / "small")


@pytest.fixture
def flags(small, tmp_path):
    """Flags of a run that takes a few seconds and writes into tmp_path."""
    folders = ["--out", str(tmp_path / "out"), "--checkpoint-dir", str(tmp_path / "ckpt"), "--data-dir", str(tmp_path)]
    short = ["--ids", "4", "--epochs", "3", "--batch-size", "32", "--meta-epochs", "2", "--hidden", "16"]
    return ["--dataset", small, "--device", "cpu", *folders, *short]
