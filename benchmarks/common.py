"""What the benchmarks share: the machine's line, clocks, the rate of matrix products, the table.

Importing it puts the repository's root on the path.
"""

import contextlib
import os
import pickle
import platform
import re
import subprocess
import sys
import time
from functools import partial

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from apc_model import APCModel, apc_loss
from utils import RNNConfig, num_cores, set_numerics


def start(device="cpu", precision="float32"):
    """Print a line that names the machine, and the head of the table."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            info = dict(re.findall(r"^([^:\t]+?)\s*: (.*)$", file.read(), re.MULTILINE))
        name = info.get("model name", name)
        name += f" (family {info.get('cpu family')}, model {info.get('model')})"
    kind = torch.backends.cpu.get_cpu_capability()
    amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    set_numerics()
    gpu = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "none"
    print(
        f"machine: {name}, {kind}{amx}, {num_cores()} cores, {torch.get_num_threads()} threads, "
        f"GPU: {gpu}, torch {torch.__version__}, {precision}\n\n"
        "| stage | against | ratio | absolute |\n|---|---|---|---|",
        flush=True,
    )


def row(stage, against, ratio, absolute):
    print(f"| {stage} | {against} | {ratio} | {absolute} |", flush=True)


@contextlib.contextmanager
def quiet():
    """Drop what the scripts print while they run in this process: the table is enough."""
    with (
        open(os.devnull, "w", encoding="utf-8") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        yield


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def clock(function, device="cpu"):
    """Seconds that one call takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def matmul_rate(device="cpu", dtype=None):
    """FLOP/s of large matrix products on the device: the best of three sizes, five times each."""
    best = 0
    for m, k, n in ((2048, 2048, 2048), (4096, 1024, 4096), (8192, 512, 1536)):
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(k, n, device=device, dtype=dtype)
        out = a @ b
        product = partial(torch.mm, a, b, out=out)
        best = max(best, *(2 * m * k * n / clock(product, device) for _ in range(5)))
    return best


def gpu_idle(function):
    """The share of a call's time in which no kernel runs on the GPU, by torch.profiler."""
    function()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        seconds = clock(function, "cuda")
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    busy, done = 0, 0
    for start, end in kernels:  # in microseconds; some run at the same time
        busy += max(0, end - max(start, done))
        done = max(done, end)
    return 1 - busy / 1e6 / seconds


# Data and model of the benchmarks -----------------------------------------------------------------

MEL_DIM, HIDDEN, LAYERS = 80, 512, 3


def make_folder(path, lengths, max_seq_len, num_files=64):
    """A prepared folder of len(lengths) utterances: links to a few files of noise."""
    os.makedirs(path)
    files = [os.path.join(path, f"{number}.noise") for number in range(num_files)]
    for file in files:
        torch.save(torch.randn(max_seq_len, MEL_DIM), file)
    table = {f"{number:07d}.pt": int(length) for number, length in enumerate(lengths)}
    for number, name in enumerate(table):
        os.link(files[number % num_files], os.path.join(path, name))
    with open(os.path.join(path, "lengths.pkl"), "wb") as file:
        pickle.dump(table, file, protocol=4)


def librispeech_lengths(count):
    """Frames of utterances, spread about as those of LibriSpeech's train-clean-360."""
    random = np.random.default_rng(0)
    short, usual = random.uniform(150, 1150, count), random.normal(1430, 110, count)
    return np.where(random.random(count) < 0.3, short, usual).clip(150, 2400).astype(int)


def build_model(device, rnn_type="gru"):
    torch.manual_seed(0)
    is_transformer = rnn_type == "transformer"
    layers = 4 if is_transformer else LAYERS
    config = RNNConfig(MEL_DIM, HIDDEN, layers, 0.0, not is_transformer, rnn_type)
    return APCModel(MEL_DIM, None, config).to(device)


def flop_per_frame(model, training, num_frames=0):
    """FLOP of the matrix multiplications per frame: 2 per weight, and of the attention to half of
    `num_frames` on average; training adds both gradients' (the inputs need none)."""
    matrices = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    first = 2 * next(iter(matrices.values())).numel()
    forward = 2 * sum(weight.numel() for weight in matrices.values())
    if model.rnn_type == "transformer":
        forward += model.num_layers * 2 * 2 * model.hidden_size * num_frames / 2
    return 3 * forward - first if training else forward


def bare_step(model, optimizer, inputs, lengths, seq_len, time_shift=1):
    """What a training step cannot do without."""
    n = time_shift
    optimizer.zero_grad()
    predicted_mel, _ = model(inputs[:, :-n], lengths - n, need_reps=False)
    sums = apc_loss(predicted_mel, inputs, lengths, n, seq_len, model.postnet.layer.bias)
    sums.means(n, seq_len).with_padding.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# Other processes ----------------------------------------------------------------------------------


def run_script(*command):
    """Run a Python script in a process of its own -> (seconds, peak memory in bytes, its output).

    The memory is the sum over the process and its children (pages that they share count in each),
    looked up in /proc every 10 ms; 0 where there is no /proc.
    """
    command = [sys.executable, *map(str, command)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, session_memory(process.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: status {process.returncode}\n{errors}")
    return seconds, peak, output


def session_memory(session):
    """Bytes of memory of all processes of a session."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rsplit(")", 1)[1].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total
