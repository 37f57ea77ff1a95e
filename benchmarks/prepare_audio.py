"""Preparing audio against only kaldi-native-fbank, on all cores.

    python benchmarks/prepare_audio.py
    python benchmarks/prepare_audio.py --format wav
    python benchmarks/prepare_audio.py --format mp3      # of 48 kHz, resampled

prepare_data.py decodes files, computes the features, normalises them by speaker and writes padded
tensors. The other side computes the features of samples that are in memory already, and drops them.
Start-up is not counted. Times are the best of --rounds rounds, in which the sides take turns.
"""

import argparse
import multiprocessing
import os
import tempfile
from functools import partial

import kaldi_native_fbank
import numpy as np
import soundfile

import common
import prepare_data
from formats import fbank

SECONDS, RATE = 12, 16000


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--utterances", type=int, default=600, help="of 12 seconds")
    add("--format", choices=["flac", "wav", "mp3"], default="flac", help="of the files")
    add("--rounds", type=int, default=3, help="rounds, of which the best counts")
    add("--work_dir", metavar="DIR", help="for the files (default: the system's temporary folder)")
    return parser


def speech_like(random, rate):
    """Syllables of filtered noise, int16: it compresses about as well as speech does."""
    time = np.arange(SECONDS * rate) / rate
    noise = np.convolve(random.standard_normal(len(time)), np.hanning(24), "same")
    loudness = np.sin(2 * np.pi * (3 + random.random()) * time).clip(0.01) ** 2
    return (noise * loudness * 600).clip(-32768, 32767).astype(np.int16)


def fbank_alone(samples):
    """kaldi-native-fbank, fed and read in the fastest way that its binding has -> frames."""
    options = fbank._options(tuple(fbank.fbank_settings().items()))
    extractor = kaldi_native_fbank.OnlineFbank(options)
    extractor.accept_waveform(RATE, memoryview(samples))
    extractor.input_finished()
    frames = [extractor.get_frame(i) for i in range(extractor.num_frames_ready)]
    return len(frames)


def part_alone(part):
    return sum(fbank_alone(SAMPLES[i % len(SAMPLES)]) for i in part)


def main():
    args = build_parser().parse_args()
    common.start()
    random = np.random.default_rng(0)
    global SAMPLES  # forked processes have them without their being sent
    rate = 48000 if args.format == "mp3" else RATE
    signals = [speech_like(random, RATE) for _ in range(20)]
    SAMPLES = [signal.astype(np.float32) for signal in signals]
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        source = os.path.join(folder, "audio")
        for speaker in range(10):
            os.makedirs(os.path.join(source, f"{speaker}"))
        files = [os.path.join(folder, f"{i}.{args.format}") for i in range(len(signals))]
        for file, signal in zip(files, signals):
            signal = signal if rate == RATE else speech_like(random, rate)
            soundfile.write(file, signal, rate)
        for number in range(args.utterances):
            path = os.path.join(source, f"{number % 10}", f"{number:05d}.{args.format}")
            os.link(files[number % len(files)], path)
        size = args.utterances * sum(map(os.path.getsize, files)) / len(files)

        cores = common.num_cores()
        chunks = np.array_split(np.arange(args.utterances), 8 * cores)
        ours, alone = [], []
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            for i in range(args.rounds):
                alone.append(common.clock(partial(pool.map, part_alone, chunks, 1)))
                save_dir = os.path.join(folder, f"tensors{i}")
                flags = ["--librispeech_from_audio", source, "--save_dir", save_dir, "--resample"]
                os.sync()  # neither side must wait for others' bytes
                with common.quiet():
                    ours.append(common.clock(partial(prepare_data.main, flags)))
    hours = args.utterances * SECONDS / 3600
    absolute = (
        f"{hours / min(ours) * 60:.2f} against {hours / min(alone) * 60:.2f} hours per minute; "
        f"{size / hours / 1e6:.0f} MB an hour"
    )
    ratio = f"{min(alone) / min(ours):.2f}"
    common.row(f"{args.format} to tensors", f"fbank only, {cores} processes", ratio, absolute)


if __name__ == "__main__":
    main()
