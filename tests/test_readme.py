"""README and docs: commands parse, flags and links exist, Python examples and corpus tables run."""

import argparse
import importlib
import re
import shlex
import subprocess

import pytest
import soundfile
import torch
from conftest import ROOT, speech

import prepare_data

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted(ROOT.glob("[!.]*/README.md")),
        *sorted((ROOT / "experiments/results").glob("*.md")),
    ]
}
SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in (".", "benchmarks", "experiments", "pretrained")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
]
# Flags of torchrun, TensorBoard, Kaldi, git, argparse and SLURM.
OTHERS = {
    *("--nproc_per_node", "--nnodes", "--node_rank", "--rdzv_backend", "--rdzv_endpoint"),
    *("--signals_to_handle", "--logdir", "--use-energy", "--htk-compat", "--depth", "--help"),
    *("--job-name", "--gres", "--cpus-per-task", "--time", "--signal"),
}


@pytest.fixture(autouse=True)
def import_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The current directory looks like a clone, and may be written to."""
    for path in ROOT.glob("[!.]*"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def commands(page):
    """(script, words) of each command that runs one of our scripts."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            script = next((word for word in words if word.endswith(".py")), None)
            if script:
                yield script, words[words.index(script) + 1 :]


class Found(Exception):
    """Carries the parser that a script's main() wanted to use."""


def find_parser(script):
    """The ArgumentParser of a script, a path below ROOT."""

    def parse_args(parser, *_):
        raise Found(parser)

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Found) as found:
            module.main()
    return found.value.args[0]


def parse(script, words):
    """Check a command line as the script itself does, combinations of flags included."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    parse_args = getattr(module, "parse_args", None) or find_parser(script).parse_args
    parse_args(words)


def table(page, head):
    """The rows of the table that starts with the line `head`: their first and second cells."""
    rows = PAGES[page].partition(f"{head}\n|---|---|\n")[2].partition("\n\n")[0]
    return re.findall(r"\| (.*?) \| `(.*?)` \|", rows)


# Commands and flags -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    for script, words in commands(page):
        parse(script, words)


def test_flags_for_ones_own_speech_parse():
    rows = table("README.md", "| your data | `prepare_data.py` |")
    assert len(rows) == 6
    for _, flags in rows:
        parse("prepare_data.py", shlex.split(flags))


def test_every_flag_exists():
    known = OTHERS
    for script in SCRIPTS:
        known = known | find_parser(script)._option_string_actions.keys()
    for page, text in PAGES.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))
        assert named - known == set(), page


# Links --------------------------------------------------------------------------------------------


def anchors(page):
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!https?:|\.\./\.\./actions)[^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_files_that_the_readme_names_exist():
    names = re.findall(r"`([\w/]+(?:\.py|/))`", PAGES["README.md"])
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []


# Examples -----------------------------------------------------------------------------------------


def run_python(blocks):
    names = {}
    for block in blocks:
        exec(compile(block, "example", "exec"), names)
    return names


def test_features_of_the_readme(clone):
    names = run_python(blocks("README.md", "python"))
    assert names["x"].shape == (390, 512)


def test_models_in_ones_own_code(clone):
    examples = blocks("docs/models.md", "python")
    names = run_python(block for block in examples if "onnx" not in block)
    assert names["last"].shape == names["mixture"].shape == (2, 390, 512)
    alone = names["features"](names["speech"])
    assert torch.allclose(names["last"][0], alone, atol=1e-5)


def test_onnx(clone):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (words,) = [words for _, words in commands("docs/models.md") if "--to_onnx" in words]
    importlib.import_module("load_pretrained").main(words)
    names = run_python(block for block in blocks("docs/models.md", "python") if "onnx" in block)
    assert names["features"].shape == (1, 150, 512)


# Of each corpus in the table: its files (below what its flags name), how many utterances and
# speakers they hold, their rate.
CORPORA = {
    "LibriSpeech": (["84/1/84-1-0000.flac", "84/1/84-1-0001.flac", "84/1/a.txt"], 2, 1, 16000),
    "LibriTTS": (["84/1/84_1_2_0.wav", "84/1/84_1_2_1.wav", "85/1/85_1.wav"], 3, 2, 24000),
    "MLS": (["123/9/123_9_0.flac", "456/8/456_8_0.flac"], 2, 2, 16000),
    "VCTK, first microphone": (
        [f"p{i}/p{i}_001_mic{mic}.flac" for i in (225, 226) for mic in (1, 2)],
        *(2, 2, 48000),
    ),
    "TIMIT": (["DR1/FCJF0/SA1.WAV", "DR1/MDAB0/SA1.WAV", "DR2/FAEM0/SA1.WAV"], 3, 3, 16000),
    "Common Voice": (["common_voice_en_1.mp3", "common_voice_en_2.mp3"], 2, None, 32000),
    "AISHELL": (["S0002/BAC009S0002W0122.wav", "S0003/BAC009S0003W0121.wav"], 2, 2, 16000),
    "VoxCeleb": (["id10001/a/00001.wav", "id10001/b/00001.wav", "id2/a/00001.wav"], 3, 2, 16000),
    "a Kaldi data directory": (["rec.wav"], 2, 1, 16000),
    "long recordings": (["monday.wav", "tuesday.flac"], 4, None, 16000),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_is_prepared_by_its_flags(name, tmp_path, monkeypatch, call_main):
    flags = shlex.split(dict(table("docs/data.md", "| corpus | flags |"))[name])
    files, utterances, speakers, rate = CORPORA[name]
    monkeypatch.chdir(tmp_path)
    root = tmp_path / flags[1]
    for number, file in enumerate(files):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.touch()
            continue
        sound = speech(20 if name == "long recordings" else 0.5, number, rate)
        soundfile.write(path, sound, rate, format="NIST" if name == "TIMIT" else None)
    if name == "TIMIT":
        (script,) = (block for block in blocks("docs/data.md", "bash") if "timit.utt2spk" in block)
        subprocess.run(script, shell=True, check=True)
    if name == "a Kaldi data directory":
        (root / "wav.scp").write_text("rec data/train/rec.wav\n")
        (root / "segments").write_text("a rec 0.0 0.2\nb rec 0.2 0.5\n")
        (root / "utt2spk").write_text("a anna\nb anna\n")
    done = call_main(prepare_data, "--save_dir", "out", *flags, "--num_workers", 1)
    assert done.returncode == 0, done.stderr
    assert f": {utterances} utterances, " in done.stdout
    assert (f" {speakers} speakers " in done.stdout) == (speakers is not None)


def test_every_corpus_of_the_table_is_tested():
    assert [name for name, _ in table("docs/data.md", "| corpus | flags |")] == [*CORPORA]
