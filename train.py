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
import dataclasses
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import resource_tracker
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, optim
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from apc_model import APCModel, MeanLosses, apc_loss, mean_losses
from datasets import (
    BatchSampler,
    LibriSpeech,
    Utterances,
    build_loader,
    collate,
    is_finished,
    read_batches,
    warn_of_other_data,
)
from load_pretrained import copy_weights, infer_configs, model_flags, read_checkpoint, summary
from utils import (
    HelpFormatter,
    PrenetConfig,
    RNNConfig,
    UserError,
    __version__,
    atomic_write,
    load,
    lock_folder,
    not_negative,
    on_each_core,
    positive,
    quote,
    report_machine_errors,
    run_main,
    save,
    seed_everything,
    setup_logging,
    start_processes,
    write_json,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM sends the first and the last
MAX_SKIPPED = 20  # steps in a row without a finite loss and gradient
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What may differ between a run and its --resume, because the weights do not depend on it.
MAY_CHANGE_ON_RESUME = {
    "accumulate_steps",
    "epochs",
    "max_steps",
    "load_data_workers",
    "librispeech_path",
    "store_path",
    "device",
    "init_checkpoint",
    "save_steps",
    "keep_epochs",
    "resume",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train an APC model on prepared folders.", formatter_class=HelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--prenet_num_layers", type=not_negative, default=0, help="ReLU layers before the RNN")
    add("--prenet_dropout", type=float, default=0.0, help="dropout after each prenet layer")
    add("--rnn_type", choices=["gru", "lstm"], default="gru", help="kind of the RNN layers")
    add("--rnn_num_layers", type=positive, default=3, help="RNN layers")
    add(
        "--rnn_hidden_size", type=positive, default=512, help="units of each RNN (and prenet) layer"
    )
    add("--rnn_dropout", type=float, default=0.0, help="dropout after each RNN layer but the last")
    add("--rnn_residual", action="store_true", help="add a layer's input to its output")
    add("--init_checkpoint", metavar="FILE", help="start from the weights of this model")

    add = parser.add_argument_group("training").add_argument
    optimizers = ["adam", "adadelta", "sgd", "adagrad", "rmsprop"]
    add("--optimizer", choices=optimizers, default="adam", help="adadelta has its own rate, 1.0")
    add("--batch_size", type=positive, default=32, help="utterances of a step, over all processes")
    add("--learning_rate", type=float, default=0.0001, help="learning rate, the same throughout")
    add("--epochs", type=not_negative, default=100, help="passes over the training data")
    add("--time_shift", type=positive, default=1, help="n: from frame t, predict frame t + n")
    add("--clip_thresh", type=float, default=1.0, help="largest norm of the gradient")
    add("--mask_padding", action="store_true", help="leave the padding out of the loss")
    add(
        "--seed",
        type=not_negative,
        default=0,
        help="of the weights, the order of the data and dropout",
    )

    add = parser.add_argument_group("data").add_argument
    default = "./librispeech_data/preprocessed"
    add("--librispeech_path", default=default, help="folder that holds the splits' folders")
    default = ["train-clean-360"]
    add("--train_split", nargs="+", default=default, metavar="SPLIT", help="folders to train on")
    add("--valid_split", default="dev-clean", metavar="SPLIT", help="folder to validate on")
    add("--feature_dim", type=positive, default=80, help="mel_dim, the width of a frame")
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
    precisions = ["fp32", "bf16", "fp16"]
    add("--precision", choices=precisions, default="fp32", help="of products; weights stay fp32")
    add("--tf32", action="store_true", help="on CUDA, products in TensorFloat-32")
    add(
        "--accumulate_steps",
        type=positive,
        default=1,
        metavar="K",
        help="parts of a batch, in turn",
    )
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
    if args.seed >= 2**64:
        parser.error(f"--seed {args.seed}: expected less than 2**64")
    return args


# Set-up -------------------------------------------------------------------------------------------


def model_configs(args: argparse.Namespace) -> tuple[PrenetConfig | None, RNNConfig]:
    """The flags -> the configurations, as the original release builds them."""
    hidden_size = args.rnn_hidden_size
    rnn = (hidden_size, args.rnn_num_layers, args.rnn_dropout, args.rnn_residual, args.rnn_type)
    if args.prenet_num_layers == 0:
        return None, RNNConfig(args.feature_dim, *rnn)
    prenet = (hidden_size, args.prenet_num_layers, args.prenet_dropout)
    return PrenetConfig(args.feature_dim, *prenet), RNNConfig(hidden_size, *rnn)


def build_optimizer(args: argparse.Namespace, parameters) -> optim.Optimizer:
    if args.optimizer == "adadelta":  # keeps its own learning rate, as in the original release
        return optim.Adadelta(parameters)
    classes = [optim.Adam, optim.SGD, optim.Adagrad, optim.RMSprop]
    by_name = {optimizer.__name__.lower(): optimizer for optimizer in classes}
    return by_name[args.optimizer](parameters, lr=args.learning_rate)


class Data(NamedTuple):
    """The utterances of a run."""

    train_set: Utterances
    valid_set: LibriSpeech
    seq_len: int  # of the training set's tensors
    prepared: list  # prepared.json of each training split, or None
    fingerprint: list[int]  # utterances, frames, checksum of names and lengths


def open_split(args: argparse.Namespace, flag: str, split: str) -> LibriSpeech:
    root, path = args.librispeech_path, os.path.join(args.librispeech_path, split)
    if not os.path.isdir(path):
        names = sorted(os.listdir(root)) if os.path.isdir(root) else []
        there = [name for name in names if is_finished(os.path.join(root, name))]
        choices = " or ".join(f"--{flag} {shlex.quote(name)}" for name in there[:10])
        advice = f"there is: {choices}" if there else "make it with prepare_data.py"
        raise UserError(f"{path}: no such folder: {advice}")
    return LibriSpeech(path, args.time_shift)


def open_data(args: argparse.Namespace) -> Data:
    """Open the splits' folders; UserError if they do not fit the flags or each other."""
    splits = [open_split(args, "train_split", split) for split in args.train_split]
    valid_set = open_split(args, "valid_split", args.valid_split)
    for split in [*splits, valid_set]:
        if split.mel_dim != args.feature_dim:
            raise UserError(
                f"{split.path}: its frames have {split.mel_dim} numbers, but --feature_dim is "
                f"{args.feature_dim}"
            )
        warn_of_other_data(splits[0].prepared, split)
    if len({split.seq_len for split in splits}) > 1:
        found = ", ".join(f"{split.path}: {split.seq_len}" for split in splits)
        raise UserError(f"the training splits differ in max_seq_len ({found}): prepare them alike")
    train_set = Utterances(splits)
    names = "".join(f"{name} {split.lengths[name]}\n" for split in splits for name in split.ids)
    fingerprint = [len(train_set), int(train_set.num_frames.sum()), zlib.crc32(names.encode())]
    prepared = [split.prepared for split in splits]
    return Data(train_set, valid_set, splits[0].seq_len, prepared, fingerprint)


class Stopped(Exception):
    """A signal (the argument) asks this or another process of the run to stop."""


class Signals:
    """Remembers the signals received. A wait for data is cut short by them; a step is not."""

    def __init__(self):
        self.received = set()
        self.is_waiting = False
        # Python's own process that keeps track of what workers share inherits what is ignored.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        resource_tracker.ensure_running()
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def wait_begins(self) -> None:
        self.is_waiting = True
        if self.received:
            raise Stopped(*self.received)

    def _receive(self, number, frame):
        self.received.add(number)
        if self.is_waiting:
            raise Stopped(number)


@dataclasses.dataclass
class Run:
    """What the parts of a run share."""

    args: argparse.Namespace
    path: str  # <store_path>/<experiment_name>.dir
    rank: int
    world_size: int
    device: torch.device
    signals: Signals
    data: Data
    model: APCModel
    optimizer: optim.Optimizer
    scaler: torch.amp.GradScaler
    state: dict  # the run's position: with the weights, all that --resume needs
    writer: SummaryWriter | None = None  # in the first process alone

    def has_steps_left(self) -> bool:
        return self.state["step"] < (self.args.max_steps or math.inf)

    def loss(self, losses: MeanLosses) -> float | Tensor:
        """The one of the two means that is trained on."""
        return losses.per_real_frame if self.args.mask_padding else losses.with_padding


def set_up(args, path, data, signals, rank, world_size, device) -> Run:
    """Build the model and its optimizer as a run starts with them."""
    seed_everything(args.seed)
    model = APCModel(args.feature_dim, *model_configs(args)).to(device)
    precision = "tf32" if args.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.rnn.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision
    return Run(
        args=args,
        path=path,
        rank=rank,
        world_size=world_size,
        device=device,
        signals=signals,
        data=data,
        model=model,
        optimizer=build_optimizer(args, model.parameters()),
        # bf16 needs it too: on CUDA, PyTorch's autocast does RNN layers in fp16 all the same.
        scaler=torch.amp.GradScaler(device.type, enabled=args.precision != "fp32"),
        state={
            "epoch": 0,
            "batch": 0,  # done in this epoch
            "step": 0,  # done in all
            "sums": [0, 0, 0, 0],  # of this epoch: errors (real, padding), utterances, frames
            "skipped": 0,
            "skipped_in_a_row": 0,
            "best_loss": math.inf,
            "best_epoch": 0,
        },
    )


def load_weights(model: APCModel, path: str) -> None:
    """Start `model` from a file's weights; UserError with the flags of train.py that differ."""
    weights, _ = read_checkpoint(path)
    found = model_flags(*infer_configs(weights, path))
    expected = model_flags(*infer_configs(model.state_dict(), path))
    differing = [
        f"--{flag} is {expected[flag]}, but the file's is {found[flag]}"
        for flag in expected
        if expected[flag] != found[flag]
    ]
    if differing:
        raise UserError(f"{path}: its weights do not fit the flags: {'; '.join(differing)}")
    copy_weights(model, weights, path)
    if not is_finite(model):
        raise UserError(f"{path}: its weights are not finite")


def announce(run: Run, resuming: bool) -> None:
    """Log what the run is about to do."""
    args, (utterances, frames, _) = run.args, run.data.fingerprint
    positions = f"all {run.data.seq_len - args.time_shift} positions of an utterance, padding "
    logging.info(f"{'going on with' if resuming else 'training'} {run.path}")
    logging.info(f"model: {summary(run.model)}")
    logging.info(
        f"data: {utterances} utterances, {frames} frames, {frames / 360000:.2f} hours at 10 ms, "
        f"from {', '.join(args.train_split)}; validation: {len(run.data.valid_set)} utterances"
    )
    logging.info(
        f"device: {run.device} ({run.world_size} process(es)), {args.precision}; batches of "
        f"{args.batch_size} utterances, {args.optimizer} with learning rate "
        f"{run.optimizer.param_groups[0]['lr']:g}, epochs {run.state['epoch'] + 1} to {args.epochs}"
    )
    logging.info(
        f"loss: L1 of the frame {args.time_shift} ahead, averaged over "
        f"{'real frames' if args.mask_padding else positions + 'included'}"
    )


# Processes and batches ----------------------------------------------------------------------------


def all_reduce(values: Tensor) -> Tensor:
    """Sum a tensor over the processes of the run, in place; alone, leave it as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def sum_over_processes(run: Run, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each process has the gradients of its share of the batch: sum them, all at once."""
    if run.world_size == 1:
        return gradients
    summed = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = summed.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients)]


def on_each_share(run: Run, function: Callable, inputs: Tensor, lengths: Tensor) -> list:
    """function(inputs, lengths) of each CPU core's share of the utterances; on a GPU, of them all.

    Dropout draws from one generator, whose order threads would mix up, and so does autocast's
    cache of weights: then there is one share.
    """
    args = run.args
    is_plain = args.precision == "fp32" and not (args.rnn_dropout or args.prenet_dropout)
    if run.device.type == "cpu" and is_plain:
        return on_each_core(function, inputs, lengths)
    return [function(inputs, lengths)]


def data_loader(run: Run, dataset: Utterances, shuffle: bool) -> torch.utils.data.DataLoader:
    args = run.args
    sampler = BatchSampler(
        dataset.num_frames,
        args.batch_size,
        shuffle=shuffle,
        bucketing=not args.no_bucketing,
        seed=args.seed,
        rank=run.rank,
        world_size=run.world_size,
    )
    share = -(-min(args.batch_size, len(dataset)) // run.world_size)
    return build_loader(
        dataset,
        sampler,
        share * dataset.num_frames.max(),
        args.load_data_workers,
        run.device,
        run.world_size,
        persistent=True,
    )


class Batch(NamedTuple):
    """This process' share of a batch, and how much is in the whole of it."""

    inputs: Tensor  # (B, T, D)
    lengths: Tensor  # (B,)
    ids: list[str]
    utterances: int  # over all processes, as is
    frames: int


def batches(run: Run, loader: torch.utils.data.DataLoader) -> Iterator[Batch]:
    """Yield a loader's batches; Stopped, before the next one, once any process has a signal."""
    iterator, signals = None, run.signals
    while True:
        try:
            if not signals.received:
                iterator = iterator or read_batches(loader)
            signals.wait_begins()
            inputs, lengths, ids = next(iterator)
        except StopIteration:
            return
        except (Stopped, UserError):  # a signal to the whole group ends the loader's workers too
            if not signals.received:
                raise
            inputs, lengths, ids = collate([])  # the others wait to hear of the signal
        finally:
            signals.is_waiting = False
        # By way of the CPU, so that no device is waited for.
        flags = [int(number in signals.received) for number in SIGNALS]
        counts = all_reduce(torch.tensor([len(lengths), int(lengths.sum()), *flags])).tolist()
        for number, count in zip(SIGNALS, counts[2:]):
            if count:
                raise Stopped(number)
        yield Batch(inputs, lengths, ids, *counts[:2])


# One epoch ----------------------------------------------------------------------------------------


def forward_loss(run: Run, inputs: Tensor, lengths: Tensor, seq_len: int) -> Tensor:
    """A batch on the host -> its summed L1 errors [real frames, padding], (2,) on the device."""
    n = run.args.time_shift
    if not len(lengths):  # fewer utterances than processes: this one's counts for nothing
        inputs, lengths = torch.zeros(1, n + 1, run.args.feature_dim), torch.zeros(1)
    longest = max(int(lengths.max()), n + 1)
    # Slice after the copy: only that of a whole pinned tensor is asynchronous.
    inputs = inputs.to(run.device, non_blocking=True)[:, :longest]
    lengths = lengths.to(run.device, non_blocking=True)
    dtype = DTYPES[run.args.precision]
    with torch.autocast(run.device.type, dtype=dtype, enabled=dtype != torch.float32):
        predicted_mel, _ = run.model(inputs[:, :-n], lengths - n)
    bias = run.model.postnet.layer.bias
    return torch.stack(apc_loss(predicted_mel, inputs, lengths, n, seq_len, bias))


def train_step(run: Run, batch: Batch) -> tuple[float, float, float]:
    """One optimizer step -> summed errors of real frames and of padding, gradient norm.

    The step is skipped unless all three are finite.
    """
    args = run.args
    # Dropout follows from the step alone, so that a resumed run drops what it would have dropped.
    seed = np.random.SeedSequence([args.seed, run.rank, run.state["step"]])
    torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
    sums, gradients = torch.zeros(2, device=run.device), None
    chunks = zip(*(part.chunk(args.accumulate_steps) for part in (batch.inputs, batch.lengths)))
    for inputs, lengths in chunks:
        backward = partial(share_gradients, run, batch)
        for share_sums, share in on_each_share(run, backward, inputs, lengths):
            sums += share_sums
            gradients = [a + b for a, b in zip(gradients, share)] if gradients else share
    all_reduce(sums)
    for parameter, gradient in zip(run.model.parameters(), sum_over_processes(run, gradients)):
        parameter.grad = gradient
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_thresh)
    real, padding, norm = torch.stack([*sums, norm]).tolist()  # waits for the device
    if math.isfinite(real + padding + norm):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    return real, padding, norm


def share_gradients(run: Run, batch: Batch, inputs: Tensor, lengths: Tensor):
    """A share of a batch -> its summed errors (2,), and its part of the gradients of the loss."""
    n, seq_len = run.args.time_shift, run.data.seq_len
    sums = forward_loss(run, inputs, lengths, seq_len)
    # Divided by the size of the whole batch, so that gradients add up to those of its mean.
    loss = run.loss(mean_losses(*sums, batch.utterances, batch.frames, n, seq_len))
    return sums.detach(), torch.autograd.grad(run.scaler.scale(loss), [*run.model.parameters()])


def train_epoch(run: Run, loader: torch.utils.data.DataLoader) -> None:
    """Train from the state's batch to the epoch's end, or to --max_steps."""
    run.model.train()
    state, sampler = run.state, loader.batch_sampler
    sampler.set_epoch(state["epoch"], state["batch"])
    with tqdm(
        total=len(sampler),
        initial=state["batch"],
        desc=f"epoch {state['epoch'] + 1}",
        unit="step",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        disable=run.rank > 0,
    ) as bar:
        start = time.perf_counter()
        for batch in batches(run, loader):
            if not run.has_steps_left():
                break
            result = train_step(run, batch)
            now = time.perf_counter()
            speed, start = batch.frames / (now - start), now
            loss = count_step(run, batch, *result, speed)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} frames/s", refresh=False)
            bar.update()
            if state["step"] % run.args.save_steps == 0:
                save_run(run)


def count_step(run: Run, batch: Batch, real, padding, norm, speed) -> float:
    """Add a step to the run's state and log it -> its loss."""
    state, counts = run.state, (batch.utterances, batch.frames)
    losses = mean_losses(real, padding, *counts, run.args.time_shift, run.data.seq_len)
    skipped = not math.isfinite(real + padding + norm)
    state["skipped"] += skipped
    state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if skipped else 0
    if skipped:
        name_bad_utterances(batch, f"step {state['step']} is skipped")
    else:
        state["sums"] = [a + b for a, b in zip(state["sums"], (real, padding, *counts))]
    metrics = {
        "training loss (step-wise)": run.loss(losses),
        "training loss with padding (step-wise)": losses.with_padding,
        "training loss per real frame (step-wise)": losses.per_real_frame,
        "gradient norm": norm,
        "frames per second": speed,
        "learning rate": run.optimizer.param_groups[0]["lr"],
        "skipped steps": state["skipped"],
    }
    position = {"epoch": state["epoch"] + 1, "step": state["step"]}
    log_metrics(run, position, state["step"], metrics)
    if state["skipped_in_a_row"] >= MAX_SKIPPED:
        raise UserError(
            f"step {state['step']}: {MAX_SKIPPED} steps in a row had no finite loss or gradient: "
            "look at the data, or start again with a lower --learning_rate, from "
            f"--init_checkpoint {run.path}/last.ckpt"
        )
    state["batch"] += 1
    state["step"] += 1
    return run.loss(losses)


def name_bad_utterances(batch: Batch, what: str) -> None:
    bad = [utt_id for utt_id, frames in zip(batch.ids, batch.inputs) if not frames.isfinite().all()]
    if bad:
        logging.error(f"{what}: frames that are NaN or infinite in {', '.join(bad)}")


def evaluate(run: Run, loader: torch.utils.data.DataLoader) -> MeanLosses:
    """The validation set's losses."""
    run.model.eval()
    seq_len = run.data.valid_set.seq_len
    sums, utterances, frames = torch.zeros(2, dtype=torch.float64), 0, 0
    forward = torch.no_grad()(partial(forward_loss, run, seq_len=seq_len))
    for batch in batches(run, loader):
        batch_sums = sum(on_each_share(run, forward, batch.inputs, batch.lengths)).cpu()
        if not batch_sums.isfinite().all():
            name_bad_utterances(batch, "validation")
        sums += batch_sums
        utterances += batch.utterances
        frames += batch.frames
    real, padding = all_reduce(sums).tolist()
    return mean_losses(real, padding, utterances, frames, run.args.time_shift, seq_len)


def end_epoch(run: Run, loader, valid_loader) -> None:
    """Validate and log; if the epoch is whole, save its model and go on to the next."""
    state, number = run.state, run.state["epoch"] + 1
    training = mean_losses(*state["sums"], run.args.time_shift, run.data.seq_len)
    validation = evaluate(run, valid_loader)
    train_loss, valid_loss = run.loss(training), run.loss(validation)
    metrics = {
        "training loss (epoch-wise)": train_loss,
        "validation loss (epoch-wise)": valid_loss,
        "training loss with padding (epoch-wise)": training.with_padding,
        "training loss per real frame (epoch-wise)": training.per_real_frame,
        "validation loss with padding (epoch-wise)": validation.with_padding,
        "validation loss per real frame (epoch-wise)": validation.per_real_frame,
    }
    log_metrics(run, {"epoch": number, "step": state["step"]}, state["epoch"], metrics)
    if run.writer:
        tag = "target (above) and predicted log-Mel (epoch-wise)"
        run.writer.add_image(tag, mel_image(run), state["epoch"], dataformats="HW")
    logging.info(
        "Epoch: %d Training Loss: %.5f Validation Loss: %.5f", number, train_loss, valid_loss
    )
    if state["batch"] >= len(loader.batch_sampler):
        if valid_loss < state["best_loss"]:
            state |= {"best_loss": valid_loss, "best_epoch": number}
        save_model(run, number)
        state |= {"epoch": number, "batch": 0, "sums": [0, 0, 0, 0]}
    save_run(run)


def mel_image(run: Run) -> Tensor:
    """Target and prediction of the first validation utterance, one above the other, (2D + 2, T).

    At most 400 frames; white is the loudest percent of the target, black the quietest.
    """
    n = run.args.time_shift
    frames, length = run.data.valid_set[0]
    frames = frames[: min(length, 400 + n)].to(run.device)
    with torch.no_grad():
        predicted_mel, _ = run.model(frames[None, :-n], torch.tensor([len(frames) - n]))
    target = frames[n:].T.flip(0).cpu()  # (D, T), low frequencies at the bottom
    predicted = predicted_mel[0].T.flip(0).float().cpu()
    black, white = np.percentile(target, [1, 99])
    image = torch.cat([target, torch.full((2, target.shape[1]), white), predicted])
    return ((image - black) / max(white - black, 1e-6)).clamp(0, 1)


# What a run keeps ---------------------------------------------------------------------------------


def log_metrics(run: Run, position: dict, index: int, metrics: dict) -> None:
    """A line {**position, **metrics} of metrics.jsonl, and a scalar for each metric at `index`."""
    if run.rank > 0:
        return
    line = dict(position)
    for tag, value in metrics.items():
        run.writer.add_scalar(tag, value, index)
        key = tag.split(" (")[0].replace(" ", "_")
        line[key] = value if math.isfinite(value) else None  # JSON has no NaN
    path = os.path.join(run.path, "metrics.jsonl")
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def rewind_metrics(path: str, step: int, epoch: int) -> None:
    """Take out of metrics.jsonl what a resumed run will log again.

    Args:
        path: the run's folder.
        step, epoch: the first of each that is still to come, counted from 0.
    """
    path = os.path.join(path, "metrics.jsonl")
    if not os.path.exists(path):
        return
    with open(path, "rb") as old, atomic_write(path) as new:
        for line in old:
            if not line.endswith(b"\n"):
                break  # the run was killed while it wrote this
            try:
                entry = json.loads(line)
                # An epoch's line has a validation loss, and says how many were done by then.
                is_epoch = "validation_loss" in entry
                if entry["epoch"] <= epoch if is_epoch else entry["step"] < step:
                    new.write(line)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: not a line of this log: {line[:40]!r}") from None


def is_finite(model: APCModel) -> bool:
    return all(parameter.isfinite().all() for parameter in model.parameters())


def refuse_diverged_run(run: Run) -> None:
    """UserError if a weight is not finite: a checkpoint of NaNs is of no use to anyone."""
    if not is_finite(run.model):
        raise UserError(
            f"step {run.state['step']}: the weights are not finite, and are not saved: start again "
            f"with a lower --learning_rate, from --init_checkpoint {run.path}/last.ckpt"
        )


def save_model(run: Run, number: int) -> None:
    """The epoch's model, as a bare state dict; with --keep_epochs, older ones go."""
    if run.rank > 0:
        return
    refuse_diverged_run(run)
    start = os.path.join(run.path, f"{run.args.experiment_name}__epoch_")
    save(run.model.state_dict(), f"{start}{number}.model")
    if run.args.keep_epochs:
        for old in range(number - run.args.keep_epochs + 1):
            if old != run.state["best_epoch"] and os.path.exists(f"{start}{old}.model"):
                os.remove(f"{start}{old}.model")


def save_run(run: Run) -> None:
    """last.ckpt: all that --resume needs, and more than load_pretrained.py does.

    There are no random states in it: the order of the data follows from (seed, epoch), and dropout
    from (seed, process, step).
    """
    if run.rank > 0:
        return
    refuse_diverged_run(run)
    run.writer.flush()  # a resumed run logs nothing before this again
    saved = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "state": run.state,
        "flags": vars(run.args),
        "data": run.data.prepared,
        "data_fingerprint": run.data.fingerprint,
    }
    save(saved, os.path.join(run.path, "last.ckpt"))


def restore_run(run: Run) -> None:
    """Go back to where last.ckpt was written; UserError if it is of another run."""
    path = os.path.join(run.path, "last.ckpt")
    saved = load(path, verify=True)
    parts = {"model", "optimizer", "scaler", "state", "flags"}
    if not isinstance(saved, dict) or not all(isinstance(saved.get(part), dict) for part in parts):
        raise UserError(f"{path}: expected what train.py saves, with {', '.join(sorted(parts))}")
    for flag, value in vars(run.args).items():
        if flag not in MAY_CHANGE_ON_RESUME and saved["flags"].get(flag) != value:
            raise UserError(
                f"{path}: --{flag} was {saved['flags'].get(flag)} in this run, and is {value} now: "
                "--resume needs the run's own flags"
            )
    for before, now in zip(saved.get("data") or [], run.data.prepared):
        for key, value in (before or {}).items():
            if key not in ("path", "utt2spk", "version") and (now or {}).get(key) != value:
                raise UserError(
                    f"{path}: the run's training data had {key} {quote(str(value))}, and now have "
                    f"{quote(str((now or {}).get(key)))}: --resume needs the same data"
                )
    if saved.get("data_fingerprint") != run.data.fingerprint:
        raise UserError(
            f"{path}: the run's training data were {saved.get('data_fingerprint')} (utterances, "
            f"frames, checksum of names and lengths), and now are {run.data.fingerprint}"
        )
    try:
        for key, value in run.state.items():
            if type(saved["state"][key]) not in (type(value), int):
                raise TypeError(f"{key} is {saved['state'][key]!r}")
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.scaler.load_state_dict(saved["scaler"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: does not fit this run: {why}") from None
    run.state.update(saved["state"])
    run.args.init_checkpoint = saved["flags"].get("init_checkpoint")  # for config.json


def find_run(args: argparse.Namespace, path: str) -> bool:
    """Whether there is a checkpoint to go on from. UserError rather than overwrite a run."""
    if args.resume and os.path.exists(os.path.join(path, "last.ckpt")):
        return True
    names = os.listdir(path) if os.path.isdir(path) else []
    if names and not args.resume:
        raise UserError(
            f"{path}: this experiment exists: choose another --experiment_name, or --resume it"
        )
    # A run that was killed before its first checkpoint holds nothing to lose.
    if any(re.search(r"__epoch_[1-9]\d*\.model$", name) for name in names):
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
    rewind_metrics(run.path, state["step"], state["epoch"])
    config = vars(args) | {"data": run.data.prepared, "version": __version__}
    write_json(config, os.path.join(run.path, "config.json"))
    tb_log = os.path.join(run.path, f"{args.experiment_name}.tb_log")
    run.writer = SummaryWriter(tb_log, purge_step=state["step"])


# The run ------------------------------------------------------------------------------------------


def is_done(run: Run) -> bool:
    """Whether neither epochs and steps are left, nor the end of an epoch that --max_steps cut."""
    has_more = run.has_steps_left() or run.state["batch"] > 0
    return run.state["epoch"] >= run.args.epochs or not has_more


def train(run: Run, resuming: bool) -> None:
    """Train to the last epoch, or to --max_steps."""
    args, state, data = run.args, run.state, run.data
    if not resuming:
        save_model(run, 0)
        save_run(run)
    loader = data_loader(run, data.train_set, shuffle=True)
    valid_loader = data_loader(run, Utterances([data.valid_set]), shuffle=False)
    while state["epoch"] < args.epochs:
        train_epoch(run, loader)
        end_epoch(run, loader, valid_loader)
        if not run.has_steps_left():
            break
    logging.info(f"done: {state['epoch']} epochs, {state['step']} steps, see {run.path}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup_logging()
    signals = Signals()
    rank, world_size, device = start_processes(args.device)
    if rank > 0:
        logging.getLogger().setLevel(logging.ERROR)  # the first process warns for all
    path = os.path.join(args.store_path, f"{args.experiment_name}.dir")
    advice = "lower --batch_size, or raise --accumulate_steps"
    with report_machine_errors(device, rank, world_size, advice):
        resuming = bool(all_reduce(torch.tensor(int(rank == 0 and find_run(args, path)))))
        run = set_up(args, path, open_data(args), signals, rank, world_size, device)
        if resuming:
            restore_run(run)
            if is_done(run):
                logging.info(f"{path}: nothing is left to do after {run.state['step']} steps")
                return
        elif args.init_checkpoint:
            load_weights(run.model, args.init_checkpoint)
        open_folder(run)
        announce(run, resuming)
        try:
            train(run, resuming)
        except Stopped as stopped:
            save_run(run)
            number = signal.Signals(stopped.args[0])
            logging.info(f"stopped by {number.name} after {run.state['step']} steps; use --resume")
            sys.exit(128 + number)
        finally:
            if run.writer:
                run.writer.close()


if __name__ == "__main__":
    run_main(main)
