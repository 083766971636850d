"""Files of others run no code, leave no folder, and write nothing into a page: rules over all sources, and tries."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import evaluate
import train_dreambooth_reid as script
from tests.runs import ROOT
from utils.datasets.load import load_reid
from utils.diffusion.families.texts import load_text_encoder
from utils.diffusion.latents import find
from utils.diffusion.unet import load_unet, load_vae
from utils.evaluation.kept_features import load_features
from utils.flags import CAPTIONER_DIR, CLIP_DIR, DIFFUSION_DIR
from utils.generated.images import open_generated
from utils.generated.made_set import COMMAND, merge
from utils.generated.measures import Measures
from utils.generated.texts.captioners import Captioner
from utils.generated.texts.captions import read_captions
from utils.modeling.backbones import load_backbone
from utils.modeling.reid_model import ReIDModel
from utils.worklist import Worklist

ROOMS = ("methods", "utils", "kernels", "benchmarks")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
# Names that run what they are given; pickle's are asked for apart.
RUNS_CODE = {"eval", "exec", "system", "popen", "unpack_archive", "extractall", "read_pickle", "Unpickler", "run_path"}
READS_WEIGHTS = {f"{name}.from_pretrained" for name in ("CLIPModel", "CLIPTextModel", "auto", "model_class")}
PICKLES = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def name_of(node):
    """`torch.load` of the call torch.load(...), as far as it is made of names."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(tree):
    """What a file does that could run the code of others: (line, why)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and name_of(node.value) in PICKLES and node.attr != "UnpicklingError":
            yield node.lineno, f"{name_of(node)} may run code"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            yield node.lineno, f"from {node.module} import hides what is used of it"
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        last = name.split(".")[-1]
        if last in RUNS_CODE and (last != "eval" or name == "eval") and name != "platform.system":
            yield node.lineno, f"{name} runs what it is given"
        if name == "torch.load" and given.get("weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True"
        if given.get("allow_pickle") or given.get("trust_remote_code") or given.get("shell"):
            yield node.lineno, f"{name} with {given}"
        if name == "yaml.load":
            yield node.lineno, "yaml.load instead of yaml.safe_load"
        # Left open, transformers asks whoever sits there whether it may.
        asks = last == "from_pretrained" and name.lower().startswith("auto")
        if asks and given.get("trust_remote_code") is not False:
            yield node.lineno, f"{name} without trust_remote_code=False"
        if name in READS_WEIGHTS and given.get("use_safetensors") is not True:
            yield node.lineno, f"{name} without use_safetensors=True"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_the_code_of_a_file(path):
    assert [f"line {line}: {why}" for line, why in offences(ast.parse(path.read_text(encoding="utf-8")))] == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.load(file)",
        "np.load(x, allow_pickle=True)",
        "AutoConfig.from_pretrained(name)", "AutoModel.from_pretrained(name, trust_remote_code=True)", "eval(text)",
        "CLIPModel.from_pretrained(name)", "os.system(line)", "run(line, shell=True)", "archive.extractall(folder)",
        "from pickle import load", "yaml.load(text)",
    ],
)  # fmt: skip
def test_the_rules_see_it(line):
    assert list(offences(ast.parse(line)))


class Harm:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


FOLDERS = {"clip": CLIP_DIR, "blip-vqa": CAPTIONER_DIR, "stable-diffusion": DIFFUSION_DIR}
LOADERS = {
    "backbone": ("clip/model.safetensors", lambda path: load_backbone(path.parent)),
    "captioner": ("blip-vqa/model.safetensors", lambda path: Captioner.from_pretrained(str(path.parent))),
    "measures": ("clip/model.safetensors", lambda path: Measures.from_pretrained(str(path.parent))),
    "U-Net": (
        "stable-diffusion/unet/diffusion_pytorch_model.safetensors",
        lambda path: load_unet(path.parent.parent, "lora"),
    ),
    "VAE": ("stable-diffusion/vae/diffusion_pytorch_model.safetensors", lambda path: load_vae(path.parent.parent)),
    "text encoder": (
        "stable-diffusion/text_encoder/model.safetensors",
        lambda path: load_text_encoder(str(path.parent.parent), torch.float32),
    ),
    "Re-ID model": ("reid/model.safetensors", lambda path: ReIDModel.from_pretrained(path.parent)),
    "DCAC file": ("released.pth", ReIDModel.from_dcac_checkpoint),
    "features": ("features.safetensors", load_features),
    "features of NumPy": ("features.npz", load_features),
    "prompts": ("captions.parquet", read_captions),
    "labels": ("labels.parquet", lambda path: load_reid(str(path))),
    "generated set": ("generated/metadata.parquet", lambda path: open_generated(path.parent)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    ReIDModel.from_backbone(CLIP_DIR, num_ids=2, image_size=(64, 32)).save_pretrained(folder / "reid")
    return folder


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("beside", [False, True], ids=["in its place", "as .bin beside its place"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_pickle_in_place_of_weights_is_refused_in_words(tmp_path, whole, kind, beside):
    name, load = LOADERS[kind]
    path = tmp_path / name
    top = name.split("/")[0]
    if top in FOLDERS:
        shutil.copytree(FOLDERS[top], tmp_path / top)
    elif top == "reid":
        shutil.copytree(whole / top, tmp_path / top)
    path.parent.mkdir(exist_ok=True)
    if beside and path.suffix != ".safetensors":
        pytest.skip("has no other name that libraries would look for")
    harmed = tmp_path / "harmed"
    if beside:
        path.unlink(missing_ok=True)
        other = "pytorch_model.bin" if path.name == "model.safetensors" else f"{path.stem}.bin"
        torch.save({"weight": Harm(harmed)}, path.with_name(other))
    elif kind == "features of NumPy":
        np.savez(path, qf=np.array([Harm(harmed)], dtype=object), gf=np.ones((1, 2)))
    else:
        path.write_bytes(pickle.dumps({"weight": Harm(harmed)}))
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(tmp_path) in str(error.value) and not harmed.exists()
    assert "weights_only=False" not in str(error.value) and "allow_pickle=True" not in str(error.value)


def test_a_pickle_in_the_latent_cache_counts_as_damaged(tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    (folder / f"{'0' * 32}.safetensors").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    assert find(folder, [b"k" * 16])[1:][1] == [0]
    assert list(folder.iterdir()) == [] and not (tmp_path / "harmed").exists()


# Places


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 16), (200, 30, 60)).save(path, "PNG")


LEAVING = ["../secret.png", "a/../../secret.png", "{outside}/secret.png", "linked/secret.png", "link.png"]


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("table", ["metadata.parquet", "metadata.csv"])
def test_no_table_names_a_file_outside_its_folder(tmp_path, name, table):
    outside, root = tmp_path / "outside", tmp_path / "outside" / "set"
    for path in (outside / "secret.png", tmp_path / "far" / "secret.png", root / "a" / "0.png"):
        write_image(path)
    (root / "linked").symlink_to(tmp_path / "far", target_is_directory=True)
    (root / "link.png").symlink_to(tmp_path / "far" / "secret.png")
    rows = {"file_name": ["a/0.png", name.format(outside=outside)], "pid": [1, 2], "camid": [0, 1]}
    if table.endswith(".csv"):
        lines = ["file_name,pid,camid", *(",".join(map(str, row)) for row in zip(*rows.values(), strict=True))]
        (root / table).write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.table(rows), root / table)
    with pytest.raises(ValueError, match="leaves .*paths must be relative and stay below it"):
        load_reid(str(root))
    if table.endswith(".parquet"):
        generated = open_generated(root, domains=["set"])
        with pytest.raises(ValueError, match="leaves .*paths must be relative and stay below it"):
            list(generated.pieces())


# Pages

HOSTILE = "<script>alert(1)</script>&\"'{{7*7}}"


def hostile_folder(folder):
    """A query and a gallery whose file and folder names are markup."""
    for side in ("query", "gallery"):
        for pid in range(2):
            name = f"{pid:04d}_c{1 if side == 'query' else 2}_{HOSTILE.replace('/', '_')}.png"
            write_image(folder / side / f"<img src=x onerror=alert({pid})>" / name)
    return folder


def test_names_of_files_and_options_are_text_in_the_page(tmp_path):
    folder = hostile_folder(tmp_path / "<b>data")
    out = tmp_path / "out"
    words = ["--query_dir", folder / "query", "--gallery_dir", folder / "gallery", "--output_dir", out]
    evaluate.main(evaluate.parse_args([*map(str, words), "--k1", "1", "--k2", "1", "--resolution", "64", "32"]))
    page = (out / "report.html").read_text()
    for tag in ("<script>alert", "<img src=x", "<b>data"):
        assert tag not in page
    assert "&lt;script&gt;alert(1)" in page and "{{7*7}}" in page and "49" not in page.split("{{7*7}}")[0][-20:]
    record = json.loads((out / "args.json").read_text())["arguments"]
    assert record["query_dir"] == str(folder / "query")


def test_prompts_and_names_are_text_in_the_page_of_generation(tmp_path):
    work = Worklist(tmp_path, ["<b>domain/0001", "<b>domain/0002"])
    arguments = script.parse_args(["--source", HOSTILE, "--class_prompt", f"{HOSTILE} person"])
    settings = {"arguments": vars(arguments), "command": f"{COMMAND} {HOSTILE}"}
    work.write("args.json", json.dumps(settings))
    work.commit("<b>domain/0002", "failed", {"error": HOSTILE})
    seen = {"path": HOSTILE, "caption": HOSTILE, "answers": {"gender": HOSTILE}}
    record = {"domain": "<b>domain", "pid": 1, "camid": 0, "attributes": {"gender": HOSTILE}, "caption": HOSTILE}
    record |= {"prompt": HOSTILE, "identity_prompt": HOSTILE, "text": "", "images": [seen], "made_with": None}
    work.commit("<b>domain/0001", "captions", record)
    merge(work, [], 4)
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page and "<b>domain" not in page and "&lt;script&gt;" in page
