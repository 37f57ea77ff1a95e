"""The model in pretrained/ as it is.

For a new model, `PYTHONPATH=. python tests/test_pretrained.py` writes pretrained_features.json.
"""

import json
from pathlib import Path

import numpy as np
import torch
from conftest import run_script
from reference import PackedAPC

from formats.audio import Recording, read_fbank
from formats.fbank import fbank_settings
from load_pretrained import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "pretrained" / "apc_3x512_n3.pt"
SAMPLE = ROOT / "samples" / "en-followme-sorry.flac"
EXPECTED = ROOT / "tests" / "pretrained_features.json"
PART = (slice(None), slice(0, None, 40), slice(0, None, 64))  # layers, frames, units


def reference_features():
    """The reference's features in double precision (layers, T, H)."""
    frames = read_fbank(Recording("x", str(SAMPLE)), fbank_settings()).astype(float)
    frames = torch.from_numpy(frames - frames.mean(axis=0))[None]
    model = PackedAPC(80, 512, 3, residual=True)
    model.load_state_dict(torch.load(MODEL, weights_only=True))
    with torch.no_grad():
        return model.double()(frames, torch.tensor([frames.size(1)]))[1][:, 0]


def test_features_of_the_recording_are_what_they_were(tmp_path):
    flags = ("--checkpoint", MODEL, "--audio", SAMPLE, "--save_dir", tmp_path, "--layer", "all")
    done = run_script("extract_features.py", *flags, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    features = torch.load(tmp_path / f"{SAMPLE.stem}.pt", weights_only=True)
    assert features.shape == (3, 390, 512)
    expected = json.loads(EXPECTED.read_text())
    np.testing.assert_allclose(features[PART], expected, rtol=0, atol=1e-5)


def test_it_is_small_and_says_how_it_was_made():
    model = load_pretrained(MODEL)
    assert all(weight.dtype == torch.float32 for weight in model.state_dict().values())
    assert MODEL.stat().st_size < 9e6
    assert model.config["time_shift"] == 3 and model.config["rnn_residual"]
    (data,) = model.config["data"]
    assert (data["cmvn"], data["norm_vars"]) == ("utterance", False)


if __name__ == "__main__":
    EXPECTED.write_text(json.dumps(reference_features()[PART].tolist()) + "\n")
