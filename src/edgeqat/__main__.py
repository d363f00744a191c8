"""`python -m edgeqat`, and so `torchrun -m edgeqat`."""

from edgeqat.cli import main

if __name__ == "__main__":  # importing every module, as tests and documentation tools do, runs no command
    main()
