"""Answers of a captioner in the form a prompt uses: the noun phrase of a sentence, without verb and article.

clean("he is wearing a black shirt")      # "black shirt"
clean("his shoes are white", "shoes")     # "white shoes"
clean("there is no hat", "hat")           # "nothing"
"""

import re

NOTHING = "nothing"
ABSENT = {NOTHING, "none", "no", "no one", "nobody"}
UNKNOWN = {
    "unknown", "unclear", "not visible", "not sure", "unsure", "can t tell", "cannot tell", "i don t know", "n a",
    "yes", "person", "unanswerable", "he", "she", "they", "it", "man", "woman", "boy", "girl", "people", "someone",
    "clothes", "clothing",
}  # fmt: skip
MAX_WORDS = 6
GARMENTS = ("upper", "lower", "shoes", "hat", "carried")
# What an answer that is a colour alone is about.
THINGS = {"upper": "top", "lower": "trousers", "shoes": "shoes", "hair": "hair"}
# Nouns that tell what a garment is.
SHOES = {"shoes", "boots", "sneakers", "sandals", "slippers", "heels", "trainers", "loafers", "flip-flops"}
LOWER = {
    "jeans", "trousers", "pants", "shorts", "skirt", "leggings", "sweatpants", "tights", "slacks", "joggers",
}  # fmt: skip
HATS = {
    "hat", "cap", "beanie", "helmet", "hood", "beret", "bandana", "headband", "headscarf", "hijab", "turban", "visor",
    "scarf", "veil", "mask", "wig", "crown", "bonnet",
}  # fmt: skip
NOUNS = {"lower": LOWER, "shoes": SHOES, "hat": HATS}
COLOURS = (
    "black", "white", "grey", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "beige",
    "dark", "light", "navy", "tan", "khaki", "striped", "colorful",
)  # fmt: skip
ARTICLE = re.compile(r"^(a|an|the|his|her|their|its|some) ")
PEOPLE = r"(?:person|people|man|woman|boy|girl|guy|lady|gentleman|pedestrian|individual|subject|someone|figure)"
SUBJECT = re.compile(
    rf"^(?:(?:(?:a|an|the|this|that) )?(?:\w+ ){{0,2}}?{PEOPLE}\b(?: (?:in|of) the (?:image|photo|picture))?"
    r"|(?:he|she|they|it|this|that|these|those|there|who|which)\b)"
)
OPENING = re.compile(
    r"^(?:yes|yeah|yep|well|sure|ok|okay|probably|possibly|maybe|perhaps|likely|also|i think|i guess|i believe|that|"
    r"in (?:the|this) (?:image|photo|picture)|the answer is|answer)\b ?"
)
BE = r"(?:is|are|was|were|s|re|be|being|been|am)"
VERB = re.compile(
    rf"^(?:{BE}|has|have|had|having|got|can be|appears?|seems?|looks?|looking|to be|to have|like|as if|as though|"
    r"currently|now|just|also|both|probably|possibly|visible|shown|pictured|depicted|located)\b ?"
)
# The verbs of a question and of its phrase in the prompt, which would be said twice.
VERBS = {
    "upper": r"wearing|wears?|worn|dressed in|dressed|clothed in|in",
    "lower": r"wearing|wears?|worn|dressed in|dressed|clothed in|in",
    "shoes": r"wearing|wears?|worn|in",
    "hair": r"with|wearing",
    "carried": r"carrying|carries|carry|holding|holds|hold|with|using",
    "hat": r"wearing|wears?|worn|in|with",
    "action": r"doing|busy|engaged in",
    "view": r"seen|viewed|facing(?= (?:the )?(?:front|back|side|left|right))|from|in|visible",
    "scene": r"standing|walking|sitting|located|waiting|posing|riding|running",
}
ANY_VERB = "|".join(VERBS[key] for key in ("upper", "shoes", "hair", "carried", "action"))
DOUBT = re.compile(
    r"\b(?:can ?not|can t|cannot|could not|couldn t|unable to|hard to|difficult to) (?:be |really )?"
    r"(?:see|seen|tell|say|determine|determined|know|visible|identify)\b"
    r"|\bnot (?:visible|clear|sure|shown|known|seen|possible)\b"
    r"|^no .*\b(?:visible|shown|seen)$"
    r"|\b(?:don t|do not) know\b|\b(?:isn t|aren t) (?:visible|clear|shown)\b|\bno idea\b|\bunclear\b"
)
NEGATION = re.compile(
    r"(?:^|\b)(?:no|not|nothing|none|never|nobody|without|neither|nor|isn t|aren t|doesn t|don t|hasn t|haven t|"
    r"wasn t|lacks?|lacking)\b"
)
VIEWS = {
    "facing the camera": "front", "facing camera": "front", "facing us": "front", "facing forward": "front",
    "facing away": "behind", "facing away from the camera": "behind", "behind the person": "behind",
    "front view": "front", "back view": "back", "rear view": "behind", "side view": "side",
}  # fmt: skip


def tidy(text, max_words):
    """Lower case, without punctuation and the first article; "" for nothing said or more than `max_words`."""
    text = " ".join(re.sub(r"[^\w\s'-]", " ", text.lower()).split())
    # Some tokenizers split compounds: t - shirt.
    text = ARTICLE.sub("", re.sub(r"(?<=\w) - (?=\w)", "-", text))
    known = re.sub(r"[^\w]+", " ", text)
    return "" if known in UNKNOWN or not known.strip() or len(text.split()) > max_words else text


def clean(answer, key=None):
    """The noun phrase of an answer to the question `key`, "nothing" for a negation, or "" if it says nothing.

    Without a key, the verbs of all questions about things are dropped.
    """
    if key in GARMENTS:
        answer = garment_of(answer, key)
    text = re.sub(r"(?<=\w)[’'](?=\w)", " ", answer.lower())
    text = re.sub(r"(?<=\w) - (?=\w)", "-", " ".join(re.sub(r"[^\w\s-]", " ", text).split()))
    if DOUBT.search(text):
        return ""
    if re.match(r"no (?=(?:he|she|they|it|there|the)\b)", text):
        return NOTHING
    phrase = without_verb(text, VERBS.get(key, ANY_VERB))
    if text in ABSENT:
        return NOTHING
    negation = NEGATION.search(phrase)
    if negation:
        # "black shirt with no sleeves" is a black shirt.
        before = re.sub(r"(?: (?:with|and|but|has|have|having))+$", "", phrase[: negation.start()].strip())
        if negation.start() == 0 or before in ("", "with", "but", "and"):
            return NOTHING
        phrase = before
    phrase = VIEWS.get(phrase, phrase) if key == "view" else phrase
    phrase = tidy(phrase, MAX_WORDS)
    if key == "hat" and phrase.split()[-1:] == ["hair"]:
        return NOTHING
    # "black" hair is black hair.
    is_colour = phrase and all(word in COLOURS or word == "and" for word in phrase.split())
    return f"{phrase} {THINGS[key]}" if is_colour and key in THINGS else phrase


def garment_of(answer, key):
    """The part of an answer with commas that names the garment asked for, else the whole answer."""
    parts = re.sub(";", ",", answer).split(",")
    nouns = [without_verb(tidy(part, 99), VERBS[key]).split()[-1:] for part in parts]
    of_kind = [part for part, noun in zip(parts, nouns, strict=True) if NOUNS.get(key, set()).intersection(noun)]
    if len(parts) > 1 and of_kind:
        return of_kind[0]
    others = set().union(*(kind for name, kind in NOUNS.items() if name != key))
    if len(parts) > 1 and key != "carried" and others.intersection(nouns[0]):
        # It begins with another garment.
        rest = [part for part, noun in zip(parts, nouns, strict=True) if noun and not others.intersection(noun)]
        return rest[0] if rest else answer
    return first_thing(answer, key)


def first_thing(answer, key):
    """An answer up to its first comma, if a thing of two words and more is named before: the rest names another."""
    first, comma, _ = re.sub(";", ",", answer).partition(",")
    named = clean(first, key) if comma and len(first.split()) > 1 else ""
    return first if len(named.split()) > 1 and named.split()[-1] not in COLOURS else answer


def without_verb(text, verbs):
    """The text from its noun phrase on: without subject, auxiliaries and the verbs of the question."""
    verb = re.compile(rf"^(?:{verbs})\b ?")
    before = None
    while before != text:
        before = text
        text = OPENING.sub("", text)
        subject = SUBJECT.match(text)
        follows = text[subject.end() :].strip() if subject else text
        if subject and any(pattern.match(follows) for pattern in (VERB, verb, NEGATION)):
            text = follows
        text = verb.sub("", VERB.sub("", text))
    # "his jacket is black": a black jacket. "the hat is a red cap": a red cap.
    said = re.match(r"(?:(?:a|an|the|his|her|their|its) )?((?:[\w-]+ ){0,2}[\w-]+) (?:is|are|looks?) (.+)$", text)
    if said:
        noun, rest = said.groups()
        if ARTICLE.match(f"{rest} ") or noun in ("color", "colour") or verb.match(rest):
            return without_verb(rest, verbs)
        if rest.split()[0].endswith("ing"):
            # "a black shirt is walking": what it does is another question.
            return noun
        # "his hair is long and black" names no thing twice.
        known = rest if noun.split()[-1] in rest.split() or NEGATION.match(rest) else f"{rest} {noun}"
        return re.sub(r"^(?:wearing|carrying|holding) ", "", known)
    return text
