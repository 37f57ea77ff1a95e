"""The papers' claims on two hours of real speech: train with several n, probe, report.

    pip install -r experiments/requirements.txt  # on Debian, with apt-get install ffmpeg
    python experiments/evidence.py               # about an hour on two quiet cores

After an interruption the same command goes on: what is finished in --work_dir (10 GB) is kept.
Each stage is a script of this repository, printed as it is called: make_corpus.py, align_phones.py,
prepare_data.py, train.py (the untrained model is a run's before its first step),
extract_features.py and phone_probe.py; and fastabx, which needs Python 3.12 and may have an
environment of its own (uv tool install fastabx): ABX is left out where there is no such command.

The classifiers are trained on the English prompts of the training split and tested on held-out
ones, by the same speaker: what features tell of speakers cannot be shown on this speech.
"""

import argparse
import datetime
import hashlib
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import is_finished, read_lengths
from experiments.phone_probe import accuracy, accuracy_table, read_table, table
from utils import HelpFormatter, UserError, atomic_write, positive, read_json, run_main, write_json

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = ROOT / "pretrained" / "apc_3x512_n3.pt"
LAYERS, HIDDEN = 3, 256  # layers of the models; units of the classifier that has a hidden layer
CMVN = {  # folder of prepared data: prepare_data.py's flags
    "speaker": ["--cmvn", "speaker"],
    "speaker_vars": ["--cmvn", "speaker", "--norm_vars"],
    "utterance": ["--cmvn", "utterance"],
}
RUNS = {  # name of a run: n, prepared data
    "n1": (1, "speaker"),
    "n3": (3, "speaker"),
    "n5": (5, "speaker"),
    "n10": (10, "speaker"),
    "vars_n3": (3, "speaker_vars"),
    "utterance_n3": (3, "utterance"),  # the beginning of pretrained/
}
PUBLISHED = {1: 0.66, 2: 0.93, 3: 1.16, 5: 1.50, 10: 2.04, 20: 2.46}  # the original's, README.md


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=positive, default=2, help="of each run, 152 steps of 16 utterances each")
    add("--work_dir", default="./logs/evidence", help="for the corpus, models and features")
    default = str(ROOT / "experiments" / "results")
    add("--results_dir", default=default, help="for the report and its picture")
    return parser


# The stages ---------------------------------------------------------------------------------------


def call(stage, *command):
    """Run a command -> its output."""
    command = [str(part) for part in command]
    print(f"\n{stage}: {shlex.join(command)}", flush=True)
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{stage}: {Path(command[0]).name} ended with status {done.returncode}")
    print(done.stdout, end="", flush=True)
    return done.stdout


def run_script(stage, script, *flags):
    return call(stage, sys.executable, ROOT / script, *flags)


def make_data(work, kinds):
    """The corpus, and its log-Mel frames normalised in ways that CMVN names."""
    corpus, data = work / "corpus", work / "data"
    if not (corpus / "texts.txt").exists():
        run_script("corpus", "experiments/make_corpus.py", corpus)
    for kind in kinds:
        for split in ("train", "dev", "test"):
            if not is_finished(data / kind / split):
                flags = ("--librispeech_from_audio", corpus / split, *CMVN[kind])
                flags += ("--save_dir", data / kind / split, "--max_seq_len", 3200)
                run_script("log-Mel", "prepare_data.py", *flags)


def make_probe_data(work, kinds):
    """Labels, the lists of ids, and folders of the labelled utterances of both splits."""
    corpus, data = work / "corpus", work / "data"
    if not (corpus / "labels.txt").exists():
        run_script("alignment", "experiments/align_phones.py", corpus)
    labelled = read_table(corpus / "labels.txt")
    for split in ("train", "test"):
        ids = [name.removesuffix(".pt") for name in read_lengths(data / "speaker" / split)]
        lines = "".join(f"{utt_id}\n" for utt_id in sorted(ids) if utt_id in labelled)
        (work / f"{split}_ids.txt").write_text(lines, encoding="utf-8")
    for kind in kinds:
        if not is_finished(part := data / kind / "english"):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            lengths = {}
            for split in ("train", "test"):
                for name, length in read_lengths(data / kind / split).items():
                    if name.removesuffix(".pt") in labelled:
                        os.link(data / kind / split / name, part / name)
                        lengths[name] = length
            shutil.copy(data / kind / "train" / "prepared.json", part)
            with atomic_write(part / "lengths.pkl") as file:
                pickle.dump(lengths, file)


def model_file(work, run, epoch):
    return work / "runs" / f"{run}.dir" / f"{run}__epoch_{epoch}.model"


def train(work, run, epochs, learning_rate=0.001, name=None, init_checkpoint=None):
    """Train a model for so many epochs, unless that is done. `name` is another than the run's."""
    n, kind = RUNS[run]
    name = name or run
    if model_file(work, name, epochs).exists():
        return
    flags = ("--librispeech_path", work / "data" / kind, "--train_split", "train")
    flags += ("--valid_split", "dev", "--mask_padding", "--rnn_residual", "--time_shift", n)
    flags += ("--learning_rate", learning_rate, "--batch_size", 16, "--epochs", epochs)
    flags += ("--seed", 0, "--experiment_name", name, "--store_path", work / "runs")
    flags += ("--init_checkpoint", init_checkpoint) if init_checkpoint else ()
    run_script(f"training, {name}", "train.py", *flags, "--save_steps", 50, "--resume")


def extract(work, run, epoch, split, layer, model=None):
    """Features of one split by a run's model, unless they are there -> their folder.

    Those of the test split are for fastabx, which takes no float16.
    """
    save_dir = work / "features" / f"{run}_{epoch}" / f"{split}_{layer}"
    if not (save_dir / "finished").exists():
        flags = ("--checkpoint", model or model_file(work, run, epoch), "--resume")
        flags += ("--data_dir", work / "data" / RUNS[run][1] / split, "--save_dir", save_dir)
        flags += ("--layer", layer, "--dtype", "float32" if split == "test" else "float16")
        run_script("features", "extract_features.py", *flags)
        (save_dir / "finished").touch()
    return save_dir


def result_name(work, folder):
    """A folder in the work folder -> a name for what was measured on it."""
    return "_".join(folder.relative_to(work).parts)


def run_probe(work, rows, hidden_size=0):
    """{row: folder} -> phone_probe.py's results."""
    results = {"correct": {}}
    (work / "probes").mkdir(exist_ok=True)
    for name, folder in rows.items():
        path = work / "probes" / f"{result_name(work, folder)}_{hidden_size}.json"
        if not path.exists():
            flags = (folder, "--names", name, "--labels", work / "corpus" / "labels.txt")
            flags += ("--train_ids", work / "train_ids.txt", "--test_ids", work / "test_ids.txt")
            flags += ("--hidden_size", hidden_size, "--json", path)
            run_script("classifiers", "experiments/phone_probe.py", *flags)
        found = read_json(path)
        results["correct"] |= found["correct"]
        results["frames"] = found["frames"]
    return results


def write_items(work):
    """labels.txt -> the test utterances' phones with their neighbours, in fastabx's format."""
    lines = ["#file onset offset #phone prev-phone next-phone speaker\n"]
    labels = read_table(work / "corpus" / "labels.txt")
    for utt_id in read_table(work / "test_ids.txt"):
        frames = labels[utt_id]
        starts = [t for t in range(len(frames)) if t == 0 or frames[t] != frames[t - 1]]
        ends = [*starts[1:], len(frames)]
        phones = ["SIL", *(frames[t] for t in starts), "SIL"]
        for i, (start, end) in enumerate(zip(starts, ends), start=1):
            if phones[i] != "SIL":
                times = f"{start / 100:.2f} {end / 100:.2f}"
                around = f"{phones[i - 1]} {phones[i + 1]}"
                lines.append(f"{utt_id} {times} {phones[i]} {around} en\n")
    (work / "test.item").write_text("".join(lines), encoding="utf-8")


def run_abx(work, rows):
    """{row: {column: folder}} -> the same with ABX error rates in %; None without fastabx."""
    program = shutil.which("fastabx") or shutil.which("fastabx", path=Path(sys.executable).parent)
    if not program:
        return None
    write_items(work)
    results, rates = {}, read_json(work / "abx.json") or {}
    for row, folders in rows.items():
        results[row] = {}
        for column, folder in folders.items():
            name = result_name(work, folder)
            if name not in rates:
                flags = ("--frequency", 100, "--context", "any", "--max-size-group", 10)
                flags += ("--output", "json", "--quiet")
                out = call("ABX", program, work / "test.item", folder, *flags)
                rates[name] = 100 * json.loads(out)["score"]
                write_json(rates, work / "abx.json")
            results[row][column] = rates[name]
    return results


# The report ---------------------------------------------------------------------------------------

REPORT = """# Evidence on real speech

Written by `python experiments/evidence.py`, not to be edited.

- {date}, {machine}, seed 0
- minutes of speech (prompts): {speech}
- classifiers: trained on {probed} English prompts of "train", tested on {tested} of "test",
  {test_frames} frames, {silence:.1f} % of them silence
- models: 3 GRU layers of 512, residual; {epochs} epochs, {steps} steps of 16 utterances, Adam,
  learning rate 0.001, loss over real frames; mean normalised over the speaker

Accuracies are means of three seeds of the classifier, which differ by at most {seeds:.1f} points.
In brackets are bootstrap intervals of 95 % over the test prompts. Most of their width is shared by
all rows, since some prompts are harder than others; differences are of the same prompts. There is
one model for each n, and the intervals say nothing of other training runs.

## Frame accuracy of a linear classifier

{linear}
APC, n = 3, last layer, against other rows: {differences}.

![accuracy by layer, a curve for each n](accuracy.png)

## Frame accuracy of a classifier with a hidden layer of 256 ReLUs

{hidden}
## Normalisation (n = 3, linear classifier)

{normalisation}
Against APC, n = 3, on the speaker's mean, last layers: {normalisation_differences}.

## ABX error rate

Within the speaker, any context, the test prompts' phones, angular distance, at most 10 examples of
a phone.

{abx}
## Validation loss

L1 per real frame (nats), mean normalised over the speaker, beside the original's after 100 epochs
of 360 hours of other speech.

{losses}"""


def validation_losses(work, run):
    """metrics.jsonl of a run -> [validation loss per real frame after each epoch]."""
    key = "validation_loss_per_real_frame"
    with open(work / "runs" / f"{run}.dir" / "metrics.jsonl", encoding="utf-8") as file:
        return [line[key] for line in map(json.loads, file) if key in line]


def difference(name, correct, minus, frames):
    """Of two classifiers' accuracies, in words."""
    numbers = accuracy(correct, frames, minus)
    return "{}: {:+.1f} ({:+.1f} to {:+.1f})".format(name, *numbers)


def machine():
    """Processor, threads, and PyTorch's version."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def plot_accuracy(results, path):
    """Linear accuracy by layer; a line for log-Mel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, layers in results["correct"].items():
        points = [accuracy(correct, results["frames"])[0] for correct in layers.values()]
        if len(points) == 1:
            axes.axhline(points[0], color="black", linestyle="--", label=name)
        else:
            axes.plot(range(1, len(points) + 1), points, marker="o", label=name)
    axes.set(xlabel="layer", ylabel="frame accuracy, %", xticks=range(1, LAYERS + 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def report(args, work, linear, hidden, normalisation, abx):
    """Write results.md and its picture to --results_dir."""
    out = Path(args.results_dir)
    out.mkdir(parents=True, exist_ok=True)
    plot_accuracy(linear, out / "accuracy.png")
    lengths = {s: read_lengths(work / "data" / "speaker" / s) for s in ("train", "dev", "test")}
    labels, test_ids = read_table(work / "corpus" / "labels.txt"), read_table(work / "test_ids.txt")
    tested = [phone for utt_id in test_ids for phone in labels[utt_id]]
    losses = {}
    for n, published in PUBLISHED.items():
        row = losses[f"n = {n}"] = {"original": f"{published:.2f}"}
        if f"n{n}" in RUNS:
            values = validation_losses(work, f"n{n}")[: args.epochs]
            row |= {f"epoch {i}": f"{value:.2f}" for i, value in enumerate(values, start=1)}
    last = {name: list(row.values())[-1] for name, row in linear["correct"].items()}
    base = last["APC, n = 3"]
    others = {name: row["2"] for name, row in normalisation["correct"].items() if len(row) > 1}
    missing = "Not measured: there was no `fastabx` (Python 3.12 and newer).\n"
    abx = {row: {c: f"{x:.1f}" for c, x in rates.items()} for row, rates in (abx or {}).items()}
    text = REPORT.format(
        date=datetime.date.today(),
        machine=machine(),
        speech=", ".join(
            f"{k} {sum(v.values()) / 6000:.1f} ({len(v)})" for k, v in lengths.items()
        ),
        probed=len(read_table(work / "train_ids.txt")),
        tested=len(test_ids),
        test_frames=len(tested),
        silence=100 * tested.count("SIL") / len(tested),
        epochs=args.epochs,
        steps=args.epochs * -(-len(lengths["train"]) // 16),
        seeds=max(
            np.ptp(100 * np.sum(correct, axis=1) / sum(results["frames"]))
            for results in (linear, hidden, normalisation)
            for row in results["correct"].values()
            for correct in row.values()
        ),
        linear=accuracy_table(linear),
        hidden=accuracy_table(hidden),
        normalisation=accuracy_table(normalisation),
        differences="; ".join(
            difference(name, base, last[name], linear["frames"])
            for name in ("log-Mel", "untrained")
        ),
        normalisation_differences="; ".join(
            difference(name, correct, base, linear["frames"]) for name, correct in others.items()
        ),
        abx=table("ABX error rate, %", abx) if abx else missing,
        losses=table("validation loss", losses),
    )
    with atomic_write(out / "results.md") as file:
        file.write(text.encode())
    print(f"\n{text}\n{out / 'results.md'}: written, with its picture")


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:  # what is needed after an hour
        import matplotlib  # noqa: F401
        import pocketsphinx  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: pip install -r experiments/requirements.txt") from None
    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    make_data(work, CMVN)
    make_probe_data(work, CMVN)
    for run in RUNS:
        train(work, run, args.epochs)
    models = {"untrained": ("n1", 0)}
    models |= {
        f"APC, n = {n}": (run, args.epochs) for run, (n, kind) in RUNS.items() if kind == "speaker"
    }
    rows, layers = {"log-Mel": work / "data" / "speaker" / "english"}, {}
    layers["log-Mel"] = {"frames": work / "data" / "speaker" / "test"}
    for name, model in models.items():
        rows[name] = extract(work, *model, "english", "all")
        layers[name] = {f"layer {i + 1}": extract(work, *model, "test", i) for i in range(LAYERS)}
    others = {}
    for title, run in (
        ("speaker's mean and variance", "vars_n3"),
        ("utterance's mean", "utterance_n3"),
    ):
        others[f"log-Mel, {title}"] = work / "data" / RUNS[run][1] / "english"
        others[f"APC, {title}"] = extract(work, run, args.epochs, "english", "all")
    if PRETRAINED.exists():
        digest = hashlib.sha256(PRETRAINED.read_bytes()).hexdigest()[:8]
        folder = extract(work, "utterance_n3", digest, "english", "all", PRETRAINED)
        others["pretrained/, utterance's mean"] = folder
    linear, hidden = run_probe(work, rows), run_probe(work, rows, HIDDEN)
    normalisation = run_probe(work, others)
    report(args, work, linear, hidden, normalisation, run_abx(work, layers))


if __name__ == "__main__":
    run_main(main)
