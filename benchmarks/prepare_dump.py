"""Preparing a text dump against parsing it line by line with float(), and its peak memory.

    python benchmarks/prepare_dump.py

The dump is made up: noise, six decimals a number. Both sides read it from the file and write padded
tensors; start-up is not counted. Times are the best of --rounds rounds, in which the sides take
turns.
"""

import argparse
import os
import tempfile
from functools import partial

import numpy as np
import torch

import common
import prepare_data

MAX_SEQ_LEN = 1600


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--utterances", type=int, default=400, help="of the dump, each of 1000 frames")
    add("--num_workers", type=int, default=2, help="of prepare_data.py")
    add("--rounds", type=int, default=2, help="rounds, of which the best counts")
    add("--work_dir", metavar="DIR", help="for the files (default: the system's temporary folder)")
    return parser


def write_dump(path, utterances):
    random = np.random.default_rng(0)
    bodies = []
    for _ in range(10):
        rows = random.standard_normal((1000, common.MEL_DIM)).tolist()
        bodies.append("".join("  " + " ".join(f"{x:.6f}" for x in row) + "\n" for row in rows))
    with open(path, "w", encoding="utf-8") as file:
        for number in range(utterances):
            file.write(f"utt-{number:05d}\n{bodies[number % 10]}.\n")


def line_by_line(path, save_dir):
    """The original's way, with the errors of its script mended."""
    os.makedirs(save_dir)
    utt_id, frames = None, []
    with open(path, encoding="utf-8") as file:
        for line in file:
            words = line.strip().split()
            if words == ["."]:
                frames = torch.FloatTensor(frames)[:MAX_SEQ_LEN]
                padding = (0, 0, 0, MAX_SEQ_LEN - len(frames))
                frames = torch.nn.functional.pad(frames, padding)
                torch.save(frames, os.path.join(save_dir, f"{utt_id}.pt"))
            elif len(words) == 1:
                utt_id, frames = words[0], []
            else:
                frames.append([float(word) for word in words])


def main():
    args = build_parser().parse_args()
    common.start()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        dump, short_dump = os.path.join(folder, "dump"), os.path.join(folder, "short")
        write_dump(dump, args.utterances)
        write_dump(short_dump, args.utterances // 4)
        numbers = args.utterances * 1000 * common.MEL_DIM

        def flags(source, name):
            return [
                "--librispeech_from_kaldi",
                source,
                "--save_dir",
                os.path.join(folder, name),
            ] + ["--max_seq_len", str(MAX_SEQ_LEN), "--num_workers", str(args.num_workers)]

        ours, original = [], []
        for i in range(args.rounds):
            os.sync()  # neither side must wait for others' bytes
            save_dir = os.path.join(folder, f"original{i}")
            original.append(common.clock(partial(line_by_line, dump, save_dir)))
            os.sync()
            with common.quiet():
                ours.append(common.clock(partial(prepare_data.main, flags(dump, f"ours{i}"))))
        seconds = min(ours)
        absolute = f"{numbers / seconds / 1e6:.1f}, {numbers / min(original) / 1e6:.1f} M numbers/s"
        stage = f"text dump, {args.num_workers} workers"
        ratio = f"{min(original) / seconds:.1f}"
        common.row(stage, "line by line with float()", ratio, absolute)

        script = os.path.join(common.ROOT, "prepare_data.py")
        _, memory, _ = common.run_script(script, *flags(dump, "dump-memory"))
        _, short_memory, _ = common.run_script(script, *flags(short_dump, "short-memory"))
        absolute = f"{memory / 1e6:.0f} MB in {args.num_workers + 1} processes"
        ratio = f"{memory / short_memory:.2f}"
        common.row("peak memory, text dump", "a quarter of the dump", ratio, absolute)


if __name__ == "__main__":
    main()
