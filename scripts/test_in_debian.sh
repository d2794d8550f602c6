#!/usr/bin/env bash
# Runs the fast tests with the Python of another Debian, for which `make test` has no environment on Debian 12.
#
#   scripts/test_in_debian.sh trixie               with Python 3.13
#   scripts/test_in_debian.sh sid                  with Python 3.14
#   scripts/test_in_debian.sh sid python3.15       with another Python that sid has
#   scripts/test_in_debian.sh --llama-server sid   the tests with real servers, on the llama-server that is packaged by sid
#
# Further arguments are passed on to pytest, in place of the selection of tests.
#
# The system is unpacked into a folder by debootstrap, once, and the tests run in it by chroot; so this needs root and
# Debian or Ubuntu. A container image would need a registry, and the interpreters that PyPI and npm offer are either older
# or download the real one from another host. What is mounted is visible only to this script and its children, so that the
# folder can be removed at any time, for example because sid has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

llama_server=
if [ "${1:-}" = --llama-server ]; then
  llama_server=/usr/bin/llama-server
  shift
fi
suite=${1:?'name a suite: trixie or sid'}
shift
python=python3
if [[ ${1:-} == python3* ]]; then
  python=$1
  shift
fi
root=$PWD/.venv-$suite

if [ ! -e "$root/unpacked" ]; then
  command -v debootstrap >/dev/null || { apt-get update -q && apt-get install -qy debootstrap; }
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates,curl,git,libgomp1,procps,python3-venv "$suite" "$root"
  touch "$root/unpacked"
fi
# The network and the certificates are those of this machine.
cp /etc/resolv.conf /etc/hosts "$root/etc/"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
mkdir -p "$root/lmbridge"

inside() {
  env -u PIP_CONSTRAINT -u PIP_FIND_LINKS -u VIRTUAL_ENV PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8 \
    unshare --mount --propagation private bash -c '
      root=$1; shift
      mount --bind . "$root/lmbridge"
      mount --bind /dev "$root/dev"
      mount --bind /dev/pts "$root/dev/pts"
      mount -t tmpfs tmpfs "$root/dev/shm"
      mount -t tmpfs tmpfs "$root/tmp"
      mount -t proc proc "$root/proc"
      exec chroot "$root" env -C /lmbridge "$@"
    ' inside "$root" "$@"
}

# Installs packages of the suite, where they are missing.
packages() {
  inside dpkg-query --show "$@" >/dev/null 2>&1 && return
  inside apt-get update -q
  inside env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"
}

if [ "$python" != python3 ]; then
  packages "$python-venv"
fi
if [ -n "$llama_server" ]; then
  packages llama.cpp-tools
fi
venv=/venv-$python
if [ ! "$root$venv/installed" -nt pyproject.toml ]; then
  inside "$python" -m venv --clear "$venv"
  inside "$venv/bin/python" -m pip install -qq --disable-pip-version-check 'pip>=25.1'
  inside "$venv/bin/python" -m pip install -qq --disable-pip-version-check --group dev \
    -e '.[cli,gateway,langchain,local,mcp,openai-agents,otel,pydantic-ai]'
  touch "$root$venv/installed"
fi
inside "$venv/bin/python" --version
if [ -n "$llama_server" ]; then
  inside "$llama_server" --version
  export LMBRIDGE_TEST_LLAMA_SERVER=$llama_server
fi
if [ "$#" = 0 ]; then
  if [ -n "$llama_server" ]; then
    set -- -n auto --dist worksteal -m real tests/real
  else
    set -- -n auto --dist worksteal -m 'not slow and not real'
  fi
fi
inside "$venv/bin/python" -m pytest "$@"
