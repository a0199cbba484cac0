"""Trains CUT: Park et al. 2020, Contrastive Learning for Unpaired Image-to-Image Translation,
https://arxiv.org/abs/2007.15651. Grids and losses appear in visualize/CUT/<run-name>/.

    python CUT/train.py --data-folder facades_unpaired --save-model
    python CUT/train.py --data-folder monet2photo --swap-xy --fast --save-model   # FastCUT
"""

import argparse
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# FastCUT, the authors' lighter variant (section 4): what --fast stands for, unless typed otherwise.
FAST = {"epochs": 200, "NCE_ratio": 10.0, "NCE_ratio_id": 0.0, "flip_equivariance": True}


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
# Differs from cycleGAN/train.py: the method's own flags
def parse_args(argv=None):
    """The flags of CUT."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("train.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    add_common_flags(parser, epochs=400)
    switch = argparse.BooleanOptionalAction
    ratio, count, size = number(float, 0), number(int, 1), number(int, 0)
    method = parser.add_argument_group("CUT").add_argument
    method("--n-layers", type=count, default=9, help="residual blocks of the generator [9]")
    method("--antialias", action="store_true", help="blur before sampling down, after up [off]")
    method("--buffer-size", type=size, default=0, help="pictures kept for D; 0: none [0]")
    method("--NCE-ratio", type=ratio, default=1.0, help="weight of NCE between x and G(x) [1]")
    method("--NCE-ratio-id", type=ratio, default=1.0, help="of NCE between y and G(y); 0: none [1]")
    method("--fast", action="store_true", help="FastCUT: NCE 10, no id, flips, 200 epochs [off]")
    method("--flip-equivariance", action=switch, default=False, help="G mirrors with x [off]")

    nce = parser.add_argument_group("CUT, the contrast").add_argument
    taps = "pix, d128, d256, R256_1, R256_5"
    nce("--feat-str", default=taps, help="layers of G whose features are compared [%(default)s]")
    nce("--num-patches", type=number(int, 2), default=256, help="positions a picture [256]")
    nce("--tau", type=number(float, 1e-6), default=0.07, help="temperature of the NCE [0.07]")
    nce("--detach", action=switch, default=True, help="no gradient through the keys [on]")
    losses = "cross entropy of the paper, exponential NCE, decoupled with hard negatives [infonce]"
    places = "which patches: by chance, or by self-attention on the two deepest layers [random]"
    nce("--nce", choices=["infonce", "ence", "hdce"], default="infonce", help=losses)
    nce("--query", choices=["random", "attention"], default="random", help=places)
    nce("--src-ratio", type=ratio, default=0.0, help="weight of semantic relations; 0: none [0]")
    args = parser.parse_args(argv)
    check_common_flags(parser, args, argv)
    args.feat_str = ", ".join(name.strip() for name in args.feat_str.split(","))
    for name in set(FAST) - set(args.given) if args.fast else ():
        setattr(args, name, FAST[name])
    if args.resume:
        return args  # the flags that count are the checkpoint's; they were checked then
    if args.image_size < 32 or args.image_size % 4:
        parser.error(f"--image-size {args.image_size}: wanted is a multiple of 4 from 32 on")
    layers = ["pix", "c7s1_64", "d128", "d256", *(f"R256_{k}" for k in range(1, args.n_layers + 1))]
    unknown = [name for name in args.feat_str.split(", ") if name not in layers]
    if unknown:
        there = f"with --n-layers {args.n_layers} the layers are {', '.join(layers)}"
        parser.error(f"--feat-str has {unknown[0]!r}; {there}")
    deepest = args.feat_str.split(", ")[-2:]
    if args.query == "attention" and not all(name[:4] in ("d256", "R256") for name in deepest):
        parser.error(f"--query attention wants deep layers last in --feat-str, not {deepest}")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch takes its seconds to load

import torch
from torch.nn.functional import l1_loss, mse_loss
from tqdm import tqdm

from CUT_dataset import RunError, UnpairedDataset, to_unit
from CUT_model import (
    ImageBuffer,
    PatchDiscriminator,
    ProjectionHeads,
    ResnetGenerator,
    attention_patches,
    ence,
    hdce,
    infonce,
    initialize_weights,
    random_patches,
    semantic_relation,
    take_patches,
    tap_channels,
)
from CUT_run import (
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


def halves(features, n):
    """Features of a batch, split after its first n pictures."""
    return [f[:n] for f in features], [f[n:] for f in features]


def patch_nce(H, queries, keys, args):
    """Eq. 3, mean over taps: each patch of the output against all patches of the input.

    queries, keys: lists over taps of features (N, C, h, w). Returns the NCE and the semantic
    relation loss (0 without --src-ratio): scalars. Reads --nce, --query, --num-patches in args.
    """
    contrast = {"infonce": infonce, "ence": ence, "hdce": hdce}[args.nce]
    total, relation = [], []
    for tap, (query, key) in enumerate(zip(queries, keys, strict=True)):
        # QS-Attn: attention chooses at the two deepest taps, the last ones, chance at the others.
        attends = args.query == "attention" and tap >= len(keys) - 2
        choose = attention_patches if attends else random_patches
        where = choose(key.detach(), args.num_patches)  # the same in query and key
        q, k = H(tap, take_patches(query, where)), H(tap, take_patches(key, where))
        k = k.detach() if args.detach else k
        total.append(contrast(q, k, args.tau).mean())
        if args.src_ratio > 0:
            relation.append(semantic_relation(q, k.detach()).mean())
    # Paper: the sum over layers. Authors' code: the mean. Here: the mean; the sum is 5 times it.
    return sum(total) / len(total), sum(relation) / len(keys)


# Differs from pix2pix/train.py: the contrast of patches
# Differs from cycleGAN/train.py: the contrast of patches
def losses_G(G, D, H, fake_y, same_y, keys_x, keys_y, mirrored, args):
    """What G and H minimize, G_total, and its terms.

    fake_y = G(x): (N, 3, H, W); same_y = G(y), or None; keys_x, keys_y: features of x and y, lists
    over taps; mirrored: whether G was given mirrored pictures. Reads the ratios in args.
    """
    generated = fake_y if same_y is None else torch.cat([fake_y, same_y])
    queries = G(generated, args.feat_str.split(", "), encode_only=True)
    if mirrored:
        queries = [query.flip(3) for query in queries]
    queries_x, queries_y = halves(queries, len(fake_y))

    loss = {"G_gan": gan_loss(D(fake_y), True)}  # Eq. 1
    loss["NCE"], relation = patch_nce(H, queries_x, keys_x, args)
    if same_y is None:
        total = loss["G_gan"] + args.NCE_ratio * loss["NCE"]
    else:
        loss["NCE_id"], _ = patch_nce(H, queries_y, keys_y, args)
        # Paper: the sum of both. Authors' code: half of it. Here: half of it.
        nce = (args.NCE_ratio * loss["NCE"] + args.NCE_ratio_id * loss["NCE_id"]) / 2
        total = loss["G_gan"] + nce  # the final objective of section 3
    if args.src_ratio > 0:
        loss["SRC"] = relation
        total = total + args.src_ratio * relation
    return {"G_total": total, **loss}


# Differs from pix2pix/train.py: D looks at one picture, and at real and generated ones in one call
def losses_D(D, real, fake, name):
    """What D minimizes, and its terms. real, fake: (N, 3, H, W); name: of D, to name the terms."""
    prediction_real, prediction_fake = together(D, real, fake)
    loss_real = gan_loss(prediction_real, True)  # Eq. 1
    loss_fake = gan_loss(prediction_fake, False)  # Eq. 1
    loss = {"total": (loss_real + loss_fake) / 2, "real": loss_real, "fake": loss_fake}
    return {f"{name}_{term}": value for term, value in loss.items()}


# Differs from pix2pix/train.py: features and the contrast
# Differs from cycleGAN/train.py: one generator, D first, features and the contrast
def training_step(nets, x, y, args):
    """One step of D, one of G and H. x, y: (N, 3, H, W) in [-1, 1]. Returns the named losses."""
    G, D, H = nets["G"], nets["D"], nets["H"]
    taps, n = args.feat_str.split(", "), len(x)
    mirrored = args.flip_equivariance and bool(torch.rand(()) < 0.5)
    identity = args.NCE_ratio_id > 0
    source = torch.cat([x, y]) if identity else x

    # One pass gives the translations and, as they are made, the features that serve as keys.
    image, keys = G(source.flip(3) if mirrored else source, taps)
    if mirrored:  # then the keys are those of the pictures as they are
        keys = G(source, taps, encode_only=True)
    fake_y, same_y = (image[:n], image[n:]) if identity else (image, None)
    keys_x, keys_y = halves(keys, n)

    d = losses_D(D, y, nets["buffer_y"](fake_y), "D")
    descend(d["D_total"], nets["optimizer_D"])

    g = losses_G(G, D, H, fake_y, same_y, keys_x, keys_y, mirrored, args)
    descend(g["G_total"], nets["optimizer_G"], nets["optimizer_H"])
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


# Differs from pix2pix/train.py: FastCUT's own schedule
# Differs from cycleGAN/train.py: FastCUT's own schedule
def decay_epochs(args):
    """How many epochs at the end the learning rate falls over."""
    return args.epochs // 4 if args.fast else args.epochs // 2  # FastCUT: 150 and 50


# ----------------------------------------------------------------------- what CUT builds and shows


# Differs from pix2pix/train.py: its own networks
# Differs from cycleGAN/train.py: its own networks
def build(args, device):
    """Networks, optimizers, buffer by name: what `training_step` and the checkpoint work on."""
    G = ResnetGenerator(args.n_layers, args.ngf, args.antialias)
    D = PatchDiscriminator(args.ndf, args.antialias)
    H = ProjectionHeads(tap_channels(args.feat_str.split(", "), args.n_layers, args.ngf))
    G, D, H = (prepare(initialize_weights(net), args, device) for net in (G, D, H))
    nets = {"G": G, "D": D, "H": H, "buffer_y": ImageBuffer(args.buffer_size)}
    nets.update(optimizer_G=adam(args, G), optimizer_D=adam(args, D), optimizer_H=adam(args, H))
    return nets


# Differs from pix2pix/train.py: x and y are no pairs
def build_data(args):
    """The pictures to train on, and those to look at."""
    root, name, size = Path(args.data_root), args.data_folder, args.image_size
    drawn = {"flip": args.flip, "seed": args.seed, "cache": args.cache}
    load_size = args.load_size if args.jitter else size
    train_set = UnpairedDataset(root, name, "train", load_size, size, args.swap_xy, **drawn)
    return train_set, UnpairedDataset(root, name, "test", size, size, args.swap_xy)


# Differs from pix2pix/train.py: no pairs; what the translation does to its input
# Differs from cycleGAN/train.py: one direction; how much the translation changes
@torch.no_grad()
def sample(nets, test_set, folder, progress, device):
    """Writes the grids of the first eight test pictures; measures all of them.

    Returns change, the mean |G(x) - x|; luminance, the mean correlation of a picture's luminance
    with its translation's; and, where test pictures match by name, l1, the mean |G(x) - y|.
    """
    measured, images, fakes = {}, [], []
    bar = tqdm(test_set.files_x, desc="test", unit="img", leave=False)
    for index, file in enumerate(bar):
        x = test_set.load(file)[None].to(device)
        fake_y = nets["G"](x)
        values = {"change": l1_loss(fake_y, x).item()}
        values["luminance"] = luminance_correlation(x, fake_y)
        if test_set.names_match:
            y = test_set.load(test_set.files_y[index])[None].to(device)
            values["l1"] = l1_loss(fake_y, y).item()
        for name, value in values.items():
            measured[name] = measured.get(name, 0.0) + value / len(test_set.files_x)
        if index < 8:
            images, fakes = [*images, x], [*fakes, fake_y]
    save_grid(images, folder / f"x{progress['epoch']}.png")
    save_grid(fakes, folder / f"y_G{progress['epoch']}.png")
    warn_of_inversion(measured, progress)
    return measured


def luminance_correlation(a, b):
    """Pearson's correlation of the luminance (Rec. 601) of two pictures, each (1, 3, H, W)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).double().view(1, 3, 1, 1)
    a, b = ((weights * image.cpu().double()).sum(1).flatten() for image in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm()).clamp_min(1e-8)).item()


# Differs from cycleGAN/train.py: what helps
def warn_of_inversion(measured, progress):
    """Says, once a run, that light and dark have changed places (for labels that may be right)."""
    inverted = [name for name in measured if name.startswith("lum") and measured[name] < -0.2]
    if inverted and not progress.get("warned"):
        progress["warned"] = True
        what = f"{inverted[0]} is {measured[inverted[0]]:.2f}: light and dark change places"
        print(f"warning: {what}; with labels that may be right, else try more --NCE-ratio")


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
