"""The README's examples: the Python ones run, the commands' flags exist, and so do the files."""

import importlib
import re
import shlex

import torch
from processes import ROOT

from apc_model import APCModel
from utils import RNNConfig, write_json

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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
