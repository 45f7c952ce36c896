"""The architecture, read from the imports: who may import whom, and how long things may grow."""

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ("train.py", "models", "utils", "optimizers")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_LINES = {"train.py": 250}
"""Files that are to be shorter than others."""

# By module or package: its floor, and the folder that it counts to. A module imports from floors below its
# own, and from its own folder.
FLOORS = {
    "train": (9, "train"),
    "models": (8, "models"),
    "models.assembly": (7, "assembly"),
    # Commands, as train.py is.
    "models.assembly.timestep_plot": (9, "timestep_plot"),
    "models.assembly.tools": (9, "tools"),
    "models.families": (7, "families"),
    "models.base": (6, "base"),
    "models.contract": (6, "base"),
    "models.foundation.encoders": (5, "encoders"),
    "models.foundation.checkpoints": (4, "checkpoints"),
    "models.foundation.layers": (4, "layers"),
    "models.foundation": (4, "foundation"),
    "models.foundation.denoisers": (3, "denoisers"),
    "utils.run": (3, "run"),
    "utils.dataset": (2, "dataset"),
    "utils.parallel": (2, "parallel"),
    "utils.adapters": (2, "adapters"),
    "optimizers": (2, "optimizers"),
    "utils.settings": (1, "settings"),
    "utils.media": (1, "media"),
    "utils.quantised": (1, "quantised"),
    "utils.diffusion": (1, "diffusion"),
    "utils.ranks": (1, "ranks"),
    "utils.machine": (0, "machine"),
    "utils.progress_bar": (1, "progress_bar"),
    "utils.json_files": (1, "json_files"),
    "utils.errors": (0, "errors"),
    "utils": (0, "utils"),
}


def sources(*tops: str) -> list[str]:
    """Paths of the Python files under `tops`, relative to the root."""
    found = [path for top in tops for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.exists())


def module_name(path: str) -> str:
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


def place(module: str) -> tuple[int, str] | None:
    """Floor and folder of a module of the project; None for what comes from outside."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((FLOORS[prefix] for prefix in prefixes if prefix in FLOORS), None)


def imports(path: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every module that a file imports, wherever in it, with the name that it is bound to."""
    package = module_name(path).split(".")[: None if path.endswith("__init__.py") else -1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # A name may itself be a module, as in `from utils import ranks`.
                whole = f"{module}.{alias.name}"
                yield whole if is_module(whole) else module, alias.asname or alias.name


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def bases(tree: ast.Module) -> set[str]:
    """Names of which a class of the file is a subclass; for `flux.FluxPipeline` also `flux`."""
    written = [ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
    return {name.rpartition(".")[0] or name for name in written} | set(written)


def faults(path: str, source: str) -> list[str]:
    """What is against the architecture in a file of the house."""
    tree = ast.parse(source)
    own, (floor, folder) = module_name(path), place(module_name(path))
    imported, extended = list(imports(path, tree)), bases(tree)
    subclassed_from = {module for module, bound in imported if bound in extended}
    found = []
    for module, _ in imported:
        if module.split(".")[0] == "deepspeed" and folder != "parallel":
            found.append(f"{path} imports deepspeed; only utils/parallel does")
        target = place(module)
        if target is None or module == own:
            continue
        if folder == "models" and target[1] == "assembly":
            found.append(f"{path} imports {module}; what joins a model and a run is not for models")
        if target[1] == folder:
            if folder == "models" and module != "models" and own != "models" and module not in subclassed_from:
                found.append(f"{path} imports {module} and subclasses nothing of it")
        elif target[0] >= floor:
            found.append(f"{path} (floor {floor}) imports {module} (floor {target[0]})")
    return found


@pytest.mark.parametrize("path", sources(*HOUSE))
def test_imports_go_down(path: str) -> None:
    assert faults(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sources(*HOUSE, "tests", "examples"))
def test_files_and_functions_are_short(path: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_LINES.get(path, MAX_FILE_LINES)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}: {node.name}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("utils/dataset/batches.py", "import deepspeed.comm"),
        ("utils/run/sampling.py", "def f():\n    from models.base import BasePipeline"),
        ("optimizers/lion.py", "import models"),
        ("optimizers/lion.py", "from utils.dataset import buckets"),
        ("utils/settings/reader.py", "from utils import ranks"),
        ("utils/media/decode.py", "from ..settings import schema"),
        ("utils/errors.py", "from utils.settings import schema"),
        ("models/base.py", "import models.flux"),
        ("models/base.py", "from models.assembly import stage"),
        ("models/assembly/stage.py", "from models.flux import FluxPipeline"),
        ("models/families/pictures.py", "from models.assembly import stage"),
        ("models/foundation/encoders/text.py", "from models.base import BasePipeline"),
        ("models/foundation/layers/unet.py", "from models.foundation.checkpoints import key_layouts"),
        ("models/foundation/checkpoints/weights.py", "from models.foundation.encoders import vae"),
        ("models/chroma.py", "from models.flux import double_block"),
        ("models/chroma.py", "from models.assembly.prompts import prompt_versions"),
        ("models/flux.py", "import train"),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str) -> None:
    assert len(faults(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("utils/parallel/engine.py", "import deepspeed\nfrom utils.ranks import barrier"),
        ("models/chroma.py", "from models.flux import FluxPipeline\nclass C(FluxPipeline): ..."),
        ("models/chroma.py", "from models import flux\nclass C(flux.FluxPipeline): ..."),
        ("models/base.py", "from models.foundation.layers import chain as stages\nfrom utils.run import export"),
        ("train.py", "import models\nimport utils.settings.reader\nimport torch"),
        ("utils/media/decode.py", "from . import geometry"),
    ],
)
def test_a_right_import_is_let_pass(path: str, source: str) -> None:
    assert faults(path, source) == []
