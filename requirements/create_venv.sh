#!/usr/bin/env bash
# Makes a virtual environment with the tools that install the rest: create_venv.sh DIRECTORY.
# Looks first for what an installation needs from the machine (Python >= 3.10 with venv, Python's headers,
# a C++17 compiler) and says what is missing, so that nobody waits for a download that ends in a compiler error.
# PYTHON=/path/to/python chooses the interpreter, CXX=... the compiler.
set -euo pipefail

venv=$1
requirements=$(dirname "$0")

fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    printf '  %s\n' "$@" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is no working Python >= 3.10." "Leave PYTHON out to have one looked for."
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.10 found (python3 is: $(python3 --version 2>&1 || echo missing))." \
        "Install one, or name one: make venv PYTHON=/path/to/python3.11"
}

python=$(find_python)
# In an active virtual environment (perhaps the very one to be made) take the Python beneath it.
python=$("$python" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)')
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module." "On Debian and Ubuntu: apt install python3-venv"

# The compiler that setuptools is going to use: $CXX, else the one this Python was configured with.
compiler=${CXX:-$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("CXX") or "c++")')}
command -v "${compiler%% *}" >/dev/null ||
    fail "no C++ compiler: ${compiler%% *} is not in PATH." \
        "On Debian and Ubuntu: apt install g++; or name another one: make venv CXX=clang++"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
# shellcheck disable=SC2086  # the compiler may come with options
echo '#include <Python.h>' | $compiler -std=c++17 -fsyntax-only -I"$include" -x c++ - ||
    fail "$compiler cannot compile against Python's headers in $include (its message is above)." \
        "On Debian and Ubuntu: apt install python3-dev"

# An environment whose interpreter is gone or too old (a removed Python, a moved folder) is made anew.
clear=()
if [ -d "$venv" ] && ! is_new_enough "$venv/bin/python"; then
    clear=(--clear)
fi
"$python" -m venv ${clear[@]+"${clear[@]}"} "$venv"
"$venv/bin/python" -m pip install --quiet --requirement "$requirements/build.txt"
echo "$venv: $("$venv/bin/python" --version)"
