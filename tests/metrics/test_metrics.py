import inspect
import math
import random
import re
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import xlm_hf.metrics
from xlm_hf.metrics import load_metric
from xlm_hf.metrics.exact_match.exact_match import ExactMatch
from xlm_hf.metrics.star_path.star_path import StarPath

ROOT = Path(xlm_hf.metrics.__file__).parent
FOLDERS = sorted(readme.parent for readme in ROOT.glob("*/README.md"))
README_BLOCKS = [
    pytest.param(block, id=f"{folder.name}-{number}")
    for folder in FOLDERS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))
]


def save_judge(folder, architecture="gpt2"):
    """A random causal language model over words, with a tokenizer, in which everything matters."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 3, "d": 4}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=12, n_embd=8, n_layer=2, n_head=2))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=5, max_position_embeddings=12, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judge"))


def random_texts(seed, count, longest=10):
    rng = random.Random(seed)
    return [" ".join(rng.choices("abcd", [4, 3, 2, 1], k=rng.randint(0, longest))) for _ in range(count)]


def random_rows(rng, count):
    """Ragged predictions and references that often agree, with padding anywhere."""

    def padded(tokens):
        tokens = list(tokens)
        for _ in range(rng.randrange(3)):
            tokens.insert(rng.randrange(len(tokens) + 1), -100)
        return tokens

    references = [[rng.randrange(3) for _ in range(rng.randint(1, 4))] for _ in range(count)]
    predictions = [
        ref[: rng.randint(0, 5)] if rng.random() < 0.7 else [rng.randrange(3) for _ in range(rng.randint(0, 5))]
        for ref in references
    ]
    return predictions, references, [padded(p) for p in predictions], [padded(r) for r in references]


@pytest.mark.parametrize("block", README_BLOCKS)
def test_readme_examples_run(block):
    assert "assert" in block
    exec(compile(block, "README.md", "exec"), {})


def test_every_metric_has_a_readme_with_an_example():
    modules = {path.parent for path in ROOT.glob("*/*.py") if path.stem == path.parent.name}
    assert set(FOLDERS) == modules
    assert {block.id.rsplit("-", 1)[0] for block in README_BLOCKS} == {folder.name for folder in FOLDERS}


def test_exact_match_and_token_accuracy_against_loops():
    predictions, references, padded_predictions, padded_references = random_rows(random.Random(0), 500)
    matches, accuracies = 0, []
    for prediction, reference in zip(predictions, references, strict=True):
        matches += len(prediction) == len(reference) and all(p == r for p, r in zip(prediction, reference, strict=True))
        right = 0
        for i in range(len(reference)):
            right += i < len(prediction) and prediction[i] == reference[i]
        accuracies.append(right / len(reference))
    assert 0.1 < matches / 500 < 0.9
    for inputs in (
        {"predictions": predictions, "references": references},
        {"predictions": padded_predictions, "references": padded_references},
    ):
        assert load_metric("exact_match").compute(**inputs) == {"exact_match": matches / 500}
        assert load_metric("token_accuracy").compute(**inputs)["token_accuracy"] == pytest.approx(np.mean(accuracies))


def test_a_prediction_that_stops_early_or_runs_on_is_no_match():
    result = load_metric("exact_match").compute(
        predictions=[[1], [1, 2, 3], [], [1, 2]], references=[[1, 2], [1, 2], [1, 2], [1, 2]]
    )
    assert result == {"exact_match": 0.25}


# 1 -> 2 -> 3 -> 4 and 0 -> 2 -> 5; source 1, goal 4
PROMPT = [2, 5, 1, 2, 3, 4, 0, 2, 2, 3, 1, 4]


@pytest.mark.parametrize(
    ("edges", "nodes", "is_path"),
    [
        ([1, 2, 2, 3, 3, 4], [1, 2, 3, 4], True),
        ([1, 2, 2, 3], [1, 2, 3], False),  # stops before the goal
        ([2, 3, 3, 4], [2, 3, 4], False),  # starts after the source
        ([0, 2, 2, 3, 3, 4], [0, 2, 3, 4], False),  # from another root
        ([1, 2, 2, 5], [1, 2, 5], False),  # to another leaf
        ([1, 4], [1, 4], False),  # no edge
        ([4, 3, 3, 2, 2, 1], [4, 3, 2, 1], False),  # backwards
        ([1, 2, 2, 3, 3, 4, 4, 4], [1, 2, 3, 4, 4], False),  # goes on
        ([1, 2, 0, 2, 3, 4], [1, 2, 0, 2, 3, 4], False),  # edges that do not chain
        ([1, 2, 3, 4], [1, 3, 4], False),  # one is missing
        ([1, 2, 2, 3, 3], [1], False),  # odd
        ([], [], False),
    ],
)
def test_star_path(edges, nodes, is_path):
    metric = load_metric("star_path")
    assert metric.compute(predictions=[edges], prompts=[PROMPT]) == {"star_path": is_path}
    assert metric.compute(predictions=[[-100, *edges, -100]], prompts=[[-100, *PROMPT]]) == {"star_path": is_path}
    assert load_metric("star_path", path_format="nodes").compute(predictions=[nodes], prompts=[PROMPT]) == {
        "star_path": is_path
    }


def test_star_path_is_a_share_and_accepts_another_right_path():
    diamond = [1, 2, 2, 4, 1, 3, 3, 4, 1, 4]
    paths = [[1, 2, 2, 4], [1, 3, 3, 4], [1, 2, 3, 4]]
    assert load_metric("star_path").compute(predictions=paths, prompts=[diamond] * 3) == {"star_path": 2 / 3}


def test_star_path_in_edge_form_takes_whole_edges_only():
    loop_at_goal = [1, 4, 4, 4, 1, 4]
    paths = [[1, 4], [1, 4, 4, 4], [1, 4, 4]]
    assert load_metric("star_path").compute(predictions=paths, prompts=[loop_at_goal] * 3) == {"star_path": 2 / 3}


def test_inputs_can_be_seen_in_the_features():
    assert set(load_metric("exact_match").features) == {"predictions", "references"}
    assert set(load_metric("token_accuracy").features) == {"predictions", "references"}
    metric = load_metric("star_path")
    assert set(metric.features) == {"predictions", "prompts"}
    path = [1, 2, 2, 3, 3, 4]
    assert metric.compute(predictions=[path], prompts=[PROMPT], references=[path]) == {"star_path": 1.0}


def test_arrays_and_batches_are_accepted():
    metric = load_metric("exact_match")
    padded = np.array([[1, 2, -100], [3, -100, -100]])
    assert metric.compute(predictions=padded, references=[[1, 2], [4]]) == {"exact_match": 0.5}
    for prediction in ([1, 2], [3]):
        metric.add_batch(predictions=[prediction], references=[[1, 2]])
    assert metric.compute() == {"exact_match": 0.5}


TEXT, TEXTS = datasets.Value("string"), ["a b c b", "b c"] * 10


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_folder_works_alone(folder, tmp_path, judge):
    text = (folder / f"{folder.name}.py").read_text()
    assert "xlm_hf" not in text
    copy = tmp_path / folder.name
    copy.mkdir()
    (copy / f"{folder.name}.py").write_text(text)
    ours = load_metric(folder.name)
    inputs = {
        name: TEXTS
        if feature == TEXT
        else [[text, "b a"] for text in TEXTS]
        if feature == datasets.List(TEXT)
        else [PROMPT, PROMPT]
        for name, feature in ours.features.items()
    }
    options = {
        "generative_perplexity": {"eval_model": judge},
        "mauve": {"feature_model": judge},
        "puzzle": {"checker": "xlm_hf.tasks.sorting.check", "predictions": ["1 2"] * 2, "prompts": ["2 1", "3 1"]},
    }
    inputs.update(options.get(folder.name, {}))
    expected = ours.compute(**inputs)
    for other in (
        evaluate.load(str(copy)),
        load_metric(str(copy)),
        load_metric(str(copy / f"{folder.name}.py")),
        load_metric({"name": str(copy)}),
    ):
        assert type(other).__module__.startswith("evaluate_modules.")
        assert other.compute(**inputs) == expected
        assert other.features == ours.features


def test_options_become_defaults_of_compute():
    for metric in (
        load_metric("star_path", path_format="nodes"),
        load_metric({"name": "star_path", "path_format": "nodes"}),
        load_metric({"name": "star_path", "path_format": "edges"}, path_format="nodes"),
        load_metric({"_target_": "xlm_hf.metrics.star_path.star_path.StarPath", "path_format": "nodes"}),
        load_metric(OmegaConf.create({"f": "nodes", "m": {"name": "star_path", "path_format": "${f}"}}).m),
    ):
        inputs = {"predictions": [[1, 2, 3, 4]], "prompts": [PROMPT]}
        assert isinstance(metric, StarPath)
        assert metric.keep_in_memory
        assert metric.compute(**inputs) == {"star_path": 1.0}
        assert metric.compute(**inputs, path_format="edges") == {"star_path": 0.0}


def test_shipped_names_give_the_importable_class():
    assert type(load_metric("exact_match")) is ExactMatch
    assert all("keep_in_memory" in inspect.signature(type(load_metric(f.name))).parameters for f in FOLDERS)


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("exact_mtch", {}, r"unknown metric 'exact_mtch', .* did you mean 'exact_match'\?"),
        ("no/such/folder", {}, r"unknown metric 'no/such/folder', which is neither a shipped one nor the path"),
        ("star_path", {"pathformat": "nodes"}, r"Metric 'star_path' has no option 'pathformat'.*'path_format'\?"),
        ({"name": "exact_match", "k": 1}, {}, r"Metric 'exact_match' has no option 'k': there are none"),
        ({"path_format": "nodes"}, {}, r"needs `name` or `_target_`; this one has the keys \['path_format'\]"),
        ({"_target_": "no_such.Metric"}, {}, r"target 'no_such.Metric' cannot be imported"),
    ],
)
def test_unknown_metrics_and_options_are_refused(metric, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load_metric(metric, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("exact_match", {"predictions": [], "references": []}, "no predictions to score"),
        ("token_accuracy", {"predictions": [], "references": []}, "no predictions to score"),
        ("star_path", {"predictions": [], "prompts": []}, "no predictions to score"),
        ("token_accuracy", {"predictions": [[1], [1]], "references": [[1], [-100]]}, "reference 1 has no tokens"),
        ("star_path", {"predictions": [[1]], "prompts": [[1, 2, 1]]}, "prompt 0 has 3 tokens"),
        ("star_path", {"predictions": [[1]], "prompts": [[1, 2, 1, 2]], "path_format": "x"}, "unknown path_format 'x'"),
        ("exact_match", {"predictions": [[1], [2]], "references": [[1]]}, "Mismatch in the number"),
        ("star_path", {"predictions": [[1]]}, "inputs are missing"),
    ],
)
def test_bad_inputs_are_refused_and_the_metric_still_works(name, inputs, message):
    metric = load_metric(name)
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)
    assert metric.compute(**{n: [PROMPT] for n in metric.features}) == {name: 0.0 if name == "star_path" else 1.0}


def slow_entropy(tokens):
    total = 0.0
    for token in set(tokens):
        share = sum(other == token for other in tokens) / len(tokens)
        total -= share * math.log(share)
    return total


def test_sample_entropy_against_loops():
    predictions, _, padded, _ = random_rows(random.Random(1), 200)
    expected = np.mean([slow_entropy(row) for row in predictions])
    assert min(map(len, predictions)) == 0
    metric = load_metric("sample_entropy")
    assert metric.compute(predictions=padded)["sample_entropy"] == pytest.approx(expected)
    assert metric.per_example(predictions=padded)["sample_entropy"] == pytest.approx(
        list(map(slow_entropy, predictions))
    )


def test_distinct_n_against_loops():
    predictions, _, padded, _ = random_rows(random.Random(2), 30)
    result = load_metric("distinct_n").compute(predictions=padded)
    for n in (1, 2, 3):
        everything, within = [], []
        for row in predictions:
            grams = [tuple(row[start : start + n]) for start in range(len(row) - n + 1)]
            everything += grams
            if grams:
                within.append(len(set(grams)) / len(grams))
        assert result[f"distinct_{n}"] == pytest.approx(len(set(everything)) / len(everything))
        assert result[f"distinct_{n}_within"] == pytest.approx(np.mean(within))
        assert 0 < result[f"distinct_{n}"] < result[f"distinct_{n}_within"]


@torch.no_grad()
def slow_generative_perplexity(folder, texts, first_token, max_length):
    """One text at a time, one prefix at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    nats, tokens, characters, per_sample, entropies = 0.0, 0, 0, [], []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        ids = ([0, *ids] if first_token == "after_bos" else ids)[:max_length]
        own = 0.0
        for place in range(1, len(ids)):
            own -= float(model(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(dim=-1)[ids[place]])
        nats, tokens = nats + own, tokens + max(len(ids) - 1, 0)
        # Each word is a token; of the first, where it is only context, no character counts.
        words = text.split()[: len(ids) - (first_token == "after_bos")]
        characters += len(" ".join(words)) - len("".join(words[:1]) if first_token == "unscored" else "")
        entropies.append(slow_entropy(ids[1:]))
        if len(ids) > 1:
            per_sample.append(math.exp(own / (len(ids) - 1)))
    return {
        "generative_tokens": tokens,
        "generative_nll": nats / tokens,
        "generative_perplexity": math.exp(nats / tokens),
        "generative_perplexity_per_sample": np.mean(per_sample),
        "generative_bits_per_character": nats / math.log(2) / characters,
        "generative_entropy": np.mean(entropies),
    }


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(("first_token", "max_length"), [("unscored", 1024), ("after_bos", 1024), ("after_bos", 5)])
def test_generative_perplexity_against_a_loop_whatever_the_batch_size(architecture, first_token, max_length, tmp_path):
    folder, texts = save_judge(tmp_path, architecture), random_texts(3, 12)
    expected = slow_generative_perplexity(folder, texts, first_token, max_length)
    assert "" in texts
    assert expected["generative_perplexity"] != pytest.approx(expected["generative_perplexity_per_sample"], rel=1e-2)
    options = {"eval_model": folder, "first_token": first_token, "max_length": max_length}
    for batch_size in (1, 5, 64):
        result = load_metric("generative_perplexity", **options, batch_size=batch_size).compute(predictions=texts)
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert result[name] == pytest.approx(value, rel=1e-5), name


def test_a_text_is_cut_at_the_positions_of_the_eval_model(judge):
    metric = load_metric("generative_perplexity", eval_model=judge)
    long = " ".join("abcd" * 10)
    assert metric.compute(predictions=[long]) == metric.compute(predictions=[long[:23]])
    assert metric.compute(predictions=[long])["generative_tokens"] == 11


def test_without_a_scored_token_there_is_no_perplexity(judge):
    result = load_metric("generative_perplexity", eval_model=judge).compute(predictions=["", "a"])
    assert result == {"generative_tokens": 0, "generative_entropy": 0.0}


def test_an_unknown_first_token_is_refused(judge):
    with pytest.raises(ValueError, match="unknown first_token 'scored': choose 'unscored' or 'after_bos'"):
        load_metric("generative_perplexity", eval_model=judge, first_token="scored").compute(predictions=["a b"])


def test_an_eval_model_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match="eval_model 'no/such' is not a folder or Hub id with a model and its tokenizer"
    ):
        load_metric("generative_perplexity", eval_model="no/such").compute(predictions=["a b"])


def test_mauve_is_the_librarys_on_features_of_one_text_at_a_time(judge):
    mauve = pytest.importorskip("mauve")
    model = AutoModelForCausalLM.from_pretrained(judge).transformer.eval()
    tokenizer = AutoTokenizer.from_pretrained(judge)
    human, generated = random_texts(5, 40), [text.replace("a", "d") for text in random_texts(6, 40)]

    def features(texts):
        rows = [tokenizer(text)["input_ids"][:6] or [0] for text in texts]
        with torch.no_grad():
            return np.stack([model(torch.tensor([row])).last_hidden_state[0, -1].numpy() for row in rows])

    expected = mauve.compute_mauve(features(human), features(generated), num_buckets=4, verbose=False).mauve
    assert 0.01 < expected < 0.95
    for batch_size in (1, 7):
        metric = load_metric("mauve", feature_model=judge, num_buckets=4, batch_size=batch_size, max_length=6)
        assert metric.compute(predictions=generated, references=human)["mauve"] == pytest.approx(expected, rel=1e-3)


def test_without_its_library_mauve_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'xlm-hf\[mauve\]'"):
        load_metric("mauve")


def test_token_accuracy_counts_the_blanks_alone():
    predictions, references = [[1, 2, 3, 4], [5, 6]], [[1, 9, 3, 9], [5, 7]]
    blanks = [[True, True, False, True], [True, False]]
    metric = load_metric("token_accuracy")
    assert metric.compute(predictions=predictions, references=references, blanks=blanks) == {
        "token_accuracy": (1 / 3 + 1) / 2
    }
    with pytest.raises(ValueError, match="reference 0 has no tokens"):
        metric.compute(predictions=[[1]], references=[[1]], blanks=[[False]])


@pytest.mark.parametrize("name", ["exact_match", "token_accuracy", "star_path", "sample_entropy"])
def test_the_values_of_the_examples_average_to_the_metric(name):
    predictions, references, _, _ = random_rows(random.Random(4), 50)
    metric = load_metric(name)
    columns = {"predictions": [[1, 2, 2, 3, 3, 4], [1], *predictions], "references": [[1], [1], *references]}
    columns["prompts"] = [PROMPT] * len(columns["predictions"])
    inputs = {name: columns[name] for name in metric.features}
    values = metric.per_example(**inputs)[name]
    assert len(set(values)) > 1
    assert metric.compute(**inputs)[name] == pytest.approx(np.mean(values))


def test_a_judge_that_never_writes_its_padding_token_scores_rows_of_all_lengths(judge):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(judge), AutoTokenizer.from_pretrained(judge)

    def never_write_token_0(module, inputs, logits):
        return logits.index_fill(-1, torch.tensor([0]), -torch.inf)

    model.get_output_embeddings().register_forward_hook(never_write_token_0)
    alone, together = (
        load_metric("generative_perplexity", eval_model=model, eval_tokenizer=tokenizer, batch_size=size).compute(
            predictions=["a b c", "b a c d a b c d"]
        )
        for size in (1, 2)
    )
    assert math.isfinite(together["generative_nll"])
    assert together["generative_nll"] == pytest.approx(alone["generative_nll"], rel=1e-5)
