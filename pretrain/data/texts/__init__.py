"""Captions of a sample -> token ids of a row."""
