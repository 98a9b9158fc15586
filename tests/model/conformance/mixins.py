"""`ConfigTester`, `ModelTesterMixin` and `ProcessorTesterMixin` of the installed transformers.

What is special:
- They come from its source distribution (`fetch_mixins`); nothing of them is kept in this repository.
- The source distribution lacks four modules that they import. The stand-ins below hold what is asked of those.
"""

import sys
from pathlib import Path
from types import ModuleType

from .fetch_mixins import PACKAGE, fetch


REPOSITORY = Path(__file__).parents[3]
PICTURE = REPOSITORY / "assets" / "coffee.jpg"
VIDEO = REPOSITORY / "assets" / "star.mp4"

# What every configuration takes (the vision tower's is tested with these).
COMMON_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


class ExportTesterMixin:
    """Stand-in without tests: those for exporters are not in the source distribution."""


class GenerationTesterMixin:
    """Stand-in without tests: those for `generate` are not in the source distribution."""


def local_path(url):
    """A file of this repository for one of the files on the Hub that the tests name."""
    return str({".mp4": VIDEO}.get(Path(url).suffix, PICTURE))


def _stand_in(name, **members):
    *packages, _ = name.split(".")
    for end in range(1, len(packages) + 1):
        package = sys.modules.setdefault(".".join(packages[:end]), ModuleType(".".join(packages[:end])))
        package.__path__ = getattr(package, "__path__", [])
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(members)


sys.path.append(str(fetch()))
__import__(PACKAGE)  # before the stand-ins, which would take its place
_stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
_stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
_stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=COMMON_FIELDS)
_stand_in("fetch_hub_objects_for_ci", url_to_local_path=local_path)

from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402
from transformers_tests.test_processing_common import MODALITY_TEST_SPECS, ProcessorTesterMixin  # noqa: E402


__all__ = ["MODALITY_TEST_SPECS", "REPOSITORY", "ConfigTester", "ModelTesterMixin", "ProcessorTesterMixin"]
