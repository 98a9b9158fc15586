"""What people do with MiniCPM-V 4.5: data, training, evaluation, serving and apps around the model."""

__version__ = "0.1.0"
