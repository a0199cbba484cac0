"""The three training steps without any saving: what step_time.py compares train.py with.

Each image goes through a network by itself, each feature is computed where it is needed, the
backward pass of G's step reaches into D, Adam is torch's default. tests/test_benchmarks.py compares
these steps with those of train.py: the same losses and gradients.
"""

import torch
from torch.nn.functional import l1_loss


def with_default_adam(nets, args):
    """nets, what train.build gave, with torch's default Adam for each optimizer."""
    for name in nets:
        if name.startswith("optimizer"):
            weights = nets[name].param_groups[0]["params"]
            nets[name] = torch.optim.Adam(weights, args.lr, betas=(0.5, 0.999))
    return nets


def descend(loss, *optimizers):
    """One step of each optimizer; other networks get gradients that nobody uses."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def pix2pix_step(train, nets, x, y, args):
    """x, y: (N, 3, H, W) in [-1, 1]. Returns the totals, named as train.training_step does."""
    G, D, gan_loss = nets["G"], nets["D"], train.gan_loss
    fake_y = G(x)
    D_total = (gan_loss(D(x, y), True) + gan_loss(D(x, fake_y.detach()), False)) / 2
    descend(D_total, nets["optimizer_D"])
    G_total = gan_loss(D(x, fake_y), True) + args.l1_ratio * l1_loss(fake_y, y)
    descend(G_total, nets["optimizer_G"])
    return {"G_total": G_total, "D_total": D_total}


def cycleGAN_step(train, nets, x, y, args):
    """As pix2pix_step. The paper's three terms: GAN, cycle, and identity with --identity-ratio."""
    G, F, D_X, D_Y = (nets[name] for name in ("G", "F", "D_X", "D_Y"))
    gan_loss = train.gan_loss
    fake_y, fake_x = G(x), F(y)
    G_total = gan_loss(D_Y(fake_y), True) + gan_loss(D_X(fake_x), True)
    G_total = G_total + args.cycle_ratio * (l1_loss(F(fake_y), x) + l1_loss(G(fake_x), y))
    if args.identity_ratio > 0:
        G_total = G_total + args.identity_ratio * (l1_loss(G(y), y) + l1_loss(F(x), x))
    descend(G_total, nets["optimizer_G"])

    totals = {}
    nets["optimizer_D"].zero_grad()
    for D, real, fake, side in ((D_X, x, fake_x, "x"), (D_Y, y, fake_y, "y")):
        fake = nets[f"buffer_{side}"](fake)
        total = (gan_loss(D(real), True) + gan_loss(D(fake), False)) / 2
        total.backward()
        totals[f"D_{side.upper()}_total"] = total
    nets["optimizer_D"].step()
    return {"G_total": G_total, **totals}


def CUT_step(train, nets, x, y, args):
    """As pix2pix_step. No flips, no semantic relations; y is contrasted too if NCE_ratio_id."""
    G, D, H, gan_loss = nets["G"], nets["D"], nets["H"], train.gan_loss
    identity, taps = args.NCE_ratio_id > 0, args.feat_str.split(", ")
    fake_y = G(x)
    same_y = G(y) if identity else None
    fake = nets["buffer_y"](fake_y)
    D_total = (gan_loss(D(y), True) + gan_loss(D(fake), False)) / 2
    descend(D_total, nets["optimizer_D"])

    def contrast(generated, source):
        queries = G(generated, taps, encode_only=True)
        return train.patch_nce(H, queries, G(source, taps, encode_only=True), args)[0]

    nce = args.NCE_ratio * contrast(fake_y, x)
    if identity:
        nce = (nce + args.NCE_ratio_id * contrast(same_y, y)) / 2
    G_total = gan_loss(D(fake_y), True) + nce
    descend(G_total, nets["optimizer_G"], nets["optimizer_H"])
    return {"G_total": G_total, "D_total": D_total}


STEPS = {"pix2pix": pix2pix_step, "cycleGAN": cycleGAN_step, "CUT": CUT_step}
