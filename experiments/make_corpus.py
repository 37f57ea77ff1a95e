"""Two hours of real speech from Debian's packages: telephone prompts in five languages.

Fetches asterisk-core-sounds-{en,es,fr,it,ru} (texts) and the same with -g722 (recordings, 16 kHz)
without installing them, and writes OUT/{train,dev,test}/<language>/<utt_id>.flac and, last,
OUT/texts.txt: an utterance id and its text per line. Ids are paths, such as en-digits-1. Each
language has one speaker, but English and Spanish have the same one.

Prompts with the same text, and prompts that share five words in a row, are kept together, so that
no sentence is in two splits; shorter phrases and words may be. A hash of the text chooses the
split. Only English is tested on. Prompts without a text, or whose text says that they are no
speech, are ignored.
"""

import collections
import gzip
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, new_parser, num_cores, run_jobs, run_main, write_lines

LANGUAGES = ("en", "es", "fr", "it", "ru")
TEST_PART, DEV_PART = 0.2, 0.05  # of the groups of prompts; the first of English only
SHARED_WORDS = 5  # in a row, that make prompts a group
EXAMPLE = """\
  apt-get install ffmpeg                     # it decodes G.722
  python experiments/make_corpus.py corpus"""


def run(command, **options):
    """Run a command, which prints its own errors."""
    if status := subprocess.run(command, check=False, **options).returncode:
        raise UserError(f"{command[0]} failed with status {status}")


def fetch(folder):
    """Download Debian's packages into a directory and unpack them there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"asterisk-core-sounds-{x}{kind}" for x in LANGUAGES for kind in ("", "-g722")]
    if any(not list(folder.glob(f"{name}_*.deb")) for name in names):
        run(["apt-get", "download", *names], cwd=folder)
    for name in names:
        package = sorted(folder.glob(f"{name}_*.deb"))[-1]
        run(["dpkg-deb", "-x", str(package), str(folder)])


def read_texts(path):
    """core-sounds-<language>.txt.gz, lines like "digits/1: one" -> {prompt: text}."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8-sig").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith(";"))
    return {prompt.strip(): " ".join(text.split()) for prompt, text in pairs}


def words(text):
    """A text -> its words in lower case, without what is in brackets: a sound or a remark."""
    return re.findall(r"[\w']+", re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text.lower()))


def group(texts):
    """{name: text} -> lists of names that share a text, or SHARED_WORDS words in a row."""
    groups, group_of = {name: [name] for name in texts}, {}  # a run of words: a name that has it
    for name, text in texts.items():
        found = words(text)
        runs = [tuple(found[i : i + SHARED_WORDS]) for i in range(len(found))]
        for run_of_words in [r for r in runs if len(r) == SHARED_WORDS] or [tuple(found)]:
            mine, other = groups[name], groups[group_of.setdefault(run_of_words, name)]
            if mine is not other:
                other += mine
                groups.update(dict.fromkeys(mine, other))
    return list({id(names): names for names in groups.values()}.values())


def choose_split(names, texts, language):
    """The split of a group, by a number between 0 and 1 from a hash of its first text."""
    text = f"{language} {min(' '.join(words(texts[name])) for name in names)}"
    number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8
    if language == "en" and number < TEST_PART:
        return "test"
    return "dev" if number >= 1 - DEV_PART else "train"


def decode(files):
    """(G.722 file, FLAC file to write)"""
    source, target = map(str, files)
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-f", "g722", "-i", source]
    run([*command, "-ar", "16000", "-ac", "1", "-bitexact", target])


def main(argv=None):
    parser = new_parser(__doc__.split("\n\n")[0], EXAMPLE)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to create")
    out = parser.parse_args(argv).out
    packages = out / "packages"
    if (out / "texts.txt").exists():
        raise UserError(f"{out} holds a finished corpus: choose another directory")
    if not (shutil.which("ffmpeg") and shutil.which("apt-get")):
        raise UserError("a Debian system with ffmpeg is needed: apt-get install ffmpeg")
    fetch(packages)
    jobs, lines, counts = [], [], collections.Counter()
    for language in LANGUAGES:
        doc = packages / "usr/share/doc" / f"asterisk-core-sounds-{language}"
        texts = read_texts(doc / f"core-sounds-{language}.txt.gz")
        (speaker,) = (packages / "usr/share/asterisk/sounds").glob(f"{language}_*")
        files = {str(p.relative_to(speaker).with_suffix("")): p for p in speaker.rglob("*.g722")}
        speech = {name: texts[name] for name in sorted(files.keys() & texts) if words(texts[name])}
        counts["ignored (no text)"] += len(files.keys() - texts)
        counts["ignored (other sounds)"] += len((files.keys() & texts) - speech.keys())
        for names in group(speech):
            split = choose_split(names, speech, language)
            (out / split / language).mkdir(parents=True, exist_ok=True)
            for name in names:
                utt_id = f"{language}-{name.replace('/', '-')}"
                jobs.append((files[name], out / split / language / f"{utt_id}.flac"))
                lines.append(f"{utt_id} {speech[name]}")
                counts[f"for {split}"] += 1
    for _ in run_jobs(jobs, decode, num_cores()):
        pass
    write_lines(sorted(lines), out / "texts.txt")  # last: the corpus is complete
    print(f"{out}: prompts: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    run_main(main)
