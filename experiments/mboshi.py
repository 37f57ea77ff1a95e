"""Your own language from end to end: APC on four hours of Mboshi, from WAVs to a report.

Mboshi (Bantu C25) has no standard orthography; the corpus is 4.5 hours of field recordings on
tablets by three speakers, with phones aligned automatically (a "silver standard"). It names no
licence; its README makes it available "to the community for reproducible computational language
documentation experiments" (Godard et al., arXiv 1710.03501). Nothing of it is in this repository.

About an hour on two quiet cores; the same command resumes after an interruption. Every stage is a
script of this repository, printed as it is called. "dev" is the test set.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import read_lengths
from experiments import common
from utils import UserError, run_main, write_lines

WAVS = "full_corpus_newsplit"
ALIGNMENTS = "forced_alignments_supervised_spkr/align-kit-old"
FROM_PRETRAINED = "APC, n = 3, started from pretrained/"
INIT = (*common.N3, "--init_checkpoint", common.PRETRAINED)
RUNS = common.RUNS | {"n3_init": (FROM_PRETRAINED, "speaker", INIT)}
EXAMPLE = """\
  git clone --depth 1 https://github.com/besacier/mboshi-french-parallel-corpus
  pip install -r requirements.txt
  python experiments/mboshi.py mboshi-french-parallel-corpus"""
TITLE = "Mboshi: four hours of field recordings"
SPEAKERS = """three, all of them in the training data of the probe and of every APC and T-APC row;
  pretrained/ was trained on neither them nor their language"""


def find_recordings(clone, split):
    """The aligned recordings of a split -> {utterance id: WAV}."""
    alignments = {path.stem for path in (clone / ALIGNMENTS / split).glob("*.txt")}
    wavs = {path.stem: path for path in sorted((clone / WAVS / split).glob("*.wav"))}
    if not wavs.keys() & alignments:
        raise UserError(f"{clone} has no {WAVS}/{split}: expected a clone of the corpus")
    return {utt_id: path for utt_id, path in wavs.items() if utt_id in alignments}


def frame_labels(segments, num_frames):
    """[(phone, start, end)] in seconds -> the phone at each frame's middle; SIL where none is."""
    middles = 0.0125 + 0.01 * np.arange(num_frames)
    starts, ends = np.array([times for _, *times in segments], dtype=float).reshape(-1, 2).T
    found = np.searchsorted(starts, middles, side="right") - 1
    return [segments[i][0] if i >= 0 and t < ends[i] else "SIL" for i, t in zip(found, middles)]


def make_data(clone, work):
    """Datasets, labels, the probe's lists of ids (every 4th to train on) -> its recordings."""
    labels, recordings = [], {}
    for split, list_name, every in (("train", "train_ids.txt", 4), ("dev", "test_ids.txt", 1)):
        found = find_recordings(clone, split)
        common.write_kaldi(work / "kaldi" / split, found)
        prepared = work / "data" / "speaker" / split
        common.prepare(work / "kaldi" / split, prepared)
        for name, num_frames in read_lengths(prepared).items():
            utt_id = name.removesuffix(".pt")
            alignment = (clone / ALIGNMENTS / split / f"{utt_id}.txt").read_text(encoding="utf-8")
            segments = [line.split() for line in alignment.splitlines()]
            labels.append(f"{utt_id} {' '.join(frame_labels(segments, num_frames))}")
        chosen = list(found)[::every]
        write_lines(chosen, work / list_name)
        recordings |= {utt_id: found[utt_id] for utt_id in chosen}
    write_lines(labels, work / "labels.txt")
    return recordings


def main(argv=None):
    parser = common.build_parser(__doc__, EXAMPLE, RUNS, 1, "logs/mboshi")
    parser.add_argument("clone", metavar="CLONE", type=Path, help="directory of the cloned corpus")
    args = parser.parse_args(argv)
    rows = common.make_rows(args, RUNS, make_data(args.clone, args.work_dir))
    pairs = [(FROM_PRETRAINED, "APC, n = 3")]
    common.report(args, "mboshi", rows, pairs, title=TITLE, speakers=SPEAKERS)


if __name__ == "__main__":
    run_main(main)
