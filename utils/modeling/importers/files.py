"""Reads files of weights: safetensors, or PyTorch files of plain tensors. No code is ever unpickled."""

import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# What training scripts put weights under, in the order they are looked for; DINO's teacher is the one to use.
WRAPPERS = ("state_dict", "model_state_dict", "teacher", "model_ema", "state_dict_ema", "model", "net", "network")


# What trainings keep beside weights: their arguments, and numbers of NumPy. To make one runs no code of a file.
SCALAR = np._core.multiarray.scalar
PLAIN = [Namespace, np.dtype, SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]
PLAIN += [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")]


def read_content(path):
    """The dictionary in a file of weights: names to tensors, and whatever else lies beside them."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}; download it again") from error
    if is_torchscript(path):
        raise ValueError(
            f"{str(path)!r} is a TorchScript archive, a program with weights, which is not run here. If you trust it, "
            "this command runs it; then give its weights.pth:\n"
            f'python -c \'import torch; torch.save(torch.jit.load("{path}", "cpu").state_dict(), "weights.pth")\''
        )
    try:
        with torch.serialization.safe_globals(PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged pickle can raise any error. torch's text is left out: it advises to run the code in the file.
        raise ValueError(
            f"{str(path)!r} cannot be opened as a PyTorch file of plain tensors ({type(error).__name__}): it is "
            "damaged, or holds other objects, which are never unpickled; save its state dict alone, and give that file"
        ) from error
    while isinstance(content, dict):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not a state dict")
    return content


def is_torchscript(path):
    """Whether a zip holds the code of a program, which a file of tensors does not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = [name.split("/", 1)[-1] for name in archive.namelist()]
    return any(name == "constants.pkl" or name.startswith("code/") for name in names)


def read_tensors(path):
    """{name: tensor} of a file, without what stands before all names, such as `module.`."""
    tensors = {str(name): value for name, value in read_content(path).items() if isinstance(value, torch.Tensor)}
    # Beside an average of weights.
    tensors.pop("n_averaged", None)
    stripped = True
    while stripped:
        stripped = False
        for prefix in ("module.", "_orig_mod."):
            if tensors and all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
                stripped = True
    return tensors
