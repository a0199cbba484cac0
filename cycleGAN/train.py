"""Train CycleGAN (Zhu et al. 2017, Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks, https://arxiv.org/abs/1703.10593). Grids and losses go to
visualize/cycleGAN/<run-name>/.

    python cycleGAN/train.py --data-folder facades_unpaired --save-model
    python cycleGAN/train.py --data-folder monet2photo --pix-loss --save-model
"""

import copy
import sys
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from cycleGAN_flags import parse_args

if __name__ == "__main__":
    parse_args()  # --help and flag errors exit here, before the slow import of torch

import torch
from PIL import Image
from torch.nn.functional import l1_loss, mse_loss
from torchvision.utils import save_image
from tqdm import tqdm

from cycleGAN_dataset import UnpairedDataset, UserError, note, to_unit
from cycleGAN_model import (
    ImageBuffer,
    PatchDiscriminator,
    ResnetGenerator,
    blur_and_pool,
    initialize_weights,
)
from cycleGAN_run import Run, run_command
from cycleGAN_system import average_gradients, pick_device, replacing

# ---------------------------------------------------------------------------------- the equations


# Differs from pix2pix/train.py: least squares instead of the logarithm
def gan_loss(prediction, real):
    """Eq. 1, least squares: mean (D - 1)^2 if `real`, else mean D^2. prediction: (N, 1, h, w)."""
    return mse_loss(prediction, torch.full_like(prediction, float(real)))


# Differs from pix2pix/train.py: two generators and the cycle
def losses_G(G, F, D_X, D_Y, x, y, args):
    """What G: X -> Y and F: Y -> X minimize, and its terms; also fake_x = F(y) and fake_y = G(x).

    x, y: (N, 3, H, W) in [-1, 1].
    """
    if args.identity_ratio > 0:
        fake_y, same_y = together(G, x, y)
        fake_x, rec_x, same_x = together(F, y, fake_y, x)
    else:
        fake_y = G(x)
        fake_x, rec_x = together(F, y, fake_y)
    rec_y = G(fake_x)

    loss = {}
    loss["G_gan"] = gan_loss(D_Y(fake_y), True)  # Eq. 1 for G: X -> Y
    loss["F_gan"] = gan_loss(D_X(fake_x), True)  # Eq. 1 for F: Y -> X
    loss["cycle"] = l1_loss(rec_x, x) + l1_loss(rec_y, y)  # Eq. 2: F(G(x)) = x and G(F(y)) = y
    total = loss["G_gan"] + loss["F_gan"] + args.cycle_ratio * loss["cycle"]  # Eq. 3
    if args.identity_ratio > 0:
        # Section 5.2: images of the other side stay as they are. Paper: only for paintings.
        # Authors' code: always, with weight 5. Here: off unless --identity-ratio is given.
        loss["identity"] = l1_loss(same_y, y) + l1_loss(same_x, x)
        total = total + args.identity_ratio * loss["identity"]
    if args.pix_loss:  # not in the paper: the output keeps the colors of the input
        view = partial(blur_and_pool, blur=args.pix_blur, pool=args.pix_pool)
        loss["pix"] = l1_loss(view(fake_y), view(x)) + l1_loss(view(fake_x), view(y))
        total = total + args.pix_ratio * loss["pix"]
    return {"G_total": total, **loss}, fake_x, fake_y


# Differs from pix2pix/train.py: D sees one image, real and generated ones in one call
def losses_D(D, real, fake, name):
    """What D minimizes, and its terms. real, fake: (N, 3, H, W). name: the terms' prefix."""
    prediction_real, prediction_fake = together(D, real, fake)
    loss_real = gan_loss(prediction_real, True)  # Eq. 1
    loss_fake = gan_loss(prediction_fake, False)  # Eq. 1
    total = (loss_real + loss_fake) / 2
    return {f"{name}_total": total, f"{name}_real": loss_real, f"{name}_fake": loss_fake}


# Differs from pix2pix/train.py: G and F first, then D_X and D_Y, which learn from the buffers
def training_step(nets, x, y, args):
    """One step of G and F, one of D_X and D_Y. x, y: (N, 3, H, W) in [-1, 1]. Named losses."""
    G, F, D_X, D_Y = (nets[name] for name in ("G", "F", "D_X", "D_Y"))

    g, fake_x, fake_y = losses_G(G, F, D_X, D_Y, x, y, args)
    descend(g["G_total"], nets["optimizer_G"])

    # Authors' Lua code: G, D_Y, F, D_X one after the other. Authors' PyTorch code: as here.
    d_x = losses_D(D_X, x, nets["buffer_x"](fake_x), "D_X")
    d_y = losses_D(D_Y, y, nets["buffer_y"](fake_y), "D_Y")
    descend(d_x["D_X_total"] + d_y["D_Y_total"], nets["optimizer_D"])
    return {**g, **d_x, **d_y}


def together(net, *images):
    """net of several batches, (N, ...), in one call: the same values, as no norm spans a batch."""
    return net(torch.cat(images)).split([len(batch) for batch in images])


def descend(loss, *optimizers):
    """One step of each optimizer. Only their parameters receive gradients."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward(inputs=parameters)
    average_gradients(parameters)
    for optimizer in optimizers:
        optimizer.step()


def learning_rate(args, epoch):
    """Adam's rate in an epoch: constant for the first half, then linearly towards 0."""
    # Authors' code: the same or, in most versions, one epoch earlier.
    decay = args.epochs // 2
    return args.lr * (1 - max(0, epoch - (args.epochs - decay)) / (decay + 1))  # never 0


# ------------------------------------------------------------------------------ networks and data


def prepare(net, args, device):
    """Moves a network to the device; its forward pass then follows --precision and --compile."""
    net = net.to(device)
    # bf16: weights, gradients and everything outside of the networks stay in fp32.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    net.forward = autocast(net.forward)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # torch's 8 are for all networks together
        net.compile()
    return net


def adam(args, *nets):
    """One Adam for all of nets, with the settings of the three papers."""
    weights = [p for net in nets for p in net.parameters()]
    fused = weights[0].device.type in ("cpu", "cuda", "mps")
    return torch.optim.Adam(weights, args.lr, betas=(0.5, 0.999), fused=fused)


@torch.no_grad()
def update_averages(nets, decay):
    """After a step, moves G_ema, the average of G's weights that --ema keeps, towards G."""
    for name in nets:
        if name.endswith("_ema"):
            weights = nets[name.removesuffix("_ema")].parameters()
            for average, weight in zip(nets[name].parameters(), weights, strict=True):
                average.lerp_(weight, 1 - decay)


# Differs from pix2pix/train.py: its own networks
def build(args, device):
    """Networks, optimizers and buffers under the names that training_step and checkpoints use."""
    if not args.pix_loss and (args.pix_blur or args.pix_pool > 1 or args.pix_ratio != 5):
        raise UserError("--pix-blur, --pix-pool and --pix-ratio do nothing without --pix-loss")
    if args.image_size < 32 or args.image_size % 4 or args.image_size % args.pix_pool:
        raise UserError(
            f"--image-size {args.image_size} must be a multiple of 4 and of --pix-pool, from 32 on"
        )
    nets = {}
    for name in ("G", "F"):
        nets[name] = initialize_weights(ResnetGenerator(args.n_layers, args.ngf, args.antialias))
    for name in ("D_X", "D_Y"):
        nets[name] = initialize_weights(PatchDiscriminator(args.ndf, args.antialias))
    for name in ("G", "F") if args.ema else ():
        nets[f"{name}_ema"] = copy.deepcopy(nets[name])
    nets = {name: prepare(net, args, device) for name, net in nets.items()}
    nets["optimizer_G"] = adam(args, nets["G"], nets["F"])
    nets["optimizer_D"] = adam(args, nets["D_X"], nets["D_Y"])
    nets["buffer_x"] = ImageBuffer(args.buffer_size)
    nets["buffer_y"] = ImageBuffer(args.buffer_size)
    return nets


# Differs from pix2pix/train.py: two sides
def build_data(args):
    """The training images, and the test images or, if there are none, eight training images."""
    train_set, test_set = (UnpairedDataset(args, s, s == "train") for s in ("train", "test"))
    if not all(train_set.sides):
        hint = "use datasets/prepare.py unpaired DIR_X DIR_Y NAME or, for pairs, split PAIRS NAME"
        raise layout_error(args, "images in train/x and train/y, or trainA and trainB", hint)
    if not all(test_set.sides):
        sides = zip(test_set.sides, train_set.sides, strict=True)
        test_set.sides = [test or train[:8] for test, train in sides]
        note("test", "test/x or test/y has no images: eight training images take their place")
    if true_pairs(test_set):
        note("pairs", "test/x and test/y match by name and size: they are measured as pairs")
    for index in range(min(8, len(train_set))):  # notes what is odd, before loader workers can
        train_set[1, index]
    return train_set, test_set


def true_pairs(test_set):
    """Whether each x has a y of the same name and size, which then counts as its translation."""
    x, y = ([(file.stem, Image.open(file).size) for file in side] for side in test_set.sides)
    return x == y


def layout_error(args, expected, hint):
    """The UserError for a dataset that does not exist or is not laid out as `expected`."""
    name, folder = Path(args.data_folder), Path(args.data_root, args.data_folder)
    place, found = f"{folder} contains", [*folder.glob("[!.]*/*/")] or [*folder.glob("[!.]*")]
    found = sorted(file.relative_to(folder).as_posix() for file in found)
    sets = sorted(file.name for file in Path(args.data_root).glob("[!._]*/"))
    near = [part for part in name.parts if part in sets]  # one level too deep, or a path
    if not folder.is_dir():
        place, found = f"no folder {folder}; --data-root {args.data_root} contains", sets
        hint = "datasets/download.py --list shows what to download; prepare.py lays out your images"
        near = near or get_close_matches(name.name, sets, 1)
    hint = hint if near in ([], [str(name)]) else f"did you mean --data-folder {near[0]}?"
    return UserError(f"{place} {', '.join(found[:8]) or 'nothing'}; expected {expected}; {hint}")


# Differs from pix2pix/train.py: both directions, and what the translation does to light and dark
@torch.no_grad()
def sample(nets, test_set, folder, epoch, device):
    """Writes grids of the first eight test images of each side. Returns means over all of them.

    luminance_xy, luminance_yx: the correlation of the luminance of an image and its translation,
    below 0 if light and dark are inverted; l1_xy, l1_yx: the error, if the test images are pairs.
    """
    measured, paired = {}, true_pairs(test_set)
    for name, side, (source, target) in (("G", 0, "xy"), ("F", 1, "yx")):
        files, truths, values = test_set.sides[side], test_set.sides[1 - side], []
        net, images, fakes = nets.get(f"{name}_ema", nets[name]), [], []
        for index, file in enumerate(tqdm(files, desc="test", unit="img", leave=False)):
            image = to_unit(test_set.load(file)[None].to(device))
            fake = net(image)
            value = {f"luminance_{source}{target}": luminance_correlation(image, fake)}
            if paired:
                truth = to_unit(test_set.load(truths[index])[None].to(device))
                value[f"l1_{source}{target}"] = l1_loss(fake, truth).item()
            values.append(value)
            images, fakes = [*images, image][:8], [*fakes, fake][:8]
            if index + 1 == min(8, len(files)):  # now, since an image further on may be unreadable
                save_grid(images, folder / f"{source}{epoch}.png")
                save_grid(fakes, folder / f"{target}_G{epoch}.png")
        measured.update({n: sum(v[n] for v in values) / len(values) for n in values[0]})
    return measured


def luminance_correlation(a, b):
    """Pearson's correlation of the luminance (Rec. 601) of two images, each (1, 3, H, W)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).double().view(1, 3, 1, 1)
    a, b = ((weights * image.cpu().double()).sum(1).flatten() for image in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm()).clamp_min(1e-8)).item()


def save_grid(images, path):
    """Writes images, each (1, 3, H, W) in [-1, 1], as one row of a PNG, pixel for pixel."""
    with replacing(path) as file:  # Authors' code truncates to 8 bits. save_image rounds.
        save_image((torch.cat(images) + 1) / 2, file, format="png", nrow=len(images))


# ----------------------------------------------------------------------------------------- the run


def train(args):
    """Trains to the last epoch, --max-steps or a signal. Returns the signal's number, or 0."""
    device = pick_device(args)
    torch.manual_seed(args.seed)
    train_set, test_set = build_data(args)
    nets = build(args, device)
    with Run(args, nets, train_set, device) as run:
        while run.unfinished():
            rate = learning_rate(args, run.progress["epoch"])
            for group in (g for part in nets.values() for g in getattr(part, "param_groups", ())):
                group["lr"] = rate
            for x, y in run.batches():
                run.log(training_step(nets, x, y, args))
                update_averages(nets, args.ema)
            run.end_epoch(rate, lambda folder, n: sample(nets, test_set, folder, n, device))
    return run.caught


def main(argv=None):
    return run_command(train, argv)


if __name__ == "__main__":
    sys.exit(main())
