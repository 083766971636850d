"""Export: a Re-ID model to ONNX, checked against torch, and a plain backbone to a folder of `transformers`."""

import copy
import os
import shutil
from pathlib import Path

import torch

from utils.files import to_json, write_together
from utils.modeling.networks.preprocessing import MADE_BY, MAKER


def export_onnx(model, path):
    """Write the model, with any batch size, and compare onnxruntime's features with torch's.

    Returns a line with the largest difference; ValueError if it is too large.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--export onnx needs onnx, onnxscript and onnxruntime ({error}); pip install them") from None
    # Half precision would differ by more than is allowed, or not be known to onnxruntime.
    model = copy.deepcopy(model).float().cpu()
    settings = {"image_size": model.image_size, "mean": model.image_mean, "std": model.image_std}
    # Torch's exporter fails on the fused attention of Swin's windows.
    model.backbone.set_attention("eager")
    with write_together(path.parent) as part:
        program = exported(model)
        program.model.metadata_props["diffreid"] = to_json(settings | {"resample": model.resample})
        program.save(part(path.name), external_data=False)
        difference = largest_difference(model, onnxruntime, f"{path}.part")
        if not difference < 1e-4:
            raise ValueError(f"the features in ONNX differ from torch's by {difference:.1e}; nothing was written")
    return f"{path}: features equal torch's within {difference:.1e}, at batch 1 and 3"


def images_for(model):
    return torch.randn(3, 3, *model.image_size, generator=torch.Generator().manual_seed(0))


def exported(model):
    try:
        return torch.onnx.export(
            model,
            (images_for(model),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"torch cannot export this model: {str(error).splitlines()[0]}") from error


def largest_difference(model, onnxruntime, path):
    """Between onnxruntime's features and torch's, in two sizes of batches."""
    session, differences = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), []
    batch = session.get_inputs()[0].shape[0]
    if isinstance(batch, int):
        raise ValueError(f"torch's exporter fixed the batch at {batch} images; nothing was written")
    for images in (images_for(model)[:1], images_for(model)):
        with torch.inference_mode():
            expected = model(images)
        answer = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        differences.append(float((expected - answer).abs().max()))
    return max(differences)


def write_backbone_folder(backbone, folder, preprocessor, card):
    """Write a plain `transformers` folder with image processor and card; an older folder is removed last."""
    folder = Path(folder)
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    backbone.save_pretrained(part)
    (part / "preprocessor_config.json").write_text(to_json(preprocessor | {MADE_BY: MAKER}))
    (part / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
