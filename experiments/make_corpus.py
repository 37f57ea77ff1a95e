"""Two hours of real speech from Debian's packages: telephone prompts in five languages.

    apt-get install ffmpeg                                       # it decodes G.722
    python experiments/make_corpus.py corpus

Fetches asterisk-core-sounds-{en,es,fr,it,ru} (texts) and the same with -g722 (recordings, 16 kHz),
without installing them, and writes OUT/{train,dev,test}/<language>/<utt_id>.flac, and at last
OUT/texts.txt: an utterance id and its text a line. Ids are paths, such as en-digits-1. A language
is one voice, though the English and the Spanish one are the same woman's.

Prompts with one text, and prompts that share five words in a row, are kept together, so that no
sentence is on both sides of a split; shorter phrases and words may be. Which split they go to
depends on a hash of their texts. Only English is tested on. Prompts without a text, and those whose
text says that they are no speech, are left out.
"""

import argparse
import collections
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import HelpFormatter, UserError, atomic_write, num_cores, positive, run_jobs, run_main

LANGUAGES = ("en", "es", "fr", "it", "ru")
TEST_SHARE, DEV_SHARE = 0.2, 0.05  # of the groups of prompts; the first of English alone
SHARED_WORDS = 5  # in a row, that make prompts a group
BYTES_A_SECOND = 8000  # of G.722
FILES_A_JOB = 40


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--num_workers", type=positive, default=num_cores(), help="processes")
    return parser


def run(command, advice, **options):
    """Run a command; UserError, with its last line and advice, if it is missing or fails."""
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]} is missing: {advice}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"{command[0]}: {why}: {advice}")


def fetch(folder):
    """Download Debian's packages into a folder and unpack them there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"asterisk-core-sounds-{x}" for x in LANGUAGES]
    names += [f"{name}-g722" for name in names]
    advice = "the speech is fetched from a Debian archive (bookworm): apt-get update, or put the "
    advice += f"packages {' '.join(names)} into {folder}"
    if any(not list(folder.glob(f"{name}_*.deb")) for name in names):
        run(["apt-get", "download", *names], advice, cwd=folder)
    for name in names:
        (package,) = sorted(folder.glob(f"{name}_*.deb"))[-1:]
        run(["dpkg-deb", "-x", str(package), str(folder)], advice)


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
    """The split of a group: a share between 0 and 1, out of a hash of its first text."""
    text = f"{language} {min(' '.join(words(texts[name])) for name in names)}"
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8
    if language == "en" and share < TEST_SHARE:
        return "test"
    return "dev" if share >= 1 - DEV_SHARE else "train"


def decode(files):
    """[(G.722 file, FLAC file to write)]: one call of ffmpeg."""
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y"]
    for source, _ in files:
        command += ["-f", "g722", "-i", str(source)]
    for number, (_, target) in enumerate(files):
        command += ["-map", f"{number}", "-ar", "16000", "-ac", "1", "-bitexact", str(target)]
    run(command, "apt-get install ffmpeg")


def main(argv=None):
    args = build_parser().parse_args(argv)
    out, packages = Path(args.out), Path(args.out, "packages")
    if (out / "texts.txt").exists():
        raise UserError(f"{out}: holds a finished corpus: choose another folder")
    if not shutil.which("ffmpeg"):
        raise UserError("ffmpeg is missing: apt-get install ffmpeg")
    fetch(packages)
    jobs, lines, seconds = [], [], collections.Counter()
    counts = collections.Counter()
    for language in LANGUAGES:
        doc = packages / "usr/share/doc" / f"asterisk-core-sounds-{language}"
        texts = read_texts(doc / f"core-sounds-{language}.txt.gz")
        (voice,) = (packages / "usr/share/asterisk/sounds").glob(f"{language}_*")
        files = {str(p.relative_to(voice).with_suffix("")): p for p in voice.rglob("*.g722")}
        without_text = files.keys() - texts.keys()
        speech = {name: texts[name] for name in sorted(files.keys() - without_text)}
        speech = {name: text for name, text in speech.items() if words(text)}
        counts["without text"] += len(without_text)
        counts["no speech"] += len(files) - len(without_text) - len(speech)
        for names in group(speech):
            split = choose_split(names, speech, language)
            for name in names:
                utt_id = f"{language}-{name.replace('/', '-')}"
                jobs.append((files[name], out / split / language / f"{utt_id}.flac"))
                lines.append(f"{utt_id} {speech[name]}")
                counts[split] += 1
                seconds[split] += files[name].stat().st_size / BYTES_A_SECOND
    if len(targets := {target for _, target in jobs}) < len(jobs):
        raise UserError(f"{packages}: {len(jobs) - len(targets)} prompts have the id of another")
    for folder in {target.parent for target in targets}:
        os.makedirs(folder, exist_ok=True)
    parts = [jobs[i : i + FILES_A_JOB] for i in range(0, len(jobs), FILES_A_JOB)]
    for _ in run_jobs(parts, decode, args.num_workers):
        pass
    with atomic_write(out / "texts.txt") as file:  # last: the corpus is whole
        file.writelines(f"{line}\n".encode() for line in sorted(lines))
    for split in ("train", "dev", "test"):
        print(f"{out}: {split}: {counts[split]} prompts, {seconds[split] / 60:.1f} minutes")
    left_out = f"{counts['without text']} without text, {counts['no speech']} of other sounds"
    print(f"{out}: left out: {left_out}")


if __name__ == "__main__":
    run_main(main)
