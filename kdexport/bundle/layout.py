"""The layout of a bundle: the names of its files. The stages of a build give their results the same names."""

MANIFEST = "manifest.json"
#: The signature of all other files, the manifest among them, so that no digest can cover it.
SIGNATURE = "model.sig"
#: The software that built the bundle. Bundles of earlier versions have none.
SBOM = "sbom.json"
#: The model card. Bundles of earlier versions have none.
CARD = "README.md"
UNFUSED = "unfused.safetensors"
FUSED = "student.safetensors"
TARGETS = "targets"
GOLDEN = "golden"
GOLDEN_LOGITS = "golden/logits.safetensors"
#: Per-image results of rung D.
TASK = "metrics/validation.safetensors"
#: The likeliest classes of each image, by file. Bundles of earlier versions have none.
ANSWERS = "metrics/answers.safetensors"
#: The folded weights after quantize-aware training for an int8 form, which int8 targets have instead of ``FUSED``.
TRAINED_FOR = {"int8-u8": "student-int8-u8.safetensors", "int8-s8": "student-int8-s8.safetensors"}
#: The calibrated range of each tensor, in the folder of an int8 model.
RANGES = "ranges.json"
#: Beside the ranges if their method was chosen by measurement.
CALIBRATED = "calibration.json"

#: A tensor of ``GOLDEN_LOGITS``: the unit of the error on the golden images, of which rung B allows a multiple.
UNIT_ERROR = "unit_error"
#: A tensor of ``GOLDEN_LOGITS``: the positions (N,) of the golden images in the validation split.
GOLDEN_INDICES = "indices"
#: Kinds of golden images.
VALIDATION_IMAGES, SYNTHETIC_IMAGES = "validation", "synthetic"
#: Prefixes of tensors of ``GOLDEN_LOGITS``, followed by a target: its own logits of the golden images, as its runtime
#: computed them at the build, and the rms distance from them that another processor or version may have.
OWN_LOGITS, OWN_DISTANCE = "logits.", "allowed_distance."
