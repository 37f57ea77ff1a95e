"""train.py on tiny datasets: what it computes, writes and rejects, and how a run is resumed.

Runs are calls of main() in this process; what kills or interrupts a run is a process of its own.
"""

import argparse
import functools
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    BATCHES,
    EPOCHS,
    FULL,
    PLAIN,
    SEQ_LEN,
    STEPS,
    TRAIN,
    VALID,
    D,
    Hostile,
    assert_close_losses,
    call,
    epoch_losses,
    error_line,
    finished,
    last,
    make_folder,
    metrics,
    models,
    same,
    snapshot,
    succeeded,
    until,
    until_step,
)
from reference import OPTIMIZERS, PackedAPC, evaluate, frame_loss, padded_loss, train_epoch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import datasets
import train
import utils
from apc_model import APCModel, LossSums
from load_pretrained import load_pretrained
from train import Progress

FULL_MODEL = dict(hidden=8, layers=2, prenet_layers=1, residual=True)
TRANSFORMER = [
    *("--rnn_type", "transformer", "--rnn_num_layers", 2, "--rnn_hidden_size", 64),
    *("--time_shift", 2, "--batch_size", 4, "--learning_rate", 0.001, "--epochs", EPOCHS),
    *("--lr_schedule", "cosine", "--warmup_steps", 5, "--rnn_dropout", 0.1),
    *("--device", "cpu", "--load_data_workers", 0),
]


def epoch_lines(text):
    number = r"(\d+\.\d{5})"
    line = rf"INFO - Epoch: (\d+) Training Loss: {number} Validation Loss: {number}\n"
    return [(int(k), float(a), float(b)) for k, a, b in re.findall(line, text)]


def tensorboard(path):
    (log,) = path.glob("*.tb_log")
    return EventAccumulator(str(log), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(path):
    """What TensorBoard shows: {tag: [(step, value)]}; without the speed, which never repeats."""
    events = tensorboard(path)
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith("frames per second")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def images(path):
    events = tensorboard(path)
    return [image for tag in events.Tags()["images"] for image in events.Images(tag)]


def warnings_of(process):
    return [line for line in process.stderr.splitlines() if "warning" in line.lower()]


def stacked(utterances):
    """[(frames, length)] -> a batch (B, SEQ_LEN, D), lengths."""
    return torch.stack([x for x, _ in utterances]), torch.tensor([n for _, n in utterances])


def is_finite(value):
    """Whether all floats and tensors within hold finite numbers."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(is_finite(item) for item in value.values())
    return not isinstance(value, float) or math.isfinite(value)


def assert_same_run(path, reference):
    """Bit-identical weights and losses, each step and epoch once, and no other files."""
    ours, theirs = models(path), models(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in sorted(ours) if not same(ours[name], theirs[name])] == []
    assert same(last(path)["model"], last(reference)["model"])
    steps, epochs = metrics(path)
    assert [entry["step"] for entry in steps] == list(range(STEPS))
    assert [entry["epoch"] for entry in epochs] == list(range(1, EPOCHS + 1))
    assert (steps, epochs) == metrics(reference)
    names = [{file.name.replace(p.stem, "") for file in p.iterdir()} for p in (path, reference)]
    assert names[0] == names[1]
    # An epoch may be there twice if the run was killed after showing and before saving it.
    assert {tag: sorted(set(pairs)) for tag, pairs in scalars(path).items()} == scalars(reference)


def wait_for_the_next_second(path):
    """TensorBoard reads a run's files in the order of their names, which hold the second."""
    until(lambda: not list(path.glob(f"*.tb_log/*.{int(time.time())}.*")))


# Fixtures -----------------------------------------------------------------------------------------


@pytest.fixture
def run(place, monkeypatch):
    """run(name, *flags) -> the finished run of that name in this process, its folder."""

    def run(name, *flags, pictures=False):
        where, path = place(name)
        wait_for_the_next_second(path)
        with monkeypatch.context() as patch:
            if not pictures:
                patch.setattr(train.RunFolder, "draw", lambda *_: None)
            return call(train, *PLAIN, *where, *flags), path

    return run


@pytest.fixture
def fed(monkeypatch):
    """What models are fed during the test: a list of (training, inputs, lengths)."""
    calls, forward = [], APCModel.forward

    def recording(self, inputs, lengths, need_reps=True):
        predicted, reps = forward(self, inputs, lengths, need_reps)
        assert reps is None, "representations that nobody reads cost memory"
        calls.append((self.training, inputs.clone(), lengths.clone()))
        return predicted, reps

    monkeypatch.setattr(APCModel, "forward", recording)
    return calls


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """A folder of splits, those of the corpus and others; and the utterances of two parts."""
    root = tmp_path_factory.mktemp("folders")
    for split in corpus.path.iterdir():
        (root / split.name).symlink_to(split)
    parts = {}
    for name, lengths, seed in (("part-a", TRAIN[:8], 2), ("part-b", TRAIN[8:], 3)):
        tensors, table = make_folder(root / name, lengths, D, SEQ_LEN, seed, prefix=name)
        parts |= {utt: (tensors[utt], table[utt]) for utt in table}
    make_folder(root / "all-short", [2, 1, 2], D, SEQ_LEN)
    make_folder(root / "nine-bins", [20, 30], D + 1, SEQ_LEN)
    make_folder(root / "long", [20, 30], D, SEQ_LEN + 1)
    return SimpleNamespace(path=root, parts=parts)


@pytest.fixture
def data(corpus, tmp_path):
    """A copy of the corpus that a test may change."""
    shutil.copytree(corpus.path, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing stops, with dropout, prenet and workers: its process, folder, flags."""
    flags, path = place("first.try")
    flags = [*FULL, *flags, "--load_data_workers", 2]
    return SimpleNamespace(process=succeeded(call(train, *flags)), path=path, flags=flags)


@pytest.fixture(scope="module")
def whole_transformer(place):
    """The same of a Transformer, with dropout, warm-up and a cosine schedule."""
    flags, path = place("transformer")
    return SimpleNamespace(process=succeeded(call(train, *TRANSFORMER, *flags)), path=path)


@pytest.fixture(scope="module")
def stopped(place):
    """A run that --max_steps ended in the middle of its second epoch."""
    flags, path = place("stopped")
    process = succeeded(call(train, *FULL, *flags, "--max_steps", 8))
    return SimpleNamespace(process=process, path=path)


@pytest.fixture
def copy(stopped, place, tmp_path):
    """A copy of the stopped run: the flags that resume it, its folder."""
    flags, path = place("stopped", store=tmp_path)
    shutil.copytree(stopped.path, path)
    return [*FULL, *flags, "--resume"], path


# What a run computes ------------------------------------------------------------------------------

# name: (flags, the reference model's arguments, and how it is trained)
FOLLOW = {
    "gru-residual-adam": (
        "--rnn_num_layers 3 --learning_rate 0.01",
        dict(hidden=8, layers=3, residual=True),
        dict(shift=2, clip=1.0, batch=4, optimizer="adam", lr=0.01),
    ),
    "two-splits-prenet-sgd-clipped": (
        "--prenet_num_layers 2 --rnn_hidden_size 12 --time_shift 3 --batch_size 3"
        " --optimizer sgd --learning_rate 0.5 --clip_thresh 0.05"
        " --no_bucketing --train_split part-a part-b",
        dict(hidden=12, layers=2, prenet_layers=2, residual=True),
        dict(shift=3, clip=0.05, batch=3, optimizer="sgd", lr=0.5),
    ),
    "lstm-rmsprop-valid-frames": (
        "--rnn_type lstm --prenet_num_layers 1 --optimizer rmsprop --mask_padding",
        dict(hidden=8, layers=2, prenet_layers=1, residual=True, rnn_type="lstm"),
        dict(shift=2, clip=1.0, batch=4, optimizer="rmsprop", lr=0.01, kind=frame_loss),
    ),
    "one-batch-adadelta": (  # the original gives adadelta no rate: torch's default, 1.0
        "--rnn_num_layers 1 --rnn_hidden_size 16 --time_shift 5 --batch_size 32"
        " --optimizer adadelta",
        dict(hidden=16, layers=1, residual=True),
        dict(shift=5, clip=1.0, batch=32, optimizer="adadelta", lr=1.0),
    ),
}
FOLLOWED = 15  # epochs


def batches_fed(calls, utterances, shift):
    """The training batches of a run from what its model was fed, whole and padded, by epoch.

    Utterances are recognised by their frames, so the order that the run drew does not matter,
    but each must come exactly once an epoch.
    """
    epochs, names = [[]], []
    for training, inputs, lengths in calls:
        if not training:
            continue
        if len(names) == len(utterances):
            epochs.append([])
            names = []
        for frames, length in zip(inputs, lengths.tolist()):
            names += [
                name
                for name, (x, n) in utterances.items()
                if n == length + shift and torch.equal(frames[:length], x[:length])
            ]
        assert len(set(names)) == len(names), "an utterance came twice in an epoch"
        epochs[-1].append(stacked([utterances[name] for name in names[-len(lengths) :]]))
    assert len(names) == len(utterances), "utterances are missing from an epoch"
    return epochs


@pytest.mark.parametrize("name", FOLLOW)
def test_losses_follow_the_originals(run, corpus, folders, fed, name):
    """From a run's own initial weights and batches the packed, padded loop gives its losses."""
    flags, model, options = FOLLOW[name]
    where = ["--librispeech_path", folders.path, "--epochs", FOLLOWED]
    process, path = run(name, *where, *flags.split())
    succeeded(process)
    options = dict(options)
    batch, optimizer, lr = (options.pop(key) for key in ("batch", "optimizer", "lr"))
    shift, kind = options["shift"], options.get("kind", padded_loss)

    utterances = folders.parts if "part-a" in flags else corpus.train
    epochs = batches_fed(fed, utterances, shift)
    assert len(epochs) == FOLLOWED
    for batches in epochs:
        sizes = sorted((len(lengths) for _, lengths in batches), reverse=True)
        assert sizes == [batch] * (21 // batch) + [21 % batch] * (21 % batch > 0)
    orders = {str([x[:, 0, 0] for x, _ in batches]) for batches in epochs}
    assert len(orders) == FOLLOWED if "--no_bucketing" in flags else len(orders) > 1 or batch > 21

    reference = PackedAPC(D, **model)
    reference.load_state_dict(models(path)["epoch_0"], strict=True)
    optimizer = OPTIMIZERS[optimizer](reference.parameters(), lr=lr)
    expected = {"train": [], "steps": [], "norms": [], padded_loss: [], frame_loss: []}
    valid = [stacked(corpus.valid.values())]
    for batches in epochs:
        loss, steps, norms = train_epoch(reference, optimizer, batches, **options)
        expected["train"].append(loss)
        expected["steps"] += steps
        expected["norms"] += norms
        for loss in (padded_loss, frame_loss):
            expected[loss].append(evaluate(reference, valid, shift, loss))
    assert expected["train"][-1] < 0.97 * expected["train"][0], "nothing was learnt"
    assert options["clip"] == 1 or min(expected["norms"]) > options["clip"], "nothing was clipped"

    shown = {tag: [value for _, value in pairs] for tag, pairs in scalars(path).items()}
    assert shown["training loss (epoch-wise)"] == pytest.approx(expected["train"], rel=5e-4)
    # Whichever loss is trained, both are there, the other one below.
    other, group = (frame_loss, "without") if kind is padded_loss else (padded_loss, "with")
    for tag, loss in (("", kind), (f"{group} padding/", other)):
        assert shown[f"{tag}validation loss (epoch-wise)"] == pytest.approx(
            expected[loss], rel=5e-4
        )
    assert shown["training loss (step-wise)"] == pytest.approx(expected["steps"], rel=1e-3)
    assert shown["while training/gradient norm"] == pytest.approx(expected["norms"], rel=2e-2)
    lines = zip(range(1, FOLLOWED + 1), expected["train"], expected[kind])
    for line, truth in zip(epoch_lines(process.stderr), lines, strict=True):
        assert line == pytest.approx(truth, rel=5e-4, abs=1e-5)


def test_validation_is_without_dropout(whole, corpus):
    """Each epoch's validation loss is that of its saved model in eval mode."""
    model = PackedAPC(D, **FULL_MODEL)
    valid = [stacked(corpus.valid.values())]
    for epoch, (_, loss) in enumerate(epoch_losses(whole.path), start=1):
        model.load_state_dict(models(whole.path)[f"epoch_{epoch}"])
        assert loss == pytest.approx(evaluate(model, valid, 2), rel=1e-4)


def test_another_seed_gives_other_weights_and_another_order(run, fed):
    """The same seed gives bit-identical runs: see those that are resumed."""
    start, order = [], []
    for seed in (0, 1):
        process, path = run(f"seed-{seed}", "--seed", seed, "--epochs", 1)
        succeeded(process)
        start.append(models(path)["epoch_0"])
        order.append([lengths.tolist() for training, _, lengths in fed if training])
        fed.clear()
    assert not any(torch.equal(start[0][name], start[1][name]) for name in start[0])
    assert order[0] != order[1]


def test_accumulated_gradients_equal_those_of_the_whole_batch(run):
    """The batches are of 12 and 9, whose parts differ in frames."""
    flags, paths = ["--batch_size", 12, "--epochs", 2, "--mask_padding"], []
    for parts in (1, 4):
        process, path = run(f"parts-{parts}", *flags, "--accumulate_steps", parts)
        succeeded(process)
        paths.append(path)
    whole, parts = (models(path)["epoch_2"] for path in paths)
    assert all(torch.allclose(whole[key], parts[key], atol=1e-5, rtol=0) for key in whole)
    assert_close_losses(*paths, tolerance=1e-5)


def test_bf16_on_a_cpu(run, one):
    """Close to single precision, and yet not the same; the weights stay in single precision."""
    process, path = run("bf16", "--precision", "bf16")
    succeeded(process)
    assert_close_losses(path, one["padded"], tolerance=0.03)
    assert epoch_losses(path) != epoch_losses(one["padded"])
    assert {weight.dtype for weight in last(path)["model"].values()} == {torch.float32}
    assert {line["overflow_steps"] for line in metrics(path)[0]} == {0}


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_fp16_on_a_cpu_is_rejected_before_anything_is_made(run, cell):
    process, path = run("fp16", "--precision", "fp16", "--rnn_type", cell)
    assert "--precision fp16 needs a GPU" in error_line(process, "train.py")
    assert not path.exists()


@pytest.mark.parametrize("flags, is_slow", [("fma avx2", True), ("avx512_bf16 amx_bf16", False)])
def test_bf16_on_a_cpu_without_such_instructions_is_a_warning(monkeypatch, caplog, flags, is_slow):
    monkeypatch.setattr(train, "open", lambda *_, **__: io.StringIO(flags), raising=False)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/proc/cpuinfo")
    train.check_precision(argparse.Namespace(precision="bf16"), torch.device("cpu"))
    assert ("no bf16 instructions" in caplog.text) == is_slow


@pytest.mark.parametrize("flags, expected", [(["--tf32"], "tf32"), ([], "ieee")])
def test_tensorfloat32_is_used_only_where_it_is_asked_for(run, flags, expected):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.rnn, torch.backends.cudnn.conv
    utils.set_numerics(tf32=not flags)
    succeeded(run(f"numerics-{expected}", "--max_steps", 1, *flags)[0])
    assert {backend.fp32_precision for backend in backends} == {expected}


# The learning rate --------------------------------------------------------------------------------


def rates(path):
    return [line.get("learning_rate") for line in metrics(path)[0]]


def test_cosine_after_the_warmup(whole_transformer):
    """Rises to 0.001 in five steps, and falls to 0 in the other 13."""
    expected = [0.001 * k / 6 for k in range(1, 6)]
    expected += [0.001 * (1 + math.cos(math.pi * k / 13)) / 2 for k in range(13)]
    assert rates(whole_transformer.path) == pytest.approx(expected)
    shown = scalars(whole_transformer.path)["while training/learning rate"]
    assert shown == [(step, pytest.approx(rate)) for step, rate in enumerate(expected)]
    assert expected[-1] < 0.02 * max(expected)


def test_cosine_over_max_steps_and_adadeltas_own_rate(run):
    flags = ["--lr_schedule", "cosine", "--max_steps", 4, "--optimizer", "adadelta"]
    process, path = run("adadelta-cosine", *flags)
    succeeded(process)
    assert rates(path) == pytest.approx([1, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0.1464466])


def test_constant_rate(run, whole):
    assert set(rates(whole.path)) == {None}, "what never changes is in config.json"
    process, path = run("warmup", "--warmup_steps", 3, "--max_steps", 6)
    succeeded(process)
    assert rates(path) == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_other_epochs_on_resume_change_the_cosine_and_say_so(run):
    flags = ["--lr_schedule", "cosine", "--max_steps"]
    succeeded(run("longer", *flags, 6)[0])
    process, path = run("longer", *flags, 6, "--epochs", 5, "--resume")
    (line,) = warnings_of(succeeded(process))[1:]  # the first is about short utterances
    assert "--epochs was 3 and is 5 now" in line and "cosine" in line


# What a run writes --------------------------------------------------------------------------------


def test_checkpoints_are_state_dicts(whole):
    names = sorted(file.name for file in whole.path.glob("*.model"))
    assert names == [f"first.try__epoch_{k}.model" for k in range(EPOCHS + 1)]
    expected = PackedAPC(D, **FULL_MODEL).state_dict()
    for state in models(whole.path).values():
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}
        assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in state.values())


@pytest.mark.parametrize("kind", ["whole", "whole_transformer"])
def test_last_checkpoint_loads_as_a_model(request, kind):
    path = request.getfixturevalue(kind).path
    model = load_pretrained(str(path / "last.ckpt"))
    assert model.rnn_residual == (kind == "whole")
    assert same(model.state_dict(), models(path)[f"epoch_{EPOCHS}"])


def test_epoch_lines_are_in_the_log_and_on_the_console(whole):
    console = epoch_lines(whole.process.stderr)
    assert [k for k, _, _ in console] == list(range(1, EPOCHS + 1))
    assert epoch_lines((whole.path / "first.try").read_text()) == console


LOSSES = ["training loss (step-wise)", "training loss (epoch-wise)", "validation loss (epoch-wise)"]


def test_tensorboard_and_metrics_agree(whole):
    """Both have the original's scalars, one a step or an epoch, and some more."""
    shown, (steps, epochs) = scalars(whole.path), metrics(whole.path)
    for tag in (*LOSSES, "while training/gradient norm", "while training/skipped steps"):
        lines, key = epochs if "epoch" in tag else steps, tag.split("/")[-1].split(" (")[0]
        expected = [line[key.replace(" ", "_")] for line in lines]
        assert [step for step, _ in shown[tag]] == list(range(len(lines)))
        assert [value for _, value in shown[tag]] == pytest.approx(expected)
    speeds = tensorboard(whole.path).Scalars("while training/frames per second")
    assert len(speeds) == STEPS and all(event.value > 0 for event in speeds)


@pytest.mark.parametrize("name", ["whole", "one-masked"])
def test_tensorboard_opens_with_the_losses(whole, one, name):
    """It makes a group of what stands before a slash, sorts them, and opens the first two."""
    path = whole.path if name == "whole" else one["masked"]
    tags = tensorboard(path).Tags()
    tags = sorted([*tags["scalars"], *tags["images"]])
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in tags))
    assert groups[:3] == sorted(LOSSES)
    assert len(groups) == 6
    curves = [tuple(values) for values in scalars(path).values()]
    assert len(set(curves)) == len(curves), "one curve is drawn twice"


def test_flags_and_config(whole):
    """The papers' defaults; config.json has every flag, and the data's feature dimension."""
    defaults = dict(
        **dict(prenet_num_layers=0, prenet_dropout=0.0, rnn_num_layers=3, rnn_hidden_size=512),
        **dict(rnn_dropout=0.0, rnn_type="gru", rnn_residual=False, optimizer="adam", epochs=100),
        **dict(batch_size=32, learning_rate=0.0001, time_shift=1, clip_thresh=1.0, seed=0),
        **dict(librispeech_path="./librispeech_data/preprocessed", train_split=["train-clean-360"]),
        **dict(valid_split="dev-clean", experiment_name="foo", store_path="./logs"),
        **dict(lr_schedule="constant", warmup_steps=0),
    )
    flags = vars(train.parse_args([]))
    assert {flag: flags[flag] for flag in defaults} == defaults
    config = json.loads((whole.path / "config.json").read_text())
    assert set(config) == {*flags, "data", "version"}
    assert (config["feature_dim"], config["rnn_dropout"], config["rnn_residual"]) == (D, 0.3, True)


def test_the_log_says_beforehand_what_the_run_is_about_to_do(whole):
    before = whole.process.stderr.split("Epoch: 1 ")[0].replace(",", "")
    parameters = sum(p.numel() for p in PackedAPC(D, **FULL_MODEL).parameters())
    for words in (
        *(f"{len(TRAIN)} utterances", f"{sum(TRAIN)} frames", "hours", f"{len(VALID)} utterances"),
        *(f"parameters {parameters}", "cpu", "fp32", "L1", "padding included", "train-clean-360"),
        *("dev-clean", f"{EPOCHS} epochs of {BATCHES} steps", "batch size 4"),
        *("learning rate 0.01", "n = 2"),
    ):
        assert words in before, f"{words} is not in:\n{before}"
    (warning,) = warnings_of(whole.process)
    assert re.search(r"\b2 of 23 utterances", warning)


def test_a_log_file_gets_a_line_of_progress_every_30_seconds(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert utils.progress_bar(total=1).mininterval == 30
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert utils.progress_bar(total=1).mininterval == 0.1


# The picture in TensorBoard -----------------------------------------------------------------------


def test_picture_of_each_epoch(whole):
    pictures = images(whole.path)
    assert [image.step for image in pictures] == list(range(EPOCHS))
    assert len({image.encoded_image_string for image in pictures}) == EPOCHS
    assert {(image.width, image.height) for image in pictures} == {(600, 450)}


LONG_IDS = ["M104_2015-09-08_ABCDE_" * 4, "ABCDEFGHKM" * 6, "abiayi_2015-09-08_" * 4, "a_b$c$"]


@pytest.mark.parametrize("utt_id", LONG_IDS)
def test_long_utterance_id_is_inside_the_picture(utt_id):
    args = train.parse_args(["--time_shift", "3", "--rnn_hidden_size", "8"])
    args.feature_dim = D
    dataset = [(torch.randn(SEQ_LEN, D), SEQ_LEN, utt_id)]
    figure = train.draw_prediction(train.build_model(args), dataset, args)
    figure.canvas.draw()
    title = figure.axes[0].title
    box = title.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    assert title.get_text().startswith(utt_id[:20])
    assert utt_id[-20:] + "\n" in title.get_text()


def test_picture_that_cannot_be_drawn_is_one_warning(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("latex could not be found")

    monkeypatch.setattr(train, "draw_prediction", fail)
    process, path = run("no-picture", pictures=True)
    (line,) = [line for line in warnings_of(succeeded(process)) if "picture" in line]
    assert "latex could not be found" in line
    assert len(models(path)) == EPOCHS + 1


def test_notebooks_backend_and_a_users_matplotlibrc_do_not_matter(start, place, tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    backend = "module://matplotlib_inline.backend_inline"  # is not installed here
    env = {"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    flags, path = place("notebook")
    process = finished(start("train.py", *PLAIN, *flags, "--epochs", 1, env=env))
    assert not any("picture" in line for line in warnings_of(succeeded(process)))
    assert len(images(path)) == 1


# What a run starts from, and what it rejects ------------------------------------------------------

REJECTED = {  # name: (flags, words of the error)
    "init-lstm": (
        "--init_checkpoint {}/fitting --rnn_type lstm",
        "--rnn_type is lstm, but the file's is gru",
    ),
    "init-hidden-size": (
        "--init_checkpoint {}/fitting --rnn_hidden_size 12",
        "--rnn_hidden_size is 12, but the file's is 8",
    ),
    "init-residual": (
        "--init_checkpoint {}/run/run.model --prenet_num_layers 1 --time_shift 3",
        "--rnn_residual is True, but the file's is False",
    ),
    "init-s3prl": ("--init_checkpoint {}/s3prl", "another model in s3prl"),  # D = H, as the data
    "init-hostile": ("--init_checkpoint {}/hostile", "open, which is not plain data"),
    "init-nowhere": ("--init_checkpoint {}/nowhere", "{}/nowhere: No such file or directory"),
    "bins": ("--feature_dim 9", "its frames have 8 bins, but --feature_dim is 9"),
    "bins-of-valid": ("--valid_split nine-bins", "9 bins, but {folders}/train-clean-360 has 8"),
    "length": ("--train_split train-clean-360 long", "differ in max_seq_len"),
    "no-split": (
        "--train_split train-clean-360 nowhere",
        "nowhere: no such folder: there is: --train_split all-short or --train_split dev-clean or ",
    ),
    "short": ("--train_split all-short", "none of the 3 utterances is longer than the time shift"),
}
WRONG_FLAGS = ["--rnn_dropout 1", "--learning_rate nan"]
WRONG_FLAGS += ["--clip_thresh 0", "--batch_size 0", "--device tpu", "--max_steps 1.5"]
WRONG_FLAGS += [f"--experiment_name {name}" for name in ("..", "a/b", "last.ckpt")]
WRONG_FLAGS += [
    "--rnn_residual --rnn_type transformer",
    "--prenet_num_layers 1 --rnn_type transformer",
    "--rnn_hidden_size 100 --rnn_type transformer",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of models; that of run/ is known not to be residual, from data of one kind."""
    here = tmp_path_factory.mktemp("weights")
    torch.manual_seed(11)
    fitting = PackedAPC(D, 8, 2).state_dict()
    torch.save(fitting, here / "fitting")
    torch.save({f"module.{k}": v for k, v in fitting.items()}, here / "parallel")
    s3prl = {k.replace("rnns.", "rnn_layers.").replace(".layer", ""): v for k, v in fitting.items()}
    torch.save(s3prl, here / "s3prl")
    torch.save({"model": Hostile(here / "marker")}, here / "hostile")
    (here / "run").mkdir()
    torch.save(PackedAPC(D, 8, 2, prenet_layers=1).state_dict(), here / "run/run.model")
    flags = dict(rnn_residual=False, prenet_num_layers=1, rnn_num_layers=2, rnn_hidden_size=8)
    flags |= dict(
        feature_dim=D, rnn_type="gru", time_shift=9, data=[{"source": "audio", "cmvn": "speaker"}]
    )
    (here / "run/config.json").write_text(json.dumps(flags))
    return here


@pytest.mark.parametrize("name", ["fitting", "parallel"])
def test_init_checkpoint_gives_the_initial_weights(run, weights, name):
    """Of a state dict that says nothing of residual connections: the flags define the model."""
    process, path = run(name, "--init_checkpoint", weights / name, "--epochs", 1)
    succeeded(process)
    given, found = torch.load(weights / "fitting", weights_only=True), models(path)
    assert same(found["epoch_0"], given)
    assert not any(torch.equal(found["epoch_1"][k], given[k]) for k in given)


def test_init_checkpoint_of_data_made_otherwise_is_a_warning(call_main, place, data, weights):
    flags = [flag for flag in PLAIN if flag != "--rnn_residual"]
    flags += [*place("other-data")[0], "--librispeech_path", data, "--max_steps", 1]
    flags += ["--init_checkpoint", weights / "run/run.model", "--prenet_num_layers", 1]
    prepared = {"source": "audio", "cmvn": "utterance"}
    (data / "train-clean-360/prepared.json").write_text(json.dumps(prepared))
    process = succeeded(call_main(train, *flags))
    (line,) = [line for line in warnings_of(process) if "cmvn" in line]
    assert "utterance" in line and "trained on" in line and "speaker" in line
    assert any("trained with n = 9, but" in line for line in warnings_of(process))
    assert f"started from {weights}/run/run.model" in process.stderr


@pytest.mark.parametrize("name", REJECTED)
def test_what_cannot_be_trained_is_rejected(run, folders, weights, name):
    """And leaves the name free: else the corrected command would be rejected, too."""
    flags, words = (text.format(weights, folders=folders.path) for text in REJECTED[name])
    process, path = run(name, "--librispeech_path", folders.path, *flags.split())
    assert words in error_line(process, "train.py")
    assert not path.exists()
    assert not (weights / "marker").exists()  # of the hostile file


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_wrong_flags_are_rejected(call_main, flags):
    line = error_line(call_main(train, *flags.split()), "train.py", status=2)
    assert flags.split()[0] in line


def test_existing_run_is_not_overwritten(call_main, whole):
    before = snapshot(whole.path)
    process = call_main(train, *whole.flags)
    assert "first.try.dir: this experiment exists" in error_line(process, "train.py")
    assert snapshot(whole.path) == before


def test_run_of_a_name_is_rejected_while_another_one_works_there(call_main, copy):
    flags, path = copy
    lock = utils.lock_folder(path)
    line = error_line(call_main(train, *flags), "train.py")
    assert f"{path}: in use by another process" in line
    lock.release()
    succeeded(call_main(train, *flags, "--max_steps", 9))


# Killed -------------------------------------------------------------------------------------------

KILL_AT_RENAME = """
rename, names = os.replace, []

def replace(source, target):
    names.append(os.path.basename(target))
    if names == {names}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = replace
"""
START = ["config.json", "{}__epoch_0.model", "last.ckpt"]
KILLED = {  # name: (what the run renames, killed before the last of them; epochs that are saved)
    "killed-unsaved": (START, None),
    "killed-between-epochs": ([*START, *["last.ckpt"] * 2, "{}__epoch_1.model", "last.ckpt"], 0),
}


def test_run_killed_at_a_rename_resumes_exactly(run, start, place, whole):
    processes = {}
    for name, (names, _) in KILLED.items():
        patch = KILL_AT_RENAME.format(names=[file.format(name) for file in names])
        flags = [*FULL, *place(name)[0], "--save_steps", 3]
        processes[name] = start("train.py", *flags, patch=patch)
    for name, (_, epoch) in KILLED.items():
        assert finished(processes[name]).returncode == -signal.SIGKILL
        path = place(name)[1]
        assert (path / "last.ckpt").exists() == (epoch is not None)
        assert epoch is None or last(path)["progress"]["epoch"] == epoch
        succeeded(run(name, *FULL, "--resume")[0])
        assert_same_run(path, whole.path)


HANG_AFTER_9_STEPS = """
from apc_model import APCModel
calls, forward = [], APCModel.forward

def hanging(*args, **kw):
    calls.append(0)
    # An epoch's steps, its validation and picture, and the fourth step of the second epoch.
    time.sleep(1000 if len(calls) == 6 + 2 + 1 + 4 else 0)
    return forward(*args, **kw)

APCModel.forward = hanging
"""


def test_run_killed_between_steps_resumes_exactly(start, place, whole, whole_transformer):
    """A GRU with prenet, dropout and workers, killed with these; a Transformer with a cosine."""
    runs = {"gru": (FULL, whole.path), "t-apc": (TRANSFORMER, whole_transformer.path)}
    processes = {}
    for name, (flags, _) in runs.items():
        flags = [*flags, *place(f"killed-{name}")[0], "--save_steps", 4]
        processes[name] = start("train.py", *flags, patch=HANG_AFTER_9_STEPS)
    for name, (flags, reference) in runs.items():
        where, path = place(f"killed-{name}")
        until_step(8, path, processes[name])
        os.killpg(processes[name].pid, signal.SIGKILL)
        assert finished(processes[name]).returncode == -signal.SIGKILL
        assert last(path)["progress"]["step"] == 8
        with open(path / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 1, "st')
        succeeded(call(train, *flags, *where, "--resume"))
        assert_same_run(path, reference)


# Signals ------------------------------------------------------------------------------------------


def send_signal(monkeypatch, number, function, call):
    """Send this process a signal when `function` of train.py is called for that time."""
    count, original = itertools.count(1), getattr(train, function)

    def sending(*args, **kw):
        if next(count) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kw)

    monkeypatch.setattr(train, function, sending)


@pytest.mark.parametrize(
    "number, function, step, workers",
    [
        (signal.SIGTERM, "train_step", 1, 0),
        (signal.SIGINT, "train_step", 6, 2),
        (signal.SIGUSR1, "train_step", 9, 0),
        (signal.SIGHUP, "evaluate", 6, 0),
    ],
)
def test_signal_saves_and_the_run_resumes_exactly(
    run, monkeypatch, capfd, whole, number, function, step, workers
):
    name = f"{number.name}-{step}"
    with monkeypatch.context() as patch:
        send_signal(patch, number, function, step if function == "train_step" else 1)
        process, path = run(name, *FULL, "--load_data_workers", workers)
    assert process.returncode == 128 + number, process.stderr
    assert (
        f"\n{number.name}: finishing the step, saving; press Ctrl-C again" in capfd.readouterr().err
    )
    assert f"stopped by {number.name} after {step} steps" in process.stderr
    assert last(path)["progress"]["step"] == len(metrics(path)[0]) == step
    succeeded(run(name, *FULL, "--resume")[0])
    assert_same_run(path, whole.path)


def test_signal_that_nohup_ignores_stays_ignored(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send_signal(monkeypatch, signal.SIGHUP, "train_step", 2)
        succeeded(run("nohup", "--epochs", 1)[0])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_to_the_whole_process_group(run, start, place, whole):
    """As SLURM sends it: the workers ignore it, the run saves and is resumed."""
    flags, path = place("group")
    process = start("train.py", *FULL, *flags, "--epochs", 1000)
    until_step(2, path, process)
    os.killpg(process.pid, signal.SIGTERM)
    process = finished(process)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in process.stderr
    assert last(path)["progress"]["step"] == len(metrics(path)[0])
    steps = len(metrics(path)[0])
    assert metrics(path)[0][:STEPS] == metrics(whole.path)[0][:steps]


def is_alive(group):
    """Whether there is a process in a process group."""
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


def test_second_ctrl_c_ends_a_run_whose_data_hang(start, place):
    """At once, with its workers."""
    hang = "import datasets\ndatasets.Utterances.__getitem__ = lambda *_: time.sleep(1000)"
    places = [place(f"hang-{workers}") for workers in (0, 1)]
    processes = [
        start("train.py", *PLAIN, *flags, "--load_data_workers", workers, patch=hang)
        for workers, (flags, _) in enumerate(places)
    ]
    until(lambda: all((path / "last.ckpt").exists() for _, path in places), *processes)
    time.sleep(0.5)  # to reach the loader
    for process in processes:
        os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert [process.poll() for process in processes] == [None, None], "the first one waits"
    for process in processes:
        os.killpg(process.pid, signal.SIGINT)
        ended = finished(process, timeout=5)
        assert ended.returncode == 128 + signal.SIGINT and "Traceback" not in ended.stderr
        until(lambda group=process.pid: not is_alive(group), timeout=5)


# --max_steps, --resume, --keep_epochs -------------------------------------------------------------


def test_max_steps_ends_cleanly(stopped, whole):
    assert last(stopped.path)["progress"]["step"] == 8
    assert sorted(models(stopped.path)) == ["epoch_0", "epoch_1"]
    steps, epochs = metrics(stopped.path)
    assert steps == metrics(whole.path)[0][:8]
    assert [(entry["epoch"], entry["step"]) for entry in epochs] == [(1, 6)]
    assert len(epoch_lines(stopped.process.stderr)) == 2, "the cut epoch's losses are shown"


def test_max_steps_and_resume(call_main, copy, whole):
    """Stopped in an epoch, again at the same step, at an epoch's end, there again, and then not.

    What may differ from run to run does differ.
    """
    flags, path = copy
    for limit, workers in ((8, 2), (12, 0), (12, 2)):
        before, saved = metrics(path), last(path)["progress"]["step"]
        others = ["--load_data_workers", workers, "--save_steps", 3, "--epochs", 2]
        wait_for_the_next_second(path)
        succeeded(call_main(train, *flags, "--max_steps", limit, *others))
        assert last(path)["progress"]["step"] == max(limit, saved)
        assert limit > saved or metrics(path) == before
    for _ in range(2):  # the second time nothing is left to do
        wait_for_the_next_second(path)
        succeeded(call_main(train, *flags))
        assert_same_run(path, whole.path)
        assert [image.step for image in images(path)] == list(range(EPOCHS))


def damage(path, how):
    file = path / "last.ckpt"
    content = file.read_bytes()
    saved = torch.load(file, weights_only=True)
    if how == "flipped bit":  # in the middle of a weight
        at = content.index(saved["model"]["rnns.0.weight_hh_l0"].numpy().tobytes()) + 401
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "hostile":
        torch.save(saved | {"progress": Hostile(path / "marker")}, file)
    elif how == "only weights":
        torch.save(saved["model"], file)


NOT_RESUMED = {  # name: (flags, what the error names)
    **{how: ([], "last.ckpt") for how in ("flipped bit", "hostile", "only weights")},
    "other batches": (["--batch_size", 5], "--batch_size"),
    "other loss": (["--mask_padding"], "--mask_padding"),
    "other split": (["--train_split", "dev-clean"], "--train_split"),
    "other data": (["--librispeech_path", "{}"], "data"),
    "other masks": (["--accumulate_steps", 2], "--accumulate_steps was 1"),
}


@pytest.mark.parametrize("name", NOT_RESUMED)
def test_what_does_not_fit_is_not_resumed(call_main, copy, corpus, tmp_path, name):
    """And stays as it was: also, nothing in a checkpoint is executed."""
    # As many utterances and frames: the lengths of two have changed.
    make_folder(tmp_path / "train-clean-360", [*TRAIN[:-2], 23, 16], D, SEQ_LEN)
    (tmp_path / "dev-clean").symlink_to(corpus.path / "dev-clean")
    flags, path = copy
    damage(path, name)
    before = snapshot(path)
    others, words = NOT_RESUMED[name]
    others = [str(flag).format(tmp_path) for flag in others]
    assert words in error_line(call_main(train, *flags, *others), "train.py")
    assert snapshot(path) == before


def test_without_dropout_accumulate_steps_may_change(run):
    """It is what the advice about memory asks for."""
    succeeded(run("memory", "--max_steps", 1)[0])
    succeeded(run("memory", "--max_steps", 2, "--resume", "--accumulate_steps", 2)[0])


def test_split_is_the_same_with_a_slash(call_main, copy):
    splits = ["--train_split", "train-clean-360/", "--valid_split", "./dev-clean/"]
    succeeded(call_main(train, *copy[0], *splits, "--max_steps", 9))


def test_data_prepared_otherwise_are_not_resumed(run, data):
    file = data / "train-clean-360/prepared.json"
    flags = ["--librispeech_path", data, "--resume", "--max_steps"]
    prepared = {"source": "audio", "path": "a", "cmvn": "speaker", "norm_vars": False}
    file.write_text(json.dumps(prepared))
    succeeded(run("otherwise", *flags, 2)[0])
    file.write_text(json.dumps(prepared | {"norm_vars": True}))
    line = error_line(run("otherwise", *flags, 4)[0], "train.py")
    assert "settings) were [21, 382, " in line and "last.ckpt" in line
    file.write_text(json.dumps(prepared | {"path": "moved"}))
    succeeded(run("otherwise", *flags, 4)[0])


def test_keep_epochs_keeps_the_newest_and_the_best(run, tmp_path):
    """Learned: the frame after next has the other sign. In the validation data it never has."""
    for split, factor in (("train-clean-360", -1.0), ("dev-clean", 1.0)):
        tensors, _ = make_folder(tmp_path / split, [SEQ_LEN] * 8, D, SEQ_LEN)
        signs = factor ** (torch.arange(SEQ_LEN)[:, None] // 2)
        for name, frames in tensors.items():
            torch.save(signs.expand_as(frames).contiguous(), tmp_path / split / name)
    flags = ["--librispeech_path", tmp_path, "--keep_epochs", 2, "--resume", "--epochs"]
    process, path = run("keep", *flags, 3)
    assert sorted(models(path)) == ["epoch_1", "epoch_2", "epoch_3"]
    succeeded(run("keep", *flags, 6)[0])
    validation = [loss for _, loss in epoch_losses(path)]
    assert min(validation) == validation[0]
    assert sorted(models(path)) == ["epoch_1", "epoch_5", "epoch_6"]
    # Without a checkpoint to resume from, the models must not be overwritten.
    (path / "last.ckpt").unlink()
    before = snapshot(path)
    assert "last.ckpt" in error_line(run("keep", *flags, 7)[0], "train.py")
    assert snapshot(path) == before


# Data that fail to load ---------------------------------------------------------------------------


def test_loader_that_times_out_is_one_line(run, monkeypatch):
    monkeypatch.setattr(datasets, "TIMEOUT", 1)
    monkeypatch.setattr(datasets.Utterances, "__getitem__", lambda *_: time.sleep(2))
    flags = ["--load_data_workers", 1, "--batch_size", 1]
    line = error_line(run("timeout", *flags)[0], "train.py")
    assert "within 1 s" in line and "--load_data_workers 0" in line


def test_killed_worker_is_one_line(run, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(datasets.Utterances, "__getitem__", die)
    line = error_line(run("killed-worker", "--load_data_workers", 1)[0], "train.py")
    assert "DataLoader worker" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_utterance_that_cannot_be_used_is_one_line(run, data, workers):
    file = data / "train-clean-360/utt-004.pt"
    torch.save(torch.zeros(SEQ_LEN, D + 1), file)
    flags = ["--librispeech_path", data, "--load_data_workers", workers]
    line = error_line(run(f"bad-utterance-{workers}", *flags)[0], "train.py")
    assert line.startswith(f"train.py: error: {file}: expected a tensor of shape (30, 8)")
    file.unlink()
    file.mkdir()
    line = error_line(run(f"folder-{workers}", *flags)[0], "train.py")
    assert str(file) in line and "Is a directory" in line


def test_one_core_is_no_reason_for_pytorch_to_warn(run, monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    succeeded(run("one-core", "--load_data_workers", 2, "--max_steps", 1)[0])
    assert not [w for w in recwarn if "worker" in str(w.message)]


# A full disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epoch_0.model", "tb_log"])
def test_file_that_may_not_grow_is_one_line(run, name):
    """As with a full disk or a quota. TensorBoard's is the first to reach 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 5000 if name == "epoch_0.model" else 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        process, path = run(f"limited-{name}", pictures=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file = f"__{name}: " if name == "epoch_0.model" else ""
    assert f"{file}File too large" in error_line(process, "train.py").replace("[Errno 27] ", "")
    assert not list(path.glob("*.tmp"))


# Divergence ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_data(corpus, tmp_path_factory):
    """{name: folder} whose training split has values that are not finite.

    "input": in the middle of one utterance. "target": in its last frame, which is a target only,
    as no utterance is longer: the gradient is finite. "all": in the last frame of every utterance.
    """
    folders = {}
    for name, bad in (("input", [2]), ("target", [2]), ("all", range(len(TRAIN)))):
        folders[name] = tmp_path_factory.mktemp("bad") / name
        shutil.copytree(corpus.path, folders[name])
        for number in bad:
            file = folders[name] / f"train-clean-360/utt-{number:03d}.pt"
            frames = torch.load(file, weights_only=True)
            if name == "input":
                frames[TRAIN[number] // 2, 0] = math.nan
            else:
                frames[TRAIN[number] - 1, 0] = math.inf
            torch.save(frames, file)
    return folders


DIVERGING = {  # name: (flags, words of the error)
    "bad-data": ("--save_steps 1", "20 steps in a row had no finite loss"),
    "loss": ("--learning_rate 1e38 --optimizer sgd --save_steps 1 --epochs 20", "in a row"),
    "weights": ("--learning_rate 1e38 --optimizer rmsprop --save_steps 1", "are not finite"),
}


def bad_steps(path):
    return [entry["step"] for entry in metrics(path)[0] if entry["training_loss"] is None]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # GradScaler looks at gradients only
@pytest.mark.parametrize("data", ["input", "target"])
def test_bad_batch_is_skipped_and_counted(run, bad_data, data, precision):
    name = f"bad-{data}-{precision}"
    flags = ["--librispeech_path", bad_data[data], "--precision", precision, "--epochs", 2]
    process, path = run(name, *flags)
    assert "utt-002" in succeeded(process).stderr
    bad = bad_steps(path)
    assert [step // BATCHES for step in bad] == [0, 1], "one in every epoch"
    counts = [sum(b <= step for b in bad) for step in range(2 * BATCHES)]
    assert [line["skipped_steps"] for line in metrics(path)[0]] == counts
    assert all(math.isfinite(loss) for losses in epoch_losses(path) for loss in losses)
    assert all(is_finite(model) for model in models(path).values())
    if data == "target":  # the step leaves no trace, neither in the weights nor in the optimizer
        runs = [run(f"{name}-{step}", *flags, "--max_steps", step) for step in (bad[0], bad[0] + 1)]
        before, after = (last(path) for process, path in runs if succeeded(process))
        assert after["progress"]["skipped"] == before["progress"]["skipped"] + 1
        assert same(before["model"], after["model"])
        states = [saved["optimizer"]["state"].values() for saved in (before, after)]
        assert states[0] and all(same(old, new) for old, new in zip(*states))


def test_first_step_may_be_skipped(run, bad_data, recwarn):
    """PyTorch would warn of a schedule that steps before the optimizer."""
    succeeded(run("first-step", "--librispeech_path", bad_data["all"], "--max_steps", 2)[0])
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@pytest.mark.parametrize("name", DIVERGING)
def test_divergence_ends_the_run_and_saves_only_finite_numbers(run, bad_data, name):
    flags, words = DIVERGING[name]
    data = ["--librispeech_path", bad_data["all"], "--epochs", 4] if name == "bad-data" else []
    process, path = run(name, *data, *flags.split())
    assert words in error_line(process, "train.py")
    assert all(is_finite(model) for model in models(path).values())
    assert is_finite(last(path)["model"]) and is_finite(last(path)["optimizer"])
    if name == "bad-data":
        steps, epochs = metrics(path)
        assert len(steps) == steps[-1]["skipped_steps"] == 20
        start = models(path)["epoch_0"]
        assert all(same(model, start) for model in [*models(path).values(), last(path)["model"]])
        # No utterance was learned from: 0 would pass for a perfect model.
        assert {entry["training_loss"] for entry in epochs} == {None}
        assert not re.search(r"Training Loss: 0\.0", process.stderr)


def test_overflows_of_the_loss_scale_are_counted_apart():
    """GradScaler finds its scale by them; at a scale of 1 it is the gradient that is not finite."""
    good, bad = LossSums(3.0, 1.0, 2, 20), LossSums(math.inf, 1.0, 2, 20)
    progress = Progress()
    for sums, norm, scale in (
        *[(good, math.inf, 2.0**16)] * 3,
        (good, 0.5, 2.0**13),
        *[(bad, math.inf, 2.0**13)] * 2,
        (good, math.nan, 1.0),
    ):
        progress.count_step(sums, norm, scale)
    assert (progress.step, progress.batch, progress.sums) == (7, 7, good)
    assert (progress.overflows, progress.skipped, progress.skipped_in_a_row) == (3, 3, 3)


def test_overflows_do_not_end_a_run(run, monkeypatch, data):
    """Of values this large, about 32 steps overflow, until the scale is halved often enough."""
    for file in (data / "train-clean-360").glob("*.pt"):
        torch.save(1e10 * torch.load(file, weights_only=True), file)
    init = torch.amp.GradScaler.__init__
    huge = functools.partialmethod(init, init_scale=2.0**127)
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", huge)
    flags = ["--librispeech_path", data, "--precision", "bf16", "--epochs", 7]
    process, path = run("overflows", *flags)
    end = metrics(succeeded(process) and path)[0][-1]
    assert 20 < end["overflow_steps"] < 40 and end["skipped_steps"] == 0
    assert not same(models(path)["epoch_0"], models(path)["epoch_7"])
    assert "skipped" not in process.stderr.split("Epoch: 1 ")[1]


def test_validation_utterance_that_is_not_finite_is_named(run, data):
    """It is the first one, which is drawn all the same."""
    file = data / "dev-clean/utt-000.pt"
    frames = torch.load(file, weights_only=True)
    frames[2, 3], frames[4, 5] = math.nan, math.inf
    torch.save(frames, file)
    process, path = run("bad-valid", "--librispeech_path", data, "--epochs", 1, pictures=True)
    assert re.search(r"validation: .*utt-000", succeeded(process).stderr)
    assert len(images(path)) == 1


# The Transformer ---------------------------------------------------------------------------------


def test_transformer_in_half_precision_and_from_a_checkpoint(place):
    """Autocast is close to single precision; --init_checkpoint gives the initial weights."""
    runs = {}
    for name, flags in (("t-fp32", []), ("t-bf16", ["--precision", "bf16"])):
        where, runs[name] = place(name)
        flags = [*TRANSFORMER, *where, *flags, "--rnn_dropout", 0, "--epochs", 1]
        succeeded(call(train, *flags))
    assert_close_losses(runs["t-bf16"], runs["t-fp32"], tolerance=0.03)
    assert epoch_losses(runs["t-bf16"]) != epoch_losses(runs["t-fp32"])
    where, path = place("t-init")
    start = runs["t-fp32"] / "t-fp32__epoch_1.model"
    succeeded(call(train, *TRANSFORMER, *where, "--init_checkpoint", start, "--epochs", 0))
    assert same(models(path)["epoch_0"], models(runs["t-fp32"])["epoch_1"])
    deeper = [*where, "--experiment_name", "t-deeper", "--rnn_num_layers", 3]
    process = call(train, *TRANSFORMER, *deeper, "--init_checkpoint", start)
    assert "--rnn_num_layers is 3, but the file's is 2" in error_line(process, "train.py")


# CUDA ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda(run, one, bad_data, precision):
    """Close to a CPU's losses; a resumed run close to a whole one; a bad batch is skipped."""
    flags = ["--device", "cuda", "--precision", precision]
    whole = run(f"cuda-{precision}", *flags)[1]
    for limit in (8, 13, STEPS):
        process, path = run(f"cuda-{precision}-cut", *flags, "--resume", "--max_steps", limit)
        succeeded(process)
    assert_close_losses(path, whole)
    assert_close_losses(whole, one["padded"], tolerance=0.05)
    bad = ["--librispeech_path", bad_data["target"], "--epochs", 2]
    process, path = run(f"cuda-{precision}-bad", *flags, *bad)
    succeeded(process)
    assert len(bad_steps(path)) == 2
    assert is_finite(last(path)["model"])
