"""Training on a CPU: OpenMP's threads against one torchrun process per core, quiet and busy.

    python benchmarks/busy.py

Runs of train.py (3 GRU layers of 512, 32 utterances of 200 frames), quiet and next to one Python
process that does nothing but count. Each figure is the median speed in metrics.jsonl of --steps
steps after the first. Needs an otherwise quiet machine, and is for CPUs only.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile

import common

UTTERANCES, FRAMES = 32, 200


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=6, help="steps of each kind, after a first")
    return parser


@contextlib.contextmanager
def busy_processes(count):
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train(folder, name, num_processes, steps):
    """Run train.py in so many processes -> frames per second."""
    launcher, threads = [], common.num_cores() // num_processes
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher.append(f"--nproc_per_node={num_processes}")
    flags = ["--librispeech_path", folder, "--train_split", "data", "--valid_split", "valid"]
    flags += ["--rnn_residual", "--device", "cpu", "--load_data_workers", "0"]
    flags += ["--store_path", folder, "--experiment_name", name, "--max_steps", str(steps + 1)]
    command = [sys.executable, *launcher, os.path.join(common.ROOT, "train.py"), *flags]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=env, stderr=subprocess.PIPE)
    with open(os.path.join(folder, f"{name}.dir", "metrics.jsonl"), encoding="utf-8") as file:
        steps = [line for line in map(json.loads, file) if "frames_per_second" in line]
    return statistics.median(line["frames_per_second"] for line in steps[1:])


def main():
    args = build_parser().parse_args()
    common.start()
    quiet = None
    with tempfile.TemporaryDirectory() as folder:
        size = UTTERANCES * (args.steps + 1)
        common.make_folder(os.path.join(folder, "data"), [FRAMES] * size, max_seq_len=FRAMES)
        common.make_folder(os.path.join(folder, "valid"), [FRAMES], max_seq_len=FRAMES)
        cores = common.num_cores()
        for way, num_processes in (("OpenMP", 1), (f"torchrun, {cores} processes", cores)):
            for count, neighbour in enumerate(("quiet", "next to a busy process")):
                with busy_processes(count):
                    speed = train(folder, f"{num_processes}_{count}", num_processes, args.steps)
                quiet = quiet or speed
                ratio, absolute = f"{speed / quiet:.2f}", f"{speed:.0f} frames/s"
                common.row(
                    f"step of train.py, {way}, {neighbour}", "OpenMP, quiet", ratio, absolute
                )


if __name__ == "__main__":
    main()
