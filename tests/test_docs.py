"""What the documents say exists and works; .ci/run runs the README's two commands."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "AGENTS.md", "kernels/README.md", "examples/README.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
PATH = re.compile(r"`((?:tests|sft_fast|csrc|kernels|examples|benchmarks)/[\w./-]*)`")


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    folder = (ROOT / document).parent
    missing = [target for target in LINK.findall(text) if not (folder / target).exists()]
    missing += [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert not missing


def test_the_tree_names_every_folder_and_module_once() -> None:
    import sft_fast

    package = ROOT / "sft_fast"
    tree = re.findall(r"^    (\S.*)$", sft_fast.__doc__ or "", re.M)
    assert "\n".join(["```", *tree, "```"]) in (ROOT / "README.md").read_text(encoding="utf-8")
    named = [name for line in tree for name in re.findall(r"[\w/]+(?:\.py|/)(?= )", line)]
    there = {f"{path.parent.name}/" for path in package.glob("*/*.py")}
    there |= {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert sorted(name for name in named if "/" not in name[:-1]) == sorted(there)
    assert not [name for name in named if not (package / name).exists()]


def test_the_tests_that_ci_names_exist() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (block,) = re.findall(r"files=\(.*?\)", script, re.S)
    # bash expands the braces.
    shell = ["bash", "-c", f'{block}; printf "%s\\n" "${{files[@]}}"']
    named = subprocess.run(shell, check=True, capture_output=True, text=True).stdout.split()
    assert len(named) > 10
    for name in [*named, *re.findall(r"tests/[\w/]+\.py(?= )", script)]:
        path, _, function = name.partition("::")
        if (ROOT / path).is_dir():
            assert list((ROOT / path).glob("test_*.py")), name
        else:
            assert f"def {function}" in (ROOT / path).read_text(encoding="utf-8"), name


def test_what_the_page_of_surprises_names_exists() -> None:
    """Its tests, and every script of findings/ in exactly one row."""
    text = (ROOT / "docs/surprises.md").read_text(encoding="utf-8")
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(tests) > 20
    for path, function in tests:
        assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), (path, function)
    scripts = [path.relative_to(ROOT).as_posix() for path in (ROOT / "findings").glob("*.sh")]
    assert sorted(re.findall(r"`(findings/\w+\.sh)`", text)) == sorted(scripts)


def test_the_readme_config_loads(tmp_path: Path) -> None:
    from sft_fast.config.schema import load_config

    (block,) = blocks("yaml")
    path = tmp_path / "my.yaml"
    path.write_text(block, encoding="utf-8")
    config = load_config(path, ["optim.lr=2e-5"])
    assert (config.optim.lr, config.parallel.tensor, config.parallel.sequence) == (2e-5, 2, True)


PAGES = sorted((ROOT / "docs").glob("*.md"))
HUB_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
ROW = '{{"question": "repeat {number}", "answer": "{number}"}}\n'
# Programs that the tests cannot run; all of ours are in bash blocks, and those are run.
FOREIGN = ("git", "python3", "docker", "pip", "--security-opt")


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def workspace(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder in which the commands of a page mean something."""
    from sft_fast.config.schema import load_config
    from sft_fast.data.demo import demo_tokenizer
    from sft_fast.models.architecture import architecture_from_shape, architecture_to_hf

    model = tmp_path / "tiny_model"
    tokenizer = demo_tokenizer()
    tokenizer.save_pretrained(model)
    shape = load_config(None, ["model.shape.max_position_embeddings=8192"]).model.shape
    assert shape is not None
    hf_config = architecture_to_hf(architecture_from_shape(shape, len(tokenizer)))
    (model / "config.json").write_text(json.dumps(hf_config))
    monkeypatch.setattr("sft_fast.models.locate.local_folder", lambda *arguments: model)
    # Nothing is cached, and a run could download it.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "chats.jsonl").write_text("".join(ROW.format(number=n) for n in range(200)))
    (tmp_path / "outputs").mkdir()
    for name in ("demo", "my_run", "qwen2.5-0.5b-instruct", "llama-3.1-8b"):
        shutil.copytree(finished_run, tmp_path / "outputs" / name)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(
    page: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training is started up to the call of torchrun; everything else runs to its end."""
    from sft_fast.cli import main

    found = fenced(page, "bash")
    # .ci/run runs the first one of the README.
    chosen = found[1:] if page.name == "README.md" else found
    commands = [line for block in chosen for line in block.splitlines()]
    if not any(" init " in command for command in commands):
        assert main(["init", HUB_MODEL, "chats.jsonl", "-o", "my.yaml"]) == 0
    for command in commands:
        program, *arguments = shlex.split(command.partition(" > ")[0], comments=True)
        assert program == "sft_fast", command
        if arguments[0] == "train":
            arguments.append("--dry-run")
        if arguments[0] == "chat":
            arguments += ["--max-new-tokens", "2", "--device", "cpu"]
        assert main(arguments) == 0, f"{command}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_that_are_not_run_hold_other_programs_only(page: Path) -> None:
    for block in fenced(page, "sh"):
        for line in block.splitlines():
            assert line.split()[0] in FOREIGN, line
    shown = set(re.findall(r"```(\w*)\n", page.read_text(encoding="utf-8"))) - {""}
    assert shown <= {"bash", "sh", "yaml", "python"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configurations_of_a_page_load(page: Path, tmp_path: Path) -> None:
    from sft_fast.config.schema import load_config

    for block in fenced(page, "yaml"):
        (tmp_path / "x.yaml").write_text(block)
        has_length = "steps:" in block or "train_iters:" in block
        length = [] if has_length else ["train.epochs=1"]
        load_config(tmp_path / "x.yaml", ["model.path=org/model", *length])


@pytest.mark.usefixtures("registries_as_before")
def test_the_extensions_of_the_documentation_work() -> None:
    from sft_fast.data.format_registry import get_format
    from sft_fast.registry import get_loss, get_metric, get_trainer
    from sft_fast.runtime.phases import Phases
    from sft_fast.stages import ActiveTokens

    names: dict[str, Any] = {}
    for block in fenced(ROOT / "docs" / "extending.md", "python"):
        exec(block, names)
    chat = get_format("ticket").read({"request": "a", "answer": "b"}, {})
    assert [message.content for message in chat.messages] == ["a", "b"]
    assert get_loss("focal") is names["focal"]
    # Better answers have a lower loss.
    losses = get_loss("focal")(torch.tensor([-9.0, -3.0, -1.0, -0.1]), torch.arange(4))
    assert (losses.diff() < 0).all()
    assert get_metric("whole_answer").function is names["whole_answer"]
    stage = names["Ending"](names["EndingConfig"](token_id=3))
    tokens = ActiveTokens.of(torch.tensor([3, 5]), torch.tensor([0, 1]))
    outputs = torch.tensor([[4.0], [-4.0]])
    assert (stage.loss(outputs, tokens) < 0.02).all() and (stage.loss(-outputs, tokens) > 4).all()
    assert stage.measure(outputs, tokens)["accuracy"].tolist() == [1, 1]
    assert get_trainer("megatron", "score")(None, Phases.unwatched()) == 0


def test_keys_that_the_documentation_names_exist() -> None:
    from sft_fast.config.schema import Config
    from sft_fast.config.validation import dotted_keys

    known = set(dotted_keys(Config))
    sections = "|".join(name for name in known if "." not in name)
    named = re.compile(rf"`((?:{sections})(?:\.(?!jsonl)\w+)+)")
    unknown = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.stem == "moving":
            # In the tables the first column is the other trainer's.
            text = "\n".join(
                line.split("|")[2] for line in text.splitlines() if line.count("|") == 3
            )
            assert text.count("`") > 100
        unknown |= {key for key in named.findall(text) if key not in known}
    assert not unknown


def test_keys_of_other_trainers_get_the_hint_that_their_table_gives() -> None:
    from sft_fast.config.aliases import OTHER_NAMES
    from sft_fast.config.schema import Config
    from sft_fast.config.validation import dotted_keys
    from sft_fast.errors import nearest_key

    known = list(dotted_keys(Config))
    text = (ROOT / "docs" / "moving.md").read_text(encoding="utf-8")
    # The table of Primus is compared with what reads its files.
    text = text.partition("## TRL")[2].partition("## Megatron-Bridge")[0]
    wrong = {}
    for theirs, ours in re.findall(r"^\| (`.*?) \| (.*?) \|$", text, re.M):
        keys = re.findall(r"`([\w.]+)`", ours)
        for name in re.findall(r"`(\w+)`", theirs):
            hint = name if name in known else OTHER_NAMES.get(name) or nearest_key(name, known)
            # "always" has no key, and our sections have names of their own.
            if keys and hint not in keys and name not in ("packing", "dataset_dir"):
                wrong[name] = hint
    assert not wrong


def test_the_table_of_layouts_is_what_plan_says() -> None:
    from sft_fast.config.schema import Config
    from sft_fast.config.validation import Tree, apply_overrides
    from sft_fast.models.architecture import Architecture
    from sft_fast.models.estimate import estimate_memory

    models = {
        "8B": Architecture(128256, 4096, 32, 32, 8, 14336, 128, 8192),
        "70B": Architecture(128256, 8192, 80, 64, 8, 28672, 128, 8192),
    }
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (8B|70B) \| (\d+) \| `+([^`]*)`+ \| (\d+) \|$", text, re.M)
    assert len(rows) == 9
    for model, ranks, overrides, gigabytes in rows:
        values = {
            "model": {"path": "org/model"},
            "data": {"train": "x.jsonl"},
            "packing": {"capacity": 8192},
            "train": {"epochs": 1, "global_batch_size": 64},
        }
        tree = Tree("docs", values)
        apply_overrides(tree, overrides.split())
        memory = estimate_memory(models[model], Config.model_validate(tree.data), int(ranks), 0.5)
        assert round(memory.total / 1e9) == int(gigabytes), (model, ranks, overrides)


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.rglob("index.html"))) >= len(PAGES)


@pytest.mark.slow
def test_the_screens_are_made_by_their_script(tmp_path: Path) -> None:
    script = str(ROOT / "docs" / "screens.py")
    subprocess.run([sys.executable, script, str(tmp_path)], cwd=ROOT, check=True, timeout=300)
    made, kept = ({p.name for p in f.glob("*.svg")} for f in (tmp_path, ROOT / "docs" / "images"))
    assert made == kept
    for path in tmp_path.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert "url(http" not in text and "my_run" not in text
