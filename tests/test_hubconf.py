"""hubconf.py, in a program that has modules of our names and no packages but torch and NumPy; and
that this folder is not installed."""

import subprocess
import sys

import pytest
import torch
from processes import ONE_THREAD, ROOT
from test_load_pretrained import save_model

PROGRAM = """
import copy, pickle, sys, torch

repo, when = sys.argv[1:]
for name in ("tqdm", "tensorboard", "kaldiio", "simdjson", "kaldi_native_fbank", "soundfile",
             "safetensors", "onnx", "onnxruntime"):
    sys.modules[name] = None  # is not installed

def theirs():
    import apc_model, datasets, formats, load_pretrained, utils.sub
    return [apc_model, datasets, formats, load_pretrained, utils, utils.sub]

before, path = theirs() if when == "before" else None, sys.path[:]
for folder, file, error in (("broken", "w.pt", ImportError), (repo, "text.pt", ValueError)):
    try:
        torch.hub.load(folder, "apc", file, source="local", residual=True)
    except error:
        continue
    sys.exit(f"{file} of {folder} is loaded")
models = [torch.hub.load(repo, "apc", "w.pt", source="local", residual=True) for _ in range(2)]
assert sys.path == path
if before is None:
    assert not {"apc_model", "datasets", "formats", "load_pretrained", "utils"} & {*sys.modules}
    before = theirs()
assert theirs() == before and all(module.THEIRS for module in before)
inputs, lengths, expected = torch.load("expected.pt")
for model in (*models, copy.deepcopy(models[0]), pickle.loads(pickle.dumps(models[0]))):
    assert not model.training
    torch.testing.assert_close(model(inputs, lengths)[0], expected, rtol=0, atol=1e-5)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_loads_beside_modules_of_our_names(tmp_path, when):
    reference = save_model(tmp_path / "w.pt", residual=True)
    (tmp_path / "text.pt").write_text("no checkpoint")
    inputs, lengths = torch.randn(2, 9, reference.postnet.layer.out_channels), torch.tensor([9, 9])
    torch.save((inputs, lengths, reference(inputs, lengths)[0].detach()), tmp_path / "expected.pt")
    names = ("apc_model", "datasets", "formats", "load_pretrained", "utils/__init__", "utils/sub")
    for name in names:  # the program's own
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("THEIRS = True")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/hubconf.py").write_text((ROOT / "hubconf.py").read_text())
    (tmp_path / "broken/apc_model.py").write_text("import utils, nowhere")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py", ROOT, when],
        cwd=tmp_path,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_pip_is_refused_and_shows_what_to_do(tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--target", tmp_path / "there"]
    done = subprocess.run([*command, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "pip install -r requirements.txt" in done.stderr
    assert not (tmp_path / "there").exists()
