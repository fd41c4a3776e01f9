"""The command line. Nothing heavy is imported before a command needs it."""

import sys
from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

import typer

from kdexport import __version__
from kdexport.commands.bench import bench
from kdexport.commands.build import build
from kdexport.commands.calibrate_runner import calibrate_runner
from kdexport.commands.diff import diff
from kdexport.commands.doctor import doctor
from kdexport.commands.evaluate import evaluate
from kdexport.commands.explain import explain
from kdexport.commands.explain_failure import explain_failure
from kdexport.commands.fuse import fuse
from kdexport.commands.gate import gate
from kdexport.commands.history import history
from kdexport.commands.inspect import inspect
from kdexport.commands.listing import list_
from kdexport.commands.predict import predict
from kdexport.commands.pull import pull
from kdexport.commands.push import push
from kdexport.commands.quickstart import quickstart
from kdexport.commands.replay import replay
from kdexport.commands.serve import serve
from kdexport.commands.sign import sign
from kdexport.commands.slim import slim
from kdexport.commands.training import PASSED_ON, evaluate_run, table, teacher, train
from kdexport.commands.triton import triton
from kdexport.commands.verify import verify
from kdexport.core.console import name_command

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil compact image classifiers, fold their branches away exactly, export them, and prove what runs.",
    epilog="Exit codes: 0 pass, 1 a check failed, 2 bad configuration or input, 3 inconclusive, 4 environment, "
    "130 Ctrl-C, 143 SIGTERM.",
)


def _print_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"kdexport {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001, its callback prints it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""
    name_command(context.invoked_subcommand)


def _add(command: Callable[..., None], name: str | None = None, **settings: Any) -> None:
    # A short help of its own is shown whole; one made from the help is cut to one line.
    first, _, _ = cleandoc(command.__doc__ or "").partition("\n\n")
    app.command(name=name, short_help=" ".join(first.split()), **settings)(command)


_add(quickstart)
_add(build)
_add(verify)
_add(inspect)
_add(list_, "list")
_add(doctor)
_add(explain)
_add(explain_failure)
_add(fuse)
_add(predict)
_add(evaluate)
_add(diff)
_add(bench)
_add(history)
_add(gate)
_add(calibrate_runner)
_add(replay)
_add(sign)
_add(slim)
_add(push)
_add(pull)
_add(serve)
_add(triton)
for command in (train, teacher, evaluate_run, table):
    _add(command, context_settings=PASSED_ON, add_help_option=False)
