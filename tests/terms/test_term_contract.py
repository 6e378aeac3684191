"""The package's terms keep the contract that is shipped for a user's; broken ones are seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import broken_terms
import pytest
from contract_failures import checks_of, failures

from refilled.methods import TERMS
from refilled.testing import TermContract

SETTINGS: Mapping[str, Mapping[str, Any]] = {"crd": {"dim": 6, "num_negatives": 4}}

for _name in TERMS:
    _test = f"Test{_name.title().replace('_', '')}"
    globals()[_test] = type(_test, (TermContract,), {"term": _name, "settings": SETTINGS.get(_name, {})})


class TestWhole(TermContract):
    """What the broken ones are made from."""

    term = broken_terms.Whole


ON_WORKERS = {
    "loss_does_not_depend_on_the_number_of_workers",
    "gradients_do_not_depend_on_the_number_of_workers",
    "state_does_not_depend_on_the_number_of_workers",
}
SAME = "loss_is_the_same_on_every_worker"
DRAWN = {"nothing_is_drawn_from_the_global_generator", "state_survives_save_and_load"}
NO_STEP = {  # whatever takes a step
    *ON_WORKERS,
    SAME,
    "rows_are_one_an_image_and_finite",
    "loss_is_a_finite_scalar_that_teaches_the_student",
    "rounded_inputs_give_finite_numbers",
    "state_survives_save_and_load",
    "what_its_needs_do_not_name_is_not_used",
}
BROKEN: Mapping[str, set[str]] = {
    "ParameterInLoss": {*ON_WORKERS, "loss_uses_no_parameters_of_its_own"},
    "NormalisesItsShare": ON_WORKERS,
    "LossOfItsShare": {*ON_WORKERS, SAME},
    "DrawsInLoss": {*ON_WORKERS, *DRAWN, SAME},
    "DrawsWithNumPy": {*ON_WORKERS, *DRAWN, SAME},
    "ReturnsNothing": {*NO_STEP, "loss_uses_no_parameters_of_its_own"},
    "DrawsInRows": {*ON_WORKERS, *DRAWN},
    "MeanOfItsShare": {*ON_WORKERS, SAME},
    "StateThatIsNotSaved": {"state_survives_save_and_load"},
    "OneRowForAll": NO_STEP,
    "OneLossForEach": NO_STEP,
    "TeachesNobody": {"loss_is_a_finite_scalar_that_teaches_the_student"},
    "UsesWhatItDoesNotNeed": {"what_its_needs_do_not_name_is_not_used"},
    "UsesTheTeachersHead": {"what_its_needs_do_not_name_is_not_used"},
    "ChangesWhatItIsGiven": {"inputs_are_left_as_they_were"},
    "BeginsAnyhow": {"same_seed_same_start", "state_does_not_depend_on_the_number_of_workers"},
    "OverflowsInFloat32": {"rounded_inputs_give_finite_numbers"},
    "SparesTheStudent": {"undecayed_parameters_are_its_own"},
    "SaysNothing": {"every_setting_is_documented"},
    "HasAnOddDefault": {"defaults_are_accepted_and_survive_a_round_trip"},
    "SearchesTooFar": {"searched_settings_are_settings_and_all_their_values_are_accepted"},
    "SearchesWhatIsNone": {"searched_settings_are_settings_and_all_their_values_are_accepted"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_it_is_seen(name: str, tmp_path: Path) -> None:
    assert failures(TermContract, tmp_path, term=getattr(broken_terms, name)).keys() == BROKEN[name]


def test_every_check_is_seen_to_fail() -> None:
    assert set().union(*BROKEN.values()) == checks_of(TermContract)


def test_a_term_that_workers_cannot_import_is_told_so(tmp_path: Path) -> None:
    class Here(broken_terms.Whole):
        """Of a function."""

    assert "name it path/file.py:Name" in failures(TermContract, tmp_path, term=Here)[SAME]
