"""`transformers serve` for a model that brings its own code, which by itself it refuses: it looks for the class in transformers.

python perf/transformers_serve.py nano --port 8001
"""

import sys
from pathlib import Path

from transformers.cli.serving import model_manager
from transformers.cli.transformers import main
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


if __name__ == "__main__":
    folder = str(Path(sys.argv[1]).resolve())
    model = get_class_from_dynamic_module("modeling_minicpmv.MiniCPMV", folder)
    model_manager.transformers.MiniCPMV = model  # its own view of the module: importing may have made another since
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["minicpmv"] = model.__name__
    sys.argv = ["transformers", "serve", folder, "--trust-remote-code", *sys.argv[2:]]
    main()
