"""Which phone every frame is: the English texts, aligned to the recordings by pocketsphinx.

Reads OUT/texts.txt and the English recordings that make_corpus.py wrote, and writes OUT/labels.txt:
one utterance per line, its id, then the phone of each frame (ARPAbet without stress; SIL between
words). pocketsphinx's frames start where those of our fbank do, every 10 ms, and their middles are
0.3 ms later: its labels are used as they are. Prompts with words that its dictionary lacks, or with
numbers, signs or sounds that might be spoken in several ways, are ignored and counted.

How good they are: in spectrograms of five test prompts 132 of 140 boundaries were within 20 ms of
where one would put them by eye; the worst, at the onset of a vowel and at the release of a final
stop, were 45 ms off.
"""

import collections
import functools
import re
import sys
from pathlib import Path

import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import new_parser, num_cores, run_jobs, run_main, write_lines

WINDOW, SHIFT = 400, 160  # samples of our fbank's frames at 16 kHz
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EXAMPLE = """\
  pip install -r experiments/requirements.txt
  python experiments/align_phones.py corpus"""


def spoken(text):
    """A text -> the words that are spoken, or None if that is not certain."""
    text = re.sub(r"\s\[.\]$", "", text.lower())  # in "slash [/]" the sign is not spoken
    text = re.sub(r"(?<![\d.])\d(?![\d.]\d|\d)", lambda found: f" {DIGITS[int(found[0])]} ", text)
    if re.search(r"\d|[^\w\s.,:;?!'\"-]", text):
        return None
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text)


def frame_labels(segments, num_frames):
    """[(phone, first frame, frames)] -> num_frames labels; None unless the segments are gapless."""
    labels = []
    for phone, start, duration in segments:
        if start != len(labels):
            return None
        labels += [phone] * duration
    missing = num_frames - len(labels)  # the aligner drops a frame at the end
    return None if missing > 2 else (labels + labels[-1:] * missing)[:num_frames]


@functools.cache
def make_decoder():
    from pocketsphinx import Decoder

    return Decoder(lm=None, bestpath=False, loglevel="FATAL")  # or phones lack frames


def align(job):
    """(utt_id, text, path) -> (utt_id, labels or None, why not)."""
    utt_id, text, path = job
    decoder = make_decoder()
    found = spoken(text)
    if not found:
        return utt_id, None, "numbers, signs or sounds"
    if any(decoder.lookup_word(word) is None for word in found):
        return utt_id, None, "words that are not in the dictionary"
    samples, _ = soundfile.read(path, dtype="int16")
    try:
        decoder.set_align_text(" ".join(found))
        for second_pass in (False, True):  # words, then phones
            if second_pass:
                decoder.set_alignment()
            decoder.start_utt()
            decoder.process_raw(samples.tobytes(), full_utt=True)
            decoder.end_utt()
        segments = [(p.name, p.start, p.duration) for word in decoder.get_alignment() for p in word]
    except RuntimeError:  # no path through the text
        return utt_id, None, "no alignment"
    labels = frame_labels(segments, 1 + (len(samples) - WINDOW) // SHIFT)
    return utt_id, labels, "no alignment"


def main(argv=None):
    parser = new_parser(__doc__.split("\n\n")[0], EXAMPLE)
    parser.add_argument("corpus", metavar="OUT", type=Path, help="make_corpus.py's directory")
    corpus = parser.parse_args(argv).corpus
    recordings = {path.stem: path for path in corpus.glob("*/en/*.flac")}
    texts = (corpus / "texts.txt").read_text(encoding="utf-8").splitlines()
    texts = dict(line.split(" ", 1) for line in texts)
    jobs = [(utt_id, texts[utt_id], path) for utt_id, path in sorted(recordings.items())]
    lines, ignored = [], collections.Counter()
    for utt_id, labels, why in run_jobs(jobs, align, num_cores()):
        if labels is None:
            ignored[why] += 1
        else:
            lines.append(f"{utt_id} {' '.join(labels)}")
    write_lines(lines, corpus / "labels.txt")
    counts = "; ".join(f"{count} with {why}" for why, count in ignored.items())
    print(f"{corpus}: {len(lines)} of {len(jobs)} English prompts aligned; ignored: {counts}")


if __name__ == "__main__":
    run_main(main)
