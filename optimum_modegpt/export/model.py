"""Export a model to the format of another tool."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.export.formats import FORMATS, Format
from optimum_modegpt.export.gguf import check_gguf_output
from optimum_modegpt.output import check_output, checkpoint_of, replacing, restore_output, saving
from optimum_modegpt.walk.guards import evaluation_mode


def export_model(
    model: PreTrainedModel,
    path: str | Path,
    format: str,
    *,
    tokenizer: Any = None,
    files: Iterable[Path] = (),
    dtype: str = "auto",
    cache_length: int | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Export a model to the format of another tool, and return remarks on the result, if any.

    Nothing new remains at `path` if that fails.

    Args:
        model: a compressed model, or one of a stock class, with its weights in memory.
        path: the folder to write; for "gguf", the file.
        format: "dense", "onnx", "openvino", "executorch" or "gguf".
        tokenizer: the model's tokenizer, which is saved with it.
        files: more files to copy to the folder, such as those of a processor of images.
        dtype: the data type of the matrices in a GGUF file: "auto", "f32", "f16", "bf16" or "q8_0". The other
            formats have that of the model.
        cache_length: the longest text of a program for ExecuTorch, in tokens. None takes 2,048, or the context of the
            model if that is shorter. The other formats have no such limit.
        overwrite: whether to overwrite an earlier export.

    Raises:
        InvalidConfig: the format is unknown, or cannot have this data type or cache length.
        ImportError: a package is missing. The message names the extra to install.
        OutputError: `path` cannot or must not be written.
        UnsupportedModel: the format cannot hold the model. The message names the part and an alternative.
    """
    chosen = requested(format)
    known = ("auto", *(chosen.dtypes or ()))
    if dtype not in known:
        raise InvalidConfig(f"found dtype={dtype!r}; {format} takes {', '.join(known)}. Load the model in that type.")
    check_cache_length(cache_length, chosen)
    path = Path(path).resolve()  # the folder next to it is on the same disk
    check_path(path, chosen, overwrite=overwrite)
    limits = {"cache_length": cache_length} if chosen.fixed_cache else {}
    with evaluation_mode(model):
        if chosen.dtypes is not None:
            stored = {} if dtype == "auto" else {"dtype": dtype}
            return chosen.writer()(model, tokenizer, path, overwrite=overwrite, **stored).notes
        work = checkpoint_of(path)
        with work.alone():
            restore_output(work.folder, path)
            with replacing(path, overwrite=overwrite, work_folder=work.folder) as folder, saving(path):
                chosen.writer()(model, tokenizer, folder, **limits)
                for file in files:
                    shutil.copyfile(file, folder / file.name)
    return ()


def requested(name: str) -> Format:
    """Return the format of this name, after checking that its packages are installed.

    Raises:
        InvalidConfig: there is none.
        ImportError: a package is missing.
    """
    if name not in FORMATS:
        raise InvalidConfig(f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}.")
    FORMATS[name].check_installed()
    return FORMATS[name]


def check_cache_length(cache_length: int | None, chosen: Format) -> None:
    """Check that a format takes the length of a cache, if one is given.

    Raises:
        InvalidConfig: it does not.
    """
    if cache_length is not None and not chosen.fixed_cache:
        takes = ", ".join(each.name for each in FORMATS.values() if each.fixed_cache)
        raise InvalidConfig(f"found a cache length of {cache_length}; only {takes} takes one, not {chosen.name}.")


def check_path(path: Path, chosen: Format, *, overwrite: bool, used: Iterable[Path] = ()) -> None:
    """Check that a result of a format may be written to `path`. `used` are the other paths that the run uses.

    Raises:
        OutputError: it may not.
    """
    if not chosen.is_file:
        check_output(path, overwrite=overwrite, used=used)
        return
    check_gguf_output(path, overwrite=overwrite)
