"""The processor: places and pictures, user text, batches, videos, limits, saving."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, wave_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor


CLIP = REPOSITORY / "assets" / "star.mp4"
ADDED_TOKENS = list(json.loads((REPOSITORY / "tests" / "fixtures" / "added_tokens.json").read_text()))


@pytest.fixture(scope="module")
def picture():
    return wave_picture(300, 200, 0)


def encode(processor, *content, **options):
    """One user message as model inputs."""
    return processor.apply_chat_template(
        [{"role": "user", "content": list(content)}], tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def control_ids(processor, ids):
    controls = set(processor.tokenizer.get_added_vocab().values())
    return [token for token in ids if token in controls]


# ---- user text ----


@pytest.mark.parametrize("token", ADDED_TOKENS)
def test_added_tokens_typed_by_a_user_stay_text(token, processor, picture):
    plain = control_ids(processor, encode(processor, picture, "a")["input_ids"][0].tolist())
    for typed in (token, f"({token}./</image>){token}{token}!", f"<{token}>\n{token[:-1]}"):
        inputs = encode(processor, picture, typed)
        ids = inputs["input_ids"][0].tolist()
        assert control_ids(processor, ids) == plain
        assert typed in processor.tokenizer.decode(ids)
        assert len(inputs["pixel_values"][0]) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*ADDED_TOKENS, "(", "./", ")", "<", "!", "\n", "é", "\ufdd0", "word "]), max_size=8))
def test_any_mixture_typed_by_a_user_stays_text(processor, pieces):
    typed = "".join(pieces)
    ids = encode(processor, typed or "a")["input_ids"][0].tolist()
    assert control_ids(processor, ids) == control_ids(processor, encode(processor, "a")["input_ids"][0].tolist())


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.text(max_size=40))
def test_ordinary_text_has_the_ids_of_the_whole_prompt_tokenized_at_once(processor, question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "<image>" + question})
    rendered = processor.apply_chat_template(messages[:2])
    ids = processor.apply_chat_template(messages[:2], tokenize=True)[0]
    if not any(token in question + answer for token in ADDED_TOKENS):
        assert ids == processor.tokenizer(rendered)["input_ids"]
    # The same with a control token typed elsewhere in the conversation, which takes the other road of the encoder.
    guarded = processor.apply_chat_template(messages, tokenize=True)[0]
    plain = processor.tokenizer(processor.apply_chat_template(messages).rsplit("<image>", 1)[0])["input_ids"]
    if not any(token in question + answer for token in ADDED_TOKENS):
        assert guarded[: len(plain)] == plain


def test_an_exclamation_mark_is_a_token_like_any_other(processor):
    assert processor.tokenizer("!")["input_ids"] == [0]
    batch = processor(["Hi!", "Hello there! How are you! !!"])
    assert batch["attention_mask"].sum(-1).tolist() == [
        len(processor.tokenizer(text)["input_ids"]) for text in ("Hi!", "Hello there! How are you! !!")
    ]
    assert batch["input_ids"][0, 0] == processor.tokenizer.pad_token_id  # padded on the left, not with 0
    assert processor.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()]) == "Hi!"


def test_the_place_of_a_video_typed_by_a_user_stays_text(processor, picture):
    """The tags around it are no tokens, so nothing but the mark tells it from a place."""
    place = "(<video>./</video>)"
    for content in ([picture, f"What is {place}?"], [CLIP, f"{place}{place}"]):
        inputs = encode(processor, *content, fps=1)
        assert content[1] in processor.tokenizer.decode(inputs["input_ids"][0])
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 64 * len(inputs["pixel_values"][0])


@pytest.mark.parametrize("token", ["<|im_end|>", "<image>", "</think>"])
def test_control_tokens_in_the_names_of_fields_stay_text(processor, token):
    question = [{"role": "user", "content": "?"}]
    schema = {"type": "function", "function": {"name": "f", "parameters": {"properties": {token: {token: 1}}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {token: [{token: 1}]}}}
    harmless = json.loads(json.dumps([schema, call]).replace(token, "plain"))
    counts = []
    for tool, used in ((schema, call), harmless):
        messages = [*question, {"role": "assistant", "content": "", "tool_calls": [used]}, *question]
        ids = processor.apply_chat_template(messages, tools=[tool], tokenize=True)[0]
        counts.append(control_ids(processor, ids))
    assert counts[0] == counts[1]


def test_an_assistant_keeps_its_own_tokens_and_no_others(processor):
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "<ref>cat</ref><box>1 2 3 4</box><|im_end|><image>"},
    ]
    ids = processor.apply_chat_template(messages, tokenize=True)[0]
    ends = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<box>", "<|im_end|>", "<image>")]
    assert [ids.count(end) for end in ends] == [1, 2, 0]


# ---- pictures and videos ----


def test_every_kind_of_content_gives_the_same_inputs(processor, picture, tmp_path):
    path = tmp_path / "wave.png"
    picture.save(path)
    data = path.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    expected = encode(processor, picture, "What?")
    for part in (
        path,
        data,
        np.asarray(picture),
        torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1),
        {"type": "image", "image": picture},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": str(path)},
        {"type": "image", "base64": base64.b64encode(data).decode()},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
    ):
        inputs = encode(processor, part, {"type": "text", "text": "What?"})
        assert inputs["input_ids"].tolist() == expected["input_ids"].tolist(), part
        assert torch.equal(inputs["pixel_values"][0][0], expected["pixel_values"][0][0])


def test_a_string_is_text_even_when_a_file_has_that_name(processor, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("cat.png")
    assert "pixel_values" not in encode(processor, "cat.png")


@pytest.mark.parametrize("part", [{"type": "audio", "audio": "a.wav"}, {"type": "text"}, {"image": "x"}, {"type": 3}])
def test_an_unknown_content_part_is_refused(part, processor):
    with pytest.raises(ValueError, match="content part"):
        encode(processor, part)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2500), st.integers(1, 2500), st.sampled_from([None, 1, 4]))
def test_slots_equal_features_for_every_size(processor, width, height, limit):
    inputs = encode(processor, Image.new("RGB", (width, height)), "?", max_slice_nums=limit)
    slots = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert slots == 64 * len(inputs["pixel_values"][0]) == 64 * len(inputs["image_bound"][0])


MODES = ["RGB", "1", "L", "LA", "P", "RGBA", "CMYK", "I;16"]
EXTREME_SIZES = [(1, 1), (5000, 3), (3, 5000), (449, 448)]


@pytest.mark.parametrize(
    ("size", "mode"), [(size, mode) for size in EXTREME_SIZES for mode in MODES] + [((8000, 8000), "RGB")]
)
def test_slots_equal_features_for_every_mode(processor, size, mode):
    inputs = encode(processor, Image.new(mode, size), "?")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 64 * len(inputs["pixel_values"][0])


def test_pictures_and_videos_mix_in_the_order_of_the_text(processor, picture):
    inputs = encode(processor, picture, CLIP, "then", wave_picture(500, 500, 1), fps=2, force_packing=2)
    text = processor.tokenizer.decode(inputs["input_ids"][0]).replace("<unk>" * 64, "#")
    groups = len([unit for unit in inputs["temporal_ids"][0] if unit != [-1]])
    clip = "\n".join(["<image>#</image>"] * groups)
    slices = "<image_id>1</image_id><image>#</image><slice>#</slice>\n<slice>#</slice>"
    assert f"<image_id>0</image_id><image>#</image>\n{clip}\nthen\n{slices}" in text
    ids = inputs["temporal_ids"][0]
    assert ids[0] == [-1] and ids[-3:] == [[-1]] * 3 and all(len(unit) == 2 for unit in ids[1 : groups + 1])
    assert sum(map(len, ids)) == len(inputs["pixel_values"][0]) == len(inputs["tgt_sizes"][0])


def test_a_video_reports_what_was_taken_from_it(processor):
    inputs = encode(processor, {"type": "video", "video": CLIP}, "?", fps=2, return_metadata=True)
    (report,) = inputs["video_metadata"][0]
    assert report.num_tokens == int((inputs["input_ids"] == processor.image_token_id).sum())
    assert report.num_groups * 64 == report.num_tokens


def test_temporal_ids_may_leave_out_a_system_of_stills_and_are_checked(processor, picture):
    prompt = "(<image>./</image>)(<image>./</image>)\n(<image>./</image>) go"
    inputs = processor(prompt, [picture] * 3, temporal_ids=[[-1], [0, 4]], use_image_id=False)
    text = processor.tokenizer.decode(inputs["input_ids"][0]).replace("<unk>" * 64, "#")
    assert text == "<image>#</image><image>#</image> go"
    assert inputs["temporal_ids"] == [[[-1], [0, 4]]]
    with pytest.raises(ValueError, match="2 ids, but there are 3 images"):
        processor(prompt, [picture] * 3, temporal_ids=[[0, 4]])
    with pytest.raises(ValueError, match="do not stand together"):
        processor("(<image>./</image>) and (<image>./</image>)", [picture] * 2, temporal_ids=[[0, 1]])


def test_places_and_pictures_must_agree(processor, picture):
    with pytest.raises(ValueError, match="1 places.*2 images were given"):
        processor("(<image>./</image>)", [picture, picture])
    with pytest.raises(ValueError, match="places"):
        processor(["no place", "(<image>./</image>)"], [[picture], []])
    with pytest.raises(ValueError, match="lists for 1 prompts"):
        processor(["a", "b"], [[picture]])


def test_flat_pictures_are_shared_out_by_places(processor, picture):
    other = wave_picture(97, 411, 2)
    place = "(<image>./</image>)"
    flat = processor([f"{place} a", "b", f"{place}{place} c"], [picture, other, picture])
    nested = processor([f"{place} a", "b", f"{place}{place} c"], [[picture], [], [other, picture]])
    assert flat["input_ids"].tolist() == nested["input_ids"].tolist()
    assert [len(pixels) for pixels in flat["pixel_values"]] == [1, 0, 2]


def test_both_argument_orders_and_other_software_s_keywords_work(processor, picture):
    place = "(<image>./</image>)"
    ours = processor(place, [picture])
    for inputs in (
        processor([picture], place),
        processor(text=[place], images=[[picture]], padding=True, add_special_tokens=False, return_tensors="pt"),
        processor(images=[picture], text=place, device="cpu", videos=None, audio=None),
    ):
        assert inputs["input_ids"].tolist() == ours["input_ids"].tolist()
    assert "pixel_values" not in processor("text", images=None)
    assert "input_ids" not in processor(images=[picture])


# ---- limits, padding, masks ----


def test_a_prompt_that_is_too_long_says_by_how_much(processor, picture):
    with pytest.raises(ValueError, match=r"has 91 tokens, 64 of them for images; the limit is 80"):
        encode(
            processor,
            picture,
            "Describe the picture in one sentence, please.",
            max_length=80,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    with pytest.raises(ValueError, match="64 of them"):
        processor("(<image>./</image>) and text", [picture], max_length=20, truncation=True)
    cut = processor("(<image>./</image>) and much more text", [picture], max_length=72, truncation=True)
    assert cut["input_ids"].shape == (1, 72)


def test_batches_are_padded_on_the_left_and_bounds_follow(processor, picture):
    place = "(<image>./</image>)"
    batch = processor([f"{place} a", f"{place} much longer text"], [[picture], [picture]])
    for ids, bounds in zip(batch["input_ids"], batch["image_bound"], strict=True):
        ((start, stop),) = bounds.tolist()
        assert (ids[start:stop] == processor.image_token_id).all() and stop - start == 64
    right = processor([f"{place} a", f"{place} much longer text"], [[picture], [picture]], padding_side="right")
    assert right["attention_mask"][0, 0] == 1 and right["image_bound"][0].tolist() != batch["image_bound"][0].tolist()


def test_assistant_masks_hold_exactly_what_the_assistant_wrote(processor, picture):
    messages = [
        {"role": "user", "content": [picture, "Hi! <image>"]},
        {"role": "assistant", "content": "One!"},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo"},
    ]
    inputs = processor.apply_chat_template(
        [messages, messages[:2]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        return_mm_token_type_ids=True,
    )
    written = [
        processor.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert written == ["One!<|im_end|><think>\nhm\n</think>\n\nTwo<|im_end|>", "One!<|im_end|>"]
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)


def test_number_of_tokens_can_be_asked_without_pictures(processor):
    sizes = [(200, 300), (700, 1000), (1080, 1920)]  # (height, width)
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    for (height, width), tokens, patches in zip(
        sizes, counted.num_image_tokens, counted.num_image_patches, strict=True
    ):
        inputs = processor("(<image>./</image>)", [Image.new("RGB", (width, height))])
        slots = int((inputs["input_ids"] == processor.image_token_id).sum())
        assert (slots, len(inputs["pixel_values"][0])) == (tokens, patches)


def test_inputs_move_between_devices_and_types(processor, picture):
    inputs = encode(processor, picture, "?").to(torch.bfloat16).to("cpu")
    assert inputs["pixel_values"][0][0].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.long


def test_a_misspelt_keyword_is_named(processor, picture, caplog):
    processor("a", max_slice_num=3)
    assert "max_slice_num" in caplog.text and "max_slice_nums" in caplog.text


def test_save_and_load_keep_everything(processor, picture, tmp_path):
    processor.save_pretrained(tmp_path / "v4.5 copy")
    again = AutoProcessor.from_pretrained(tmp_path / "v4.5 copy", trust_remote_code=True)
    names = {file.name for file in (tmp_path / "v4.5 copy").iterdir()}
    assert {"preprocessor_config.json", "chat_template.jinja", "tokenizer.json"} <= names
    for options in ({}, {"max_slice_nums": 1}):
        ours, theirs = (encode(p, picture, CLIP, "?", **options) for p in (processor, again))
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert all(map(torch.equal, ours["pixel_values"][0], theirs["pixel_values"][0]))


def test_a_broken_picture_is_an_error_that_says_so(processor):
    buffer = io.BytesIO()
    wave_picture(300, 200, 0).save(buffer, "PNG")
    with pytest.raises(ValueError, match="truncated|broken|complete"):
        encode(processor, buffer.getvalue()[:2000], "?")


# ---- facts that callers ask for ----


def test_a_thought_is_split_from_its_answer_and_written_as_the_template_does(processor):
    assert processor.split_thought("Just so.") == (None, "Just so.")
    assert processor.split_thought("<think>\nhm\n</think>\n\nTwo") == ("hm", "Two")
    assert processor.split_thought("<think>\nnever closed") == ("never closed", "")
    assert processor.split_thought("hm\n</think>\n\nTwo") == ("hm", "Two")  # the prompt had opened it
    question, answer = {"role": "user", "content": "1"}, {"role": "assistant", "content": "Two"}
    rendered = processor.apply_chat_template([question, answer | {"reasoning_content": "hm"}])
    assert processor.write_thought("hm") + "Two" in rendered
    fast = processor.apply_chat_template([question], add_generation_prompt=True, enable_thinking=False)
    assert fast.endswith(processor.write_thought(""))


def test_a_file_is_an_image_or_a_video_by_its_name(processor):
    names = {"a/cat.JPG": "image", "cat.png": "image", "clip.mp4": "video", "clip.GIF": "video"}
    others = dict.fromkeys(("thesis.docx", "thesis.pdf", "noname"))  # Pillow writes PDF, but reads none
    assert {name: processor.kind_of(name) for name in [*names, *others]} == names | others
    assert processor.kind_of(CLIP) == "video"


def test_an_image_is_loaded_upright_or_refused_by_a_type_that_the_processor_names(processor, tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 20)).save(path, exif=exif)
    loaded = processor.load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (20, 40))
    with pytest.raises(processor.ImageInputError):
        processor.load_image(b"no image")


def test_errors_of_every_part_can_be_caught_by_the_processor_s_names(repository, processor, picture):
    AutoImageProcessor.from_pretrained(repository, trust_remote_code=True)  # transformers 4 runs its module once more
    place, clip = "(<image>./</image>)", {"type": "video", "video": b"no video"}
    for error, make in (
        (processor.ImageInputError, lambda: processor(place, [b"no image"])),
        (processor.ImageInputError, lambda: encode(processor, [b"a list is no part"])),
        (processor.VideoInputError, lambda: encode(processor, clip)),
        (processor.ImageInputError, lambda: encode(processor, clip | {"video": [picture, b"no image"]})),
        (processor.FrameSamplingError, lambda: encode(processor, clip | {"video": CLIP}, fps=-1)),
        (processor.FramePackingError, lambda: processor(place, [picture], temporal_ids=[[-1, 0]])),
        (processor.PromptTooLongError, lambda: processor(place, [picture], max_length=3)),
    ):
        with pytest.raises(error) as raised:
            make()
        assert raised.value.is_minicpmv


def test_visual_inputs_of_single_samples_are_padded_to_tensors(processor, picture):
    options = {"tokenize": True, "return_dict": True, "fps": 2}
    messages = [[{"role": "user", "content": content}] for content in ([picture, "a"], "b", [CLIP, "c"])]
    rows = []
    for inputs in (processor.apply_chat_template(each, force_packing=2, **options) for each in messages):
        given = {name: inputs[name][0] for name in processor.visual_input_names if name in inputs}
        rows.append(given or {"pixel_values": [], "tgt_sizes": []})
    padded = processor.pad_visual_inputs(rows)
    together = processor.apply_chat_template(
        messages, force_packing=2, pad_pixel_values=True, return_tensors="pt", **options
    )
    assert set(padded) == set(processor.visual_input_names)
    assert all(torch.equal(padded[name], together[name]) for name in padded)
    assert padded["tgt_sizes"][1].sum() == 0 and (padded["temporal_ids"][1] == -2).all()
    assert "temporal_ids" not in processor.pad_visual_inputs(rows[:1])
    assert processor.pad_visual_inputs(rows[1:2]) == {}


def test_an_array_of_frames_fills_the_places_of_as_many_images(processor, picture):
    frames = np.stack([np.asarray(picture)] * 3)
    expected = processor("(<image>./</image>)" * 3, [picture] * 3)
    for images in ([frames], frames, [[frames]]):
        inputs = processor("(<image>./</image>)" * 3, images)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert all(map(torch.equal, inputs["pixel_values"][0], expected["pixel_values"][0]))


def test_each_of_several_videos_has_its_own_metadata(processor, picture):
    videos, clocks = [[picture] * 6, [picture] * 6], [{"fps": 1}, {"fps": 3}]
    text = "(<video>./</video>)(<image>./</image>)(<video>./</video>)"
    for prompts, images in ((text, [picture]), (["(<video>./</video>)"] * 2, None)):
        data = processor(prompts, images, videos=videos, video_metadata=clocks, return_metadata=True)
        assert [report.fps for reports in data["video_metadata"] for report in reports] == [1, 3]
    with pytest.raises(processor.VideoInputError, match="1 video_metadata for 2 videos"):
        processor(text, [picture], videos=videos, video_metadata=clocks[:1])


@pytest.mark.parametrize("text", ["a\ud800", "\udfff<|im_end|>"])
def test_text_that_is_no_unicode_is_refused_by_name(processor, text):
    with pytest.raises(ValueError, match=r"surrogate pair.*errors='replace'") as error:
        encode(processor, text)
    assert error.value.is_minicpmv


class Kept:
    """A cache of media by identity that counts what was made."""

    def __init__(self):
        self.known, self.made = {}, []

    def get(self, kind, sources, make):
        new = list({id(source): source for source in sources if id(source) not in self.known}.values())
        self.known |= zip(map(id, new), make(new), strict=True)
        self.made += [(kind, source) for source in new]
        return [self.known[id(source)] for source in sources]


def test_a_cache_of_media_is_asked_before_anything_is_read(processor, picture):
    cache, other = Kept(), wave_picture(500, 500, 1)
    content = [picture, other, CLIP, picture, "?"]
    first = encode(processor, *content, media_cache=cache)
    assert cache.made == [("image", picture), ("image", other), ("video", CLIP)]
    plain = encode(processor, *content)
    for inputs in (first, encode(processor, *content, media_cache=cache)):
        assert inputs["input_ids"].tolist() == plain["input_ids"].tolist()
        assert all(map(torch.equal, inputs["pixel_values"][0], plain["pixel_values"][0]))
    assert len(cache.made) == 3
    with pytest.raises(processor.ImageInputError):
        processor("(<image>./</image>)", [b"no image"], media_cache=cache)
    assert (
        processor("(<image>./</image>)", [other], media_cache=cache)["pixel_values"][0][0]
        is (cache.known[id(other)].pixel_values[0])
    )
