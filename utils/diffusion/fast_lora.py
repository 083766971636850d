"""A LoRA that lets a model draw in few steps, such as LCM's or Hyper-SD's, beside the LoRA of an identity."""

import hashlib
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download, list_repo_files
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load

from utils.diffusion.unet import cast_where_needed
from utils.files import one_line

ADAPTER = "fast"
LORA_NAMES = ("pytorch_lora_weights.safetensors",)


class FastLora(NamedTuple):
    """Weights with the U-Net's names and `unet.` before them, their alphas, and a hash of the file."""

    weights: dict
    alphas: dict | None
    digest: str


def read_fast_lora(name, unet_config):
    """The `FastLora` of a file, a folder or a Hub id, USER/NAME or USER/NAME/FILE; ValueError if it does not fit."""
    path = find_file(str(name))
    try:
        content = Path(path).read_bytes()
        # The blocks of SDXL have other numbers in some trainers' files.
        is_sdxl = unet_config.get("addition_embed_type") is not None
        layout = {"unet_config": SimpleNamespace(**unet_config)} if is_sdxl else {}
        weights, alphas = StableDiffusionPipeline.lora_state_dict(load(content), **layout)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"--fast_lora {name} cannot be read as a LoRA: {one_line(error)}") from error
    weights = {key: value for key, value in weights.items() if key.startswith("unet.")}
    if alphas is None:
        # diffusers looks at the first name only to tell which of two ways of naming a file has.
        weights = {f"unet.{key}": value for key, value in peft_names(weights).items()}
    check_fits(name, weights, unet_config)
    return FastLora(weights, alphas, hashlib.sha256(content).hexdigest()[:16])


def find_file(name):
    """The path of the weights; those on the Hub are downloaded."""
    path = Path(name)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        return path / one_of(name, files)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"--fast_lora {name} is no safetensors file; pickled weights are never read")
        return path
    parts = name.split("/")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        if not file:
            file = one_of(name, [file for file in list_repo_files(repository) if file.endswith(".safetensors")])
        return hf_hub_download(repository, file)
    except ValueError as error:
        if str(error).startswith("--fast_lora"):
            raise
        raise not_there(name, error) from error
    except Exception as error:
        # The Hub's client raises its own error classes and those of its HTTP library; its cache may do.
        for file_name in [file] if file else LORA_NAMES:
            try:
                return hf_hub_download(repository, file_name, local_files_only=True)
            except Exception:
                continue
        raise not_there(name, error) from error


def not_there(name, error):
    return ValueError(f"--fast_lora {name} is no local file or folder, nor a readable Hub id: {one_line(error)}")


def one_of(name, files):
    usual = [file for file in files if file in LORA_NAMES]
    chosen = usual or files
    if len(chosen) != 1:
        shown = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        raise ValueError(f"--fast_lora {name} has {len(files)} safetensors files ({shown}); give {name}/FILE")
    return chosen[0]


def check_fits(name, weights, unet_config):
    """ValueError unless each weight belongs to a layer of the U-Net and has its shape."""
    if not weights:
        raise ValueError(f"--fast_lora {name} has no weights for a U-Net of Stable Diffusion")
    with torch.device("meta"):
        layers = dict(UNet2DConditionModel.from_config(unet_config).named_modules())
    wrong, seen = [], 0
    for key, value in peft_names(weights).items():
        layer, found, _ = key.partition(".lora_")
        if not found:
            # Such as the magnitudes of DoRA.
            if not key.endswith(".alpha"):
                wrong.append(key)
            continue
        seen += 1
        weight = getattr(layers.get(layer), "weight", None)
        dim = 1 if ".lora_A." in key else 0
        if weight is None or value.shape[dim] != weight.shape[dim]:
            wrong.append(key)
    if wrong or not seen:
        one = f", {wrong[0]} for one" if wrong else ""
        raise ValueError(
            f"--fast_lora {name} is of another family of models: {len(wrong)} of its {seen or len(weights)} weights "
            f"do not fit the U-Net of --pretrained_model_name_or_path{one}"
        )


def peft_names(weights):
    return convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in weights.items()})


def add_fast_lora(unet, lora, dtype):
    """Add the LoRA to a U-Net, switched off and frozen; `drawing_fast` switches it on."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    before = {module for module in unet.modules() if isinstance(module, BaseTunerLayer)}
    with warnings.catch_warnings():
        # That there is another adapter is the point.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        unet.load_lora_adapter(dict(lora.weights), network_alphas=lora.alphas, prefix="unet", adapter_name=ADAPTER)
    for name, parameter in unet.named_parameters():
        if f".{ADAPTER}." in name:
            parameter.data = parameter.data.to(unet.device, dtype)
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer) and module not in before:
            module.register_forward_pre_hook(cast_where_needed)
    added = sum(f".{ADAPTER}." in name for name, _ in unet.named_parameters())
    if added != len(lora.weights):
        raise ValueError(f"--fast_lora: {len(lora.weights) - added} of {len(lora.weights)} weights have no place")
    switch(unet, False)
    # peft freezes everything but LoRA.
    for parameter in trained:
        parameter.requires_grad_(True)


@contextmanager
def drawing_fast(unet):
    """The few-step LoRA is on, beside that of the identity; off again afterwards. Only for drawing."""
    switch(unet, True)
    try:
        yield
    finally:
        switch(unet, False)


def switch(unet, on):
    """Which adapters are active: the identity's own, which trains, and the few-step one, which never does."""
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            names = [name for name in module.lora_A if on or name != ADAPTER]
            module.enable_adapters(bool(names))
            if names:
                module.set_adapter(names, inference_mode=on)
