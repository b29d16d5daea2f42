"""Pretraining of CLIP and SigLIP style dual encoders. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
