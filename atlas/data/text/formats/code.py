"""Names of source code and settings."""

from __future__ import annotations

import posixpath

_ENDINGS = """
    py pyi pyx c h cc cpp cxx hh hpp cs java js mjs cjs ts tsx jsx go rs rb php pl pm t sh bash zsh
    fish ps1 bat cmd lua r jl swift kt kts scala clj cljs hs ml mli fs fsx ex exs erl el lisp scm
    vim sql css scss sass less vue svelte xml xsl xsd yaml yml toml ini cfg conf cmake mk am ac m4
    in gradle ipynb proto asm s f f90 f95 pas d dart zig nim m mm v sv vhd vhdl tcl awk sed diff
    patch dts dtsi ld lds glsl cu cuh rules service desktop spec po pot svg map lock bib sty cls
    groovy tf nix bzl bazel j2 tmpl
    """
_CODE = frozenset(f".{ending}" for ending in _ENDINGS.split())
_CODE_NAMES = frozenset(
    ("makefile", "dockerfile", "kconfig", "kbuild", "cmakelists.txt", "jenkinsfile", "rakefile")
)


def is_code_name(name: str) -> bool:
    """Return whether a file has the name of source code, settings or translations."""
    name = name.lower()
    return posixpath.splitext(name)[1] in _CODE or name in _CODE_NAMES
