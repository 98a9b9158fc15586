"""Processor of MiniCPM-V 4.5: text, pictures and videos to the inputs of the model.

What is special:
- One road for every prompt: messages -> rendered prompt -> placeholders replaced by slots -> ids. `chat()`, training
  and serving all come through here.
- Pictures and clips go into the same lists, in the order of their places in the text; a clip's frames share slots.
- Text that a user typed never turns into control tokens: see `messages_minicpmv`.
- Batches are padded on the left with the pad token, and the mask comes from lengths: id 0 is "!", an ordinary token.
"""

import difflib
import inspect
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NoReturn

import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoInput

from .configuration_minicpmv import MiniCPMVError
from .image_loading_minicpmv import ImageInputError
from .image_processing_minicpmv import (
    FramePackingError,
    MiniCPMVBatchFeature,
    MiniCPMVImageProcessor,
    SlicedImage,
    pack_frames,
    pad_visual_inputs,
)
from .messages_minicpmv import (
    control_tokens,
    encode_prompt,
    kind_of,
    mark_typed,
    read_message,
    split_thought,
    write_thought,
)
from .video_decoding_minicpmv import VideoInputError, flatten_videos
from .video_processing_minicpmv import FrameSamplingError, MiniCPMVVideoProcessor


logger = logging.get_logger(__name__)

IMAGE_PLACEHOLDER = "(<image>./</image>)"
VIDEO_PLACEHOLDER = "(<video>./</video>)"
PLACEHOLDERS = re.compile("|".join(re.escape(text) for text in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)))
# Keyword arguments of a call, by the part they concern; those of the video processor are its own parameters.
IMAGE_OPTIONS = {"max_slice_nums", "use_image_id", "input_data_format"}
TEXT_OPTIONS = {
    "padding",
    "padding_side",
    "pad_to_multiple_of",
    "truncation",
    "max_length",
    "return_tensors",
    "return_mm_token_type_ids",
}
# Those that are neither.
CALL_OPTIONS = {"images", "videos", "temporal_ids", "return_metadata", "pad_pixel_values", "media_cache"} | {
    f"{part}_kwargs" for part in ("images", "videos", "text", "common")
}
# Other software passes these along; they change nothing here.
TOLERATED_OPTIONS = {"add_special_tokens", "device", "do_pad", "load_audio_from_video", "sampling_rate"}


class PromptTooLongError(MiniCPMVError):
    """A prompt has more tokens than allowed: the message says how many, how many of them are pictures, and the limit."""


@dataclass
class ExpandedPrompt:
    """One prompt with slots in its text, and the visual inputs that fill them, in the same order."""

    text: str
    pixel_values: list = field(default_factory=list)  # slices [3, P, P * patches]
    tgt_sizes: list = field(default_factory=list)  # (rows, columns) of each slice
    temporal_ids: list = field(default_factory=list)  # one list of ids a unit; [-1] for a still picture
    image_sizes: list = field(default_factory=list)  # (width, height) of each picture and frame
    video_metadata: list = field(default_factory=list)  # one report a video
    spans: list = field(default_factory=list)  # (start, end) in `text` of what an assistant wrote


class MiniCPMVProcessor(ProcessorMixin):
    """Image processor, tokenizer and video processor in one.

    Args:
        image_processor ([`MiniCPMVImageProcessor`]): cuts pictures into slices.
        tokenizer ([`MiniCPMVTokenizerFast`]): the tokenizer.
        video_processor ([`MiniCPMVVideoProcessor`], *optional*): samples clips; made from the settings of the image
            processor when it is not given.
        chat_template (`str`, *optional*): the jinja template; the tokenizer's when it is not given.
    """

    # The errors of its parts, for callers that cannot import this module by name.
    ImageInputError = ImageInputError
    VideoInputError = VideoInputError
    FramePackingError = FramePackingError
    FrameSamplingError = FrameSamplingError
    PromptTooLongError = PromptTooLongError

    attributes = ["image_processor", "tokenizer", "video_processor"]
    audio_tokenizer = None  # transformers 4.57 reads it when saving
    image_token = "<unk>"
    # Lists of one entry a prompt: pictures have slices of unequal size and number.
    skip_tensor_conversion = [
        "pixel_values",
        "image_sizes",
        "tgt_sizes",
        "temporal_ids",
        "image_bound",
        "video_metadata",
    ]

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        if video_processor is None and image_processor is not None:
            video_processor = MiniCPMVVideoProcessor.from_dict(image_processor.to_dict())
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.video_processor = video_processor
        self.chat_template = chat_template if chat_template is not None else getattr(tokenizer, "chat_template", None)

    @property
    def image_token_id(self):
        """Id of the slot token that image features replace."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names, "image_bound"]

    # ---- facts that callers need ----

    visual_input_names = ("pixel_values", "tgt_sizes", "temporal_ids")  # inputs of the model that hold pictures

    split_thought = staticmethod(split_thought)
    write_thought = staticmethod(write_thought)
    kind_of = staticmethod(kind_of)
    pad_visual_inputs = staticmethod(pad_visual_inputs)

    def load_image(self, source: Any) -> Image.Image:
        """An image, of any kind that messages may hold, as an upright RGB picture.

        Raises:
            ImageInputError: it cannot be read.
        """
        return self.image_processor.load_image(source)

    # ---- rendered prompts -> inputs ----

    def __call__(
        self,
        text: TextInput | list[TextInput] | None = None,
        images: ImageInput | None = None,
        videos: VideoInput | None = None,
        audio=None,
        temporal_ids=None,
        **kwargs,
    ):
        """Turn rendered prompts with pictures and videos into the inputs of the model.

        Control tokens in `text` count; what users typed comes by way of `apply_chat_template`.

        Args:
            text: a prompt, or a list of them. `(<image>./</image>)` marks the place of a picture, `(<video>./</video>)`
                that of a video.
            images: one list of pictures a prompt, or one flat list that the places share out in order. Whatever the
                image processor loads: PIL, path, bytes, array, tensor, data or http URL.
            videos: likewise; whatever the video processor loads.
            temporal_ids: makes pictures the frames of clips: for each prompt a list of groups with one id a frame
                (tenths of a second), such as `[[-1], [0, 3, 6]]`; [-1] is a still picture.
            max_slice_nums, use_image_id, input_data_format: options of the image processor.
            fps, num_frames, max_num_packing, start, ...: options of the video processor. The dicts `images_kwargs`,
                `videos_kwargs` and `text_kwargs` reach one part alone.
            padding (default: True for several prompts), padding_side (default "left"), pad_to_multiple_of.
            max_length: most tokens a prompt may have. A longer one is an error, unless `truncation=True` and what is
                cut holds no picture.
            return_tensors: "pt" (default), "np" or None (lists).
            return_mm_token_type_ids: also give 1 for slots and 0 for text.
            return_metadata: also give `video_metadata`, one report a video.
            pad_pixel_values: give the tensors of `pad_visual_inputs` instead of nested lists, for trainers that insist
                on them.
            media_cache: an object with `get(kind, source, make)`, asked for each image and video before it is read:
                kind is "image" or "video", source what the caller gave, and `make()` gives what this processor makes
                of it (a `SlicedImage`; the features of a clip). It returns that, or what it kept of an earlier call.
                What `make()` raises has to pass through it.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` [B, L]. With pictures or videos, one entry a prompt
            of `pixel_values` (slices [3, P, P * patches]), `tgt_sizes` [slices, 2], `image_sizes` (width, height) and
            `image_bound` [units, 2]. When frames are packed, `temporal_ids`.

        Raises:
            ValueError: when places and pictures differ in number, and whatever the loaders raise.
            PromptTooLongError: see `max_length`.
        """
        if _is_text(images) and not _is_text(text):  # transformers' own order is (images, text)
            text, images = images, text
        if audio:
            raise ValueError("audio was given, but this model reads text, pictures and videos only.")
        prompts = [text] if isinstance(text, str) else text
        if prompts is None and images is None:
            raise ValueError("Pass text, images, or both; videos need a text that names their places.")
        if prompts is None:  # pictures alone, as one sample after the other
            pictures = images if _is_nested(images) else [images]
            prompts = [IMAGE_PLACEHOLDER * len(_as_list(sample)) for sample in pictures]
        images = _share_out(prompts, images, IMAGE_PLACEHOLDER, "images", _as_list)
        videos = _share_out(prompts, videos, VIDEO_PLACEHOLDER, "videos", flatten_videos)
        data = self._process(prompts, images, videos, temporal_ids, **kwargs)
        if text is None:
            for name in ("input_ids", "attention_mask", "image_bound"):
                data.pop(name, None)
        return data

    def _process(
        self,
        prompts,
        images,
        videos,
        temporal_ids=None,
        spans=None,
        return_metadata=False,
        pad_pixel_values=False,
        media_cache=None,
        **kwargs,
    ):
        """`__call__` on one list of pictures and one of videos a prompt (None: no such modality in the batch)."""
        options = self._sort_options(kwargs)
        nothing = [[]] * len(prompts)
        groups = _groups_by_prompt(temporal_ids, len(prompts))
        samples = [
            self._expand(*inputs, options, media_cache)
            for inputs in zip(prompts, images or nothing, videos or nothing, groups, spans or nothing, strict=True)
        ]
        data = self._tokenize(samples, with_masks=spans is not None, **options["text"])
        if images is not None or videos is not None:
            data["pixel_values"] = [sample.pixel_values for sample in samples]
            data["tgt_sizes"] = [torch.tensor(sample.tgt_sizes).reshape(-1, 2).long() for sample in samples]
            data["image_sizes"] = [sample.image_sizes for sample in samples]
            if any(unit != [-1] for sample in samples for unit in sample.temporal_ids):
                data["temporal_ids"] = [sample.temporal_ids for sample in samples]
            if pad_pixel_values:
                data |= self.pad_visual_inputs([vars(sample) for sample in samples])
        else:
            data.pop("image_bound")
        if return_metadata or options["videos"].get("return_metadata"):
            data["video_metadata"] = [sample.video_metadata for sample in samples]
        return MiniCPMVBatchFeature(data)

    @property
    def option_names(self):
        """Keyword arguments of `__call__` by the part they concern: {"images": ..., "videos": ..., "text": ...}."""
        videos = {"start", "end", "video_metadata", *inspect.signature(type(self.video_processor).__init__).parameters}
        # `use_image_id` is not a video's unless asked of it alone: a number for each picture is the default of images.
        videos -= {"self", "kwargs", "use_image_id"}
        return {"images": IMAGE_OPTIONS, "videos": videos, "text": TEXT_OPTIONS}

    def is_option(self, name):
        """Whether a keyword is an option of this processor (else it may be a variable of the chat template)."""
        return name in CALL_OPTIONS | TOLERATED_OPTIONS or any(name in names for names in self.option_names.values())

    def _sort_options(self, kwargs):
        """Keyword arguments by the part they concern, like `option_names`."""
        parts = self.option_names
        options = {part: dict(kwargs.pop(f"{part}_kwargs", None) or {}) for part in (*parts, "common")}
        for name, value in {**options.pop("common"), **kwargs}.items():
            owners = [part for part, names in parts.items() if name in names]
            # For one of several parts a dict may say otherwise than the keyword; for the only part it contradicts it.
            if len(owners) == 1 and name in kwargs and name in options[owners[0]]:
                raise ValueError(f"{name!r} was given twice: as a keyword and in {owners[0]}_kwargs. Give it once.")
            for part in owners:
                options[part].setdefault(name, value)
            if not owners and name not in TOLERATED_OPTIONS:
                nearest = difflib.get_close_matches(name, set().union(*parts.values()), n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                logger.warning_once(f"{type(self).__name__} does not know the keyword {name!r} and ignores it.{hint}")
        return options

    def _expand(self, prompt, images, videos, groups, spans, options, media_cache):
        """Put slots in the places of pictures and videos, and make the slices that fill them."""
        kinds, texts = PLACEHOLDERS.findall(prompt), PLACEHOLDERS.split(prompt)
        for name, placeholder, given in (("images", IMAGE_PLACEHOLDER, images), ("videos", VIDEO_PLACEHOLDER, videos)):
            if kinds.count(placeholder) != len(given):
                raise ValueError(
                    f"The prompt has {kinds.count(placeholder)} places {placeholder} for {name}, but {len(given)} "
                    f"{name} were given. Give one for each place, in order."
                )
        groups = [[-1]] * len(images) if groups is None else groups
        if sum(map(len, groups)) != len(images):
            raise FramePackingError(
                f"temporal_ids name {sum(map(len, groups))} frames, but the prompt has {len(images)} pictures. Give an "
                "id for each; a still picture is a group [-1] of its own."
            )
        frames = iter(self._slice(images, options["images"], media_cache))
        videos, groups = iter(videos), iter(groups)
        sample = ExpandedPrompt("")
        lengths = [len(text) + len(kind) for text, kind in zip(texts, [*kinds, ""], strict=True)]
        old_starts = [0, *accumulate(lengths)]
        parts, place, pictures = [texts[0]], 0, 0
        moved = [(0, 0)]  # (start in the prompt, start in the result) of the pieces of text
        while place < len(kinds):
            if kinds[place] == VIDEO_PLACEHOLDER:
                units = self._add_video(sample, next(videos), options["videos"], media_cache)
                following = place + 1
            else:
                group = next(groups)
                following = place + len(group)
                between = "".join(texts[place + 1 : following])
                if VIDEO_PLACEHOLDER in kinds[place:following] or between.strip():
                    raise FramePackingError(
                        f"The frames of group {group} do not stand together in the prompt: {between.strip()[:40]!r} or a "
                        "video is between them. Put the frames of a group next to each other."
                    )
                units = self._add_pictures(sample, [next(frames) for _ in group], group, pictures, options["images"])
                pictures += len(group)
                if group != [-1] and following < len(kinds) and not texts[following].strip():
                    texts[following] = "\n"
            moved.append((old_starts[following], moved[-1][1] + len(parts[-1]) + len(units)))
            parts += [units, texts[following]]
            place = following
        sample.text = "".join(parts)
        for span in spans:
            pieces = [(end, moved[bisect_right(moved, (end, len(sample.text))) - 1]) for end in span]
            sample.spans.append(tuple(end - old + new for end, (old, new) in pieces))
        return sample

    def _add_pictures(self, sample, frames, group, number, options):
        """Add the frames of one group (a still picture: one frame, id -1); returns the text with its slots."""
        for target, new in zip(
            (sample.pixel_values, sample.tgt_sizes, sample.temporal_ids), pack_frames(frames, [group]), strict=True
        ):
            target.extend(new)
        sample.image_sizes.extend(frame.image_size for frame in frames)
        return self.image_processor.get_slice_image_placeholder(
            frames[0].image_size, number, options.get("max_slice_nums"), options.get("use_image_id")
        )

    def _slice(self, images: list, options: dict, media_cache: Any) -> list[SlicedImage]:
        def make(images):
            limit, data_format = options.get("max_slice_nums"), options.get("input_data_format")
            return self.image_processor.slice_all_to_patches(images, limit, data_format)

        if media_cache is None:
            return make(images)
        # The cache is asked twice, so that all images that it lacks are sliced in one go, on all threads.
        missing = []
        for image in images:
            try:
                media_cache.get("image", image, _not_made)
            except _NotMadeError:
                missing.append(image)
        made = {id(image): sliced for image, sliced in zip(missing, make(missing), strict=True)}
        return [media_cache.get("image", image, lambda image=image: made[id(image)]) for image in images]

    def _add_video(self, sample, video, options, media_cache):
        """Add the sampled frames of one video; returns the text with its slots, a line for each group."""
        options = dict(options)
        use_image_id = options.pop("use_image_id", None)
        options.pop("return_metadata", None)
        processor = self.video_processor

        def make():
            return processor.preprocess(video, return_metadata=True, **options)

        clip = make() if media_cache is None else media_cache.get("video", video, make)
        (report,) = clip["video_metadata"]
        sample.pixel_values.extend(clip["pixel_values"][0])
        sample.tgt_sizes.extend(clip["tgt_sizes"][0].tolist())
        sample.temporal_ids.extend(clip["temporal_ids"][0])
        sample.image_sizes.extend(clip["image_sizes"][0])
        sample.video_metadata.append(report)
        size, limit = clip["image_sizes"][0][0], options.get("max_slice_nums")
        groups = range(report.num_groups)
        return "\n".join(processor.get_slice_image_placeholder(size, group, limit, use_image_id) for group in groups)

    def _tokenize(
        self,
        samples,
        with_masks,
        padding=None,
        padding_side="left",
        pad_to_multiple_of=None,
        truncation=None,
        max_length=None,
        return_tensors="pt",
        return_mm_token_type_ids=False,
    ):
        """Ids, mask and slot bounds of expanded prompts; with `with_masks` also what the assistant wrote."""
        encoded = [encode_prompt(self.tokenizer, sample.text) for sample in samples]
        query_num, slot = self.image_processor.image_feature_size, self.image_token_id
        rows = []
        for index, (sample, (ids, offsets)) in enumerate(zip(samples, encoded, strict=True)):
            slots = [place for place, token in enumerate(ids) if token == slot]
            if len(slots) != query_num * len(sample.temporal_ids):
                raise ValueError(
                    f"Prompt {index} has {len(slots)} {self.image_token} tokens, but its pictures take "
                    f"{query_num * len(sample.temporal_ids)}. Mark pictures by {IMAGE_PLACEHOLDER} only."
                )
            if max_length is not None and len(ids) > max_length:
                if truncation in (None, False, "do_not_truncate") or (slots and slots[-1] >= max_length):
                    raise PromptTooLongError(
                        f"Prompt {index} has {len(ids)} tokens, {len(slots)} of them for pictures; the limit is "
                        f"{max_length}. Shorten the text, give fewer or smaller pictures (max_slice_nums) or fewer "
                        "frames (fps, max_num_packing), or raise the limit (max_length; in chat() max_inp_length)."
                    )
                ids, offsets = ids[:max_length], offsets[:max_length]
            starts = slots[::query_num]
            row = {"input_ids": ids, "bounds": [(start, start + query_num) for start in starts]}
            if with_masks:
                row["assistant_masks"] = [
                    int(any(first <= start < last for first, last in sample.spans)) for start, _ in offsets
                ]
            if return_mm_token_type_ids:
                row["mm_token_type_ids"] = [int(token == slot) for token in ids]
            rows.append(row)
        if padding is None:
            padding = len(samples) > 1 and return_tensors is not None
        self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # its advice does not fit here
        data = self.tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in rows]},
            padding=padding,
            padding_side=padding_side,
            max_length=max_length if padding == "max_length" else None,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors=return_tensors,
        )
        data = dict(data)
        before = [
            len(ids) - len(row["input_ids"]) if padding_side == "left" else 0
            for ids, row in zip(data["input_ids"], rows, strict=True)
        ]
        for name in rows[0].keys() & {"assistant_masks", "mm_token_type_ids"} if rows else ():
            padded = [
                ([0] * shift + row[name] + [0] * len(ids))[: len(ids)]
                for shift, row, ids in zip(before, rows, data["input_ids"], strict=True)
            ]
            data[name] = BatchFeature({name: padded}, tensor_type=return_tensors)[name]
        data["image_bound"] = [
            torch.tensor(row["bounds"]).reshape(-1, 2).long() + shift for row, shift in zip(rows, before, strict=True)
        ]
        return data

    # ---- messages -> inputs ----

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        tools=None,
        documents=None,
        add_generation_prompt=False,
        continue_final_message=False,
        return_assistant_tokens_mask=False,
        tokenize=False,
        return_tensors=None,
        return_dict=False,
        processor_kwargs=None,
        sanitize_control_tokens=True,
        **kwargs,
    ):
        """Turn messages into a prompt, and with `tokenize=True` into the inputs of the model.

        Args:
            conversation: a list of messages `{"role", "content"}`, or a list of such lists. Content is a string, a
                picture, or a list of parts: strings, pictures (PIL, pathlib.Path, bytes, array, tensor), videos
                (pathlib.Path with a video's suffix) and dicts: `{"type": "text", "text": ...}`, `{"type": "image"}` with
                "image", "url", "path" or "base64", OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`, and
                `{"type": "video"}` with "video", "url" or "path". A string is text, never a path. A part of type
                image or video without its data takes the next of `images=` or `videos=`. The key "ref" of a text part
                is the name of a region, which follows the text between `<ref>` and `</ref>`.
            tokenize: return inputs instead of the rendered text.
            return_dict: return all inputs instead of `input_ids` alone.
            return_tensors: "pt", "np" or None (lists).
            return_assistant_tokens_mask: also give `assistant_masks` [B, L], 1 where the assistant's text stands.
            sanitize_control_tokens: with `tokenize=True`, control tokens in what users, tools and the system wrote
                become plain text; in an assistant's turn those that the model itself writes stay. Rendering to text
                cannot mark them.
            processor_kwargs, kwargs: options of `__call__`; other keywords are variables of the template, such as
                `enable_thinking`.

        Returns:
            The prompt (a list for a batch), the ids, or the [`BatchFeature`] of `__call__`.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("This processor has no chat template. Load it from its folder, or pass chat_template=.")
        options = dict(processor_kwargs or {})
        template_variables = {}
        for name, value in kwargs.items():
            (options if self.is_option(name) else template_variables)[name] = value
        is_batched = _is_nested(conversation)
        conversations = conversation if is_batched else [conversation]
        pending = {name: options.pop(name, None) for name in ("images", "videos")}
        media = [{"image": [], "video": []} for _ in conversations]
        guard = control_tokens(self.tokenizer) if tokenize and sanitize_control_tokens else None
        rendered_messages = [
            [read_message(message, found, guard) for message in messages]
            for messages, found in zip(conversations, media, strict=True)
        ]
        prompts, spans = render_jinja_template(
            conversations=rendered_messages,
            tools=mark_typed(tools, guard),
            documents=mark_typed(documents, guard),
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.tokenizer.special_tokens_map, **template_variables},
        )
        if not tokenize:
            return prompts if is_batched else prompts[0]
        inputs = {
            "images": self._fill_in(prompts, media, "image", pending["images"], IMAGE_PLACEHOLDER, _as_list),
            "videos": self._fill_in(prompts, media, "video", pending["videos"], VIDEO_PLACEHOLDER, flatten_videos),
        }
        output = self._process(
            prompts,
            **inputs,
            spans=spans if return_assistant_tokens_mask else None,
            return_tensors=return_tensors,
            **options,
        )
        return output if return_dict else output["input_ids"]

    def _fill_in(self, prompts, media, kind, pending, placeholder, as_list):
        """Media of each prompt: those that stood in the messages, or those given beside them."""
        if pending is not None:
            if any(found[kind] for found in media):
                raise ValueError(f"{kind}s stand in the messages and in {kind}s=. Give them in one way only.")
            return _share_out(prompts, pending, placeholder, f"{kind}s", as_list)
        return [found[kind] for found in media] if any(found[kind] for found in media) else None

    # ---- for other software ----

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Slots and slices that pictures of `image_sizes` (height, width) take.

        Serving engines split the places where `mm_token_type_ids` is 1 by these numbers: the tokens around the slots of
        a picture do not count.
        """
        if image_sizes is None:
            return MultiModalData()
        slices = [
            self.image_processor.get_number_of_image_patches(height, width, kwargs) for height, width in image_sizes
        ]
        query_num = self.image_processor.image_feature_size
        return MultiModalData(num_image_tokens=[query_num * count for count in slices], num_image_patches=slices)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The classes imported above, not those that the Auto classes would load once more as twins: what the parts
        # raise is what `processor.ImageInputError` and its kin name.
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("trust_remote_code", "code_revision")}
        parts = [MiniCPMVImageProcessor, MiniCPMVVideoProcessor]
        for part in parts:
            part.register_for_auto_class()  # so that saving writes where the classes are found
        images, videos = (part.from_pretrained(pretrained_model_name_or_path, **kwargs) for part in parts)
        return [images, tokenizer, videos]

    def check_argument_for_proper_class(self, argument_name, argument):
        # transformers looks up video processors in a mapping that is empty without torchvision.
        if argument_name == "video_processor":
            return MiniCPMVVideoProcessor
        return super().check_argument_for_proper_class(argument_name, argument)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save all parts. `preprocessor_config.json` stands beside transformers' own file: other engines read it."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        self.image_processor.save_pretrained(save_directory)
        return files


class _NotMadeError(Exception):
    """A cache of media does not know an image."""


def _not_made() -> NoReturn:
    raise _NotMadeError


def _is_text(value):
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _is_nested(value):
    """Whether a list holds one list for each sample."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(item is None or isinstance(item, (list, tuple)) for item in value)
    )


def _as_list(value):
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_single_video(video):
    # By identity: `==` on arrays gives an array.
    return not isinstance(video, (list, tuple)) or any(item is video for item in flatten_videos(video))


def _share_out(prompts, media, placeholder, name, as_list):
    """One list of pictures (or videos) a prompt; a flat list is shared out by the places in the prompts."""
    if media is None:
        return None
    if _is_nested(media) and not (name == "videos" and all(_is_single_video(item) for item in media)):
        if len(media) != len(prompts):
            raise ValueError(f"{name} are lists for {len(media)} prompts, but there are {len(prompts)} prompts.")
        return [as_list(item) if item is not None else [] for item in media]
    flat, counts = as_list(media), [prompt.count(placeholder) for prompt in prompts]
    if sum(counts) != len(flat):
        raise ValueError(
            f"The prompts have {sum(counts)} places {placeholder} for {name}, but {len(flat)} {name} were given. Give one "
            "for each place, in order."
        )
    items = iter(flat)
    return [[next(items) for _ in range(count)] for count in counts]


def _groups_by_prompt(temporal_ids, count):
    """One list of groups a prompt, or None for still pictures; the groups of a single prompt may come bare."""
    if temporal_ids is None:
        return [None] * count
    temporal_ids = temporal_ids.tolist() if isinstance(temporal_ids, torch.Tensor) else list(temporal_ids)
    is_bare = bool(temporal_ids) and all(
        isinstance(group, (list, tuple)) and all(isinstance(frame, int) for frame in group) for group in temporal_ids
    )
    samples = [temporal_ids] if is_bare else temporal_ids
    if len(samples) != count:
        raise FramePackingError(
            f"temporal_ids are given for {len(samples)} prompts, but there are {count}. Give one list of groups a prompt."
        )
    return [None if sample is None else [list(group) for group in sample] for sample in samples]
