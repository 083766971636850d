"""The latent cache: same values and losses as the VAE in the loop, kills, damage, changes, several processes."""

import logging
import os
import pickle
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from tests import runs
from tests.runs import launch, stopped, torchrun
from utils.datasets.load import load_reid
from utils.datasets.schema import features
from utils.diffusion.latents import (
    VaeImages,
    build_latent_cache,
    cache_key,
    encode,
    find,
    image_for_vae,
    image_keys,
    prepare,
    sample_latents,
    write,
)
from utils.diffusion.schedule import NoiseSchedule, noise_loss
from utils.standins.build import TEXT_WIDTH, build_scheduler, build_unet, build_vae

SIZE = (32, 32)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return build_vae()


def people(num_ids=4):
    return load_reid("synthetic", domain="a", num_ids=num_ids)["train"]


def build(dataset, vae, cache_dir, size=SIZE, **options):
    options = {"accelerator": Accelerator(cpu=True), "vae_name": "tiny", "batch_size": 2} | options
    return build_latent_cache(dataset, vae, size, cache_dir=cache_dir, **options)


def build_alone(cache_dir, num_ids):
    """What a process of its own does; one of several by torch's variables in the environment."""
    torch.manual_seed(0)
    vae = build_vae()
    with counted(vae) as seen:
        build(people(num_ids), vae, cache_dir)
    cache_dir.with_name(f"batches-{os.environ.get('RANK')}").write_text(str(len(seen)))


def files(cache_dir):
    return {path.relative_to(cache_dir): path.read_bytes() for path in Path(cache_dir).rglob("*.safetensors")}


@contextmanager
def counted(vae):
    """Shapes of what the VAE's encoder is given."""
    seen = []
    hook = vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    yield seen
    hook.remove()


def pictures_on_disk(folder, count=6):
    """A data set of files: its images can be changed."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"{number:04d}.png" for number in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (24, 12, 3), dtype=np.uint8)).save(folder / name)
    columns = {
        "image": [{"bytes": None, "path": str(folder / name)} for name in names],
        "pid": [0] * count,
        "camid": [0] * count,
        "domain": ["disk"] * count,
        "path": names,
    }
    return datasets.Dataset.from_dict(columns, features=features())


def direct(vae, dataset, rows, size=SIZE):
    """The posterior by diffusers itself, from pixels by Pillow and NumPy."""
    images = []
    for row in rows:
        image = dataset[row]["image"].resize((size[1], size[0]), Image.Resampling.BICUBIC)
        images.append(np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 127.5 - 1)
    with torch.no_grad():
        return vae.encode(torch.from_numpy(np.stack(images)).float()).latent_dist


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_image_is_stretched_to_the_size(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (51, 23), dtype=np.uint8))
    got = image_for_vae(image, size)
    want = np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC), dtype=np.float64)
    np.testing.assert_allclose(got, want.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert got.dtype == torch.float32 and got.shape == (3, *size)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 2**-11)])
def test_posterior_is_that_of_the_vae(vae, tmp_path, dtype, tolerance):
    data = people()
    cache = build(data, vae, tmp_path, (64, 32), batch_size=3, dtype=dtype)
    rows = [31, 0, 7, 7, 20]
    want = direct(vae, data, rows, (64, 32))
    for given in (rows, torch.tensor(rows)):
        mean, std = cache.posterior(given)
        torch.testing.assert_close(mean, want.mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(std, want.std, rtol=tolerance, atol=tolerance)
        assert mean.dtype == std.dtype == torch.float32 and mean.is_contiguous() and std.is_contiguous()
    assert len(cache) == len(data) == 32 and cache.shape == (4, 8, 4)
    assert [len(part) for part in cache.posterior([])] == [0, 0]


def test_sample_is_that_of_diffusers(vae):
    data = people()
    posterior = direct(vae, data, range(3))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    want = posterior.sample(generator=torch.Generator().manual_seed(1)) * vae.config.scaling_factor
    images = torch.stack([VaeImages(data, SIZE)[row] for row in range(3)])
    got = sample_latents(*encode(vae, images), noise, vae.config.scaling_factor)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    # Stable Diffusion 3 and Flux: (z - shift) * scale
    shifted = sample_latents(*encode(vae, images), noise, 2.0, 0.5)
    torch.testing.assert_close(shifted, (want / vae.config.scaling_factor - 0.5) * 2, rtol=1e-5, atol=1e-5)


def test_encode_computes_in_the_type_of_the_vae_even_under_autocast(vae):
    images = torch.rand(2, 3, *SIZE) * 2 - 1
    plain = encode(vae, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(encode(vae, images), plain, strict=True))
    mean, std = encode(vae.to(torch.bfloat16), images)
    assert mean.dtype == std.dtype == torch.float32 and not mean.requires_grad
    assert torch.equal(mean, mean.bfloat16().float()) and not torch.equal(mean, plain[0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_losses_are_those_with_the_vae_in_the_loop(vae, tmp_path, dtype, tolerance):
    data, unet = people(), build_unet()
    cache = build(data, vae, tmp_path, dtype=dtype)
    schedule = NoiseSchedule(build_scheduler().config)
    generator = torch.Generator().manual_seed(0)
    images = VaeImages(data, SIZE)
    for rows in ([0, 5, 9, 31], [30, 2, 17, 4]):
        posterior, noise = torch.randn(2, 4, *cache.shape, generator=generator)
        timesteps = torch.randint(1000, (4,), generator=generator)
        condition = torch.randn(4, 1, TEXT_WIDTH, generator=generator)
        losses = []
        for mean, std in (cache.posterior(rows), encode(vae, torch.stack([images[row] for row in rows]))):
            latents = sample_latents(mean, std, posterior, vae.config.scaling_factor)
            losses.append(noise_loss(unet, schedule, latents, noise, timesteps, condition).item())
        assert losses[0] == pytest.approx(losses[1], rel=tolerance) and losses[0] > 0


def test_subset_and_larger_set_take_what_is_there(vae, tmp_path):
    build(people(2), vae, tmp_path)
    with counted(vae) as seen:
        again = build(people(2), vae, tmp_path)
        subset = build(people(2).select([9, 3]), vae, tmp_path)
        assert not seen
        larger = build(people(3), vae, tmp_path)
        # Eight new images, two a batch.
        assert seen == [(2, 3, *SIZE)] * 4
    want = direct(vae, people(3), range(24))
    for cache, rows in ((again, range(16)), (subset, [9, 3]), (larger, range(24))):
        mean, _ = cache.posterior(list(range(len(cache))))
        torch.testing.assert_close(mean, want.mean[list(rows)], rtol=1e-3, atol=1e-3)


def test_every_batch_has_the_same_shape_and_an_image_is_computed_once(vae, tmp_path):
    data = people(2).select([0, 1, 2, 1, 0])
    with counted(vae) as seen:
        cache = build(data, vae, tmp_path, batch_size=4)
    assert seen == [(4, 3, *SIZE)]
    mean, _ = cache.posterior(range(5))
    assert torch.equal(mean[:2].flip(0), mean[3:]) and not torch.equal(mean[0], mean[1])


def test_a_changed_image_is_computed_again(vae, tmp_path):
    data = pictures_on_disk(tmp_path / "data")
    before, _ = build(data, vae, tmp_path / "cache").posterior(range(6))
    Image.new("RGB", (12, 24), (200, 30, 30)).save(tmp_path / "data" / "0003.png")
    with counted(vae) as seen:
        cache = build(data, vae, tmp_path / "cache")
    assert len(seen) == 1
    after, _ = cache.posterior(range(6))
    torch.testing.assert_close(after, direct(vae, data, range(6)).mean, rtol=1e-3, atol=1e-3)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)].index(False) == 3
    names = b"".join(files(tmp_path / "cache").values())
    assert b"0003" not in names and str(tmp_path).encode() not in names


def test_another_vae_size_or_precision_makes_another_entry(vae, tmp_path):
    data = people(2)
    folders = {build(data, vae, tmp_path).folder}
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    assert build(data, vae, tmp_path).folder in folders
    folders.add(build(data, vae, tmp_path, size=(32, 64)).folder)
    folders.add(build(data, vae, tmp_path, dtype=torch.float32).folder)
    vae.register_to_config(norm_num_groups=4)
    folders.add(build(data, vae, tmp_path).folder)
    with torch.no_grad():
        vae.quant_conv.bias[0] += 0.5
    changed, want = build(data, vae, tmp_path), direct(vae, data, range(16))
    folders.add(changed.folder)
    folders.add(build(data, vae.to(torch.bfloat16), tmp_path).folder)
    assert len(folders) == 6
    torch.testing.assert_close(changed.posterior(range(16))[0], want.mean, rtol=1e-3, atol=1e-3)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "a bit of the header": lambda path: flip(path, 20),
    "a bit of the keys": lambda path: flip(path, path.read_bytes().index(b"}}") + 30),
    "a bit of the latents": lambda path: flip(path, -1000),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "a short file": lambda path: path.write_bytes(b"what"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_noticed_and_made_again(vae, tmp_path, caplog, damage):
    build(people(), vae, tmp_path)
    whole = files(tmp_path)
    DAMAGE[damage](tmp_path / sorted(whole)[0])
    assert files(tmp_path) != whole
    with caplog.at_level(logging.WARNING), counted(vae) as seen:
        build(people(), vae, tmp_path)
    assert files(tmp_path) == whole and len(whole) == 2 and len(seen) == 8
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 2 files in {tmp_path / sorted(whole)[0].parent} are damaged; computing them again"
    ]


def test_any_flipped_bit_of_header_and_keys_is_noticed(vae, tmp_path):
    folder, keys = build(people(1), vae, tmp_path).folder, image_keys(people(1))
    (path,) = folder.iterdir()
    content = path.read_bytes()
    assert find(folder, keys)[2] == []
    for position in range(len(content) - 8 * 2 * 4 * 4 * 4 * 2):
        for bit in range(8):
            broken = bytearray(content)
            broken[position] ^= 1 << bit
            path.write_bytes(broken)
            assert find(folder, keys)[2] == list(range(8)), (position, bit)


def test_killed_build_goes_on_to_the_same_bytes(vae, tmp_path):
    killed = stopped(runs.start(build_alone, tmp_path / "killed", 32), lambda: len(files(tmp_path / "killed")) >= 3)
    assert killed.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert 3 <= len(kept) < 16
    folder = next(iter(kept)).parent
    # What kills in the middle of a write leave: of long ago, and perhaps of another run that still writes.
    (folder / "old.safetensors.part").write_bytes(b"half")
    os.utime(folder / "old.safetensors.part", (0, 0))
    (folder / "young.safetensors.part").write_bytes(b"half")
    with counted(vae) as seen:
        build(people(32), vae, tmp_path / "killed")
    assert len(seen) == 128 - 8 * len(kept)
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    build(people(32), vae, tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "whole") and len(files(tmp_path / "whole")) == 16
    assert [path.name for path in folder.glob("*.part") if path.stem != "young.safetensors"] == []
    assert (folder / "young.safetensors.part").exists()


def test_two_processes_write_the_same_bytes_as_one(vae, tmp_path):
    launch(build_alone, tmp_path / "two", 6, processes=2)
    build(people(6), vae, tmp_path / "one")
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "one")) == 3
    # Three chunks of eight batches, shared.
    assert [(tmp_path / f"batches-{rank}").read_text() for rank in "01"] == ["16", "8"]


@pytest.mark.slow
def test_torchrun_writes_the_same_bytes(vae, tmp_path):
    script = tmp_path / "build.py"
    script.write_text(
        "import torch\nfrom tests.diffusion.test_latents import build, build_vae, people\ntorch.set_num_threads(1)\n"
        f"torch.manual_seed(0)\ncache = build(people(6), build_vae(), {str(tmp_path / 'two')!r})\n"
        "assert torch.distributed.get_world_size() == 2 and len(cache) == 48\n"
    )
    torchrun(script)
    build(people(6), vae, tmp_path / "one")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_two_runs_at_once_share_a_folder(vae, tmp_path):
    started = [runs.start(build_alone, tmp_path / "shared", 8) for _ in range(2)]
    assert [run.wait().returncode for run in started] == [0, 0]
    with counted(vae) as seen:
        cache = build(people(8), vae, tmp_path / "shared")
    mean, _ = cache.posterior(range(64))
    torch.testing.assert_close(mean, direct(vae, people(8), range(64)).mean, rtol=1e-3, atol=1e-3)
    assert not seen and not list(tmp_path.rglob("*.part"))


class Rows(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(self.cache)

    def __getitem__(self, row):
        return row

    def collate(self, rows):
        return self.cache.posterior(rows)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_hold_the_cache(vae, tmp_path, context):
    cache = build(people(), vae, tmp_path)
    rows = Rows(cache)
    loader = torch.utils.data.DataLoader(
        rows, 8, num_workers=2, collate_fn=rows.collate, multiprocessing_context=context
    )
    means, stds = (torch.cat(parts) for parts in zip(*loader, strict=True))
    want = cache.posterior(range(32))
    assert torch.equal(means, want[0]) and torch.equal(stds, want[1])


def test_pickle_holds_no_latents(vae, tmp_path):
    cache = build(people(), vae, tmp_path)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 2000 < 32 * 2 * 4 * 4 * 4 * 2
    assert torch.equal(pickle.loads(pickled).posterior([5])[0], cache.posterior([5])[0])
    next(cache.folder.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be read.*--cache_dir must lie on a disk that all of them see"):
        pickle.loads(pickled)


def test_latents_are_mapped_not_read(vae, tmp_path):
    cache = build(people(), vae, tmp_path)
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("shown by Linux only")
    assert all(str(cache.folder / name) in mapped.read_text() for name in cache.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_vae_is_on_the_gpu_only_to_compute(vae, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    data, devices = people(), set()
    with vae.encoder.register_forward_pre_hook(lambda _, inputs: devices.add(inputs[0].device.type)):
        cache = build(data, vae, tmp_path, accelerator=Accelerator(), dtype=torch.float32)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert devices == {"cuda"} and vae.device.type == "cpu"
    mean, std = cache.posterior(range(32))
    want = direct(vae, data, range(32))
    torch.testing.assert_close(mean, want.mean, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(std, want.std, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value, dtype", [(7e4, torch.float16), (float("nan"), torch.float32)])
def test_what_cannot_be_kept_names_the_image(vae, tmp_path, value, dtype):
    with torch.no_grad():
        vae.quant_conv.bias[1] = value
    expected = "reaches 7e\\+04 .* too much for float16; keep it in float32" if value > 0 else "is not finite"
    with pytest.raises(ValueError, match=rf"posterior of synthetic-a/s0/0000_c\d_\d{{4}}.png {expected}"):
        build(people(2), vae, tmp_path, dtype=dtype)
    if value > 0:
        cache = build(people(2), vae, tmp_path, dtype=torch.float32)
        assert cache.posterior([3])[0][0, 1].mean() == pytest.approx(7e4, rel=1e-3)


def test_one_error_where_nothing_can_be_written(vae, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="cannot be written: Not a directory; make room, or choose another"):
        with counted(vae) as seen:
            build(people(2), vae, tmp_path / "file")
    assert not seen


def test_one_error_where_the_disk_is_full(vae, tmp_path):
    """A limit on the size of files stands for a full disk: the write fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ValueError, match="latent cache .* cannot be written: File too large; make room"):
            build(people(2), vae, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    build(people(2), vae, tmp_path)


def test_a_full_cache_needs_no_right_to_write(vae, tmp_path):
    folder = build(people(2), vae, tmp_path).folder
    changed = folder.stat().st_mtime_ns
    build(people(2), vae, tmp_path)
    # A file that is made, even for a moment, changes the time of its folder; root may do so in any folder.
    assert folder.stat().st_mtime_ns == changed


@pytest.mark.slow
def test_a_benchmark_of_full_size_opens_quickly(tmp_path):
    """As many images as MSMT17 has for training, at the real size; about a second, loosely."""
    count = 32_621
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 128)).save(tmp_path / "0.jpg")
    names = [f"{number:05d}.jpg" for number in range(count)]
    for name in names:
        os.link(tmp_path / "0.jpg", tmp_path / "data" / name)
    columns = {
        "image": [{"bytes": None, "path": str(tmp_path / "data" / name)} for name in names],
        "pid": [0] * count,
        "camid": [0] * count,
        "domain": ["msmt17"] * count,
        "path": names,
    }
    data = datasets.Dataset.from_dict(columns, features=features())
    vae, keys = build_vae(), image_keys(data)
    folder = tmp_path / "cache" / "latents" / cache_key(vae, (128, 128), torch.float16)
    prepare(folder)
    for start in range(0, count, 128):
        some = keys[start : start + 128]
        posteriors = torch.full((len(some), 2, 4, 16, 16), start / 128, dtype=torch.float16)
        write(folder, posteriors, some)
    begin = time.monotonic()
    cache = build(data, vae, tmp_path / "cache", (128, 128))
    seconds = time.monotonic() - begin
    assert cache.posterior([0, 128, count - 1])[0][:, 0, 0, 0].tolist() == [0, 1, 254] and len(cache) == count
    assert seconds < 5
    print(f"opened in {seconds:.2f} s")
