"""Repositories on a Hub: pushed by every way there is, loaded by id where only torch and transformers are installed."""

import json
import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.clean_environment import clean_python  # noqa: F401 - a fixture
from tests.loopback_hub import LoopbackHub
from tests.processes import forked
from xlm_hf.families import families

ROOT = Path(__file__).parents[2]
FEW = ["size=tiny", "task.num_train=40", "task.num_validation=4", "task.num_test=8"]
STEPS = ["trainer.max_steps=4", "trainer.save_steps=2", "trainer.eval_steps=2", "trainer.ema_decay=0.5"]
TEXT = {".json", ".md", ".py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


def python(hub, folder, *arguments, token="hf_loopback"):
    environment = hub.environment(folder / "home", token)
    return subprocess.run(
        forked(*arguments, **environment),
        env={**{name: value for name, value in os.environ.items() if name != "HF_TOKEN"}, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def run(hub, folder):
    def run(*arguments, name="ilm_star", token="hf_loopback"):
        script = str(ROOT / "examples" / "run_xlm.py")
        return python(hub, folder, script, "--config-name", name, *FEW, *STEPS, *arguments, token=token)

    return run


@pytest.fixture(scope="module")
def trained(run, folder):
    """A run that pushed every checkpoint and its end."""
    pushes = ["trainer.push_to_hub=true", "trainer.hub_strategy=every_save", "trainer.hub_model_id=xlm/ilm-star"]
    result = run("output_dir=run", *pushes, "trainer.hub_always_push=true")
    assert result.returncode == 0, result.stderr
    return folder / "run"


CALLS = """
import contextlib, io, json, os, sys
from xlm_hf.cli import main

endings = []
for arguments in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = "" if "HF_TOKEN=" in arguments else "hf_loopback"
    sys.argv = ["run_xlm.py", *(argument for argument in arguments if argument != "HF_TOKEN=")]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            main()
        endings.append("0")
    except SystemExit:
        endings.append(errors.getvalue().strip().splitlines()[-1])
print(json.dumps(endings))
"""


@pytest.fixture(scope="module")
def calls(hub, folder):
    """Run several command lines in one process; of each the sentence that it ends with, or "0"."""

    def run(*commands):
        lines = [["--config-name", "ilm_star", *FEW, *STEPS, *command] for command in commands]
        result = python(hub, folder, "-c", CALLS, json.dumps(lines))
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


def test_the_trainer_pushes_what_its_folder_model_holds_and_nothing_else(hub, trained):
    files = hub.files("xlm/ilm-star")
    assert files == {file.name: file.read_bytes() for file in (trained / "model").iterdir()}
    assert {Path(name).suffix for name in files} == {*TEXT, ".safetensors"}
    commits = hub.repositories["xlm/ilm-star"]["commits"]
    # The empty one, two checkpoints, and the end.
    assert len(commits) == 4
    in_progress = [commit["files"] for commit in commits[1:]]
    assert all(files.keys() == commit.keys() for commit in in_progress)
    weights = [commit["model.safetensors"] for commit in in_progress]
    assert weights[0] != weights[1] == weights[2]
    assert "Optimiser steps: 2" in in_progress[0]["README.md"].decode()


def test_the_card_tells_of_the_run(hub, trained, capsys):
    card = ModelCard(hub.files("xlm/ilm-star")["README.md"].decode())
    metrics = json.loads((trained / "metrics.json").read_text())
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["test/exact_match"].metric_value == metrics["test/exact_match"]
    standard_error = metrics["test/token_accuracy_standard_error"]
    assert results["test/token_accuracy"].metric_args == {"samples": 8, "standard_error": standard_error}
    assert 'from_pretrained("xlm/ilm-star", trust_remote_code=True)' in card.text
    assert card.text.startswith("\n# ilm-star\n")
    assert "Star graphs as a seq2seq task: prompt = shuffled edges, source and goal; target = the path" in card.text
    # What costs time, and the parts of a loss, are no results to compare by.
    assert not {"test/nfe", "test/loss", "test/token_loss", "test/stop_accuracy"} & results.keys()
    # The example prints what it says, which is what was evaluated.
    example, shown = (re.search(p, card.text, re.DOTALL)[1] for p in (r"```python\n(.*?)```", r"````text\n(.*?)\n````"))
    exec(example.replace("xlm/ilm-star", str(trained / "model")), {})
    record = json.loads((trained / "predictions/test.jsonl").read_text().splitlines()[0])
    assert capsys.readouterr().out.strip() == shown == record["prediction"]
    composed = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert composed["task"]["num_train"] == 40
    assert "output_dir" not in composed
    for part in ("## Results", "Each example once", "## Samples", "## Limitations", "## Licence", "## Citation"):
        assert part in card.text


# The example of the card, as a person would run it, and a pipeline.
EXAMPLES = """
import re
from huggingface_hub import hf_hub_download
from transformers import pipeline

def run_examples(name, **trust):
    card = open(hf_hub_download(name, "README.md")).read()
    exec(re.search("```python\\n(.*?)```", card, re.DOTALL)[1], {})
    trust["trust_remote_code"] = True
    print(pipeline("text-generation", model=name, **trust)("1 2 3", max_new_tokens=4, seed=3))
"""

PUSH_ALL = (
    EXAMPLES
    + """
import json, sys, torch
from tests.processes import forked
from xlm_hf.families import families
from xlm_hf.testing import FamilyCase

for family in families():
    case = FamilyCase(family)
    model = case.model()
    model.push_to_hub(f"xlm/{family}", max_shard_size="50KB")
    case.task.tokenizer.push_to_hub(f"xlm/{family}")
    prompt = torch.tensor([[7, 8, 9, 10]])
    print(json.dumps(model.generate(prompt, seed=3, max_new_tokens=6).sequences.tolist()))
    run_examples(f"xlm/{family}")
"""
)

LOAD_ALL = (
    textwrap.indent(EXAMPLES, "    ")
    + """
    import json, sys, torch
    import transformers
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    # Without a revision transformers advises to pin one, of every file of code that it downloads.
    trust = {"trust_remote_code": True, "revision": "main"}
    def load(name):
        config = AutoConfig.from_pretrained(name, **trust)
        model, info = AutoModel.from_pretrained(name, output_loading_info=True, **trust)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        assert not any(info.values()), info
        return model, AutoTokenizer.from_pretrained(name, **trust)
    for family in sys.argv[1:]:
        model, tokenizer = load(f"xlm/{family}")
        prompt = torch.tensor([[7, 8, 9, 10]])
        first = model.generate(prompt, seed=3, max_new_tokens=6).sequences.tolist()
        model.save_pretrained(f"saved/{family}")
        tokenizer.save_pretrained(f"saved/{family}")
        again, _ = load(f"saved/{family}")
        assert again.generate(prompt, seed=3, max_new_tokens=6).sequences.tolist() == first
        for auto_class in model.config.auto_map:
            getattr(transformers, auto_class).from_pretrained(f"xlm/{family}", **trust)
        if "AutoModelForMaskedLM" in model.config.auto_map:
            blanks = pipeline("fill-mask", model=f"xlm/{family}", **trust)(f"1 {tokenizer.mask_token} 3", top_k=2)
            assert len(blanks) == 2 and blanks[0]["score"] >= blanks[1]["score"]
        print(json.dumps(first))
        run_examples(f"xlm/{family}", **trust)
"""
)


def test_every_family_loads_by_id_where_only_torch_and_transformers_are(hub, folder, clean_python):
    pushed = python(hub, folder, "-c", PUSH_ALL)
    assert pushed.returncode == 0, pushed.stderr
    names = list(families())
    for name in names:
        files = hub.files(f"xlm/{name}")
        assert sum(file.endswith(".safetensors") for file in files) > 1
        assert {Path(file).suffix for file in files} == {*TEXT, ".safetensors"}
        assert "xlm-hf" in ModelCard(files["README.md"].decode()).data.tags
    home = folder / "clean"
    out = clean_python(LOAD_ALL, *names, home=home, cwd=folder, **hub.environment(home))
    lines = out.strip().splitlines()
    assert lines == pushed.stdout.strip().splitlines()[-len(lines) :]
    # Of each family: sequences, the example's decode, and what the pipeline wrote.
    assert len(lines) == 3 * len(names)
    assert all("'generated_text': '1 2 3" in line for line in lines[2::3])


FOUR_WAYS = """
from pathlib import Path
from xlm_hf.testing import FamilyCase

model = FamilyCase("ilm").model()
for name, saved in {"model": model, "config": model.config}.items():
    saved.push_to_hub(f"xlm/{name}-push")
    # Only what is newer than the start of the call goes up: an old folder must not hold the code back.
    saved.save_pretrained(name)
    (Path(name) / "mine.py").write_text("")
    saved.save_pretrained(name, push_to_hub=True, repo_id=f"xlm/{name}-save")
"""


def test_the_pushes_of_transformers_take_the_code_along_and_keep_a_card_that_somebody_wrote(hub, trained, folder):
    hub.add("xlm/model-push", {"README.md": b"---\nlicense: mit\n---\nMy words.\n"})
    result = python(hub, folder, "-c", FOUR_WAYS)
    assert result.returncode == 0, result.stderr
    expected = set(hub.files("xlm/ilm-star")) - {"tokenizer.json", "tokenizer_config.json"}
    without = expected - {"model.safetensors", "generation_config.json", "README.md"}
    for way in ("push", "save"):
        assert hub.files(f"xlm/model-{way}").keys() == expected
        assert hub.files(f"xlm/config-{way}").keys() - {"README.md"} == without
    assert b"My words." in hub.files("xlm/model-push")["README.md"]
    assert b"insertion language model" in hub.files("xlm/model-save")["README.md"]


def test_only_with_trust_does_the_package_read_code_from_the_hub(hub, trained, calls, folder):
    ours = hub.files("xlm/ilm-star")
    strange = {
        file: content if file.endswith(".safetensors") else content.replace(b'"ilm"', b'"strange"')
        for file, content in ours.items()
    }
    hub.add("xlm/strange", strange)
    hub.add("xlm/trusted", strange)
    pickled = {file: content for file, content in ours.items() if not file.endswith(".safetensors")}
    hub.add("xlm/pickled", {**pickled, "pytorch_model.bin": b""})
    before = len(hub.requests)
    generate = ["job=generate", "num_samples=3"]
    sentences = calls(
        ["job=evaluate", "checkpoint=xlm/ilm-star", "output_dir=evaluated"],
        [*generate, "checkpoint=xlm/ilm-star", "output_dir=generated"],
        [*generate, "checkpoint=xlm/trusted", "output_dir=generated-by-theirs", "trust_remote_code=true"],
        [*generate, "checkpoint=xlm/strange", "output_dir=none"],
        [*generate, "checkpoint=xlm/pickled", "output_dir=none"],
    )
    assert sentences == [
        *["0"] * 3,
        "Error: xlm/strange brings code of its own: read it, and add trust_remote_code=true.",
        "Error: xlm/pickled holds no weights in safetensors, the one format that is loaded.",
    ]
    read = [path for method, path in hub.requests[before:] if method == "GET"]
    assert any(path.startswith("/xlm/ilm-star") and path.endswith("model.safetensors") for path in read)
    others = [path for path in read if path.endswith((".py", ".md", ".yaml", ".bin"))]
    assert others
    assert all(path.startswith("/xlm/trusted/") and path.endswith(".py") for path in others)
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (trained, folder / "evaluated")]
    assert metrics[0]["test/loss"] == pytest.approx(metrics[1]["test/loss"], rel=1e-6)
    decodes = [folder / name / "predictions/generate.jsonl" for name in ("generated", "generated-by-theirs")]
    assert decodes[0].read_text() == decodes[1].read_text()


def test_pushing_a_checkpoint_and_the_end_of_a_run_by_hand(hub, trained, calls):
    where = ["trainer.hub_model_id=xlm/by-hand", "trainer.hub_private_repo=true", "job=push_to_hub"]
    whole, twice, checkpoint, private = calls(
        [f"checkpoint={trained}", *where],
        [f"checkpoint={trained}", *where],
        [f"checkpoint={trained}/checkpoint-2", "exist_ok=true", *where],
        ["job=generate", "checkpoint=xlm/by-hand", "output_dir=none", "HF_TOKEN="],
    )
    assert whole == checkpoint == "0"
    assert (
        twice == "Error: xlm/by-hand exists already: add exist_ok=true to add a commit to it, or choose another name."
    )
    assert private == "Error: There is no model xlm/by-hand on the Hub that HF_TOKEN may read."
    assert hub.repositories["xlm/by-hand"]["private"]
    _, first, second = (commit["files"] for commit in hub.repositories["xlm/by-hand"]["commits"])
    theirs = hub.files("xlm/ilm-star")
    assert {**first, "README.md": ""} == {**theirs, "README.md": ""}
    card = first["README.md"].decode().replace("by-hand", "ilm-star")
    assert card == theirs["README.md"].decode()
    assert "Optimiser steps: 2" in second["README.md"].decode()
    assert second["model.safetensors"] != first["model.safetensors"]


def test_what_is_in_the_way_is_one_sentence_and_nothing_is_lost(hub, trained, calls, folder):
    push = ["job=push_to_hub", f"checkpoint={trained}"]
    training = ["output_dir=never", "trainer.push_to_hub=true"]
    hub.breaks = [True]
    in_the_way = folder / "blocked" / "model-in-progress" / "thesis.txt"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("mine")
    broken, again, unnamed, no_token, no_token_for_training, no_right, blocked = calls(
        [*push, "trainer.hub_model_id=xlm/broken"],
        [*push, "trainer.hub_model_id=xlm/broken", "exist_ok=true"],
        push,
        [*push, "trainer.hub_model_id=xlm/mine", "HF_TOKEN="],
        [*training, "trainer.hub_model_id=xlm/mine", "HF_TOKEN="],
        [*training, "trainer.hub_model_id=somebody/else"],
        ["output_dir=blocked", *training[1:], "trainer.hub_model_id=xlm/blocked", "trainer.hub_strategy=every_save"],
    )
    assert broken.startswith("Error: The connection to the Hub broke off (")
    assert broken.endswith(
        "): xlm/broken is as it was, all is kept here, and the same command with exist_ok=true tries again."
    )
    assert again == "0"
    assert [len(commit["files"]) > 0 for commit in hub.repositories["xlm/broken"]["commits"]] == [False, True]
    assert unnamed == "Error: job=push_to_hub needs the name of a repository: add trainer.hub_model_id=USER/NAME."
    assert no_token == no_token_for_training
    assert no_token == "Error: Writing xlm/mine needs a token of the Hub: set HF_TOKEN, or log in by `hf auth login`."
    assert no_right == (
        "Error: This token may not write somebody/else (You have no rights to the namespace somebody): name a "
        "repository of your own, or use a token with write access."
    )
    # What cannot be exported in training is not pushed then, but at the end.
    assert (blocked, in_the_way.read_text()) == ("0", "mine")
    assert f"the push of step 2 has failed. {in_the_way.parent} holds" in (folder / "blocked/train.log").read_text()
    assert [len(commit["files"]) > 0 for commit in hub.repositories["xlm/blocked"]["commits"]] == [False, True]


def test_a_push_that_breaks_off_stops_no_training_and_the_last_one_is_made_up_for(hub, run, folder):
    """The pushes are of steps 2 and 4, each a model and its checkpoint, and of the end."""
    strategy = ["trainer.push_to_hub=true", "trainer.hub_strategy=checkpoint", "trainer.hub_model_id=xlm/resumable"]
    command = ["output_dir=resumable", *strategy, "trainer.hub_always_push=true"]
    hub.breaks = [True, False, False, True]
    broken = run(*command)
    assert broken.returncode == 1
    assert "Training goes on, and the push of step 2 has failed. The connection to the Hub broke off (" in broken.stderr
    last = broken.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: The connection to the Hub broke off (")
    assert last.endswith(f"is kept here, and the same command with output_dir={folder}/resumable tries again.")
    commits = hub.repositories["xlm/resumable"]["commits"]
    assert len(commits) == 3
    checkpoint = {f"last-checkpoint/{file.name}": file for file in (folder / "resumable" / "checkpoint-4").iterdir()}
    assert {name for name in commits[-1]["files"] if "/" in name} == checkpoint.keys()
    assert all(commits[-1]["files"][name] == file.read_bytes() for name, file in checkpoint.items())
    assert not [name for name in hub.files("xlm/resumable") if name.endswith((".bin", ".log", ".jsonl"))]
    assert {"metrics.json", "model"} < {path.name for path in (folder / "resumable").iterdir()}
    assert not (folder / "resumable" / "model-in-progress").exists()
    # Of weights in another form only the newest are left; what somebody else put there stays.
    commits[-1]["files"].update(dict.fromkeys(["model-00001-of-00002.safetensors", "notes.txt"], b"mine"))
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert f"Pushed to {hub.url}/xlm/resumable" in again.stdout
    uploaded = {name: content for name, content in hub.files("xlm/resumable").items() if "/" not in name}
    assert uploaded.pop("notes.txt") == b"mine"
    assert uploaded == {file.name: file.read_bytes() for file in (folder / "resumable" / "model").iterdir()}
