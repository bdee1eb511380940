"""Train the original model on D_tr and the gold model on D_r (METAUNLEARN App. A; LTU Sec. 4.1 with SalUn's recipe).

Usage:
    python train.py                                        # toy faces, both models, half a minute on two CPU cores
    python train.py --dataset celebahq --ids 20            # METAUNLEARN's recipe: ViT-B/16, 30 epochs
    python train.py --dataset cifar10 --forget-ratio 0.5   # LTU's: ResNet-18, 182 epochs
    torchrun --nproc-per-node 4 train.py --dataset celeba --ids 10

The gold model ("Retrained") is built from its constructor and trained by the same recipe on D_r alone. The epoch with the
best validation score is kept; the test set plays no part. The Support set is in neither training set.

Departures from the authors' code: the cosine runs per iteration down to 0 (theirs: per epoch, ends at 1.1e-5).
"""

import math
import pathlib
import time

import torch

from common import (
    Parser,
    add_shared_arguments,
    autocast,
    build_model,
    check_ranges,
    check_writable,
    choose_device,
    fail,
    generator,
    load_checkpoint,
    parse_with_presets,
    predict,
    rank_and_world,
    save_checkpoint,
    say,
    score,
    start_processes,
    stop_processes,
    task_losses,
    wait_for_all,
)
from data import augment, describe, draw_augmentation, load, make_split, raw_batch, setting, targets_of

# What --dataset brings along; a flag on the command line wins. celeba, celebahq: paper App. A (batch size: authors' code);
# cifar10, cifar100: SalUn's recipe, which LTU compares with. digits: 60 epochs to RA 100 %, so the last epoch is kept: the best
# one by (noisy) validation labels would be one that has not memorised the flipped labels yet.
_PAPER = dict(model="vit_base_patch16_224", init="pretrained", image_size=224, epochs=30, optimizer="sgd", lr=1e-3, batch_size=32)
_SALUN = dict(forget="random", optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
_PLAIN = dict(augment="none", keep="last")
PRESETS = {
    "toyfaces": dict(ids=10, epochs=50, crop_scale=0.8),
    "celebahq": dict(_PAPER, ids=20, weight_decay=1e-3, warmup_epochs=2, crop_scale=0.08),
    "celeba": dict(_PAPER, ids=5, weight_decay=1e-4, warmup_epochs=2, crop_scale=0.08),
    "qmnist": dict(ids=20, epochs=10),
    "digits": dict(_SALUN, warmup_epochs=1, image_size=8, model="toy_resnet", label_noise=0.1, epochs=60, batch_size=64, **_PLAIN),
    "cifar10": dict(
        _SALUN, warmup_epochs=0, image_size=32, model="resnet18", epochs=182, schedule="milestones", batch_size=256, augment="pad-crop"
    ),
    "tinyimagenet": dict(
        forget="random", image_size=64, model="vit_tiny_patch16_224", epochs=100, lr=5e-4, batch_size=256, warmup_epochs=5
    ),
}
PRESETS["cifar100"] = PRESETS["cifar10"]
RECIPE = (
    *("model", "init", "image_size", "epochs", "optimizer", "lr", "momentum", "weight_decay", "warmup_epochs", "crop_scale"),
    *("batch_size", "amp", "schedule", "augment", "keep"),
)


RECIPE_RANGES = [("epochs", 1, 1e6), ("batch_size", 1, 1e6), ("lr", 1e-12, 1e3), ("momentum", 0, 0.9999), ("weight_decay", 0, 1e3)]
RECIPE_RANGES += [("warmup_epochs", 0, 1e6), ("crop_scale", 0.001, 1)]


def add_recipe_arguments(parser):
    """The flags of the training recipe; their values are saved in the checkpoint and checked when it is loaded."""
    add = parser.add_argument
    add("--epochs", type=int, default=40, help="training epochs; paper: 30")
    add("--optimizer", choices=("sgd", "adamw"), default="adamw", help="paper: sgd")
    add("--lr", type=float, default=2e-3, help="peak learning rate; paper: 1e-3")
    add("--momentum", type=float, default=0.9, help="of sgd; paper: 0.9")
    add("--weight-decay", type=float, default=0.05, help="paper: 1e-3 (CelebA-HQ), 1e-4 (CelebA)")
    add("--warmup-epochs", type=float, default=2, help="epochs of linear warm-up before the cosine; paper: 2")
    add(
        "--crop-scale", type=float, default=0.7, help="smallest share of the image's area in RandomResizedCrop; torchvision's default: 0.08"
    )
    add(
        "--schedule",
        choices=("cosine", "milestones"),
        default="cosine",
        help="after warm-up: cosine to 0, or a tenth at 1/2 and 3/4 (SalUn)",
    )
    add(
        "--augment",
        choices=("resized-crop", "pad-crop", "none"),
        default="resized-crop",
        help="flip included; paper: resized-crop, SalUn: pad-crop",
    )
    add("--keep", choices=("best", "last"), default="best", help="epoch kept: best by validation (both papers) or last")
    add("--batch-size", type=int, default=64, help="images an optimiser step, over all processes; authors' code: 32")


def checkpoint_folder(args) -> pathlib.Path:
    """One folder for one model and split: the original, the gold model and every method's checkpoints."""
    name = f"{pathlib.Path(args.dataset).name}-{args.image_size}-{args.model}"
    return pathlib.Path(args.checkpoint_dir) / name / setting(args)


def learning_rate(step: int, steps_per_epoch: int, args) -> float:
    """Linear warm-up over --warmup-epochs, then cosine to 0, or a tenth at 1/2 and 3/4 of the epochs; step counts from 0."""
    warmup, total = round(args.warmup_epochs * steps_per_epoch), args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "milestones":
        return args.lr * 0.1 ** sum(step >= share * args.epochs // 1 * steps_per_epoch for share in (0.5, 0.75))
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train(which: str, data: dict, split: dict, args, ledger=False):
    """Return (model, seconds its training took, now or when it was made) of `which`, "original" (on D_tr) or "gold" (on D_r): loaded, else trained.

    Resumes from the last finished epoch with --resume. Under torchrun each process takes its share of every batch, and
    the result is that of one process but for rounding and batch-norm statistics. Raises SystemExit(2) for a checkpoint of another split or
    recipe, and when the loss is no longer finite. ledger: train again and record, as model.ledger {name: tensor}, the sum of all
    updates whose batch held an image of D_f (Graves et al. 2021, for Amnesiac unlearning); kept in a file of its own.
    """
    assert which in ("original", "gold"), which
    device, (rank, world) = data["device"], rank_and_world()
    path = checkpoint_folder(args) / f"{which}{'-ledger' * ledger}-seed{args.seed}.pt"
    partial = path.with_suffix(".partial.pt")
    identity = {"which": which, "split": split["hash"], "seed": args.seed, "target_names": [str(n) for n in data["target_names"]]}
    identity |= {f"--{key.replace('_', '-')}": getattr(args, key) for key in RECIPE}
    # A seed of its own, so that the gold model does not even share its initial weights with the original.
    seed = 2 * args.seed + (which == "gold")
    model = build_model(args.model, data["classes"], args.image_size, "none" if path.is_file() else args.init, seed).to(device)
    if path.is_file():
        saved = load_checkpoint(path, "model", **identity)
        say(f"{which}: loaded {path} (validation {100 * saved['best']:.1f})")
        model.load_state_dict(saved["model"])
        model.ledger = saved.get("ledger")
        return model.eval(), saved["seconds"]

    chosen = split["retain"] + split["forget"] if which == "original" else split["retain"]
    chosen = torch.tensor(sorted(chosen))
    if len(chosen) < args.batch_size and not args.dry_run:
        fail(f"{which}: {len(chosen)} training images are fewer than a batch; lower --batch-size ({args.batch_size}) or forget less")
    val_targets = data["targets"][split["val"]]
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    first_epoch, best, best_state, seconds = 0, -1.0, None, 0.0
    recorded = {k: torch.zeros_like(p) for k, p in model.named_parameters()} if ledger else None
    best_ledger, forget = None, torch.tensor(split["forget"])
    if args.resume and partial.is_file():
        saved = load_checkpoint(partial, "partial model", **identity)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch, best, best_state, seconds = (saved["epoch"] + 1, saved["best"], saved["best_state"], saved["seconds"])
        best_ledger = saved["best_ledger"]
        recorded = {k: t.to(device) for k, t in saved["recorded"].items()} if ledger else None
        say(f"{which}: resuming after epoch {first_epoch}")
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    steps = max(1, math.ceil(len(chosen) / args.batch_size))
    if len(chosen) % args.batch_size and len(chosen) % args.batch_size < world:
        steps = max(1, steps - 1)  # a last batch with fewer images than processes is left out
    epochs = 1 if args.dry_run else args.epochs
    for epoch in range(first_epoch, epochs):
        begin, total_loss = time.time(), 0.0
        rng = generator(seed, epoch)  # order and crops depend on seed and epoch alone: resuming equals never stopping
        order = chosen[torch.randperm(len(chosen), generator=rng)]
        model.train()
        for step in range(min(2, steps) if args.dry_run else steps):
            batch = order[step * args.batch_size : (step + 1) * args.batch_size]
            drawn, own = draw_augmentation(len(batch), args, rng)[rank::world], batch[rank::world]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps + step, steps, args)
            images = augment(raw_batch(data, own), drawn)  # outside autocast, which would round a crop's grid to bf16
            with autocast(device, args.amp):
                _, logits = wrapped(images)
            # DistributedDataParallel averages over processes: scale a share's sum so that the result is the batch's mean.
            loss = task_losses(logits.float(), targets_of(data, own)).sum() * world / len(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            before = {k: p.detach().clone() for k, p in model.named_parameters()} if ledger and torch.isin(batch, forget).any() else {}
            optimizer.step()
            for k, p in model.named_parameters() if before else ():
                recorded[k] += p.detach() - before[k]
            total_loss += loss.item()
        if not math.isfinite(total_loss):
            fail(f"{which}: the loss is no longer finite in epoch {epoch + 1}; lower --lr (now {args.lr})")
        val_score = score(predict(model, lambda i: raw_batch(data, i), split["val"], device, args.amp), val_targets)
        if val_score > best or args.keep == "last":
            best, best_state = val_score, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            best_ledger = {k: t.cpu().clone() for k, t in recorded.items()} if ledger else None
        seconds += time.time() - begin
        left = (epochs - epoch - 1) * (time.time() - begin)
        say(
            f"{which} epoch {epoch + 1}/{epochs}: loss {total_loss / (step + 1):.4f}, validation {100 * val_score:.1f} "
            f"(best {100 * best:.1f}), {time.time() - begin:.1f} s, {left:.0f} s left"
        )
        if rank == 0 and epoch + 1 < epochs:
            progress = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch, best_state=best_state, seconds=seconds)
            progress |= dict(recorded=recorded, best_ledger=best_ledger)
            save_checkpoint(partial, kind="partial model", best=best, **progress, **identity)
    if rank == 0:
        content = dict(model=best_state, best=best, seconds=seconds, indices=split, ledger=best_ledger)
        save_checkpoint(path, kind="model", **content, **identity)
        partial.unlink(missing_ok=True)
    wait_for_all()
    if world > 1:  # batch-norm statistics are each process's own: all go on with what the first one saved
        best_state = load_checkpoint(path, "model", **identity)["model"]
    model.load_state_dict(best_state)
    model.ledger = best_ledger
    return model.eval(), seconds


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add_shared_arguments(parser)
    add_recipe_arguments(parser)
    parser.add_argument("--which", choices=("original", "gold", "both"), default="both", help="the model to train")
    args = parse_with_presets(parser, PRESETS, argv)
    check_ranges(args, RECIPE_RANGES)
    return args


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args)
    start_processes(device)
    check_writable(args.checkpoint_dir)
    data = load(args, device)
    split = make_split(data, args)
    say(describe(data, split))
    for which in ("original", "gold") if args.which == "both" else (args.which,):
        model, _ = train(which, data, split, args)
        sets = {name: predict(model, lambda i: raw_batch(data, i), split[name], device, args.amp) for name in ("retain", "forget")}
        say(f"{which}:", ", ".join(f"{name} {100 * score(logits, data['targets'][split[name]]):.1f}" for name, logits in sets.items()))
    stop_processes()


if __name__ == "__main__":
    main()
