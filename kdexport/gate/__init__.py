"""The gate: paired latency sessions in fresh processes, a group-sequential test, exact accuracy bounds."""

from kdexport.core.callable_package import make_callable

make_callable(__name__)
