"""Seconds an identity takes to fine-tune and draw: each part measured, then added up in our way and the paper's.

    python -m benchmarks.speed.generation                     # the stand-in, on this machine
    python -m benchmarks.speed.generation --sd15 --json FILE  # the sizes of Stable Diffusion 1.5, on a GPU

The functions of train_dreambooth_reid.py are measured: seconds of a fine-tuning step and of an image, and the peak of
the device's memory. The paper's way loads the model for each identity, encodes images and prompts in every step, and
draws an image in 50 steps; its step and image are otherwise ours, at 512 x 512 with the whole U-Net.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import train_dreambooth_reid as script
from benchmarks.common import GIB, command_line, write_result
from benchmarks.memory.generation_cost import SHARED
from benchmarks.models import SCHEDULE, TEXT, UNET, VAE
from utils.diffusion.latents import encode
from utils.flags import DIFFUSION_DIR
from utils.launch import start_accelerator
from utils.reporting.report import text_table
from utils.worklist import Progress, Worklist

IDENTITIES = 5183
# Column: part; seconds if nothing else is said.
COLUMNS = {
    "load": "load", "step": "step", "image": "image", "image, 50 steps": "image_50", "encode": "encode",
    "restore": "restore", "peak GiB": "peak_gib", "identity": "identity", "days, all identities": "device_days",
    "times the paper's": "of_the_papers",
}  # fmt: skip
LIKE = {"full": "paper", "lora": "lora"}


def counts_of(recipe, reference_sets=1):
    """What an identity takes: reference images, steps, generated images, of which about 150 are to be kept."""
    recipe = script.RECIPES[recipe]
    references = round(reference_sets * recipe["num_reference_images"])
    return {"references": references, "steps": recipe["max_train_steps"], "images": recipe["num_images"]}


PAPER = counts_of("paper")
OURS = {"full": PAPER, "lora": counts_of("lora", SHARED)}


def save_sd15(folder):
    """Random weights of Stable Diffusion 1.5's sizes in half precision, with the stand-in's tokenizer."""
    torch.manual_seed(0)
    tokenizer = script.load_tokenizer(DIFFUSION_DIR)
    StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(folder)
    return str(folder)


def open_tuning(model, finetune, resolution, folder, flags):
    """What fine-tuning one identity takes, by the functions of the script, and the seconds that loading took."""
    words = ["--pretrained_model_name_or_path", model, "--finetune", finetune, "--output_dir", folder]
    words += ["--resolution", *resolution, "--source", "synthetic:domain=a,num_ids=1"]
    args = script.parse_args([str(word) for word in (*words, "--clip_model_name_or_path", "none", *flags)])
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
    return args, tunable, identities[0], progress, time.perf_counter() - began


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


def peak_of(call):
    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return round(torch.cuda.max_memory_allocated() / GIB, 2)


def measure(model, finetune, resolution, steps, flags):
    """{part: seconds} of one way of fine-tuning at one size, and the peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        opened = open_tuning(model, finetune, resolution, folder, ["--max_train_steps", steps, *flags])
    args, tunable, identity, progress, load = opened
    model = tunable.model
    scale = 2 ** (len(model.vae.config.block_out_channels) - 1)
    shape = (4, model.vae.config.latent_channels, resolution[0] // scale, resolution[1] // scale)
    source = (torch.randn(shape, device=model.device), torch.rand(shape, device=model.device))
    words = {"identity_prompt": "a photo of <iir-0000> person", "reference_prompt": "a photo of a person"}
    pixels = torch.rand(2 * args.train_batch_size, 3, *resolution) * 2 - 1
    condition = model.encode_all(["a photo of a person"]).expand(args.sample_batch_size, -1, -1)
    seeds = list(range(args.sample_batch_size))

    def tune():
        script.fine_tune(args, tunable, identity, words, source, source[0], progress)

    def draw(solver, solver_steps):
        settings = script.sampling(args) | {"solver": solver, "steps": solver_steps}
        model.decode(model.sample(condition, seeds, **settings), args.sample_batch_size)

    measured = {"load": load, "peak_gib": peak_of(tune), "step": seconds(tune, 1) / steps}
    measured["image"] = seconds(lambda: draw(args.solver, args.num_inference_steps)) / len(seeds)
    measured["image_50"] = seconds(lambda: draw("ddim", 50), 1) / len(seeds)
    measured["encode"] = seconds(lambda: encode(model.vae, pixels))
    measured["encode"] += seconds(lambda: model.encode_all(list(words.values())))
    tunable.restore()
    measured["restore"] = seconds(tunable.restore)
    return measured


def ours_of(parts, counts):
    """Seconds of an identity: weights restored in place, latents and embeddings computed once."""
    images = counts["references"] + counts["images"]
    return parts["restore"] + images * parts["image"] + counts["steps"] * parts["step"] + parts["encode"]


def papers_of(parts):
    images = PAPER["references"] + PAPER["images"]
    return parts["load"] + images * parts["image_50"] + PAPER["steps"] * (parts["step"] + parts["encode"])


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd15", action="store_true", help="Stable Diffusion 1.5's sizes with random weights")
    parser.add_argument("--steps", type=int, default=10, help="fine-tuning steps measured; default 10")
    parser.add_argument("--json", type=Path, help="result file")
    args = parser.parse_args(input_args)
    with tempfile.TemporaryDirectory() as folder:
        model = save_sd15(folder) if args.sd15 else DIFFUSION_DIR
        sizes = [(512, 512), (512, 256)] if args.sd15 else [(128, 128), (128, 64)]
        table = {}
        for finetune in ("full", "lora"):
            for resolution in sizes:
                # Random weights overflow in fp16.
                flags = ["--mixed_precision", "bf16", "--gradient_checkpointing"] if args.sd15 else []
                flags += ["--use_8bit_adam"] if args.sd15 and finetune == "full" else []
                flags += ["--sample_batch_size", 10, "--guidance_scale", 7.5]
                for flag in ("train_batch_size", "num_inference_steps"):
                    flags += [f"--{flag}", script.RECIPES[LIKE[finetune]][flag]]
                name = f"{finetune} {resolution[0]} x {resolution[1]}"
                table[name] = measure(model, finetune, resolution, args.steps, flags)
                table[name]["identity"] = ours_of(table[name], OURS[finetune])
    table["paper"] = {"identity": papers_of(next(iter(table.values())))}
    for parts in table.values():
        parts["device_days"] = parts["identity"] * IDENTITIES / 86400
        parts["of_the_papers"] = parts["identity"] / table["paper"]["identity"]
    print(text_table(*table_of(table)))
    if args.json:
        raw = {"counts": OURS | {"paper": PAPER}, "sd15": args.sd15, "parts": table}
        write_result(args.json, command_line(__spec__.name, input_args), *table_of(table), raw)


def table_of(table):
    rows = [[name, *(number(parts.get(key)) for key in COLUMNS.values())] for name, parts in table.items()]
    return ["what trains", *COLUMNS], rows


def number(value):
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
