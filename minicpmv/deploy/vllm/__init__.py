"""A plugin for vLLM: videos are packed there as they are here. vLLM finds it by the entry point `vllm.general_plugins`."""


def register() -> None:
    """Put the packed model and the video loader in vLLM's registries; vLLM calls this in each of its processes.

    Of the architecture MiniCPMV only checkpoints of version 4.5 with this repository's code are packed; others stay with
    vLLM's own classes.
    """
    from vllm import ModelRegistry

    from minicpmv.deploy.vllm import loader  # noqa: F401  # registers itself

    ModelRegistry.register_model("MiniCPMV", "minicpmv.deploy.vllm.model:PackedMiniCPMV")
