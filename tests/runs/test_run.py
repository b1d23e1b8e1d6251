from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import DataError, ModelError, RecipeError, RlhfError
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.runs import directory, files
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.metrics import number, read_lines
from tests.runs.helpers import make_model, make_recipe, tree

LINEAGE = {"base": {"name": "model", "fingerprint": "sha256:1"}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(root: Path, resume: str = "auto", **training: Any) -> Run:
    return Run.open(make_recipe(root, **training), "rlhf sft recipe.yaml", resume)


def checkpoint_at(run: Run, step: int) -> Path:
    """A checkpoint as far as the run directory looks at it: whole, without tensors."""
    from rlhf_cli.train import checkpoint

    return checkpoint.save(run.checkpoints, f"step-{step:06d}", {}, {"step": step, "sizes": run.sizes()}, 9)


def trained(root: Path, steps: int = 2, saved: bool = True, finished: bool = True, **training: Any) -> Path:
    with opened(root, **training) as run:
        run.begin(LINEAGE)
        for step in range(1, steps + 1):
            run.log({"step": step, "loss": 1 / step})
            if saved:
                checkpoint_at(run, step)
        if finished:
            run.finish({"loss": 0.5})
    return run.path


def refused(root: Path, kind: type[RlhfError] = RecipeError, **how: Any) -> str:
    before = tree(root)
    with pytest.raises(kind) as error:
        opened(root, **how)
    assert tree(root) == before
    return str(error.value)


# --- the decision table ----------------------------------------------------------------------------------


def test_open_writes_nothing(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    before = tree(tmp_path)
    assert opened(tmp_path).status == "fresh"
    assert tree(tmp_path) == before


def test_empty_directory_is_fresh(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert opened(tmp_path).status == "fresh"


def test_leftovers_of_a_killed_begin_are_fresh(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    (path / ".lock").write_text("1 host")
    (path / ".run.json.tmp-1").write_text("{")
    with opened(tmp_path) as run:
        run.begin(LINEAGE)
        assert sorted(os.listdir(path)) == [".lock", "recipe.yaml", "run.json"]
    assert sorted(os.listdir(path)) == ["recipe.yaml", "run.json"]


def test_finished_is_done(tmp_path: Path) -> None:
    trained(tmp_path)
    assert opened(tmp_path).status == "done"
    assert opened(tmp_path, micro_batch_tokens=99).status == "done"


def test_interrupted_resumes_with_a_checkpoint_only(tmp_path: Path) -> None:
    trained(tmp_path, finished=False, saved=False)
    assert opened(tmp_path).status == "fresh"
    trained(tmp_path, finished=False)
    assert opened(tmp_path).status == "resume"


def test_max_steps(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=2)
    assert opened(tmp_path, max_steps=2).status == "done"
    assert opened(tmp_path, max_steps=1).status == "done"
    assert opened(tmp_path, max_steps=5).status == "resume"
    assert opened(tmp_path).status == "resume"


def test_more_steps_than_the_data_has(tmp_path: Path) -> None:
    trained(tmp_path, steps=2, max_steps=50)
    assert opened(tmp_path, max_steps=50).status == "done"


def test_more_steps_without_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, saved=False, max_steps=2)
    assert "finished at step 2 and has no checkpoint" in refused(tmp_path, max_steps=3)


def test_another_recipe_is_refused_with_its_keys(tmp_path: Path) -> None:
    trained(tmp_path)
    text = refused(tmp_path, learning_rate=2e-3, num_epochs=2.0)
    assert "training.learning_rate: 0.001 -> 0.002" in text
    assert "training.num_epochs: 1.0 -> 2.0" in text
    assert "--resume never archives the old run" in text
    assert len(text.splitlines()) == 2


def test_changed_data_is_named(tmp_path: Path) -> None:
    trained(tmp_path, finished=False)
    (tmp_path / "train.jsonl").write_text('{"text": "b"}\n')
    assert f"{tmp_path}/train.jsonl has changed since the run there started" in refused(tmp_path)


def test_changed_model_is_named(tmp_path: Path) -> None:
    trained(tmp_path)
    make_model(tmp_path / "model", b"v" * 100)
    assert f"{tmp_path}/model has changed" in refused(tmp_path)


def test_a_strangers_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("x")
    make_recipe(tmp_path)
    for resume in ("auto", "never"):
        assert "is not empty and not a run (it holds thesis.txt)" in refused(tmp_path, resume=resume)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").write_text("x")
    assert "is a file" in refused(tmp_path)


def test_a_parent_that_cannot_be_created(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    (tmp_path / "runs").write_text("x")
    before = tree(tmp_path)
    with pytest.raises(RecipeError, match=r"cannot be created: .*runs is not a folder"):
        opened(tmp_path)
    assert tree(tmp_path) == before


def test_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_recipe(tmp_path)
    monkeypatch.setattr(files, "_refused", lambda place: "Read-only file system")
    assert "cannot write into" in refused(tmp_path)


@pytest.mark.parametrize(("code", "hint"), [(errno.ENOSPC, "free some space, then run it again"),
                                            (errno.EDQUOT, "free some space, then run it again"),
                                            (errno.EACCES, "run it again")])  # fmt: skip
def test_a_disk_that_refuses(code: int, hint: str) -> None:
    error = OSError(code, "why", "runs/a/.final.tmp-12/.x.json.tmp-3")
    said = files.disk_error(error, "cannot be written", Path("y"), f"{files.FREE}, then run it again")
    assert [str(problem) for problem in said.problems] == [f"runs/a/final/x.json: cannot be written: why ({hint})"]


def test_damaged_run_json(tmp_path: Path) -> None:
    path = trained(tmp_path)
    os.truncate(path / "run.json", 20)
    assert "run.json: is not valid JSON" in refused(tmp_path, ModelError)
    assert opened(tmp_path, "never").status == "fresh"


def test_missing_data(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    (tmp_path / "train.jsonl").rename(tmp_path / "trains.jsonl")
    recipe = Recipe.model_validate(make_recipe_dict(tmp_path))
    with pytest.raises(DataError, match=r"no such file or folder \(did you mean '.*trains.jsonl'\?\)"):
        Run.open(recipe, "", "auto")


def make_recipe_dict(root: Path) -> dict[str, Any]:
    return {
        "stage": "sft",
        "model": str(root / "model"),
        "data": {"train": str(root / "train.jsonl")},
        "training": {"learning_rate": 1e-3},
        "output_dir": str(root / "runs" / "a"),
    }


def test_reading_what_is_written_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path / "runs" / "a")
    recipe = Recipe.model_validate(make_recipe_dict(tmp_path) | {"model": str(path)})
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(RecipeError, match=r"the recipe reads .*runs/a from there"):
        Run.open(recipe, "", "never")


def test_missing_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.runs.trackers.find_spec", lambda name: None)
    make_recipe(tmp_path)
    recipe = Recipe.model_validate(make_recipe_dict(tmp_path) | {"logging": {"report_to": ["wandb"]}})
    with pytest.raises(RecipeError, match=r"wandb is not installed \(pip install 'rlhf-cli\[wandb\]'\)"):
        Run.open(recipe, "", "auto")


# --- never, and a checkpoint by name ---------------------------------------------------------------------


def test_never_archives_and_overwrites_nothing(tmp_path: Path) -> None:
    path = trained(tmp_path)
    old = tree(path)
    with opened(tmp_path, "never", learning_rate=1.0) as run:
        assert run.status == "fresh"
        assert tree(path) == old
        run.begin(LINEAGE)
    names = sorted(os.listdir(path.parent))
    assert len(names) == 2
    assert tree(path.parent / names[1]) == old
    assert sorted(os.listdir(path)) == ["recipe.yaml", "run.json"]


def test_never_gives_the_name_back_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained(tmp_path)
    old = tree(path.parent)
    run = opened(tmp_path, "never")
    monkeypatch.setattr(directory, "write", _full_disk)
    with pytest.raises(ModelError, match=r"No space left"):
        run.begin(LINEAGE)
    assert tree(path.parent) == old


def _full_disk(path: Path, data: bytes) -> None:
    raise OSError(28, "No space left on device", str(path))


def test_resume_from_a_named_checkpoint_gives_up_later_ones(tmp_path: Path) -> None:
    path = trained(tmp_path, steps=4)
    with opened(tmp_path, str(path / "checkpoints" / "step-000002")) as run:
        assert run.status == "resume"
        assert run.resume_from == path / "checkpoints" / "step-000002"
        run.begin(LINEAGE)
        assert sorted(os.listdir(run.checkpoints)) == ["step-000001", "step-000002"]
        assert not (path / "DONE").exists()


def test_resume_from_another_run_of_the_same_recipe(tmp_path: Path) -> None:
    path = trained(tmp_path, steps=3)
    chosen = path / "checkpoints" / "step-000002"
    recipe = make_recipe(tmp_path).model_copy(update={"output_dir": str(tmp_path / "runs" / "b")})
    with Run.open(recipe, "", str(chosen)) as run:
        assert run.status == "resume"
        run.begin(LINEAGE)
        assert run.rewind(json.loads((chosen / "state.json").read_text())["sizes"]) == []
        run.log({"step": 3, "loss": 9.0})
    assert [row["step"] for row in read_lines(run.path / "metrics.jsonl")] == [1, 2, 3]
    assert len(os.listdir(path / "checkpoints")) == 3


def test_named_checkpoints_that_will_not_do(tmp_path: Path) -> None:
    path = trained(tmp_path)
    chosen = path / "checkpoints" / "step-000001"
    assert "no such checkpoint" in refused(tmp_path, resume=str(path))
    assert "no such checkpoint" in refused(tmp_path, resume=str(chosen.with_name("step-000009")))
    assert "training.learning_rate" in refused(tmp_path, resume=str(chosen), learning_rate=3.0)
    (chosen / "state.json").write_text("{}")
    assert "not whole: state.json has" in refused(tmp_path, ModelError, resume=str(chosen))


# --- begin -----------------------------------------------------------------------------------------------


def test_run_json(tmp_path: Path) -> None:
    path = trained(tmp_path)
    run = json.loads((path / "run.json").read_text())
    assert run["role"] == "policy"
    assert run["stage"] == "sft"
    assert run["lineage"] == LINEAGE
    assert run["inputs"].keys() == {f"{tmp_path}/{n}" for n in ("train.jsonl", "model", "model tokenizer")}
    assert run["recipe"]["training"]["learning_rate"] == 1e-3
    assert "torch" in run["versions"]
    assert run["hardware"]["cpus"] >= 1
    done = json.loads((path / "DONE").read_text())
    assert done["digest"] == run["digest"]
    assert done["step"] == 2
    assert done["metrics"] == {"loss": 0.5}


def test_recipe_yaml_runs_again(tmp_path: Path) -> None:
    from rlhf_cli.recipe.reader import read_recipe

    path = trained(tmp_path)
    assert read_recipe(path / "recipe.yaml", [], "sft") == make_recipe(tmp_path)


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_recipe(tmp_path)
    before = tree(tmp_path)
    run = opened(tmp_path)
    monkeypatch.setattr(directory, "write", _full_disk)
    with pytest.raises(ModelError, match=r"run\.json: cannot set up the run directory: No space left"):
        run.begin(LINEAGE)
    assert tree(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_cli.recipe.reader.dump_recipe", lambda recipe: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opened(tmp_path).begin(LINEAGE)
    assert tree(tmp_path) == before


def test_other_models_on_resume_are_refused(tmp_path: Path) -> None:
    path = trained(tmp_path, finished=False)
    before = tree(path)
    with pytest.raises(ModelError, match=r'base.fingerprint: "sha256:1" -> "sha256:2"'), opened(tmp_path) as run:
        run.begin({"base": {"name": "model", "fingerprint": "sha256:2"}})
    assert tree(path) == before


def test_starting_over_clears_the_failed_attempt(tmp_path: Path) -> None:
    path = trained(tmp_path, saved=False, finished=False)
    assert (path / "metrics.jsonl").exists()
    with opened(tmp_path) as run:
        run.begin(LINEAGE)
    assert sorted(os.listdir(path)) == ["recipe.yaml", "run.json"]


def test_resume_notes_itself_and_removes_done_and_orphans(tmp_path: Path) -> None:
    path = trained(tmp_path, max_steps=2)
    (path / "checkpoints" / ".step-000003.tmp-1").mkdir()
    (path / "checkpoints" / "step-000002").rename(path / "checkpoints" / ".step-000002.old-1")
    with opened(tmp_path, max_steps=4) as run:
        run.begin(LINEAGE)
        assert sorted(os.listdir(run.checkpoints)) == ["step-000001", "step-000002"]
        assert not (path / "DONE").exists()
    assert len(json.loads((path / "run.json").read_text())["resumed"]) == 1
    assert "max_steps: 4" in (path / "recipe.yaml").read_text()


def test_second_process_is_refused_and_named(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        rival = opened(tmp_path)
        run.begin(LINEAGE)
        before = tree(tmp_path)
        with pytest.raises(ModelError, match=rf"process {os.getpid()} on \S+ is working in this run directory"):
            rival.begin(LINEAGE)
        with pytest.raises(ModelError, match=r"is working in this run directory"):
            opened(tmp_path, "never").begin(LINEAGE)
        assert tree(tmp_path) == before


def test_what_changed_since_open_is_noticed(tmp_path: Path) -> None:
    late = opened(tmp_path)
    trained(tmp_path)
    with pytest.raises(ModelError, match=r"changed this run meanwhile"):
        late.begin(LINEAGE)
    assert opened(tmp_path).status == "done"


def test_the_lock_of_a_killed_process_is_free_even_if_its_child_lives(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    script = (
        "import os, sys, time; from pathlib import Path\n"
        "from rlhf_cli.runs import lock\n"
        "folder = Path(sys.argv[1]); folder.mkdir(parents=True); lock.take(folder)\n"
        "child = os.fork()\n"
        "child or (print(os.getpid(), flush=True), os.kill(os.getppid(), 9))\n"
        "time.sleep(60)\n"
    )
    done = subprocess.Popen([sys.executable, "-c", script, "runs/a"], stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    child = int(done.stdout.readline())
    done.wait()
    try:
        with opened(tmp_path) as run:
            run.begin(LINEAGE)
    finally:
        os.kill(child, 9)
        done.stdout.close()


def race(root: Path, results: Any) -> None:
    try:
        with opened(root) as run:
            run.begin(LINEAGE)
            time.sleep(0.3)
        results.put("ran")
    except ModelError:
        results.put("refused")


def test_one_of_many_wins(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    context = get_context("fork")
    results = context.Queue()
    children = [context.Process(target=race, args=(tmp_path, results)) for _ in range(4)]
    for child in children:
        child.start()
    found = sorted(results.get(timeout=30) for _ in children)
    for child in children:
        child.join()
    assert found == ["ran", "refused", "refused", "refused"]
    assert sorted(os.listdir(tmp_path / "runs" / "a")) == ["recipe.yaml", "run.json"]


# --- lines -----------------------------------------------------------------------------------------------


def test_metric_lines_keep_every_digit_and_every_nan(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.begin(LINEAGE)
        run.log({"step": 1, "loss": 0.1 + 0.2, "a": math.nan, "b": math.inf, "c": -math.inf, "n": 2**60})
        run.sample({"step": 1, "prompt": "p\u2028\ud83d\ude00", "completion": "\n", "score": math.nan})
        text = (run.path / "metrics.jsonl").read_text()
        with pytest.raises(KeyError):
            run.log({"loss": 1.0})
    assert text == (
        '{"step": 1, "loss": 0.30000000000000004, "a": "NaN", "b": "Infinity", "c": "-Infinity", '
        '"n": 1152921504606846976}\n'
    )
    assert read_lines(run.path / "samples.jsonl")[0]["prompt"] == "p\u2028\ud83d\ude00"
    assert math.isnan(number("NaN") or 0)
    assert number("-Infinity") == -math.inf
    assert number("text") is None
    assert number(True) is None


def test_rewind_is_exact(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.begin(LINEAGE)
        run.log({"step": 1})
        sizes = run.sizes()
        kept = (run.path / "metrics.jsonl").read_bytes()
        run.log({"step": 2})
        run.sample({"step": 2})
        assert run.sizes()["metrics.jsonl"] > sizes["metrics.jsonl"]
        assert run.rewind(sizes) == []
        assert (run.path / "metrics.jsonl").read_bytes() == kept
        assert (run.path / "samples.jsonl").read_bytes() == b""
        run.log({"step": 2})
        assert [row["step"] for row in read_lines(run.path / "metrics.jsonl")] == [1, 2]
        assert run.rewind({}) == []
        assert run.sizes() == {"metrics.jsonl": 0, "samples.jsonl": 0}


def test_lost_lines_are_named(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.begin(LINEAGE)
        run.log({"step": 1})
        run.log({"step": 2})
        sizes = run.sizes()
        os.truncate(run.path / "metrics.jsonl", sizes["metrics.jsonl"] - 3)
        assert "lines were lost" in run.rewind(sizes)[0]
        assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_full_disk_while_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as run:
        run.begin(LINEAGE)
        monkeypatch.setattr(os, "write", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ModelError, match=r"metrics\.jsonl: cannot append: No space left"):
            run.log({"step": 1})


def test_cut_last_line_is_left_out_and_others_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_lines(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 1}\n')
    with pytest.raises(ModelError, match=r"m\.jsonl:1: is not valid JSON"):
        read_lines(path)


def test_finish_is_last_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as run:
        run.begin(LINEAGE)
        run.write_data_report({"train": {"kept": 1}})
        run.final.mkdir()
        (run.final / "w").write_text("x")
        monkeypatch.setattr(directory, "write", _full_disk)
        with pytest.raises(ModelError, match=r"No space left"):
            run.finish({"loss": 1.0})
        assert not (run.path / "DONE").exists()
        monkeypatch.undo()
        run.log({"step": 7})
        run.finish({"loss": math.nan})
    assert json.loads((run.path / "DONE").read_text())["metrics"] == {"loss": "NaN"}
    assert json.loads((run.path / "DONE").read_text())["step"] == 7
    run.close()


def test_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; import rlhf_cli.runs.directory, rlhf_cli.runs.trackers, rlhf_cli.report.page\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
