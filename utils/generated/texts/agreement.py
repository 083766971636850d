"""How far a generated image shows what its prompt says: a question answerer's answers against the prompt's attributes.

attributes_of("a photo of a person, wearing a red coat and black shoes, carrying a bag, in a park")
# {"upper": "red coat", "shoes": "black shoes", "carried": "bag", "hat": "nothing"}
"""

import re

from utils.generated.texts.answers import ABSENT, COLOURS, HATS, LOWER, NOTHING, SHOES, clean, tidy

# What tells who a person is; action, view and place may differ between any two images of one identity.
WORN = ("upper", "lower", "shoes", "hair", "carried", "hat")
# Prompts do not name these where there are none.
ADDED = ("carried", "hat")


def attributes_of(prompt):
    """{attribute: words} of what a prompt of `captions.compose` says that the person wears, has and carries.

    Empty if it names no clothes: then nothing is known of bags and hats either. Other prompts give what looks alike.
    """
    parts = [part.strip() for part in prompt.lower().split(",")]
    start = next((number for number, part in enumerate(parts) if part.startswith("wearing ")), None)
    if start is None:
        return {}
    rest = parts[start + 1 :]
    halves = split_at_and(parts[start].removeprefix("wearing "))
    if len(halves) == 1 and rest and len(split_at_and(rest[0])) == 2 and opening(rest[0]) is None:
        halves += split_at_and(rest.pop(0))
    found = garments(halves)
    if not found:
        return {}
    for part in rest:
        key = opening(part)
        if key is not None and key not in found:
            found[key] = part.split(" ", 1)[1]
    found = {key: tidy(words, 12) for key, words in found.items()}
    return {key: words for key, words in (dict.fromkeys(ADDED, NOTHING) | found).items() if words}


def opening(part):
    """The attribute that a part of a prompt names by its first word, or None."""
    first, _, words = part.partition(" ")
    if first == "with" and "hair" in words.split():
        return "hair"
    if first == "carrying":
        return "carried"
    # "in a park" is a place.
    return "hat" if first == "in" and words.split()[-1:] and words.split()[-1] in HATS else None


def split_at_and(words):
    """ "a black and white shirt and blue jeans" -> its two garments: neither ends with a colour."""
    # A template's slot may be empty.
    pieces = [piece for piece in re.split(r"(?:^|\s)and(?:\s|$)", words) if piece.strip()]
    for number in range(1, len(pieces)):
        left, right = " and ".join(pieces[:number]), " and ".join(pieces[number:])
        if left.split()[-1] not in COLOURS and right.split()[-1] not in COLOURS:
            return [left, right]
    return [" and ".join(pieces)] if pieces else []


def garments(items):
    """Garments by attribute: three are upper, lower and shoes; of fewer, nouns tell which they are."""
    if len(items) == 3:
        return dict(zip(WORN, items, strict=False))
    found = {}
    for item in items:
        noun = item.split()[-1]
        found["shoes" if noun in SHOES else "lower" if noun in LOWER or "upper" in found else "upper"] = item
    return found


def agreement(said, answer):
    """How far an answer agrees with the prompt, 0 to 1: twice the words they share of all their words.

    None if the answer says nothing.
    """
    said, answer = ({*words.replace("-", "").split()} for words in (said, answer))
    if not said or not answer:
        return None
    if said & ABSENT or answer & ABSENT:
        return float(bool(said & ABSENT) and bool(answer & ABSENT))
    return 2 * len(said & answer) / (len(said) + len(answer))


def agreements(prompt, answers, changed=None):
    """{attribute: agreement} of one image; `answers` {attribute: answer}, `changed`: a garment that does not count."""
    return {
        key: value
        for key, said in attributes_of(prompt).items()
        if key != changed and (value := agreement(said, clean(answers.get(key) or "", key))) is not None
    }


def check_prompts(generated):
    """ValueError unless some prompt of the set names what a person wears."""
    if "prompt" not in generated.schema.names:
        raise ValueError(
            f"--captioner compares images with their prompts, but {generated.name} has no column prompt; leave it out"
        )
    if not has_prompts(generated):
        raise ValueError(
            f"--captioner: no prompt of {generated.name} names clothes (`wearing a red coat`), so there is nothing to "
            "compare images with; leave it out"
        )


def has_prompts(generated):
    """Whether some prompt of the set names what a person wears."""
    return "prompt" in generated.schema.names and any(
        attributes_of(prompt or "") for table in generated.tables() for prompt in set(table["prompt"].to_pylist())
    )
