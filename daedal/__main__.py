"""`python -m daedal` is the `daedal` command."""

from daedal.cli.app import main

if __name__ == "__main__":
    main()
