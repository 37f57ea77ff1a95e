"""PyTorch Hub's way in: a trained model in code that has modules of the same names as ours.

model = torch.hub.load("path/to/this/folder", "apc", "apc.model", source="local")
"""

import sys

dependencies = ["torch", "numpy"]
OURS = ("apc_model", "formats", "load_pretrained", "utils")  # what loading a model imports
HUB = "apc_hub"  # where they stay


def apc(path, device="cpu", residual=None):
    """A trained model, as load_pretrained.load_pretrained() returns it: APCModel in eval mode.

    `import utils` and the like give the caller's own modules, before this call and after it. The
    model can be copied and pickled; whoever unpickles it has to have loaded one in this way.

    Args:
        path: a file that train.py, the original release or s3prl wrote.
        device: where the model is wanted.
        residual: whether the model has residual connections, for files that do not tell.

    Raises:
        ValueError: the file is no APC model, is damaged, or leaves open whether it is residual.
        OSError: it cannot be read.
    """
    if HUB not in sys.modules:
        _import_ours()
    return sys.modules[HUB].load_pretrained(path, device, residual)


def _import_ours():
    """Import our modules from this folder, which torch.hub has put first on sys.path.

    Only apc_model stays in sys.modules, under a name of its own, by which pickle finds its classes.
    """
    theirs = _take_modules()
    try:
        import apc_model
        import load_pretrained
    finally:
        _take_modules()
        sys.modules.update(theirs)
    for value in vars(apc_model).values():
        if getattr(value, "__module__", None) == "apc_model":
            value.__module__ = HUB
    apc_model.load_pretrained = load_pretrained.load_pretrained
    sys.modules[HUB] = apc_model


def _take_modules():
    """Take the modules of our names out of sys.modules -> {name: module}."""
    names = [name for name in sys.modules if name.partition(".")[0] in OURS]
    return {name: sys.modules.pop(name) for name in names}
