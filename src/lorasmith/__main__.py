"""`python -m lorasmith`, and so `torchrun -m lorasmith`: the same as the console script."""

from lorasmith.cli import main

main()
