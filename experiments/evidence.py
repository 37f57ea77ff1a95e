"""The papers' claims on synthetic speech: make a corpus, train with several n, probe, report.

    python experiments/evidence.py                  # about half an hour on two quiet cores
    python experiments/evidence.py --minutes 60     # twice the speech

After an interruption the same command goes on: what is finished in --work_dir (about 4 GB) is kept.
Each stage is a script of this repository, printed as it is called: make_corpus.py, prepare_data.py,
train.py for each n (the untrained model is the first one's before its first step),
extract_features.py, and the two probes, trained on a part of the training split and tested on other
speakers.

Features are normalised over the corpus, not over each speaker as in the papers, because that
removes most of what tells these synthetic speakers apart. Tried once, it left the phone error rates
in the same order, and the speaker probes at chance.
"""

import argparse
import datetime
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import LibriSpeech, is_finished, read_lengths
from experiments import speaker_probe
from experiments.phone_probe import table
from load_pretrained import load_pretrained
from utils import (
    HelpFormatter,
    UserError,
    atomic_write,
    not_negative,
    positive,
    read_json,
    run_main,
    write_json,
)

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    sys.exit("evidence.py: error: needs matplotlib: pip install -r requirements-dev.txt")

ROOT = Path(__file__).resolve().parent.parent
HOURS_A_MINUTE = 2 / 30  # of speech for a minute of the budget, on two cores


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument_group("budget").add_argument
    add("--minutes", type=positive, default=30, help="for everything; sets the hours of speech")
    add("--epochs", type=positive, default=6, help="of each training run")
    add("--probe_frames", type=positive, default=120000, help="at most, to train the probes on")
    add = parser.add_argument_group("training").add_argument
    add("--time_shifts", type=positive, nargs="+", default=[1, 3, 5, 10], metavar="N", help="n")
    add("--rnn_hidden_size", type=positive, default=256, help="units of each of the 3 GRU layers")
    add("--batch_size", type=positive, default=16, help="utterances of a step")
    add("--learning_rate", type=float, default=0.001, help="Adam's")
    add("--seed", type=not_negative, default=0, help="of the corpus, the weights and the probes")
    add = parser.add_argument_group("output").add_argument
    add("--work_dir", default="./logs/evidence", help="for the corpus, models and features")
    default = str(ROOT / "experiments" / "results")
    add("--results_dir", default=default, help="for the report and its pictures")
    return parser


# The stages ---------------------------------------------------------------------------------------


def call(work, stage, script, *flags):
    """Run a script of the repository, and add the seconds it took to times.json."""
    command = [str(ROOT / script), *map(str, flags)]
    print(f"\n{stage}: python {shlex.join([script, *command[1:]])}", flush=True)
    start = time.perf_counter()
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status:
        raise UserError(f"{stage}: {script} ended with status {status}")
    times = read_json(work / "times.json") or {}
    times[stage] = times.get(stage, 0) + time.perf_counter() - start
    write_json(times, work / "times.json")


def link_part(folder, part, max_frames):
    """Make a prepared folder of every k-th utterance of another one, of about max_frames."""
    lengths = read_lengths(folder)
    every = -(-sum(lengths.values()) // max_frames)
    chosen = dict(sorted(lengths.items())[::every])
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    for name in [*chosen, "prepared.json"]:
        os.link(os.path.join(folder, name), os.path.join(part, name))
    with atomic_write(os.path.join(part, "lengths.pkl")) as file:
        pickle.dump(chosen, file)


def make_data(args, work):
    """The corpus, its log-Mel frames, and the part that the probes are trained on."""
    corpus, data = work / "corpus", work / "data"
    if not (corpus / "labels.txt").exists():
        shutil.rmtree(corpus, ignore_errors=True)
        hours = f"{args.minutes * HOURS_A_MINUTE:.3f}"
        flags = (corpus, "--hours", hours, "--seed", args.seed)
        call(work, "corpus", "experiments/make_corpus.py", *flags)
    for split in ("train", "dev", "test"):
        if not is_finished(data / split):
            flags = ("--librispeech_from_audio", corpus / split, "--cmvn", "global", "--norm_vars")
            flags += ("--save_dir", data / split, "--max_seq_len", 1600)
            call(work, "log-Mel", "prepare_data.py", *flags)
    if not is_finished(data / "probe"):
        link_part(data / "train", data / "probe", args.probe_frames)


def model_file(work, n, epoch):
    return work / "runs" / f"n{n}.dir" / f"n{n}__epoch_{epoch}.model"


def train(args, work):
    """Train a model for each n -> {name in the tables: model file}."""
    flags = ("--librispeech_path", work / "data", "--train_split", "train", "--valid_split", "dev")
    flags += ("--mask_padding", "--rnn_residual", "--rnn_hidden_size", args.rnn_hidden_size)
    flags += ("--epochs", args.epochs, "--batch_size", args.batch_size, "--seed", args.seed)
    flags += ("--learning_rate", args.learning_rate, "--store_path", work / "runs", "--resume")
    models = {"untrained": model_file(work, args.time_shifts[0], 0)}
    for n in args.time_shifts:
        models[f"APC, n = {n}"] = model_file(work, n, args.epochs)
        if not model_file(work, n, args.epochs).exists():
            own = ("--time_shift", n, "--experiment_name", f"n{n}")
            call(work, f"training, n = {n}", "train.py", *flags, *own)
    return models


def extract(work, models):
    """Features of all layers -> {name in the tables: folder}."""
    folders = {"log-Mel": work / "data"}
    for name, model in models.items():
        folders[name] = work / "features" / model.stem
        for split in ("probe", "test"):
            save_dir = folders[name] / split
            if not (save_dir / "finished").exists():
                flags = ("--checkpoint", model, "--data_dir", work / "data" / split)
                flags += ("--save_dir", save_dir, "--layer", "all", "--dtype", "float16")
                call(work, "features", "extract_features.py", *flags, "--resume")
                (save_dir / "finished").touch()
    return folders


def run_probes(args, work, folders):
    """-> {"linear", "mlp", "speaker": {name: {layer: error rates}}}."""
    train, test = ([folder / split for folder in folders.values()] for split in ("probe", "test"))
    phone = ("experiments/phone_probe.py", "--labels", work / "corpus" / "labels.txt")
    phone += ("--train_features", *train, "--test_features", *test)
    speaker = ("experiments/speaker_probe.py", "--features", *test)
    errors = {}
    for name, command in {"linear": phone, "mlp": (*phone, "--mlp"), "speaker": speaker}.items():
        path = work / f"{name}.json"
        if not path.exists():
            flags = ("--names", *folders, "--seed", args.seed, "--json", path)
            call(work, f"{name} probe", *command, *flags)
        errors[name] = read_json(path)
    return errors


# The pictures -------------------------------------------------------------------------------------


def plot_losses(losses):
    """{n: validation losses after epochs 1, 2, ...} -> a curve for each n."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for n, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, marker=".", label=f"n = {n}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation loss: L1 per real frame\n(standard deviations of the features)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_prediction(target, predicted, n, utt_id):
    """Target and predicted log-Mel spectrograms (T, D), one above the other on one scale."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    rows = figure.subplots(2, sharex=True)
    low, high = target.quantile(0.01).item(), target.quantile(0.99).item()
    titles = (f"utterance {utt_id}", f"predicted {n} frames ({10 * n} ms) ahead")
    for axes, frames, title in zip(rows, (target, predicted), titles):
        extent = (n / 100, (n + len(frames)) / 100, -0.5, frames.size(1) - 0.5)
        where = {"extent": extent, "origin": "lower", "aspect": "auto"}
        image = axes.imshow(frames.T.numpy(), **where, vmin=low, vmax=high, cmap="magma")
        axes.set(title=title, ylabel="mel channel")
    rows[1].set_xlabel("time (s)")
    label = "log energy (standard deviations from the mean)"
    figure.colorbar(image, ax=rows, label=label, extend="both")  # one scale for both
    return figure


def save_figure(figure, path):
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def predict_utterance(args, work, n):
    """plot_prediction() of the first validation utterance, by the model that predicts n ahead."""
    data = LibriSpeech(work / "data" / "dev", time_shift=n)
    frames, length = data[0]
    frames = frames[: min(length, 400 + n)]
    model = load_pretrained(model_file(work, n, args.epochs))
    with torch.inference_mode():
        predicted, _ = model(frames[None, :-n], torch.tensor([len(frames) - n]))
    return plot_prediction(frames[n:], predicted[0], n, data.ids[0].removesuffix(".pt"))


# The report ---------------------------------------------------------------------------------------

REPORT = """# Evidence on synthetic speech

Written by `{command}`, not to be edited.

- {date}, {machine}, seed {args.seed}
- hours of speech (utterances): {speech}; the probes are trained on "probe", a part of "train", and
  tested on "test", other speakers
- models: 3 GRU layers of {args.rnn_hidden_size}, residual; {args.epochs} epochs, {steps} steps of
  {args.batch_size} utterances, Adam, learning rate {args.learning_rate:g}, loss over real frames
- {minutes:.1f} minutes: {stages}

± is one standard error over the test utterances. Most of it is common to all rows, because some
utterances are noisier than others, and it says nothing about another seed: there is one model for
each n.

## Phones: a linear classifier

{linear}
## Phones: a classifier with a hidden layer of 512 ReLUs

{mlp}
## Speakers: an utterance's mean

{speaker}
## What shows of the papers' claims

{claims}
## Validation loss

L1 per real frame, of features of variance 1. The farther ahead, the harder.

{losses}
![validation loss against epoch, a curve for each n](validation_loss.png)

Log-Mel frames of a validation utterance, and as predicted {shown} frames ahead:

![target and predicted log-Mel](predicted.png)
"""


def validation_losses(work, n):
    """metrics.jsonl of a run -> [validation loss per real frame after each epoch]."""
    key = "validation_loss_per_real_frame"
    with open(work / "runs" / f"n{n}.dir" / "metrics.jsonl", encoding="utf-8") as file:
        return [line[key] for line in map(json.loads, file) if key in line]


def claims(phones, speakers, time_shifts):
    """The papers' claims against {name: {layer: error rates}} -> a list in Markdown."""
    best = {name: min(row.values()) for name, row in phones.items()}  # of its layers
    rows = {n: f"APC, n = {n}" for n in time_shifts}
    order = sorted(rows, key=lambda n: best[rows[n]])
    rate, se = best[rows[order[0]]]
    lines = []
    for name, others in {"log-Mel": "log-Mel frames", "untrained": "an untrained model's"}.items():
        other_rate, other_se = best[name]
        shows = other_rate - rate > 2 * (se**2 + other_se**2) ** 0.5
        lines.append(
            f"A linear classifier recognises phones better from APC features (n = {order[0]}: "
            f"{rate:.1f} % of the frames wrong) than from {others} ({other_rate:.1f} %): "
            f"**{'shows' if shows else 'does not show'}**."
        )
    low, *_, high = phones[rows[order[0]]]  # layers
    upper = sum(phones[row][high][0] < phones[row][low][0] for row in rows.values())
    lower = sum(speakers[row][low][2] < speakers[row][high][2] for row in rows.values())
    by_n = ", ".join(f"n = {n}: {best[row][0]:.1f} %" for n, row in rows.items())
    lines += [
        "The highest layer carries more of the phone than the lowest, by any margin: "
        f"**{upper} of {len(rows)} models**.",
        "The lowest layer carries more of the speaker (equal error rate) than the highest, by any "
        f"margin: **{lower} of {len(rows)} models**.",
        f"How far ahead the model predicts matters: {by_n} (each model's best layer). "
        f"**n = {order[0]} is best, n = {order[-1]} worst**.",
    ]
    return "".join(f"- {line}\n" for line in lines)


def machine():
    """Processor, threads, GPU and PyTorch's version."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def report(args, work, errors):
    """Write results.md and its pictures to --results_dir."""
    out = Path(args.results_dir)
    out.mkdir(parents=True, exist_ok=True)
    splits = ("train", "dev", "test", "probe")
    lengths = {split: read_lengths(work / "data" / split).values() for split in splits}
    losses = {n: validation_losses(work, n) for n in args.time_shifts}
    by_epoch = {f"{n}": {f"epoch {i}": x for i, x in enumerate(losses[n], start=1)} for n in losses}
    times = read_json(work / "times.json")
    shown = 3 if 3 in losses else args.time_shifts[0]
    save_figure(plot_losses(losses), out / "validation_loss.png")
    save_figure(predict_utterance(args, work, shown), out / "predicted.png")
    text = REPORT.format(
        args=args,
        command=shlex.join(["python", "experiments/evidence.py", *sys.argv[1:]]),
        date=datetime.date.today(),
        machine=machine(),
        speech=", ".join(f"{k} {sum(v) / 360000:.2f} ({len(v)})" for k, v in lengths.items()),
        steps=args.epochs * -(-len(lengths["train"]) // args.batch_size),
        minutes=sum(times.values()) / 60,
        stages=", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in times.items()),
        linear=table("frame error rate, %", errors["linear"]),
        mlp=table("frame error rate, %", errors["mlp"]),
        speaker=speaker_probe.tables(errors["speaker"]),
        claims=claims(errors["linear"], errors["speaker"], args.time_shifts),
        losses=table("n", by_epoch, "{:.4f}"),
        shown=shown,
    )
    with atomic_write(out / "results.md") as file:
        file.write(text.encode())
    print(f"\n{text}\n{out}: results.md, validation_loss.png, predicted.png")


def check_settings(args, work):
    """UserError if --work_dir was begun with other flags."""
    settings = {key: value for key, value in vars(args).items() if not key.endswith("_dir")}
    for key, value in (read_json(work / "settings.json") or {}).items():
        if settings[key] != value:
            raise UserError(
                f"{work}: --{key} was {value} when this was begun, and is {settings[key]} now: "
                "choose another --work_dir"
            )
    write_json(settings, work / "settings.json")


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if len(set(args.time_shifts)) < len(args.time_shifts):
        parser.error("--time_shifts: a value is given twice")
    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    check_settings(args, work)
    print(
        f"{work}: {args.minutes * HOURS_A_MINUTE:.2f} h of speech, {args.epochs} epochs for each n "
        f"of {args.time_shifts}, about {args.minutes} minutes on two quiet cores; {machine()}"
    )
    make_data(args, work)
    folders = extract(work, train(args, work))
    report(args, work, run_probes(args, work, folders))


if __name__ == "__main__":
    run_main(main)
