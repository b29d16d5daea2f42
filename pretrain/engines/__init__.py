"""How parameters, gradients and optimizer state are spread. The file name is the name in the config."""
