"""A text of each training identity, from a captioner or from captions that exist, for prompts of a diffusion model."""

from pathlib import Path

import pyarrow.parquet as pq
from accelerate.utils import broadcast
from tqdm.auto import tqdm

from utils.datasets.identities import identities_of
from utils.datasets.load import load_reid
from utils.diffusion.families.texts import check_text_encoder, encode_texts, load_tokenizer
from utils.files import write_together
from utils.generated.made_set import CAPTIONS
from utils.generated.texts import captions
from utils.generated.texts.captioners import Captioner, check_captioner
from utils.generated.texts.captioning import caption_identity
from utils.worklist import Worklist, share

MAX_IMAGES = 32
# Start, end, and a word between them.
FEWEST_TOKENS = 3
MADE_BY = "make them with train_dreambooth_reid.py --captions_only --source {}"


class CaptionPrompts:
    """The start of a diffusion model's prompts: random, or the text encoder's states of a caption of each identity.

    start: `random`, `captions`, or a file of captions; num_tokens: `end`, `all`, or a number; `name` is the diffusion
    checkpoint and `width` that of its conditions. What cannot be is a ValueError, before any weights are loaded.
    `num_tokens` is then the number of tokens, None for the end token alone.
    """

    def __init__(self, start, num_tokens, width, name, captioner=None, revision=None):
        self.start, self.name, self.captioner, self.revision = start, name, captioner, revision
        window = check_text_encoder(name, width, revision)
        self.num_tokens = {"end": None, "all": window}.get(num_tokens, num_tokens)
        if start == "captions":
            check_captioner(captioner)
        elif start != "random":
            captions.read_captions(start)
        if (self.num_tokens or 0) > window:
            raise ValueError(
                f"--prompt_tokens {num_tokens}: the text encoder of {name!r} has {window} tokens; give fewer"
            )
        if start != "random" and (self.num_tokens or window) < FEWEST_TOKENS:
            raise ValueError(
                f"--prompt_tokens {num_tokens} leaves no word between start and end of a text; give {FEWEST_TOKENS} "
                "or more, or end"
            )

    def make(self, specs, train, labels, accelerator, folder, **options):
        """Prompts (N, width) or (N, num_tokens, width) of labels 0..N-1, float32, on all processes the same.

        `folder` keeps the captions that are made; `options` are those of `training_identities`.
        """
        identities = training_identities(specs, train, labels, **options)
        if self.start == "captions":
            texts = captioned(identities, self.captioner, folder, accelerator)
        else:
            texts = texts_from(self.start, identities, " ".join(specs))
        texts = self.fitted(texts, identities, accelerator.print)
        states = encode_texts(self.name, texts, self.num_tokens, device=accelerator.device, revision=self.revision)
        # Machines may round differently.
        return broadcast(states.to(accelerator.device)).cpu()

    def fitted(self, texts, identities, say):
        """The texts, cut at a word to fit the tokens of a prompt."""
        tokenizer = load_tokenizer(self.name, self.revision)
        window = tokenizer.model_max_length
        size = self.num_tokens or window
        fitted = [captions.fit(text, tokenizer, window - size) for text in texts]
        cut = [identity.name for identity, new, old in zip(identities, fitted, texts, strict=True) if new != old]
        if cut:
            say(f"{len(cut)} captions have more than {size} tokens and are cut at a word, that of {cut[0]} for one")
        different = len(set(fitted))
        if different == 1:
            say(
                f"WARNING: all captions are equal ({fitted[0]!r}): their prompts have rank one, and the condition "
                "cannot tell identities apart"
            )
        else:
            say(f"Prompts from captions: {different} different texts of {len(fitted)} identities")
        return fitted


def training_identities(specs, train, labels, *, root=None, skip_unreadable=False):
    """The `Identity` of each label, in order.

    Several sources give their identities new numbers; the names of the images lead back to the old ones.
    """
    images = zip(train["domain"][:], train["path"][:], strict=True)
    label_of = dict(zip(images, labels.tolist(), strict=True))
    found, names = {}, set()
    for spec in specs:
        data = load_reid(spec, root, skip_unreadable=skip_unreadable)
        for identity in identities_of(data["train"], MAX_IMAGES):
            label = label_of.get((identity.domain, identity.paths[0]))
            if label is None:
                continue
            if identity.name in names:
                raise ValueError(
                    f"two of the sources have an identity {identity.name}, so captions cannot tell them apart; name "
                    "each source once, or give them names in a column `domain` of their metadata"
                )
            found[label] = identity
            names.add(identity.name)
    return [found[label] for label in sorted(found)]


def texts_from(path, identities, specs):
    rows = captions.read_captions(path)
    domains = sorted({identity.domain for identity in identities})
    if len(domains) > 1 and any(domain is None for domain, _ in rows):
        raise ValueError(f"{path} has rows without a domain, and the sources are {', '.join(domains)}; add the column")
    missing = [identity.name for identity in identities if captions.row_of(rows, identity) is None]
    if missing:
        others = sorted({domain for domain, _ in rows if domain} - set(domains))
        said = f"; it has captions of {', '.join(others)}" if others else ""
        raise ValueError(
            f"{path} has no caption of {len(missing)} of {len(identities)} training identities, {missing[0]} for "
            f"one{said}; {MADE_BY.format(specs)}"
        )
    seen = images_seen(path)
    # Of some, the file may not say it.
    known = [identity for identity in identities if captions.row_of(seen, identity)]
    if known and not any(captions.row_of(seen, identity) & set(identity.paths) for identity in known):
        raise ValueError(
            f"{path} has captions of other images, such as {min(captions.row_of(seen, known[0]))} of {known[0].name}, "
            f"of which the source has {known[0].paths[0]}; {MADE_BY.format(specs)}"
        )
    return [text_of(captions.row_of(rows, identity)) for identity in identities]


def images_seen(path):
    """{(domain or None, pid): names of the images that a file of captions is about}, of the rows that say so."""
    seen = {}
    for row in captions.read_rows(Path(path)):
        images = row.get("images")
        images = images if isinstance(images, list) else []
        names = {str(image["path"]) for image in images if isinstance(image, dict) and image.get("path")}
        seen[row.get("domain") or None, int(row["pid"])] = names
    return seen


def text_of(row):
    attributes = {key: row[key] for key in captions.QUESTIONS if row[key]}
    return row["prompt"] or captions.composed({"attributes": attributes, "caption": row["caption"]})


def captioned(identities, name, folder, accelerator):
    """Texts of the captioner; `folder` keeps them, as records while they are made and as captions.parquet."""
    work = Worklist(folder, [identity.name for identity in identities])
    made_with = {"captioner_model_name_or_path": str(name), "max_sequence_images": MAX_IMAGES}
    processes = {"num_processes": accelerator.num_processes, "process": accelerator.process_index}
    captioner = None
    for identity in tqdm(share(identities, **processes), desc="captions", disable=None):
        record = work.read(identity.name, CAPTIONS)
        paths = record and [image["path"] for image in record["images"]]
        # The same number may be another person by now.
        if record is None or record["made_with"] != made_with or paths != list(identity.paths):
            captioner = captioner or Captioner.from_pretrained(name, device=accelerator.device)
            record = caption_identity(captioner, identity, made_with)
            record |= {"prompt": captions.composed(record), "identity_prompt": ""}
            work.commit(identity.name, CAPTIONS, record)
    accelerator.wait_for_everyone()
    records = [work.read(identity.name, CAPTIONS) for identity in identities]
    if None in records:
        raise ValueError(
            f"the captions of {identities[records.index(None)].name} are not in {folder}; with several machines, "
            "--output_dir must lie on a disk that all of them see"
        )
    if accelerator.is_main_process:
        with write_together(folder) as part:
            pq.write_table(captions.captions_table(records), part("captions.parquet"))
        work.tidy()
    return [record["prompt"] for record in records]
