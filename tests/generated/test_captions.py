"""Words about people: merging answers, prompts, edited tables, and captioners of every kind."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.models.bert.modeling_bert import BertLMHeadModel

from utils import synthetic
from utils.flags import CAPTIONER_DIR, CLIP_DIR
from utils.generated.texts import captions
from utils.generated.texts.captioners import Captioner, check_captioner, quantization
from utils.standins import build


@pytest.fixture(scope="module")
def people():
    return [synthetic.render("a", pid, synthetic.camera_of("a", pid, 0), 0) for pid in range(3)]


@pytest.fixture(scope="module")
def clip_tokenizer():
    return build.build_clip_tokenizer()


# Merging and prompts


@pytest.mark.parametrize(
    "answer, kept",
    [
        ("A red T-Shirt.", "red t-shirt"),
        ("green striped t - shirt", "green striped t-shirt"),
        ("  the   back ", "back"),
        ("unknown", ""),
        ("I don't know", ""),
        ("N/A", ""),
        ("", ""),
        ("...", ""),
        ("nothing", "nothing"),
        ("he is wearing a long red coat over a shirt", "long red coat over a shirt"),
        ("a long red coat over a white shirt and blue jeans", ""),
    ],
)
def test_answers_are_cleaned(answer, kept):
    assert captions.clean(answer) == kept


@pytest.mark.parametrize(
    "key, answer, kept",
    [
        ("upper", "he is wearing a black shirt", "black shirt"),
        ("upper", "The young man is wearing a t-shirt.", "t-shirt"),
        ("upper", "his jacket is black", "black jacket"),
        ("upper", "a black shirt with no sleeves", "black shirt"),
        ("upper", "a woman in a red dress", "red dress"),
        ("upper", "he is a man", ""),
        ("lower", "they are wearing black pants", "black pants"),
        ("shoes", "her shoes are white", "white shoes"),
        ("shoes", "The shoes are not visible", ""),
        ("shoes", "I can't see the shoes", ""),
        ("shoes", "no shoes are visible", ""),
        ("shoes", "white", "white shoes"),
        ("lower", "black", "black trousers"),
        ("upper", "light blue", "light blue top"),
        ("hair", "dark brown", "dark brown hair"),
        ("upper", "black and white", "black and white top"),
        ("lower", "a black shirt, blue jeans", "blue jeans"),
        ("shoes", "red coat, black shoes", "black shoes"),
        ("shoes", "he is wearing a red coat; his boots are brown", "brown boots"),
        ("hat", "a white shirt, black cap", "black cap"),
        ("upper", "blue jeans, red shirt", "red shirt"),
        ("upper", "white shirt, black pants", "white shirt"),
        ("upper", "he is wearing a blue coat; black trousers", "blue coat"),
        ("upper", "in the image, she is wearing a red dress", "red dress"),
        ("upper", "black, white striped shirt", "black white striped shirt"),
        ("hair", "black", "black hair"),
        ("hat", "black hair", "nothing"),
        ("hat", "no, he has hair", "nothing"),
        ("hair", "she has long black hair", "long black hair"),
        ("carried", "yes, a black backpack", "black backpack"),
        ("carried", "the person is carrying a brown handbag", "brown handbag"),
        ("carried", "The person isn't carrying anything.", "nothing"),
        ("carried", "he doesn't have a bag", "nothing"),
        ("hat", "no hat", "nothing"),
        ("hat", "there is no hat", "nothing"),
        ("hat", "the hat is a red cap", "red cap"),
        ("action", "he is walking down the street", "walking down the street"),
        ("view", "the person is seen from behind", "behind"),
        ("view", "he is facing the camera", "front"),
        ("scene", "the person is standing in a park", "in a park"),
    ],
)
def test_sentences_become_noun_phrases(key, answer, kept):
    assert captions.clean(answer, key) == kept


def test_sentences_are_read_before_the_vote_and_never_said_twice():
    answers = [
        {"upper": "he is wearing a black shirt", "hat": "no hat", "action": "he is walking"},
        {"upper": "a red coat", "hat": "a red cap", "action": "walking"},
        {"upper": "black shirt", "hat": "he is not wearing a hat", "action": "standing"},
    ]
    merged = captions.merged(answers)["attributes"]
    assert merged == {"upper": "black shirt", "hat": "nothing", "action": "walking"}
    assert captions.compose(merged) == "a photo of a person, wearing a black shirt, walking"


def test_the_answers_of_the_stand_in_stay_as_they_are():
    for pid in range(60):
        words = synthetic.describe("f", pid, 0, pid)
        for key in captions.QUESTIONS:
            answer = words[key].removeprefix("seen from ").removeprefix("the ") if key == "view" else words[key]
            assert captions.clean(answer, key) == ("nothing" if answer in ("nothing", "none") else answer)


def test_the_majority_speaks_and_ties_go_to_the_first_seen():
    assert captions.majority(["red", "blue", "", "blue"]) == "blue"
    assert captions.majority(["red", "blue", "blue", "red"]) == "red"
    assert captions.majority(["", "", "red"]) == "red"
    assert captions.majority(["", ""]) == ""


def test_prompts_of_the_truth_are_what_the_stand_in_was_taught():
    """Word for word the training captions, but that a place is told by its kind, and nothing is "a orange"."""
    for pid in range(40):
        words = synthetic.describe("f", pid, 0, pid)
        taught = synthetic.caption(words | {"place": words["scene"]})
        attributes = {key: words[key] for key in captions.QUESTIONS}
        attributes["view"] = words["view"].removeprefix("seen from ").removeprefix("the ")
        prompt = captions.compose(attributes)
        assert prompt.replace(" an ", " a ") == taught


def test_what_is_absent_is_not_spoken_of():
    assert captions.compose({"carried": "nothing", "hat": "none", "upper": ""}) == "a photo of a person"
    assert captions.compose({"lower": "jeans"}) == "a photo of a person, wearing jeans"
    assert captions.compose({"upper": "orange coat", "shoes": "boots"}) == (
        "a photo of a person, wearing an orange coat and boots"
    )
    assert captions.compose({"view": "above"}, "a picture of a woman") == "a picture of a woman, seen from above"
    assert captions.compose({}, caption="man in red") == "a photo of a person, man in red"


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a photo of a person, walking", "a photo of <iir-0002> person, walking"),
        ("person in the snow", "<iir-0002> person in the snow"),
        ("the person beside a person", "<iir-0002> person beside a person"),
        ("a personal person", "a personal <iir-0002> person"),
    ],
)
def test_the_token_stands_before_the_first_noun(prompt, expected):
    assert captions.with_token(prompt, "<iir-0002>", "person") == expected


def test_a_prompt_without_the_noun_is_an_error():
    with pytest.raises(ValueError, match="'a man walking' has no 'person'"):
        captions.with_token("a man walking", "sks", "person")


def test_long_prompts_are_cut_at_a_word(clip_tokenizer):
    prompt = "a photo of a person, " + ", ".join(f"wearing a red coat number {n}" for n in range(30))
    for room in (0, 3):
        fitted = captions.fit(prompt, clip_tokenizer, room)
        assert prompt.startswith(fitted) and prompt[len(fitted)] in " ," and not fitted.endswith(",")
        assert len(clip_tokenizer(fitted).input_ids) <= 77 - room
        longer = " ".join(prompt.split(" ")[: len(fitted.split(" ")) + 1])
        assert len(clip_tokenizer(longer).input_ids) > 77 - room
    assert captions.fit("a photo of a person", clip_tokenizer) == "a photo of a person"


def test_drawn_attributes_depend_on_the_key_alone_and_use_every_word():
    known = {"upper": "red coat", "action": "sitting"}
    drawn = [captions.draw_attributes(known, captions.DIVERSITY, 0, "a/0001", index) for index in range(300)]
    assert drawn[7] == captions.draw_attributes(known, captions.DIVERSITY, 0, "a/0001", 7)
    assert all(one["upper"] == "red coat" for one in drawn)
    for key, values in captions.DIVERSITY.items():
        assert {one[key] for one in drawn} == set(values)


def test_clothing_changes_one_known_garment_of_few_images():
    for share in (0.0, 0.1, 0.2, 0.25, 0.49):
        changed = [captions.is_changed(number, share) for number in range(1000)]
        assert sum(changed) == pytest.approx(1000 * share, abs=1)
        # Whatever their number, the images in the identity's own clothes are more.
        assert all(2 * sum(changed[:count]) < count for count in range(1, 1001))
    own = {"upper": "red jacket", "lower": "jeans", "hat": "nothing", "scene": "outdoors"}
    seen = set()
    for number in range(300):
        other, garment = captions.change_clothes(own, captions.CLOTHES, 0, "a/0001", number)
        assert {key for key in own if other[key] != own[key]} == {garment} and garment in ("upper", "lower")
        seen.add(other[garment])
    assert "red jacket" not in seen and len(seen) == len(captions.CLOTHES["upper"]) - 1 + len(
        captions.CLOTHES["lower"]
    )
    # Of a prompt by hand the garments are not known.
    assert captions.change_clothes({}, captions.CLOTHES, 0) == ({}, None)


def test_lists_of_ones_own(tmp_path):
    path = tmp_path / "lists.json"
    path.write_text(json.dumps({"scene": ["on the moon"], "shoes": ["boots"]}))
    lists = captions.read_lists(path)
    assert lists["scene"] == ["on the moon"] and lists["shoes"] == ["boots"]
    assert lists["action"] == captions.DIVERSITY["action"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold lists by name"),
        ('{"weather": ["rain"]}', "has a list 'weather'; known are upper"),
        ('{"scene": []}', "'scene' must be a list of at least one phrase"),
        ('{"scene": "rain"}', "'scene' must be a list"),
        ('{"scene": [1]}', "'scene' must be a list"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    path = tmp_path / "lists.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        captions.read_lists(path)


# Tables


def described(pid, **words):
    answers = dict.fromkeys(captions.QUESTIONS, "") | words
    return {
        "domain": "a",
        "pid": pid,
        "camid": 1,
        "attributes": words,
        "caption": "",
        "prompt": captions.compose(words),
        "identity_prompt": "x",
        "images": [{"path": "1.png", "caption": "c", "answers": answers}],
    }


def test_the_table_of_captions_is_read_back(tmp_path):
    records = [described(2, upper="red coat"), described(4, lower="jeans", hat="nothing")]
    pq.write_table(captions.captions_table(records), tmp_path / "captions.parquet")
    rows = captions.read_captions(tmp_path / "captions.parquet")
    assert list(rows) == [("a", 2), ("a", 4)]
    assert rows["a", 2]["prompt"] == "a photo of a person, wearing a red coat"
    assert rows["a", 4]["hat"] == "nothing" and rows["a", 4]["upper"] == ""
    stored = pq.read_table(tmp_path / "captions.parquet").to_pylist()
    assert stored[0]["images"][0] == {"path": "1.png", "caption": "c", **dict.fromkeys(captions.QUESTIONS, "")} | {
        "upper": "red coat"
    }


def test_prompts_from_csv_and_jsonl(tmp_path):
    (tmp_path / "p.csv").write_text('pid,prompt\n7,"a photo of a person, in red"\n')
    (tmp_path / "p.jsonl").write_text('{"pid": 7, "domain": "a", "upper": "red coat"}\n\n')
    assert captions.read_captions(tmp_path / "p.csv")[None, 7]["prompt"] == "a photo of a person, in red"
    assert captions.read_captions(tmp_path / "p.jsonl")["a", 7]["upper"] == "red coat"


def test_tables_as_spreadsheets_and_people_write_them(tmp_path):
    (tmp_path / "p.csv").write_text(
        'domain,pid,prompt,upper,carried\na,7,"a person\nin red ", red coat,\n,,,,\na,9,,,Nothing\n', "utf-8-sig"
    )
    rows = captions.read_captions(tmp_path / "p.csv")
    assert list(rows) == [("a", 7), ("a", 9)]
    assert rows["a", 7]["prompt"] == "a person in red" and rows["a", 7]["upper"] == "red coat"
    assert captions.compose({"carried": rows["a", 9]["carried"]}) == "a photo of a person"
    (tmp_path / "p.jsonl").write_text('{"pid": 7.0, "prompt": "two\u2028lines"}\n', "utf-8-sig")
    assert captions.read_captions(tmp_path / "p.jsonl")[None, 7]["prompt"] == "two lines"


def rows_of(records, path):
    pq.write_table(captions.captions_table(records), path)
    return captions.read_captions(path)


def plain(prompt, identity):
    return prompt


def test_an_edit_is_what_differs_from_what_was_written(tmp_path):
    before = described(2, upper="red coat", hat="nothing")
    row = rows_of([before], tmp_path / "captions.parquet")["a", 2]
    assert captions.edited(before, before, row, plain, None) == before
    # Another captioner has been asked since: what nobody edited does not come back.
    other = described(2, upper="blue coat")
    assert captions.edited(other, before, row, plain, None) == other
    edited = captions.edited(before, before, row | {"upper": "pink coat"}, plain, None)
    assert edited["attributes"] == {"upper": "pink coat", "hat": "nothing"} and edited["text"] == ""
    after = edited | {"prompt": "a photo of a person, wearing a pink coat"}
    # The same row read again, which still has the old prompt, says the same.
    assert captions.edited(after, after, row | {"upper": "pink coat"}, plain, None) == after
    again = captions.edited(other, after, row | {"upper": "pink coat"}, plain, None)
    assert again["attributes"]["upper"] == "pink coat"
    assert captions.edited(before, before, row | {"prompt": "a person"}, plain, None)["text"] == "a person"
    free = described(2) | {"caption": "a man", "prompt": "a photo of a person, a man"}
    row = rows_of([free], tmp_path / "captions.parquet")["a", 2] | {"caption": "a tall man"}
    edited = captions.edited(free, free, row, plain, None)
    assert captions.composed(edited) == "a photo of a person, a tall man" and edited["text"] == ""


def test_a_file_of_prompts_says_it_all(tmp_path):
    before = described(2, upper="red coat") | {"text": "a person in a dream", "images": []}
    written = described(2, upper="red coat")
    written["images"][0]["answers"]["upper"] = "a red coat"
    row = rows_of([written], tmp_path / "captions.parquet")["a", 2]

    def prompt_of(row):
        record = captions.stated(before, row, plain, None)
        return record["text"] or captions.composed(record)

    assert prompt_of(row) == written["prompt"]
    # Without its answers, a row that went through a spreadsheet is known by those of the record.
    file = tmp_path / "captions.csv"
    file.write_text(f"pid,prompt,upper,images\n2,\"{row['prompt']}\",pink coat,\"[{{'path': '1.png'}}]\"\n")
    assert prompt_of(captions.read_captions(file)[None, 2]) == row["prompt"]
    before["images"] = written["images"]
    assert prompt_of(captions.read_captions(file)[None, 2]) == "a photo of a person, wearing a pink coat"
    # The prompt beside it is that of the answers, so nobody wrote it.
    assert prompt_of(row | {"upper": "pink coat"}) == "a photo of a person, wearing a pink coat"
    assert prompt_of(row | {"upper": "pink coat", "prompt": "a person"}) == "a person"
    (tmp_path / "p.csv").write_text("pid,caption\n2,a tall man\n")
    assert prompt_of(captions.read_captions(tmp_path / "p.csv")[None, 2]) == "a photo of a person, a tall man"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.csv", "prompt\nx\n", "row 1 has no whole number as `pid`"),
        ("p.csv", "pid,prompt\nseven,x\n", "row 1 has no whole number as `pid`"),
        ("p.csv", "pid,prompt\n7,\n", "identity 7 has neither a prompt nor attributes"),
        ("p.csv", "pid,prompt\n7,x\n7,y\n", "has identity 7 twice"),
        ("p.csv", "pid,prompt\n", "has no rows"),
        ("p.jsonl", '{"pid": 7, "prompt": 3}\n', "`prompt` of identity 7 must be text, got 3"),
        ("p.jsonl", "{\n", "cannot be read as captions"),
        ("p.jsonl", "3\n", "row 1 has no whole number as `pid`"),
        ("p.jsonl", '{"pid": 7.5, "prompt": "x"}\n', "row 1 has no whole number as `pid`"),
        ("p.jsonl", '{"pid": 1e999, "prompt": "x"}\n', "row 1 has no whole number as `pid`"),
        ("p.csv", 'pid,prompt\n7," "\n', "identity 7 has neither a prompt nor attributes"),
        ("p.csv", 'pid,prompt\n7,"' + "x" * 140_000, "cannot be read as captions: field larger"),
        ("p.parquet", "no parquet", "cannot be read as captions"),
        ("p.txt", "x", "must end in .parquet, .csv or .jsonl"),
    ],
)
def test_bad_tables(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        captions.read_captions(tmp_path / name)


# Captioners


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def words_tokenizer():
    _, processor = build.build_captioner()
    return BertTokenizer(vocab=dict(processor.tokenizer.get_vocab()), model_max_length=64)


def save_blip(folder, model_class=BlipForConditionalGeneration):
    tokenizer = words_tokenizer()
    text = TEXT | {"vocab_size": len(tokenizer), "encoder_hidden_size": 32, "projection_dim": 32}
    text |= {"bos_token_id": 4, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    model = model_class(BlipConfig(text_config=text, vision_config=VISION, projection_dim=32))
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)


def save_git(folder):
    tokenizer = words_tokenizer()
    config = GitConfig(vision_config=VISION, vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, **TEXT)
    GitForCausalLM(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size=size, crop_size=size)
    GitProcessor(images, tokenizer).save_pretrained(folder)


def save_blip2(folder):
    tokenizer = words_tokenizer()
    tokenizer.add_tokens("<image>", special_tokens=True)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=Blip2QFormerConfig(**TEXT, encoder_hidden_size=32, vocab_size=len(tokenizer)).to_dict(),
        text_config=OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=32,
            max_position_embeddings=128,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)


def save_vit_bert(folder):
    tokenizer = words_tokenizer()
    decoder = BertConfig(vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True, **TEXT)
    model = VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**VISION)), decoder=BertLMHeadModel(decoder))
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 2
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 3
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CHAT = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def save_llava(folder):
    bert = words_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bert._tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=128
    )
    tokenizer.add_tokens("<image>", special_tokens=True)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, pad_token_id=0, **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    processor.save_pretrained(folder)


BUILDERS = {"blip": save_blip, "git": save_git, "blip-2": save_blip2, "vit-bert": save_vit_bert, "llava": save_llava}
ANSWERING = ("blip-2", "llava")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, save in BUILDERS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp(name)
        save(made[name])
    return made


@pytest.mark.parametrize("name", BUILDERS)
def test_every_kind_of_captioner_speaks(folders, people, name):
    captioner = Captioner.from_pretrained(str(folders[name]), batch_size=2)
    assert captioner.can_answer == (name in ANSWERING) and captioner.can_describe
    said = captioner.describe(people)
    # One by one they say the same: batches are only for speed.
    assert said == [captioner.describe([one])[0] for one in people]
    assert len(said) == 3 and all(isinstance(one, str) for one in said)
    if captioner.can_answer:
        question = captions.QUESTIONS["upper"]
        answers = captioner.ask(people, question)
        assert len(answers) == 3 and not any("wearing on the upper body" in one for one in answers)


def test_the_stand_in_answers_as_transformers_has_it(people):
    captioner = Captioner.from_pretrained(CAPTIONER_DIR, batch_size=2)
    assert captioner.can_answer and not captioner.can_describe
    model = BlipForQuestionAnswering.from_pretrained(CAPTIONER_DIR).eval()
    processor = BlipProcessor.from_pretrained(CAPTIONER_DIR)
    for question in captions.QUESTIONS.values():
        wanted = []
        for image in people:
            tokens = model.generate(**processor(image, question, return_tensors="pt"), max_new_tokens=16)
            wanted.append(processor.decode(tokens[0], skip_special_tokens=True).strip())
        assert captioner.ask(people, question) == wanted


def test_what_is_no_captioner_is_refused_from_its_configuration(tmp_path):
    with pytest.raises(ValueError, match="is a clip model .*does not turn images into text"):
        check_captioner(CLIP_DIR)
    with pytest.raises(ValueError, match="no captioner at 'nowhere/at-all'"):
        check_captioner("nowhere/at-all")
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check_captioner(str(tmp_path / "file.bin"))
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    assert check_captioner(str(tmp_path)) == "prompted"
    with pytest.raises(ValueError, match="cannot be loaded"):
        Captioner.from_pretrained(str(tmp_path))


def test_bits_are_settings_of_bitsandbytes(people, folders):
    assert quantization(None) is None
    assert quantization(8).load_in_8bit and quantization(4).load_in_4bit
    four = quantization(4, torch.float16)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.float16)
    captioner = Captioner.from_pretrained(str(folders["blip-2"]), bits=8, dtype=torch.float32)
    linear = {type(module).__name__ for module in captioner.model.modules()}
    assert "Linear8bitLt" in linear
    assert len(captioner.describe([Image.new("RGB", (20, 40))])) == 1
