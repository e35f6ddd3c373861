"""`python -m mmrlhf` is the command `mmrlhf`."""

from mmrlhf.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
