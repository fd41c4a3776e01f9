"""The stages of a build, from a trained student to a packaged, verified bundle."""

from kdexport.core.callable_package import make_callable

make_callable(__name__)
