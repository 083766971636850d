"""Captions of identities, from a captioner or from a user's rows, and the prompts written from them."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import AddedToken

from utils.generated.made_set import CAPTIONS, FAILED, attempt
from utils.generated.texts import captions
from utils.worklist import Progress

# The record of an identity that no captioner has seen.
NOTHING_SEEN = {"attributes": {}, "caption": "", "images": [], "made_with": None}
CAPTIONER_LEAN = "--captioner_bits 8 half of the captioner's weights, --captioner_batch_size 1 the rest"


@dataclass(frozen=True)
class Prompts:
    """Writes the prompts of each identity, with and without the identity token.

    class_prompt: P; its last word is the noun. identity_token: a token in <brackets> is new to the vocabulary and gets
    an id from `first_id` on; `{pid}` stands for the identity's number. lists: phrases that generated images draw from,
    {attribute: phrases}; those of garments only where one of them is changed. shares_references: whether reference
    images are drawn from a prompt that many identities have in common.
    """

    tokenizer: Any
    first_id: int
    class_prompt: str
    identity_token: str
    lists: dict
    progress: Progress
    shares_references: bool = False

    @property
    def noun(self):
        return self.class_prompt.split()[-1]

    @property
    def has_new_tokens(self):
        """Whether the token is new to the vocabulary."""
        return self.identity_token.startswith("<") and self.identity_token.endswith(">")

    def token_of(self, identity):
        return self.identity_token.replace("{pid}", f"{identity.pid:04d}")

    def fit(self, prompt, identity):
        """The prompt, cut so that it fits the text encoder together with the token."""
        room = len(self.tokenizer(self.token_of(identity), add_special_tokens=False).input_ids)
        fitted = captions.fit(prompt, self.tokenizer, room)
        if fitted != prompt:
            self.progress.once(
                "cut",
                f"Prompts longer than the text encoder's {self.tokenizer.model_max_length} tokens are cut at a word, "
                f"that of {identity.name} for one",
            )
        return fitted

    def written(self, record, identity):
        """The record with its prompts P_LPE*, P_E and that of its reference images, cut to fit the text encoder."""
        text, token = record.get("text", ""), self.token_of(identity)
        if re.search(rf"(?<!\w){re.escape(token)}(?!\w)", text):
            raise ValueError(f"the prompt of {identity.name} has the identity token {token!r} in it; leave it out")
        prompt = self.fit(text or captions.composed(record, self.class_prompt), identity)
        try:
            identity_prompt = captions.with_token(prompt, token, self.noun)
        except ValueError as error:
            raise ValueError(f"{identity.name}: {error}; say {self.noun}, or give another --class_prompt") from None
        reference = prompt
        if self.shares_references:
            reference = self.fit(captions.reference_prompt(record | {"text": text}, self.class_prompt), identity)
        words = {"text": text, "prompt": prompt, "identity_prompt": identity_prompt, "reference_prompt": reference}
        return record | words

    def of_sequence(self, record, identity):
        """P_E of each image of the sequence, from what is said of it alone; the identity's where there is nothing.

        What was edited by hand holds for every image.
        """
        answers = {image["path"]: captions.answers_of([image]) for image in record["images"]}
        added, removed = captions.by_hand(record)
        texts = []
        for path in identity.paths:
            text, own = record["identity_prompt"], {"attributes": {}, "caption": ""}
            if path in answers and not record["text"]:
                own = captions.merged(answers[path])
                attributes = own["attributes"] | added
                own["attributes"] = {key: words for key, words in attributes.items() if key not in removed}
            if own["attributes"] or own["caption"]:
                prompt = self.fit(captions.composed(own, self.class_prompt), identity)
                text = captions.with_token(prompt, self.token_of(identity), self.noun)
            texts.append(text)
        return texts

    def alone(self, identity):
        """The class prompt with the identity's token and nothing else."""
        return captions.with_token(self.class_prompt, self.token_of(identity), self.noun)

    def of_images(self, record, identity, numbers, seed, clothing_change=0.0):
        """An `ImagePrompt` for each number of an image; `clothing_change`: the share of images with other clothes."""
        # A prompt written by hand is used without the attributes and the caption.
        known = {} if record["text"] else record["attributes"]
        caption = "" if record["text"] or known else record["caption"]
        clothes = captions.CLOTHES | {key: words for key, words in self.lists.items() if key in captions.CLOTHES}
        scenes = {key: words for key, words in self.lists.items() if key not in captions.CLOTHES}
        prompts = []
        for number in numbers:
            own, garment = known, None
            if captions.is_changed(number, clothing_change):
                own, garment = captions.change_clothes(known, clothes, seed, identity.name, number)
            drawn = captions.draw_attributes(own, scenes, seed, identity.name, number)
            prompt = self.fit(captions.compose(drawn, record["text"] or self.class_prompt, caption), identity)
            words = [drawn[key] for key in sorted(scenes) if drawn[key] not in captions.ABSENT]
            words += [drawn[garment]] if garment else []
            with_token = captions.with_token(prompt, self.token_of(identity), self.noun)
            prompts.append(ImagePrompt(words, with_token, prompt, garment))
        return prompts

    def without_token(self, prompt, identity):
        """A prompt of `of_images` for a model that does not know the token."""
        return prompt.replace(f"{self.token_of(identity)} {self.noun}", f"a {self.noun}", 1)


class ImagePrompt(NamedTuple):
    """The drawn words, P_E with these words, the same prompt without the token, and the changed garment or None."""

    words: list
    with_token: str
    plain: str
    changed: str | None


def open_prompts(tokenizer, identities, *, class_prompt, identity_token, lists, progress, shares_references=False):
    """`Prompts`, after the new tokens of all identities are added; words without brackets add none."""
    prompts = Prompts(tokenizer, len(tokenizer), class_prompt, identity_token, lists, progress, shares_references)
    tokens = dict.fromkeys(prompts.token_of(identity) for identity in identities)
    if prompts.has_new_tokens:
        if known := [token for token in tokens if token in tokenizer.get_vocab()]:
            raise ValueError(
                f"--identity_token asks for the new token {known[0]!r}, which is a word of the vocabulary already; "
                "choose another, or words without brackets to be used as they are"
            )
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    longest = max(identities, key=lambda identity: identity.pid)
    if prompts.fit(class_prompt, longest) != class_prompt:
        raise ValueError("--class_prompt and --identity_token leave no room in a prompt; give shorter ones")
    return prompts


def caption_identity(captioner, identity, made_with):
    """LPE: the answers about every image of the sequence, merged by majority."""
    images = identity.images()
    image_captions = captioner.describe(images) if captioner.can_describe else [""] * len(images)
    answers = {key: [""] * len(images) for key in captions.QUESTIONS}
    if captioner.can_answer:
        answers = {key: captioner.ask(images, question) for key, question in captions.QUESTIONS.items()}
    image_records = [
        {"path": path, "caption": caption, "answers": {key: values[row] for key, values in answers.items()}}
        for row, (path, caption) in enumerate(zip(identity.paths, image_captions, strict=True))
    ]
    return {
        "domain": identity.domain,
        "pid": identity.pid,
        "camid": identity.camid,
        **captions.merged(captions.answers_of(image_records)),
        "images": image_records,
        "made_with": made_with,
    }


def caption_identities(work, progress, prompts, identities, mine, *, rows, made_with, load_captioner):
    """{name: record} of all captioned identities; makes the captions of `mine` that do not exist yet.

    `rows`: a user's own captions, which replace the captioner's, or None. `made_with` names the captioner;
    `load_captioner()` opens it when it is first needed. Edits of captions.parquet apply to all identities at once, so
    that a merge cannot undo them.
    """
    table = work.folder / "captions.parquet"
    edits = rows or (captions.read_captions(table) if table.is_file() else {})
    names, records, captioner = {identity.name for identity in mine}, {}, None
    for identity in identities:
        record = before = work.read(identity.name, CAPTIONS)
        if record is None or record["made_with"] not in (None, made_with):
            if identity.name not in names:
                continue
            if rows:
                record = NOTHING_SEEN | {"domain": identity.domain, "pid": identity.pid, "camid": identity.camid}
            else:
                progress.stage(identity.name, "captions")
                captioner = captioner or load_captioner()
                record = attempt(
                    work, progress, identity.name, CAPTIONER_LEAN, caption_identity, captioner, identity, made_with
                )
                if record is None:
                    continue
                work.forget(identity.name, FAILED)
        if row := captions.row_of(edits, identity):
            writing = (prompts.fit, identity, prompts.class_prompt)
            if rows:
                record = captions.stated(record, row, *writing)
            else:
                record = captions.edited(record, before or {}, row, *writing)
        records[identity.name] = prompts.written(record, identity)
        if records[identity.name] != before:
            work.commit(identity.name, CAPTIONS, records[identity.name])
    return records
