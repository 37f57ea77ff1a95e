"""What a run keeps: files that are either whole or not there, its checkpoints and its logs."""

import argparse
import contextlib
import glob
import io
import json
import math
import os
import re
import warnings

import torch

from utils import UserError

# What may differ between a run and its --resume, because the weights do not depend on it.
FREE_FLAGS = {
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


@contextlib.contextmanager
def atomic_write(path, sync=True):
    """Open a temporary file beside `path` for writing bytes; rename it to `path` at the end.

    An error within leaves what was at `path` and removes the temporary file. `sync` waits until
    the disk has the bytes before they get their name, so that no crash can leave half of them.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def save(value, path, sync=True):
    """torch.save, atomically. OSError (a full disk, say) leaves the former file."""
    # Through memory: torch's own file writer tells a full disk as a RuntimeError without a path.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_write(path, sync) as file:
        file.write(buffer.getbuffer())


def write_json(value, path):
    """A JSON file, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def load(path):
    """torch.load onto the CPU of a file that may hold anything: nothing in it is executed.

    Raises:
        UserError: it is no checkpoint, is damaged, or holds more than plain data and tensors.
    """
    # s3prl's checkpoints carry their flags in one of these, which is a plain record.
    plain = torch.serialization.safe_globals([argparse.Namespace])
    with open(path, "rb") as file, plain, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old formats
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises almost anything
            code = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it asks for {code[1]}, which is not plain data" if code else "is it damaged?"
            raise UserError(f"{path}: not a file of plain tensors: {why}") from None


class RunLog:
    """metrics.jsonl and TensorBoard, both written by the first process alone."""

    def __init__(self, path, name, active):
        self.active = active
        if active:
            from torch.utils.tensorboard import SummaryWriter

            metrics = os.path.join(path, "metrics.jsonl")
            self.metrics = open(metrics, "a", encoding="utf-8")  # noqa: SIM115
            self.tensorboard = SummaryWriter(os.path.join(path, f"{name}.tb_log"))

    def write(self, position, index, figures):
        """A line {**position, **figures} of metrics.jsonl, and a scalar a figure at `index`."""
        if not self.active:
            return
        line = dict(position)
        for tag, value in figures.items():
            self.tensorboard.add_scalar(tag, value, index)
            key = tag.split(" (")[0].replace(" ", "_")
            line[key] = value if math.isfinite(value) else None  # JSON has no NaN
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()

    def close(self):
        if self.active:
            self.metrics.close()
            self.tensorboard.close()


def rewind_logs(path, step, epoch):
    """Take out of metrics.jsonl and the TensorBoard files what a resumed run will log again.

    Args:
        path: the run's folder.
        step, epoch: the first of each that is still to come, counted from 0.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    tb_log = os.path.join(glob.escape(path), "*.tb_log")
    for pattern in (os.path.join(glob.escape(path), "*.tmp"), os.path.join(tb_log, "*.tmp")):
        for name in glob.glob(pattern):  # what a kill has left
            os.remove(name)

    metrics = os.path.join(path, "metrics.jsonl")
    if os.path.exists(metrics):
        with open(metrics, "rb") as old, atomic_write(metrics) as new:
            for line in old:
                if not line.endswith(b"\n"):
                    break  # the run was killed while it wrote this
                entry = json.loads(line)
                # An epoch's line has a validation loss, and says how many epochs were done by then.
                is_epoch = "validation_loss" in entry
                if entry["epoch"] <= epoch if is_epoch else entry["step"] < step:
                    new.write(line)

    for name in glob.glob(os.path.join(tb_log, "*tfevents*")):
        kept = []
        for record in RawEventFileLoader(name).Load():
            event = Event.FromString(record)
            is_epoch = any("(epoch-wise)" in value.tag for value in event.summary.value)
            if not event.HasField("summary") or event.step < (epoch if is_epoch else step):
                kept.append(record)
        with atomic_write(name) as new:
            writer = RecordWriter(new)
            for record in kept:
                writer.write(record)


def model_file(t, number):
    return os.path.join(t.path, f"{t.args.experiment_name}__epoch_{number}.model")


def check_weights(t):
    """UserError if a weight is not finite: a checkpoint of NaNs is of no use to anyone."""
    if not torch.stack([p.isfinite().all() for p in t.model.parameters()]).all():
        raise UserError(
            f"step {t.state['step']}: the weights are no longer finite, and are not saved: lower "
            "--learning_rate and go on from the last checkpoint"
        )


def save_epoch(t, number):
    """The epoch's model, as a bare state dict; with --keep_epochs, older ones go."""
    if t.rank > 0:
        return
    check_weights(t)
    save(t.model.state_dict(), model_file(t, number))
    if t.args.keep_epochs:
        for old in range(number - t.args.keep_epochs + 1):
            if old != t.state["best_epoch"] and os.path.exists(model_file(t, old)):
                os.remove(model_file(t, old))


def save_checkpoint(t):
    """last.ckpt: all that --resume needs, and more than load_pretrained.py does."""
    if t.rank > 0:
        return
    check_weights(t)
    t.log.tensorboard.flush()  # what is logged must not end before where the run goes on
    saved = {
        "model": t.model.state_dict(),
        "optimizer": t.optimizer.state_dict(),
        "scaler": t.scaler.state_dict(),
        "state": t.state,
        "flags": vars(t.args),
        "data": t.data,
    }
    save(saved, os.path.join(t.path, "last.ckpt"))


def restore(t):
    """Go back to where last.ckpt was written; UserError if it is of another run."""
    path = os.path.join(t.path, "last.ckpt")
    saved = load(path)
    for flag, value in vars(t.args).items():
        if flag not in FREE_FLAGS and saved["flags"].get(flag) != value:
            raise UserError(
                f"{path}: --{flag} was {saved['flags'].get(flag)} in this run, and is {value} now: "
                "--resume needs the run's own flags"
            )
    if saved["state"]["data_size"] != t.state["data_size"]:
        raise UserError(
            f"{path}: the run's training data were {saved['state']['data_size']} (utterances, "
            f"frames), and now are {t.state['data_size']}"
        )
    t.model.load_state_dict(saved["model"])
    t.optimizer.load_state_dict(saved["optimizer"])
    t.scaler.load_state_dict(saved["scaler"])
    t.state.update(saved["state"])
