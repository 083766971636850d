"""The models that score a set: given ones are opened, the others trained and kept; CLIP with its sentences."""

from dataclasses import dataclass
from urllib.parse import quote

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPProcessor

from utils.filter_models import clip_size, given, left_out
from utils.filter_scoring import View, view_of
from utils.filter_training import train_model
from utils.modeling import ReIDModel
from utils.targets import extract


@dataclass
class Models:
    """What scores the images of one source; `gallery` holds the features of its images, in their order."""

    reid: ReIDModel
    classifier: ReIDModel | None
    gallery: torch.Tensor
    labels: torch.Tensor
    label_of: dict
    paths: list


@dataclass
class Clip:
    """CLIP and the unit-length features of what it could see, the sentence that is wanted first."""

    model: CLIPModel
    view: View
    sentences: torch.Tensor

    def features(self, images):
        square = self.view.size == own_size(self.model)
        found = self.model.get_image_features(pixel_values=images, interpolate_pos_encoding=not square)
        return F.normalize(as_tensor(found).float(), dim=1)

    @property
    def scale(self):
        return self.model.logit_scale.float().exp()


def own_size(clip):
    return (clip.config.vision_config.image_size,) * 2


def as_tensor(output):
    """A tensor in older versions of transformers, an output object in newer ones."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def load_clip(args, device):
    """None where it is left out. A picture is squeezed into CLIP's square as a whole: its own crop would behead."""
    if left_out(args, "clip"):
        return None
    try:
        clip = CLIPModel.from_pretrained(args.clip_model, use_safetensors=True).to(device).eval()
        processor = CLIPProcessor.from_pretrained(args.clip_model)
    # The Hub, the readers of weights and those of words have errors of their own, which name no model.
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ValueError(f"--clip_model: {args.clip_model!r} cannot be loaded: {error}") from error
    sentences = [args.clip_sentence, *args.clip_others]
    tokens = processor.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(device)
    with torch.inference_mode():
        features = F.normalize(as_tensor(clip.get_text_features(**tokens)).float(), dim=1)
    images = processor.image_processor
    view = View(clip_size(args) or own_size(clip), "bicubic", tuple(images.image_mean), tuple(images.image_std))
    return Clip(clip, view, features)


def load_models(args, sources, folder, accelerator):
    """{domain: Models}; those that are not given are trained, each by one process, and kept in `folder`."""
    kinds = {"reid": given(args.reid_model, sources, "--reid_model")}
    if not left_out(args, "cctf"):
        kinds["classifier"] = given(args.classifier_model, sources, "--classifier_model")
    places = {kind: names or {} for kind, names in kinds.items()}
    wanted = [(kind, domain) for kind, names in kinds.items() if names is None for domain in sources]
    for kind, domain in wanted:
        # A domain may be called as no folder can be, or as one elsewhere.
        places[kind][domain] = folder / f"{kind}-{quote(domain, safe='')}"
    for kind, domain in wanted[accelerator.process_index :: accelerator.num_processes]:
        if not (places[kind][domain] / "model.safetensors").is_file():
            quiet = not accelerator.is_main_process
            train_model(kind, sources[domain], args, accelerator.device, quiet).save_pretrained(places[kind][domain])
    accelerator.wait_for_everyone()
    models = {}
    for domain, source in sources.items():
        reid = ReIDModel.from_pretrained(places["reid"][domain], num_ids=0).to(accelerator.device)
        classifier = None
        if "classifier" in places:
            classifier = ReIDModel.from_pretrained(places["classifier"][domain]).to(accelerator.device)
        gallery = extract(
            reid,
            source.train,
            view_of(reid).transform(),
            accelerator=accelerator,
            batch_size=args.eval_batch_size,
            desc=f"features of {domain}",
        ).to(accelerator.device)
        label_of = {pid: label for label, pid in enumerate(source.pids)}
        labels = source.labels.to(accelerator.device)
        models[domain] = Models(reid, classifier, gallery, labels, label_of, source.train["path"][:])
    return models
