"""README and --help: commands are accepted, flags explained, tables printed by evaluate.py, equations where README says they are.

python -m pytest tests/test_readme.py
python tests/test_readme.py       # writes README's tables and line numbers anew
"""

import contextlib
import importlib
import io
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # when run as a script
SCRIPTS = ["data", "train", "metaunlearn", "ltu", "baselines", "evaluate"]
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md"]


def commands(text):
    """(script, arguments) of each `python script.py ...` in code blocks, inline code and docstrings."""
    for line in re.findall(r"(?:python|nproc-per-node \d) (\w+\.py[^\n`|]*)", text):
        script, *arguments = shlex.split(re.split("&&|-->", line)[0], comments=True)
        if arguments != ["--help"]:
            yield script.removesuffix(".py"), arguments


def documented():
    found = [command for page in PAGES for command in commands(page.read_text())]
    for script in SCRIPTS:
        found += commands(importlib.import_module(script).__doc__)
    return found


def test_the_readme_is_read():
    assert ("metaunlearn", ["--dataset", "celebahq", "--ids", "20"]) in documented() and len(documented()) > 10


@pytest.mark.parametrize("script, arguments", documented(), ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_documented_command_is_accepted(script, arguments):
    module = importlib.import_module(script)
    args = module.parse_args(arguments)
    if "--dataset" in arguments and script not in ("data", "evaluate"):
        own = {"toyfaces": 32, "digits": 8, "cifar10": 32, "tinyimagenet": 64}.get(args.dataset, 224)
        assert args.image_size == (int(arguments[arguments.index("--image-size") + 1]) if "--image-size" in arguments else own)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script):
    """--help works from the shell, names every flag, and no two flags of a script share a text."""
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    flags = re.findall(r"^  (--[a-z-]+)(.*(?:\n {20,}.*)*)", done.stdout, re.M)
    shared = {"--dataset", "--device", "--data-dir"} | (set() if script == "evaluate" else {"--seed", "--split-seed", "--ids"})
    assert shared <= {name for name, _ in flags}
    texts = [" ".join(text.split()) for _, text in flags]
    assert all(len(text) > 15 for text in texts) and len(set(texts)) == len(texts)


def test_presets_win_over_defaults_and_flags_over_presets():
    import metaunlearn

    args = metaunlearn.parse_args(["--dataset", "celebahq", "--preset", "code", "--eta", "0.2"])
    assert (args.model, args.init, args.image_size, args.epochs, args.lr, args.weight_decay) == (
        "vit_base_patch16_224",
        "pretrained",
        224,
        30,
        1e-3,
        1e-3,
    )
    assert (args.hidden, args.dropout, args.alpha, args.meta_epochs, args.pair_size, args.distance) == (512, 0.5, 1e-4, 3, 64, "smooth_l1")
    assert args.eta == 0.2 and args.method == "metaunlearn-code-eta=0.2"
    assert metaunlearn.parse_args(["--dataset", "celeba"]).weight_decay == 1e-4


def test_no_line_hides_a_cuda_only_path_or_an_unsafe_load():
    """What the field's code is full of: .cuda(), bare except, pickles that run code, torchvision at the top of a file."""
    for script in [*SCRIPTS, "common"]:
        text = (ROOT / f"{script}.py").read_text()
        assert not re.search(r"\.cuda\(|except:|import \*|weights_only=False", text), script
        assert not re.search(r"^(import|from) (torchvision|timm|matplotlib|sklearn)", text, re.M), script


# ---------------------------------------------------------------------------------------------------------------------
# What README says of the code and of results/

EQUATION = re.compile(r"^(\| (.+?) \| .+? \| `(\w+\.py):)(\d+)(` \|)$", re.M)
TABLE = re.compile(r"(<!-- python evaluate\.py (.+?) -->\n)(.*?)(<!-- end -->)", re.S)


def tagged_lines(name: str, file: str) -> list[int]:
    """Line numbers of a file whose comment or docstring begins with this equation; a method's own file leaves the method's name out."""
    tag = name.removeprefix("LTU ").removeprefix("METAUNLEARN ")
    lines = (ROOT / file).read_text().splitlines()
    return [n for n, line in enumerate(lines, 1) if re.search(rf'(# |""" ?){re.escape(tag)}', line)]


def printed(arguments: str) -> str:
    """What evaluate.py prints from results/ for a marker: titles and tables, without its hints."""
    import evaluate

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        evaluate.main([*shlex.split(arguments), "--markdown", "--out", str(ROOT / "results")])
    kept = []
    for line in out.getvalue().splitlines():
        if line.startswith("|"):
            kept.append(line)
        elif re.match(r"(mu|ltu)[\w-]*, |membership inference, ", line):
            kept += ["", f"**{line}**", ""]
    return "\n".join(kept) + "\n\n"


def test_equations_are_where_readme_says():
    rows = EQUATION.findall((ROOT / "README.md").read_text())
    assert len(rows) > 25
    for _, name, file, number, _ in rows:
        assert tagged_lines(name, file) == [int(number)], f"{name}: README says line {number} of {file}; run python tests/test_readme.py"


def test_every_tagged_equation_is_in_readme():
    listed = {(file, int(number)) for _, _, file, number, _ in EQUATION.findall((ROOT / "README.md").read_text())}
    for file in ("metaunlearn.py", "ltu.py", "baselines.py"):
        for n, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            if re.search(r"# ([A-Z]\w+ )*Eq\. \(", line):
                assert (file, n) in listed, f"{file}:{n} is tagged and not in README's table: {line.strip()}"


def test_the_access_table_is_what_the_baselines_get():
    import baselines
    import evaluate

    text = (ROOT / "README.md").read_text().split("**What each method may touch**")[1]
    rows = {name: cells for name, *cells in re.findall(r"^\| ([\w ()]+) \| (`.*?`.*?) \| (`.*?`.*?) \|$", text, re.M)}
    for label, script, own in evaluate.PLAN["ltu1"][1]:
        if script == "baselines":
            shown = rows["Bad Teacher" if label == "BadT" else label]
            for cell, dataset in zip(shown, ("digits", "toyfaces"), strict=True):
                args = baselines.parse_args([*own.split(), "--dataset", dataset])
                assert re.findall(r"`(\w+)`", cell) == baselines.allowed_names(own.split()[1], args), (label, dataset)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_are_what_evaluate_prints(page):
    tables = TABLE.findall(page.read_text())
    assert tables
    for _, arguments, text, _ in tables:
        assert text == printed(arguments), f"{arguments}: README's table is not that of results/; run python tests/test_readme.py"


if __name__ == "__main__":
    for page in PAGES:
        text = TABLE.sub(lambda m: m[1] + printed(m[2]) + m[4], page.read_text())
        page.write_text(EQUATION.sub(lambda m: f"{m[1]}{tagged_lines(m[2], m[3])[0]}{m[5]}", text))
