"""The README's examples: the Python ones run, the commands' flags exist, and so do the files."""

import importlib
import re
import shlex
import subprocess

import pytest
import soundfile
from conftest import speech
from processes import ROOT

import load_pretrained
import prepare_data

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run_python(blocks):
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_python_examples_run_in_order(tmp_path, monkeypatch):
    (tmp_path / "path/to/this").mkdir(parents=True)
    (tmp_path / "path/to/this/folder").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    names = run_python(block for block in blocks("python") if "onnx" not in block)
    assert names["last"].shape == (2, 150, 512)
    assert names["mixture"].shape == (2, 150, 512)


def test_onnx_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    load_pretrained.main([str(ROOT / "pretrained/apc_3x512_n3.pt"), "--to_onnx", "apc.onnx"])
    names = run_python(block for block in blocks("python") if "onnx" in block)
    assert names["features"].shape == (1, 150, 512)


# Of each corpus in the table: its files (below what its flags name), how many utterances and
# speakers they hold, their rate.
CORPORA = {
    "LibriTTS": (["84/1/84_1_2_0.wav", "84/1/84_1_2_1.wav", "85/1/85_1.wav"], 3, 2, 24000),
    "VCTK": (["p225/p225_001_mic1.flac", "p226/p226_001_mic1.flac", "log.txt"], 2, 2, 48000),
    "TIMIT": (["DR1/FCJF0/SA1.WAV", "DR1/MDAB0/SA1.WAV", "DR2/FAEM0/SA1.WAV"], 3, 3, 16000),
    "Common Voice": (["common_voice_en_1.mp3", "common_voice_en_2.mp3"], 2, None, 32000),
    "AISHELL": (["S0002/BAC009S0002W0122.wav", "S0003/BAC009S0003W0121.wav"], 2, 2, 16000),
    "VoxCeleb": (["id10001/a/00001.wav", "id10001/b/00001.wav", "id2/a/00001.wav"], 3, 2, 16000),
    "a Kaldi data directory": (["rec.wav"], 2, 1, 16000),
    "long recordings": (["monday.wav", "tuesday.flac"], 4, None, 16000),
}


def test_every_corpus_of_the_table_is_prepared_by_its_command(tmp_path, monkeypatch, call_main):
    table = README.partition("| corpus | flags |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = re.findall(r"\| (.*?) \| `(.*?)`.*\|", table)
    assert [name for name, _ in rows] == list(CORPORA)
    monkeypatch.chdir(tmp_path)
    for name, flags in rows:
        files, utterances, speakers, rate = CORPORA[name]
        root = tmp_path / flags.split()[1]
        for number, file in enumerate(files):
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".txt":
                path.touch()
                continue
            sound = speech(20 if name == "long recordings" else 0.5, number, rate)
            soundfile.write(path, sound, rate, format="NIST" if name == "TIMIT" else None)
        if name == "TIMIT":
            (script,) = (block for block in blocks("bash") if "timit.utt2spk" in block)
            subprocess.run(script, shell=True, check=True)
        if name == "a Kaldi data directory":
            (root / "wav.scp").write_text("rec data/train/rec.wav\n")
            (root / "segments").write_text("a rec 0.0 0.2\nb rec 0.2 0.5\n")
            (root / "utt2spk").write_text("a anna\nb anna\n")
        argv = ["--save_dir", tmp_path / "out" / name, *shlex.split(flags), "--num_workers", 1]
        done = call_main(prepare_data, *argv)
        assert done.returncode == 0, done.stderr
        result = done.stdout.splitlines()[1]
        assert f": {utterances} utterances, " in result, result
        assert (f" {speakers} speakers, " in result) == (speakers is not None), result


def test_commands_parse():
    scripts = set()
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:python|torchrun .*?) ?\b([\w/]+)\.py\b(.*)", line)
            if match and not line.startswith("#"):
                scripts.add(match[1])
                words = shlex.split(match[2], comments=True)
                if words != ["..."]:
                    parser = importlib.import_module(match[1].replace("/", ".")).build_parser()
                    parser.parse_args([word for word in words if word != "..."])
    assert scripts >= {"prepare_data", "train", "extract_features", "load_pretrained"}


def test_links_and_listed_files_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    tree = README.partition("## Files")[2].partition("\n## ")[0]
    listed = re.findall(r"^    ([\w./]+) +\S", tree, flags=re.MULTILINE)
    assert len(links) > 2 and len(listed) > 8
    assert [path for path in [*links, *listed] if not (ROOT / path).exists()] == []
