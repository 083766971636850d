# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0", "bitsandbytes>=0.50.0", "datasets>=4.5.0", "diffusers>=0.38.0", "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4", "numpy>=2.1.0", "peft>=0.19.0", "Pillow>=11.0.0", "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2", "scipy>=1.14.1", "torch>=2.11.0", "torchvision>=0.26.0", "tqdm>=4.67.0",
#     "transformers>=5.17.0", "triton>=3.6.0; sys_platform == 'linux'", "gradio>=6.31.0",
# ]
# ///
"""Search a gallery in the browser: upload an image of a person, or pick one, and look at the ranked gallery.

    python app.py --model output/people/model --gallery_dir cameras
    python app.py --features output/evaluate/features.safetensors --image_root cameras
    python app.py --gallery_features kept --image_root cameras

Without arguments it is a demo: the shipped stand-in CLIP and people drawn by code. The page runs on this computer only
and needs no network. An uploaded image is kept in memory until the page is closed, and never written to disk. Gallery
features are stored in the output folder, so that the next start does not extract them again.
Needs one more package: pip install -r requirements-app.txt
"""

from pathlib import Path

from utils import flags
from utils.flags import CLIP_DIR
from utils.ranges import at_least, between, fraction

DEMO_DATA = "synthetic:domain=b,num_ids=16"
DEMO_RESOLUTION = (128, 64)
DEMO = (
    "Demo: the shipped stand-in CLIP, without training, on drawn people. For your own: --model DIR --gallery_dir DIR"
)
# Names of this computer. The server always listens on the first one.
THIS_COMPUTER = ("127.0.0.1", "localhost")
FEATURES = "features.safetensors"
# The least cosine of a kept feature and the same image's feature now; bfloat16 stays above it.
SAME_MODEL = 0.999
MOST_RESULTS = 100
# Gallery images that are offered to pick from.
MOST_SHOWN = 48


def build_parser():
    parser = flags.Parser(__doc__)
    group = parser.group("model")
    group.add(
        "--model",
        help="a ReIDModel folder or Hub id, a plain backbone (CLIP, ResNet, Swin, ViT, ...), or a file of weights, "
        "see the README; default: the model that kept features name, else the shipped stand-in CLIP",
    )
    group.size(
        "--resolution",
        help="input of a backbone or file in pixels; default 256 128 or the file's (a ReIDModel folder has its own)",
    )

    group = parser.group("gallery")
    group.add(
        "--gallery_dir",
        help="folder of the images to look in; labels are read from names like 0001_c2_x.jpg or folders",
    )
    group.add(
        "--features",
        metavar="FILE",
        help="features kept by evaluate.py or by this script, instead of --gallery_dir; their gallery is searched",
    )
    group.add(
        "--gallery_features",
        metavar="DIR",
        help="a gallery that evaluate.py --gallery_features keeps, also one larger than memory",
    )
    group.add(
        "--image_root",
        idle=(lambda args: not args.features and not args.gallery_features, "no --features or --gallery_features"),
        help="folder below which the images of kept features lie; without it the page shows their names only",
    )
    group.switch(
        "--skip_unreadable",
        "leave out images that do not decode, and list them",
        idle=(lambda args: args.features or args.gallery_features, "kept features"),
    )

    group = parser.group("ranking")
    group.add(
        "--topk", type=at_least(1), default=20, help=f"results at first, at most {MOST_RESULTS}; the page has a slider"
    )
    words = "chance of a yes for somebody who is not in the gallery that you accept, of a calibrated model"
    group.add("--false_alarm_rate", type=fraction, default=0.01, help=words)
    group.add("--k1", type=at_least(1), default=20, help="re-ranking: reciprocal neighbours")
    group.add("--k2", type=at_least(1), default=6, help="re-ranking: neighbours averaged over, 1 for none")
    group.add("--lambda_value", type=fraction, default=0.3, help="re-ranking: weight of the plain distance")

    group = parser.group("running")
    group.add("--eval_batch_size", type=at_least(1), default=64, help="images of each batch of the extraction")
    flags.add_workers(group)
    group.add("--mixed_precision", choices=flags.PRECISIONS, help="of extraction; default: accelerate's setting")
    group.add("--output_dir", default="output/app", help="folder of the gallery features")
    group.add("--server_name", default=THIS_COMPUTER[0], help="this computer; no other name is accepted")
    group.add("--server_port", type=between(1, 65535), default=7860, help="port of the page")
    return parser


def parse_args(input_args=None):
    parser = build_parser()
    args = parser.parse(input_args)
    kept = [flag for flag in ("--features", "--gallery_features") if getattr(args, flag[2:])]
    if kept and args.gallery_dir:
        parser.error(
            f"{kept[0]} has a gallery of its own; leave out --gallery_dir, and name its folder by --image_root"
        )
    if len(kept) > 1:
        parser.error("--features and --gallery_features are two galleries; give one")
    if args.topk > MOST_RESULTS:
        parser.error(f"--topk {args.topk} is more than the page shows; give at most {MOST_RESULTS}")
    if args.server_name not in THIS_COMPUTER:
        parser.error(
            f"--server_name {args.server_name} is refused: the page shows people and has no login, so it listens on "
            f"127.0.0.1 only; from another computer use ssh -L {args.server_port}:127.0.0.1:{args.server_port}"
        )
    args.demo = not (args.model or args.gallery_dir or kept)
    args.notes = parser.notes(args)
    return args


if __name__ == "__main__":
    # Parse before torch and transformers are imported, so that --help and a mistyped flag answer at once.
    args = parse_args()

import base64
import os
import tempfile
from dataclasses import replace

import torch
from PIL import Image

from utils import evaluation, launch
from utils.batches.chunks import image_identities
from utils.datasets.images import check_images
from utils.datasets.load import load_reid, parse_spec
from utils.datasets.schema import UNKNOWN, Row, check_listed, rows_to_dataset
from utils.datasets.search_folders import read_folders
from utils.evaluation.calibration import calibration_path, fingerprint, read_calibration
from utils.evaluation.chunk_files import ChunkFiles, extraction_key, forget_chunks
from utils.evaluation.decisions import decide
from utils.evaluation.features import extract
from utils.evaluation.gallery_search import (
    MOST_BYTES,
    Gallery,
    camera_mask,
    picked_query,
    search,
    transform_of,
    uploaded_query,
)
from utils.evaluation.index.search import open_kept, side_of
from utils.evaluation.index.store import about_model
from utils.evaluation.kept_features import features_of_key, load_features, names_of_labels, save_features
from utils.evaluation.metrics import Side
from utils.files import run_record, to_json, write_together
from utils.modeling.folder import model_kind
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import TEMPLATES, environment


def main(args):
    gradio = gradio_module()
    accelerator = launch.start_accelerator(args.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"app.py is one process, not {accelerator.num_processes}; start it with python")
    named = args.model or args.features or args.gallery_features
    stand_in = not named and "No --model given: using the shipped stand-in CLIP"
    launch.introduce(args, accelerator, demo=DEMO, stand_ins=stand_in)
    gallery = open_gallery(args, accelerator)
    with write_together(args.output_dir) as part:
        part("args.json").write_text(to_json(run_record(args)))
    page = Page(gallery, args)
    # The first search would otherwise take much longer than the others, and kept features could turn out damaged.
    gallery.cosines(gallery.features_of([Image.new("RGB", (64, 128))])[0])
    serve(gradio, build_page(gradio, page), args)


def gradio_module():
    """gradio, set to send nothing to anybody; ValueError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}); pip install -r requirements-app.txt") from None
    return gradio


# The gallery


def open_gallery(args, accelerator):
    """The `Gallery` that is kept, or that of --gallery_dir; features that are not stored yet are extracted."""
    if args.gallery_features:
        return kept_gallery(args, accelerator)
    if args.features:
        return read_gallery(args, accelerator)
    name = args.model or CLIP_DIR
    # A name that is no model shows before images are read.
    model_kind(name)
    if args.gallery_dir:
        folder = Path(args.gallery_dir)
        images = read_folders(folder, folder)[1]
        folder = folder.parent if folder.is_file() else folder
    else:
        source, options = parse_spec(DEMO_DATA)
        images, folder = load_reid(source, **options)["gallery"], None
    source = args.gallery_dir or DEMO_DATA
    model = open_model(name, args.resolution, accelerator)
    side = extract_or_read(args, accelerator, model, images, source)
    place = {path: row for row, path in enumerate(images["path"])}
    images = images.select([place[path] for path in side.paths])
    return Gallery(side, images, folder, model, name, source, accelerator)


def open_model(name, resolution, accelerator):
    model = ReIDModel.open(name, resolution or (DEMO_RESOLUTION if name == CLIP_DIR else None))
    return model.to(accelerator.device).eval()


def extract_or_read(args, accelerator, model, images, source):
    """The gallery side: read from the output folder if it has exactly these features, else extracted and stored."""
    more = {"skip_unreadable": args.skip_unreadable, "labels": [images["pid"][:], images["camid"][:]]}
    key = extraction_key(model, image_identities(images), accelerator, args.eval_batch_size, **more)
    stored = Path(args.output_dir) / FEATURES
    if known := features_of_key(stored, key):
        print(f"Features: {stored}, extracted before")
        # A folder may have got another name since.
        return replace(known[0][1], names=names_of_labels(images))
    images, _ = check_images(images, skip_unreadable=args.skip_unreadable, where=source)
    features = extract(
        model,
        images,
        transform_of(model),
        accelerator=accelerator,
        store=ChunkFiles(args.output_dir, key),
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    labels = (torch.tensor(images[name][:]) for name in ("pid", "camid"))
    gallery = Side(features, *labels, list(images["path"]), names=names_of_labels(images))
    nobody = Side(features[:0], gallery.pids[:0], gallery.camids[:0], [])
    with write_together(args.output_dir) as part:
        split = [], nobody, list(range(len(gallery))), gallery
        save_features(part(FEATURES), features, [split], key=key, model=args.model or CLIP_DIR, data=source)
    forget_chunks(args.output_dir)
    return gallery


def read_gallery(args, accelerator):
    """The gallery of --features, which must be of the model: some of its images are extracted again and compared."""
    splits, header = load_features(args.features)
    side = splits[0][1]
    if len(splits) > 1:
        print(f"{args.features} holds {len(splits)} splits: the gallery of the first is searched")
    name = args.model or header.get("model")
    if not name:
        raise ValueError(f"{args.features} does not say which model its features are of; give it by --model")
    evaluation.check_sides(side, side)
    images, folder, there = images_of(args.image_root, side, args.features)
    model = open_model(name, args.resolution, accelerator)
    width = side.features.shape[1]
    if model.num_features != width:
        raise ValueError(
            f"{args.features} holds features {width} wide, those of {name} are {model.num_features}; give their model "
            "by --model"
        )
    gallery = Gallery(side, images, folder, model, name, args.features, accelerator)
    shown = {row: image for row in there[:2] if (image := gallery.image_of(row)) is not None}
    features = gallery.features_of(list(shown.values())) if shown else []
    for row, feature in zip(shown, features, strict=True):
        cosine = float(feature @ gallery.side.features[row])
        if cosine < SAME_MODEL:
            raise ValueError(
                f"{args.features} holds other features of {side.paths[row]} than {name} gives at "
                f"{model.image_size[0]} x {model.image_size[1]} (cosine {cosine:.3f}); give the right --model, "
                "--resolution and --image_root"
            )
    return gallery


def kept_gallery(args, accelerator):
    """The gallery of --gallery_features, whose features stay on disk; its manifest says of which model they are."""
    index = open_kept(args.gallery_features, None, append=False)
    name = args.model or index.about["model"]
    model_kind(name)
    model = open_model(name, args.resolution, accelerator)
    index.check_model(about_model(name, model, accelerator.mixed_precision))
    side, digests = side_of(index)
    images, folder, _ = images_of(args.image_root, side, args.gallery_features)
    return Gallery(side, images, folder, model, name, args.gallery_features, accelerator, digests)


def images_of(folder, side, source):
    """(images of a side as a data set, their folder, the rows whose files are there), or nothing without a folder."""
    if not folder:
        return None, None, []
    folder = Path(folder)
    check_listed(folder, side.paths, source)
    rows = [Row(*row) for row in zip(side.paths, side.pids.tolist(), side.camids.tolist(), strict=True)]
    there = [row for row, path in enumerate(side.paths) if (folder / path).is_file()]
    if not there:
        raise ValueError(f"--image_root {folder} has no image of {source}, such as {side.paths[0]}")
    if len(there) < len(side):
        print(f"{len(side) - len(there):,} of {len(side):,} images are not in {folder}: their names are shown")
    return rows_to_dataset(rows, str(folder), folder.name, "gallery"), folder, there


# The decision


def decision_of(score, calibration, num_gallery, accepted=0.01):
    """What a calibration says about the cosine of the nearest of `num_gallery` images, in one sentence."""
    nearest = torch.tensor([[0]]), torch.tensor([[2 - 2 * score]], dtype=torch.float64)
    return decide(calibration, nearest, num_gallery, accepted)[0].describe()


# The page


class Page:
    """What the page shows, as HTML, and the query of each page that is open now."""

    def __init__(self, gallery, args):
        self.gallery, self.args = gallery, args
        self.calibration, self.no_calibration = read_calibration(
            calibration_path(gallery.model_name), fingerprint(gallery.model)
        )
        self.macros = environment(autoescape=True).get_template("app.html.j2").module
        self.queries = {}

    def html(self, macro, **values):
        """A macro of the template. gradio takes braces and dollars for a template of its own, also in file names."""
        text = str(getattr(self.macros, macro)(**values))
        return text.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")

    def head(self):
        gallery = self.gallery
        facts = [
            ("Gallery", gallery.source),
            ("Images", f"{len(gallery):,}"),
            ("Cameras", len(gallery.cameras()) or "unknown"),
            ("Model", "the shipped stand-in" if gallery.model_name == CLIP_DIR else gallery.model_name),
        ]
        return self.html("head", facts=facts)

    def foot(self):
        return self.html("foot", port=self.args.server_port)

    def query(self, session, problem=""):
        return self.html("query", query=self.queries.get(session), problem=problem)

    def upload(self, session, name, data):
        """Make an uploaded file, in base64, the query of a session; returns what was wrong with it, or nothing."""
        name = Path(str(name)).name[:200] or "image"
        try:
            # A third longer than the file. A longer text is not decoded.
            if len(data) > MOST_BYTES * 4 // 3 + 4:
                raise ValueError(f"{name} is too large, at most {MOST_BYTES:,} bytes are taken; give a smaller image")
            self.queries[session] = uploaded_query(self.gallery, name, base64.b64decode(data))
        except (ValueError, TypeError) as error:
            self.queries.pop(session, None)
            return str(error)
        return ""

    def pick(self, session, row):
        try:
            self.queries[session] = picked_query(self.gallery, row)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    def forget(self, session):
        self.queries.pop(session, None)

    def results(self, session, cameras, count, rerank, text=""):
        """The ranked gallery of the session's query; without one the gallery itself, to pick from."""
        query = self.queries.get(session)
        if query is None:
            return self.choice(cameras, text)
        options = {name: getattr(self.args, name) for name in ("k1", "k2", "lambda_value")}
        results = search(self.gallery, query, cameras=cameras, count=int(count), rerank=bool(rerank), **options)
        decision = missing = None
        if results.rows:
            missing = self.no_calibration
            if self.calibration:
                decision = decision_of(results.nearest, self.calibration, results.searched, self.args.false_alarm_rate)
        notes = [f"{results.searched:,} gallery images searched."]
        if cameras:
            notes[0] = f"{results.searched:,} gallery images of {self.camera_names(cameras)} searched."
        if results.same:
            left_out = ", ".join(results.same[:3]) + (", ..." if len(results.same) > 3 else "")
            notes.append(f"Left out, the same file as the query: {left_out}.")
        if rerank and results.rows:
            notes.append(self.reranking_note(results))
        tiles = [
            self.tile(row, query, cosine, None if results.distances is None else results.distances[place])
            for place, (row, cosine) in enumerate(zip(results.rows, results.scores, strict=True))
        ]
        return self.html("results", notes=notes, tiles=tiles, decision=decision, missing=missing)

    def reranking_note(self, results):
        args = self.args
        among = (
            f"all {results.searched:,} of them"
            if results.reranked == results.searched
            else f"the {results.reranked:,} nearest of them"
        )
        return (
            f"Re-ranked with {among}, by k-reciprocal neighbours (k1 {args.k1}, k2 {args.k2}, lambda "
            f"{args.lambda_value:g})."
        )

    def choice(self, cameras, text):
        """The first gallery images of these cameras whose names hold the text."""
        mask = camera_mask(self.gallery, cameras).tolist()
        paths, text = self.gallery.side.paths, text.strip().lower()
        rows = [row for row, kept in enumerate(mask) if kept and text in paths[row].lower()]
        tiles = [self.tile(row) for row in rows[:MOST_SHOWN]]
        return self.html("choice", tiles=tiles, total=len(rows))

    def tile(self, row, query=None, cosine=None, distance=None):
        side = self.gallery.side
        pid, camera = int(side.pids[row]), int(side.camids[row])
        labels = [
            f"identity {side.identity_name(pid)}" if pid != UNKNOWN else "",
            f"camera {side.camera_name(camera)}" if camera >= 0 else "",
        ]
        is_known = query is not None and UNKNOWN not in (query.pid, pid)
        return {
            "row": row,
            "uri": self.gallery.picture_of(row),
            "name": side.paths[row],
            "labels": ", ".join(filter(None, labels)),
            "score": "" if cosine is None else f"{cosine:.3f}",
            "distance": "" if distance is None else f"{distance:.3f}",
            "match": query.pid == pid if is_known else None,
        }

    def camera_names(self, cameras):
        names = [self.gallery.side.camera_name(int(camera)) for camera in cameras]
        return f"camera{'s' if len(names) > 1 else ''} {', '.join(names)}"


def build_page(gradio, page):
    """The gradio Blocks around a `Page`."""
    gallery, args = page.gallery, page.args
    cameras = gallery.cameras()
    with gradio.Blocks(title="Search a gallery", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML(page.head())
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=1, min_width=290):
                script = (TEMPLATES / "app.js").read_text(encoding="utf-8")
                query = gradio.HTML(page.query(None), js_on_load=script, elem_id="query")
                other = gradio.Button("Another query", visible=False, elem_id="other")
                text = gradio.Textbox(label="File name contains", placeholder="all names", elem_id="text")
                chosen = gradio.Dropdown(
                    [
                        (f"camera {gallery.side.camera_name(camera)} ({count:,} images)", camera)
                        for camera, count in cameras.items()
                    ],
                    value=[],
                    multiselect=True,
                    label="Cameras",
                    info="none chosen: all",
                    visible=len(cameras) > 1,
                    elem_id="cameras",
                )
                count = gradio.Slider(
                    1, MOST_RESULTS, value=args.topk, step=1, precision=0, label="Results", elem_id="count"
                )
                rerank = gradio.Checkbox(
                    False, label="Re-rank", info="by neighbours that query and image have in common", elem_id="rerank"
                )
            with gradio.Column(scale=4, min_width=320):
                script = (TEMPLATES / "app.js").read_text(encoding="utf-8")
                results = gradio.HTML(page.results(None, [], args.topk, False), js_on_load=script, elem_id="results")
        gradio.HTML(page.foot())
        settings = [chosen, count, rerank, text]

        def shown(session, settings, problem=""):
            has_query = session in page.queries
            return (
                page.query(session, problem),
                page.results(session, *settings),
                gradio.update(visible=has_query),
                gradio.update(visible=not has_query),
            )

        def upload(request: gradio.Request, event: gradio.EventData, *settings):
            problem = page.upload(request.session_hash, event.name, event.data)
            return shown(request.session_hash, settings, problem)

        def pick(request: gradio.Request, event: gradio.EventData, *settings):
            return shown(request.session_hash, settings, page.pick(request.session_hash, event.row))

        def drop(request: gradio.Request, *settings):
            page.forget(request.session_hash)
            return shown(request.session_hash, settings)

        def update(request: gradio.Request, *settings):
            return page.results(request.session_hash, *settings)

        def close(request: gradio.Request):
            page.forget(request.session_hash)

        everything = [query, results, other, text]
        private = {"api_visibility": "private", "show_progress": "minimal"}
        query.upload(upload, settings, everything, **private)
        results.select(pick, settings, everything, **private)
        other.click(drop, settings, everything, **private)
        for setting, events in ((chosen, "change"), (count, "release"), (rerank, "change"), (text, "change")):
            getattr(setting, events)(update, settings, results, **private)
        blocks.unload(close)
    return blocks


class Guard:
    """ASGI middleware: other computers and other sites get nothing, the browser loads nothing from elsewhere, and
    gradio's own routes to files and uploads, which are not used, are closed.
    """

    POLICY = "default-src 'self' data: 'unsafe-inline' 'unsafe-eval'; form-action 'none'; frame-ancestors 'none'"
    CLOSED = ("upload", "file", "stream", "proxy", "download", "component_server", "runs")

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").partition(":")[0]
        route = scope["path"].removeprefix("/gradio_api").strip("/").split("/")[0].split("=")[0]
        if host not in THIS_COMPUTER or route in self.CLOSED:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            return await send({"type": "http.response.body", "body": b""})

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                headers = [
                    (b"content-security-policy", self.POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"cache-control", b"no-store"),
                ]
                message = message | {"headers": [*message["headers"], *headers]}
            await send(message)

        await self.app(scope, receive, send_guarded)


def serve(gradio, blocks, args):
    """Listen until Ctrl+C."""
    from starlette.middleware import Middleware

    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with tempfile.TemporaryDirectory(prefix="diffreid-app-") as folder:
        # Nothing is put there: the folder is for what gradio itself may want to keep.
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks.launch(
            server_name=THIS_COMPUTER[0],
            server_port=args.server_port,
            share=False,
            # Otherwise gradio keeps every query and its results in the browser's own storage.
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            footer_links=[],
            theme=theme,
            css_paths=TEMPLATES / "app.css",
            app_kwargs={"middleware": [Middleware(Guard)]},
            prevent_thread_lock=True,
            quiet=True,
        )
        print(f"Open http://{THIS_COMPUTER[0]}:{args.server_port} in a browser; Ctrl+C ends it")
        blocks.block_thread()


def run_script(args):
    launch.end_with(
        main,
        args,
        "app.py",
        lean=f"lower --eval_batch_size, now {args.eval_batch_size}",
        kept=f"features in {args.output_dir} are as they were before",
    )


if __name__ == "__main__":
    run_script(args)
