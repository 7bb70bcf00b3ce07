"""What the documents say exists and works; .ci/run runs the README's two commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "kernels/README.md", "examples/README.md"]
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


def test_the_readme_config_loads(tmp_path: Path) -> None:
    from sft_fast.config import load_config

    (block,) = blocks("yaml")
    path = tmp_path / "my.yaml"
    path.write_text(block, encoding="utf-8")
    config = load_config(path, ["optim.lr=2e-5"])
    assert (config.optim.lr, config.parallel.tensor, config.parallel.sequence) == (2e-5, 2, True)


def test_the_readme_stage_registers() -> None:
    from sft_fast.registry import get_trainer

    (block,) = blocks("python")
    names: dict[str, object] = {}
    exec(block, names)
    assert get_trainer("megatron", "my_stage") is names["train"]
