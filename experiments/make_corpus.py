"""Make a corpus of synthetic speech whose phones are known: hours of it, from flite's four voices.

    apt-get install flite                                        # Debian's speech synthesiser
    python experiments/make_corpus.py evidence/corpus --hours 2 --seed 0

Writes OUT/{train,dev,test}/speaker/chapter/speaker-chapter-number.flac, LibriSpeech's tree, 16 kHz,
OUT/speakers.txt, and finally OUT/labels.txt: one utterance per line, its id, then the phone of
every frame of the fbank (10 ms; frame t covers samples 160 t to 160 t + 400, and is labelled by its
centre).

A "speaker" is one of flite's 16 kHz voices with settings of its own: a resampling factor, which
scales formants as a longer or shorter vocal tract would (and the pitch with them), a pitch (which
the voice rms ignores) and a speaking rate. The three splits share voices and words, but no
settings. Rate and level also vary from utterance to utterance, and so does the noise: the slope of
its spectrum, and its level, 10 to 40 dB below the speech. Sentences come from the grammar below.
Phones end where flite -psdur says, times the resampling factor. The same seed gives the same files
to the byte on the same machine; other versions of flite, numpy or libsndfile may change them.
"""

import argparse
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from samples.make_samples import check_flite, synthesise
from utils import (
    HelpFormatter,
    UserError,
    atomic_write,
    not_negative,
    num_cores,
    positive,
    run_jobs,
    run_main,
)

VOICES = {"kal16": 100, "awb": 130, "rms": 100, "slt": 165}  # flite's name: its pitch, Hz
SPEAKERS = {"train": 8, "dev": 2, "test": 4}  # of each voice
SHARES = {"train": 0.8, "dev": 0.05, "test": 0.15}  # of the hours
UTTERANCE_SECONDS = 2.65  # on average, measured
SAMPLE_RATE, SHIFT, WINDOW = 16000, 160, 400  # of the fbank: Hz, samples, samples

# A name in braces is replaced by one of its alternatives, until none is left.
GRAMMAR = {
    "sentence": [
        "{noun_phrase} {does} {noun_phrase}.",
        "{noun_phrase} {does} {noun_phrase} {where}.",
        "{name} {does} {noun_phrase} {when}.",
        "{name} and {name} {went} {where}.",
        "{when}, {noun_phrase} {went} {where}.",
        "Did {name} {do} {noun_phrase}?",
        "{noun_phrase} is {adjective} and {adjective}.",
        "There are {number} {things} {where}.",
        "{name} {says} that {noun_phrase} {does} {noun_phrase}.",
        "We should {do} {number} {things} {when}.",
        "{adverb} {name} {went} {where}, but {noun_phrase} {does} {noun_phrase}.",
    ],
    "noun_phrase": ["the {noun}", "a {adjective} {noun}", "{whose} {noun}", "{number} {things}"],
    "where": ["{near} the {noun}", "{near} {whose} {adjective} {noun}", "to {place}", "in {place}"],
    "when": ["on {day}", "at {number}", "{adverb}", "this {time}", "every {time}"],
}
WORDS = {
    "noun": "apple axe baby badge bath beach bear bird boat book bowl boy bridge brush bush cage "
    "camera chair cheese child clock cloud coat cow cushion daughter desk dog dollar door duck "
    "engine eye farm father feather finger fish flower fox frog garage garden giant goose grape "
    "guitar hammer house island jacket jar judge jug key king kitchen ladder leg lemon letter "
    "machine measure mirror moon mother mouse nail neighbour noise nurse oak ocean onion oven owl "
    "oyster painter path pearl pencil pigeon pillow pot queen rabbit razor river road robe rope "
    "sailor scissor shadow shoe sister sock spoon squirrel star stone table tail teacher thief "
    "thumb tongue tooth tower toy treasure tree truck uncle umbrella vase vision voice wagon watch "
    "wheel whistle window witch wolf yacht yard zebra zoo",
    "things": "boxes boys bridges brothers cabbages cars chairs coins days dishes drawings eggs "
    "foxes girls houses lengths letters matches mouths oaths oranges paths pictures roads songs "
    "stones things thoughts toys treasures trees visions voices watches weeks wishes years",
    "adjective": "azure bad beige big blue broad brown cheap clean clever cold cool crazy dark "
    "deep dirty early empty fair fine full funny good great green happy heavy huge joyful large "
    "lazy long loud loyal massive narrow new noisy odd old orange pink plain pure quick quiet rare "
    "rough royal rusty sharp shy smooth soft sour square strange sure thick thin unusual usual "
    "vague warm weird white whole wide wise wooden wrong yellow young",
    "does": "admires allows avoids believes breaks brings calls carries catches chases checks "
    "chews cooks destroys draws enjoys feeds finds fixes follows gives guards hears hides hugs "
    "joins judges kicks knows leads likes loses loves makes measures mends moves needs offers "
    "opens paints pays pours praises pulls reaches rescues sees sells shakes shows smooths "
    "spoils steals teaches thanks throws touches treasures uses visits wants warns washes watches "
    "weighs",
    "do": "admire avoid borrow bring buy call carry catch choose choke cook destroy draw employ "
    "find follow forget hear hide join judge keep kiss know lead leave lose love measure move "
    "notice open paint pull push put remember see sell shave show teach thank throw use wash watch "
    "zip",
    "says": "says thinks knows hopes denies shouts believes agrees dreams jokes",
    "went": "walked ran jumped drove flew sailed went stood waited slept moved hurried looked",
    "near": "near under behind over beyond by above beneath through around beside with",
    "whose": "my your his her our their",
    "number": "two three four five six seven eight nine ten eleven twelve thirty forty fifty",
    "name": "Anna Beth Charles David Ethan Faith George Hugh Ian Joyce Karen Lewis Maria Nathan "
    "Olive Paul Quentin Roy Sheila Thomas Ursula Victor Wendy Yvonne Zoe Asia",
    "place": "Boston Chicago China Denver Egypt Finland Georgia Hawaii India Jordan Kenya London "
    "Malaysia Norway Oregon Persia Rome Russia Sweden Troy Utah Vienna Warsaw York Zurich",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "time": "morning evening night year week month summer winter",
    "adverb": "usually slowly today tomorrow again always often soon together yesterday outdoors "
    "casually maybe now",
}


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to make")
    add("--hours", type=float, default=1.0, help="of speech, about")
    add("--seed", type=not_negative, default=0, help="of sentences, speakers and noise")
    add("--num_workers", type=positive, default=num_cores(), help="processes")
    return parser


def sentence(random):
    """A sentence of the grammar, drawn by a numpy Generator."""
    text = "{sentence}"
    while found := re.search(r"\{(\w+)\}", text):
        choices = GRAMMAR.get(found[1]) or WORDS[found[1]].split()
        text = text[: found.start()] + str(random.choice(choices)) + text[found.end() :]
    return text


def make_speakers(seed):
    """-> [{"id", "split", "voice", "warp", "pitch", "rate"}].

    The settings of a voice's speakers are spread evenly over their ranges, and shuffled.
    """
    speakers = []
    for number, (voice, mean_pitch) in enumerate(VOICES.items(), start=1):
        random = np.random.default_rng([seed, number])
        count = sum(SPEAKERS.values())
        splits = [split for split, share in SPEAKERS.items() for _ in range(share)]
        columns = zip(
            random.permutation(splits).tolist(),
            np.geomspace(0.85, 1.18, count).tolist(),
            (mean_pitch * random.permutation(np.geomspace(0.75, 1.35, count))).tolist(),
            random.permutation(np.geomspace(0.8, 1.25, count)).tolist(),
        )
        for i, (split, warp, pitch, rate) in enumerate(columns, start=1):
            speaker = {"id": f"{number}{i:02d}", "split": split, "voice": voice}
            speakers.append(speaker | {"warp": warp, "pitch": pitch, "rate": rate})
    return speakers


def plan_utterances(speakers, hours):
    """-> [(speaker, utterance's number)], about `hours` of speech in all."""
    jobs = []
    for speaker in speakers:
        split = speaker["split"]
        seconds = hours * 3600 * SHARES[split] / SPEAKERS[split] / len(VOICES)
        count = max(4, round(seconds / UTTERANCE_SECONDS))  # speaker_probe.py needs 4
        jobs += [(speaker, number) for number in range(count)]
    return jobs


def read_psdur(text):
    """What flite -psdur prints, "pau:0.164 hh:0.255 ..." -> phones, their ends in seconds."""
    phones, ends = [], []
    for item in text.split():
        phone, _, end = item.rpartition(":")
        if not re.fullmatch(r"[a-z]+", phone) or not re.fullmatch(r"\d+\.\d+", end):
            raise UserError(f"flite -psdur: expected phone:seconds, found {item!r}")
        phones.append(phone)
        ends.append(float(end))
    if not ends or (np.diff(ends) < 0).any():
        raise UserError(f"flite -psdur: expected phones with rising ends, found {text.strip()!r}")
    return phones, np.array(ends)


def frame_labels(phones, ends, num_samples):
    """The phone at each frame's centre, a list of T labels; after the last end, the last phone.

    T = 1 + (num_samples - 400) // 160, as the fbank has without padding (snip_edges).
    """
    num_frames = 1 + (num_samples - WINDOW) // SHIFT
    centres = (np.arange(num_frames) * SHIFT + WINDOW / 2) / SAMPLE_RATE
    indices = np.searchsorted(ends, centres, side="right").clip(max=len(phones) - 1)
    return [phones[i] for i in indices]


def resample(samples, factor):
    """samples (N,) -> (factor N,): all frequencies divided by factor, without aliasing."""
    length = round(len(samples) * factor)
    return np.fft.irfft(np.fft.rfft(samples)[: length // 2 + 1], length) * (length / len(samples))


def noise(length, random):
    """Noise of mean square 1, (length,), between white and brown."""
    spectrum = np.fft.rfft(random.standard_normal(length))
    frequency = np.fft.rfftfreq(length, 1 / SAMPLE_RATE).clip(min=50.0)
    samples = np.fft.irfft(spectrum * frequency ** -random.uniform(0, 1), length)
    return samples / np.sqrt(np.mean(samples**2))


def speak(job, out, seed):
    """(speaker, utterance's number) -> the utterance's line of labels.txt; writes its FLAC."""
    speaker, number = job
    random = np.random.default_rng([seed, int(speaker["id"]), number])
    chapter = 1 + number // 100
    utt_id = f"{speaker['id']}-{chapter}-{number % 100:04d}"
    stretch = speaker["rate"] * random.uniform(0.9, 1.1) / speaker["warp"]
    pitch = speaker["pitch"] * speaker["warp"]
    flags = [
        "--setf",
        f"duration_stretch={stretch:.4f}",
        "--setf",
        f"int_f0_target_mean={pitch:.2f}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "sentence.wav")
        psdur = synthesise(sentence(random), speaker["voice"], path, "-psdur", *flags)
        samples, sample_rate = soundfile.read(path)
    if sample_rate != SAMPLE_RATE:
        raise UserError(f"flite: the voice {speaker['voice']} has {sample_rate} Hz, not 16000")
    phones, ends = read_psdur(psdur)
    samples = resample(samples, speaker["warp"])
    snr = 10 ** (random.uniform(10, 40) / 20)
    samples = samples + noise(len(samples), random) * np.sqrt(np.mean(samples**2)) / snr
    samples *= random.uniform(0.4, 0.9) / np.abs(samples).max()
    path = Path(out, speaker["split"], speaker["id"], str(chapter), f"{utt_id}.flac")
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.round(samples * 32767).astype(np.int16), SAMPLE_RATE, subtype="PCM_16")
    return " ".join([utt_id, *frame_labels(phones, ends * speaker["warp"], len(samples))])


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not 0 < args.hours < 10000:
        parser.error(f"--hours {args.hours:g}: expected a number above 0")
    if os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f"{args.out}: is not empty: choose another folder")
    check_flite(VOICES)
    speakers = make_speakers(args.seed)
    jobs = plan_utterances(speakers, args.hours)
    print(
        f"{args.out}: {len(jobs)} utterances by {len(speakers)} synthetic speakers, "
        f"about {args.hours:g} h, seed {args.seed}, {args.num_workers} processes"
    )
    lines = list(run_jobs(jobs, partial(speak, out=args.out, seed=args.seed), args.num_workers))
    with open(os.path.join(args.out, "speakers.txt"), "w", encoding="utf-8") as file:
        file.write("# id split voice warp pitch(Hz) rate\n")
        for s in speakers:
            settings = f"{s['warp']:.3f} {s['pitch']:.1f} {s['rate']:.3f}"
            file.write(f"{s['id']} {s['split']} {s['voice']} {settings}\n")
    with atomic_write(os.path.join(args.out, "labels.txt")) as file:  # last: the corpus is whole
        file.writelines(f"{line}\n".encode() for line in lines)
    frames = sum(line.count(" ") for line in lines)
    phones = {phone for line in lines for phone in line.split()[1:]}
    print(f"{args.out}: {frames / 360000:.2f} h, {len(phones)} phones, labels in labels.txt")


if __name__ == "__main__":
    run_main(main)
