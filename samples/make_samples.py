"""Make the sample dumps in this folder: two minutes of synthetic speech as log-Mel frames.

    apt-get install flite                      # Debian's speech synthesiser
    pip install -r requirements.txt            # numpy, kaldi-native-fbank, soundfile
    python samples/make_samples.py             # writes train.blogmel.xz and dev.blogmel.xz

The sentences were written for this purpose. Each is spoken once, by one of flite's four voices of
16 kHz, each of which is a speaker. Features as `prepare_data.py --librispeech_from_audio` makes
them: the original's fbank (formats/fbank.py) without dither, normalised to mean 0 over
the speaker's whole speech. Utterance ids have LibriSpeech's shape, speaker-chapter-number; chapter
1 is train, chapter 2 dev. The files have the original's dump format: a line with the
utterance id, a line of decimals for each frame, a line with a full stop. Made again on the same
machine they are the same to the byte; other versions of flite, kaldi-native-fbank or xz may change
them.
"""

import lzma
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from formats.audio import Recording, read_fbank
from formats.fbank import CMVN, cmvn_stats, fbank_settings
from utils import UserError, atomic_write, run_main

VOICES = {"9001": "kal16", "9002": "awb", "9003": "rms", "9004": "slt"}  # speaker: flite's name

# Sentence i is spoken by voice i % 4.
SENTENCES = {
    "train": [
        "A cold wind blew across the harbour all morning.",
        "She measured the flour twice and forgot the yeast.",
        "Both of my brothers learned to weave baskets.",
        "The judge asked why nobody had locked the garage.",
        "Put the yellow cushion under the other chair.",
        "Thunder woke the children shortly after midnight.",
        "We usually boil the eggs for eight minutes.",
        "His voice grew thin as he read the last page.",
        "Fresh bread and sharp cheese make a fine lunch.",
        "The ferry leaves at noon unless there is fog.",
        "An owl sat on the chimney and watched us go by.",
        "Could you hand me that small jar of paint?",
        "Every spring the river floods the lower meadow.",
        "They chose a shady path through the beech wood.",
        "Our neighbour plays the tuba with great joy.",
        "I would rather mend this old coat than buy one.",
        "The vase on the shelf came from a village in Peru.",
        "Strong coffee keeps the night watchman awake.",
        "Few people noticed the change in the schedule.",
        "The youngest goat jumped over the garden gate.",
        "He thought about the question for a whole week.",
        "Pour the milk slowly and keep on stirring.",
        "The orchestra stopped, and the hall fell quiet.",
        "There were huge puddles along the gravel road.",
        "My aunt keeps bees behind the white farmhouse.",
        "The clerk pushed a thick envelope across the desk.",
        "It is a pleasure to hear such good news.",
        "Five ships were lost on the voyage round the cape.",
        "Roy pointed to a noisy toy on the floor.",
        "The bridge is narrow, so drive with care.",
        "Which of these keys opens the cellar door?",
        "Grey clouds gathered beyond the southern hills.",
        "The nurse wrapped a soft bandage around her thumb.",
        "A loud cheer went up when the boat was launched.",
        "You should always water the tomatoes before sunrise.",
        "The teacher drew a circle and two straight lines.",
    ],
    "dev": [
        "The baker sold his last loaf before seven.",
        "Nothing could be heard except the ticking clock.",
        "We took the early train and reached the coast by ten.",
        "A thin layer of ice covered the garden pond.",
        "Please choose a book with large pictures.",
        "The old mayor enjoys fishing, chess and rowing.",
        "Her jacket was torn on a rusty wire fence.",
        "Should we go south, or wait for the others here?",
    ],
}


def check_flite(voices):
    """Asked for a voice that it does not have, flite silently speaks in another one."""
    try:
        listed = subprocess.run(["flite", "-lv"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise UserError("needs the speech synthesiser flite: apt-get install flite") from None
    missing = sorted(set(voices) - set(listed.split()))
    if missing:
        raise UserError(f"flite lacks the voices {', '.join(missing)}; it has {listed.strip()}")


def synthesise(sentence, voice, path, *flags):
    """Speak a sentence into the WAV file `path` -> what flite prints."""
    command = ["flite", "-voice", voice, *flags, "-t", sentence, "-o", path]
    flite = subprocess.run(command, capture_output=True, text=True, check=False)
    if flite.returncode or not os.path.exists(path):
        raise UserError(f"{shlex.join(command)}: status {flite.returncode} {flite.stderr[:200]}")
    return flite.stdout


def speak(sentence, voice, folder):
    """One sentence in a flite voice, as log-Mel frames (T, 80)."""
    path = os.path.join(folder, "sentence.wav")
    synthesise(sentence, voice, path)
    return read_fbank(Recording("sentence", path), fbank_settings())


def dump(utterances):
    """The original's dump format of {utterance id: frames (T, D)}, in the order of the ids."""
    lines = []
    for utt_id, frames in sorted(utterances.items()):
        lines.append(utt_id)
        lines.extend(" ".join(f"{value:.3f}" for value in frame) for frame in frames.tolist())
        lines.append(".")
    return "\n".join(lines) + "\n"


def main():
    check_flite(VOICES.values())
    splits = {split: {} for split in SENTENCES}
    stats = dict.fromkeys(VOICES, 0)
    speakers = list(VOICES)
    with tempfile.TemporaryDirectory() as folder:
        for chapter, (split, sentences) in enumerate(SENTENCES.items(), start=1):
            for i, sentence in enumerate(sentences):
                speaker, number = speakers[i % len(speakers)], i // len(speakers)
                frames = speak(sentence, VOICES[speaker], folder)
                splits[split][f"{speaker}-{chapter}-{number:04d}"] = frames
                stats[speaker] = stats[speaker] + cmvn_stats(frames)
    for split, utterances in splits.items():
        path = HERE / f"{split}.blogmel.xz"
        normalised = {
            utt_id: CMVN("speaker").apply(frames, stats[utt_id.split("-")[0]])
            for utt_id, frames in utterances.items()
        }
        with atomic_write(path) as file:
            file.write(lzma.compress(dump(normalised).encode(), preset=9 | lzma.PRESET_EXTREME))
        count = sum(map(len, utterances.values()))
        print(
            f"{path}: {len(utterances)} utterances, {count} frames ({count / 100:.1f} s), "
            f"{path.stat().st_size / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    run_main(main)
