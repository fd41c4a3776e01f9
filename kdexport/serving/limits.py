"""The limits of the server, the memory that they allow, and the processors and memory of its control group."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from kdexport.core.processors import usable_cpus
from kdexport.data.uploads import ImageLimits

MIB = 2**20

#: The most memory that decoding takes per pixel, the upload included. Measured as growth of the resident size at 6
#: megapixels, each image turned by its EXIF orientation: PNG with a transparent colour 15.9, with alpha 12.5, CMYK JPEG
#: 11.8, PNG with a palette 11.6, progressive JPEG 8.2, JPEG 7.4; WebP, whose pixels count twice, 18.9 lossy with alpha
#: and 23.3 lossless.
_DECODE_BYTES_PER_PIXEL = 16
#: The largest Python object that one JSON token can become (an empty dictionary and its entry in a list).
_JSON_BYTES_PER_TOKEN = 80
#: The most memory of a connection: the event loop's read buffer, the unread part of the body, and the write buffer.
_BYTES_PER_CONNECTION = 384 * 1024
#: Activations of a running model, in multiples of its input.
_ACTIVATIONS_PER_INPUT = 32
#: Memory limits of control groups version 1 above this mean "unlimited": the kernel writes a number near 2^63.
_UNLIMITED_BYTES = 2**60

_IMAGES = ImageLimits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds, images in pixels."""

    body: int = 16 * MIB
    bodies: int = 128 * MIB
    header: int = 64 * 1024
    chunks: int = 65_536
    json_depth: int = 100
    json_slack: int = 10_000
    dims: int = 8
    tensors: int = 8
    connections: int = 512
    queue: int = 32
    header_seconds: float = 5.0
    body_seconds: float = 10.0
    write_seconds: float = 10.0
    #: Longer than the 60 s after which common load balancers close an idle connection: the side that sends requests
    #: must close first, or it sends one into a connection that is being closed.
    keep_alive_seconds: float = 75.0
    queue_seconds: float = 2.0
    total_seconds: float = 10.0
    pixels: int = _IMAGES.pixels
    min_side: int = _IMAGES.min_side
    aspect: int = _IMAGES.aspect
    parts: int = 8
    retry_after_seconds: int = 1
    drain_seconds: float = 5.0
    grace_seconds: float = 20.0

    @property
    def images(self) -> ImageLimits:
        """The limits of an uploaded image."""
        return ImageLimits(pixels=self.pixels, min_side=self.min_side, aspect=self.aspect)

    def images_per_body(self, image_bytes: int) -> int:
        """The most images of ``image_bytes`` each that fit into the largest body, with the overhead of its header."""
        return max(1, int((self.body - self.header) / (1.2 * image_bytes)))

    def share(self, processes: int) -> "Limits":
        """What each of ``processes`` may use, so that all of them together keep to these limits.

        The pixels of images are not divided, because each process must be able to decode the largest image.
        """
        return replace(
            self,
            bodies=max(self.body, self.bodies // processes),
            connections=math.ceil(self.connections / processes),
            queue=math.ceil(self.queue / processes),
        )

    def places(self, instances: int, together: int = 1) -> int:
        """The most requests in progress: two batches of up to ``together`` per instance, and those that wait."""
        return 2 * instances * together + self.queue


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBound:
    """The most memory of the server under its limits, in bytes; ``base`` is measured, the rest is computed.

    The parts are those of one process, ``total`` is that of all ``processes``.
    """

    base: int
    bodies: int
    decoding: int
    json: int
    tensors: int
    connections: int
    processes: int = 1

    @property
    def total(self) -> int:
        """The sum of all parts, over all processes."""
        return self.processes * sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """The size of every part, by its name."""
        return {
            "loaded": self.base, "bodies": self.bodies, "image decoding": self.decoding, "JSON": self.json,
            "tensors": self.tensors, "connections": self.connections,
        }  # fmt: skip

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(self.parts, key=lambda name: self.parts[name])

    def describe(self) -> str:
        """One line with every part in MiB."""
        listed = ", ".join(f"{name} {size / MIB:.0f}" for name, size in self.parts.items())
        each = "" if self.processes == 1 else f"in each of {self.processes} processes: "
        return f"at most {self.total / MIB:.0f} MiB ({each}{listed})"


def memory_bound(
    limits: Limits,
    *,
    base: int,
    instances: int,
    decoders: int,
    image_bytes: int,
    max_elements: int,
    together: int = 1,
    processes: int = 1,
) -> MemoryBound:
    """The bound for ``instances`` runs of up to ``together`` images and ``decoders`` decoding threads.

    They and ``limits`` are those of each of ``processes``, ``base`` is what each of them takes after loading.
    ``image_bytes`` is the size of one image's float32 tensor, ``max_elements`` the most numbers in one request.
    """
    places = limits.places(instances, together)
    return MemoryBound(
        base=base,
        bodies=limits.bodies,
        # All decoding threads share one budget of pixels.
        decoding=limits.pixels * _DECODE_BYTES_PER_PIXEL,
        json=decoders * (2 * max_elements + limits.json_slack) * _JSON_BYTES_PER_TOKEN,
        # An aligned or decoded copy of each waiting tensor, and the activations of those that run.
        tensors=places * image_bytes + limits.bodies + instances * together * _ACTIVATIONS_PER_INPUT * image_bytes,
        connections=limits.connections * _BYTES_PER_CONNECTION,
        processes=processes,
    )


def usable_processors(root: Path = Path("/")) -> int:
    """The number of usable processors: the affinity mask, limited by the control group's quota; at least 1."""
    usable = len(usable_cpus())
    quotas = [quota for folder in _folders(root, "cpu") if (quota := _quota(folder)) is not None]
    return max(1, min([usable, *(math.ceil(quota) for quota in quotas)]))


def memory_limit(root: Path = Path("/")) -> int | None:
    """The control group's memory limit in bytes, None if it has none."""
    limits = []
    for folder in _folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0].isdigit() and int(words[0]) < _UNLIMITED_BYTES:
                limits.append(int(words[0]))
    return min(limits) if limits else None


def _folders(root: Path, controller: str) -> list[Path]:
    """The folders of the control group and its parents, versions 2 and 1: each of them may set a limit."""
    found: list[Path] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if names else "")
        # Inside a container the path is often the host's; then only the root of the mount exists.
        candidates = [base / path.strip("/"), *(base / path.strip("/")).parents]
        found += [folder for folder in candidates if folder.is_relative_to(base)]
    return found


def _quota(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
