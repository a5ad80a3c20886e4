"""`python -m clipbench` is the `clipbench` command."""

from clipbench.cli import main

if __name__ == "__main__":
    main()
