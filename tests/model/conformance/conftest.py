"""What of transformers' tests does not run here, and why. A skip that is not listed below counts as a failure."""

import re

import pytest


# Tests that ask for something else than this model does.
NOT_APPLICABLE = {
    "test_apply_chat_template_video_frame_sampling": (
        "expects an error when frames given as a list are to be sampled; this processor samples them"
    ),
    "test_subprocessor_defaults_preserved_by_kwargs_[01]": (
        "expects padding and max_length from the tokenizer's file; a prompt that is too long is an error here, so a "
        "max_length that training left in that file must not count"
    ),
    "test_replacement_offsets": "for processors built on `replace_image_token`; this one replaces places on its own",
    "test_sdpa_can_dispatch_non_composite_models": "the model is composite, and the test for composite models runs",
    "test_torch_save_load": "compares a model with its base class; this class has none",
    "test_vision_axial_rope": "the positions of the tower are learned",
}

# Reasons for which the tests skip themselves.
ABSENT = [
    # on the machine
    "test requires (accelerator|multiple accelerators|MPS|Flash Attention.*|deepspeed|the kernels library)",
    "test requires (Torchcodec|librosa)",
    "test is slow",
    # in the model: experts, partial rope, position embeddings to resize, float32 or renamed weights, a second decoder
    "MiniCPMV does not support grouped_mm",
    "This model has no (sparse experts|`output_router_logits` in its config)\\.",
    "This model does not have partial rope supported",
    "Model does not have position embeddings",
    "No `_keep_in_fp32_modules_strict` defined",
    "MiniCPMV (class )?has no _keep_in_fp32_modules .*",
    "No conversion found for .*MiniCPMV.*",
    "Model is not an encoder-decoder",
    # in the processor: audio, and counting the tokens of videos ahead
    "(feature_extractor|audio_processor) attribute not present in .*MiniCPMVProcessor.*",
    "Processor has no audio processor",
    "Processor doesn't count video tokens yet",
]

MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "order",
    "torch_compile_test",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by the test classes of transformers")


def pytest_collection_modifyitems(items):
    for item in items:
        for name, reason in NOT_APPLICABLE.items():
            if item.path.parent.name == "conformance" and re.match(name, item.name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if reason not in NOT_APPLICABLE.values() and not any(re.fullmatch(known, reason) for known in ABSENT):
        report.outcome = "failed"
        report.longrepr = f"{item.name} was skipped for a reason that conftest.py does not list: {reason}"
