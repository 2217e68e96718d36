"""`python -m signstep`: the same as the command `signstep`."""

from signstep.lab.cli import main

if __name__ == "__main__":
    main()
