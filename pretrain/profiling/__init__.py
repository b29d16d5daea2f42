"""Where the time and the memory of a step go: seconds a phase in every record, `--profile` for some steps in full."""
