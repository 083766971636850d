"""Draws the images of an identity: by the model just tuned to it, or later by its kept adapter."""

import json
from dataclasses import dataclass

from PIL import Image

from utils.diffusion.adapters import LORA, ORIGIN, TOKEN, load_adapter, save_adapter
from utils.generated import made_set
from utils.worklist import seed_of


@dataclass(frozen=True)
class Drawing:
    """How images are drawn and written; `sampling`: arguments of `TextToImage.sample`, `size`: (height, width)."""

    sampling: dict
    seed: int
    clothing_change: float
    size: tuple
    ending: str
    quality: int

    def draw(self, model, identity, record, prompts, numbers, folder):
        """Draw the images with these numbers into a scratch folder.

        Returns {file: path in the set}, the rows of the record, the pictures, and their prompts without the token.
        """
        folder.mkdir()
        texts = prompts.of_images(record, identity, numbers, self.seed, self.clothing_change)
        seeds = [seed_of(self.seed, identity.name, "image", number) for number in numbers]
        conditions = model.encode_all([text.with_token for text in texts])
        latents = model.sample(conditions, seeds, **self.sampling, fast=model.fast is not None)
        size = tuple(reversed(self.size))
        drawn = model.pictures(latents, self.sampling["batch_size"])
        pictures = [picture.resize(size, Image.Resampling.LANCZOS) for picture in drawn]
        style = {"ending": self.ending, "quality": self.quality, "model": model.digest}
        files, rows = made_set.write_images(folder, identity.name, numbers, pictures, texts, seeds, **style)
        return files, rows, pictures, [text.plain for text in texts]

    def settings(self, model):
        """What the table says of each image."""
        fast = model.fast and model.fast.digest
        return {"steps": self.sampling["steps"], "guidance": self.sampling["guidance"], "fast_lora": fast}

    def draw_tuned(self, identity, record, work, prompts, tunable, measures, count, *, keeps_adapter=False, **tuned):
        """Draw and measure the images of the identity that the model was just tuned to, and commit them.

        `tuned` goes into the record: what the tuning was.
        """
        model = tunable.model
        with work.scratch() as part:
            _, rows, pictures, plain = self.draw(model, identity, record, prompts, range(count), part / "images")
            own = [row["changed"] is None for row in rows]
            values, features = measures.of(identity.images(), pictures, plain, own)
            folders = {part / "images": f"images/{identity.name}"}
            if keeps_adapter:
                save_adapter(model, part / "adapter", *token_of(tunable, prompts, identity))
                folders[part / "adapter"] = f"adapters/{identity.name}"
            result = {name: record[name] for name in ("domain", "pid", "prompt", "identity_prompt")}
            result |= tuned | self.settings(model)
            result |= {"measures": values, "features": features, "images": rows}
            work.commit(identity.name, made_set.IMAGES, result, folders)
        work.forget(identity.name, made_set.FAILED)
        return True

    def redraw(self, identity, record, work, progress, prompts, tunable, measures, num_images):
        """Add the images that are missing by the identity's adapter. The record comes last and holds all images."""
        model, made = tunable.model, work.read(identity.name, made_set.IMAGES)
        load_adapter(model, work.folder / made_set.ADAPTERS / identity.name, *token_of(tunable, prompts, identity))
        old = [row | {"made_from": made_set.prompt_of(made, row)} for row in made["images"]]
        progress.stage(identity.name, "images")
        numbers = range(len(old), len(old) + made_set.images_to_add(made, record, num_images))
        with work.scratch() as part:
            files, rows, pictures, plain = self.draw(model, identity, record, prompts, numbers, part / "images")
            settings = self.settings(model) | {"made_from": record["identity_prompt"]}
            rows = old + [row | settings for row in rows]
            pictures = made_set.open_pictures(work.folder, old) + pictures
            plain = [prompts.without_token(row["prompt"], identity) for row in old] + plain
            own = [row.get("changed") is None for row in rows]
            values, features = measures.of(identity.images(), pictures, plain, own)
            made |= {name: record[name] for name in ("prompt", "identity_prompt")}
            made |= {"measures": values, "features": features, "images": rows}
            work.extend(identity.name, made_set.IMAGES, made, files)
        work.forget(identity.name, made_set.FAILED)
        return True


def token_of(tunable, prompts, identity):
    """The name of the identity's token and its row, which only a new token has."""
    return (prompts.token_of(identity), tunable.token.row) if prompts.has_new_tokens else ()


# What is kept of a tuning


def check_adapters(work, names, with_token):
    """ValueError unless each identity has images and a kept adapter. No model is loaded."""
    files = [LORA, TOKEN] if with_token else [LORA]
    without = [
        name
        for name in names
        if not work.has(name, made_set.IMAGES)
        or not all((work.folder / made_set.ADAPTERS / name / file).is_file() for file in files)
    ]
    if without:
        raise ValueError(
            f"--redraw: {work.folder / made_set.ADAPTERS} has no adapter of {len(without)} of {len(names)} "
            f"identities, {without[0]} for one. Adapters are kept by --save_adapters: run without --redraw and with "
            "it, or choose others with --ids"
        )
    lost = [path for name in names for path in made_set.lost_files(work, work.read(name, made_set.IMAGES))]
    if lost:
        raise ValueError(
            f"--redraw measures all images of an identity, and {lost[0]} is missing, {len(lost)} in all: put it back. "
            f"To make all images of an identity anew, remove its folder in {work.folder / made_set.ADAPTERS} and run "
            "without --redraw"
        )


def check_kept(work, names):
    """ValueError where a new tuning would replace images of an identity whose adapter is kept."""
    kept = [
        name for name in names if work.has(name, made_set.IMAGES) and (work.folder / made_set.ADAPTERS / name).is_dir()
    ]
    if kept:
        raise ValueError(
            f"{len(kept)} identities, {kept[0]} for one, have kept adapters and images, but not all that are asked "
            f"for. --redraw adds to them; to tune anew, which replaces them, remove {work.folder / made_set.ADAPTERS}"
        )


def check_origin(work, names, digest):
    """ValueError if an adapter was tuned from another model than the one with this digest."""
    for name in names:
        path = work.folder / made_set.ADAPTERS / name / ORIGIN
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
        except (OSError, ValueError, KeyError, TypeError):
            # An adapter that does not name its model: the images beside it do.
            model = work.read(name, made_set.IMAGES)["model"]
        if model != digest:
            raise ValueError(
                f"the adapter of {name} was tuned from the model {model}, this one is {digest}: give "
                "--pretrained_model_name_or_path of that model"
            )
