"""GiB of tensors alive while an identity is tuned by LoRA and drawn, at the sizes of released models, without a GPU.

    python -m benchmarks.memory.family_memory --json benchmarks/results/family_memory.json

Counted on fake tensors in bfloat16, 1024 x 512 pixels: a step of one own and one reference image (the second, when the
optimiser has its state), drawing two images and decoding them, and encoding prompts, when the text encoders, which
otherwise rest in the host's memory, are beside the network. A card needs 1 to 1.5 GiB more for CUDA itself. The rows
of 4 bits take off what `--base_bits 4` saves of the linear layers in blocks, and add the largest one in bfloat16.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, T5Config, T5EncoderModel

from benchmarks.common import GIB, command_line, write_result
from benchmarks.memory.alive import Alive, hollow
from benchmarks.memory.cards import family_cards
from benchmarks.models import SCHEDULE, TEXT, VAE
from train_dreambooth_reid import denoising_errors
from utils.diffusion.families import flux, sd3, sdxl
from utils.diffusion.families.flow import FlowSchedule
from utils.diffusion.families.quantized import in_a_block
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.text_to_image import images_at_once
from utils.diffusion.unet import set_unet_mode
from utils.reporting.report import text_table

HALF = torch.bfloat16
PIXELS = (1024, 512)
RANK = 8
LARGE_CLIP = TEXT | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


# Its tensors are not read: timesteps say all.
FLOW = FlowSchedule({"shift": 3.0}, "uniform")


def noise_schedule():
    return NoiseSchedule(SCHEDULE)


def flow_schedule():
    return FLOW


# Family, the network's configuration, the VAE's, text encoders, tokens and width of a condition, schedule.
MODELS = {
    "SDXL base": (
        sdxl,
        {
            "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        VAE, (TEXT, LARGE_CLIP), (78, 2048), noise_schedule,
    ),
    "SD 3 medium": (
        sd3,
        {
            "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "num_attention_heads": 24,
            "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        },
        VAE | {"latent_channels": 16}, (TEXT, LARGE_CLIP, T5_XXL), (77 + 256 + 1, 4096),
        flow_schedule,
    ),
    "Flux.1 dev": (
        flux,
        {"guidance_embeds": True},
        VAE | {"latent_channels": 16}, (TEXT, T5_XXL), (512 + 1, 4096), flow_schedule,
    ),
}  # fmt: skip


def text_encoder(model_class, config):
    kind = T5Config if model_class is T5EncoderModel else CLIPTextConfig
    return model_class(kind(**config))


def count(name):
    """{part: GiB at its peak}, with those of the network's and the text encoders' weights; sizes of linear layers."""
    family, network_config, vae_config, texts, condition, schedule = MODELS[name]
    with torch.device("meta"):
        network = family.NETWORK(**network_config)
        vae = AutoencoderKL(**vae_config).requires_grad_(False).to(HALF)
        encoders = [
            text_encoder(model_class, config).to(HALF)
            for (_, _, model_class), config in zip(family.TEXTS, texts, strict=True)
        ]
    set_unet_mode(network, "lora", rank=RANK, dtype=HALF, targets=family.LORA_TARGETS)
    network.enable_gradient_checkpointing()
    size = vae.config.latent_channels, *(side // 8 for side in PIXELS)
    weights = {"network": network, "text encoders": nn.ModuleList(encoders)}
    gib = {part: sum(weight.nbytes for weight in module.parameters()) / GIB for part, module in weights.items()}
    for part in ("tuning", "drawing", "encoding"):
        with FakeTensorMode(), contextlib.ExitStack() as stack:
            here = [network, vae, *(encoders if part == "encoding" else [])]
            for module in here:
                hollow(module)
            alive = stack.enter_context(Alive())
            alive.add(*(tensor for module in here for tensor in (*module.parameters(), *module.buffers())))
            denoiser = family.Denoiser(network, 8)
            if part == "tuning":
                tune(network, denoiser, schedule(), size, condition, alive)
            elif part == "drawing":
                draw(network, denoiser, vae, size, condition, family.GUIDED)
            else:
                encode(encoders, family)
        gib[part] = alive.peak / GIB
    return gib, [layer.weight.numel() for layer in linear_layers(network)]


def linear_layers(network):
    """The layers that `--base_bits` takes, below LoRA's own."""
    return [
        getattr(module, "base_layer", module)
        for name, module in network.named_modules()
        if in_a_block(name)
        and ".lora_" not in name
        and isinstance(module, (nn.Linear, LoraLinear))
        and not name.endswith("base_layer")
    ]


def in_four_bits(gib, sizes):
    """Half a byte a weight, and a float32 for each 64 of them."""
    saved, largest = sum(sizes) * (2 - 0.5 - 4 / 64) / GIB, 2 * max(sizes) / GIB
    less = {"network": saved, "encoding": saved, "tuning": saved - largest, "drawing": saved - largest}
    return {part: value - less.get(part, 0.0) for part, value in gib.items()}


def tune(network, denoiser, schedule, size, condition, alive):
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    # AdamW's two moments, there until the end.
    moments = [torch.empty(2, *weight.shape) for weight in weights]
    alive.add(*moments)
    network.train()
    latents, noise = torch.randn(2, 2, *size)
    for _ in range(2):
        tokens = torch.randn(2, *condition, dtype=HALF)
        with torch.autocast("cpu", HALF):
            errors = denoising_errors(denoiser, schedule, latents, noise, torch.zeros(2, dtype=torch.long), tokens)
        errors.mean().backward()
        for weight in weights:
            weight.grad = None


def draw(network, denoiser, vae, size, condition, guided, batch=2):
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", HALF):
        both = batch * (1 + guided)
        latents = torch.randn(both, *size, dtype=HALF)
        denoiser(latents, torch.tensor(500.0), encoder_hidden_states=torch.randn(both, *condition, dtype=HALF))
        vae.decode(latents[: images_at_once(batch, *(8 * side for side in size[1:]))])


def encode(encoders, family, batch=8):
    """As many prompts at once as `TextToImage.encode_all` gives to models with several text encoders."""
    with torch.no_grad():
        for encoder in encoders:
            is_t5 = isinstance(encoder, T5EncoderModel)
            length = family.T5_TOKENS if is_t5 else encoder.config.max_position_embeddings
            encoder(torch.zeros(batch, length, dtype=torch.long), output_hidden_states=not is_t5)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="result file")
    args = parser.parse_args(input_args)
    counted = {}
    for name in MODELS:
        gib, sizes = count(name)
        for words, numbers in ((name, gib), (f"{name}, 4 bits", in_four_bits(gib, sizes))):
            counted[words] = {part: round(value, 2) for part, value in numbers.items()}
            print(words, counted[words], flush=True)
    columns, rows = family_cards(counted)
    print(text_table(columns, rows))
    if args.json:
        raw = {"unit": "GiB of tensors alive at the peak", "counted": counted}
        write_result(args.json, command_line(__spec__.name, input_args), columns, rows, raw)


if __name__ == "__main__":
    main()
