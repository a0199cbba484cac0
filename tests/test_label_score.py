"""experiments/label_score.py: decoding, the scores, and a reader on a small synthetic set."""

import json

import label_score
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

PALETTE = label_score.COLORS.numpy().astype(np.uint8)


def blocks(rng, size=32, cell=16, classes=12):
    """Random classes in blocks of cell x cell pixels, (size, size)."""
    small = rng.integers(0, classes, (size // cell, size // cell))
    return small.repeat(cell, 0).repeat(cell, 1)


@pytest.fixture
def facades(tmp_path, monkeypatch):
    """A set of 32 px whose photographs show each class as a gray level; readers are quick."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 5)):
        (tmp_path / "facades" / split).mkdir(parents=True)
        for index in range(count):
            classes = blocks(rng, classes=3)
            photo = (classes[..., None] * 100 + rng.integers(0, 20, (32, 32, 3))).astype(np.uint8)
            pair = Image.fromarray(np.concatenate([photo, PALETTE[classes]], 1))
            pair.save(tmp_path / "facades" / split / f"{index}.png")
    small = v2.Compose([v2.Resize((32, 32)), v2.PILToTensor()])
    crop = v2.RandomResizedCrop(32, scale=(0.64, 1), ratio=(1, 1))
    for name, value in (("SIZE", 32), ("EPOCHS", 8), ("FIT", small), ("AUGMENT", crop)):
        monkeypatch.setattr(label_score, name, value)
    monkeypatch.setattr(label_score, "CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("size", [128, 256])
def test_classes_survive_compression(tmp_path, size):
    classes = blocks(np.random.default_rng(1), size, 32)
    Image.fromarray(PALETTE[classes]).save(tmp_path / "labels.jpg", quality=80, subsampling=0)
    decoded = label_score.decode(Image.open(tmp_path / "labels.jpg")).numpy()
    assert decoded.shape == (128, 128)
    assert (decoded == classes[:: size // 128, :: size // 128]).mean() > 0.97
    three_of_four = np.tile([[3, 3], [3, 7]], (128, 128))  # where the image shrinks
    assert (label_score.decode(Image.fromarray(PALETTE[three_of_four])) == 3).all()


def numpy_scores(predicted, truth):
    """Of each class that is in truth: accuracy and intersection over union."""
    there = [c for c in range(12) if (truth == c).any()]
    accuracy = [(predicted[truth == c] == c).mean() for c in there]
    both = [((predicted == c) & (truth == c)).sum() for c in there]
    either = [((predicted == c) | (truth == c)).sum() for c in there]
    return [(predicted == truth).mean(), np.mean(accuracy), np.mean(np.divide(both, either))]


@pytest.mark.parametrize("classes", [12, 5])
def test_scores(classes):
    rng = np.random.default_rng(2)
    truth = rng.integers(0, classes, (3, 8, 8))
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 12, truth.shape))
    found = label_score.scores(torch.from_numpy(predicted), torch.from_numpy(truth))
    assert found == pytest.approx(numpy_scores(predicted, truth), rel=1e-6)
    assert label_score.scores(torch.from_numpy(truth), torch.from_numpy(truth)) == [1, 1, 1]


def test_photograph_and_classes_are_augmented_alike(facades):
    photo, classes = label_score.load_pairs(facades / "facades" / "test")["0"]
    torch.manual_seed(0)
    for _ in range(5):
        image, labels = label_score.AUGMENT(photo, classes)
        assert labels.dtype == torch.int64 and labels.shape == (32, 32)
        assert ((image.float().mean(0) / 100).round() == labels).float().mean() > 0.9


def test_ceiling_generated_images_and_floor(facades, capsys, monkeypatch):
    """A folder with the real photographs scores as they do; the numbers are numpy's."""
    test = label_score.load_pairs(facades / "facades" / "test")
    (facades / "made").mkdir()
    for stem, (photo, _) in list(test.items())[:3]:
        v2.functional.to_pil_image(photo).save(facades / "made" / f"{stem}.png")
    made, file = str(facades / "made"), facades / "scores.json"
    words = [made, "--data-root", str(facades), "--seeds", "2", "--json", str(file)]
    label_score.main(words)
    report, table = json.loads(file.read_text()), capsys.readouterr().out
    train = list(label_score.load_pairs(facades / "facades" / "train").values())
    stacks = {"real test photographs": list(test.values()), made: list(test.values())[:3]}
    for name, pairs in stacks.items():
        photos, truth = (torch.stack(side) for side in zip(*pairs, strict=True))
        for seed in range(2):
            reader = label_score.trained_reader(train, seed)
            predicted = reader(photos / 127.5 - 1).argmax(1).numpy()
            found = [report[name][metric][seed] for metric in ("pixel", "class", "iou")]
            assert found == pytest.approx(numpy_scores(predicted, truth.numpy()), rel=1e-5)
    ceiling, floor = report["real test photographs"], report["mean training photograph"]
    assert min(ceiling["pixel"]) > 0.8 > 0.6 > max(floor["pixel"])
    low, high = sorted(report[made]["class"])
    assert f"| {made} | 3 | " in table and f" ({low:.3f} to {high:.3f}) |" in table

    monkeypatch.setattr(torch.optim, "AdamW", None)  # the second time nothing is trained
    label_score.main(words)
    assert json.loads(file.read_text()) == report
    (facades / "facades" / "train" / "0.png").unlink()  # other images need other readers
    with pytest.raises(TypeError):
        label_score.main(words)
    with pytest.raises(label_score.UserError, match="no image with the stem of a test pair"):
        label_score.main([str(facades), *words[1:]])
