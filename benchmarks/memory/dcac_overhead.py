"""What DCAC costs beside its baseline: parameters, FLOPs and memory, counted without a GPU.

    python -m benchmarks.memory.dcac_overhead --table --results_dir benchmarks/results   # a minute on a CPU
    python -m benchmarks.memory.dcac_overhead --table --json FILE
    python -m benchmarks.memory.dcac_overhead --memory --json benchmarks/results/dcac_memory.json   # three minutes

The real architectures (CLIP ViT-B/16 at 256x128, Stable Diffusion 1.5 at 128x128, 751 identities, batch 64) are built
from their configuration on the meta device, by the functions that training uses, and run there: no weights, no memory.
Forward TFLOPs include the VAE, as the paper's do. A whole step is counted through a real backward pass in two ways.
ours: latents come from the cache. paper: the VAE encodes every image, as in the released code. Both keep activations.

With --table, --json FILE holds `{mode: {"ours": {"params_m", "tflops"}, "paper": {...}}}` and nothing else, for other
programs; --results_dir writes the same numbers as result files (dcac_table.json and dcac_step_flops.json).
`benchmarks.speed.dcac_step` measures time and memory of real steps.
"""

# isort: off
# First, so that bitsandbytes is quiet about our package of kernels.
import utils  # noqa: F401

# isort: on
import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from benchmarks.common import GIB, cell, command_line, write_json, write_result
from benchmarks.memory.alive import Alive, hollow
from benchmarks.memory.cards import training_cards
from benchmarks.models import (
    BATCH,
    CLIP,
    IMAGE_SIZE,
    LATENT_SIZE,
    MODES,
    NUM_IDS,
    RANK,
    SCHEDULE,
    TAU,
    UNET,
    VAE,
    WIDTH,
    Step,
    configurations,
    sizes,
)  # fmt: skip
from utils.diffusion.schedule import NoiseSchedule, noise_loss
from utils.diffusion.unet import set_unet_mode
from utils.modeling.backbones import backbone_from_config
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import text_table

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
WAYS = ("ours", "paper")
# Ways of a step whose memory is counted.
COUNTED = ("ours", "outer", "all")
TABLE_COLUMNS = ["mode", "parameters (M), ours", "paper", "forward TFLOPs, ours", "paper"]
STEP_COLUMNS = ["mode", "TFLOPs of a step, ours", "the paper's way"]


class Parts(NamedTuple):
    encoder: nn.Module
    prompts: nn.Parameter
    prototypes: torch.Tensor
    vae: nn.Module
    unet: nn.Module | None
    schedule: nn.Module


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
    if way == "paper":
        with torch.no_grad():
            latents = parts.vae.encode(batch["squares"]).latent_dist.sample() * parts.vae.config.scaling_factor
    condition = (torch.softmax(output.logits / TAU, dim=1) @ parts.prompts)[:, None]
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
        return count_flops(lambda: training_loss(parts, batch, "paper"))


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


def table_rows(table):
    """Trainable millions and forward TFLOPs of a batch of 64, ours and the paper's."""
    return [
        [mode, *(f"{row[who][key]:.2f}" for key in ("params_m", "tflops") for who in ("ours", "paper"))]
        for mode, row in table.items()
    ]


def step_rows(steps):
    """TFLOPs of a whole step, forward and backward, and times the baseline's."""
    return [
        [mode, *(f"{row[way]['tflops']:.2f} ({row[way]['ratio']:.2f}x)" if way in row else "-" for way in WAYS)]
        for mode, row in steps.items()
    ]


def counted_memory(size, mode, way, *, batch, dtype=torch.bfloat16):
    """GiB of tensors alive at the peak of a step: the second step, when the optimiser has its state."""
    step = Step(size, mode, way, batch=batch, dtype=dtype, device="meta")
    with FakeTensorMode():
        hollow(step.model)
        if step.vae is not None:
            hollow(step.vae)
        step.device = torch.device("cpu")
        step.batch = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in step.batch.items()}
        step.prepare()
        with Alive() as alive:
            for module in filter(None, (step.model, step.vae)):
                alive.add(*module.parameters(), *module.buffers())
            alive.add(*step.batch.values())
            for _ in range(2):
                step.run()
    return alive.peak / GIB


def count_memory(args):
    """{mode: {way: {batch: GiB}}} of tensors alive at the peak of a step."""
    counted = {}
    for mode, way in configurations(args.modes, COUNTED):
        row = counted.setdefault(mode, {}).setdefault(way, {})
        for batch in args.batches:
            row[batch] = round(counted_memory(sizes()[args.size], mode, way, batch=batch), 3)
        print(f"{mode:<12}{way:<10}" + "".join(f"{cell(gib):>9}" for gib in row.values()), flush=True)
    return {"unit": "GiB of tensors alive at the peak of a step in bf16", "size": args.size, "counted": counted}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", action="store_true", help="count parameters and FLOPs; a minute on a CPU")
    what.add_argument("--memory", action="store_true", help="count the memory of a step at several batch sizes")
    parser.add_argument(
        "--json", type=Path, help="with --table: write {mode: {ours, paper}} here; with --memory: the result file"
    )
    parser.add_argument("--results_dir", type=Path, help="with --table: folder for the two result files")
    parser.add_argument("--size", choices=["paper", "block", "tiny"], default="paper", help="default paper")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the U-Net; default all")
    parser.add_argument("--batches", type=int, nargs="+", help="images a step; default 16 32 64 128 at the size paper")
    args = parser.parse_args(input_args)
    if args.results_dir and not args.table:
        parser.error("--results_dir belongs to --table; --memory writes --json")
    args.batches = args.batches or ([16, 32, 64, 128] if args.size == "paper" else [sizes()[args.size].batch])
    return args


def main(input_args=None):
    args = parse_args(input_args)
    command = command_line(__spec__.name, input_args)
    if args.memory:
        raw = count_memory(args)
        if args.json:
            write_result(args.json, command, *training_cards(raw["counted"]), raw)
        return
    table, steps = count_all()
    print(f"{text_table(TABLE_COLUMNS, table_rows(table))}\n\n{text_table(STEP_COLUMNS, step_rows(steps))}")
    if args.json:
        write_json(args.json, table)
    if args.results_dir:
        write_result(args.results_dir / "dcac_table.json", command, TABLE_COLUMNS, table_rows(table), table)
        raw = {"batch": BATCH, "steps": steps}
        write_result(args.results_dir / "dcac_step_flops.json", command, STEP_COLUMNS, step_rows(steps), raw)


if __name__ == "__main__":
    main()
