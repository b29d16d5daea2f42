"""Bytes of an image file -> pixels of a row."""
