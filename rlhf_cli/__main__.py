"""`python -m rlhf_cli` is the same program as `rlhf`, so that `torchrun -m rlhf_cli` works."""

from rlhf_cli.cli.app import main

if __name__ == "__main__":
    main()
