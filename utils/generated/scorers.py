"""The models that score a generated set: given models are loaded, the others trained on the source and saved."""

import random
from dataclasses import dataclass
from urllib.parse import quote

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor

from utils.batches.augmentation import change_scene
from utils.batches.samplers import IdentitySampler
from utils.batches.transforms import ReIDImages, train_transform
from utils.diffusion.families.texts import check_vocabulary
from utils.evaluation.features import extract
from utils.generated.scoring import View, view_of
from utils.modeling.losses import hard_triplet
from utils.modeling.reid_model import ReIDModel


@dataclass
class Scorers:
    """The models that score the images of one source; `gallery` holds the features of its images, in their order."""

    reid: ReIDModel
    classifier: ReIDModel | None
    gallery: torch.Tensor
    labels: torch.Tensor
    label_of: dict
    paths: list


@dataclass
class Clip:
    """CLIP and the unit-length features of its sentences; the first sentence describes a wanted image."""

    model: CLIPModel
    view: View
    sentences: torch.Tensor

    def features(self, images):
        square = self.view.size == own_size(self.model)
        output = self.model.get_image_features(pixel_values=images, interpolate_pos_encoding=not square)
        return F.normalize(as_tensor(output).float(), dim=1)

    @property
    def scale(self):
        return self.model.logit_scale.float().exp()


def own_size(clip):
    return (clip.config.vision_config.image_size,) * 2


def as_tensor(output):
    """The features as a tensor; older versions of transformers return one, newer ones an output object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def load_clip(wanted, device):
    """`Clip`, or None if the filter is skipped. Images are resized whole: CLIP's own crop would cut off heads."""
    if not wanted.has_clip:
        return None
    try:
        clip = CLIPModel.from_pretrained(wanted.clip, use_safetensors=True).to(device).eval()
        processor = CLIPProcessor.from_pretrained(wanted.clip)
        check_vocabulary(processor.tokenizer, wanted.clip)
    # The Hub, the weights and the tokenizer raise errors that do not name the model.
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ValueError(f"--clip_model: {wanted.clip!r} cannot be loaded: {error}") from error
    tokens = processor.tokenizer(wanted.sentences, padding=True, truncation=True, return_tensors="pt").to(device)
    with torch.inference_mode():
        features = F.normalize(as_tensor(clip.get_text_features(**tokens)).float(), dim=1)
    images = processor.image_processor
    size = tuple(wanted.clip_size or own_size(clip))
    view = View(size, "bicubic", tuple(images.image_mean), tuple(images.image_std))
    return Clip(clip, view, features)


def load_models(wanted, sources, folder, accelerator, *, batch_size):
    """{domain: Scorers}. A model that is not given is trained by one process and saved in `folder`."""
    kinds = {"reid": wanted.reid} | ({"classifier": wanted.classifiers} if wanted.has_cctf else {})
    paths = {kind: names or {} for kind, names in kinds.items()}
    to_train = [(kind, domain) for kind, names in kinds.items() if names is None for domain in sources]
    for kind, domain in to_train:
        # Quoted: a domain's name may be invalid for a folder, or lead elsewhere.
        paths[kind][domain] = folder / f"{kind}-{quote(domain, safe='')}"
    for kind, domain in to_train[accelerator.process_index :: accelerator.num_processes]:
        if not (paths[kind][domain] / "model.safetensors").is_file():
            model = train_model(
                kind, sources[domain], wanted.training, accelerator.device, quiet=not accelerator.is_main_process
            )
            model.save_pretrained(paths[kind][domain])
    accelerator.wait_for_everyone()
    models = {}
    for domain, source in sources.items():
        reid = ReIDModel.from_pretrained(paths["reid"][domain], num_ids=0).to(accelerator.device)
        classifier = None
        if "classifier" in paths:
            classifier = ReIDModel.from_pretrained(paths["classifier"][domain]).to(accelerator.device)
        gallery = extract(
            reid,
            source.train,
            view_of(reid).transform(),
            accelerator=accelerator,
            batch_size=batch_size,
            desc=f"features of {domain}",
        ).to(accelerator.device)
        label_of = {pid: label for label, pid in enumerate(source.pids)}
        labels = source.labels.to(accelerator.device)
        models[domain] = Scorers(reid, classifier, gallery, labels, label_of, source.train["path"][:])
    return models


LABEL_SMOOTHING, ERASING, WEIGHT_DECAY, WARMUP = 0.1, 0.5, 1e-4, 0.1


def train_model(kind, source, training, device, quiet=False):
    """Train a model on one source, in a single process.

    `reid`: the head of `--reid_method`, cross-entropy and triplet loss, on the images that are not held out, with
    padded crops, mirroring, scene changes and erasing. `classifier`: BNNeck and cross-entropy on all images, with
    mirroring only, so that it uses the whole image, scene included.
    """
    set_seed(training.seed)
    size, reid = tuple(training.resolution), kind == "reid"
    method = training.reid_method if reid else "bot"
    model = ReIDModel.for_training(training.backbone, num_ids=len(source.pids), image_size=size, method=method).to(
        device
    )
    rows = (~source.held_out).nonzero().flatten().tolist() if reid else list(range(len(source.train)))
    images, labels = source.train.select(rows), source.labels[rows].tolist()
    # With few identities, the batch is smaller.
    batch_size = min(training.train_batch_size, training.images_per_id * len(source.pids))
    sampler = IdentitySampler(labels, batch_size, training.images_per_id, training.seed)
    # Pixels between 0 and 1, as the scene change needs them.
    plain = train_transform(size, (0.0,) * 3, (1.0,) * 3, padding=size[0] // 25 if reid else 0, erasing=0.0)
    loader = torch.utils.data.DataLoader(
        ReIDImages(images, plain, labels),
        batch_sampler=sampler,
        num_workers=training.num_workers,
        persistent_workers=training.num_workers > 0,
    )
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(params, lr=training.learning_rate, weight_decay=WEIGHT_DECAY)
    epochs = training.num_train_epochs if reid else training.classifier_epochs
    total = sum(1 for epoch in range(epochs) for _ in sampler.global_batches(epoch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=max(total, 2), pct_start=WARMUP
    )
    change = SceneChange(model, training.seed) if reid else view_of(model).scaled
    model.train()
    bar = tqdm(total=total, desc=f"training {kind} of {source.domain}", disable=True if quiet else None)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            targets = batch["labels"].to(device)
            # BDB drops a rectangle of each batch.
            rng = random.Random(f"step/{training.seed}/{bar.n}")
            output = model.outputs(model.pool(change(batch["images"]).to(device), rng).float())
            smoothing = LABEL_SMOOTHING if reid else 0.0
            losses = [F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) for logits in output.logits]
            loss = torch.stack(losses).mean()
            if reid:
                loss = loss + torch.stack([hard_triplet(embedding, targets) for embedding in output.compared]).mean()
            if not torch.isfinite(loss):
                raise ValueError(
                    f"training the {kind} model of {source.domain}: the loss is not finite at step {bar.n + 1}; "
                    f"lower --learning_rate {training.learning_rate}"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
    bar.close()
    return model.eval()


class SceneChange:
    """Changes the scenes of images between 0 and 1, scales them for the model and erases some at random."""

    def __init__(self, model, seed):
        self.view = view_of(model)
        self.eraser = train_transform(self.view.size, erasing=ERASING)
        self.generator, self.rng = torch.Generator().manual_seed(seed), random.Random(f"erasing/{seed}")

    def __call__(self, images):
        images = self.view.scaled(change_scene(images, self.generator))
        for image in images:
            if self.rng.random() < self.eraser.erasing:
                self.eraser.erase(image, self.rng)
        return images
