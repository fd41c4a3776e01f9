"""What a server says about itself when it is ready."""

from dataclasses import asdict, dataclass
from typing import Any

from kdexport.serving.limits import MemoryBound
from kdexport.serving.plain_jpeg import decoder_name
from kdexport.serving.service import Service


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model, who signed it (in words, and as JSON), and how near its golden images came to the reference."""

    name: str
    version: int
    target: str
    provider: str
    signer: str | None
    signed_by: dict[str, Any] | None
    images: int
    error: float
    allowed: float

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        data = {"name": self.name, "version": str(self.version), "target": self.target, "provider": self.provider}
        return data if self.signed_by is None else {**data, "signed_by": self.signed_by}


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """The models, how often each runs at the same time in how many processes, and the memory that the limits allow."""

    models: tuple[ServedModel, ...]
    instances: int
    processes: int
    decoder: str
    memory: str
    memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Announcement":
        """What ``to_json`` wrote."""
        return cls(**{**data, "models": tuple(ServedModel(**model) for model in data["models"])})


def announcement(service: Service, bound: MemoryBound) -> Announcement:
    """The announcement of a service that has loaded its models."""
    models = tuple(
        ServedModel(
            name=model.name,
            version=model.version,
            target=model.target,
            provider=model.provider,
            signer=None if model.signer is None else str(model.signer),
            signed_by=None if model.signer is None else model.signer.to_json(),
            images=model.golden.images,
            error=model.golden.error,
            allowed=model.golden.allowed,
        )
        for model in service.repository.models.values()
    )
    return Announcement(
        models=models,
        instances=service.total,
        processes=service.settings.processes,
        decoder=decoder_name(),
        memory=bound.describe(),
        memory_bytes=bound.total,
    )
