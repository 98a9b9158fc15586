"""The video loader `minicpmv`: a file goes to the processor as it is, which alone knows the options of the request."""

from typing import Any

import numpy as np
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from minicpmv.errors import MiniCPMVError


NAME = "minicpmv"
UNSET_NUM_FRAMES = (-1, 32)  # all, and vLLM's default: neither says that somebody chose a number


@VIDEO_LOADER_REGISTRY.register(NAME)
class WholeVideo(VideoLoader):
    """Keeps the bytes of a video. vLLM's other loaders choose frames before the processor is asked."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = -1, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """`(bytes as uint8 [N], {})`.

        Raises:
            MiniCPMVError: options of the loader that would choose frames.
        """
        chosen = [*options] if num_frames in UNSET_NUM_FRAMES else ["num_frames", *options]
        if chosen:
            raise MiniCPMVError(
                f"media_io_kwargs for video hold {', '.join(sorted(chosen))}, but frames are chosen by the processor: "
                "give fps, num_frames, start, end and packing in mm_processor_kwargs"
            )
        return np.frombuffer(data, np.uint8), {}
