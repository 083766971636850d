"""Text encoders and tokenizers of any family, and conditions made of their states."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoTokenizer

from utils.diffusion.checkpoint import INDEX, open_checkpoint, read_index
from utils.files import one_line


class Text(NamedTuple):
    """A tokenizer and its encoder; of an encoder that a checkpoint leaves out, only the width that it would have.

    `tokens`: how many the model was trained with, where its family has several.
    """

    tokenizer: object
    encoder: object
    width: int | None = None
    tokens: int | None = None


def load_tokenizer(name, revision=None, part="tokenizer"):
    """By the class that the checkpoint's index names; without one, by the tokenizer's own files."""
    tokenizer_class = getattr(transformers, str(class_named(name, part, revision)), None) or AutoTokenizer
    try:
        tokenizer = tokenizer_class.from_pretrained(name, subfolder=part, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"the {part} of {name!r} cannot be loaded: {one_line(error)}") from error
    return check_vocabulary(tokenizer, name)


def check_vocabulary(tokenizer, name):
    """The tokenizer. Where its files are missing, transformers makes one that knows no word: ValueError."""
    if len(set(tokenizer("a photo of a person", add_special_tokens=False).input_ids)) < 3:
        raise ValueError(f"the tokenizer of {name!r} has no vocabulary: its files are missing")
    return tokenizer


def class_named(name, part, revision=None):
    files, folder = open_checkpoint(str(name), revision, None)
    index = read_index(name, folder, revision) if INDEX in files else {}
    return (index.get(part) or (None, None))[1]


def load_text_encoder(name, dtype, revision=None, part="text_encoder", model_class=transformers.CLIPTextModel):
    try:
        text_encoder = model_class.from_pretrained(
            name, subfolder=part, dtype=dtype, revision=revision, use_safetensors=True
        )
    except Exception as error:
        raise ValueError(f"the {part} of {name!r} cannot be loaded: {one_line(error)}") from error
    return text_encoder.requires_grad_(False).eval()


def read_text_config(name, part="text_encoder", revision=None):
    try:
        return AutoConfig.from_pretrained(name, subfolder=part, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{name!r} has no {part} that can be read: {one_line(error)}") from error


def check_text_encoder(name, width, revision=None):
    """The tokens of a text; ValueError, from the configuration only, without a text encoder of the U-Net's width."""
    config = read_text_config(name, revision=revision)
    if config.model_type not in ("clip_text_model", "clip"):
        raise ValueError(f"the text encoder of {name!r} is a {config.model_type}; only CLIP's is supported")
    if config.hidden_size != width:
        raise ValueError(
            f"the text encoder of {name!r} has width {config.hidden_size}, its U-Net takes conditions of {width}"
        )
    return config.max_position_embeddings


def tokens_of(text, prompts, length=None):
    """Token numbers (B, length), on the encoder's device; by default as many as the tokenizer allows."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    length = length or text.tokenizer.model_max_length
    return text.tokenizer(prompts, max_length=length, **options).input_ids.to(text.encoder.device)


def penultimate(text, prompts):
    """(states before CLIP's last layer, the projected state of the end token), of a CLIP text encoder."""
    output = text.encoder(tokens_of(text, prompts), output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def with_pooled(tokens, pooled):
    """One tensor of tokens (B, T, W) and a pooled vector (B, P), which becomes the last row."""
    row = F.pad(pooled, (0, tokens.shape[2] - pooled.shape[1]))
    return torch.cat([tokens, row[:, None].to(tokens.dtype)], dim=1)


def without_pooled(condition, width):
    """(tokens, pooled vector of `width`) of a condition."""
    return condition[:, :-1], condition[:, -1, :width]


def check_width(name, what, found, wanted):
    if found != wanted:
        raise ValueError(f"{name!r}: its text encoders give {what} of width {found}, its network takes {wanted}")


@torch.no_grad()
def encode_texts(name, texts, num_tokens=None, *, device="cpu", revision=None, batch_size=64):
    """States of a checkpoint's text encoder: (N, width) of end tokens, or (N, num_tokens, width) of the first tokens.

    float32 on the CPU. A text that is too long keeps its end token.
    """
    tokenizer = load_tokenizer(name, revision)
    text_encoder = load_text_encoder(name, torch.float32, revision).to(device)
    states = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(
            texts[start : start + batch_size],
            padding="max_length",
            max_length=num_tokens or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        state = text_encoder(tokens.input_ids.to(device))[0].float().cpu()
        ends = tokens.attention_mask.sum(1) - 1
        states.append(state if num_tokens else state[torch.arange(len(state)), ends])
    return torch.cat(states)
