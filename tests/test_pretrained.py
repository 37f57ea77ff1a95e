"""The model in pretrained/, as it lies there."""

import json

import numpy as np
import torch
from conftest import run_script
from processes import ROOT

from load_pretrained import load_with_config

MODEL = ROOT / "pretrained" / "apc_3x512_n3.pt"
SAMPLE = ROOT / "samples" / "en-followme-sorry.flac"


def test_features_of_the_recording_are_what_they_were(tmp_path):
    """They are those of reference.PackedAPC in double precision: every 40th frame and 64th unit."""
    flags = ("--checkpoint", MODEL, "--audio", SAMPLE, "--save_dir", tmp_path, "--layer", "all")
    done = run_script("extract_features.py", *flags, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    features = torch.load(tmp_path / f"{SAMPLE.stem}.pt", weights_only=True)
    expected = json.loads((ROOT / "tests" / "pretrained_features.json").read_text())
    assert features.shape == (3, 390, 512)
    np.testing.assert_allclose(features[:, ::40, ::64], expected, rtol=0, atol=1e-5)


def test_it_is_small_and_says_how_it_was_made():
    model, config = load_with_config(MODEL)
    assert all(weight.dtype == torch.float32 for weight in model.state_dict().values())
    assert MODEL.stat().st_size < 9e6 and config["time_shift"] == 3 and config["rnn_residual"]
    (data,) = config["data"]
    assert (data["cmvn"], data["norm_vars"]) == ("utterance", False)
