"""Upload images that are damaged, huge, unusual or of unsupported formats."""

import asyncio
import io
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from serving_bench.http_client import Connection, encode
from serving_bench.payloads import Payload, photo
from serving_bench.process import running
from serving_bench.records import Records
from serving_bench.servers import Arm


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, *, depth: int = 1) -> bytes:
    """A PNG of one colour: a tiny file of any number of pixels."""
    row = bytes(1 + (width * depth + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join([*(packer.compress(row) for _ in range(min(height, 20_000))), packer.flush()])
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def corpus() -> dict[str, bytes]:
    """Images by the property that makes each of them unusual."""
    rng = np.random.default_rng(4)
    colour = Image.fromarray(rng.integers(0, 256, (97, 131, 3), np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (40, 50), np.uint16))
    frames = [colour, colour.rotate(90), colour.rotate(180)]
    found = {
        "jpeg": photo(640, 480),
        "progressive": _saved(colour, "JPEG", progressive=True),
        "cmyk": _saved(colour.convert("CMYK"), "JPEG"),
        "grey jpeg": _saved(colour.convert("L"), "JPEG"),
        "png": _saved(colour, "PNG"),
        "rgba": _saved(colour.convert("RGBA"), "PNG"),
        "palette": _saved(colour.convert("P"), "PNG", transparency=3),
        "one bit": _saved(colour.convert("1"), "PNG"),
        "16 bit": _saved(grey16, "PNG"),
        "webp": _saved(colour, "WEBP"),
        "lossless webp": _saved(colour, "WEBP", lossless=True),
        "animated webp": _saved(colour, "WEBP", save_all=True, append_images=frames),
        "animated png": _saved(colour, "PNG", save_all=True, append_images=frames),
        "gif": _saved(colour, "GIF", save_all=True, append_images=frames),
        "tiff": _saved(colour, "TIFF"),
        "bmp": _saved(colour, "BMP"),
        "ico": _saved(colour, "ICO"),
        "ppm": _saved(colour, "PPM"),
        "one pixel": _saved(colour.crop((0, 0, 1, 1)), "PNG"),
        "wide": bomb(60_000, 1),
        "tall": bomb(1, 20_000),
        "20000 x 20000": bomb(20_000, 20_000),
        "claims 100000 x 100000": bomb(100_000, 100_000),
        "5000 x 4999": bomb(5000, 4999, depth=8),
        "aspect 20": bomb(2000, 100),
        "empty": b"",
        "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "fits": b"SIMPLE  =                    T" + b" " * 2850,
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    found["rotated by exif"] = _saved(colour, "JPEG", exif=exif)
    found["huge comment"] = _saved(colour, "JPEG", comment=b"c" * 65_000)
    return found


def mutated(data: bytes, pick: random.Random) -> bytes:
    """Truncate the data, or change, repeat or overwrite a few bytes."""
    if not data:
        return data
    changed = bytearray(data)
    kind = pick.randrange(4)
    if kind == 0:
        return data[: pick.randrange(len(data))]
    if kind == 1:
        for _ in range(pick.randrange(1, 20)):
            changed[pick.randrange(len(changed))] = pick.randrange(256)
    elif kind == 2:
        start = pick.randrange(len(changed))
        changed[start:start] = changed[start : start + pick.randrange(1, 200)]
    else:
        # Every format has its sizes in the first bytes.
        for _ in range(3):
            changed[pick.randrange(min(64, len(changed)))] = pick.choice((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(changed)


def images(arm: Arm, model: str, records: Records, *, count: int, logs: Path, seed: int = 5) -> None:
    """Upload the corpus and ``count`` mutations of it, four at a time; count 5xx and record the peak of memory."""
    pick = random.Random(seed)
    kinds = corpus()
    jobs = [(name, data) for name, data in kinds.items()]
    jobs += [(f"{name}, mutated", mutated(kinds[name], pick)) for name in pick.choices(list(kinds), k=count)]
    with running(arm.command, logs / "images.log") as server:
        outcomes, failures = asyncio.run(_post(server.port, model, jobs))
        memory = server.memory()
        alive = server.answers("/v2/health/ready")
    records.add(
        "images", arm=arm.name, kinds=len(kinds), mutations=count, seed=seed, fates=dict(sorted(outcomes.items())),
        server_errors=sum(n for outcome, n in outcomes.items() if outcome.startswith("5")), failures=failures[:10],
        alive=alive, peak_mb=memory.peak_mb,
    )  # fmt: skip


async def _post(port: int, model: str, jobs: list[tuple[str, bytes]]) -> tuple[Counter[str], list[str]]:
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    queue = list(reversed(jobs))

    async def worker() -> None:
        connection = Connection(port)
        while queue:
            name, data = queue.pop()
            payload = Payload("image", f"/v1/classify?model={model}", {"Content-Type": "image/jpeg"}, data)
            answer = await connection.request(encode(payload), timeout_s=30)
            outcome = str(answer.status) if answer.outcome == "answered" else answer.outcome
            outcomes[outcome] += 1
            if not outcome.startswith(("2", "4")):
                failures.append(f"{name}: {outcome} {answer.body[:200].decode('latin-1')}")
        connection.close()

    await asyncio.gather(*(worker() for _ in range(4)))
    return outcomes, failures
