"""A student's files in an object store: written on a machine that never saw the run, found on every other."""

from __future__ import annotations

import obstore
import torch
from machines import Machines
from test_export import origin

from refilled.config import RunConfig
from refilled.execution import refit, run_folder
from refilled.storage.object_storage import ObjectStorage
from refilled.student_files import write_student_files
from refilled.tasks.classification import load_task
from refilled.training.compute import Compute
from tune.tracking.mlflow_model import write_mlflow_model


def test_files_are_written_where_the_run_was_not_and_reach_others(run: RunConfig, machines: Machines) -> None:
    run = run.with_overrides({"method": "student", "epochs": (0, 2), "val_fraction": 0.0, "precision": "bfloat16"})
    value = refit(run, machines.at("trainer"), Compute(torch.device("cpu"), "bfloat16"))
    driver = machines.at("driver")
    assert isinstance(driver, ObjectStorage)
    folder, classes = run_folder(run, driver), load_task(run, driver).spaces.student
    assert not folder.path.exists()
    record = write_student_files(folder, origin(run, folder), classes, ("torch",), num_threads=1)
    write_mlflow_model(folder, {"run_key": folder.path.name})
    assert record["export"]["torch"]["precision"] == "bfloat16"  # as its configuration says, which came with it
    assert record["export"]["torch"]["test_accuracy"] == value
    place = folder.path.relative_to(driver.root).as_posix()
    for name in ("result.json", "model/MLmodel"):  # as after a kill, before their upload
        obstore.delete(driver._store, f"{place}/{name}")
    folder.complete()
    other = machines.at("other")
    found = run_folder(run, other)
    other.pull(found.path)
    there, here = ({path.relative_to(each.path) for path in each.path.rglob("*")} for each in (found, folder))
    assert there == here
    names = {path.as_posix() for path in there}
    assert {"student.safetensors", "student.pt2", "README.md", "result.json", "model/MLmodel"} <= names
