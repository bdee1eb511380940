"""README and results/: commands are accepted, equations are where it says, tables and runs agree.

python -m pytest tests/test_readme.py
python tests/test_readme.py       # writes the tables of README.md and results/README.md anew
"""

import ast
import contextlib
import fnmatch
import importlib
import io
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # when run as a script
SCRIPTS = ["data", "train", "metaunlearn", "ltu", "baselines", "evaluate"]
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md"]
TABLE = re.compile(r"(<!-- python evaluate\.py (.+?) -->\n)(.*?)(<!-- end -->)", re.S)


def commands(text):
    """(script, arguments) of each `python script.py ...` in code, inline code and docstrings."""
    for line in re.findall(r"(?:python|nproc-per-node \d) (\w+\.py[^\n`|]*)", text):
        script, *arguments = shlex.split(re.split("&&|-->|;", line)[0], comments=True)
        if arguments != ["--help"]:
            yield script.removesuffix(".py"), arguments


def documented():
    found = [command for page in PAGES for command in commands(page.read_text())]
    for script in SCRIPTS:
        found += commands(importlib.import_module(script).__doc__)
    return found


def test_the_readme_is_read():
    assert ("metaunlearn", ["--dataset", "celebahq", "--ids", "20"]) in documented()
    assert ("ltu", ["--rho", "0.3"]) in documented() and len(documented()) > 20


def name_of(case):
    return case if isinstance(case, str) else " ".join(case)


@pytest.mark.parametrize("script, arguments", documented(), ids=name_of)
def test_documented_command_is_accepted(script, arguments):
    args = importlib.import_module(script).parse_args(arguments)
    if "--dataset" in arguments and "--image-size" not in arguments:
        own = {"toyfaces": 32, "digits": 8, "cifar10": 32, "tinyimagenet": 64}
        assert args.image_size == own.get(args.dataset, 224)


# --------------------------------------------------------------------------------------------------
# Where the equations are


def functions_of(module):
    """{name: its source} of the functions and methods of a module, inner ones included."""
    text = (ROOT / f"{module}.py").read_text()
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    lines = text.splitlines()
    return {n.name: "\n".join(lines[n.lineno - 1 : n.end_lineno]) for n in nodes}


def equation_map():
    """(module, function, tags) of each cell of README's map, as `Eq. (5)` or `line 16`."""
    for line in re.findall(r"^\| .*Eq\. .*\|$|^\| .*Alg\. 1.*\|$", PAGES[0].read_text(), re.M):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for tags, places in zip(cells[::2], cells[1::2], strict=True):
            numbers = [f"Eq. ({n})" for n in re.findall(r"\((\d+)\)", tags)]
            wanted = numbers + re.findall(r"line \d+", tags)
            yield wanted, [place.split(".") for place in re.findall(r"`(\w+\.\w+)`", places)]


def test_equations_are_where_readme_says():
    rows = list(equation_map())
    assert len(rows) == 16
    for tags, places in rows:
        source = "\n".join(functions_of(module)[function] for module, function in places)
        for tag in tags:
            assert tag in source, (tag, places)


def test_every_tagged_equation_is_in_readme():
    listed = [place for _, places in equation_map() for place in places]
    for module in ("metaunlearn", "ltu", "baselines", "common"):
        own = "\n".join(functions_of(m)[f] for m, f in listed if m == module)
        for line in (ROOT / f"{module}.py").read_text().splitlines():
            if re.search(r"# ([A-Z]\w+ )*Eq\. \(", line):
                assert line.strip() in own, f"{module}.py: {line.strip()} is not in README's map"


# --------------------------------------------------------------------------------------------------
# Tables, and the scripts that made the runs


def printed(arguments: str) -> str:
    """What evaluate.py prints for a marker: titles and tables, without its hints."""
    import evaluate

    out, here = io.StringIO(), os.getcwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out):
            evaluate.main([*shlex.split(arguments), "--markdown"])
    finally:
        os.chdir(here)
    kept = []
    for line in out.getvalue().splitlines():
        if line.startswith("|"):
            kept.append(line)
        elif re.match(r"(mu|ltu)[\w-]*, |membership inference, ", line):
            kept += ["", f"**{line}**", ""]
    return "\n".join(kept[1:]) + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_what_evaluate_prints(page):
    tables = TABLE.findall(page.read_text())
    assert tables
    for _, arguments, text, _ in tables:
        message = f"{arguments}: not the table of results/; run python tests/test_readme.py"
        assert text == printed(arguments), message


def test_pages_are_short():
    assert PAGES[0].stat().st_size <= 15_000 and PAGES[1].stat().st_size <= 27_000


def test_the_lines_for_somebodys_own_model_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.S)
    names = {}
    exec(block, names)
    changed = [names[name].state_dict()["fc.weight"] for name in ("a", "b", "c")]
    assert len(block.splitlines()) <= 15 and not list(tmp_path.iterdir())
    assert not any(names["model"].fc.weight.equal(weight) for weight in changed)


def calls_of(script: pathlib.Path, folder: pathlib.Path) -> list[list[str]]:
    """The argument lists of all `python` calls of a shell script, which are recorded, not run.

    It runs from a copy, for where runs/ is there the shell writes out runs/name-split*.
    """
    log, fake, copied = folder / "log", folder / "python", folder / "results" / script.name
    copied.parent.mkdir()
    shutil.copyfile(script, copied)
    fake.write_text(f'#!/bin/bash\nprintf "%q " "$@" >> {log}\necho >> {log}\n')
    fake.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(["bash", copied], check=True, env=os.environ | {"PATH": path})
    return [shlex.split(line) for line in log.read_text().splitlines()]


def runs_of(calls: list[list[str]]) -> tuple[dict, dict]:
    """({path of a run file: its flags}, {packed file: folders}) of these calls."""
    import baselines
    import evaluate
    import ltu
    import metaunlearn

    made, packed = {}, {}
    for script, *arguments in calls:
        if script.startswith("tests/") or "--check-gradient" in arguments:  # no result
            continue
        module = importlib.import_module(script.removesuffix(".py"))
        args = module.parse_args(arguments)
        if module is evaluate:
            if args.pack:
                packed[args.pack] = args.results
            elif args.attack:
                made[evaluate.result_path("attack", args)] = {}
            continue
        names = {ltu: "ltu", metaunlearn: f"metaunlearn-{getattr(args, 'preset', '')}"}
        for base in args.method if module is baselines else [names[module]]:
            own = baselines.own_args(base, args) if module is baselines else args
            path = evaluate.result_path(evaluate.run_name(base, args), args)
            assert path not in made, f"two commands make {path}"
            made[path] = evaluate.flags_of(own)
    return made, packed


# Those of an earlier version of the code name its commit.
SHELL = {path: path.read_text() for path in (ROOT / "results").glob("*.sh")}
CURRENT = [path for path, text in SHELL.items() if "git checkout" not in text]


@pytest.mark.parametrize("script", sorted(CURRENT), ids=lambda p: p.name)
def test_each_script_makes_the_runs_that_are_packed(script, tmp_path):
    """The same names and split seeds, and the same flags but for what a search chose."""
    import evaluate

    made, packed = runs_of(calls_of(script, tmp_path))
    assert made and bool(packed) == ("--pack" in SHELL[script])
    for target, folders in packed.items():
        here = {}
        for path, flags in made.items():
            if any(fnmatch.fnmatch(str(path.parent), folder) for folder in folders):
                split = int(re.search(r"split(\d+)", path.parent.name)[1])
                here[re.sub(r"-seed\d+$", "", path.stem), split] = flags
        _, runs = evaluate.read_results([ROOT / target])
        assert {(run["name"], run["split_seed"]) for run in runs} == set(here), target
        for run in runs:
            # Which device ran it decides on amp; rho is nothing to a method that reads no D_r.
            free = {"amp", *run.get("chosen", {})} | (
                {"rho"} if "rho" not in run["name"] else set()
            )
            for flag, value in here[run["name"], run["split_seed"]].items():
                same = flag in free or run["flags"].get(flag, value) == value
                assert same, (target, run["name"], flag, run["flags"][flag], value)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(TABLE.sub(lambda m: m[1] + printed(m[2]) + m[4], page.read_text()))
