"""PyTorch Hub's way in, for programs that have modules of the same names as ours.

model = torch.hub.load("path/to/this/folder", "apc", "apc.model", source="local")
features = torch.hub.load("path/to/this/folder", "apc_features", "apc.model", source="local")
x = features("speech.wav")      # (T, H) float32

`import utils` and the like give the caller's own modules, before these calls and after them.
Models and extractors can be copied and pickled, also for DataLoader workers that are spawned.
"""

import contextlib
import functools
import os
import pickle
import sys
import types
from collections.abc import Callable

import torch

dependencies = ["torch", "numpy"]
OURS = ("apc_model", "formats", "load_pretrained", "utils")  # what is imported here
HUB = "apc_hub"  # the module where they stay


def apc(
    path: str | os.PathLike, device: str | torch.device = "cpu", residual: bool | None = None
) -> torch.nn.Module:
    """A trained model (APCModel in eval mode), as load_pretrained.load_pretrained() returns it."""
    with _our_modules() as ours:
        return ours["load_pretrained"].load_pretrained(path, device, residual)


def apc_features(
    path: str | os.PathLike,
    layer: str | int = "last",
    device: str | torch.device = "cpu",
    residual: bool | None = None,
    resample: bool = False,
) -> Callable:
    """Features of audio files and samples: a load_pretrained.FeatureExtractor. It needs soundfile
    and kaldi_native_fbank, and all else in requirements.txt."""
    with _our_modules() as ours:
        arguments = (path, layer, device, residual, resample)
        return ours["load_pretrained"].FeatureExtractor(*arguments)


def unpickled_model(content: bytes) -> torch.nn.Module:
    """For pickle: an APCModel with the attributes that were pickled as `content`."""
    with _our_modules() as ours:
        model_class = ours["apc_model"].APCModel
        model = model_class.__new__(model_class)
        model.__dict__ = pickle.loads(content)
        return model


@contextlib.contextmanager
def _our_modules():
    """Our modules by their names, while the caller's of the same names stand aside."""
    theirs = _take_modules()
    try:
        if HUB in sys.modules:
            sys.modules.update(sys.modules[HUB].ours)
        else:
            _import_ours()
        yield sys.modules
    finally:
        ours = _take_modules()
        if HUB in sys.modules:
            sys.modules[HUB].ours = ours
        sys.modules.update(theirs)


def _take_modules():
    """Take the modules of our names out of sys.modules -> {name: module}."""
    names = [name for name in sys.modules if name.partition(".")[0] in OURS]
    return {name: sys.modules.pop(name) for name in names}


def _import_ours():
    """Import our modules from this folder, which torch.hub has put first on sys.path, and let
    models and extractors be unpickled by means of this file, in this process and in others."""
    import apc_model
    import load_pretrained

    load = functools.partial(torch.hub.load, os.path.dirname(__file__), source="local")

    def reduce_model(model):
        with _our_modules():
            return load, ("unpickled_model", pickle.dumps(model.__dict__))

    apc_model.APCModel.__reduce__ = reduce_model
    extractor_class = load_pretrained.FeatureExtractor
    extractor_class.__reduce__ = lambda self: (load, ("apc_features", *self.arguments))
    sys.modules[HUB] = types.ModuleType(HUB)
