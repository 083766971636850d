"""The LoRA and the token of an identity on disk: kept after tuning, loaded again to draw more images.

unet_lora/pytorch_lora_weights.safetensors   for `load_lora_weights`
learned_embeds.safetensors                   for `load_textual_inversion`, with a new token only
adapter.json                                 the digest of the model it was tuned from
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.diffusion.unet import named_as_published, save_unet
from utils.files import one_line, to_json

LORA, TOKEN, ORIGIN = "unet_lora/pytorch_lora_weights.safetensors", "learned_embeds.safetensors", "adapter.json"


def save_adapter(model, folder, token=None, row=None):
    """Save the LoRA of a `TextToImage` and, of a new token, its name and embedding row."""
    save_unet(model.unet, "lora", folder)
    (folder / ORIGIN).write_text(to_json({"model": model.digest}), encoding="utf-8")
    if token is not None:
        save_file({token: row.detach().cpu().clone()}, folder / TOKEN)


def load_adapter(model, folder, token=None, row=None):
    """Put a saved adapter into the model, and the embedding of a new token into `row`."""
    load_lora(model.unet, folder)
    if token is None:
        return
    try:
        stored = load_file(folder / TOKEN)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / TOKEN} cannot be read: {one_line(error)}") from error
    if token not in stored or stored[token].shape != row.shape:
        raise ValueError(f"{folder / TOKEN} holds no embedding of {token} for this text encoder")
    with torch.no_grad():
        row.copy_(stored[token])


def load_lora(unet, folder):
    """Set the LoRA of a U-Net in mode lora to what `save_unet` wrote; ValueError if it is of another network."""
    path = Path(folder) / "unet_lora" / "pytorch_lora_weights.safetensors"
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    config = unet.peft_config["default"]
    own = {name.replace(".default.", "."): value for name, value in unet.named_parameters() if ".default." in name}
    second = {id(value) for name, value in own.items() if ".lora_B." in name}
    targets = named_as_published(unet, own)
    wrong = sorted(set(stored) ^ set(targets))
    wrong += [key for key, value in stored.items() if key in targets and value.shape != targets[key].shape]
    if wrong:
        raise ValueError(
            f"{path} is the LoRA of another network or rank: {len(wrong)} of its weights do not fit, {wrong[0]} for "
            "one"
        )
    with torch.no_grad():
        for key, parameter in targets.items():
            parameter.copy_(stored[key] * (config.r / config.lora_alpha if id(parameter) in second else 1.0))
