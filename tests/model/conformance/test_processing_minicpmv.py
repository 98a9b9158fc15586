"""`ProcessorTesterMixin` of transformers on `MiniCPMVProcessor`, with the tokenizer and the settings of nano.

The published tokenizer takes a second to load, which the mixin does for each test.
"""

import sys
import unittest
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # a dummy at the top level

from .mixins import MODALITY_TEST_SPECS, REPOSITORY, ProcessorTesterMixin


MiniCPMVProcessor = get_class_from_dynamic_module("processing_minicpmv.MiniCPMVProcessor", str(REPOSITORY))
MiniCPMVProcessor.register_for_auto_class()  # so that saving it writes its code, as when `AutoProcessor` loaded it

# Options whose effect `_check_modality_outputs` sees. The mixin's own, `rescale_factor=-1`, is none of this processor's.
IMAGE_OPTIONS = {"max_slice_nums": 1, "use_image_id": False}
VIDEO_OPTIONS = {"force_packing": 2}


class MiniCPMVProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MiniCPMVProcessor
    model_id = str(REPOSITORY / "nano")
    videos_input_name = "pixel_values"  # the frames of a clip are pictures
    # Room for one slice of 36 tokens, and for eight frames of a video in four groups.
    images_unstructured_max_length = 90
    videos_unstructured_max_length = videos_text_kwargs_max_length = 300

    @classmethod
    def setUpClass(cls):
        # The mixin loads the parts as those of transformers itself, which need no `trust_remote_code=True`.
        patches = [
            patch.object(loader, "from_pretrained", partial(loader.from_pretrained, trust_remote_code=True))
            for loader in (AutoImageProcessor, AutoTokenizer, AutoVideoProcessor)
        ]
        images, videos = MODALITY_TEST_SPECS["images"], MODALITY_TEST_SPECS["videos"]
        patches += [
            patch.dict(images, init_time_kwargs=IMAGE_OPTIONS),
            patch.dict(videos, init_time_kwargs=VIDEO_OPTIONS),
        ]
        for started in patches:
            started.start()
            cls.addClassCleanup(started.stop)
        super().setUpClass()

    @classmethod
    def _setup_test_attributes(cls, processor):
        # What stands in a prompt for a picture and for a clip; `processor.image_token` is one slot of many.
        module = sys.modules[cls.processor_class.__module__]
        cls.image_token, cls.video_token = module.IMAGE_PLACEHOLDER, module.VIDEO_PLACEHOLDER

    def setUp(self):
        if self._testMethodName.startswith("test_processor_from_and_save_pretrained"):
            # Saving puts `auto_map` on an object that comes with its own code, and loading takes it off again.
            to_dict = self.processor_class.to_dict
            plain = patch.object(
                self.processor_class,
                "to_dict",
                lambda processor: {name: value for name, value in to_dict(processor).items() if name != "auto_map"},
            )
            plain.start()
            self.addCleanup(plain.stop)

    def prepare_images_inputs(self, batch_size=None, nested=False):
        """Pictures that are cut into slices, unless an option forbids it."""
        picture = Image.fromarray(np.random.randint(255, size=(400, 600, 3), dtype=np.uint8))
        if batch_size is None:
            return picture
        return [[picture] if nested else picture for _ in range(batch_size)]

    def prepare_audio_inputs(self, batch_size=None):
        return None

    def _check_modality_outputs(self, inputs, modality):
        for index in range(len(inputs["pixel_values"])):
            if modality == "images":
                self.assertEqual(len(inputs["pixel_values"][index]), 1)
            else:
                self.assertEqual({len(unit) for unit in inputs["temporal_ids"][index]}, {2})

    def test_subprocessor_defaults_1_images(self):
        """As in the mixin, which also looks for `temporal_ids`; the processor leaves them out where all are stills."""
        picture = self.prepare_images_inputs()
        alone, inputs = self.get_component("image_processor")(picture), self.get_processor()(images=picture)
        for name in ("pixel_values", "tgt_sizes", "image_sizes"):
            torch.testing.assert_close(alone[name], inputs[name])

    def test_save_load_pretrained_additional_features(self):
        """As in the mixin, but by settings that these classes have; its `do_normalize` is none of them."""
        changes = {"cls_token": "(CLS)", "max_slice_nums": 2, "fps": 5}
        processor = self.processor_class.from_pretrained(self.tmpdirname, **changes)
        self.assertEqual(processor.tokenizer.cls_token, "(CLS)")
        self.assertEqual(processor.image_processor.max_slice_nums, 2)
        self.assertEqual((processor.video_processor.max_slice_nums, processor.video_processor.fps), (2, 5))
