# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0", "bitsandbytes>=0.50.0", "datasets>=4.5.0", "diffusers>=0.38.0", "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4", "numpy>=2.1.0", "peft>=0.19.0", "Pillow>=11.0.0", "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2", "scipy>=1.14.1", "torch>=2.11.0", "torchvision>=0.26.0", "tqdm>=4.67.0",
#     "transformers>=5.17.0", "triton>=3.6.0; sys_platform == 'linux'",
# ]
# ///
"""DCAC: train a Re-ID encoder with feedback from a diffusion model, so that it generalises to cameras never seen.

    accelerate launch --config_file accelerate_config.yaml train_dcac.py
    accelerate launch train_dcac.py --recipe ma-ms --data_root ~/reid --output_dir output/ma-ms
    accelerate launch train_dcac.py --recipe multi --source ./people --output_dir output/own

The first is a demo on drawn people with the shipped stand-in models. The second is the published Market-1501 -> MSMT17
run with CLIP ViT-B/16 and Stable Diffusion 1.5; the third trains on your own images. `--diffusion none` trains the
baseline.

One step, on a batch of images x with identities y:

    f = encoder(x)    b = BatchNorm(f)    logits = W b    u = b / |b|
    L_id  = cross-entropy(logits, y), labels smoothed
    L_pcl = cross-entropy(u M^T / T, y)                               M: a prototype of each identity, no gradient
    c     = softmax(logits / tau) P                                   P: a learned prompt of each identity, of one
                                                                      token or all tokens of its caption
    L_ldm = mean (unet(z_t, t, c) - noise)^2                          z: VAE latents of the image, not augmented
    L     = L_id + L_pcl + lambda L_ldm

Through c the diffusion model tells classifier, neck and encoder which identities look alike.
"""

from methods.muva import settings as muva
from utils import flags
from utils.flags import CAPTIONER_DIR, CLIP_DIR, DIFFUSION_DIR
from utils.ranges import above_zero, at_least, fraction, not_negative, or_word

DEMO_SOURCE = "synthetic:domain=a,num_ids=112"
DEMO_TARGETS = ["synthetic:domain=b", "synthetic:domain=c"]
# Of 112 identities the classifier is rarely sure, and a mean of many captions says little. Chosen on e, seeds 7 and 8.
DEMO_CONDITION = {"prompt_init": "captions", "prompt_tokens": "all", "tau": 0.1, "ldm_balance": 0.1}
DEMO = (
    "Demo: DCAC from drawn people of domain a to the unseen domains b and c, three minutes on two cores; condition: "
    "--prompt_init captions --prompt_tokens all --tau 0.1 --ldm_balance 0.1, or yours. Own data: --source SPEC"
)
PUBLISHED = {
    "backbone": "openai/clip-vit-base-patch16",
    "pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "captioner_model_name_or_path": "Salesforce/blip2-opt-2.7b",
    "resolution": [256, 128], "diffusion_resolution": [128, 128], "padding": 10, "erasing": 0.5,
    "memory_temperature": 0.01, "train_batch_size": 64, "images_per_id": 4, "num_train_epochs": 60,
    "learning_rate": 5e-6, "lr_warmup_epochs": 10, "lr_milestones": [30, 50], "mixed_precision": "fp16",
    "variant": "non_ema", "single_image_ids": "repeat", "eval_every": 10, "log_every": 10,
    "checkpointing_steps": 1000, "dataloader_num_workers": 8, "test_resample": "bilinear",
}  # fmt: skip


def published(source, target, rank, tau, **more):
    return PUBLISHED | {"source": source, "target": target, "rank": rank, "tau": tau} | more


RECIPES = {
    "ma-ms": published(["market1501"], ["msmt17"], 8, 0.6),
    "d-ma": published(["dukemtmcreid"], ["market1501"], 8, 0.6),
    "ms-ma": published(["msmt17"], ["market1501"], 32, 1.0),
    "c3-ma": published(["cuhk03np"], ["market1501"], 8, 0.1),
    "multi": published(["market1501", "dukemtmcreid", "cuhk03np"], ["msmt17"], 32, 1.0, test_resample="bicubic"),
    "supervised": published(["market1501"], ["market1501"], 8, 0.6),
    "supervised-ms": published(["msmt17"], ["msmt17"], 32, 1.0),
}
RECIPES |= muva.recipes(RECIPES)
# Identities that each evaluation looks at the condition with.
EXAMINED = 32
CONDITIONS = ("correlation", "class", "instance")
PROBABILITIES = ("classifier", "prototype", "mean", *muva.PROBABILITIES)
BOTTLENECKS = ("none", "silu", "bn", "bn-silu", "condition-net")
UNET_MODES = ("lora", "frozen", "partial-1", "partial-2", "full", "scratch")


def build_parser():
    parser = flags.Parser(__doc__, recipes=RECIPES)
    words = "published values and real models (ma: Market-1501, d: DukeMTMC-reID, ms: MSMT17, c3: CUHK03-NP; the "
    words += "source comes first); multi and supervised take other sets by --source and --target"
    flags.add_recipe(parser, words)
    words = f"sets with query and gallery to measure on; default {' '.join(DEMO_TARGETS)} in the demo, else the "
    words += "sources' own, or see --holdout"
    data = flags.add_data(parser, source=f"training sets; default {DEMO_SOURCE}", target=words)
    flags.add_single_image_ids(data)
    flags.add_holdout(data)
    images = flags.add_images(parser, resolution=[128, 64], padding=5, erasing=0.5)
    baseline = (lambda args: args.diffusion == "none", "--diffusion none")
    images.size("--diffusion_resolution", [128, 64], idle=baseline, help="input of the VAE; images are stretched")

    muva.add_flags(parser)
    group = parser.group("models")
    words = "encoder to start from: backbone or ReIDModel; folder, Hub id, name, file"
    group.add("--backbone", default=CLIP_DIR, help=words)
    words = "Stable Diffusion 1.x or 2.x"
    group.add("--pretrained_model_name_or_path", default=DIFFUSION_DIR, idle=baseline, help=words)
    group.add("--revision", idle=baseline, help="revision of the diffusion model on the Hub")
    group.add("--variant", idle=baseline, help="variant of the U-Net's files, such as non_ema; default: those without")
    words = "folder that keeps the latents of the training images; `none` runs the VAE in every step"
    group.add("--cache_dir", default="~/.cache/diffreid", free=True, idle=baseline, help=words)

    group = parser.group("identity losses")
    group.add("--label_smoothing", type=fraction, default=0.1, help="of L_id")
    group.add("--memory_temperature", type=above_zero, default=0.1, help="of L_pcl")
    group.add("--memory_momentum", type=fraction, default=0.2, help="what a prototype keeps in an update")

    group = parser.group("diffusion feedback", idle=baseline)
    group.arguments.add_argument("--diffusion", choices=["ldm", "none"], default="ldm", help="none: the baseline")
    words = "condition of the U-Net: probabilities x prompts, the label's prompt, or feature x prompts"
    group.add("--condition", choices=CONDITIONS, default=CONDITIONS[0], help=words)
    words = "of --condition correlation: from classifier, prototypes, or both; muva: texts, both, or one a part"
    group.add("--probabilities", choices=PROBABILITIES, default=PROBABILITIES[0], help=words)
    group.add("--bottleneck", choices=BOTTLENECKS, default=BOTTLENECKS[0], help="layers between condition and U-Net")
    group.add("--unet_mode", choices=UNET_MODES, default="lora", help="part of the U-Net that trains")
    without_lora = (lambda args: args.unet_mode != "lora", lambda args: f"--unet_mode {args.unet_mode}")
    group.add("--rank", type=at_least(1), default=8, idle=without_lora, help="rank of LoRA")
    group.add("--tau", type=above_zero, default=0.6, idle=(without_tau, tau_replaced_by), help="of the probabilities")
    group.add("--ldm_weight", type=not_negative, default=1.0, help="lambda, the weight of L_ldm")
    words = "share of L_ldm in the gradient at the features; default: as it is"
    group.add("--ldm_balance", type=above_zero, help=words)
    group.add("--ldm_start_epoch", type=at_least(1), default=1, help="first epoch with L_ldm")
    group.add("--ldm_warmup_epochs", type=at_least(0), default=0, help="epochs before L_ldm reaches the encoder")
    group.add("--prompt_init", default="random", help="`random`, N(0, 1); `captions`, made here; or a file of them")
    words = "of a prompt: `end`, `all`, or the first N"
    group.add("--prompt_tokens", type=or_word(at_least(1), "end", "all"), default="end", help=words)
    group.switch("--freeze_prompts", "leave the prompts as they start")
    idle = (lambda args: args.prompt_init != "captions", "no --prompt_init captions")
    words = "image-to-text model of --prompt_init captions"
    group.add("--captioner_model_name_or_path", default=CAPTIONER_DIR, idle=idle, help=words)
    group.add("--lr_multiplier", type=above_zero, default=1.0, help="factor on the rate of LoRA and prompts")
    group.add("--validation_ids", type=at_least(0), default=4, help="identities in the report's pictures, 0 for none")

    words = "forward passes of a step: together one batch for BatchNorm, memory and losses, and each pass is computed "
    words += "a second time in the backward pass"
    options = {"batch_help": "images of each process and forward pass", "accumulation": words}
    flags.add_training(parser, batch=32, epochs=5, **options)
    parser.free.add("gradient_accumulation_steps")
    flags.add_optimizer(parser, learning_rate=1e-3, weight_decay=1e-4)
    flags.add_schedule(parser, milestones=[4])
    group = flags.add_memory(parser, checkpointing=False, compiled="encoder and U-Net", xformers=True)
    idle = (lambda args: args.diffusion == "none" and args.gradient_checkpointing == "outer", "--diffusion none")
    words = "recompute activations, less memory for more time: all of encoder and U-Net, or only the U-Net's outer "
    words += "blocks, which hold most; without a word all"
    options = {"nargs": "?", "choices": ["all", "outer"], "const": "all", "free": True, "idle": idle, "help": words}
    group.add("--gradient_checkpointing", **options)
    flags.add_evaluation(parser, every=5, resample=True)
    flags.add_output(parser, "output/dcac")
    return parser


def without_tau(args):
    return args.condition != "correlation" or args.probabilities in ("prototype", "text")


def tau_replaced_by(args):
    flag = "probabilities" if args.condition == "correlation" else "condition"
    return f"--{flag} {getattr(args, flag)}"


def parse_args(input_args=None):
    parser = build_parser()
    args = parser.parse(input_args)
    args.demo = args.source is None and args.target is None
    # A recipe's target is that of its source.
    if args.origin["source"] == "flag" and args.origin["target"] != "flag":
        args.target, args.origin["target"] = None, "default"
    if args.demo:
        args.target = DEMO_TARGETS
        if args.origin["dataloader_num_workers"] == "default":
            # People are drawn beside the steps, which leave a second core idle.
            args.dataloader_num_workers = 1
        if all(args.origin[name] == "default" for name in (*DEMO_CONDITION, "ldm_weight", "diffusion", "condition")):
            vars(args).update(DEMO_CONDITION)
    args.source = args.source or [DEMO_SOURCE]
    muva.settle(args)
    check_args(parser, args)
    args.notes = parser.notes(args)
    if args.diffusion == "none":
        args.ldm_balance = None
    return args


def check_args(parser, args):
    """What the arguments alone show to be wrong."""
    if args.probabilities != "classifier" and args.condition != "correlation":
        parser.error(f"--probabilities {args.probabilities} belongs to --condition correlation, not {args.condition}")
    flags.check_optimizer(parser, args)
    muva.check_args(parser, args)
    if args.diffusion == "none" and args.enable_xformers_memory_efficient_attention:
        parser.error("--enable_xformers_memory_efficient_attention is of the U-Net, and --diffusion none has none")
    if args.diffusion == "ldm":
        check_feedback(parser, args)


def check_feedback(parser, args):
    if args.validation_ids == 1:
        parser.error("--validation_ids 1: the wrong condition is another identity's; give 0, or 2 and more")
    first = args.ldm_start_epoch + args.ldm_warmup_epochs
    if first > args.num_train_epochs:
        parser.error(
            f"epoch {first}, where L_ldm first reaches the encoder, comes after the last of {args.num_train_epochs} "
            f"epochs: --ldm_start_epoch {args.ldm_start_epoch}, --ldm_warmup_epochs {args.ldm_warmup_epochs}; the "
            "baseline is --diffusion none"
        )
    for name in ("ldm_balance", "ldm_warmup_epochs"):
        if getattr(args, name) and args.condition == "class":
            parser.error(f"--{name}: under --condition class nothing of L_ldm reaches the encoder; choose another")
    if args.ldm_balance and args.origin["ldm_weight"] != "default":
        parser.error("--ldm_balance and --ldm_weight both set the strength of L_ldm; give one of them")
    if args.prompt_init != "random" and args.condition == "instance":
        parser.error(f"--prompt_init {args.prompt_init}: under --condition instance prompts belong to no identity")
    if args.freeze_prompts and args.unet_mode == "frozen" and args.condition == "class":
        parser.error("--freeze_prompts, --unet_mode frozen and --condition class leave nothing that learns from L_ldm")


if __name__ == "__main__":
    # Before torch and diffusers are imported, so that --help and a mistyped flag answer at once.
    args = parse_args()

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils import launch
from utils.batches.samplers import IdentitySampler
from utils.batches.transforms import test_transform, train_transform
from utils.datasets.load import digest_of
from utils.diffusion.checkpoint import check_diffusion
from utils.diffusion.feedback import FEEDBACK_WORDS, GradientBalance, examined_images, middle_of
from utils.diffusion.latents import feedback_loader, inputs_of_step
from utils.diffusion.schedule import noise_loss
from utils.diffusion.unet import load_diffusion, recompute_activations, save_feedback
from utils.evaluation.features import extract
from utils.evaluation.targets import open_sets
from utils.files import portable
from utils.launch import gather_with_gradient, own_rows, prepare, splitter, whole_weights
from utils.modeling.folder import card_text, model_kind
from utils.modeling.memories import PrototypeMemory
from utils.modeling.norms import check_passes, share_batch_statistics
from utils.modeling.reid_model import ReIDModel
from utils.training.loop import Training, norm_of, optimizer_of, rates_of, trained
from utils.training.report import add_notes, samples_of, spread, write_sample

# The method


class Condition(nn.Module):
    """The condition of the U-Net for each image: (B, T, width)."""

    def __init__(
        self, kind, probabilities, bottleneck, *, num_ids, num_features, width, tau, num_tokens=1, prompts=None,
        frozen=False,
    ):  # fmt: skip
        super().__init__()
        self.kind, self.probabilities, self.tau = kind, probabilities, tau
        # (N, width) or (N, T, width): a prompt of each identity; under `instance` the feature itself weighs them.
        if prompts is None:
            tokens = (num_tokens,) if num_tokens > 1 else ()
            prompts = torch.randn(num_features if kind == "instance" else num_ids, *tokens, width)
        if frozen:
            self.register_buffer("prompts", prompts)
        else:
            self.prompts = nn.Parameter(prompts)
        layers = {
            "none": [], "silu": [nn.SiLU()], "bn": [nn.BatchNorm1d(width)],
            "bn-silu": [nn.BatchNorm1d(width), nn.SiLU()],
            "condition-net": [
                nn.BatchNorm1d(width), nn.SiLU(), nn.Linear(width, width // 8, bias=False),
                nn.BatchNorm1d(width // 8), nn.SiLU(), nn.Linear(width // 8, width, bias=False),
            ],
        }[bottleneck]  # fmt: skip
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight)
        self.bottleneck = nn.Sequential(*layers)

    def forward(self, logits, bn_features, labels, memory):
        prompts = self.prompts
        if self.kind == "class":
            tokens = prompts[labels]
        else:
            weights = F.normalize(bn_features, dim=1)
            if self.kind == "correlation":
                weights = self.identity_probabilities(logits, bn_features, memory)
            by_token = weights.ndim == 3
            tokens = torch.einsum("btn,ntw->btw", weights, prompts) if by_token else weights @ prompts.flatten(1)
        width = prompts.shape[-1]
        return self.bottleneck(tokens.reshape(-1, width)).view(len(labels), -1, width)

    def identity_probabilities(self, logits, bn_features, memory):
        by_classifier = (logits / self.tau).softmax(-1)
        if self.probabilities not in ("prototype", "mean"):
            return by_classifier
        by_prototype = (memory.similarities(bn_features) / memory.temperature).softmax(1)
        return by_prototype if self.probabilities == "prototype" else (by_classifier + by_prototype) / 2


class DCAC(nn.Module):
    """Encoder, prototypes, condition and U-Net; `forward` is the loss of one batch.

    With several processes each passes its share of the images through encoder and U-Net. The features are gathered
    in between, so that BatchNorm, classifier, memory and condition see the whole batch, as one process would.
    """

    def __init__(
        self, encoder, memory, condition, unet, schedule, *, ldm_weight, label_smoothing, pass_size, balance=None
    ):
        super().__init__()
        self.encoder, self.memory, self.condition, self.unet = encoder, memory, condition, unet
        self.schedule = schedule
        self.ldm_weight, self.label_smoothing, self.pass_size = ldm_weight, label_smoothing, pass_size
        self.balance = balance

    def forward(self, images, labels, masks=None, latents=None, noise=None, timesteps=None, warmup=False):
        features, losses = self.encode(images, masks)
        share, labels = own_rows(features, len(images)), gather_with_gradient(labels)
        with torch.autocast(images.device.type, enabled=False):
            features = features.float()
            bn_features, logits = self.encoder.neck(features)
            losses = self.identity_losses(features, bn_features, logits, labels) | losses
            if latents is not None:
                inputs = self.condition_inputs(features, bn_features, logits, warmup)
                condition = self.condition(*inputs, labels, self.memory)[share]
        loss = sum(losses.values())
        loss_ldm = torch.zeros_like(loss)
        if latents is not None:
            loss_ldm = self.in_passes(self.denoise, latents, noise, timesteps, condition).mean()
            loss = loss + self.ldm_weight * loss_ldm
        values = {"loss": loss} | losses | {"loss_ldm": loss_ldm}
        return loss, {name: value.detach() for name, value in values.items()}, bn_features.detach(), labels

    def encode(self, images, masks):
        """Features of the whole batch, and losses of the encoder itself."""
        return gather_with_gradient(self.in_passes(self.encoder.backbone, images)), {}

    def identity_losses(self, features, bn_features, logits, labels):
        loss_id = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return {"loss_id": loss_id, "loss_pcl": self.memory(bn_features, labels)}

    def condition_inputs(self, features, bn_features, logits, warmup):
        """The logits and features that the condition is made of, with the way that the gradient of L_ldm takes."""
        if warmup:
            return logits.detach(), bn_features.detach()
        if self.balance is None:
            return logits, bn_features
        return self.neck_again(self.balance(features))

    def scored(self, features, logits, bn_features):
        """Of MUVA, probabilities from texts or parts take the place of the classifier's here."""
        return logits, bn_features

    def neck_again(self, features):
        """Logits and features after BatchNorm, as in training; running statistics stay as they are."""
        norm = self.encoder.bnneck
        bn_features = F.batch_norm(features, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        return self.encoder.classifier(bn_features), bn_features

    def denoise(self, latents, noise, timesteps, condition):
        return noise_loss(self.unet, self.schedule, latents, noise, timesteps, condition).view(1)

    def in_passes(self, function, *tensors):
        """One call, or calls on `pass_size` rows each whose activations are computed again in the backward pass."""
        if len(tensors[0]) <= self.pass_size:
            return function(*tensors)
        parts = zip(*(tensor.split(self.pass_size) for tensor in tensors), strict=True)
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


# Training


def main(args):
    late = args.diffusion == "ldm" and args.ldm_start_epoch > 1
    # The balance looks at the neck's weights by themselves, which ZeRO-3 splits.
    stage = 2 if args.ldm_balance else 3
    accelerator = launch.start_training(args, find_unused_parameters=late, max_zero_stage=stage, fsdp=True)
    launch.introduce(args, accelerator, demo=DEMO, stand_ins=stand_ins_of(args))
    # What can be wrong with data and configuration shows before a model is loaded.
    model_kind(args.backbone)
    diffusion = None
    if args.diffusion == "ldm":
        name, options = args.pretrained_model_name_or_path, {"revision": args.revision, "variant": args.variant}
        options["needs_variant"] = args.origin["variant"] == "flag"
        diffusion = check_diffusion(name, resolution=args.diffusion_resolution, **options)
        if args.variant != diffusion.variant:
            accelerator.print(f"{name} has no U-Net of variant {args.variant}: training starts from the default one")
    captions, parts = caption_prompts(args, diffusion), muva.parts_of(args)
    batch_size = launch.global_batch_size(args, accelerator)
    reading = {"root": args.data_root, "skip_unreadable": args.skip_unreadable}
    options = {"holdout": args.holdout, "single_image_ids": args.single_image_ids, "say": accelerator.print} | reading
    least_left = -(-batch_size // args.images_per_id)
    args.source, train, labels, targets = open_sets(args.source, args.target, least_left=least_left, **options)
    if batch_size < 2:
        raise ValueError("a batch of one image has no statistics for BatchNorm; raise --train_batch_size")
    share = accelerator.process_index, accelerator.num_processes
    sampler = IdentitySampler(labels.tolist(), batch_size, args.images_per_id, args.seed, *share)
    data, num_ids = digest_of(train, labels), int(labels.max()) + 1
    training = Training(args, accelerator, sampler, train, script="train_dcac.py", data=data)
    parts.open(train, num_ids, data, accelerator.print)
    accelerator.print(
        f"{' + '.join(args.source)}: {len(train)} images of {num_ids} identities; "
        f"measured on {', '.join(target.spec for target in targets) or 'nothing, as there is no --target'}"
    )

    prompts = {"num_tokens": captions.num_tokens or 1} if captions else parts.prompts()
    # A checkpoint holds the prompts.
    if captions and args.prompt_init != "random" and not training.resumed:
        prompts["prompts"] = captions.make(args.source, train, labels, accelerator, args.output_dir, **reading)
    bare, vae = build_model(args, accelerator, num_ids, diffusion, prompts, parts)
    if not training.resumed and parts.start(bare, labels, accelerator, batch_size):
        return accelerator.end_training()
    loader = parts.loader(build_loader(args, accelerator, bare.encoder, train, labels, sampler, vae))
    networks = bare.encoder.backbone, bare.unet
    model, optimizer = prepare(accelerator, bare, networks, lambda: optimizer_of(args, parameter_groups(args, bare)))
    training.begin(model, optimizer, rates_of(args, optimizer, training.num_steps))
    params, encoder = trained(model), bare.encoder

    def measure(epoch):
        # Published numbers are of float32.
        training.measure(epoch, encoder, targets, in_float32=True)
        with whole_weights(model, accelerator):
            parts.note(training, epoch, encoder, targets)
            if vae is not None and accelerator.is_main_process:
                training.note(epoch, **examine(args, accelerator, bare, vae, train, labels, epoch))

    if not training.resumed:
        rebuild_prototypes(training, model, bare, train, labels, parts)
        measure(0)
    for epoch in training.epochs():
        if epoch > 1 and not training.in_mid_epoch:
            rebuild_prototypes(training, model, bare, train, labels, parts)
        model.train()
        for batch in training.batches(loader):
            training.log(training_step(training, model, bare, vae, batch, params))
        if training.measures(epoch):
            measure(epoch)
    if not training.stopped:
        with whole_weights(model, accelerator):
            if accelerator.is_main_process:
                save(args, training, bare)
    return training.end(
        lambda: parts.illustrate(report_of(args, training, num_ids), encoder, targets),
        upload=lambda repo_id: bare.encoder.push_to_hub(repo_id, card=card_of(args, training, bare.encoder)),
    )


def training_step(training, model, bare, vae, batch, params):
    """Losses, gradients, the optimizer's step, then the prototypes."""
    args, accelerator, optimizer = training.args, training.accelerator, training.optimizer
    batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    feedback = {"masks": batch["masks"]} if "masks" in batch else {}
    if vae is not None and training.epoch >= args.ldm_start_epoch:
        share = accelerator.process_index, accelerator.num_processes
        feedback |= inputs_of_step(vae, batch, args.seed, training.step, bare.schedule.num_steps, *share)
        feedback["warmup"] = training.epoch < args.ldm_start_epoch + args.ldm_warmup_epochs
    # DeepSpeed and FSDP2 do not do so by themselves.
    with accelerator.autocast():
        loss, values, bn_features, labels = model(batch["images"], batch["labels"], **feedback)
    accelerator.backward(loss)
    if bare.balance is not None:
        values |= bare.balance.update(lambda gradients: accelerator.reduce(gradients, reduction="mean"))
    norm = accelerator.clip_grad_norm_(params, args.max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    bare.memory.update(bn_features, labels)
    return {"grad_norm": norm_of(norm, loss.device), **values}


def rebuild_prototypes(training, model, bare, train, labels, parts):
    """Every prototype anew, from the test features of all training images."""
    args, accelerator, encoder = training.args, training.accelerator, bare.encoder
    transform = test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, args.memory_resample)
    options = {"batch_size": args.eval_batch_size, "num_workers": args.dataloader_num_workers, "desc": "prototypes"}
    with whole_weights(model, accelerator):
        features = parts.extract(extract, encoder, train, transform, accelerator=accelerator, **options)
        bare.memory.rebuild(features, labels)


# What the training is made of


def stand_ins_of(args):
    models = ["backbone"] + ["pretrained_model_name_or_path"] * (args.diffusion == "ldm")
    models += ["captioner_model_name_or_path"] * (args.diffusion == "ldm" and args.prompt_init == "captions")
    return launch.stand_ins_among(args, models, PUBLISHED)


def caption_prompts(args, diffusion):
    """Prompts that are more than one random token, or None; checks what they are made from."""
    if diffusion is None or (args.prompt_init == "random" and args.prompt_tokens == "end"):
        return None
    # Captions bring along code that no other run needs.
    from utils.generated.texts.identity_texts import CaptionPrompts

    models = args.pretrained_model_name_or_path, args.captioner_model_name_or_path
    return CaptionPrompts(args.prompt_init, args.prompt_tokens, diffusion.condition_width, *models, args.revision)


def build_model(args, accelerator, num_ids, diffusion, prompts, parts):
    """The DCAC module and the VAE (None for the baseline)."""
    set_seed(args.seed)
    sizes = {"num_ids": num_ids, "image_size": tuple(args.resolution)}
    encoder = ReIDModel.for_training(args.backbone, **sizes, resample=args.test_resample)
    launch.print_notes(accelerator, encoder.notes)
    encoder = parts.encoder(encoder)
    check_passes(encoder.backbone, args.backbone, args.gradient_accumulation_steps)
    # The neck sees the gathered batch anyway.
    share_batch_statistics(encoder.backbone, accelerator.device)
    memory = PrototypeMemory(torch.zeros(num_ids, encoder.num_features), args.memory_temperature, args.memory_momentum)
    condition = unet = schedule = vae = None
    if diffusion is not None:
        sizes = {"num_ids": num_ids, "num_features": encoder.num_features, "width": diffusion.condition_width}
        more = {"tau": args.tau, "frozen": args.freeze_prompts} | prompts
        condition = Condition(args.condition, args.probabilities, args.bottleneck, **sizes, **more)
        options = {"seed": args.seed, "revision": args.revision, "variant": diffusion.variant}
        options["memory_efficient"] = args.enable_xformers_memory_efficient_attention
        # What splits weights sends them around as they lie in memory.
        options |= {"channels_last": not splitter(accelerator), "mixed_precision": accelerator.mixed_precision}
        unet, schedule, vae = load_diffusion(args.pretrained_model_name_or_path, args.unet_mode, args.rank, **options)
    if args.gradient_checkpointing == "all":
        encoder.enable_gradient_checkpointing()
    if args.gradient_checkpointing and unet is not None:
        recompute_activations(unet, args.gradient_checkpointing)
    if args.torch_compile:
        encoder.backbone.compile()
        if unet is not None:
            unet.compile()
    balance = args.ldm_balance and GradientBalance(args.ldm_balance)
    weights = {"ldm_weight": args.ldm_weight, "label_smoothing": args.label_smoothing, "balance": balance}
    weights["pass_size"] = args.train_batch_size
    return parts.module(DCAC, encoder, memory, condition, unet, schedule, **weights), vae


def build_loader(args, accelerator, encoder, train, labels, sampler, vae):
    normal = encoder.image_size, encoder.image_mean, encoder.image_std
    transform = train_transform(*normal, padding=args.padding, erasing=args.erasing, erasing_aspect=(0.3, 1 / 0.3))
    cache_dir = None if args.cache_dir == "none" else Path(args.cache_dir).expanduser()
    options = {"vae_name": args.pretrained_model_name_or_path, "num_workers": args.dataloader_num_workers}
    options |= {"cache_dir": cache_dir, "accelerator": accelerator}
    size = tuple(args.diffusion_resolution)
    return feedback_loader(train, labels.tolist(), transform, sampler, vae, size, **options)


def parameter_groups(args, model):
    """Prompts and LoRA at a multiple of the learning rate, all else at the learning rate."""
    groups = {1.0: [], args.lr_multiplier: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".predictors." not in name:
            multiplied = name == "condition.prompts" or ".lora_" in name
            groups[args.lr_multiplier if multiplied else 1.0].append(parameter)
    sets = [{"params": params, "lr": factor * args.learning_rate} for factor, params in groups.items() if params]
    return sets + getattr(model, "predictor_groups", lambda rate: [])(args.learning_rate)


# Results


def examine(args, accelerator, model, vae, train, labels, epoch):
    """What the condition says about images of some identities: numbers, and pictures of fewer."""
    rows = spread([middle_of(labels == label) for label in range(model.encoder.num_ids)], EXAMINED)
    images, labels = [train[row]["image"] for row in rows], labels[rows].to(accelerator.device)
    pictured = spread(range(len(images)), args.validation_ids) if args.validation_ids else ()
    options = {"autocast": accelerator.autocast, "seed": args.seed, "pictured": pictured}
    numbers, pictures = examined_images(model, vae, images, labels, tuple(args.diffusion_resolution), **options)
    if pictures:
        write_sample(args.output_dir, epoch, pictures)
    return {"feedback": numbers}


def save(args, training, bare):
    """The trained model with its card, and what the diffusion side learned."""
    bare.encoder.save_pretrained(Path(args.output_dir) / "model", card=card_of(args, training, bare.encoder))
    if bare.unet is not None:
        save_feedback(bare.unet, args.unet_mode, bare.condition, args.output_dir)


def card_of(args, training, encoder):
    title = f"{muva.name_of(args)} trained on {' + '.join(portable(args.source))}"
    return training.card(title, card_text(encoder), identities=encoder.num_ids)


def report_of(args, training, num_ids):
    method = "baseline, no diffusion model" if args.diffusion == "none" else f"{args.condition}, {args.unet_mode}"
    notes = training.results.get("feedback", [])
    # With --validation_ids 0, pictures there are an earlier run's.
    pictured = {note["epoch"]: f"epoch {note['epoch']}, timestep {note['matters_at']}" for note in notes}
    samples = samples_of(args.output_dir, pictured) if args.validation_ids else []
    seen = set(args.target or args.source) & set(args.source)
    facts = [("Source", " + ".join(portable(args.source))), ("Encoder", Path(args.backbone).name)]
    facts += [("Diffusion", method), ("Images", f"{len(training.images):,} of {num_ids:,} identities")]
    report = training.report(
        muva.name_of(args),
        "A Re-ID encoder",
        facts,
        whom="" if seen else "people and cameras it was not trained on",
        samples=samples,
        sample_words="In each row: an image; the same, noised up to the timestep where the condition matters most and "
        "denoised under its own condition; and under that of the row above.",
    )
    add_notes(report, notes, "What the condition says", FEEDBACK_WORDS)
    return report


def run_script(args):
    lean = (
        f"lower --train_batch_size {args.train_batch_size} and raise --gradient_accumulation_steps by as much (the "
        "training stays the same), or add --gradient_checkpointing"
    )
    launch.end_with(main, args, "train_dcac.py", lean=lean)


if __name__ == "__main__":
    run_script(args)
