"""Time and memory of DCAC's training step, by the very modules that `train_dcac.py` trains.

Ways of doing it: `ours` (latents from the cache, activations kept), `outer` and `all` (as `--gradient_checkpointing`
computes them twice), `compiled` (ours through torch.compile), and `paper` (the VAE encodes every image, all of the
U-Net's blocks are computed twice). The size `block` is the first level of the real U-Net, two layers of the real
encoder, and the whole real VAE.
"""

import gc
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import CLIPVisionConfig

from benchmarks.common import BATCH, CLIP, IMAGE_SIZE, NUM_IDS, UNET, VAE
from benchmarks.memory.alive import Alive, hollow
from train_dcac import DCAC, Condition
from utils.diffusion.latents import encode, sample_latents
from utils.diffusion.schedule import NoiseSchedule
from utils.diffusion.unet import recompute_activations, set_unet_mode
from utils.modeling.backbones import backbone_from_config
from utils.modeling.memories import PrototypeMemory
from utils.modeling.reid_model import ReIDModel
from utils.standins import build
from utils.training.optimizer import build_optimizer

TIMED = ("ours", "outer", "all", "paper")
COUNTED = ("ours", "outer", "all")
GIB = 2**30


@dataclass
class Size:
    """What is built: configurations, pixels of encoder and VAE, identities, images a batch."""

    clip: dict
    unet: dict
    vae: dict
    image: tuple
    square: tuple
    num_ids: int
    batch: int


def sizes():
    level = UNET | {
        "block_out_channels": UNET["block_out_channels"][:1],
        "down_block_types": UNET["down_block_types"][:1],
        "up_block_types": UNET["up_block_types"][-1:],
    }
    small = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    small |= {"patch_size": 8, "image_size": 64, "projection_dim": 128}
    return {
        "paper": Size(CLIP, UNET, VAE, IMAGE_SIZE, (128, 128), NUM_IDS, BATCH),
        "block": Size(CLIP | {"num_hidden_layers": 2}, level, VAE, IMAGE_SIZE, (128, 128), NUM_IDS, 4),
        "tiny": Size(
            small, dict(build.build_unet().config), dict(build.build_vae().config), (128, 64), (128, 128), 128, 16
        ),
    }


class Step:
    """One configuration, ready to run: a mode of the U-Net (or "baseline") and a way."""

    def __init__(self, size, mode, way, *, batch, dtype=torch.float32, device="cpu"):
        self.way, self.dtype, self.device = way, dtype, torch.device(device)
        with torch.device(device):
            torch.manual_seed(0)
            encoder = ReIDModel(backbone_from_config(CLIPVisionConfig(**size.clip), size.image), size.num_ids)
            memory = PrototypeMemory(torch.randn(size.num_ids, encoder.num_features))
            condition = unet = schedule = self.vae = None
            scale = 2 ** (len(size.vae["block_out_channels"]) - 1)
            shape = (batch, size.vae["latent_channels"], *(side // scale for side in size.square))
            self.batch = {
                "images": torch.randn(batch, 3, *size.image),
                "labels": torch.arange(batch) // 4 % size.num_ids,
            }
            if mode != "baseline":
                width = size.unet["cross_attention_dim"]
                features = encoder.num_features
                condition = Condition(
                    "correlation",
                    "classifier",
                    "none",
                    num_ids=size.num_ids,
                    num_features=features,
                    width=width,
                    tau=0.6,
                )
                unet = UNet2DConditionModel.from_config(size.unet)
                schedule = NoiseSchedule({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
                if way == "paper":
                    self.vae = AutoencoderKL.from_config(size.vae).requires_grad_(False).eval()
                    for parameter in self.vae.parameters():
                        parameter.data = parameter.data.to(dtype)
                    self.batch["pictures"] = torch.rand(batch, 3, *size.square)
                self.batch |= {
                    "means": torch.randn(shape),
                    "stds": torch.rand(shape),
                    "drawn": torch.randn(shape),
                    "noise": torch.randn(shape),
                    "timesteps": torch.randint(1000, (batch,)),
                }
        if unet is not None:
            set_unet_mode(unet, mode, rank=8, dtype=dtype)
            if self.device.type != "meta":
                unet.to(memory_format=torch.channels_last)
            if way in ("outer", "all", "paper"):
                recompute_activations(unet, "outer" if way == "outer" else "all")
        self.model = DCAC(
            encoder, memory, condition, unet, schedule, ldm_weight=1.0, label_smoothing=0.1, pass_size=batch
        ).train()
        if way == "all":
            encoder.enable_gradient_checkpointing()
        if way == "compiled":
            encoder.backbone.compile()
            if unet is not None:
                unet.compile()
        self.optimizer = None

    def prepare(self):
        """The optimiser, over the parameters as they are now."""
        self.params = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer([{"params": self.params}], "adam", learning_rate=5e-6, weight_decay=1e-4)

    def run(self):
        """What `train_dcac.py` does with a batch; returns the loss."""
        batch, diffusion = self.batch, {}
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else nullcontext():
            if self.model.unet is not None:
                mean, std = batch["means"], batch["stds"]
                if self.vae is not None:
                    mean, std = encode(self.vae, batch["pictures"])
                diffusion = {
                    "latents": sample_latents(mean, std, batch["drawn"], 0.18215),
                    "noise": batch["noise"],
                    "timesteps": batch["timesteps"],
                }
            # The authors' blocks are computed again to their end, needed or not.
            with set_checkpoint_early_stop(False) if self.way == "paper" else nullcontext():
                loss, _, features, labels = self.model(batch["images"], batch["labels"], **diffusion)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.memory.update(features, labels)
        return loss.detach()


def configurations(modes, ways):
    return [("baseline", "ours"), *((mode, way) for mode in modes for way in ways)]


def measure(size, configs, *, batch, dtype, device, rounds, steps, warmup, say=print):
    """{(mode, way): numbers}. Rounds go through all configurations, so that a machine's moods meet every one."""
    times = {config: [] for config in configs}
    memory, losses, failed = {}, {}, {}
    cuda = torch.device(device).type == "cuda"
    for number in range(rounds):
        for config in configs:
            if config in failed:
                continue
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                step = Step(size, *config, batch=batch, dtype=dtype, device=device)
                step.prepare()
                for _ in range(warmup):
                    step.run()
                losses[config] = float(step.run())
                for _ in range(steps):
                    wait(cuda)
                    start = time.perf_counter()
                    step.run()
                    wait(cuda)
                    times[config].append(1000 * (time.perf_counter() - start))
            except torch.OutOfMemoryError:
                failed[config] = "out of memory"
            else:
                if cuda:
                    memory[config] = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
            step = None
            say(f"round {number + 1}/{rounds}, {' '.join(config)}: {failed.get(config) or shown(times[config])}")
    return {
        config: {"failed": failed[config]}
        if config in failed
        else numbers(times[config], batch, memory.get(config), losses[config])
        for config in configs
    }


def wait(cuda):
    if cuda:
        torch.cuda.synchronize()


def shown(times):
    return f"{statistics.median(times):.1f} ms a step"


def numbers(times, batch, memory, loss):
    middle = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    row = {"ms": round(middle, 3), "ms_quartiles": [round(low, 3), round(high, 3)], "steps": len(times)}
    row |= {"images_per_second": round(1000 * batch / middle, 2), "loss": loss}
    if memory is not None:
        row |= {"peak_gib": round(memory[0], 3), "reserved_gib": round(memory[1], 3)}
    return row


def counted_memory(size, mode, way, *, batch, dtype=torch.bfloat16):
    """GiB of tensors alive at the peak of a step (the second, when the optimiser has its state)."""
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
    size, counted = sizes()[args.size], {}
    for mode, way in configurations(args.modes, COUNTED):
        row = counted.setdefault(mode, {}).setdefault(way, {})
        for batch in args.batches:
            row[batch] = round(counted_memory(size, mode, way, batch=batch), 3)
        print(f"{mode:<12}{way:<10}" + "".join(f"{gib:>9.2f}" for gib in row.values()), flush=True)
    return {"unit": "GiB of tensors alive at the peak of a step in bf16", "size": args.size, "counted": counted}


def time_steps(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[args.mixed_precision]
    size, found = sizes()[args.size], {}
    ways = [*TIMED, "compiled"] if args.compile else TIMED
    for batch in args.batches:
        measured = measure(
            size,
            configurations(args.modes, ways),
            batch=batch,
            dtype=dtype,
            device=device,
            rounds=args.rounds,
            steps=args.steps,
            warmup=args.warmup,
        )
        base = measured["baseline", "ours"].get("ms")
        for (mode, way), row in measured.items():
            paper = measured.get((mode, "paper"), {}).get("ms")
            if "ms" in row and base:
                row["times_baseline"] = round(row["ms"] / base, 4)
            if "ms" in row and paper:
                row["times_paper"] = round(row["ms"] / paper, 4)
            found.setdefault(batch, {}).setdefault(mode, {})[way] = row
    print_times(found)
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {"threads": torch.get_num_threads()}
    return {**gpu, "device": device, "size": args.size, "mixed_precision": args.mixed_precision, "batches": found}


def print_times(found):
    print(f"\n{'batch':>5}  {'mode':<11}{'way':<9}{'ms':>9}{'x baseline':>12}{'x paper':>9}{'images/s':>10}{'GiB':>8}")
    for batch, modes in found.items():
        for mode, ways in modes.items():
            for way, row in ways.items():
                numbers = [row.get("ms"), row.get("times_baseline"), row.get("times_paper")]
                numbers += [row.get("images_per_second"), row.get("peak_gib")]
                cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
                widths = zip(cells, (9, 12, 9, 10, 8), strict=True)
                line = row.get("failed") or "".join(f"{cell:>{width}}" for cell, width in widths)
                print(f"{batch:>5}  {mode:<11}{way:<9}{line}")
