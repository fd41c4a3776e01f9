import pytest

from kdexport import errors
from kdexport.errors import KdexportError, error_codes

# Scripts and CI branch on these: a code is never given to another error, and its exit code never changes.
FROZEN = {
    "KDX100": ("ConfigError", 2),
    "KDX101": ("UnknownNameError", 2),
    "KDX102": ("UsageError", 2),
    "KDX200": ("CheckpointError", 2),
    "KDX201": ("DataError", 2),
    "KDX202": ("OutputError", 2),
    "KDX203": ("BundleError", 2),
    "KDX204": ("MismatchError", 2),
    "KDX210": ("RequestError", 2),
    "KDX300": ("ReparamError", 2),
    "KDX301": ("CertificateError", 1),
    "KDX310": ("ExportError", 1),
    "KDX311": ("AuditError", 1),
    "KDX320": ("EngineBuildError", 1),
    "KDX330": ("VerificationError", 1),
    "KDX332": ("SignatureError", 1),
    "KDX340": ("TrainingError", 1),
    "KDX350": ("ResolutionError", 3),
    "KDX351": ("NotExecutedError", 3),
    "KDX352": ("UndecidedError", 3),
    "KDX400": ("BackendUnavailableError", 4),
    "KDX401": ("StorageError", 4),
    "KDX402": ("ServerError", 4),
    "KDX403": ("RunnerError", 4),
    "KDX404": ("TransferError", 4),
    "KDX410": ("StoppedError", 130),
    "KDX900": ("UnexpectedError", 2),
}
# Bases, and the error of a child process, which brings the code that the child gave it.
GROUPS = {"KdexportError", "CheckError", "MachineError", "ForwardedError"}


def public_errors() -> list[type[KdexportError]]:
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, KdexportError)]


@pytest.mark.parametrize("code", FROZEN)
def test_codes_names_and_exit_codes_are_stable(code: str) -> None:
    found = error_codes()[code]
    assert (found.__name__, found.exit_code) == FROZEN[code]


def test_every_error_that_is_raised_has_a_code_of_its_own() -> None:
    concrete = [cls for cls in public_errors() if cls.__name__ not in GROUPS]
    assert all("code" in vars(cls) for cls in concrete)
    codes = [cls.code for cls in concrete]
    assert len(set(codes)) == len(codes)
    assert set(codes) == set(error_codes())


def test_no_code_is_missing_from_the_frozen_table() -> None:
    assert set(error_codes()) == set(FROZEN)


@pytest.mark.parametrize("cls", error_codes().values(), ids=lambda cls: cls.code)
def test_every_code_is_explained_in_sentences_of_its_own(cls: type[KdexportError]) -> None:
    assert "explanation" in vars(cls)
    assert len(cls.explanation) > 60
    assert cls.explanation.endswith(".")
    assert cls.explanation.isascii()


@pytest.mark.parametrize("cls", error_codes().values(), ids=lambda cls: cls.code)
def test_the_table_in_the_documentation_of_the_module_is_right(cls: type[KdexportError]) -> None:
    line = next(line for line in (errors.__doc__ or "").splitlines() if f"- {cls.__name__} " in line)
    assert cls.code in line
    if "exit" in line:
        assert f"exit {cls.exit_code} " in line


def test_an_error_prints_what_happened_and_what_to_do() -> None:
    error = errors.DataError("photo.jpg is not a readable image.", remedy="Repair or remove the file.")
    assert str(error) == "photo.jpg is not a readable image.\nRepair or remove the file."
    assert error.args == ("photo.jpg is not a readable image.",)


def test_codes_come_sorted() -> None:
    assert list(error_codes()) == sorted(error_codes())
