"""Turn log-Mel features from Kaldi into a folder of padded tensors, one an utterance.

    python prepare_data.py --librispeech_from_kaldi train.blogmel.xz --save_dir data/train-clean-360
    xzcat train.blogmel.xz | python prepare_data.py --librispeech_from_kaldi - --save_dir data/x

The folder gets <utt_id>.pt, float32 (max_seq_len, mel_dim), prepared.json (how it was made), and
at last lengths.pkl, a dict {'<utt_id>.pt': frames}: a folder without it is unfinished.
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import pickle
from functools import partial

from utils import UserError, __version__, positive, run


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_argument_group("source")
    source.add_argument(
        "--librispeech_from_kaldi",
        default="./librispeech_data/kaldi/dev-clean-hires-norm.blogmel",
        metavar="PATH",
        help="text dump of log-Mel features: plain, .xz, .gz, or - for standard input",
    )
    target = parser.add_argument_group("target")
    target.add_argument(
        "--max_seq_len",
        type=positive,
        default=1600,
        help="frames of every tensor: utterances are truncated or zero-padded to this",
    )
    target.add_argument(
        "--save_dir",
        default="./librispeech_data/preprocessed/dev-clean",
        help="folder for the tensors",
    )
    target.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the finished set that save_dir holds",
    )
    parser.add_argument(
        "--num_workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="processes that parse and write",
    )
    return parser


if __name__ == "__main__":
    build_parser().parse_args()  # --help must not wait for torch

import torch
from tqdm import tqdm

import checkpoint
import kaldi_io


def save_utterances(job, save_dir, max_seq_len):
    """Run a job, write its utterances -> [(utt_id, frames, mel_dim, where)]. Runs in a worker."""
    done = []
    for utt_id, frames, where in job():
        tensor = torch.zeros(max_seq_len, frames.shape[1])
        kept = frames[:max_seq_len]
        tensor[: len(kept)] = torch.from_numpy(kept)
        # No sync a file: they all are on disk before lengths.pkl says that they are there.
        checkpoint.save(tensor, os.path.join(save_dir, f"{utt_id}.pt"), sync=False)
        done.append((utt_id, len(frames), frames.shape[1], where))
    return done


def run_jobs(jobs, function, num_workers):
    """Yield (position, function(job)) in the order of `jobs`, computed by several processes.

    Few jobs are under way at once, so that memory does not grow with the corpus.
    """
    if num_workers == 1:
        for position, job in jobs:
            yield position, function(job)
        return
    context = multiprocessing.get_context("fork" if os.name == "posix" else None)
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        waiting = collections.deque()
        try:
            for position, job in jobs:
                waiting.append((position, pool.submit(function, job)))
                if len(waiting) > 2 * num_workers:
                    position, future = waiting.popleft()
                    yield position, future.result()
            for position, future in waiting:
                yield position, future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?)") from None
        finally:
            pool.shutdown(cancel_futures=True)


def clear_save_dir(save_dir, overwrite):
    """Make save_dir an empty place for a new set, or raise UserError. Only our own files go."""
    os.makedirs(save_dir, exist_ok=True)
    names = os.listdir(save_dir)
    lengths_path = os.path.join(save_dir, "lengths.pkl")
    tensors = [name for name in names if name.endswith((".pt", ".pt.tmp"))]
    if "lengths.pkl" in names:
        if not overwrite:
            raise UserError(
                f"{save_dir}: holds a finished set: choose another --save_dir, or --overwrite it"
            )
        os.remove(lengths_path)
    elif tensors and "prepared.json" not in names and not overwrite:
        raise UserError(
            f"{save_dir}: holds {len(tensors)} .pt files that are not of an unfinished set: choose "
            "another --save_dir, or --overwrite them"
        )
    for name in tensors:
        os.remove(os.path.join(save_dir, name))


def main(argv=None):
    args = build_parser().parse_args(argv)
    source = args.librispeech_from_kaldi
    size, jobs = kaldi_io.read_dump(source)
    # The first block is read before anything on disk changes: it may be no dump at all.
    first = next(jobs)
    clear_save_dir(args.save_dir, args.overwrite)
    print(
        f"preparing {source} ({'a stream' if size is None else f'{size / 1e6:.1f} MB'}) -> "
        f"{args.save_dir}: text dump, max_seq_len {args.max_seq_len}, {args.num_workers} workers"
    )
    prepared = {
        "source": "kaldi",
        "format": "text dump",
        "path": source,
        "cmvn": "none",
        "mel_dim": None,
        "max_seq_len": args.max_seq_len,
        "version": __version__,
    }
    prepared_path = os.path.join(args.save_dir, "prepared.json")
    checkpoint.write_json(prepared, prepared_path)

    lengths = {}
    frames = 0
    save = partial(save_utterances, save_dir=args.save_dir, max_seq_len=args.max_seq_len)
    bar = tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True)
    with bar:
        for position, done in run_jobs(_chain(first, jobs), save, args.num_workers):
            for utt_id, num_frames, mel_dim, where in done:
                if f"{utt_id}.pt" in lengths:
                    raise UserError(f"{where}: utterance {utt_id}: this id was there before")
                prepared["mel_dim"] = prepared["mel_dim"] or mel_dim
                if mel_dim != prepared["mel_dim"]:
                    raise UserError(
                        f"{where}: utterance {utt_id}: expected frames of {prepared['mel_dim']} "
                        f"numbers, as in the utterances before, found {mel_dim}"
                    )
                lengths[f"{utt_id}.pt"] = min(num_frames, args.max_seq_len)
                frames += num_frames
            bar.set_postfix(utterances=len(lengths), refresh=False)
            bar.update(position - bar.n)

    checkpoint.write_json(prepared, prepared_path)
    os.sync()  # a crash of the machine must not leave lengths.pkl without its tensors
    with checkpoint.atomic_write(os.path.join(args.save_dir, "lengths.pkl")) as file:
        pickle.dump(lengths, file, protocol=4)
    truncated = frames - sum(lengths.values())
    print(
        f"{args.save_dir}: {len(lengths)} utterances, {frames} frames ({frames / 360000:.2f} h at "
        f"10 ms), mel_dim {prepared['mel_dim']}; {truncated} frames beyond max_seq_len were cut"
    )


def _chain(first, rest):
    yield first
    yield from rest


if __name__ == "__main__":
    run(main)
