"""Terms and networks from files of the user's: loaded from the run's own copy, and refused in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from outcomes import Interruption, assert_same_outcome, interrupt_at
from users_files import NETWORK, TERM, small

from refilled.config import RunConfig, Sources
from refilled.errors import UserError
from refilled.execution import execute, pretrain_once, run_folder
from refilled.identity import run_key
from refilled.models import build_model
from refilled.stages import check, complete, stages_of
from refilled.storage import Storage
from refilled.storage.model_file import load_model
from refilled.storage.tensor_file import load_tensors
from refilled.tasks.classification import load_task
from refilled.training.compute import Compute
from refilled.user_code import forget_modules, load_object, read_source


@pytest.mark.parametrize("form", ["{}", "{}>cross_entropy", "rkd>cross_entropy+lkd+{}"])
def test_a_users_term_is_trained_like_the_packages_own(form: str, own: Path, compute: Compute) -> None:
    run = small(form.format(f"{own}/own.py:Regression"))
    assert "regression" in [term.name for stage in stages_of(run) for term in stage.terms]
    storage = Storage.open(own / "storage")
    assert execute(run, storage, compute).finished
    about = json.loads((run_folder(run, storage).path / "config.json").read_text())
    assert about["config"]["terms"]["regression"] == {"weight": 2.0}
    assert about["config"]["sources"] == {f"{own}/own.py": TERM}


def test_the_runs_copy_counts_not_the_file(own: Path, compute: Compute, tmp_path: Path) -> None:
    """A worker on another machine has no file, and a finished run is found though its file has gone."""
    run = small(f"{own}/own.py:Regression")
    storage = Storage.open(tmp_path / "storage")
    row = execute(run, storage, compute)
    (own / "own.py").unlink()
    again = RunConfig.from_dict(json.loads(json.dumps(run.to_dict())))
    assert execute(again, storage, compute) == row


def test_the_text_is_part_of_what_a_run_is_and_the_path_is_not(own: Path, storage: Storage) -> None:
    run = small(f"{own}/own.py:Regression")
    task = load_task(run, storage)
    key = run_key(run, task.spaces, task.data_digest)
    (own / "moved.py").write_text(TERM)
    moved = small(f"{own}/moved.py:Regression")
    assert run_key(moved, task.spaces, task.data_digest) == key
    (own / "own.py").write_text(TERM + "\n")
    assert run_key(small(f"{own}/own.py:Regression"), task.spaces, task.data_digest) != key


def test_users_term_has_its_own_settings(own: Path) -> None:
    run = small(f"{own}/own.py:Regression")
    assert complete(run).terms.to_dict() == {"regression": {"weight": 2.0}}
    with pytest.raises(UserError, match=r"Unknown setting terms\.regression\.wait; term regression has weight"):
        check(run.with_overrides({"terms.regression.wait": 1.0}))


def test_a_users_network_is_trained_kept_and_loaded(own: Path, compute: Compute) -> None:
    run = small("student", student=f"{own}/net.py:Tiny")
    storage = Storage.open(own / "storage")
    execute(run, storage, compute)
    path = run_folder(run, storage).model_path
    (own / "net.py").unlink()
    model = load_model(path)
    assert type(model).__name__ == "Tiny"
    assert model.num_classes == 5


def test_a_users_network_begins_alike_wherever_it_is_built(own: Path) -> None:
    """Parameters that its constructor draws too, whatever the global generator was at."""
    sources = read_source(f"{own}/net.py:Tiny", "student")
    built = []
    for number in range(2):
        torch.manual_seed(number)
        model = build_model(
            f"{own}/net.py:Tiny", num_classes=3, in_channels=1, image_size=8, dropout=0.0, seed=5, sources=sources
        )
        built.append(model.state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("{}/none.py:Name", "method must name a Python file that can be read"),
        ("{}/own.py:Missing", "which has no 'Missing'"),
        ("{}/own.py:NOTHING", "method must name a subclass of refilled.terms.Term"),
        ("{}/bad.py:Name", "raises SyntaxError"),
        ("{}/raises.py:Name", "raises ZeroDivisionError: division by zero"),
        ("{}/nameless.py:Nameless", "must have a class attribute `name`"),
        ("{}/binary.py:Name", "method must name a Python file that can be read"),
    ],
)
def test_what_is_no_term_is_refused(method: str, sentence: str, own: Path) -> None:
    (own / "bad.py").write_text("def :")
    (own / "raises.py").write_text("1 / 0")
    (own / "nameless.py").write_text("from refilled.terms import Term\nclass Nameless(Term): pass\n")
    (own / "binary.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError) as caught:
        check(small(method.format(own)))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("broken", "raises RuntimeError: no such network"),
        ("other", "must take images of 3 x 8 x 8, but raises"),
    ],
)
def test_what_is_no_network_is_refused(name: str, sentence: str, own: Path) -> None:
    reference = f"{own}/net.py:{name}"
    with pytest.raises(UserError, match=sentence):
        build_model(
            reference, num_classes=2, in_channels=1, image_size=8, seed=0, sources=read_source(reference, "student")
        )


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('student=frozenset({"embedding"})', 'student=frozenset({"embeding"})', "of the student, got 'embeding'"),
        ('teacher=frozenset({"embedding"})', 'teacher=frozenset({"maps"})', "of the teacher, got 'maps'"),
        ('Searched("weight"', 'Searched("wieght"', "must search settings of its Config, which has no 'wieght'"),
        ("@dataclass(frozen=True, kw_only=True)\n", "", "a Config that is a frozen dataclass"),
        (
            "(frozen=True, kw_only=True)",
            "(kw_only=True)",
            "cannot inherit non-frozen dataclass from a frozen one, in line",
        ),
        ("needs: ClassVar[Needs] = Needs(", "needs: ClassVar[Needs] = dict(", "must have needs that are Needs"),
    ],
)
def test_an_attribute_that_would_be_passed_over_is_refused(old: str, new: str, sentence: str, own: Path) -> None:
    assert old in TERM
    (own / "own.py").write_text(TERM.replace(old, new))
    with pytest.raises(UserError) as caught:
        check(small(f"{own}/own.py:Regression"))
    assert sentence in str(caught.value)


def test_two_terms_of_one_name_are_refused(own: Path) -> None:
    (own / "other.py").write_text(TERM + "\n")
    with pytest.raises(UserError, match="two classes are called 'regression'"):
        check(small(f"cross_entropy+{own}/own.py:Regression+{own}/other.py:Regression"))


def test_a_term_must_not_take_the_name_of_a_setting(own: Path) -> None:
    (own / "views.py").write_text(TERM.replace('= "regression"', '= "views"'))
    with pytest.raises(UserError, match="that no term or setting has"):
        check(small(f"{own}/views.py:Regression"))


def test_a_traceback_shows_the_users_line(own: Path) -> None:
    sources = Sources((("f.py", "def fail():\n    raise KeyError('here')\n"),))
    fail = load_object("f.py:fail", sources, "method")
    try:
        fail()
    except KeyError:
        assert "raise KeyError('here')" in traceback.format_exc()


def test_text_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"must come with the text of 'f\.py' in `sources`"):
        load_object("f.py:A", Sources(), "method")


def test_module_is_the_texts_not_the_paths(own: Path) -> None:
    """Two versions of a file live side by side in one process, as trials of two searches do."""
    texts = [Sources((("f.py", f"VALUE = {number}\n"),)) for number in (1, 2)]
    assert [load_object("f.py:VALUE", each, "method") for each in (*texts, texts[0])] == [1, 2, 1]


def test_loading_a_term_needs_no_file_in_another_process(own: Path) -> None:
    run = small(f"{own}/own.py:Regression")
    (own / "own.py").unlink()
    code = (
        "import json, sys\nfrom refilled.config import RunConfig\nfrom refilled.stages import stages_of\n"
        "run = RunConfig.from_dict(json.load(sys.stdin))\nprint([t.__name__ for s in stages_of(run) for t in s.terms])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(run.to_dict()),
        capture_output=True,
        text=True,
        check=True,
        cwd=own,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "['CrossEntropy', 'Regression']"


DROPPING = NETWORK.replace("maps.relu()", "nn.functional.dropout(maps.relu(), training=self.training)")
RANDOM_TERM = TERM.replace(
    "self.projection = nn.Linear(setting.student.embedding_dim, setting.known_teacher.embedding_dim)",
    "self.projection = nn.Bilinear(1, setting.student.embedding_dim, setting.known_teacher.embedding_dim)",
).replace("self.projection(local", "self.projection(local.student.embedding[:, :1], local")
assert "Bilinear" in RANDOM_TERM


def test_what_a_terms_constructor_draws_follows_from_the_runs_seed(own: Path, compute: Compute) -> None:
    (own / "own.py").write_text(RANDOM_TERM)
    losses = []
    for number in range(2):
        torch.manual_seed(number)
        storage = Storage.open(own / str(number))
        losses.append(execute(small(f"{own}/own.py:Regression"), storage, compute).train_loss)
    assert losses[0] == losses[1]


def test_a_network_that_draws_goes_on_as_if_it_had_not_been_interrupted(own: Path, compute: Compute) -> None:
    (own / "net.py").write_text(DROPPING)
    run = small("student", student=f"{own}/net.py:Tiny", epochs=(0, 4))
    whole, parts = (Storage.open(own / name) for name in ("whole", "parts"))
    execute(run, whole, compute)
    with pytest.raises(Interruption):
        execute(run, parts, compute, interrupt_at(2))
    torch.manual_seed(99)
    execute(run, parts, compute)
    assert_same_outcome(run_folder(run, parts), run_folder(run, whole))


def test_a_file_that_ends_the_process_is_refused(own: Path) -> None:
    (own / "ends.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match="raises SystemExit"):
        check(small(f"{own}/ends.py:Name"))


def test_a_module_that_was_interrupted_is_loaded_again() -> None:
    sources = Sources((("f.py", "import os\nif not os.environ.get('REFILLED_GO'): raise KeyboardInterrupt\nA = 1\n"),))
    with pytest.raises(KeyboardInterrupt):
        load_object("f.py:A", sources, "method")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFILLED_GO", "1")
        assert load_object("f.py:A", sources, "method") == 1


def test_a_byte_order_mark_is_no_syntax_error(own: Path) -> None:
    (own / "marked.py").write_bytes(b"\xef\xbb\xbf" + TERM.encode())
    check(small(f"{own}/marked.py:Regression"))


def test_state_of_a_module_is_forgotten_between_jobs() -> None:
    sources = Sources((("f.py", "SEEN = []\n"),))
    load_object("f.py:SEEN", sources, "method").append(1)
    forget_modules()
    assert load_object("f.py:SEEN", sources, "method") == []


def test_a_head_that_does_not_fit_is_refused(own: Path) -> None:
    (own / "net.py").write_text(NETWORK.replace("nn.Linear(6, num_classes)", "nn.Linear(6, 10)"))
    reference = f"{own}/net.py:Tiny"
    with pytest.raises(
        UserError, match=r"must have a head nn\.Linear\(6, 3\), got Linear\(in_features=6, out_features=10"
    ):
        build_model(
            reference, num_classes=3, in_channels=1, image_size=8, seed=0, sources=read_source(reference, "student")
        )


def test_a_teacher_is_made_of_its_own_file_alone(own: Path, compute: Compute) -> None:
    """Whoever asks for it first, its identity is the same, and with it that of its cache."""
    paths = []
    for number, method in enumerate(("refilled", f"{own}/own.py:Regression")):
        run = small(method, teacher=f"{own}/net.py:Tiny")
        paths.append(pretrain_once(run, Storage.open(own / str(number)), compute).model_path)
    assert paths[0].parent.name == paths[1].parent.name
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert load_tensors(paths[1])["sources"] == {f"{own}/net.py": NETWORK}
