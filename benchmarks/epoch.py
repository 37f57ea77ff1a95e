"""A whole epoch of train.py against the bare step on the same batches, and as the corpus grows.

    python benchmarks/epoch.py

The epoch is all that train.py does between two validations: loader, steps, logging. Its model is
the usual one (3 layers of 512); the medians of --rounds epochs count. How an epoch grows with the
corpus is seen with a small model, which leaves the rest of the work nowhere to hide.
"""

import argparse
import os
import statistics
import tempfile
from functools import partial

import numpy as np

import common
import train
from utils import choose_device


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--utterances", type=int, default=128, help="of the corpus, of 100 to 400 frames")
    add("--rounds", type=int, default=3, help="epochs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add("--work_dir", metavar="DIR", help="for the corpus (default: the system's temporary folder)")
    return parser


def bare_steps(run, batches):
    for inputs, lengths, _ in batches:
        inputs, lengths = inputs.to(run.device), lengths.to(run.device)
        common.bare_step(run.model, run.optimizer, inputs, lengths, run.seq_len)


def run_epochs(folder, corpus, count, device, bare=False, flags=()):
    """Train as train.py does -> [seconds] of epochs, of their ends, of the bare steps; frames."""
    epochs, ends, bare_epochs, frames = [], [], [], []
    path = os.path.join(folder, "logs", corpus)
    args = train.parse_args(
        ["--librispeech_path", folder, "--train_split", corpus, "--valid_split", "valid"]
        + ["--rnn_residual", "--device", device.type, *flags]
    )
    with common.quiet():
        run = train.Run(args, path, set(), 0, 1, device)
        train.open_folder(run)
        for _ in range(count):
            if bare:  # on the batches that the epoch will have
                run.train_loader.batch_sampler.set_epoch(run.state["epoch"])
                batches = list(run.train_loader)
                frames.append(sum(int(lengths.sum()) for _, lengths, _ in batches))
                bare_epochs.append(common.clock(partial(bare_steps, run, batches), device))
            epochs.append(common.clock(partial(train.train_epoch, run), device))
            ends.append(common.clock(partial(train.end_epoch, run), device))
    return epochs, ends, bare_epochs, frames


def main():
    args = build_parser().parse_args()
    device = choose_device(args.device)
    common.start(device)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        sizes = {"valid": 32, "corpus": args.utterances, "small": 160, "large": 1600}
        for name, size in sizes.items():
            lengths = random.integers(100, 400, size)
            common.make_folder(os.path.join(folder, name), lengths, max_seq_len=400)

        epochs, ends, bare, frames = run_epochs(folder, "corpus", args.rounds, device, bare=True)
        seconds, bare_seconds = statistics.median(epochs), statistics.median(bare)
        absolute = f"{seconds:.2f} s, {frames[0] / seconds:.0f} frames/s; bare {bare_seconds:.2f} s"
        common.row("epoch of train.py", "bare steps", f"{seconds / bare_seconds:.2f}", absolute)
        absolute = f"{statistics.median(ends):.2f} s: {sizes['valid']} utterances, checkpoints"
        ratio = f"{statistics.median(ends) / seconds:.2f}"
        common.row("epoch's end", "the epoch", ratio, absolute)

        flags = ["--rnn_num_layers", "1", "--rnn_hidden_size", "64"]
        small, large = (
            min(run_epochs(folder, name, 2, device, flags=flags)[0]) for name in ("small", "large")
        )
        growth = f"{large / small / 10:.2f}"
        absolute = f"{small:.2f} s, {large:.2f} s for {sizes['small']}, {sizes['large']} utterances"
        common.row("epoch, corpus 10 times as large", "10 epochs", growth, absolute)


if __name__ == "__main__":
    main()
