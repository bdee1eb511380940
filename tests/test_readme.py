"""README and --help: every command line is one that the scripts accept, and every flag is explained."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ["data", "train", "metaunlearn", "ltu", "baselines"]


def commands(text):
    """(script, arguments) of each `python script.py ...` in code blocks, inline code and docstrings."""
    for line in re.findall(r"(?:python|nproc-per-node \d) (\w+\.py[^\n`|]*)", text):
        script, *arguments = shlex.split(line.split("&&")[0], comments=True)
        if arguments != ["--help"]:
            yield script.removesuffix(".py"), arguments


def documented():
    found = list(commands((ROOT / "README.md").read_text()))
    for script in SCRIPTS:
        found += commands(importlib.import_module(script).__doc__)
    return found


def test_the_readme_is_read():
    assert ("metaunlearn", ["--dataset", "celebahq", "--ids", "20"]) in documented() and len(documented()) > 10


@pytest.mark.parametrize("script, arguments", documented(), ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_documented_command_is_accepted(script, arguments):
    module = importlib.import_module(script)
    args = module.parse_args(arguments)
    if "--dataset" in arguments and script != "data":
        own = {"toyfaces": 32, "digits": 8, "cifar10": 32, "tinyimagenet": 64}.get(args.dataset, 224)
        assert args.image_size == (int(arguments[arguments.index("--image-size") + 1]) if "--image-size" in arguments else own)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script):
    """--help works from the shell, names every flag, and no two flags of a script share a text."""
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    flags = re.findall(r"^  (--[a-z-]+)(.*(?:\n {20,}.*)*)", done.stdout, re.M)
    assert {"--dataset", "--seed", "--split-seed", "--device", "--ids"} <= {name for name, _ in flags}
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
