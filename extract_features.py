"""Extract features from speech with a trained APC model.

Features are the model's hidden states, as in the papers: for each utterance a float32 matrix
(frames, hidden size), the last layer's outputs; with --layer all or a list, (layers, frames, hidden
size). Layers count from 0, the lowest; with a prenet, 0 is the prenet's output.
"""

import argparse
import datetime
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor
from torch.utils import data

from apc_model import APCModel
from datasets import (
    LibriSpeech,
    Utterances,
    build_loader,
    compared_settings,
    is_finished,
    read_batches,
    warn_of_other_data,
)
from formats import audio
from formats.fbank import cmvn_stats
from load_pretrained import (
    MAX_FRAMES,
    add_residual_flags,
    check_length,
    features_of,
    frame_settings,
    layer_chooser,
    load_pretrained,
    summary,
    training_data,
)
from utils import (
    BadUtterance,
    UserError,
    add_group,
    atomic_write,
    choose_device,
    lock_folder,
    new_parser,
    not_negative,
    num_cores,
    positive,
    progress_bar,
    read_json,
    run_jobs,
    run_main,
    save,
    set_numerics,
    setup_logging,
    start_processes,
    write_json,
    write_lines,
)

EXAMPLES = """\
  python extract_features.py --checkpoint logs/foo.dir/foo__epoch_100.model \\
      --data_dir data/dev-clean --save_dir features/dev-clean
  python extract_features.py --checkpoint apc_360hr.ckpt --audio recordings --save_dir features \\
      --format ark --layer mean
  torchrun --nproc_per_node=4 extract_features.py ...       # each process takes its part"""


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Extract a trained model's hidden states as features of speech.", EXAMPLES)
    group = parser.add_argument_group("model")
    text = "file that load_pretrained.py can read"
    group.add_argument("--checkpoint", required=True, metavar="FILE", help=text)
    add_residual_flags(group)
    text = "last, all, mean, a number from 0 (the lowest) or a list like 0,2 (default: last)"
    group.add_argument("--layer", default="last", help=f"layers whose outputs to extract: {text}")
    group = parser.add_argument_group("input")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", metavar="DIR", help="prepared dataset, of prepare_data.py")
    text = "audio file, folder of audio files at any depth, or Kaldi data directory"
    source.add_argument("--audio", metavar="PATH", help=text)
    audio.add_flags(group)
    add = add_group(parser, "output")
    add("--save_dir", required=True, metavar="DIR", help="folder for the features")
    text = "file format; ark is Kaldi's, with feats.scp"
    add("--format", choices=["pt", "npy", "ark"], default="pt", help=text)
    text = "type of the values"
    add("--dtype", choices=["float32", "float16"], default="float32", help=text)
    text = "skip utterances that are already extracted (pt, npy)"
    add("--resume", action="store_true", help=text)
    add = add_group(parser, "hardware")
    text = "utterances per batch, over all processes"
    add("--batch_size", type=positive, default=32, metavar="N", help=text)
    text = "processes that load data"
    add("--load_data_workers", type=not_negative, default=2, metavar="N", help=text)
    text = "device to compute on"
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help=text)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("utt2spk", *audio.FLAGS, "skip_bad"):
        if args.audio is None and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --audio, not for a prepared dataset")
    if args.format == "ark":
        if args.layer == "all" or "," in args.layer:
            parser.error(f"--format ark holds matrices, but --layer {args.layer} gives several")
        if args.dtype != "float32":
            parser.error("--format ark: Kaldi has no float16: use --dtype float32")
        if args.resume:
            parser.error("--format ark cannot be resumed: start over, or use --format npy")
    return args


# Data ---------------------------------------------------------------------------------------------


class AudioFiles(data.Dataset):
    """--audio, treated as the model's training data were: log-Mel utterances, never cut.

    Every file is read twice: first for its length, its CMVN statistics and to find out whether it
    is bad, and again as it is asked for. Items, ids, lengths, mel_dim and path are like those of
    LibriSpeech, but the tensors are as long as the utterances.

    Args:
        args: the script's.
        prepared: prepared.json of the training data; None if unknown.
        rank, world_size: which part of the files this process measures; then call gather().

    Attributes:
        bad, notes: messages on what was skipped, and on files with another length than they state.
        utt2spk: dict utterance id -> speaker; empty if the model was not trained with CMN by
            speaker.
    """

    def __init__(self, args: argparse.Namespace, prepared: dict | None, rank: int, world_size: int):
        self.fbank, self.cmvn, self.training_stats = frame_settings(prepared)
        self.mel_dim, self.path = self.fbank["num_mel_bins"], args.audio
        if args.utt2spk and self.cmvn.kind != "speaker":
            kind = self.cmvn.kind
            raise UserError(f"--utt2spk {args.utt2spk}: the model was trained with --cmvn {kind}")
        self.bad = [] if args.skip_bad else None
        found = audio.find_audio(args.audio, args.ids_from_paths, args.pattern, self.bad)
        self.recordings, ignored = found
        if ignored:
            logging.info("%s: ignored: %s", args.audio, audio.count_left_out(ignored))
        self.utt2spk = find_speakers(args, self.recordings) if self.cmvn.kind == "speaker" else {}
        options = {"resample": args.resample, "channel": args.channel}
        self.read = partial(audio.read_fbank_blocks, settings=self.fbank, **options)
        jobs = [job for _, job in audio.audio_jobs(self.recordings, self.fbank, **options)]
        jobs = jobs[rank::world_size]
        num_workers = max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        measured = run_jobs(jobs, partial(measure, skip_bad=args.skip_bad), num_workers)
        self.measured = [*progress_bar(measured, desc="CMVN", total=len(jobs), disable=rank > 0)]

    def gather(self, world_size: int) -> None:
        """Put together what all processes have measured."""
        parts = [self.measured] * world_size
        if world_size > 1:
            dist.all_gather_object(parts, self.measured)
        stats, self.bad, self.notes = {}, self.bad or [], []
        for job_stats, job_bad, job_notes in sum(parts, []):
            stats |= job_stats
            self.bad += job_bad
            self.notes += job_notes
        self.recordings = [recording for recording in self.recordings if recording.utt_id in stats]
        if not self.recordings:
            raise UserError(f"{self.path}: every recording was skipped; the first: {self.bad[0]}")
        groups, sums, self.lengths = [], {}, {}
        for recording in self.recordings:
            utt_id = recording.utt_id
            group = self.cmvn.group(utt_id, recording.where(), self.utt2spk)
            groups.append(group)
            sums[group] = sums.get(group, 0) + stats[utt_id]
            self.lengths[f"{utt_id}.pt"] = int(stats[utt_id][0, -1])
        if self.training_stats is not None:
            sums = dict.fromkeys(sums, self.training_stats)
        self.stats, self.ids = [sums[group] for group in groups], [*self.lengths]

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames = torch.cat([*self.read_chunks(index)])
        return frames, len(frames)

    def read_chunks(self, index: int) -> Iterator[Tensor]:
        """Yield an utterance's frames, some of them (t, D) at a time."""
        for frames in self.read(self.recordings[index]):
            yield torch.from_numpy(self.cmvn.apply(frames, self.stats[index]))


def measure(job: Callable, skip_bad: bool) -> tuple[dict, list[str], list[str]]:
    """In a worker: a job of audio_jobs() -> CMVN statistics by utterance id, what was skipped and
    why, warnings."""
    stats, bad, notes = {}, [], []
    for utt_id, _, read in job(notes):
        try:
            stats[utt_id] = sum(map(cmvn_stats, read()))
        except BadUtterance as error:
            if not skip_bad:
                raise
            bad.append(" ".join(str(error).split()))
    return stats, bad, notes


def find_speakers(args: argparse.Namespace, recordings: list) -> dict[str, str]:
    """-> dict utterance id -> speaker, as in prepare_data.py; but a single file is its own."""
    if args.utt2spk is None and os.path.isfile(args.audio):
        logging.info("%s: treated as one speaker, normalised on its own", args.audio)
        return {recordings[0].utt_id: recordings[0].utt_id}
    return audio.speakers_of(recordings, args.audio, args.utt2spk, "--utt2spk FILE")


def open_source(
    args: argparse.Namespace, model: APCModel, rank: int, world_size: int
) -> LibriSpeech | AudioFiles:
    """--data_dir or --audio, of which this process has measured its part."""
    prepared = training_data(model.config, args.checkpoint)
    if args.audio is not None:
        dataset = AudioFiles(args, prepared, rank, world_size)
    else:
        dataset = LibriSpeech(args.data_dir)
        warn_of_other_data(prepared, dataset)
    if dataset.mel_dim != model.mel_dim:
        raise UserError(
            f"{args.data_dir or args.audio}: the feature dimension is {dataset.mel_dim}, but the "
            f"model {args.checkpoint} reads {model.mel_dim}"
        )
    return dataset


# The folder of features ---------------------------------------------------------------------------


def open_save_dir(
    args: argparse.Namespace, model: APCModel, source: LibriSpeech | AudioFiles
) -> FileLock:
    """Make save_dir ready -> its lock; UserError if it holds anything else than this extraction."""
    if is_finished(args.save_dir):
        raise UserError(f"{args.save_dir} is a prepared dataset: choose another --save_dir")
    os.makedirs(args.save_dir, exist_ok=True)
    lock = lock_folder(args.save_dir)
    with open(args.checkpoint, "rb") as file:
        weights = hashlib.sha256(file.read()).hexdigest()
    if args.audio is None:
        about = compared_settings(source)
    else:
        about = {name: getattr(args, name) for name in ("utt2spk", *audio.FLAGS)}
    about |= {
        "weights": weights,
        "source": os.path.realpath(args.data_dir or args.audio),
        "residual": bool(model.rnn_residual),
        "layer": args.layer,
        "format": args.format,
        "dtype": args.dtype,
    }
    path = os.path.join(args.save_dir, "features.json")
    before = read_json(path) if args.resume else None
    for key in about if before else ():
        if before.get(key) != about[key]:
            raise UserError(
                f"{path}: {key} was {before.get(key)!r} when the extraction started, and is "
                f"{about[key]!r} now: --resume needs the same"
            )
    ours = (".pt", ".npy", ".ark", ".scp", "features.json")
    there = [name for name in os.listdir(args.save_dir) if name.endswith(ours)]
    if there and not before:
        can_resume = "features.json" in there and args.format != "ark"
        raise UserError(
            f"{args.save_dir} holds files like {there[0]}: choose another --save_dir"
            f"{', or --resume the extraction into this one' if can_resume else ''}"
        )
    if not before:
        write_json({"checkpoint": args.checkpoint} | about, path)
    return lock


def path_of(args: argparse.Namespace, name: str) -> str:
    return os.path.join(args.save_dir, f"{name}.{args.format}")


def is_done(args: argparse.Namespace, utt_id: str) -> bool:
    """Whether --resume skips an utterance. A crash of the machine may leave an empty file."""
    path = path_of(args, utt_id)
    return args.resume and os.path.exists(path) and os.path.getsize(path) > 0


def write_features(args: argparse.Namespace, features: Iterable, ark: str) -> io.StringIO:
    """Write (utterance id, features) as they come -> the lines of the ark's scp."""
    scp = io.StringIO()
    for utt_id, values in features:
        values = values.to(getattr(torch, args.dtype))
        if not values.isfinite().all():
            logging.error("%s: its features are not all finite", utt_id)
        if args.format == "pt":
            save(values, path_of(args, utt_id), sync=False)
        elif args.format == "npy":
            write_npy(values, path_of(args, utt_id))
        else:
            append_to_ark(values, utt_id, ark, scp)
    return scp


def write_npy(features: Tensor, path: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, features.numpy())  # into a file, it does not always notice a full disk
    with atomic_write(path, sync=False) as file:
        file.write(buffer.getbuffer())


def append_to_ark(features: Tensor, utt_id: str, path: str, scp: io.StringIO) -> None:
    """Append an utterance to Kaldi's archive, and its line to `scp`."""
    import kaldiio

    try:
        with open(path, "ab") as ark:
            kaldiio.save_ark(ark, {utt_id: features.numpy()}, scp=scp)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def write_scp(scp: io.StringIO, path: str, rank: int, world_size: int) -> None:
    """Write the lines of all processes to one file, sorted as Kaldi wants it."""
    parts = [scp.getvalue()] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, parts[0])
    if rank == 0:
        write_lines(sorted("".join(parts).splitlines(), key=str.encode), path)


# Extraction ---------------------------------------------------------------------------------------


def check_dataset(args: argparse.Namespace, model: APCModel, dataset: Utterances) -> None:
    """UserError if an utterance cannot be processed or written."""
    longest = dataset.num_frames.argmax()
    check_length(model, dataset.ids[longest], dataset.num_frames[longest])
    for utt_id in dataset.ids if args.format == "ark" else ():
        if re.search(r"[\s\ud800-\udfff]", utt_id):
            raise UserError(f"utterance id {utt_id!r}: in an ark ids are text without spaces")


def plan(todo: list[int], num_frames: np.ndarray, batch_size: int) -> tuple[list, list]:
    """Utterances by length -> batches of up to MAX_FRAMES frames, and those longer than that."""
    short = [i for i in todo if num_frames[i] <= MAX_FRAMES]
    batches = []
    for start in range(0, len(short), batch_size):
        batch = short[start : start + batch_size]
        size = MAX_FRAMES // num_frames[batch[-1]]
        batches += [batch[i : i + size] for i in range(0, len(batch), size)]
    return batches, todo[len(short) :]


@torch.inference_mode()
def extract(
    model: APCModel,
    dataset: Utterances,
    loader: data.DataLoader,
    long: list[int],
    choose: Callable[[Tensor], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield (utterance id, features ((layers,) T, H)): first the loader's, then the long ones'."""
    device = next(model.parameters()).device
    for inputs, lengths, ids in read_batches(loader):
        internal_reps = model(inputs.to(device, non_blocking=True), lengths)[1]
        features = choose(internal_reps).cpu()  # ((layers,) B, T, H)
        for i, (utt_id, length) in enumerate(zip(ids, lengths.tolist())):
            yield utt_id, features[..., i, :length, :].clone()
    (source,) = dataset.datasets
    for i in long:
        num_frames = int(dataset.num_frames[i])
        yield dataset.ids[i], features_of(model, source.read_chunks(i), num_frames, choose)


def sum_over_processes(numbers: list[int], world_size: int) -> list[int]:
    """Add up every process' numbers; which also waits for all of them."""
    total = torch.tensor(numbers)
    try:
        if world_size > 1:
            dist.all_reduce(total)  # on the CPU: a GPU's barrier would keep it busy
    except RuntimeError:
        raise UserError("another process of this run failed: see its error") from None
    return total.tolist()


def announce(
    args: argparse.Namespace, model: APCModel, dataset: Utterances, counts: list[int], where: str
) -> None:
    """Print what is about to be done."""
    (source,) = dataset.datasets
    if args.audio is not None:
        if source.utt2spk:
            speakers = [source.utt2spk[utt_id] for utt_id in dataset.ids]
            hours = dataset.num_frames.sum() * source.fbank["frame_shift_ms"] / 3.6e6
            each = hours / len({*speakers})
            print(f"speakers: {audio.describe_speakers(speakers)}, {each:.3g} h each")
        for note in source.notes[:10]:
            logging.warning(note)
    print(
        f"extracting layer {args.layer} of {args.checkpoint} ({summary(model)}) for {counts[0]} of "
        f"{len(dataset)} utterances, {counts[1]} frames of {args.data_dir or args.audio}, on "
        f"{where} -> {args.save_dir}"
    )


def report(args: argparse.Namespace, source: LibriSpeech | AudioFiles, num_new: int) -> None:
    """List what was odd about the recordings, if anything was, and print the last line."""
    num_old = len(source) - num_new
    text = f"features of {num_new} utterances written, {num_old} were already there"
    if args.audio is not None:
        for name, lines in (("skipped.txt", source.bad), ("truncated.txt", source.notes)):
            if lines:
                write_lines(lines, os.path.join(args.save_dir, name))
                text += f"; {len(lines)} recordings in {name}"
    print(f"{args.save_dir}: {text}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup_logging()
    set_numerics()
    choose_device(args.device)  # which may be an error, before the long first pass over audio
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        logging.disable(logging.WARNING)  # rank 0 says the same
    model = load_pretrained(args.checkpoint, residual=args.residual)
    choose = layer_chooser(args.layer, model)
    source = open_source(args, model, rank, world_size)
    # Only now, after the workers above were forked, join the other processes. Whoever finishes
    # first may wait for the others for long, hence the timeout.
    rank, world_size, device = start_processes(args.device, datetime.timedelta(days=365))
    if args.audio is not None:
        source.gather(world_size)
    dataset = Utterances([source])
    check_dataset(args, model, dataset)
    lock = open_save_dir(args, model, source) if rank == 0 else None

    # Each process has its own utterances, of all lengths.
    num_frames = dataset.num_frames
    mine = np.argsort(num_frames, kind="stable")[rank::world_size].tolist()
    todo = [i for i in mine if not is_done(args, dataset.ids[i])]
    counts = sum_over_processes([len(todo), int(num_frames[todo].sum())], world_size)
    if rank == 0:
        where = f"{device} ({world_size} processes)" if world_size > 1 else f"{device}"
        announce(args, model, dataset, counts, where)
    batches, long = plan(todo, num_frames, max(1, args.batch_size // world_size))
    loader = build_loader(dataset, batches, args.load_data_workers, device)
    features = extract(model.to(device), dataset, loader, long, choose)
    features = progress_bar(features, total=len(todo), unit="utt", disable=rank > 0)
    ark = os.path.abspath(path_of(args, f"feats.{rank + 1}" if world_size > 1 else "feats"))
    scp = write_features(args, features, ark)
    sum_over_processes([0], world_size)
    if args.format == "ark":
        write_scp(scp, os.path.join(args.save_dir, "feats.scp"), rank, world_size)
    if rank == 0:
        report(args, source, counts[0])
        lock.release()


if __name__ == "__main__":
    run_main(main)
