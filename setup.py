"""Builds the CPU kernels (sharding/kernels/csrc) as `sharding.kernels._cpu`.

Everything else about the package is in pyproject.toml. A build that fails, for want of a C++
compiler say, is reported and not fatal: Longspan then computes with the reference kernels and says
so at start. LONGSPAN_CXXFLAGS adds options for compiler and linker (`make sanitize`).
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanobind
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("sharding/kernels/csrc")
BINDING = Path(nanobind.source_dir())
X86 = platform.machine() in ("x86_64", "AMD64")

COMMON = ["-std=c++20", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
# Contraction would fuse what the source does not, differently in each compiler.
COMMON += ["-ffp-contract=off", "-fno-strict-aliasing"]
# GCC 12 warns of its own headers for AVX-512.
COMMON += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
# Vectors wider than an instruction set's registers never leave a file.
COMMON += ["-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
OF_FILE = {
    "avx512.cpp": ["-O3", *(AVX512 if X86 else [])],
    "avx512_vnni.cpp": ["-O3", *([*AVX512, "-mavx512vnni", "-fno-schedule-insns2"] if X86 else [])],
    "avx2.cpp": ["-O3", *(AVX2 if X86 else [])],
    "portable.cpp": ["-O2", "-ftree-vectorize"],
    "weight.cpp": ["-O3"],
    "experts.cpp": ["-O3"],
    "nb_combined.cpp": ["-Os"],
}


class BuildKernels(build_ext):
    """Gives each file its own options and compiles several at a time."""

    def build_extension(self, ext: Extension) -> None:
        """Called by setuptools for the one extension."""
        extra = os.environ.get("LONGSPAN_CXXFLAGS", "").split()
        plain = self.compiler.compile

        def compile_one(source: str, options: dict[str, object]) -> list[str]:
            own = [*COMMON, *OF_FILE.get(Path(source).name, []), *extra]
            return plain([source], **(options | {"extra_postargs": own}))

        def compile_all(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                jobs = [threads.submit(compile_one, source, options) for source in sources]
            return [built for job in jobs for built in job.result()]

        self.compiler.compile = compile_all
        ext.extra_link_args += extra
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "sharding.kernels._cpu",
            sources=[*map(str, sorted(SOURCES.glob("*.cpp"))), str(BINDING / "nb_combined.cpp")],
            depends=[*map(str, sorted(SOURCES.glob("*.h")))],
            include_dirs=[nanobind.include_dir(), str(BINDING.parent / "ext/robin_map/include")],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
