"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net, a noise schedule."""

from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from utils.diffusion.checkpoint import check_diffusion
from utils.diffusion.families.solvers import NOISE_SOLVERS, noise_solver
from utils.diffusion.families.texts import check_text_encoder, tokens_of
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.unet import LORA_TARGETS as TARGETS

TITLE = "Stable Diffusion 1.x and 2.x"
PART, NETWORK = "unet", UNet2DConditionModel
TEXTS = (("tokenizer", "text_encoder", CLIPTextModel),)
LORA_TARGETS = TARGETS
SOLVERS, GUIDED = tuple(NOISE_SOLVERS), True
VAE_OVERFLOWS_IN_FLOAT16 = False
prepared_solver = noise_solver


def check(name, revision=None):
    """The number of pixels that image sides must be multiples of; ValueError where the parts do not fit."""
    info = check_diffusion(name, revision=revision)
    check_text_encoder(name, info.condition_width, revision)
    return info.vae_scale


def encode(texts, prompts):
    """Conditions (B, window, width) of prompts."""
    (text,) = texts
    return text.encoder(tokens_of(text, prompts))[0]


def unguided(texts, negative):
    return encode(texts, [negative])


def schedule_of(name, revision=None):
    return NoiseSchedule.from_pretrained(name, revision=revision)


def Denoiser(network, scale):
    return network
