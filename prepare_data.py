"""Turn Kaldi features or audio into a folder of padded log-Mel tensors, one for each utterance.

    python prepare_data.py --librispeech_from_audio LibriSpeech/dev-clean --save_dir data/dev-clean
    python prepare_data.py --librispeech_from_kaldi dump/dev-clean.blogmel.xz --save_dir data/dev
    python prepare_data.py --librispeech_from_kaldi data/dev/feats.scp --cmvn speaker \\
        --utt2spk data/dev/utt2spk --save_dir data/dev

The folder gets <utt_id>.pt, float32 (max_seq_len, mel_dim), prepared.json (how it was made), and
at last lengths.pkl, a dict {'<utt_id>.pt': frames}: a folder without it is unfinished.
"""

import argparse
import dataclasses
import itertools
import os
import pickle
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import datasets
from formats import audio, kaldi
from utils import (
    HelpFormatter,
    UserError,
    __version__,
    atomic_write,
    load,
    num_cores,
    positive,
    run_jobs,
    run_main,
    save,
    write_json,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn Kaldi features or audio into a folder of padded log-Mel tensors.",
        formatter_class=HelpFormatter,
    )
    source = parser.add_argument_group("source, one of").add_mutually_exclusive_group()
    source.add_argument(
        "--librispeech_from_kaldi",
        default="./librispeech_data/kaldi/dev-clean-hires-norm.blogmel",
        metavar="PATH",
        help="log-Mel features: a text dump, .ark or .scp; plain, .xz, .gz, - for standard input",
    )
    source.add_argument(
        "--librispeech_from_audio", metavar="DIR", help="folder of .flac and .wav files, any depth"
    )
    add = parser.add_argument_group("features").add_argument
    add(
        "--cmvn",
        choices=audio.CMVN_KINDS,
        help="over what to normalise the mean to 0 (default: speaker for audio; none for Kaldi's "
        "features, which the original's authors had normalised)",
    )
    add("--norm_vars", action="store_true", help="normalise the variance to 1 as well")
    add("--as_s3prl", action="store_true", help="audio: fbank and CMVN exactly as in s3prl")
    add("--utt2spk", metavar="FILE", help="Kaldi's; default: an id up to its first '-'")
    add("--sample_rate", type=positive, default=16000, help="of the audio, Hz")
    add("--dither", type=float, default=0.0, help="noise added to audio; the original had 1")
    add("--skip_bad", action="store_true", help="list bad audio in skipped.txt and go on")
    add = parser.add_argument_group("target").add_argument
    add("--max_seq_len", type=positive, default=1600, help="frames of a tensor: cut or padded to")
    default = "./librispeech_data/preprocessed/dev-clean"
    add("--save_dir", default=default, help="folder for the tensors")
    add("--overwrite", action="store_true", help="replace the finished set that save_dir holds")
    add(
        "--num_workers", type=positive, default=num_cores(), help="processes that compute and write"
    )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    from_audio = args.librispeech_from_audio is not None
    if args.as_s3prl:
        is_its_way = args.cmvn in (None, "utterance") and args.sample_rate == 16000
        if not from_audio or not is_its_way or args.dither:
            parser.error("--as_s3prl is for audio of 16 kHz, --cmvn utterance and no dither")
        args.cmvn, args.norm_vars = "utterance", True
    args.cmvn = args.cmvn or ("speaker" if from_audio else "none")
    if args.norm_vars and args.cmvn == "none":
        parser.error("--norm_vars needs a --cmvn")
    if args.utt2spk and args.cmvn != "speaker":
        parser.error(f"--utt2spk is for --cmvn speaker, not {args.cmvn}")
    if args.skip_bad and not from_audio:
        parser.error("--skip_bad is for --librispeech_from_audio")
    if not 0 <= args.dither < 2**15:
        parser.error(f"--dither {args.dither}: expected 0 or more, in steps of 16-bit samples")
    if args.max_seq_len > 10**7:
        parser.error(f"--max_seq_len {args.max_seq_len}: expected at most 10000000, a day")
    if args.num_workers > 1024:
        parser.error(f"--num_workers {args.num_workers}: expected at most 1024")
    return args


# The source ---------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where utterances come from. A job, called, yields (utterance id, frames (T, D), where)."""

    name: str  # what it is
    size: int | None  # in files, or in bytes
    jobs: Iterator  # of (how much of the size has been read, job)
    skipped: list  # messages about files that cannot be used, for --skip_bad
    fbank: dict | None  # audio.fbank_settings; Kaldi's files do not say


def open_source(args: argparse.Namespace) -> Source:
    """Open audio or Kaldi's features and look at their start; UserError if it cannot be used."""
    skipped, settings = [], None
    if args.librispeech_from_audio is not None:
        changes = {"sample_rate": args.sample_rate, "dither": args.dither}
        settings = audio.fbank_settings(changes | (audio.S3PRL_FBANK if args.as_s3prl else {}))
        files = audio.find_audio(args.librispeech_from_audio, skipped if args.skip_bad else None)
        name, size, jobs = "audio", len(files), audio.audio_jobs(files, settings, args.skip_bad)
    else:
        name, size, jobs = kaldi.read_kaldi(args.librispeech_from_kaldi)
    first = next(jobs)
    if args.overwrite:  # what is there should not go for nothing
        next(iter(first[1]()))
    return Source(name, size, itertools.chain([first], jobs), skipped, settings)


# The target ---------------------------------------------------------------------------------------


def is_ours(name: str) -> bool:
    name = name.removesuffix(".tmp")
    return name.endswith(".pt") or name in ("lengths.pkl", "prepared.json", "skipped.txt")


def open_save_dir(args: argparse.Namespace) -> None:
    """Make save_dir ready for a new set; UserError rather than lose anything."""
    save_dir = args.save_dir
    os.makedirs(save_dir, exist_ok=True)
    names = sorted(os.listdir(save_dir))
    ours = [name for name in names if is_ours(name)]
    if not args.overwrite:
        if datasets.is_finished(save_dir):
            raise UserError(
                f"{save_dir}: holds a finished set: choose another --save_dir, or --overwrite it"
            )
        # A set that this script began may be begun again, if nothing else can be lost with it.
        others = [name for name in names if not is_ours(name)]
        tensors = [name for name in ours if name.endswith(".pt")]
        if tensors and (others or "source" not in (datasets.read_prepared(save_dir) or {})):
            raise UserError(
                f"{save_dir}: holds files like {(others or tensors)[0]} that are not of an "
                "unfinished set: choose another --save_dir, or --overwrite"
            )
    # At any time the folder is finished, or can be begun again.
    order = {"lengths.pkl": 0, "prepared.json": 2}
    for name in sorted(ours, key=lambda name: order.get(name, 1)):
        os.remove(os.path.join(save_dir, name))


def finish(save_dir: str, prepared: dict, lengths: dict[str, int], skipped: list[str]) -> None:
    """Write what makes a folder of tensors a finished set; lengths.pkl last."""
    if skipped:
        with atomic_write(os.path.join(save_dir, "skipped.txt")) as file:
            file.write("".join(f"{line}\n" for line in skipped).encode("utf-8", "replace"))
    write_json(prepared, os.path.join(save_dir, "prepared.json"))
    if hasattr(os, "sync"):  # a crash of the machine must not leave lengths.pkl without its tensors
        os.sync()
    with atomic_write(os.path.join(save_dir, "lengths.pkl")) as file:
        pickle.dump(lengths, file, protocol=4)


# The two passes -----------------------------------------------------------------------------------


class Done(NamedTuple):
    """What the main process learns of an utterance that a worker has written."""

    utt_id: str
    num_frames: int  # before truncation
    mel_dim: int
    where: str
    stats: np.ndarray | None  # audio.cmvn_stats over all frames, if a second pass needs them


def write_utterances(
    job: tuple, save_dir: str, max_seq_len: int, cmvn: str, options: dict
) -> tuple[int, list[Done], list[str]]:
    """The first pass over a source's (position, job), in a worker: write its padded tensors."""
    position, read = job
    done, skipped = [], []
    for utterance in read():
        if isinstance(utterance, Exception):
            skipped.append(" ".join(str(utterance).split()))
            continue
        utt_id, frames, where = utterance
        stats = None if cmvn == "none" else audio.cmvn_stats(frames)
        if cmvn == "utterance":
            frames, stats = audio.apply_cmvn(frames, stats, **options), None
        padded = np.zeros((max_seq_len, frames.shape[1]), np.float32)
        padded[: len(frames)] = frames[:max_seq_len]
        # No sync for each file: all are on disk before lengths.pkl says that they are there.
        save(torch.from_numpy(padded), os.path.join(save_dir, f"{utt_id}.pt"), sync=False)
        done.append(Done(utt_id, *frames.shape, where, stats))
    return position, done, skipped


def normalise(job: list[tuple], save_dir: str, options: dict) -> int:
    """The second pass over [(utterance id, frames, CMVN statistics)], in a worker -> how many."""
    for utt_id, length, stats in job:
        path = os.path.join(save_dir, f"{utt_id}.pt")
        padded = load(path).numpy()
        padded[:length] = audio.apply_cmvn(padded[:length], stats, **options)
        os.remove(path)  # ext4 waits for the disk where one file replaces another
        save(torch.from_numpy(padded), path, sync=False)
    return len(job)


@dataclasses.dataclass
class Set:
    """What is known of the set so far."""

    lengths: dict  # utterance id -> frames, at most max_seq_len
    group_of: dict  # utterance id -> whose CMVN statistics normalise it
    stats: dict  # group -> its CMVN statistics
    skipped: list  # messages
    num_frames: int = 0  # before truncation
    mel_dim: int | None = None

    def add(self, utterance: Done, group: str, max_seq_len: int) -> None:
        utt_id, num_frames, mel_dim, where, stats = utterance
        if utt_id in self.lengths:
            raise UserError(f"{where}: utterance {utt_id}: this id occurs twice")
        self.mel_dim = self.mel_dim or mel_dim
        if mel_dim != self.mel_dim:
            raise UserError(
                f"{where}: utterance {utt_id}: expected frames of {self.mel_dim} numbers, as in "
                f"the utterances before, found {mel_dim}"
            )
        self.lengths[utt_id] = min(num_frames, max_seq_len)
        self.num_frames += num_frames
        self.group_of[utt_id] = group
        if stats is not None:
            self.stats[group] = self.stats.get(group, 0) + stats


def first_pass(
    source: Source, args: argparse.Namespace, options: dict, utt2spk: dict | None
) -> Set:
    """Write the tensors as they are (with CMVN by utterance, as they will be)."""
    utterances = Set({}, {}, {}, source.skipped)
    write = partial(
        write_utterances,
        save_dir=args.save_dir,
        max_seq_len=args.max_seq_len,
        cmvn=args.cmvn,
        options=options,
    )
    unit = {"unit": "file"} if source.fbank else {"unit": "B", "unit_scale": True}
    with tqdm(total=source.size, desc="features", dynamic_ncols=True, **unit) as bar:
        for position, done, skipped in run_jobs(source.jobs, write, args.num_workers):
            for one in done:
                group = audio.cmvn_group(one.utt_id, one.where, args.cmvn, utt2spk)
                utterances.add(one, group, args.max_seq_len)
            utterances.skipped += skipped
            bar.set_postfix(utterances=len(utterances.lengths), refresh=False)
            bar.update(position - bar.n)
    return utterances


def second_pass(utterances: Set, args: argparse.Namespace, options: dict) -> None:
    """Normalise the tensors by the statistics of their speakers, or of the corpus."""
    stats, group_of = utterances.stats, utterances.group_of
    todo = [(utt_id, n, stats[group_of[utt_id]]) for utt_id, n in utterances.lengths.items()]
    jobs = (todo[start : start + 8] for start in range(0, len(todo), 8))
    function = partial(normalise, save_dir=args.save_dir, options=options)
    with tqdm(total=len(todo), desc="CMVN", unit="utt", dynamic_ncols=True) as bar:
        for count in run_jobs(jobs, function, args.num_workers):
            bar.update(count)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    utt2spk = kaldi.read_utt2spk(args.utt2spk) if args.utt2spk else None
    source = open_source(args)
    open_save_dir(args)
    prepared = {
        "source": "audio" if source.fbank else "kaldi",
        "path": args.librispeech_from_audio or args.librispeech_from_kaldi,
        "fbank": source.fbank,
        "cmvn": args.cmvn,
        "norm_vars": args.norm_vars,
        "utt2spk": args.utt2spk,
        "mel_dim": None,
        "max_seq_len": args.max_seq_len,
        "version": __version__,
    }
    if args.as_s3prl:
        prepared["unbiased_vars"] = True
    _, options = audio.cmvn_settings(prepared)
    write_json(prepared, os.path.join(args.save_dir, "prepared.json"))
    print(
        f"preparing {prepared['path']} ({source.name}), CMVN: {args.cmvn}"
        f"{' (mean and variance)' if args.norm_vars else ''}, tensors of {args.max_seq_len} "
        f"frames, {args.num_workers} processes -> {args.save_dir}"
    )
    utterances = first_pass(source, args, options, utt2spk)
    if not utterances.lengths:
        raise UserError(f"{prepared['path']}: no utterance is left: {utterances.skipped[0]}")
    if args.cmvn in ("speaker", "global"):
        second_pass(utterances, args, options)
    prepared["mel_dim"] = utterances.mel_dim
    if args.cmvn == "global":  # a model trained on it needs them for new speech
        prepared["cmvn_stats"] = utterances.stats["all"].tolist()
    lengths = {f"{utt_id}.pt": length for utt_id, length in utterances.lengths.items()}
    finish(args.save_dir, prepared, lengths, utterances.skipped)
    total = utterances.num_frames
    print(
        f"{args.save_dir}: {len(lengths)} utterances, {total} frames ({total / 360000:.2f} h at "
        f"10 ms), mel_dim {utterances.mel_dim}; {total - sum(lengths.values())} frames beyond "
        f"max_seq_len were cut, {len(utterances.skipped)} files were skipped"
    )


if __name__ == "__main__":
    run_main(main)
