"""A few-step LoRA of the stand-in Stable Diffusion, for `--fast_lora`: distilled as LCM's are, a quarter of an hour.

    python -m benchmarks.generated.few_step_lora --output_dir output/few_step

Latent consistency distillation (Luo et al., 2023, arXiv:2310.04378 and 2311.05556): where the untouched model with
guidance w goes in one DDIM step from x_t to x_t', the LoRA must say the same clean latents of both,

    |f(x_t, t, c) - f(x_t', t', c)| small,    f = c_skip(t) x + c_out(t) x_0(x, t),    the second without gradient.

It learns people of the domains that the stand-in itself was trained on; a run that was stopped goes on.
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from utils.files import write_together
from utils.flags import DIFFUSION_DIR
from utils.standins.people import People, spoken
from utils.standins.train import train

NAME = "few_step_lora.safetensors"
LAYERS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
RANK, BATCH, RATE = 32, 8, 1e-3
# Steps of the untouched model, its guidance; of LCMScheduler: the factor on timesteps and the deviation of the data.
SOLVER_STEPS, GUIDANCE, SCALING, SIGMA = 50, 3.0, 10.0, 0.5
SIZE, FIRST_PID, NUM_IDS = (128, 64), 1000, 120


class Distilled:
    """The U-Net with the LoRA that learns, and the losses of its steps."""

    def __init__(self, seed=0):
        self.pipeline = StableDiffusionPipeline.from_pretrained(DIFFUSION_DIR, safety_checker=None)
        self.unet, self.signal = self.pipeline.unet, self.pipeline.scheduler.alphas_cumprod
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LAYERS)
        self.unet.requires_grad_(False).add_adapter(config)
        people = People(NUM_IDS, FIRST_PID)
        self.words = [people.words(number) for number in range(len(people))]
        self.mean, self.std = self.posteriors(people)

    @torch.no_grad()
    def posteriors(self, people):
        parts = [
            self.pipeline.vae.encode(people.images(rows, SIZE)).latent_dist
            for rows in torch.arange(len(people)).split(64)
        ]
        return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])

    @torch.no_grad()
    def embedded(self, texts):
        tokenizer = self.pipeline.tokenizer
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.pipeline.text_encoder(tokenizer(texts, **options).input_ids)[0]

    def clean(self, noised, timesteps, noise):
        """x_0 of a prediction of the noise."""
        signal = self.signal[timesteps].view(-1, 1, 1, 1)
        return (noised - (1 - signal).sqrt() * noise) / signal.sqrt()

    def consistent(self, noised, timesteps, condition):
        """f, by the U-Net with its LoRA."""
        scaled = (SCALING * timesteps.float()).view(-1, 1, 1, 1)
        skip = SIGMA**2 / (scaled**2 + SIGMA**2)
        noise = self.unet(noised, timesteps, condition).sample
        return skip * noised + scaled / (scaled**2 + SIGMA**2).sqrt() * self.clean(noised, timesteps, noise)

    @torch.no_grad()
    def one_step(self, noised, timesteps, earlier, condition, empty):
        """x_t' by a DDIM step of the untouched model under guidance."""
        self.unet.disable_adapters()
        both = self.unet(noised.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([condition, empty])).sample
        self.unet.enable_adapters()
        prompted, unprompted = both.chunk(2)
        noise = unprompted + GUIDANCE * (prompted - unprompted)
        signal = self.signal[earlier].view(-1, 1, 1, 1)
        return signal.sqrt() * self.clean(noised, timesteps, noise) + (1 - signal).sqrt() * noise

    def loss(self, step):
        rows, jump = torch.randint(len(self.mean), (BATCH,)), 1000 // SOLVER_STEPS
        latents = self.mean[rows] + self.std[rows] * torch.randn_like(self.mean[rows])
        latents = latents * self.pipeline.vae.config.scaling_factor
        draw = random.Random(f"words/{step}")
        texts = [spoken(self.words[row], draw) for row in rows.tolist()]
        condition, empty = self.embedded([*texts, *[""] * BATCH]).chunk(2)
        timesteps = jump * torch.randint(1, SOLVER_STEPS + 1, (BATCH,)) - 1
        earlier = (timesteps - jump).clamp(min=0)
        noised = self.pipeline.scheduler.add_noise(latents, torch.randn_like(latents), timesteps)
        before = self.one_step(noised, timesteps, earlier, condition, empty)
        with torch.no_grad():
            wanted = self.consistent(before, earlier, condition)
        apart = self.consistent(noised, timesteps, condition) - wanted
        # Huber's loss.
        return ((apart.square() + 1e-6).sqrt() - 1e-3).mean()

    def save(self, folder):
        weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        with write_together(folder) as part:
            # diffusers takes folder and name apart.
            place = part(NAME)
            StableDiffusionPipeline.save_lora_weights(place.parent, unet_lora_layers=weights, weight_name=place.name)
        return Path(folder) / NAME


def distilled(folder, steps):
    """The file of the LoRA, distilled where it is not there yet."""
    folder = Path(folder)
    if not (folder / NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = Distilled()
        train("few_step_lora", [model.unet], model.loss, steps, RATE, folder)
        model.save(folder)
    return folder / NAME


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="default 1200")
    parser.add_argument("--output_dir", type=Path, default=Path("output/few_step"), help="default output/few_step")
    args = parser.parse_args(input_args)
    print(f"--fast_lora {distilled(args.output_dir, args.steps)}")


if __name__ == "__main__":
    main()
