"""The evidence's parts on data made up here: probes, equal-error rate, labels, corpus, report."""

import json
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_folder, run_script

from audio import FbankConfig, fbank, read_audio
from benchmarks import evidence, make_corpus, phone_probe, speaker_probe
from utils import UserError


@pytest.fixture(autouse=True)
def one_thread():
    """Small products wait for a second thread longer than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_features(folder, labels, make, seed=0):
    """`make(labels of an utterance, generator)` -> its features, written as <utt_id>.pt."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for utt_id, of_frames in labels.items():
        torch.save(make(of_frames, generator), folder / f"{utt_id}.pt")
    return folder


def write_labels(path, labels):
    path.write_text("".join(f"{utt_id} {' '.join(of)}\n" for utt_id, of in labels.items()))
    return path


def draw_labels(speakers, utterances, names="abc", seed=0):
    random = np.random.default_rng(seed)
    return {
        f"{speaker}-1-{number:04d}": random.choice(list(names), random.integers(20, 40)).tolist()
        for speaker in speakers
        for number in range(utterances)
    }


def clusters(of_frames, generator):
    """A point for each label, far from the others, and noise: (T, 4)."""
    centres = {"a": [3.0, 0, 0, 0], "b": [0, 3.0, 0, 0], "c": [0, 0, 300.0, 0]}
    noise = 0.3 * torch.randn(len(of_frames), 4, generator=generator)
    return torch.tensor([centres[label] for label in of_frames]) + noise


def xor(of_frames, generator):
    """a: the two coordinates have one sign; b: two signs. No line parts them. (T, 2)"""
    signs = torch.randint(0, 2, (len(of_frames),), generator=generator) * 2.0 - 1
    other = torch.tensor([1.0 if label == "a" else -1.0 for label in of_frames]) * signs
    noise = 0.2 * torch.randn(len(of_frames), 2, generator=generator)
    return torch.stack([signs, other], dim=1) + noise


def run_phone_probe(tmp_path, *flags):
    flags += ("--json", tmp_path / "out.json", "--steps", 300)
    phone_probe.main([*map(str, flags)])
    return json.loads((tmp_path / "out.json").read_text())


# Phones -------------------------------------------------------------------------------------------


def test_linear_probe_finds_what_a_hyperplane_parts(tmp_path, capsys):
    labels = draw_labels(["1", "2"], 12) | draw_labels(["3"], 6, seed=1)
    train = {utt_id: of for utt_id, of in labels.items() if utt_id[0] != "3"}
    test = {utt_id: of for utt_id, of in labels.items() if utt_id[0] == "3"}

    def two_layers(of_frames, generator):  # nothing in the lower one
        noise = torch.randn(len(of_frames), 4, generator=generator)
        return torch.stack([noise, clusters(of_frames, generator)]).half()

    figures = run_phone_probe(
        tmp_path,
        *("--labels", write_labels(tmp_path / "labels.txt", labels), "--names", "flat", "layers"),
        "--train_features",
        write_features(tmp_path / "flat-train", train, clusters),
        write_features(tmp_path / "layers-train", train, two_layers),
        "--test_features",
        write_features(tmp_path / "flat-test", test, clusters, seed=1),
        write_features(tmp_path / "layers-test", test, two_layers, seed=1),
    )
    assert figures["flat"]["as they are"][0] < 1
    assert figures["layers"]["layer 2"][0] < 1
    assert figures["layers"]["layer 1"][0] > 50
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| frame error, % | as they are | layer 1 | layer 2 |"
    assert table[2].startswith("| flat | 0.") and table[2].endswith("|  |  |")
    assert table[3].startswith("| layers |  | ")


def test_xor_needs_the_mlp(tmp_path):
    labels = draw_labels(["1", "2", "3", "4"], 12, names="ab")
    flags = ("--labels", write_labels(tmp_path / "labels.txt", labels), "--split_by", "speaker")
    flags += ("--train_features", write_features(tmp_path / "xor", labels, xor), "--names", "xor")
    linear = run_phone_probe(tmp_path, *flags)["xor"]["as they are"][0]
    assert linear > 35
    assert run_phone_probe(tmp_path, *flags, "--mlp")["xor"]["as they are"][0] < 5
    assert run_phone_probe(tmp_path, *flags)["xor"]["as they are"][0] == linear  # by its seed


def test_a_prepared_folder_is_cut_to_its_lengths(tmp_path):
    tensors, lengths = make_folder(tmp_path / "data", [5, 9, 3], mel_dim=2, max_seq_len=12)
    features, layers = phone_probe.read_features(tmp_path / "data")
    assert layers == ["as they are"]
    for name, length in lengths.items():
        torch.testing.assert_close(features[name.removesuffix(".pt")], tensors[name][None, :length])


@pytest.mark.parametrize("split_by", ["utterance", "speaker"])
def test_hold_out(split_by):
    ids = list(draw_labels(["1", "2", "3", "4", "5"], 4))
    train, test = phone_probe.hold_out(ids, split_by, 0.2, seed=3)
    assert sorted(train + test) == sorted(ids) and len(test) == 4
    if split_by == "speaker":
        assert len({utt_id[0] for utt_id in test}) == 1
        assert not {utt_id[0] for utt_id in train} & {utt_id[0] for utt_id in test}
        with pytest.raises(UserError, match="only one speaker"):
            phone_probe.hold_out(["1-1-0000", "1-1-0001"], split_by, 0.2, seed=3)
    assert (train, test) == phone_probe.hold_out(ids, split_by, 0.2, seed=3)


def test_error_rate_counts_frames_and_its_deviation_utterances():
    wrong, counts = np.array([10, 0, 30, 20]), np.array([50, 50, 50, 50])
    rate, deviation = phone_probe.error_rate(wrong, counts)
    assert rate == 30
    # Equally long utterances: the standard error of a mean, with N in the place of N - 1.
    assert deviation == pytest.approx(100 * np.std(wrong / counts) / 2)


def mismatch(labels):
    return labels | {"1-1-0001": labels["1-1-0001"][:-1]}


def unknown(labels):
    return {utt_id: of for utt_id, of in labels.items() if utt_id != "1-1-0001"}


@pytest.mark.parametrize(
    "change, message",
    [(mismatch, r"utterance 1-1-0001: \d+ frames, but \d+ labels"), (unknown, "has no labels")],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, change, message):
    labels = draw_labels(["1", "2"], 3)
    folder = write_features(tmp_path / "features", labels, clusters)
    path = write_labels(tmp_path / "labels.txt", change(labels))
    with pytest.raises(UserError, match=message):
        phone_probe.main(["--labels", str(path), "--train_features", str(folder)])


def test_a_refusal_is_one_line(tmp_path):
    labels = draw_labels(["1", "2"], 3)
    folder = write_features(tmp_path / "features", labels, clusters)
    path = write_labels(tmp_path / "labels.txt", mismatch(labels))
    flags = ("--labels", path, "--train_features", folder)
    result = run_script("benchmarks/phone_probe.py", *flags)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "utterance 1-1-0001" in result.stderr


@pytest.mark.parametrize(
    "text, message",
    [("1-1-0000 a b\n\n", ":2: expected"), ("1-1-0000\n", ":1: expected"), ("u a\nu b\n", ":2: ")],
)
def test_bad_label_files(tmp_path, text, message):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        phone_probe.read_labels(tmp_path / "labels.txt")


def test_bad_features(tmp_path):
    labels = draw_labels(["1", "2"], 2)
    path = str(write_labels(tmp_path / "labels.txt", labels))
    folder = write_features(tmp_path / "features", labels, clusters)
    with pytest.raises(UserError, match="no features"):
        phone_probe.read_features(tmp_path)
    both = ["--train_features", str(folder), "--test_features", str(folder)]
    with pytest.raises(UserError, match="utterance 1-1-0000: is in .*features too"):
        phone_probe.main(["--labels", path, *both])
    torch.save(torch.zeros(2, 7, 4), folder / "1-1-0001.pt")
    with pytest.raises(UserError, match="utterance 1-1-0001: shape"):
        phone_probe.read_features(folder)
    torch.save({"a": 1}, folder / "1-1-0001.pt")
    with pytest.raises(UserError, match="utterance 1-1-0001: expected a tensor"):
        phone_probe.read_features(folder)


# Speakers -----------------------------------------------------------------------------------------


def test_equal_error_rate_of_known_scores():
    same = np.array([True] * 5 + [False] * 5)
    scores = np.arange(10.0)
    assert speaker_probe.equal_error_rate(scores[::-1], same) == 0  # perfect
    assert speaker_probe.equal_error_rate(scores, same) == 1  # the wrong way round
    assert speaker_probe.equal_error_rate(np.zeros(10), same) == 0.5  # no knowledge
    # Pairs of one speaker score 4 3 2 0, of two -1 -2 -3 1: between 0 and 1 one of four each errs.
    scores, same = np.array([4, 3, 2, 0, -1, -2, -3, 1.0]), np.array([True] * 4 + [False] * 4)
    assert speaker_probe.equal_error_rate(scores, same) == pytest.approx(0.25)
    with pytest.raises(UserError, match="pairs"):
        speaker_probe.equal_error_rate(scores, np.array([True] * 8))


def test_equal_error_rate_of_drawn_scores():
    random = np.random.default_rng(0)
    same = random.random(20000) < 0.3
    assert abs(speaker_probe.equal_error_rate(random.standard_normal(20000), same) - 0.5) < 0.02
    # Two normal distributions of deviation 1, 2 apart: the normal distribution's value at -1.
    scores = random.standard_normal(20000) + 2 * same
    assert abs(speaker_probe.equal_error_rate(scores, same) - 0.1587) < 0.01


def test_speaker_probe(tmp_path, capsys):
    labels = draw_labels(["1", "2", "3"], 8)
    places = torch.eye(3)
    generator = torch.Generator().manual_seed(0)

    def noise(of_frames):
        return torch.randn(len(of_frames), 3, generator=generator)

    folder = tmp_path / "features"
    folder.mkdir()
    for utt_id, of in labels.items():  # the speaker shows in the lower layer alone
        told = places[int(utt_id[0]) - 1] + 0.3 * noise(of)
        torch.save(torch.stack([told, noise(of)]), folder / f"{utt_id}.pt")
    out = tmp_path / "out.json"
    flags = ["--features", str(folder), "--names", "x", "--json", str(out), "--steps", "300"]
    speaker_probe.main(flags)
    figures = json.loads(out.read_text())["x"]
    assert figures["layer 1"] == [0, 0, 0]
    assert figures["layer 2"][0] > 20 and 25 < figures["layer 2"][2] < 75
    assert "| x | 0.0 ± 0.0 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="speaker 1: 3 utterances"):
        speaker_probe.split_speakers([f"{s}-1-{i}" for s in "12" for i in range(3)], seed=0)


# The corpus ---------------------------------------------------------------------------------------


def test_frame_labels_by_hand():
    phones, ends = make_corpus.read_psdur("pau:0.020 aa:0.030 b:0.0325 iy:0.0600 \n")
    assert phones == ["pau", "aa", "b", "iy"]
    # Centres at 12.5, 22.5, 32.5, 42.5, 52.5, 62.5 ms; what ends there is over; the last goes on.
    labels = make_corpus.frame_labels(phones, ends, 400 + 5 * 160 + 159)
    assert labels == ["pau", "aa", "iy", "iy", "iy", "iy"]


@pytest.mark.parametrize("num_samples", [400, 559, 560, 16000, 16079])
def test_as_many_labels_as_the_fbank_has_frames(num_samples):
    frames = fbank(np.zeros(num_samples, np.float32), FbankConfig())
    assert len(make_corpus.frame_labels(["pau"], np.array([0.5]), num_samples)) == len(frames)


@pytest.mark.parametrize("text", ["", "pau", "pau:0.2 aa:x", "pau:0.3 aa:0.2", "pau:-0.1", "A:1.0"])
def test_bad_psdur(text):
    with pytest.raises(UserError, match="flite -psdur"):
        make_corpus.read_psdur(text)


def test_resample_divides_frequencies():
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    for factor in (0.85, 1.18):
        samples = make_corpus.resample(tone, factor)
        assert len(samples) == 16000 * factor
        peak = np.abs(np.fft.rfft(samples)).argmax() * 16000 / len(samples)
        assert peak == pytest.approx(1000 / factor, abs=2)
        assert np.abs(samples).max() == pytest.approx(1, abs=0.01)


def test_grammar_names_exist():
    random = np.random.default_rng(0)
    sentences = [make_corpus.sentence(random) for _ in range(300)]
    assert not any("{" in text or "}" in text for text in sentences)
    assert len(set(sentences)) > 295


def has_flite():
    try:
        make_corpus.check_flite()
    except UserError:
        return False
    return True


@pytest.mark.skipif(not has_flite(), reason="needs flite with its 16 kHz voices")
def test_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(make_corpus, "SPEAKERS", {"train": 1, "dev": 1, "test": 1})
    for name, workers in (("one", "1"), ("two", "2")):
        make_corpus.main([str(tmp_path / name), "--hours", "0.001", "--num_workers", workers])
    command = ["diff", "-r", str(tmp_path / "one"), str(tmp_path / "two")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    labels = phone_probe.read_labels(tmp_path / "one" / "labels.txt")
    paths = {path.stem: path for path in (tmp_path / "one").glob("*/*/*/*.flac")}
    assert paths.keys() == labels.keys() and len(labels) == 24
    louder = {shift: 0.0 for shift in (-8, 0, 8)}  # than pauses: the rest, by shifted labels
    for utt_id, path in paths.items():
        assert utt_id.split("-")[:2] == list(path.parts[-3:-1])  # LibriSpeech's tree
        assert soundfile.info(path).subtype == "PCM_16"
        frames = fbank(read_audio(path, 16000), FbankConfig())
        assert len(frames) == len(labels[utt_id])
        pauses = np.array(labels[utt_id]) == "pau"
        for shift in louder:
            energy = np.roll(frames.mean(axis=1), shift)
            louder[shift] += energy[~pauses].mean() - energy[pauses].mean()
    assert louder[0] > 24 and max(louder, key=louder.get) == 0
    with pytest.raises(UserError, match="not empty"):
        make_corpus.main([str(tmp_path / "one")])


def test_without_flite_there_is_a_word_of_advice(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="apt-get install flite"):
        make_corpus.check_flite()


# The report ---------------------------------------------------------------------------------------


def test_loss_plot_is_an_svg_with_a_curve_for_each_n():
    plot = evidence.loss_plot({1: [0.5, 0.4, 0.35], 10: [0.9, 0.8, 0.75]})
    curves = [
        [tuple(map(float, point.split(","))) for point in element.attrib["points"].split()]
        for element in xml.etree.ElementTree.fromstring(plot)
        if element.tag.endswith("polyline")
    ]
    assert [len(curve) for curve in curves] == [3, 3]
    assert curves[0][0][1] < curves[0][2][1] and curves[1][0][1] < curves[0][0][1]  # y goes down
    assert all(0 < x < 560 and 0 < y < 320 for curve in curves for x, y in curve)
    evidence.loss_plot({1: [0.5]})


def test_claims_say_what_does_not_show():
    phones = {
        "log-Mel": {"as they are": [60, 1]},
        "untrained": {"layer 1": [52, 1], "layer 2": [51, 1]},
        "APC, n = 1": {"layer 1": [55, 1], "layer 2": [50, 1]},
        "APC, n = 3": {"layer 1": [50, 1], "layer 2": [54, 1]},
    }
    speakers = {name: {key: [0, 0, 10] for key in row} for name, row in phones.items()}
    lines = evidence.claims({"linear": phones, "speaker": speakers}, [1, 3])
    assert "**shows**" in lines[0] and "**does not show**" in lines[1]
    assert "**1 of 2 models**" in lines[2] and "**0 of 2 models**" in lines[3]


def test_the_probes_part_of_a_folder(tmp_path):
    make_folder(tmp_path / "train", [100] * 10, mel_dim=2)
    (tmp_path / "train" / "prepared.json").write_text("{}")
    evidence.link_part(tmp_path / "train", tmp_path / "probe", max_frames=340)
    features, _ = phone_probe.read_features(tmp_path / "probe")
    assert list(features) == ["utt-000", "utt-003", "utt-006", "utt-009"]


def test_evidence_with_other_settings_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"minutes": 7}')
    with pytest.raises(UserError, match="--minutes was 7 .* and is 30 now"):
        evidence.main(["--work_dir", str(tmp_path)])
    assert shutil.which("flite") is None or not (tmp_path / "corpus").exists()
