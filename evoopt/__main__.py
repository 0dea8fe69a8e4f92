"""`evoopt` and `python -m evoopt`: what can be said at once is said before JAX is imported."""

import sys

LOUD = ("evolve", "finetune", "resume", "replay", "replay-trajectory")  # commands that load for a while


def main() -> None:
    """Run the command line."""
    given = sys.argv[1:]
    if given == ["--version"]:
        from evoopt import __version__

        print(f"evoopt {__version__}")
        return
    if given and given[0] in LOUD and not {"-h", "--help"} & set(given):
        what = [word for word in given[:2] if not word.startswith("-")]
        print(f"evoopt {' '.join(what)}: loading", file=sys.stderr, flush=True)
    try:
        from evoopt.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
