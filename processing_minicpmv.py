"""Processor of MiniCPM-V 4.5: text, images and videos to the inputs of the model.

What is special:
- One road for every prompt: messages -> rendered prompt -> placeholders replaced by slots -> ids. `chat()`, training
  and serving all come through here.
- Images and videos go into the same lists, in the order of their places in the text; a video's frames share slots.
- Text that a user typed never turns into control tokens: see `messages_minicpmv`.
- Batches are padded on the left with the pad token, and the mask comes from lengths: id 0 is "!", an ordinary token.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoInput

from .compat_minicpmv import NestedBatchFeature, ProcessorBase
from .configuration_minicpmv import MiniCPMVError, did_you_mean
from .image_loading_minicpmv import FramePackingError, ImageInputError
from .image_processing_minicpmv import (
    ImageOptions,
    MiniCPMVImageProcessor,
    SlicedImage,
    as_samples,
    as_tensor,
    pad_visual_inputs,
    read_groups,
    visual_features,
)
from .messages_minicpmv import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    encode_prompt,
    kind_of,
    mark_typed,
    read_message,
    read_part,
    split_thought,
    typed_guard,
    write_thought,
)
from .video_decoding_minicpmv import FrameSamplingError, VideoInputError, flatten_videos
from .video_processing_minicpmv import MiniCPMVVideoProcessor, VideoReport, metadata_of_each


logger = logging.get_logger(__name__)

PLACES = {"images": IMAGE_PLACEHOLDER, "videos": VIDEO_PLACEHOLDER}  # in a rendered prompt
PLACEHOLDERS = re.compile("|".join(map(re.escape, PLACES.values())))
# Keywords of a call that are no options of images, videos or text.
CALL_OPTIONS = {"images", "videos", "temporal_ids", "pad_pixel_values", "media_cache"} | {
    f"{part}_kwargs" for part in ("images", "videos", "text", "common")
}
# SGLang, TRL and the pipelines of transformers pass these along; they change nothing here.
TOLERATED_OPTIONS = {"add_special_tokens", "device", "do_pad", "load_audio_from_video", "sampling_rate"}


@dataclass(frozen=True)
class TextOptions:
    """Options of a call that concern ids."""

    padding: bool | str | None = None  # None: where there are several prompts
    padding_side: str = "left"
    pad_to_multiple_of: int | None = None
    max_length: int | None = None  # most tokens of a prompt; a longer one is an error
    truncation: bool | str | None = None  # True: a longer one is cut, unless that would cut an image
    return_tensors: str | None = "pt"  # "pt", "np" or None (lists)
    return_mm_token_type_ids: bool = False  # also give 1 for slots and 0 for text


class PromptTooLongError(MiniCPMVError):
    """A prompt has more tokens than allowed: the message says how many, how many of them are images, and the limit."""


@dataclass(frozen=True)
class _Options:
    images: ImageOptions
    videos: dict[str, Any]  # of `MiniCPMVVideoProcessor.slice_video`
    metadata: dict[int, Any]  # id of a video -> its `video_metadata`
    text: TextOptions
    read: Callable[[str, list, Callable[[list], list]], list]  # `get` of the media cache, or what asks none


@dataclass
class ExpandedPrompt:
    """One prompt with slots in its text, and the images and frames that fill them, in the same order."""

    text: str
    frames: list[SlicedImage]
    groups: list[list[int]]  # the temporal ids of the frames in each; [-1] for a still image
    video_metadata: list[VideoReport]  # of each video
    spans: list[tuple[int, int]]  # (start, end) in `text` of what an assistant wrote
    num_slots: int = 0


class MiniCPMVProcessor(ProcessorBase):
    """Image processor, tokenizer and video processor in one.

    Without `video_processor`, one is made from the settings of the image processor; without `chat_template`, the
    tokenizer's counts.
    """

    # The errors of its parts, for callers that cannot import this module by name.
    ImageInputError = ImageInputError
    VideoInputError = VideoInputError
    FramePackingError = FramePackingError
    FrameSamplingError = FrameSamplingError
    PromptTooLongError = PromptTooLongError

    image_token = "<unk>"
    # Lists of one entry a prompt: images have slices of unequal size and number.
    skip_tensor_conversion = [*MiniCPMVImageProcessor.model_input_names, "image_bound", "video_metadata"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        if video_processor is None and image_processor is not None:
            video_processor = MiniCPMVVideoProcessor.from_dict(image_processor.to_dict())
        self.image_processor: MiniCPMVImageProcessor = image_processor
        self.tokenizer = tokenizer
        self.video_processor: MiniCPMVVideoProcessor = video_processor
        self.chat_template = chat_template if chat_template is not None else getattr(tokenizer, "chat_template", None)

    @property
    def image_token_id(self) -> int:
        """Id of the slot token that image features replace."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names, "image_bound"]

    # ---- facts that callers need ----

    visual_input_names = ("pixel_values", "tgt_sizes", "temporal_ids")  # inputs of the model that hold images

    split_thought = staticmethod(split_thought)
    write_thought = staticmethod(write_thought)
    kind_of = staticmethod(kind_of)
    read_part = staticmethod(read_part)
    pad_visual_inputs = staticmethod(pad_visual_inputs)

    def load_image(self, source: Any) -> Image.Image:
        """An image, of any kind that messages may hold, as an upright RGB image. Raises ImageInputError."""
        return self.image_processor.load_image(source)

    # ---- rendered prompts -> inputs ----

    def __call__(
        self,
        text: TextInput | list[TextInput] | None = None,
        images: ImageInput | None = None,
        videos: VideoInput | None = None,
        audio: None = None,
        temporal_ids: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn rendered prompts with images and videos into the inputs of the model.

        Args:
            text: a prompt, or a list of them. `(<image>./</image>)` marks the place of an image, `(<video>./</video>)`
                that of a video. Control tokens count; what users typed comes by way of `apply_chat_template`.
            images: one list of images a prompt (TRL), or one flat list that the places share out in order (SGLang).
                Whatever the image processor loads: PIL, path, bytes, array, tensor, data or http URL.
            videos: likewise; whatever the video processor loads.
            temporal_ids: makes images the frames of videos: for each prompt a list of groups with one id a frame
                (tenths of a second), such as `[[-1], [0, 3, 6]]`; [-1] is a still image.
            kwargs: options of `ImageOptions`, `VideoOptions` and `TextOptions`; those in the dicts `images_kwargs`,
                `videos_kwargs` and `text_kwargs` reach one part alone. And:
            return_metadata: also give `video_metadata`, one report a video.
            pad_pixel_values: give the tensors of `pad_visual_inputs` instead of nested lists.
            media_cache: an object with `get(kind, sources, make)`, asked for the images, then for the videos of a
                prompt before they are read: kind is "image" or "video", sources are what the caller gave, and
                `make(new)` gives what this processor makes of some of them (a `SlicedImage` each; a `SampledVideo`).
                It returns that of all, made now or kept of an earlier call.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` [B, L]. With images or videos, one entry a prompt
            of `pixel_values` (slices [3, P, P * patches]), `tgt_sizes` [slices, 2], `image_sizes` (width, height) and
            `image_bound` [units, 2]. When frames are packed, `temporal_ids`.

        Raises MiniCPMVError, whose kinds are attributes of the processor.
        """
        if _is_text(images) and not _is_text(text):  # transformers' own order is (images, text)
            text, images = images, text
        if audio:
            raise MiniCPMVError("audio was given, but this model reads text, images and videos only.")
        prompts = [text] if isinstance(text, str) else text
        if prompts is None and images is None:
            raise MiniCPMVError("Pass text, images, or both; videos need a text that names their places.")
        if prompts is None:  # images alone, as one sample after the other
            prompts = [IMAGE_PLACEHOLDER * len(sample) for sample in as_samples(images)]
        images, videos = _share_out(prompts, images, "images"), _share_out(prompts, videos, "videos")
        data = self._process(prompts, images, videos, temporal_ids, **kwargs)
        if text is None:
            for name in ("input_ids", "attention_mask", "image_bound"):
                data.pop(name, None)
        return data

    def _process(
        self, prompts: list[str], images: Any, videos: Any, temporal_ids: Any = None, spans: Any = None, **kwargs: Any
    ) -> NestedBatchFeature:
        """`__call__` on one list of images and one of videos a prompt (None: no such modality in the batch)."""
        is_padded = kwargs.pop("pad_pixel_values", False)
        options = self._sort_options(kwargs, [*chain(*videos or ())])
        return_metadata = options.videos.pop("return_metadata", False)
        nothing: list[list] = [[]] * len(prompts)
        groups = read_groups(temporal_ids, [len(sample) for sample in images or nothing])
        samples = [
            self._expand(*inputs, options)
            for inputs in zip(prompts, images or nothing, videos or nothing, groups, spans or nothing, strict=True)
        ]
        visual = visual_features([(sample.frames, sample.groups) for sample in samples]).data
        data = self._tokenize(samples, options.text, with_masks=spans is not None)
        if images is None and videos is None:
            data.pop("image_bound")
        else:
            if all(group == [-1] for sample in samples for group in sample.groups):
                visual.pop("temporal_ids")
            data |= visual
            if is_padded:
                rows = zip(*visual.values(), strict=True)
                data |= self.pad_visual_inputs([dict(zip(visual, row, strict=True)) for row in rows])
        if return_metadata:
            data["video_metadata"] = [sample.video_metadata for sample in samples]
        return NestedBatchFeature(data)

    @property
    def option_names(self) -> dict[str, set[str]]:
        """Keyword arguments of `__call__` by the part they concern: {"images": ..., "videos": ..., "text": ...}."""
        # `use_image_id` is not a video's unless asked of it alone: a number for each image is the default of images.
        videos = {*self.video_processor.option_names, "video_metadata", "return_metadata"} - {"use_image_id"}
        images, text = ({each.name for each in fields(options)} for options in (ImageOptions, TextOptions))
        return {"images": images, "videos": videos, "text": text}

    def is_option(self, name: str) -> bool:
        """Whether a keyword is an option of this processor (else it may be a variable of the chat template)."""
        return name in CALL_OPTIONS | TOLERATED_OPTIONS or any(name in names for names in self.option_names.values())

    def _sort_options(self, kwargs: dict[str, Any], videos: list) -> _Options:
        """The keywords of a call by the part they concern, like `option_names`."""
        parts, cache = self.option_names, kwargs.pop("media_cache", None)
        options = {part: dict(kwargs.pop(f"{part}_kwargs", None) or {}) for part in (*parts, "common")}
        unknown = {name for part in ("images", "text") for name in options[part].keys() - parts[part]}
        for name, value in {**options.pop("common"), **kwargs}.items():
            owners = [part for part, names in parts.items() if name in names]
            # For one of several parts a dict may say otherwise than the keyword; for the only part it contradicts it.
            if len(owners) == 1 and name in kwargs and name in options[owners[0]]:
                raise MiniCPMVError(f"{name!r} was given twice: as a keyword and in {owners[0]}_kwargs. Give it once.")
            for part in owners:
                options[part].setdefault(name, value)
            if not owners:
                unknown.add(name)
        for name in unknown - TOLERATED_OPTIONS:
            hint = did_you_mean(name, set().union(*parts.values()))
            logger.warning_once(f"{type(self).__name__} does not know the keyword {name!r} and ignores it.{hint}")
        images, text = (
            {name: options[part][name] for name in options[part].keys() & parts[part]} for part in ("images", "text")
        )
        clocks = metadata_of_each(videos, options["videos"].pop("video_metadata", None))
        metadata = dict(zip(map(id, videos), clocks, strict=True))
        read = cache.get if cache is not None else lambda kind, sources, make: make(sources)
        return _Options(ImageOptions(**images), options["videos"], metadata, TextOptions(**text), read)

    def _expand(
        self, prompt: str, images: list, videos: list, groups: list[list[int]], spans: list, options: _Options
    ) -> ExpandedPrompt:
        """Put slots in the places of images and videos, and make the slices that fill them."""
        places, texts = [*PLACEHOLDERS.finditer(prompt)], PLACEHOLDERS.split(prompt)
        kinds = [found[0] for found in places]
        for name, given in (("images", images), ("videos", videos)):
            _check_places("prompt has", name, kinds.count(PLACES[name]), given)
        limit, data_format = options.images.max_slice_nums, options.images.input_data_format

        def slice_images(new: list) -> list:  # but for those that are `SlicedImage`s already
            unsliced = [image for image in new if not hasattr(image, "tgt_sizes")]
            sliced = iter(self.image_processor.slice_all_to_patches(unsliced, limit, data_format))
            return [image if hasattr(image, "tgt_sizes") else next(sliced) for image in new]

        def slice_videos(new: list) -> list:
            slice_video, metadata = self.video_processor.slice_video, options.metadata
            return [slice_video(video, metadata[id(video)], **options.videos) for video in new]

        stills = iter(options.read("image", images, slice_images))
        sampled = iter(options.read("video", videos, slice_videos))
        groups_left = iter(groups)
        sample = ExpandedPrompt("", [], [], [], [])
        parts, place, number = [texts[0]], 0, 0
        moves = [(0, 0)]  # (start in the prompt, start in the result) of the pieces of text
        while place < len(kinds):
            if kinds[place] == VIDEO_PLACEHOLDER:
                video, following = next(sampled), place + 1
                members, packs = video.frames, video.temporal_ids
                sample.video_metadata.append(video.metadata)
                size = members[0].image_size
                slots = self.video_processor.get_video_placeholder(size, len(packs), **options.videos)
            else:
                group = next(groups_left)
                following = place + len(group)
                between = "".join(texts[place + 1 : following])
                if VIDEO_PLACEHOLDER in kinds[place:following] or between.strip():
                    found = f"do not stand together in the prompt: {between.strip()[:40]!r} or a video is between them"
                    raise FramePackingError(f"The frames of group {group} {found}. Put them next to each other.")
                members, packs = [next(stills) for _ in group], [group]
                for frame in members:
                    if self.image_processor.get_sliced_grid(frame.image_size, limit) != frame.grid:
                        found = f"encoded in slices {frame.grid}, but max_slice_nums={limit} cuts it otherwise"
                        raise ImageInputError(f"An image was {found}. Give encode_images the same max_slice_nums.")
                slots = self.image_processor.get_slice_image_placeholder(
                    members[0].image_size, number, limit, options.images.use_image_id
                )
                number += len(group)
                if group != [-1] and following < len(kinds) and not texts[following].strip():
                    texts[following] = "\n"
            moves.append((places[following - 1].end(), moves[-1][1] + len(parts[-1]) + len(slots)))
            parts += [slots, texts[following]]
            sample.num_slots += slots.count(self.image_token)
            sample.frames += members
            sample.groups += packs
            place = following

        def moved(place: int) -> int:
            old, new = moves[bisect_right(moves, place, key=itemgetter(0)) - 1]
            return place - old + new

        sample.text, sample.spans = "".join(parts), [(moved(start), moved(end)) for start, end in spans]
        return sample

    def _tokenize(self, samples: list[ExpandedPrompt], options: TextOptions, with_masks: bool) -> dict[str, Any]:
        """Ids, mask and slot bounds of expanded prompts; with `with_masks` also what the assistant wrote."""
        encoded = [encode_prompt(self.tokenizer, sample.text) for sample in samples]
        query_num, slot = self.image_processor.image_feature_size, self.image_token_id
        rows = []
        for index, (sample, (ids, offsets)) in enumerate(zip(samples, encoded, strict=True)):
            slots = [place for place, token in enumerate(ids) if token == slot]
            if len(slots) != sample.num_slots:
                taken = f"{len(slots)} {self.image_token} tokens, but its images take {sample.num_slots}"
                raise MiniCPMVError(f"Prompt {index} has {taken}. Mark images by {IMAGE_PLACEHOLDER} only.")
            limit = options.max_length
            if limit is not None and len(ids) > limit:
                if options.truncation in (None, False, "do_not_truncate") or (slots and slots[-1] >= limit):
                    raise PromptTooLongError(
                        f"Prompt {index} has {len(ids)} tokens, {len(slots)} of them for images; the limit is "
                        f"{limit}. Shorten the text, give fewer or smaller images (max_slice_nums) or fewer "
                        "frames (fps, max_num_packing), or raise the limit (max_length; in chat() max_inp_length)."
                    )
                ids, offsets = ids[:limit], offsets[:limit]
            row: dict[str, list] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
            row["image_bound"] = [(start, start + query_num) for start in slots[::query_num]]
            if with_masks:
                masks = (any(first <= start < last for first, last in sample.spans) for start, _ in offsets)
                row["assistant_masks"] = list(map(int, masks))
            if options.return_mm_token_type_ids:
                row["mm_token_type_ids"] = [int(token == slot) for token in ids]
            rows.append(row)
        padding, longest = options.padding, max((len(row["input_ids"]) for row in rows), default=0)
        if padding is None:
            padding = len(samples) > 1 and options.return_tensors is not None
        length = {"max_length": options.max_length or longest, True: longest, "longest": longest}.get(padding, 0)
        multiple = options.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        data: dict[str, list] = {name: [] for row in rows for name in row}
        for row in rows:
            missing = max(length - len(row["input_ids"]), 0)
            left = missing if options.padding_side == "left" else 0
            bounds = row.pop("image_bound")
            data["image_bound"].append(as_tensor(np.array(bounds, np.int64).reshape(-1, 2) + left))
            for name, values in row.items():
                filler = [self.tokenizer.pad_token_id if name == "input_ids" else 0]
                data[name].append(filler * left + values + filler * (missing - left))
        bounds = data.pop("image_bound")
        return {**BatchFeature(data, tensor_type=options.return_tensors), "image_bound": bounds}

    # ---- messages -> inputs ----

    def apply_chat_template(
        self,
        conversation: Sequence,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> str | list[str] | list[list[int]] | BatchFeature:
        """Turn messages into a prompt, and with `tokenize=True` into the inputs of the model.

        Args:
            conversation: a list of messages `{"role", "content"}`, or a list of such lists. Content is a string, an
                image, or a list of parts: strings, images (PIL, pathlib.Path, bytes, array, tensor), videos
                (pathlib.Path with a video's suffix) and dicts: `{"type": "text", "text": ...}`, `{"type": "image"}` with
                "image", "url", "path" or "base64", OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`, and
                `{"type": "video"}` with "video", "url" or "path". A string is text, never a path. A part of type
                image or video without its data takes the next of `images=` or `videos=`. The key "ref" of a text part
                is the name of a region, which follows the text between `<ref>` and `</ref>`.
            tokenize: return inputs instead of the rendered text.
            return_dict: return all inputs instead of `input_ids` alone.
            return_assistant_tokens_mask: also give `assistant_masks` [B, L], 1 where the assistant's text stands.
            sanitize_control_tokens: with `tokenize=True`, control tokens in what users, tools and the system wrote
                become plain text; in an assistant's turn those that the model itself writes stay. Rendering to text
                cannot mark them.
            processor_kwargs, kwargs: options of `__call__`; other keywords are variables of the template, such as
                `enable_thinking`.

        Returns the prompt (a list for a batch), the ids, or the [`BatchFeature`] of `__call__`.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise MiniCPMVError("This processor has no chat template. Load it from its folder, or pass one.")
        options = dict(processor_kwargs or {})
        template_variables: dict[str, Any] = {}
        for name, value in kwargs.items():
            (options if self.is_option(name) else template_variables)[name] = value
        is_batched = _is_nested(conversation)
        conversations = conversation if is_batched else [conversation]
        media: list[dict[str, list]] = [{"images": [], "videos": []} for _ in conversations]
        guard = typed_guard(self.tokenizer) if tokenize and sanitize_control_tokens else None
        pairs = zip(conversations, media, strict=True)
        prompts, spans = render_jinja_template(
            conversations=[[read_message(message, found, guard) for message in each] for each, found in pairs],
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
        inputs = {}
        for name in PLACES:
            given, found = options.pop(name, None), [each[name] for each in media]
            if given is not None and any(found):
                raise MiniCPMVError(f"{name} stand in the messages and in {name}=. Give them in one way only.")
            inputs[name] = found if any(found) else _share_out(prompts, given, name)
        spans = spans if return_assistant_tokens_mask else None
        output = self._process(prompts, **inputs, spans=spans, return_tensors=return_tensors, **options)
        return output if return_dict else output["input_ids"]

    # ---- for other software ----

    def _get_num_multimodal_tokens(self, image_sizes: Sequence | None = None, **kwargs: Any) -> MultiModalData:
        """Slots and slices that images of `image_sizes` (height, width) take.

        Serving engines split the places where `mm_token_type_ids` is 1 by these numbers; tokens around slots are not.
        """
        if image_sizes is None:
            return MultiModalData()
        images = self.image_processor
        slices = [images.get_number_of_image_patches(height, width, kwargs) for height, width in image_sizes]
        tokens = [images.image_feature_size * count for count in slices]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=slices)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict | None = None, **kwargs: Any
    ) -> list:
        # The classes imported above, not those that the Auto classes would load once more as twins: what the parts
        # raise is what `processor.ImageInputError` and its kin name.
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("trust_remote_code", "code_revision")}
        parts: list[Any] = [MiniCPMVImageProcessor, MiniCPMVVideoProcessor]
        for part in parts:
            part.register_for_auto_class()  # so that saving writes where the classes are found
        images, videos = (part.from_pretrained(pretrained_model_name_or_path, **kwargs) for part in parts)
        return [images, tokenizer, videos]

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> list:
        """Save all parts, and `preprocessor_config.json` as well, which other engines read."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        self.image_processor.save_pretrained(save_directory)
        return files


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or _is_list_of(value, str)


def _is_nested(value: Any) -> bool:
    """Whether a list holds one list for each sample."""
    return _is_list_of(value, (list, tuple, type(None)))


def _is_list_of(value: Any, kinds: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, kinds) for item in value)


def _is_single_video(video: Any) -> bool:
    # By identity: `==` on arrays gives an array.
    return not isinstance(video, (list, tuple)) or any(item is video for item in flatten_videos(video))


def _share_out(prompts: Sequence[str], media: Any, name: str) -> list[list] | None:
    """One list of "images" or "videos" (`name`) a prompt; a flat list is shared out by the places in the prompts."""
    if media is None:
        return None
    is_nested = _is_nested(media) and not (name == "videos" and all(map(_is_single_video, media)))
    if name == "images":
        samples = as_samples(media)
    else:
        samples = [[] if item is None else flatten_videos(item) for item in (media if is_nested else [media])]
    if is_nested:
        if len(samples) != len(prompts):
            raise MiniCPMVError(f"{name} are lists for {len(samples)} prompts, but there are {len(prompts)} prompts.")
        return samples
    counts = [prompt.count(PLACES[name]) for prompt in prompts]
    _check_places("prompts have", name, sum(counts), samples[0])
    items = iter(samples[0])
    return [[next(items) for _ in range(count)] for count in counts]


def _check_places(subject: str, name: str, places: int, given: list) -> None:
    if places != len(given):
        found = f"{places} places {PLACES[name]} for {name}, but {len(given)} {name} were given"
        raise MiniCPMVError(f"The {subject} {found}. Give one for each place, in order.")
