"""evaluate.py against numpy, scipy, scikit-learn, plain loops, golden text, and itself changed.

python -m pytest tests/test_evaluate.py
"""

import argparse
import csv
import json
import pathlib
import re
import subprocess
import types

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import places, record_reads, refused
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

import baselines
import common
import data as D
import evaluate as E
import metaunlearn
import train as T

ROOT = pathlib.Path(__file__).parent.parent
PAPERS = ROOT.parent / "shared" / "papers"
COMMITTED = sorted((ROOT / "results").glob("*.jsonl"))
CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# Runs whose figures are known


def made_row(*figures):
    """A measured row of D_r's, D_f's and D_te's score in percent, and MI."""
    values = zip(("retain", "forget", "test"), figures, strict=False)
    row = {s: {"score": v / 100, "accuracy": v / 100, "loss": 1.0} for s, v in values}
    return row | {"control": {"score": [figures[0] / 100] * 2}, "mi": figures[3] / 100}


ORIGINAL, GOLD = (98.0, 97.0, 80.0, 1.0), (96.0, 85.0, 81.0, 30.0)
GA = [(95.0, 90.0, 79.0, 10.0), (94.0, 88.0, 80.0, 20.0), (96.0, 91.0, 78.0, 15.0)]
META = [(97.0, 93.0, 80.0, 5.0), (97.5, 92.0, 80.0, 6.0), (96.5, 96.0, 79.0, 7.0)]


def write(folder, name, k, unlearned, forget="identities", original=ORIGINAL, **more):
    """Write a made run of split seed k where a method would; returns its path."""
    rows = {"original": made_row(*original), "retrained": made_row(*GOLD)}
    rows["unlearned"] = made_row(*unlearned)
    run = dict(name=name, dataset="x", setting=f"y-split{k}", seed=0, split_seed=k)
    run |= dict(split_hash="aaaa", flags={"forget": forget, "lr": 0.1}, metric="mAP", metrics=rows)
    run |= dict(access={"unlearning": ["support"]}, seconds={"unlearn": 1.5}) | more
    path = folder / f"x-y-split{k}" / f"{name}-seed0.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))
    return path


@pytest.fixture
def faces(tmp_path):
    for k in range(3):
        write(tmp_path, "ga", k, GA[k])
        write(tmp_path, "metaunlearn-paper", k, META[k])
    return tmp_path


def table(folder, name="mu1", *more):
    """Arguments that print a table of all runs below a folder, or of one packed file."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("*-split*"))
    return ["--table", name, "--results", *map(str, paths), *more]


def printed(capsys, arguments, module=E) -> str:
    capsys.readouterr()
    module.main(arguments)
    return capsys.readouterr().out


def cells(runs, name, column="") -> dict:
    """{label: {head: text}} of a table of these runs."""
    kind = name[: 2 if name.startswith("mu") else 3]
    found, skipped = E.collect(E.TABLES[name], runs)
    reference = "METAUNLEARN" if kind == "mu" else "LTU"
    paper = E.paper_numbers(name, column)
    lines = E.table_lines(E.rows_of(found, kind), kind, paper, reference)
    assert not skipped
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[1:]}


def runs_in(folder):
    return E.read_results(sorted(folder.glob("*-split*")))[1]


def spread(values) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


# --------------------------------------------------------------------------------------------------
# Statistics and tables


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_is_students(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = E.interval(values)
    assert np.allclose([mean - half, mean + half], [low, high], rtol=1e-12)


def test_verdict_is_the_t_tests():
    """Within noise exactly where scipy's paired t-test has p > 0.05; the sign says which way."""
    rng, seen, opposite = np.random.default_rng(0), set(), {"better": "worse", "worse": "better"}
    for _ in range(200):
        a, b = rng.normal(rng.normal(), 1, 4), rng.normal(0, 1, 4)
        mean, half = E.interval(a - b)
        said = E.verdict(mean, half, more_is_better=True)
        assert (said == "within noise") == (stats.ttest_rel(a, b).pvalue > 0.05)
        if said != "within noise":
            assert (said == "better") == (a.mean() > b.mean())
            assert E.verdict(mean, half, more_is_better=False) == opposite[said]
        seen.add(said)
    assert seen == {"within noise", "better", "worse"}
    tiny = [(1.01, 1.0), (1.011, 1.0), (1.012, 1.0)]
    assert E.difference(tiny, True) == "+0.0 ± 0.0 (no difference)"
    assert E.verdict(*E.interval([1.0]), True) == "one seed"
    assert E.verdict(*E.interval([0.0, 0.0]), True) == "within noise"


def test_aggregation_against_numpy(faces):
    def tow(values):
        gaps = [1 - np.abs(np.array(v[:3]) - GOLD[:3]) / 100 for v in values]
        return 100 * np.prod(gaps, 1)

    shown = cells(runs_in(faces), "mu1")
    ga, floor = shown["GA"], tow([ORIGINAL])[0]
    assert ga["D_f"] == spread([v[1] for v in GA]) and ga["ToW"] == spread(tow(GA))
    for column, other in (("less Trained", floor), ("less METAUNLEARN", tow(META))):
        difference = tow(GA) - other
        low = stats.ttest_1samp(difference, 0).confidence_interval(0.95).low
        assert ga[column].startswith(f"{difference.mean():+.1f} ± {difference.mean() - low:.1f} (")
    lost = [(ORIGINAL[1] - v[1]) - (ORIGINAL[0] - v[0]) for v in GA]
    assert ga["D_f less control"] == spread(lost) and ga["n"] == "3"
    assert shown["Trained"]["ToW"] == f"{floor:.1f} ± 0.0" and len(shown) == 4
    assert shown["Retrained"]["ToW"] == "100.0 ± 0.0"
    paper = cells(runs_in(faces), "mu1", "CelebA-HQ/20")
    assert paper["METAUNLEARN"]["paper's ToW"] == "95.7 (84.5 / 82.6 / 80.7)"
    assert paper["Retrained"]["paper's ToW"] == "100.0 (84.7 / 78.6 / 80.8)"


def test_average_gap_against_numpy(tmp_path):
    for k in range(2):
        write(tmp_path, "ltu", k, GA[k], "random", seconds={"unlearn": 1.0, "mi_models": 2.0})
    row = cells(runs_in(tmp_path), "ltu3", "CIFAR-10, 10 %")["LTU"]
    assert row["average gap"] == spread([np.mean(np.abs(np.subtract(v, GOLD))) for v in GA[:2]])
    assert row["UA"].startswith("11.0 ± 1.4 (4.0)")  # UA is 10 and 12; the gold model's is 15
    assert row["paper's average gap"] == "0.36 (4.37 / 99.83 / 93.95 / 12.97)"  # so says the paper
    assert row["UT, s"] == "3.0 ± 0.0"


def test_a_row_of_table_2_is_compared_with_ltu_at_its_own_rho(tmp_path):
    level = {"FT, rho 0.1": 90, "LTU, rho 0.1": 80, "FT, rho 0.3": 90, "LTU, rho 0.3": 95}
    for k, (label, value) in ((k, item) for k in range(2) for item in level.items()):
        write(tmp_path, E.TABLES["ltu2"][label], k, [value + k] * 4, "random")
    shown = cells(runs_in(tmp_path), "ltu2")

    def gap(label):
        return np.mean([np.abs(level[label] + k - np.array(GOLD)).mean() for k in range(2)])

    for rho in ("0.1", "0.3"):
        less = shown[f"FT, rho {rho}"]["less LTU"]
        assert less.startswith(f"{gap(f'FT, rho {rho}') - gap(f'LTU, rho {rho}'):+.1f}")
        assert shown[f"LTU, rho {rho}"]["less LTU"] == ""


GOLDEN = """
mu1, x, y
                    D_r         D_f        D_te          ToW               less Trained  \
   less METAUNLEARN  D_f less control  paper's ToW  touches      UT, s  n
Trained      98.0 ± 0.0  97.0 ± 0.0  80.0 ± 0.0   85.4 ± 0.0                             \
                            0.0 ± 0.0                                   3
Retrained    96.0 ± 0.0  85.0 ± 0.0  81.0 ± 0.0  100.0 ± 0.0                             \
                           10.0 ± 0.0                                   3
GA           95.0 ± 1.0  89.7 ± 1.5  79.0 ± 1.0   92.5 ± 1.5        +7.1 ± 3.7 (better)  \
+3.3 ± 3.0 (better)         4.3 ± 0.6               support  1.5 ± 0.0  3
METAUNLEARN  97.0 ± 0.5  93.7 ± 2.1  79.7 ± 0.6   89.2 ± 2.1  +3.8 ± 5.3 (within noise)  \
                            2.3 ± 2.6               support  1.5 ± 0.0  3
"""


def test_golden_text_in_the_terminal_and_in_markdown(faces, capsys):
    out = printed(capsys, table(faces))
    assert out.startswith(GOLDEN) and "no run of Bad Teacher, SCRUB, JiT" in out
    assert "differences paired by seed" in out
    text = printed(capsys, table(faces, "mu1", "--markdown"))
    row = "| GA | 95.0 ± 1.0 | 89.7 ± 1.5 | 79.0 ± 1.0 | 92.5 ± 1.5 | +7.1 ± 3.7 (better) |"
    assert row in text and text.count("\n| --- |") == 1
    text = printed(capsys, table(faces, "mu1", "--markdown", "--brief"))
    heads = "|  | ToW | less Trained | D_f less control | paper's ToW | n |"
    assert f"{heads}\n| --- | --- | --- | --- | --- | --- |\n" in text
    assert "| GA | 92.5 ± 1.5 | +7.1 ± 3.7 (better) | 4.3 ± 0.6 |  | 3 |" in text
    brief = printed(capsys, table(COMMITTED[0], "ltu1", "--markdown", "--brief"))
    assert "| Fisher |" in brief and {
        row.count("|") for row in re.findall(r"^\|.*", brief, re.M)
    } == {7}


def test_the_second_gold_model_is_a_row(faces, capsys):
    for k in range(3):
        write(faces, "retrain", k, (96.0, 84.0, 81.0, 29.0))
    out, want = printed(capsys, table(faces)), r"96.0 ± 0.0 +84.0 ± 0.0 +81.0 ± 0.0 +99.0 ± 0.0"
    assert re.search(rf"^Second gold +{want} +\+13.6 ± 0.0 \(better\)", out, re.M), out


def test_bad_files_are_named_and_skipped(faces, capsys):
    """Cut short, another version, split or model: named, never averaged in."""
    bad = (50.0, 50.0, 50.0, 50.0)
    cut, old, part = (write(faces, "ssd", k, bad) for k in range(3))
    cut.write_text(cut.read_text()[:-200])
    old.write_text(old.read_text().replace('"flags"', '"args"'))
    part.write_text(re.sub(r'("unlearned".*?), "test": \{.*?\}', r"\1", part.read_text()))
    write(faces, "jit", 0, bad, split_hash="bbbb")
    write(faces, "jit", 1, bad, original=(97.0, 90.0, 80.0, 1.0))
    out = printed(capsys, table(faces))
    for path in (cut, old, part):
        assert f"skipped {path}: cut short or of another version" in out
    assert "skipped jit, split 0: of another split ('bbbb', 97.0, 80.0, 85.0, 81.0)" in out
    assert "skipped jit, split 1: of another original or gold model" in out
    assert GOLDEN in out and "SSD" not in out.split("no run of")[0]


def test_all_leaves_out_tables_without_a_row_of_their_own(faces, capsys):
    """METAUNLEARN's row stands in mu3 too; alone it says nothing there that mu1 does not."""
    write(faces, "metaunlearn-paper-x", 0, GA[0])  # in no table
    assert re.findall(r"^(mu\S+),", printed(capsys, table(faces, "all")), re.M) == ["mu1"]
    write(faces, "metaunlearn-paper-first", 0, GA[0])
    assert re.findall(r"^(mu\S+),", printed(capsys, table(faces, "all")), re.M) == ["mu1", "mu3"]


# --------------------------------------------------------------------------------------------------
# Papers, and what is committed

IN_PAPER = {"Retrained": "Retrain", "GradAdd": "LTU (w/ GradAdd)", "Iterative": "LTU (w/ Iterative"}
IN_PAPER |= {f"w/o {part}": f"LTU (w/o {part})" for part in ("ForFeed", "RemFeed", "MetaOpt")}
IN_PAPER["other N_S"] = ("50 Id", "20 Id", "10 Id", "5 Id")
LAST = {"mu3": "First & Second terms + Accuracy", "mu7": "Reference"}  # METAUNLEARN's row there
NUMBERS = list(csv.reader((ROOT / "results" / "paper.csv").read_text().splitlines()))[1:]


@pytest.mark.skipif(not PAPERS.is_dir(), reason="the papers' texts are not here")
@pytest.mark.parametrize("name", ["mu1", "mu3", "mu4", "mu7", "ltu1", "ltu2", "ltu3", "ltu4"])
def test_the_papers_numbers_are_the_papers(name):
    """Each row of numbers stands in a line of the paper's text that begins with the row's name."""
    paper, digits = ("metaunlearn", 1) if name.startswith("mu") else ("ltu", 2)
    lines = (PAPERS / f"{paper}.txt").read_text().splitlines()
    rows = [row[1:] for row in NUMBERS if row[0] == name]
    for column, label, *values in rows:
        want = [f"{float(v):.{digits}f}" for v in values if v]
        assert E.paper_numbers(name, column)[label] == tuple(map(float, want))
        assert label in {*E.TABLES[name], "Trained", "Retrained"} and want
        if name == "mu4" or ("CelebA/" in column and name == "mu1"):  # in sentences
            assert all(value in " ".join(lines) for value in want)
            continue
        own = IN_PAPER.get(label, label.split(", rho")[0])
        own = LAST.get(name, own) if label == "METAUNLEARN" else own
        own = tuple(n.replace(" ", "") for n in ([own] if isinstance(own, str) else own))
        begin = [line for line in lines if line.replace(" ", "").startswith(own)]  # "J i T" once
        if name == "mu3":  # and no longer name, such as that of the row with "+ Accuracy"
            whole = re.escape(LAST["mu3"] if label == "METAUNLEARN" else label)
            begin = [line for line in begin if re.match(whole + r"( \[24\])?\t", line)]
        pattern = r"(?<![\d.])" + r"\b.*?(?<![\d.])".join(map(re.escape, want)) + r"(?!\d)"
        assert any(re.search(pattern, line) for line in begin), (column, label, want)
    assert len(rows) > 3


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_printed(path, capsys):
    """All tables and attacks of results/ print, and each run stands in one or is a method's."""
    header, runs = E.read_results([path])
    names = {"attack", "retrain"}.union(*(rows.values() for rows in E.TABLES.values()))
    methods = {*baselines.METHODS, "metaunlearn", "ltu"}
    assert all(r["name"] in names or r["name"].split("-")[0] in methods for r in runs)
    columns = {row[1] for row in NUMBERS}
    assert header["paper"] in columns | {""} and header["title"]
    for more in ([], ["--markdown"], ["--brief"]):
        out = printed(capsys, table(path, "all", *more))
        assert "± half of their 95 %" in out and not re.search("skipped|nan", out)
    if "attack" in {run["name"] for run in runs}:
        assert "Retrained" in printed(capsys, table(path, "attack"))


# --------------------------------------------------------------------------------------------------
# Packed files, earlier results


def lines_of(path):
    return path.read_text().splitlines()


def check_pack(module, faces):
    """What is packed is read again to six decimals, and a changed run replaces its own line."""
    other = write(faces, "ssd", 1, [100 / 3] * 4, original=(200 / 3, 90.0, 80.0, 1.0))
    found = {"Trained": {"SVC": 100 / 7}}
    write(faces, "attack", 0, GA[0], attacks=found, flags={"forget": "identities", "n": 2})
    folders, target = sorted(faces.glob("x-*")), faces / "deep" / "packed.jsonl"
    module.pack([folders[0]], target)
    module.pack(folders, target)
    before = lines_of(target)
    module.pack(folders, target)
    assert lines_of(target) == before and len(before) == 1 + 8

    def by_name(paths):
        return {(r["name"], r["split_seed"]): r for r in module.read_results(paths)[1]}

    want, got = by_name(folders), by_name([target])
    assert set(want) == set(got)
    for key, run in want.items():
        for part in ("metrics", "access", "seconds", "flags", "split_hash", "attacks"):
            if part in run and (part, run["name"]) != ("metrics", "attack"):
                assert got[key][part] == module.rounded(run[part])
    assert got["ssd", 1]["metrics"]["unlearned"]["test"]["score"] == 0.333333
    assert got["attack", 0]["attacks"]["Trained"]["SVC"] == 14.285714
    # The first run of each split, and the one that differs, hold the original's row.
    assert sum('"original"' in line for line in before) == 4
    for path, text in ((other, "0.5"), (faces / "x-y-split1" / "ga-seed0.json", "0.9")):
        run = json.loads(path.read_text())
        run["metrics"]["unlearned"]["forget"]["score"] = float(text)
        path.write_text(json.dumps(run))
        module.pack([path.parent], target)
        now = lines_of(target)
        changed = [new for new, old in zip(now, before, strict=True) if new != old]
        assert len(changed) == 1 and f'"name":"{run["name"]}"' in changed[0] and text in changed[0]
        before = now


def check_earlier_result(module, faces, capsys):
    """The same flags: as it was written. Others: refused with the first difference."""

    def flags(*more):
        argv = ["--dataset", "x", "--ids", "4", "--out", str(faces), *more]
        return metaunlearn.parse_args(argv)

    def earlier(args):
        return module.earlier_result("m", args, module.flags_of(args))

    args = flags()
    path = module.result_path("m", args)
    assert path == faces / "x-ids4-split0" / "m-seed0.json" and earlier(args) is None
    made = json.loads(write(faces, "m", 9, GA[0]).read_text()) | {"flags": module.flags_of(args)}
    path.parent.mkdir()
    path.write_text(json.dumps(made))
    same = ("--device", "cpu", "--data-dir", "y", "--checkpoint-dir", "z", "--plot", "--save", "w")
    assert earlier(args) == earlier(flags(*same)) == made
    assert earlier(flags("--overwrite")) is None and earlier(flags("--split-seed", "1")) is None
    refused(capsys, "--alpha 0.001, not 0.5;", earlier, flags("--eta", "0.2", "--alpha", "0.5"))
    assert "--name" in refused(capsys, str(path), earlier, flags("--lr", "0.2"))
    for damaged in (json.dumps(made)[:-99], json.dumps(made).replace('"flags"', '"args"'), "[]"):
        path.write_text(damaged)
        assert earlier(args) is None and "made again" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Measuring, by hand


def test_compare_by_hand(module=E):
    def row(r, f, te, *control):
        scores = zip(("retain", "forget", "test"), (r, f, te), strict=True)
        return {k: {"score": x} for k, x in scores} | {"control": {"score": control}}

    rows = {"original": row(0.9, 0.8, 0.7, 0.9, 0.8), "retrained": row(0.9, 0.6, 0.7, 0.9, 0.8)}
    compared = module.compare(rows | {"unlearned": row(0.8, 0.7, 0.7, 0.85, 0.6)})
    assert compared["original"]["tow"] == pytest.approx(0.8) and compared["retrained"]["tow"] == 1
    want = dict(tow=0.9 * 0.9, forget_lost=0.1, control_lost_mean=0.125)
    want |= dict(control_lost_std=np.std([0.05, 0.2], ddof=1), controls_that_lost_less=0.5)
    assert compared["unlearned"] == pytest.approx(want)


class Lookup(torch.nn.Module):
    """A model whose logits of an image are a row of a table, which its first pixel names."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        logits = self.logits[(images[:, 0, 0, 0] * 255).round().long()]
        return logits, logits


def made_problem():
    """250 images of three classes, a fifth of the labels flipped; logits that are often right."""
    rng = np.random.default_rng(0)
    true = torch.from_numpy(rng.integers(0, 3, 250))
    targets = torch.where(torch.from_numpy(rng.random(250) < 0.2), (true + 1) % 3, true)
    images = torch.arange(250, dtype=torch.uint8)[:, None, None, None].expand(250, 1, 1, 3)
    data = dict(images=images, targets=targets, true_targets=true, device=CPU)
    ends = dict(retain=100, forget=130, val=160, test=210, test_forgotten=250)
    split, start = {"hash": "ab"}, 0
    for name, end in ends.items():
        split[name], start = list(range(start, end)), end
    logits = torch.from_numpy(rng.normal(0, 1, (250, 3))).float() + F.one_hot(targets, 3)
    return data, split, logits


def check_measure(module):
    data, split, logits = made_problem()
    own, true, seen = data["targets"], data["true_targets"], split["retain"][:30]
    row = module.measure(Lookup(logits), data, split, seen=seen)
    sets = {"retain", "forget", "val", "test", "test_forgotten"}
    assert set(row) == sets | {"control", "mi", "wrong"}
    wrong = logits.argmax(1) != own
    for name in sets:
        i = split[name]
        right = logits[i].argmax(1) == (true if name == "test" else own)[i]
        want = dict(score=right.float().mean().item(), accuracy=right.float().mean().item())
        want["loss"] = F.cross_entropy(logits[i], own[i]).item()
        assert row[name] == pytest.approx(want, abs=1e-6)
    assert wrong[split["test"]].float().mean() != pytest.approx(1 - row["test"]["score"], abs=0.01)
    controls = [1 - wrong[c].float().mean().item() for c in D.control_sets(data, split, seen)]
    assert row["control"]["score"] == pytest.approx(controls) and len(set(controls)) > 5
    sure = logits.double().softmax(1)[torch.arange(250), own]
    parts = [sure[split[name]] for name in ("retain", "test", "forget")]
    assert row["mi"] == common.membership_inference(*parts) and 0 < row["mi"] < 1
    places = {"D_f": split["forget"], "D_r_hat": seen, "rest of D_r": split["retain"][30:]}
    for name, i in places.items():
        kinds = {"flipped": [], "clean": []}
        for image in i:
            kinds["clean" if own[image] == true[image] else "flipped"].append(wrong[image].item())
        assert row["wrong"][name] == pytest.approx({k: np.mean(v) for k, v in kinds.items()})
    # Without a flipped label there is no `wrong`; with identities no `mi`; one class may be absent.
    clean = data | {"true_targets": own, "identities": np.arange(250) // 5}
    few = {k: v for k, v in split.items() if k != "test_forgotten"}
    assert set(module.measure(Lookup(logits), clean, few)) == sets - {"test_forgotten"} | {
        "control",
        "mi",
    }
    people = few | {"support": [249], "forget_ids": [20, 21]}
    row = module.measure(Lookup(logits), clean, people)
    assert set(row) == sets - {"test_forgotten"} | {"control"}
    figures = module.paper_figures(row | {"mi": 0.3})
    want = [1 - row["forget"]["accuracy"], row["retain"]["accuracy"], row["test"]["accuracy"], 0.3]
    assert list(figures) == ["ua", "ra", "ta", "mi"] and list(figures.values()) == want


def test_show_prints_each_row_once_with_its_seconds(capsys):
    rows = {"original": made_row(*ORIGINAL), "retrained": made_row(*GOLD)}
    own = {"FT": {"unlearn": 11.25}, "LTU": {"unlearn": 2.25, "mi_models": 11.25, "ft": 77.5}}
    own = {label: seconds | {"retrain": 66.5} for label, seconds in own.items()}
    results = {}
    for label, seconds in own.items():
        metrics = rows | {"unlearned": made_row(*GA[0])}
        results[label] = dict(flags={"dry_run": label == "FT"}, metrics=metrics, seconds=seconds)
        results[label]["metric"] = "accuracy"
    results["LTU"]["metrics"]["ft"] = made_row(*META[0])
    assert E.show(results) is results["LTU"]
    out = capsys.readouterr().out
    wanted = {"Trained": None, "Retrained (gold)": "66.5", "FT (dry)": "11.2", "LTU": "13.5"}
    wanted["FT, same batches"] = "77.5"
    for label, seconds in wanted.items():
        [line] = re.findall(rf"^{re.escape(label)}  .*", out, re.M)
        assert [x for x in ("66.5", "77.5", "11.2", "13.5") if f" {x} " in line] == [seconds] * (
            seconds is not None
        )
    assert "10.00 (5.00)" in out and "20 sets of images of D_r" in out
    for result in results.values():
        for row in result["metrics"].values():
            row.pop("mi", None)
    E.show(results)
    out = capsys.readouterr().out
    assert all(len(re.findall(rf"^{re.escape(label)}  ", out, re.M)) == 1 for label in wanted)
    assert "accuracy x 100" in out and "20 sets of identities" in out


def test_simulated_problems_want_what_the_untouched_model_has(small, tmp_path):
    """All of its ToW's loss comes from D_f; neither the test set nor the real S is read."""
    argv = ["--dataset", small, "--ids", "4", "--image-size", "16", *places(tmp_path)]
    args = metaunlearn.parse_args(argv)
    data, split = T.open_data(args, CPU)
    model, args.amp = common.build_model("toy_vit", data["classes"], 16), False

    def scored(indices):
        indices = np.asarray(indices)
        return E.score(D.predict(model, data, indices), data["targets"][indices])

    with record_reads() as read:
        problems = E.simulated_problems(model, data, split, args, images=20)
        tow = E.simulated_tow(lambda problem: model, problems, data, False)
    assert (
        not set(np.concatenate(read)) & {*split["test"], *split["support"]} and len(problems) == 3
    )
    rng, draws, lost = np.random.default_rng([0, 0, 6]), [], []
    val = np.array(split["val"])
    owner = data["identities"][val]
    for _ in range(10):  # four validation people, who are as new as forgotten ones should be
        draws.append(scored(val[np.isin(owner, rng.choice(np.unique(owner), 4, replace=False))]))
    for problem in problems:
        sets, want = problem["sets"], problem["want"]
        assert want["retain"] == scored(sets["retain"]) and want["test"] == scored(sets["test"])
        assert want["forget"] == pytest.approx(np.mean(draws))
        assert set(sets["test"]) <= set(val) and len(sets["test"]) == len(sets["retain"]) == 20
        assert not set(sets["retain"]) & {*sets["forget"], *problem["support"]}
        assert set(sets["retain"]) <= {*split["retain"], *split["forget"]}
        lost.append(abs(scored(sets["forget"]) - want["forget"]))
    assert tow == pytest.approx(1 - np.mean(lost)) and max(lost) > 0
    args.dry_run = True
    assert len(E.simulated_problems(model, data, split, args)) == 1


# --------------------------------------------------------------------------------------------------
# Membership inference


def confidences(seed=0, n=400, references=3):
    """Confidences of made models, (one that is sure of all of D_f too, models that are not)."""
    rng = np.random.default_rng(seed)
    easy = {s: rng.normal(0, 2, n) for s in ("retain", "forget", "val", "test")}

    def model(*seen):
        sure = {}
        for s, e in easy.items():  # each image has its own difficulty
            z = e + rng.normal(0, 0.5, n) + 3 * (s in seen)
            sure[s] = torch.tensor(1 / (1 + np.exp(-z)))
        return sure

    golds = [model("retain") for _ in range(references)]
    return model("retain", "forget"), golds


def plain_rmia(x, x_references, z, z_references, gamma, a):
    def ratio(p, references):
        return p / (((1 + a) * sum(references) / len(references) + (1 - a)) / 2)

    x_ratios = [ratio(x[i], [r[i] for r in x_references]) for i in range(len(x))]
    z_ratios = [ratio(z[j], [r[j] for r in z_references]) for j in range(len(z))]
    return [sum(p / q >= gamma for q in z_ratios) / len(z) for p in x_ratios]


@pytest.mark.parametrize("gamma, a", [(1.0, 0.3), (2.0, 0.0), (1.3, 0.9)])
def test_rmia_against_a_plain_loop(gamma, a, module=E):
    rng = torch.Generator().manual_seed(0)
    x, z = (torch.rand(n, generator=rng, dtype=torch.float64) for n in (17, 23))
    references = [torch.rand(4, n, generator=rng, dtype=torch.float64) for n in (17, 23)]
    got = module.rmia(x, references[0], z, references[1], gamma, a)
    lists = [t.tolist() for t in (x, references[0], z, references[1])]
    want = plain_rmia(*lists, gamma, a)
    assert np.allclose(got, want) and 0 < np.mean(want) < 1


def test_a_small_population_hides_no_member():
    """Where all members beat every z their shares tie at 1; LR must still order them."""
    x, z, half = torch.tensor([0.9, 0.99, 0.95]), torch.tensor([0.1, 0.2]), torch.full((2, 3), 0.5)
    got = E.rmia(x.double(), half.double(), z.double(), half[:, :2].double())
    assert torch.allclose(got, torch.ones(3).double()) and got.argsort().tolist() == [0, 2, 1]


def test_attacks_have_known_answers(module=E):
    """A gold model is at chance; the original is not, and RMIA, which knows what is easy, sees more."""
    original, golds = confidences(n=2000)
    gold, seen = module.membership(golds[0], golds[1:]), module.membership(original, golds)
    assert abs(gold["loss AUC"] - 50) < 3 and abs(gold["RMIA AUC"] - 50) < 3
    assert gold["TPR 1 %"] < 3 and gold["TPR 0.1 %"] < 1 and seen["TPR 1 %"] > 5
    assert seen["loss AUC"] > 75 and seen["RMIA AUC"] > seen["loss AUC"] + 5
    assert seen["SVC"] < gold["SVC"] - 20


def test_roc_against_scikit_learn():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 3000), rng.normal(0, 1, 3000)
    truth, scores = np.r_[np.ones(3000), np.zeros(3000)], np.r_[members, others]
    auc, at = E.roc(members, others)
    false, true, _ = roc_curve(truth, scores)
    assert auc == roc_auc_score(truth, scores) and set(at) == {0.001, 0.01}
    for level, rate in at.items():  # so many others, and no more, may lie above the threshold
        allowed = np.sort(others)[::-1][int(level * 3000)]
        assert rate == (members > allowed).mean() == true[false <= level].max()
    assert E.roc(others, members)[0] == pytest.approx(1 - auc)


# --------------------------------------------------------------------------------------------------
# A tiny setting that is really run, its attacks and figures

ROWS = ["metaunlearn-paper", "ga"]
OWN = ["--meta-epochs", "1", "--hidden", "16"]


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
    args = E.parse_args(["--attack", *flags, *more])
    args.amp = False
    data, split = T.open_data(args, CPU)
    return args, data, split, T.train("original", data, split, args)[0]


def test_runs_are_found_packed_and_not_repeated(run, capsys, tmp_path):
    """The tables of the packed file are those of the folders; a damaged run is made again."""
    folder, flags = run
    out = printed(capsys, table(folder / "out"))
    assert re.search("^Second gold .* 2$", out, re.M) and re.search("^GA .* 2$", out, re.M)
    paths = sorted((folder / "out").glob("*/*-seed0.json"))
    E.pack([path.parent for path in paths], tmp_path / "mine.jsonl")
    assert printed(capsys, table(tmp_path / "mine.jsonl")) == out and len(paths) == 6
    before = {path: path.stat().st_mtime_ns for path in paths}
    metaunlearn.main([*flags, *OWN])
    baselines.main([*flags, "--method", "ga", "retrain"])
    shown = capsys.readouterr().out
    assert shown.count("made with the same flags") == 3 and shown.count("\nSecond gold  ") == 1
    assert before == {path: path.stat().st_mtime_ns for path in paths}
    refused(capsys, "--eta 0.1, not 0.3", metaunlearn.main, [*flags, *OWN, "--eta", "0.3"])
    whole = paths[0].read_text()
    paths[0].write_text(whole[:-99])
    baselines.main([*flags, "--method", "ga"])
    assert "made again" in capsys.readouterr().out
    assert json.loads(paths[0].read_text())["metrics"] == json.loads(whole)["metrics"]
    refused(capsys, "ltu1", E.main, table(folder / "out", "ltu1"))


def test_the_second_gold_model_shares_only_the_data(run):
    args, data, split, _ = opened(run[1])
    files = [T.checkpoint_folder(args) / f"{name}-seed0.pt" for name in ("gold", "retrain")]
    a, b = (common.load_checkpoint(path, "model", split=split["hash"])["model"] for path in files)
    drawn = [k for k, t in a.items() if k.endswith("weight") and t.ndim > 1]
    assert len(drawn) > 15 and not any(torch.equal(a[k], b[k]) for k in drawn)


def test_unlearned_models_are_those_that_were_measured(run):
    """From its checkpoint each row's model has the scores of its run file."""
    args, data, split, model = opened(run[1], "--split-seed", "1")
    models = E.unlearned_models(args, data, split, model)
    assert set(models) == {*ROWS, "retrain"}
    for name, m in models.items():
        result = json.loads(E.result_path(name, args).read_text())
        for s in ("forget", "test"):
            got = E.score(D.predict(m, data, split[s]), data["targets"][split[s]])
            assert got == pytest.approx(result["metrics"]["unlearned"][s]["score"], abs=1e-6)


def test_attack_on_every_checkpoint(run, capsys):
    folder, flags = run
    out = printed(capsys, ["--attack", *flags])
    E.main(["--attack", *flags, "--split-seed", "1", "--references", "1"])
    both = printed(capsys, table(folder / "out", "attack"))
    for label in ("Trained", "Retrained", "Second gold", "GA", "METAUNLEARN"):
        assert re.search(rf"^{label} +\d.* 1$", out, re.M), out
        assert re.search(rf"^{label} +\d.* ± .* 2$", both, re.M), both
    assert "The goal is Retrained's figure" in out
    args, data, split, model = opened(flags)
    found = json.loads(E.result_path("attack", args).read_text())["attacks"]
    assert set(found) == {"original", "gold", "retrain", *ROWS}
    assert all(0 <= value <= 100 for row in found.values() for value in row.values())
    assert found["original"]["loss AUC"] > found["gold"]["loss AUC"]
    golds = [
        T.train("gold", data, split, argparse.Namespace(**vars(args) | {"seed": 1000 * i}))[0]
        for i in range(3)
    ]
    sure = []
    for m in (*golds, model):
        parts = {
            s: (D.predict(m, data, split[s]), data["targets"][split[s]])
            for s in ("retain", "forget", "val", "test")
        }
        sure.append({s: common.confidence(*part) for s, part in parts.items()})
    assert found["original"] == pytest.approx(E.membership(sure[3], sure[:3]))
    assert found["gold"] == pytest.approx(E.membership(sure[0], sure[1:3]))
    assert found["retrain"] == pytest.approx(E.membership(sure[1], [sure[0], sure[2]]))


def test_bins_against_numpy():
    """Equal counts over all splits; interval over the splits' means in a bin."""
    rng = np.random.default_rng(0)
    x, y = rng.permutation(60).reshape(3, 20), rng.normal(size=(3, 20))
    bins = E.binned([np.c_[a, b] for a, b in zip(x, y, strict=True)])
    assert [b["n"] for b in bins] == [12] * 5
    for i, b in enumerate(bins):
        inside = (x >= 12 * i) & (x < 12 * (i + 1))
        means = [v[m].mean() for v, m in zip(y, inside, strict=True) if m.any()]
        low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
        assert (b["from"], b["to"]) == (12 * i, 12 * i + 11)
        assert np.allclose([b["mean"] - b["half"], b["mean"] + b["half"]], [low, high])
    assert [b["n"] for b in E.binned([np.array([[1, 1], [2, 2], [3, 3]])])] == [3]
    assert E.rank_correlation([1, 2, 9], [3, 4, 5]) == pytest.approx(1)
    assert E.rank_correlation([1, 2, 3], [7, 7, 7]) == 0


@pytest.mark.parametrize("number", ["4", "5"])
def test_figures_are_drawn_and_not_empty(run, capsys, number):
    folder, flags = run
    draw = ["--figure", number, *flags, "--rows", *ROWS]
    out = printed(capsys, [*draw, "--seeds", "2"])
    assert "Spearman" in out and "n = 2 splits" in out and "± " in out
    picture = matplotlib.image.imread(folder / "out" / f"figure{number}-small-ids4.png")[..., :3]
    assert picture.shape[0] > 300 and picture.std() > 0.05
    assert np.ptp(picture, axis=2).max() < 0.02  # readable in black and white: there is no colour
    out = printed(capsys, draw)
    assert "(one seed)" in out and "nan" not in out.lower()


def test_figures_distances_against_a_loop(run):
    args, data, split, model = opened(run[1], "--rows", *ROWS)
    shown, owner, centers = E.people(args, CPU), data["identities"], {}
    models = E.unlearned_models(args, data, split, model)
    models, gold = [models[name] for name in ROWS], T.train("gold", data, split, args)[0]

    def feature(i):
        return model(D.raw_batch(data, [i]))[0][0].detach().numpy()

    def outputs(m, indices):
        return m(D.raw_batch(data, indices))[1].detach(), data["targets"][indices]

    def change(measure, before, indices):
        return 100 * (
            np.mean([measure(*outputs(m, indices)) for m in models])
            - measure(*outputs(before, indices))
        )

    def images_of(person, part):
        return [i for i in split[part] if owner[i] == person["identity"]]

    for p in shown["forget"]:
        [support], mine = images_of(p, "support"), images_of(p, "forget")
        center = centers[p["identity"]] = np.mean([feature(i) for i in mine], 0)
        distance = np.linalg.norm(feature(support) - center)
        assert p["distance"] == pytest.approx(distance, rel=1e-3)
        assert p["change"] == pytest.approx(change(E.accuracy, gold, mine), abs=1e-3)
    for p in shown["retain"][:5]:
        mine = images_of(p, "retain")
        center = np.mean([feature(i) for i in mine], 0)
        distance = min(np.linalg.norm(center - c) for c in centers.values())
        assert p["distance"] == pytest.approx(distance, rel=1e-3)
        assert p["change"] == pytest.approx(change(E.score, model, mine), abs=1e-3)
    for s in ("forget", "retain"):
        assert any(abs(p["change"]) > 1e-6 for p in shown[s])
        assert {p["identity"] for p in shown[s]} == set(owner[split[s]])


def test_figure_6_keeps_real_people_out_of_git(run, capsys):
    folder, flags = run
    draw, path = ["--figure", "6", *flags, "--rows", *ROWS], folder / "figure6-small-ids4.png"
    out = printed(capsys, draw)  # a data set of its own counts as real people
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


# --------------------------------------------------------------------------------------------------
# The command line, and broken copies

MISTAKES = {"": "required", "--figure 4 --dataset cifar10": "is about identities"}
MISTAKES |= {"--table ltu9": "invalid choice", "--table mu1 --results nowhere": "no run in nowhere"}
MISTAKES |= {"--table mu1 --results bad.jsonl": "bad.jsonl is no packed file of results"}
MISTAKES |= {"--table all --results empty": "no run in empty", "--figure 7": "invalid choice"}
MISTAKES |= {
    "--table mu3 --results x": "no run of --table mu3",
    "--attack --references 0": "from 1",
}
MISTAKES |= {"--table attack --results x": "no attack is there", "--figure 4 --seeds 0": "--seeds"}
MISTAKES |= {"--pack bad.jsonl --results x": "bad.jsonl is no packed file"}
MISTAKES |= {"--pack x/ga-seed0.json/p.jsonl --results x": "cannot write"}


@pytest.mark.parametrize("arguments, message", MISTAKES.items())
def test_mistakes_get_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"title": "no flags"}\n')
    (tmp_path / "empty").mkdir()
    write(tmp_path, "ga", 0, GA[0]).parent.rename("x")
    refused(capsys, message, E.main, arguments.split())
    assert (tmp_path / "bad.jsonl").read_text() == '{"title": "no flags"}\n'


def test_figures_without_models_say_which_are_there(run, capsys):
    folder, flags = run
    with pytest.raises(SystemExit) as end:
        E.main(["--figure", "4", *flags])
    assert end.value.code == 2
    want = "no unlearned model of metaunlearn-selective; .* holds ga, metaunlearn-paper, retrain"
    assert re.search(want, capsys.readouterr().err)


def checks(module, faces, capsys):
    """All that a broken copy must fail."""
    write(faces, "ssd", 0, [50.0] * 4, split_hash="bbbb")
    out = printed(capsys, table(faces), module)
    assert "".join(f"{x}\n" for x in out.split("\n") if "skipped" not in x).startswith(GOLDEN)
    test_compare_by_hand(module)
    check_measure(module)
    check_earlier_result(module, faces, capsys)
    check_pack(module, faces)
    test_rmia_against_a_plain_loop(1.0, 0.3, module)
    test_attacks_have_known_answers(module)


MUTANTS = {
    "population's deviation": ("values.std(ddof=1) / np.sqrt", "values.std() / np.sqrt"),
    "normal instead of Student": ("stats.t.ppf(0.975, len(values) - 1)", "stats.norm.ppf(0.975)"),
    "difference turned round": ('(v["main"], v["floor"])', '(v["floor"], v["main"])'),
    "RMIA without the population": (">= gamma * ratio[1][None]", ">= gamma"),
    "RMIA without references": ("(((1 + a) * q.mean(0) + 1 - a) / 2)", "1.0"),
    "RMIA upside down": ("p / (((1 + a)", "1 / p * (((1 + a)"),
    "members and others swapped": (
        'roc(of["forget"], of["test"])',
        'roc(of["test"], of["forget"])',
    ),
    "loss for confidence": (
        '(sure["forget"], sure["test"])[0]',
        '(-sure["forget"], -sure["test"])[0]',
    ),
    "another split averaged in": ("if key == usual:", "if True:"),
    "control forgotten": ('(t["forget_lost"] - t["control_lost_mean"])', 't["forget_lost"]'),
    "control's deviation": ("lost.std(ddof=1)", "lost.std()"),
    "test labels flipped": ('data["true_targets"][split[name]] if name == "test" else own', "own"),
    "control of what was seen": ("control_sets(data, split, seen)", "control_sets(data, split)"),
    "wrong by the other share": ("r[~at_hand]", "r[at_hand]"),
    "mi with identities": ('if "support" not in split:', "if True:"),
    "flags not compared": ("if was != now:", "if False:"),
    "--overwrite ignored": ("args.overwrite or not path.is_file()", "not path.is_file()"),
    "a run loses its own original": ('("original", "retrained")} | run', "()} | known | run"),
    "every original left out": ('if own["metrics"][row] == known[row]}', "}"),
    "run appended twice": ("if identity_of(run) not in fresh]", "]"),
    "four decimals": ("round(value, 6)", "round(value, 4)"),
}


def test_the_whole_copy_passes(faces, capsys):
    checks(E, faces, capsys)


@pytest.mark.parametrize("old, new", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(old, new, faces, capsys):
    source, mutant = (ROOT / "evaluate.py").read_text(), types.ModuleType("mutant")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in evaluate.py"
    mutant.__file__ = str(ROOT / "evaluate.py")
    exec(compile(source.replace(old, new), "mutant", "exec"), vars(mutant))
    with pytest.raises((AssertionError, ValueError, KeyError, pytest.fail.Exception)):
        checks(mutant, faces, capsys)
