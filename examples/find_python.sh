# Sourced by the recipes: sets $python to one that has pcpo_fast. PYTHON names another; then come the active environment,
# the one that make has made, and what is on the path.
for python in "${PYTHON:-}" "${VIRTUAL_ENV:-}/bin/python" "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python" python3 python ""; do
  [ -n "$python" ] && command -v "$python" >/dev/null && "$python" -c 'import pcpo_fast' 2>/dev/null && break
done
[ -n "$python" ] || {
  echo "error: no Python with pcpo_fast found: run make install, activate its environment, or name one with PYTHON=..." >&2
  exit 2
}
