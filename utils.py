"""What every script shares: model configurations, errors, seeds, devices, logging."""

import argparse
import collections
import concurrent.futures
import datetime
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import sys
import threading

__version__ = "1.0.0"

# Positional as in the original release; the last field of RNNConfig is new.
PrenetConfig = collections.namedtuple(
    "PrenetConfig", ["input_size", "hidden_size", "num_layers", "dropout"]
)
RNNConfig = collections.namedtuple(
    "RNNConfig",
    ["input_size", "hidden_size", "num_layers", "dropout", "residual", "rnn_type"],
    defaults=[False, "gru"],
)


CMVN_KINDS = ("speaker", "utterance", "global", "none")  # what features are normalised over


class UserError(ValueError):
    """An error that the user can mend, told in one line."""


def run(main):
    """Call `main()`; end an error that the user can mend with one line on stderr and status 1."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    status = None
    try:
        main()
    except (UserError, OSError) as error:
        message = str(error).strip() or type(error).__name__
        if "Traceback" in message:  # a data loader's worker hands its error on behind this
            message = message.splitlines()[-1].removeprefix("utils.UserError: ")
        message = " ".join(message.splitlines())
        message = message.encode("utf-8", "backslashreplace").decode()
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    except SystemExit as stop:
        status = stop.code
    if "WORLD_SIZE" in os.environ:
        # One of several processes: tidying up what connects them can hang when another is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    if status:
        sys.exit(status)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows flags' defaults, where they have one."""

    def _get_help_string(self, action):
        has_none = action.default is None or action.const is False  # the latter of --no_...
        return action.help if has_none else super()._get_help_string(action)


def positive(text, least=1):
    """An argparse type: an integer of `least` or more."""
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of {least} or more, found {text!r}")
    return int(text)


def not_negative(text):
    """An argparse type: an integer of 0 or more."""
    return positive(text, least=0)


def num_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def add_residual_flags(parser):
    """--residual and --no_residual, for models that do not tell by themselves."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--residual",
        action="store_true",
        default=None,
        help="the model has residual connections (default: what its config.json or name says)",
    )
    group.add_argument(
        "--no_residual", dest="residual", action="store_false", help="the model has none"
    )


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch (every device)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_device(name):
    """`auto`, `cpu`, `cuda` or `mps` -> torch.device; UserError where there is no such device."""
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = [kind for kind, is_there in available.items() if is_there]
        raise UserError(f"--device {name}: PyTorch sees none here; there is: {', '.join(there)}")
    return torch.device(name)


def start_processes(device_name):
    """-> (rank, world_size, device). torchrun tells a process its place in the environment."""
    import torch
    import torch.distributed as dist

    device = choose_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "mps":
        raise UserError("--device mps: one process at a time; use --device cpu under torchrun")
    backend = "gloo"
    try:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    except (KeyError, ValueError, RuntimeError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"WORLD_SIZE is set, but this process cannot join the others ({why}): start it with "
            "torchrun, a process a GPU, or unset WORLD_SIZE"
        ) from None
    return dist.get_rank(), dist.get_world_size(), device


def follow_main_process():
    """In a worker: leave Ctrl-C to the main process, and end when that is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_jobs(jobs, function, num_workers):
    """Yield (position, function(job)) for (position, job) in order, computed by many processes.

    Few jobs are under way at once, so that memory does not grow with the corpus.
    """
    if num_workers == 1:
        for position, job in jobs:
            yield position, function(job)
        return
    context = multiprocessing.get_context("fork" if os.name == "posix" else None)
    with concurrent.futures.ProcessPoolExecutor(num_workers, context, follow_main_process) as pool:
        waiting = collections.deque()
        try:
            for position, job in jobs:
                waiting.append((position, pool.submit(function, job)))
                if len(waiting) > 4 * num_workers:
                    position, future = waiting.popleft()
                    yield position, future.result()
            for position, future in waiting:
                yield position, future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?)") from None
        finally:
            pool.shutdown(cancel_futures=True)


def loader_context(num_workers, world_size):
    """How a DataLoader starts its workers: None for its default.

    Not by a fork where processes talk to each other: if the thread that does holds Python's lock
    just then, the worker waits for it for ever.
    """
    return "spawn" if num_workers and world_size > 1 else None


def setup_logging(path=None):
    """Log to the console, and to the end of the file `path` if one is given."""
    handlers = [logging.StreamHandler()]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    logging.raiseExceptions = False  # a full disk is told by what the run must write
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s - %(levelname)s - %(message)s",
        handlers=handlers,
        force=True,
    )
