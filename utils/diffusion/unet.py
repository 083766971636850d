"""The parts of Stable Diffusion for training: loads VAE and U-Net, sets the trained weights, saves the U-Net."""

import importlib.metadata
import json
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.amp import is_autocast_available

from utils.diffusion.checkpoint import WEIGHTS, read_config
from utils.diffusion.schedule import NoiseSchedule
from utils.files import one_line, to_json, write_together
from utils.modeling.folder import read_json

UNET_MODES = ("lora", "frozen", "partial-1", "partial-2", "full", "scratch")
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]
OUTER = ("up_blocks.", "time_embedding.", "conv_norm_out.", "conv_out.")
# Beginnings of the names of the U-Net's own weights that train.
TRAINED = {
    "lora": (),
    "frozen": (),
    "partial-1": OUTER,
    "partial-2": (*OUTER, "mid_block."),
    "full": ("",),
    "scratch": ("",),
}


def load_diffusion(
    name, mode, rank, *, mixed_precision, seed, revision=None, variant=None, channels_last=True, memory_efficient=False
):
    """(U-Net in one of UNET_MODES, noise schedule, frozen VAE) of a checkpoint, for training."""
    # Weights that stay frozen are kept in the precision they compute in.
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)
    unet = load_unet(name, mode, rank=rank, dtype=half, seed=seed, revision=revision, variant=variant)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if memory_efficient:
        enable_memory_efficient_attention(unet)
    schedule = NoiseSchedule.from_pretrained(name, revision=revision)
    return unet, schedule, load_vae(name, dtype=half, revision=revision)


def load_vae(name_or_path, *, dtype=torch.float32, revision=None, token=None):
    """The frozen AutoencoderKL of a checkpoint."""
    vae = load_part(AutoencoderKL, "vae", name_or_path, dtype, revision, token)
    return vae.requires_grad_(False).eval()


def load_unet(name_or_path, mode, *, rank=8, dtype=torch.float32, seed=0, revision=None, token=None, variant=None):
    """The U-Net of a checkpoint, ready to train in one of UNET_MODES; `dtype` is the type of the frozen weights."""
    check_mode(mode, rank)
    if mode == "scratch":
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(read_config(str(name_or_path), "unet", revision, token))
        unet.to_empty(device="cpu")
    else:
        # Weights that train must not be rounded while they are loaded.
        whole = dtype if mode in ("lora", "frozen") else torch.float32
        unet = load_part(UNet2DConditionModel, "unet", name_or_path, whole, revision, token, variant)
    return set_unet_mode(unet, mode, rank=rank, dtype=dtype, seed=seed)


def load_part(model_class, part, name, dtype, revision, token, variant=None):
    try:
        with readable(str(name), part, variant, revision, token) as place:
            model, report = model_class.from_pretrained(
                **place, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:
        # Absent, truncated and wrong files raise error classes of three libraries.
        raise ValueError(f"the {part} of {str(name)!r} cannot be loaded: {one_line(error)}") from error
    wrong = [f"{key} is missing" for key in report["missing_keys"]]
    wrong += [f"{key} is not part of the model" for key in report["unexpected_keys"]]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the {part} weights in {str(name)!r} do not fit its config.json: {'; '.join(wrong[:3])}{more}"
        )
    return model


@contextmanager
def readable(name, part, variant, revision, token):
    """The arguments by which diffusers finds a part: of links if a variant's index has a name it does not know."""
    place = {"pretrained_model_name_or_path": name, "subfolder": part, "revision": revision, "token": token}
    name_of_index = f"{WEIGHTS.replace('.', f'.{variant}.')}.index.json"
    index = variant and part_file(name, part, name_of_index, revision, token)
    if not index:
        yield place | {"variant": variant}
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {shard: shard for shard in read_json(index)["weight_map"].values()}
        files |= {"config.json": "config.json", f"{WEIGHTS}.index.json": index.name}
        for link, file in files.items():
            (Path(folder) / link).symlink_to(part_file(name, part, file, revision, token).absolute())
        yield {"pretrained_model_name_or_path": folder}


def part_file(name, part, file, revision, token):
    """The path of a file of a checkpoint's part, None if it has none."""
    if Path(name).is_dir():
        path = Path(name) / part / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, f"{part}/{file}", revision=revision, token=token))
    except EntryNotFoundError:
        return None


def set_unet_mode(unet, mode, *, rank=8, dtype=torch.float32, seed=0, targets=LORA_TARGETS):
    """Set which weights of a plain U-Net train; "lora" adds LoRA, "scratch" draws new weights. Returns the U-Net.

    Trained weights become float32, frozen ones `dtype`. This works on the meta device too.
    """
    check_mode(mode, rank)
    with seeded(seed, unet.device):
        if mode == "lora":
            unet.add_adapter(LoraConfig(r=rank, lora_alpha=1, target_modules=targets))
            for module in unet.modules():
                if isinstance(module, BaseTunerLayer):
                    module.register_forward_pre_hook(cast_where_needed)
        if mode == "scratch":
            for module in unet.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            for name, module in unet.named_modules():
                # The last layer of each residual branch and of the U-Net: at first all blocks pass on what they get.
                if name == "conv_out" or name.endswith((".conv2", ".proj_out")):
                    nn.init.zeros_(module.weight)
                    nn.init.zeros_(module.bias)
    for name, parameter in unet.named_parameters():
        trained = ".lora_" in name or name.startswith(TRAINED[mode])
        parameter.requires_grad_(trained)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if trained else dtype)
    for module in unet.modules():
        # Those of Flux and SD3 have no weight.
        is_norm, own = isinstance(module, (nn.GroupNorm, nn.LayerNorm)), getattr(module, "weight", None)
        if is_norm and (mode in ("lora", "frozen") if own is None else not own.requires_grad):
            module.forward = partial(in_its_own_type, module, dtype)
    return unet.train(mode != "frozen")


def check_mode(mode, rank):
    if mode not in UNET_MODES:
        raise ValueError(f"the U-Net mode must be one of {', '.join(UNET_MODES)}, got {mode!r}")
    if mode == "lora" and rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, got {rank}")


def cast_where_needed(layer, inputs):
    """Cast LoRA's input only without autocast, which would undo peft's cast and keep one more copy in memory."""
    kind = inputs[0].device.type
    layer.cast_input_dtype_enabled = not (is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def in_its_own_type(norm, dtype, values):
    """Run a frozen norm in its own type, or `dtype`: autocast would use float32, twice as large an input and output.

    In half precision its sums are still computed in float32.
    """
    kind, dtype = values.device.type, getattr(norm.weight, "dtype", dtype)
    if not is_autocast_available(kind) or dtype == torch.float32:
        return type(norm).forward(norm, values)
    with torch.autocast(kind, enabled=False):
        return type(norm).forward(norm, values.to(dtype))


def recompute_activations(unet, which):
    """Compute activations again in the backward pass: "all", or those of the "outer" blocks only.

    The outer blocks have the most pixels: they save much memory for little computation.
    """
    unet.enable_gradient_checkpointing()
    if which == "outer":
        for block in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
            for module in block.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False


@contextmanager
def seeded(seed, device):
    """Random numbers inside depend on the seed; afterwards the generator continues as if none had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def save_unet(unet, mode, output_dir):
    """Write the trained weights, whole or not at all; `unet` is the module from load_unet, not wrapped.

    lora: unet_lora/pytorch_lora_weights.safetensors for `StableDiffusionPipeline.load_lora_weights(folder)`;
    frozen: nothing; other modes: unet/, a diffusers folder.
    """
    if mode == "frozen":
        return
    if mode == "lora":
        config = unet.peft_config["default"]
        state = get_peft_model_state_dict(unet)
        # The format has no alpha and assumes a factor of 1, so alpha / rank is multiplied into the second matrix.
        state = {
            key: value * (config.lora_alpha / config.r) if ".lora_B." in key else value for key, value in state.items()
        }
        state = named_as_published(unet, state)
        with write_together(Path(output_dir) / "unet_lora") as part:
            save_tensors(state, part("pytorch_lora_weights.safetensors"))
        return
    config = json.loads(unet.to_json_string())
    # The origin of the weights may be a path of this machine.
    config.pop("_name_or_path", None)
    with write_together(Path(output_dir) / "unet") as part:
        part("config.json").write_text(to_json(config), encoding="utf-8")
        save_tensors(unet.state_dict(), part(WEIGHTS))


def named_as_published(network, state):
    """LoRA weights with the names by which the network's pipeline loads them."""
    if isinstance(network, UNet2DConditionModel):
        return {f"unet.{key}": value for key, value in convert_state_dict_to_diffusers(state).items()}
    return {f"transformer.{key}": value for key, value in state.items()}


def save_feedback(unet, mode, condition, output_dir):
    """Write what the diffusion side learned: weights of the U-Net, and prompts.safetensors with the bottleneck."""
    save_unet(unet, mode, output_dir)
    with write_together(output_dir) as part:
        save_tensors(condition.state_dict(), part("prompts.safetensors"))


def save_tensors(state, path):
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def enable_memory_efficient_attention(unet):
    """Use xformers instead of torch's attention; ValueError if its kernels do not run on this machine."""
    device = torch.device("cuda") if torch.cuda.is_available() else unet.device
    try:
        from xformers.ops import memory_efficient_attention

        # Kernels built for another torch version fail only when they are used.
        tiny = torch.zeros(1, 16, 1, 32, device=device, dtype=torch.float16, requires_grad=True)
        memory_efficient_attention(tiny, tiny, tiny).sum().backward()
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:
        try:
            version = importlib.metadata.version("xformers")
        except importlib.metadata.PackageNotFoundError:
            version = "is not installed"
        raise ValueError(
            f"xformers cannot run here (xformers {version}, torch {torch.__version__}, {device.type}): "
            f"{one_line(error)[:200]}. "
            "Leave it off: torch's scaled-dot-product attention is the default and as lean"
        ) from error
