"""Tiny stand-ins of CLIP, Stable Diffusion and BLIP: the real classes, only names and sizes differ.

    python -m utils.standins.build --output_dir OUT          # random weights, in seconds (for tests)

`utils.standins.train` teaches them the synthetic domains f to h; the result is shipped in `utils/standins/`.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
)

from utils import synthetic
from utils.generated.texts.captions import QUESTIONS
from utils.synthetic.person import COLOURS, HAIR

TEXT_WIDTH = 128
WINDOW = 77
LATENT_CHANNELS = 4


def sentences():
    """What the tokenizers are built from: every word of the world, in the sentences it is used in."""
    lines = []
    for domain in synthetic.DOMAINS:
        for pid in range(200):
            words = synthetic.describe(domain, pid, 0, pid)
            lines.append(synthetic.caption(words))
            lines += [words[key] for key in ("upper", "lower", "shoes", "hair", "carried", "hat", "scene")]
    for colour in COLOURS:
        for kind in (
            *synthetic.UPPER_KINDS,
            *synthetic.LOWER_KINDS,
            *synthetic.CARRIED_KINDS,
            *synthetic.HATS,
            "shoes",
        ):
            lines.append(f"{colour} {kind}")
    lines += [f"{length} {colour} hair" for length in synthetic.HAIR_KINDS for colour in HAIR]
    lines += list(QUESTIONS.values())
    lines += ["a photo of a person", "a photo of a dog", "a photo of a car", "an empty street", "a picture of nothing"]
    return lines


def build_clip_tokenizer():
    """CLIP's own kind of byte-pair encoding with a small vocabulary; every byte is in it, so any text has a code."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(sentences(), trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in state["merges"]]
    # The trainer numbers the bytes that it saw at the end of a word anew in every process: they are sorted here.
    ends = sorted(f"{token}</w>" for token in alphabet)
    seen = [token for token in ends if token in state["vocab"]]
    # The other ends of words follow: in CLIP's vocabulary, every byte has both tokens.
    tokens = [*sorted(alphabet), *seen, *map("".join, merges), *ends, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WINDOW)


def build_clip(tokenizer):
    """Patches of 8, so that 128x64 gives the 16x8 grid that the real model has at 256x128."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": WINDOW,
        "projection_dim": 128,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 8,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text | special, vision_config=vision, projection_dim=128))


def build_vae():
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=128,
    )


def build_unet():
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler():
    """Stable Diffusion 1.x's own noise schedule."""
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, clip_sample=False
    )


def build_diffusion(clip, tokenizer, vae=None, unet=None):
    """A complete pipeline folder; its text encoder is the text half of the given CLIP."""
    text_encoder = CLIPTextModel(clip.config.text_config)
    wanted = text_encoder.state_dict()
    given = {
        name.removeprefix("text_model."): value
        for name, value in clip.state_dict().items()
        if name.startswith("text_model.")
    }
    prefix = "text_model." if next(iter(wanted)).startswith("text_model.") else ""
    text_encoder.load_state_dict({f"{prefix}{name}": value for name, value in given.items()}, strict=False)
    return StableDiffusionPipeline(
        vae=vae or build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet or build_unet(),
        scheduler=PNDMScheduler.from_config(
            build_scheduler().config, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_captioner():
    """A BLIP question answerer with a vocabulary of the world's words and single letters for all others."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = set()
    for line in sentences():
        words.update(line.lower().replace(",", " , ").replace("?", " ? ").replace("-", " - ").split())
    vocab += sorted(words)
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocab += [letter for letter in letters if letter not in words] + [f"##{letter}" for letter in letters]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(vocab)}, model_max_length=64)
    # The mask token opens an answer: BLIP's decoder starts from a token that is in no answer.
    start = tokenizer.mask_token_id
    text = {
        "vocab_size": len(vocab),
        "hidden_size": 128,
        "encoder_hidden_size": 128,
        "intermediate_size": 256,
        "projection_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": start,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "hidden_act": "quick_gelu",
        "projection_dim": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 16,
        # The default is next to nothing, for weights that are loaded anyway.
        "initializer_range": 0.02,
    }
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=128, image_text_hidden_size=128)
    size = {"height": 128, "width": 128}
    processor = BlipProcessor(image_processor=BlipImageProcessor(size=size), tokenizer=tokenizer)
    return BlipForQuestionAnswering(config), processor


def build_clip_processor(tokenizer):
    # People are tall: the whole picture is squeezed to the square instead of cutting heads and feet off.
    size = {"height": 128, "width": 128}
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def save_all(output_dir, clip, diffusion, captioner, processor, dtype=torch.float32):
    """The three folders, as `from_pretrained` of the real classes reads them."""
    output_dir = Path(output_dir)
    tokenizer = diffusion.tokenizer
    clip.to(dtype).save_pretrained(output_dir / "clip")
    build_clip_processor(tokenizer).save_pretrained(output_dir / "clip")
    if dtype != torch.float32:
        diffusion.to(dtype=dtype)
    diffusion.save_pretrained(output_dir / "stable-diffusion")
    captioner.to(dtype).save_pretrained(output_dir / "blip-vqa")
    processor.save_pretrained(output_dir / "blip-vqa")
    for folder in ("clip", "blip-vqa", "stable-diffusion/text_encoder"):
        # transformers opens a model in the type that its configuration names: half is only for the file.
        path = output_dir / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def build_all(output_dir, seed=0):
    """All stand-ins with random weights."""
    torch.manual_seed(seed)
    tokenizer = build_clip_tokenizer()
    clip = build_clip(tokenizer)
    captioner, processor = build_captioner()
    save_all(output_dir, clip, build_diffusion(clip, tokenizer), captioner, processor)


def main(input_args=None):
    parser = argparse.ArgumentParser(description="Write the stand-in models with random weights.")
    parser.add_argument("--output_dir", required=True, help="folder for clip, stable-diffusion and blip-vqa")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = parser.parse_args(input_args)
    build_all(args.output_dir, args.seed)
    print(f"wrote clip, stable-diffusion and blip-vqa under {args.output_dir}")


if __name__ == "__main__":
    main()
