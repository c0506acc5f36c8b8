"""Builds the C++ extension `megatron_mer._index`; all metadata stands in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# -ffp-contract=off: a plan must not depend on whether the compiler fuses a multiply and an add.
extension = Pybind11Extension(
    "megatron_mer._index",
    sources=["csrc/bindings.cpp"],
    depends=sorted(glob("csrc/*.hpp")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
)

setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
