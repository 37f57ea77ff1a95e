"""The experiments on data made up here: probes, error rates, the corpus' labels, the pictures."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_folder, run_script
from processes import error_line

from apc_model import APCModel
from experiments import evidence, make_corpus, phone_probe, speaker_probe
from formats.audio import Recording, read_fbank
from formats.fbank import fbank_settings
from utils import RNNConfig, UserError, save, write_json


def draw_labels(speakers, utterances, names="abc", seed=0):
    """{utterance id: 20 to 39 random labels}."""
    random = np.random.default_rng(seed)
    return {
        f"{speaker}-1-{number:04d}": random.choice(list(names), random.integers(20, 40)).tolist()
        for speaker in speakers
        for number in range(utterances)
    }


def write_labels(path, labels):
    path.write_text("".join(f"{utt_id} {' '.join(of)}\n" for utt_id, of in labels.items()))
    return path


def write_features(folder, labels, make, seed=0):
    """`make(labels of an utterance, generator)` -> its features, written as <utt_id>.pt."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for utt_id, of in labels.items():
        torch.save(make(of, generator), folder / f"{utt_id}.pt")
    return folder


def clusters(labels, generator):
    """Two layers (2, T, 3): noise, and noise around a point for each label."""
    centres = {"a": [3.0, 0, 0], "b": [0, 3.0, 0], "c": [0, 0, 300.0]}
    noise = torch.randn(2, len(labels), 3, generator=generator)
    return torch.stack([noise[0], 0.3 * noise[1] + torch.tensor([*map(centres.get, labels)])])


def xor(labels, generator):
    """a: the two coordinates have the same sign; b: opposite signs. No line separates them."""
    signs = torch.randint(0, 2, (len(labels),), generator=generator) * 2.0 - 1
    other = torch.tensor([1.0 if label == "a" else -1.0 for label in labels]) * signs
    noise = 0.2 * torch.randn(len(labels), 2, generator=generator)
    return torch.stack([signs, other], dim=1) + noise


def run_probe(probe, path, *flags):
    """Run a probe's main -> the error rates of its only row, {layer: [...]}."""
    flags += ("--json", path, "--names", "x", "--steps", 300)
    probe.main([*map(str, flags)])
    return json.loads(path.read_text())["x"]


# Phones -------------------------------------------------------------------------------------------


def test_linear_probe_finds_a_hyperplane(tmp_path, capsys):
    train, test = draw_labels(["1", "2"], 12), draw_labels(["3"], 6, seed=1)
    errors = run_probe(
        phone_probe,
        tmp_path / "out.json",
        *("--labels", write_labels(tmp_path / "labels.txt", train | test)),
        *("--train_features", write_features(tmp_path / "train", train, clusters)),
        *("--test_features", write_features(tmp_path / "test", test, clusters, seed=1)),
    )
    assert errors["layer 1"][0] > 50 and errors["layer 2"][0] < 1
    header, _, row = capsys.readouterr().out.strip().splitlines()
    assert header == "| frame error rate, % | layer 1 | layer 2 |"
    assert row.startswith("| x | ") and " | 0." in row


def test_xor_needs_the_hidden_layer(tmp_path):
    labels = draw_labels(["1", "2", "3", "4"], 12, names="ab")
    flags = ("--labels", write_labels(tmp_path / "labels.txt", labels), "--split_by", "speaker")
    flags += ("--train_features", write_features(tmp_path / "xor", labels, xor))
    linear = run_probe(phone_probe, tmp_path / "out.json", *flags)["features"][0]
    assert linear > 35
    assert run_probe(phone_probe, tmp_path / "out.json", *flags, "--mlp")["features"][0] < 5
    assert run_probe(phone_probe, tmp_path / "out.json", *flags)["features"][0] == linear  # seeded


@pytest.mark.parametrize("split_by", ["utterance", "speaker"])
def test_held_out_split(split_by):
    ids = list(draw_labels(["1", "2", "3", "4", "5"], 4))
    train, test = phone_probe.hold_out(ids, split_by, 0.2, seed=3)
    assert sorted(train + test) == ids and len(test) == 4
    if split_by == "speaker":
        assert len({utt_id[0] for utt_id in test}) == 1
        assert not {utt_id[0] for utt_id in test} & {utt_id[0] for utt_id in train}
        with pytest.raises(UserError, match="only one speaker"):
            phone_probe.hold_out(["1-1-0000", "1-1-0001"], split_by, 0.2, seed=3)
    assert (train, test) == phone_probe.hold_out(ids, split_by, 0.2, seed=3)


def test_standard_error_is_that_of_utterances():
    wrong, counts = np.array([10, 0, 30, 20]), np.array([50, 50, 50, 50])
    rate, standard_error = phone_probe.error_rate(wrong, counts)
    assert rate == 30
    # Of equally long utterances: that of a mean, with N in the place of N - 1.
    assert standard_error == pytest.approx(100 * np.std(wrong / counts) / 2)


def test_a_refusal_is_one_line(tmp_path, call_main):
    labels = draw_labels(["1", "2"], 3)
    folder = write_features(tmp_path / "features", labels, clusters)
    path = write_labels(tmp_path / "labels.txt", labels | {"1-1-0001": ["a"]})
    done = call_main(phone_probe, "--labels", path, "--train_features", folder)
    message = f"{folder}: utterance 1-1-0001: {len(labels['1-1-0001'])} frames, but 1 labels"
    assert error_line(done, "phone_probe.py").endswith(message)


@pytest.mark.parametrize(
    "text, message",
    [("1-1-0000 a b\n\n", ":2: exp"), ("1-1-0000\n", ":1: exp"), ("u a\nu b\n", "u: listed twice")],
)
def test_bad_labels_are_refused(tmp_path, text, message):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        phone_probe.read_labels(tmp_path / "labels.txt")


def test_bad_features_are_refused(tmp_path):
    labels = draw_labels(["1", "2"], 2)
    folder = write_features(tmp_path / "features", labels, clusters)
    with pytest.raises(UserError, match="no features"):
        phone_probe.read_features(tmp_path)
    with pytest.raises(UserError, match="utterance 1-1-0000: has no labels"):
        phone_probe.read_labelled(folder, {})
    with pytest.raises(UserError, match="utterance 1-1-0000: is in .*features too"):
        phone_probe.read_sets(folder, folder, labels, None)
    for value, message in ((torch.zeros(2, 7, 4), "shape"), ({"a": 1}, "expected a tensor")):
        torch.save(value, folder / "1-1-0001.pt")
        with pytest.raises(UserError, match=f"utterance 1-1-0001: {message}"):
            phone_probe.read_features(folder)


# Speakers -----------------------------------------------------------------------------------------


def test_equal_error_rate_of_known_scores():
    same = np.array([True] * 5 + [False] * 5)
    scores = np.arange(10.0)
    assert speaker_probe.equal_error_rate(scores[::-1], same) == 0
    assert speaker_probe.equal_error_rate(scores, same) == 1  # the wrong way round
    assert speaker_probe.equal_error_rate(np.zeros(10), same) == 0.5  # no knowledge
    # One of four pairs from one speaker scores below 0.5, and one of four from two above it.
    scores, same = np.array([4, 3, 2, 0, -1, -2, -3, 1.0]), np.array([True] * 4 + [False] * 4)
    assert speaker_probe.equal_error_rate(scores, same) == pytest.approx(0.25)
    with pytest.raises(UserError, match="pairs"):
        speaker_probe.equal_error_rate(scores, np.array([True] * 8))


def test_speaker_probe_finds_the_layer_that_knows(tmp_path):
    labels = {f"{speaker}-1-{i:04d}": [speaker] * 30 for speaker in "abc" for i in range(8)}
    folder = write_features(tmp_path / "features", labels, clusters)
    errors = run_probe(speaker_probe, tmp_path / "out.json", "--features", folder)
    assert errors["layer 1"][0] > 20 and 25 < errors["layer 1"][2] < 75
    assert errors["layer 2"] == [0, 0, 0]


def test_half_of_every_speaker_is_held_out():
    train, test = speaker_probe.split_speakers(draw_labels(["1", "2"], 6), seed=0)
    assert not set(train) & set(test)
    assert sorted(i[0] for i in train) == sorted(i[0] for i in test) == [*"111222"]
    with pytest.raises(UserError, match="speaker 1: 3 utterances"):
        speaker_probe.split_speakers(draw_labels(["1", "2"], 3), seed=0)


# The corpus ---------------------------------------------------------------------------------------


def test_frame_labels_by_hand():
    phones, ends = make_corpus.read_psdur("pau:0.020 aa:0.030 b:0.0325 iy:0.0600 \n")
    assert phones == ["pau", "aa", "b", "iy"]
    # Centres at 12.5, 22.5, 32.5, 42.5, 52.5, 62.5 ms; a phone that ends there is over.
    labels = make_corpus.frame_labels(phones, ends, 400 + 5 * 160 + 159)
    assert labels == ["pau", "aa", "iy", "iy", "iy", "iy"]


@pytest.mark.parametrize("text", ["", "pau", "pau:0.2 aa:x", "pau:0.3 aa:0.2", "pau:-0.1", "A:1.0"])
def test_unexpected_flite_output_is_refused(text):
    with pytest.raises(UserError, match="flite -psdur"):
        make_corpus.read_psdur(text)


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs flite")
def test_labels_fit_the_speech(tmp_path, monkeypatch):
    monkeypatch.setattr(make_corpus, "VOICES", {"kal16": 100, "slt": 165})
    monkeypatch.setattr(make_corpus, "SPEAKERS", {"train": 1, "dev": 1, "test": 1})
    for workers in ("1", "2"):
        make_corpus.main([str(tmp_path / workers), "--hours", "0.001", "--num_workers", workers])
    same = subprocess.run(["diff", "-r", tmp_path / "1", tmp_path / "2"], check=False)
    assert same.returncode == 0
    labels = phone_probe.read_labels(tmp_path / "1" / "labels.txt")
    paths = {path.stem: path for path in (tmp_path / "1").glob("*/*/*/*.flac")}
    assert paths.keys() == labels.keys() and len(labels) == 24
    louder = {shift: 0.0 for shift in (-8, 0, 8)}  # than pauses: the rest, by shifted labels
    for utt_id, path in paths.items():
        assert utt_id.split("-")[:2] == list(path.parts[-3:-1])  # LibriSpeech's tree
        frames = read_fbank(Recording("utt", path), fbank_settings())
        assert len(frames) == len(labels[utt_id])
        pauses = np.array(labels[utt_id]) == "pau"
        for shift in louder:
            energy = np.roll(frames.mean(axis=1), shift)
            louder[shift] += energy[~pauses].mean() - energy[pauses].mean()
    assert louder[0] > 24 and max(louder, key=louder.get) == 0
    with pytest.raises(UserError, match="not empty"):
        make_corpus.main([str(tmp_path / "1")])


def test_flite_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="apt-get install flite"):
        make_corpus.main([str(tmp_path / "corpus")])
    assert not (tmp_path / "corpus").exists()


# The report ---------------------------------------------------------------------------------------


def test_loss_curves():
    axes = evidence.plot_losses({1: [0.5, 0.4, 0.35], 10: [0.9, 0.8, 0.75]}).axes[0]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves["n = 1"] == [[1, 0.5], [2, 0.4], [3, 0.35]] and len(curves) == 2
    assert axes.get_xlabel() == "epoch" and "standard deviations" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["n = 1", "n = 10"]


def test_the_picture_is_the_model_s_prediction(tmp_path):
    tensors, _ = make_folder(tmp_path / "data" / "dev", [50], mel_dim=6, max_seq_len=60)
    model = APCModel(6, None, RNNConfig(6, 6, 2, 0.0, True)).eval()
    path = evidence.model_file(tmp_path, 3, 1)
    path.parent.mkdir(parents=True)
    save(model.state_dict(), path)
    write_json({"rnn_residual": True}, path.parent / "config.json")
    figure = evidence.predict_utterance(SimpleNamespace(epochs=1), tmp_path, 3)
    target, predicted = (axes.images[0] for axes in figure.axes[:2])
    frames = tensors["utt-000.pt"]
    with torch.no_grad():
        expected = torch.stack([model.stream(frames[None, : t + 1])[0][0, -1] for t in range(47)])
    np.testing.assert_allclose(target.get_array().T, frames[3:50])
    np.testing.assert_allclose(predicted.get_array().T, expected, atol=1e-5)
    assert target.get_clim() == predicted.get_clim()
    assert len(figure.axes) == 3  # the third is the one colour bar
    assert [figure.axes[1].get_xlabel(), figure.axes[1].get_ylabel()] == ["time (s)", "mel channel"]
    assert target.get_extent()[:2] == [0.03, 0.5]  # seconds


def test_claims_say_what_does_not_show():
    phones = {
        "log-Mel": {"features": [60, 1]},
        "untrained": {"layer 1": [52, 1], "layer 2": [51, 1]},
        "APC, n = 1": {"layer 1": [55, 1], "layer 2": [50, 1]},
        "APC, n = 3": {"layer 1": [51, 1], "layer 2": [54, 1]},
    }
    speakers = {name: {layer: [0, 0, 10] for layer in row} for name, row in phones.items()}
    lines = evidence.claims(phones, speakers, [1, 3]).splitlines()
    assert "log-Mel" in lines[0] and "**shows**" in lines[0]
    assert "untrained" in lines[1] and "**does not show**" in lines[1]
    assert "**1 of 2 models**" in lines[2] and "**0 of 2 models**" in lines[3]
    assert "**n = 1 is best, n = 3 worst**" in lines[4]


def test_every_third_utterance_without_its_padding_is_for_the_probes(tmp_path):
    tensors, lengths = make_folder(tmp_path / "train", [5, 6, 7, 8, 4], mel_dim=2, max_seq_len=12)
    write_json({}, tmp_path / "train" / "prepared.json")
    evidence.link_part(tmp_path / "train", tmp_path / "probe", max_frames=13)
    features, layers = phone_probe.read_features(tmp_path / "probe")
    assert list(features) == ["utt-000", "utt-003"] and layers == ["features"]
    for utt_id, frames in features.items():
        torch.testing.assert_close(frames, tensors[f"{utt_id}.pt"][None, : lengths[f"{utt_id}.pt"]])


def test_other_settings_are_refused(tmp_path):
    write_json({"minutes": 7}, tmp_path / "settings.json")
    with pytest.raises(UserError, match="--minutes was 7 .* and is 30 now"):
        evidence.main(["--work_dir", str(tmp_path)])
    assert not (tmp_path / "corpus").exists()


def test_matplotlib_is_asked_for(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('matplotlib')")
    done = run_script("experiments/evidence.py", env={"PYTHONPATH": str(tmp_path)})
    assert "pip install -r requirements-dev.txt" in error_line(done, "evidence.py")
