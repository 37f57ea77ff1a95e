"""The papers' claims on two hours of real speech: train with several n, probe, report.

About an hour on two quiet cores; the same command resumes after an interruption. Every stage is a
script of this repository, printed as it is called, or fastabx, which needs Python 3.12 and may have
an environment of its own (uv tool install fastabx): without that command there is no ABX.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import common
from experiments.phone_probe import read_labelled, read_table, table
from utils import run_main, write_lines

RUNS = common.RUNS | {
    "n10": ("APC, n = 10", "speaker", ("--rnn_residual", "--time_shift", 10)),
    "utterance_n3": ("APC, n = 3, utterance's mean", "utterance", common.N3),
}
EXAMPLE = """\
  pip install -r experiments/requirements.txt    # on Debian, with apt-get install ffmpeg
  python experiments/evidence.py"""
TITLE = "Prompts: two hours of studio speech"
SPEAKERS = """the test has one, who is in the training data of the probe and of every row that is
  trained, pretrained/ included: what features hold about speakers cannot be shown on this speech"""
ABX = "\n## ABX error rate, % (phones within the speaker, any context, angular distance)\n\n"


def make_data(work):
    """The corpus, prepared datasets, labels, the probe's lists of ids -> its recordings."""
    corpus, recordings = work / "corpus", {}
    if not (corpus / "texts.txt").exists():
        common.run("experiments/make_corpus.py", corpus)
    if not (corpus / "labels.txt").exists():
        common.run("experiments/align_phones.py", corpus)
    shutil.copy(corpus / "labels.txt", work)
    labelled = read_table(work / "labels.txt")
    for split in ("train", "test"):
        found = {path.stem: path for path in sorted((corpus / split / "en").glob("*.flac"))}
        chosen = {utt_id: path for utt_id, path in found.items() if utt_id in labelled}
        write_lines(chosen, work / f"{split}_ids.txt")
        recordings |= chosen
    for cmvn in ("speaker", "utterance"):
        for split in ("train", "dev"):
            common.prepare(corpus / split, work / "data" / cmvn / split)
    return recordings


def write_items(work):
    """labels.txt -> the test utterances' phones with their neighbours, in fastabx's format."""
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    labels = read_table(work / "labels.txt")
    for utt_id in read_table(work / "test_ids.txt"):
        frames = labels[utt_id]
        starts = [t for t in range(len(frames)) if t == 0 or frames[t] != frames[t - 1]]
        ends = [*starts[1:], len(frames)]
        phones = ["SIL", *(frames[t] for t in starts), "SIL"]
        for i, (start, end) in enumerate(zip(starts, ends), start=1):
            if phones[i] != "SIL":
                times = f"{start / 100:.2f} {end / 100:.2f}"
                lines.append(f"{utt_id} {times} {phones[i]} {phones[i - 1]} {phones[i + 1]} en")
    write_lines(lines, work / "test.item")


def write_layers(work, folder):
    """Features of all layers -> a directory of the test utterances for each, as fastabx reads."""
    labels, test_ids = read_table(work / "labels.txt"), read_table(work / "test_ids.txt")
    for utt_id, (features, _) in zip(test_ids, read_labelled(folder, test_ids, labels)):
        for layer, x in enumerate(features.float()):
            path = work / "abx" / folder.parent.name / folder.name / str(layer) / f"{utt_id}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(x.clone(), path)
    return sorted(path.parent.parent.iterdir())


def abx_table(work, rows):
    """{row: directory of features} -> ABX error rates of every layer, as a Markdown table."""
    program = shutil.which("fastabx") or shutil.which("fastabx", path=Path(sys.executable).parent)
    if not program:
        return "Not measured: there was no `fastabx` (Python 3.12 or newer).\n"
    write_items(work)
    rates = {}
    for row, folder in rows.items():
        rates[row] = {}
        for layer in write_layers(work, folder):
            flags = ("--frequency", 100, "--context", "any", "--max-size-group", 10)
            flags += ("--output", "json", "--quiet")
            score = json.loads(common.run(program, work / "test.item", layer, *flags))["score"]
            rates[row][f"layer {layer.name}"] = f"{100 * score:.1f}"
    return table("ABX error rate, %", rates)


def main(argv=None):
    args = common.build_parser(__doc__, EXAMPLE, RUNS, 2, "logs/evidence").parse_args(argv)
    rows = common.make_rows(args, RUNS, make_data(args.work_dir))
    abx = ABX + abx_table(args.work_dir, rows)
    common.report(args, "results", rows, title=TITLE, speakers=SPEAKERS, more=abx)


if __name__ == "__main__":
    run_main(main)
