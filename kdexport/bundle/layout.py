"""Names of the files in a bundle; the stages of a build name their results alike."""

MANIFEST = "manifest.json"

UNFUSED = "unfused.safetensors"

FUSED = "student.safetensors"

TARGETS = "targets"

GOLDEN = "golden"

GOLDEN_LOGITS = "golden/logits.safetensors"

#: A tensor of that file: the error on the golden images that rung B of the bundle's policy allows a multiple of.
UNIT_ERROR = "unit_error"

#: Per-image results of rung D.
TASK = "metrics/validation.safetensors"

#: The calibrated range of each tensor, beside an int8 model.
RANGES = "ranges.json"
