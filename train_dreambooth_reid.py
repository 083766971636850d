# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0", "bitsandbytes>=0.50.0", "datasets>=4.5.0", "diffusers>=0.38.0", "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4", "numpy>=2.1.0", "peft>=0.19.0", "Pillow>=11.0.0", "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2", "scipy>=1.14.1", "torch>=2.11.0", "torchvision>=0.26.0", "tqdm>=4.67.0",
#     "transformers>=5.17.0", "triton>=3.6.0; sys_platform == 'linux'",
# ]
# ///
"""Diffusion-ReID, generation: many new images of every identity, by a diffusion model tuned to its images.

    accelerate launch --config_file accelerate_config.yaml train_dreambooth_reid.py
    accelerate launch train_dreambooth_reid.py --recipe lora --source market1501 --data_root ~/reid --output_dir out

The first is a demo on drawn people with the shipped stand-in models. The second takes Stable Diffusion v1.4 and
BLIP-2; `--recipe paper` has the published settings. A killed run continues with the same command, and any number of
processes, hosts or array jobs (`--num_shards 8 --shard 3`) may work in one folder. For each identity:

    LPE  a captioner is asked about every image of a sequence; the answers, merged by majority, make the prompt
         P_LPE*: "a photo of a person, wearing a red coat, ..."
    IIR  P_E is P_LPE* with a new token before the noun, "a photo of <iir-0002> person, ...", its embedding trained
    DI   the untouched model draws a reference set x' from P_R; with x the identity's own images, the loss is
         L = mean w_t (unet(x_t, P_E) - noise)^2 + lambda mean w_t' (unet(x'_t', P_R) - noise')^2
         P_R is P_LPE*, as published, or its upper garment alone, so that many identities share a reference set

Then images are drawn from P_E, each with another scene, action, carried item and view, some with a garment changed.
With --save_adapters, the same command with --redraw and a larger --num_images, or other --prompts, adds images later.
"""

import re

from utils import flags, ranges
from utils.diffusion.few_steps import usual_drawing
from utils.flags import CAPTIONER_DIR, CLIP_DIR, DIFFUSION_DIR
from utils.ranges import above_zero, at_least, not_negative

DEMO_SOURCE = ["synthetic:domain=a,num_ids=4"]
DEMO = (
    "Demo: 4 drawn people, the shipped stand-in models, small pictures, about three minutes on two cores. For your "
    "own: --source SPEC --data_root DIR, and --recipe lora or paper for real models"
)
# The paper gives size, learning rate, steps and numbers of images. Solver, guidance, precision and the token's rate
# are our choices; 8-bit Adam fits the training on a card of 24 GB. Recomputing activations would save 0.3 of 8.9 GiB
# and cost a quarter more FLOPs in each step (`python -m benchmarks.memory.generation_cost`).
PUBLISHED = {
    "pretrained_model_name_or_path": "CompVis/stable-diffusion-v1-4",
    "captioner_model_name_or_path": "Salesforce/blip2-opt-2.7b",
    "clip_model_name_or_path": "openai/clip-vit-base-patch16",
    "resolution": [512, 512], "finetune": "full", "learning_rate": 2e-6, "token_learning_rate": 5e-4,
    "train_batch_size": 1, "max_train_steps": 1000, "num_reference_images": 200, "reference_prompts": "own",
    "num_images": 220, "num_inference_steps": 25, "guidance_scale": 7.5, "mixed_precision": "fp16",
    "use_8bit_adam": True,
}  # fmt: skip
LEAN = {"resolution": [512, 256], "finetune": "lora", "learning_rate": 5e-4, "train_batch_size": 2}
LEAN |= {"max_train_steps": 400, "num_reference_images": 64, "num_inference_steps": 20, "reference_prompts": "shared"}
LEAN |= {"use_8bit_adam": False}
RECIPES = {"paper": PUBLISHED, "lora": PUBLISHED | LEAN}
# The same as in utils.generated.texts.captions and utils.diffusion.families.solvers.
CLASS_PROMPT = "a photo of a person"
SOLVERS = ("dpmsolver++", "unipc", "ddim", "euler", "ddim-trailing", "lcm", "tcd", "flow-euler")
# The flags that determine the captions.
CAPTIONING = ("captioner_model_name_or_path", "captioner_bits", "max_sequence_images")
# Models for which there are shipped stand-ins.
STAND_INS = ("pretrained_model_name_or_path", "captioner_model_name_or_path", "clip_model_name_or_path")
# What --redraw may change in a folder that has images.
REDRAWN = (
    "num_images", "attribute_lists", "clothing_change", "solver", "num_inference_steps", "guidance_scale",
    "guidance_share", "negative_prompt", "fast_lora", "reference_drawing",
)  # fmt: skip
BOUND_BY_MEMORY = ("finetune", "use_8bit_adam", "gradient_checkpointing", "train_batch_size", "resolution")
BOUND_BY_MEMORY += ("sample_batch_size",)
DRAWING = ("solver", "num_inference_steps", "guidance_scale", "guidance_share")
CHECK_EVERY = 20


def build_parser():
    """Flags marked `free` change images by rounding at most, or only which images are made."""
    parser = flags.Parser(__doc__, recipes=RECIPES)
    flags.add_recipe(
        parser, "real models; `paper`: the published settings, 512 x 512, whole U-Net; `lora`: 512 x 256 and LoRA"
    )
    group = flags.add_data(parser, source=f"labelled sets; default {DEMO_SOURCE[0]}", workers=None)
    parser.free.add("skip_unreadable")
    group.add("--ids", nargs="+", free=True, help="only these identities: numbers, ranges (4-8), or DOMAIN/NUMBER")
    group.add("--max_sequence_images", type=at_least(1), default=32, help="images of each identity, all of one camera")

    group = parser.group("captions (LPE)")
    group.add(
        "--captioner_model_name_or_path", default=CAPTIONER_DIR, help="image-to-text model: BLIP-2, BLIP, GIT, ..."
    )
    group.add("--captioner_bits", type=int, choices=[4, 8], help="load the captioner in so few bits")
    group.add(
        "--captioner_batch_size", type=at_least(1), default=16, free=True, help="images in each pass of the captioner"
    )
    group.add(
        "--prompts",
        metavar="FILE",
        free=True,
        help="an edited captions.parquet, or csv or jsonl with pid, domain, prompt or attributes: replaces captions; "
        "a prompt that differs from what the attributes make wins over them",
    )
    group.switch("--captions_only", "stop when all captions are written", free=True)
    group.add(
        "--class_prompt", default=CLASS_PROMPT, help="P; its last word is the noun, which other prompts must have too"
    )

    group = parser.group("identity (IIR) and diversity (DI)")
    group.add(
        "--identity_token",
        default="<iir-{pid}>",
        help="in <brackets>: a new token, trained; else words of the vocabulary such as sks, used as they are; {pid} "
        "stands for the number",
    )
    no_token = (lambda args: not is_new(args.identity_token), "--identity_token is a word of the vocabulary")
    no_references = (lambda args: args.num_reference_images == 0, "--num_reference_images 0")
    group.add(
        "--token_learning_rate", type=above_zero, default=5e-3, idle=no_token, help="learning rate of the new token"
    )
    group.add(
        "--num_reference_images", type=at_least(0), default=16, help="reference images of each prompt, 0 for none"
    )
    group.add(
        "--reference_prompts",
        choices=["shared", "own"],
        default="shared",
        idle=no_references,
        help="own: from the whole prompt of each identity; shared: one set for all whose upper garment is the same",
    )
    group.add(
        "--prior_loss_weight",
        type=not_negative,
        default=1.0,
        idle=no_references,
        help="lambda, weight of reference images",
    )
    group.add(
        "--snr_gamma",
        type=above_zero,
        help="w_t by min-SNR with this gamma, such as 5; default: w_t is 1, plain noise loss",
    )
    group.add(
        "--attribute_lists",
        metavar="FILE",
        help='JSON lists that generated images draw from, {"scene": [...], "action": [...], "carried": [...], ...}; '
        "those of upper, lower, shoes and hat are for --clothing_change",
    )
    group.add(
        "--clothing_change",
        type=ranges.minority,
        default=0.2,
        help="share of the images in which a garment differs from the identity's own; metadata.parquet marks them",
    )

    group = parser.group("fine-tuning, of each identity")
    words = "Stable Diffusion 1.x, 2.x, XL or 3.x, or Flux; solver and identity token follow it"
    group.add("--pretrained_model_name_or_path", default=DIFFUSION_DIR, help=words)
    group.add("--revision", help="revision of the diffusion model on the Hub")
    group.add("--finetune", choices=["full", "lora"], default="lora", help="train the whole U-Net, or LoRA")
    whole = (lambda args: args.finetune == "full", "--finetune full")
    group.add("--rank", type=at_least(1), default=8, idle=whole, help="rank of LoRA")
    group.add("--base_bits", type=int, choices=[4, 8], help="of frozen weights under LoRA; default: the precision's")
    group.switch("--train_text_encoder", "train the text encoder with the U-Net, in the same way")
    group.size("--resolution", [128, 64], help="size of the drawn images in pixels, multiples of 8")
    group.add("--max_train_steps", type=at_least(1), default=150, help="steps of each identity")
    group.add(
        "--train_batch_size", type=at_least(1), default=4, help="own images of a step, with as many reference images"
    )
    group.add("--gradient_accumulation_steps", type=at_least(1), default=1, help="batches of each step")
    group.add("--seed", type=ranges.seed, default=0, help="of everything that is drawn")

    group = parser.group("better pictures, not in the published recipes")
    group.switch("--image_captions", "tune each image to the answers about it, not to those of its whole sequence")
    group.add(
        "--caption_dropout",
        type=ranges.fraction,
        default=0.0,
        help="share of own images tuned to the class prompt and token alone",
    )
    group.add("--noise_offset", type=not_negative, default=0.0, help="noise equal over a whole channel; 0.05 is usual")
    group.add(
        "--mask_model",
        help="any segmentation model of transformers: the loss on own images looks at the person",
    )
    no_mask = (lambda args: not args.mask_model, "no --mask_model")
    group.add("--mask_background", type=ranges.fraction, default=0.1, idle=no_mask, help="weight of what is no person")

    group = parser.group("optimizer (AdamW)")
    group.add("--learning_rate", type=above_zero, default=1e-2, help="suits the stand-in's LoRA")
    group.add("--lr_scheduler", choices=flags.STEP_SCHEDULES, default="constant", help="how the rate changes")
    constant = (lambda args: args.lr_scheduler == "constant", "--lr_scheduler constant")
    group.add("--lr_warmup_steps", type=at_least(0), default=0, idle=constant, help="steps in which the rate rises")
    group.add("--adam_weight_decay", type=not_negative, default=1e-2, help="weight decay")
    group.add("--max_grad_norm", type=not_negative, default=1.0, help="clip gradients to this norm, 0 for never")
    flags.add_8bit(group)
    flags.add_memory(parser, compiled="the U-Net, once for all identities", xformers=True)

    group = parser.group("generated images")
    group.add("--num_images", type=at_least(1), default=8, help="images of each identity")
    group.add("--solver", choices=SOLVERS, default="dpmsolver++", help="sampler of the diffusion model")
    group.add("--num_inference_steps", type=at_least(1), default=12, help="steps of the solver")
    group.add("--guidance_scale", type=ranges.one_or_more, default=3.0, help="weight of the prompt, 1 for no guidance")
    unguided = (lambda args: args.guidance_scale == 1, "--guidance_scale 1")
    group.add("--guidance_share", type=ranges.share, default=1.0, idle=unguided, help="of the steps, from the first")
    never = (lambda args: unguided[0](args) and not (args.fast_lora and args.num_reference_images), unguided[1])
    group.add("--negative_prompt", default="", idle=never, help="what guidance leads away from; default: no words")
    group.add(
        "--fast_lora",
        help="few-step LoRA such as LCM's or Hyper-SD's, stacked on the identity's: file, folder or Hub id, "
        "USER/NAME or USER/NAME/FILE; solver, steps and guidance become its own (lcm, 4, none) unless given",
    )
    group.add("--sample_batch_size", type=at_least(1), default=8, free=True, help="images drawn in one pass")
    group.size("--save_resolution", [256, 128], help="size of the files")
    group.add("--image_format", choices=["jpg", "png"], default="jpg", help="format of the files")
    png = (lambda args: args.image_format == "png", "--image_format png")
    group.add("--jpeg_quality", type=ranges.between(1, 100), default=95, idle=png, help="1 to 100")

    group = parser.group("measures and output")
    group.add("--clip_model_name_or_path", default=CLIP_DIR, help="measures similarity; `none` for no measures")
    group.add("--reid_model", help="a ReIDModel folder or Hub id that measures the identity of the images")
    group.add("--validation_ids", type=at_least(0), default=4, free=True, help="identities shown in the report")
    group.switch("--save_adapters", "keep each identity's LoRA and token under adapters/")
    group.switch(
        "--redraw", "add images by the adapters that are kept, up to --num_images of each prompt, untuned", free=True
    )
    group.add("--output_dir", default="output/generated", free=True, help="folder of the results")
    flags.add_upload(group, "the images made, to a private repository where it is new", "--hub_dataset_id", free=True)
    group.add("--num_shards", type=at_least(1), default=1, free=True, help="jobs that share the identities")
    group.add("--shard", type=at_least(0), default=0, free=True, help="number of this job, from 0")
    group.switch("--merge", "only write the tables and the report of what --output_dir holds", free=True)
    return parser


def parse_args(input_args=None):
    parser = build_parser()
    args = parser.parse(input_args)
    args.demo = args.source is None
    args.source = args.source or DEMO_SOURCE
    check_args(parser, args)
    fast = draw_fast(parser, args) if args.fast_lora else []
    args.notes = parser.notes(args) + fast
    return args


def draw_fast(parser, args):
    """Solver, steps and guidance of a few-step LoRA, where no flag gives others. Returns a line that says so.

    The untouched model draws reference images as without the LoRA: flags of the few-step LoRA are not for it.
    """
    recipe = RECIPES.get(args.recipe, {})
    args.reference_drawing = {name: recipe.get(name, parser.get_default(name)) for name in DRAWING}
    usual = usual_drawing(args.fast_lora)
    usual = {name: value for name, value in usual.items() if args.origin[name] != "flag"}
    vars(args).update(usual)
    args.origin |= dict.fromkeys(usual, "fast_lora")
    words = ", ".join(f"--{name} {value}" for name, value in usual.items())
    return [f"For --fast_lora: {words or 'all as given'}; reference images are drawn without it"]


def check_args(parser, args):
    """Reject wrong combinations of arguments."""
    if any(side % 8 for side in args.resolution):
        parser.error(f"--resolution must be two multiples of 8, got {args.resolution[0]} {args.resolution[1]}")
    if args.shard >= args.num_shards:
        parser.error(f"--shard counts from 0, so it must be below --num_shards {args.num_shards}, got {args.shard}")
    words = args.class_prompt.split()
    args.class_prompt = " ".join(words)
    if not words or not re.fullmatch(r"\w(.*\w)?", words[-1]):
        parser.error(f"--class_prompt must end in its noun, a word without a full stop, got {args.class_prompt!r}")
    if not args.identity_token.strip():
        parser.error("--identity_token must not be empty")
    if args.redraw and (args.merge or args.captions_only):
        parser.error(f"--redraw draws images, so leave out --{'merge' if args.merge else 'captions_only'}")
    # Adapters are all that --redraw starts from.
    args.save_adapters = args.save_adapters or args.redraw
    if args.save_adapters and args.finetune != "lora":
        parser.error("--save_adapters keeps LoRA, so it needs --finetune lora: a whole U-Net an identity is too much")
    if args.save_adapters and args.train_text_encoder:
        parser.error("--save_adapters keeps LoRA of the U-Net only; leave out --train_text_encoder")
    if args.base_bits and args.finetune == "full":
        parser.error("--base_bits is of weights that do not train, so it needs --finetune lora")
    if args.base_bits == 8 and args.gradient_checkpointing:
        parser.error(
            "--base_bits 8 keeps every layer's input, so --gradient_checkpointing saves nothing; use --base_bits 4"
        )
    if args.merge and args.captions_only:
        parser.error("--merge makes nothing new, so leave out --captions_only")


def is_new(identity_token):
    """Whether the token is new to the vocabulary."""
    return identity_token.startswith("<") and identity_token.endswith(">")


if __name__ == "__main__":
    # Parse before torch and diffusers are imported, so that --help and a mistyped flag answer at once.
    args = parse_args()

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from utils import launch
from utils.datasets.identities import chosen_identities, open_identities
from utils.diffusion.checkpoint import read_config
from utils.diffusion.families import family_of
from utils.diffusion.families.settings import check_steps, clip_tokenizers, fitted, said_of_word
from utils.diffusion.families.texts import load_tokenizer
from utils.diffusion.fast_lora import read_fast_lora
from utils.diffusion.person_masks import check_mask_model
from utils.diffusion.text_to_image import what_saves_memory
from utils.diffusion.tuning import Batches, open_tunable, posteriors_of
from utils.files import portable
from utils.generated import made_set
from utils.generated.drawing import Drawing, check_adapters, check_kept, check_origin
from utils.generated.measures import Measures, check_measures
from utils.generated.texts import captions
from utils.generated.texts.captioners import Captioner, check_captioner, quantization
from utils.generated.texts.captioning import caption_identities, open_prompts
from utils.training.optimizer import build_optimizer
from utils.worklist import Progress, Worklist, seed_of, share

# DI: the reference set, and fine-tuning with it


def sampling(args, *, of_references=False):
    """The settings of sampling, as arguments of `TextToImage.sample`; the untouched model draws without a LoRA."""
    drawing = args.reference_drawing if of_references and args.fast_lora else vars(args)
    return {
        "solver": drawing["solver"],
        "steps": drawing["num_inference_steps"],
        "guidance": drawing["guidance_scale"],
        "guidance_share": drawing["guidance_share"],
        "negative": args.negative_prompt,
        "resolution": args.resolution,
        "batch_size": args.sample_batch_size,
    }


def reference_set(args, model, work, prompt):
    """(latents that the untouched model draws from P_R, key), (None, None) without; equal prompts share them."""
    drawing = {"sampling": sampling(args, of_references=True), "precision": args.mixed_precision}
    return made_set.open_references(model, work, prompt, args.num_reference_images, seed=args.seed, **drawing)


def denoising_errors(unet, schedule, latents, noise, timesteps, condition, snr_gamma=None, weights=None):
    """w_t |unet(x_t, t, c) - target|^2 of each image, averaged over its pixels with `weights` (B, 1, h, w): (B,).

    The error of the denoised image is that of the noise divided by SNR, so w_t = SNR gives the plain noise loss.
    Min-SNR uses w_t = min(SNR, gamma).
    """
    noised = schedule.add_noise(latents, noise, timesteps)
    prediction = unet(noised.to(condition.dtype), timesteps, encoder_hidden_states=condition).sample
    errors = (prediction.float() - schedule.target(latents, noise, timesteps)).square()
    if weights is not None:
        errors = errors * (weights / weights.mean((1, 2, 3), keepdim=True))
    errors = errors.flatten(1).mean(1)
    if snr_gamma is None:
        return errors
    signal, noise_level = schedule.parts(errors, timesteps)
    snr = (signal / noise_level).square()
    if schedule.prediction_type == "epsilon":
        # min(SNR, gamma) / SNR, in a form without 0 / 0 at a last step of pure noise.
        return errors * (snr_gamma / snr.clamp(min=snr_gamma))
    return errors * (snr.clamp(max=snr_gamma) / (snr + 1))


def fine_tune(args, tunable, identity, record, source, reference, progress, *, texts=None, alone="", weights=None):
    """Tune to one identity. Returns the losses of own and reference images, (steps, 2), or (steps, 1) without these.

    source: mean and std of the VAE's posterior of its images; reference: latents of reference images, or None. texts:
    P_E of each image, by default the identity's; alone: P_E without attributes, for --caption_dropout; weights: of the
    latents' cells in the loss, (images, 1, h, w).
    """
    model = tunable.model
    size = args.train_batch_size
    optimizer, scheduler = build_tuning(args, tunable)
    scaler = torch.amp.GradScaler(model.device.type, enabled=args.mixed_precision == "fp16")
    batches = Batches(
        (source, texts or [record["identity_prompt"]] * len(source[0]), weights),
        (reference, record["reference_prompt"]),
        size=size,
        seed=seed_of(args.seed, identity.name, "training"),
        dropped=(args.caption_dropout, alone),
        noise_offset=args.noise_offset,
    )
    # With a text encoder that changes, prompts are encoded in each step.
    trains_text = args.train_text_encoder or is_new(args.identity_token)
    cached = None if trains_text else model.encode_all(batches.texts).to(model.device)
    model.unet.train()
    losses = []
    for step in range(args.max_train_steps):
        parts = []
        for _ in range(args.gradient_accumulation_steps):
            inputs, texts, cells = batches.draw(model)
            condition = batches.encoded(texts, model) if cached is None else cached[texts]
            with model.autocast():
                errors = denoising_errors(model.denoiser, model.schedule, *inputs, condition, args.snr_gamma, cells)
            halves = errors.view(-1, size).mean(1)
            loss = halves[0] + args.prior_loss_weight * halves[1:].sum()
            scaler.scale(loss / args.gradient_accumulation_steps).backward()
            parts.append(halves.detach())
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(tunable.weights, args.max_grad_norm or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(torch.stack(parts).mean(0))
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == args.max_train_steps:
            made_set.check_losses(losses)
            progress.stage(identity.name, f"fine-tuning {step + 1}/{args.max_train_steps}")
    return torch.stack(losses).cpu()


def build_tuning(args, tunable):
    """A new optimizer and learning rate schedule, without the state of the previous identity."""
    row = tunable.token and tunable.token.row
    groups = [{"params": [weight for weight in tunable.weights if weight is not row], "lr": args.learning_rate}]
    if is_new(args.identity_token):
        groups.append({"params": [row], "lr": args.token_learning_rate, "weight_decay": 0.0})
    rates = {"learning_rate": args.learning_rate, "weight_decay": args.adam_weight_decay}
    optimizer = build_optimizer(groups, "adamw", **rates, use_8bit=args.use_8bit_adam)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, **steps)


# One identity


def make_identity(args, identity, record, work, progress, prompts, tunable, measures):
    """Reference set, fine-tuning, images and measures of one identity, in a single commit."""
    model = tunable.model
    tunable.restore()
    progress.stage(identity.name, "reference set")
    reference, key = reference_set(args, model, work, record["reference_prompt"])
    images = identity.images()
    source = posteriors_of(model.vae, images, tuple(args.resolution), args.sample_batch_size)
    own = {"texts": prompts.of_sequence(record, identity)} if args.image_captions else {}
    own, nobody = own | {"alone": prompts.alone(identity), "weights": None}, None
    if tunable.masks is not None:
        own["weights"], nobody = tunable.masks.weights(images, source[0].shape[-2:], args.mask_background)
    losses = fine_tune(args, tunable, identity, record, source, reference, progress, **own)
    progress.stage(identity.name, "images")
    tuned = {"reference": key, "model": model.digest, "loss": made_set.in_tenths(losses), "nobody": nobody}
    rest = (identity, record, work, prompts, tunable, measures)
    return drawing_of(args).draw_tuned(*rest, args.num_images, keeps_adapter=args.save_adapters, **tuned)


def redraw_identity(args, identity, record, work, progress, prompts, tunable, measures):
    """The images that are missing, by the adapter that is kept of the identity."""
    rest = (identity, record, work, progress, prompts, tunable, measures)
    return drawing_of(args).redraw(*rest, args.num_images)


def drawing_of(args):
    style = {"size": tuple(args.save_resolution), "ending": args.image_format, "quality": args.jpeg_quality}
    return Drawing(sampling(args), args.seed, args.clothing_change, **style)


# The run


def main(args):
    """Returns the identities that failed, {name: reason}."""
    accelerator = launch.start_accelerator(args.mixed_precision, patient=True)
    # Without the flag, accelerate's own setting decides.
    args.mixed_precision = accelerator.mixed_precision
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    launch.introduce(args, accelerator, demo=DEMO, stand_ins=launch.stand_ins_among(args, STAND_INS, PUBLISHED))
    if args.push_to_hub:
        launch.check_login()
    everyone = open_identities(
        args.source, args.data_root, max_images=args.max_sequence_images, skip_unreadable=args.skip_unreadable
    )
    identities = chosen_identities(everyone, args.ids) if args.ids else everyone
    work = Worklist(args.output_dir, [identity.name for identity in identities])
    if not args.merge:
        lists = captions.read_lists(args.attribute_lists) if args.attribute_lists else captions.DIVERSITY
        progress = Progress(work, made_set.IMAGES, "images", args.num_images, main=accelerator.is_main_process)
        rows, tokenizer = check_inputs(args, everyone, identities, accelerator.print)
        if args.redraw:
            check_adapters(work, work.pieces, is_new(args.identity_token))
        words = {"class_prompt": args.class_prompt, "identity_token": args.identity_token, "lists": lists}
        shares = args.reference_prompts == "shared"
        prompts = open_prompts(tokenizer, identities, **words, progress=progress, shares_references=shares)
        if accelerator.is_main_process:
            write_settings(args, work, lists)
        accelerator.wait_for_everyone()
        work_on(args, accelerator, identities, work, progress, prompts, rows)
    accelerator.wait_for_everyone()
    failures = {}
    if accelerator.is_main_process:
        wanted = None if args.merge else {"num_images": args.num_images, "adds": args.redraw}
        options = {"captions_only": args.captions_only, "wanted": wanted, "push": args.push_to_hub}
        failures = made_set.finish(work, identities, args.validation_ids, **options, repository=args.hub_dataset_id)
    accelerator.end_training()
    return failures


def check_inputs(args, everyone, identities, say):
    """Check all inputs before any model is loaded. Returns (the rows of --prompts or None, the tokenizer)."""
    name, rows = args.pretrained_model_name_or_path, None
    family = family_of(name, args.revision)
    multiple = family.check(name, args.revision)
    given = {flag for flag, origin in args.origin.items() if origin == "flag"}
    network = read_config(name, family.PART, args.revision)
    changed, lines = fitted(family, network, vars(args), given)
    vars(args).update(changed)
    if any(side % multiple for side in args.resolution):
        raise ValueError(f"--resolution must be multiples of {multiple} for this model: {args.resolution}")
    if args.prompts:
        rows = captions.read_captions(args.prompts)
        captions.check_rows(rows, everyone, identities, args.prompts)
    else:
        check_captioner(args.captioner_model_name_or_path)
        quantization(args.captioner_bits)
    if args.fast_lora:
        read_fast_lora(args.fast_lora, network)
    if args.mask_model:
        check_mask_model(args.mask_model)
    check_measures(clip_name(args), args.reid_model)
    if args.base_bits:
        launch.bitsandbytes_module("--base_bits")
    if args.use_8bit_adam:
        build_optimizer([nn.Parameter(torch.zeros(1))], "adamw", learning_rate=1.0, use_8bit=args.use_8bit_adam)
    for of_references in (False, True):
        drawing = sampling(args, of_references=of_references)
        check_steps(family, read_config(name, "scheduler", args.revision), drawing["solver"], drawing["steps"])
    token = args.identity_token.replace("{pid}", f"{identities[0].pid:04d}")
    for line in filter(None, [*lines, said_of_word(token, clip_tokenizers(family, name, args.revision))]):
        say(line)
    return rows, load_tokenizer(name, args.revision)


def write_settings(args, work, lists):
    """Write the settings that determine the images; ValueError if the folder has images of other settings."""
    free = args.free_on_resume
    arguments = {name: portable(value) for name, value in vars(args).items() if name not in free}
    given = [
        name for name, origin in args.origin.items() if origin == "flag" and (name not in free or name == "recipe")
    ]
    made_set.keep_settings(
        work,
        arguments | {"attribute_lists": lists},
        made_set.command_of({name: getattr(args, name) for name in given}),
        REDRAWN if args.redraw else (),
    )


def work_on(args, accelerator, identities, work, progress, prompts, rows):
    """Do the share of this process: captions first, then one identity after the other."""
    shards = {"num_shards": args.num_shards, "shard": args.shard}
    processes = {"num_processes": accelerator.num_processes, "process": accelerator.process_index}
    own_share = share(identities, **shards, **processes)
    records = caption_identities(
        work,
        progress,
        prompts,
        identities,
        own_share,
        rows=rows,
        made_with={name: portable(getattr(args, name)) for name in CAPTIONING},
        load_captioner=lambda: load_captioner(args, accelerator.device),
    )
    wanted = {"num_images": args.num_images, "adds": args.redraw}
    captioned = [identity for identity in own_share if identity.name in records]
    missing = [one for one in captioned if made_set.is_missing(work, records[one.name], **wanted)]
    if args.captions_only or not missing:
        return
    if not args.redraw:
        check_kept(work, [identity.name for identity in missing])
    tunable = open_model(args, accelerator, prompts)
    made_set.check_model(work, tunable.model.digest)
    if args.redraw:
        check_origin(work, [identity.name for identity in missing], tunable.model.digest)
    measures = Measures.from_pretrained(clip_name(args), args.reid_model, accelerator.device)
    num_weights = sum(weight.numel() for weight in tunable.weights)
    lean = what_saves_memory(num_weights, **{name: getattr(args, name) for name in BOUND_BY_MEMORY})
    make = redraw_identity if args.redraw else make_identity
    for identity in missing:
        inputs = (args, identity, records[identity.name], work, progress, prompts, tunable, measures)
        if made_set.attempt(work, progress, identity.name, lean, make, *inputs):
            progress.finished(identity.name)


def load_captioner(args, device):
    size = {"bits": args.captioner_bits, "batch_size": args.captioner_batch_size}
    return Captioner.from_pretrained(args.captioner_model_name_or_path, device=device, **size)


def open_model(args, accelerator, prompts):
    """The `Tunable` of the flags."""
    options = {"mode": args.finetune, "bits": args.base_bits, "compiled": args.torch_compile}
    options |= {"checkpointing": args.gradient_checkpointing, "mask_model": None if args.redraw else args.mask_model}
    options["xformers"] = args.enable_xformers_memory_efficient_attention
    options |= {name: getattr(args, name) for name in ("rank", "train_text_encoder", "seed", "revision", "fast_lora")}
    return open_tunable(args.pretrained_model_name_or_path, prompts, accelerator, **options)


def clip_name(args):
    return None if args.clip_model_name_or_path == "none" else args.clip_model_name_or_path


def end_in_words(args):
    """Run main; ValueError if an identity failed."""
    if failures := main(args):
        raise ValueError(
            f"{len(failures)} identities failed, {next(iter(failures))} for one; the same command tries again"
        )


def run_script(args):
    advice = "the same command continues with what is not done"
    launch.end_with(end_in_words, args, "train_dreambooth_reid.py", kept=advice)


if __name__ == "__main__":
    run_script(args)
