"""Train pix2pix (Isola et al. 2017, Image-to-Image Translation with Conditional Adversarial
Networks, https://arxiv.org/abs/1611.07004). Grids and losses go to visualize/pix2pix/<run-name>/.

    python pix2pix/train.py --data-folder facades --save-model      # 256 px, 200 epochs
    python pix2pix/train.py --data-folder facades --resume          # continue a stopped run
"""

import copy
import sys
from difflib import get_close_matches
from pathlib import Path

from pix2pix_flags import parse_args

if __name__ == "__main__":
    parse_args()  # --help and flag errors exit here, before the slow import of torch

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss
from torchvision.utils import save_image
from tqdm import tqdm

from pix2pix_dataset import PairDataset, UserError, note, to_unit
from pix2pix_model import PatchDiscriminator, UNetGenerator, initialize_weights
from pix2pix_run import Run, run_command
from pix2pix_system import average_gradients, pick_device, random_states, replacing

# ---------------------------------------------------------------------------------- the equations


def gan_loss(logits, real):
    """-log D if `real`, else -log(1 - D); D = sigmoid(logits), logits (N, 1, h, w). A scalar."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def losses_D(D, x, y, fake_y):
    """What D minimizes, D_total, and its terms. x, y, fake_y = G(x): (N, 3, H, W)."""
    D_real = gan_loss(D(x, y), True)  # Eq. 1: log D(x, y)
    D_fake = gan_loss(D(x, fake_y), False)  # Eq. 1: log(1 - D(x, G(x)))
    total = (D_real + D_fake) / 2  # section 3.3: to slow D down; Adam hardly sees the factor
    return {"D_total": total, "D_real": D_real, "D_fake": D_fake}


def losses_G(D, x, y, fake_y, l1_ratio):
    """What G minimizes, G_total, and its terms. x, y, fake_y = G(x): (N, 3, H, W)."""
    G_gan = gan_loss(D(x, fake_y), True)  # Eq. 1, but -log D(x, G(x)): section 3.3
    G_l1 = l1_loss(fake_y, y)  # Eq. 3
    return {"G_total": G_gan + l1_ratio * G_l1, "G_gan": G_gan, "G_l1": G_l1}  # Eq. 4


def training_step(nets, x, y, args):
    """One step of D, then one of G. x, y: (N, 3, H, W) in [-1, 1]. Returns the named losses."""
    G, D = nets["G"], nets["D"]
    fake_y = G(x)

    d = losses_D(D, x, y, fake_y.detach())
    descend(d["D_total"], nets["optimizer_D"])

    # Authors' Lua code: G learns from D before its step. Authors' PyTorch code, and here: after it.
    g = losses_G(D, x, y, fake_y, args.l1_ratio)
    descend(g["G_total"], nets["optimizer_G"])
    return {**g, **d}


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
    # Paper and authors' Lua code: constant. Authors' PyTorch code: as here or, in most versions,
    # one epoch earlier.
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


def build(args, device):
    """Networks and optimizers under the names that training_step and checkpoints use."""
    if args.image_size < 32 or args.image_size & (args.image_size - 1):
        sizes = "32, 64, 128, 256, 512, ...: the U-Net halves it down to one pixel"
        raise UserError(f"--image-size {args.image_size}: expected a power of two, {sizes}")
    nets = {"G": initialize_weights(UNetGenerator(args.image_size, args.ngf))}
    nets["D"] = initialize_weights(PatchDiscriminator(args.ndf))
    if args.ema:
        nets["G_ema"] = copy.deepcopy(nets["G"])
    nets = {name: prepare(net, args, device) for name, net in nets.items()}
    return {**nets, "optimizer_G": adam(args, nets["G"]), "optimizer_D": adam(args, nets["D"])}


def build_data(args):
    """The training pairs, and those of the grids: test/, else val/, else eight training pairs."""
    names = ("train", "test", "val")
    train_set, *test_sets = (PairDataset(args, name, name == "train") for name in names)
    if not train_set.files:
        hint = "cycleGAN and CUT train on two sides; datasets/prepare.py pairs glues equal names"
        raise layout_error(args, "pairs in train/, y in the left half and x in the right", hint)
    test_set = next((s for s in test_sets if s.files), test_sets[0])
    if not test_set.files:
        test_set.files = train_set.files[:8]
        note("test", "no images in test/ or val/: the grids show the first eight training images")
    for index in range(min(8, len(train_set))):  # notes what is odd, before loader workers can
        train_set[1, index]
    return train_set, test_set


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


@torch.no_grad()
def translate(G, x):
    """G(x) for one image, x: (1, 3, H, W) in [-1, 1], always with the same dropout."""
    # Paper, section 3.3: dropout stays on at test time, and batch norm uses the statistics of the
    # test batch. Here too, but each image is its own batch, so that a result depends on it alone.
    states = random_states(x.device)
    torch.manual_seed(0)
    fake_y = G(x)
    random_states(x.device, states)
    return fake_y


def sample(nets, test_set, folder, epoch, device):
    """Writes grids of the first eight test images. Returns test_l1, the mean |G(x) - y| of all."""
    shown, l1 = [], 0.0
    for index in tqdm(range(len(test_set)), desc="test", unit="img", leave=False):
        x, y = (to_unit(half[None].to(device)) for half in test_set[0, index])
        fake_y = translate(nets.get("G_ema", nets["G"]), x)
        l1 += l1_loss(fake_y, y).item() / len(test_set)
        shown = [*shown, (x, y, fake_y)][:8]
        if index + 1 == min(8, len(test_set)):  # now, since an image further on may be unreadable
            for name, images in zip(("x", "y", "y_G"), zip(*shown, strict=True), strict=True):
                save_grid(images, folder / f"{name}{epoch}.png")
    return {"test_l1": l1}


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
