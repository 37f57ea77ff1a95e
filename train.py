"""Train an APC model on prepared folders.

    python train.py --librispeech_path data --rnn_residual --time_shift 3 --experiment_name apc
    python train.py ... --resume                       # go on after a crash, a kill, a time limit
    torchrun --nproc_per_node=4 train.py ...           # several GPUs, or --nnodes for more machines
    tensorboard --logdir logs

Writes <store_path>/<experiment_name>.dir/: <experiment_name>__epoch_<k>.model (weights; k = 0 is
before training), last.ckpt (all that --resume needs), config.json (the flags), metrics.jsonl, a
log, and <experiment_name>.tb_log for TensorBoard.
"""

import argparse
import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, optim
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from apc_model import APCModel, MeanLosses, apc_loss, mean_losses
from datasets import (
    BatchSampler,
    LibriSpeech,
    Utterances,
    build_loader,
    is_finished,
    read_batches,
    warn_of_other_data,
)
from load_pretrained import infer_configs, load_pretrained, model_flags, summary
from utils import (
    HelpFormatter,
    PrenetConfig,
    RNNConfig,
    UserError,
    __version__,
    load,
    lock_folder,
    not_negative,
    on_each_core,
    positive,
    report_machine_errors,
    run_main,
    save,
    setup_logging,
    start_processes,
    write_json,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM sends the first and the last
MAX_SKIPPED = 20  # steps in a row without a finite loss and gradient
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = (optim.Adam, optim.Adadelta, optim.SGD, optim.Adagrad, optim.RMSprop)
OPTIMIZERS = {optimizer.__name__.lower(): optimizer for optimizer in OPTIMIZERS}


def build_parser() -> argparse.ArgumentParser:
    text = "Train an APC model on prepared folders."
    parser = argparse.ArgumentParser(description=text, formatter_class=HelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--prenet_num_layers", type=not_negative, default=0, help="ReLU layers before the RNN")
    add("--prenet_dropout", type=float, default=0.0, help="dropout after each prenet layer")
    add("--rnn_type", choices=["gru", "lstm"], default="gru", help="kind of the RNN layers")
    add("--rnn_num_layers", type=positive, default=3, help="RNN layers")
    add("--rnn_hidden_size", type=positive, default=512, help="units of each layer")
    add("--rnn_dropout", type=float, default=0.0, help="dropout after each RNN layer but the last")
    add("--rnn_residual", action="store_true", help="add a layer's input to its output")
    add("--init_checkpoint", metavar="FILE", help="start from the weights of this model")

    add = parser.add_argument_group("training").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="adadelta has its own rate, 1.0")
    add("--batch_size", type=positive, default=32, help="utterances of a step, over all processes")
    add("--learning_rate", type=float, default=0.0001, help="learning rate, the same throughout")
    add("--epochs", type=not_negative, default=100, help="passes over the training data")
    add("--time_shift", type=positive, default=1, help="n: from frame t, predict frame t + n")
    add("--clip_thresh", type=float, default=1.0, help="largest norm of the gradient")
    add("--mask_padding", action="store_true", help="leave the padding out of the loss")
    add("--seed", type=not_negative, default=0, help="of weights, order of the data, and dropout")

    add = parser.add_argument_group("data").add_argument
    path, splits = "./librispeech_data/preprocessed", ["train-clean-360"]
    add("--librispeech_path", default=path, help="folder that holds the splits' folders")
    add("--train_split", nargs="+", default=splits, metavar="SPLIT", help="folders to train on")
    add("--valid_split", default="dev-clean", metavar="SPLIT", help="folder to validate on")
    add("--feature_dim", type=positive, metavar="D", help="width of a frame (default: the data's)")
    add("--no_bucketing", action="store_true", help="mix lengths in a batch, as the original does")
    add("--load_data_workers", type=not_negative, default=2, help="processes that load data")

    add = parser.add_argument_group("output").add_argument
    add("--experiment_name", default="foo", help="name of the run")
    add("--store_path", default="./logs", help="where the run's folder is made")
    add("--max_steps", type=positive, metavar="N", help="end the run after N steps")
    add("--save_steps", type=positive, default=1000, help="steps between two writes of last.ckpt")
    add("--keep_epochs", type=positive, metavar="K", help="keep the newest K models and the best")
    add("--resume", action="store_true", help="go on from last.ckpt, exactly; without one, start")

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--precision", choices=DTYPES, default="fp32", help="of products; weights stay fp32")
    add("--tf32", action="store_true", help="on CUDA, products in TensorFloat-32")
    add("--accumulate_steps", type=positive, default=1, help="parts that a batch is done in")
    return parser


# What may differ between a run and its --resume, because the weights do not depend on it.
MAY_CHANGE_ON_RESUME = {"librispeech_path", "load_data_workers", "device", "accumulate_steps"} | {
    *("init_checkpoint", "epochs", "store_path", "max_steps", "save_steps", "keep_epochs", "resume")
}


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
    return args


# Set-up -------------------------------------------------------------------------------------------


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
    splits = [open_split(args, "train_split", split) for split in args.train_split]
    valid_set = open_split(args, "valid_split", args.valid_split)
    expected = f"--feature_dim is {args.feature_dim}"
    if args.feature_dim is None:
        args.feature_dim = splits[0].mel_dim
        expected = f"those of {splits[0].path} have {args.feature_dim}"
    for split in [*splits, valid_set]:
        width = split.mel_dim
        if width != args.feature_dim:
            raise UserError(f"{split.path}: its frames have {width} numbers, but {expected}")
        warn_of_other_data(splits[0].prepared, split)
    if len({split.seq_len for split in splits}) > 1:
        found = ", ".join(f"{split.path}: {split.seq_len}" for split in splits)
        raise UserError(f"the training splits differ in max_seq_len ({found}): prepare them alike")
    return splits, valid_set


class Run:
    """What the parts of a run share; at first, as a run starts."""

    def __init__(self, args, path: str, signals: set, rank: int, world_size: int, device):
        self.args, self.device = args, device
        self.path = path  # <store_path>/<experiment_name>.dir
        self.signals = signals  # those received, whenever that is
        self.rank, self.world_size = rank, world_size  # this process, of so many

        splits, valid_set = open_data(args)
        self.train_loader = self.loader(Utterances(splits), shuffle=True)
        self.valid_loader = self.loader(Utterances([valid_set]), shuffle=False)
        self.seq_len, self.valid_seq_len = splits[0].seq_len, valid_set.seq_len
        self.prepared = [split.prepared for split in splits]
        # The training data's utterances, frames, and a checksum of names, lengths and settings.
        table = [(name, split.lengths[name]) for split in splits for name in split.ids]
        elsewhere = dict.fromkeys(("path", "utt2spk", "version"))  # data may move
        made = [(prepared or {}) | elsewhere for prepared in self.prepared]
        checksum = zlib.crc32(json.dumps([table, made]).encode())
        self.fingerprint = [len(table), sum(frames for _, frames in table), checksum]

        backends = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn, torch.backends.cudnn.conv)
        for backend in backends:
            backend.fp32_precision = "tf32" if args.tf32 else "ieee"
        torch.manual_seed(args.seed % 2**64)
        mel_dim, width, prenet = args.feature_dim, args.rnn_hidden_size, None
        rnn = (width, args.rnn_num_layers, args.rnn_dropout, args.rnn_residual, args.rnn_type)
        if args.prenet_num_layers:
            prenet = PrenetConfig(mel_dim, width, args.prenet_num_layers, args.prenet_dropout)
        rnn = RNNConfig(width if prenet else mel_dim, *rnn)
        self.model = APCModel(mel_dim, prenet, rnn).to(device)
        # Adadelta keeps its own rate, as in the original release.
        rate = {} if args.optimizer == "adadelta" else {"lr": args.learning_rate}
        self.optimizer = OPTIMIZERS[args.optimizer](self.model.parameters(), **rate)
        # bf16 needs it too: on CUDA, PyTorch's autocast does RNN layers in fp16 all the same.
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision != "fp32")
        # A CPU's cores take shares of a batch, unless threads would mix up dropout's generator, or
        # autocast's cache of weights.
        mixed_up = args.precision != "fp32" or args.rnn_dropout or args.prenet_dropout
        self.on_each_share = on_each_core
        if mixed_up or device.type != "cpu":
            self.on_each_share = lambda function, *batch: [function(*batch)]
        # With the weights, all that --resume needs. "batch" and "sums" are of this epoch; the sums
        # are of errors in real frames and in padding, of utterances, and of frames.
        self.state = {"epoch": 0, "batch": 0, "step": 0, "sums": [0] * 4, "metrics_size": 0}
        self.state |= {"skipped": 0, "skipped_in_a_row": 0, "best_loss": math.inf, "best_epoch": 0}
        self.writer = None  # TensorBoard's, in the first process alone

    def loader(self, dataset: Utterances, shuffle: bool) -> DataLoader:
        args, world_size, num_frames = self.args, self.world_size, dataset.num_frames
        order = (args.batch_size, shuffle, not args.no_bucketing, args.seed, self.rank, world_size)
        sampler = BatchSampler(num_frames, *order)
        frames = -(-min(args.batch_size, len(dataset)) // world_size) * num_frames.max()
        workers = (args.load_data_workers, self.device, world_size)
        return build_loader(dataset, sampler, frames, *workers, persistent=True)

    def loss(self, losses: MeanLosses) -> float | Tensor:
        """The one of the two means that is trained on."""
        return losses.per_real_frame if self.args.mask_padding else losses.with_padding


def load_weights(run: Run) -> None:
    """Start from the weights of --init_checkpoint; UserError if the flags give another model."""
    args, path = run.args, run.args.init_checkpoint
    model = load_pretrained(path, residual=args.rnn_residual)
    for flag, size in model_flags(*infer_configs(model.state_dict(), path)).items():
        if getattr(args, flag) != size:
            raise UserError(f"{path}: --{flag} is {getattr(args, flag)}, but the file's is {size}")
    if not is_finite(model):
        raise UserError(f"{path}: its weights are not finite")
    run.model.load_state_dict(model.state_dict())


def is_finite(model: APCModel) -> bool:
    return all(parameter.isfinite().all() for parameter in model.parameters())


def announce(run: Run) -> None:
    """Log what the run is about to do."""
    args, (utterances, frames, _) = run.args, run.fingerprint
    for line in (
        f"{'going on with' if run.state['step'] else 'training'} {run.path}",
        f"model: {summary(run.model)}",
        f"data: {utterances} utterances, {frames} frames, {frames / 360000:.2f} hours at 10 ms; "
        f"validation: {len(run.valid_loader.dataset)} utterances",
        f"device: {run.device}, {args.precision}, {run.world_size} process(es)",
        f"loss: L1 of the frame {args.time_shift} ahead, averaged over "
        + ("real frames" if args.mask_padding else "all positions, padding included"),
    ):
        logging.info(line)


# One epoch ----------------------------------------------------------------------------------------


def all_reduce(values: Tensor) -> Tensor:
    """Sum a tensor over the processes of the run, in place; alone, leave it as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


class Batch(NamedTuple):
    """This process' share of a batch, and how much is in the whole of it."""

    inputs: Tensor  # (B, T, D)
    lengths: Tensor  # (B,)
    ids: list[str]
    utterances: int  # over all processes, as is
    frames: int


def batches(run: Run, loader: DataLoader) -> Iterator[Batch]:
    """Yield a loader's batches; SystemExit, before the next one, once any process has a signal."""
    for inputs, lengths, ids in read_batches(loader):
        flags = [int(number in run.signals) for number in SIGNALS]
        # By way of the CPU, so that no device is waited for.
        counts = all_reduce(torch.tensor([len(lengths), int(lengths.sum()), *flags])).tolist()
        for number, count in zip(SIGNALS, counts[2:]):
            if count:
                sys.exit(128 + number)
        yield Batch(inputs, lengths, ids, *counts[:2])


def forward_loss(run: Run, inputs: Tensor, lengths: Tensor, seq_len: int) -> Tensor:
    """A batch on the host -> its summed L1 errors [real frames, padding], (2,) on the device."""
    n, model = run.args.time_shift, run.model
    if not len(lengths):  # fewer utterances than processes: this one's counts for nothing
        inputs, lengths = torch.zeros(1, n + 1, model.mel_dim), torch.zeros(1)
    longest = max(int(lengths.max()), n + 1)
    # Slice after the copy: only that of a whole pinned tensor is asynchronous.
    inputs = inputs.to(run.device, non_blocking=True)[:, :longest]
    lengths = lengths.to(run.device, non_blocking=True)
    dtype = DTYPES[run.args.precision]
    with torch.autocast(run.device.type, dtype=dtype, enabled=dtype != torch.float32):
        predicted_mel, _ = model(inputs[:, :-n], lengths - n)
    bias = model.postnet.layer.bias
    return torch.stack(apc_loss(predicted_mel, inputs, lengths, n, seq_len, bias))


def name_bad_utterances(batch: Batch, what: str) -> None:
    bad = [utt_id for utt_id, frames in zip(batch.ids, batch.inputs) if not frames.isfinite().all()]
    if bad:
        logging.error(f"{what}: frames that are NaN or infinite in {', '.join(bad)}")


def train_epoch(run: Run) -> None:
    """Train from the state's batch to the epoch's end, or to --max_steps."""
    run.model.train()
    args, state, loader = run.args, run.state, run.train_loader
    loader.batch_sampler.set_epoch(state["epoch"], state["batch"])
    options = {"total": len(loader.batch_sampler), "initial": state["batch"], "unit": "step"}
    options["mininterval"] = 0.1 if sys.stderr.isatty() else 30  # seconds
    epoch = f"epoch {state['epoch'] + 1}"
    with tqdm(batches(run, loader), epoch, **options, disable=run.rank > 0) as bar:
        start = time.perf_counter()
        for batch in bar:
            sums, norm = train_step(run, batch)
            loss = run.loss(mean_losses(*sums, args.time_shift, run.seq_len))
            now = time.perf_counter()
            speed, start = batch.frames / (now - start), now
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} frames/s", refresh=False)
            count_step(run, batch, sums, norm, speed)
            if state["step"] % args.save_steps == 0:
                save_run(run)
            if state["step"] == args.max_steps:
                break


def train_step(run: Run, batch: Batch) -> tuple[list, float]:
    """One optimizer step, unless it is not finite -> sums as in the state, gradient norm."""
    args, parameters, seq_len = run.args, [*run.model.parameters()], run.seq_len
    # Dropout follows from the step alone, so that a resumed run drops what it would have dropped.
    torch.manual_seed(zlib.crc32(f"{args.seed} {run.rank} {run.state['step']}".encode()))

    def backward(inputs, lengths):
        sums = forward_loss(run, inputs, lengths, seq_len)
        # Divided by the size of the whole batch, so that gradients add up to those of its mean.
        losses = mean_losses(*sums, batch.utterances, batch.frames, args.time_shift, seq_len)
        return sums.detach(), torch.autograd.grad(run.scaler.scale(run.loss(losses)), parameters)

    sums, gradients = torch.zeros(2, device=run.device), None
    parts = (tensor.chunk(args.accumulate_steps) for tensor in (batch.inputs, batch.lengths))
    for inputs, lengths in zip(*parts):
        for share_sums, share in run.on_each_share(backward, inputs, lengths):
            sums += share_sums
            gradients = [a + b for a, b in zip(gradients, share)] if gradients else share
    all_reduce(sums)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = all_reduce(gradient.contiguous())
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_thresh)
    *sums, norm = torch.stack([*sums, norm]).tolist()  # waits for the device
    if math.isfinite(sum(sums) + norm):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    return [*sums, batch.utterances, batch.frames], norm


def count_step(run: Run, batch: Batch, sums: list, norm: float, speed: float) -> None:
    """Add a step to the run's state, and log it."""
    state, losses = run.state, mean_losses(*sums, run.args.time_shift, run.seq_len)
    if math.isfinite(sum(sums) + norm):
        state["skipped_in_a_row"] = 0
        state["sums"] = [a + b for a, b in zip(state["sums"], sums)]
    else:
        state["skipped"] += 1
        state["skipped_in_a_row"] += 1
        name_bad_utterances(batch, f"step {state['step']} is skipped")
    others = {"gradient norm": norm, "frames per second": speed, "skipped steps": state["skipped"]}
    log_metrics(run, "step", {"training loss": losses}, others)
    if state["skipped_in_a_row"] >= MAX_SKIPPED:
        raise UserError(
            f"step {state['step']}: {MAX_SKIPPED} steps in a row had no finite loss or gradient: "
            f"look at the data, or start from {run.path}/last.ckpt with a lower --learning_rate"
        )
    state["batch"] += 1
    state["step"] += 1


def evaluate(run: Run) -> MeanLosses:
    """The validation set's losses."""
    run.model.eval()
    loader, seq_len = run.valid_loader, run.valid_seq_len
    sums = torch.zeros(2, dtype=torch.float64)
    forward = torch.no_grad()(partial(forward_loss, run, seq_len=seq_len))
    for batch in batches(run, loader):
        batch_sums = sum(run.on_each_share(forward, batch.inputs, batch.lengths)).cpu()
        if not batch_sums.isfinite().all():
            name_bad_utterances(batch, "validation")
        sums += batch_sums
    num_frames = loader.dataset.num_frames.tolist()
    counts = (len(num_frames), sum(num_frames))
    return mean_losses(*all_reduce(sums).tolist(), *counts, run.args.time_shift, seq_len)


def end_epoch(run: Run) -> None:
    """Validate and tell; log a whole epoch and go on to the next, but not one that is cut."""
    state, number = run.state, run.state["epoch"] + 1
    training = mean_losses(*state["sums"], run.args.time_shift, run.seq_len)
    validation = evaluate(run)
    train_loss, valid_loss = run.loss(training), run.loss(validation)
    text = f"Epoch: {number} Training Loss: {train_loss:.5f} Validation Loss: {valid_loss:.5f}"
    logging.info(text)
    if is_whole_epoch(run):
        losses = {"training loss": training, "validation loss": validation}
        log_metrics(run, "epoch", losses, {})
        if run.writer:
            tag = "validation utterance (epoch-wise)"
            run.writer.add_figure(tag, plot_prediction(run), state["epoch"])
        if valid_loss < state["best_loss"]:
            state |= {"best_loss": valid_loss, "best_epoch": number}
        state |= {"epoch": number, "batch": 0, "sums": [0, 0, 0, 0]}
    save_run(run)


def is_whole_epoch(run: Run) -> bool:
    return run.state["batch"] == len(run.train_loader.batch_sampler)


# What a run keeps ---------------------------------------------------------------------------------


def log_metrics(run: Run, unit: str, losses: dict[str, MeanLosses], others: dict) -> None:
    """A line of metrics.jsonl, and the curves of TensorBoard, of a "step" or an "epoch".

    The loss that is trained has the original's tags. TensorBoard makes a group of what stands
    before a slash, sorts the groups, and opens the first two: the others come after the losses.
    """
    if run.rank > 0:
        return
    args, state = run.args, run.state
    line = {"epoch": state["epoch"] + 1, "step": state["step"]} | others
    curves = {f"while training/{name}": value for name, value in others.items()}
    for name, (with_padding, per_real_frame) in losses.items():
        kinds = {"": with_padding, "without padding/": per_real_frame}
        if args.mask_padding:
            kinds = {"": per_real_frame, "with padding/": with_padding}
        curves |= {f"{group}{name} ({unit}-wise)": value for group, value in kinds.items()}
        line[name] = kinds[""]
        line |= {f"{name} with padding": with_padding, f"{name} per real frame": per_real_frame}
    for tag, value in curves.items():
        run.writer.add_scalar(tag, value, state[unit])
    line = {key.replace(" ", "_"): x if math.isfinite(x) else None for key, x in line.items()}
    path = os.path.join(run.path, "metrics.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    state["metrics_size"] = os.path.getsize(path)


def plot_prediction(run: Run) -> Figure:
    """The first validation utterance, at most 400 frames of it, above the model's prediction."""
    n = run.args.time_shift
    frames, length, utt_id = run.valid_loader.dataset[0]
    frames = frames[: min(length, 400 + n)]
    inputs, lengths = frames[None, :-n].to(run.device), torch.tensor([len(frames) - n])
    with torch.no_grad():
        predicted = run.model(inputs, lengths)[0][0].float().cpu()
    target = frames[n:]
    low, high = np.percentile(target.nan_to_num(), [1, 99])
    extent = (0.01 * n, 0.01 * len(frames), -0.5, frames.shape[1] - 0.5)
    figure = Figure(figsize=(6, 4.5))
    axes = figure.subplots(2, sharex=True)
    for axis, mel, name in zip(axes, (target, predicted), ("target", "prediction")):
        image = axis.imshow(mel.T, origin="lower", aspect="auto", extent=extent, clim=(low, high))
        axis.set_ylabel(f"{name}: mel channel")
    axes[0].set_title(f"{utt_id}, predicted n = {n} frames ahead", parse_math=False)
    axes[1].set_xlabel("seconds, at 10 ms a frame")
    figure.colorbar(image, ax=axes, label="log-Mel, as in the data")
    return figure


def save_run(run: Run) -> None:
    """Write last.ckpt, all that --resume needs; and between two epochs the epoch's model.

    There are no random states in it: the order of the data follows from (seed, epoch), and dropout
    from (seed, process, step).
    """
    if run.rank > 0:
        return
    args, state = run.args, run.state
    if not is_finite(run.model):
        raise UserError(
            f"step {state['step']}: the weights are not finite, and are not saved: start from "
            f"{run.path}/last.ckpt with a lower --learning_rate"
        )
    run.writer.flush()  # a resumed run shows nothing before this again
    if state["batch"] == 0:
        start = os.path.join(run.path, f"{args.experiment_name}__epoch_")
        save(run.model.state_dict(), f"{start}{state['epoch']}.model")
        for old in range(state["epoch"] - args.keep_epochs + 1) if args.keep_epochs else ():
            if old != state["best_epoch"] and os.path.exists(f"{start}{old}.model"):
                os.remove(f"{start}{old}.model")
    saved = {part: getattr(run, part).state_dict() for part in ("model", "optimizer", "scaler")}
    saved |= {"state": state, "flags": vars(args)}
    saved |= {"data": run.prepared, "data_fingerprint": run.fingerprint}
    save(saved, os.path.join(run.path, "last.ckpt"))


def restore_run(run: Run) -> None:
    """Go back to where last.ckpt was written; UserError if it is of another run."""
    path = os.path.join(run.path, "last.ckpt")
    saved = load(path, verify=True)
    parts = {"model", "optimizer", "scaler", "state", "flags", "data", "data_fingerprint"}
    if not isinstance(saved, dict) or saved.keys() != parts:
        raise UserError(f"{path}: expected what train.py saves, with {', '.join(sorted(parts))}")
    for flag, now in vars(run.args).items():
        was = saved["flags"].get(flag)
        if flag not in MAY_CHANGE_ON_RESUME and was != now:
            raise UserError(f"{path}: --{flag} was {was} in this run, and is {now} now")
    was, now = saved["data_fingerprint"], run.fingerprint
    if was != now:
        what = "the training data (utterances, frames, checksum of names, lengths and settings)"
        raise UserError(f"{path}: {what} were {was} in this run, and are {now} now")
    for part in ("model", "optimizer", "scaler"):
        getattr(run, part).load_state_dict(saved[part])
    run.state.update(saved["state"])
    run.args.init_checkpoint = saved["flags"]["init_checkpoint"]  # for config.json


def find_run(args: argparse.Namespace, path: str) -> bool:
    """Whether there is a checkpoint to go on from. UserError rather than overwrite a run."""
    if args.resume and os.path.exists(os.path.join(path, "last.ckpt")):
        return True
    names = os.listdir(path) if os.path.isdir(path) else []
    if names and not args.resume:
        raise UserError(f"{path}: this experiment exists: --resume it, or choose another name")
    # A run that was killed before its first checkpoint holds nothing to lose.
    if any(name.endswith(".model") and not name.endswith("__epoch_0.model") for name in names):
        raise UserError(f"{path}: holds models, but no last.ckpt to --resume from")
    return False


def open_folder(run: Run) -> None:
    """Make the run's folder ready, in the first process: log, metrics, config.json, TensorBoard."""
    if run.rank > 0:
        return
    args, state = run.args, run.state
    os.makedirs(run.path, exist_ok=True)
    lock_folder(run.path)
    setup_logging(os.path.join(run.path, args.experiment_name))
    metrics = os.path.join(run.path, "metrics.jsonl")
    if os.path.exists(metrics):  # what a resumed run will log again goes
        os.truncate(metrics, min(state["metrics_size"], os.path.getsize(metrics)))
    config = vars(args) | {"data": run.prepared, "version": __version__}
    write_json(config, os.path.join(run.path, "config.json"))
    threading.excepthook = lambda _: None  # TensorBoard's thread hands its errors on
    tb_log = os.path.join(run.path, f"{args.experiment_name}.tb_log")
    run.writer = SummaryWriter(tb_log, purge_step=state["step"])


# The run ------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup_logging()
    signals = set()
    for number in SIGNALS:
        signal.signal(number, lambda number, _: signals.add(number))
    rank, world_size, device = start_processes(args.device)
    if rank > 0:
        logging.getLogger().setLevel(logging.ERROR)  # the first process warns for all
    path = os.path.join(args.store_path, f"{args.experiment_name}.dir")
    advice = "lower --batch_size, or raise --accumulate_steps"
    with report_machine_errors(device, rank, world_size, advice):
        resuming = bool(all_reduce(torch.tensor(int(rank == 0 and find_run(args, path)))))
        run = Run(args, path, signals, rank, world_size, device)
        state, steps = run.state, args.max_steps or math.inf
        if resuming:
            restore_run(run)
        elif args.init_checkpoint:
            load_weights(run)
        open_folder(run)
        announce(run)
        try:
            if not resuming:
                save_run(run)
            while state["epoch"] < args.epochs and (state["step"] < steps or is_whole_epoch(run)):
                train_epoch(run)
                end_epoch(run)
            logging.info(f"done: {state['epoch']} epochs, {state['step']} steps, see {path}")
        except SystemExit as stop:  # by a signal
            save_run(run)
            name = signal.Signals(stop.code - 128).name
            logging.info(f"stopped by {name} after {state['step']} steps; use --resume")
            raise
        except OSError as error:  # TensorBoard's do not name a file
            raise UserError(f"{error.filename or path}: {error.strerror}") from None


if __name__ == "__main__":
    run_main(main)
