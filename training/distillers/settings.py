"""The settings of each method of distillation, read and checked without importing torch.

A method without ``@method_settings`` has only the keys of ``DistillerSettings``. Defaults are those of the
published code of a method for CIFAR-100; a comment marks keys without a published value.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from kdexport.core.toml import Settings
from kdexport.plugins import import_active_plugins, import_installed_plugins

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Placement = Literal["R1", "R2"]
Layers = Literal["single", "multi"]
NumBranches = Annotated[int, Field(ge=1, le=16)]


class DistillerSettings(Settings):
    """``[distiller]``: the name of the method, and the keys that all methods have."""

    name: str
    #: Weight of the cross-entropy with the labels.
    cross_entropy: NonNegative = 1.0
    #: Weight of the method's loss, which grows linearly from zero over ``ramp_epochs``.
    weight: NonNegative = 1.0
    ramp_epochs: NonNegative = 0.0

    @classmethod
    def model_of(cls, data: Mapping[str, Any]) -> type[Settings]:
        name = data.get("name", "kdiffusion")
        return settings_model(name) if isinstance(name, str) else cls


_BY_NAME: dict[str, type[DistillerSettings]] = {}

S = TypeVar("S", bound=DistillerSettings)


def method_settings(model: type[S]) -> type[S]:
    """Decorator: ``model`` reads ``[distiller]`` if ``name`` there is the default of its ``name``."""
    name = model.model_fields["name"].default
    if not isinstance(name, str) or name in _BY_NAME:
        raise ValueError(
            f"the default of `name` in {model.__name__} must be a string that no other settings use; got {name!r}"
        )
    _BY_NAME[name] = model
    return model


@method_settings
class PlainSettings(DistillerSettings):
    """Cross-entropy only."""

    name: Literal["plain"] = "plain"


@method_settings
class KDSettings(DistillerSettings):
    """Hinton et al., 2015, with the values of the CRD protocol."""

    name: Literal["kd"] = "kd"
    cross_entropy: NonNegative = 0.1
    weight: NonNegative = 0.9
    temperature: Positive = 4.0


@method_settings
class DKDSettings(DistillerSettings):
    """Zhao et al., 2022, where ``beta`` is tuned for each pair."""

    name: Literal["dkd"] = "dkd"
    ramp_epochs: NonNegative = 20.0
    alpha: NonNegative = 1.0
    beta: NonNegative = 8.0
    temperature: Positive = 4.0


@method_settings
class DISTSettings(DistillerSettings):
    """Huang et al., 2022: correlations between classes and within a class."""

    name: Literal["dist"] = "dist"
    inter_class: NonNegative = 2.0
    intra_class: NonNegative = 2.0
    temperature: Positive = 4.0


@method_settings
class ATSettings(DistillerSettings):
    """Zagoruyko & Komodakis, 2017."""

    name: Literal["at"] = "at"
    weight: NonNegative = 1000.0
    power: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0


@method_settings
class VIDSettings(DistillerSettings):
    """Ahn et al., 2019."""

    name: Literal["vid"] = "vid"
    #: Initial variance of every channel, which is always above 1e-5.
    initial_variance: Annotated[float, Field(gt=1e-5, allow_inf_nan=False)] = 5.0


@method_settings
class CRDSettings(DistillerSettings):
    """Tian et al., 2020."""

    name: Literal["crd"] = "crd"
    weight: NonNegative = 0.8
    dimension: Annotated[int, Field(ge=1)] = 128
    #: Negatives for each image, drawn from the other classes; at most as many images as these have.
    negatives: Annotated[int, Field(ge=1)] = 16384
    #: Below 0.05 the quotient of two scores, up to exp(3.5 / temperature) times the number of images, can overflow.
    temperature: Annotated[float, Field(ge=0.05, allow_inf_nan=False)] = 0.07
    #: The weight of the old entry of a memory when it is updated.
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5


@method_settings
class OFDSettings(DistillerSettings):
    """Heo et al., 2019."""

    name: Literal["ofd"] = "ofd"
    weight: NonNegative = 1e-3


@method_settings
class ReviewKDSettings(DistillerSettings):
    """Chen et al., 2021, where ``weight`` is tuned for each pair: 5 or 8, not published for MobileNetV2."""

    name: Literal["reviewkd"] = "reviewkd"
    weight: NonNegative = 5.0
    ramp_epochs: NonNegative = 20.0
    max_channels: Annotated[int, Field(ge=1)] = 512


@method_settings
class NORMSettings(DistillerSettings):
    """Liu et al., 2023, where ``cross_entropy`` is tuned for each pair, from 0.0625 to 0.5.

    Their weight has the steps 0.1, 0.5, and 1 from epoch 20 on; here it grows linearly until then. They lower it again
    from epoch 180 on, which this ramp does not.
    """

    name: Literal["norm"] = "norm"
    cross_entropy: NonNegative = 0.5
    ramp_epochs: NonNegative = 20.0
    #: The number of segments that are matched with one teacher feature.
    num_segments: Annotated[int, Field(ge=1, le=64)] = 8


class BranchedSettings(DistillerSettings):
    """Parallel branches in the student that fold away; the paper publishes no weights, so these are our own."""

    weight: NonNegative = 4.0
    ramp_epochs: NonNegative = 20.0
    placement: Placement = "R1"
    #: ``single`` adds branches to the last stage, ``multi`` to every stage with a partner in the teacher.
    layers: Layers = "single"
    num_branches: NumBranches = 4
    teacher_feature: Literal["post_activation", "pre_activation"] = "post_activation"
    teacher_normalisation: Literal["standardised", "raw"] = "standardised"
    #: Weight of the distance after the teacher's classifier, with the ramp; 0 omits it.
    target_guide: NonNegative = 0.0
    #: Weight of Hinton's loss on the logits; 0 omits it.
    kd_weight: NonNegative = 0.0
    kd_temperature: Positive = 4.0

    @model_validator(mode="after")
    def _branched_keys_have_an_effect(self) -> Self:
        self._needs(self.kd_weight > 0, "a kd_weight above 0", "kd_temperature")
        return self

    def _needs(self, holds: bool, needed: str, *keys: str) -> None:
        """Refuse values of ``keys`` other than their defaults, which would have no effect, unless ``holds``."""
        for key in keys:
            if not holds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} = {getattr(self, key)!r} has no effect without {needed}")


@method_settings
class AverageSettings(BranchedSettings):
    """The distance of the mean of the branches from the teacher's feature: KDiffusion without diffusion."""

    name: Literal["average"] = "average"


@method_settings
class KDiffusionSettings(BranchedSettings):
    """Yao et al., AAAI 2024, with a key for each choice that the paper leaves open; docs/method.md has the reasons."""

    name: Literal["kdiffusion"] = "kdiffusion"
    schedule: Literal["cosine", "ddpm_linear", "linear"] = "cosine"
    permutation: Literal["shuffle", "fixed", "expected"] = "shuffle"
    #: What shares one random order, within one iteration.
    shuffle_per: Literal["layer", "iteration", "sample"] = "layer"
    trajectory: Literal["shared_noise", "marginal"] = "shared_noise"
    start: Literal["shared_branch", "own_branch", "teacher"] = "shared_branch"
    noise: Literal["first_branch", "first_branch_attached", "gaussian", "step_branch"] = "first_branch"
    target: Literal["posterior_mean", "sampled"] = "posterior_mean"
    backpropagation: Literal["full", "truncated"] = "full"
    step_weights: Literal["uniform", "inverse_v2", "kl"] = "uniform"
    #: The limit of the weights "kl", which would be infinite in the last step.
    kl_limit: Positive = 10.0
    #: Standard deviation of the noise of the diffusion.
    sigma: Positive = 1.0
    guide_feature: Literal["mean", "prediction", "all"] = "mean"

    @model_validator(mode="after")
    def _combination_is_valid(self) -> Self:
        if self.permutation == "expected":
            if self.trajectory == "marginal":
                raise ValueError("permutation 'expected' has a closed form for trajectory 'shared_noise' only")
            if self.guide_feature == "prediction":
                raise ValueError(
                    "guide_feature 'prediction' needs one order of the branches, which permutation 'expected' does not "
                    "have; set guide_feature to 'all', its mean over all orders"
                )
        if self.start == "own_branch" and self.num_branches < 2:
            raise ValueError(
                f"start 'own_branch' needs one branch for the start and one for each step, but num_branches is "
                f"{self.num_branches}; set it to 2 or more"
            )
        self._needs(self.permutation == "shuffle", "permutation 'shuffle'", "shuffle_per")
        # With shared noise both trajectories have the same start, noise and sampled part of a target, which cancel.
        self._needs(self.trajectory == "marginal", "trajectory 'marginal'", "start", "noise", "target")
        self._needs(self.step_weights == "kl", "step_weights 'kl'", "kl_limit")
        self._needs(
            self.step_weights == "kl" or self.noise == "gaussian", "step_weights 'kl' or noise 'gaussian'", "sigma"
        )
        self._needs(self.target_guide > 0, "a target_guide above 0", "guide_feature")
        return self


def settings_model(name: str) -> type[DistillerSettings]:
    """The settings of the method ``name``; ``DistillerSettings`` if it has no keys of its own."""
    if name not in _BY_NAME:
        _import_method(name)
        import_installed_plugins("kdexport.distillers")
        import_active_plugins()
    return _BY_NAME.get(name, DistillerSettings)


def _import_method(name: str) -> None:
    """Import a shipped method that keeps its settings in its own file; this also imports torch."""
    if name.isidentifier() and importlib.util.find_spec(f"training.distillers.{name}") is not None:
        importlib.import_module(f"training.distillers.{name}")


def _by_name(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        return value
    return DistillerSettings.model_of(value).model_validate({"name": "kdiffusion", **value}, context=info.context)


#: A table ``[distiller]``, read as the settings of the method that it names.
AnyDistiller = Annotated[SerializeAsAny[DistillerSettings], BeforeValidator(_by_name)]
