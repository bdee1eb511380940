"""What every script shares: the terminal, device and seeds, models, losses, metrics, and files.

Letters in shape comments: B images in a batch, N images in a set, K outputs (attributes or
classes), D features, T tokens, H and W pixels, N_s Support images.
"""

import argparse
import contextlib
import copy
import datetime
import errno
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# --------------------------------------------------------------------------------------------------
# The person at the terminal


def fail(message: str):
    """End with one line on stderr and exit code 2: the person can correct this, so no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def guarded(main):
    """Run a script's main; end in one line where the person, the disk or the memory stops it."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    try:
        try:
            main()
            stop_processes()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on where it can", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        raise SystemExit(141) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        reason = " ".join(str(error).split())[:120]
        fail(f"not enough memory ({reason}); lower the batch, image or model size")
    except FloatingPointError as error:
        fail(str(error))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # torch's, on maps of one pixel
            raise
        fail("batch norm needs two images in a batch; forget more, or choose a ViT with --model")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        fail(f"the disk of {error.filename or 'the output'} is full; make room and start again")


def flag_name(flag: str) -> str:
    """The flag as a person types it: unlearn_lr -> --unlearn-lr."""
    return f"--{flag.replace('_', '-')}"


def say(*words):
    """Print on the first process only (under torchrun every process runs the same script)."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in its help, and with errors of one line in place of the usage."""

    def __init__(self, **kwargs):
        usage = "%(prog)s [flags]"
        super().__init__(usage=usage, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(f"{message} (see --help)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=38, width=140)

    def _get_default_metavar_for_optional(self, action):
        return "X"

    def _get_help_string(self, action):
        # The default of a switch, or of a flag that has none, says nothing.
        says_nothing = action.nargs == 0 or action.default in (None, "", [])
        return action.help if says_nothing else super()._get_help_string(action)


def between(low, high, kind=float):
    """The argparse type of a number from low to high; NaN lies outside."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            word = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {word}") from None
        if not low <= value <= high:
            least = "above 0," if 0 < low < 1e-6 else f"from {low:g}"
            most = "below 1" if 1 - 1e-6 < high < 1 else f"up to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} must lie {least} {most}")
        return value

    return parse


count, whole = between(1, 1e9, int), between(0, 2**32, int)
positive, not_negative, share = between(1e-20, 1e9), between(0, 1e9), between(1e-9, 1)

DATASETS = "toyfaces, celeba, celebahq, qmnist, digits, cifar10, cifar100, tinyimagenet"


def add_shared_arguments(parser: argparse.ArgumentParser):
    """The flags that mean the same in every script."""
    # fmt: off
    add = parser.add_argument_group("what is forgotten, from which data").add_argument
    add("--dataset", default="toyfaces", help=f"{DATASETS}, or PATH of PATH.npy + PATH.npz")
    add("--forget", choices=("identities", "random", "class", "subclass"), default="identities",
        help="what is forgotten; METAUNLEARN: identities, LTU: random")
    add("--ids", type=count, default=10, help="N_S, identities to forget; paper: 20, 50 or 5, 10")
    add("--forget-ratio", type=between(1e-9, 1 - 1e-9), default=0.1,
        help="share of the training images that --forget random forgets; LTU: 0.1, 0.5")
    add("--forget-classes", type=whole, nargs="+", default=[],
        help="class numbers (for subclass: within the super-classes)")
    add("--held-out", action="store_true",
        help="ours: simulate requests with pictures that no model is trained on; paper: trained")
    add("--label-noise", type=between(0, 0.9), default=0.0,
        help="share of labels to flip, so that memorising shows; papers: 0")
    add("--train-images", type=whole, default=0,
        help="keep only so many images for training and validation, 0: all")
    add("--image-size", type=between(8, 4096, int), default=32, help="pixels a side; paper: 224")
    add("--split-seed", type=whole, default=0, help="who is trained on, who is forgotten")
    add = parser.add_argument_group("how it runs, and where its files lie").add_argument
    add("--seed", type=whole, default=0, help="training and noise")
    add("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    add("--amp", action=argparse.BooleanOptionalAction, default=None,
        help="bf16 autocast; left out: on CUDA alone")
    add("--data-dir", default="data", help="the publishers' files, and prepared/ arrays")
    add("--checkpoint-dir", default="checkpoints", help="models, splits and meta-losses")
    add("--resume", action="store_true", help="go on where an interrupted run left off")
    add("--dry-run", action="store_true",
        help="one or two batches through every phase; results are kept apart")
    # fmt: on


def parse_with_presets(parser: argparse.ArgumentParser, presets: dict, argv):
    """Parse argv with the defaults of its --dataset and --preset; a flag on the line itself wins.

    presets maps a dataset, a preset, or a pair of both to {flag: value}. A first parser reads these
    two names alone, so --help stays complete and shows the values with which this dataset would
    run.
    """
    names = Parser(add_help=False)
    names.add_argument("--dataset", default=parser.get_default("dataset"))
    names.add_argument("--preset", default=parser.get_default("preset"))
    chosen, _ = names.parse_known_args(argv)
    for key in (chosen.dataset, chosen.preset, (chosen.dataset, chosen.preset)):
        parser.set_defaults(**presets.get(key, {}))
    args = parser.parse_args(argv)
    given = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    args.given = given  # --search moves no flag that the line gives
    if args.dataset not in DATASETS.split(", "):
        args.dataset = re.sub(r"\.np[yz]$", "", args.dataset)
        own = args.image_size
        with contextlib.suppress(Exception):  # data.load will say what is wrong with the file
            own = np.load(f"{args.dataset}.npy", mmap_mode="r").shape[1]
        if "--image-size" in given and args.image_size != own:
            fail(f"--image-size {args.image_size}: {args.dataset} has {own} pixels a side")
        args.image_size = own
    goes_with = {"--ids": ["identities"], "--held-out": ["identities"]}
    goes_with |= {"--forget-ratio": ["random"], "--forget-classes": ["class", "subclass"]}
    goes_with |= {"--train-images": ["random", "class", "subclass"]}
    for flag, needed in goes_with.items():
        if flag in given and args.forget not in needed:
            fail(f"{flag} goes with --forget {' or '.join(needed)}; this is --forget {args.forget}")
    if args.forget in ("class", "subclass"):
        if "--forget-classes" not in given:
            fail(f"--forget {args.forget} needs --forget-classes, the numbers of the classes")
        args.forget_classes = sorted(set(args.forget_classes))
        if args.label_noise:
            fail(
                f"--forget {args.forget} with flipped labels would leave images labelled with that "
                "class in D_r; add --label-noise 0"
            )
    return args


# --------------------------------------------------------------------------------------------------
# Device, precision, seeds, processes


def choose_device(args) -> torch.device:
    """Pick device and precision and say why; sets args.amp to a bool.

    Source of bf16: METAUNLEARN App. A.
    """
    name, why = args.device, "asked for by --device"
    if name == "auto" and torch.cuda.is_available():
        name, why = "cuda", "CUDA is available"
    elif name == "auto" and torch.backends.mps.is_available():
        name, why = "mps", "no CUDA, but MPS is available"
    elif name == "auto":
        name, why = "cpu", "neither CUDA nor MPS is available"
    if name == "cuda":  # each process of torchrun has a GPU of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("neither cpu, cuda nor mps")
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        fail(f"--device {name} cannot be used here ({reason}); try --device cpu")
    if args.amp is None:
        # A CPU without bf16 units runs bf16 25 times slower than float32 (measured).
        args.amp = device.type == "cuda"
    say(f"device {device} ({why}); {'bf16 autocast' if args.amp else 'float32'}")
    return device


def clock(device: torch.device) -> float:
    """Seconds by a clock that waits for the device: a GPU returns before it has computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def autocast(device: torch.device, on: bool):
    """bf16 autocast without its weight cache, which is stale for a second set of parameters.

    Gradients on a CPU go without fused attention: on short sequences, as a ViT at 70 px has them,
    its bf16 backward takes four times as long there.
    """
    with contextlib.ExitStack() as stack:
        if on:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, cache_enabled=False))
        if on and device.type == "cpu" and torch.is_grad_enabled():
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def generator(*key: int) -> torch.Generator:
    """A CPU generator for one purpose, named by integers, so that resuming needs no saved state."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun set them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(device: torch.device):
    """Join the process group when torchrun started several processes."""
    if rank_and_world()[1] > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop_processes():
    """Leave the process group together: a process that ends early makes the others abort."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def wait_for_all():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


# --------------------------------------------------------------------------------------------------
# Models

PATCH_OF_TOY_VIT = 8
NARROW = r"resnet18_w([1-9]\d*)"  # the small images' ResNet-18, with so many channels, not 64


class Net(nn.Module):
    """A timm model that takes images in [0, 1] and gives (features, logits).

    Shapes: images (B, 3, H, W) -> features (B, D), the pooled token after the last norm, and
    logits (B, K). It normalises images itself, so that a checkpoint cannot be used with another
    model's mean and deviation.
    """

    def __init__(self, net: nn.Module, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = (images - self.mean) / self.std
        tokens = self.net.forward_features(images)  # (B, T, D) or (B, D, H', W')
        features = self.net.forward_head(tokens, pre_logits=True)  # (B, D)
        head = self.net.get_classifier()
        # Not in bf16, in which logits tie: mAP counts ties.
        with torch.autocast(images.device.type, enabled=False):
            return features, head(features.to(head.weight.dtype))  # (B, K)


def build_model(name: str, outputs: int, image_size: int, init: str = "none", seed: int = 0) -> Net:
    """Build a model from its constructor; with --init none a gold model shares nothing with others.

    init: none, pretrained (timm's hub), or a weight file. Raises SystemExit(2) for an unknown name,
    size or file.
    """
    own = name in ("toy_vit", "toy_resnet") or (name == "resnet18" and image_size <= 64)
    own = own or re.fullmatch(NARROW, name)
    found = re.search(r"patch(\d+)", name)
    patch = int(found[1]) if found else PATCH_OF_TOY_VIT if name == "toy_vit" else 1
    if image_size % patch:
        fail(f"--image-size {image_size} is no multiple of {patch}, the patch size of {name}")
    if init == "pretrained" and own:
        fail(f"--model {name} at {image_size} px has no pretrained weights; give --init none")
    weights = _read_weights(init) if init not in ("none", "pretrained") else None
    torch.manual_seed(seed)
    try:
        if own:
            net = _own_net(name, outputs, image_size, weights)
        else:
            net = _timm_net(name, outputs, image_size, init, weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        fail(f"--model {name} --init {init} at {image_size} px cannot be built: {reason}")
    except (AssertionError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        hint = "its patch size must divide --image-size"
        hint = "give --init FILE or --init none" if init == "pretrained" else hint
        fail(f"--model {name} at {image_size} px cannot be built ({reason}); {hint}")
    if weights and not own:
        _check_that_weights_were_loaded(net, name, outputs, image_size, init, seed)
    # A model without statistics of its own gets images scaled to [-1, 1]; SalUn uses CIFAR's.
    cfg = {} if own else net.pretrained_cfg
    model = Net(net, cfg.get("mean", (0.5, 0.5, 0.5)), cfg.get("std", (0.5, 0.5, 0.5)))
    try:
        with torch.no_grad():
            model.width = model.eval()(torch.zeros(1, 3, image_size, image_size))[0].shape[1]  # D
    except Exception as error:  # two heads, a fixed input size: whatever timm's model raises
        reason = " ".join(str(error).split())[:120]
        fail(f"--model {name} at {image_size} px gives no features and one classifier ({reason})")
    return model.train()


def _own_net(name, outputs, image_size, weights):
    """The models that have no entry in timm: small ones, and ResNet-18 for small images."""
    import timm  # here, because importing it takes seconds and --help should not

    if name == "toy_vit":  # 0.21 M parameters: 32 px faces on two CPU cores in seconds
        shape = dict(embed_dim=64, depth=4, num_heads=4, num_classes=outputs)
        shape |= dict(img_size=image_size, patch_size=PATCH_OF_TOY_VIT)
        net = timm.models.VisionTransformer(**shape)
    elif name == "toy_resnet":  # 0.08 M parameters, three stages of one block: for digits on a CPU
        net = _resnet((1, 1, 1), 16, outputs)
        net.layer4 = nn.Identity()
    else:  # w16: 0.70 M parameters, for CIFAR-10 on a CPU
        narrow = re.fullmatch(NARROW, name)
        net = _resnet((2, 2, 2, 2), int(narrow[1]) if narrow else 64, outputs)
    if weights:
        _load_but_the_head(net, weights)
    return net


def _resnet(blocks: tuple, width: int, outputs: int):
    """A ResNet as in SalUn: so many basic blocks in each stage, widths that double.

    Its first convolution is 3 x 3 with stride 1, and there is no pooling before the stages.
    """
    import timm

    block, widths = timm.models.resnet.BasicBlock, [width * 2**i for i in range(len(blocks))]
    shape = dict(layers=blocks, channels=widths, num_classes=outputs)
    net = timm.models.ResNet(block, zero_init_last=False, **shape)
    # timm's stem has 64 channels.
    net.bn1, net.maxpool = nn.BatchNorm2d(width), nn.Identity()
    net.layer1 = nn.Sequential(*(block(width, width) for _ in range(blocks[0])))
    net.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _timm_net(name, outputs, image_size, init, weights):
    import timm

    more = {"pretrained_cfg_overlay": {"state_dict": weights}} if weights else {}
    more |= {"pretrained": init != "none", "num_classes": outputs}
    try:  # vision transformers are built for one size
        return timm.create_model(name, img_size=image_size, **more)
    except TypeError:
        return timm.create_model(name, **more)


def _check_that_weights_were_loaded(net, name, outputs, image_size, init, seed):
    """timm skips what it cannot match, so a file of another architecture would load nothing."""
    torch.manual_seed(seed)
    fresh, loaded = (
        _timm_net(name, outputs, image_size, "none", None).state_dict(),
        net.state_dict(),
    )
    # Norms and biases start at 0 or 1 in any model, so only matrices are compared.
    matrices = [k for k, t in fresh.items() if t.ndim > 1]
    if sum(not torch.equal(loaded[k], fresh[k]) for k in matrices) < len(matrices) / 2:
        fail(f"--init {init} does not hold the weights of {name}")


def _load_but_the_head(net, state: dict):
    """Load weights, leaving out a classifier of another size, as timm does.

    Raises RuntimeError where the file lacks a weight.
    """
    head, own = [k for k, _ in net.get_classifier().named_parameters()], net.state_dict()
    in_head = {k for k in own if k.split(".")[0] in ("fc", "head") and k.split(".")[-1] in head}
    left_out = {k for k in in_head if own[k].shape != state.get(k, own[k]).shape}
    kept = {k: t for k, t in state.items() if k not in left_out}
    missing = set(net.load_state_dict(kept, strict=False).missing_keys) - left_out
    if missing:
        raise RuntimeError(f"the file lacks {sorted(missing)[0]}")


def _read_weights(path: str) -> dict:
    if not pathlib.Path(path).is_file():
        fail(f"--init {path}: no such file (use none, pretrained, or a .safetensors or .pt file)")
    try:
        if path.endswith(".safetensors"):
            import safetensors.torch

            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the two readers raise
        fail(f"--init {path} is not a readable weight file ({type(error).__name__})")
    is_weights = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    if not is_weights or not state:
        fail(f"--init {path} holds no weights: it must map parameter names to tensors")
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


class Own(nn.Module):
    """Somebody's own model as this project takes one: images (B, C, H, W) -> (features, logits).

    net: images -> logits (B, K). head: the name of the linear layer that gives them, whose input
    are the features (B, D); left out: its last linear layer. Images are what net takes, normalised.
    net is copied, so that neither its weights nor its mode change.
    """

    def __init__(self, net: nn.Module, head: str | None = None):
        super().__init__()
        linear = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
        self.net, self.head = copy.deepcopy(net), head or linear[-1]
        self.width = net.get_submodule(self.head).in_features  # D
        self.register_buffer("std", torch.ones(()))  # one number mixes with any device

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen, layer = [], self.net.get_submodule(self.head)
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.net(images)
        finally:
            hook.remove()
        return seen[0], logits

    def untrained(self, seed: int) -> nn.Module:
        """A copy with new weights, as each layer draws them itself."""
        fresh = copy.deepcopy(self)
        torch.manual_seed(seed)
        for p in fresh.parameters():
            nn.init.normal_(p, std=0.02)  # of what no layer draws, such as position embeddings
        for layer in fresh.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return fresh


def with_parameters(model, theta_u: dict):
    """A copy of model with the parameters in theta_u in place of its own; all else stays."""
    changed = copy.deepcopy(model)
    # Not beside the old ones: a tied weight has a second name, which is not in theta_u.
    changed.load_state_dict(theta_u, strict=False)
    return changed


def digest_of(model) -> str:
    """A hash of all weights and buffers."""
    digest = hashlib.sha256()
    for t in model.state_dict().values():
        digest.update(t.cpu().contiguous().numpy())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Losses and metrics


def task_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """L_task of each image: binary cross entropy averaged over attributes, or cross entropy.

    Shapes: logits (B, K); targets (B, K) in {0, 1} or (B,) class numbers -> (B,), in nats.
    """
    if targets.ndim == 2:
        targets = targets.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return F.cross_entropy(logits, targets.long(), reduction="none")


def kl_divergence(teacher: Tensor, student: Tensor, multilabel: bool, T: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each image at temperature T: (B, K), (B, K) -> (B,), in nats.

    Over classes, or as a Bernoulli of each attribute, averaged over them as L_task is. A trap of
    published code: F.kl_div's default reduction also divides by the number of classes.
    """
    teacher, student = teacher / T, student / T
    if multilabel:
        p = teacher.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(teacher, p, reduction="none")
        cross = F.binary_cross_entropy_with_logits(student, p, reduction="none")
        return T**2 * (cross - entropy).mean(1)
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    return T**2 * (log_p.exp() * (log_p - log_q)).sum(1)


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each column: the sum over thresholds of (R_n - R_{n-1}) P_n.

    As scikit-learn's. Shapes: scores (N, K), targets (N, K) in {0, 1} -> (K,) in [0, 1]; NaN where
    a column has no positive. Tied scores share one threshold, so the order of images cannot matter.
    """
    order = scores.argsort(dim=0, descending=True)
    sorted_scores, hits = scores.gather(0, order), targets.gather(0, order).double()  # (N, K)
    seen = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)[:, None]
    precision = hits.cumsum(0) / seen
    # Only the last image of a run of ties is a threshold, whose precision the earlier ones take.
    last_of_ties = torch.ones_like(hits, dtype=torch.bool)
    last_of_ties[:-1] = sorted_scores[1:] != sorted_scores[:-1]
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    position = torch.where(last_of_ties, rows, len(scores))
    threshold = position.flip(0).cummin(0).values.flip(0)  # (N, K): row of each one's threshold
    return (hits * precision.gather(0, threshold)).sum(0) / hits.sum(0)


def score(logits: Tensor, targets: Tensor) -> float:
    """The task's score in [0, 1]: top-1 accuracy, or macro mAP over attributes.

    An attribute that no image has is left out of the mean; the score is 0 where all are. Raises
    FloatingPointError for logits that are not finite, which would be ranked somehow.
    """
    if not torch.isfinite(logits).all():
        raise FloatingPointError("a model's outputs are not finite: it diverged; lower its step")
    if targets.ndim == 1:
        return (logits.argmax(1) == targets).sum().item() / len(targets)
    precision = average_precision(logits.float().cpu(), targets.cpu())  # MPS has no float64
    return precision.nanmean().item() if precision.isfinite().any() else 0.0


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of right answers in [0, 1]: top-1, or of all attributes at threshold 0.5.

    Source: LTU Sec. 4.1.
    """
    if targets.ndim == 2:
        return ((logits > 0) == (targets > 0.5)).float().mean().item()
    return score(logits, targets)


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """exp(-L_task), (B,): the true label's probability; over attributes, its geometric mean."""
    return (-task_losses(logits.double(), targets)).exp()


def membership_inference(retain: Tensor, test: Tensor, forget: Tensor) -> float:
    """MI: the share of D_f that SalUn's confidence attack takes for non-members, in [0, 1].

    Source: LTU Sec. 4.1. Arguments: confidences (n,) of D_r, D_te and D_f. An RBF SVC learns to
    tell the first two apart, on as many of each: the larger set is thinned evenly (SalUn takes the
    first |D_te| of D_r, which in data sorted by class is a few classes). The goal is the gold
    model's value, not 1. Equal confidences are one point with their number as weight: the same
    problem for the SVC, and a smaller one.
    """
    from sklearn.svm import SVC

    # SalUn's confidences are float32
    retain, test, forget = (t.float().double().numpy() for t in (retain, test, forget))
    if not all(np.isfinite(part).all() for part in (retain, test, forget)):
        fail("the model's outputs are no longer finite: unlearning diverged; lower its step size")
    n = min(len(retain), len(test))
    thinned = [part[np.arange(n) * len(part) // n] for part in (retain, test)]
    points = [np.unique(part, return_counts=True) for part in thinned]
    x = np.concatenate([values for values, _ in points])[:, None]
    member = np.repeat([1, 0], [len(values) for values, _ in points])
    weight = np.concatenate([number for _, number in points]).astype(float)
    attack = SVC(C=3, gamma="auto", kernel="rbf", cache_size=1000)
    attack.fit(x, member, sample_weight=weight)
    return float(1 - attack.predict(forget[:, None]).mean())


def average_gap(figures: dict, gold: dict) -> float:
    """Mean distance of UA, RA, TA and MI from the gold model's, in [0, 1] (LTU Table 1)."""
    return float(np.mean([abs(figures[key] - gold[key]) for key in figures]))


def tow(unlearned: dict, retrained: dict) -> float:
    """Tug-of-war: product over retain, forget and test of 1 - |score_u - score_r|.

    Source: METAUNLEARN Eq. (7). Both arguments map retain, forget and test to a score in [0, 1];
    the result lies there too (the paper prints it times 100). Raises ValueError for a score outside
    [0, 1], which is what a percentage passed by mistake looks like.
    """
    product = 1.0
    for name in ("retain", "forget", "test"):
        for value in (unlearned[name], retrained[name]):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; scores must lie in [0, 1]")
        product *= 1 - abs(unlearned[name] - retrained[name])  # Eq. (7)
    return product


# --------------------------------------------------------------------------------------------------
# Files: written to a temporary name, then renamed, so nothing half-written is ever found


@contextlib.contextmanager
def atomic_write(path):
    """Give a temporary path, renamed to path when the block succeeds, and deleted when not.

    Raises OSError with the path's name where the disk is full; writers do not name the file.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save at a full disk
        full = getattr(error, "errno", None) == errno.ENOSPC
        if full or shutil.disk_usage(path.parent).free < 2**20:
            raise OSError(errno.ENOSPC, "the disk is full", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Delete what atomic_write left in a folder when its process was killed."""
    for path in pathlib.Path(folder).glob(".*.*.tmp"):
        with contextlib.suppress(ValueError, OSError):
            try:
                os.kill(int(path.name.split(".")[-2]), 0)  # 0: only asks whether it runs
            except ProcessLookupError:
                path.unlink()


def check_writable(*folders, file=None):
    """Fail before the training, not after it, where a folder or --save's file cannot be written.

    Nor may --save replace anything but an earlier unlearned model: what it names may be in use.
    """
    if file and pathlib.Path(file).is_dir():
        fail(f"--save {file} is a folder; name a file")
    if file and pathlib.Path(file).exists() and read_checkpoint(file).get("which") != "unlearned":
        fail(f"--save {file} would replace a file that is no unlearned model; name another file")
    for folder in [*folders, *([pathlib.Path(file).parent] if file else [])]:
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            fail(f"cannot write to {folder} ({error.strerror}); choose another folder")


PARTIAL_EVERY = 60.0  # seconds between the checkpoints from which --resume goes on


def save_checkpoint(path, **content):
    """Save tensors and plain values atomically; load_checkpoint reads them with no code in them."""
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def read_checkpoint(path) -> dict:
    """What is in a checkpoint of any kind, read with weights_only=True; see load_checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a text, a truncated zip, a pickle that would run code: each differs
        fail(f"{path} is no checkpoint that can be loaded safely; delete it or name another file")
    return content if isinstance(content, dict) else {}


def load_checkpoint(path, *kinds: str, **expected) -> dict:
    """Load a checkpoint and check what it is.

    kinds: its role (model, meta-loss), or several that will do; each keyword must equal the saved
    value. Raises SystemExit(2) with one line for a missing file, a file that is no checkpoint, one
    of another split, model or recipe, and one with a tensor that is not finite.
    """
    kind = " or ".join(kinds)
    if not pathlib.Path(path).is_file():
        fail(f"no {kind} at {path}")
    content = read_checkpoint(path)
    if content.get("kind") not in kinds:
        fail(f"{path} is no {kind} checkpoint of this project")
    with reading(path):  # a tensor where a number should be cannot be compared
        for key, value in expected.items():
            if content.get(key) != value:
                fail(
                    f"{path} was made with {key} {content.get(key)!r}, this run has {value!r}; "
                    "use the same flags, or another --checkpoint-dir"
                )
    for state in content.values():
        entries = state.values() if isinstance(state, dict) else []
        tensors = [t for own in entries for t in (own if isinstance(own, tuple) else [own])]
        if not all(torch.isfinite(t).all() for t in tensors if isinstance(t, Tensor)):
            fail(f"{path} holds numbers that are not finite; delete it or name another file")
    return content


@contextlib.contextmanager
def reading(path):
    """End with one line, not a traceback, where an entry of the checkpoint at path is no good."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        fail(f"{path} is damaged or of another version ({reason}); delete it or name another file")


def load_model(path) -> tuple[Net, dict]:
    """A model of this project, ready to use, and what its checkpoint says of it.

    path: a checkpoint of an original, gold or unlearned model, or a meta-loss, which holds the
    original. Each is a dictionary with `kind` (model or meta-loss), `model` (the state_dict),
    `which` (original, gold or unlearned), `architecture`, `image_size`, `target_names` and `split`
    (a hash; not with --support); original and gold add `indices` (the split), the recipe, `seed`,
    `seconds` and `best` (the validation score); a meta-loss adds `phi` and what it was made with.
    Returns (model in eval mode on the CPU, {which, architecture, image_size, target_names}).
    """
    saved = load_checkpoint(path, "model", "meta-loss")
    with reading(path):
        keys = ("which", "architecture", "image_size", "target_names")
        about = {key: saved[key] for key in keys}
        outputs = len(about["target_names"])
        model = build_model(about["architecture"], outputs, about["image_size"])
        model.load_state_dict(saved["model"])
    return model.eval(), about


def write_json(path, content: dict):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _commit() -> str | None:
    git = ["git", "-C", pathlib.Path(__file__).parent, "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


COMMIT = _commit()  # when the run begins, for the files may change before it ends


def provenance(device: torch.device) -> dict:
    """What a reader needs to judge a number: a GPU's memory, hardware, versions, commit, date."""
    name, peak = f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}", None
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        name += f", {cpu[1]}" if cpu else ""
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    versions = {"python": platform.python_version()}
    versions |= {"torch": torch.__version__, "numpy": np.__version__}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {"peak_memory_bytes": peak, "device": name, "versions": versions}
    return content | {"commit": COMMIT, "date": date}
