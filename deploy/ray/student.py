"""The app of ``kdexport serve`` as a Ray Serve application: ``serve run deploy/ray/serve.yaml`` in this folder's place.

Ray's proxy and replicas cost several times the CPU of one ``kdexport serve``: worth it for many machines, not for one.
"""

from ray import serve

from kdexport.serving.app import create_app
from kdexport.serving.service import Settings


def build(arguments: dict[str, str]) -> serve.Application:
    """One application for ``arguments["bundle"]``, a bundle folder or ``NAME=FOLDER`` that every node can read.

    A replica has one instance: Ray gives it ``num_cpus`` and starts more replicas, not more threads.
    """
    bundle = arguments["bundle"]

    @serve.deployment(name="Student")
    @serve.ingress(lambda: create_app([bundle], Settings(instances=1)))
    class Student:
        """Holds nothing: the app loads the bundle when the replica starts, and verifies it first."""

    return Student.bind()
