"""Stable Diffusion XL: two CLIP text encoders, a pooled vector and the image's size as further conditions."""

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from utils.diffusion.checkpoint import defaults, noise_schedule, read_config
from utils.diffusion.families.parts import check_parts
from utils.diffusion.families.solvers import NOISE_SOLVERS, noise_solver
from utils.diffusion.families.texts import check_width, penultimate, read_text_config, with_pooled, without_pooled
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.unet import LORA_TARGETS as TARGETS

TITLE = "Stable Diffusion XL"
PART, NETWORK = "unet", UNet2DConditionModel
TEXTS = (
    ("tokenizer", "text_encoder", CLIPTextModel),
    ("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
)
LORA_TARGETS = TARGETS
SOLVERS, GUIDED = tuple(NOISE_SOLVERS), True
# The VAE that was released, unless its configuration says otherwise.
VAE_OVERFLOWS_IN_FLOAT16 = True
prepared_solver = noise_solver
# Height and width of the original, place of the crop in it, height and width of the image.
NUM_SIZES = 6


def check(name, revision=None):
    """The number of pixels that image sides must be multiples of; ValueError where the parts do not fit."""
    unet, vae = check_parts(name, TITLE, {PART: NETWORK}, revision)
    unet = defaults(NETWORK) | unet
    noise_schedule(read_config(name, "scheduler", revision), name)
    first, second = (read_text_config(name, encoder, revision) for _, encoder, _ in TEXTS)
    check_width(name, "tokens", first.hidden_size + second.hidden_size, unet["cross_attention_dim"])
    width = NUM_SIZES * (unet["addition_time_embed_dim"] or 0) + second.projection_dim
    check_width(name, "pooled vectors and sizes", width, unet["projection_class_embeddings_input_dim"])
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(f"the U-Net of {name!r} takes {unet['in_channels']} channels, not those of its VAE")
    return 2 ** (len(vae["block_out_channels"]) - 1)


def encode(texts, prompts):
    """Conditions (B, window + 1, width) of prompts."""
    (first, _), (second, pooled) = (penultimate(text, prompts) for text in texts)
    return with_pooled(torch.cat([first, second], dim=2), pooled)


def unguided(texts, negative):
    """Without words it is nothing but zeros, as the model was trained."""
    condition = encode(texts, [negative])
    return condition if negative else torch.zeros_like(condition)


def schedule_of(name, revision=None):
    return NoiseSchedule.from_pretrained(name, revision=revision)


class Denoiser:
    """Calls the U-Net; `scale` is the number of pixels to a latent."""

    def __init__(self, network, scale):
        self.network, self.scale = network, scale

    def __call__(self, noised, timesteps, encoder_hidden_states):
        config = self.network.config
        width = config.projection_class_embeddings_input_dim - NUM_SIZES * config.addition_time_embed_dim
        tokens, pooled = without_pooled(encoder_hidden_states, width)
        height, width = (side * self.scale for side in noised.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=noised.device, dtype=tokens.dtype)
        more = {"text_embeds": pooled, "time_ids": sizes.expand(len(noised), -1)}
        return self.network(noised, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=more)
