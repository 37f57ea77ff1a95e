"""PyTorch Hub's way in, for programs that have modules of the same names as ours.

model = torch.hub.load("path/to/this/folder", "apc", "apc.model", source="local")
features = torch.hub.load("path/to/this/folder", "apc_features", "apc.model", source="local")
x = features("speech.wav")      # (T, H) float32

`import utils` and the like give the caller's own modules, before these calls and after them.
Models and extractors can be copied and pickled, also for DataLoader workers that are spawned: they
are unpickled by means of this file.
"""

import contextlib
import functools
import os
import sys
import types

import torch

dependencies = ["torch", "numpy", "filelock", "tqdm"]
OURS = ("apc_model", "formats", "load_pretrained", "utils")  # what is imported here
HUB = "apc_hub"  # the module where they stay


def apc(path, device="cpu", residual=None):
    """A trained model (APCModel in eval mode), as load_pretrained.load_pretrained() returns it."""
    with _our_modules() as ours:
        return ours["load_pretrained"].load_pretrained(path, device, residual)


def apc_features(path, layer="last", device="cpu", residual=None, resample=False):
    """Features of audio files and samples: a load_pretrained.FeatureExtractor. It needs soundfile
    and kaldi_native_fbank, and all else in requirements.txt."""
    with _our_modules() as ours:
        arguments = (path, layer, device, residual, resample)
        return ours["load_pretrained"].FeatureExtractor(*arguments)


def empty_model():
    """For pickle: an APCModel to be filled."""
    with _our_modules() as ours:
        model_class = ours["apc_model"].APCModel
        return model_class.__new__(model_class)


@contextlib.contextmanager
def _our_modules():
    """Let imports find our modules in this folder, which torch.hub has put first on sys.path."""
    theirs = _take_modules()
    sys.modules.update(vars(sys.modules.get(HUB, types.SimpleNamespace(ours={})))["ours"])
    try:
        import load_pretrained  # noqa: F401

        if HUB not in sys.modules:
            _prepare_pickling()
        yield sys.modules
        sys.modules[HUB].ours = _take_modules()
    finally:
        _take_modules()
        sys.modules.update(theirs)


def _take_modules():
    """Take the modules of our names out of sys.modules -> {name: module}."""
    names = [name for name in sys.modules if name.partition(".")[0] in OURS]
    return {name: sys.modules.pop(name) for name in names}


def _prepare_pickling():
    """Give pickle names by which it finds our classes, in this process and in others."""
    load = functools.partial(torch.hub.load, os.path.dirname(__file__), source="local")
    hub = sys.modules[HUB] = types.ModuleType(HUB)
    for module in (sys.modules["apc_model"], sys.modules["formats.s3prl"]):
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__:
                value.__module__ = HUB
                setattr(hub, name, value)
    model, extractor = hub.APCModel, sys.modules["load_pretrained"].FeatureExtractor
    model.__reduce__ = lambda self: (load, ("empty_model",), self.__dict__)
    extractor.__reduce__ = lambda self: (load, ("apc_features", *self.arguments))
