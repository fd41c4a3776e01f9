"""`kdexport verify`: check a bundle again, by running it or from its stored numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_answer
from kdexport.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from kdexport.bundle.signature import Signer
    from kdexport.verify.verdict import TargetRun, Verdict


def verify(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    rung: Annotated[
        str | None,
        typer.Option(help="Check only this rung: A, the algebra of each block; runs no exported file."),
    ] = None,
    rethreshold: Annotated[
        Path | None,
        typer.Option(metavar="POLICY", help="Decide the stored numbers under this policy; runs nothing."),
    ] = None,
    allow_looser: Annotated[
        bool, typer.Option("--allow-looser", help="Accept a policy with looser limits than those of the build.")
    ] = False,
    require: Annotated[
        str | None,
        typer.Option(
            "--require-executed",
            metavar="TARGETS",
            help="Exit with 3 unless these targets, separated by commas, run in this verification.",
        ),
    ] = None,
    signature: Annotated[
        Path | None,
        typer.Option(
            metavar="PEM",
            help="Public key or root certificate; check the signature before anything else.",
        ),
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a bundle again: its files, algebra, graphs, and logits on the golden images."""
    signer = None if signature is None else _require_signed(bundle, signature, as_json=as_json)
    signed_by = {} if signer is None else {"signed_by": signer.to_json()}
    if rethreshold is not None:
        if rung is not None:
            raise ConfigError("--rung and --rethreshold cannot be combined.", remedy="Omit one of them.")
        if require is not None:
            raise ConfigError(
                "--rethreshold and --require-executed cannot be combined: --rethreshold runs no target.",
                remedy="Omit one of them.",
            )
        _rethreshold(bundle, rethreshold, signed_by, allow_looser=allow_looser, as_json=as_json)
        return
    from kdexport.bundle.manifest import read_manifest
    from kdexport.core.progress import Reporter
    from kdexport.verify.policy import looser_than_default, stored_policy
    from kdexport.verify.verdict import replay, replay_algebra, require_executed, target_runs

    if rung is not None and require is not None:
        raise ConfigError(
            "--rung and --require-executed cannot be combined: --rung A runs no target.", remedy="Omit one of them."
        )
    if rung not in (None, "A", "a"):
        raise UnknownNameError(
            f"The rung {rung!r} cannot be checked alone; only A can.", remedy="Pass --rung A, or omit --rung."
        )
    manifest = read_manifest(bundle)
    looser = looser_than_default(stored_policy(manifest.data))
    with Reporter().stage("verify") as progress:
        verdict = (replay if rung is None else replay_algebra)(bundle, manifest, progress)
    runs = target_runs(manifest, verdict) if rung is None else None
    required = [name.strip() for name in require.split(",") if name.strip()] if require else []
    if as_json:
        if not verdict.failures:
            require_executed(runs or [], required)
        print_answer(
            {
                "checks": [check.to_json() for check in verdict.checks],
                "policy_looser": [{"key": c.key, "default": c.old, "bundle": c.new} for c in looser],
                **({} if runs is None else {"targets": {run.target: _run_json(run, verdict) for run in runs}}),
                **signed_by,
            },
            exit_code=_exit_code(verdict),
        )
        raise typer.Exit(_exit_code(verdict))
    from kdexport.commands.render import show_verdict

    show_verdict(bundle, manifest, verdict, runs, looser)
    verdict.require()
    require_executed(runs or [], required)
    verdict.require_decided()


def _exit_code(verdict: "Verdict") -> int:
    return 1 if verdict.failures else 3 if verdict.beyond else 0


def _run_json(run: "TargetRun", verdict: "Verdict") -> dict[str, Any]:
    execution = verdict.executed.get(run.target)
    return {"state": run.state, "executed": None if execution is None else execution.to_json()}


def _require_signed(bundle: Path, trusted: Path, *, as_json: bool) -> "Signer":
    from kdexport.bundle.signature import require_signed

    signer = require_signed(bundle, trusted)
    if not as_json:
        from kdexport.commands.render import show_signer

        show_signer(signer)
    return signer


def _rethreshold(bundle: Path, policy: Path, signed_by: dict[str, Any], *, allow_looser: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from kdexport.bundle.manifest import read_manifest
    from kdexport.verify.rethreshold import rethreshold

    manifest = read_manifest(bundle)
    result = rethreshold(bundle, manifest, policy, allow_looser=allow_looser)
    code = _exit_code(result.verdict)
    if as_json:
        changes = [asdict(change) for change in result.changes]
        checks = [check.to_json() for check in result.verdict.checks]
        print_answer({"changes": changes, "checks": checks, **signed_by}, exit_code=code)
        raise typer.Exit(code)
    from kdexport.commands.render import show_changes, show_verdict

    show_changes(result.changes)
    show_verdict(bundle, manifest, result.verdict)
    result.verdict.require(
        "The bundle exceeds the limits of this policy. Raise them in the policy file, or build the bundle again."
    )
    result.verdict.require_decided()
