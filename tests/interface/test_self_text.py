"""Test calibration on text that the dense model itself writes: the script, the sampling, the cache, and every entry."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from datasets import config as datasets_config
from rates import set_rate_in_16_bits
from safetensors.torch import save_file
from tiny_models import dense, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_modegpt import CalibrationDataError, ModeGPTConfig, ModeGPTModelForCausalLM, ModeGPTQuantizer
from optimum_modegpt.calibration import self_text as writing
from optimum_modegpt.calibration.self_text import Script, Turn, nucleus, script_of, write
from optimum_modegpt.cli import main as cli
from optimum_modegpt.loading import self_text as cache
from optimum_modegpt.loading.self_text import lent, self_windows
from optimum_modegpt.progress import shown_as

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
BOS, EOS = 1, 2


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache of each test apart, also from that of the user."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "modegpt_self"


@pytest.fixture(scope="module")
def model() -> Any:
    return dense("llama-gqa-tied")


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    found = tokenizer()
    found.chat_template = template
    return found


def noise_of(windows: int, length: int, seed: int = 0) -> Tensor:
    return torch.rand(windows, length, generator=torch.Generator().manual_seed(seed))


def windows_of(model: Any, windows: int = 6, length: int = 24, seed: int = 0, found: Any = None) -> Any:
    found = found or tokenizer()
    return self_windows(model, found, script_of(found, length), windows=windows, length=length, seed=seed)


def no_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "write", lambda *_, **__: pytest.fail("the model was asked to write"))


# ------------------------------------------------------------------------------------------------------------- script


def test_documents_begin_as_prompts_do() -> None:
    # The tokenizer adds no BOS, so the window begins after it.
    assert script_of(tokenizer(), 16) == Script((BOS,), (Turn((BOS,), frozenset({EOS})),), hidden=True)
    found = tokenizer()
    found.bos_token = None
    assert script_of(found, 16) == Script((EOS,), (Turn((EOS,), frozenset({EOS})),), hidden=True)
    found.eos_token = None
    with pytest.raises(CalibrationDataError, match="neither a BOS nor an EOS token"):
        script_of(found, 16)


def test_conversations_follow_the_template() -> None:
    found = chat_tokenizer()

    def ids(text: str) -> tuple[int, ...]:
        return tuple(found(text, add_special_tokens=False).input_ids)

    script = script_of(found, 64)
    assert script.beginning == ids("<s>user\n")
    question, reply = script.turns
    assert question == Turn(ids("</s><s>user\n"), frozenset({EOS}), writing.USER_TOKENS)
    assert reply == Turn(ids("</s><s>assistant\n"), frozenset({EOS}))


def test_special_token_that_ends_a_user_turn() -> None:
    found = chat_tokenizer(TEMPLATE.replace("</s>", "<end>"))
    found.add_special_tokens({"additional_special_tokens": ["<end>"]})
    end = found.convert_tokens_to_ids("<end>")
    assert [turn.ends for turn in script_of(found, 64).turns] == [{EOS, end}, {EOS, end}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ raise_exception('none of this') }}{% endfor %}", "none of this"),
        ("nothing", "where a user turn begins"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "where a user turn begins"),
    ],
)
def test_template_that_cannot_be_used(template: str, message: str) -> None:
    with pytest.raises(CalibrationDataError, match=message):
        script_of(chat_tokenizer(template), 64)


def test_window_without_space_after_the_beginning() -> None:
    with pytest.raises(CalibrationDataError, match=r"6 tokens .* after the 6 tokens .*sequence_length"):
        script_of(chat_tokenizer(), 6)


# ----------------------------------------------------------------------------------------------------------- sampling


def test_nucleus_is_sampled_in_proportion() -> None:
    probabilities = torch.tensor([0.04, 0.5, 0.06, 0.3, 0.1])
    noise = (torch.arange(1000) + 0.5) / 1000
    tokens = nucleus(probabilities.log().expand(1000, -1), noise)
    # 0.5 + 0.3 + 0.1 + 0.06 is the first sum above 0.95, so token 0 never appears.
    shares = torch.bincount(tokens, minlength=5) / 1000
    assert torch.allclose(shares, torch.tensor([0, 0.5, 0.06, 0.3, 0.1]) / 0.96, atol=2e-3)
    assert nucleus(probabilities.log()[None], torch.tensor([0.0])).tolist() == [1]
    assert nucleus(probabilities.log()[None], torch.tensor([1 - 1e-9], dtype=torch.float64)).tolist() == [2]


def test_nucleus_has_a_maximum_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "TOP_K", 3)
    noise = (torch.arange(300) + 0.5) / 300
    assert set(nucleus(torch.arange(10).mul(1e-3).expand(300, -1), noise).tolist()) == {7, 8, 9}


def test_window_depends_only_on_its_own_noise(model: Any) -> None:
    noise, script = noise_of(5, 20), script_of(tokenizer(), 20)
    together = write(model, script, noise)
    assert together.shape == (5, 20)
    assert torch.equal(torch.cat([write(model, script, row[None]) for row in noise]), together)
    assert len(together.unique(dim=0)) == 5


def test_windows_are_samples_of_the_model(model: Any) -> None:
    noise, script = noise_of(3, 20), Script((BOS,), (Turn((), frozenset()),), hidden=True)
    written = write(model, script, noise)
    ids = torch.cat([torch.full((3, 1), BOS), written], dim=1)
    with torch.no_grad():
        logits = model(ids).logits
    for place in range(20):
        assert torch.equal(nucleus(logits[:, place], noise[:, place]), written[:, place])


def test_model_and_global_random_state_are_unchanged(model: Any) -> None:
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 3
    settings, script = model.generation_config, script_of(tokenizer(), 20)
    model.train()
    state, noise = torch.get_rng_state(), noise_of(3, 20)
    try:
        found = windows_of(model, 3, 20)
        assert model.training
        assert model.generation_config is settings
    finally:
        model.eval()
        model.generation_config = type(settings)()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.tokens, write(model, script, noise))  # without the penalty


class Rows:
    """Feed tokens to the writer as if a model had sampled them, and collect the tokens that it leaves."""

    def __init__(self, script: Script, sampled: list[int]) -> None:
        self.written = list(script.beginning)
        noise = torch.zeros(1, len(script.beginning) + len(sampled))
        writer = writing._Writer(script, noise, noise.shape[1], lambda _: None)
        for token in sampled:
            scores = torch.zeros(1, 300)
            scores[0, token] = 100.0
            left = writer(torch.tensor([self.written]), scores)
            assert left.isfinite().sum() == 1
            self.written.append(int(left.argmax()))


def test_turns_alternate_and_contain_the_header() -> None:
    script = Script((7,), (Turn((3, 4, 7), frozenset({3}), most=2), Turn((3, 5), frozenset({3, 9}))))
    # The model ends the question, then the reply; tokens that it samples during a header are ignored.
    assert Rows(script, [50, 3, 0, 60, 61, 62, 3, 0, 0, 50]).written == [7, 50, 3, 5, 60, 61, 62, 3, 4, 7, 50]
    # Another end token is kept before the header.
    assert Rows(script, [50, 3, 0, 60, 9, 0, 0, 0, 50]).written == [7, 50, 3, 5, 60, 9, 3, 4, 7, 50]
    # A question that does not end is cut after two tokens.
    assert Rows(script, [50, 51, 52, 0, 60]).written == [7, 50, 51, 3, 5, 60]


def test_document_follows_document(model: Any) -> None:
    tokens = write(model, script_of(tokenizer(), 60), noise_of(40, 60)).tolist()
    following = [after for row in tokens for before, after in itertools.pairwise(row) if before == EOS]
    assert following
    assert set(following) == {BOS}


# -------------------------------------------------------------------------------------------------------------- cache


def test_windows_have_a_record(model: Any) -> None:
    found = windows_of(model)
    assert (found.record["name"], found.record["windows"], found.record["available_windows"]) == ("self", 6, 6)
    assert found.record["first_token"] is None
    assert windows_of(model, found=chat_tokenizer()).record["first_token"] == "<s>"


def test_second_run_reads_the_cache(model: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = windows_of(model)
    assert len(list(cache_folder.iterdir())) == 1
    no_writing(monkeypatch)
    again = windows_of(model)
    assert torch.equal(again.tokens, first.tokens)
    assert again.record == first.record


def test_other_weights_tokenizers_seeds_and_sizes_are_written_anew(model: Any, cache_folder: Path) -> None:
    other = dense("llama-gqa-tied", seed=1)
    changed = tokenizer()
    changed.add_tokens(["another"])
    variants: list[Any] = [
        windows_of(model),
        windows_of(other),
        windows_of(model, found=changed),
        windows_of(model, found=chat_tokenizer()),
        windows_of(model, seed=1),
        windows_of(model, length=23),
        windows_of(model, windows=5),
    ]
    assert len(list(cache_folder.iterdir())) == len(variants)
    assert not torch.equal(variants[0].tokens, variants[1].tokens)
    assert torch.equal(variants[0].tokens[:5], variants[-1].tokens)


@pytest.mark.parametrize("damage", ["cut", "other", "shape", "ids", "name"])
def test_damaged_cache_is_written_again(
    model: Any, cache_folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = windows_of(model).tokens
    (file,) = cache_folder.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "name":
        save_file({"windows": tokens}, file)
    else:
        changed = {"other": (tokens + 1) % 260, "shape": tokens[:3], "ids": tokens + 260}[damage]
        digest = cache.digest_of(tokens if damage == "other" else changed)
        save_file({"tokens": changed.contiguous()}, file, metadata={"sha256": digest})
    caplog.clear()
    assert torch.equal(windows_of(model).tokens, tokens)
    assert "written again" in caplog.text
    caplog.clear()
    assert torch.equal(windows_of(model).tokens, tokens)
    assert not caplog.text


def test_cache_that_cannot_be_written_is_a_warning(
    model: Any, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_folder.parent.write_text("a file")
    assert windows_of(model).tokens.shape == (6, 24)
    assert "cannot be cached" in caplog.text


def test_degenerate_windows_are_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "write", lambda _, __, noise, **___: torch.full(noise.shape, 5))
    with pytest.raises(CalibrationDataError, match="self: 6 of the 6 windows contain fewer than"):
        windows_of(model)


def test_few_windows_are_written_at_once_if_memory_is_small(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, sizes = windows_of(model).tokens, []
    needed = cache.bytes_of_window(model, 24, model.dtype)
    monkeypatch.setattr(cache, "kept_tokens", lambda *_: None)
    monkeypatch.setattr(cache.Free, "now", lambda _: cache.Free(int(4.5 * needed)))
    monkeypatch.setattr(cache, "write", lambda *args, **more: sizes.append(len(args[2])) or write(*args, **more))
    assert torch.equal(windows_of(model).tokens, expected)
    assert sizes == [2, 2, 2]


def test_lent_model_gets_its_own_tensors_back(model: Any) -> None:
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    with lent(model, torch.device("meta"), model.dtype):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert all(now is own for now, own in zip(model.parameters(), parameters, strict=True))


def test_a_model_writes_in_float32_if_16_bits_are_slow(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[Any] = []

    def noted(writer: Any, *args: Any, **more: Any) -> Tensor:
        dtypes.append({each.dtype for each in writer.parameters()})
        return write(writer, *args, **more)

    monkeypatch.setattr(cache, "write", noted)
    model = model.to(torch.bfloat16)
    set_rate_in_16_bits(monkeypatch, slowdown=7)
    assert windows_of(model).tokens.shape == (6, 24)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    set_rate_in_16_bits(monkeypatch, slowdown=1)
    monkeypatch.setattr(cache, "kept_tokens", lambda *_: None)
    windows_of(model)
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


# ------------------------------------------------------------------------------------------------------------ entries


def test_every_entry_writes_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_dense(tmp_path / "dense")
    settings = ModeGPTConfig(**RECIPE, dataset="self")
    quantizer = ModeGPTQuantizer(settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantizer.compress_model(model, progress=False)
    record = model.config.modegpt["calibration"]
    assert record["name"] == "self"
    assert record["vocabulary_sha256"]
    no_writing(monkeypatch)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(folder, compression_config=settings),
        ModeGPTModelForCausalLM.from_pretrained(folder, compression_config=settings),
    ):
        assert loaded.config.modegpt["calibration"] == record
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert cli.main(["compress", str(folder), "--output", str(tmp_path / "o"), *FLAGS, "--dataset", "self"]) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text(encoding="utf-8"))
    assert report["calibration"] == record
    assert " --dataset self" in " ".join(report["commands"]["compress"])


def test_mixture_of_a_file_and_the_model(tmp_path: Path) -> None:
    folder, text = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt")
    output = tmp_path / "out"
    words = ["compress", str(folder), "--output", str(output), *FLAGS, "--dataset", f"{text}=0.75", "self=0.25"]
    assert cli.main(words) == 0
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert [(each["name"], each["windows"]) for each in report["calibration"]["sources"]] == [
        ("text.txt", 6),
        ("self", 2),
    ]
    assert "2 windows of `self`" in (output / "README.md").read_text(encoding="utf-8")


def test_errors_come_before_the_weights_are_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_dense(tmp_path / "dense")
    (folder / "model.safetensors").unlink()
    words = ["compress", str(folder), "--output", str(tmp_path / "o"), *FLAGS, "--ignore-estimate"]
    assert cli.main([*words, "--dataset", "self", str(tmp_path / "missing.txt")]) == 2
    assert "no such file" in capsys.readouterr().err
    found = chat_tokenizer("nothing")
    found.save_pretrained(folder)
    assert cli.main([*words, "--dataset", "self"]) == 2
    assert "chat template" in capsys.readouterr().err


def test_estimate_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_writing(monkeypatch)
    assert cli.main(["estimate", str(save_dense(tmp_path / "dense")), *FLAGS, "--dataset", "self"]) == 0


def test_recovery_reads_text_of_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="peft is not installed (pip install 'optimum-modegpt[recover]')")
    folder, text = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt")
    small = tmp_path / "small"
    assert cli.main(["compress", str(folder), "--output", str(small), *FLAGS, "--dataset", str(text)]) == 0
    words = ["recover", str(small), "--output", str(tmp_path / "o"), "--dataset", "self", "--num-samples", "40"]
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "--teacher" in capsys.readouterr().err
    assert cli.main([*words, "--teacher", str(folder), "--steps", "12", "--batch-size", "4"]) == 0
    record = json.loads((tmp_path / "o" / "config.json").read_text(encoding="utf-8"))["modegpt"]["recovered"]
    assert (record["dataset"], record["windows"]) == ("self", 40)


def test_progress_is_shown(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = script_of(tokenizer(), 24)
    with shown_as("bars"):
        self_windows(model, tokenizer(), script, windows=3, length=24, seed=5, progress=True)
    assert "write calibration text: 100%" in capsys.readouterr().err
