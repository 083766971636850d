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
"""Diffusion-ReID, generation: from the images of every identity, many new ones, by a diffusion model tuned to it.

    accelerate launch --config_file accelerate_config.yaml train_dreambooth_reid.py
    accelerate launch train_dreambooth_reid.py --recipe lora --source market1501 --data_root ~/reid --output_dir out

The first is a demo on drawn people with the shipped stand-in models. The second takes Stable Diffusion v1.4 and
BLIP-2; `--recipe paper` has the published settings. A killed run goes on with the same command, and any number of
processes, hosts or array jobs (`--num_shards 8 --shard 3`) may work in one folder. For each identity:

    LPE  a captioner is asked about every image of a sequence; the answers, merged by majority, make the prompt
         P_LPE*: "a photo of a person, wearing a red coat, ..."
    IIR  P_E is P_LPE* with a new token before the noun, "a photo of <iir-0002> person, ...", its embedding trained
    DI   the untouched model draws a reference set x' from P_LPE*; with x the identity's own images, the loss is
         L = mean w_t (unet(x_t, P_E) - noise)^2 + lambda mean w_t' (unet(x'_t', P_LPE*) - noise')^2

Then images are drawn from P_E, each with another scene, action, carried item and view.
"""

import argparse
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AddedToken

from utils.datasets.identities import choose, open_identities
from utils.diffusion.checkpoint import check_diffusion, one_line
from utils.diffusion.latents import encode, image_for_vae, sample_latents
from utils.diffusion.text_to_image import SOLVERS, TextToImage, check_text_encoder, load_tokenizer
from utils.diffusion.unet import enable_memory_efficient_attention, save_unet
from utils.files import portable, versions
from utils.flags import CAPTIONER_DIR, CLIP_DIR, DIFFUSION_DIR, check_ranges, describe_origin, parse_with_recipes
from utils.generated import captions
from utils.generated.captioners import Captioner, check_captioner, quantization
from utils.generated.made_report import REFERENCES, SHOWN
from utils.generated.made_set import CAPTIONS, FAILED, IMAGES, command_of, image_path, keep_settings, merge, save_image
from utils.generated.measures import Measures, check_measures
from utils.launch import check_folder, use_all_cores
from utils.training.optimizer import build_optimizer
from utils.worklist import Progress, Worklist, seed_of, share

DEMO_SOURCE = ["synthetic:domain=a,num_ids=4"]
# The paper says size, rate, steps and numbers of images; solver, guidance, precision and the token's rate are ours,
# and 8-bit Adam and recomputation are for a card of 24 GB.
PUBLISHED = {
    "pretrained_model_name_or_path": "CompVis/stable-diffusion-v1-4",
    "captioner_model_name_or_path": "Salesforce/blip2-opt-2.7b",
    "clip_model_name_or_path": "openai/clip-vit-base-patch16",
    "resolution": [512, 512],
    "finetune": "full",
    "learning_rate": 2e-6,
    "token_learning_rate": 5e-4,
    "train_batch_size": 1,
    "max_train_steps": 1000,
    "num_reference_images": 200,
    "num_images": 220,
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "mixed_precision": "fp16",
    "use_8bit_adam": True,
    "gradient_checkpointing": True,
}
LEAN = {"resolution": [512, 256], "finetune": "lora", "learning_rate": 5e-4, "train_batch_size": 2}
LEAN |= {"max_train_steps": 400, "num_reference_images": 64, "num_inference_steps": 20}
LEAN |= {"use_8bit_adam": False, "gradient_checkpointing": False}
CHECK_EVERY = 20
RECIPES = {"paper": PUBLISHED, "lora": PUBLISHED | LEAN}
# What decides the captions, and a record of an identity whose images nobody was asked about.
CAPTIONING = ("captioner_model_name_or_path", "captioner_bits", "max_sequence_images")
NOTHING_SEEN = {"attributes": {}, "caption": "", "images": [], "made_with": None}
# What changes no image but by rounding, or only which images are made.
FREE = (
    "output_dir", "data_root", "num_shards", "shard", "ids", "merge", "captions_only", "prompts", "sample_batch_size",
    "captioner_batch_size", "gradient_checkpointing", "validation_ids", "recipe", "demo", "origin", "skip_unreadable",
)  # fmt: skip


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    yes = {"action": "store_true"}
    size = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="real models; `paper`: the published settings, 512 x 512 and the whole U-Net; `lora`: 512 x 256 and "
        "LoRA; any flag given wins over it",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--source", nargs="+", metavar="SPEC", help=f"labelled sets; default {DEMO_SOURCE[0]}")
    group.add_argument("--data_root", help="folder in which the benchmarks lie")
    group.add_argument("--ids", nargs="+", help="only these identities: numbers, ranges (4-8), or DOMAIN/NUMBER")
    group.add_argument(
        "--max_sequence_images", type=int, default=32, help="images of an identity, all of one camera; default 32"
    )
    group.add_argument("--skip_unreadable", **yes, help="leave out images that do not decode; default: stop")

    group = parser.add_argument_group("captions (LPE)")
    group.add_argument(
        "--captioner_model_name_or_path",
        default=CAPTIONER_DIR,
        help="image-to-text model, folder or Hub id: BLIP-2, BLIP, GIT, ...; default: the stand-in question answerer",
    )
    group.add_argument("--captioner_bits", type=int, choices=[4, 8], help="load the captioner in so few bits")
    group.add_argument("--captioner_batch_size", type=int, default=16, help="images asked about at once; default 16")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="an edited captions.parquet, or csv or jsonl with pid, domain, prompt or attributes: replaces captions; "
        "another prompt than the attributes make wins over them",
    )
    group.add_argument("--captions_only", **yes, help="stop when all captions are written")
    group.add_argument(
        "--class_prompt",
        default=captions.CLASS_PROMPT,
        help=f"P; its last word is the noun, which other prompts must have too; default {captions.CLASS_PROMPT}",
    )

    group = parser.add_argument_group("identity (IIR) and diversity (DI)")
    group.add_argument(
        "--identity_token",
        default="<iir-{pid}>",
        help="in <brackets>: a new token, trained; else words of the vocabulary such as sks, used as they are; "
        "{pid} stands for the number; default <iir-{pid}>",
    )
    group.add_argument("--token_learning_rate", type=float, default=5e-3, help="of the new token; default 5e-3")
    group.add_argument(
        "--num_reference_images", type=int, default=16, help="of each prompt; 0 trains without; default 16"
    )
    group.add_argument("--prior_loss_weight", type=float, default=1.0, help="lambda; default 1")
    group.add_argument(
        "--snr_gamma",
        type=float,
        help="w_t by min-SNR with this gamma, 5 is usual; default: w_t is 1, plain noise loss",
    )
    group.add_argument(
        "--attribute_lists",
        metavar="FILE",
        help='JSON lists that generated images draw from, {"scene": [...], "action": [...], "carried": [...], ...}',
    )

    group = parser.add_argument_group("fine-tuning, of each identity")
    group.add_argument(
        "--pretrained_model_name_or_path",
        default=DIFFUSION_DIR,
        help="Stable Diffusion 1.x or 2.x, folder or Hub id; default: the shipped stand-in",
    )
    group.add_argument("--revision", help="of the diffusion model on the Hub")
    group.add_argument(
        "--finetune", choices=["full", "lora"], default="lora", help="the whole U-Net or LoRA; default lora"
    )
    group.add_argument("--rank", type=int, default=8, help="of LoRA; default 8")
    group.add_argument("--train_text_encoder", **yes, help="the text encoder learns with the U-Net, in the same way")
    group.add_argument("--resolution", **size, default=[128, 64], help="in pixels, multiples of 8; default 128 64")
    group.add_argument("--max_train_steps", type=int, default=150, help="default 150")
    group.add_argument(
        "--train_batch_size", type=int, default=4, help="own images a step, as many reference; default 4"
    )
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches a step; default 1")
    group.add_argument("--learning_rate", type=float, default=1e-2, help="default 1e-2, for the stand-in's LoRA")
    group.add_argument("--lr_scheduler", choices=SCHEDULES[1:], default="constant", help="default constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="default 0")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="of AdamW; default 1e-2")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="clip gradients to this norm; default 1")
    group.add_argument("--use_8bit_adam", **yes, help="bitsandbytes' 8-bit AdamW")
    group.add_argument("--gradient_checkpointing", **yes, help="recompute activations: less memory, more time")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default accelerate's setting")
    group.add_argument("--allow_tf32", **yes, help="TF32 matrix products on Ampere and newer")
    group.add_argument("--enable_xformers_memory_efficient_attention", **yes, help="default: torch's own")
    group.add_argument("--torch_compile", **yes, help="compile the U-Net, once for all identities")
    group.add_argument("--seed", type=int, default=0, help="of everything drawn; default 0")

    group = parser.add_argument_group("generated images")
    group.add_argument("--num_images", type=int, default=8, help="of an identity; default 8")
    group.add_argument("--solver", choices=SOLVERS, default="dpmsolver++", help="default dpmsolver++")
    group.add_argument("--num_inference_steps", type=int, default=12, help="of the solver; default 12")
    group.add_argument("--guidance_scale", type=float, default=3.0, help="1 is none; default 3")
    group.add_argument("--sample_batch_size", type=int, default=8, help="images made at once; default 8")
    group.add_argument("--save_resolution", **size, default=[256, 128], help="of the files; default 256 128")
    group.add_argument("--image_format", choices=["jpg", "png"], default="jpg", help="of the files; default jpg")
    group.add_argument("--jpeg_quality", type=int, default=95, help="1 to 100; default 95")

    group = parser.add_argument_group("measures and output")
    group.add_argument(
        "--clip_model_name_or_path",
        default=CLIP_DIR,
        help="measures similarity; `none` for no measures; default: the stand-in CLIP",
    )
    group.add_argument("--reid_model", help="a ReIDModel folder or Hub id: measures the identity of the images")
    group.add_argument("--validation_ids", type=int, default=4, help="identities on the page; default 4")
    group.add_argument("--save_adapters", **yes, help="keep each identity's LoRA and token under adapters/")
    group.add_argument("--output_dir", default="output/generated", help="default output/generated")
    group.add_argument("--num_shards", type=int, default=1, help="jobs that share the identities; default 1")
    group.add_argument("--shard", type=int, default=0, help="which of them this is, from 0; default 0")
    group.add_argument("--merge", **yes, help="only write the tables and the page of what lies in --output_dir")
    return parser


def parse_args(input_args=None):
    parser = build_parser()
    args, args.origin = parse_with_recipes(parser, RECIPES, input_args)
    args.demo = args.source is None
    args.source = args.source or DEMO_SOURCE
    check_args(parser, args)
    return args


def check_args(parser, args):
    """All that can be told from the arguments alone."""
    ones = ("max_sequence_images", "captioner_batch_size", "rank", "max_train_steps", "train_batch_size", "num_images")
    ones += ("gradient_accumulation_steps", "num_inference_steps", "sample_batch_size", "num_shards")
    zeros = ("num_reference_images", "prior_loss_weight", "lr_warmup_steps", "adam_weight_decay", "shard", "seed")
    check_ranges(
        parser,
        args,
        one_or_more=(*ones, "guidance_scale"),
        positive=("learning_rate", "token_learning_rate", "max_grad_norm", "snr_gamma"),
        not_negative=(*zeros, "validation_ids"),
    )
    if any(side < 8 or side % 8 for side in args.resolution):
        parser.error(f"--resolution must be two multiples of 8, got {args.resolution[0]} {args.resolution[1]}")
    if min(args.save_resolution) < 8:
        parser.error(f"--save_resolution must be at least 8 8, got {' '.join(map(str, args.save_resolution))}")
    if args.shard >= args.num_shards:
        parser.error(f"--shard counts from 0, so it must be below --num_shards {args.num_shards}, got {args.shard}")
    if not 1 <= args.jpeg_quality <= 100:
        parser.error(f"--jpeg_quality must be 1 to 100, got {args.jpeg_quality}")
    words = args.class_prompt.split()
    args.class_prompt = " ".join(words)
    if not words or not re.fullmatch(r"\w(.*\w)?", words[-1]):
        parser.error(f"--class_prompt must end in its noun, a word without a full stop, got {args.class_prompt!r}")
    if not args.identity_token.strip():
        parser.error("--identity_token must not be empty")
    if args.save_adapters and args.finetune != "lora":
        parser.error("--save_adapters keeps LoRA, so it needs --finetune lora: a whole U-Net an identity is too much")
    if args.save_adapters and args.train_text_encoder:
        parser.error("--save_adapters keeps LoRA of the U-Net only; leave out --train_text_encoder")
    if args.merge and args.captions_only:
        parser.error("--merge makes nothing new, so leave out --captions_only")


# LPE: words for every identity


def caption_identity(captioner, identity, made_with):
    """Answers about every image of the sequence, and what the majority of them says."""
    images = identity.images()
    free = captioner.describe(images) if captioner.can_describe else [""] * len(images)
    answers = {key: [""] * len(images) for key in captions.QUESTIONS}
    if captioner.can_answer:
        answers = {key: captioner.ask(images, question) for key, question in captions.QUESTIONS.items()}
    said = [
        {"path": path, "caption": caption, "answers": {key: values[row] for key, values in answers.items()}}
        for row, (path, caption) in enumerate(zip(identity.paths, free, strict=True))
    ]
    return {
        "domain": identity.domain,
        "pid": identity.pid,
        "camid": identity.camid,
        **captions.merged(captions.answers_of(said)),
        "images": said,
        "made_with": made_with,
    }


def add_prompts(record, run, identity):
    """P_LPE* and P_E, short enough for the text encoder."""
    args, token = run.args, token_of(run.args, identity)
    text = record.get("text", "")
    if token in text:
        raise ValueError(f"the prompt of {identity.name} has the identity token {token!r} in it; leave it out")
    prompt = run.fit(text or captions.composed(record, args.class_prompt), identity)
    try:
        identity_prompt = captions.with_token(prompt, token, run.noun)
    except ValueError as error:
        raise ValueError(f"{identity.name}: {error}; say {run.noun}, or give another --class_prompt") from None
    return record | {"text": text, "prompt": prompt, "identity_prompt": identity_prompt}


def caption_stage(run, mine):
    """The captions of all identities that have some, {name: record}; made for `mine` where there are none yet.

    Edits of captions.parquet hold for all at once, so that no merge can undo them.
    """
    args, work = run.args, run.work
    kept = work.folder / "captions.parquet"
    edits = run.prompts or (captions.read_captions(kept) if kept.is_file() else {})
    made_with = {name: portable(getattr(args, name)) for name in CAPTIONING}
    names, records, captioner = {one.name for one in mine}, {}, None
    for identity in run.identities:
        record = before = work.read(identity.name, CAPTIONS)
        if record is None or record["made_with"] not in (None, made_with):
            if identity.name not in names:
                continue
            if args.prompts:
                record = NOTHING_SEEN | {"domain": identity.domain, "pid": identity.pid, "camid": identity.camid}
            else:
                run.progress.stage(identity.name, "captions")
                captioner = captioner or load_captioner(run)
                record = attempt(run, identity, caption_identity, captioner, identity, made_with)
                if record is None:
                    continue
                work.forget(identity.name, FAILED)
        if row := captions.row_of(edits, identity):
            how = (run.fit, identity, args.class_prompt)
            if args.prompts:
                record = captions.stated(record, row, *how)
            else:
                record = captions.edited(record, before or {}, row, *how)
        records[identity.name] = add_prompts(record, run, identity)
        if records[identity.name] != before:
            work.commit(identity.name, CAPTIONS, records[identity.name])
    return records


def load_captioner(run):
    args, device = run.args, run.accelerator.device
    return Captioner.from_pretrained(
        args.captioner_model_name_or_path,
        device=device,
        dtype=torch.float16 if device.type == "cuda" else torch.float32,
        bits=args.captioner_bits,
        batch_size=args.captioner_batch_size,
    )


# IIR: a token of an identity


class IdentityToken(nn.Module):
    """The embedding of tokens that the vocabulary does not have, kept apart, so that no other row can move."""

    def __init__(self, text_encoder, first_id, noun_id):
        super().__init__()
        embedding = text_encoder.get_input_embeddings()
        self.first_id, self.noun_id, self.places = first_id, noun_id, None
        self.row = nn.Parameter(embedding.weight[noun_id].detach().float().clone())
        embedding.register_forward_pre_hook(self.find)
        embedding.register_forward_hook(self.put)

    def find(self, module, inputs):
        self.places = inputs[0] >= self.first_id
        return (inputs[0].masked_fill(self.places, self.noun_id),)

    def put(self, module, inputs, output):
        return torch.where(self.places[..., None], self.row.to(output.dtype), output)


def is_new(args):
    """Whether the token is one that the vocabulary does not have."""
    return args.identity_token.startswith("<") and args.identity_token.endswith(">")


def token_of(args, identity):
    return args.identity_token.replace("{pid}", f"{identity.pid:04d}")


def add_tokens(tokenizer, args, identities):
    """New tokens of all identities get their numbers; given words stay what they are."""
    tokens = dict.fromkeys(token_of(args, one) for one in identities)
    if is_new(args):
        if known := [token for token in tokens if token in tokenizer.get_vocab()]:
            raise ValueError(
                f"--identity_token asks for the new token {known[0]!r}, which is a word of the vocabulary already; "
                "choose another, or words without brackets to be used as they are"
            )
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])


# DI: the reference set, and fine-tuning with it


def reference_set(run, prompt):
    """Latents that the untouched model draws from P_LPE*, and their key; kept for all who share the prompt."""
    args, model, work = run.args, run.model, run.work
    if not args.num_reference_images:
        return None, None
    settings = [args.num_reference_images, args.resolution, args.solver, args.num_inference_steps, args.guidance_scale]
    words = [prompt, model.digest, str(model.dtype), run.accelerator.mixed_precision, args.seed, *settings]
    key = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]
    path = work.folder / REFERENCES / f"{key}.safetensors"
    if not is_reference(path, args.num_reference_images):
        seeds = [seed_of(args.seed, "reference", prompt, number) for number in range(args.num_reference_images)]
        condition = model.encode_all([prompt]).expand(len(seeds), -1, -1)
        latents = model.sample(condition, seeds, **run.sampling)
        preview = model.decode(latents[: SHOWN["reference"]], args.sample_batch_size)
        with work.scratch() as aside:
            save_file({"latents": latents.half().cpu(), "preview": preview}, aside / path.name)
            work.move(aside / path.name, path)
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents").float().to(model.device), key


def is_reference(path, count):
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("latents").get_shape()[0] == count
    except (OSError, SafetensorError):
        return False


def denoising_errors(unet, schedule, latents, noise, timesteps, condition, snr_gamma=None):
    """w_t |unet(x_t, t, c) - target|^2 of each image, the mean over its pixels: (B,).

    As errors of the denoised image, |x^ - x|^2 is that of the noise divided by SNR, so w_t = SNR is the plain loss on
    noise. Min-SNR takes w_t = min(SNR, gamma).
    """
    noised = schedule.add_noise(latents, noise, timesteps)
    prediction = unet(noised.to(condition.dtype), timesteps, encoder_hidden_states=condition).sample
    errors = (prediction.float() - schedule.target(latents, noise, timesteps)).square().flatten(1).mean(1)
    if snr_gamma is None:
        return errors
    signal, strength = schedule.parts(errors, timesteps)
    snr = (signal / strength).square()
    weight = snr.clamp(max=snr_gamma) / snr
    return errors * (weight if schedule.prediction_type == "epsilon" else weight * snr / (snr + 1))


def fine_tune(run, identity, record, source, reference):
    """Tune to one identity. Returns the losses of own and of reference images, (steps, 2), or (steps, 1) without.

    source: mean and std of the VAE's posterior of its images; reference: latents, or None.
    """
    args, model = run.args, run.model
    size, scale, schedule = args.train_batch_size, model.vae.config.scaling_factor, model.schedule
    generator = torch.Generator().manual_seed(seed_of(args.seed, identity.name, "training"))
    optimizer, rates = build_tuning(run)
    scaler = torch.amp.GradScaler(model.device.type, enabled=run.accelerator.mixed_precision == "fp16")
    texts = [record["identity_prompt"], record["prompt"]][: 1 if reference is None else 2]
    fixed = None if is_new(args) or args.train_text_encoder else model.encode_all(texts)
    model.unet.train()
    losses = []
    for step in range(args.max_train_steps):
        for _ in range(args.gradient_accumulation_steps):
            rows = torch.randint(len(source[0]), (size,), generator=generator)
            posterior, noise = torch.randn(2, size, *source[0].shape[1:], generator=generator).to(model.device)
            latents = sample_latents(source[0][rows], source[1][rows], posterior, scale)
            if reference is not None:
                rows = torch.randint(len(reference), (size,), generator=generator)
                more = torch.randn(size, *latents.shape[1:], generator=generator).to(model.device)
                latents, noise = torch.cat([latents, reference[rows]]), torch.cat([noise, more])
            timesteps = torch.randint(schedule.num_steps, (len(latents),), generator=generator).to(model.device)
            # P_E for the own half, P_LPE* for the reference half.
            condition = (model.encode(texts) if fixed is None else fixed).repeat_interleave(size, 0)
            with run.accelerator.autocast():
                errors = denoising_errors(
                    model.denoiser, schedule, latents, noise, timesteps, condition, args.snr_gamma
                )
            halves = errors.view(-1, size).mean(1)
            loss = halves[0] + args.prior_loss_weight * halves[1:].sum()
            scaler.scale(loss / args.gradient_accumulation_steps).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(run.weights, args.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        rates.step()
        optimizer.zero_grad()
        losses.append(halves.detach())
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == args.max_train_steps:
            check_finite(losses)
            run.progress.stage(identity.name, f"fine-tuning {step + 1}/{args.max_train_steps}")
    return torch.stack(losses).cpu()


def build_tuning(run):
    """A fresh optimiser and schedule: nothing of the identity before is left in them."""
    args = run.args
    groups = [{"params": [weight for weight in run.weights if weight is not run.token.row], "lr": args.learning_rate}]
    if is_new(args):
        groups.append({"params": [run.token.row], "lr": args.token_learning_rate, "weight_decay": 0.0})
    optimizer = build_optimizer(
        groups,
        "adamw",
        learning_rate=args.learning_rate,
        weight_decay=args.adam_weight_decay,
        use_8bit=args.use_8bit_adam,
    )
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, **steps)


def check_finite(losses):
    bad = (~torch.stack(losses).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the loss is not finite at step {bad[0] + 1}; lower --learning_rate, or use --mixed_precision bf16 or no"
        )


def in_tenths(losses):
    """(steps, halves) -> the course of each half, as means of ten stretches."""
    means = torch.stack([part.mean(0) for part in losses.tensor_split(min(10, len(losses)))])
    return {
        name: [round(value, 5) for value in means[:, place].tolist()]
        for place, name in enumerate(("instance", "prior")[: losses.shape[1]])
    }


# One identity


def restore(run):
    """All weights that train as they were loaded, in place."""
    with torch.no_grad():
        torch._foreach_copy_(run.weights, run.start)


def prompts_of(run, identity, record):
    """For each image: the words drawn, P_E with them, and the same without the token."""
    args, found = run.args, []
    # A prompt that was written by hand says all there is to say.
    known = {} if record["text"] else record["attributes"]
    caption = "" if record["text"] or known else record["caption"]
    for index in range(args.num_images):
        drawn = captions.draw_attributes(known, run.lists, args.seed, identity.name, index)
        prompt = run.fit(captions.compose(drawn, record["text"] or args.class_prompt, caption), identity)
        words = [drawn[key] for key in sorted(run.lists) if drawn[key] not in captions.ABSENT]
        found.append((words, captions.with_token(prompt, token_of(args, identity), run.noun), prompt))
    return found


def make_identity(run, identity, record):
    """Reference set, fine-tuning, images, measures, and one commit of it all."""
    args, model, work, stage = run.args, run.model, run.work, run.progress.stage
    restore(run)
    stage(identity.name, "reference set")
    reference, key = reference_set(run, record["prompt"])
    images = identity.images()
    pixels = torch.stack([image_for_vae(image, tuple(args.resolution)) for image in images])
    parts = [encode(model.vae, part) for part in pixels.split(args.sample_batch_size)]
    source = [torch.cat(values) for values in zip(*parts, strict=True)]
    losses = fine_tune(run, identity, record, source, reference)

    stage(identity.name, "images")
    prompts = prompts_of(run, identity, record)
    seeds = [seed_of(args.seed, identity.name, "image", index) for index in range(args.num_images)]
    latents = model.sample(model.encode_all([one[1] for one in prompts]), seeds, **run.sampling)
    size = tuple(reversed(args.save_resolution))
    pictures = [one.resize(size, Image.Resampling.LANCZOS) for one in model.pictures(latents, args.sample_batch_size)]
    measures, features = run.measures.of(images, pictures, [plain for *_, plain in prompts])
    with work.scratch() as aside:
        (aside / "images").mkdir()
        rows = []
        for index, (picture, (words, prompt, _), seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
            path = image_path(identity.name, index, args.image_format)
            made = {"prompt": prompt, "seed": seed, "model": model.digest}
            save_image(picture, aside / "images" / Path(path).name, quality=args.jpeg_quality, **made)
            rows.append({"path": path, "prompt": prompt, "seed": seed, "drawn": words})
        folders = {aside / "images": f"images/{identity.name}"}
        if args.save_adapters:
            save_adapter(run, identity, aside / "adapter")
            folders[aside / "adapter"] = f"adapters/{identity.name}"
        made = {name: record[name] for name in ("domain", "pid", "prompt", "identity_prompt")}
        made |= {"reference": key, "model": model.digest, "steps": args.num_inference_steps}
        made |= {"guidance": args.guidance_scale, "loss": in_tenths(losses)}
        work.commit(
            identity.name, IMAGES, made | {"measures": measures, "features": features, "images": rows}, folders
        )
    work.forget(identity.name, FAILED)
    return True


def save_adapter(run, identity, folder):
    """LoRA for `load_lora_weights`, the token for `load_textual_inversion`."""
    save_unet(run.model.unet, "lora", folder)
    if is_new(run.args):
        row = run.token.row.detach().cpu().clone()
        save_file({token_of(run.args, identity): row}, folder / "learned_embeds.safetensors")


def is_done(work, record):
    """Whether there are images of the prompts that now hold, and nobody took one away."""
    made = work.read(f"{record['domain']}/{record['pid']:04d}", IMAGES)
    if made is None or any(made[name] != record[name] for name in ("prompt", "identity_prompt")):
        return False
    paths = {work.folder / image["path"] for image in made["images"]}
    return paths <= {path for folder in {path.parent for path in paths} for path in folder.glob("*")}


def advice(run, error):
    """What to do about a full memory, in numbers of this model."""
    args, words = run.args, [f"out of memory ({one_line(error)[:120]}); what saves how much:"]
    if run.model is None:
        return " ".join(
            [*words, "--captioner_bits 8 half of the captioner's weights, --captioner_batch_size 1 the rest"]
        )
    count = sum(weight.numel() for weight in run.weights)
    if args.finetune == "full":
        words.append(
            f"--finetune lora {16 * count / 2**30:.1f} GiB of gradients, optimiser, copy and half the weights;"
        )
        if not args.use_8bit_adam:
            words.append(f"--use_8bit_adam {6 * count / 2**30:.1f} GiB;")
    if not args.gradient_checkpointing:
        words.append("--gradient_checkpointing most activations of a step;")
    if args.train_batch_size > 1:
        words.append(f"--train_batch_size 1 {1 - 1 / args.train_batch_size:.0%} of them;")
    height, width = args.resolution
    if 2 * width > height:
        words.append(f"--resolution {height} {height // 2} {1 - height / 2 / width:.0%} of them;")
    words.append(f"--sample_batch_size, now {args.sample_batch_size}, where it happens while images are drawn")
    return " ".join(words)


# The run


@dataclass
class Run:
    """What the functions above share."""

    args: argparse.Namespace
    accelerator: Accelerator
    work: Worklist
    everyone: list
    identities: list
    tokenizer: object
    lists: dict
    prompts: dict = None
    first_id: int = 0
    progress: Progress = None
    model: TextToImage = None
    token: IdentityToken = None
    weights: list = None
    start: list = None
    measures: Measures = None

    @property
    def noun(self):
        return self.args.class_prompt.split()[-1]

    @property
    def sampling(self):
        names = {"solver": "solver", "steps": "num_inference_steps", "guidance": "guidance_scale"}
        names |= {"resolution": "resolution", "batch_size": "sample_batch_size"}
        return {name: getattr(self.args, flag) for name, flag in names.items()}

    def fit(self, prompt, identity):
        """The prompt, short enough for the text encoder with the token in it."""
        room = len(self.tokenizer(token_of(self.args, identity), add_special_tokens=False).input_ids)
        fitted = captions.fit(prompt, self.tokenizer, room)
        if fitted != prompt:
            self.progress.once(
                "cut",
                f"Prompts longer than the text encoder's {self.tokenizer.model_max_length} tokens are cut at a word, "
                f"that of {identity.name} for one",
            )
        return fitted


def main(args):
    # The wait for the slowest process at the end may take days.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=365))
    accelerator = Accelerator(
        # Without it, accelerate takes several processes of torchrun on a machine without a GPU for single ones.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        kwargs_handlers=[patience],
    )
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
    # Where no flag is given, accelerate's own setting decides.
    args.mixed_precision = accelerator.mixed_precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    greet(args, accelerator.print)
    run = open_run(args, accelerator)
    arguments = {name: portable(value) for name, value in vars(args).items() if name not in FREE}
    arguments["attribute_lists"] = run.lists
    if not args.merge:
        if accelerator.is_main_process:
            keep_settings(
                run.work,
                arguments,
                command_of(args, FREE),
                {name: one for name, one in versions().items() if name != "device"},
            )
        accelerator.wait_for_everyone()
        work_on(run)
    accelerator.wait_for_everyone()
    failures = finish(run) if accelerator.is_main_process else {}
    accelerator.end_training()
    return failures


def greet(args, say):
    if args.demo:
        say(
            "Demo: 4 drawn people, the shipped stand-in models, small pictures, about three minutes on two cores. For "
            "your own: --source SPEC --data_root DIR, and --recipe lora or paper for real models"
        )
    else:
        stand_ins = {
            "pretrained_model_name_or_path": DIFFUSION_DIR,
            "captioner_model_name_or_path": CAPTIONER_DIR,
            "clip_model_name_or_path": CLIP_DIR,
        }
        kept = [f"--{name}" for name, folder in stand_ins.items() if getattr(args, name) == folder]
        if kept:
            say(f"Stand-in models, good for tests only, are used for {', '.join(kept)}; --recipe lora has real ones")
    for line in describe_origin(args, args.origin):
        say(line)


def open_run(args, accelerator):
    """Data, configurations and words: all that can be wrong shows here, before a model is loaded."""
    everyone = open_identities(
        args.source, args.data_root, max_images=args.max_sequence_images, skip_unreadable=args.skip_unreadable
    )
    identities = choose(everyone, args.ids) if args.ids else everyone
    work = Worklist(args.output_dir, [one.name for one in identities])
    lists = captions.read_lists(args.attribute_lists) if args.attribute_lists else captions.DIVERSITY
    progress = Progress(work, IMAGES, "images", args.num_images, main=accelerator.is_main_process)
    run = Run(args, accelerator, work, everyone, identities, None, lists, progress=progress)
    if not args.merge:
        info = check_diffusion(args.pretrained_model_name_or_path, revision=args.revision)
        check_text_encoder(args.pretrained_model_name_or_path, info.condition_width, args.revision)
        if any(side % info.vae_scale for side in args.resolution):
            raise ValueError(f"--resolution must be multiples of {info.vae_scale} for this model: {args.resolution}")
        if args.prompts:
            run.prompts = captions.read_captions(args.prompts)
            captions.check_rows(run.prompts, everyone, identities, args.prompts)
        else:
            check_captioner(args.captioner_model_name_or_path)
            quantization(args.captioner_bits)
        check_measures(clip_name(args), args.reid_model)
        if args.use_8bit_adam:
            build_optimizer([nn.Parameter(torch.zeros(1))], "adamw", learning_rate=1.0, use_8bit=True)
        run.tokenizer = load_tokenizer(args.pretrained_model_name_or_path, args.revision)
        run.first_id = len(run.tokenizer)
        add_tokens(run.tokenizer, args, identities)
        longest = max(identities, key=lambda one: one.pid)
        if run.fit(args.class_prompt, longest) != args.class_prompt:
            raise ValueError("--class_prompt and --identity_token leave no room in a prompt; give shorter ones")
    return run


def work_on(run):
    """This process's share: captions first, then one identity after the other."""
    args, accelerator = run.args, run.accelerator
    shards = {"num_shards": args.num_shards, "shard": args.shard}
    processes = {"num_processes": accelerator.num_processes, "process": accelerator.process_index}
    mine = share(run.identities, **shards, **processes)
    records = caption_stage(run, mine)
    todo = [one for one in mine if one.name in records and not is_done(run.work, records[one.name])]
    if args.captions_only or not todo:
        return
    open_model(run)
    for identity in todo:
        if attempt(run, identity, make_identity, run, identity, records[identity.name]):
            run.progress.finished(identity.name)


def attempt(run, identity, function, *arguments):
    """What the function returns, or None: whatever goes wrong with one person, thousands of others wait."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError as error:
        reason = advice(run, error)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
    run.work.commit(identity.name, FAILED, {"error": reason})
    run.progress.finished(identity.name, reason)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def open_model(run):
    args, accelerator = run.args, run.accelerator
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    run.model = TextToImage(
        args.pretrained_model_name_or_path,
        run.tokenizer,
        mode=args.finetune,
        rank=args.rank,
        seed=args.seed,
        train_text_encoder=args.train_text_encoder,
        dtype=dtype,
        device=accelerator.device,
        autocast=accelerator.autocast,
        revision=args.revision,
    )
    if args.enable_xformers_memory_efficient_attention:
        enable_memory_efficient_attention(run.model.unet)
    if args.gradient_checkpointing:
        run.model.unet.enable_gradient_checkpointing()
    if args.torch_compile:
        # Weights are put back in place, so what is compiled for the first identity serves all.
        run.model.denoiser = torch.compile(run.model.unet)
    noun_id = run.tokenizer(run.noun, add_special_tokens=False).input_ids[0]
    run.token = IdentityToken(run.model.text_encoder, run.first_id, noun_id).to(accelerator.device)
    run.weights = run.model.trained_weights() + ([run.token.row] if is_new(args) else [])
    # In the host's memory: a whole U-Net's is 3.2 GiB, and it is needed once an identity.
    run.start = [weight.detach().to("cpu", copy=True) for weight in run.weights]
    run.measures = Measures.from_pretrained(clip_name(args), args.reid_model, accelerator.device)
    made = next(filter(None, (run.work.read(name, IMAGES) for name in run.work.recorded(IMAGES))), None)
    if made and made["model"] != run.model.digest:
        raise ValueError(
            f"the images in {run.work.folder} were made by the model {made['model']}, this one is "
            f"{run.model.digest}; give the same model, or another --output_dir"
        )


def clip_name(args):
    return None if args.clip_model_name_or_path == "none" else args.clip_model_name_or_path


def finish(run):
    """Whoever finds everything done writes tables and page. Returns the failures."""
    args, work = run.args, run.work
    kind = CAPTIONS if args.captions_only else IMAGES
    missing = [one for one in work.pieces if not (work.has(one, kind) or work.has(one, FAILED))]
    if args.merge or not missing:
        count, images, failures = merge(work, run.identities, args.validation_ids)
        if not missing:
            work.tidy()
        done = f"{images} images of {count} identities: {work.folder}"
        if args.captions_only:
            done = f"Captions of {len(work.pieces)} identities: {work.folder / 'captions.parquet'}"
        print(f"{done}; open {work.folder / 'report.html'}")
        return failures
    print(f"{len(missing)} of {len(work.pieces)} identities are still with other shards; the last one merges")
    return {}


def start(args):
    """main, with what a user can do something about said in one line."""
    try:
        check_folder(args.output_dir, "train_dreambooth_reid.py")
        failures = main(args)
    except ValueError as error:
        message = str(error)
    except OSError as error:
        message = f"{error}; the same command goes on with what is not done"
    else:
        if not failures:
            return
        message = f"{len(failures)} identities failed, {next(iter(failures))} for one; the same command tries again"
    sys.exit(f"train_dreambooth_reid.py: {' '.join(message.split())}")


if __name__ == "__main__":
    start(parse_args())
