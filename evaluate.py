"""What all methods share: measuring, choosing settings, reporting; tables, attacks, figures.

Usage:
    python evaluate.py --table ltu1                      # LTU's Table 1, from our digits-10.jsonl
    python evaluate.py --table mu1 --results results/faces-vit-20.jsonl --plot faces-vit.png
    python evaluate.py --table all --results runs/digits-*        # from folders of runs of your own
    python evaluate.py --pack mine.jsonl --results runs/digits-*  # append them to a packed file
    python evaluate.py --attack --dataset digits         # SVC, loss AUC and RMIA on all checkpoints
    python evaluate.py --figure 4 --dataset toyfaces --seeds 5    # METAUNLEARN's figures 4, 5 and 6

The methods import this file; it imports none of them. A table's rows are runs, found by their names
(TABLES). Differences are paired by split seed, with Student's 95 % interval.
"""

import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import math
import pathlib
import re
import shutil
import subprocess

import numpy as np
import torch

import common
from common import accuracy, average_gap, confidence, fail, membership_inference, say, score, tow
from data import TOY_REMEMBERED, control_sets, load, predict, setting, simulated_requests
from train import PRESETS, add_recipe_arguments, checkpoint_folder, open_data, train, train_both

HERE = pathlib.Path(__file__).parent
# Read when the run begins, for the files may change before it ends.
CODE = b"".join(file.read_bytes() for file in sorted(HERE.glob("*.py")))

# --------------------------------------------------------------------------------------------------
# Measuring a model


def measure(model, data: dict, split: dict, amp=False, seen=()) -> dict:
    """The raw row of a model: score and accuracy on D_r, D_f, D_v, D_te; the score of control sets.

    All in [0, 1]. The test score is against the true labels where --label-noise
    flipped some. seen: the part of D_r that the method may use; control sets lie outside of it
    (data.control_sets). Random samples also get `mi`, SalUn's membership metric, and with flipped
    labels `wrong` (see wrong_by_label); drawn faces `remembered`: of each of shown_people how
    probable the model finds the right answers on what no picture shows.
    """
    controls, row, sure, wrong = control_sets(data, split, seen), {}, {}, {}
    by_identity, sets = "support" in split, ["retain", "forget", "val", "test"]
    hidden = np.isin(data.get("target_names", ()), TOY_REMEMBERED) if by_identity else np.zeros(1)
    if split.get("test_forgotten"):  # test images of a forgotten class, which should be gone too
        sets.append("test_forgotten")
    for name in sets:
        logits, own = predict(model, data, split[name], amp), data["targets"][split[name]]
        right = data["true_targets"][split[name]] if name == "test" else own
        row[name] = {"score": score(logits, right), "accuracy": accuracy(logits, right)}
        if name == "retain":
            row["control"] = {"score": [score(logits[c], own[c]) for c in controls]}
        if name in ("retain", "forget") and hidden.any():
            right, owner = (logits * (2 * own - 1)).sigmoid(), data["identities"][split[name]]
            for who in set(shown_people(split)) & set(owner.tolist()):
                mean = right[owner == who][:, hidden].mean().item()
                row.setdefault("remembered", {}).setdefault(name, {})[str(who)] = mean
        if not by_identity:
            sure[name] = confidence(logits, own)
            wrong[name] = (logits.argmax(1) != own).numpy() if own.ndim == 1 else None
    if not by_identity:
        row["mi"] = membership_inference(sure["retain"], sure["test"], sure["forget"])
        if (data["targets"] != data["true_targets"]).any():
            row["wrong"] = wrong_by_label(wrong, data, split, seen)
    return row


def measure_all(models: dict, data, split, args, seen=()) -> dict:
    """{row: measure of its model}; rows of the original and the gold model are kept in a file.

    These two are the same in many runs. The file, beside their checkpoints, is good for the same
    weights, images and code alone, of which it holds a hash.
    """
    rows = {}
    about = repr((split["hash"], data["device"].type, args.amp, list(seen))).encode()
    about = hashlib.sha256(CODE + about)
    for row, model in models.items():
        # Several processes measure together, so that none may find a file that another does not.
        if row not in ("original", "retrained") or common.rank_and_world()[1] > 1:
            rows[row] = measure(model, data, split, args.amp, seen)
            continue
        path = checkpoint_folder(args) / f"{row}-seed{args.seed}.measured.json"
        own = f"{about.hexdigest()} {common.digest_of(model)}"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text())
            if kept["about"] == own:
                rows[row] = kept["measured"]
                continue
        rows[row] = measure(model, data, split, args.amp, seen)
        common.write_json(path, {"about": own, "measured": rows[row]})
    return rows


def shown_people(split) -> list[int]:
    """Three forgotten people and three kept ones, whom the figure of drawn faces shows."""
    kept = [who for who in split["train_ids"] if who not in split["forget_ids"]]
    return split["forget_ids"][:3] + kept[:3]


def wrong_by_label(wrong: dict, data, split, seen) -> dict:
    """Error on flipped and clean images of D_f, D_r_hat and the rest of D_r, in [0, 1].

    A low gap alone does not prove that D_f was forgotten: a method that drops every wrong label has
    one too. Returns {set: {flipped, clean}}, None where a set has no such image.
    """
    flipped, share = (data["targets"] != data["true_targets"]).numpy(), {}
    at_hand, f, r = np.isin(split["retain"], list(seen)), wrong["forget"], wrong["retain"]
    in_f, in_r = flipped[split["forget"]], flipped[split["retain"]]
    sets = {"D_f": (f, in_f), "D_r_hat": (r[at_hand], in_r[at_hand])}
    sets["rest of D_r"] = (r[~at_hand], in_r[~at_hand])
    for name, (errors, is_flipped) in sets.items():
        parts = {"flipped": errors[is_flipped], "clean": errors[~is_flipped]}
        share[name] = {kind: float(x.mean()) if len(x) else None for kind, x in parts.items()}
    return share


def paper_figures(row: dict) -> dict:
    """UA, RA, TA and MI of a row of measure, in [0, 1] (LTU Sec. 4.1)."""
    ra, ta = row["retain"]["accuracy"], row["test"]["accuracy"]
    return {"ua": 1 - row["forget"]["accuracy"], "ra": ra, "ta": ta, "mi": row["mi"]}


MAIN_SETS = ("retain", "forget", "test")


def compare(rows: dict) -> dict:
    """Each row's ToW against the gold model, Eq. (7), and what it lost on D_f and control sets.

    rows: {original, retrained, others: as measure gives them}. All in [0, 1].
    """
    scores = {name: {s: row[s]["score"] for s in MAIN_SETS} for name, row in rows.items()}
    table, before = {}, rows["original"]
    for name, row in rows.items():
        lost = np.array(before["control"]["score"]) - np.array(row["control"]["score"])
        forgotten = before["forget"]["score"] - row["forget"]["score"]
        table[name] = {
            "tow": tow(scores[name], scores["retrained"]),
            "forget_lost": forgotten,
            "control_lost_mean": float(lost.mean()),
            "control_lost_std": float(lost.std(ddof=1)),
            "controls_that_lost_less": float((lost < forgotten).mean()),
        }
    return table


# --------------------------------------------------------------------------------------------------
# Choosing settings on training and validation data alone


def simulated_problems(model, data, split, args, images=256) -> list[dict]:
    """Simulated unlearning requests by which the settings of an identity method may be chosen.

    A simulated request has no gold model, so the scores to aim at are estimated. On retained and
    validation images (at most `images` of each) they are the original's own; on forgotten images,
    its mean score on as many validation identities, over 10 draws. Each problem holds index arrays
    `support` and `sets`, whose `test` is of validation images, and the scores `want`. Source: ours,
    after Eq. (7).
    """
    rng = np.random.default_rng([args.seed, args.split_seed, 6])
    val, everyone = np.array(split["val"]), np.array(split["retain"] + split["forget"])
    val_logits, owner = predict(model, data, val, args.amp), data["identities"][val]
    seen_as_new, people = [], np.unique(owner)
    for _ in range(10):
        own = np.isin(owner, rng.choice(people, min(args.ids, len(people)), replace=False))
        seen_as_new.append(score(val_logits[own], data["targets"][val[own]]))
    some = rng.choice(len(val), min(images, len(val)), replace=False)
    test = score(val_logits[some], data["targets"][val[some]])
    problems, number = [], 1 if args.dry_run else 3
    no_epoch = 1_000_000  # a number that no epoch of meta-training has
    simulated = simulated_requests(data, split, args.ids, args.seed, no_epoch)
    for _, (support, forget) in zip(range(number), simulated, strict=False):
        others = np.setdiff1d(everyone, np.concatenate([support, forget]))
        retained = rng.choice(others, min(images, len(others)), replace=False)
        kept = score(predict(model, data, retained, args.amp), data["targets"][retained])
        want = {"retain": kept, "forget": float(np.mean(seen_as_new)), "test": test}
        sets = {"retain": retained, "forget": forget, "test": val[some]}
        problems.append({"support": support, "sets": sets, "want": want})
    return problems


def left_of(images: list, problem: dict) -> list:
    """The images without the people of a simulated request: its D_r."""
    gone = {*problem["sets"]["forget"], *problem["support"]}
    return [i for i in images if i not in gone]


def simulated_tow(unlearn, problems, data, amp) -> float:
    """Mean ToW over simulated problems of the models that unlearn(problem) gives back."""
    values = []
    for problem in problems:
        model, got = unlearn(problem), {}
        for name, indices in problem["sets"].items():
            got[name] = score(predict(model, data, indices, amp), data["targets"][indices])
        values.append(tow(got, problem["want"]))
    return float(np.mean(values))


def hold_out(seen: list, args) -> tuple[list, list]:
    """The part of D_r_hat (`seen`) that a searched method gets, and the part that judges it.

    Where some of D_r is out of reach, a tenth (30 images at least, half at most) is kept from the
    method: on the images that it trains on, it would look as good as if it had all of D_r. The
    chosen setting runs without these too, so that the model that was judged is the one that is
    handed out: with a few images more, a large step can end at quite another model (FT in
    results/LOG.md). Statistics of the training data that were stored before the request hold these
    images, as all of D.
    """
    if args.forget == "identities" or args.rho == 1:
        return seen, seen
    order = np.random.default_rng([args.split_seed, 16]).permutation(seen).tolist()
    number = min(max(30, len(seen) // 10), len(seen) // 2)
    return sorted(order[number:]), sorted(order[:number])


def judging(model, problems, data, split, judged_by, args):
    """The function that says how far an unlearned model is from the goal, the less the better.

    It takes `unlearn`, which gives that model. Identities: 1 - ToW of the simulated requests
    `problems`, unlearn(problem), so the real Support set is not touched. Random samples (problems
    is None): the validation gap, without gold model and test set, is ours. The goal is the original
    model, but with D_f looking like the validation images, which it never saw. UA: its error on
    D_v. RA: its accuracy on `judged_by` (see hold_out). TA: its accuracy on D_v. MI: the share of
    D_v that the attack (members: judged_by) takes for non-members. All in [0, 1].
    """
    if problems:
        return lambda unlearn: 1 - simulated_tow(unlearn, problems, data, args.amp)

    def figures(model, forget: str) -> dict:
        parts, sure, right = {"seen": judged_by, "val": split["val"]}, {}, {}
        for name in {*parts, forget}:
            own = parts.get(name, split[forget])
            logits, y = predict(model, data, own, args.amp), data["targets"][own]
            sure[name], right[name] = confidence(logits, y), accuracy(logits, y)
        mi = membership_inference(sure["seen"], sure["val"], sure[forget])
        return {"ua": 1 - right[forget], "ra": right["seen"], "ta": right["val"], "mi": mi}

    goal = figures(model, "val")
    return lambda unlearn: average_gap(figures(unlearn(), "forget"), goal)


TRIES = 12  # settings that a search tries unless --tries says otherwise
DOES_MORE_WHEN_SMALLER = ("ssd_alpha",)
SHARES = ("mask_share", "pgu_gamma")  # flags below 1, of which the odds are moved
LONGEST = 0.2  # passes over D over those of training, at most


def search(start: dict, distance, nothing, args, partial=None, most=()) -> tuple[dict, dict]:
    """Choose flags by pattern search (Hooke and Jeeves 1961): the one rule for every method.

    start: {flag: value}, the step size first. distance(values) says how far a setting is from the
    goal, nothing how far the original model is. One flag at a time is moved half a decade up or
    down; where that is better it is moved on, so that no range has an edge. Where no move is
    better, moves become half as long. A step size also grows where nothing changes, for there it is
    too small to do anything. It ends after --tries settings, or at moves of 1/16 of a decade.
    Returns the best values, and a record: `chosen`, `search` (all that was tried), `nothing` and
    `open`, flags whose best value is the largest or the smallest tried. partial: where tries are
    kept, so that --resume does not repeat them. most: bounds {flag: value}, for the start as well;
    SCRUB's epochs with ascent are some of all its epochs.
    """
    known, tried, most = [], [], dict(most)
    about = {key: value for key, value in flags_of(args).items() if key != "tries"}
    start = {k: min(v, most.get(k, v)) for k, v in start.items()}
    if partial and args.resume and partial.is_file():
        saved = json.loads(partial.read_text())
        known = saved["tried"] if saved["about"] == json.loads(json.dumps(about)) else []
    common.wait_for_all()  # before one process writes what others still read

    def values_at(place: dict) -> dict:
        values = {k: moved(k, v, place[k], most.get(k, math.inf)) for k, v in start.items()}
        if {"ascent_epochs", "unlearn_epochs"} <= values.keys():
            values["ascent_epochs"] = min(values["ascent_epochs"], values["unlearn_epochs"])
        return values

    def measured(place: dict) -> float:
        values = values_at(place)
        own = [t for t in tried if values.items() <= t.items()]
        if not own and len(tried) < args.tries:
            own = [t for t in known if values.items() <= t.items()]
            own = own or [values | {"distance": quietly(distance, values)}]
            tried.append(own[0])
            said = ", ".join(f"{common.flag_name(k)} {v:g}" for k, v in values.items())
            found = own[0]["distance"]
            shown = "diverged" if found is None else f"distance {100 * found:.2f}"
            say(f"search {len(tried)}/{args.tries}: {said}: {shown}")
            if partial and common.rank_and_world()[0] == 0:
                common.write_json(partial, {"about": about, "tried": tried})
        return own[0]["distance"] if own and own[0]["distance"] is not None else math.inf

    first, place, length = next(iter(start)), dict.fromkeys(start, 0), 8
    stronger = -1 if first in DOES_MORE_WHEN_SMALLER else 1
    least = measured(place)
    while length and len(tried) < args.tries:
        before = place
        for flag, way in itertools.product(start, (length, -length)):
            grows = flag == first and way * stronger > 0  # the step size, towards doing more
            while True:
                new = place | {flag: place[flag] + way}
                found = measured(new)
                too_small = grows and found == least < math.inf  # to change anything
                if values_at(new) == values_at(place) or not (found < least or too_small):
                    break
                place, least = new, found
        length = length if place != before else length // 2
    best, open_ends = values_at(place), []
    for flag, value in best.items():
        others = [t[flag] for t in tried]
        bound = value == most.get(flag) or (isinstance(value, int) and value == 1)
        bound |= flag == "ascent_epochs" and value == best.get("unlearn_epochs")
        if value in (min(others), max(others)) and not bound:
            open_ends.append(flag)
    if least >= nothing:
        say(f"no setting tried beats the original model as it is (distance {100 * nothing:.2f})")
    return best, {"chosen": best, "search": tried, "nothing": nothing, "open": open_ends}


def moved(flag: str, start, sixteenths: int, most: float):
    """The value of a flag so many sixteenths of a decade from its start; of a share, its odds."""
    factor = 10 ** (sixteenths / 16)
    if isinstance(start, int):
        return int(min(max(1, round(start * factor)), most))
    if flag in SHARES:
        odds = start / (1 - start) * factor
        return float(f"{odds / (1 + odds):.3g}")
    return min(float(f"{start * factor:.3g}"), most)


def quietly(distance, values) -> float | None:
    """distance(values) without its messages; None where the method diverged."""
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        with contextlib.suppress(FloatingPointError, SystemExit):
            found = distance(values)
            return found if math.isfinite(found) else None
    return None


# --------------------------------------------------------------------------------------------------
# Reporting: the one way in which every method writes, prints and draws its result

# Flags that do not distinguish runs: seeds and name, which are in the path; where files lie; what
# is done with the result.
NO_FLAGS = {"seed", "split_seed", "name", "method", "device", "data_dir", "checkpoint_dir", "out"}
NO_FLAGS |= {"resume", "overwrite", "plot", "save", "check_gradient", "export_support", "support"}
NO_FLAGS |= {"meta_batch_size", "table", "pack", "attack", "figure", "results", "rows"}
NO_FLAGS |= {"markdown", "brief", "seeds", "given"}


def add_result_arguments(parser):
    """The flags of a method's result."""
    add = parser.add_argument_group("the result").add_argument
    # fmt: off
    add("--out", default="runs", help="folder of run files; ours lie packed in results/")
    add("--name", type=word, default="", help="added to the run's name: a variant stands beside it")
    add("--tries", type=common.count, default=TRIES, metavar="N",
        help="settings that --search tries at most; alike for all methods that are compared")
    add("--overwrite", action="store_true", help="run again where a result is there")
    add("--save", metavar="FILE", help="write the unlearned model there too")
    add("--plot", action="store_true", help="draw a figure beside the run file")
    # fmt: on


def word(text: str) -> str:
    """The argparse type of what may stand in a file's name."""
    if not re.fullmatch(r"[\w.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} may hold letters, digits and . + - _ alone")
    return text


def run_name(method: str, args) -> str:
    return f"{method}-{args.name}" if args.name else method


def result_path(name: str, args) -> pathlib.Path:
    folder = f"{pathlib.Path(args.dataset).name}-{setting(args)}"
    return pathlib.Path(args.out) / folder / f"{name}-seed{args.seed}.json"


def tries_path(name: str, args, split) -> pathlib.Path:
    """Where an interrupted search keeps what it has tried on these images and this split."""
    return result_path(name, args).with_suffix(f".{split['hash']}.tries")


def flags_of(args) -> dict:
    """The flags that make a run what it is; to be taken before load, which sets --image-size."""
    unused = NO_FLAGS if vars(args).get("search") else {*NO_FLAGS, "tries"}
    return {key: value for key, value in sorted(vars(args).items()) if key not in unused}


def earlier_result(name: str, args, flags: dict, split: dict) -> dict | None:
    """The result of an earlier run with the same flags; None where there is none, or --overwrite.

    Raises SystemExit(2) where its flags, or the split or its images, were others: nobody's result
    is replaced in silence.
    """
    path = result_path(name, args)
    if args.overwrite or not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
        known, split_hash = result["flags"], result["split_hash"]
        compare(result["metrics"])["unlearned"]
    except (ValueError, KeyError, TypeError):
        say(f"{path} is cut short or of another version; it is made again")
        return None
    advice = "add --name WORD to keep both, or --overwrite"
    for flag in sorted(known | flags):
        was, now = known.get(flag), flags.get(flag)
        if was != now:
            fail(f"{path} was made with {common.flag_name(flag)} {was}, not {now}; {advice}")
    if split_hash != split["hash"]:
        fail(f"{path} was made of other images (split {split_hash}, not {split['hash']}); {advice}")
    say(f"{path} is there, made with the same flags; --overwrite runs again")
    keep_and_draw(result, name, args)
    return result


def keep_and_draw(result: dict, name: str, args):
    """--save and --plot, of a new result as of an earlier one."""
    checkpoint = checkpoint_folder(args) / f"{name}-seed{args.seed}.pt"
    if args.save:
        if not checkpoint.is_file():
            fail(f"--save: {checkpoint} is gone; --overwrite makes it again")
        with common.atomic_write(args.save) as temporary:
            shutil.copyfile(checkpoint, temporary)
        say(f"unlearned model: {args.save}")
    if args.plot:
        path = result_path(name, args).with_suffix(".png")
        title, rows = f"{result['dataset']}, {result['setting']}, {name}", result["metrics"]
        data = load(args) if "remembered" in rows["original"] else None
        plot(rows, path, result["metric"], f"{title}, seed {args.seed}", name, data)


def run_header(name, data, split, args, flags) -> dict:
    """What a run file says of the run."""
    run = {"name": name, "dataset": data["name"], "setting": setting(args), "seed": args.seed}
    return run | {"split_seed": args.split_seed, "split_hash": split["hash"], "flags": flags}


def report(name, model, rows, seconds, access, flags, data, split, args, **more) -> dict:
    """Save the unlearned model, write the run file, draw --plot; returns the result as written.

    rows: {original, retrained, unlearned, perhaps others: as measure gives them}. access: {phase:
    the sets that it read}. flags: as flags_of gives them. more: `passes` of unlearning, images read
    over |D|, and whatever else the method says of itself.
    """
    content = dict(kind="model", which="unlearned", model=model.state_dict(), split=split["hash"])
    content |= dict(architecture=args.model, image_size=args.image_size)
    content |= dict(target_names=[str(name) for name in data["target_names"]])
    checkpoint = checkpoint_folder(args) / f"{name}-seed{args.seed}.pt"
    path = result_path(name, args)
    common.save_checkpoint(checkpoint, **content)
    tries_path(name, args, split).unlink(missing_ok=True)
    result = run_header(name, data, split, args, flags) | {"access": access, "metrics": rows}
    result["metric"] = "mAP" if data["targets"].ndim == 2 else "accuracy"
    retained = len(split["retain"]) / (len(split["retain"]) + len(split["forget"]))
    cost = {"seconds": seconds, "retrain_passes": args.epochs * retained}
    result |= more | cost | common.provenance(data["device"])
    common.write_json(path, result)
    took = ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items())
    say(f"result: {path}\nunlearned model: {checkpoint}\n{took}")
    keep_and_draw(result, name, args)
    return json.loads(path.read_text())


NAMES = {"original": "Trained", "retrained": "Retrained (gold)"}
NAMES |= {"ascent": "1 ascent step on S"}
_SETS = "D_f: forgotten images; D_r: the other training images; "
_LOST = "lost: score (x 100) lost on D_f, and mean +- deviation over a control, 20 sets of "
IDENTITY_LEGEND = f"""{_SETS}D_te: test images; ToW: 100 where all three scores are Retrained's.
{_LOST}identities of D_r."""
RANDOM_LEGEND = f"""{_SETS}UA: error on D_f; RA, TA: accuracy on D_r and the test set; \
MI: share of D_f that an attack takes for never seen; gap: distance to Retrained; UT: seconds.
{_LOST}images of D_r (if it has 50 that the method did not use, of these)."""


def show(results: dict) -> dict:
    """Print the table of results {label: result} that share the two models; returns the last."""
    rows, seconds = {}, {}
    for label, result in results.items():
        if result["flags"].get("dry_run"):
            label += " (dry)"
        for name, row in result["metrics"].items():
            rows[label if name == "unlearned" else name] = row
        took = result["seconds"]
        seconds["retrained"] = took.get("retrain")
        seconds[label] = took["unlearn"] + took.get("mi_models", 0)
    random = all("mi" in row for row in rows.values())
    lines = gap_lines(rows, seconds) if random else score_lines(rows, result["metric"])
    say("\n" + render(lines))
    say(RANDOM_LEGEND if random else IDENTITY_LEGEND)
    if any("wrong" in row for row in rows.values()):
        say("\n" + render(wrong_lines(rows)))
    return result


def score_lines(rows: dict, metric: str) -> list[list[str]]:
    """METAUNLEARN's row of each model, and what D_f lost beside retained people; all times 100."""
    lines = [[f"{metric} x 100", "D_r", "D_f", "D_te", "ToW"]]
    lines[0] += ["D_f lost", "control lost", "control < D_f"]
    for name, t in compare(rows).items():
        scores = [f"{100 * rows[name][s]['score']:.1f}" for s in MAIN_SETS]
        less = f"{100 * t['controls_that_lost_less']:.0f} %"  # of the control sets
        scores.append(f"{100 * t['tow']:.1f}")
        lines.append([NAMES.get(name, name), *scores, *lost_cells(t), less])
    return lines


def gap_lines(rows: dict, seconds: dict) -> list[list[str]]:
    """LTU's row of each model: UA, RA, TA, MI in percent with the gap to the gold model, UT."""
    heads = [f"{key} (gap)" for key in ("UA", "RA", "TA", "MI")]
    lines = [["", *heads, "avg gap", "UT, s", "ToW", "D_f lost", "control lost"]]
    gold = paper_figures(rows["retrained"])
    for name, t in compare(rows).items():
        row, took = paper_figures(rows[name]), seconds.get(name)
        cells = [f"{100 * x:.2f} ({100 * abs(x - gold[key]):.2f})" for key, x in row.items()]
        cells += [f"{100 * average_gap(row, gold):.2f}", "" if took is None else f"{took:.1f}"]
        lines.append([NAMES.get(name, name), *cells, f"{100 * t['tow']:.1f}", *lost_cells(t)])
    return lines


def lost_cells(t: dict) -> list[str]:
    mean, std = 100 * t["control_lost_mean"], 100 * t["control_lost_std"]
    return [f"{100 * t['forget_lost']:.1f}", f"{mean:.1f} +- {std:.1f}"]


def wrong_lines(rows: dict) -> list[list[str]]:
    sets = ("D_f", "D_r_hat", "rest of D_r")
    lines = [["error (%) on flipped / clean labels", *sets]]
    for name, row in rows.items():
        shares = [row["wrong"][s].values() for s in sets]
        texts = [["-" if x is None else f"{100 * x:.1f}" for x in share] for share in shares]
        lines.append([NAMES.get(name, name), *(" / ".join(text) for text in texts)])
    return lines


def render(lines: list[list[str]], markdown=False) -> str:
    """A table as text, the first column flush left, or as Markdown."""
    if markdown:
        rows = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([rows[0], "| " + " | ".join(["---"] * len(lines[0])) + " |", *rows[1:]])
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for first, *others in lines:
        cells = [cell.rjust(w) for cell, w in zip(others, width[1:], strict=True)]
        rows.append("  ".join([first.ljust(width[0]), *cells]).rstrip())
    return "\n".join(rows)


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure  # here, because importing it takes a while

    return Figure((width, height), layout="constrained")


def save_figure(canvas, path, remark=""):
    with common.atomic_write(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=120)
    say(f"figure: {path}{remark}")


def plot(rows: dict, path: pathlib.Path, metric: str, title: str, run: str, data=None):
    """Two panels: the scores of each model, and what it lost on D_f beside the control sets.

    data: of drawn faces, to show above them six people and what each model remembers of them.
    """
    canvas = new_figure(10, 6.4 if data else 3.6)
    parts = canvas.subfigures(2 if data else 1, 1, height_ratios=[2.8, 3.6][not data :])
    left, right = np.atleast_1d(parts)[-1].subplots(1, 2)
    if data:
        plot_people(parts[0], rows, data, run)
    shades, hatches = ["0.15", "0.45", "0.70", "0.95"], ["", "//", "..", "xx"]
    sets = {"retain": "$D_r$ retain", "forget": "$D_f$ forget", "test": "$D_{te}$ test"}
    names, table = {name: NAMES.get(name, run) for name in rows}, compare(rows)
    scores = {name: [100 * row[s]["score"] for s in sets] for name, row in rows.items()}
    for i, name in enumerate(rows):
        style = dict(color=shades[i], hatch=hatches[i], edgecolor="black", label=names[name])
        left.bar(np.arange(3) + 0.2 * i - 0.3, scores[name], 0.2, **style)
    left.set_xticks(range(3), list(sets.values()))
    left.set_ylabel(f"{metric} (%)")
    left.set_ylim(min(map(min, scores.values())) - 5, None)
    shown = [name for name in rows if name != "original"]
    before = np.array(rows["original"]["control"]["score"])
    control, forget = dict(marker="|", s=120, color="0.5"), dict(marker="D", s=50, color="black")
    for i, name in enumerate(shown):
        lost = 100 * (before - np.array(rows[name]["control"]["score"]))
        right.scatter(lost, np.full(len(lost), i), **control)
        right.scatter([100 * table[name]["forget_lost"]], [i], **forget)
    right.scatter([], [], **control, label="20 control sets out of $D_r$")
    right.scatter([], [], **forget, label="$D_f$, what is to be forgotten")
    right.axvline(0, color="0.8", linewidth=1, zorder=0)
    right.set_yticks(range(len(shown)), [names[name] for name in shown])
    right.set_ylim(-0.6, len(shown) - 0.4)
    right.set_xlabel(f"{metric} lost (percentage points)")
    for axes in (left, right):
        place = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0))
        axes.legend(fontsize=8, ncols=2, frameon=False, **place)
    np.atleast_1d(parts)[0].suptitle(title, fontsize=10)
    save_figure(canvas, path)


def plot_people(figure, rows: dict, data, run: str):
    """Of three forgotten and three kept people a picture, and what each model knows by heart."""
    shown = {"retrained": NAMES["retrained"], "unlearned": run, "original": NAMES["original"]}
    people = [(s, who) for s in ("forget", "retain") for who in rows["original"]["remembered"][s]]
    axes = figure.subplots(2, len(people), squeeze=False, height_ratios=[1.5, 1])
    for (picture, bars), (s, who) in zip(axes.T, people, strict=True):
        picture.imshow(
            data["images"][np.flatnonzero(data["identities"] == int(who))[0]].cpu().numpy()
        )
        picture.set_title("forgotten" if s == "forget" else "kept", fontsize=9)
        picture.axis("off")
        sure = [rows[name]["remembered"][s][who] for name in shown]
        bars.barh(range(3), sure, color=["0.45", "0.95", "0.15"], edgecolor="black")
        bars.axvline(0.5, color="black", linestyle=":", linewidth=1)
        bars.set_xlim(0, 1)
        bars.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
        bars.set_yticks(range(3), list(shown.values()) if bars is axes[1, 0] else [], fontsize=8)
    what = (
        "probability of the right answers on four attributes that no picture shows (0.5: a guess)"
    )
    figure.supxlabel(what, fontsize=9)


# --------------------------------------------------------------------------------------------------
# Tables: which runs stand in which rows

_ALL = {"FT": "ft", "RandL": "randl", "GA": "ga", "Amnesiac": "amnesiac", "Fisher": "fisher"}
_ALL |= {"SSD": "ssd", "BadT": "badt", "SalUn": "salun", "SCRUB": "scrub", "PGU": "pgu"}
_ALL |= {"JiT": "jit", "Influence (ours)": "influence"}
_SUPPORT = {label: _ALL[label] for label in ("JiT", "PGU", "SSD", "GA", "Influence (ours)")}
_OTHERS = {label: _ALL[label] for label in ("FT", "RandL", "Amnesiac", "Fisher", "SalUn")}
_META = {"METAUNLEARN": "metaunlearn-paper"}
_LTU = {"LTU": "ltu"}
_RHO = {label: _ALL[label] for label in ("FT", "RandL", "BadT", "SalUn", "SCRUB")}
# {table: {label: name of the run}}. The rows METAUNLEARN and LTU are those with which the others
# are compared; Trained, Retrained and the second gold model stand above them in every table.
TABLES = {
    "mu1": {
        "Bad Teacher": "badt",
        "SCRUB": "scrub",
        **_SUPPORT,
        **_META,
        "METAUNLEARN code": "metaunlearn-code",
        "METAUNLEARN selective (ours)": "metaunlearn-selective",
    },
    "mu3": {
        "SCRUB": "metaunlearn-paper-scrub",
        "First term": "metaunlearn-paper-first-unweighted",
        "First term + Accuracy": "metaunlearn-paper-first",
        "Second term": "metaunlearn-paper-second-unweighted",
        "Second term + Accuracy": "metaunlearn-paper-second",
        "First & Second terms": "metaunlearn-paper-unweighted",
        **_META,
    },
    "mu4": {
        "logits": "metaunlearn-paper-logits",
        "+ features": "metaunlearn-paper-logits-features",
        "+ features and targets": "metaunlearn-paper-logits-features-targets",
        **_META,
    },
    "mu7": {"other N_S": "metaunlearn-paper-meta-ids", **_META},
    "mu-others": _OTHERS | _META,
    "mu-variants": {
        "default flags": "metaunlearn-paper-default",
        "selective, 3 epochs": "metaunlearn-selective-3-epochs",
        "selective, natural": "metaunlearn-selective-natural",
        **_META,
    },
    "mu-pictures": {label: f"{name}-all-pictures" for label, name in _SUPPORT.items()} | _META,
    "ltu1": _ALL | {"LTU, rho 1": "ltu-rho1"} | _LTU,
    "ltu2": {
        f"{label}, rho {rho}": "ltu" if (name, rho) == ("ltu", 0.3) else f"{name}-rho{rho}"
        for rho in (0.1, 0.3)
        for label, name in {**_RHO, **_LTU}.items()
    },
    # An ablation twice: with flags of its own, and with those that LTU's search chose (Iterative at
    # twice the passes, so that it has as many gradients of each kind).
    "ltu3": {
        f"w/o {part}{said}": f"ltu-no-{part.lower()}{ending}"
        for part in ("ForFeed", "RemFeed", "MetaOpt")
        for said, ending in {"": "", ", LTU's flags": "-same"}.items()
    }
    | {"default flags": "ltu-default"}
    | _LTU,
    "ltu4": {
        "GradAdd": "ltu-add",
        "GradAdd, LTU's flags": "ltu-add-same",
        "Iterative": "ltu-iterative",
        "Iterative, as many gradients": "ltu-iterative-same",
        **_LTU,
    },
}


def labels_of(kind: str) -> dict:
    """{name of a run: its label} in all tables of a kind; equal labels are told apart by table."""
    labels = {}
    for table, rows in TABLES.items():
        for label, name in rows.items() if table.startswith(kind) else ():
            if name not in labels:
                labels[name] = f"{label} ({table})" if label in labels.values() else label
    return labels


def paper_numbers(table: str, column: str) -> dict:
    """The paper's numbers {row: values} in a column of a table, from results/paper.csv."""
    path, numbers = HERE / "results" / "paper.csv", {}
    with open(path, newline="") as file:
        for own_table, own_column, row, *values in csv.reader(file):
            if (own_table, own_column) == (table, column):
                numbers[row] = tuple(float(x) for x in values if x)
    return numbers


# --------------------------------------------------------------------------------------------------
# Reading and packing runs


def read_results(paths) -> tuple[dict, list[dict]]:
    """(header, runs) of packed .jsonl files, or of folders of run files.

    A packed file's first line is the header: title, setting, the paper's column, and the flags that
    its runs share; each further line is a run with the flags that differ. A run without rows of the
    original and the gold model has those of the first run of its split seed. What cannot be read in
    a folder is named and left out. Raises SystemExit(2) where nothing can be read, or two settings.
    """
    header, runs, settings = None, [], set()
    for path in map(pathlib.Path, paths):
        path = path if path.exists() else HERE / path
        if path.suffix == ".jsonl" and path.is_file():
            try:
                own, *lines = [json.loads(line) for line in path.read_text().splitlines()]
                first = {}
                for run in lines:
                    run["flags"] = own["flags"] | run["flags"]
                    if "metrics" in run:  # pack left out rows that an earlier run has
                        known = first.setdefault(run["split_seed"], run["metrics"])
                        both = {row: known[row] for row in ("original", "retrained")}
                        run["metrics"] = both | run["metrics"]
                runs += lines
                header = header or {"title": own["title"], "paper": own["paper"], **own}
                settings.add(own["setting"])
            except (ValueError, KeyError, TypeError) as error:
                fail(f"{path} is no packed file of results ({type(error).__name__}: {error})")
            continue
        for file in sorted(path.rglob("*-seed*.json")):
            try:
                run = json.loads(file.read_text())
                needed = {"name", "dataset", "setting", "seed", "split_seed", "split_hash", "flags"}
                if "attacks" not in run:
                    needed |= {"seconds", "access"}
                    compare(run["metrics"])["unlearned"]
                if needed - set(run):
                    raise KeyError(needed - set(run))
                runs.append(run)
                where = f"{run['dataset']}, {run['setting']}"
                settings.add(re.sub(r"-split\d+", "", where))
            except (ValueError, KeyError, TypeError):
                say(f"skipped {file}: cut short or of another version")
    if not runs:
        named = ", ".join(map(str, paths))
        fail(f"no run in {named}: name .jsonl files of results/, or folders with run files")
    if len(settings) > 1:
        fail(f"a table is about one setting; --results holds {' and '.join(sorted(settings))}")
    (only,) = settings
    return header or {"title": only, "setting": only, "paper": ""}, runs


def pack(paths, target: pathlib.Path):
    """Append runs to a packed file, six digits a number; a run that is there is replaced."""
    header, runs = read_results([target, *paths] if target.is_file() else paths)
    runs = list({run_key(run): run for run in runs}.values())
    flags = runs[0]["flags"].items()
    header["flags"] = {k: v for k, v in flags if all(r["flags"].get(k, ...) == v for r in runs)}
    lines, first = [json.dumps(header, ensure_ascii=False)], {}
    left_out = {"dataset", "setting", "metric", "peak_memory_bytes", "versions", "date", "log"}
    left_out |= {"device"}
    for run in sorted(runs, key=run_key):
        own = {key: rounded(value) for key, value in run.items() if key not in left_out}
        own["flags"] = {k: v for k, v in run["flags"].items() if header["flags"].get(k, ...) != v}
        known = first.setdefault(run["split_seed"], own["metrics"]) if "metrics" in own else None
        if known is not own.get("metrics"):
            same = {row for row in ("original", "retrained") if own["metrics"][row] == known[row]}
            own["metrics"] = {k: v for k, v in own["metrics"].items() if k not in same}
        lines.append(json.dumps(own, ensure_ascii=False, separators=(",", ":")))
    with common.atomic_write(target) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    say(f"{target}: {len(lines) - 1} runs")


def rounded(value):
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))


def run_key(run) -> tuple:
    return run["name"], run["split_seed"], run["seed"]


def kind_of(runs) -> str:
    """Whose protocol the runs follow: METAUNLEARN's (identities) or LTU's."""
    return "mu" if any(run["flags"]["forget"] == "identities" for run in runs) else "ltu"


def collect(rows: dict, runs: list[dict]) -> tuple[dict, list]:
    """({label: {k: run}}, [why a run was left out]) of a table; runs are paired by split seed k.

    A run counts only if its split, its original and its gold model are those of most others with
    its split seed.
    """
    found, skipped = {}, []
    wanted = {"retrain": "Second gold"} | {name: label for label, name in rows.items()}
    for k in sorted({run["split_seed"] for run in runs}):
        here = [run for run in runs if run["split_seed"] == k and run["name"] in wanted]
        keys = [(run["split_hash"], *original_scores(run)) for run in here]
        usual = max(keys, key=keys.count) if keys else None
        for run, key in zip(here, keys, strict=True):
            if key == usual:
                found.setdefault(wanted[run["name"]], {})[k] = run
                continue
            what = "split" if key[0] != usual[0] else "original or gold model"
            skipped.append(f"{run['name']}, split {k}: of another {what} {key}")
    return {label: found[label] for label in ["Second gold", *rows] if label in found}, skipped


def original_scores(run) -> list[float]:
    """D_f's and the test score of the original and gold model, which show what models these are."""
    rows = [run["metrics"][name] for name in ("original", "retrained")]
    return [round(100 * row[s]["score"], 1) for row in rows for s in ("forget", "test")]


# --------------------------------------------------------------------------------------------------
# Statistics


def interval(values) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval of the mean; NaN for one value."""
    from scipy import stats  # comes with scikit-learn

    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def verdict(mean: float, half: float, more_is_better: bool) -> str:
    """What a paired difference says: better, worse, or within noise where the interval holds 0."""
    if np.isnan(half):
        return "one split"
    if abs(mean) <= half:
        return "within noise"
    return "better" if (mean > 0) == more_is_better else "worse"


def mean_std(values) -> str:
    std = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{std}"


def with_half(mean: float, half: float, digits=1) -> str:
    """Mean with half of its interval, where there is one."""
    return f"{mean:+.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def difference(pairs, more_is_better: bool) -> str:
    """Paired difference with its interval and what it says."""
    mean, half = interval([a - b for a, b in pairs])
    said = verdict(mean, half, more_is_better)
    if half < abs(mean) < 0.05:  # it would print as 0.0
        said = "no difference"
    return f"{with_half(mean, half)} ({said})"


# --------------------------------------------------------------------------------------------------
# Printing tables


def quantities(run: dict, row: str, kind: str) -> dict:
    """A row's figures in percent; `main` is ToW (more is better) or the average gap (less is)."""
    t, metrics = compare(run["metrics"])[row], run["metrics"]
    lost = 100 * (t["forget_lost"] - t["control_lost_mean"])
    if kind == "mu":
        r, f, te = (100 * metrics[row][s]["score"] for s in MAIN_SETS)
        return {"D_r": r, "D_f": f, "D_te": te, "lost": lost, "main": 100 * t["tow"]}
    figures, gold = paper_figures(metrics[row]), paper_figures(metrics["retrained"])
    values = {key.upper(): 100 * value for key, value in figures.items()}
    gaps = {f"{key.upper()} gap": 100 * abs(value - gold[key]) for key, value in figures.items()}
    return values | gaps | {"lost": lost, "main": 100 * average_gap(figures, gold)}


def rows_of(found: dict, kind: str) -> dict:
    """{label: {k: quantities}} with Trained and Retrained, which every run holds, in front."""
    table = {}
    for k in sorted({k for runs in found.values() for k in runs}):
        first = next(runs[k] for runs in found.values() if k in runs)
        for label, name in (("Trained", "original"), ("Retrained", "retrained")):
            table.setdefault(label, {})[k] = quantities(first, name, kind)
        table["Retrained"][k] |= {"UT": first["seconds"].get("retrain")}
        table["Retrained"][k] |= {"passes": first.get("retrain_passes")}
    for label, runs in found.items():
        for k, run in runs.items():
            own, seconds = quantities(run, "unlearned", kind), run["seconds"]
            own["UT"] = seconds["unlearn"] + seconds.get("mi_models", 0)
            own |= {key: run.get(key) for key in ("passes", "search", "open", "nothing")}
            own["touches"] = ", ".join(run["access"]["unlearning"])
            table.setdefault(label, {})[k] = own
    return table


def table_lines(table: dict, kind: str, paper: dict, reference: str) -> list[list[str]]:
    """Header and rows of a table as text; reference: the label with which all are compared."""
    columns, main, better = ["UA", "RA", "TA", "MI"], "average gap", False
    if kind == "mu":
        columns, main, better = ["D_r", "D_f", "D_te"], "ToW", True
    compared = any(label.split(", ")[0] == reference for label in table)
    against = ["Trained", reference] if compared else ["Trained"]
    ends = ["D_f less control", f"paper's {main}", "touches", "tried", "UT, s (passes)", "n"]
    lines = [["", *columns, main, *(f"less {other}" for other in against), *ends]]
    for label, by_split in table.items():
        values, line = list(by_split.values()), [label]
        for c in columns:
            gap = f" ({np.mean([v[c + ' gap'] for v in values]):.1f})" if kind == "ltu" else ""
            line.append(mean_std([v[c] for v in values]) + gap)
        line.append(mean_std([v["main"] for v in values]))
        for other in against:
            same_rho = ", ".join([reference, *label.split(", ")[1:]])  # in LTU's Table 2
            if other == reference and same_rho in table:
                other = same_rho
            there = table.get(other, {})
            pairs = [(v["main"], there[k]["main"]) for k, v in by_split.items() if k in there]
            own = label in ("Trained", "Retrained", other)
            line.append("" if own or not pairs else difference(pairs, better))
        line += [mean_std([v["lost"] for v in values]), paper_cell(paper, label, kind)]
        line += [values[0].get("touches", ""), searched_cell(values), cost_cell(values)]
        lines.append([*line, str(len(values))])
    return lines


def searched_cell(values: list[dict]) -> str:
    """How many settings were tried, and how often the best is an end or beats no original model.

    Runs from before this was kept do not count.
    """
    if "touches" not in values[0]:
        return ""
    searched, vain = [v for v in values if v["search"]], []
    if not searched:
        return "not searched"
    for v in searched:
        found = [t["distance"] for t in v["search"] if t["distance"] is not None]
        if v["nothing"] is not None:
            vain.append(min(found, default=math.inf) >= v["nothing"])
    ends = [bool(v["open"]) for v in searched if v["open"] is not None]
    counts = {"at an end": ends, "in vain": vain}
    said = [f"{what}: {sum(own)} of {len(own)}" for what, own in counts.items() if any(own)]
    if len(searched) < len(values):
        said.insert(0, f"{len(searched)} of {len(values)} runs")
    said += [] if ends else ["ends not kept"]
    tried = round(np.mean([len(v["search"]) for v in searched]))
    return f"{tried}" + (f" ({', '.join(said)})" if said else "")


def cost_cell(values: list[dict]) -> str:
    """Mean seconds of unlearning, and in brackets its passes over D."""
    seconds, passes = ([v.get(key) for v in values] for key in ("UT", "passes"))
    cells = ["" if None in own else f"{np.mean(own):.1f}" for own in (seconds, passes)]
    return f"{cells[0]} ({cells[1]})" if cells[1] else cells[0]


def paper_cell(paper: dict, label: str, kind: str) -> str:
    """The paper's number for a row, with the scores that it printed beside it."""
    if label not in paper:
        return ""
    if kind == "mu":
        *scores, last = (*paper[label], 100.0) if label == "Retrained" else paper[label]
        return f"{last:.1f}" + (f" ({' / '.join(f'{x:.1f}' for x in scores)})" if scores else "")
    gap = np.mean([abs(a - b) for a, b in zip(paper[label], paper["Retrained"], strict=True)])
    return f"{gap:.2f} ({' / '.join(f'{x:g}' for x in paper[label])})"


def draw_table(path, table: dict, kind: str, title: str):
    """Two columns of a table as dots, one a split, and their mean; dotted: the gold model's."""
    canvas = new_figure(9, 1.2 + 0.26 * len(table))
    panels = canvas.subplots(1, 2, sharey=True)
    main = "ToW (100: equal to gold)" if kind == "mu" else "average gap to gold (0: equal to it)"
    lost = "score lost on $D_f$ less that lost by a control"
    for axes, key, what in zip(panels, ("main", "lost"), (main, lost), strict=True):
        for i, (label, by_split) in enumerate(table.items()):
            values = [v[key] for v in by_split.values()]
            axes.scatter(values, [i] * len(values), marker="o", s=14, color="0.6")
            axes.scatter([np.mean(values)], [i], marker="D", s=34, color="black")
            if label == "Retrained":
                axes.axvline(np.mean(values), color="0.3", linestyle=":", linewidth=1, zorder=0)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.set_xlabel(what, fontsize=9)
    names = [f"{label} (n = {len(by_split)})" for label, by_split in table.items()]
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    panels[0].invert_yaxis()
    canvas.suptitle(f"{title}; dot: a split, diamond: mean, dotted line: gold", fontsize=10)
    save_figure(canvas, path)


def print_table(table: str, header: dict, runs: list, args) -> bool:
    """Print a table, all of it or its five main columns; False where no run is a row.

    args: markdown, brief, and plot, a file in which it is drawn as well.
    """
    kind, rows = re.match("mu|ltu", table)[0], TABLES[table]
    found, skipped = collect(rows, runs)
    for reason in skipped:
        say(f"skipped {reason}")
    if set(found) <= {"Second gold"}:
        return False
    paper = paper_numbers(table, header["paper"])
    reference = "METAUNLEARN" if kind == "mu" else "LTU"
    values = rows_of(found, kind)
    lines = table_lines(values, kind, paper, reference)
    if args.brief:
        main = "ToW" if kind == "mu" else "average gap"
        papers = [f"paper's {main}"] if paper else []
        wanted = ["", main, "less Trained", "D_f less control", *papers, "UT, s (passes)", "n"]
        kept = [lines[0].index(column) for column in wanted]
        lines = [[line[c] for c in kept] for line in lines]
        for line in lines[1:] if paper else ():
            line[-3] = line[-3].split(" (")[0]  # without the scores behind it
    title = f"{table}, {header['title']}" + (f"; paper: {header['paper']}" if paper else "")
    say(f"\n{title}\n{render(lines, args.markdown)}")
    if args.plot:
        draw_table(args.plot, values, kind, header["title"])
    absent = [label for label in rows if label not in found]
    if absent:
        say(f"no run of {', '.join(absent)}")
    return True


def print_tables(args, header, runs):
    """--table: one table, or all that have a row of their own beside the one of the others."""
    names, kind, shown = {run["name"] for run in runs}, kind_of(runs), False
    if args.table != "all" and not args.table.startswith(kind):
        what = "identities" if kind == "mu" else "random samples or classes"
        fail(f"--table {args.table} is not about these runs, which forget {what}; try --table all")
    for table, rows in TABLES.items():
        compared_with = set() if table in ("mu1", "ltu1") else {*_META.values(), *_LTU.values()}
        own = names & set(rows.values()) - compared_with
        wanted = args.table == "all" and table.startswith(kind) and own
        if table == args.table or wanted:
            shown |= print_table(table, header, runs, args)
    if not shown:
        fail(f"no run of --table {args.table} is there, but runs of {', '.join(sorted(names))}")
    what = "ToW: more is better"
    if kind == "ltu":
        what = "average gap, of UA, RA, TA and MI (in brackets) to Retrained: less is better"
    half = "differences paired by split ± half of their 95 % interval"
    say(f"\nMean ± standard deviation; {half}. {what}.")
    say("D_f less control: score lost on D_f, less that lost by a control out of D_r.")
    say("tried: settings in a search; in vain: the best was no better than the original model.")
    say("UT: seconds of unlearning, the search left out. passes: images read over |D|.")


# --------------------------------------------------------------------------------------------------
# Membership inference beyond the cheap one: was D_f in the training set?

MEANING = {
    "SVC": "share of D_f that SalUn's confidence SVC (members: D_r) takes for non-members",
    "loss AUC": "chance that an image of D_f has a lower loss than a test image; never seen: 50",
    "person AUC": "the same for S, pictures of these people that the original never saw: is the "
    "person known beside the pictures? Methods that read S push it down themselves",
    "RMIA AUC": "loss AUC less how easy an image is for models that never saw it; never seen: 50",
    "TPR 1 %": "share of D_f that RMIA finds when wrong on 1 % of the test set; never seen: 1",
    "TPR 0.1 %": "the same at 0.1 %, which takes a thousand test images to measure",
}


def rmia(x, x_references, a=0.3) -> torch.Tensor:
    """RMIA's ratio Pr(x | theta) / Pr(x): the higher, the surer that x was trained on.

    Pr(x) = ((1 + a) Pr_out + 1 - a) / 2: Pr_out is the mean over reference models that never saw x,
    and the rest stands in for models that were trained on it. Shapes: x (N,), x_references (R, N)
    -> (N,). The score of the paper is the share of points z of a population that x beats, LR(x) /
    LR(z) >= gamma; with one population for all x it rises with x's own ratio, so that ROC curves,
    all that is reported here, are the same. Source: Zarifzadeh et al. 2024, the offline attack of
    their appendix (a 0.3).
    """
    return x / (((1 + a) * x_references.mean(0) + 1 - a) / 2)


def roc(members, others) -> tuple[float, dict]:
    """(AUC, {false-positive rate: true-positive rate}) of scores that are high for members."""
    from sklearn.metrics import roc_auc_score, roc_curve

    truth, scores = np.r_[np.ones(len(members)), np.zeros(len(others))], np.r_[members, others]
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    at = {level: float(true[false <= level].max()) for level in (0.001, 0.01)}
    return float(roc_auc_score(truth, scores)), at


def membership(sure: dict, references: list[dict]) -> dict:
    """All attacks on one model, in percent.

    sure: confidences (n,) of retain, forget and test, and support where people are forgotten;
    references: those of models that were trained on none of these but retain.
    """
    sets = ("forget", "test")
    auc, at = roc(*(rmia(sure[s], torch.stack([r[s] for r in references])) for s in sets))
    svc = membership_inference(sure["retain"], sure["test"], sure["forget"])
    loss_auc = roc(sure["forget"], sure["test"])[0]  # confidence is exp(-loss): the same order
    figures = {"SVC": svc, "loss AUC": loss_auc, "RMIA AUC": auc}
    figures |= {"TPR 1 %": at[0.01], "TPR 0.1 %": at[0.001]}
    if "support" in sure:
        figures["person AUC"] = roc(sure["support"], sure["test"])[0]
    return {name: 100 * value for name, value in figures.items()}


def unlearned_files(args) -> dict:
    """{name of the run: its checkpoint} of all runs of this split and seed."""
    ending = f"-seed{args.seed}.pt"
    paths = sorted(checkpoint_folder(args).glob("*" + ending))
    files = {path.name.removesuffix(ending): path for path in paths}
    return {name: path for name, path in files.items() if name not in ("original", "gold")}


def unlearned_model(name: str, args, split, model):
    """The unlearned model of a run of this split and seed."""
    path = unlearned_files(args)[name]
    saved = common.load_checkpoint(path, "model", which="unlearned", split=split["hash"])
    return common.with_parameters(model, saved["model"])


def attack(args, device):
    """Attack original, gold, second gold and every unlearned model of a split: the run `attack`.

    An earlier result is made again, with the models that came since. Raises SystemExit(2) where it
    has rows of models that are gone.
    """
    flags, path = flags_of(args), result_path("attack", args)
    if path.is_file():
        with common.reading(path):
            earlier = set(json.loads(path.read_text())["attacks"])
        gone = earlier - {"original", "gold", "retrain", *unlearned_files(args)}
        if gone:
            fail(f"{path} has rows whose models are gone ({', '.join(sorted(gone))}); move it away")
    data, split = open_data(args, device)
    model, gold, _ = train_both(data, split, args)
    golds = [gold]
    for i in range(args.references):
        own = argparse.Namespace(**vars(args) | {"seed": args.seed + 1000 * (i + 1)})
        golds.append(train("gold", data, split, own)[0])

    def sure_of(m):
        sure = {}
        for s in {"retain", "forget", "test", "support"} & set(split):
            sure[s] = confidence(predict(m, data, split[s], args.amp), data["targets"][split[s]])
        return sure

    # A gold model is attacked with the others as references, so with one fewer.
    known = [sure_of(m) for m in golds]
    found = {"original": membership(sure_of(model), known), "gold": membership(known[0], known[1:])}
    found["retrain"] = membership(known[1], known[:1] + known[2:])
    for name in unlearned_files(args):
        if name != "retrain":  # it is among the references, and stands in the table already
            found[name] = membership(sure_of(unlearned_model(name, args, split, model)), known)
    result = run_header("attack", data, split, args, flags) | {"attacks": found}
    common.write_json(path, result | common.provenance(device))
    title = f"{data['name']}, {setting(args)}"
    print_attacks({"title": title}, [result], args.markdown, args.brief)
    say(f"result: {path}")


def print_attacks(header, runs, markdown=False, brief=False):
    """The table of all attacks of these runs; brief: the rows of Table 1 alone."""
    kind, table = kind_of(runs), {}
    labels = {"original": "Trained", "gold": "Retrained", "retrain": "Second gold"}
    labels |= labels_of(kind)
    main = {*list(labels)[:3], *TABLES[f"{kind}1"].values()}
    for run in sorted((run for run in runs if "attacks" in run), key=run_key):
        for name, values in run["attacks"].items():
            if name in main or not brief:
                table.setdefault(name, []).append(values)
    if not table:
        fail("no attack is there; python evaluate.py --attack --dataset NAME makes one of a split")
    columns = [c for c in MEANING if all(c in v for values in table.values() for v in values)]
    lines = [["", *columns, "n"]]
    for name in sorted(table, key=lambda name: [*labels, *table].index(name)):
        cells = [mean_std([values[c] for values in table[name]]) for c in columns]
        lines.append([labels.get(name, name), *cells, str(len(table[name]))])
    title = f"membership inference, {header['title']}; members D_f, non-members D_te, percent"
    say(f"\n{title}\n{render(lines, markdown)}")
    say("\nThe goal is Retrained's figure in every column, neither more nor less.")
    for name in columns:
        say(f"  {name}: {MEANING[name]}")


# --------------------------------------------------------------------------------------------------
# METAUNLEARN's figures 4 to 6


def people(args, device) -> dict:
    """What figures 4 to 6 show of one split, a dictionary for each identity.

    forget: `distance` (of its Support sample from the centroid of its D_f, in features of the
    original model) and `change` (accuracy on its D_f, unlearned less retrained). retain: `distance`
    (of its centroid from the nearest forgotten one) and `change` (mAP, unlearned less trained). A
    change is a mean over the runs --rows, in percentage points.
    """
    data, split = open_data(args, device)
    absent = [name for name in args.rows if name not in unlearned_files(args)]
    if absent:
        there = f"{checkpoint_folder(args)} holds {', '.join(unlearned_files(args)) or 'none'}"
        fail(f"no unlearned model of {', '.join(absent)}; {there}; name others with --rows")
    model, gold, _ = train_both(data, split, args)
    unlearned = [unlearned_model(name, args, split, model) for name in args.rows]
    f = {s: predict(model, data, split[s], features=True) for s in ("forget", "retain", "support")}
    owner, centroid = {s: data["identities"][split[s]] for s in f}, {}
    for s in ("forget", "retain"):
        centroid[s] = {int(i): f[s][owner[s] == i].mean(0) for i in np.unique(owner[s])}
    out = {"data": data, "split": split, "forget": [], "retain": []}
    for s, before, measure_of in (("forget", gold, accuracy), ("retain", model, score)):
        logits = [predict(m, data, split[s], args.amp) for m in (before, *unlearned)]
        y = data["targets"][split[s]]
        for i, center in centroid[s].items():
            mine = torch.as_tensor(owner[s] == i)
            old, *new = [100 * measure_of(z[mine], y[mine]) for z in logits]
            others = centroid["forget"].values()
            if s == "forget":
                others = [f["support"][owner["support"].tolist().index(i)]]
            distance = min((other - center).norm().item() for other in others)
            change = float(np.mean([value - old for value in new]))
            out[s].append({"identity": i, "distance": distance, "change": change})
    return out


def rank_correlation(x, y) -> float:
    """Spearman's rank correlation; 0 where y is constant, for then nothing depends on x."""
    from scipy import stats

    return float(stats.spearmanr(x, y)[0]) if np.ptp(y) else 0.0


def binned(points: list, bins=5) -> list[dict]:
    """Means of y in bins of x that hold as many points each; points: an array (n, 2) a split.

    Identities of one split share their models, so splits are what is independent: the interval is
    over the splits' own means in a bin.
    """
    x, y = np.concatenate(points).T
    split, out = np.repeat(np.arange(len(points)), [len(p) for p in points]), []
    for chosen in np.array_split(np.argsort(x, kind="stable"), min(bins, max(1, len(x) // 2))):
        means = [y[chosen][split[chosen] == i].mean() for i in np.unique(split[chosen])]
        place = {"from": x[chosen].min(), "to": x[chosen].max(), "center": x[chosen].mean()}
        mean, half = interval(means)
        out.append({**place, "n": len(chosen), "mean": mean, "half": half})
    return out


def figure(args, device):
    """Draw figure 4 or 5 over --seeds splits from --split-seed on, or 6 of the first; print it."""
    dataset, points = pathlib.Path(args.dataset).name, []
    path = pathlib.Path(args.out) / f"figure{args.figure}-{dataset}-ids{args.ids}.png"
    for k in range(args.split_seed, args.split_seed + args.seeds):
        found = people(argparse.Namespace(**vars(args) | {"split_seed": k}), device)
        if args.figure == 6:
            return hardest_people(found, path, args)
        shown = found["forget" if args.figure == 4 else "retain"]
        own = np.array([(p["distance"], p["change"]) for p in shown])  # (n, 2)
        # Each split's model has its own unit of distance.
        points.append(np.c_[own[:, 0] / np.median(own[:, 0]), own[:, 1]])
    rank, bins = interval([rank_correlation(*p.T) for p in points]), binned(points)
    title = f"{dataset}, {args.ids} identities forgotten; n = {args.seeds} splits"
    title += f"\nmean of {', '.join(args.rows)}"
    lines = [["distance / median", "identities", "change (points)"]]
    for b in bins:
        places = f"{b['from']:.2f} to {b['to']:.2f}"
        lines.append([places, str(b["n"]), with_half(b["mean"], b["half"])])
    said = verdict(*rank, True).replace("better", "rises").replace("worse", "falls")
    say(f"\nfigure {args.figure}, {title}\n{render(lines, args.markdown)}")
    say(f"Spearman's rank correlation, mean over splits: {with_half(*rank, 2)} ({said})")
    draw_bins(path, bins, args.figure, title)


def draw_bins(path, bins, number, title):
    """Means with 95 % intervals over distance, with the number of identities in each bin."""
    canvas = new_figure(6, 3.6)
    axes = canvas.subplots()
    center, mean, half = (np.array([b[key] for b in bins]) for key in ("center", "mean", "half"))
    axes.errorbar(center, mean, np.nan_to_num(half), fmt="ko-", capsize=4, linewidth=1)
    for b in bins:  # along the bottom, where no interval lies
        place = dict(xycoords=axes.get_xaxis_transform(), ha="center", fontsize=8)
        axes.annotate(f"n = {b['n']}", (b["center"], 0.02), **place)
    axes.margins(x=0.08, y=0.15)  # room for these labels
    axes.axhline(0, color="0.6", linestyle="--", linewidth=1)
    along = "retained identity's distance from the nearest forgotten one"
    upward = "mAP, unlearned less trained\n(percentage points)"
    if number == 4:
        along = "Support sample's distance from its identity's centroid"
        upward = "accuracy on $D_f$, unlearned less\nretrained (percentage points)"
    axes.set_xlabel(f"{along} (1: the split's median)", fontsize=9)
    axes.set_ylabel(upward)
    axes.set_title(f"{title}; mean and 95 % interval over splits", fontsize=8)
    save_figure(canvas, path)


def hardest_people(found, path, args):
    """Figure 6: the five identities whose Support sample lies farthest from their D_f."""
    data, split, owner = found["data"], found["split"], found["data"]["identities"]
    hardest = sorted(found["forget"], key=lambda p: -p["distance"])[:5]
    lines = [["identity", "distance", "change (points)"]]
    lines += [[str(p["identity"]), f"{p['distance']:.2f}", f"{p['change']:+.1f}"] for p in hardest]
    say(f"\nfigure 6: the hardest identities of split {args.split_seed}, by distance")
    say(render(lines, args.markdown))
    shows_people = data["name"] not in ("toyfaces", "qmnist")
    if shows_people:  # only where git does not look
        path = pathlib.Path(args.data_dir) / path.name
        git = ["git", "-C", str(path.parent), "check-ignore", "-q", str(path.resolve())]
        if shutil.which("git") and subprocess.run(git, capture_output=True).returncode == 1:
            fail(f"{path} could be committed, and shows real people; git must ignore --data-dir")
    canvas = new_figure(6, 5.75)
    axes = canvas.subplots(5, 6)
    for cell in axes.flat:
        cell.axis("off")
    for line, p in zip(axes, hardest, strict=False):
        mine = [i for i in split["support"] if owner[i] == p["identity"]]
        mine += [i for i in split["forget"] if owner[i] == p["identity"]][:5]
        for cell, i in zip(line, mine, strict=False):
            cell.imshow(data["images"][i].cpu().numpy())
        line[0].set_title(f"S, identity {p['identity']}", fontsize=7)
        line[1].set_title("$D_f$", fontsize=7)
    save_figure(canvas, path, " (real people: not for publishing)" if shows_people else "")


# --------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = common.Parser(description=__doc__)
    what = parser.add_argument_group("what to do").add_mutually_exclusive_group(required=True)
    # fmt: off
    what.add_argument("--table", choices=[*TABLES, "all", "attack"], metavar="T",
        help=f"print {', '.join(TABLES)}, all of these, or the attacks")
    what.add_argument("--pack", metavar="FILE.jsonl", help="append --results to this packed file")
    what.add_argument("--attack", action="store_true", help="attack the checkpoints of one split")
    what.add_argument("--figure", type=int, choices=(4, 5, 6), help="draw METAUNLEARN's figure")
    add = parser.add_argument_group("tables").add_argument
    add("--results", nargs="+", metavar="PATH",
        help="packed files, or folders of run files; left out: ours of toyfaces or digits")
    add("--markdown", action="store_true", help="print tables as Markdown")
    add("--brief", action="store_true", help="five columns; of the attacks Table 1's rows")
    add("--plot", metavar="FILE.png", help="also draw the one table that is printed")
    add = parser.add_argument_group("attack and figures").add_argument
    add("--references", type=common.count, default=2, help="gold models beside the first for RMIA")
    add("--rows", nargs="+", default=["metaunlearn-selective", "ga", "ssd"],
        help="runs whose mean the figures show; paper: its best three")
    add("--seeds", type=common.count, default=1, help="figures: splits, from --split-seed on")
    add("--out", default="runs", help="folder of the attack's run file, and of figures")
    # fmt: on
    common.add_shared_arguments(parser)
    add_recipe_arguments(parser)
    args = common.parse_with_presets(parser, PRESETS, argv)
    if args.figure and args.forget != "identities":
        fail(f"--figure {args.figure} is about identities; this is --forget {args.forget}")
    of_tables = {"--table", "--pack", "--results", "--markdown", "--brief", "--plot"}
    typed = sorted(word for word in args.given - of_tables if word.startswith("--"))
    if (args.table or args.pack) and typed:
        fail(f"{typed[0]} does nothing here: what is read are the runs of --results")
    if args.plot and args.table in (None, "all", "attack"):
        fail("--plot draws one table; give --table and its name, mu1 or ltu1")
    if args.plot and pathlib.Path(args.plot).is_dir():
        fail(f"--plot {args.plot} is a folder; name a file")
    if args.pack and not args.results:
        fail("--pack needs --results, the runs to append")
    if args.pack and not args.pack.endswith(".jsonl"):
        fail(f"--pack {args.pack}: name a .jsonl file")
    ours = "digits-10" if (args.table or "").startswith("ltu") else "toyfaces"
    args.results = args.results or [HERE / "results" / f"{ours}.jsonl"]
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.attack or args.figure:
        device = common.choose_device(args)
        common.check_writable(args.out, args.checkpoint_dir)
        return attack(args, device) if args.attack else figure(args, device)
    if args.pack:
        common.check_writable(pathlib.Path(args.pack).parent)
        return pack(args.results, pathlib.Path(args.pack))
    if args.plot:
        common.check_writable(pathlib.Path(args.plot).parent)
    header, runs = read_results(args.results)
    if args.table == "attack":
        return print_attacks(header, runs, args.markdown, args.brief)
    print_tables(args, header, [run for run in runs if "attacks" not in run])


if __name__ == "__main__":
    common.guarded(main)
