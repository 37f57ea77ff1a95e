"""One training step against the packed textbook step, the machine's matrix products, bfloat16.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --full      # the textbook step at 800 frames too: two minutes

A step is forward, loss, backward, clipping and Adam: batch 32, 3 GRU layers of 512 with residual
connections, 80 bins. Times are the best of --rounds rounds, each of which takes every length (and
the matrix products) in turn.
"""

import argparse

import common


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--frames", type=int, nargs="+", default=[200, 400, 800, 1600], help="T, of the batches")
    add("--batch_size", type=int, default=32, help="utterances of a step")
    add("--rounds", type=int, default=3, help="rounds, of which the best counts")
    add("--full", action="store_true", help="the textbook step at 800 frames, not just up to 400")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()

import resource

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from utils import choose_device


def packed_step(model, optimizer, inputs, lengths):
    """The same step as the release of 2019 did it: every layer on packed sequences."""
    targets, lengths = inputs[:, 1:], (lengths - 1).cpu()
    optimizer.zero_grad()
    packed = pack_padded_sequence(inputs[:, :-1], lengths, batch_first=True)
    reps = []
    for rnn in model.rnns:
        outputs, _ = rnn(packed)
        if packed.data.size(-1) == outputs.data.size(-1):
            outputs = PackedSequence(outputs.data + packed.data, outputs.batch_sizes)
        reps.append(pad_packed_sequence(outputs, batch_first=True, total_length=lengths.max())[0])
        packed = pack_padded_sequence(reps[-1], lengths, batch_first=True)
    torch.stack(reps)
    torch.nn.functional.l1_loss(model.postnet(reps[-1]), targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main():
    args = build_parser().parse_args()
    device = choose_device(args.device)
    print(common.machine(device))
    model = common.build_model(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def batch(num_frames):
        lengths = torch.full((args.batch_size,), num_frames, device=device)
        return torch.randn(args.batch_size, num_frames, common.MEL_DIM, device=device), lengths

    def step(num_frames, autocast=False, function=common.bare_step):
        inputs, lengths = batch(num_frames)
        seq_len = (num_frames,) if function is common.bare_step else ()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return common.clock(
                lambda: function(model, optimizer, inputs, lengths, *seq_len), device
            )

    # First of all, on fresh memory.
    first, faults = [], [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(6):
        first.append(step(400))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    later = min(first[3:])

    seconds, half = {T: [] for T in args.frames}, []
    rate, half_rate = 0, 0
    for _ in range(args.rounds):
        rate = max(rate, common.matmul_rate(device))
        half_rate = max(half_rate, common.matmul_rate(device, torch.bfloat16))
        for T in args.frames:
            seconds[T].append(step(T))
        half += [step(400, autocast=True) for _ in range(1 + (not half))]  # the first one warms up
        seconds.setdefault(400, []).append(step(400))
    best = {T: min(times) for T, times in sorted(seconds.items())}
    packed_frames = [T for T in best if T <= (800 if args.full else 400)]
    packed = {T: step(T, function=packed_step) for T in packed_frames}

    rows = []
    for T in packed:
        absolute = f"{best[T]:.3f} s, packed {packed[T]:.2f} s"
        rows.append(
            (f"step, T = {T}", "packed textbook step", f"{packed[T] / best[T]:.1f}×", absolute)
        )
    for T, time in best.items():
        speed = args.batch_size * T / time
        share = speed * common.flop_per_frame(training=True) / rate
        absolute = f"{speed:.0f} frames/s of {rate / 1e9:.0f} GFLOP/s"
        rows.append((f"step, T = {T}", "float32 matrix products", f"{share:.2f}", absolute))
    for T in best:
        if 2 * T in best:
            absolute = f"{best[2 * T]:.3f} s"
            rows.append(
                (f"step, T = {2 * T}", f"T = {T}", f"{best[2 * T] / best[T]:.2f}×", absolute)
            )
    absolute = f"{min(half):.3f} s, products {half_rate / rate:.1f}× as fast"
    rows.append(("step in bfloat16, T = 400", "float32", f"{best[400] / min(half):.2f}×", absolute))
    for i in range(2):
        absolute = f"{first[i]:.2f} s, {faults[i + 1] - faults[i]} page faults"
        rows.append(
            (f"step {i + 1} of a process", "steps 4 to 6", f"{first[i] / later:.2f}×", absolute)
        )
    if device.type == "cuda":
        idle = common.gpu_idle(lambda: step(800))
        rows.append(("GPU idle, T = 800", "the step's time", f"{idle:.2f}", "by torch.profiler"))
    common.table(rows)


if __name__ == "__main__":
    main()
