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

from utils import flags
from utils.flags import CAPTIONER_DIR, CLIP_DIR, DIFFUSION_DIR, above_zero, at_least, not_negative, one_or_more

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
# The same as in utils.generated.texts.captions and utils.diffusion.text_to_image.
CLASS_PROMPT = "a photo of a person"
SOLVERS = ("dpmsolver++", "unipc", "ddim", "euler")
# The flags that determine the captions.
CAPTIONING = ("captioner_model_name_or_path", "captioner_bits", "max_sequence_images")
# Models for which there are shipped stand-ins.
STAND_INS = ("pretrained_model_name_or_path", "captioner_model_name_or_path", "clip_model_name_or_path")
# What --redraw may change in a folder that has images.
REDRAWN = ("num_images", "attribute_lists", "clothing_change", "solver", "num_inference_steps", "guidance_scale")
BOUND_BY_MEMORY = ("finetune", "use_8bit_adam", "gradient_checkpointing", "train_batch_size", "resolution")
BOUND_BY_MEMORY += ("sample_batch_size",)
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
        type=minority,
        default=0.2,
        help="share of the images in which a garment differs from the identity's own; metadata.parquet marks them",
    )

    group = parser.group("fine-tuning, of each identity")
    group.add("--pretrained_model_name_or_path", default=DIFFUSION_DIR, help="Stable Diffusion 1.x or 2.x")
    group.add("--revision", help="revision of the diffusion model on the Hub")
    group.add("--finetune", choices=["full", "lora"], default="lora", help="train the whole U-Net, or LoRA")
    whole = (lambda args: args.finetune == "full", "--finetune full")
    group.add("--rank", type=at_least(1), default=8, idle=whole, help="rank of LoRA")
    group.switch("--train_text_encoder", "train the text encoder with the U-Net, in the same way")
    group.size("--resolution", [128, 64], help="size of the drawn images in pixels, multiples of 8")
    group.add("--max_train_steps", type=at_least(1), default=150, help="steps of each identity")
    group.add(
        "--train_batch_size", type=at_least(1), default=4, help="own images of a step, with as many reference images"
    )
    group.add("--gradient_accumulation_steps", type=at_least(1), default=1, help="batches of each step")
    group.add("--seed", type=flags.seed, default=0, help="of everything that is drawn")

    group = parser.group("optimizer (AdamW)")
    group.add("--learning_rate", type=above_zero, default=1e-2, help="the default suits the stand-in's LoRA")
    group.add("--lr_scheduler", choices=flags.STEP_SCHEDULES, default="constant", help="how the rate changes")
    constant = (lambda args: args.lr_scheduler == "constant", "--lr_scheduler constant")
    group.add("--lr_warmup_steps", type=at_least(0), default=0, idle=constant, help="steps in which the rate rises")
    group.add("--adam_weight_decay", type=not_negative, default=1e-2, help="weight decay")
    group.add("--max_grad_norm", type=not_negative, default=1.0, help="clip gradients to this norm, 0 for never")
    group.switch("--use_8bit_adam", "8-bit optimizer of bitsandbytes")
    group = flags.add_memory(parser, compiled="the U-Net, once for all identities")
    group.switch("--enable_xformers_memory_efficient_attention", "xformers in the U-Net; default torch's SDPA")

    group = parser.group("generated images")
    group.add("--num_images", type=at_least(1), default=8, help="images of each identity")
    group.add("--solver", choices=SOLVERS, default="dpmsolver++", help="sampler of the diffusion model")
    group.add("--num_inference_steps", type=at_least(1), default=12, help="steps of the solver")
    group.add("--guidance_scale", type=one_or_more, default=3.0, help="weight of the prompt, 1 for no guidance")
    group.add("--sample_batch_size", type=at_least(1), default=8, free=True, help="images drawn in one pass")
    group.size("--save_resolution", [256, 128], help="size of the files")
    group.add("--image_format", choices=["jpg", "png"], default="jpg", help="format of the files")
    png = (lambda args: args.image_format == "png", "--image_format png")
    group.add("--jpeg_quality", type=flags.between(1, 100), default=95, idle=png, help="1 to 100")

    group = parser.group("measures and output")
    group.add("--clip_model_name_or_path", default=CLIP_DIR, help="measures similarity; `none` for no measures")
    group.add("--reid_model", help="a ReIDModel folder or Hub id that measures the identity of the images")
    group.add("--validation_ids", type=at_least(0), default=4, free=True, help="identities shown in the report")
    group.switch("--save_adapters", "keep each identity's LoRA and token under adapters/")
    group.switch(
        "--redraw", "add images by the adapters that are kept, up to --num_images of each prompt, untuned", free=True
    )
    group.add("--output_dir", default="output/generated", free=True, help="folder of the results")
    group.add("--num_shards", type=at_least(1), default=1, free=True, help="jobs that share the identities")
    group.add("--shard", type=at_least(0), default=0, free=True, help="number of this job, from 0")
    group.switch("--merge", "only write the tables and the report of what --output_dir holds", free=True)
    return parser


def minority(text):
    return flags.number(text, float, lambda value: 0 <= value < 0.5, "0 or more, and below 0.5")


def parse_args(input_args=None):
    parser = build_parser()
    args = parser.parse(input_args)
    args.demo = args.source is None
    args.source = args.source or DEMO_SOURCE
    check_args(parser, args)
    args.notes = parser.notes(args)
    return args


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
from PIL import Image
from torch import nn

from utils import launch
from utils.datasets.identities import chosen_identities, open_identities
from utils.diffusion import adapters
from utils.diffusion.checkpoint import check_diffusion
from utils.diffusion.identity_token import IdentityToken, Tunable
from utils.diffusion.latents import encode, image_for_vae, sample_latents
from utils.diffusion.text_to_image import TextToImage, check_text_encoder, load_tokenizer, what_saves_memory
from utils.diffusion.unet import enable_memory_efficient_attention
from utils.files import portable, versions
from utils.generated import made_set
from utils.generated.measures import Measures, check_measures
from utils.generated.texts import captions
from utils.generated.texts.captioners import Captioner, check_captioner, quantization
from utils.generated.texts.captioning import caption_identities, open_prompts
from utils.training.optimizer import build_optimizer
from utils.worklist import Progress, Worklist, seed_of, share

# DI: the reference set, and fine-tuning with it


def sampling(args):
    """The settings of sampling, as arguments of `TextToImage.sample`."""
    return {
        "solver": args.solver,
        "steps": args.num_inference_steps,
        "guidance": args.guidance_scale,
        "resolution": args.resolution,
        "batch_size": args.sample_batch_size,
    }


def reference_set(args, model, work, prompt):
    """(latents that the untouched model draws from P_R, key). All identities with the same prompt share them."""
    if not args.num_reference_images:
        return None, None
    count, settings = args.num_reference_images, {"seed": args.seed, "precision": args.mixed_precision}
    return made_set.open_references(model, work, prompt, count, sampling=sampling(args), **settings)


def denoising_errors(unet, schedule, latents, noise, timesteps, condition, snr_gamma=None):
    """w_t |unet(x_t, t, c) - target|^2 of each image, averaged over its pixels: (B,).

    The error of the denoised image is that of the noise divided by SNR, so w_t = SNR gives the plain noise loss.
    Min-SNR uses w_t = min(SNR, gamma).
    """
    noised = schedule.add_noise(latents, noise, timesteps)
    prediction = unet(noised.to(condition.dtype), timesteps, encoder_hidden_states=condition).sample
    errors = (prediction.float() - schedule.target(latents, noise, timesteps)).square().flatten(1).mean(1)
    if snr_gamma is None:
        return errors
    signal, noise_level = schedule.parts(errors, timesteps)
    snr = (signal / noise_level).square()
    if schedule.prediction_type == "epsilon":
        # min(SNR, gamma) / SNR, in a form without 0 / 0 at a last step of pure noise.
        return errors * (snr_gamma / snr.clamp(min=snr_gamma))
    return errors * (snr.clamp(max=snr_gamma) / (snr + 1))


def fine_tune(args, tunable, identity, record, source, reference, progress):
    """Tune to one identity. Returns the losses of own and reference images, (steps, 2), or (steps, 1) without these.

    source: mean and std of the VAE's posterior of its images; reference: latents of reference images, or None.
    """
    model = tunable.model
    size, scale, schedule = args.train_batch_size, model.vae.config.scaling_factor, model.schedule
    generator = torch.Generator().manual_seed(seed_of(args.seed, identity.name, "training"))
    optimizer, scheduler = build_tuning(args, tunable)
    scaler = torch.amp.GradScaler(model.device.type, enabled=args.mixed_precision == "fp16")
    texts = [record["identity_prompt"], record["reference_prompt"]][: 1 if reference is None else 2]
    trains_text = args.train_text_encoder or is_new(args.identity_token)
    cached = None if trains_text else model.encode_all(texts)
    model.unet.train()
    losses = []
    for step in range(args.max_train_steps):
        for _ in range(args.gradient_accumulation_steps):
            rows = torch.randint(len(source[0]), (size,), generator=generator)
            posterior, noise = torch.randn(2, size, *source[0].shape[1:], generator=generator).to(model.device)
            latents = sample_latents(source[0][rows], source[1][rows], posterior, scale)
            if reference is not None:
                rows = torch.randint(len(reference), (size,), generator=generator)
                reference_noise = torch.randn(size, *latents.shape[1:], generator=generator).to(model.device)
                latents, noise = torch.cat([latents, reference[rows]]), torch.cat([noise, reference_noise])
            timesteps = torch.randint(schedule.num_steps, (len(latents),), generator=generator).to(model.device)
            # P_E for the half of own images, P_R for the half of reference images.
            condition = (model.encode(texts) if cached is None else cached).repeat_interleave(size, 0)
            with model.autocast():
                errors = denoising_errors(
                    model.denoiser, schedule, latents, noise, timesteps, condition, args.snr_gamma
                )
            halves = errors.view(-1, size).mean(1)
            loss = halves[0] + args.prior_loss_weight * halves[1:].sum()
            scaler.scale(loss / args.gradient_accumulation_steps).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(tunable.weights, args.max_grad_norm or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(halves.detach())
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == args.max_train_steps:
            made_set.check_losses(losses)
            progress.stage(identity.name, f"fine-tuning {step + 1}/{args.max_train_steps}")
    return torch.stack(losses).cpu()


def build_tuning(args, tunable):
    """A new optimizer and learning rate schedule, without the state of the previous identity."""
    row = tunable.token.row
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
    pixels = torch.stack([image_for_vae(image, tuple(args.resolution)) for image in images])
    posteriors = [encode(model.vae, part) for part in pixels.split(args.sample_batch_size)]
    source = [torch.cat(values) for values in zip(*posteriors, strict=True)]
    losses = fine_tune(args, tunable, identity, record, source, reference, progress)
    progress.stage(identity.name, "images")
    with work.scratch() as part:
        drawing = (args, identity, record, prompts, model)
        _, rows, pictures, plain = draw_images(*drawing, range(args.num_images), part / "images")
        own = [row["changed"] is None for row in rows]
        values, features = measures.of(images, pictures, plain, own)
        folders = {part / "images": f"images/{identity.name}"}
        if args.save_adapters:
            adapters.save_adapter(model, part / "adapter", *token_of(tunable, prompts, identity))
            folders[part / "adapter"] = f"adapters/{identity.name}"
        result = {name: record[name] for name in ("domain", "pid", "prompt", "identity_prompt")}
        result |= {"reference": key, "model": model.digest, "steps": args.num_inference_steps}
        result |= {"guidance": args.guidance_scale, "loss": made_set.in_tenths(losses)}
        result |= {"measures": values, "features": features, "images": rows}
        work.commit(identity.name, made_set.IMAGES, result, folders)
    work.forget(identity.name, made_set.FAILED)
    return True


def redraw_identity(args, identity, record, work, progress, prompts, tunable, measures):
    """Add the images that are missing by the identity's adapter. The record comes last and holds all images."""
    model, made = tunable.model, work.read(identity.name, made_set.IMAGES)
    adapters.load_adapter(
        model, work.folder / made_set.ADAPTERS / identity.name, *token_of(tunable, prompts, identity)
    )
    old = [row | {"made_from": made_set.prompt_of(made, row)} for row in made["images"]]
    progress.stage(identity.name, "images")
    numbers = range(len(old), len(old) + made_set.images_to_add(made, record, args.num_images))
    with work.scratch() as part:
        drawing = (args, identity, record, prompts, model)
        files, rows, pictures, plain = draw_images(*drawing, numbers, part / "images")
        settings = {"steps": args.num_inference_steps, "guidance": args.guidance_scale}
        rows = old + [row | settings | {"made_from": record["identity_prompt"]} for row in rows]
        pictures = made_set.open_pictures(work.folder, old) + pictures
        plain = [prompts.without_token(row["prompt"], identity) for row in old] + plain
        own = [row.get("changed") is None for row in rows]
        values, features = measures.of(identity.images(), pictures, plain, own)
        made |= {name: record[name] for name in ("prompt", "identity_prompt")}
        made |= {"measures": values, "features": features, "images": rows}
        work.extend(identity.name, made_set.IMAGES, made, files)
    work.forget(identity.name, made_set.FAILED)
    return True


def draw_images(args, identity, record, prompts, model, numbers, folder):
    """Draw the images with these numbers into a scratch folder.

    Returns {file: path in the set}, the rows of the record, the pictures, and their prompts without the token.
    """
    folder.mkdir()
    texts = prompts.of_images(record, identity, numbers, args.seed, args.clothing_change)
    seeds = [seed_of(args.seed, identity.name, "image", number) for number in numbers]
    latents = model.sample(model.encode_all([text.with_token for text in texts]), seeds, **sampling(args))
    size = tuple(reversed(args.save_resolution))
    drawn = model.pictures(latents, args.sample_batch_size)
    pictures = [picture.resize(size, Image.Resampling.LANCZOS) for picture in drawn]
    style = {"ending": args.image_format, "quality": args.jpeg_quality, "model": model.digest}
    files, rows = made_set.write_images(folder, identity.name, numbers, pictures, texts, seeds, **style)
    return files, rows, pictures, [text.plain for text in texts]


def token_of(tunable, prompts, identity):
    """The name of the identity's token and its row, which only a new token has."""
    return (prompts.token_of(identity), tunable.token.row) if prompts.has_new_tokens else ()


# The run


def main(args):
    """Returns the identities that failed, {name: reason}."""
    accelerator = launch.start_accelerator(args.mixed_precision, patient=True)
    # Without the flag, accelerate's own setting decides.
    args.mixed_precision = accelerator.mixed_precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    launch.introduce(args, accelerator, demo=DEMO, stand_ins=launch.stand_ins_among(args, STAND_INS, PUBLISHED))
    everyone = open_identities(
        args.source, args.data_root, max_images=args.max_sequence_images, skip_unreadable=args.skip_unreadable
    )
    identities = chosen_identities(everyone, args.ids) if args.ids else everyone
    work = Worklist(args.output_dir, [identity.name for identity in identities])
    if not args.merge:
        lists = captions.read_lists(args.attribute_lists) if args.attribute_lists else captions.DIVERSITY
        progress = Progress(work, made_set.IMAGES, "images", args.num_images, main=accelerator.is_main_process)
        rows, tokenizer = check_inputs(args, everyone, identities)
        if args.redraw:
            made_set.check_adapters(work, work.pieces, is_new(args.identity_token))
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
        failures = made_set.finish(
            work, identities, args.validation_ids, captions_only=args.captions_only, unfinished=args.merge
        )
    accelerator.end_training()
    return failures


def check_inputs(args, everyone, identities):
    """Check all inputs before any model is loaded. Returns (the rows of --prompts or None, the tokenizer)."""
    name, rows = args.pretrained_model_name_or_path, None
    info = check_diffusion(name, revision=args.revision)
    check_text_encoder(name, info.condition_width, args.revision)
    if any(side % info.vae_scale for side in args.resolution):
        raise ValueError(f"--resolution must be multiples of {info.vae_scale} for this model: {args.resolution}")
    if args.prompts:
        rows = captions.read_captions(args.prompts)
        captions.check_rows(rows, everyone, identities, args.prompts)
    else:
        check_captioner(args.captioner_model_name_or_path)
        quantization(args.captioner_bits)
    check_measures(clip_name(args), args.reid_model)
    if args.use_8bit_adam:
        build_optimizer([nn.Parameter(torch.zeros(1))], "adamw", learning_rate=1.0, use_8bit=True)
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
        {name: version for name, version in versions().items() if name != "device"},
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
    missing = [
        identity
        for identity in own_share
        if identity.name in records and is_missing(args, work, identity, records[identity.name])
    ]
    if args.captions_only or not missing:
        return
    tunable = open_model(args, accelerator, prompts)
    made_set.check_model(work, tunable.model.digest)
    if args.redraw:
        made_set.check_origin(work, [identity.name for identity in missing], tunable.model.digest)
    measures = Measures.from_pretrained(clip_name(args), args.reid_model, accelerator.device)
    num_weights = sum(weight.numel() for weight in tunable.weights)
    lean = what_saves_memory(num_weights, **{name: getattr(args, name) for name in BOUND_BY_MEMORY})
    make = redraw_identity if args.redraw else make_identity
    for identity in missing:
        inputs = (args, identity, records[identity.name], work, progress, prompts, tunable, measures)
        if made_set.attempt(work, progress, identity.name, lean, make, *inputs):
            progress.finished(identity.name)


def is_missing(args, work, identity, record):
    if args.redraw:
        return made_set.images_to_add(work.read(identity.name, made_set.IMAGES), record, args.num_images) > 0
    return not made_set.is_made(work, record, args.num_images)


def load_captioner(args, device):
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    size = {"bits": args.captioner_bits, "batch_size": args.captioner_batch_size}
    return Captioner.from_pretrained(args.captioner_model_name_or_path, device=device, dtype=dtype, **size)


def open_model(args, accelerator, prompts):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    running = {"dtype": dtype, "device": accelerator.device, "autocast": accelerator.autocast}
    trained = {"mode": args.finetune, "rank": args.rank, "train_text_encoder": args.train_text_encoder}
    model = TextToImage(
        args.pretrained_model_name_or_path,
        prompts.tokenizer,
        **trained,
        **running,
        seed=args.seed,
        revision=args.revision,
    )
    if args.enable_xformers_memory_efficient_attention:
        enable_memory_efficient_attention(model.unet)
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if args.torch_compile:
        # Weights are restored in place, so the model compiled for the first identity serves all.
        model.denoiser = torch.compile(model.unet)
    noun_id = prompts.tokenizer(prompts.noun, add_special_tokens=False).input_ids[0]
    token = IdentityToken(model.text_encoder, prompts.first_id, noun_id).to(accelerator.device)
    return Tunable.of(model, token, with_token=prompts.has_new_tokens)


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
