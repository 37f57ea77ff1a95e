"""Extraction against the machine's matrix products, and features while the audio comes in.

    python benchmarks/extract.py

Extraction is the whole process of extract_features.py, its start included, on utterances as long as
LibriSpeech's. Streaming is on one core: APCModel.stream() on one utterance, chunk by chunk; a
real-time factor of 0.01 means that one core keeps up with 100 streams.
"""

import argparse
import os
import tempfile

import numpy as np
import torch

import common
from utils import choose_device


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--utterances", type=int, default=320, help="of the corpus")
    add("--frames", type=int, default=2000, help="of the stream, in each chunk size")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to extract")
    add("--work_dir", metavar="DIR", help="for the files (default: the system's temporary folder)")
    return parser


def stream(chunk, num_frames):
    """Seconds of each chunk of a stream."""
    model = common.build_model("cpu").eval()
    frames = torch.randn(1, num_frames, common.MEL_DIM)
    state, seconds = None, []
    for start in range(0, num_frames, chunk):

        def step(inputs=frames[:, start : start + chunk]):
            nonlocal state
            _, _, state = model.stream(inputs, state)

        seconds.append(common.clock(step))
    return np.array(seconds)


def main():
    args = build_parser().parse_args()
    device = choose_device(args.device)
    common.start(device)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        lengths = common.librispeech_lengths(args.utterances).clip(max=1600)
        data_dir, model_path = os.path.join(folder, "data"), os.path.join(folder, "model.pt")
        common.make_folder(data_dir, lengths, max_seq_len=1600)
        torch.save(common.build_model("cpu").state_dict(), model_path)
        rate = common.matmul_rate(device)
        seconds, memory, _ = common.run_script(
            os.path.join(common.ROOT, "extract_features.py"),
            *("--checkpoint", model_path, "--residual", "--data_dir", data_dir),
            *("--save_dir", os.path.join(folder, "features"), "--device", device.type),
        )
    rate = max(rate, common.matmul_rate(device))
    speed = lengths.sum() / seconds
    part = speed * common.flop_per_frame(common.build_model("cpu"), training=False) / rate
    absolute = f"{speed:.0f} frames/s, {seconds:.1f} s, {memory / 1e6:.0f} MB"
    absolute += f"; products {rate / 1e9:.0f} GFLOP/s"
    common.row("extraction, whole process", "float32 matrix products", f"{part:.2f}", absolute)

    torch.set_num_threads(1)
    with torch.inference_mode():
        for chunk in (1, 10, 100):
            stream(chunk, 10 * chunk)
            seconds = stream(chunk, args.frames)
            factor = f"{seconds.sum() / (args.frames * 0.01):.4f}"
            median, slow = np.percentile(seconds * 1000, [50, 99])
            absolute = f"{median:.2f} ms a chunk, 99 % within {slow:.2f} ms"
            stage = f"streaming, chunks of {chunk} frame{'s' * (chunk > 1)}, one core"
            common.row(stage, "real time", factor, absolute)


if __name__ == "__main__":
    main()
