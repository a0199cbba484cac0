"""The configurations that the benchmarks compare: the step of <method>/train.py, imported, in a
precision, compiled, as a CUDA graph, or without any saving (plain.py)."""

import importlib.util
import sys
from pathlib import Path

import torch

import plain

ROOT = Path(__file__).resolve().parent.parent


def load_train(method):
    """The module <method>/train.py: the real step, imported."""
    sys.path.insert(0, str(ROOT / method))
    spec = importlib.util.spec_from_file_location(f"{method}_train", ROOT / method / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Configuration:
    """One way to run a step: config(x, y) runs it. name: "plain", or parts joined by +."""

    def __init__(self, name, args, data_root="."):
        self.parts, self.method = name.split("+"), args.method
        self.train = load_train(args.method)
        precision = next((p for p in self.parts if p in ("tf32", "bf16")), "fp32")
        flags = ["--image-size", str(args.image_size), "--batch-size", str(args.batch_size)]
        flags += ["--device", args.device, "--precision", precision]
        flags += ["--data-root", str(data_root), "--data-folder", "noise"]
        flags += ["--compile"] if "compile" in self.parts else []
        self.args = self.train.parse_args([*flags, *args.rest])
        self.device = self.train.pick_device(self.args)  # which also sets TF32
        if "graph" in self.parts and self.device.type != "cuda":
            raise self.train.UserError(f"graph needs a CUDA device; this is {self.device}")
        torch.manual_seed(0)
        self.nets = self.train.build(self.args, self.device)
        if name == "plain":
            self.nets = plain.with_default_adam(self.nets, self.args)
        for net in self.nets.values() if "channels-last" in self.parts else ():
            if isinstance(net, torch.nn.Module):
                net.to(memory_format=torch.channels_last)
        self.graph = None

    def __call__(self, x, y):
        """The named losses of one step. x, y: (N, 3, H, W) in [-1, 1], on the device."""
        if "channels-last" in self.parts:
            x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
        if "plain" in self.parts:
            return plain.STEPS[self.method](self.train, self.nets, x, y, self.args)
        if "graph" not in self.parts:
            return self.train.training_step(self.nets, x, y, self.args)
        if self.graph is None:
            self.capture(x, y)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.losses

    def capture(self, x, y):
        """One CUDA graph of the whole step. What is random on the host, the choices of an image
        buffer and the flips, is frozen in it: good for timing, not for training."""
        self.x, self.y, stream = x.clone(), y.clone(), torch.cuda.Stream()
        optimizers = [part for name, part in self.nets.items() if name.startswith("optimizer")]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        weights = [weight for group in groups for weight in group["params"]]
        initial = [weight.detach().clone() for weight in weights]
        for group in groups:
            group["capturable"] = True
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.train.training_step(self.nets, self.x, self.y, self.args)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's pinning thread may call CUDA during the capture.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.losses = self.train.training_step(self.nets, self.x, self.y, self.args)
        with torch.no_grad():  # the steps above do not count
            torch._foreach_copy_(weights, initial)
        for optimizer in optimizers:
            for moments in optimizer.state.values():
                for tensor in moments.values():
                    tensor.zero_()
