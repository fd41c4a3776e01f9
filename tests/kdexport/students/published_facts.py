"""The facts of each student at 100 classes, from the literature and by arithmetic, never from our own code.

Counts of the 32x32 forms are those of the public CRD and mdistiller code, of the ImageNet forms those of torchvision.
"""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["relu", "relu6", "hardswish"]

#: The next layer and a shortcut, or two branches, read the tap.
SHARED = r"has 2 users"
#: The next layer is a depthwise convolution.
GROUPED = r"has \d+ groups"
POOLED = r"is MaxPool2d|is max_pool2d"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """``macs`` is in millions, known to ``macs_digit``; ``taps`` are (channels, stride), ``activations`` by tap.

    ``refusals`` are the taps where adapters do not fold, and why; ``reader`` is the input width of the classifier.
    """

    parameters: int
    convs: int
    batch_norms: int
    entries: int
    macs: float
    macs_digit: float
    taps: dict[str, tuple[int, int]]
    activations: dict[str, Activation]
    reader: int
    law: Literal["fan_out", "default"]
    refusals: dict[str, str]


def _taps(*stages: tuple[int, int], last: int | None = None) -> dict[str, tuple[int, int]]:
    taps = {"stem": stages[0]} | {f"stage{index}": stage for index, stage in enumerate(stages[1:], 1)}
    return taps | ({} if last is None else {"last": (last, stages[-1][1])})


def _relu(*taps: str) -> dict[str, Activation]:
    return dict.fromkeys(taps, "relu")


_RESNET_ENDS = {f"stage{index}": SHARED for index in (1, 2, 3)}
_SHUFFLE_ENDS = {f"stage{index}": SHARED for index in (1, 2)}

FACTS: dict[tuple[str, int], Facts] = {
    ("mobilenetv2", 32): Facts(
        parameters=812_836,
        convs=53,
        batch_norms=53,
        entries=320,
        macs=6.52,
        macs_digit=0.01,
        taps=_taps((16, 2), (12, 2), (16, 4), (48, 8), (160, 16), last=1280),
        activations=_relu("stem", "last"),
        reader=1280,
        law="fan_out",
        refusals={},
    ),
    ("mobilenetv2", 224): Facts(
        parameters=2_351_972,
        convs=52,
        batch_norms=52,
        entries=314,
        macs=299.6,
        macs_digit=0.1,
        taps=_taps((32, 2), (24, 4), (32, 8), (96, 16), (320, 32), last=1280),
        activations={"stem": "relu6", "last": "relu6"},
        reader=1280,
        law="fan_out",
        refusals={"stem": GROUPED},
    ),
    # 1 + 10 + 11 + 11 + 1 convolutions have batch norms, two in each of nine squeeze-and-excitations have biases.
    ("mobilenetv3", 32): Facts(
        parameters=1_620_356,
        convs=34 + 18,
        batch_norms=34,
        entries=34 * 6 + 18 * 2 + 4,
        macs=17.60,
        macs_digit=0.01,
        taps=_taps((16, 1), (16, 1), (24, 2), (48, 4), (96, 8), last=576),
        activations={"stem": "hardswish", "last": "hardswish"},
        reader=1024,
        law="fan_out",
        refusals={"stem": GROUPED},
    ),
    # 1 + 14 + 15 + 15 + 1 convolutions have batch norms, two in each of eight squeeze-and-excitations have biases.
    ("mobilenetv3", 224): Facts(
        parameters=4_330_132,
        convs=46 + 16,
        batch_norms=46,
        entries=46 * 6 + 16 * 2 + 4,
        macs=215.4,
        macs_digit=0.1,
        taps=_taps((16, 2), (24, 4), (40, 8), (112, 16), (160, 32), last=960),
        activations={"stem": "hardswish", "last": "hardswish"},
        reader=1280,
        law="fan_out",
        refusals={"stem": SHARED},
    ),
    # Each stage after the first has twice the channels at a quarter of the size: the same operations.
    ("resnet18", 32): Facts(
        parameters=11_220_132,
        convs=20,
        batch_norms=20,
        entries=122,
        macs=((27 * 64 + 4 * 9 * 64**2) * 1024 + 3 * (3.5 * 9 * 128**2 + 64 * 128) * 256 + 512 * 100) / 1e6,
        macs_digit=1e-6,
        taps=_taps((64, 1), (64, 1), (128, 2), (256, 4), (512, 8)),
        activations=_relu("stem", "stage1", "stage2", "stage3", "stage4"),
        reader=512,
        law="fan_out",
        refusals={"stem": SHARED} | _RESNET_ENDS,
    ),
    ("resnet18", 224): Facts(
        parameters=11_227_812,
        convs=20,
        batch_norms=20,
        entries=122,
        macs=1814,
        macs_digit=1,
        taps=_taps((64, 2), (64, 4), (128, 8), (256, 16), (512, 32)),
        activations=_relu("stem", "stage1", "stage2", "stage3", "stage4"),
        reader=512,
        law="fan_out",
        refusals={"stem": POOLED} | _RESNET_ENDS,
    ),
    ("shufflenetv1", 32): Facts(
        parameters=949_258,
        convs=49,
        batch_norms=49,
        entries=296,
        macs=38.69,
        macs_digit=0.01,
        taps=_taps((24, 1), (240, 2), (480, 4), (960, 8)),
        activations=_relu("stem", "stage1", "stage2", "stage3"),
        reader=960,
        law="default",
        refusals={"stem": SHARED} | _SHUFFLE_ENDS,
    ),
    # The body reads 56x56 where the small form reads 32x32; the stem is 3x3 and writes 112x112.
    ("shufflenetv1", 224): Facts(
        parameters=949_258 - 24 * 3 + 24 * 27,
        convs=49,
        batch_norms=49,
        entries=296,
        macs=(38.69 - 0.073728 - 0.096) * (56 / 32) ** 2 + 24 * 27 * 0.112**2 + 0.096,
        macs_digit=0.04,
        taps=_taps((24, 2), (240, 8), (480, 16), (960, 32)),
        activations=_relu("stem", "stage1", "stage2", "stage3"),
        reader=960,
        law="default",
        refusals={"stem": POOLED} | _SHUFFLE_ENDS,
    ),
    ("shufflenetv2", 32): Facts(
        parameters=1_355_528,
        convs=56,
        batch_norms=56,
        entries=338,
        macs=44.50,
        macs_digit=0.01,
        taps=_taps((24, 1), (116, 2), (232, 4), (464, 8), last=1024),
        activations=_relu("stem", "stage1", "stage2", "stage3", "last"),
        reader=1024,
        law="default",
        refusals={"stem": SHARED} | _SHUFFLE_ENDS,
    ),
    ("shufflenetv2", 224): Facts(
        parameters=1_356_104,
        convs=56,
        batch_norms=56,
        entries=338,
        macs=144.0,
        macs_digit=0.1,
        taps=_taps((24, 2), (116, 8), (232, 16), (464, 32), last=1024),
        activations=_relu("stem", "stage1", "stage2", "stage3", "last"),
        reader=1024,
        law="default",
        refusals={"stem": POOLED} | _SHUFFLE_ENDS,
    ),
}
FORMS = sorted(FACTS)
