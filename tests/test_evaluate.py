"""evaluate.py against numpy, scipy, scikit-learn, plain loops, golden text, and itself changed.

python -m pytest tests/test_evaluate.py
"""

import copy
import csv
import json
import math
import pathlib
import re
import subprocess
import types

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mutated, places, record_reads, refused
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

import baselines
import common
import data as D
import evaluate as E
import metaunlearn
import train as T

ROOT, CPU = pathlib.Path(__file__).parent.parent, torch.device("cpu")
PAPERS = ROOT.parent / "shared" / "papers"
COMMITTED = sorted((ROOT / "results").glob("*.jsonl"))

# Runs whose figures are known: scores of D_r, D_f and D_te, and MI, in percent.
ORIGINAL, GOLD = (98.0, 97.0, 80.0, 1.0), (96.0, 85.0, 81.0, 30.0)
GA = [(95.0, 90.0, 79.0, 10.0), (94.0, 88.0, 80.0, 20.0), (96.0, 91.0, 78.0, 15.0)]
META = [(97.0, 93.0, 80.0, 5.0), (97.5, 92.0, 80.0, 6.0), (96.5, 96.0, 79.0, 7.0)]


def made_row(figures):
    values = zip(("retain", "forget", "test"), figures, strict=False)
    row = {s: {"score": v / 100, "accuracy": v / 100} for s, v in values}
    return row | {"control": {"score": [figures[0] / 100] * 2}, "mi": figures[3] / 100}


def write(folder, name, k, unlearned, forget="identities", original=ORIGINAL, **more):
    """Write a made run of split seed k where a method would; returns its path."""
    rows = {"original": original, "retrained": GOLD, "unlearned": unlearned}
    run = dict(name=name, dataset="x", setting=f"y-split{k}", seed=0, split_seed=k)
    run |= dict(metrics={row: made_row(v) for row, v in rows.items()}, split_hash="aaaa")
    run |= dict(access={"unlearning": ["support"]}, seconds={"unlearn": 1.5, "retrain": 99.0})
    run |= dict(metric="mAP")
    path = folder / f"x-y-split{k}" / f"{name}-seed0.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    run |= {"flags": {"forget": forget, "lr": 0.1}} | more
    path.write_text(json.dumps({key: value for key, value in run.items() if value is not None}))
    return path


@pytest.fixture
def faces(tmp_path):
    searched = dict(search=[{"lr": 1.0, "distance": 0.5}] * 2, passes=0.2, retrain_passes=27.0)
    for k in range(3):
        nothing = [0.6, 0.5, None][k]  # a run from before it was kept has none
        write(tmp_path, "ga", k, GA[k], open=["lr"] * (k == 1), nothing=nothing, **searched)
        write(tmp_path, "metaunlearn-paper", k, META[k])
    return tmp_path


def printed(capsys, path, name="mu1", *more, module=E) -> str:
    """What --table prints of a packed file, or of all folders of runs in a folder."""
    paths = [path] if path.suffix else sorted(path.glob("*-split*"))
    capsys.readouterr()
    module.main(["--table", name, "--results", *map(str, paths), *more])
    return capsys.readouterr().out


def cells(folder, name, column="") -> dict:
    """{label: {head: text}} of the table of all runs in a folder."""
    kind, reference = ("mu", "METAUNLEARN") if name.startswith("mu") else ("ltu", "LTU")
    runs = E.read_results(sorted(folder.glob("*-split*")))[1]
    rows = E.rows_of(E.collect(E.TABLES[name], runs)[0], kind)
    heads, *lines = E.table_lines(rows, kind, E.paper_numbers(name, column), reference)
    return {line[0]: dict(zip(heads, line, strict=True)) for line in lines}


def spread(values) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


# --------------------------------------------------------------------------------------------------
# Statistics and tables


def test_a_drawn_table_shows_every_split(faces, monkeypatch, capsys):
    """One dot a split, at what the raw rows say; their mean; dotted, gold's."""
    kept = []
    monkeypatch.setattr(E, "save_figure", lambda canvas, path: kept.append(canvas))
    printed(capsys, faces, "mu1", "--plot", str(faces / "new" / "mu1.png"))
    tow, lost = kept[0].axes
    labels = [text.get_text().split(" (n")[0] for text in tow.get_yticklabels()]
    drawn = {}
    for which, axes in (("tow", tow), ("lost", lost)):
        for group in axes.collections:
            for x, row in group.get_offsets().tolist():
                drawn.setdefault((which, labels[int(row)]), []).append(x)
    for label, runs in (("GA", GA), ("METAUNLEARN", META)):
        gaps = [[1 - abs(a - b) / 100 for a, b in zip(run, GOLD, strict=True)][:3] for run in runs]
        wanted = [100 * np.prod(g) for g in gaps]
        assert np.allclose(drawn["tow", label], [*wanted, np.mean(wanted)])
        wanted = [(ORIGINAL[1] - run[1]) - (ORIGINAL[0] - run[0]) for run in runs]
        assert np.allclose(drawn["lost", label], [*wanted, np.mean(wanted)])
    assert np.allclose(tow.lines[0].get_xdata(), 100)
    gold = (ORIGINAL[1] - GOLD[1]) - (ORIGINAL[0] - GOLD[0])
    assert np.allclose(lost.lines[0].get_xdata(), gold)


def test_interval_and_verdict_are_students():
    """Within noise exactly where scipy's paired t-test has p > 0.05; the sign says which way."""
    rng, seen, opposite = np.random.default_rng(0), set(), {"better": "worse", "worse": "better"}
    for n in [2, 3, 4, 10] * 50:
        a, b = rng.normal(rng.normal(), 1, n), rng.normal(0, 1, n)
        mean, half = E.interval(a - b)
        low, high = stats.ttest_1samp(a - b, 0).confidence_interval(0.95)
        assert np.allclose([mean - half, mean + half], [low, high], rtol=1e-12)
        said = "better" if a.mean() > b.mean() else "worse"
        if stats.ttest_rel(a, b).pvalue > 0.05:
            said = "within noise"
        seen.add(said)
        assert E.verdict(mean, half, True) == said
        assert E.verdict(mean, half, False) == opposite.get(said, said)
    assert "one split" in E.difference([(1.0, 1.0)], True)
    tiny = [(1.01, 1.0), (1.011, 1.0), (1.012, 1.0)]
    assert len(seen) == 3 and E.difference(tiny, True) == "+0.0 ± 0.0 (no difference)"
    assert E.verdict(*E.interval([1.0]), True) == "one split"
    assert E.verdict(*E.interval([0.0, 0.0]), True) == "within noise"


def test_average_gap_against_numpy_and_ltu_at_the_same_rho(tmp_path):
    level, gap = {"FT, rho 0.1": 90, "LTU, rho 0.1": 80, "FT, rho 0.3": 90, "LTU, rho 0.3": 95}, {}
    took = {"unlearn": 1.0, "mi_models": 2.0, "retrain": 9.0}
    for label, value in level.items():
        rows = [np.array([value + k, value - 2 * k, value, 30]) for k in range(2)]
        gap[label] = [np.abs(row - GOLD).mean() for row in rows]
        for k, row in enumerate(rows):
            write(tmp_path, E.TABLES["ltu2"][label], k, row.tolist(), "random", seconds=took)
    shown = cells(tmp_path, "ltu2", "CIFAR-10, 10 %")
    for rho in ("rho 0.1", "rho 0.3"):
        ft, ltu = shown[f"FT, {rho}"], shown[f"LTU, {rho}"]
        mean = np.mean(np.subtract(gap[f"FT, {rho}"], gap[f"LTU, {rho}"]))
        assert ft["less LTU"].startswith(f"{mean:+.1f} ±") and ltu["less LTU"] == ""
        assert ltu["average gap"] == spread(gap[f"LTU, {rho}"]) and ltu["UT, s (passes)"] == "3.0"
    assert ltu["UA"] == "6.0 ± 1.4 (9.0)" and ltu["RA"] == "95.5 ± 0.7 (0.5)"  # gold: 15 and 96
    write(tmp_path, "ltu-no-metaopt-same", 0, [90.0] * 4, "random")
    write(tmp_path, "ltu", 0, [80.0] * 4, "random")
    same = cells(tmp_path, "ltu3", "CIFAR-10, 10 %")["w/o MetaOpt, LTU's flags"]
    assert same["less LTU"].endswith("(one split)")  # though no LTU has that ending
    paper = cells(tmp_path, "ltu3", "CIFAR-10, 10 %")["LTU"]["paper's average gap"]
    assert paper == "0.36 (4.37 / 99.83 / 93.95 / 12.97)"  # the paper prints 0.36 itself


GOLDEN = """
mu1, x, y
                    D_r         D_f        D_te          ToW               less Trained  \
   less METAUNLEARN  D_f less control  paper's ToW\
  touches                                   tried  UT, s (passes)  n
Trained      98.0 ± 0.0  97.0 ± 0.0  80.0 ± 0.0   85.4 ± 0.0                             \
                            0.0 ± 0.0             \
                                                                   3
Retrained    96.0 ± 0.0  85.0 ± 0.0  81.0 ± 0.0  100.0 ± 0.0                             \
                           10.0 ± 0.0             \
                                                      99.0 (27.0)  3
GA           95.0 ± 1.0  89.7 ± 1.5  79.0 ± 1.0   92.5 ± 1.5        +7.1 ± 3.7 (better)  \
+3.3 ± 3.0 (better)         4.3 ± 0.6             \
  support  2 (at an end: 1 of 3, in vain: 1 of 2)       1.5 (0.2)  3
METAUNLEARN  97.0 ± 0.5  93.7 ± 2.1  79.7 ± 0.6   89.2 ± 2.1  +3.8 ± 5.3 (within noise)  \
                            2.3 ± 2.6             \
  support                            not searched             1.5  3
"""


def test_golden_text_in_the_terminal_and_in_markdown(faces, capsys):
    out = printed(capsys, faces)
    assert out.startswith(GOLDEN) and "no run of Bad Teacher, SCRUB, JiT" in out
    assert "differences paired by split" in out
    text = printed(capsys, faces, "mu1", "--markdown")
    row = "| GA | 95.0 ± 1.0 | 89.7 ± 1.5 | 79.0 ± 1.0 | 92.5 ± 1.5 | +7.1 ± 3.7 (better) |"
    assert row in text and text.count("\n| --- |") == 1
    text = printed(capsys, faces, "mu1", "--markdown", "--brief")
    assert "|  | ToW | less Trained | D_f less control | UT, s (passes) | n |\n| --- |" in text
    assert "\n| GA | 92.5 ± 1.5 | +7.1 ± 3.7 (better) | 4.3 ± 0.6 | 1.5 (0.2) | 3 |\n" in text
    shown = cells(faces, "mu1", "CelebA-HQ/20")
    assert shown["METAUNLEARN"]["paper's ToW"] == "95.7 (84.5 / 82.6 / 80.7)"
    assert shown["Retrained"]["paper's ToW"] == "100.0 (84.7 / 78.6 / 80.8)"
    old = {"touches": "support", "search": [{"distance": 0.1}], "open": None, "nothing": None}
    assert E.searched_cell([old, old | {"search": None}]) == "1 (1 of 2 runs, ends not kept)"
    for k in range(3):
        write(faces, "retrain", k, (96.0, 84.0, 81.0, 29.0))
    row = r"^Second gold +96.0 ± 0.0 +84.0 ± 0.0 +81.0 ± 0.0 +99.0 ± 0.0 +\+13.6 ± 0.0 \(better\)"
    assert re.search(row, printed(capsys, faces), re.M)


def test_runs_of_two_settings_share_no_table(faces, capsys):
    write(faces, "ga", 0, GA[0], setting="z-split0").rename(faces / "ga-seed0.json")
    refused(capsys, "holds x, y and x, z", E.main, ["--table", "mu1", "--results", str(faces)])
    (faces / "ga-seed0.json").unlink()
    target, other = faces / "y.jsonl", write(faces / "z", "ga", 0, GA[0], setting="z-split0")
    E.pack(sorted(faces.glob("x-*")), target)
    refused(capsys, "holds x, y and x, z", E.pack, [other.parent], target)


def test_bad_files_are_named_and_skipped(faces, capsys):
    """Cut short, another version, split or model: named, never averaged in."""
    cut, old, part = (write(faces, "ssd", k, [50.0] * 4) for k in range(3))
    cut.write_text(cut.read_text()[:-200])
    old.write_text(old.read_text().replace('"flags"', '"args"'))
    part.write_text(re.sub(r'("unlearned".*?), "test": \{.*?\}', r"\1", part.read_text()))
    write(faces, "jit", 0, [50.0] * 4, split_hash="bbbb")
    write(faces, "jit", 1, [50.0] * 4, original=(97.0, 90.0, 80.0, 1.0))
    out = printed(capsys, faces)
    for path in (cut, old, part):
        assert f"skipped {path}: cut short or of another version" in out
    assert "skipped jit, split 0: of another split ('bbbb', 97.0, 80.0, 85.0, 81.0)" in out
    assert "skipped jit, split 1: of another original or gold model" in out
    assert GOLDEN in out and "SSD" not in out.split("no run of")[0]


def test_all_leaves_out_tables_without_a_row_of_their_own(faces, capsys):
    """METAUNLEARN's row stands in mu3 too; alone it says nothing there that mu1 does not."""
    for name, tables in (("x", ["mu1"]), ("first", ["mu1", "mu3"])):
        write(faces, f"metaunlearn-paper-{name}", 0, GA[0])
        assert re.findall(r"^(mu\S+),", printed(capsys, faces, "all"), re.M) == tables


# --------------------------------------------------------------------------------------------------
# The papers' numbers, and what is committed

NUMBERS = list(csv.reader((ROOT / "results" / "paper.csv").read_text().splitlines()))[1:]
IN_PAPER = {"Retrained": "Retrain", "GradAdd": "LTU(w/GradAdd)", "Iterative": "LTU(w/Iterative"}
IN_PAPER |= {f"w/o {part}": f"LTU(w/o{part})" for part in ("ForFeed", "RemFeed", "MetaOpt")}
IN_PAPER |= {"other N_S": ("50Id", "20Id", "10Id", "5Id"), "Bad Teacher": "BadTeacher"}
OURS = {"mu3": "First & Second terms + Accuracy", "mu7": "Reference"}  # METAUNLEARN's row there


@pytest.mark.skipif(not PAPERS.is_dir(), reason="the papers' texts are not here")
@pytest.mark.parametrize("name", sorted({row[0] for row in NUMBERS}))
def test_the_papers_numbers_are_the_papers(name):
    """Each row of numbers stands in a line of the paper's text that begins with the row's name."""
    paper, digits = ("metaunlearn", 1) if name.startswith("mu") else ("ltu", 2)
    text = (PAPERS / f"{paper}.txt").read_text()
    for _, column, label, *values in (row for row in NUMBERS if row[0] == name):
        want = [f"{float(v):.{digits}f}" for v in values if v]
        assert E.paper_numbers(name, column)[label] == tuple(map(float, want)) != ()
        assert label in {*E.TABLES[name], "Trained", "Retrained"}
        if name == "mu4" or ("CelebA/" in column and name == "mu1"):  # in sentences
            assert all(value in text for value in want)
            continue
        own = label.split(", rho")[0]
        own = OURS.get(name, own) if own == "METAUNLEARN" else own
        start = IN_PAPER.get(own, own)
        lines = [x for x in text.splitlines() if x.replace(" ", "").startswith(start)]  # "J i T"
        if name == "mu3":  # no longer name, such as that of the row with "+ Accuracy"
            end = re.compile(re.escape(own) + r"( \[24\])?\t")
            lines = [line for line in text.splitlines() if end.match(line)]
        pattern = r"(?<![\d.])" + r"\b.*?(?<![\d.])".join(map(re.escape, want)) + r"(?!\d)"
        assert any(re.search(pattern, line) for line in lines), (column, label, want)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_printed(path, capsys, tmp_path, monkeypatch):
    """All tables and attacks of results/ print, and each run stands in one or is a method's.

    Also from another folder: a path is looked for here, then in the project.
    """
    monkeypatch.chdir(tmp_path)
    path = path.relative_to(E.HERE)
    names = {run["name"] for run in E.read_results([path])[1]}
    methods = {*baselines.METHODS, "metaunlearn", "ltu", "attack"}
    assert {name.split("-")[0] for name in names} <= methods
    out = printed(capsys, path, "all") + printed(capsys, path, "all", "--brief", "--markdown")
    assert out.count("± half of their 95 %") == 2 and not re.search("skipped|nan", out)
    heads = re.findall(r"^(\w+-?\w*, .*)\n(\|.*)", out, re.M)  # the label, and at most six
    assert heads and all(row.count("|") == 7 + ("; paper: " in title) for title, row in heads)
    if "attack" in names:
        assert re.search(r"^Retrained +\d", printed(capsys, path, "attack"), re.M)


# --------------------------------------------------------------------------------------------------
# What a broken copy must fail: packed files, earlier results, measuring, attacks


def check_pack(module, faces):
    """What is packed is read again to six digits, and a changed run replaces its own line."""
    folders, target = sorted(faces.glob("x-*")), faces / "deep" / "packed.jsonl"
    module.pack([folders[0]], target)
    write(faces, "ssd", 1, [100 / 3] * 4, original=(200 / 3, 90.0, 80.0, 1.0))
    attack = {"attacks": {"gold": {"SVC": 100 / 7}}, "flags": {"forget": "identities", "n": 2}}
    write(faces, "attack", 0, GA[0], **attack, metrics=None)
    module.pack(folders, target)
    before = target.read_text().splitlines()
    module.pack(folders, target)
    assert target.read_text().splitlines() == before

    def by_name(paths):
        return {(r["name"], r["split_seed"]): r for r in module.read_results(paths)[1]}

    want, got = by_name(folders), by_name([target])
    assert set(want) == set(got) and len(before) == 1 + len(want)
    for key, run in want.items():
        for part in ("metrics", "access", "seconds", "flags", "split_hash", "attacks"):
            assert got[key].get(part) == module.rounded(run.get(part)), (key, part)
    assert got["ssd", 1]["metrics"]["unlearned"]["test"]["score"] == 0.333333
    # The first run of each split, and the one that differs, hold the original's row.
    assert sum('"original"' in line for line in before) == 4
    path = faces / "x-y-split1" / "ga-seed0.json"
    small = json.loads(path.read_text()) | {"chosen": {"unlearn_lr": 2e-9}}
    path.write_text(json.dumps(small).replace('"score": 0.88', '"score": 0.77'))
    module.pack([path.parent], target)
    after = target.read_text().splitlines()
    changed = [new for new, old in zip(after, before, strict=True) if new != old]
    assert len(changed) == 1
    (line,) = changed
    assert '"name":"ga","seed":0,"split_seed":1' in line and '"score":0.77' in line
    assert json.loads(line)["chosen"] == {"unlearn_lr": 2e-9}


def check_earlier_result(module, folder, capsys):
    """The same flags and images: as it was written. Others: refused with the first difference."""
    split = {"hash": "aaaa"}

    def args(*more):
        return metaunlearn.parse_args(["--dataset", "x", "--ids", "4", "--out", str(folder), *more])

    def earlier(*more):
        return module.earlier_result("m", args(*more), module.flags_of(args(*more)), split)

    path = module.result_path("m", args())
    assert path == folder / "x-ids4-split0" / "m-seed0.json" and earlier() is None
    flags = module.flags_of(args())
    made = json.loads(write(folder / "other", "m", 9, GA[0], flags=flags).read_text())
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(made))
    same = "--device cpu --data-dir y --checkpoint-dir z --resume --seed 0".split()
    assert earlier() == earlier(*same) == made
    assert module.flags_of(args("--plot", "--save", "w", "--name", "n", "--seed", "1")) == flags
    assert earlier("--overwrite") is None and earlier("--seed", "1") is None
    line = refused(capsys, str(path), earlier, "--eta", "0.2", "--alpha", "0.5")
    assert "--alpha 0.001, not 0.5;" in line and "--name" in line and "--overwrite" in line
    tries, split["hash"] = module.tries_path("m", args(), split), "bbbb"
    assert module.tries_path("m", args(), split) != tries
    assert "other images (split aaaa, not bbbb); add" in refused(capsys, str(path), earlier)
    split["hash"] = "aaaa"
    assert "tries" not in flags and module.flags_of(args("--search", "--tries", "3"))["tries"] == 3
    for damaged in (json.dumps(made)[:-99], json.dumps(made).replace('"flags"', '"args"'), "[]"):
        path.write_text(damaged)
        assert earlier() is None and "made again" in capsys.readouterr().out


def check_compare(module):
    figures = {"original": (0.9, 0.8, 0.7, [0.9, 0.8]), "retrained": (0.9, 0.6, 0.7, [0.9, 0.8])}
    figures["unlearned"], rows = (0.8, 0.7, 0.7, [0.85, 0.6]), {}
    for name, scores in figures.items():
        sets = zip(("retain", "forget", "test", "control"), scores, strict=True)
        rows[name] = {s: {"score": x} for s, x in sets}
    table = module.compare(rows)
    assert table["original"]["tow"] == pytest.approx(0.8) and table["retrained"]["tow"] == 1
    want = dict(tow=0.9 * 0.9, forget_lost=0.1, control_lost_mean=0.125)
    want |= dict(control_lost_std=np.std([0.05, 0.2], ddof=1), controls_that_lost_less=0.5)
    assert table["unlearned"] == pytest.approx(want)


def check_measure(module):
    """250 images of three classes, a fifth of the labels flipped; logits that are often right."""
    rng, names = np.random.default_rng(0), ("retain", "forget", "val", "test", "test_forgotten")
    true = torch.from_numpy(rng.integers(0, 3, 250))
    own = torch.where(torch.from_numpy(rng.random(250) < 0.2), (true + 1) % 3, true)
    logits = torch.from_numpy(rng.normal(0, 1, (250, 3))).float() + F.one_hot(own, 3)
    parts = [i.tolist() for i in np.split(np.arange(250), [100, 130, 160, 210])]
    split, data = dict(zip(names, parts, strict=True)), dict(targets=own, true_targets=true)
    wrong, seen = (logits.argmax(1) != own).double().numpy(), split["retain"][:30]

    def measured(data, split, seen=()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "predict", lambda model, data, indices, amp: logits[indices])
            return module.measure(None, data, split | {"hash": "ab"}, False, seen)

    row = measured(data, split, seen)
    for name, i in split.items():
        right = (logits.argmax(1) == (true if name == "test" else own))[i].double().mean().item()
        assert row[name] == pytest.approx(dict(score=right, accuracy=right), abs=1e-6)
    assert abs(1 - wrong[split["test"]].mean() - row["test"]["score"]) > 0.01
    controls = [1 - wrong[c].mean() for c in D.control_sets(data, split | {"hash": "ab"}, seen)]
    assert row["control"]["score"] == pytest.approx(controls) and len(set(controls)) > 5
    sure = logits.double().softmax(1)[torch.arange(250), own]
    sure = [sure[split[name]] for name in ("retain", "test", "forget")]
    assert row["mi"] == common.membership_inference(*sure) and 0 < row["mi"] < 1
    rest, is_clean = split["retain"][30:], (own == true).numpy()
    for name, i in {"D_f": split["forget"], "D_r_hat": seen, "rest of D_r": rest}.items():
        want = dict(flipped=wrong[i][~is_clean[i]].mean(), clean=wrong[i][is_clean[i]].mean())
        assert row["wrong"][name] == pytest.approx(want)
    figures = [1 - row["forget"]["accuracy"], row["retain"]["accuracy"], row["test"]["accuracy"]]
    assert list(module.paper_figures(row).values()) == [*figures, row["mi"]]
    # Without flipped labels there is no `wrong`, with identities no `mi`; all classes may stay.
    data |= {"true_targets": own, "identities": np.arange(250) // 5}
    for more, keys in (({}, {"mi"}), ({"support": [249], "forget_ids": [20, 21]}, set())):
        row = measured(data, split | {"test_forgotten": []} | more)
        assert set(row) == {*names[:4], "control"} | keys


def test_what_a_model_remembers_of_six_drawn_people(small, monkeypatch):
    args = T.parse_args(["--dataset", small, "--ids", "4"])
    data = D.load(args)
    split, z = D.make_split(data, args), torch.randn(160, 13, generator=common.generator(0))
    monkeypatch.setattr(E, "predict", lambda model, data, indices, amp: z[indices])
    remembered = E.measure(None, data, split)["remembered"]
    people = [int(who) for s in ("forget", "retain") for who in remembered[s]]
    assert set(people) == set(E.shown_people(split)) and len(people) == 6
    for s, who in zip(["forget"] * 3 + ["retain"] * 3, people, strict=True):
        own = [i for i in split[s] if data["identities"][i] == who]
        p, y = z[own, 9:].sigmoid(), data["targets"][own, 9:]  # the four that are not drawn
        want = torch.where(y == 1, p, 1 - p).mean().item()
        assert remembered[s][str(who)] == pytest.approx(want, abs=1e-6)


def check_attacks(module):
    """A gold model is at chance, the original is not; RMIA, which knows what is easy, sees more."""
    rng = np.random.default_rng(0)
    easy = {s: rng.normal(0, 2, 2000) for s in ("retain", "forget", "val", "test", "support")}

    def made(*seen):  # a model that is surer of what it has seen, and a little of the same people
        known = {s: 3.0 for s in seen} | {"support": 1.0 * ("forget" in seen)}
        logits = {s: e + rng.normal(0, 0.5, 2000) + known.get(s, 0) for s, e in easy.items()}
        return {s: torch.from_numpy(z).sigmoid() for s, z in logits.items()}

    golds, original = [made("retain") for _ in range(3)], made("retain", "forget")
    gold, seen = module.membership(golds[0], golds[1:]), module.membership(original, golds)
    assert abs(gold["loss AUC"] - 50) < 3 and abs(gold["RMIA AUC"] - 50) < 3
    assert gold["TPR 1 %"] < 3 and gold["TPR 0.1 %"] < 1 and seen["TPR 1 %"] > 5
    assert seen["loss AUC"] > 75 and seen["RMIA AUC"] > seen["loss AUC"] + 5
    assert seen["SVC"] < gold["SVC"] - 20
    assert abs(gold["person AUC"] - 50) < 3 and 55 < seen["person AUC"] < 70
    del golds[0]["support"]
    assert "person AUC" not in module.membership(golds[0], golds[1:])


def check_rmia_and_roc(module):
    """The paper's score, the share of a population z that x beats, rises with x's ratio."""
    rng = np.random.default_rng(0)
    x, z, x_out, z_out = (rng.random(shape) for shape in (17, 2300, (4, 17), (4, 2300)))
    for gamma, a in ((1.0, 0.3), (2.0, 0.0), (1.3, 0.9)):
        score = np.zeros(17)
        for i, j in np.ndindex(17, 2300):
            p_x = ((1 + a) * sum(r[i] for r in x_out) / 4 + (1 - a)) / 2
            p_z = ((1 + a) * sum(r[j] for r in z_out) / 4 + (1 - a)) / 2
            score[i] += ((x[i] / p_x) / (z[j] / p_z) >= gamma) / 2300
        order = module.rmia(*map(torch.from_numpy, (x, x_out)), a).argsort()
        assert len(np.unique(score)) > 14 and (np.diff(score[order]) >= 0).all()
    # The curve against scikit-learn's: so many others, and no more, may lie above a threshold.
    members, others = rng.normal(1, 1, 3000), rng.normal(0, 1, 3000)
    truth, scores = np.r_[np.ones(3000), np.zeros(3000)], np.r_[members, others]
    (auc, at), (false, true, _) = module.roc(members, others), roc_curve(truth, scores)
    assert auc == roc_auc_score(truth, scores) == pytest.approx(1 - module.roc(others, members)[0])
    for level in (0.001, 0.01):
        allowed = np.sort(others)[::-1][int(level * 3000)]
        assert at[level] == (members > allowed).mean() == true[false <= level].max()


def check_search(module, folder, capsys):
    """No range has an edge; a step too small to matter grows; ends are told; tries are kept."""
    args, partial = T.parse_args(["--epochs", "40", "--resume"]), folder / "ga.tries"
    args.out, args.tries = str(folder), 12

    def search(start, distance, nothing=math.inf, **more):
        best, record = module.search(start, distance, nothing, args, **more)
        assert 0 < len(record["search"]) <= args.tries and record["chosen"] == best
        return best, record

    def far(values):  # from 3 decades above the first flag and half a decade below the second
        return abs(np.log10(values["lr"]) - 1) + abs(np.log10(values["b"]) + 0.5)

    best, record = search({"lr": 0.01, "b": 1.0}, far)
    assert far(best) < 0.1 and record["open"] == []
    for nothing, in_vain in ((far(best), True), (1.01 * far(best), False)):
        _, record = search({"lr": 0.01, "b": 1.0}, far, nothing)
        assert record["nothing"] == nothing
        assert ("no setting tried beats" in capsys.readouterr().out) == in_vain
    best, _ = search({"lr": 1.0}, lambda values: abs(np.log10(values["lr"]) - 0.2))
    assert abs(np.log10(best["lr"]) - 0.2) < 0.04  # moves become short
    best, record = search({"lr": 0.01}, lambda values: 1 / values["lr"])
    assert best == {"lr": 3160.0} and record["open"] == ["lr"] and len(record["search"]) == 12

    def band(values):  # a no-op below 1, a broken model above 2
        if values["lr"] > 2:
            raise FloatingPointError
        return 0.3 if values["lr"] < 1 else 0.1

    best, record = search({"lr": 0.2, "b": 1.0}, band, 0.3)
    assert 1 <= best["lr"] <= 2 and {t["distance"] for t in record["search"]} == {None, 0.1, 0.3}
    best, _ = search({"ssd_alpha": 9.0}, lambda values: 0.1 + 0.1 * (values["ssd_alpha"] > 2), 0.2)
    assert best["ssd_alpha"] <= 2  # the smaller, the more it does
    # Whole numbers stay whole, from 1 to a bound; a share moves by its odds.
    most = {"most": {"unlearn_epochs": 8}}
    best, record = search({"unlearn_epochs": 3}, lambda values: -values["unlearn_epochs"], **most)
    assert best == {"unlearn_epochs": 8} and record["open"] == []
    best, _ = search({"unlearn_epochs": 3}, lambda values: values["unlearn_epochs"])
    assert best == {"unlearn_epochs": 1} and type(best["unlearn_epochs"]) is int
    best, record = search({"passes": 3.0}, lambda values: -values["passes"], most={"passes": 8.0})
    assert best == {"passes": 8.0} and record["open"] == []
    best, _ = search({"passes": 9.0}, lambda values: -values["passes"], most={"passes": 8.0})
    assert best == {"passes": 8.0}  # the start as well
    start = {"ascent_epochs": 5, "unlearn_epochs": 2}  # ascent comes in the first of the epochs
    best, record = search(start, lambda values: -sum(values.values()), **most)
    assert all(t["ascent_epochs"] <= t["unlearn_epochs"] for t in record["search"])
    assert best == dict.fromkeys(start, 8) and record["open"] == []
    best, record = search({"mask_share": 0.5}, lambda values: abs(values["mask_share"] - 0.99))
    assert best["mask_share"] == pytest.approx(0.99, abs=0.003) and record["open"] == []
    # An interrupted search goes on, and not with the tries of other flags.
    asked = []

    def stops(values):
        asked.append(values["lr"])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return abs(values["lr"] - 1)

    with pytest.raises(KeyboardInterrupt):
        search({"lr": 0.1}, stops, partial=partial)
    whole = search({"lr": 0.1}, lambda values: abs(values["lr"] - 1))
    assert search({"lr": 0.1}, stops, partial=partial) == whole
    assert len(asked) == len(whole[1]["search"]) + 1  # the interrupted one twice, no other
    # Fewer --tries are the first of these, and more go on from them.
    args.tries = 5
    assert search({"lr": 0.1}, stops, partial=partial)[1]["search"] == whole[1]["search"][:5]
    asked, args.tries = [0.1] * 5, 12
    assert search({"lr": 0.1}, stops, partial=partial) == whole
    assert asked[5:] == [t["lr"] for t in whole[1]["search"][5:]]
    args.lr *= 2
    asked = []
    with pytest.raises(KeyboardInterrupt):
        search({"lr": 0.1}, stops, partial=partial)


def check_gap(module):
    """The four gaps by hand: of the unlearned model to the original, for which D_f is D_v."""
    rng, y = np.random.default_rng(0), torch.arange(400) % 4
    parts = np.split(np.arange(400), [160, 280])
    split = dict(zip(("seen", "forget", "val"), map(np.ndarray.tolist, parts), strict=True))
    sharp = torch.from_numpy(np.repeat([4.0, 3.0, 1.0], [160, 120, 120])).float()[:, None]
    original = torch.from_numpy(rng.normal(0, 1, (400, 4))).float() + sharp * F.one_hot(y, 4)
    unlearned = torch.from_numpy(rng.normal(0, 1.5, (400, 4))).float() + 0.6 * original
    right = [(z.argmax(1) == y).double().numpy() for z in (original, unlearned)]
    sure = [z.softmax(1)[torch.arange(400), y] for z in (original, unlearned)]
    seen, forget, val = (split[name] for name in ("seen", "forget", "val"))
    attack = common.membership_inference
    want = {"ua": right[0][val].mean() - right[1][forget].mean()}
    want |= {"ra": right[1][seen].mean() - right[0][seen].mean()}
    want |= {"ta": right[1][val].mean() - right[0][val].mean()}
    want["mi"] = attack(*(sure[1][i] for i in (seen, val, forget)))
    want["mi"] -= attack(*(sure[0][i] for i in (seen, val, val)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "predict", lambda model, data, indices, amp: model[indices])
        args = types.SimpleNamespace(amp=False)
        of_data = {"targets": y}, split, seen, args
        got = module.judging(original, None, *of_data)(lambda: unlearned)
    want = {name: abs(float(gap)) for name, gap in want.items()}
    assert got == pytest.approx(np.mean([*want.values()]), abs=1e-6)
    assert min(want.values()) > 0.01 and len({round(gap, 3) for gap in want.values()}) == 4


def check_hold_out(module):
    """Below rho 1 a part of D_r_hat judges that the method does not get."""
    args = T.parse_args(["--forget", "random"])
    for n, rho, judges in ((1000, 1, 1000), (500, 0.5, 50), (100, 0.1, 30), (40, 0.1, 20)):
        args.rho = rho
        kept, judged_by = module.hold_out(list(range(n)), args)
        assert len(judged_by) == judges and set(kept) | set(judged_by) == set(range(n))
        assert rho == 1 or not set(kept) & set(judged_by)


def checks(module, faces, capsys):
    """All that a broken copy must fail."""
    check_search(module, faces, capsys)
    check_hold_out(module)
    check_gap(module)
    write(faces, "ssd", 0, [50.0] * 4, split_hash="bbbb")
    out = printed(capsys, faces, module=module)
    assert "".join(f"{x}\n" for x in out.split("\n") if "skipped" not in x).startswith(GOLDEN)
    check_compare(module)
    check_measure(module)
    check_pack(module, faces)
    check_earlier_result(module, faces / "out", capsys)
    check_rmia_and_roc(module)
    check_attacks(module)


MUTANTS = {
    "population's deviation": ("values.std(ddof=1) / np.sqrt", "values.std() / np.sqrt"),
    "normal instead of Student": ("stats.t.ppf(0.975, len(values) - 1)", "stats.norm.ppf(0.975)"),
    "difference turned round": ('(v["main"], there[k]["main"])', '(there[k]["main"], v["main"])'),
    "RMIA without references": ("(((1 + a) * x_references.mean(0) + 1 - a) / 2)", "1.0"),
    "RMIA upside down": ("x / (((1 + a)", "1 / x * (((1 + a)"),
    "search with an edge": ("place, least = new, found", "place, least = new, found; break"),
    "search stuck at a no-op": ("grows and found == least < math.inf", "False"),
    "harm to D_r not judged": ('"ra": right["seen"]', '"ra": right["val"]'),
    "D_f should look like D_r": ('figures(model, "val")', 'figures(model, "forget")'),
    "in vain, not told": ("if least >= nothing", "if least > nothing"),
    "in vain, not counted": ('>= v["nothing"]', '> v["nothing"]'),
    "search of one length": ("length // 2\n    best, open_ends", "0\n    best, open_ends"),
    "ascent in more epochs than there are": ("] = min(values[", "] = max(values["),
    "search without end": ("len(tried) < args.tries:\n            own", "True:\n            own"),
    "tries of other flags": ('if saved["about"] == json.loads(json.dumps(about)) else []', ""),
    "tries repeated": ("and partial.is_file():\n        saved", "and False:\n        saved"),
    "ends not told": ("(min(others), max(others)) and not bound", "()"),
    "judged by its own images": ("return sorted(order[number:])", "return sorted(order)"),
    "false positives too many": ("true[false <= level].max()", "true[false >= level].min()"),
    "members swapped": ('sets = ("forget", "test")', 'sets = ("test", "forget")'),
    "pictures for people": ('roc(sure["support"], sure', 'roc(sure["forget"], sure'),
    "loss for confidence": ('roc(sure["forget"], sure', 'roc(1 - sure["forget"], 1 - sure'),
    "another split averaged in": ("if key == usual:", "if True:"),
    "control forgotten": ('(t["forget_lost"] - t["control_lost_mean"])', 't["forget_lost"]'),
    "control's deviation": ("lost.std(ddof=1)", "lost.std()"),
    "test labels flipped": ('if name == "test" else own', "if False else own"),
    "control of what was seen": ("control_sets(data, split, seen)", "control_sets(data, split)"),
    "wrong by the other share": ("(r[~at_hand], in_r[~", "(r[at_hand], in_r["),
    "mi with identities": ('by_identity, sets = "support" in split', "by_identity, sets = False"),
    "flags not compared": ("if was != now:", "if False:"),
    "tries of other images": ("f\".{split['hash']}.tries\"", '".tries"'),
    "result of other images": ('if split_hash != split["hash"]:', "if False:"),
    "number of tries not compared": ('if vars(args).get("search") else', "if True else"),
    "--overwrite ignored": ("args.overwrite or not path.is_file()", "not path.is_file()"),
    "every original left out": ('if own["metrics"][row] == known[row]}', "}"),
    "run appended twice": ("list({run_key(run): run for run in runs}.values())", "runs"),
    "old run kept": ("{run_key(run): run for run in runs}", "{run_key(r): r for r in runs[::-1]}"),
    "six decimals, not digits": ('float(f"{float(text):.6g}")', "round(float(text), 6)"),
}


def test_the_whole_copy_passes(faces, capsys):
    checks(E, faces, capsys)


@pytest.mark.parametrize("old, new", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(old, new, faces, capsys):
    mutant = mutated(E, old, new)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        checks(mutant, faces, capsys)


def test_show_prints_each_row_once_with_its_seconds(capsys):
    results, rows = {}, {"original": ORIGINAL, "retrained": GOLD, "unlearned": GA[0]}
    own = {"FT": {"unlearn": 11.25}, "LTU": {"unlearn": 2.25, "mi_models": 11.25}}
    for label, seconds in own.items():
        metrics = {row: made_row(v) for row, v in rows.items()}
        results[label] = dict(flags={"dry_run": label == "FT"}, metrics=metrics, metric="accuracy")
        results[label]["seconds"] = seconds | {"retrain": 66.5}
    took = {"Trained": "", "Retrained (gold)": "66.5", "FT (dry)": "11.2", "LTU": "13.5"}
    for random in (True, False):
        assert E.show(results) is results["LTU"]
        out = capsys.readouterr().out
        for label, seconds in took.items():
            [line] = re.findall(rf"^{re.escape(label)}  .*", out, re.M)
            found = [value for value in took.values() if f" {value} " in line and value]
            assert found == ([seconds] if random and seconds else [])
        assert ("20 sets of images of D_r" in out) == random == ("10.00 (5.00)" in out)
        for row in [row for result in results.values() for row in result["metrics"].values()]:
            row.pop("mi", None)  # as with identities


def test_simulated_problems_want_what_the_untouched_model_has(small, tmp_path):
    """All that it loses in ToW comes from D_f; neither the test set nor the real S is read."""
    argv = ["--dataset", small, "--ids", "4", "--image-size", "16", *places(tmp_path)]
    args = metaunlearn.parse_args([*argv, "--no-amp"])
    data, split = T.open_data(args, CPU)
    model, gaps = common.build_model("toy_vit", data["classes"], 16), []

    def scored(indices):
        return E.score(D.predict(model, data, indices), data["targets"][indices])

    with record_reads() as read:
        problems = E.simulated_problems(model, data, split, args, images=20)
        tow = E.simulated_tow(lambda problem: model, problems, data, False)
    assert not {*split["test"], *split["support"]} & set(np.concatenate(read).tolist())
    rng, val, draws = np.random.default_rng([0, 0, 6]), np.array(split["val"]), []
    owner = data["identities"][val]
    for _ in range(10):  # four validation people, who are as new as forgotten ones should be
        draws.append(scored(val[np.isin(owner, rng.choice(np.unique(owner), 4, replace=False))]))
    for problem in problems:
        sets, want = problem["sets"], problem["want"]
        assert want["retain"] == scored(sets["retain"]) and want["test"] == scored(sets["test"])
        assert want["forget"] == pytest.approx(np.mean(draws))
        assert set(sets["test"]) <= set(val) and len(sets["test"]) == len(sets["retain"]) == 20
        others = {*split["retain"], *split["forget"]} - {*sets["forget"], *problem["support"]}
        assert set(sets["retain"]) <= others
        gaps.append(abs(scored(sets["forget"]) - want["forget"]))
    assert tow == pytest.approx(1 - np.mean(gaps)) and max(gaps) > 0 and len(gaps) == 3


# --------------------------------------------------------------------------------------------------
# A tiny setting that is really run, its attacks and figures

ROWS, OWN = ["metaunlearn-paper", "ga"], ["--meta-epochs", "1", "--hidden", "16"]


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """(folder, flags) after METAUNLEARN, GA and a second gold model on two splits."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--dataset", small, "--ids", "4", "--epochs", "8", "--batch-size", "32"]
    flags += ["--image-size", "16", *places(folder)]
    for k in ("0", "1"):
        metaunlearn.main([*flags, *OWN, "--split-seed", k])
        baselines.main([*flags, "--method", "ga", "retrain", "--split-seed", k])
    return folder, flags


def opened(flags, *more):
    """(args, data, split, original model) of the tiny setting."""
    args = E.parse_args(["--attack", *flags, "--no-amp", *more])
    data, split = T.open_data(args, CPU)
    return args, data, split, T.train("original", data, split, args)[0]


def test_runs_are_found_packed_and_not_repeated(run, capsys, tmp_path):
    """The tables of the packed file are those of the folders; a damaged run is made again."""
    (folder, flags), target = run, tmp_path / "mine.jsonl"
    out, paths = printed(capsys, folder / "out"), sorted((folder / "out").glob("*/*-seed0.json"))
    assert re.search("^Second gold .* 2$", out, re.M) and re.search("^GA .* 2$", out, re.M)
    E.main(["--pack", str(target), "--results", *{str(path.parent) for path in paths}])
    assert printed(capsys, target) == out and len(paths) == 6
    before = [path.stat().st_mtime_ns for path in paths]
    metaunlearn.main([*flags, *OWN, "--plot", "--save", str(tmp_path / "kept.pt")])
    baselines.main([*flags, "--method", "ga", "retrain"])
    assert paths[1].with_suffix(".png").stat().st_size > 10_000
    common.load_checkpoint(tmp_path / "kept.pt", "model", which="unlearned", architecture="toy_vit")
    shown = capsys.readouterr().out
    assert shown.count("made with the same flags") == 3 and shown.count("\nSecond gold  ") == 1
    assert before == [path.stat().st_mtime_ns for path in paths]
    whole = paths[0].read_text()
    paths[0].write_text(whole[:-99])
    baselines.main([*flags, "--method", "ga"])
    assert "made again" in capsys.readouterr().out
    assert json.loads(paths[0].read_text())["metrics"] == json.loads(whole)["metrics"]


def test_models_are_those_that_were_measured(run):
    """Each checkpoint has its run file's scores; the second gold model shares only the data."""
    args, data, split, model = opened(run[1], "--split-seed", "1")
    models = {name: E.unlearned_model(name, args, split, model) for name in E.unlearned_files(args)}
    assert set(models) == {*ROWS, "retrain"}
    for name, m in models.items():
        row = json.loads(E.result_path(name, args).read_text())["metrics"]["unlearned"]
        for s in ("forget", "test"):
            got = E.score(D.predict(m, data, split[s]), data["targets"][split[s]])
            assert got == pytest.approx(row[s]["score"], abs=1e-6)
    gold, second = (dict(m.named_parameters()) for m in (T.train("gold", data, split, args)[0], m))
    drawn = [k for k, p in gold.items() if p.ndim > 1 and k.endswith("weight")]
    assert len(drawn) > 15 and not any(torch.equal(gold[k], second[k]) for k in drawn)


def test_the_two_models_are_measured_once_and_again_after_a_change(run, tmp_path, monkeypatch):
    """Other weights, images or code, or a damaged file, and they are measured again."""
    args, data, split, model = opened(run[1], "--checkpoint-dir", str(tmp_path))
    wanted, measured = E.measure(model, data, split), []
    monkeypatch.setattr(E, "measure", lambda m, *more: measured.append(m) or wanted)

    def rows(*seen, first=model):
        models = {"original": first, "retrained": model, "unlearned": model}
        assert E.measure_all(models, data, split, args, seen) == dict.fromkeys(models, wanted)
        return len(measured)

    assert rows() == 3 and rows() == 3 + 1  # the unlearned model alone
    assert rows(7) == 4 + 3
    moved = copy.deepcopy(model)
    next(moved.parameters()).data.view(-1)[0] += 1
    assert rows(7, first=moved) == 7 + 2
    with monkeypatch.context() as patch:
        patch.setattr(E, "CODE", b"changed")
        assert rows(7, first=moved) == 9 + 3
    (path,) = tmp_path.rglob("retrained-seed0.measured.json")
    assert rows(7, first=moved) == 12 + 3
    for damaged in (path.read_text()[:-9], "[]"):
        path.write_text(damaged)
        before = len(measured)
        assert rows(7, first=moved) == before + 2
    split, before = split | {"hash": "other"}, len(measured)
    assert rows(7, first=moved) == before + 3
    args.amp, before = True, len(measured)
    assert rows(7, first=moved) == before + 3


def test_attack_on_every_checkpoint(run, capsys):
    folder, flags = run
    E.main(["--attack", *flags])
    out = capsys.readouterr().out
    assert printed(capsys, folder / "out", "attack").split("percent")[1] in out
    for label in ("Trained", "Retrained", "Second gold", "GA", "METAUNLEARN"):
        assert re.search(rf"^{label} +\d.* 1$", out, re.M), out
    assert "The goal is Retrained's figure" in out
    E.main(["--attack", *flags, "--markdown"])
    assert "\n| --- |" in capsys.readouterr().out
    args, data, split, model = opened(flags)
    path = E.result_path("attack", args)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"attacks": whole["attacks"] | {"gone": {}}}))
    refused(capsys, "whose models are gone (gone)", E.main, ["--attack", *flags])
    path.write_text("{")
    refused(capsys, "is damaged", E.main, ["--attack", *flags])
    path.write_text(json.dumps(whole))
    found = whole["attacks"]
    assert set(found) == {"original", "gold", "retrain", *ROWS}
    assert all(0 <= value <= 100 for row in found.values() for value in row.values())
    assert found["original"]["loss AUC"] > found["gold"]["loss AUC"]
    sure, y = [], data["targets"]
    for args.seed in (None, 0, 1000, 2000):
        m = model if args.seed is None else T.train("gold", data, split, args)[0]
        sets = ("retain", "forget", "val", "test", "support")
        sure.append({s: common.confidence(D.predict(m, data, split[s]), y[split[s]]) for s in sets})
    assert found["original"] == pytest.approx(E.membership(sure[0], sure[1:]))
    assert found["gold"] == pytest.approx(E.membership(sure[1], sure[2:]))
    assert found["retrain"] == pytest.approx(E.membership(sure[2], [sure[1], sure[3]]))


def test_bins_against_numpy():
    """Equal counts over all splits; interval over the splits' means in a bin."""
    rng = np.random.default_rng(0)
    x, y = rng.permutation(60).reshape(3, 20), rng.normal(size=(3, 20))
    bins = E.binned([np.c_[a, b] for a, b in zip(x, y, strict=True)])
    for i, b in enumerate(bins):
        inside = (x >= 12 * i) & (x < 12 * (i + 1))
        means = [v[m].mean() for v, m in zip(y, inside, strict=True) if m.any()]
        low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
        assert (b["from"], b["to"], b["n"]) == (12 * i, 12 * i + 11, 12) and len(bins) == 5
        assert np.allclose([b["mean"] - b["half"], b["mean"] + b["half"]], [low, high])
    assert [b["n"] for b in E.binned([np.array([[1, 1], [2, 2], [3, 3]])])] == [3]
    assert E.rank_correlation([1, 2, 9], [3, 4, 5]) == pytest.approx(1)
    assert E.rank_correlation([1, 2, 3], [7, 7, 7]) == 0


@pytest.mark.parametrize("number", ["4", "5"])
def test_figures_are_drawn_and_not_empty(run, capsys, number):
    folder, flags = run
    for seeds, words in (("2", ["Spearman", "n = 2 splits", " ± "]), ("1", ["(one split)"])):
        E.main(["--figure", number, *flags, "--rows", *ROWS, "--seeds", seeds])
        out = capsys.readouterr().out
        assert all(word in out for word in words) and "nan" not in out.lower()
        path = folder / "out" / f"figure{number}-small-ids4.png"
        picture = matplotlib.image.imread(path)[..., :3]
        assert picture.shape[0] > 300 and picture.std() > 0.05
        assert np.ptp(picture, axis=2).max() < 0.02  # readable without colour
    E.main(["--figure", number, *flags, "--rows", *ROWS, "--split-seed", "1"])
    assert out.split("Spearman")[0] != capsys.readouterr().out.split("Spearman")[0]
    missing = "no unlearned model of x; .* holds ga, metaunlearn-paper, retrain"
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "train_both", None)  # it is said before anything is trained
        E.main(["--figure", number, *flags, "--rows", "x", "ga"])
    assert re.search(missing, capsys.readouterr().err)


def test_figures_distances_against_a_loop(run):
    args, data, split, model = opened(run[1], "--rows", *ROWS)
    shown, owner, centers = E.people(args, CPU), data["identities"], []
    models = {name: E.unlearned_model(name, args, split, model) for name in ROWS}
    gold = T.train("gold", data, split, args)[0]

    def change(measure, before, i):
        x, y = D.raw_batch(data, i), data["targets"][i]
        before, *after = (measure(m(x)[1].detach(), y) for m in (before, *map(models.get, ROWS)))
        return 100 * (np.mean(after) - before)

    def features(i):
        return model(D.raw_batch(data, i))[0].detach().numpy()

    for s, measure, before in (("forget", E.accuracy, gold), ("retain", E.score, model)):
        assert [p["identity"] for p in shown[s]] == np.unique(owner[split[s]]).tolist()
        assert any(abs(p["change"]) > 1e-6 for p in shown[s])
        for p in shown[s]:
            mine = [i for i in split[s] if owner[i] == p["identity"]]
            others, center = np.array(centers), features(mine).mean(0)
            if s == "forget":
                centers.append(center)
                others = features([i for i in split["support"] if owner[i] == p["identity"]])
            distance = np.linalg.norm(others - center, axis=1).min()
            assert p["distance"] == pytest.approx(distance, rel=1e-3)
            assert p["change"] == pytest.approx(change(measure, before, mine), abs=1e-3)


def test_figure_6_keeps_real_people_out_of_git(run, capsys):
    folder, flags = run
    draw, path = ["--figure", "6", *flags, "--rows", *ROWS], folder / "figure6-small-ids4.png"
    E.main(draw)  # a data set of its own counts as real people
    out = capsys.readouterr().out
    assert path.stat().st_size > 5000 and not (folder / "out" / path.name).exists()
    assert "not for publishing" in out and re.search(r"^\d+ +\d+\.\d\d +[+-]", out, re.M)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    path.unlink()
    with pytest.raises(SystemExit) as end:
        E.main(draw)
    assert end.value.code == 2 and "real people" in capsys.readouterr().err and not path.exists()
    (folder / ".gitignore").write_text("*.png\n")
    E.main(draw)
    assert path.exists()


# fmt: off
MISTAKES = {
    "": "required", "--table ltu9": "invalid choice", "--figure 7": "invalid choice",
    "--figure 4 --dataset cifar10": "is about identities", "--figure 4 --seeds 0": "--seeds",
    "--table mu1 --results nowhere": "no run in nowhere",
    "--attack --references 0": "must lie from 1",
    "--table all --results empty": "no run in empty",
    "--table mu1 --results bad.jsonl": "bad.jsonl is no packed file",
    "--table mu3 --results x": "no run of --table mu3", "--table ltu1 --results x": "--table ltu1",
    "--table attack --results x": "no attack is there",
    "--table ltu1 --dataset cifar10": "--dataset does nothing here",
    "--pack mine.jsonl": "--pack needs --results", "--table all --plot x.png": "draws one table",
    "--figure 4 --plot x.png": "draws one table", "--table mu1 --plot empty": "is a folder",
    "--pack bad.jsonl --results x": "bad.jsonl is no packed file",
    "--pack x.json --results x": "name a .jsonl file",
    "--pack x/ga-seed0.json/p.jsonl --results x": "cannot write",
}
# fmt: on


@pytest.mark.parametrize("arguments, message", MISTAKES.items())
def test_mistakes_get_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("bad.jsonl").write_text('{"title": "no flags"}\n')
    pathlib.Path("empty").mkdir()
    write(tmp_path, "ga", 0, GA[0]).parent.rename("x")
    refused(capsys, message, E.main, arguments.split())
    assert pathlib.Path("bad.jsonl").read_text() == '{"title": "no flags"}\n'
