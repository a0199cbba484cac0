"""Trains pix2pix: Isola et al. 2017, Image-to-Image Translation with Conditional Adversarial Nets,
https://arxiv.org/abs/1611.07004. Grids and losses appear in visualize/pix2pix/<run-name>/.

    python pix2pix/train.py --data-folder facades --save-model         # the paper's facades
    python pix2pix/train.py --data-folder facades --resume             # goes on where it stopped
"""

import argparse
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------- flags


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float from low to high."""

    def convert(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is outside {low} to {high}")
        return value

    convert.__name__ = kind.__name__  # argparse then says "invalid int value"
    return convert


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_common_flags(parser, epochs):
    """The flags that pix2pix, cycleGAN and CUT share. epochs: the method's default."""
    switch = argparse.BooleanOptionalAction
    count, positive = number(int, 1), number(float, 1e-12)
    data = parser.add_argument_group("data").add_argument
    data("--data-folder", default="facades", help="name of the data set [%(default)s]")
    data("--data-root", default=str(ROOT / "datasets"), help="where data sets are [%(default)s]")
    data("--swap-xy", action="store_true", help="exchange x, the input, and y, the target [off]")
    data("--load-size", type=count, default=286, help="pixels resized to before the crop [286]")
    data("--image-size", type=count, default=256, help="pixels trained at [256]")
    data("--jitter", action=switch, default=True, help="resize to --load-size, crop [on]")
    data("--flip", action=switch, default=True, help="mirror a random half of the pictures [on]")
    data("--num-workers", type=number(int, 0), default=2, help="loading processes; 0: none [2]")
    kept = "decode each picture once, keep all, resized, in memory [on where they fit]"
    data("--cache", action=switch, default=None, help=kept)

    training = parser.add_argument_group("training").add_argument
    training("--epochs", type=count, default=epochs, help="passes over the data [%(default)s]")
    training("--batch-size", type=count, default=1, help="pictures a step [1]")
    training("--lr", type=positive, default=2e-4, help="Adam's learning rate at first [2e-4]")
    training("--ngf", type=count, default=64, help="filters of the generator's first layer [64]")
    training("--ndf", type=count, default=64, help="filters of the discriminator's first [64]")
    training("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of every random draw [0]")
    training("--max-steps", type=count, help="stop once this many steps are done in all [off]")

    run = parser.add_argument_group("run").add_argument
    run("--run-name", help="name of the folder for grids and checkpoint [--data-folder's]")
    run("--sample-every", type=count, default=10, help="epochs between grids, checkpoints [10]")
    run("--save-model", action="store_true", help="keep model/<run-name>/checkpoint.pt [off]")
    run("--resume", action="store_true", help="go on from the checkpoint, with its flags [off]")
    run("--overwrite", action="store_true", help="delete the run of this name, start anew [off]")
    run("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    kinds = ["auto", "fp32", "tf32", "bf16"]
    arithmetic = "of convolutions; auto: bf16 on a CPU that is faster in it, else fp32 [auto]"
    run("--precision", choices=kinds, default="auto", help=arithmetic)
    run("--compile", action="store_true", help="torch.compile: slow start, fast steps [off]")


def check_common_flags(parser, args, argv):
    """Cross-checks, the default of --run-name, and args.given: which flags the user typed."""
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    typed = vars(parser.parse_args(argv, unset))
    args.given = sorted(name for name, value in typed.items() if value is not None)
    args.data_root = str(Path(args.data_root).expanduser().resolve())
    args.run_name = args.run_name or Path(args.data_folder).name
    plain = Path(args.run_name).name == args.run_name
    if not plain or args.run_name[:1] in ("", "."):
        parser.error(f"--run-name {args.run_name} is not a plain folder name")
    if args.jitter and args.load_size < args.image_size and not args.resume:
        sizes = f"--load-size {args.load_size} is below --image-size {args.image_size}"
        parser.error(f"{sizes}: raise it, or give --no-jitter")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite deletes it: give one of them")


def parse_args(argv=None):
    """The flags of pix2pix."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("train.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    add_common_flags(parser, epochs=200)
    method = parser.add_argument_group("pix2pix").add_argument
    method("--l1-ratio", type=number(float, 0), default=100.0, help="weight of L1; 0: none [100]")
    args = parser.parse_args(argv)
    check_common_flags(parser, args, argv)
    if args.resume:
        return args  # the flags that count are the checkpoint's; they were checked then
    if args.image_size < 32 or args.image_size & (args.image_size - 1):
        wanted = "the U-Net halves it down to one pixel: 32, 64, 128, 256, 512, ..."
        parser.error(f"--image-size {args.image_size}: {wanted}")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch takes its seconds to load

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss
from tqdm import tqdm

from pix2pix_dataset import PairDataset, RunError, list_images, to_unit
from pix2pix_model import PatchDiscriminator, UNetGenerator, initialize_weights
from pix2pix_run import (
    LossLog,
    StopSignal,
    adam,
    adopt_flags,
    announce,
    append_losses,
    average_gradients,
    build_loader,
    check_ranks,
    end_loading,
    join_ranks,
    load_checkpoint,
    open_run,
    pick_device,
    prepare,
    random_states,
    ranks,
    run_paths,
    save_checkpoint,
    save_grid,
    say_how_it_ended,
    set_random_states,
)

# ---------------------------------------------------------------------------------- the equations


def gan_loss(logits, real):
    """-log D where `real`, else -log(1 - D); D = sigmoid(logits), logits (N, 1, h, w). A scalar."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def losses_D(D, x, y, fake_y):
    """What D minimizes, D_total, and its terms. x, y, fake_y = G(x): (N, 3, H, W)."""
    D_real = gan_loss(D(x, y), True)  # Eq. 1: log D(x, y)
    D_fake = gan_loss(D(x, fake_y), False)  # Eq. 1: log(1 - D(x, G(x)))
    return {"D_total": (D_real + D_fake) / 2, "D_real": D_real, "D_fake": D_fake}


def losses_G(D, x, y, fake_y, l1_ratio):
    """What G minimizes, G_total, and its terms. x, y, fake_y = G(x): (N, 3, H, W)."""
    G_gan = gan_loss(D(x, fake_y), True)  # Eq. 1, as -log D(x, G(x)), see section 3.3
    G_l1 = l1_loss(fake_y, y)  # Eq. 3
    return {"G_total": G_gan + l1_ratio * G_l1, "G_gan": G_gan, "G_l1": G_l1}  # Eq. 4


def training_step(nets, x, y, args):
    """One step of D, then one of G. x, y: (N, 3, H, W) in [-1, 1]. Returns the named losses."""
    G, D = nets["G"], nets["D"]
    fake_y = G(x)

    d = losses_D(D, x, y, fake_y.detach())
    descend(d["D_total"], nets["optimizer_D"])

    g = losses_G(D, x, y, fake_y, args.l1_ratio)
    descend(g["G_total"], nets["optimizer_G"])
    return {**g, **d}


def descend(loss, *optimizers):
    """One step of each. The gradient goes to these optimizers' parameters and to no others."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for optimizer in optimizers:
        optimizer.zero_grad()
    parameters = [p for group in groups for p in group["params"]]
    loss.backward(inputs=parameters)
    average_gradients(parameters)
    for optimizer in optimizers:
        optimizer.step()


def lr_factor(epoch, epochs, decay):
    """1; over the last `decay` of `epochs` epochs down in equal steps, to 0 just after the end."""
    return 1 - max(0, epoch - (epochs - decay)) / (decay + 1)


def decay_epochs(args):
    """How many epochs at the end the learning rate falls over."""
    # Paper and authors' Lua code: none. Authors' PyTorch code: the second half. Here: the latter.
    return args.epochs // 2


# ------------------------------------------------------------------- what pix2pix builds and shows


def build(args, device):
    """Networks and optimizers by name: what `training_step` works on and the checkpoint holds."""
    G = prepare(initialize_weights(UNetGenerator(args.image_size, args.ngf)), args, device)
    D = prepare(initialize_weights(PatchDiscriminator(args.ndf)), args, device)
    return {"G": G, "D": D, "optimizer_G": adam(args, G), "optimizer_D": adam(args, D)}


def build_data(args):
    """The pairs to train on, and those to look at: test/, or val/ where there is no test/."""
    root, name, size = Path(args.data_root), args.data_folder, args.image_size
    load_size = args.load_size if args.jitter else size
    drawn = {"flip": args.flip, "seed": args.seed, "cache": args.cache}
    train_set = PairDataset(root, name, "train", load_size, size, args.swap_xy, **drawn)
    only_val = list_images(root / name / "val") and not list_images(root / name / "test")
    split = "val" if only_val else "test"
    return train_set, PairDataset(root, name, split, size, size, args.swap_xy)


@torch.no_grad()
def translate(G, x):
    """G(x) for one picture, x: (1, 3, H, W) in [-1, 1], whatever state the generators are in."""
    # Paper 3.3: at test time, too, dropout is on and batch norm takes the statistics of the test
    # batch. Here: likewise, but always with a batch of one and the same dropout, so that a result
    # depends on its picture alone.
    states = random_states(x.device)
    torch.manual_seed(0)
    fake_y = G(x)
    set_random_states(states, x.device)
    return fake_y


def sample(nets, test_set, folder, progress, device):
    """Writes the grids of the first eight test pictures. Returns the mean |G(x) - y| of all."""
    grids, l1 = {"x": [], "y": [], "y_G": []}, 0.0
    for index in tqdm(range(len(test_set)), desc="test", unit="img", leave=False):
        x, y = (half[None].to(device) for half in test_set[0, index])
        fake_y = translate(nets["G"], x)
        l1 += l1_loss(fake_y, y).item() / len(test_set)
        if index < 8:
            for images, image in zip(grids.values(), (x, y, fake_y), strict=True):
                images.append(image)
    for name, images in grids.items():
        save_grid(images, folder / f"{name}{progress['epoch']}.png")
    return {"test_l1": l1}


# ----------------------------------------------------------------------------------------- the run


def train_epoch(args, nets, loader, progress, stop, device):
    """Runs what is left of epoch progress["epoch"], or until --max-steps or a signal."""
    loader.batch_sampler.start(progress["epoch"], progress["batch"])
    log, started = LossLog(progress), time.monotonic() - progress["seconds"]
    title = f"epoch {progress['epoch']}/{args.epochs}"
    rank, number = ranks()
    whole = {"total": loader.batch_sampler.length, "initial": progress["images"]}
    with tqdm(desc=title, unit="img", **whole, disable=rank > 0) as bar:
        for batch in loader:
            batch = [to_unit(pixels.to(device, non_blocking=True)) for pixels in batch]
            log.add(training_step(nets, *batch, args))
            progress["step"] += 1
            progress["batch"] += 1
            progress["images"] += number * len(batch[0])
            bar.update(number * len(batch[0]))
            ending = stop.agree() or progress["step"] == args.max_steps
            complete = progress["batch"] == len(loader)
            if ending or complete or time.monotonic() - log.last_read > 0.5:
                log.read()
                bar.set_postfix({name: f"{value:.3f}" for name, value in log.smooth.items()})
            if ending:
                break
    progress["seconds"] = time.monotonic() - started


def train(args):
    """The whole run. Returns the number of the signal that ended it, or None."""
    device = pick_device(args)
    join_ranks(args, device)
    rank = ranks()[0]
    torch.manual_seed(args.seed)
    train_set, test_set = build_data(args)
    nets = build(args, device)
    if rank:  # number 0 draws what it would draw alone, the others something else
        torch.manual_seed(args.seed + rank)
    progress = {"epoch": 1, "batch": 0, "step": 0, "images": 0, "seconds": 0.0, "sums": {}}
    progress["files"] = len(train_set.files)
    folder, checkpoint = run_paths(args)
    if args.resume:
        load_checkpoint(checkpoint, nets, progress, device)
    check_ranks(args, nets, train_set)
    if rank == 0:
        open_run(args, folder, checkpoint, progress, device)
        announce(args, nets, train_set, test_set, folder, device)
    loader = build_loader(args, train_set, device)
    max_steps, caught = args.max_steps or math.inf, None
    with StopSignal() as stop:
        while progress["epoch"] <= args.epochs and progress["step"] < max_steps:
            epoch = progress["epoch"]
            rate = args.lr * lr_factor(epoch, args.epochs, decay_epochs(args))
            set_learning_rate(nets, rate)
            train_epoch(args, nets, loader, progress, stop, device)
            complete = progress["batch"] == len(loader)
            limit = progress["step"] == max_steps
            due = complete and ((epoch - 1) % args.sample_every == 0 or epoch == args.epochs)
            measured = {}
            if rank == 0 and (due or limit):
                try:
                    measured = sample(nets, test_set, folder / "val", progress, device)
                except RunError:  # a test picture cannot be read; the epoch must not be lost
                    stop.agree()  # as the other processes do now
                    if args.save_model:
                        save_checkpoint(checkpoint, args, nets, progress, device)
                    raise
            if rank == 0 and (complete or limit):
                append_losses(folder, progress, rate, measured)
            if complete:
                progress.update(epoch=epoch + 1, batch=0, images=0, seconds=0.0, sums={})
            caught = stop.agree()
            if args.save_model and (due or limit or caught):
                save_checkpoint(checkpoint, args, nets, progress, device)
            if caught:
                break
    if rank == 0:
        say_how_it_ended(args, progress)
    return caught


def set_learning_rate(nets, rate):
    """Gives every optimizer among nets this learning rate."""
    for part in nets.values():
        for group in getattr(part, "param_groups", []):
            group["lr"] = rate


def main(argv=None):
    """Runs the command line. Returns the exit status."""
    args = parse_args(argv)
    try:
        caught = train(adopt_flags(args) if args.resume else args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (RunError, OSError) as error:
        # From a loading process an error comes with its traceback; the last line is the message.
        message = str(error).strip().splitlines()[-1].split("RunError: ")[-1]
        print(f"train.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first epoch
        return 130
    finally:
        end_loading()
    return 128 + caught if caught else 0


if __name__ == "__main__":
    sys.exit(main())
