"""How features cross ranks for the loss. The file name is the name in the config; a dotted name is imported as it stands."""
