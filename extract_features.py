"""Write the features that a trained APC model makes of speech.

    python extract_features.py --checkpoint logs/foo.dir/foo__epoch_100.model \\
        --data_dir data/dev-clean --save_dir features/dev-clean
    python extract_features.py --checkpoint apc_360hr.ckpt --audio recordings --save_dir features \\
        --format ark --layer mean
    torchrun --nproc_per_node=4 extract_features.py ...        # the utterances shared out

Writes a float32 matrix (frames, hidden size) an utterance: the last layer's outputs, as in the
papers. With --layer all or a list, (layers, frames, hidden size); a prenet's output is layer 0.
"""

import argparse
import os

from utils import (
    HelpFormatter,
    UserError,
    add_residual_flags,
    loader_context,
    not_negative,
    num_cores,
    positive,
    run,
    run_jobs,
    setup_logging,
    start_processes,
)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", required=True, metavar="FILE", help="any that load_pretrained.py reads")
    add_residual_flags(parser)
    source = parser.add_argument_group("speech, one of").add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", metavar="DIR", help="folder from prepare_data.py")
    source.add_argument("--audio", metavar="PATH", help=".flac or .wav file, or a folder of them")
    parser.add_argument("--utt2spk", metavar="FILE", help="Kaldi's, for models with speaker CMVN")
    add = parser.add_argument_group("features").add_argument
    add("--save_dir", required=True, metavar="DIR", help="folder for the features")
    layer = "last, all, mean, a number from 0 (the lowest) or a list like 0,2"
    add("--layer", default="last", help=f"which layers' outputs: {layer}")
    add("--format", choices=["pt", "npy", "ark"], default="pt", help="ark: Kaldi's, with feats.scp")
    add("--dtype", choices=["float32", "float16"], default="float32", help="of the numbers")
    add("--resume", action="store_true", help="go on: skip the utterances that are there")
    add = parser.add_argument_group("machine").add_argument
    add("--batch_size", type=positive, default=32, help="utterances at a time, over all processes")
    add("--load_data_workers", type=not_negative, default=2, help="processes that load data")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()  # --help must not wait for torch

import contextlib
import logging
import re
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import audio
import checkpoint
import kaldi_io
from datasets import (
    AudioFiles,
    BatchSampler,
    LibriSpeech,
    collate,
    frame_counts,
    is_finished,
    warn_of_other_data,
)
from load_pretrained import load_with_config, summary, training_data

MAX_FRAMES = 1 << 16  # padded frames through the model at once, unless an utterance has more


def choose_layers(name, num_layers):
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


def open_audio(args, data):
    """--audio, and how the model's training data were made (or None) -> AudioFiles.

    All files are read once beforehand: for what is wrong with one, for speakers' statistics.
    """
    config, cmvn = audio.FbankConfig(), "speaker"
    if data and data.get("source") == "audio":
        config, cmvn = audio.FbankConfig(**data["fbank"]), data["cmvn"]
    else:
        logging.warning(
            "how the features that the model was trained on were made is not known: taking the "
            "original's fbank settings and CMVN by speaker"
        )
    files = audio.find_audio(args.audio)
    if args.utt2spk and cmvn != "speaker":
        raise UserError(f"--utt2spk {args.utt2spk}: the model was trained with --cmvn {cmvn}")
    utt2spk = kaldi_io.read_utt2spk(args.utt2spk) if args.utt2spk else None
    num_frames, stats, speakers = {}, {}, {}
    jobs = enumerate(files)
    for _, (utt_id, path, frames, utt_stats) in run_jobs(
        jobs, partial(measure, config=config), num_cores()
    ):
        speaker = audio.speaker_of(utt_id, path, cmvn, utt2spk)
        speakers[utt_id] = utt_id if speaker is None else speaker
        stats[speakers[utt_id]] = stats.get(speakers[utt_id], 0) + utt_stats
        num_frames[utt_id] = frames
    if cmvn == "global":
        stats = {"": np.array(data["cmvn_stats"])}
    of_utt = {utt_id: stats[speaker] for utt_id, speaker in speakers.items()}
    return AudioFiles(files, config, None if cmvn == "none" else of_utt, num_frames)


def measure(job, config):
    """(utterance id, path) -> (both, frames, CMVN statistics). Runs in a worker."""
    frames = audio.read_fbank(job[1], config)
    return *job, len(frames), audio.cmvn_stats(frames)


class FileWriter:
    """A file an utterance: <utt_id>.pt or .npy."""

    def __init__(self, save_dir, ending, resume):
        self.save_dir = save_dir
        self.ending = ending
        self.resume = resume

    def path(self, utt_id):
        return os.path.join(self.save_dir, f"{utt_id}.{self.ending}")

    def has(self, utt_id):
        path = self.path(utt_id)  # empty after a crash of the machine
        return self.resume and os.path.exists(path) and os.path.getsize(path) > 0

    def write(self, utt_id, features):
        if self.ending == "pt":
            checkpoint.save(features, self.path(utt_id), sync=False)
        else:
            checkpoint.save_arrays([features.numpy()], self.path(utt_id), sync=False)

    def close(self):
        pass


class ArkWriter:
    """Kaldi's <name>.ark and <name>.scp, under these names only when they are complete.

    It goes on with what an earlier one left there.
    """

    def __init__(self, save_dir, name):
        self.path = os.path.abspath(os.path.join(save_dir, name))
        self.finished = os.path.exists(f"{self.path}.scp")
        if self.finished:
            with contextlib.suppress(FileNotFoundError):  # close() was cut off
                os.remove(f"{self.path}.scp.part")
            with open(f"{self.path}.scp", "rb") as file:
                self.ids = {line.split(b" ")[0].decode() for line in file}
            return
        if os.path.exists(f"{self.path}.ark"):  # close() was cut off
            os.replace(f"{self.path}.ark", f"{self.path}.ark.part")
        self.ark = open(f"{self.path}.ark.part", "ab")  # noqa: SIM115
        self.scp = open(f"{self.path}.scp.part", "ab+")  # noqa: SIM115
        self.scp.seek(0)
        lines = [line for line in self.scp if line.endswith(b"\n")]
        # The last line's utterance is made again: where it begins, the ones before it end. After a
        # crash of the machine the archive may be shorter than that.
        end, size = 0, self.ark.seek(0, os.SEEK_END)
        while lines:
            last = lines.pop()
            start = int(last.rsplit(b":")[-1]) - len(last.split(b" ")[0]) - 1
            if start <= size:
                end = start
                break
        self.ark.truncate(end)
        self.scp.truncate(sum(map(len, lines)))
        self.ids = {line.split(b" ")[0].decode() for line in lines}

    def has(self, utt_id):
        return utt_id in self.ids

    def write(self, utt_id, features):
        if self.finished:
            raise UserError(f"{self.path}.ark: is finished, and without {utt_id}: start anew")
        import kaldiio

        start = self.ark.seek(0, os.SEEK_END)
        offset = start + len(utt_id.encode()) + 1  # of the matrix, behind "utt_id "
        kaldiio.save_ark(self.ark, {utt_id: features.numpy()})
        self.ark.flush()
        self.scp.write(os.fsencode(f"{utt_id} {self.path}.ark:{offset}\n"))
        self.scp.flush()

    def close(self):
        if self.finished:
            return
        os.fsync(self.ark.fileno())
        self.ark.close()
        os.replace(f"{self.path}.ark.part", f"{self.path}.ark")
        self.scp.seek(0)
        with checkpoint.atomic_write(f"{self.path}.scp") as file:
            file.writelines(sorted(self.scp))
        self.scp.close()
        os.remove(f"{self.path}.scp.part")


def open_writer(args, residual, ids, rank, world_size):
    """Make save_dir ready -> the writer of the format. UserError if it is of another extraction."""
    if is_finished(args.save_dir):
        raise UserError(f"{args.save_dir}: is a prepared folder: choose another --save_dir")
    about = {
        "checkpoint": args.checkpoint,
        "source": args.data_dir or args.audio,
        "residual": residual,
        "layer": args.layer,
        "format": args.format,
        "dtype": args.dtype,
        "processes": world_size if args.format == "ark" else None,
    }
    path = os.path.join(args.save_dir, "features.json")
    before = checkpoint.read_json(path) if args.resume else None
    if before is not None:
        for key, value in about.items():
            if before.get(key) != value:
                raise UserError(
                    f"{path}: {key} was {before.get(key)!r} when this was begun, and is {value!r} "
                    "now: --resume needs the same"
                )
    elif rank == 0:
        os.makedirs(args.save_dir, exist_ok=True)
        ours = (".pt", ".npy", ".ark", ".scp", ".part", "features.json")
        there = [name for name in os.listdir(args.save_dir) if name.endswith(ours)]
        if there:
            raise UserError(
                f"{args.save_dir}: holds files like {there[0]}: choose another --save_dir, or "
                "--resume what was begun there"
            )
        checkpoint.write_json(about, path)
    if world_size > 1:
        dist.barrier()
    if args.format != "ark":
        return FileWriter(args.save_dir, args.format, args.resume)
    for utt_id in ids:
        if re.search(r"[\s\ud800-\udfff]", utt_id):
            raise UserError(f"utterance id {utt_id!r}: an ark's ids are text without spaces")
    return ArkWriter(args.save_dir, f"feats.{rank + 1}" if world_size > 1 else "feats")


def extract(model, loader, device, choose, dtype):
    """Run a loader's utterances through the model -> (utterance id, ((layers,) T, H)) of each."""
    dataset, todo = loader.dataset.dataset, loader.dataset.indices
    # The order is fixed, so that a second round of the sampler tells what a batch holds.
    for (inputs, lengths), indices in zip(loader, loader.batch_sampler):
        # Long recordings go through in smaller batches than asked for.
        part = max(1, MAX_FRAMES // inputs.size(1))
        for start in range(0, len(indices), part):
            part_lengths = lengths[start : start + part]
            part_inputs = inputs[start : start + part, : part_lengths.max()]
            _, internal_reps = model(part_inputs.to(device, non_blocking=True), part_lengths)
            features = choose(internal_reps).to(dtype).cpu()  # ((layers,) B, T, H)
            for i, length in enumerate(part_lengths.tolist()):
                utt_id = dataset.ids[todo[indices[start + i]]].removesuffix(".pt")
                yield utt_id, features[..., i, :length, :].clone()


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.utt2spk and args.audio is None:
        parser.error("--utt2spk is for --audio: a prepared folder is normalised already")
    setup_logging()
    rank, world_size, device = start_processes(args.device)
    model, config = load_with_config(args.checkpoint, device, args.residual)
    trained = training_data(config, args.checkpoint)
    choose = choose_layers(args.layer, len(model.rnns) + (model.prenet is not None))
    if args.format == "ark" and (args.layer == "all" or "," in args.layer):
        raise UserError(f"--format ark holds matrices, but --layer {args.layer} gives one a layer")
    if args.format == "ark" and args.dtype != "float32":
        raise UserError("--format ark: Kaldi has no float16: leave --dtype float32")
    if args.audio is not None:
        dataset = open_audio(args, trained)
    else:
        dataset = LibriSpeech(args.data_dir)
        warn_of_other_data(trained, dataset)
    source = args.data_dir or args.audio
    if dataset.mel_dim != model.mel_dim:
        raise UserError(
            f"{source}: its frames have {dataset.mel_dim} numbers, but the model {args.checkpoint} "
            f"reads {model.mel_dim}"
        )
    # Each process has its own utterances, of all lengths.
    num_frames = frame_counts(dataset)
    mine = np.argsort(num_frames, kind="stable")[rank::world_size].tolist()
    writer = open_writer(args, bool(model.rnn_residual), dataset.ids, rank, world_size)
    todo = [i for i in mine if not writer.has(dataset.ids[i].removesuffix(".pt"))]
    print(
        f"extracting layer {args.layer} of {args.checkpoint} ({summary(model)}) for {len(todo)} of "
        f"{len(dataset)} utterances, {num_frames[todo].sum()} frames of {source}, on {device}, "
        f"process {rank + 1} of {world_size} -> {args.save_dir}"
    )
    batch_size = max(1, args.batch_size // world_size)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(dataset, todo),
        batch_sampler=BatchSampler(num_frames[todo], batch_size, shuffle=False),
        collate_fn=collate,
        num_workers=args.load_data_workers,
        multiprocessing_context=loader_context(args.load_data_workers, world_size),
        pin_memory=device.type == "cuda",
    )
    dtype = getattr(torch, args.dtype)
    with torch.inference_mode(), tqdm(total=len(todo), unit="utt", disable=rank > 0) as bar:
        for utt_id, features in extract(model, loader, device, choose, dtype):
            writer.write(utt_id, features)
            bar.update()
    writer.close()
    if world_size > 1:
        dist.barrier()
        if rank == 0 and args.format == "ark":
            merge_scps(args.save_dir, world_size)
    print(
        f"{args.save_dir}: features of {len(todo)} utterances written, {len(mine) - len(todo)} "
        "were there"
    )


def merge_scps(save_dir, world_size):
    """feats.1.scp, feats.2.scp, ... -> feats.scp, sorted as Kaldi wants it."""
    lines = []
    for number in range(1, world_size + 1):
        with open(os.path.join(save_dir, f"feats.{number}.scp"), "rb") as file:
            lines += file.readlines()
    with checkpoint.atomic_write(os.path.join(save_dir, "feats.scp")) as file:
        file.writelines(sorted(lines))


if __name__ == "__main__":
    run(main)
