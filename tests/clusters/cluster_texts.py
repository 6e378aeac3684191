"""What the files of clusters/ say: their commands, their YAML and the ports they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
LAUNCHER_FILES = ("aws.yaml", "gcp.yaml")
_OPERATORS = {"&", "&&", "||", ";", "|", ">", "<", "2>&1", "<<"}


def names() -> list[str]:
    """Every file of the folder, as its path in it."""
    return sorted(str(path.relative_to(CLUSTERS)) for path in CLUSTERS.rglob("*") if path.is_file())


def text(name: str) -> str:
    return (CLUSTERS / name).read_text(encoding="utf-8")


def manifests(name: str) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [each for each in yaml.safe_load_all(text(name)) if each is not None]


def all_manifests() -> list[dict[str, Any]]:
    """Every Kubernetes object, the job of a search included."""
    resources = manifests("kuberay/kustomization.yaml")[0]["resources"]
    return [each for name in [*resources, "search.yaml"] for each in manifests(f"kuberay/{name}")]


def manifest(kind: str, name: str | None = None) -> dict[str, Any]:
    """The one object of a kind and a name."""
    (found,) = [
        each for each in all_manifests() if each["kind"] == kind and name in (None, each["metadata"].get("name"))
    ]
    return found


def commands(name: str) -> list[list[str]]:
    """Every shell command of a file as its words: of its comments and code blocks, and of its YAML's values."""
    lines = _lines(text(name), comments_only=name.endswith(".yaml"))
    values = _values(manifests(name)) if name.endswith(".yaml") else []
    return [words for line in [*lines, *values] for words in _split(line)]


def arguments_after(name: str, program: Sequence[str]) -> list[list[str]]:
    """What follows a program's words in a file's commands, up to an operator of the shell."""
    size, found = len(program), []
    for each in commands(name):
        words = [word.removeprefix(".venv/bin/") for word in each]
        for at in range(len(words) - size + 1):
            if words[at : at + size] == list(program):
                rest = words[at + size :]
                end = next((index for index, word in enumerate(rest) if word.rstrip(";") in _OPERATORS), len(rest))
                found.append([word.rstrip(";") for word in rest[:end]])
    return found


def search_arguments(name: str) -> list[list[str]]:
    """The arguments of every search that a file starts."""
    programs = (["python", "tune/search.py"], ["python", "-m", "tune.search"], ["clusters/slurm.sh"])
    return [each for program in programs for each in arguments_after(name, program)]


def ports(name: str) -> set[int]:
    """Every port that a file names: after a word for it, or after a host."""
    stated = re.findall(r"(?i)\bport(?:[ :=\",]|Name)+(\d{2,5})\b", text(name))
    stated += re.findall(r"(?i)(?:-port|containerPort|port)[ :=\",]+(\d{2,5})\b", text(name))
    stated += re.findall(r"(?:[A-Za-z\"]|127\.0\.0\.1):(\d{4,5})\b", text(name))
    stated += re.findall(r"service/\S+ (\d{4,5})\b", text(name))
    stated += re.findall(r"-port` \(the default is (\d+)\)", text(name))
    return {int(each) for each in stated}


def _lines(content: str, *, comments_only: bool) -> list[str]:
    """Lines without comment signs, those that end with a backslash joined."""
    lines = [line for line in content.splitlines() if not comments_only or line.lstrip().startswith("#")]
    bare = [re.sub(r"^\s*#?\s*", "", line) for line in lines]
    return re.sub(r"\\\n", " ", "\n".join(bare)).splitlines()


def _values(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for each in node.values():
            yield from _values(each)
    elif isinstance(node, list):
        for each in node:
            yield from _values(each)


def _split(line: str) -> list[list[str]]:
    """A line's words, and those of every command that is quoted in it; prose with an odd quote has none."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    inner = [each for word in words if " " in word and word != line for each in _split(word)]
    return [words, *inner]
