"""Where a person is in an image, by any segmentation model of `transformers`: soft masks at the size of latents."""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, pipeline

from utils.files import one_line
from utils.modeling.folder import ask_hub

PERSON = {"person", "people", "pedestrian", "human"}
# In the name of a class.
SEGMENTING = ("Segmentation", "MaskFormer", "Mask2Former", "OneFormer", "EoMT", "Eomt")
BACKGROUND = {"background", "unlabeled", "unlabelled", "void", "other"}


def check_mask_model(name):
    """ValueError, before weights are loaded, unless the model's labels tell people from the rest. Returns a test."""
    try:
        if not Path(name).is_dir():
            ask_hub(name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"--mask_model {name}: its configuration cannot be read: {one_line(error)}") from error
    labels, built = config.id2label.values(), config.architectures or []
    # transformers would put a new head of random weights on the network of a detector.
    if not any(word in name_of_class for name_of_class in built for word in SEGMENTING):
        raise ValueError(f"--mask_model {name} is no segmentation model but a {', '.join(built) or 'network'}")
    people = {label for label in labels if PERSON & words_of(label)}
    if people:
        return lambda label: label in people
    # A model of garments: a person is all that is no background.
    if any(BACKGROUND & words_of(label) for label in labels):
        return lambda label: not BACKGROUND & words_of(label)
    shown = ", ".join(list(labels)[:6])
    raise ValueError(f"--mask_model {name} knows no person and no background, only {shown}; choose another")


def words_of(label):
    return set(re.findall(r"[a-z0-9]+", str(label).lower()))


class PersonMasks:
    """`of(images, size)`: the share of each cell that shows a person, (N, 1, h, w), and how many show nobody."""

    def __init__(self, name, device="cpu"):
        self.is_person = check_mask_model(name)
        try:
            self.segment = pipeline(
                "image-segmentation", model=name, device=device, model_kwargs={"use_safetensors": True}
            )
        except Exception as error:
            raise ValueError(f"--mask_model {name} cannot be loaded: {one_line(error)}") from error

    def weights(self, images, size, background):
        """Weights of cells in a loss, (N, 1, h, w), `background` where nobody is; how many images show nobody."""
        cells, empty = self.of(images, size)
        return cells * (1 - background) + background, empty

    @torch.inference_mode()
    def of(self, images, size):
        """An image that shows nobody counts whole: its mask is all ones."""
        masks, empty = [], 0
        for image in images:
            image = image.convert("RGB")
            seen = np.zeros(image.size[::-1], bool)
            for part in self.segment(image):
                if self.is_person(part["label"]):
                    seen |= np.asarray(part["mask"]) > 0
            if not seen.any():
                empty += 1
                seen |= True
            whole = torch.from_numpy(seen.astype(np.float32))[None, None]
            masks.append(F.interpolate(whole, size, mode="area")[0])
        return torch.stack(masks), empty
