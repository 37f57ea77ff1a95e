"""What every script shares: configurations, errors, devices, processes, logging, atomic files."""

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
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
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

__version__ = "2.0.0.dev0"


# What asks a run to stop: SLURM sends SIGTERM and SIGUSR1, a lost terminal SIGHUP. Windows has two.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]


class PrenetConfig(NamedTuple):
    """The original release's, positional as there."""

    input_size: int
    hidden_size: int
    num_layers: int
    dropout: float


class RNNConfig(NamedTuple):
    """The original release's, positional as there; the last field, rnn_type, is ours."""

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
    """An utterance that cannot be used, while others of its source can: --skip_bad skips it."""


def exit_status(main: Callable[[], None]) -> int:
    """Run a script's main() -> its exit status; a user error is one line on stderr and status 1."""
    try:
        main()
        return 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code or 0
    except torch.OutOfMemoryError:
        message = "out of GPU memory: lower --batch_size; when training, --accumulate_steps K"
    except RuntimeError as error:
        message = str(error)
        if not message.startswith("DataLoader worker"):  # was killed: PyTorch raises this anywhere
            raise  # a bug
    except OSError as error:
        has_name = error.filename is not None
        message = f"{os.fsdecode(error.filename)}: {error.strerror}" if has_name else str(error)
    except (UserError, MemoryError) as error:
        message = str(error) or type(error).__name__
    message = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    return 1


def run_main(main: Callable[[], None]) -> None:
    """Run a script, and end it and its worker processes."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        status = exit_status(main)
    except Exception:  # a bug
        traceback.print_exc()
        status = 1
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises if a worker dies
    kill_workers()
    if status and "WORLD_SIZE" in os.environ:  # tidying up might wait for the run's other processes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def kill_workers() -> None:
    """Kill the worker processes that are left: they may ignore the SIGTERM that Python sends."""
    for process in multiprocessing.active_children():
        process.kill()


def new_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """An ArgumentParser whose --help ends with `examples` as they are written."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_group(parser: argparse.ArgumentParser, title: str) -> Callable:
    """A group's add_argument(), which shows the defaults of flags that have one in --help."""
    group = parser.add_argument_group(title)

    def add(*names, help, **options):
        default = options.get("default")
        if isinstance(default, list):
            help = f"{help} (default: {' '.join(default)})"
        elif default is not None:
            help = f"{help} (default: %(default)s)"
        return group.add_argument(*names, help=help, **options)

    return add


def positive(text: str, least: int = 1) -> int:
    """An argparse type: an integer of `least` or more."""
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of {least} or more, found {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """An argparse type: an integer of 0 or more."""
    return positive(text, least=0)


# Devices ------------------------------------------------------------------------------------------


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


def set_numerics(tf32: bool = False) -> None:
    """Set float32 precision on a GPU for the whole process: full, or TensorFloat-32.

    Every script calls it, so that a model's features are the same in training and extraction.
    """
    for backend in (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.rnn,
        torch.backends.cudnn.conv,
    ):
        backend.fp32_precision = "tf32" if tf32 else "ieee"


def start_processes(
    device_name: str, timeout: datetime.timedelta = datetime.timedelta(minutes=10)
) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did -> (rank, world_size, device).

    `timeout` is how long they wait for each other.
    """
    # oneDNN, which computes LSTMs on a CPU, caches something for each batch shape it has seen.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    device = choose_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS") or 1) > 1:
            logging.warning(
                "SLURM started %s tasks, but this process is not part of a distributed run: start "
                "several with torchrun, or only one task",
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
            "torchrun, one process per GPU, or unset WORLD_SIZE"
        ) from None
    return dist.get_rank(), dist.get_world_size(), device


# Processes ----------------------------------------------------------------------------------------


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def catch_signals() -> list[signal.Signals]:
    """Catch the signals that ask a run to stop -> a list that they are appended to.

    The second Ctrl-C ends the process and its workers at once, whatever it is doing.
    """
    received = []

    def handle(number, _):
        if number == signal.SIGINT and signal.SIGINT in received:
            kill_workers()
            os._exit(128 + number)
        name = signal.Signals(number).name
        text = f"\n{name}: finishing the step, saving; press Ctrl-C again to stop at once\n"
        os.write(2, text.encode())  # print() might be interrupted within itself
        received.append(signal.Signals(number))

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # which nohup sets
            signal.signal(number, handle)
    return received


def ignore_signals(_: int = 0) -> None:
    """In a worker process: leave signals that reach the whole process group to the main process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _follow_main_process():
    """In a worker of run_jobs(): end when the main process is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_jobs(jobs: Iterable, function: Callable, num_workers: int) -> Iterator:
    """Yield function(job) for each job, in order, computed by `num_workers` processes.

    Only a few jobs are in flight at once, so that memory does not grow with the corpus.

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


def progress_bar(iterable: Iterable | None = None, **options: Any) -> Any:
    """A tqdm bar; where stderr is a log file and no terminal, with an update every 30 s."""
    from tqdm import tqdm  # loading a model does not need it

    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 30, **options)


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


# Files --------------------------------------------------------------------------------------------


def lock_folder(path: str) -> FileLock:
    """Lock a folder until the process ends, or the returned lock is released or deleted.

    Raises:
        UserError: another process has locked it.
    """
    lock = FileLock(os.path.join(path, ".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{path}: in use by another process: wait for it to end, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        logging.warning("%s: cannot be locked against a second process: %s", path, error)
    return lock


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path` for writing bytes; rename it to `path` at the end.

    An error within leaves what was at `path` and removes the temporary file. `sync` waits until
    the bytes are on disk before the rename, so that no crash can leave half of them.
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


def write_lines(lines: Iterable[str], path: str | os.PathLike) -> None:
    """A text file, atomically; what is not text in a file's name is written as an escape."""
    with atomic_write(path) as file:
        file.writelines(f"{line}\n".encode("utf-8", "backslashreplace") for line in lines)


def save(value: Any, path: str, sync: bool = True) -> None:
    """torch.save, atomically. UserError (a full disk, say) leaves the former file."""
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


def is_float_tensor(value: Any) -> bool:
    """Whether a value from a file is a dense floating-point tensor."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
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
