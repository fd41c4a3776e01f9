"""``kdexport doctor BUNDLE``: whether this machine would serve a bundle, and gives its labels."""

from pathlib import Path

from kdexport.backends.ort import CPU
from kdexport.doctor import Fact
from kdexport.serving.limits import Limits
from kdexport.serving.loading import as_kdexport_error, load, read_files
from kdexport.serving.servable import DEFAULT_TARGET, require_servable
from kdexport.serving.trial import allowed_error, require_one_file


def examine_bundle(folder: Path, provider: str = CPU, target: str = DEFAULT_TARGET) -> list[Fact]:
    """Files, graph, provider and golden images from their bytes; raises what the server would refuse the bundle for."""
    try:
        require_servable(target, provider)
        files = read_files(folder, target)
        require_one_file(files.graph)
        allowed = allowed_error(folder, files.manifest, target)
        model = load(
            folder, name=folder.name, version=1, provider=provider, limits=Limits(), allowed_error=allowed,
            target=target,
        )  # fmt: skip
    except Exception as error:
        raise as_kdexport_error(error, folder) from error
    golden = model.golden
    nodes = sum(model.ort.nodes_by_provider.values())
    fact = f"{golden.images} images from their bytes: same pixels as in training, same labels as the reference"
    return [
        Fact("files", True, f"{len(files.manifest.files)} files are those that were verified"),
        Fact("graph", True, f"{target}: one file, {len(files.graph):,} bytes, no foreign operators"),
        Fact("provider", True, f"{nodes} of {nodes} nodes on {provider}"),
        Fact("golden images", True, fact),
        Fact("golden logits", True, f"off by {golden.error:.2e} at most (up to {golden.allowed:.2e} allowed)"),
    ]
