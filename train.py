"""Train the original model on D_tr and the gold model on D_r (METAUNLEARN App. A; LTU Sec. 4.1).

Usage:
    python train.py                                        # drawn faces, both models, on a CPU
    python train.py --dataset celebahq --ids 20            # METAUNLEARN: ViT-B/16, 30 epochs
    python train.py --dataset cifar10 --forget-ratio 0.5   # LTU: ResNet-18, 182 epochs
    torchrun --nproc-per-node 4 train.py --dataset celeba --ids 10

The gold model ("Retrained") is built anew, by --init, and trained by the same recipe on D_r alone.
The epoch with the best validation score is kept, or with --keep last the last one; the test set
plays no part. The Support set is in neither training set.

Departure from the authors' code: the cosine runs per iteration down to 0 (theirs: per epoch, to
1.1e-5).
"""

import math
import pathlib

import torch

import common
from common import autocast, build_model, fail, generator, rank_and_world, say, score, task_losses
from data import PRESETS as DATA_PRESETS
from data import (
    augment,
    batches,
    describe,
    draw_augmentation,
    load,
    make_split,
    predict,
    raw_batch,
    setting,
    targets_of,
)

# The recipe that --dataset brings along; a flag on the command line wins. celeba, celebahq:
# METAUNLEARN App. A (batch size: authors' code); cifar10, cifar100: SalUn's recipe, which LTU
# compares with. digits: 60 epochs to RA 100 %, and the last epoch is kept: the best one by (noisy)
# validation labels would be one that has not memorised the flipped labels yet.
_PAPER = dict(model="vit_base_patch16_224", init="pretrained", epochs=30)
_PAPER |= dict(optimizer="sgd", lr=1e-3, batch_size=32, warmup_epochs=2, crop_scale=0.08)
_SALUN = dict(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
_DIGITS = dict(_SALUN, model="toy_resnet", epochs=60, batch_size=64, warmup_epochs=1)
_CIFAR = dict(_SALUN, model="resnet18", epochs=182, batch_size=256, schedule="milestones")
_CIFAR |= dict(warmup_epochs=0, augment="pad-crop")
_TINY = dict(model="vit_tiny_patch16_224", epochs=100, lr=5e-4, batch_size=256, warmup_epochs=5)
_RECIPES = {
    "toyfaces": dict(epochs=50, crop_scale=0.8),
    "celebahq": dict(_PAPER, weight_decay=1e-3),
    "celeba": dict(_PAPER, weight_decay=1e-4),
    "qmnist": dict(epochs=10),
    "digits": dict(_DIGITS, augment="none", keep="last"),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tinyimagenet": _TINY,
}
PRESETS = {name: DATA_PRESETS[name] | recipe for name, recipe in _RECIPES.items()}
# The flags on which a trained model depends: saved in its checkpoint, and checked on loading.
RECIPE = ("model", "init", "image_size", "epochs", "optimizer", "lr", "momentum", "weight_decay")
RECIPE += ("warmup_epochs", "crop_scale", "batch_size", "amp", "schedule", "augment", "keep")
RECIPE += ("plain_epochs",)


def add_recipe_arguments(parser):
    """The flags of the training recipe."""
    add = parser.add_argument_group("training of the original and the gold model").add_argument
    # fmt: off
    add("--model", default="toy_vit",
        help="toy_vit, toy_resnet, resnet18, resnet18_w16 (16 channels, not 64), or any timm model")
    add("--init", default="none", help="none, pretrained (timm's hub), or FILE; paper: pretrained")
    add("--epochs", type=common.count, default=40, help="training epochs; paper: 30")
    add("--optimizer", choices=("sgd", "adamw"), default="adamw", help="paper: sgd")
    add("--lr", type=common.positive, default=2e-3, help="peak learning rate; paper: 1e-3")
    add("--momentum", type=common.between(0, 0.9999), default=0.9, help="of sgd; paper: 0.9")
    add("--weight-decay", type=common.not_negative, default=0.05, help="paper: 1e-3 (HQ), 1e-4")
    add("--warmup-epochs", type=common.not_negative, default=2, help="linear warm-up; paper: 2")
    add("--crop-scale", type=common.between(0.001, 1), default=0.7,
        help="smallest share of the area in a random crop; torchvision: 0.08")
    add("--schedule", choices=("cosine", "milestones"), default="cosine",
        help="cosine to 0, or a tenth at 1/2 and 3/4 (SalUn)")
    add("--augment", choices=("resized-crop", "pad-crop", "none"), default="resized-crop",
        help="with flips; paper: resized-crop, SalUn: pad-crop")
    add("--plain-epochs", type=common.whole, default=0,
        help="so many last epochs without --augment, to fit the images as they are; unlearning "
        "does not augment them then either; papers: 0")
    add("--keep", choices=("best", "last"), default="best", help="papers: best by validation")
    add("--batch-size", type=common.count, default=64,
        help="images a step, over all processes; authors' code: 32")
    # fmt: on


def checkpoint_folder(args) -> pathlib.Path:
    """The folder of one model and split, where the checkpoints of every method lie."""
    name = f"{pathlib.Path(args.dataset).name}-{args.image_size}-{args.model}"
    return pathlib.Path(args.checkpoint_dir) / name / setting(args)


def learning_rate(step: int, steps_per_epoch: int, args) -> float:
    """Rate of a step, counted from 0: a linear warm-up, then --schedule."""
    warmup, total = round(args.warmup_epochs * steps_per_epoch), args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "milestones":
        passed = sum(step >= int(part * args.epochs) * steps_per_epoch for part in (0.5, 0.75))
        return args.lr * 0.1**passed
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train(which: str, data: dict, split: dict, args):
    """Train or load the model `which`, "original" (on D_tr) or "gold" (on D_r); also its seconds.

    With --resume training goes on after the last epoch that was kept, of which there is at most one
    a minute. Under torchrun each process takes its share of every batch, and the result is that of
    one process but for rounding, batch-norm statistics and a last batch with fewer images than
    processes, which joins the one before. Raises SystemExit(2) for a checkpoint of another split or
    recipe, and when the loss is no longer finite.
    """
    assert which in ("original", "gold"), which
    device, (rank, world) = data["device"], rank_and_world()
    path = checkpoint_folder(args) / f"{which}-seed{args.seed}.pt"
    partial = path.with_suffix(".partial.pt")
    identity = recipe_of(which, data, split, args)
    # A seed of its own: what --init does not set, gold does not share with the original either.
    seed = 2 * args.seed + (which == "gold")
    init = "none" if path.is_file() else args.init
    model = build_model(args.model, data["classes"], args.image_size, init, seed).to(device)
    if path.is_file():
        saved = common.load_checkpoint(path, "model", **identity)
        with common.reading(path):
            say(f"{which}: loaded {path} (validation {100 * saved['best']:.1f})")
            model.load_state_dict(saved["model"])
            return model.eval(), float(saved["seconds"])

    chosen = split["retain"] + split["forget"] if which == "original" else split["retain"]
    chosen = torch.tensor(sorted(chosen))
    if args.amp:  # faster convolutions; in float32 it would change rounding for next to nothing
        model.to(memory_format=torch.channels_last)
    optimizer = new_optimizer(model, args)
    epochs, done = 1 if args.dry_run else args.epochs, 0
    kept = {"best": -1.0, "best_state": None, "seconds": 0.0}
    if args.resume and partial.is_file():
        saved = common.load_checkpoint(partial, "partial model", **identity)
        with common.reading(partial):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            kept, done = {key: saved[key] for key in kept}, saved["epoch"] + 1
        say(f"{which}: resuming after epoch {done}")
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    saved_at = common.clock(device)
    for epoch in range(done, epochs):
        begin = common.clock(device)
        loss = train_epoch(wrapped, optimizer, data, chosen, epoch, seed, args)
        if not math.isfinite(loss):
            fail(f"{which}: the loss is not finite in epoch {epoch + 1}; lower --lr ({args.lr})")
        value = score(predict(model, data, split["val"], args.amp), data["targets"][split["val"]])
        if value > kept["best"] or args.keep == "last":
            state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            kept |= {"best": value, "best_state": state}
        now = common.clock(device)
        took = now - begin
        kept["seconds"] += took
        say(
            f"{which} epoch {epoch + 1}/{epochs}: loss {loss:.4f}, validation {100 * value:.1f} "
            f"(kept {100 * kept['best']:.1f}), {took:.1f} s, "
            f"{(epochs - epoch - 1) * took:.0f} s left"
        )
        if rank == 0 and epoch + 1 < epochs and now - saved_at >= common.PARTIAL_EVERY:
            progress = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch)
            common.save_checkpoint(partial, kind="partial model", **progress, **kept, **identity)
            saved_at = now
    if rank == 0:
        content = dict(model=kept["best_state"], best=kept["best"], seconds=kept["seconds"])
        content |= dict(architecture=args.model, image_size=args.image_size, indices=split)
        common.save_checkpoint(path, kind="model", **content, **identity)
        partial.unlink(missing_ok=True)
    common.wait_for_all()
    if world > 1:  # batch-norm statistics are each process's own: all take the first one's
        kept["best_state"] = common.load_checkpoint(path, "model", **identity)["model"]
    model.load_state_dict(kept["best_state"])
    return model.to(memory_format=torch.contiguous_format).eval(), kept["seconds"]


def recipe_of(which: str, data, split, args) -> dict:
    """What distinguishes this model from others: it is saved with it, and checked on loading."""
    identity = {"which": which, "split": split["hash"], "seed": args.seed}
    identity |= {"target_names": [str(name) for name in data["target_names"]]}
    return identity | {common.flag_name(key): getattr(args, key) for key in RECIPE}


def new_optimizer(model, args):
    if args.optimizer == "sgd":
        momentum_and_decay = dict(momentum=args.momentum, weight_decay=args.weight_decay)
        return torch.optim.SGD(model.parameters(), args.lr, **momentum_and_decay)
    return torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)


def train_epoch(model, optimizer, data, chosen, epoch: int, seed: int, args) -> float:
    """One pass over the images `chosen`; returns the mean loss of its steps.

    Order, crops and dropout depend on seed and epoch alone, so that resuming equals never having
    stopped.
    """
    device, (rank, world) = data["device"], rank_and_world()
    rng = generator(seed, epoch)
    torch.manual_seed(generator(seed, epoch, 17, rank).initial_seed())  # dropout: timm's models
    parts, total = batches(chosen, args.batch_size, rng, max(2, world)), 0.0
    steps = len(parts)
    taken = min(2, steps) if args.dry_run else steps
    model.train()
    for step, batch in enumerate(parts[:taken]):
        drawn, own = draw_augmentation(len(batch), args, rng)[rank::world], batch[rank::world]
        if epoch >= args.epochs - args.plain_epochs:
            drawn = drawn.new_zeros(len(own), 0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch * steps + step, steps, args)
        # Outside autocast, which would round a crop's grid to bf16.
        images = augment(raw_batch(data, own), drawn)
        with autocast(device, args.amp):
            _, logits = model(images)  # (B, K)
        # DistributedDataParallel averages over processes: a share's sum times their number over
        # the batch's size gives the batch's mean.
        loss = task_losses(logits.float(), targets_of(data, own)).sum() * world / len(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / taken


def open_data(args, device) -> tuple[dict, dict]:
    """The data and its split, with which every script starts."""
    data = load(args, device)
    split = make_split(data, args)
    say(describe(data, split))
    if len(split["retain"]) < args.batch_size and not args.dry_run:
        advice = f"lower --batch-size ({args.batch_size}) or forget less"
        fail(f"D_r has {len(split['retain'])} training images, fewer than a batch; {advice}")
    return data, split


def train_both(data, split, args) -> tuple:
    """(original model, gold model, {train, retrain: seconds}), with which every method starts."""
    model, train_seconds = train("original", data, split, args)
    gold, retrain_seconds = train("gold", data, split, args)
    return model, gold, {"train": train_seconds, "retrain": retrain_seconds}


def parse_args(argv=None):
    parser = common.Parser(description=__doc__)
    which = ("original", "gold", "both")
    parser.add_argument("--which", choices=which, default="both", help="the model to train")
    common.add_shared_arguments(parser)
    add_recipe_arguments(parser)
    return common.parse_with_presets(parser, PRESETS, argv)


def main(argv=None):
    args = parse_args(argv)
    device = common.choose_device(args)
    common.start_processes(device)
    common.check_writable(args.checkpoint_dir)
    data, split = open_data(args, device)
    for which in ("original", "gold") if args.which == "both" else (args.which,):
        model, _ = train(which, data, split, args)
        found = {name: predict(model, data, split[name], args.amp) for name in ("retain", "forget")}
        scores = {name: 100 * score(z, data["targets"][split[name]]) for name, z in found.items()}
        say(f"{which}:", ", ".join(f"{name} {value:.1f}" for name, value in scores.items()))


if __name__ == "__main__":
    common.guarded(main)
