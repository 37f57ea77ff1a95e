"""Extract features from speech with a trained APC model.

    python extract_features.py --checkpoint logs/foo.dir/foo__epoch_100.model \\
        --data_dir data/dev-clean --save_dir features/dev-clean
    python extract_features.py --checkpoint apc_360hr.ckpt --audio recordings --save_dir features \\
        --format ark --layer mean
    torchrun --nproc_per_node=4 extract_features.py ...        # the utterances shared out

Writes a float32 matrix (frames, hidden size) for each utterance: the last layer's outputs, as in
the papers. With --layer all or a list, (layers, frames, hidden size); a prenet's output is layer 0.
"""

import argparse
import datetime
import hashlib
import io
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import data
from tqdm import tqdm

from apc_model import APCModel
from datasets import (
    BatchSampler,
    LibriSpeech,
    Utterances,
    build_loader,
    is_finished,
    read_batches,
    warn_of_other_data,
)
from formats import audio
from formats.fbank import apply_cmvn, cmvn_group, cmvn_settings, cmvn_stats, fbank_settings
from formats.kaldi import read_utt2spk
from load_pretrained import add_residual_flags, load_with_config, summary, training_data
from utils import (
    HelpFormatter,
    UserError,
    atomic_write,
    lock_folder,
    not_negative,
    num_cores,
    on_each_core,
    positive,
    read_json,
    report_machine_errors,
    run_jobs,
    run_main,
    save,
    setup_logging,
    start_processes,
    write_json,
)

MAX_FRAMES = 1 << 16  # through the model at once, padding included; longer utterances are streamed


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a trained model's hidden states as features of speech.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", required=True, metavar="FILE", help="any that load_pretrained.py reads")
    add_residual_flags(parser)
    source = parser.add_argument_group("speech, one of").add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", metavar="DIR", help="folder from prepare_data.py")
    source.add_argument(
        "--audio", metavar="DIR", help="a folder, a Kaldi data directory, or a file"
    )
    audio.add_flags(parser)
    add = parser.add_argument_group("features").add_argument
    add("--save_dir", required=True, metavar="DIR", help="folder for the features")
    layer = "last, all, mean, a number from 0 (the lowest) or a list like 0,2"
    add("--layer", default="last", help=f"which layers' outputs: {layer}")
    add("--format", choices=["pt", "npy", "ark"], default="pt", help="ark: Kaldi's, with feats.scp")
    add("--dtype", choices=["float32", "float16"], default="float32", help="of the numbers")
    add("--resume", action="store_true", help="skip the utterances that are there (.pt, .npy)")
    add = parser.add_argument_group("machine").add_argument
    add("--batch_size", type=positive, default=32, help="utterances at a time, over all processes")
    add("--load_data_workers", type=not_negative, default=2, help="processes that load data")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("utt2spk", "ids_from_paths", "resample", "channel"):
        if args.audio is None and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --audio, not for a prepared folder")
    if args.format == "ark":
        if args.layer == "all" or "," in args.layer:
            parser.error(f"--format ark holds matrices, but --layer {args.layer} gives several")
        if args.dtype != "float32":
            parser.error("--format ark: Kaldi has no float16: use --dtype float32")
        if args.resume:
            parser.error("--format ark cannot be resumed: start over, or use --format npy")
    return args


# Model and data -----------------------------------------------------------------------------------


def choose_layers(name: str, num_layers: int) -> Callable[[Tensor], Tensor]:
    """The flag --layer -> a function from internal_reps (L, B, T, H) to ((layers,) B, T, H)."""
    if name == "mean":
        return lambda reps: reps.mean(dim=0)
    if name == "all":
        return lambda reps: reps
    numbers = [num_layers - 1] if name == "last" else []
    if re.fullmatch(r"\d{1,3}(,\d{1,3})*", name):
        numbers = [int(number) for number in name.split(",")]
    if not numbers or max(numbers) >= num_layers:
        choices = ["last", "all", "mean", *map(str, range(num_layers))]
        raise UserError(f"--layer {name}: this model has: {', '.join(choices)}, or a list like 0,1")
    if len(numbers) == 1:
        return lambda reps: reps[numbers[0]]
    return lambda reps: reps[numbers]


class AudioFiles(data.Dataset):
    """--audio, treated as the model's training data were: log-Mel utterances, never cut.

    All files are read once beforehand, to find bad ones and for CMVN statistics, and then again as
    they are asked for. Items and attributes are those of LibriSpeech, but the tensors are
    as long as the utterances.

    Args:
        args: the script's.
        prepared: prepared.json of the training data; None if unknown.
    """

    def __init__(self, args: argparse.Namespace, prepared: dict | None):
        if prepared and prepared.get("source") == "audio":
            fbank = prepared["fbank"]
            cmvn, self.options = cmvn_settings(prepared)
        else:
            fbank, cmvn, self.options = fbank_settings(), "speaker", {"norm_vars": False}
            logging.warning(
                "it is not known how the features that the model was trained on were made: taking "
                "the original's fbank settings and mean normalisation by speaker"
            )
        if args.utt2spk and cmvn != "speaker":
            raise UserError(f"--utt2spk {args.utt2spk}: the model was trained with --cmvn {cmvn}")
        self.recordings, left_out = audio.find_audio(args.audio, args.ids_from_paths)
        if left_out:
            logging.info("left out of %s: %s", args.audio, audio.count_left_out(left_out))
        utt2spk = open_speakers(args, self.recordings) if cmvn == "speaker" else {}
        options = {"resample": args.resample, "channel": args.channel}
        self.read = partial(audio.read_fbank_blocks, settings=fbank, **options)
        self.ids = [f"{recording.utt_id}.pt" for recording in self.recordings]
        self.mel_dim = fbank["num_mel_bins"]

        groups, self.lengths, group_stats = [], {}, {}
        measured = run_jobs(self.recordings, partial(measure, self.read), num_cores())
        for stats, recording in zip(measured, self.recordings):
            group = cmvn_group(recording.utt_id, recording.path, cmvn, utt2spk)
            groups.append(group)
            self.lengths[f"{recording.utt_id}.pt"] = int(stats[0, -1])
            group_stats[group] = group_stats.get(group, 0) + stats
        if cmvn == "global":
            group_stats = {"all": np.array(prepared["cmvn_stats"])}  # the training data's
        self.stats = None if cmvn == "none" else [group_stats[group] for group in groups]

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames = torch.cat([*self.read_chunks(index)])
        return frames, len(frames)

    def read_chunks(self, index: int) -> Iterator[Tensor]:
        """Yield an utterance's frames, some of them (t, D) at a time."""
        for frames in self.read(self.recordings[index]):
            if self.stats is not None:
                frames = apply_cmvn(frames, self.stats[index], **self.options)
            yield torch.from_numpy(frames)


def open_speakers(args: argparse.Namespace, recordings: list) -> dict[str, str]:
    """-> dict utterance id -> speaker, as in prepare_data.py; but a single file is its own."""
    if args.utt2spk:
        utt2spk = read_utt2spk(args.utt2spk)
    elif os.path.isfile(args.audio):
        logging.info("%s: is taken as a speaker of its own, and normalised by itself", args.audio)
        utt2spk = {recordings[0].utt_id: recordings[0].utt_id}
    else:
        utt2spk = audio.speakers_of(recordings)
    logging.info("normalising by speaker: %d of them", len(set(utt2spk.values())))
    return utt2spk


def measure(read: Callable, recording: audio.Recording) -> np.ndarray:
    """The CMVN statistics of a recording, computed in a worker."""
    return sum(map(cmvn_stats, read(recording)))


def open_source(args: argparse.Namespace, model: APCModel, prepared: dict | None):
    """--data_dir or --audio -> LibriSpeech or AudioFiles; UserError if the model cannot read it."""
    if args.audio is not None:
        dataset = AudioFiles(args, prepared)
    else:
        dataset = LibriSpeech(args.data_dir)
        # With every fbank option filled in, as the model's has.
        dataset.prepared = training_data({"data": [dataset.prepared]}, args.data_dir)
        warn_of_other_data(prepared, dataset)
    if dataset.mel_dim != model.mel_dim:
        raise UserError(
            f"{args.data_dir or args.audio}: its frames have {dataset.mel_dim} numbers, but the "
            f"model {args.checkpoint} reads {model.mel_dim}"
        )
    return dataset


# Writing features ---------------------------------------------------------------------------------


def write_file(features: Tensor, path: str) -> None:
    """Write an utterance's .pt or .npy."""
    if path.endswith(".pt"):
        save(features, path, sync=False)
        return
    with atomic_write(path, sync=False) as file:
        # Not np.save, which does not notice a full disk.
        header = np.lib.format.header_data_from_array_1_0(features.numpy())
        np.lib.format.write_array_header_1_0(file, header)
        file.write(features.numpy())


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
        dist.gather_object(parts[0], parts if rank == 0 else None)
    if rank == 0:
        lines = "".join(parts).encode("utf-8", "surrogateescape").splitlines(keepends=True)
        with atomic_write(path) as file:
            file.writelines(sorted(lines))


def open_save_dir(args: argparse.Namespace, model: APCModel) -> None:
    """Make save_dir ready; UserError if it holds anything else than this extraction."""
    if is_finished(args.save_dir):
        raise UserError(f"{args.save_dir}: is a prepared folder: choose another --save_dir")
    os.makedirs(args.save_dir, exist_ok=True)
    lock_folder(args.save_dir)
    weights = hashlib.sha256()
    for name, weight in model.state_dict().items():
        weights.update(name.encode() + weight.cpu().numpy().tobytes())
    about = {
        "weights": weights.hexdigest(),
        "source": os.path.realpath(args.data_dir or args.audio),
        "residual": bool(model.rnn_residual),
        "layer": args.layer,
        "format": args.format,
        "dtype": args.dtype,
    }
    path = os.path.join(args.save_dir, "features.json")
    before = read_json(path) if args.resume else None
    if before is not None:
        for key, value in about.items():
            if before.get(key) != value:
                raise UserError(
                    f"{path}: {key} was {before.get(key)!r} when this was begun, and is {value!r} "
                    "now: --resume needs the same"
                )
        return
    ours = (".pt", ".npy", ".ark", ".scp", "features.json")
    there = [name for name in os.listdir(args.save_dir) if name.endswith(ours)]
    if there:
        raise UserError(
            f"{args.save_dir}: holds files like {there[0]}: choose another --save_dir"
            f"{'' if args.format == 'ark' else ', or --resume what was begun there'}"
        )
    write_json({"checkpoint": args.checkpoint} | about, path)


# Extraction ---------------------------------------------------------------------------------------


def plan(todo: np.ndarray, num_frames: np.ndarray, batch_size: int) -> tuple[list, list]:
    """Utterances -> batches of at most MAX_FRAMES frames, and the utterances longer than that."""
    is_long = num_frames[todo] > MAX_FRAMES
    short, batches = todo[~is_long], []
    for batch in BatchSampler(num_frames[short], batch_size, shuffle=False):
        size = MAX_FRAMES // num_frames[short[batch]].max()
        batches += [short[batch[i : i + size]].tolist() for i in range(0, len(batch), size)]
    return batches, todo[is_long].tolist()


def extract_batch(
    model: APCModel, device: torch.device, choose: Callable, inputs, lengths, ids
) -> list[tuple[str, Tensor]]:
    """A batch -> (utterance id, ((layers,) T, H)) of each utterance."""
    with torch.inference_mode():
        inputs = inputs[:, : lengths.max()].to(device, non_blocking=True)
        features = choose(model(inputs, lengths)[1]).cpu()  # ((layers,) B, T, H)
    lengths = lengths.tolist()
    return [(utt_id, features[..., i, : lengths[i], :].clone()) for i, utt_id in enumerate(ids)]


def extract_long(
    model: APCModel, device: torch.device, choose: Callable, chunks: Iterator[Tensor], length: int
) -> Tensor:
    """An utterance's chunks (t, D), `length` frames in all -> features ((layers,) T, H).

    The model is causal: of what came before it needs only its state.
    """
    features, state, done = None, None, 0
    with torch.inference_mode():
        for chunk in chunks:
            _, internal_reps, state = model.stream(chunk[None].to(device), state)
            new = choose(internal_reps)[..., 0, :, :].cpu()  # ((layers,) t, H)
            if features is None:
                features = new.new_empty(*new.shape[:-2], length, new.shape[-1])
            features[..., done : done + len(chunk), :] = new
            done += len(chunk)
    return features


def extract(
    model: APCModel, source, loader: data.DataLoader, long: list[int], device, choose: Callable
) -> Iterator[tuple[str, Tensor]]:
    """Yield (utterance id, features) of the loader's utterances, then of the long ones."""
    function = partial(extract_batch, model, device, choose)
    for batch in read_batches(loader):
        shares = on_each_core(function, *batch) if device.type == "cpu" else [function(*batch)]
        yield from itertools.chain(*shares)
    for i in long:
        name = source.ids[i]
        features = extract_long(model, device, choose, source.read_chunks(i), source.lengths[name])
        yield name.removesuffix(".pt"), features


def run(args: argparse.Namespace, rank: int, world_size: int, device: torch.device) -> None:
    model, config = load_with_config(args.checkpoint, device, args.residual)
    layers = choose_layers(args.layer, len(model.rnns) + (model.prenet is not None))
    source = open_source(args, model, training_data(config, args.checkpoint))
    dataset = Utterances([source])
    num_frames, is_ark = dataset.num_frames, args.format == "ark"
    for utt_id in dataset.ids if is_ark else ():
        if re.search(r"[\s\ud800-\udfff]", utt_id):
            raise UserError(f"utterance id {utt_id!r}: an ark's ids are text without spaces")
    if rank == 0:
        open_save_dir(args, model)
    wait_for_others(world_size)

    def path_of(utt_id):
        return os.path.join(args.save_dir, f"{utt_id}.{args.format}")

    def is_done(utt_id):  # a crash of the machine may leave an empty file
        return os.path.exists(path_of(utt_id)) and os.path.getsize(path_of(utt_id)) > 0

    # Each process has its own utterances, of all lengths.
    mine = np.argsort(num_frames, kind="stable")[rank::world_size]
    todo = np.array([i for i in mine if not (args.resume and is_done(dataset.ids[i]))], int)
    print(
        f"extracting layer {args.layer} of {args.checkpoint} ({summary(model)}) for {len(todo)} of "
        f"{len(dataset)} utterances, {num_frames[todo].sum()} frames of "
        f"{args.data_dir or args.audio}, on {device}, process {rank + 1} of {world_size} -> "
        f"{args.save_dir}"
    )
    batches, long = plan(todo, num_frames, max(1, args.batch_size // world_size))
    batch_frames = max((len(batch) * num_frames[batch].max() for batch in batches), default=0)
    loader = build_loader(
        dataset, batches, batch_frames, args.load_data_workers, device, world_size
    )
    dtype = getattr(torch, args.dtype)
    ark = os.path.abspath(path_of(f"feats.{rank + 1}" if world_size > 1 else "feats"))
    scp = io.StringIO()
    with tqdm(total=len(todo), unit="utt", disable=rank > 0) as bar:
        for utt_id, features in extract(
            model, source, loader, long, device, lambda reps: layers(reps).to(dtype)
        ):
            if not all(part.isfinite().all() for part in features.split(4096, dim=-2)):
                logging.error("%s: its features are not all finite", utt_id)
            if is_ark:
                append_to_ark(features, utt_id, ark, scp)
            else:
                write_file(features, path_of(utt_id))
            bar.update()
    wait_for_others(world_size)
    if is_ark:
        write_scp(scp, os.path.join(args.save_dir, "feats.scp"), rank, world_size)
    print(
        f"{args.save_dir}: features of {len(todo)} utterances written, {len(mine) - len(todo)} "
        "were there already"
    )


def wait_for_others(world_size: int) -> None:
    if world_size > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU: a GPU's barrier would keep it busy


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup_logging()
    # The first process to finish may have to wait a long time for the others.
    rank, world_size, device = start_processes(args.device, timeout=datetime.timedelta(days=365))
    with report_machine_errors(device, rank, world_size, "lower --batch_size"):
        run(args, rank, world_size, device)


if __name__ == "__main__":
    run_main(main)
