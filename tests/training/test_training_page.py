"""The page of a training: its numbers, its curves, and names that try to be something else."""

import base64
import io
import json

import pytest
import torch
from PIL import Image

from tests.reporting.test_reporting import NASTY, Page
from utils.reporting.report import text_table
from utils.training.report import before_and_after, read_log, training_report

BRACES = "own/{0}/{x}/{}"


def measured(epoch, target, value, **more):
    return {"epoch": epoch, "target": target, "mAP": value, "rank1": value + 0.1, "num_valid": 4, **more}


def history(*targets):
    return [
        measured(epoch, target, 0.1 + 0.05 * epoch + 0.2 * number)
        for epoch in (0, 2, 4)
        for number, target in enumerate(targets)
    ]


def log(folder, *, steps=6, **changes):
    lines = [
        {"step": step, "epoch": 1, "lr": 0.1, "loss": 3.0 / step, "loss_id": 1.0, "loss_ldm": 0.0, "grad_norm": 2.0}
        for step in range(1, steps + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line | changes) + "\n" for line in lines))
    return lines


def test_rows_compare_the_first_with_the_last():
    assert before_and_after(history("a", "b")) == [
        ["a", "mAP", "10.0 %", "30.0 %", "+20.0"],
        ["a", "Rank-1", "20.0 %", "40.0 %", "+20.0"],
        ["b", "mAP", "30.0 %", "50.0 %", "+20.0"],
        ["b", "Rank-1", "40.0 %", "60.0 %", "+20.0"],
    ]
    assert before_and_after([]) == []
    assert before_and_after([measured(0, "a", 0.5), measured(1, "a", 0.25)])[0][-1] == "-25.0"
    assert before_and_after([measured(0, "a", 0.5)])[0] == ["a", "mAP", "50.0 %", "50.0 %", "+0.0"]


def test_rows_of_re_ranking_follow_the_plain_ones():
    entries = [
        measured(epoch, "a", value, reranked={"mAP": value + 0.2, "rank1": value + 0.3})
        for epoch, value in ((0, 0.1), (1, 0.4))
    ]
    rows = before_and_after(entries)
    assert [row[0] for row in rows] == ["a", "a", "a (re-ranked)", "a (re-ranked)"]
    assert rows[2][1:] == ["mAP", "30.0 %", "60.0 %", "+30.0"]


def test_text_tables_line_up():
    assert text_table(["target", "number", "points"], [["a", "mAP", "+3.5"], ["longer one", "Rank-1", "-12.0"]]) == (
        "target      number  points\n"
        "----------  ------  ------\n"
        "a           mAP       +3.5\n"
        "longer one  Rank-1   -12.0"
    )
    assert text_table(["target", "number"], []) == "target  number\n------  ------"


def test_a_page_has_numbers_curves_and_samples(tmp_path):
    log(tmp_path)
    for name in ("epoch-0000.png", "epoch-0004.png"):
        Image.new("RGB", (60, 40), "navy").save(tmp_path / name)
    samples = [("epoch 0", tmp_path / "epoch-0000.png"), ("epoch 4", tmp_path / "epoch-0004.png")]
    html = training_report(
        "DCAC",
        tmp_path,
        history("a", "b"),
        lead="A lead",
        whom="other people",
        facts=[("Seed", 3)],
        samples=samples,
        sample_words="What samples show.",
    ).html()
    page = Page(html)
    for text in (
        "A lead, measured before and after training, on other people.",
        "Seed",
        "Before and after",
        "Training",
        "6 steps",
        "Samples",
        "What samples show.",
        "epoch 4",
    ):
        assert text in page.text
    assert "was 10.0 %, a" in page.text and "was 30.0 %, b" in page.text and "+20.0" in page.text
    # mAP and Rank-1; loss, loss_id, length of the gradient and rate, but not a part that is 0 throughout.
    assert page.tags.count("svg") == 6 and len(page.images) == 2
    assert "loss_id" in html and "loss_ldm" not in html
    assert "<script" not in html and "http://" not in html.replace("http://www.w3.org/2000/svg", "")


def picture_of(attributes):
    content = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"))
    return Image.open(io.BytesIO(content))


def test_of_many_samples_the_first_the_last_and_some_between_are_shown_large(tmp_path):
    samples = []
    for epoch in range(9):
        Image.new("RGB", (60, 40), "navy").save(tmp_path / f"{epoch}.png")
        samples.append((f"epoch {epoch}", tmp_path / f"{epoch}.png"))
    page = Page(training_report("DCAC", tmp_path, [], samples=samples).html())
    assert len(page.images) == 3
    assert [f"epoch {epoch}" in page.text for epoch in range(9)] == [epoch in (0, 4, 8) for epoch in range(9)]
    assert [picture_of(image).size for image in page.images] == [(420, 280)] * 3


def test_a_page_without_numbers_log_or_samples_still_reads(tmp_path):
    page = Page(training_report("Empty", tmp_path, [], lead="A lead", whom="other people").html())
    assert "A lead; nothing was measured." in page.text
    assert "Empty" in page.text and "svg" not in page.tags and "Before and after" not in page.text
    log(tmp_path, steps=1)
    page = Page(training_report("One step", tmp_path, [measured(0, "a", 0.5)]).html())
    assert "1 steps" in page.text and "50.0 %" in page.text


@pytest.mark.parametrize("name", [NASTY, BRACES, "</td></table>", "%s %d {{ 7*7 }}"])
def test_hostile_names_stay_text(tmp_path, name):
    log(tmp_path)
    Image.new("RGB", (6, 4), "navy").save(tmp_path / "s.png")
    parsed, plain = (
        Page(
            training_report(
                word,
                tmp_path,
                history(word, "other"),
                lead=word,
                facts=[(word, word)],
                samples=[(word, tmp_path / "s.png")],
            ).html()
        )
        for word in (name, "x")
    )
    # No name adds an element or an attribute: the page is built like that of a harmless name.
    assert [tag for tag in parsed.tags if tag != "wbr"] == [tag for tag in plain.tags if tag != "wbr"]
    assert [key for key, _ in parsed.attributes] == [key for key, _ in plain.attributes]
    assert f"was 10.0 %, {name}" in parsed.text and "49" not in parsed.text
    assert before_and_after(history(name))[0][0] == name


def test_a_norm_that_overflowed_leaves_a_gap(tmp_path):
    lines = log(tmp_path)
    lines[2]["grad_norm"] = None
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = training_report("x", tmp_path, []).html()
    assert "nan" not in html.lower() and Page(html).tags.count("svg") == 4


def test_the_log_is_read_up_to_its_last_whole_line(tmp_path):
    lines = log(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert read_log(tmp_path / "log.jsonl") == lines
    assert read_log(tmp_path / "absent.jsonl") == []


def test_a_long_training_is_drawn_in_few_points(tmp_path):
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)).tolist()
    lines = [{"step": step, "lr": 0.1, "loss": value, "grad_norm": 1.0} for step, value in enumerate(values, 1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = training_report("x", tmp_path, []).html()
    assert "5,000 steps" in html and len(html) < 60_000
