import hashlib
from pathlib import Path

import numpy as np
import pytest

from kdexport.core.digests import digest, sha256_bytes, sha256_file, tool_versions


def test_the_digest_of_a_value_is_the_sha256_of_its_canonical_json() -> None:
    assert digest({"b": [1, None], "a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,null]}').hexdigest()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    values = [None, False, 0, "0", [], {}, [0], {"0": 0}, 0.5]
    assert len({digest(value) for value in values}) == len(values)


def test_a_file_and_its_bytes_have_one_digest(tmp_path: Path) -> None:
    # More than one block of any buffer, and none.
    for data in (b"", bytes(range(256)) * 5000):
        (tmp_path / "file").write_bytes(data)
        assert sha256_file(tmp_path / "file") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_a_value_that_json_cannot_represent_has_no_digest() -> None:
    with pytest.raises(TypeError):
        digest({"path": Path("x")})


def test_versions_come_from_metadata_and_a_missing_package_is_absent() -> None:
    assert tool_versions("numpy", "no-such-package-here") == {"numpy": np.__version__, "no-such-package-here": "absent"}
