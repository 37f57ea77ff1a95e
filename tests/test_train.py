"""train.py run for real on tiny folders: what it computes, writes and refuses, and how it goes on.

Every run is a process of its own, which really is killed, or really finds the disk full.
"""

import json
import math
import os
import re
import shutil
import signal
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
    epoch_losses,
    last,
    make_folder,
    metrics,
    models,
    same,
    until_step,
)
from processes import error_line, leave_room, snapshot
from reference import OPTIMIZERS, PackedAPC, evaluate, frame_loss, padded_loss, train_epoch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from load_pretrained import load_pretrained

FULL_MODEL = dict(hidden=8, layers=2, prenet_layers=1, residual=True)


def succeeded(process):
    assert process.returncode == 0, process.stderr
    return process


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
    (tag,) = events.Tags()["images"]
    return events.Images(tag)


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
    """Weights and losses to the bit, each step and epoch once, and no other files."""
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


def assert_same_tensorboard(path, reference):
    """Nothing missing, and nothing twice."""
    ours, theirs = scalars(path), scalars(reference)
    assert [step for step, _ in theirs["while training/gradient norm"]] == list(range(STEPS))
    assert ours == theirs
    assert [image.step for image in images(path)] == list(range(EPOCHS))


# Fixtures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(server, place):
    """run(name, *flags) -> the finished process of a run of that name, its folder."""

    def run(name, *flags, **kw):
        where, path = place(name)
        return server.run("train.py", *PLAIN, *where, *flags, **kw), path

    return run


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
    make_folder(root / "wide", [20, 30], D + 1, SEQ_LEN)
    make_folder(root / "long", [20, 30], D, SEQ_LEN + 1)
    return SimpleNamespace(path=root, parts=parts)


@pytest.fixture(scope="module")
def whole(server, corpus, tmp_path_factory):
    """A run that nothing stops, with dropout and workers; started as users do, by relative paths.

    Its folder as `path`, the process, its flags, and the folder that it was started in.
    """
    work = tmp_path_factory.mktemp("whole")
    (work / "corpus").symlink_to(corpus.path)
    flags = [*FULL, "--load_data_workers", 2, "--librispeech_path", "corpus"]
    flags += ["--store_path", "runs/here", "--experiment_name", "first.try"]
    process = server.run("train.py", *flags, cwd=work, record=work / "fed")
    path = work / "runs/here/first.try.dir"
    return SimpleNamespace(path=path, process=succeeded(process), flags=flags, work=work)


@pytest.fixture(scope="module")
def stopped(server, place):
    """A run that --max_steps ended in the middle of its second epoch."""
    flags, path = place("stopped")
    process = server.run("train.py", *FULL, *flags, "--max_steps", 8)
    return SimpleNamespace(path=path, process=succeeded(process))


@pytest.fixture(scope="module")
def copy(stopped, place, tmp_path_factory):
    """copy() -> a copy of the stopped run: (flags that go on with it, folder)."""

    def copy():
        flags, path = place("stopped", store=tmp_path_factory.mktemp("copy"))
        shutil.copytree(stopped.path, path)
        return [*FULL, *flags, "--resume"], path

    return copy


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
    "lstm-rmsprop-real-frames": (
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
    "adagrad": (
        "--optimizer adagrad --learning_rate 0.05 --rnn_num_layers 1",
        dict(hidden=8, layers=1, residual=True),
        dict(shift=2, clip=1.0, batch=4, optimizer="adagrad", lr=0.05),
    ),
}


FOLLOWED = 6  # epochs


def batches_fed(file, utterances, shift):
    """The training batches of a run from what its model was fed, whole and padded, by epoch.

    Utterances are recognised by their frames, so the order that the run drew does not matter,
    but each must come exactly once an epoch.
    """
    epochs, names = [[]], []
    for training, inputs, lengths in torch.load(file, weights_only=True):
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
def test_losses_follow_the_originals(run, corpus, folders, tmp_path, name):
    """From a run's own initial weights and batches the packed, padded loop gives its losses."""
    flags, model, training = FOLLOW[name]
    where = ["--librispeech_path", folders.path, "--epochs", FOLLOWED]
    process, path = run(name, *where, *flags.split(), record=tmp_path / "fed")
    succeeded(process)
    options = dict(training)
    batch, optimizer, lr = (options.pop(key) for key in ("batch", "optimizer", "lr"))
    shift, kind = options["shift"], options.get("kind", padded_loss)

    utterances = folders.parts if "part-a" in flags else corpus.train
    epochs = batches_fed(tmp_path / "fed", utterances, shift)
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


def test_another_seed_gives_other_weights_and_another_order(server, place, whole, tmp_path):
    """The same seed gives the same, bit by bit: see the runs that are resumed."""
    flags, path = place("seed")
    flags += ["--seed", 1, "--epochs", 1]
    succeeded(server.run("train.py", *FULL, *flags, record=tmp_path / "fed"))
    ours, theirs = models(path)["epoch_0"], models(whole.path)["epoch_0"]
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours)
    fed = [torch.load(p / "fed", weights_only=True) for p in (tmp_path, whole.work)]
    ours, theirs = ([n.tolist() for _, _, n in batches[:BATCHES]] for batches in fed)
    assert ours != theirs


def test_parts_of_a_batch_make_up_the_whole(run):
    """In turn, or each on a CPU core. The batches are of 12 and 9, whose parts differ in frames."""
    flags, found = ["--batch_size", 12, "--epochs", 2, "--mask_padding"], []
    for parts, cores in ((1, 1), (4, 1), (1, 3)):
        name = f"parts-{parts}-{cores}"
        process, path = run(name, *flags, "--accumulate_steps", parts, cores=cores)
        succeeded(process)
        found.append(path)
    whole, *others = (models(path)["epoch_2"] for path in found)
    for path, other in zip(found[1:], others):
        assert all(torch.allclose(whole[key], other[key], atol=1e-5, rtol=0) for key in whole)
        assert_close_losses(path, found[0], tolerance=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_cpu(run, one, precision):
    """Close to single precision, and yet not the same; the weights stay in single precision."""
    process, path = run(precision, "--precision", precision)
    succeeded(process)
    assert_close_losses(path, one["padded"], tolerance=0.03)
    assert epoch_losses(path) != epoch_losses(one["padded"])
    assert {weight.dtype for weight in last(path)["model"].values()} == {torch.float32}


# What a run writes --------------------------------------------------------------------------------


def test_checkpoints_are_bare_state_dicts(whole):
    names = sorted(file.name for file in whole.path.glob("*.model"))
    assert names == [f"first.try__epoch_{k}.model" for k in range(EPOCHS + 1)]
    expected = PackedAPC(D, **FULL_MODEL).state_dict()
    for state in models(whole.path).values():
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}
        assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in state.values())
    model = load_pretrained(str(whole.path / "last.ckpt"))
    assert model.rnn_residual and same(model.state_dict(), models(whole.path)[f"epoch_{EPOCHS}"])


def test_epoch_lines_stand_in_the_log_and_on_the_console(whole):
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
    pictures = images(path)
    assert [image.step for image in pictures] == list(range(EPOCHS))
    assert len({image.encoded_image_string for image in pictures}) == EPOCHS
    assert {(image.width, image.height) for image in pictures} == {(600, 450)}


def test_flags_and_config(server, whole):
    """The papers' defaults; config.json has every flag, and the data's width."""
    defaults = dict(
        **dict(prenet_num_layers=0, prenet_dropout=0.0, rnn_num_layers=3, rnn_hidden_size=512),
        **dict(rnn_dropout=0.0, rnn_type="gru", rnn_residual=False, optimizer="adam", epochs=100),
        **dict(batch_size=32, learning_rate=0.0001, time_shift=1, clip_thresh=1.0, seed=0),
        **dict(librispeech_path="./librispeech_data/preprocessed", train_split=["train-clean-360"]),
        **dict(valid_split="dev-clean", experiment_name="foo", store_path="./logs"),
    )
    flags = vars(train.parse_args([]))
    assert {flag: flags[flag] for flag in defaults} == defaults
    config = json.loads((whole.path / "config.json").read_text())
    assert set(config) == {*flags, "data", "version"}
    assert (config["feature_dim"], config["rnn_dropout"], config["rnn_residual"]) == (D, 0.3, True)


def test_it_says_beforehand_what_it_is_about_to_do(whole):
    before = whole.process.stderr.split("Epoch: 1 ")[0].replace(",", "")
    parameters = sum(p.numel() for p in PackedAPC(D, **FULL_MODEL).parameters())
    for words in (
        *(f"{len(TRAIN)} utterances", f"{sum(TRAIN)} frames", "hours", f"{len(VALID)} utterances"),
        *(f"parameters {parameters}", "cpu", "fp32", "L1", "padding included"),
    ):
        assert words in before, f"{words} is not in:\n{before}"
    warnings = [line for line in before.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and re.search(r"\b2 of 23 utterances", warnings[0]), warnings


# What a run starts from, and what it refuses ------------------------------------------------------

MISFITS = {  # models that are not of PLAIN's shape
    "hidden": (dict(hidden=12, layers=2), "--rnn_hidden_size is 8, but the file's is 12"),
    "lstm": (
        dict(hidden=8, layers=2, rnn_type="lstm"),
        "--rnn_type is gru, but the file's is lstm",
    ),
    "width": (dict(mel_dim=7, hidden=8, layers=2), "--feature_dim is 8, but the file's is 7"),
}
REFUSED = {  # name: (flags, words of the error)
    **{f"misfit-{name}": (f"--init_checkpoint {{}}/{name}", MISFITS[name][1]) for name in MISFITS},
    "init-s3prl": ("--init_checkpoint {}/s3prl", "another model in s3prl"),  # 8 wide, as the data
    "init-hostile": ("--init_checkpoint {}/hostile", "open, which is not plain data"),
    "init-nan": ("--init_checkpoint {}/nan", "nan: its weights are not finite"),
    "init-nowhere": ("--init_checkpoint {}/nowhere", "No such file or directory: '{}/nowhere'"),
    "width": ("--feature_dim 9", "have 8 numbers, but --feature_dim is 9"),
    "width-of-valid": ("--valid_split wide", "train-clean-360 have 8"),
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


@pytest.fixture(scope="module")
def weights(whole, tmp_path_factory):
    """A folder of models."""
    here = tmp_path_factory.mktemp("weights")
    torch.manual_seed(11)
    fitting = PackedAPC(D, 8, 2).state_dict()
    torch.save(fitting, here / "fitting")
    torch.save({f"module.{k}": v for k, v in fitting.items()}, here / "parallel")
    torch.save({k: v * math.nan for k, v in fitting.items()}, here / "nan")
    s3prl = {k.replace("rnns.", "rnn_layers.").replace(".layer", ""): v for k, v in fitting.items()}
    torch.save(s3prl, here / "s3prl")
    torch.save({"model": Hostile(here / "marker")}, here / "hostile")
    for name, (shape, _) in MISFITS.items():
        torch.save(PackedAPC(**{"mel_dim": D, **shape}).state_dict(), here / name)
    shutil.copy(whole.path / f"first.try__epoch_{EPOCHS}.model", here / "run")
    return here


@pytest.mark.parametrize("name", ["fitting", "parallel", "run"])
def test_init_checkpoint_gives_the_initial_weights(run, weights, name):
    """Of bare weights that say nothing of residual connections: the flags define the model."""
    prenet = ["--prenet_num_layers", int(name == "run")]
    process, path = run(name, "--init_checkpoint", weights / name, "--epochs", 1, *prenet)
    succeeded(process)
    given = torch.load(weights / name.replace("parallel", "fitting"), weights_only=True)
    found = models(path)
    assert same(found["epoch_0"], given)
    assert not any(torch.equal(found["epoch_1"][k], given[k]) for k in given)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused(run, folders, weights, name):
    """And leaves the name free: else the mended command would be refused, too."""
    flags, words = (text.format(weights) for text in REFUSED[name])
    process, path = run(name, "--librispeech_path", folders.path, *flags.split())
    assert words in error_line(process, "train.py")
    assert not path.exists()
    assert not (weights / "marker").exists()  # of the hostile file


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_wrong_flags_are_refused(call_main, flags):
    line = error_line(call_main(train, *flags.split()), "train.py", status=2)
    assert flags.split()[0] in line


def test_an_existing_run_is_left_alone(server, whole):
    before = snapshot(whole.path)
    process = server.run("train.py", *whole.flags, cwd=whole.work)
    line = error_line(process, "train.py")
    assert "first.try.dir: this experiment exists" in line
    assert process.stderr == line + "\n"
    assert snapshot(whole.path) == before


# Killed -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(server, place):
    """A run that is killed again and again, and gone on with every time."""
    flags, path = place("killed")
    flags = [*FULL, *flags, "--resume"]

    def crash(*where, save_steps):
        process = server.run("train.py", *flags, "--save_steps", save_steps, crash=where)
        assert process.returncode == -signal.SIGKILL, (where, process.stderr)

    def kill(send, step, save_steps):
        process = server.start("train.py", *flags, "--save_steps", save_steps)
        until_step(step, process, path)
        send(process.pid, signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL, process.stderr

    crash("config.json", 1, "before", save_steps=1)  # the folder is new
    crash("last.ckpt$", 1, "before", save_steps=1)  # there is a model, and no checkpoint
    crash("last.ckpt$", 2, "before", save_steps=3)  # nothing but the start is saved
    kill(os.kill, 4, save_steps=3)  # in an epoch
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 1, "st')
    flags += ["--max_steps", 12]
    crash("__epoch_2.model", 1, "after", save_steps=2)  # between two epochs
    succeeded(server.run("train.py", *flags))  # no step is left, but the end of an epoch
    assert last(path)["state"]["epoch"] == 2
    del flags[-2:]
    crash("last.ckpt$", 2, "before", save_steps=2)  # when it is written, but has no name yet
    kill(os.killpg, 14, save_steps=1)
    succeeded(server.run("train.py", *flags))
    return path


def test_killed_run_equals_an_uninterrupted_one(killed, whole):
    """TensorBoard may show an epoch twice if the run was killed between showing and saving it."""
    assert_same_run(killed, whole.path)
    ours = scalars(killed)
    assert len(ours["while training/gradient norm"]) == STEPS
    assert {tag: sorted(set(pairs)) for tag, pairs in ours.items()} == scalars(whole.path)


# Signals ------------------------------------------------------------------------------------------

SIGNALS = {  # name: (signal, how it is sent, after which step, workers)
    "sigterm": (signal.SIGTERM, os.kill, 0, 2),
    "sigterm-to-all": (signal.SIGTERM, os.killpg, 3, 2),
    "sigterm-to-all-between-epochs": (signal.SIGTERM, os.killpg, 6, 2),
    "sigint-to-all": (signal.SIGINT, os.killpg, 9, 2),
    "sigusr1-no-workers": (signal.SIGUSR1, os.kill, 13, 0),
}


@pytest.fixture(scope="module")
def signalled(server, place):
    """A run that gets one signal after the other: its folder, and what was there after each."""
    flags, path = place("signalled")
    flags, found = [*FULL, *flags, "--resume"], {}
    for name, (number, send, step, workers) in SIGNALS.items():
        process = server.start("train.py", *flags, "--load_data_workers", workers)
        until_step(step, process, path)
        for _ in range(2):  # as from torchrun, which hands on what all have got
            send(process.pid, number)
        found[name] = process.wait(), last(path)["state"]["step"], len(metrics(path)[0])
    succeeded(server.run("train.py", *flags))
    return path, found


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_saves_and_ends_with_its_status(signalled, name):
    process, saved, logged = signalled[1][name]
    assert process.returncode == 128 + SIGNALS[name][0], process.stderr
    assert "Traceback" not in process.stderr
    assert SIGNALS[name][0].name in process.stderr
    assert saved == logged < STEPS, "the step that ended was not saved"


def test_signalled_run_equals_an_uninterrupted_one(signalled, whole):
    assert_same_run(signalled[0], whole.path)
    assert_same_tensorboard(signalled[0], whole.path)


# --max_steps, --resume, --keep_epochs -------------------------------------------------------------


def test_max_steps_ends_cleanly(stopped, whole):
    assert last(stopped.path)["state"]["step"] == 8
    assert sorted(models(stopped.path)) == ["epoch_0", "epoch_1"]
    steps, epochs = metrics(stopped.path)
    assert steps == metrics(whole.path)[0][:8]
    assert [(entry["epoch"], entry["step"]) for entry in epochs] == [(1, 6)]
    assert len(epoch_lines(stopped.process.stderr)) == 2, "the cut epoch's losses are told"


def test_max_steps_and_resume(server, copy, whole):
    """Stopped in an epoch, again at the same step, at an epoch's end, there again, and then not.

    What may differ from run to run does differ.
    """
    flags, path = copy()
    for limit, workers in ((8, 2), (12, 0), (12, 2)):
        before, saved = metrics(path), last(path)["state"]["step"]
        others = ["--load_data_workers", workers, "--save_steps", 3, "--epochs", 2]
        succeeded(server.run("train.py", *flags, "--max_steps", limit, *others))
        assert last(path)["state"]["step"] == max(limit, saved)
        assert limit > saved or metrics(path) == before
    succeeded(server.run("train.py", *flags))
    assert_same_run(path, whole.path)
    assert_same_tensorboard(path, whole.path)
    succeeded(server.run("train.py", *flags))  # nothing is left to do
    assert_same_run(path, whole.path)
    assert_same_tensorboard(path, whole.path)


def damage(path, how):
    file = path / "last.ckpt"
    content = file.read_bytes()
    saved = torch.load(file, weights_only=True)
    if how == "flipped bit":  # in the middle of a weight
        at = content.index(saved["model"]["rnns.0.weight_hh_l0"].numpy().tobytes()) + 401
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "hostile":
        torch.save(saved | {"state": Hostile(path / "marker")}, file)
    elif how == "only weights":
        torch.save(saved["model"], file)


NOT_RESUMED = {  # name: (flags, what the error names)
    **{how: ([], "last.ckpt") for how in ("flipped bit", "hostile", "only weights")},
    "other batches": (["--batch_size", 5], "--batch_size"),
    "other loss": (["--mask_padding"], "--mask_padding"),
    "other split": (["--train_split", "dev-clean"], "--train_split"),
    "other data": (["--librispeech_path", "{}"], "data"),
}


@pytest.mark.parametrize("name", NOT_RESUMED)
def test_what_does_not_fit_is_not_resumed(server, copy, corpus, tmp_path, name):
    """And stays as it was: also, nothing in a checkpoint is executed."""
    # As many utterances and frames: the lengths of two have changed.
    make_folder(tmp_path / "train-clean-360", [*TRAIN[:-2], 23, 16], D, SEQ_LEN)
    (tmp_path / "dev-clean").symlink_to(corpus.path / "dev-clean")
    flags, path = copy()
    damage(path, name)
    before = snapshot(path)
    others, words = NOT_RESUMED[name]
    others = [str(flag).format(tmp_path) for flag in others]
    assert words in error_line(server.run("train.py", *flags, *others), "train.py")
    assert snapshot(path) == before


def test_keep_epochs_keeps_the_newest_and_the_best(server, tmp_path):
    """Learned: the frame after next has the other sign. In the validation data it never has."""
    for split, factor in (("train-clean-360", -1.0), ("dev-clean", 1.0)):
        tensors, _ = make_folder(tmp_path / split, [SEQ_LEN] * 8, D, SEQ_LEN)
        signs = factor ** (torch.arange(SEQ_LEN)[:, None] // 2)
        for name, frames in tensors.items():
            torch.save(signs.expand_as(frames).contiguous(), tmp_path / split / name)
    flags = [*PLAIN, "--librispeech_path", tmp_path, "--store_path", tmp_path]
    flags += ["--experiment_name", "keep", "--keep_epochs", 2]
    path = tmp_path / "keep.dir"
    succeeded(server.run("train.py", *flags, "--epochs", 3))
    assert sorted(models(path)) == ["epoch_1", "epoch_2", "epoch_3"]
    succeeded(server.run("train.py", *flags, "--epochs", 6, "--resume"))
    validation = [loss for _, loss in epoch_losses(path)]
    assert min(validation) == validation[0]
    assert sorted(models(path)) == ["epoch_1", "epoch_5", "epoch_6"]
    # Without a checkpoint to go on from, the models must not be taken for nothing.
    (path / "last.ckpt").unlink()
    before = snapshot(path)
    process = server.run("train.py", *flags, "--epochs", 7, "--resume")
    assert "last.ckpt" in error_line(process, "train.py")
    assert snapshot(path) == before


# A full disk --------------------------------------------------------------------------------------


def test_full_disk_ends_the_run_with_one_line(server, place, whole, small_disk):
    """Again and again, as little room is made; no checkpoint is worse than the one before it."""
    flags, path = place("full", store=small_disk)
    flags = [*FULL, *flags, "--save_steps", 2, "--resume"]
    steps = [0]
    for room in (0, 20_000, 70_000):
        leave_room(small_disk, room)
        line = error_line(server.run("train.py", *flags), "train.py")
        assert "No space left on device" in line, room
        if (path / "last.ckpt").exists():
            steps.append(last(path)["state"]["step"])
    assert steps == sorted(steps) and steps[-1] > 0
    leave_room(small_disk, None)
    succeeded(server.run("train.py", *flags))
    assert_same_run(path, whole.path)


@pytest.mark.parametrize("name", ["epoch_0.model", "tb_log"])
def test_file_that_may_not_grow_is_named(server, place, name):
    """As with a quota. TensorBoard's is the first to reach 20 kB; only the run is named then."""
    flags, path = place(f"limited-{name}")
    limit = 5000 if name == "epoch_0.model" else 20_000
    process = server.run("train.py", *PLAIN, *flags, file_limit=limit)
    file = f"__{name}" if name == "epoch_0.model" else ".dir"
    assert re.search(f"{file}: File too large", error_line(process, "train.py"))
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


BAD_BATCHES = {  # precision, bad data
    "input": ("fp32", "input"),
    "target": ("fp32", "target"),
    "target-scaled": ("fp16", "target"),  # GradScaler looks at gradients alone
}
DIVERGING = {  # name: (flags, words of the error)
    "bad-data": ("--save_steps 1", "20 steps in a row had no finite loss"),
    "loss": ("--learning_rate 1e38 --optimizer sgd --save_steps 1 --epochs 20", "in a row"),
    "weights": ("--learning_rate 1e38 --optimizer rmsprop --save_steps 1", "are not finite"),
}


def bad_steps(path):
    return [entry["step"] for entry in metrics(path)[0] if entry["training_loss"] is None]


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batch_is_skipped_and_counted(run, bad_data, name):
    precision, data = BAD_BATCHES[name]
    flags = ["--librispeech_path", bad_data[data], "--precision", precision, "--epochs", 2]
    process, path = run(name, *flags)
    assert "utt-002" in succeeded(process).stderr
    bad = bad_steps(path)
    assert [step // BATCHES for step in bad] == [0, 1], "one in every epoch"
    counts = [sum(b <= step for b in bad) for step in range(2 * BATCHES)]
    assert [line["skipped_steps"] for line in metrics(path)[0]] == counts
    assert [int(count) for _, count in scalars(path)["while training/skipped steps"]] == counts
    assert all(math.isfinite(loss) for losses in epoch_losses(path) for loss in losses)
    assert all(is_finite(model) for model in models(path).values())
    if data == "target":  # the step leaves no trace, neither in the weights nor in the optimizer
        runs = [run(f"{name}-{step}", *flags, "--max_steps", step) for step in (bad[0], bad[0] + 1)]
        before, after = (last(path) for process, path in runs if succeeded(process))
        assert after["state"]["skipped"] == before["state"]["skipped"] + 1
        assert same(before["model"], after["model"])
        states = [saved["optimizer"]["state"].values() for saved in (before, after)]
        assert states[0] and all(same(old, new) for old, new in zip(*states))


@pytest.mark.parametrize("name", DIVERGING)
def test_divergence_ends_the_run_and_saves_nothing_but_numbers(run, bad_data, name):
    flags, words = DIVERGING[name]
    data = ["--librispeech_path", bad_data["all"], "--epochs", 4] if name == "bad-data" else []
    process, path = run(name, *data, *flags.split())
    assert words in error_line(process, "train.py")
    assert all(is_finite(model) for model in models(path).values())
    assert is_finite(last(path)["model"]) and is_finite(last(path)["optimizer"])
    if "bad-data" in name:
        steps, epochs = metrics(path)
        assert len(steps) == steps[-1]["skipped_steps"] == 20
        start = models(path)["epoch_0"]
        assert all(same(model, start) for model in [*models(path).values(), last(path)["model"]])
        # No utterance was learned from: 0 would pass for a perfect model.
        assert {entry["training_loss"] for entry in epochs} == {None}
        assert not re.search(r"Training Loss: 0\.0", process.stderr)


# CUDA ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda(server, place, one, bad_data, precision):
    """Close to a CPU's losses; a resumed run close to a whole one; a bad batch is skipped."""
    flags = [*PLAIN, "--device", "cuda", "--precision", precision]
    (_, whole), (resume, stopped) = (place(f"cuda-{precision}-{i}") for i in range(2))
    succeeded(server.run("train.py", *flags, *place(f"cuda-{precision}-0")[0]))
    for limit in (8, 13, STEPS):
        succeeded(server.run("train.py", *flags, *resume, "--resume", "--max_steps", limit))
    assert_close_losses(stopped, whole)
    assert_close_losses(whole, one["padded"], tolerance=0.05)
    bad, path = place(f"cuda-{precision}-bad")
    bad += ["--librispeech_path", bad_data["target"], "--epochs", 2]
    succeeded(server.run("train.py", *flags, *bad))
    assert len(bad_steps(path)) == 2
    assert is_finite(last(path)["model"])


# Two runs, and other data, under one name ---------------------------------------------------------


def test_a_second_run_of_one_name_is_refused_while_the_first_lives(server, place):
    flags, path = place("twice")
    first = server.start("train.py", *PLAIN, *flags, "--epochs", 1000)
    until_step(3, first, path)
    second = server.run("train.py", *PLAIN, *flags, "--epochs", 1000, "--resume")
    assert str(path) in error_line(second, "train.py") and "another process" in second.stderr
    first.kill()  # SIGKILL: the lock goes with the process
    succeeded(server.run("train.py", *PLAIN, *flags, "--max_steps", 1, "--resume"))


def test_data_prepared_otherwise_under_the_same_name_are_not_resumed(run, corpus, tmp_path):
    shutil.copytree(corpus.path, tmp_path / "data")
    account = tmp_path / "data" / "train-clean-360" / "prepared.json"
    flags = ["--librispeech_path", tmp_path / "data", "--resume", "--max_steps"]
    prepared = {"source": "audio", "path": "a", "cmvn": "speaker", "norm_vars": False}
    account.write_text(json.dumps(prepared))
    succeeded(run("otherwise", *flags, 2)[0])
    account.write_text(json.dumps(prepared | {"norm_vars": True}))
    line = error_line(run("otherwise", *flags, 4)[0], "train.py")
    assert "settings) were [21, 382, " in line and "last.ckpt" in line
    account.write_text(json.dumps(prepared | {"path": "moved"}))
    # What the advice about memory asks for may change.
    succeeded(run("otherwise", *flags, 4, "--accumulate_steps", 2)[0])


def test_validation_utterance_that_is_not_finite_is_named(run, corpus, tmp_path):
    """The first one, which is drawn all the same."""
    shutil.copytree(corpus.path, tmp_path / "data")
    file = tmp_path / "data/dev-clean/utt-000.pt"
    frames = torch.load(file, weights_only=True)
    frames[2, 3], frames[4, 5] = math.nan, math.inf
    torch.save(frames, file)
    flags = ["--librispeech_path", tmp_path / "data", "--epochs", 1]
    stderr = succeeded(run("bad-validation", *flags)[0]).stderr
    assert re.search(r"validation: .*utt-000", stderr)
