"""The front door: lazy imports, honest metadata, rooms that stay where they are."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import art_rs_plugins


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_art():
    assert run("import sys, art_rs_plugins; print({'torch', 'art'} & set(sys.modules))") == "set()"


def test_help_loads_neither_torch_nor_art():
    code = """
import sys
from art_rs_plugins.cli import main
sys.argv = ["art-rs", "--help"]
try:
    main()
except SystemExit as stop:
    print(stop.code, {"torch", "art", "matplotlib", "numpy"} & set(sys.modules))
"""
    assert run(code).splitlines()[-1] == "0 set()"


def test_theory_loads_no_torch():
    code = "import sys, pkgutil, importlib, art_rs_plugins.theory as t\n" + (
        "[importlib.import_module(f'{t.__name__}.{m.name}') for m in pkgutil.iter_modules(t.__path__)]\n"
        "print({'torch', 'art', 'matplotlib'} & set(sys.modules))"
    )
    assert run(code) == "set()"


def test_public_names_are_all_there():
    for name in art_rs_plugins.__all__:
        assert getattr(art_rs_plugins, name) is not None
    assert set(dir(art_rs_plugins)) == set(art_rs_plugins.__all__)
    with pytest.raises(AttributeError, match="no attribute 'certfy'"):
        art_rs_plugins.certfy   # noqa: B018


def test_public_callables_state_their_shapes_and_guarantee():
    for name in ("certify", "predict", "count_votes", "PyTorchSmoothedClassifier"):
        text = getattr(art_rs_plugins, name).__doc__
        for part in ("Parameters", "Raises", "*Guarantee.*"):
            assert part in text, (name, part)


def test_metadata_declares_what_art_forgot():
    wanted = importlib.metadata.requires("art-rs-plugins")
    assert any(line.startswith("packaging") for line in wanted)
    assert any(line.startswith("torch<2.14,>=2.4") for line in wanted)
    assert any(line.startswith("adversarial-robustness-toolbox<1.21,>=1.20.1") for line in wanted)
    assert importlib.metadata.version("art-rs-plugins") == art_rs_plugins.__version__
