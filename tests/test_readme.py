"""The README's examples: the Python ones run, and the commands' flags exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from apc_model import APCModel
from checkpoint import write_json
from utils import RNNConfig

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """(script, its arguments) of every command of the README that runs one of the scripts."""
    found = []
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:python|torchrun .*?) ?(\w+)\.py\b(.*)", line)
            if match and not line.startswith("#"):
                found.append((match[1], match[2]))
    return found


def test_python_examples_run_in_order(tmp_path, monkeypatch):
    folder = tmp_path / "logs" / "apc.dir"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = APCModel(80, None, RNNConfig(80, 16, 3, 0.0, True))
    torch.save(model.state_dict(), folder / "apc__epoch_100.model")
    write_json({"rnn_residual": True}, folder / "config.json")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["last"].shape == (2, 150, 16)
    assert names["mixture"].shape == (2, 150, 16)


def test_there_are_commands_to_check():
    assert {script for script, _ in commands()} >= {
        "prepare_data",
        "train",
        "extract_features",
        "load_pretrained",
    }


@pytest.mark.parametrize("script, arguments", commands())
def test_commands_parse(script, arguments):
    words = shlex.split(arguments, comments=True)
    module = importlib.import_module(script)
    if words != ["..."]:
        module.build_parser().parse_args([word for word in words if word != "..."])
