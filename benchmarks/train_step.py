"""One training step against the packed textbook step, the machine's matrix products, bfloat16.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --full      # the textbook step at 800 frames too: two minutes

A step is forward, loss, backward, clipping and Adam: batch 32, 3 GRU layers of 512 with residual
connections, 80 bins; and 4 Transformer blocks of 512. Times are the best of --rounds rounds, each
of which takes every length (and the matrix products) in turn.
"""

import argparse
from functools import partial

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import common
from utils import choose_device, set_numerics


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--frames", type=int, nargs="+", default=[200, 400, 800, 1600], help="T, of the batches")
    add("--batch_size", type=int, default=32, help="utterances of a step")
    add("--rounds", type=int, default=4, help="rounds, of which the best counts")
    add("--full", action="store_true", help="the textbook step at 800 frames, not just up to 400")
    add("--packed", type=int, metavar="T", help="only print the textbook step's seconds")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return parser


def packed_step(model, optimizer, inputs, lengths, seq_len):
    """The same step as the release of 2019 did it: every layer on packed sequences."""
    targets, lengths = inputs[:, 1:], lengths - 1
    optimizer.zero_grad()
    packed = pack_padded_sequence(inputs[:, :-1], lengths, batch_first=True)
    reps = []
    for rnn in model.rnns:
        outputs, _ = rnn(packed)
        if packed.data.size(-1) == outputs.data.size(-1):
            outputs = PackedSequence(outputs.data + packed.data, outputs.batch_sizes)
        reps.append(pad_packed_sequence(outputs, batch_first=True, total_length=seq_len - 1)[0])
        packed = pack_padded_sequence(reps[-1], lengths, batch_first=True)
    torch.stack(reps)
    torch.nn.functional.l1_loss(model.postnet(reps[-1]), targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main():
    args = build_parser().parse_args()
    device = choose_device(args.device)
    model = common.build_model(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def seconds_of(function, T, dtype=None, model=model, optimizer=optimizer):
        inputs = torch.randn(args.batch_size, T, common.MEL_DIM, device=device)
        lengths = torch.full((args.batch_size,), T)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            step = partial(function, model, optimizer, inputs, lengths, T)
            return common.clock(step, device)

    if args.packed:
        set_numerics()
        print(min(seconds_of(packed_step, args.packed) for _ in range(2)))
        return
    common.start(device)
    transformer = common.build_model(device, "transformer")
    others = {
        "model": transformer,
        "optimizer": torch.optim.Adam(transformer.parameters(), lr=1e-4, fused=True),
    }
    seconds, half = {T: [] for T in sorted({400, *args.frames})}, []
    transformer_seconds = {T: [] for T in seconds}
    rate, half_rate = 0, 0
    # Emulated, a large product in bfloat16 takes a minute.
    has_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    for _ in range(args.rounds):
        rate = max(rate, common.matmul_rate(device))
        if has_bf16:
            half_rate = max(half_rate, common.matmul_rate(device, torch.bfloat16))
        for T in seconds:
            seconds[T].append(seconds_of(common.bare_step, T))
            transformer_seconds[T].append(seconds_of(common.bare_step, T, **others))
        if has_bf16:
            half += [seconds_of(common.bare_step, 400, torch.bfloat16) for _ in range(2)]
    best = {T: min(times) for T, times in seconds.items()}
    for name, net, times in (
        ("step", model, best),
        ("T-APC step", transformer, {T: min(times) for T, times in transformer_seconds.items()}),
    ):
        for T, time in times.items():
            speed = args.batch_size * T / time
            part = speed * common.flop_per_frame(net, training=True, num_frames=T) / rate
            absolute = f"{speed:.0f} frames/s; products {rate / 1e9:.0f} GFLOP/s"
            common.row(f"{name}, T = {T}", "float32 matrix products", f"{part:.2f}", absolute)
    for T, time in best.items():
        if T / 2 in best:
            growth = time / best[T / 2]
            common.row(f"step, T = {T}", f"T = {T // 2}", f"{growth:.2f}", f"{time:.3f} s")
    if has_bf16:
        ratio = best[400] / min(half)
        absolute = f"{min(half):.3f} s; products {half_rate / rate:.1f} times as fast"
        common.row("step, T = 400, float32", "with bfloat16 autocast", f"{ratio:.2f}", absolute)
    if device.type == "cuda":
        idle = common.gpu_idle(partial(seconds_of, common.bare_step, 800))
        common.row("GPU idle, T = 800", "the step's time", f"{idle:.2f}", "by torch.profiler")
    for T, time in best.items():
        if T <= 400 or args.full and T <= 800:
            # In a process of its own: memory that others have left free would spare it its faults.
            flags = ("--packed", T, "--batch_size", args.batch_size, "--device", device.type)
            packed = float(common.run_script(__file__, *flags)[2])
            absolute = f"{packed:.2f} s, {time:.3f} s"
            common.row(f"packed step, T = {T}", "step", f"{packed / time:.1f}", absolute)


if __name__ == "__main__":
    main()
