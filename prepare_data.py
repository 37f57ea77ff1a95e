"""Turn Kaldi features or audio into a folder of padded log-Mel tensors, one per utterance.

The folder gets <utt_id>.pt, float32 (max_seq_len, mel_dim); lengths.pkl, a dict
{'<utt_id>.pt': frames}; and prepared.json, how it was made. It is written as <save_dir>.partial and
renamed when it is complete.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock

import datasets
from formats import audio, kaldi
from formats.fbank import CMVN, CMVN_KINDS, S3PRL_FBANK, cmvn_stats, fbank_settings
from utils import (
    BadUtterance,
    UserError,
    __version__,
    add_group,
    atomic_write,
    load,
    lock_folder,
    new_parser,
    num_cores,
    positive,
    progress_bar,
    run_jobs,
    run_main,
    save,
    write_json,
    write_lines,
)

EXAMPLES = """\
  python prepare_data.py --audio LibriSpeech/dev-clean --save_dir data/dev-clean
  python prepare_data.py --kaldi dump/dev-clean.blogmel.xz --save_dir data/dev-clean
  python prepare_data.py --kaldi data/dev/feats.scp --cmvn speaker --save_dir data/dev-clean
"""
WAYS_OUT = "--utt2spk FILE or --cmvn utterance"  # where speakers are not known
OWN_FILES = ("lengths.pkl", "prepared.json", "skipped.txt", "truncated.txt", "left_out.txt")
NOBODYS_FILES = (".DS_Store", "Thumbs.db", ".nfs", ".lock")  # starts of names


def build_parser() -> argparse.ArgumentParser:
    description = "Turn Kaldi features or audio into a folder of padded log-Mel tensors."
    parser = new_parser(description, EXAMPLES)
    group = parser.add_argument_group("input")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    text = "log-Mel features: a text dump, .ark or .scp; plain, .xz, .gz, - for standard input"
    add("--librispeech_from_kaldi", "--kaldi", metavar="PATH", help=text)
    text = "folder of audio files, any depth, or a Kaldi data directory (wav.scp, segments)"
    add("--librispeech_from_audio", "--audio", metavar="DIR", help=text)
    audio.add_flags(group)
    add = add_group(parser, "features")
    cmvn = "normalise the mean per speaker, per utterance, over all (global), or not at all "
    cmvn += "(default: speaker for audio; none for Kaldi's features, which may be normalised)"
    add("--cmvn", choices=CMVN_KINDS, help=cmvn)
    add("--norm_vars", action="store_true", help="normalise the variance to 1 as well")
    add("--as_s3prl", action="store_true", help="compute fbank and CMVN of audio exactly as s3prl")
    add("--sample_rate", type=positive, default=16000, help="sampling rate in Hz, for audio")
    add("--num_mel_bins", type=positive, default=80, help="number of log-Mel bins, for audio")
    noise = "standard deviation of noise to add to audio, in 16-bit steps (the original: 1)"
    add("--dither", type=float, default=0.0, help=noise)
    add = add_group(parser, "output")
    save_dir = "./librispeech_data/preprocessed/dev-clean"
    add("--save_dir", default=save_dir, help="folder for the tensors")
    add("--overwrite", action="store_true", help="replace the finished dataset in save_dir")
    length = "frames of each tensor; longer utterances are cut, shorter ones padded"
    add("--max_seq_len", type=positive, default=1600, help=length)
    beyond = "cut at max_seq_len, or split the rest into utterances <id>_00001, ..."
    add("--long_utterances", choices=["cut", "split"], default="cut", help=beyond)
    add = add_group(parser, "hardware")
    add("--num_workers", type=positive, default=num_cores(), help="number of processes")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    from_audio = args.librispeech_from_audio is not None
    for name in (*audio.FLAGS, "num_mel_bins", "sample_rate", "dither"):
        if not from_audio and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --audio")
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
    if not 0 <= args.dither < 2**15:
        parser.error(f"--dither {args.dither}: expected 0 or more, in steps of 16-bit samples")
    return args


# Input --------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where utterances come from.

    A job yields (utterance id, where, read) for some utterances; read() returns an iterator of
    log-Mel frames (t, D) or raises BadUtterance. A job of audio is called with a list for warnings.
    """

    path: str
    kind: str
    size: int | None  # utterances (audio) or bytes
    jobs: Iterator  # (how much of the size has been read, job)
    utt2spk: dict  # for --cmvn speaker
    bad: list  # messages on utterances that --skip_bad skips before they are read
    ignored: list  # "path: why", of audio
    fbank: dict | None  # fbank_settings; Kaldi's files do not say


def open_audio(args: argparse.Namespace) -> Source:
    path, bad, utt2spk = args.librispeech_from_audio, [] if args.skip_bad else None, {}
    changes = {name: getattr(args, name) for name in ("sample_rate", "num_mel_bins", "dither")}
    settings = fbank_settings(changes | (S3PRL_FBANK if args.as_s3prl else {}))
    recordings, ignored = audio.find_audio(path, args.ids_from_paths, args.pattern, bad)
    if args.cmvn == "speaker":
        utt2spk = audio.speakers_of(recordings, path, args.utt2spk, WAYS_OUT)
    jobs = audio.audio_jobs(recordings, settings, resample=args.resample, channel=args.channel)
    return Source(path, "audio", len(recordings), jobs, utt2spk, bad or [], ignored, settings)


def open_kaldi(args: argparse.Namespace) -> Source:
    path, utt2spk = args.librispeech_from_kaldi, {}
    if os.path.isdir(path):
        raise UserError(f"{path}: expected a file of features, such as {path}/feats.scp")
    if args.cmvn == "speaker":
        neighbour = os.path.join(os.path.dirname(path), "utt2spk")
        if not args.utt2spk and (path == "-" or not os.path.exists(neighbour)):
            raise UserError(
                f"{path}: --cmvn speaker needs speaker labels, but no utt2spk was found next to "
                f"the input: use {WAYS_OUT}"
            )
        utt2spk = kaldi.read_utt2spk(args.utt2spk or neighbour)
    kind, size, jobs = kaldi.read_kaldi(path)
    return Source(path, kind, size, jobs, utt2spk, [], [], None)


# The folder ---------------------------------------------------------------------------------------


def check_save_dir(save_dir: str, overwrite: bool) -> None:
    """UserError if save_dir holds a finished dataset that is to stay, or anything else."""
    is_finished = datasets.is_finished(save_dir)
    own = {*datasets.read_lengths(save_dir), *OWN_FILES} if is_finished else set()
    names = sorted(os.listdir(save_dir)) if os.path.exists(save_dir) else []
    others = [name for name in names if name not in own and not name.startswith(NOBODYS_FILES)]
    if others:
        raise UserError(
            f"{save_dir}: this folder holds {others[0]}, which is not of a dataset of "
            "prepare_data.py: choose another --save_dir"
        )
    if is_finished and not overwrite:
        raise UserError(
            f"{save_dir}: this folder holds a finished dataset: choose another --save_dir, or "
            "replace it with --overwrite"
        )
    if os.path.ismount(save_dir):
        raise UserError(f"{save_dir}: this is a mount point: choose a folder below it")


def put_in_place(folder: str, save_dir: str, overwrite: bool, lock: FileLock) -> None:
    """Rename the finished, locked folder to save_dir, in place of the dataset that may be there."""
    check_save_dir(save_dir, overwrite)
    if os.path.exists(save_dir):
        shutil.rmtree(save_dir)
    lock.release()  # first: Windows renames no folder in which a file is open
    os.rename(folder, save_dir)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(save_dir, ".lock"))


# The two passes -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Written:
    """What a worker returns for an utterance whose tensors it has written."""

    utt_id: str
    where: str
    lengths: dict  # utterance ids of its tensors -> frames
    num_frames: int  # before truncation
    mel_dim: int
    stats: np.ndarray | None  # cmvn_stats that the second pass needs: its own, then its group's


def in_parts(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Blocks of frames, of any length -> parts of `size` frames, and a last one of what is left."""
    rest = None
    for block in blocks:
        rest = block if rest is None else np.concatenate([rest, block])
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    if rest is not None and len(rest):
        yield rest


def write_utterance(utterance: tuple, folder: str, args: argparse.Namespace) -> Written:
    """Write an utterance's padded tensors as it is read, with one of them in memory at a time."""
    utt_id, where, read = utterance
    lengths, num_frames, stats = {}, 0, 0
    try:
        for part in in_parts(read(), args.max_seq_len):
            num_frames += len(part)
            if args.cmvn != "none":
                stats = stats + cmvn_stats(part)
            if not lengths or args.long_utterances == "split":
                name = f"{utt_id}_{len(lengths):05d}" if lengths else utt_id
                padded = np.zeros((args.max_seq_len, part.shape[1]), np.float32)
                padded[: len(part)] = part
                save(torch.from_numpy(padded), os.path.join(folder, f"{name}.pt"), sync=False)
                lengths[name] = len(part)
    except BadUtterance:
        for name in lengths:
            os.remove(os.path.join(folder, f"{name}.pt"))
        raise
    return Written(utt_id, where, lengths, num_frames, part.shape[1], stats)


def write_utterances(
    job: tuple, folder: str, args: argparse.Namespace, cmvn: CMVN
) -> tuple[int, list[Written], list[str], list[str]]:
    """The first pass over a source's (position, job), in a worker: write its padded tensors.

    Returns:
        position, utterances, messages on those that were skipped, warnings.
    """
    position, read_utterances = job
    written, bad, notes = [], [], []
    options = [] if args.librispeech_from_audio is None else [notes]
    for utterance in read_utterances(*options):
        try:
            one = write_utterance(utterance, folder, args)
        except BadUtterance as error:
            if not args.skip_bad:
                raise
            bad.append(" ".join(str(error).split()))
            continue
        if cmvn.kind == "utterance":
            normalise([(*item, one.stats) for item in one.lengths.items()], folder, cmvn)
        if cmvn.kind in ("utterance", "none"):
            one.stats = None
        written.append(one)
    return position, written, bad, notes


def normalise(job: list[tuple], folder: str, cmvn: CMVN) -> int:
    """Normalise tensors [(utterance id, frames, CMVN statistics)], in a worker -> how many."""
    for utt_id, length, stats in job:
        path = os.path.join(folder, f"{utt_id}.pt")
        padded = load(path).numpy()
        padded[:length] = cmvn.apply(padded[:length], stats)
        os.remove(path)  # ext4 waits for the disk where one file replaces another
        save(torch.from_numpy(padded), path, sync=False)
    return len(job)


def first_pass(
    source: Source, folder: str, args: argparse.Namespace, cmvn: CMVN
) -> tuple[list[Written], dict, list[str], list[str]]:
    """Write the tensors, not yet normalised (with --cmvn utterance, in their final form).

    Returns:
        utterances, CMVN statistics by group, messages on utterances that were skipped, warnings.
    """
    written, names, stats, bad, notes = [], set(), {}, source.bad, []
    write = partial(write_utterances, folder=folder, args=args, cmvn=cmvn)
    results = run_jobs(source.jobs, write, args.num_workers)
    unit = {"unit": "utt"} if source.fbank else {"unit": "B", "unit_scale": True}
    bar = progress_bar(total=source.size, desc="features", dynamic_ncols=True, **unit)
    with bar, contextlib.closing(results):
        for position, some, new_bad, new_notes in results:
            for one in some:
                written.append(one)
                check_fits(one, names, written[0].mel_dim)
                names |= one.lengths.keys()
                if one.stats is not None:
                    group = cmvn.group(one.utt_id, one.where, source.utt2spk)
                    total = stats.setdefault(group, np.zeros_like(one.stats))
                    total += one.stats
                    one.stats = total
            for note in new_notes[: max(0, 10 - len(notes))]:  # truncated.txt lists all
                bar.write(f"WARNING: {note}", file=sys.stderr)
            bad += new_bad
            notes += new_notes
            bar.set_postfix(utterances=len(names), refresh=False)
            bar.update(position - bar.n)
    return written, stats, bad, notes


def check_fits(one: Written, names: set[str], mel_dim: int) -> None:
    """UserError if an utterance's tensors cannot be in one dataset with those before."""
    where = f"{one.where}: utterance {one.utt_id}"
    twice = one.lengths.keys() & names
    if twice:
        raise UserError(f"{where}: the id {min(twice)} occurs twice")
    if one.mel_dim != mel_dim:
        raise UserError(
            f"{where}: expected frames of {mel_dim} values, as in the utterances before, found "
            f"{one.mel_dim}"
        )


def second_pass(written: list[Written], folder: str, num_workers: int, cmvn: CMVN) -> None:
    """Normalise tensors with the statistics of their speaker, or of the corpus."""
    todo = [(name, n, one.stats) for one in written for name, n in one.lengths.items()]
    jobs = (todo[start : start + 8] for start in range(0, len(todo), 8))
    function = partial(normalise, folder=folder, cmvn=cmvn)
    with progress_bar(total=len(todo), desc="CMVN", unit="utt", dynamic_ncols=True) as bar:
        for count in run_jobs(jobs, function, num_workers):
            bar.update(count)


# All of it ----------------------------------------------------------------------------------------


def announce(args: argparse.Namespace, source: Source) -> None:
    size = f", utterances: {source.size}" if source.fbank else ""
    print(f"preparing {source.path} ({source.kind}{size}) -> {args.save_dir}")
    if source.utt2spk:
        print(f"speakers: {audio.describe_speakers(source.utt2spk.values())}")
    over = f"by {args.cmvn}, {'mean and variance' if args.norm_vars else 'mean only'}"
    print(
        f"CMVN: {'none' if args.cmvn == 'none' else over}; tensors of {args.max_seq_len} frames; "
        f"processes: {args.num_workers}",
        flush=True,
    )


def describe(args: argparse.Namespace, source: Source, mel_dim: int, stats: dict) -> dict:
    """What prepared.json says: how the dataset was made."""
    prepared = {
        "source": "audio" if source.fbank else "kaldi",
        "path": source.path,
        "fbank": source.fbank,
        "cmvn": args.cmvn,
        "norm_vars": args.norm_vars,
        "unbiased_vars": args.as_s3prl,
        "utt2spk": args.utt2spk,
        "mel_dim": mel_dim,
        "max_seq_len": args.max_seq_len,
        "long_utterances": args.long_utterances,
        "version": __version__,
    }
    if args.cmvn == "global":  # a model trained on it needs them for new speech
        prepared["cmvn_stats"] = stats["all"].tolist()
    return prepared


def summary(
    args: argparse.Namespace,
    written: list[Written],
    lengths: dict[str, int],
    stats: dict[str, np.ndarray],
    lists: dict[str, list[str]],
) -> str:
    """The script's last lines."""
    total = sum(one.num_frames for one in written)
    hours, cut = total / 360000, total - sum(lengths.values())
    speakers = ""
    if args.cmvn == "speaker":
        speakers = f"{len(stats)} speakers ({hours / len(stats):.2g} h each), "
    text = (
        f"{args.save_dir}: {len(lengths)} utterances, {speakers}{total} frames ({hours:.2f} h at "
        f"10 ms), mel_dim {written[0].mel_dim}; {cut} frames beyond max_seq_len were cut"
    )
    what = {
        "skipped.txt": "skipped utterances",
        "truncated.txt": "files that are shorter or longer than their header states",
        "left_out.txt": f"ignored files ({audio.count_left_out(lists['left_out.txt'])})",
    }
    for name, lines in lists.items():
        if lines:
            text += f"\n{what[name]}: {len(lines)}, listed in {name}"
    return text


def prepare(args: argparse.Namespace, folder: str) -> str:
    """Write the whole dataset into `folder` -> a summary."""
    source = (open_kaldi if args.librispeech_from_audio is None else open_audio)(args)
    announce(args, source)
    cmvn = CMVN(args.cmvn, args.norm_vars, unbiased=args.as_s3prl)
    written, stats, bad, notes = first_pass(source, folder, args, cmvn)
    if not written:
        raise UserError(f"{source.path}: every utterance was skipped; the first: {bad[0]}")
    if stats:
        second_pass(written, folder, args.num_workers, cmvn)
    prepared = describe(args, source, written[0].mel_dim, stats)
    write_json(prepared, os.path.join(folder, "prepared.json"))
    lists = {"skipped.txt": bad, "truncated.txt": notes, "left_out.txt": source.ignored}
    for name, lines in lists.items():
        if lines:
            write_lines(lines, os.path.join(folder, name))
    lengths = {f"{name}.pt": n for one in written for name, n in one.lengths.items()}
    with atomic_write(os.path.join(folder, "lengths.pkl")) as file:
        pickle.dump(lengths, file, protocol=4)
    return summary(args, written, lengths, stats, lists)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    save_dir = os.path.realpath(args.save_dir)
    folder = f"{save_dir}.partial"
    os.makedirs(folder, exist_ok=True)
    lock = lock_folder(folder)
    try:
        check_save_dir(save_dir, args.overwrite)
        for name in set(os.listdir(folder)) - {".lock"}:  # an interrupted run left them
            os.remove(os.path.join(folder, name))
        result = prepare(args, folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, BadUtterance):
            raise UserError(f"{error} (--skip_bad skips such utterances)") from None
        raise
    put_in_place(folder, save_dir, args.overwrite, lock)
    print(result)


if __name__ == "__main__":
    run_main(main)
