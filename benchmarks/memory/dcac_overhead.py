"""What DCAC costs beside its baseline: parameters, FLOPs and memory, counted without a GPU, and time, measured.

    python -m benchmarks.memory.dcac_overhead --table
    python -m benchmarks.memory.dcac_overhead --table --json TABLE.json --step_json STEPS.json
    python -m benchmarks.memory.dcac_overhead --memory --json MEMORY.json        # GiB of tensors alive; three minutes
    python -m benchmarks.memory.dcac_overhead --step --json STEP.json            # on a GPU: ms, ratios, peak GiB
    python -m benchmarks.memory.dcac_overhead --step --size block --modes lora   # the same on a CPU

The real architectures (CLIP ViT-B/16 at 256x128, Stable Diffusion 1.5 at 128x128, 751 identities, batch 64) are built
from their configuration on the meta device, by the functions training uses, and run there: no weights, no memory.
Forward TFLOPs include the VAE, as the paper's do. A whole step is counted through a real backward pass in two ways.
ours: latents come from the cache, activations are kept. paper: the VAE encodes every image and the U-Net's residual
and transformer blocks are computed twice; paper_whole: the same with all of the U-Net computed twice.
"""

# isort: off
# First, so that bitsandbytes is quiet about our package of kernels.
from benchmarks.common import environment
import utils  # noqa: F401

# isort: on
import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from benchmarks.common import (
    BATCH,
    CLIP,
    IMAGE_SIZE,
    LATENT_SIZE,
    NUM_IDS,
    RANK,
    SCHEDULE,
    TAU,
    UNET,
    VAE,
    WIDTH,
    packages,
)
from benchmarks.speed import dcac_step
from utils.diffusion.schedule import NoiseSchedule, noise_loss
from utils.diffusion.unet import set_unet_mode
from utils.files import to_json, write_together
from utils.modeling.backbones import backbone_from_config
from utils.modeling.reid_model import ReIDModel

# Published: millions of trainable parameters, forward TFLOPs.
PAPER = {
    "inference": (85.55, 1.46),
    "baseline": (85.94, 1.46),
    "frozen": (86.51, 8.50),
    "lora": (89.01, 8.52),
    "partial-1": (599.37, 8.50),
    "partial-2": (696.41, 8.50),
    "full": (946.03, 8.50),
}
MODES = tuple(PAPER)[2:]
WAYS = ("ours", "paper", "paper_whole")


class Parts(NamedTuple):
    encoder: nn.Module
    prompts: nn.Parameter
    prototypes: torch.Tensor
    vae: nn.Module
    unet: nn.Module | None
    schedule: nn.Module


class Recomputed(nn.Module):
    """A network that keeps no activations at all for the backward pass."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *args, **options):
        return checkpoint(self.network, *args, use_reentrant=False, **options)


def build_parts(mode, device="meta"):
    """The parts of a run in one U-Net mode, or of the baseline."""
    with torch.device(device):
        encoder = ReIDModel(backbone_from_config(CLIPVisionConfig(**CLIP), IMAGE_SIZE), NUM_IDS)
        prompts = nn.Parameter(torch.randn(NUM_IDS, WIDTH))
        prototypes = F.normalize(torch.randn(NUM_IDS, encoder.num_features), dim=1)
        vae = AutoencoderKL(**VAE).requires_grad_(False).eval()
        unet = UNet2DConditionModel(**UNET) if mode in MODES else None
    if unet is not None:
        set_unet_mode(unet, mode, rank=RANK)
    return Parts(encoder, prompts, prototypes, vae, unet, NoiseSchedule(SCHEDULE).to(device))


def build_batch(device="meta"):
    with torch.device(device):
        return {
            "images": torch.randn(BATCH, 3, *IMAGE_SIZE),
            "labels": torch.randint(NUM_IDS, (BATCH,)),
            "squares": torch.randn(BATCH, 3, 128, 128),
            "latents": torch.randn(BATCH, *LATENT_SIZE),
            "noise": torch.randn(BATCH, *LATENT_SIZE),
            "timesteps": torch.randint(1000, (BATCH,)),
        }


def training_loss(parts, batch, way):
    """The three losses of one step; without a U-Net the baseline's two."""
    output = parts.encoder(batch["images"])
    loss = F.cross_entropy(output.logits, batch["labels"], label_smoothing=0.1)
    similarities = F.normalize(output.bn_features.float(), dim=1) @ parts.prototypes.t()
    loss = loss + F.cross_entropy(similarities / 0.01, batch["labels"])
    if parts.unet is None:
        return loss
    latents, unet = batch["latents"], parts.unet
    if way != "ours":
        with torch.no_grad():
            latents = parts.vae.encode(batch["squares"]).latent_dist.sample() * parts.vae.config.scaling_factor
    if way == "paper":
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()
    if way == "paper_whole":
        unet = Recomputed(unet)
    condition = (torch.softmax(output.logits / TAU, dim=1) @ parts.prompts)[:, None]
    # The authors' blocks are computed again to their end, needed or not.
    with nullcontext() if way == "ours" else set_checkpoint_early_stop(False):
        return loss + noise_loss(unet, parts.schedule, latents, batch["noise"], batch["timesteps"], condition)


def trainable(modules):
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return sum(parameter.numel() for parameter in parameters.values())


def count_parameters(mode, parts):
    if mode == "inference":
        return trainable([parts.encoder.backbone])
    extra = 0 if parts.unet is None else parts.prompts.numel() + trainable([parts.unet])
    return trainable([parts.encoder]) + extra


def count_flops(run):
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops() / 1e12


def forward_flops(mode, parts, batch):
    with torch.no_grad():
        if mode == "inference":
            return count_flops(lambda: parts.encoder.eval()(batch["images"]))
        parts.encoder.train()
        # The way that runs the VAE and, without gradient, recomputes nothing.
        return count_flops(lambda: training_loss(parts, batch, "paper_whole"))


def step_flops(parts, batch, way):
    parts.encoder.train()
    return count_flops(lambda: training_loss(parts, batch, way).backward())


def count_all():
    """(table, steps): per mode, parameters and forward TFLOPs beside the paper's, and TFLOPs of a whole step."""
    table, steps = {}, {}
    batch = build_batch()
    for mode, (paper_params, paper_tflops) in PAPER.items():
        parts = build_parts(mode)
        params = count_parameters(mode, parts) / 1e6
        tflops = forward_flops(mode, parts, batch)
        table[mode] = {
            "ours": {"params_m": round(params, 4), "tflops": round(tflops, 4)},
            "paper": {"params_m": paper_params, "tflops": paper_tflops},
        }
        if mode != "inference":
            ways = WAYS if mode in MODES else WAYS[:1]
            counted = {way: step_flops(parts, batch, way) for way in ways}
            steps[mode] = {way: {"tflops": round(value, 4)} for way, value in counted.items()}
    for row in steps.values():
        for step in row.values():
            step["ratio"] = round(step["tflops"] / steps["baseline"]["ours"]["tflops"], 4)
    return table, steps


def print_table(table, steps):
    print(f"{'':<12}{'trainable parameters (M)':^26}{'forward TFLOPs, batch 64':^26}")
    print(f"{'mode':<12}{'ours':>13}{'paper':>13}{'ours':>13}{'paper':>13}")
    for mode, row in table.items():
        ours, paper = row["ours"], row["paper"]
        numbers = ours["params_m"], paper["params_m"], ours["tflops"], paper["tflops"]
        print(f"{mode:<12}" + "".join(f"{number:>13.2f}" for number in numbers))
    print(f"\n{'':<12}{'TFLOPs of a whole step, forward and backward (times the baseline)':^66}")
    print(f"{'mode':<12}{'ours':>18}{'the paper’s way':>22}{'all U-Net twice':>22}")
    for mode, row in steps.items():
        cells = [f"{row[way]['tflops']:.2f} ({row[way]['ratio']:.2f}x)" for way in WAYS if way in row]
        print(f"{mode:<12}{cells[0]:>18}" + "".join(f"{cell:>22}" for cell in cells[1:]))


def write(path, content):
    with write_together(path.parent) as part:
        part(path.name).write_text(to_json(content), encoding="utf-8")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", action="store_true", help="count parameters and FLOPs; a minute on a CPU")
    what.add_argument("--memory", action="store_true", help="count the memory of a step, for several batch sizes")
    what.add_argument("--step", action="store_true", help="time steps; on the GPU where there is one")
    parser.add_argument("--json", type=Path, help="file for what was found")
    parser.add_argument("--step_json", type=Path, help="with --table: file for TFLOPs of a whole step, with versions")
    parser.add_argument("--size", choices=["paper", "block", "tiny"], default="paper", help="default paper")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the U-Net; default all")
    parser.add_argument("--batches", type=int, nargs="+", help="images a step; default: of the size")
    parser.add_argument("--mixed_precision", choices=["bf16", "fp16", "no"], help="default bf16 on a GPU, else no")
    parser.add_argument("--rounds", type=int, default=3, help="through all configurations; default 3")
    parser.add_argument("--steps", type=int, default=10, help="timed in each round; default 10")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them; default 3")
    parser.add_argument("--compile", action="store_true", help="measure --torch_compile too")
    args = parser.parse_args(input_args)
    args.mixed_precision = args.mixed_precision or ("bf16" if torch.cuda.is_available() else "no")
    default = [16, 32, 64, 128] if args.memory and args.size == "paper" else [dcac_step.sizes()[args.size].batch]
    args.batches = args.batches or default
    if args.rounds * args.steps < 2:
        parser.error("--rounds x --steps must be at least 2, for quartiles")
    return args


def main(input_args=None):
    args = parse_args(input_args)
    if not args.table:
        found = dcac_step.count_memory(args) if args.memory else dcac_step.time_steps(args)
        if args.json:
            write(args.json, {**environment(), **packages(), **found})
        return
    table, steps = count_all()
    print_table(table, steps)
    if args.json:
        write(args.json, table)
    if args.step_json:
        write(args.step_json, {**environment(), **packages(), "batch": BATCH, "steps": steps})


if __name__ == "__main__":
    main()
