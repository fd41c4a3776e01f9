"""``kdexport`` and ``python -m kdexport``."""

from kdexport.core.console import guarded


def main() -> None:
    """Run the command line; errors become sentences and exit codes."""
    from kdexport.cli import app
    from kdexport.commands.command_line import run

    guarded(lambda: run(app))


if __name__ == "__main__":
    main()
