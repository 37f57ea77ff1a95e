"""The papers' claims on synthetic speech: corpus, training with several n, probes, report.

    python benchmarks/evidence.py                  # about half an hour on two quiet cores
    python benchmarks/evidence.py --minutes 60     # twice the speech

Run again after an interruption, it goes on; what is finished in --work_dir (about 4 GB) stays. Each
stage is a script of this repository, printed as it is called: make_corpus.py, prepare_data.py,
train.py for each n (the control is the first one's model before training), extract_features.py and
the two probes, which learn from a part of the training split and are tested on other speakers.

Here the features' mean and variance are normalised over the corpus, not over each speaker as in the
papers: that takes away most of what tells these synthetic speakers apart. In a trial with it, the
phones' errors stood to each other as they do here, and the speaker probes were at chance.
"""
# ruff: noqa: E402

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import UserError, not_negative, positive, run

HOURS_A_MINUTE = 2 / 30  # of speech, for a minute of the budget: by CPU times, on two cores


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("budget").add_argument
    add("--minutes", type=positive, default=30, help="of all, about: the hours of speech follow")
    add("--epochs", type=positive, default=6, help="of each training")
    add("--probe_frames", type=positive, default=120000, help="that the probes learn from, at most")
    add = parser.add_argument_group("training").add_argument
    add("--time_shifts", type=positive, nargs="+", default=[1, 3, 5, 10], metavar="N", help="n")
    add("--rnn_hidden_size", type=positive, default=256, help="units of each of the 3 GRU layers")
    add("--batch_size", type=positive, default=16, help="utterances of a step")
    add("--learning_rate", type=float, default=0.001, help="Adam's")
    add("--seed", type=not_negative, default=0, help="of the corpus, the weights and the probes")
    add = parser.add_argument_group("output").add_argument
    add("--work_dir", default="./logs/evidence", help="for everything on the way")
    default = str(ROOT / "benchmarks" / "results")
    add("--results_dir", default=default, help="for tables and pictures")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()  # --help must not wait for torch

import datetime
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import time

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
from datasets import read_lengths

PICTURE = "target (above) and predicted log-Mel (epoch-wise)"  # train.py's tag in TensorBoard
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]

# The stages ---------------------------------------------------------------------------------------


def call(args, stage, script, *flags, capture=False):
    """Run a script of the repository, add its seconds to times.json -> its output, if captured."""
    command = [str(ROOT / script), *map(str, flags)]
    print(f"\n{stage}: python {shlex.join([script, *command[1:]])}", flush=True)
    start = time.perf_counter()
    output = subprocess.PIPE if capture else None
    done = subprocess.run([sys.executable, *command], stdout=output, text=True, check=False)
    if done.returncode:
        raise UserError(f"{stage}: {script} ended with status {done.returncode}")
    path = os.path.join(args.work_dir, "times.json")
    times = read_json(path) if os.path.exists(path) else {}
    times[stage] = times.get(stage, 0) + time.perf_counter() - start
    checkpoint.write_json(times, path)
    return done.stdout


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def link_part(folder, part, max_frames):
    """A prepared folder of every k-th utterance of another one, so that max_frames are enough."""
    lengths = read_lengths(folder)
    every = -(-sum(lengths.values()) // max_frames)
    chosen = dict(sorted(lengths.items())[::every])
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    for name in [*chosen, "prepared.json"]:
        os.link(os.path.join(folder, name), os.path.join(part, name))
    with checkpoint.atomic_write(os.path.join(part, "lengths.pkl")) as file:
        pickle.dump(chosen, file)


def make_data(args, work):
    """The corpus, its log-Mel frames, and the part that the probes learn from."""
    corpus, data = work / "corpus", work / "data"
    if not (corpus / "labels.txt").exists():
        shutil.rmtree(corpus, ignore_errors=True)
        hours = args.minutes * HOURS_A_MINUTE
        flags = ("--hours", f"{hours:.3f}", "--seed", args.seed)
        call(args, "corpus", "benchmarks/make_corpus.py", corpus, *flags)
    for split in ("train", "dev", "test"):
        if not (data / split / "lengths.pkl").exists():
            source = ("--librispeech_from_audio", corpus / split, "--cmvn", "global")
            target = ("--save_dir", data / split, "--max_seq_len", 1600, "--resume")
            call(args, "log-Mel", "prepare_data.py", *source, *target)
    if not (data / "probe" / "lengths.pkl").exists():
        link_part(data / "train", data / "probe", args.probe_frames)


def train_and_extract(args, work):
    """A model for each n, and features of all layers -> {name in the tables: folder}."""
    names = {}
    for n in args.time_shifts:
        run_dir = work / "runs" / f"n{n}.dir"
        last = run_dir / f"n{n}__epoch_{args.epochs}.model"
        if not last.exists():
            data = ("--librispeech_path", work / "data", "--train_split", "train")
            data += ("--valid_split", "dev", "--mask_padding")
            size = ("--rnn_hidden_size", args.rnn_hidden_size, "--rnn_residual")
            steps = ("--epochs", args.epochs, "--batch_size", args.batch_size)
            steps += ("--learning_rate", args.learning_rate, "--seed", args.seed)
            output = ("--store_path", work / "runs", "--experiment_name", f"n{n}", "--resume")
            shift = ("--time_shift", n)
            call(args, f"training, n = {n}", "train.py", *data, *size, *shift, *steps, *output)
        if not names:
            names["untrained"] = run_dir / f"n{n}__epoch_0.model"
        names[f"APC, n = {n}"] = last
    folders = {}
    for name, model in names.items():
        folders[name] = work / "features" / model.stem
        for split in ("probe", "test"):
            if not (folders[name] / split / "finished").exists():
                flags = ("--checkpoint", model, "--data_dir", work / "data" / split)
                flags += ("--save_dir", folders[name] / split, "--resume")
                flags += ("--layer", "all", "--dtype", "float16")
                call(args, "features", "extract_features.py", *flags)
                (folders[name] / split / "finished").touch()
    return {"log-Mel": work / "data"} | folders


def run_probes(args, work, folders):
    """-> {"linear", "mlp", "speaker": (table in Markdown, figures)}, each kept in a file."""
    probe, test = ([folder / part for folder in folders.values()] for part in ("probe", "test"))
    phone = ["benchmarks/phone_probe.py", "--labels", work / "corpus" / "labels.txt"]
    phone += ["--train_features", *probe, "--test_features", *test]
    speaker = ["benchmarks/speaker_probe.py", "--features", *test]
    probes = {"linear": phone, "mlp": [*phone, "--mlp"], "speaker": speaker}
    found = {}
    for kind, command in probes.items():
        table, figures = work / f"{kind}.md", work / f"{kind}.json"
        if not table.exists():
            flags = ("--names", *folders, "--seed", args.seed, "--json", figures)
            text = call(args, f"{kind} probe", *command, *flags, capture=True)
            with checkpoint.atomic_write(table) as file:
                file.write(text.encode())
        found[kind] = table.read_text(encoding="utf-8"), read_json(figures)
    return found


# The report ---------------------------------------------------------------------------------------


def validation_losses(work, n):
    """metrics.jsonl of a run -> [validation loss per real frame after each epoch]."""
    with open(work / "runs" / f"n{n}.dir" / "metrics.jsonl", encoding="utf-8") as file:
        lines = map(json.loads, file)
        key = "validation_loss_per_real_frame"
        return [line[key] for line in lines if key in line]


def loss_plot(losses):
    """{n: losses after epochs 1, 2, ...} -> an SVG of a curve for each n."""
    width, height, left, right, top, bottom = 560, 320, 56, 70, 16, 44
    epochs = max(map(len, losses.values()))
    low, high = (f(map(f, losses.values())) for f in (min, max))
    step = 0.02 if high - low < 0.15 else 0.05 if high - low < 0.4 else 0.1
    low, high = step * int(low / step), step * (int(high / step) + 1)

    def x(epoch):
        return left + (width - left - right) * (epoch - 1) / max(1, epochs - 1)

    def y(loss):
        return top + (height - top - bottom) * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i in range(round((high - low) / step) + 1):
        at = y(low + i * step)
        line = f"M{left} {at:.1f}H{width - right}"
        parts.append(f'<path d="{line}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{low + i * step:.2f}</text>'
        )
    for epoch in range(1, epochs + 1, -(-epochs // 12)):
        at = f'x="{x(epoch):.1f}" y="{height - bottom + 18}"'
        parts.append(f'<text {at} text-anchor="middle">{epoch}</text>')
    for (n, values), colour in zip(losses.items(), COLOURS * len(losses)):
        points = [f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values, start=1)]
        style = f'fill="none" stroke="{colour}" stroke-width="2"'
        parts.append(f'<polyline points="{" ".join(points)}" {style}/>')
        end = f'x="{x(len(values)) + 8:.1f}" y="{y(values[-1]) + 4:.1f}"'
        parts.append(f'<text {end} fill="{colour}">n = {n}</text>')
    across, down = (width - right + left) / 2, (height - bottom + top) / 2
    parts += [
        f'<text x="{across}" y="{height - 8}" text-anchor="middle">epoch</text>',
        f'<text transform="translate(14 {down}) rotate(-90)" text-anchor="middle">'
        "validation loss per real frame</text>",
        "</svg>\n",
    ]
    return "\n".join(parts)


def claims(figures, time_shifts):
    """The papers' claims against {"linear", "speaker": {row: {layer: figures}}} -> lines."""
    phones, speakers = figures["linear"], figures["speaker"]
    rows = [f"APC, n = {n}" for n in time_shifts]

    def best(names):
        return min((phones[name][layer], name, layer) for name in names for layer in phones[name])

    (trained, trained_se), name, layer = best(rows)
    lines = []
    for other in ("log-Mel", "untrained"):
        (error, se), _, other_layer = best([other])
        where = "" if other == "log-Mel" else f", {other_layer}"
        margin = 2 * (se**2 + trained_se**2) ** 0.5
        verdict = "shows" if error - trained > margin else "does not show"
        lines.append(
            f"- A linear classifier tells phones better from APC features ({name}, {layer}: "
            f"{trained:.1f} % of the frames wrong) than from {other} ({error:.1f} %{where}): "
            f"**{verdict}**."
        )
    layers = list(phones[rows[0]])
    upper = [row for row in rows if phones[row][layers[-1]][0] < phones[row][layers[0]][0]]
    lower = [row for row in rows if speakers[row][layers[0]][2] < speakers[row][layers[-1]][2]]
    lines.append(
        "- The highest layer carries more of the phone than the lowest, by any margin: "
        f"**{len(upper)} of {len(rows)} models**."
    )
    lines.append(
        "- The lowest layer carries more of the speaker (equal-error rate) than the highest, by "
        f"any margin: **{len(lower)} of {len(rows)} models**."
    )
    by_n = {n: best([row])[0][0] for n, row in zip(time_shifts, rows)}
    lines.append(
        "- How far ahead the model predicts matters: "
        + ", ".join(f"n = {n}: {error:.1f} %" for n, error in by_n.items())
        + f" (each model's best layer). **n = {min(by_n, key=by_n.get)} is best, "
        f"n = {max(by_n, key=by_n.get)} worst**."
    )
    return lines


def machine():
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"model name\s*: (.*)", file.read())
        name = found[1] if found else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def report(args, work, probes):
    """Write results.md, validation_loss.svg and predicted.png to --results_dir."""
    out = Path(args.results_dir)
    out.mkdir(parents=True, exist_ok=True)
    losses = {n: validation_losses(work, n) for n in args.time_shifts}
    with checkpoint.atomic_write(out / "validation_loss.svg") as file:
        file.write(loss_plot(losses).encode())
    shown = 3 if 3 in losses else args.time_shifts[0]
    events = EventAccumulator(
        str(work / "runs" / f"n{shown}.dir" / f"n{shown}.tb_log"), size_guidance={"images": 0}
    ).Reload()
    with checkpoint.atomic_write(out / "predicted.png") as file:
        file.write(events.Images(PICTURE)[-1].encoded_image_string)

    times = read_json(work / "times.json")
    stages = ", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in times.items())
    lengths = {
        split: list(read_lengths(work / "data" / split).values())
        for split in ("train", "dev", "test", "probe")
    }
    speech = [f"{k} {sum(v) / 360000:.2f} h ({len(v)} utterances)" for k, v in lengths.items()]
    steps = args.epochs * -(-len(lengths["train"]) // args.batch_size)
    text = f"""# Evidence on synthetic speech

Written by `{shlex.join(["python", "benchmarks/evidence.py", *sys.argv[1:]])}`, not to be edited.

- {datetime.date.today()}, {machine()}, seed {args.seed}
- speech: {", ".join(speech)}; the probes learn from "probe", a part of "train", and are tested on
  "test", other speakers
- models: 3 GRU layers of {args.rnn_hidden_size}, residual; {args.epochs} epochs or {steps} steps of
  {args.batch_size} utterances, Adam with rate {args.learning_rate:g}, loss over real frames
- {sum(times.values()) / 60:.1f} minutes: {stages}

± is one standard error over the test's utterances. It stems from what all rows share, some being
noisier than others, and says nothing of another seed: there is one model for each n.

## Phones by a linear classifier

{probes["linear"][0]}
## Phones by a classifier with a hidden layer of 512 ReLUs

{probes["mlp"][0]}
## Speakers by an utterance's mean

{probes["speaker"][0]}
## What shows of the papers' claims

{chr(10).join(claims({kind: figures for kind, (_, figures) in probes.items()}, args.time_shifts))}

## Validation loss

L1 per real frame, of features of variance 1. The farther ahead, the harder.

| n | {" | ".join(f"epoch {i + 1}" for i in range(args.epochs))} |
|---|{"---|" * args.epochs}
"""
    for n, values in losses.items():
        text += f"| {n} | {' | '.join(f'{value:.4f}' for value in values)} |\n"
    text += f"""
![validation loss by epoch, a curve for each n](validation_loss.svg)

Log-Mel frames of a validation utterance, and what the model predicts {shown} frames ahead:

![target and predicted log-Mel](predicted.png)
"""
    with checkpoint.atomic_write(out / "results.md") as file:
        file.write(text.encode())
    print(f"\n{text}\n{out}: results.md, validation_loss.svg, predicted.png")


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if len(set(args.time_shifts)) < len(args.time_shifts):
        parser.error("--time_shifts: one is there twice")
    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if not key.endswith("_dir")}
    if (work / "settings.json").exists():
        for key, value in read_json(work / "settings.json").items():
            if settings[key] != value:
                raise UserError(
                    f"{work}: --{key} was {value} when this was begun, and is {settings[key]} now: "
                    "choose another --work_dir"
                )
    checkpoint.write_json(settings, work / "settings.json")
    print(
        f"{work}: {args.minutes * HOURS_A_MINUTE:.2f} h of speech, {args.epochs} epochs for each n "
        f"of {args.time_shifts}, about {args.minutes} minutes on two quiet cores; {machine()}"
    )
    make_data(args, work)
    folders = train_and_extract(args, work)
    report(args, work, run_probes(args, work, folders))


if __name__ == "__main__":
    run(main)
