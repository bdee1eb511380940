"""What every script shares, so that their numbers can be compared: models, losses, metrics, device, checkpoints, results.

Axis letters used in shape comments: B images in a batch, K outputs (attributes or classes), D feature width,
T tokens, H and W pixels, N_s Support images.
"""

import argparse
import contextlib
import copy
import datetime
import json
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---------------------------------------------------------------------------------------------------------------------
# Speaking to the person at the terminal


def fail(message: str):
    """End with one line on stderr and exit code 2: the person can mend this, so no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def say(*words):
    """Print on the first process only (under torchrun every rank runs the same script)."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse whose help shows defaults, and whose errors are one line instead of the whole usage."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(f"{message} (see --help)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def add_shared_arguments(parser: argparse.ArgumentParser):
    """The flags that mean the same in every script (design: one word, one meaning)."""
    add = parser.add_argument
    add(
        "--dataset",
        default="toyfaces",
        help="toyfaces, celeba, celebahq, qmnist, digits, cifar10, cifar100, tinyimagenet, or the path of a prepared pair PATH.npy + PATH.npz",
    )
    add("--data-dir", default="data", help="folder with the publishers' files; prepared arrays go into its folder prepared/")
    add("--image-size", type=int, default=32, help="pixels per side at which images are stored and seen; paper: 224")
    add("--ids", type=int, default=10, help="N_S, identities to forget; paper: 20, 50 (CelebA-HQ), 5, 10 (CelebA)")
    add("--forget", choices=("identities", "random", "class", "subclass"), default="identities", help="what is forgotten; LTU: random")
    add("--forget-ratio", type=float, default=0.1, help="share of the training images that --forget random forgets; LTU: 0.1, 0.5")
    add(
        "--forget-classes",
        type=int,
        nargs="+",
        default=[],
        help="class numbers for --forget class; for subclass those within the super-classes",
    )
    add(
        "--held-out",
        action="store_true",
        help="ours: keep a picture of each training identity out of training, to simulate requests with; the paper simulates with trained ones",
    )
    add("--label-noise", type=float, default=0.0, help="share of all labels to flip, so that memorising shows; digits: 0.1, papers: 0")
    add("--train-images", type=int, default=0, help="keep only so many images of training and validation together, 0: all")
    add("--model", default="toy_vit", help="toy_vit, toy_resnet, resnet18 (with a CIFAR stem up to 64 px) or any timm model")
    add("--init", default="none", help="initial weights: none, pretrained (timm's hub), or a .safetensors/.pt file; paper: pretrained")
    add("--seed", type=int, default=0, help="training and noise")
    add("--split-seed", type=int, default=0, help="who is in train, validation and test, and who is forgotten")
    add("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    add("--amp", action=argparse.BooleanOptionalAction, default=None, help="bf16 autocast; paper: on; None: on for CUDA only")
    add("--out", default="runs", help="folder for result files; those in results/ came with the repository")
    add("--checkpoint-dir", default="checkpoints", help="folder for models, splits and meta-losses")
    add("--resume", action="store_true", help="go on from the last epoch saved by an interrupted run")
    add("--dry-run", action="store_true", help="one or two batches through every phase; results are marked dry and kept apart")


def parse_with_presets(parser: argparse.ArgumentParser, presets: dict, argv):
    """Parse argv with the defaults of its --dataset (and --preset): a flag on the command line wins over the table.

    presets maps a dataset, a preset, or a pair of both to {flag: value}. A pre-parser reads only the names, so --help stays complete
    and shows the values that this dataset would run with.
    """
    names = Parser(add_help=False)
    names.add_argument("--dataset", default=parser.get_default("dataset"))
    names.add_argument("--preset", default=parser.get_default("preset"))
    chosen, _ = names.parse_known_args(argv)
    for key in (chosen.dataset, chosen.preset, (chosen.dataset, chosen.preset)):
        parser.set_defaults(**presets.get(key, {}))
    args = parser.parse_args(argv)
    check_ranges(args, [("ids", 1, 1e9), ("image_size", 8, 4096), ("split_seed", 0, 2**32), ("seed", 0, 2**32)])
    check_ranges(args, [("label_noise", 0, 0.9), ("train_images", 0, 1e9)])
    given = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    for flag, needed in (
        ("--ids", ("identities",)),
        ("--held-out", ("identities",)),
        ("--forget-ratio", ("random",)),
        ("--forget-classes", ("class", "subclass")),
    ):
        if flag in given and args.forget not in needed:
            fail(f"{flag} goes with --forget {' or '.join(needed)}; this is --forget {args.forget}")
    if args.forget in ("class", "subclass"):
        if "--forget-classes" not in given:
            fail(f"--forget {args.forget} needs --forget-classes, the numbers of the classes")
        args.forget_classes = sorted(set(args.forget_classes))
        if args.label_noise:
            fail(f"--forget {args.forget} with flipped labels would leave images labelled with that class in D_r; add --label-noise 0")
    if not 0 < args.forget_ratio < 1:
        fail(f"--forget-ratio is {args.forget_ratio}; it must lie between 0 and 1, without either")
    return args


def check_ranges(args, ranges: list):
    """Refuse, in one line, a flag outside its (flag, lowest, highest); NaN is outside, None is a flag not given."""
    for flag, lowest, highest in ranges:
        value = getattr(args, flag)
        if value is not None and not lowest <= value <= highest:
            fail(f"--{flag.replace('_', '-')} is {value}; it must lie from {lowest:g} to {highest:g}")


# ---------------------------------------------------------------------------------------------------------------------
# Device, precision, seeds, processes


def choose_device(args) -> torch.device:
    """Pick device and precision and say why; sets args.amp to a bool. Units: none. Source: design, paper App. A (bf16)."""
    rank, _ = rank_and_world()
    if args.device == "auto":
        if torch.cuda.is_available():
            name, why = "cuda", "CUDA is available"
        elif torch.backends.mps.is_available():
            name, why = "mps", "no CUDA, but MPS is available"
        else:
            name, why = "cpu", "neither CUDA nor MPS is available"
    else:
        name, why = args.device, "asked for by --device"
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
        fail(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu")
    if args.amp is None:
        # A CPU without bf16 units runs bf16 autocast 25 times slower than float32 (measured).
        args.amp, reason = (device.type == "cuda", "the default on CUDA" if device.type == "cuda" else "bf16 is the default on CUDA alone")
    else:
        reason = "asked for by --amp" if args.amp else "asked for by --no-amp"
    if rank == 0:
        say(f"device {device} ({why}); precision {'bf16 autocast' if args.amp else 'float32'} ({reason})")
    return device


def autocast(device: torch.device, on: bool):
    """bf16 autocast without the weight cache, which would hand stale casts to a second set of parameters."""
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if on else contextlib.nullcontext()


def generator(*key: int) -> torch.Generator:
    """A CPU generator for one purpose, named by integers: resuming then needs no saved random state."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun set them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(device: torch.device):
    """Join the process group when torchrun started several processes."""
    if rank_and_world()[1] > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop_processes():
    """Leave the process group together: a rank that ends early makes the others abort."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def wait_for_all():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Models


class Net(nn.Module):
    """A timm model that takes images in [0, 1] and gives (features, logits).

    Shapes: images (B, 3, H, W) -> features (B, D): the pooled token after the last norm; logits (B, K).
    It normalises images itself, so that a checkpoint cannot be fed with another model's mean and deviation.
    """

    def __init__(self, net: nn.Module, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.net.forward_features((images - self.mean) / self.std)  # (B, T, D), or a map for a convolutional net
        features = self.net.forward_head(tokens, pre_logits=True)  # (B, D)
        head = self.net.get_classifier()
        with torch.autocast(images.device.type, enabled=False):  # bf16 logits would tie, and mAP counts ties
            return features, head(features.to(head.weight.dtype))  # (B, K)


def build_model(name: str, outputs: int, image_size: int, init: str = "none", seed: int = 0) -> Net:
    """Build a model from its constructor: always fresh, so a gold model can share nothing with the original.

    init: none, pretrained (timm's hub), or a weight file. Raises SystemExit(2) for an unknown name, size or file.
    """
    import timm  # here, because importing it takes seconds and --help should not

    if "vit" in name and (patch := 8 if name == "toy_vit" else _patch_size(name)) and image_size % patch:
        fail(f"--image-size {image_size} is no multiple of {patch}, the patch size of {name}")
    if init == "pretrained" and (name in ("toy_vit", "toy_resnet") or (name == "resnet18" and image_size <= 64)):
        fail(f"--model {name} at {image_size} px has no pretrained weights; give --init none")
    torch.manual_seed(seed)
    extra = {}
    if init not in ("none", "pretrained"):
        extra = {"pretrained_cfg_overlay": {"state_dict": _read_weights(init)}}
    try:
        own = name in ("toy_vit", "toy_resnet") or (name == "resnet18" and image_size <= 64)
        if name == "toy_vit":  # 0.21 M parameters: 32 px faces on two CPU cores in seconds
            net = timm.models.VisionTransformer(img_size=image_size, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=outputs)
        elif name == "toy_resnet":  # 0.08 M parameters, three stages of one block: for digits and small pieces of CIFAR-10 on a CPU
            block, stages = timm.models.resnet.BasicBlock, dict(layers=(1, 1, 1), channels=(16, 32, 64), zero_init_last=False)
            net = timm.models.ResNet(block, num_classes=outputs, **stages)
            net.bn1, net.layer1, net.layer4 = nn.BatchNorm2d(16), nn.Sequential(block(16, 16)), nn.Identity()  # timm's stem has 64 channels
            _cifar_stem(net, 16)
        elif own:
            net = timm.create_model(name, num_classes=outputs)
            _cifar_stem(net, 64)
        if own:
            net.pretrained_cfg = {}  # images are scaled to [-1, 1]; SalUn's ResNet-18 has CIFAR's own mean and deviation
            if extra:
                _load_but_the_head(net, extra["pretrained_cfg_overlay"]["state_dict"])
        else:
            size = {"img_size": image_size} if "vit" in name or "deit" in name else {}
            net = timm.create_model(name, pretrained=init != "none", num_classes=outputs, **size, **extra)
    except RuntimeError as error:
        fail(f"--model {name} --init {init} at {image_size} px cannot be built: {' '.join(str(error).split())[:200]}")
    except (AssertionError, OSError, TypeError) as error:
        hint = "give --init FILE or --init none" if init == "pretrained" else "its patch size must divide --image-size"
        fail(f"--model {name} at {image_size} px cannot be built ({' '.join(str(error).split())[:120]}); {hint}")
    if extra and not own:  # timm skips what it cannot match: a file of another architecture would load nothing
        torch.manual_seed(seed)
        fresh = timm.create_model(name, num_classes=outputs, **size).state_dict()
        weights = [k for k, t in fresh.items() if t.ndim > 1]  # norms and biases start at 0 or 1 in any model
        if sum(not torch.equal(net.state_dict()[k], fresh[k]) for k in weights) < len(weights) / 2:
            fail(f"--init {init} does not hold the weights of {name}")
    cfg = net.pretrained_cfg
    model = Net(net, cfg.get("mean", (0.5, 0.5, 0.5)), cfg.get("std", (0.5, 0.5, 0.5)))
    try:
        with torch.no_grad():
            model.width = model.eval()(torch.zeros(1, 3, image_size, image_size))[0].shape[1]  # D
    except Exception as error:  # two heads, a fixed input size: whatever timm's model raises on such a call
        fail(f"--model {name} at {image_size} px does not give features and one classifier ({' '.join(str(error).split())[:120]})")
    return model.train()


def _load_but_the_head(net, state: dict):
    """Load weights, leaving out a classifier of another size, as timm does. Raises RuntimeError where others are missing."""
    head = [k for k, p in net.get_classifier().named_parameters()]
    own = net.state_dict()
    left_out = {
        k for k in own if k.split(".")[0] in ("fc", "head") and k.split(".")[-1] in head and own[k].shape != state.get(k, own[k]).shape
    }
    missing = net.load_state_dict({k: t for k, t in state.items() if k not in left_out}, strict=False).missing_keys
    if set(missing) - left_out:
        raise RuntimeError(f"the file lacks {sorted(set(missing) - left_out)[0]}")


def _cifar_stem(net, channels: int):
    """A 3 x 3 first convolution of stride 1 and no pooling: small images keep their pixels (He et al. 2016, SalUn's ResNet-18)."""
    net.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _patch_size(name: str) -> int | None:
    found = re.search(r"patch(\d+)", name)
    return int(found[1]) if found else None


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
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        fail(f"--init {path} holds no weights: it must map parameter names to tensors")
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Losses and metrics


def task_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """L_task of each image: binary cross entropy averaged over K attributes, or cross entropy over K classes.

    Shapes: logits (B, K); targets (B, K) in {0, 1} or (B,) class numbers -> (B,), in nats.
    """
    if targets.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").mean(1)
    return F.cross_entropy(logits, targets.long(), reduction="none")


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each column: sum over distinct thresholds of (R_n - R_{n-1}) P_n, as scikit-learn defines it.

    Shapes: scores (N, K), targets (N, K) in {0, 1} -> (K,) in [0, 1]; NaN where a column has no positive. Tied scores
    share one threshold, so the order of images cannot matter.
    """
    order = scores.argsort(dim=0, descending=True)
    sorted_scores, hits = scores.gather(0, order), targets.gather(0, order).double()  # (N, K)
    true_positives = hits.cumsum(0)
    seen = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)[:, None]
    precision = true_positives / seen
    # Only the last image of a run of ties is a threshold; earlier ones take its precision: reach it from the end.
    last_of_ties = torch.ones_like(hits, dtype=torch.bool)
    last_of_ties[:-1] = sorted_scores[1:] != sorted_scores[:-1]
    position = torch.where(last_of_ties, torch.arange(len(scores), device=scores.device)[:, None], len(scores))
    threshold = position.flip(0).cummin(0).values.flip(0)  # (N, K): index of the threshold each image falls under
    return (hits * precision.gather(0, threshold)).sum(0) / hits.sum(0)


def score(logits: Tensor, targets: Tensor) -> float:
    """The task's accuracy in [0, 1]: macro mAP over attributes that have a positive (0 if none has), or top-1 accuracy."""
    if targets.ndim == 1:
        return (logits.argmax(1) == targets).sum().item() / len(targets)
    precision = average_precision(logits.float().cpu(), targets.cpu())  # on the CPU: MPS has no float64
    return precision.nanmean().item() if precision.isfinite().any() else 0.0


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of right answers in [0, 1]: top-1, or over all attributes at threshold 0.5. 1 - UA, RA and TA (LTU Sec. 4.1)."""
    return ((logits > 0) == (targets > 0.5)).float().mean().item() if targets.ndim == 2 else score(logits, targets)


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """Probability of the true label, (B,); over attributes its geometric mean: exp(-L_task) is both."""
    return (-task_losses(logits.double(), targets)).exp()


def membership_inference(retain: Tensor, test: Tensor, forget: Tensor) -> float:
    """MI: the share of D_f that SalUn's confidence attack takes for non-members, in [0, 1] (LTU Sec. 4.1, SalUn's SVC_MIA).

    Arguments: confidences (n,) of D_r, of the test set, of D_f. An RBF SVC learns to tell the first two apart, on as many of each:
    the larger is thinned evenly (SalUn takes the first |D_te| of D_r, which in a data set sorted by class is a few classes).
    Equality with the gold model is the goal, not 1. Equal confidences are one point with their number as weight: the same
    problem for the SVC, and a smaller one.
    """
    from sklearn.svm import SVC

    retain, test, forget = (t.float().double().numpy() for t in (retain, test, forget))  # SalUn's confidences are float32
    if not all(np.isfinite(part).all() for part in (retain, test, forget)):
        fail("the model's outputs are no longer finite: unlearning diverged; lower its step size")
    n = min(len(retain), len(test))
    points = [np.unique(part[np.arange(n) * len(part) // n], return_counts=True) for part in (retain, test)]
    x = np.concatenate([values for values, _ in points])[:, None]
    member = np.repeat([1, 0], [len(values) for values, _ in points])
    weight = np.concatenate([count for _, count in points]).astype(float)
    attack = SVC(C=3, gamma="auto", kernel="rbf", cache_size=1000).fit(x, member, sample_weight=weight)
    return float(1 - attack.predict(forget[:, None]).mean())


def average_gap(figures: dict, name: str) -> float:
    """Mean distance of a row's UA, RA, TA and MI from the gold model's, in [0, 1] (LTU Table 1)."""
    return float(np.mean([abs(figures[name][key] - figures["retrained"][key]) for key in figures[name]]))


def tow(unlearned: dict, retrained: dict) -> float:
    """Tug-of-war: product over retain, forget and test of 1 - |score_u - score_r|. Source: METAUNLEARN Eq. (7).

    Both arguments map retain, forget, test to a score in [0, 1]; so does the result (the paper prints it times 100).
    Raises ValueError for a score outside [0, 1], which is what a percentage passed by mistake looks like.
    """
    product = 1.0
    for name in ("retain", "forget", "test"):
        for value in (unlearned[name], retrained[name]):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; scores must lie in [0, 1]")
        product *= 1 - abs(unlearned[name] - retrained[name])  # Eq. (7)
    return product


@torch.no_grad()
def predict(model: Net, load_images, indices, device, amp=False, batch_size=256) -> Tensor:
    """Logits of the images at indices, in float32 on the CPU: (N, K). load_images(indices) gives (B, 3, H, W) in [0, 1].

    Under torchrun every process takes its share, and all get the whole result.
    """
    was_training = model.training
    model.eval()
    rank, world = rank_and_world()
    if len(indices) < world:  # too few to share: every process takes them all
        rank, world = 0, 1
    own, logits = indices[rank::world], []
    for start in range(0, len(own), batch_size):
        with autocast(device, amp):
            logits.append(model(load_images(own[start : start + batch_size]))[1].float().cpu())
    model.train(was_training)
    logits = torch.cat(logits)
    if world == 1:
        return logits
    shares = [None] * world
    torch.distributed.all_gather_object(shares, logits)
    whole = torch.empty(len(indices), logits.shape[1])
    for r, share in enumerate(shares):
        whole[r::world] = share
    return whole


def with_parameters(model, theta_u: dict):
    """A copy of model with theta_u in place of its parameters; buffers and what theta_u lacks stay as they are."""
    changed = copy.deepcopy(model)
    changed.load_state_dict(model.state_dict() | theta_u)
    return changed


# ---------------------------------------------------------------------------------------------------------------------
# Curvature


def wide(t: Tensor) -> Tensor:
    """float64, for long sums; on the CPU where the device has none (MPS)."""
    return t.double() if t.device.type != "mps" else t.cpu().double()


def label_gradients(model, load_images, indices: Tensor, multilabel: bool, rng: torch.Generator, batch_size: int):
    """Yield, batch by batch, {name: (B, ...)}: each image's gradient of log p(y | x), with y drawn from the model's own prediction.

    Labels drawn from the model make the mean of their squares the Fisher information; the data's labels would not. Over attributes
    log p is the sum over K Bernoullis, not the mean. The model must be in eval mode; no autocast.
    """
    theta, buffers = {k: p.detach() for k, p in model.named_parameters()}, dict(model.named_buffers())

    def log_likelihood(theta, image, label):
        logits = functional_call(model, (theta, buffers), (image[None],))[1]
        return -task_losses(logits, label[None]).sum() * (label.numel() if label.ndim else 1)  # sum over attributes, not mean

    for batch in indices.split(batch_size):
        x = load_images(batch)
        with torch.no_grad():
            logits = model(x)[1].cpu()
        if multilabel:
            y = torch.bernoulli(logits.sigmoid(), generator=rng)
        else:
            y = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels know no vmap of a gradient
            gradients = vmap(grad(log_likelihood), in_dims=(None, 0, 0))(theta, x, y.to(x.device))
        yield gradients


def curvature(model, load_images, indices: Tensor, multilabel: bool, *key: int) -> dict:
    """The Fisher information F of theta in a Kronecker eigenbasis: {name: (U_out (o, o), U_in (i, i), second (o, i))}.

    A parameter is taken as the matrix (o, i) that its layer multiplies with, a vector as (o, 1). With G an image's gradient, U_out and
    U_in are the eigenvectors of E[G G^T] and E[G^T G], and `second` is E[(U_out^T G U_in)^2], elementwise: F of one tensor is taken to
    be diagonal in that basis, and to hold nothing between tensors. Exact where o or i is 1. Reads the images twice; `key` seeds
    the labels. Source: George et al. 2018 (EK-FAC), with the factors of Gupta et al. 2018 (Shampoo).
    """
    size = max(1, min(64, 2**28 // sum(p.numel() for p in model.parameters())))  # B gradients of theta at a time: at most 2**28 numbers
    passes = lambda: label_gradients(model, load_images, indices, multilabel, generator(*key), size)
    shape = {k: _matrix_shape(p) for k, p in model.named_parameters()}
    outer, inner, second = ({k: 0.0 for k in shape} for _ in range(3))
    for gradients in passes():
        for k, g in gradients.items():
            G = g.reshape(len(g), *shape[k])
            outer[k] = outer[k] + wide(torch.einsum("boi,bpi->op", G, G))
            inner[k] = inner[k] + wide(torch.einsum("boi,boj->ij", G, G))
    basis = {k: tuple(torch.linalg.eigh(t)[1].to(p) for t in (outer[k], inner[k])) for k, p in model.named_parameters()}
    for gradients in passes():
        for k, g in gradients.items():
            U_out, U_in = basis[k]
            second[k] = second[k] + wide((U_out.T @ g.reshape(len(g), *shape[k]) @ U_in).pow(2).sum(0)) / len(indices)
    return {k: (*basis[k], second[k].to(p)) for k, p in model.named_parameters()}


def _matrix_shape(p: Tensor) -> tuple[int, int]:
    rows = p.shape[1] if p.ndim > 1 and p.shape[0] == 1 else p.shape[0]  # cls_token and pos_embed lead with a 1
    return rows, p.numel() // rows


def natural(F: dict, gradient: dict, damping: float) -> dict:
    """(F + damping)^-1 gradient, {name: tensor}, with F as `curvature` gives it."""
    out = {}
    for k, g in gradient.items():
        U_out, U_in, second = F[k]
        out[k] = (U_out @ ((U_out.T @ g.reshape(second.shape) @ U_in) / (second + damping)) @ U_in.T).view_as(g)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The row that every method prints, and the control


def measure(model: Net, load_images, targets: Tensor, sets: dict, controls: list, device, amp=False, true_targets=None) -> dict:
    """Score and loss on D_r, D_f, D_v, D_te, and the score of each control set; all in [0, 1], losses in nats.

    sets maps retain, forget, val, test to image indices; controls are positions within retain (data.control_sets).
    With true_targets (targets, but for labels flipped by --label-noise) the test score is against these, and accuracies
    and `mi`, the membership metric, are added (LTU Sec. 4.1).
    """
    row, sure = {}, {}
    for name in ("retain", "forget", "val", "test"):
        logits, own = predict(model, load_images, sets[name], device, amp), targets[sets[name]]
        row[name] = {"score": score(logits, own), "loss": task_losses(logits, own).mean().item()}
        if name == "retain":
            row["control"] = {"score": [score(logits[c], own[c]) for c in controls]}
        if true_targets is not None:
            sure[name] = confidence(logits, own)
            right = true_targets[sets[name]] if name == "test" else own
            row[name] |= {"score": score(logits, right), "accuracy": accuracy(logits, right)}
            if name in ("retain", "forget") and (targets != true_targets).any():
                row[name]["wrong"] = (logits.argmax(1) != own).tolist()
    if sets.get("test_forgotten"):  # test images of a forgotten class: generalisation that should be gone too
        logits, own = predict(model, load_images, sets["test_forgotten"], device, amp), targets[sets["test_forgotten"]]
        row["test_forgotten"] = {"score": score(logits, own), "loss": task_losses(logits, own).mean().item()}
    if true_targets is not None:
        row["mi"] = membership_inference(sure["retain"], sure["test"], sure["forget"])
    return row


def paper_figures(row: dict) -> dict:
    """UA, RA, TA and MI of a row of measure, in [0, 1] (LTU Sec. 4.1)."""
    return {"ua": 1 - row["forget"]["accuracy"], "ra": row["retain"]["accuracy"], "ta": row["test"]["accuracy"], "mi": row["mi"]}


def compare(rows: dict) -> dict:
    """Each row's ToW against the gold model, and what it lost on D_f and on the control sets (Eq. (7); scores in [0, 1])."""
    score_of = {name: {s: row[s]["score"] for s in ("retain", "forget", "test")} for name, row in rows.items()}
    table, before = {}, rows["original"]
    for name, row in rows.items():
        lost = np.array(before["control"]["score"]) - np.array(row["control"]["score"])
        forgotten = before["forget"]["score"] - row["forget"]["score"]
        table[name] = {
            "tow": tow(score_of[name], score_of["retrained"]),
            "forget_lost": forgotten,
            "control_lost_mean": float(lost.mean()),
            "control_lost_std": float(lost.std(ddof=1)),
            "controls_that_lost_less": float((lost < forgotten).mean()),
        }
    return table


LABELS = {"original": "Trained", "retrained": "Retrained (gold)", "ascent": "1 ascent step on S", "ft": "FT, same batches"}


def print_table(rows: dict, table: dict, metric: str, names: dict):
    """The paper's row of each model (row -> name), and what it lost on D_f beside what retained people lost; all times 100."""
    say(f"\n{'':22s} {metric + ' x 100':^20s}            score lost (x 100) on     control sets")
    say(f"{'':22s} {'D_r':>6s} {'D_f':>6s} {'D_te':>6s} {'ToW':>7s}    {'D_f':>6s}  {'control':>12s}   below D_f")
    for name, row in rows.items():
        r, f, te = (100 * row[s]["score"] for s in ("retain", "forget", "test"))
        t = {key: 100 * value for key, value in table[name].items()}
        say(
            f"{names[name]:22s} {r:6.1f} {f:6.1f} {te:6.1f} {t['tow']:7.1f}    {t['forget_lost']:6.1f}  "
            f"{t['control_lost_mean']:5.1f} +- {t['control_lost_std']:3.1f}   {t['controls_that_lost_less']:6.0f} %"
        )
    say("control: 20 random sets of as many retained identities. Forgetting these people lowers D_f and not the control.\n")


def print_gaps(figures: dict, table: dict, seconds: dict, names: dict):
    """LTU's row of each model: UA, RA, TA and MI in percent with the gap to the gold model, their mean, UT and ToW."""
    say(f"\n{'':18s}" + "".join(f"{key:^16s}" for key in ("UA (gap)", "RA (gap)", "TA (gap)", "MI (gap)")) + " avg gap  UT / min     ToW")
    for name, row in figures.items():
        gaps = {key: abs(row[key] - figures["retrained"][key]) for key in row}
        cells = "".join(f"{100 * row[key]:7.2f} ({100 * gaps[key]:5.2f}) " for key in row)
        time = f"{seconds[name] / 60:9.3f}" if name in seconds else f"{'':9s}"
        say(f"{names[name]:18s}{cells} {100 * average_gap(figures, name):7.2f} {time} {100 * table[name]['tow']:7.1f}")
    lost = {name: (100 * t["forget_lost"], 100 * t["control_lost_mean"], 100 * t["control_lost_std"]) for name, t in table.items()}
    shown = ", ".join(f"{names[name]} {f:.1f} ({c:.1f} +- {s:.1f})" for name, (f, c, s) in lost.items() if name != "original")
    say(f"score lost on D_f (on 20 control sets of as many images or identities of D_r): {shown}")


def plot(rows: dict, table: dict, path: pathlib.Path, metric: str, method: str, title: str):
    """Two panels: scores of each model, and what it lost on D_f beside the control sets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    shades, hatches = ["0.15", "0.45", "0.70", "0.95"], ["", "//", "..", "xx"]
    sets = [("retain", "$D_r$ retain"), ("forget", "$D_f$ forget"), ("test", "$D_{te}$ test")]
    for i, (name, row) in enumerate(rows.items()):
        values = [100 * row[s]["score"] for s, _ in sets]
        left.bar(
            np.arange(3) + 0.2 * i - 0.3, values, 0.2, color=shades[i], hatch=hatches[i], edgecolor="black", label=LABELS.get(name, method)
        )
    left.set_xticks(range(3), [label for _, label in sets])
    left.set_ylabel(f"{metric} (%)")
    left.set_ylim(min(100 * row[s]["score"] for row in rows.values() for s, _ in sets) - 5, None)
    left.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    shown = [name for name in rows if name != "original"]
    for i, name in enumerate(shown):
        lost = 100 * (np.array(rows["original"]["control"]["score"]) - np.array(rows[name]["control"]["score"]))
        right.scatter(lost, np.full(len(lost), i), marker="|", s=120, color="0.5", label="20 control sets out of $D_r$" if i == 0 else None)
        right.scatter(
            [100 * table[name]["forget_lost"]],
            [i],
            marker="D",
            s=50,
            color="black",
            label="$D_f$, what is to be forgotten" if i == 0 else None,
        )
    right.axvline(0, color="0.8", linewidth=1, zorder=0)
    right.set_yticks(range(len(shown)), [LABELS.get(name, method) for name in shown])
    right.set_ylim(-0.6, len(shown) - 0.4)
    right.set_xlabel(f"{metric} lost (percentage points)")
    right.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Files: written to a temporary name, then renamed, so nothing half-written is ever found


@contextlib.contextmanager
def atomic_write(path):
    """Give a temporary path beside path; rename it to path when the block succeeds, delete it when it does not."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(*folders):
    """Fail now, not after an hour of training, where a folder cannot be written."""
    for folder in folders:
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            fail(f"cannot write to {folder} ({error.strerror}); choose another folder with --out, --checkpoint-dir or --data-dir")


def check_file(path):
    """Fail now where --save names a folder or a place that cannot be written."""
    if path:
        if pathlib.Path(path).is_dir():
            fail(f"--save {path} is a folder; name a file")
        check_writable(pathlib.Path(path).parent)


def save_checkpoint(path, **content):
    """Save tensors and plain values atomically, so that loading needs no code: see load_checkpoint."""
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path, kind: str, **expected) -> dict:
    """Load a checkpoint with weights_only=True and check what it is.

    kind names its role (model, meta-loss); each keyword must equal the saved value. Raises SystemExit(2) with one line
    for a missing file, a file that is no checkpoint, and one of another split, model or recipe.
    """
    if not pathlib.Path(path).is_file():
        fail(f"no {kind} at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a text file, a truncated zip, a pickle that would run code: each raises something else
        fail(f"{path} is no checkpoint that can be loaded safely; delete it or name another file")
    if not isinstance(content, dict) or content.get("kind") != kind:
        fail(f"{path} is no {kind} checkpoint of this project")
    for key, value in expected.items():
        if content.get(key) != value:
            fail(
                f"{path} was made with {key} {content.get(key)!r}, this run has {value!r}; use the same flags, or another --checkpoint-dir"
            )
    return content


def write_json(path, content: dict):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def provenance(device: torch.device) -> dict:
    """What a reader needs to judge a number: memory, hardware, versions, commit, date."""
    here = pathlib.Path(__file__).parent
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        git = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    # ru_maxrss is in KiB on Linux and in bytes on a Mac
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        name = f"{device.type}, {torch.get_num_threads()} threads, {_cpu_name()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"peak_memory_bytes": peak, "device": name, "versions": versions, "commit": commit, "date": date}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
