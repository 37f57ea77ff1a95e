"""What evidence.py and mboshi.py share: stages that call this repository's scripts, and the report.

A stage whose result lies in the work directory is skipped, so that the same command resumes an
interrupted experiment. A work directory holds:

    labels.txt, train_ids.txt, test_ids.txt    what phone_probe.py reads
    data/<normalisation>/{train,dev,probe}/    prepared datasets
    runs/<run>.dir/, features/, probes/        the scripts' outputs
"""

import datetime
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import is_finished, read_lengths
from experiments.phone_probe import accuracy, accuracy_table, read_table, table
from utils import (
    UserError,
    atomic_write,
    new_parser,
    num_cores,
    positive,
    read_json,
    write_json,
    write_lines,
)

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = ROOT / "pretrained" / "apc_3x512_n3.pt"
N3 = ("--rnn_residual", "--time_shift", 3)
COSINE = ("--lr_schedule", "cosine", "--warmup_steps", 50)
TRANSFORMER = ("--rnn_type", "transformer", "--rnn_num_layers", 4, "--rnn_hidden_size", 512)
RUNS = {  # name of a run: its row in the tables, normalisation, train.py's flags
    "n1": ("APC, n = 1", "speaker", ("--rnn_residual", "--time_shift", 1)),
    "n3": ("APC, n = 3", "speaker", N3),
    "n5": ("APC, n = 5", "speaker", ("--rnn_residual", "--time_shift", 5)),
    "n3_cosine": ("APC, n = 3, cosine", "speaker", (*N3, *COSINE)),
    "tapc": ("T-APC, n = 3, cosine", "speaker", (*TRANSFORMER, "--time_shift", 3, *COSINE)),
}
PAIRS = [  # rows whose differences lead the report
    ("APC, n = 3", "randomly initialised"),
    ("T-APC, n = 3, cosine", "randomly initialised T-APC"),
    ("pretrained/", "randomly initialised"),
    ("randomly initialised", "log-Mel"),
    ("APC, n = 3, cosine", "APC, n = 3"),
    ("T-APC, n = 3, cosine", "APC, n = 3, cosine"),
]
REPORT = """# {title}

Written by `{command}`, not to be edited.

- {date}, {machine}, seed 0
- minutes of speech (utterances): {speech}
- probes: trained on {probed} utterances, tested on {tested} others, {frames} frames of which
  {silence:.1f} % are silence
- speakers: {speakers}
- models: 3 residual GRU layers of 512 (APC) and 4 Transformer blocks of 512 (T-APC); {epochs}
  epoch(s) of {steps} steps of 16 utterances, Adam, learning rate 0.001, loss per valid frame;
  cosine: 50 steps of warm-up, then the rate falls to 0

Accuracies are means over three seeds of the probe. In brackets are 95 % bootstrap intervals over
the test utterances, for differences over the same utterances. There is one model per row: the
intervals say nothing about other training runs. Layers are numbered from 0, as by `--layer`.

## What training adds, and what the recurrence adds

Differences of frame accuracy (linear probe), in points:

{differences}
![frame accuracy of the linear probe by layer](accuracy.png)

## Frame accuracy, linear probe

{linear}
## Frame accuracy, MLP probe (256 ReLUs)

{mlp}{more}"""


def build_parser(doc, example, runs, epochs, work_dir):
    parser = new_parser(doc.split("\n\n")[0], example)
    text = "models to train, in this order, of %(choices)s (default: all)"
    parser.add_argument("--runs", nargs="+", choices=runs, default=runs, metavar="RUN", help=text)
    text = "passes over the training data, for each model (default: %(default)s)"
    parser.add_argument("--epochs", type=positive, default=epochs, help=text)
    text = "directory for data, models and features, 10 GB (default: %(default)s)"
    parser.add_argument("--work_dir", type=Path, default=Path(work_dir), help=text)
    text = "directory for the report and its picture (default: %(default)s)"
    default = ROOT / "experiments" / "results"
    parser.add_argument("--results_dir", type=Path, default=default, help=text)
    return parser


# Stages -------------------------------------------------------------------------------------------


def run(*command):
    """Run a script of this repository, or another program -> its output.

    Without a GPU some run as a process per core, which busy neighbours slow down less than threads.
    """
    command = [str(part) for part in command]
    name = command[0]
    if command[0].endswith(".py"):
        python = [sys.executable]
        if command[0] in ("train.py", "extract_features.py") and not torch.cuda.is_available():
            flags = ("--standalone", f"--nproc_per_node={num_cores()}")
            python += ["-m", "torch.distributed.run", *flags]
        command = [*python, str(ROOT / command[0]), *command[1:]]
    print(f"\n{shlex.join(command)}", flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise UserError(f"{name} failed with status {done.returncode}")
    print(done.stdout, end="", flush=True)
    return done.stdout


def write_kaldi(folder, recordings):
    """{id: path} -> a Kaldi data directory; an id starts with its speaker and "_" or "-"."""
    paths = {utt_id: Path(recordings[utt_id]).resolve() for utt_id in sorted(recordings)}
    folder.mkdir(parents=True, exist_ok=True)
    write_lines([f"{utt_id} {path}" for utt_id, path in paths.items()], folder / "wav.scp")
    write_lines([f"{utt_id} {re.split('[-_]', utt_id)[0]}" for utt_id in paths], folder / "utt2spk")


def prepare(source, save_dir):
    """Log-Mel features of audio, normalised as the name of the directory above says."""
    if not is_finished(save_dir):
        flags = ("--cmvn", save_dir.parent.name, "--max_seq_len", 3200, "--save_dir", save_dir)
        run("prepare_data.py", "--librispeech_from_audio", source, *flags)


def model_file(work, name, epoch):
    return work / "runs" / f"{name}.dir" / f"{name}__epoch_{epoch}.model"


def train(work, name, epochs, cmvn, flags):
    """Train a model for so many epochs, unless that is done."""
    if not model_file(work, name, epochs).exists():
        flags = ("--learning_rate", 0.001, "--batch_size", 16, "--epochs", epochs, *flags)
        flags = ("--train_split", "train", "--valid_split", "dev", "--mask_padding", *flags)
        flags = ("--librispeech_path", work / "data" / cmvn, "--store_path", work / "runs", *flags)
        run("train.py", "--experiment_name", name, "--save_steps", 50, "--resume", *flags)


def extract(work, name, checkpoint, cmvn="speaker"):
    """All layers of the probe's utterances, unless they are there -> their directory."""
    save_dir = work / "features" / name
    if not (save_dir / "finished").exists():
        flags = ("--save_dir", save_dir, "--layer", "all", "--dtype", "float16", "--resume")
        data = ("--data_dir", work / "data" / cmvn / "probe")
        run("extract_features.py", "--checkpoint", checkpoint, *data, *flags)
        (save_dir / "finished").touch()
    return save_dir


def make_rows(args, runs, recordings):
    """Train the models, extract the features of {id: path} -> {row: their directory}."""
    work, epochs = args.work_dir, args.epochs
    runs = {name: run for name, run in runs.items() if name in args.runs}
    pretrained_cmvn = read_json(PRETRAINED.with_name("config.json"))["data"][0]["cmvn"]
    write_kaldi(work / "kaldi" / "probe", recordings)
    for cmvn in sorted({"speaker", pretrained_cmvn} | {cmvn for _, cmvn, _ in runs.values()}):
        prepare(work / "kaldi" / "probe", work / "data" / cmvn / "probe")
    for name in args.runs:
        train(work, name, epochs, *runs[name][1:])
    digest = hashlib.sha256(PRETRAINED.read_bytes()).hexdigest()[:8]
    rows = {"log-Mel": work / "data" / "speaker" / "probe"}
    for name, suffix in (("n3", ""), ("tapc", " T-APC")):
        if name in runs:
            file = model_file(work, name, 0)
            rows[f"randomly initialised{suffix}"] = extract(work, f"{name}_0", file)
    rows["pretrained/"] = extract(work, f"pretrained_{digest}", PRETRAINED, pretrained_cmvn)
    for name, (row, cmvn, _) in runs.items():
        rows[row] = extract(work, f"{name}_{epochs}", model_file(work, name, epochs), cmvn)
    return rows


def run_probe(work, rows, hidden_size=0):
    """{row: directory} -> phone_probe.py's numbers of all rows."""
    results = {"correct": {}}
    (work / "probes").mkdir(exist_ok=True)
    for row, folder in rows.items():
        path = work / "probes" / f"{folder.name}_{hidden_size}.json"
        if not path.exists():
            flags = [f"--{name}={work / name}.txt" for name in ("labels", "train_ids", "test_ids")]
            flags += ["--hidden_size", hidden_size, "--names", row, "--json", path]
            run("experiments/phone_probe.py", folder, *flags)
        found = read_json(path)
        results["correct"][row], results["frames"] = *found["correct"].values(), found["frames"]
    return results


# The report ---------------------------------------------------------------------------------------


def machine():
    """Processor, cores, and PyTorch's version."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = found[1] if found else platform.processor() or "unknown processor"
    return f"{name}, {num_cores()} core(s), torch {torch.__version__}"


def difference_table(results, pairs):
    """[(row, row to subtract)] -> a Markdown table of the accuracies' differences by layer."""
    cell, rows = "{:+.1f} ({:+.1f} to {:+.1f})".format, {}
    for name, base in (pair for pair in pairs if results["correct"].keys() >= set(pair)):
        row, others = rows.setdefault(f"{name} − {base}", {}), results["correct"][base]
        for layer, correct in results["correct"][name].items():
            minus = others["0"] if len(others) == 1 else others.get(layer)  # log-Mel has one
            if minus is not None:
                row[f"layer {layer}"] = cell(*accuracy(correct, results["frames"], minus))
    return table("difference", rows)


def report(args, name, rows, pairs=(), more="", **texts):
    """Run the probes; write <name>.md, <name>.json and, from all corpora's JSON, accuracy.png."""
    work, out = args.work_dir, args.results_dir
    linear, mlp = run_probe(work, rows), run_probe(work, rows, hidden_size=256)
    labels, test_ids = read_table(work / "labels.txt"), read_table(work / "test_ids.txt")
    phones = [phone for utt_id in test_ids for phone in labels[utt_id]]
    lengths = {split: read_lengths(work / "data" / "speaker" / split) for split in ("train", "dev")}
    speech = [f"{k} {sum(v.values()) / 6000:.1f} ({len(v)})" for k, v in lengths.items()]
    text = REPORT.format(
        command=shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        date=datetime.date.today(),
        machine=machine(),
        speech=", ".join(speech),
        probed=len(read_table(work / "train_ids.txt")),
        tested=len(test_ids),
        frames=len(phones),
        silence=100 * phones.count("SIL") / len(phones),
        epochs=args.epochs,
        steps=-(-len(lengths["train"]) // 16),
        differences=difference_table(linear, [*PAIRS, *pairs]),
        linear=accuracy_table(linear),
        mlp=accuracy_table(mlp),
        more=more,
        **texts,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_lines(text.splitlines(), out / f"{name}.md")
    curves = {
        row: [accuracy(correct, linear["frames"]) for correct in layers.values()]
        for row, layers in linear["correct"].items()
    }
    write_json({"title": texts["title"], "rows": curves}, out / f"{name}.json")
    plot_accuracy(sorted(out.glob("*.json")), out / "accuracy.png")
    print(f"\n{text}\nwritten: {out / name}.md")


def plot_accuracy(paths, image):
    """Linear-probe accuracy by layer, axes for each corpus; a line for log-Mel."""
    figure = Figure(figsize=(1 + 5 * len(paths), 5), layout="constrained")
    for axes, path in zip(figure.subplots(1, len(paths), squeeze=False)[0], paths):
        found = read_json(path)
        for row, layers in found["rows"].items():
            accuracies = [numbers[0] for numbers in layers]
            if len(accuracies) == 1:
                axes.axhline(accuracies[0], color="black", linestyle="--", label=row)
            else:
                axes.plot(accuracies, marker="o", label=row)
        axes.set(title=found["title"], xlabel="layer", ylabel="frame accuracy, linear probe, %")
        axes.set_xticks(range(max(map(len, found["rows"].values()))))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize="small")
    with atomic_write(image) as file:
        figure.savefig(file, format="png", dpi=120)
