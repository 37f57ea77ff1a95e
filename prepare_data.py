"""Turn Kaldi features or audio into a folder of padded log-Mel tensors, one for each utterance.

    python prepare_data.py --librispeech_from_audio LibriSpeech/dev-clean --save_dir data/dev-clean
    python prepare_data.py --librispeech_from_kaldi dump/dev-clean.blogmel.xz --save_dir data/dev
    python prepare_data.py --librispeech_from_kaldi data/dev/feats.scp --cmvn speaker \\
        --save_dir data/dev

The folder gets <utt_id>.pt, float32 (max_seq_len, mel_dim), prepared.json (how it was made), and
at last lengths.pkl, a dict {'<utt_id>.pt': frames}: a folder without it is unfinished.
"""

import argparse
import dataclasses
import itertools
import os
import pickle
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import datasets
from formats import audio, kaldi
from formats.fbank import (
    CMVN_KINDS,
    S3PRL_FBANK,
    apply_cmvn,
    cmvn_group,
    cmvn_settings,
    cmvn_stats,
    fbank_settings,
)
from utils import (
    BadUtterance,
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
        "--librispeech_from_audio",
        metavar="DIR",
        help="folder of audio files, any depth, or a Kaldi data directory (wav.scp, segments)",
    )
    audio.add_flags(parser)
    add = parser.add_argument_group("features").add_argument
    add(
        "--cmvn",
        choices=CMVN_KINDS,
        help="over what to normalise the mean to 0 (default: speaker for audio; none for Kaldi's "
        "features, which the original's authors had normalised)",
    )
    add("--norm_vars", action="store_true", help="normalise the variance to 1 as well")
    add("--as_s3prl", action="store_true", help="audio: fbank and CMVN exactly as in s3prl")
    add("--sample_rate", type=positive, default=16000, help="of the features, Hz")
    add("--num_mel_bins", type=positive, default=80, help="mel_dim, of features from audio")
    add("--dither", type=float, default=0.0, help="noise added to audio; the original had 1")
    add("--skip_bad", action="store_true", help="list bad utterances in skipped.txt and go on")
    add = parser.add_argument_group("target").add_argument
    add("--max_seq_len", type=positive, default=1600, help="frames of a tensor: cut or padded to")
    add(
        "--long_utterances",
        choices=["cut", "split"],
        default="cut",
        help="what is beyond max_seq_len: dropped, or made utterances <id>_00001, ...",
    )
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
    of_audio = ("ids_from_paths", "resample", "channel", "num_mel_bins", "sample_rate", "dither")
    for name in of_audio:
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
    if args.max_seq_len > 10**7:
        parser.error(f"--max_seq_len {args.max_seq_len}: expected at most 10000000, a day")
    if args.num_workers > 1024:
        parser.error(f"--num_workers {args.num_workers}: expected at most 1024")
    return args


# The source ---------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where utterances come from. A job, called, yields (utterance id, blocks of frames, where)."""

    name: str  # what it is
    size: int | None  # in files, or in bytes
    jobs: Iterator  # of (how much of the size has been read, job)
    utt2spk: dict  # if --cmvn speaker asks for it
    left_out: list  # "path: why", of audio
    fbank: dict | None  # fbank_settings; Kaldi's files do not say


def open_audio(args: argparse.Namespace) -> Source:
    changes = {name: getattr(args, name) for name in ("sample_rate", "num_mel_bins", "dither")}
    settings = fbank_settings(changes | (S3PRL_FBANK if args.as_s3prl else {}))
    recordings, left_out = audio.find_audio(args.librispeech_from_audio, args.ids_from_paths)
    utt2spk = {}
    if args.cmvn == "speaker":
        utt2spk = (
            kaldi.read_utt2spk(args.utt2spk) if args.utt2spk else audio.speakers_of(recordings)
        )
    jobs = audio.audio_jobs(recordings, settings, resample=args.resample, channel=args.channel)
    return Source("audio", len(recordings), jobs, utt2spk, left_out, settings)


def open_kaldi(args: argparse.Namespace) -> Source:
    utt2spk, path = {}, args.librispeech_from_kaldi
    if args.cmvn == "speaker":
        beside = os.path.join(os.path.dirname(path), "utt2spk")
        if not args.utt2spk and (path == "-" or not os.path.exists(beside)):
            raise UserError(
                f"{path}: whose utterances these are, over whom to normalise, is not known, for "
                "there is no utt2spk beside it: give --utt2spk FILE, or --cmvn utterance"
            )
        utt2spk = kaldi.read_utt2spk(args.utt2spk or beside)
    name, size, jobs = kaldi.read_kaldi(path)
    return Source(name, size, jobs, utt2spk, [], None)


def open_source(args: argparse.Namespace) -> Source:
    """Open audio or Kaldi's features and look at their start; UserError if it cannot be used."""
    source = (open_kaldi if args.librispeech_from_audio is None else open_audio)(args)
    first = next(source.jobs)
    if args.overwrite and not args.skip_bad:  # what is there should not go for nothing
        next(frame_blocks(next(iter(first[1]()))))
    return source._replace(jobs=itertools.chain([first], source.jobs))


def frame_blocks(utterance: tuple | BadUtterance) -> Iterator[np.ndarray]:
    """What a job yields -> the utterance's frames, float32 (t, D) at a time.

    Raises:
        BadUtterance: they cannot be used.
    """
    if isinstance(utterance, BadUtterance):
        raise utterance
    frames = utterance[1]
    yield from [frames] if isinstance(frames, np.ndarray) else frames


# The target ---------------------------------------------------------------------------------------


def is_ours(name: str) -> bool:
    others = ["lengths.pkl", "prepared.json", "skipped.txt", "left_out.txt"]
    name = name.removesuffix(".tmp")
    return name.endswith(".pt") or name in others


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


# The two passes -----------------------------------------------------------------------------------


class Done(NamedTuple):
    """What the main process learns of an utterance that a worker has written."""

    utt_id: str
    where: str
    lengths: dict  # of its tensors: utterance id -> frames
    num_frames: int  # of all
    mel_dim: int
    stats: np.ndarray | None  # cmvn_stats over all frames, if a second pass needs them


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


def write_tensor(frames: np.ndarray, utt_id: str, args: argparse.Namespace) -> None:
    padded = np.zeros((args.max_seq_len, frames.shape[1]), np.float32)
    padded[: len(frames)] = frames
    # No sync for each file: all are on disk before lengths.pkl says that they are there.
    save(torch.from_numpy(padded), os.path.join(args.save_dir, f"{utt_id}.pt"), sync=False)


def write_utterance(utterance: tuple | BadUtterance, args: argparse.Namespace) -> Done:
    """Write an utterance's padded tensors as it comes in, in memory for one of them."""
    lengths, num_frames, stats = {}, 0, 0
    try:
        for part in in_parts(frame_blocks(utterance), args.max_seq_len):
            utt_id, _, where = utterance
            num_frames += len(part)
            if args.cmvn != "none":
                stats = stats + cmvn_stats(part)
            if not lengths or args.long_utterances == "split":
                name = f"{utt_id}_{len(lengths):05d}" if lengths else utt_id
                write_tensor(part, name, args)
                lengths[name] = len(part)
    except BadUtterance:
        for name in lengths:
            os.remove(os.path.join(args.save_dir, f"{name}.pt"))
        raise
    return Done(utt_id, where, lengths, num_frames, part.shape[1], stats)


def write_utterances(
    job: tuple, args: argparse.Namespace, options: dict
) -> tuple[int, list[Done], list[str]]:
    """The first pass over a source's (position, job), in a worker: write its padded tensors."""
    position, read = job
    done, skipped = [], []
    for utterance in read():
        try:
            one = write_utterance(utterance, args)
        except BadUtterance as error:
            if not args.skip_bad:
                raise
            skipped.append(" ".join(str(error).split()))
            continue
        if args.cmvn == "utterance":
            normalise([(*item, one.stats) for item in one.lengths.items()], args.save_dir, options)
        if args.cmvn in ("utterance", "none"):
            one = one._replace(stats=None)
        done.append(one)
    return position, done, skipped


def normalise(job: list[tuple], save_dir: str, options: dict) -> int:
    """Normalise tensors [(utterance id, frames, CMVN statistics)], in a worker -> how many."""
    for utt_id, length, stats in job:
        path = os.path.join(save_dir, f"{utt_id}.pt")
        padded = load(path).numpy()
        padded[:length] = apply_cmvn(padded[:length], stats, **options)
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

    def add(self, utterance: Done, group: str) -> None:
        where = f"{utterance.where}: utterance {utterance.utt_id}"
        for utt_id, length in utterance.lengths.items():
            if utt_id in self.lengths:
                raise UserError(f"{where}: the id {utt_id} occurs twice")
            self.lengths[utt_id], self.group_of[utt_id] = length, group
        self.mel_dim = self.mel_dim or utterance.mel_dim
        if utterance.mel_dim != self.mel_dim:
            raise UserError(
                f"{where}: expected frames of {self.mel_dim} numbers, as in the utterances before, "
                f"found {utterance.mel_dim}"
            )
        self.num_frames += utterance.num_frames
        if utterance.stats is not None:
            self.stats[group] = self.stats.get(group, 0) + utterance.stats


def first_pass(source: Source, args: argparse.Namespace, options: dict) -> Set:
    """Write the tensors as they are (with CMVN by utterance, as they will be)."""
    utterances = Set({}, {}, {}, [])
    write = partial(write_utterances, args=args, options=options)
    unit = {"unit": "file"} if source.fbank else {"unit": "B", "unit_scale": True}
    with tqdm(total=source.size, desc="features", dynamic_ncols=True, **unit) as bar:
        for position, done, skipped in run_jobs(source.jobs, write, args.num_workers):
            for one in done:
                group = cmvn_group(one.utt_id, one.where, args.cmvn, source.utt2spk)
                utterances.add(one, group)
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


# All of it ----------------------------------------------------------------------------------------


def how_it_is_made(args: argparse.Namespace, source: Source) -> dict:
    """What prepared.json says."""
    return {
        "source": "audio" if source.fbank else "kaldi",
        "path": args.librispeech_from_audio or args.librispeech_from_kaldi,
        "fbank": source.fbank,
        "cmvn": args.cmvn,
        "norm_vars": args.norm_vars,
        **({"unbiased_vars": True} if args.as_s3prl else {}),
        "utt2spk": args.utt2spk,
        "mel_dim": None,
        "max_seq_len": args.max_seq_len,
        "long_utterances": args.long_utterances,
        "version": __version__,
    }


def announce(args: argparse.Namespace, source: Source) -> None:
    speakers = sorted(set(source.utt2spk.values()))
    print(
        f"preparing {args.librispeech_from_audio or args.librispeech_from_kaldi} ({source.name}), "
        f"CMVN: {args.cmvn}{f' ({len(speakers)} of them: {speakers[0]}, ...)' if speakers else ''}"
        f"{', mean and variance' if args.norm_vars else ''}, tensors of {args.max_seq_len} frames, "
        f"{args.num_workers} processes -> {args.save_dir}"
    )


def finish(args: argparse.Namespace, source: Source, prepared: dict, utterances: Set) -> None:
    """Write what makes a folder of tensors a finished set, lengths.pkl last, and sum it up."""
    save_dir, left_out, skipped = args.save_dir, source.left_out, utterances.skipped
    lengths = {f"{utt_id}.pt": length for utt_id, length in utterances.lengths.items()}
    prepared["mel_dim"] = utterances.mel_dim
    if args.cmvn == "global":  # a model trained on it needs them for new speech
        prepared["cmvn_stats"] = utterances.stats["all"].tolist()
    for name, lines in {"skipped.txt": skipped, "left_out.txt": left_out}.items():
        if lines:
            with atomic_write(os.path.join(save_dir, name)) as file:
                file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
    write_json(prepared, os.path.join(save_dir, "prepared.json"))
    if hasattr(os, "sync"):  # a crash of the machine must not leave lengths.pkl without its tensors
        os.sync()
    with atomic_write(os.path.join(save_dir, "lengths.pkl")) as file:
        pickle.dump(lengths, file, protocol=4)

    total, speakers = utterances.num_frames, set(utterances.group_of.values())
    print(
        f"{save_dir}: {len(lengths)} utterances, "
        f"{f'{len(speakers)} speakers, ' if args.cmvn == 'speaker' else ''}"
        f"{total} frames ({total / 360000:.2f} h at 10 ms), mel_dim {utterances.mel_dim}; "
        f"{total - sum(lengths.values())} frames beyond max_seq_len were cut, {len(skipped)} "
        f"{'files' if source.fbank else 'utterances'} were skipped"
        f"{' (skipped.txt)' if skipped else ''}"
    )
    if left_out:
        counts = audio.count_left_out(left_out)
        print(f"left out of {prepared['path']}: {counts} (left_out.txt)")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    source = open_source(args)
    open_save_dir(args)
    prepared = how_it_is_made(args, source)
    _, options = cmvn_settings(prepared)
    write_json(prepared, os.path.join(args.save_dir, "prepared.json"))
    announce(args, source)
    utterances = first_pass(source, args, options)
    if not utterances.lengths:
        raise UserError(f"{prepared['path']}: no utterance is left: {utterances.skipped[0]}")
    if args.cmvn in ("speaker", "global"):
        second_pass(utterances, args, options)
    finish(args, source, prepared, utterances)


if __name__ == "__main__":
    run_main(main)
