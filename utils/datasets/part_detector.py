"""Boxes of the parts of a person from an open-vocabulary detector of `transformers`, such as OWLv2, Grounding DINO."""

import torch
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from utils.files import one_line
from utils.synthetic.parts import PARTS

PHRASE = "the {} of the person"


class PartDetector:
    """`detector(images)`: for each picture {part: box in shares of it, or None}; the box of the highest score.

    Each part is asked for by itself: detectors that read all phrases as one text do not say which phrase a box is of.
    """

    def __init__(self, name, *, threshold=0.05, device="cpu"):
        self.name, self.threshold = name, threshold
        try:
            self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForZeroShotObjectDetection.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True
            )
        # The Hub's client and transformers raise error classes of their own.
        except Exception as error:
            raise ValueError(
                f"--detector {name} cannot be loaded: {one_line(error)}; give an open-vocabulary detector of "
                "transformers, such as google/owlv2-base-patch16 or IDEA-Research/grounding-dino-tiny"
            ) from None
        self.model = model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, images):
        images = [image.convert("RGB") for image in images]
        sizes = [(image.height, image.width) for image in images]
        found = [{} for _ in images]
        for part in PARTS:
            texts = [[PHRASE.format(part)] for _ in images]
            inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
            outputs = self.model(**inputs.to(self.model.device))
            if outputs.logits.shape[-1] > 1:
                self.score_by_part(outputs.logits, inputs["input_ids"], part)
            results = self.processor.post_process_grounded_object_detection(
                outputs, threshold=self.threshold, target_sizes=sizes
            )
            for boxes, result, size in zip(found, results, sizes, strict=True):
                boxes[part] = best_box(result, size)
        return found

    def score_by_part(self, logits, tokens, part):
        """Leave out of (B, boxes, tokens) in place what is not the part's own words: "person" is the whole one."""
        own = self.processor.tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids
        others = torch.ones(logits.shape[::2], dtype=torch.bool, device=logits.device)
        others[:, : tokens.shape[1]] = ~torch.isin(tokens, own.to(tokens.device))
        logits.masked_fill_(others[:, None], -torch.inf)


def best_box(result, size):
    """The box with the highest score in shares of the image, cut at its edges; None without one inside."""
    if not len(result["scores"]):
        return None
    height, width = size
    box = result["boxes"][int(result["scores"].argmax())].double().cpu() / torch.tensor([width, height] * 2)
    left, top, right, bottom = box.clamp(0, 1).tolist()
    return (left, top, right, bottom) if left < right and top < bottom else None
