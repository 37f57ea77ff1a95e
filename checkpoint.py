"""What a run keeps: files that are either whole or not there, its checkpoints and its logs."""

import argparse
import contextlib
import glob
import io
import json
import math
import os
import re
import socket
import time
import warnings
import zipfile

import numpy as np
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
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.filename is None:  # write() knows no name
            raise UserError(f"{path}: {error.strerror}; nothing else is changed") from None
        raise


def save(value, path, sync=True):
    """torch.save, atomically. OSError (a full disk, say) leaves the former file."""
    # Through memory: torch's own file writer tells a full disk as a RuntimeError without a path.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_write(path, sync) as file:
        file.write(buffer.getbuffer())


def save_arrays(arrays, path, sync=True):
    """NumPy arrays one after another in one file (np.load gives them in turn), atomically."""
    buffer = io.BytesIO()  # given a file, numpy overlooks that a disk is full
    for array in arrays:
        np.save(buffer, array)
    with atomic_write(path, sync) as file:
        file.write(buffer.getbuffer())


def write_json(value, path):
    """A JSON file, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, default=repr).encode() + b"\n")


def read_json(path):
    """A JSON object -> dict, or None where there is no such file. UserError if it is no object."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def load(path, verify=False):
    """torch.load onto the CPU of a file that may hold anything: nothing in it is executed.

    Args:
        path: the file.
        verify: compare the tensors with their checksums, which torch.load does not.

    Raises:
        UserError: it is no checkpoint, is damaged, or holds more than plain data and tensors.
    """
    # s3prl's checkpoints carry their flags in one of these, which is a plain record.
    plain = torch.serialization.safe_globals([argparse.Namespace])
    with open(path, "rb") as file, plain, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old formats
        try:
            if verify and zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
                raise ValueError("checksum")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises almost anything
            code = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it asks for {code[1]}, which is not plain data" if code else "is it damaged?"
            raise UserError(f"{path}: not a file of plain tensors: {why}") from None


def is_plain(value):
    """Whether a value out of a file is a tensor of floating-point numbers that lie in memory."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_contiguous()  # an expanded one may claim more than there is
    )


class RunLog:
    """metrics.jsonl and TensorBoard, both written by the first process alone.

    Events are written as they come, by this thread: SummaryWriter's own would end with a traceback
    when the disk is full.
    """

    def __init__(self, path, name, active):
        self.active = active
        if not active:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = os.path.join(path, f"{name}.tb_log")
        os.makedirs(folder, exist_ok=True)
        events = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.metrics = open(os.path.join(path, "metrics.jsonl"), "ab", 0)  # noqa: SIM115
        self.events = open(os.path.join(folder, events), "ab", 0)  # noqa: SIM115
        self.records = RecordWriter(self.events)
        self.event = Event
        self._record(file_version="brain.Event:2")

    def _record(self, **content):
        event = self.event(wall_time=time.time(), **content)
        try:
            self.records.write(event.SerializeToString())
        except OSError as error:
            raise UserError(f"{self.events.name}: {error.strerror}") from None

    def write(self, position, index, figures):
        """A line {**position, **figures} of metrics.jsonl, and a scalar a figure at `index`."""
        if not self.active:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        line, values = dict(position), []
        for tag, value in figures.items():
            values.append(Summary.Value(tag=tag, simple_value=value))
            key = tag.split(" (")[0].replace(" ", "_")
            line[key] = value if math.isfinite(value) else None  # JSON has no NaN
        self._record(step=index, summary=Summary(value=values))
        try:
            self.metrics.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self.metrics.name}: {error.strerror}") from None

    def picture(self, tag, picture, index):
        """An RGB picture, uint8 (height, width, 3), for TensorBoard."""
        from torch.utils.tensorboard.summary import image

        self._record(step=index, summary=image(tag, picture, dataformats="HWC"))

    def close(self):
        if self.active:
            self.metrics.close()
            self.events.close()


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
                try:
                    entry = json.loads(line)
                    # An epoch's line has a validation loss, and says how many were done by then.
                    is_epoch = "validation_loss" in entry
                    if entry["epoch"] <= epoch if is_epoch else entry["step"] < step:
                        new.write(line)
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{metrics}: not a line of this log: {line[:40]!r}") from None

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


def check_weights(model, where, advice=""):
    """UserError if a weight is not finite: a checkpoint of NaNs is of no use to anyone."""
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise UserError(f"{where}: the weights are not finite{advice}")


def check_run(t):
    advice = ", and are not saved: start again with a lower --learning_rate, from --init_checkpoint"
    check_weights(t.model, f"step {t.state['step']}", f"{advice} {t.path}/last.ckpt")


def save_epoch(t, number):
    """The epoch's model, as a bare state dict; with --keep_epochs, older ones go."""
    if t.rank > 0:
        return
    check_run(t)
    save(t.model.state_dict(), model_file(t, number))
    if t.args.keep_epochs:
        for old in range(number - t.args.keep_epochs + 1):
            if old != t.state["best_epoch"] and os.path.exists(model_file(t, old)):
                os.remove(model_file(t, old))


def save_checkpoint(t):
    """last.ckpt: all that --resume needs, and more than load_pretrained.py does.

    There are no random states in it: the order of the data follows from (seed, epoch), and dropout
    from (seed, process, step).
    """
    if t.rank > 0:
        return
    check_run(t)
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
    saved = load(path, verify=True)
    parts = {"model", "optimizer", "scaler", "state", "flags"}
    if not isinstance(saved, dict) or not all(isinstance(saved.get(part), dict) for part in parts):
        raise UserError(f"{path}: expected what train.py saves, with {', '.join(sorted(parts))}")
    for flag, value in vars(t.args).items():
        if flag not in FREE_FLAGS and saved["flags"].get(flag) != value:
            raise UserError(
                f"{path}: --{flag} was {saved['flags'].get(flag)} in this run, and is {value} now: "
                "--resume needs the run's own flags"
            )
    if saved["state"].get("data_size") != t.state["data_size"]:
        raise UserError(
            f"{path}: the run's training data were {saved['state'].get('data_size')} (utterances, "
            f"frames, checksum of names and lengths), and now are {t.state['data_size']}"
        )
    try:
        for key, value in t.state.items():
            if type(saved["state"][key]) not in (type(value), int):
                raise TypeError(f"{key} is {saved['state'][key]!r}")
        t.model.load_state_dict(saved["model"])
        t.optimizer.load_state_dict(saved["optimizer"])
        t.scaler.load_state_dict(saved["scaler"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: does not fit this run: {why}") from None
    t.state.update(saved["state"])
    t.args.init_checkpoint = saved["flags"].get("init_checkpoint")  # for config.json
