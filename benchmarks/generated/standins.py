"""Accuracy of the shipped question answerer on people that it was not trained on, by default those of domain a.

    python -m benchmarks.generated.standins
    python -m benchmarks.generated.standins --domain h --first_pid 5000 --json FILE
    python -m benchmarks.generated.standins --samples samples.png        # ten captions drawn, below the true people

An answer is right if it equals the synthetic world's own, word by word. Beside it stands the accuracy of always giving
the commonest true answer. Colours, patterns and kinds of clothes are also counted alone. Some pictures do not show the
answer: the person is half hidden, or turns the printed side away.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from tqdm import tqdm
from transformers import BlipForQuestionAnswering, BlipProcessor

from benchmarks.common import RESULTS, command_line, write_result
from utils import synthetic
from utils.files import write_together
from utils.flags import CAPTIONER_DIR, DIFFUSION_DIR
from utils.generated.texts.captions import QUESTIONS
from utils.reporting.report import sheet, text_table
from utils.standins.people import DOMAINS, answers_of

BATCH_SIZE = 50
# Parts of an answer, found as words in it; answers do not name the pattern of plain clothes.
PARTS = {
    ("upper", "upper_colour"): tuple(synthetic.COLOURS),
    ("upper", "pattern"): synthetic.PATTERNS,
    ("upper", "upper_kind"): synthetic.UPPER_KINDS,
    ("lower", "lower_colour"): tuple(synthetic.COLOURS),
    ("lower", "lower_kind"): synthetic.LOWER_KINDS,
}


# The stand-ins learned people below this number, of these domains.
TRAINED = 2 * 1500


def pictures(domain, num_ids, first_pid=0):
    """(picture, true words) of every identity, in two cameras."""
    rows = [
        (domain, pid, synthetic.camera_of(domain, pid, index), index)
        for pid in range(first_pid, first_pid + num_ids)
        for index in (0, 2)
    ]
    return [(synthetic.render(*row), synthetic.describe(*row)) for row in rows]


def load_answerer(folder=CAPTIONER_DIR):
    model = BlipForQuestionAnswering.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), BlipProcessor.from_pretrained(folder)


@torch.inference_mode()
def answers(model, processor, images, question):
    """One answer an image, without the spaces that the tokenizer puts around hyphens."""
    found = []
    for start in range(0, len(images), BATCH_SIZE):
        batch = images[start : start + BATCH_SIZE]
        inputs = processor(images=batch, text=[question] * len(batch), return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=16)
        found += [text.replace(" - ", "-") for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return found


def part_of(answer, words):
    return next((word for word in words if word in answer.split()), "plain")


def accuracies(model, processor, examples, keys=tuple(QUESTIONS)):
    """{attribute: {"accuracy": share of right answers, "commonest": share of the commonest true one}}."""
    images, truths = zip(*examples, strict=True)
    found = {}
    for key in tqdm(keys, desc="asking", disable=None):
        said = answers(model, processor, images, QUESTIONS[key])
        found[key] = shares(said, [answers_of(words)[key] for words in truths])
        for (asked, part), words in PARTS.items():
            if asked == key:
                found[part] = shares([part_of(one, words) for one in said], [words_[part] for words_ in truths])
    return found


def shares(said, true):
    right = sum(mine == its for mine, its in zip(said, true, strict=True))
    return {"accuracy": right / len(true), "commonest": Counter(true).most_common(1)[0][1] / len(true)}


def sample_sheet(num_captions=10, first_pid=5000, guidances=(3.0, 5.0), steps=20):
    """People of domains f to h that were not trained on, and what the shipped model draws of their captions."""
    pipeline = StableDiffusionPipeline.from_pretrained(DIFFUSION_DIR, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    rows = [
        ("fgh"[number % 3], pid, synthetic.camera_of("fgh"[number % 3], pid, 0), 0)
        for number, pid in enumerate(range(first_pid, first_pid + num_captions))
    ]
    words = [synthetic.caption(synthetic.describe(*row)) for row in rows]
    lines = [[synthetic.render(*row) for row in rows]]
    for guidance in guidances:
        generator = torch.Generator().manual_seed(0)
        height, width = synthetic.SIZE
        settings = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": guidance}
        lines.append(pipeline(words, generator=generator, **settings).images)
    return sheet(lines), words


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="a", choices=sorted(synthetic.DOMAINS), help="whose people; default a")
    parser.add_argument("--num_ids", type=int, default=200, help="identities, in two pictures each; default 200")
    parser.add_argument("--first_pid", type=int, default=0, help="of the first identity; default 0")
    parser.add_argument("--json", type=Path, default=RESULTS / "standins.json", help="default benchmarks/results")
    parser.add_argument("--samples", type=Path, help="only draw a sheet of samples into this PNG")
    args = parser.parse_args(input_args)
    if args.samples:
        picture, words = sample_sheet()
        print("\n".join(words))
        with write_together(args.samples.parent) as part:
            picture.save(part(args.samples.name), "PNG")
        return
    if args.num_ids < 1 or args.first_pid < 0:
        parser.error(f"--num_ids must be 1 or more and --first_pid 0 or more, got {args.num_ids} and {args.first_pid}")
    if args.domain in DOMAINS and args.first_pid < TRAINED:
        parser.error(f"the answerer was trained on people of domain {args.domain} below {TRAINED}: raise --first_pid")
    examples = pictures(args.domain, args.num_ids, args.first_pid)
    found = accuracies(*load_answerer(), examples)
    print(f"domain {args.domain}, {len(examples)} pictures\n{text_table(*table_of(found))}")
    raw = {"pictures": len(examples), "question_answerer": found}
    write_result(args.json, command_line(__spec__.name, input_args), *table_of(found), raw)


def table_of(found):
    rows = [
        [key.replace("_", ", "), f"{100 * row['accuracy']:.0f} %", f"{100 * row['commonest']:.0f} %"]
        for key, row in found.items()
    ]
    return ["", "right", "the commonest answer"], rows


if __name__ == "__main__":
    main()
