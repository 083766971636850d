"""`model.extract` and `model.similarity`: images as people have them, any number of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.batches.transforms import test_transform
from utils.modeling.names import open_backbone
from utils.modeling.reid_model import ReIDModel


@pytest.fixture(scope="module")
def model(clip):
    return ReIDModel.from_backbone(clip, image_size=(48, 24), num_ids=3)


def pictures(count, size=(30, 70)):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(count)]


def reference(model, arrays):
    prepare = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
    model.eval()
    with torch.no_grad():
        return torch.cat([model(prepare(Image.fromarray(array))[None]) for array in arrays])


def test_every_kind_of_image_gives_the_same_features(model, tmp_path):
    arrays = pictures(5)
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    want = reference(model, arrays)
    prepare = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
    images = [Image.open(path) for path in paths]
    kinds = {
        "paths": paths,
        "names": list(map(str, paths)),
        "a generator": (path for path in paths),
        "PIL": images,
        "arrays": arrays,
        "one array": np.stack(arrays),
        "bytes as tensors": [torch.from_numpy(array).permute(2, 0, 1) for array in arrays],
        "prepared": torch.stack(list(map(prepare, images))),
        "mixed": [paths[0], images[1], arrays[2], str(paths[3]), prepare(images[4])],
    }
    for kind, given in kinds.items():
        features = model.train().extract(given, batch_size=2)
        assert model.training, kind
        assert features.dtype == torch.float32 and not features.requires_grad
        torch.testing.assert_close(features, want, rtol=0, atol=1e-6, msg=kind)
    for one in (paths[0], str(paths[0]), images[0], arrays[0], prepare(images[0])):
        torch.testing.assert_close(model.extract(one), want[:1], rtol=0, atol=1e-6)
    assert model.extract([]).shape == (0, model.num_features)
    assert torch.equal(model.extract(paths), model.extract(paths))


def test_similarity_is_the_cosine(model):
    arrays = pictures(4)
    features = reference(model, arrays).double()
    want = features[:3] @ features[1:].T / features[:3].norm(dim=1)[:, None] / features[1:].norm(dim=1)
    got = model.similarity(arrays[:3], model.extract(arrays[1:]))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    assert model.similarity(arrays[0], arrays[0]) == pytest.approx(1, abs=1e-6)
    # Features that were kept by NumPy.
    assert torch.equal(model.similarity(arrays[:3], model.extract(arrays[1:]).numpy()), got)
    with pytest.raises(ValueError, match="features of this model have 16 numbers, got 5"):
        model.similarity(torch.zeros(2, 5), arrays)


@pytest.mark.parametrize(
    "image, message",
    [
        ("nowhere.jpg", "image 1: there is no file 'nowhere.jpg'"),
        (np.zeros((4, 4), np.uint8), r"array of uint8 and shape \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), "array of float32"),
        (torch.zeros(3, 9, 9), r"\(3, 9, 9\), and this model takes \(3, 48, 24\)"),
        (torch.zeros(9, 9, 3, dtype=torch.uint8), "tensor of torch.uint8"),
        (7, "it is a int"),
        ("damaged", "cannot be read"),
    ],
)
def test_what_is_no_image_is_refused_with_its_number(model, tmp_path, image, message):
    if isinstance(image, str) and image == "damaged":
        image = tmp_path / "damaged.jpg"
        image.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    with pytest.raises(ValueError, match=f"image 1: .*{message}" if "image 1" not in message else message):
        model.extract([pictures(1)[0], image])
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        model.extract(pictures(1), batch_size=0)


def test_a_tensor_that_may_not_be_normalised_is_said(model):
    """A bright picture lies in 0..1 after it is normalised by 0.5 and 0.5: its features are given."""
    bright = torch.rand(3, 48, 24)
    with pytest.warns(UserWarning, match="image 0: its values lie in 0..1. If it is not normalised yet"):
        features = model.extract([bright])
    assert features.shape == (1, model.num_features)


def test_a_model_opened_for_evaluation_has_its_convolutions_in_channels_last(tmp_path):
    made = ReIDModel(open_backbone("resnet-small", (64, 32), from_scratch=True), num_ids=3)
    made.save_pretrained(tmp_path)
    opened = ReIDModel.open(tmp_path)
    weights = [weight for weight in opened.parameters() if weight.ndim == 4]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    np.testing.assert_allclose(opened.extract(pictures(3)), made.extract(pictures(3)), atol=1e-6)


def test_files_of_phones_and_scanners_are_read_as_data_sets_read_them(model, tmp_path):
    """Turned by EXIF, and 16-bit grey: the features that evaluate.py would have."""
    (array,) = pictures(1)
    turned = Image.fromarray(array).rotate(90, expand=True)
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    grey = array[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    for name, want in (("turned", array), ("grey", np.stack([grey] * 3, -1)), ("deep", np.stack([grey] * 3, -1))):
        path = tmp_path / f"{name}.png"
        with Image.open(path) as image:
            for given in (path, image):
                torch.testing.assert_close(model.extract(given), reference(model, [want]), rtol=0, atol=1e-6, msg=name)
