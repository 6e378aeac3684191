"""The package's families keep the contract that is shipped for a user's network; broken ones are seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from contract_failures import checks_of, failures

from refilled.testing import ModelContract


class TestConvNet(ModelContract):
    model = "convnet-4"


class TestWideResNet(ModelContract):
    model = "wrn-10-1"


class TestWhole(ModelContract):
    """What the broken ones are made from."""

    model = "broken_models.py:Whole"


WORKERS = "training_does_not_depend_on_the_number_of_workers"
DROPOUT = "dropout_follows_from_the_keys_alone"
BROKEN: Mapping[str, set[str]] = {
    "LeaksInEvaluation": {"an_image_does_not_depend_on_the_others_in_evaluation"},
    "SaysOtherWidths": {"outputs_have_the_shapes_that_it_says", "one_image_or_none_can_be_evaluated"},
    "ClassifiesSomethingElse": {"logits_are_the_head_of_the_embedding"},
    "FeaturesBehindTheActivation": {"features_are_taken_before_the_last_activation"},
    "RoundsItsEmbedding": {"precision_is_kept"},
    "BeginsAnyhow": {"same_seed_same_weights", WORKERS},
    "BeginsWithItsClasses": {"embedding_begins_alike_for_any_number_of_classes"},
    "StateThatIsNotSaved": {"state_survives_save_and_load", DROPOUT},
    "CannotTakeOneImage": {
        "one_image_or_none_can_be_evaluated",
        "an_image_does_not_depend_on_the_others_in_evaluation",
        WORKERS,
    },
    "DropsByGenerator": {DROPOUT, WORKERS},
    "DropsByPlace": {DROPOUT, WORKERS},
    "DropsAlways": {DROPOUT},
    "NormalisesItsShare": {WORKERS},
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_it_is_seen(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parent / "broken_models.py"
    assert failures(ModelContract, tmp_path, model=f"{path}:{name}").keys() == BROKEN[name]


def test_every_check_is_seen_to_fail() -> None:
    assert set().union(*BROKEN.values()) == checks_of(ModelContract)
