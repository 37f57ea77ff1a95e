"""Opening a prepared folder of a million utterances and drawing the order of an epoch.

    python benchmarks/open_folder.py

Seconds and peak memory are those of a process of its own, with what it imports. The utterances are
links to one tensor, with lengths like LibriSpeech's cut at 1600 frames.
"""

import argparse
import json
import os
import tempfile

import common
from datasets import BatchSampler, LibriSpeech, Utterances


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--utterances", type=int, default=1_000_000, help="of the folder")
    add("--work_dir", metavar="DIR", help="for the folder (default: the system's temporary folder)")
    add("--open", metavar="FOLDER", help="only open this folder, and print the figures as JSON")
    return parser


def padding(lengths, bucketing):
    """The share of padding in an epoch's batches of 32."""
    sampler = BatchSampler(lengths, batch_size=32, bucketing=bucketing)
    padded = sum(lengths[batch].max() * len(batch) for batch in sampler)
    return 1 - lengths.sum() / padded


def open_folder(path):
    opened, drawn = [], []
    figures = {}
    figures["open"] = common.clock(lambda: opened.append(LibriSpeech(path, time_shift=3)))
    sampler = BatchSampler(Utterances(opened).num_frames, batch_size=32)
    figures["draw"] = common.clock(lambda: drawn.extend(sampler))
    return figures


def main():
    args = build_parser().parse_args()
    if args.open:
        print(json.dumps(open_folder(args.open)))
        return
    common.start()
    lengths = common.librispeech_lengths(args.utterances).clip(max=1600)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        path = os.path.join(folder, "data")
        common.make_folder(path, lengths, max_seq_len=1600)
        _, memory, output = common.run_script(__file__, "--open", path)
    figures = json.loads(output)
    stage = f"{args.utterances} utterances"
    common.row(f"opening {stage}", "-", "-", f"{figures['open']:.2f} s")
    common.row("an epoch's order, bucketed", "-", "-", f"{figures['draw']:.2f} s")
    common.row("both, peak memory", "-", "-", f"{memory / 1e6:.0f} MB")
    buckets, plain = padding(lengths, bucketing=True), padding(lengths, bucketing=False)
    common.row(
        "padding, bucketed",
        "shuffled plainly",
        f"{buckets / plain:.2f}",
        f"{buckets:.3f}, {plain:.3f}",
    )


if __name__ == "__main__":
    main()
