"""The FCN score for facades: what does a network that reads real photographs see in generated ones?

    python experiments/label_score.py results/CUT results/pix2pix --data-root datasets

A small U-Net, the reader, learns the 12 classes of the CMP facades (background, facade, window,
...) on real photographs, in minutes, once. It then reads images that were generated from the test
labels and have their stems. Compare with real test photographs, their mean and noise.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision import ops, tv_tensors
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import UserError, list_images, load_rgb  # noqa: E402

# Classes 1 to 12 in the label halves: the steps of the `jet` color map.
COLORS = "0000de 0030ff 0080ff 00cfff 20ffe0 70ff8f c0ff3f ffef00 ff9f00 ff5000 ff0000 af0000"
COLORS = torch.tensor([list(bytes.fromhex(color)) for color in COLORS.split()]).float()
SIZE, BATCH, EPOCHS, CACHE = 128, 8, 20, ROOT / "results" / "label_score"
FIT = v2.Compose([v2.Resize((SIZE, SIZE), v2.InterpolationMode.BICUBIC), v2.PILToTensor()])
CROP = v2.RandomResizedCrop(SIZE, scale=(0.64, 1), ratio=(1, 1))
AUGMENT = v2.Compose([CROP, v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)])


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    flag = parser.add_argument
    flag("folders", nargs="*", type=Path, metavar="FOLDER", help="generated images, one run each")
    flag("--data-root", type=Path, default=ROOT / "datasets", help="folder of facades/{train,test}")
    flag("--seeds", type=int, default=3, help="number of readers; scores are their means [3]")
    flag("--json", type=Path, metavar="FILE", help="write the scores of each reader to FILE [off]")
    return parser.parse_args(argv)


def decode(labels):
    """A label image (PIL) as classes (SIZE, SIZE), 0 to 11: nearest color, then majority."""
    pixels = v2.functional.pil_to_tensor(labels).flatten(1).T.float()
    votes = nn.functional.one_hot(torch.cdist(pixels, COLORS).argmin(1), len(COLORS)).T.float()
    votes = votes.reshape(1, -1, labels.height, labels.width)
    return nn.functional.interpolate(votes, (SIZE, SIZE), mode="area")[0].argmax(0)


def load_pairs(folder):
    """{stem: (photograph, classes)} of pairs: the left half uint8 (3, SIZE, SIZE), the right."""
    pairs = {}
    for file in list_images(folder):
        pair = load_rgb(file)
        middle = pair.width // 2
        labels = decode(pair.crop((middle, 0, *pair.size)))
        pairs[file.stem] = FIT(pair.crop((0, 0, middle, pair.height))), tv_tensors.Mask(labels)
    if not pairs:
        raise UserError(f"no images in {folder}; --data-root is the folder that holds facades")
    return pairs


def convolutions(inputs, outputs, stride=1):
    """Two convolutions of 3x3, each with batch norm and ReLU; the first has the stride."""
    first = ops.Conv2dNormActivation(inputs, outputs, stride=stride)
    return nn.Sequential(first, ops.Conv2dNormActivation(outputs, outputs))


class Skip(nn.Sequential):
    """What its layers make of x, and x."""

    def forward(self, x):
        return torch.cat([super().forward(x), x], 1)


def trained_reader(pairs, seed):
    """A reader in eval mode: photographs (N, 3, SIZE, SIZE) in [-1, 1] to logits of 12 classes."""
    torch.manual_seed(seed)
    levels, up = [], nn.Upsample(scale_factor=2, mode="bilinear")
    for a, b in ((256, 256), (128, 256), (64, 128), (32, 64)):
        levels = [Skip(convolutions(a, b, 2), *levels, up), convolutions(a + b, a)]
    reader = nn.Sequential(convolutions(3, 32, 2), *levels, nn.Conv2d(32, 12, 1), up)
    data = zlib.crc32(b"".join(array.numpy().tobytes() for pair in pairs for array in pair))
    file = CACHE / f"{data:08x}-epochs-{EPOCHS}-seed-{seed}.pt"
    if file.exists():
        reader.load_state_dict(torch.load(file, weights_only=True))
        return reader.eval()
    options = {"collate_fn": lambda batch: default_collate([AUGMENT(*pair) for pair in batch])}
    loader = DataLoader(pairs, BATCH, shuffle=True, drop_last=True, **options)
    optimizer = torch.optim.AdamW(reader.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, EPOCHS * len(loader))
    for epoch in range(EPOCHS):
        for photos, classes in loader:
            loss = nn.functional.cross_entropy(reader(photos / 127.5 - 1), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"reader {seed}: epoch {epoch + 1}/{EPOCHS}, loss {loss:.3f}", file=sys.stderr)
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save(reader.state_dict(), f"{file}.tmp")
    Path(f"{file}.tmp").replace(file)
    return reader.eval()


def scores(predicted, classes):
    """Accuracy over pixels; accuracy and IoU, the means over the classes that `classes` has."""
    counts = torch.bincount((12 * classes + predicted).flatten(), minlength=144).view(12, 12)
    right, truth, found = counts.diag(), counts.sum(1), counts.sum(0)
    classwise = torch.stack([right / truth, right / (truth + found - right)])[:, truth > 0]
    return [right.sum().item() / classes.numel(), *classwise.mean(1).tolist()]


def main(argv=None):
    args = parse_args(argv)
    train, test = (load_pairs(args.data_root / "facades" / split) for split in ("train", "test"))
    average = torch.stack([photo for photo, _ in train.values()]).float().mean(0).byte()
    sets = {"real test photographs": {stem: photo for stem, (photo, _) in test.items()}}
    sets["mean training photograph"] = dict.fromkeys(test, average)
    torch.manual_seed(0)
    sets["noise"] = {stem: torch.randint_like(average, 256) for stem in test}
    for folder in args.folders:
        files = [file for file in list_images(folder) if file.stem in test]
        sets[str(folder)] = {file.stem: FIT(load_rgb(file)) for file in files}
        if not files:
            raise UserError(f"{folder} has no image with the stem of a test pair of facades")
    readers = [trained_reader(list(train.values()), seed) for seed in range(args.seeds)]
    print("| images | number | pixel accuracy | class accuracy | IoU |\n" + "|---" * 5 + "|")
    for name, images in sets.items():
        classes = torch.stack([test[stem][1] for stem in images])
        batches = (torch.stack(list(images.values())) / 127.5 - 1).split(BATCH)
        each = (scores(torch.cat([r(x).argmax(1) for x in batches]), classes) for r in readers)
        sets[name] = dict(zip(("pixel", "class", "iou"), zip(*each, strict=True), strict=True))
        cells = (f"{mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in sets[name].values())
        print(f"| {name} | {len(images)} | {' | '.join(cells)} |")
    if args.json:
        args.json.write_text(json.dumps(sets, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"label_score.py: error: {error}", file=sys.stderr)
        sys.exit(2)
