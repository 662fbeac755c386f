"""How a recipe learns star easy: exact match and loss by number of dropped tokens, against CPU minutes.

    OMP_NUM_THREADS=1 python benchmarks/star_easy.py NAME [Hydra overrides of ilm_star ...]

trains `ilm_star` with the overrides and, every `trainer.eval_steps` steps, watches the first 500 test graphs (greedy
decodes, one sample) and the loss on them by the number of dropped tokens. The CPU minutes (user + system, all threads)
are those of the training alone; watching and testing are counted apart. The result goes to
`benchmarks/results/star_easy/NAME.json`.

    python benchmarks/star_easy.py plot

draws all results into `benchmarks/results/star_easy.png`.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import TrainerCallback

from xlm_hf.building import build_model, build_task, build_trainer, compose
from xlm_hf.evaluation import EvaluationSet, run_evaluation_set
from xlm_hf.metrics import load_metric

RESULTS = Path(__file__).parent / "results"
WATCHED = 500


class Watch(TrainerCallback):
    """Records what the model can do, and the CPU time of the training up to then."""

    def __init__(self, task, cfg, started):
        self.task, self.cfg, self.started, self.watching, self.curve = task, cfg, started, 0.0, []

    def on_step_end(self, args, state, control, **kwargs):
        """Watch every `eval_steps`."""
        if state.global_step % int(args.eval_steps) == 0:
            self.record(state.global_step)

    def record(self, step):
        """Add a point to the curve."""
        before = time.process_time()
        trainer = self.trainer
        graphs = self.task.splits["test"].select(range(WATCHED))
        by_kind = {bool(s.generate): s for s in trainer.evaluation_sets if s.name == "test"}
        decoded = EvaluationSet(
            "watch", graphs, by_kind[True].collator, (), generate=True, metrics=[load_metric("exact_match")]
        )
        metrics, _ = run_evaluation_set(trainer.model, decoded, self.task.tokenizer, 250, 0)
        self.curve.append(
            {
                "step": step,
                "cpu_minutes": (before - self.started - self.watching) / 60,
                "exact_match": metrics["exact_match"],
                "loss_by_dropped": self.loss_by_dropped(graphs, by_kind[False].collator),
            }
        )
        print(json.dumps(self.curve[-1]), flush=True)
        self.watching += time.process_time() - before

    @torch.no_grad()
    def loss_by_dropped(self, graphs, collator):
        """Mean token loss, nats per sequence, by the number of dropped tokens."""
        model, sums = self.trainer.model.eval(), defaultdict(list)
        examples = [{**row, "epoch": 0, "position": i} for i, row in enumerate(graphs)]
        for start in range(0, WATCHED, 100):
            batch = collator(examples[start : start + 100])
            logits = model(batch["input_ids"], batch["attention_mask"], slot_index=batch["slot_index"]).logits
            losses = self.trainer.loss._token_losses(logits, batch)
            for dropped, value in zip(batch["num_dropped"].tolist(), losses.tolist(), strict=True):
                sums[dropped].append(value)
        model.train()
        return {str(dropped): sum(values) / len(values) for dropped, values in sorted(sums.items()) if dropped}


def run(name: str, overrides: list[str]) -> None:
    """Train one recipe and write its curve and its test result."""
    started = time.process_time()
    cfg = compose("ilm_star", ["trainer.save_strategy=no", *overrides])
    task = build_task(cfg.task)
    model = build_model(cfg.model, task.tokenizer, cfg.generation, seed=cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(cfg, task, model, Path(folder))
        trainer.args.eval_strategy = "no"
        trainer.args.disable_tqdm = True
        watch = Watch(task, cfg, started)
        watch.trainer = trainer
        trainer.add_callback(watch)
        trainer.train()
        trained = time.process_time()
        metrics = trainer.evaluate(metric_key_prefix="test")
    result = {
        "name": name,
        "overrides": overrides,
        "command": " ".join(["python benchmarks/star_easy.py", name, *overrides]),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "parameters": model.num_parameters(),
        "training_cpu_minutes": (trained - started - watch.watching) / 60,
        "testing_cpu_minutes": (time.process_time() - trained) / 60,
        "test": {key: value for key, value in metrics.items() if key.startswith("test/")},
        "curve": watch.curve,
    }
    folder = RESULTS / "star_easy"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def plot() -> None:
    """Exact match against CPU minutes, and the loss with everything dropped, of all results."""
    from matplotlib.figure import Figure

    from xlm_hf.reports.comparison import COLOURS, LINES, MARKERS

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    results = [json.loads(file.read_text()) for file in sorted((RESULTS / "star_easy").glob("*.json"))]
    results.sort(key=lambda result: not result["name"].startswith("preset"))
    for i, result in enumerate(results):
        minutes = [point["cpu_minutes"] for point in result["curve"]]
        i, label = max(i - 2, 0), result["name"].replace("_", " ").replace("preset seed", "preset, seed ")
        is_preset = label.startswith("preset")
        style = {"color": "black" if is_preset else COLOURS[i % 6], "marker": MARKERS[i % 9], "linestyle": LINES[i % 4]}
        style |= {"marker": "o^v"[int(result["name"][-1])], "linestyle": "-"} if is_preset else {}
        left.plot(minutes, [point["exact_match"] for point in result["curve"]], label=label, **style)
        right.plot(minutes, [point["loss_by_dropped"]["8"] for point in result["curve"]], **style)
    left.set(xlabel="CPU minutes of training", ylabel="exact match, 500 unseen graphs", ylim=(-0.02, 1.02))
    right.set(xlabel="CPU minutes of training", ylabel="loss with all 8 tokens dropped, nats")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, title="one run each; the presets have three seeds")
    figure.savefig(RESULTS / "star_easy.png", dpi=130)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "plot":
        plot()
    else:
        run(sys.argv[1], sys.argv[2:])
