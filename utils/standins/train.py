"""Teaches the tiny stand-ins of `utils.standins.build` the synthetic domains f to h.

    python -m utils.standins.train --output_dir utils/standins        # the shipped ones: over three hours on one core
    python -m utils.standins.train --output_dir OUT --scale 0.01      # the same in two minutes, for a look

Parts can run side by side (`--parts vae`, `--parts clip captioner`, then `--parts unet`, then `--parts save`); each
keeps its state under `--work_dir` and continues from there.
"""

import argparse
import math
import random
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils.batches.transforms import TrainTransform
from utils.generated.texts.captions import QUESTIONS
from utils.standins import build
from utils.standins.people import IMAGES_PER_ID, People, Wanderers, answers_of, parts_of, seen_anyhow, spoken

PARTS = ("vae", "clip", "captioner", "unet", "save")


def learning_rate(step, steps, peak, warmup=100):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def train(name, modules, loss_of, steps, peak, work_dir, average=None, log_every=50):
    """A plain loop over `loss_of(step)`, with its state on disk every few minutes; returns at once when it is done."""
    file = work_dir / f"{name}.pt"
    params = [param for module in modules for param in module.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=peak, weight_decay=0.01, betas=(0.9, 0.99))
    start, shadow = 0, [param.detach().clone() for param in params] if average else None
    if file.exists():
        state = torch.load(file, weights_only=True)
        for module, weights in zip(modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        start, shadow = state["step"], state["shadow"]
    saved, running = time.monotonic(), 0.0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10, disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        torch.manual_seed(step)
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise ValueError(f"{name}: loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if shadow is not None:
            decay = min(average, (step + 1) / (step + 10))
            torch._foreach_lerp_(shadow, [param.detach() for param in params], 1 - decay)
        running += loss.item()
        if (step + 1) % log_every == 0:
            tqdm.write(f"{name} step {step + 1}/{steps} loss {running / log_every:.4f}")
            running = 0.0
        if step + 1 == steps or time.monotonic() - saved > 180:
            weights = [module.state_dict() for module in modules]
            state = {"modules": weights, "optimizer": optimizer.state_dict(), "step": step + 1, "shadow": shadow}
            torch.save(state, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
            saved = time.monotonic()
    if shadow is not None:
        for param, mean in zip(params, shadow, strict=True):
            param.data.copy_(mean)
    for module in modules:
        module.requires_grad_(False).eval()


def half():
    return torch.autocast("cpu", torch.bfloat16)


def chroma(images):
    """Red and blue without what all three have in common: (B, 2, H, W)."""
    return images[:, ::2] - images.mean(1, keepdim=True)


def train_vae(people, steps, work_dir, batch=8):
    """Reconstruction of pictures, of their edges and of their colours, with some KL; tall and squared ones.

    Small coloured garments on large grey streets would be drawn grey: what is colourful counts more, and three of the
    four numbers of a patch are led to its mean colour, which the encoder would find late or never.
    """
    torch.manual_seed(0)
    vae = build.build_vae()

    def loss_of(step):
        generator = torch.Generator().manual_seed(step)
        squared = step % 5 == 4
        numbers = torch.randint(len(people), (batch // 2 if squared else batch,), generator=generator)
        images = people.images(numbers, (128, 128) if squared else (128, 64), generator, jitter=0.2)
        with half():
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded.float() - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        strength = chroma(images).square().sum(1, keepdim=True).sqrt()
        patches = F.avg_pool2d(chroma(error) * (1 + 8 * strength), 4)
        means = F.avg_pool2d(images, 8)
        led = torch.cat([2 * means.mean(1, keepdim=True), 6 * chroma(means)], dim=1) - posterior.mean[:, :3].float()
        kl = posterior.kl().float().mean()
        return error.abs().mean() + edges + 3 * patches.abs().mean() + 0.5 * led.square().mean() + 5e-5 * kl

    train("vae", [vae], loss_of, steps, 2e-3, work_dir)
    latents = []
    for numbers in torch.arange(min(len(people), 512)).split(64):
        latents.append(vae.encode(people.images(numbers, (128, 64))).latent_dist.mean)
    vae.register_to_config(scaling_factor=round(1.0 / torch.cat(latents).std().item(), 5))
    return vae


def train_clip(people, tokenizer, steps, work_dir, ids_per_batch=36):
    """Captions against pictures; two pictures of a person share one caption, so the camera has to be ignored.

    Half of the pictures lose a rectangle, as in Re-ID training: what is left must do.
    """
    torch.manual_seed(1)
    clip = build.build_clip(tokenizer)

    def loss_of(step):
        generator = torch.Generator().manual_seed(step)
        rng = random.Random(step)
        groups = torch.randperm(len(people) // IMAGES_PER_ID, generator=generator)[:ids_per_batch]
        picks = torch.rand(ids_per_batch, IMAGES_PER_ID, generator=generator).argsort(1)[:, :2]
        numbers = (groups[:, None] * IMAGES_PER_ID + picks).flatten()
        size = (128, 128) if step % 5 == 4 else (128, 64)
        images = people.images(numbers, size, generator, jitter=0.15)
        eraser = TrainTransform(size, erasing_area=(0.02, 0.3))
        for number in (torch.rand(len(images), generator=generator) < 0.5).nonzero().flatten().tolist():
            eraser.erase(images[number], rng)
        texts = [spoken(people.words(number), rng) for number in numbers[::2].tolist()]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        with half():
            out = clip(**tokens, pixel_values=images, interpolate_pos_encoding=True)
        logits = out.logits_per_image.float()
        owner = torch.arange(ids_per_batch).repeat_interleave(2)
        by_text = logits.T.log_softmax(1).gather(1, torch.arange(2 * ids_per_batch).view(-1, 2))
        return (F.cross_entropy(logits, owner) - by_text.mean()) / 2

    train("clip", [clip], loss_of, steps, 1e-3, work_dir)
    return clip


class Teacher(torch.nn.Module):
    """One learned look at all tokens for each part, and its answer in one number; forgotten after the lessons."""

    def __init__(self, width, sizes):
        super().__init__()
        self.looks = torch.nn.Parameter(0.02 * torch.randn(len(sizes), width))
        self.attention = torch.nn.MultiheadAttention(width, 4, batch_first=True)
        self.answers = torch.nn.ModuleList(torch.nn.Linear(width, size) for size in sizes)

    def forward(self, tokens):
        looks = self.looks.expand(len(tokens), -1, -1)
        found = self.attention(looks, tokens, tokens, need_weights=False)[0]
        return [answer(found[:, number]) for number, answer in enumerate(self.answers)]


def train_captioner(people, eye_steps, steps, work_dir, batch=64, questions_each=4):
    """The eyes learn every part of all pictures first, which is quick; then the words for what they see."""
    torch.manual_seed(2)
    captioner, processor = build.build_captioner()
    tokenizer = processor.tokenizer
    size = tuple(processor.image_processor.size[side] for side in ("height", "width"))
    mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
    truths = [people.words(number) for number in range(len(people))]
    parts = list(zip(*map(parts_of, truths), strict=True))
    known = [sorted(set(values) - {None}) for values in parts]
    places = [{value: place for place, value in enumerate(of)} for of in known]
    wanted = torch.tensor([[of.get(one, -100) for one in values] for of, values in zip(places, parts, strict=True)]).T
    teacher = Teacher(captioner.config.vision_config.hidden_size, list(map(len, known)))

    def look(step):
        generator = torch.Generator().manual_seed(step)
        numbers = torch.randint(len(people), (batch,), generator=generator)
        images = (seen_anyhow(people.pixels[numbers] / 255, size, generator) - mean) / std
        return numbers, captioner.vision_model(pixel_values=images)[0]

    def lesson(step):
        with half():
            numbers, seen = look(step)
            listed = teacher(seen)
        losses = [F.cross_entropy(one.float(), wanted[numbers, part]) for part, one in enumerate(listed)]
        return sum(losses) / len(losses)

    def loss_of(step):
        with torch.no_grad(), half():
            numbers, seen = look(step + eye_steps)
        truth = [answers_of(truths[number]) for number in numbers.tolist()]
        losses = []
        # One question for all pictures at a time, as it will be asked: a padded one would be read with its padding.
        # The upper garment has the most to tell.
        others = [key for key in QUESTIONS if key != "upper"]
        for key in ("upper", *random.Random(step).sample(others, questions_each - 1)):
            listed = [number for number, one in enumerate(truth) if one[key] is not None]
            ask = tokenizer([QUESTIONS[key]] * len(listed), return_tensors="pt")
            # A mirrored picture still shows a side: the view has no left or right.
            say = tokenizer([truth[number][key] for number in listed], padding=True, return_tensors="pt").input_ids
            labels = say.masked_fill(say == tokenizer.pad_token_id, -100)
            # An answer opens with the decoder's own start token in place of [CLS], which is never asked for.
            say[:, 0] = captioner.decoder_start_token_id
            labels[:, 0] = -100
            with half():
                thought = captioner.text_encoder(
                    input_ids=ask.input_ids,
                    attention_mask=ask.attention_mask,
                    encoder_hidden_states=seen[listed],
                    return_dict=False,
                )[0]
                logits = captioner.text_decoder(input_ids=say, encoder_hidden_states=thought).logits
            losses.append(
                F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            )
        return sum(losses) / len(losses)

    eyes = captioner.vision_model
    train("eyes", [eyes, teacher], lesson, eye_steps, 1.5e-3, work_dir)
    train("captioner", [captioner], loss_of, steps, 1e-3, work_dir)
    return captioner, processor


def train_unet(people, vae, clip, tokenizer, steps, work_dir, batch=16):
    """Noise prediction under captions, on 16x8 latents (generation) and squared 16x16 ones (DCAC)."""
    torch.manual_seed(3)
    unet = build.build_unet()
    scheduler = build.build_scheduler()
    signal = scheduler.alphas_cumprod
    weight = (5.0 * (1 - signal) / signal).clamp(max=1.0)

    @cache
    def pool(size):
        means, stds = [], []
        for numbers in tqdm(torch.arange(len(people)).split(64), desc=f"latents {size}", mininterval=10, disable=None):
            with torch.no_grad(), half():
                mirror = torch.Generator().manual_seed(int(numbers[0]))
                posterior = vae.encode(people.images(numbers, size, mirror)).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
        return torch.cat(means), torch.cat(stds)

    def loss_of(step):
        generator = torch.Generator().manual_seed(step)
        rng = random.Random(step)
        squared = step % 4 == 3
        means, stds = pool((128, 128) if squared else (128, 64))
        numbers = torch.randint(len(people), (batch // 2 if squared else batch,), generator=generator)
        noise = torch.randn(2, len(numbers), *means.shape[1:], generator=generator)
        latents = (means[numbers] + stds[numbers] * noise[0]) * vae.config.scaling_factor
        times = torch.randint(1000, (len(numbers),), generator=generator)
        texts = ["" if rng.random() < 0.1 else spoken(people.words(number), rng) for number in numbers.tolist()]
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=build.WINDOW, return_tensors="pt")
        with torch.no_grad():
            states = clip.text_model(input_ids=tokens.input_ids).last_hidden_state
        noised = scheduler.add_noise(latents, noise[1], times)
        guess = unet(noised.contiguous(memory_format=torch.channels_last), times, states).sample
        error = (guess - noise[1]).square().mean(dim=(1, 2, 3))
        return (weight[times] * error).mean() / weight.mean()

    train("unet", [unet.to(memory_format=torch.channels_last)], loss_of, steps, 1e-3, work_dir, average=0.9995)
    return unet.to(memory_format=torch.contiguous_format)


def main(input_args=None):
    parser = argparse.ArgumentParser(description="Train the stand-in models on the synthetic domains f to h.")
    parser.add_argument("--output_dir", required=True, help="folder for clip, stable-diffusion and blip-vqa")
    parser.add_argument("--work_dir", default=None, help="where training states are kept (default: OUTPUT_DIR/work)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to train in this run")
    parser.add_argument("--num_ids", type=int, default=1500, help="identities of each domain")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all numbers of steps")
    parser.add_argument("--vae_steps", type=int, default=2400)
    parser.add_argument("--clip_steps", type=int, default=800)
    parser.add_argument("--eyes_steps", type=int, default=7000)
    parser.add_argument("--captioner_steps", type=int, default=2500)
    parser.add_argument("--unet_steps", type=int, default=10500)
    args = parser.parse_args(input_args)
    work_dir = Path(args.work_dir or Path(args.output_dir) / "work")
    work_dir.mkdir(parents=True, exist_ok=True)
    num_ids = max(64, round(args.num_ids * min(1.0, 10 * args.scale)))
    tokenizer = build.build_clip_tokenizer()
    parts = set(args.parts)
    people = People(num_ids) if parts != {"captioner"} else None

    def steps(name):
        return max(1, round(getattr(args, f"{name}_steps") * args.scale))

    vae = clip = unet = None
    if parts & {"vae", "unet", "save"}:
        vae = train_vae(people, steps("vae"), work_dir)
    if parts & {"clip", "unet", "save"}:
        clip = train_clip(people, tokenizer, steps("clip"), work_dir)
    if parts & {"captioner", "save"}:
        wanderers = Wanderers(2 * num_ids)
        captioner, processor = train_captioner(wanderers, steps("eyes"), steps("captioner"), work_dir)
    if parts & {"unet", "save"}:
        unet = train_unet(people, vae, clip, tokenizer, steps("unet"), work_dir)
    if "save" in parts:
        diffusion = build.build_diffusion(clip, tokenizer, vae, unet)
        build.save_all(args.output_dir, clip, diffusion, captioner, processor, torch.float16)
        print(f"wrote clip, stable-diffusion and blip-vqa under {args.output_dir}")


if __name__ == "__main__":
    main()
