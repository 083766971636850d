"""CLIP-ReID with a ViT, and its baseline: both features before their BNNecks, as its person settings test with."""

from utils.modeling.importers.clip import read_tower
from utils.modeling.importers.imported import HALVES_BILINEAR, Imported
from utils.modeling.importers.vit import CAMERAS, published_grid
from utils.modeling.networks.clip_reid import ClipReIDConfig


def read(tensors, image_size):
    """Text encoder and learned prompts, which a test does not need, are left out."""
    notes = tensors.drop_classifier("classifier.weight", "classifier_proj.weight")
    tensors.drop("bottleneck")
    left_out = tensors.drop("text_encoder.", "prompt_learner.")
    cameras = tensors.pop("cv_embed", None)
    options, state = read_tower(tensors, "image_encoder.")
    tensors.done()

    positions = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
    stride, grid, size = published_grid(tensors, positions, options["patch_size"], image_size)
    notes.insert(0, f"images of {size[0]} x {size[1]}, patches every {stride} pixels; features before the BNNecks")
    if left_out:
        notes.append(f"{left_out} tensors of the text encoder and the prompts are left out")
    if cameras is not None:
        options["num_cameras"] = len(cameras)
        state["camera_embedding"] = cameras
        notes.append(CAMERAS.format(len(cameras)))
    config = ClipReIDConfig(**options, grid=list(grid), stride=stride, hidden_act="quick_gelu")
    return Imported(config, size, HALVES_BILINEAR, state, "embedding", {"norm": False}, {}, tuple(notes))
