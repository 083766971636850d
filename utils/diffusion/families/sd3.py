"""Stable Diffusion 3 and 3.5: two CLIP text encoders, a T5 that may be left out, a transformer, flow matching."""

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from utils.diffusion.checkpoint import read_config
from utils.diffusion.families.flow import FlowSchedule
from utils.diffusion.families.parts import check_parts
from utils.diffusion.families.solvers import FLOW_EULER, flow_solver
from utils.diffusion.families.texts import (
    check_width,
    penultimate,
    read_text_config,
    tokens_of,
    with_pooled,
    without_pooled,
)

TITLE = "Stable Diffusion 3"
PART, NETWORK = "transformer", SD3Transformer2DModel
TEXTS = (
    ("tokenizer", "text_encoder", CLIPTextModelWithProjection),
    ("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
    ("tokenizer_3", "text_encoder_3", T5EncoderModel),
)
# T5's, of many gigabytes.
OPTIONAL = "text_encoder_3"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA_TARGETS = [f"attn.{layer}" for layer in ATTENTION]
SOLVERS, GUIDED = (FLOW_EULER,), True
VAE_OVERFLOWS_IN_FLOAT16 = False
T5_TOKENS = 256


def check(name, revision=None):
    """The number of pixels that image sides must be multiples of; ValueError where the parts do not fit."""
    network, vae = check_parts(name, TITLE, {PART: NETWORK}, revision, flow=True)
    first, second = (read_text_config(name, encoder, revision) for _, encoder, _ in TEXTS[:2])
    check_width(name, "pooled vectors", first.projection_dim + second.projection_dim, network["pooled_projection_dim"])
    clip = first.hidden_size + second.hidden_size
    if clip > network["joint_attention_dim"]:
        check_width(name, "tokens", clip, network["joint_attention_dim"])
    if network["in_channels"] != vae["latent_channels"]:
        raise ValueError(f"the transformer of {name!r} takes {network['in_channels']} channels, not those of its VAE")
    return 2 ** (len(vae["block_out_channels"]) - 1) * network["patch_size"]


def encode(texts, prompts):
    """Conditions (B, window + 256 + 1, width) of prompts; without T5 its states are zeros."""
    (first, pooled), (second, pooled_second) = (penultimate(text, prompts) for text in texts[:2])
    clip, last = torch.cat([first, second], dim=2), texts[2]
    if last.encoder is None:
        states = clip.new_zeros(len(prompts), T5_TOKENS, last.width)
    else:
        states = last.encoder(tokens_of(last, prompts, T5_TOKENS))[0]
    clip = F.pad(clip, (0, states.shape[2] - clip.shape[2]))
    return with_pooled(torch.cat([clip, states.to(clip.dtype)], dim=1), torch.cat([pooled, pooled_second], dim=1))


def unguided(texts, negative):
    return encode(texts, [negative])


def schedule_of(name, revision=None):
    return FlowSchedule(read_config(name, "scheduler", revision), "logit_normal")


def prepared_solver(name, config, steps, shape):
    # Only a checkpoint whose shift depends on the size looks at the number of patches, of 2 x 2 latents.
    return flow_solver(config, steps, shape[1] * shape[2] // 4)


class Denoiser:
    def __init__(self, network, scale):
        self.network = network

    def __call__(self, noised, timesteps, encoder_hidden_states):
        tokens, pooled = without_pooled(encoder_hidden_states, self.network.config.pooled_projection_dim)
        return self.network(
            hidden_states=noised,
            timestep=timesteps.expand(len(noised)),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
        )
