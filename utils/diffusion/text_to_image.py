"""A whole diffusion model for fine-tuning and sampling: prompts to conditions, seeds to latents, latents to pictures.

model = TextToImage("CompVis/stable-diffusion-v1-4", tokenizer, mode="lora", device="cuda", dtype=torch.float16)
latents = model.sample(model.encode(prompts), seeds, resolution=(512, 256), steps=20, guidance=7.5)
pictures = model.pictures(latents)
"""

import hashlib
import math
from contextlib import contextmanager, nullcontext

import torch
from diffusers import DDIMScheduler
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from utils.batches.chunks import weights_digest
from utils.diffusion.checkpoint import read_config
from utils.diffusion.families import family_of
from utils.diffusion.families.parts import has_part, load_network
from utils.diffusion.families.quantized import quantize
from utils.diffusion.families.solvers import WITH_NOISE, first_strength, scaled
from utils.diffusion.families.texts import Text, load_text_encoder, load_tokenizer
from utils.diffusion.fast_lora import add_fast_lora, drawing_fast
from utils.diffusion.unet import load_vae, set_unet_mode

TEXT_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


# Of all images that the VAE encodes or decodes at once: one of 512 x 512.
VAE_PIXELS = 1 << 18


class TextToImage:
    """All parts of the model, on the device. `mode`, "lora" or "full", says how the U-Net trains.

    `bits`: 4 or 8, of the weights that LoRA leaves frozen.
    `unet` is the network that denoises, of some families a transformer. The text encoder of Stable Diffusion 1.x and
    2.x trains in the same mode if `train_text_encoder`. `digest` identifies the weights as loaded.
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
        bits=None,
    ):
        self.device, self.dtype, self.autocast = torch.device(device), dtype, autocast
        self.family = family = family_of(name, revision)
        self.schedule = family.schedule_of(name, revision).to(device)
        self.scheduler_config = DDIMScheduler.load_config(name, subfolder="scheduler", revision=revision)
        overflows = family.VAE_OVERFLOWS_IN_FLOAT16 and read_config(name, "vae", revision).get("force_upcast", True)
        vae_dtype = torch.float32 if overflows and dtype == torch.float16 else dtype
        self.vae = load_vae(name, dtype=vae_dtype, revision=revision).to(device)
        whole = "full" if mode == "full" else "frozen"
        self.unet = load_network(name, family.PART, family.NETWORK, whole, dtype=dtype, revision=revision)
        text_dtype = torch.float32 if train_text_encoder else dtype
        self.texts = load_texts(name, family, tokenizer, text_dtype, revision, self.unet.config)
        self.text_encoder, self.tokenizer = self.texts[0].encoder, tokenizer
        parts = [self.unet, self.vae, *(text.encoder for text in self.texts if text.encoder is not None)]
        digests = [*map(weights_digest, parts), *([f"{bits} bits"] if bits else [])]
        self.digest = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        if bits:
            quantize(self.unet, bits, dtype, self.device)
        if mode == "lora":
            set_unet_mode(self.unet, "lora", rank=rank, dtype=dtype, seed=seed, targets=family.LORA_TARGETS)
        if train_text_encoder and mode == "lora":
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                # peft itself: transformers' add_adapter may ask for a newer peft than there is.
                config = LoraConfig(r=rank, lora_alpha=1, target_modules=TEXT_LORA_TARGETS)
                inject_adapter_in_model(config, self.text_encoder)
        elif train_text_encoder:
            self.text_encoder.requires_grad_(True)
            self.text_encoder.get_input_embeddings().requires_grad_(False)
        for part in (self.unet, self.vae) if self.texts_rest else parts:
            part.to(device)
        self.scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.denoiser = family.Denoiser(self.unet, self.scale)
        self.fast, self.texts_are_here, self.unprompted = None, False, {}

    def compile(self):
        """Compile the network; it shares the weights."""
        self.denoiser = self.family.Denoiser(torch.compile(self.unet), self.scale)

    def add_fast_lora(self, lora):
        """Keep a `FastLora` for `sample(..., fast=True)`."""
        add_fast_lora(self.unet, lora, self.dtype)
        self.fast = lora

    def trained_weights(self):
        return [
            weight for part in (self.unet, self.text_encoder) for weight in part.parameters() if weight.requires_grad
        ]

    def encode(self, prompts):
        """Conditions (B, tokens, width) of prompts."""
        if not self.texts_rest:
            with self.autocast():
                return self.family.encode(self.texts, prompts)
        # They are frozen and have their types; autocast would compute in half what T5 keeps in float32.
        with torch.autocast(self.device.type, enabled=False), self.texts_here():
            return self.family.encode(self.texts, prompts).to(self.dtype)

    def without_prompt(self, negative):
        """The condition that guidance leads away from."""
        if not self.texts_rest:
            with self.autocast():
                return self.family.unguided(self.texts, negative)
        if negative not in self.unprompted:
            with torch.autocast(self.device.type, enabled=False), self.texts_here():
                self.unprompted[negative] = self.family.unguided(self.texts, negative).to(self.dtype)
        return self.unprompted[negative]

    @property
    def texts_rest(self):
        """Several text encoders may be larger than the network: they are on the device only while they encode."""
        return len(self.texts) > 1

    @contextmanager
    def texts_here(self):
        """The frozen text encoders are on the device inside; copies of theirs are dropped at the end."""
        if self.texts_are_here:
            yield
            return
        encoders = [text.encoder for text in self.texts if text.encoder is not None]
        tensors = [tensor for encoder in encoders for tensor in (*encoder.parameters(), *encoder.buffers())]
        resting = [tensor.data for tensor in tensors]
        self.texts_are_here = True
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            yield
        finally:
            self.texts_are_here = False
            for tensor, data in zip(tensors, resting, strict=True):
                tensor.data = data

    @torch.no_grad()
    def encode_all(self, prompts):
        """Conditions of any number of prompts, without gradient; where text encoders rest, so do these, on the CPU."""
        # The states of 64 prompts in T5-XXL would take as much as half of its weights.
        size = 8 if self.texts_rest else 64
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        if not self.texts_rest:
            return torch.cat([self.encode(part) for part in parts])
        with self.texts_here():
            return torch.cat([self.encode(part).cpu() for part in parts])

    @torch.no_grad()
    def sample(
        self, conditions, seeds, *, resolution, solver="dpmsolver++", steps=20, guidance=7.5, guidance_share=1.0,
        negative="", batch_size=8, fast=False,
    ):  # fmt: skip
        """Latents (N, C, h, w) float32 for conditions (N, T, W); each depends only on its own seed.

        The first `guidance_share` of the steps are guided, away from `negative`. `fast`: with the few-step LoRA.
        """
        shape = (self.vae.config.latent_channels, *(side // self.scale for side in resolution))
        mixes = guidance > 1 and self.family.GUIDED
        size, num_guided = min(batch_size, len(seeds)), math.ceil(guidance_share * steps) if mixes else 0
        self.unet.eval()
        empty = self.without_prompt(negative) if num_guided else None
        drawn = []
        for start in range(0, len(seeds), size):
            rows = list(range(start, min(start + size, len(seeds))))
            # A smaller last batch would round differently and be compiled again.
            rows += rows[-1:] * (size - len(rows))
            generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
            noise = [torch.randn(shape, generator=generator) for generator in generators]
            scheduler = self.family.prepared_solver(solver, self.scheduler_config, steps, shape)
            drawing = {"generator": generators} if solver in WITH_NOISE else {}
            latents = torch.stack(noise).to(self.device) * first_strength(scheduler)
            prompted = conditions[rows].to(self.device)
            both = torch.cat([empty.expand_as(prompted), prompted]) if num_guided else None
            distilled = nullcontext() if self.family.GUIDED else self.denoiser.guided(guidance)
            with self.autocast(), distilled, drawing_fast(self.unet) if fast else nullcontext():
                for number, step in enumerate(scheduler.timesteps):
                    guided = number < num_guided
                    noised = scaled(scheduler, latents, step).to(self.dtype)
                    noised, condition = (torch.cat([noised, noised]), both) if guided else (noised, prompted)
                    prediction = self.denoiser(noised, step.to(self.device), encoder_hidden_states=condition).sample
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
        decoded, shift = [], self.vae.config.get("shift_factor") or 0.0
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        for part in latents.split(images_at_once(batch_size, *(factor * side for side in latents.shape[-2:]))):
            part = part / self.vae.config.scaling_factor + shift
            images = self.vae.decode(part.to(self.vae.dtype)).sample.float()
            check_finite(images)
            decoded.append((images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu().contiguous())
        return torch.cat(decoded)

    def pictures(self, latents, batch_size=8):
        """PIL images."""
        return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in self.decode(latents, batch_size)]


def images_at_once(batch_size, height, width):
    """How many images the VAE takes at once: its activations are as large as the images."""
    return max(1, min(batch_size, VAE_PIXELS // (height * width)))


def what_saves_memory(
    num_weights, *, finetune, use_8bit_adam, gradient_checkpointing, train_batch_size, resolution, sample_batch_size
):
    """Advice for a full GPU memory, with numbers for a model with `num_weights` trained weights."""
    words = []
    if finetune == "full":
        size = 16 * num_weights / 2**30
        words.append(f"--finetune lora ({size:.1f} GiB: gradients, optimiser, copy and half the weights);")
        if not use_8bit_adam:
            words.append(f"--use_8bit_adam ({6 * num_weights / 2**30:.1f} GiB);")
    if not gradient_checkpointing:
        words.append("--gradient_checkpointing (most activations of a step);")
    if train_batch_size > 1:
        words.append(f"--train_batch_size 1 ({100 * (1 - 1 / train_batch_size):.0f} % of the activations);")
    height, width = resolution
    if 2 * width > height:
        words.append(
            f"--resolution {height} {height // 2} ({100 * (1 - height / 2 / width):.0f} % of the activations);"
        )
    words.append(f"--sample_batch_size, now {sample_batch_size}, where it happens while images are drawn")
    return " ".join(words)


def load_texts(name, family, tokenizer, dtype, revision, network):
    """A `Text` for each of the family's encoders, the first with the given tokenizer; `network`: its configuration."""
    optional, texts = getattr(family, "OPTIONAL", None), []
    tokens = family.text_tokens(network) if hasattr(family, "text_tokens") else None
    for number, (tokenizer_part, part, model_class) in enumerate(family.TEXTS):
        if part == optional and not has_part(name, part, revision):
            texts.append(Text(None, None, network.joint_attention_dim))
            continue
        encoder = load_text_encoder(name, dtype, revision, part, model_class)
        own = load_tokenizer(name, revision, tokenizer_part) if number else tokenizer
        texts.append(Text(own, encoder, tokens=tokens))
    return texts


def check_finite(drawn):
    # Values that are not finite would become black pixels.
    if not drawn.isfinite().all():
        raise ValueError("what the model draws is not finite; use --mixed_precision bf16 or no, or lower rates")
