"""The application of ``kdexport serve`` under Ray Serve: ``PYTHONPATH=deploy/ray serve run deploy/ray/serve.yaml``.

Ray's proxy and replicas cost several times the CPU of ``kdexport serve``, so use it for many machines, not for one.
"""

from ray import serve

from kdexport.serving.app import create_app
from kdexport.serving.service import Settings


def build(arguments: dict[str, str]) -> serve.Application:
    """The application for ``arguments["bundle"]``: ``FOLDER`` or ``NAME=FOLDER``, readable on every node.

    A replica has one instance, because Ray scales by replicas of ``num_cpus`` each, not by threads.
    """
    bundle = arguments["bundle"]

    @serve.deployment(name="Student")
    @serve.ingress(lambda: create_app([bundle], Settings(instances=1)))
    class Student:
        """Empty: the application checks and loads the bundle when the replica starts."""

    return Student.bind()
