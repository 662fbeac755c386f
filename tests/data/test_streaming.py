"""Training on streams and mixtures: exact resume, workers, ranks."""

import json

import pytest

from tests.training.test_distributed import launch
from tests.training.test_trainer import EXACT, Interrupt, assert_same_weights, dataset, make_trainer, weights
from xlm_hf.data import Mixture, keyed
from xlm_hf.training.checkpoints import last_sound_checkpoint

DATA = {
    "stream": lambda: dataset().to_iterable_dataset(num_shards=3),
    "mixture": lambda: Mixture([dataset(), dataset(9, seed=1)], [2, 1]),
    "mixture of streams": lambda: Mixture(
        [dataset().to_iterable_dataset(num_shards=3), dataset(9, seed=1).to_iterable_dataset()], [2, 1]
    ),
}


def trainer_on(kind, output_dir, **arguments):
    # 14 steps of 8 examples: over the ends of all sets, some of them several times.
    trainer = make_trainer(output_dir, **{"max_steps": 14, **arguments})
    trainer.train_dataset = keyed(DATA[kind]())
    return trainer


@pytest.fixture(scope="module", params=DATA)
def uninterrupted(request, tmp_path_factory):
    trainer = trainer_on(request.param, tmp_path_factory.mktemp("whole"))
    trainer.train()
    return request.param, trainer


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_and_workers_change_nothing(num_workers, uninterrupted, tmp_path):
    kind, whole = uninterrupted
    arguments = {"save_strategy": "steps", "save_steps": 5, "dataloader_num_workers": num_workers}
    first = trainer_on(kind, tmp_path, **arguments)
    first.add_callback(Interrupt(11))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert first.loss.seen == whole.loss.seen[: len(first.loss.seen)]
    resumed = trainer_on(kind, tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(last_sound_checkpoint(tmp_path)))
    # From the checkpoint of step 10 on.
    assert resumed.loss.seen == whole.loss.seen[-4 * 8 :]
    assert_same_weights(weights(resumed), weights(whole), **EXACT)


def test_accumulation_changes_nothing(uninterrupted, tmp_path):
    kind, whole = uninterrupted
    halves = trainer_on(kind, tmp_path, batch_size=4, gradient_accumulation_steps=2)
    halves.train()
    if kind == "mixture":
        # Its epoch of 66 has half a step at its end.
        assert halves.loss.seen[:64] == whole.loss.seen[:64]
    else:
        assert halves.loss.seen == whole.loss.seen


def test_two_ranks_read_the_batches_of_one_in_turn(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from accelerate import PartialState\n"
        "from tests.data.test_streaming import trainer_on\n"
        "trainer = trainer_on('stream', sys.argv[1], batch_size=4, max_steps=7, ddp_backend='gloo',\n"
        "                     dataloader_num_workers=2)\n"
        "trainer.train()\n"
        "file = Path(sys.argv[1]) / f'seen_{PartialState().process_index}.json'\n"
        "file.write_text(json.dumps(trainer.loss.seen))\n"
    )
    launch(2, script, tmp_path)
    ranks = [json.loads((tmp_path / f"seen_{rank}.json").read_text()) for rank in (0, 1)]
    whole = trainer_on("stream", tmp_path / "one", max_steps=7)
    whole.train()
    in_turn = [row for at in range(0, 28, 4) for rank in ranks for row in rank[at : at + 4]]
    assert [(example, tuple(ids)) for example, ids in in_turn] == whole.loss.seen
