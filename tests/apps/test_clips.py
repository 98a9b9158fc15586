"""Videos described in segments, and subtitles of them."""

import pytest
from conftest import GREEDY, REPOSITORY

from minicpmv.apps.clips import Segment, as_subtitles, as_time, describe, duration_of, segment_times
from minicpmv.errors import MiniCPMVError


STAR = REPOSITORY / "assets" / "star.mp4"
QUESTION = "What color is the shape?"


def test_each_segment_is_asked_about_with_the_frames_of_its_time(nano_model, nano_processor):
    duration = duration_of(nano_processor, STAR)
    segments = list(describe(nano_model, nano_processor, STAR, duration / 2, QUESTION, max_new_tokens=8))
    assert [(segment.start, segment.end) for segment in segments] == [(0, duration / 2), (duration / 2, duration)]
    content = [{"type": "video", "video": str(STAR)}, QUESTION]
    for segment in segments:
        bounds = {"start": segment.start, "end": segment.end, "max_new_tokens": 8}
        messages = [{"role": "user", "content": content}]
        assert segment.text == nano_model.chat(msgs=messages, processor=nano_processor, **GREEDY, **bounds)


def test_a_text_that_the_limit_cut_is_not_complete(nano_model, nano_processor):
    (cut,) = describe(nano_model, nano_processor, STAR, 60, QUESTION, max_new_tokens=1)
    (whole,) = describe(nano_model, nano_processor, STAR, 60, QUESTION, max_new_tokens=32)
    assert (cut.is_complete, whole.is_complete) == (False, True)


def test_segments_fill_the_video():
    assert segment_times(25, 10) == [(0, 12.5), (12.5, 25)]
    assert segment_times(0.5, 10) == [(0, 0.5)]
    for seconds in (0, -1, 1e-9, float("nan")):
        with pytest.raises(MiniCPMVError):
            segment_times(25, seconds)


def test_subtitles_have_times_and_no_empty_lines_inside():
    text = as_subtitles([Segment(0, 2.5, "One\n\ntwo", True), Segment(2.5, 3725.25, "Three", True)])
    assert text == "1\n00:00:00,000 --> 00:00:02,500\nOne\ntwo\n\n2\n00:00:02,500 --> 01:02:05,250\nThree\n"
    assert (as_time(5), as_time(65), as_time(3725)) == ("0:05", "1:05", "1:02:05")
