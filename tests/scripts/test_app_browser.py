"""The page of app.py in a real browser: upload, results, cameras, re-ranking, decision; what it loads and keeps."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

import app
from kernels.reranking import k_reciprocal_rerank_reference
from tests.runs import ROOT, environment, free_port
from tests.scripts.test_app import calibrate_for
from utils.batches.transforms import test_transform as make_transform
from utils.datasets.load import load_reid
from utils.flags import CLIP_DIR
from utils.modeling.reid_model import ReIDModel

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
COMMANDS = {
    "pip install -r requirements-app.txt": importlib.util.find_spec("gradio"),
    "pip install selenium": importlib.util.find_spec("selenium"),
    "apt-get install chromium chromium-driver": CHROMIUM and DRIVER,
}
MISSING = [command for command, is_there in COMMANDS.items() if not is_there]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]
# Run as a script, it would set a name of the window; filled in as a template, it would lose its braces.
HOSTILE = "0001_c1_<img src=x onerror=window.hit=1>{{7*7}}${1+1}.png"
TIMEOUT = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a calibration, a gallery of 24 images with one odd name, and two files to upload."""
    folder = tmp_path_factory.mktemp("app")
    model = ReIDModel.from_backbone(CLIP_DIR, image_size=(128, 64))
    model.save_pretrained(folder / "model")
    calibrate_for(ReIDModel.open(folder / "model"), folder / "model")
    data = load_reid("synthetic", domain="b", num_ids=6)
    (folder / "cameras").mkdir()
    for number, row in enumerate(data["gallery"]):
        row["image"].save(folder / "cameras" / (HOSTILE if number == 0 else Path(row["path"]).name))
    data["query"][2]["image"].save(folder / "wanted.png")
    (folder / "text.png").write_text("no image")
    (folder / "tmp").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(place):
    """The port of app.py in a process of its own."""
    port = free_port()
    words = ["--model", "model", "--gallery_dir", "cameras", "--output_dir", "out", "--server_port", port, "--topk", 5]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), *map(str, words), "--k1", "4", "--k2", "2"],
        cwd=place,
        env=environment(TMPDIR=str(place / "tmp"), HOME=str(place / "home")),
        stdout=(place / "stdout").open("w"),
        stderr=(place / "stderr").open("w"),
    )
    wait(lambda: "Open http" in (place / "stdout").read_text() or process.poll() is not None, 240)
    assert process.poll() is None, (place / "stderr").read_text()[-3000:]
    yield port
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for word in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1300,1400",
        f"user-data-dir={profile}", "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(f"--{word}")
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(holds, timeout=TIMEOUT):
    deadline = time.monotonic() + timeout
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holds()


class Window:
    """What is asked of a browser's window."""

    def __init__(self, browser):
        self.browser = browser

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def text(self, selector):
        return self.browser.execute_script(f"return document.querySelector({selector!r})?.innerText || ''")

    def names(self):
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#results button.tile')].map(tile => tile.title.slice(12))"
        )

    def shows(self, names):
        wait(lambda: self.names() == names)


def ranked(place, query, *, camera=None, without=()):
    """Names and cosines of the gallery, best first, and all features, computed image by image."""
    model = ReIDModel.from_pretrained(place / "model")
    transform = make_transform(model.image_size, model.image_mean, model.image_std, model.resample)

    @torch.no_grad()
    def feature(path):
        return model(transform(Image.open(path).convert("RGB"))[None])[0].double()

    paths = [path for path in sorted((place / "cameras").iterdir()) if path.name not in without]
    paths = [path for path in paths if camera is None or f"_c{camera}_" in path.name]
    wanted, gallery = feature(query), torch.stack([feature(path) for path in paths])
    cosines, order = (gallery @ wanted).sort(descending=True, stable=True)
    return [paths[row].name for row in order.tolist()], cosines.tolist(), (wanted[None], gallery, paths)


def test_a_search_from_upload_to_decision(place, server, browser):
    window = Window(browser)
    browser.get(f"http://127.0.0.1:{server}/")
    wait(lambda: len(window.names()) == 24)
    assert "Responsible use" in window.text("footer.app") and "is not written to disk" in window.text("footer.app")

    window.all("#query input[type=file]")[0].send_keys(str(place / "text.png"))
    wait(lambda: "text.png cannot be read as an image" in window.text("#query .problem"))

    names, cosines, _ = ranked(place, place / "wanted.png")
    window.all("#query input[type=file]")[0].send_keys(str(place / "wanted.png"))
    window.shows(names[:5])
    assert [element.text for element in window.all("#results .score")] == [f"{cosine:.3f}" for cosine in cosines[:5]]
    assert "24 gallery images searched" in window.text("#results") and window.text("#query .problem") == ""
    calibration = json.loads((place / "model" / "calibration.json").read_text())
    assert window.text(".decision") == f"Nearest image. {app.decision_of(cosines[0], calibration, 24)}"
    assert window.text(".decision").startswith(("Nearest image. same person", "Nearest image. nobody"))
    assert browser.execute_script(
        "return [...document.querySelectorAll('.app img')].every(image => image.naturalWidth > 0)"
    )

    names, _, (wanted, gallery, paths) = ranked(place, place / "wanted.png", camera=2)
    window.all("#cameras input")[0].click()
    wait(lambda: window.all("#cameras [role=option]"))
    next(option for option in window.all("#cameras [role=option]") if "camera 2 (6" in option.text).click()
    window.shows(names[:5])
    assert "6 gallery images of camera 2 searched" in window.text("#results")

    distances = k_reciprocal_rerank_reference(wanted, gallery, k1=4, k2=2)[0]
    distances, order = distances.sort(stable=True)
    window.all("#rerank input")[0].click()
    window.shows([paths[row].name for row in order[:5].tolist()])
    assert window.text("#results .distance") == f"re-ranked {distances[0]:.3f}"
    assert "Re-ranked with all 6 of them" in window.text("#results")

    window.all("#rerank input")[0].click()
    window.shows(names[:5])
    browser.find_element("css selector", "#cameras input").send_keys("\ue003")
    whole, _, _ = ranked(place, place / "wanted.png")
    window.shows(whole[:5])

    # A result as the next query: its own file is no result.
    picked = whole[1]
    names, _, _ = ranked(place, place / "cameras" / picked, without=[picked])
    window.all("#results button.tile")[1].click()
    window.shows(names[:5])
    assert f"Left out, the same file as the query: {picked}." in window.text("#results")
    assert picked in window.text("#query")

    window.all("#other")[0].click()
    wait(lambda: len(window.names()) == 24)
    window.all("#text input, #text textarea")[0].send_keys("<IMG")
    window.shows([HOSTILE])
    assert window.text("#results .name") == HOSTILE and browser.execute_script("return window.hit") is None


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_kept(place, server, browser):
    window = Window(browser)
    browser.get(f"http://127.0.0.1:{server}/")
    wait(lambda: window.all("#query input[type=file]") and window.names())
    window.all("#query input[type=file]")[0].send_keys(str(place / "wanted.png"))
    wait(lambda: window.all("#results .score"))
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [
        event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
    ]
    addresses = [address for address in addresses if not address.startswith(("data:", "chrome:", "blob:"))]
    assert len(addresses) > 20
    assert [address for address in addresses if not address.startswith(f"http://127.0.0.1:{server}/")] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    kept = browser.execute_async_script(
        "const done = arguments[0]; indexedDB.databases().then(all => done([all.length, Object.keys(localStorage)]))"
    )
    assert kept == [0, []]
    content = (place / "wanted.png").read_bytes()
    written = [path for path in place.rglob("*") if path.is_file() and path.parent != place]
    assert not [path for path in written if content[:200] in path.read_bytes()]
    assert [path.name for path in (place / "tmp").rglob("*") if path.is_file()] == []
    for path in ("upload", "file=/etc/hostname", "runs"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://127.0.0.1:{server}/gradio_api/{path}")


def test_it_listens_on_this_computer_only(server):
    """Rows of the kernel's tables of sockets: local address, remote address, state 0A for listening."""
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A" and int(local.rpartition(":")[2], 16) == server:
                listening.append(local.rpartition(":")[0])
    assert listening == ["0100007F"]
