"""evaluate.py against numpy, scipy, a plain loop, golden text, and itself with a line changed.

python -m pytest tests/test_evaluate.py
"""

import argparse
import json
import pathlib
import re
import shlex
import types

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

import evaluate as E
import train as T

ROOT = pathlib.Path(__file__).parent.parent
PAPERS = ROOT.parent / "shared" / "papers"
MU1 = E.PLAN["mu1"]  # the fixture `run` puts a shorter one in its place


def made(kind, original, gold, unlearned, method="m", split="aaaa", **args):
    """A result file whose figures are known: scores are (retain, forget, test), in percent."""

    def row(values):
        out = {s: {"score": v / 100, "accuracy": v / 100, "loss": 1.0} for s, v in zip(("retain", "forget", "test"), values, strict=False)}
        return out | {"control": {"score": [values[0] / 100] * 2}, "mi": values[3] / 100}

    rows = {"original": row(original), "retrained": row(gold), "unlearned": row(unlearned)}
    comparison = E.compare(rows)
    common = dict(method=method, dataset="x", setting="y", seed=0, split_hash=split, args=args, tow=comparison["unlearned"]["tow"])
    return common | {"metrics": rows, "comparison": comparison, "access": {"unlearning": ["support"]}, "seconds": {"unlearn": 1.5}}


ORIGINAL, GOLD = (98.0, 97.0, 80.0, 1.0), (96.0, 85.0, 81.0, 30.0)
UNLEARNED = {"GA": [(95.0, 90.0, 79.0, 10.0), (94.0, 88.0, 80.0, 20.0), (96.0, 91.0, 78.0, 15.0)]}
UNLEARNED["METAUNLEARN"] = [(97.0, 93.0, 80.0, 5.0), (97.5, 92.0, 80.0, 6.0), (96.5, 96.0, 79.0, 7.0)]


def settings(dataset, table, out, seeds=3):
    return E.parse_args(["--table", table, "--dataset", dataset, "--seeds", str(seeds), "--out", str(out)])


def write(folder, dataset, table, label, k, result):
    """Put a made result where the table looks for it; returns its path."""
    args = settings(dataset, table, folder)
    row = next((r for r in (MU1 if table == "mu1" else E.PLAN[table])[1] if r[0] == label), ("", "baselines", "--method ft"))
    own, name = E.parsed(E.command(row, E.SETTINGS[dataset][0], k, args))
    path = E.result_path(own, name if label != "Second gold" else "retrain")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | {"args": {"epochs": own.epochs}}))
    return path


@pytest.fixture
def faces(tmp_path):
    for label, values in UNLEARNED.items():
        for k, value in enumerate(values):
            write(tmp_path, "toyfaces", "mu1", label, k, made("mu", ORIGINAL, GOLD, value))
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_is_students(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = E.interval(values)
    assert np.allclose([mean - half, mean + half], [low, high], rtol=1e-12)


def test_verdict_is_the_t_tests():
    """Within noise exactly where scipy's paired t-test has p > 0.05; the sign says which way, and which way is better."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        a, b = rng.normal(rng.normal(), 1, 4), rng.normal(0, 1, 4)
        mean, half = E.interval(a - b)
        said = E.verdict(mean, half, more_is_better=True)
        assert (said == "within noise") == (stats.ttest_rel(a, b).pvalue > 0.05)
        if said != "within noise":
            assert (said == "better") == (a.mean() > b.mean())
            assert E.verdict(mean, half, more_is_better=False) == {"better": "worse", "worse": "better"}[said]
        seen.add(said)
    assert seen == {"within noise", "better", "worse"}
    assert E.difference([(1.01, 1.0), (1.011, 1.0), (1.012, 1.0)], True) == "+0.0 ± 0.0 (no difference)"
    assert E.verdict(*E.interval([1.0]), True) == "one seed" and E.verdict(*E.interval([0.0, 0.0]), True) == "within noise"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_aggregation_against_numpy(faces):
    found, missing, skipped = E.collect(E.SETTINGS["toyfaces"][0], E.PLAN["mu1"][1], settings("toyfaces", "mu1", faces))
    lines = E.cells(E.rows_of(found, "mu"), "mu", {"GA": (1.0, 2.0, 3.0, 4.0)}, "METAUNLEARN")
    by_label = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[1:]}
    tow = {
        label: np.array([100 * np.prod([1 - abs(v[i] - GOLD[i]) / 100 for i in range(3)]) for v in values])
        for label, values in UNLEARNED.items()
    }
    floor = 100 * np.prod([1 - abs(ORIGINAL[i] - GOLD[i]) / 100 for i in range(3)])
    d_f = np.array([v[1] for v in UNLEARNED["GA"]])
    ga = by_label["GA"]
    assert ga["D_f"] == f"{d_f.mean():.1f} ± {d_f.std(ddof=1):.1f}" and ga["ToW"] == f"{tow['GA'].mean():.1f} ± {tow['GA'].std(ddof=1):.1f}"
    for column, other in (("less Trained", floor), ("less METAUNLEARN", tow["METAUNLEARN"])):
        difference = tow["GA"] - other
        half = difference.mean() - stats.ttest_1samp(difference, 0).confidence_interval(0.95).low
        assert ga[column].startswith(f"{difference.mean():+.1f} ± {half:.1f} (")
    lost = np.array([(ORIGINAL[1] - v[1]) - (ORIGINAL[0] - v[0]) for v in UNLEARNED["GA"]])
    assert (
        ga["D_f less control"] == f"{lost.mean():.1f} ± {lost.std(ddof=1):.1f}"
        and ga["paper's ToW"] == "4.0 (1.0 / 2.0 / 3.0)"
        and ga["n"] == "3"
    )
    assert by_label["Trained"]["ToW"] == f"{floor:.1f} ± 0.0" and by_label["Retrained"]["ToW"] == "100.0 ± 0.0"
    assert not skipped and len(missing) == 3 * (len(E.PLAN["mu1"][1]) - 2)


def test_average_gap_against_numpy(tmp_path):
    values = [(95.0, 90.0, 79.0, 10.0), (94.0, 88.0, 80.0, 20.0)]
    for k, value in enumerate(values):
        write(tmp_path, "digits", "ltu3", "LTU", k, made("ltu", ORIGINAL, GOLD, value))
    found, _, _ = E.collect(E.SETTINGS["digits"][0], E.PLAN["ltu3"][1], settings("digits", "ltu3", tmp_path, 2))
    lines = E.cells(E.rows_of(found, "ltu"), "ltu", E.PAPER["ltu3", "CIFAR-10, 10 %"], "LTU")
    row = dict(zip(lines[0], lines[-1], strict=True))
    gap = [np.mean([abs(v[i] - GOLD[i]) for i in range(4)]) for v in values]
    assert row["average gap"] == f"{np.mean(gap):.1f} ± {np.std(gap, ddof=1):.1f}"
    assert row["UA"].startswith("11.0 ± 1.4 (4.0)")  # UA 10 and 12; the gold model's is 15
    assert row["paper's average gap"] == "0.36 (4.37 / 99.83 / 93.95 / 12.97)"  # the paper says 0.36 itself


def test_a_row_of_table_2_is_compared_with_ltu_at_its_own_rho(tmp_path):
    shown = {"FT, rho 0.1": (90.0,) * 4, "LTU, rho 0.1": (80.0,) * 4, "FT, rho 0.3": (90.0,) * 4, "LTU, rho 0.3": (95.0,) * 4}
    for label, values in shown.items():
        for k in range(2):
            write(tmp_path, "digits", "ltu2", label, k, made("ltu", ORIGINAL, GOLD, tuple(v + k for v in values)))
    found, _, _ = E.collect(E.SETTINGS["digits"][0], E.PLAN["ltu2"][1], settings("digits", "ltu2", tmp_path, 2))
    lines = E.cells(E.rows_of(found, "ltu"), "ltu", {}, "LTU")
    column = {line[0]: line[lines[0].index("less LTU")] for line in lines[1:]}
    gap = lambda label, k: np.mean([abs(v + k - g) for v, g in zip(shown[label], GOLD, strict=True)])
    for rho in ("0.1", "0.3"):
        mean = np.mean([gap(f"FT, rho {rho}", k) - gap(f"LTU, rho {rho}", k) for k in range(2)])
        assert column[f"FT, rho {rho}"].startswith(f"{mean:+.1f}") and column[f"LTU, rho {rho}"] == ""


GOLDEN = """
mu1, drawn faces, 10 of 120 identities
             D_r         D_f         D_te        ToW          less Trained               less METAUNLEARN     D_f less control  paper's ToW  touches  UT, s      n
Trained      98.0 ± 0.0  97.0 ± 0.0  80.0 ± 0.0  85.4 ± 0.0                                                   0.0 ± 0.0                                          3
Retrained    96.0 ± 0.0  85.0 ± 0.0  81.0 ± 0.0  100.0 ± 0.0                                                  10.0 ± 0.0                                         3
GA           95.0 ± 1.0  89.7 ± 1.5  79.0 ± 1.0  92.5 ± 1.5   +7.1 ± 3.7 (better)        +3.3 ± 3.0 (better)  4.3 ± 0.6                      support  1.5 ± 0.0  3
METAUNLEARN  97.0 ± 0.5  93.7 ± 2.1  79.7 ± 0.6  89.2 ± 2.1   +3.8 ± 5.3 (within noise)                       2.3 ± 2.6                      support  1.5 ± 0.0  3
"""


def test_golden_text_in_the_terminal_and_in_markdown(faces, capsys):
    E.main(["--table", "mu1", "--seeds", "3", "--out", str(faces)])
    out = capsys.readouterr().out
    assert out.startswith(GOLDEN), out[: len(GOLDEN)]
    assert "no second gold model yet" in out and "differences paired by seed" in out
    E.main(["--table", "mu1", "--seeds", "3", "--out", str(faces), "--markdown"])
    text = capsys.readouterr().out
    assert "| GA | 95.0 ± 1.0 | 89.7 ± 1.5 | 79.0 ± 1.0 | 92.5 ± 1.5 | +7.1 ± 3.7 (better) |" in text and text.count("\n| --- |") == 1


def test_the_second_gold_model_is_a_row(faces, capsys):
    for k in range(3):
        write(faces, "toyfaces", "mu1", "Second gold", k, made("mu", ORIGINAL, GOLD, (96.0, 84.0, 81.0, 29.0)))
    E.main(["--table", "mu1", "--seeds", "3", "--out", str(faces)])
    out = capsys.readouterr().out
    assert re.search(r"^Second gold +96.0 ± 0.0 +84.0 ± 0.0 +81.0 ± 0.0 +99.0 ± 0.0 +\+13.6 ± 0.0 \(better\)", out, re.M), out
    assert "no second gold" not in out


def test_bad_files_are_named_and_skipped(faces, capsys):
    """Cut short, another version, split, recipe or model: named, never averaged in."""
    whole = {k: made("mu", ORIGINAL, GOLD, (50.0, 50.0, 50.0, 50.0)) for k in range(3)}
    cut = write(faces, "toyfaces", "mu1", "SSD", 0, whole[0])
    cut.write_text(cut.read_text()[:-200])
    old = write(faces, "toyfaces", "mu1", "SSD", 1, {k: v for k, v in whole[1].items() if k != "comparison"})
    split = write(faces, "toyfaces", "mu1", "SSD", 2, whole[2] | {"split_hash": "bbbb"})
    recipe = write(faces, "toyfaces", "mu1", "JiT", 0, whole[0])
    recipe.write_text(recipe.read_text().replace('"epochs": 50', '"epochs": 49'))
    model = write(faces, "toyfaces", "mu1", "JiT", 1, made("mu", (97.0, 90.0, 80.0, 1.0), GOLD, (50.0, 50.0, 50.0, 50.0)))
    partial = whole[2]
    del partial["metrics"]["unlearned"]["test"]
    partial = write(faces, "toyfaces", "mu1", "JiT", 2, partial)
    E.main(["--table", "mu1", "--seeds", "3", "--out", str(faces)])
    out = capsys.readouterr().out
    reasons = {cut: "cut short", old: "no comparison", split: "another split", recipe: "--epochs 49, this table has 50"}
    reasons |= {model: "another original or gold model", partial: "row unlearned is not complete"}
    for path, reason in reasons.items():
        assert re.search(rf"^skipped {re.escape(str(path))}: .*{reason}", out, re.M), (path, out)
    assert "SSD" not in out.split("runs are missing")[0].split("D_f less control")[1] and GOLDEN.splitlines()[5] in out


def test_an_empty_folder_says_what_to_run(tmp_path, capsys):
    missing = E.main(["--table", "ltu4", "--seeds", "1", "--out", str(tmp_path / "none")])
    out = capsys.readouterr().out
    assert missing == 3 and "holds no result" in out and "python ltu.py --dataset digits" in out and "--combine iterative" in out


@pytest.mark.parametrize("dataset", E.SETTINGS)
def test_every_row_has_a_command_that_its_script_takes(dataset, tmp_path):
    """All tables: each missing run is listed once, by a line that parses to the same file that the table reads."""
    faces = "--ids" in E.SETTINGS[dataset][0][1]
    for table in (t for t in E.PLAN if t.startswith("mu") == faces):
        args = settings(dataset, table, tmp_path, 2)
        for part in E.SETTINGS[dataset]:
            _, missing, _ = E.collect(part, E.PLAN[table][1], args)
            paths = [E.result_path(*E.parsed(line)) for _, line in missing]
            assert len(set(paths)) == len(paths) and (missing or table == "mu7")
            lines = E.grouped(missing)
            assert sum(
                len(shlex.join(line).split("--method ")[1].split(" --")[0].split()) if "--method" in line else 1 for line in lines
            ) == len(missing)
            for line in lines:
                E.SCRIPTS[line[0].removesuffix(".py")].parse_args(line[1:])


IN_PAPER = {
    "Retrained": "Retrain",
    "w/o ForFeed": "LTU (w/o ForFeed)",
    "w/o RemFeed": "LTU (w/o RemFeed)",
    "w/o MetaOpt": "LTU (w/o MetaOpt)",
}
IN_PAPER |= {"GradAdd": "LTU (w/ GradAdd)", "Iterative": "LTU (w/ Iterative", "other N_S": ("50 Id", "20 Id", "10 Id", "5 Id")}
LOSSES = {"METAUNLEARN": "First & Second terms + Accuracy"}


@pytest.mark.skipif(not PAPERS.is_dir(), reason="the papers' texts are not here")
def test_the_papers_numbers_are_the_papers():
    """Each row of numbers stands in a line of the paper's text that begins with the row's own name; what is lost, in its sentences."""
    for (table, column), rows in E.PAPER.items():
        lines = (PAPERS / ("metaunlearn.txt" if table.startswith("mu") else "ltu.txt")).read_text().splitlines()
        for label, values in rows.items():
            if table == "mu4" or ("CelebA/" in column and table == "mu1"):
                assert all(f"{value:.1f}" in " ".join(lines) for value in values)
                continue
            digits = 1 if table.startswith("mu") else 2
            want = [f"{v:.{digits}f}" for v in values]
            name = (LOSSES if table == "mu3" else {}).get(label) or IN_PAPER.get(label, label.split(", rho")[0])
            name = "Reference" if table == "mu7" and label == "METAUNLEARN" else name
            pattern = r"(?<![\d.])" + r"\b.*?(?<![\d.])".join(map(re.escape, want)) + r"(?!\d)"
            names = [n.replace(" ", "") for n in ([name] if isinstance(name, str) else name)]  # "J i T" in one place
            own = [line for line in lines if line.replace(" ", "").startswith(tuple(names))]
            if table == "mu3":  # and no longer name, such as that of the row with "+ Accuracy"
                own = [line for line in own if re.match(re.escape(name) + r"( \[24\])?\t", line)]
            assert any(re.search(pattern, line) for line in own), (table, column, label, want)


def test_no_two_settings_share_a_result_file(tmp_path):
    """faces-small and faces-vit, say, forget the same people of the same data set with other models."""
    owner = {}
    for dataset, all_parts in E.SETTINGS.items():
        table = "mu1" if "--ids" in all_parts[0][1] else "ltu1"
        for part in all_parts:
            for row in E.PLAN[table][1]:
                path = E.result_path(*E.parsed(E.command(row, part, 0, settings(dataset, table, tmp_path))))
                assert owner.setdefault(path, (dataset, row[0])) == (dataset, row[0]), path


@pytest.mark.parametrize("dataset", E.SETTINGS)
@pytest.mark.parametrize("table", [t for t in E.PLAN if t not in ("mu1", "mu2", "ltu1")])
def test_an_ablation_differs_in_its_own_flags_alone(table, dataset, tmp_path):
    part = E.SETTINGS[dataset][0]
    if ("--ids" in part[1]) != table.startswith("mu"):
        return
    last = E.PLAN[table][1][-1]
    full = vars(E.parsed(E.command(last, part, 0, settings(dataset, table, tmp_path)))[0])
    for row in E.PLAN[table][1]:
        line = E.command(row, part, 0, settings(dataset, table, tmp_path))
        if line is None or row[1] != last[1]:
            continue
        own = vars(E.parsed(line)[0])
        changed = {k for k in own if own[k] != full[k]} - {"method", "label"}
        named = {w.removeprefix("--").removeprefix("no-").replace("-", "_") for w in shlex.split(row[2]) if w.startswith("--")}
        assert changed <= named - {"preset"} and (changed or row == last or "120" in row[0] or "rho 0.3" in row[0]), (row, changed)


# ---------------------------------------------------------------------------------------------------------------------
# Membership inference


def confidences(seed=0, n=400, references=3, memorised=True):
    """Confidences of made models: each image has its own difficulty; a model that memorised D_f is sure of it all the same."""
    rng = np.random.default_rng(seed)
    easy = {s: rng.normal(0, 2, n) for s in ("retain", "forget", "val", "test")}
    model = lambda seen: {s: torch.tensor(1 / (1 + np.exp(-(e + rng.normal(0, 0.5, n) + 3 * (s in seen))))) for s, e in easy.items()}
    golds = [model(("retain",)) for _ in range(references)]
    return model(("retain", "forget") if memorised else ("retain",)), golds


def plain_rmia(x, x_references, z, z_references, gamma, a):
    out = []
    for i in range(len(x)):
        wins = 0
        for j in range(len(z)):
            p_x = ((1 + a) * sum(r[i] for r in x_references) / len(x_references) + (1 - a)) / 2
            p_z = ((1 + a) * sum(r[j] for r in z_references) / len(z_references) + (1 - a)) / 2
            wins += (x[i] / p_x) / (z[j] / p_z) >= gamma
        out.append(wins / len(z))
    return out


@pytest.mark.parametrize("gamma, a", [(1.0, 0.3), (2.0, 0.0), (1.3, 0.9)])
def test_rmia_against_a_plain_loop(gamma, a, module=E):
    rng = torch.Generator().manual_seed(0)
    x, z = (torch.rand(n, generator=rng, dtype=torch.float64) for n in (17, 23))
    x_references, z_references = (torch.rand(4, n, generator=rng, dtype=torch.float64) for n in (17, 23))
    got = module.rmia(x, x_references, z, z_references, gamma, a)
    want = plain_rmia(x.tolist(), x_references.tolist(), z.tolist(), z_references.tolist(), gamma, a)
    assert np.allclose(got, want) and 0 < np.mean(want) < 1


def test_a_small_population_hides_no_member(module=E):
    """Where all members beat every z their shares tie at 1; LR must still order them, or one easy test image hides them all."""
    x, z = torch.tensor([0.9, 0.99, 0.95]).double(), torch.tensor([0.1, 0.2]).double()
    got = module.rmia(x, torch.full((2, 3), 0.5).double(), z, torch.full((2, 2), 0.5).double())
    assert torch.allclose(got, torch.ones(3).double()) and got.argsort().tolist() == [0, 2, 1]


def test_attacks_have_known_answers(module=E):
    """On a gold model all are at chance; on the original they are not, and RMIA, which knows how easy an image is, finds more."""
    original, golds = confidences(n=2000)
    gold = module.membership(golds[0], golds[1:])
    assert abs(gold["loss AUC"] - 50) < 3 and abs(gold["RMIA AUC"] - 50) < 3
    assert gold["TPR 1 %"] < 3 and gold["TPR 0.1 %"] < 1
    seen = module.membership(original, golds)
    assert seen["loss AUC"] > 75 and seen["RMIA AUC"] > seen["loss AUC"] + 5 and seen["TPR 1 %"] > 5
    assert seen["SVC"] < gold["SVC"] - 20


def test_roc_against_scikit_learn():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 3000), rng.normal(0, 1, 3000)
    truth, scores = np.r_[np.ones(3000), np.zeros(3000)], np.r_[members, others]
    auc, at = E.roc(members, others)
    false, true, _ = roc_curve(truth, scores)
    assert auc == roc_auc_score(truth, scores)
    for level, rate in at.items():
        allowed = np.sort(others)[::-1][int(level * 3000)]  # so many others, and no more, may lie above the threshold
        assert rate == (members > allowed).mean() == true[false <= level].max()
    flipped, _ = E.roc(others, members)
    assert flipped == pytest.approx(1 - auc)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


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
    assert E.rank_correlation([1, 2, 9], [3, 4, 5]) == pytest.approx(1) and E.rank_correlation([1, 2, 3], [7, 7, 7]) == 0


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """A tiny setting of its own, all of it run from the command line: two rows, two splits, second gold models."""
    folder = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    flags = f"--dataset {small} --ids 4 --epochs 8 --batch-size 32 --image-size 16"
    patch.setitem(E.SETTINGS, "tiny", [("tiny faces", flags, None)])
    patch.setitem(E.OWN_FLAGS, ("tiny", "metaunlearn", ""), "--meta-epochs 1 --hidden 16")
    patch.setitem(E.PLAN, "mu1", ("mu", [("GA", "baselines", "--method ga"), ("METAUNLEARN", "metaunlearn", "--preset paper")]))
    places = [
        "--dataset",
        "tiny",
        "--seeds",
        "2",
        "--out",
        folder / "out",
        "--checkpoint-dir",
        folder / "ckpt",
        "--data-dir",
        folder / "data",
    ]
    places = [str(p) for p in places] + ["--device", "cpu"]

    def in_process(line):
        E.SCRIPTS[pathlib.Path(line[1]).stem].main(line[2:])
        return argparse.Namespace(returncode=0)

    with pytest.MonkeyPatch.context() as here:  # in this process: importing torch for each run would take longer than the run
        here.setattr(E, "subprocess", argparse.Namespace(run=in_process))
        assert E.main(["--table", "mu1", "--run", *places]) == 0
    E.main(["--ceiling", *places])
    yield folder, places
    patch.undo()


def test_run_makes_what_is_missing_once(run, capfd):
    folder, places = run
    files = sorted((folder / "out").rglob("*.json"))
    assert len(files) == 6  # two rows and the second gold model, two splits
    when = [f.stat().st_mtime_ns for f in files]
    assert E.main(["--table", "mu1", "--run", *places]) == 0
    E.main(["--ceiling", *places])
    assert [f.stat().st_mtime_ns for f in files] == when
    assert "Second gold" in capfd.readouterr().out
    files[0].write_text(files[0].read_text()[:99])  # cut short: made again
    assert E.main(["--table", "mu1", "--run", *places]) == 0
    assert "tow" in json.loads(files[0].read_text())


def test_the_second_gold_model_shares_only_the_data(run):
    folder, places = run
    models = [torch.load(next((folder / "ckpt").rglob(f"ids4-split0/gold-seed{s}.pt")), weights_only=True) for s in (0, 1000)]
    assert models[0]["split"] == models[1]["split"]
    assert all(not torch.equal(a, models[1]["model"][k]) for k, a in models[0]["model"].items() if k.endswith("weight") and a.ndim > 1)


def test_attack_on_every_checkpoint(run, capsys):
    folder, places = run
    E.main(["--attack", *places])
    (folder / "out" / "tiny" / "small-ids4-split0" / "attack-seed0.json").write_text('{"attacks": {"Trained": {}}}')
    E.main(["--attack", *places])
    assert "attack-seed0.json: cut short or of another version" in capsys.readouterr().out
    next((folder / "ckpt").rglob("ids4-split1/ga-*.pt")).unlink()  # made again from its command
    E.main(["--attack", *places])
    assert "not attacked: seed 0, seed 1" in capsys.readouterr().out
    E.main(["--attack", *places, "--references", "1", "--run"])
    out = capsys.readouterr().out
    for label in ("Trained", "Retrained", "Second gold", "GA", "METAUNLEARN"):
        assert re.search(rf"^{label} +\d", out, re.M), out
    assert "The goal is Retrained's figure" in out and "not attacked" not in out
    path = next((folder / "out").rglob("*split1/attack-seed0.json"))
    saved, when = json.loads(path.read_text()), path.stat().st_mtime_ns
    E.main(["--attack", *places, "--run"])  # from its files: nothing is attacked twice
    assert path.stat().st_mtime_ns == when and out.split("membership")[1] in capsys.readouterr().out
    assert saved["attacks"]["Trained"]["loss AUC"] > saved["attacks"]["Retrained"]["loss AUC"]
    assert saved["references"] == 2 and all(0 <= v <= 100 for row in saved["attacks"].values() for v in row.values())


def test_unlearned_models_are_those_that_were_measured(run):
    """From its checkpoint each row's model has the scores of its result file, METAUNLEARN's by one step with the saved meta-loss."""
    folder, places = run
    args = E.parse_args(["--attack", *places])
    part = E.SETTINGS["tiny"][0]
    found, _, _ = E.collect(part, E.PLAN["mu1"][1], args)
    own, data, split = E.opened(part, 1, args)
    model = T.train("original", data, split, own)[0]
    for row in E.PLAN["mu1"][1]:
        m = E.unlearned_model(E.command(row, part, 1, args), model, data, split, False)
        logits = E.predict(m, lambda i: E.raw_batch(data, i), split["forget"], data["device"])
        got = E.score(logits, data["targets"][split["forget"]])
        assert got == pytest.approx(found[row[0]][1]["metrics"]["unlearned"]["forget"]["score"], abs=1e-6)


def test_all_leaves_out_tables_without_a_row_of_their_own(faces, capsys):
    """METAUNLEARN's own row stands in mu3 too; alone it says nothing that mu1 does not. With one of mu3's rows the table is back."""
    places = ["--table", "all", "--dataset", "toyfaces", "--seeds", "3", "--out", str(faces)]
    E.main(places)
    assert re.findall(r"^(mu\w+),", capsys.readouterr().out, re.M) == ["mu1"]
    write(faces, "toyfaces", "mu3", "First term", 0, made("mu", ORIGINAL, GOLD, UNLEARNED["GA"][0]))
    E.main(places)
    assert re.findall(r"^(mu\w+),", capsys.readouterr().out, re.M) == ["mu1", "mu3"]


@pytest.mark.parametrize("number", [4, 5])
def test_figures_are_drawn_and_not_empty(run, capsys, number):
    import matplotlib.image

    folder, places = run
    E.main(["--figure", str(number), *places])
    out = capsys.readouterr().out
    assert "Spearman" in out and "identities of 2 splits" in out
    picture = matplotlib.image.imread(folder / "out" / f"figure{number}-tiny-1.png")[..., :3]
    assert picture.shape[0] > 300 and picture.std() > 0.05
    assert np.ptp(picture, axis=2).max() < 0.02  # readable in black and white: there is no colour
    E.main(["--figure", str(number), *places, "--seeds", "1"])
    out = capsys.readouterr().out
    assert "(one seed)" in out and "nan" not in out.lower()


def test_figures_distances_against_a_loop(run):
    folder, places = run
    args = E.parse_args(["--figure", "4", *places])
    part = E.SETTINGS["tiny"][0]
    shown = E.people(part, 0, args, E.PLAN["mu1"][1])
    own, data, split = E.opened(part, 0, args)
    model = T.train("original", data, split, own)[0]
    feature = lambda i: model(E.raw_batch(data, [i]))[0][0].detach().numpy()
    owner, centers = data["identities"], {}
    for person in shown["forget"]:
        support = [i for i in split["support"] if owner[i] == person["identity"]]
        mine = [feature(i) for i in split["forget"] if owner[i] == person["identity"]]
        centers[person["identity"]] = np.mean(mine, 0)
        assert len(support) == 1 and np.linalg.norm(feature(support[0]) - np.mean(mine, 0)) == pytest.approx(person["distance"], rel=1e-3)
    person = shown["retain"][3]
    center = np.mean([feature(i) for i in split["retain"] if owner[i] == person["identity"]], 0)
    assert min(np.linalg.norm(center - c) for c in centers.values()) == pytest.approx(person["distance"], rel=1e-3)
    models = [E.unlearned_model(E.command(row, part, 0, args), model, data, split, False) for row in E.PLAN["mu1"][1]]
    gold, labels = T.train("gold", data, split, own)[0], data["targets"]

    def right(m, indices):
        return ((m(E.raw_batch(data, indices))[1] > 0) == (labels[indices] > 0.5)).float().mean().item()

    mine = [i for i in split["forget"] if owner[i] == shown["forget"][1]["identity"]]
    gap = 100 * (np.mean([right(m, mine) for m in models]) - right(gold, mine))  # above 0: knows them still
    assert shown["forget"][1]["gap"] == pytest.approx(gap, abs=1e-3)
    mine = [i for i in split["retain"] if owner[i] == person["identity"]]
    average = lambda m: E.score(m(E.raw_batch(data, mine))[1].detach(), labels[mine])
    assert person["change"] == pytest.approx(100 * (np.mean([average(m) for m in models]) - average(model)), abs=1e-3)
    assert any(abs(p["change"]) > 1e-6 for p in shown["retain"]) and any(abs(p["gap"]) > 1e-6 for p in shown["forget"])
    assert len(shown["forget"]) == 4 and len(shown["retain"]) == len(np.unique(owner[split["retain"]]))


def test_figure_6_keeps_real_people_out_of_git(run, capsys, monkeypatch):
    import subprocess

    folder, places = run
    E.main(["--figure", "6", *places])  # a data set of its own counts as real people
    out = capsys.readouterr().out
    assert (folder / "data" / "figure6-tiny-1.png").stat().st_size > 5000 and not (folder / "out" / "figure6-tiny-1.png").exists()
    assert "not for publishing" in out and re.search(r"^\d+ +\d+\.\d\d +[+-]", out, re.M)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / "data" / "figure6-tiny-1.png").unlink()
    with pytest.raises(SystemExit):
        E.main(["--figure", "6", *places])
    assert "real people" in capsys.readouterr().err and not (folder / "data" / "figure6-tiny-1.png").exists()
    (folder / ".gitignore").write_text("data/\n")
    E.main(["--figure", "6", *places])
    assert (folder / "data" / "figure6-tiny-1.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The command line, and broken copies


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--table", "mu1", "--dataset", "digits"], "choose toyfaces"),
        (["--figure", "4", "--dataset", "cifar10"], "is not about"),
        (["--table", "ltu1", "--seeds", "0"], "must be at least 1"),
        (["--table", "ltu2", "--part", "2"], "the first part alone"),
        (["--table", "ltu1", "--flags", "--init 'x"], "no closing quotation"),
        (["--table", "ltu1", "--flags", "--seed 3"], "see --seeds"),
        (["--table", "ltu9"], "invalid choice"),
        (["--table", "ltu1", "--part", "3"], "has parts 1 to 2"),
        ([], "required"),
        (["--figure", "4", "--out", "nowhere", "--seeds", "1"], "--table mu1"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        E.main(arguments)
    text = capsys.readouterr().err
    assert error.value.code == 2 and message in text and text.count("\n") == 1


MUTANTS = {
    "population instead of sample deviation": ("values.std(ddof=1) / np.sqrt", "values.std() / np.sqrt"),
    "normal instead of Student": ("stats.t.ppf(0.975, len(values) - 1)", "stats.norm.ppf(0.975)"),
    "gap of means instead of mean of gaps' sign": ('(v["main"], v["floor"])', '(v["floor"], v["main"])'),
    "RMIA without the population": (">= gamma * ratio[1][None]", ">= gamma"),
    "RMIA without references": ("(((1 + a) * q.mean(0) + 1 - a) / 2)", "1.0"),
    "RMIA upside down": ("p / (((1 + a)", "1 / p * (((1 + a)"),
    "members and others swapped": ('roc(score_of["forget"], score_of["test"])', 'roc(score_of["test"], score_of["forget"])'),
    "loss instead of confidence": ('roc(sure["forget"], sure["test"])[0]', 'roc(-sure["forget"], -sure["test"])[0]'),
    "another split averaged in": ("if key == usual:", "if True:"),
    "control forgotten": ('table["forget_lost"] - table["control_lost_mean"]', 'table["forget_lost"]'),
}


def checks(module, faces, capsys):
    """All that a broken copy must fail: the golden table beside a file of another split, RMIA's loop, the known answers."""
    write(faces, "toyfaces", "mu1", "SSD", 0, made("mu", ORIGINAL, GOLD, (50.0, 50.0, 50.0, 50.0), split="bbbb"))
    module.main(["--table", "mu1", "--seeds", "3", "--out", str(faces)])
    table = "".join(line + "\n" for line in capsys.readouterr().out.split("\n") if not line.startswith("skipped"))
    assert table.startswith(GOLDEN)
    test_rmia_against_a_plain_loop(1.0, 0.3, module)
    test_attacks_have_known_answers(module)


def test_the_whole_copy_passes(faces, capsys):
    checks(E, faces, capsys)


@pytest.mark.parametrize("old, new", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(old, new, faces, capsys):
    source = (ROOT / "evaluate.py").read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in evaluate.py"
    mutant = types.ModuleType("mutant")
    mutant.__file__ = str(ROOT / "evaluate.py")
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    with pytest.raises((AssertionError, ValueError)):
        checks(mutant, faces, capsys)
