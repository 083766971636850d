"""Seconds an identity takes to fine-tune and draw, in several ways: each part measured, then added up.

    python -m benchmarks.speed.generation                     # the stand-in, on this machine
    python -m benchmarks.speed.generation --sd15 --json FILE  # the sizes of Stable Diffusion 1.5, on a GPU
    python -m benchmarks.speed.generation --sdxl --json FILE  # those of Stable Diffusion XL

The functions of train_dreambooth_reid.py are measured, with the recipes' batches and settings of drawing: seconds of a
fine-tuning step, of a reference image, of an image; and the peak of the device's memory in both, beside the counted
one where that was counted. An identity is as many of each as its recipe says. The paper's way loads the model for each
identity, encodes images and prompts in every step, and draws an image in 50 steps; its step is otherwise `paper`'s.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import train_dreambooth_reid as script
from benchmarks.common import GIB, command_line, read_result, write_result
from benchmarks.memory.family_memory import LARGE_CLIP, MODELS
from benchmarks.memory.generation_cost import IDENTITIES as WAYS
from benchmarks.models import SCHEDULE, TEXT, UNET, VAE
from utils.diffusion.latents import encode
from utils.diffusion.unet import load_unet, save_unet
from utils.flags import DIFFUSION_DIR
from utils.launch import start_accelerator
from utils.reporting.report import text_table
from utils.worklist import Progress, Worklist

# Column: part; seconds if nothing else is said.
COLUMNS = {
    "load": "load", "step": "step", "reference image": "reference", "image": "image", "encode": "encode",
    "restore": "restore", "peak GiB": "peak_gib", "counted GiB": "counted_gib", "an identity": "identity",
    "of lora's own sets": "of_own_sets",
}  # fmt: skip
OWN_SETS, PAPERS = "lora, a reference set for each identity", "the paper's way"
# Pixels of `paper` and of `lora`.
SIZES = {"sd15": ((512, 512), (512, 256)), "sdxl": ((1024, 1024), (1024, 512)), "stand-in": ((128, 128), (128, 64))}
# What was counted of a recipe: the row and pixels of generation_memory.json.
COUNTED = {"paper": ("full, 8-bit Adam", "512 x 512"), "lora": ("lora", "512 x 256")}
PAPERS_STEPS = 50


def save_sd15(folder):
    """Random weights of Stable Diffusion 1.5's sizes in half precision, with the stand-in's tokenizer."""
    StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=script.load_tokenizer(DIFFUSION_DIR),
        unet=UNet2DConditionModel(**UNET),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(folder)


def save_sdxl(folder):
    tokenizer = script.load_tokenizer(DIFFUSION_DIR)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**LARGE_CLIP)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(sample_size=128, **MODELS["SDXL base"][1]),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    ).to(dtype=torch.float16).save_pretrained(folder)


def save_few_step_lora(model, folder):
    """A LoRA of the U-Net, as a file for --fast_lora; what it has learned makes no difference to the time."""
    save_unet(load_unet(model, "lora"), "lora", folder)
    return str(next(Path(folder).rglob("*.safetensors")))


def flags_of(way, fast_lora):
    """Flags of train_dreambooth_reid.py beside the recipe's and its size."""
    recipe, _, _, guided = WAYS[way]
    flags = ["--sample_batch_size", 10]
    for flag in ("finetune", "train_batch_size", "num_inference_steps", "guidance_scale"):
        flags += [f"--{flag}", script.RECIPES[recipe][flag]]
    if 0 < guided < 1:
        flags += ["--guidance_share", guided]
    # Its own steps and guidance are not to be given.
    return ["--fast_lora", fast_lora, *flags[:6]] if not guided else flags


def open_tuning(model, resolution, folder, flags, recipe):
    """What fine-tuning one identity takes, by the functions of the script, and the seconds that loading took."""
    words = ["--pretrained_model_name_or_path", model, "--output_dir", folder]
    words += ["--resolution", *resolution, "--source", "synthetic:domain=a,num_ids=1"]
    args = script.parse_args([str(word) for word in (*words, "--clip_model_name_or_path", "none", *flags)])
    if args.fast_lora:
        # Without the recipe's models, its settings are flags here.
        args.reference_drawing |= {name: recipe[name] for name in args.reference_drawing if name in recipe}
    accelerator = start_accelerator(args.mixed_precision)
    args.mixed_precision = accelerator.mixed_precision
    identities = script.open_identities(args.source)
    _, tokenizer = script.check_inputs(args, identities, identities, accelerator.print)
    progress = Progress(
        Worklist(folder, [identity.name for identity in identities]), "images", "images", 1, main=False
    )
    prompts = script.open_prompts(
        tokenizer,
        identities,
        class_prompt=args.class_prompt,
        identity_token=args.identity_token,
        lists=script.captions.DIVERSITY,
        progress=progress,
    )
    began = time.perf_counter()
    tunable = script.open_model(args, accelerator, prompts)
    synchronize()
    words = {"identity_prompt": prompts.alone(identities[0]), "reference_prompt": args.class_prompt}
    return args, tunable, identities[0], words, progress, time.perf_counter() - began


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call, rounds=3):
    """Median seconds of a few calls, after one to warm up."""
    call()
    taken = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[rounds // 2]


def peak_of(*calls):
    """GiB of the device at the peak of the calls, None without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for call in calls:
        call()
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if torch.cuda.is_available() else None


def measure(model, resolution, steps, flags, recipe):
    """{part: seconds} of one way at one size, and the peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        opened = open_tuning(model, resolution, folder, ["--max_train_steps", steps, *flags], script.RECIPES[recipe])
    args, tunable, identity, words, progress, load = opened
    model = tunable.model
    scale = 2 ** (len(model.vae.config.block_out_channels) - 1)
    shape = (4, model.vae.config.latent_channels, resolution[0] // scale, resolution[1] // scale)
    source = (torch.randn(shape, device=model.device), torch.rand(shape, device=model.device))
    pixels = torch.rand(2 * args.train_batch_size, 3, *resolution) * 2 - 1
    condition = model.encode_all([args.class_prompt]).expand(args.sample_batch_size, -1, -1)
    seeds = list(range(args.sample_batch_size))

    def tune():
        script.fine_tune(args, tunable, identity, words, source, source[0], progress)

    def draw(of_references=False, **other):
        settings = script.sampling(args, of_references=of_references) | other
        fast = model.fast is not None and not of_references
        model.decode(model.sample(condition, seeds, **settings, fast=fast), args.sample_batch_size)

    measured = {"load": load, "peak_gib": peak_of(tune, draw), "step": seconds(tune, 1) / steps}
    measured["reference"] = seconds(lambda: draw(of_references=True)) / len(seeds)
    measured["image"] = seconds(draw) / len(seeds)
    if args.finetune == "full":
        measured["image_50"] = seconds(lambda: draw(solver="ddim", steps=PAPERS_STEPS), 1) / len(seeds)
    measured["encode"] = seconds(lambda: encode(model.vae, pixels))
    measured["encode"] += seconds(lambda: model.encode_all(list(words.values())))
    tunable.restore()
    measured["restore"] = seconds(tunable.restore)
    return measured


def median_of(rounds):
    """{part: median} of several measurements of a way; None where there is none."""
    return {key: None if value is None else statistics.median(one[key] for one in rounds)
            for key, value in rounds[0].items()}  # fmt: skip


def counts_of(way):
    """How many reference images, steps and images an identity takes."""
    recipe, sets, *_ = WAYS[way]
    recipe = script.RECIPES[recipe]
    return sets * recipe["num_reference_images"], recipe["max_train_steps"], recipe["num_images"]


def identity_seconds(parts, counts):
    """Seconds of an identity: weights restored in place, latents and embeddings computed once."""
    references, steps, images = counts
    drawn = references * parts["reference"] + images * parts["image"]
    return parts["restore"] + parts["encode"] + steps * parts["step"] + drawn


def papers_seconds(parts, counts):
    references, steps, images = counts
    return parts["load"] + (references + images) * parts["image_50"] + steps * (parts["step"] + parts["encode"])


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_sizes = parser.add_mutually_exclusive_group()
    model_sizes.add_argument("--sd15", action="store_true", help="Stable Diffusion 1.5's sizes with random weights")
    model_sizes.add_argument("--sdxl", action="store_true", help="Stable Diffusion XL's sizes with random weights")
    parser.add_argument("--steps", type=int, default=10, help="fine-tuning steps measured; default 10")
    parser.add_argument(
        "--rounds", type=int, help="of all ways in turn, medians count; default 3 of the stand-in, else 1"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default all")
    parser.add_argument("--json", type=Path, help="result file")
    args = parser.parse_args(input_args)
    kind = "sd15" if args.sd15 else "sdxl" if args.sdxl else "stand-in"
    measured, table = {way: [] for way in args.ways}, {}
    with tempfile.TemporaryDirectory() as folder:
        model = DIFFUSION_DIR
        if kind != "stand-in":
            model = f"{folder}/model"
            torch.manual_seed(0)
            (save_sd15 if args.sd15 else save_sdxl)(model)
        fast_lora = save_few_step_lora(model, f"{folder}/fast")
        # Random weights overflow in fp16.
        precision = ["--mixed_precision", "bf16"] if kind != "stand-in" else []
        # In turn, so that a machine that becomes slower does so for all.
        for way in args.ways * (args.rounds or (3 if kind == "stand-in" else 1)):
            recipe = WAYS[way][0]
            flags = [*precision, *flags_of(way, fast_lora)]
            flags += ["--use_8bit_adam"] if recipe == "paper" and torch.cuda.is_available() else []
            measured[way].append(measure(model, SIZES[kind][recipe == "lora"], args.steps, flags, recipe))
            print(f"{way}: {measured[way][-1]}", flush=True)
    for way, rounds in measured.items():
        table[way] = median_of(rounds)
        table[way]["identity"] = identity_seconds(table[way], counts_of(way))
        if args.sd15:
            counted = read_result("generation_memory")["raw"]["counted"]
            name, pixels = COUNTED[WAYS[way][0]]
            table[way]["counted_gib"] = max(counted[name][pixels].values())
    if "paper" in table:
        table[PAPERS] = {"identity": papers_seconds(table["paper"], counts_of("paper"))}
    for parts in table.values():
        if OWN_SETS in table:
            parts["of_own_sets"] = parts["identity"] / table[OWN_SETS]["identity"]
    print(text_table(*table_of(table)))
    if args.json:
        raw = {"counts": {way: counts_of(way) for way in args.ways}, "sizes": kind, "parts": table}
        write_result(args.json, command_line(__spec__.name, input_args), *table_of(table), raw)


def table_of(table):
    rows = [[name, *(number(parts.get(key)) for key in COLUMNS.values())] for name, parts in table.items()]
    return ["way", *COLUMNS], rows


def number(value):
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
