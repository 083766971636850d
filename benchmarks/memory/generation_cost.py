"""GiB of tensors alive while an identity is fine-tuned and drawn, at the sizes of Stable Diffusion 1.5, without a GPU.

Beside them the TFLOP of a fine-tuning step, where activations that are computed twice count twice; and the PFLOP of a
whole identity by the recipes: training, reference images, drawing, and the VAE's part.

    python -m benchmarks.memory.generation_cost --json benchmarks/results/generation_memory.json \
        --cost_json benchmarks/results/generation_cost.json

Counted on fake tensors: a fine-tuning step with the batch of the recipe, `lora` two own and two reference images,
`paper` one of each (the second step, when the optimiser has its state), and drawing a batch of images with guidance. A
card needs 1 to 1.5 GiB more for CUDA's context, workspaces and gaps.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.common import GIB, command_line, write_result
from benchmarks.memory.alive import Alive, hollow
from benchmarks.memory.cards import identity_cards, identity_costs
from benchmarks.models import SCHEDULE, TEXT, UNET, VAE
from train_dreambooth_reid import RECIPES, denoising_errors
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.text_to_image import images_at_once
from utils.diffusion.unet import set_unet_mode
from utils.reporting.report import text_table

HALF = torch.bfloat16
# What trains, whether activations are computed twice, the recipe.
WAYS = {
    "lora": ("lora", False, "lora"),
    "lora, checkpointing": ("lora", True, "lora"),
    "full, 8-bit Adam": ("full", False, "paper"),
    "full, 8-bit Adam, checkpointing": ("full", True, "paper"),
}
DRAWN = 8
SIZES = [(512, 512), (512, 256)]
# Reference sets an identity: `--reference_prompts shared` left 32 for the 751 identities of Market-1501's size.
SHARED = 32 / 751
# Market-1501 has 12,936 training images of 751 identities.
OWN_IMAGES = 17
# Recipe, reference sets an identity, steps that draw an image, share of them that is guided.
IDENTITIES = {
    "paper": ("paper", 1, 25, 1),
    "lora, a reference set for each identity": ("lora", 1, 20, 1),
    "lora": ("lora", SHARED, 20, 1),
    "lora, guidance on half of the steps": ("lora", SHARED, 20, 0.5),
    "lora with a few-step LoRA: 4 steps, no guidance": ("lora", SHARED, 4, 0),
}


def build(mode, checkpointing):
    """The parts as TextToImage holds them: what trains in float32, the rest in half precision."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE).requires_grad_(False).to(HALF)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT)).requires_grad_(False).to(HALF)
    set_unet_mode(unet, mode, rank=8, dtype=HALF)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet, vae, text_encoder


def fine_tuning(unet, schedule, resolution, alive, own):
    """Two steps of train_dreambooth_reid.fine_tune, of so many own images and as many reference images, with the 8-bit
    optimiser's two bytes a weight."""
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    states = [torch.empty(2, weight.numel(), dtype=torch.uint8) for weight in weights]
    latents, noise = torch.randn(2, 2 * own, 4, resolution[0] // 8, resolution[1] // 8)
    condition, timesteps = torch.randn(2 * own, 77, 768, dtype=HALF), torch.zeros(2 * own, dtype=torch.long)
    alive.add(*states, latents, noise, condition)
    unet.train()
    for _ in range(2):
        with torch.autocast("cpu", HALF):
            errors = denoising_errors(unet, schedule, latents, noise, timesteps, condition)
        errors.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for weight in weights:
            weight.grad = None


def drawing(unet, vae, resolution, batch=DRAWN):
    """One denoising step with guidance, and the decoding, of a batch."""
    latents = torch.randn(batch, 4, resolution[0] // 8, resolution[1] // 8, dtype=HALF)
    unet.eval()
    with torch.no_grad(), torch.autocast("cpu", HALF):
        unet(torch.cat([latents, latents]), torch.tensor(0), encoder_hidden_states=torch.randn(2 * batch, 77, 768))
        vae.decode(latents[: images_at_once(batch, *resolution)])


def count(way, resolution):
    """GiB alive at the peaks of (fine-tuning, drawing)."""
    mode, checkpointing, recipe = WAYS[way]
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
                fine_tuning(unet, NoiseSchedule(SCHEDULE), resolution, alive, batch_of(recipe))
            else:
                drawing(unet, vae, resolution)
        peaks.append(round(alive.peak / GIB, 2))
    return peaks


def batch_of(recipe):
    """Own images of a step."""
    return RECIPES[recipe]["train_batch_size"]


def counting():
    """torch's counter of operations, which knows the attention of GPUs, with that of a CPU."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        attention: lambda query, key, value, *more, **options: sdpa_flop_count(query, key, value),
        backward: lambda out, query, key, value, *more, **options: sdpa_backward_flop_count(out, query, key, value),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def step_tflop(way, resolution):
    """TFLOP of one fine-tuning step."""
    *built, recipe = WAYS[way]
    unet, _, _ = build(*built)
    with FakeTensorMode():
        hollow(unet)
        with counting() as counter:
            fine_tuning(unet, NoiseSchedule(SCHEDULE), resolution, Alive(), batch_of(recipe))
    # `fine_tuning` takes two steps.
    return round(counter.get_total_flops() / 2e12, 2)


def forward_tflop(resolution):
    """TFLOP of one pass of an image through the U-Net, the VAE's encoder and its decoder."""
    unet, vae, _ = build("lora", False)
    latents = (1, 4, resolution[0] // 8, resolution[1] // 8)
    numbers = []
    with FakeTensorMode(), torch.no_grad():
        for module in (unet.eval(), vae):
            hollow(module)
        for run in (
            lambda: unet(torch.randn(latents, dtype=HALF), 0, encoder_hidden_states=torch.randn(1, 77, 768)),
            lambda: vae.encode(torch.randn(1, 3, *resolution, dtype=HALF)),
            lambda: vae.decode(torch.randn(latents, dtype=HALF)),
        ):
            with counting() as counter, torch.autocast("cpu", HALF):
                run()
            numbers.append(counter.get_total_flops() / 1e12)
    return numbers


def identity_pflop(name):
    """PFLOP of the parts of one identity; the captioner and the text encoder are below a hundredth of the sum."""
    recipe, sets, steps, guided = IDENTITIES[name]
    recipe = RECIPES[recipe]
    resolution, mode = recipe["resolution"], recipe["finetune"]
    denoise, encode, decode = forward_tflop(resolution)
    step = step_tflop("lora" if mode == "lora" else "full, 8-bit Adam", resolution)
    # Reference images are drawn as the recipe says, with guidance on all steps.
    references = sets * recipe["num_reference_images"] * 2 * recipe["num_inference_steps"] * denoise
    parts = {
        "training": recipe["max_train_steps"] * step,
        "references": references,
        "drawing": recipe["num_images"] * steps * (1 + guided) * denoise,
        "VAE": OWN_IMAGES * encode + recipe["num_images"] * decode,
    }
    return {part: round(value / 1000, 3) for part, value in parts.items()}


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="result file of the memory")
    parser.add_argument("--cost_json", type=Path, help="result file of the cost of an identity")
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
    identities = {name: identity_pflop(name) for name in IDENTITIES}
    columns, rows = identity_costs(identities)
    print(text_table(columns, rows))
    if args.cost_json:
        raw = {"unit": "PFLOP", "identities": identities}
        write_result(args.cost_json, command_line(__spec__.name, input_args), columns, rows, raw)


if __name__ == "__main__":
    main()
