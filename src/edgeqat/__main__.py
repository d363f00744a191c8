"""`python -m edgeqat`, and so `torchrun -m edgeqat`."""

from edgeqat.cli import main

main()
