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
import contextlib
import dataclasses
import logging
import math
import os
import re
import signal
import sys
import time
import zlib
from multiprocessing import resource_tracker

from utils import (
    HelpFormatter,
    PrenetConfig,
    RNNConfig,
    UserError,
    __version__,
    loader_context,
    not_negative,
    positive,
    run,
    seed_everything,
    setup_logging,
    start_processes,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM sends the first and the last
MAX_SKIPPED = 20  # steps in a row without a finite loss and gradient


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
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


def parse_args(argv=None):
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


if __name__ == "__main__":
    parse_args()  # --help and wrong flags must not wait for torch

import numpy as np
import torch
import torch.distributed as dist
from torch import optim
from tqdm import tqdm

import checkpoint
from apc_model import APCModel, apc_loss
from datasets import BatchSampler, LibriSpeech, collate, frame_counts, warn_of_other_data
from load_pretrained import load_weights, summary

# Set-up -------------------------------------------------------------------------------------------


def model_configs(args):
    """The flags -> (PrenetConfig or None, RNNConfig), as the original release builds them."""
    hidden_size = args.rnn_hidden_size
    rnn = (hidden_size, args.rnn_num_layers, args.rnn_dropout, args.rnn_residual, args.rnn_type)
    if args.prenet_num_layers == 0:
        return None, RNNConfig(args.feature_dim, *rnn)
    prenet = (hidden_size, args.prenet_num_layers, args.prenet_dropout)
    return PrenetConfig(args.feature_dim, *prenet), RNNConfig(hidden_size, *rnn)


def build_optimizer(args, parameters, device):
    # A fused optimizer can be told on the device, without waiting for it, to skip a step. Adadelta
    # and RMSprop have no such kind.
    if args.optimizer == "adam":
        return optim.Adam(parameters, lr=args.learning_rate, fused=True)
    if args.optimizer == "sgd":
        return optim.SGD(parameters, lr=args.learning_rate, fused=True)
    if args.optimizer == "adadelta":
        return optim.Adadelta(parameters)
    if args.optimizer == "adagrad":
        return optim.Adagrad(parameters, lr=args.learning_rate, fused=device.type != "mps")
    return optim.RMSprop(parameters, lr=args.learning_rate)


def open_split(args, split):
    """A split's folder -> LibriSpeech; UserError if it does not fit the flags."""
    dataset = LibriSpeech(os.path.join(args.librispeech_path, split), args.time_shift)
    if dataset.mel_dim != args.feature_dim:
        raise UserError(
            f"{dataset.path}: its frames have {dataset.mel_dim} numbers, but --feature_dim is "
            f"{args.feature_dim}"
        )
    return dataset


@dataclasses.dataclass
class Training:
    """What the parts of a run share."""

    args: argparse.Namespace
    path: str  # <store_path>/<experiment_name>.dir
    device: torch.device
    rank: int
    world_size: int
    model: APCModel
    net: torch.nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    seq_len: int  # of the training data
    data: list  # prepared.json of each training split, or None
    state: dict  # the position of the run: with the weights, all that --resume needs
    signals: dict  # those received
    log: checkpoint.RunLog = None
    pending: list = dataclasses.field(default_factory=list)  # steps not yet read from the device
    read_time: float = 0.0  # when steps were last read


class Stopped(Exception):
    """A signal (the argument) asks this or another process of the run to stop."""


def all_reduce(values):
    """Sum a tensor over the processes of the run, in place; alone, leave it as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def build_loader(t, dataset, num_frames, shuffle):
    sampler = BatchSampler(
        num_frames,
        t.args.batch_size,
        shuffle=shuffle,
        bucketing=not t.args.no_bucketing,
        seed=t.args.seed,
        rank=t.rank,
        world_size=t.world_size,
    )
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=t.args.load_data_workers,
        persistent_workers=t.args.load_data_workers > 0,
        multiprocessing_context=loader_context(t.args.load_data_workers, t.world_size),
        pin_memory=t.device.type == "cuda",
        generator=torch.Generator(),  # or the loader would draw from dropout's numbers
    )


def batches(loader):
    """iter(loader), whose workers leave signals, which reach the whole group, to this process.

    They inherit what is blocked while they start, and so does Python's tracker of their resources.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if loader.multiprocessing_context is not None:
            resource_tracker.ensure_running()  # which unblocks some of them
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# One epoch ----------------------------------------------------------------------------------------


def share_counts(t, lengths):
    """This process' lengths -> (utterances, frames) of the whole batch. Stopped after a signal.

    Counts travel by way of the CPU, so that no device is waited for.
    """
    flags = [int(number in t.signals) for number in SIGNALS]
    counts = all_reduce(torch.tensor([len(lengths), int(lengths.sum()), *flags])).tolist()
    for number, count in zip(SIGNALS, counts[2:]):
        if count:
            raise Stopped(number)
    return counts[:2]


def forward_loss(t, net, inputs, lengths, seq_len):
    """A batch on the host -> its summed L1 errors [real frames, padding], (2,) on the device."""
    n = t.args.time_shift
    if not len(lengths):  # fewer utterances than processes: this one's counts for nothing
        inputs, lengths = torch.zeros(1, n + 1, t.args.feature_dim), torch.zeros(1)
    longest = max(int(lengths.max()), n + 1)
    # Cut behind the copy, which is asynchronous for the whole of a pinned tensor alone.
    inputs = inputs.to(t.device, non_blocking=True)[:, :longest]
    lengths = lengths.to(t.device, non_blocking=True)
    kinds = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    kind = kinds[t.args.precision]
    with torch.autocast(t.device.type, dtype=kind, enabled=kind is not None):
        predicted_mel, _ = net(inputs[:, :-n], lengths - n)
    bias = t.model.postnet.layer.bias
    return torch.stack(apc_loss(predicted_mel, inputs, lengths, n, seq_len, bias))


def losses(args, sums, utterances, frames, seq_len):
    """Summed errors -> (with padding, per real frame): the two kinds of mean loss."""
    real, padding = sums
    n = args.time_shift
    if not utterances:  # every step of an epoch was skipped
        return math.nan, math.nan
    return (real + padding) / (utterances * (seq_len - n)), real / (frames - n * utterances)


def train_step(t, inputs, lengths, utterances, frames):
    """One optimizer step on a batch, of which this process has `inputs` and `lengths`.

    -> [real frames' error, padding's error, gradient norm, skipped], (4,) on the device, which is
    not waited for.
    """
    # Dropout follows from the step alone, so that a resumed run drops what it would have dropped.
    seed = np.random.SeedSequence([t.args.seed, t.rank, t.state["step"]])
    torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
    t.optimizer.zero_grad()
    sums = torch.zeros(2, device=t.device)
    parts = list(zip(inputs.chunk(t.args.accumulate_steps), lengths.chunk(t.args.accumulate_steps)))
    for part in parts:
        # Gradients are exchanged once a step, with the last part.
        wait = t.net is not t.model and part is not parts[-1]
        with t.net.no_sync() if wait else contextlib.nullcontext():
            part_sums = forward_loss(t, t.net, *part, t.seq_len)
            loss = losses(t.args, part_sums, utterances, frames, t.seq_len)[t.args.mask_padding]
            # DistributedDataParallel averages gradients; the mean over the whole batch is a sum.
            t.scaler.scale(loss * t.world_size).backward()
        sums += part_sums.detach()
    all_reduce(sums)
    if t.scaler.is_enabled():  # it looks at gradients alone: a loss that is not finite must show
        torch._foreach_add_([p.grad for p in t.model.parameters()], 0 * sums.sum())
    t.scaler.unscale_(t.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(t.model.parameters(), t.args.clip_thresh)
    skipped = ~(norm.isfinite() & sums.isfinite().all())
    if t.scaler.is_enabled():
        t.scaler.step(t.optimizer)
        t.scaler.update()
    elif t.optimizer.defaults.get("fused"):
        t.optimizer.grad_scale, t.optimizer.found_inf = None, skipped.float()
        t.optimizer.step()
    elif not skipped:
        t.optimizer.step()
    return torch.stack([*sums, norm, skipped.float()])


def log_steps(t):
    """Read the figures of the pending steps from the device, log them, add them to the epoch's."""
    if not t.pending:
        return ""
    state, steps = t.state, t.pending
    t.pending = []
    values = torch.stack([step[-1] for step in steps]).tolist()
    now = time.perf_counter()
    speed = sum(step[2] for step in steps) / (now - t.read_time)
    t.read_time = now
    for (index, utterances, frames, _), (real, padding, norm, skipped) in zip(steps, values):
        kinds = losses(t.args, (real, padding), utterances, frames, t.seq_len)
        loss = kinds[t.args.mask_padding]
        state["skipped"] += int(skipped)
        state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if skipped else 0
        if not skipped:
            new = (real, padding, utterances, frames)
            state["sums"] = [old + value for old, value in zip(state["sums"], new)]
        figures = {
            "training loss (step-wise)": loss,
            "training loss with padding (step-wise)": kinds[0],
            "training loss per real frame (step-wise)": kinds[1],
            "gradient norm": norm,
            "frames per second": speed,
            "learning rate": t.optimizer.param_groups[0]["lr"],
            "skipped steps": state["skipped"],
        }
        t.log.write({"epoch": state["epoch"] + 1, "step": index}, index, figures)
        if state["skipped_in_a_row"] >= MAX_SKIPPED:
            raise UserError(
                f"step {index}: {MAX_SKIPPED} steps in a row had no finite loss or gradient: look "
                f"at the data, or start again with a lower --learning_rate, from --init_checkpoint "
                f"{t.path}/last.ckpt"
            )
    return f"loss {loss:.4f}, {speed:.0f} frames/s"


def train_epoch(t, loader):
    """Train from the state's batch to the epoch's end, or to --max_steps."""
    t.model.train()
    state, sampler = t.state, loader.batch_sampler
    sampler.set_epoch(state["epoch"], state["batch"])
    t.read_time = time.perf_counter()
    with tqdm(
        total=len(sampler),
        initial=state["batch"],
        desc=f"epoch {state['epoch'] + 1}",
        unit="step",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        disable=t.rank > 0,
    ) as bar:
        for inputs, lengths in batches(loader):
            if state["step"] >= (t.args.max_steps or math.inf):
                break
            utterances, frames = share_counts(t, lengths)
            figures = train_step(t, inputs, lengths, utterances, frames)
            t.pending.append((state["step"], utterances, frames, figures))
            state["batch"] += 1
            state["step"] += 1
            # A CPU has done the step already; others are read seldom, because that waits for them.
            if t.device.type == "cpu" or state["step"] % 20 == 0:
                bar.set_postfix_str(log_steps(t), refresh=False)
            bar.update()
            if state["step"] % t.args.save_steps == 0:
                log_steps(t)
                checkpoint.save_checkpoint(t)
    log_steps(t)


def evaluate(t, loader):
    """-> the validation set's (loss with padding, loss per real frame)."""
    t.model.eval()
    sums, utterances, frames = [], 0, 0
    with torch.no_grad():
        for inputs, lengths in batches(loader):
            counts = share_counts(t, lengths)
            sums.append(forward_loss(t, t.model, inputs, lengths, loader.dataset.seq_len))
            utterances, frames = utterances + counts[0], frames + counts[1]
    sums = all_reduce(torch.stack(sums).cpu().double().sum(dim=0)).tolist()
    return losses(t.args, sums, utterances, frames, loader.dataset.seq_len)


def end_epoch(t, loader, valid_loader):
    """Validate and log; if the epoch is whole, save its model and go on to the next."""
    state, args = t.state, t.args
    number = state["epoch"] + 1
    *sums, utterances, frames = state["sums"]
    training = losses(args, sums, utterances, frames, t.seq_len)
    validation = evaluate(t, valid_loader)
    train_loss, valid_loss = training[args.mask_padding], validation[args.mask_padding]
    figures = {
        "training loss (epoch-wise)": train_loss,
        "validation loss (epoch-wise)": valid_loss,
        "training loss with padding (epoch-wise)": training[0],
        "training loss per real frame (epoch-wise)": training[1],
        "validation loss with padding (epoch-wise)": validation[0],
        "validation loss per real frame (epoch-wise)": validation[1],
    }
    t.log.write({"epoch": number, "step": state["step"]}, state["epoch"], figures)
    if t.rank == 0:
        picture = mel_picture(*predict_utterance(t, valid_loader.dataset))
        tag = "target (above) and predicted log-Mel (epoch-wise)"
        t.log.picture(tag, picture, state["epoch"])
    logging.info(
        "Epoch: %d Training Loss: %.5f Validation Loss: %.5f", number, train_loss, valid_loss
    )
    if state["batch"] >= len(loader.batch_sampler):
        if valid_loss < state["best_loss"]:
            state |= {"best_loss": valid_loss, "best_epoch": number}
        checkpoint.save_epoch(t, number)
        state |= {"epoch": number, "batch": 0, "sums": [0, 0, 0, 0]}
    checkpoint.save_checkpoint(t)


def predict_utterance(t, dataset):
    """-> target and prediction of the first utterance, each (D, frames), at most 400 frames."""
    n = t.args.time_shift
    frames, length = dataset[0]
    frames = frames[: min(length, 400 + n)].to(t.device)
    with torch.no_grad():
        predicted_mel, _ = t.model(frames[None, :-n], torch.tensor([len(frames) - n]))
    return frames[n:].T.cpu().numpy(), predicted_mel[0].T.float().cpu().numpy()


def mel_picture(target, predicted):
    """Two log-Mel spectrograms (D, frames) -> an RGB picture, one above the other."""
    low, high = np.percentile(target, [1, 99])
    gap = np.full((2, target.shape[1]), np.nan)
    values = np.vstack([target[::-1], gap, predicted[::-1]])
    values = ((values - low) / max(high - low, 1e-6)).clip(0, 1).repeat(3, 0).repeat(3, 1)
    # Black, violet, orange, pale yellow; the gap is white.
    stops = np.array([[0, 0, 4], [120, 28, 109], [237, 105, 37], [252, 255, 164]])
    colours = [np.interp(values, np.linspace(0, 1, 4), stops[:, i]) for i in range(3)]
    return np.nan_to_num(np.stack(colours, axis=-1), nan=255).astype(np.uint8)


# The run ------------------------------------------------------------------------------------------


def find_run(args, path):
    """-> whether there is a checkpoint to go on from. UserError rather than overwrite a run."""
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


def is_to_go_on(t):
    """Whether epochs and steps are left, or the end of an epoch is."""
    has_steps = t.state["step"] < (t.args.max_steps or math.inf) or t.state["batch"] > 0
    return t.state["epoch"] < t.args.epochs and has_steps


def train(args, rank, world_size, device, signals):
    setup_logging()
    if rank > 0:
        logging.getLogger().setLevel(logging.ERROR)  # the first process has warned already
    path = os.path.join(args.store_path, f"{args.experiment_name}.dir")
    resuming = bool(all_reduce(torch.tensor(int(rank == 0 and find_run(args, path)))))

    splits = [open_split(args, split) for split in args.train_split]
    valid_set = open_split(args, args.valid_split)
    for split in [*splits[1:], valid_set]:
        warn_of_other_data(splits[0].prepared, split)
    if len({split.seq_len for split in splits}) > 1:
        found = ", ".join(f"{split.path}: {split.seq_len}" for split in splits)
        raise UserError(f"the training splits differ in max_seq_len ({found}): prepare them alike")
    train_set = torch.utils.data.ConcatDataset(splits) if len(splits) > 1 else splits[0]
    num_frames = np.concatenate([frame_counts(split) for split in splits])
    names = "".join(f"{name} {split.lengths[name]}\n" for split in splits for name in split.ids)
    data_size = [len(num_frames), int(num_frames.sum()), zlib.crc32(names.encode())]

    seed_everything(args.seed)
    model = APCModel(args.feature_dim, *model_configs(args))
    if args.init_checkpoint and not resuming:
        load_weights(model, args.init_checkpoint)
        checkpoint.check_weights(model, args.init_checkpoint)
    model.to(device)
    precision = "tf32" if args.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.rnn.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision
    t = Training(
        args=args,
        path=path,
        device=device,
        rank=rank,
        world_size=world_size,
        model=model,
        net=model,
        optimizer=build_optimizer(args, model.parameters(), device),
        # bf16 needs it too: on CUDA, PyTorch's autocast does RNN layers in fp16 all the same.
        scaler=torch.amp.GradScaler(device.type, enabled=args.precision != "fp32"),
        seq_len=splits[0].seq_len,
        data=[split.prepared for split in splits],
        state={
            "epoch": 0,
            "batch": 0,  # done in this epoch
            "step": 0,  # done in all
            "sums": [0, 0, 0, 0],  # of this epoch: errors (real, padding), utterances, frames
            "data_size": data_size,
            "skipped": 0,
            "skipped_in_a_row": 0,
            "best_loss": math.inf,
            "best_epoch": 0,
        },
        signals=signals,
    )
    if resuming:
        checkpoint.restore(t)
    if resuming and not is_to_go_on(t):
        logging.info(f"{path}: nothing is left to do after {t.state['step']} steps")
        return
    if world_size > 1:
        ids = [device] if device.type == "cuda" else None
        t.net = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
    if rank == 0:
        os.makedirs(path, exist_ok=True)
        setup_logging(os.path.join(path, args.experiment_name))
        checkpoint.rewind_logs(path, t.state["step"], t.state["epoch"])
        config = vars(args) | {"data": t.data, "version": __version__}
        checkpoint.write_json(config, os.path.join(path, "config.json"))
    t.log = checkpoint.RunLog(path, args.experiment_name, active=rank == 0)

    positions = f"all {t.seq_len - args.time_shift} positions of an utterance, padding included"
    logging.info(f"{'going on with' if resuming else 'training'} {path}")
    logging.info(f"model: {summary(model)}")
    utterances, frames, _ = data_size
    logging.info(
        f"data: {utterances} utterances, {frames} frames, {frames / 360000:.2f} hours at 10 ms, "
        f"from {', '.join(args.train_split)}; validation: {len(valid_set)} utterances"
    )
    logging.info(
        f"device: {device} ({world_size} process(es)), {args.precision}; batches of "
        f"{args.batch_size} utterances, {args.optimizer} with learning rate "
        f"{t.optimizer.param_groups[0]['lr']:g}, epochs {t.state['epoch'] + 1} to {args.epochs}"
    )
    logging.info(
        f"loss: L1 of the frame {args.time_shift} ahead, averaged over "
        f"{'real frames' if args.mask_padding else positions}"
    )
    if not resuming:
        checkpoint.save_epoch(t, 0)
        checkpoint.save_checkpoint(t)

    loader = build_loader(t, train_set, num_frames, shuffle=True)
    valid_loader = build_loader(t, valid_set, frame_counts(valid_set), shuffle=False)
    try:
        while t.state["epoch"] < args.epochs:
            train_epoch(t, loader)
            end_epoch(t, loader, valid_loader)
            if t.state["step"] >= (args.max_steps or math.inf):
                break
        logging.info(f"done: {t.state['epoch']} epochs, {t.state['step']} steps, see {path}")
    except Stopped as stopped:
        log_steps(t)
        checkpoint.save_checkpoint(t)
        number = stopped.args[0]
        logging.info(f"stopped by {number.name} after {t.state['step']} steps; --resume goes on")
        sys.exit(128 + number)
    finally:
        t.log.close()


def main(argv=None):
    args = parse_args(argv)
    signals = {}  # received: number -> when

    def remember(number, frame):
        # torchrun hands on what its processes got as well: only later it means impatience.
        since = time.monotonic() - signals.setdefault(number, time.monotonic())
        if number == signal.SIGINT and since > 2:
            raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, remember)

    rank, world_size, device = start_processes(args.device)
    try:
        train(args, rank, world_size, device, signals)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{device} is out of memory: lower --batch_size, or raise --accumulate_steps"
        ) from None
    except (RuntimeError, ConnectionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, ConnectionError) or "DataLoader worker" in first:
            # At once: the loader's own end would print a traceback after our line.
            print(f"train.py: error: a process that loads data died: {first}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        if world_size == 1 and "can't allocate memory" not in first:
            raise
        # Most often another process is gone; what it said stands elsewhere.
        raise UserError(f"process {rank + 1} of {world_size} cannot go on: {first}") from error


if __name__ == "__main__":
    run(main)
