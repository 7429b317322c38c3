"""pi-dist: sequence-parallel π-attention for training Transformers on contexts too long for one GPU."""

__version__ = "0.1.0"
