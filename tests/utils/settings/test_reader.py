"""Files read into settings, and what is told of files that cannot be."""

from pathlib import Path

import pytest
import torch
from pydantic import model_validator

from optimizers.adamw import AdamWSettings
from optimizers.sgd import SGDSettings
from tests.utils.settings.conftest import CHOICES, DATASET, Folder, TinyOptions
from utils.errors import UserError
from utils.settings.choices import Choice
from utils.settings.keys import SPELLINGS
from utils.settings.model_schema import torch_dtype
from utils.settings.reader import read_all, read_dataset, read_settings, write_resolved


def problems_of(path: Path, world_size: int = 1) -> dict[str, str]:
    """Messages by place."""
    with pytest.raises(UserError) as caught:
        read_all(path, CHOICES, world_size)
    return {problem.where: problem.message for problem in caught.value.problems}


def test_a_sound_run(folder: Folder) -> None:
    path = folder.run(top="epochs = 3", model="max_sequence_length = 8", optimizer="betas = [0.9, 0.95]")
    settings, dataset, evaluation = read_all(path, CHOICES, 1)
    assert settings.epochs == 3
    assert settings.model == TinyOptions(type="tiny", diffusers_path="weights", max_sequence_length=8)
    assert settings.optimizer == AdamWSettings(type="adamw", lr=1e-3, betas=(0.9, 0.95))
    assert settings.adapter is None
    assert dataset.resolutions == [64]
    assert evaluation == {}


@pytest.mark.parametrize("group", ["output", "training", "eval", "save", "optimization"])
def test_every_group_takes_the_runs_keys(folder: Folder, group: str) -> None:
    assert read_settings(folder.run(tables=f"[{group}]\nmax_steps = 7"), CHOICES).max_steps == 7


def test_second_spellings_mean_the_same(folder: Folder) -> None:
    model = 'diffusion_model = "weights"\ndiffusion_model_dtype = "float16"\nvae = "weights"'
    settings = read_settings(folder.run(model=model), CHOICES)
    assert settings.model.transformer_path == settings.model.vae_path == Path("weights")
    assert settings.model.transformer_dtype == "float16"
    other = folder.write("other.toml", DATASET.replace("directory", "datasets").replace("path", "root"))
    assert read_dataset(other) == read_dataset(Path("dataset.toml"))


@pytest.mark.parametrize("table", ["", "[[directory]]\npath = 'a'\n"])
def test_second_spellings_of_a_datasets_keys_hold_at_the_top_and_in_a_directory(folder: Folder, table: str) -> None:
    values = {"uncond_fraction": "0.5", "is_regularisation_data": "true", "cache_shuffle_delimiter": "'; '"}
    for spelling, key in SPELLINGS["dataset"].items():
        if key == "directory":
            continue
        texts = [f"{table}{name} = {values.get(key, 3)}\n" + ("" if table else DATASET) for name in (spelling, key)]
        first, second = (read_dataset(folder.write("other.toml", text)) for text in texts)
        assert first == second
        told = first.directory[0] if table else first
        assert told.model_fields_set >= {key}, spelling


def test_one_key_in_two_spellings_is_given_twice(folder: Folder) -> None:
    folder.write("dataset.toml", f"{DATASET}caption_dropout = 0.1\ncaption_dropout_rate = 0.1")
    assert "is the same key" in problems_of(folder.run())["[[directory]] 1 caption_dropout_rate"]
    folder.write("dataset.toml", f"{DATASET}image_dir = 'pictures'")
    assert "is the same key" in problems_of(folder.run())["[[directory]] 1 image_dir"]


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        (f"random_crop = true\n{DATASET}", "key `random_crop`", 'write instead: `crop = "random"`'),
        (f"{DATASET}flip_aug = true", "[[directory]] 1 flip_aug", "write instead: `flip`, with `augment_variants`"),
        (f"prior_loss_weight = 0.5\n{DATASET}", "key `prior_loss_weight`", "`loss_weight`, in the `[[directory]]`"),
        (f"[general]\nshuffle_caption = true\n{DATASET}", "key `general`", "at the top of the dataset file"),
        (f"cache_latents = false\n{DATASET}", "key `cache_latents`", "leave it out: latents always are cached"),
        (f"{DATASET}repeat = 3", "[[directory]] 1 repeat", "did you mean `repeats`?"),
    ],
)
def test_a_key_of_another_trainers_dataset_is_met_with_advice(
    folder: Folder, text: str, where: str, words: str
) -> None:
    folder.write("dataset.toml", text)
    assert words in problems_of(folder.run())[where]


def test_a_key_of_another_trainers_run_is_met_with_advice(folder: Folder) -> None:
    problems = problems_of(folder.run(top="learning_rate = 1e-4\nmax_train_steps = 100"))
    assert problems["key `learning_rate`"] == "no such key; write instead: `lr`, in `[optimizer]`"
    assert problems["key `max_train_steps`"] == "no such key; write instead: `max_steps`"


@pytest.mark.parametrize(
    ("top", "told"),
    [
        ("epochs = 2", {"[[directory]] 1 start_epoch": "epochs = 2"}),
        ("max_steps = 10", {"[[directory]] 1 start_step": "max_steps = 10"}),
        ("epochs = 3\nmax_steps = 11", {}),
        ("epochs = 'a'", {"key `epochs`": "whole number"}),
    ],
)
def test_a_directory_that_the_run_never_comes_to_is_told(folder: Folder, top: str, told: dict[str, str]) -> None:
    folder.write("dataset.toml", f"{DATASET}start_epoch = 3\nstart_step = 10")
    if told:
        problems = problems_of(folder.run(top=top))
        assert problems.keys() == told.keys()
        assert all(words in problems[where] for where, words in told.items())
    else:
        read_all(folder.run(top=top), CHOICES, 1)


@pytest.mark.parametrize("is_own", [True, False])
def test_what_tags_are_need_some_change_of_them(folder: Folder, is_own: bool) -> None:
    line = "keep_tokens = 1"
    text = f"{DATASET}{line}\n" if is_own else f"{line}\n{DATASET}"
    folder.write("dataset.toml", text)
    place = f"[[directory]] 1 {line.split()[0]}" if is_own else f"key `{line.split()[0]}`"
    ((where, message),) = problems_of(folder.run()).items()
    assert where == place
    assert "for tags that are changed" in message
    for change in ("tag_dropout = 0.1", "shuffle_capitalization = 0.1", "cache_shuffle_num = 1"):
        folder.write("dataset.toml", f"{change}\nkeep_tokens_separator = '|||'\n{text}")
        read_all(folder.run(), CHOICES, 1)


def test_an_evaluation_set_has_no_keys_of_training_unless_it_is_the_training_set(folder: Folder) -> None:
    folder.write("dataset.toml", f"num_repeats = 3\n{DATASET}")
    folder.write("eval.toml", f"num_repeats = 3\n{DATASET}")
    top = 'eval_datasets = [{name = "a", config = "FILE"}]'
    read_all(folder.run(top=top.replace("FILE", str(folder.root / "dataset.toml"))), CHOICES, 1)
    with pytest.raises(UserError) as caught:
        read_all(folder.run(top=top.replace("FILE", "eval.toml")), CHOICES, 1)
    assert [(entry.file, entry.where) for entry in caught.value.problems] == [("eval.toml", "key `num_repeats`")]


@pytest.mark.parametrize(
    ("top", "where", "message"),
    [
        ('epochs = "10"', "key `epochs`", 'must be a whole number; given: "10" (a text)'),
        ("epochs = true", "key `epochs`", "must be a whole number; given: true"),
        ("epochs = 0", "key `epochs`", "must be at least 1; given: 0 (a whole number)"),
        ("epoch = 3", "key `epoch`", "no such key; did you mean `epochs`?"),
        ("lr = 3", "key `lr`", "no such key here; it belongs in [optimizer]"),
        (
            "rank = 3",
            "key `rank`",
            'no such key here; it belongs in [adapter] with type = "loha" or "lokr" or "lora" or "vera"',
        ),
        ("factor = 3", "key `factor`", 'no such key here; it belongs in [adapter] with type = "lokr"'),
        (
            "resolutions = [3]",
            "key `resolutions`",
            "no such key here; it belongs at the top of a dataset file",
        ),
        ("zzz = 3", "key `zzz`", "no such key"),
        ("training = 3", "[training]", "must be a table; given: 3 (a whole number)"),
        ("sampling = 3", "[sampling]", "must be a table; given: 3 (a whole number)"),
        (
            'save_dtype = "bf16"',
            "key `save_dtype`",
            "must be 'float32', 'float16' or 'bfloat16'; given: \"bf16\" (a text)",
        ),
        ("eval_datasets = [{config = 'a'}]", "key `eval_datasets[0].name`", "is required and not given"),
        (
            "eval_datasets = [{name = 'a', config = 'run.toml', conf = 1}]",
            "key `eval_datasets[0].conf`",
            "no such key; did you mean `config`?",
        ),
    ],
)
def test_a_wrong_key_of_the_run(folder: Folder, top: str, where: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_settings(folder.run(top=top), CHOICES)
    assert [(problem.where, problem.message) for problem in caught.value.problems] == [(where, message)]


@pytest.mark.parametrize(
    ("table", "where", "words"),
    [
        ("[model]\ntype = 'nope'", "[model] type", "known: tiny"),
        ("[model]\ndtype = 'float32'", "[model] type", "required"),
        ("[model]\ntype = 3", "[model] type", "given: 3"),
        (
            "[model]\ntype = 'tiny'\nvae = 'a'\nvae_path = 'a'",
            "[model] vae_path",
            "[model] vae is the same key",
        ),
        ("[model]\ntype = 'tiny'\nepochs = 3", "[model] epochs", "top of the run's file"),
        (
            "[model]\ntype = 'tiny'\nmax_sequence_lenght = 3",
            "[model] max_sequence_lenght",
            "`max_sequence_length`",
        ),
        (
            "[model]\ntype = 'tiny'\ntext_encoders = [{type = 't5'}]",
            "[model] text_encoders[0].path",
            "required",
        ),
        ("[optimizer]\ntype = 'adamx'\nlr = 1", "[optimizer] type", "adamw, adamw8bit, "),
        ("[optimizer]\ntype = 'adamw'\nlr = 1\nmomentum = 0.5", "[optimizer] momentum", 'type = "dadaptsgd" or '),
        ("[optimizer]\ntype = 'adamw'\nlr = 0", "[optimizer] lr", "greater than 0"),
        ("[optimizer]\ntype = 'adamw'\nlr = inf", "[optimizer] lr", "finite"),
        ("[optimizer]\ntype = 'AdamX'\nlr = 1\nbetas = 3", "[optimizer] type", "known: adafactor"),
        ("[adapter]\ntype = 'lora'\nrank = 1\nfactor = 2", "[adapter] factor", 'in [adapter] with type = "lokr"'),
        ("[adapter]\ntype = 'lora'\nrank = 1\nmomentum = 0.5", "[adapter] momentum", ' or "sgd" or '),
        ("[adapter]\ntype = 'lohx'\nrank = 1", "[adapter] type", "'lora'"),
    ],
)
def test_a_wrong_key_of_a_table(folder: Folder, table: str, where: str, words: str) -> None:
    tables = {
        "[model]": "[model]\ntype = 'tiny'",
        "[optimizer]": "[optimizer]\ntype = 'sgd'\nlr = 1",
        table.split("\n")[0]: table,
    }
    text = "\n".join(["output_dir = 'runs'", "dataset = 'dataset.toml'", *tables.values()])
    with pytest.raises(UserError) as caught:
        read_settings(folder.write("run.toml", text), CHOICES)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert words in problem.message


@pytest.mark.parametrize("name", ["model", "adapter", "optimizer", "monitoring", "sampling"])
def test_a_section_that_is_no_table(folder: Folder, name: str) -> None:
    text = f"output_dir = 'runs'\ndataset = 'dataset.toml'\n{name} = 3\n"
    text += "".join(f"[{other}]\ntype = 3\n" for other in ("model", "optimizer") if other != name)
    places = problems_of(folder.write("run.toml", text))
    assert places.pop(f"[{name}]") == "must be a table; given: 3 (a whole number)"
    others = {"[model] type", "[optimizer] type", "[optimizer] lr", "[model] diffusers_path"}
    assert places.keys() <= others


def test_a_key_given_twice_names_both_places(folder: Folder) -> None:
    path = folder.run(top="epochs = 1", tables="[training]\nepochs = 2\nmax_steps = 3\n[save]\nmax_steps = 3")
    problems = problems_of(path)
    assert "key `epochs`" in problems["[training] epochs"]
    assert "[training] max_steps" in problems["[save] max_steps"]


def test_a_check_of_a_models_own_is_told_at_its_table(folder: Folder) -> None:
    class Checked(TinyOptions):
        @model_validator(mode="after")
        def _short(self) -> "Checked":
            raise ValueError("{captions} are too long")

    with pytest.raises(UserError) as caught:
        read_settings(folder.run(), {**CHOICES, "model": Choice(lambda name: Checked)})
    assert [(entry.where, entry.message) for entry in caught.value.problems] == [("[model]", "{captions} are too long")]


def test_optimizer_types_are_told_apart_in_any_case(folder: Folder) -> None:
    text = folder.run().read_text().replace('"adamw"', '"SGD"') + "momentum = 0.9"
    assert read_settings(folder.write("run.toml", text), CHOICES).optimizer == SGDSettings(
        type="sgd", lr=1e-3, momentum=0.9
    )


def test_all_problems_of_all_files_come_at_once(folder: Folder) -> None:
    folder.write("dataset.toml", DATASET.replace("resolutions", "resolution").replace("pictures", "gone"))
    folder.write("eval.toml", "[[directory]]\nroot = 3")
    top = """
        eval_datasets = [{name = "a", config = "eval.toml"}, {name = "b", config = "gone.toml"}]
        epochs = 1.5
    """
    path = folder.run(
        top=top,
        model="shift = 3\nflux_shift = true",
        optimizer="eps = -1",
        tables="[sampling]\nprompts = ['a']",
    )
    with pytest.raises(UserError) as caught:
        read_all(path, CHOICES, 1)
    assert {(problem.file, problem.where) for problem in caught.value.problems} == {
        ("run.toml", "key `epochs`"),
        ("run.toml", "key `eval_datasets[1].config`"),
        ("run.toml", "[model] shift"),
        ("run.toml", "[optimizer] eps"),
        ("run.toml", "[sampling] prompts"),
        ("dataset.toml", "key `resolution`"),
        ("dataset.toml", "[[directory]] 1 path"),
        ("eval.toml", "[[directory]] 1 path"),
    }


def test_evaluation_sets_come_by_name(folder: Folder) -> None:
    top = 'eval_datasets = [{name = "a", config = "dataset.toml"}, {name = "b", config = "dataset.toml"}]'
    _, dataset, evaluation = read_all(folder.run(top=top), CHOICES, 1)
    assert evaluation == {"a": dataset, "b": dataset}


MISSPELT = [
    ("[optimizer]", "[optimiser]", "[optimiser]", "did you mean [optimizer]?"),
    ("[model]", "[[model]]", "[model]", "write [model], in single brackets"),
    ("", "[evaluation]\neval_every_n_steps = 1", "[evaluation]", "did you mean [eval]?"),
    ("", "[sample]\nprompts = ['a']", "[sample]", "did you mean [sampling]?"),
    # Also a key of [ema].
    ("", "[evaluate]\neval_every_n_steps = 1", "[evaluate]", "did you mean [eval]?"),
    ("", "[train]\nepochs = 3", "[train]", "did you mean [training]?"),
    ("", "[zzz]\nepochs = 3", "[zzz]", "known are [model], [adapter]"),
    ("", "[[training]]\nepochs = 3", "[training]", "write [training], in single brackets"),
    ("", "[eval_datasets]\nname = 'a'", "key `eval_datasets`", "write [[eval_datasets]], in double brackets"),
    ("", "[eval.eval_datasets]\nname = 'a'", "[eval] eval_datasets", "write [[eval.eval_datasets]]"),
    ("", "[model.text_encoders]\ntype = 'a'", "[model] text_encoders", "write [[model.text_encoders]]"),
]


@pytest.mark.parametrize(("right", "wrong", "where", "words"), MISSPELT)
def test_a_wrong_title_is_one_problem(folder: Folder, right: str, wrong: str, where: str, words: str) -> None:
    text = folder.run().read_text()
    path = folder.write("run.toml", text.replace(right, wrong) if right else f"{text}\n{wrong}")
    ((place, message),) = problems_of(path).items()
    assert place == where
    assert words in message


@pytest.mark.parametrize("title", ["directory", "datasets"])
def test_directories_need_double_brackets(folder: Folder, title: str) -> None:
    folder.write("dataset.toml", DATASET.replace("[[directory]]", f"[{title}]"))
    message = f"may have several entries; write [[{title}]], in double brackets"
    assert problems_of(folder.run()) == {f"key `{title}`": message}


def test_the_files_of_a_run_in_each_others_place(folder: Folder) -> None:
    assert "is a dataset's file; give the run's" in problems_of(Path("dataset.toml"))[""]
    assert "is a run's file" in problems_of(folder.run(dataset="dataset = 'run.toml'"))[""]


def test_an_unknown_model_is_one_problem(folder: Folder) -> None:
    """What another model would need is not asked of it."""
    path = folder.run(weights="transformer_path = 'weights'").read_text().replace('"tiny"', '"hunyuan-video"')
    assert list(problems_of(folder.write("run.toml", path))) == ["[model] type"]


def test_a_byte_order_mark_is_no_mistake(folder: Folder) -> None:
    assert problems_of(folder.write("run.toml", "\ufeffepochs = 'a'"))["key `epochs`"]


def test_files_that_cannot_be_read(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"gone.toml\n.*cannot be read"):
        read_settings(Path("gone.toml"), CHOICES)
    with pytest.raises(UserError, match="not valid TOML.*line 2"):
        read_settings(folder.write("run.toml", "epochs = 1\nepochs = = 2"), CHOICES)
    folder.write("dataset.toml", "resolutions = [")
    assert "not valid TOML" in problems_of(folder.run())[""]


def test_an_empty_file_is_told_what_it_needs(folder: Folder) -> None:
    required = dict.fromkeys(["key `output_dir`", "key `dataset`", "[model]", "[optimizer]"])
    assert problems_of(folder.write("run.toml", "")).keys() == required.keys()


def test_resolved_settings_read_back_the_same_without_the_accounts_key(folder: Folder) -> None:
    path = folder.run(
        top='eval_datasets = [{name = "a", config = "dataset.toml"}]\ngradient_clipping = 0.5',
        model="max_sequence_length = 8\ntext_encoders = [{type = 't5', path = 'weights'}]",
        optimizer="eps = 1e-08\nbetas = [0.9, 0.95]",
        tables="[adapter]\ntype = 'lora'\nrank = 4\nexclude = ['*.norm']\n"
        "[monitoring]\nenable_wandb = true\nwandb_api_key = 'secret'",
    )
    settings = read_settings(path, CHOICES)
    write_resolved(settings, Path("resolved.toml"))
    assert "secret" not in Path("resolved.toml").read_text()
    assert "secret" not in repr(settings)
    again = read_settings(Path("resolved.toml"), CHOICES)
    without_key = settings.monitoring.model_copy(update={"wandb_api_key": None})
    assert again == settings.model_copy(update={"monitoring": without_key})


def test_home_is_expanded_and_relative_paths_stay(folder: Folder) -> None:
    path = folder.run(tables="[adapter]\ntype = 'lora'\nrank = 1\ninit_from_existing = '~/a'")
    settings = read_settings(path, CHOICES)
    assert settings.adapter.init_from_existing == Path.home() / "a"
    assert settings.output_dir == Path("runs")


def test_dtypes_by_name() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "where", "words"),
    [
        ("decay = 1.0", "[ema] decay", "less than 1"),
        ("decay = -0.1", "[ema] decay", "at least 0"),
        ("warmup = 'linear'", "[ema] warmup", "'none', 'ratio' or 'power'"),
        ("power = 0.0", "[ema] power", "greater than 0"),
        ("warmup = 'ratio'\npower = 0.5", "[ema] power", 'warmup = "power" alone'),
        ("update_interval = 0", "[ema] update_interval", "at least 1"),
        ("device = 'cuda'", "[ema] device", "'cpu' or 'gpu'"),
        ("ema_decay = 0.9", "[ema] ema_decay", "did you mean `decay`"),
    ],
)
def test_mistakes_in_the_moving_average_are_told(folder: Folder, keys: str, where: str, words: str) -> None:
    problems = problems_of(folder.run(tables=f"[ema]\n{keys}"))
    assert list(problems) == [where]
    assert words in problems[where]
