"""What the benchmarks share: the machine's line, clocks, the rate of matrix products, the table.

Importing it puts the repository's root on the path. Nothing heavy is imported before it is needed.
"""

import os
import platform
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def machine(device="cpu", precision="float32"):
    """The line that names the machine."""
    import torch

    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.split(":") for line in file if ":" in line]
        info = {key.strip(): value.strip() for key, value in reversed(lines)}
        family = f"family {info.get('cpu family')} model {info.get('model')}"
        name = f"{info.get('model name', name)} ({family})"
    kind = torch.backends.cpu.get_cpu_capability()
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "none"
    return (
        f"machine: {name}, {kind}{amx}, {cores} cores ({torch.get_num_threads()} threads), "
        f"GPU: {gpu}, torch {torch.__version__}, {precision}"
    )


def table(rows):
    """Print [(stage, against, ratio, absolute)] as markdown."""
    print("\n| stage | against | ratio | absolute |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def synchronize(device):
    import torch

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
    import torch

    best = 0
    for m, k, n in ((2048, 2048, 2048), (4096, 1024, 4096), (8192, 512, 1536)):
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(k, n, device=device, dtype=dtype)
        out = a @ b
        best = max(
            best,
            *(2 * m * k * n / clock(lambda: torch.mm(a, b, out=out), device) for _ in range(5)),
        )
    return best


def gpu_idle(function):
    """The share of a call's time in which no kernel runs on the GPU, by torch.profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        seconds = clock(function, "cuda")
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    busy, done = 0, 0
    for start, end in kernels:  # in microseconds; some run beside each other
        busy += max(0, end - max(start, done))
        done = max(done, end)
    return 1 - busy / 1e6 / seconds


# The model of all benchmarks ----------------------------------------------------------------------

MEL_DIM, HIDDEN, LAYERS = 80, 512, 3


def build_model(device, hidden=HIDDEN, layers=LAYERS):
    import torch

    from apc_model import APCModel
    from utils import RNNConfig

    torch.manual_seed(0)
    return APCModel(MEL_DIM, None, RNNConfig(MEL_DIM, hidden, layers, 0.0, True)).to(device)


def flop_per_frame(training, hidden=HIDDEN, layers=LAYERS):
    """Of the matrix products alone: 2 for each weight; training adds both gradients' products."""
    first = 2 * 3 * hidden * MEL_DIM  # of the first layer's inputs, which need no gradient
    forward = first + 2 * 3 * hidden * hidden * (2 * layers - 1) + 2 * hidden * MEL_DIM
    return 3 * forward - first if training else forward


def bare_step(model, optimizer, inputs, lengths, seq_len, time_shift=1):
    """What a training step cannot do without."""
    import torch

    from apc_model import apc_loss

    n = time_shift
    optimizer.zero_grad()
    predicted_mel, _ = model(inputs[:, :-n], lengths - n)
    bias = model.postnet.layer.bias
    real, padding = apc_loss(predicted_mel, inputs, lengths, n, seq_len, bias)
    ((real + padding) / (len(lengths) * (seq_len - n))).backward()
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
