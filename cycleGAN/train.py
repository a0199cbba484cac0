"""Trains CycleGAN: Zhu et al. 2017, Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks, https://arxiv.org/abs/1703.10593. Grids and losses appear in
visualize/cycleGAN/<run-name>/.

    python cycleGAN/train.py --data-folder facades_unpaired --save-model
    python cycleGAN/train.py --data-folder monet2photo --pix-loss --save-model
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


# Differs from pix2pix/train.py: the method's own flags
def parse_args(argv=None):
    """The flags of cycleGAN."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("train.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    add_common_flags(parser, epochs=200)
    ratio, count, size = number(float, 0), number(int, 1), number(int, 0)
    method = parser.add_argument_group("cycleGAN").add_argument
    method("--n-layers", type=count, default=9, help="residual blocks of a generator [9]")
    method("--antialias", action="store_true", help="blur before sampling down, after up [off]")
    method("--buffer-size", type=size, default=50, help="pictures kept for D; 0: none [50]")
    method("--cycle-ratio", type=ratio, default=10.0, help="weight of Eq. 2; 0: none [10]")
    method("--identity-ratio", type=ratio, default=0.0, help="weight of |G(y) - y|; authors: 5 [0]")
    method("--pix-loss", action="store_true", help="keep G(x) near x, pixel by pixel [off]")
    method("--pix-ratio", type=ratio, default=5.0, help="weight of --pix-loss; 0: none [5]")
    method("--pix-blur", action="store_true", help="--pix-loss of blurred pictures [off]")
    method("--pix-pool", type=count, default=1, help="--pix-loss of NxN means; 1: of pixels [1]")
    args = parser.parse_args(argv)
    check_common_flags(parser, args, argv)
    if args.resume:
        return args  # the flags that count are the checkpoint's; they were checked then
    if args.image_size < 32 or args.image_size % 4:
        parser.error(f"--image-size {args.image_size}: wanted is a multiple of 4 from 32 on")
    unused = {"pix_ratio", "pix_blur", "pix_pool"} & set(args.given)
    if unused and not args.pix_loss:
        parser.error(f"--{unused.pop().replace('_', '-')} does nothing without --pix-loss")
    if args.image_size % args.pix_pool:
        parser.error(f"--pix-pool {args.pix_pool} does not divide --image-size {args.image_size}")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch takes its seconds to load

import torch
from torch.nn.functional import l1_loss, mse_loss
from tqdm import tqdm

from cycleGAN_dataset import RunError, UnpairedDataset, to_unit
from cycleGAN_model import (
    DownSampler,
    ImageBuffer,
    PatchDiscriminator,
    ResnetGenerator,
    initialize_weights,
)
from cycleGAN_run import (
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
    ranks,
    run_paths,
    save_checkpoint,
    save_grid,
    say_how_it_ended,
)

# ---------------------------------------------------------------------------------- the equations


# Differs from pix2pix/train.py: least squares instead of the logarithm (section 4)
def gan_loss(prediction, real):
    """Mean (D - 1)^2 where `real`, else D^2; prediction (N, 1, h, w). A scalar."""
    return mse_loss(prediction, torch.full_like(prediction, float(real)))


def together(net, *images):
    """net of each of several batches, (N, ...), in one call: the same, as no norm spans a batch."""
    return net(torch.cat(images)).split([len(batch) for batch in images])


# Differs from pix2pix/train.py: two generators and the cycle
def losses_G(G, F, D_X, D_Y, x, y, args):
    """What G and F minimize, G_total, and its terms; also fake_x = F(y) and fake_y = G(x).

    x, y: (N, 3, H, W) in [-1, 1]. G: X -> Y, F: Y -> X. Reads the ratios and --pix-* in args.
    """
    identity = args.identity_ratio > 0
    fake_y, *same_y = together(G, x, y) if identity else [G(x)]
    fake_x, rec_x, *same_x = together(F, y, fake_y, x) if identity else together(F, y, fake_y)
    rec_y = G(fake_x)

    loss = {}
    loss["G_gan"] = gan_loss(D_Y(fake_y), True)  # Eq. 1 for G: X -> Y
    loss["F_gan"] = gan_loss(D_X(fake_x), True)  # Eq. 1 for F: Y -> X
    loss["cycle"] = l1_loss(rec_x, x) + l1_loss(rec_y, y)  # Eq. 2, F(G(x)) = x and G(F(y)) = y
    total = loss["G_gan"] + loss["F_gan"] + args.cycle_ratio * loss["cycle"]  # Eq. 3
    if identity:  # section 5.2: leave a picture of the other side as it is
        loss["identity"] = l1_loss(same_y[0], y) + l1_loss(same_x[0], x)
        total = total + args.identity_ratio * loss["identity"]
    if args.pix_loss:  # not in the paper: leave the colours of the input as they are
        look = DownSampler(args.pix_blur, args.pix_pool)
        loss["pix"] = l1_loss(look(fake_y), look(x)) + l1_loss(look(fake_x), look(y))
        total = total + args.pix_ratio * loss["pix"]
    return {"G_total": total, **loss}, fake_x, fake_y


# Differs from pix2pix/train.py: D looks at one picture, and at real and generated ones in one call
def losses_D(D, real, fake, name):
    """What D minimizes, and its terms. real, fake: (N, 3, H, W); name: of D, to name the terms."""
    prediction_real, prediction_fake = together(D, real, fake)
    loss_real = gan_loss(prediction_real, True)  # Eq. 1
    loss_fake = gan_loss(prediction_fake, False)  # Eq. 1
    loss = {"total": (loss_real + loss_fake) / 2, "real": loss_real, "fake": loss_fake}
    return {f"{name}_{term}": value for term, value in loss.items()}


# Differs from pix2pix/train.py: G and F first, then D_X and D_Y, which learn from the buffers
def training_step(nets, x, y, args):
    """One step of G and F, one of D_X and D_Y. x, y: (N, 3, H, W) in [-1, 1]. Named losses."""
    G, F, D_X, D_Y = (nets[name] for name in ("G", "F", "D_X", "D_Y"))

    g, fake_x, fake_y = losses_G(G, F, D_X, D_Y, x, y, args)
    descend(g["G_total"], nets["optimizer_G"])

    d_x = losses_D(D_X, x, nets["buffer_x"](fake_x), "D_X")
    d_y = losses_D(D_Y, y, nets["buffer_y"](fake_y), "D_Y")
    descend(d_x["D_X_total"] + d_y["D_Y_total"], nets["optimizer_D"])
    return {**g, **d_x, **d_y}


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
    return args.epochs // 2


# ------------------------------------------------------------------ what cycleGAN builds and shows


# Differs from pix2pix/train.py: its own networks
def build(args, device):
    """Networks, optimizers, buffers by name: what `training_step` and the checkpoint work on."""
    nets = {}
    for name in ("G", "F"):
        net = ResnetGenerator(args.n_layers, args.ngf, args.antialias)
        nets[name] = prepare(initialize_weights(net), args, device)
    for name in ("D_X", "D_Y"):
        net = PatchDiscriminator(args.ndf, args.antialias)
        nets[name] = prepare(initialize_weights(net), args, device)
    nets["optimizer_G"] = adam(args, nets["G"], nets["F"])
    nets["optimizer_D"] = adam(args, nets["D_X"], nets["D_Y"])
    nets["buffer_x"] = ImageBuffer(args.buffer_size)
    nets["buffer_y"] = ImageBuffer(args.buffer_size)
    return nets


# Differs from pix2pix/train.py: x and y are no pairs
def build_data(args):
    """The pictures to train on, and those to look at."""
    root, name, size = Path(args.data_root), args.data_folder, args.image_size
    drawn = {"flip": args.flip, "seed": args.seed, "cache": args.cache}
    load_size = args.load_size if args.jitter else size
    train_set = UnpairedDataset(root, name, "train", load_size, size, args.swap_xy, **drawn)
    return train_set, UnpairedDataset(root, name, "test", size, size, args.swap_xy)


# Differs from pix2pix/train.py: both directions, and what the translation does to light and dark
@torch.no_grad()
def sample(nets, test_set, folder, progress, device):
    """Writes the grids of the first eight test pictures of each side; measures all of them.

    Returns luminance_xy and luminance_yx, the mean correlation of a picture's luminance with its
    translation's; where test pictures match by name also l1_xy, the mean |G(x) - y|, and l1_yx.
    """
    measured = {}
    for net, files, truths, name in (
        (nets["G"], test_set.files_x, test_set.files_y, "xy"),
        (nets["F"], test_set.files_y, test_set.files_x, "yx"),
    ):
        source, target = name
        images, fakes, correlations, errors = [], [], [], []
        bar = tqdm(files, desc=f"test {name}", unit="img", leave=False)
        for index, file in enumerate(bar):
            image = test_set.load(file)[None].to(device)
            fake = net(image)
            correlations.append(luminance_correlation(image, fake))
            if test_set.names_match:
                errors.append(l1_loss(fake, test_set.load(truths[index])[None].to(device)).item())
            if index < 8:
                images, fakes = [*images, image], [*fakes, fake]
        save_grid(images, folder / f"{source}{progress['epoch']}.png")
        save_grid(fakes, folder / f"{target}_G{progress['epoch']}.png")
        measured[f"luminance_{name}"] = sum(correlations) / len(correlations)
        if errors:
            measured[f"l1_{name}"] = sum(errors) / len(errors)
    warn_of_inversion(measured, progress)
    return measured


def luminance_correlation(a, b):
    """Pearson's correlation of the luminance (Rec. 601) of two pictures, each (1, 3, H, W)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).double().view(1, 3, 1, 1)
    a, b = ((weights * image.cpu().double()).sum(1).flatten() for image in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm()).clamp_min(1e-8)).item()


def warn_of_inversion(measured, progress):
    """Says, once a run, that light and dark have changed places (for labels that may be right)."""
    inverted = [name for name in measured if name.startswith("lum") and measured[name] < -0.2]
    if inverted and not progress.get("warned"):
        progress["warned"] = True
        what = f"{inverted[0]} is {measured[inverted[0]]:.2f}: light and dark change places"
        print(f"warning: {what}; with labels that may be right, else --pix-loss counters it")


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
