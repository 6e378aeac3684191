"""The cluster files, read by those who will read them: Ray, MLflow, the shell, Docker's linter, our own command."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster_texts import (
    CLUSTERS,
    LAUNCHER_FILES,
    ROOT,
    arguments_after,
    manifest,
    manifests,
    names,
    ports,
    search_arguments,
    text,
)

import tune.search
from refilled.config import SearchConfig
from tune.backend.cluster import fit_nodes
from tune.backend.nodes import Nodes, launcher_nodes

SCRIPTS = [name for name in names() if name.endswith(".sh")]
PLACES = ["aws.yaml", "gcp.yaml", "kuberay/kustomization.yaml", "slurm.sh", "Dockerfile", "laptop.md"]
PARTS = [f"kuberay/{name}" for name in manifests("kuberay/kustomization.yaml")[0]["resources"]]
TOOLS = Path(sys.executable).parent


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_accepts_launcher_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(manifests(name)[0])
    validate_config(config)
    assert set(config) - set(manifests(name)[0]) <= {  # nothing was misspelt and then filled in with a default
        *("cluster_synced_files", "file_mounts_sync_continuously", "head_setup_commands", "rsync_exclude"),
        *("rsync_filter", "setup_commands", "worker_setup_commands"),
    }


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_head_stays_and_workers_are_spot(name: str) -> None:
    kinds = manifests(name)[0]["available_node_types"]
    assert "spot" not in yaml.safe_dump(kinds["head"]).lower()
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert "spot" in yaml.safe_dump(kinds["worker"]).lower()
    assert kinds["worker"]["min_workers"] == 0
    assert kinds["worker"]["resources"]["GPU"] > 0


@pytest.mark.parametrize("name", [*LAUNCHER_FILES, "slurm.sh", "laptop.md"])
def test_ray_start_takes_the_flags(name: str) -> None:
    from ray.scripts.scripts import start

    calls = arguments_after(name, ["ray", "start"])
    calls += [[*_bash_array(text(name), "common"), *each[1:]] for each in arguments_after(name, ["start_node"])]
    parsed = [start.make_context("ray start", _numbers_for_variables(each)).params for each in calls]
    assert any(each["head"] for each in parsed)
    for each in parsed:
        used = [value for option, value in each.items() if option.endswith("_port") and value]
        assert len(used) == len(set(used))
    assert all(each["dashboard_host"] == "127.0.0.1" for each in parsed if each["head"])
    assert name == "laptop.md" or any(each["address"] and not each["head"] for each in parsed)
    assert all(each["num_cpus"] == 0 for each in parsed if each["head"] and name in LAUNCHER_FILES)


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")  # MLflow's, of its own code
@pytest.mark.parametrize("name", [*LAUNCHER_FILES, "kuberay/mlflow.yaml"])
def test_mlflow_server_takes_the_flags_and_asks_for_a_password(name: str) -> None:
    from mlflow.cli import cli

    if name in LAUNCHER_FILES:
        (arguments,) = arguments_after(name, ["mlflow", "server"])
    else:
        (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
        arguments = [*container["command"], *container["args"]][2:]
    parsed = cli.commands["server"].make_context("mlflow server", list(arguments)).params
    assert parsed["app_name"] == "basic-auth"
    assert parsed["port"] == 5000
    assert parsed["host"] == ("127.0.0.1" if name in LAUNCHER_FILES else "0.0.0.0")
    assert "MLFLOW_AUTH_CONFIG_PATH" in text(name)
    assert "default_permission = NO_PERMISSIONS" in text("mlflow-auth.ini")


@pytest.mark.parametrize("name", [name for name in names() if search_arguments(name)])
def test_search_takes_the_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = _parsed_searches(name, monkeypatch)
    assert len(parsed) == len(search_arguments(name))
    for search in parsed:
        assert "://" not in search.storage
        assert ":" not in (search.study_storage or "").rpartition("@")[0].partition("://")[2]  # no password


def test_every_place_starts_a_search() -> None:
    assert {name for name in PLACES if not search_arguments(name)} == set()


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "kuberay/kustomization.yaml", "kuberay/search.yaml"])
def test_search_fits_its_cluster(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in LAUNCHER_FILES:
        largest = launcher_nodes(manifests(name)[0])
    else:
        (workers,) = manifest("RayCluster")["spec"]["workerGroupSpecs"]
        (container,) = workers["template"]["spec"]["containers"]
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        largest = [Nodes(float(workers["rayStartParams"]["num-cpus"]), float(gpus), workers["maxReplicas"])]
    (search,) = _parsed_searches(name, monkeypatch)
    assert fit_nodes(search, [Nodes(0, 0)], largest).slots == 16


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_job_fills_in_the_databases_address(name: str, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    (words,) = arguments_after(name, ["ray", "job", "submit"])
    entrypoint = shlex.join(words[words.index("--") + 1 :])  # as `ray job submit` hands it to the head's shell
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REFILLED_STUDIES": "postgresql://host/studies?a=b"}
    done = subprocess.run(entrypoint, shell=True, env=environment, capture_output=True, text=True, check=True)
    printed = done.stdout.splitlines()
    assert printed[printed.index("--study-storage") + 1] == "postgresql://host/studies?a=b"


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    _run([TOOLS / "shellcheck", CLUSTERS / name])
    assert os.access(CLUSTERS / name, os.X_OK)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_shellcheck_finds_nothing_in_launcher_commands(name: str, tmp_path: Path) -> None:
    config = manifests(name)[0]
    script = tmp_path / "commands.sh"
    script.write_text(
        "#!/usr/bin/env bash\n" + "\n".join(each for key in config if key.endswith("_commands") for each in config[key])
    )
    # The file of secrets is not there; Ray itself sets RAY_HEAD_IP and expands the tilde.
    _run([TOOLS / "shellcheck", "--exclude", "SC1091,SC2154,SC2088", script])


def test_hadolint_finds_nothing() -> None:
    _run([TOOLS / "hadolint", "--failure-threshold", "info", CLUSTERS / "Dockerfile"])


def test_dockerfile_copies_what_the_ignore_file_lets_through() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        word for words in re.findall(r"^COPY (.+)$", text("Dockerfile"), re.MULTILINE) for word in words.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / each).exists() for each in copied)
    assert re.search(r"^USER 1000$", text("Dockerfile"), re.MULTILINE)


@pytest.mark.parametrize("name", names())
def test_no_secret_in_file(name: str) -> None:
    content = text(name)
    assert not re.findall(r"\b[0-9a-fA-F]{32,}\b|\b(?=[A-Za-z+/]*\d)[A-Za-z0-9+/]{40,}", content)
    assert not re.findall(r"://[^\s/@:'\"]+:[^\s/@]+@", content)
    values = re.findall(r"(?i)(?:password|secret_key|token|signing[-_]key)\s*[:=]\s*['\"]?([^\s'\"]+)", content)
    assert [each for each in values if not re.match(r"[$<{/]|(?:false|without|no|another)\b", each)] == []
    assert "kind: Secret\n" not in content


@pytest.mark.parametrize("name", PLACES)
def test_place_opens_with_its_commands(name: str) -> None:
    lines = [line.removeprefix("#").strip() for line in text(name).splitlines()[:32]]
    steps = " ".join(line for line in lines if line.startswith("# "))
    assert all(re.search(word, steps) for word in ("start", "submit", "watch|follow", "stop"))
    assert "What it costs to leave it on" in " ".join(lines)


@pytest.mark.parametrize("name", PARTS)
def test_part_says_where_the_commands_are(name: str) -> None:
    assert text(name).splitlines()[0].startswith("# Part of kustomization.yaml, whose first lines have the commands")


def test_readmes_table_has_every_port() -> None:
    listening: dict[str, set[int]] = {}
    for numbers, files in re.findall(r"^\| (\d[^|]*)\|[^|]*\|([^|]*)\|", text("README.md"), re.MULTILINE):
        for name in files.split(","):
            listening.setdefault(name.strip(), set()).update(int(each) for each in re.findall(r"\d+", numbers))
    listed = set().union(*listening.values())
    names_service = {53}  # which the cluster has, and the policies let pods ask
    for name in names():
        assert listening.get(name, set()) <= ports(name)
        assert ports(name) - names_service <= listed
    assert set(listening) >= {name for name in PLACES if ports(name) and "kustomization" not in name}


def test_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    environment = os.environ | {"REFILLED_SECRETS": str(folder)}
    command = ["bash", str(CLUSTERS / "secrets.sh"), "db.example"]
    refused = subprocess.run(command, env=environment, input="", capture_output=True, text=True)
    assert refused.returncode == 1
    assert "standard input" in refused.stderr
    made = subprocess.run(command, env=environment, input="pass:word\n", capture_output=True, text=True, check=True)
    kept = {path.name: path.read_text() for path in folder.iterdir()}
    assert kept["pgpass"] == "db.example:5432:*:refilled:pass\\:word\n"
    assert re.fullmatch(r"[0-9a-f]{64}", kept["token"])
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    printed = made.stdout + made.stderr
    assert not any(
        secret in printed for secret in ("pass:word", kept["token"], *re.findall(r"=([0-9a-f]{64})", kept["env"]))
    )
    subprocess.run(command, env=environment, input="another\n", capture_output=True, text=True, check=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == kept


def _parsed_searches(name: str, monkeypatch: pytest.MonkeyPatch) -> list[SearchConfig]:
    """What the real command line makes of the arguments, short of searching."""
    parsed: list[SearchConfig] = []

    def keep(search: SearchConfig) -> int:
        parsed.append(search)
        return 0

    monkeypatch.setattr(tune.search, "main", keep)
    for arguments in search_arguments(name):
        assert tune.search.command(arguments) == 0, arguments
    return parsed


def _bash_array(content: str, name: str) -> list[str]:
    return [word for line in re.findall(rf"^\s*{name}\+?=\((.+)\)$", content, re.MULTILINE) for word in line.split()]


def _numbers_for_variables(words: list[str]) -> list[str]:
    return [re.sub(r'^"?\$\{?\w+(:-1)?\}?"?$', "1", word) for word in words]


def _run(command: list[Path | str]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
