"""The README's examples: the Python ones run, the commands' flags exist, and so do the files."""

import importlib
import re
import shlex

import pytest
import torch
from processes import ROOT

import load_pretrained
from apc_model import APCModel
from utils import RNNConfig, write_json

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def example_folder(path):
    """What the examples take to be there."""
    folder = path / "logs" / "apc.dir"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = APCModel(80, None, RNNConfig(80, 16, 3, 0.0, True))
    torch.save(model.state_dict(), folder / "apc__epoch_100.model")
    write_json({"rnn_residual": True}, folder / "config.json")
    (path / "path/to/this").mkdir(parents=True)
    (path / "path/to/this/folder").symlink_to(ROOT)


def run_python(blocks):
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_python_examples_run_in_order(tmp_path, monkeypatch):
    example_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = run_python(block for block in blocks("python") if "onnx" not in block)
    assert names["last"].shape == (2, 150, 16)
    assert names["mixture"].shape == (2, 150, 16)


def test_onnx_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    example_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    load_pretrained.main(["logs/apc.dir/apc__epoch_100.model", "--to_onnx", "apc.onnx"])
    names = run_python(block for block in blocks("python") if "onnx" in block)
    assert names["features"].shape == (1, 150, 16)


def test_commands_parse():
    scripts = set()
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:python|torchrun .*?) ?(\w+)\.py\b(.*)", line)
            if match and not line.startswith("#"):
                scripts.add(match[1])
                words = shlex.split(match[2], comments=True)
                if words != ["..."]:
                    parser = importlib.import_module(match[1]).build_parser()
                    parser.parse_args([word for word in words if word != "..."])
    assert scripts >= {"prepare_data", "train", "extract_features", "load_pretrained"}


def test_links_and_listed_files_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    tree = README.partition("## Files")[2].partition("\n## ")[0]
    listed = re.findall(r"^    ([\w./]+) +\S", tree, flags=re.MULTILINE)
    assert len(links) > 2 and len(listed) > 8
    assert [path for path in [*links, *listed] if not (ROOT / path).exists()] == []
