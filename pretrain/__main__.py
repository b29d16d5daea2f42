"""`python -m pretrain` and `torchrun -m pretrain` are the same program as the `pretrain` command."""

from pretrain.cli import main

if __name__ == "__main__":
    main()
