"""Training steps of train.py beside busy processes, and as OpenMP would share them over the cores.

    python benchmarks/busy.py

Each figure is the median of --steps steps of 32 utterances of 200 frames (3 GRU layers of 512),
in turn quiet, beside one Python process that does nothing but count, and beside two. Needs a quiet
machine, and is for CPUs alone.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile

import torch

import common
import train

UTTERANCES, FRAMES = 32, 200


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind, after a first")
    return parser


@contextlib.contextmanager
def busy_processes(count):
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main():
    args = build_parser().parse_args()
    common.start()
    with tempfile.TemporaryDirectory() as folder:
        common.make_folder(os.path.join(folder, "data"), [FRAMES], max_seq_len=FRAMES)
        flags = ["--librispeech_path", folder, "--train_split", "data", "--valid_split", "data"]
        flags = train.parse_args([*flags, "--rnn_residual"])
        run = train.Run(flags, "", set(), 0, 1, torch.device("cpu"))
    inputs = torch.randn(UTTERANCES, FRAMES, run.model.mel_dim)
    lengths = torch.full((UTTERANCES,), FRAMES)
    batch = train.Batch(inputs, lengths, [], UTTERANCES, UTTERANCES * FRAMES)

    def frames_per_second():
        times = [common.clock(lambda: train.train_step(run, batch)) for _ in range(args.steps + 1)]
        return batch.frames / statistics.median(times[1:])

    def in_one_share(function, *parts):
        return [function(*parts)]

    quiet = None
    ways = {
        "a share for each core": run.on_each_share,
        "one share, OpenMP's threads": in_one_share,
    }
    for way, run.on_each_share in ways.items():
        for count, beside in enumerate(("quiet", "one busy process", "two busy processes")):
            with busy_processes(count):
                speed = frames_per_second()
            quiet = quiet or speed
            ratio, absolute = f"{speed / quiet:.2f}", f"{speed:.0f} frames/s"
            common.row(f"step, {way}, {beside}", "quiet, a share each", ratio, absolute)


if __name__ == "__main__":
    main()
