# Where things are, for the scripts beside this file. Each can be set from outside:
#   TUNEBOOK_VENV     Python environment with JupyterLab and the kernel's spec   (.venv)
#   TUNEBOOK_TOOLS    the evcxr_jupyter program                                  (~/.cache/tunebook)
#   CARGO_TARGET_DIR  compiled dependencies, and the workspaces of the kernels   (target)
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${TUNEBOOK_VENV:-$repo/.venv}
tools=${TUNEBOOK_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/tunebook}
target=${CARGO_TARGET_DIR:-$repo/target}
case $target in /*) ;; *) target=$repo/$target ;; esac
workspaces=$target/evcxr
template=$workspaces/template
evcxr_version=0.22.0
command -v cargo >/dev/null || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 1
}
