"""Test which modules the package imports and when, and that it registers everything in any order of imports."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from checkpoints import RECIPE, save_dense, save_text
from forks import run_forked
from tiny_configs import INSTALLED

import optimum_modegpt
from optimum_modegpt import ModeGPTConfig, ModeGPTQuantizer
from optimum_modegpt.architectures import family_of
from optimum_modegpt.cli import arguments
from optimum_modegpt.integration.registration import when_imported

QUANTISATION = "torchao bitsandbytes gptqmodel compressed_tensors hqq auto_round"
UNUSED = f"{QUANTISATION} peft lm_eval matplotlib onnx onnxruntime onnxscript datasets"
LOADED = "print(*sorted({name.partition('.')[0] for name in sys.modules} & set(names.split())))"


def script(code: str, names: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, and check that it succeeds; LOADED at its end prints which of `names` it imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nnames = {names!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


# ------------------------------------------------------------------------------------------------------------- imports


def test_the_package_imports_neither_torch_nor_transformers() -> None:
    done = script(f"import optimum_modegpt\n{LOADED}", f"torch transformers numpy {UNUSED}")
    assert (done.stdout, done.stderr) == ("\n", "")


def test_the_package_adds_no_model_code_to_the_auto_classes() -> None:
    done = script(
        f"""
import torch; from transformers import AutoModelForCausalLM; import optimum_modegpt
assert "transformers.modeling_utils" not in sys.modules
{LOADED}""",
        UNUSED,
    )
    assert (done.stdout, done.stderr) == ("\n", "")


def test_inspecting_a_dense_model_imports_no_model_code() -> None:
    done = script(
        f"""
from optimum_modegpt.cli.main import main
assert main(["inspect", "demo"]) == 0
assert "transformers.modeling_utils" not in sys.modules
{LOADED}""",
        UNUSED,
    )
    assert done.stdout.splitlines()[-1] == ""
    assert done.stdout.startswith("llama, ")
    assert done.stderr == ""


COMMANDS = [add_command.__name__ for add_command in arguments.COMMANDS]


def test_help_and_mistakes_import_neither_torch_nor_transformers() -> None:
    lines = [[], ["--help"], *([name, flag] for name in COMMANDS for flag in ("--help", "--nonsense"))]
    done = script(
        f"""
from optimum_modegpt.cli.main import main
for words in {lines!r}:
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == (0 if "--help" in words else 2), words
{LOADED}""",
        f"torch transformers numpy {UNUSED}",
    )
    assert done.stdout.splitlines()[-1] == ""
    assert done.stdout.count("usage: ") == 1 + len(COMMANDS)


def test_the_help_of_optimum_cli_imports_neither_torch_nor_transformers() -> None:
    done = script(
        f"""
from optimum.commands.optimum_cli import main
sys.argv = ["optimum-cli", "modegpt", "compress", "--help"]
try:
    main()
except SystemExit as ended:
    assert ended.code == 0
{LOADED}""",
        f"torch transformers {UNUSED}",
    )
    assert done.stdout.startswith("usage: optimum-cli modegpt compress")
    assert done.stdout.splitlines()[-1] == ""


def test_every_command_has_a_module_that_runs_it() -> None:
    for name in COMMANDS:
        assert callable(importlib.import_module(f"optimum_modegpt.cli.commands.{name}").run)


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse(Path(str(optimum_modegpt.__file__)).read_text(encoding="utf-8"))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: str(node.module).removeprefix("optimum_modegpt.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == optimum_modegpt._MODULES
    assert {*seen, "__version__"} == set(optimum_modegpt.__all__)


def test_the_package_lists_its_public_names_and_has_no_others() -> None:
    done = script("import optimum_modegpt\nprint(*dir(optimum_modegpt))")
    assert set(optimum_modegpt.__all__) <= set(done.stdout.split())
    with pytest.raises(AttributeError, match="'optimum_modegpt' has no attribute 'compres'"):
        optimum_modegpt.compres  # noqa: B018 - the access is the test


# -------------------------------------------------------------------------------------------------------- registration


def registers(code: str, **environment: str) -> None:
    """Run code in a process that has imported neither transformers nor the package, and check that it succeeds."""
    done = run_forked(code, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_light_list_of_families_is_that_of_the_families() -> None:
    for dense in INSTALLED:
        classes = family_of(dense)
        assert classes is not None
        assert classes.config.model_type == classes.family.compressed_type
        assert transformers.AutoConfig.for_model(
            classes.family.compressed_type, modegpt={"format_version": 1}
        ).__class__ is (classes.config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save a dense model, a compressed one, and the text of its calibration."""
    root = tmp_path_factory.mktemp("models")
    text, dense = save_text(root / "text.txt"), save_dense(root / "dense")
    model = transformers.LlamaForCausalLM.from_pretrained(dense)
    ModeGPTQuantizer(dataset=str(text), **RECIPE).quantize_model(model, progress=False).save_pretrained(root / "small")
    return {"dense": str(dense), "small": str(root / "small"), "text": str(text)}


ORDERS = {
    "package first": "import optimum_modegpt; from transformers import AutoModelForCausalLM as loader",
    "package last": "from transformers import AutoModelForCausalLM as loader; import optimum_modegpt",
    "in the middle of a model's import": "import optimum_modegpt; from transformers import LlamaForCausalLM as loader",
    "package last, after a model": "from transformers import LlamaForCausalLM as loader; import optimum_modegpt",
    "quantizers first": "import optimum_modegpt, transformers.quantizers.auto\n"
    "from transformers import AutoModelForCausalLM as loader",
}
RARE = ("package last, after a model", "quantizers first")
"""Orders that are tested in the full matrix only."""


@pytest.mark.parametrize(
    "order",
    [pytest.param(code, id=name, marks=[pytest.mark.slow] if name in RARE else []) for name, code in ORDERS.items()],
)
def test_everything_is_registered_in_any_order_of_imports(order: str, folders: dict[str, str]) -> None:
    config = {"quant_method": "modegpt", "dataset": folders["text"], **RECIPE}
    registers(
        f"""
{order}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
for keyword in ("compression_config", "quantization_config"):
    model = loader.from_pretrained({folders["dense"]!r}, **{{keyword: {config!r}}})
    assert type(model).__module__ == "optimum_modegpt.modeling.modegpt_llama", type(model)
assert model.companion.__module__ == "optimum_modegpt.hub.upload"
config = AutoConfig.from_pretrained({folders["small"]!r})
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    assert type(auto.from_config(config)).__name__.startswith("ModeGPTLlama")
"""
    )


def test_a_compressed_model_is_the_first_that_is_loaded(folders: dict[str, str]) -> None:
    registers(
        f"""
import optimum_modegpt
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folders["small"]!r})
assert type(model).__module__ == "optimum_modegpt.modeling.modegpt_llama"
assert type(model).companion is not None
"""
    )


def test_the_configuration_is_registered_without_the_keyword(folders: dict[str, str]) -> None:
    config = {"dataset": folders["text"], **RECIPE}
    registers(
        f"""
import optimum_modegpt
from transformers import LlamaForCausalLM
from optimum_modegpt import ModeGPTConfig
model = LlamaForCausalLM.from_pretrained({folders["dense"]!r}, quantization_config=ModeGPTConfig(**{config!r}))
assert model.config.model_type == "modegpt_llama"
""",
        OPTIMUM_MODEGPT_NO_PATCH="1",
    )


def test_the_configuration_has_the_recipes_fields_and_is_transformers_own_kind() -> None:
    config = ModeGPTConfig(sparsity=0.2)
    assert isinstance(config, transformers.utils.quantization_config.QuantizationConfigMixin)
    assert ModeGPTConfig.__doc__ is not None
    assert "sparsity: fraction" in ModeGPTConfig.__doc__
    assert dict(config) == config.to_dict()
    assert '"sparsity": 0.2' in repr(config)


# --------------------------------------------------------------------------------------------------- post-import hooks


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a module named `hooked` that can be imported, and return its file."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hooked", raising=False)
    (tmp_path / "hooked.py").write_text("value = 1\n")
    return tmp_path / "hooked.py"


def test_an_action_is_called_once_right_after_the_import(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    when_imported("hooked", lambda found: calls.append(found.value))
    assert calls == []
    imported = importlib.import_module("hooked")
    assert calls == [1]
    importlib.reload(imported)
    assert calls == [1]
    when_imported("hooked", lambda found: calls.append(found))
    assert calls == [1, imported]
    assert importlib.import_module("inspect").getsource(imported) == "value = 1\n"


def test_an_action_waits_for_an_import_that_succeeds(module: Path) -> None:
    calls: list[ModuleType] = []
    when_imported("hooked", calls.append)
    module.write_text("raise RuntimeError('half way')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half way"):
            importlib.import_module("hooked")
    assert calls == []
    module.write_text("value = 'a longer file than before, so that the cache of its code is not used'\n")
    assert calls == [importlib.import_module("hooked")]


def test_a_module_that_cannot_be_found_stays_so() -> None:
    when_imported("no_such_module_anywhere", print)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_anywhere")


def test_other_finders_are_asked(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        asked: list[str] = []  # noqa: RUF012 - read once

        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            cls.asked.append(name)
            return None

    when_imported("hooked", lambda found: None)
    monkeypatch.setattr(sys, "meta_path", [sys.meta_path[0], Finder, *sys.meta_path[1:]])
    assert importlib.import_module("hooked").value == 1
    assert "hooked" in Finder.asked
