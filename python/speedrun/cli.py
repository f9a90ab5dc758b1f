"""`speedrun VERB …`: finds the verb's file in commands/ and hands over, no more."""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
import sys
from pathlib import Path

from speedrun import __version__, _stdout, commands


def verbs() -> dict[str, str]:
    """Each verb with the first line of its file's docstring, without importing it."""
    found = {}
    for module in pkgutil.iter_modules(commands.__path__):
        source = Path(commands.__path__[0], f"{module.name}.py").read_text(encoding="utf-8")
        found[module.name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main(argv: list[str] | None = None) -> int:
    """The exit code. Quietly EXIT_NO_READER where nobody reads the output any more."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:  # argparse leaves after its help, too
            sys.stdout.flush()
    except BrokenPipeError:
        _stdout.discard()
        return _stdout.EXIT_NO_READER


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="speedrun",
        description="The NanoGPT speedrun as a package.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n" + "\n".join(f"  {verb:10} {doc}" for verb, doc in verbs().items()),
    )
    parser.add_argument("--version", action="version", version=f"speedrun {__version__}")
    parser.add_argument("verb", choices=list(verbs()), metavar="VERB", help="see below")
    args = parser.parse_args(argv[:1] or ["--help"])
    command = importlib.import_module(f"speedrun.commands.{args.verb}")
    verb_parser = argparse.ArgumentParser(
        prog=f"speedrun {args.verb}", description=verbs()[args.verb]
    )
    command.add_arguments(verb_parser)
    return command.run(verb_parser.parse_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
