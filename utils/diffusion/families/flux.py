"""Flux: CLIP's pooled vector and T5's tokens, a transformer over patches of 2 x 2 latents, flow matching.

The guidance of a distilled model is an input of its transformer: nothing is predicted twice.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from utils.diffusion.checkpoint import read_config
from utils.diffusion.families.flow import FlowSchedule
from utils.diffusion.families.parts import check_parts
from utils.diffusion.families.solvers import FLOW_EULER, flow_solver
from utils.diffusion.families.texts import check_width, read_text_config, tokens_of, with_pooled, without_pooled

TITLE = "Flux"
PART, NETWORK = "transformer", FluxTransformer2DModel
TEXTS = (("tokenizer", "text_encoder", CLIPTextModel), ("tokenizer_2", "text_encoder_2", T5EncoderModel))
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA_TARGETS = [
    *(f"attn.{layer}" for layer in ATTENTION), "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
    "ff_context.net.2",
]  # fmt: skip
SOLVERS, GUIDED = (FLOW_EULER,), False
VAE_OVERFLOWS_IN_FLOAT16 = False
T5_TOKENS, SCHNELL_TOKENS = 512, 256
# The guidance under which it is tuned, as the model without guidance, and that of diffusers' own pipeline.
TUNED_WITH, GUIDANCE = 1.0, 3.5
SCHNELL_STEPS = 4


def check(name, revision=None):
    """The number of pixels that image sides must be multiples of; ValueError where the parts do not fit."""
    network, vae = check_parts(name, TITLE, {PART: NETWORK}, revision, flow=True)
    clip, t5 = (read_text_config(name, encoder, revision) for _, encoder, _ in TEXTS)
    check_width(name, "pooled vectors", clip.hidden_size, network["pooled_projection_dim"])
    check_width(name, "tokens", t5.d_model, network["joint_attention_dim"])
    if network["in_channels"] != 4 * vae["latent_channels"]:
        raise ValueError(f"the transformer of {name!r} takes {network['in_channels']} channels, not those of its VAE")
    return 2 * 2 ** (len(vae["block_out_channels"]) - 1)


def encode(texts, prompts):
    """Conditions (B, 512 + 1, width) of prompts, of schnell (B, 256 + 1, width)."""
    clip, t5 = texts
    pooled = clip.encoder(tokens_of(clip, prompts)).pooler_output
    return with_pooled(t5.encoder(tokens_of(t5, prompts, t5.tokens))[0], pooled)


def text_tokens(network):
    """How many tokens of T5 the transformer of this configuration was trained with."""
    return T5_TOKENS if network.guidance_embeds else SCHNELL_TOKENS


def usual_drawing(network):
    """({flag: value} that images are drawn with by default, why)."""
    if network.get("guidance_embeds"):
        return {"guidance_scale": GUIDANCE}, f"{TITLE} is guided by an input of its own"
    return {"guidance_scale": 1.0, "num_inference_steps": SCHNELL_STEPS}, f"This {TITLE} is distilled to few steps"


def unguided(texts, negative):
    raise AssertionError("Flux predicts once")


def schedule_of(name, revision=None):
    return FlowSchedule(read_config(name, "scheduler", revision), "uniform")


def prepared_solver(name, config, steps, shape):
    return flow_solver(config, steps, shape[1] * shape[2] // 4, sigmas=np.linspace(1.0, 1 / steps, steps))


class Prediction(NamedTuple):
    sample: torch.Tensor


class Denoiser:
    def __init__(self, network, scale):
        self.network, self.guidance = network, TUNED_WITH

    @contextmanager
    def guided(self, guidance):
        """Inside, images are drawn under this guidance."""
        self.guidance = guidance
        try:
            yield
        finally:
            self.guidance = TUNED_WITH

    def __call__(self, noised, timesteps, encoder_hidden_states):
        config, size = self.network.config, noised.shape
        tokens, pooled = without_pooled(encoder_hidden_states, config.pooled_projection_dim)
        height, width = size[2] // 2, size[3] // 2
        places = torch.zeros(height, width, 3, device=noised.device, dtype=noised.dtype)
        places[..., 1] = torch.arange(height, device=noised.device)[:, None]
        places[..., 2] = torch.arange(width, device=noised.device)
        guidance = None
        if config.guidance_embeds:
            guidance = torch.full((len(noised),), self.guidance, device=noised.device, dtype=torch.float32)
        patches = noised.reshape(len(noised), size[1], height, 2, width, 2).permute(0, 2, 4, 1, 3, 5)
        prediction = self.network(
            hidden_states=patches.reshape(len(noised), height * width, 4 * size[1]),
            timestep=timesteps.expand(len(noised)) / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=noised.device, dtype=noised.dtype),
            img_ids=places.flatten(0, 1),
        ).sample
        patches = prediction.reshape(len(noised), height, width, size[1], 2, 2).permute(0, 3, 1, 4, 2, 5)
        return Prediction(patches.reshape(size))
