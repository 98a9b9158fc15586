"""MiniCPM-V 4.5 in vLLM with packed videos: the frames of a group share one unit of tokens.

vLLM's own class has the 3D resampler but never gives it temporal ids, so each frame costs what an image costs.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.minicpmv import (
    MiniCPMV,
    MiniCPMV4_5,
    MiniCPMVDummyInputsBuilder,
    MiniCPMVMultiModalInputs,
    Resampler4_5,
    get_version_by_config,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from minicpmv.deploy.vllm.processing import PACKED_VERSION, processing_info, processor


FIELDS = {"images": "temporal_ids", "videos": "video_temporal_ids"}


class PackedMiniCPMV4_5(MiniCPMV4_5):
    """Images and videos are read `vision_batch_size` slices at a time, whatever a request holds."""

    def _parse_and_validate_multimodal_inputs(self, **kwargs: object) -> MiniCPMVMultiModalInputs:
        modalities: Any = super()._parse_and_validate_multimodal_inputs(**kwargs)
        for modality, name in FIELDS.items():
            if modality in modalities and name in kwargs:
                items: Any = kwargs[name]
                modalities[modality].temporal_ids = [[unit.tolist() for unit in item] for item in items]
                # By this the features are shared out among the items.
                modalities[modality].num_slices = torch.tensor([len(item) for item in items])
        return modalities

    def get_vision_hidden_states(self, data: Any) -> torch.Tensor:  # [units, Q, D]
        pixel_values, tgt_sizes = data["pixel_values"], data["tgt_sizes"]
        items = data.get("temporal_ids")
        units = [[-1]] * len(pixel_values) if items is None else [unit for item in items for unit in item]
        features, first = [], 0
        for batch in batches(units, self.config.vision_batch_size):
            last = first + sum(map(len, batch))
            slices = {"pixel_values": pixel_values[first:last], "tgt_sizes": tgt_sizes[first:last]}
            features.append(super().get_vision_hidden_states(slices | {"temporal_ids": [batch]}))
            first = last
        return torch.cat(features)

    def init_resampler(self, *args: Any, **kwargs: Any) -> Resampler4_5:
        resampler = super().init_resampler(*args, **kwargs)
        # The table is 300 MB for an hour of video, and ends there.
        del resampler.temporal_pos_embed
        resampler.temporal_pos_embed = TemporalPositions(resampler)
        resampler.max_temporal_size = float("inf")
        return resampler


class TemporalPositions:
    """Position embeddings of temporal ids: `positions[id]` is [D] in float32, computed when asked for."""

    def __init__(self, resampler: Resampler4_5):
        self.resampler = resampler

    def __getitem__(self, temporal_id: int) -> torch.Tensor:
        resampler = self.resampler
        position = np.array([temporal_id], dtype=np.float32)
        table = resampler.get_1d_sincos_pos_embed_from_temporal_size(resampler.embed_dim, position)  # [1, D]
        return torch.from_numpy(table)[0].to(resampler.query.device)


def batches(units: list[list[int]], size: int) -> list[list[list[int]]]:
    """Units in batches of at most `size` slices or frames, or of one unit."""
    found: list[list[list[int]]] = []
    filled = size
    for unit in units:
        if filled + len(unit) > size:
            found.append([])
            filled = 0
        found[-1].append(unit)
        filled += len(unit)
    return found


@MULTIMODAL_REGISTRY.register_processor(processor, info=processing_info, dummy_inputs=MiniCPMVDummyInputsBuilder)
class PackedMiniCPMV(MiniCPMV):
    """Chooses the class by the version of the checkpoint, as its base does."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        if get_version_by_config(vllm_config.model_config.hf_config) != PACKED_VERSION:
            return super().__new__(cls, vllm_config=vllm_config, prefix=prefix)
        # The quantization's configuration has these dictionaries of the base.
        cls.packed_modules_mapping.update(PackedMiniCPMV4_5.packed_modules_mapping)
        cls.embedding_modules.update(PackedMiniCPMV4_5.embedding_modules)
        return PackedMiniCPMV4_5(vllm_config=vllm_config, prefix=prefix)
