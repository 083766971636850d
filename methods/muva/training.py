"""MUVA: features of a whole person and of parts, under masks, drawn to texts of them; in DCAC's training.

An encoder with part tokens (`utils.modeling.networks.part_tokens`) gives f = [class | head | upper body | legs]. First
the words X of "A photo of a X X X X head of a person" are learned, for each identity y and each of the four:

    t_y = the four texts' features      v_y = mean of f over the images of y, unit length, from the untrained encoder
    L_cmp = cross-entropy(t/|t| V^T, y)                                 only X learns; the masks g are those given

Then the encoder learns under masks that it predicts, with T = t of all identities fixed:

    L = L_id + L_pcl + cross-entropy(f T^T / temperature, y), labels smoothed + L_bce + L_dice
    L_bce = mean BCE(m, g)      L_dice = 1 - mean Dice(sigmoid(m), g)   m: logits of the masks of each block

With diffusion, DCAC's L_ldm comes on top. Its condition is made of the classifier's probabilities as before, of those
of the texts, softmax(f T^T / temperature / tau), of the mean of both, or it has one token for each of the four.
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, broadcast_object_list
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from methods.muva.losses import extract_under, with_parts
from methods.muva.prompts import (
    FORMAT,
    LOG,
    PROMPTS,
    Begun,
    Texts,
    check_prompts,
    learn_words,
    load_tokenizer,
    read_prompts,
)
from utils.batches.part_images import loader_with_masks
from utils.batches.samplers import IdentitySampler
from utils.batches.transforms import test_transform
from utils.datasets.part_masks import PartMasks, is_drawn
from utils.files import run_record, sha256, to_json, write_together
from utils.modeling.backbones import read_config, tower_config
from utils.modeling.folder import model_kind
from utils.modeling.networks.part_tokens import PARTS, PartTokenBackbone
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import data_uri, sheet
from utils.training.report import spread

LOOKED_AT, COLOURS = 64, ((220, 60, 60), (60, 190, 80), (70, 110, 240))


class Parts:
    """Masks, texts and encoder of a training; what cannot be is a ValueError, before any weights are loaded."""

    def __init__(self, args):
        self.args, self.given, self.grid = args, None, None
        kind = model_kind(args.backbone)
        if kind == "backbone":
            config = read_config(args.backbone)
            if config.model_type not in ("clip", "clip_vision_model"):
                raise ValueError(
                    f"--encoder muva puts part tokens in a CLIP ViT, and --backbone {args.backbone} is a "
                    f"{config.model_type}: give a CLIP, or --encoder clip"
                )
            patch = tower_config(config).patch_size
            self.grid = tuple(size // patch for size in args.resolution)
        if not args.muva_prompts:
            if kind != "backbone" or config.model_type != "clip":
                raise ValueError(
                    f"--backbone {args.backbone} has no text encoder to learn prompts with: give a whole CLIP, or "
                    "--muva_prompts FILE of an earlier run"
                )
            load_tokenizer(args.backbone)
        else:
            self.given = read_prompts(args.muva_prompts)
        # A file may move, and one of the same name may change: a checkpoint knows the content.
        args.part_masks_digest = args.part_masks
        if args.part_masks and args.part_masks != ["rows"]:
            self.given_masks = PartMasks.read(args.part_masks)
            args.part_masks_digest = [sha256(path) for path in args.part_masks]

    def open(self, train, num_ids, data, say):
        """Find the masks of the training images. `data` identifies images and labels."""
        args, self.data = self.args, data
        if args.part_masks is None and not is_drawn(train):
            raise ValueError(
                f"--encoder muva needs the parts' masks, and {' + '.join(args.source)} are no drawn people: give "
                f"--part_masks FILE, made by python -m utils.datasets.part_masks {' '.join(args.source)} "
                + f"--root {args.data_root} " * bool(args.data_root)
                + "--detector google/owlv2-base-patch16 --out FILE; or --part_masks rows"
            )
        self.train, self.say = train, say
        if self.grid is not None:
            self.find_masks()
        if self.given is not None:
            found = self.given["data"]
            if found != data or len(self.given["text_features"]) != num_ids:
                raise ValueError(
                    f"--muva_prompts {args.muva_prompts} are of {len(self.given['text_features'])} identities of "
                    f"other images than --source holds ({num_ids} identities): learn them anew, without the flag"
                )
            before = json.loads(self.given["settings"] or "{}")
            for name in ("backbone", "memory_resample"):
                was, now = (Path(str(one)).name for one in (before.get(name), getattr(args, name)))
                if was != now:
                    say(f"The prompts of --muva_prompts were learned with --{name} {was}, not {now}")

    def encoder(self, encoder):
        """The model with part tokens, on the weights of a CLIP's; a model that has them keeps them."""
        self.had_tokens = isinstance(encoder.backbone, PartTokenBackbone)
        backbone = PartTokenBackbone.on(encoder.backbone, self.args.mask_heads)
        options = {name: getattr(encoder, name) for name in ("image_mean", "image_std", "resample")}
        model = ReIDModel(backbone, encoder.num_ids, **options).eval()
        model.notes = encoder.notes
        if self.had_tokens:
            model.bnneck.load_state_dict(encoder.bnneck.state_dict())
        if self.grid is None:
            self.grid = backbone.grid
            self.find_masks()
        if self.given is not None:
            check_prompts(self.args.muva_prompts, self.given, backbone)
        return model

    def find_masks(self):
        self.masks, missing = self.masks_of(self.train)
        if missing:
            self.say(f"{missing} of {len(self.train)} images have no part masks: every part is the whole image there")

    def masks_of(self, dataset):
        if self.args.part_masks is None:
            return PartMasks.true(dataset, self.grid).of(dataset)
        masks = PartMasks(self.grid) if self.args.part_masks == ["rows"] else self.given_masks
        masks.check_grid(self.grid)
        return masks.of(dataset)

    def prompts(self):
        return {"num_tokens": 1 + len(PARTS)} if self.args.probabilities == "parts" else {}

    def module(self, model_class, *modules, **options):
        names = "probabilities", "tau", "text_tau", "text_weight", "text_temperature"
        names += "mask_weight", "mask_lr_multiplier"
        own = {name: getattr(self.args, name) for name in names}
        return with_parts(model_class)(*modules, **own, **options)

    def extract(self, extract, encoder, *arguments, **options):
        if self.args.memory_masks == "predicted":
            return extract(encoder, *arguments, **options)
        return extract_under(self.masks, encoder, *arguments, **options)

    def loader(self, loader):
        return loader_with_masks(loader, self.masks, self.grid, loader.dataset.images.transform)

    def start(self, model, labels, accelerator, batch_size):
        """Stage 1, or the prompts of a file: the texts and part tokens that stage 2 starts from.

        Returns whether the training ends here.
        """
        given = self.given or self.learned(model.encoder, labels, accelerator, batch_size)
        tokens = model.encoder.backbone.model.part_tokens
        with torch.no_grad():
            if not self.had_tokens:
                tokens.copy_(given["part_tokens"])
            elif not torch.equal(tokens.cpu(), given["part_tokens"]):
                self.say("The part tokens are those of --backbone; those in the file of prompts are others")
            model.texts.copy_(given["text_features"])
        return self.args.muva_stage == "prompts"

    def learned(self, encoder, labels, accelerator, batch_size):
        """The first stage; or what it left in the folder, in a run that resumes before its first checkpoint."""
        args, folder, main = self.args, Path(self.args.output_dir), accelerator.is_main_process
        names = "backbone", "seed", "images_per_id", "muva_epochs", "muva_rate", "memory_resample"
        settings = {name: getattr(args, name) for name in names} | {"data": self.data, "batch": batch_size}
        # The centres depend on these.
        masks = hashlib.sha256(self.masks.numpy().tobytes()).hexdigest()
        settings |= {"masks": masks, "size": encoder.image_size, "precision": accelerator.mixed_precision}
        settings, resume = json.dumps(settings, sort_keys=True), bool(args.resume_from_checkpoint)
        left = read_prompts(folder / PROMPTS) if resume and main and (folder / PROMPTS).exists() else None
        (left,) = broadcast_object_list([left])
        if left and left["settings"] == settings:
            accelerator.print(f"Prompts and part tokens were learned before: {folder / PROMPTS}")
            return left
        if main:
            with write_together(folder) as part:
                part("args.json").write_text(to_json(run_record(args)))
        texts = Texts(args.backbone, encoder.num_ids, args.seed).to(accelerator.device)
        if texts(labels[:1].to(accelerator.device)).shape[1] != encoder.num_features:
            raise ValueError(f"the text encoder of {args.backbone} is of another width than its image encoder")
        transform = test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, args.memory_resample)
        options = {"accelerator": accelerator, "batch_size": args.eval_batch_size, "desc": "centres", "neck": False}
        features = extract_under(
            self.masks, encoder, self.train, transform, num_workers=args.dataloader_num_workers, **options
        )
        if not (finite := features.isfinite().all(1)).all():
            path = self.train[int(finite.int().argmin())]["path"]
            raise ValueError(f"the features of {path} are not finite: train with --mixed_precision no, or bf16")
        centres = torch.zeros(encoder.num_ids, features.shape[1]).index_add_(0, labels, features)
        # The mean of an identity's features has the direction of their sum.
        centres = F.normalize(centres, dim=1).to(accelerator.device)
        sampler = IdentitySampler(labels.tolist(), batch_size, args.images_per_id, args.seed)
        begun = Begun(folder, settings, resume=resume, writes=main)
        # All have read it before one of them writes.
        accelerator.wait_for_everyone()
        options = {"epochs": args.muva_epochs, "rate": args.muva_rate, "begun": begun}
        lines = learn_words(texts, centres, labels, sampler, **options)
        tensors = {"words": texts.words.detach(), "text_features": texts.of_all()}
        # Every process has learned the same words; machines may round differently.
        tensors = {name: broadcast(tensor.contiguous()).cpu() for name, tensor in tensors.items()}
        tensors["part_tokens"] = encoder.backbone.model.part_tokens.detach().cpu().contiguous()
        accelerator.print(
            f"Prompts learned in {len(lines)} steps, loss {lines[0]['loss']:.3f} -> {lines[-1]['loss']:.3f}"
        )
        if main:
            about = {"format": FORMAT, "data": json.dumps(self.data), "settings": settings}
            with write_together(folder) as part:
                part(LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
                save_file(tensors, part(PROMPTS), metadata=about)
            begun.end()
            print(f"Prompts and part tokens: {folder / PROMPTS}")
        return tensors

    # Results

    def note(self, training, epoch, encoder, targets):
        if training.accelerator.is_main_process:
            training.note(epoch, masks=self.overlaps(encoder, targets))

    def overlaps(self, encoder, targets):
        """{set: Dice of predicted and given masks} of some images of the sources and of drawn targets."""
        sets = {"source": self.train} | {f"{one.spec}": one.query for one in targets if is_drawn(one.query)}
        found = {}
        for name, dataset in sets.items():
            rows = spread(range(len(dataset)), LOOKED_AT)
            if name == "source":
                truth = self.masks[rows]
            else:
                looked_at = dataset.select(rows)
                truth = PartMasks.true(looked_at, self.grid).of(looked_at)[0]
            seen = predicted(encoder, [dataset[row]["image"] for row in rows]).flatten(2).cpu()
            found[f"dice {name}"] = dice(seen, truth)
        return found

    def illustrate(self, report, encoder, targets):
        """Add the predicted masks over images of each set."""
        sheets = []
        for name, dataset in [("training images", self.train), *((one.spec, one.query) for one in targets)]:
            images = [dataset[row]["image"].convert("RGB") for row in spread(range(len(dataset)), 6)]
            masks = predicted(encoder, images).cpu()
            rows = [[shown(image, encoder.image_size) for image in images]]
            rows.append([tinted(image, mask) for image, mask in zip(rows[0], masks, strict=True)])
            picture = sheet(rows)
            uri = data_uri(picture, height=picture.height, width=picture.width)
            sheets.append((uri, name, "images, and below them the masks"))
        words = "The patches that the last block's part tokens see: " + ", ".join(
            f"{part} {colour}" for part, colour in zip(PARTS, ("red", "green", "blue"), strict=True)
        )
        report.section("Part masks", words + ".")
        report.sheets(sheets)
        return report


def dice(seen, truth):
    """Mean over images and parts of masks (N, parts, patches); two empty masks agree."""
    sizes = seen.sum(2) + truth.sum(2)
    return float(torch.where(sizes > 0, 2 * (seen & truth).sum(2) / sizes.clamp(min=1), 1.0).mean())


@torch.no_grad()
def predicted(encoder, images):
    """The predicted masks of pictures: bool (B, parts, rows, columns)."""
    was_training = encoder.training
    transform = test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, encoder.resample)
    masks = encoder.eval().backbone.predicted_masks(
        torch.stack([transform(image) for image in images]).to(encoder.bnneck.weight.device)
    )
    encoder.train(was_training)
    return masks


def shown(image, size):
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def tinted(image, masks):
    """The patches of each part in its colour over the image; masks (parts, rows, columns)."""
    layer = image.copy()
    ink, (rows, columns) = ImageDraw.Draw(layer, "RGBA"), masks.shape[1:]
    high, wide = image.height / rows, image.width / columns
    for part, colour in zip(masks, COLOURS, strict=True):
        for row, column in part.nonzero().tolist():
            box = column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1
            ink.rectangle(box, fill=(*colour, 110))
    return layer
