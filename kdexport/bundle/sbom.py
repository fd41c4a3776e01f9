"""The list of software that built a bundle: CycloneDX 1.6 in JSON, the same bytes for the same build.

It names what was installed, kdexport and Python. The serial number comes from the key of the build, and there is no
time in it.
"""

import json
import platform
import re
import uuid
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport import __version__

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

#: Of serial numbers, so that they differ from other UUIDs of the same key.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "kdexport.sbom")
_CLASSIFIER = "License :: "
#: Some packages give the text of their licence as its name.
_MAX_LICENCE = 80


def serial_number(build_key: str) -> uuid.UUID:
    """The serial number of the list that belongs to a build."""
    return uuid.uuid5(_NAMESPACE, build_key)


def write_sbom(path: Path, *, student: str, build_key: str) -> None:
    """Write the list of this process's environment as the software that built ``student``."""
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import LicenseExpression
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    version = platform.python_version()
    python = Component(
        type=ComponentType.PLATFORM,
        name="python",
        version=version,
        bom_ref=f"pkg:generic/python@{version}",
        purl=PackageURL("generic", None, "python", version),
        licenses=[LicenseExpression("PSF-2.0")],
    )
    bundle = Component(type=ComponentType.MACHINE_LEARNING_MODEL, name=student, version=build_key, bom_ref=build_key)
    bom = Bom(
        serial_number=serial_number(build_key),
        metadata=BomMetaData(component=bundle),
        components=[python, *(_component(*found) for found in _distributions())],
    )
    bom.register_dependency(bundle, bom.components)
    written = json.loads(JsonV1Dot6(bom).output_as_string())
    # The library writes the time at which it ran.
    del written["metadata"]["timestamp"]
    path.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_versions(path: Path) -> tuple[str, dict[str, str]]:
    """The serial number of a list, and versions by normalised name.

    Raises ``ValueError``, ``KeyError``, ``TypeError`` or ``AttributeError`` for a file of another form.
    """
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if data["bomFormat"] != "CycloneDX":
        raise ValueError(f"bomFormat is {data['bomFormat']!r}, expected 'CycloneDX'")
    found = {normalised(str(item["name"])): str(item["version"]) for item in data["components"]}
    return str(data["serialNumber"]), found


def normalised(name: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions() -> Iterator[tuple[str, str, Message | None]]:
    """Name, version and metadata of every installed distribution, and of kdexport, which need not be installed."""
    found: dict[str, tuple[str, str, Message | None]] = {}
    for distribution in metadata.distributions():
        # Without the description after the headers, which takes half of the time.
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        described = message_from_string(text.partition("\n\n")[0])
        name, version = str(described["Name"] or ""), str(described["Version"] or "")
        # A folder that a failed installation left behind has neither. Of two, Python imports the first.
        if name and version:
            found.setdefault(normalised(name), (name, version, described))
    found["kdexport"] = ("kdexport", __version__, found.get("kdexport", ("", "", None))[2])
    yield from (found[name] for name in sorted(found))


def _component(name: str, version: str, described: Message | None) -> "Component":
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl = PackageURL("pypi", None, normalised(name), version)
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=str(purl),
        purl=purl,
        licenses=[] if described is None else _licences(described),
    )


def _licences(described: Message) -> "list[License]":
    """The licence expression, else the classifiers, else a short name; none if the package says nothing."""
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression

    expression = described.get("License-Expression")
    if expression:
        return [LicenseExpression(str(expression))]
    classifiers = [str(entry) for entry in described.get_all("Classifier") or [] if entry.startswith(_CLASSIFIER)]
    names = {entry.rpartition(" :: ")[2] for entry in classifiers} - {"OSI Approved"}
    text = str(described.get("License") or "").strip()
    if not names and 0 < len(text) <= _MAX_LICENCE and "\n" not in text:
        names = {text}
    return [DisjunctiveLicense(name=name) for name in sorted(names)]
