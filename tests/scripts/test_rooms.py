"""The rooms of `utils` in their order: imports point down, and a copy of a script takes along what is promised."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "train_dcac.py").is_file())
SCRIPTS = sorted(ROOT.glob("*.py"))
FLOORS = ["kernels", "utils", "methods", "scripts"]
ROOMS = [
    "files", "ranges", "flags", "sharding", "launch", "worklist", "reporting", "synthetic", "datasets", "batches",
    "modeling", "losses", "diffusion", "evaluation", "training", "generated", "standins",
]  # fmt: skip
MOST_FILES, MOST_LINES, MOST_SCRIPT_LINES = 16, 380, 620
ALONG_FILES, ALONG_LINES = 32, 6500
# Of train_dcac.py: what only some trainings need, where prompts are made from captions, for an encoder with parts (its
# flags too, which are read at the start), and where weights are split among processes.
ONLY_FOR_CAPTIONS, ONLY_FOR_PARTS = "utils.generated.texts.identity_texts", "methods.muva"
ONLY_FOR_SHARES = "utils.sharding"


def code(folder):
    return [path for path in sorted(folder.rglob("*.py")) if ".venv" not in path.parts]


def imported(path):
    """Modules of ours that a file names in any import, the ones inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {
        name for name in names if name.split(".")[0] in ("kernels", "utils", "methods", *(s.stem for s in SCRIPTS))
    }


def floor_of(name):
    top = name.split(".")[0]
    return FLOORS.index(top if top in FLOORS else "scripts")


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def files_of(name):
    """The files that an import of a dotted name runs: rooms are opened on the way."""
    parts, found = name.split("."), []
    for count in range(1, len(parts) + 1):
        place = ROOT.joinpath(*parts[:count])
        found += [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return found


def closure(path, without=""):
    seen, waiting = set(), [path]
    while waiting:
        names = {name for name in imported(waiting.pop()) if not (without and name.startswith(without))}
        for file in {file for name in names for file in files_of(name)} - seen:
            seen.add(file)
            waiting.append(file)
    return seen


def test_every_room_is_known():
    places = {
        path.stem for path in (ROOT / "utils").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert places - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down_the_floors(floor):
    paths = SCRIPTS if floor == "scripts" else code(ROOT / floor)
    assert paths
    for path in paths:
        for name in imported(path):
            assert floor_of(name) <= FLOORS.index(floor), f"{path.name} imports {name}, a floor above"
            if floor in ("scripts", "methods") and floor_of(name) == FLOORS.index(floor):
                # A folder of `methods/` is one method.
                own = ".".join(module_of(path).split(".")[:2])
                allowed = name == "methods" or f"{name}.".startswith(f"{own}.")
                assert allowed, f"{path.name} imports {name}: no {floor} imports another"


def test_imports_point_down_the_rooms():
    for path in code(ROOT / "utils"):
        here = path.relative_to(ROOT / "utils").with_suffix("").parts[0]
        for name in imported(path):
            there = name.split(".")[1:2]
            if name.startswith("utils.") and there[0] in ROOMS and here != "__init__":
                assert ROOMS.index(there[0]) <= ROOMS.index(here), f"{path.relative_to(ROOT)} imports {name}"


def test_a_room_opens_without_loading_what_is_in_it():
    rooms = [f"utils.{room}" for room in ROOMS if (ROOT / "utils" / room).is_dir()]
    script = f"import sys\nimport {', '.join(rooms)}\nprint('torch' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_promised_imports():
    """And captions, parts and sharding are opened only where they are asked for."""
    script = (
        "import sys\nimport train_dcac\n"
        "unasked = 'utils.generated', 'methods.muva.', 'utils.sharding'\n"
        "opened = [name for name in sys.modules if name.startswith(unasked)]\n"
        "from kernels import cosine_topk, k_reciprocal_rerank, rank_metrics\n"
        "from utils.datasets import load_reid\n"
        "from utils.modeling import ReIDModel\n"
        "from utils.losses import PrototypeMemory\n"
        "assert callable(ReIDModel.from_backbone) and callable(load_reid) and callable(PrototypeMemory)\n"
        "from utils.flags import CLIP_DIR, DIFFUSION_DIR, CAPTIONER_DIR\n"
        "print(*opened, CLIP_DIR, DIFFUSION_DIR, CAPTIONER_DIR)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    *opened, clip, diffusion, captioner = done.stdout.split()
    assert opened == ["methods.muva.settings"] and ONLY_FOR_CAPTIONS in imported(ROOT / "train_dcac.py")
    names = [Path(word).relative_to(ROOT).as_posix() for word in (clip, diffusion, captioner)]
    assert names == [f"utils/standins/{name}" for name in ("clip", "stable-diffusion", "blip-vqa")]
    for room in ("datasets", "synthetic"):
        help_text = subprocess.run(
            [sys.executable, "-m", f"utils.{room}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert help_text.startswith("usage: ")


def test_sizes():
    for folder in {path.parent for floor in (*FLOORS[:3], "benchmarks") for path in code(ROOT / floor)}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {len(files)} files"
    for path in [path for floor in FLOORS[:3] for path in code(ROOT / floor)]:
        assert len(path.read_text().splitlines()) <= MOST_LINES, path
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= MOST_SCRIPT_LINES, path


def test_what_a_copy_of_train_dcac_takes_along():
    along = [
        path
        for path in closure(ROOT / "train_dcac.py", without=(ONLY_FOR_CAPTIONS, ONLY_FOR_PARTS, ONLY_FOR_SHARES))
        if path.name != "__init__.py" and "kernels" not in path.parts
    ]
    lines = sum(len(path.read_text().splitlines()) for path in along)
    assert len(along) <= ALONG_FILES and lines <= ALONG_LINES, f"{len(along)} files, {lines} lines"
