"""The command line. Nothing heavy is imported before a command needs it."""

import sys
from typing import Annotated

import typer

from kdexport import __version__
from kdexport.commands.bench import bench
from kdexport.commands.build import build
from kdexport.commands.calibrate_runner import calibrate_runner
from kdexport.commands.doctor import doctor
from kdexport.commands.evaluate import evaluate
from kdexport.commands.explain import explain
from kdexport.commands.explain_failure import explain_failure
from kdexport.commands.fuse import fuse
from kdexport.commands.gate import gate
from kdexport.commands.inspect import inspect
from kdexport.commands.listing import list_
from kdexport.commands.predict import predict
from kdexport.commands.quickstart import quickstart
from kdexport.commands.replay import replay
from kdexport.commands.serve import serve
from kdexport.commands.sign import sign
from kdexport.commands.slim import slim
from kdexport.commands.training import PASSED_ON, evaluate_run, table, teacher, train
from kdexport.commands.triton import triton
from kdexport.commands.verify import verify

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
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""


app.command()(quickstart)
app.command()(build)
app.command()(verify)
app.command()(inspect)
app.command(name="list")(list_)
app.command()(doctor)
app.command()(explain)
app.command()(explain_failure)
app.command()(fuse)
app.command()(predict)
app.command()(evaluate)
app.command()(bench)
app.command()(gate)
app.command(name="calibrate-runner")(calibrate_runner)
app.command()(replay)
app.command()(sign)
app.command()(slim)
app.command()(serve)
app.command()(triton)
for command in (train, teacher, evaluate_run, table):
    app.command(context_settings=PASSED_ON, add_help_option=False)(command)
