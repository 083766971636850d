"""Parts of a checkpoint of any family: checked by their configurations, and the network loaded."""

import torch
from diffusers import AutoencoderKL

from utils.diffusion.checkpoint import check_weight_files, defaults, open_checkpoint, read_config
from utils.diffusion.unet import load_part, set_unet_mode


def check_parts(name, title, networks, revision=None, *, flow=False):
    """Configurations of the network and the VAE of another family than Stable Diffusion; ValueError by name.

    networks: {folder: class}. flow: whether the scheduler must be one of flow matching.
    """
    name = str(name)
    files, folder = open_checkpoint(name, revision, None)
    classes, configs = networks | {"vae": AutoencoderKL}, []
    for part, model_class in classes.items():
        if f"{part}/config.json" not in files:
            raise ValueError(f"{name!r} is no whole checkpoint of {title}: it has no {part}/config.json")
        config = read_config(folder or name, part, revision)
        if config.get("_class_name") != model_class.__name__:
            raise ValueError(
                f"the {part} of {name!r} is a {config.get('_class_name')}, that of {title} a {model_class.__name__}"
            )
        check_weight_files(name, part, files)
        configs.append(defaults(model_class) | config)
    kind = read_config(folder or name, "scheduler", revision).get("_class_name", "")
    if flow != kind.startswith("FlowMatch"):
        raise ValueError(f"the scheduler of {name!r} is a {kind}, which is not one of {title}")
    return configs


def has_part(name, part, revision=None):
    return any(file.startswith(f"{part}/") for file in open_checkpoint(str(name), revision, None)[0])


def load_network(name, part, model_class, mode, *, dtype=torch.float32, revision=None):
    """The network of any family, `frozen` or to train in `full`, see `load_unet`."""
    network = load_part(model_class, part, name, dtype if mode == "frozen" else torch.float32, revision, None)
    return set_unet_mode(network, mode, dtype=dtype)
