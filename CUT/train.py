"""Train CUT (Park et al. 2020, Contrastive Learning for Unpaired Image-to-Image Translation,
https://arxiv.org/abs/2007.15651). Grids and losses go to visualize/CUT/<run-name>/.

    python CUT/train.py --data-folder facades_unpaired --save-model
    python CUT/train.py --data-folder monet2photo --swap-xy --fast --save-model   # FastCUT
"""

import copy
import sys
from difflib import get_close_matches
from pathlib import Path

from CUT_flags import parse_args

if __name__ == "__main__":
    parse_args()  # --help and flag errors exit here, before the slow import of torch

import torch
from PIL import Image
from torch.nn.functional import l1_loss, mse_loss
from torchvision.utils import save_image
from tqdm import tqdm

from CUT_dataset import UnpairedDataset, UserError, note, to_unit
from CUT_model import (
    ImageBuffer,
    PatchDiscriminator,
    ResnetGenerator,
    initialize_weights,
    tap_channels,
)
from CUT_nce import ProjectionHeads, patch_nce
from CUT_run import Run, run_command
from CUT_system import average_gradients, pick_device, replacing

# ---------------------------------------------------------------------------------- the equations


# Differs from pix2pix/train.py: least squares instead of the logarithm
def gan_loss(prediction, real):
    """Eq. 1, least squares: mean (D - 1)^2 if `real`, else mean D^2. prediction: (N, 1, h, w)."""
    return mse_loss(prediction, torch.full_like(prediction, float(real)))


# Differs from pix2pix/train.py: the contrast of patches
# Differs from cycleGAN/train.py: the contrast of patches
def losses_G(G, D, H, fake_y, same_y, keys_x, keys_y, flipped, args):
    """What G and H minimize, and its terms.

    fake_y = G(x), same_y = G(y) or None: (N, 3, H, W). keys_x, keys_y: features of x and y, lists
    over taps. flipped: whether G was given flipped images.
    """
    generated = fake_y if same_y is None else torch.cat([fake_y, same_y])
    queries = G(generated, args.feat_str.replace(",", " ").split(), encode_only=True)
    queries = [query.flip(3) for query in queries] if flipped else queries
    queries_x, queries_y = halves(queries, len(fake_y))

    loss = {"G_gan": gan_loss(D(fake_y), True)}  # Eq. 1
    loss["NCE"], relation = patch_nce(H, queries_x, keys_x, args)  # Eq. 3
    if same_y is None:
        total = loss["G_gan"] + args.NCE_ratio * loss["NCE"]
    else:
        loss["NCE_id"], _ = patch_nce(H, queries_y, keys_y, args)
        # Paper: the sum. Authors' code: half of it. Here: half, as published results come from it.
        nce = (args.NCE_ratio * loss["NCE"] + args.NCE_ratio_id * loss["NCE_id"]) / 2
        total = loss["G_gan"] + nce  # the final objective of section 3
    if args.src_ratio > 0:  # of x and G(x) only, as in the code of its authors
        loss["SRC"] = relation
        total = total + args.src_ratio * relation
    return {"G_total": total, **loss}


# Differs from pix2pix/train.py: D sees one image, real and generated ones in one call
def losses_D(D, real, fake, name):
    """What D minimizes, and its terms. real, fake: (N, 3, H, W). name: the terms' prefix."""
    prediction_real, prediction_fake = together(D, real, fake)
    loss_real = gan_loss(prediction_real, True)  # Eq. 1
    loss_fake = gan_loss(prediction_fake, False)  # Eq. 1
    total = (loss_real + loss_fake) / 2
    return {f"{name}_total": total, f"{name}_real": loss_real, f"{name}_fake": loss_fake}


# Differs from pix2pix/train.py: features and the contrast
# Differs from cycleGAN/train.py: one generator, D first, features and the contrast
def training_step(nets, x, y, args):
    """One step of D, then one of G and H. x, y: (N, 3, H, W) in [-1, 1]. Returns named losses."""
    G, D, H = nets["G"], nets["D"], nets["H"]
    taps, n = args.feat_str.replace(",", " ").split(), len(x)
    flipped = args.flip_equivariance and bool(torch.rand(()) < 0.5)
    identity = args.NCE_ratio_id > 0
    source = torch.cat([x, y]) if identity else x

    # One pass gives the translations and, on the way, the features that serve as keys.
    image, keys = G(source.flip(3) if flipped else source, taps)
    if flipped:  # keys come from the unflipped images; D's real images are not flipped either
        with torch.set_grad_enabled(not args.detach):
            keys = G(source, taps, encode_only=True)
    fake_y, same_y = (image[:n], image[n:]) if identity else (image, None)
    keys_x, keys_y = halves(keys, n)

    d = losses_D(D, y, nets["buffer_y"](fake_y), "D")  # the buffer detaches
    descend(d["D_total"], nets["optimizer_D"])

    g = losses_G(G, D, H, fake_y, same_y, keys_x, keys_y, flipped, args)
    descend(g["G_total"], nets["optimizer_G"], nets["optimizer_H"])
    return {**g, **d}


def halves(features, n):
    """Features of a batch, a list over taps, split after its first n images."""
    return [f[:n] for f in features], [f[n:] for f in features]


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


# Differs from pix2pix/train.py: FastCUT has a schedule of its own
# Differs from cycleGAN/train.py: FastCUT has a schedule of its own
def learning_rate(args, epoch):
    """Adam's rate in an epoch: constant, then towards 0 over the last half (FastCUT: quarter)."""
    decay = args.epochs // 4 if args.fast else args.epochs // 2  # FastCUT: 150 + 50 epochs
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
# Differs from cycleGAN/train.py: its own networks
def build(args, device):
    """Networks, optimizers and buffer under the names that training_step and checkpoints use."""
    taps = args.feat_str.replace(",", " ").split()
    if args.image_size < 32 or args.image_size % 4 or args.num_patches < 2 or not taps:
        limits = "--image-size must be a multiple of 4 from 32 on, --num-patches 2 or more"
        raise UserError(f"{limits}, and --feat-str must name a layer")
    try:
        channels = tap_channels(taps, args.n_layers, args.ngf)
    except KeyError as error:
        layers = f"pix, c7s1_64, d128, d256, R256_1 to R256_{args.n_layers}"
        raise UserError(f"--feat-str has no layer {error}; the layers are {layers}") from None
    if args.query == "attention" and not all(name[:4] in ("d256", "R256") for name in taps[-2:]):
        raise UserError(f"--query attention needs deep layers last in --feat-str, not {taps[-2:]}")
    nets = {"G": ResnetGenerator(args.n_layers, args.ngf, args.antialias)}
    nets.update(D=PatchDiscriminator(args.ndf, args.antialias), H=ProjectionHeads(channels))
    nets = {name: initialize_weights(net) for name, net in nets.items()}
    if args.ema:
        nets["G_ema"] = copy.deepcopy(nets["G"])
    nets = {name: prepare(net, args, device) for name, net in nets.items()}
    optimizers = {f"optimizer_{name}": adam(args, nets[name]) for name in ("G", "D", "H")}
    return {**nets, "buffer_y": ImageBuffer(args.buffer_size), **optimizers}


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


# Differs from pix2pix/train.py: no pairs; what the translation does to its input
# Differs from cycleGAN/train.py: one direction; how much the translation changes
@torch.no_grad()
def sample(nets, test_set, folder, epoch, device):
    """Writes grids of the first eight test images. Returns means over all of them.

    change: |G(x) - x|; luminance: the correlation of the luminance of x and G(x), below 0 if light
    and dark are inverted; l1: |G(x) - y|, if the test images are pairs.
    """
    G, (files, truths), paired = nets.get("G_ema", nets["G"]), test_set.sides, true_pairs(test_set)
    images, fakes, values = [], [], []
    for index, file in enumerate(tqdm(files, desc="test", unit="img", leave=False)):
        x = to_unit(test_set.load(file)[None].to(device))
        fake_y = G(x)
        value = {"change": l1_loss(fake_y, x).item(), "luminance": luminance_correlation(x, fake_y)}
        if paired:
            y = to_unit(test_set.load(truths[index])[None].to(device))
            value["l1"] = l1_loss(fake_y, y).item()
        values.append(value)
        images, fakes = [*images, x][:8], [*fakes, fake_y][:8]
        if index + 1 == min(8, len(files)):  # now, since an image further on may be unreadable
            save_grid(images, folder / f"x{epoch}.png")
            save_grid(fakes, folder / f"y_G{epoch}.png")
    return {n: sum(v[n] for v in values) / len(values) for n in values[0]}


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
