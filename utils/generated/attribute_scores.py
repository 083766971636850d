"""The attribute score: a question answerer looks at each generated image, and its answers are held against the prompt.

Only what the prompt names is asked, and action, view and place are not: they do not tell who a person is.
"""

import json

from utils.datasets.images import as_rgb
from utils.generated.scoring import open_image
from utils.generated.texts.agreement import WORN, agreements, attributes_of
from utils.generated.texts.captioners import Captioner
from utils.generated.texts.captions import QUESTIONS


def load_answerer(wanted, device, batch_size):
    """The question answerer, or None if the filter is skipped."""
    if not wanted.has_attributes:
        return None
    return Captioner.from_pretrained(wanted.captioner, device=device, batch_size=batch_size)


def add_attribute_scores(columns, answerer, table, readers):
    """Fill in the columns of `ANSWERED` for the rows of a table whose images decode; nothing without an answerer.

    A score is the mean agreement of the answers; None if the prompt names no clothes or no answer says anything. A
    garment that was changed on purpose does not count.
    """
    if answerer is None:
        return columns
    prompts = [prompt or "" for prompt in table["prompt"].to_pylist()]
    changed = table["changed"].to_pylist() if "changed" in table.column_names else [None] * len(table)
    named = [
        [key for key in attributes_of(prompt) if key != own] for prompt, own in zip(prompts, changed, strict=True)
    ]
    rows = [row for row, error in enumerate(columns["error"]) if error is None and named[row]]
    columns |= {"attribute_score": [None] * len(table), "attribute_answers": [None] * len(table)}
    # Generated images can be large: a batch of them is in memory, not the piece.
    for start in range(0, len(rows), answerer.batch_size):
        images = {row: as_rgb(open_image(readers[row]())) for row in rows[start : start + answerer.batch_size]}
        answers = {row: {} for row in images}
        for key in WORN:
            asked = [row for row in images if key in named[row]]
            for row, answer in zip(asked, answerer.ask([images[row] for row in asked], QUESTIONS[key]), strict=True):
                answers[row][key] = answer
        for row in images:
            values = list(agreements(prompts[row], answers[row], changed[row]).values())
            columns["attribute_answers"][row] = json.dumps(answers[row])
            columns["attribute_score"][row] = sum(values) / len(values) if values else None
    return columns
