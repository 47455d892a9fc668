"""``setup.py`` as a module, for tests of its parts."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from paths import ROOT


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dcconv_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = _load()
