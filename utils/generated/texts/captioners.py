"""Captioning models of transformers by name: BLIP-2, BLIP, GIT, and any other image-to-text model.

captioner = Captioner.from_pretrained("Salesforce/blip2-opt-2.7b", device="cuda", bits=8)
captioner.ask(images, "what is the person carrying?")        # a list with an answer for each image
captioner.describe(images)                                   # a list of captions
"""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from utils.diffusion.families.texts import check_vocabulary
from utils.files import one_line
from utils.modeling.folder import ask_hub

# Kinds of captioners: those that answer questions, take a prompt, only caption, or chat.
ANSWERS, PROMPTED, CAPTIONS, CHAT = "answers", "prompted", "captions", "chat"
ONLY_CAPTIONS = ("git", "blip", "vision-encoder-decoder", "pix2struct", "kosmos-2", "florence2")
ANSWER_TOKENS, CAPTION_TOKENS = 16, 40


def check_captioner(name):
    """The kind of a captioning model, read from its configuration alone; ValueError for any other model."""
    if not Path(name).is_dir() and Path(name).exists():
        raise ValueError(f"the captioner {name} is a file; give a model folder or a Hub id")
    try:
        if not Path(name).is_dir():
            ask_hub(name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        # The Hub's client raises its own errors and those of its HTTP library.
        raise ValueError(
            f"no captioner at {name!r}, neither a local folder nor a readable Hub id: {one_line(error)}"
        ) from error
    architecture = (config.architectures or [""])[0]
    if architecture == "BlipForQuestionAnswering":
        return ANSWERS
    kind = config.model_type
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"{name!r} is a {kind} model ({architecture or 'no architecture named'}), which does not turn images into "
            "text; give a captioner such as Salesforce/blip2-opt-2.7b"
        )
    if kind in ("blip-2", "instructblip"):
        return PROMPTED
    return CAPTIONS if kind in ONLY_CAPTIONS else CHAT


def quantization(bits, dtype=torch.float32):
    if bits not in (4, 8):
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"a captioner in {bits} bits needs bitsandbytes ({error}); pip install bitsandbytes"
        ) from None
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(**four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)


class Captioner:
    """A model, its processor, and the kind of input it takes."""

    def __init__(self, model, processor, kind, batch_size=16):
        self.model, self.processor, self.kind, self.batch_size = model.eval(), processor, kind, batch_size
        self.tokenizer = getattr(processor, "tokenizer", processor)

    @classmethod
    def from_pretrained(cls, name, *, device="cpu", dtype=None, bits=None, batch_size=16):
        """Load a model by name, on a GPU in float16; `bits` 8 or 4 quantizes it with bitsandbytes."""
        dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
        kind = check_captioner(name)
        auto = AutoModelForVisualQuestionAnswering if kind == ANSWERS else AutoModelForImageTextToText
        config = quantization(bits, dtype)
        settings = {"quantization_config": config, "device_map": {"": device}} if config else {}
        try:
            model = auto.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=False, **settings)
            processor = load_processor(name)
        except Exception as error:
            raise ValueError(f"the captioner {name!r} cannot be loaded: {one_line(error)}") from error
        return cls(model if settings else model.to(device), processor, kind, batch_size)

    @property
    def can_answer(self):
        return self.kind != CAPTIONS

    @property
    def can_describe(self):
        return self.kind != ANSWERS

    def ask(self, images, question):
        """An answer for each image."""
        if self.kind == PROMPTED:
            question = f"Question: {question} Answer:"
        elif self.kind == CHAT:
            question = f"{question} Answer in at most five words."
        return self.generate(images, question, ANSWER_TOKENS)

    def describe(self, images):
        """A free caption for each image."""
        return self.generate(images, "Describe this person." if self.kind == CHAT else None, CAPTION_TOKENS)

    @torch.inference_mode()
    def generate(self, images, text, max_new_tokens):
        decoded = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            inputs = self.inputs(batch, text).to(self.model.device)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            query = inputs.get("input_ids")
            # Decoders repeat their prompt.
            if query is not None and tokens.shape[1] >= query.shape[1] and tokens[:, : query.shape[1]].equal(query):
                tokens = tokens[:, query.shape[1] :]
            decoded += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def inputs(self, images, text):
        if self.kind == CHAT:
            content = [{"type": "text", "text": text}]
            chats = [[{"role": "user", "content": [{"type": "image", "image": image}, *content]}] for image in images]
            return self.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        text_inputs = {} if text is None else {"text": [text] * len(images)}
        if isinstance(self.processor, ImagesAndWords):
            return self.processor(images)
        return self.processor(images=images, return_tensors="pt", **text_inputs)


class ImagesAndWords:
    """The image processor and the tokenizer of a model that has no processor of its own."""

    def __init__(self, images, tokenizer):
        self.images, self.tokenizer = images, tokenizer

    def __call__(self, images):
        return self.images(images=images, return_tensors="pt")


def load_processor(name):
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if hasattr(processor, "tokenizer"):
        # Padding on the left: new tokens follow the prompt.
        processor.tokenizer.padding_side = "left"
        check_vocabulary(processor.tokenizer, name)
        return processor
    images = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    tokenizer = check_vocabulary(AutoTokenizer.from_pretrained(name, trust_remote_code=False), name)
    return ImagesAndWords(images, tokenizer)
