from typing import Any

from kdexport.build.train import student_key, teacher_key


def keys(**changes: dict[str, Any]) -> tuple[str, str]:
    """The keys of the student and of the teacher of a recipe with ``changes`` in its tables."""
    recipe: dict[str, dict[str, Any]] = {
        "data": {"name": "folder:a", "root": "", "workers": 2, "image_size": 32},
        "teacher": {"name": "resnet8", "checkpoint": "", "epochs": 3, "learning_rate": 0.1},
        "student": {"name": "mobilenetv2"},
        "distiller": {"name": "kd"},
        "train": {"epochs": 5, "learning_rate": 0.2, "batch_size": 8, "teacher_precision": "auto"},
    }
    for table, values in changes.items():
        recipe[table] = {**recipe[table], **values}
    return student_key(recipe, "d", "t", 1, {}), teacher_key(recipe, "d", 1, {})


def test_what_changes_no_weights_changes_no_key() -> None:
    assert keys(data={"name": "folder:b", "workers": 9}, train={"trackers": ["wandb"]}) == keys()


def test_a_teacher_depends_only_on_what_changes_its_weights() -> None:
    student, teacher = keys()
    for changes in (
        {"train": {"epochs": 6}},
        {"train": {"learning_rate": 0.3}},
        {"train": {"teacher_precision": "bf16"}},
        {"teacher": {"plausibility": "reported"}},
        {"teacher": {"taps": {"stage1": "layer1"}}},
        {"distiller": {"name": "dkd"}},
        {"student": {"form": "full"}},
    ):
        other = keys(**changes)
        assert other[1] == teacher
        assert other[0] != student
    for changes in ({"train": {"batch_size": 4}}, {"train": {"mixup": 0.2}}, {"teacher": {"epochs": 4}}):
        assert keys(**changes)[1] != teacher
