"""The experiments on data made up here: splits, labels of frames, the probe, the report."""

import json
import pickle
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_folder, speech

from experiments import align_phones, common, evidence, make_corpus, mboshi, phone_probe
from formats.audio import Recording, read_fbank
from formats.fbank import fbank_settings
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent

# The corpus ---------------------------------------------------------------------------------------


def test_no_five_words_in_a_row_are_on_both_sides():
    texts = {
        "a": "Press 1 to mute yourself, now.",
        "b": "Or press 1 to mute yourself",
        "c": "please: PRESS 1 (one) to mute!",  # four of the five words
        "d": "yes",
        "e": "Yes! [beep]",
        "f": "Say or press 1 to mute",
    }
    assert sorted(map(sorted, make_corpus.group(texts))) == [["a", "b", "f"], ["c"], ["d", "e"]]
    assert make_corpus.words("[sound of monkeys] <beep> (2 seconds)") == []
    splits = [make_corpus.choose_split([f"{i}"], {f"{i}": f"text {i}"}, "en") for i in range(1000)]
    assert 150 < splits.count("test") < 250 and 30 < splits.count("dev") < 70
    assert make_corpus.choose_split(["a", "b"], texts, "en") == make_corpus.choose_split(
        ["b", "a"], texts, "en"
    )


@pytest.mark.skipif(
    not (shutil.which("ffmpeg") and shutil.which("dpkg-deb")), reason="needs ffmpeg and dpkg-deb"
)
def test_packages_become_a_corpus(tmp_path, capsys):
    packages = tmp_path / "corpus" / "packages"
    packages.mkdir(parents=True)
    wave = speech(1.0)
    for language in make_corpus.LANGUAGES:
        for name in (f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-g722"):
            tree = tmp_path / name
            (tree / "DEBIAN").mkdir(parents=True)
            control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x\n"
            (tree / "DEBIAN" / "control").write_text(control + "Description: x\n")
            if name.endswith("-g722"):
                folder = tree / "usr/share/asterisk/sounds" / f"{language}_X_f_Y" / "digits"
                folder.mkdir(parents=True)
                for prompt in ("1", "beep", "lost"):
                    command = ["ffmpeg", "-v", "error", "-f", "s16le", "-ar", "16000", "-ac", "1"]
                    command += ["-i", "-", "-f", "g722", str(folder / f"{prompt}.g722")]
                    subprocess.run(command, input=wave.tobytes(), check=True)
            else:
                (tree / "usr/share/doc" / name).mkdir(parents=True)
                texts = tree / "usr/share/doc" / name / f"core-sounds-{language}.txt"
                texts.write_text("\ufeff; comment\n\ndigits/1:  one:\ndigits/beep: [a beep]\n")
                subprocess.run(["gzip", str(texts)], check=True)
            command = ["dpkg-deb", "-b", str(tree), str(packages / f"{name}_1_all.deb")]
            subprocess.run(command, check=True, capture_output=True)
    make_corpus.main([str(tmp_path / "corpus")])
    assert "5 ignored (no text), 5 ignored (other sounds)" in capsys.readouterr().out
    lines = (tmp_path / "corpus" / "texts.txt").read_text().splitlines()
    assert lines == [f"{language}-digits-1 one:" for language in make_corpus.LANGUAGES]
    (path,) = (tmp_path / "corpus").glob("*/en/en-digits-1.flac")
    frames = read_fbank(Recording("x", str(path)), fbank_settings())
    assert len(frames) == 98
    # G.722 is lossy and delays by 22 samples, but these are the same second of sound.
    again, rate = soundfile.read(path, dtype="int16")
    loud, again = (np.abs(x.astype(float)).reshape(-1, 800).mean(axis=1) for x in (wave, again))
    assert rate == 16000 and np.corrcoef(loud, again)[0, 1] > 0.95
    with pytest.raises(UserError, match="finished corpus"):
        make_corpus.main([str(tmp_path / "corpus")])


def test_missing_ffmpeg_is_an_error(tmp_path, monkeypatch, call_main):
    monkeypatch.setenv("PATH", "/nowhere")
    done = call_main(make_corpus, tmp_path / "corpus")
    assert done.returncode == 1 and done.stderr.endswith("apt-get install ffmpeg\n")
    assert not (tmp_path / "corpus").exists()


# Phones -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("Press 1, or 20.", None),
        ("Call-Forward on Busy.", "call forward on busy"),
        ("I'm sorry; press 9!", "i'm sorry press nine"),
        ("slash [/]", "slash"),
        ("press * to toggle", None),
        ("H.323", None),
        ("A.M.", "a m"),
        ("after the tone (beep)", None),
    ],
)
def test_only_what_is_surely_spoken_is_aligned(text, words):
    assert align_phones.spoken(text) == (words and words.split())


def test_segments_become_labels_of_every_frame():
    segments = [("SIL", 0, 3), ("AH", 3, 2)]
    assert align_phones.frame_labels(segments, 6) == ["SIL", "SIL", "SIL", "AH", "AH", "AH"]
    assert align_phones.frame_labels(segments, 4) == ["SIL", "SIL", "SIL", "AH"]
    assert align_phones.frame_labels(segments, 8) is None
    assert align_phones.frame_labels([("SIL", 0, 3), ("AH", 4, 2)], 6) is None


def test_labels_fit_the_speech():
    pytest.importorskip("pocketsphinx")
    path = ROOT / "samples" / "en-followme-sorry.flac"
    text = "I'm sorry, but I was unable to locate the person you are calling"
    _, labels, _ = align_phones.align(("x", text, path))
    frames = read_fbank(Recording("x", str(path)), fbank_settings())
    assert len(labels) == len(frames) and labels.count("S") > 10
    high = frames[:, 65:].mean(axis=1) - frames[:, :20].mean(axis=1)  # hissing
    best = {}
    for shift in (-8, 0, 8):
        hiss = np.roll(np.array(labels) == "S", shift)
        best[shift] = high[hiss].mean() - high[~hiss].mean()
    assert max(best, key=best.get) == 0 and best[0] > 3


def test_items_are_whole_phones(tmp_path):
    (tmp_path / "labels.txt").write_text("en-x SIL SIL K K AH SIL\n")
    (tmp_path / "test_ids.txt").write_text("en-x\n")
    evidence.write_items(tmp_path)
    header, *items = (tmp_path / "test.item").read_text().splitlines()
    assert header.startswith("#file onset offset #phone prev-phone next-phone speaker")
    assert items == ["en-x 0.02 0.04 K SIL AH en", "en-x 0.04 0.05 AH K SIL en"]


# The probe ----------------------------------------------------------------------------------------


def write_probe_data(folder, make, names="abc"):
    """Random labels, lists of ids, and `make(labels, generator)` of each utterance -> flags."""
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    (folder / "features").mkdir(parents=True)
    lines = []
    for i in range(36):
        labels = random.choice([*names], random.integers(20, 40)).tolist()
        lines.append(f"1-{i} {' '.join(labels)}\n")
        torch.save(make(labels, generator), folder / "features" / f"1-{i}.pt")
    (folder / "labels.txt").write_text("".join(lines))
    (folder / "train.txt").write_text("".join(f"1-{i}\n" for i in range(24)))
    (folder / "test.txt").write_text("".join(f"1-{i}\n" for i in range(24, 36)))
    flags = [folder / "features", "--labels", folder / "labels.txt", "--steps", 300]
    flags += ["--train_ids", folder / "train.txt", "--test_ids", folder / "test.txt"]
    return [*map(str, flags), "--names", "x", "--json", str(folder / "out.json")]


def run_probe(flags):
    """-> the accuracy in % of each layer of the only row."""
    phone_probe.main(flags)
    with open(flags[-1]) as file:
        results = json.load(file)
    rows = results["correct"]["x"].values()
    return [phone_probe.accuracy(correct, results["frames"])[0] for correct in rows]


def clusters(labels, generator):
    """Two layers (2, T, 3): noise, and noise around a point for each label."""
    centres = {"a": [3.0, 0, 0], "b": [0, 3.0, 0], "c": [0, 0, 300.0]}
    noise = torch.randn(2, len(labels), 3, generator=generator)
    return torch.stack([noise[0], 0.3 * noise[1] + torch.tensor([*map(centres.get, labels)])])


def xor(labels, generator):
    """a: the two coordinates have the same sign; b: opposite signs. No line separates them."""
    signs = torch.randint(0, 2, (len(labels),), generator=generator) * 2.0 - 1
    other = torch.tensor([1.0 if label == "a" else -1.0 for label in labels]) * signs
    return torch.stack([signs, other], dim=1) + 0.2 * torch.randn(
        len(labels), 2, generator=generator
    )


def test_the_linear_probe_finds_the_layer_that_separates_the_labels(tmp_path, capsys):
    noise, layer = run_probe(write_probe_data(tmp_path, clusters))
    assert noise < 50 and layer > 99
    header, _, row = capsys.readouterr().out.strip().splitlines()
    assert header == "| frame accuracy, % | layer 0 | layer 1 |" and row.startswith("| x | ")


def test_only_the_mlp_probe_learns_xor(tmp_path):
    flags = write_probe_data(tmp_path, xor, names="ab")
    (linear,) = run_probe(flags)
    assert linear < 65 and run_probe(["--hidden_size", "64", *flags])[0] > 95
    assert run_probe(flags) == [linear]  # seeded


def test_labels_of_centred_windows_are_matched_by_their_middles():
    labels = [f"{t}" for t in range(10)]  # label t is centred at 160 t + 80, frame t at 160 t + 200
    for frames, first in ((10, "0"), (9, "0"), (8, "1")):
        x, y = phone_probe.match(torch.zeros(1, frames, 4), labels, "u")
        assert x.shape[1] == len(y) == frames and y[0] == first
    assert phone_probe.match(torch.zeros(1, 12, 4), labels, "u")[0].shape[1] == 10
    for frames in (7, 13):
        with pytest.raises(UserError, match=f"u: {frames} frames, but 10 labels"):
            phone_probe.match(torch.zeros(1, frames, 4), labels, "u")


def test_intervals_are_those_of_utterances():
    correct, counts = [[50, 0] * 50], [50] * 100  # whole utterances are right or wrong
    rate, low, high = phone_probe.accuracy(correct, counts)
    assert rate == 50 and high - low == pytest.approx(2 * 196 * 0.05, rel=0.1)
    assert phone_probe.accuracy(correct, counts, minus=correct) == (0, 0, 0)


def test_bad_input_is_one_line(tmp_path, call_main):
    flags = write_probe_data(tmp_path, clusters)
    cases = {"labels.txt": "1-0 a b\n\n", "train.txt": "1-99\n", "test.txt": "1-0\n"}
    messages = ("labels.txt:2: expected", "1 utterances have no labels: 1-99", "1-0 is in")
    for (name, text), message in zip(cases.items(), messages):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        done = call_main(phone_probe, *flags)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
        (tmp_path / name).write_text(before)


# Stages and reports -------------------------------------------------------------------------------


def test_a_frame_has_the_phone_at_its_middle():
    segments = [("A", 0.016, 0.0324), ("B", 0.0324, 0.05)]  # frame t: 12.5 ms + 10 ms t
    assert mboshi.frame_labels(segments, 5) == ["SIL", "A", "B", "B", "SIL"]


def write_mboshi(folder):
    """A corpus as its clone lies on disk, with one recording that is not aligned."""
    for split, count in (("train", 8), ("dev", 3)):
        wavs = folder / mboshi.WAVS / split
        alignments = folder / mboshi.ALIGNMENTS / split
        wavs.mkdir(parents=True)
        alignments.mkdir(parents=True)
        for i in range(count):
            name = f"speaker{i % 2}_{split}_{i}"
            soundfile.write(wavs / f"{name}.wav", speech(0.8, seed=i), 16000)
            (alignments / f"{name}.txt").write_text("SIL 0.1 0.3\nÁ 0.3 0.5\nB 0.5 0.7\n")
            (wavs / f"{name}.fr").write_text("une phrase\n")
    soundfile.write(folder / mboshi.WAVS / "dev" / "speaker0_unaligned.wav", speech(0.8), 16000)


def test_mboshi_becomes_datasets_labels_and_lists(tmp_path, monkeypatch):
    write_mboshi(tmp_path / "clone")
    work = tmp_path / "work"

    def prepare(source, save_dir):
        lines = (source / "wav.scp").read_text().splitlines()
        make_folder(save_dir, [78] * len(lines))
        lengths = {f"{line.split()[0]}.pt": 78 for line in lines}
        (save_dir / "lengths.pkl").write_bytes(pickle.dumps(lengths))

    monkeypatch.setattr(common, "prepare", prepare)
    recordings = mboshi.make_data(tmp_path / "clone", work)
    train_ids, test_ids = (phone_probe.read_table(work / f"{x}_ids.txt") for x in ("train", "test"))
    assert list(train_ids) == ["speaker0_train_0", "speaker1_train_1"]
    assert list(test_ids) == ["speaker0_dev_0", "speaker0_dev_2", "speaker1_dev_1"]
    assert recordings.keys() == train_ids.keys() | test_ids.keys()
    assert "speaker1_dev_1 speaker1\n" in (work / "kaldi" / "dev" / "utt2spk").read_text()
    labels = phone_probe.read_table(work / "labels.txt")
    assert len(labels) == 11 and labels["speaker1_dev_1"][29:49] == ["Á"] * 20


def test_a_directory_that_is_no_clone_is_an_error(tmp_path, call_main):
    done = call_main(mboshi, tmp_path, "--work_dir", tmp_path / "work")
    assert done.returncode == 1 and "expected a clone of the corpus" in done.stderr


def test_finished_stages_are_skipped(tmp_path, monkeypatch):
    def run(*command):
        raise AssertionError(command)

    monkeypatch.setattr(common, "run", run)
    make_folder(tmp_path / "data" / "speaker" / "dev", [20])
    common.prepare(tmp_path, tmp_path / "data" / "speaker" / "dev")
    model = common.model_file(tmp_path, "n3", 2)
    model.parent.mkdir(parents=True)
    model.touch()
    common.train(tmp_path, "n3", 2, "speaker", common.N3)
    (tmp_path / "features" / "n3_2").mkdir(parents=True)
    (tmp_path / "features" / "n3_2" / "finished").touch()
    common.extract(tmp_path, "n3_2", model)
    with pytest.raises(AssertionError, match="train.py"):
        common.train(tmp_path, "n3", 3, "speaker", common.N3)


def test_the_report_leads_with_what_training_adds(tmp_path, monkeypatch):
    """Every row is right in as many frames as its place in the table says, in every utterance."""
    names = ["log-Mel", "randomly initialised", "randomly initialised T-APC", "pretrained/"]
    names += [row for row, *_ in common.RUNS.values()]
    num_layers = {name: 4 if "T-APC" in name else 3 for name in names} | {"log-Mel": 1}
    correct = {
        name: {str(layer): [[40 + i, 40 + i]] * 3 for layer in range(num_layers[name])}
        for i, name in enumerate(names)
    }
    monkeypatch.setattr(
        common, "run_probe", lambda *_, **__: {"correct": correct, "frames": [100] * 2}
    )
    for split in ("train", "dev"):
        make_folder(tmp_path / "data" / "speaker" / split, [600] * 20)
    (tmp_path / "labels.txt").write_text("a A SIL\nb A A\n")
    (tmp_path / "train_ids.txt").write_text("c\n")
    (tmp_path / "test_ids.txt").write_text("a\nb\n")
    args = SimpleNamespace(work_dir=tmp_path, results_dir=tmp_path / "results", epochs=1)
    for name in ("mboshi", "results"):
        common.report(args, name, {}, title=name, speakers="two")
    text = (tmp_path / "results" / "mboshi.md").read_text()
    assert "train 2.0 (20), dev 2.0 (20)" in text and "25.0 % are silence" in text
    assert "epoch(s) of 2 steps" in text
    first = next(line for line in text.splitlines() if line.startswith("| APC, n = 3 − random"))
    assert first.split(" | ")[1:4] == ["+4.0 (+4.0 to +4.0)"] * 3
    assert "| randomly initialised − log-Mel | +1.0 (+1.0 to +1.0) |" in text
    [other] = [line for line in text.splitlines() if line.startswith("| T-APC, n = 3, cosine − A")]
    assert other.endswith(" | +1.0 (+1.0 to +1.0) |  |"), "APC has no layer 3"
    assert "| log-Mel | 40.0 (40.0 to 40.0) |" in text
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert [numbers[0] for numbers in rows["pretrained/"]] == [43, 43, 43]
    assert (tmp_path / "results" / "accuracy.png").stat().st_size > 10000
