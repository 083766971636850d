"""Properties of a Stable Diffusion checkpoint, read from its configuration before any weights are loaded."""

import inspect
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError, safe_open

from utils.files import one_line
from utils.modeling.folder import read_json

CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PREDICTIONS = ("epsilon", "v_prediction")
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
MORE_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "time_cond_proj_dim",
)


class DiffusionInfo(NamedTuple):
    """What a training script must know about a checkpoint before it loads it."""

    condition_width: int
    latent_channels: int
    vae_scale: int
    prediction_type: str
    num_steps: int
    scaling_factor: float
    # Image sides are multiples of this many pixels.
    multiple: int
    # Of the U-Net's weights.
    variant: str | None = None


def check_diffusion(name_or_path, *, resolution=None, revision=None, token=None, variant=None, needs_variant=False):
    """DiffusionInfo of a diffusers folder or Hub id, from its configuration only; ValueError if it is not supported.

    resolution: (height, width) of the images in pixels, or None. variant: of the U-Net's weights; where the checkpoint
    lacks it, that of the result is None, or with `needs_variant` it is a ValueError.
    """
    name = str(name_or_path)
    files, folder = open_checkpoint(name, revision, token)
    missing = [file for file in CONFIGS.values() if file not in files]
    if missing:
        refuse_other_families(name, files, folder, revision, token)
        folders = ", ".join(sorted({file.split("/")[0] for file in files})[:8]) or "nothing"
        raise ValueError(f"{name!r} is not a whole diffusers checkpoint: it has no {missing[0]} (found: {folders})")
    unet, vae, scheduler = (read_config(folder or name, part, revision, token) for part in CONFIGS)
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    for (part, model_class), config in zip(classes.items(), (unet, vae), strict=True):
        if config.get("_class_name") != model_class.__name__:
            raise ValueError(
                f"the {part} of {name!r} is a {config.get('_class_name')}, but only {model_class.__name__} is "
                "supported (Stable Diffusion 1.x and 2.x)"
            )
    unet, vae = defaults(UNet2DConditionModel) | unet, defaults(AutoencoderKL) | vae
    check_unet(name, unet, vae["latent_channels"])
    prediction_type, alphas_cumprod = noise_schedule(scheduler, name)
    for part in classes:
        check_weight_files(name, part, files, variant if part == "unet" else None)
    if folder:
        check_weights(folder / "unet", unet["cross_attention_dim"], variant)
    vae_scale = 2 ** (len(vae["block_out_channels"]) - 1)
    info = DiffusionInfo(
        unet["cross_attention_dim"],
        vae["latent_channels"],
        vae_scale,
        prediction_type,
        len(alphas_cumprod),
        vae["scaling_factor"],
        vae_scale * 2 ** (len(unet["block_out_channels"]) - 1),
        variant if variant_files(variant) & files_of_part(files, "unet") else None,
    )
    if needs_variant and info.variant != variant:
        raise ValueError(f"{name!r} has no U-Net of --variant {variant}; leave it out for the default one")
    if resolution is not None and any(side < 1 or side % info.multiple for side in resolution):
        raise ValueError(
            f"images of {resolution[0]} x {resolution[1]} (height x width) do not fit {name!r}: both sides must be "
            f"multiples of {info.multiple} pixels"
        )
    return info


def read_index(name, folder, revision=None, token=None):
    """model_index.json: {part: [library, class], ...} and what else it says."""
    path = folder / INDEX if folder else Path(hf_hub_download(str(name), INDEX, revision=revision, token=token))
    return read_json(path)


def refuse_other_families(name, files, folder, revision, token):
    """ValueError for a pipeline whose network is no U-Net, such as Flux: its family, or the part that it lacks."""
    if "unet/config.json" in files or INDEX not in files:
        return
    try:
        index = read_index(name, folder, revision, token)
    except Exception:
        # Without its index, a folder cannot be told from a broken one.
        return
    # A part is [library, class]; one that a pipeline leaves out is [null, null].
    parts = {part: value[1] for part, value in index.items() if isinstance(value, list) and len(value) == 2}
    network = next((part for part in ("transformer", "prior", "decoder") if parts.get(part)), None)
    if network is None:
        return
    pipeline = str(index.get("_class_name"))
    present = {file.split("/")[0] for file in files if "/" in file}
    lacking = [part for part, model_class in parts.items() if model_class and part not in present]
    if lacking:
        raise ValueError(f"{name!r} is not a whole {pipeline}: its {INDEX} names {lacking[0]}, which is not there")
    family = pipeline.replace("Pipeline", "").replace("StableDiffusion3", "Stable Diffusion 3")
    words = f"{name!r} is a whole checkpoint of the family {family} ({pipeline}, its network {parts[network]})"
    raise ValueError(f"{words}, which is not supported; use Stable Diffusion 1.x or 2.x")


def check_unet(name, config, latent_channels):
    width = config["cross_attention_dim"]
    if not isinstance(width, int):
        raise ValueError(
            f"the U-Net of {name!r} has cross_attention_dim {width!r}; only one width for all blocks is supported"
        )
    blocks = (*config["down_block_types"], config["mid_block_type"] or "", *config["up_block_types"])
    if not any("CrossAttn" in block for block in blocks):
        raise ValueError(f"the U-Net of {name!r} has no cross-attention, so no condition reaches it")
    for key in MORE_CONDITIONS:
        if config[key] is not None:
            raise ValueError(
                f"the U-Net of {name!r} wants more than one condition ({key} is {config[key]!r}, as in SDXL and other "
                "models); use Stable Diffusion 1.x or 2.x"
            )
    for key in ("in_channels", "out_channels"):
        if config[key] != latent_channels:
            raise ValueError(
                f"the U-Net of {name!r} has {key} {config[key]}, its VAE {latent_channels} latent channels: "
                "inpainting, depth and upscaling models are not supported, use a text-to-image one"
            )


def noise_schedule(config, name):
    """(prediction type, cumulative products of 1 - beta) of a scheduler's configuration."""
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTIONS:
        raise ValueError(
            f"the scheduler of {name!r} has prediction_type {prediction_type!r}; supported are "
            f"{' and '.join(PREDICTIONS)}"
        )
    if not config.get("beta_schedule") and not config.get("trained_betas"):
        raise ValueError(
            f"the scheduler of {name!r} ({config.get('_class_name')}) has no betas; flow matching and its like "
            "are not supported"
        )
    try:
        scheduler = DDPMScheduler(**{key: config[key] for key in BETAS if key in config})
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"the schedule of {name!r} is not valid: {error}") from error
    return prediction_type, scheduler.alphas_cumprod


def variant_files(variant):
    """Names of a variant's weights: one file, the index of several as diffusers writes it, as it did, as others do."""
    stem, ending = WEIGHTS.split(".")
    index = (f"{ending}.index.{variant}", f"{ending}.{variant}.index", f"{variant}.{ending}.index")
    return {f"{stem}.{variant}.{ending}", *(f"{stem}.{middle}.json" for middle in index)}


def files_of_part(files, part):
    return {file.split("/", 1)[1] for file in files if file.startswith(f"{part}/")}


def check_weight_files(name, part, files, variant=None):
    part_files = sorted(files_of_part(files, part))
    if {WEIGHTS, f"{WEIGHTS}.index.json", *variant_files(variant)} & {*part_files}:
        return
    if any(file.endswith(".safetensors") for file in part_files):
        reason = (
            f"the weights there have another name ({', '.join(part_files)}): save the pipeline with save_pretrained"
        )
    elif any(file.endswith((".bin", ".pt", ".pth", ".ckpt")) for file in part_files):
        reason = (
            "pickled weights (.bin) are never read: where you trust them, convert them with "
            "save_pretrained(safe_serialization=True)"
        )
    else:
        reason = "download or save the checkpoint again"
    raise ValueError(f"{name!r} has no {part}/{WEIGHTS}; {reason}")


def check_weights(folder, width, variant=None):
    """Check that the shapes in the headers of the U-Net's weight files match the configuration."""
    names = (*sorted(variant_files(variant), key=len), WEIGHTS, f"{WEIGHTS}.index.json")
    paths = [folder / name for name in names if (folder / name).is_file()][:1]
    if ".index." in paths[0].name:
        shards = read_json(paths[0]).get("weight_map", {})
        paths = [folder / shard for shard in sorted(set(shards.values()))]
    widths = set()
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                names = [key for key in file.keys() if key.endswith("attn2.to_k.weight")]  # noqa: SIM118
                widths |= {file.get_slice(key).get_shape()[1] for key in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {str(path)!r}: {error}. Download or save the checkpoint again") from error
    if widths != {width}:
        shown = ", ".join(map(str, sorted(widths))) or "no cross-attention"
        raise ValueError(
            f"{str(folder / 'config.json')!r} says cross_attention_dim {width}, the weights beside it have {shown}"
        )


def open_checkpoint(name, revision, token):
    """(names of all files, folder) of a checkpoint; the folder is None for a checkpoint that is on the Hub only."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name!r} is a file; a diffusers folder with unet, vae and scheduler is needed")
    if not folder.is_dir():
        try:
            repository = HfApi(token=token).model_info(name, revision=revision)
            return {file.rfilename for file in repository.siblings}, None
        except Exception as error:
            # The Hub's client raises its own error classes and those of its HTTP library. Offline, use its cache.
            folder = cached_folder(name, revision)
            if folder is None:
                raise ValueError(
                    f"no diffusion checkpoint at {name!r}, neither a local folder nor a readable Hub id: "
                    f"{one_line(error)}"
                ) from error
    files = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    return files | ({INDEX} if (folder / INDEX).is_file() else set()), folder


def cached_folder(name, revision):
    """The folder of a checkpoint in the Hub's cache, or None."""
    for file in (CONFIGS["unet"], "transformer/config.json"):
        with suppress(Exception):
            return Path(hf_hub_download(name, file, revision=revision, local_files_only=True)).parent.parent
    return None


def read_config(name, part, revision=None, token=None):
    file = CONFIGS.get(part, f"{part}/config.json")
    if Path(name).is_dir():
        return read_json(Path(name) / file)
    name = str(name)
    try:
        return read_json(Path(hf_hub_download(name, file, revision=revision, token=token)))
    except Exception as error:
        raise ValueError(f"cannot read {file} of {name!r}: {one_line(error)}") from error


def defaults(model_class):
    """The default of each parameter of a model class: older configurations leave out defaults."""
    return {name: value.default for name, value in inspect.signature(model_class.__init__).parameters.items()}
