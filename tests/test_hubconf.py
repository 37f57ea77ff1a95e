"""hubconf.py, in a program that has modules of our names and no packages but torch, NumPy and tqdm;
and that this folder is not installed."""

import subprocess
import sys

import soundfile
import torch
from conftest import ROOT, speech
from test_load_pretrained import save_model

from load_pretrained import FeatureExtractor

PROGRAM = """
import copy, pickle, sys, torch

repo = sys.argv[1]
for name in ("tensorboard", "kaldiio", "simdjson", "kaldi_native_fbank", "soundfile",
             "safetensors", "onnx", "onnxruntime"):
    sys.modules[name] = None  # is not installed
for folder, file, error in (("broken", "w.pt", ImportError), (repo, "text.pt", ValueError)):
    try:
        torch.hub.load(folder, "apc", file, source="local", residual=True)
    except error:
        continue
    sys.exit(f"{file} of {folder} is loaded")
path = sys.path[:]
models = [torch.hub.load(repo, "apc", "w.pt", source="local", residual=True) for _ in range(2)]
assert sys.path == path
assert not {"apc_model", "datasets", "formats", "load_pretrained", "utils"} & {*sys.modules}
import apc_model, datasets, formats, load_pretrained, utils.sub
assert all(m.THEIRS for m in (apc_model, datasets, formats, load_pretrained, utils, utils.sub))
inputs, lengths, expected = torch.load("expected.pt")
for model in (*models, copy.deepcopy(models[0]), pickle.loads(pickle.dumps(models[0]))):
    assert not model.training
    torch.testing.assert_close(model(inputs, lengths)[0], expected, rtol=0, atol=1e-5)
"""

# Features, in this process and in a DataLoader's worker that inherits nothing.
FEATURES = """
import sys, torch
import utils, datasets, formats

class Recordings(torch.utils.data.Dataset):
    def __init__(self, extractor, model):
        self.extractor, self.model = extractor, model

    def __len__(self):
        return 1

    def __getitem__(self, index):
        import utils, datasets, formats
        assert utils.THEIRS and datasets.THEIRS and formats.THEIRS
        x = self.extractor("a.wav")
        return x, self.model(torch.zeros(1, 5, self.model.mel_dim), [5])[0].detach()

if __name__ == "__main__":
    load = lambda entry: torch.hub.load(sys.argv[1], entry, "w.pt", source="local", residual=True)
    dataset = Recordings(load("apc_features"), load("apc"))
    assert utils.THEIRS and sys.modules["utils"] is utils
    expected, here = torch.load("expected.pt"), dataset[0]
    torch.testing.assert_close(here[0], expected, rtol=0, atol=1e-5)
    options = {"num_workers": 1, "multiprocessing_context": "spawn"}
    ((x, predicted),) = torch.utils.data.DataLoader(dataset, **options)
    torch.testing.assert_close((x[0], predicted[0]), here, rtol=0, atol=1e-5)
"""


def write_their_modules(folder):
    names = ("apc_model", "datasets", "formats", "load_pretrained", "utils/__init__", "utils/sub")
    for name in names:  # the program's own
        (folder / f"{name}.py").parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text("THEIRS = True")


def run_program(text, folder):
    (folder / "program.py").write_text(text)
    command = [sys.executable, "program.py", str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_loads_next_to_modules_of_our_names(tmp_path):
    reference = save_model(tmp_path / "w.pt", residual=True)
    (tmp_path / "text.pt").write_text("no checkpoint")
    inputs, lengths = torch.randn(2, 9, reference.postnet.layer.out_channels), torch.tensor([9, 9])
    torch.save((inputs, lengths, reference(inputs, lengths)[0].detach()), tmp_path / "expected.pt")
    write_their_modules(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/hubconf.py").write_text((ROOT / "hubconf.py").read_text())
    (tmp_path / "broken/apc_model.py").write_text("import utils, nowhere")
    run_program(PROGRAM, tmp_path)


def test_features_here_and_in_a_worker_that_is_spawned(tmp_path):
    save_model(tmp_path / "w.pt", mel_dim=80, residual=True)
    soundfile.write(tmp_path / "a.wav", speech(0.5), 16000)
    extractor = FeatureExtractor(tmp_path / "w.pt", residual=True)
    torch.save(extractor(tmp_path / "a.wav"), tmp_path / "expected.pt")
    write_their_modules(tmp_path)
    run_program(FEATURES, tmp_path)


def test_pip_is_rejected_and_shows_what_to_do(tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--target", tmp_path / "there"]
    done = subprocess.run([*command, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "pip install -r requirements.txt" in done.stderr
    assert not (tmp_path / "there").exists()
