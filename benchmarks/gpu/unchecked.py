"""``python -m training`` and ``python -m kdexport`` without the checks of numbers, for a device that runs no kernel.

    build/null-device/run python benchmarks/gpu/unchecked.py train --recipe NAME --data DIR --out DIR
    build/null-device/run python benchmarks/gpu/unchecked.py -m kdexport gate BUNDLE --clock gpu

There a loss, a weight, a logit or a class is whatever the memory held. What is left out are the comparisons of
losses, weights, predictions and golden images; the processes that these commands start leave them out too.
"""

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def unchecked() -> Iterator[None]:
    """Within the block no loss, weight or prediction ends a run; predictions are right."""
    from training import teaching
    from training.evaluation import predict
    from training.runs import captured, loop, watch

    def nothing(*_: object) -> None:
        return

    def reported(self: watch.LossWatch, window: Any) -> None:
        self._report(dict.fromkeys(self._sums.names, 1.0), window.end)

    def predicted(network: torch.nn.Module, batches: Any) -> Any:
        found = predict(network, batches)
        sure = np.full(len(found.labels), 0.5, dtype=np.float32)
        return type(found)(labels=found.labels, predicted=found.labels, confidence=sure, in_top5=found.in_top5)

    with ExitStack() as changed:
        for place, name, replacement in (
            (loop, "_check_finite", nothing),
            (captured, "_require_same", nothing),
            (watch.LossWatch, "_check", reported),
            (loop, "predict", predicted),
            (teaching, "predict", predicted),
        ):
            changed.enter_context(patch.object(place, name, replacement))
        yield


@contextmanager
def unchecked_bundles() -> Iterator[None]:
    """Within the block no logit of a golden image ends a measurement or a server, in children neither."""
    from kdexport.backends.ort import execution_of
    from kdexport.core import child
    from kdexport.errors import VerificationError
    from kdexport.gate import accuracy, compare
    from kdexport.serving import self_check
    from kdexport.verify.golden_limits import compare_own

    command = child._command

    def golden(*given: Any, **settings: Any) -> None:
        with suppress(VerificationError):
            accuracy.require_golden_logits(*given, **settings)

    def near(*_: Any) -> float:
        return 0.0

    def own(_folder: Any, own: Any, found: Any, model: Any, *, single: bool) -> Any:
        return compare_own(own, found, execution_of(model, ""), single=single)

    def here(module: str, arguments: Sequence[str]) -> list[str]:
        python, _, _, *rest = command(module, arguments)
        return [python, __file__, "--child", *rest]

    with ExitStack() as changed:
        for place, name, replacement in (
            (child, "_command", here),
            (compare, "require_golden_logits", golden),
            (self_check, "_require_near", near),
            (self_check, "_require_own", own),
            (torch, "isfinite", lambda values: torch.ones(values.shape, dtype=torch.bool)),
        ):
            changed.enter_context(patch.object(place, name, replacement))
        yield


def main() -> None:
    """Run the command line of ``training``, or with ``-m`` or ``--child`` a module of kdexport."""
    if sys.argv[1:2] == ["--child"]:
        from kdexport.core import child

        sys.argv = [child.__file__, *sys.argv[2:]]
        with unchecked_bundles():
            child._main()
    elif sys.argv[1:2] == ["-m"]:
        module = sys.argv[2]
        sys.argv = [module, *sys.argv[3:]]
        with unchecked_bundles():
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        from training.__main__ import app

        with unchecked():
            app()


if __name__ == "__main__":
    main()
