"""Who may import what: the verify path stays light, the heavy libraries stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import hf_watermark
from hf_watermark import OwnerKey, Scheme
from hf_watermark.carriers import choose_carriers
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import make_claim
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.files import FolderFiles
from hf_watermark.projections import Projection

PACKAGE = Path(hf_watermark.__file__).parent
STANDARD = {"collections", "dataclasses", "re"}
SOURCES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")
}

LIGHT = (
    "hf_watermark",
    "hf_watermark.errors",
    "hf_watermark.key",
    "hf_watermark.scheme",
    "hf_watermark.carriers",
    "hf_watermark.projections",
    "hf_watermark.extraction",
    "hf_watermark.significance",
    "hf_watermark.evidence",
    "hf_watermark.safetensors_ranges",
    "hf_watermark.files",
    "hf_watermark.checkpoint",
    "hf_watermark.symmetry",
    "hf_watermark.claims",
    "hf_watermark.found_claims",
    "hf_watermark.references",
    "hf_watermark.readings",
    "hf_watermark.softlabels",
    "hf_watermark.softlabels.chips",
    "hf_watermark.softlabels.features",
    "hf_watermark.softlabels.answer_lists",
    "hf_watermark.softlabels.outputs",
    "hf_watermark.softlabels.secret_files",
    "hf_watermark.softlabels.probes",
    "hf_watermark.softlabels.detection",
    "hf_watermark.softlabels.verification",
    "hf_watermark.verify",
)
HEAVY = ("torch", "transformers", "scipy", "accelerate", "datasets", "matplotlib", "pandas")

USE = f"""
import importlib, sys

for name in {LIGHT!r}:
    importlib.import_module(name)

from hf_watermark import OwnerKey
from hf_watermark.significance import odds_in_words
from hf_watermark.softlabels.probes import Probes
from hf_watermark.verify import verify_hub_model, verify_outputs

folder, key_file = sys.argv[1:]
key = OwnerKey.load(key_file, "a passphrase")
evidence = verify_hub_model(folder, key)
assert evidence.found, evidence
odds_in_words(evidence.log10_p), evidence.to_json(), repr(key.for_recipient("a"))
assert not verify_hub_model(folder, OwnerKey.generate(), read="all").found
assert verify_hub_model(folder).verdict == "not checked"

import numpy as np

psi, clean = np.random.default_rng(0).standard_normal((2, 100, 8)).astype(np.float32)
clean -= np.log(np.exp(clean).sum(1, keepdims=True))
probes = Probes(key, psi, clean, np.zeros(100, bool))
suspect = clean + psi @ probes.signs("a") / 3
suspect -= np.log(np.exp(suspect).sum(1, keepdims=True))
assert verify_outputs(suspect, None, probes, recipient=["b", "a"]).recipient == "a"
print([name for name in {HEAVY!r} if sys.modules.get(name)])
"""


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A marked folder with its claim, and the sealed key."""
    folder = tmp_path_factory.mktemp("marked")
    rng = np.random.default_rng(0)
    tensors = {
        f"encoder.layer.{i}.dense.weight": rng.standard_normal((96, 64)).astype(np.float32)
        for i in range(2)
    }
    key, scheme = OwnerKey(bytes(range(32)), "acme"), Scheme()
    carriers = choose_carriers({name: array.shape for name, array in tensors.items()})
    projection = Projection(key, scheme, carriers)
    for i, carrier in enumerate(carriers):
        change = (projection.row_signs(i) * projection.message_signs * 4.0) @ projection.x(i)
        tensors[carrier.name] += (change / np.sqrt(carrier.rows)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    names = [carrier.name for carrier in carriers]
    claim = make_claim(Checkpoint.open(FolderFiles(folder)), key, scheme, names)
    (folder / CLAIM_FILE).write_bytes(claim.to_bytes())
    key_file = tmp_path_factory.mktemp("key") / "acme.key"
    key.save(key_file, "a passphrase")
    return folder, key_file


def run(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_verifying_a_folder_needs_no_heavy_library(marked):
    assert run("-c", USE, *marked) == "[]"


def test_heavy_libraries_are_there_to_be_imported():
    """Or the test above would pass for want of them."""
    for name in ("torch", "transformers", "scipy"):
        assert find_spec(name), name


def test_verifying_works_without_the_heavy_libraries(marked):
    """Blocked outright: an import inside a try would fail here, too."""
    block = f"import sys\nfor name in {HEAVY!r}:\n    sys.modules[name] = None\n"
    assert run("-c", block + USE, *marked) == "[]"


@pytest.mark.parametrize("module", LIGHT)
def test_each_light_module_alone(module):
    heavy = (*HEAVY, "huggingface_hub")
    check = f"import {module}, sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert run("-c", check) == "[]"


# Sources ------------------------------------------------------------------------------------------


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that a source imports anywhere, also lazily or through importlib."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function in ("import_module", "__import__", "find_spec", "importorskip"):
                names = [arg for arg in node.args if isinstance(arg, ast.Constant)]
                found |= {str(name.value).partition(".")[0] for name in names}
    return found


def for_types_alone(tree: ast.Module) -> ast.Module:
    """The source without what stands under `if TYPE_CHECKING:`."""

    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If):
            if ast.unparse(node.test).endswith("TYPE_CHECKING"):
                return node.orelse or None
            return self.generic_visit(node)

    return Strip().visit(tree)


IMPORTS = {
    name: imported(for_types_alone(ast.parse(path.read_text(encoding="utf-8"))))
    for name, path in SOURCES.items()
}


def importers(library: str) -> set[str]:
    return {name for name, libraries in IMPORTS.items() if library in libraries}


def test_the_scanner_sees_lazy_imports():
    source = (
        "def f():\n    import a.b\n    from c.d import e\n    importlib.import_module('g.h')\n"
        "if TYPE_CHECKING:\n    import i\nfrom . import j\n"
    )
    assert imported(for_types_alone(ast.parse(source))) == {"a", "c", "g"}
    assert len(SOURCES) > 20


def test_only_a_few_rooms_import_transformers():
    allowed = {
        "trainer",
        "demo",
        "testing/in_process",
        "softlabels/classifiers",
        "softlabels/architectures",
    }
    assert importers("transformers") <= allowed
    assert "trainer" in importers("transformers")


def test_only_hub_and_card_import_huggingface_hub():
    strangers = importers("huggingface_hub") - {"hub", "transfers", "card", "demo"}
    assert {name for name in strangers if not name.startswith("testing/")} == set()


def test_light_modules_import_no_heavy_library_even_lazily():
    for module in LIGHT:
        name = module.partition(".")[2].replace(".", "/") or "__init__"
        name = name if name in IMPORTS else f"{name}/__init__"
        assert IMPORTS[name].isdisjoint(HEAVY), name


def test_data_flows_one_way():
    """Each room uses those before it alone."""
    flow = [
        "errors",
        "key",
        "scheme",
        "carriers",
        "projections",
        "significance",
        "extraction",
        "evidence",
        "safetensors_ranges",
        "files",
        "checkpoint",
        "symmetry",
        "claims",
        "found_claims",
        "references",
        "readings",
        "softlabels.chips",
        "softlabels.features",
        "softlabels.answer_lists",
        "softlabels.outputs",
        "softlabels.secret_files",
        "softlabels.probes",
        "softlabels.detection",
        "softlabels.verification",
        "verify",
    ]

    def room_of(module):
        """A module's, and of a package that is one room the package's."""
        parts = module.split(".")
        return ".".join(parts[:2]) if parts[0] == "softlabels" else parts[0]

    for place, room in enumerate(flow):
        for name, path in SOURCES.items():
            if room_of(name.replace("/", ".")) != room:
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            ours = {
                room_of(node.module.removeprefix("hf_watermark."))
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith("hf_watermark.")
            }
            # hub: lazily, to open what is not local
            assert ours - {"hub", room} <= set(flow[:place]), name


def test_symmetry_needs_numpy_alone_and_scipy_late():
    for name, path in SOURCES.items():
        if name.startswith("symmetry/"):
            assert IMPORTS[name] <= {"__future__", "numpy", "scipy", "hf_watermark"} | STANDARD, (
                name
            )
            body = ast.parse(path.read_text(encoding="utf-8")).body
            at_once = [
                node for node in body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))
            ]
            assert "scipy" not in imported(ast.Module(at_once, [])), name


def test_library_code_neither_prints_nor_exits():
    for name, path in SOURCES.items():
        if name == "demo" or name.startswith(("cli/", "testing/")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "sys.exit", "exit", "quit"), name


def test_the_public_list_is_short():
    assert hf_watermark.__all__ == ["Claim", "Evidence", "OwnerKey", "Scheme", "WatermarkError"]
    for name in hf_watermark.__all__:
        assert getattr(hf_watermark, name).__doc__
