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
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from apc_model import APCModel, LossSums, MeanLosses, TransformerBlock, apc_loss
from datasets import (
    BatchSampler,
    LibriSpeech,
    Utterances,
    build_loader,
    compared_settings,
    is_finished,
    read_batches,
    warn_of_other_data,
)
from formats.s3prl import QuantizedPostnet
from load_pretrained import load_pretrained, model_flags, summary, training_data
from utils import (
    SIGNALS,
    PrenetConfig,
    RNNConfig,
    UserError,
    __version__,
    add_group,
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

MAX_SKIPPED = 20  # steps in a row whose loss or gradient was not finite
RESTART = "start a new run with --init_checkpoint {}/last.ckpt and a lower --learning_rate"
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
  python train.py --rnn_type transformer --rnn_num_layers 4 --time_shift 3 \\
      --learning_rate 0.001 --lr_schedule cosine --warmup_steps 1000 --experiment_name t_apc
"""


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Train an APC model on prepared datasets.", EXAMPLES)
    add = add_group(parser, "input")
    path, splits = "./librispeech_data/preprocessed", ["train-clean-360"]
    add("--librispeech_path", default=path, help="folder of the prepared datasets")
    add("--train_split", nargs="+", default=splits, metavar="SPLIT", help="datasets to train on")
    add("--valid_split", default="dev-clean", metavar="SPLIT", help="dataset to validate on")
    add("--feature_dim", type=positive, metavar="D", help="log-Mel bins to expect (default: any)")
    add("--no_bucketing", action="store_true", help="mix lengths in a batch, as the original does")

    add = add_group(parser, "output")
    add("--experiment_name", default="foo", help="name of the run")
    add("--store_path", default="./logs", help="parent of the run's folder")
    add("--save_steps", type=positive, default=1000, help="steps between writes of last.ckpt")
    add(
        "--keep_epochs",
        type=positive,
        metavar="K",
        help="keep only the newest K models and the best",
    )
    add("--resume", action="store_true", help="continue exactly from last.ckpt, if there is one")

    add = add_group(parser, "model")
    types = ["gru", "lstm", "transformer"]
    add("--rnn_type", choices=types, default="gru", help="layer type")
    add("--rnn_num_layers", type=positive, default=3, help="number of layers")
    add("--rnn_hidden_size", type=positive, default=512, help="units of each layer")
    where = "each RNN layer but the last, or each Transformer sublayer"
    add("--rnn_dropout", type=float, default=0.0, help=f"dropout after {where}")
    add("--rnn_residual", action="store_true", help="add each RNN layer's input to its output")
    add("--prenet_num_layers", type=not_negative, default=0, help="ReLU layers before the RNN")
    add("--prenet_dropout", type=float, default=0.0, help="dropout after each prenet layer")
    add("--init_checkpoint", metavar="FILE", help="start from a model's weights")

    add = add_group(parser, "optimisation")
    add("--time_shift", type=positive, default=1, help="n, how many frames ahead to predict")
    add(
        "--optimizer", choices=OPTIMIZERS, default="adam", help="optimizer; adadelta keeps rate 1.0"
    )
    add("--batch_size", type=positive, default=32, help="utterances per step, over all processes")
    add("--learning_rate", type=float, default=0.0001, help="learning rate, after the warm-up")
    schedules = ["constant", "cosine"]
    text = "constant, or cosine decay to 0 over the run"
    add("--lr_schedule", choices=schedules, default="constant", help=text)
    text = "linear warm-up steps of the learning rate"
    add("--warmup_steps", type=not_negative, default=0, metavar="N", help=text)
    add("--epochs", type=not_negative, default=100, help="passes over the training data")
    add("--max_steps", type=positive, metavar="N", help="stop after N steps (default: no limit)")
    add("--clip_thresh", type=float, default=1.0, help="clip the gradient norm to this value")
    add("--mask_padding", action="store_true", help="exclude the padding from the loss")
    text = "random seed (initialisation, shuffling, dropout)"
    add("--seed", type=not_negative, default=0, help=text)

    add = add_group(parser, "hardware")
    devices = ["auto", "cpu", "cuda", "mps"]
    add("--device", choices=devices, default="auto", help="device to compute on")
    text = "autocast precision; weights stay fp32 (on CUDA, autocast computes RNNs in fp16 always)"
    add("--precision", choices=DTYPES, default="fp32", help=text)
    add("--tf32", action="store_true", help="compute fp32 in TensorFloat-32 on CUDA")
    text = "gradient accumulation: split each batch into K micro-batches (same batch size)"
    add("--accumulate_steps", type=positive, default=1, metavar="K", help=text)
    add("--load_data_workers", type=not_negative, default=2, help="processes that load data")
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
    # The log is named after the run, and must not replace another file of it.
    taken = ("", ".", "..", "last.ckpt", "config.json", "metrics.jsonl")
    name = args.experiment_name
    if os.path.basename(name) != name or name in taken or not name.isprintable():
        parser.error(f"--experiment_name {name!r}: expected a name without '/', and not of {taken}")
    if args.rnn_type == "transformer":
        if args.rnn_residual:
            parser.error("--rnn_residual is for RNNs: a Transformer's blocks are always residual")
        if args.prenet_num_layers:
            parser.error("--prenet_num_layers is for RNNs: a Transformer has no prenet")
        if args.rnn_hidden_size % TransformerBlock.HEAD_SIZE:
            parser.error(
                f"--rnn_hidden_size {args.rnn_hidden_size}: expected a multiple of "
                f"{TransformerBlock.HEAD_SIZE}, the size of a Transformer's attention heads"
            )
    # Shell completion appends a slash.
    args.train_split = [os.path.normpath(split) for split in args.train_split]
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


def open_loader(
    splits: list[LibriSpeech],
    shuffle: bool,
    args: argparse.Namespace,
    device: torch.device,
    rank: int,
    world_size: int,
) -> DataLoader:
    dataset = Utterances(splits)
    options = (shuffle, not args.no_bucketing, args.seed, rank, world_size)
    sampler = BatchSampler(dataset.num_frames, args.batch_size, *options)
    return build_loader(dataset, sampler, args.load_data_workers, device)


def describe_data(train_sets: list[LibriSpeech]) -> dict:
    """What a run keeps of its training data: "data" (prepared.json), and "data_fingerprint":
    utterances, frames, and a checksum of names, lengths and settings."""
    table = [(name, split.lengths[name]) for split in train_sets for name in split.ids]
    settings = [compared_settings(split) for split in train_sets]
    checksum = zlib.crc32(json.dumps([table, settings]).encode())
    fingerprint = [len(table), sum(frames for _, frames in table), checksum]
    return {"data": [split.prepared for split in train_sets], "data_fingerprint": fingerprint}


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
    loaded = load_pretrained(path, unknown_residual=args.rnn_residual)
    if isinstance(loaded.postnet, QuantizedPostnet):
        raise UserError(f"{path}: training a quantised model (VQ-APC) is not supported")
    for flag, value in model_flags(loaded).items():
        if getattr(args, flag) != value:
            found = f"--{flag} is {getattr(args, flag)}, but the file's is {value}"
            raise UserError(f"{path}: {found}")
    if not is_finite(loaded):
        raise UserError(f"{path}: its weights are not finite")
    n = loaded.config.get("time_shift")
    if n not in (None, args.time_shift):
        logging.warning(
            "%s was trained with n = %s, but --time_shift is %s", path, n, args.time_shift
        )
    model.load_state_dict(loaded.state_dict())
    warn_of_other_data(training_data(loaded.config, path), train_set)


def build_optimizer(args: argparse.Namespace, model: APCModel) -> optim.Optimizer:
    # Adadelta keeps its own rate, as in the original release.
    rate = {} if args.optimizer == "adadelta" else {"lr": args.learning_rate}
    return OPTIMIZERS[args.optimizer](model.parameters(), **rate)


def build_schedule(
    args: argparse.Namespace, optimizer: optim.Optimizer, step: int, steps_per_epoch: int
) -> optim.lr_scheduler.LRScheduler:
    """The learning rate of each step, from `step` on: it follows only from the flags."""
    warmup = args.warmup_steps
    total = min(args.max_steps or math.inf, args.epochs * steps_per_epoch)

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if args.lr_schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))

    # The optimizer's first step may be skipped, for a loss scale or bad data.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    return optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=step - 1)


# The step -----------------------------------------------------------------------------------------


def micro_batches(
    inputs: Tensor, lengths: Tensor, num_parts: int, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut this process' part of a batch for gradient accumulation, each to its longest utterance.

    Yields inputs (B, T, D) on the device, and lengths (B,) on the CPU.
    """
    least = args.time_shift + 1
    if not len(lengths):  # fewer utterances than processes: a dummy one, which adds nothing
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
    parts: dict,
    batch: tuple[Tensor, Tensor],
    whole: LossSums,
    seq_len: int,
    received: list,
    args: argparse.Namespace,
) -> tuple[LossSums, float, int | None]:
    """One optimizer step.

    Args:
        parts: the model, optimizer and scaler, by these names.
        batch: this process' inputs (B, T, D) and lengths (B,).
        whole: the counts of the whole batch, over all processes.
        seq_len: frames to which the utterances are padded on disk.
        received: signals, as utils.catch_signals() gives them.
        args: the flags.

    Returns:
        The whole batch's summed losses, the gradient norm before clipping, and the signal by which
        the run is to stop, or None. Where loss or norm is not finite, the weights are unchanged.
    """
    model, optimizer, scaler = parts["model"], parts["optimizer"], parts["scaler"]
    n, bias = args.time_shift, model.postnet.layer.bias
    parameters = [*model.parameters()]
    sums = LossSums()
    for inputs, lengths in micro_batches(*batch, args.accumulate_steps, args, bias.device):
        with autocast(args, bias.device):
            predicted, _ = model(inputs[:, :-n], (lengths - n).clamp(min=0), need_reps=False)
        micro = apc_loss(predicted, inputs, lengths, n, seq_len, bias)
        # A mean over the whole batch, so that gradients add up over micro-batches and processes.
        scaled = dataclasses.replace(micro, utterances=whole.utterances, frames=whole.frames)
        loss = trained_loss(scaled.means(n, seq_len), args)
        scaler.scale(loss).backward()
        sums = sums + LossSums(micro.valid.detach(), micro.padding.detach())
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
    """How far a run has come; saved in last.ckpt."""

    epoch: int = 0  # epochs that are complete
    batch: int = 0  # batches of the current epoch that are done
    step: int = 0
    sums: LossSums = dataclasses.field(default_factory=LossSums)  # of the current epoch
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    overflows: int = 0  # steps that GradScaler skipped to find its scale
    best_loss: float = math.inf
    best_epoch: int = 0
    metrics_size: int = 0  # bytes of metrics.jsonl

    def count_step(self, sums: LossSums, norm: float, loss_scale: float) -> None:
        self.batch += 1
        self.step += 1
        loss = sums.valid + sums.padding
        if math.isfinite(loss + norm):
            self.skipped_in_a_row = 0
            self.sums = self.sums + sums
        elif math.isfinite(loss) and loss_scale > 1:  # GradScaler finds its scale by overflows
            self.overflows += 1
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1

    def end_epoch(self, valid_loss: float) -> None:
        self.epoch += 1
        if valid_loss < self.best_loss:
            self.best_loss, self.best_epoch = valid_loss, self.epoch
        self.batch, self.sums = 0, LossSums()


def name_bad_utterances(inputs: Tensor, ids: list[str], what: str) -> None:
    bad = [utt_id for utt_id, frames in zip(ids, inputs) if not frames.isfinite().all()]
    if bad:
        logging.error(f"{what}: frames that are NaN or infinite in {', '.join(bad)}")


def train_epoch(
    parts: dict,
    schedule: optim.lr_scheduler.LRScheduler,
    loader: DataLoader,
    received: list,
    args: argparse.Namespace,
    progress: Progress,
    run: "RunFolder",
) -> int | None:
    """Train from `progress` to the epoch's end, or to --max_steps -> a signal to stop by, or None.

    Args:
        parts: the model, optimizer and scaler, by these names.
        run: where checkpoints and metrics go.
    """
    parts["model"].train()
    sampler, seq_len = loader.batch_sampler, loader.dataset.datasets[0].seq_len
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
        rate, loss_scale = schedule.get_last_lr()[0], parts["scaler"].get_scale()
        batch = (inputs, lengths)
        sums, norm, stop = train_step(parts, batch, whole, seq_len, received, args)
        schedule.step()
        progress.count_step(sums, norm, loss_scale)
        now = time.perf_counter()
        speed, start = whole.frames / (now - start), now
        losses = sums.means(args.time_shift, seq_len)
        bar.set_postfix_str(f"loss {trained_loss(losses, args):.4f}, {speed:.0f} frames/s", False)
        others = step_metrics(args, norm, speed, rate, progress)
        run.log("step", progress.step - 1, {"training loss": losses}, others, progress)
        if progress.skipped_in_a_row:
            name_bad_utterances(inputs, ids, f"step {progress.step - 1} is skipped")
        if progress.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"step {progress.step}: {MAX_SKIPPED} steps in a row had no finite loss or "
                f"gradient: look at the data, or {RESTART.format(run.path)}"
            )
        if progress.step % args.save_steps == 0:
            run.save(parts, progress)
        if stop or progress.step == args.max_steps:
            return stop
    return None


def step_metrics(
    args: argparse.Namespace, norm: float, speed: float, rate: float, progress: Progress
) -> dict:
    """What is logged of a step besides its loss, if it can change."""
    metrics = {"gradient norm": norm, "frames per second": speed}
    metrics["skipped steps"] = progress.skipped
    if args.precision != "fp32":
        metrics["overflow steps"] = progress.overflows
    if args.lr_schedule != "constant" or args.warmup_steps:
        metrics["learning rate"] = rate
    return metrics


# Evaluation ---------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: APCModel, loader: DataLoader, received: list, args: argparse.Namespace
) -> tuple[MeanLosses, int | None]:
    """The validation set's losses, and a signal that interrupted their computation, or None."""
    model.eval()
    n, bias, seq_len = args.time_shift, model.postnet.layer.bias, loader.dataset.datasets[0].seq_len
    total = LossSums()
    for batch_inputs, batch_lengths, ids in read_batches(loader):
        [(inputs, lengths)] = micro_batches(batch_inputs, batch_lengths, 1, args, bias.device)
        with autocast(args, bias.device):
            predicted, _ = model(inputs[:, :-n], (lengths - n).clamp(min=0), need_reps=False)
        sums = apc_loss(predicted, inputs, lengths, n, seq_len, bias)
        valid, padding, *flags = reduce_over_processes(sums, received, parameters=[]).tolist()
        if not math.isfinite(valid + padding):
            name_bad_utterances(batch_inputs, ids, "validation")
        total = total + LossSums(valid, padding)
        if stop := first_signal(flags):
            return MeanLosses(math.nan, math.nan), stop
    lengths = loader.dataset.num_frames
    total = dataclasses.replace(total, utterances=len(lengths), frames=int(lengths.sum()))
    return total.means(n, seq_len), None


def draw_prediction(model: APCModel, dataset: Utterances, args: argparse.Namespace):
    """A figure: the first validation utterance (at most 400 frames), above its prediction."""
    from matplotlib.figure import Figure

    n = args.time_shift
    frames, length, utt_id = dataset[0]
    frames = frames[: min(length, 400 + n)]
    inputs = frames[None, :-n].to(model.postnet.layer.bias.device)
    with torch.no_grad():
        predicted = model(inputs, [len(frames) - n])[0][0].float().cpu()
    target = frames[n:]
    low, high = np.percentile(target.nan_to_num(), [1, 99])
    extent = (0.01 * n, 0.01 * len(frames), -0.5, frames.shape[1] - 0.5)
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots(2, sharex=True)
    for axis, mel, name in zip(axes, (target, predicted), ("target", "prediction")):
        image = axis.imshow(
            mel.T.numpy(), origin="lower", aspect="auto", extent=extent, clim=(low, high)
        )
        axis.set_ylabel(f"{name}: mel channel")
    if len(utt_id) > 48:
        utt_id = f"{utt_id[:22]} ... {utt_id[-22:]}"
    title = f"{utt_id}\npredicted n = {n} frames ahead"
    axes[0].set_title(title, parse_math=False, fontsize="medium")
    axes[1].set_xlabel("seconds, at 10 ms per frame")
    figure.colorbar(image, ax=axes, label="log-Mel, as in the data")
    return figure


# What a run keeps ---------------------------------------------------------------------------------

# What may differ between a run and its --resume: the weights do not depend on it, or change as one
# who gives another value expects.
MAY_CHANGE_ON_RESUME = {
    "librispeech_path",
    "load_data_workers",
    "device",
    "accumulate_steps",
    "init_checkpoint",
    "epochs",
    "store_path",
    "max_steps",
    "save_steps",
    "keep_epochs",
    "resume",
}


class RunFolder:
    """<store_path>/<experiment_name>.dir: checkpoints, metrics, log. Only rank 0 writes there.

    `data` is describe_data().
    """

    def __init__(self, args: argparse.Namespace, rank: int, data: dict):
        self.args = args
        self.rank = rank
        self.data = data
        self.path = os.path.join(args.store_path, f"{args.experiment_name}.dir")
        self.writer = None  # TensorBoard's
        self.can_draw = True

    def is_resumed(self, world_size: int) -> bool:
        """Whether there is a run to resume, as rank 0 sees it."""
        found = torch.tensor(int(self.rank == 0 and self._has_checkpoint()))
        if world_size > 1:
            dist.broadcast(found, src=0)
        return bool(found)

    def _has_checkpoint(self):
        """Whether there is a last.ckpt; UserError rather than overwrite a run."""
        if self.args.resume and os.path.exists(os.path.join(self.path, "last.ckpt")):
            return True
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        if names and not self.args.resume:
            raise UserError(
                f"{self.path}: this experiment exists: --resume it, or choose another name"
            )
        # A run that was killed before its first checkpoint has nothing to lose.
        if any(name.endswith(".model") and not name.endswith("__epoch_0.model") for name in names):
            raise UserError(f"{self.path}: there are models, but no last.ckpt to --resume from")
        return False

    def open(self, progress: Progress) -> None:
        """Make the folder ready: lock, log, metrics, config.json, TensorBoard."""
        if self.rank > 0:
            return
        os.makedirs(self.path, exist_ok=True)
        self.lock = lock_folder(self.path)
        setup_logging(os.path.join(self.path, self.args.experiment_name))
        metrics = os.path.join(self.path, "metrics.jsonl")
        if os.path.exists(metrics):  # a resumed run will log what came after its checkpoint again
            os.truncate(metrics, min(progress.metrics_size, os.path.getsize(metrics)))
        config = vars(self.args) | {"data": self.data["data"], "version": __version__}
        write_json(config, os.path.join(self.path, "config.json"))
        tb_log = os.path.join(self.path, f"{self.args.experiment_name}.tb_log")
        self.writer = SummaryWriter(tb_log, purge_step=progress.step)

    def log(
        self, unit: str, step: int, losses: dict[str, MeanLosses], others: dict, progress: Progress
    ) -> None:
        """A line of metrics.jsonl, and TensorBoard's curves, of a "step" or an "epoch".

        The loss that is trained on has the original's tags. TensorBoard makes a group of what
        stands before a slash, sorts the groups, and opens the first two: the losses come first.
        """
        if self.rank > 0:
            return
        line = {"epoch": progress.epoch + 1, "step": step} | others
        curves = {f"while training/{name}": value for name, value in others.items()}
        for name, means in losses.items():
            kinds = {"": means.with_padding, "without padding/": means.per_valid_frame}
            if self.args.mask_padding:
                kinds = {"": means.per_valid_frame, "with padding/": means.with_padding}
            curves |= {f"{group}{name} ({unit}-wise)": value for group, value in kinds.items()}
            line[name] = kinds[""]
            line[f"{name} with padding"] = means.with_padding
            line[f"{name} per real frame"] = means.per_valid_frame
        for tag, value in curves.items():
            self.writer.add_scalar(tag, value, progress.epoch if unit == "epoch" else step)
        line = {key.replace(" ", "_"): x if math.isfinite(x) else None for key, x in line.items()}
        path = os.path.join(self.path, "metrics.jsonl")
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        progress.metrics_size = os.path.getsize(path)

    def draw(self, model: APCModel, dataset: Utterances, epoch: int) -> None:
        """Show a validation utterance and its prediction in TensorBoard."""
        if self.rank > 0 or not self.can_draw:
            return
        os.environ["MPLBACKEND"] = "agg"  # a notebook's own may not be installed here
        try:
            import matplotlib

            with matplotlib.rc_context():
                matplotlib.rcdefaults()
                figure = draw_prediction(model, dataset, self.args)
                self.writer.add_figure("validation utterance (epoch-wise)", figure, epoch)
        except Exception as error:  # a picture is not worth a run
            self.can_draw = False
            logging.warning("no picture of the validation utterance: %s", error)

    def save(self, parts: dict, progress: Progress) -> None:
        """Write last.ckpt, all that --resume needs; between two epochs the epoch's model too.

        It needs no random states: the order of the data follows from (seed, epoch), dropout from
        (seed, rank, step), and the learning rate from the step.
        """
        if self.rank > 0:
            return
        model, step = parts["model"], progress.step
        if not is_finite(model):
            raise UserError(
                f"step {step}: the weights are not finite, and are not saved: "
                f"{RESTART.format(self.path)}"
            )
        self.writer.flush()  # a resumed run shows nothing before this again
        if progress.batch == 0:
            start = os.path.join(self.path, f"{self.args.experiment_name}__epoch_")
            save(model.state_dict(), f"{start}{progress.epoch}.model")
            keep = self.args.keep_epochs
            for old in range(progress.epoch - keep + 1) if keep else ():
                if old != progress.best_epoch and os.path.exists(f"{start}{old}.model"):
                    os.remove(f"{start}{old}.model")
        saved = {name: part.state_dict() for name, part in parts.items()}
        saved |= {"progress": dataclasses.asdict(progress), "flags": vars(self.args)} | self.data
        save(saved, os.path.join(self.path, "last.ckpt"))

    def restore(self, parts: dict) -> Progress:
        """Continue from last.ckpt; UserError if it is of another run."""
        path = os.path.join(self.path, "last.ckpt")
        saved = load(path, verify=True)
        expected = {*parts, *self.data, "progress", "flags"}
        if not isinstance(saved, dict) or saved.keys() != expected:
            raise UserError(
                f"{path}: expected a checkpoint of this version of train.py, with "
                f"{', '.join(sorted(expected))}"
            )
        flags = saved["flags"]
        check_flags(flags, self.args, path)
        was, now = saved["data_fingerprint"], self.data["data_fingerprint"]
        if was != now:
            what = "the training data (utterances, frames, checksum of names, lengths and settings)"
            raise UserError(f"{path}: {what} were {was} in this run, and are {now} now")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        self.args.init_checkpoint = flags["init_checkpoint"]  # for config.json
        return Progress(**saved["progress"] | {"sums": LossSums(**saved["progress"]["sums"])})


def check_flags(before: dict, args: argparse.Namespace, path: str) -> None:
    """UserError if a flag that the weights depend on has changed since a run's checkpoint."""
    may_change = MAY_CHANGE_ON_RESUME
    if args.rnn_dropout or args.prenet_dropout:
        may_change = may_change - {"accumulate_steps"}  # the masks depend on it
    for flag, now in vars(args).items():
        was = before.get(flag)
        if was == now:
            continue
        if flag not in may_change:
            raise UserError(f"{path}: --{flag} was {was} in this run, and is {now} now")
        if flag in ("epochs", "max_steps") and args.lr_schedule == "cosine":
            logging.warning(
                "--%s was %s and is %s now: from here on the learning rate follows the cosine "
                "schedule of the new length",
                flag,
                was,
                now,
            )


def is_finite(model: APCModel) -> bool:
    return all(parameter.isfinite().all() for parameter in model.parameters())


# The run ------------------------------------------------------------------------------------------


def check_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Reject or warn of a precision that the device does not compute in."""
    if device.type != "cpu":
        return
    if args.precision == "fp16":
        raise UserError("--precision fp16 needs a GPU: on a CPU use bf16, or fp32")
    if args.precision == "bf16" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            if "bf16" not in file.read():
                logging.warning("this CPU has no bf16 instructions: bf16 is slower here than fp32")


def announce(
    args: argparse.Namespace,
    model: APCModel,
    train_loader: DataLoader,
    valid_loader: DataLoader,
    schedule: optim.lr_scheduler.LRScheduler,
    device: torch.device,
    world_size: int,
    run: RunFolder,
    progress: Progress,
) -> None:
    """Log what the run is about to do."""
    frames = train_loader.dataset.num_frames
    limit = f", at most {args.max_steps} steps" if args.max_steps else ""
    for line in (
        f"{'resuming' if progress.step else 'training'} {run.path}"
        f"{f' after {progress.step} steps' if progress.step else ''}",
        f"model: {summary(model)}"
        f"{f', started from {args.init_checkpoint}' if args.init_checkpoint else ''}",
        f"data: {', '.join(args.train_split)} of {args.librispeech_path}: {len(frames)} "
        f"utterances, {frames.sum()} frames, {frames.sum() / 360000:.2f} hours at 10 ms; "
        f"validation: {args.valid_split}, {len(valid_loader.dataset)} utterances",
        f"optimisation: {args.epochs} epochs of {len(train_loader.batch_sampler)} steps, batch "
        f"size {args.batch_size}{limit}; {args.optimizer}, learning rate {schedule.base_lrs[0]} "
        f"({args.lr_schedule}, {args.warmup_steps} warm-up steps)",
        f"device: {device}, {args.precision}, {world_size} process(es)",
        f"loss: L1 of the frame n = {args.time_shift} ahead, averaged over "
        + ("valid frames" if args.mask_padding else "all time steps, padding included"),
    ):
        logging.info(line)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup_logging()
    received = catch_signals()
    rank, world_size, device = start_processes(args.device)
    if rank > 0:
        logging.getLogger().setLevel(logging.ERROR)  # rank 0 warns for all
    check_precision(args, device)
    set_numerics(args.tf32)

    train_sets, valid_set = open_data(args)
    train_loader = open_loader(train_sets, True, args, device, rank, world_size)
    valid_loader = open_loader([valid_set], False, args, device, rank, world_size)
    run = RunFolder(args, rank, describe_data(train_sets))
    resuming = run.is_resumed(world_size)

    torch.manual_seed(args.seed % 2**64)
    model = build_model(args).to(device)
    optimizer = build_optimizer(args, model)
    # bf16 needs a scaler too: on CUDA, PyTorch's autocast computes RNN layers in fp16 all the same.
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision != "fp32")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}

    progress = Progress()
    if resuming:
        progress = run.restore(parts)
    elif args.init_checkpoint:
        load_weights(model, args, train_sets[0])
    epoch_steps = len(train_loader.batch_sampler)
    schedule = build_schedule(args, optimizer, progress.step, epoch_steps)
    run.open(progress)
    announce(args, model, train_loader, valid_loader, schedule, device, world_size, run, progress)
    if not resuming:
        run.save(parts, progress)

    stop = None
    while progress.epoch < args.epochs and not stop:
        steps_left = progress.batch < epoch_steps  # or only the validation is left
        if args.max_steps and progress.step >= args.max_steps and steps_left:
            break
        stop = train_epoch(parts, schedule, train_loader, received, args, progress, run)
        if not stop:
            validation, stop = evaluate(model, valid_loader, received, args)
        if not stop:
            training = progress.sums.means(args.time_shift, train_sets[0].seq_len)
            train_loss, valid_loss = trained_loss(training, args), trained_loss(validation, args)
            losses = f"Training Loss: {train_loss:.5f} Validation Loss: {valid_loss:.5f}"
            logging.info(f"Epoch: {progress.epoch + 1} {losses}")
            if progress.batch == epoch_steps:  # not cut by --max_steps
                means = {"training loss": training, "validation loss": validation}
                run.log("epoch", progress.step, means, {}, progress)
                run.draw(model, valid_loader.dataset, progress.epoch)
                progress.end_epoch(valid_loss)
        run.save(parts, progress)
    if stop:
        logging.info(f"stopped by {stop.name} after {progress.step} steps; use --resume")
        sys.exit(128 + stop)
    logging.info(f"done: {progress.epoch} epochs, {progress.step} steps, see {run.path}")


if __name__ == "__main__":
    run_main(main)
