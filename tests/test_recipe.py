"""Recipes: what loads, what is refused and with which words."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeqat.errors import RecipeError
from edgeqat.recipe import Recipe, bundled_recipes, load_recipe
from helpers import CommandLine

BUNDLED = list(bundled_recipes())


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(folder: Path, text: str, *settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "recipe.yaml" in message
    return message


def test_bundled_recipes_are_these_and_describe_themselves() -> None:
    assert BUNDLED == [
        "cifar10-edge",
        "cifar10-mobilenetv2",
        "cifar10-resnet20",
        "cifar10-resnet8",
        "digits-edge",
        "folder-ptq",
        "imagenet-mobilenetv2",
    ]
    for description in bundled_recipes().values():
        assert len(description) > 20
        assert not description.startswith("#")


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_recipe_round_trips_and_hashes_stably(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert again.sha256() == recipe.sha256() == load_recipe(name).sha256()
    assert len(recipe.sha256()) == 64
    assert load_recipe(name, ["train.seed=1"]).sha256() != recipe.sha256()


def test_resolved_recipe_writes_every_default_out() -> None:
    written = yaml.safe_load(load_recipe("digits-edge").to_yaml())
    assert written == load_recipe("digits-edge").model_dump()
    assert list(written) == [
        "model",
        "data",
        "task",
        "quantize",
        "train",
        "export",
        "measure",
        "gate",
        "log",
        "compute",
    ]
    assert written["measure"] == {"threads": 1, "batch": 1}
    assert written["quantize"]["weights"] == {
        "bits": 8,
        "per_channel": True,
        "observer": "minmax",
        "learned": False,
        "observer_args": {},
    }


def test_aids_for_training_are_off_unless_asked_for() -> None:
    recipe = load_recipe("digits-edge")
    assert recipe.train is not None
    assert (recipe.train.distill, recipe.train.ema, recipe.train.oscillation) == (None, None, None)
    assert recipe.train.progressive == [] and recipe.quantize.first_last is None
    asked = load_recipe("digits-edge", ["train.oscillation={freeze: {}, dampen: {}}"])
    assert asked.train is not None and asked.train.oscillation is not None
    freeze, dampen = asked.train.oscillation.freeze, asked.train.oscillation.dampen
    assert freeze is not None and (freeze.first, freeze.last, freeze.begin) == (0.1, 0.01, 0.25)
    assert dampen is not None and (dampen.first, dampen.last, dampen.begin) == (0.0, 0.1, 0.25)


def test_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "# nothing\n")) == Recipe()


def test_a_hash_is_of_the_meaning_not_of_the_spelling(tmp_path: Path) -> None:
    one = load_recipe(write(tmp_path, "train: {seed: 3, qat_epochs: 1}\ngate: {max_drop: 0.01}"))
    other = load_recipe(write(tmp_path, "# same\ngate:\n  max_drop: 1e-2\ntrain:\n  qat_epochs: 1\n  seed: 3\n"))
    assert one.sha256() == other.sha256()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trian: {}", "unknown key trian; did you mean train?"),
        ("train: {flot_lr: 1}", "unknown key train.flot_lr; did you mean float_lr?"),
        (
            "quantize: {weights: {bit: 8}}",
            "unknown key quantize.weights.bit; did you mean bits?",
        ),
        (
            "quantize: {overrides: [{module: a, output: {signd: true}}]}",
            "unknown key quantize.overrides.0.output.signd; did you mean signed?",
        ),
        (
            "quantize: {overrides: [{module: a}, {modul: b}]}",
            "unknown key quantize.overrides.1.modul; did you mean module?",
        ),
        ("measure: {zzz: 1}", "unknown key measure.zzz; wanted one of threads, batch"),
    ],
    ids=["section", "key", "nested key", "key in an override", "key in a list", "nothing near"],
)
def test_unknown_key_is_named_with_a_suggestion(tmp_path: Path, text: str, words: str) -> None:
    assert refusal(tmp_path, text).endswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {float_lr: '0.1'}", "train.float_lr: found '0.1': input should be a valid number"),
        ("train: {seed: 1.0}", "train.seed: found 1.0: input should be a valid integer"),
        ("train: {seed: true}", "train.seed: found True: input should be a valid integer"),
        ("train: {qat_epochs: -1}", "train.qat_epochs: found -1: input should be greater than or equal to 0"),
        ("train: 5", "train: found 5: wanted a mapping of keys"),
        ("gate: null", "gate: found None: wanted a mapping of keys"),
        ("gate: {runtimes: []}", "gate.runtimes: found []: list should have at least 1 item"),
        (f"train: {{seed: {2**63}}}", "train.seed: found 9223372036854775808: input should be less than or equal to"),
        ("train: {float_epochs: 2147483648}", "input should be less than or equal to 2147483647"),
        ("data: {calibration_n: 2147483648}", "input should be less than or equal to 2147483647"),
        ("measure: {threads: 1025}", "measure.threads: found 1025: input should be less than or equal to 1024"),
        ("train: {optimizer: adam}", "train.optimizer: found 'adam': input should be 'sgd' or 'adamw'"),
        ("quantize: {weights: {bits: 9}}", "quantize.weights.bits: found 9: input should be less than or equal"),
        (
            "train: {freeze_batch_norm_after: 2}",
            "train.freeze_batch_norm_after wants quantize.batch_norm: frozen, found fold",
        ),
        ("train: {reestimate_batches: 2}", "train.reestimate_batches wants quantize.batch_norm: live or frozen"),
        ("train: {ema: {decay: 1.0}}", "train.ema.decay: found 1.0: input should be less than 1"),
        ("train: {ema: {decai: 0.9}}", "unknown key train.ema.decai; did you mean decay?"),
        ("train: {distill: {temperature: 0}}", "train.distill.temperature: found 0: input should be greater than 0"),
        ("train: {distill: {weight: 1.5}}", "train.distill.weight: found 1.5: input should be less than or equal"),
        ("train: {oscillation: {momentum: 1.0}}", "train.oscillation.momentum: found 1.0: input should be less"),
        ("train: {oscillation: {max_bits: 9}}", "train.oscillation.max_bits: found 9: input should be less"),
        ("train: {oscillation: {freeze: {begin: 1}}}", "train.oscillation.freeze.begin: found 1: input should be"),
        ("train: {oscillation: {dampen: {last: -1}}}", "train.oscillation.dampen.last: found -1: input should be"),
        ("train: {oscillation: {freeze: {shape: step}}}", "train.oscillation.freeze.shape: found 'step'"),
        ("train: {progressive: [{epochs: 1}]}", "wanted weights or activations, the bits of the stage"),
        ("train: {progressive: [{weights: 8}]}", "train.progressive.0.epochs"),
        ("train: {progressive: [{weights: 9, epochs: 1}]}", "train.progressive.0.weights: found 9"),
        ("quantize: {first_last: {weights: {bits: 1}}}", "quantize.first_last.weights.bits: found 1"),
        ("quantize: {first_last: {output: {}}}", "unknown key quantize.first_last.output"),
        ("quantize: {overrides: [{quantize: false}]}", "wanted exactly one of module, regex, type"),
        ("quantize: {overrides: [{module: a, type: b}]}", "found ['module', 'type'], wanted exactly one"),
        ("quantize: {fusions: [conv1]}", "quantize.fusions: found ['conv1']: each wants to be a list of module names"),
        ("quantize: {fusions: [[a, 1]]}", "quantize.fusions: found [['a', 1]]: each wants to be a list"),
        ("quantize: {fusions: 'net.py:p'}", "quantize.fusions: found 'net.py:p': input should be a valid list"),
        (
            "quantize: {overrides: [{regex: a, type: b}]}",
            "found ['regex', 'type'], wanted exactly one of module, regex, type, or all of regex, type, index",
        ),
        ("quantize: {overrides: [{index: 1}]}", "found ['index'], wanted exactly one of"),
        (
            "quantize: {overrides: [{module: a}, {type: a}, {module: a, quantize: false}]}",
            "entries 0 and 2 are both for module: a; keep one",
        ),
        (
            "quantize: {overrides: [{regex: a, type: b, index: 0}, {regex: a, type: b, index: 0}]}",
            "entries 0 and 1 are both for regex: a, type: b, index: 0; keep one",
        ),
        (
            "quantize: {overrides: [{module: a, quantize: false, output: {}}]}",
            "found quantize: false and output, wanted one of the two",
        ),
        (
            "quantize: {activations: {observer: percentile, observer_args: {bins: 2}}}",
            "quantize.activations.observer_args: found {'bins': 2}: found bins=2, but 'percentile' takes percentile "
            "(above 50 up to 100)",
        ),
        (
            "quantize: {overrides: [{type: a, weights: {observer_args: {eps: true}}}]}",
            "quantize.overrides.0.weights.observer_args: found {'eps': True}: found eps=True, but 'minmax' takes eps",
        ),
        ("quantize: {output: {observer: reuse_input}}", "quantize.output.observer: found 'reuse_input'"),
        ("export: []", "export: found []: list should have at least 1 item"),
        ("export: onnxruntime", "export: found 'onnxruntime': wanted a list, write [onnxruntime]"),
        ("data: {mean: [.nan]}", "data.mean.0: found nan: input should be a finite number"),
        ("gate: {max_drop: .inf}", "gate.max_drop: found inf: input should be a finite number"),
        ("gate: {min_agreement: 1.5}", "gate.min_agreement: found 1.5: input should be less than or equal to 1"),
        ("1: 2", "1: found 1: keys should be strings"),
    ],
    ids=lambda value: value.replace(" ", "") if len(value) < 50 else "",
)
def test_value_that_does_not_fit_is_named(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "value",
    ["2020-01-01", ".nan", ".inf", "{1: 2}", "!!set {a}", "!!binary aGVsbG8=", "&a [*a]"],
    ids=["date", "nan", "inf", "number as key", "set", "bytes", "circular"],
)
def test_factory_arguments_that_json_cannot_hold_are_refused(tmp_path: Path, value: str) -> None:
    """They would fail at the end of the run, when report.json is written."""
    found = refusal(tmp_path, f"model: {{args: {{x: {value}}}}}")
    assert "model.args: found" in found
    assert "wanted finite numbers, strings, booleans, nulls, lists and mappings with string keys" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("- model", "holds a list, wanted a mapping of sections"),
        ("hello", "holds a str, wanted a mapping of sections"),
        ("42", "holds a int, wanted a mapping of sections"),
    ],
    ids=["unclosed", "two colons", "list", "string", "number"],
)
def test_file_that_is_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text)


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"])
def test_unsafe_yaml_is_refused_and_nothing_is_executed(tmp_path: Path, tag: str) -> None:
    marker = tmp_path / "executed"
    value = f"!!python/{tag} [{marker}]" if tag.startswith("object") else f"!!python/{tag} ''"
    assert f"python/{tag}" in refusal(tmp_path, f"model: {{factory: {value}}}")
    with pytest.raises(RecipeError, match=r"--set model.args: .* is not valid YAML"):
        load_recipe("digits-edge", [f"model.args={value}"])
    assert not marker.exists()


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(RecipeError, match=r"recipe\.yaml cannot be read: 'utf-8' codec"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", ["dgits-edge", "digits_edge", "digits-edges"])
def test_unknown_name_suggests_the_nearest(name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' and no bundled recipe of that name; did you mean digits-edge"):
        load_recipe(name)


@pytest.mark.parametrize("name", ["", "nothing-like-it", ".", "nowhere/recipe.yaml"])
def test_unknown_name_without_a_near_one_lists_all(name: str) -> None:
    with pytest.raises(RecipeError, match=f"bundled: {', '.join(BUNDLED)}"):
        load_recipe(name)


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("train.float_lr=1e-3", "train.float_lr", 0.001),
        ("train.float_lr=2.5E+1", "train.float_lr", 25.0),
        ("train.float_lr=1", "train.float_lr", 1.0),
        ("train.seed=7", "train.seed", 7),
        ("train=null", "train", None),
        ("quantize.activations.observer=minmax", "quantize.activations.observer", "minmax"),
        ("quantize.activations.observer=percentile", "quantize.activations.observer", "percentile"),
        ("quantize.weights.observer=mse", "quantize.weights.observer", "mse"),
        ("quantize.weights.per_channel=false", "quantize.weights.per_channel", False),
        ("data.mean=[0.1, 0.2, 0.3]", "data.mean", [0.1, 0.2, 0.3]),
        ("data.augment=[crop,flip]", "data.augment", ["crop", "flip"]),
        (f"train.seed={2**63 - 1}", "train.seed", 2**63 - 1),
        ("data={source: digits, image_size: 8}", "data.image_size", 8),
        (" train.seed =5", "train.seed", 5),
        ("task.loss=", "task.loss", ""),
        ("task.loss=a=b", "task.loss", "a=b"),
    ],
)
def test_set_changes_one_value(setting: str, path: str, value: object) -> None:
    found: Any = load_recipe("digits-edge", [setting])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_set_reaches_into_factory_arguments_and_keeps_the_rest() -> None:
    recipe = load_recipe("digits-edge", ["model.args.width=1e-3", "model.args.deep.er=x", "train.seed=1"])
    assert recipe.model.args == {"num_classes": 10, "width": 0.001, "deep": {"er": "x"}}
    assert recipe.train is not None
    assert recipe.train == load_recipe("digits-edge").train.model_copy(update={"seed": 1})


def test_later_settings_win() -> None:
    recipe = load_recipe("digits-edge", ["train=null", "train.seed=1", "train.seed=2"])
    assert recipe.train is not None
    assert recipe.train.seed == 2


@pytest.mark.parametrize("setting", ["train.seed", "=1", "", ".=1", "train..seed=1", "train.=1"])
def test_badly_formed_set(setting: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits-edge", [setting])
    assert str(caught.value) == f"found --set {setting!r}, wanted key.path=value"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.seed=[", "--set train.seed: '[' is not valid YAML"),
        ("train.seeds=1", "unknown key train.seeds; did you mean seed?"),
        ("train.seed=x", "train.seed: found 'x': input should be a valid integer"),
        ("model=5", "model: found 5"),
    ],
)
def test_set_that_does_not_fit(setting: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits-edge", [setting])
    assert words in str(caught.value)


def test_paths_of_a_file_are_relative_to_it_and_those_of_set_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (there / "images").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    text = (
        "model: {factory: 'net.py:make', weights: w/a.safetensors}\n"
        "data: {source: images}\ntask: {loss: ../loss.py:loss, metric: top1}\n"
        "quantize: {fusions: [[a, b], 'net.py:pattern', 'my.net:pattern']}\n"
    )
    recipe = load_recipe(write(there, text))
    assert recipe.model.factory == f"{there}/net.py:make"
    assert recipe.model.weights == f"{there}/w/a.safetensors"
    assert recipe.data.source == f"{there}/images"
    assert recipe.task.loss == f"{tmp_path}/loss.py:loss"
    assert recipe.task.metric == "top1"
    assert recipe.quantize.fusions == [["a", "b"], f"{there}/net.py:pattern", "my.net:pattern"]

    settings = ["model.factory=net.py:other", "model.weights=b.pt", "data.source=./pictures"]
    changed = load_recipe(write(there, text), settings)
    assert changed.model.factory == f"{here}/net.py:other"
    assert changed.model.weights == f"{here}/b.pt"
    assert changed.data.source == f"{here}/pictures"
    assert changed.task.loss == f"{tmp_path}/loss.py:loss"


def test_modules_and_names_are_no_paths(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "model: {factory: 'edgeqat.zoo:resnet20'}\ndata: {source: cifar10}"))
    assert recipe.model.factory == "edgeqat.zoo:resnet20"
    assert recipe.data.source == "cifar10"


@pytest.mark.parametrize(
    ("source", "resolved"),
    [
        ("org/name", "org/name"),
        ("imagenet-1k", "imagenet-1k"),
        ("my.data:make", "my.data:make"),
        ("", ""),
        ("here/images", "BASE/here/images"),
        ("here", "BASE/here"),
        ("org/name/deep", "BASE/org/name/deep"),
        ("./org/name", "BASE/org/name"),
        ("../org", "PARENT/org"),
        (".", "BASE"),
        ("/org/name", "/org/name"),
        ("~/pictures", "HOME/pictures"),
        ("name/", "BASE/name"),
        ("two words", "BASE/two words"),
        ("data.py:make", "BASE/data.py:make"),
        ("../data.py:make", "PARENT/data.py:make"),
        ("~/data.py:make", "HOME/data.py:make"),
        ("odd:name", "BASE/odd:name"),
    ],
)
def test_a_source_is_a_path_where_it_must_be_or_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, resolved: str
) -> None:
    """`org/name` is the hub's unless such a folder stands beside the recipe; --set looks in the working directory."""
    base = tmp_path / "base"
    (base / "here" / "images").mkdir(parents=True)
    (base / "odd:name").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wanted = resolved.replace("BASE", str(base)).replace("PARENT", str(tmp_path))
    wanted = wanted.replace("HOME", str(tmp_path / "home"))
    recipe = load_recipe(write(base, yaml.safe_dump({"data": {"source": source}})))
    assert recipe.data.source == wanted
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe  # once resolved it stays
    monkeypatch.chdir(base)
    assert load_recipe("digits-edge", [f"data.source={json.dumps(source)}"]).data.source == wanted


def test_a_built_in_source_wins_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits-edge", ["data.source=digits"]).data.source == "digits"
    assert load_recipe(write(tmp_path, "data: {source: digits}")).data.source == "digits"


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("digits-edge").model.weights = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["digits-egde"], "did you mean digits-edge?"),
        (["digits-edge", "--set", "train.lrr=1"], "unknown key train.lrr"),
        (["digits-edge", "--set", "train"], "found --set 'train', wanted key.path=value"),
        (["bad.yaml"], "bad.yaml is not valid YAML"),
    ],
    ids=["name", "key", "form", "yaml"],
)
def test_command_line_refuses_a_recipe_in_one_line(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "model: [\n\n", "bad.yaml")
    ended = command("run", *args, "-o", tmp_path / "out")
    assert words in ended.refusal(2)
    assert len(ended.err.splitlines()) == 1
    assert ended.out == ""
    assert not (tmp_path / "out").exists()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text("abcxyz_-.", min_size=1, max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
rates = st.floats(0, allow_infinity=False)
bits = st.integers(2, 8)
arguments = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts | st.sampled_from(["1e-3", "null", "yes", "0o7", "~"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
observers = st.sampled_from(["minmax", "moving_average", "histogram", "percentile", "mse"])
activations = st.fixed_dictionaries(
    {}, optional={"bits": bits, "observer": observers, "symmetric": st.booleans(), "signed": st.booleans()}
) | st.fixed_dictionaries(
    {"observer": st.just("percentile")},
    optional={"observer_args": st.fixed_dictionaries({"percentile": st.floats(50.5, 100) | st.integers(51, 100)})},
)
overrides = st.fixed_dictionaries({"regex": texts}, optional={"quantize": st.booleans()}) | st.fixed_dictionaries(
    {"regex": texts, "type": texts, "index": st.integers(0, 2**31 - 1)},
    optional={"activations": st.none() | activations, "output": st.none() | activations},
)
shares = st.floats(0, 1, exclude_max=True)
annealed = st.fixed_dictionaries(
    {}, optional={"first": rates, "last": rates, "begin": shares, "shape": st.sampled_from(["cosine", "linear"])}
)
aids = {
    "distill": st.none() | st.fixed_dictionaries({}, optional={"weight": st.floats(0, 1)}),
    "ema": st.none() | st.fixed_dictionaries({}, optional={"decay": shares}),
    "oscillation": st.none()
    | st.fixed_dictionaries({}, optional={"max_bits": bits, "freeze": st.none() | annealed, "dampen": annealed}),
    "progressive": st.lists(
        st.fixed_dictionaries(
            {"epochs": st.integers(0, 9), "weights": bits}, optional={"activations": st.none() | bits}
        ),
        max_size=2,
    ),
}
recipes = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries({}, optional={"args": st.dictionaries(texts, arguments, max_size=3)}),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "source": st.sampled_from(
                    ["digits", "cifar10", "/some/where", "org/name", "/my.py:data", "my.data:make"]
                ),
                "mean": st.none() | st.lists(numbers, max_size=3),
                "augment": st.none() | st.lists(names, max_size=2),
            },
        ),
        "task": st.fixed_dictionaries({}, optional={"loss": names, "metric": names}),
        "quantize": st.fixed_dictionaries(
            {},
            optional={
                "activations": activations,
                "output": st.none() | activations,
                "overrides": st.lists(overrides, max_size=2, unique_by=lambda o: (o["regex"], o.get("index"))),
                "opaque": st.lists(names, max_size=2),
                "fusions": st.lists(
                    st.lists(names, max_size=2) | st.sampled_from(["/my.py:pattern", "my.net:pattern"]), max_size=2
                ),
            },
        ),
        "train": st.none()
        | st.fixed_dictionaries({}, optional={"float_lr": rates, "seed": st.integers(0, 2**63 - 1), **aids}),
        "gate": st.fixed_dictionaries(
            {}, optional={"max_drop": st.none() | numbers, "min_agreement": st.none() | st.floats(0, 1)}
        ),
    },
)


@settings(max_examples=150, deadline=None)
@given(recipes)
@example({"model": {"args": {"text": "1e-3", "other": "-2.E+5", "1e3": None}}})
@example({"model": {"args": {"\x85": "a\u2028b", "\u2029": "c\x85"}}})
def test_any_recipe_round_trips_exactly(data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    with tempfile.TemporaryDirectory() as folder:
        again = load_recipe(write(Path(folder), recipe.to_yaml()))
    assert again == recipe
    assert repr(again) == repr(recipe)  # what == lets pass: 1 for 1.0 and True
    assert again.sha256() == recipe.sha256()


def test_an_empty_mapping_takes_factory_arguments_away() -> None:
    assert load_recipe("digits-edge", ["model.args={}"]).model.args == {}
    assert load_recipe("digits-edge", ["model.args={width: 2}"]).model.args == {"num_classes": 10, "width": 2}
