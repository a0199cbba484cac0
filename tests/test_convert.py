"""convert.py: the authors' networks, restated here with the names that their files have, give the
same images after conversion; foreign files are named; ONNX computes what torch computes."""

import sys
from types import SimpleNamespace

import convert
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, pad

from conftest import METHODS, ROOT, load_script, status_of

NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class AuthorsBlock(nn.Module):
    """One level of the authors' U-Net, which holds the next inside. Level 0 is the outermost."""

    def __init__(self, level, depth, ngf, norm):
        super().__init__()
        self.outermost, innermost = level == 0, level == depth - 1
        width, below = (ngf * min(2**k, 8) for k in (level - 1, level))
        width, bias = 3 if self.outermost else width, norm == "instance"
        down = nn.Conv2d(width, below, 4, 2, 1, bias=bias)
        from_below = below if innermost else 2 * below
        up = nn.ConvTranspose2d(from_below, width, 4, 2, 1, bias=bias or self.outermost)
        layers = [down] if self.outermost else [nn.LeakyReLU(0.2), down]
        if not innermost:
            layers += [] if self.outermost else [NORMS[norm](below)]
            layers += [AuthorsBlock(level + 1, depth, ngf, norm)]
        layers += [nn.ReLU(), up, nn.Tanh() if self.outermost else NORMS[norm](width)]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        y = self.model(x)
        return y if self.outermost else torch.cat([x, y], 1)


def authors_unet(depth=5, ngf=4, norm="batch"):
    net = nn.Sequential()
    net.add_module("model", AuthorsBlock(0, depth, ngf, norm))
    return net


class AuthorsBlur(nn.Module):
    """Downsample, 3x3, or Upsample, 4x4, of the authors' CUT."""

    def __init__(self, channels, row):
        super().__init__()
        row = torch.tensor(row) / 4
        self.register_buffer("filt", (row[:, None] * row).repeat(channels, 1, 1, 1))

    def forward(self, x):
        if self.filt.shape[3] == 3:
            return conv2d(pad(x, [1] * 4, "reflect"), self.filt, stride=2, groups=x.shape[1])
        x = pad(x, [1] * 4, "replicate")
        return conv_transpose2d(x, self.filt, stride=2, groups=x.shape[1])[..., 3:-3, 3:-3]


class AuthorsResnetBlock(nn.Module):
    def __init__(self, channels, norm, dropout):
        super().__init__()

        def half():
            return [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), norm(channels)]

        between = [nn.ReLU(), nn.Dropout(0.0)] if dropout else [nn.ReLU()]
        self.conv_block = nn.Sequential(*half(), *between, *half())

    def forward(self, x):
        return x + self.conv_block(x)


def authors_resnet(blocks=2, ngf=4, down=False, up=False, norm="instance", dropout=False):
    norm = NORMS[norm]
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), norm(ngf), nn.ReLU()]
    for width in (2 * ngf, 4 * ngf):
        layers += [nn.Conv2d(width // 2, width, 3, 1 if down else 2, 1), norm(width), nn.ReLU()]
        layers += [AuthorsBlur(width, [1.0, 2.0, 1.0])] if down else []
    layers += [AuthorsResnetBlock(4 * ngf, norm, dropout) for _ in range(blocks)]
    for width in (2 * ngf, ngf):
        if up:
            layers += [AuthorsBlur(2 * width, [1.0, 3.0, 3.0, 1.0])]
            layers += [nn.Conv2d(2 * width, width, 3, 1, 1)]
        else:
            layers += [nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1)]
        layers += [norm(width), nn.ReLU()]
    layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh()]
    net = nn.Sequential()
    net.add_module("model", nn.Sequential(*layers))
    return net


def write_authors(net, path, old=False):
    """Random weights, saved in an odd order; old: as PyTorch before 0.4 did, from several GPUs."""
    torch.manual_seed(3)
    for p in net.parameters():
        p.data.normal_(std=1 if p.dim() == 1 else p[0].numel() ** -0.5)
    state = {("module." * old) + key: tensor for key, tensor in reversed(net.state_dict().items())}
    if old:
        for name, layer in net.named_modules():
            if isinstance(layer, nn.InstanceNorm2d):
                state[f"module.{name}.running_mean"] = torch.rand(layer.num_features)
    torch.save(state, path, _use_new_zipfile_serialization=not old)


def load_converted(monkeypatch, path, *flags):
    """(G, multiple) as the method's translate.py loads it."""
    method = torch.load(path, weights_only=True)["method"]
    monkeypatch.setitem(sys.modules, "train", load_script(method))
    module, flags = load_script(method, "translate"), [*flags]
    words = ["--checkpoint", str(path), "--input", "i", "--output", "o", *flags]
    return module.load_generator(module.parse_args(words), torch.device("cpu"))


def error_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert.py: error: ")
    return line


UNETS = [{"depth": 5}, {"depth": 7, "ngf": 3}, {"depth": 6, "norm": "instance"}]
RESNETS = [{"blocks": 3, "ngf": 6}, {"down": True, "up": True}, {"dropout": True}]
FILES = [("pix2pix", k) for k in UNETS] + [(m, k) for m in ("cycleGAN", "CUT") for k in RESNETS]


@torch.no_grad()
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("method, kind", [file for file in FILES if file[0] in METHODS])
def test_the_authors_weights_give_the_authors_images(method, kind, old, tmp_path, monkeypatch):
    net = authors_unet(**kind) if method == "pix2pix" else authors_resnet(**kind)
    write_authors(net, tmp_path / "latest_net_G.pth", old)
    words, flags = [str(tmp_path / "latest_net_G.pth"), str(tmp_path / "new" / "G.pt")], []
    if method == "pix2pix":
        flags = ["--no-dropout"]
    else:
        words += ["--method", method]
    assert convert.main(words) == 0
    G, multiple, _ = load_converted(monkeypatch, tmp_path / "new" / "G.pt", *flags)
    if kind.get("depth") == 7:  # the authors have dropout on layers 2 to 4 of 8, 2 and 3 of 7
        found = [any(isinstance(layer, nn.Dropout) for layer in up) for up in G.args[0].up]
        assert found == [False, True, True, False, False, False]
    x = torch.rand(1, 3, max(32, multiple), max(64, multiple)) * 2 - 1
    expected = net(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(G(x), expected, rtol=1e-3, atol=1e-4)


def test_a_resnet_becomes_cyclegan_or_cut_and_has_no_f(tmp_path, monkeypatch, capsys):
    for name, method, blurs in (("plain", "cycleGAN", False), ("blurred", "CUT", True)):
        if method in METHODS:
            write_authors(authors_resnet(down=blurs, up=blurs), tmp_path / f"{name}.pth")
            assert convert.main([str(tmp_path / f"{name}.pth"), str(tmp_path / f"{name}.pt")]) == 0
            assert f"python {method}/translate.py" in capsys.readouterr().out
            words = [str(tmp_path / f"{name}.pt"), str(tmp_path / "G.onnx"), "--direction", "y2x"]
            assert convert.main(words) == 2
            assert "has no F" in error_line(capsys)


def test_foreign_files_are_called_what_they_are(tmp_path, capsys):
    unet, resnet = authors_unet(6).state_dict(), authors_resnet().state_dict()
    cut = {key: tensor for key, tensor in unet.items() if not key.startswith("model.model.3")}
    gray = {k: v[:, :1] if k == "model.1.weight" else v for k, v in resnet.items()}
    file, output = tmp_path / "file.pth", tmp_path / "G.pt"
    for content, words in (
        (nn.Conv2d(3, 3, 3), "pickled Python objects"),
        ({"state_dict": unet, "epoch": 3}, "'state_dict'"),
        ({"netG": unet, "netD": resnet}, "netG, netD"),
        ({"method": "CUT", "args": {}, "G": resnet}, "checkpoint already"),
        ([unet], "contains a list"),
        ({"weight": "text"}, "no weights"),
        ({}, "no weights"),
        (nn.Linear(3, 3).state_dict(), "0 convolutions"),
        (nn.Conv2d(3, 64, 4).state_dict(), "1 convolutions, the first (64, 3, 4, 4)"),
        (authors_resnet(norm="batch").state_dict(), "without instance norm"),
        (authors_resnet(down=True).state_dict(), "anti-aliasing"),
        (cut, "other layers"),
        (gray, "the first (4, 1, 7, 7)"),
        (b"not torch", "damaged"),
    ):
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        assert convert.main([str(file), str(output)]) == 2
        error = error_line(capsys)
        assert words in error and str(file) in error
    assert convert.main([str(tmp_path / "none.pth"), str(output)]) == 2
    assert convert.main([str(file), str(file.with_suffix(".onnx"))]) == 2
    assert not output.exists()


def test_a_missing_folder_and_an_existing_output(tmp_path, monkeypatch, capsys):
    write_authors(authors_unet(), tmp_path / "G.pth")
    monkeypatch.setattr(convert, "ROOT", tmp_path)
    assert convert.main([str(tmp_path / "G.pth"), str(tmp_path / "G.pt")]) == 2
    assert f"needs the folder {tmp_path / 'pix2pix'}" in error_line(capsys)
    (tmp_path / "G.pt").write_bytes(b"mine")
    assert convert.main([str(tmp_path / "G.pth"), str(tmp_path / "G.pt")]) == 2
    assert "exists" in error_line(capsys) and (tmp_path / "G.pt").read_bytes() == b"mine"


def test_a_mistyped_flag_is_one_line(capsys):
    assert status_of(convert.main, "G.pth", "G.pt", "--methd", "CUT") == 2
    assert "--methd" in error_line(capsys)


# ------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("name", [n for n in ("pix2pix", "CUT-antialias") if n[:3] in str(METHODS)])
def test_onnx_gives_torchs_images_at_any_size(name, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    checkpoint, file = ROOT / "tests" / "old_checkpoints" / f"{name}.pt", tmp_path / "G.onnx"
    assert convert.main([str(checkpoint), str(file)]) == 0
    assert capsys.readouterr().out.count("onnxruntime differs from torch by") == 2
    assert [f.name for f in tmp_path.iterdir()] == ["G.onnx"]  # one file, weights inside
    session = runtime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, "height", "width"]
    G, _ = convert.read_generator(checkpoint, convert.read(checkpoint), "x2y")
    x = torch.rand(1, 3, 32, 160) * 2 - 1
    with torch.no_grad():
        y = G(x)
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(found, y, rtol=1e-3, atol=1e-4)


def test_missing_packages_and_a_wrong_onnx_model(monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    proto = SimpleNamespace(SerializeToString=lambda: b"")
    session = SimpleNamespace(run=lambda _, feed: [feed["x"] + 0.1])
    exported = SimpleNamespace(model_proto=proto)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: exported)
    monkeypatch.setattr(runtime, "InferenceSession", lambda *_, **__: session)
    monkeypatch.setattr(convert, "find_spec", lambda name: None if "script" in name else True)
    with pytest.raises(convert.UserError, match="pip install onnxscript"):
        convert.export_onnx(nn.Identity(), 4)
    monkeypatch.setattr(convert, "find_spec", lambda _: True)
    with pytest.raises(convert.UserError, match="onnxruntime differs from torch"):
        convert.export_onnx(nn.Identity(), 4)
