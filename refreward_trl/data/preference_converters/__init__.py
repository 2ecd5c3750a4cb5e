"""Reads preference data in other people's layouts."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from refreward_trl.data.preference_converters import label_studio, pickapic, refsr, trl
from refreward_trl.data.preference_converters.options import ConvertOptions
from refreward_trl.data.preference_converters.tables import peek_columns
from refreward_trl.data.preference_files import read_preferences
from refreward_trl.data.preference_records import PreferenceRecord
from refreward_trl.errors import ConfigError, DataError

__all__ = ["FORMATS", "NATIVE", "ConvertOptions", "convert_preferences", "detect_format"]

NATIVE = "native"
FORMATS: dict[str, ModuleType] = {"refsr": refsr, "trl": trl, "pickapic": pickapic, "labelstudio": label_studio}


def detect_format(path: str | Path) -> str:
    """Tells which layout data have: a key of `FORMATS`, or `NATIVE` for our own.

    Raises:
        DataError: Nothing is there.
        ConfigError: It is none of these.
    """
    path = Path(path)
    if not path.exists():
        raise DataError("there is nothing here", where=str(path), fix="check the path")
    if {"candidates", "sample_id"} <= peek_columns(path):
        return NATIVE
    found = [name for name, module in FORMATS.items() if module.detects(path)]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(sorted(peek_columns(path)))
    raise ConfigError(
        f"{' and '.join(found)} fit" if found else f"no layout fits{f', columns: {columns}' if columns else ''}",
        where=str(path),
        fix=f"name it: --from {'|'.join((*FORMATS, NATIVE))}; `refreward data convert --help` describes them",
    )


def convert_preferences(
    path: str | Path, format: str, options: ConvertOptions | None = None
) -> list[PreferenceRecord]:
    """Reads data of a layout.

    Args:
        path: The data.
        format: A key of `FORMATS`, or `NATIVE`.
        options: What is not as the layout has it.

    Raises:
        ConfigError: An option does not belong to the layout.
        DataError: Rows are wrong; the first ten are named and all counted.
    """
    options = options or ConvertOptions()
    if format == NATIVE:
        return read_preferences(path)
    module = FORMATS[format]
    if unknown := sorted(options.columns.keys() - set(module.KEYS)):
        raise ConfigError(
            f"{format} has no key {unknown[0]!r}", where="--columns", fix=f"there are {', '.join(module.KEYS)}"
        )
    return module.read(Path(path), options)
