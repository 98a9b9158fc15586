"""This model under the harnesses of others: lmms-eval and VLMEvalKit, each in an environment of its own (`make runners`)."""

from typing import Any


def lmms_eval_models() -> Any:
    """What lmms-eval finds under the entry points `lmms_eval.models`; the class itself is imported when it is named."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("minicpmv", chat_class_path="minicpmv.evaluate.adapters.lmms_eval.MiniCPMV45")
