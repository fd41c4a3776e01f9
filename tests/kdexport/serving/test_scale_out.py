"""The deployment manifests have the fields of KServe's and Ray's published schemas, and options that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer.main
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from kdexport.cli import app

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
DOCS = (ROOT / "docs" / "scale-out.md").read_text()
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


class Published(BaseModel):
    """The published fields that the manifests use; any other field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Kubernetes(Published):
    """Published fields with names in camel case."""

    model_config = ConfigDict(alias_generator=to_camel)


class Metadata(Kubernetes):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


class HttpGet(Kubernetes):
    path: Annotated[str, Field(pattern="^/")]
    port: int


class Probe(Kubernetes):
    http_get: HttpGet
    period_seconds: int = 10
    timeout_seconds: int = 1
    failure_threshold: int = 3


class EnvVar(Kubernetes):
    # Kubernetes refuses a number here, and YAML reads an unquoted 1 as a number.
    name: str
    value: str


class Port(Kubernetes):
    name: str
    container_port: int
    protocol: Literal["TCP"]


Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|Mi|Gi)?$")]


class Resources(Kubernetes):
    requests: dict[Literal["cpu", "memory"], Quantity]
    limits: dict[Literal["cpu", "memory"], Quantity]


class Capabilities(Kubernetes):
    drop: list[str]


class SecurityContext(Kubernetes):
    run_as_non_root: Literal[True]
    run_as_user: int
    allow_privilege_escalation: Literal[False]
    read_only_root_filesystem: Literal[True]
    capabilities: Capabilities


class Mount(Kubernetes):
    name: str
    mount_path: str


class EmptyDir(Kubernetes):
    size_limit: Quantity


class Volume(Kubernetes):
    name: str
    empty_dir: EmptyDir


class Container(Kubernetes):
    name: Literal["kserve-container"]
    image: str
    command: list[str]
    args: list[str]
    ports: list[Port]
    env: list[EnvVar]
    resources: Resources
    startup_probe: Probe
    readiness_probe: Probe
    liveness_probe: Probe
    security_context: SecurityContext
    volume_mounts: list[Mount]


class SupportedFormat(Kubernetes):
    name: str
    version: str
    auto_select: bool
    priority: Annotated[int, Field(ge=1)]


class RuntimeSpec(Kubernetes):
    annotations: dict[str, str]
    supported_model_formats: list[SupportedFormat]
    protocol_versions: list[Literal["v1", "v2", "grpc-v1", "grpc-v2"]]
    containers: list[Container]
    volumes: list[Volume]


class ServingRuntime(Kubernetes):
    api_version: Literal["serving.kserve.io/v1alpha1"]
    kind: Literal["ServingRuntime"]
    metadata: Metadata
    spec: RuntimeSpec


class ModelFormat(Kubernetes):
    name: str
    version: str


class Model(Kubernetes):
    model_format: ModelFormat
    protocol_version: Literal["v1", "v2", "grpc-v2"]
    runtime: str
    storage_uri: Annotated[str, Field(pattern=r"^(pvc|s3|gs|https|hf)://")]
    readiness_probe: Probe | None = None


class Predictor(Kubernetes):
    min_replicas: int
    max_replicas: int
    termination_grace_period_seconds: int
    model: Model


class InferenceServiceSpec(Kubernetes):
    predictor: Predictor


class InferenceService(Kubernetes):
    api_version: Literal["serving.kserve.io/v1beta1"]
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: InferenceServiceSpec


class Autoscaling(Published):
    min_replicas: Annotated[int, Field(ge=0)]
    max_replicas: Annotated[int, Field(ge=1)]
    target_ongoing_requests: float
    upscale_delay_s: float
    downscale_delay_s: float


class RuntimeEnv(Published):
    env_vars: dict[str, str]


class ActorOptions(Published):
    num_cpus: float
    runtime_env: RuntimeEnv


class Deployment(Published):
    name: str
    max_ongoing_requests: Annotated[int, Field(gt=0)]
    max_queued_requests: Annotated[int, Field(ge=-1)]
    autoscaling_config: Autoscaling
    health_check_period_s: float
    health_check_timeout_s: float
    graceful_shutdown_wait_loop_s: float
    graceful_shutdown_timeout_s: float
    ray_actor_options: ActorOptions


class Application(Published):
    name: str
    route_prefix: Annotated[str, Field(pattern="^/")]
    import_path: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    args: dict[str, str]
    deployments: list[Deployment]


class HttpOptions(Published):
    host: str
    port: int
    request_timeout_s: float
    keep_alive_timeout_s: int


class LoggingConfig(Published):
    log_level: str
    enable_access_log: bool


class RayServe(Published):
    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"]
    http_options: HttpOptions
    logging_config: LoggingConfig
    applications: list[Application]


MANIFESTS: dict[str, type[Published]] = {
    "kserve/triton.yaml": InferenceService,
    "kserve/student.yaml": InferenceService,
    "kserve/runtime.yaml": ServingRuntime,
    "ray/serve.yaml": RayServe,
}


def test_every_manifest_is_checked() -> None:
    found = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*.yaml")}
    assert found == {*MANIFESTS, "triton/compose.yaml"}


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_a_manifest_has_published_fields_of_the_published_types(name: str) -> None:
    MANIFESTS[name].model_validate(read(name))


#: The keys below these are chosen by the user.
FREE = {"annotations", "args", "env_vars"}


def misspelt(value: Any, under: str = "") -> Iterator[Any]:
    """Copies of a document, each with one misspelt key."""
    if isinstance(value, dict) and under not in FREE:
        for key, item in value.items():
            yield {(f"{name}x" if name == key else name): other for name, other in value.items()}
            for changed in misspelt(item, key):
                yield {**value, key: changed}
    elif isinstance(value, list):
        for index, item in enumerate(value):
            for changed in misspelt(item, under):
                yield [*value[:index], changed, *value[index + 1 :]]


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_a_misspelt_field_is_an_error(name: str) -> None:
    documents = list(misspelt(read(name)))
    assert len(documents) > 15
    for document in documents:
        with pytest.raises(ValidationError):
            MANIFESTS[name].model_validate(document)


def test_the_runtime_starts_a_command_whose_options_exist() -> None:
    (container,) = read("kserve/runtime.yaml")["spec"]["containers"]
    assert container["command"] == ["kdexport", COMMANDS["serve"].name]
    options = {name for parameter in COMMANDS["serve"].params for name in parameter.opts}
    for argument in container["args"][1:]:
        assert argument.partition("=")[0] in options


def test_ports_names_and_deadlines_of_the_runtime_agree_with_each_other() -> None:
    runtime, service = read("kserve/runtime.yaml")["spec"], read("kserve/student.yaml")["spec"]["predictor"]
    (container,), (supported,) = runtime["containers"], runtime["supportedModelFormats"]
    port = container["ports"][0]["containerPort"]
    assert f"--port={port}" in container["args"]
    assert {container[kind]["httpGet"]["port"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        port
    }
    assert f"--metrics-port={runtime['annotations']['prometheus.kserve.io/port']}" in container["args"]
    assert service["model"]["runtime"] == read("kserve/runtime.yaml")["metadata"]["name"]
    assert service["model"]["modelFormat"] == {key: supported[key] for key in ("name", "version")}
    # 5 s of drain and 20 s of grace are the server's defaults.
    assert service["terminationGracePeriodSeconds"] > 25
    defaults = {parameter.name: parameter.default for parameter in COMMANDS["serve"].params}
    assert service["terminationGracePeriodSeconds"] > defaults["drain"] + defaults["grace"]


def test_the_ray_application_is_the_file_beside_its_configuration() -> None:
    (application,) = read("ray/serve.yaml")["applications"]
    module, _, function = application["import_path"].partition(":")
    source = (DEPLOY / "ray" / f"{module}.py").read_text()
    assert f"def {function}(arguments: dict[str, str])" in source
    assert f'name="{application["deployments"][0]["name"]}"' in source
    assert set(re.findall(r'arguments\["(\w+)"\]', source)) == set(application["args"])


def test_the_compose_file_starts_triton_on_loopback_with_a_read_only_repository() -> None:
    (service,) = read("triton/compose.yaml")["services"].values()
    assert service["command"][0] == "tritonserver"
    assert all(re.fullmatch(r"tritonserver|--[a-z-]+=\S+|--[a-z-]+", word) for word in service["command"])
    assert f"--model-repository={service['volumes'][0]['target']}" in service["command"]
    assert service["volumes"][0]["read_only"] is True
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    TypeAdapter(list[str]).validate_python(service["cap_drop"], strict=True)


def test_the_page_names_files_and_options_that_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", DOCS):
        assert (ROOT / "docs" / target).resolve().is_file(), target
    for path in re.findall(r"deploy/[\w/]+\.(?:yaml|py)", DOCS):
        assert (ROOT / path).is_file(), path
    options = {name for parameter in COMMANDS["triton"].params for name in parameter.opts}
    lines = [line for line in DOCS.splitlines() if line.startswith("kdexport triton ")]
    assert len(lines) >= 2
    for line in lines:
        assert {word for word in shlex.split(line) if word.startswith("--")} <= options
    assert set(re.findall(r"`(--[a-z-]+)", DOCS)) <= options


def test_the_page_lists_what_was_not_run() -> None:
    assert "## What was run, and what was not" in DOCS


@pytest.mark.parametrize("name", [name for name in sorted(MANIFESTS) if name.startswith("kserve")])
def test_kserves_own_models_have_every_field(name: str) -> None:
    models = pytest.importorskip("kserve.models", reason="needs the package kserve")
    kubernetes = pytest.importorskip("kubernetes.client.models")
    kinds = {"InferenceService": "V1beta1InferenceService", "ServingRuntime": "V1alpha1ServingRuntime"}

    def check(value: Any, kind: str, place: str) -> None:
        inner = re.fullmatch(r"(?:list\[|dict\(str, )(.+?)[\])]", kind)
        if kind.startswith("list["):
            assert isinstance(value, list), place
            assert inner is not None
            for index, item in enumerate(value):
                check(item, inner[1], f"{place}[{index}]")
        elif kind.startswith(("dict(", "dict[")):
            assert isinstance(value, dict), place
        elif (cls := getattr(models, kind, None) or getattr(kubernetes, kind, None)) is not None:
            names = {external: own for own, external in cls.attribute_map.items()}
            for key, item in value.items():
                assert key in names, f"{place}.{key}"
                check(item, cls.openapi_types[names[key]], f"{place}.{key}")
        else:
            expected = {"str": str, "int": int, "bool": bool}.get(kind, object)
            assert isinstance(value, expected), f"{place} is {value!r}, not {kind}"

    document = read(name)
    check(document, kinds[document["kind"]], document["kind"])


def test_rays_own_schema_accepts_the_configuration() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs the package ray[serve]")
    schema.ServeDeploySchema.model_validate(read("ray/serve.yaml"))
