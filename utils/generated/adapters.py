"""The LoRA and the token of each identity on disk: kept after tuning, loaded again to draw more images.

adapters/DOMAIN/PID/unet_lora/pytorch_lora_weights.safetensors   for `load_lora_weights`
adapters/DOMAIN/PID/learned_embeds.safetensors                   for `load_textual_inversion`, with a new token only
adapters/DOMAIN/PID/adapter.json                                 the digest of the model it was tuned from
"""

import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.diffusion.unet import load_lora, save_unet
from utils.files import one_line, to_json
from utils.generated.made_set import IMAGES

FOLDER = "adapters"
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


def check_adapters(work, names, with_token):
    """ValueError unless each identity has images and a kept adapter. No model is loaded."""
    files = [LORA, TOKEN] if with_token else [LORA]
    without = [
        name
        for name in names
        if not work.has(name, IMAGES) or not all((work.folder / FOLDER / name / file).is_file() for file in files)
    ]
    if without:
        raise ValueError(
            f"--redraw: {work.folder / FOLDER} has no adapter of {len(without)} of {len(names)} identities, "
            f"{without[0]} for one. Adapters are kept by --save_adapters: run without --redraw and with it, or choose "
            "others with --ids"
        )


def check_origin(work, names, digest):
    """ValueError if an adapter was tuned from another model than the one with this digest."""
    for name in names:
        path = work.folder / FOLDER / name / ORIGIN
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
        except (OSError, ValueError, KeyError, TypeError):
            # Adapters of an earlier version: the images beside them name the model.
            model = work.read(name, IMAGES)["model"]
        if model != digest:
            raise ValueError(
                f"the adapter of {name} was tuned from the model {model}, this one is {digest}: give "
                "--pretrained_model_name_or_path of that model"
            )
