"""Where bundles are shared: ``hf://owner/name`` and ``oci://host/name:tag``, checked before anything is sent."""

import re
from dataclasses import dataclass
from typing import Literal

from kdexport.errors import ConfigError

#: A part of a name on the Hugging Face Hub.
_HUB_PART = r"[A-Za-z0-9](?:[A-Za-z0-9]|[._-](?=[A-Za-z0-9_]))*"
_HUB = re.compile(rf"hf://(?P<name>{_HUB_PART}/{_HUB_PART})(?:@(?P<version>[A-Za-z0-9][\w./-]*))?")
_HUB_LENGTH = 96
#: Names and tags of the OCI distribution specification.
_OCI_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_OCI = re.compile(
    rf"oci://(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{{1,5}})?)/(?P<name>{_OCI_PART}(?:/{_OCI_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_FORMS = "hf://OWNER/NAME or oci://HOST/NAME:TAG"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A repository on the Hub (``name``), or in a registry (``host``); ``version`` is a revision, a tag or a digest."""

    kind: Literal["hf", "oci"]
    name: str
    host: str = ""
    version: str = ""

    def __str__(self) -> str:
        if self.kind == "hf":
            return f"hf://{self.name}{f'@{self.version}' if self.version else ''}"
        return f"oci://{self.host}/{self.name}{'@' if ':' in self.version else ':'}{self.version}"


def parse_place(text: str, *, pushes: bool) -> Place:
    """Read a place; raises ``ConfigError`` for one that does not exist in this form, or cannot be pushed to."""
    # A name, a password or a token before @ must not appear in a message.
    shown = without_secrets(text)
    if match := _HUB.fullmatch(text):
        name, version = match["name"], match["version"] or ""
        if len(name) > _HUB_LENGTH or name.endswith((".git", ".ipynb")):
            raise ConfigError(
                f"{name!r} is not a name of the Hugging Face Hub: at most {_HUB_LENGTH} letters, digits, - _ . with a "
                "letter or digit at both ends of each part, and not .git or .ipynb at the end.",
                remedy="For example: hf://owner/my-classifier",
            )
        if pushes and version:
            raise ConfigError(
                f"{shown} names a revision; the Hub gives each push a revision of its own.",
                remedy=f"Push to hf://{name}.",
            )
        return Place(kind="hf", name=name, version=version)
    if (match := _OCI.fullmatch(text)) and _is_host(match["host"]):
        tag, digest = match["tag"], match["digest"]
        if pushes and (digest or not tag):
            raise ConfigError(
                f"{shown} has no tag to push to." if not digest else f"{shown} names a digest, which is of a content.",
                remedy=f"For example: oci://{match['host']}/{match['name']}:1.0",
            )
        if not tag and not digest:
            raise ConfigError(
                f"{shown} has neither a tag nor a digest.", remedy=f"For example: {shown}:1.0, or {shown}@sha256:..."
            )
        return Place(kind="oci", name=match["name"], host=match["host"], version=digest or tag)
    raise ConfigError(f"{shown!r} is not a place for bundles: {_FORMS}.", remedy=f"Pass {_FORMS}.")


def _is_host(text: str) -> bool:
    """As in Docker: without a dot or a port the first part would be a name on a default registry."""
    return "." in text or ":" in text or text == "localhost"


def without_secrets(text: str) -> str:
    """``text`` without what may be a token, a password or a header with either."""
    text = re.sub(r"(?<=://)[^/\s@]*@", "***@", text)
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "***", text)
    text = re.sub(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]+", r"\1 ***", text)
    return re.sub(r"(?i)([?&](?:token|access_token|signature|sig|x-amz-[a-z-]+)=)[^&\s]+", r"\1***", text)
