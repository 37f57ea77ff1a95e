"""Turn Kaldi features or audio into a folder of padded log-Mel tensors, one an utterance.

    python prepare_data.py --librispeech_from_audio LibriSpeech/dev-clean --save_dir data/dev-clean
    python prepare_data.py --librispeech_from_kaldi dump/dev-clean.blogmel.xz --save_dir data/dev
    python prepare_data.py --librispeech_from_kaldi data/dev/feats.scp --cmvn speaker \\
        --utt2spk data/dev/utt2spk --save_dir data/dev

The folder gets <utt_id>.pt, float32 (max_seq_len, mel_dim), prepared.json (how it was made), and
at last lengths.pkl, a dict {'<utt_id>.pt': frames}: a folder without it is unfinished.
"""

import argparse
import os
import re

from utils import (
    CMVN_KINDS,
    HelpFormatter,
    UserError,
    __version__,
    num_cores,
    positive,
    run,
    run_jobs,
)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
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
        choices=CMVN_KINDS,
        help="what to normalise to mean 0 and variance 1 over (default: speaker for audio; none "
        "for Kaldi's features, which the original's authors had normalised)",
    )
    add("--utt2spk", metavar="FILE", help="Kaldi's; default: an id up to its first '-'")
    add("--sample_rate", type=positive, default=16000, help="of the audio, Hz")
    add("--dither", type=float, default=0.0, help="noise added to audio; the original had 1")
    add("--skip_bad", action="store_true", help="list bad audio in skipped.txt and go on")
    add = parser.add_argument_group("target").add_argument
    add("--max_seq_len", type=positive, default=1600, help="frames of a tensor: cut or padded to")
    default = "./librispeech_data/preprocessed/dev-clean"
    add("--save_dir", default=default, help="folder for the tensors")
    add("--overwrite", action="store_true", help="replace the finished set that save_dir holds")
    add("--resume", action="store_true", help="go on with an interrupted preparation")
    add("--shard", metavar="K/N", type=shard, help="do the Kth of N parts; the last one joins them")
    add(
        "--num_workers", type=positive, default=num_cores(), help="processes that compute and write"
    )
    return parser


def shard(text):
    """An argparse type: "K/N" -> (K, N), K from 1 to N."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"expected K/N, like 1/4 to 4/4, found {text!r}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    build_parser().parse_args()  # --help must not wait for torch

import contextlib
import dataclasses
import itertools
import pickle
import shutil
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import audio
import checkpoint
import datasets
import kaldi_io

STATS = ".cmvn_stats.raw"  # there from the end of the first pass to the end of the second


class Done(NamedTuple):
    """What the main process learns of an utterance that a worker has written."""

    utt_id: str
    num_frames: int  # before truncation
    mel_dim: int
    where: str
    stats: np.ndarray | None = None  # audio.cmvn_stats, over all frames


# In the workers -----------------------------------------------------------------------------------


def pad(frames, max_seq_len):
    """float32 array (T, D) -> tensor (max_seq_len, D), cut or zero-padded."""
    padded = np.zeros((max_seq_len, frames.shape[1]), np.float32)
    padded[: len(frames)] = frames[:max_seq_len]
    return torch.from_numpy(padded)


def save_padded(job, save_dir, max_seq_len, resume):
    """Write the tensors of a job's utterances, as they are -> ([Done], [])."""
    done = []
    for utt_id, frames, where in job():
        path = os.path.join(save_dir, f"{utt_id}.pt")
        padded = pad(frames, max_seq_len)
        if not (resume and is_there(path, padded)):
            # No sync a file: all are on disk before lengths.pkl says that they are there.
            checkpoint.save(padded, path, sync=False)
        done.append(Done(utt_id, *frames.shape, where))
    return done, []


def is_there(path, tensor):
    """Whether a file holds a tensor. After a crash of the machine, files may be empty."""
    try:
        return torch.equal(checkpoint.load(path), tensor)
    except (FileNotFoundError, UserError, TypeError):
        return False


def save_raw(utt_id, frames, where, save_dir, max_seq_len):
    """Keep what normalising an utterance will need, <utt_id>.raw -> Done."""
    stats = audio.cmvn_stats(frames)
    path = os.path.join(save_dir, f"{utt_id}.raw")
    checkpoint.save_arrays([stats, frames[:max_seq_len]], path, sync=False)
    return Done(utt_id, *frames.shape, where, stats)


def read_raw(utt_id, save_dir):
    """What save_raw kept -> (statistics over all frames, the first max_seq_len frames)."""
    path = os.path.join(save_dir, f"{utt_id}.raw")
    with open(path, "rb") as file:
        try:
            return np.load(file), np.load(file)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: damaged: {error}") from None


def save_raw_of_kaldi(job, save_dir, max_seq_len):
    return [save_raw(*utterance, save_dir, max_seq_len) for utterance in job()], []


def save_raw_of_audio(job, config, save_dir, max_seq_len, resume, skip_bad):
    """[(utterance id, file)] -> ([Done], with skip_bad perhaps [what is wrong])."""
    done, bad = [], []
    for utt_id, path in job:
        if resume:
            # Files that a crash of the machine left empty are made again.
            with contextlib.suppress(FileNotFoundError, UserError):
                stats, frames = read_raw(utt_id, save_dir)
                done.append(Done(utt_id, int(stats[0, -1]), frames.shape[1], path, stats))
                continue
        try:
            frames = audio.read_fbank(path, config)
        except (UserError, OSError) as error:
            if not skip_bad:
                raise
            bad.append(" ".join(str(error).split()))
        else:
            done.append(save_raw(utt_id, frames, path, save_dir, max_seq_len))
    return done, bad


def normalise(job, save_dir, max_seq_len):
    """[(utterance id, statistics, or None for its own, or False for no CMVN)]: .raw -> .pt."""
    for utt_id, stats in job:
        path = os.path.join(save_dir, f"{utt_id}.pt")
        try:
            try:
                own_stats, frames = read_raw(utt_id, save_dir)
            except FileNotFoundError:  # done before an interruption, or lost
                checkpoint.load(path, verify=True)
                continue
        except (UserError, FileNotFoundError):
            # The machine has crashed. Without the statistics, --resume does the first pass again:
            # seldom needed, it costs less than to wait for the disk before the .raw goes.
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(save_dir, STATS))
            raise UserError(f"{path}: was lost or damaged: run again with --resume") from None
        if stats is not False:
            frames = audio.apply_cmvn(frames, own_stats if stats is None else stats)
        checkpoint.save(pad(frames, max_seq_len), path, sync=False)
        os.remove(os.path.join(save_dir, f"{utt_id}.raw"))


# In the main process ------------------------------------------------------------------------------


def in_parts(items, size):
    """A list -> (items so far, some of them), a job of `size` items each."""
    for start in range(0, len(items), size):
        part = items[start : start + size]
        yield start + len(part), part


def leftovers(save_dir):
    """Names of the files that preparing makes, and that a finished set is without."""
    ends = (".raw", ".pt.tmp", ".raw.tmp", ".json.tmp", ".pkl.tmp", "skipped.txt.tmp")
    return [name for name in os.listdir(save_dir) if name.endswith(ends)]


def flat(prepared):
    """The settings in prepared.json, the fbank's one by one."""
    keys = ("source", "path", "cmvn", "utt2spk", "max_seq_len", "mel_dim")
    fbank = prepared.get("fbank")
    fbank = fbank if isinstance(fbank, dict) else {"fbank": fbank}
    return {key: prepared.get(key) for key in keys} | fbank


def check_same(save_dir, before, now):
    """UserError if a set was begun with other settings; both as flat() gives them."""
    for key in now:
        if before.get(key) != now[key]:
            raise UserError(
                f"{save_dir}: {key} was {before.get(key)!r} when this set was begun, and is "
                f"{now[key]!r} now: give the same flags, or choose another --save_dir"
            )


def open_save_dir(args, prepared):
    """Make save_dir ready for a new set or for going on -> whether there is anything to do.

    UserError rather than lose anything.
    """
    save_dir = args.save_dir
    os.makedirs(save_dir, exist_ok=True)
    names = os.listdir(save_dir)
    before = datasets.read_prepared(save_dir)
    finished = "lengths.pkl" in names
    if args.resume and before is not None:
        before = flat(before) | {"mel_dim": None}  # known at the end only
        check_same(save_dir, before, flat(prepared))
        return not finished
    if finished and not args.overwrite:
        raise UserError(
            f"{save_dir}: holds a finished set: choose another --save_dir, or --overwrite it"
        )
    ours = [name for name in names if name.endswith((".pt", ".raw"))]
    if ours and before is None and not args.overwrite:
        raise UserError(
            f"{save_dir}: holds files like {ours[0]} that are not of an unfinished set: choose "
            "another --save_dir, or --overwrite them"
        )
    if finished:  # first of all: without it, the set is no longer one
        os.remove(os.path.join(save_dir, "lengths.pkl"))
    for name in {*ours, *leftovers(save_dir), *({"skipped.txt"} & set(names))}:
        os.remove(os.path.join(save_dir, name))
    return True


def first_pass(jobs, function, bar, args, utt2spk):
    """Run the jobs -> what the second pass, and the folder's description, need of them all."""
    num_frames, speakers, stats, skipped, mel_dim = {}, {}, {}, [], None
    for position, (done, bad) in run_jobs(jobs, function, args.num_workers):
        for utt in done:
            if utt.utt_id in num_frames:
                raise UserError(f"{utt.where}: utterance {utt.utt_id}: this id was there before")
            mel_dim = mel_dim or utt.mel_dim
            if utt.mel_dim != mel_dim:
                raise UserError(
                    f"{utt.where}: utterance {utt.utt_id}: expected frames of {mel_dim} numbers, "
                    f"as in the utterances before, found {utt.mel_dim}"
                )
            num_frames[utt.utt_id] = utt.num_frames
            speaker = audio.speaker_of(utt.utt_id, utt.where, args.cmvn, utt2spk)
            if speaker is not None:
                speakers[utt.utt_id] = speaker
                stats[speaker] = stats.get(speaker, 0) + torch.from_numpy(utt.stats)
        skipped += bad
        bar.set_postfix(utterances=len(num_frames), refresh=False)
        bar.update(position - bar.n)
    return {
        "num_frames": num_frames,
        "speakers": speakers,
        "stats": stats,
        "skipped": skipped,
        "mel_dim": mel_dim,
    }


def read_stats(path):
    """What first_pass found before an interruption; None if it did not end, or to the disk."""
    try:
        saved = checkpoint.load(path)
    except (FileNotFoundError, UserError):
        return None
    return saved if isinstance(saved, dict) and "num_frames" in saved else None


def second_pass(saved, args, bar):
    """Normalise and pad what the first pass left."""

    def stats_of(utt_id):
        if args.cmvn in ("none", "utterance"):
            return False if args.cmvn == "none" else None
        return saved["stats"][saved["speakers"][utt_id]].numpy()

    parts = in_parts(list(saved["num_frames"]), 8)
    jobs = ((position, [(utt_id, stats_of(utt_id)) for utt_id in ids]) for position, ids in parts)
    function = partial(normalise, save_dir=args.save_dir, max_seq_len=args.max_seq_len)
    for position, _ in run_jobs(jobs, function, args.num_workers):
        bar.update(position - bar.n)


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    from_audio = args.librispeech_from_audio is not None
    args.cmvn = args.cmvn or ("speaker" if from_audio else "none")
    if args.utt2spk and args.cmvn != "speaker":
        parser.error(f"--utt2spk is for --cmvn speaker, not {args.cmvn}")
    if args.skip_bad and not from_audio:
        parser.error("--skip_bad is for --librispeech_from_audio")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.resume and args.librispeech_from_kaldi == "-":
        parser.error("--resume cannot read standard input again")
    if args.shard and args.overwrite:
        parser.error("--shard and --overwrite exclude each other: remove the old set first")
    if args.shard and (args.cmvn == "global" or (args.cmvn == "speaker" and not from_audio)):
        parser.error("--shard: a shard sees neither the whole corpus nor whole speakers of a dump")
    if not 0 <= args.dither < 2**15:
        parser.error(f"--dither {args.dither}: expected 0 or more, in steps of 16-bit samples")
    if args.max_seq_len > 10**7:
        parser.error(f"--max_seq_len {args.max_seq_len}: expected at most 10000000, a day")
    if args.num_workers > 1024:
        parser.error(f"--num_workers {args.num_workers}: expected at most 1024")
    return args


def main(argv=None):
    args = parse_args(argv)
    if not args.shard:
        prepare(args)
        return
    whole = args.save_dir
    if datasets.is_finished(whole):
        if args.resume:
            print(f"{whole}: is finished already")
            return
        raise UserError(f"{whole}: holds a finished set: choose another --save_dir")
    # A shard is a set of its own until all are there.
    number, count = args.shard
    folders = [os.path.join(whole, f"shard-{k}-of-{count}") for k in range(1, count + 1)]
    args.save_dir = folders[number - 1]
    prepare(args)
    waiting = [path for path in folders if not datasets.is_finished(path)]
    if waiting:
        print(f"{len(waiting)} of {len(folders)} shards are still to come")
        return
    try:
        join_shards(folders, whole)
    except (UserError, FileNotFoundError):
        if not datasets.is_finished(whole):  # another process was faster
            raise


def join_shards(folders, save_dir):
    """Finished shards -> one finished set."""
    lengths, skipped = {}, b""
    parts = [datasets.read_lengths(folder) for folder in folders]
    about = [datasets.read_prepared(folder) or {} for folder in folders]
    prepared = next((one for one in about if one.get("mel_dim")), about[0])
    settings = flat(prepared)
    for key in ("path", "utt2spk"):  # machines may have them in other places
        del settings[key]
    for folder, part, one in zip(folders, parts, about):
        twice = lengths.keys() & part.keys()
        if twice:
            raise UserError(f"{folder}: {sorted(twice)[0]} is in another shard too")
        lengths |= part
        mel_dim = one.get("mel_dim") or prepared.get("mel_dim")  # a shard may be empty
        check_same(folder, flat(one) | {"mel_dim": mel_dim}, settings)
    if not lengths:
        raise UserError(f"{save_dir}: no utterance is left in any shard")
    for folder, part in zip(folders, parts):
        skipped_path = os.path.join(folder, "skipped.txt")
        if os.path.exists(skipped_path):
            with open(skipped_path, "rb") as file:
                skipped += file.read()
        for name in part:
            with contextlib.suppress(FileNotFoundError):  # moved before an interruption
                os.replace(os.path.join(folder, name), os.path.join(save_dir, name))
    lengths = dict(sorted(lengths.items(), key=lambda item: item[0].removesuffix(".pt")))
    finish(save_dir, prepared, lengths, skipped.decode().splitlines())
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{save_dir}: {len(lengths)} utterances of {len(folders)} shards")


def finish(save_dir, prepared, lengths, skipped):
    """Write what makes a folder of tensors a finished set; lengths.pkl last."""
    if skipped:
        with checkpoint.atomic_write(os.path.join(save_dir, "skipped.txt")) as file:
            file.write("".join(f"{line}\n" for line in skipped).encode("utf-8", "replace"))
    checkpoint.write_json(prepared, os.path.join(save_dir, "prepared.json"))
    for name in os.listdir(save_dir):  # of a source that has changed since an interruption
        if name.endswith(".pt") and name not in lengths:
            os.remove(os.path.join(save_dir, name))
    if hasattr(os, "sync"):  # a crash of the machine must not leave lengths.pkl without its tensors
        os.sync()
    with checkpoint.atomic_write(os.path.join(save_dir, "lengths.pkl")) as file:
        pickle.dump(lengths, file, protocol=4)
    sweep(save_dir)


def sweep(save_dir):
    for name in leftovers(save_dir):
        os.remove(os.path.join(save_dir, name))


def share_of_audio(files, args, utt2spk):
    """[(utterance id, file)] -> those of this shard: whole speakers, for the sake of CMVN."""
    number, count = args.shard
    groups = {}
    for utt_id, path in files:
        group = audio.speaker_of(utt_id, path, args.cmvn, utt2spk) or utt_id
        groups.setdefault(group, []).append((utt_id, path))
    return [file for group in sorted(groups)[number - 1 :: count] for file in groups[group]]


def prepare(args):
    utt2spk = kaldi_io.read_utt2spk(args.utt2spk) if args.utt2spk else None
    target = {"save_dir": args.save_dir, "max_seq_len": args.max_seq_len}
    prepared = {
        "source": "kaldi",
        "path": args.librispeech_from_audio or args.librispeech_from_kaldi,
        "fbank": None,  # Kaldi's archives do not tell
        "cmvn": args.cmvn,
        "utt2spk": args.utt2spk,
        "mel_dim": None,
        "max_seq_len": args.max_seq_len,
        "version": __version__,
    }
    skipped = []
    if args.librispeech_from_audio is not None:
        config = audio.FbankConfig(sample_rate=args.sample_rate, dither=args.dither)
        prepared |= {"source": "audio", "fbank": dataclasses.asdict(config)}
        files = audio.find_audio(args.librispeech_from_audio, skipped if args.skip_bad else None)
        if args.shard:
            files = share_of_audio(files, args, utt2spk)
        if args.overwrite and not args.skip_bad:  # all files may be of another rate
            audio.read_fbank(files[0][1], config)
        kind, size, jobs = "audio", len(files), in_parts(files, 4)
        flags = {"resume": args.resume, "skip_bad": args.skip_bad}
        function = partial(save_raw_of_audio, config=config, **flags, **target)
    else:
        kind, size, jobs = kaldi_io.read_kaldi(args.librispeech_from_kaldi)
        # The start is read before anything on disk changes: it may be no features at all.
        jobs = itertools.chain([next(jobs)], jobs)
        if args.shard:
            jobs = itertools.islice(jobs, args.shard[0] - 1, None, args.shard[1])
        function = partial(save_raw_of_kaldi, **target)
        if args.cmvn == "none":
            function = partial(save_padded, resume=args.resume, **target)

    if not open_save_dir(args, prepared):
        sweep(args.save_dir)
        print(f"{args.save_dir}: is finished already")
        return
    print(
        f"preparing {prepared['path']} ({kind}), CMVN: {args.cmvn}, tensors of {args.max_seq_len} "
        f"frames, {args.num_workers} processes -> {args.save_dir}"
    )
    prepared_path = os.path.join(args.save_dir, "prepared.json")
    stats_path = os.path.join(args.save_dir, STATS)
    saved = read_stats(stats_path)
    if saved is None:
        checkpoint.write_json(prepared, prepared_path)
        unit = {"unit": "file"} if kind == "audio" else {"unit": "B", "unit_scale": True}
        with tqdm(total=size, desc="features", dynamic_ncols=True, **unit) as bar:
            saved = first_pass(jobs, function, bar, args, utt2spk)
        saved["skipped"] = skipped + saved["skipped"]
        if not saved["num_frames"] and not args.shard:
            raise UserError(f"{prepared['path']}: no utterance is left: {saved['skipped'][0]}")
    if kind == "audio" or args.cmvn != "none":
        checkpoint.save(saved, stats_path)
        with tqdm(total=len(saved["num_frames"]), desc="CMVN", unit="utt") as bar:
            second_pass(saved, args, bar)

    prepared["mel_dim"] = saved["mel_dim"]
    if args.cmvn == "global":  # a model trained on it needs them for new speech
        prepared["cmvn_stats"] = saved["stats"][""].tolist()
    num_frames = saved["num_frames"]
    lengths = {f"{utt_id}.pt": min(n, args.max_seq_len) for utt_id, n in num_frames.items()}
    finish(args.save_dir, prepared, lengths, saved["skipped"])
    total = sum(num_frames.values())
    print(
        f"{args.save_dir}: {len(lengths)} utterances, {total} frames ({total / 360000:.2f} h at "
        f"10 ms), mel_dim {saved['mel_dim']}; {total - sum(lengths.values())} frames beyond "
        f"max_seq_len were cut, {len(saved['skipped'])} files were skipped"
    )


if __name__ == "__main__":
    run(main)
