"""Tiny pipelines of every family, built by diffusers' own classes, with the stand-in's tokenizer for CLIP."""

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from utils.flags import DIFFUSION_DIR

WIDTH, T5_WIDTH = 16, 48


def clip(model_class, tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return model_class(config).eval()


def t5():
    """(tokenizer, encoder) of one token a letter."""
    letters = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -3.0) for letter in "▁abcdefghijklmnopqrs,tuvwxyz"),
    ]
    tokenizer = T5Tokenizer(vocab=letters, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config).eval()


def vae(channels=4, **more):
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, layers_per_block=1, **more,
    ).eval()  # fmt: skip


def sd(prediction="epsilon"):
    tokenizer = CLIPTokenizer.from_pretrained(DIFFUSION_DIR, subfolder="tokenizer")
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading",
        prediction_type=prediction,
    )  # fmt: skip
    text_encoder = clip(CLIPTextModel, tokenizer)
    return StableDiffusionPipeline(
        vae(scaling_factor=0.18215), text_encoder, tokenizer, unet.eval(), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl():
    tokenizer = CLIPTokenizer.from_pretrained(DIFFUSION_DIR, subfolder="tokenizer")
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH, attention_head_dim=(2, 4), norm_num_groups=8, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    texts = clip(CLIPTextModel, tokenizer), clip(CLIPTextModelWithProjection, tokenizer)
    return StableDiffusionXLPipeline(
        vae(scaling_factor=0.13025), *texts, tokenizer, tokenizer, unet.eval(), scheduler, add_watermarker=False
    )


def sd3(with_t5=True):
    tokenizer = CLIPTokenizer.from_pretrained(DIFFUSION_DIR, subfolder="tokenizer")
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, out_channels=4,
        pos_embed_max_size=32,
    ).eval()  # fmt: skip
    encoders = [clip(CLIPTextModelWithProjection, tokenizer) for _ in range(2)]
    tokenizer_3, encoder_3 = t5() if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(scaling_factor=1.5305, shift_factor=0.0609),
        encoders[0], tokenizer, encoders[1], tokenizer, encoder_3, tokenizer_3,
    )  # fmt: skip


def flux(guidance_embeds=True, shift=True):
    tokenizer = CLIPTokenizer.from_pretrained(DIFFUSION_DIR, subfolder="tokenizer")
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if shift else 1.0, use_dynamic_shifting=shift, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip
    tokenizer_2, encoder_2 = t5()
    return FluxPipeline(
        scheduler, vae(scaling_factor=0.3611, shift_factor=0.1159), clip(CLIPTextModel, tokenizer), tokenizer,
        encoder_2, tokenizer_2, transformer,
    )  # fmt: skip


BUILDERS = {
    "sd": sd, "sd-v": lambda: sd("v_prediction"), "sdxl": sdxl, "sd3": sd3, "sd3-without-t5": lambda: sd3(False),
    "flux": flux,
    "flux-schnell": lambda: flux(False, False),
}  # fmt: skip


def saved(kind, folder):
    """A tiny pipeline of a family with random weights, saved to `folder`."""
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        pipeline = BUILDERS[kind]()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline
