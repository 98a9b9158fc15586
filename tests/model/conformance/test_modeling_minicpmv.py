"""`ModelTesterMixin` and `ConfigTester` of transformers on `MiniCPMV`, `MiniCPMVConfig` and `MiniCPMVVisionConfig`."""

import tempfile
import unittest
from unittest.mock import patch

import torch
from transformers import Qwen3Model
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.testing_utils import torch_device

from .mixins import REPOSITORY, ConfigTester, ModelTesterMixin


MiniCPMV = get_class_from_dynamic_module("modeling_minicpmv.MiniCPMV", str(REPOSITORY))
MiniCPMVConfig = MiniCPMV.config_class
MiniCPMVVisionConfig = MiniCPMVConfig.sub_configs["vision_config"]

PATCH_SIZE = 14
QUERY_NUM = 4
IMAGE_TOKEN_ID = 5


class MiniCPMVModelTester:
    """A tiny model, and a batch with one picture of its own shape in each row."""

    is_training = True
    batch_size = 7  # the mixin fills smaller batches up with numbers that are no sizes of pictures
    seq_length = QUERY_NUM + 7
    # Read by the mixin.
    hidden_size = 128
    num_hidden_layers = 2
    num_attention_heads = 4
    encoder_seq_length = key_length = seq_length
    vision_config = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8 * PATCH_SIZE,
        "patch_size": PATCH_SIZE,
    }

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return MiniCPMVConfig(
            vision_config=dict(self.vision_config),
            query_num=QUERY_NUM,
            image_token_id=IMAGE_TOKEN_ID,
            vocab_size=300,
            hidden_size=self.hidden_size,
            intermediate_size=64,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            max_window_layers=self.num_hidden_layers,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        tgt_sizes = torch.tensor([[2, 3], [3, 2], [1, 4], [2, 2], [2, 2], [1, 1], [5, 1]], device=torch_device)
        longest = int(tgt_sizes.prod(-1).max())
        input_ids = torch.randint(IMAGE_TOKEN_ID + 1, 300, (self.batch_size, self.seq_length), device=torch_device)
        input_ids[:, 1 : 1 + QUERY_NUM] = IMAGE_TOKEN_ID
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size, 3, PATCH_SIZE, PATCH_SIZE * longest, device=torch_device),
            "tgt_sizes": tgt_sizes,
        }
        return self.get_config(), inputs


class MiniCPMVModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MiniCPMV,)
    all_generative_model_classes = ()  # the tests of `generate` are not in the source distribution of transformers
    additional_model_inputs = ["pixel_values", "tgt_sizes"]
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # the mixin reads the year in a copyright line; here is none
    skip_test_image_features_output_shape = True  # the states of the tower are packed, without a batch dimension

    def setUp(self):
        self.model_tester = MiniCPMVModelTester(self)
        # Parts of the mixin are for the classes listed here only.
        listed = patch.dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, {"minicpmv": "MiniCPMV"})
        listed.start()
        self.addCleanup(listed.stop)
        if self._testMethodName.startswith("test_model_rope"):
            self.all_model_classes = (Qwen3Model,)  # needs a model without a head; takes the same configuration

    def test_config(self):
        ConfigTester(self, config_class=MiniCPMVConfig).run_common_tests()

    def test_vision_config(self):
        fields = MiniCPMVModelTester.vision_config
        ConfigTester(self, config_class=MiniCPMVVisionConfig, has_text_modality=False, **fields).run_common_tests()

    def test_config_attn_implementation_setter(self):
        """As in the mixin, which asks every config in it; `slice_config` has no module, and so no attention."""
        config = MiniCPMVConfig(**self.model_tester.get_config().to_diff_dict(), attn_implementation="eager")
        for implementation in ("eager", "sdpa", "eager"):
            for part in (config, config.vision_config):
                self.assertEqual(part._attn_implementation, implementation)
            config._attn_implementation = "sdpa" if implementation == "eager" else "eager"

    def test_sdpa_can_dispatch_composite_models(self):
        """As in the mixin, which knows towers by other names."""
        with tempfile.TemporaryDirectory() as folder:
            MiniCPMV(self.model_tester.get_config()).save_pretrained(folder)
            for requested, expected in ((None, "sdpa"), ("eager", "eager")):
                model = MiniCPMV.from_pretrained(folder, attn_implementation=requested)
                for part in (model, model.llm, model.vpm):
                    self.assertEqual(part.config._attn_implementation, expected)

    def _image_features_prepare_config_and_inputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {name: inputs[name] for name in ("pixel_values", "tgt_sizes")}
