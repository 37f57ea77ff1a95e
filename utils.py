"""What every script shares: configurations, errors, devices, processes, whole files."""

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import io
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist

__version__ = "1.0.0"


class PrenetConfig(NamedTuple):
    """The original release's, positional as there."""

    input_size: int
    hidden_size: int
    num_layers: int
    dropout: float


class RNNConfig(NamedTuple):
    """The original release's, positional as there; rnn_type, which it has not, comes last."""

    input_size: int
    hidden_size: int
    num_layers: int
    dropout: float
    residual: bool
    rnn_type: str = "gru"


# Errors and flags ---------------------------------------------------------------------------------


class UserError(ValueError):
    """A user error, reported in one line."""


class BadUtterance(UserError):
    """An utterance that cannot be used, while others of its source can: --skip_bad goes on."""


def exit_status(main: Callable[[], None]) -> int:
    """Run a script's main() -> its exit status; a user error is one line on stderr and status 1."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        main()
        return 0
    except (UserError, OSError, MemoryError) as error:
        sys.unraisablehook = lambda _: None  # libraries' objects may complain as they go
        message = " ".join(str(error).split()) or type(error).__name__
        message = message.encode("utf-8", "backslashreplace").decode()
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code or 0


def run_main(main: Callable[[], None]) -> None:
    """Run a script, and end it and its worker processes."""
    status = exit_status(main)
    for process in multiprocessing.active_children():
        process.kill()  # it has done its work, and may be deaf to the SIGTERM that Python sends
    if "WORLD_SIZE" in os.environ:  # tidying up might wait for other processes of the run
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows flags' defaults, where they have one."""

    def _get_help_string(self, action):
        is_switch = action.nargs == 0
        return (
            action.help if action.default is None or is_switch else super()._get_help_string(action)
        )


def positive(text: str, least: int = 1) -> int:
    """An argparse type: an integer of `least` or more."""
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of {least} or more, found {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """An argparse type: an integer of 0 or more."""
    return positive(text, least=0)


def quote(text: str | bytes) -> str:
    """Text from a file, for a one-line message: short and printable."""
    text = (text if isinstance(text, str) else text.decode("utf-8", "replace")).strip()
    return repr(text if len(text) <= 40 else text[:40] + "...")


def check_utt_id(utt_id: str | bytes, where: str) -> str:
    """An utterance id (UTF-8, if bytes), which becomes a file name -> the same as str.

    Raises:
        UserError: naming `where`, if it would be a bad file name.
    """
    try:
        utt_id = utt_id if isinstance(utt_id, str) else utt_id.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{where}: expected an utterance id in UTF-8, found {quote(utt_id)}"
        ) from None
    if (
        not utt_id
        or utt_id.startswith(".")
        or re.search(r"[/\\]", utt_id)
        or not utt_id.isprintable()
        or len(utt_id.encode()) > 240
    ):
        raise UserError(
            f"{where}: utterance id {quote(utt_id)} cannot be a file name: expected at most 240 "
            "bytes, printable, without '/' and '\\', and not starting with '.'"
        )
    return utt_id


# Devices, processes -------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `mps` -> torch.device; UserError if PyTorch sees no such device."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    choices = [device for device, is_there in available.items() if is_there]
    if name != "auto" and name not in choices:
        raise UserError(f"--device {name}: PyTorch sees none here; choose from {choices}")
    return torch.device(choices[0] if name == "auto" else name)


def start_processes(
    device_name: str, timeout: datetime.timedelta = datetime.timedelta(minutes=10)
) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did -> (rank, world_size, device).

    `timeout` is how long they wait for each other.
    """
    # oneDNN, which computes LSTMs on a CPU, keeps something for each shape of a batch it has seen.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    device = choose_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS") or 1) > 1:
            logging.warning(
                "SLURM started %s tasks, but this process knows of no others: start several with "
                "torchrun, or one task",
                os.environ["SLURM_NTASKS"],
            )
        return 0, 1, device
    if device.type == "mps":
        raise UserError("--device mps: one process at a time; use --device cpu under torchrun")
    backend = "gloo"
    try:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timeout)
    except (KeyError, ValueError, RuntimeError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"WORLD_SIZE is set, but this process cannot join the others ({why}): start it with "
            "torchrun, a process a GPU, or unset WORLD_SIZE"
        ) from None
    return dist.get_rank(), dist.get_world_size(), device


@contextlib.contextmanager
def report_machine_errors(device: torch.device, rank: int, world_size: int, advice: str):
    """Turn the RuntimeErrors that are no bugs into UserErrors: no memory, another process gone."""
    try:
        yield
    except RuntimeError as error:
        # On a CPU, PyTorch has no type of its own for a lack of memory.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"{device} is out of memory: {advice}") from None
        if world_size == 1:
            raise
        # Most often another process is gone, which has said why.
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"process {rank + 1} of {world_size} cannot go on: {line}") from error


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _follow_main_process():
    """In a worker: leave Ctrl-C to the main process, and end when that is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_jobs(jobs: Iterable, function: Callable, num_workers: int) -> Iterator:
    """Yield function(job) for each job, in order, computed by `num_workers` processes.

    Few jobs are under way at once, so that memory does not grow with the corpus.

    Raises:
        UserError: a process was killed, as the system does when memory runs out.
    """
    if num_workers == 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with concurrent.futures.ProcessPoolExecutor(num_workers, context, _follow_main_process) as pool:
        waiting = collections.deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(function, job))
                if len(waiting) > 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?)") from None
        finally:
            pool.shutdown(cancel_futures=True)


@functools.cache
def _core_threads(num_threads, cores_each):
    pool = concurrent.futures.ThreadPoolExecutor
    return pool(num_threads, initializer=torch.set_num_threads, initargs=(cores_each,))


def on_each_core(function: Callable, *parts: Any, smallest: int = 4) -> list:
    """Call function(*parts) for each CPU core's share of a batch, all at once.

    OpenMP would split every product over the cores, which then meet thousands of times in a step,
    and all wait when one is busy with something else. Shares meet once.

    Args:
        function: called in a thread of its own; gradients are enabled there.
        parts: tensors and lists of B utterances each; a share is every k-th of them.
        smallest: utterances of a share, at least: thinner products would be slower.

    Returns:
        The results, in the order of shares [0::k], [1::k], ...
    """
    cores = torch.get_num_threads()
    num_shares = max(1, min(cores, len(parts[0]) // smallest))
    if num_shares == 1:
        return [function(*parts)]
    threads = _core_threads(num_shares, cores // num_shares)
    shares = [[part[start::num_shares] for part in parts] for start in range(num_shares)]
    return list(threads.map(lambda share: function(*share), shares))


def setup_logging(path: str | None = None) -> None:
    """Log to the console, and to the end of the file `path` if one is given."""
    handlers = [logging.StreamHandler()]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    logging.raiseExceptions = False  # a full disk is reported by whatever has to be written
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s - %(levelname)s - %(message)s",
        handlers=handlers,
        force=True,
    )


def lock_folder(path: str) -> None:
    """Keep other processes out of a folder until this one ends, in whatever way it does.

    Raises:
        UserError: another process has it.
    """
    descriptor = os.open(os.path.join(path, ".lock"), os.O_RDWR | os.O_CREAT)  # stays open
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"{path}: another process is at work in this folder: wait for it, or choose another"
        ) from None
    except OSError as error:  # some network folders know no locks
        logging.warning("%s: cannot be locked against a second process: %s", path, error.strerror)


# Files --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: str, sync: bool = True) -> Iterator[BinaryIO]:
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
        if isinstance(error, OSError) and error.filename is None:  # write() does not know the name
            raise UserError(f"{path}: {error.strerror}; nothing else is changed") from None
        raise


def save(value: Any, path: str, sync: bool = True) -> None:
    """torch.save, atomically. OSError (a full disk, say) leaves the former file."""
    # Through memory: torch's own file writer reports a full disk as a RuntimeError without a path.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_write(path, sync) as file:
        file.write(buffer.getbuffer())


def load(path: str, verify: bool = False) -> Any:
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
        warnings.simplefilter("ignore")  # about old formats
        try:
            if verify and zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
                raise ValueError("checksum")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises almost anything
            code = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it asks for {code[1]}, which is not plain data" if code else "is it damaged?"
            raise UserError(f"{path}: not a file of plain tensors: {why}") from None


def is_plain(value: Any) -> bool:
    """Whether a value out of a file is a tensor of floating-point numbers that lie in memory."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_contiguous()  # an expanded one may claim more than there is
    )


def write_json(value: dict, path: str) -> None:
    """A JSON file, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, default=repr).encode() + b"\n")


def read_json(path: str) -> dict | None:
    """A JSON object -> dict; None if there is no such file. UserError if it is not an object."""
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
