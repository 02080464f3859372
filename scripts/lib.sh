# shellcheck shell=bash
# What the scripts share. To be sourced; it changes to the root of the repository.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export VENV_PYTHON=.venv/bin/python

say() { printf '==> %s\n' "$*"; }
die() { printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# python_package PROFILE: puts the native part of the Python package, built before, in its place in ffi/python.
python_package() {
    local target
    target=$(cargo metadata --format-version 1 --no-deps |
        "$VENV_PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
    # By rename: a process that has the old one mapped keeps it.
    cp "$target/$1/lib_native.so" ffi/python/lodestream/_native.tmp
    mv ffi/python/lodestream/_native.tmp ffi/python/lodestream/_native.abi3.so
}

# lint_rust: what both scripts/check and scripts/test ask of the source before anything is run.
lint_rust() {
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
}

# lint_scripts: every script parses; shellcheck reads the shell scripts where it is installed.
lint_scripts() {
    local script shell=() python=()
    for script in scripts/* scripts/vm.d/* benches/* benches/versus/* .ci/*; do
        [ -f "$script" ] || continue
        case "$script:$(head -n 1 "$script")" in
            *bash*) shell+=("$script") ;;
            *python*) python+=("$script") ;;
        esac
    done
    local file
    for file in "${shell[@]}"; do bash -n "$file"; done
    # compile() instead of py_compile: nothing is written beside the scripts.
    python3 - "${python[@]}" scripts/*.py benches/versus/*.py benches/harness/*.py benches/harness/tests/*.py <<'PY'
import pathlib, sys
for name in sys.argv[1:]:
    compile(pathlib.Path(name).read_text(), name, "exec")
PY
    if have shellcheck; then
        shellcheck -x "${shell[@]}"
    else
        say "shellcheck is not installed: shell scripts were only parsed"
    fi
}
