"""A whole Stable Diffusion for fine-tuning and sampling: prompts to conditions, seeds to latents, latents to pictures.

model = TextToImage("CompVis/stable-diffusion-v1-4", tokenizer, mode="lora", device="cuda", dtype=torch.float16)
latents = model.sample(model.encode(prompts), seeds, resolution=(512, 256), steps=20, guidance=7.5)
pictures = model.pictures(latents)
"""

import hashlib
import math
from contextlib import nullcontext

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, CLIPTextModel

from utils.batches.chunks import weights_digest
from utils.diffusion.fast_lora import add_fast_lora, drawing_fast
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.unet import load_unet, load_vae, set_unet_mode
from utils.files import one_line

# An image depends only on its seed: the last two also draw noise in their steps, from the generator of the image.
SOLVERS = {
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "ddim-trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
WITH_NOISE = ("lcm", "tcd")
TEXT_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def load_tokenizer(name, revision=None):
    try:
        return AutoTokenizer.from_pretrained(name, subfolder="tokenizer", revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded: {one_line(error)}") from error


def check_text_encoder(name, width, revision=None):
    """The tokens of a text; ValueError, from the configuration only, without a text encoder of the U-Net's width."""
    try:
        config = AutoConfig.from_pretrained(name, subfolder="text_encoder", revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{name!r} has no text encoder that can be read: {one_line(error)}") from error
    if config.model_type not in ("clip_text_model", "clip"):
        raise ValueError(f"the text encoder of {name!r} is a {config.model_type}; only CLIP's is supported")
    if config.hidden_size != width:
        raise ValueError(
            f"the text encoder of {name!r} has width {config.hidden_size}, its U-Net takes conditions of {width}"
        )
    return config.max_position_embeddings


class TextToImage:
    """All parts of the model, on the device. `mode`, "lora" or "full", says how the U-Net trains.

    The text encoder trains in the same mode if `train_text_encoder`. `digest` identifies the weights as loaded.
    """

    def __init__(
        self,
        name,
        tokenizer,
        *,
        mode,
        rank=8,
        seed=0,
        train_text_encoder=False,
        dtype=torch.float32,
        device="cpu",
        autocast=nullcontext,
        revision=None,
    ):
        self.tokenizer, self.device, self.dtype, self.autocast = tokenizer, torch.device(device), dtype, autocast
        self.schedule = NoiseSchedule.from_pretrained(name, revision=revision).to(device)
        self.scheduler_config = DDIMScheduler.load_config(name, subfolder="scheduler", revision=revision)
        self.vae = load_vae(name, dtype=dtype, revision=revision).to(device)
        self.unet = load_unet(name, "full" if mode == "full" else "frozen", dtype=dtype, revision=revision)
        self.text_encoder = load_text_encoder(name, torch.float32 if train_text_encoder else dtype, revision)
        digests = [weights_digest(part) for part in (self.unet, self.vae, self.text_encoder)]
        self.digest = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        if mode == "lora":
            set_unet_mode(self.unet, "lora", rank=rank, dtype=dtype, seed=seed)
        if train_text_encoder and mode == "lora":
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                # peft itself: transformers' add_adapter may ask for a newer peft than there is.
                config = LoraConfig(r=rank, lora_alpha=1, target_modules=TEXT_LORA_TARGETS)
                inject_adapter_in_model(config, self.text_encoder)
        elif train_text_encoder:
            self.text_encoder.requires_grad_(True)
            self.text_encoder.get_input_embeddings().requires_grad_(False)
        self.unet.to(device)
        self.text_encoder.to(device)
        # The module that is called; a compiled one shares the U-Net's weights.
        self.denoiser = self.unet
        self.fast = None

    def add_fast_lora(self, lora):
        """Keep a `FastLora` for `sample(..., fast=True)`."""
        add_fast_lora(self.unet, lora, self.dtype)
        self.fast = lora

    def trained_weights(self):
        return [
            weight for part in (self.unet, self.text_encoder) for weight in part.parameters() if weight.requires_grad
        ]

    def encode(self, prompts):
        """Conditions (B, window, width) of prompts."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with self.autocast():
            return self.text_encoder(tokens.to(self.device))[0]

    def encode_all(self, prompts, batch_size=64):
        """Conditions of any number of prompts, without gradient."""
        with torch.no_grad():
            parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
            return torch.cat([self.encode(part) for part in parts])

    @torch.no_grad()
    def sample(
        self, conditions, seeds, *, resolution, solver="dpmsolver++", steps=20, guidance=7.5, guidance_share=1.0,
        negative="", batch_size=8, fast=False,
    ):  # fmt: skip
        """Latents (N, C, h, w) float32 for conditions (N, T, W); each depends only on its own seed.

        The first `guidance_share` of the steps are guided, away from `negative`. `fast`: with the few-step LoRA.
        """
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (self.vae.config.latent_channels, resolution[0] // scale, resolution[1] // scale)
        size, num_guided = min(batch_size, len(seeds)), math.ceil(guidance_share * steps) if guidance > 1 else 0
        self.unet.eval()
        empty = self.encode([negative]) if num_guided else None
        drawn = []
        for start in range(0, len(seeds), size):
            rows = list(range(start, min(start + size, len(seeds))))
            # A smaller last batch would round differently and be compiled again.
            rows += rows[-1:] * (size - len(rows))
            generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
            noise = [torch.randn(shape, generator=generator) for generator in generators]
            scheduler = solver_of(solver, self.scheduler_config)
            scheduler.set_timesteps(steps)
            drawing = {"generator": generators} if solver in WITH_NOISE else {}
            latents = torch.stack(noise).to(self.device) * scheduler.init_noise_sigma
            prompted = conditions[rows]
            both = torch.cat([empty.expand_as(prompted), prompted]) if num_guided else None
            with self.autocast(), drawing_fast(self.unet) if fast else nullcontext():
                for number, step in enumerate(scheduler.timesteps):
                    guided = number < num_guided
                    scaled = scheduler.scale_model_input(latents, step).to(self.dtype)
                    scaled, condition = (torch.cat([scaled, scaled]), both) if guided else (scaled, prompted)
                    prediction = self.denoiser(scaled, step.to(self.device), encoder_hidden_states=condition).sample
                    prediction = prediction.float()
                    if guided:
                        without, with_prompt = prediction.chunk(2)
                        prediction = without + guidance * (with_prompt - without)
                    latents = scheduler.step(prediction, step, latents, **drawing).prev_sample
            check_finite(latents)
            drawn.append(latents[: len(seeds) - start].float())
        return torch.cat(drawn)

    @torch.no_grad()
    def decode(self, latents, batch_size=8):
        """Decode latents to pixels (N, 3, H, W), uint8 on the CPU."""
        decoded = []
        for part in latents.split(batch_size):
            images = self.vae.decode((part / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
            check_finite(images)
            decoded.append((images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu().contiguous())
        return torch.cat(decoded)

    def pictures(self, latents, batch_size=8):
        """PIL images."""
        return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in self.decode(latents, batch_size)]


def what_saves_memory(
    num_weights, *, finetune, use_8bit_adam, gradient_checkpointing, train_batch_size, resolution, sample_batch_size
):
    """Advice for a full GPU memory, with numbers for a model with `num_weights` trained weights."""
    words = []
    if finetune == "full":
        size = 16 * num_weights / 2**30
        words.append(f"--finetune lora {size:.1f} GiB of gradients, optimiser, copy and half the weights;")
        if not use_8bit_adam:
            words.append(f"--use_8bit_adam {6 * num_weights / 2**30:.1f} GiB;")
    if not gradient_checkpointing:
        words.append("--gradient_checkpointing most activations of a step;")
    if train_batch_size > 1:
        words.append(f"--train_batch_size 1 {1 - 1 / train_batch_size:.0%} of them;")
    height, width = resolution
    if 2 * width > height:
        words.append(f"--resolution {height} {height // 2} {1 - height / 2 / width:.0%} of them;")
    words.append(f"--sample_batch_size, now {sample_batch_size}, where it happens while images are drawn")
    return " ".join(words)


def solver_of(name, config):
    """One of SOLVERS for a model, from the configuration of the model's own scheduler."""
    solver_class, options = SOLVERS[name]
    return solver_class.from_config(config, **options)


def check_finite(drawn):
    # Values that are not finite would become black pixels.
    if not drawn.isfinite().all():
        raise ValueError("what the model draws is not finite; use --mixed_precision bf16 or no, or lower rates")


def load_text_encoder(name, dtype, revision=None):
    try:
        text_encoder = CLIPTextModel.from_pretrained(
            name, subfolder="text_encoder", dtype=dtype, revision=revision, use_safetensors=True
        )
    except Exception as error:
        raise ValueError(f"the text encoder of {name!r} cannot be loaded: {one_line(error)}") from error
    return text_encoder.requires_grad_(False).eval()


@torch.no_grad()
def encode_texts(name, texts, num_tokens=None, *, device="cpu", revision=None, batch_size=64):
    """States of a checkpoint's text encoder: (N, width) of end tokens, or (N, num_tokens, width) of the first tokens.

    float32 on the CPU. A text that is too long keeps its end token.
    """
    tokenizer = load_tokenizer(name, revision)
    text_encoder = load_text_encoder(name, torch.float32, revision).to(device)
    states = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(
            texts[start : start + batch_size],
            padding="max_length",
            max_length=num_tokens or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        state = text_encoder(tokens.input_ids.to(device))[0].float().cpu()
        ends = tokens.attention_mask.sum(1) - 1
        states.append(state if num_tokens else state[torch.arange(len(state)), ends])
    return torch.cat(states)
