"""`python -m dlkern` is `dlkern`."""

from dlkern.cli import main

if __name__ == "__main__":
    main(prog_name="dlkern")
