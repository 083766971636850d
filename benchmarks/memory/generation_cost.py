"""GiB of tensors alive while an identity is fine-tuned and drawn, at the sizes of Stable Diffusion 1.5, without a GPU.

Beside them the TFLOP of a fine-tuning step, where activations that are computed twice count twice.

    python -m benchmarks.memory.generation_cost --json benchmarks/results/generation_memory.json

Counted on fake tensors: a fine-tuning step with one own and one reference image (the second step, when the optimiser
has its state), and drawing a batch of images with guidance. A card needs 1 to 1.5 GiB more for CUDA's context,
workspaces and gaps.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.common import GIB, command_line, write_result
from benchmarks.memory.alive import Alive, hollow
from benchmarks.memory.cards import identity_cards
from benchmarks.models import SCHEDULE, TEXT, UNET, VAE
from train_dreambooth_reid import denoising_errors
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.unet import set_unet_mode

HALF = torch.bfloat16
# What trains, whether activations are computed twice, images drawn at a time.
WAYS = {
    "lora": ("lora", False, 8),
    "lora, checkpointing": ("lora", True, 8),
    "full, 8-bit Adam": ("full", False, 8),
    "full, 8-bit Adam, checkpointing": ("full", True, 8),
}
SIZES = [(512, 512), (512, 256)]


def build(mode, checkpointing):
    """The parts as TextToImage holds them: what trains in float32, the rest in half precision."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE).requires_grad_(False).to(HALF)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT)).requires_grad_(False).to(HALF)
    set_unet_mode(unet, mode, rank=8, dtype=HALF)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet, vae, text_encoder


def fine_tuning(unet, schedule, resolution, alive):
    """Two steps of train_dreambooth_reid.fine_tune with the 8-bit optimiser's two bytes a weight."""
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    states = [torch.empty(2, weight.numel(), dtype=torch.uint8) for weight in weights]
    latents, noise = torch.randn(2, 2, 4, resolution[0] // 8, resolution[1] // 8)
    condition, timesteps = torch.randn(2, 77, 768, dtype=HALF), torch.zeros(2, dtype=torch.long)
    alive.add(*states, latents, noise, condition)
    unet.train()
    for _ in range(2):
        with torch.autocast("cpu", HALF):
            errors = denoising_errors(unet, schedule, latents, noise, timesteps, condition)
        errors.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for weight in weights:
            weight.grad = None


def drawing(unet, vae, resolution, batch):
    """One denoising step with guidance, and the decoding, of a batch."""
    latents = torch.randn(batch, 4, resolution[0] // 8, resolution[1] // 8, dtype=HALF)
    unet.eval()
    with torch.no_grad(), torch.autocast("cpu", HALF):
        unet(torch.cat([latents, latents]), torch.tensor(0), encoder_hidden_states=torch.randn(2 * batch, 77, 768))
        vae.decode(latents)


def count(way, resolution):
    """GiB alive at the peaks of (fine-tuning, drawing)."""
    mode, checkpointing, batch = WAYS[way]
    unet, vae, text_encoder = build(mode, checkpointing)
    peaks = []
    for part in ("fine-tuning", "drawing"):
        with FakeTensorMode(), contextlib.ExitStack() as stack:
            for module in (unet, vae, text_encoder):
                hollow(module)
            alive = stack.enter_context(Alive())
            for module in (unet, vae, text_encoder):
                alive.add(*module.parameters(), *module.buffers())
            if part == "fine-tuning":
                fine_tuning(unet, NoiseSchedule(SCHEDULE), resolution, alive)
            else:
                drawing(unet, vae, resolution, batch)
        peaks.append(round(alive.peak / GIB, 2))
    return peaks


def step_tflop(way, resolution):
    """TFLOP of one fine-tuning step, of one own and one reference image."""
    unet, _, _ = build(*WAYS[way][:2])
    with FakeTensorMode():
        hollow(unet)
        with FlopCounterMode(display=False) as counter:
            fine_tuning(unet, NoiseSchedule(SCHEDULE), resolution, Alive())
    # `fine_tuning` takes two steps.
    return round(counter.get_total_flops() / 2e12, 2)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="result file")
    args = parser.parse_args(input_args)
    table, tflop = {}, {}
    for way in WAYS:
        for resolution in SIZES:
            name = f"{resolution[0]} x {resolution[1]}"
            tuning, drawn = count(way, resolution)
            table.setdefault(way, {})[name] = {"fine_tuning": tuning, "drawing": drawn}
            tflop.setdefault(way, {})[name] = step = step_tflop(way, resolution)
            words = f"fine-tuning {tuning:6.2f}   drawing {drawn:6.2f}   TFLOP a step {step:5.2f}"
            print(f"{way:<34}{name:<12}{words}", flush=True)
    if args.json:
        raw = {"unit": "GiB of tensors alive at the peak", "counted": table, "tflop_a_step": tflop}
        write_result(args.json, command_line(__spec__.name, input_args), *identity_cards(table), raw)


if __name__ == "__main__":
    main()
