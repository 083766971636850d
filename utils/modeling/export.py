"""Export: a Re-ID model to ONNX, checked against torch, and a plain backbone to a folder of `transformers`."""

import os
import shutil
from pathlib import Path

import torch

from utils.files import to_json, write_together


def export_onnx(model, path):
    """Write the model, with any batch size, and compare onnxruntime's features with torch's.

    Returns a line with the largest difference; ValueError if it is too large.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--export onnx needs onnx, onnxscript and onnxruntime ({error}); pip install them") from None
    device, attention = next(model.parameters()).device, model.backbone.config._attn_implementation
    images = torch.randn(3, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    settings = {"image_size": model.image_size, "mean": model.image_mean, "std": model.image_std}
    # Torch's exporter fails on the fused attention of Swin's windows.
    model.cpu().backbone.set_attention("eager")
    with write_together(path.parent) as part:
        try:
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(f"torch cannot export this model: {str(error).splitlines()[0]}") from error
        program.model.metadata_props["diffreid"] = to_json(settings | {"resample": model.resample})
        program.save(part(path.name), external_data=False)
        session = onnxruntime.InferenceSession(f"{path}.part", providers=["CPUExecutionProvider"])
        differences = []
        for batch in (images[:1], images):
            with torch.inference_mode():
                expected = model(batch)
            answer = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
            differences.append(float((expected - answer).abs().max()))
        if not max(differences) < 1e-4:
            raise ValueError(
                f"the features in ONNX differ from torch's by {max(differences):.1e}; nothing was written"
            )
    model.to(device).backbone.set_attention(attention)
    return f"{path}: features equal torch's within {max(differences):.1e}, at batch 1 and 3"


def write_backbone_folder(backbone, folder, preprocessor, card):
    """Write a plain `transformers` folder with image processor and card; an older folder is removed last."""
    folder = Path(folder)
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    backbone.save_pretrained(part)
    (part / "preprocessor_config.json").write_text(to_json(preprocessor))
    (part / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
