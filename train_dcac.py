# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0",
#     "bitsandbytes>=0.50.0",
#     "datasets>=4.5.0",
#     "diffusers>=0.38.0",
#     "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4",
#     "matplotlib>=3.9.0",
#     "numpy>=2.1.0",
#     "peft>=0.19.0",
#     "Pillow>=11.0.0",
#     "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2",
#     "scipy>=1.14.1",
#     "torch>=2.11.0",
#     "torchvision>=0.26.0",
#     "tqdm>=4.67.0",
#     "transformers>=5.17.0",
#     "triton>=3.6.0",
# ]
# ///
"""DCAC: train a Re-ID encoder with feedback from a diffusion model, so that it generalises to cameras never seen.

    accelerate launch --config_file accelerate_config.yaml train_dcac.py
    accelerate launch train_dcac.py --recipe ma-ms --data_root ~/reid --output_dir output/ma-ms
    accelerate launch train_dcac.py --recipe multi --source ./people --target ./gallery --output_dir output/own

The first is a demo on drawn people with the shipped stand-in models. The second is the published Market-1501 -> MSMT17
run with CLIP ViT-B/16 and Stable Diffusion 1.5; the third trains on your own images. `--diffusion none` trains the
baseline.

One step, on a batch of images x with identities y:

    f = encoder(x)    b = BatchNorm(f)    logits = W b    u = b / |b|
    L_id  = cross-entropy(logits, y), labels smoothed
    L_pcl = cross-entropy(u M^T / 0.01, y)                            M: a prototype of each identity, no gradient
    c     = softmax(logits / tau) P                                   P: a learned prompt of each identity
    L_ldm = mean (unet(z_t, t, c) - noise)^2                          z: VAE latents of the image, not augmented
    L     = L_id + L_pcl + lambda L_ldm

Through c the diffusion model tells classifier, neck and encoder which identities look alike.
"""

from utils import flags
from utils.flags import CLIP_DIR, DIFFUSION_DIR, above_zero, at_least, fraction, not_negative

DEMO_SOURCE = "synthetic:domain=a,num_ids=112"
DEMO_TARGETS = ["synthetic:domain=b", "synthetic:domain=c"]
DEMO = (
    "Demo: DCAC from drawn people of domain a to the unseen domains b and c, with the shipped stand-in models; two to "
    "three minutes on two cores. For your own data: --source SPEC --target SPEC --data_root DIR"
)
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
UNET_MODES = ("lora", "frozen", "partial-1", "partial-2", "full", "scratch")


def build_parser():
    parser = flags.Parser(__doc__, recipes=RECIPES)
    flags.add_recipe(
        parser,
        "published values and real models (ma: Market-1501, d: DukeMTMC-reID, ms: MSMT17, c3: CUHK03-NP; the source "
        "comes first); multi and supervised take other sets by --source and --target",
    )
    data = flags.add_data(
        parser,
        source=f"training sets; default {DEMO_SOURCE}",
        target=f"sets with query and gallery to measure on; default {' '.join(DEMO_TARGETS)} in the demo, else a "
        "single source's own",
    )
    flags.add_single_image_ids(data)
    images = flags.add_images(parser, resolution=[128, 64], padding=5, erasing=0.5)
    baseline = (lambda args: args.diffusion == "none", "--diffusion none")
    images.size("--diffusion_resolution", [128, 64], idle=baseline, help="input of the VAE; images are stretched")

    group = parser.group("models")
    group.add(
        "--backbone", default=CLIP_DIR, help="encoder to start from: backbone or ReIDModel; folder, Hub id, name, file"
    )
    group.add(
        "--pretrained_model_name_or_path",
        default=DIFFUSION_DIR,
        idle=baseline,
        help="Stable Diffusion 1.x or 2.x, folder or Hub id",
    )
    group.add("--revision", idle=baseline, help="revision of the diffusion model on the Hub")
    group.add(
        "--cache_dir",
        default="~/.cache/diffreid",
        free=True,
        idle=baseline,
        help="folder that keeps the latents of the training images; `none` runs the VAE in every step",
    )

    group = parser.group("identity losses")
    group.add("--label_smoothing", type=fraction, default=0.1, help="of L_id")
    group.add("--memory_temperature", type=above_zero, default=0.1, help="of L_pcl")
    group.add("--memory_momentum", type=fraction, default=0.2, help="what a prototype keeps in an update")

    group = parser.group("diffusion feedback", idle=baseline)
    group.arguments.add_argument(
        "--diffusion", choices=["ldm", "none"], default="ldm", help="none trains the baseline"
    )
    group.add(
        "--condition",
        choices=["correlation", "class", "instance"],
        default="correlation",
        help="condition of the U-Net: probabilities x prompts, the label's prompt, or feature x prompts",
    )
    group.add(
        "--probabilities",
        choices=["classifier", "prototype", "mean"],
        default="classifier",
        help="of --condition correlation: from the classifier, from the prototypes, or the mean of both",
    )
    group.add(
        "--bottleneck",
        choices=["none", "silu", "bn", "bn-silu", "condition-net"],
        default="none",
        help="layers between the condition and the U-Net",
    )
    group.add("--unet_mode", choices=UNET_MODES, default="lora", help="part of the U-Net that trains")
    without_lora = (lambda args: args.unet_mode != "lora", lambda args: f"--unet_mode {args.unet_mode}")
    group.add("--rank", type=at_least(1), default=8, idle=without_lora, help="rank of LoRA")
    group.add(
        "--tau",
        type=above_zero,
        default=0.6,
        idle=(without_tau, tau_replaced_by),
        help="of the probabilities",
    )
    group.add("--ldm_weight", type=not_negative, default=1.0, help="lambda, the weight of L_ldm")
    group.add("--ldm_start_epoch", type=at_least(1), default=1, help="first epoch with L_ldm")
    group.add("--lr_multiplier", type=above_zero, default=1.0, help="factor on the rate of U-Net and prompts")
    group.add(
        "--validation_ids",
        type=at_least(0),
        default=4,
        help="identities whose images are denoised under the right and a wrong condition, 0 for none",
    )

    flags.add_training(
        parser,
        batch=32,
        epochs=5,
        batch_help="images of each process and forward pass",
        accumulation="forward passes of a step: together one batch for BatchNorm, memory and losses, and each "
        "pass is computed a second time in the backward pass",
    )
    parser.free.add("gradient_accumulation_steps")
    flags.add_optimizer(parser, learning_rate=1e-3, weight_decay=1e-4)
    flags.add_schedule(parser, milestones=[4])
    group = flags.add_memory(parser, checkpointing=False, compiled="encoder and U-Net")
    group.add(
        "--gradient_checkpointing",
        nargs="?",
        choices=["all", "outer"],
        const="all",
        free=True,
        idle=(lambda args: args.diffusion == "none" and args.gradient_checkpointing == "outer", "--diffusion none"),
        help="recompute activations, less memory for more time: all of encoder and U-Net, or only the U-Net's outer "
        "blocks, which hold most; without a word all",
    )
    group.switch("--enable_xformers_memory_efficient_attention", "xformers in the U-Net; default torch's SDPA")
    flags.add_evaluation(parser, every=5, resample=True)
    flags.add_output(parser, "output/dcac")
    return parser


def without_tau(args):
    return args.condition != "correlation" or args.probabilities == "prototype"


def tau_replaced_by(args):
    return f"--condition {args.condition}" if args.condition != "correlation" else "--probabilities prototype"


def parse_args(input_args=None):
    parser = build_parser()
    args = parser.parse(input_args)
    args.demo = args.source is None and args.target is None
    args.source = args.source or [DEMO_SOURCE]
    if args.demo:
        args.target = DEMO_TARGETS
        if args.origin["dataloader_num_workers"] == "default":
            # People are drawn beside the steps, which leave a second core idle.
            args.dataloader_num_workers = 1
    check_args(parser, args)
    args.notes = parser.notes(args)
    return args


def check_args(parser, args):
    """What the arguments alone show to be wrong."""
    if args.probabilities != "classifier" and args.condition != "correlation":
        parser.error(f"--probabilities {args.probabilities} belongs to --condition correlation, not {args.condition}")
    flags.check_optimizer(parser, args)
    if args.diffusion == "none" and args.enable_xformers_memory_efficient_attention:
        parser.error("--enable_xformers_memory_efficient_attention is of the U-Net, and --diffusion none has none")
    if args.diffusion == "ldm" and args.ldm_start_epoch > args.num_train_epochs:
        parser.error(
            f"--ldm_start_epoch {args.ldm_start_epoch} comes after the last of {args.num_train_epochs} epochs; the "
            "baseline is --diffusion none"
        )
    if args.validation_ids == 1:
        parser.error("--validation_ids 1: the wrong condition is another identity's; give 0, or 2 and more")


if __name__ == "__main__":
    # Before torch and diffusers are imported, so that --help and a mistyped flag answer at once.
    args = parse_args()

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, set_seed
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils import launch
from utils.batches.samplers import IdentitySampler
from utils.batches.transforms import test_transform, train_transform
from utils.datasets.load import digest_of, open_source
from utils.diffusion.checkpoint import check_diffusion
from utils.diffusion.latents import encode, feedback_loader, image_for_vae, sample_latents
from utils.diffusion.schedule import NoiseSchedule, decode, denoise, noise_loss
from utils.diffusion.unet import (
    enable_memory_efficient_attention,
    load_unet,
    load_vae,
    recompute_activations,
    save_unet,
)
from utils.evaluation.features import extract
from utils.evaluation.targets import open_targets
from utils.files import portable, write_together
from utils.launch import gather_with_gradient, whole_weights
from utils.modeling.folder import card_text, model_kind, training_card
from utils.modeling.memories import PrototypeMemory
from utils.modeling.norms import share_batch_statistics
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import sheet
from utils.training.loop import Training, norm_of, optimizer_of, rates_of, trained
from utils.training.report import training_report

# The method


class Condition(nn.Module):
    """The condition of the U-Net for each image: (B, 1, width)."""

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


# Training


def main(args):
    late = args.diffusion == "ldm" and args.ldm_start_epoch > 1
    accelerator = launch.start_training(args, find_unused_parameters=late, max_zero_stage=3)
    launch.introduce(args, accelerator, demo=DEMO, stand_ins=stand_ins_of(args))
    # What can be wrong with data and configuration shows before a model is loaded.
    model_kind(args.backbone)
    diffusion = None
    if args.diffusion == "ldm":
        diffusion = check_diffusion(
            args.pretrained_model_name_or_path, resolution=args.diffusion_resolution, revision=args.revision
        )
    train, labels, data = open_source(
        args.source, args.data_root, single_image_ids=args.single_image_ids, skip_unreadable=args.skip_unreadable
    )
    own = args.source if len(args.source) == 1 and {"query", "gallery"} <= set(data) else []
    targets = open_targets(args.target or own, args.data_root, skip_unreadable=args.skip_unreadable)
    batch_size = launch.global_batch_size(args, accelerator)
    if batch_size < 2:
        raise ValueError("a batch of one image has no statistics for BatchNorm; raise --train_batch_size")
    share = accelerator.process_index, accelerator.num_processes
    sampler = IdentitySampler(labels.tolist(), batch_size, args.images_per_id, args.seed, *share)
    training = Training(args, accelerator, sampler, train, script="train_dcac.py", data=digest_of(train, labels))
    num_ids = int(labels.max()) + 1
    accelerator.print(
        f"{' + '.join(args.source)}: {len(train)} images of {num_ids} identities; "
        f"measured on {', '.join(target.spec for target in targets) or 'nothing, as there is no --target'}"
    )

    bare, vae = build_model(args, accelerator, num_ids, diffusion)
    loader = build_loader(args, accelerator, bare.encoder, train, labels, sampler, vae)
    model, optimizer = accelerator.prepare(bare, optimizer_of(args, parameter_groups(args, bare)))
    training.begin(model, optimizer, rates_of(args, optimizer, training.num_steps))
    params = trained(model)

    def measure(epoch):
        with whole_weights(model, accelerator):
            training.measure(epoch, bare.encoder, targets, evaluation_transform(args, bare.encoder))
            if vae is not None and args.validation_ids and accelerator.is_main_process:
                denoise_samples(args, accelerator, bare, vae, train, labels, epoch)

    if not training.resumed:
        measure(0)
    for epoch in training.epochs():
        if not training.in_mid_epoch:
            with whole_weights(model, accelerator):
                rebuild_prototypes(args, accelerator, bare, train, labels)
        model.train()
        for batch in training.batches(loader):
            training.log(training_step(training, model, bare, vae, batch, params))
        if training.measures(epoch):
            measure(epoch)
    if not training.stopped:
        with whole_weights(model, accelerator):
            save(args, accelerator, training, bare)
    return training.end(
        lambda: report_of(args, training, num_ids),
        upload=lambda repo_id: bare.encoder.push_to_hub(repo_id, card=card_of(args, training, bare.encoder)),
    )


def training_step(training, model, bare, vae, batch, params):
    """Losses, gradients, the optimizer's step, then the prototypes."""
    args, accelerator, optimizer = training.args, training.accelerator, training.optimizer
    batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    feedback = {}
    if vae is not None and training.epoch >= args.ldm_start_epoch:
        feedback = feedback_inputs(args, accelerator, bare, vae, batch, training.step)
    # Only DeepSpeed does not do so by itself.
    with accelerator.autocast():
        loss, values, bn_features, labels = model(batch["images"], batch["labels"], **feedback)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(params, args.max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    bare.memory.update(bn_features, labels)
    return {"grad_norm": norm_of(norm, loss.device), **values}


def feedback_inputs(args, accelerator, bare, vae, batch, step):
    """Latents of the images, and the noise and timesteps of this step."""
    mean, std = (batch["means"], batch["stds"]) if "means" in batch else encode(vae, batch["vae_images"])
    first = accelerator.process_index * len(mean)
    shape = (accelerator.num_processes * len(mean), *mean.shape[1:])
    posterior, noise, timesteps = (
        drawn[first : first + len(mean)].to(accelerator.device, non_blocking=True)
        for drawn in draw_noise(args.seed, step, shape, bare.schedule.num_steps)
    )
    latents = sample_latents(mean, std, posterior, vae.config.scaling_factor)
    return {"latents": latents, "noise": noise, "timesteps": timesteps}


def draw_noise(seed, step, shape, num_steps):
    """For the whole batch of a step: every process takes its share of one draw, and a resumed run draws it again."""
    number = int.from_bytes(hashlib.sha256(f"noise/{seed}/{step}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    posterior, noise = torch.randn(2, *shape, generator=generator)
    return posterior, noise, torch.randint(num_steps, shape[:1], generator=generator)


def rebuild_prototypes(args, accelerator, bare, train, labels):
    """Every prototype anew, from the test features of all training images."""
    encoder = bare.encoder
    features = extract(
        encoder,
        train,
        test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, "bicubic"),
        accelerator=accelerator,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        desc="prototypes",
    )
    bare.memory.rebuild(features, labels)


# What the training is made of


def stand_ins_of(args):
    models = ["backbone"] + ["pretrained_model_name_or_path"] * (args.diffusion == "ldm")
    toys = [name for name in models if getattr(args, name) in (CLIP_DIR, DIFFUSION_DIR)]
    if not toys:
        return None
    return (
        f"Not given: --{' and --'.join(toys)}. Using the shipped stand-ins, which know drawn people only. "
        f"Real ones: {' '.join(f'--{name} {PUBLISHED[name]}' for name in toys)}"
    )


def build_model(args, accelerator, num_ids, diffusion):
    """The DCAC module and the VAE (None for the baseline)."""
    set_seed(args.seed)
    encoder = ReIDModel.for_training(args.backbone, num_ids=num_ids, image_size=tuple(args.resolution))
    launch.print_notes(accelerator, encoder.notes)
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
    if diffusion is not None:
        # Weights that stay frozen are kept in the precision they compute in.
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        name, revision = args.pretrained_model_name_or_path, args.revision
        condition = Condition(
            args.condition,
            args.probabilities,
            args.bottleneck,
            num_ids=num_ids,
            num_features=encoder.num_features,
            width=diffusion.condition_width,
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


def build_loader(args, accelerator, encoder, train, labels, sampler, vae):
    transform = train_transform(
        encoder.image_size, encoder.image_mean, encoder.image_std, padding=args.padding, erasing=args.erasing
    )
    return feedback_loader(
        train,
        labels.tolist(),
        transform,
        sampler,
        vae,
        tuple(args.diffusion_resolution),
        accelerator=accelerator,
        cache_dir=None if args.cache_dir == "none" else Path(args.cache_dir).expanduser(),
        vae_name=args.pretrained_model_name_or_path,
        num_workers=args.dataloader_num_workers,
    )


def parameter_groups(args, model):
    """Encoder, neck and classifier at the learning rate, U-Net and prompts at a multiple of it."""
    groups = {1.0: [], args.lr_multiplier: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[1.0 if name.startswith("encoder.") else args.lr_multiplier].append(parameter)
    return [{"params": params, "lr": factor * args.learning_rate} for factor, params in groups.items() if params]


def evaluation_transform(args, encoder):
    return test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, args.test_resample)


# Results


@torch.no_grad()
def denoise_samples(args, accelerator, model, vae, train, labels, epoch):
    """Rows of three: an image, and its noised latents brought back under its own condition and under another's."""
    encoder, size, device = model.encoder, tuple(args.resolution), accelerator.device
    firsts = [int((labels == label).nonzero()[0]) for label in range(encoder.num_ids)]
    chosen = firsts[:: max(1, len(firsts) // args.validation_ids)][: args.validation_ids]
    pictures = [train[row]["image"] for row in chosen]
    transform = test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, "bicubic")
    was_training, home = model.training, vae.device
    model.eval()
    vae.to(device)
    with accelerator.autocast():
        features = encoder.backbone(torch.stack([transform(picture) for picture in pictures]).to(device))
        bn_features, logits = encoder.neck(features.float())
        own = model.condition(logits.float(), bn_features, labels[chosen].to(device), model.memory)
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
    with write_together(Path(args.output_dir) / "samples") as part:
        sheet(list(zip(*columns, strict=True))).save(part(sample_name(epoch)), "PNG")


def save(args, accelerator, training, bare):
    """The trained model with its card, and what the diffusion side learned."""
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    output_dir = Path(args.output_dir)
    bare.encoder.resample = args.test_resample
    bare.encoder.save_pretrained(output_dir / "model", card=card_of(args, training, bare.encoder))
    if bare.unet is not None:
        save_unet(bare.unet, args.unet_mode, output_dir)
        tensors = bare.condition.state_dict()
        with write_together(output_dir) as part:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                part("prompts.safetensors"),
            )


def card_of(args, training, encoder):
    return training_card(
        f"{'Baseline' if args.diffusion == 'none' else 'DCAC'} trained on {' + '.join(portable(args.source))}",
        card_text(encoder),
        "train_dcac.py",
        args,
        metrics=training.results["targets"],
        details={"images": len(training.images), "identities": encoder.num_ids},
    )


def report_of(args, training, num_ids):
    method = "baseline, no diffusion model" if args.diffusion == "none" else f"{args.condition}, {args.unet_mode}"
    history = training.state["history"]
    epochs = dict.fromkeys(one["epoch"] for one in history) or range(args.num_train_epochs + 1)
    samples = [(f"epoch {epoch}", Path(args.output_dir) / "samples" / sample_name(epoch)) for epoch in epochs]
    seen = set(args.target or args.source) & set(args.source)
    return training_report(
        "Baseline" if args.diffusion == "none" else "DCAC",
        args.output_dir,
        history,
        lead="A Re-ID encoder, measured before and after training"
        + ("." if seen else ", on people and cameras it was not trained on."),
        facts=[
            ("Source", " + ".join(args.source)),
            ("Images", f"{len(training.images):,} of {num_ids:,} identities"),
            ("Encoder", Path(args.backbone).name),
            ("Diffusion", method),
            *training.facts,
        ],
        # Without --validation_ids, pictures there are an earlier run's.
        samples=[(name, path) for name, path in samples if args.validation_ids and path.exists()],
        sample_words="In each row: an image; the same, noised and denoised under its own condition; and under that of "
        "the row above. The condition is trained if the second keeps what the third changes.",
    )


def sample_name(epoch):
    return f"epoch-{epoch:04d}.png"


def run_script(args):
    lean = (
        f"lower --train_batch_size {args.train_batch_size} and raise --gradient_accumulation_steps by as much (the "
        "training stays the same), or add --gradient_checkpointing"
    )
    launch.end_with(main, args, "train_dcac.py", lean=lean)


if __name__ == "__main__":
    run_script(args)
