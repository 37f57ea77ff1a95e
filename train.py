"""Train an APC model on prepared datasets.

    python train.py --librispeech_path data --rnn_residual --time_shift 3 --experiment_name apc
    python train.py ... --resume                       # after a crash, a kill, a time limit
    torchrun --nproc_per_node=4 train.py ...           # several GPUs; with --nnodes several nodes
    tensorboard --logdir logs

Writes <store_path>/<experiment_name>.dir/: <experiment_name>__epoch_<k>.model (a state dict; k = 0
is before training), last.ckpt (all that --resume needs), config.json (the flags), metrics.jsonl, a
log, and <experiment_name>.tb_log for TensorBoard.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import shlex
import sys
import time
import zlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.utils.tensorboard import SummaryWriter

from apc_model import APCModel, LossSums, MeanLosses, apc_loss
from datasets import (
    BatchSampler,
    LibriSpeech,
    Utterances,
    build_loader,
    is_finished,
    read_batches,
    warn_of_other_data,
)
from load_pretrained import load_with_config, model_flags, summary, training_data
from utils import (
    SIGNALS,
    PrenetConfig,
    RNNConfig,
    UserError,
    __version__,
    catch_signals,
    load,
    lock_folder,
    new_parser,
    not_negative,
    positive,
    progress_bar,
    run_main,
    save,
    set_numerics,
    setup_logging,
    start_processes,
    write_json,
)

MAX_SKIPPED = 20  # steps in a row without a finite loss and gradient
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {
    "adam": optim.Adam,
    "adadelta": optim.Adadelta,
    "sgd": optim.SGD,
    "adagrad": optim.Adagrad,
    "rmsprop": optim.RMSprop,
}

# Flags --------------------------------------------------------------------------------------------

EXAMPLES = """\
  python train.py --rnn_residual --time_shift 3 --experiment_name apc
  python train.py --rnn_residual --time_shift 3 --experiment_name apc --resume
  python train.py --rnn_type transformer --rnn_num_layers 4 --time_shift 3 --experiment_name t_apc \\
      --learning_rate 0.001 --lr_schedule cosine --warmup_steps 1000
"""


def build_parser() -> argparse.ArgumentParser:
    default = "(default: %(default)s)"
    parser = new_parser("Train an APC model on prepared datasets.", EXAMPLES)
    add = parser.add_argument_group("input").add_argument
    path, splits = "./librispeech_data/preprocessed", ["train-clean-360"]
    add("--librispeech_path", default=path, help=f"folder of the prepared datasets {default}")
    text = f"datasets to train on {default}"
    add("--train_split", nargs="+", default=splits, metavar="SPLIT", help=text)
    text = f"dataset to validate on {default}"
    add("--valid_split", default="dev-clean", metavar="SPLIT", help=text)
    text = "log-Mel bins that the data must have (default: what they have)"
    add("--feature_dim", type=positive, metavar="D", help=text)
    text = "mix utterances of all lengths in a batch, as the original does"
    add("--no_bucketing", action="store_true", help=text)

    add = parser.add_argument_group("output").add_argument
    add("--experiment_name", default="foo", help=f"name of the run {default}")
    add("--store_path", default="./logs", help=f"parent of the run's folder {default}")
    text = f"steps between two checkpoints (last.ckpt) {default}"
    add("--save_steps", type=positive, default=1000, help=text)
    text = "keep only the newest K models and the best (default: all)"
    add("--keep_epochs", type=positive, metavar="K", help=text)
    text = "continue exactly from last.ckpt, if there is one"
    add("--resume", action="store_true", help=text)

    add = parser.add_argument_group("model").add_argument
    layer_types = ["gru", "lstm", "transformer"]
    add("--rnn_type", choices=layer_types, default="gru", help=f"layer type {default}")
    add("--rnn_num_layers", type=positive, default=3, help=f"number of layers {default}")
    add("--rnn_hidden_size", type=positive, default=512, help=f"units of each layer {default}")
    text = f"dropout after each RNN layer but the last, or each Transformer sublayer {default}"
    add("--rnn_dropout", type=float, default=0.0, help=text)
    text = "add each RNN layer's input to its output (the papers' models)"
    add("--rnn_residual", action="store_true", help=text)
    text = f"ReLU layers before the RNN {default}"
    add("--prenet_num_layers", type=not_negative, default=0, help=text)
    text = f"dropout after each prenet layer {default}"
    add("--prenet_dropout", type=float, default=0.0, help=text)
    text = "model to start from: any file that load_pretrained.py reads"
    add("--init_checkpoint", metavar="FILE", help=text)

    add = parser.add_argument_group("optimisation").add_argument
    text = f"n, the number of frames to predict ahead {default}"
    add("--time_shift", type=positive, default=1, help=text)
    text = f"optimizer; adadelta keeps its own learning rate of 1.0 {default}"
    add("--optimizer", choices=OPTIMIZERS, default="adam", help=text)
    text = f"utterances per step, over all processes {default}"
    add("--batch_size", type=positive, default=32, help=text)
    add("--learning_rate", type=float, default=0.0001, help=f"learning rate {default}")
    text = f"constant, or falling to 0 along a cosine over the run's steps {default}"
    add("--lr_schedule", choices=["constant", "cosine"], default="constant", help=text)
    text = f"steps in which the learning rate rises linearly from 0 {default}"
    add("--warmup_steps", type=not_negative, default=0, metavar="N", help=text)
    add("--epochs", type=not_negative, default=100, help=f"epochs {default}")
    add("--max_steps", type=positive, metavar="N", help="stop after N steps (default: no limit)")
    add("--clip_thresh", type=float, default=1.0, help=f"clip the gradient norm to this {default}")
    add("--mask_padding", action="store_true", help="exclude the padding from the loss")
    text = f"random seed (initialisation, shuffling, dropout) {default}"
    add("--seed", type=not_negative, default=0, help=text)

    add = parser.add_argument_group("hardware").add_argument
    devices = ["auto", "cpu", "cuda", "mps"]
    add("--device", choices=devices, default="auto", help=f"device to compute on {default}")
    text = "autocast precision; weights stay fp32. On CUDA PyTorch computes RNNs in fp16 for bf16 too"
    add("--precision", choices=DTYPES, default="fp32", help=f"{text} {default}")
    text = "allow TensorFloat-32 in fp32 matrix multiplications on CUDA"
    add("--tf32", action="store_true", help=text)
    text = "gradient accumulation: split each batch into K micro-batches (same batch size)"
    add("--accumulate_steps", type=positive, default=1, metavar="K", help=f"{text} {default}")
    text = f"processes that load data {default}"
    add("--load_data_workers", type=not_negative, default=2, help=text)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for flag in ("prenet_dropout", "rnn_dropout"):
        if not 0 <= getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: expected 0 or more, and less than 1")
    for flag in ("learning_rate", "clip_thresh"):
        if not 0 < getattr(args, flag) < math.inf:
            parser.error(f"--{flag} {getattr(args, flag)}: expected a number above 0")
    taken = ("", ".", "..", "last.ckpt", "config.json", "metrics.jsonl")  # the log has this name
    name = args.experiment_name
    if os.path.basename(name) != name or name in taken or not name.isprintable():
        parser.error(f"--experiment_name {name!r}: expected a name without '/', and not of {taken}")
    if args.rnn_type == "transformer":
        if args.rnn_residual:
            parser.error("--rnn_residual is for RNNs: a Transformer's blocks are always residual")
        if args.prenet_num_layers:
            parser.error("--prenet_num_layers is for RNNs: a Transformer has no prenet")
        if args.rnn_hidden_size % 64:
            parser.error(
                f"--rnn_hidden_size {args.rnn_hidden_size}: expected a multiple of 64, the size of "
                "a Transformer's attention heads"
            )
    args.train_split = [os.path.normpath(split) for split in args.train_split]  # completed slashes
    args.valid_split = os.path.normpath(args.valid_split)
    return args


# Data and model -----------------------------------------------------------------------------------


def open_split(args: argparse.Namespace, flag: str, split: str) -> LibriSpeech:
    root, path = args.librispeech_path, os.path.join(args.librispeech_path, split)
    if os.path.isdir(root) and not os.path.isdir(path):
        there = [name for name in sorted(os.listdir(root)) if is_finished(os.path.join(root, name))]
        choices = " or ".join(f"--{flag} {shlex.quote(name)}" for name in there[:10])
        advice = f"there is: {choices}" if there else "make it with prepare_data.py"
        raise UserError(f"{path}: no such folder: {advice}")
    return LibriSpeech(path, args.time_shift)


def open_data(args: argparse.Namespace) -> tuple[list[LibriSpeech], LibriSpeech]:
    """The flags -> the training splits, the validation split; UserError if they do not fit.

    Without a --feature_dim, `args` gets that of the data.
    """
    train_sets = [open_split(args, "train_split", split) for split in args.train_split]
    valid_set = open_split(args, "valid_split", args.valid_split)
    expected = f"--feature_dim is {args.feature_dim}"
    if args.feature_dim is None:
        args.feature_dim = train_sets[0].mel_dim
        expected = f"{train_sets[0].path} has {args.feature_dim}"
    for split in [*train_sets, valid_set]:
        if split.mel_dim != args.feature_dim:
            raise UserError(f"{split.path}: its frames have {split.mel_dim} bins, but {expected}")
        warn_of_other_data(train_sets[0].prepared, split)
    if len({split.seq_len for split in train_sets}) > 1:
        found = ", ".join(f"{split.path}: {split.seq_len}" for split in train_sets)
        raise UserError(f"the training splits differ in max_seq_len ({found}): prepare them alike")
    return train_sets, valid_set


def fingerprint(train_sets: list[LibriSpeech]) -> list[int]:
    """The training data's utterances, frames, and a checksum of names, lengths and settings."""
    table = [(name, split.lengths[name]) for split in train_sets for name in split.ids]
    elsewhere = dict.fromkeys(("path", "utt2spk", "version"))  # data may move
    settings = [(split.prepared or {}) | elsewhere for split in train_sets]
    checksum = zlib.crc32(json.dumps([table, settings]).encode())
    return [len(table), sum(frames for _, frames in table), checksum]


def build_model(args: argparse.Namespace) -> APCModel:
    mel_dim, hidden_size = args.feature_dim, args.rnn_hidden_size
    prenet = None
    if args.prenet_num_layers:
        prenet = PrenetConfig(mel_dim, hidden_size, args.prenet_num_layers, args.prenet_dropout)
    rnn = RNNConfig(
        input_size=hidden_size if prenet else mel_dim,
        hidden_size=hidden_size,
        num_layers=args.rnn_num_layers,
        dropout=args.rnn_dropout,
        residual=args.rnn_residual,
        rnn_type=args.rnn_type,
    )
    return APCModel(mel_dim, prenet, rnn)


def load_weights(model: APCModel, args: argparse.Namespace, train_set: LibriSpeech) -> None:
    """Start from --init_checkpoint; UserError if the flags describe another model."""
    path = args.init_checkpoint
    loaded, config = load_with_config(path, unknown_residual=args.rnn_residual)
    for flag, value in model_flags(loaded).items():
        if getattr(args, flag) != value:
            found = f"--{flag} is {getattr(args, flag)}, but the file's is {value}"
            raise UserError(f"{path}: {found}")
    if not is_finite(loaded):
        raise UserError(f"{path}: its weights are not finite")
    model.load_state_dict(loaded.state_dict())
    warn_of_other_data(training_data(config, path), train_set)


def build_schedule(
    args: argparse.Namespace, optimizer: optim.Optimizer, step: int, steps_per_epoch: int
) -> optim.lr_scheduler.LRScheduler:
    """The learning rate of each step, from `step` on: it follows from the flags alone."""
    warmup = args.warmup_steps
    total = min(args.max_steps or math.inf, args.epochs * steps_per_epoch)

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if args.lr_schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))

    return optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=step - 1)


# The step -----------------------------------------------------------------------------------------


def micro_batches(
    inputs: Tensor, lengths: Tensor, num_parts: int, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut this process' part of a batch for gradient accumulation, each to its longest utterance.

    Yields inputs (B, T, D) on the device, and lengths (B,) on the CPU.
    """
    least = args.time_shift + 1
    if not len(lengths):  # fewer utterances than processes: one of length 0 counts for nothing
        inputs, lengths = torch.zeros(1, least, args.feature_dim), torch.zeros(1, dtype=torch.int64)
    for part, part_lengths in zip(inputs.chunk(num_parts), lengths.chunk(num_parts)):
        # Slice after the copy: only that of contiguous pinned memory is asynchronous.
        longest = max(int(part_lengths.max()), least)
        yield part.to(device, non_blocking=True)[:, :longest], part_lengths


def reduce_over_processes(sums: LossSums, received: list, parameters: list[Tensor]) -> Tensor:
    """Add up losses and gradients over the processes of a distributed run.

    The signals that ask the run to stop ride along, so that all processes stop at the same step.

    Returns:
        float32: the losses over valid frames and padding, and for each of SIGNALS how many
        processes have received it.
    """
    flags = [float(number in received) for number in SIGNALS]
    values = torch.stack([sums.valid, sums.padding])
    values = torch.cat([values, values.new_tensor(flags)])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
    return values


def trained_loss(losses: MeanLosses, args: argparse.Namespace) -> float | Tensor:
    """The one of the two means that is trained on."""
    return losses.per_valid_frame if args.mask_padding else losses.with_padding


def train_step(
    model: APCModel,
    optimizer: optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: tuple[Tensor, Tensor],
    whole: LossSums,
    received: list,
    args: argparse.Namespace,
    seq_len: int,
) -> tuple[LossSums, float, int | None]:
    """One optimizer step.

    Args:
        batch: this process' inputs (B, T, D) and lengths (B,).
        whole: the counts of the whole batch, over all processes.
        received: signals, as utils.catch_signals() gives them.
        seq_len: frames to which the utterances are padded on disk.

    Returns:
        The whole batch's summed losses, the gradient norm before clipping, and the signal by which
        the run is to stop, or None. Where loss or norm is not finite, the weights are unchanged.
    """
    n, bias = args.time_shift, model.postnet.layer.bias
    parameters = [*model.parameters()]
    sums = LossSums()
    for inputs, lengths in micro_batches(*batch, args.accumulate_steps, args, bias.device):
        with autocast(args, bias.device):
            predicted, _ = model(inputs[:, :-n], (lengths - n).clamp(min=0), need_reps=False)
        part = apc_loss(predicted, inputs, lengths, n, seq_len, bias)
        # A mean over the whole batch, so that gradients add up over parts and processes.
        share = dataclasses.replace(part, utterances=whole.utterances, frames=whole.frames)
        loss = trained_loss(share.means(n, seq_len), args)
        scaler.scale(loss).backward()
        sums = sums + part.detach()
    values = reduce_over_processes(sums, received, parameters)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, args.clip_thresh)
    valid, padding, *flags, norm = torch.cat([values, norm[None]]).tolist()  # waits for the device
    if math.isfinite(valid + padding + norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return LossSums(valid, padding, whole.utterances, whole.frames), norm, first_signal(flags)


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    dtype = DTYPES[args.precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def first_signal(flags: list[float]) -> int | None:
    """The last part of reduce_over_processes() -> the number of a signal, or None."""
    return next((number for number, flag in zip(SIGNALS, flags) if flag), None)


# An epoch -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """How far a run is. last.ckpt keeps it."""

    epoch: int = 0  # epochs that are complete
    batch: int = 0  # batches of the current epoch that are done
    step: int = 0
    sums: LossSums = dataclasses.field(default_factory=LossSums)  # of the current epoch
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_a_row: int = 0
    overflows: int = 0  # steps that GradScaler skipped to find its scale
    best_loss: float = math.inf
    best_epoch: int = 0
    metrics_size: int = 0  # bytes of metrics.jsonl

    def count_step(self, sums: LossSums, norm: float, scale: float) -> bool:
        """Count a step -> whether it was skipped for a loss or gradient that is not finite.

        In half precision a gradient may overflow until the loss scale is small enough: that is
        GradScaler's way of finding it, unless a scale below 1 does not help.
        """
        loss_is_finite = math.isfinite(sums.valid + sums.padding)
        is_overflow = loss_is_finite and not math.isfinite(norm) and scale > 1
        is_skipped = not is_overflow and not math.isfinite(sums.valid + sums.padding + norm)
        if is_skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
        elif is_overflow:
            self.overflows += 1
        else:
            self.skipped_in_a_row = 0
            self.sums = self.sums + sums
        self.batch += 1
        self.step += 1
        return is_skipped


def name_bad_utterances(inputs: Tensor, ids: list[str], what: str) -> None:
    bad = [utt_id for utt_id, frames in zip(ids, inputs) if not frames.isfinite().all()]
    if bad:
        logging.error(f"{what}: frames that are NaN or infinite in {', '.join(bad)}")


def train_epoch(
    parts: dict, schedule, loader, received: list, args, seq_len: int, progress: Progress, run
) -> int | None:
    """Train from `progress` to the epoch's end, or to --max_steps -> a signal to stop by, or None.

    Args:
        parts: the model, optimizer and scaler, by these names.
        run: the RunFolder that checkpoints and metrics go to.
    """
    parts["model"].train()
    sampler = loader.batch_sampler
    sampler.set_epoch(progress.epoch, progress.batch)
    bar = progress_bar(
        zip(sampler.whole_batches(), read_batches(loader)),
        desc=f"epoch {progress.epoch + 1}",
        total=len(sampler),
        initial=progress.batch,
        unit="step",
        disable=run.rank > 0,
    )
    start = time.perf_counter()
    for indices, (inputs, lengths, ids) in bar:
        # Dropout follows from the step, so that a resumed run drops what it would have dropped.
        torch.manual_seed(zlib.crc32(f"{args.seed} {run.rank} {progress.step}".encode()))
        whole = LossSums(utterances=len(indices), frames=int(sampler.lengths[indices].sum()))
        rate, scale = schedule.get_last_lr()[0], parts["scaler"].get_scale()
        sums, norm, stop = train_step(
            **parts, batch=(inputs, lengths), whole=whole, received=received, args=args,
            seq_len=seq_len,
        )  # fmt: skip
        schedule.step()
        now = time.perf_counter()
        speed, start = whole.frames / (now - start), now
        losses = sums.means(args.time_shift, seq_len)
        bar.set_postfix_str(f"loss {trained_loss(losses, args):.4f}, {speed:.0f} frames/s", False)
        if progress.count_step(sums, norm, scale):
            name_bad_utterances(inputs, ids, f"step {progress.step - 1} is skipped")
        run.log_step(losses, norm, speed, rate, progress)
        if progress.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"step {progress.step}: {MAX_SKIPPED} steps in a row had no finite loss or "
                f"gradient: look at the data, or start from {run.path}/last.ckpt with a lower "
                "--learning_rate"
            )
        if progress.step % args.save_steps == 0 or stop:
            run.save(parts, progress)
        if stop or progress.step == args.max_steps:
            return stop
    return None
