"""Networks of torchvision and timm by name, with the weights and the preprocessing that the library states."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdexport.core.console import quiet
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import BackendUnavailableError, CheckpointError, ConfigError, UnknownNameError, first_line
from kdexport.origins.library_preprocessing import from_timm, from_torchvision
from kdexport.origins.references import Reference
from kdexport.origins.weights import Head
from kdexport.registry import nearest


@dataclass(frozen=True, slots=True, eq=False)
class MadeNetwork:
    """A network of a library, the preprocessing that the library states, and what was done besides."""

    module: nn.Module
    preprocessing: Preprocessing | None
    notes: tuple[str, ...]


def from_torchvision_name(
    name: str, num_classes: int | None, image_size: int | None, weights: str | None, head: Head
) -> MadeNetwork:
    """torchvision's classifier ``name``; ``weights`` is a name of its weights, or DEFAULT. See ``import_network``."""
    from torchvision import models

    stated = _torchvision_weights(name, weights)
    size = {} if image_size is None or not name.startswith("vit_") else {"image_size": image_size}
    classes = {} if num_classes is None else {"num_classes": num_classes}

    def make() -> Any:
        if weights is None:
            return models.get_model(name, weights=None, **classes, **size)
        return models.get_model(name, weights=stated, **size)

    module = _made(f"torchvision:{name}", make, weights)
    notes: tuple[str, ...] = () if weights is None else (f"weights {stated.name} of torchvision",)
    if weights is not None and head == "fresh" and num_classes is not None:
        notes += _fresh_head(module, num_classes)
    return MadeNetwork(module, _sized(from_torchvision(stated.transforms()), image_size), notes)


def from_timm_name(
    name: str, num_classes: int | None, image_size: int | None, weights: str | None, head: Head
) -> MadeNetwork:
    """timm's classifier ``name``; ``weights`` is a tag of its weights, or DEFAULT. See ``import_network``."""
    full = _timm_weights(name, weights)
    import timm
    import timm.data

    own_head = weights is not None and head == "strict"
    classes = {} if num_classes is None or own_head else {"num_classes": num_classes}

    def make(**size: int) -> Any:
        return timm.create_model(full, pretrained=weights is not None, **classes, **size)

    def sized() -> Any:
        if weights is not None:
            _try_hub(timm.get_pretrained_cfg(full))
        fixed = bool(timm.get_pretrained_cfg_value(full, "fixed_input_size"))
        return make(img_size=image_size) if fixed and image_size is not None else make()

    module = _made(f"timm:{name}", sized, weights)
    notes: tuple[str, ...] = () if weights is None else (f"weights {full} of timm",)
    config = timm.data.resolve_data_config(model=module, verbose=False)
    return MadeNetwork(module, _sized(from_timm(config), image_size), notes)


def require_weights(reference: Reference, weights: str) -> None:
    """Raise ``UnknownNameError`` unless the library has the network of ``reference`` and weights of this name.

    Nothing is downloaded. References to anything but a library are not checked.
    """
    if reference.kind == "torchvision":
        _torchvision_weights(reference.name, weights)
    elif reference.kind == "timm":
        _timm_weights(reference.name, weights)


def _torchvision_weights(name: str, weights: str | None) -> Any:
    """torchvision's entry of ``weights``, or of the default ones for None; raises ``UnknownNameError``."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UnknownNameError(f"torchvision has no classifier named {name!r}.", remedy=_nearest(name, known))
    entries = models.get_model_weights(name)
    names = {entry.name: entry for entry in entries} | {"DEFAULT": entries.DEFAULT}
    if weights is not None and weights not in names:
        raise UnknownNameError(
            f"{name} has no weights named {weights!r} in torchvision.", remedy=nearest(weights, names)
        )
    return names[weights or "DEFAULT"]


def _timm_weights(name: str, weights: str | None) -> str:
    """The name of the network of timm with the tag of ``weights``; raises ``UnknownNameError``."""
    try:
        with quiet():
            import timm
            import timm.data
    except ImportError as error:
        raise BackendUnavailableError(
            f"timm:{name} needs the package timm, which is not installed.", remedy="Run pip install 'kdexport[timm]'."
        ) from error
    full = name if weights in (None, "DEFAULT") else f"{name.partition('.')[0]}.{weights}"
    if not timm.is_model(name):
        raise UnknownNameError(f"timm has no network named {name!r}.", remedy=_nearest(name, timm.list_models()))
    tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    if full != name and full not in tagged:
        tags = [item.partition(".")[2] for item in tagged]
        raise UnknownNameError(f"{name} has no weights named {weights!r} in timm.", remedy=nearest(str(weights), tags))
    return full


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else "Check the name in the documentation of the library."


def _try_hub(config: Any) -> None:
    """Raise the error of the connection if weights are neither stored here nor to be had.

    The client itself would try to connect for most of a minute.
    """
    if config is None or not config.hf_hub_id or config.file:
        return
    import huggingface_hub

    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    repository, _, revision = config.hf_hub_id.partition("@")
    at = {"revision": revision or None}
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, file, **at), str) for file in files):
        return
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, files[0], **at), timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        # The server answered; the library then tries the other names of the file.
        return


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Let ``torch.load`` read tensors only, also where a library asks for whole pickles, which can run code."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _made(reference: str, make: Callable[[], Any], weights: str | None) -> nn.Module:
    try:
        with quiet(), _tensors_only():
            module = make()
    # The library builds the network, and reads or downloads weights; its errors are of any type.
    except Exception as error:
        if _is_of_network(error):
            raise CheckpointError(
                f"The weights of {reference} cannot be downloaded: {type(error).__name__}: {first_line(error)}",
                remedy="Connect this machine, or copy the file of weights to it and pass that: --weights FILE, or "
                "student.weights or teacher.checkpoint of a recipe.",
            ) from error
        if weights is not None:
            raise CheckpointError(
                f"{reference} cannot be made with its weights {weights}: {type(error).__name__}: {first_line(error)}",
                remedy="If the file in the cache of the library is damaged, remove it and run the command again; "
                "--debug shows the traceback.",
            ) from error
        raise ConfigError(
            f"{reference} cannot be made: {type(error).__name__}: {first_line(error)}",
            remedy="Check the number of classes and the image size; --debug shows the traceback.",
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{reference} is a {type(module).__name__}, not a module.", remedy="Pass another name.")
    return module


def _is_of_network(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of a connection or a missing file of a download."""
    while error is not None:
        module = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or module in ("huggingface_hub", "requests", "urllib3", "httpx", "http"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fresh_head(module: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Replace the last linear layer of a torchvision network, which is its classifier."""
    path = next((path for path, layer in reversed(list(module.named_modules())) if isinstance(layer, nn.Linear)), "")
    old = module.get_submodule(path)
    if not path or not isinstance(old, nn.Linear) or old.out_features == num_classes:
        return ()
    module.set_submodule(path, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))
    return (f"fresh classifier {path} of {num_classes} classes",)


def _sized(preprocessing: Preprocessing, image_size: int | None) -> Preprocessing:
    """``preprocessing`` for another image size, resized and cropped in the same proportion."""
    from dataclasses import replace

    if image_size is None or image_size == preprocessing.image_size:
        return preprocessing
    resize = max(image_size, round(preprocessing.resize * image_size / preprocessing.image_size))
    return replace(preprocessing, image_size=image_size, resize=resize)
