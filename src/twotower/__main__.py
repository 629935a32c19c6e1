"""`python -m twotower` is the command `twotower`: what `torchrun -m twotower …` starts."""

from twotower.cli import main

if __name__ == "__main__":
    main()
