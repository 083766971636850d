"""The attribute score: prompts are read back, answers are compared word by word, and empty ones do not count."""

import io
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import ImageChops

from tests.generated.test_filtering import scores
from utils.generated import choosing
from utils.generated.attribute_scores import add_attribute_scores
from utils.generated.broken import ATTRIBUTES, near_miss
from utils.generated.drawn_set import NEAR, World, draw, source_camera
from utils.generated.texts.agreement import WORN, agreement, agreements, attributes_of, check_prompts
from utils.generated.texts.captions import CLOTHES, DIVERSITY, QUESTIONS, compose, with_token
from utils.synthetic.world import appearance, render

OWN = {
    "upper": ["", "black and white striped shirt", "red coat", "shirt", "orange t-shirt", *CLOTHES["upper"]],
    "lower": ["", "black and grey shorts", *CLOTHES["lower"]],
    "shoes": ["", "black and white sneakers", *CLOTHES["shoes"]],
    "hair": ["", "long black hair", "black hair in a bun"],
    "hat": ["", "nothing", "blue hat", *CLOTHES["hat"]],
}


def test_attributes_are_read_back_from_prompts():
    lists = OWN | {key: ["", *values] for key, values in DIVERSITY.items()}
    rng = random.Random(0)
    for _ in range(3000):
        attributes = {key: rng.choice(values) for key, values in lists.items()}
        prompt = with_token(compose(attributes), "<iir-0002>", "person")
        want = {key: attributes[key] for key in WORN if attributes[key]}
        if not any(attributes[key] for key in ("upper", "lower", "shoes")):
            want = {}
        else:
            want = {"carried": "nothing", "hat": "nothing"} | want
        assert attributes_of(prompt) == want, prompt


@pytest.mark.parametrize(
    "prompt", ["a photo of a person", "a photo of a person, in a park", "", "somebody, with a dog"]
)
def test_prompts_without_clothes_name_nothing(prompt):
    assert attributes_of(prompt) == {}


@pytest.mark.parametrize(
    "prompt, worn",
    [
        ("a photo of a person, wearing , carrying a bag", {}),
        ("a photo of a person, wearing a coat and , in a park", {"upper": "coat"}),
        ("a photo of a person, wearing and black shoes", {"shoes": "black shoes"}),
        ("a photo of a person, wearing ", {}),
        ("a photo of a person, wearing a coat, , and black shoes", {"upper": "coat"}),
    ],
)
def test_a_template_with_an_empty_slot(prompt, worn):
    found = attributes_of(prompt)
    assert {key: words for key, words in found.items() if words != "nothing"} == worn


@pytest.mark.parametrize(
    "said, answer, value",
    [
        ("black shirt", "black shirt", 1),
        ("black shirt", "black jacket", 1 / 2),
        ("black striped shirt", "black shirt", 4 / 5),
        ("t-shirt", "t-shirt", 1),
        ("nothing", "nothing", 1),
        ("nothing", "red bag", 0),
        ("red bag", "nothing", 0),
        ("red bag", "", None),
    ],
)
def test_agreement_is_the_share_of_equal_words(said, answer, value):
    assert agreement(said, answer) == (value if value is None else pytest.approx(value))


PROMPT = "a photo of <a> person, wearing a red coat, blue jeans and black shoes, carrying a green bag, in a park"


def test_a_changed_garment_and_empty_answers_do_not_count():
    answers = {
        "upper": "she wears a red coat.",
        "lower": "black jeans",
        "shoes": "",
        "carried": "no bag",
        "hat": "none",
    }
    want = {"upper": 1.0, "lower": 0.5, "carried": 0.0, "hat": 1.0}
    assert agreements(PROMPT, answers) == want
    del want["lower"]
    assert agreements(PROMPT, answers, changed="lower") == want


class Answerer:
    """Answers by the red of an image's first pixel."""

    batch_size = 1

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def ask(self, images, question):
        key = next(key for key, words in QUESTIONS.items() if words == question)
        self.asked += [(key, image.getpixel((0, 0))[0] // 100) for image in images]
        return [self.answers[image.getpixel((0, 0))[0] // 100].get(key, "") for image in images]


def encoded(red):
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 16), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_scores_of_a_piece():
    """Images that do not decode are not asked about; those of which nothing is said have no score."""
    prompts = [PROMPT, PROMPT, "a photo of a person", PROMPT]
    table = pa.table({"prompt": prompts, "changed": [None, "upper", None, None]})
    answers = [
        {"upper": "red coat", "lower": "blue skirt"},
        {"upper": "black coat", "hat": "nothing"},
        {"upper": "red"},
    ]
    answerer = Answerer(answers)
    readers = [lambda: encoded(0), lambda: encoded(100), lambda: encoded(200), lambda: b"damaged"]
    columns = {"error": [None, None, None, "damaged"]}
    add_attribute_scores(columns, answerer, table, readers)
    assert columns["attribute_score"] == [pytest.approx(0.75), 1.0, None, None]
    # The change of the second is not asked about, nor anything of the third.
    named = [key for key in WORN if key != "hair"]
    assert set(answerer.asked) == {*itertools.product(named, (0, 1))} - {("upper", 1)}
    assert json.loads(columns["attribute_answers"][0])["upper"] == "red coat"
    assert columns["attribute_answers"][2:] == [None, None]
    empty = add_attribute_scores(
        {"error": [None]}, Answerer([{}]), pa.table({"prompt": [PROMPT]}), [lambda: encoded(0)]
    )
    assert empty["attribute_score"] == [None]


def test_sets_without_prompts_are_refused():
    table = pa.table({"prompt": ["a photo of a person", None]})
    generated = SimpleNamespace(name="made", schema=table.schema, tables=lambda: iter([table]))
    with pytest.raises(ValueError, match="no prompt of made names clothes"):
        check_prompts(generated)
    with pytest.raises(ValueError, match="but made has no column prompt"):
        check_prompts(SimpleNamespace(name="made", schema=pa.schema([]), tables=None))


def test_the_least_agreement_rejects_what_disagrees_and_nothing_without_answers():
    found = scores([0] * 4, [0.9, 0.8, 0.7, 0.1])
    found.values["attributes"] = np.array([0.5, 0.7, np.nan, 0.7], np.float32)
    assert choosing.without_score(found, "attributes") == 1
    choice = choosing.choose_images(found, "reid", {"d0": 0.4}, min_agreement=0.7)
    words = [choosing.REASONS[number] for number in choice.reason]
    assert words == [choosing.DISAGREES, "", "", choosing.BELOW]
    limits = choosing.thresholds_of(found, "attributes", keep_fraction={"d0": 0.5})
    assert choosing.choose_images(found, "attributes", limits).kept.tolist() == [False, True, False, True]


def test_a_near_miss_is_the_same_image_but_for_one_attribute_that_is_seen():
    world = World(num_ids=3, images_per_id=12, near_misses=True)
    for pid, number in itertools.product((0, 2, 4), (10, 11)):
        picture, truth = draw(world, pid, number)
        index = 1000 + number
        right = render("a", pid, source_camera(world, pid, index), index)
        difference = ImageChops.difference(picture, right).convert("L").point(lambda value: 255 * (value > 20))
        changed = np.asarray(difference).mean() / 255
        assert truth == NEAR and 0.002 < changed < 0.3
    person, rng = appearance("a", 0), random.Random(1)
    for _ in range(60):
        other = near_miss(person, rng)
        names = {name.split("_")[0] for name in person if person[name] != other[name]} - {"sleeve"}
        assert len(names) == 1 and names <= {part.split("_")[0] for part in ATTRIBUTES}


def test_unseen_worlds_have_other_scenery_and_breakage():
    known, unseen = (World(num_ids=3, images_per_id=12, near_misses=True, unseen=unseen) for unseen in (False, True))
    equal = [draw(known, 2, number)[0].tobytes() == draw(unseen, 2, number)[0].tobytes() for number in range(12)]
    truths = [draw(known, 2, number)[1] for number in range(12)]
    assert {truth for truth, same in zip(truths, equal, strict=True) if not same} == {
        "right, new scene", "wrong, new scene", "broken",
    }  # fmt: skip
