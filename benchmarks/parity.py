"""Compares the losses of the first steps between devices and precisions, with the same weights,
images and order, and nothing random: no dropout, no image buffer, all patches of CUT.

    python benchmarks/parity.py --method CUT
    python benchmarks/parity.py --method cycleGAN --data-folder facades_unpaired --steps 20

The reference is fp32 on the CPU. Each configuration has a process of its own, so that one that
fails costs its row only. A row holds the largest relative difference of any loss at some steps. The
first step shows the arithmetic alone; later ones also how a GAN amplifies it. The exit status is 1
if a first step differs by more than its tolerance. --check-nccl: the processes' sums instead.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA_FOLDERS = {"pix2pix": "facades", "cycleGAN": "facades_unpaired", "CUT": "facades_unpaired"}
TOLERANCES = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 0.1}  # of the first step
CONFIGS = ["fp32", "tf32", "bf16", "fp32+compile", "bf16+compile", "fp32+graph", "bf16+graph"]


def parse_args():
    """The flags; those after -- are for train.py, as `rest`."""
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("parity.py", None, __doc__, formatter_class=style)
    add = parser.add_argument
    add("--method", choices=[*DATA_FOLDERS], required=True)
    add("--configs", nargs="+", default=CONFIGS, help="see step_time.py [all but tf32+...]")
    add("--device", default="cuda", help="of the configurations [cuda]")
    add("--steps", type=int, default=50, help="[50]")
    add("--image-size", type=int, default=64, help="pixels [64]")
    add("--data-root", type=Path, default=ROOT / "datasets", help="folder of the datasets")
    add("--data-folder", help="[facades; cycleGAN and CUT: facades_unpaired]")
    add("--one", help=argparse.SUPPRESS)  # how this script calls itself
    add("--check-nccl", action="store_true", help="under torchrun: gradients are averaged right")
    args = parser.parse_args(argv[:end])
    args.flags, args.rest, args.batch_size = argv[:end], argv[end + 1 :], 1
    args.data_folder = args.data_folder or DATA_FOLDERS[args.method]
    return args


def losses_of(name, args):
    """The losses of --steps steps of one configuration, a list of dicts."""
    import torch

    from configuration import Configuration

    args.rest += ["--data-folder", args.data_folder, "--num-workers", "0"]
    args.rest += ["--num-patches", str(args.image_size**2)] if args.method == "CUT" else []
    args.rest += ["--buffer-size", "0"] if args.method != "pix2pix" else []
    config = Configuration(name, args, args.data_root)
    for net in config.nets.values():
        for layer in net.modules() if isinstance(net, torch.nn.Module) else ():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
    data, rows = config.train.build_data(config.args)[0], []
    for step in range(args.steps):
        images = data[1, step % len(data)]
        x, y = (config.train.to_unit(image[None].to(config.device)) for image in images)
        rows.append({name: loss.item() for name, loss in config(x, y).items()})
    return rows


def in_process(name, args, device):
    """As losses_of, in another process; the last line of its errors if it fails."""
    words = [*args.flags, "--device", device, "--one", name, "--", *args.rest]
    words = [sys.executable, __file__, *words]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def difference(row, expected):
    """The largest relative difference of any loss, nan if one is."""
    gaps = [abs(row[name] - value) / max(abs(value), 0.01) for name, value in expected.items()]
    return max(gaps) if all(gap == gap for gap in gaps) else float("nan")


def check_ranks(args):
    """Under torchrun: whether NCCL (gloo on a CPU) averages gradients and gathers CPU tensors."""
    import torch
    from torch import distributed

    from configuration import load_train

    train = load_train(args.method)
    device = train.pick_device(train.parse_args(["--device", args.device]))
    if not distributed.is_initialized():  # pick_device joins two or more processes
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    system = sys.modules[f"{args.method}_system"]
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    gathered = system.gather(torch.full((1,), rank))
    assert [tensor.item() for tensor in gathered] == list(range(world_size))
    weight = torch.nn.Parameter(torch.zeros(3, device=device))
    weight.grad = torch.full_like(weight, rank + 1.0)
    system.WORLD_SIZE = max(2, world_size)  # one process: its gradient counts half
    system.average_gradients([weight])
    mean = 0.5 if world_size == 1 else (world_size + 1) / 2
    assert weight.grad.tolist() == [mean] * 3, weight.grad
    print(f"{distributed.get_backend()}, {world_size} processes: gradients are averaged")
    distributed.destroy_process_group()


def main():
    """Runs the command line. Returns the exit status."""
    args = parse_args()
    if args.one:
        print(json.dumps(losses_of(args.one, args)))
        return 0
    if args.check_nccl:
        check_ranks(args)
        return 0
    reference, status = in_process("fp32", args, "cpu"), 0
    if isinstance(reference, str):
        sys.exit(f"parity.py: error: on the CPU: {reference}")
    steps = [step for step in (1, 2, 5, 10, 20, 50, 100, 200) if step <= args.steps]
    print(f"{args.method}, {args.image_size} px: largest relative difference to fp32 on the CPU\n")
    print(
        f"| on {args.device}, step | {' | '.join(map(str, steps))} |\n|{'---|' * (len(steps) + 1)}"
    )
    for name in args.configs:
        rows = in_process(name, args, args.device)
        if isinstance(rows, str):
            print(f"| {name} | failed: {rows} |", flush=True)
            status = 1
            continue
        gaps = [difference(rows[step - 1], reference[step - 1]) for step in steps]
        print(f"| {name} | {' | '.join(f'{gap:.1e}' for gap in gaps)} |", flush=True)
        if not gaps[0] <= TOLERANCES[name.split("+")[0]]:
            print(f"{name}: the first step differs too much", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
