"""DCAC: train a Re-ID encoder with feedback from a diffusion model, so that it generalises to cameras never seen.

    accelerate launch --config_file accelerate_config.yaml train_dcac.py
    accelerate launch train_dcac.py --recipe ma-ms --data_root ~/reid --output_dir output/ma-ms

The first is a demo on drawn people with the shipped stand-in models; the second the published Market-1501 -> MSMT17
run with CLIP ViT-B/16 and Stable Diffusion 1.5. `--diffusion none` is the baseline.

One step, on a batch of images x with identities y:

    f = encoder(x)    b = BatchNorm(f)    logits = W b    u = b / |b|
    L_id  = cross-entropy(logits, y), labels smoothed
    L_pcl = cross-entropy(u M^T / 0.01, y)                            M: a prototype of each identity, no gradient
    c     = softmax(logits / tau) P                                   P: a learned prompt of each identity
    L_ldm = mean (unet(z_t, t, c) - noise)^2                          z: VAE latents of the image, not augmented
    L     = L_id + L_pcl + lambda L_ldm

Through c the diffusion model tells classifier, neck and encoder which identities look alike.
"""

import argparse
import hashlib
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.batches.images import ReIDImages
from utils.batches.samplers import IdentitySampler, RemainingBatches
from utils.batches.transforms import test_transform, train_transform
from utils.datasets.training_sets import digest_of, open_source
from utils.diffusion.checkpoint import check_diffusion
from utils.diffusion.denoising import decode, denoise, sheet
from utils.diffusion.latents import VaeImages, build_latent_cache, encode, image_for_vae, sample_latents
from utils.diffusion.schedule import NoiseSchedule, noise_loss
from utils.diffusion.unet import (
    UNET_MODES,
    enable_memory_efficient_attention,
    load_unet,
    load_vae,
    recompute_activations,
    save_unet,
)
from utils.evaluation.features import extract
from utils.evaluation.targets import measure_targets, open_targets, results
from utils.files import portable, run_record, to_json, write_together
from utils.flags import (
    CLIP_DIR,
    DIFFUSION_DIR,
    OPTIMIZERS,
    SCHEDULES,
    SINGLE_IMAGE_IDS,
    check_ranges,
    describe_origin,
    parse_with_recipes,
)
from utils.launch import (
    EXIT_SIGTERM,
    end_with,
    gather_with_gradient,
    global_batch_size,
    start_accelerator,
    tracked,
    whole_weights,
)
from utils.modeling.folder import card_text, model_kind, training_card
from utils.modeling.memories import PrototypeMemory
from utils.modeling.norms import share_batch_statistics
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import text_table
from utils.training.checkpoints import load_checkpoint, open_state
from utils.training.loop import name_images, train_epochs
from utils.training.optimizer import LearningRate, build_optimizer
from utils.training.report import before_and_after, build_page

DEMO_SOURCE = "synthetic:domain=a,num_ids=112"
DEMO_TARGETS = ["synthetic:domain=b", "synthetic:domain=c"]
PUBLISHED = {
    "backbone": "openai/clip-vit-base-patch16",
    "pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "resolution": [256, 128],
    "diffusion_resolution": [128, 128],
    "padding": 10,
    "erasing": 0.5,
    "memory_temperature": 0.01,
    "train_batch_size": 64,
    "images_per_id": 4,
    "num_train_epochs": 60,
    "learning_rate": 5e-6,
    "lr_warmup_epochs": 10,
    "lr_milestones": [30, 50],
    "eval_every": 10,
    "log_every": 10,
    "checkpointing_steps": 1000,
    "dataloader_num_workers": 8,
    "mixed_precision": "fp16",
}


def published(source, target, rank, tau, **more):
    return PUBLISHED | {"source": source, "target": target, "rank": rank, "tau": tau} | more


RECIPES = {
    "ma-ms": published(["market1501"], ["msmt17"], 8, 0.6),
    "d-ma": published(["dukemtmcreid"], ["market1501"], 8, 0.6),
    "ms-ma": published(["msmt17"], ["market1501"], 32, 1.0),
    "c3-ma": published(["cuhk03np"], ["market1501"], 8, 0.1),
    "multi": published(["market1501", "dukemtmcreid", "cuhk03np"], ["msmt17"], 32, 1.0, test_resample="bicubic"),
    "supervised": published(["market1501"], ["market1501"], 8, 0.6),
}
# What may differ from the checkpoint's run without changing what it trains.
FREE_ON_RESUME = (
    "output_dir", "data_root", "cache_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit",
    "log_every", "report_to", "dataloader_num_workers", "max_train_steps", "eval_batch_size", "recipe", "push_to_hub",
    "hub_model_id", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "demo", "origin",
)  # fmt: skip

# What only the diffusion model's part of the training reads.
OF_DIFFUSION = (
    "pretrained_model_name_or_path", "revision", "diffusion_resolution", "cache_dir", "condition", "probabilities",
    "bottleneck", "unet_mode", "rank", "tau", "ldm_weight", "ldm_start_epoch", "lr_multiplier", "validation_ids",
)  # fmt: skip
OF_WARMUP_MULTISTEP = ("lr_warmup_epochs", "lr_warmup_factor", "lr_milestones", "lr_gamma")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    yes = {"action": "store_true"}
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="published values and real models (ma: Market-1501, d: DukeMTMC-reID, ms: MSMT17, c3: CUHK03-NP; first "
        "the source); any flag given wins; multi and supervised take other sets by --source and --target",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--source", nargs="+", metavar="SPEC", help=f"training sets; default {DEMO_SOURCE}")
    group.add_argument(
        "--target",
        nargs="+",
        metavar="SPEC",
        help=f"sets with query and gallery to measure on; default {' '.join(DEMO_TARGETS)} in the demo, else a "
        "single source's own",
    )
    group.add_argument("--data_root", help="folder in which the benchmarks lie")
    group.add_argument(
        "--resolution",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        default=[128, 64],
        help="input of the encoder in pixels; default 128 64",
    )
    group.add_argument(
        "--diffusion_resolution",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        default=[128, 64],
        help="input of the VAE in pixels, the picture is stretched to it; default 128 64",
    )
    group.add_argument("--padding", type=int, default=5, help="pixels around, of which a crop is taken; default 5")
    group.add_argument("--erasing", type=float, default=0.5, help="probability of random erasing; default 0.5")
    group.add_argument(
        "--single_image_ids",
        choices=SINGLE_IMAGE_IDS,
        default="error",
        help="identities with one image have nothing to be compared with in a batch: stop, repeat the image, or leave "
        "them out; default error",
    )
    group.add_argument("--skip_unreadable", **yes, help="leave out images that do not decode, and list them")
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="processes that prepare images; default 0, in the demo 1"
    )
    group.add_argument(
        "--cache_dir",
        default="~/.cache/diffreid",
        help="where latents of the training images are kept; `none` runs the VAE in every step; default "
        "~/.cache/diffreid",
    )

    group = parser.add_argument_group("models")
    group.add_argument(
        "--backbone",
        default=CLIP_DIR,
        help="encoder to start from, folder or Hub id: CLIP, ResNet, Swin, or a ReIDModel; default: the stand-in CLIP",
    )
    group.add_argument(
        "--pretrained_model_name_or_path",
        default=DIFFUSION_DIR,
        help="Stable Diffusion 1.x or 2.x, folder or Hub id; default: the shipped stand-in",
    )
    group.add_argument("--revision", help="of the diffusion model on the Hub")
    group.add_argument(
        "--diffusion", choices=["ldm", "none"], default="ldm", help="none trains the baseline; default ldm"
    )

    group = parser.add_argument_group("method")
    group.add_argument(
        "--condition",
        choices=["correlation", "class", "instance"],
        default="correlation",
        help="what conditions the U-Net: probabilities x prompts, the label's prompt, or feature x prompts; default "
        "correlation",
    )
    group.add_argument(
        "--probabilities",
        choices=["classifier", "prototype", "mean"],
        default="classifier",
        help="of --condition correlation: from the classifier, from the prototypes, or the mean of both; default "
        "classifier",
    )
    group.add_argument(
        "--bottleneck",
        choices=["none", "silu", "bn", "bn-silu", "condition-net"],
        default="none",
        help="what the condition passes before the U-Net; default none",
    )
    group.add_argument(
        "--unet_mode", choices=UNET_MODES, default="lora", help="what of the U-Net trains; default lora"
    )
    group.add_argument("--rank", type=int, default=8, help="of LoRA; default 8")
    group.add_argument("--tau", type=float, default=0.6, help="temperature of the probabilities; default 0.6")
    group.add_argument("--ldm_weight", type=float, default=1.0, help="lambda, weight of L_ldm; default 1")
    group.add_argument("--ldm_start_epoch", type=int, default=1, help="first epoch with L_ldm; default 1")
    group.add_argument("--lr_multiplier", type=float, default=1.0, help="on the rate of U-Net and prompts; default 1")
    group.add_argument("--memory_temperature", type=float, default=0.1, help="of L_pcl; default 0.1")
    group.add_argument("--memory_momentum", type=float, default=0.2, help="what a prototype keeps; default 0.2")
    group.add_argument("--label_smoothing", type=float, default=0.1, help="of L_id; default 0.1")

    group = parser.add_argument_group("training")
    group.add_argument("--train_batch_size", type=int, default=32, help="images a process and forward; default 32")
    group.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="forward passes a step: the batch of all of them is one batch for BatchNorm, memory and losses, and each "
        "pass is computed a second time in the backward pass; default 1",
    )
    group.add_argument("--images_per_id", type=int, default=4, help="K: images of each identity in a batch; default 4")
    group.add_argument("--num_train_epochs", type=int, default=5, help="default 5")
    group.add_argument("--max_train_steps", type=int, help="stop after so many steps; default: all epochs")
    group.add_argument("--learning_rate", type=float, default=1e-3, help="default 1e-3, for the stand-ins")
    group.add_argument(
        "--lr_scheduler", choices=SCHEDULES, default="warmup_multistep", help="default warmup_multistep"
    )
    group.add_argument("--lr_warmup_epochs", type=int, default=1, help="of warmup_multistep; default 1")
    group.add_argument("--lr_warmup_factor", type=float, default=0.1, help="of the rate at epoch 0; default 0.1")
    group.add_argument(
        "--lr_milestones", type=int, nargs="*", default=[4], help="epochs from which the rate is lower; default 4"
    )
    group.add_argument("--lr_gamma", type=float, default=0.1, help="factor at each milestone; default 0.1")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="of diffusers' schedules, in steps; default 0")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="default adam, weight decay as L2")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="default 0.9; of sgd the momentum")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="default 0.999")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="default 1e-8")
    group.add_argument("--adam_weight_decay", type=float, default=1e-4, help="default 1e-4")
    group.add_argument(
        "--max_grad_norm", type=float, default=0.0, help="clip gradients to this norm; default 0, never"
    )
    group.add_argument("--use_8bit_adam", **yes, help="bitsandbytes' 8-bit optimiser")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default accelerate's setting")
    group.add_argument("--allow_tf32", **yes, help="TF32 matrix products on Ampere and newer")
    group.add_argument(
        "--gradient_checkpointing",
        nargs="?",
        choices=["all", "outer"],
        const="all",
        help="recompute activations, less memory for more time: all of encoder and U-Net, or only those of the "
        "U-Net's outer blocks, which hold most; without a word all",
    )
    group.add_argument(
        "--enable_xformers_memory_efficient_attention", **yes, help="xformers in the U-Net; default torch's SDPA"
    )
    group.add_argument("--torch_compile", **yes, help="compile encoder and U-Net")
    group.add_argument("--seed", type=int, default=0, help="of weights, batches, augmentation and noise; default 0")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_every", type=int, default=5, help="epochs between evaluations; default 5")
    group.add_argument("--eval_batch_size", type=int, default=64, help="images a process; default 64")
    group.add_argument(
        "--test_resample",
        choices=["bilinear", "bicubic"],
        default="bilinear",
        help="resizing of targets; default bilinear",
    )
    group.add_argument("--rerank", **yes, help="k-reciprocal re-ranking beside the plain numbers")
    group.add_argument("--k1", type=int, default=20, help="re-ranking: reciprocal neighbours; default 20")
    group.add_argument("--k2", type=int, default=6, help="re-ranking: neighbours averaged over; default 6")
    group.add_argument(
        "--lambda_value", type=float, default=0.3, help="re-ranking: weight of the plain distance, 0 to 1; default 0.3"
    )
    group.add_argument(
        "--validation_ids",
        type=int,
        default=4,
        help="identities denoised under right and wrong condition; default 4, 0 for none",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="output/dcac", help="default output/dcac")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="steps between checkpoints; default 500")
    group.add_argument("--checkpoints_total_limit", type=int, default=2, help="how many are kept; default 2")
    group.add_argument(
        "--resume_from_checkpoint", help="`latest` (from 0 where there is none), a name such as checkpoint-500, a path"
    )
    group.add_argument("--log_every", type=int, default=1, help="steps between writes of log.jsonl; default 1")
    group.add_argument(
        "--report_to", nargs="+", default=["none"], help="tensorboard, wandb, trackio or others; default none"
    )
    group.add_argument("--push_to_hub", **yes, help="upload the model when done")
    group.add_argument("--hub_model_id", help="repository; default: the name of --output_dir")
    return parser


def parse_args(input_args=None):
    parser = build_parser()
    args, args.origin = parse_with_recipes(parser, RECIPES, input_args)
    args.demo = args.source is None and args.target is None
    args.source = args.source or [DEMO_SOURCE]
    if args.demo:
        args.target = DEMO_TARGETS
        if args.origin["dataloader_num_workers"] == "default":
            # People are drawn beside the steps, which leave a second core idle.
            args.dataloader_num_workers = 1
    check_args(parser, args)
    return args


def check_args(parser, args):
    """All that can be told from the arguments alone."""
    check_ranges(
        parser,
        args,
        one_or_more=[
            "train_batch_size", "gradient_accumulation_steps", "images_per_id", "num_train_epochs", "max_train_steps",
            "rank", "ldm_start_epoch", "eval_every", "eval_batch_size", "checkpointing_steps",
            "checkpoints_total_limit", "log_every", "k1", "k2",
        ],
        positive=["tau", "memory_temperature", "learning_rate", "lr_multiplier", "adam_epsilon"],
        not_negative=[
            "ldm_weight", "adam_weight_decay", "max_grad_norm", "dataloader_num_workers", "validation_ids",
            "lr_warmup_epochs", "lr_warmup_steps", "seed", "padding",
        ],
        fractions=[
            "erasing", "memory_momentum", "label_smoothing", "lambda_value", "lr_warmup_factor", "lr_gamma",
            "adam_beta1", "adam_beta2",
        ],
    )  # fmt: skip
    if min(args.resolution + args.diffusion_resolution) < 8:
        parser.error("--resolution and --diffusion_resolution must be at least 8 pixels")
    if args.probabilities != "classifier" and args.condition != "correlation":
        parser.error(f"--probabilities {args.probabilities} belongs to --condition correlation, not {args.condition}")
    if args.use_8bit_adam and args.optimizer == "sgd":
        parser.error("--use_8bit_adam goes with --optimizer adam or adamw, not sgd")
    if args.diffusion == "none" and args.enable_xformers_memory_efficient_attention:
        parser.error("--enable_xformers_memory_efficient_attention is of the U-Net, and --diffusion none has none")
    if args.diffusion == "ldm" and args.ldm_start_epoch > args.num_train_epochs:
        parser.error(
            f"--ldm_start_epoch {args.ldm_start_epoch} comes after the last of {args.num_train_epochs} epochs; the "
            "baseline is --diffusion none"
        )
    if args.validation_ids == 1:
        parser.error("--validation_ids 1: the wrong condition is another identity's; give 0, or 2 and more")


def without_effect(args):
    """{flag: what makes it idle} of flags that were given and change nothing beside the others."""
    baseline, own_schedule = args.diffusion == "none", args.lr_scheduler == "warmup_multistep"
    outer = args.gradient_checkpointing == "outer"
    cases = (
        (baseline, "--diffusion none", OF_DIFFUSION),
        (baseline and outer, "--diffusion none", ["gradient_checkpointing"]),
        (args.unet_mode != "lora", f"--unet_mode {args.unet_mode}", ["rank"]),
        (args.condition != "correlation", f"--condition {args.condition}", ["tau"]),
        (args.probabilities == "prototype", "--probabilities prototype", ["tau"]),
        (own_schedule, f"--lr_scheduler {args.lr_scheduler}", ["lr_warmup_steps"]),
        (not own_schedule, f"--lr_scheduler {args.lr_scheduler}", OF_WARMUP_MULTISTEP),
        (not args.rerank, "no --rerank", ["k1", "k2", "lambda_value"]),
        (args.optimizer == "sgd", "--optimizer sgd", ["adam_beta2", "adam_epsilon"]),
        (not args.push_to_hub, "no --push_to_hub", ["hub_model_id"]),
    )
    return {name: why for idle, why, names in reversed(cases) if idle for name in names if args.origin[name] == "flag"}


# The method


class Condition(nn.Module):
    """What the U-Net is told about each image: (B, 1, width)."""

    def __init__(self, kind, probabilities, bottleneck, *, num_ids, num_features, width, tau):
        super().__init__()
        self.kind, self.probabilities, self.tau = kind, probabilities, tau
        # A prompt of each identity; under `instance` the feature itself weighs the prompts.
        self.prompts = nn.Parameter(torch.randn(num_features if kind == "instance" else num_ids, width))
        layers = {
            "none": [],
            "silu": [nn.SiLU()],
            "bn": [nn.BatchNorm1d(width)],
            "bn-silu": [nn.BatchNorm1d(width), nn.SiLU()],
            "condition-net": [
                nn.BatchNorm1d(width),
                nn.SiLU(),
                nn.Linear(width, width // 8, bias=False),
                nn.BatchNorm1d(width // 8),
                nn.SiLU(),
                nn.Linear(width // 8, width, bias=False),
            ],
        }[bottleneck]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight)
        self.bottleneck = nn.Sequential(*layers)

    def forward(self, logits, bn_features, labels, memory):
        if self.kind == "class":
            tokens = self.prompts[labels]
        elif self.kind == "instance":
            tokens = F.normalize(bn_features, dim=1) @ self.prompts
        else:
            tokens = self.identity_probabilities(logits, bn_features, memory) @ self.prompts
        return self.bottleneck(tokens)[:, None]

    def identity_probabilities(self, logits, bn_features, memory):
        by_classifier = (logits / self.tau).softmax(1)
        if self.probabilities == "classifier":
            return by_classifier
        by_prototype = (memory.similarities(bn_features) / memory.temperature).softmax(1)
        return by_prototype if self.probabilities == "prototype" else (by_classifier + by_prototype) / 2


class DCAC(nn.Module):
    """Encoder, prototypes, condition and U-Net; `forward` is the loss of one batch.

    With several processes each passes its share of the images through encoder and U-Net. The features are gathered
    in between, so that BatchNorm, classifier, memory and condition see the whole batch, as one process would.
    """

    def __init__(self, encoder, memory, condition, unet, schedule, *, ldm_weight, label_smoothing, pass_size):
        super().__init__()
        self.encoder, self.memory, self.condition, self.unet = encoder, memory, condition, unet
        self.schedule = schedule
        self.ldm_weight, self.label_smoothing, self.pass_size = ldm_weight, label_smoothing, pass_size

    def forward(self, images, labels, latents=None, noise=None, timesteps=None):
        features = gather_with_gradient(self.in_passes(self.encoder.backbone, images))
        share, labels = share_of(features, len(images)), gather_with_gradient(labels)
        with torch.autocast(images.device.type, enabled=False):
            bn_features, logits = self.encoder.neck(features.float())
            loss_id = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            loss_pcl = self.memory(bn_features, labels)
            if latents is not None:
                condition = self.condition(logits, bn_features, labels, self.memory)[share]
        loss, loss_ldm = loss_id + loss_pcl, torch.zeros_like(loss_id)
        if latents is not None:
            losses = self.in_passes(self.denoise, latents, noise, timesteps, condition)
            loss_ldm = losses.mean()
            loss = loss + self.ldm_weight * loss_ldm
        values = {"loss": loss, "loss_id": loss_id, "loss_pcl": loss_pcl, "loss_ldm": loss_ldm}
        return loss, {name: value.detach() for name, value in values.items()}, bn_features.detach(), labels

    def denoise(self, latents, noise, timesteps, condition):
        return noise_loss(self.unet, self.schedule, latents, noise, timesteps, condition).view(1)

    def in_passes(self, function, *tensors):
        """One call, or calls on `pass_size` rows each whose activations are computed again in the backward pass."""
        if len(tensors[0]) <= self.pass_size:
            return function(*tensors)
        parts = zip(*(tensor.split(self.pass_size) for tensor in tensors), strict=True)
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


def share_of(batch, size):
    start = torch.distributed.get_rank() * size if len(batch) > size else 0
    return slice(start, start + size)


# Data


class Batches(torch.utils.data.Dataset):
    """Training images with what the diffusion model needs of them: kept posteriors, or the picture for the VAE."""

    def __init__(self, dataset, labels, transform, cache=None, vae_size=None):
        self.images = ReIDImages(dataset, transform, labels)
        self.cache = cache
        self.for_vae = VaeImages(dataset, vae_size) if vae_size else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        row = self.images[item]
        if self.for_vae is not None:
            row["vae_images"] = self.for_vae[row["indices"]]
        return row

    def collate(self, rows):
        batch = torch.utils.data.default_collate(rows)
        if self.cache is not None:
            batch["means"], batch["stds"] = self.cache.posterior(batch["indices"])
        return batch


# Training


@dataclass
class Run:
    """What the functions below share."""

    args: argparse.Namespace
    accelerator: Accelerator
    train: datasets.Dataset
    labels: torch.Tensor
    targets: list
    state: dict
    model: DCAC
    vae: nn.Module = None

    @property
    def bare(self):
        """The DCAC module without what accelerate puts around it."""
        return self.accelerator.unwrap_model(self.model)


def on_whole_weights(function):
    """For what reads the model's weights outside of a training step."""

    @wraps(function)
    def call(run, *arguments):
        with whole_weights(run.model, run.accelerator):
            return function(run, *arguments)

    return call


def main(args):
    late = args.diffusion == "ldm" and args.ldm_start_epoch > 1
    accelerator = start_accelerator(args, find_unused_parameters=late, max_zero_stage=3)
    introduce(args, accelerator.print)
    # What can be wrong with data and configuration shows before a model is loaded.
    model_kind(args.backbone)
    info = None
    if args.diffusion == "ldm":
        info = check_diffusion(
            args.pretrained_model_name_or_path, resolution=args.diffusion_resolution, revision=args.revision
        )
    train, labels, data = open_source(
        args.source, args.data_root, single_image_ids=args.single_image_ids, skip_unreadable=args.skip_unreadable
    )
    own = args.source if len(args.source) == 1 and {"query", "gallery"} <= set(data) else []
    targets = open_targets(args.target or own, args.data_root, skip_unreadable=args.skip_unreadable)
    batch_size = global_batch_size(args, accelerator)
    if batch_size < 2:
        raise ValueError("a batch of one image has no statistics for BatchNorm; raise --train_batch_size")
    share = accelerator.process_index, accelerator.num_processes
    sampler = RemainingBatches(IdentitySampler(labels.tolist(), batch_size, args.images_per_id, args.seed, *share))
    path, state = open_state(
        args,
        "train_dcac.py",
        effective_batch_size=batch_size,
        data=digest_of(train, labels),
        free=FREE_ON_RESUME,
        say=accelerator.print,
    )
    precision = state.setdefault("precision", accelerator.mixed_precision)
    if precision != accelerator.mixed_precision:
        raise ValueError(
            f"{path} was trained in precision {precision}, accelerate's setting is {accelerator.mixed_precision}: "
            f"give --mixed_precision {precision}"
        )
    num_ids = int(labels.max()) + 1
    accelerator.print(
        f"{' + '.join(args.source)}: {len(train)} images of {num_ids} identities; "
        f"measured on {', '.join(target.spec for target in targets) or 'nothing, for want of --target'}"
    )

    model, vae = build_model(args, accelerator, num_ids, info)
    run = Run(args, accelerator, train, labels, targets, state, model, vae)
    loader = build_loader(run, sampler)
    run.model, optimizer = accelerator.prepare(model, optimizer_of(args, model))
    rates = LearningRate(
        optimizer,
        args.lr_scheduler,
        warmup_epochs=args.lr_warmup_epochs,
        warmup_factor=args.lr_warmup_factor,
        milestones=args.lr_milestones,
        gamma=args.lr_gamma,
        warmup_steps=args.lr_warmup_steps,
        num_steps=sampler.steps_of(args.num_train_epochs),
    )
    if path:
        load_checkpoint(path, run.model, optimizer, accelerator=accelerator)
    if accelerator.is_main_process:
        with write_together(args.output_dir) as aside:
            aside("args.json").write_text(to_json(run_record(args)))
    accelerator.init_trackers("diffreid-dcac", config=tracked(args))

    if not path:
        measure(run, 0)
    params = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    stopped_at = train_epochs(
        args,
        accelerator,
        state,
        loader,
        sampler,
        rates,
        kept=run.model,
        optimizer=optimizer,
        num_steps=sampler.steps_of(args.num_train_epochs),
        step=lambda batch: training_step(run, batch, optimizer, params),
        measure=partial(measure, run),
        before=partial(start_epoch, run),
        rows=partial(name_images, accelerator, train),
    )
    if stopped_at:
        accelerator.print(f"SIGTERM: {stopped_at} is written; go on with --resume_from_checkpoint latest")
    else:
        finish(run)
    accelerator.end_training()
    return EXIT_SIGTERM if stopped_at else 0


def training_step(run, batch, optimizer, params):
    """Losses, gradients, the optimiser's step, then the prototypes."""
    args, accelerator, state = run.args, run.accelerator, run.state
    batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    diffusion = {}
    if run.bare.unet is not None and state["epoch"] >= args.ldm_start_epoch:
        diffusion = diffusion_inputs(run, batch)
    # Only DeepSpeed does not do so by itself.
    with accelerator.autocast():
        loss, values, bn_features, labels = run.model(batch["images"], batch["labels"], **diffusion)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(params, args.max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    run.bare.memory.update(bn_features, labels)
    return {"grad_norm": torch.as_tensor(0.0 if norm is None else norm, device=loss.device), **values}


def diffusion_inputs(run, batch):
    """Latents of the images, and the noise and timesteps of this step."""
    device = run.accelerator.device
    mean, std = (batch["means"], batch["stds"]) if "means" in batch else encode(run.vae, batch["vae_images"])
    first = run.accelerator.process_index * len(mean)
    shape = (run.accelerator.num_processes * len(mean), *mean.shape[1:])
    posterior, noise, timesteps = (
        drawn[first : first + len(mean)].to(device, non_blocking=True)
        for drawn in draw_noise(run.args.seed, run.state["step"], shape, run.bare.schedule.num_steps)
    )
    latents = sample_latents(mean, std, posterior, run.vae.config.scaling_factor)
    return {"latents": latents, "noise": noise, "timesteps": timesteps}


def draw_noise(seed, step, shape, num_steps):
    """For the whole batch of a step: every process takes its share of one draw, and a resumed run draws it again."""
    number = int.from_bytes(hashlib.sha256(f"noise/{seed}/{step}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    posterior, noise = torch.randn(2, *shape, generator=generator)
    return posterior, noise, torch.randint(num_steps, shape[:1], generator=generator)


@on_whole_weights
def start_epoch(run, epoch):
    """Every prototype anew, from the test features of all training images."""
    args, encoder = run.args, run.bare.encoder
    if run.state["batch"]:
        # Resumed within it: the checkpoint holds the prototypes.
        run.model.train()
        return
    transform = test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, "bicubic")
    features = extract(
        encoder,
        run.train,
        transform,
        accelerator=run.accelerator,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        desc="prototypes",
    )
    run.bare.memory.rebuild(features, run.labels)
    run.model.train()


# What the training is made of


def introduce(args, say):
    if args.demo:
        say(
            "Demo: DCAC from drawn people of domain a to the unseen domains b and c, with the shipped stand-in "
            "models; two to three minutes on two cores. For your own data: --source SPEC --target SPEC --data_root DIR"
        )
    else:
        models = ["backbone"] + ["pretrained_model_name_or_path"] * (args.diffusion == "ldm")
        toys = [name for name in models if getattr(args, name) in (CLIP_DIR, DIFFUSION_DIR)]
        if toys:
            say(
                f"Not given: --{' and --'.join(toys)}. Using the shipped stand-ins, which know drawn people only. "
                f"Real ones: {' '.join(f'--{name} {PUBLISHED[name]}' for name in toys)}"
            )
    for line in describe_origin(args, args.origin):
        say(line)
    if idle := without_effect(args):
        say(f"Without effect: {', '.join(f'--{name} ({reason})' for name, reason in idle.items())}")


def build_model(args, accelerator, num_ids, info):
    """The DCAC module and the VAE (None for the baseline)."""
    set_seed(args.seed)
    encoder = ReIDModel.for_training(args.backbone, num_ids=num_ids, image_size=tuple(args.resolution))
    inner_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.backbone.modules())
    if args.gradient_accumulation_steps > 1 and inner_norm:
        raise ValueError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: the BatchNorm inside {args.backbone} "
            "cannot see the whole batch in several passes; use 1, or a backbone without BatchNorm"
        )
    # The neck sees the gathered batch anyway.
    share_batch_statistics(encoder.backbone, accelerator.device)
    memory = PrototypeMemory(torch.zeros(num_ids, encoder.num_features), args.memory_temperature, args.memory_momentum)
    condition = unet = schedule = vae = None
    if info is not None:
        # Weights that stay frozen are kept in the precision they compute in.
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        name, revision = args.pretrained_model_name_or_path, args.revision
        condition = Condition(
            args.condition,
            args.probabilities,
            args.bottleneck,
            num_ids=num_ids,
            num_features=encoder.num_features,
            width=info.condition_width,
            tau=args.tau,
        )
        unet = load_unet(name, args.unet_mode, rank=args.rank, dtype=half, seed=args.seed, revision=revision)
        # DeepSpeed sends weights around as they lie in memory.
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            unet.to(memory_format=torch.channels_last)
        schedule = NoiseSchedule.from_pretrained(name, revision=revision)
        vae = load_vae(name, dtype=half, revision=revision)
        if args.enable_xformers_memory_efficient_attention:
            enable_memory_efficient_attention(unet)
    if args.gradient_checkpointing == "all":
        encoder.enable_gradient_checkpointing()
    if args.gradient_checkpointing and unet is not None:
        recompute_activations(unet, args.gradient_checkpointing)
    if args.torch_compile:
        encoder.backbone.compile()
        if unet is not None:
            unet.compile()
    model = DCAC(
        encoder,
        memory,
        condition,
        unet,
        schedule,
        ldm_weight=args.ldm_weight,
        label_smoothing=args.label_smoothing,
        pass_size=args.train_batch_size,
    )
    return model, vae


def build_loader(run, sampler):
    args, accelerator, encoder = run.args, run.accelerator, run.model.encoder
    transform = train_transform(
        encoder.image_size, encoder.image_mean, encoder.image_std, padding=args.padding, erasing=args.erasing
    )
    cache, vae_size = None, None
    if run.vae is not None:
        run.vae.to(accelerator.device)
        if args.cache_dir == "none":
            vae_size = tuple(args.diffusion_resolution)
        else:
            cache = build_latent_cache(
                run.train,
                run.vae,
                tuple(args.diffusion_resolution),
                accelerator=accelerator,
                cache_dir=Path(args.cache_dir).expanduser(),
                vae_name=args.pretrained_model_name_or_path,
                num_workers=args.dataloader_num_workers,
            )
            run.vae.to("cpu")
    images = Batches(run.train, run.labels.tolist(), transform, cache, vae_size)
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=sampler,
        collate_fn=images.collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=args.dataloader_num_workers > 0,
    )


def optimizer_of(args, model):
    """Encoder, neck and classifier at the learning rate, U-Net and prompts at a multiple of it."""
    groups = {1.0: [], args.lr_multiplier: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[1.0 if name.startswith("encoder.") else args.lr_multiplier].append(parameter)
    return build_optimizer(
        [{"params": params, "lr": factor * args.learning_rate} for factor, params in groups.items() if params],
        args.optimizer,
        learning_rate=args.learning_rate,
        weight_decay=args.adam_weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        use_8bit=args.use_8bit_adam,
    )


# Results


@on_whole_weights
def measure(run, epoch):
    """Every target's numbers, and what the U-Net makes of the conditions."""
    args, accelerator, encoder = run.args, run.accelerator, run.bare.encoder
    measure_targets(
        run.state,
        epoch,
        encoder,
        run.targets,
        test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, args.test_resample),
        accelerator=accelerator,
        output_dir=args.output_dir,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        rerank={name: getattr(args, name) for name in ("k1", "k2", "lambda_value")} if args.rerank else None,
    )
    if run.vae is not None and args.validation_ids and accelerator.is_main_process:
        with write_together(Path(args.output_dir) / "samples") as aside:
            sheet(denoised_pictures(run)).save(aside(sample_name(epoch)), "PNG")


@torch.no_grad()
def denoised_pictures(run):
    """Rows of three: an image, and its noised latents brought back under its own condition and under another's."""
    args, model, vae, device = run.args, run.bare, run.vae, run.accelerator.device
    encoder, size = model.encoder, tuple(args.resolution)
    firsts = [int((run.labels == label).nonzero()[0]) for label in range(encoder.num_ids)]
    chosen = firsts[:: max(1, len(firsts) // args.validation_ids)][: args.validation_ids]
    pictures = [run.train[row]["image"] for row in chosen]
    transform = test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, "bicubic")
    was_training, home = model.training, vae.device
    model.eval()
    vae.to(device)
    with run.accelerator.autocast():
        features = encoder.backbone(torch.stack([transform(picture) for picture in pictures]).to(device))
        bn_features, logits = encoder.neck(features.float())
        own = model.condition(logits.float(), bn_features, run.labels[chosen].to(device), model.memory)
        seen = torch.stack([image_for_vae(picture, tuple(args.diffusion_resolution)) for picture in pictures])
        mean, std = encode(vae, seen.to(device))
        latents = sample_latents(mean, std, torch.zeros_like(mean), vae.config.scaling_factor)
        _, noise, _ = draw_noise(args.seed, "pictures", latents.shape, model.schedule.num_steps)
        columns = [[picture.convert("RGB").resize(size[::-1]) for picture in pictures]]
        for condition in (own, own.roll(1, 0)):
            clean = denoise(model.unet, model.schedule, latents, noise.to(device), condition)
            columns.append(decode(vae, clean, size))
    vae.to(home)
    model.train(was_training)
    return list(zip(*columns, strict=True))


@on_whole_weights
def finish(run):
    """The trained model, what the diffusion side learned, the card and the page."""
    args, model = run.args, run.bare
    run.accelerator.wait_for_everyone()
    if not run.accelerator.is_main_process:
        return
    output_dir = Path(args.output_dir)
    final = results(run.state["history"])
    model.encoder.resample = args.test_resample
    card = training_card(
        f"{'Baseline' if args.diffusion == 'none' else 'DCAC'} trained on {' + '.join(portable(args.source))}",
        card_text(model.encoder),
        "train_dcac.py",
        args,
        metrics=final["targets"],
        details={"images": len(run.train), "identities": model.encoder.num_ids},
    )
    model.encoder.save_pretrained(output_dir / "model", card=card)
    if model.unet is not None:
        save_unet(model.unet, args.unet_mode, output_dir)
        with write_together(output_dir) as aside:
            tensors = {
                name: tensor.detach().cpu().contiguous() for name, tensor in model.condition.state_dict().items()
            }
            save_file(tensors, aside("prompts.safetensors"))
    write_page(run, final["history"])
    if final["history"]:
        print(text_table(["target", "number", "before", "after", "points"], before_and_after(final["history"])))
    print(f"Results: {output_dir}; open {output_dir / 'report.html'}")
    if args.push_to_hub:
        repo_id = args.hub_model_id or output_dir.resolve().name
        print(f"Uploaded: {model.encoder.push_to_hub(repo_id, card=card)}")


def write_page(run, history):
    args, output_dir = run.args, Path(run.args.output_dir)
    method = "baseline, no diffusion model" if args.diffusion == "none" else f"{args.condition}, {args.unet_mode}"
    epochs = dict.fromkeys(one["epoch"] for one in history) or range(args.num_train_epochs + 1)
    samples = [(f"epoch {epoch}", output_dir / "samples" / sample_name(epoch)) for epoch in epochs]
    page = build_page(
        "DCAC" if args.diffusion == "ldm" else "Baseline",
        output_dir,
        history,
        lead="A Re-ID encoder, measured before and after on people and cameras it was not trained on."
        if not set(args.target or args.source) & set(args.source)
        else "A Re-ID encoder, measured before and after.",
        facts=[
            ("Source", " + ".join(args.source)),
            ("Images", f"{len(run.train):,} of {run.bare.encoder.num_ids:,} identities"),
            ("Encoder", Path(args.backbone).name),
            ("Diffusion", method),
            ("Steps", f"{run.state['step']:,}"),
            ("Batch", run.state["arguments"]["effective_batch_size"]),
            ("Seed", args.seed),
        ],
        # Without --validation_ids, pictures there are an earlier run's.
        samples=[(name, path) for name, path in samples if args.validation_ids and path.exists()],
        sample_words="In each row: an image; the same, noised and denoised under its own condition; and under that of "
        "the row above. The condition is trained if the second keeps what the third changes.",
    )
    with write_together(output_dir) as aside:
        page.write(aside("report.html"))


def sample_name(epoch):
    return f"epoch-{epoch:04d}.png"


def run_script(args):
    lean = (
        f"lower --train_batch_size {args.train_batch_size} and raise --gradient_accumulation_steps by as much (the "
        "training stays the same), or add --gradient_checkpointing"
    )
    end_with(main, args, "train_dcac.py", lean=lean)


if __name__ == "__main__":
    run_script(parse_args())
