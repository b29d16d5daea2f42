"""How checkpoints are staged, written by all ranks in the background, entered, found and read; see checkpoint.py."""
