"""The latent cache: the VAE's posterior of each image, computed once, stored on disk, sampled anew in every step.

The VAE is frozen and its images are not augmented, so the mean and std of an image's posterior are constant. They are
stored in `CACHE_DIR/latents/KEY`, where KEY is a digest of the VAE's encoder, the size and the precision, in chunks
whose name is the SHA-256 of their content. A chunk lists its images, so a subset, a larger data set or a resumed run
uses the stored posteriors and computes only the missing ones. You may remove any of the folders.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils.batches.chunks import CHUNK_BATCHES, computed_in_chunks, image_identities, weights_digest
from utils.batches.transforms import HALF, ReIDImages, TransformedImages, loader_of, resized, to_tensor

logger = logging.getLogger(__name__)
# Parts of a VAE and entries of its configuration that do not affect the posterior.
DECODER = ("decoder.", "post_quant_conv.")
APART = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast")
KEY_BYTES = 16
ABANDONED_AFTER = 3600
ROUNDS = 3


def image_for_vae(image, size):
    """A picture as input of the VAE: (3, height, width) in [-1, 1], stretched to `size`, not augmented."""
    return to_tensor(resized(image, size, "bicubic"), HALF, HALF)


class VaeImages(TransformedImages):
    """Rows of a data set as input of the VAE."""

    def __init__(self, dataset, size):
        super().__init__(dataset, partial(image_for_vae, size=tuple(size)))


@torch.no_grad()
def encode(vae, images):
    """Mean and std of the posterior, (B, C, h, w) float32, computed in the VAE's own type."""
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.std.float()


def sample_latents(mean, std, noise, scaling_factor, shift_factor=None):
    """Latents sampled from the posterior, in the scale of the U-Net."""
    return (mean + std * noise - (shift_factor or 0.0)) * scaling_factor


def scale_of(vae):
    """The factor and the shift between a VAE's latents and those of the network."""
    return vae.config.scaling_factor, vae.config.get("shift_factor")


def draw_noise(seed, step, shape, num_steps):
    """For the whole batch of a step: every process takes its share of one draw, and a resumed run draws it again."""
    number = int.from_bytes(hashlib.sha256(f"noise/{seed}/{step}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    posterior, noise = torch.randn(2, *shape, generator=generator)
    return posterior, noise, torch.randint(num_steps, shape[:1], generator=generator)


def inputs_of_step(vae, batch, seed, step, num_steps, process=0, num_processes=1):
    """Latents, noise and timesteps for one process's share of a batch, whose posteriors may be in it."""
    mean, std = (batch["means"], batch["stds"]) if "means" in batch else encode(vae, batch["vae_images"])
    own = slice(process * len(mean), (process + 1) * len(mean))
    drawn = draw_noise(seed, step, (num_processes * len(mean), *mean.shape[1:]), num_steps)
    posterior, noise, timesteps = (tensor[own].to(mean.device, non_blocking=True) for tensor in drawn)
    latents = sample_latents(mean, std, posterior, *scale_of(vae))
    return {"latents": latents, "noise": noise, "timesteps": timesteps}


def fixed_draws(vae, images, seed, count, num_steps):
    """`count` draws of (latents, noise, timesteps) for images of the VAE: the same whenever they are asked for."""
    mean, std = encode(vae, images)
    draws = []
    for number in range(count):
        drawn = draw_noise(seed, f"fixed/{number}", mean.shape, num_steps)
        posterior, noise, timesteps = (tensor.to(mean.device) for tensor in drawn)
        draws.append((sample_latents(mean, std, posterior, *scale_of(vae)), noise, timesteps))
    return draws


class LatentCache:
    """Posteriors of a data set's rows, mapped from the disk; it can be sent to a data loader's workers."""

    def __init__(self, folder, names, places):
        """`places` (rows, 2): for each row, the index of its chunk in `names` and its place in the chunk."""
        self.folder, self.names, self.places = Path(folder), names, places
        self.chunks = self._mapped()

    def __len__(self):
        return len(self.places)

    @property
    def shape(self):
        """The shape of one image's latents: (C, h, w)."""
        return tuple(self.chunks[0].shape[2:])

    def posterior(self, rows):
        """Mean and std of these rows, each (B, C, h, w) float32."""
        places = self.places[np.asarray(rows, dtype=np.int64)].tolist()
        values = torch.empty(2, len(places), *self.shape)
        for number, (chunk, place) in enumerate(places):
            values[:, number] = self.chunks[chunk][place]
        return values[0], values[1]

    def _mapped(self):
        try:
            return [_tensor(self.folder / name, "posterior") for name in self.names]
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"the latent cache in {self.folder} cannot be read: {error}; with several machines, --cache_dir must "
                "lie on a disk that all of them see"
            ) from None

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "chunks"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.chunks = self._mapped()


def build_latent_cache(
    dataset, vae, size, *, accelerator, cache_dir, vae_name, batch_size=16, num_workers=0, dtype=torch.float16
):
    """The posteriors of all images of `dataset`; each process computes its share of those that are not in the cache.

    `size` is (height, width) in pixels, `dtype` that of the files; `vae_name` is used in errors. The VAE is on the
    accelerator's device only while it computes. All processes must have access to `cache_dir`.
    """
    folder = Path(cache_dir).expanduser() / "latents" / cache_key(vae, size, dtype)
    main, home, pictures = accelerator.is_main_process, vae.device, VaeImages(dataset, size)
    keys = broadcast_object_list([image_keys(dataset) if main else None])[0]
    for attempt in range(ROUNDS):
        # One process searches the cache for all, so that their shares match.
        names, places, missing = broadcast_object_list([find(folder, keys) if main else None])[0]
        if not missing:
            vae.to(home)
            return LatentCache(folder, names, places)
        if attempt == ROUNDS - 1:
            break
        if main:
            prepare(folder)
        accelerator.wait_for_everyone()
        vae.to(accelerator.device)
        step = batch_size * CHUNK_BATCHES
        for rows, posteriors in computed_in_chunks(
            pictures,
            [missing[start : start + step] for start in range(0, len(missing), step)],
            lambda images: torch.stack(encode(vae, images), 1),
            accelerator=accelerator,
            batch_size=batch_size,
            num_workers=num_workers,
            total=len(dataset),
            desc="encoding",
        ):
            stored = posteriors.to(dtype)
            bad = (~stored.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(complaint(posteriors[bad[0]], dataset[rows[bad[0]]]["path"], vae, vae_name, dtype))
            write(folder, stored, [keys[row] for row in rows])
        accelerator.wait_for_everyone()
    raise ValueError(
        f"{len(missing)} of {len(dataset)} images are missing in the latent cache {folder} although they were just "
        "written: does something empty the folder, or is the disk failing? Choose another --cache_dir"
    )


def cache_key(vae, size, dtype):
    """A digest of everything that posteriors depend on, except the images."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_") and name not in APART}
    settings = [type(vae).__name__, config, weights_digest(vae, skip=DECODER), list(size), str(dtype), "bicubic"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]


def image_keys(dataset):
    """The key of each image in a chunk: a digest, without the image's folder."""
    descriptions = zip(dataset["domain"], image_identities(dataset), strict=True)
    return [hashlib.sha256(json.dumps(description).encode()).digest()[:KEY_BYTES] for description in descriptions]


def find(folder, keys):
    """(names of chunks that hold some of `keys`, the place of each key in them, list of missing rows).

    Damaged chunks are removed.
    """
    paths = sorted(folder.glob("*.safetensors"))
    listed, damaged = {}, []
    for path in paths:
        try:
            table = _tensor(path, "keys").numpy()
            listed[path.name] = [table[row].tobytes() for row in range(len(table))]
        except (OSError, SafetensorError):
            damaged.append(path.name)
    rows = {key: row for row, key in reversed(list(enumerate(keys)))}
    whole = set()
    with ThreadPoolExecutor(4) as pool:
        while True:
            holders = {}
            for name, chunk_keys in listed.items():
                for place, key in enumerate(chunk_keys):
                    if key in rows:
                        holders.setdefault(key, (name, place))
            used = sorted({name for name, _ in holders.values()})
            unchecked = [name for name in used if name not in whole]
            if not unchecked:
                break
            results = list(pool.map(lambda name: _is_whole(folder / name), unchecked))
            whole.update(name for name, good in zip(unchecked, results, strict=True) if good)
            for name in set(unchecked) - whole:
                damaged.append(name)
                del listed[name]
    if damaged:
        logger.warning("%d of %d files in %s are damaged; computing them again", len(damaged), len(paths), folder)
    for name in damaged:
        # Another run may have replaced it in the meantime.
        if not _is_whole(folder / name):
            with suppress(OSError):
                (folder / name).unlink()
    numbers = {name: number for number, name in enumerate(used)}
    places = np.full((len(keys), 2), -1, dtype=np.int32)
    for row, key in enumerate(keys):
        if key in holders:
            places[row] = numbers[holders[key][0]], holders[key][1]
    return used, places, sorted(row for key, row in rows.items() if key not in holders)


def prepare(folder):
    """Create the folder, check that it can be written to, and remove temporary files of killed runs."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for part in folder.glob("*.part"):
            # A younger file may still be in use by another run.
            if time.time() - part.stat().st_mtime > ABANDONED_AFTER:
                part.unlink(missing_ok=True)


def write(folder, posteriors, keys):
    table = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
    content = save({"keys": table, "posterior": posteriors.contiguous()})
    name = f"{_digest(content)}.safetensors"
    part = folder / f"{name}.{uuid.uuid4().hex}.part"
    with _writing(folder):
        try:
            with open(part, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, folder / name)
        finally:
            part.unlink(missing_ok=True)


def complaint(posterior, path, vae, vae_name, dtype):
    if posterior.isfinite().all():
        return (
            f"the posterior of {path} reaches {posterior.abs().max():.4g} in the VAE {vae_name}, too much for "
            f"{_plain(dtype)}; keep it in float32"
        )
    advice = "" if vae.dtype == torch.float32 else f" in {_plain(vae.dtype)}; run it in float32"
    return f"the posterior of {path} is not finite in the VAE {vae_name}{advice}"


def _plain(dtype):
    return str(dtype).removeprefix("torch.")


@contextmanager
def _writing(folder):
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the latent cache {folder} cannot be written: {error.strerror or error}; make room, or choose another "
            "--cache_dir"
        ) from None


def _tensor(path, name):
    """A tensor of a file, mapped from the disk instead of read."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _is_whole(path):
    try:
        return _digest(path.read_bytes()) == path.stem
    except OSError:
        return False


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:32]


class FeedbackImages(torch.utils.data.Dataset):
    """Training images with the input of the diffusion model: cached posteriors, or pictures for the VAE."""

    def __init__(self, dataset, labels, transform, cache=None, vae_size=None):
        self.images = ReIDImages(dataset, transform, labels)
        self.cache = cache
        self.for_vae = VaeImages(dataset, vae_size) if vae_size else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        row = self.images[item]
        if self.for_vae is not None:
            row["vae_images"] = self.for_vae[row["indices"]]
        return row

    def collate(self, rows):
        batch = torch.utils.data.default_collate(rows)
        if self.cache is not None:
            batch["means"], batch["stds"] = self.cache.posterior(batch["indices"])
        return batch


def feedback_loader(dataset, labels, transform, sampler, vae, size, *, accelerator, cache_dir, vae_name, num_workers):
    """Batches for the encoder; if there is a VAE, with the input of the diffusion model.

    Without `cache_dir` the VAE stays on the device and runs in every step.
    """
    cache = vae_size = None
    if vae is not None:
        vae.to(accelerator.device)
        if cache_dir is None:
            vae_size = size
        else:
            options = {"cache_dir": cache_dir, "vae_name": vae_name, "num_workers": num_workers}
            cache = build_latent_cache(dataset, vae, size, accelerator=accelerator, **options)
            vae.to("cpu")
    images = FeedbackImages(dataset, labels, transform, cache, vae_size)
    pin_memory = accelerator.device.type == "cuda"
    return loader_of(images, sampler, num_workers, pin_memory, collate_fn=images.collate)
