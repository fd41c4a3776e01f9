"""Files of ``torch.save``, read without running anything of them.

torch refuses every object that is not a tensor or a plain Python value. Training codes also store options, numbers of
NumPy and paths; these become placeholders without content, so that no class that a file names is ever created.
"""

import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdexport.errors import CheckpointError, first_line

_TRUST = "Code of a file is never run."


class Placeholder:
    """An object of a file that is not a tensor; its content was dropped."""

    origin = ""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Mapping:
    """Becomes a plain dictionary, which the reader then fills."""

    def __new__(cls, *_arguments: object) -> Any:
        return OrderedDict()


class _Sequence:
    """Becomes a plain list, which the reader then fills."""

    def __new__(cls, *_arguments: object) -> Any:
        return []


_MAPPINGS = (
    "addict.addict.Dict",
    "builtins.dict",
    "collections.defaultdict",
    "easydict.EasyDict",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "munch.Munch",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "timm.utils.misc.AttrDict",
    "yacs.config.CfgNode",
)
_SEQUENCES = ("builtins.list", "collections.deque")
_VALUES = (
    "argparse.Namespace",
    *(f"builtins.{name}" for name in ("bool", "bytes", "float", "frozenset", "int", "object", "range", "slice")),
    *(f"builtins.{name}" for name in ("str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "decimal.Decimal",
    "fractions.Fraction",
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"numpy.{name}" for name in ("bool", "bool_", "dtype", "float32", "float64", "int64", "ndarray", "str_")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *(
        f"numpy.random.{name}"
        for name in (
            "_pickle.__randomstate_ctor",
            "_pickle.__generator_ctor",
            "_pickle.__bit_generator_ctor",
            "_mt19937.MT19937",
            "_pcg64.PCG64",
            "bit_generator.SeedSequence",
            "bit_generator.__pyx_unpickle_SeedSequence",
        )
    ),
    *(
        f"omegaconf.{name}"
        for name in (
            "base.ContainerMetadata",
            "base.Metadata",
            "dictconfig.DictConfig",
            "listconfig.ListConfig",
            "nodes.AnyNode",
            "nodes.BooleanNode",
            "nodes.FloatNode",
            "nodes.IntegerNode",
            "nodes.StringNode",
        )
    ),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
    "torch.torch_version.TorchVersion",
    "types.SimpleNamespace",
    "typing.Any",
    "uuid.UUID",
)


def _placeholders() -> list[Any]:
    named = [(type("Placeholder", (Placeholder,), {"origin": name}), name) for name in _VALUES]
    return [*named, *((_Mapping, name) for name in _MAPPINGS), *((_Sequence, name) for name in _SEQUENCES)]


_INERT = _placeholders()


def read_pickled(path: Path) -> object:
    """The content of a file of ``torch.save``, on the CPU: tensors, plain Python values and placeholders.

    Raises ``CheckpointError`` if the file names any other class or function, or if it is damaged.
    """
    try:
        # Opened here, because torch.load decides by the name of a file what is in it.
        with path.open("rb") as stream, warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True)
    # A foreign file fails in the zip reader, in the unpickler or in the functions of torch that make tensors.
    except Exception as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return CheckpointError(
            f"{path} needs more memory than this machine has free, or is damaged.",
            remedy="Save only model.state_dict(), without the state of the optimizer, or copy the file again.",
        )
    protocol, names = _imported(path)
    if any(name.startswith("torch.nn.modules.") for name in names):
        return CheckpointError(
            f"{path} contains pickled modules, which are code, and not only weights: it names {_classes(names)}.",
            remedy=f"{_TRUST} Where the network was made, and if you trust the file, load it and save only the "
            "weights: torch.save(model.state_dict(), 'weights.pt')",
        )
    if "torch.storage._load_from_bytes" in names:
        return CheckpointError(
            f"{path} was written by pickle.dump, which stores a call for each tensor.",
            remedy=f"{_TRUST} Save model.state_dict() with torch.save instead.",
        )
    refused = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    if refused is not None:
        return CheckpointError(
            f"{path} contains code or objects other than tensors: it names {refused[1][:120]}.",
            remedy=f"{_TRUST} If you trust the file, load it where it was made and save only the weights: "
            "torch.save(model.state_dict(), 'weights.pt')",
        )
    if protocol > 2 and isinstance(error, pickle.UnpicklingError):
        return CheckpointError(
            f"{path} uses pickle protocol {protocol}; torch reads only protocol 2 without running code.",
            remedy="Save model.state_dict() with torch.save, without pickle_protocol.",
        )
    if "magic number" in str(error):
        return CheckpointError(
            f"{path} is a pickle that torch.save did not write.", remedy="Save model.state_dict() with torch.save."
        )
    return CheckpointError(
        f"{path} is truncated or damaged: {_reason(error)}.", remedy="Copy or download the file again."
    )


def _reason(error: Exception) -> str:
    text = str(error).partition("WeightsUnpickler error:")[2].strip() or first_line(error)
    return next(iter(text.splitlines()), type(error).__name__)[:200].rstrip(". ")


def _classes(names: set[str]) -> str:
    # The class of the network tells more than the layers of torch.
    plain = ("torch.", "collections.", "builtins.", "__builtin__.", "kdexport.students.classifier.")
    own = sorted(name for name in names if not name.startswith(plain))
    return ", ".join(name[:80] for name in (own or sorted(names))[:2])


def _imported(path: Path) -> tuple[int, set[str]]:
    """The pickle protocol of the file and the names of the classes and functions that it refers to; runs nothing."""
    protocol, names, texts = 0, set(), [""]
    try:
        for operation, argument in _operations(path):
            if operation == "PROTO":
                protocol = max(protocol, int(argument))
            elif operation == "GLOBAL":
                names.add(argument.replace(" ", "."))
            elif operation == "STACK_GLOBAL":
                names.add(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts = [texts[-1], argument]
    # Whatever a damaged file does to these readers, the caller has the error of torch to report.
    except Exception:  # noqa: BLE001
        return protocol, names
    return protocol, names


def _operations(path: Path) -> Iterator[tuple[str, Any]]:
    """Name and argument of each operation of the pickles in a file of ``torch.save``."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entry = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            with archive.open(entry) as stream:
                yield from ((operation.name, argument) for operation, argument, _ in pickletools.genops(stream))
        return
    with path.open("rb") as stream:
        # The format before torch 1.6: a magic number, a version, the machine, the content; then the storages.
        for _ in range(4):
            yield from ((operation.name, argument) for operation, argument, _ in pickletools.genops(stream))
