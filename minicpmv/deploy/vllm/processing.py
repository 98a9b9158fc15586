"""Inputs of MiniCPM-V 4.5 in vLLM: what a request holds, to slots in the prompt and tensors for the model.

What is special:
- Every image and video goes through the checkpoint's own processor, one at a time, and its slots are what that processor
  writes in the prompt: so prompts have the ids that `model.chat` gives them, whatever options a request has.
- A video arrives as a whole file (loader `minicpmv`) or as frames. The options of the request choose and pack frames.
- vLLM caches an item under its bytes, its metadata and the options of its request: another packing is another item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.models.minicpmv import (
    MiniCPMVDummyInputsBuilder,
    MiniCPMVMultiModalDataParser,
    MiniCPMVMultiModalProcessor,
    MiniCPMVProcessingInfo,
    get_version_by_config,
)
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import DictEmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing import InputProcessingContext, PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.processor import cached_encode

from minicpmv.errors import MiniCPMVError


logger = init_logger(__name__)

PACKED_VERSION = (4, 5)
PARTS = ("images_kwargs", "videos_kwargs")  # options of images or videos alone
# Of a request: where the processor would take data, or give what vLLM has no place for.
NOT_FOR_REQUESTS = {"video_metadata", "return_metadata", "input_data_format"}


class PackedProcessingInfo(MiniCPMVProcessingInfo):
    """Facts about the checkpoint, asked of its own processor."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        return own_processor(self.ctx.model_config)  # options go with each call, not into a processor of their own

    def get_data_parser(self) -> "PackedDataParser":
        return PackedDataParser(
            video_needs_metadata=True,
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def options(self, request: Mapping[str, object]) -> dict[str, Any]:
        """Options of the processor for one request: the server's with the request's over them.

        Raises:
            MiniCPMVError: there is no such option, or it would read more than a prompt can hold.
        """
        options = self.ctx.get_mm_config().merge_mm_processor_kwargs(request)
        names = self.get_hf_processor().option_names
        known = (names["images"] | names["videos"] | {"temporal_ids"}) - NOT_FOR_REQUESTS
        parts: list[Any] = [options.get(name) or {} for name in PARTS]
        if not all(isinstance(part, Mapping) for part in parts):
            raise MiniCPMVError(f"{' and '.join(PARTS)} in mm_processor_kwargs are objects of options")
        if unknown := (options.keys() - {*PARTS} | set().union(*parts)) - known:
            raise MiniCPMVError(
                f"mm_processor_kwargs hold {', '.join(sorted(unknown))}; they may hold {', '.join(sorted(known))}"
            )
        most = self.most_units(self.ctx.model_config.max_model_len)
        for name in ("max_slice_nums", "max_num_frames"):
            for value in (part.get(name) for part in (options, *parts)):
                if isinstance(value, int) and value > most:
                    raise MiniCPMVError(f"{name}={value} is more than {most}, the units that a prompt here can hold")
        return options

    def most_units(self, seq_len: int) -> int:
        """Slices or groups of frames that a prompt of `seq_len` tokens can hold."""
        return max(seq_len // self.get_image_processor().image_feature_size, 1)

    # ---- the largest image and video, by which vLLM measures memory ----

    def get_image_max_slice_num(self) -> int:
        return self.get_image_processor().max_slice_nums

    def get_max_video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        return self._most_groups(seq_len) * self.get_image_processor().image_feature_size

    def get_num_frames_with_most_features(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        videos, groups = self.get_hf_processor().video_processor, self._most_groups(seq_len)
        return groups if groups < videos.max_num_frames else videos.max_num_frames * videos.max_num_packing

    def _most_groups(self, seq_len: int) -> int:
        videos = self.get_hf_processor().video_processor
        # The recipe lets a video exceed the number by the fraction of a second that it does not count.
        return min(self.most_units(seq_len), videos.max_num_frames + int(videos.fps) + 1)


class PackedDataParser(MiniCPMVMultiModalDataParser):
    """Also takes whole videos as bytes, and frames with or without metadata.

    A video becomes (array, metadata): uint8 [N] for a file, [frames, H, W, 3] for frames. The metadata of frames are those
    of vLLM's loaders (`fps`, `frames_indices`, `do_sample_frames`), or `temporal_ids`: a list of ids for each group.
    """

    def _parse_video_data(self, data: Any) -> Any:
        return super()._parse_video_data([data] if isinstance(data, bytes) else data)

    def _get_video_with_metadata(self, video: Any) -> tuple[Any, dict[str, Any]]:
        content, metadata = (video, None) if isinstance(video, bytes) else super()._get_video_with_metadata(video)
        if isinstance(content, bytes):
            content = np.frombuffer(content, np.uint8)
        elif isinstance(content, (list, tuple)):
            content = np.asarray(content)
        return content, metadata or {}


class PackedMultiModalProcessor(MiniCPMVMultiModalProcessor):
    """Calls the checkpoint's processor for each image and video."""

    def process_images(self, mm_data: Mapping[str, Any], mm_kwargs: Mapping[str, object]) -> dict[str, list]:
        options = self.info.options(mm_kwargs)
        options.pop("temporal_ids", None)
        rows = [
            self._read(self.info.image_pattern, images=[[image]], **options) for image in mm_data.get("images", ())
        ]
        return _columns(rows)

    def process_videos(self, mm_data: Mapping[str, Any], mm_kwargs: Mapping[str, object]) -> dict[str, list]:
        options = self.info.options(mm_kwargs)
        rows = [self._read_video(*video, **options) for video in mm_data.get("videos", ())]
        return {f"video_{name}": column for name, column in _columns(rows).items()}

    def _read_video(
        self, video: Any, metadata: Mapping[str, Any], temporal_ids: Any = None, **options: Any
    ) -> dict[str, Any]:
        own = dict(options.pop("videos_kwargs", None) or {})
        is_file, temporal_ids = video.ndim == 1, metadata.get("temporal_ids", temporal_ids)
        if temporal_ids is not None:
            if is_file:
                raise MiniCPMVError("temporal_ids are for frames that the caller has chosen, but this video is a file")
            slices = self.info.get_hf_processor().video_processor.max_slice_nums
            frames = {
                "max_slice_nums": own.get("max_slice_nums") or options.get("max_slice_nums") or slices,
                "use_image_id": own.get("use_image_id", False),
            }
            prompt = self.info.image_pattern * len(video)
            return self._read(prompt, images=[list(video)], temporal_ids=[temporal_ids], images_kwargs=frames)
        if not metadata.get("do_sample_frames", True) and not {"fps", "num_frames"} & {*own, *options}:
            own.setdefault("do_sample_frames", False)
        videos, clock = [[video.tobytes() if is_file else video]], clock_of(metadata, len(video))
        return self._read(self.info.video_pattern, videos=videos, video_metadata=clock, videos_kwargs=own, **options)

    def _read(self, prompt: str, **inputs: Any) -> dict[str, Any]:
        """The fields of one image or video: the ids of its place in the prompt, and what the model reads for them."""
        read = self.info.get_hf_processor()(text=[prompt], **inputs)
        (slices,), (tgt_sizes,) = read["pixel_values"], read["tgt_sizes"]
        units = read["temporal_ids"][0] if "temporal_ids" in read else [[-1]] * len(slices)
        most, longest = self.info.get_hf_config().vision_batch_size, max(map(len, units))
        if longest > most:  # they go through the tower together, and nobody has measured the memory for so many
            raise MiniCPMVError(f"a group of {longest} frames is more than {most}, which the model reads at a time")
        return {
            "slots": read["input_ids"][0],
            "pixel_values": [pixels.to(self.info.ctx.model_config.dtype) for pixels in slices],
            "tgt_sizes": tgt_sizes,
            "temporal_ids": [torch.tensor(unit) for unit in units],
        }

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for modality, prefix in (("image", ""), ("video", "video_")):
            for name in ("slots", "temporal_ids"):
                fields[prefix + name] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        slot = self.info.get_tokenizer().get_vocab()[self.info.get_hf_processor().image_token]

        def image(index: int) -> PromptUpdateDetails:
            ids = out_mm_kwargs["image"][index]["slots"].data.tolist()
            return PromptUpdateDetails.select_token_ids(self._numbered(ids, index), [slot])

        def video(index: int) -> PromptUpdateDetails:
            ids = out_mm_kwargs["video"][index]["video_slots"].data.tolist()
            return PromptUpdateDetails.select_token_ids(ids, [slot])

        replacements = {"image": image, "video": video}
        return [
            update  # of features that the caller computed
            if isinstance(mm_items.get(update.modality), DictEmbeddingItems)
            else replace(update, replacement=replacements[update.modality])
            for update in updates
        ]

    def _numbered(self, ids: list[int], index: int) -> list[int]:
        """Slots of an image as those of image `index`; unchanged where images have no numbers."""
        tokenizer, images = self.info.get_tokenizer(), self.info.get_image_processor()
        start, end = (tokenizer.get_vocab()[token] for token in (images.im_id_start, images.im_id_end))
        if ids[0] != start:
            return ids
        return [start, *cached_encode(tokenizer, str(index), add_special_tokens=False), *ids[ids.index(end) :]]


def clock_of(metadata: Mapping[str, Any], num_frames: int) -> dict[str, float] | None:
    """The clock of frames, as `video_metadata`: their rate, also where a loader took them from a faster video."""
    fps, indices = metadata.get("fps"), metadata.get("frames_indices")
    if not fps:
        return None
    if indices is not None and len(indices) == num_frames and indices[-1] > indices[0]:
        fps *= (num_frames - 1) / (indices[-1] - indices[0])
    return {"fps": fps}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


# ---- what vLLM's registry makes for a checkpoint: packed, or its own ----


def processing_info(ctx: InputProcessingContext) -> MiniCPMVProcessingInfo:
    """Packed where the checkpoint is of version 4.5 and its code packs videos; else vLLM's own, without packing."""
    if get_version_by_config(ctx.get_hf_config()) == PACKED_VERSION and ctx.model_config.trust_remote_code:
        if hasattr(getattr(own_processor(ctx.model_config), "video_processor", None), "slice_video"):
            return PackedProcessingInfo(ctx)
        logger.warning(
            "%s brings code that packs no videos: each frame costs what an image costs", ctx.model_config.model
        )
    return MiniCPMVProcessingInfo(ctx)


def own_processor(config: ModelConfig) -> Any:
    """The processor that a checkpoint brings; vLLM knows another one under the same name."""
    return _load_processor(config.model, config.revision, config.code_revision)


@lru_cache
def _load_processor(name: str, revision: str | None, code_revision: str | None) -> Any:
    return AutoProcessor.from_pretrained(name, revision=revision, code_revision=code_revision, trust_remote_code=True)


def processor(info: MiniCPMVProcessingInfo, dummy_inputs: MiniCPMVDummyInputsBuilder) -> MiniCPMVMultiModalProcessor:
    is_packed = isinstance(info, PackedProcessingInfo)
    return (PackedMultiModalProcessor if is_packed else MiniCPMVMultiModalProcessor)(info, dummy_inputs)
