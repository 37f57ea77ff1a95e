"""Turn Kaldi features or audio into a folder of padded log-Mel tensors, one per utterance.

The folder gets <utt_id>.pt, float32 (max_seq_len, mel_dim); lengths.pkl, a dict
{'<utt_id>.pt': frames}; and prepared.json, how it was made. It is written as <save_dir>.partial and
renamed when it is complete.
"""

import argparse
import contextlib
import dataclasses
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

import datasets
from formats import audio, kaldi
from formats.fbank import CMVN, CMVN_KINDS, S3PRL_FBANK, cmvn_stats, fbank_settings
from utils import (
    BadUtterance,
    UserError,
    __version__,
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
)

EXAMPLES = """\
  python prepare_data.py --audio LibriSpeech/dev-clean --save_dir data/dev-clean
  python prepare_data.py --kaldi dump/dev-clean.blogmel.xz --save_dir data/dev-clean
  python prepare_data.py --kaldi data/dev/feats.scp --cmvn speaker --save_dir data/dev-clean
"""
WAYS_OUT = "--utt2spk FILE or --cmvn utterance"  # where speakers are not known
LISTS = {
    "skipped.txt": "utterances were skipped",
    "truncated.txt": "files have another length than their headers state",
    "left_out.txt": "files were ignored",
}
OWN_FILES = {"prepared.json", "lengths.pkl", *LISTS}
NOBODYS_FILES = (".DS_Store", "Thumbs.db", ".nfs", ".lock")  # starts of names


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "Turn Kaldi features or audio into a folder of padded log-Mel tensors.", EXAMPLES
    )
    group = parser.add_argument_group("input")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--librispeech_from_kaldi",
        "--kaldi",
        metavar="PATH",
        help="log-Mel features: a text dump, .ark or .scp; plain, .xz, .gz, - for standard input",
    )
    source.add_argument(
        "--librispeech_from_audio",
        "--audio",
        metavar="DIR",
        help="folder of audio files, any depth, or a Kaldi data directory (wav.scp, segments)",
    )
    audio.add_flags(group)
    add = parser.add_argument_group("features").add_argument
    add(
        "--cmvn",
        choices=CMVN_KINDS,
        help="what to normalise the mean to 0 over (default: speaker for audio; none for Kaldi's "
        "features, which the original's authors had normalised)",
    )
    add("--norm_vars", action="store_true", help="normalise the variance to 1 as well")
    add("--as_s3prl", action="store_true", help="compute fbank and CMVN of audio exactly as s3prl")
    add(
        "--sample_rate",
        type=positive,
        default=16000,
        metavar="HZ",
        help="sampling rate of the audio that features are computed from (default: %(default)s)",
    )
    add(
        "--num_mel_bins",
        type=positive,
        default=80,
        metavar="D",
        help="mel_dim, the dimension of features from audio (default: %(default)s)",
    )
    add(
        "--dither",
        type=float,
        default=0.0,
        help="standard deviation of the noise added to audio, in 16-bit steps, repeatable; the "
        "original had 1 (default: %(default)s)",
    )
    add = parser.add_argument_group("output").add_argument
    add(
        "--save_dir",
        default="./librispeech_data/preprocessed/dev-clean",
        metavar="DIR",
        help="folder for the tensors (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace the finished dataset in save_dir")
    add(
        "--max_seq_len",
        type=positive,
        default=1600,
        metavar="FRAMES",
        help="length of each tensor: longer utterances are cut, shorter ones padded "
        "(default: %(default)s)",
    )
    add(
        "--long_utterances",
        choices=["cut", "split"],
        default="cut",
        help="drop what is beyond max_seq_len, or make it utterances <id>_00001, ... "
        "(default: %(default)s)",
    )
    add = parser.add_argument_group("hardware").add_argument
    add(
        "--num_workers",
        type=positive,
        default=num_cores(),
        metavar="N",
        help="number of processes (default: one per core, %(default)s)",
    )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    from_audio = args.librispeech_from_audio is not None
    for_audio = ("ids_from_paths", "pattern", "resample", "channel")
    for name in (*for_audio, "num_mel_bins", "sample_rate", "dither"):
        if not from_audio and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --librispeech_from_audio")
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
    args.path = args.librispeech_from_audio if from_audio else args.librispeech_from_kaldi
    return args


# Input --------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where utterances come from."""

    kind: str
    size: int | None  # in utterances (audio) or bytes
    # of (how much of the size has been read, job); a job, called with a list for warnings, yields
    # (utterance id, where, read), and read() returns an iterator of frames (t, D) or raises
    jobs: Iterator
    utt2spk: dict  # for --cmvn speaker
    bad: list  # messages on what is skipped before it is read
    ignored: list  # "path: why", of audio
    fbank: dict | None  # fbank_settings; Kaldi's files do not say


def open_audio(args: argparse.Namespace) -> Source:
    changes = {name: getattr(args, name) for name in ("sample_rate", "num_mel_bins", "dither")}
    settings = fbank_settings(changes | (S3PRL_FBANK if args.as_s3prl else {}))
    bad = [] if args.skip_bad else None
    recordings, ignored = audio.find_audio(args.path, args.ids_from_paths, args.pattern, bad)
    utt2spk = {}
    if args.cmvn == "speaker":
        utt2spk = audio.speakers_of(recordings, args.path, args.utt2spk, WAYS_OUT)
    jobs = audio.audio_jobs(recordings, settings, resample=args.resample, channel=args.channel)
    return Source("audio", len(recordings), jobs, utt2spk, bad or [], ignored, settings)


def open_kaldi(args: argparse.Namespace) -> Source:
    utt2spk = {}
    if args.cmvn == "speaker":
        beside = os.path.join(os.path.dirname(args.path), "utt2spk")
        if not args.utt2spk and (args.path == "-" or not os.path.exists(beside)):
            raise UserError(
                f"{args.path}: --cmvn speaker needs to know who speaks, but there is no utt2spk in "
                f"the same directory: use {WAYS_OUT}"
            )
        utt2spk = kaldi.read_utt2spk(args.utt2spk or beside)
    kind, size, jobs = kaldi.read_kaldi(args.path)
    jobs = ((position, partial(without_notes, job)) for position, job in jobs)
    return Source(kind, size, jobs, utt2spk, [], [], None)


def without_notes(job, notes):
    """A job of kaldi.read_kaldi(), which has no warnings, called as one of audio.audio_jobs()."""
    return job()


# Output -------------------------------------------------------------------------------------------


def check_save_dir(save_dir: str, overwrite: bool) -> list[str]:
    """Look at what save_dir holds -> the files of a finished dataset that is to be replaced.

    Raises:
        UserError: it holds a finished dataset that is not to be replaced, or anything else.
    """
    names = sorted(os.listdir(save_dir)) if os.path.isdir(save_dir) else []
    own = set()
    if datasets.is_finished(save_dir):
        own = {*datasets.read_lengths(save_dir), *OWN_FILES}
    others = [name for name in names if name not in own and not name.startswith(NOBODYS_FILES)]
    if others:
        raise UserError(
            f"{save_dir}: this folder holds {others[0]}, which is not of a dataset of "
            "prepare_data.py: choose another --save_dir"
        )
    if own and not overwrite:
        raise UserError(
            f"{save_dir}: this folder holds a finished dataset: choose another --save_dir, or "
            "replace it with --overwrite"
        )
    if os.path.ismount(save_dir):
        raise UserError(f"{save_dir}: this is a mount point: choose a folder below it")
    return names


def remove_files(folder: str, but: str | None = None) -> None:
    for name in os.listdir(folder):
        if name != but:
            os.remove(os.path.join(folder, name))


def put_in_place(partial_dir: str, save_dir: str, overwrite: bool, lock) -> None:
    """Rename the finished folder to save_dir, in place of the dataset that may be there."""
    for name in check_save_dir(save_dir, overwrite):
        os.remove(os.path.join(save_dir, name))
    if os.path.isdir(save_dir):
        os.rmdir(save_dir)
    if os.name == "nt":  # where no file in a folder may be open when it is renamed
        lock.release()
    os.rename(partial_dir, save_dir)
    lock.release()
    if os.path.exists(path := os.path.join(save_dir, ".lock")):
        os.remove(path)


# The two passes -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Written:
    """What a worker returns of an utterance whose tensors it has written."""

    utt_id: str
    where: str
    lengths: dict  # its tensors: utterance id -> frames
    num_frames: int  # of all, before truncation
    mel_dim: int
    stats: np.ndarray | None  # cmvn_stats of all frames, if the second pass needs them


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


def write_tensor(frames: np.ndarray, path: str, max_seq_len: int) -> None:
    padded = np.zeros((max_seq_len, frames.shape[1]), np.float32)
    padded[: len(frames)] = frames
    save(torch.from_numpy(padded), path, sync=False)


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
                write_tensor(part, os.path.join(folder, f"{name}.pt"), args.max_seq_len)
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
        position, utterances, messages on bad utterances, warnings.
    """
    position, read_utterances = job
    written, bad, notes = [], [], []
    for utterance in read_utterances(notes):
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
    """Write the tensors as they are (with CMVN by utterance, as they will be).

    Returns:
        the utterances, CMVN statistics by group, messages on bad utterances, warnings.
    """
    written, names, stats, bad, notes = [], set(), {}, source.bad, []
    write = partial(write_utterances, folder=folder, args=args, cmvn=cmvn)
    unit = {"unit": "utt"} if source.fbank else {"unit": "B", "unit_scale": True}
    with progress_bar(total=source.size, desc="features", dynamic_ncols=True, **unit) as bar:
        for position, some, new_bad, new_notes in run_jobs(source.jobs, write, args.num_workers):
            for one in some:
                check_fits(one, names, (written or some)[0].mel_dim)
                if one.stats is not None:
                    group = cmvn.group(one.utt_id, one.where, source.utt2spk)
                    stats[group] = stats.get(group, 0) + one.stats
                    one.stats = None
                names |= one.lengths.keys()
                written.append(one)
            bad += new_bad
            for note in new_notes:
                notes.append(note)
                if len(notes) <= 10:
                    bar.write(f"warning: {note}", file=sys.stderr)
            bar.set_postfix(utterances=len(names), refresh=False)
            bar.update(position - bar.n)
    return written, stats, bad, notes


def check_fits(one: Written, names: set[str], mel_dim: int) -> None:
    """UserError if an utterance's tensors cannot be in one dataset with those before."""
    twice = one.lengths.keys() & names
    if twice:
        raise UserError(f"{one.where}: utterance {one.utt_id}: the id {min(twice)} occurs twice")
    if one.mel_dim != mel_dim:
        raise UserError(
            f"{one.where}: utterance {one.utt_id}: expected frames of {mel_dim} values, as in the "
            f"utterances before, found {one.mel_dim}"
        )


def second_pass(
    written: list[Written],
    stats: dict,
    source: Source,
    folder: str,
    args: argparse.Namespace,
    cmvn: CMVN,
) -> None:
    """Normalise the tensors by the statistics of their speakers, or of the corpus."""
    todo = [
        (name, length, stats[cmvn.group(one.utt_id, one.where, source.utt2spk)])
        for one in written
        for name, length in one.lengths.items()
    ]
    jobs = (todo[start : start + 8] for start in range(0, len(todo), 8))
    function = partial(normalise, folder=folder, cmvn=cmvn)
    with progress_bar(total=len(todo), desc="CMVN", unit="utt", dynamic_ncols=True) as bar:
        for count in run_jobs(jobs, function, args.num_workers):
            bar.update(count)


# All of it ----------------------------------------------------------------------------------------


def announce(args: argparse.Namespace, source: Source) -> None:
    size = f", {source.size} utterances" if source.fbank else ""
    print(f"preparing {args.path} ({source.kind}{size}) -> {args.save_dir}")
    if source.utt2spk:
        print(f"speakers: {audio.describe_speakers(source.utt2spk.values())}")
    moments = "mean and variance" if args.norm_vars else "mean"
    over = "none" if args.cmvn == "none" else f"{moments}, over each {args.cmvn}"
    print(
        f"CMVN: {over.replace('each global', 'the corpus')}; tensors of {args.max_seq_len} frames; "
        f"{args.num_workers} processes",
        flush=True,
    )


def describe(args: argparse.Namespace, source: Source, mel_dim: int, stats: dict) -> dict:
    """What prepared.json says: how the dataset was made."""
    prepared = {
        "source": "audio" if source.fbank else "kaldi",
        "path": args.path,
        "fbank": source.fbank,
        "cmvn": args.cmvn,
        "norm_vars": args.norm_vars,
        **({"unbiased_vars": True} if args.as_s3prl else {}),
        "utt2spk": args.utt2spk,
        "mel_dim": mel_dim,
        "max_seq_len": args.max_seq_len,
        "long_utterances": args.long_utterances,
        "version": __version__,
    }
    if args.cmvn == "global":  # a model trained on it needs them for new speech
        prepared["cmvn_stats"] = stats["all"].tolist()
    return prepared


def write_lists(folder: str, lists: dict[str, list[str]], lengths: dict[str, int]) -> None:
    """Write skipped.txt and the like where there is something to list, and lengths.pkl."""
    for name, lines in lists.items():
        if lines:
            with atomic_write(os.path.join(folder, name)) as file:
                file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
    with atomic_write(os.path.join(folder, "lengths.pkl")) as file:
        pickle.dump({f"{name}.pt": length for name, length in lengths.items()}, file, protocol=4)


def prepare(args: argparse.Namespace, folder: str) -> list[str]:
    """Write the whole dataset into `folder` -> lines that sum it up."""
    source = (open_kaldi if args.librispeech_from_audio is None else open_audio)(args)
    announce(args, source)
    cmvn = CMVN(args.cmvn, args.norm_vars, unbiased=args.as_s3prl)
    written, stats, bad, notes = first_pass(source, folder, args, cmvn)
    if not written:
        raise UserError(f"{args.path}: every utterance was skipped; the first: {bad[0]}")
    if args.cmvn in ("speaker", "global"):
        second_pass(written, stats, source, folder, args, cmvn)
    mel_dim = written[0].mel_dim
    write_json(describe(args, source, mel_dim, stats), os.path.join(folder, "prepared.json"))
    lengths = {name: length for one in written for name, length in one.lengths.items()}
    lists = {"skipped.txt": bad, "truncated.txt": notes, "left_out.txt": source.ignored}
    write_lists(folder, lists, lengths)

    total = sum(one.num_frames for one in written)
    hours = total / 360000
    speakers = ""
    if args.cmvn == "speaker":
        speakers = f"{len(stats)} speakers ({hours / len(stats):.3g} h each), "
    lines = [
        f"{args.save_dir}: {len(lengths)} utterances, {speakers}{total} frames ({hours:.2f} h at "
        f"10 ms), mel_dim {mel_dim}; {total - sum(lengths.values())} frames beyond max_seq_len "
        "were cut"
    ]
    for name, what in LISTS.items():
        if lists[name]:
            lines.append(f"{len(lists[name])} {what}: see {name}")
    return lines


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    save_dir = os.path.realpath(args.save_dir)
    folder = f"{save_dir}.partial"
    os.makedirs(folder, exist_ok=True)
    lock = lock_folder(folder)
    try:
        check_save_dir(save_dir, args.overwrite)
        remove_files(folder, but=".lock")  # what an interrupted run left
        lines = prepare(args, folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove_files(folder)
            os.rmdir(folder)
        if isinstance(error, BadUtterance):
            raise UserError(f"{error} (or skip such utterances with --skip_bad)") from None
        raise
    put_in_place(folder, save_dir, args.overwrite, lock)
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
