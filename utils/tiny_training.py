"""Teaches the tiny stand-ins of `utils.tiny` the synthetic domains f to h.

    python -m utils.tiny_training --output_dir utils/standins        # the shipped ones: about three hours on one core
    python -m utils.tiny_training --output_dir OUT --scale 0.01      # the same in two minutes, for a look

Parts can run side by side (`--parts vae`, `--parts clip captioner`, then `--parts unet`, then `--parts save`); each
keeps its state under `--work_dir` and goes on from there.
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

from utils import synthetic, tiny
from utils.captions import QUESTIONS
from utils.loading import TrainTransform

DOMAINS = ("f", "g", "h")
IMAGES_PER_ID = 4
PARTS = ("vae", "clip", "captioner", "unet", "save")


class People:
    """All pictures of some identities in memory, as bytes; `rows` are (domain, pid, camid, index)."""

    def __init__(self, num_ids, first_pid=0):
        self.rows = [
            (domain, pid, synthetic.camera_of(domain, pid, 2 * index), index)
            for pid in range(first_pid, first_pid + num_ids)
            for domain in DOMAINS
            for index in range(IMAGES_PER_ID)
        ]
        pictures = [
            torch.frombuffer(bytearray(synthetic.render(*row).tobytes()), dtype=torch.uint8).view(*synthetic.SIZE, 3)
            for row in tqdm(self.rows, desc="drawing", disable=None)
        ]
        self.pixels = torch.stack(pictures).permute(0, 3, 1, 2).contiguous()

    def __len__(self):
        return len(self.rows)

    def images(self, numbers, size, generator=None, jitter=0.0):
        """Float images in -1..1, half of them mirrored; `jitter` moves exposure and colour cast."""
        images = self.pixels[numbers].float().div_(127.5).sub_(1.0)
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp_(-1, 1)
        if generator is not None:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        if jitter:
            gain = 1.0 + jitter * (2 * torch.rand(len(images), 3, 1, 1, generator=generator) - 1)
            images = ((images + 1) * gain - 1).clamp_(-1, 1)
        return images

    def words(self, number):
        return synthetic.describe(*self.rows[number])


def spoken(words, rng):
    """A caption as people would write it: some things are left out, the place is named loosely."""
    words = dict(words)
    if rng.random() < 0.15:
        words["hat"] = "none"
    for key in ("action", "view", "place"):
        if rng.random() < 0.3:
            words.pop(key)
    if "place" in words and rng.random() < 0.4:
        words["place"] = words["scene"]
    return synthetic.caption(words)


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
    vae = tiny.build_vae()

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
    clip = tiny.build_clip(tokenizer)

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


def start_from_clip(captioner, clip):
    """The captioner's eyes begin as CLIP's: same blocks, other names, a coarser grid."""
    given = clip.vision_model.state_dict()
    eyes = captioner.vision_model
    with torch.no_grad():
        eyes.embeddings.class_embedding.copy_(given["embeddings.class_embedding"].view(1, 1, -1))
        eyes.embeddings.patch_embedding.weight.copy_(given["embeddings.patch_embedding.weight"])
        eyes.embeddings.patch_embedding.bias.zero_()
        table = given["embeddings.position_embedding.weight"]
        old, new = math.isqrt(len(table) - 1), math.isqrt(eyes.embeddings.position_embedding.shape[1] - 1)
        grid = table[1:].T.reshape(1, -1, old, old)
        grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=False).flatten(2).mT
        eyes.embeddings.position_embedding.copy_(torch.cat([table[None, :1], grid], dim=1))
        for number, layer in enumerate(eyes.encoder.layers):
            old_layer = {name.removeprefix(f"encoder.layers.{number}."): value for name, value in given.items()}
            for kind in ("weight", "bias"):
                qkv = torch.cat([old_layer[f"self_attn.{part}_proj.{kind}"] for part in "qkv"])
                getattr(layer.self_attn.qkv, kind).copy_(qkv)
                getattr(layer.self_attn.projection, kind).copy_(old_layer[f"self_attn.out_proj.{kind}"])
                for name in ("layer_norm1", "layer_norm2"):
                    getattr(getattr(layer, name), kind).copy_(old_layer[f"{name}.{kind}"])
                for name in ("fc1", "fc2"):
                    getattr(getattr(layer.mlp, name), kind).copy_(old_layer[f"mlp.{name}.{kind}"])


def answers_of(words):
    """The true answer to each question of `utils.captions`."""
    view = words["view"].removeprefix("seen from ").removeprefix("the ")
    hat = "nothing" if words["hat"] == "none" else words["hat"]
    return {key: words[key] for key in ("upper", "lower", "shoes", "hair", "carried", "action", "scene")} | {
        "view": view,
        "hat": hat,
    }


def train_captioner(people, clip, steps, work_dir, batch=24, questions_each=5):
    torch.manual_seed(2)
    captioner, processor = tiny.build_captioner()
    start_from_clip(captioner, clip)
    tokenizer = processor.tokenizer
    size = tuple(processor.image_processor.size[side] for side in ("height", "width"))
    mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)

    def loss_of(step):
        generator = torch.Generator().manual_seed(step)
        rng = random.Random(step)
        numbers = torch.randint(len(people), (batch,), generator=generator)
        images = (people.images(numbers, size, generator, jitter=0.2) / 2 + 0.5 - mean) / std
        truths = [answers_of(people.words(number)) for number in numbers.tolist()]
        with half():
            seen = captioner.vision_model(pixel_values=images)[0]
        losses = []
        # One question for all pictures at a time, as it will be asked: a padded one would be read with its padding.
        for key in rng.sample(list(QUESTIONS), questions_each):
            ask = tokenizer([QUESTIONS[key]] * batch, return_tensors="pt")
            # A mirrored picture still shows a side: the view has no left or right.
            say = tokenizer([truth[key] for truth in truths], padding=True, return_tensors="pt").input_ids
            labels = say.masked_fill(say == tokenizer.pad_token_id, -100)
            # An answer opens with the decoder's own start token in place of [CLS], which is never asked for.
            say[:, 0] = captioner.decoder_start_token_id
            labels[:, 0] = -100
            with half():
                thought = captioner.text_encoder(
                    input_ids=ask.input_ids,
                    attention_mask=ask.attention_mask,
                    encoder_hidden_states=seen,
                    return_dict=False,
                )[0]
                logits = captioner.text_decoder(input_ids=say, encoder_hidden_states=thought).logits
            losses.append(
                F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            )
        return sum(losses) / len(losses)

    train("captioner", [captioner], loss_of, steps, 8e-4, work_dir)
    return captioner, processor


def train_unet(people, vae, clip, tokenizer, steps, work_dir, batch=16):
    """Noise prediction under captions, on 16x8 latents (generation) and squared 16x16 ones (DCAC)."""
    torch.manual_seed(3)
    unet = tiny.build_unet()
    scheduler = tiny.build_scheduler()
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
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=tiny.WINDOW, return_tensors="pt")
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
    parser.add_argument("--captioner_steps", type=int, default=3000)
    parser.add_argument("--unet_steps", type=int, default=10500)
    args = parser.parse_args(input_args)
    work_dir = Path(args.work_dir or Path(args.output_dir) / "work")
    work_dir.mkdir(parents=True, exist_ok=True)
    people = People(max(64, round(args.num_ids * min(1.0, 10 * args.scale))))
    tokenizer = tiny.build_clip_tokenizer()
    parts = set(args.parts)

    def steps(name):
        return max(1, round(getattr(args, f"{name}_steps") * args.scale))

    vae = clip = unet = None
    if parts & {"vae", "unet", "save"}:
        vae = train_vae(people, steps("vae"), work_dir)
    if parts & {"clip", "captioner", "unet", "save"}:
        clip = train_clip(people, tokenizer, steps("clip"), work_dir)
    if parts & {"captioner", "save"}:
        captioner, processor = train_captioner(people, clip, steps("captioner"), work_dir)
    if parts & {"unet", "save"}:
        unet = train_unet(people, vae, clip, tokenizer, steps("unet"), work_dir)
    if "save" in parts:
        diffusion = tiny.build_diffusion(clip, tokenizer, vae, unet)
        tiny.save_all(args.output_dir, clip, diffusion, captioner, processor, torch.float16)
        print(f"wrote clip, stable-diffusion and blip-vqa under {args.output_dir}")


if __name__ == "__main__":
    main()
