import pytest

from training.photos import BASE, ImageFacts, propose
from training.recipe import check_schedule, load_recipe


def facts(training: int = 1000, test: int = 200, classes: int = 5, side: int = 480) -> ImageFacts:
    return ImageFacts(training=training, test=test, classes=classes, side=side)


@pytest.mark.parametrize("student", ["mobilenetv2", "resnet18", "timm:repghostnet_050"])
@pytest.mark.parametrize("training", [2, 7, 8, 57, 1000, 100_000])
@pytest.mark.parametrize("size", [None, 8, 32, 127, 128, 1024])
def test_every_proposal_is_a_recipe_whose_schedule_acts(student: str, training: int, size: int | None) -> None:
    recipe = load_recipe(BASE, propose(facts(training), student, size).tables)
    check_schedule(recipe)
    assert recipe.train.batch_size <= training
    assert recipe.student.name == student
    assert recipe.teacher.name.removeprefix("torchvision:") != student
    assert recipe.data.image_size == (size or 224)


def test_a_small_set_has_several_batches_in_an_epoch() -> None:
    for training, batch in ((57, 8), (128, 16), (511, 32), (512, 64), (100_000, 64)):
        assert propose(facts(training), "mobilenetv2", None).tables["train"]["batch_size"] == batch


@pytest.mark.parametrize(("side", "size"), [(20, 32), (32, 32), (100, 64), (223, 128), (224, 224), (4000, 224)])
def test_the_size_is_one_that_the_images_have(side: int, size: int) -> None:
    assert propose(facts(side=side), "mobilenetv2", None).tables["data"]["image_size"] == size


def test_students_without_known_stages_get_a_method_that_reads_logits() -> None:
    assert propose(facts(), "mynet:make", 64).tables["distiller"] == {"name": "kd"}
    assert propose(facts(), "mobilenetv2", 64).tables["distiller"]["layers"] == "multi"


def test_a_test_split_that_can_prove_nothing_does_not_stop_the_run() -> None:
    # Four images of three classes are all right by chance with probability 1/81, five with 1/243.
    assert propose(facts(test=4, classes=3), "mobilenetv2", 32).tables["teacher"]["plausibility"] == "reported"
    assert "plausibility" not in propose(facts(test=5, classes=3), "mobilenetv2", 32).tables["teacher"]
