"""Captions: the questions about each image, how their answers merge into one description, and its prompts."""

import csv
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from utils.generated.texts.answers import ABSENT, COLOURS, clean, tidy

QUESTIONS = {
    "upper": "what is the person wearing on the upper body?",
    "lower": "what is the person wearing on the lower body?",
    "shoes": "what shoes is the person wearing?",
    "hair": "what hair does the person have?",
    "carried": "what is the person carrying?",
    "hat": "what is the person wearing on the head?",
    "action": "what is the person doing?",
    "view": "from which side is the person seen?",
    "scene": "where is the person?",
}
# Each generated image draws one phrase of every list.
DIVERSITY = {
    "scene": [
        "outdoors", "indoors", "on a street in the rain", "in the snow", "in an indoor hall", "on a bright campus",
        "on a street at night", "in a metro station", "in a shop", "in a park", "at an airport", "on a square",
    ],
    "action": [
        "walking", "standing", "running", "sitting", "riding a bicycle", "looking at a phone", "talking on a phone",
        "waiting", "turning around", "climbing stairs",
    ],
    "carried": [
        "nothing", "black backpack", "red backpack", "blue backpack", "brown handbag", "black handbag",
        "green shoulder bag", "black shoulder bag",
    ],
    "view": ["front", "behind", "side"],
}  # fmt: skip
# What a clothing change draws from. The garments of an image are the identity's own but for the one that is changed.
CLOTHES = {
    "upper": [
        "red jacket", "blue jacket", "black coat", "green coat", "white shirt", "blue shirt", "grey hoodie",
        "black hoodie", "yellow t-shirt", "white t-shirt", "orange t-shirt", "purple shirt",
    ],
    "lower": [
        "blue jeans", "black jeans", "grey trousers", "brown trousers", "beige trousers", "black shorts",
        "white shorts", "red skirt",
    ],
    "shoes": ["white shoes", "black shoes", "brown shoes", "red shoes"],
    "hat": ["black cap", "red cap", "grey beanie"],
}  # fmt: skip
CLASS_PROMPT = "a photo of a person"
MAX_CAPTION_WORDS = 40


def majority(answers):
    """The most frequent non-empty answer, the first of equals, or ""."""
    counts = Counter(answer for answer in answers if answer)
    return max(counts, key=counts.get, default="")


def compose(attributes, class_prompt=CLASS_PROMPT, caption=""):
    """P_LPE*: the class prompt and the known attributes; absent ones are left out."""
    known = {key: value for key, value in attributes.items() if value and value.lower() not in ABSENT}
    worn = [article(known["upper"])] if "upper" in known else []
    worn += [known[key] for key in ("lower", "shoes") if key in known]
    parts = [caption] if caption else []
    if worn:
        parts.append("wearing " + " and ".join(filter(None, [", ".join(worn[:-1]), worn[-1]])))
    phrases = {
        "hair": "with {}",
        "carried": "carrying {}",
        "hat": "in {}",
        "action": "{}",
        "view": "{}",
        "scene": "{}",
    }
    for key, phrase in phrases.items():
        if key in known:
            value = article(known[key]) if key in ("carried", "hat") else known[key]
            parts.append(phrase.format(seen_from(value) if key == "view" else value))
    return ", ".join([class_prompt, *parts])


def article(words):
    plural = words.endswith("s") and not words.endswith(("ss", "us", "dress"))
    if plural or re.match(r"(a|an|the|two|some|\d+) ", words):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def seen_from(words):
    if words.startswith(("seen", "from")):
        return words
    return f"seen from {'' if words in ('behind', 'above', 'below') else 'the '}{words}"


def with_token(prompt, token, noun):
    """P_E: the identity token before the noun; "a person" becomes "TOKEN person"."""
    match = re.search(rf"\b(?:(?:a|an|the) )?({re.escape(noun)})\b", prompt)
    if match is None:
        raise ValueError(f"the prompt {prompt!r} has no {noun!r} for the identity token to stand before")
    return f"{prompt[: match.start()]}{token} {prompt[match.start(1) :]}"


def fit(prompt, tokenizer, room=0):
    """The prompt, cut at a word to the tokenizer's window less `room` tokens."""
    window = tokenizer.model_max_length - room
    words = prompt.split(" ")
    while len(words) > 1 and len(tokenizer(" ".join(words), verbose=False).input_ids) > window:
        words.pop()
    return " ".join(words).rstrip(",")


def draw_attributes(attributes, lists, *seed):
    """The attributes, with a phrase drawn from each list in place of the identity's own."""
    rng = random.Random("/".join(map(str, ("attributes", *seed))))
    return attributes | {key: rng.choice(values) for key, values in sorted(lists.items())}


def is_changed(index, share):
    """Whether the image with this number has other clothes, evenly spread; with a share below 0.5 never half of them.

    An image's number alone decides, so that later images change nothing about earlier ones.
    """
    return math.floor((index + 1) * share + 1e-9) > math.floor(index * share + 1e-9)


def change_clothes(attributes, clothes, *seed):
    """(the attributes with one garment changed, its name), or (the attributes, None) if no garment is known."""
    rng = random.Random("/".join(map(str, ("clothing", *seed))))
    options = {}
    for garment, values in sorted(clothes.items()):
        own = attributes.get(garment, "")
        if own and own.lower() not in ABSENT and (others := [value for value in values if value != own]):
            options[garment] = others
    if not options:
        return attributes, None
    garment = rng.choice(sorted(options))
    return attributes | {garment: rng.choice(options[garment])}, garment


def reference_prompt(record, class_prompt=CLASS_PROMPT):
    """The prompt of a reference set that many identities share: it names the upper garment's colour and kind only.

    A prompt written by hand, or made from a caption, stays as it is.
    """
    attributes = record["attributes"]
    if record.get("text") or not attributes:
        return record.get("text") or composed(record, class_prompt)
    upper = attributes.get("upper", "")
    return compose({"upper": upper if upper in ABSENT else colour_and_kind(upper)}, class_prompt)


def colour_and_kind(words):
    """ "long red coat with buttons" -> "red coat"."""
    parts = re.split(r" (?:with|over|under|on|of|and) ", words)
    # "black and white shirt" is one garment, "black shirt and jeans" are two.
    name = next((part.split() for part in parts if part.split() and part.split()[-1] not in COLOURS), words.split())
    colour = next((word for word in words.split() if word in COLOURS), "")
    return f"{colour} {name[-1]}".strip() if name else ""


def read_lists(path):
    """A user's own lists: JSON such as {"scene": ["in a park", ...]}; a list that is absent keeps its default.

    The lists of garments are those that a clothing change draws from.
    """
    try:
        lists = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(lists, dict):
        raise ValueError(f'{path} must hold lists by name, such as {{"scene": ["in a park"]}}')
    for key, values in lists.items():
        if key not in QUESTIONS:
            raise ValueError(f"{path} has a list {key!r}; known are {', '.join(QUESTIONS)}")
        if not (
            isinstance(values, list) and values and all(isinstance(text, str) and text.strip() for text in values)
        ):
            raise ValueError(f"{path}: {key!r} must be a list of at least one phrase, got {values!r}")
    return DIVERSITY | lists


# Captions on disk


def captions_table(captions):
    """The table of captions.parquet: a row for each identity, in the given order."""
    answer = pa.struct([("path", pa.string()), ("caption", pa.string()), *((key, pa.string()) for key in QUESTIONS)])
    fields = [("domain", pa.string()), ("pid", pa.int64()), ("camid", pa.int64())]
    fields += [("prompt", pa.string()), ("identity_prompt", pa.string()), ("caption", pa.string())]
    fields += [(key, pa.string()) for key in QUESTIONS]
    schema = pa.schema([*fields, ("images", pa.list_(answer))])
    rows = [
        {**record, **{key: record["attributes"].get(key, "") for key in QUESTIONS}, "images": [
            {"path": image["path"], "caption": image["caption"], **image["answers"]} for image in record["images"]
        ]}
        for record in captions
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


def read_captions(path):
    """{(domain or None, pid): row} of captions.parquet, or of a csv or jsonl with some of its columns.

    `seen` of a row: the merged answers about its images, or None without images.
    """
    rows = {}
    for number, row in enumerate(read_rows(Path(path)), start=1):
        try:
            key = (row.get("domain") or None, whole(row["pid"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise ValueError(f"{path}: row {number} has no whole number as `pid`") from None
        if not isinstance(key[0], str | None):
            raise ValueError(f"{path}: `domain` of identity {key[1]} must be text, got {key[0]!r}")
        words = {name: row.get(name) or "" for name in ("prompt", "caption", *QUESTIONS)}
        if bad := [name for name, value in words.items() if not isinstance(value, str)]:
            raise ValueError(f"{path}: `{bad[0]}` of identity {key[1]} must be text, got {row[bad[0]]!r}")
        words = {name: " ".join(value.split()) for name, value in words.items()}
        if key in rows:
            raise ValueError(f"{path} has identity {key[1]} twice")
        if not any(words.values()):
            raise ValueError(f"{path}: identity {key[1]} has neither a prompt nor attributes")
        rows[key] = words | {"seen": seen_of(row.get("images"))}
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def read_rows(path):
    """The rows of a file as dicts; skips the byte-order mark and the empty rows that spreadsheets write."""
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            return [json.loads(line) for line in lines if line.strip()]
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                return [row for row in csv.DictReader(file) if any(row.values())]
        raise ValueError("it must end in .parquet, .csv or .jsonl")
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as captions: {error}") from error


def whole(value):
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError(f"{value} is no whole number")
    return number


def seen_of(images):
    """A row's answers, merged; None for a csv, whose answers are a single string."""
    if not (isinstance(images, list) and images and all(isinstance(image, dict) for image in images)):
        return None
    return merged([{name: str(value or "") for name, value in image.items()} for image in images])


def answers_of(images):
    """The answers of a record's images, in the form of a row."""
    return [{"caption": image["caption"], **image["answers"]} for image in images]


def merged(images):
    """The majority of the captions and of the answers to each question, over the images of a sequence."""
    attributes = {key: majority(clean(image.get(key) or "", key) for image in images) for key in QUESTIONS}
    return {
        "attributes": {key: value for key, value in attributes.items() if value},
        "caption": majority(tidy(image.get("caption") or "", MAX_CAPTION_WORDS) for image in images),
    }


def composed(record, class_prompt=CLASS_PROMPT):
    """P_LPE* of a record: from its attributes, or from its caption if the captioner cannot answer questions."""
    return compose(record["attributes"], class_prompt, "" if record["attributes"] else record["caption"])


def row_of(rows, identity):
    return rows.get((identity.domain, identity.pid)) or rows.get((None, identity.pid))


def check_rows(rows, everyone, wanted, path):
    """ValueError unless each row is of an identity with images and each wanted identity has a row."""
    known = {(domain, identity.pid) for identity in everyone for domain in (identity.domain, None)}
    for domain, pid in rows:
        if (domain, pid) not in known:
            name = pid if domain is None else f"{domain}/{pid}"
            raise ValueError(f"{path} names identity {name}, of which the source has no images")
    if missing := [identity.name for identity in wanted if row_of(rows, identity) is None]:
        raise ValueError(
            f"{path} has no row for {len(missing)} identities, {missing[0]} for one; add them, or choose those it has "
            "with --ids"
        )


def edited(record, before, row, fit, identity, class_prompt=CLASS_PROMPT):
    """The record with the edits of a row that was written from `before` and may have been edited since.

    A changed prompt is used as it is; changed attributes or a changed caption make a new prompt. The record stores the
    edit, so that the same row is the same edit again when `before` is the record it led to.
    """
    edit = before.get("edit")
    if edit is None or row != edit["row"]:
        changes = said_otherwise(row, before, fit, identity, class_prompt)
        edit = {"row": row, "said": changes} if changes else edit
    return record | edit["said"] | {"edit": edit} if edit else record


def by_hand(record):
    """({attribute: words} that a record has, attributes that it lacks) against what its images say: edits by hand."""
    seen, own = merged(answers_of(record["images"]))["attributes"], record["attributes"]
    return {key: value for key, value in own.items() if value != seen.get(key)}, seen.keys() - own.keys()


def said_otherwise(row, before, fit, identity, class_prompt):
    # What a row changes in the record `before`: its text, or its attributes and caption; {} for no change.
    words = {"attributes": {key: row[key] for key in QUESTIONS if row[key]}, "caption": row["caption"]}
    made = fit(composed(words, class_prompt), identity)
    if row["prompt"] and row["prompt"] not in (before.get("prompt"), made):
        return {"text": row["prompt"]}
    # A file need not have all columns.
    if any(value and value != before.get(name) for name, value in words.items()):
        return words | {"text": ""}
    return {}


def stated(record, row, fit, identity, class_prompt=CLASS_PROMPT):
    """The record with the row in place of its own prompt, attributes and caption."""
    # The prompt that the answers give is not an edit.
    merged_answers = row["seen"] or (record["images"] and merged(answers_of(record["images"])))
    made = {"prompt": fit(composed(merged_answers, class_prompt), identity)} if merged_answers else {}
    blank = {"attributes": {}, "caption": "", "text": "", "edit": None}
    return record | blank | said_otherwise(row, made, fit, identity, class_prompt)
