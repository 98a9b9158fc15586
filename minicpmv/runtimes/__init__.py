"""What runs a model, or a part of it, in place of PyTorch: llama.cpp under GGUF files, ONNX Runtime and OpenVINO under graphs, ExecuTorch
and MLX."""
