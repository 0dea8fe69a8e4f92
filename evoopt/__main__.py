"""`evoopt` and `python -m evoopt`."""

import sys


def main() -> None:
    """Run the command line. Neither the version nor help waits for JAX."""
    if sys.argv[1:] == ["--version"]:
        from evoopt import __version__

        print(f"evoopt {__version__}")
        return
    from evoopt.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
